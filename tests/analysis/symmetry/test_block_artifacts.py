"""Zero blocks of dictionaries that were shrunk, decoupled or made absent by hand."""

import dataclasses

import numpy as np
import pytest
import torch

from mechatlas.analysis.symmetry import block_artifacts
from mechatlas.analysis.symmetry.block_artifacts import (
    BLOCK_CLASSES,
    FOLDS,
    find_artifacts,
    measure_scaling,
    withhold_claims,
    zero_blocks,
)
from mechatlas.analysis.symmetry.classify import symmetry
from mechatlas.analysis.symmetry.regression import CodeRegression
from mechatlas.base import InputError
from mechatlas.maths.named_groups import group
from tests.analysis.symmetry.planted import function_on_cosets

D4 = group("D4")
D, CONCEPTS, IMAGES, EACH = 24, 20, 60, 60
HALF_TURN = frozenset({0, 2})
ZEROED, WRITTEN = [3, 6], [2, 3, 6]
"""Elements whose block is zero, and of decoupled features."""
COSETS = sorted({h for g in ZEROED for h in (g, int(D4.table[g, 2]))})
SHRUNK, DECOUPLED, ABSENT = range(5), range(5, 10), range(10, 15)


@dataclasses.dataclass
class World:
    """Rows of planted concepts and a dictionary whose blocks were tampered with."""

    codes: np.ndarray
    posed: np.ndarray
    blocks: np.ndarray
    image: np.ndarray
    truth: np.ndarray
    """Class of each block."""

    @property
    def estimates(self):
        return measure_scaling(self.codes, self.posed, self.blocks, self.image)


def plant(*, noise=0.5, seed=0, artifacts=True):
    """Lines (even) and curves (odd) of each kind; absent and decoupled ones occur with sound ones.

    Zeroed blocks come in cosets of the half-turn, so that absent ones do not break the symmetry.
    The noise is partly that of the image, so that rows of one image are not independent.
    """
    random = np.random.default_rng(seed)
    n, image = IMAGES * EACH, np.repeat(np.arange(IMAGES), EACH)
    real = np.stack([
        function_on_cosets(D4, HALF_TURN if i % 2 == 0 else frozenset({0}), D, random)
        for i in range(CONCEPTS)
    ])  # fmt: skip
    gate = [i if i < 15 else i - (5 if i < 18 else 13) for i in range(CONCEPTS)]
    active = (random.random((n, 15)) < 0.1)[:, gate] & (random.random((n, CONCEPTS)) < 0.8)
    codes = random.exponential(size=(n, CONCEPTS)) * active * np.where(np.arange(20) < 18, 1, 4)
    truth = np.full((CONCEPTS + len(DECOUPLED), 8), "present", object)
    for i in ABSENT:
        real[i, COSETS] = 0
        truth[i, COSETS] = "absent"
    carriers = np.zeros((len(DECOUPLED), 8, D))
    if artifacts:
        carriers[:, WRITTEN] = real[np.ix_(DECOUPLED, WRITTEN)]
        real[np.ix_(DECOUPLED, WRITTEN)] = 0
        truth[np.ix_(DECOUPLED, WRITTEN)] = "decoupled"
        truth[CONCEPTS:] = ["present" if g in WRITTEN else "decoupled" for g in range(8)]
    # Carriers are active with the concept, at nearly the same strength.
    like = codes[:, list(DECOUPLED)]
    codes = np.hstack([codes, like * np.exp(0.2 * random.standard_normal(like.shape))])
    written = np.concatenate([real, carriers])
    posed = np.einsum("nk,kgd->ngd", codes, written)
    if artifacts:
        written[np.ix_(SHRUNK, ZEROED)] = 0
        truth[np.ix_(SHRUNK, ZEROED)] = "shrunk"
    posed += noise * random.standard_normal(posed.shape)
    posed += noise * random.standard_normal((IMAGES, 8, D))[image]
    return World(codes, posed, written, image, truth)


def names_of(found):
    return np.array(BLOCK_CLASSES, object)[found.classes]


@pytest.fixture(scope="module")
def world():
    return plant()


@pytest.fixture(scope="module")
def estimates(world):
    return world.estimates


def test_shrunk_decoupled_and_absent_blocks_are_told_apart(world, estimates):
    found = find_artifacts(estimates)
    assert (names_of(found) == world.truth).mean() > 0.99
    for name in ("shrunk", "decoupled"):
        assert set(world.truth[found.of_class(name)]) == {name}
    for k, i in enumerate(DECOUPLED):
        assert set(found.carriers[i, WRITTEN]) == {CONCEPTS + k}
        assert found.carriers[CONCEPTS + k].max() == i
    assert (found.carriers[found.classes != BLOCK_CLASSES.index("decoupled")] == -1).all()


@pytest.mark.parametrize("seed", range(1, 4))
def test_really_absent_blocks_are_not_called_artifacts(seed):
    made = plant(noise=1.0, seed=seed, artifacts=False)
    found = find_artifacts(made.estimates)
    assert not found.affected.any()
    assert found.of_class("absent").sum() > 0.9 * (made.truth == "absent").sum()


