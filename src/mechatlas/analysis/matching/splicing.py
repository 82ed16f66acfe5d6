"""Effect of a match on the network's output: a site written by the other site's dictionary.

    splice          replace a site by what its dictionary decodes from the permuted code of another
    SpliceEffect    the effect on the network's output, for each way of pairing

Encode at A, permute, decode with B, and let the network go on from B's site with the result. The
output is compared with the output of the untouched network on the same samples: KL divergence in
nats and agreement of the most likely answer where the outputs are logits, and for every network the
share of the output's variance that is lost.

Source: Balagansky et al., Mechanistic permutability (2024), encode-permute-decode and delta loss.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from mechatlas.activations.layouts import Layout, layouts_of
from mechatlas.activations.networks import run_network
from mechatlas.activations.sites import intervene
from mechatlas.analysis.matching.held_out import N_RESAMPLES, Estimate
from mechatlas.base import Dictionary, InputError, Site

ROWS_AT_ONCE = 4096
"""Rows encoded and decoded together."""

Writer = Callable[[Tensor, Tensor], Tensor]
"""Function that makes rows of B's site from those of A's site and B's own."""


@dataclasses.dataclass(frozen=True)
class SpliceEffect:
    """Distance of the network's output from the untouched one; means over samples."""

    variance_lost: Estimate
    """Share of the output's variance that is lost: 0 is untouched, 1 is as bad as the mean."""
    kl_divergence: Estimate | None
    """Kullback-Leibler divergence from the untouched answer in nats: the rise of the cross entropy
    where the untouched answer counts as right. `None` if the outputs are not logits."""
    agreement: Estimate | None
    """Share of the outputs whose most likely answer is unchanged. `None` if the outputs are not
    logits."""


def permuted(
    a: Dictionary,
    b: Dictionary,
    columns: Int[np.ndarray, " latent_a"],
    gain: Float[np.ndarray, " latent_a"] | None = None,
) -> Writer:
    """Encode with A, give each latent's activation to its partner, decode with B.

    Args:
        a: Dictionary that encodes.
        b: Dictionary that decodes.
        columns: The pairing, -1 for none; several latents of A on one of B add up.
        gain: Factor from the activation of each latent of A to its partner's; 1 if not given.
    """
    rows = np.flatnonzero(columns >= 0)
    latents, partners = torch.from_numpy(rows), torch.from_numpy(np.asarray(columns)[rows])
    factor = torch.ones(len(rows)) if gain is None else torch.from_numpy(gain[rows]).float()

    def write(x: Tensor, y: Tensor) -> Tensor:
        del y
        code = a.encode(x).float()[:, latents] * factor
        return b.decode(torch.zeros(len(x), b.n_latents).index_add_(1, partners, code))

    return write


def references(a: Dictionary, b: Dictionary) -> dict[str, Writer]:
    """Ways to write B's site that need no match.

    Args:
        a: Dictionary A.
        b: Dictionary B.

    Returns:
        `b_reconstruction` (B on its own rows), `b_mean` (their mean), and where the widths are
        equal `layer_drop` (A's row as it is).
    """
    ways: dict[str, Writer] = {
        "b_reconstruction": lambda _x, y: b.decode(b.encode(y)),
        "b_mean": lambda _x, y: y.mean(dim=0).expand_as(y),
    }
    return {"layer_drop": lambda x, _y: x, **ways} if a.d_in == b.d_in else ways


@torch.no_grad()
def splice(
    network: nn.Module,
    batches: Iterable[Shaped[Tensor, "_ ..."]],
    sites: tuple[Site, Site],
    ways: Mapping[str, Writer],
    *,
    seed: int = 0,
) -> dict[str, SpliceEffect]:
    """Run a network with the second site replaced, once for each way.

    Args:
        network: Network called with each batch. Its output counts as logits where it is a tensor,
            or has a tensor `logits`; of anything else the first tensor is compared.
        batches: Inputs, several samples each.
        sites: Sites of A and of B; A's must be reached before B's, or be the same.
        ways: Functions that write B's rows, by name.
        seed: Seed of the intervals.

    Raises:
        InputError: B's site is reached before A's, or there are no samples.
        SiteError: The network has no such site.
    """
    clean: list[np.ndarray] = []
    logits = False
    effects: dict[str, list[np.ndarray]] = {way: [] for way in ways}
    for batch in batches:
        before, logits = _output(run_network(network, batch))
        clean.append(_moments(before))
        for way, write in ways.items():
            with _replaced(network, batch, sites, write):
                after, _ = _output(run_network(network, batch))
            effects[way].append(_compare(before, after))
    if not clean:
        raise InputError("There are no samples to run the network on.")
    total = _squares_around_mean(np.concatenate(clean))
    random = np.random.default_rng([seed, 19])
    draws = random.integers(0, len(total), (N_RESAMPLES, len(total)))
    return {
        way: _effect(np.concatenate(parts), total, draws, logits=logits)
        for way, parts in effects.items()
    }


