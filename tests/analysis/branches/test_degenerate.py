"""Rows that say nothing of a branch are never specialized, and move nobody's threshold."""

import numpy as np
import pytest

from mechatlas.analysis.branches.specialization import BranchTest, branches

PARTS = {"left": slice(0, 16), "right": slice(16, 64)}


def planted() -> np.ndarray:
    rows = np.abs(np.random.default_rng(1).standard_normal((200, 64)))
    rows[:20, 16:] *= 0.1
    return rows


DEGENERATE = {
    "zero": np.zeros((30, 64)),
    "zero but for rounding": np.random.default_rng(2).normal(size=(30, 64)) * 1e-12,
    "constant": np.full((30, 64), 0.3),
    "duplicated": planted()[[3] * 30],
    "duplicated at other lengths": planted()[[3] * 30] * np.linspace(0.5, 3, 30)[:, None],
}


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("with_rows", [False, True])
def test_degenerate_rows_change_nothing_for_the_others(kind, with_rows):
    random = np.random.default_rng(3)
    # Channels of the left branch hardly vary, so that a constant row has much of itself there.
    x = random.normal(size=(500, 64)) * np.where(np.arange(64) < 16, 0.05, 1)
    activations, rows = (x if with_rows else None), planted()
    if with_rows:
        rows *= np.where(np.arange(64) < 16, 0.05, 1)
        rows[:20, :16] *= 20
    extra = rows[[3] * 30] * np.linspace(0.5, 3, 30)[:, None]
    extra = extra if "duplicated" in kind else DEGENERATE[kind]
    alone = branches(rows, PARTS, activations)
    beside = branches(np.concatenate([rows, extra]), PARTS, activations)
    assert alone.specialized()[:20, 0].sum() > 15
    others = np.delete(np.arange(200), 3) if "duplicated" in kind else np.arange(200)
    np.testing.assert_allclose(beside.p_values[others], alone.p_values[others], rtol=1e-9)
    np.testing.assert_allclose(beside.q_values[others], alone.q_values[others], rtol=1e-9)
    assert not beside.specialized()[200:].any()
    assert (beside.branch_of()[200:] == -1).all()
    if "duplicated" in kind:
        assert not beside.specialized()[3].any()


def test_latents_that_are_never_active_change_nothing_for_the_others():
    rows = planted()
    never = np.arange(200) % 7 == 3
    beside, alone = branches(rows, PARTS, tested=~never), branches(rows[~never], PARTS)
    np.testing.assert_allclose(beside.q_values[~never], alone.q_values, rtol=1e-9)
    assert not beside.specialized()[never].any()


def test_nothing_is_specialized_where_all_rows_are_degenerate():
    test = BranchTest(np.ones((5, 64)), PARTS)
    assert not test.run().specialized().any()
    assert not test.permuted().specialized().any()
