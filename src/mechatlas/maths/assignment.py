"""Cheapest one-to-one pairing of rows and columns, with a proof, at any size.

Main path, in reading order:

    assign       look at every pair once, in blocks, and keep a short list for each row (`_begin`);
                 find prices near to the best ones by bids that overpay by less and less
                 (`_approach`), which needs as many columns as rows; pair exactly from there
                 (`_pair`); where a list was too short to say what is cheapest, look at those
                 rows again, at the prices of then (`_list`); until nothing is open
    Assignment   the pairing, and prices of rows and columns that prove it; `certify` checks the
                 proof by pricing every pair again, independently of the solver

Proof: for prices u, v with u_i + v_j <= c_ij for every pair, v <= 0 where columns may stay free
(and u_i at most the price of staying unmatched), no pairing costs less than the sum of all prices.
The difference is the gap.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from mechatlas.base import InputError, Progress, Result, no_progress
from mechatlas.maths.pricing import (
    Costs,
    Factors,
    Kept,
    Matrix,
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
NEARLY = 2
"""Rounds of bids that overpay for a pairing that need not be the cheapest."""
BIDS = 300
"""Bids for each row in one round, and exact ones before paths are searched."""
FEW = 500
"""Reciprocal of the share of rows that a round of bids may leave over."""
SMALL = ((1 << 20, 1), (1 << 24, 6))
"""Numbers of pairs up to which paths are searched over all pairs, each with the number of times
that lists must have been made longer before."""
SAMPLED = 16
"""Reciprocal of the share of rows looked at for first prices where costs are not kept."""


class CertificateError(AssertionError):
    """Prices do not prove what they should."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Certificate(Result):
    """Proof of optimality, checked by pricing every pair."""

    lower_bound: float
    """Cost below which no pairing lies."""
    gap: float
    """Cost less lower bound: the most that a better pairing could save."""
    breach: float
    """Largest excess of prices over a cost; the lower bound takes it into account."""
    pairs: int
    """Pairs priced."""
    exact: int
    """Pairs among them whose float32 cost was too near to its prices to tell, which were
    computed in float64."""
    rounding: float
    """Bound on the error of a float32 cost that was used."""

    def summary(self) -> str:
        """Bound and gap, and the number of pairs priced."""
        return (
            f"No pairing costs less than {self.lower_bound:.6g} (gap {self.gap:.1e})\n"
            f"{self.pairs:,} pairs priced, {self.exact:,} of them in float64; prices exceed a "
            f"cost by {self.breach:.1e} at most"
        )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Assignment(Result):
    """One-to-one pairing of rows and columns, and prices that prove it cheapest."""

    columns: Int[np.ndarray, " n"]
    """Column paired with each row; -1 for a row that stays unmatched."""
    row_prices: Float[np.ndarray, " n"]
    """Dual prices of rows."""
    column_prices: Float[np.ndarray, " m"]
    """Dual prices of columns."""
    cost: float
    """Cost of all pairs, and the price of each row that stays unmatched."""
    lower_bound: float
    """Sum of all prices: no pairing costs less."""
    gap: float
    """Cost less lower bound."""
    unmatched: float
    """Price of a row that stays unmatched; infinite if every row must be paired."""
    rows_priced: tuple[int, ...]
    """Rows whose costs were computed in each pricing round; all of them in the first."""

    @property
    def rounds(self) -> int:
        """Number of pricing rounds."""
        return len(self.rows_priced)

    def summary(self) -> str:
        """Cost with its lower bound, and the number of pairs."""
        n, m, paired = len(self.columns), len(self.column_prices), int((self.columns >= 0).sum())
        return (
            f"{paired:,} pairs of {n:,} rows and {m:,} columns at cost {self.cost:.6g}\n"
            f"No pairing costs less than {self.lower_bound:.6g} (gap {self.gap:.1e}); "
            "certify(costs) checks the proof"
        )

    def certify(
        self,
        costs: Costs | ArrayLike | Tensor,
        *,
        tolerance: float = 1e-9,
        on_progress: Progress = no_progress,
    ) -> Certificate:
        """Prove the pairing optimal for `costs` by pricing every pair.

        Args:
            costs: Costs that the assignment was made for.
            tolerance: Largest gap accepted, as a share of the sum of the sizes of all prices;
                the last digits of float64 are accepted besides.
            on_progress: Callback with the number of rows that are done.

        Raises:
            CertificateError: The columns are no pairing of rows with different columns, a price
                exceeds a cost, or the gap is larger than `tolerance` allows.
        """
        costs = as_costs(costs)
        n, m = costs.n_rows, costs.n_columns
        self._check_pairs(n, m)
        breach, exact = self._breaches(costs, on_progress)
        u, v, unmatched = self.row_prices, self.column_prices, self.unmatched
        cost = _total(costs, self.columns, unmatched if math.isfinite(unmatched) else 0.0)
        bound = math.fsum(u) + math.fsum(v) - math.fsum(breach)
        bound = min(bound - _breach_of_signs(u, v, unmatched), cost)
        size = math.fsum(np.abs(u)) + math.fsum(np.abs(v)) + abs(cost)
        certificate = Certificate(
            lower_bound=bound,
            gap=cost - bound,
            breach=float(breach.max()),
            pairs=n * m,
            exact=exact,
            rounding=float(costs.rounding(slice(0, n)).max()),
        )
        allowed = tolerance * size + (n + m) * costs.last_digits()
        if certificate.gap > allowed:
            worst = int(breach.argmax())
            raise CertificateError(
                f"A cheaper pairing may exist: duality gap {certificate.gap:.3g} at cost "
                f"{cost:.6g} (tolerance {allowed:.3g}); prices exceed a cost of row {worst} by "
                f"{breach[worst]:.3g}. Were the costs changed after `assign`?"
            )
        return certificate

    def _check_pairs(self, n: int, m: int) -> None:
        if (len(self.row_prices), len(self.column_prices), len(self.columns)) != (n, m, n):
            raise CertificateError(
                f"The pairing is of {len(self.row_prices)} x {len(self.column_prices)}, the costs "
                f"are of {n} x {m}."
            )
        paired = self.columns[self.columns >= 0]
        if len(np.unique(paired)) < len(paired) or paired.max(initial=-1) >= m:
            raise CertificateError("Two rows have the same column, or one that does not exist.")
        if math.isinf(self.unmatched) and len(paired) < min(n, m):
            raise CertificateError(f"Only {len(paired)} of {min(n, m)} could-be pairs were made.")

    def _breaches(self, costs: Costs, on_progress: Progress) -> tuple[Float[np.ndarray, " n"], int]:
        """Excess of prices over the costs of each row, and the number of exact costs computed."""
        from mechatlas.maths.selection import underpriced

        n, u, v = costs.n_rows, self.row_prices, self.column_prices
        breach, n_exact, step = np.zeros(n), 0, block_rows(costs)
        error = costs.rounding(slice(0, n))
        for start in range(0, n, step):
            part = slice(start, min(start + step, n))
            block = costs.block(part)

            def low(
                first: int, last: int, block: np.ndarray = block, part: slice = part
            ) -> tuple[np.ndarray, np.ndarray]:
                room = 64 * (last - first)
                while True:
                    rows, columns = np.empty(room, np.int64), np.empty(room, np.int64)
                    prices = u[part] + error[part], v
                    n_low = underpriced(block, *prices, (first, last), rows, columns)
                    if n_low <= room:
                        return rows[:n_low], columns[:n_low]
                    room = n_low

            for rows, columns in in_threads(low, len(block)):
                rows += start
                excess = u[rows] + v[columns] - costs.exact(rows, columns)
                np.maximum.at(breach, rows, excess)
                n_exact += len(rows)
            on_progress(part.stop, n)
        return breach, n_exact


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

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, by name, to be written down."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[1:]}
        return {**own, **{f"lists.{name}": array for name, array in self.lists.items()}}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "State":
        """Undo `arrays`."""
        lists = {n[6:]: a for n, a in arrays.items() if n.startswith("lists.")}
        return cls(lists, **{n: a for n, a in arrays.items() if not n.startswith("lists.")})


