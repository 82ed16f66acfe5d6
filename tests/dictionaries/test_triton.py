"""Kernels in Triton, run by its interpreter on the CPU, against float64 and the CPU's own step."""

import copy
import os
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mechatlas as ma
from mechatlas.dictionaries.engine import fallback, sparse_steps
from mechatlas.dictionaries.engine.resampling import resample
from mechatlas.dictionaries.engine.sparse_steps import SparseStep
from tests import conftest, shape_checks
from tests.simulated_device import VIEWS, WAITING

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton is not installed: make test-triton")
# Triton reads the source of its kernels: they cannot be wrapped as all else is in the tests.
conftest.hook.uninstall()
import triton  # noqa: E402 # pyright: ignore
import triton.language as tl  # noqa: E402 # pyright: ignore
from triton.runtime.interpreter import GridExecutor  # noqa: E402 # pyright: ignore

from mechatlas.dictionaries.engine import triton_kernels, triton_screening  # noqa: E402

conftest.hook = shape_checks.install()
from tests.simulated_graph import simulated_graphs  # noqa: E402

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
                searched.append(args[7].clone())

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
        codes = SparseStep(built).select(x, lambda piece, n: [piece(i) for i in range(n)])
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


@torch.no_grad()
def fresh(rule, form, n_latents=18, density=0.2):
    """A dictionary after its first batch; of which a fraction of the pairs learns."""
    built = FORMS[form](n_latents=n_latents, sparsity=RULES[rule])
    x = drawn(64, 20)
    built.initialize(x)
    if "topk" not in rule:
        pre = built.pre_activations(x[:, built.reads]) - built.rule.least_that_learns(built.state)
        built.b_enc -= pre.flatten().quantile(1 - density)
    return built


