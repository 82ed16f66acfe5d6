"""Stimuli in all poses, and the tuning of features whose symmetries are known."""

import numpy as np
import pytest
import torch

from mechatlas.analysis.symmetry.stimuli import KINDS, draw_stimuli
from mechatlas.analysis.symmetry.tuning import (
    class_agreement,
    measure_tuning,
    pose_agreement,
    poses_of_elements,
)
from mechatlas.maths.actions import Rotate
from mechatlas.maths.named_groups import group

D4 = group("D4")
SIDE = 17


@pytest.fixture(scope="module")
def stimuli():
    return draw_stimuli(SIDE, ((SIDE - 1) / 2, (SIDE - 1) / 2), 8.0, 8)


def test_every_pose_is_the_image_posed(stimuli):
    action = Rotate(D4)
    elements = poses_of_elements(D4, 8)
    assert elements.tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    assert set(stimuli.kinds) == set(KINDS)
    for own, name in zip(stimuli.image_of, stimuli.names, strict=True):
        for start in (0, 1, 9):  # poses between the elements of D4, too
            image = torch.from_numpy(stimuli.images[own[start]])
            for g, pose in enumerate(elements):
                drawn = stimuli.images[own[stimuli.group.table[pose, start]]]
                np.testing.assert_allclose(
                    drawn, action(g, image[None])[0].numpy(), atol=1e-5, err_msg=name
                )


def test_elements_of_cyclic_groups_are_turns():
    assert poses_of_elements(group("C4"), 12).tolist() == [0, 3, 6, 9]


def filters_of(subgroups, random):
    """Kernels that are unchanged by the elements of a subgroup, one for each in turn."""
    action, kernels = Rotate(D4), []
    for subgroup in subgroups:
        kernel = torch.from_numpy(random.standard_normal((1, 3, SIDE, SIDE)))
        kernels.append(torch.cat([action(g, kernel) for g in sorted(subgroup)]).mean(dim=0))
    return torch.stack(kernels)


def responses_of(kernels, stimuli):
    images = torch.from_numpy(stimuli.images).double()
    codes = torch.einsum("kcyx,icyx->ki", kernels, images - 0.5).relu().numpy()
    return codes[:, stimuli.image_of]


def test_responses_have_the_symmetry_of_the_filter(stimuli):
    random = np.random.default_rng(0)
    half_turn, mirror, all_of_it, nothing = {0, 2}, {0, 4}, set(range(8)), {0}
    subgroups = [frozenset(h) for h in (half_turn, mirror, all_of_it, nothing) for _ in range(8)]
    responses = responses_of(filters_of(subgroups, random), stimuli)
    tuning = measure_tuning(responses, stimuli, poses_of_elements(D4, 8))
    assert tuning.responds.all()
    for similarity, subgroup in zip(tuning.similarity, subgroups, strict=True):
        assert similarity[sorted(subgroup)] == pytest.approx(1, abs=1e-4)
        assert (similarity[sorted(set(range(8)) - subgroup)] < 0.98).all()
    assert (tuning.low <= tuning.similarity + 1e-9).all()
    assert (tuning.high >= tuning.similarity - 1e-9).all()
    grades = ["exact"] * 24 + ["none"] * 8
    true = class_agreement(tuning, subgroups, grades)
    assert (true.n_claimed, true.n_none) == (24, 8)
    assert true.auc is not None
    assert true.p_value is not None
    assert true.auc > 0.99
    assert true.p_value < 0.01
    assert true.claimed == pytest.approx(1, abs=1e-4)
    shuffled = [subgroups[i] for i in random.permutation(32)]
    wrong = class_agreement(tuning, shuffled, ["exact" if len(h) > 1 else "none" for h in shuffled])
    assert wrong.auc is not None
    assert wrong.auc < true.auc - 0.2


def test_responses_follow_poses(stimuli):
    random = np.random.default_rng(0)
    references = filters_of([frozenset({0})] * 6, random)
    action = Rotate(D4)
    # A filter posed by g responds to gI as the filter itself does to I: blocks D_g^-1.
    poses = random.integers(1, 8, 6)
    posed = torch.stack(
        [action(int(g), k[None])[0] for g, k in zip(poses, references, strict=True)]
    )
    tuning = measure_tuning(
        responses_of(torch.cat([references, posed]), stimuli), stimuli, poses_of_elements(D4, 8)
    )
    own = np.concatenate([np.arange(6), np.arange(6)])
    right = pose_agreement(tuning, own, np.concatenate([np.zeros(6, int), poses]))
    assert (right.n, right.right) == (6, 6)
    assert right.similarity == pytest.approx(1, abs=1e-4)
    assert right.by_chance == pytest.approx(1 / 8, abs=0.05)
    assert right.similarity_by_chance is not None
    assert right.similarity_by_chance < 0.8
    wrong = pose_agreement(tuning, own, np.concatenate([np.zeros(6, int), 1 + poses % 7]))
    assert wrong.right == 0


def test_features_that_respond_to_nothing_take_no_part(stimuli):
    responses = np.zeros((3, *stimuli.image_of.shape))
    responses[1] = 2.0  # the same for all stimuli
    tuning = measure_tuning(responses, stimuli, poses_of_elements(D4, 8))
    assert not tuning.responds.any()
    agreed = class_agreement(tuning, [frozenset({0, 2})] * 3, ["exact", "none", "none"])
    assert (agreed.n_claimed, agreed.auc) == (0, None)
    assert pose_agreement(tuning, np.zeros(3, int), np.zeros(3, int)).n == 0
