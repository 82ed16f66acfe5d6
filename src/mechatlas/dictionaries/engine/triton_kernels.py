"""Kernels of a sparse training step in Triton, for NVIDIA and AMD GPUs.

    Screen     the codes of a batch, exactly, from a product of half the precision
    residual   reconstruction, error, loss and gradients of codes in one pass over the rows
    update     gradients, Adam and unit length in one pass over the latents, written once

The functions are those of `fallback.py`, which is the one to read, and call it for what they do
not have: Matryoshka levels, several sites, tied weights, clipping and dead latents.

`Screen` bounds each pre-activation as the CPU's `screening` does: the product of the numbers
rounded to bfloat16 is no further from the whole product than |x - h(x)| |w| + |h(x)| |w - h(w)|
and what was lost while summing (Cauchy and Schwarz). The latents that may be among the k largest of
a row are computed again in float32. A row of which more than `ROOM` may be is searched whole, in
float32, by the kernel itself, so that nobody waits for the device.
"""

# Kernels are read by Triton, which need not be installed, and are not called as functions.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportMissingImports=false

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from mechatlas.dictionaries.engine import fallback
from mechatlas.dictionaries.engine.sparse_steps import WholeProduct
from mechatlas.dictionaries.engine.structures import (
    AddedGradients,
    Codes,
    ErrorGradients,
    Grouped,
    LatentGradients,
    Reconstruction,
    Update,
    Weights,
)

above, group = fallback.above, fallback.group

ROOM = 4
"""Candidates of a row that have room, as a multiple of k."""
GROUPS = 1024
"""Groups of latents whose largest bounds decide what is a candidate."""
EXTRA = 8
"""Columns that follow the activations in a screened product: five are used, for the bias and the
lengths that bound its error; with eight, rows begin where the device likes it."""
HALF_ERROR = tl.constexpr(2.0**-8)
"""Largest relative error of a number rounded to bfloat16."""
MARGIN = tl.constexpr(1.01)
"""Factor of the lengths in the product, which covers the rounding of the lengths themselves."""
INTERVAL = tl.constexpr(2.05)
"""Width of the interval around a screened pre-activation, in units of |x| |w| (upper bound)."""


def _wide(n: int) -> int:
    """Width of a block that holds n numbers."""
    return max(16, triton.next_power_of_2(n))


class Screen(WholeProduct):
    """A `TileSearch` whose k largest of each row come from a product of half the precision."""

    def largest(self, k: int) -> Callable[[Tensor, Tensor, Tensor], None]:
        """Round the encoder; make a function that writes the k largest codes of each row."""
        m, d = self.rows.shape
        half = self.rows.new_empty(m, d + EXTRA, dtype=torch.bfloat16)
        reach = self.rows.new_empty(m, 3)
        _round_encoder[(m,)](self.rows, self.bias, half, reach, d, d + EXTRA, wide=_wide(d))
        furthest = reach.amax(dim=0)
        room = min(_wide(ROOM * k), _wide(m))
        groups = min(max(GROUPS, _wide(2 * k)), _wide(m))

        def select(x: Float[Tensor, "row d_in"], values: Tensor, latents: Tensor) -> None:
            n = len(x)
            rounded = x.new_empty(n, d + EXTRA, dtype=torch.bfloat16)
            lengths = x.new_empty(n, 2)
            _round_batch[(n,)](x, rounded, lengths, d, d + EXTRA, wide=_wide(d))
            bounds = rounded @ half.T
            near = torch.zeros(n, room, dtype=torch.int32, device=x.device)
            counts = torch.empty(n, dtype=torch.int32, device=x.device)
            own = (bounds, lengths, reach, furthest, near, counts)
            _near[(n,)](*own, m, k, room=room, n_groups=groups)
            computed = x.new_empty(n, room)
            _compute[(n,)](x, self.rows, self.bias, near, counts, computed, d, room, wide=_wide(d))
            top = computed.topk(k, dim=1)
            values.copy_(top.values.relu())
            latents.copy_(near.gather(1, top.indices))
            whole = (x, self.rows, self.bias, counts, values, latents)
            _search_whole[(n,)](*whole, m, k, d, room=room, n_kept=_wide(k), wide=_wide(d))

        return select


