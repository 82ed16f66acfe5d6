import copy
import itertools
import multiprocessing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechatlas.base import NonFiniteError
from mechatlas.dictionaries.autoencoder import Autoencoder, Crosscoder, LinearCoder, Transcoder
from mechatlas.dictionaries.engine import fallback, kernels, sparse_steps, steps, threads
from mechatlas.dictionaries.engine.resampling import resample
from mechatlas.dictionaries.engine.sparse_steps import SparseStep, step_for
from mechatlas.dictionaries.engine.steps import AutogradStep
from mechatlas.dictionaries.metrics import evaluate
from mechatlas.dictionaries.objective import Objective
from mechatlas.dictionaries.revival import AuxK, Resample
from mechatlas.dictionaries.sparsity import BatchTopK, Gated, JumpReLU, ReLU, TopK
from mechatlas.dictionaries.training import train
from tests.dictionaries.test_autoencoder import planted

TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
BACKENDS = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
PRECISION = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)]
)
M = 300
RULES = {
    "topk": TopK(k=7),
    "batchtopk": BatchTopK(k=7),
    "relu": ReLU(l1=0.7),
    "jumprelu": JumpReLU(l0=0.3, threshold=0.6, bandwidth=0.5),
    "gated": Gated(l1=0.4),
}
WIDTHS = {"a": 6, "b": 9, "c": 5}
FORMS = {
    "untied": lambda rule: Autoencoder(d_in=20, n_latents=M, sparsity=rule),
    "tied": lambda rule: Autoencoder(d_in=20, n_latents=M, sparsity=rule, tied=True),
    "matryoshka": lambda rule: Autoencoder(
        d_in=20, n_latents=M, sparsity=rule, matryoshka_widths=(17, 100, 260)
    ),
    "transcoder": lambda rule: Transcoder(d_in=7, d_out=13, n_latents=M, sparsity=rule),
    "crosscoder": lambda rule: Crosscoder(widths=WIDTHS, n_latents=M, sparsity=rule),
    "tied crosscoder": lambda rule: Crosscoder(
        widths=WIDTHS, n_latents=M, sparsity=rule, tied=True, matryoshka_widths=(40,)
    ),
    "of one site": lambda rule: Crosscoder(
        widths=WIDTHS, n_latents=M, sparsity=rule, reads="b", matryoshka_widths=(150,)
    ),
}
CASES = pytest.mark.parametrize(
    ("rule", "form"), list(itertools.product(RULES, FORMS)), ids=lambda name: name
)


def in_general_position(dictionary: LinearCoder, dtype=torch.float32) -> LinearCoder:
    """The dictionary with encoder, biases and atoms moved, and few latents above zero."""
    random = torch.Generator().manual_seed(0)
    built = dictionary.to(dtype)
    with torch.no_grad():
        for name, p in built.named_parameters():
            if name != "W_dec":
                p += 0.1 * torch.randn(p.shape, generator=random, dtype=dtype)
        built.b_enc.sub_(1.2 if isinstance(built.sparsity, ReLU | JumpReLU | Gated) else 0)
    return built


def random_dictionary(tied: bool, dtype=torch.float32, d_in=20, n_latents=M, k=7) -> LinearCoder:
    built = Autoencoder(d_in=d_in, n_latents=n_latents, sparsity=TopK(k=k), tied=tied)
    return in_general_position(built, dtype)


def batch(n=100, d_in=20, dtype=torch.float32, seed=0):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients_from_moments(step) -> dict[str, torch.Tensor]:
    """After one step the first moment is a tenth of the gradient."""
    named = {name.lstrip("_"): first * 10 for name, (first, _) in step.moments.items()}
    if "_W_enc" in step.moments:
        named["W_enc"] = named["W_enc"].T
    return named


def lengths(atoms, edges):
    parts = [atoms[:, low:high] for low, high in itertools.pairwise(edges)]
    return torch.stack([part.norm(dim=1) for part in parts]).sum(dim=0)


