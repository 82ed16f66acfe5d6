"""Features that say nothing are never symmetric, and change nothing for the others."""

import numpy as np
import pytest

from mechatlas.analysis.symmetry.classify import count_shuffled_discoveries, symmetry
from mechatlas.maths.named_groups import group
from tests.analysis.symmetry.planted import plant

D4 = group("D4")


@pytest.fixture(scope="module")
def measured():
    planted = plant(D4, [each.representative for each in D4.lattice().classes])
    return planted.measured(0.1)


def extra(kind, array, first):
    shape = (7, *array.shape[1:])
    if kind == "zero":
        return np.zeros(shape, array.dtype)
    if kind == "constant":
        return np.full(shape, 0.3, array.dtype)
    sizes = np.ones(7) if kind == "duplicated" else np.linspace(0.5, 3, 7)
    return (array[[first] * 7] * sizes[:, None, None]).astype(array.dtype)


@pytest.mark.parametrize("kind", ["zero", "constant", "duplicated", "duplicated at other lengths"])
@pytest.mark.parametrize("with_halves", [True, False])
def test_degenerate_features_change_nothing_for_the_others(measured, kind, with_halves):
    blocks, halves = measured
    n = len(blocks)
    alone = symmetry(blocks, D4, halves if with_halves else None)
    first = int(np.flatnonzero((alone.q_values <= 0.05) & alone.reliable)[0])
    more = np.concatenate([blocks, extra(kind, blocks, first)])
    both = np.stack([np.concatenate([half, extra(kind, half, first)]) for half in halves])
    beside = symmetry(more, D4, both if with_halves else None)
    assert alone.n_discoveries > 20
    others = np.delete(np.arange(n), first) if "duplicated" in kind else np.arange(n)
    for name in ("p_values", "q_values", "reliable", "classes", "poses", "references",
                 "similarity_to_reference", "stabilizer_function", "noise_ceiling"):  # fmt: skip
        np.testing.assert_array_equal(getattr(beside, name)[others], getattr(alone, name)[others])
    assert [beside.stabilizers[i] for i in others] == [alone.stabilizers[i] for i in others]
    assert beside.chance_similarity == alone.chance_similarity
    claims = [*range(n, n + 7), *([first] if "duplicated" in kind else [])]
    assert (beside.q_values[claims] > 0.05).all()
    assert not beside.reliable[claims].any()
    assert {beside.stabilizers[i] for i in claims} == {frozenset({D4.identity})}
    assert (np.bincount(beside.families)[beside.families[n:]] == 1).all()
    control = [count_shuffled_discoveries(h, D4) for h in (halves, both)]
    assert control[0] == control[1]


def test_nothing_is_symmetric_where_all_features_are_degenerate():
    for blocks in (np.ones((5, 8, 4)), np.zeros((5, 8, 4))):
        result = symmetry(blocks, D4)
        assert result.n_discoveries == 0
        assert not result.reliable.any()
