"""Free directions of parts that do not interact add up, and stay free together."""

import numpy as np
import pytest
import torch
from torch import nn

from mechatlas.analysis.interaction.layer_maps import layer_maps
from mechatlas.analysis.interaction.module_degeneracy import count_module_degeneracy
from mechatlas.analysis.interaction.statistics import Inputs
from mechatlas.base import InputError, Site

from .test_degeneracy import free, plant, samples, stack

WIDTHS = [3, 6, 2]


def halves(joined: float):
    """Two networks side by side, each with planted degeneracies; `joined` connects them."""
    x = torch.cat([samples(3, seed, n=300) for seed in (1, 2)], dim=1)
    alone = [
        plant(stack(WIDTHS, seed), x[:, i * 3 : i * 3 + 3], what, seed)
        for i, (seed, what) in enumerate([(1, "dead units"), (2, "always on")])
    ]
    both = stack([2 * width for width in WIDTHS], 3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for number in (1, 2):
            one, other = (network[number].linear for network in alone)
            weight = torch.block_diag(one.weight, other.weight)
            across = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            both[number].linear.weight.copy_(weight + joined * across * (weight == 0))
            both[number].linear.bias.copy_(torch.cat([one.bias, other.bias]))
    labels = [np.repeat([0, 1], width) for width in WIDTHS]
    return both, x, labels, alone


def measured(network: nn.Module, x, labels):
    layers = [Site(str(i)) for i in range(len(list(network.children())))]
    return count_module_degeneracy(
        network, layer_maps(network, layers, x[:8]), Inputs.from_data(x), labels
    )


def test_parts_that_do_not_interact_keep_their_free_directions():
    network, x, labels, alone = halves(0.0)
    found = measured(network, x, labels)
    inputs = x.split(3, dim=1)
    assert found.n_free == tuple(free(n, i) for n, i in zip(alone, inputs, strict=True))
    assert found.shared == 0
    assert found.n_free_together == sum(found.n_free)
    assert found.interaction == pytest.approx(0, abs=1e-20)
    assert found.n_free_network == free(network, x)
    assert found.n_between == 2 * (3 * 6 + 6 * 2)


def test_weights_between_parts_cost_free_directions():
    apart, joined = (measured(*halves(strength)[:3]) for strength in (0.0, 0.3))
    assert apart.n_parameters == joined.n_parameters
    assert sum(joined.n_free) < sum(apart.n_free)
    assert joined.n_free_network < apart.n_free_network


def test_directions_that_are_free_alone_are_not_always_free_together():
    """c x1 x2 with both at zero: a cross, not a plane."""
    interplay = []
    for joint in (0.0, 1.0):
        layers = [nn.Linear(1, 1) for _ in range(3)]
        network = nn.Sequential(nn.Identity(), *layers).double()
        with torch.no_grad():
            for layer, weight, bias in zip(layers, (0, joint, 0), (0, 0, 1), strict=True):
                layer.weight.fill_(weight)
                layer.bias.fill_(bias)
        labels = [np.array([part]) for part in (0, 0, 1, 1)]
        found = measured(network, samples(1, 0, n=50), labels)
        assert found.n_free == (2, 2)
        assert found.n_free_together == 4
        interplay.append(found.interaction)
    assert interplay[0] < 1e-20
    assert interplay[1] > 0.1


def test_parts_that_write_to_the_same_outputs_can_make_up_for_one_another():
    x = samples(3, 1, n=300)
    network = stack([3, 6, 2], 1)
    first, second = network[1].linear, network[2].linear
    with torch.no_grad():  # a unit of the second part does what one of the first does
        first.weight[3], first.bias[3] = first.weight[0], first.bias[0]
        second.weight[:, 3] = 2 * second.weight[:, 0]
    labels = [np.full(3, -1), np.repeat([0, 1], 3), np.full(2, -1)]
    found = measured(network, x, labels)
    assert found.n_parameters == (3, 3)  # the biases alone
    assert found.n_free == (0, 0)
    assert found.shared == 1
    one = measured(network, x, [np.zeros(w, dtype=int) for w in (3, 6, 2)])
    assert one.n_free_together == one.n_free_network == free(network, x)
    assert one.n_between == 0
    assert one.interaction == pytest.approx(0, abs=1e-12)


def test_labels_that_do_not_fit_are_refused():
    network, x, labels, _ = halves(0.0)
    with pytest.raises(InputError, match=r"layers of \[6, 12, 4\] units, got \[6, 12\]"):
        measured(network, x, labels[:2])
