"""The compiled parts of an assignment over short lists of columns for each row.

    approach   bids that overpay by a little, on rounded costs: column prices near to the best
    bid        exact bids: free rows take their cheapest column while prices say who gives way
    augment    shortest augmenting paths for the rows that are left
    finish     the same without lists, over a matrix of exact costs
    reprice    exact row prices for given column prices

Prices: u of rows, v of columns. Always u_i + v_j <= c_ij, and where columns may stay free, v <= 0
and v = 0 for free ones. Column prices only fall. So what a list says once stays true: entry k of
row i costs at least `keys[k]` less its column's price, and every column that is not listed at
least `horizon[i]`. `rough[k]` is the cost of entry k, off by `error[i]` at most; costs in float64
are computed when they are first needed (NaN before).

A list may be too short to say what is cheapest. Such a row waits (`wanted`) until the caller has
made its list anew; a search that needs it changes nothing.

Source: Bertsekas (1988) for bids that overpay; Jonker and Volgenant (1987) for exact bids and
paths; Volgenant (1996) for short lists.
"""

import numpy as np

from mechatlas.maths.compilation import compiled

FREE = -1
ALONE = -2
"""In place of the column of a row that stays unmatched for the price of it."""


def _dot(a, b):
    total = 0.0
    for k in range(len(a)):
        total += np.float64(a[k]) * np.float64(b[k])
    return total


_product = compiled(_dot, fastmath={"reassoc", "contract", "nsz"})


@compiled
def _cost(k, i, lists, factors):
    """The exact cost of entry k, which is in the list of row i."""
    columns, _, _, costs = lists
    if np.isnan(costs[k]):
        a, b, row_offsets, column_offsets = factors
        j = columns[k]
        costs[k] = row_offsets[i] + column_offsets[j] - _product(a[i], b[j])
    return costs[k]


@compiled
def approach(queue, n_queue, step, most, rows, lists, v, row_of, column_of, wanted):
    """Bids on rounded costs, each `step` more than it takes, first come first served.

    Prices end within about `step` of those of a best pairing, unless that takes more than `most`
    bids. Rows whose lists are too short are marked in `wanted` and leave the queue. Returns the
    number of bids.
    """
    starts, counts, horizon, error = rows
    columns, keys, rough, _ = lists
    room, head, bids = len(queue), 0, 0
    while n_queue > 0 and bids < most:
        i = queue[head]
        head = (head + 1) % room
        n_queue -= 1
        one, two, first = np.inf, np.inf, -1
        for k in range(starts[i], starts[i] + counts[i]):
            if keys[k] >= two:
                break
            value = rough[k] - v[columns[k]]
            if value < one:
                two, one, first = one, value, columns[k]
            elif value < two:
                two = value
        bids += 1
        if horizon[i] + 2 * error[i] < one:
            wanted[i] = True
            continue
        two = min(two, horizon[i] + 2 * error[i])
        v[first] -= step + (two - one if two < np.inf else 0.0)
        other = row_of[first]
        row_of[first] = i
        column_of[i] = first
        if other >= 0:
            column_of[other] = FREE
            queue[(head + n_queue) % room] = other
            n_queue += 1
    return bids


@compiled
def _two_cheapest(i, rows, lists, price, v, factors):
    """Least and second least cost less price of a row, and the columns that cost the least."""
    starts, counts, horizon, error = rows
    columns, keys, rough, _ = lists
    one, two, first, second = np.inf, np.inf, -1, -1
    for k in range(starts[i], starts[i] + counts[i]):
        if keys[k] >= two:
            break
        j = columns[k]
        if rough[k] - error[i] - v[j] >= two:
            continue
        value = _cost(k, i, lists, factors) - v[j]
        if value < one:
            two, second, one, first = one, first, value, j
        elif value < two:
            two, second = value, j
    tied = second if two <= one else -1
    return one, min(two, horizon[i], price), first, tied


@compiled
def bid(free, n_free, rows, lists, price, u, v, row_of, column_of, steps, wanted, f):
    """Give free rows their cheapest columns; a row that is outbid bids again.

    `free` has the rows that are still free in front when it returns; returns their number and
    how many bids of `steps` are left. Rows whose lists are too short are marked in `wanted`.
    """
    horizon = rows[2]
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
        one, two, first, tied = _two_cheapest(i, rows, lists, price, v, f)
        if price <= one and price <= horizon[i]:
            column_of[i] = ALONE
            u[i] = price
            continue
        if first < 0 or horizon[i] < one:
            wanted[i] = True
            free[left] = i
            left += 1
            continue
        if one >= two and row_of[first] >= 0:
            if tied >= 0 and row_of[tied] < 0:
                first = tied
            else:  # a tie: nobody gives way
                u[i] = one
                free[left] = i
                left += 1
                continue
        u[i] = two
        other = row_of[first]
        if two > one:
            if two == np.inf:
                two = one  # the only column of all: its price need not fall for nobody
                u[i] = one
            v[first] -= two - one
        row_of[first] = i
        column_of[i] = first
        if other >= 0:
            column_of[other] = FREE
            if two > one:
                waiting[n_waiting] = other
                n_waiting += 1
            else:
                free[left] = other
                left += 1
    return left, steps


