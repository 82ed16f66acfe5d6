"""One harness for every basis: all edges change nothing, none leave the mean."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechatlas.analysis.interaction.ablation import (
    Behavior,
    EdgeAblation,
    ablate_vectors,
    ablation_sites,
    find_needed,
)
from mechatlas.analysis.interaction.bases import interaction_basis, neuron_basis, pca_basis
from mechatlas.analysis.interaction.interaction_basis import basis
from mechatlas.analysis.interaction.layer_maps import rows_of
from mechatlas.analysis.interaction.results import InteractionConfig
from mechatlas.analysis.interaction.statistics import Inputs, collect_statistics
from mechatlas.base import InputError, SiteError

from .test_layer_maps import LAYERS, NETWORKS, setting


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 250))
def test_the_search_ends_at_a_number_that_suffices_wherever_it_begins(enough, of, guess):
    found = find_needed(of, lambda n: 1.0 if n >= enough else 0.5, 1.0, guess=guess)
    assert found.n_needed == (enough if enough <= of else None)
    assert all(score in (0.5, 1.0) for score in found.scores)
    assert len(found.kept) <= 20


def test_a_search_from_a_good_guess_tries_few_numbers():
    tried = []

    def score(n):
        tried.append(n)
        return float(n >= 138_141)

    exact = find_needed(146_689, score, 1.0, guess=140_000)
    assert exact.n_needed == 138_141
    assert min(tried) > 130_000


@pytest.mark.parametrize("name", NETWORKS)
def test_all_edges_change_nothing_and_the_short_way_is_the_long_way(name):
    network, x, maps, _ = setting(name)
    inputs = Inputs.from_data(x)
    layers, _ = collect_statistics(network, inputs, LAYERS, maps, batch_size=9)
    (site,) = ablation_sites(network, maps, maps, inputs, fvu=True)
    source, target = pca_basis(layers[0].moments), neuron_basis(layers[1].moments)
    ablation = EdgeAblation(site, source, target)
    everything = np.ones((len(target), len(source)), dtype=bool)
    torch.testing.assert_close(ablation.outputs(everything), site.behavior.outputs)
    assert site.behavior.score(ablation.outputs(everything)) == pytest.approx(1)
    slow = EdgeAblation(site, source, target)
    slow._form = None
    mask = np.random.default_rng(0).random(everything.shape) < 0.5
    torch.testing.assert_close(ablation.outputs(mask), slow.outputs(mask))
    # By hand, for one target coordinate: leave out what it must not see, run, read it.
    rows = rows_of(site.x)
    kept = source.transform(rows) * torch.from_numpy(mask[1])
    after = maps[0].run(source.inverse(kept).reshape(rows.shape) if x.ndim < 4 else
                            source.inverse(kept).reshape(len(x), *x.shape[2:], -1).movedim(-1, 1),
                            x)  # fmt: skip
    torch.testing.assert_close(ablation.outputs(mask)[..., 1], rows_of(after)[..., 1])


def test_vectors_that_nothing_reads_are_not_needed():
    torch.manual_seed(0)
    x = torch.randn(200, 6, dtype=torch.float64) * torch.tensor([9.0, 8, 7, 1, 1, 1])
    network: Any = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(6, 3)).double()
    with torch.no_grad():
        network[1].weight[:, :3] = 0  # it reads only what varies least
    found = basis(network, x, ["0", "1"], InteractionConfig(kinds=("pca", "lib")))
    assert found[0].vector_curves["lib"].n_needed in (2, 3)
    assert (found[0].vector_curves["pca"].n_needed or 99) > 3
    assert found[0].vector_curves["lib"].n == 3


def test_without_labels_the_network_is_its_own_judge():
    outputs = torch.randn(50, 1, 4)
    own = Behavior.from_outputs(outputs, None)
    assert own.agreement
    assert own.measure == "agreement"
    assert own.score(outputs) == 1
    numbers = Behavior.from_outputs(outputs, None, fvu=True)
    assert numbers.score(outputs) == 1
    mean = outputs.mean(dim=(0, 1), keepdim=True).expand_as(outputs)
    assert numbers.score(mean) == pytest.approx(0, abs=1e-6)


def test_bases_turn_there_and_back():
    network, x, maps, _ = setting("relu")
    layers, firing = collect_statistics(network, Inputs.from_data(x), LAYERS, maps, batch_size=9)
    assert firing[0] is not None
    gram = layers[0].moments.covariance
    made = interaction_basis(layers[0].moments, firing[0].pullback(np.eye(6)))
    turned = made.to_basis.T @ gram @ made.to_basis
    np.testing.assert_allclose(turned, np.diag(made.importance), atol=1e-10)
    pulled = made.from_basis @ firing[0].pullback(np.eye(6)) @ made.from_basis.T
    np.testing.assert_allclose(pulled, np.eye(len(made)), atol=1e-8)
    torch.testing.assert_close(made.inverse(made.transform(x)), x)


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="quadrature_points must be at least 1"):
        dataclasses.replace(InteractionConfig(), quadrature_points=0)
    with pytest.raises(ValueError, match="kinds must name"):
        InteractionConfig(kinds=())


def test_a_stage_keeps_activations_for_vectors():
    network, x, maps, _ = setting("relu")
    layers, _ = collect_statistics(network, Inputs.from_data(x), LAYERS, maps, batch_size=9)
    (site,) = ablation_sites(network, maps, maps, Inputs.from_data(x), fvu=True)
    found = ablate_vectors(site, neuron_basis(layers[0].moments))
    assert found.n_needed == 5
    assert found.score == pytest.approx(1)


class Signs:
    """Every channel as two latents: what is above zero, and what is below."""

    def __init__(self, d_in: int) -> None:
        self.d_in, self.n_latents = d_in, 2 * d_in

    def encode(self, x):
        return torch.cat([x, -x], dim=1).relu()

    def decode(self, code):
        return code[:, : self.d_in] - code[:, self.d_in :]


class Lossy(Signs):
    """It forgets the last channel."""

    def encode(self, x):
        return super().encode(x * torch.tensor([1.0] * (self.d_in - 1) + [0.0]))


def test_dictionaries_are_compared_in_the_same_harness():
    torch.manual_seed(0)
    x = torch.randn(200, 4)
    network: Any = torch.nn.Sequential(
        torch.nn.Identity(), torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU()),
        torch.nn.Linear(5, 3),
    )  # fmt: skip
    with torch.no_grad():
        network[1][0].weight[:, 0] = 0  # nothing reads the first channel
    how = InteractionConfig(kinds=("neurons",), score="fvu")
    found = basis(network, x, ["0", "1", "2"], how, dictionaries={"0": Signs(4)})
    first, second, _ = found.layers
    made = first.bases["dictionary"]
    assert len(made) == 8
    torch.testing.assert_close(made.inverse(made.transform(x)), x, atol=1e-5, rtol=1e-5)
    assert "dictionary" not in second.bases
    strength = first.edges_by_basis["dictionary"].strength
    assert strength.shape == (5, 8)
    np.testing.assert_allclose(strength[:, [0, 4]], 0, atol=1e-9)
    needed = first.edge_curves["dictionary"]
    assert needed.n == 40
    assert needed.n_needed is not None
    assert needed.n_needed <= 30
    assert needed.score >= 0.999
    assert first.vector_curves["dictionary"].n == 8
    lossy = basis(network, x, ["0", "1", "2"], how, dictionaries={"0": Lossy(4)})
    assert lossy[0].edge_curves["dictionary"].n_needed is None
    assert lossy[0].edge_curves["dictionary"].score < 0.99


def test_a_dictionary_that_does_not_fit_is_refused():
    network: Any = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(3, 2))
    x = torch.randn(20, 3)
    with pytest.raises(InputError, match="reads 4 channels, the layer has 3"):
        basis(network, x, ["0", "1"], dictionaries={"0": Signs(4)})
    with pytest.raises(SiteError, match=r"dictionary for 1, but layers .* are 0"):
        basis(network, x, ["0", "1"], dictionaries={"1": Signs(2)})

    class Bent(Signs):
        def decode(self, code):
            return super().decode(code).square()

    with pytest.raises(InputError, match="not affine"):
        basis(network, x, ["0", "1"], dictionaries={"0": Bent(3)})
