"""The compiled parts of a training step of a TopK autoencoder, for CPUs.

    select      pre-activations of some rows -> the k largest of each
    residual    codes -> gradient of the reconstruction and of each code, and the loss
    group       codes of all rows -> the same codes, grouped by latent
    update      codes by latent -> gradients, Adam and unit length, one latent at a time

`fallback.py` has the same functions in plain torch. Each runs on one thread without the
interpreter's lock and writes only what it is given, so that callers may split rows and
latents over threads; what is computed does not depend on how many there are.

Nothing of the size batch x latent or of a dense gradient exists here: the pre-activations come
in tiles, and the gradient of a latent is used while it is still in cache.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from torch import Tensor

Arrays = dict[str, Tensor]


def _compiled(function: Callable[..., Any]) -> Any:
    # Sums may be reordered and multiplications fused into them (vector units need both), but
    # NaN and infinity keep their meaning. `unwrap` because tests wrap functions in checks.
    options: dict[str, Any] = {
        "nogil": True,
        "error_model": "numpy",
        "fastmath": {"reassoc", "contract", "nsz"},
    }
    try:
        return numba.njit(cache=True, **options)(inspect.unwrap(function))
    except RuntimeError:  # no writable place for the cache: compile in every process
        return numba.njit(**options)(inspect.unwrap(function))


@_compiled
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


@_compiled
def _maxima(row, bias, maxima):
    """Write the largest of each strided group of row + bias: c, c + n, c + 2 n, ..."""
    n = len(maxima)
    for c in range(n):
        maxima[c] = row[c] + bias[c]
    for base in range(n, len(row), n):
        # Slices, because the compiler vectorises loops over whole arrays alone; a choice,
        # because `max` of numba is not one instruction.
        part, its_bias = row[base : base + n], bias[base : base + n]
        for c in range(len(part)):
            value = part[c] + its_bias[c]
            maxima[c] = value if value > maxima[c] else maxima[c]


@_compiled
def _select(pre, bias, k, n_groups, values, latents):
    n_rows, m = pre.shape
    maxima = np.empty(n_groups, pre.dtype)
    scratch = np.empty(max(n_groups, m), pre.dtype)
    kept = np.empty(m, pre.dtype)
    where = np.empty(m, np.int32)
    for i in range(n_rows):
        row = pre[i]
        _maxima(row, bias, maxima)
        # k groups have a member of at least `bound`, so the k largest are at least that.
        scratch[:n_groups] = maxima
        bound = _kth_largest(scratch, n_groups, k)
        n_kept = 0
        for c in range(n_groups):
            if maxima[c] >= bound:
                for j in range(c, m, n_groups):
                    value = row[j] + bias[j]
                    if value >= bound:
                        kept[n_kept] = value
                        where[n_kept] = j
                        n_kept += 1
        last = bound
        if n_kept > k:
            scratch[:n_kept] = kept[:n_kept]
            last = _kth_largest(scratch, n_kept, k)
        above = 0
        for t in range(n_kept):
            above += kept[t] > last
        ties = k - above  # of those equal to the k-th, as many as there is room for
        n = 0
        for t in range(n_kept):
            equal = kept[t] == last
            if kept[t] > last or (equal and ties > 0):
                ties -= equal
                values[i, n] = max(kept[t], 0)
                latents[i, n] = where[t]
                n += 1
        for t in range(n, k):  # only if there are NaN among the pre-activations
            values[i, t] = np.nan
            latents[i, t] = t


def select(pre: Tensor, bias: Tensor, k: int, values: Tensor, latents: Tensor) -> None:
    """Write the k largest of each row of `pre + bias` (zero if below) and which they are."""
    n_groups = min(pre.shape[1], max(256, 2 * k))
    arrays = (pre.numpy(), bias.numpy(), k, n_groups, values.numpy(), latents.numpy())
    _select(*arrays)


@_compiled
def _residual(target, atoms, bias, values, latents, scale, g, d_code, g_sum):
    n_rows, d = target.shape
    k = values.shape[1]
    zero = scale - scale
    loss = 0.0
    for i in range(n_rows):
        for c in range(d):
            g[i, c] = bias[c] - target[i, c]
        # Four atoms at a time: a row of g is then read and written a quarter as often.
        for t in range(0, k - 3, 4):
            v0, v1, v2, v3 = values[i, t], values[i, t + 1], values[i, t + 2], values[i, t + 3]
            a, b, e, f = latents[i, t], latents[i, t + 1], latents[i, t + 2], latents[i, t + 3]
            for c in range(d):
                g[i, c] += (v0 * atoms[a, c] + v1 * atoms[b, c]) + (
                    v2 * atoms[e, c] + v3 * atoms[f, c]
                )
        for t in range(k - k % 4, k):
            v0, a = values[i, t], latents[i, t]
            for c in range(d):
                g[i, c] += v0 * atoms[a, c]
        square = zero
        for c in range(d):
            square += g[i, c] * g[i, c]
            g[i, c] *= scale
            g_sum[c] += g[i, c]
        loss += square
        for t in range(0, k - 3, 4):
            a, b, e, f = latents[i, t], latents[i, t + 1], latents[i, t + 2], latents[i, t + 3]
            s0, s1, s2, s3 = zero, zero, zero, zero
            for c in range(d):
                s0 += g[i, c] * atoms[a, c]
                s1 += g[i, c] * atoms[b, c]
                s2 += g[i, c] * atoms[e, c]
                s3 += g[i, c] * atoms[f, c]
            d_code[i, t], d_code[i, t + 1] = s0, s1
            d_code[i, t + 2], d_code[i, t + 3] = s2, s3
        for t in range(k - k % 4, k):
            a = latents[i, t]
            s0 = zero
            for c in range(d):
                s0 += g[i, c] * atoms[a, c]
            d_code[i, t] = s0
    return loss


def residual(
    target: Tensor,
    atoms: Tensor,
    bias: Tensor,
    codes: tuple[Tensor, Tensor],
    scale: float,
    out: tuple[Tensor, Tensor, Tensor],
) -> float:
    """Write `g = scale * (reconstruction - target)`, each code's gradient and the sum of g.

    Returns:
        The squared error, summed over rows and columns.
    """
    values, latents = (t.numpy() for t in codes)
    arrays = (target.numpy(), atoms.numpy(), bias.numpy(), values, latents)
    return _residual(*arrays, values.dtype.type(scale), *(t.numpy() for t in out))


@_compiled
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


def group(values: Tensor, latents: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    """Group the non-zero codes by latent, rows in order within each.

    Returns:
        Positions in the flattened codes, latent by latent, and where each latent's begin
        (one entry more than there are latents).
    """
    starts = latents.new_zeros(n_latents + 1)
    order = latents.new_empty(values.numel())
    flat = (values.view(-1).numpy(), latents.view(-1).numpy())
    _group(*flat, starts.numpy(), order.numpy())
    return order, starts


@_compiled
def _sum_rows(weights, rows, order, first, last, k, out):
    """Write the sum of weights[p] * rows[p // k] over the pairs p in order[first:last]."""
    d = len(out)
    for c in range(d):
        out[c] = 0
    q = first
    while q + 4 <= last:
        p0, p1, p2, p3 = order[q], order[q + 1], order[q + 2], order[q + 3]
        w0, w1, w2, w3 = weights[p0], weights[p1], weights[p2], weights[p3]
        a, b, e, f = p0 // k, p1 // k, p2 // k, p3 // k
        for c in range(d):
            out[c] += (w0 * rows[a, c] + w1 * rows[b, c]) + (w2 * rows[e, c] + w3 * rows[f, c])
        q += 4
    for r in range(q, last):
        p0 = order[r]
        w0, a = weights[p0], p0 // k
        for c in range(d):
            out[c] += w0 * rows[a, c]


@_compiled
def _adam(p, first, second, gradient, adam):
    keep1, new1, keep2, new2, rate, correction, epsilon = adam
    for c in range(len(gradient)):
        m = keep1 * first[c] + new1 * gradient[c]
        v = keep2 * second[c] + new2 * (gradient[c] * gradient[c])
        first[c] = m
        second[c] = v
        p[c] -= rate * m / (np.sqrt(v) * correction + epsilon)


@_compiled
def _remove_along(gradient, atom):
    along = gradient[0] * atom[0]
    for c in range(1, len(gradient)):
        along += gradient[c] * atom[c]
    for c in range(len(gradient)):
        gradient[c] -= along * atom[c]


@_compiled
def _unit_length(atom, least):
    square = atom[0] * atom[0]
    for c in range(1, len(atom)):
        square += atom[c] * atom[c]
    inverse = 1 / max(np.sqrt(square), least)
    for c in range(len(atom)):
        atom[c] *= inverse


@_compiled
def _gradients(j, k, tied, pairs, batch, extra, scratch):
    order, starts, values, d_code = pairs
    x, g = batch
    gradient, encoder_gradient, d_bias = scratch
    _sum_rows(values, g, order, starts[j], starts[j + 1], k, gradient)
    _sum_rows(d_code, x, order, starts[j], starts[j + 1], k, encoder_gradient)
    total = d_bias[0] - d_bias[0]
    for q in range(starts[j], starts[j + 1]):
        total += d_code[order[q]]
    d_bias[0] = total
    place, extra_atoms, extra_rows, extra_bias = extra
    i = place[j]
    if i >= 0:
        d_bias[0] += extra_bias[i]
        for c in range(len(gradient)):
            gradient[c] += extra_atoms[i, c]
            encoder_gradient[c] += extra_rows[i, c]
    if tied:
        for c in range(len(gradient)):
            gradient[c] += encoder_gradient[c]


@_compiled
def _update(low, high, k, tied, pairs, batch, parameters, adam, least, d_input, extra):
    (atoms, atoms1, atoms2), (rows, rows1, rows2), (b, b1, b2) = parameters
    d = atoms.shape[1]
    gradient, encoder_gradient = np.empty(d, atoms.dtype), np.empty(d, atoms.dtype)
    d_bias = np.zeros(1, atoms.dtype)
    scratch = (gradient, encoder_gradient, d_bias)
    for j in range(low, high):
        _gradients(j, k, tied, pairs, batch, extra, scratch)
        # Through the input's bias: before the encoder row changes. The added gradients have
        # no part in it.
        row, atom = rows[j], atoms[j]
        through = d_bias[0] if extra[0][j] < 0 else d_bias[0] - extra[3][extra[0][j]]
        for c in range(d):
            d_input[c] += through * row[c]
        _remove_along(gradient, atom)
        if not tied:
            _adam(row, rows1[j], rows2[j], encoder_gradient, adam)
        _adam(atom, atoms1[j], atoms2[j], gradient, adam)
        _unit_length(atom, least)
        _adam(b[j], b1[j], b2[j], d_bias, adam)


def update(
    span: range,
    grouped: tuple[Tensor, Tensor],
    codes: tuple[Tensor, Tensor],
    batch: tuple[Tensor, Tensor],
    state: dict[str, tuple[Tensor, Tensor, Tensor]],
    adam: list[float],
    d_input: Tensor,
    extra: tuple[Tensor, ...],
) -> None:
    """Take one step of Adam on the latents of `span`, and add to the input's gradient.

    Args:
        span: Latents to update.
        grouped: What `group` returned.
        codes: Values and their gradients, each (batch, k).
        batch: What the encoder read, and g of `residual`.
        state: Parameter, first and second moment of `W_dec`, `W_enc` (latents by d_in; absent
            when tied) and `b_enc`. Changed in place.
        adam: Decay and weight of the first moment, of the second, rate with its correction,
            one over the root of the second moment's correction, epsilon.
        d_input: Gradient of the sum of the encoder's inputs, (d_in,). Added to.
        extra: For each latent the row of its added gradients or -1, and the added gradients
            of decoder rows, encoder rows and encoder biases.
    """
    values, d_code = (t.view(-1).numpy() for t in codes)
    parts = {name: tuple(t.numpy() for t in group) for name, group in state.items()}
    dtype = values.dtype.type
    _update(
        span.start,
        span.stop,
        codes[0].shape[1],
        "W_enc" not in parts,
        (grouped[0].numpy(), grouped[1].numpy(), values, d_code),
        tuple(t.numpy() for t in batch),
        (
            parts["W_dec"],
            parts.get("W_enc", parts["W_dec"]),
            tuple(t[:, None] for t in parts["b_enc"]),
        ),
        tuple(dtype(value) for value in adam),
        dtype(1e-12),
        d_input.numpy(),
        tuple(t.numpy() for t in extra),
    )
