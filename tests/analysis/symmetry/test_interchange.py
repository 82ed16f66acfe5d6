import numpy as np
import pytest
import torch
from scipy import sparse

from mechatlas.activations.posing import places_of
from mechatlas.activations.sites import read_activations
from mechatlas.analysis.symmetry.interchange import (
    SAMPLES,
    PosedNetwork,
    TrialRows,
    draw_trials,
    interchange_p_values,
    intervene_on_poses,
    usable_elements,
)
from mechatlas.base import InputError, Site
from mechatlas.maths.actions import Rotate
from mechatlas.maths.named_groups import group
from tests.networks import turning

D4 = group("D4")
SITE = Site("seen")


class Pictures:
    """Smooth random images."""

    channels, side = 3, 11

    def __init__(self, n):
        random = np.random.default_rng(0)
        coarse = random.random((n, 3, 6, 6), np.float32)
        self.images = np.kron(coarse, np.ones((2, 2), np.float32))[:, :, :11, :11]

    def __len__(self):
        return len(self.images)

    def name(self, index):
        return str(index)

    def read(self, index):
        return self.images[index]

    def stack(self, samples):
        return torch.from_numpy(np.stack(samples))


def true_features():
    """Blocks of what the network sees, one feature for each coset, and their stabilizers."""
    blocks, stabilizers = [], []
    for kind in range(5):
        subgroup = [{0}, {0}, {0}, {0, 2}, set(range(8))][kind]
        for coset in D4.left_cosets(frozenset(subgroup)):
            block = np.zeros((8, 40), np.float32)
            for g in range(8):
                block[g, 8 * kind + D4.table[g, sorted(coset)]] = 1
            blocks.append(block)
            stabilizers.append(D4.conjugate(frozenset(subgroup), coset[0]))
    return np.array(blocks), stabilizers


@pytest.fixture(scope="module")
def world():
    network, samples, action = turning(), Pictures(60), Rotate(D4)
    posed = PosedNetwork(
        network, samples, action, SITE, Site(""),
        places_of(action, network, SITE, samples.stack([samples.read(0)])),
    )  # fmt: skip
    blocks, stabilizers = true_features()
    with torch.no_grad():
        maps = read_activations(network, torch.from_numpy(samples.images), [SITE])[SITE]
    kept = posed.places.kept
    x = maps.flatten(2).movedim(1, 2)[:, kept].flatten(0, 1).numpy()
    codes = sparse.csr_array(x @ np.linalg.pinv(blocks[:, 0]).clip(min=0))
    rows = TrialRows(
        np.repeat(np.arange(60), len(kept)),
        np.tile(kept.numpy(), 60),
        np.einsum("ni,igk->ngk", codes.toarray(), blocks),
    )
    return posed, blocks, stabilizers, codes, rows


def intervened(world, blocks, **changes):
    posed, _, stabilizers, codes, rows = world
    elements = usable_elements(posed.places, posed.action)
    trials = draw_trials(
        codes,
        rows.sample,
        np.arange(len(blocks)),
        stabilizers,
        elements,
        D4,
        n_features=len(blocks),
    )
    others = np.arange(len(blocks) - 1)
    return intervene_on_poses(
        PosedNetwork(**{**vars(posed), **changes}), trials, rows, blocks, stabilizers, others
    )  # fmt: skip


def test_features_of_a_network_that_sees_every_pose_alike_pass(world):
    effects = intervened(world, world[1])
    # One feature is unchanged by everything: it is the only one that cannot be swapped.
    assert effects.features.tolist() == list(range(28))
    assert effects.p_values.min() >= 1 / (1 + 28 * 8), "28 features with 8 null values each"
    assert (effects.q_values <= 0.05).mean() > 0.9
    assert (effects.pose_q_values <= 0.05).mean() > 0.9
    assert np.median(effects.alignment) > 0.3
    assert (
        np.median(effects.null_alignment)
        < np.median(effects.wrong_pose_alignment) + 0.1
        < np.median(effects.alignment)
    )
    # All features together make of a(I) just what the network sees of hI.
    assert effects.recovered_by_all == pytest.approx(1, abs=1e-4)
    assert np.median(effects.recovered) > 0 > np.median(effects.null_recovered)
    # Half-turns change nothing of kind 3, and nothing changes kind 4.
    assert effects.symmetric.tolist() == list(range(24, 29))
    np.testing.assert_allclose(effects.symmetric_change, 0, atol=1e-5)
    assert effects.change.min() > 0.3


