"""Activations that need no store, as rows to train on.

ArrayRows     matrices in memory or memory-mapped
StreamRows    arrays that come one after another
as_rows       whichever fits
as_batch      rows for a dictionary, as a tensor
check_width   rows against the width that a dictionary reads
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import data as torch_data

from mechatlas.base import Batch, InputError, Rows
from mechatlas.maths.arrays import as_tensor

HALVES = (torch.float16, torch.bfloat16)
"""Precisions in which rows are copied to a device as they are."""


class ArrayRows:
    """Rows of a matrix (n, d_in) of floats, or of several side by side; fits `Rows`.

    A matrix may be a numpy array, a memory map or a tensor; its shape and type are checked
    here. A share of the rows, drawn at random, is held out and never trained on.

    Raises:
        InputError: One is not a matrix of floats, there are fewer than two rows, or several have
            different numbers of rows.
    """

    def __init__(
        self,
        arrays: Tensor | np.ndarray | Sequence[Tensor | np.ndarray],
        *,
        held_out: float = 0.05,
        seed: int = 0,
    ) -> None:
        alone = isinstance(arrays, Tensor | np.ndarray)
        given = [arrays] if alone else list(arrays)
        self._files = [str(file) for a in given if (file := getattr(a, "filename", None))]
        self.arrays = [_matrix(array) for array in given]
        counts = {len(array) for array in self.arrays}
        if len(counts) != 1:
            shapes = ", ".join(str(tuple(array.shape)) for array in self.arrays)
            raise InputError(f"Arrays side by side need as many rows each, got shapes {shapes}.")
        n_rows = counts.pop()
        self.d_in = sum(array.shape[1] for array in self.arrays)
        if n_rows < 2 or self.d_in < 1:
            raise InputError(
                f"Activations have shape {(n_rows, self.d_in)}; at least two rows are needed, "
                "one to train on and one to measure on."
            )
        order = np.random.default_rng([seed, 1]).permutation(n_rows)
        n_held = max(1, round(held_out * n_rows))
        self._held, self._train = torch.from_numpy(order[:n_held]), torch.from_numpy(order[n_held:])
        self.n_rows = len(self._train)

    def _rows(self, rows: Tensor, *, as_stored: bool = False) -> Batch:
        parts = [array[rows] for array in self.arrays]
        parts = [part if as_stored and part.dtype in HALVES else part.float() for part in parts]
        return Batch(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), rows)

    def batches(self, batch_size: int, *, seed: int = 0, start: int = 0) -> Iterator[Batch]:
        """Yield endless shuffled batches, one epoch after another.

        Args:
            batch_size: Rows of a batch.
            seed: Seed of the order.
            start: Number of the first batch; those before are skipped.
        """
        for rows in self._order(batch_size, seed, start):
            yield self._rows(rows)

    def stored_batches(self, batch_size: int, *, seed: int = 0, start: int = 0) -> Iterator[Batch]:
        """Yield the same batches, in half precision where the arrays are."""
        for rows in self._order(batch_size, seed, start):
            yield self._rows(rows, as_stored=True)

    def _order(self, batch_size: int, seed: int, start: int) -> Iterator[Tensor]:
        """Numbers of the rows of each batch."""
        epoch, skip = divmod(start * batch_size, self.n_rows)
        index = torch.empty(0, dtype=torch.long)
        while True:
            while len(index) < batch_size:
                random = np.random.default_rng([seed, epoch])
                order = self._train[torch.from_numpy(random.permutation(self.n_rows))]
                index = torch.cat([index, order[skip:]])
                epoch, skip = epoch + 1, 0
            rows, index = index[:batch_size], index[batch_size:]
            yield rows

    def held_out(self, n_rows: int) -> Batch:
        """Up to `n_rows` rows that `batches` never yields."""
        return self._rows(self._held[:n_rows])

    def describe(self, row: int) -> str:
        """The row's number, and the files of memory maps."""
        return f"row {row}" + (f" of {', '.join(self._files)}" if self._files else "")


