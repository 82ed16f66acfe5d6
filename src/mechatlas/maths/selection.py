"""Compiled loops over every pair of a block of costs.

    keep_cheapest_of_rows       the cheapest columns of each row of a block
    least_of_columns            the least cost of each column, over all blocks so far
    cosines_of_block            cosines, and the two rows that are nearest to each column
    merge_cheapest              the cheapest columns of two lists, without some of the first
    underpriced                 the pairs of a block that cost less than their prices say

Each runs on one thread without the interpreter's lock and writes only its own rows or columns,
so that callers may split a block over threads. Lists are heaps with the dearest entry first,
so a pair is compared with one number and is nearly always passed over.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

from mechatlas.maths.compilation import compiled, inner

GROUPS = 256
"""Least number of groups of columns."""
SPREAD = 8
"""Groups for each column that is kept."""
STRETCH = 64
"""Columns that are compared with their second nearest rows at once."""
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


def _cosines_of_row(costs, offset, scale, others, negated, squares):
    """Write a row's cosines, negated; add their squares to the columns' and return the sum."""
    total = np.float32(0.0)
    offsets, scales = others
    for j in range(len(costs)):
        cosine = (offset + offsets[j] - costs[j]) * scale * scales[j]
        negated[j] = -cosine
        square = cosine * cosine
        squares[j] += square
        total += square
    return total


_cosines_quickly = inner(_cosines_of_row, fastmath={"reassoc", "contract", "nsz", "nnan"})


@inner
def _keep_two(negated, row, best, names):
    """Put a row among the two nearest of each column where it belongs there, which is seldom."""
    for start in range(0, len(negated), STRETCH):
        end = min(start + STRETCH, len(negated))
        some, second = negated[start:end], best[1, start:end]
        more = np.float32(-1.0)
        for k in range(end - start):
            excess = -some[k] - second[k]
            more = excess if excess > more else more
        if more <= 0:
            continue
        for j in range(start, end):
            cosine = -negated[j]
            if cosine > best[0, j]:
                best[1, j], names[1, j] = best[0, j], names[0, j]
                best[0, j], names[0, j] = cosine, row
            elif cosine > best[1, j]:
                best[1, j], names[1, j] = cosine, row


@compiled
def cosines_of_block(
    block: Float[np.ndarray, "row column"],
    of_rows: tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]],
    of_columns: tuple[Float[np.ndarray, " column"], Float[np.ndarray, " column"]],
    part: tuple[int, int],
    negated: Float[np.ndarray, "row column"],
    nearest: tuple[Float[np.ndarray, "2 column"], Int[np.ndarray, "2 column"]],
    squares: Float[np.ndarray, " column"],
) -> Float[np.ndarray, " row"]:
    """Turn squared distances into cosines, and keep the two largest of each column.

    Args:
        block: Squared distances.
        of_rows: Squared length of each row, and the reciprocal of its length.
        of_columns: The same for each column.
        part: First column, and the one after the last; others are left as they are.
        negated: Cosines, negated, so that the largest come first as the cheapest do.
        nearest: Two largest cosines of each column, and their rows.
        squares: Sum of the squared cosines of each column.

    Returns:
        The sum of the squared cosines of each row.
    """
    first, last = part
    best, names = nearest[0][:, first:last], nearest[1][:, first:last]
    others, squares = (of_columns[0][first:last], of_columns[1][first:last]), squares[first:last]
    sums = np.empty(len(block), np.float32)
    for row in range(len(block)):
        costs, cosines = block[row, first:last], negated[row, first:last]
        sums[row] = _cosines_quickly(
            costs, of_rows[0][row], of_rows[1][row], others, cosines, squares
        )
        _keep_two(cosines, row, best, names)
    return sums


@compiled
def merge_cheapest(
    first: tuple[Float[np.ndarray, "row a"], Int[np.ndarray, "row a"], Float[np.ndarray, " row"]],
    second: tuple[Float[np.ndarray, "row b"], Int[np.ndarray, "row b"], Float[np.ndarray, " row"]],
    gone: Bool[np.ndarray, " column"],
    prices: Float[np.ndarray, " column"],
    part: tuple[int, int],
    keys: Float[np.ndarray, "row kept"],
    names: Int[np.ndarray, "row kept"],
    following: Float[np.ndarray, " row"],
) -> None:
    """Merge two lists of the cheapest columns of each row, without some columns of the first.

    Args:
        first: Costs of the columns of a list, cheapest at their prices first; their numbers; and
            the least cost less price of every column that is not listed.
        second: The same of other columns.
        gone: Columns that are left out of the first list.
        prices: Prices of columns.
        part: First row, and the one after the last.
        keys: Cost less price of the columns of the merged list; infinite where it is short.
        names: Numbers of the columns.
        following: Least cost less price of every column that is not listed.
    """
    n_first, n_second, n_kept = first[0].shape[1], second[0].shape[1], keys.shape[1]
    for row in range(part[0], part[1]):
        limit = min(first[2][row], second[2][row])
        i, j, count = 0, 0, 0
        while True:
            while i < n_first and gone[first[1][row, i]]:
                i += 1
            one, two = np.inf, np.inf
            if i < n_first:
                one = first[0][row, i] - prices[first[1][row, i]]
            if j < n_second:
                two = second[0][row, j] - prices[second[1][row, j]]
            value = min(one, two)
            if count == n_kept or value >= limit or value == np.inf:
                break
            keys[row, count] = value
            if one <= two:
                names[row, count] = first[1][row, i]
                i += 1
            else:
                names[row, count] = second[1][row, j]
                j += 1
            count += 1
        following[row] = min(limit, value)
        for k in range(count, n_kept):
            keys[row, k] = np.inf
            names[row, k] = 0


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
