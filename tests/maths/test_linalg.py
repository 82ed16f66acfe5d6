"""Streams of rows: whole and in parts, exact counts, ranks with their gap, blocks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechatlas.maths.linalg import Firing, Moments, cut, parts_of, rank_of, relu_pullback, spectral

seeds = st.integers(0, 10_000)


def rows(seed, n=200, d=7, dtype=torch.float32, shift=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, generator=generator) + shift * torch.arange(d)).to(dtype)


@given(seeds, st.integers(0, 200))
@settings(max_examples=30)
def test_a_stream_goes_on_from_its_state_and_equals_the_whole(seed, where):
    x = rows(seed)
    whole, left = Moments(7), Moments(7)
    whole.add(x)
    left.add(x[:where])
    left = Moments.from_state(left.state())
    left.add(x[where:])
    assert left.n == whole.n == 200
    np.testing.assert_allclose(left.mean, whole.mean, rtol=1e-12)
    scale = np.abs(whole.covariance).max()
    assert np.abs(left.covariance - whole.covariance).max() <= 1e-12 * scale
    np.testing.assert_allclose(whole.covariance, np.cov(x.double().T, bias=True), rtol=1e-10)
    f_whole, f_left = Firing(7), Firing(7)
    f_whole.add(x > 9)
    f_left.add(x[:where] > 9)
    f_left = Firing.from_state(f_left.state())
    f_left.add(x[where:] > 9)
    assert (f_left.together == f_whole.together).all()
    fires = (x > 9).long()
    assert (f_whole.together == (fires.T @ fires).numpy()).all()


def test_a_mean_far_from_zero_costs_no_digits():
    x = rows(0, n=5000, dtype=torch.float64, shift=1e7)
    moments = Moments(7)
    for part in x.split(300):
        moments.add(part)
    reference = np.cov((x - x.mean(0)).numpy().T, bias=True)
    np.testing.assert_allclose(np.diag(moments.covariance), np.diag(reference), rtol=1e-8)


def test_a_stream_goes_on_from_its_state():
    x = rows(1)
    whole, first = Moments(7), Moments(7)
    whole.add(x[:90])
    whole.add(x[90:])
    first.add(x[:90])
    again = Moments.from_state(first.state())
    again.add(x[90:])
    assert (again.covariance == whole.covariance).all()
    counts = Firing(7)
    counts.add(x > 9)
    assert (Firing.from_state(counts.state()).together == counts.together).all()


def test_the_rank_comes_with_the_thresholds_that_would_give_it_too():
    found = cut(np.array([1e-14, 4.0, 1.0, 1e-3]))
    assert found.rank == 3
    assert found.stable_from == pytest.approx(0.25e-14)
    assert found.stable_to == pytest.approx(0.25e-3)
    assert found.decades == pytest.approx(11)
    assert cut(np.zeros(3)).rank == 0


@given(seeds, st.integers(0, 6))
@settings(max_examples=30)
def test_planted_ranks_are_found_whatever_the_scale_of_columns(seed, rank):
    random = np.random.default_rng(seed)
    x = random.normal(size=(60, rank)) @ random.normal(size=(rank, 9))
    assert rank_of(x * 10.0 ** random.integers(-4, 5, 9)) == rank


@given(seeds)
@settings(max_examples=20)
def test_the_closed_form_equals_a_sum_over_samples(seed):
    random = np.random.default_rng(seed)
    x, w = random.normal(size=(50, 4)), random.normal(size=(6, 4))
    root = random.normal(size=(6, 3))
    fires = (x @ w.T > 0).astype(float)
    together = fires.T @ fires / 50
    brute = sum((w.T * d) @ root @ root.T @ (w.T * d).T for d in fires) / 50
    np.testing.assert_allclose(relu_pullback(root @ root.T, w, together), brute, atol=1e-12)


def test_units_with_one_firing_set_are_one_block_and_dead_ones_none():
    fires = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 1, 1], [1, 1, 0, 0, 1], [1, 1, 0, 1, 1]]) > 0
    counts = Firing(5)
    counts.add(fires)
    assert parts_of(counts.together).tolist() == [0, 0, -1, 1, 2]
    assert parts_of(counts.together, tolerance=0.5).tolist() == [0, 0, -1, 0, 0]


def test_eigenvectors_have_a_fixed_sign():
    x = rows(2).double().numpy()
    values, vectors = spectral(x.T @ x)
    assert (np.diff(values) <= 0).all()
    assert (vectors[np.abs(vectors).argmax(axis=0), np.arange(7)] > 0).all()
