"""Compiled steps of an assignment over short lists of columns for each row.

    approach       bids that overpay by a little, on rounded costs: column prices near to the best
    bid            exact bids: free rows take their cheapest column while prices say who gives way
    augment        shortest augmenting paths for the rows that are left
    finish         the same without lists, over a matrix of exact costs
    reprice        exact row prices for given column prices
    near_horizon   rows whose lists will soon be too short

Always row price + column price <= cost, and where columns may stay free, column prices are <= 0,
and 0 for free ones. Column prices only fall, so what a list says once stays true.

A list may be too short to say what is cheapest. Such a row waits (`wanted`) until the caller has
made its list anew; a search that needs the list changes nothing.

Source: Bertsekas (1988) for bids that overpay; Jonker and Volgenant (1987) for exact bids and
paths; Volgenant (1996) for short lists.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from mechatlas.maths import compilation

FREE = -1
"""Column of a row that waits for a pair."""
ALONE = -2
"""Column of a row that stays unmatched for the price of staying unmatched."""


class ShortLists(NamedTuple):
    """Cheapest columns of each row, those of one row side by side."""

    starts: Int[np.ndarray, " row"]
    """First entry of each row."""
    counts: Int[np.ndarray, " row"]
    """Number of entries of each row."""
    horizon: Float[np.ndarray, " row"]
    """Lower bound on the cost less column price of every column that is not listed."""
    error: Float[np.ndarray, " row"]
    """Bound on the rounding of `rough`."""
    columns: Int[np.ndarray, " entry"]
    keys: Float[np.ndarray, " entry"]
    """Lower bound on the cost less column price; ascending within a row."""
    rough: Float[np.ndarray, " entry"]
    """Cost, rounded."""
    costs: Float[np.ndarray, " entry"]
    """Cost in float64; NaN until it is first needed."""


class Solution(NamedTuple):
    """Prices and pairs, which the steps change in place."""

    unmatched: float
    """Price of a row that stays unmatched."""
    row_prices: Float[np.ndarray, " row"]
    column_prices: Float[np.ndarray, " column"]
    row_of: Int[np.ndarray, " column"]
    """Row of each column; `FREE` for none."""
    column_of: Int[np.ndarray, " row"]
    """Column of each row; `FREE` or `ALONE` for none."""


class Products(NamedTuple):
    """Factors of exact costs, as in `pricing.Factors`; empty where all costs are exact already."""

    a: Float[np.ndarray, "row d"]
    b: Float[np.ndarray, "column d"]
    row_offsets: Float[np.ndarray, " row"]
    column_offsets: Float[np.ndarray, " column"]


class SearchTree(NamedTuple):
    """Shortest paths from one free row."""

    distance: Float[np.ndarray, " column"]
    before: Int[np.ndarray, " column"]
    """Row before each column on its path."""
    place: Int[np.ndarray, " column"]
    """Place of each column in the heap; -1 before and -2 after it was there."""
    heap: Int[np.ndarray, " column"]
    """Columns that were reached but not passed, the nearest first."""
    seen: Int[np.ndarray, " column"]
    rows: Int[np.ndarray, " row_and_root"]
    """Rows of the tree, in the order in which they joined."""
    row_distance: Float[np.ndarray, " row_and_root"]


class Path(NamedTuple):
    """Cheapest way from a free row to a free column, or to leaving a row unmatched."""

    length: float
    limit: float
    """Length up to which no column that is not listed can be cheaper."""
    last: int
    """Column where the path ends; -1 if a row stays unmatched."""
    leaver: int
    """Row that stays unmatched; -1 if none does."""
    n_rows: int
    """Rows of the tree."""
    n_seen: int
    given_up: bool
    """Whether another search has asked for the list that is missing here."""


compiled = functools.partial(
    compilation.compiled, structures=(ShortLists, Solution, Products, SearchTree, Path)
)
inner = functools.partial(compiled, inner=True)


def _dot(a, b):
    total = 0.0
    for k in range(len(a)):
        total += np.float64(a[k]) * np.float64(b[k])
    return total


_product = inner(_dot, fastmath={"reassoc", "contract", "nsz"})


@inner
def _cost(k, i, lists, factors):
    """Exact cost of entry k, which is in the list of row i."""
    if np.isnan(lists.costs[k]):
        j = lists.columns[k]
        offset = factors.row_offsets[i] + factors.column_offsets[j]
        lists.costs[k] = offset - 2 * _product(factors.a[i], factors.b[j])
    return lists.costs[k]


@compiled
def approach(
    queue: Int[np.ndarray, " row"],
    n_queue: int,
    step: float,
    most: int,
    lists: ShortLists,
    solution: Solution,
    wanted: Bool[np.ndarray, " row"],
) -> int:
    """Bid on rounded costs, each time `step` more than it takes, first come first served.

    Prices end within about `step` of those of a best pairing, unless that takes more than `most`
    bids. Rows whose lists are too short are marked and leave the queue.

    Args:
        queue: Rows that wait, in a ring of which the first `n_queue` are used.
        n_queue: Number of rows that wait.
        step: Overpayment.
        most: Number of bids allowed.
        lists: Cheapest columns of each row.
        solution: Prices and pairs.
        wanted: Marks of rows whose lists are too short.

    Returns:
        The number of bids.
    """
    starts, counts, horizon, error, columns, keys, rough, _ = lists
    _, _, v, row_of, column_of = solution
    room, head, bids = len(queue), 0, 0
    while n_queue > 0 and bids < most:
        i = queue[head]
        head = (head + 1) % room
        n_queue -= 1
        least, second, first = np.inf, np.inf, -1
        for k in range(starts[i], starts[i] + counts[i]):
            if keys[k] >= second:
                break
            value = rough[k] - v[columns[k]]
            if value < least:
                second, least, first = least, value, columns[k]
            elif value < second:
                second = value
        bids += 1
        if horizon[i] + 2 * error[i] < least:
            wanted[i] = True
            continue
        second = min(second, horizon[i] + 2 * error[i])
        v[first] -= step + (second - least if second < np.inf else 0.0)
        other = row_of[first]
        row_of[first] = i
        column_of[i] = first
        if other >= 0:
            column_of[other] = FREE
            queue[(head + n_queue) % room] = other
            n_queue += 1
    return bids


@inner
def _two_cheapest(i, lists, solution, factors):
    """Least and second least cost less price of a row, and the columns that cost the least."""
    starts, counts, horizon, error, columns, keys, rough, _ = lists
    v = solution.column_prices
    least, runner_up, first, second = np.inf, np.inf, -1, -1
    for k in range(starts[i], starts[i] + counts[i]):
        if keys[k] >= runner_up:
            break
        j = columns[k]
        if rough[k] - error[i] - v[j] >= runner_up:
            continue
        value = _cost(k, i, lists, factors) - v[j]
        if value < least:
            runner_up, second, least, first = least, first, value, j
        elif value < runner_up:
            runner_up, second = value, j
    tied = second if runner_up <= least else -1
    return least, min(runner_up, horizon[i], solution.unmatched), first, tied


@compiled
def bid(
    free: Int[np.ndarray, " row"],
    n_free: int,
    most: int,
    lists: ShortLists,
    solution: Solution,
    wanted: Bool[np.ndarray, " row"],
    factors: Products,
) -> tuple[int, int]:
    """Give free rows their cheapest columns; a row that is outbid bids again.

    Args:
        free: Free rows in front; those that are still free when it returns.
        n_free: Number of free rows.
        most: Number of bids allowed.
        lists: Cheapest columns of each row.
        solution: Prices and pairs.
        wanted: Marks of rows whose lists are too short.
        factors: Factors of the costs.

    Returns:
        The number of rows that are still free, and of bids that are left.
    """
    price, u, v, row_of, column_of = solution
    horizon, steps = lists.horizon, most
    waiting = free[:n_free].copy()
    n_waiting, left = n_free, 0
    while n_waiting > 0:
        n_waiting -= 1
        i = waiting[n_waiting]
        if steps <= 0:
            free[left] = i
            left += 1
            continue
        steps -= 1
        least, runner_up, first, tied = _two_cheapest(i, lists, solution, factors)
        if price <= least and price <= horizon[i]:
            column_of[i] = ALONE
            u[i] = price
            continue
        if first < 0 or horizon[i] < least:
            wanted[i] = True
            free[left] = i
            left += 1
            continue
        if least >= runner_up and row_of[first] >= 0:
            if tied >= 0 and row_of[tied] < 0:
                first = tied
            else:  # a tie: nobody gives way
                u[i] = least
                free[left] = i
                left += 1
                continue
        u[i] = runner_up
        other = row_of[first]
        if runner_up > least:
            if runner_up == np.inf:
                runner_up = least  # the only column of all: its price need not fall for nobody
                u[i] = least
            v[first] -= runner_up - least
        row_of[first] = i
        column_of[i] = first
        if other >= 0:
            column_of[other] = FREE
            if runner_up > least:
                waiting[n_waiting] = other
                n_waiting += 1
            else:
                free[left] = other
                left += 1
    return left, steps


@inner
def _up(heap, place, dist, at):
    j = heap[at]
    while at > 0:
        parent = (at - 1) >> 1
        if dist[heap[parent]] <= dist[j]:
            break
        heap[at] = heap[parent]
        place[heap[at]] = at
        at = parent
    heap[at] = j
    place[j] = at


@inner
def _pop(heap, place, dist, size):
    """Remove the nearest column; returns it. The heap is one shorter then."""
    top = heap[0]
    size -= 1
    if size > 0:
        j = heap[size]
        at = 0
        while True:
            child = 2 * at + 1
            if child >= size:
                break
            if child + 1 < size and dist[heap[child + 1]] < dist[heap[child]]:
                child += 1
            if dist[heap[child]] >= dist[j]:
                break
            heap[at] = heap[child]
            place[heap[at]] = at
            at = child
        heap[at] = j
        place[j] = at
    place[top] = -2
    return top


@inner
def _search(root, lists, solution, wanted, factors, tree):
    """Find the cheapest path of a free row."""
    dist, before, place, heap, seen, tree_rows, tree_dist = tree
    starts, counts, horizon, error, columns, keys, rough, _ = lists
    price, u, v, row_of, _ = solution
    n_seen, size, n_tree = 0, 0, 0
    best, limit = np.inf, np.inf
    last, leaver, nearest = -1, -1, -1
    i, so_far = root, 0.0
    while True:
        tree_rows[n_tree] = i
        tree_dist[n_tree] = so_far
        n_tree += 1
        base = so_far - u[i]
        if base + horizon[i] < limit:
            limit, nearest = base + horizon[i], i
        if base + price < best:
            best, last, leaver = base + price, -1, i
        for k in range(starts[i], starts[i] + counts[i]):
            if base + keys[k] >= best:
                break
            j = columns[k]
            if place[j] == -2 or base + rough[k] - error[i] - v[j] >= min(best, dist[j]):
                continue
            far = base + _cost(k, i, lists, factors) - v[j]
            if far < dist[j] and far < best:
                if dist[j] == np.inf:
                    seen[n_seen] = j
                    n_seen += 1
                dist[j] = far
                before[j] = i
                if row_of[j] < 0:
                    best, last, leaver = far, j, -1
                else:
                    if place[j] < 0:
                        place[j] = size
                        heap[size] = j
                        size += 1
                    _up(heap, place, dist, place[j])
        if size == 0 or dist[heap[0]] >= best:
            return Path(best, limit, last, leaver, n_tree, n_seen, False)
        if dist[heap[0]] > limit and wanted[nearest]:
            return Path(best, limit, last, leaver, n_tree, n_seen, True)
        j = _pop(heap, place, dist, size)
        size -= 1
        i, so_far = row_of[j], dist[j]


@inner
def _pass_on(path, solution, tree):
    """Raise the prices of the tree, and let each row of the path pass its column on."""
    _, u, v, row_of, column_of = solution
    for t in range(path.n_rows):
        i = tree.rows[t]
        j = column_of[i]
        u[i] += path.length - tree.row_distance[t]
        if j >= 0:
            v[j] -= path.length - tree.row_distance[t]
    if path.leaver >= 0:
        j = column_of[path.leaver]
        column_of[path.leaver] = ALONE
    else:
        j = path.last
    while j >= 0:
        i = tree.before[j]
        row_of[j] = i
        j, column_of[i] = column_of[i], j


@compiled
def augment(
    free: Int[np.ndarray, " row"],
    n_free: int,
    lists: ShortLists,
    solution: Solution,
    wanted: Bool[np.ndarray, " row"],
    factors: Products,
) -> int:
    """Find shortest augmenting paths for free rows, one after another.

    Args:
        free: Free rows in front; those whose search was stopped by a horizon when it returns.
        n_free: Number of free rows.
        lists: Cheapest columns of each row.
        solution: Prices and pairs.
        wanted: Marks of rows whose lists are too short.
        factors: Factors of the costs.

    Returns:
        The number of rows that are still free.
    """
    n_columns, n_rows = len(solution.column_prices), len(solution.row_prices)
    u, horizon = solution.row_prices, lists.horizon
    dist, before = np.full(n_columns, np.inf), np.full(n_columns, -1, np.int32)
    place, heap = np.full(n_columns, -1, np.int32), np.empty(n_columns, np.int32)
    seen, tree_rows = np.empty(n_columns, np.int32), np.empty(n_rows + 1, np.int32)
    tree_dist = np.empty(n_rows + 1, np.float64)
    tree = SearchTree(dist, before, place, heap, seen, tree_rows, tree_dist)
    stopped = 0
    for turn in range(n_free):
        root = free[turn]
        path = _search(root, lists, solution, wanted, factors, tree)
        if path.given_up or path.length == np.inf or path.length > path.limit:
            for t in range(0 if path.given_up else path.n_rows):
                i = tree_rows[t]
                if tree_dist[t] - u[i] + horizon[i] < path.length:
                    wanted[i] = True
            free[stopped] = root
            stopped += 1
        else:
            _pass_on(path, solution, tree)
        for t in range(path.n_seen):
            j = seen[t]
            dist[j] = np.inf
            before[j] = -1
            place[j] = -1
    return stopped


@compiled
def finish(
    free: Int[np.ndarray, " free"], costs: Float[np.ndarray, "row column"], solution: Solution
) -> None:
    """Find shortest augmenting paths for all free rows over a matrix of exact costs.

    Args:
        free: Rows without a column.
        costs: Cost of every pair.
        solution: Pairing and prices, completed in place.
    """
    price, u, v, row_of, _ = solution
    n, m = costs.shape
    dist, before, done = np.empty(m), np.empty(m, np.int32), np.empty(m, np.bool_)
    tree_rows, tree_dist = np.empty(n + 1, np.int32), np.empty(n + 1)
    tree = SearchTree(dist, before, before, before, before, tree_rows, tree_dist)
    for root in free:
        dist[:], done[:] = np.inf, False
        best, last, leaver, n_tree = np.inf, -1, -1, 0
        i, so_far = root, 0.0
        while True:
            tree_rows[n_tree], tree_dist[n_tree] = i, so_far
            n_tree += 1
            base = so_far - u[i]
            if base + price < best:
                best, last, leaver = base + price, -1, i
            nearest, least = -1, best
            for j in range(m):
                if done[j]:
                    continue
                far = max(base + costs[i, j] - v[j], so_far)
                if far < dist[j]:
                    dist[j], before[j] = far, i
                    if row_of[j] < 0 and far < best:
                        best, last, leaver = far, j, -1
                if dist[j] < least and row_of[j] >= 0:
                    nearest, least = j, dist[j]
            if nearest < 0 or least >= best:
                break
            done[nearest] = True
            i, so_far = row_of[nearest], least
        _pass_on(Path(float(best), np.inf, last, leaver, n_tree, 0, False), solution, tree)


@compiled
def reprice(lists: ShortLists, solution: Solution, factors: Products) -> None:
    """Set each row's price to its cheapest column, listed or not, less that column's price.

    Args:
        lists: Short lists of the rows.
        solution: Pairing and prices; row prices are set in place.
        factors: Factors whose products are the costs.
    """
    starts, counts, horizon, error, columns, keys, rough, _ = lists
    price, u, v, _, _ = solution
    for i in range(len(u)):
        least = min(price, horizon[i])
        for k in range(starts[i], starts[i] + counts[i]):
            if keys[k] >= least:
                break
            j = columns[k]
            if rough[k] - error[i] - v[j] < least:
                least = min(least, _cost(k, i, lists, factors) - v[j])
        u[i] = least


@compiled
def near_horizon(
    lists: ShortLists, v: Float[np.ndarray, " column"], near: Bool[np.ndarray, " row"]
) -> None:
    """Mark rows whose horizon is nearer than their second cheapest listed column.

    Args:
        lists: Short lists of the rows.
        v: Prices of the columns.
        near: Marks, written in place.
    """
    starts, counts, horizon, error, columns, keys, rough, _ = lists
    for i in range(len(horizon)):
        least, runner_up = np.inf, np.inf
        for k in range(starts[i], starts[i] + counts[i]):
            if keys[k] >= runner_up:
                break
            value = rough[k] - v[columns[k]]
            if value < least:
                runner_up, least = least, value
            elif value < runner_up:
                runner_up = value
        near[i] = horizon[i] < runner_up + error[i]
