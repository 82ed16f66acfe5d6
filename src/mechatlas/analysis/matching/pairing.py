"""Optimal one-to-one pairing of two dictionaries, with proof of optimality and evidence by pair.

Main path, in reading order:

    match               fold, pair exactly, compare every pair with a null
    Match               the pairing with its evidence
    matches_table       pairs of several matches, as columns
    feature_splitting   feature splitting and merging: pairs as similar as partners

Source: Balagansky et al., Mechanistic permutability (2024).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from mechatlas.analysis.matching.degenerate import Side, sides
from mechatlas.analysis.matching.folding import (
    Cost,
    FoldedDictionary,
    fold,
    part_widths,
    unit_rows,
    vectors,
)
from mechatlas.analysis.matching.nulls import NULLS, Null, PairEvidence, compare_with_null
from mechatlas.base import Engine, InputError, Progress, Result, no_progress
from mechatlas.deprecated import renamed_arguments, renamed_attributes
from mechatlas.devices import as_device
from mechatlas.maths.arrays import as_array
from mechatlas.maths.assignment import Assignment, State, assign
from mechatlas.maths.margins import MAX_LISTED, Margins, margins
from mechatlas.maths.near_optima import SHARES, NearOptimal, count_near_optimal
from mechatlas.maths.pricing import COLUMNS, Factors, multiplying
from mechatlas.maths.replacing import cosines_of_pairs

FDR = 0.05
"""Default false match rate."""
SPLITTING_RATIO = 0.75
"""Smallest cosine of a split feature's pairs, relative to the best cosine of either latent."""
BLOCK = 1024
"""Latents compared at once with all of the other side."""
ROUNDING = 0.01
"""Upper bound on the error of a cosine in bfloat16, where each factor errs by up to 1 in 512."""
FEW = 1e-3
"""Share of all pairs up to which those near the least cosine are computed one by one."""


@renamed_attributes
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Match(Result):
    """One-to-one pairing of the latents of two dictionaries, with its evidence."""

    columns: Int[np.ndarray, " latent_a"]
    """Latent of B for each latent of A; -1 where the larger side A has no pair, or one of the two
    could not be paired."""
    cost: float
    """Sum of the costs of all pairs."""
    lower_bound: float
    """Lower bound on the cost of every one-to-one pairing, from the dual prices."""
    gap: float
    """Cost minus lower bound: the most that a better pairing could save."""
    pair_costs: Float[np.ndarray, " latent_a"]
    """Cost of each pair; NaN where there is none."""
    cosines: Float[np.ndarray, " latent_a"]
    """Cosine of the two vectors of each pair; 0 where there is none."""
    q_values: Float[np.ndarray, " latent_a"]
    """Smallest false match rate at which the pair is still matched; 1 where there is none."""
    matched: Bool[np.ndarray, " latent_a"]
    """Significant pairs: `q_values <= fdr`."""
    fdr: float
    """False match rate asked for."""
    cosine_threshold: float
    """Cosine above which as many pairs lie as are matched; infinite where none is matched."""
    evidence: PairEvidence
    """Comparison with the null, in the order of the rows that have a pair."""
    assignment: Assignment
    """Pairing with its dual prices, for `certify(match.costs)`."""
    costs: Factors
    """Costs of all pairs of `active_a` and `active_b`, in factored form."""
    unit_a: Float[np.ndarray, "latent_a width"]
    """Compared vectors of A at length 1."""
    unit_b: Float[np.ndarray, "latent_b width"]
    """Compared vectors of B at length 1."""
    active_a: Int[np.ndarray, " rows"]
    """Latents of A that took part, the rows of `costs`: not zero, constant or never active, and the
    first of those with one direction."""
    active_b: Int[np.ndarray, " columns"]
    """Latents of B that took part, the columns of `costs`."""
    degenerate_a: Bool[np.ndarray, " latent_a"]
    """Latents of A that cannot be matched: zero, constant, never active, or not the only one with
    their direction."""
    degenerate_b: Bool[np.ndarray, " latent_b"]
    """Latents of B that cannot be matched."""

    def summary(self) -> str:
        """Number of matched latents, false match rate and optimality gap."""
        smaller = min(len(self.unit_a), len(self.unit_b))
        threshold = (
            f"cosine above {self.cosine_threshold:.3f}"
            if self.matched.any()
            else "no pair is more similar than chance"
        )
        n_a, n_b = int(self.degenerate_a.sum()), int(self.degenerate_b.sum())
        degenerate = (
            f"\nZero, constant, duplicated or never active: {n_a:,} latents of A, {n_b:,} of B."
        )
        return (
            f"Match: {int(self.matched.sum()):,} of {smaller:,} latents matched "
            f"(false match rate {self.fdr:.0%}, {threshold}).\n"
            f"{len(self.unit_a):,} latents of A, {len(self.unit_b):,} of B; cost {self.cost:.6g}, "
            f"optimality gap {self.gap:.1e}; about {self.evidence.n_null:,} pairs are chance."
            f"{degenerate if n_a or n_b else ''}"
        )

    def matched_columns(self) -> Int[np.ndarray, " latent_a"]:
        """Latent of B for each latent of A that is matched; -1 for the others."""
        return np.where(self.matched, self.columns, -1)

    def margins(self, *, max_listed: int | None = MAX_LISTED) -> Margins:
        """Find the rise of the total cost if each pair is forbidden: how determined it is.

        The rise is NaN for latents without a pair, infinite where there is no other pairing.

        Args:
            max_listed: Longest list of candidates that is searched for each latent; `None` for all,
                so that every rise is exact. With shorter lists large rises are lower bounds.
        """
        found = margins(self.assignment, self.costs.kept(), max_listed=max_listed)
        n = len(self.unit_a)
        rise, exact = np.full(n, np.nan), np.zeros(n, bool)
        rise[self.active_a], exact[self.active_a] = found
        return Margins(rise, exact)

    def near_optimal(self, shares: Sequence[float] = SHARES) -> list[NearOptimal]:
        """Bound how many one-to-one pairings cost nearly as little as the optimum.

        Nothing is listed if the optimum costs nothing, as of a dictionary with itself.

        Args:
            shares: Shares of the cost of the optimum that the others may cost more.
        """
        if self.assignment.lower_bound <= 0:
            return []
        return count_near_optimal(self.assignment, self.costs.kept(), shares)

    def partial_assignment(self) -> Int[np.ndarray, " latent_a"]:
        """Optimal pairing by cosine in which a latent may stay unmatched.

        Staying unmatched costs 2 - 2 * `cosine_threshold`.
        """
        price = 2 - 2 * min(self.cosine_threshold, 1.0)
        costs = Factors.squared_distances(self.unit_a[self.active_a], self.unit_b[self.active_b])
        columns = np.full(len(self.unit_a), -1)
        partners = assign(costs, unmatched=price).columns
        columns[self.active_a] = np.where(partners < 0, -1, self.active_b[partners])
        return columns


