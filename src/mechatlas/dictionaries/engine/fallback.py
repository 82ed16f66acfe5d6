"""Kernels of a sparse training step in plain torch, for any device.

The functions are those of `kernels.py`, with the same results to rounding. They use no product
of sparse matrices, which on some CPUs torch does not have: sums over the codes of a row or
of a latent are bags of embeddings.
"""

from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from mechatlas.dictionaries.engine.structures import (
    Adam,
    AddedGradients,
    Codes,
    ErrorGradients,
    Grouped,
    LatentGradients,
    Reconstruction,
    Update,
    Weights,
)

PAIRS = 4096
"""Pairs of a row and a latent worked on at once: each has a whole atom."""


def select(
    pre: Float[Tensor, "row latent"],
    bias: Float[Tensor, " latent"],
    k: int,
    values: Float[Tensor, "row k"],
    latents: Int[Tensor, "row k"],
) -> None:
    """Write the k largest of each row of `pre + bias` (zero if below) and their latents.

    Args:
        pre: Pre-activations without the bias. May be overwritten.
        bias: Bias of each latent.
        k: Codes of each row.
        values: Codes, written in any order within a row.
        latents: Latent of each code. Written.
    """
    top = pre.add_(bias).topk(k, dim=-1)
    values.copy_(top.values.relu())
    latents.copy_(top.indices)


def above(
    pre: Float[Tensor, "row latent"], bias: Float[Tensor, " latent"], low: Float[Tensor, " latent"]
) -> tuple[Int[Tensor, " row"], Int[Tensor, " pairs"], Float[Tensor, " pairs"]]:
    """Find the entries of `pre + bias` above a bound of their latent.

    Args:
        pre: Pre-activations without the bias. May be overwritten.
        bias: Bias of each latent.
        low: Bound of each latent.

    Returns:
        Number of entries in each row, and latents and values of all entries, row by row.
    """
    whole = pre.add_(bias)
    kept = whole > low
    return kept.sum(dim=1), kept.nonzero()[:, 1].int(), whole[kept]


def residual(task: Reconstruction, codes: Codes, out: ErrorGradients) -> float:
    """Write the gradient of the reconstructions and of each code.

    Args:
        task: Some rows to reconstruct.
        codes: Codes of the batch, with `starts` of these rows.
        out: Gradients. `rows` of each level is written, with those of all wider levels added;
            `codes` and `bias` are added to.

    Returns:
        The squared errors times their weights, summed over rows and levels.
    """
    widths = task.widths
    pairs = slice(int(codes.starts[0]), int(codes.starts[-1]))
    latents, values = codes.latents[pairs], codes.values[pairs]
    counts = codes.starts[1:] - codes.starts[:-1]
    rows = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    level = torch.searchsorted(widths, latents.long(), right=True)
    error, loss = task.bias - task.target, 0.0
    for i in range(len(widths)):
        weights = values if len(widths) == 1 else values * (level == i)
        offsets = codes.starts[:-1] - codes.starts[0]
        error = error + embedding_bag(
            latents.long(), task.atoms, offsets, per_sample_weights=weights, mode="sum"
        )
        loss += float((error.square().sum(dim=-1) * task.scales).sum()) / 2
        out.rows[i] = error * task.scales[:, None]
    for i in range(len(widths) - 2, -1, -1):
        out.rows[i] += out.rows[i + 1]
    out.bias.add_(out.rows[0].sum(dim=0))
    gradient = out.codes[pairs]
    for i in range(0, len(gradient), PAIRS):
        part = slice(i, i + PAIRS)
        atoms, back = task.atoms[latents[part].long()], out.rows[level[part], rows[part]]
        gradient[part] += (atoms * back).sum(dim=-1)
    return loss


def group(
    latents: Int[Tensor, " pairs"], values: Float[Tensor, " pairs"], n_latents: int
) -> tuple[Int[Tensor, " grouped"], Int[Tensor, " latents_and_one"]]:
    """Group the pairs of a row and a latent with a non-zero value by latent.

    Args:
        latents: Latent of each pair.
        values: Value of each pair.
        n_latents: Number of latents, of which some may have no pair.

    Returns:
        Pairs, latent by latent and in their own order within each, and where each latent's
        begin (one entry more than there are latents).
    """
    ordered = latents.masked_fill(values == 0, n_latents).sort(stable=True)
    bounds = torch.arange(n_latents + 1, device=latents.device, dtype=latents.dtype)
    starts = torch.searchsorted(ordered.values, bounds)
    return ordered.indices[: int(starts[-1])], starts


