"""Planted combinations of two features are found; unrelated features and copies are not claimed."""

import itertools

import numpy as np
import pytest
from scipy.sparse import csc_array

from mechatlas.analysis.matching.boolean import OPERATIONS, boolean_features
from mechatlas.analysis.matching.held_out import PairedCodes
from mechatlas.base import InputError

ROWS, PER_SAMPLE = 4000, 4
SAMPLES = np.repeat(np.arange(ROWS // PER_SAMPLE), PER_SAMPLE)


def firing(random, n, rate=0.1):
    """Features of which each fires in some samples only, on most rows of these."""
    in_sample = random.random((ROWS // PER_SAMPLE, n)) < rate
    return np.repeat(in_sample, PER_SAMPLE, axis=0) & (random.random((ROWS, n)) < 0.8)


def codes(a, b):
    return PairedCodes(csc_array(a.astype(np.float32)), csc_array(b.astype(np.float32)))


def flipped(random, x, share):
    """The same with a share of wrong rows, relative to those where it fires."""
    lost, new = (random.random(x.shape) < each for each in (share, share * x.mean()))
    return (x & ~lost) | new


def test_planted_combinations_are_recovered():
    random = np.random.default_rng(0)
    a = firing(random, 40)
    pairs = random.permutation(40).reshape(-1, 2)[:15]
    ways = [np.logical_or, np.logical_and, lambda x, y: x & ~y]
    # Two features rarely fire together by chance: let some join another.
    for k, (i, j) in enumerate(pairs):
        if k % 3:
            a[:, j] |= a[:, i] & np.repeat(random.random(ROWS // 4) < 0.5, 4)
    b = np.stack([ways[k % 3](a[:, i], a[:, j]) for k, (i, j) in enumerate(pairs)], axis=1)
    found = boolean_features(codes(a, flipped(random, b, 0.05)), SAMPLES)
    assert found.significant.all()
    for k, (i, j) in enumerate(pairs):
        assert {found.first[k], found.second[k]} == {i, j}
        assert OPERATIONS[found.operation[k]] == OPERATIONS[k % 3]
    assert (found.error < 0.3).all()
    assert (found.error < found.single_error).all()
    assert "15 of 15 latents are better described by two" in found.summary()


def test_the_search_is_that_of_all_operations_with_the_nearest():
    random = np.random.default_rng(1)
    a, b = random.random((60, 7)) < 0.4, random.random((60, 5)) < 0.3
    samples = np.arange(60)
    found = boolean_features(codes(a, b), samples, seed=3)
    chosen = np.random.default_rng([3, 29]).permutation(60) < 30
    x, y = a[chosen], b[chosen]
    for k in range(5):
        both, either = (x & y[:, [k]]).sum(axis=0), (x | y[:, [k]]).sum(axis=0)
        near = np.argsort(-both / either, kind="stable")[:4]
        wrong = [
            (way(x[:, i], x[:, j]) != y[:, k]).sum()
            for i, j in itertools.product(near, range(7)) if i != j
            for way in (np.logical_or, np.logical_and, lambda u, v: u & ~v)
        ]  # fmt: skip
        i, j = x[:, found.first[k]], x[:, found.second[k]]
        ours = (i | j, i & j, i & ~j)[found.operation[k]]
        assert (ours != y[:, k]).sum() == min(wrong)


@pytest.mark.parametrize("kind", ["unrelated", "copies", "halves"])
def test_what_is_no_combination_is_not_claimed(kind):
    claimed = 0
    for seed in range(8):
        random = np.random.default_rng([seed, 7])
        a = firing(random, 50)
        b = {
            "unrelated": lambda a=a, r=random: firing(r, 50),
            "copies": lambda a=a, r=random: flipped(r, a, 0.3),
            # As often as not where another one fires: neither better nor worse.
            "halves": lambda a=a, r=random: a | (np.roll(a, 1, axis=1) & (
                np.repeat(r.random((ROWS // 4, 50)) < 0.5, 4, axis=0))),
        }[kind]()  # fmt: skip
        claimed += int(boolean_features(codes(a, b), SAMPLES).significant.sum())
    assert claimed <= 0.05 * 8 * 50


def test_a_choice_among_many_is_no_evidence_for_itself():
    random = np.random.default_rng(5)
    a = random.random((400, 60)) < 0.2
    b = a | (random.random((400, 60)) < 0.5)  # each other latent is right as often as wrong
    p_values = boolean_features(codes(a, b)).p_value
    assert np.mean(p_values <= 0.05) <= 0.1


def test_a_combination_that_hardly_fires_is_not_claimed_for_that():
    random = np.random.default_rng(6)
    a = random.random((20000, 2)) < 0.2
    b = a[:, [0]] & (random.random((20000, 1)) < np.where(a[:, [1]], 0.65, 0.3))
    found = boolean_features(codes(a, b))
    assert OPERATIONS[found.operation[0]] == "and"
    assert found.error[0] > found.single_error[0]
    assert not found.significant.any()


def test_latents_that_never_fire_have_no_combination():
    a, b = np.zeros((20, 3), bool), np.zeros((20, 2), bool)
    a[::2, 0] = a[::3, 1] = b[::2, 0] = True
    found = boolean_features(codes(a, b))
    assert found.first[1] == -1
    assert found.q_values[1] == 1
    assert "no combination of two is a claim" in found.summary()
    with pytest.raises(InputError, match="20 rows take as many numbers of samples"):
        boolean_features(codes(a, b), np.arange(19))
