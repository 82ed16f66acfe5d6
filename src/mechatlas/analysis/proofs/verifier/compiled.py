"""The loops of the verifier with those compiled that take its time.

The names and signatures are those of `reference.py`, which has the same functions in numpy and is
the one to read. Compiling takes seconds, once: what does not run for every pair is not compiled.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np

from mechatlas.analysis.proofs.verifier import reference, structures
from mechatlas.analysis.proofs.verifier.explanation import (
    NOT_TRIED,
    PATIENCE,
    WORTH_COMPARING,
)
from mechatlas.analysis.proofs.verifier.reference import (
    absolute_sums,
    additive_losses,
    class_minima,
    find_fault,
    float32_error_sums,
    grid_spans,
    ideal_margins,
    index_tables,
    merge_neurons,
    preserves_antipodes,
    residual_distances,
    unembedding_residual,
)
from mechatlas.analysis.proofs.verifier.structures import PairCounts
from mechatlas.maths import compilation

__all__ = [
    "absolute_sums", "additive_losses", "bound_pairs", "class_minima", "find_fault",
    "float32_error_sums", "grid_spans", "hidden_values", "ideal_margins", "index_tables",
    "judge_margins", "merge_neurons", "preserves_antipodes", "residual_distances",
    "unembedding_residual",
]  # fmt: skip

Loop = TypeVar("Loop", bound=Callable[..., Any])

STRUCTURES = [each for each in vars(structures).values() if hasattr(each, "_fields")]
"""Named tuples that loops take."""


def compiled(loop: Loop, *, inner: bool = True) -> Loop:
    """Compile a loop: sums in any order, multiplications fused into them.

    Args:
        loop: The loop.
        inner: Whether only compiled loops call it.
    """
    freedoms = {"contract", "reassoc"}
    return compilation.compiled(loop, fastmath=freedoms, structures=STRUCTURES, inner=inner)


def compiled_form(function: Loop) -> Callable[[Callable[..., Any]], Loop]:
    """Compile a loop that has the parameters, types and result of a function of `reference`."""
    return lambda loop: cast(Loop, compiled(loop, inner=False))


@compiled
def _interact(x, i, neurons, lookup, interaction, residuals):
    """Compute the interaction of all neurons at one x and every y, and the norms of D by block.

    `i` says which of the two x at work it is.
    """
    left, additive_x, right, additive_y, scale, offsets = neurons
    first, points, moves, tables, _ = lookup
    n, zero = right.shape[1], np.float32(0)
    for block in range(len(residuals)):
        squares = residuals[block]
        _fill(squares, zero)
        for j in range(offsets[block], offsets[block + 1]):
            a, b, s = left[x, j], additive_x[x, j], scale[j]
            row = first[j] + moves[x, points[j]]
            for y in range(n):
                t = a + right[j, y]
                value = (t if t > zero else zero) - b - additive_y[j, y]
                interaction[j, i, y] = value
                rest = value - s * tables[row, y]
                squares[y] += rest * rest
        _root(squares)


@compiled
def _fill(values, value):
    """Set all values to one."""
    for y in range(len(values)):
        values[y] = value


@compiled
def _root(values):
    """Replace each value by its square root."""
    for y in range(len(values)):
        values[y] = np.sqrt(values[y])


@compiled
def _squared_deviations(x, i, base, d, v, framed, rho, rest, squares):
    """Compute |V - rho(x) Vm rho(y)|^2 at every y; `framed` is rho(x) Vm."""
    _fill(squares, np.float32(0))
    for a in range(base, base + d * d, d):
        for b in range(d):
            whole, f, r = v[a + b, i], framed[a, x], rho[base + b]
            for y in range(len(rest)):
                rest[y] = whole[y] - f * r[y]
            e = 1
            while e + 1 < d:  # two at a time: each number is loaded and stored less often
                f, f2 = framed[a + e, x], framed[a + e + 1, x]
                r, r2 = rho[base + e * d + b], rho[base + (e + 1) * d + b]
                for y in range(len(rest)):
                    rest[y] -= f * r[y] + f2 * r2[y]
                e += 2
            if e < d:
                f, r = framed[a + e, x], rho[base + e * d + b]
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
    n = rho.shape[1]
    both = interaction.reshape((len(interaction), 2 * n))
    product = v.reshape((len(v), 2 * n))
    base = offset = np.int64(0)  # of a literal another form would be compiled
    for c in range(len(shapes)):
        d, start, k = shapes[c]
        stop = base + d * d
        m = coefficients[offset : offset + d * d * k].reshape((d * d, k))
        np.dot(m, both[start : start + k], product[base:stop])
        for i in range(2):
            if x + i < n:
                _squared_deviations(x + i, i, base, d, v, framed, rho, rest, deviations[i, c])
                _root(deviations[i, c])
        base = stop
        offset += d * d * k


@compiled
def _bound_first(x, zs, residuals, deviations, first, by_bin, total):
    """Compute the bound of the first stage at one x: the least `by_bin` less `total`."""
    gaps, norms = first.bins.gaps, first.bins.norms
    x_loss, y_loss, errors = first.losses.x[x], first.losses.y, first.residual
    for y in range(len(zs)):
        z = zs[y]
        total[y] = x_loss[z] + y_loss[y, z]
    for b in range(len(residuals)):
        rest, error = residuals[b], errors[b]
        for y in range(len(zs)):
            total[y] += rest[y] * error[zs[y]]
    for k in range(len(gaps)):
        value = by_bin[k]
        _fill(value, gaps[k])
        for c in range(len(deviations)):
            part, norm = deviations[c], norms[k, c]
            for y in range(len(zs)):
                value[y] -= part[y] * norm


@compiled
def _frame(x, i, base, d, v, rho, framed):
    """Compute rho(x)^T V rho(y)^T of a circuit at every y."""
    n = rho.shape[1]
    turn, own, half = (
        np.empty((d, d), np.float32), np.empty((d, d * n), np.float32),
        np.empty((d, d * n), np.float32),
    )  # fmt: skip
    for a in range(d):
        for b in range(d):
            turn[a, b] = rho[base + b * d + a, x]
            source, target = v[base + a * d + b, i], own[a, b * n : (b + 1) * n]
            for y in range(n):
                target[y] = source[y]
    np.dot(turn, own, half)
    for a in range(d):
        for b in range(d):
            target = framed[base + a * d + b]
            _fill(target, np.float32(0))
            for f in range(d):
                source, factor = half[a, f * n : (f + 1) * n], rho[base + b * d + f]
                for y in range(n):
                    target[y] += source[y] * factor[y]


@compiled
def _compare_bins(x, i, by_bin, lost, allowed, v, circuits, first):
    """Compute margins exactly over bins that do not certify all y."""
    n, offsets, slack, n_elements = len(lost), first.bins.offsets, first.slack, 0
    framed, base = np.empty((len(circuits.rho), n), np.float32), np.int64(0)
    for c in range(len(circuits.shapes)):
        d = circuits.shapes[c, 0]
        _frame(x, i, base, d, v, circuits.rho, framed)
        base += d * d
    for k in range(len(by_bin)):
        n_open, value = 0, by_bin[k]
        for y in range(n):
            n_open += not value[y] > lost[y] + allowed[y]
        if n_open:
            start, stop = offsets[k], offsets[k + 1]
            n_elements += stop - start
            margins = np.empty((stop - start, n), np.float32)
            np.dot(first.differences[start:stop], framed, margins)
            least = margins[0]
            for j in range(1, len(margins)):
                other = margins[j]
                for y in range(n):
                    least[y] = other[y] if other[y] < least[y] else least[y]
            for y in range(n):
                exact = least[y] - np.float32(first.frame_slack * (slack.x[x] + slack.y[y]))
                value[y] = exact if exact > value[y] else value[y]
    return n_elements


@compiled
def _settle(by_bin, lost, allowed, worst, margins, failed):
    """Take the worst bin less what is lost as margins, and find the pairs that are left."""
    _fill(worst, np.float32(np.inf))
    for k in range(len(by_bin)):
        value = by_bin[k]
        for y in range(len(worst)):
            worst[y] = value[y] if value[y] < worst[y] else worst[y]
    count = 0
    for y in range(len(worst)):
        margins[y] = np.float64(worst[y]) - lost[y]
        if not margins[y] > allowed[y]:
            failed[count] = y
            count += 1
    return count


@compiled
def _largest(values, maxima):
    """Find the largest value by `maxima` of every 16th one, which the compiler vectorizes."""
    n = len(values)
    _fill(maxima, np.float32(-np.inf))
    for start in range(0, n - 15, 16):
        part = values[start : start + 16]
        for c in range(16):
            maxima[c] = part[c] if part[c] > maxima[c] else maxima[c]
    for c in range(8):  # by halves: one after the other takes longer than all before
        maxima[c] = maxima[c + 8] if maxima[c + 8] > maxima[c] else maxima[c]
    for c in range(4):
        maxima[c] = maxima[c + 4] if maxima[c + 4] > maxima[c] else maxima[c]
    best = maxima[0]
    for c in range(1, 4):
        best = maxima[c] if maxima[c] > best else best
    for c in range(n - n % 16, n):
        best = values[c] if values[c] > best else best
    return best


@compiled
def _bound_second(x, ys, zs, v, i, second, room, value, out):
    """Compute the right logit less the largest other one, from V itself, at one x and some y.

    Every other logit gets the most that the cells of grids could give it.
    """
    signs, to, rho = second.rho
    x_sum, y_sums, spans = second.sums.x[x], second.sums.y, second.spans
    n, count = rho.shape[1], len(ys)
    size = len(rho) * count
    summed = room[0][:size].reshape((len(rho), count))
    logits = room[1][:count]
    _fill(room[0][:size], np.float32(0))
    for r in range(len(signs)):
        source, sign, total = v[r, i], signs[r], summed[to[r]]
        for j in range(count):
            total[j] += sign * source[ys[j]]
    np.dot(summed.T, rho, logits)
    maxima = np.empty(16, np.float32)
    for j in range(count):
        y = ys[j]
        z = zs[y]
        y_sum, logit, span = y_sums[y], logits[j], spans[z]
        right = logit[z] + x_sum[z] + y_sum[z]
        for w in range(n):
            value[w] = logit[w] + x_sum[w] + y_sum[w] + span[w]
        value[z] = -np.inf
        out[j] = right - _largest(value, maxima)


@compiled_form(reference.bound_pairs)
def bound_pairs(table, neurons, lookup, circuits, first, second, out):
    """Compiled form of `reference.bound_pairs`."""
    margins, stages, sample_residuals, sample_deviations = out
    slack, error, inflate = first.slack, first.float32_error, first.inflate
    pairs_left, give_up_share = second.max_pairs, second.give_up_share
    k, n = neurons.right.shape
    interaction = np.zeros((k, 2, n), np.float32)
    residuals = np.empty((2, len(sample_residuals), n), np.float32)
    deviations = np.empty((2, len(sample_deviations), n), np.float32)
    v, failed = np.empty((len(circuits.rho), 2, n), np.float32), np.empty(n, np.int64)
    room = (np.empty(n * len(second.rho.rows), np.float32), np.empty((n, n), np.float32))
    lines = np.empty((4, n), np.float32)
    rest, total, worst, sharper = lines[0], lines[1], lines[2], lines[3]
    lost, allowed = np.empty(n), np.empty(n)
    by_bin = np.empty((len(first.bins.gaps), n), np.float32)
    used = open_pairs = framed = compared = poor = 0
    failures = 2 + n // PATIENCE
    for x in range(n):
        i = x % 2
        if not i:
            for j in range(2):  # two together, for the product of matrices
                if x + j < n:
                    _interact(x + j, j, neurons, lookup, interaction, residuals[j])
            _add_circuits(x, circuits, interaction, rest, v, deviations)
        if x == 0:
            _copy(residuals[0], sample_residuals)
            _copy(deviations[0], sample_deviations)
        zs = table[x]
        _bound_first(x, zs, residuals[i], deviations[i], first, by_bin, total)
        for y in range(n):
            lost[y] = inflate * np.float64(total[y]) + slack.x[x] + slack.y[y]
            allowed[y] = error.x[x] + error.y[y]
        count = _settle(by_bin, lost, allowed, worst, margins[x], failed)
        if count and poor <= n // (4 * PATIENCE):
            compared += _compare_bins(x, i, by_bin, lost, allowed, v, circuits, first)
            before, count = count, _settle(by_bin, lost, allowed, worst, margins[x], failed)
            framed, poor = framed + 1, poor + (count > (1 - WORTH_COMPARING) * before)
        open_pairs += count
        if x >= n // 8 and not pairs_left and open_pairs > (1 - give_up_share / 5) * (x + 1) * n:
            margins[x + 1 :] = NOT_TRIED
            return PairCounts(used, open_pairs + (n - x - 1) * n, x + 1, framed, compared)
        count = count if count < pairs_left else pairs_left
        if not count:
            continue
        ys = failed[:count]
        _bound_second(x, ys, zs, v, i, second, room, rest, sharper)
        good = 0
        for j in range(count):
            y = ys[j]
            loss = _residual_loss(residuals[i], first.residual, y, zs[y])
            bound = np.float64(sharper[j]) - inflate * loss - slack.x[x] - slack.y[y]
            if bound > margins[x, y]:
                margins[x, y] = bound
                stages[x, y] = 2
            good += bound > allowed[y]
        used, open_pairs, pairs_left = used + count, open_pairs - good, pairs_left - count
        failures -= good < give_up_share * count
        if failures < 0:
            pairs_left = 0
    return PairCounts(used, open_pairs, n, framed, compared)


@compiled
def _copy(source, target):
    """Copy a matrix. Assigning it compiles the words of an error as well, for five seconds."""
    for b in range(len(target)):
        for y in range(target.shape[1]):
            target[b, y] = source[b, y]


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
