"""The short verifier in numpy against the compiled one."""

import dataclasses
import inspect
import subprocess
import sys
import zlib

import numpy as np
import pytest
from safetensors.numpy import save_file

from mechatlas.analysis.proofs.verifier import compiled, compiled_checks, reference
from mechatlas.analysis.proofs.verifier.exact import decide_exactly
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
