"""Bounds against brute force in higher precision, whatever the explanation says."""

import dataclasses
import inspect
import json
import subprocess
import sys
import zlib
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from safetensors.numpy import load_file, save_file

from mechatlas.analysis.proofs.explain import explain
from mechatlas.analysis.proofs.group_training import GroupTrainingConfig, train_group_net
from mechatlas.analysis.proofs.prove import exact_accuracy, prove
from mechatlas.analysis.proofs.verifier import compiled, compiled_checks, reference
from mechatlas.analysis.proofs.verifier.exact import decide_exactly
from mechatlas.analysis.proofs.verifier.explanation import Explanation, ProofError
from mechatlas.analysis.proofs.verifier.proof import load_proof
from mechatlas.analysis.proofs.verifier.structures import Weights
from mechatlas.analysis.proofs.verifier.verify import verify
from mechatlas.base import InputError, NonFiniteError, UserError
from mechatlas.maths.groups import Group, GroupError
from mechatlas.maths.named_groups import group

from .planted import planted, proved, true_margins

GOLDEN = Path(__file__).parents[2] / "golden" / "proof_0_1"
NETS = [("S4", 0.0, 0), ("S4", 0.02, 1), ("A5", 0.01, 2), ("D5", 0.02, 3), ("S5", 0.002, 4)]


@pytest.mark.parametrize(("name", "noise", "seed"), NETS)
def test_a_planted_circuit_is_certified_and_every_margin_is_a_lower_bound(name, noise, seed):
    of, weights, bound = proved(name, noise, seed)
    truth = true_margins(weights, of.table)
    assert (bound.verification.margins <= truth).all()
    assert bound.accuracy_bound >= 0.95
    assert bound.accuracy_bound <= bound.verification.accuracy_bound_real <= (truth > 0).mean()


@pytest.mark.parametrize("name", ["S4", "D5"])
def test_the_float32_network_is_right_wherever_it_is_certified_in_any_order_of_sums(name):
    of, (left, right, unembed), bound = proved(name, 0.02, 1)
    certified = bound.verification.margins > bound.verification.float32_errors
    assert certified.any()
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(left.shape[1])
        hidden = np.maximum(left[:, None, order] + right[None, :, order], np.float32(0))
        logits = np.zeros((of.order, of.order, of.order), np.float32)
        for i in range(left.shape[1]):
            logits += hidden[:, :, i, None] * unembed[order[i]]
        assert (logits.argmax(axis=-1) == of.table)[certified].all()


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


def _mutate(e: Explanation, random: np.random.Generator) -> Explanation:
    """Change some part of an explanation, wildly or a little."""
    parts = [e, *e.circuits, *e.grids]
    part = parts[random.integers(len(parts))]
    names = [
        f.name for f in dataclasses.fields(part) if isinstance(getattr(part, f.name), np.ndarray)
    ]
    name = names[random.integers(len(names))]
    array = getattr(part, name).copy()
    kind = random.integers(5)
    if array.size == 0:
        return e
    if array.dtype.kind == "f":
        if kind == 0:
            array *= array.dtype.type(10.0 ** random.integers(-6, 7))
        elif kind == 1:
            array += (random.normal(size=array.shape) * 10.0 ** random.integers(-6, 2)).astype(
                array.dtype
            )
        elif kind == 2:
            array.flat[random.integers(array.size)] = random.choice([np.nan, np.inf, 1e20, -3, 0])
        elif kind == 3:
            array = random.permutation(array)
        else:
            array = -array
    elif kind == 0:
        array.flat[random.integers(array.size)] = (
            random.integers(-3, 30) if array.dtype != bool else True
        )
    elif kind == 1:
        array = random.permutation(array)
    elif kind == 2:
        array = np.roll(array, 1)
    else:
        array = random.permutation(array.ravel()).reshape(array.shape)
    changed = dataclasses.replace(part, **{name: array})
    if part is e:
        return changed
    return dataclasses.replace(
        e,
        circuits=tuple(changed if c is part else c for c in e.circuits),
        grids=tuple(changed if g is part else g for g in e.grids),
    )


