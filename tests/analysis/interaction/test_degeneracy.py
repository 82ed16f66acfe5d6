"""The ledger of free directions against the exact rank of the Hessian."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mechatlas.analysis.interaction import degeneracy
from mechatlas.analysis.interaction.degeneracy import count_degeneracy
from mechatlas.analysis.interaction.interaction_basis import basis
from mechatlas.analysis.interaction.layer_maps import layer_maps
from mechatlas.analysis.interaction.results import InteractionConfig
from mechatlas.analysis.interaction.statistics import Inputs
from mechatlas.base import Site
from mechatlas.maths.linalg import rank_of

PLANTS = (
    "nothing", "null inputs", "dependent units", "null gradients", "dead units",
    "duplicated units", "synchronised units", "always on", "everything",
)  # fmt: skip


class Layer(nn.Module):
    def __init__(self, n_in, n_out, relu):
        super().__init__()
        self.linear, self.relu = nn.Linear(n_in, n_out), relu

    def forward(self, x):
        h = self.linear(x)
        return h.relu() if self.relu else h


def stack(widths, seed) -> Any:
    torch.manual_seed(seed)
    layers = [
        Layer(a, b, relu=i + 2 < len(widths)) for i, (a, b) in enumerate(itertools.pairwise(widths))
    ]
    return nn.Sequential(nn.Identity(), *layers).double().eval()


def samples(width, seed, n=400, null=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width - null, generator=generator, dtype=torch.float64)
    mix = torch.randn(width - null, width, generator=generator, dtype=torch.float64)
    return x @ mix if null else x


def ledger(network, x):
    layers = [Site(str(i)) for i in range(len(network))]
    found = count_degeneracy(network, layer_maps(network, layers, x[:8]), Inputs.from_data(x))
    assert found is not None
    return found


def hessian_rank(network, x):
    """Rank of the Hessian of the behavioral loss by brute force, and the number of parameters."""
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def outputs(values):
        return torch.func.functional_call(network, values, (x,)).flatten()

    jacobian = torch.func.jacrev(outputs)(parameters)
    rows = torch.cat([j.flatten(1) for j in jacobian.values()], dim=1).double().numpy()
    return rank_of(rows, 1e-18), rows.shape[1]


def free(network, x):
    rank, parameters = hessian_rank(network, x)
    assert parameters == ledger(network, x).n_parameters
    return parameters - rank


@torch.no_grad()
def plant(network, x, what, seed):
    """Change the first hidden layer (and the one that reads it)."""
    first, second = network[1].linear, network[2].linear
    every = what == "everything"
    if what == "dependent units":  # four units that span two directions
        mix = torch.randn(4, 2, dtype=torch.float64)
        first.weight[:4] = mix @ torch.randn(2, x.shape[1], dtype=torch.float64)
        first.bias[:4] = 1e2
    if what == "null gradients" or every:
        second.weight[:, 0] = 0
    if what == "dead units" or every:
        first.bias[1] = -1e3
        first.weight[1] /= 10
    if what == "duplicated units" or every:
        first.weight[3], first.bias[3] = 2 * first.weight[2], 2 * first.bias[2]
    if what == "synchronised units":  # on the samples at hand they fire as one, pointing apart
        far = x[: len(x) // 3]
        far[:, 0] += 30
        first.weight[3:, 0] = 0  # the others do not see it, or they would be its complement
        for unit in range(3):
            first.weight[unit, 0] = 1 + unit
            first.bias[unit] = -12 * (1 + unit)
        assert ((first(x) > 0)[:, 0] == (first(x) > 0)[:, 2]).all()
    if what == "always on" or every:
        first.bias[4:6] = 1e2
    return network


@given(
    st.sampled_from(PLANTS),
    st.integers(0, 10_000),
    st.integers(3, 5),
    st.integers(6, 9),
    st.lists(st.integers(3, 6), max_size=1),
    st.integers(1, 3),
)
@settings(max_examples=40)
def test_free_directions_are_the_rank_deficiency_of_the_hessian(
    what, seed, n_in, hidden, more, n_out
):
    x = samples(n_in, seed, null=1 if what in ("null inputs", "everything") else 0)
    network = plant(stack([n_in, hidden, *more, n_out], seed), x, what, seed)
    found = ledger(network, x)
    assert found.n_free == free(network, x), (what, found)
    assert found.across_blocks is not None
    assert found.across_blocks >= 0
    fires = network[1].linear(x) > 0
    firing_sets = torch.unique(fires[:, fires.any(dim=0)], dim=1).double()
    if not more and torch.linalg.matrix_rank(firing_sets) == firing_sets.shape[1]:
        assert found.across_blocks == 0, (what, found)  # no firing sets add up to another


@pytest.mark.parametrize("what", PLANTS)
def test_where_there_are_only_bounds_they_are_bounds(what, monkeypatch):
    monkeypatch.setattr(degeneracy, "MAX_OPERATIONS", 0)
    x = samples(4, 2, null=1 if what in ("null inputs", "everything") else 0)
    network = plant(stack([4, 8, 6, 2], 2), x, what, 2)
    how = InteractionConfig(kinds=("neurons",), ablations=False, score="fvu")
    found = basis(network, x, ["0", "1", "2", "3"], how)
    assert found.degeneracy is None
    counted = sum(layer.free_directions for layer in found.layers)
    rank, parameters = hessian_rank(network, x)
    assert counted <= parameters - rank
    if what in ("dead units", "null inputs", "everything"):
        assert counted > 0


def test_each_cause_is_booked_where_it_belongs():
    x = samples(4, 3)
    network = plant(stack([4, 8, 2], 3), x, "dead units", 3)
    into, out = ledger(network, x).layers
    assert into.dead_units == 5
    assert out.low_rank_activations == 2
    assert out.relu_scaling >= 5
    assert out.synchronized_nonlinearities == 0
    network = plant(stack([4, 8, 2], 3), x, "duplicated units", 3)
    _, out = ledger(network, x).layers
    assert out.low_rank_activations == 2


def test_a_block_of_k_units_has_k_squared_directions():
    x = samples(5, 1)
    network = plant(stack([5, 6, 4], 1), x, "synchronised units", 1)
    _, out = ledger(network, x).layers
    assert out.synchronized_nonlinearities >= 6  # 9 - 3 for the block of three
    before = network(x)
    turn = torch.eye(3, dtype=torch.float64) + 0.01 * torch.randn(3, 3, dtype=torch.float64)
    with torch.no_grad():
        first, second = network[1].linear, network[2].linear
        first.weight[:3], first.bias[:3] = turn @ first.weight[:3], turn @ first.bias[:3]
        second.weight[:, :3] = second.weight[:, :3] @ torch.linalg.inv(turn)
    assert torch.allclose(network(x), before)
    assert ledger(network, x).n_free == free(network, x)


@pytest.mark.parametrize("has_gap", [True, False])
def test_a_count_of_free_directions_is_claimed_only_where_the_spectrum_has_a_gap(has_gap):
    d, n = (12, 4000) if has_gap else (36, 4000)
    random = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -9, d, dtype=torch.float64)
    if has_gap:
        scales = torch.tensor([1.0] * 5 + [0.0] * 7, dtype=torch.float64)
    inputs = torch.randn(n, d, dtype=torch.float64, generator=random) * scales
    network = nn.Sequential(nn.Identity(), nn.Linear(d, 6), nn.GELU(), nn.Linear(6, 3))
    result = basis(network.double().eval(), inputs, ["0", "1", "3"])
    layer = result.layers[0]
    assert layer.has_gap == result.has_gap == has_gap
    assert ("At least" in result.summary()) == has_gap
    assert ("no gap" in result.summary()) == (not has_gap)
    curve = np.array(layer.effective_parameters.n_effective)
    assert (np.diff(curve) >= 0).all()
    if has_gap:
        assert (curve[4:] == 5 * 6).all()  # five directions of the inputs, six units
    else:
        assert len(np.unique(curve)) > 8
