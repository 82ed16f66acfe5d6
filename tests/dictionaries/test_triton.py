"""Kernels in Triton, run by its interpreter on the CPU, against float64 and the CPU's own step."""

import os
from collections import Counter
from typing import Any

import pytest
import torch
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
from tests import conftest, shape_checks
from tests.simulated_device import VIEWS, WAITING

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton is not installed: make test-triton")
# Triton reads the source of its kernels: they cannot be wrapped as all else is in the tests.
conftest.hook.uninstall()
from triton.runtime.interpreter import GridExecutor  # noqa: E402 # pyright: ignore

from mechatlas.dictionaries.engine import triton_kernels, triton_screening  # noqa: E402

conftest.hook = shape_checks.install()

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(os.environ["TRITON_INTERPRET"] != "1", reason="needs the interpreter"),
]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def largest(rows, bias, x, k):
    values = torch.full((len(x), k), -7.0)
    latents = torch.full((len(x), k), -7, dtype=torch.int32)
    triton_kernels.Screen(rows, bias).largest(k)(x, values, latents)
    return values, latents


def above(rows, bias, low, x):
    found = triton_kernels.Screen(rows, bias).above(low)(x)
    assert found is not None
    return found


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
    monkeypatch.setattr(triton_screening, "ROOM", 1)
    near: Any = triton_screening._near

    class Counting:
        def __getitem__(self, grid):
            def run(*args, **options):
                near[grid](*args, **options)
                searched.append(args[8].clone())

            return run

    monkeypatch.setattr(triton_screening, "_near", Counting())
    check_largest(rows, torch.zeros(200), x, 4)
    assert (searched[0] > 16).all()  # there was no room: all latents were computed


def test_rows_below_zero_have_no_codes():
    values, _ = largest(drawn(50, 8), torch.full((50,), -100.0), drawn(3, 8, seed=1), 4)
    assert (values == 0).all()


def selected(rows, bias, x, k, monkeypatch, *, uses_triton):
    """Codes of a batch as a step of BatchTopK finds them, and the threshold that it learns."""
    monkeypatch.setattr(sparse_steps, "can_compile", lambda _: not uses_triton)
    monkeypatch.setattr(sparse_steps, "can_use_triton", lambda _: uses_triton)
    built = ma.Autoencoder(d_in=x.shape[1], n_latents=len(rows), sparsity=ma.BatchTopK(k=k))
    built.encoder_rows.copy_(rows)
    built.b_enc.data.copy_(bias)
    with torch.no_grad():
        codes = SparseStep(built)._select(x, lambda piece, n: [piece(i) for i in range(n)])
    assert codes is not None
    return codes, float(built.state["threshold"])


@pytest.mark.parametrize(("m", "d", "n", "k"), [(300, 20, 5, 5), (129, 33, 3, 1), (64, 7, 6, 31)])
@pytest.mark.parametrize("tile", [2**28, 700])
def test_the_codes_of_a_batch_are_those_of_full_precision(m, d, n, k, tile, monkeypatch):
    monkeypatch.setattr(sparse_steps, "TILE", tile)
    rows, bias, x = drawn(m, d), drawn(m, seed=1) / 3, drawn(n, d, seed=2)
    x[0] *= 5  # has most of the codes
    codes, threshold = selected(rows, bias, x, k, monkeypatch, uses_triton=True)
    pre = x.double() @ rows.double().T + bias.double()
    wanted = pre.flatten().topk(n * k).values.relu()
    assert (codes.values.sort(descending=True).values - wanted).abs().max() < 1e-5 * wanted[0]
    assert threshold == pytest.approx(float(wanted[wanted > 0].min()), rel=1e-5)
    rows_of = fallback.rows_of(codes).long()
    own = pre[rows_of, codes.latents.long()].relu()
    assert (codes.values - own).abs().max() < 1e-5 * wanted[0]
    assert len(set(zip(rows_of.tolist(), codes.latents.tolist(), strict=True))) == n * k