@settings(max_examples=150)
@given(st.integers(0, 2**32 - 1), st.sampled_from([("S4", 0.02, 1), ("D5", 0.02, 3)]))
def test_no_explanation_gives_a_bound_above_the_truth(seed, net):
    _try_mutated(seed, net)


def _try_mutated(seed, net):
    of, weights, bound = proved(*net)
    random = np.random.default_rng(seed)
    changed = bound.proof.explanation
    for _ in range(random.integers(1, 4)):
        changed = _mutate(changed, random)
    _refused_or_true(weights, of, changed)


@pytest.mark.parametrize("seed", range(4))
def test_an_explanation_of_another_network_says_nothing_false(seed):
    of = group("S4")
    mine, others = (planted(of, noise=0.05, seed=seed + k) for k in (0, 50))
    for detail in (0, 1):
        found = explain(*others, of, detail=detail)
        found = dataclasses.replace(found, second_stage_budget=0.5, third_stage_budget=0.1)
        verification = verify(*mine, of, found)
        assert (verification.margins <= true_margins(mine, of.table)).all()


def _kept(e: Explanation, kept: np.ndarray) -> Explanation:
    """The explanation without some of the neurons that stand for themselves."""
    places = np.cumsum([0, *kept])

    def part(start: int, count: int) -> tuple[int, np.ndarray]:
        return int(places[start]), kept[start : start + count]

    circuits, grids = [], []
    for c in e.circuits:
        start, mine = part(c.first_neuron, c.coefficients.shape[1])
        circuits.append(
            dataclasses.replace(c, first_neuron=start, coefficients=c.coefficients[:, mine].copy())
        )
    for g in e.grids:
        start, mine = part(g.first_neuron, len(g.scale))
        if mine.any():
            names = ("left_points", "right_points", "scale")
            fewer = {name: getattr(g, name)[mine] for name in names}
            grids.append(dataclasses.replace(g, first_neuron=start, **fewer))
    return dataclasses.replace(
        e,
        representatives=e.representatives[kept],
        exponents=e.exponents[kept],
        additive_x=e.additive_x[:, kept].copy(),
        additive_y=e.additive_y[kept].copy(),
        block_offsets=np.unique(places[e.block_offsets]),
        circuits=tuple(circuits),
        grids=tuple(grids),
    )


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("name", ["S4", "D5"])
def test_neurons_that_are_called_dead_and_are_not_are_taken_off_every_margin(name, share):
    of, weights, bound = proved(name, 0.02, 1)
    truth = true_margins(weights, of.table)
    for seed in range(20):
        random = np.random.default_rng(seed)
        e = bound.proof.explanation
        chosen = random.random(len(e.dead)) < random.choice([0.05, 0.2, 1.0])
        quiet = _kept(e, ~chosen[e.representatives])
        quiet = dataclasses.replace(quiet, second_stage_budget=share, third_stage_budget=0.0)
        # Those for which a silent one stood have to be silent as well.
        dead = e.dead | chosen[e.representative_of]
        assert (verify(*weights, of, dataclasses.replace(quiet, dead=dead)).margins <= truth).all()


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("name", ["S4", "D5"])
def test_neurons_that_are_called_multiples_and_are_not_cost_what_they_could(name, share):
    of, weights, bound = proved(name, 0.02, 1)
    truth = true_margins(weights, of.table)
    for seed in range(20):
        random = np.random.default_rng(seed)
        e = bound.proof.explanation
        kept = random.random(len(e.representatives)) < random.choice([0.5, 0.9, 0.97])
        if not kept.any():
            continue
        few = dataclasses.replace(_kept(e, kept), second_stage_budget=share, third_stage_budget=0.0)
        representative_of, scale_factors = e.representative_of.copy(), e.scale_factors.copy()
        lost = np.isin(representative_of, e.representatives[~kept])
        representative_of[lost] = random.choice(few.representatives, int(lost.sum()))
        scale_factors[lost] = random.normal(size=int(lost.sum()))
        few = dataclasses.replace(
            few, representative_of=representative_of, scale_factors=scale_factors
        )
        assert (verify(*weights, of, few).margins <= truth).all()


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


