"""What a match is worth to the network: run it with one site written by the other's dictionary.

    splice       replace a site by what its dictionary decodes from the permuted code of another
    Replaced     what that does to the network's output, by way of pairing

Encode at A, permute, decode with B, and let the network go on from B's site with that. The output
is compared with the one of the untouched network on the same samples: divergence in nats and how
often the most likely answer stays where the outputs are logits, and for every network the share
of the output's variance that is lost.

Source: Balagansky et al., Mechanistic permutability (2024), encode-permute-decode and delta loss.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechatlas.activations.sites import channels_last, edited, grid_of
from mechatlas.analysis.matching.evidence import RESAMPLED, Estimate
from mechatlas.base import InputError, Site

AT_ONCE = 4096
"""Rows encoded and decoded together."""

Guess = Callable[[Tensor, Tensor], Tensor]
"""Rows of B's site from those of A's and B's own."""


@dataclasses.dataclass(frozen=True)
class Replaced:
    """How far the output is from the untouched one; means over samples."""

    lost: Estimate
    """Share of the output's variance that is lost: 0 is as before, 1 is as bad as the mean."""
    divergence: Estimate | None
    """Kullback-Leibler divergence from the untouched answer, in nats: the rise of the cross
    entropy where the untouched answer counts as right. `None` if the outputs are not logits."""
    agreement: Estimate | None
    """Share of the outputs whose most likely answer is the same."""


def permuted(
    a: Any,
    b: Any,
    columns: Int[np.ndarray, " latent_a"],
    scale: Float[np.ndarray, " latent_a"] | None = None,
) -> Guess:
    """Encode with A, give each latent's activation to its partner, decode with B.

    Args:
        a: The dictionary that encodes.
        b: The one that decodes.
        columns: The pairing, -1 for none; several latents of A on one of B add up.
        scale: What a unit of each latent of A is worth in units of its partner; 1 if not given.
    """
    rows = np.flatnonzero(columns >= 0)
    own, partners = torch.from_numpy(rows), torch.from_numpy(np.asarray(columns)[rows])
    worth = torch.ones(len(rows)) if scale is None else torch.from_numpy(scale[rows]).float()

    def guess(x: Tensor, y: Tensor) -> Tensor:
        del y
        code = a.encode(x).float()[:, own] * worth
        return b.decode(torch.zeros(len(x), b.n_latents).index_add_(1, partners, code))

    return guess


def references(a: Any, b: Any) -> dict[str, Guess]:
    """What needs no match: the row of A itself, B without A, and the mean row."""
    ways: dict[str, Guess] = {
        "B itself": lambda _x, y: b.decode(b.encode(y)),
        "mean of B": lambda _x, y: y.mean(dim=0).expand_as(y),
    }
    return {"layer drop": lambda x, _y: x, **ways} if a.d_in == b.d_in else ways


@torch.no_grad()
def splice(
    network: nn.Module,
    batches: Iterable[Tensor],
    sites: tuple[Site, Site],
    ways: Mapping[str, Guess],
    *,
    seed: int = 0,
) -> dict[str, Replaced]:
    """Run a network with the second site replaced, once for each way.

    Args:
        network: Called with each batch. Its output counts as logits where it is a tensor, or has
            a tensor `logits`; of anything else the first tensor is compared.
        batches: Inputs, several samples each.
        sites: Of A and of B; A's must be reached before B's, or be the same.
        ways: How to write B's rows.
        seed: Seed of the intervals.

    Raises:
        InputError: B's site is reached before A's.
        SiteError: The network has no such site.
    """
    clean: list[np.ndarray] = []
    logits = False
    found: dict[str, list[np.ndarray]] = {way: [] for way in ways}
    for batch in batches:
        before, logits = _output(network(batch))
        clean.append(_moments(before))
        for way, guess in ways.items():
            with _replaced(network, sites, guess):
                after, _ = _output(network(batch))
            found[way].append(_compared(before, after))
    if not clean:
        raise InputError("There are no samples to run the network on.")
    total = _spread(np.concatenate(clean))
    random = np.random.default_rng([seed, 19])
    draws = random.integers(0, len(total), (RESAMPLED, len(total)))
    return {way: _told(np.concatenate(parts), total, draws, logits) for way, parts in found.items()}


