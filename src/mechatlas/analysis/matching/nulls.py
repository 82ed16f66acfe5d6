"""What cosines the same pairing finds where there is nothing to find.

A null dictionary has the spectrum of the real one (so directions that all latents share cannot
pass for partners) and no latent of it (for codes see `codes`):

    rotated     whitened, turned by a random rotation, coloured again
    shuffled    each principal coordinate shuffled among latents: keeps its distribution too

Latents without a partner compete for what partners leave over, so the pairing is done again with
the columns of some pairs replaced: as many as seem to be chance by their number where most of the
null lies, drawn by how likely each is. Rows stay as they are. One that had a partner after all
then takes the next best there is, so what is alike without being partners (parts of a cluster,
siblings of a split) is in the null, and no evidence.

What is weighed is the cosine beyond what chance gives these two: latents along the axes where all
vary most are alike by chance more often. By cosines alone most of what stands by mistake would be
such, and the null would have too few of them.

Source: Storey (2002) for q-values from the number of discoveries; the rest is ours.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import isotonic_regression

from mechatlas.maths.assignment import assign
from mechatlas.maths.pricing import Factors

SAMPLE = 1024
"""Latents that the first, rough null looks at."""
LEAST = 100
"""Pairs that the null should have at least; small dictionaries are done several times."""
MOST_TIMES = 8
ROUNDS = 8
KEPT = 4
"""Rounds whose nulls count: the first are made before it is known what is chance."""
ENOUGH = 4096
"""Draws of the null that need no other round."""
LEVELLING = 2
"""Times that lengths are made more equal."""
MOST_BY_CHANCE = 0.9
MOST = 0.65
"""Share of the null below which pairs are counted to tell how many are chance."""


class Evidence(NamedTuple):
    """What the null says of each pair."""

    q_values: Float[np.ndarray, " pair"]
    """Smallest false match rate at which the pair is still matched."""
    without_partner: int
    """Pairs taken to be chance when the null was made."""
    null: Float[np.ndarray, " draw"]
    """How alike chance pairs are, as a cosine of average ones."""


def rotated(x: Float[np.ndarray, "n d"], random: np.random.Generator) -> np.ndarray:
    """Rows with the same second moments of their directions, in random directions."""
    u, back = _whitened(x)
    turn, r = np.linalg.qr(random.standard_normal((len(back), len(back))))
    return (u @ (turn * np.sign(np.diag(r))) @ back).astype(np.float32)


def shuffled(x: Float[np.ndarray, "n d"], random: np.random.Generator) -> np.ndarray:
    """Rows with the same distribution along each principal axis, mixed among latents."""
    u, back = _whitened(x)
    return (random.permuted(u, axis=0) @ back).astype(np.float32)


def _whitened(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose second moments are alike along all axes, and what makes directions of x of them.

    Rows of x at length 1 are short along the axes where they vary most; a null made of them and
    brought to length 1 once more would be too short there, and too seldom alike. So lengths are
    first made equal where the rows are whitened.

    Source:
        Tyler, A distribution-free M-estimator of multivariate scatter (1987).
    """
    x = x.astype(np.float64)
    if len(x) <= x.shape[1]:  # whitened rows are orthogonal, and of one length
        u, s, vt = np.linalg.svd(x, full_matrices=False)
        return u, s[:, None] * vt
    u, back = x, np.eye(x.shape[1])
    for _ in range(1 + LEVELLING):
        length = np.linalg.norm(u, axis=1)
        x = x / np.where(length > 1e-6 * length.max(initial=0.0), length, 1.0)[:, None]
        variances, axes = np.linalg.eigh(x.T @ x)
        there = variances > 1e-12 * variances[-1]
        sizes, axes = np.sqrt(variances[there]), axes[:, there]
        u, back = x @ axes / sizes, sizes[:, None] * axes.T
    return u, back


Null = Callable[[np.ndarray, np.random.Generator], np.ndarray]
NULLS: tuple[Null, ...] = (rotated, shuffled)


def weigh(
    a: Float[np.ndarray, "n d"],
    b: Float[np.ndarray, "m d"],
    rows: Int[np.ndarray, " pair"],
    columns: Int[np.ndarray, " pair"],
    *,
    nulls: Sequence[Null] = NULLS,
    seed: int = 0,
) -> Evidence:
    """Weigh pairs of unit vectors against the null.

    Args:
        a: Vectors at length 1.
        b: The others.
        rows: First members of the pairs.
        columns: Second members.
        nulls: How null dictionaries are made.
        seed: Seed of the null.
    """
    if len(b) < len(a):  # a null of few latents would lie in the few directions that they span
        return weigh(b, a, columns, rows, nulls=nulls, seed=seed)
    random = np.random.default_rng([seed, 5])
    measure = _Alike(a, b, nulls, random)
    alike, null = measure(a[rows], b[columns]), measure.by_chance
    spare = [np.setdiff1d(np.arange(len(x)), of) for x, of in ((a, rows), (b, columns))]
    before, n_chance, wrong, q_values = 0, len(rows), [null], np.empty(0)
    draws: list[list[np.ndarray]] = []
    for _ in range(ROUNDS):
        before, n_chance = n_chance, _count_chance(alike, null, len(rows))
        settled = abs(n_chance - before) <= 0.03 * before
        if n_chance < 2 or (settled and len(null) >= ENOUGH):
            break
        drop = _drawn(alike, q_values, n_chance, random)
        keep = np.setdiff1d(np.arange(len(rows)), drop)
        there = a[np.concatenate([rows[keep], rows[drop], spare[0]])]
        real, left = b[columns[keep]], b[np.concatenate([columns[drop], spare[1]])]
        draws.append([_wrong_pairs(there, real, left, make, measure, random) for make in nulls])
        wrong = [np.concatenate(of) for of in zip(*draws[-KEPT:], strict=True)]
        null = np.concatenate(wrong)
        q_values = _q_values(alike, wrong, n_chance)
    return Evidence(_q_values(alike, wrong, max(n_chance, 1)), n_chance, null)


