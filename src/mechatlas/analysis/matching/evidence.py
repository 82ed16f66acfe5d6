"""What a match is worth on activations that it has not seen, beside what needs no match.

    baselines     other ways to pair: same number, random, nearest, unfolded
    co_firing     how often paired latents fire together
    transport     encode at one place, permute, decode at another: how much of that is explained

Matching is by weights, so these measure something that was not optimised. Intervals are from
resampling features (co-firing) or rows (transport).

Source: Balagansky et al., Mechanistic permutability (2024), for both measures.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechatlas.analysis.matching.folding import fold, unit_rows
from mechatlas.analysis.matching.pairing import Match
from mechatlas.base import InputError
from mechatlas.maths.assignment import assign
from mechatlas.maths.pricing import Factors

RESAMPLED = 500


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int
    """Features or rows that it is a mean over."""


def baselines(a: Any, b: Any, found: Match, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Pairings to compare a match with: the column for each latent of A, -1 for none."""
    n, m = len(found.unit_a), len(found.unit_b)
    random = np.random.default_rng([seed, 9])
    same = np.where(np.arange(n) < m, np.arange(n), -1)
    chance = np.full(n, -1)
    chance[random.permutation(n)[: min(n, m)]] = random.permutation(m)[: min(n, m)]
    nearest = np.concatenate([
        (torch.from_numpy(found.unit_a[k : k + 1024]) @ torch.from_numpy(found.unit_b).T)
        .argmax(dim=1).numpy()
        for k in range(0, n, 1024)
    ])  # fmt: skip
    rows = {"match": found.columns, "partial": found.partial()}
    rows |= {"same number": same, "random": chance, "nearest by cosine": nearest}
    x, y = (
        fold(one, unit=np.ones(len(u))).decoder for one, u in ((a, found.unit_a), (b, found.unit_b))
    )
    if x.shape[1] == y.shape[1]:
        rows["unfolded"] = assign(Factors.squared_distances(x, y)).columns
        rows["cosine"] = assign(Factors.squared_distances(unit_rows(x), unit_rows(y))).columns
    return rows


@dataclasses.dataclass(frozen=True, eq=False)
class Firing:
    """Which latents of two dictionaries fire on the same rows."""

    a: Float[np.ndarray, "latent_a row"]
    b: Float[np.ndarray, "latent_b row"]

    def together(
        self, columns: Int[np.ndarray, " latent_a"]
    ) -> tuple[Int[np.ndarray, " pair"], Float[np.ndarray, " pair"], Float[np.ndarray, " pair"]]:
        """How pairs fire, for the latents of A that fire at all and have a partner.

        Returns:
            The latents; the share of the rows where each fires on which its partner does too;
            the share of the rows on which both fire among those where either does.
        """
        alive = np.flatnonzero((columns >= 0) & self.a.any(axis=1))
        a, b = self.a[alive] > 0, self.b[columns[alive]] > 0
        both = (a & b).sum(axis=1)
        return alive, both / a.sum(axis=1), both / np.maximum((a | b).sum(axis=1), 1)


@torch.no_grad()
def firing(
    a: Any, b: Any, x: Float[Tensor, "row d_a"], y: Float[Tensor, "row d_b"], *, batch: int = 512
) -> Firing:
    """Codes of two dictionaries on rows that belong together.

    Raises:
        InputError: There are not as many rows of one as of the other.
    """
    if len(x) != len(y):
        raise InputError(f"{len(x)} rows of A and {len(y)} of B do not belong together.")
    codes = [
        torch.cat([one.encode(part).float() for part in rows.split(batch)]).T.numpy()
        for one, rows in ((a, x), (b, y))
    ]
    return Firing(*codes)


def co_firing(
    fired: Firing, columns: Int[np.ndarray, " latent_a"], *, seed: int = 0
) -> dict[str, Estimate]:
    """Mean over features of the share of rows that a pair shares, with intervals.

    `given_a` is the paper's matching score; `either` is harder to please by a partner that
    fires everywhere.
    """
    _, given, either = fired.together(columns)
    return {"given_a": _mean(given, seed), "either": _mean(either, seed)}


def _mean(values: np.ndarray, seed: int) -> Estimate:
    if not len(values):
        return Estimate(0.0, 0.0, 1.0, 0)
    random = np.random.default_rng([seed, 13])
    means = [values[random.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLED)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high), len(values))


@torch.no_grad()
def transport(
    fired: Firing,
    b: Any,
    y: Float[Tensor, "row d_b"],
    columns: Int[np.ndarray, " latent_a"],
    scale: Float[np.ndarray, " latent_a"] | None = None,
    *,
    seed: int = 0,
) -> Estimate:
    """Explained variance of B's rows when B decodes the permuted code of A.

    Args:
        fired: Codes on the rows.
        b: The dictionary that decodes.
        y: The rows it should give.
        columns: The pairing; several latents of A on one of B add up.
        scale: What a unit of each latent of A is worth in units of its partner; 1 if not given.
        seed: Seed of the interval.
    """
    rows = np.flatnonzero(columns >= 0)
    own = torch.from_numpy(fired.a[rows])
    if scale is not None:
        own *= torch.from_numpy(scale[rows, None]).float()
    code = torch.zeros(fired.b.shape).index_add_(0, torch.from_numpy(columns[rows]), own)
    guess = b.decode(code.T.contiguous())
    return explained(y, guess, seed=seed)


@torch.no_grad()
def explained(
    x: Float[Tensor, "row d"], guess: Float[Tensor, "row d"], *, seed: int = 0
) -> Estimate:
    """1 - residual over total sum of squares, with an interval over rows."""
    residual = (x - guess).square().sum(dim=1).double().detach().numpy()
    total = (x - x.mean(dim=0)).square().sum(dim=1).double().numpy()
    random = np.random.default_rng([seed, 17])
    draws = [random.integers(0, len(x), len(x)) for _ in range(RESAMPLED)]
    values = [1 - residual[d].sum() / total[d].sum() for d in draws]
    low, high = np.quantile(values, [0.025, 0.975])
    return Estimate(float(1 - residual.sum() / total.sum()), float(low), float(high), len(x))
