"""Null distribution of the similarity of pairs, and q-values from it.

A null dictionary has the spectrum of the real one (so directions that all latents share cannot
pass for partners) and no latent of it (for codes see `codes`):

    whiten              directions of vectors, and of their parts, at equal second moments
    rotate              whitened, turned by a random rotation, colored again
    shuffle             each principal coordinate shuffled among latents: keeps its distribution too
    compare_with_null   pairs -> q-values
    local_fdr           q-values -> probability that each single pair is wrong

Latents without a partner compete for the latents that partners leave over, so the pairing is done
again with the columns of some pairs replaced: as many as the pairs that appear to be chance, judged
by how many fall where most of the null lies, and drawn by how likely each is to be chance. Rows
stay as they are. A row whose partner was replaced takes the next best there is, so latents that
are similar without being partners (parts of a cluster, siblings of a split) are in the null, and
count as no evidence. The pairing is by the costs of the match, so null latents are as long as the
latents that they replace, part by part; it is within an overpayment of the cheapest, which changes
a similarity by far less than chance does. Large dictionaries are paired with one null in each
round, small ones with all of them.

The statistic is the cosine beyond what chance gives a pair, and beyond what the two latents have
with the next best ones. Latents along the axes where all vary most are similar by chance more
often: with plain cosines most false matches would be such latents, and the null would have too few
of them. And where several latents of A are all similar to several of B, it is not determined which
belongs to which: their pairs in the null are as similar as partners elsewhere, and would forbid to
match those too. How many pairs are chance is counted without the next best, which real
dictionaries have nearer than null ones.

Source: Storey (2002) for q-values from the number of discoveries; the rest is ours.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float16, Int
from scipy.optimize import isotonic_regression
from torch import Tensor

from mechatlas.analysis.matching.folding import unit_rows
from mechatlas.analysis.matching.null_world import MANY, NullWorld, Seen
from mechatlas.base import Engine, Progress, no_progress
from mechatlas.maths.pricing import Factors

FIRST_SAMPLE = 1024
"""Latents in the first, rough estimate of the null."""
MIN_DRAWS = 2000
"""Size of the null of one of the last rounds, for which small dictionaries are paired several
times: where 20 pairs are matched, one in 500 of the null is as similar."""
MAX_REPEATS = 8
"""Upper limit on the pairings of a small dictionary in one round."""
ROUNDS = 8
"""Upper limit on the rounds in which pairs are replaced."""
KEPT_ROUNDS = 4
"""Last rounds whose nulls count: the first are made before it is known which pairs are chance."""
MAX_CHANGE = 0.1
"""Change of the number of chance pairs above which earlier draws no longer count."""
ENOUGH_DRAWS = 4096
"""Size of the null that needs no further round."""
COORDINATES = 256
"""Coordinates that are shuffled at a time."""
LENGTH_PASSES = 2
"""Times that the lengths of whitened rows are made more equal."""
MAX_CHANCE_COSINE = 0.9
"""Upper limit on the cosine that chance is assumed to give."""
LARGER = 0.75
"""Weight of the larger of both latents' next best cosines; the parts of a split feature, which are
all similar to one latent that has no rival itself, still count where it is less than 1."""
MAX_NEXT_COSINE = 0.98
"""Upper limit on the cosine with the next best latents, near which a difference is rounding."""
SAME_WAY = 0.1
"""Mean cosine of a latent's decoder and encoder from which both are taken to be in one space."""
DOUBT = 2.0
"""Standard errors by which one null must exceed all of them together to count alone."""
STOREY_QUANTILE = 0.65
"""Quantile of the null below which pairs are counted to estimate how many are chance."""


Latents = Int[np.ndarray, " some"]
"""Numbers of some latents."""