def written_out(built: LinearCoder, x, sparsity_coefficient) -> dict[str, torch.Tensor]:
    """Gradients by autograd from formulas of its own, as plain as they can be."""
    state: dict[str, torch.Tensor] = dict(built.named_parameters())
    y, read = x[:, built.writes], x[:, built.reads]
    encoder = built.W_dec.T if built.tied else state["_W_enc"]
    pre = (read - built.b_dec if built.subtracts_b_dec else read) @ encoder + built.b_enc
    rule, n = built.sparsity, len(x)
    penalty = torch.zeros(())
    if isinstance(rule, TopK):
        code = pre.relu() * (pre >= pre.sort(dim=1).values[:, [-rule.k]])
    elif isinstance(rule, BatchTopK):
        code = pre.relu() * (pre >= pre.flatten().sort().values[-rule.k * n])
    elif isinstance(rule, ReLU):
        code = pre.relu()
        penalty = rule.l1 * code.sum()
    elif isinstance(rule, Gated):
        code = (pre > 0) * (state["r_mag"].exp() * pre + state["b_mag"]).relu()
        of_gates = pre.relu() @ built.W_dec.detach() + built.b_dec.detach()
        penalty = rule.l1 * pre.relu().sum() + (y - of_gates).square().sum()
    else:
        threshold = state["log_threshold"].exp()
        # The straight-through estimators, as surrogates with just these derivatives.
        near = ((pre - threshold).abs() < rule.bandwidth / 2).detach() / rule.bandwidth
        open_ = (pre > threshold).detach()
        moved = -(threshold - threshold.detach()) * near
        code = pre * open_ + moved * threshold.detach()
        penalty = rule.l0 * (open_ + moved).sum()
    loss = sparsity_coefficient * penalty
    for n_first in built.matryoshka_widths:
        rebuilt = code[:, :n_first] @ built.W_dec[:n_first] + built.b_dec
        loss = loss + (y - rebuilt).square().sum() / len(built.matryoshka_widths)
    (loss / n).backward()
    found = {name.lstrip("_"): p.grad for name, p in state.items() if p.grad is not None}
    if "W_enc" in found:
        found["W_enc"] = found["W_enc"].T
    # Of an atom, what is at right angles to the normal of the surface of equal length.
    atoms = built.W_dec.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(lengths(atoms, built.edges).sum(), atoms)
    normal = slope / slope.norm(dim=1, keepdim=True)
    found["W_dec"] = found["W_dec"] - (found["W_dec"] * normal).sum(1, keepdim=True) * normal
    return {"loss": (loss / n).detach(), **found}


EVERY_WAY = list(itertools.product(RULES, FORMS, ["compiled", "by columns", "torch", "autograd"]))


@pytest.mark.parametrize(("rule", "form", "way"), EVERY_WAY)
def test_gradients_equal_those_of_autograd(rule, form, way, monkeypatch):
    for module in (steps, sparse_steps):
        monkeypatch.setattr(module, "TILE", M * 33)  # more than one tile, and a short one
    monkeypatch.setattr(sparse_steps, "MAX_DENSITY", 1)
    monkeypatch.setattr(sparse_steps, "COLUMN_SPLIT_SIZE", 0 if way == "by columns" else 2**24)
    dictionary = in_general_position(FORMS[form](RULES[rule]), torch.float64)
    x = batch(dtype=torch.float64)
    wanted = written_out(dictionary, x, 0.6)
    sparse = way != "autograd"
    step = SparseStep(dictionary, compiled=way != "torch") if sparse else AutogradStep(dictionary)
    assert step(x, 1e-3, sparsity_coefficient=0.6).loss == pytest.approx(
        float(wanted.pop("loss")), rel=1e-12
    )
    found = gradients_from_moments(step)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-10, msg=name)
    length = lengths(dictionary.W_dec.detach(), dictionary.edges)
    torch.testing.assert_close(length, torch.ones_like(length))


@CASES
@BACKENDS
@PRECISION
def test_steps_equal_those_of_the_dense_trainer(
    rule, form, compiled, dtype, tolerance, monkeypatch
):
    monkeypatch.setattr(sparse_steps, "MAX_DENSITY", 1)
    ours = in_general_position(FORMS[form](RULES[rule]), dtype)
    dense = copy.deepcopy(ours)
    objective = Objective(normalize_mse=True, clip=0.05)
    sparse_step = SparseStep(ours, objective, compiled=compiled)
    dense_step = AutogradStep(dense, objective)
    for seed in range(4):
        x = batch(dtype=dtype, seed=seed)
        found, wanted = sparse_step(x, 1e-2), dense_step(x, 1e-2)
        assert found.loss == pytest.approx(wanted.loss, rel=tolerance * 20)
        assert torch.equal(found.fired, wanted.fired)
        for name, theirs in dense.state_dict().items():
            # Adam divides by the gradient's size, so one of almost zero is mostly rounding.
            off = (ours.state_dict()[name] - theirs).abs().flatten().sort().values
            assert off[int(0.999 * (len(off) - 1))] <= tolerance, name
            assert off[-1] <= 1e4 * tolerance, name


