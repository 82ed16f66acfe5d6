"""Pair two dictionaries, with the proof that it is the best pairing and the evidence for each pair.

Main path, in reading order:

    match       fold, pair exactly, weigh every pair against a null
    Match       the pairing with its evidence
    relatives   splitting and merging: who else is as near as a partner

Source: Balagansky et al., Mechanistic permutability (2024).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from mechatlas.analysis.matching.folding import Atoms, Parts, fold, unit_rows, vectors
from mechatlas.analysis.matching.nulls import NULLS, Evidence, Null, weigh
from mechatlas.base import InputError, Progress, no_progress
from mechatlas.maths.assignment import Assignment, State, assign
from mechatlas.maths.pricing import Factors

RATE = 0.05
NEAR = 0.75
"""Cosine of a relative, as a share of the best that either side has."""


@dataclasses.dataclass(frozen=True, eq=False)
class Match:
    """A one-to-one pairing of latents, with its evidence."""

    columns: Int[np.ndarray, " latent_a"]
    """The latent of B for each of A; -1 for those of A that are too many."""
    cost: float
    lower_bound: float
    """No one-to-one pairing costs less."""
    gap: float
    """Cost less lower bound."""
    pair_costs: Float[np.ndarray, " latent_a"]
    """Cost of each pair; NaN where there is none."""
    cosines: Float[np.ndarray, " latent_a"]
    """Cosine of the two vectors; 0 where there is no pair."""
    q_values: Float[np.ndarray, " latent_a"]
    """Smallest false match rate at which the pair is still matched; 1 where there is none."""
    matched: Bool[np.ndarray, " latent_a"]
    """The pair stands against the null: `q_values <= rate`."""
    rate: float
    """False match rate asked for."""
    threshold: float
    """Cosine that counts as a partner, which as many pairs have as are matched: the price of having
    no partner is 2 - 2 times it."""
    evidence: Evidence
    """What the null says of the pairs, in the order of rows that have one."""
    assignment: Assignment
    """The pairing with its prices, for `certify(match.costs)`."""
    costs: Factors
    unit_a: Float[np.ndarray, "latent_a width"]
    """The compared vectors at length 1."""
    unit_b: Float[np.ndarray, "latent_b width"]
    of_a: Int[np.ndarray, " rows"]
    """Latents of A that were paired, the rows of `costs`: all, but of codes only active ones."""
    of_b: Int[np.ndarray, " columns"]

    def partial(self) -> Int[np.ndarray, " latent_a"]:
        """The best pairing by cosine when a latent may also have no partner, for its price."""
        price = 2 - 2 * min(self.threshold, 1.0)
        costs = Factors.squared_distances(self.unit_a[self.of_a], self.unit_b[self.of_b])
        columns = np.full(len(self.unit_a), -1)
        found = assign(costs, unmatched=price).columns
        columns[self.of_a] = np.where(found < 0, -1, self.of_b[found])
        return columns


def match(
    a: Any,
    b: Any,
    *,
    parts: Parts = "decoder",
    units: tuple[Any, Any] = (None, None),
    rate: float = RATE,
    nulls: Sequence[Null] = NULLS,
    seed: int = 0,
    resume: State | None = None,
    evidence: Evidence | None = None,
    on_progress: Progress = no_progress,
    on_state: Callable[[State], None] | None = None,
) -> Match:
    """Pair the latents of two dictionaries.

    Args:
        a: A dictionary, or a matrix of decoder rows.
        b: The other.
        parts: What the cost compares, always as a squared distance.
        units: Activation of each latent of A and B that counts as 1; by default thresholds.
        rate: False match rate at which a pair counts as matched.
        nulls: How null dictionaries are made; `(reordered,)` for codes.
        seed: Seed of the null.
        resume: State of a pairing that was stopped.
        evidence: That of a run which ended, if it is known.
        on_progress: Told how far the pairing is.
        on_state: Told the state of the pairing after every round.

    Raises:
        InputError: They cannot be folded, have different widths, or a choice is unknown.
    """
    if not 0 < rate < 1:
        raise InputError(f"The false match rate must lie between 0 and 1, got {rate}.")
    if parts not in get_args(Parts):
        raise InputError(f"parts must be one of {', '.join(get_args(Parts))}, got {parts!r}.")
    if seed < 0:
        raise InputError(f"The seed must be at least 0, got {seed}.")
    x, y = _compared(fold(a, unit=units[0]), fold(b, unit=units[1], name="B"), parts)
    there = _paired(x, y) if parts == "codes" else (np.arange(len(x)), np.arange(len(y)))
    costs = Factors.squared_distances(x[there[0]], y[there[1]])
    found = assign(costs, resume=resume, on_progress=on_progress, on_state=on_state)
    one = weighed(found, costs, rate=rate, nulls=nulls, seed=seed, evidence=evidence)
    return one if parts != "codes" else _spread(one, *there, len(x), len(y))


def _compared(a: Atoms, b: Atoms, parts: Parts) -> tuple[np.ndarray, np.ndarray]:
    """The vectors that a cost compares.

    Raises:
        InputError: They have different widths.
    """
    x, y = vectors(a, b, parts), vectors(b, a, parts)
    if x.shape[1] != y.shape[1]:
        raise InputError(
            f"A has {x.shape[1]} numbers for a latent and B has {y.shape[1]}: weights of different "
            "widths do not compare. Give a store of paired rows to compare their codes instead."
        )
    return x, y


def _paired(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Latents whose codes are not zero.

    Raises:
        InputError: There is none.
    """
    there = np.flatnonzero(x.any(axis=1)), np.flatnonzero(y.any(axis=1))
    for name, latents in zip("AB", there, strict=True):
        if not len(latents):
            raise InputError(
                f"No latent of {name} is active often enough on these rows to be paired by its "
                "codes. Give more rows."
            )
    return there


