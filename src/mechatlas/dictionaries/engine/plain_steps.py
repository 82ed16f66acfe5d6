"""A sparse training step in plain torch, for any device; of all forms of a step the one to read.

    learn    a dictionary is changed by a batch, given its codes

It works on a whole batch and on all latents at once, so that a step is few operators, and reads no
number of a tensor, so that nobody waits for a device: shapes, and bounds of bags, say what a batch
holds. It uses no product of sparse matrices, which on some CPUs torch does not have: sums over the
codes of a row or of a latent are bags of embeddings.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mechatlas.dictionaries.engine import fallback, steps
from mechatlas.dictionaries.engine.fallback import rows_of, summed
from mechatlas.dictionaries.engine.interface import Dead, StepResult
from mechatlas.dictionaries.engine.structures import Codes

if TYPE_CHECKING:
    from mechatlas.dictionaries.engine.sparse_steps import SparseStep

GATHERED = {"cpu": 2**22, "cuda": 2**28}
"""Numbers of atoms that are gathered at once, by kind of device."""


def learn(
    step: "SparseStep",
    x: Float[Tensor, "batch width"],
    codes: Codes,
    lr: float,
    dead: Dead | None,
    sparsity_coefficient: float,
) -> StepResult:
    """Change a dictionary by a batch; see `interface.Step`.

    Args:
        step: Dictionary with its moments.
        x: Rows of the batch.
        codes: Codes of the batch.
        lr: Learning rate.
        dead: Latents that also learn from the residual.
        sparsity_coefficient: Fraction of the sparsity penalty that counts.
    """
    dictionary, m = step.dictionary, step.dictionary.n_latents
    step.n_steps += 1
    target, weight = x[:, dictionary.writes], sparsity_coefficient / len(x)
    scales = step.objective.weights(target).mul_(2 / len(x) / len(step.levels))
    target = step.left_by_others(target, codes)
    loss, rows, (d_code, *d_gates), (back, index) = _rebuild(
        step, target, scales, codes, sparsity_coefficient
    )
    penalty, learned = dictionary.rule.penalize_codes(codes, d_code, weight, dictionary.state)
    grouped = codes.latents
    if d_gates:  # a gate learns where it is open, even if its size is zero
        d_code.add_(d_gates[0])
    else:  # codes of zero are behind the last latent, and none of its pairs
        silent = codes.values == 0
        grouped = grouped.masked_fill(silent, m)
        d_code.masked_fill_(silent, 0)
    ordered = grouped.sort(stable=True)
    numbers = torch.arange(m + 1, device=x.device, dtype=grouped.dtype)
    starts, order = torch.searchsorted(ordered.values, numbers), ordered.indices
    if d_gates:
        largest = codes.values.new_zeros(m)
        fired = largest.scatter_reduce_(0, grouped.long(), codes.values, "amax") > 0
    else:
        fired = starts[1:] > starts[:-1]
    read, rows, d_code = step.room["x"], rows[order], d_code[order]
    slopes = {
        "W_dec": summed(index[order], back.flatten(0, 1), starts, codes.values[order]),
        "W_enc": summed(rows, read, starts, d_code),
        "b_enc": summed(rows, torch.ones_like(read[:, :1]), starts, d_code)[:, 0],
    }
    bias = back[0].sum(dim=0)
    if dictionary.subtracts_b_dec:
        bias -= step.over_all(slopes["b_enc"] @ dictionary.encoder_rows)
    if dead is not None and step.n_dead(dead):
        chosen, *added = step.revive(dead, read, back[-1] / -scales[:, None])
        for slope, gradient in zip(slopes.values(), added, strict=True):
            slope[chosen] += gradient
    descend(step, slopes, {**learned, "b_dec": bias}, lr)
    return StepResult(steps.at_hand(loss + penalty), fired)


def _rebuild(
    step: "SparseStep",
    target: Float[Tensor, "batch d_out"],
    scales: Float[Tensor, " batch"],
    codes: Codes,
    sparsity_coefficient: float,
) -> tuple[Tensor, Tensor, list[Tensor], tuple[Tensor, Tensor]]:
    """Reconstruct the rows of a batch.

    Args:
        step: Dictionary.
        target: Rows.
        scales: Twice the weight of each row's squared error.
        codes: Codes of the batch.
        sparsity_coefficient: Fraction of the sparsity penalty that counts.

    Returns:
        The loss; the row of each pair; the gradient of each code, and of each gate if there are
        gates; the gradient of the part of the reconstruction that each level adds, and the row of
        each pair there.
    """
    dictionary, levels = step.dictionary, step.levels
    latents, rows, atoms = codes.latents.long(), rows_of(codes), dictionary.W_dec.data
    level = torch.searchsorted(levels, latents, right=True) if len(levels) > 1 else None
    back = step.room_for("g", (len(levels), *target.shape), target)
    error = constant = dictionary.b_dec.data - target
    losses = []
    for i in range(len(levels)):
        values = codes.values if level is None else codes.values * (level == i)
        error = error + summed(latents, atoms, codes.starts, values)
        torch.mul(error, scales[:, None], out=back[i])
        losses.append((error * back[i]).sum())
    for i in range(len(levels) - 2, -1, -1):
        back[i] += back[i + 1]
    index = rows if level is None else level * len(target) + rows
    sides = [(back.flatten(0, 1), index)]
    if dictionary.rule.has_gates:  # a code of their own, by a decoder that does not learn from it
        error = constant + summed(latents, atoms, codes.starts, codes.raw)
        of_gates = error * (scales * (sparsity_coefficient * len(levels)))[:, None]
        losses.append((error * of_gates).sum())
        sides.append((of_gates, rows))
    loss = functools.reduce(torch.add, losses) / 2
    return loss, rows, _along(atoms, latents, sides), (back, index)


def _along(
    atoms: Float[Tensor, "latent d_out"], latents: Tensor, sides: Sequence[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """Products of the atom of each pair with a row of each table.

    Args:
        atoms: Atoms.
        latents: Latent of each pair.
        sides: Tables, each with the row of each pair.
    """
    found = [table.new_empty(len(latents)) for table, _ in sides]
    share = max(1, GATHERED.get(atoms.device.type, 2**24) // atoms.shape[1])
    for low in range(0, len(latents), share):
        part = slice(low, low + share)
        own = atoms.index_select(0, latents[part])
        for (table, index), out in zip(sides, found, strict=True):
            torch.sum(own * table.index_select(0, index[part]), dim=-1, out=out[part])
    return found


def descend(
    step: "SparseStep", slopes: dict[str, Tensor], others: dict[str, Tensor], lr: float
) -> None:
    """Take the step of Adam of all parameters, and give atoms length 1.

    Args:
        step: Dictionary with its moments.
        slopes: Gradients of atoms, encoder and its bias. Changed.
        others: Gradients of what these latents share with those of other processes, and of the
            tensors of the rule.
        lr: Learning rate.
    """
    dictionary, objective, atoms = step.dictionary, step.objective, step.dictionary.W_dec.data
    if dictionary.tied:
        slopes["W_dec"] += slopes.pop("W_enc")
    fallback.remove_along(slopes["W_dec"], atoms, list(dictionary.edges))
    gradients = [*slopes.values(), *others.values()]
    if objective.clip is not None:
        own = [slope.double().square().sum() for slope in slopes.values()]
        squares = step.over_all(functools.reduce(torch.add, own))
        rest = [slope.square().sum().double() for slope in others.values()]
        squares = squares + functools.reduce(torch.add, rest)
        gradients = torch._foreach_mul(gradients, objective.factor_of(squares).to(atoms.dtype))
    learned = [step.learned(name) for name in (*slopes, *others)]
    fallback.step_adam(learned, gradients, steps.adam(lr, step.n_steps))
    dictionary.normalize()