@pytest.mark.parametrize("tile", [2**28, 150])
@pytest.mark.parametrize(("offset", "k"), [(0, 3), (0, 1), (-1, 9), (-4, 9), (-99, 2)])
def test_of_equal_codes_those_of_the_cpu_are_kept(offset, k, tile, monkeypatch):
    monkeypatch.setattr(sparse_steps, "TILE", tile)
    m, d, n = 40, 8, 13
    rows, x = drawn(m, d).sign(), drawn(n, d, seed=1).round()  # sums are exact, and often equal
    x[[2, 9]] = 0
    x[5] *= 3
    bias = torch.full((m,), float(offset))
    found, threshold = selected(rows, bias, x, k, monkeypatch, uses_triton=True)
    wanted, usual = selected(rows, bias, x, k, monkeypatch, uses_triton=False)
    assert threshold == usual
    assert len(found.values) == found.starts[-1] == n * k
    n_codes = len(wanted.values)
    assert (n_codes == n * k) == (offset > -4)  # where there are fewer, zeros follow
    assert (found.values[n_codes:] == 0).all()
    assert torch.equal(found.starts[:-1], wanted.starts[:-1])
    assert torch.equal(found.values[:n_codes], wanted.values)
    assert torch.equal(found.latents[:n_codes], wanted.latents)


@pytest.mark.parametrize("lowest", [-1.0, 0.0, 0.4])
def test_pre_activations_above_a_bound_of_each_latent_are_those_of_full_precision(lowest):
    m, d, n = 150, 19, 4
    rows, bias, x = drawn(m, d), drawn(m, seed=1) / 3, drawn(n, d, seed=2)
    low = lowest + drawn(m, seed=3).abs() * 3
    x[1] = 0  # no more than the bias
    counts, latents, values = above(rows, bias, low, x)
    pre = x.double() @ rows.double().T + bias.double()
    dense = torch.zeros(n, m)
    sizes = counts.tolist()
    for row, (part, own) in enumerate(zip(latents.split(sizes), values.split(sizes), strict=True)):
        assert (part.diff() > 0).all()  # ascending
        dense[row, part.long()] = own
    kept = pre > low
    torch.testing.assert_close(dense.double(), pre * kept, atol=1e-5, rtol=1e-5)
    assert len(values) <= 1.3 * int(kept.sum()) + 3  # few are computed in vain


def test_rows_with_more_codes_than_there_is_room_for_are_refused(monkeypatch):
    monkeypatch.setattr(triton_screening, "GROUPS", 16)
    rows, x = drawn(200, 8), drawn(3, 8, seed=1)
    screen = triton_kernels.Screen(rows, torch.zeros(200))
    assert screen.above(torch.zeros(200))(x) is None
    assert screen.above(torch.full((200,), 4.0))(x) is not None


def test_what_is_no_number_is_computed_in_full(monkeypatch):
    rows, x = drawn(40, 8), drawn(3, 8, seed=1)
    rows[7, 2] = torch.nan
    _, latents, values = above(rows, torch.zeros(40), torch.ones(40), x)
    assert (latents == 7).sum() == 3
    assert (values[latents == 7] == 0).all()  # which is not above its bound


def codes_of(n, m, k, seed=5):
    latents = torch.stack(
        [torch.randperm(m, generator=torch.Generator().manual_seed(seed + i))[:k] for i in range(n)]
    )
    values, latents = drawn(n, k, seed=seed).relu().flatten(), latents.sort(dim=1).values
    return Codes(torch.arange(0, n * k + 1, k), latents.int().flatten(), values, values)


