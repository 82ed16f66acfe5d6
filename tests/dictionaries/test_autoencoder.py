import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechatlas.base import InputError, NonFiniteError
from mechatlas.dictionaries.autoencoder import Autoencoder, Crosscoder
from mechatlas.dictionaries.metrics import evaluate, fvu
from mechatlas.dictionaries.pose_tied import PoseTied
from mechatlas.dictionaries.rows import ArrayRows, as_rows
from mechatlas.dictionaries.sparsity import WORTH_COMPILING, JumpReLU, ReLU, TopK
from mechatlas.dictionaries.training import train
from mechatlas.maths.named_groups import group
from tests.conformance import CHECKS


class Ternary:
    """Codes in {-1, 0, 1}; knows nothing of the package."""

    def __init__(self, d_in, n_latents):
        self.d_in, self.n_latents = d_in, n_latents
        random = torch.Generator().manual_seed(0)
        self.atoms = torch.nn.functional.normalize(
            torch.randn(n_latents, d_in, generator=random), dim=-1
        )

    def encode(self, x):
        projection = x @ self.atoms.T
        return projection.sign() * (projection.abs() > 1.0)

    def decode(self, code):
        return code @ self.atoms


KINDS = {
    "topk": Autoencoder(d_in=12, n_latents=40, sparsity=TopK(k=4)),
    "tied topk": Autoencoder(d_in=12, n_latents=40, sparsity=TopK(k=4), tied=True),
    "a stranger": Ternary(12, 40),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_conformance(kind, check):
    with torch.no_grad():
        check(KINDS[kind])


def planted(n: int = 20_000, d: int = 24, atoms: int = 32, k: int = 3, seed: int = 0):
    """Rows that are sums of k of some known atoms."""
    random = np.random.default_rng(seed)
    true = random.normal(size=(atoms, d))
    true /= np.linalg.norm(true, axis=1, keepdims=True)
    code = np.zeros((n, atoms))
    for row in code:
        row[random.choice(atoms, k, replace=False)] = random.uniform(1, 3, k)
    return (code @ true).astype(np.float32), true.astype(np.float32)


@pytest.mark.parametrize("tied", [False, True])
def test_planted_atoms_are_found(tied):
    x, true = planted()
    built = Autoencoder(d_in=24, n_latents=48, sparsity=TopK(k=3), tied=tied)
    dictionary = train(built, x, steps=500, batch_size=256, lr=1e-2)
    best = (torch.from_numpy(true) @ dictionary.W_dec.detach().T).max(dim=1).values
    assert best.median() > 0.95
    assert dictionary.history is not None
    assert dictionary.history.fvu[-1] < 0.15
    # Control: a dictionary of random atoms is nowhere near.
    untrained = Autoencoder(d_in=24, n_latents=48, sparsity=TopK(k=3), seed=1)
    assert (torch.from_numpy(true) @ untrained.W_dec.detach().T).max(dim=1).values.median() < 0.7


def test_training_on_noise_explains_little():
    x = np.random.default_rng(0).normal(size=(4000, 64)).astype(np.float32)
    built = Autoencoder(d_in=64, n_latents=64, sparsity=TopK(k=2))
    history = train(built, x, steps=150, batch_size=256).history
    assert history is not None
    assert history.fvu[-1] > 0.8


def test_the_same_seed_gives_the_same_bytes():
    x, _ = planted(2000)
    runs = []
    for _ in range(2):
        built = Autoencoder(d_in=24, n_latents=40, sparsity=TopK(k=3), seed=5)
        dictionary = train(built, x, steps=30, batch_size=128, seed=5)
        runs.append({k: v.numpy().tobytes() for k, v in dictionary.state_dict().items()})
    assert runs[0] == runs[1]


def test_atoms_keep_length_one_and_the_history_is_complete():
    x, _ = planted(2000)
    built = Autoencoder(d_in=24, n_latents=40, sparsity=TopK(k=3))
    dictionary = train(built, x, steps=47, batch_size=128)
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(40))
    history = dictionary.history
    assert history is not None
    assert history.step[-1] == 47
    assert len(history.fvu) == len(history.l0) == len(history.dead_share) == len(history.step)
    assert all(s > 0 for s in history.seconds_per_step)
    held = as_rows(x).held_out(4096).x
    assert history.fvu[-1] == pytest.approx(evaluate(dictionary, held).fvu)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_row_is_named_and_touches_no_weight(bad):
    x, _ = planted(300)
    rows = ArrayRows(x)
    row = int(rows._train[7])
    x[row, 5] = bad
    built = Autoencoder(d_in=24, n_latents=40, sparsity=TopK(k=3))
    with pytest.raises(NonFiniteError, match=rf"at row {row}, column 5\. Nothing was trained"):
        train(built, ArrayRows(x), steps=10, batch_size=300)
    assert all(p.isfinite().all() for p in built.parameters())


