"""A sparse training step in Triton, for NVIDIA and AMD GPUs: a pass over rows, one over latents.

    step          a step of a `SparseStep` whose sparsity rule is one of `RULES`
    keep_halves   weights and moments in bfloat16 from step to step, rounded at random
    Screen        codes of a batch, k a row (`triton_screening`)

The pass over rows finds the codes of a row, reconstructs it, and sets a bit for each code. The pass
over latents follows the bits of a latent and computes its codes once more, from the encoder row and
the atom that it holds, with their gradients; it takes the step of Adam and writes once. Pairs of a
row and a latent are no list, so nobody needs to know how many there are: the host reads no number
of a step, and there is room for all.

`fallback.py` has the parts of the same step in plain torch, and is the one to read.
"""

# Kernels are read by Triton, which need not be installed, and are not called as functions.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportMissingImports=false

import functools
import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechatlas.dictionaries.autoencoder import SMALLEST_LENGTH, LinearCoder
from mechatlas.dictionaries.engine import steps
from mechatlas.dictionaries.engine.interface import Dead, StepResult
from mechatlas.dictionaries.engine.sparse_steps import SparseStep, read_rows
from mechatlas.dictionaries.engine.structures import AddedGradients
from mechatlas.dictionaries.engine.threads import Run
from mechatlas.dictionaries.engine.triton_screening import EXTRA, Screen, reaches, wide_block
from mechatlas.dictionaries.sparsity import BatchTopK, Gated, JumpReLU, ReLU, TopK

__all__ = ["RULES", "Screen", "keep_halves", "step"]

RULES = (TopK, BatchTopK, ReLU, JumpReLU, Gated)
"""Sparsity rules whose codes the kernels compute."""
PLAIN, JUMP, GATED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Ways in which a code follows from its pre-activation."""
WORD = tl.constexpr(31)
"""Rows whose bits are one number; the sign stays free."""
SHARE = 8
"""Latents of a program: what they add to the gradient of the encoder's input is written once."""
BLOCK = 1024
"""Latents whose bounds the pass over rows reads at once."""
LANES = 512
"""Numbers of a row for each warp of a program."""
RATE, CORRECTION, PENALTY, BY_GATES, NUMBER = map(tl.constexpr, range(5))
"""Places of the numbers of a step that change from one to the next: read from a tensor, so that a
graph can repeat the step. Two of Adam, the penalty of a code, the weight of the gates' error, and
how many steps there were."""
DECAY1, DECAY2 = map(tl.constexpr, steps.BETAS)
EPSILON, LEAST = tl.constexpr(steps.EPSILON), tl.constexpr(SMALLEST_LENGTH)


class Numbers(NamedTuple):
    """Numbers of a sparsity rule at one step."""

    kind: int
    low: Float[Tensor, " latent"]
    """Bounds above which a pre-activation is a code or its threshold learns from it."""
    own: Float[Tensor, " latent"]
    """Threshold of each latent, or factor of its gate."""
    offset: Float[Tensor, " latent"]
    """Offset of the size of a code from its gate."""
    bandwidth: float
    learned: tuple[str, ...]
    """Names of the tensors of the rule that learn."""


class Pass(NamedTuple):
    """Results of the pass over rows, which that over latents reads."""

    bits: Int[Tensor, "latent word"]
    """Rows with a code of a latent."""
    x: Float[Tensor, "batch d_in"]
    rows: Float[Tensor, "levels batch d_out"]
    """Gradient of the part of a reconstruction that each level adds."""
    gates: Float[Tensor, "batch d_out"]
    """Gradient of the reconstruction by the gates, if there are any."""


def numbers_of(step: SparseStep) -> Numbers:
    """Numbers of the rule of a `SparseStep`."""
    rule, state, bias = step.dictionary.rule, step.dictionary.state, step.dictionary.b_enc.data
    if isinstance(rule, JumpReLU):
        own, low = state["log_threshold"].detach().exp(), rule.least_that_learns(state)
        return Numbers(JUMP.value, low, own, bias, rule.bandwidth, ("log_threshold",))
    low = torch.zeros_like(bias)
    if isinstance(rule, Gated):
        own, offset = state["r_mag"].detach().exp(), state["b_mag"].detach()
        return Numbers(GATED.value, low, own, offset, 1.0, ("r_mag", "b_mag"))
    return Numbers(PLAIN.value, low, bias, bias, 1.0, ())