def test_random_features_do_not_pass(world):
    random = np.random.default_rng(1)
    blocks = random.standard_normal(world[1].shape).astype(np.float32)
    blocks[:, 0] = world[1][:, 0]  # even if they are right where the input is as it is
    effects = intervened(world, blocks)
    assert (effects.q_values <= 0.05).sum() <= 1
    assert (effects.pose_q_values <= 0.05).sum() <= 1


def test_features_in_the_wrong_pose_do_not_pass(world):
    """The same blocks, those of each pose given to another."""
    wrong = world[1][:, [0, *np.roll(np.arange(1, 8), 3)]]
    assert (intervened(world, wrong).pose_q_values <= 0.05).mean() < 0.1


def test_every_trial_is_the_strongest_place_of_another_sample(world):
    posed, _, stabilizers, codes, rows = world
    elements = usable_elements(posed.places, posed.action)
    assert elements.tolist() == [False, *[True] * 7]
    eligible = np.array([3, 20, 25, 28])
    trials = draw_trials(
        codes, rows.sample, eligible, stabilizers, elements, D4, n_features=4, seed=1
    )
    dense = codes.toarray()
    for feature in eligible:
        for unchanged in (False, True):
            chosen = (trials.feature == feature) & (trials.unchanged == unchanged)
            within = (
                stabilizers[feature] - {0} if unchanged else set(range(8)) - stabilizers[feature]
            )
            assert chosen.sum() == (SAMPLES if within else 0)
            assert set(trials.element[chosen]) <= within
            samples = rows.sample[trials.row[chosen]]
            assert len(set(samples)) == len(samples)
            for row, code in zip(trials.row[chosen], trials.code[chosen], strict=True):
                strongest = dense[rows.sample == rows.sample[row], feature].max()
                assert code == pytest.approx(strongest)
    again = draw_trials(
        codes, rows.sample, eligible, stabilizers, elements, D4, n_features=4, seed=1
    )
    assert (again.element == trials.element).all()
    few = draw_trials(codes, rows.sample, eligible, stabilizers, elements, D4, n_features=2, seed=1)
    assert len(set(few.feature)) == 2


def test_a_site_that_is_not_downstream_is_refused(world):
    with pytest.raises(InputError, match="Nothing changes at posed if features are removed"):
        intervened(world, world[1], downstream=Site("posed"))


def test_answers_may_be_compared_at_any_site_downstream(world):
    effects = intervened(world, world[1], downstream=Site("after"))
    assert (effects.q_values <= 0.05).mean() > 0.9
    assert effects.recovered_by_all == pytest.approx(1, abs=1e-4)


def test_no_p_value_is_smaller_than_the_null_can_show():
    random = np.random.default_rng(0)
    null = random.standard_normal((50, 4))
    p = interchange_p_values(np.full(50, 1e9), null)
    np.testing.assert_allclose(p, 1 / (1 + null.size))
    assert (interchange_p_values(np.full(50, -1e9), null) == 1).all()
    assert np.isnan(interchange_p_values(np.full(50, np.nan), null)).all()


def test_p_values_of_alignments_that_are_like_the_null_are_valid():
    random = np.random.default_rng(0)
    everything = random.standard_normal((400, 9)) + random.standard_normal((400, 1))
    p = interchange_p_values(everything[:, 0], everything[:, 1:])
    assert p.min() >= 1 / (1 + 400 * 8)
    for level in (0.05, 0.2, 0.5):
        assert (p <= level).mean() == pytest.approx(level, abs=0.06)