def update(
    span: range,
    pairs: Grouped,
    batch: LatentGradients,
    weights: Weights,
    rule: Update,
    added: AddedGradients,
    d_input: Tensor,
) -> float:
    """Take one step of Adam on the latents of a span, and add to the input's gradient.

    Args:
        span: Latents to update.
        pairs: Codes of the batch latent by latent.
        batch: Rows that the encoder read, and the gradients that `residual` wrote.
        weights: Parameters and moments. Changed in place.
        rule: Numbers of the update.
        added: Gradients of dead latents.
        d_input: Gradient of the sum of the encoder's inputs, (d_in,). Added to.

    Returns:
        Sum of the squared gradients if they were only measured, else 0.
    """
    names = ("atoms", "bias") if rule.tied else Weights._fields
    own = slice(span.start, span.stop)
    parts = {name: [t[own] for t in getattr(weights, name)] for name in names}
    gradients = _gradients(span, pairs, batch)
    d_input += gradients["bias"] @ weights.encoder.value[own]
    dead = (added.place[own] >= 0).nonzero()[:, 0]
    places = added.place[own][dead].long()
    for name, gradient in gradients.items():
        gradient[dead] += getattr(added, name)[places]
    if rule.tied:
        gradients["atoms"] += gradients.pop("encoder")
    atoms, bounds = parts["atoms"][0], rule.edges.tolist()
    remove_along(gradients["atoms"], atoms, bounds)
    if not rule.apply:
        return float(sum(gradient.double().square().sum() for gradient in gradients.values()))
    for name, gradient in gradients.items():
        parameter, first, second = parts[name]
        gradient = gradient * rule.clip if rule.clip < 1 else gradient
        step_adam(parameter, first, second, gradient, rule.adam)
    atoms /= torch.stack(_lengths(atoms, bounds)).sum(dim=0).clamp_min(rule.least)
    return 0.0


def _gradients(span: range, pairs: Grouped, batch: LatentGradients) -> dict[str, Tensor]:
    """Gradients of the reconstruction's error for the latents of a span."""
    starts = pairs.starts[span.start : span.stop + 1]
    part = slice(int(starts[0]), int(starts[-1]))
    values, d_code = pairs.values[part], batch.codes[part]
    rows, offsets = pairs.rows[part].long(), (starts[:-1] - starts[0]).long()
    x, g = batch.x, batch.rows

    def summed(table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return embedding_bag(index, table, offsets, per_sample_weights=weights, mode="sum")

    counts = starts[1:] - starts[:-1]
    latents = torch.repeat_interleave(torch.arange(span.start, span.stop, device=x.device), counts)
    level = torch.searchsorted(batch.widths, latents, right=True)
    return {
        "atoms": summed(g.reshape(-1, g.shape[-1]), level * len(x) + rows, values),
        "encoder": summed(x, rows, d_code),
        "bias": summed(torch.ones_like(x[:, :1]), rows, d_code)[:, 0],
    }


def _lengths(atoms: Tensor, edges: list[int]) -> list[Tensor]:
    """Compute the length of each atom at each site, as columns."""
    return [atoms[:, low:high].norm(dim=-1, keepdim=True) for low, high in pairwise(edges)]


def remove_along(
    gradient: Float[Tensor, "latent d_out"], atoms: Float[Tensor, "latent d_out"], edges: list[int]
) -> None:
    """Take away, in place, the part of gradients that would change the atoms' lengths.

    Args:
        gradient: Gradients of the atoms. Changed in place.
        atoms: Atoms, whose length is the sum of their lengths at the sites.
        edges: Bounds of the sites in an atom, the first 0 and the last d_out.
    """
    parts = _lengths(atoms, edges)
    n_sites = (torch.stack(parts) > 0).sum(dim=0).clamp_min(1)
    normal = torch.cat(
        [
            atoms[:, low:high] / length.clamp_min(torch.finfo(atoms.dtype).tiny)
            for (low, high), length in zip(pairwise(edges), parts, strict=True)
        ],
        dim=1,
    )
    along = (gradient * normal).sum(dim=-1, keepdim=True)
    gradient.sub_(along / n_sites * normal)


def step_adam(
    parameter: Tensor, first: Tensor, second: Tensor, gradient: Tensor, adam: Adam
) -> None:
    """Take one step of Adam, in place.

    Args:
        parameter: Parameter, of any shape. Changed in place.
        first: First moment, of the same shape. Changed in place.
        second: Second moment, of the same shape. Changed in place.
        gradient: Gradient of the parameter.
        adam: Numbers of this step.
    """
    first.mul_(adam.decay1).add_(gradient, alpha=adam.weight1)
    second.mul_(adam.decay2).addcmul_(gradient, gradient, value=adam.weight2)
    root = second.sqrt().mul_(adam.correction).add_(adam.epsilon)
    parameter.addcdiv_(first, root, value=-adam.rate)
