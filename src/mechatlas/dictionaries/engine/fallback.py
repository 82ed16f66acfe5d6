"""Parts of a training step in plain torch, for any device.

`select` and `above` are those of `kernels.py`, with the same results to rounding. They work on a
whole batch, so that they are few operators.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from mechatlas.dictionaries.engine.structures import Adam, Codes, Learned


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


def lengths(atoms: Tensor, edges: Sequence[int]) -> list[Tensor]:
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
    parts = lengths(atoms, edges)
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