def _swapped() -> tuple[Group, Weights, Explanation]:
    """A network that gives two answers for each other, and the explanation of the right one."""
    of = group("S4")
    left, right, unembed = planted(of, noise=0.0, seed=5)
    found = explain(left, right, unembed, of)
    swapped = unembed.copy()
    swapped[:, [3, 7]] = swapped[:, [7, 3]]
    return of, Weights(left, right, swapped), dataclasses.replace(found, second_stage_budget=1.0)


def _refused_or_true(weights: Weights, of: Group, e: Explanation) -> None:
    """Both verifiers refuse, with the same words, or give bounds that are true."""
    messages = []
    for short in (False, True):
        try:
            verification = verify(*weights, of, e, reference=short)
        except ProofError as error:
            messages.append(str(error))
        else:
            messages.append("")
            assert (verification.margins <= true_margins(weights, of.table)).all()
    assert messages[0] == messages[1]


@pytest.mark.parametrize("k", [-120, -80, -60, 40, 60, 80, 120])
def test_a_scale_that_makes_squares_vanish_or_overflow_hides_no_loss(k):
    of, weights, e = _swapped()
    assert 0.9 < (true_margins(weights, of.table) > 0).mean() < 1
    grids = [
        dataclasses.replace(
            g,
            scale=np.ldexp(g.scale, k).astype(np.float32),
            table=np.ldexp(g.table, -k).astype(np.float32),
        )
        for g in e.grids
    ]
    _refused_or_true(weights, of, dataclasses.replace(e, grids=tuple(grids)))


@pytest.mark.parametrize("in_grids", [True, False])
@pytest.mark.parametrize(("down", "up"), [(-30, 4), (-36, 4), (-42, 6), (-36, 12), (30, -4)])
@pytest.mark.parametrize("exponent", [-40, 40])
def test_exponents_that_make_rests_vanish_hide_no_loss(in_grids, down, up, exponent):
    of, weights, e = _swapped()
    powers = [np.float32(2.0**k) for k in (down, down, up)]
    scaled = Weights(*(w * f for w, f in zip(weights, powers, strict=True)))
    more = exponent + down - e.exponents  # of values; weights of circuits get the opposite
    less = up - exponent + e.exponents

    def times(array, power):
        return np.ldexp(array.astype(np.float64), power).astype(np.float32)

    circuits = []
    for c in e.circuits:
        mine = less[c.first_neuron : c.first_neuron + c.coefficients.shape[1]]
        mean = np.ldexp(c.mean_matrix, down + up)
        circuits.append(
            dataclasses.replace(c, coefficients=times(c.coefficients, mine), mean_matrix=mean)
        )
    grids = [
        dataclasses.replace(
            g, scale=times(g.scale, more[g.first_neuron : g.first_neuron + len(g.scale)])
        )
        for g in e.grids
    ]
    changed = dataclasses.replace(
        e,
        exponents=np.full_like(e.exponents, exponent),
        additive_x=times(e.additive_x, more),
        additive_y=times(e.additive_y, more[:, None]),
        circuits=tuple(circuits),
        grids=tuple(grids) if in_grids else (),
        block_offsets=e.block_offsets if in_grids else np.array([0, len(e.representatives)]),
    )
    _refused_or_true(scaled, of, changed)


