"""Coset concentration and bi-equivariance against planted networks and brute force."""

import numpy as np
import pytest

from mechatlas.analysis.proofs.structure import bi_equivariance, coset_concentration
from mechatlas.maths.named_groups import group

from .planted import planted


@pytest.mark.parametrize("name", ["S4", "A5"])
def test_planted_circuits_are_bi_equivariant_and_concentrated_on_cosets(name):
    of = group(name)
    left, right, unembed = planted(of, noise=0.0, seed=1)
    assert bi_equivariance(left, right, unembed, of) == pytest.approx(1, abs=1e-6)
    for found in (coset_concentration(left, of, "left"), coset_concentration(right, of, "right")):
        assert (found.order > 1).all()
        assert found.concentration == pytest.approx(1, abs=1e-6)


def test_noise_lowers_both_and_random_networks_have_neither():
    of = group("S4")
    noisy = planted(of, noise=0.1, seed=1)
    assert 0.5 < bi_equivariance(*noisy, of) < 0.99
    assert 0.9 < coset_concentration(noisy[0], of, "left").concentration.min() < 0.999
    random = np.random.default_rng(0)
    left, right = random.normal(size=(2, 24, 40))
    assert bi_equivariance(left, right, random.normal(size=(40, 24)), of) < 0.1
    assert (coset_concentration(left, of, "left").order == 1).all()


def test_bi_equivariance_is_the_variance_of_means_over_orbits():
    of = group("D5")
    weights = planted(of, noise=0.2, seed=2)
    left, right, unembed = (w.astype(float) for w in weights)
    logits = np.maximum(left[:, None] + right, 0) @ unembed
    logits -= logits.mean(axis=2, keepdims=True)
    orbit_means = np.zeros_like(logits)
    x, y, z = np.indices(logits.shape)
    for g in range(of.order):
        for h in range(of.order):
            orbit_means += logits[of.table[g, x], of.table[y, h], of.table[of.table[g, z], h]]
    orbit_means /= of.order**2
    share = np.square(orbit_means).sum() / np.square(logits).sum()
    assert bi_equivariance(*weights, of) == pytest.approx(share, rel=1e-5)


def test_a_function_on_cosets_has_their_subgroup_and_a_constant_one_none():
    of = group("S4")
    cosets = of.left_cosets(of.closure([next(g for g in range(24) if of.table[g, g] == 0 and g)]))
    values, heights = np.zeros(24), np.random.default_rng(0).normal(size=len(cosets))
    for members, height in zip(cosets, heights, strict=True):
        values[members] = height
    found = coset_concentration(np.stack([values, np.ones(24)], axis=1), of, "right")
    assert found.order.tolist() == [len(cosets[0]), 1]
    assert found.concentration == pytest.approx([1, 0])
