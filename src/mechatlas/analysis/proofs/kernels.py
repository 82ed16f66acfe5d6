"""The compiled inner loops of the verifier, for CPUs.

    bound_pairs  weights and explanation -> a lower bound on the margin of each pair
    activate     weights -> the hidden values of some pairs
    judge        logits of some pairs -> which are right, which are wrong and which are near

What does not depend on the pair is prepared by `compiled.py`, whose functions are offered here
as well. `plain.py` has the same functions in numpy.
"""

import numpy as np

from mechatlas.analysis.proofs.compiled import (
    class_bins,
    compiled,
    farthest,
    find_fault,
    frame,
    keeps_opposite,
    look_up,
    lose,
    project,
    reduce,
    span,
    weigh,
    weigh_run,
)
from mechatlas.analysis.proofs.explanation import NOT_TRIED


@compiled
def _interact(x, at, neurons, blocks, lookup, kept, rests):
    """The interaction of all neurons at one x and every y, and the size of their rests.

    What is kept begins at column `at`. Loops are short and over slices, because the compiler
    vectorises those over few whole arrays alone.
    """
    left, row, right, column, _ = neurons
    n, zero = right.shape[1], np.float32(0)
    for j in range(len(right)):
        a, b, value, r, c = left[x, j], row[x, j], kept[j, at : at + n], right[j], column[j]
        for y in range(n):
            t = a + r[y]
            value[y] = (t if t > zero else zero) - b - c[y]
    for b in range(len(blocks) - 1):
        _add_squares(x, at, blocks[b], blocks[b + 1], neurons[4], lookup, kept, rests[b])


@compiled
def _add_squares(x, at, start, stop, scale, lookup, kept, squares):
    """The root of the sum of squares of what tables do not explain, at every y."""
    first, points, moves, tables = lookup
    j, to = start, at + len(squares)
    squares[:] = 0
    while j + 1 < stop:  # two at a time: each sum is loaded and stored less often
        value, value2, s, s2 = kept[j, at:to], kept[j + 1, at:to], scale[j], scale[j + 1]
        table = tables[first[j] + moves[x, points[j]]]
        table2 = tables[first[j + 1] + moves[x, points[j + 1]]]
        for y in range(len(squares)):
            rest, rest2 = value[y] - s * table[y], value2[y] - s2 * table2[y]
            squares[y] += rest * rest + rest2 * rest2
        j += 2
    if j < stop:
        value, s, table = kept[j, at:to], scale[j], tables[first[j] + moves[x, points[j]]]
        for y in range(len(squares)):
            rest = value[y] - s * table[y]
            squares[y] += rest * rest
    _root(squares)


@compiled
def _root(values):
    for y in range(len(values)):
        values[y] = np.sqrt(values[y])


@compiled
def _compare(part, at, framed, rho, d, rest, squares):
    """The squared entries of part - framed rho(y)."""
    squares[:] = 0
    for a in range(d):
        for b in range(d):
            whole, f, r = part[a * d + b, at : at + len(rest)], framed[a * d], rho[b]
            for y in range(len(rest)):
                rest[y] = whole[y] - f * r[y]
            e = 1
            while e + 1 < d:  # two at a time: each number is loaded and stored less often
                f, f2 = framed[a * d + e], framed[a * d + e + 1]
                r, r2 = rho[e * d + b], rho[(e + 1) * d + b]
                for y in range(len(rest)):
                    rest[y] -= f * r[y] + f2 * r2[y]
                e += 2
            if e < d:
                f, r = framed[a * d + e], rho[e * d + b]
                for y in range(len(rest)):
                    left = rest[y] - f * r[y]
                    squares[y] += left * left
            else:
                for y in range(len(rest)):
                    squares[y] += rest[y] * rest[y]


@compiled
def _explain(x, circuits, kept, rest, whole, moved):
    """The matrices V at x and x + 1, and how far they are from the mean in their frames."""
    shapes, flat, framed, rho = circuits
    n = kept.shape[1] // 2
    base = offset = 0
    for c in range(len(shapes)):
        d, start, k = shapes[c]
        stop = base + d * d
        weights = flat[offset : offset + d * d * k].reshape((d * d, k))
        np.dot(weights, kept[start : start + k], whole[base:stop])
        for i in range(2):
            its_frame = framed[base:stop, min(x + i, n - 1)]
            _compare(whole[base:stop], i * n, its_frame, rho[base:stop], d, rest, moved[i, c])
            _root(moved[i, c])
        base = stop
        offset += d * d * k


@compiled
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


