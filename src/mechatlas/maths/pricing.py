"""Costs of pairing rows with columns, priced block by block; nothing of the size rows x columns.

    Factors    c_ij = row_offset_i + column_offset_j - 2 <a_i, b_j>, such as squared distances
    Replaced   such costs of which some columns are others'
    Matrix     costs that are given as a matrix
    Padded     costs of any kind, with rows added that cost nothing
    as_costs   an array-like value -> `Matrix`

Both give blocks of costs in the arithmetic that is fast, a bound on how far a block is from the
exact costs (of the numbers given, in real arithmetic up to float64), and exact costs of pairs.

Source of the bound: Higham, Accuracy and Stability of Numerical Algorithms (2002), section 3.1:
a sum of d products in any order is within d u / (1 - d u) of the sum of their sizes.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from numpy.typing import ArrayLike
from torch import Tensor

from mechatlas.base import InputError
from mechatlas.maths.arrays import as_array

HALF_ULP = 2.0**-24
"""Unit roundoff of float32."""
BFLOAT16_HALF_ULP = 2.0**-8
"""Unit roundoff of bfloat16."""
EPSILON = 2.0**-52
"""Distance from 1 to the next number in float64."""
BLOCK_BYTES = 192 << 20
"""Size of a block of costs in float32."""
COLUMNS = 16384
"""Columns that are multiplied at a time: a product in bfloat16 begins with a copy of them."""
KEPT_BYTES = 2400 << 20
"""Size up to which all costs in float32 are kept: 25,000 x 25,000."""
CPU = torch.device("cpu")
FEW = 16
"""Number of rows that are not worth another thread."""
Work = TypeVar("Work")
Index = slice | Int[np.ndarray, " part"]
"""Rows, as an index of an array."""


@runtime_checkable
class Costs(Protocol):
    """Costs of pairing rows with columns, as a solver needs them."""

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        ...

    @property
    def n_columns(self) -> int:
        """Number of columns."""
        ...

    def block(self, rows: Index) -> Float[np.ndarray, "part m"]:
        """Costs of some rows with every column."""
        ...

    def rounding(self, rows: Index) -> Float[np.ndarray, " part"]:
        """Bound on the distance of a cost of `block` from the exact one, for each row."""
        ...

    def exact(
        self, rows: Int[np.ndarray, " pair"], columns: Int[np.ndarray, " pair"]
    ) -> Float[np.ndarray, " pair"]:
        """Costs of pairs in float64."""
        ...

    def matrix(self) -> Float[np.ndarray, "n m"]:
        """All costs in float64, for few rows and columns."""
        ...

    def last_digits(self) -> float:
        """Bound on the rounding of a cost in float64, plus or minus its prices."""
        ...

    def transposed(self) -> "Costs":
        """Costs with rows and columns exchanged."""
        ...


def as_costs(costs: "Costs | ArrayLike | Tensor") -> Costs:
    """Take costs as they are, or make a `Matrix` of numpy, torch or lists.

    Raises:
        InputError: The value is no matrix of finite numbers.
    """
    return costs if isinstance(costs, Costs) else Matrix(as_array(costs, "n m", "costs"))


@dataclasses.dataclass(frozen=True, eq=False)
class Factors:
    """Costs row_offset_i + column_offset_j - 2 <a_i, b_j>, never all of them at once.

    Raises:
        InputError: A factor is empty or not finite, or costs are more than float32 holds.
    """

    a: Float[np.ndarray, "n d"]
    """Vectors of rows."""
    b: Float[np.ndarray, "m d"]
    """Vectors of columns."""
    row_offsets: Float[np.ndarray, " n"]
    column_offsets: Float[np.ndarray, " m"]
    device: torch.device = dataclasses.field(default=CPU, kw_only=True)
    """Device on which blocks are computed."""
    precision: str = dataclasses.field(default="highest", kw_only=True)
    """Precision of blocks: "highest" is float32, "medium" may be bfloat16 with sums in float32."""

    def __post_init__(self) -> None:
        parts = {"rows": self.a, "columns": self.b}
        parts |= {"row offsets": self.row_offsets, "column offsets": self.column_offsets}
        for name, array in parts.items():
            if array.size == 0 or not np.isfinite(array.sum(dtype=np.float64)):
                _refuse(name, array)
        largest = self._largest()
        if largest > float(np.finfo(np.float32).max):
            raise InputError(
                f"Costs reach {largest:.1e}, more than float32 holds: scale them down."
            )

    @classmethod
    def squared_distances(
        cls,
        a: Float[np.ndarray, "n d"],
        b: Float[np.ndarray, "m d"],
        device: torch.device = CPU,
    ) -> "Factors":
        """Costs |a_i - b_j|^2.

        Args:
            a: Vectors of rows.
            b: Vectors of columns.
            device: Device on which blocks are computed.

        Raises:
            InputError: A factor is empty or has a NaN or an infinity.
        """
        squares = [np.einsum("nd,nd->n", x, x, dtype=np.float64) for x in (a, b)]
        return cls(a, b, *squares, device=device)

    def with_columns(self, b: Float[np.ndarray, "m d"], precision: str = "highest") -> "Factors":
        """Squared distances of the same rows to other vectors."""
        squares = np.einsum("nd,nd->n", b, b, dtype=np.float64)
        offsets = self.row_offsets, squares
        return Factors(self.a, b, *offsets, device=self.device, precision=precision)

    def __getstate__(self) -> dict[str, Any]:
        """Fields alone: a worker makes by itself what is kept beside them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.a)

    @property
    def n_columns(self) -> int:
        """Number of columns."""
        return len(self.b)

    @cached_property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return tuple(  # pyright: ignore[reportReturnType]
            torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).to(self.device)
            for x in (self.a, self.b, self.row_offsets, self.column_offsets)
        )

    def block(self, rows: Index) -> Float[np.ndarray, "part m"]:
        """Costs of some rows with every column, in float32."""
        a, b, row_offsets, column_offsets = self._tensors
        some = rows if isinstance(rows, slice) else torch.tensor(rows, device=self.device)
        some_a = a[some]
        block = a.new_empty(len(some_a), len(b))
        with multiplying(self.precision):
            for start in range(0, len(b), COLUMNS):
                part = slice(start, start + COLUMNS)
                block[:, part] = torch.addmm(column_offsets[part], some_a, b[part].T, alpha=-2)
        return block.add_(row_offsets[some, None]).cpu().numpy()

    @cached_property
    def _norms(self) -> tuple[np.ndarray, np.ndarray]:
        lengths = [np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float64)) for x in (self.a, self.b)]
        return lengths[0], lengths[1]

    def _largest(self) -> float:
        """Bound on every cost and every sum on the way to it."""
        a, b = self._norms
        offsets = np.abs(self.row_offsets).max() + np.abs(self.column_offsets).max()
        return float(2 * a.max() * b.max() + offsets)

    def rounding(self, rows: Index) -> Float[np.ndarray, " part"]:
        """Bound by Cauchy and Schwarz, with two roundings of offsets and factors and two sums."""
        terms = self.a.shape[1] + 6
        share = terms * HALF_ULP / (1 - terms * HALF_ULP)
        if self.precision != "highest":
            share = (1 + share) * (1 + BFLOAT16_HALF_ULP) ** 2 - 1  # both factors are rounded
        a, b = self._norms
        sizes = 2 * a[rows] * b.max() + np.abs(self.row_offsets)[rows]
        # Numbers below the smallest normal one lose up to that much in each operation.
        tiny = 2 * terms * float(np.finfo(np.float32).tiny)
        return share * (sizes + np.abs(self.column_offsets).max()) * (1 + 1e-9) + tiny

    def exact(
        self, rows: Int[np.ndarray, " pair"], columns: Int[np.ndarray, " pair"]
    ) -> Float[np.ndarray, " pair"]:
        """Costs of pairs in float64."""
        costs = np.empty(len(rows))
        for start in range(0, len(rows), 4096):
            part = slice(start, start + 4096)
            i, j = rows[part], columns[part]
            dots = np.einsum("nd,nd->n", self.a[i], self.b[j], dtype=np.float64)
            costs[part] = self.row_offsets[i].astype(np.float64) + self.column_offsets[j] - 2 * dots
        return costs

    def matrix(self) -> Float[np.ndarray, "n m"]:
        """All costs in float64."""
        wide = self.a.astype(np.float64) @ self.b.T.astype(np.float64)
        return self.row_offsets[:, None] + self.column_offsets - 2 * wide

    def last_digits(self) -> float:
        """Bound on the rounding of a cost in float64, plus or minus its prices."""
        return (self.a.shape[1] + 8) * EPSILON * self._largest()

    def transposed(self) -> "Factors":
        """Costs with rows and columns exchanged."""
        offsets = self.column_offsets, self.row_offsets
        return Factors(self.b, self.a, *offsets, device=self.device)

    def kept(self) -> "Factors":
        """Costs whose blocks are kept, if that takes moderate memory."""
        if 4 * self.n_rows * self.n_columns > KEPT_BYTES:
            return self
        return Kept(**self.__getstate__())


