"""What is found from a product of half the precision is what the whole product would find."""

from typing import Any

import numba
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechatlas.dictionaries.autoencoder import Autoencoder
from mechatlas.dictionaries.engine import screening, sparse_steps
from mechatlas.dictionaries.engine.screening import (
    BFLOAT16_ERROR,
    INTERVAL_WIDTH,
    Screen,
    TooCloseError,
)
from mechatlas.dictionaries.engine.sparse_steps import SparseStep, can_screen
from mechatlas.dictionaries.sparsity import BatchTopK, JumpReLU, ReLU, TopK

SHAPES = {"n": st.integers(1, 60), "m": st.integers(40, 700), "d": st.integers(1, 70)}
KINDS = st.sampled_from(["plain", "scaled", "outlier", "constant", "equal atoms", "all below"])


def one_by_one(piece, n):
    return [piece(i) for i in range(n)]


def problem(n, m, d, kind, seed):
    """Rows, an encoder and its biases, some of them awkward."""
    random = torch.Generator().manual_seed(seed)
    x, rows = torch.randn(n, d, generator=random), torch.randn(m, d, generator=random)
    bias = torch.randn(m, generator=random)
    if kind == "scaled":
        rows *= torch.logspace(-3, 2, m)[:, None]
        x *= torch.logspace(-4, 4, n)[:, None]
    if kind == "outlier":
        x[:, 0] *= 300
    if kind == "constant":
        x[:], bias = 1.0, bias * 1e4
    if kind == "equal atoms":
        half = m // 2
        rows[half : 2 * half], bias[half : 2 * half] = rows[:half].clone(), bias[:half].clone()
    if kind == "all below":
        bias -= 1000
    return x, rows, bias


def exactly(x, rows, bias):
    return x.double() @ rows.double().T + bias.double()


def numbers(bits):
    return bits.view(torch.bfloat16).double()


@settings(max_examples=200)
@given(**SHAPES, kind=KINDS, seed=st.integers(0, 999), side=st.sampled_from([-1, 1]))
def test_no_pre_activation_is_beyond_its_bounds(n, m, d, kind, seed, side):
    x, rows, bias = problem(n, m, d, kind, seed)
    screen = Screen(rows, bias, one_by_one, [])
    half, reach = screen._rounded(bias, side)
    with screen._bounds(x, half) as (bits, lengths):
        bound = numbers(bits)
    pre, lost = exactly(x, rows, bias), bound.abs() * BFLOAT16_ERROR
    reach, lengths = reach.double(), lengths.double()
    between = INTERVAL_WIDTH * (lengths @ reach[:, :2].T) + reach[:, 2] + lost
    if side < 0:
        assert (bound - lost <= pre).all()
        assert (pre <= bound + between).all()
    else:
        assert (pre <= bound + lost).all()
        assert ((bound >= 0) | (pre < 0)).all()  # what `above` goes by


@settings(max_examples=200)
@given(**SHAPES, kind=KINDS, seed=st.integers(0, 999), k=st.integers(1, 20))
def test_the_largest_are_those_of_the_whole_product(n, m, d, kind, seed, k):
    x, rows, bias = problem(n, m, d, kind, seed)
    values, latents = torch.empty(n, k), torch.empty(n, k, dtype=torch.int32)
    try:
        Screen(rows, bias, one_by_one, []).largest(k)(x, values, latents)
    except TooCloseError:
        assert 2 * k > m / 16 or kind != "plain" or d < 8
        return
    pre = exactly(x, rows, bias)
    size = x.norm(dim=1, keepdim=True) * rows.norm(dim=1).max() + bias.abs().max()
    top = pre.topk(k, dim=1).values.relu()
    found = values.sort(dim=1, descending=True).values
    assert (found - top).abs().le(3e-6 * size).all()
    said = pre.gather(1, latents.long())
    assert (said - values).abs().masked_fill(values == 0, 0).le(3e-6 * size).all()
    for row in range(n):
        its = latents[row][values[row] > 0]
        assert len(its.unique()) == len(its)


