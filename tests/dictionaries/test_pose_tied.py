"""Pose-tied dictionaries: exact equivariance, exact gradients, and fewer samples needed."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mechatlas.base import InputError
from mechatlas.dictionaries.autoencoder import Crosscoder
from mechatlas.dictionaries.engine.posed_steps import PosedStep
from mechatlas.dictionaries.formats import load, save
from mechatlas.dictionaries.metrics import evaluate
from mechatlas.dictionaries.objective import Objective
from mechatlas.dictionaries.pose_tied import PoseTied
from mechatlas.dictionaries.revival import AuxK
from mechatlas.dictionaries.sparsity import ReLU, TopK
from mechatlas.dictionaries.training import train
from mechatlas.maths.groups import Group
from mechatlas.maths.named_groups import group
from tests.conformance import CHECKS
from tests.dictionaries.test_checkpoints import KilledError, kill_after

GROUPS = ["C1", "C4", "D4", "Q8", "S3"]


def general(name: str, d: int = 5, families: int = 6, k: int = 4, dtype=torch.float64) -> PoseTied:
    """One with no number at its start."""
    g = group(name)
    built = PoseTied(
        group=g, d_in=g.order * d, n_latents=g.order * families, sparsity=TopK(k=k)
    ).to(dtype)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (built._encoder, built._b_enc, built._b_dec):
            p += 0.2 * torch.randn(p.shape, generator=random, dtype=dtype)
    return built


def batch(built: PoseTied, n: int = 40, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, built.d_in, generator=random, dtype=built._atoms.dtype)


def plainly(built: PoseTied, x: Tensor) -> tuple[Tensor, Tensor]:
    """Code (row, pose, family) and reconstruction, by the formula, element by element."""
    g, n = built.group, len(x)
    inverse = g.inverses
    blocks = x.view(n, g.order, built.d_block)
    pre = (blocks - built._b_dec) @ built._encoder.T + built._b_enc
    flat = pre.reshape(n, -1)
    top = flat.topk(built.sparsity.k)
    code = torch.zeros_like(flat).scatter(1, top.indices, top.values.relu())
    code = code.view(n, g.order, built.n_families)
    out = []
    for element in range(g.order):
        total = built._b_dec.expand(n, -1)
        for h in range(g.order):
            total = total + code[:, h] @ built.atoms[:, int(g.table[element, inverse[h]])]
        out.append(total)
    return code, torch.cat(out, dim=1)


@pytest.mark.parametrize("name", GROUPS)
def test_codes_and_reconstructions_are_those_of_the_formula(name):
    built = general(name)
    x = batch(built)
    code, out = plainly(built, x)
    torch.testing.assert_close(built.encode(x), code.reshape(len(x), -1))
    torch.testing.assert_close(built(x), out)
    whole = (x - built.b_dec) @ built.W_enc + built.b_enc
    torch.testing.assert_close(whole, built.pre_activations(x))
    torch.testing.assert_close(built.encode(x) @ built.W_dec + built.b_dec, out)


@settings(max_examples=25)
@given(name=st.sampled_from(GROUPS), data=st.data(), seed=st.integers(0, 10**6))
def test_reposing_the_input_permutes_the_code_and_the_reconstruction(name, data, seed):
    built = general(name)
    g = built.group
    t = data.draw(st.integers(0, g.order - 1))
    x = batch(built, 5, seed)
    right = torch.from_numpy(g.table[:, t].astype(np.int64))  # x(tI)_g = x(I)_gt
    posed = x.view(5, g.order, -1)[:, right].reshape(5, -1)
    code = built.encode(x).view(5, g.order, -1)[:, right]
    found = built.encode(posed).view(5, g.order, -1)
    assert torch.equal(found != 0, code != 0)
    torch.testing.assert_close(found, code, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(built(posed), built(x).view(5, g.order, -1)[:, right].reshape(5, -1))


@pytest.mark.parametrize(
    "objective", [Objective(), Objective(normalize_mse=True), Objective(clip=0.3)]
)
@pytest.mark.parametrize("name", GROUPS)
def test_a_sparse_step_has_the_gradients_of_the_formula(name, objective):
    built = general(name)
    x = batch(built)
    reference = copy.deepcopy(built)
    code, out = plainly(reference, x)
    weights = objective.weights(x)
    loss = ((out - x).square().sum(dim=1) * weights).mean()
    loss.backward()
    named = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    atoms = reference._atoms.detach().view(built.n_families, -1, built.d_block)
    unit = atoms / atoms.norm(dim=2, keepdim=True) / built.group.order**0.5
    flat = unit.reshape(built.n_families, -1)
    along = (named["_atoms"] * flat).sum(dim=1, keepdim=True)
    named["_atoms"] = named["_atoms"] - along * flat
    factor = objective.factor(sum(float(g.square().sum()) for g in named.values()))
    for compiled in (True, False):
        mine = copy.deepcopy(built)
        step = PosedStep(mine, objective, compiled=compiled)
        told = step(x, 1e-3)
        assert told.loss == pytest.approx(float(loss.detach()), rel=1e-10)
        assert torch.equal(told.fired, (code != 0).any(dim=0).view(-1))
        for key, gradient in named.items():
            found = step.moments[key][0] * 10
            torch.testing.assert_close(found, gradient * factor, atol=1e-10, rtol=1e-10)
        lengths = mine.atoms.norm(dim=2).sum(dim=1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_compiled_and_plain_steps_stay_together_and_threads_change_nothing(monkeypatch):
    start = general("D4", families=40, k=6)
    runs = []
    for compiled, threads in ((True, 1), (False, 1), (True, 3)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        built = copy.deepcopy(start)
        step = PosedStep(built, compiled=compiled)
        for i in range(15):
            step(batch(built, 60, seed=i), 1e-2)
        runs.append(built)
    for name, tensor in runs[0].state_dict().items():
        torch.testing.assert_close(runs[1].state_dict()[name], tensor, atol=1e-9, rtol=1e-8)
        assert torch.equal(runs[2].state_dict()[name], tensor)


def families(g: Group, n: int, *, d: int = 24, n_families: int = 6, k: int = 2, seed: int = 0):
    """Rows x(I)_g = sum of code(h, i) T_i[g h^-1], half of the families with a symmetry.

    The families are the same for every seed.
    """
    fixed, random = np.random.default_rng(0), np.random.default_rng(seed)
    atoms = fixed.normal(size=(n_families, g.order, d))
    for i in range(n_families // 2):  # unchanged by a cyclic group of poses
        s = int(fixed.integers(1, g.order))
        orbit = sorted(g.closure([s]))
        atoms[i] = np.mean([atoms[i][g.table[:, a]] for a in orbit], axis=0) * len(orbit) ** 0.5
    code = np.zeros((n, g.order, n_families))
    for _ in range(k):
        place = random.integers(g.order, size=n), random.integers(n_families, size=n)
        code[np.arange(n), *place] = random.uniform(0.5, 2, n)
    x = np.zeros((n, g.order, d))
    for h in range(g.order):
        x += np.einsum("ni,igd->ngd", code[:, h], atoms[:, g.table[:, g.inverses[h]]])
    x += 0.05 * random.normal(size=x.shape) + 3
    return torch.from_numpy(x.reshape(n, -1)).float()


def test_both_forms_explain_planted_families_and_the_tied_one_needs_fewer_samples():
    g, k = group("D4"), TopK(k=4)
    held = families(g, 2000, seed=9)
    widths = dict.fromkeys(g.element_names, 24)

    def explained(built: PoseTied | Crosscoder, n: int, steps: int) -> float:
        train(built, families(g, n), steps=steps, batch_size=256, lr=1e-2)
        return 1 - evaluate(built, held[:, built.reads], target=held).fvu

    def tied() -> PoseTied:
        return PoseTied(group=g, d_in=192, n_latents=80, sparsity=k)

    def untied() -> Crosscoder:
        return Crosscoder(widths=widths, n_latents=80, sparsity=k, reads="e")

    few = explained(tied(), 300, 300)
    assert few > 0.9
    assert explained(untied(), 300, 300) < few - 0.06
    assert explained(tied(), 12_000, 400) > 0.93
    assert explained(untied(), 12_000, 400) > 0.88


def test_parameters_are_fewer_by_the_order_of_the_group():
    g = group("D4")
    tied = PoseTied(group=g, d_in=80, n_latents=160)
    untied = Crosscoder(widths=dict.fromkeys(g.element_names, 10), n_latents=160, reads="e")
    count = [sum(p.numel() for p in built.parameters()) for built in (tied, untied)]
    assert count[1] > 7.9 * count[0]


@pytest.fixture(scope="module")
def trained() -> PoseTied:
    built = PoseTied(group=group("S3"), d_in=144, n_latents=48, sparsity=TopK(k=3))
    x = families(group("S3"), 3000) * 4
    return train(built, x, steps=150, batch_size=128, lr=1e-2)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check, trained):
    with torch.no_grad():
        check(trained)
        check(PoseTied(group=group("C3"), d_in=12, n_latents=24, sparsity=TopK(k=3)))


def test_what_is_saved_is_what_is_loaded_and_goes_on_training(trained, tmp_path):
    save(trained, tmp_path)
    again = load(tmp_path)
    assert isinstance(again, PoseTied)
    assert again.group == trained.group
    assert again.extra_repr() == trained.extra_repr()
    x = families(group("S3"), 200) * 4
    assert torch.equal(again(x), trained(x))
    assert trained.history is not None
    assert trained.history.fvu[-1] < 0.3
    train(again, families(group("S3"), 3000) * 4, steps=1, lr=1e-9)
    torch.testing.assert_close(again(x), trained(x), atol=1e-2, rtol=1e-4)
    assert again.W_dec.shape == (48, 144)
    assert again.W_enc.shape == (144, 48)


def test_a_killed_run_ends_with_the_same_bytes(tmp_path):
    x = families(group("C4"), 500)

    def run(**more):
        built = PoseTied(group=group("C4"), d_in=96, n_latents=32, sparsity=TopK(k=3))
        return train(built, x, steps=20, batch_size=64, **more).state_dict()

    whole = run()
    with pytest.raises(KilledError):
        run(checkpoint=tmp_path, checkpoint_every=4, on_progress=kill_after(11))
    late = run(checkpoint=tmp_path, checkpoint_every=4)
    assert all(torch.equal(late[name], tensor) for name, tensor in whole.items())


def test_what_cannot_be_is_refused():
    d4 = group("D4")
    with pytest.raises(ValueError, match=r"n_latents \(20\) must be a multiple of the order of D4"):
        PoseTied(group=d4, d_in=16, n_latents=20)
    with pytest.raises(ValueError, match=r"d_in \(17\) must be a multiple"):
        PoseTied(group=d4, d_in=17, n_latents=32)
    with pytest.raises(ValueError, match="needs the sparsity rule TopK, got ReLU"):
        PoseTied(group=d4, d_in=16, n_latents=32, sparsity=ReLU())
    with pytest.raises(ValueError, match=r"must be at least k \(99\)"):
        PoseTied(group=d4, d_in=16, n_latents=32, sparsity=TopK(k=99))
    with pytest.raises(ValueError, match="identity of the group must be element 0"):
        PoseTied(group=group("C2").relabel([1, 0]), d_in=4, n_latents=32)
    built = PoseTied(group=d4, d_in=16, n_latents=32)
    with pytest.raises(InputError, match="reads 8 blocks of 2, in all 16 wide, got 15"):
        built.encode(torch.zeros(3, 15))
    with pytest.raises(ValueError, match="cannot be revived"):
        train(built, torch.randn(50, 16), steps=1, revival=AuxK())
