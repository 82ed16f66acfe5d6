"""Number of pairings near the optimum, against all pairings and against known numbers."""

import itertools
import math

import numpy as np
import pytest

from mechatlas.base import InputError
from mechatlas.maths import near_optima
from mechatlas.maths.assignment import assign
from mechatlas.maths.near_optima import count_near_optimal
from mechatlas.maths.pricing import Factors

SHARES = (0.01, 0.05, 0.2, 0.6)


def counted(cost, shares):
    """Number of one-to-one pairings within each share of the optimum, by trying all."""
    small = cost if cost.shape[0] <= cost.shape[1] else cost.T
    n, m = small.shape
    orders = np.array(list(itertools.permutations(range(m), n)))
    totals = small[np.arange(n), orders].sum(axis=1)
    return [int((totals <= (1 + share) * totals.min() * (1 + 1e-12)).sum()) for share in shares]


def worlds():
    random = np.random.default_rng(0)
    yield random.integers(1, 4, (7, 7)).astype(float)  # many ties
    for shape in ((1, 1), (2, 2), (8, 8), (4, 7), (7, 4)):
        yield random.random(shape) + 0.5
        a, b = (random.standard_normal((n, 3)).astype(np.float32) for n in shape)
        shared = min(shape) // 2
        b[:shared] = a[:shared] + 0.2 * b[:shared]
        yield Factors.squared_distances(a, b)


@pytest.mark.parametrize("group", [2, 3, 6])
def test_bounds_hold_against_all_pairings(group, monkeypatch):
    monkeypatch.setattr(near_optima, "GROUP", group)
    apart, found_share = [], []
    for costs in worlds():
        matrix = costs.matrix().astype(np.float64) if isinstance(costs, Factors) else costs
        found = count_near_optimal(assign(costs), costs, SHARES)
        for each, number in zip(found, counted(matrix, SHARES), strict=True):
            assert each.log10_at_most is not None
            assert each.log10_estimate is not None
            assert 10**each.log10_at_least <= number * (1 + 1e-6), (matrix.shape, each, number)
            assert 10**each.log10_at_most >= number * (1 - 1e-6), (matrix.shape, each, number)
            assert each.log10_at_least <= each.log10_estimate <= each.log10_at_most
            apart.append(abs(each.log10_estimate - math.log10(number)))
            if number > 1:
                found_share.append(each.log10_at_least / math.log10(number))
    assert np.mean(apart) < 0.3
    assert max(apart) < 1.3
    assert np.mean(found_share) > {2: 0.3, 3: 0.4, 6: 0.5}[group]


def test_all_pairings_of_a_small_square_are_counted_exactly():
    cost = np.random.default_rng(3).random((6, 6)) + 1
    found = count_near_optimal(assign(cost), cost, SHARES)
    for each, number in zip(found, counted(cost, SHARES), strict=True):
        assert 10**each.log10_at_least == pytest.approx(number)


@pytest.mark.parametrize(("n_pairs", "few", "tolerance"), [(30, 256, 0.01), (150, 0, 0.25)])
def test_disjoint_swaps_are_counted(n_pairs, few, tolerance, monkeypatch):
    """Each pair of rows may swap for a rise of 0.02; everything else is dear."""
    monkeypatch.setattr(near_optima, "FEW_GROUPS", few)
    n = 2 * n_pairs
    cost = np.full((n, n), 1e3)
    for k in range(0, n, 2):
        cost[k : k + 2, k : k + 2] = [[1.0, 1.01], [1.01, 1.0]]
    for share in (0.001, 0.004, 0.02):
        most = int(share * n / 0.02 + 1e-6)
        number = math.log10(sum(math.comb(n_pairs, k) for k in range(min(most, n_pairs) + 1)))
        (found,) = count_near_optimal(assign(cost), cost, [share])
        assert found.log10_at_least <= number + 1e-6
        assert found.log10_at_least >= (1 - tolerance) * number - 1.0
        assert found.log10_at_most is not None
        assert found.log10_at_most >= number - 1e-6
        assert found.log10_estimate == pytest.approx(number, rel=0.2, abs=1.0)


def test_what_cannot_be_counted_is_refused():
    cost = np.random.default_rng(0).random((5, 5))
    with pytest.raises(InputError, match="Leave `unmatched` out"):
        count_near_optimal(assign(cost, unmatched=0.1), cost)
    with pytest.raises(InputError, match="needs a positive cost"):
        count_near_optimal(assign(-cost), -cost)


def test_of_large_problems_only_a_lower_bound_is_given(monkeypatch):
    monkeypatch.setattr(near_optima, "MOST_SQUARE", 4)
    cost = np.random.default_rng(0).random((5, 5))
    (found,) = count_near_optimal(assign(cost), cost, [0.5])
    assert found.log10_at_most is None
    assert found.log10_estimate is None
    assert found.log10_at_least > 0
    assert "at most" not in near_optima.in_words(found)