@pytest.mark.parametrize(
    ("n", "m", "d", "k", "widths"),
    [(5, 30, 20, 3, []), (3, 17, 33, 1, []), (4, 30, 20, 5, [3, 11]), (2, 17, 33, 1, [16])],
)
def test_residual_and_gradients_are_those_of_float64(n, m, d, k, widths):
    codes, scales = codes_of(n, m, k), torch.rand(n, generator=torch.Generator().manual_seed(9))
    task = Reconstruction(
        drawn(n, d), scales, drawn(m, d, seed=1), drawn(d, seed=2), torch.tensor([*widths, m])
    )
    levels = len(widths) + 1
    out = ErrorGradients(
        torch.empty(levels, n, d), task.atoms[:0], torch.zeros(n * k), torch.zeros(d)
    )
    loss = triton_kernels.residual(task, codes, out)
    dense = torch.zeros(n, m, dtype=torch.float64)
    dense.scatter_(1, codes.latents.view(n, k).long(), codes.values.view(n, k).double())
    dense.requires_grad_()
    wanted, errors = torch.zeros((), dtype=torch.float64), []
    for width in (*widths, m):
        error = dense[:, :width] @ task.atoms[:width].double() + task.bias.double() - task.target
        wanted = wanted + (error.square().sum(dim=1) * scales.double()).sum() / 2
        errors.append((error * scales.double()[:, None]).detach())
    wanted.backward()
    assert float(loss) == pytest.approx(float(wanted.detach()), rel=1e-5)
    backs = [torch.stack(errors[level:]).sum(dim=0) for level in range(levels)]
    torch.testing.assert_close(out.rows.double(), torch.stack(backs), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.bias.double(), backs[0].sum(dim=0), atol=1e-5, rtol=1e-5)
    assert dense.grad is not None
    slopes = dense.grad.gather(1, codes.latents.view(n, k).long()).flatten()
    torch.testing.assert_close(out.codes.double(), slopes, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("d_in", "d_out", "form"),
    [(20, 20, "plain"), (17, 33, "plain"), (20, 20, "tied"), (9, 20, "levels"), (9, 20, "sites")]
    + [(20, 20, "dead"), (17, 33, "dead")],
)
def test_an_update_is_that_of_plain_torch_in_float64(d_in, d_out, form):
    n, m, k = 6, 25, 3
    codes = codes_of(n, m, k)  # some latents have no pair
    order, starts = fallback.group(codes.latents, codes.values, m)
    pairs = Grouped(starts, fallback.rows_of(codes).int()[order], codes.values[order], order)
    widths = torch.tensor([4, 11, m] if form == "levels" else [m])
    x, g = drawn(n, d_in), drawn(len(widths), n, d_out, seed=1)
    d_codes = drawn(n * k, seed=2)[order]
    d_codes[pairs.values == 0] = 0
    adam = Adam(0.9, 0.1, 0.999, 0.001, 3e-3, 1.3, 1e-8)
    edges = torch.tensor([0, 5, 12, d_out] if form == "sites" else [0, d_out])
    rule = Update(adam, edges, 1.0, 1e-6, form == "tied", True)

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
        if form == "tied":
            weights = weights._replace(encoder=weights.atoms)
        if form == "sites":
            weights.atoms.value[3, 5:12] = 0  # a latent that one of the sites does not have
        batch = LatentGradients(
            x.to(dtype), g.to(dtype), g.new_empty(0, d_out), d_codes.to(dtype), widths
        )
        place, n_dead = torch.full((m,), -1, dtype=torch.int32), 3 if form == "dead" else 0
        place[[2, 24, 0][:n_dead]] = torch.arange(n_dead, dtype=torch.int32)
        shapes = [(n_dead, d_out), (n_dead, d_in), (n_dead,)]
        added = AddedGradients(place, *(drawn(*shape, seed=4).to(dtype) for shape in shapes))
        d_input = torch.zeros(d_in, dtype=dtype)
        own = pairs._replace(values=pairs.values.to(dtype))
        backend.update(range(m), own, batch, weights, rule, added, d_input)
        return [d_input, *(t for learned in weights for t in learned)]

    for found, wanted in zip(
        run(triton_kernels, torch.float32), run(fallback, torch.float64), strict=True
    ):
        torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=2e-5)