class StreamRows:
    """Rows of arrays (n, d_in) that come one after another; fits `Rows`.

    The first rows are held out. The others are shuffled within a pool, so their source should
    mix them as well as it can. What can be iterated again (a list, a data loader) is, as often
    as training needs; what cannot (a generator) must be long enough. A run that is continued
    reads the stream again from the start.

    Raises:
        InputError: An array is not a matrix of floats or as wide as the first, or there are no
            rows left after those held out.
    """

    def __init__(
        self, arrays: Iterable[Any], *, held_out: int = 2048, pool: int = 65_536, seed: int = 0
    ) -> None:
        del seed
        self._arrays, self._pool = arrays, pool
        self._chunks = iter(arrays)
        self._again = self._chunks is not arrays
        self.n_rows = 0  # not known
        first = next(self._chunks, None)
        if first is None:
            raise InputError("The stream of activations is empty.")
        kept = [_matrix(first)]
        self.d_in, n_rows = kept[0].shape[1], len(kept[0])
        while n_rows <= held_out:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            kept.append(self._fitting(chunk))
            n_rows += len(kept[-1])
        rows = torch.cat(kept).float()
        self._n_held = held_out if len(rows) > held_out else len(rows) // 2
        self._held, self._left = rows[: self._n_held], rows[self._n_held :]
        if not self._n_held:
            raise InputError("The stream of activations has one row; at least two are needed.")

    def _fitting(self, chunk: Any) -> Tensor:
        """An array of the stream."""
        rows = _matrix(chunk)
        if rows.shape[1] != self.d_in:
            raise InputError(
                f"An array of the stream is {rows.shape[1]} wide, those before {self.d_in}."
            )
        return rows

    def _numbered(self) -> Iterator[Batch]:
        """Arrays of the stream after the held-out rows, and the numbers of their rows."""
        number = self._n_held
        yield Batch(self._left, torch.arange(number, number + len(self._left)))
        number += len(self._left)
        while True:
            for chunk in self._chunks:
                rows = self._fitting(chunk).float()
                yield Batch(rows, torch.arange(number, number + len(rows)))
                number += len(rows)
            if not self._again:
                raise InputError(
                    f"The stream of activations ended after {number} rows. Train fewer steps, or "
                    "pass a longer stream or one that can be iterated again."
                )
            self._chunks, skip, number = iter(self._arrays), self._n_held, 0
            for chunk in self._chunks:  # the held-out rows come again
                rows = self._fitting(chunk).float()
                if skip < len(rows):
                    ids = torch.arange(number + skip, number + len(rows))
                    yield Batch(rows[skip:], ids)
                number, skip = number + len(rows), max(0, skip - len(rows))
                if not skip:
                    break

    def batches(self, batch_size: int, *, seed: int = 0, start: int = 0) -> Iterator[Batch]:
        """Yield endless batches, shuffled within a pool.

        Args:
            batch_size: Rows of a batch.
            seed: Seed of the order.
            start: Number of the first batch; those before are read all the same.
        """
        random = np.random.default_rng([seed, 2])
        chunks = self._numbered()
        room = max(self._pool, 2 * batch_size)
        x, ids = self._held[:0], torch.empty(0, dtype=torch.long)
        number = 0
        while True:
            more, n_rows = [Batch(x, ids)], len(ids)
            while n_rows < room:
                more.append(next(chunks))
                n_rows += len(more[-1].row)
            x, ids = torch.cat([part.x for part in more]), torch.cat([part.row for part in more])
            order = torch.from_numpy(random.permutation(len(ids)))
            n_batches = max(1, len(ids) // 2 // batch_size)
            for index in order[: n_batches * batch_size].split(batch_size):
                if number >= start:
                    yield Batch(x[index], ids[index])
                number += 1
            left = order[n_batches * batch_size :]
            x, ids = x[left], ids[left]

    def held_out(self, n_rows: int) -> Batch:
        """Up to `n_rows` of the first rows, which `batches` never yields."""
        rows = self._held[:n_rows]
        return Batch(rows, torch.arange(len(rows)))

    def describe(self, row: int) -> str:
        """The row's number."""
        return f"row {row} of the stream"


def _matrix(array: Any) -> Tensor:
    """An array as a matrix of floats; of a tuple, as loaders give them, the first element."""
    if isinstance(array, tuple | list) and len(array) and np.ndim(array[0]) == 2:
        array = array[0]
    tensor = as_tensor(array, "rows d_in", "The matrix of activations")
    if not tensor.is_floating_point():
        raise InputError(
            f"Activations must be a matrix (rows, d_in) of floats, got shape "
            f"{tuple(tensor.shape)} of {tensor.dtype}."
        )
    return tensor


def as_rows(data: Any) -> Rows:
    """Rows to train on.

    Args:
        data: A matrix, as an array, a tensor, a list of rows or a data set of torch; a tuple of
            matrices whose rows belong together; a store with one site; an iterable of matrices,
            as a loader is; or anything that already fits the protocol.

    Raises:
        InputError: It is none of these.
    """
    if isinstance(data, Rows):
        return data
    if isinstance(data, np.ndarray | Tensor | tuple):
        return ArrayRows(data)
    listed = isinstance(data, list) and len(data) > 0 and np.ndim(data[0]) < 2
    if listed or isinstance(data, torch_data.Dataset):
        return ArrayRows(as_tensor(data, "rows d_in", "The matrix of activations"))
    if callable(rows := getattr(data, "rows", None)):  # a store with one site
        return as_rows(rows())
    if isinstance(data, Iterable) and not isinstance(data, str | bytes | Mapping):
        return StreamRows(data)
    raise InputError(
        f"Cannot train on a {type(data).__name__}; pass an array (rows, d_in) or a store, as from "
        "numpy.load(path) or ma.Store(path)."
    )


def as_batch(x: Any, device: torch.device) -> Tensor:
    """Convert rows in any form to a tensor on the device of a dictionary.

    Args:
        x: A tensor, which stays where it is and keeps its gradient, or whatever `as_array` takes.
        device: Device of the dictionary.

    Raises:
        InputError: These are no real numbers.
    """
    if isinstance(x, Tensor) and x.layout == torch.strided:
        return x
    return as_tensor(x, None, "The rows").to(device)


def check_width(x: Tensor, d_in: int, device: torch.device | None = None) -> None:
    """Refuse rows of another width than a dictionary reads, or on another device.

    Args:
        x: Rows.
        d_in: Width that the dictionary reads.
        device: Device of the dictionary; by default any will do.

    Raises:
        InputError: The rows are not `d_in` wide, or are elsewhere.
    """
    if x.shape[-1] != d_in:
        raise InputError(
            f"The dictionary reads activations of width {d_in}, got {x.shape[-1]}. "
            "Is this the site it was trained on?"
        )
    if device is not None and x.device != device:
        raise InputError(
            f"The dictionary is on {device}, the rows are on {x.device}. Move one to the other: "
            f'rows.to("{device}"), or dictionary.to("{x.device}").'
        )
