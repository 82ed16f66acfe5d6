"""From weights to a bound: planted networks, networks trained elsewhere, and bad input."""

import numpy as np
import pytest
import torch

from mechatlas.analysis.proofs.prove import exact_accuracy, prove
from mechatlas.analysis.proofs.verifier.structures import Weights
from mechatlas.base import InputError, NonFiniteError
from mechatlas.maths.groups import Group, GroupError
from mechatlas.maths.named_groups import group

from .planted import NETS, load_net, proved, true_margins, wide


@pytest.mark.parametrize(("name", "noise", "seed"), NETS)
def test_a_planted_circuit_is_certified_and_every_margin_is_a_lower_bound(name, noise, seed):
    of, weights, bound = proved(name, noise, seed)
    truth = true_margins(weights, of.table)
    assert (bound.verification.margins <= truth).all()
    assert bound.accuracy_bound >= 0.95
    assert bound.accuracy_bound <= bound.verification.accuracy_bound_real <= (truth > 0).mean()


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_wrong_answers_are_never_certified(share):
    of, (left, right, unembed), _ = proved("S4", 0.02, 1)
    random = np.random.default_rng(0)
    broken = unembed.copy()
    columns = random.choice(of.order, max(2, round(share * of.order)), replace=False)
    broken[:, columns] = broken[:, np.roll(columns, 1)]
    truth = true_margins(Weights(left, right, broken), of.table)
    bound = prove(left, right, broken, of)
    assert (bound.verification.margins <= truth).all()
    assert bound.accuracy_bound <= (truth > 0).mean() < 1


def test_a_random_network_is_not_certified():
    random, of = np.random.default_rng(0), group("S4")
    left, right = random.normal(size=(2, 24, 30)).astype(np.float32)
    unembed = random.normal(size=(30, 24)).astype(np.float32)
    bound = prove(left, right, unembed, of)
    truth = true_margins(Weights(left, right, unembed), of.table)
    assert bound.accuracy_bound <= (truth > 0).mean() < 1


@pytest.mark.parametrize("anti", [1, -1])
def test_copies_of_neurons_are_merged_and_cost_nothing(anti):
    of, (left, right, unembed), bound = proved("S4", 0.02, 1)
    mirror = np.float32(-0.5 if anti < 0 else 2.0)
    doubled = Weights(
        np.concatenate([left, mirror * left], axis=1),
        np.concatenate([right, mirror * right], axis=1),
        np.concatenate([unembed, unembed / abs(mirror)]),
    )
    again = prove(*doubled, of)
    truth = true_margins(doubled, of.table)
    assert len(again.proof.explanation.representatives) <= len(
        bound.proof.explanation.representatives
    )
    assert (again.verification.margins <= truth).all()
    assert again.accuracy_bound == 1


@pytest.mark.parametrize("seed", range(3))
def test_a_network_with_permuted_labels_gets_no_bound_above_its_accuracy(seed):
    of, (left, right, unembed), _ = proved("S4", 0.02, 1)
    random = np.random.default_rng(seed)
    names = random.permutation(of.order)
    table = np.empty_like(of.table)
    table[np.ix_(names, names)] = names[of.table]  # the same group, its elements renamed
    bound = prove(left, right, unembed, Group(table))
    truth = true_margins(Weights(left, right, unembed), table)
    assert (bound.verification.margins <= truth).all()
    assert bound.accuracy_bound <= (truth > 0).mean() < 0.5
    renamed = prove(
        left[np.argsort(names)], right[np.argsort(names)], unembed[:, np.argsort(names)], table
    )
    assert renamed.accuracy_bound == 1  # the labels were all that was wrong


@pytest.mark.parametrize("rows", [(3, 20), (0, 1)])
def test_two_damaged_rows_cost_their_own_pairs_and_no_others(rows):
    n, random = 31, np.random.default_rng(0)
    phases, x = 2 * np.pi * np.arange(12) / 12, np.arange(n)
    angles = [2 * np.pi * k * x / n for k in (1, 4, 9)]
    left = np.array([np.cos(a + p) for a in angles for p in phases]).T
    unembed = np.array([np.cos(a + 2 * p) for a in angles for p in phases])
    left, right, unembed = (
        (w + 0.02 * random.normal(size=w.shape)).astype(np.float32) for w in (left, left, unembed)
    )
    of = group("C31")
    whole = prove(left, right, unembed, of).accuracy_bound
    left[list(rows)] = left[list(rows[::-1])]
    truth = float((true_margins(Weights(left, right, unembed), of.table) > 0).mean())
    bound = prove(left, right, unembed, of).accuracy_bound
    assert truth == pytest.approx(1 - 2 / n)
    assert whole - 1.5 * (1 - truth) < bound <= truth


