"""Pairing again once some columns are others, without another look at all pairs.

    look           the cheapest columns of each row, and what is nearest to each row and column
    pair_again     nearly the cheapest pairing once some columns are others, from two looks:
                   at all pairs as they were, and at those of the new columns

Only pairs of new columns are priced; rows whose lists turn out too short are priced once more.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mechatlas.base import Engine, Here, in_order
from mechatlas.maths import assignment
from mechatlas.maths.assignment import (
    State,
    first_length,
    make_plan,
    nearly_cheapest,
    with_few_rows_added,
)
from mechatlas.maths.pricing import Factors, Replaced, block_rows, in_threads

MANY = 4096
"""Number of rows whose lists are worked on at a time."""
NEAREST = 16
"""Number of nearest columns kept of each row."""


class Look(NamedTuple):
    """Result of one look at all pairs of rows and columns; costs are squared distances."""

    prices: Float[np.ndarray, " column"]
    """Prices at which columns were listed."""
    columns: Int[np.ndarray, "row listed"]
    """Cheapest columns of each row at these prices."""
    costs: Float[np.ndarray, "row listed"]
    """Costs of the same."""
    horizon: Float[np.ndarray, " row"]
    """Least cost less price of every column that is not listed."""
    near_rows: tuple[Float[np.ndarray, "row near"], Int[np.ndarray, "row near"]]
    """Largest cosines of each row, and their columns."""
    near_columns: tuple[Float[np.ndarray, "2 column"], Int[np.ndarray, "2 column"]]
    """Two largest cosines of each column, and their rows."""
    squares: tuple[Float[np.ndarray, " row"], Float[np.ndarray, " column"]]
    """Sum of the squared cosines of each row, and of each column."""


def look(
    costs: Factors, prices: Float[np.ndarray, " column"], *, engine: Engine | None = None
) -> Look:
    """Look at all pairs.

    Args:
        costs: Squared distances.
        prices: Prices at which columns are listed: zero where some columns stay unpaired, else any.
        engine: Engine that looks at blocks of rows where it is worth it.
    """
    n, m = costs.n_rows, costs.n_columns
    listed = first_length(costs)
    found = Look(
        prices,
        np.empty((n, listed), np.int32),
        np.empty((n, listed), np.float32),
        np.empty(n),
        (np.empty((n, min(NEAREST, m)), np.float32), np.empty((n, min(NEAREST, m)), np.int32)),
        (np.full((2, m), -1, np.float32), np.zeros((2, m), np.int32)),
        (np.empty(n, np.float32), np.zeros(m, np.float32)),
    )
    step = block_rows(costs)
    parts = [slice(k, min(k + step, n)) for k in range(0, n, step)]
    is_large = n * m >= assignment.WORTH_SENDING
    runner = engine if engine is not None and is_large else Here()
    looked = runner.map(_look_at_block, parts, shared=(costs, prices, listed))
    for part, block in zip(parts, in_order(looked), strict=True):
        found.columns[part], found.costs[part], found.horizon[part] = block[1:4]
        for whole, some in zip(found.near_rows, block.near_rows, strict=True):
            whole[part] = some
        _keep_two_nearest(found.near_columns, block.near_columns, part.start)
        found.squares[0][part] = block.squares[0]
        found.squares[1][:] += block.squares[1]
    return found


def _look_at_block(part: slice, shared: tuple[Factors, Float[np.ndarray, " column"], int]) -> Look:
    """Look at the pairs of some rows."""
    from mechatlas.maths.selection import cosines_of_block, keep_cheapest_of_rows

    costs, prices, listed = shared
    block = costs.block(part)
    n, m = block.shape
    keys, columns, horizon = np.empty((n, listed)), np.empty((n, listed), np.int32), np.empty(n)
    in_threads(lambda i, j: keep_cheapest_of_rows(block, prices, (i, j), keys, columns, horizon), n)
    negated = np.empty_like(block)
    two = np.full((2, m), -1, np.float32), np.zeros((2, m), np.int32)
    squares = np.zeros(m, np.float32)
    sides = _offsets_and_scales(costs, part)
    sums = in_threads(
        lambda i, j: cosines_of_block(block, *sides, (i, j), negated, two, squares), m
    )
    size = n, min(NEAREST, m)
    cosines, names, following = np.empty(size), np.empty(size, np.int32), np.empty(n)
    none = np.zeros(m)
    in_threads(
        lambda i, j: keep_cheapest_of_rows(negated, none, (i, j), cosines, names, following), n
    )
    return Look(
        prices,
        columns,
        (keys + prices[columns]).astype(np.float32),
        horizon,
        (-cosines.astype(np.float32), names),
        two,
        (np.sum(sums, axis=0), squares),
    )


def _offsets_and_scales(
    costs: Factors | Replaced, rows: slice | Int[np.ndarray, " part"]
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Squared length and reciprocal of the length of some rows, and of all columns."""
    both = costs.row_offsets[rows].astype(np.float32), costs.column_offsets.astype(np.float32)
    of_rows, of_columns = (1 / np.sqrt(np.maximum(squares, 1e-30)) for squares in both)
    return (both[0], of_rows / 2), (both[1], of_columns)  # costs have the product twice


