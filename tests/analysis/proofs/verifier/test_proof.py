"""Proofs in files: saved, checked, damaged, forged, and of the last version."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mechatlas.analysis.proofs.verifier.explanation import ProofError
from mechatlas.analysis.proofs.verifier.proof import load_proof
from mechatlas.base import UserError

from ..planted import proved, true_margins

GOLDEN = Path(__file__).parents[3] / "golden" / "proof_0_1"


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


def test_damaged_proofs_arerefused_or_true(tmp_path):
    assert _fuzz(tmp_path, 200) > 0


@pytest.mark.slow
def test_thousands_of_damaged_proofs_arerefused_or_true(tmp_path):
    assert _fuzz(tmp_path, 5000) > 0


def test_a_proof_of_version_0_1_still_holds():
    weights = load_file(GOLDEN / "net.safetensors")
    proof = load_proof(GOLDEN / "proof.safetensors")
    expected = json.loads((GOLDEN / "expected.json").read_text())
    for short in (False, True):
        verification = proof.check(**weights, reference=short)
        assert verification.accuracy_bound == proof.accuracy_bound == expected["accuracy_bound"]
        # Those of version 0.1 were by the second stage, which sees more than it takes to certify.
        assert (verification.margins[0] <= np.array(expected["margins"]) + 1e-5).all()
