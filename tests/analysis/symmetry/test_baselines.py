import numpy as np
import pytest

from mechatlas.analysis.symmetry.baselines import PoseMapFit, PoseR2, baselines


def posed(n, seed):
    """Block 1 is a linear map of block 0 with noise, block 2 is block 0, block 3 is unrelated."""
    random = np.random.default_rng([seed, 1])
    turn = np.random.default_rng(0).standard_normal((6, 6)) / np.sqrt(6)
    own = 2 + random.standard_normal((n, 6))
    noise = random.standard_normal((n, 6))
    return np.stack([own, own @ turn + 0.5 * noise, own, random.standard_normal((n, 6))], axis=1)


def test_each_baseline_explains_what_it_can():
    held = posed(2000, 1)
    got = baselines(posed(4000, 0), held, reconstruction=held * 0 + held.mean(axis=0))
    explained = 1 - 0.25 * 6 / np.square(held[:, 1] - held[:, 1].mean(axis=0)).sum(axis=1).mean()
    np.testing.assert_allclose(got["linear"], [1, explained, 1, 0], atol=0.02)
    np.testing.assert_allclose(got["shuffled"], 0, atol=0.02)
    np.testing.assert_allclose(got["invariant"][[0, 2]], 1)
    assert got["invariant"][3] < -3
    assert got["dictionary"] == pytest.approx(np.zeros(4), abs=1e-9)


def test_linear_maps_are_those_of_least_squares():
    train = posed(500, 0)
    maps = PoseMapFit(4, 6, 0)
    for part in np.array_split(train.reshape(500, -1), 5):
        maps.add(part)
    x = train[:, 0] - train[:, 0].mean(axis=0)
    y = (train - train.mean(axis=0)).reshape(500, -1)
    wanted = np.linalg.lstsq(x, y, rcond=None)[0]
    np.testing.assert_allclose(maps.solve().linear, wanted, atol=3e-3)


def test_a_block_that_does_not_vary_has_no_r2():
    explained = PoseR2(2, 3)
    x = np.concatenate(
        [np.random.default_rng(0).standard_normal((50, 3)), np.ones((50, 3))], axis=1
    )
    explained.add(x, itself=x)
    r2 = explained.r2()["itself"]
    assert r2[0] == 1
    assert np.isnan(r2[1])
