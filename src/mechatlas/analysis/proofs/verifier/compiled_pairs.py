"""Compiled loops over pairs.

`reference.py` has the same functions in numpy, and is the one to read.
"""

import numpy as np

from mechatlas.analysis.proofs.verifier import reference
from mechatlas.analysis.proofs.verifier.compiled_checks import compiled, compiled_form
from mechatlas.analysis.proofs.verifier.explanation import NOT_TRIED, PATIENCE
from mechatlas.analysis.proofs.verifier.structures import PairCounts


@compiled
def _interact(x, at, neurons, lookup, interaction, residuals):
    """Compute the interaction of all neurons at one x and every y, and the norms of D by block.

    The interaction is written from column `at` on. Loops are short and over slices, because the
    compiler vectorizes only loops over a few whole arrays.
    """
    left, additive_x, right, additive_y, scale, offsets = neurons
    n, zero = right.shape[1], np.float32(0)
    for j in range(len(right)):
        a, b, r, c = left[x, j], additive_x[x, j], right[j], additive_y[j]
        value = interaction[j, at : at + n]
        for y in range(n):
            t = a + r[y]
            value[y] = (t if t > zero else zero) - b - c[y]
    for b in range(len(offsets) - 1):
        block = (offsets[b], offsets[b + 1])
        _residual_norms(x, at, block, scale, lookup, interaction, residuals[b])


@compiled
def _residual_norms(x, at, block, scale, lookup, interaction, squares):
    """Compute the norm of I - s T over a block of neurons, at every y."""
    first, points, moves, tables, _ = lookup
    j, stop = block
    to = at + len(squares)
    squares[:] = 0
    while j + 1 < stop:  # two at a time: each sum is loaded and stored less often
        value, value2 = interaction[j, at:to], interaction[j + 1, at:to]
        s, s2 = scale[j], scale[j + 1]
        table = tables[first[j] + moves[x, points[j]]]
        table2 = tables[first[j + 1] + moves[x, points[j + 1]]]
        for y in range(len(squares)):
            rest, rest2 = value[y] - s * table[y], value2[y] - s2 * table2[y]
            squares[y] += rest * rest + rest2 * rest2
        j += 2
    if j < stop:
        value, s = interaction[j, at:to], scale[j]
        table = tables[first[j] + moves[x, points[j]]]
        for y in range(len(squares)):
            rest = value[y] - s * table[y]
            squares[y] += rest * rest
    _root(squares)


@compiled
def _root(values):
    """Replace each value by its square root."""
    for y in range(len(values)):
        values[y] = np.sqrt(values[y])


@compiled
def _squared_deviations(v, at, framed, rho, d, rest, squares):
    """Compute |V - rho(x) Vm rho(y)|^2 at every y; `framed` is rho(x) Vm."""
    squares[:] = 0
    for a in range(d):
        for b in range(d):
            whole, f, r = v[a * d + b, at : at + len(rest)], framed[a * d], rho[b]
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
def _add_circuits(x, circuits, interaction, rest, v, deviations):
    """Compute the matrices V at x and x + 1, and their distances from rho(x) Vm rho(y)."""
    shapes, coefficients, framed, rho = circuits
    n = interaction.shape[1] // 2
    base = offset = 0
    for c in range(len(shapes)):
        d, start, k = shapes[c]
        stop = base + d * d
        m = coefficients[offset : offset + d * d * k].reshape((d * d, k))
        np.dot(m, interaction[start : start + k], v[base:stop])
        for i in range(2):
            framed_mean = framed[base:stop, min(x + i, n - 1)]
            to = deviations[i, c]
            _squared_deviations(v[base:stop], i * n, framed_mean, rho[base:stop], d, rest, to)
            _root(to)
        base = stop
        offset += d * d * k


@compiled
def _bound_first(x, zs, residuals, deviations, first, total, worst):
    """Compute the bound of the first stage at one x: `worst` less `total`."""
    gaps, norms = first.bins
    x_loss, y_loss, errors = first.losses.x[x], first.losses.y, first.residual
    for y in range(len(zs)):
        z = zs[y]
        total[y] = x_loss[z] + y_loss[y, z]
    for b in range(len(residuals)):
        rest, error = residuals[b], errors[b]
        for y in range(len(zs)):
            total[y] += rest[y] * error[zs[y]]
    worst[:] = np.inf
    value = np.empty(len(zs), np.float32)
    for k in range(len(gaps)):
        value[:] = gaps[k]
        for c in range(len(deviations)):
            part, norm = deviations[c], norms[k, c]
            for y in range(len(zs)):
                value[y] -= part[y] * norm
        for y in range(len(zs)):
            worst[y] = min(worst[y], value[y])


@compiled
def _largest(values, maxima):
    """Find the largest value by `maxima` of every 16th one, which the compiler vectorizes."""
    n = len(values)
    maxima[:] = -np.inf
    for start in range(0, n - 15, 16):
        part = values[start : start + 16]
        for c in range(16):
            maxima[c] = part[c] if part[c] > maxima[c] else maxima[c]
    best = maxima[0]
    for c in range(1, 16):
        best = max(best, maxima[c])
    for c in range(n - n % 16, n):
        best = max(best, values[c])
    return best


