import numpy as np
import pytest

from mechatlas.analysis.branches.specialization import BranchTest, branches
from mechatlas.analysis.branches.summary import (
    consistency,
    kernel_sizes,
    label_enrichment,
    svd_order,
)
from mechatlas.base import InputError
from tests.analysis.branches.planted import BRANCHES, null_atoms, placed, world

NAMES = ["1x1", "3x3", "5x5", "pool"]


def test_a_label_that_sits_in_a_branch_is_found_and_others_are_not():
    random = np.random.default_rng(0)
    home = random.integers(-1, 4, size=600)
    curve = (home == 2) & (random.random(600) < 0.5)
    labels = np.where(curve, "curve", np.where(random.random(600) < 0.3, "x", ""))
    labels[home == 2] = np.where(curve[home == 2], "curve", "")
    labels[(home == 2) & (random.random(600) < 0.15)] = "x"
    found = label_enrichment(home, NAMES, labels)
    assert (found[0].branch, found[0].label) == ("5x5", "curve")
    assert found[0].q_value < 1e-6
    assert found[0].both == np.sum((home == 2) & (labels == "curve"))
    assert found[0].total == 600
    shuffled = label_enrichment(random.permutation(home), NAMES, labels)
    assert all(one.q_value > 0.05 for one in shuffled)


def test_distills_counts_are_far_from_chance():
    # All 30 curve units of mixed3b, in 96 of 480 channels.
    home = np.repeat([0, 1], [96, 384])
    labels = ["curve"] * 30 + [""] * 66 + ["other"] * 384
    found = label_enrichment(home, ["5x5", "rest"], labels)
    assert found[0].p_value < 1e-20


def test_labels_must_be_as_many_as_features():
    with pytest.raises(InputError, match="3 labels for 4 features"):
        label_enrichment(np.zeros(4, dtype=int), NAMES, [1, 2, 3])


def pairs(n):
    return {"latent_a": np.arange(n), "latent_b": np.arange(n), "matched": np.ones(n, dtype=bool)}


def test_features_that_stay_agree_and_chance_is_what_frequencies_say():
    random = np.random.default_rng(0)
    a = random.choice(4, p=[0.1, 0.2, 0.4, 0.3], size=400)
    stay = random.random(400) < 0.6
    b = np.where(stay, a, random.choice(4, p=[0.1, 0.2, 0.4, 0.3], size=400))
    found = consistency(a, b, NAMES, NAMES, **pairs(400)).same_branch
    assert found.pairs == 400
    assert found.chance == pytest.approx(0.3, abs=0.03)
    assert (found.low or 1) < 0.6 + 0.4 * 0.3 < (found.high or 0)
    assert found.kappa == pytest.approx(0.6, abs=0.1)
    assert found.p_value == pytest.approx(1 / 2000)


def test_chance_agreement_has_uniform_p_values():
    p = []
    for seed in range(60):
        random = np.random.default_rng(seed)
        a, b = random.integers(0, 3, size=(2, 40))
        p.append(consistency(a, b, NAMES, NAMES, **pairs(40), seed=seed).same_branch.p_value)
    assert 0.35 < np.mean(p) < 0.75
    assert np.mean(np.array(p) <= 0.05) <= 0.12


def test_filter_size_alone_is_no_consistency_of_branches():
    # Features keep the size of their filter but not their branch: 1x1 and pool have equal kernels.
    random = np.random.default_rng(1)
    a = random.integers(0, 4, size=2000)
    swap = random.random(2000) < 0.5
    b = np.where(np.isin(a, [0, 3]) & swap, 3 - a, a)
    found = consistency(a, b, NAMES, NAMES, **pairs(2000))
    assert found.same_branch.p_value == pytest.approx(1 / 2000)
    fair = found.same_branch_of_equal_size
    assert fair.pairs == np.isin(a, [0, 3]).sum()
    assert (fair.p_value or 0) > 0.01
    assert fair.value == pytest.approx(fair.chance, abs=0.05)


def test_only_matched_and_specialized_pairs_count():
    a, b = np.array([0, 1, -1, 2]), np.array([0, 0, 1, 2])
    given = {**pairs(4), "matched": np.array([True, True, True, False])}
    found = consistency(a, b, NAMES, NAMES, **given)
    assert found.same_branch.pairs == 2
    none = consistency(np.full(4, -1), b, NAMES, NAMES, **given)
    assert none.same_branch.pairs == 0
    assert none.same_branch.chance is None
    with pytest.raises(InputError, match="0 to 3 of dictionary b, which has 2"):
        consistency(a, b[:2], NAMES, NAMES, **given)


def test_sizes_are_read_from_names():
    assert kernel_sizes(["1x1", "expand3x3", "5x5", "pool", "head3"]) == {
        "1x1": 1, "expand3x3": 3, "5x5": 5, "pool": 1, "head3": 0
    }  # fmt: skip


def test_the_svd_puts_units_of_one_kind_side_by_side():
    random = np.random.default_rng(0)
    kind_of_row, kind_of_column = np.arange(40) % 2, np.arange(30) % 2
    weights = random.normal(size=(40, 30)) * (1 + 3 * (kind_of_row[:, None] == kind_of_column))
    found = svd_order(weights)
    assert len(set(kind_of_row[found.rows[:18]])) == 1
    assert len(set(kind_of_column[found.columns[:13]])) == 1
    assert 0 < found.explained < 1
    assert svd_order(weights, component=0).explained > found.explained
    assert (svd_order(-weights).rows == found.rows).all()
    with pytest.raises(InputError, match="no component 30"):
        svd_order(weights, component=30)


def test_atoms_whose_channels_are_permuted_are_in_no_branch():
    at = world(uneven=0.4, scales=True, within=0.05)
    atoms = placed(null_atoms(at, 600), at, "5x5", 0.9)
    assert branches(atoms, BRANCHES, at.statistics).specialized().sum() > 500
    assert BranchTest(atoms, BRANCHES, at.statistics).permuted().specialized().sum() <= 3
    assert BranchTest(atoms, BRANCHES).permuted().specialized().sum() <= 3
