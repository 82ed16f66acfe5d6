"""The compiled parts of a sparse training step, for CPUs.

    select      pre-activations of some rows -> the k largest of each
    above       pre-activations of some rows -> those above a bound of their latent
    residual    codes -> gradient of the reconstruction and of each code, and the loss
    group       codes of all rows -> their order when grouped by latent
    columns     `residual` and the gradients of atoms together, for some columns of many
    update      codes by latent -> gradients, Adam and unit length, one latent at a time

Codes are pairs of a row and a latent, row by row. `plain_steps` has the same step in plain torch,
and is the one to read. Each function runs on one thread without the interpreter's lock and writes
only what it is given, so that callers may split rows and latents over threads. Nothing of the size
batch x latent or of a dense gradient exists here.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechatlas.dictionaries.engine.structures import (
    STRUCTURES,
    Adam,
    AddedGradients,
    Codes,
    ErrorGradients,
    Grouped,
    LatentGradients,
    Learned,
    Reconstruction,
    Scratch,
    Update,
    Weights,
    as_arrays,
)
from mechatlas.dictionaries.engine.vectors import add_rows, dot_rows
from mechatlas.maths import compilation

# The same classes, with arrays for tensors.
reconstruction: Any = Reconstruction
gradients: Any = ErrorGradients
latent_gradients: Any = Scratch

DECODED_COLUMNS = 128
"""Columns of a row that are decoded and at once read again."""
BISECTIONS = 12
"""Largest number of bisections for the bound of a row's largest."""
COMPARED_LATENTS = 32
"""Latents side by side that `above` compares together, and one by one if any is above."""
COMPARED_VALUES = 256
"""Largest number of values of which the k-th largest is found by comparing each with each."""
COPIED_COLUMNS = 128
"""Columns that `columns` copies at a time: long enough for memory, few enough for the cache."""


def compiled(kernel: Any, *, inner: bool = False) -> Any:
    """Compile a kernel whose sums may be reordered and whose multiplications may be fused.

    Vector units need both. NaN and infinity keep their meaning.

    Args:
        kernel: The kernel.
        inner: Whether only kernels call it.
    """
    freedoms = ("reassoc", "contract", "nsz")
    return compilation.compiled(kernel, fastmath=freedoms, structures=STRUCTURES, inner=inner)


def inner(kernel: Any) -> Any:
    """Compile a part of kernels."""
    return compiled(kernel, inner=True)


@inner
def _kth_largest(values, n, k):
    """The k-th largest of the first n values, which are reordered (Hoare's selection)."""
    left, right, target = 0, n - 1, k - 1
    while left < right:
        pivot = values[(left + right) >> 1]
        i, j = left, right
        while i <= j:
            while values[i] > pivot:
                i += 1
            while values[j] < pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if target <= j:
            right = j
        elif target >= i:
            left = i
        else:
            break
    return values[target]


@inner
def _maxima(row, bias, maxima):
    """Write the largest of each strided group of row + bias: c, c + n, c + 2 n, ..."""
    n = len(maxima)
    for c in range(n):
        maxima[c] = row[c] + bias[c]
    for base in range(n, len(row), n):
        # Slices, because the compiler vectorizes loops over whole arrays alone; a choice,
        # because `max` of numba is not one instruction.
        part, part_bias = row[base : base + n], bias[base : base + n]
        for c in range(len(part)):
            value = part[c] + part_bias[c]
            maxima[c] = value if value > maxima[c] else maxima[c]


@inner
def _reach(values, n, low):
    """Count the first n values that are at least `low`."""
    part, count = values[:n], 0
    for t in range(len(part)):
        count += part[t] >= low
    return count


@inner
def _exceed(values, n, low):
    """Count the first n values that are above `low`."""
    part, count = values[:n], 0
    for t in range(len(part)):
        count += part[t] > low
    return count


@inner
def _reached_by(values, k):
    """Bisect for a bound that at least k values reach, and hardly more than k."""
    low, high = values[0], values[0]
    for t in range(len(values)):
        low = values[t] if values[t] < low else low
        high = values[t] if values[t] > high else high
    half = values.dtype.type(0.5)
    for _ in range(BISECTIONS):
        middle = half * low + half * high
        n = _reach(values, len(values), middle)
        if n >= k:
            low = middle
            if n <= k + k // 4:
                break
        else:
            high = middle
    return low


