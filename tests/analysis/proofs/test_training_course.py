"""Irreps, circuits and bounds over the course of a training."""

import numpy as np
import pytest

from mechatlas.analysis.proofs.group_training import GroupTrainingConfig, train_group_nets
from mechatlas.analysis.proofs.prove import prove
from mechatlas.analysis.proofs.training_course import PURE, TrainingCourse, follow_training
from mechatlas.base import InputError
from mechatlas.maths.named_groups import group


def test_the_course_of_a_training_ends_with_the_irreps_of_the_proof():
    s4 = group("S4")
    settings = GroupTrainingConfig(steps=1200, batch_size=256, n_checkpoints=5)
    snapshots = {}

    def keep(step, nets):
        [snapshots[step]] = nets

    [weights] = train_group_nets(np.asarray(s4.table), settings, on_checkpoint=keep)
    assert list(snapshots) == settings.checkpoints() == [20, 56, 155, 431, 1200]
    for kept, end in zip(snapshots[1200], weights, strict=True):
        assert np.array_equal(kept, end)
    course = follow_training(snapshots, s4)
    bound = prove(*weights, s4)
    of, shares = bound.directions.irrep, bound.directions.shares
    pure = (shares.min(axis=0) >= PURE) & (of >= 0)
    assert course.neurons[-1].tolist() == [(of[pure] == k).sum() for k in range(len(course.irreps))]
    assert course.bound[-1] == bound.accuracy_bound > 0.95
    assert course.accuracy[-1] == 1
    assert (course.bound <= course.accuracy).all()
    np.testing.assert_allclose(course.energy.sum(axis=1), 1)
    # The irreps of the neurons have the energy; at first it is spread as dimension squared.
    used = np.unique(of[of >= 0])
    assert course.energy[-1, used].sum() > 0.95
    flat = np.array([r.dimension**2 for r in s4.irreps()[1:]]) / 23
    np.testing.assert_allclose(course.energy[0, 1:], flat, atol=0.1)
    assert course.neurons[0].sum() < course.neurons[-1].sum()
    assert course.learned_at()
    assert set(course.learned_at().values()) <= set(snapshots)


def test_an_irrep_that_is_lost_again_is_learned_only_when_it_stays():
    neurons = np.array([[0, 4, 0], [0, 0, 5], [0, 2, 9], [0, 4, 9]])
    flat, none = np.zeros(4), np.zeros(4, int)
    course = TrainingCourse(
        np.array([1, 2, 3, 4]), ("1a", "2a", "3a"), neurons / 10, neurons, none, flat, flat, 9
    )
    assert course.learned_at() == {"3a": 2, "2a": 3}


def test_a_course_needs_snapshots():
    with pytest.raises(InputError, match="snapshots must have the weights at one step or more"):
        follow_training({}, group("C3"))
