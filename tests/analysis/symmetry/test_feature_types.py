"""Types: clusters of features that are alike in their best poses, and none where there are none."""

import numpy as np
import pytest

from mechatlas.analysis.symmetry.feature_types import find_types
from mechatlas.maths.named_groups import group
from tests.analysis.symmetry.planted import adjusted_rand

D4 = group("D4")
SPECTRUM = 1 / np.sqrt(1 + 16 * np.arange(32) / 32)


def features_of_types(n_types, members, alone, deviation, random, of=D4):
    """Members are poses of a template that deviate from it; the other features have no type."""
    shape = (of.order, 32)
    blocks, labels = [], []
    for kind in range(n_types):
        template = random.standard_normal(shape) * SPECTRUM
        for _ in range(members):
            made = template + deviation * random.standard_normal(shape) * SPECTRUM
            blocks.append(made[of.table[:, random.integers(of.order)]])
            labels.append(kind)
    blocks += list(random.standard_normal((alone, *shape)) * SPECTRUM)
    return np.array(blocks), np.array(labels + list(range(1000, 1000 + alone)))


@pytest.mark.parametrize(("name", "deviation"), [("D4", 0.3), ("D4", 0.9), ("D16", 0.3)])
def test_types_are_found_though_members_deviate_and_differ_in_pose(name, deviation):
    random, of = np.random.default_rng(0), group(name)
    blocks, labels = features_of_types(6, 8, 60, deviation, random, of)
    found = find_types(blocks, of)
    alone = found.labels < 0
    clusters = np.where(alone, 100 + np.arange(len(blocks)), found.labels)
    assert adjusted_rand(clusters, labels) > 0.9
    assert found.sizes.tolist() == pytest.approx([8] * 6, abs=1)
    assert found.separation > found.null_separation.max()
    assert found.p_value < 0.05
    assert found.n_by_chance <= 0.05 * found.sizes.sum()
    if deviation == 0.3:  # D_g is most similar to the reference's block gh
        for i in np.flatnonzero(~alone):
            reference = blocks[found.references[i]][of.table[:, found.poses[i]]]
            cosine = (blocks[i] * reference).sum() / np.linalg.norm(blocks[i])
            assert cosine / np.linalg.norm(reference) > 0.8


@pytest.mark.parametrize("seed", range(3))
def test_features_without_types_have_none(seed):
    blocks = np.random.default_rng(seed).standard_normal((150, 8, 32)) * SPECTRUM
    found = find_types(blocks, D4, seed=seed)
    assert found.sizes.sum() <= 6
    assert (found.references[found.labels < 0] == np.flatnonzero(found.labels < 0)).all()


def test_features_that_cannot_be_reproduced_take_no_part():
    blocks, _ = features_of_types(3, 8, 40, 0.3, np.random.default_rng(1))
    reliability = np.ones(len(blocks))
    reliability[:4] = 0.2
    found = find_types(blocks, D4, reliability)
    assert (found.labels[:4] == -1).all()
    assert found.n_clustered == len(blocks) - 4
    none = find_types(blocks, D4, np.zeros(len(blocks)))
    assert none.n_clustered == 0
    assert not len(none.sizes)


def test_angles_between_the_rotations_of_a_group_are_interpolated():
    of, random = group("D16"), np.random.default_rng(3)
    steps = 16 * random.random(24)

    def turned(template, angle):
        """Blocks of a smooth function of the angle, turned by any number of steps."""
        halves = []
        for part, at in zip(template, (np.arange(16) + angle, np.arange(16) - angle), strict=True):
            phase = 2 * np.pi * at[:, None] / 16 * np.array([1, 2])
            halves.append(np.hstack([np.ones((16, 1)), np.cos(phase), np.sin(phase)]) @ part)
        return np.concatenate(halves)

    templates = random.standard_normal((4, 2, 5, 32))
    blocks = [turned(templates[i // 6], angle) for i, angle in enumerate(steps)]
    blocks += [turned(random.standard_normal((2, 5, 32)), 0.0) for _ in range(40)]
    found = find_types(np.array(blocks), of)
    assert found.sizes.tolist() == [6] * 4
    angle = (steps - steps[found.references[:24]]) % 16
    error = (found.poses[:24] + found.offsets[:24] - angle + 8) % 16 - 8
    assert np.abs(error).max() < 0.05  # of 22.5 degrees
    assert np.abs(found.offsets[:24]).max() > 0.3
    assert found.similarity[:24].min() > 0.995
    assert not find_types(np.array(blocks)[:, ::4], group("D4")).offsets.any()