MOST_LAUNCHES = {ma.TopK(k=4): 50, ma.BatchTopK(k=4): 60, ma.ReLU(): 50, ma.JumpReLU(): 70}


@pytest.mark.parametrize("rule", MOST_LAUNCHES)
def test_a_step_is_few_launches_and_waits_at_most_for_the_number_of_pairs(rule, monkeypatch):
    monkeypatch.setattr(sparse_steps, "can_compile", lambda _: False)
    monkeypatch.setattr(sparse_steps, "can_use_triton", lambda _: True)
    monkeypatch.setattr(sparse_steps.steps, "at_hand", lambda loss: loss)  # as on a device
    step = SparseStep(ma.Autoencoder(d_in=16, n_latents=64, sparsity=rule))
    step.dictionary.b_enc.data -= 1  # no more than a few codes
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
    assert 9 <= len(kernels) <= 14
    assert 30 < sum(operators.names.values()) + len(kernels) <= MOST_LAUNCHES[rule]
    n_numbers = 0 if isinstance(rule, ma.TopK | ma.BatchTopK) else 1
    assert {name: operators.names[name] for name in WAITING & set(operators.names)} == (
        {"_local_scalar_dense": n_numbers} if n_numbers else {}
    )


RULES = {
    "topk": ma.TopK(k=3),
    "batch topk": ma.BatchTopK(k=3),
    "relu": ma.ReLU(l1=0.5),
    "jumprelu": ma.JumpReLU(l0=0.3),
    "gated": ma.Gated(l1=0.5),
}
FORMS = {
    "plain": lambda **rest: ma.Autoencoder(d_in=20, **rest),
    "tied": lambda **rest: ma.Autoencoder(d_in=20, tied=True, **rest),
    "matryoshka": lambda **rest: ma.Autoencoder(d_in=20, matryoshka_widths=(7, 12), **rest),
    "transcoder": lambda **rest: ma.Transcoder(d_in=9, d_out=11, **rest),
    "crosscoder": lambda **rest: ma.Crosscoder(widths={"a": 5, "b": 15}, **rest),
}


@pytest.mark.parametrize(
    ("rule", "form", "steps"),
    [("topk", "plain", 60), ("batch topk", "plain", 5), ("jumprelu", "plain", 5)]
    + [("relu", "tied", 5), ("batch topk", "matryoshka", 5), ("jumprelu", "matryoshka", 5)]
    + [("topk", "crosscoder", 5), ("batch topk", "transcoder", 5)]
    + [("gated", "plain", 5), ("gated", "matryoshka", 5)],
)
def test_steps_are_those_of_the_cpu(rule, form, steps, monkeypatch):
    usual, dense = sparse_steps.can_compile, []
    autograd = sparse_steps.AutogradStep
    monkeypatch.setattr(
        sparse_steps, "AutogradStep", lambda *a, **k: dense.append(1) or autograd(*a, **k)
    )

    def trained(uses_triton):
        monkeypatch.setattr(sparse_steps, "can_compile", lambda t: not uses_triton and usual(t))
        monkeypatch.setattr(sparse_steps, "can_use_triton", lambda _: uses_triton)
        built = FORMS[form](n_latents=18, sparsity=RULES[rule])
        built.initialize(drawn(64, 20))
        built.b_enc.data -= 1.5 if "topk" not in rule else 0  # few codes
        step = SparseStep(built)
        assert (step.backend is triton_kernels) == uses_triton
        aux = ma.AuxK(k=3), torch.tensor([4, 17])
        dead = aux if form in ("tied", "crosscoder") else None
        losses = [float(step(drawn(5, 20, seed=t), 1e-3, dead).loss) for t in range(steps)]
        return losses, built.state_dict()

    losses, found = trained(True)
    assert len(dense) < steps / 2
    wanted_losses, wanted = trained(False)
    assert losses == pytest.approx(wanted_losses, rel=1e-4)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=1e-4)
