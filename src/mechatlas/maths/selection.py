"""The compiled parts that look at every pair of a block of costs.

    keep_cheapest_of_rows       the cheapest columns of each row of a block
    least_of_columns            the least cost of each column, over all blocks so far
    underpriced                 the pairs of a block that cost less than their prices say

Each runs on one thread without the interpreter's lock and writes only its own rows or columns,
so that callers may split a block over threads. Lists are heaps with the dearest entry first,
so a pair is compared with one number and is nearly always passed over.
"""

import numpy as np

from mechatlas.maths.compilation import compiled

CHUNK = 64
"""Columns looked at together."""


@compiled
def _sink(values, names, start, n, value, name):
    """Put an entry at the top of a heap (dearest first) and let it sink to its place."""
    hole = 0
    while True:
        child = 2 * hole + 1
        if child >= n:
            break
        if child + 1 < n and values[start + child + 1] > values[start + child]:
            child += 1
        if values[start + child] <= value:
            break
        values[start + hole] = values[start + child]
        names[start + hole] = names[start + child]
        hole = child
    values[start + hole] = value
    names[start + hole] = name


@compiled
def _sort(values, names, start, n):
    """Turn a heap into an ascending list."""
    for last in range(n - 1, 0, -1):
        value, name = values[start + last], names[start + last]
        values[start + last], names[start + last] = values[start], names[start]
        _sink(values, names, start, last, value, name)


@compiled
def keep_cheapest_of_rows(block, prices, first, last, values, names, following):
    """The cheapest columns of rows first..last of a block, by cost less price, ascending.

    `values` and `names` have the columns kept of each row, `following` the next value.
    """
    n_columns = block.shape[1]
    n_kept = values.shape[1]
    heap = np.empty(n_kept + 1, np.float64)
    who = np.empty(n_kept + 1, np.int32)
    for row in range(first, last):
        size = min(n_kept + 1, n_columns)
        heap[:] = np.inf
        who[:] = -1
        for start in range(0, n_columns, CHUNK):
            end = min(start + CHUNK, n_columns)
            some, limit = 0, heap[0]
            for j in range(start, end):  # no branch: many at a time
                some += block[row, j] - prices[j] < limit
            if some == 0:
                continue
            for j in range(start, end):
                value = block[row, j] - prices[j]
                if value < heap[0]:
                    _sink(heap, who, 0, size, value, j)
        _sort(heap, who, 0, size)
        for k in range(min(n_kept, size)):
            values[row, k] = heap[k]
            names[row, k] = who[k]
        following[row] = heap[n_kept] if size > n_kept else np.inf


@compiled
def least_of_columns(block, first, last, least):
    """Lower `least` of columns first..last to the least of a block."""
    for row in range(block.shape[0]):
        for j in range(first, last):
            least[j] = min(least[j], block[row, j])


@compiled
def underpriced(block, row_prices, column_prices, slack, first, last, rows, columns):
    """Pairs of rows first..last of a block with cost - prices < slack of the row.

    Returns how many there are; only as many as `rows` and `columns` have room for are written.
    """
    found = 0
    for row in range(first, last):
        least = row_prices[row] + slack[row]
        for j in range(block.shape[1]):
            if block[row, j] - column_prices[j] < least:
                if found < len(rows):
                    rows[found] = row
                    columns[found] = j
                found += 1
    return found