@pytest.mark.parametrize("clip", [None, 0.05])
def test_wide_atoms_are_stepped_like_narrow_ones(clip, monkeypatch):
    widths, x = {"a": 300, "b": 450, "c": 333}, batch(60, 300 + 450 + 333, torch.float64)
    steps_of = {}
    for wide in (0, 2**24):
        monkeypatch.setattr(sparse_steps, "COLUMN_SPLIT_SIZE", wide)
        built = Crosscoder(widths=widths, n_latents=50, sparsity=TopK(k=5), reads="b")
        step = SparseStep(built.double(), Objective(clip=clip), compiled=True)
        losses = [step(x, 1e-2).loss for _ in range(3)]
        steps_of[wide] = losses, list(built.parameters())
    assert steps_of[0][0] == pytest.approx(steps_of[2**24][0], rel=1e-12)
    for mine, theirs in zip(steps_of[0][1], steps_of[2**24][1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


def test_relative_errors_weigh_rows_by_their_length():
    dictionary = random_dictionary(False, torch.float64)
    x = batch(dtype=torch.float64) * torch.logspace(-1, 1, 100, dtype=torch.float64)[:, None]
    x[7] = 0
    step = SparseStep(dictionary, Objective(normalize_mse=True), compiled=True)
    left = (x - dictionary(x)).detach().square().sum(dim=1)
    squares = x.square().sum(dim=1)
    wanted = (left / squares.clamp_min(squares.mean() / 1000)).mean()
    assert step(x, 1e-3).loss == pytest.approx(float(wanted), rel=1e-10)


@BACKENDS
def test_clipping_limits_the_norm_of_the_whole_gradient(compiled):
    norms = []
    for clip in (None, 0.5):
        dictionary = random_dictionary(False, torch.float64)
        step = SparseStep(dictionary, Objective(clip=clip), compiled=compiled)
        step(batch(dtype=torch.float64), 1e-3)
        gradients = gradients_from_moments(step).values()
        norms.append(sum(float(g.square().sum()) for g in gradients) ** 0.5)
    assert norms[0] > 0.6
    assert norms[1] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="clip must be > 0, got -1"):
        Objective(clip=-1.0)


@pytest.mark.parametrize("rule", [ReLU(l1=0.1), JumpReLU(threshold=0.01, bandwidth=0.01)])
def test_codes_that_are_not_sparse_are_left_to_autograd(rule):
    ours = Autoencoder(d_in=20, n_latents=M, sparsity=rule)
    dense = copy.deepcopy(ours)
    sparse_step, dense_step = SparseStep(ours), AutogradStep(dense)
    for seed in range(3):
        x = batch(seed=seed)
        assert (ours.encode(x) != 0).float().mean() > sparse_steps.MAX_DENSITY
        assert sparse_step(x, 1e-2).loss == dense_step(x, 1e-2).loss
    assert sparse_step.n_steps == 3
    for mine, theirs in zip(ours.parameters(), dense.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for name, pair in dense_step.moments.items():
        mine = sparse_step.moments[name.lstrip("_")]
        theirs = [moment.T if name == "_W_enc" else moment for moment in pair]
        assert all(map(torch.equal, mine, theirs))


@given(st.integers(1, 30), st.integers(2, 60), st.integers(0, 99), st.floats(-1, 3), st.booleans())
def test_a_batch_keeps_its_largest_whatever_was_guessed(n, m, seed, guess, compiled):
    random = torch.Generator().manual_seed(seed)
    k = 1 + seed % min(m, 5)
    built = Autoencoder(d_in=m, n_latents=m, sparsity=BatchTopK(k=k))
    with torch.no_grad():
        built.W_dec.copy_(torch.eye(m))
        built._W_enc.copy_(torch.eye(m))
        built.state["threshold"].fill_(guess)
    x = torch.randn(n, m, generator=random)
    step = sparse_steps.SparseStep(built, compiled=compiled)
    codes = step.select(x, lambda piece, n: [piece(i) for i in range(n)])
    assert codes is not None
    assert torch.equal(as_rows(codes, m), built.rule.training_code(x, built.state))


def as_rows(codes, n_latents):
    """Codes of each row, with zeros."""
    rows = fallback.rows_of(codes)
    found = torch.zeros(len(codes.starts) - 1, n_latents)
    return found.index_put((rows.long(), codes.latents.long()), codes.values)


@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 12), st.integers(0, 99))
def test_the_largest_of_a_batch_are_from_all_of_its_tiles(n_rows, tile, n, seed):
    random = torch.Generator().manual_seed(seed)
    pre = torch.randn(n_rows, 7, generator=random) - seed % 3
    bias = torch.randn(7, generator=random)
    n = min(n, pre.numel())
    codes = fallback.largest_of_batch([part.clone() for part in pre.split(tile)], bias, n)
    assert len(codes.values) == n
    whole = (pre + bias).flatten()
    top = whole.topk(n)
    wanted = torch.zeros_like(whole).scatter_(0, top.indices, top.values.relu())
    assert torch.equal(as_rows(codes, 7), wanted.view_as(pre))


