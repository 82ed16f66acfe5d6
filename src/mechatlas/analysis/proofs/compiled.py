"""Compiled loops that prepare a verification: checks, and all that does not depend on the pair.

    find_fault   explanation -> what is impossible in it
    reduce       neurons that are the same up to scale -> one, and what that may cost
    project      unembedding and circuits -> what of it they do not explain
    frame        means of circuits -> ideal margins
    look_up      grids -> where each neuron finds its table
    span         what is left of the unembedding in the cells of grids -> what it could take
    farthest     the same in blocks of neurons
    class_bins   ideal margins -> the least for each class of elements
    lose         sums of additive parts and spans -> what they could take from each answer
    weigh        sums of absolute values, for bounds on rounding

`plain.py` has the same functions in numpy. Sums may be taken in any order and multiplications
fused into them: the bounds on rounding hold for every order. Input is finite (`checks`), and
what could have overflowed here is refused afterwards (`terms`).
"""

import inspect
from collections.abc import Callable
from typing import Any

import numba
import numpy as np


def compiled(function: Callable[..., Any]) -> Any:
    """The function in machine code, kept on disk where there is a place for it."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    options["fastmath"] = {"contract", "reassoc"}
    try:
        return numba.njit(cache=True, **options)(inspect.unwrap(function))
    except RuntimeError:  # no writable place for the cache: compile in every process
        return numba.njit(**options)(inspect.unwrap(function))


@compiled
def reduce(weights, standing, order, factor):
    """Merge neurons: one that is a multiple of another adds to the unembedding of that one.

    Returns scaled left and right, the unembedding u, the linear part v of those that stand for
    mirrored neurons, which these are, the mass (what |u| adds up to), losses by x and by y,
    and whether a scaled weight is too small to be sure that scaling is exact.
    """
    left, right, unembed = weights
    silent, leaders, ratios = standing
    n, m = left.shape
    k = len(order)
    place = np.zeros(m, np.int64)
    for j in range(k):
        place[order[j]] = j
    u, v = np.zeros((k, n), np.float32), np.zeros((k, n), np.float32)
    mirrored = np.zeros(k, np.bool_)
    sums, mass = np.zeros((k, n), np.float32), np.zeros(k)
    x_loss, y_loss = np.zeros(n), np.zeros(n)
    for i in range(m):
        to, ratio = unembed[i], np.float64(ratios[i])
        j = place[leaders[i]]
        if silent[i] or leaders[i] != i:
            most = least = to[0]
            for z in range(n):
                most, least = max(most, to[z]), min(least, to[z])
            span = 1.000001 * (np.float64(most) - np.float64(least))
            if silent[i]:
                for x in range(n):
                    x_loss[x] += span * max(np.float64(left[x, i]), 0.0)
                    y_loss[x] += span * max(np.float64(right[x, i]), 0.0)
                continue
            who = leaders[i]
            for x in range(n):
                x_loss[x] += span * abs(np.float64(left[x, i]) - ratio * left[x, who])
                y_loss[x] += span * abs(np.float64(right[x, i]) - ratio * right[x, who])
        scale = np.float32(abs(ratio) / factor[j])
        mine, total = u[j], sums[j]
        for z in range(n):
            part = scale * to[z]
            mine[z] += part
            total[z] += abs(part)
        if ratio < 0:
            mirrored[j] = True
            linear = v[j]
            for z in range(n):
                linear[z] -= scale * to[z]
    for j in range(k):
        total, most = sums[j], np.float32(0)
        for z in range(n):
            most = total[z] if total[z] > most else most
        mass[j] = most
    scaled_left = np.empty((n, k), np.float32)
    scaled_right = np.empty((k, n), np.float32)
    for x in range(n):
        first, second, to = left[x], right[x], scaled_left[x]
        for j in range(k):
            to[j] = first[order[j]] * factor[j]
            scaled_right[j, x] = second[order[j]] * factor[j]
    tiny = _is_tiny(scaled_left.reshape(-1)) or _is_tiny(scaled_right.reshape(-1))
    return scaled_left, scaled_right, u, v, mirrored, mass, x_loss, y_loss, tiny


@compiled
def _is_tiny(values):
    """Whether a number but 0 is so small that scaling it may have rounded it."""
    small, found = np.float32(2.0**-80), False
    for i in range(len(values)):
        found |= (abs(values[i]) < small) & (values[i] != 0)
    return found


@compiled
def _is_below(values, limit):
    fine = True  # written so that NaN fails as well
    for i in range(len(values)):
        fine &= abs(values[i]) < limit
    return fine


@compiled
def _is_label(values, low, high):
    fine = True
    for i in range(len(values)):
        fine &= (values[i] >= low) & (values[i] < high)
    return fine


@compiled
def find_fault(standing, order, exponents, row, column, packed, limit):
    """The number of the first thing that is impossible in an explanation, or 0.

    See `checks.FAULTS` for what the numbers mean.
    """
    silent, leaders, ratios = standing
    weights, means, tables, scale, points, antipodes, grids = packed
    if not _is_label(exponents, -40, 41):
        return 1
    if not (_is_below(row.reshape(-1), limit) and _is_below(column.reshape(-1), limit)):
        return 2
    if not (_is_below(weights, limit) and _is_below(means, limit)):
        return 3
    if not (_is_below(tables, limit) and _is_below(scale, limit) and _is_below(ratios, limit)):
        return 4
    if not (_is_label(leaders, 0, len(leaders)) and _is_label(order, 0, len(leaders))):
        return 5
    if _find_stranger(silent, leaders, ratios, order) >= 0:
        return 6
    for g in range(len(grids)):
        start, count, k, k2, left, right, cell, _ = grids[g]
        first, second = points[0, start : start + count], points[1, start : start + count]
        if not (_is_label(first, 0, k) and _is_label(second, 0, k2)):
            return 7
        one, two = antipodes[left : left + k], antipodes[right : right + k2]
        if not (_is_label(one, 0, k) and _is_label(two, 0, k2)):
            return 8
        for p in range(k):
            for q in range(k2):
                other = one[p] * k2 + two[q]
                if tables[cell + p * k2 + q] != tables[cell + other]:
                    return 9
    return 0


@compiled
def lose(x_sums, y_sums, spans):
    """What the additive parts and the cells could take at most from a right answer z.

    Returns losses by x and z, by y and z, and the largest span of each z.
    """
    n = len(spans)
    most = np.empty(n, np.float32)
    for z in range(n):
        line, top = spans[z], np.float32(0)
        for w in range(n):
            top = line[w] if line[w] > top else top
        most[z] = top
    x_loss, y_loss = np.empty((n, n), np.float32), np.empty((n, n), np.float32)
    for x in range(n):
        line, to, top = x_sums[x], x_loss[x], x_sums[x, 0]
        for z in range(n):
            top = line[z] if line[z] > top else top
        for z in range(n):
            to[z] = top - line[z] + most[z]
        line, to, top = y_sums[x], y_loss[x], y_sums[x, 0]
        for z in range(n):
            top = line[z] if line[z] > top else top
        for z in range(n):
            to[z] = top - line[z]
    return x_loss, y_loss, most


@compiled
def _find_stranger(silent, leaders, ratios, order):
    """The first neuron that is neither silent nor has one that stands for it, or -1."""
    stands = np.zeros(len(leaders), np.int64)
    for j in order:
        stands[j] += 1
    for i in range(len(leaders)):
        own = stands[i] == 1 and not silent[i] and leaders[i] == i and ratios[i] == 1
        follows = stands[i] == 0 and (silent[i] or stands[leaders[i]] == 1)
        if not (own or follows):
            return i
    return -1


@compiled
def keeps_opposite(antipodes, action):
    """Whether antipodes are pairs of points or points alone, and the action keeps them."""
    fine = True
    for p in range(len(antipodes)):
        fine &= antipodes[antipodes[p]] == p
    for g in range(len(action)):
        for p in range(len(antipodes)):
            fine &= action[g, antipodes[p]] == antipodes[action[g, p]]
    return fine


@compiled
def project(u, circuits, weights, rho):
    """What of the unembedding circuits do not explain, and sizes of the M_i."""
    k, n = u.shape
    rest, sizes = u.copy(), np.zeros(k)
    base = offset = 0
    for c in range(len(circuits)):
        d, start, count = circuits[c]
        dd = d * d
        m = weights[offset : offset + dd * count].reshape((dd, count))
        explained = np.dot(m.T, rho[base : base + dd])
        for j in range(count):
            to, line, square = rest[start + j], explained[j], 0.0
            for z in range(n):
                to[z] -= line[z]
            for r in range(dd):
                square += np.float64(m[r, j]) ** 2
            sizes[start + j] += np.sqrt(square)
        base += dd
        offset += dd * count
    return rest, sizes


@compiled
def frame(circuits, means, rho, identity):
    """rho(x) mean, by entry and x; and the ideal margin <mean, 1 - rho(g)> of each g."""
    n = rho.shape[1]
    framed, inner = np.zeros((len(rho), n), np.float32), np.zeros(n)
    base = 0
    for c in range(len(circuits)):
        d = circuits[c, 0]
        for a in range(d):
            for b in range(d):
                to, mean = framed[base + a * d + b], means[base + a * d + b]
                line = rho[base + a * d + b]
                for x in range(n):
                    inner[x] += mean * line[x]
                for e in range(d):
                    factor, line = np.float32(means[base + e * d + b]), rho[base + a * d + e]
                    for x in range(n):
                        to[x] += factor * line[x]
        base += d * d
    return framed, inner[identity] - inner


@compiled
def look_up(grids, sides, offsets, points, scale, tables, actions):
    """Where each neuron finds its table: row first[i] + (left point of x) of out.

    Row base + q k + p of out is the table of a grid at p and where each y takes q. Returns
    first, the column of each neuron in the actions, out, and the largest of |s T|.
    """
    n, k = len(actions), len(scale)
    first, column = np.zeros(k, np.int64), np.zeros(k, np.int64)
    out, top = np.zeros((len(tables) + 1, n), np.float32), np.zeros(k, np.float32)
    zeros = len(tables)  # a row for neurons in no grid, whose scale is 0
    for j in range(k):
        first[j] = zeros
    for g in range(len(grids)):
        start, count, k1, k2, _, _, cell, _ = grids[g]
        left, right = offsets[sides[g, 0]], offsets[sides[g, 1]]
        most = np.float32(0)
        for i in range(k1 * k2):
            most = max(most, abs(tables[cell + i]))
        for j in range(start, start + count):
            first[j] = cell + points[1, j] * k1
            column[j] = left + points[0, j]
            top[j] = np.float32(1.0001) * abs(scale[j]) * most
        for q in range(k2):
            for p in range(k1):
                to = out[cell + q * k1 + p]
                for y in range(n):
                    to[y] = tables[cell + p * k2 + actions[y, right + q]]
    return first, column, out, top


@compiled
def weigh(left, row, right, column, small):
    """Sum over neurons of small (|left| + |row|), by x; the same of the others, by y.

    Also more than the largest of all these numbers.
    """
    k, n = right.shape
    of_x, of_y = np.empty(n, np.float32), np.zeros(n, np.float32)
    every, largest = np.zeros(n, np.float32), np.float32(0)
    for x in range(n):
        first, second, total, whole = left[x], row[x], np.float32(0), np.float32(0)
        for j in range(k):
            value = abs(first[j]) + abs(second[j])
            total += small[j] * value
            whole += value
        of_x[x] = total
        largest += whole
    for j in range(k):
        first, second, size = right[j], column[j], small[j]
        for y in range(n):
            value = abs(first[y]) + abs(second[y])
            of_y[y] += size * value
            every[y] += value
    for y in range(n):
        largest += every[y]
    return of_x, of_y, np.float64(largest)


@compiled
def weigh_run(left, right, unembed, rate):
    """Sum over neurons of rate max |u_i| max(l_i, 0), by x; the same of r_i, by y.

    Also more than the largest of all these numbers.
    """
    n, m = left.shape
    run, size = np.empty(m, np.float32), 0.0
    for i in range(m):
        line, most = unembed[i], np.float32(0)
        for z in range(n):
            most = max(most, abs(line[z]))
        run[i] = rate * np.float64(most)
        size += np.float64(most)
    of_x, of_y = np.empty(n, np.float32), np.empty(n, np.float32)
    for x in range(n):
        first, second = left[x], right[x]
        total, total2, whole = np.float32(0), np.float32(0), np.float32(0)
        for i in range(m):
            value, value2 = max(first[i], np.float32(0)), max(second[i], np.float32(0))
            total += run[i] * value
            total2 += run[i] * value2
            whole += value + value2
        of_x[x], of_y[x] = total, total2
        size += np.float64(whole)
    return of_x, of_y, size


@compiled
def farthest(rest, blocks, rate, inflate):
    """Bounds on the distance of each column from any other, in each block of rows.

    rate covers rounding.
    """
    errors = np.empty((len(blocks) - 1, rest.shape[1]), np.float32)
    for b in range(len(errors)):
        far, to = _farthest(rest[blocks[b] : blocks[b + 1]], rate), errors[b]
        for z in range(len(to)):
            to[z] = inflate * far[z]
    return errors


@compiled
def _farthest(vectors, rate):
    n = vectors.shape[1]
    far = np.zeros(n)
    if not len(vectors):
        return far
    gram = np.dot(vectors.T, vectors)
    norms, top = np.empty(n, np.float32), np.float32(0)
    for z in range(n):
        norms[z] = gram[z, z]
        top = max(top, norms[z])
    two = np.float32(2)
    for z in range(n):
        line, most = gram[z], np.float32(0)
        for w in range(n):
            value = norms[w] - two * line[w]
            most = value if value > most else most
        far[z] = np.sqrt(np.float64(most) + np.float64(norms[z]) + rate * top)
    return far


@compiled
def span(rest, weight, grids, points, antipodes, scale, tables, rate):
    """How much the cells of all grids could take, for each two answers.

    Also what they could because tables have row or column means, more than the largest
    number in a cell, and the number of cells.
    """
    n = rest.shape[1]
    spans, off_centre, largest, cells = np.zeros((n, n), np.float32), 0.0, 0.0, 0
    inflate = 1.000002 + 2.0**-22 * len(grids)
    for g in range(len(grids)):
        start, count, k, k2, left, right, cell, _ = grids[g]
        mine = slice(start, start + count)
        taken, most, kept = _add_spans(
            rest[mine], (points[0, mine], points[1, mine]),
            (antipodes[left : left + k], antipodes[right : right + k2]), scale[mine],
            tables[cell : cell + k * k2].reshape((k, k2)), weight[mine], rate, inflate, spans,
        )  # fmt: skip
        off_centre += taken
        largest += most
        cells += kept + 2
    return spans, off_centre, largest, cells


@compiled
def _add_spans(rest, points, antipodes, scale, table, weight, rate, inflate, spans):
    """How much the cells of a grid could take, for each two answers, is added to spans.

    A cell holds what the rests in it add up to, without row and column means, times the norm
    of the table. Of two opposite cells, which are the same, only one is kept, times the root
    of two. Returns what the row and column means of the table could take (weight is that of
    each neuron, largest u and all), more than the largest cell, and how many were kept.
    """
    k, k2 = table.shape
    size, means = _table_sizes(table)
    n = rest.shape[1]
    cells = np.zeros((k * k2, n))
    for j in range(len(rest)):
        p, q, half = points[0][j], points[1][j], 0.5 * np.float64(scale[j])
        own, other = cells[p * k2 + q], cells[antipodes[0][p] * k2 + antipodes[1][q]]
        line = rest[j]
        for z in range(n):
            own[z] += half * line[z]
        for z in range(n):
            other[z] += half * line[z]
    rows, columns, every = np.zeros((k, n)), np.zeros((k2, n)), np.zeros(n)
    for p in range(k):
        for q in range(k2):
            own, row, column = cells[p * k2 + q], rows[p], columns[q]
            for z in range(n):
                row[z] += own[z] / k2
            for z in range(n):
                column[z] += own[z] / k
        row = rows[p]
        for z in range(n):
            every[z] += row[z] / k
    kept = 0
    for p in range(k):
        for q in range(k2):
            cell, other = p * k2 + q, antipodes[0][p] * k2 + antipodes[1][q]
            if other < cell:
                continue
            times = size if other == cell else np.sqrt(2.0) * size
            own, row, column, to = cells[cell], rows[p], columns[q], cells[kept]
            for z in range(n):
                to[z] = times * (own[z] - row[z] - column[z] + every[z])
            kept += 1
    few = cells[:kept].astype(np.float32)
    gram = np.dot(few.T, few)
    norms, top = np.empty(n, np.float32), np.float32(0)
    for z in range(n):
        top = max(top, gram[z, z])
    for z in range(n):
        norms[z] = gram[z, z] + np.float32(0.5 * rate) * top
    zero, two, more = np.float32(0), np.float32(2), np.float32(inflate)
    for z in range(n):
        line, to, mine = gram[z], spans[z], norms[z]
        for w in range(n):
            square = norms[w] + mine - two * line[w]
            to[w] += more * np.sqrt(square if square > zero else zero)
    total = 0.0
    for j in range(len(rest)):
        total += weight[j] * abs(np.float64(scale[j]))
    return 2.02 * (means + 1e-10 * size) * total, 4 * size * total, kept


@compiled
def _table_sizes(table):
    """Frobenius norm of a table, and of its row and column means."""
    k, k2 = table.shape
    rows, columns, every, size = np.zeros(k), np.zeros(k2), 0.0, 0.0
    for p in range(k):
        for q in range(k2):
            value = np.float64(table[p, q])
            rows[p] += value / k2
            columns[q] += value / k
            every += value / (k * k2)
            size += value * value
    means = 0.0
    for p in range(k):
        for q in range(k2):
            means += (rows[p] + columns[q] - every) ** 2
    return 1.000001 * np.sqrt(size), np.sqrt(means)


@compiled
def class_bins(gaps, norms, class_of, n_classes, most, inflate):
    """Least gap and largest norms, for parts of the group but 1, at most `most` of them.

    A part is a class of elements, or classes with about the same gap.
    """
    n, c = norms.shape
    least = np.full(n_classes, np.inf)
    for g in range(n):
        least[class_of[g]] = min(least[class_of[g]], gaps[g])
    low, high = np.inf, -np.inf
    for k in range(1, n_classes):
        low, high = min(low, least[k]), max(high, least[k])
    count = max(min(most, n_classes - 1), 1)
    part = np.zeros(n_classes, np.int64)
    for k in range(1, n_classes):
        part[k] = k - 1
        if n_classes - 1 > most and high > low:
            part[k] = min(int((least[k] - low) / (high - low) * count), count - 1)
        elif n_classes - 1 > most:
            part[k] = 0
    out_gaps, out_norms = np.full(count, np.inf), np.zeros((count, c), np.float32)
    for g in range(n):
        k = class_of[g]
        if k == 0:
            continue
        to = part[k]
        out_gaps[to] = min(out_gaps[to], gaps[g])
        for i in range(c):
            value = np.float32(norms[g, i] * inflate)
            out_norms[to, i] = max(out_norms[to, i], value)
    return out_gaps.astype(np.float32), out_norms