class PairEvidence(NamedTuple):
    """Evidence for each pair from its comparison with the null."""

    q_values: Float[np.ndarray, " pair"]
    """Smallest false match rate at which the pair is still matched."""
    n_null: int
    """Estimated number of pairs that are chance."""
    null: Float[np.ndarray, " draw"]
    """Similarity of chance pairs, as a cosine of average ones."""


class Whitened(NamedTuple):
    """Directions of vectors, with equal second moments along all axes of each."""

    rows: list[Float16[np.ndarray, "n k"]]
    """Whitened directions: one array, or one for each part where a rotation turns all alike."""
    colors: list[Float[np.ndarray, "k _width"]]
    """Matrices that turn whitened rows back into directions."""
    lengths: Float[np.ndarray, "n part"]
    """Length of each part of each vector; the number itself of a part of one number."""
    widths: tuple[int, ...]
    """Number of numbers in each part."""

    def with_lengths(
        self, directions: Sequence[Float[np.ndarray, "some _width"]], latents: Latents
    ) -> Float[np.ndarray, "some width"]:
        """Give the parts of vectors the lengths that those of some originals have, in place."""
        lengths = self.lengths[latents]
        if len(self.widths) == 1:
            vectors = directions[0]
        else:
            vectors = np.empty((len(lengths), sum(self.widths)), np.float32)
            rows = [k for k, width in enumerate(self.widths) if width > 1]
            kept = np.repeat(np.isin(np.arange(len(self.widths)), rows), self.widths)
            vectors[:, kept] = np.concatenate(directions, axis=1)
        start = 0
        for width, length in zip(self.widths, lengths.T, strict=True):
            part = vectors[:, start : start + width]
            start += width
            if width == 1:
                part[:] = length[:, None]
                continue
            now = np.sqrt(np.einsum("nd,nd->n", part, part, dtype=np.float64))
            part *= (length / np.maximum(now, 1e-30)).astype(np.float32)[:, None]
        return vectors


def whiten(x: Float[np.ndarray, "n width"], widths: Sequence[int] = ()) -> Whitened:
    """Whiten the directions of vectors.

    The parts of a vector keep their lengths, because what is between them depends on the latent
    (a threshold makes the encoder longer and the decoder shorter). A decoder and an encoder in the
    same space are turned alike, so that the angle between them stays the latent's own.

    Args:
        x: Vectors.
        widths: Number of numbers in each part that has a length of its own; by default one part.
    """
    widths = tuple(widths) or (x.shape[1],)
    pieces = np.split(x, np.cumsum(widths)[:-1], axis=1)
    lengths = [p[:, 0] if p.shape[1] == 1 else np.linalg.norm(p, axis=1) for p in pieces]
    sides = np.stack(lengths, axis=1).astype(np.float32), widths
    whole = [unit_rows(p) for p in pieces if p.shape[1] > 1] or [np.ones_like(x)]
    if len(whole) == 1 or not _in_one_space(whole):
        rows, sizes, axes = _whiten(whole[0] if len(whole) == 1 else np.concatenate(whole, axis=1))
        return Whitened([_short(rows)], [(sizes[:, None] * axes.T).numpy()], *sides)
    made = [_whiten(each) for each in whole]
    frame = torch.linalg.eigh(sum((axes * sizes) @ axes.T for _, sizes, axes in made))[1]
    rows = [_short(white @ (axes.T @ frame)) for white, _, axes in made]
    return Whitened(
        rows, [(frame.T @ (axes * sizes) @ axes.T).numpy() for _, sizes, axes in made], *sides
    )


def _short(rows: Tensor) -> Float16[np.ndarray, "n k"]:
    """Keep whitened rows in half the memory: chance has no fourth digit."""
    return rows.half().numpy()


def _in_one_space(parts: list[Float[np.ndarray, "n _width"]]) -> bool:
    """Whether two parts are rows of one space: on the average they point the same way."""
    a, b = parts
    return a.shape == b.shape and float(np.einsum("nd,nd->n", a, b).mean()) > SAME_WAY


