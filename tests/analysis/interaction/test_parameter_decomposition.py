"""Subcomponents sum to the weights; masks, importances and searches do what they say."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mechatlas.analysis.interaction import parameter_decomposition as decomposition
from mechatlas.analysis.interaction.parameter_decomposition import (
    DecompositionConfig,
    decompose,
    recovered_columns,
)
from mechatlas.base import InputError, NonFiniteError, RecipeError

LAYERS = ("0", "1")


def toy():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 2, bias=False), nn.Linear(2, 5), nn.ReLU())


def draw(n, random=None):
    values, there = torch.rand(2, n, 5, generator=random)
    return values * (there < 0.3)


@pytest.fixture(scope="module")
def found():
    return decompose(toy(), draw, LAYERS, DecompositionConfig(steps=400, batch_size=128, lr=1e-2))


def exact(found, network):
    """Make the subcomponents of the first layer its columns, and 15 of zeros."""
    with torch.no_grad():
        part: Any = found.parts[0]
        part.v.zero_()
        part.u.zero_()
        part.v[:, :5] = torch.eye(5)
        part.u[:5] = network.get_parameter("0.weight").T


def test_training_brings_the_sum_to_the_weights_and_leaves_the_network_alone(found):
    weight = toy().get_parameter("0.weight").detach().numpy()
    assert np.abs(found.components("0").sum(axis=0) - weight).max() < 0.05
    assert found.faithfulness < 1e-3
    for name, value in toy().state_dict().items():
        assert torch.equal(value, found.network.state_dict()[name])
    assert all(each.requires_grad for each in found.network.parameters())


def test_the_leaky_sigmoids_have_the_gradients_of_the_paper():
    x = torch.tensor([-1.0, -1.0, 0.5, 2.0], requires_grad=True)
    lower = decomposition._LowerLeaky.apply(x)
    assert isinstance(lower, torch.Tensor)
    assert lower.tolist() == [0, 0, 0.5, 1]
    (lower * torch.tensor([-1.0, 1, 1, 1])).sum().backward()  # the first would be raised
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([-0.01, 0, 1, 0])
    y = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    upper = decomposition._upper_leaky(y)
    assert upper.tolist() == pytest.approx([0, 0.5, 1.01])
    upper.sum().backward()
    assert y.grad is not None
    assert y.grad.tolist() == pytest.approx([0, 1, 0.01])


def test_exact_columns_are_recovered_and_five_suffice():
    network = toy()
    found = decompose(network, draw, LAYERS, DecompositionConfig(steps=1, batch_size=8))
    exact(found, network)
    with torch.no_grad():  # important wherever the input is there
        part: Any = found.parts[0]
        part.gate_in.fill_(1)
        part.gate_out.fill_(1)
    recovered = recovered_columns(
        found.components("0"), network.get_parameter("0.weight").detach().numpy()
    )
    assert recovered.mean_max_cosine == pytest.approx(1)
    assert recovered.mean_length_ratio == pytest.approx(1)
    torch.manual_seed(1)
    needed = found.needed("0", draw(512), max_drop=1e-4)
    assert (needed.n_needed, needed.n) == (5, 20)


def test_a_masked_subcomponent_is_that_column_taken_out():
    network = toy()
    found = decompose(network, draw, LAYERS, DecompositionConfig(steps=1, batch_size=8))
    exact(found, network)
    x = draw(64)
    mask = torch.ones(20)
    mask[2] = 0
    with torch.no_grad(), decomposition._masked(network, {"0": (found.parts[0], mask)}):
        ours = network(x)
    x[:, 2] = 0
    torch.testing.assert_close(ours, network(x).detach())


def test_halves_of_a_column_have_its_direction_and_half_its_length():
    weight = np.random.default_rng(0).standard_normal((2, 3))
    components = np.stack([np.where(np.arange(3) == k % 3, weight / 2, 0) for k in range(6)])
    recovered = recovered_columns(components, weight)
    assert recovered.mean_max_cosine == pytest.approx(1)
    assert recovered.mean_length_ratio == pytest.approx(0.5)


def test_a_layer_that_is_not_linear_is_refused():
    with pytest.raises(InputError, match="no linear layer '2'; it has 0, 1"):
        decompose(toy(), draw, ("2",))


@pytest.mark.parametrize("stopped", [1, 4, 5, 7])
def test_a_stopped_training_continues_as_if_it_had_never_been_stopped(monkeypatch, stopped):
    monkeypatch.setattr(decomposition, "CHECKPOINT_STEPS", 2)
    config = DecompositionConfig(steps=7, batch_size=16)
    whole, kept, steps = decompose(toy(), draw, LAYERS, config), {}, []

    def stop(done, total):
        steps.append(done)
        if done == stopped:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decompose(toy(), draw, LAYERS, config, checkpoints=kept, on_progress=stop)
    before = len(steps)
    stopped = None
    again = decompose(toy(), draw, LAYERS, config, checkpoints=kept, on_progress=stop)
    assert steps[before:] == list(range(before - before % 2 + 1, 8)) or before == 7
    for layer in LAYERS:
        assert np.array_equal(whole.components(layer), again.components(layer))
    assert (whole.faithfulness, whole.reconstruction) == (
        again.faithfulness, again.reconstruction,
    )  # fmt: skip


def test_a_gate_is_the_network_of_its_own_inner_activation():
    network = toy()
    found = decompose(network, draw, LAYERS, DecompositionConfig(steps=2, batch_size=8))
    part: Any = found.parts[0]
    x = draw(6).reshape(2, 3, 5)
    hidden = nn.functional.gelu((x @ part.v)[..., None] * part.gate_in + part.gate_bias)
    torch.testing.assert_close(
        part.gate(x), (hidden * part.gate_out).sum(dim=-1) + part.gate_offset
    )


def test_what_cannot_be_trained_is_said():
    with pytest.raises(RecipeError, match="lr must be > 0, got 0"):
        DecompositionConfig(lr=0.0)
    with pytest.raises(NonFiniteError, match="after 3 steps: lower `lr`"):
        decompose(toy(), draw, LAYERS, DecompositionConfig(steps=3, batch_size=8, lr=1e12))