def _keep_two_nearest(
    found: tuple[np.ndarray, np.ndarray], others: tuple[np.ndarray, np.ndarray], first: int
) -> None:
    """Keep the two largest of the cosines found so far and of those of rows from `first` on."""
    cosines = np.concatenate([found[0], others[0]])
    rows = np.concatenate([found[1], others[1] + np.int32(first)])
    order = np.argsort(-cosines, axis=0, kind="stable")[:2]
    found[0][:] = np.take_along_axis(cosines, order, axis=0)
    found[1][:] = np.take_along_axis(rows, order, axis=0)


def cosines(
    costs: Factors | Replaced, rows: Int[np.ndarray, " part"]
) -> Float[np.ndarray, "part column"]:
    """Cosines of some rows with all columns."""
    (row_offsets, row_scales), (column_offsets, column_scales) = _offsets_and_scales(costs, rows)
    products = row_offsets[:, None] + column_offsets - costs.block(rows)
    return products * row_scales[:, None] * column_scales


def cosines_of_pairs(
    costs: Factors | Replaced, rows: Int[np.ndarray, " pair"], columns: Int[np.ndarray, " pair"]
) -> Float[np.ndarray, " pair"]:
    """Cosines of pairs, from their squared distances in float64."""
    squares = costs.row_offsets[rows], costs.column_offsets[columns]
    products = sum(squares) - costs.exact(rows, columns)
    return products / (2 * np.sqrt(np.maximum(squares[0] * squares[1], 1e-60)))


def pair_again(
    costs: Replaced,
    before: Look,
    others: Look,
    *,
    engine: Engine | None = None,
) -> Int[np.ndarray, " row"]:
    """Pair rows with columns at nearly the least cost, once some columns are others.

    Bids end with an overpayment that changes costs by far less than they differ; a few rows may
    stay without a column (-1). With very unequal numbers of rows and columns the pairing is the
    cheapest.

    Args:
        costs: Costs of all pairs as they are now.
        before: Look at all pairs as they were.
        others: Look at the pairs of these alone.
        engine: Engine that prices blocks of rows, as for `assign`.
    """
    from mechatlas.maths.selection import merge_cheapest

    n, listed = before.columns.shape
    is_new = np.zeros(costs.n_columns, np.bool_)
    is_new[costs.columns] = True
    whole = with_few_rows_added(costs)
    state, own = State.begin(whole, listed), slice(0, n * listed)
    prices = state.column_prices
    prices[:] = before.prices
    prices[costs.columns] = others.prices
    keys, columns, rough = (
        state.lists[name][own].reshape(n, listed) for name in ("keys", "columns", "rough")
    )
    horizon = state.lists["horizon"][:n]
    lists = (
        (before.costs, before.columns, before.horizon),
        (others.costs, costs.columns.astype(np.int32)[others.columns], others.horizon),
    )
    in_threads(
        lambda i, j: merge_cheapest(*lists, is_new, prices, (i, j), keys, columns, horizon), n
    )
    for row in range(0, n, MANY):  # no prices of all entries at once
        part = slice(row, row + MANY)
        np.add(keys[part], prices[columns[part]], out=rough[part])
    if whole.n_rows == whole.n_columns:  # no proof is wanted, and rounding is far below its bound
        state.lists["error"][:] = 0
    keys -= state.lists["error"][:n, None]
    horizon -= state.lists["error"][:n]
    make_plan(state, whole, math.inf)
    return nearly_cheapest(state, whole, engine=engine)[:n]
