"""The compiled inner loops of the verifier, for CPUs.

    bound_pairs  weights and explanation -> a lower bound on the margin of each pair
    reduce       neurons that are the same up to scale -> one, and what that may cost
    spread       vectors -> the largest distance of each from any other
    add_spans    vectors -> all their distances

`plain.py` has the same functions in numpy. Sums may be taken in any order and multiplications
fused into them: the bounds on rounding hold for every order. All input is finite and so small
that nothing overflows: `verify` sees to that.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numba
import numpy as np


def _compiled(function: Callable[..., Any]) -> Any:
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    options["fastmath"] = {"contract", "reassoc"}
    try:
        return numba.njit(cache=True, **options)(inspect.unwrap(function))
    except RuntimeError:  # no writable place for the cache: compile in every process
        return numba.njit(**options)(inspect.unwrap(function))


@_compiled
def reduce(weights, standing, order, factor):
    """Merge neurons: one that is a multiple of another adds to the unembedding of that one.

    Returns scaled left, right, the unembedding u, the linear part v of mirrored neurons, the
    mass (what |u| adds up to), losses by x and by y, and the smallest scaled weight but 0.
    """
    left, right, unembed = weights
    silent, leaders, ratios = standing
    n, m = left.shape
    k = len(order)
    place = np.zeros(m, np.int64)
    for j in range(k):
        place[order[j]] = j
    u, v = np.zeros((k, n)), np.zeros((k, n))
    sums, mass = np.zeros((k, n)), np.zeros(k)
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
        scale = abs(ratio) / np.float64(factor[j])
        mine, total = u[j], sums[j]
        for z in range(n):
            part = scale * np.float64(to[z])
            mine[z] += part
            total[z] += abs(part)
        if ratio < 0:
            mirrored = v[j]
            for z in range(n):
                mirrored[z] -= scale * np.float64(to[z])
    for j in range(k):
        total = sums[j]
        for z in range(n):
            mass[j] = max(mass[j], total[z])
    scaled_left = np.empty((n, k), np.float32)
    scaled_right = np.empty((k, n), np.float32)
    least = np.float32(1)
    for x in range(n):
        for j in range(k):
            a, b = left[x, order[j]] * factor[j], right[x, order[j]] * factor[j]
            scaled_left[x, j], scaled_right[j, x] = a, b
            if a != 0:
                least = min(least, abs(a))
            if b != 0:
                least = min(least, abs(b))
    return scaled_left, scaled_right, u, v, mass, x_loss, y_loss, least


@_compiled
def spread(gram, rounding):
    """From all inner products of some vectors: the largest distance of each from any other."""
    n = len(gram)
    norms = np.empty(n)
    for z in range(n):
        norms[z] = gram[z, z]
    far = np.empty(n)
    for z in range(n):
        line, most = gram[z], 0.0
        for w in range(n):
            most = max(most, norms[w] - 2 * line[w])
        far[z] = np.sqrt(max(most + norms[z] + rounding, 0.0))
    return far


@_compiled
def add_spans(gram, rounding, size, spans):
    """Add to spans the distance of all vectors, times size."""
    n = len(gram)
    norms = np.empty(n)
    for z in range(n):
        norms[z] = gram[z, z] + rounding / 2
    for z in range(n):
        line, to, mine = gram[z], spans[z], norms[z]
        for w in range(n):
            to[w] += size * np.sqrt(max(norms[w] + mine - 2 * line[w], 0.0))


@_compiled
def _interact(x, start, stop, neurons, lookup, kept, squares):
    """Neurons start to stop at one x: their values at every y, and the squared rests."""
    left, row, right, column, scale = neurons
    first, points, moves, tables = lookup
    zero = np.float32(0)
    squares[:] = 0
    j = start
    # Slices, because the compiler vectorises loops over whole arrays alone; two neurons at a
    # time, because then each sum is loaded and stored half as often.
    while j < stop:
        more = min(j + 2, stop)
        for i in range(j, more):
            at, value, r = left[x, i], kept[i], right[i]
            for y in range(len(value)):
                t = at + r[y]
                value[y] = t if t > zero else zero
        a, s, value, c = row[x, j], scale[j], kept[j], column[j]
        table = tables[first[j] + moves[x, points[j]]]
        if more == j + 2:
            a2, s2, value2, c2 = row[x, j + 1], scale[j + 1], kept[j + 1], column[j + 1]
            table2 = tables[first[j + 1] + moves[x, points[j + 1]]]
            for y in range(len(value)):
                rest = value[y] - a - c[y] - s * table[y]
                rest2 = value2[y] - a2 - c2[y] - s2 * table2[y]
                squares[y] += rest * rest + rest2 * rest2
        else:
            for y in range(len(value)):
                rest = value[y] - a - c[y] - s * table[y]
                squares[y] += rest * rest
        j = more


@_compiled
def _root(values):
    for y in range(len(values)):
        values[y] = np.sqrt(values[y])


@_compiled
def _compare(part, framed, rho, d, rest, squares):
    """The squared entries of part - framed rho(y)."""
    squares[:] = 0
    for a in range(d):
        for b in range(d):
            whole = part[a * d + b]
            for y in range(len(rest)):
                rest[y] = whole[y]
            for e in range(d):
                factor, its_rho = framed[a * d + e], rho[e * d + b]
                for y in range(len(rest)):
                    rest[y] -= factor * its_rho[y]
            for y in range(len(rest)):
                squares[y] += rest[y] * rest[y]


@_compiled
def _explain(x, circuits, kept, whole, rest, moved):
    """The matrices V at one x, and how far they are from the mean in the frame of x and y."""
    dims, starts, counts, flat, of_x, of_y, framed, rho = circuits
    base = offset = 0
    for c in range(len(dims)):
        d, k = dims[c], counts[c]
        part = whole[base : base + d * d]
        weights = flat[offset : offset + d * d * k].reshape((d * d, k))
        np.dot(weights, kept[starts[c] : starts[c] + k], part)
        for r in range(d * d):
            to, row, column = part[r], of_x[x, base + r], of_y[base + r]
            for y in range(len(to)):
                to[y] = to[y] - row - column[y]
        _compare(part, framed[x, base : base + d * d], rho[base : base + d * d], d, rest, moved[c])
        _root(moved[c])
        base += d * d
        offset += d * d * k


@_compiled
def _screen(zs, rests, moved, bins, losses, total, worst):
    """The first bound at one x: total is what to take from worst."""
    gaps, norms = bins
    x_loss, y_loss, errors = losses
    for y in range(len(zs)):
        z = zs[y]
        total[y] = x_loss[z] + y_loss[y, z]
    for b in range(len(rests)):
        rest, error = rests[b], errors[b]
        for y in range(len(zs)):
            total[y] += rest[y] * error[zs[y]]
    worst[:] = np.inf
    value = np.empty(len(zs), np.float32)
    for k in range(len(gaps)):
        value[:] = gaps[k]
        for c in range(len(moved)):
            part, norm = moved[c], norms[k, c]
            for y in range(len(zs)):
                value[y] -= part[y] * norm
        for y in range(len(zs)):
            worst[y] = min(worst[y], value[y])


@_compiled
def _sharpen(ys, zs, whole, merged, x_sum, y_sums, spans, out):
    """Right logit less the largest other one, where each other one gets all it could."""
    rows, signs, to, rho = merged
    n = rho.shape[1]
    v = np.zeros((len(ys), len(rho)), np.float32)
    for r in range(len(rows)):
        source, sign, g = whole[rows[r]], signs[r], to[r]
        for i in range(len(ys)):
            v[i, g] += sign * source[ys[i]]
    logits = np.dot(v, rho)
    value = np.empty((n + 15) // 16 * 16, np.float32)
    value[:] = -np.inf
    maxima = np.empty(16, np.float32)
    for i in range(len(ys)):
        y = ys[i]
        z = zs[y]
        y_sum, logit, span = y_sums[y], logits[i], spans[z]
        for w in range(n):
            value[w] = logit[w] + x_sum[w] + y_sum[w] + span[w]
        right = value[z] - span[z]
        value[z] = -np.inf
        maxima[:] = -np.inf
        for start in range(0, len(value), 16):
            part = value[start : start + 16]
            for c in range(16):
                maxima[c] = part[c] if part[c] > maxima[c] else maxima[c]
        best = maxima[0]
        for c in range(1, 16):
            best = max(best, maxima[c])
        out[i] = right - best


@_compiled
def bound_pairs(table, neurons, blocks, lookup, circuits, bins, losses, slack, second, out):
    """Lower bounds on the margins of all pairs, by the first stage and the second.

    Returns how many pairs the second stage took.
    """
    merged, x_sums, y_sums, spans, pairs_left, hopeless = second
    x_slack, y_slack, x_run, y_run, inflate = slack
    margins, stages, rests, moved, sample_rests, sample_moved = out
    k, n = neurons[2].shape
    kept = np.empty((k, n), np.float32)
    whole = np.empty((len(circuits[-1]), n), np.float32)
    rest, total, worst = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.float32)
    failed, sharper = np.empty(n, np.int64), np.empty(n, np.float32)
    used = 0
    for x in range(n):
        for b in range(len(blocks) - 1):
            _interact(x, blocks[b], blocks[b + 1], neurons, lookup, kept, rests[b])
            _root(rests[b])
        _explain(x, circuits, kept, whole, rest, moved)
        if x == 0:
            sample_rests[:] = rests
            sample_moved[:] = moved
        zs = table[x]
        _screen(zs, rests, moved, bins, (losses[0][x], losses[1], losses[2]), total, worst)
        count = 0
        for y in range(n):
            bound = np.float64(worst[y]) - inflate * np.float64(total[y]) - x_slack[x] - y_slack[y]
            margins[x, y] = bound
            if not bound > x_run[x] + y_run[y]:
                failed[count] = y
                count += 1
        count = min(count, pairs_left)
        if not count:
            continue
        ys = failed[:count]
        _sharpen(ys, zs, whole, merged, x_sums[x], y_sums, spans, sharper)
        good = 0
        for i in range(count):
            y = ys[i]
            z = zs[y]
            loss = 0.0
            for b in range(len(rests)):
                loss += np.float64(rests[b, y]) * np.float64(losses[2][b, z])
            bound = np.float64(sharper[i]) - inflate * loss - x_slack[x] - y_slack[y]
            if bound > margins[x, y]:
                margins[x, y] = bound
                stages[x, y] = 2
            good += bound > x_run[x] + y_run[y]
        used += count
        pairs_left -= count
        if good < hopeless * count:
            pairs_left = 0
    return used
