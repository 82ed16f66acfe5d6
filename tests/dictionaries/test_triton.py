"""Kernels in Triton, run by its interpreter on the CPU, against float64 and the CPU's own step."""

import os
from collections import Counter
from typing import Any

import pytest
import torch
from jaxtyping import install_import_hook
from torch.utils._python_dispatch import TorchDispatchMode

import mechatlas as ma
from mechatlas.dictionaries.engine import fallback, sparse_steps
from mechatlas.dictionaries.engine.sparse_steps import SparseStep
from mechatlas.dictionaries.engine.structures import (
    Adam,
    AddedGradients,
    Codes,
    ErrorGradients,
    Grouped,
    LatentGradients,
    Learned,
    Reconstruction,
    Update,
    Weights,
)
from tests import conftest
from tests.simulated_device import VIEWS, WAITING

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton is not installed: make test-triton")
# Triton reads the source of its kernels: they cannot be wrapped as all else is in the tests.
conftest.hook.uninstall()
from triton.runtime.interpreter import GridExecutor  # noqa: E402 # pyright: ignore

from mechatlas.dictionaries.engine import triton_kernels  # noqa: E402

conftest.hook = install_import_hook("mechatlas", "beartype.beartype")

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(os.environ["TRITON_INTERPRET"] != "1", reason="needs the interpreter"),
]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def largest(rows, bias, x, k):
    values = torch.full((len(x), k), -7.0)
    latents = torch.full((len(x), k), -7, dtype=torch.int32)
    screen = triton_kernels.Screen(rows, bias, triton_kernels, len(x))
    screen.largest(k)(x, values, latents)
    return values, latents


def check_largest(rows, bias, x, k):
    """The values are those of the k largest, each at its own latent, and no latent comes twice."""
    values, latents = largest(rows, bias, x, k)
    pre = x.double() @ rows.double().T + bias.double()
    wanted = pre.topk(k, dim=1).values.relu()
    size = pre.abs().max()
    assert ((values.sort(dim=1, descending=True).values - wanted).abs() <= 1e-6 * size).all()
    for i in range(len(x)):
        found = latents[i][values[i] > 0].long()
        assert len(found.unique()) == len(found)
        assert ((pre[i, found] - values[i][values[i] > 0]).abs() <= 1e-6 * size).all()


@pytest.mark.parametrize(
    ("m", "d", "n", "k"), [(300, 20, 5, 5), (129, 33, 3, 1), (64, 7, 2, 31), (40, 16, 2, 40)]
)
def test_selection_is_that_of_full_precision(m, d, n, k):
    check_largest(drawn(m, d), drawn(m, seed=1) / 3, drawn(n, d, seed=2), k)


def test_selection_among_numbers_that_half_precision_cannot_tell_apart(monkeypatch):
    rows = torch.ones(200, 16) + 1e-4 * drawn(200, 16)
    x = drawn(3, 16, seed=2).abs()
    searched = []
    monkeypatch.setattr(triton_kernels, "ROOM", 1)
    near: Any = triton_kernels._near

    class Counting:
        def __getitem__(self, grid):
            def run(*args, **options):
                near[grid](*args, **options)
                searched.append(args[5].clone())

            return run

    monkeypatch.setattr(triton_kernels, "_near", Counting())
    check_largest(rows, torch.zeros(200), x, 4)
    assert (searched[0] > 16).all()  # there was no room: all latents were computed


def test_rows_below_zero_have_no_codes():
    values, _ = largest(drawn(50, 8), torch.full((50,), -100.0), drawn(3, 8, seed=1), 4)
    assert (values == 0).all()


def codes_of(n, m, k, seed=5):
    latents = torch.stack(
        [torch.randperm(m, generator=torch.Generator().manual_seed(seed + i))[:k] for i in range(n)]
    )
    values = drawn(n, k, seed=seed).relu().flatten()
    return Codes(torch.arange(0, n * k + 1, k), latents.int().flatten(), values, values)


@pytest.mark.parametrize(("n", "m", "d", "k"), [(5, 30, 20, 3), (3, 17, 33, 1)])
def test_residual_and_gradients_are_those_of_float64(n, m, d, k):
    codes, scales = codes_of(n, m, k), torch.rand(n, generator=torch.Generator().manual_seed(9))
    task = Reconstruction(
        drawn(n, d), scales, drawn(m, d, seed=1), drawn(d, seed=2), torch.tensor([m])
    )
    out = ErrorGradients(torch.empty(1, n, d), task.atoms[:0], torch.zeros(n * k), torch.zeros(d))
    loss = triton_kernels.residual(task, codes, out)
    dense = torch.zeros(n, m, dtype=torch.float64)
    dense.scatter_(1, codes.latents.view(n, k).long(), codes.values.view(n, k).double())
    dense.requires_grad_()
    error = dense @ task.atoms.double() + task.bias.double() - task.target.double()
    wanted = (error.square().sum(dim=1) * scales.double()).sum() / 2
    wanted.backward()
    assert float(loss) == pytest.approx(float(wanted.detach()), rel=1e-5)
    back = (error * scales.double()[:, None]).detach()
    torch.testing.assert_close(out.rows[0].double(), back, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.bias.double(), back.sum(dim=0), atol=1e-5, rtol=1e-5)
    assert dense.grad is not None
    slopes = dense.grad.gather(1, codes.latents.view(n, k).long()).flatten()
    torch.testing.assert_close(out.codes.double(), slopes, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("d_in", "d_out"), [(20, 20), (17, 33)])