@compiled
def _bound_second(x, ys, zs, v, at, second, out):
    """Compute the right logit less the largest other one, from V itself, at one x and some y.

    Every other logit gets the most that the cells of grids could give it.
    """
    signs, to, rho = second.rho
    x_sum, y_sums, spans = second.sums.x[x], second.sums.y, second.spans
    n = rho.shape[1]
    summed = np.zeros((len(ys), len(rho)), np.float32)
    for r in range(len(signs)):
        source, sign, g = v[r], signs[r], to[r]
        for i in range(len(ys)):
            summed[i, g] += sign * source[at + ys[i]]
    logits = np.dot(summed, rho)
    value, maxima = np.empty(n, np.float32), np.empty(16, np.float32)
    for i in range(len(ys)):
        y = ys[i]
        z = zs[y]
        y_sum, logit, span = y_sums[y], logits[i], spans[z]
        for w in range(n):
            value[w] = logit[w] + x_sum[w] + y_sum[w] + span[w]
        right = value[z] - span[z]
        value[z] = -np.inf
        out[i] = right - _largest(value, maxima)


@compiled_form(reference.bound_pairs)
def bound_pairs(table, neurons, lookup, circuits, first, second, out):
    """Compiled form of `reference.bound_pairs`."""
    margins, stages, sample_residuals, sample_deviations = out
    slack, error, inflate = first.slack, first.float32_error, first.inflate
    pairs_left, give_up_share = second.max_pairs, second.give_up_share
    k, n = neurons.right.shape
    interaction = np.zeros((k, 2 * n), np.float32)
    residuals = np.empty((2, len(sample_residuals), n), np.float32)
    deviations = np.empty((2, len(sample_deviations), n), np.float32)
    v, failed = np.empty((len(circuits.rho), 2 * n), np.float32), np.empty(n, np.int64)
    lines = np.empty((4, n), np.float32)
    rest, total, worst, sharper = lines[0], lines[1], lines[2], lines[3]
    used = open_pairs = 0
    failures = 2 + n // PATIENCE
    for x in range(n):
        i = x % 2
        if not i:
            for j in range(min(2, n - x)):  # two together, for the product of matrices
                _interact(x + j, j * n, neurons, lookup, interaction, residuals[j])
            _add_circuits(x, circuits, interaction, rest, v, deviations)
        if x == 0:
            sample_residuals[:] = residuals[0]
            sample_deviations[:] = deviations[0]
        zs = table[x]
        _bound_first(x, zs, residuals[i], deviations[i], first, total, worst)
        count = 0
        for y in range(n):
            bound = np.float64(worst[y]) - inflate * np.float64(total[y]) - slack.x[x] - slack.y[y]
            margins[x, y] = bound
            if not bound > error.x[x] + error.y[y]:
                failed[count] = y
                count += 1
        open_pairs += count
        if x >= n // 8 and not pairs_left and open_pairs > (1 - give_up_share / 5) * (x + 1) * n:
            margins[x + 1 :] = NOT_TRIED
            return PairCounts(used, open_pairs + (n - x - 1) * n, x + 1)
        count = min(count, pairs_left)
        if not count:
            continue
        ys = failed[:count]
        _bound_second(x, ys, zs, v, i * n, second, sharper)
        good = 0
        for j in range(count):
            y = ys[j]
            loss = _residual_loss(residuals[i], first.residual, y, zs[y])
            bound = np.float64(sharper[j]) - inflate * loss - slack.x[x] - slack.y[y]
            if bound > margins[x, y]:
                margins[x, y] = bound
                stages[x, y] = 2
            good += bound > error.x[x] + error.y[y]
        used += count
        open_pairs -= good
        pairs_left -= count
        if good < give_up_share * count:
            failures -= 1
        if failures < 0:
            pairs_left = 0
    return PairCounts(used, open_pairs, n)


@compiled
def _residual_loss(norms, distances, y, z):
    """Sum the products of |D| and of the distances of e over blocks, in float64."""
    loss = 0.0
    for b in range(len(norms)):
        loss += np.float64(norms[b, y]) * np.float64(distances[b, z])
    return loss


@compiled_form(reference.hidden_values)
def hidden_values(left, right, xs, ys, out):
    """Compiled form of `reference.hidden_values`."""
    zero = np.float32(0)
    for i in range(len(xs)):
        first, second, to = left[xs[i]], right[ys[i]], out[i]
        for j in range(len(to)):
            t = first[j] + second[j]
            to[j] = t if t > zero else zero


@compiled_form(reference.judge_margins)
def judge_margins(logits, answers, bounds, out):
    """Compiled form of `reference.judge_margins`."""
    maxima = np.empty(16, np.float32)
    for i in range(len(answers)):
        line, z = logits[i], answers[i]
        right = line[z]
        line[z] = -np.inf
        margin = right - _largest(line, maxima)
        out[i] = 1 if margin > bounds[i] else (0 if margin < -bounds[i] else 2)