@triton.jit
def _round_encoder(rows, bias, half, reach, d, stride, wide: tl.constexpr):
    j = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, wide)
    row = tl.load(rows + j * d + c, mask=c < d, other=0.0)
    rounded = row.to(tl.bfloat16)
    left = row - rounded.to(tl.float32)
    lost, length = tl.sqrt(tl.sum(left * left)), tl.sqrt(tl.sum(row * row))
    summing = 2.0**-23 * (d + 5)  # of the sum of sizes, twice what can be lost
    slack = lost + summing * length
    b = tl.load(bias + j)
    offset = b - summing * tl.abs(b)
    to = half + j * stride
    tl.store(to + c, rounded, mask=c < d)
    for column in range(3):
        part = offset.to(tl.bfloat16)
        tl.store(to + d + column, part)
        offset -= part.to(tl.float32)
    tl.store(to + d + 3, (length * -MARGIN).to(tl.bfloat16))
    tl.store(to + d + 4, (slack * -MARGIN).to(tl.bfloat16))
    for column in range(5, 8):
        tl.store(to + d + column, (length * 0).to(tl.bfloat16))
    tl.store(reach + j * 3, length)
    tl.store(reach + j * 3 + 1, slack)
    tl.store(reach + j * 3 + 2, 2 * summing * tl.abs(b))


@triton.jit
def _round_batch(rows, half, lengths, d, stride, wide: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, wide)
    row = tl.load(rows + i * d + c, mask=c < d, other=0.0)
    rounded = row.to(tl.bfloat16)
    left = row - rounded.to(tl.float32)
    lost = tl.sqrt(tl.sum(left * left))
    length = tl.sqrt(tl.sum(row * row)) + lost
    to = half + i * stride
    tl.store(to + c, rounded, mask=c < d)
    for column in range(3):
        tl.store(to + d + column, (length * 0 + 1).to(tl.bfloat16))
    tl.store(to + d + 3, (lost * MARGIN).to(tl.bfloat16))
    tl.store(to + d + 4, (length * MARGIN).to(tl.bfloat16))
    for column in range(5, 8):
        tl.store(to + d + column, (length * 0).to(tl.bfloat16))
    tl.store(lengths + i * 2, lost)
    tl.store(lengths + i * 2 + 1, length)


@triton.jit
def _near(
    bounds, lengths, reach, furthest, near, counts, m, k, room: tl.constexpr, n_groups: tl.constexpr
):
    """Write the latents of a row that may be among its k largest, and how many there are."""
    i = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, n_groups)
    below = -3.0e38  # finite, so that bounds of what is not there can be added to
    maxima = tl.full([n_groups], below, tl.float32)
    for first in range(0, m, n_groups):
        at = first + c
        part = tl.load(bounds + i * m + at, mask=at < m, other=below).to(tl.float32)
        maxima = tl.maximum(maxima, part)
    # The k-th largest of them by bisection of the bits, which are in the numbers' order above zero.
    low, high = 0, 0x7F80
    for _ in range(16):
        middle = (low + high + 1) // 2
        level = (middle << 16).to(tl.float32, bitcast=True)
        enough = tl.sum((maxima >= level).to(tl.int32)) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    # k groups have a member of at least `bound`, so the k largest are at least that.
    bound = (low << 16).to(tl.float32, bitcast=True)
    bound -= bound * HALF_ERROR
    lost = tl.load(lengths + i * 2) * INTERVAL
    length = tl.load(lengths + i * 2 + 1) * INTERVAL
    far = lost * tl.load(furthest) + length * tl.load(furthest + 1) + tl.load(furthest + 2)
    floor = (bound - far) * (1 - 2 * HALF_ERROR)
    floor = tl.where(floor > 0, floor, below)
    n = 0
    for first in range(0, m, n_groups):
        at = first + c
        least = tl.load(bounds + i * m + at, mask=at < m, other=below).to(tl.float32)
        kept = (at < m) & (least >= floor)
        if tl.sum(kept.to(tl.int32)) > 0:
            r = reach + at.to(tl.int64) * 3
            most = least + tl.abs(least) * HALF_ERROR + lost * tl.load(r, mask=kept, other=0.0)
            most += length * tl.load(r + 1, mask=kept, other=0.0)
            most += tl.load(r + 2, mask=kept, other=0.0)
            kept = kept & (most >= bound)
            to = n + tl.cumsum(kept.to(tl.int32), 0) - 1
            tl.store(near + i * room + to, at.to(tl.int32), mask=kept & (to < room))
            n += tl.sum(kept.to(tl.int32))
    tl.store(counts + i, n)