def test_a_tie_is_not_counted_as_right():
    of = group("C3")
    left, right = np.ones((2, 3, 4), np.float32)
    bound = prove(left, right, np.ones((4, 3), np.float32), of)
    assert bound.accuracy_bound == bound.verification.accuracy_bound_real == 0
    assert exact_accuracy(bound, left, right, np.ones((4, 3), np.float32)).accuracy == 0


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-20, 1e11])
def test_networks_of_absurd_sizes_are_bounded_soundly_or_refused(size):
    of = group("D5")
    left, right, unembed = planted(of, noise=0.02, seed=3)
    times = np.float32(size)
    small = Weights(times * left, times * right, times * (unembed / np.abs(unembed).max()))
    try:
        bound = prove(*small, of)
    except UserError:
        assert size > 1e10
        return
    assert (bound.verification.margins <= true_margins(small, of.table)).all()


def test_circuits_of_a_wrong_irrep_and_wrong_rho_sets_prove_nothing_false():
    of, weights, bound = proved("S4", 0.05, 9)
    e, truth = bound.proof.explanation, true_margins(weights, of.table)
    random = np.random.default_rng(0)
    (grid,) = e.grids
    circuit = next(c for c in e.circuits if c.name == grid.name)
    others = [r for r in of.irreps() if r.dimension == 3 and r.name != grid.name]
    assert others
    changed = [
        dataclasses.replace(e, circuits=(dataclasses.replace(circuit, matrices=r.matrices),))
        for r in others
    ]
    k = len(grid.left_vectors)
    for _ in range(20):
        names = ("left_action", "right_action", "left_points", "right_points")
        wrong = {
            names[0]: grid.left_action[random.permutation(of.order)],
            names[1]: np.array([random.permutation(k) for _ in range(of.order)]),
            names[2]: random.integers(k, size=len(grid.scale)),
            names[3]: random.permutation(grid.right_points),
        }
        some = {name: wrong[name] for name in names if random.random() < 0.5}
        changed.append(dataclasses.replace(e, grids=(dataclasses.replace(grid, **some),)))
    for number, forged in enumerate(changed):
        forged = dataclasses.replace(forged, second_stage_budget=float(number % 2))
        try:
            verification = verify(*weights, of, forged)
        except ProofError:  # opposite points of an action that is none need not stay opposite
            continue
        assert (verification.margins <= truth).all()


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