@inner
def _last_of(values, n, k, scratch):
    """The k-th largest of the first n values; few are compared each with each."""
    if n <= COMPARED_VALUES:
        for t in range(n):
            if _exceed(values, n, values[t]) < k and _reach(values, n, values[t]) >= k:
                return values[t]
    for t in range(n):
        scratch[t] = values[t]
    return _kth_largest(scratch, n, k)


@inner
def write_largest(kept, where, n_kept, k, scratch, values, latents):
    """Write the k largest candidates, zero if below, and their latents; return their number.

    Args:
        kept: Pre-activations of the candidates.
        where: Latent of each candidate. Overwritten.
        n_kept: Number of candidates; entries beyond are ignored.
        k: Largest number of codes.
        scratch: Memory for as many numbers as there are candidates. Overwritten.
        values: Codes, written from the first entry on.
        latents: Latent of each code, written alike.
    """
    last = _last_of(kept, n_kept, k, scratch) if n_kept > k else kept.dtype.type(-np.inf)
    ties = k - _exceed(kept, n_kept, last)  # as many of those equal to it as have room
    n = 0
    for t in range(n_kept):
        equal = (kept[t] == last) & (ties > 0)
        ties -= equal
        # Written always, kept if counted: no branch to be guessed wrong.
        scratch[n], where[n] = max(kept[t], 0), where[t]
        n += equal | (kept[t] > last)
    for t in range(n):
        values[t], latents[t] = scratch[t], where[t]
    return n


@compiled
def _select(pre, bias, k, n_groups, values, latents):
    n_rows, m = pre.shape
    maxima, groups = np.empty(n_groups, pre.dtype), np.empty(n_groups + 1, np.int32)
    scratch, kept = np.empty(m + 1, pre.dtype), np.empty(m + 1, pre.dtype)
    where = np.empty(m + 1, np.int32)
    for i in range(n_rows):
        row = pre[i]
        _maxima(row, bias, maxima)
        # k groups have a member of at least `bound`, so the k largest are at least that.
        bound = _reached_by(maxima, k)
        # Written always, kept if counted: no branch to be guessed wrong.
        n_reaching = n_kept = np.int64(0)  # of a literal, another form would be compiled
        for c in range(n_groups):
            groups[n_reaching] = c
            n_reaching += maxima[c] >= bound
        for g in range(n_reaching):
            for j in range(groups[g], m, n_groups):
                value = row[j] + bias[j]
                kept[n_kept], where[n_kept] = value, j
                n_kept += value >= bound
        n = write_largest(kept, where, n_kept, k, scratch, values[i], latents[i])
        for t in range(n, k):  # only if there are NaN among the pre-activations
            values[i, t], latents[i, t] = np.nan, t


def select(pre: Tensor, bias: Tensor, k: int, values: Tensor, latents: Tensor) -> None:
    """Compiled form of `fallback.select`.

    Args:
        pre: Pre-activations without the bias. Not changed.
    """
    n_groups = min(pre.shape[1], max(512, 2 * k))
    _select(pre.numpy(), bias.numpy(), k, n_groups, values.numpy(), latents.numpy())


@compiled
def _above(pre, bias, low, counts, latents, values):
    n_rows, m = pre.shape
    n = 0
    for i in range(n_rows):
        before, row = n, pre[i]
        for first in range(0, m, COMPARED_LATENTS):
            last = min(first + COMPARED_LATENTS, m)
            part, part_bias, part_low = row[first:last], bias[first:last], low[first:last]
            hits = 0
            for c in range(len(part)):
                hits += part[c] + part_bias[c] > part_low[c]
            if hits:
                for c in range(len(part)):
                    value = part[c] + part_bias[c]
                    values[n], latents[n] = value, first + c
                    n += value > part_low[c]
        counts[i] = n - before
    return n