@renamed_arguments
def match(
    a: Any,
    b: Any,
    *,
    cost: Cost = "decoder",
    scale: tuple[Any, Any] = (None, None),
    live: tuple[Any, Any] = (None, None),
    fdr: float = FDR,
    nulls: Sequence[Null] = NULLS,
    seed: int = 0,
    device: torch.device | str = "cpu",
    resume: State | None = None,
    evidence: PairEvidence | None = None,
    on_progress: Progress = no_progress,
    on_state: Callable[[State], None] | None = None,
    engine: Engine | None = None,
) -> Match:
    """Pair the latents of two dictionaries one to one at the smallest total cost.

    Args:
        a: Dictionary A, or a matrix of decoder rows (latent, d_in): numpy, torch or lists. Arrays
            of float32 are not copied, so the match is about them as long as they do not change.
        b: Dictionary B, likewise.
        cost: Vectors that are compared, always by squared distance.
        scale: Activation of each latent of A and of B that counts as 1; by default thresholds.
        live: Masks of the latents of A and of B that are ever active and not constant, from
            `varying`; by default all are. Others are not paired.
        fdr: False match rate at which a pair counts as matched.
        nulls: Functions that make null dictionaries; `(permute_samples,)` for codes.
        seed: Seed of the null.
        device: Device that computes the costs; other devices than CUDA's leave that to the CPU.
        resume: State of an interrupted pairing, as `on_state` received it.
        evidence: Evidence from an earlier run of the same match, which saves the null.
        on_progress: Callback with the progress of the pairing, and of its null as the second half.
        on_state: Callback with the state of the pairing after every round.
        engine: Engine that compares blocks of the latents of large dictionaries (46,000 and more),
            in the pairing and in its null; the result is the same on all.

    Raises:
        InputError: The dictionaries cannot be folded, have different widths, or a choice is
            unknown.
        RecipeError: There is no such device here.

    Examples:
        >>> import numpy as np, mechatlas as ma
        >>> rows = np.random.default_rng(0).standard_normal((64, 16))
        >>> result = ma.match(rows, rows[::-1])
        >>> result.columns[:3]
        array([63, 62, 61])
        >>> result.matched.all()
        np.True_

    Source:
        Balagansky et al., Mechanistic permutability (2024), section 3.
    """
    if not 0 < fdr < 1:
        raise InputError(f"The false match rate must lie between 0 and 1, got {fdr}.")
    if cost not in get_args(Cost):
        raise InputError(f"cost must be one of {', '.join(get_args(Cost))}, got {cost!r}.")
    if seed < 0:
        raise InputError(f"The seed must be at least 0, got {seed}.")
    costs, side_a, side_b, widths = _prepared((a, b), cost, scale, live, as_device(device))
    assignment = assign(
        costs,
        resume=resume,
        on_progress=lambda done, total: on_progress(done, 2 * total),
        on_state=on_state,
        engine=engine,
    )
    result = with_evidence(
        assignment,
        costs,
        fdr=fdr,
        nulls=nulls,
        widths=widths,
        seed=seed,
        evidence=evidence,
        on_progress=lambda done, total: on_progress(total + done, 2 * total),
        engine=engine,
    )
    return _among_all(result, side_a, side_b)


