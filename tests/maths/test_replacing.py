"""Pairing again once some columns are others: against pairings from nothing and all cosines."""

import numpy as np
import pytest

from mechatlas.maths import assignment, pricing, replacing
from mechatlas.maths.assignment import assign, first_prices
from mechatlas.maths.pricing import Factors, Kept, Replaced
from mechatlas.maths.replacing import cosines, look, pair_again


def planted(n, m, d, seed=0):
    """Half of the smaller side has a partner; lengths differ."""
    random = np.random.default_rng(seed)
    a, b = (random.normal(size=(k, d)).astype(np.float32) for k in (n, m))
    half = min(n, m) // 2
    b[:half] = a[:half] + 0.5 * b[:half]
    return a * random.uniform(0.5, 2, (n, 1)).astype(np.float32), b[random.permutation(m)]


def exact_cosines(a, b):
    a, b = (x.astype(np.float64) / np.linalg.norm(x, axis=1)[:, None] for x in (a, b))
    return a @ b.T


@pytest.fixture(params=["kept", "never kept", "in blocks that do not wait"])
def kind(request, monkeypatch):
    if request.param != "kept":
        monkeypatch.setattr(pricing, "KEPT_BYTES", 0)
        monkeypatch.setattr(pricing, "BLOCK_BYTES", 1 << 16)
        monkeypatch.setattr(assignment, "FARTHER", 2)
    if request.param == "in blocks that do not wait":
        monkeypatch.setattr(assignment, "WORTH_SENDING", 1)
    return request.param


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
@pytest.mark.parametrize(("n", "m"), [(600, 600), (570, 600), (300, 600)])
def test_a_pairing_with_other_columns_overpays_little(n, m, share, precision, kind):
    a, b = planted(n, m, 24)
    random = np.random.default_rng(1)
    replaced = np.sort(random.choice(m, int(share * m), replace=False))
    new = b.copy()
    new[replaced] = planted(n, m, 24, seed=5)[1][replaced]
    costs = Factors.squared_distances(a, b).kept()
    all_paired = n > 500
    before = look(costs, first_prices(costs) if all_paired else np.zeros(m))
    precision = precision if all_paired else "highest"
    others = costs.with_columns(new[replaced], precision).kept()
    changed = Replaced(costs, replaced, others)
    prices = first_prices(others) if all_paired else np.zeros(len(replaced))
    columns = pair_again(changed, before, look(others, prices))
    rows = np.flatnonzero(columns >= 0)
    assert len(rows) >= 0.99 * n
    assert len(np.unique(columns[rows])) == len(rows)
    true = Factors.squared_distances(a, new)
    cheapest = assign(true)
    alone = np.setdiff1d(np.arange(n), rows)
    spared = true.exact(alone, cheapest.columns[alone]).sum()
    ratio = true.exact(rows, columns[rows]).sum() / (cheapest.cost - spared)
    assert ratio <= (1.01 if all_paired else 1 + 1e-12)


def test_a_look_says_what_all_pairs_say(kind, monkeypatch):
    monkeypatch.setattr(replacing, "NEAREST", 5)
    a, b = planted(300, 320, 12)
    costs = Factors.squared_distances(a, b).kept()
    dense = np.square(a.astype(np.float64)[:, None] - b).sum(-1)
    prices = first_prices(costs)
    looked_at = dense if kind == "kept" else dense[:: assignment.SAMPLED]
    np.testing.assert_allclose(prices, looked_at.min(axis=0), rtol=1e-4, atol=1e-4)
    found = look(costs, prices)
    keys = dense - found.prices
    listed = np.take_along_axis(keys, found.columns, axis=1)
    np.testing.assert_allclose(listed, np.sort(keys, axis=1)[:, : listed.shape[1]], atol=1e-4)
    following = np.sort(keys, axis=1)[:, listed.shape[1]]
    np.testing.assert_allclose(found.horizon, following, atol=1e-4)
    listed = np.take_along_axis(dense, found.columns, axis=1)
    np.testing.assert_allclose(found.costs, listed, rtol=1e-4, atol=1e-4)
    true = exact_cosines(a, b)
    near = -np.sort(-true, axis=1)[:, :5]
    np.testing.assert_allclose(found.near_rows[0], near, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(true, found.near_rows[1], 1), near, atol=1e-5)
    near = -np.sort(-true, axis=0)[:2]
    np.testing.assert_allclose(found.near_columns[0], near, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(true, found.near_columns[1], 0), near, atol=1e-5)
    np.testing.assert_allclose(found.squares[0], np.square(true).sum(axis=1), rtol=1e-4)
    np.testing.assert_allclose(found.squares[1], np.square(true).sum(axis=0), rtol=1e-4)
    some = np.array([3, 299, 17])
    np.testing.assert_allclose(cosines(costs, some), true[some], atol=1e-5)


@pytest.mark.parametrize("kept", [True, False])
def test_replaced_columns_cost_what_the_new_ones_do(kept):
    a, b = planted(40, 40, 8)
    new = planted(40, 40, 8, seed=1)[1]
    before = Factors.squared_distances(a, b.copy())
    before = before.kept() if kept else before
    assert isinstance(before, Kept) == kept
    whole = before.block(slice(0, 40)).copy()
    columns = np.array([3, 30, 17])
    b[columns] = new[columns]
    true = Factors.squared_distances(a, b)
    costs = Replaced(before, columns, before.with_columns(b[columns]))
    np.testing.assert_array_equal(costs.b, b)
    i, j = np.divmod(np.arange(1600), 40)
    np.testing.assert_array_equal(costs.exact(i, j), true.exact(i, j))
    np.testing.assert_array_equal(costs.matrix(), true.matrix())
    np.testing.assert_array_equal(costs.transposed().values, true.matrix().T)
    for rows in (slice(0, 40), np.array([5, 1]), np.arange(3, 9)):
        np.testing.assert_allclose(costs.block(rows), true.block(rows), rtol=1e-4, atol=1e-5)
        far = np.abs(costs.block(rows) - true.matrix()[rows])
        assert (far <= costs.rounding(rows)[:, None]).all()
    np.testing.assert_array_equal(before.block(slice(0, 40)), whole)
    assert assign(costs).cost == assign(true).cost


@pytest.mark.parametrize("d", [3, 400])
def test_rounding_in_bfloat16_is_within_its_bound(d):
    a, b = planted(64, 64, d)
    exact = Factors.squared_distances(a, b)
    rough = exact.with_columns(b, "medium")
    far = np.abs(rough.block(slice(0, 64)) - exact.matrix()).max(axis=1)
    assert (far <= rough.rounding(slice(0, 64))).all()
    assert (rough.rounding(slice(0, 64)) < 0.1 * exact.matrix().max()).all()