def _replaced(network: nn.Module, sites: tuple[Site, Site], guess: Guess) -> Any:
    """The network with the second site written from the first."""
    seen: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        seen[:] = [x]
        return x

    def write(y: Tensor) -> Tensor:
        x = y if sites[0] == sites[1] else _placed(seen[0], y) if seen else None
        if x is None:
            raise InputError(
                f"The network reaches {sites[1]} before {sites[0]}; give dictionaries in its order."
            )
        target = channels_last(y)
        x, rows = _rows(x), _rows(y)
        pieces = [guess(*part) for part in zip(x.split(AT_ONCE), rows.split(AT_ONCE), strict=True)]
        new = torch.cat(pieces).to(y.dtype).reshape(target.shape)
        return new.movedim(-1, 1) if y.ndim == 4 else new

    edits = {sites[1]: write} if sites[0] == sites[1] else {sites[0]: keep, sites[1]: write}
    return edited(network, edits)


def _rows(x: Tensor) -> Tensor:
    whole = channels_last(x)
    return whole.reshape(-1, whole.shape[-1])


def _placed(x: Tensor, y: Tensor) -> Tensor:
    """A's map at the places of B's: for each cell of B the cell of A that holds its centre."""
    there, here = grid_of(x), grid_of(y)
    if there == here or x.ndim != 4:
        return x
    rows, columns = (
        ((torch.arange(n) + 0.5) / n * m).long() for n, m in zip(here, there, strict=True)
    )
    return x[:, :, rows[:, None], columns]


def _output(value: Any) -> tuple[Tensor, bool]:
    """The network's output, one row a sample or a token of it, and whether it is logits."""
    if isinstance(value, Tensor):
        return value.flatten(1, -2) if value.ndim > 2 else value[:, None], True
    if isinstance(getattr(value, "logits", None), Tensor):
        return _output(value.logits)
    first = value[0] if isinstance(value, tuple | list) else next(iter(value.values()))
    return _output(first)[0], False


def _moments(x: Float[Tensor, "sample place d"]) -> Float[np.ndarray, "sample d_and_2"]:
    """Places, sum of squares, and sums of each number, by sample."""
    size = torch.full((len(x), 1), float(x.shape[1]), dtype=torch.float64)
    squares = x.double().square().sum(dim=(1, 2))[:, None]
    return torch.cat([size, squares, x.double().sum(dim=1)], dim=1).numpy()


def _spread(moments: Float[np.ndarray, "sample d_and_2"]) -> Float[np.ndarray, " sample"]:
    """Sum of squares around the mean over all samples, by sample."""
    size, squares, sums = moments[:, 0], moments[:, 1], moments[:, 2:]
    mean = sums.sum(axis=0) / size.sum()
    return squares - 2 * sums @ mean + size * (mean @ mean)


def _compared(before: Tensor, after: Tensor) -> Float[np.ndarray, "sample 3"]:
    """Residual sum of squares, mean divergence and share of equal answers, by sample."""
    residual = (after - before).double().square().sum(dim=(1, 2))
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).mean(-1)
    same = (before.argmax(-1) == after.argmax(-1)).double().mean(-1)
    return torch.stack([residual, divergence, same], dim=1).numpy()


def _told(values: np.ndarray, total: np.ndarray, draws: np.ndarray, logits: bool) -> Replaced:
    residual, divergence, same = values.T
    lost = residual.sum() / total.sum()
    shares = residual[draws].sum(axis=1) / total[draws].sum(axis=1)
    return Replaced(
        lost=_estimate(lost, shares, len(total)),
        divergence=_mean(divergence, draws) if logits else None,
        agreement=_mean(same, draws) if logits else None,
    )


def _mean(values: np.ndarray, draws: np.ndarray) -> Estimate:
    return _estimate(values.mean(), values[draws].mean(axis=1), len(values))


def _estimate(value: float, resampled: np.ndarray, n: int) -> Estimate:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high), n)
