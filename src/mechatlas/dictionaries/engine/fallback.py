"""Kernels of a sparse training step in plain torch, for any device.

The functions are those of `kernels.py`, with the same results to rounding. They use no product
of sparse matrices, which on some CPUs torch does not have: sums over the codes of a row or
of a latent are bags of embeddings.

They work on a whole batch and on all latents at once, so that a step is few operators, and they
read no number of a tensor, so that nobody waits for a GPU: shapes and bounds of bags say what a
batch holds.
"""

import functools
from collections.abc import Iterable, Sequence
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
    Learned,
    Reconstruction,
    Update,
    Weights,
)

GATHERED = {"cpu": 2**22, "cuda": 2**28}
"""Numbers of atoms that are gathered at once, by kind of device."""


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
    row, latent = kept.nonzero().unbind(dim=1)
    return kept.sum(dim=1), latent.int(), whole[row, latent]


def largest_of_batch(
    tiles: Iterable[Float[Tensor, "_ latent"]], bias: Float[Tensor, " latent"], n: int
) -> Codes:
    """Find the n largest entries of `pre + bias` of a batch, zero if below.

    Args:
        tiles: Pre-activations without the bias, some rows at a time. May be overwritten.
        bias: Bias of each latent.
        n: Codes of the batch.
    """
    values, places, n_rows = bias[:0], bias[:0].long(), 0
    for pre in tiles:
        entries = pre.add_(bias).view(-1)
        top = entries.topk(min(n, len(entries)), sorted=False)
        values = torch.cat([values, top.values])
        places = torch.cat([places, top.indices + n_rows * len(bias)])
        n_rows += len(pre)
        if len(values) > n:
            top = values.topk(n, sorted=False)
            values, places = top.values, places[top.indices]
    places, order = places.sort()
    values = values[order].relu_()
    firsts = torch.arange(0, (n_rows + 1) * len(bias), len(bias), device=bias.device)
    return Codes(torch.searchsorted(places, firsts), places % len(bias), values, values)


