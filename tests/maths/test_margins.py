"""How determined the pairs of an optimum are, against solving again without each pair."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from mechatlas.base import InputError
from mechatlas.maths import margins as module
from mechatlas.maths.assignment import assign
from mechatlas.maths.margins import margins
from mechatlas.maths.pricing import Factors

SHAPES = ((1, 1), (2, 2), (5, 5), (40, 40), (30, 45), (45, 30), (1, 4), (90, 90))


def rises(cost, columns):
    """Rise of the optimum without each pair, each solved anew."""
    paired = np.flatnonzero(columns >= 0)
    least, found = cost[paired, columns[paired]].sum(), np.full(len(cost), np.nan)
    for i in paired:
        without = cost.copy()
        without[i, columns[i]] = 1e6
        rows, others = linear_sum_assignment(without)
        total = without[rows, others].sum()
        found[i] = total - least if total < 1e5 else np.inf
    return found


@pytest.mark.parametrize("listed", [2, 32])
@pytest.mark.parametrize("shape", SHAPES)
def test_margins_are_what_the_optimum_rises_by_without_each_pair(shape, listed, monkeypatch):
    monkeypatch.setattr(module, "LISTED", listed)
    random = np.random.default_rng(0)
    for cost in (random.normal(size=shape), random.integers(0, 4, shape).astype(float)):
        pairing = assign(cost)
        found = margins(pairing, cost, max_listed=None)
        np.testing.assert_allclose(found.rise, rises(cost, pairing.columns), atol=1e-9)
        np.testing.assert_array_equal(found.exact, pairing.columns >= 0)
    a, b = (random.standard_normal((n, 8)).astype(np.float32) for n in shape)
    shared = min(shape) // 2
    b[:shared] = a[:shared] + 0.1 * b[:shared]
    costs = Factors.squared_distances(a, b)
    pairing = assign(costs)
    expected = rises(costs.matrix(), pairing.columns)
    np.testing.assert_allclose(margins(pairing, costs, max_listed=None).rise, expected, atol=1e-6)


@pytest.mark.parametrize("reached", [8, 1000])
def test_short_searches_give_exact_margins_or_lower_bounds(reached, monkeypatch):
    monkeypatch.setattr(module, "MAX_REACHED", reached)
    random = np.random.default_rng(1)
    a, b = (random.standard_normal((90, 8)).astype(np.float32) for _ in range(2))
    b[:60] = a[:60] + 0.3 * b[:60]
    costs = Factors.squared_distances(a, b)
    pairing = assign(costs)
    found, expected = margins(pairing, costs, max_listed=4), rises(costs.matrix(), pairing.columns)
    assert (5 if reached > 90 else 0) <= found.exact.sum() < 85
    np.testing.assert_allclose(found.rise[found.exact], expected[found.exact], atol=1e-6)
    assert (found.rise < expected + 1e-6).all()
    assert found.rise.sum() > 0.3 * expected.sum()


def test_margins_are_refused_where_rows_may_stay_unmatched():
    cost = np.ones((3, 3))
    with pytest.raises(InputError, match="price of staying unmatched"):
        margins(assign(cost, unmatched=2.0), cost)