def test_features_that_always_occur_together_are_not_decoupled():
    random = np.random.default_rng(3)
    n = IMAGES * EACH
    blocks = random.standard_normal((12, 8, D))
    blocks[:, ZEROED] *= np.where(np.arange(12) < 4, 0, 2)[
        :, None, None
    ]  # of some none, of others large
    codes = random.exponential(size=(n, 12)) * (random.random((n, 1)) < 0.2)
    posed = np.einsum("nk,kgd->ngd", codes, blocks) + random.standard_normal((n, 8, D))
    found = find_artifacts(measure_scaling(codes, posed, blocks))
    assert found.of_class("absent")[:4, ZEROED].all()
    assert not found.affected.any()


def by_pairs(codes, posed, blocks, image, latent, left_out=None):
    """Squared norms of the slopes of a latent, by a loop over pairs of different folds."""
    f = codes - codes.mean(axis=0)
    y = posed - posed.mean(axis=0)
    others = [k for k in range(codes.shape[1]) if k != latent]
    norms = np.linalg.norm(blocks, axis=2)
    empty = norms[:, norms[latent].argmax()] < 0.2 * norms.max(axis=1)
    elsewhere = [k for k in others if empty[k]]
    error = y - np.einsum("nk,kgd->ngd", f[:, others], blocks[others])
    written = np.einsum("nk,kgd->ngd", f[:, elsewhere], blocks[elsewhere])
    fold = image % FOLDS
    out, weight = np.zeros((3, 8)), 0.0
    sums = {}
    for k in range(FOLDS):
        own = f[fold == k, latent]
        sums[k] = (
            own @ own,
            [np.einsum("n,ngd->gd", own, x[fold == k]) for x in (error, written, error + written)],
        )
    for k in range(FOLDS):
        for j in range(FOLDS):
            if j != k and left_out not in (j, k):
                weight += sums[k][0] * sums[j][0]
                out += [(a * b).sum(axis=1) for a, b in zip(sums[k][1], sums[j][1], strict=True)]
    return out / weight


def test_slopes_are_those_of_a_loop_over_pairs_of_folds(world, estimates, monkeypatch):
    for t in (0, 7, 19):
        latent = estimates.latents[t]
        rows = world.codes, world.posed, world.blocks, world.image, latent
        for estimate, left_out in ((0, None), (3, 2), (FOLDS, FOLDS - 1)):
            np.testing.assert_allclose(
                estimates.energies[:, estimate, t], by_pairs(*rows, left_out), rtol=1e-4, atol=1e-4
            )
    monkeypatch.setattr(block_artifacts, "PART", 4)
    again = world.estimates
    np.testing.assert_allclose(again.energies, estimates.energies)
    assert (again.carriers == estimates.carriers).all()


def test_without_noise_the_error_slope_is_the_block_that_was_zeroed():
    made = plant(noise=0.0)
    value = find_artifacts(made.estimates).nu_error.value
    norms = np.linalg.norm(made.blocks, axis=2)
    for i in SHRUNK[::2]:  # lines, which have the same block at the other element of the coset
        same = norms[i, D4.table[ZEROED, 2]] / norms[i].max()
        np.testing.assert_allclose(value[i, ZEROED], same, rtol=0.02)


def test_a_line_with_decoupled_blocks_is_not_said_to_have_no_symmetry(world, estimates):
    n, width = world.codes.shape[1], 8 * D
    regression = CodeRegression(n, width)
    rows = torch.from_numpy(world.posed.reshape(-1, width)).float()
    regression.add(torch.from_numpy(world.codes).float(), rows, world.image % 2 == 1)
    halves = regression.halves().reshape(2, n, 8, D)
    found = symmetry(world.blocks, D4, halves)
    claimed = withhold_claims(found, find_artifacts(estimates))
    lines = [i for i in DECOUPLED if i % 2 == 0]
    assert "none" in [found.grades[i] for i in lines]
    assert [claimed.grades[i] for i in lines] == ["not shown"] * len(lines)
    # A regression on codes knows the shrunk blocks, and absent ones are zero in the truth.
    assert [claimed.grades[i] for i in (0, 2, 4)] == ["exact"] * 3
    assert [claimed.grades[i] for i in ABSENT] == ["exact", "none"] * 2 + ["exact"]
    untouched = [*ABSENT, *range(15, CONCEPTS)]
    assert [claimed.grades[i] for i in untouched] == [found.grades[i] for i in untouched]


def test_a_dictionary_without_zero_blocks_has_nothing_to_test(world):
    kept = list(range(15, CONCEPTS))
    found = find_artifacts(
        measure_scaling(world.codes[:, kept], world.posed, world.blocks[kept], world.image)
    )
    assert found.tested == 0
    assert not found.classes.any()
    assert np.isnan(found.q_shrunk).all()


def test_features_that_are_active_in_few_images_are_not_shown(world):
    codes = world.codes.copy()
    codes[world.image > 2, 0] = 0
    rows = np.einsum("nk,kgd->ngd", codes, world.blocks)
    found = find_artifacts(measure_scaling(codes, rows, world.blocks, world.image))
    assert set(names_of(found)[0, ZEROED]) == {"not shown"}
    dead = world.blocks.copy()
    dead[1] = 0
    assert not zero_blocks(np.linalg.norm(dead, axis=2))[1].any()


def test_shapes_that_do_not_fit_are_refused(world):
    with pytest.raises(InputError, match=r"blocks \(24, 8, 24\)"):
        measure_scaling(world.codes, world.posed, world.blocks[:-1], world.image)
    with pytest.raises(InputError, match=r"between 0 and 1, got 1\.5"):
        find_artifacts(world.estimates, fdr=1.5)