@triton.jit
def _compute(x, rows, bias, near, counts, computed, d, room, wide: tl.constexpr):
    """Write the pre-activations of a row's candidates in float32, the rest below all others."""
    i = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, wide)
    row = tl.load(x + i * d + c, mask=c < d, other=0.0)
    n = tl.minimum(tl.load(counts + i), room)
    for t in range(n):
        j = tl.load(near + i * room + t).to(tl.int64)
        own = tl.load(rows + j * d + c, mask=c < d, other=0.0)
        tl.store(computed + i * room + t, tl.sum(row * own) + tl.load(bias + j))
    for t in range(n, room):
        tl.store(computed + i * room + t, -float("inf"))


@triton.jit
def _search_whole(
    x,
    rows,
    bias,
    counts,
    values,
    latents,
    m,
    k,
    d,
    room: tl.constexpr,
    n_kept: tl.constexpr,
    wide: tl.constexpr,
):
    """Write the k largest of a row whose candidates had no room, from all its pre-activations."""
    i = tl.program_id(0).to(tl.int64)
    if tl.load(counts + i) > room:
        c, t = tl.arange(0, wide), tl.arange(0, n_kept)
        row = tl.load(x + i * d + c, mask=c < d, other=0.0)
        # A number and its latent in one key: the bits of numbers above zero are in their order,
        # and of two equal ones the first comes first.
        best = tl.zeros([n_kept], tl.int64)
        for first in range(0, m, n_kept):
            keys = tl.zeros([n_kept], tl.int64)
            for s in range(n_kept):
                j = first + s
                if j < m:
                    own = tl.load(rows + j.to(tl.int64) * d + c, mask=c < d, other=0.0)
                    value = tl.sum(row * own) + tl.load(bias + j)
                    bits = tl.maximum(value, 0.0).to(tl.int32, bitcast=True).to(tl.int64)
                    keys = tl.where(t == s, (bits << 32) | (0x7FFFFFFF - j).to(tl.int64), keys)
            best = tl.sort(tl.maximum(best, tl.sort(keys)), descending=True)
        kept = t < k
        value = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        latent = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
        latent = tl.where(latent < m, latent, 0)
        tl.store(values + i * k + t, value, mask=kept)
        tl.store(latents + i * k + t, latent, mask=kept)


def residual(task: Reconstruction, codes: Codes, out: ErrorGradients) -> Tensor:
    """Write the gradient of the reconstructions and of each code; see `fallback.residual`."""
    if len(task.widths) > 1:
        return fallback.residual(task, codes, out)
    n, d = task.target.shape
    losses = task.target.new_empty(n)
    target = task.target.contiguous()
    read = (target, task.scales, task.atoms, task.bias, codes.starts, codes.latents, codes.values)
    _reconstruct[(n,)](*read, out.rows, out.codes, losses, d, wide=_wide(d))
    out.bias.add_(out.rows[0].sum(dim=0))
    return losses.sum()


@triton.jit
def _reconstruct(
    target,
    scales,
    atoms,
    bias,
    starts,
    latents,
    values,
    gradients,
    d_codes,
    losses,
    d,
    wide: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, wide)
    inside = c < d
    error = tl.load(bias + c, mask=inside, other=0.0)
    error -= tl.load(target + i * d + c, mask=inside, other=0.0)
    first, last = tl.load(starts + i), tl.load(starts + i + 1)
    for p in range(first, last):
        j = tl.load(latents + p).to(tl.int64)
        error += tl.load(values + p) * tl.load(atoms + j * d + c, mask=inside, other=0.0)
    scale = tl.load(scales + i)
    g = error * scale
    tl.store(losses + i, tl.sum(error * g) / 2)
    tl.store(gradients + i * d + c, g, mask=inside)
    for p in range(first, last):
        j = tl.load(latents + p).to(tl.int64)
        atom = tl.load(atoms + j * d + c, mask=inside, other=0.0)
        tl.store(d_codes + p, tl.sum(atom * g))


