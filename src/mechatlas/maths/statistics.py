"""Evidence from many tests at once.

q_values      p-values -> smallest false discovery rate at which each still stands
enrichment    are the members of one set more often than by chance in another?
proportion    a share with its interval
difference    by how much two shares differ, with interval and test
wilson        the same for many shares at once
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import stats


def q_values(p_values: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Smallest false discovery rate at which each test is still a discovery.

    All entries are one family of tests. Entries that are NaN were not tested: they stay NaN and
    do not count. Holds for independent tests and for positively dependent ones.

    Raises:
        ValueError: A p-value lies outside 0..1.

    Source:
        Benjamini and Hochberg, Controlling the false discovery rate (1995).
    """
    q = np.array(p_values, dtype=np.float64)
    tested = ~np.isnan(q)
    q[tested] = stats.false_discovery_control(q[tested])
    return q


def enrichment(
    both: Int[np.ndarray, "*shape"],
    first: Int[np.ndarray, "*shape"],
    second: Int[np.ndarray, "*shape"],
    total: int,
) -> Float[np.ndarray, "*shape"]:
    """Probability of at least `both` common members if the sets were independent.

    Args:
        both: Members of both sets.
        first: Members of the first.
        second: Members of the second.
        total: Things that could be members.

    Returns:
        One-sided hypergeometric p-values (Fisher's exact test).
    """
    # scipy knows no empty population; there, and for empty sets, everything is as by chance.
    p = stats.hypergeom.sf(np.asarray(both) - 1, max(total, 1), first, second)
    return np.clip(np.asarray(p), 0, 1)


@dataclasses.dataclass(frozen=True)
class Proportion:
    """Share of some trials, with its Wilson interval."""

    value: float
    """The share."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""


def proportion(hits: int, trials: int) -> Proportion:
    """A share of trials with its 95 % Wilson interval; NaN and 0..1 where there were none."""
    if trials == 0:
        return Proportion(np.nan, 0.0, 1.0)
    low, high = wilson(np.array([hits / trials]), np.array([float(trials)]))
    return Proportion(hits / trials, float(low[0]), float(high[0]))


def wilson(
    share: Float[np.ndarray, "*shape"], trials: Float[np.ndarray, "*shape"]
) -> tuple[Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"]]:
    """Ends of the 95 % Wilson intervals of shares of some trials, which need not be whole.

    Source:
        Wilson, Probable inference, the law of succession, and statistical inference (1927).
    """
    z2 = float(stats.norm.ppf(0.975)) ** 2
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    spread = z2 * (share * (1 - share) / trials + z2 / (4 * trials**2))
    half = np.sqrt(np.maximum(spread, 0)) / (1 + z2 / trials)
    return np.maximum(0.0, np.asarray(middle - half)), np.minimum(1.0, np.asarray(middle + half))


class Difference(NamedTuple):
    """By how much two shares differ, its interval, and a test that they do not."""

    value: float
    low: float
    high: float
    p_value: float
    """Twice the smaller one-sided one of Fisher's exact test."""


def difference(first: tuple[int, int], second: tuple[int, int]) -> Difference:
    """The share of the first less that of the second; NaN and -1..1 where one had no trials.

    Args:
        first: Hits and trials.
        second: Hits and trials.

    Source:
        Newcombe, Interval estimation for the difference between independent proportions (1998),
        for intervals made of two Wilson intervals.
    """
    if not (first[1] and second[1]):
        return Difference(np.nan, -1.0, 1.0, 1.0)
    p, q = (proportion(*each) for each in (first, second))
    value = p.value - q.value
    hits, trials = np.array([first, second]).T
    one_sided = enrichment(hits, np.repeat(hits.sum(), 2), trials, int(trials.sum()))
    return Difference(
        value,
        value - float(np.hypot(p.value - p.low, q.high - q.value)),
        value + float(np.hypot(p.high - p.value, q.value - q.low)),
        min(1.0, 2 * float(one_sided.min())),
    )
