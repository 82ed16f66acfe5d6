"""Spaces of paired latents are alike beyond chance where they are, and only there."""

import numpy as np
import pytest
from scipy.stats import kstest, spearmanr

from mechatlas.analysis.matching import spaces
from mechatlas.analysis.matching.spaces import compare_spaces
from mechatlas.base import InputError


def rotated(rows, random, width, noise=0.0):
    """The same space seen by another model: other coordinates, another width."""
    turn = np.linalg.qr(random.standard_normal((width, width)))[0][: rows.shape[1]]
    return rows @ turn + noise * random.standard_normal((len(rows), width))


def test_a_rotation_into_another_width_is_the_same_space():
    random = np.random.default_rng(0)
    a = random.standard_normal((120, 12))
    order = random.permutation(120)
    columns = np.argsort(order)
    found = compare_spaces(a, rotated(a, random, 20)[order], columns)
    assert found.n == 120
    assert found.svcca.value == pytest.approx(1, abs=0.02)
    assert found.rsa.value == pytest.approx(1, abs=1e-6)
    assert found.svcca.p_value == found.rsa.p_value == 1 / (spaces.N_PAIRINGS + 1)
    assert found.svcca.expected < 0.35
    assert abs(found.rsa.expected) < 0.05


def test_rsa_is_the_rank_correlation_of_the_cosines():
    random = np.random.default_rng(1)
    a = random.standard_normal((40, 6))
    b = rotated(a, random, 6, noise=0.5)
    cosines = []
    for rows in (a, b):
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        cosines.append((unit @ unit.T)[np.triu_indices(40, 1)])
    found = compare_spaces(a, b, np.arange(40))
    assert found.rsa.value == pytest.approx(spearmanr(*cosines)[0], abs=1e-5)


def test_unrelated_spaces_have_uniform_p_values(monkeypatch):
    monkeypatch.setattr(spaces, "N_PAIRINGS", 39)
    p_values = {"svcca": [], "rsa": []}
    ties = np.random.default_rng(0).random(200) / 40
    for seed in range(200):
        random = np.random.default_rng([seed, 3])
        a, b = random.standard_normal((24, 5)), random.standard_normal((24, 7))
        found = compare_spaces(a, b, np.arange(24), seed=seed)
        p_values["svcca"].append(found.svcca.p_value)
        p_values["rsa"].append(found.rsa.p_value)
    for values in p_values.values():
        assert kstest(np.array(values) - ties, "uniform").pvalue > 0.01
        assert np.mean(np.array(values) <= 0.05) < 0.1


def test_latents_without_a_pair_take_no_part():
    random = np.random.default_rng(2)
    a = random.standard_normal((60, 6))
    b = np.concatenate([rotated(a[:40], random, 9), random.standard_normal((20, 9))])
    columns = np.where(np.arange(60) < 40, np.arange(60), -1)
    found = compare_spaces(a, b, columns)
    assert found.n == 40
    assert found.rsa.value == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (np.r_[np.arange(15), np.full(25, -1)], "takes 16 pairs or more, got 15"),
        (np.arange(39), "A pairing of 39 latents .* is not one of dictionaries with 40 and 40"),
        (np.arange(1, 41), "numbers up to 40 is not one of dictionaries with 40 and 40"),
    ],
)
def test_pairings_that_do_not_fit_are_refused(columns, message):
    a = np.random.default_rng(0).standard_normal((40, 4))
    with pytest.raises(InputError, match=message):
        compare_spaces(a, a, columns)
