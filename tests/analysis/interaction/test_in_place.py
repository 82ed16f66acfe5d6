"""Networks that write in place have the same interaction basis as their twins that do not."""

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mechatlas.analysis.interaction.interaction_basis import basis
from mechatlas.analysis.interaction.results import InteractionConfig

SETTINGS = InteractionConfig(
    kinds=("lib",),
    jacobian_samples=16,
    ablation_samples=16,
    n_null_graphs=1,
    ablations=False,
    score="fvu",
)


class Block(nn.Module):
    """Residual block of vectors; what follows it is rectified in place or not."""

    def __init__(self, d: int, *, write: bool) -> None:
        super().__init__()
        self.inner, self.act, self.out = nn.Linear(d, d), nn.ReLU(inplace=write), nn.Linear(d, d)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(self.act(self.inner(x)))
        if self.write:
            y += x
            return y
        return y + x


def chain(*write: bool) -> nn.Module:
    first, second = nn.ReLU(inplace=write[0]), nn.ReLU(inplace=write[1])
    return nn.Sequential(
        nn.Identity(), nn.Linear(8, 12), first, nn.Linear(12, 6), second, nn.Linear(6, 4)
    )


def nested(*write: bool) -> nn.Module:
    inner = nn.Sequential(nn.Linear(8, 12), nn.ReLU(inplace=write[0]))
    return nn.Sequential(
        nn.Sequential(inner, nn.Linear(12, 6)), nn.ReLU(inplace=write[1]), nn.Linear(6, 4)
    )


def residual(*write: bool) -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 6), Block(6, write=write[0]), nn.ReLU(inplace=write[1]), nn.Linear(6, 4)
    )


def convolutional(*write: bool) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 2, padding=1), nn.ReLU(inplace=write[0]),
        nn.Conv2d(3, 4, 2), nn.ReLU(inplace=write[1]), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


LAYERS = {
    chain: (["1", "3"], ["0", "2", "3"], ["1", "2", "5"], ["0", "1", "2", "3", "4", "5"]),
    nested: (["0.0.0", "0.1"], ["0.0", "0", "2"], ["0.0.0", "0.0.1", "0", "1", "2"]),
    residual: (["0", "1"], ["0", "1.inner", "3"], ["1", "2", "3"], ["1.act", "1"]),
    convolutional: (["1", "3"], ["0", "2", "4", "6"], ["1", "2", "3"]),
}


@functools.cache
def measured(make: Callable[..., nn.Module], write: tuple[bool, bool], layers: tuple[str, ...]):
    torch.manual_seed(0)
    network = make(*write).double().eval()
    x = torch.randn(64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = x.clone()
    result = basis(network, x, list(layers), SETTINGS)
    assert torch.equal(x, before)
    return result


@pytest.mark.parametrize("write", [(True, True), (True, False)], ids=str)
@pytest.mark.parametrize(
    ("make", "layers"), [(make, each) for make, lists in LAYERS.items() for each in lists]
)
def test_a_network_that_writes_in_place_has_the_basis_of_its_twin(make, write, layers):
    truth, found = (measured(make, each, tuple(layers)) for each in ((False, False), write))
    for a, b in zip(truth.layers, found.layers, strict=True):
        assert (a.rank_activations.rank, a.rank_gradients.rank) == (
            b.rank_activations.rank,
            b.rank_gradients.rank,
        )
        assert a.free_directions == b.free_directions
        assert (a.dead_units, a.always_on) == (b.dead_units, b.always_on)
        assert a.synchronized_blocks == b.synchronized_blocks
        np.testing.assert_allclose(a.activation_eigenvalues, b.activation_eigenvalues, atol=1e-9)
        np.testing.assert_allclose(a.gradient_eigenvalues, b.gradient_eigenvalues, atol=1e-9)
        for kind, edges in a.edges_by_basis.items():
            strength = b.edges_by_basis[kind].strength
            np.testing.assert_allclose(edges.strength, strength, rtol=1e-6, atol=1e-9)