def update(
    span: range,
    pairs: Grouped,
    batch: LatentGradients,
    weights: Weights,
    rule: Update,
    added: AddedGradients,
    d_input: Float[Tensor, " d_in"],
) -> float:
    """Take one step of Adam on all latents; see `fallback.update`."""
    special = len(added.bias) or rule.tied or not rule.apply or rule.clip < 1
    if special or len(batch.widths) > 1 or len(rule.edges) > 2:
        return fallback.update(span, pairs, batch, weights, rule, added, d_input)
    atoms, encoder, bias = weights
    slopes = torch.empty_like(bias.value)
    _step_bias[(len(span),)](pairs.starts, batch.codes, slopes, *bias, *rule.adam)
    d_input += slopes @ encoder.value  # before the encoder changes
    d_in, d_out = batch.x.shape[1], batch.rows.shape[-1]
    read = (pairs.starts, pairs.rows, pairs.values, batch.codes, batch.x, batch.rows)
    widths = {"wide_in": _wide(d_in), "wide_out": _wide(d_out)}
    numbers = (rule.least, *rule.adam)
    _step_latent[(len(span),)](*read, *atoms, *encoder, *numbers, d_in, d_out, **widths)
    return 0.0


@triton.jit
def _step_bias(
    starts,
    d_codes,
    slopes,
    bias,
    first,
    second,
    decay1,
    weight1,
    decay2,
    weight2,
    rate,
    fix,
    eps,
    block: tl.constexpr = 128,
):
    j = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, block)
    total = tl.zeros([block], tl.float32)
    last = tl.load(starts + j + 1)
    for p in range(tl.load(starts + j), last, block):
        total += tl.load(d_codes + p + t, mask=p + t < last, other=0.0)
    slope = tl.sum(total)
    tl.store(slopes + j, slope)
    m1 = decay1 * tl.load(first + j) + weight1 * slope
    m2 = decay2 * tl.load(second + j) + weight2 * slope * slope
    tl.store(first + j, m1)
    tl.store(second + j, m2)
    tl.store(bias + j, tl.load(bias + j) - rate * m1 / (tl.sqrt(m2) * fix + eps))


@triton.jit
def _adam(
    to, first, second, at, inside, gradient, decay1, weight1, decay2, weight2, rate, fix, eps
):
    """Parameter after a step of Adam, whose moments are written."""
    m1 = decay1 * tl.load(first + at, mask=inside, other=0.0) + weight1 * gradient
    m2 = decay2 * tl.load(second + at, mask=inside, other=0.0) + weight2 * gradient * gradient
    tl.store(first + at, m1, mask=inside)
    tl.store(second + at, m2, mask=inside)
    value = tl.load(to + at, mask=inside, other=0.0)
    return value - rate * m1 / (tl.sqrt(m2) * fix + eps)


@triton.jit
def _step_latent(
    starts,
    rows,
    values,
    d_codes,
    x,
    g,
    atoms,
    atoms_first,
    atoms_second,
    encoder,
    encoder_first,
    encoder_second,
    least,
    decay1,
    weight1,
    decay2,
    weight2,
    rate,
    fix,
    eps,
    d_in,
    d_out,
    wide_in: tl.constexpr,
    wide_out: tl.constexpr,
):
    j = tl.program_id(0).to(tl.int64)
    c, o = tl.arange(0, wide_in), tl.arange(0, wide_out)
    read, written = c < d_in, o < d_out
    to_atom, to_encoder = tl.zeros([wide_out], tl.float32), tl.zeros([wide_in], tl.float32)
    for p in range(tl.load(starts + j), tl.load(starts + j + 1)):
        i = tl.load(rows + p).to(tl.int64)
        to_atom += tl.load(values + p) * tl.load(g + i * d_out + o, mask=written, other=0.0)
        to_encoder += tl.load(d_codes + p) * tl.load(x + i * d_in + c, mask=read, other=0.0)
    at = j * d_out + o
    atom = tl.load(atoms + at, mask=written, other=0.0)
    normal = atom / tl.maximum(tl.sqrt(tl.sum(atom * atom)), 1.1754944e-38)
    to_atom -= tl.sum(to_atom * normal) * normal
    moved = _adam(
        atoms, atoms_first, atoms_second, at, written, to_atom,
        decay1, weight1, decay2, weight2, rate, fix, eps,
    )  # fmt: skip
    moved = tl.where(written, moved, 0.0)
    moved /= tl.maximum(tl.sqrt(tl.sum(moved * moved)), least)
    tl.store(atoms + at, moved, mask=written)
    at = j * d_in + c
    moved = _adam(
        encoder, encoder_first, encoder_second, at, read, to_encoder,
        decay1, weight1, decay2, weight2, rate, fix, eps,
    )  # fmt: skip
    tl.store(encoder + at, moved, mask=read)
