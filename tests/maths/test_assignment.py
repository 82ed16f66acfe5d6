import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment

from mechatlas.base import InputError
from mechatlas.maths import assignment, pricing, selection
from mechatlas.maths.assignment import State, assign
from mechatlas.maths.certificate import CertificateError
from mechatlas.maths.pricing import Factors, Matrix

sizes = st.tuples(st.integers(1, 12), st.integers(1, 12))
costs = sizes.flatmap(
    lambda s: arrays(np.float64, s, elements=st.integers(-5, 5).map(float) | st.floats(-9, 9))
)


@pytest.fixture(autouse=True)
def short_lists(request, monkeypatch):
    """Lists so short that small problems need further pricing rounds too."""
    if "long_lists" not in request.keywords:
        monkeypatch.setattr(assignment, "LISTED", 2)


def cheapest(cost, unmatched=math.inf):
    """What scipy finds; a row may stay unmatched for a price."""
    if math.isinf(unmatched):
        return cost[linear_sum_assignment(cost)].sum()
    saved = np.minimum(cost - unmatched, 0)
    return saved[linear_sum_assignment(saved)].sum() + unmatched * len(cost)


def check(costs, dense, unmatched=math.inf):
    found = assign(costs, unmatched=unmatched)
    expected = cheapest(dense, unmatched)
    assert found.cost == pytest.approx(expected, rel=1e-9, abs=1e-11)
    certificate = found.certify(costs)
    assert certificate.lower_bound == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert found.lower_bound <= found.cost + 1e-9
    return found


@given(costs)
@settings(max_examples=60)
def test_no_pairing_is_cheaper(cost):
    check(cost, cost)