def keep_halves(dictionary: LinearCoder) -> None:
    """Round atoms and encoder to bfloat16, in which steps leave them.

    Behind each encoder row there is room for what bounds the error of its product.
    """
    dictionary.W_dec.data = dictionary.W_dec.data.bfloat16()
    if not dictionary.tied:
        rows = dictionary.encoder_rows
        wide = rows.new_zeros(len(rows), dictionary.d_in + EXTRA, dtype=torch.bfloat16)
        wide[:, : dictionary.d_in] = rows
        dictionary.encoder_parameters[0].data = wide[:, : dictionary.d_in].T


def step(
    step: SparseStep, x: Float[Tensor, "batch width"], lr: float, dead: Dead | None,
    sparsity_coefficient: float, run: Run,
) -> StepResult:  # fmt: skip
    """Change the dictionary of a `SparseStep`; see `interface.Step`.

    Args:
        step: Step, which has the moments.
        x: Rows of activations.
        lr: Learning rate.
        dead: Latents that also learn from the residual.
        sparsity_coefficient: Fraction of the sparsity penalty that counts.
        run: Runner of the work on tiles of the batch.
    """
    step.n_steps += 1
    dictionary, rule, adam = step.dictionary, step.dictionary.rule, steps.adam(lr, step.n_steps)
    penalty = sparsity_coefficient / len(x) * getattr(rule, "l0", getattr(rule, "l1", 0.0))
    now, by_gates = step.room_for("now", (5,), x), sparsity_coefficient * len(step.levels)
    _note[(1,)](now, adam.rate, adam.correction, penalty, by_gates, float(step.n_steps))
    work = functools.partial(_take, step, dead=dead, run=run)
    if type(step) is not SparseStep or (dead is not None and len(dead[1])):
        return work(x)
    learned = dictionary.parameters(), dictionary.buffers(), *step.moments.values()
    return step.repeated(work, x, itertools.chain(*learned), step.room)


def _take(
    step: SparseStep, x: Float[Tensor, "batch width"], *, dead: Dead | None, run: Run
) -> StepResult:
    """Take a step whose numbers are noted, and which is the same for all batches of one shape.

    Args:
        step: Step, which has the moments.
        x: Rows of activations.
        dead: Latents that also learn from the residual.
        run: Runner of the work on tiles of the batch.
    """
    dictionary, widths, now = step.dictionary, step.levels, step.room["now"]
    n, n_levels, target = len(x), len(widths), x[:, dictionary.writes]
    (m, d_out), d_in = dictionary.W_dec.shape, dictionary.d_in
    codes = step.select(x, run) if hasattr(dictionary.rule, "k") else None
    numbers = numbers_of(step)
    scales = step.objective.weights(target).mul_(2 / n / n_levels)
    bits = torch.zeros(m, triton.cdiv(n, WORD.value), dtype=torch.int32, device=x.device)
    g = step.room_for("g", (n_levels, n, d_out), target)
    gates = step.room_for("gates", (n, d_out), target) if numbers.kind == GATED.value else g[0]
    losses = target.new_empty(n)
    written = (scales, dictionary.b_dec.data, widths, dictionary.W_dec.data, bits, g)
    sizes = (n, d_out, n_levels, bits.shape[1])
    options = {"wide_out": wide_block(d_out), "num_warps": _warps(max(d_in, d_out))}
    if codes is not None:
        target = step.left_by_others(target, codes).contiguous()
        _rebuild[(n,)](target, *written, losses, *codes[:3], *sizes, **options)
    else:
        encoder = dictionary.encoder_rows, dictionary.b_enc.data
        screen, own = Screen(*encoder), (*numbers[1:4], numbers.low.amin(), now)
        read, target = step.room_for("x", (n, d_in), x), target.contiguous()
        pitch = encoder[0].stride(0)
        for span in step.spans(x):
            rows = read_rows(dictionary, x[span], read[span])
            bounds = (*screen.bounds(rows), screen.reach, screen.furthest)
            _rebuild_above[(len(rows),)](
                target, *written, losses, gates, read, *encoder, *bounds, *own,
                *sizes, span.start, m, pitch, d_in, block=min(BLOCK, wide_block(m)),
                wide_in=wide_block(d_in), kind=numbers.kind, **options,
            )  # fmt: skip
    for level in range(n_levels - 2, -1, -1):
        g[level] += g[level + 1]
    left = Pass(bits, step.room_for("x", (n, d_in), x), g, gates)
    fired = _descend(step, left, numbers, step.revival(dead, scales, g))
    return StepResult(steps.at_hand(losses.sum()), fired)