def residual(task: Reconstruction, codes: Codes, out: ErrorGradients) -> Tensor:
    """Write the gradient of the reconstructions and of each code.

    Args:
        task: Batch to reconstruct.
        codes: Codes of the batch.
        out: Gradients. `rows` of each level is written, with those of all wider levels added;
            `codes` and `bias` are added to.

    Returns:
        The squared errors times their weights, summed over rows and levels.
    """
    n_levels, latents = len(task.widths), codes.latents.long()
    rows = rows_of(codes)
    level = torch.searchsorted(task.widths, latents, right=True) if n_levels > 1 else None
    error, losses = task.bias - task.target, []
    for i in range(n_levels):
        values = codes.values if level is None else codes.values * (level == i)
        error = error + summed(latents, task.atoms, codes.starts, values)
        losses.append((error.square().sum(dim=-1) * task.scales).sum() / 2)
        torch.mul(error, task.scales[:, None], out=out.rows[i])
    for i in range(n_levels - 2, -1, -1):
        out.rows[i] += out.rows[i + 1]
    out.bias.add_(out.rows[0].sum(dim=0))
    back = out.rows.flatten(0, 1)
    index = rows if level is None else level * len(task.target) + rows
    share = max(1, GATHERED.get(error.device.type, 2**24) // error.shape[1])
    for low in range(0, len(latents), share):
        part = slice(low, low + share)
        atoms, g = task.atoms.index_select(0, latents[part]), back.index_select(0, index[part])
        out.codes[part].add_(atoms.mul_(g).sum(dim=-1))
    return functools.reduce(torch.add, losses)


def rows_of(codes: Codes) -> Int[Tensor, " pairs"]:
    """Row of each pair."""
    counts = codes.starts[1:] - codes.starts[:-1]
    rows = torch.arange(len(counts), device=counts.device)
    return torch.repeat_interleave(rows, counts, output_size=len(codes.latents))


def summed(index: Tensor, table: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows of a table, one for each bag, of which `starts` has the bounds.

    What is behind the last bound must have weight zero: torch adds it to the last bag.
    """
    return embedding_bag(
        index, table, starts, per_sample_weights=weights, mode="sum", include_last_offset=True
    )


def group(
    latents: Int[Tensor, " pairs"], values: Float[Tensor, " pairs"], n_latents: int
) -> tuple[Int[Tensor, " grouped"], Int[Tensor, " latents_and_one"]]:
    """Order the pairs of a row and a latent by latent, those with a value of zero last.

    Args:
        latents: Latent of each pair.
        values: Value of each pair.
        n_latents: Number of latents, of which some may have no pair.

    Returns:
        Pairs, latent by latent and in their own order within each, and where each latent's
        begin (one entry more than there are latents; behind the last are the zeros).
    """
    ordered = latents.masked_fill(values == 0, n_latents).sort(stable=True)
    bounds = torch.arange(n_latents + 1, device=latents.device, dtype=latents.dtype)
    return ordered.indices, torch.searchsorted(ordered.values, bounds)


def update(
    span: range,
    pairs: Grouped,
    batch: LatentGradients,
    weights: Weights,
    rule: Update,
    added: AddedGradients,
    d_input: Tensor,
) -> float:
    """Take one step of Adam on all latents, and add to the input's gradient.

    Args:
        span: Latents to update, which are all.
        pairs: Codes of the batch latent by latent.
        batch: Rows that the encoder read, and the gradients that `residual` wrote.
        weights: Parameters and moments. Changed in place.
        rule: Numbers of the update.
        added: Gradients of dead latents.
        d_input: Gradient of the sum of the encoder's inputs, (d_in,). Added to.

    Returns:
        Sum of the squared gradients if they were only measured, else 0.
    """
    gradients = _gradients(span, pairs, batch)
    d_input += gradients["bias"] @ weights.encoder.value
    if len(added.bias):
        dead = (added.place >= 0).nonzero()[:, 0]
        places = added.place[dead].long()
        for name, gradient in gradients.items():
            gradient[dead] += getattr(added, name)[places]
    if rule.tied:
        gradients["atoms"] += gradients.pop("encoder")
    atoms, bounds = weights.atoms.value, rule.edges.tolist()
    remove_along(gradients["atoms"], atoms, bounds)
    if not rule.apply:
        return float(sum(gradient.double().square().sum() for gradient in gradients.values()))
    if rule.clip < 1:
        torch._foreach_mul_(list(gradients.values()), rule.clip)
    step_adam([getattr(weights, name) for name in gradients], list(gradients.values()), rule.adam)
    length = functools.reduce(torch.add, _lengths(atoms, bounds))
    atoms /= length.clamp_min(rule.least)
    return 0.0


def _gradients(span: range, pairs: Grouped, batch: LatentGradients) -> dict[str, Tensor]:
    """Gradients of the reconstruction's error for all latents."""
    rows, starts = pairs.rows.long(), pairs.starts.long()
    x, g = batch.x, batch.rows
    index = rows
    if len(batch.widths) > 1:
        counts = starts[1:] - starts[:-1]
        level = torch.searchsorted(
            batch.widths, torch.arange(span.start, span.stop, device=x.device), right=True
        )
        # Pairs with a value of zero are behind the last latent: their level is never read.
        bounds = torch.cumsum(counts, dim=0)
        place = torch.arange(len(rows), device=x.device)
        latent = torch.searchsorted(bounds, place, right=True).clamp_max(len(level) - 1)
        index = level[latent] * len(x) + rows
    return {
        "atoms": summed(index, g.flatten(0, 1), starts, pairs.values),
        "encoder": summed(rows, x, starts, batch.codes),
        "bias": summed(rows, torch.ones_like(x[:, :1]), starts, batch.codes)[:, 0],
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
    tiny = torch.finfo(atoms.dtype).tiny
    if len(parts) == 1:
        normal, n_sites = atoms / parts[0].clamp_min(tiny), None
    else:
        n_sites = (torch.stack(parts) > 0).sum(dim=0).clamp_min(1)
        normal = torch.cat(
            [
                atoms[:, low:high] / length.clamp_min(tiny)
                for (low, high), length in zip(pairwise(edges), parts, strict=True)
            ],
            dim=1,
        )
    along = (gradient * normal).sum(dim=-1, keepdim=True)
    gradient.sub_(normal.mul_(along if n_sites is None else along / n_sites))


def step_adam(learned: Sequence[Learned], gradients: Sequence[Tensor], adam: Adam) -> None:
    """Take one step of Adam, in place.

    Args:
        learned: Parameters of any shapes, each with its moments. Changed in place.
        gradients: Gradient of each parameter.
        adam: Numbers of this step.
    """
    values, firsts, seconds = (list(tensors) for tensors in zip(*learned, strict=True))
    slopes = list(gradients)
    torch._foreach_lerp_(firsts, slopes, adam.weight1)
    torch._foreach_mul_(seconds, adam.decay2)
    torch._foreach_addcmul_(seconds, slopes, slopes, adam.weight2)
    roots = torch._foreach_sqrt(seconds)
    torch._foreach_mul_(roots, adam.correction)
    torch._foreach_add_(roots, adam.epsilon)
    torch._foreach_addcdiv_(values, firsts, roots, -adam.rate)
