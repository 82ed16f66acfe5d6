"""Number of pairings that cost nearly as little as the optimum.

    count_near_optimal    an optimal pairing, its costs, shares -> bounds on the number of pairings
                          within each share of the optimum, and an estimate

**Lower bound.** Rows are put into groups of a few whose partners are cheap to exchange. What groups
do is independent and their rises add up, so combinations of exchanges inside groups are different
pairings of known cost. They are counted by dynamic programming over groups, with rises rounded up;
of many groups by the central limit theorem with a bound on its error and weights exp(-b rise).

**Upper bound.** The number is at most `exp(b budget)` times the permanent of exp(-b w), for any b
and the reduced costs w. The permanent is linear in each row, and a row a is a sum of rows of ones
at its k largest places, times a_k - a_k+1; of rows of ones, Bregman's theorem bounds it by the
product of (k!)^(1/k). So it is at most the product over rows of sum_k a_k ((k!)^(1/k) -
(k-1)!^(1/(k-1))), by rows or by columns, after any scaling of both.

**Estimate.** Pairings are drawn with weights exp(-b rise) for one b after another, and the entropy
is summed up from the mean rises (thermodynamic integration).

Source: Soules, Permanental bounds for nonnegative matrices via decomposition (2005); Shevtsova,
An improvement of convergence rate estimates in the Lyapunov theorem (2010), for the central limit.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy import stats
from scipy.special import gammaln, logsumexp

from mechatlas.base import InputError
from mechatlas.maths.certificate import Assignment
from mechatlas.maths.pricing import Costs, as_costs, block_rows

SHARES = (0.001, 0.01)
"""Shares of the cost of the optimum by default."""
GROUP = 6
"""Largest number of rows of a group; all their permutations are listed."""
LISTED = 8
"""Cheapest other partners of a row that may bring it into a group."""
FEW_GROUPS, BINS = 256, 2048
"""Number of groups up to which they are counted exactly but for rounding into this many bins."""
BERRY_ESSEEN = 0.56
"""Constant of the theorem for summands of different distributions (Shevtsova, 2010)."""
MOST_SQUARE = 2048
"""Longest side of the costs for which the upper bound and the estimate are computed."""
TILTS, TURNS = 12, 5
"""Values of b that are tried, and rounds in which rows and columns are scaled for each."""
ALONE, COOLING = 0.05, 1.5
"""Logarithm of the sum of all weights, relative to the optimum's, from which on pairings are drawn,
and factor from one b to the next."""
BURN_IN, DRAWS = 20, 60
"""Rounds of exchanges before pairings of a b count, and those that count; a third and an eighth of
the number of rows are added, since many rows need longer."""
NEAR, FAR = 32, 0.2
"""Rows that a row exchanges its partner with, and fraction of the exchanges that are with any."""
SLACK = 1e-9
"""Share of a budget that rounding may cost."""


@dataclasses.dataclass(frozen=True)
class NearOptimal:
    """Number of one-to-one pairings that cost at most a share more than the cheapest one."""

    share: float
    """Share of the cost of the optimum."""
    log10_at_least: float
    """Logarithm to base 10 of a lower bound on their number; 0 if no other one is known."""
    log10_at_most: float | None
    """Logarithm of an upper bound; None for more than 2,048 rows or columns."""
    log10_estimate: float | None
    """Logarithm of an estimate between the two bounds; None where there is no upper bound."""


def count_near_optimal(
    assignment: Assignment, costs: Costs | ArrayLike, shares: Sequence[float] = SHARES
) -> list[NearOptimal]:
    """Bound the number of pairings within some shares of the cost of the optimum.

    Args:
        assignment: Optimal pairing, with its prices; every row or every column has a pair.
        costs: Costs that it is optimal for, with a positive total.
        shares: Shares of the total cost.

    Raises:
        InputError: Rows may stay unmatched at a price, or the total cost is not positive.

    Examples:
        >>> import mechatlas as ma
        >>> from mechatlas.maths.near_optima import count_near_optimal
        >>> costs = [[1.0, 1.1, 9.0], [1.1, 1.0, 9.0], [9.0, 9.0, 1.0]]
        >>> (found,) = count_near_optimal(ma.assign(costs), costs, [0.1])
        >>> round(10**found.log10_at_least)
        2
    """
    priced = as_costs(costs)
    if math.isfinite(assignment.unmatched):
        raise InputError(
            "Pairings are counted in which all rows or all columns are paired; this one was made "
            "with a price of staying unmatched. Leave `unmatched` out."
        )
    if assignment.lower_bound <= 0 or min(shares, default=1.0) <= 0:
        raise InputError(
            f"A share of the optimum needs a positive cost and share, got "
            f"{assignment.lower_bound:.3g} and {list(shares)}."
        )
    rises = _group_rises(assignment, priced)
    # The optimum is at least the lower bound, and at most the cost.
    lows = [
        ((1 + share) * assignment.lower_bound - assignment.cost) * (1 - SLACK) for share in shares
    ]
    least = [_at_least(rises, low) if low > 0 else 0.0 for low in lows]
    if max(priced.n_rows, priced.n_columns) > MOST_SQUARE:
        logs = ((each / math.log(10), None, None) for each in least)
        return [NearOptimal(share, *each) for share, each in zip(shares, logs, strict=True)]
    reduced, columns, log_copies = _square(assignment, priced)
    budgets = [(share * assignment.cost + assignment.gap) * (1 + SLACK) for share in shares]
    found = []
    for share, at_least, budget, estimate in zip(
        shares, least, budgets, _estimates(reduced, columns, rises, budgets), strict=True
    ):
        at_most = max(_at_most(reduced, log_copies, budget), at_least)
        each = at_least, at_most, min(max(estimate, at_least), at_most)
        found.append(NearOptimal(share, *(log / math.log(10) for log in each)))
    return found


def in_words(found: NearOptimal) -> str:
    """Bounds as a sentence."""
    at_most, estimate = found.log10_at_most, found.log10_estimate
    more = "" if at_most is None else f", at most 10^{at_most:.1f}, about 10^{estimate:.1f}"
    return (
        f"within {found.share:.1%} of the optimum there are at least "
        f"10^{found.log10_at_least:.1f} pairings{more}"
    )


def _group_rises(assignment: Assignment, costs: Costs) -> list[Float[np.ndarray, "_ _"]]:
    """Rises of all permutations inside each group, for the groups of each size."""
    rows = np.flatnonzero(assignment.columns >= 0)
    columns = assignment.columns[rows]
    groups = _groups(assignment, costs, rows, columns)
    found = []
    for size in range(2, GROUP + 1):
        own = np.array([g for g in groups if len(g) == size], np.int64).reshape(-1, size)
        if not len(own):
            continue
        shape = len(own), size, size
        i = np.broadcast_to(rows[own][:, :, None], shape).ravel()
        j = np.broadcast_to(columns[own][:, None, :], shape).ravel()
        block = costs.exact(i, j).reshape(shape)
        orders = np.array(list(itertools.permutations(range(size))))
        total = block[:, np.arange(size), orders].sum(axis=2)
        found.append(np.maximum(total - total[:, :1], 0.0))
    return found


def _groups(
    assignment: Assignment,
    costs: Costs,
    rows: Int[np.ndarray, " k"],
    columns: Int[np.ndarray, " k"],
) -> list[list[int]]:
    """Groups of the paired rows, by their place in `rows`: cheapest exchanges first."""
    u, v, n = assignment.row_prices, assignment.column_prices, len(rows)
    listed = min(LISTED, n - 1)
    if listed < 1:
        return []
    near = np.empty((n, listed), np.int64)
    for start in range(0, n, block_rows(costs)):
        part = np.arange(start, min(start + block_rows(costs), n))
        reduced = costs.block(rows[part])[:, columns] - v[columns].astype(np.float32)
        reduced[np.arange(len(part)), part] = np.inf
        near[part] = np.argpartition(reduced, listed - 1, axis=1)[:, :listed]
    a, b = np.repeat(np.arange(n), listed), near.ravel()
    rise = costs.exact(rows[a], columns[b]) - u[rows[a]] - v[columns[b]]
    rise += costs.exact(rows[b], columns[a]) - u[rows[b]] - v[columns[a]]
    group_of, groups = np.arange(n), {k: [k] for k in range(n)}
    for k in np.argsort(rise, kind="stable"):
        one, other = int(group_of[a[k]]), int(group_of[b[k]])
        if one != other and len(groups[one]) + len(groups[other]) <= GROUP:
            moved = groups.pop(other)
            groups[one] += moved
            group_of[moved] = one
    return list(groups.values())


def _at_least(rises: list[Float[np.ndarray, "_ _"]], budget: float) -> float:
    """Logarithm of a lower bound on the number of combinations whose rises add up to a budget."""
    if not rises:
        return 0.0
    if sum(float(each.max(axis=1).sum()) for each in rises) <= budget:
        return float(sum(len(each) * math.log(each.shape[1]) for each in rises))
    if sum(map(len, rises)) == 1:
        return math.log(int((rises[0] <= budget).sum()))
    counted = _counted(rises, budget) if sum(map(len, rises)) <= FEW_GROUPS else 0.0
    return max(counted, _by_tilting(rises, budget))


def _counted(rises: list[Float[np.ndarray, "_ _"]], budget: float) -> float:
    """Logarithm of the number of combinations, with rises rounded up to bins of the budget."""
    ways, scale = np.zeros(BINS + 1), 0.0
    ways[0] = 1.0
    for group in itertools.chain(*rises):
        bins = np.ceil(group / budget * BINS)
        bins, counts = np.unique(bins[bins <= BINS].astype(np.int64), return_counts=True)
        sums = np.zeros_like(ways)
        for at, count in zip(bins, counts, strict=True):
            sums[at:] += count * ways[: BINS + 1 - at]
        scale += math.log(sums.max())
        ways = sums / sums.max()
    return scale + math.log(ways.sum())


def _by_tilting(rises: list[Float[np.ndarray, "_ _"]], budget: float) -> float:
    """Logarithm of a lower bound on the number of combinations, for any number of groups.

    With weights exp(-b rise) a combination is a sum of independent rises. The number of those
    between `low` and the budget is at least the sum of all weights times exp(b low) times the
    probability of that range, which has a bound by Chebyshev and by Berry and Esseen.
    """
    best, n_groups = 0.0, sum(map(len, rises))
    for tilt in np.geomspace(0.1, 100 * n_groups, 80) / budget:
        log_z = mean = variance = third = 0.0
        for each in rises:
            logs = np.asarray(logsumexp(-tilt * each, axis=1, keepdims=True))
            weights = np.exp(-tilt * each - logs)
            means = (weights * each).sum(axis=1)
            apart = np.abs(each - means[:, None])
            log_z += float(logs.sum())
            mean += float(means.sum())
            variance += float((weights * np.square(apart)).sum())
            third += float((weights * apart**3).sum())
        room, sigma = budget - mean, math.sqrt(variance)
        if room <= 0 or sigma < SLACK * budget:
            continue
        below = np.concatenate([[room / sigma], np.geomspace(0.02, 8, 40)])  # in deviations
        chebyshev = np.where(below <= room / sigma, 1 - 1 / np.square(below), 0.0)
        normal = stats.norm.cdf(room / sigma) - stats.norm.cdf(-below)
        probability = np.maximum(chebyshev, normal - 2 * BERRY_ESSEEN * third / sigma**3)
        possible = probability > 0
        logs = tilt * (mean - sigma * below[possible]) + np.log(probability[possible])
        best = max(best, log_z + float(logs.max(initial=-np.inf)))
    return best


def _square(assignment: Assignment, costs: Costs) -> tuple[np.ndarray, np.ndarray, float]:
    """Reduced costs with a row for each column that stays free, the optimum's columns, and copies.

    Copies are the logarithm of how often each pairing is counted, by permutations of these rows.
    """
    matrix: Any = np.asarray(costs.matrix(), np.float64)
    u, v, columns = assignment.row_prices, assignment.column_prices, assignment.columns
    if matrix.shape[0] > matrix.shape[1]:
        rows = np.empty(matrix.shape[1], np.int64)
        rows[columns[columns >= 0]] = np.flatnonzero(columns >= 0)
        matrix, u, v, columns = matrix.T, v, u, rows
    n, m = matrix.shape
    reduced = np.maximum(matrix - u[:, None] - v, 0.0)
    free = np.broadcast_to(np.maximum(-v, 0.0), (m - n, m))
    columns = np.append(columns, np.setdiff1d(np.arange(m), columns))
    return np.concatenate([reduced, free]), columns, float(gammaln(m - n + 1))


def _at_most(reduced: Float[np.ndarray, "n n"], log_copies: float, budget: float) -> float:
    """Logarithm of an upper bound on the number of pairings within a budget."""
    n, best = len(reduced), np.inf
    counts = np.arange(1, n + 1)
    steps = np.diff(np.exp(gammaln(counts + 1) / counts), prepend=0)
    for tilt in np.geomspace(0.1, 100.0 * n, TILTS) / budget:
        kernel = np.exp(-tilt * reduced)
        rows, columns = np.ones(n), np.ones(n)
        for _ in range(TURNS):
            rows = 1 / (kernel @ columns)
            columns = 1 / (rows @ kernel)
        kernel *= rows[:, None] * columns
        scaled = -float(np.log(rows).sum() + np.log(columns).sum())
        log_permanent = min(
            float(np.log(np.sort(each, axis=1)[:, ::-1] @ steps).sum())
            for each in (kernel, kernel.T)
        )
        best = min(best, tilt * budget + scaled + log_permanent)
    return best - log_copies


def _log_weights(rises: list[Float[np.ndarray, "_ _"]], tilt: float) -> float:
    """Logarithm of the sum of exp(-tilt rise) over all combinations of the groups."""
    return float(sum(np.asarray(logsumexp(-tilt * each, axis=1)).sum() for each in rises))


def _estimates(
    reduced: Float[np.ndarray, "n n"],
    columns: Int[np.ndarray, " n"],
    rises: list[Float[np.ndarray, "_ _"]],
    budgets: Sequence[float],
) -> list[float]:
    """Logarithms of the number of pairings within each budget, by thermodynamic integration.

    Pairings are drawn with weights exp(-b rise) by exchanges of partners, for b from where nearly
    only the optimum is drawn down to where the mean rise is the budget. The logarithm of the sum of
    all weights changes by the mean rise times b for each e-fold of b.
    """
    n, random, largest = len(reduced), np.random.default_rng(0), max(budgets)
    if n < 2:
        return [0.0] * len(budgets)
    row_of = np.empty(n, np.int64)
    row_of[columns] = np.arange(n)
    listed = min(NEAR, n - 1)
    own = reduced + 0.0
    own[np.arange(n), columns] = np.inf
    cheap = np.argpartition(own, listed - 1, axis=1)[:, :listed]
    order = np.argsort(np.take_along_axis(own, cheap, axis=1), axis=1)
    near = row_of[np.take_along_axis(cheap, order, axis=1)]
    tilt, ground = 1 / largest, _log_weights(rises, 1e12 / largest)
    while _log_weights(rises, tilt) > ground + ALONE:
        tilt *= COOLING
    now, log_z, curve = columns.copy(), _log_weights(rises, tilt), []
    last: tuple[float, float] | None = None
    while True:
        drawn = _drawn(reduced, now, near, tilt, random)
        mean, sigma = float(drawn.mean()), float(drawn.std())
        if last is not None:
            log_z += (last[0] * last[1] + tilt * mean) / 2 * math.log(last[0] / tilt)
        width = max(tilt * sigma * math.sqrt(2 * math.pi), 1.0)
        curve.append((mean, log_z + tilt * mean - math.log(width)))
        if mean >= largest or tilt < 0.02 / largest:
            break
        last, tilt = (tilt, mean), tilt / COOLING
    energies, entropies = np.maximum.accumulate(np.array(curve), axis=0).T
    return np.interp(budgets, energies, entropies).tolist()


def _drawn(
    reduced: Float[np.ndarray, "n n"],
    now: Int[np.ndarray, " n"],
    near: Int[np.ndarray, "n k"],
    tilt: float,
    random: np.random.Generator,
) -> Float[np.ndarray, " draw"]:
    """Rises of pairings drawn one after another; `now`, the columns of rows, ends as the last."""
    n, found = len(now), []
    burn_in, draws = BURN_IN + n // 3, DRAWS + n // 8
    for step in range(burn_in + draws):
        one = random.permutation(n)
        listed = near[one, (near.shape[1] * random.random(n) ** 3).astype(int)]  # the first often
        other = np.where(random.random(n) < FAR, random.integers(0, n, n), listed)
        # Of the exchanges of a row, the first counts, so that all may happen at once.
        ends = np.stack([one, other], axis=1).ravel()
        first = np.full(n, 2 * n)
        first[ends[::-1]] = np.arange(2 * n)[::-1] // 2
        at = np.flatnonzero((first[one] == np.arange(n)) & (first[other] == np.arange(n)))
        at = at[one[at] != other[at]]
        i, j = one[at], other[at]
        rise = reduced[i, now[j]] + reduced[j, now[i]] - reduced[i, now[i]] - reduced[j, now[j]]
        accepted = np.log(random.random(len(i))) < -tilt * rise
        i, j = i[accepted], j[accepted]
        now[i], now[j] = now[j], now[i]
        if step >= burn_in:
            found.append(reduced[np.arange(n), now].sum())
    return np.array(found)