def test_what_the_circuits_leave_of_the_budget_is_spent_on_single_pairs(monkeypatch):
    of = group("S5")
    weights = wide(of, noise=0.06, seed=1)
    bound = prove(*weights, of, compute_budget=0.9)
    share = bound.verification.multiply_adds / (of.order**3 * weights.left.shape[1])
    assert share <= 0.9
    monkeypatch.setattr("mechatlas.analysis.proofs.prove._with_remaining_budget", lambda e, *_: e)
    without = prove(*weights, of, compute_budget=0.9)
    assert without.accuracy_bound < bound.accuracy_bound
    explained = (bound.verification.stages < 3) & (bound.verification.margins > 0)
    assert (bound.verification.stages == 3).sum() <= explained.sum() + 0.01 * of.order**2


def test_bad_input_is_refused_in_one_sentence():
    of, (left, right, unembed), _ = proved("S4", 0.02, 1)
    with pytest.raises(InputError, match=r"right must have the shape \(24, \d+\)"):
        prove(left, right[:5], unembed, of)
    broken = left.copy()
    broken[3, 2] = np.nan
    with pytest.raises(NonFiniteError, match=r"left\[3, 2\] is nan"):
        prove(broken, right, unembed, of)
    table = np.array(of.table)
    table[0, 0], table[0, 1] = table[0, 1], table[0, 0]
    with pytest.raises(GroupError):
        prove(left, right, unembed, table)
    with pytest.raises(InputError, match="float32 cannot hold"):
        prove(left.astype(np.float64) + 1e-12, right, unembed, of)
    with pytest.raises(InputError, match="compute_budget"):
        prove(left, right, unembed, of, compute_budget=3.0)


def test_torch_tensors_and_lists_are_taken_as_they_are():
    of, weights, bound = proved("S4", 0.02, 1)
    left, right, unembed = (torch.from_numpy(w).requires_grad_() for w in weights)
    again = prove(left, right, unembed, of.table)
    assert again.accuracy_bound == bound.accuracy_bound
    assert bound.proof.check(*(w.tolist() for w in weights)).accuracy_bound == bound.accuracy_bound
    again = prove(left.detach().T.contiguous().T, right, unembed, of.table.tolist())
    assert again.accuracy_bound == bound.accuracy_bound


def test_bfloat16_weights_are_exact_in_float32():
    of, weights, _ = proved("S4", 0.02, 1)
    left, right, unembed = (torch.from_numpy(w).bfloat16() for w in weights)
    exact = Weights(*(w.float().numpy() for w in (left, right, unembed)))
    bound = prove(left, right, unembed, of)
    assert bound.proof.check(*exact).accuracy_bound == bound.accuracy_bound
    assert (bound.verification.margins <= true_margins(exact, of.table)).all()


def test_a_bound_prints_as_a_finding_with_its_evidence():
    _, _, bound = proved("S4", 0.02, 1)
    lines = repr(bound).splitlines()
    assert lines[0].startswith("Accuracy: at least 100.0000% over 576 pairs")
    assert len(lines) <= 6
    assert "array" not in repr(bound.verification) + repr(bound.proof)
    assert repr(bound.proof).startswith("Proof: claims an accuracy of at least 100.0000%")


def test_spellings_of_version_0_1_still_work():
    of, weights, bound = proved("S4", 0.02, 1)
    with pytest.warns(DeprecationWarning, match=r"prove\(compute_budget=\)"):
        again = prove(*weights, of, effort=0.5)  # pyright: ignore[reportCallIssue]
    with pytest.warns(DeprecationWarning, match=r"AccuracyBound.verification"):
        assert again.verdict.accuracy_bound == bound.accuracy_bound  # pyright: ignore
    with pytest.warns(DeprecationWarning, match=r"Verification.logit_budget"):
        assert bound.verification.budget == bound.verification.logit_budget  # pyright: ignore


@pytest.mark.parametrize(
    ("name", "least"),
    [("S5_09", 0.95), ("A5_03", 0.95)],
)
def test_nets_trained_elsewhere_are_bounded_and_every_margin_is_true(data, name, least):
    weights, of = load_net(data, name)
    bound = prove(*weights, of)
    truth = true_margins(weights, of.table)
    assert (bound.verification.margins <= truth).all()
    assert least <= bound.accuracy_bound <= (truth > 0).mean()


OTHERS = [f"{name}_{seed:02d}" for name in ("A5", "C113", "D59") for seed in (1, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(f"S5_{seed:02d}" for seed in range(1, 50, 2)), *OTHERS])
def test_every_net_is_bounded_soundly(data, name):
    weights, of = load_net(data, name)
    bound = prove(*weights, of)
    truth = true_margins(weights, of.table)
    assert (bound.verification.margins <= truth).all()
    assert 0 < bound.accuracy_bound <= (truth > 0).mean()
    assert exact_accuracy(bound, *weights).accuracy == (truth > 0).mean()