def _descend(
    step: SparseStep, batch: Pass, numbers: Numbers, added: AddedGradients
) -> Bool[Tensor, " latent"]:
    """Take the step of all parameters; latents that had a code.

    Args:
        step: Step, which has the moments.
        batch: Results of the pass over rows.
        numbers: Numbers of the rule.
        added: Gradients of dead latents.
    """
    dictionary, now = step.dictionary, step.room["now"]
    (m, d_out), d_in, n = dictionary.W_dec.shape, dictionary.d_in, len(batch.x)
    names = ["W_dec", "W_dec" if dictionary.tied else "W_enc", "b_enc", *numbers.learned]
    learned = [t for name in names for t in step.learned(name)]
    learned += step.learned("b_enc") * (5 - len(names))  # not looked at
    programs = triton.cdiv(m, SHARE)
    fired = torch.empty(m, dtype=torch.bool, device=batch.x.device)
    through, squares = batch.x.new_empty(programs, d_in), batch.x.new_empty(m)
    edges = _on_device(tuple(dictionary.edges), batch.x.device)
    read = (*batch, step.levels, edges, *added, *numbers[2:4], *learned)
    pitch = learned[3].stride(0)
    n_levels, n_sites = len(step.levels), len(dictionary.edges) - 1
    sizes = (n, m, pitch, d_in, d_out, n_levels, n_sites, batch.bits.shape[1])
    options = {
        "words": wide_block(batch.bits.shape[1]), "wide_in": wide_block(d_in),
        "wide_out": wide_block(d_out), "tied": dictionary.tied, "kind": numbers.kind,
        "share": SHARE, "num_warps": _warps(max(d_in, d_out)),
    }  # fmt: skip

    def learn(factor: Tensor, *, apply: bool) -> Tensor:
        out = (fired, through, squares, factor, now, numbers.bandwidth)
        _learn[(programs,)](*read, *out, *sizes, **options, apply=apply)
        slope = batch.rows[0].sum(dim=0)
        d_input = step.over_all(through.sum(dim=0)) if dictionary.subtracts_b_dec else 0.0
        return slope.sub_(d_input)

    factor = _on_device((1.0,), batch.x.device)
    if step.objective.clip is not None:
        bias = learn(factor, apply=False)
        total = step.over_all(squares.double().sum()) + bias.double().square().sum()
        factor = step.objective.factor_of(total).float()
    bias = learn(factor, apply=True)
    grid = (triton.cdiv(d_out, 1024),)
    _step_parameter[grid](*step.learned("b_dec"), bias, factor, now, d_out, block=1024)
    return fired