def _replaced(
    network: nn.Module, batch: Any, sites: tuple[Site, Site], write: Writer
) -> AbstractContextManager[nn.Module]:
    """Replace the second site by what is written from the first."""
    layouts = layouts_of(network, batch, sites)
    seen: list[Tensor] = []

    def remember(x: Tensor) -> Tensor:
        seen[:] = [x]
        return x

    def replace(y: Tensor) -> Tensor:
        x = None
        if sites[0] == sites[1]:
            x = layouts[sites[1]].rows(y)
        elif seen:
            x = _aligned(seen[0], y, layouts[sites[0]], layouts[sites[1]])
        if x is None:
            raise InputError(
                f"The network reaches {sites[1]} before {sites[0]}; give dictionaries in its order."
            )
        target = layouts[sites[1]].rows(y)
        parts = zip(_rows(x).split(ROWS_AT_ONCE), _rows(target).split(ROWS_AT_ONCE), strict=True)
        new = torch.cat([write(*part) for part in parts]).to(y.dtype).reshape(target.shape)
        return layouts[sites[1]].undo(new, y)

    edits = {sites[1]: replace}
    return intervene(network, edits if sites[0] == sites[1] else {sites[0]: remember, **edits})


def _rows(x: Tensor) -> Float[Tensor, "row d"]:
    return x.reshape(-1, x.shape[-1])


def _aligned(x: Tensor, y: Tensor, at_x: Layout, at_y: Layout) -> Tensor:
    """A's map at the positions of B's: for each cell of B the cell of A that holds its center."""
    grid_a, grid_b, x = at_x.grid(x), at_y.grid(y), at_x.rows(x)
    if grid_a == grid_b or len(at_x.positions) != 2:
        return x
    rows, columns = (
        ((torch.arange(n) + 0.5) / n * m).long() for n, m in zip(grid_b, grid_a, strict=True)
    )
    return x[:, rows[:, None], columns]


def _output(value: Any) -> tuple[Float[Tensor, "sample place d"], bool]:
    """The network's output, one row a sample or a token of it, and whether it is logits."""
    if isinstance(value, Tensor):
        return value.flatten(1, -2) if value.ndim > 2 else value[:, None], True
    if isinstance(getattr(value, "logits", None), Tensor):
        return _output(value.logits)
    first = value[0] if isinstance(value, tuple | list) else next(iter(value.values()))
    return _output(first)[0], False


def _moments(x: Float[Tensor, "sample place d"]) -> Float[np.ndarray, "sample d_and_2"]:
    """Number of places, sum of squares, and sum of each coordinate, by sample."""
    size = torch.full((len(x), 1), float(x.shape[1]), dtype=torch.float64)
    squares = x.double().square().sum(dim=(1, 2))[:, None]
    return torch.cat([size, squares, x.double().sum(dim=1)], dim=1).numpy()


def _squares_around_mean(
    moments: Float[np.ndarray, "sample d_and_2"],
) -> Float[np.ndarray, " sample"]:
    """Sum of squares around the mean over all samples, by sample."""
    size, squares, sums = moments[:, 0], moments[:, 1], moments[:, 2:]
    mean = sums.sum(axis=0) / size.sum()
    return squares - 2 * sums @ mean + size * (mean @ mean)


def _compare(before: Tensor, after: Tensor) -> Float[np.ndarray, "sample 3"]:
    """Residual sum of squares, mean divergence and share of equal answers, by sample."""
    residual = (after - before).double().square().sum(dim=(1, 2))
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).mean(-1)
    same = (before.argmax(-1) == after.argmax(-1)).double().mean(-1)
    return torch.stack([residual, divergence, same], dim=1).numpy()


def _effect(
    values: Float[np.ndarray, "sample 3"],
    total: Float[np.ndarray, " sample"],
    draws: Int[np.ndarray, "resample sample"],
    *,
    logits: bool,
) -> SpliceEffect:
    residual, divergence, same = values.T
    lost = residual.sum() / total.sum()
    shares = residual[draws].sum(axis=1) / total[draws].sum(axis=1)
    return SpliceEffect(
        variance_lost=_estimate(lost, shares, len(total)),
        kl_divergence=_mean(divergence, draws) if logits else None,
        agreement=_mean(same, draws) if logits else None,
    )


def _mean(
    values: Float[np.ndarray, " sample"], draws: Int[np.ndarray, "resample sample"]
) -> Estimate:
    return _estimate(values.mean(), values[draws].mean(axis=1), len(values))


def _estimate(value: float, resampled: Float[np.ndarray, " resample"], n: int) -> Estimate:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high), n)
