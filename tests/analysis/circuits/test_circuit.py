"""The verb `circuit`, from a network and arrays."""

import dataclasses

import numpy as np
import pytest
import torch

import mechatlas
from mechatlas.analysis.circuits.circuit import circuit
from mechatlas.base import InputError
from tests.analysis.circuits import transformers
from tests.analysis.circuits.small import A, B, Linear, two


def pair(width_a: int = 16, width_b: int = 18) -> tuple[Linear, Linear]:
    return (
        Linear(width_a, 24, seed=4, dtype=torch.float32),
        Linear(width_b, 30, seed=5, dtype=torch.float32),
    )


def images(n: int = 48) -> torch.Tensor:
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def test_a_circuit_says_what_it_found_and_on_which_evidence():
    a, b = pair()
    network = two(0, torch.float32)
    found = circuit(network, a, b, images(), site_a=A, site_b=B, n_ablated=12, top_k_sources=3)
    assert found.routes == ("1x1", "3x3", "5x5", "pool")
    assert len(found.edges.source) == 336  # two targets are never active
    assert found.evidence is not None
    assert found.evidence.n_ablated == 12
    assert found.evidence.agreement.low > found.evidence.agreement.null_high
    assert found.evidence.agreement_open_gates is not None
    for route, kernel in enumerate(found.kernels()):
        own = found.edges.route == route
        np.testing.assert_allclose(
            kernel.sum(axis=1), found.edges.weight[own], rtol=1e-3, atol=1e-5
        )
    lines = repr(found).splitlines()
    assert lines[0].startswith("Circuit: first -> second, ")
    assert f"{found.significant.sum()} of 336 edges significant" in lines[0]
    assert len(lines) <= 6
    assert "12 ablations: rank correlation" in lines[-1]
    assert mechatlas.circuit is circuit


def test_numpy_samples_and_names_of_sites_give_the_same_circuit():
    a, b = pair()
    network = two(0, torch.float32)
    x = images(12)
    first = circuit(network, a, b, x[:8], held_out=x[8:], site_a=A, site_b=B)
    again = circuit(network, a, b, x.double().numpy(), site_a="first", site_b="second")
    for field in dataclasses.fields(first.edges):
        mine, other = getattr(first.edges, field.name), getattr(again.edges, field.name)
        np.testing.assert_array_equal(mine, other)
    np.testing.assert_array_equal(first.reproduced_variance, again.reproduced_variance)
    assert first.evidence is None


def test_layers_of_transformers_have_circuits_by_head_and_mlp():
    a, b = pair(12, 12)
    x = torch.randn(48, 12, 12, generator=torch.Generator().manual_seed(1))
    network = transformers.small("after", dtype=torch.float32)
    found = circuit(network, a, b, x, site_a=transformers.A, site_b=transformers.B, n_ablated=12)
    assert found.routes[0] == "direct"
    assert "head2 > mlp" in found.routes
    assert found.evidence is not None
    assert found.evidence.agreement.spearman > 0.9
    assert found.evidence.agreement_open_gates is None


def test_too_few_samples_are_refused():
    a, b = pair()
    with pytest.raises(InputError, match="samples to validate it on, got 2 and 0"):
        circuit(two(0, torch.float32), a, b, images(2), site_a=A, site_b=B)


def test_half_precision_is_refused():
    a, b = pair()
    with pytest.raises(InputError, match=r"bfloat16, which is too coarse .* `network.float\(\)`"):
        circuit(two(0, torch.bfloat16), a, b, images(12), site_a=A, site_b=B)