def assign(
    costs: Costs | ArrayLike | Tensor,
    *,
    unmatched: float = math.inf,
    resume: State | None = None,
    on_progress: Progress = no_progress,
    on_state: Callable[[State], None] | None = None,
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
        )
        return _turned_back(turned, costs.n_rows, unmatched)
    n = costs.n_rows
    costs = costs.kept() if isinstance(costs, Factors) else costs
    state = resume
    if state is None:
        state = _begin(costs, unmatched, on_progress)
        if on_state is not None:
            on_state(state)
    while len(state.free):
        if state.plan[1]:
            wanted, longer = _approach(state, costs, unmatched), 1.0
        else:
            wanted, longer = _pair(state, costs, unmatched)
        if len(wanted):
            _list_again(state, costs, wanted, longer)
        on_progress(n + round(n * _done(state)), 2 * n)
        if on_state is not None:
            on_state(state)
    return _finish(state, costs, unmatched)


def nearly_cheapest(costs: Factors) -> Int[np.ndarray, " n"]:
    """Pair rows with columns at nearly the least cost, without proof, in less time than `assign`.

    Bids end with the overpayment `STEP` / `FINER`; a few rows may stay without a column (-1). With
    unequal numbers of rows and columns the pairing is the cheapest.
    """
    costs = costs.kept()
    if costs.n_rows == costs.n_columns:
        state = _begin(costs, math.inf, no_progress)
        if state.plan[1]:
            state.plan[1] = NEARLY
            while state.plan[1]:
                wanted = _approach(state, costs, math.inf, keep=True)
                if len(wanted):
                    _list_again(state, costs, wanted, 1.0)
            return state.column_of.astype(np.int64)
    return assign(costs).columns


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