def test_the_threshold_of_a_batch_gives_its_l0_to_single_rows():
    x, _ = planted(8000)
    built = Autoencoder(d_in=24, n_latents=96, sparsity=BatchTopK(k=3))
    history = train(built, torch.from_numpy(x), steps=300, batch_size=256).history
    assert history is not None
    assert history.l0[-1] == pytest.approx(3, rel=0.1)
    code = built.encode(torch.from_numpy(x[:2000]))
    assert float((code != 0).sum(dim=1).float().mean()) == pytest.approx(3, rel=0.1)
    assert (code != 0).sum(dim=1).unique().numel() > 2, "rows share out the batch's latents"


@TIED
@BACKENDS
def test_two_hundred_steps_explain_as_much_as_dense_ones(tied, compiled, monkeypatch):
    x, _ = planted(8000)
    x = torch.from_numpy(x)

    def trained(make_step) -> float:
        built = Autoencoder(d_in=24, n_latents=96, sparsity=TopK(k=3), tied=tied)
        monkeypatch.setattr(Autoencoder, "step", lambda dictionary, *_: make_step(dictionary))
        return evaluate(train(built, x, steps=200, batch_size=256), x[:2000]).fvu

    found = trained(lambda dictionary: SparseStep(dictionary, compiled=compiled))
    assert found == pytest.approx(trained(AutogradStep), abs=1e-4)


