"""Changes of the weights that change nothing leave basis and edges as they were."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechatlas.analysis.interaction.interaction_basis import basis
from mechatlas.analysis.interaction.modularity import adjusted_rand_index
from mechatlas.analysis.interaction.results import InteractionConfig

from .test_degeneracy import plant, samples, stack

FEW = InteractionConfig(kinds=("lib",), score="fvu", ablations=False)


def analysed(network, x):
    return basis(network, x, [str(i) for i in range(len(network))], FEW)


def same(before, after):
    """Coordinates and edges, up to the sign of each coordinate."""
    for old, new in zip(before.layers, after.layers, strict=True):
        strong = old.basis.importance > 1e-6 * old.basis.importance[0]
        np.testing.assert_allclose(new.basis.importance[: strong.sum()],
                                   old.basis.importance[strong], rtol=1e-5)  # fmt: skip
        if old.edges is not None:
            rows = min(len(old.edges), len(new.edges))
            scale = old.edges.max()
            np.testing.assert_allclose(
                new.edges[:rows, : strong.sum()], old.edges[:rows, : strong.sum()],
                atol=1e-5 * scale,
            )  # fmt: skip


@given(st.integers(0, 10_000))
@settings(max_examples=10)
def test_weights_that_read_null_directions_do_not_matter(seed):
    x = samples(5, seed, null=2)
    network = stack([5, 7, 3], seed)
    before, outputs = analysed(network, x), network(x)
    null = torch.linalg.svd(torch.cat([x, torch.ones(len(x), 1)], dim=1).double())[2][-2:]
    with torch.no_grad():
        change = torch.randn(7, 2, dtype=torch.float64) @ null
        network[1].linear.weight += change[:, :-1]
        network[1].linear.bias += change[:, -1]
    assert torch.allclose(network(x), outputs)
    same(before, analysed(network, x))


@given(st.integers(0, 10_000))
@settings(max_examples=10)
def test_scaling_units_and_mixing_synchronised_ones_does_not_matter(seed):
    x = samples(5, seed)
    network = plant(stack([5, 7, 3], seed), x, "always on", seed)
    before, outputs = analysed(network, x), network(x)
    generator = torch.Generator().manual_seed(seed)
    turn = torch.diag(torch.rand(7, generator=generator, dtype=torch.float64) + 0.5)
    turn[4:6, 4:6] += 0.3 * torch.rand(2, 2, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        first, second = network[1].linear, network[2].linear
        first.weight.copy_(turn @ first.weight)
        first.bias.copy_(turn @ first.bias)
        second.weight.copy_(second.weight @ torch.linalg.inv(turn))
    assert torch.allclose(network(x), outputs)
    same(before, analysed(network, x))


def test_a_rotation_of_a_layer_does_not_matter():
    from .test_modularity import side_by_side

    for seed in (0, 3):
        network, x, _ = side_by_side(2, seed)
        before = basis(network, x, [str(i) for i in range(len(network))], FEW)
        generator = torch.Generator().manual_seed(seed + 50)
        width = len(network[1].turn.weight)
        turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[
            0
        ]
        with torch.no_grad():
            network[1].turn.weight.copy_(turn @ network[1].turn.weight)
            network[2].inner.weight.copy_(network[2].inner.weight @ turn.T)
        same(before, basis(network, x, [str(i) for i in range(len(network))], FEW))


def test_equal_partitions_are_equal_whatever_their_names():
    assert adjusted_rand_index(np.array([0, 0, 1, 2]), np.array([5, 5, 3, 1])) == 1.0
