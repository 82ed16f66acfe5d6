"""Dictionaries and sparsity rules of other projects, which inherit nothing or only a contract."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mechatlas.analysis.matching.pairing import match
from mechatlas.base import Dictionary, InputError, WeightsError
from mechatlas.dictionaries.autoencoder import Autoencoder
from mechatlas.dictionaries.engine.interface import CodeSearch, StepResult
from mechatlas.dictionaries.engine.sparse_steps import SparseStep
from mechatlas.dictionaries.engine.steps import AutogradStep, ReconstructionStep
from mechatlas.dictionaries.engine.structures import Codes
from mechatlas.dictionaries.formats import load, save
from mechatlas.dictionaries.metrics import evaluate
from mechatlas.dictionaries.objective import Objective
from mechatlas.dictionaries.pretrained import Pretrained
from mechatlas.dictionaries.revival import AuxK
from mechatlas.dictionaries.sparsity import (
    NONE,
    BatchTopK,
    Gated,
    JumpReLU,
    ReLU,
    Rule,
    State,
    TopK,
)
from mechatlas.dictionaries.training import train
from tests.conformance import CHECKS
from tests.dictionaries.golden import GOLDEN, read
from tests.dictionaries.test_autoencoder import planted
from tests.dictionaries.test_checkpoints import KilledError, kill_after

STEPS = {"steps": 200, "batch_size": 256, "lr": 3e-3}


class Winners(nn.Module):
    """Stranger that fits the protocol, tied, with a name that starts with an underscore."""

    def __init__(self, d_in: int, n_latents: int, k: int = 3) -> None:
        super().__init__()
        self.d_in, self.n_latents, self.k = d_in, n_latents, k
        self.config = {"d_in": d_in, "n_latents": n_latents, "k": k}
        start = torch.randn(n_latents, d_in, generator=torch.Generator().manual_seed(0))
        self._atoms = nn.Parameter(start / start.norm(dim=1, keepdim=True))
        self.center = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def encode(self, x: Tensor) -> Tensor:
        pre = (x - self.center) @ self._atoms.T
        top = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())

    def decode(self, code: Tensor) -> Tensor:
        return code @ self._atoms + self.center


class Shared(Winners):
    """Stranger whose state names one tensor twice."""

    def __init__(self, d_in: int, n_latents: int, k: int = 3) -> None:
        super().__init__(d_in, n_latents, k)
        self.atoms_too = self._atoms


class Stepping(Winners):
    """Stranger that gives its own step."""

    def step(self, objective: Objective):
        return _Counting(self, objective)


class _Counting(ReconstructionStep):
    def __call__(self, *arguments, **options) -> StepResult:
        self.dictionary.count += 1
        return super().__call__(*arguments, **options)


class Fixed:
    """Stranger that is no module."""

    d_in, n_latents = 24, 96

    def encode(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), 96)

    def decode(self, code: Tensor) -> Tensor:
        return torch.zeros(len(code), 24)


@dataclasses.dataclass(frozen=True)
class Above(Rule):
    """Stranger's rule with a fast path: pre-activations above a margin."""

    margin: float = 0.5

    def __call__(self, pre: Tensor, state: State = NONE) -> Tensor:
        return pre * (pre > self.margin)

    def find_codes(self, search: CodeSearch, state: State) -> Codes | None:
        return search.above(self.margin)


@dataclasses.dataclass(frozen=True)
class Half(TopK):
    """Rule that inherits a fast path whose codes it does not have."""

    def __call__(self, pre: Tensor, state: State = NONE) -> Tensor:
        return super().__call__(pre, state) / 2


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.from_numpy(planted(6000)[0])


@pytest.mark.parametrize("kind", [Winners, Shared, Stepping])
def test_a_stranger_is_trained_saved_loaded_matched_and_evaluated(kind, x, tmp_path):
    stranger = kind(24, 96)
    assert isinstance(kind(24, 96), Dictionary)
    before = evaluate(stranger, x[:1000]).fvu
    assert train(stranger, x, **STEPS) is stranger
    assert stranger.history.fvu[-1] < 0.7 * before
    assert int(stranger.count) == (200 if kind is Stepping else 0)
    save(stranger, tmp_path)
    again = load(tmp_path, classes=[kind])
    assert type(again) is kind
    assert again.k == 3
    assert all(torch.equal(t, stranger.state_dict()[n]) for n, t in again.state_dict().items())
    assert evaluate(again, x[:1000]).fvu == evaluate(stranger, x[:1000]).fvu
    ours = train(Autoencoder(d_in=24, n_latents=96, sparsity=TopK(k=3)), x, **STEPS)
    assert match(stranger, again).matched.sum() >= 90
    assert match(stranger, ours).matched.sum() > 5


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check):
    with torch.no_grad():
        check(Winners(24, 96))


