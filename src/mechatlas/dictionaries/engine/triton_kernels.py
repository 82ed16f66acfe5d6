"""Kernels of a sparse training step in Triton, for NVIDIA and AMD GPUs.

    Screen     codes of a batch (`triton_screening`)
    residual   reconstruction, error, loss and gradients of codes in two passes over the rows
    update     gradients, Adam and unit length in one pass over the latents, written once
    step_adam  Adam of what is no latent's

The functions are those of `fallback.py`, which is the one to read, and call it for gradients that
are clipped.
"""

# Kernels are read by Triton, which need not be installed, and are not called as functions.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportMissingImports=false

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from mechatlas.dictionaries.engine import fallback, triton_screening
from mechatlas.dictionaries.engine.structures import (
    Adam,
    AddedGradients,
    Codes,
    ErrorGradients,
    Grouped,
    LatentGradients,
    Learned,
    Reconstruction,
    Update,
    Weights,
)
from mechatlas.dictionaries.engine.triton_screening import wide_block

above, group, Screen = fallback.above, fallback.group, triton_screening.Screen


def residual(task: Reconstruction, codes: Codes, out: ErrorGradients) -> Tensor:
    """Write the gradient of the reconstructions and of each code; see `fallback.residual`."""
    n, d = task.target.shape
    n_levels, losses = len(task.widths), task.target.new_empty(n)
    pairs = (task.widths, task.atoms, codes.starts, codes.latents)
    read = (task.target.contiguous(), task.scales, task.bias, codes.values, *pairs)
    _reconstruct[(n,)](*read, out.rows, losses, n, d, n_levels, wide=wide_block(d))
    for level in range(n_levels - 2, -1, -1):
        out.rows[level] += out.rows[level + 1]
    _differentiate[(n,)](*pairs, out.rows, out.codes, n, d, n_levels, wide=wide_block(d))
    out.bias.add_(out.rows[0].sum(dim=0))
    return losses.sum()


@triton.jit
def _end_of_level(latents, first, last, width, block: tl.constexpr = 128):
    """First pair of a row, from some on, whose latent is not below `width`."""
    t = tl.arange(0, block)
    end = first
    for p in range(first, last, block):
        latent = tl.load(latents + p + t, mask=p + t < last, other=0x7FFFFFFF)
        end += tl.sum((latent < width).to(tl.int64))
    return end


@triton.jit
def _reconstruct(
    target,
    scales,
    bias,
    values,
    widths,
    atoms,
    starts,
    latents,
    gradients,
    losses,
    n,
    d,
    n_levels,
    wide: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, wide)
    inside = c < d
    error = tl.load(bias + c, mask=inside, other=0.0)
    error -= tl.load(target + i * d + c, mask=inside, other=0.0)
    scale = tl.load(scales + i)
    loss = scale * 0
    first, last = tl.load(starts + i), tl.load(starts + i + 1)
    for level in range(n_levels):
        end = _end_of_level(latents, first, last, tl.load(widths + level))
        for p in range(first, end):
            j = tl.load(latents + p).to(tl.int64)
            error += tl.load(values + p) * tl.load(atoms + j * d + c, mask=inside, other=0.0)
        loss += tl.sum(error * error * scale) / 2
        tl.store(gradients + (level * n + i) * d + c, error * scale, mask=inside)
        first = end
    tl.store(losses + i, loss)


@triton.jit
def _differentiate(
    widths, atoms, starts, latents, gradients, d_codes, n, d, n_levels, wide: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, wide)
    inside = c < d
    first, last = tl.load(starts + i), tl.load(starts + i + 1)
    for level in range(n_levels):
        g = tl.load(gradients + (level * n + i) * d + c, mask=inside, other=0.0)
        end = _end_of_level(latents, first, last, tl.load(widths + level))
        for p in range(first, end):
            j = tl.load(latents + p).to(tl.int64)
            atom = tl.load(atoms + j * d + c, mask=inside, other=0.0)
            tl.store(d_codes + p, tl.sum(atom * g))
        first = end


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
    if not rule.apply or rule.clip < 1:
        return fallback.update(span, pairs, batch, weights, rule, added, d_input)
    atoms, encoder, bias = weights
    slopes = torch.empty_like(bias.value)
    own = (pairs.starts, batch.codes, added.place, added.bias, slopes, *bias)
    _step_bias[(len(span),)](*own, *rule.adam)
    d_input += slopes @ encoder.value  # before the encoder changes
    (n_levels, n, d_out), d_in = batch.rows.shape, batch.x.shape[1]
    read = (pairs.starts, pairs.rows, pairs.values, batch.codes, batch.x, batch.rows)
    read += (batch.widths, _on_device(tuple(rule.edges.tolist()), batch.x.device))
    read += (added.place, added.atoms, added.encoder, *atoms, *encoder)
    sizes = (n, d_in, d_out, n_levels, len(rule.edges) - 1)
    options = {"wide_in": wide_block(d_in), "wide_out": wide_block(d_out), "tied": rule.tied}
    _step_latent[(len(span),)](*read, rule.least, *rule.adam, *sizes, **options)
    return 0.0


