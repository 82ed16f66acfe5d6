"""Pairs that chance makes once some latents are null ones, from one look at all pairs.

    NullWorld       pairs of the real dictionaries, and wrong pairs once latents of B are replaced
    Seen            cosine of each pair, and what its latents have besides

The pairing is done again for each set of replaced latents, but only pairs of null latents are
priced: see `maths.replacing`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from mechatlas.analysis.matching.folding import unit_rows
from mechatlas.base import Engine
from mechatlas.maths.assignment import first_prices, with_few_rows_added
from mechatlas.maths.pricing import Factors, Kept, Replaced, block_rows
from mechatlas.maths.replacing import Look, cosines, cosines_of_pairs, look, pair_again

MANY = 4096
"""Number of rows that are compared at a time."""


class Seen(NamedTuple):
    """Cosine of each pair, and what its latents have besides, of the row and of the column."""

    cosine: Float[np.ndarray, " pair"]
    squares: tuple[Float[np.ndarray, " pair"], Float[np.ndarray, " pair"]]
    """Mean of the squared cosines with all of the other side."""
    following: tuple[Float[np.ndarray, " pair"], Float[np.ndarray, " pair"]]
    """Largest cosine with the other side but for the partner."""


class NullWorld:
    """Two dictionaries in which some latents of B are replaced by null ones."""

    def __init__(
        self, rows: np.ndarray, columns: np.ndarray, costs: Factors, engine: Engine | None
    ) -> None:
        self._costs, self._engine, self._rows, self._columns = costs, engine, rows, columns
        self._partners = np.full(costs.n_rows, -1)
        self._partners[rows] = columns
        self._all_paired = with_few_rows_added(costs).n_rows == costs.n_columns
        self._precision = "medium" if self._all_paired else "highest"
        self._rough = costs
        if not isinstance(costs, Kept):
            self._rough = dataclasses.replace(costs, precision=self._precision)
        prices = self._first_prices(self._rough)
        if self._all_paired:  # a partner is cheaper than what was looked at first
            np.minimum.at(prices, columns, costs.exact(rows, columns))
        self._before = look(self._rough, prices, engine=engine)

    def _first_prices(self, costs: Factors) -> Float[np.ndarray, " column"]:
        return first_prices(costs) if self._all_paired else np.zeros(costs.n_columns)

    def pairs(self) -> Seen:
        """See the pairs of the real dictionaries."""
        rows, columns, before = self._rows, self._columns, self._before
        cosines, names = before.near_rows
        of_rows, _ = _largest(cosines[rows], names[rows] != columns[:, None])
        return Seen(
            cosines_of_pairs(self._costs, rows, columns),
            self._mean_squares(before.squares[0][rows], before.squares[1][columns]),
            (of_rows, _next_of_columns(before, columns, rows)),
        )

    def chance_pairs(
        self, replaced: Int[np.ndarray, " k"], new: Float[np.ndarray, "k width"]
    ) -> Seen:
        """See the pairs that are wrong once some latents of B are null ones."""
        new_costs = self._costs.with_columns(new, self._precision)
        if isinstance(self._costs, Kept):
            new_costs = new_costs.kept()
        costs = Replaced(self._rough, replaced, new_costs)
        before = self._before
        others = look(new_costs, self._first_prices(new_costs), engine=self._engine)
        columns = pair_again(costs, before, others, engine=self._engine)
        place = costs.place
        wrong = (columns >= 0) & ((columns != self._partners) | (place[columns] >= 0))
        rows = np.flatnonzero(wrong)
        columns = columns[rows]
        is_new = place[columns] >= 0
        squares = before.squares[1][columns]
        squares[is_new] = others.squares[1][place[columns[is_new]]]
        of_columns = _next_of_columns(before, columns, rows)
        of_columns[is_new] = _next_of_columns(others, place[columns[is_new]], rows[is_new])
        lost = _squared_cosines(self._costs.a, rows, self._costs.b, replaced)
        return Seen(
            cosines_of_pairs(costs, rows, columns),
            self._mean_squares(before.squares[0][rows] - lost + others.squares[0][rows], squares),
            (self._next_of_rows(costs, rows, columns, others), of_columns),
        )

    def _next_of_rows(
        self,
        costs: Replaced,
        rows: Int[np.ndarray, " pair"],
        columns: Int[np.ndarray, " pair"],
        others: Look,
    ) -> Float[np.ndarray, " pair"]:
        """Largest cosine of each row but its partner's."""
        place = costs.place
        old, names = (near[rows] for near in self._before.near_rows)
        best, found = _largest(old, (place[names] < 0) & (names != columns[:, None]))
        new, names = (near[rows] for near in others.near_rows)
        second, _ = _largest(new, names != place[columns][:, None])
        best = np.maximum(best, second)
        # Others are less similar than the last that was kept, unless all of them are gone.
        unsure = np.flatnonzero(~found & (best < old[:, -1]) & (old.shape[1] < len(place)))
        step = block_rows(costs)
        for start in range(0, len(unsure), step):
            some = unsure[start : start + step]
            block = cosines(costs, rows[some])
            block[np.arange(len(some)), columns[some]] = -1
            best[some] = block.max(axis=1)
        return best

    def _mean_squares(self, of_rows: np.ndarray, of_columns: np.ndarray) -> Any:
        of_rows = np.maximum(of_rows, 0) / self._costs.n_columns
        return of_rows, of_columns / self._costs.n_rows


def _largest(
    cosines: Float[np.ndarray, "row near"], allowed: Bool[np.ndarray, "row near"]
) -> tuple[Float[np.ndarray, " row"], Bool[np.ndarray, " row"]]:
    """Largest of the cosines that are allowed, -1 for none; and whether there is one."""
    return np.where(allowed, cosines, -1).max(axis=1), np.asarray(allowed.any(axis=1))


def _next_of_columns(
    seen: Look, columns: Int[np.ndarray, " pair"], rows: Int[np.ndarray, " pair"]
) -> Float[np.ndarray, " pair"]:
    """Largest cosine of each column but that with a row."""
    two, names = (near[:, columns] for near in seen.near_columns)
    return np.where(names[0] == rows, two[1], two[0])


def _squared_cosines(
    x: Float[np.ndarray, "n d"],
    rows: Int[np.ndarray, " row"],
    y: Float[np.ndarray, "m d"],
    others: Int[np.ndarray, " other"],
) -> Float[np.ndarray, " row"]:
    """Sum of the squared cosines of each row with all others, in whichever way is shorter."""
    d, sums = x.shape[1], np.zeros(len(rows))
    if len(rows) * len(others) < (len(rows) + len(others)) * d:
        for units in _units(y, others):
            parts = [np.square(some @ units.T).sum(axis=1) for some in _units(x, rows)]
            sums += np.concatenate(parts)
        return sums
    moments = np.zeros((d, d), np.float32)
    for units in _units(y, others):
        moments += units.T @ units
    parts = [np.einsum("nd,nd->n", some @ moments, some) for some in _units(x, rows)]
    return np.concatenate(parts)


def _units(
    x: Float[np.ndarray, "n d"], rows: Int[np.ndarray, " row"]
) -> Iterator[Float[np.ndarray, "_part d"]]:
    """Some rows at length 1, a part at a time, and at least one part."""
    for start in range(0, max(len(rows), 1), MANY):
        yield unit_rows(x[rows[start : start + MANY]])