@settings(max_examples=60)
@given(
    st.integers(1, 6),
    st.integers(1, 700),
    st.data(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_the_selection_is_that_of_torch(n, m, data, dtype):
    k = data.draw(st.integers(1, min(m, 300)))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    # Random permutations have no ties; half of the entries are below zero.
    pre = torch.stack([torch.randperm(m, generator=random) for _ in range(n)]).to(dtype) - m // 2
    bias = torch.zeros(m, dtype=dtype)
    values, latents = torch.zeros(n, k, dtype=dtype), torch.zeros(n, k, dtype=torch.int32)
    kernels.select(pre, bias, k, values, latents)
    wanted = pre.topk(k)
    dense = torch.zeros_like(pre).scatter(1, wanted.indices, wanted.values.relu())
    assert torch.equal(torch.zeros_like(pre).scatter(1, latents.long(), values), dense)
    assert torch.equal(latents.long().sort().values, wanted.indices.sort().values)


@given(st.integers(1, 40), st.data())
def test_among_equals_any_are_selected_but_as_many_as_asked(m, data):
    k = data.draw(st.integers(1, m))
    pre = torch.tensor([data.draw(st.lists(st.integers(0, 3), min_size=m, max_size=m))]).float()
    values, latents = torch.zeros(1, k), torch.zeros(1, k, dtype=torch.int32)
    kernels.select(pre, torch.zeros(m), k, values, latents)
    assert len(set(latents[0].tolist())) == k
    assert torch.equal(values[0].sort().values, pre.topk(k).values[0].sort().values)
    assert torch.equal(values[0], pre[0, latents[0].long()])


def test_codes_are_grouped_by_latent_in_the_order_of_rows():
    values = torch.tensor([1.0, 2.0, 0.0, 3.0, 4.0, 5.0])
    latents = torch.tensor([3, 0, 1, 3, 0, 2], dtype=torch.int32)
    order, starts = kernels.group(latents, values, 5)
    assert starts.tolist() == [0, 2, 2, 3, 5, 5]
    assert order[:5].tolist() == [1, 4, 5, 0, 3]


@TIED
@pytest.mark.parametrize("wide", [0, 2**24], ids=["by columns", "by rows"])
def test_the_number_of_threads_does_not_change_a_bit(tied, wide, monkeypatch):
    monkeypatch.setattr(sparse_steps, "TILE", 2048 * 64)
    monkeypatch.setattr(sparse_steps, "COLUMN_SPLIT_SIZE", wide)
    before = torch.get_num_threads()
    runs = []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        dictionary = random_dictionary(tied, d_in=64, n_latents=2048)
        step = SparseStep(dictionary, compiled=True)
        for seed in range(3):
            step(batch(400, 64, seed=seed), 1e-2)
        assert torch.get_num_threads() == n_threads
        runs.append([p.detach().numpy().tobytes() for p in dictionary.parameters()])
    torch.set_num_threads(before)
    assert runs[0] == runs[1] == runs[2]


def _squares(answers):
    with threads.workers(torch.device("cpu")) as run:
        answers.put(run(lambda i: i * i, 4))


def test_a_forked_process_has_threads_of_its_own():
    """Those of the parent do not exist in it; waiting for them would never end."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with threads.workers(torch.device("cpu")) as run:
        assert run(lambda i: i, 3) == [0, 1, 2]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_squares, args=(answers,))
    child.start()
    assert answers.get(timeout=60) == [0, 1, 4, 9]
    child.join(60)
    assert child.exitcode == 0
    torch.set_num_threads(before)


@TIED
@BACKENDS
def test_a_latent_that_never_fires_keeps_its_place(tied, compiled):
    dictionary = random_dictionary(tied)
    with torch.no_grad():
        dictionary.b_enc[5] = -1e6
    kept = dictionary.W_dec[5].detach().clone(), dictionary.W_enc[:, 5].detach().clone()
    step = SparseStep(dictionary, compiled=compiled)
    assert not any(bool(step(batch(seed=seed), 1e-2).fired[5]) for seed in range(3))
    torch.testing.assert_close(dictionary.W_dec[5], kept[0])
    torch.testing.assert_close(dictionary.W_enc[:, 5], kept[1])


@TIED
@BACKENDS
def test_dead_latents_learn_from_the_residual_as_autograd_says(tied, compiled):
    dictionary = random_dictionary(tied, torch.float64)
    dead, aux, x = torch.arange(3, 300, 7), AuxK(k=5, auxk_alpha=0.3), batch(dtype=torch.float64)
    loss = (x - dictionary(x)).square().sum(dim=-1).mean()
    left = (x - dictionary(x)).detach()
    pre = (x - dictionary.b_dec.detach()) @ dictionary.W_enc[:, dead] + dictionary.b_enc[dead]
    rebuilt = TopK(k=5)(pre) @ dictionary.W_dec[dead]
    error = (left - rebuilt).square().sum(dim=-1).mean() / left.square().mean()
    (loss + 0.3 * error).backward()
    wanted = dictionary.W_dec.grad
    assert wanted is not None
    normal = dictionary.W_dec / dictionary.W_dec.norm(dim=1, keepdim=True)
    wanted = wanted - (wanted * normal).sum(dim=1, keepdim=True) * normal
    names = {"b_enc": dictionary.b_enc.grad, "b_dec": dictionary.b_dec.grad, "W_dec": wanted}
    if not tied:
        assert dictionary._W_enc.grad is not None
        names["W_enc"] = dictionary._W_enc.grad.T
    copied = copy.deepcopy(dictionary)
    step = SparseStep(dictionary, compiled=compiled)
    step(x, 1e-3, (aux, dead))
    found = gradients_from_moments(step)
    for name, gradient in names.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-10, msg=name)
    AutogradStep(copied)(x, 1e-3, (aux, dead))
    for mine, theirs in zip(dictionary.parameters(), copied.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_revival_lowers_the_dead_share_and_explains_more():
    x, _ = planted(6000, d=48, atoms=256)

    def last(revival) -> tuple[float, float]:
        built = Autoencoder(d_in=48, n_latents=256, sparsity=TopK(k=3))
        with torch.no_grad():
            built._W_enc[:, :128] *= 0.05  # too weak to be among the largest
        history = train(built, x, steps=400, batch_size=256, lr=3e-3, revival=revival).history
        assert history is not None
        return history.dead_share[-1], history.fvu[-1]

    dead, unexplained = last(None)
    assert dead > 0.4
    revived, left = last(AuxK(k=12, dead_after_rows=5000))
    assert revived < 0.05
    assert left < 0.7 * unexplained
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        AuxK(k=0)
    resampled, left = last(Resample(every=50, dead_after_rows=5000))
    assert resampled < 0.05
    assert left < 0.8 * unexplained
    with pytest.raises(ValueError, match=r"until must be in \(0, 1\], got 0.0"):
        Resample(until=0.0)


@pytest.mark.parametrize("form", ["untied", "tied", "transcoder", "crosscoder", "of one site"])
def test_a_resampled_latent_reads_and_writes_a_row_and_nothing_else_changes(form):
    built = in_general_position(FORMS[form](TopK(k=7)))
    step, x = SparseStep(built), batch()
    step(x, 1e-3)
    before = copy.deepcopy(built)
    moments = {n: [m.clone() for m in pair] for n, pair in step.moments.items()}
    dead = torch.tensor([2, 50, 299])
    random = torch.Generator().manual_seed(0)
    resample(built, dead, step.moments, x, random)
    kept = torch.ones(M, dtype=torch.bool)
    kept[dead] = False
    torch.testing.assert_close(built.W_dec[kept], before.W_dec[kept])
    torch.testing.assert_close(built.b_enc[kept], before.b_enc[kept])
    torch.testing.assert_close(lengths(built.W_dec, built.edges), torch.ones(M))
    rows = torch.nn.functional.normalize(x[:, built.writes] - built.b_dec, dim=1)
    atoms = torch.nn.functional.normalize(built.W_dec[dead], dim=1)
    assert (atoms @ rows.T).max(dim=1).values.min() > 1 - 1e-5
    for name, pair in step.moments.items():
        for mine, was in zip(pair, moments[name], strict=True):
            if name != "b_dec":
                assert not mine[dead].any()
                assert torch.equal(mine[kept], was[kept])


def test_where_codes_are_penalised_a_resampled_latent_fires_at_few_rows_and_its_own():
    built = in_general_position(FORMS["untied"](ReLU(l1=0.7)))
    x, dead = batch(), torch.tensor([2, 50, 299])
    resample(built, dead, step_for(built).moments, x, torch.Generator().manual_seed(0))
    code = built.encode(x)
    living = float((code > 0).float().mean())
    assert (code[:, dead] > 0).float().mean(dim=0).max() < 6 * living
    rows = torch.nn.functional.normalize(x - built.b_dec, dim=1)
    its_row = (rows @ built.W_dec[dead].T).argmax(dim=0)
    assert (code[its_row, dead] > 0).all()


def test_if_all_latents_are_dead_all_start_again():
    built = in_general_position(FORMS["untied"](ReLU()))
    moments = step_for(built).moments
    resample(built, torch.arange(M), moments, batch(), torch.Generator().manual_seed(0))
    assert built.W_enc.isfinite().all()


@pytest.mark.parametrize("rule", [Gated(), JumpReLU(threshold=0.4)])
def test_what_a_rule_has_learnt_of_a_resampled_latent_starts_again(rule):
    built = in_general_position(FORMS["untied"](rule))
    step, x = step_for(built), batch()
    step(x, 1e-1)
    was = {name: value.clone() for name, value in built.state.items()}
    dead = torch.tensor([2, 50, 299])
    kept = torch.ones(M, dtype=torch.bool)
    kept[dead] = False
    resample(built, dead, step.moments, x, torch.Generator().manual_seed(0))
    for name, start in built.rule.parameters(M).items():
        assert torch.equal(built.state[name][dead], start[dead])
        assert torch.equal(built.state[name][kept], was[name][kept])
        assert not any(moment[dead].any() for moment in step.moments[name])


def test_only_rules_with_sparse_gradients_are_stepped_sparsely():
    other = Autoencoder(d_in=4, n_latents=8, sparsity=torch.relu)
    assert isinstance(step_for(other), AutogradStep)
    assert isinstance(step_for(random_dictionary(False)), SparseStep)
    with pytest.raises(
        ValueError, match="A sparse step needs a sparsity rule with `find_codes`, got"
    ):
        SparseStep(other)


def test_without_numba_torch_takes_the_steps(monkeypatch):
    monkeypatch.setattr(sparse_steps.importlib.util, "find_spec", lambda name: None)
    assert SparseStep(random_dictionary(False)).backend is fallback


@BACKENDS
def test_training_that_diverges_stops(compiled, monkeypatch):
    def step(dictionary, *_):
        return SparseStep(dictionary, compiled=compiled)

    monkeypatch.setattr(Autoencoder, "step", step)
    x = torch.randn(200, 24)
    built = Autoencoder(d_in=24, n_latents=40, sparsity=TopK(k=3))
    with pytest.raises(NonFiniteError, match=r"The loss became (inf|nan) at step [12]: training"):
        train(built, x, steps=3, batch_size=50, lr=1e25)
