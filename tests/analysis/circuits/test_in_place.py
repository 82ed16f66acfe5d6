"""Circuits of networks that write in place and call a module twice are those of their twins."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mechatlas.analysis.circuits.circuit import Circuit, circuit
from mechatlas.base import SiteError
from tests.analysis.circuits.small import Linear


class Stack(nn.Module):
    """One ReLU for both places, and a skip connection; in place or not."""

    def __init__(self, *, relu_in_place: bool, sum_in_place: bool) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.relu, self.write = nn.ReLU(inplace=relu_in_place), sum_in_place
        self.second, self.third = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm(self.first(x)))
        z = self.second(y)
        if self.write:
            z += y
        else:
            z = z + y
        return self.third(self.relu(z))


class Separate(Stack):
    """Twin with a ReLU of its own for each place, and nothing in place."""

    def __init__(self) -> None:
        super().__init__(relu_in_place=False, sum_in_place=False)
        self.relu_two = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm(self.first(x)))
        return self.third(self.relu_two(self.second(y) + y))


WIDTHS = {"first": 6, "norm": 6, "relu#1": 6, "second": 6, "relu#2": 6, "third": 5}
PAIRS = [
    ("first", "norm"), ("first", "second"), ("norm", "second"), ("norm", "third"),
    ("relu#1", "second"), ("relu#1", "relu#2"), ("relu#2", "third"), ("second", "third"),
]  # fmt: skip


def outcome(network: nn.Module, sites: tuple[str, str]) -> Circuit | str:
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.4)
    x = torch.randn(12, 3, 8, 7, generator=torch.Generator().manual_seed(1)).double()
    a, b = (Linear(WIDTHS[site], 12, seed=k, dtype=x.dtype) for k, site in enumerate(sites))
    if isinstance(network, Separate):
        first, second = (s.replace("relu#1", "relu").replace("relu#2", "relu_two") for s in sites)
        sites = first, second
    try:
        return circuit(network, a, b, x, site_a=sites[0], site_b=sites[1])
    except SiteError as error:
        return str(error)


@pytest.mark.parametrize("sites", PAIRS, ids=" ".join)
@pytest.mark.parametrize("relu_in_place", [True, False])
@pytest.mark.parametrize("sum_in_place", [True, False])
def test_a_network_that_writes_in_place_has_the_circuit_of_its_twin(
    sites, relu_in_place, sum_in_place
):
    written = Stack(relu_in_place=relu_in_place, sum_in_place=sum_in_place).double().eval()
    found, truth = outcome(written, sites), outcome(Separate().double().eval(), sites)
    assert isinstance(truth, Circuit) == (sites != ("second", "third"))
    if isinstance(truth, str):
        assert isinstance(found, str)
        assert "also depends on what comes before" in found
        return
    assert isinstance(found, Circuit), found
    assert found.routes == truth.routes or "relu" in sites[1]
    for kernel, own in zip(found.kernels(), truth.kernels(), strict=True):
        np.testing.assert_allclose(kernel, own, rtol=1e-6, atol=1e-9)
    for name in ("source", "target", "route"):
        np.testing.assert_array_equal(getattr(found.edges, name), getattr(truth.edges, name))
    np.testing.assert_allclose(found.edges.weight, truth.edges.weight, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.reproduced_variance, truth.reproduced_variance, atol=1e-6)


@pytest.mark.parametrize("sites", [("relu", "third"), ("first", "relu")])
def test_a_module_that_is_called_twice_needs_the_number_of_the_call(sites):
    network = Stack(relu_in_place=True, sum_in_place=True).double().eval()
    x = torch.randn(6, 3, 8, 7, dtype=torch.float64)
    a, b = (Linear(6 if s != "third" else 5, 12, seed=0, dtype=torch.float64) for s in sites)
    with pytest.raises(SiteError, match=r"relu#1.*relu#2"):
        circuit(network, a, b, x, site_a=sites[0], site_b=sites[1])