def test_nan_anywhere_in_an_explanation_is_refused():
    of, weights, bound = proved("S4", 0.05, 9)
    e = bound.proof.explanation
    for part in (e, *e.circuits, *e.grids):
        for field in dataclasses.fields(part):
            array = getattr(part, field.name)
            if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
                continue
            if field.name.endswith("vectors"):  # for drawings only
                continue
            broken = array.copy()
            broken.flat[broken.size // 2] = np.nan
            forged = dataclasses.replace(part, **{field.name: broken})
            changed = dataclasses.replace(
                forged if isinstance(forged, Explanation) else e,
                circuits=tuple(forged if c is part else c for c in e.circuits),
                grids=tuple(forged if g is part else g for g in e.grids),
            )
            with pytest.raises(ProofError):
                verify(*weights, of, changed)


def test_matrices_that_are_no_representation_are_refused():
    of, weights, bound = proved("S4", 0.02, 1)
    circuit = bound.proof.explanation.circuits[0]
    random = np.random.default_rng(0).normal(size=circuit.matrices.shape)
    forged = dataclasses.replace(circuit, matrices=np.linalg.qr(random)[0])
    changed = dataclasses.replace(bound.proof.explanation, circuits=(forged,))
    with pytest.raises(ProofError, match="not an orthogonal representation"):
        verify(*weights, of, changed)


def test_a_proof_is_saved_checked_and_refused_for_other_weights(tmp_path):
    _, weights, bound = proved("S4", 0.02, 1)
    path = bound.proof.save(tmp_path / "proof.safetensors")
    assert load_proof(path).check(*weights).accuracy_bound == bound.accuracy_bound
    left = weights[0].copy()
    left[0, 0] += 1
    with pytest.raises(ProofError, match="other weights"):
        load_proof(path).check(left, *weights[1:])
    greedy = dataclasses.replace(load_proof(path), accuracy_bound=1.5)
    with pytest.raises(ProofError, match="claims an accuracy"):
        greedy.check(*weights)


def _fuzz(tmp_path, rounds: int) -> int:
    of, weights, bound = proved("S4", 0.05, 9)
    data = bytearray(bound.proof.save(tmp_path / "proof.safetensors").read_bytes())
    truth = (true_margins(weights, of.table) > 0).mean()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(rounds):
        forged = bytearray(data)
        for _ in range(int(random.integers(1, 6))):
            forged[int(random.integers(len(forged)))] = int(random.integers(256))
        if random.random() < 0.1:
            forged = forged[: int(random.integers(len(forged)))]
        path = tmp_path / "forged.safetensors"
        path.write_bytes(bytes(forged))
        try:
            proof = load_proof(path)
            verification = proof.check(*weights)
        except UserError:
            refused += 1
            continue
        assert proof.accuracy_bound <= verification.accuracy_bound
        if np.array_equal(proof.table, of.table):
            assert verification.accuracy_bound <= truth
        else:
            there = (true_margins(weights, proof.table) > 0).mean()
            assert verification.accuracy_bound <= there
    return refused


def test_damaged_proofs_are_refused_or_true(tmp_path):
    assert _fuzz(tmp_path, 200) > 0


@pytest.mark.slow
def test_thousands_of_damaged_proofs_are_refused_or_true(tmp_path):
    assert _fuzz(tmp_path, 5000) > 0


@pytest.mark.parametrize("name", ["S4", "D5", "A5"])
def test_the_reference_verifier_gives_the_same(name):
    of, weights, bound = proved(name, 0.02, 3)
    e = dataclasses.replace(bound.proof.explanation, second_stage_budget=1.0)
    fast = verify(*weights, of, e)
    slow = verify(*weights, of, e, reference=True)
    np.testing.assert_allclose(slow.margins, fast.margins, atol=2e-3)
    assert slow.multiply_adds == fast.multiply_adds
    assert (slow.margins <= true_margins(weights, of.table)).all()
    left = np.ones((of.order, of.order), bool)
    right = decide_exactly(weights, of.table, left)
    assert np.array_equal(decide_exactly(weights, of.table, left, reference=True), right)


@pytest.mark.parametrize("net", [*NETS, ("S4", 0.3, 5), ("D5", 0.5, 6)])
def test_a_proof_holds_for_the_reference_verifier_as_well(net):
    _, weights, bound = proved(*net)
    slow = bound.proof.check(*weights, reference=True)
    assert slow.accuracy_bound == bound.accuracy_bound
    assert np.array_equal(slow.stages, bound.verification.stages)
    np.testing.assert_allclose(slow.margins, bound.verification.margins, atol=1e-4)


def test_machine_code_is_kept_apart_by_the_fields_of_named_tuples():
    loops = [getattr(compiled, name) for name in compiled.__all__]
    names = {loop.py_func.__qualname__.rpartition("_")[2] for loop in loops}
    assert names == {f"{zlib.crc32(repr(compiled_checks.FIELDS).encode()):08x}"}
    assert compiled_checks.FIELDS["PairSum"] == ("x", "y")
    for name, loop in zip(compiled.__all__, loops, strict=True):
        parameters = inspect.signature(inspect.unwrap(getattr(reference, name))).parameters
        assert list(inspect.signature(loop.py_func).parameters) == list(parameters), name


def test_checking_with_the_reference_verifier_compiles_nothing(tmp_path):
    _, weights, bound = proved("S4", 0.02, 1)
    proof = bound.proof.save(tmp_path / "proof.safetensors")
    save_file(weights._asdict(), tmp_path / "net.safetensors")
    code = (
        "import sys; from pathlib import Path; from safetensors.numpy import load_file;"
        "from mechatlas.analysis.proofs.verifier.proof import load_proof;"
        f"load_proof(Path({str(proof)!r})).check("
        f"**load_file({str(tmp_path / 'net.safetensors')!r}), reference=True);"
        "print([m for m in sys.modules if m.startswith(('numba', 'mechatlas.analysis.proofs'))])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "numba" not in output.stdout
    assert "explain'" not in output.stdout
    assert "prove'" not in output.stdout


def test_a_proof_of_version_0_1_still_holds():
    weights = load_file(GOLDEN / "net.safetensors")
    proof = load_proof(GOLDEN / "proof.safetensors")
    expected = json.loads((GOLDEN / "expected.json").read_text())
    for short in (False, True):
        verification = proof.check(**weights, reference=short)
        assert verification.accuracy_bound == proof.accuracy_bound == expected["accuracy_bound"]
        assert list(verification.margins[0]) == pytest.approx(expected["margins"], abs=1e-5)


@pytest.mark.parametrize("net", [("S4", 0.02, 1), ("S4", 0.3, 5), ("D5", 0.5, 6)])
def test_the_exact_accuracy_is_exact(net):
    of, weights, bound = proved(*net)
    accuracy, _ = exact_accuracy(bound, *weights)
    assert accuracy == (true_margins(weights, of.table) > 0).mean()


def test_ties_and_near_ties_are_decided_exactly():
    of = group("C2")
    one = np.float32(1)
    left, right = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)
    tiny = np.float32(2.0**-60)
    unembed = np.array([[1, 1], [tiny, 0], [-one, -one]], np.float32)
    right_answers = decide_exactly(Weights(left, right, unembed), of.table, np.ones((2, 2), bool))
    assert right_answers.tolist() == [[True, False], [False, True]]
    unembed[1] = 0
    assert not decide_exactly(Weights(left, right, unembed), of.table, np.ones((2, 2), bool)).any()


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


def test_training_learns_a_group_and_gives_the_same_bytes_again():
    of = group("D3")
    options = GroupTrainingConfig(width=40, steps=300, batch_size=64, seed=3)
    weights = train_group_net(np.asarray(of.table), options)
    again = train_group_net(np.asarray(of.table), options)
    assert all(np.array_equal(a, b) for a, b in zip(weights, again, strict=True))
    assert (true_margins(weights, of.table) > 0).all()
    bound = prove(*weights, of, compute_budget=0.5)
    assert (bound.verification.margins <= true_margins(weights, of.table)).all()


def _real(data, name: str) -> tuple[Weights, Group]:
    arrays = load_file(data(f"group_nets/{name}.safetensors"))
    table = np.load(data(f"group_nets/{name.split('_')[0]}_table.npy"))
    return Weights(arrays["left"], arrays["right"], arrays["unembed"]), Group(table)


@pytest.mark.parametrize(
    ("name", "least"),
    [("S5_09", 0.95), ("A5_03", 0.95)],
)
def test_nets_trained_elsewhere_are_bounded_and_every_margin_is_true(data, name, least):
    weights, of = _real(data, name)
    bound = prove(*weights, of)
    truth = true_margins(weights, of.table)
    assert (bound.verification.margins <= truth).all()
    assert least <= bound.accuracy_bound <= (truth > 0).mean()


OTHERS = [f"{name}_{seed:02d}" for name in ("A5", "C113", "D59") for seed in (1, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(f"S5_{seed:02d}" for seed in range(1, 50, 2)), *OTHERS])
def test_every_net_is_bounded_soundly(data, name):
    weights, of = _real(data, name)
    bound = prove(*weights, of)
    truth = true_margins(weights, of.table)
    assert (bound.verification.margins <= truth).all()
    assert 0 < bound.accuracy_bound <= (truth > 0).mean()
    assert exact_accuracy(bound, *weights).accuracy == (truth > 0).mean()


@pytest.mark.slow
@settings(max_examples=5000)
@given(st.integers(0, 2**32 - 1), st.sampled_from([("S4", 0.02, 1), ("D5", 0.02, 3)]))
def test_thousands_of_explanations_give_no_bound_above_the_truth(seed, net):
    _try_mutated(seed, net)