def _prepared(
    given: tuple[Any, Any],
    cost: Cost,
    scale: tuple[Any, Any],
    live: tuple[Any, Any],
    device: torch.device,
) -> tuple[Factors, Side, Side, tuple[int, ...]]:
    """Costs of the latents that are paired, which these are, and widths of a vector's parts.

    Args:
        given: Both dictionaries.
        cost: Vectors that are compared.
        scale: Activation of each latent of both that counts as 1.
        live: Masks of the latents of both that are paired.
        device: Device that computes the costs.
    """
    folded = fold(given[0], scale=scale[0]), fold(given[1], scale=scale[1], name="B")
    x, y = _compared(*folded, cost)
    side_a, side_b = sides(x, y, folded, cost, (_mask(live[0], x, "A"), _mask(live[1], y, "B")))
    # Of float32 sums on other devices no bound is known.
    at = device if device.type == "cuda" else torch.device("cpu")
    costs = Factors.squared_distances(_rows(x, side_a.paired), _rows(y, side_b.paired), at)
    return costs.kept(), side_a, side_b, part_widths(folded[0], cost)


def _mask(live: Any, x: np.ndarray, name: str) -> Bool[np.ndarray, " latent"] | None:
    """Mask of live latents, checked."""
    mask = None if live is None else as_array(live, "latent", f"The mask of live latents of {name}")
    if mask is not None and len(mask) != len(x):
        raise InputError(
            f"{name} has {len(x)} latents, its mask of live ones {len(mask)}: give one value for "
            "each latent."
        )
    return None if mask is None else mask != 0


def _rows(x: Float[np.ndarray, "n d"], numbers: Int[np.ndarray, " k"]) -> Float[np.ndarray, "k d"]:
    """Rows of an array; the array itself where they are all of it."""
    return x if len(numbers) == len(x) else x[numbers]


def _compared(
    a: FoldedDictionary, b: FoldedDictionary, cost: Cost
) -> tuple[Float[np.ndarray, "latent_a width"], Float[np.ndarray, "latent_b width"]]:
    """Select the vectors that a cost compares."""
    x, y = vectors(a, b, cost), vectors(b, a, cost)
    if x.shape[1] != y.shape[1]:
        raise InputError(
            f"A has {x.shape[1]} numbers for a latent and B has {y.shape[1]}: weights of different "
            "widths do not compare. Give a store of paired rows to compare their codes instead."
        )
    return x, y


def _among_all(result: Match, a: Side, b: Side) -> Match:
    """Extend a match of the latents that are paired to all; the others stay without a pair."""
    n, m = len(a.unique), len(b.unique)

    def spread(values: np.ndarray, size: int, place: np.ndarray, empty: Any) -> np.ndarray:
        if len(place) == size:
            return values
        every = np.full((size, *values.shape[1:]), empty, values.dtype)
        every[place] = values
        return every

    columns = np.where(result.columns < 0, -1, b.paired[result.columns])
    columns = spread(columns, n, a.paired, -1)
    unique = a.unique & np.where(columns < 0, False, b.unique[columns])
    return dataclasses.replace(
        result,
        columns=columns,
        pair_costs=spread(result.pair_costs, n, a.paired, np.nan),
        cosines=spread(result.cosines, n, a.paired, 0.0),
        q_values=np.where(unique, spread(result.q_values, n, a.paired, 1.0), 1.0),
        matched=spread(result.matched, n, a.paired, False) & unique,
        unit_a=spread(result.unit_a, n, a.paired, 0.0),
        unit_b=spread(result.unit_b, m, b.paired, 0.0),
        active_a=a.paired,
        active_b=b.paired,
        degenerate_a=~a.unique,
        degenerate_b=~b.unique,
    )


