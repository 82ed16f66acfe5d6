"""Stabilizers, families and poses of features for which they are known."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mechatlas
from mechatlas.analysis.symmetry.class_names import NOT_SHOWN, name_classes
from mechatlas.analysis.symmetry.classify import (
    count_shuffled_discoveries,
    shuffle_pairing,
    symmetry,
)
from mechatlas.analysis.symmetry.shift_evidence import (
    common_direction,
    evidence_from_halves,
    remove_direction,
)
from mechatlas.base import InputError, NonFiniteError
from mechatlas.maths.groups import Group
from mechatlas.maths.irreps import energies
from mechatlas.maths.named_groups import group
from tests.analysis.symmetry.planted import NOISE, function_on_cosets, plant, score

D4 = group("D4")
D16 = group("D16")
SUBGROUPS = {
    "D4": (D4, [each.representative for each in D4.lattice().classes]),
    "D16": (D16, [each.representative for each in D16.lattice().classes if each.order <= 8]),
}


@pytest.mark.parametrize("level", ["low", "middle"])
@pytest.mark.parametrize("name", SUBGROUPS)
@pytest.mark.parametrize("mixture", [{}, {"overlap": 0.5}, {"common": 2.0}])
def test_planted_stabilizers_families_and_poses_are_found(name, level, mixture):
    g, subgroups = SUBGROUPS[name]
    planted = plant(g, subgroups, **mixture)
    symmetries = symmetry(*_in(planted, NOISE[level]))
    scores = score(planted, symmetries)
    assert scores["f1"] >= 0.95
    assert scores["fdr"] <= 0.05
    assert scores["ari"] >= 0.9
    assert scores["poses"] >= 0.95
    assert scores["posed"] >= 0.7 * (~planted.decoy).sum()


def _in(planted, noise, **how):
    blocks, halves = planted.measured(noise, **how)
    return blocks, planted.group, halves


@pytest.mark.parametrize("name", SUBGROUPS)
def test_noise_makes_features_unreliable_and_no_claim_false(name):
    g, subgroups = SUBGROUPS[name]
    claimed, false = 0, 0
    for seed in range(4):
        planted = plant(g, subgroups, overlap=0.4, seed=seed)
        scores = score(planted, symmetry(*_in(planted, NOISE["high"], seed=seed, uneven=0.5)))
        claimed += scores["claimed"]
        false += scores["fdr"] * scores["claimed"]
        assert scores["reliable"] < 0.9
    assert false <= 0.05 * max(claimed, 20)


def test_nothing_is_found_where_the_pairing_is_broken():
    planted = plant(D4, SUBGROUPS["D4"][1])
    blocks, halves = planted.measured(NOISE["low"])
    broken = symmetry(shuffle_pairing(blocks, D4), D4, [shuffle_pairing(h, D4) for h in halves])
    assert broken.n_discoveries == 0
    assert len(set(broken.families)) == len(blocks)


def test_nothing_is_found_in_random_blocks():
    random = np.random.default_rng(0)
    blocks, *halves = random.standard_normal((3, 200, 8, 16))
    assert symmetry(blocks, D4).n_discoveries == 0
    noise = symmetry(blocks, D4, halves)
    assert noise.n_discoveries == 0
    assert noise.names.count(NOT_SHOWN) >= 190
    exact = symmetry(blocks, D4, (blocks, blocks))
    assert exact.n_discoveries == 0
    assert exact.reliable.all()


@given(st.sampled_from(["C6", "D3", "Q8", "C2xC4", "A4", "S4", "D1", "C1"]), st.integers(0, 99))
@settings(max_examples=20)
def test_every_subgroup_of_any_group_is_told_exactly(name, seed):
    g = group(name)
    random = np.random.default_rng(seed)
    # Another order of the elements: nothing may rest on the identity being 0.
    g = g.relabel(random.permutation(g.order))
    subgroups = list(g.subgroups())
    blocks = np.stack([function_on_cosets(g, h, 40, random) for h in subgroups])
    halves = blocks + 0.05 * random.standard_normal((2, *blocks.shape))
    symmetries = symmetry(blocks, g, halves)
    assert list(symmetries.stabilizers) == subgroups
    assert symmetries.reliable.all()
    np.testing.assert_array_equal(symmetries.families, np.arange(len(subgroups)))


@given(st.integers(0, 99))
@settings(max_examples=10)
def test_another_pose_has_the_conjugate_stabilizer(seed):
    random = np.random.default_rng(seed)
    g = group("D6")
    subgroups = g.subgroups()
    subgroup = subgroups[random.integers(1, len(subgroups) - 1)]
    template = function_on_cosets(g, subgroup, 30, random)
    blocks = np.stack([template[g.table[:, h]] for h in range(g.order)])
    halves = blocks + 0.1 * random.standard_normal((2, *blocks.shape))
    symmetries = symmetry(halves.mean(axis=0), g, halves)
    assert symmetries.stabilizers == tuple(g.conjugate(subgroup, h) for h in range(g.order))
    assert len(set(symmetries.families)) == 1
    reference = blocks[symmetries.references[0]]
    for i, pose in enumerate(symmetries.poses):
        np.testing.assert_allclose(blocks[i], reference[g.table[:, pose]])
        assert pose == min(g.table[pose, list(symmetries.stabilizers[symmetries.references[i]])])


def test_a_feature_that_is_nearly_symmetric_is_not_called_symmetric():
    random = np.random.default_rng(0)
    line = [function_on_cosets(D4, {0, 2}, 64, random) for _ in range(30)]
    other = [function_on_cosets(D4, {0}, 64, random) for _ in range(30)]
    blocks = np.sqrt(0.85) * np.array(line) + np.sqrt(0.15) * np.array(other)
    halves = blocks + 0.1 * random.standard_normal((2, *blocks.shape))
    symmetries = symmetry(halves.mean(axis=0), D4, halves)
    assert symmetries.n_discoveries == 0
    assert symmetries.reliable.all()
    assert symmetries.stabilizer_function[:, 2] == pytest.approx(0.85, abs=0.05)


def test_features_are_graded_and_their_likeness_has_its_error():
    random = np.random.default_rng(1)
    line, other = (
        np.array([function_on_cosets(D4, own, 64, random) for _ in range(40)])
        for own in ({0, 2}, {0})
    )
    nearly, barely = (
        np.sqrt(share) * line[10:20] + np.sqrt(1 - share) * other[10:20] for share in (0.85, 0.71)
    )
    blocks = np.concatenate([line[:10], nearly, barely, other[:10]])
    halves = blocks + 0.2 * random.standard_normal((2, *blocks.shape))
    found, truth = (
        symmetry(np.mean(each, axis=0), D4, each) for each in (halves, [blocks, blocks])
    )
    assert found.grades[:20] + found.grades[30:] == (
        ["exact"] * 10 + ["approximate"] * 10 + ["none"] * 10
    )
    assert found.grades[20:30].count("not shown") >= 5
    assert sum(found.grade_counts.values()) == 40
    assert found.n_discoveries == found.grade_counts["exact"] == 10
    assert found.class_counts["approximately half-turn (line-like)"] >= 10
    value, error = found.likeness()
    deviation = (value - truth.likeness()[0])[:, 1:] / error[:, 1:]
    assert np.abs(deviation).max() < 4.5
    assert (np.abs(deviation) < 1.96).mean() > 0.93
    at = found.group.lattice().class_of(frozenset({0, 2}))
    assert value[10:20, at] == pytest.approx(0.85, abs=0.06)
    # A claim of a feature that the halves do not agree on is no discovery.
    doubted = dataclasses.replace(found, reliable=np.arange(40) >= 4)
    assert doubted.n_discoveries == 6
    assert doubted.grades[:4] == ["approximate"] * 4


def test_weak_features_are_not_reliable_whatever_the_others_are():
    planted = plant(D4, SUBGROUPS["D4"][1])
    blocks, halves = planted.measured(NOISE["low"])
    random = np.random.default_rng(1)
    weak = np.arange(0, len(blocks), 5)
    halves[:, weak] = random.standard_normal((2, len(weak), 8, 32))
    halves[:, weak[0]] = 0  # a dead latent
    symmetries = symmetry(halves.mean(axis=0), D4, halves)
    assert not symmetries.reliable[weak].any()
    assert np.delete(symmetries.reliable, weak).all()
    assert score(planted, symmetries)["fdr"] == 0


def test_the_similarity_has_no_bias_and_its_error_is_right():
    random = np.random.default_rng(0)
    template = function_on_cosets(D4, {0, 4}, 24, random)
    template -= template.mean(axis=0)  # all features have it: it would count as common
    spread = 0.3 * np.exp(random.standard_normal(24))
    noise = spread * random.standard_normal((2, 400, 8, 24))
    symmetries = symmetry(template + noise.mean(axis=0), D4, template + noise)
    true = [np.sum(template[D4.table[:, h]] * template) / np.sum(template**2) for h in range(8)]
    got = symmetries.stabilizer_function.mean(axis=0)
    assert got == pytest.approx(np.array(true), abs=0.05)
    spread_seen = symmetries.stabilizer_function[:, 1:].std(axis=0)
    assert np.median(symmetries.standard_errors[:, 1:], axis=0) == pytest.approx(
        spread_seen, rel=0.3
    )


def test_p_values_are_uniform_at_the_edge_of_the_null():
    random = np.random.default_rng(0)
    even = [function_on_cosets(D4, {0, 2}, 50, random) for _ in range(300)]
    odd = [b - b[D4.table[:, 2]] for b in random.standard_normal((300, 8, 50))]
    odd = [b / np.sqrt(np.square(b).mean()) for b in odd]
    share = (1 + 0.5**0.5) / 2  # s(half-turn) is share - (1 - share)
    blocks = np.sqrt(share) * np.array(even) + np.sqrt(1 - share) * np.array(odd)
    halves = blocks + 1.0 * random.standard_normal((2, *blocks.shape))
    p = evidence_from_halves(halves[0], halves[1], D4).p_support[:, 2]
    for level in (0.05, 0.2, 0.5):
        assert (p <= level).mean() == pytest.approx(level, abs=0.08)


def test_noise_that_channels_share_does_not_make_claims():
    random = np.random.default_rng(0)
    blocks = random.standard_normal((300, 8, 32))
    together = random.standard_normal((8, 32, 4))  # the noise lies in four directions
    noise = np.einsum("hnk,gdk->hngd", random.standard_normal((2, 300, 4)), together)
    halves = blocks + noise
    symmetries = symmetry(halves.mean(axis=0), D4, halves)
    assert symmetries.variance_inflation > 3
    assert symmetries.n_discoveries == 0


def test_without_halves_the_answer_says_what_is_missing():
    planted = plant(D4, SUBGROUPS["D4"][1])
    blocks, _ = planted.measured(NOISE["middle"])
    symmetries = mechatlas.symmetry(torch.from_numpy(blocks), D4)
    scores = score(planted, symmetries)
    assert scores["f1"] >= 0.9
    assert scores["fdr"] <= 0.05
    assert scores["ari"] >= 0.9
    assert "No halves" in symmetries.missing
    assert np.isnan(symmetries.noise_ceiling).all()


def test_the_same_call_gives_the_same_answer():
    planted = plant(D4, SUBGROUPS["D4"][1])
    a, b = (symmetry(*_in(planted, NOISE["middle"])) for _ in range(2))
    for name in ("q_values", "families", "poses", "stabilizer_function", "spectrum"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_classes_have_names_that_a_person_understands():
    symmetries = symmetry(np.ones((3, 8, 2)), D4)
    assert symmetries.class_names == (
        "none (curve-like)", "half-turn (line-like)", "mirror only: s", "mirror only: r s",
        "quarter-turn", "half-turn and mirror: s", "half-turn and mirror: r s", "invariant",
    )  # fmt: skip
    assert "eighth-turn and mirror: s" in symmetry(np.ones((1, 32, 2)), D16).class_names
    assert symmetry(np.ones((1, 24, 2)), group("S4")).class_names[-1] == "invariant"
    unnamed = Group(group("C2xC2").table)
    assert symmetry(np.ones((1, 4, 2)), unnamed).class_names[:2] == ("none", "C2: 1")


@pytest.mark.parametrize("name", ["D4", "D12", "Q8", "C2xC4", "C2xC2xC2", "S4", "D4xC2", "A5"])
@pytest.mark.parametrize("rotations", [True, False])
def test_no_two_classes_are_called_the_same(name, rotations):
    g = group(name)
    names = name_classes(g, acts_by_rotation=rotations)
    assert len(set(names)) == len(names) == len(g.lattice().classes)
    if name == "Q8":
        assert names == ("none", "C2", "C4: r", "C4: s", "C4: r s", "invariant")


def test_the_spectrum_of_a_feature_is_that_of_its_blocks():
    random = np.random.default_rng(0)
    blocks = random.standard_normal((5, 32, 12))
    symmetries = symmetry(blocks, D16, (blocks, blocks))
    centered = remove_direction(blocks, common_direction(blocks))
    shares = energies(centered.transpose(0, 2, 1), D16.irreps()).sum(axis=1)
    np.testing.assert_allclose(symmetries.spectrum, shares / shares.sum(axis=1, keepdims=True))


def test_bad_blocks_are_refused_in_one_sentence():
    with pytest.raises(InputError, match=r"\(n_features, 8, d\).*got \(3, 7, 2\)"):
        symmetry(np.ones((3, 7, 2)), D4)
    with pytest.raises(InputError, match="two estimates"):
        symmetry(np.ones((3, 8, 2)), D4, np.ones((3, 3, 8, 2)))
    with pytest.raises(InputError, match="Each half"):
        symmetry(np.ones((3, 8, 2)), D4, np.ones((2, 3, 8, 1)))
    bad = np.ones((3, 8, 2))
    bad[1, 5, 0] = np.nan
    with pytest.raises(NonFiniteError, match=r"feature 1 for element 5 \(r s\)"):
        symmetry(bad, D4)


def test_features_that_are_almost_poses_join_a_family_and_overlapping_families_stay_apart():
    random = np.random.default_rng(0)
    template = function_on_cosets(D4, {0}, 64, random)
    exact = [template[D4.table[:, h]] for h in (0, 3, 5)]
    other = [function_on_cosets(D4, {0}, 64, random) for _ in range(4)]
    # Two are most like the family, though surely not its poses; two are unlike it.
    almost = [0.9 * exact[0] + 0.4359 * other[0], 0.9 * exact[1] + 0.4359 * other[1]]
    blocks = np.array([*exact, *almost, 0.6 * exact[2] + 0.8 * other[2], other[3]])
    halves = blocks + 0.1 * random.standard_normal((2, *blocks.shape))
    symmetries = symmetry(halves.mean(axis=0), D4, halves)
    assert symmetries.families[:5].tolist() == [0] * 5
    assert symmetries.families[5] != symmetries.families[6]
    assert 0 not in symmetries.families[5:]
    similarity = symmetries.similarity_to_reference
    assert similarity[3:5] == pytest.approx(0.9, abs=0.1)


def test_superposed_features_have_what_both_parts_have():
    random = np.random.default_rng(0)
    _, subgroups = SUBGROUPS["D4"]
    blocks = []
    for _ in range(80):
        a, b = (subgroups[random.integers(len(subgroups))] for _ in range(2))
        first, other = (function_on_cosets(D4, h, 48, random) for h in (a, b))
        blocks.append(first + 0.6 * other[D4.table[:, random.integers(8)]])
    true = [
        frozenset(h for h in range(8) if np.allclose(block[D4.table[:, h]], block))
        for block in blocks
    ]
    halves = np.array(blocks) + 0.2 * random.standard_normal((2, len(blocks), 8, 48))
    symmetries = symmetry(halves.mean(axis=0), D4, halves)
    agree = [a == b for a, b in zip(symmetries.stabilizers, true, strict=True)]
    assert np.mean(agree) >= 0.95
    claimed = np.flatnonzero(symmetries.q_values <= 0.05)
    assert np.mean([not symmetries.stabilizers[i] <= true[i] for i in claimed]) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("level", ["low", "middle"])
def test_planted_features_at_the_width_of_a_real_layer(level):
    g, subgroups = SUBGROUPS["D16"]
    planted = plant(g, subgroups, d=480, families_each=6, members=12, decoys=200, overlap=0.5)
    blocks, halves = planted.measured(NOISE[level], uneven=0.5)
    scores = score(planted, symmetry(blocks, g, halves))
    assert scores["f1"] >= 0.95
    assert scores["fdr"] <= 0.05
    assert scores["ari"] >= 0.9
    assert scores["poses"] >= 0.95
    assert count_shuffled_discoveries(halves, g) == 0


@pytest.mark.slow
def test_the_false_discovery_rate_holds_where_features_are_nearly_symmetric():
    """Decoys at the edge: half-turns that leave just half of each block explained."""
    random = np.random.default_rng(0)
    claimed, false = 0, 0
    share = (1 + 0.5**0.5) / 2
    for _ in range(20):
        even = [function_on_cosets(D4, {0, 2}, 40, random) for _ in range(150)]
        odd = [b - b[D4.table[:, 2]] for b in random.standard_normal((100, 8, 40))]
        edge = np.sqrt(share) * np.array(even[:100]) + np.sqrt(1 - share) * np.array(
            [b / np.sqrt(np.square(b).mean()) for b in odd]
        )
        blocks = np.concatenate([edge, even[100:]])
        halves = blocks + 0.8 * random.standard_normal((2, *blocks.shape))
        symmetries = symmetry(halves.mean(axis=0), D4, halves)
        stands = symmetries.q_values <= 0.05
        claimed += stands.sum()
        false += stands[:100].sum()
    assert claimed > 500
    assert false / claimed <= 0.05


def test_a_result_prints_its_finding_with_the_evidence_and_keeps_old_spellings():
    planted = plant(D4, SUBGROUPS["D4"][1])
    blocks, halves = planted.measured(NOISE["low"])
    symmetries = mechatlas.symmetry(blocks.tolist(), D4, torch.from_numpy(halves))
    lines = repr(symmetries).splitlines()
    assert len(lines) <= 6
    assert lines[0] == (
        f"Symmetry: {symmetries.n_discoveries} of {len(blocks)} features have a symmetry under D4 "
        "(false discovery rate 5%)"
    )
    assert "median noise ceiling 0.9" in lines[-1]
    assert sum(symmetries.class_counts.values()) == len(blocks)
    with pytest.warns(DeprecationWarning, match="Symmetry.stabilizers"):
        assert symmetries.stabilisers is symmetries.stabilizers  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.warns(match=r"symmetry\(alike=\)"), pytest.warns(match=r"symmetry\(fdr=\)"):
        old = mechatlas.symmetry(blocks, D4, halves, rate=0.1, alike=0.9)  # pyright: ignore
    assert (old.fdr, old.equality_threshold) == (0.1, 0.9)
    assert "noise ceiling unknown" in repr(symmetry(blocks, D4))