def step_adam(learned: Sequence[Learned], gradients: Sequence[Tensor], adam: Adam) -> None:
    """Take one step of Adam, in place; see `fallback.step_adam`."""
    for own, gradient in zip(learned, gradients, strict=True):
        n = gradient.numel()
        _step_parameter[(triton.cdiv(n, 1024),)](*own, gradient, n, *adam, block=1024)


@triton.jit
def _step_parameter(
    value, first, second, gradient, n, decay1, weight1, decay2, weight2, rate, fix, eps,
    block: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < n
    slope = tl.load(gradient + at, mask=inside, other=0.0)
    moved = _adam(
        value, first, second, at, inside, slope, decay1, weight1, decay2, weight2, rate, fix, eps
    )
    tl.store(value + at, moved, mask=inside)


@functools.cache
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers that are the same in every step."""
    return torch.tensor(numbers, device=device)


@triton.jit
def _step_bias(
    starts,
    d_codes,
    place,
    added,
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
    row = tl.load(place + j)
    slope += tl.load(added + row, mask=row >= 0, other=0.0)
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
def _length_at(values, o, edges, site):
    """Length of a row at one of the sites, and which of its columns are there."""
    here = (o >= tl.load(edges + site)) & (o < tl.load(edges + site + 1))
    return tl.sqrt(tl.sum(tl.where(here, values * values, 0.0))), here


@triton.jit
def _step_latent(
    starts, rows, values, d_codes, x, g, widths, edges, place, added_atoms, added_encoder,
    atoms, atoms_first, atoms_second, encoder, encoder_first, encoder_second,
    least, decay1, weight1, decay2, weight2, rate, fix, eps, n, d_in, d_out, n_levels, n_sites,
    wide_in: tl.constexpr, wide_out: tl.constexpr, tied: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0).to(tl.int64)
    c, o = tl.arange(0, wide_in), tl.arange(0, wide_out)
    read, written = c < d_in, o < d_out
    level = j * 0
    for t in range(n_levels - 1):
        level += (j >= tl.load(widths + t)).to(tl.int64)
    row = tl.load(place + j).to(tl.int64)
    dead_out, dead_in = tl.where(row >= 0, d_out, 0), tl.where(row >= 0, d_in, 0)
    to_atom = tl.load(added_atoms + row * d_out + o, mask=o < dead_out, other=0.0)
    to_encoder = tl.load(added_encoder + row * d_in + c, mask=c < dead_in, other=0.0)
    for p in range(tl.load(starts + j), tl.load(starts + j + 1)):
        i = tl.load(rows + p).to(tl.int64)
        back = tl.load(g + (level * n + i) * d_out + o, mask=written, other=0.0)
        to_atom += tl.load(values + p) * back
        to_encoder += tl.load(d_codes + p) * tl.load(x + i * d_in + c, mask=read, other=0.0)
    if tied:
        to_atom += to_encoder
    at = j * d_out + o
    atom = tl.load(atoms + at, mask=written, other=0.0)
    normal, n_used = atom * 0, 0
    for site in range(n_sites):
        length, here = _length_at(atom, o, edges, site)
        normal += tl.where(here, atom / tl.maximum(length, 1.1754944e-38), 0.0)
        n_used += (length > 0).to(tl.int32)
    to_atom -= tl.sum(to_atom * normal) / tl.maximum(n_used, 1) * normal
    moved = _adam(
        atoms, atoms_first, atoms_second, at, written, to_atom,
        decay1, weight1, decay2, weight2, rate, fix, eps,
    )  # fmt: skip
    moved = tl.where(written, moved, 0.0)
    length = least * 0
    for site in range(n_sites):
        own, _ = _length_at(moved, o, edges, site)
        length += own
    tl.store(atoms + at, moved / tl.maximum(length, least), mask=written)
    if not tied:
        at = j * d_in + c
        moved = _adam(
            encoder, encoder_first, encoder_second, at, read, to_encoder,
            decay1, weight1, decay2, weight2, rate, fix, eps,
        )  # fmt: skip
        tl.store(encoder + at, moved, mask=read)
