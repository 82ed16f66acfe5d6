import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechatlas.base import NonFiniteError
from mechatlas.dictionaries import fallback, kernels, steps
from mechatlas.dictionaries.autoencoder import Autoencoder
from mechatlas.dictionaries.metrics import evaluate
from mechatlas.dictionaries.revival import AuxK
from mechatlas.dictionaries.sparsity import TopK
from mechatlas.dictionaries.steps import AutogradStep, SparseStep, step_for
from mechatlas.dictionaries.training import train
from tests.dictionaries.test_autoencoder import planted

PARTS = {"compiled": kernels, "torch": fallback}
FORMS = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
BACKENDS = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])


def random_dictionary(tied: bool, dtype=torch.float32, d_in=20, n_latents=300, k=7) -> Autoencoder:
    """One whose encoder, biases and atoms are all in general position."""
    random = torch.Generator().manual_seed(0)
    built = Autoencoder(d_in=d_in, n_latents=n_latents, sparsity=TopK(k=k), tied=tied).to(dtype)
    with torch.no_grad():
        for name, p in built.named_parameters():
            if name != "W_dec":
                p += 0.1 * torch.randn(p.shape, generator=random, dtype=dtype)
    return built


def batch(n=100, d_in=20, dtype=torch.float32, seed=0):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients_from_moments(step: SparseStep) -> dict[str, torch.Tensor]:
    """After one step the first moment is a tenth of the gradient."""
    return {name: first * 10 for name, (first, _) in step.moments.items()}


@FORMS
@BACKENDS
def test_gradients_equal_those_of_autograd(tied, compiled, monkeypatch):
    monkeypatch.setattr(steps, "TILE", 300 * 33)  # more than one tile, and a short one
    dictionary = random_dictionary(tied, torch.float64)
    x = batch(dtype=torch.float64)
    loss = (x - dictionary(x)).square().sum(dim=-1).mean()
    loss.backward()
    wanted = {
        name.lstrip("_"): p.grad.clone()
        for name, p in dictionary.named_parameters()
        if p.grad is not None
    }
    if not tied:
        wanted["W_enc"] = wanted["W_enc"].T
    along = (wanted["W_dec"] * dictionary.W_dec).sum(dim=1, keepdim=True)
    wanted["W_dec"] -= (along * dictionary.W_dec).detach()
    step = SparseStep(dictionary, compiled=compiled)
    assert step(x, 1e-3).loss == pytest.approx(float(loss.detach()), rel=1e-12)
    found = gradients_from_moments(step)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


@FORMS
@BACKENDS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_steps_equal_those_of_the_dense_trainer(tied, compiled, dtype, tolerance):
    ours = random_dictionary(tied, dtype)
    dense = copy.deepcopy(ours)
    sparse_step, dense_step = SparseStep(ours, compiled=compiled), AutogradStep(dense)
    for seed in range(5):
        x = batch(dtype=dtype, seed=seed)
        found, wanted = sparse_step(x, 1e-2), dense_step(x, 1e-2)
        assert found.loss == pytest.approx(wanted.loss, rel=tolerance * 10)
        assert torch.equal(found.fired, wanted.fired)
        for mine, theirs in zip(ours.parameters(), dense.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


@FORMS
@BACKENDS
def test_two_hundred_steps_explain_as_much_as_dense_ones(tied, compiled, monkeypatch):
    x, _ = planted(8000)
    x = torch.from_numpy(x)

    def trained(make_step) -> float:
        built = Autoencoder(d_in=24, n_latents=96, sparsity=TopK(k=3), tied=tied)
        monkeypatch.setattr("mechatlas.dictionaries.training.step_for", make_step)
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


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_codes_are_grouped_by_latent_in_the_order_of_rows(parts):
    values = torch.tensor([[1.0, 2.0], [0.0, 3.0], [4.0, 5.0]])
    latents = torch.tensor([[3, 0], [1, 3], [0, 2]], dtype=torch.int32)
    order, starts = parts.group(values, latents, 5)
    assert starts.tolist() == [0, 2, 2, 3, 5, 5]
    assert order[:5].tolist() == [1, 4, 5, 0, 3]


@FORMS
def test_the_number_of_threads_does_not_change_a_bit(tied, monkeypatch):
    monkeypatch.setattr(steps, "TILE", 2048 * 64)
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


@FORMS
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


@FORMS
@BACKENDS
def test_dead_latents_learn_from_the_residual_as_autograd_says(tied, compiled):
    dictionary = random_dictionary(tied, torch.float64)
    dead, aux, x = torch.arange(3, 300, 7), AuxK(k=5, weight=0.3), batch(dtype=torch.float64)
    loss = (x - dictionary(x)).square().sum(dim=-1).mean()
    left = (x - dictionary(x)).detach()
    pre = (x - dictionary.b_dec.detach()) @ dictionary.W_enc[:, dead] + dictionary.b_enc[dead]
    rebuilt = TopK(k=5)(pre) @ dictionary.W_dec[dead]
    (loss + 0.3 * (left - rebuilt).square().sum(dim=-1).mean()).backward()
    wanted = dictionary.W_dec.grad
    assert wanted is not None
    wanted = wanted - (wanted * dictionary.W_dec).sum(dim=1, keepdim=True) * dictionary.W_dec
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

    def last(aux) -> tuple[float, float]:
        built = Autoencoder(d_in=48, n_latents=256, sparsity=TopK(k=3))
        with torch.no_grad():
            built._W_enc[:, :128] *= 0.05  # too weak to be among the largest
        history = train(built, x, steps=400, batch_size=256, lr=3e-3, aux=aux).history
        assert history is not None
        return history.dead_share[-1], history.fvu[-1]

    dead, unexplained = last(None)
    assert dead > 0.4
    revived, left = last(AuxK(k=12, dead_after_rows=5000))
    assert revived < 0.05
    assert left < 0.7 * unexplained
    with pytest.raises(ValueError, match=r"k \(0\), weight"):
        AuxK(k=0)


def test_only_topk_is_stepped_sparsely():
    other = Autoencoder(d_in=4, n_latents=8, sparsity=torch.relu)
    assert isinstance(step_for(other), AutogradStep)
    assert isinstance(step_for(random_dictionary(False)), SparseStep)
    with pytest.raises(ValueError, match="A sparse step needs TopK, got"):
        SparseStep(other)


def test_without_numba_torch_takes_the_steps(monkeypatch):
    monkeypatch.setattr(steps.importlib.util, "find_spec", lambda name: None)
    assert SparseStep(random_dictionary(False)).parts is fallback


@BACKENDS
def test_training_that_diverges_stops(compiled, monkeypatch):
    make = "mechatlas.dictionaries.training.step_for"
    monkeypatch.setattr(make, lambda dictionary: SparseStep(dictionary, compiled=compiled))
    x = torch.randn(200, 24) * 1e30
    built = Autoencoder(d_in=24, n_latents=40, sparsity=TopK(k=3))
    with pytest.raises(NonFiniteError, match=r"The loss became (inf|nan) at step 1: training"):
        train(built, x, steps=3, batch_size=50)