def with_evidence(
    assignment: Assignment,
    costs: Factors,
    *,
    fdr: float = FDR,
    nulls: Sequence[Null] = NULLS,
    widths: Sequence[int] = (),
    seed: int = 0,
    evidence: PairEvidence | None = None,
    on_progress: Progress = no_progress,
    engine: Engine | None = None,
) -> Match:
    """Add the evidence for each pair to a pairing.

    Args:
        assignment: Optimal pairing.
        costs: Costs that it is optimal for.
        fdr: False match rate at which a pair counts as matched.
        nulls: Functions that make null dictionaries.
        widths: Number of numbers in each part of a vector that has a length of its own.
        seed: Seed of the null.
        evidence: Evidence from an earlier run, which saves the null.
        on_progress: Callback with the rounds of the null that are done, of at most how many.
        engine: Engine that compares blocks of latents.
    """
    n = costs.n_rows
    rows = np.flatnonzero(assignment.columns >= 0)
    columns = assignment.columns[rows]
    turned = costs.n_columns < n  # both sides are exchanged then, and their costs computed
    evidence = evidence or compare_with_null(
        costs.a, costs.b, rows, columns, nulls=nulls, widths=widths,
        seed=seed, costs=None if turned else costs, on_progress=on_progress, engine=engine,
    )  # fmt: skip
    unit_a, unit_b = unit_rows(costs.a), unit_rows(costs.b)
    pair_costs, cosines, q_values = np.full(n, np.nan), np.zeros(n), np.ones(n)
    pair_costs[rows] = costs.exact(rows, columns)
    cosines[rows] = cosines_of_pairs(costs, rows, columns)
    q_values[rows] = evidence.q_values
    matched = q_values <= fdr
    # As many pairs as are matched; where all of them are alike, chance says where the line is.
    least = float(np.sort(cosines)[-max(int(matched.sum()), 1)])
    least = min(least, float(evidence.null.max()))
    return Match(
        columns=assignment.columns,
        cost=assignment.cost,
        lower_bound=assignment.lower_bound,
        gap=assignment.gap,
        pair_costs=pair_costs,
        cosines=cosines,
        q_values=q_values,
        matched=matched,
        fdr=fdr,
        cosine_threshold=least if matched.any() else math.inf,
        evidence=evidence,
        assignment=assignment,
        costs=Factors(
            costs.a, costs.b, costs.row_offsets, costs.column_offsets, device=costs.device
        ),
        unit_a=unit_a,
        unit_b=unit_b,
        active_a=np.arange(n),
        active_b=np.arange(costs.n_columns),
        degenerate_a=np.zeros(n, bool),
        degenerate_b=np.zeros(costs.n_columns, bool),
    )


def matches_table(matches: list[Match]) -> dict[str, np.ndarray]:
    """Pairs of all matches, one after another."""
    rows = [np.flatnonzero(m.columns >= 0) for m in matches]
    parts = list(zip(matches, rows, strict=True))
    margins = [m.margins() for m in matches]
    columns: dict[str, list[np.ndarray]] = {
        "pair": [np.full(len(r), number, np.int32) for number, r in enumerate(rows)],
        "latent_a": rows,
        "latent_b": [m.columns[r] for m, r in parts],
        "cost": [m.pair_costs[r] for m, r in parts],
        "cosine": [m.cosines[r] for m, r in parts],
        "q_value": [m.q_values[r] for m, r in parts],
        "margin": [found.rise[r] for found, r in zip(margins, rows, strict=True)],
        "margin_exact": [found.exact[r] for found, r in zip(margins, rows, strict=True)],
        "matched": [m.matched[r] for m, r in parts],
    }
    return {name: np.concatenate(values) for name, values in columns.items()}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FeatureSplitting(Result):
    """Feature splitting and merging: pairs as similar as partners, whether partners or not."""

    latent_a: Int[np.ndarray, " pair"]
    """Latent of A in each pair."""
    latent_b: Int[np.ndarray, " pair"]
    """Latent of B in each pair."""
    cosine: Float[np.ndarray, " pair"]
    """Cosine of each pair."""
    reduced_cost: Float[np.ndarray, " pair"]
    """Lower bound on what the total cost would rise by if this pair had to be in it."""

    def split(self) -> Int[np.ndarray, " n"]:
        """Latents of A that are similar to more than one latent of B."""
        return np.flatnonzero(np.bincount(self.latent_a) > 1)

    def merged(self) -> Int[np.ndarray, " n"]:
        """Latents of B that are similar to more than one latent of A."""
        return np.flatnonzero(np.bincount(self.latent_b) > 1)

    def summary(self) -> str:
        """Numbers of split and merged features."""
        return (
            f"FeatureSplitting: {len(self.split()):,} features of A split in B, "
            f"{len(self.merged()):,} features of B merge several of A; "
            f"{len(self.latent_a):,} similar pairs in all."
        )


