"""The short verifier in numpy against the compiled one."""

import dataclasses
import inspect
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from mechatlas.analysis.proofs.verifier import compiled, reference
from mechatlas.analysis.proofs.verifier.exact import decide_exactly
from mechatlas.analysis.proofs.verifier.structures import PackedGrids
from mechatlas.analysis.proofs.verifier.verify import verify

from ..planted import NETS, proved, true_margins


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


def test_compiled_loops_have_the_parameters_of_those_that_are_read():
    assert {"PairSum", "PairCounts"} <= {each.__name__ for each in compiled.STRUCTURES}
    for name in compiled.__all__:
        parameters = inspect.signature(inspect.unwrap(getattr(reference, name))).parameters
        loop = getattr(getattr(compiled, name), "py_func", getattr(compiled, name))
        assert list(inspect.signature(inspect.unwrap(loop)).parameters) == list(parameters), name


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


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_distances_of_cells_bound_every_lookup_of_a_table(offset, seed):
    random, (neurons, k, k2, n) = np.random.default_rng(seed), (9, 4, 3, 6)
    residual = random.normal(size=(neurons, n)).astype(np.float32)
    scale = random.normal(size=neurons).astype(np.float32)
    table = random.normal(size=(k, k2)) * (1 - offset)
    table -= table.mean(axis=0)
    table = (table - table.mean(axis=1, keepdims=True) + offset).astype(np.float32)
    points = np.stack([random.integers(k, size=neurons), random.integers(k2, size=neurons)])
    grids = PackedGrids(
        shapes=np.array([[0, neurons, k, k2, 0, k, 0, 0]]),
        points=points,
        antipodes=np.concatenate([np.arange(k), np.arange(k2)]),
        scale=scale,
        tables=table.ravel(),
    )
    weight = np.abs(residual).max(axis=1).astype(np.float64)
    cells, spans = np.zeros((k * k2, n)), np.zeros((n, n), np.float32)
    off_center, _ = reference.sum_cells(residual, weight, grids, cells)
    reference.add_distances(cells.astype(np.float32), 1e-5, spans)
    assert (off_center > 1) == (offset == 1)
    for _ in range(50):
        left, right = random.permutation(k), random.permutation(k2)
        looked_up = scale * table[left[points[0]], right[points[1]]]
        logits = looked_up.astype(np.float64) @ residual
        loss = logits - logits[:, None]  # of answer z against w
        assert (loss <= 1.000002 * spans + off_center).all()


def test_distances_of_columns_are_never_too_small():
    vectors = (3 + np.random.default_rng(0).normal(size=(12, 7))).astype(np.float32)
    exact = np.linalg.norm(vectors[:, :, None].astype(np.float64) - vectors[:, None], axis=0)
    for loops in (reference, compiled):
        out = np.ones((7, 7), np.float32)
        loops.add_distances(vectors, 1e-5, out)
        assert (1 + exact <= out).all()
        assert (out <= 1.05 + exact).all()