def on_triton(built, objective=None):
    """A step of Triton's kernels, whatever the device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_steps, "can_compile", lambda _: False)
        patch.setattr(sparse_steps, "can_use_triton", lambda _: True)
        step = SparseStep(built, objective)
    assert step.backend is triton_kernels
    return step


def compare_step(built, x, *, dead=None, objective=None, coefficient=0.7):
    """A step is that of plain torch in float64: loss, latents that fired and all moments."""
    exact = SparseStep(copy.deepcopy(built).double(), objective, compiled=False)
    step = on_triton(built, objective)
    found = step(x, 1e-3, dead, sparsity_coefficient=coefficient)
    wanted = exact(x.double(), 1e-3, dead, sparsity_coefficient=coefficient)
    assert float(found.loss) == pytest.approx(float(wanted.loss), rel=2e-6)
    assert torch.equal(found.fired, wanted.fired)
    assert step.moments.keys() == exact.moments.keys()
    for name, pair in exact.moments.items():
        for mine, theirs in zip(step.moments[name], pair, strict=True):
            size = float(theirs.abs().max())
            torch.testing.assert_close(
                mine.double(), theirs, atol=1e-5 * size, rtol=1e-5, msg=f"{name}"
            )
    return step, exact, wanted


@pytest.mark.parametrize("form", ["plain", "tied", "matryoshka", "transcoder", "crosscoder"])
@pytest.mark.parametrize("rule", ["topk", "batch topk", "relu", "jumprelu", "gated"])
def test_a_step_learns_the_gradients_of_float64(rule, form, monkeypatch):
    monkeypatch.setattr(sparse_steps, "MAX_DENSITY", 1)
    monkeypatch.setattr(sparse_steps, "TILE", 18 * 17)  # of 17 and 18 rows: more than one tile
    monkeypatch.setattr(triton_kernels, "BLOCK", 16)  # of latents: more than one too
    n_rows = 8 if "topk" in rule and form != "plain" else 35  # the bits of more than one word
    x = drawn(n_rows, 20, seed=3)
    x[4] = 0
    dead = (ma.AuxK(k=2), torch.tensor([4, 17])) if form in ("tied", "crosscoder") else None
    objective = ma.Objective(clip=0.02, normalize_mse=True) if form in ("plain", "tied") else None
    built = fresh(rule, form)
    if form == "crosscoder":
        built.W_dec.data[3, 5:] = 0  # a latent that one of the sites does not have
        built.normalize()
    _, exact, wanted = compare_step(built, x, dead=dead, objective=objective)
    assert wanted.fired.any()
    n_used = sum(bool(first.any()) for first, _ in exact.moments.values())
    assert n_used == len(exact.moments)


@pytest.mark.parametrize("rule", ["topk", "relu", "jumprelu", "gated"])
def test_shapes_that_fill_no_block_and_latents_without_codes(rule):
    built = fresh(rule, "plain", n_latents=33)  # four programs of eight latents, and one
    built.b_enc.data[::2] -= 100
    step, _, wanted = compare_step(built, drawn(1, 20, seed=8))
    assert not wanted.fired[::2].any()
    before = built.encoder_rows.clone()
    step(drawn(32, 20, seed=9), 1e-3)
    assert not torch.equal(built.encoder_rows, before)


@pytest.mark.parametrize("rule", ["relu", "jumprelu", "gated"])
def test_dense_codes_are_stepped_too(rule, monkeypatch):
    monkeypatch.setattr(sparse_steps, "MAX_DENSITY", 1)
    compare_step(fresh(rule, "plain", density=0.9), drawn(9, 20, seed=1))


@pytest.mark.parametrize("rule", ["relu", "jumprelu", "gated"])
def test_pre_activations_that_half_precision_cannot_tell_from_their_bound(rule):
    built = fresh(rule, "plain")
    x = 1 + 1e-4 * drawn(7, 20, seed=2)
    low = built.rule.least_that_learns(built.state)
    with torch.no_grad():
        built.b_dec.zero_()
        built.b_enc.copy_(low - x[3] @ built.W_enc)  # some rows above, some below
    pre = x.double() @ built.W_enc.double() + built.b_enc.double() - low
    kept = pre > 0
    assert 0.2 < kept.double().mean() < 0.8
    assert pre.abs().max() < 2.0**-8
    step = on_triton(built)
    bits = []
    learn: Any = triton_kernels._learn

    class Noting:
        def __getitem__(self, grid):
            return lambda *args, **options: (
                bits.append(args[0].clone()) or learn[grid](*args, **options)
            )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_kernels, "_learn", Noting())
        step(x, 1e-3)
    found = (bits[0] >> torch.arange(7)).bitwise_and(1).T.bool()
    sure = pre.abs() > 2e-6  # of numbers nearer to the bound float32 itself is not sure
    assert torch.equal(found[sure], kept[sure])


def test_a_latent_without_numbers_leaves_the_others_as_they_are():
    built = fresh("relu", "plain")
    with torch.no_grad():
        built.encoder_rows[7, 2] = torch.nan
    found = on_triton(built)(drawn(9, 20), 1e-3)
    assert not found.fired[7]
    assert found.fired.any()
    assert built.W_dec.isfinite().all()


@pytest.mark.parametrize(
    ("rule", "form", "clip", "most"),
    [("topk", "plain", None, 31), ("topk", "matryoshka", 0.1, 60), ("topk", "crosscoder", None, 31)]
    + [("batch topk", "plain", None, 40), ("batch topk", "matryoshka", 0.1, 60)]
    + [("relu", "plain", None, 20), ("relu", "tied", 0.1, 60)]
    + [("jumprelu", "plain", None, 21), ("gated", "plain", None, 20)]
    + [("gated", "matryoshka", 0.1, 60)],
)
def test_a_step_is_few_launches_and_waits_for_nothing(rule, form, clip, most, monkeypatch):
    monkeypatch.setattr(sparse_steps.steps, "at_hand", lambda loss: loss)  # as on a device
    step, x = on_triton(fresh(rule, form), ma.Objective(clip=clip)), drawn(3, 20)
    step(x, 1e-3)  # what is made once is made here
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
    places = {name: p.data_ptr() for name, p in step.dictionary.state_dict().items()}
    with Operators() as operators:
        step(x, 1e-3)
    assert not WAITING & set(operators.names)
    assert 12 < sum(operators.names.values()) + len(kernels) <= most
    assert places == {name: p.data_ptr() for name, p in step.dictionary.state_dict().items()}


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
def test_steps_are_those_of_the_cpu(rule, form, steps):
    def trained(make):
        built = fresh(rule, form)
        step = make(built)
        aux = ma.AuxK(k=3), torch.tensor([4, 17])
        dead = aux if form in ("tied", "crosscoder") else None
        losses = [float(step(drawn(5, 20, seed=t), 1e-3, dead).loss) for t in range(steps)]
        return losses, built.state_dict()

    losses, found = trained(on_triton)
    wanted_losses, wanted = trained(SparseStep)
    assert losses == pytest.approx(wanted_losses, rel=1e-4)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=1e-4)


def steps_of(rule, form, n, objective=None, *, halves=False):
    """Results of steps of which all changes that can change, and what they leave."""
    built = fresh(rule, form)
    if halves:
        triton_kernels.keep_halves(built)
    step, aux, none = on_triton(built, objective), ma.AuxK(k=3), torch.tensor([], dtype=torch.long)
    results = []
    for t in range(n):
        if t == 30:
            built.W_dec.data = built.W_dec.data.clone()  # the parameter has moved
        dead = (aux, torch.tensor([4, 17]) if t % 11 == 5 else none) if form == "plain" else None
        x, lr = drawn(2 if t % 9 == 4 else 3, 20, seed=t), 1e-3 * (1 - t / n)
        results.append(step(x, lr, dead, sparsity_coefficient=min(1.0, 2 * (t + 1) / n)))
    moments = [moment for pair in step.moments.values() for moment in pair]
    return [*(t for result in results for t in result), *built.state_dict().values(), *moments]


@pytest.mark.parametrize(
    ("rule", "form", "n", "clip", "halves"),
    [("topk", "plain", 60, None, False), ("batch topk", "matryoshka", 8, 0.1, False)]
    + [("relu", "plain", 8, None, False), ("jumprelu", "crosscoder", 8, None, True)]
    + [("gated", "tied", 8, 0.1, True)],
)
def test_steps_that_a_graph_repeats_are_the_same_to_the_bit(
    rule, form, n, clip, halves, monkeypatch
):
    monkeypatch.setattr(sparse_steps.steps, "at_hand", lambda loss: loss)  # as on a device
    if n < 60:
        monkeypatch.setattr(sparse_steps, "TILE", 18 * 2)  # more than one tile
    wanted = steps_of(rule, form, n, ma.Objective(clip=clip), halves=halves)
    with simulated_graphs() as replays:
        found = steps_of(rule, form, n, ma.Objective(clip=clip), halves=halves)
    assert sum(replays) >= n // 2 - 1 > 2
    assert all(map(torch.equal, found, wanted))


def test_where_nothing_can_be_captured_steps_are_taken_as_ever(monkeypatch):
    monkeypatch.setattr(sparse_steps.steps, "at_hand", lambda loss: loss)
    wanted = steps_of("topk", "plain", 5)

    def refuse(*_, **__):
        raise RuntimeError("no graphs here\nat line 3")

    with simulated_graphs() as replays:
        monkeypatch.setattr(torch.cuda, "graph", refuse)
        with pytest.warns(UserWarning, match="no graphs here$") as said:
            found = steps_of("topk", "plain", 5)
    assert len(said) == 1
    assert not replays
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_that_graphs_repeat_continues_with_the_same_bytes(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(sparse_steps, "can_compile", lambda _: False)
    monkeypatch.setattr(sparse_steps, "can_use_triton", lambda _: True)

    def trained(folder, stop):
        def interrupt(done, _):
            if done == stop:
                raise KeyboardInterrupt

        built = FORMS["plain"](n_latents=18, sparsity=RULES["batch topk"])
        options: dict[str, Any] = {"checkpoint": tmp_path / folder, "checkpoint_every": 4}
        options |= {"steps": 10, "batch_size": 4, "on_progress": interrupt, "dtype": dtype}
        return ma.train(built, drawn(200, 20), **options).state_dict()

    with simulated_graphs() as replays:
        wanted = trained("whole", None)
        n_replays = sum(replays)
        with pytest.raises(KeyboardInterrupt):
            trained("stopped", 5)
        found = trained("stopped", None)
    assert n_replays == 7
    assert wanted["W_dec"].dtype == torch.float32
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@triton.jit
def write(to, values, now, n, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    value = tl.load(values + at, mask=at < n)
    triton_kernels._write(to, at, at < n, value, now, 3)


def rounded_at(number, values):
    """Numbers as the kernels write them in a step."""
    to, now = torch.zeros_like(values, dtype=torch.bfloat16), torch.full((5,), float(number))
    kernel: Any = write
    kernel[(triton.cdiv(len(values), 1024),)](to, values, now, len(values), block=1024)
    return to.float()


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_numbers_are_rounded_to_both_sides_as_likely_as_each_is_near(share):
    low = torch.tensor([1.0, -3.0, 2.0**-80, 6.5e30]).bfloat16().repeat(1024)
    high = (low.view(torch.int16) + 1).view(torch.bfloat16).double()
    low = low.double()
    values = (low + share * (high - low)).float()
    exact = ((values.double() - low) / (high - low)).mean()
    up = torch.stack([rounded_at(t, values) for t in (1, 2, 777_777)]).double() == high
    assert ((rounded_at(1, values).double() == low) | up[0]).all()
    spread = (share * (1 - share) / up.numel()) ** 0.5
    assert abs(up.double().mean() - exact) < 4 * spread
    for a, b in ((up[0], up[1]), (up[1], up[2]), (up[:, 1:], up[:, :-1]), (up[:, 4:], up[:, :-4])):
        together = (a.double() - share) * (b.double() - share)  # of other steps, and of neighbors
        assert abs(together.mean()) < 4 * share * (1 - share) / together.numel() ** 0.5
    assert torch.equal(rounded_at(1, values), rounded_at(1, values))
    assert torch.equal(rounded_at(5, low.float()).double(), low)  # nothing to round


@pytest.mark.parametrize(
    ("rule", "form"),
    [("topk", "plain"), ("batch topk", "tied"), ("relu", "transcoder"), ("jumprelu", "matryoshka")]
    + [("gated", "crosscoder")],
)
def test_in_bfloat16_a_step_is_that_of_float64_but_for_one_rounding(rule, form):
    built = fresh(rule, form)
    triton_kernels.keep_halves(built)
    exact = SparseStep(copy.deepcopy(built).double(), compiled=False)
    step, x = on_triton(built), drawn(9, 20, seed=3)
    dead = (ma.AuxK(k=2), torch.tensor([4, 17]))
    found, wanted = step(x, 1e-2, dead), exact(x.double(), 1e-2, dead)
    assert float(found.loss) == pytest.approx(float(wanted.loss), rel=2e-6)
    assert torch.equal(found.fired, wanted.fired)
    assert found.fired.any()
    for name, pair in exact.moments.items():
        for mine, theirs in zip(step.learned(name), exact.learned(name), strict=True):
            halves = name in ("W_dec", "W_enc")
            assert mine.dtype == (torch.bfloat16 if halves else torch.float32)
            sure = pair[0].abs() > 1e-4 * pair[0].abs().max()  # Adam divides by it at first
            one = 2.0**-7 if halves else 1e-4
            gap = (mine.double() - theirs).abs() - one * theirs.abs() - 1e-9
            assert (gap[sure] <= 0).all(), name
    assert (built.W_dec.data.float().norm(dim=1) - 1).abs().max() < 0.05 or form == "crosscoder"


def test_in_bfloat16_there_is_no_other_copy_of_the_encoder():
    built = fresh("topk", "plain")
    size = built.W_dec.numel()
    triton_kernels.keep_halves(built)
    step = on_triton(built)
    step(drawn(9, 20), 1e-3)
    rows, bias = built.encoder_rows, built.b_enc.data
    screen = triton_kernels.Screen(rows, bias)
    assert screen.half.data_ptr() == rows.data_ptr()
    check_largest(rows, bias, drawn(5, 20, seed=2), 3)
    kept = [t for name in ("W_dec", "W_enc") for t in step.learned(name)]
    n_bytes = sum(t.untyped_storage().nbytes() for t in kept)
    assert n_bytes == 2 * (6 * size + triton_screening.EXTRA * built.n_latents)


def test_in_bfloat16_rows_are_encoded_and_latents_resampled():
    built, x, dead = fresh("jumprelu", "plain"), drawn(64, 20, seed=5), torch.tensor([4, 17])
    triton_kernels.keep_halves(built)
    exact = copy.deepcopy(built).float()
    wanted = exact.encode(x)
    assert (built.encode(x) - wanted).abs().mean() < 0.02 * wanted.mean()
    assert (built(x) - exact(x)).abs().mean() < 0.02 * x.abs().mean()
    for each in (built, exact):
        resample(each, dead, {}, x, torch.Generator().manual_seed(1))
    for name, tensor in exact.named_parameters():
        found = dict(built.named_parameters())[name]
        torch.testing.assert_close(found.float(), tensor, atol=0.03, rtol=0.03)
    assert built.encoder_rows.stride(0) == 20 + triton_screening.EXTRA
