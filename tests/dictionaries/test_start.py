"""Where training starts when nothing is said: size of the codes, and learning rate."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from mechatlas.dictionaries.autoencoder import Autoencoder, Crosscoder
from mechatlas.dictionaries.objective import Schedule
from mechatlas.dictionaries.sparsity import Gated, JumpReLU, ReLU, TopK
from mechatlas.dictionaries.training import train


def sums_of_atoms(n_rows, atoms, k, seed=0):
    random = np.random.default_rng(seed)
    code = np.zeros((n_rows, len(atoms)), np.float32)
    for row in code:
        used = random.choice(len(atoms), k, replace=False)
        row[used] = random.uniform(0.5, 1.5, k)
    return code @ atoms


def unit_rows(n, d, seed):
    rows = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("form", ["autoencoder", "crosscoder that reads one site"])
def test_codes_start_at_the_root_of_the_size_that_is_best_for_the_first_batch(form):
    if form == "autoencoder":
        built = Autoencoder(d_in=24, n_latents=400, sparsity=TopK(k=20))
    else:
        widths = {"a": 8, "b": 16}
        built = Crosscoder(widths=widths, n_latents=400, sparsity=TopK(k=20), reads="a")
    few = np.random.default_rng(0).normal(size=(500, 3)) @ np.random.default_rng(1).normal(
        size=(3, 24)
    )
    x = torch.from_numpy(few.astype(np.float32)) + 5
    before = built.W_enc.detach().clone()
    built.initialize(x)
    ratio = (built.W_enc / before).detach()
    assert ratio.std() < 1e-5

    # The size that is best, by least squares over codes that numpy selects.
    read = x.numpy()[:, built.reads]
    pre = (read - read.mean(axis=0)) @ before.numpy()
    kept = np.where(pre >= np.sort(pre, axis=1)[:, -20:-19], np.maximum(pre, 0), 0)
    explained = (kept @ built.W_dec.detach().numpy()).reshape(-1, 1)
    target = (x - x.mean(dim=0)).numpy().reshape(-1)
    best = np.linalg.lstsq(explained, target, rcond=None)[0][0]
    assert 0 < best < 0.8
    assert float(ratio.mean()) == pytest.approx(best**0.5, rel=1e-4)


@pytest.mark.parametrize("rule", [ReLU(), Gated(), JumpReLU(threshold=0.5, bandwidth=0.2)])
def test_without_a_k_each_latent_starts_to_learn_on_few_rows(rule):
    x = torch.randn(400, 24, generator=torch.Generator().manual_seed(0)).exp() + 5
    for built in (
        Autoencoder(d_in=24, n_latents=300, sparsity=rule),
        Autoencoder(d_in=24, n_latents=300, sparsity=rule, tied=True),
        Crosscoder(widths={"a": 8, "b": 16}, n_latents=300, sparsity=rule, reads="b"),
    ):
        before = float(built.encoder_parameters[0].norm())
        built.initialize(x)
        grown = float(built.encoder_parameters[0].norm()) / before
        pre = built.pre_activations(x[:, built.reads]) / grown
        largest = pre.sort(dim=0, descending=True).values
        least = 0.4 if isinstance(rule, JumpReLU) else 0.0
        assert (largest[11] > least).all()  # 12 of 400 rows are 3 %
        assert (largest[12] < least).all()
        # By least squares the codes should be larger; they go half the way.
        code = built.rule(pre, built.state)
        reconstruction = built.decode(code) - built.b_dec
        target = x[:, built.writes] - built.b_dec
        best = float((reconstruction * target).sum() / reconstruction.square().sum())
        assert grown == pytest.approx(1.0 if built.tied else best**0.5, rel=1e-3)


def test_the_rate_falls_with_the_root_of_the_width_and_is_the_one_stated():
    def moved(d_in, steps, **given):
        """Largest bias after the first step, which moves every entry by the rate."""
        built = Autoencoder(d_in=d_in, n_latents=64, sparsity=TopK(k=2))
        x = torch.randn(400, d_in, generator=torch.Generator().manual_seed(0))
        x /= x.std()
        states = []

        def note(done, total):
            states.append(built.b_enc.detach().clone())

        train(
            built, x, steps=steps, batch_size=64, schedule=Schedule(decay=0), on_progress=note,
            **given,
        )  # fmt: skip
        return float(states[0].abs().max())

    scale = 1e-2
    assert moved(16, 1600 // 16) == pytest.approx(0.06 * 16**0.25 / 4, rel=scale)
    assert moved(64, 1600 // 16) == pytest.approx(0.06 * 16**0.25 / 8, rel=scale)
    assert moved(64, 3) == pytest.approx(0.06 * 16**0.25 / 8, rel=scale)
    assert moved(64, 300) == pytest.approx(0.06 * (16 / 3) ** 0.25 / 8, rel=scale)
    assert moved(64, 3, lr=1e-4) == pytest.approx(1e-4, rel=scale)


def test_planted_atoms_are_found_by_default_and_the_same_seed_gives_the_same_bytes():
    atoms = unit_rows(64, 32, seed=3)
    x = sums_of_atoms(20_000, atoms, k=3)
    runs = [
        train(Autoencoder(d_in=32, n_latents=64, sparsity=TopK(k=3)), x, steps=400, batch_size=256)
        for _ in range(2)
    ]
    found = runs[0].W_dec.detach().numpy()
    cosines = atoms @ found.T
    pairs = cosines[linear_sum_assignment(cosines, maximize=True)]
    untrained = unit_rows(64, 32, seed=4) @ atoms.T
    assert pairs.mean() > 0.9
    assert untrained[linear_sum_assignment(untrained, maximize=True)].mean() < 0.5
    first, second = (
        b"".join(p.detach().numpy().tobytes() for p in run.parameters()) for run in runs
    )
    assert first == second


def test_the_start_does_not_depend_on_the_number_of_threads():
    x = torch.randn(2048, 480, generator=torch.Generator().manual_seed(0)).relu()
    starts, before = [], torch.get_num_threads()
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            built = Autoencoder(d_in=480, n_latents=1024, sparsity=TopK(k=16))
            built.initialize(x)
            starts.append(built.W_enc.detach().clone())
            assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*starts)
