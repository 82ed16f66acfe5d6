"""The global basis says how certain it is, and searches of what has no closed form are bounded."""

import numpy as np
import pytest
import torch
from torch import nn

import mechatlas as ma
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


def test_a_search_without_a_closed_form_takes_as_many_samples_as_it_can_afford():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Identity(), Attention(), nn.Linear(8, 3)).double().eval()
    x = torch.randn(60, 4, 8, dtype=torch.float64)
    settings = ma.InteractionConfig(kinds=("pca",), jacobian_samples=8)
    plenty = basis(network, x, ["0", "1", "2"], settings)
    assert plenty.n_ablation_samples == 60
    little = basis(
        network, x, ["0", "1", "2"],
        ma.InteractionConfig(kinds=("pca",), jacobian_samples=8, max_ablation_flops=1.0),
    )  # fmt: skip
    assert little.n_ablation_samples == 16
    assert little["0"].edge_curves["pca"].n_needed is not None