@pytest.mark.parametrize("unmatched", [math.inf, 0.3])
@pytest.mark.parametrize(("n", "m"), [(90, 90), (60, 90), (90, 60), (84, 90), (90, 81)])
@pytest.mark.parametrize("kind", ["random", "clusters", "few directions", "twins"])
def test_costs_that_are_never_kept_lead_to_the_same_optimum(kind, n, m, unmatched, monkeypatch):
    monkeypatch.setattr(pricing, "KEPT_BYTES", 0)
    monkeypatch.setattr(pricing, "BLOCK_BYTES", 4 * m * 16)  # several blocks of rows
    random = np.random.default_rng(n + m)
    spread = 1 / np.arange(1, 13) if kind == "few directions" else np.ones(12)
    a, b = (random.normal(size=(k, 12)) * spread for k in (n, m))
    if kind == "clusters":
        a, b = (
            random.normal(size=(5, 12))[random.integers(5, size=len(x))] + 0.05 * x for x in (a, b)
        )
    if kind == "twins":
        a[1::2], b[: len(b) // 2] = a[: len(a) // 2], b[len(b) - len(b) // 2 :]
    a, b = (np.ascontiguousarray(x, dtype=np.float32) for x in (a, b))
    offsets = random.normal(size=n), random.normal(size=m)
    dense = offsets[0][:, None] + offsets[1] - 2 * a.astype(np.float64) @ b.T.astype(np.float64)
    check(Factors(a, b, *offsets), dense, unmatched)


@pytest.mark.parametrize("seed", range(8))
def test_blocks_that_do_not_wait_for_prices_prove_the_same_optimum(seed, monkeypatch):
    monkeypatch.setattr(pricing, "KEPT_BYTES", 0)
    monkeypatch.setattr(pricing, "BLOCK_BYTES", 4 * 300 * 40)
    monkeypatch.setattr(assignment, "WORTH_SENDING", 1)
    monkeypatch.setattr(assignment, "FARTHER", 2)
    monkeypatch.setattr(assignment, "SAMPLED", 200)
    random = np.random.default_rng(seed)
    a, b = random.normal(size=(2, 300, int(random.integers(2, 30)))).astype(np.float32)
    factors = Factors.squared_distances(a, b)
    found = check(factors, factors.matrix())
    assert found.lower_bound <= cheapest(factors.matrix()) * (1 + 1e-12)
    least = (factors.matrix() - found.column_prices).min(axis=1)
    assert (found.row_prices <= least + 1e-9).all()


@given(costs, st.floats(-6, 6))
@settings(max_examples=60)
def test_rows_stay_unmatched_where_that_is_cheaper(cost, price):
    found = check(cost, cost, price)
    paired = np.flatnonzero(found.columns >= 0)
    assert (cost[paired, found.columns[paired]] <= price + 1e-9).all() or math.isclose(
        found.cost, cheapest(cost, price), abs_tol=1e-9
    )


def instances(how_many):
    """Small problems of every awkward kind."""
    random = np.random.default_rng(0)
    for number in range(how_many):
        n, m = random.integers(1, 16 if number % 8 else 90, 2)
        kind = number % 8
        if kind == 0:  # ties everywhere
            yield random.integers(0, 3, (n, m)).astype(float)
        elif kind == 1:  # one row
            yield random.normal(size=(1, m))
        elif kind == 2:  # duplicates
            base = random.normal(size=(3, m))
            yield base[random.integers(0, 3, n)]
        elif kind == 3:  # zero rows and columns
            cost = random.normal(size=(n, m))
            cost[random.random(n) < 0.4] = 0
            cost[:, random.random(m) < 0.4] = 0
            yield cost
        elif kind == 4:  # near ties
            yield 1 + 1e-12 * random.integers(0, 5, (n, m))
        elif kind == 5:  # rank one and rounded: no column is better for one row than another
            yield np.round(random.normal(size=(n, 1)) + random.normal(size=(1, m)), 1)
        elif kind == 6:  # very different sizes
            yield random.normal(size=(n, m)) * 10.0 ** random.integers(-6, 6, (n, 1))
        else:
            yield random.normal(size=(n, m))


@pytest.mark.parametrize("how_many", [240, pytest.param(4000, marks=pytest.mark.slow)])
def test_awkward_instances_agree_with_scipy(how_many):
    for number, cost in enumerate(instances(how_many)):
        check(cost, cost, math.inf if number % 3 else float(np.median(cost)))


def factor_instances():
    random = np.random.default_rng(1)
    for number in range(150):
        n, m, d = random.integers(1, 40), random.integers(1, 40), random.integers(1, 9)
        a, b = random.normal(size=(n, d)), random.normal(size=(m, d))
        kind = number % 5
        if kind == 0:  # clustered: far fewer directions than rows
            a, b = a[random.integers(0, 3, n) % n], b[random.integers(0, 3, m) % m]
        elif kind == 1:
            a[random.random(n) < 0.5] = 0
            b[random.random(m) < 0.5] = 0
        elif kind == 2:  # partners
            k = min(n, m)
            b[:k] = a[:k] + 0.1 * b[:k]
        elif kind == 3:  # differences that float32 does not see
            a = a[:1] + 1e-7 * a
            b = a[:1] + 1e-7 * b
        yield a, b, number % 2 == 0


def test_costs_from_factors_agree_with_scipy_to_the_last_digits_of_float64():
    for a, b, single in factor_instances():
        if single:
            a, b = a.astype(np.float32), b.astype(np.float32)
        factors = Factors.squared_distances(a, b)
        every = np.indices((len(a), len(b))).reshape(2, -1)
        dense = factors.exact(*every).reshape(len(a), len(b))
        wide = a.astype(np.float64)[:, None] - b.astype(np.float64)
        np.testing.assert_allclose(dense, np.square(wide).sum(-1), atol=1e-12)
        check(factors, dense)


@given(st.integers(0, 10**6))
@settings(max_examples=30)
def test_blocks_are_as_near_to_the_exact_costs_as_they_say(seed):
    random = np.random.default_rng(seed)
    n, m, d = random.integers(1, 30, 3)
    a = random.normal(size=(n, d)) * 10.0 ** random.integers(-3, 4, (n, 1))
    b = random.normal(size=(m, d)) * 10.0 ** random.integers(-3, 4, (m, 1))
    factors = Factors.squared_distances(a, b)
    exact = factors.exact(*np.indices((n, m)).reshape(2, -1)).reshape(n, m)
    off = np.abs(factors.block(slice(0, n)) - exact).max(axis=1)
    assert (off <= factors.rounding(slice(0, n))).all()


def planted(n, m, d, seed=0):
    random = np.random.default_rng(seed)
    a = random.normal(size=(n, d)).astype(np.float32)
    b = random.normal(size=(m, d)).astype(np.float32)
    b[: min(n, m) // 2] = a[: min(n, m) // 2] + 0.5 * b[: min(n, m) // 2]
    return a, b[random.permutation(m)]


@pytest.mark.long_lists
@pytest.mark.parametrize(("n", "m"), [(700, 700), (500, 900), (900, 500), (650, 700), (700, 699)])
def test_larger_problems_agree_with_scipy(n, m):
    a, b = planted(n, m, 24)
    factors = Factors.squared_distances(a, b)
    dense = np.square(a.astype(np.float64)[:, None] - b).sum(-1)
    check(factors, dense)
    check(factors, dense, float(np.quantile(dense, 0.01)))


def test_the_answer_does_not_depend_on_the_number_of_threads():
    factors = Factors.squared_distances(*planted(300, 300, 8))
    before = torch.get_num_threads()
    one = assign(factors)
    torch.set_num_threads(2)
    two = assign(factors)
    torch.set_num_threads(before)
    np.testing.assert_array_equal(one.columns, two.columns)


@pytest.mark.parametrize(("n", "m"), [(200, 200), (190, 200)])
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(n, m):
    factors = Factors.squared_distances(*planted(n, m, 6))
    kept: list[dict[str, Any]] = []

    def keep(state: State) -> None:
        kept.append({name: array.copy() for name, array in state.arrays().items()})
        for array in kept[-1].values():
            array.setflags(write=False)  # as those that a cluster hands out

    whole = assign(factors, on_state=keep)
    assert len(kept) > 2, "the instance must need further rounds"
    for arrays_ in [*kept[:: len(kept) // 4], kept[-1]]:
        again = assign(factors, resume=State.from_arrays(arrays_))
        np.testing.assert_array_equal(again.columns, whole.columns)
        np.testing.assert_array_equal(again.column_prices, whole.column_prices)
        assert again.rows_priced == whole.rows_priced


@pytest.mark.long_lists
def test_later_rounds_look_at_few_rows():
    factors = Factors.squared_distances(*planted(2000, 2000, 64))
    found = assign(factors)
    assert found.rows_priced[0] == 2000
    assert sum(found.rows_priced[1:]) < 2000
    assert found.rounds == len(found.rows_priced)


def test_progress_ends_where_it_said_it_would():
    told: list[tuple[int, int]] = []
    assign(np.random.default_rng(0).normal(size=(30, 40)), on_progress=lambda *x: told.append(x))
    assert told[-1][0] == told[-1][1]
    assert told == sorted(told)


def test_a_stale_certificate_is_refused():
    cost = np.array([[1.0, 2.0], [2.0, 1.0]])
    found = assign(cost)
    with pytest.raises(CertificateError, match=r"gap .* Were the costs changed"):
        found.certify(np.array([[1.0, -2.0], [-2.0, 1.0]]))


def test_a_worse_pairing_is_refused_whatever_prices_it_shows():
    random = np.random.default_rng(0)
    cost = random.normal(size=(20, 20))
    found = assign(cost)
    order = found.columns.copy()
    order[[0, 1]] = order[[1, 0]]
    import dataclasses

    with pytest.raises(CertificateError, match="cheaper pairing may exist"):
        dataclasses.replace(found, columns=order).certify(cost)
    twice = found.columns.copy()
    twice[0] = twice[1]
    with pytest.raises(CertificateError, match="Two rows have the same column"):
        dataclasses.replace(found, columns=twice).certify(cost)
    raised = found.row_prices + 0.1
    with pytest.raises(CertificateError, match="cheaper pairing may exist"):
        dataclasses.replace(found, row_prices=raised, columns=order).certify(cost)


@pytest.mark.parametrize("place", [(0, 0), (3, 1)])
def test_costs_that_are_not_numbers_are_named(place):
    cost = np.zeros((5, 2))
    cost[place] = np.nan
    with pytest.raises(InputError, match=rf"costs have nan at \({place[0]}, {place[1]}\)"):
        assign(cost)


def test_empty_costs_are_refused():
    with pytest.raises(InputError, match="nothing to pair"):
        Matrix(np.zeros((0, 3)))
    with pytest.raises(InputError, match="NaN"):
        assign(np.zeros((2, 2)), unmatched=math.nan)


@pytest.mark.parametrize("convert", [torch.tensor, np.array, np.asfortranarray, list])
@pytest.mark.parametrize("dtype", [float, int])
def test_costs_may_be_tensors_arrays_or_lists(convert, dtype):
    cost = [[dtype(x) for x in row] for row in ((4, 1, 3), (2, 0, 5), (3, 2, 2))]
    pairing = assign(convert(cost))
    assert pairing.columns.tolist() == [1, 0, 2]
    assert pairing.certify(convert(cost)).lower_bound == 5
    assert str(pairing).splitlines()[0] == "3 pairs of 3 rows and 3 columns at cost 5"
    assert "9 pairs priced" in repr(pairing.certify(convert(cost)))
    assert assign(torch.tensor(cost, dtype=torch.bfloat16).T).columns.tolist() == [1, 0, 2]


def test_what_is_no_matrix_of_costs_is_refused():
    with pytest.raises(InputError, match=r"costs has shape \(3,\), expected an array \(n, m\)"):
        assign([1.0, 2.0, 3.0])


@given(st.integers(0, 10**6))
@settings(max_examples=40)
def test_the_cheapest_columns_of_rows_are_those_of_a_sort(seed):
    random = np.random.default_rng(seed)
    m = int(random.integers(1, 3000))
    kept = int(random.integers(1, min(m, 60) + 1))
    scale = 10.0 ** random.integers(-3, 4)
    block = (scale * random.normal(size=(3, m))).astype([np.float32, np.float64][seed % 2])
    prices = scale * random.normal(size=m)
    if seed % 3 == 0:  # ties, and differences that float32 does not see
        block[:] = np.round(block / scale)
        prices = np.round(prices / scale) + 1e-9 * random.integers(0, 3, m)
    if seed % 5 == 0:  # one price far beyond the others
        prices[random.integers(m)] = -1e6 * scale
    values, following = np.empty((3, kept)), np.empty(3)
    names = np.empty((3, kept), np.int32)
    selection.keep_cheapest_of_rows(block, prices, (0, 3), values, names, following)
    beyond = np.sort(block - prices, axis=1)
    np.testing.assert_array_equal(values, beyond[:, :kept])
    np.testing.assert_array_equal(following, beyond[:, kept] if kept < m else np.inf)
    np.testing.assert_array_equal(np.take_along_axis(block - prices, names.astype(int), 1), values)
    assert all(len(np.unique(row)) == kept for row in names)