def _begin(costs: Costs, unmatched: float, on_progress: Progress) -> State:
    """First prices, and a list for each row: every pair is looked at.

    Where all columns are paired, prices may be any, and begin with what each column costs at least.
    """
    n, m = costs.n_rows, costs.n_columns
    listed = min((1 if _kept(costs) else FARTHER) * LISTED, m)
    all_paired = n == m and math.isinf(unmatched)
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
    state = State(
        lists=lists,
        row_prices=np.zeros(n),
        column_prices=np.zeros(m),
        row_of=np.full(m, -1, np.int32),
        column_of=np.full(n, -1, np.int32),
        free=np.arange(n - 1, -1, -1, dtype=np.int32),
        plan=np.array([0.0, 0.0, BIDS * n, 0.0]),
        rows_priced=np.array([n]),
    )
    if all_paired:
        _lower_to_least(costs, state.column_prices, np.arange(n)[:: 1 if _kept(costs) else SAMPLED])
    step = block_rows(costs)
    for start in range(0, n, step):
        _list(state, costs, np.arange(start, min(start + step, n)), lower=all_paired)
        on_progress(min(start + step, n), 2 * n)
    keys = lists["keys"].reshape(n, listed)
    state.row_prices = np.minimum(keys[:, 0], unmatched)
    overpaid = STEP * float(np.median(keys[:, -1] - keys[:, 0]) or np.ptp(keys))
    if all_paired and overpaid > FINER**TIMES * costs.last_digits():
        state.plan[:2] = overpaid, TIMES
    return state


def _kept(costs: Costs) -> bool:
    return isinstance(costs, Kept | Matrix | Replaced)


def _lower_to_least(costs: Costs, prices: np.ndarray, rows: np.ndarray) -> None:
    """Set prices to the least cost of each column in some rows."""
    from mechatlas.maths.selection import least_of_columns

    prices[:] = np.inf
    step = block_rows(costs)
    for start in range(0, len(rows), step):
        block = costs.block(rows[start : start + step])
        in_threads(lambda i, j, b=block: least_of_columns(b, i, j, prices), len(prices))


