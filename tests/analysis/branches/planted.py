"""Features placed in branches to known degrees, and features that belong to none."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mechatlas.analysis.branches.specialization import ChannelStatistics

WIDTHS = {"1x1": 32, "3x3": 80, "5x5": 112, "pool": 32}
"""As unequal as in an inception module."""


def layout(widths: dict[str, int]) -> dict[str, slice]:
    ends = np.cumsum([0, *widths.values()])
    return {name: slice(int(ends[k]), int(ends[k + 1])) for k, name in enumerate(widths)}


BRANCHES = layout(WIDTHS)
WIDTH = sum(WIDTHS.values())


class World(NamedTuple):
    """How the channels of a site vary."""

    deviation: np.ndarray
    correlation: np.ndarray
    signed: bool

    @property
    def statistics(self) -> ChannelStatistics:
        """The truth about the channels."""
        return ChannelStatistics(
            10**6, np.zeros(WIDTH), self.deviation**2, self.correlation, self.signed
        )  # fmt: skip


def world(
    *, uneven: float = 0.0, scales: bool = False, within: float = 0.0, signed: bool = False,
    seed: int = 0,
) -> World:  # fmt: skip
    """A site.

    Args:
        uneven: Spread of the logarithms of the channels' deviations.
        scales: The channels of `1x1` vary three times as much, those of `5x5` a third as much.
        within: Correlation of the channels of one branch.
        signed: Activations may be negative.
        seed: Seed of the deviations.
    """
    deviation = np.exp(uneven * np.random.default_rng(seed).standard_normal(WIDTH))
    if scales:
        deviation[BRANCHES["1x1"]] *= 3
        deviation[BRANCHES["5x5"]] *= 0.3
    correlation = np.eye(WIDTH)
    for s in BRANCHES.values():
        correlation[s, s] += within * (1 - np.eye(s.stop - s.start))
    return World(deviation, correlation, signed)


def factors(*, rank_decay: float = 1.0, per_branch: bool = True, seed: int = 0) -> World:
    """A site whose spectrum falls like a power, in each branch or over all of it."""
    random = np.random.default_rng(seed)
    covariance = np.zeros((WIDTH, WIDTH))
    for s in BRANCHES.values() if per_branch else [slice(0, WIDTH)]:
        n = s.stop - s.start
        basis = np.linalg.qr(random.standard_normal((n, n)))[0]
        covariance[s, s] = (basis * np.arange(1, n + 1.0) ** -rank_decay) @ basis.T
    deviation = np.sqrt(np.diag(covariance))
    return World(deviation, covariance / np.outer(deviation, deviation), False)


def clusters(size: int, rho: float) -> World:
    """A site whose neighbouring channels go along with one another, `size` at a time."""
    correlation = np.eye(WIDTH)
    for s in BRANCHES.values():
        for first in range(s.start, s.stop, size):
            own = slice(first, min(first + size, s.stop))
            correlation[own, own] += rho * (1 - np.eye(own.stop - own.start))
    return World(np.ones(WIDTH), correlation, False)


Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
DRAWS: dict[str, Draw] = {
    "gaussian": lambda random, shape: random.standard_normal(shape),
    "heavy": lambda random, shape: random.standard_t(3, shape),
    "positive": lambda random, shape: np.abs(random.standard_normal(shape)),
}


def null_atoms(of: World, n: int, draw: str = "gaussian", *, seed: int = 0) -> np.ndarray:
    """Features that belong to no branch: spread as the channels vary."""
    random = np.random.default_rng([seed, 1])
    root = np.linalg.cholesky(of.correlation + 1e-9 * np.eye(WIDTH))
    atoms = DRAWS["gaussian" if draw == "positive" else draw](random, (n, WIDTH)) @ root.T
    return (np.abs(atoms) if draw == "positive" else atoms) * of.deviation


def few_entries(n: int, k: int, *, seed: int = 0) -> np.ndarray:
    """Features that write `k` channels each, wherever they are."""
    random = np.random.default_rng([seed, 2])
    order = np.argsort(random.random((n, WIDTH)), axis=1)[:, :k]
    atoms = np.zeros((n, WIDTH))
    np.put_along_axis(atoms, order, random.exponential(size=(n, k)) + 0.1, axis=1)
    return atoms


def mixed(atoms: np.ndarray, of: World) -> np.ndarray:
    """The same features, their entries spread over channels as these are correlated."""
    values, vectors = np.linalg.eigh(of.correlation)
    return atoms @ (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T * of.deviation


def placed(atoms: np.ndarray, of: World, branch: str, excess: float) -> np.ndarray:
    """The same features, moved into a branch: 0 leaves it what it varies, 1 would be all in it."""
    s = BRANCHES[branch]
    expected = np.square(of.deviation[s]).sum() / np.square(of.deviation).sum()
    share = expected + excess * (1 - expected)
    moved = atoms.copy()
    inside = np.square(np.maximum(atoms[:, s], 0)).sum(axis=1, keepdims=True)
    outside = np.square(np.maximum(atoms, 0)).sum(axis=1, keepdims=True) - inside
    moved[:, s] *= np.sqrt(share / (1 - share) * outside / inside)
    return moved