def _spread(one: Match, of_a: np.ndarray, of_b: np.ndarray, n: int, m: int) -> Match:
    """The match of some latents as one of all; the others stay without a pair."""

    def among(values: np.ndarray, size: int, of: np.ndarray, empty: Any) -> np.ndarray:
        every = np.full((size, *values.shape[1:]), empty, values.dtype)
        every[of] = values
        return every

    return dataclasses.replace(
        one,
        columns=among(np.where(one.columns < 0, -1, of_b[one.columns]), n, of_a, -1),
        pair_costs=among(one.pair_costs, n, of_a, np.nan),
        cosines=among(one.cosines, n, of_a, 0.0),
        q_values=among(one.q_values, n, of_a, 1.0),
        matched=among(one.matched, n, of_a, False),
        unit_a=among(one.unit_a, n, of_a, 0.0),
        unit_b=among(one.unit_b, m, of_b, 0.0),
        of_a=of_a,
        of_b=of_b,
    )


def weighed(
    found: Assignment,
    costs: Factors,
    *,
    rate: float = RATE,
    nulls: Sequence[Null] = NULLS,
    seed: int = 0,
    evidence: Evidence | None = None,
) -> Match:
    """A pairing with the evidence for each of its pairs."""
    n = costs.n_rows
    unit_a, unit_b = unit_rows(costs.a), unit_rows(costs.b)
    rows = np.flatnonzero(found.columns >= 0)
    columns = found.columns[rows]
    evidence = evidence or weigh(unit_a, unit_b, rows, columns, nulls=nulls, seed=seed)
    pair_costs, cosines, q_values = np.full(n, np.nan), np.zeros(n), np.ones(n)
    pair_costs[rows] = costs.exact(rows, columns)
    cosines[rows] = np.einsum("pd,pd->p", unit_a[rows], unit_b[columns], dtype=np.float64)
    q_values[rows] = evidence.q_values
    matched = q_values <= rate
    # As many pairs as are matched; where all of them are alike, chance says where the line is.
    least = float(np.sort(cosines)[-max(int(matched.sum()), 1)])
    least = min(least, float(evidence.null.max()))
    return Match(
        columns=found.columns,
        cost=found.cost,
        lower_bound=found.lower_bound,
        gap=found.gap,
        pair_costs=pair_costs,
        cosines=cosines,
        q_values=q_values,
        matched=matched,
        rate=rate,
        threshold=least if matched.any() else math.inf,
        evidence=evidence,
        assignment=found,
        costs=costs,
        unit_a=unit_a,
        unit_b=unit_b,
        of_a=np.arange(n),
        of_b=np.arange(costs.n_columns),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Relatives:
    """Pairs as alike as partners, whether partners or not."""

    latent_a: Int[np.ndarray, " pair"]
    latent_b: Int[np.ndarray, " pair"]
    cosine: Float[np.ndarray, " pair"]
    reduced_cost: Float[np.ndarray, " pair"]
    """What the cost of the whole would rise by at least if this pair had to be in it."""

    def split(self) -> Int[np.ndarray, " n"]:
        """Latents of A with more than one relative in B."""
        return np.flatnonzero(np.bincount(self.latent_a) > 1)

    def merged(self) -> Int[np.ndarray, " n"]:
        """Latents of B with more than one relative in A."""
        return np.flatnonzero(np.bincount(self.latent_b) > 1)


def relatives(found: Match, *, most: int = 4) -> Relatives:
    """Splitting and merging: pairs above the threshold that come near to the best of both sides.

    Args:
        found: A match.
        most: Relatives looked at of each latent.
    """
    pairs, best = np.empty((0, 2), np.int64), []
    sides = (found.unit_a, found.unit_b, False), (found.unit_b, found.unit_a, True)
    for one, other, turned in sides:
        largest = []
        for start in range(0, len(one), 1024):
            near = torch.from_numpy(one[start : start + 1024]) @ torch.from_numpy(other).T
            top = near.topk(min(most, near.shape[1]), dim=1)
            values, others = top.values.numpy(), top.indices.numpy()
            largest.append(values[:, 0])
            i, k = np.nonzero(values >= max(found.threshold, 1e-6))
            new = np.stack([i + start, others[i, k]], axis=1)
            pairs = np.concatenate([pairs, new[:, ::-1] if turned else new])
        best.append(np.concatenate(largest))
    i, j = np.unique(pairs, axis=0).T
    cosine = np.einsum("pd,pd->p", found.unit_a[i], found.unit_b[j], dtype=np.float64)
    close = cosine >= NEAR * np.maximum(best[0][i], best[1][j])
    i, j, cosine = i[close], j[close], cosine[close]
    row, column = np.searchsorted(found.of_a, i), np.searchsorted(found.of_b, j)
    prices = found.assignment.row_prices[row] + found.assignment.column_prices[column]
    return Relatives(i, j, cosine, found.costs.exact(row, column) - prices)
