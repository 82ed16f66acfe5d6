"""The global basis says how certain it is, and searches of what has no closed form are bounded."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import mechatlas as ma
from mechatlas.analysis.interaction.costs import Costs
from mechatlas.analysis.interaction.interaction_basis import basis
from mechatlas.analysis.interaction.layer_maps import layer_maps
from mechatlas.analysis.interaction.statistics import Inputs, output_gradients
from mechatlas.base import Site

LAYERS = ["0", "2", "3"]


def network_and_inputs(*, linear, n=400):
    torch.manual_seed(0)
    middle = nn.Identity() if linear else nn.ReLU()
    last = nn.Linear(9, 5)
    network = nn.Sequential(nn.Identity(), nn.Linear(6, 9), middle, last).double()
    with torch.no_grad():  # outputs of different importance
        last.weight *= torch.tensor([8.0, 4, 2, 1, 0.5]).double()[:, None]
    return network, torch.randn(n, 6, dtype=torch.float64)


def test_gradients_that_never_change_need_no_more_samples():
    network, x = network_and_inputs(linear=True)
    found = basis(network, x, LAYERS, ma.InteractionConfig(kinds=("gib",), jacobian_samples=80))
    assert found.n_gradient_samples == 10
    for layer in found.layers[:-1]:
        assert layer.global_agreement == pytest.approx(1, abs=1e-6)
    assert found.layers[-1].global_agreement is None
    assert "Global basis from gradients of 10 samples" in found.summary()


def test_gradients_are_taken_on_more_samples_where_the_basis_is_uncertain():
    network, x = network_and_inputs(linear=False)
    steps = []
    settings = ma.InteractionConfig(kinds=("gib", "lib"), jacobian_samples=64, ablations=False)
    found = basis(network, x, LAYERS, settings, on_progress=lambda *done: steps.append(done))
    n = found.n_gradient_samples
    assert 8 < n <= 64
    agreement = [each for each in (x.global_agreement for x in found.layers) if each is not None]
    assert len(agreement) == 2
    assert 0 < min(each.min() for each in agreement) < 1
    first = Inputs.from_data(x).random_subset(4096, seed=0)[:n]
    sites = [Site.parse(name) for name in LAYERS]
    maps = layer_maps(network, sites, x[:16])
    direct = output_gradients(network, maps, maps, first, batch_size=512)
    gradients = found["0"].gradient_eigenvalues
    np.testing.assert_allclose(gradients, np.linalg.eigvalsh(direct[0])[::-1], atol=1e-9)
    done = [each for each, _ in steps]
    assert done == sorted(done)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return x + self.attend(x, x, x, need_weights=False)[0]


def test_parts_without_a_closed_form_take_as_many_samples_as_they_can_afford():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Identity(), Attention(), nn.Linear(8, 3)).double().eval()
    x = torch.randn(60, 4, 8, dtype=torch.float64)
    told: list[Costs] = []
    settings = ma.InteractionConfig(kinds=("pca",), jacobian_samples=40)
    plenty = basis(network, x, ["0", "1", "2"], settings, on_costs=told.append)
    assert plenty.n_ablation_samples == 60
    assert plenty["0"].edges_by_basis["pca"].n_samples == 40
    settings = dataclasses.replace(settings, max_flops=1.0)
    little = basis(network, x, ["0", "1", "2"], settings, on_costs=told.append)
    assert little.n_ablation_samples == little["0"].edges_by_basis["pca"].n_samples == 16
    assert little["1"].edges_by_basis["pca"].n_samples == 40  # a product of matrices
    assert little["0"].edge_curves["pca"].n_needed is not None
    (derivatives, runs), (fewer, fewer_runs) = (costs.operations() for costs in told)
    assert fewer < derivatives
    assert fewer_runs < runs
    assert told[0].seconds() > 0


def test_edges_and_searches_are_bounded_by_operations():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Identity(), Attention(), nn.Linear(8, 3)).double().eval()
    x = torch.randn(100, 4, 8, dtype=torch.float64)
    sites = [Site("0"), Site("1"), Site("2")]
    maps = layer_maps(network, sites, x[:9])
    inputs = Inputs.from_data(x).with_activations(network, sites, batch_size=50)
    to_end = [layer_maps(network, [s, sites[-1]], x[:9])[0] for s in sites[:-1]]
    a_run = Costs(maps, to_end, inputs, ma.InteractionConfig()).maps[0].a_run
    assert a_run >= 2 * 4 * 8 * (3 * 8 + 8)  # four products with a row at each of four positions
    settings = ma.InteractionConfig(max_flops=20 * a_run * 3 * 8)
    costs = Costs(maps, to_end, inputs, settings)
    assert costs.edge_samples(0, 8, 8) == 20  # three points for each of eight coordinates
    assert costs.edge_samples(0, 4, 8) == 40
    assert costs.search_samples(0, 8) == 16  # at least
    assert costs.search_samples(1, 3) == 100
