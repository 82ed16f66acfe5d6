"""Sums and products of rows that lie anywhere in a table, as compiled vector instructions.

    add_rows    row += sum over t of weights[t] * table[index[t]]
    dot_rows    out[t] += row . table[index[t]], for every t

These two are what a sparse step spends its time on. Loops in Python's form become vectors too,
but read and write the row in memory for every few terms and check again and again whether arrays
overlap; here the row stays in registers for all terms: 1.5 to 3 times as fast in cache.

For functions that numba compiles; both work on columns `low, low + 1, ...` of the table, as many
as the row has, and on terms `first, ..., last - 1`. That the index is in the table and that the
numbers of a row lie side by side in memory is not checked.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

BYTES = 64
"""Bytes of a vector; where registers are shorter, several serve as one."""
AT_ONCE = 8
"""Vectors of the row in registers."""
FLAGS = ("reassoc", "contract", "nsz")


class _Vectors:
    """Instructions on some vectors of the elements of an array."""

    def __init__(self, context: Any, builder: Any, element: Any, lanes: int, n: int) -> None:
        self.builder, self.lanes, self.n = builder, lanes, n
        self.element = context.get_value_type(element)
        self.vector = ir.VectorType(self.element, lanes)
        self.width = element.bitwidth
        self.index = context.get_value_type(types.intp)

    def _pointers(self, start: Any) -> list[Any]:
        offsets = [self.index(v * self.lanes) for v in range(self.n)]
        pointers = [self.builder.gep(start, [offset]) for offset in offsets]
        return [self.builder.bitcast(p, self.vector.as_pointer()) for p in pointers]

    def load(self, start: Any) -> list[Any]:
        return [self.builder.load(p, align=self.width // 8) for p in self._pointers(start)]

    def store(self, vectors: Sequence[Any], start: Any) -> None:
        for value, pointer in zip(vectors, self._pointers(start), strict=True):
            self.builder.store(value, pointer, align=self.width // 8)

    def spread(self, value: Any) -> Any:
        """A vector whose elements all are the value."""
        first = ir.IntType(32)(0)
        head = self.builder.insert_element(ir.Constant(self.vector, ir.Undefined), value, first)
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(head, head, zeros)

    def multiply(self, a: Any, b: Any) -> Any:
        return self.builder.fmul(a, b, flags=FLAGS)

    def add(self, a: Any, b: Any) -> Any:
        return self.builder.fadd(a, b, flags=FLAGS)

    def total(self, vectors: list[Any]) -> Any:
        """The sum of all elements."""
        while len(vectors) > 1:
            vectors = [*vectors[2:], self.add(*vectors[:2])]
        name = f"llvm.vector.reduce.fadd.v{self.lanes}f{self.width}"
        kind = ir.FunctionType(self.element, [self.element, self.vector])
        reduce = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(reduce, [self.element(0.0), vectors[0]], fastmath=FLAGS)


class _Terms:
    """The arguments of one of the two functions, and the loops over columns and terms."""

    def __init__(self, context: Any, builder: Any, signature: Any, values: Sequence[Any]) -> None:
        kinds = signature.args
        row, low, table, index, numbers, self.first, self.last = values
        arrays = [
            context.make_array(kinds[i])(context, builder, value=value)
            for i, value in ((0, row), (2, table), (3, index), (4, numbers))
        ]
        self.context, self.builder, self.kind, self.low = context, builder, kinds[0].dtype, low
        self.row, self.table, self.index, self.numbers = (array.data for array in arrays)
        self.width = builder.extract_value(arrays[0].shape, 0)
        self.stride = builder.extract_value(arrays[1].shape, 1)
        self.unit = context.get_value_type(types.intp)(1)

    def columns(self, write: Callable[[_Vectors, Any], None]) -> None:
        """Write code for all columns: for many vectors at once, for one, and for single columns."""
        whole_vector = BYTES * 8 // self.kind.bitwidth
        start = self.unit.type(0)
        for lanes, n in ((whole_vector, AT_ONCE), (whole_vector, 1), (1, 1)):
            vectors = _Vectors(self.context, self.builder, self.kind, lanes, n)
            step = self.unit.type(lanes * n)
            whole = self.builder.udiv(self.builder.sub(self.width, start), step)
            stop = self.builder.add(start, self.builder.mul(whole, step))
            with cgutils.for_range_slice(self.builder, start, stop, step) as (column, _):
                write(vectors, column)
            start = stop

    @contextmanager
    def terms(self, column: Any) -> Iterator[tuple[Any, Any]]:
        """A loop: where in the table a term's columns are, and its number."""
        builder = self.builder
        with cgutils.for_range_slice(builder, self.first, self.last, self.unit) as (t, _):
            which = builder.zext(builder.load(builder.gep(self.index, [t])), self.unit.type)
            column = builder.add(column, self.low)
            place = builder.add(builder.mul(which, self.stride), column)
            yield builder.gep(self.table, [place]), builder.gep(self.numbers, [t])


def _adding(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    terms = _Terms(context, builder, signature, values)

    def write(vectors: _Vectors, column: Any) -> None:
        row = builder.gep(terms.row, [column])
        sums = [cgutils.alloca_once(builder, vectors.vector) for _ in range(vectors.n)]
        for value, place in zip(vectors.load(row), sums, strict=True):
            builder.store(value, place)
        with terms.terms(column) as (source, number):
            weight = vectors.spread(builder.load(number))
            for value, place in zip(vectors.load(source), sums, strict=True):
                added = vectors.add(vectors.multiply(weight, value), builder.load(place))
                builder.store(added, place)
        vectors.store([builder.load(place) for place in sums], row)

    terms.columns(write)
    return context.get_dummy_value()


def _multiplying(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    terms = _Terms(context, builder, signature, values)

    def write(vectors: _Vectors, column: Any) -> None:
        row = vectors.load(builder.gep(terms.row, [column]))
        with terms.terms(column) as (source, number):
            products = [
                vectors.multiply(mine, value)
                for mine, value in zip(row, vectors.load(source), strict=True)
            ]
            added = vectors.add(builder.load(number), vectors.total(products))
            builder.store(added, number)

    terms.columns(write)
    return context.get_dummy_value()


def _typed(row: Any, low: Any, table: Any, index: Any, numbers: Any) -> Any:
    """The signature, if the arrays are of the kinds that the code is written for."""
    fits = (
        all(isinstance(kind, types.Array) for kind in (row, table, index, numbers))
        and all(kind.layout == "C" for kind in (table, index, numbers))
        and row.dtype == table.dtype == numbers.dtype
        and index.dtype == types.int32
    )
    if not fits or not isinstance(low, types.Integer):
        return None
    return types.void(row, types.intp, table, index, numbers, types.intp, types.intp)


def _add_rows(context, row, low, table, index, weights, first, last):
    return _typed(row, low, table, index, weights), _adding


def _dot_rows(context, row, low, table, index, out, first, last):
    return _typed(row, low, table, index, out), _multiplying


# `unwrap` because tests wrap functions in checks.
add_rows: Any = intrinsic(inspect.unwrap(_add_rows))
dot_rows: Any = intrinsic(inspect.unwrap(_dot_rows))
