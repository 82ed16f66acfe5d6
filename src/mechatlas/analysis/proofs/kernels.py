"""The compiled inner loops of the verifier, for CPUs.

    bound_pairs  weights and explanation -> a lower bound on the margin of each pair
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


@compiled
def _interact(x, start, stop, neurons, lookup, kept, squares):
    """Neurons start to stop at x and x + 1: their values at every y, and the squared rests.

    Two x together, since the weights come from afar; the second is a dummy at the end.
    """
    left, row, right, column, scale = neurons
    first, points, moves, tables = lookup
    n = right.shape[1]
    one, two, zero = squares[0], squares[1], np.float32(0)
    one[:] = 0
    two[:] = 0
    x2 = min(x + 1, n - 1)
    # Slices, because the compiler vectorises loops over whole arrays alone.
    for j in range(start, stop):
        a, a2, r = left[x, j], left[x2, j], right[j]
        value, value2 = kept[j, :n], kept[j, n:]
        for y in range(n):
            t, t2 = a + r[y], a2 + r[y]
            value[y] = t if t > zero else zero
            value2[y] = t2 if t2 > zero else zero
        s, c, base, point, a, a2 = scale[j], column[j], first[j], points[j], row[x, j], row[x2, j]
        table, table2 = tables[base + moves[x, point]], tables[base + moves[x2, point]]
        for y in range(n):
            rest = value[y] - a - c[y] - s * table[y]
            one[y] += rest * rest
        for y in range(n):
            rest = value2[y] - a2 - c[y] - s * table2[y]
            two[y] += rest * rest
    _root(one)
    _root(two)


@compiled
def _root(values):
    for y in range(len(values)):
        values[y] = np.sqrt(values[y])


@compiled
def _compare(part, framed, rho, d, rest, squares):
    """The squared entries of part - framed rho(y)."""
    squares[:] = 0
    for a in range(d):
        for b in range(d):
            whole, f, r = part[a * d + b], framed[a * d], rho[b]
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
def _explain(x, circuits, kept, both, rest, whole, moved):
    """The matrices V at x and x + 1, and how far they are from the mean in their frames."""
    shapes, flat, of_x, of_y, framed, rho = circuits
    n = kept.shape[1] // 2
    base = offset = 0
    for c in range(len(shapes)):
        d, start, k = shapes[c]
        weights = flat[offset : offset + d * d * k].reshape((d * d, k))
        np.dot(weights, kept[start : start + k], both[: d * d])
        for i in range(2):
            part, its_x = whole[i, base : base + d * d], min(x + i, n - 1)
            for r in range(d * d):
                to, source = part[r], both[r, i * n : i * n + n]
                row, column = of_x[its_x, base + r], of_y[base + r]
                for y in range(n):
                    to[y] = source[y] - row - column[y]
            its_frame = framed[base : base + d * d, its_x]
            _compare(part, its_frame, rho[base : base + d * d], d, rest, moved[i, c])
            _root(moved[i, c])
        base += d * d
        offset += d * d * k


@compiled
def _screen(zs, rests, i, moved, bins, losses, total, worst):
    """The first bound at one x, the i-th of two: total is what to take from worst."""
    gaps, norms = bins
    x_loss, y_loss, errors = losses
    for y in range(len(zs)):
        z = zs[y]
        total[y] = x_loss[z] + y_loss[y, z]
    for b in range(len(rests)):
        rest, error = rests[b, i], errors[b]
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
def _sharpen(ys, zs, whole, merged, x_sum, y_sums, spans, out):
    """Right logit less the largest other one, where each other one gets all it could."""
    signs, to, rho = merged
    n = rho.shape[1]
    v = np.zeros((len(ys), len(rho)), np.float32)
    for r in range(len(signs)):
        source, sign, g = whole[r], signs[r], to[r]
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


@compiled
def bound_pairs(table, neurons, blocks, lookup, circuits, bins, losses, slack, second, out):
    """Lower bounds on the margins of all pairs, by the first stage and the second.

    Returns how many pairs the second stage took, and how many are left.
    """
    merged, x_sums, y_sums, spans, pairs_left, hopeless = second
    x_slack, y_slack, x_run, y_run, inflate = slack
    margins, stages, sample_rests, sample_moved = out
    k, n = neurons[2].shape
    kept = np.empty((k, 2 * n), np.float32)
    rests = np.empty((len(blocks) - 1, 2, n), np.float32)
    moved = np.empty((2, len(circuits[0]), n), np.float32)
    whole = np.empty((2, len(circuits[-1]), n), np.float32)
    both = np.empty((len(circuits[-1]), 2 * n), np.float32)
    rest, total, worst = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.float32)
    failed, sharper = np.empty(n, np.int64), np.empty(n, np.float32)
    used = open_pairs = 0
    for x in range(n):
        i = x % 2
        if not i:
            for b in range(len(blocks) - 1):
                _interact(x, blocks[b], blocks[b + 1], neurons, lookup, kept, rests[b])
            _explain(x, circuits, kept, both, rest, whole, moved)
        if x == 0:
            sample_rests[:] = rests[:, 0]
            sample_moved[:] = moved[0]
        zs = table[x]
        its_losses = (losses[0][x], losses[1], losses[2])
        _screen(zs, rests, i, moved[i], bins, its_losses, total, worst)
        count = 0
        for y in range(n):
            bound = np.float64(worst[y]) - inflate * np.float64(total[y]) - x_slack[x] - y_slack[y]
            margins[x, y] = bound
            if not bound > x_run[x] + y_run[y]:
                failed[count] = y
                count += 1
        open_pairs += count
        count = min(count, pairs_left)
        if not count:
            continue
        ys = failed[:count]
        _sharpen(ys, zs, whole[i], merged, x_sums[x], y_sums, spans, sharper)
        good = 0
        for j in range(count):
            y = ys[j]
            z = zs[y]
            loss = 0.0
            for b in range(len(rests)):
                loss += np.float64(rests[b, i, y]) * np.float64(losses[2][b, z])
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
    return used, open_pairs


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
    "bound_pairs", "class_bins", "farthest", "find_fault", "frame", "judge", "keeps_opposite",
    "look_up", "lose", "project", "reduce", "span", "weigh", "weigh_run",
]  # fmt: skip