def above(pre: Tensor, bias: Tensor, low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compiled form of `fallback.above`.

    Args:
        pre: Pre-activations without the bias. Not changed.
    """
    counts = low.new_empty(len(pre), dtype=torch.int64)
    latents, values = low.new_empty(pre.numel(), dtype=torch.int32), low.new_empty(pre.numel())
    n = _above(*(t.numpy() for t in (pre, bias, low, counts, latents, values)))
    return counts, latents[:n].clone(), values[:n].clone()  # never touched, the rest is free


@inner
def _bounds(starts, i, latents, widths, bounds):
    """Write the first pair of a row of each level, that is, of no narrower one."""
    bounds[0] = starts[i]
    for level in range(len(widths)):
        last = starts[i + 1]
        while level + 1 < len(widths) and last > bounds[level]:
            if latents[last - 1] < widths[level]:
                break
            last -= 1
        bounds[level + 1] = last


def _errors(task, codes, out):
    """Write the gradients of reconstructions and codes; return the weighted squared errors."""
    target, scales, atoms, bias, widths = task
    starts, latents, values = codes.starts, codes.latents, codes.values
    g, d_code, g_sum = out.rows, out.codes, out.bias
    n_rows, d = target.shape
    n_levels = len(widths)
    zero = scales[0] - scales[0]
    bounds = np.empty(n_levels + 1, np.int64)
    loss = 0.0
    for i in range(n_rows):
        _bounds(starts, i, latents, widths, bounds)
        scale = scales[i]
        # Few columns at a time: atoms are read twice, the second time from the cache.
        for low in range(0, d, DECODED_COLUMNS):
            high = min(low + DECODED_COLUMNS, d)
            for level in range(n_levels):
                row = g[level, i, low:high]
                if level == 0:
                    wanted, constant = target[i, low:high], bias[low:high]
                    for c in range(len(row)):
                        row[c] = constant[c] - wanted[c]
                else:
                    before = g[level - 1, i, low:high]
                    for c in range(len(row)):
                        row[c] = before[c]
                first, last = bounds[level], bounds[level + 1]
                add_rows(row, low, atoms, latents, values, first, last)
            for level in range(n_levels - 1, -1, -1):
                row = g[level, i, low:high]
                square = zero
                for c in range(len(row)):
                    square += row[c] * row[c]
                    row[c] *= scale
                loss += square * scale / 2
                if level + 1 < n_levels:
                    after = g[level + 1, i, low:high]
                    for c in range(len(row)):
                        row[c] += after[c]
                first, last = bounds[level], bounds[level + 1]
                dot_rows(row, low, atoms, latents, d_code, first, last)
        row = g[0, i]
        for c in range(d):
            g_sum[c] += row[c]
    return loss


_residual = compiled(_errors)
_errors = inner(_errors)  # a part of `_columns`, which few need


def residual(task: Reconstruction, codes: Codes, out: ErrorGradients) -> float:
    """Write the gradient of the reconstructions and of each code.

    Args:
        task: Rows to reconstruct.
        codes: Codes whose latents ascend within each row if there is more than one level.
        out: Gradients. `rows` is written; `codes` and `bias` are added to.

    Returns:
        The squared errors times their weights, summed.
    """
    return _residual(as_arrays(task), as_arrays(codes), as_arrays(out))


@compiled
def _group(values, latents, starts, order):
    for p in range(len(values)):
        if values[p] != 0:
            starts[latents[p] + 1] += 1
    for j in range(len(starts) - 1):
        starts[j + 1] += starts[j]
    at = starts.copy()
    for p in range(len(values)):
        if values[p] != 0:
            order[at[latents[p]]] = p
            at[latents[p]] += 1


def group(latents: Tensor, values: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    """Order the pairs of a row and a latent latent by latent, without those of zero.

    Args:
        latents: Latent of each pair, whose number format the results have.
        values: Value of each pair.
        n_latents: Number of latents, of which some may have no pair.

    Returns:
        Pairs, in their own order within each latent, and the first of each latent.
    """
    starts = latents.new_zeros(n_latents + 1)
    order = latents.new_empty(values.numel())
    _group(values.numpy(), latents.numpy(), starts.numpy(), order.numpy())
    return order[: int(starts[-1])], starts


@inner
def _copy(whole, low, part):
    """Copy the columns from `low`, as many as the part has."""
    for i in range(len(part)):
        # Slices, because loops over whole arrays alone are vectorized.
        source, target = whole[i, low : low + part.shape[1]], part[i]
        for c in range(len(target)):
            target[c] = source[c]


@compiled
def _columns(low, high, task, codes, grouped, out):
    starts, rows, values = grouped.starts, grouped.rows, grouped.values
    target, scales, atoms, bias, widths = task
    n_rows, n_latents, n_levels = len(target), len(atoms), len(widths)
    room_of_rows = np.empty((1 + n_levels) * n_rows * COPIED_COLUMNS, target.dtype)
    room_of_atoms = np.empty(n_latents * COPIED_COLUMNS, target.dtype)
    loss = 0.0
    for first in range(low, high, COPIED_COLUMNS):
        last = min(first + COPIED_COLUMNS, high)
        n = last - first
        batch = room_of_rows[: (1 + n_levels) * n_rows * n].reshape((1 + n_levels, n_rows, n))
        wanted, g = batch[0], batch[1:]
        packed = room_of_atoms[: n_latents * n].reshape((n_latents, n))
        _copy(target, first, wanted)
        _copy(atoms, first, packed)
        part = reconstruction(wanted, scales, packed, bias[first:last], widths)
        loss += _errors(part, codes, gradients(g, packed, out.codes, out.bias[first:last]))
        level = 0
        for j in range(n_latents):
            while j >= widths[level]:
                level += 1
            row = out.atoms[j, first:last]
            for c in range(len(row)):
                row[c] = 0
            add_rows(row, 0, g[level], rows, values, starts[j], starts[j + 1])
    return loss


def columns(
    span: range, task: Reconstruction, codes: Codes, grouped: Grouped, out: ErrorGradients
) -> float:
    """Write the gradients of atoms, and the share of some columns in those of the codes.

    For dictionaries whose atoms are so wide that they do not fit in the cache: a block of
    columns of all rows and of all atoms does.

    Args:
        span: Columns to work on.
        task: All rows of the batch.
        codes: Codes of the batch.
        grouped: The same latent by latent.
        out: Gradients. The columns of `atoms` are written; `codes` and `bias` are added to.

    Returns:
        The share of the columns in the squared errors times their weights.
    """
    structures = map(as_arrays, (task, codes, grouped, out))
    return _columns(span.start, span.stop, *structures)


@inner
def step_adam(p, first, second, gradient, adam):
    """Compiled form of `fallback.step_adam`.

    Args:
        p: Parameters side by side, as the moments and the gradient are.
    """
    for c in range(len(gradient)):
        m = adam.decay1 * first[c] + adam.weight1 * gradient[c]
        v = adam.decay2 * second[c] + adam.weight2 * (gradient[c] * gradient[c])
        first[c] = m
        second[c] = v
        p[c] -= adam.rate * m / (np.sqrt(v) * adam.correction + adam.epsilon)


@inner
def _length(part):
    square = part[0] * part[0]
    for c in range(1, len(part)):
        square += part[c] * part[c]
    return np.sqrt(square)


@inner
def remove_along(gradient, atom, edges):
    """Compiled form of `fallback.remove_along` for one atom.

    Args:
        gradient: Gradient of the atom, (d_out,). Changed in place.
    """
    lengths = np.empty(len(edges) - 1, atom.dtype)
    n_sites = 0
    along = gradient[0] - gradient[0]
    # Slices, because loops over whole arrays alone are vectorized.
    for s in range(len(lengths)):
        part, part_gradient = atom[edges[s] : edges[s + 1]], gradient[edges[s] : edges[s + 1]]
        lengths[s] = _length(part)
        if lengths[s] > 0:
            n_sites += 1
            total = along - along
            for c in range(len(part)):
                total += part_gradient[c] * part[c]
            along += total / lengths[s]
    for s in range(len(lengths)):
        if lengths[s] > 0:
            part, part_gradient = atom[edges[s] : edges[s + 1]], gradient[edges[s] : edges[s + 1]]
            factor = along / (n_sites * lengths[s])
            for c in range(len(part)):
                part_gradient[c] -= factor * part[c]


@inner
def unit_length(atom, edges, least):
    """Scale an atom so that its lengths at the sites sum to 1.

    Args:
        atom: Atom, (d_out,). Changed in place.
        edges: Bounds of the sites in the atom.
        least: Smallest length that the atom is divided by.
    """
    total = least - least
    for s in range(len(edges) - 1):
        total += _length(atom[edges[s] : edges[s + 1]])
    inverse = 1 / max(total, least)
    for c in range(len(atom)):
        atom[c] *= inverse


@inner
def _gradients(j, level, pairs, batch, added, tied, scratch):
    """Write the gradients of one latent."""
    starts, row_of, values = pairs.starts, pairs.rows, pairs.values
    gradient, encoder_gradient, d_bias = scratch
    for c in range(len(encoder_gradient)):
        encoder_gradient[c] = 0
    if len(batch.atoms):
        for c in range(len(gradient)):
            gradient[c] = batch.atoms[j, c]
    else:
        for c in range(len(gradient)):
            gradient[c] = 0
        add_rows(gradient, 0, batch.rows[level], row_of, values, starts[j], starts[j + 1])
    add_rows(encoder_gradient, 0, batch.x, row_of, batch.codes, starts[j], starts[j + 1])
    total = d_bias[0] - d_bias[0]
    for q in range(starts[j], starts[j + 1]):
        total += batch.codes[q]
    d_bias[0] = total
    i = added.place[j]
    if i >= 0:
        d_bias[0] += added.bias[i]
        for c in range(len(gradient)):
            gradient[c] += added.atoms[i, c]
        for c in range(len(encoder_gradient)):
            encoder_gradient[c] += added.encoder[i, c]
    if tied:
        for c in range(len(gradient)):
            gradient[c] += encoder_gradient[c]


@compiled
def _update(low, high, pairs, batch, weights, rule, added, d_input):
    (atoms, atoms1, atoms2), (rows, rows1, rows2), (b, b1, b2) = weights
    gradient = np.empty(atoms.shape[1], atoms.dtype)
    encoder_gradient = np.empty(rows.shape[1], atoms.dtype)
    d_bias = np.zeros(1, atoms.dtype)
    scratch = latent_gradients(gradient, encoder_gradient, d_bias)
    squares = 0.0
    level = 0
    for j in range(low, high):
        while j >= batch.widths[level]:
            level += 1
        _gradients(j, level, pairs, batch, added, rule.tied, scratch)
        row, atom = rows[j], atoms[j]
        remove_along(gradient, atom, rule.edges)
        if not rule.apply:
            for part in scratch:
                for c in range(len(part)):
                    squares += part[c] * part[c]
            if rule.tied:
                for c in range(len(encoder_gradient)):
                    squares -= encoder_gradient[c] * encoder_gradient[c]
        # Before the encoder row changes; the added gradients have no part in it.
        place = added.place[j]
        through = d_bias[0] if place < 0 else d_bias[0] - added.bias[place]
        for c in range(len(d_input)):
            d_input[c] += through * row[c]
        if rule.apply:
            if rule.clip < 1:
                for part in scratch:
                    for c in range(len(part)):
                        part[c] *= rule.clip
            if not rule.tied:
                step_adam(row, rows1[j], rows2[j], encoder_gradient, rule.adam)
            step_adam(atom, atoms1[j], atoms2[j], gradient, rule.adam)
            unit_length(atom, rule.edges, rule.least)
            step_adam(b[j], b1[j], b2[j], d_bias, rule.adam)
    return squares


def update(
    span: range,
    pairs: Grouped,
    batch: LatentGradients,
    weights: Weights,
    rule: Update,
    added: AddedGradients,
    d_input: Tensor,
) -> float:
    """Take one step of Adam on some latents, and add to the input's gradient.

    Args:
        batch: Rows that the encoder read, and the gradients that `residual` or `columns` wrote.
        weights: Parameters and moments. Changed in place.
        added: Gradients of dead latents.
        d_input: Gradient of the sum of the encoder's inputs, (d_in,). Added to.

    Returns:
        Sum of the squared gradients if they were only measured, else 0.
    """
    weights = weights._replace(bias=Learned(*(t[:, None] for t in weights.bias)))
    structures = map(as_arrays, (pairs, batch, weights, rule_in(rule, pairs.values), added))
    return _update(span.start, span.stop, *structures, d_input.numpy())


def rule_in(rule: Update, tensor: Tensor) -> Update:
    """Convert the numbers of an update to the number format of a tensor."""
    dtype = tensor.numpy().dtype.type
    numbers = Adam(*map(dtype, rule.adam))
    return rule._replace(adam=numbers, clip=dtype(rule.clip), least=dtype(rule.least))
