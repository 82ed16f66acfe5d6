"""Similarity of the spaces of two dictionaries whose latents were paired by their codes.

    compare_spaces    decoder rows and a pairing by codes -> SVCCA and RSA, beside random pairings

The rows may have different widths, as those of different models do. Pairs are of latents with like
codes: those of like decoder rows would be alike by themselves.

Source: Lan et al., Sparse autoencoders reveal universal feature spaces across large language models
(2024).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata

from mechatlas.analysis.matching.folding import fold, unit_rows
from mechatlas.base import InputError

MIN_PAIRS = 16
"""Fewest pairs whose spaces are compared."""
MAX_PAIRS = 1024
"""Most pairs whose spaces are compared, drawn at random from all."""
N_PAIRINGS = 199
"""Random pairings of the null, from which the smallest p-value is .005."""
VARIANCE_KEPT = 0.99
"""Share of the variance in the directions that SVCCA compares."""
PAIRS_PER_DIRECTION = 4
"""Fewest pairs for each direction that SVCCA compares: with as many directions as pairs, every
pairing has correlation 1."""


@dataclasses.dataclass(frozen=True)
class Similarity:
    """Similarity of two spaces under a pairing, beside random pairings of the same latents."""

    value: float
    """Similarity under the pairing."""
    expected: float
    """Mean similarity under random pairings."""
    p_value: float
    """Share of the pairings, this one included, with at least its similarity."""


@dataclasses.dataclass(frozen=True)
class SpaceSimilarity:
    """Similarity of the decoder rows of paired latents."""

    n: int
    """Number of pairs compared."""
    svcca: Similarity
    """Mean canonical correlation of the leading directions of both spaces (SVCCA)."""
    rsa: Similarity
    """Rank correlation of the cosines within one space with those within the other (RSA)."""


def compare_spaces(
    a: Any, b: Any, columns: Int[np.ndarray, " latent_a"], *, seed: int = 0
) -> SpaceSimilarity:
    """Compare the spaces of paired latents with those of the same latents paired at random.

    Args:
        a: Dictionary A, or its decoder rows (latent, d_a).
        b: Dictionary B, or its decoder rows (latent, d_b).
        columns: Latent of B for each latent of A, -1 for none, from a match by codes.
        seed: Seed of the random pairings.

    Raises:
        InputError: There are too few pairs, or a pairing is not of these dictionaries.

    Source:
        Lan et al. (2024), section 4. Raghu et al., SVCCA (2017). Kriegeskorte et al.,
        Representational similarity analysis (2008).
    """
    x, y = (_decoder_rows(each, name) for each, name in ((a, "A"), (b, "B")))
    if len(columns) != len(x) or columns.max(initial=-1) >= len(y):
        raise InputError(
            f"A pairing of {len(columns)} latents with numbers up to {columns.max(initial=-1)} is "
            f"not one of dictionaries with {len(x)} and {len(y)} latents."
        )
    rows = np.flatnonzero(columns >= 0)
    if len(rows) < MIN_PAIRS:
        raise InputError(f"Comparing spaces takes {MIN_PAIRS} pairs or more, got {len(rows)}.")
    random = np.random.default_rng([seed, 23])
    rows = random.permutation(rows)[:MAX_PAIRS]
    x, y = unit_rows(x[rows]).astype(float), unit_rows(y[columns[rows]]).astype(float)
    pairings = [np.arange(len(rows)), *(random.permutation(len(rows)) for _ in range(N_PAIRINGS))]
    svcca, rsa = (_beside(measure(x, y), pairings) for measure in (_svcca, _rsa))
    return SpaceSimilarity(len(rows), svcca, rsa)


def _decoder_rows(side: Any, name: str) -> Float[np.ndarray, "latent d"]:
    n = getattr(side, "n_latents", None) or len(side)
    return fold(side, scale=np.ones(n), name=name).decoder


_Measure = Callable[[Int[np.ndarray, " pair"]], float]


def _beside(measure: _Measure, pairings: list[Int[np.ndarray, " pair"]]) -> Similarity:
    value, *null = map(measure, pairings)
    at_least = 1 + sum(each >= value - 1e-9 for each in null)
    return Similarity(value, float(np.mean(null)), at_least / len(pairings))


def _svcca(x: Float[np.ndarray, "pair d_a"], y: Float[np.ndarray, "pair d_b"]) -> _Measure:
    u, v = (_leading(each) for each in (x, y))
    return lambda order: float(np.linalg.svd(u.T @ v[order], compute_uv=False).mean())


def _leading(x: Float[np.ndarray, "pair d"]) -> Float[np.ndarray, "pair k"]:
    """Orthonormal coordinates of the pairs along the directions with most of the variance."""
    u, s, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    share = np.cumsum(s**2) / np.sum(s**2)
    k = int(np.searchsorted(share, VARIANCE_KEPT)) + 1
    return u[:, : min(k, len(x) // PAIRS_PER_DIRECTION)]


def _rsa(x: Float[np.ndarray, "pair d_a"], y: Float[np.ndarray, "pair d_b"]) -> _Measure:
    u, v = (_ranked_cosines(each) for each in (x, y))
    return lambda order: float(np.vdot(u, v[np.ix_(order, order)]))


def _ranked_cosines(x: Float[np.ndarray, "pair d"]) -> Float[np.ndarray, "pair pair"]:
    """Ranks of the cosines of all two rows, centered and of length 1; zeros on the diagonal."""
    above = np.triu_indices(len(x), 1)
    ranks = rankdata((x @ x.T)[above])
    result = np.zeros((len(x), len(x)))
    result[above] = ranks - ranks.mean()
    result += result.T
    return result / np.linalg.norm(result)
