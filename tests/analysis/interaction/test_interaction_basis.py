"""The front door of the analysis: arrays of either kind, a summary, spellings of version 0.1."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mechatlas as ma
from mechatlas.analysis.interaction import basis_analysis
from mechatlas.analysis.interaction.interaction_basis import basis
from mechatlas.analysis.interaction.results import InteractionConfig

from .test_degeneracy import samples, stack

LAYERS = ["0", "1", "2"]
FEW = InteractionConfig(kinds=("lib",), n_null_graphs=3)


def test_numpy_and_torch_give_the_same_result():
    network, x = stack([4, 6, 3], 0), samples(4, 0)
    labels = network(x).argmax(1)
    modules = {name: np.arange(width) % 2 for name, width in (("0", 4), ("1", 6), ("2", 3))}
    tensors = {name: torch.from_numpy(each) for name, each in modules.items()}
    first = basis(network, (x.numpy(), labels.numpy()), LAYERS, FEW, unit_modules=modules)
    second = basis(network, (x, labels), LAYERS, FEW, unit_modules=tensors)
    for a, b in zip(first.layers, second.layers, strict=True):
        np.testing.assert_array_equal(a.to_basis, b.to_basis)
    assert first.module_degeneracy == second.module_degeneracy
    assert first.module_degeneracy is not None


def test_a_result_prints_as_a_few_lines_with_its_evidence():
    result = basis(stack([4, 6, 3], 0), samples(4, 0), LAYERS, FEW)
    assert len(repr(result).splitlines()) <= 6
    assert "of 9 edges" in repr(result["1"])
    assert f"{result.free_directions} of {result.n_parameters} directions" in repr(result)
    assert "random graphs of the same degrees" in repr(result)


def test_parts_of_an_interrupted_call_are_taken_from_a_mapping(monkeypatch):
    network, x, parts = stack([4, 6, 3], 0), samples(4, 0), {}
    first = basis(network, x, LAYERS, FEW, checkpoints=parts)
    monkeypatch.setattr(basis_analysis, "measure_edges", pytest.fail)
    second = basis(network, x, LAYERS, FEW, checkpoints=parts)
    assert first.score == second.score
    assert first["0"].edge_curves == second["0"].edge_curves


def test_spellings_of_version_0_1_warn_and_work():
    network: Any = nn.Sequential(nn.Identity(), nn.Linear(3, 2)).double()
    old: Any = ma
    with pytest.warns(DeprecationWarning, match="allowed_fall|Analysing|score|relative|sources"):
        how = old.Analysing(kinds=("pca",), allowed_fall=0.01, score="numbers", sources=8)
    assert (how.max_accuracy_drop, how.score, how.gradient_probes) == (0.01, "fvu", 8)
    options: Any = {"how": how, "kept": {}}
    with pytest.warns(DeprecationWarning, match="settings|checkpoints"):
        result: Any = basis(network, samples(3, 0), ["0", "1"], **options)
    with pytest.warns(DeprecationWarning, match="degeneracy"):
        assert result.ledger == result.degeneracy
    with pytest.warns(DeprecationWarning, match="edge_curves|n_needed"):
        assert result["0"].needed["pca"].number == result["0"].edge_curves["pca"].n_needed
    with pytest.warns(DeprecationWarning, match="degeneracy"):
        assert result["0"].account == result["0"].degeneracy