def _list(
    state: State, costs: Costs, rows: np.ndarray, longer: float = 1.0, *, lower: bool = False
) -> None:
    """Look at all columns of some rows, at the prices of now, and keep the cheapest.

    With `lower`, prices fall to the least cost first, where these rows have one that is less.
    """
    from mechatlas.maths.selection import keep_cheapest_of_rows, least_of_columns

    lists, prices = state.lists, state.column_prices
    length = lists["counts"][rows]
    if longer > 1:
        length = 2 ** np.ceil(np.log2(longer * length))
        length = np.minimum(length, costs.n_columns).astype(np.int64)
    step = block_rows(costs)
    for listed in np.unique(length):
        group = rows[length == listed]
        _make_room(lists, group, int(listed))
        for start in range(0, len(group), step):
            part = group[start : start + step]
            block = costs.block(part)
            if lower:
                in_threads(lambda i, j, b=block: least_of_columns(b, i, j, prices), len(prices))
            shape = len(part), listed
            cheapest = np.empty(shape), np.empty(shape, np.int32), np.empty(len(part))
            in_threads(
                lambda i, j, b=block, c=cheapest: keep_cheapest_of_rows(b, prices, (i, j), *c),
                len(part),
            )
            values, names, following = cheapest
            error = lists["error"][part]
            place = lists["starts"][part, None] + np.arange(listed)
            lists["columns"][place] = names
            lists["keys"][place] = values - error[:, None]
            lists["rough"][place] = values + prices[names]
            lists["costs"][place] = np.nan
            if isinstance(costs, Matrix):
                lists["rough"][place] = block[np.arange(len(part))[:, None], names]
                lists["costs"][place] = lists["rough"][place]
            lists["horizon"][part] = following - error


def _list_again(state: State, costs: Costs, rows: np.ndarray, longer: float) -> None:
    """New lists for rows; twice as long for those whose last one did not even last a round.

    Where many rows like the same columns equally well, a list of the same length would be used up
    at once, time and again.
    """
    made, now = state.lists["made"], len(state.rows_priced)
    used_up = made[rows] == now - 1 if longer == 1 and now > 1 else np.zeros(len(rows), bool)
    _list(state, costs, rows[~used_up], longer)
    _list(state, costs, rows[used_up], max(longer, 2.0))
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
    lists, solution, _ = _for_kernels(state, costs, unmatched)
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
    lists, solution, factors = _for_kernels(state, costs, unmatched)
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


def _for_kernels(
    state: State, costs: Costs, unmatched: float
) -> tuple["ShortLists", "Solution", "Products"]:
    from mechatlas.maths.augmenting import Products, ShortLists, Solution

    lists = ShortLists(*(state.lists[name] for name in ShortLists._fields))
    prices = unmatched, state.row_prices, state.column_prices
    factors = Products(np.empty((0, 0)), np.empty((0, 0)), np.empty(0), np.empty(0))
    if isinstance(costs, Factors):
        factors = Products(costs.a, costs.b, costs.row_offsets, costs.column_offsets)
    return lists, Solution(*prices, state.row_of, state.column_of), factors


def _finish(state: State, costs: Costs, unmatched: float) -> Assignment:
    from mechatlas.maths.augmenting import reprice

    reprice(*_for_kernels(state, costs, unmatched))
    u, v = state.row_prices, state.column_prices
    columns = np.where(state.column_of < 0, -1, state.column_of).astype(np.int64)
    cost = _total(costs, columns, unmatched)
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
        rows_priced=tuple(int(x) for x in state.rows_priced),
    )


def _total(costs: Costs, columns: np.ndarray, unmatched: float) -> float:
    rows = np.flatnonzero(columns >= 0)
    alone = len(columns) - len(rows)
    return math.fsum([*costs.exact(rows, columns[rows]), unmatched * alone if alone else 0.0])


def _breach_of_signs(u: np.ndarray, v: np.ndarray, unmatched: float) -> float:
    # Who may stay alone must not have a price above what that costs: 0 for columns.
    lost = 0.0
    if math.isfinite(unmatched):
        lost += math.fsum(np.maximum(u - unmatched, 0)) + math.fsum(np.maximum(v, 0))
    elif len(u) != len(v):
        lost += math.fsum(np.maximum(v if len(u) < len(v) else u, 0))
    return lost
