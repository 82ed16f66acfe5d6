"""Networks whose tensors have other orders of axes have the interaction basis of their twins."""

import functools
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mechatlas.analysis.interaction.interaction_basis import basis
from mechatlas.analysis.interaction.results import InteractionConfig

SETTINGS = InteractionConfig(
    kinds=("lib",), jacobian_samples=4, ablation_samples=4, n_null_graphs=1, score="fvu"
)


class Stage(nn.Module):
    """Part of a network that is given and returns tensors with some order of axes.

    `C` is the axis of channels split in two, `(bt)` are two axes that are one.
    """

    def __init__(self, inner: nn.Module, plain: str, given: str, returned: str) -> None:
        super().__init__()
        self.inner, self.plain, self.given, self.returned = inner, plain, given, returned

    def forward(self, x: Tensor) -> Tensor:
        return ordered(self.inner(unordered(x, self.plain, self.given)), self.plain, self.returned)


def ordered(x: Tensor, plain: str, axes: str) -> Tensor:
    """Tensor of plain axes in another order of them."""
    flat = re.sub(r"[()]", "", axes).lower()
    x = x.permute([plain.index(letter) for letter in flat])
    if "(" in axes:
        return x.flatten(axes.index("("), axes.index("(") + 1)
    return x.unflatten(axes.index("C"), (2, -1)) if "C" in axes else x


def unordered(x: Tensor, plain: str, axes: str) -> Tensor:
    """Undo `ordered`; merged positions are three."""
    if "(" in axes:
        x = x.unflatten(axes.index("("), (-1, 3))
    if "C" in axes:
        x = x.flatten(axes.index("C"), axes.index("C") + 1)
    flat = re.sub(r"[()]", "", axes).lower()
    return x.permute([flat.index(letter) for letter in plain])


class Around(nn.Module):
    """Parts with functions and a skip connection between them, so that none follows another."""

    def __init__(self, parts: list[Stage]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.parts
        a = first(x)
        b = second(torch.tanh(a)) + 0.5 * a
        return third(torch.relu(b)).flatten(1)


class Mixing(nn.Module):
    """Linear map along the channels and along the positions, with a ReLU between."""

    def __init__(self, n: int, d: int) -> None:
        super().__init__()
        self.channels, self.positions = nn.Linear(d, d), nn.Linear(n, n)

    def forward(self, x: Tensor) -> Tensor:
        return self.positions(self.channels(x).relu().transpose(-1, -2)).transpose(-1, -2)


def inner(plain: str) -> list[nn.Module]:
    if plain == "bchw":
        return [nn.Conv2d(2, 4, 1), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 2, padding=1),
                nn.ReLU(), nn.Conv2d(4, 4, 2)), nn.Conv2d(4, 3, 2)]  # fmt: skip
    if plain == "bc":
        return [nn.Linear(4, 6), nn.Sequential(nn.ReLU(), nn.Linear(6, 6)), nn.Linear(6, 3)]
    return [nn.Linear(2, 4), nn.Sequential(Mixing(3, 4), nn.ReLU()), Mixing(3, 4)]


SHAPES = {"bc": (4,), "btc": (3, 2), "bchw": (2, 3, 3)}
ORDERS = {
    "bc": ("cb",),
    "btc": ("tbc", "bct", "ctb", "(bt)c", "btC"),
    "bchw": ("bhwc", "hwbc", "bhcw"),
}
CASES = [(plain, axes, kind) for plain in ORDERS for axes in ORDERS[plain]
         for kind in ("chain", "around")]  # fmt: skip


@functools.cache
def measured(plain: str, axes: str, kind: str):
    torch.manual_seed(0)
    orders = [(plain, axes), (axes, axes), (axes, plain)]
    parts = [Stage(part, plain, *order) for part, order in zip(inner(plain), orders, strict=True)]
    network = nn.Sequential(*parts) if kind == "chain" else Around(parts)
    x = torch.randn(12, *SHAPES[plain], dtype=torch.float64)
    told = "" if "(" in axes else "@" + axes.replace("C", "cc")
    prefix = "" if kind == "chain" else "parts."
    sites = [f"{prefix}0{told}", f"{prefix}1{told}", f"{prefix}2"]
    return basis(network.double().eval(), x, sites, SETTINGS)


@pytest.mark.parametrize(("plain", "axes", "kind"), CASES)
def test_the_basis_does_not_depend_on_the_order_of_axes(plain, axes, kind):
    twin, result = measured(plain, plain, kind), measured(plain, axes, kind)
    assert [layer.n_rows for layer in twin.layers] == [layer.n_rows for layer in result.layers]
    for a, b in zip(twin.layers, result.layers, strict=True):
        np.testing.assert_allclose(a.activation_eigenvalues, b.activation_eigenvalues, atol=1e-9)
        assert str(a).split(":")[1] == str(b).split(":")[1]  # ranks and what is needed
        if a.edges is not None:
            assert b.edges is not None
            np.testing.assert_allclose(a.edges, b.edges, rtol=1e-5, atol=1e-9 * a.edges.max())
    assert sum(layer.edges is not None for layer in twin.layers) == 2
