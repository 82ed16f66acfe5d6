"""The loops of the verifier with those compiled that take its time.

The names and signatures are those of `reference.py`, which has the same functions in numpy and is
the one to read. Compiling takes seconds, once: what does not run for every pair is not compiled,
and memory is made in numpy, since each kind of array that a loop makes is compiled as well.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float, Float32, Int

from mechatlas.analysis.proofs.verifier import reference, structures
from mechatlas.analysis.proofs.verifier.explanation import (
    NOT_TRIED,
    PAIRS,
    PATIENCE,
    WORTH_COMPARING,
)
from mechatlas.analysis.proofs.verifier.structures import PairCounts
from mechatlas.maths import compilation

__all__ = [
    "add_distances", "bound_pairs", "hidden_values", "index_tables", "judge_margins",
    "merge_neurons", "sum_cells",
]  # fmt: skip

Loop = TypeVar("Loop", bound=Callable[..., Any])


class Room(NamedTuple):
    """Memory for the loop over pairs, for the elements x that are worked on together."""

    interaction: Float32[np.ndarray, "neuron x y"]
    """I_i."""
    residuals: Float32[np.ndarray, "block x y"]
    """Norm of D of each block."""
    v: Float32[np.ndarray, "entry x y"]
    """V."""
    deviations: Float32[np.ndarray, "circuit x y"]
    """Norm of V - rho(x) Vm rho(y) of each circuit."""
    lines: Float32[np.ndarray, "3 y"]
    """Values at one x."""
    lost: Float[np.ndarray, "x y"]
    """All that is taken off a margin."""
    pairs: Int[np.ndarray, "3 pair"]
    """x, y and z of the pairs that are left."""
    needed: Float[np.ndarray, " pair"]
    """Margin before losses that certifies such a pair."""
    worst: Float32[np.ndarray, " pair"]
    """Margin before losses of such a pair."""
    flat: Float32[np.ndarray, " number"]
    """Numbers for what is multiplied as matrices."""
    framed: Float32[np.ndarray, "entry x y"]
    """V in the frame of x and y."""
    at: Int[np.ndarray, " pair"]
    """Place of a pair that is left among all."""


STRUCTURES = [Room, *(each for each in vars(structures).values() if hasattr(each, "_fields"))]
"""Named tuples that loops take."""


def compiled(loop: Loop, *, inner: bool = True) -> Loop:
    """Compile a loop: sums in any order, multiplications fused into them.

    Args:
        loop: The loop.
        inner: Whether only compiled loops call it.
    """
    freedoms = {"contract", "reassoc"}
    return compilation.compiled(loop, fastmath=freedoms, structures=STRUCTURES, inner=inner)


entry = functools.partial(compiled, inner=False)
merge_neurons, index_tables, sum_cells = map(
    entry, (reference.merge_neurons, reference.index_tables, reference.sum_cells)
)


@compiled
def _matrix(flat, rows, columns):
    """Take a matrix from the first of some numbers."""
    return flat[: rows * columns].reshape((rows, columns))


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
def _interact(x, i, neurons, lookup, interaction, residuals):
    """Compute the interaction of all neurons at one x and every y, and the norms of D by block.

    `i` is the place of x among those at work.
    """
    left, additive_x, right, additive_y, scale, offsets = neurons
    first, points, moves, tables, _ = lookup
    n, zero = right.shape[1], np.float32(0)
    for block in range(len(residuals)):
        squares = residuals[block, i]
        _fill(squares, zero)
        for j in range(offsets[block], offsets[block + 1]):
            a, b, s = left[j, x], additive_x[x, j], scale[j]
            row, to = tables[first[j] + moves[x, points[j]]], interaction[j, i]
            own, part = right[j], additive_y[j]
            for y in range(n):
                t = a + own[y]
                value = (t if t > zero else zero) - b - part[y]
                to[y] = value
                rest = value - s * row[y]
                squares[y] += rest * rest
        _root(squares)


@compiled
def _squared_deviations(x, i, base, d, v, means, rho, framed, rest, squares):
    """Compute |V - rho(x) Vm rho(y)|^2 at every y."""
    n = len(rest)
    _fill(squares, np.float32(0))
    for a in range(base, base + d * d, d):
        for e in range(d):
            framed[e] = 0
            for f in range(d):
                framed[e] += rho[a + f, x] * means[base + f * d + e]
        for b in range(d):
            whole, f, r = v[a + b, i], framed[0], rho[base + b]
            for y in range(n):
                rest[y] = whole[y] - f * r[y]
            e = 1
            while e + 1 < d:  # two at a time: each number is loaded and stored less often
                f, f2 = framed[e], framed[e + 1]
                r, r2 = rho[base + e * d + b], rho[base + (e + 1) * d + b]
                for y in range(n):
                    rest[y] -= f * r[y] + f2 * r2[y]
                e += 2
            if e < d:
                f, r = framed[e], rho[base + e * d + b]
                for y in range(n):
                    left = rest[y] - f * r[y]
                    squares[y] += left * left
            else:
                for y in range(n):
                    squares[y] += rest[y] * rest[y]


@compiled
def _add_circuits(start, count, circuits, room):
    """Compute the matrices V at some x, and their distances from rho(x) Vm rho(y)."""
    shapes, coefficients, means, rho = circuits
    interaction, _, v, deviations, lines, _, _, _, _, flat, _, _ = room
    pairs = v.shape[1] * v.shape[2]
    whole, product = interaction.reshape((len(interaction), pairs)), v.reshape((len(v), pairs))
    base = np.int64(0)  # of a literal another form would be compiled
    for c in range(len(shapes)):
        d, begin, k = shapes[c]
        stop = base + d * d
        m = _matrix(flat, d * d, k)
        for r in range(d * d):
            for j in range(k):
                m[r, j] = coefficients[base + r, begin + j]
        np.dot(m, whole[begin : begin + k], product[base:stop])
        for i in range(count):
            squares = deviations[c, i]
            _squared_deviations(start + i, i, base, d, v, means, rho, flat, lines[0], squares)
            _root(squares)
        base = stop


@compiled
def _bound_first(x, i, zs, first, room, margins, count):
    """Bound the margins at one x by the first stage, and add those that are left to `room.pairs`.

    `count` is the number of such pairs so far.
    """
    gaps, norms, residuals, deviations = (
        first.bins.gaps, first.bins.norms, room.residuals, room.deviations
    )  # fmt: skip
    value, total, worst, lost = room.lines[0], room.lines[1], room.lines[2], room.lost[i]
    x_loss, y_loss, errors, slack = first.losses.x[x], first.losses.y, first.residual, first.slack
    for y in range(len(zs)):
        z = zs[y]
        total[y] = x_loss[z] + y_loss[y, z]
    for b in range(len(residuals)):
        rest, error = residuals[b, i], errors[b]
        for y in range(len(zs)):
            total[y] += rest[y] * error[zs[y]]
    for y in range(len(zs)):
        lost[y] = first.inflate * np.float64(total[y]) + slack.x[x] + slack.y[y]
    _fill(worst, np.float32(np.inf))
    for k in range(len(gaps)):
        _fill(value, gaps[k])
        for c in range(len(deviations)):
            part, norm = deviations[c, i], norms[k, c]
            for y in range(len(value)):
                value[y] -= part[y] * norm
        for y in range(len(value)):
            worst[y] = value[y] if value[y] < worst[y] else worst[y]
    for y in range(len(zs)):
        allowed = first.float32_error.x[x] + first.float32_error.y[y]
        margins[y] = np.float64(worst[y]) - lost[y]
        if not margins[y] > allowed:
            room.pairs[0, count], room.pairs[1, count] = x, y
            room.needed[count] = lost[y] + allowed
            count += 1
    return count


@compiled
def _frame(x, i, base, d, v, rho, framed, flat):
    """Compute rho(x)^T V rho(y)^T of a circuit at every y."""
    n = v.shape[2]
    turn, size = _matrix(flat, d, d), d * d
    own, half = _matrix(flat[size:], d, d * n), _matrix(flat[size + size * n :], d, d * n)
    for a in range(d):
        for b in range(d):
            turn[a, b] = rho[base + b * d + a, x]
            source, target = v[base + a * d + b, i], own[a, b * n : (b + 1) * n]
            for y in range(n):
                target[y] = source[y]
    np.dot(turn, own, half)
    for a in range(d):
        for b in range(d):
            target, source, factor = framed[base + a * d + b, i], half[a, :n], rho[base + b * d]
            for y in range(n):
                target[y] = source[y] * factor[y]
            for f in range(1, d):
                source, factor = half[a, f * n : (f + 1) * n], rho[base + b * d + f]
                for y in range(n):
                    target[y] += source[y] * factor[y]


@compiled
def _compare_bins(start, count, circuits, first, room):
    """Compute margins exactly over the bins that do not certify a pair, and count them."""
    gaps, norms, _, offsets = first.bins
    _, _, v, deviations, _, _, pairs, needed, worst, flat, framed, _ = room
    xs, ys, chosen, slack = pairs[0, :count], pairs[1, :count], pairs[2, :count], first.slack
    compared, columns = 0, framed.shape[1] * framed.shape[2]
    whole, at = framed.reshape((len(v), columns)), room.at[:count]
    for p in range(count):
        at[p] = (xs[p] - start) * framed.shape[2] + ys[p]
        if p == 0 or xs[p] != xs[p - 1]:
            base = np.int64(0)
            for c in range(len(deviations)):
                d = circuits.shapes[c, 0]
                _frame(xs[p], xs[p] - start, base, d, v, circuits.rho, framed, flat)
                base += d * d
    parts, rest = _matrix(flat, len(deviations) + 1, count), flat[(len(deviations) + 1) * count :]
    value = parts[len(deviations)]
    for c in range(len(deviations)):
        for p in range(count):
            parts[c, p] = deviations[c, xs[p] - start, ys[p]]
    _fill(worst[:count], np.float32(np.inf))
    for k in range(len(gaps)):
        _fill(value, gaps[k])
        for c in range(len(deviations)):
            part, norm = parts[c], norms[k, c]
            for p in range(count):
                value[p] -= part[p] * norm
        n_open = 0
        for p in range(count):
            if not value[p] > needed[p]:
                chosen[n_open] = p
                n_open += 1
        if n_open:
            elements = first.differences[offsets[k] : offsets[k + 1]]
            is_most = 2 * n_open > columns  # then picking them out takes longer than all
            own = whole if is_most else _matrix(rest, len(v), n_open)
            margins = _matrix(rest[len(v) * n_open :], len(elements), own.shape[1])
            if not is_most:
                for r in range(len(v)):
                    for q in range(n_open):
                        own[r, q] = whole[r, at[chosen[q]]]
            np.dot(elements, own, margins)
            least, compared = margins[0], compared + len(margins) * n_open
            for j in range(1, len(margins)):
                other = margins[j]
                for q in range(len(least)):
                    least[q] = other[q] if other[q] < least[q] else least[q]
            for q in range(n_open):
                p = chosen[q]
                rounding = first.frame_slack * (slack.x[xs[p]] + slack.y[ys[p]])
                exact = least[at[p] if is_most else q] - np.float32(rounding)
                value[p] = exact if exact > value[p] else value[p]
        for p in range(count):
            worst[p] = value[p] if value[p] < worst[p] else worst[p]
    return compared


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
def _bound_second(start, begin, end, second, room):
    """Compute the right logit less the largest other one, from V itself, for some pairs.

    Every other logit gets the most that the cells of grids could give it.
    """
    signs, to, rho = second.rho
    pairs, sharper, v = room.pairs[:, begin:end], room.worst[begin:end], room.v
    xs, ys, zs, count = pairs[0], pairs[1], pairs[2], end - begin
    summed = _matrix(room.flat, len(rho), count)
    logits = _matrix(room.flat[len(rho) * count :], count, rho.shape[1])
    for r in range(len(summed)):
        _fill(summed[r], np.float32(0))
    x = xs[0] - start
    is_row = count == len(second.sums[0]) and xs[0] == xs[count - 1]  # all y of one x
    for r in range(len(signs)):
        sign, total, row = signs[r], summed[to[r]], v[r, x]
        if is_row:
            for p in range(count):
                total[p] += sign * row[p]
        else:
            for p in range(count):
                total[p] += sign * v[r, xs[p] - start, ys[p]]
    np.dot(summed.T, rho, logits)
    maxima = room.lines[0, :16]
    for p in range(count):
        z, logit, span = zs[p], logits[p], second.spans[zs[p]]
        x_sum, y_sum = second.sums[0, xs[p]], second.sums[1, ys[p]]
        right = logit[z] + x_sum[z] + y_sum[z]
        for w in range(len(logit)):
            logit[w] += x_sum[w] + y_sum[w] + span[w]
        logit[z] = -np.inf
        sharper[p] = right - _largest(logit, maxima)


def bound_pairs(table, neurons, lookup, circuits, first, second, out):
    """Compiled form of `reference.bound_pairs`.

    Rows have a multiple of 32 places, so that no vector is cut short.
    """
    (k, n), r, d = neurons.right.shape, len(circuits.rho), circuits.shapes[:, 0].max(initial=1)
    step, width = max(1, min(PAIRS // n, n // 8)), n + -n % 32
    numbers = d * d * (k + 1 + 2 * width) + (2 * r + 1 + width) * step * width
    neurons = neurons._replace(
        right=_padded(neurons.right, width), additive_y=_padded(neurons.additive_y, width)
    )
    lookup = lookup._replace(rows=_padded(lookup.rows, width))
    circuits = circuits._replace(rho=_padded(circuits.rho, width))
    second = second._replace(
        rho=second.rho._replace(rows=_padded(second.rho.rows, width)),
        sums=_padded(second.sums, width, -np.inf), spans=_padded(second.spans, width),
    )  # fmt: skip
    residuals, v, deviations, framed = (
        np.empty((count, step, width), np.float32)
        for count in (len(first.residual), r, len(circuits.shapes), r)
    )
    room = Room(
        np.zeros((k, step, width), np.float32), residuals, v, deviations,
        np.zeros((3, width), np.float32),
        np.empty((step, n)), np.empty((3, step * n), np.int64), np.empty(step * n),
        np.empty(step * n, np.float32), np.empty(numbers, np.float32), framed,
        np.empty(step * n, np.int64),
    )  # fmt: skip
    counts: Any = _bound_pairs(table, neurons, lookup, circuits, first, second, room, *out)
    return PairCounts(*counts)


def _padded(rows, width, value=0.0):
    """Copy rows with a value appended to each."""
    out = np.full((*rows.shape[:-1], width), value, np.float32)
    out[..., : rows.shape[-1]] = rows
    return out


@entry
def _bound_pairs(table, neurons, lookup, circuits, first, second, room, margins, stages):
    """Compiled part of `bound_pairs`."""
    slack, error, inflate, lost = first.slack, first.float32_error, first.inflate, room.lost
    pairs_left, give_up_share, residuals = second.max_pairs, second.give_up_share, room.residuals
    n, step, pairs, worst = len(table), len(lost), room.pairs, room.worst
    used = uncertified = framed = compared = poor = 0
    failures = 2 + n // PATIENCE
    for start in range(0, n, step):
        done = min(start + step, n)
        for x in range(start, done):
            _interact(x, x - start, neurons, lookup, room.interaction, residuals)
        _add_circuits(start, done - start, circuits, room)
        count = np.int64(0)
        for x in range(start, done):
            count = _bound_first(x, x - start, table[x], first, room, margins[x], count)
        explained = len(lookup.rows) > 1 or not pairs_left
        if count and explained and poor <= n // (4 * PATIENCE * step):
            compared += _compare_bins(start, count, circuits, first, room)
            before, count = count, np.int64(0)
            for p in range(before):
                x, y = pairs[0, p], pairs[1, p]
                framed += n if p == 0 or x != pairs[0, p - 1] else 0
                margins[x, y] = np.float64(worst[p]) - lost[x - start, y]
                if not margins[x, y] > error.x[x] + error.y[y]:
                    pairs[0, count], pairs[1, count] = x, y
                    count += 1
            poor += count > (1 - WORTH_COMPARING) * before
        uncertified += count
        hopeless = uncertified > (1 - give_up_share / 5) * done * n
        if hopeless and not pairs_left and done > n // 8:
            for x in range(done, n):
                for y in range(n):
                    margins[x, y] = NOT_TRIED
            return used, uncertified + (n - done) * n, done, framed, compared
        count = count if count < pairs_left else pairs_left
        if not count:
            continue
        for p in range(count):
            pairs[2, p] = table[pairs[0, p], pairs[1, p]]
        for p in range(0, count, n):
            _bound_second(start, p, min(count, p + n), second, room)
        good = tried = 0  # at one x
        for p in range(count):
            x, y, z, loss = pairs[0, p], pairs[1, p], pairs[2, p], 0.0
            for b in range(len(residuals)):
                loss += np.float64(residuals[b, x - start, y]) * np.float64(first.residual[b, z])
            bound = np.float64(worst[p]) - inflate * loss - slack.x[x] - slack.y[y]
            if bound > margins[x, y]:
                margins[x, y] = bound
                stages[x, y] = 2
            good, tried = good + (bound > error.x[x] + error.y[y]), tried + 1
            if p + 1 == count or pairs[0, p + 1] != x:
                failures -= good < give_up_share * tried
                uncertified, good, tried = uncertified - good, 0, 0
        used, pairs_left = used + count, pairs_left - count
        if failures < 0:
            pairs_left = 0
    return used, uncertified, n, framed, compared


def add_distances(vectors, rate, out):
    """Compiled form of `reference.add_distances`."""
    products = vectors.T @ vectors
    norms = products.diagonal().copy()
    _add_roots(products, norms, norms + np.float32(rate) * norms.max(), out)


@entry
def _add_roots(products, norms, more, out):
    """Add the distances of columns to `out`, from their products."""
    for z in range(len(norms)):
        line, own, to = products[z], more[z], out[z]
        for w in range(len(norms)):
            square = own + norms[w] - np.float32(2) * line[w]
            to[w] += np.sqrt(square if square > np.float32(0) else np.float32(0))


@entry
def hidden_values(left, right, xs, ys, out):
    """Compiled form of `reference.hidden_values`."""
    zero = np.float32(0)
    for i in range(len(xs)):
        first, second, to = left[xs[i]], right[ys[i]], out[i]
        for j in range(len(to)):
            t = first[j] + second[j]
            to[j] = t if t > zero else zero


@entry
def judge_margins(logits, answers, bounds, out):
    """Compiled form of `reference.judge_margins`."""
    maxima = np.empty(16, np.float32)
    for i in range(len(answers)):
        line, z = logits[i], answers[i]
        right = line[z]
        line[z] = -np.inf
        margin = right - _largest(line, maxima)
        out[i] = 1 if margin > bounds[i] else (0 if margin < -bounds[i] else 2)