def test_an_update_is_that_of_plain_torch_in_float64(d_in, d_out):
    n, m, k = 6, 25, 3
    codes = codes_of(n, m, k)  # some latents have no pair
    order, starts = fallback.group(codes.latents, codes.values, m)
    pairs = Grouped(starts, fallback.rows_of(codes).int()[order], codes.values[order], order)
    x, g, d_codes = drawn(n, d_in), drawn(1, n, d_out, seed=1), drawn(n * k, seed=2)[order]
    d_codes[pairs.values == 0] = 0
    adam = Adam(0.9, 0.1, 0.999, 0.001, 3e-3, 1.3, 1e-8)
    rule = Update(adam, torch.tensor([0, d_out]), 1.0, 1e-6, False, True)

    def run(backend, dtype):
        shapes = {"atoms": (m, d_out), "encoder": (m, d_in), "bias": (m,)}
        weights = Weights(
            *(
                Learned(
                    drawn(*shape, seed=i).to(dtype),
                    drawn(*shape, seed=i + 3).to(dtype),
                    drawn(*shape, seed=i + 6).square().to(dtype),
                )
                for i, shape in enumerate(shapes.values())
            )
        )
        batch = LatentGradients(
            x.to(dtype), g.to(dtype), g.new_empty(0, d_out), d_codes.to(dtype), torch.tensor([m])
        )
        place = torch.full((m,), -1, dtype=torch.int32)
        none = AddedGradients(place, x.new_empty(0, 1), x.new_empty(0, 1), x.new_empty(0))
        d_input = torch.zeros(d_in, dtype=dtype)
        own = pairs._replace(values=pairs.values.to(dtype))
        backend.update(range(m), own, batch, weights, rule, none, d_input)
        return [d_input, *(t for learned in weights for t in learned)]

    for found, wanted in zip(
        run(triton_kernels, torch.float32), run(fallback, torch.float64), strict=True
    ):
        torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=2e-5)


def test_a_step_is_few_launches_and_waits_for_nothing(monkeypatch):
    monkeypatch.setattr(sparse_steps, "can_compile", lambda _: False)
    monkeypatch.setattr(sparse_steps, "can_use_triton", lambda _: True)
    monkeypatch.setattr(sparse_steps.steps, "at_hand", lambda loss: loss)  # as on a device
    step = SparseStep(ma.Autoencoder(d_in=16, n_latents=64, sparsity=ma.TopK(k=4)))
    kernels, inside = [], []
    launch = GridExecutor.__call__

    def counted(self, *args, **options):
        kernels.append(self.fn.__name__)
        inside.append(True)  # the interpreter's own operators are no launches
        try:
            return launch(self, *args, **options)
        finally:
            inside.pop()

    class Operators(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func._schema.name.removeprefix("aten::")
            if not inside and name not in VIEWS and not name.startswith("mkl"):
                self.names[name] += 1
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    with Operators() as operators:
        step(drawn(32, 16), 1e-3)
    assert len(kernels) == 8
    assert 30 < sum(operators.names.values()) + len(kernels) <= 60
    assert not WAITING & set(operators.names)


@pytest.mark.parametrize("rule", [ma.TopK(k=3), ma.BatchTopK(k=3), ma.ReLU(l1=0.05)])
@pytest.mark.parametrize("form", ["plain", "tied", "matryoshka", "transcoder"])
def test_steps_are_those_of_plain_torch(rule, form, monkeypatch):
    def build():
        if form == "transcoder":
            return ma.Transcoder(d_in=9, d_out=11, n_latents=30, sparsity=rule)
        widths = (7,) if form == "matryoshka" else ()
        return ma.Autoencoder(
            d_in=20, n_latents=30, sparsity=rule, tied=form == "tied", matryoshka_widths=widths
        )

    def trained(uses_triton):
        monkeypatch.setattr(sparse_steps, "can_compile", lambda _: False)
        monkeypatch.setattr(sparse_steps, "can_use_triton", lambda _: uses_triton)
        built = build()
        built.initialize(drawn(64, 20))
        step = SparseStep(built)
        assert (step.backend is triton_kernels) == uses_triton
        losses = [float(step(drawn(8, 20, seed=t), 1e-3).loss) for t in range(6)]
        return losses, built.state_dict()

    losses, found = trained(True)
    wanted_losses, wanted = trained(False)
    assert losses == pytest.approx(wanted_losses, rel=1e-4)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=1e-4)
