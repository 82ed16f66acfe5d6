"""Compiled loops over every pair of a block of costs.

    keep_cheapest_of_rows       the cheapest columns of each row of a block
    least_of_columns            the least cost of each column, over all blocks so far
    rivals                      the best cosines of rows and columns besides those of their pairs
    exchange_columns            other costs in some columns, and the old ones back
    underpriced                 the pairs of a block that cost less than their prices say

Each runs on one thread without the interpreter's lock and writes only its own rows or columns,
so that callers may split a block over threads. Lists are heaps with the dearest entry first,
so a pair is compared with one number and is nearly always passed over.
"""

import numpy as np
from jaxtyping import Float, Int

from mechatlas.maths.compilation import compiled, inner

GROUPS = 256
"""Least number of groups of columns."""
SPREAD = 8
"""Groups for each column that is kept."""
MARGIN = 2.0**-20
"""Margin for the rounding of float32, as a share of the numbers that are subtracted."""


@inner
def _sink(values, names, n, value, name):
    """Put an entry at the top of a heap (dearest first) and let it sink to its place."""
    hole = 0
    while True:
        child = 2 * hole + 1
        if child >= n:
            break
        if child + 1 < n and values[child + 1] > values[child]:
            child += 1
        if values[child] <= value:
            break
        values[hole] = values[child]
        names[hole] = names[child]
        hole = child
    values[hole] = value
    names[hole] = name


@inner
def _sort(values, names, n):
    """Turn a heap into an ascending list."""
    for last in range(n - 1, 0, -1):
        value, name = values[last], names[last]
        values[last], names[last] = values[0], names[0]
        _sink(values, names, last, value, name)


@inner
def _least_of_groups(costs, prices, least):
    """Write the least cost less price of columns k, k + n, k + 2 n, ... for each k of n."""
    n = len(least)
    for k in range(n):
        least[k] = costs[k] - prices[k]
    for start in range(n, len(costs), n):
        end = min(start + n, len(costs))
        some, others = costs[start:end], prices[start:end]
        for k in range(end - start):
            value = some[k] - others[k]
            least[k] = value if value < least[k] else least[k]


@compiled
def keep_cheapest_of_rows(
    block: Float[np.ndarray, "row column"],
    prices: Float[np.ndarray, " column"],
    part: tuple[int, int],
    values: Float[np.ndarray, "row kept"],
    names: Int[np.ndarray, "row kept"],
    following: Float[np.ndarray, " row"],
) -> None:
    """Write the cheapest columns of some rows of a block, by cost less price, ascending.

    Columns are looked at in groups. Where so many groups have a least value up to a limit, none of
    the cheapest is above it, so that only the groups below it are looked at one by one. Rounded
    values decide that, with a margin for the rounding.

    Args:
        block: Costs.
        prices: Prices of columns.
        part: First row, and the one after the last.
        values: Cost less price of the columns kept of each row.
        names: Numbers of the columns kept.
        following: Cost less price of the cheapest column that is not kept.
    """
    first, last = part
    n_columns = block.shape[1]
    n_kept = values.shape[1]
    size = min(n_kept + 1, n_columns)
    n_groups = min(n_columns, max(GROUPS, SPREAD * size))
    heap, who = np.empty(size, np.float64), np.empty(size, np.int32)
    rounded = prices.astype(block.dtype)
    largest = 0.0
    for j in range(n_columns):  # `max` of an array takes as long to compile as half of this
        largest = max(largest, abs(prices[j]))
    least = np.empty(n_groups, block.dtype)
    for row in range(first, last):
        _least_of_groups(block[row], rounded, least)
        heap[:] = np.inf
        who[:] = -1
        for k in range(n_groups):
            if least[k] < heap[0]:
                _sink(heap, who, size, np.float64(least[k]), np.int32(k))
        limit = heap[0] + MARGIN * (abs(heap[0]) + 2 * largest)
        heap[:] = np.inf
        who[:] = -1
        for k in range(n_groups):
            if least[k] > limit:
                continue
            for j in range(k, n_columns, n_groups):
                value = block[row, j] - prices[j]
                if value <= limit and value < heap[0]:
                    _sink(heap, who, size, value, np.int32(j))
        _sort(heap, who, size)
        for k in range(min(n_kept, size)):
            values[row, k] = heap[k]
            names[row, k] = who[k]
        following[row] = heap[n_kept] if size > n_kept else np.inf