def test_rows_that_cannot_be_trained_on_are_refused():
    built = Autoencoder(d_in=24, n_latents=40, sparsity=TopK(k=3))
    with pytest.raises(InputError, match="rows are 7 wide, the dictionary reads 24"):
        train(built, np.zeros((100, 7), np.float32), steps=1)
    with pytest.raises(InputError, match="rows of the first batch are equal"):
        train(built, np.ones((100, 24), np.float32), steps=1)
    with pytest.raises(InputError, match=r"shape \(0, 24\); at least two rows"):
        train(built, np.zeros((0, 24), np.float32), steps=1)
    with pytest.raises(InputError, match=r"has shape \(9,\), expected an array \(rows, d_in\)"):
        train(built, np.zeros(9, np.float32), steps=1)
    with pytest.raises(InputError, match=r"of floats, got shape \(9, 24\) of torch.int64"):
        train(built, np.zeros((9, 24), np.int64), steps=1)
    with pytest.raises(InputError, match="Cannot train on a dict"):
        train(built, {"x": 1}, steps=1)
    with pytest.raises(ValueError, match=r"steps \(0\)"):
        train(built, np.ones((100, 24), np.float32), steps=0)


def test_mistakes_are_refused_at_construction():
    with pytest.raises(ValueError, match=r"n_latents \(8\) must be at least k \(32\)"):
        Autoencoder(d_in=4, n_latents=8)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        TopK(k=0)
    with pytest.raises(ValueError, match=r"d_in \(0\)"):
        Autoencoder(d_in=0, n_latents=64)


def test_activations_of_another_width_are_refused():
    with pytest.raises(InputError, match=r"width 12, got 13\. Is this the site"):
        Autoencoder(d_in=12, n_latents=64).encode(torch.zeros(2, 13))


@given(st.integers(1, 6), st.integers(0, 2**31))
def test_topk_keeps_the_k_largest_positive_entries(k, seed):
    pre = torch.randn(5, 9, generator=torch.Generator().manual_seed(seed))
    code = TopK(k=k)(pre)
    for row, given_row in zip(code, pre, strict=True):
        expected = sorted((v for v in given_row.tolist() if v > 0), reverse=True)[:k]
        assert sorted(row[row != 0].tolist(), reverse=True) == expected


def test_many_codes_are_found_by_the_compiled_loop_as_by_torch():
    pre = torch.randn(300, 512, generator=torch.Generator().manual_seed(0))
    pre[7], pre[9, 40:] = -1, -2
    rule = TopK(k=16)
    by_torch = torch.cat([rule(part) for part in pre.split(20)])
    assert pre.numel() >= WORTH_COMPILING > pre[:20].numel()
    assert torch.equal(rule(pre), by_torch)
    assert torch.equal(rule(pre.requires_grad_()), by_torch)
    pre = pre.detach()
    pre[3, 5] = torch.nan
    assert rule(pre)[3].isnan().any()


@given(st.integers(0, 2**31), st.integers(1, 5))
def test_streamed_quality_equals_the_direct_one(seed, batch_size):
    x = torch.randn(11, 12, generator=torch.Generator().manual_seed(seed))
    dictionary = KINDS["topk"]
    quality = evaluate(dictionary, x, batch_size=batch_size)
    with torch.no_grad():
        code = dictionary.encode(x)
        assert quality.fvu == pytest.approx(float(fvu(x, dictionary.decode(code))), rel=1e-5)
    assert quality.l0 == pytest.approx(float((code != 0).sum(dim=1).float().mean()))
    assert torch.equal(quality.fired, (code != 0).any(dim=0))


def test_fvu_is_zero_for_a_copy_and_one_for_the_mean():
    x = torch.randn(50, 6)
    assert float(fvu(x, x)) == 0
    assert float(fvu(x, x.mean(dim=0).expand_as(x))) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="all 3 samples are equal"):
        fvu(torch.ones(3, 2), torch.ones(3, 2))


@given(st.integers(2, 60), st.integers(1, 30), st.integers(0, 12))
def test_array_rows_can_be_entered_anywhere_and_hold_out_what_they_never_yield(n, size, start):
    rows = ArrayRows(np.arange(n, dtype=np.float32)[:, None])
    stream = rows.batches(size, seed=1)
    whole = torch.cat([next(stream).row for _ in range(start + 3)])
    late = rows.batches(size, seed=1, start=start)
    assert torch.equal(torch.cat([next(late).row for _ in range(3)]), whole[start * size :])
    held = set(rows.held_out(n).row.tolist())
    assert not held & set(whole.tolist())
    assert len(held) + rows.n_rows == n


@pytest.mark.parametrize("rule", [ReLU(), JumpReLU(threshold=0.01)])
def test_a_code_that_starts_dense_rebuilds_a_row_once_and_not_many_times(rule):
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    built = Autoencoder(d_in=32, n_latents=512, sparsity=rule)
    assert float((built.encode(x) != 0).float().mean()) > 0.3
    left = (x - built(x)).detach().square().sum() / x.square().sum()
    assert float(left) < 0.3


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_several_narrow_sites_are_learnt_from_one_in_few_steps(kind):
    """At first 16 of 512 latents add noise at the sites not read: more than there is to explain."""
    random = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(7, 24, 24, generator=random)).Q
    spread = 0.5 ** torch.arange(0, 6, 0.25)
    first = torch.randn(4000, 24, generator=random) * spread
    x = torch.cat([first, *(first @ turn)], dim=1)
    widths, rule = dict.fromkeys("abcdefgh", 24), TopK(k=16)
    built = (
        PoseTied(group=group("D4"), d_in=192, n_latents=512, sparsity=rule)
        if kind == "tied"
        else Crosscoder(widths=widths, n_latents=512, sparsity=rule, reads="a")
    )
    train(built, x, steps=120, batch_size=256)
    assert built.history is not None
    assert built.history.fvu[-1] < 0.3