@compiled
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


@compiled
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


@compiled
def _search(root, rows, lists, price, u, v, row_of, wanted, f, room):
    """The cheapest way from a free row to a free column, or to leaving a row unmatched.

    Returns its length, the length up to which nothing unlisted can be cheaper, the column where
    it ends, the row that stays unmatched instead, the sizes of the tree and of what was seen, and
    whether it was given up because another search has asked for what is missing here.
    """
    dist, before, place, heap, seen, tree_rows, tree_dist = room
    starts, counts, horizon, error = rows
    columns, keys, rough, _ = lists
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
            far = base + _cost(k, i, lists, f) - v[j]
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
            return best, limit, last, leaver, n_tree, n_seen, False
        if dist[heap[0]] > limit and wanted[nearest]:
            return best, limit, last, leaver, n_tree, n_seen, True
        j = _pop(heap, place, dist, size)
        size -= 1
        i, so_far = row_of[j], dist[j]


@compiled
def _pass_on(best, last, leaver, n_tree, u, v, row_of, column_of, room):
    """Raise the prices of the tree, and let each row of the path pass its column on."""
    _, before, _, _, _, tree_rows, tree_dist = room
    for t in range(n_tree):
        i = tree_rows[t]
        j = column_of[i]
        u[i] += best - tree_dist[t]
        if j >= 0:
            v[j] -= best - tree_dist[t]
    if leaver >= 0:
        j = column_of[leaver]
        column_of[leaver] = ALONE
    else:
        j = last
    while j >= 0:
        i = before[j]
        row_of[j] = i
        j, column_of[i] = column_of[i], j


@compiled
def augment(free, n_free, most, rows, lists, price, u, v, row_of, column_of, wanted, f):
    """Find shortest augmenting paths for up to `most` free rows, one after another.

    Rows whose search was stopped by a horizon are put in front of `free`, those not yet tried
    after them. Returns the number of stopped ones, of free ones, and of rows looked at.
    """
    horizon = rows[2]
    n_columns = len(v)
    dist, before = np.full(n_columns, np.inf), np.full(n_columns, -1, np.int32)
    place, heap = np.full(n_columns, -1, np.int32), np.empty(n_columns, np.int32)
    seen, tree_rows = np.empty(n_columns, np.int32), np.empty(len(u) + 1, np.int32)
    tree_dist = np.empty(len(u) + 1, np.float64)
    room = dist, before, place, heap, seen, tree_rows, tree_dist
    stopped, work = 0, 0
    tried = min(most, n_free)
    for turn in range(tried):
        root = free[turn]
        best, limit, last, leaver, n_tree, n_seen, given_up = _search(
            root, rows, lists, price, u, v, row_of, wanted, f, room
        )
        work += n_tree
        if given_up or best == np.inf or best > limit:
            for t in range(0 if given_up else n_tree):
                i = tree_rows[t]
                if tree_dist[t] - u[i] + horizon[i] < best:
                    wanted[i] = True
            free[stopped] = root
            stopped += 1
        else:
            _pass_on(best, last, leaver, n_tree, u, v, row_of, column_of, room)
        for t in range(n_seen):
            j = seen[t]
            dist[j] = np.inf
            before[j] = -1
            place[j] = -1
    for turn in range(tried, n_free):
        free[stopped + turn - tried] = free[turn]
    return stopped, n_free - tried + stopped, work


@compiled
def finish(free, costs, price, u, v, row_of, column_of):
    """Shortest augmenting paths for all free rows over a matrix of exact costs."""
    n, m = costs.shape
    dist, before, done = np.empty(m), np.empty(m, np.int32), np.empty(m, np.bool_)
    tree_rows, tree_dist = np.empty(n + 1, np.int32), np.empty(n + 1)
    room = dist, before, before, before, before, tree_rows, tree_dist
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
        _pass_on(best, last, leaver, n_tree, u, v, row_of, column_of, room)


@compiled
def reprice(rows, lists, price, u, v, f):
    """Set each row's price to its cheapest column, listed or not, less that column's price."""
    starts, counts, horizon, error = rows
    columns, keys, rough, _ = lists
    for i in range(len(u)):
        least = min(price, horizon[i])
        for k in range(starts[i], starts[i] + counts[i]):
            if keys[k] >= least:
                break
            j = columns[k]
            if rough[k] - error[i] - v[j] < least:
                least = min(least, _cost(k, i, lists, f) - v[j])
        u[i] = least


@compiled
def near_horizon(rows, lists, v, near):
    """Mark rows whose horizon is nearer than their second cheapest listed column."""
    starts, counts, horizon, error = rows
    columns, keys, rough, _ = lists
    for i in range(len(horizon)):
        one, two = np.inf, np.inf
        for k in range(starts[i], starts[i] + counts[i]):
            if keys[k] >= two:
                break
            value = rough[k] - v[columns[k]]
            if value < one:
                two, one = one, value
            elif value < two:
                two = value
        near[i] = horizon[i] < two + error[i]