def _whiten(x: Float[np.ndarray, "n d"]) -> tuple[Tensor, Tensor, Tensor]:
    """Whiten rows in place; returns them, and the length and direction of each axis.

    Rows at length 1 are short along the axes where they vary most; a null made of them and brought
    to length 1 once more would be too short there, and too seldom similar. So lengths are first
    made equal where the rows are whitened.

    Source:
        Tyler, A distribution-free M-estimator of multivariate scatter (1987).
    """
    rows = torch.from_numpy(x)
    if len(rows) <= rows.shape[1]:  # whitened rows are orthogonal, and of one length
        u, s, vt = torch.linalg.svd(rows, full_matrices=False)
        return u, s, vt.T
    for _ in range(LENGTH_PASSES):
        moments = rows.T @ rows
        ridge = 1e-6 * moments.diagonal().mean() * torch.eye(len(moments))
        root = torch.linalg.cholesky(moments + ridge)
        length = torch.cat(
            [torch.linalg.solve_triangular(root, part.T, upper=False).norm(dim=0)
             for part in rows.split(MANY)]
        )  # fmt: skip
        rows /= length.where(length > 1e-6 * length.max(), torch.ones(1))[:, None]
    variances, axes = torch.linalg.eigh(rows.T @ rows)
    present = variances > 1e-6 * variances[-1]
    sizes, axes = variances[present].sqrt(), axes[:, present]
    turned = rows if present.all() else rows.new_empty(len(rows), len(sizes))
    for part, to in zip(rows.split(MANY), turned.split(MANY), strict=True):
        to.copy_(part @ (axes / sizes))
    return turned, sizes, axes


def rotate(x: Float[np.ndarray, "n width"] | Whitened, random: np.random.Generator) -> "Draw":
    """Make a null dictionary whose directions have the same second moments, and are random."""
    white = x if isinstance(x, Whitened) else whiten(x)
    k = len(white.colors[0])
    rotation, r = torch.linalg.qr(torch.from_numpy(random.standard_normal((k, k), np.float32)))
    rotation = rotation * r.diagonal().sign()
    parts = [(each, rotation @ torch.from_numpy(c)) for each, c in zip(*white[:2], strict=True)]

    def draw(latents: Latents) -> Float[np.ndarray, "some width"]:
        made = [(torch.from_numpy(each[latents]).float() @ turn).numpy() for each, turn in parts]
        return white.with_lengths(made, latents)

    return draw


def shuffle(x: Float[np.ndarray, "n width"] | Whitened, random: np.random.Generator) -> "Draw":
    """Make a null dictionary with the same distribution along each axis, mixed among latents."""
    white = x if isinstance(x, Whitened) else whiten(x)
    n, k = white.rows[0].shape
    shifts = random.integers(0, n, k)  # the order of latents says nothing, so a shift is a shuffle

    def draw(latents: Latents) -> Float[np.ndarray, "some width"]:
        parts = zip(*white[:2], strict=True)
        made = [_shifted(each, shifts, latents, color) for each, color in parts]
        return white.with_lengths(made, latents)

    return draw


def _shifted(
    rows: Float16[np.ndarray, "n k"],
    shifts: Int[np.ndarray, " k"],
    latents: Latents,
    color: Float[np.ndarray, "k width"],
) -> Float[np.ndarray, "some width"]:
    """Give some latents each coordinate of another row, as far on as its shift, and color them."""
    total = np.zeros((len(latents), color.shape[1]), np.float32)
    for first in range(0, len(latents), MANY):
        to = slice(first, first + MANY)
        some = latents[to, None]
        for start in range(0, len(shifts), COORDINATES):
            own = np.arange(start, min(start + COORDINATES, len(shifts)))
            moved = rows[(some - shifts[own]) % len(rows), own].astype(np.float32)
            total[to] += moved @ color[own]
    return total