@compiled
def least_of_columns(
    block: Float[np.ndarray, "row column"],
    first: int,
    last: int,
    least: Float[np.ndarray, " column"],
) -> None:
    """Lower `least` of columns first..last to the least cost of a block.

    Args:
        block: Costs of some rows.
        first: First column.
        last: Column after the last.
        least: Least cost of each column so far, lowered in place.
    """
    found = np.empty(last - first, block.dtype)
    found[:] = np.inf
    for row in range(block.shape[0]):
        costs = block[row, first:last]
        for k in range(last - first):
            found[k] = costs[k] if costs[k] < found[k] else found[k]
    for k in range(last - first):
        least[first + k] = min(least[first + k], found[k])


def _scan(costs, offset, scale, others, first, last, of_columns):
    """Raise the best and the sum of squares of columns first..last; return those of the row."""
    best, total = np.float32(-1.0), np.float32(0.0)
    costs, offsets, scales = costs[first:last], others[0][first:last], others[1][first:last]
    best_of, squares_of = of_columns[0, first:last], of_columns[1, first:last]
    for j in range(last - first):
        cosine = (offset + offsets[j] - costs[j]) * scale * scales[j]
        best = cosine if cosine > best else best
        best_of[j] = cosine if cosine > best_of[j] else best_of[j]
        square = cosine * cosine
        squares_of[j] += square
        total += square
    return best, total


_scan_quickly = inner(_scan, fastmath={"reassoc", "contract", "nsz", "nnan"})


@compiled
def rivals(
    block: Float[np.ndarray, "row column"],
    of_rows: tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]],
    others: tuple[Float[np.ndarray, " column"], Float[np.ndarray, " column"]],
    partners: Int[np.ndarray, " row"],
    part: tuple[int, int],
    of_columns: Float[np.ndarray, "2 column"],
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """Find the largest cosines in some columns of a block of squared distances.

    Args:
        block: Squared distances.
        of_rows: Squared length of each row, and the reciprocal of its length.
        others: Squared length of each column, and the reciprocal of its length.
        partners: Column of each row that is left out of the largest; -1 for none.
        part: First column, and the one after the last.
        of_columns: Largest cosine of each column and the sum of squares of all, raised in place.

    Returns:
        The same for each row.
    """
    first, last = part
    best = np.empty(len(block), np.float32)
    squares = np.empty(len(block), np.float32)
    for row in range(len(block)):
        offset, scale, own = of_rows[0][row], of_rows[1][row], partners[row]
        if own < first or own >= last:
            best[row], squares[row] = _scan_quickly(
                block[row], offset, scale, others, first, last, of_columns
            )
            continue
        before, b = _scan_quickly(block[row], offset, scale, others, first, own, of_columns)
        after, c = _scan_quickly(block[row], offset, scale, others, own + 1, last, of_columns)
        square = ((offset + others[0][own] - block[row, own]) * scale * others[1][own]) ** 2
        of_columns[1, own] += square
        best[row], squares[row] = max(before, after), b + c + square
    return best, squares


@compiled
def exchange_columns(
    block: Float[np.ndarray, "row column"],
    columns: Int[np.ndarray, " new"],
    values: Float[np.ndarray, "row new"],
) -> None:
    """Exchange some columns of a block and other values.

    Args:
        block: Costs, written in place.
        columns: Columns that are exchanged.
        values: Their new costs; their old ones afterwards.
    """
    for row in range(block.shape[0]):
        for k in range(len(columns)):
            j = columns[k]
            block[row, j], values[row, k] = values[row, k], block[row, j]


@compiled
def underpriced(
    block: Float[np.ndarray, "row column"],
    row_limits: Float[np.ndarray, " row"],
    column_prices: Float[np.ndarray, " column"],
    part: tuple[int, int],
    rows: Int[np.ndarray, " room"],
    columns: Int[np.ndarray, " room"],
) -> int:
    """Write the pairs of some rows of a block that cost less than their prices say.

    Args:
        block: Costs.
        row_limits: Prices of rows, each with the rounding of its costs.
        column_prices: Prices of columns.
        part: First row, and the one after the last.
        rows: Rows of the pairs.
        columns: Columns of the pairs.

    Returns:
        The number of pairs; only as many are written as there is room for.
    """
    count = 0
    for row in range(part[0], part[1]):
        for j in range(block.shape[1]):
            if block[row, j] - column_prices[j] < row_limits[row]:
                if count < len(rows):
                    rows[count] = row
                    columns[count] = j
                count += 1
    return count
