"""Bounds against brute force in higher precision, whatever the explanation says."""

import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from mechatlas.analysis.proofs.explain import explain
from mechatlas.analysis.proofs.prove import prove
from mechatlas.analysis.proofs.verifier import checks, reference
from mechatlas.analysis.proofs.verifier.explanation import Explanation, ProofError
from mechatlas.analysis.proofs.verifier.structures import Weights
from mechatlas.analysis.proofs.verifier.verify import verify
from mechatlas.base import UserError
from mechatlas.maths.groups import Group
from mechatlas.maths.named_groups import group

from ..planted import mutate, planted, proved, refused_or_true, true_margins


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


@settings(max_examples=150)
@given(st.integers(0, 2**32 - 1), st.sampled_from([("S4", 0.02, 1), ("D5", 0.02, 3)]))
def test_no_explanation_gives_a_bound_above_the_truth(seed, net):
    _try_mutated(seed, net)


def _try_mutated(seed, net):
    of, weights, bound = proved(*net)
    random = np.random.default_rng(seed)
    changed = bound.proof.explanation
    for _ in range(random.integers(1, 4)):
        changed = mutate(changed, random)
    refused_or_true(weights, of, changed)


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
        # Members of a cluster whose representative is called dead have to be dead as well.
        dead = e.dead | chosen[e.representative_of]
        quiet = dataclasses.replace(quiet, dead=dead)
        for short in (False, True):
            assert (verify(*weights, of, quiet, reference=short).margins <= truth).all()


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
        for short in (False, True):
            assert (verify(*weights, of, few, reference=short).margins <= truth).all()


def _swapped() -> tuple[Group, Weights, Explanation]:
    """A network that gives two answers for each other, and the explanation of the right one."""
    of = group("S4")
    left, right, unembed = planted(of, noise=0.0, seed=5)
    found = explain(left, right, unembed, of)
    swapped = unembed.copy()
    swapped[:, [3, 7]] = swapped[:, [7, 3]]
    return of, Weights(left, right, swapped), dataclasses.replace(found, second_stage_budget=1.0)


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
    refused_or_true(weights, of, dataclasses.replace(e, grids=tuple(grids)))


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
    refused_or_true(scaled, of, changed)


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


def test_an_element_that_does_not_permute_the_points_of_a_grid_is_refused():
    of, weights, bound = proved("S4", 0.02, 1)
    (grid,) = bound.proof.explanation.grids
    action = grid.right_action.copy()
    action[5, 0] = action[5, 1]
    # All points of this grid may be the same in the table, so that nothing else is wrong.
    alone = np.arange(len(grid.right_antipodes))
    forged = dataclasses.replace(grid, right_action=action, right_antipodes=alone)
    changed = dataclasses.replace(bound.proof.explanation, grids=(forged,))
    with pytest.raises(ProofError, match="does not permute the points"):
        verify(*weights, of, changed)


def test_matrices_that_are_no_representation_are_refused():
    of, weights, bound = proved("S4", 0.02, 1)
    circuit = bound.proof.explanation.circuits[0]
    random = np.random.default_rng(0).normal(size=circuit.matrices.shape)
    forged = dataclasses.replace(circuit, matrices=np.linalg.qr(random)[0])
    changed = dataclasses.replace(bound.proof.explanation, circuits=(forged,))
    with pytest.raises(ProofError, match="not an orthogonal representation"):
        verify(*weights, of, changed)


@pytest.mark.slow
@settings(max_examples=5000)
@given(st.integers(0, 2**32 - 1), st.sampled_from([("S4", 0.02, 1), ("D5", 0.02, 3)]))
def test_thousands_of_explanations_give_no_bound_above_the_truth(seed, net):
    _try_mutated(seed, net)


def test_the_irreps_of_a_group_are_checked_once(monkeypatch):
    angle, phase = 2 * np.pi / 3 * np.arange(3), 2 * np.pi / 9 * np.arange(9)
    side = np.cos(angle[:, None] + phase).astype(np.float32)
    unembed = np.cos(2 * phase[:, None] + angle).astype(np.float32)
    of, explanation = group("C3"), prove(side, side, unembed, group("C3")).proof.explanation
    assert explanation.circuits
    checks._KNOWN.clear()
    first = verify(side, side, unembed, of, explanation)
    for work in ("_irreps", "_actions"):
        monkeypatch.setattr(checks, work, lambda *_: pytest.fail("checked again"))
    again = verify(side, side, unembed, of, explanation)
    np.testing.assert_array_equal(again.margins, first.margins)


def test_classes_that_norms_do_not_certify_are_computed_in_the_frame_of_the_pair(monkeypatch):
    of, weights = group("S4"), planted(group("S4"), noise=0.02, seed=1, missing=2)
    e = prove(*weights, of).proof.explanation
    e = dataclasses.replace(e, second_stage_budget=0.0, third_stage_budget=0.0)
    fast, slow = (verify(*weights, of, e, reference=short) for short in (False, True))
    assert (fast.margins <= true_margins(weights, of.table)).all()
    assert fast.accuracy_bound == slow.accuracy_bound > 0.2
    assert fast.multiply_adds == slow.multiply_adds
    monkeypatch.setattr(
        reference, "_compare_bins", lambda x, y, by_bin, *_: (by_bin.min(axis=0).astype(float), 0)
    )
    assert verify(*weights, of, e, reference=True).accuracy_bound == 0