Draw = Callable[[Latents], Float[np.ndarray, "some width"]]
"""A null dictionary, as a function that gives the vectors of some latents."""
Null = Callable[[Any, np.random.Generator], Draw]
"""Function that makes a null dictionary from the vectors of a real one."""
NULLS: tuple[Null, ...] = (rotate, shuffle)
"""Nulls of weights, which are given them whitened."""


def compare_with_null(
    a: Float[np.ndarray, "n width"],
    b: Float[np.ndarray, "m width"],
    rows: Int[np.ndarray, " pair"],
    columns: Int[np.ndarray, " pair"],
    *,
    nulls: Sequence[Null] = NULLS,
    widths: Sequence[int] = (),
    seed: int = 0,
    costs: Factors | None = None,
    on_progress: Progress = no_progress,
    engine: Engine | None = None,
) -> PairEvidence:
    """Compare pairs with pairs that chance makes.

    Args:
        a: Vectors of A, as they were paired; up to a common factor where there are costs.
        b: Vectors of B.
        rows: Latent of A in each pair.
        columns: Latent of B in each pair.
        nulls: Functions that make null dictionaries.
        widths: Number of numbers in each part of a vector that has a length of its own; by default
            one part.
        seed: Seed of the null.
        costs: Squared distances of the vectors, of which B has at least as many as A.
        on_progress: Callback with the rounds that are done, of at most how many.
        engine: Engine that compares blocks of latents of large dictionaries.

    Source:
        Storey, A direct approach to false discovery rates (2002).
    """
    if len(b) < len(a):  # a null of few latents would lie in the few directions that they span
        return compare_with_null(
            b,
            a,
            columns,
            rows,
            nulls=nulls,
            widths=widths,
            seed=seed,
            on_progress=on_progress,
            engine=engine,
        )
    random = np.random.default_rng([seed, 5])
    costs = costs or Factors.squared_distances(a, b).kept()
    null = _null_dictionaries(b, nulls, widths, random)
    world = NullWorld(rows, columns, costs, engine)
    measure = _Similarity(a, len(b), map(null, range(len(nulls))), random)
    pairs, nulls_of = measure(world.pairs()), [measure.by_chance]
    before, n_null, q_values = 0, len(rows), np.empty(0)
    draws: list[list[_Pairs]] = [[] for _ in nulls]
    for turn in range(ROUNDS):
        on_progress(turn, ROUNDS)
        before, n_null = n_null, _count_null(pairs, nulls_of)
        if turn == 1 or abs(n_null - before) > MAX_CHANGE * before:
            draws = [[] for _ in nulls]  # these were made with other pairs replaced
        settled = all(draws) and abs(n_null - before) <= 0.03 * before
        if n_null < 2 or (settled and sum(len(each.similar) for each in nulls_of) >= ENOUGH_DRAWS):
            break
        drop = _draw_replaced(pairs.similar, q_values, n_null, random)
        replaced = np.union1d(columns[drop], np.setdiff1d(np.arange(len(b)), columns))
        one = len(nulls) * len(replaced) >= ENOUGH_DRAWS
        last = turn >= ROUNDS - KEPT_ROUNDS
        repeats = min(MAX_REPEATS, -(-MIN_DRAWS // len(replaced))) if last else 1
        for k in [turn % len(nulls)] if one else range(len(nulls)):
            new = [measure(world.chance_pairs(replaced, null(k)(replaced))) for _ in range(repeats)]
            draws[k].append(_Pairs.joined(new))
        nulls_of = [_Pairs.joined(each[-KEPT_ROUNDS:]) for each in draws if each]
        q_values = _q_values(pairs.distinct, [each.distinct for each in nulls_of], n_null)
    on_progress(ROUNDS, ROUNDS)
    q_values = _q_values(pairs.distinct, [each.distinct for each in nulls_of], max(n_null, 1))
    return PairEvidence(q_values, n_null, _Pairs.joined(nulls_of).similar)


def _null_dictionaries(
    b: Float[np.ndarray, "m width"],
    nulls: Sequence[Null],
    widths: Sequence[int],
    random: np.random.Generator,
) -> Callable[[int], Draw]:
    """Make a function that makes the null dictionaries by number, large ones once."""
    white = whiten(b, widths) if any(make in NULLS for make in nulls) else None

    def make(k: int) -> Draw:
        return nulls[k](white if nulls[k] in NULLS else b, random)

    return functools.cache(make) if len(b) > ENOUGH_DRAWS else make


class _Pairs(NamedTuple):
    """Similarity of pairs, on the scale of a cosine of average latents."""

    similar: Float[np.ndarray, " pair"]
    """Cosine beyond chance."""
    distinct: Float[np.ndarray, " pair"]
    """Cosine beyond chance and beyond the next best latents."""

    @classmethod
    def joined(cls, parts: Sequence["_Pairs"]) -> "_Pairs":
        """All pairs, one part after another."""
        return cls(*map(np.concatenate, zip(*parts, strict=True)))


class _Similarity:
    """Cosine of pairs beyond chance, and beyond the next best of their latents.

    A cosine c where chance gives e counts as (c - e) / (1 - e), which is 1 for equal latents
    whatever chance gives. Chance gives the mean cosine with the nearest latent of a null
    dictionary, more to latents whose cosines with all of the other side are large.
    """

    def __init__(
        self, a: np.ndarray, n_columns: int, nulls: Iterable[Draw], random: np.random.Generator
    ) -> None:
        x = unit_rows(a[random.permutation(len(a))[:FIRST_SAMPLE]])
        cosines, typical = [], []
        for draw in nulls:
            of_rows, nearest, of_columns = np.zeros((3, len(x)))
            nearest -= np.inf
            for start in range(0, n_columns, MANY):
                block = x @ unit_rows(draw(np.arange(start, min(start + MANY, n_columns)))).T
                of_rows += np.einsum("nm,nm->n", block, block) / n_columns
                best = block.argmax(axis=1)
                found = block[np.arange(len(x)), best].astype(np.float64)
                squares = np.einsum("nm,nm->m", block, block) / len(x)
                of_columns = np.where(found > nearest, squares[best], of_columns)
                nearest = np.maximum(nearest, found)
            cosines.append(nearest)
            typical.append(_typical(of_rows, of_columns))
        cosine, expected = np.concatenate(cosines), np.concatenate(typical)
        self._average = float(np.clip(cosine.mean(), 0.0, MAX_CHANCE_COSINE))
        self._nearest = self._average / max(float(expected.mean()), 1e-12)
        similar = self._beyond(cosine, self._expected(expected))
        self.by_chance = _Pairs(similar, similar)

    def _expected(self, typical: Float[np.ndarray, " pair"]) -> Float[np.ndarray, " pair"]:
        return np.minimum(self._nearest * typical, MAX_CHANCE_COSINE)

    def _beyond(self, cosine: np.ndarray, other: np.ndarray) -> Float[np.ndarray, " pair"]:
        return self._average + (1 - self._average) * (cosine - other) / (1 - other)

    def __call__(self, seen: Seen) -> _Pairs:
        """Measure pairs."""
        expected = self._expected(_typical(*seen.squares))
        larger, smaller = np.maximum(*seen.following), np.minimum(*seen.following)
        following = np.minimum(smaller + LARGER * (larger - smaller), MAX_NEXT_COSINE)
        return _Pairs(
            self._beyond(seen.cosine, expected),
            self._beyond(seen.cosine, np.maximum(expected, following)),
        )


def _typical(of_rows: np.ndarray, of_columns: np.ndarray) -> Float[np.ndarray, " pair"]:
    """Root mean square of the cosines with all of the other side, mean of both latents."""
    return np.sqrt(np.sqrt(of_rows * of_columns, dtype=np.float64))


def _draw_replaced(
    similarity: Float[np.ndarray, " pair"],
    q_values: Float[np.ndarray, " known"],
    n: int,
    random: np.random.Generator,
) -> Int[np.ndarray, " n"]:
    """Draw as many pairs as appear to be chance, each as often as it is likely to be chance.

    The least similar alone would be latents of unusual directions, which have no siblings. Where
    fewer pairs can be chance, by more than a standard error, fewer are drawn: others are partners,
    whose null latents may be more similar than those of chance pairs.

    Source:
        Madow, On the theory of systematic sampling (1949), for draws with given probabilities.
    """
    if not len(q_values):
        return np.argsort(similarity, kind="stable")[:n]
    weight = np.maximum(local_fdr(q_values), 1e-12)
    n = min(n, len(weight), round(weight.sum() + np.sqrt(n)))
    included = np.zeros(len(weight))
    free = np.ones(len(weight), bool)
    while True:  # probabilities in proportion to the weights, none above 1
        included[free] = weight[free] * (n - (~free).sum()) / weight[free].sum()
        above = free & (included > 1)
        if not above.any():
            break
        included[above], free[above] = 1.0, False
    order = random.permutation(len(weight))
    steps = np.floor(np.cumsum(included[order]) + random.random())
    return order[np.diff(steps, prepend=0.0) > 0]


def local_fdr(q_values: Float[np.ndarray, " pair"]) -> Float[np.ndarray, " pair"]:
    """Estimate the probability that each pair is wrong (local false discovery rate).

    A pair's probability is how much it adds to the number of pairs expected to be wrong. An
    isotonic fit makes it rise with the q-value.
    """
    if not len(q_values):
        return q_values
    order = np.argsort(q_values, kind="stable")
    n_wrong = q_values[order] * np.arange(1, len(order) + 1)
    rises = isotonic_regression(np.diff(n_wrong, prepend=0.0)).x
    probability = np.empty(len(order))
    probability[order] = np.clip(rises, 0.0, 1.0)
    return probability


def _count_null(pairs: _Pairs, draws: list[_Pairs]) -> int:
    """Estimate the number of chance pairs from how many lie where most of the null does."""
    nulls = [each.similar for each in draws]

    def count(null: np.ndarray) -> float:
        below = int((pairs.similar <= np.quantile(null, STOREY_QUANTILE)).sum())
        return min(float(len(pairs.similar)), below / STOREY_QUANTILE)

    odds = (1 - STOREY_QUANTILE) / STOREY_QUANTILE
    alone = [count(null) * (1 - DOUBT * np.sqrt(odds / len(null))) for null in nulls]
    return round(max([count(np.concatenate(nulls)), *alone]))


def _q_values(
    similarity: Float[np.ndarray, " pair"], nulls: list[np.ndarray], n_null: int
) -> Float[np.ndarray, " pair"]:
    """Share of chance pairs among all that are at least as similar, smallest over thresholds.

    Nulls are pooled; where one of them alone has a larger share, beyond its own sampling error,
    that counts. The largest share of all would be too large by that error.
    """
    order = np.argsort(similarity)
    above = len(similarity) - np.searchsorted(similarity[order], similarity, side="left")
    low = np.sort(np.concatenate(nulls))
    more = len(low) - np.searchsorted(low, similarity, side="left")
    by_chance = (more + 1) / (len(low) + 1)
    for null in map(np.sort, nulls):
        share = 1 - np.searchsorted(null, similarity, side="left") / len(null)
        doubt = DOUBT * np.sqrt(share * (1 - share) / len(null))
        by_chance = np.maximum(by_chance, share - doubt)
    rate = np.minimum(1.0, by_chance * n_null / above)
    smallest = np.minimum.accumulate(rate[order])
    q_values = np.empty(len(similarity))
    q_values[order] = smallest
    return q_values