@settings(max_examples=200)
@given(**SHAPES, kind=KINDS, seed=st.integers(0, 999), low=st.floats(0.0, 30.0))
def test_those_above_a_threshold_are_those_of_the_whole_product(n, m, d, kind, seed, low):
    x, rows, bias = problem(n, m, d, kind, seed)
    lows = low * torch.rand(m, generator=torch.Generator().manual_seed(seed)) + low
    try:
        counts, latents, values = Screen(rows, bias, one_by_one, []).above(lows)(x)
    except TooCloseError:
        return
    pre = exactly(x, rows, bias)
    row = torch.repeat_interleave(torch.arange(n), counts)
    size = (x.norm(dim=1, keepdim=True) * rows.norm(dim=1) + bias.abs() + lows) * 3e-6
    assert (values - pre[row, latents.long()]).abs().le(size[row, latents.long()]).all()
    found = torch.zeros(n, m, dtype=torch.bool)
    found[row, latents.long()] = True
    sure = (pre - lows).abs() > size
    assert (found == (pre > lows))[sure].all()
    assert (row.diff() >= 0).all()


def test_few_are_computed_that_are_not_selected(monkeypatch):
    x, rows, bias = problem(400, 4096, 256, "plain", 0)
    rows /= rows.norm(dim=1, keepdim=True)
    k, computed = 16, []
    original: Any = numba.njit(screening._compute)

    def counting(x, encoder, starts, latents, values):
        computed.append(starts[-1])
        original(x, encoder, starts, latents, values)

    monkeypatch.setattr(screening, "_compute", counting)
    monkeypatch.setattr(screening, "_near", numba.njit(screening._near))
    monkeypatch.setattr(screening, "write_largest", numba.njit(screening.write_largest))
    monkeypatch.setattr(screening, "_select", screening._select.py_func)
    values, latents = torch.empty(len(x), k), torch.empty(len(x), k, dtype=torch.int32)
    Screen(rows, bias * 0, one_by_one, []).largest(k)(x, values, latents)
    assert len(x) * k <= sum(computed) < 2 * len(x) * k


@pytest.mark.parametrize("rule", [TopK(k=4), BatchTopK(k=4), ReLU(l1=0.1), JumpReLU(l0=0.1)])
@pytest.mark.parametrize("outlier", [False, True], ids=["plain", "outlier"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_step_is_that_without_screening(rule, outlier, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(900, 24, generator=random)
    if outlier:  # so large that the bounds say nothing: the whole product takes over
        x[:, 0] += 3000
    whole, stepped = [], []
    original = sparse_steps.WholeProduct.__init__

    def counting(self, *arguments):
        whole.append(screens)
        original(self, *arguments)

    monkeypatch.setattr(sparse_steps.WholeProduct, "__init__", counting)
    for screens in (True, False):
        built = Autoencoder(d_in=24, n_latents=600, sparsity=rule)
        with torch.no_grad():
            built.b_enc.sub_(2.5 if isinstance(rule, ReLU | JumpReLU) else 0)
            if outlier:
                built._W_enc[0] = 0.1
                built.b_enc.sub_(300)
        step = SparseStep(built, compiled=True)
        step._screens = screens
        loss, fired = step(x, 1e-3)
        stepped.append((loss, fired, step.moments))
    assert whole == ([True, False] if outlier else [False])
    (loss, fired, moments), (whole_loss, whole_fired, whole_moments) = stepped
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    assert (fired == whole_fired).all()
    for name in moments:  # of gradients, a tenth; Adam makes a step of the least of them
        size = whole_moments[name][0].abs().max()
        assert (moments[name][0] - whole_moments[name][0]).abs().max() <= 1e-5 * size


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "rows", "bias"])
def test_what_is_not_finite_is_left_to_the_whole_product(bad, where):
    x, rows, bias = problem(30, 600, 8, "plain", 0)
    {"x": x, "rows": rows, "bias": bias}[where].view(-1)[17] = bad
    values, latents = torch.empty(30, 4), torch.empty(30, 4, dtype=torch.int32)
    with pytest.raises(TooCloseError):
        Screen(rows, bias, one_by_one, []).largest(4)(x, values, latents)


def test_only_single_precision_is_screened():
    assert not can_screen(torch.zeros(1, dtype=torch.float64))
