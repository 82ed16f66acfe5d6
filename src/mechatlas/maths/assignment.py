"""Cheapest one-to-one pairing of rows and columns, with a proof, at any size.

Main path, in reading order:

    assign       look at every pair once, in blocks, and keep a short list for each row (`_begin`);
                 find prices near to the best ones by bids that overpay by less and less
                 (`_approach`), which needs as many columns as rows, so a few rows that cost
                 nothing are added where it is nearly so (`Padded`); pair exactly from there
                 (`_pair`); where a list was too short to say what is cheapest, look at those
                 rows again, at the prices of then (`_list`); until nothing is open

The result is an `Assignment` (`certificate`), with prices that prove it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from mechatlas.base import Engine, Here, InputError, Progress, no_progress
from mechatlas.maths.certificate import Assignment, total_cost
from mechatlas.maths.pricing import (
    Costs,
    Factors,
    Kept,
    Matrix,
    Padded,
    Replaced,
    as_costs,
    block_rows,
    in_threads,
)

if TYPE_CHECKING:  # compiles when it is imported
    from mechatlas.maths.augmenting import Products, ShortLists, Solution

LISTED = 40
"""Number of cheapest columns listed for each row at first."""
FARTHER = 8
"""Factor on `LISTED` where costs are not kept, so that another look is another product."""
LONGER = 3.0
"""Least factor by which a list that was too short is lengthened."""
STEP = 0.03
"""First overpayment of bids, as a share of the reach of the median row's list."""
FINER = 6.0
"""Factor by which the overpayment falls from round to round."""
TIMES = 3
"""Rounds of bids that overpay."""
BIDS = 300
"""Bids for each row in one round, and exact ones before paths are searched."""
FEW = 500
"""Reciprocal of the share of rows that a round of bids may leave over."""
SMALL = ((1 << 20, 1), (1 << 24, 6))
"""Numbers of pairs up to which paths are searched over all pairs, each with the number of times
that lists must have been made longer before."""
PADDED = 1 / 8
"""Largest share of rows that are added to have as many rows as columns."""
WORTH_SENDING = 1 << 31
"""Number of pairs looked at from which on blocks of rows do not wait for the prices that others
lower, so that an engine can price them: 46,000 x 46,000. They do not in this process either, so
that all engines find the same; it costs a tenth more products."""
SAMPLED = 16
"""Reciprocal of the share of rows looked at for first prices where costs are not kept."""