class _Alike:
    """How alike pairs are beyond chance, told as the cosine of a pair of average latents.

    Of a cosine c where chance gives e, what counts is (c - e) / (1 - e), which is 1 for latents
    that are the same, whatever chance gives. Chance gives what the nearest of a null dictionary
    has on average, more to latents whose cosines with all of the other side are large.
    """

    def __init__(
        self, a: np.ndarray, b: np.ndarray, nulls: Sequence[Null], random: np.random.Generator
    ) -> None:
        self._roots = _root(a), _root(b)
        some = a[random.permutation(len(a))[:SAMPLE]]
        made = [_unit(make(b, random)) for make in nulls]
        y = np.concatenate([null[(some @ null.T).argmax(axis=1)] for null in made])
        x = np.tile(some, (len(nulls), 1))
        cosines = np.einsum("pd,pd->p", x, y, dtype=np.float64)
        self._average = float(np.clip(cosines.mean(), 0.0, MOST_BY_CHANCE))
        self._nearest = self._average / max(float(self._sizes(x, y).mean()), 1e-12)
        self.by_chance = self(x, y)

    def _sizes(self, x: np.ndarray, y: np.ndarray) -> Float[np.ndarray, " pair"]:
        """Root mean squares of the cosines with all of the other side, the mean of both latents."""
        of_a, of_b = self._roots
        return np.sqrt(
            np.linalg.norm(x @ of_b.T, axis=1) * np.linalg.norm(y @ of_a.T, axis=1), dtype=float
        )

    def __call__(self, x: np.ndarray, y: np.ndarray) -> Float[np.ndarray, " pair"]:
        """Of pairs of unit vectors."""
        cosines = np.einsum("pd,pd->p", x, y, dtype=np.float64)
        expected = np.minimum(self._nearest * self._sizes(x, y), MOST_BY_CHANCE)
        return self._average + (1 - self._average) * (cosines - expected) / (1 - expected)


def _root(x: np.ndarray) -> np.ndarray:
    """A matrix with the second moments of x, and no more rows than it has columns."""
    small = x if len(x) <= x.shape[1] else np.linalg.qr(x, mode="r")
    return (small / np.sqrt(len(x))).astype(np.float32)


def _drawn(
    alike: np.ndarray, q_values: np.ndarray, n: int, random: np.random.Generator
) -> np.ndarray:
    """As many pairs as seem to be chance, drawn by how likely each is.

    The least alike alone would be latents of unusual directions, which have no siblings.
    """
    if not len(q_values):
        return np.argsort(alike, kind="stable")[:n]
    likely = chances(q_values)
    return np.argsort(random.random(len(likely)) / np.maximum(likely, 1e-12), kind="stable")[:n]


def chances(q_values: Float[np.ndarray, " pair"]) -> Float[np.ndarray, " pair"]:
    """Chance that each pair is wrong: how much a pair adds to the number expected to be wrong.

    Pairs of the same chance in a row are taken together, so that it rises with the q-value.
    """
    if not len(q_values):
        return q_values
    order = np.argsort(q_values, kind="stable")
    wrong = q_values[order] * np.arange(1, len(order) + 1)
    rises = isotonic_regression(np.diff(wrong, prepend=0.0)).x
    told = np.empty(len(order))
    told[order] = np.clip(rises, 0.0, 1.0)
    return told


def _count_chance(alike: np.ndarray, null: np.ndarray, at_most: int) -> int:
    """Pairs that seem to be chance, from how many lie where most of the null does (Storey)."""
    return min(at_most, round(int((alike <= np.quantile(null, MOST)).sum()) / MOST))


def _wrong_pairs(
    a: np.ndarray,
    real: np.ndarray,
    left: np.ndarray,
    make: Null,
    measure: _Alike,
    random: np.random.Generator,
) -> np.ndarray:
    """How alike the pairs are that are wrong when what partners leave over is replaced by a null.

    Row i of `a` belongs to row i of `real`; the rows of `a` after these belong to nothing.
    """
    found: list[np.ndarray] = []
    for _ in range(min(MOST_TIMES, max(1, -(-LEAST // len(left))))):
        b = np.concatenate([real, _unit(make(left, random))])
        columns = assign(Factors.squared_distances(a, b)).columns
        wrong = np.flatnonzero((columns >= 0) & (columns != np.arange(len(a))))
        wrong = np.union1d(wrong, len(real) + np.flatnonzero(columns[len(real) :] >= 0))
        found.append(measure(a[wrong], b[columns[wrong]]))
    return np.concatenate(found)


def _q_values(alike: np.ndarray, draws: list[np.ndarray], n_chance: int) -> np.ndarray:
    """Share of chance pairs among all that are at least as alike, the smallest over thresholds."""
    order = np.argsort(alike)
    above = len(alike) - np.searchsorted(alike[order], alike, side="left")
    by_chance = np.zeros(len(alike))
    for draw in draws:
        low = np.sort(draw)
        more = len(low) - np.searchsorted(low, alike, side="left")
        by_chance = np.maximum(by_chance, (more + 1) / (len(low) + 1))
    rate = np.minimum(1.0, by_chance * n_chance / above)
    smallest = np.minimum.accumulate(rate[order])
    q_values = np.empty(len(alike))
    q_values[order] = smallest
    return q_values


def _unit(x: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return (x / np.maximum(length, 1e-30)).astype(np.float32)