@renamed_arguments
def feature_splitting(matching: Match, *, max_partners: int = 4) -> FeatureSplitting:
    """Find feature splitting and merging: pairs nearly as similar as the best of both latents.

    Args:
        matching: Match of two dictionaries.
        max_partners: Most similar latents of the other side that are considered for each latent.

    Examples:
        >>> import numpy as np, mechatlas as ma
        >>> rows = np.random.default_rng(0).standard_normal((64, 16))
        >>> halves = rows[:1] + np.array([[0.3], [-0.3]]) * rows[1]  # two similar to the first
        >>> splitting = ma.feature_splitting(ma.match(rows, np.concatenate([halves, rows[1:]])))
        >>> splitting.split()
        array([0])
    """
    i, j = _nearest_pairs(matching, max_partners)
    cosine = np.empty(len(i))
    for start in range(0, len(i), BLOCK):
        some = slice(start, start + BLOCK)
        sides = matching.unit_a[i[some]], matching.unit_b[j[some]]
        cosine[some] = np.einsum("pd,pd->p", *sides, dtype=np.float64)
    best = [np.zeros(len(x)) for x in (matching.unit_a, matching.unit_b)]
    for most, latents in zip(best, (i, j), strict=True):
        np.maximum.at(most, latents, cosine)
    close = cosine >= SPLITTING_RATIO * np.maximum(best[0][i], best[1][j])
    i, j, cosine = i[close], j[close], cosine[close]
    row, column = np.searchsorted(matching.active_a, i), np.searchsorted(matching.active_b, j)
    prices = matching.assignment.row_prices[row] + matching.assignment.column_prices[column]
    return FeatureSplitting(i, j, cosine, matching.costs.exact(row, column) - prices)


def _nearest_pairs(
    matching: Match, most: int
) -> tuple[Int[np.ndarray, " pair"], Int[np.ndarray, " pair"]]:
    """Find the pairs as similar as partners that are among the most similar of one of the two."""
    a, b = matching.unit_a, matching.unit_b
    least = max(matching.cosine_threshold, 1e-6)
    i, j = np.empty((2, 0), np.int64)
    values, row_rank = np.empty(0, np.float32), np.empty(0, np.int64)
    for start in range(0, len(a) if least <= 1 + 1e-6 else 0, BLOCK):
        some = a[start : start + BLOCK]
        parts = [
            (rows, first + columns, new)
            for first in range(0, len(b), COLUMNS)
            for rows, columns, new in [_pairs_above(some, b[first : first + COLUMNS], least)]
        ]
        rows, columns, new = map(np.concatenate, zip(*parts, strict=True))
        row_rank = np.append(row_rank, _rank(rows, new))
        i, j = np.append(i, start + rows), np.append(j, columns)
        values = np.append(values, new)
        keep = (row_rank < most) | (_rank(j, values) < most)
        i, j, values, row_rank = i[keep], j[keep], values[keep], row_rank[keep]
    order = np.lexsort((j, i))
    return i[order], j[order]


def _pairs_above(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"], least: float
) -> tuple[Int[np.ndarray, " pair"], Int[np.ndarray, " pair"], Float[np.ndarray, " pair"]]:
    """Find the pairs of unit rows with at least some cosine; a short product shows the few."""
    x, y = torch.from_numpy(a), torch.from_numpy(b).T
    with multiplying("medium"):
        i, j = (x @ y >= least - ROUNDING).numpy().nonzero()
    if len(i) <= FEW * len(a) * len(b):
        cosine = np.einsum("pd,pd->p", a[i], b[j])
    else:
        with multiplying("highest"):
            block = (x @ y).numpy()
        i, j = (block >= least).nonzero()
        cosine = block[i, j]
    above = cosine >= least
    return i[above], j[above], cosine[above]


def _rank(group: Int[np.ndarray, " n"], values: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Number of larger values in the group of each."""
    order = np.lexsort((-values, group))
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    rank = np.empty(len(group), np.int64)
    rank[order] = np.arange(len(group)) - np.repeat(starts, np.diff(starts, append=len(group)))
    return rank