def test_a_stranger_and_one_of_ours_are_trained_together(x):
    together = train([Winners(24, 96), Autoencoder(d_in=24, n_latents=96)], x, steps=5)
    alone = train(Winners(24, 96), x, steps=5)
    for mine, theirs in zip(together[0].parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_steps_of_a_stranger_are_those_of_torch(x):
    ours, theirs = Winners(24, 96), Winners(24, 96)
    step = ReconstructionStep(ours, Objective(clip=0.1))
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for i in range(5):
        rows = x[100 * i : 100 * (i + 1)]
        loss = step(rows, 1e-2).loss
        adam.zero_grad()
        error = (theirs.decode(theirs.encode(rows)) - rows).square().sum(dim=1).mean()
        error.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        adam.step()
        assert loss == pytest.approx(float(error.detach()), rel=1e-6)
    torch.testing.assert_close(dict(ours.named_parameters()), dict(theirs.named_parameters()))


def test_a_killed_run_of_a_stranger_ends_with_the_same_bytes(x, tmp_path):
    whole = train(Winners(24, 96), x, steps=20)
    with pytest.raises(KilledError):
        train(
            Winners(24, 96),
            x,
            steps=20,
            checkpoint=tmp_path,
            checkpoint_every=4,
            on_progress=kill_after(11),
        )
    late = train(Winners(24, 96), x, steps=20, checkpoint=tmp_path, checkpoint_every=4)
    assert all(map(torch.equal, late.parameters(), whole.parameters()))


def test_what_cannot_be_trained_or_saved_is_refused_in_one_sentence(x, tmp_path):
    with pytest.raises(InputError, match="Cannot train a Fixed: a dictionary to train is a torch"):
        train(Fixed(), x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"Cannot train a Linear: .* with d_in, n_latents, encode"):
        train(nn.Linear(24, 96), x)
    for name, rule in (
        ("2_standard", r"ReLU\(l1"),
        ("6_gated", r"Gated\(l1"),
        ("6_jumprelu", "Jump"),
    ):
        with pytest.raises(InputError, match=rf"its file does not say by which .* = ma\.{rule}"):
            train(read(GOLDEN / f"saelens{name}"), x)
    with pytest.raises(InputError, match="transcoder with a skip connection"):
        train(read(GOLDEN / "sparsify_transcode_skip"), x)
    with pytest.raises(ValueError, match="Latents of a Winners cannot be revived"):
        train(Winners(24, 96), x, revival=AuxK())
    with pytest.raises(WeightsError, match="Cannot save a Fixed: it is not a "):
        save(Fixed(), tmp_path)
    with pytest.raises(WeightsError, match="A Winners cannot be written for SAELens"):
        save(Winners(24, 96), tmp_path, format="saelens")
    save(Winners(24, 96), tmp_path)
    with pytest.raises(
        WeightsError, match=r"holds a Winners, .* load\(path, classes=\[Winners\]\)"
    ):
        load(tmp_path)


FOREIGN = {
    "saelens2_standard": ReLU(l1=0.3), "saelens6_gated": Gated(l1=0.3),
    "saelens6_jumprelu": JumpReLU(l0=0.1), "gemma_scope_one": JumpReLU(l0=0.1),
    "dictionary_learning_standard": ReLU(l1=0.3), "saelens6_standard_constant_norm": ReLU(l1=0.3),
    "saelens6_jumprelu_layer_norm": JumpReLU(l0=0.1), "saelens5_topk": ReLU(l1=0.3),
    "dictionary_learning_batchtopk": BatchTopK(k=4), "saelens6_jumprelu_transcoder": ReLU(l1=0.3),
}  # fmt: skip
"""Files of other libraries, and the rules by which their dictionaries are trained further."""


@pytest.mark.parametrize("kind", ["ours", "foreign"])
def test_rows_to_encode_may_be_arrays_and_lists(kind):
    ours = Autoencoder(d_in=24, n_latents=96, sparsity=TopK(k=3))
    dictionary = ours if kind == "ours" else ours.as_pretrained()
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(5))
    code, array = dictionary.encode(x), x.numpy()
    forms = (array, array.tolist(), array.astype(">f4"), array.astype(np.float64), x.double(),
             np.asfortranarray(array), array[::-1][::-1], [*x])  # fmt: skip
    for form in forms:
        torch.testing.assert_close(dictionary.encode(form), code)
    for wrong in (x.to_sparse(), [["a"] * 24], array[:, :20]):
        with pytest.raises(InputError):
            dictionary.encode(wrong)


def foreign_rows(dictionary: Pretrained) -> Tensor:
    """Rows of few features each, as wide as a dictionary reads and writes."""
    width = dictionary.d_in + dictionary.d_out * dictionary.transcodes
    return torch.from_numpy(planted(1200, width, 3 * width)[0])


