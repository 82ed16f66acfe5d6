"""Quality of a match on activations that it has not seen, beside pairings that need no match.

    baselines     other pairings: same index, random, nearest, unfolded
    paired_codes  codes of two dictionaries on rows that belong together
    co_firing     how often paired latents fire together
    transport     explained variance when codes of A are permuted and decoded by B

Matching compares weights, so these measure something that was not optimized. Intervals are from
resampling features (co-firing) or rows (transport).

Source: Balagansky et al., Mechanistic permutability (2024), for both measures.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array, vstack
from torch import Tensor

from mechatlas.analysis.matching.folding import BATCH, fold, unit_rows
from mechatlas.analysis.matching.pairing import BLOCK, Match
from mechatlas.base import Dictionary, InputError
from mechatlas.maths.assignment import assign
from mechatlas.maths.bootstrap import N_RESAMPLES, Estimate
from mechatlas.maths.pricing import Factors


def baselines(
    a: Any, b: Any, matching: Match, *, seed: int = 0
) -> dict[str, Int[np.ndarray, " latent_a"]]:
    """Pair the latents in other ways, to compare a match with.

    Args:
        a: Dictionary A, or its decoder rows.
        b: Dictionary B, or its decoder rows.
        matching: Match of A and B.
        seed: Seed of the random pairing.

    Returns:
        For each way the latent of B for each latent of A, -1 for none. The ways: `match` (all
        pairs of the optimum), `partial` (optimum in which latents may stay unmatched),
        `same_index`, `random`, `nearest` (by cosine, many to one), and where the widths are equal
        `unfolded` and `cosine` (optima of plain decoder rows).
    """
    n, m = len(matching.unit_a), len(matching.unit_b)
    random = np.random.default_rng([seed, 9])
    same_index = np.where(np.arange(n) < m, np.arange(n), -1)
    chance = np.full(n, -1)
    chance[random.permutation(n)[: min(n, m)]] = random.permutation(m)[: min(n, m)]
    other = torch.from_numpy(matching.unit_b).T
    blocks = torch.from_numpy(matching.unit_a).split(BLOCK)
    ways = {
        "match": matching.columns,
        "partial": matching.partial_assignment(),
        "same_index": same_index,
        "random": chance,
        "nearest": torch.cat([(block @ other).argmax(dim=1) for block in blocks]).numpy(),
    }
    x, y = fold(a, scale=np.ones(n)).decoder, fold(b, scale=np.ones(m)).decoder
    if x.shape[1] == y.shape[1]:
        ways["unfolded"] = assign(Factors.squared_distances(x, y)).columns
        ways["cosine"] = assign(Factors.squared_distances(unit_rows(x), unit_rows(y))).columns
    return ways


class PairFiring(NamedTuple):
    """Firing of pairs of latents, for the latents of A that fire at all and have a partner."""

    latent_a: Int[np.ndarray, " pair"]
    p_b_given_a: Float[np.ndarray, " pair"]
    """Share of the rows where the latent of A fires on which its partner does too."""
    jaccard: Float[np.ndarray, " pair"]
    """Share of the rows where both fire among those where either does."""


@dataclasses.dataclass(frozen=True, eq=False)
class PairedCodes:
    """Codes of two dictionaries on rows that belong together, without their zeros."""

    a: Any
    """Sparse array of SciPy (row, latent_a)."""
    b: Any
    """Sparse array of SciPy (row, latent_b)."""

    def firing(self, columns: Int[np.ndarray, " latent_a"]) -> PairFiring:
        """Measure how often the pairs of a pairing fire together."""
        alive = np.flatnonzero((columns >= 0) & (np.diff(self.a.indptr) > 0))
        a, b = self.a[:, alive] > 0, self.b[:, columns[alive]] > 0
        both, of_a, of_b = (np.asarray(x.sum(axis=0)) for x in (a.multiply(b), a, b))
        return PairFiring(alive, both / of_a, both / np.maximum(of_a + of_b - both, 1))


@torch.no_grad()
def paired_codes(
    a: Dictionary,
    b: Dictionary,
    x: Float[Tensor, "row d_a"],
    y: Float[Tensor, "row d_b"],
) -> PairedCodes:
    """Encode rows that belong together with two dictionaries.

    Args:
        a: Dictionary A.
        b: Dictionary B.
        x: Rows of A's site.
        y: Rows of B's site, of the same samples and positions.

    Raises:
        InputError: There are not as many rows of one as of the other.
    """
    if len(x) != len(y):
        raise InputError(f"{len(x)} rows of A and {len(y)} of B do not belong together.")
    codes = [
        vstack([csr_array(d.encode(part).float().numpy()) for part in rows.split(BATCH)])
        for d, rows in ((a, x), (b, y))
    ]
    return PairedCodes(*(csr_array(code).tocsc() for code in codes))


@dataclasses.dataclass(frozen=True)
class CoFiring:
    """Co-firing of the pairs of a pairing, means over features."""

    p_b_given_a: Estimate
    """Probability that the partner fires where a feature of A does (the paper's matching score)."""
    jaccard: Estimate
    """Jaccard index of the rows where the two fire, which a partner that fires everywhere does not
    raise."""


def co_firing(
    codes: PairedCodes, columns: Int[np.ndarray, " latent_a"], *, seed: int = 0
) -> CoFiring:
    """Measure how often paired latents fire together.

    Args:
        codes: Codes on paired rows.
        columns: Latent of B for each latent of A, -1 for none.
        seed: Seed of the intervals.
    """
    firing = codes.firing(columns)
    return CoFiring(_mean(firing.p_b_given_a, seed), _mean(firing.jaccard, seed))


def _mean(values: Float[np.ndarray, " pair"], seed: int) -> Estimate:
    if not len(values):
        return Estimate(0.0, 0.0, 1.0, 0)
    random = np.random.default_rng([seed, 13])
    n = len(values)
    means = [values[random.integers(0, n, n)].mean() for _ in range(N_RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high), n)


@torch.no_grad()
def transport(
    codes: PairedCodes,
    b: Dictionary,
    y: Float[Tensor, "row d_b"],
    columns: Int[np.ndarray, " latent_a"],
    gain: Float[np.ndarray, " latent_a"] | None = None,
    *,
    seed: int = 0,
) -> Estimate:
    """Explained variance of B's rows when B decodes the permuted code of A.

    Args:
        codes: Codes on the rows.
        b: Dictionary that decodes.
        y: Rows of B's site.
        columns: The pairing; several latents of A on one of B add up.
        gain: Factor from the activation of each latent of A to its partner's; 1 if not given.
        seed: Seed of the interval.
    """
    latents = np.flatnonzero(columns >= 0)
    factors = np.ones(len(latents)) if gain is None else gain[latents]
    places = latents, columns[latents]
    shape = codes.a.shape[1], codes.b.shape[1]
    moved: Any = csr_array((factors.astype(np.float32), places), shape=shape)
    code = codes.a.tocsr() @ moved
    parts = (code[i : i + BATCH].toarray() for i in range(0, len(y), BATCH))
    return explained(y, torch.cat([b.decode(torch.from_numpy(p)) for p in parts]), seed=seed)


@torch.no_grad()
def explained(
    x: Float[Tensor, "row d"], reconstruction: Float[Tensor, "row d"], *, seed: int = 0
) -> Estimate:
    """Explained variance: 1 minus residual over total sum of squares, interval over rows.

    Args:
        x: Rows.
        reconstruction: Rows that should equal them.
        seed: Seed of the interval.
    """
    residual = (x - reconstruction).square().sum(dim=1).double().detach().numpy()
    total = (x - x.mean(dim=0)).square().sum(dim=1).double().numpy()
    random = np.random.default_rng([seed, 17])
    draws = [random.integers(0, len(x), len(x)) for _ in range(N_RESAMPLES)]
    values = [1 - residual[d].sum() / total[d].sum() for d in draws]
    low, high = np.quantile(values, [0.025, 0.975])
    return Estimate(float(1 - residual.sum() / total.sum()), float(low), float(high), len(x))
