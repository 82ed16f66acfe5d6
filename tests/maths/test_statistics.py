"""q-values, enrichment and shares against scipy, and what they promise on data without effect."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import stats

from mechatlas.maths.statistics import difference, enrichment, proportion, q_values

p_arrays = arrays(np.float64, array_shapes(max_dims=2, max_side=20), elements=st.floats(0, 1))


@given(p_arrays)
def test_q_values_are_those_of_benjamini_and_hochberg(p):
    flat = np.sort(p.ravel())
    rates = flat * len(flat) / np.arange(1, len(flat) + 1)
    expected = [min(1.0, rates[np.searchsorted(flat, each) :].min()) for each in p.ravel()]
    least = np.finfo(np.float64).tiny  # below it numbers have fewer digits
    np.testing.assert_allclose(q_values(p), np.reshape(expected, p.shape), rtol=1e-12, atol=least)


@given(arrays(np.float64, st.integers(1, 30), elements=st.floats(0, 1)), st.integers(0, 5))
def test_what_was_not_tested_does_not_count(p, n_untested):
    q = q_values(np.concatenate([np.full(n_untested, np.nan), p]))
    assert np.isnan(q[:n_untested]).all()
    np.testing.assert_array_equal(q[n_untested:], q_values(p))


def test_false_discoveries_stay_at_the_nominal_rate():
    random = np.random.default_rng(0)
    rates = []
    for _ in range(400):
        p = random.uniform(size=200)
        p[:40] = stats.norm.sf(random.normal(3.5, 1, 40))
        found = q_values(p) <= 0.1
        rates.append(found[40:].sum() / max(found.sum(), 1))
    assert 0.05 < np.mean(rates) < 0.1


def test_a_p_value_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        q_values(np.array([0.1, 1.5]))


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 12), st.integers(0, 12))
def test_enrichment_is_fishers_exact_test(a, b, c, d):
    p = enrichment(np.array([a]), np.array([a + b]), np.array([a + c]), a + b + c + d)
    _, expected = stats.fisher_exact([[a, b], [c, d]], alternative="greater")
    assert p[0] == pytest.approx(expected, abs=1e-12)


@given(st.integers(0, 50), st.integers(0, 50))
def test_a_share_lies_in_its_interval(hits, misses):
    if hits + misses == 0:
        assert np.isnan(proportion(0, 0).value)
        return
    found = proportion(hits, hits + misses)
    expected = stats.binomtest(hits, hits + misses).proportion_ci(method="wilson")
    assert found.low == pytest.approx(expected.low, abs=1e-12)
    assert found.high == pytest.approx(expected.high, abs=1e-12)
    assert found.low - 1e-12 <= found.value <= found.high + 1e-12


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
def test_a_difference_of_shares_has_the_test_of_fisher_and_is_antisymmetric(a, b, c, d):
    there = difference((a, a + b), (c, c + d))
    if not (a + b and c + d):
        assert np.isnan(there.value)
        return
    back = difference((c, c + d), (a, a + b))
    assert there.low - 1e-12 <= there.value <= there.high + 1e-12
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low), abs=1e-12)
    table = [[a, b], [c, d]]
    sides = [stats.fisher_exact(table, alternative=each) for each in ("less", "greater")]
    less, greater = (float(np.asarray(side)[1]) for side in sides)
    assert there.p_value == pytest.approx(min(1, 2 * min(less, greater)), abs=1e-9)


def test_the_interval_of_a_difference_is_newcombes():
    # Table II of Newcombe (1998), method 10: 56/70 - 48/80.
    found = difference((56, 70), (48, 80))
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