@compiled
def _sharpen(ys, zs, whole, at, merged, x_sum, y_sums, spans, out):
    """Right logit less the largest other one, where each other one gets all it could."""
    signs, to, rho = merged
    n = rho.shape[1]
    v = np.zeros((len(ys), len(rho)), np.float32)
    for r in range(len(signs)):
        source, sign, g = whole[r], signs[r], to[r]
        for i in range(len(ys)):
            v[i, g] += sign * source[at + ys[i]]
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


@compiled
def bound_pairs(table, neurons, blocks, lookup, circuits, bins, losses, slack, second, out):
    """Lower bounds on the margins of all pairs, by the first stage and the second.

    Returns how many pairs the second stage took, how many are left, and how many x were tried:
    where an eighth of them is certified hardly anywhere, the others are not tried.
    """
    merged, x_sums, y_sums, spans, pairs_left, hopeless = second
    x_slack, y_slack, x_run, y_run, inflate = slack
    margins, stages, sample_rests, sample_moved = out
    k, n = neurons[2].shape
    kept = np.zeros((k, 2 * n), np.float32)
    rests = np.empty((2, len(blocks) - 1, n), np.float32)
    moved = np.empty((2, len(circuits[0]), n), np.float32)
    whole = np.empty((len(circuits[-1]), 2 * n), np.float32)
    rest, total, worst = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.float32)
    failed, sharper = np.empty(n, np.int64), np.empty(n, np.float32)
    used = open_pairs = 0
    for x in range(n):
        i = x % 2
        if not i:
            for j in range(min(2, n - x)):  # two together, for the product of matrices
                _interact(x + j, j * n, neurons, blocks, lookup, kept, rests[j])
            _explain(x, circuits, kept, rest, whole, moved)
        if x == 0:
            sample_rests[:] = rests[0]
            sample_moved[:] = moved[0]
        zs = table[x]
        its_losses = (losses[0][x], losses[1], losses[2])
        _screen(zs, rests[i], moved[i], bins, its_losses, total, worst)
        count = 0
        for y in range(n):
            bound = np.float64(worst[y]) - inflate * np.float64(total[y]) - x_slack[x] - y_slack[y]
            margins[x, y] = bound
            if not bound > x_run[x] + y_run[y]:
                failed[count] = y
                count += 1
        open_pairs += count
        if x == n // 8 and not pairs_left and open_pairs > (1 - hopeless / 5) * (x + 1) * n:
            margins[x + 1 :] = NOT_TRIED
            return used, open_pairs + (n - x - 1) * n, x + 1
        count = min(count, pairs_left)
        if not count:
            continue
        ys = failed[:count]
        _sharpen(ys, zs, whole, i * n, merged, x_sums[x], y_sums, spans, sharper)
        good = 0
        for j in range(count):
            y = ys[j]
            z = zs[y]
            loss = 0.0
            for b in range(len(losses[2])):
                loss += np.float64(rests[i, b, y]) * np.float64(losses[2][b, z])
            bound = np.float64(sharper[j]) - inflate * loss - x_slack[x] - y_slack[y]
            if bound > margins[x, y]:
                margins[x, y] = bound
                stages[x, y] = 2
            good += bound > x_run[x] + y_run[y]
        used += count
        open_pairs -= good
        pairs_left -= count
        if good < hopeless * count:
            pairs_left = 0
    return used, open_pairs, n


@compiled
def activate(left, right, xs, ys, out):
    """relu(left[x] + right[y]) of some pairs, a row for each."""
    zero = np.float32(0)
    for i in range(len(xs)):
        first, second, to = left[xs[i]], right[ys[i]], out[i]
        for j in range(len(to)):
            t = first[j] + second[j]
            to[j] = t if t > zero else zero


@compiled
def judge(logits, answers, bounds, out):
    """1 where the right logit is the largest by more than a bound, 0 where another one is.

    2 where neither is sure. The right logits are overwritten.
    """
    n = logits.shape[1]
    maxima = np.empty(16, np.float32)
    for i in range(len(answers)):
        line, z = logits[i], answers[i]
        right = line[z]
        line[z] = -np.inf
        maxima[:] = -np.inf
        for start in range(0, n - 15, 16):
            part = line[start : start + 16]
            for c in range(16):
                maxima[c] = part[c] if part[c] > maxima[c] else maxima[c]
        best = maxima[0]
        for c in range(1, 16):
            best = max(best, maxima[c])
        for c in range(n - n % 16, n):
            best = max(best, line[c])
        margin = right - best
        out[i] = 1 if margin > bounds[i] else (0 if margin < -bounds[i] else 2)


__all__ = [
    "activate", "bound_pairs", "class_bins", "farthest", "find_fault", "frame", "judge",
    "keeps_opposite", "look_up", "lose", "project", "reduce", "span", "weigh", "weigh_run",
]  # fmt: skip