@dataclasses.dataclass(frozen=True, eq=False)
class Kept(Factors):
    """Factors whose blocks are computed once."""

    @cached_property
    def _values(self) -> np.ndarray:
        values = np.empty((self.n_rows, self.n_columns), np.float32)
        step = block_rows(self)
        for start in range(0, self.n_rows, step):
            values[start : start + step] = super().block(slice(start, start + step))
        return values

    def block(self, rows: Index) -> Float[np.ndarray, "part m"]:
        """Costs of some rows with every column, in float32; rows in a row are not copied."""
        if not isinstance(rows, slice) and len(rows) and rows[-1] - rows[0] == len(rows) - 1:
            rows = slice(int(rows[0]), int(rows[-1]) + 1)
        return self._values[rows]

    def kept(self) -> "Kept":
        """Costs as they are."""
        return self


@dataclasses.dataclass(frozen=True, eq=False)
class Replaced:
    """Factors of which some columns are others', which no copy of all columns is needed for."""

    before: Factors
    """Costs of all columns before that."""
    columns: Int[np.ndarray, " new"]
    """Columns that are others now."""
    others: Factors
    """Costs of these alone."""

    def __getstate__(self) -> dict[str, Any]:
        """Fields alone: a worker makes by itself what is kept beside them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.before.n_rows

    @property
    def n_columns(self) -> int:
        """Number of columns."""
        return self.before.n_columns

    @cached_property
    def place(self) -> Int[np.ndarray, " m"]:
        """Number of each column among the others; -1 for those that stay."""
        place = np.full(self.n_columns, -1)
        place[self.columns] = np.arange(len(self.columns))
        return place

    @property
    def a(self) -> Float[np.ndarray, "n d"]:
        """Vectors of rows."""
        return self.before.a

    @cached_property
    def b(self) -> Float[np.ndarray, "m d"]:
        """Vectors of columns, a copy."""
        return self._with_others(self.before.b, self.others.b)

    @property
    def row_offsets(self) -> Float[np.ndarray, " n"]:
        """Offsets of rows."""
        return self.before.row_offsets

    @cached_property
    def column_offsets(self) -> Float[np.ndarray, " m"]:
        """Offsets of columns."""
        return self._with_others(self.before.column_offsets, self.others.column_offsets)

    def _with_others(self, values: np.ndarray, others: np.ndarray) -> np.ndarray:
        values = values.copy()
        values[self.columns] = others
        return values

    def block(self, rows: Index) -> Float[np.ndarray, "part m"]:
        """Costs of some rows with every column, in float32."""
        block = self.before.block(rows)
        if isinstance(self.before, Kept) and not block.flags.owndata:
            block = block.copy()  # of what is kept
        block[:, self.columns] = self.others.block(rows)
        return block

    def rounding(self, rows: Index) -> Float[np.ndarray, " part"]:
        """Bound on the distance of a cost of `block` from the exact one, for each row."""
        return np.maximum(self.before.rounding(rows), self.others.rounding(rows))

    def exact(
        self, rows: Int[np.ndarray, " pair"], columns: Int[np.ndarray, " pair"]
    ) -> Float[np.ndarray, " pair"]:
        """Costs of pairs in float64."""
        place, costs = self.place[columns], np.empty(len(rows))
        new, old = np.flatnonzero(place >= 0), np.flatnonzero(place < 0)
        costs[old] = self.before.exact(rows[old], columns[old])
        costs[new] = self.others.exact(rows[new], place[new])
        return costs

    def matrix(self) -> Float[np.ndarray, "n m"]:
        """All costs in float64."""
        return self._with_others(self.before.matrix().T, self.others.matrix().T).T

    def last_digits(self) -> float:
        """Bound on the rounding of a cost in float64, plus or minus its prices."""
        return max(self.before.last_digits(), self.others.last_digits())

    def transposed(self) -> "Matrix":
        """Costs with rows and columns exchanged."""
        return Matrix(self.matrix().T)


@dataclasses.dataclass(frozen=True, eq=False)
class Matrix:
    """Costs that are given as a matrix of exact numbers.

    Raises:
        InputError: The matrix is empty or not finite.
    """

    values: Shaped[np.ndarray, "n m"]

    def __post_init__(self) -> None:
        if self.values.size == 0 or not np.isfinite(self.values.sum(dtype=np.float64)):
            _refuse("costs", self.values)

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.values.shape[0]

    @property
    def n_columns(self) -> int:
        """Number of columns."""
        return self.values.shape[1]

    def block(self, rows: Index) -> Float[np.ndarray, "part m"]:
        """Some rows in float64."""
        return np.ascontiguousarray(self.values[rows], dtype=np.float64)

    def rounding(self, rows: Index) -> Float[np.ndarray, " part"]:
        """Zero: the costs are exact."""
        return np.zeros(len(np.arange(self.n_rows)[rows]))

    def exact(
        self, rows: Int[np.ndarray, " pair"], columns: Int[np.ndarray, " pair"]
    ) -> Float[np.ndarray, " pair"]:
        """Entries of the matrix."""
        return self.values[rows, columns].astype(np.float64)

    def matrix(self) -> Float[np.ndarray, "n m"]:
        """All costs in float64."""
        return self.values.astype(np.float64)

    def last_digits(self) -> float:
        """Bound on the rounding of a cost plus or minus its prices."""
        return 8 * EPSILON * float(max(self.values.max(), -self.values.min()))

    def transposed(self) -> "Matrix":
        """Costs with rows and columns exchanged."""
        return Matrix(self.values.T)


@dataclasses.dataclass(frozen=True, eq=False)
class Padded:
    """Costs with rows added that cost nothing with any column, so that none of these stays free."""

    costs: Costs
    """Costs of the rows before those that are added."""

    @property
    def n_rows(self) -> int:
        """Number of rows: as many as columns."""
        return self.costs.n_columns

    @property
    def n_columns(self) -> int:
        """Number of columns."""
        return self.costs.n_columns

    def _own(self, rows: Index) -> tuple[Int[np.ndarray, " own"], Bool[np.ndarray, " part"]]:
        """Numbers of the rows that were not added, and where they are among `rows`."""
        numbers = np.arange(self.n_rows)[rows]
        is_own = numbers < self.costs.n_rows
        return numbers[is_own], is_own

    def block(self, rows: Index) -> Float[np.ndarray, "part m"]:
        """Costs of some rows with every column."""
        own, is_own = self._own(rows)
        if is_own.all():
            return self.costs.block(rows)
        some = self.costs.block(own)
        block = np.zeros((len(is_own), self.n_columns), some.dtype)
        block[is_own] = some
        return block

    def rounding(self, rows: Index) -> Float[np.ndarray, " part"]:
        """Bound on the rounding of `block`; zero for the rows that were added."""
        own, is_own = self._own(rows)
        rounding = np.zeros(len(is_own))
        rounding[is_own] = self.costs.rounding(own)
        return rounding

    def exact(
        self, rows: Int[np.ndarray, " pair"], columns: Int[np.ndarray, " pair"]
    ) -> Float[np.ndarray, " pair"]:
        """Costs of pairs in float64."""
        is_own = rows < self.costs.n_rows
        costs = np.zeros(len(rows))
        costs[is_own] = self.costs.exact(rows[is_own], columns[is_own])
        return costs

    def matrix(self) -> Float[np.ndarray, "m m"]:
        """All costs in float64."""
        matrix = np.zeros((self.n_rows, self.n_columns))
        matrix[: self.costs.n_rows] = self.costs.matrix()
        return matrix

    def last_digits(self) -> float:
        """Bound on the rounding of a cost in float64, plus or minus its prices."""
        return self.costs.last_digits()

    def transposed(self) -> Matrix:
        """Costs with rows and columns exchanged."""
        return Matrix(self.matrix().T)


def block_rows(costs: Costs) -> int:
    """Number of rows in a block of moderate size."""
    return int(np.clip(BLOCK_BYTES // (4 * costs.n_columns), 16, 4096))


def in_threads(work: Callable[[int, int], Work], n: int) -> list[Work]:
    """Call `work(first, last)` over equal parts of `range(n)`, one thread each."""
    parts = min(torch.get_num_threads(), max(1, n // FEW))
    edges = [n * k // parts for k in range(parts + 1)]
    if parts == 1:
        return [work(0, n)]
    with ThreadPoolExecutor(parts) as workers:
        return list(workers.map(work, edges[:-1], edges[1:]))


@contextlib.contextmanager
def multiplying(precision: str) -> Iterator[None]:
    """Multiply matrices in a precision of torch's, whatever it has been allowed to use so far.

    "highest" is float32. "medium" is bfloat16 with sums in float32, where that is faster.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _refuse(name: str, array: np.ndarray) -> None:
    """Say what is wrong with a part of the costs, if anything."""
    if array.size == 0:
        raise InputError(f"The {name} have shape {array.shape}: there is nothing to pair.")
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        place = tuple(int(x) for x in bad[0])
        raise InputError(
            f"The {name} have {array[place]} at {place} ({len(bad)} of {array.size} entries are "
            "not finite). Costs must be finite; leave such rows out before pairing."
        )