@dataclasses.dataclass(eq=False)
class State:
    """State of a search; arrays only, so that it can be written down and continued."""

    lists: dict[str, np.ndarray]
    """Arrays of `augmenting.ShortLists`, and the round in which each list was `made`."""
    row_prices: Float[np.ndarray, " n"]
    column_prices: Float[np.ndarray, " m"]
    row_of: Int[np.ndarray, " m"]
    """Row of each column; -1 for none."""
    column_of: Int[np.ndarray, " n"]
    """Column of each row; -1 for a row that waits, -2 for one that stays unmatched."""
    free: Int[np.ndarray, " free"]
    """Rows that wait, in the order in which they do."""
    plan: Float[np.ndarray, " 4"]
    """Overpayment of bids, rounds of them still to do, bids left in this round, and the number of
    times that lists were made longer."""
    rows_priced: Int[np.ndarray, " round"]

    @classmethod
    def begin(cls, costs: Costs, listed: int) -> "State":
        """State in which nothing is priced and all rows wait, with room for a list of each."""
        n, m = costs.n_rows, costs.n_columns
        lists = {
            "columns": np.zeros(n * listed, np.int32),
            "keys": np.zeros(n * listed),
            "rough": np.zeros(n * listed),
            "costs": np.zeros(n * listed),
            "starts": np.arange(n) * listed,
            "counts": np.full(n, listed),
            "horizon": np.zeros(n),
            "error": costs.rounding(slice(0, n)),
            "made": np.zeros(n, np.int64),
        }
        return cls(
            lists=lists,
            row_prices=np.zeros(n),
            column_prices=np.zeros(m),
            row_of=np.full(m, -1, np.int32),
            column_of=np.full(n, -1, np.int32),
            free=np.arange(n - 1, -1, -1, dtype=np.int32),
            plan=np.array([0.0, 0.0, BIDS * n, 0.0]),
            rows_priced=np.array([n]),
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, by name, to be written down."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[1:]}
        return {**own, **{f"lists.{name}": array for name, array in self.lists.items()}}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "State":
        """Undo `arrays`, which may be read-only: a cluster hands out views of shared memory."""
        arrays = {name: np.array(array) for name, array in arrays.items()}
        lists = {n[6:]: a for n, a in arrays.items() if n.startswith("lists.")}
        return cls(lists, **{n: a for n, a in arrays.items() if not n.startswith("lists.")})


def assign(
    costs: Costs | ArrayLike | Tensor,
    *,
    unmatched: float = math.inf,
    resume: State | None = None,
    on_progress: Progress = no_progress,
    on_state: Callable[[State], None] | None = None,
    engine: Engine | None = None,
) -> Assignment:
    """Pair rows with columns at the least cost.

    Args:
        costs: Matrix of costs (n, m), numpy, torch or lists; or `Factors`, which are never a matrix
            as a whole. With more rows than columns, and no price of staying unmatched, every
            column is paired and some rows are not.
        unmatched: Price of a row that stays unmatched; by default none may, unless there are
            more rows than columns.
        resume: Last state that `on_state` was called with, in a run that was stopped.
        on_progress: Callback with how many rows have been priced or paired, of about how many.
        on_state: Callback with the state after every pricing round; the last one has no free rows.
        engine: Engine that prices blocks of rows of large costs; bids are made in this process.

    Raises:
        InputError: The costs are empty or not finite, or `unmatched` is NaN.

    Examples:
        >>> from mechatlas import assign
        >>> pairing = assign([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0], [3.0, 2.0, 2.0]])
        >>> pairing
        3 pairs of 3 rows and 3 columns at cost 5
        No pairing costs less than 5 (gap ...); certify(costs) checks the proof
        >>> pairing.columns.tolist()
        [1, 0, 2]
    """
    costs = as_costs(costs)
    if math.isnan(unmatched):
        raise InputError("The price of staying unmatched is NaN; pass a number.")
    if costs.n_rows > costs.n_columns:
        turned = assign(
            costs.transposed(),
            unmatched=unmatched,
            resume=resume,
            on_progress=on_progress,
            on_state=on_state,
            engine=engine,
        )
        return _turned_back(turned, costs.n_rows, unmatched)
    costs = with_few_rows_added(costs.kept() if isinstance(costs, Factors) else costs, unmatched)
    n = costs.n_rows
    state = resume
    if state is None:
        state = _begin(costs, unmatched, on_progress, engine)
        if on_state is not None:
            on_state(state)
    while len(state.free):
        if state.plan[1]:
            wanted, longer = _approach(state, costs, unmatched), 1.0
        else:
            wanted, longer = _pair(state, costs, unmatched)
        if len(wanted):
            _list_again(state, costs, wanted, longer, engine)
        on_progress(n + round(n * _done(state)), 2 * n)
        if on_state is not None:
            on_state(state)
    return _finish(state, costs, unmatched)


def nearly_cheapest(
    state: State, costs: Costs, *, engine: Engine | None = None
) -> Int[np.ndarray, " n"]:
    """Pair rows with columns at nearly the least cost, without proof, in less time than `assign`.

    Bids end with the overpayment `STEP` / `FINER`; a few rows may stay without a column (-1). With
    very unequal numbers of rows and columns the pairing is the cheapest.

    Args:
        state: First state, after `make_plan`, with lists whose exact costs are not known.
        costs: Costs of all pairs.
        engine: Engine that prices blocks of rows, as for `assign`.
    """
    if not state.plan[1]:
        state.lists["costs"][: len(_own_rows(costs)) * first_length(costs)] = np.nan
        return assign(costs, resume=state, engine=engine).columns
    state.plan[:2] = state.plan[0] / FINER, 1
    while state.plan[1]:
        wanted = _approach(state, costs, math.inf, keep=True)
        if len(wanted):
            _list_again(state, costs, wanted, 1.0, engine)
    return state.column_of.astype(np.int64)


def with_few_rows_added(costs: Costs, unmatched: float = math.inf) -> Costs:
    """Costs with as many rows as columns, if that takes few more rows and every row is paired."""
    added = costs.n_columns - costs.n_rows
    few = 0 < added <= PADDED * costs.n_rows
    return Padded(costs) if few and math.isinf(unmatched) else costs


def _done(state: State) -> float:
    """Share of the work done after the first look."""
    parts = 1 - len(state.free) / len(state.row_prices) if state.plan[1] == 0 else 0.0
    return (TIMES - state.plan[1] + parts) / (TIMES + 1)


def _turned_back(turned: Assignment, n_rows: int, unmatched: float) -> Assignment:
    # Paired: the columns of the turned assignment are our rows. Each row alone costs the price.
    columns = np.full(n_rows, -1, np.int64)
    paired = turned.columns >= 0
    columns[turned.columns[paired]] = np.flatnonzero(paired)
    shift = unmatched if math.isfinite(unmatched) else 0.0
    more = shift * (n_rows - len(turned.columns))
    return dataclasses.replace(
        turned,
        columns=columns,
        row_prices=turned.column_prices + shift,
        column_prices=turned.row_prices - shift,
        cost=turned.cost + more,
        lower_bound=turned.lower_bound + more,
    )


def _begin(costs: Costs, unmatched: float, on_progress: Progress, engine: Engine | None) -> State:
    """First prices, and a list for each row: every pair is looked at."""
    state = State.begin(costs, first_length(costs))
    all_paired = costs.n_rows == costs.n_columns and math.isinf(unmatched)
    if all_paired:
        state.column_prices[:] = first_prices(costs)
    _list(
        state, costs, _own_rows(costs), lower=all_paired, engine=engine,
        on_progress=lambda done: on_progress(done, 2 * costs.n_rows),
    )  # fmt: skip
    make_plan(state, costs, unmatched)
    return state


def first_length(costs: Costs) -> int:
    """Length of the first list of each row."""
    return min((1 if _kept(costs) else FARTHER) * LISTED, costs.n_columns)


def first_prices(costs: Costs) -> Float[np.ndarray, " m"]:
    """Find what each column costs at least, in all rows or, where they are not kept, in some.

    Where all columns are paired, prices may be any.
    """
    from mechatlas.maths.selection import least_of_columns

    rows = _own_rows(costs)[:: 1 if _kept(costs) else SAMPLED]
    prices = np.full(costs.n_columns, np.inf)
    step = block_rows(costs)
    for start in range(0, len(rows), step):
        block = costs.block(rows[start : start + step])
        in_threads(lambda i, j, b=block: least_of_columns(b, i, j, prices), len(prices))
    return prices


def make_plan(state: State, costs: Costs, unmatched: float) -> None:
    """Decide on bids once rows have lists, and list the rows that were added."""
    lists, n = state.lists, costs.n_rows
    listed = len(lists["keys"]) // n
    keys, own = lists["keys"].reshape(n, listed), _own_rows(costs)
    state.row_prices = np.minimum(keys[:, 0], unmatched)
    farthest = np.minimum(keys[own, min(LISTED, listed) - 1], lists["horizon"][own])
    reach = float(np.median(farthest - keys[own, 0]))
    overpaid = STEP * (reach or float(np.ptp(keys[np.isfinite(keys)])))
    added = np.arange(len(own), n)  # all of them like the same columns, as many as they are
    _list(state, costs, added, 1 + 2 * len(added) / listed)
    all_paired = n == costs.n_columns and math.isinf(unmatched)
    if all_paired and overpaid > FINER**TIMES * costs.last_digits():
        state.plan[:2] = overpaid, TIMES


def _own_rows(costs: Costs) -> Int[np.ndarray, " own"]:
    """Rows besides those that were added."""
    return np.arange(costs.costs.n_rows if isinstance(costs, Padded) else costs.n_rows)


def _kept(costs: Costs) -> bool:
    costs = costs.costs if isinstance(costs, Padded) else costs
    costs = costs.before if isinstance(costs, Replaced) else costs
    return isinstance(costs, Kept | Matrix)


def _list(
    state: State,
    costs: Costs,
    rows: Int[np.ndarray, " rows"],
    longer: float = 1.0,
    *,
    lower: bool = False,
    engine: Engine | None = None,
    on_progress: Callable[[int], None] = lambda _done: None,
) -> None:
    """Look at all columns of some rows, at the prices of now, and keep the cheapest.

    Args:
        state: Search whose lists of these rows are replaced.
        costs: Costs of all pairs.
        rows: Rows with a new list.
        longer: Least factor on the lengths of the lists.
        lower: Whether prices fall to the least cost first, where a block of rows has one that is
            less.
        engine: Engine that does it where it is worth it.
        on_progress: Callback with the number of rows that are done.
    """
    lists = state.lists
    length = lists["counts"][rows]
    if longer > 1:
        length = 2 ** np.ceil(np.log2(longer * length))
        length = np.minimum(length, costs.n_columns).astype(np.int64)
    step, blocks = block_rows(costs), []
    for listed in np.unique(length):
        group = rows[length == listed]
        _make_room(lists, group, int(listed))
        blocks += [_Block(group[k : k + step], int(listed)) for k in range(0, len(group), step)]
    is_large = len(rows) * costs.n_columns >= WORTH_SENDING
    runner = engine if engine is not None and is_large else Here()
    prices = state.column_prices.copy() if is_large else state.column_prices
    shared, done = (costs, prices, lower), 0
    for number, found in runner.map(_price, blocks, shared=shared):
        part, listed = blocks[number]
        place, error = lists["starts"][part, None] + np.arange(listed), lists["error"][part]
        lists["columns"][place] = found.columns
        lists["keys"][place] = found.keys - error[:, None]
        lists["rough"][place] = found.rough
        lists["costs"][place] = np.where(error[:, None] == 0, found.rough, np.nan)
        lists["horizon"][part] = found.horizon - error
        # Lists are true at the prices that they were made at, and at lower ones.
        np.minimum(state.column_prices, found.prices, out=state.column_prices)
        done += len(part)
        on_progress(done)


class _Block(NamedTuple):
    """Rows that are priced together."""

    rows: Int[np.ndarray, " part"]
    listed: int
    """Number of cheapest columns wanted of each."""


class _Cheapest(NamedTuple):
    """Cheapest columns of the rows of a block."""

    columns: Int[np.ndarray, "part listed"]
    keys: Float[np.ndarray, "part listed"]
    """Reduced costs."""
    rough: Float[np.ndarray, "part listed"]
    """Costs."""
    horizon: Float[np.ndarray, " part"]
    """Reduced cost of the one that follows."""
    prices: Float[np.ndarray, " m"]
    """Prices of all columns at which it is so."""


def _price(block: _Block, shared: tuple[Costs, Float[np.ndarray, " m"], bool]) -> _Cheapest:
    """Find the cheapest columns of some rows."""
    from mechatlas.maths.selection import keep_cheapest_of_rows, least_of_columns

    costs, prices, lower = shared
    prices = prices.copy()
    entries, shape = costs.block(block.rows), (len(block.rows), block.listed)
    if lower:
        in_threads(lambda i, j: least_of_columns(entries, i, j, prices), len(prices))
    keys, columns, horizon = np.empty(shape), np.empty(shape, np.int32), np.empty(shape[0])
    in_threads(
        lambda i, j: keep_cheapest_of_rows(entries, prices, (i, j), keys, columns, horizon),
        shape[0],
    )
    rough = keys + prices[columns]
    is_exact = costs.rounding(block.rows) == 0  # of a matrix, and of rows that were added
    rough[is_exact] = entries[np.flatnonzero(is_exact)[:, None], columns[is_exact]]
    return _Cheapest(columns, keys, rough, horizon, prices)


def _list_again(
    state: State, costs: Costs, rows: np.ndarray, longer: float, engine: Engine | None
) -> None:
    """New lists for rows; twice as long for those whose last one did not even last a round.

    Where many rows like the same columns equally well, a list of the same length would be used up
    at once, time and again.
    """
    made, now = state.lists["made"], len(state.rows_priced)
    used_up = made[rows] == now - 1 if longer == 1 and now > 1 else np.zeros(len(rows), bool)
    _list(state, costs, rows[~used_up], longer, engine=engine)
    _list(state, costs, rows[used_up], max(longer, 2.0), engine=engine)
    made[rows] = now
    state.rows_priced = np.append(state.rows_priced, len(rows))


def _make_room(lists: dict[str, np.ndarray], rows: np.ndarray, listed: int) -> None:
    """Give rows whose lists get another length a new place, at the end."""
    moved = rows[lists["counts"][rows] != listed]
    if not len(moved):
        return
    lists["starts"][moved] = len(lists["columns"]) + np.arange(len(moved)) * listed
    lists["counts"][moved] = listed
    for name in ("columns", "keys", "rough", "costs"):
        lists[name] = np.append(lists[name], np.zeros(len(moved) * listed, lists[name].dtype))


def _approach(
    state: State, costs: Costs, unmatched: float, *, keep: bool = False
) -> Int[np.ndarray, " rows"]:
    """One round of bids that overpay; returns rows that need a new list before the next.

    Pairs are kept only from the last round, with `keep`.
    """
    from mechatlas.maths.augmenting import approach, near_horizon

    n = len(state.row_prices)
    lists, solution = _for_kernels(state, unmatched)
    queue, wanted = np.empty(n, np.int32), np.zeros(n, np.bool_)
    queue[: len(state.free)] = state.free
    overpaid, most = state.plan[0], int(state.plan[2])
    state.plan[2] -= approach(queue, len(state.free), overpaid, most, lists, solution, wanted)
    waiting = np.flatnonzero(wanted)
    if len(waiting) > 1 + n // FEW and state.plan[2] > 0:
        state.free = waiting.astype(np.int32)
        return waiting
    if keep and state.plan[1] == 1:
        state.plan[1] = 0
        return waiting[:0]
    # Prices are near enough for this step. Pairs do not matter: only exact ones are kept.
    state.row_of[:], state.column_of[:] = -1, -1
    state.free = np.arange(n - 1, -1, -1, dtype=np.int32)
    state.plan[:3] = state.plan[0] / FINER, state.plan[1] - 1, BIDS * n
    if state.plan[1]:
        return waiting
    near_horizon(lists, state.column_prices, wanted)
    return np.flatnonzero(wanted)


def _pair(state: State, costs: Costs, unmatched: float) -> tuple[np.ndarray, float]:
    """Pair as many free rows as the lists allow.

    Returns:
        Rows that need a new list, and by how much it must be longer.
    """
    from mechatlas.maths.augmenting import augment, bid, finish, reprice

    n = len(state.row_prices)
    (lists, solution), factors = _for_kernels(state, unmatched), _factors(costs)
    free, n_free, wanted = np.empty(n, np.int32), len(state.free), np.zeros(n, np.bool_)
    free[:n_free] = state.free
    if state.plan[2]:
        if state.plan[2] == BIDS * n:
            reprice(lists, solution, factors)
        n_free, bids = bid(free, n_free, int(state.plan[2]), lists, solution, wanted, factors)
        state.free, waiting = free[:n_free].copy(), np.flatnonzero(wanted)
        # As long a list would not help where so many cost the same, as far as float32 can tell.
        error, nearest = lists.error[waiting], lists.keys[lists.starts[waiting]]
        waiting = waiting[lists.horizon[waiting] > nearest + 2 * error]
        state.plan[2] = bids if len(waiting) > 1 + n // FEW else 0
        return waiting, 1.0
    if any(n * costs.n_columns <= pairs and state.plan[3] >= times for pairs, times in SMALL):
        matrix = costs.matrix()
        finish(state.free, matrix, solution)
        least = (matrix - state.column_prices).min(axis=1)
        np.maximum(lists.horizon, least, out=lists.horizon)
        state.free = state.free[:0]
        return state.free, 1.0
    state.plan[3] += 1
    n_free = augment(free, n_free, lists, solution, wanted, factors)
    state.free = free[:n_free].copy()
    return np.flatnonzero(wanted), LONGER


def _for_kernels(state: State, unmatched: float) -> tuple["ShortLists", "Solution"]:
    from mechatlas.maths.augmenting import ShortLists, Solution

    lists = ShortLists(*(state.lists[name] for name in ShortLists._fields))
    prices = unmatched, state.row_prices, state.column_prices
    return lists, Solution(*prices, state.row_of, state.column_of)


def _factors(costs: Costs) -> "Products":
    """Factors of exact costs; empty where all that is listed is exact already."""
    from mechatlas.maths.augmenting import Products

    costs = costs.costs if isinstance(costs, Padded) else costs
    if isinstance(costs, Factors | Replaced):
        return Products(costs.a, costs.b, costs.row_offsets, costs.column_offsets)
    return Products(np.empty((0, 0)), np.empty((0, 0)), np.empty(0), np.empty(0))


def _finish(state: State, costs: Costs, unmatched: float) -> Assignment:
    from mechatlas.maths.augmenting import reprice

    reprice(*_for_kernels(state, unmatched), _factors(costs))
    u, v, rows_priced = state.row_prices, state.column_prices, state.rows_priced
    if isinstance(costs, Padded):  # a column that is free is worth most to the rows that were added
        costs, rows_priced = costs.costs, np.minimum(rows_priced, costs.costs.n_rows)
        u, v = u[: costs.n_rows] + v.max(), v - v.max()
    columns = np.where(state.column_of < 0, -1, state.column_of)[: len(u)].astype(np.int64)
    cost = total_cost(costs, columns, unmatched)
    # No optimum is above what this pairing costs; prices can be, by their last digit.
    bound = min(math.fsum(u) + math.fsum(v), cost)
    return Assignment(
        columns=columns,
        row_prices=u,
        column_prices=v,
        cost=cost,
        lower_bound=bound,
        gap=cost - bound,
        unmatched=unmatched,
        rows_priced=tuple(int(x) for x in rows_priced),
    )
