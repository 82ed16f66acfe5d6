"""What the null sees of its pairs, against the cosines of all pairs."""

import numpy as np
import pytest

from mechatlas.analysis.matching.null_world import NullWorld
from mechatlas.maths import assignment, pricing, replacing
from mechatlas.maths.assignment import assign
from mechatlas.maths.pricing import Factors


def exact_cosines(a, b):
    a, b = (x.astype(np.float64) / np.linalg.norm(x, axis=1)[:, None] for x in (a, b))
    return a @ b.T


def check(seen, a, b, rows, columns, atol):
    """Compare what was seen of pairs with all cosines."""
    true = exact_cosines(a, b)
    np.testing.assert_allclose(seen.cosine, true[rows, columns], atol=1e-6)
    np.testing.assert_allclose(seen.squares[0], np.square(true).mean(axis=1)[rows], rtol=0.01)
    np.testing.assert_allclose(seen.squares[1], np.square(true).mean(axis=0)[columns], rtol=0.01)
    for k, pair in enumerate(zip(rows, columns, strict=True)):
        others = true.copy()
        others[pair] = -1
        assert seen.following[0][k] == pytest.approx(others[pair[0]].max(), abs=atol)
        assert seen.following[1][k] == pytest.approx(others[:, pair[1]].max(), abs=atol)


@pytest.mark.parametrize("near", [1, 16])
@pytest.mark.parametrize("share", [0.1, 0.9])
@pytest.mark.parametrize("m", [150, 170])
@pytest.mark.parametrize("kept", [True, False])
def test_a_null_world_sees_what_all_cosines_say(kept, m, share, near, monkeypatch):
    monkeypatch.setattr(replacing, "NEAREST", max(near, 2))
    if not kept:
        monkeypatch.setattr(pricing, "KEPT_BYTES", 0)
        monkeypatch.setattr(pricing, "BLOCK_BYTES", 1 << 15)
        monkeypatch.setattr(assignment, "WORTH_SENDING", 1)
    random = np.random.default_rng(m)
    a, b, null = (random.normal(size=(k, 20)).astype(np.float32) for k in (150, m, m))
    b[:80] = a[:80] + 0.4 * b[:80]
    costs = Factors.squared_distances(a, b).kept()
    rows, columns = np.arange(150), assign(costs).columns
    world = NullWorld(rows, columns, costs, None)
    check(world.pairs(), a, b, rows, columns, 1e-5 if kept else 2e-3)
    replaced = np.sort(random.choice(m, int(share * m), replace=False))
    found = {}

    def paired(*args, **options):
        found["columns"] = replacing.pair_again(*args, **options)
        return found["columns"]

    monkeypatch.setattr("mechatlas.analysis.matching.null_world.pair_again", paired)
    seen = world.chance_pairs(replaced, null[replaced])
    changed = b.copy()
    changed[replaced] = null[replaced]
    now = found["columns"]
    wrong = np.flatnonzero((now >= 0) & ((now != columns) | np.isin(now, replaced)))
    assert len(wrong) >= 0.8 * share * 150
    check(seen, a, changed, wrong, now[wrong], 2e-3)  # null latents are compared in bfloat16