def _warps(width: int) -> int:
    """Warps of a program that holds rows of some width."""
    return min(16, max(4, wide_block(width) // LANES))


@functools.cache
def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers that are the same in every step."""
    return torch.tensor(numbers, device=device)


@triton.jit
def _note(now, rate, correction, penalty, by_gates, number):
    """Write the numbers of a step."""
    tl.store(now + RATE, rate)
    tl.store(now + CORRECTION, correction)
    tl.store(now + PENALTY, penalty)
    tl.store(now + BY_GATES, by_gates)
    tl.store(now + NUMBER, number)


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
def _set_bit(bits, j, i, n_words, mask):
    """Note that a row has a code of a latent."""
    one = (i * 0 + 1).to(tl.int32)
    tl.atomic_or(bits + j * n_words + i // WORD, one << (i % WORD).to(tl.int32), mask=mask)


@triton.jit
def _rebuild(
    target, scales, bias, widths, atoms, bits, gradients, losses, starts, latents, values,
    n, d, n_levels, n_words, wide_out: tl.constexpr,
):  # fmt: skip
    """Reconstruct a row from its codes."""
    i = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, wide_out)
    inside = o < d
    error = tl.load(bias + o, mask=inside, other=0.0)
    error -= tl.load(target + i * d + o, mask=inside, other=0.0)
    scale = tl.load(scales + i)
    loss = scale * 0
    first, last = tl.load(starts + i), tl.load(starts + i + 1)
    for level in range(n_levels):
        end = _end_of_level(latents, first, last, tl.load(widths + level))
        for p in range(first, end):
            j = tl.load(latents + p).to(tl.int64)
            value = tl.load(values + p)
            error += value * tl.load(atoms + j * d + o, mask=inside, other=0.0).to(tl.float32)
            _set_bit(bits, j, i, n_words, value > 0)
        loss += tl.sum(error * error * scale) / 2
        tl.store(gradients + (level * n + i) * d + o, error * scale, mask=inside)
        first = end
    tl.store(losses + i, loss)


@triton.jit
def _rebuild_above(
    target, scales, bias, widths, atoms, bits, gradients, losses, gates,
    x, encoder, encoder_bias, bounds, lengths, reach, furthest,
    low, own, offset, lowest, now,
    n, d, n_levels, n_words, before, m, pitch, d_in,
    block: tl.constexpr, wide_in: tl.constexpr, wide_out: tl.constexpr, kind: tl.constexpr,
):  # fmt: skip
    """Find the codes of a row above their bounds, and reconstruct it."""
    t = tl.program_id(0).to(tl.int64)  # of the tile
    i = t + before
    c, o, s = tl.arange(0, wide_in), tl.arange(0, wide_out), tl.arange(0, block)
    inside = o < d
    row = tl.load(x + i * d_in + c, mask=c < d_in, other=0.0)
    error = tl.load(bias + o, mask=inside, other=0.0)
    error -= tl.load(target + i * d + o, mask=inside, other=0.0)
    by_gates = error
    scale = tl.load(scales + i)
    loss, size = scale * 0, scale * 0
    begin = tl.program_id(0) * 0
    for level in range(n_levels):
        end = tl.load(widths + level).to(tl.int32)
        for first in range(begin, end, block):
            at = first + s
            near = reaches(
                bounds, lengths, reach, furthest, t, tl.load(lowest), low, at, end, m, True
            )
            j = tl.min(tl.where(near, at, end), 0)
            while j < end:
                to = j.to(tl.int64)
                weights = tl.load(encoder + to * pitch + c, mask=c < d_in, other=0.0)
                pre = tl.sum(row * weights.to(tl.float32)) + tl.load(encoder_bias + j)
                found = pre > tl.load(low + j)
                _set_bit(bits, to, i, n_words, found)
                value = tl.where(found, pre, 0.0)
                if kind == JUMP:
                    value = tl.where(pre > tl.load(own + j), value, 0.0)
                    size += tl.where(value > 0, 1.0, 0.0)
                else:
                    size += value
                atom = tl.load(atoms + to * d + o, mask=o < tl.where(found, d, 0), other=0.0)
                atom = atom.to(tl.float32)
                if kind == GATED:
                    by_gates += value * atom
                    value = tl.maximum(value * tl.load(own + j) + tl.load(offset + j), 0.0)
                error += value * atom
                j = tl.min(tl.where(near & (at > j), at, end), 0)
        loss += tl.sum(error * error * scale) / 2
        tl.store(gradients + (level * n + i) * d + o, error * scale, mask=inside)
        begin = end
    if kind == GATED:
        scale *= tl.load(now + BY_GATES)
        loss += tl.sum(by_gates * by_gates * scale) / 2
        tl.store(gates + i * d + o, by_gates * scale, mask=inside)
    tl.store(losses + i, loss + tl.load(now + PENALTY) * size)


@triton.jit
def _mixed(x):
    """Bits of a number that follow from it and look random (lowbias32 of Wellons, 2018)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _write(to, at, inside, value, now, which: tl.constexpr):
    """Write numbers; in bfloat16 rounded up or down, as likely as each is near.

    That follows from the number of the step, the tensor (`which`) and the place in it.
    """
    if to.dtype.element_ty == tl.bfloat16:
        key = _mixed(tl.load(now + NUMBER).to(tl.uint32) * 8 + which)
        bits = value.to(tl.uint32, bitcast=True) + (_mixed(at.to(tl.uint32) ^ key) & 0xFFFF)
        value = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    tl.store(to + at, value, mask=inside)


@triton.jit
def _adam(value, first, second, at, inside, gradient, now, which: tl.constexpr):
    """Parameter after a step of Adam, whose moments are written."""
    m1 = tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
    m2 = tl.load(second + at, mask=inside, other=0.0).to(tl.float32)
    m1 = DECAY1 * m1 + (1 - DECAY1) * gradient
    m2 = DECAY2 * m2 + (1 - DECAY2) * gradient * gradient
    _write(first, at, inside, m1, now, which)
    _write(second, at, inside, m2, now, which + 1)
    down = tl.sqrt(m2) * tl.load(now + CORRECTION) + EPSILON
    return value - tl.load(now + RATE) * m1 / down


@triton.jit
def _step_number(value, first, second, at, slope, now):
    """Step of one number, in float32."""
    moved = _adam(tl.load(value + at), first, second, at, at >= 0, slope, now, 0)
    tl.store(value + at, moved)


@triton.jit
def _step_parameter(value, first, second, gradient, factor, now, n, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < n
    slope = tl.load(gradient + at, mask=inside, other=0.0) * tl.load(factor)
    moved = tl.load(value + at, mask=inside, other=0.0)
    moved = _adam(moved, first, second, at, inside, slope, now, 0)
    tl.store(value + at, moved, mask=inside)


@triton.jit
def _length_at(values, o, edges, site):
    """Length of a row at one of the sites, and which of its columns are there."""
    here = (o >= tl.load(edges + site)) & (o < tl.load(edges + site + 1))
    return tl.sqrt(tl.sum(tl.where(here, values * values, 0.0))), here


@triton.jit
def _tangent(slope, atom, o, edges, n_sites):
    """Gradient of an atom without the part that would change its length."""
    normal, n_used = atom * 0, 0
    for site in range(n_sites):
        length, here = _length_at(atom, o, edges, site)
        normal += tl.where(here, atom / tl.maximum(length, 1.1754944e-38), 0.0)
        n_used += (length > 0).to(tl.int32)
    return slope - tl.sum(slope * normal) / tl.maximum(n_used, 1) * normal


@triton.jit
def _of_code(pre, d_code, d_gate, own, offset, penalty, bandwidth, kind: tl.constexpr):
    """Code, gradients of its pre-activation and of the tensors of the rule; 1 if it is not zero."""
    value, to_p, to_q = tl.maximum(pre, 0.0), pre * 0, pre * 0
    d_pre, is_code = d_code + penalty, pre * 0 + 1
    if kind == JUMP:
        near = tl.abs(pre - own) < bandwidth / 2
        to_p = tl.where(near, (own * d_code + penalty) * (own / -bandwidth), 0.0)
        is_code = tl.where(pre > own, 1.0, 0.0)
        value, d_pre = value * is_code, d_code * is_code
    if kind == GATED:
        value = tl.maximum(pre * own + offset, 0.0)
        is_code = tl.where(value > 0, 1.0, 0.0)
        to_q = d_code * is_code
        to_p = to_q * pre * own
        d_pre = to_q * own + penalty + d_gate
    return value, d_pre, to_p, to_q, is_code


@triton.jit
def _slopes(
    set_bits, row, atom, constant, to_row, to_atom, x, g, gates, own, offset, penalty, bandwidth,
    d_in, d_out, words: tl.constexpr, wide_in: tl.constexpr, wide_out: tl.constexpr,
    kind: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of a latent over the rows of its bits; number of its codes."""
    c, o, w = tl.arange(0, wide_in), tl.arange(0, wide_out), tl.arange(0, words)
    slope, p, q, n_codes = constant * 0, constant * 0, constant * 0, constant * 0
    t = tl.min(tl.where(set_bits != 0, w, words), 0)
    while t < words:
        word = tl.sum(tl.where(w == t, set_bits, 0), 0)
        while word != 0:
            bit = word & -word
            word = word ^ bit
            exponent = bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23
            i = (t * WORD + exponent - 127).to(tl.int64)
            x_i = tl.load(x + i * d_in + c, mask=c < d_in, other=0.0)
            back = tl.load(g + i * d_out + o, mask=o < d_out, other=0.0)
            d_gate = constant * 0
            if kind == GATED:
                of_gates = tl.load(gates + i * d_out + o, mask=o < d_out, other=0.0)
                d_gate = tl.sum(atom * of_gates)
            value, d_pre, to_p, to_q, is_code = _of_code(
                tl.sum(row * x_i) + constant, tl.sum(atom * back), d_gate,
                own, offset, penalty, bandwidth, kind,
            )  # fmt: skip
            to_atom += value * back
            to_row += d_pre * x_i
            slope, p, q, n_codes = slope + d_pre, p + to_p, q + to_q, n_codes + is_code
        t = tl.min(tl.where((set_bits != 0) & (w > t), w, words), 0)
    return to_row, to_atom, slope, p, q, n_codes


@triton.jit
def _move(
    atom, row, to_atom, to_row, slope, to_p, to_q,
    atoms, atoms1, atoms2, encoder, encoder1, encoder2, bias, bias1, bias2, p, p1, p2, q, q1, q2,
    edges, now, j, pitch, d_in, d_out, n_sites,
    wide_in: tl.constexpr, wide_out: tl.constexpr, tied: tl.constexpr, kind: tl.constexpr,
):  # fmt: skip
    """Take the step of Adam of a latent, and give its atom length 1."""
    c, o = tl.arange(0, wide_in), tl.arange(0, wide_out)
    at = j * d_out + o
    atom = _adam(atom, atoms1, atoms2, at, o < d_out, to_atom, now, 1)
    atom = tl.where(o < d_out, atom, 0.0)
    length = slope * 0
    for site in range(n_sites):
        of_site, _ = _length_at(atom, o, edges, site)
        length += of_site
    _write(atoms, at, o < d_out, atom / tl.maximum(length, LEAST), now, 0)
    if not tied:
        row = _adam(row, encoder1, encoder2, j * d_in + c, c < d_in, to_row, now, 4)
        _write(encoder, j * pitch + c, c < d_in, row, now, 3)
    _step_number(bias, bias1, bias2, j, slope, now)
    if kind != PLAIN:
        _step_number(p, p1, p2, j, to_p, now)
    if kind == GATED:
        _step_number(q, q1, q2, j, to_q, now)


@triton.jit
def _learn(
    bits, x, g, gates, widths, edges, place, added_atoms, added_encoder, added_bias, own, offset,
    atoms, atoms1, atoms2, encoder, encoder1, encoder2, bias, bias1, bias2, p, p1, p2, q, q1, q2,
    fired, through, squares, factor, now, bandwidth,
    n, m, pitch, d_in, d_out, n_levels, n_sites, n_words,
    words: tl.constexpr, wide_in: tl.constexpr, wide_out: tl.constexpr, tied: tl.constexpr,
    kind: tl.constexpr, share: tl.constexpr, apply: tl.constexpr,
):  # fmt: skip
    """Gradients of some latents, and their step or the squares of their gradients."""
    c, o, w = tl.arange(0, wide_in), tl.arange(0, wide_out), tl.arange(0, words)
    sent = tl.zeros([wide_in], tl.float32)
    first = tl.program_id(0) * share
    for number in range(first, tl.minimum(first + share, m)):
        j = number + first.to(tl.int64) * 0
        level = j * 0
        for t in range(n_levels - 1):
            level += (j >= tl.load(widths + t)).to(tl.int64)
        atom = tl.load(atoms + j * d_out + o, mask=o < d_out, other=0.0).to(tl.float32)
        row = tl.load(encoder + j * pitch + c, mask=c < d_in, other=0.0).to(tl.float32)
        dead = tl.load(place + j).to(tl.int64)
        dead_out, dead_in = tl.where(dead >= 0, d_out, 0), tl.where(dead >= 0, d_in, 0)
        to_atom = tl.load(added_atoms + dead * d_out + o, mask=o < dead_out, other=0.0)
        to_row = tl.load(added_encoder + dead * d_in + c, mask=c < dead_in, other=0.0)
        set_bits = tl.load(bits + j * n_words + w, mask=w < n_words, other=0)
        to_row, to_atom, slope, to_p, to_q, n_codes = _slopes(
            set_bits, row, atom, tl.load(bias + j), to_row, to_atom, x, g + level * n * d_out,
            gates, tl.load(own + j), tl.load(offset + j), tl.load(now + PENALTY), bandwidth,
            d_in, d_out, words, wide_in, wide_out, kind,
        )  # fmt: skip
        sent += slope * row  # what dead latents learn has no part in it
        tl.store(fired + j, n_codes > 0)
        slope += tl.load(added_bias + dead, mask=dead >= 0, other=0.0)
        if tied:
            to_atom += to_row
        to_atom = _tangent(to_atom, atom, o, edges, n_sites)
        if apply:
            s = tl.load(factor)
            _move(
                atom, row, to_atom * s, to_row * s, slope * s, to_p * s, to_q * s,
                atoms, atoms1, atoms2, encoder, encoder1, encoder2,
                bias, bias1, bias2, p, p1, p2, q, q1, q2,
                edges, now, j, pitch, d_in, d_out, n_sites, wide_in, wide_out, tied, kind,
            )  # fmt: skip
        else:
            square = slope * slope + to_p * to_p + to_q * to_q + tl.sum(to_atom * to_atom)
            if not tied:
                square += tl.sum(to_row * to_row)
            tl.store(squares + j, square)
    tl.store(through + tl.program_id(0).to(tl.int64) * d_in + c, sent, mask=c < d_in)