@pytest.mark.parametrize("name", FOREIGN)
def test_a_dictionary_of_another_library_is_trained_by_the_penalty_it_is_given(name, tmp_path):
    rule, dictionary = FOREIGN[name], read(GOLDEN / name)
    rows = foreign_rows(dictionary)
    read_rows = rows[:, : dictionary.d_in]
    before = dictionary.encode(read_rows)
    same_rule = type(rule).__name__ == type(dictionary.sparsity).__name__
    lengths = dictionary.W_dec.norm(dim=1)
    dictionary.sparsity = rule
    if same_rule or isinstance(rule, JumpReLU):
        torch.testing.assert_close(dictionary.encode(read_rows), before)
    losses = []
    for n in (1, 150):
        trained: Any = train(dictionary, rows, steps=n, batch_size=256, lr=1e-3)
        losses.append(trained.history.fvu[-1])
    assert losses[1] < losses[0]
    if not hasattr(rule, "k"):
        torch.testing.assert_close(dictionary.W_dec.norm(dim=1), lengths)
    if not dictionary.transcodes:
        save(dictionary, tmp_path, format="saelens")
        torch.testing.assert_close(
            load(tmp_path).encode(rows), dictionary.encode(rows), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("name", [n for n, rule in FOREIGN.items() if not hasattr(rule, "k")])
def test_a_larger_penalty_leaves_fewer_latents_of_a_foreign_dictionary(name):
    n_active = []
    for weight in (1e-3, 5.0):
        dictionary = read(GOLDEN / name)
        rule = FOREIGN[name]
        field = "l0" if isinstance(rule, JumpReLU) else "l1"
        dictionary.sparsity = dataclasses.replace(rule, **{field: weight})
        rows = foreign_rows(dictionary)
        train(dictionary, rows, steps=150, batch_size=256, lr=1e-2)
        n_active.append(float((dictionary.encode(rows[:, : dictionary.d_in]) != 0).float().mean()))
    assert n_active[1] < 0.85 * n_active[0]


def test_a_penalty_is_added_to_the_loss_as_for_our_own_kinds():
    ours = Autoencoder(d_in=24, n_latents=96, sparsity=Gated(l1=0.7))
    theirs = ours.as_pretrained()
    theirs.sparsity = Gated(l1=0.7)
    theirs.make_trainable()
    rows = torch.randn(64, 24, generator=torch.Generator().manual_seed(3))
    loss = [step(rows, 1e-3).loss for step in (
        AutogradStep(ours, Objective()), ReconstructionStep(theirs, Objective()))]  # fmt: skip
    assert loss[0] == pytest.approx(loss[1], rel=1e-5)


def test_a_strangers_rule_is_trained_fast_saved_loaded_matched_and_evaluated(x, tmp_path):
    def build() -> Autoencoder:
        return Autoencoder(d_in=24, n_latents=96, sparsity=Above(margin=0.8))

    assert isinstance(build().step(Objective()), SparseStep)
    fast, slow = build(), build()
    for step in (SparseStep(fast), AutogradStep(slow)):
        for i in range(5):
            step(x[200 * i : 200 * (i + 1)], 1e-3)
    torch.testing.assert_close(fast.W_dec, slow.W_dec, atol=1e-4, rtol=0)
    trained = train(build(), x, **STEPS)
    save(trained, tmp_path)
    with pytest.raises(WeightsError, match=r"holds a Above, .* load\(path, classes=\[Above\]\)"):
        load(tmp_path)
    again = load(tmp_path, classes=[Above])
    assert again.sparsity == trained.sparsity
    assert evaluate(again, x[:1000]).fvu == evaluate(trained, x[:1000]).fvu
    assert match(trained, again).matched.sum() >= 90


def test_a_fast_path_is_not_inherited_by_a_rule_with_other_codes():
    built = Autoencoder(d_in=24, n_latents=96, sparsity=Half(k=3))
    assert isinstance(built.step(Objective()), AutogradStep)


def test_numpy_and_torch_are_measured_alike(x):
    built = Autoencoder(d_in=24, n_latents=96, sparsity=TopK(k=3))
    rows = x[:500].numpy()
    assert evaluate(built, rows).fvu == evaluate(built, x[:500]).fvu
    assert evaluate(built, rows, target=np.ascontiguousarray(rows)).l0 == 3.0
    assert repr(evaluate(built, rows)).startswith("Evaluation: ")


@pytest.mark.parametrize("name", ["saelens6_topk", "saelens6_jumprelu", "sparsify_topk"])
def test_a_dictionary_of_another_library_is_trained_on(name, tmp_path):
    rows = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    dictionary, before = read(GOLDEN / name), read(GOLDEN / name)
    if name == "saelens6_jumprelu":
        dictionary.sparsity = TopK(k=4)
    assert train(dictionary, rows, steps=60, batch_size=128, lr=1e-2) is dictionary
    assert evaluate(dictionary, rows).fvu < 0.8 * evaluate(before, rows).fvu
    assert evaluate(dictionary, rows).l0 <= 4
    save(dictionary, tmp_path, format="saelens")
    torch.testing.assert_close(load(tmp_path)(rows), dictionary(rows))
