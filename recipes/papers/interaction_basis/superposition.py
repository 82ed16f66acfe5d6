"""Toy model of superposition: five sparse features in two dimensions, and its decomposition.

superposed_features    seed of the draws -> function that draws a batch
toy_model              a trained network, whose weights are tied only while it is trained
decompose_toy          the truth recovered, and what suffices, beside the interaction basis
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import mechatlas as ma
from mechatlas.analysis.interaction.parameter_decomposition import decompose, recovered_columns

N_FEATURES, WIDTH, RATE = 5, 2, 0.05


def superposed_features(seed: int) -> Callable[[int], Tensor]:
    """Draw features that are each there with probability .05, uniform between 0 and 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> Tensor:
        values, there = torch.rand(2, n, N_FEATURES, generator=generator)
        return values * (there < RATE)

    return draw


def toy_model(seed: int) -> nn.Sequential:
    """Train relu(W^T W x + b) to give x back."""
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.randn(WIDTH, N_FEATURES, generator=generator) / 2)
    bias = nn.Parameter(torch.zeros(N_FEATURES))
    draw, optimizer = superposed_features(seed + 1), torch.optim.Adam([weight, bias], lr=5e-3)
    for _ in range(3000):
        x = draw(1024)
        loss = ((x @ weight.T @ weight + bias).relu() - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    down, up = nn.Linear(N_FEATURES, WIDTH, bias=False), nn.Linear(WIDTH, N_FEATURES)
    with torch.no_grad():
        down.weight.copy_(weight)
        up.weight.copy_(weight.T)
        up.bias.copy_(bias)
    return nn.Sequential(nn.Identity(), down, up, nn.ReLU())


def decompose_toy(seed: int = 0) -> dict[str, Any]:
    """Decompose a toy model, and compare with the truth and with the interaction basis."""
    network, layers = toy_model(seed), ("1", "2")
    found = decompose(network, superposed_features(seed + 2), layers)
    x = superposed_features(seed + 3)(4096)
    down, up = (network.get_submodule(k).get_parameter("weight").detach() for k in layers)
    matrices = {
        "1": (found.components("1"), down.numpy()),
        "2": (found.components("2").transpose(0, 2, 1), up.T.numpy()),
    }
    settings = ma.InteractionConfig(kinds=("neurons", "pca", "lib"), score="fvu")
    basis = ma.basis(network.double(), x.double(), ["0", "1", "3"], settings)
    network.float()
    numbers: dict[str, Any] = {"active_inputs": float((x > 0).sum(dim=1).float().mean())}
    for k, layer in zip(layers, basis.layers, strict=False):
        recovered = recovered_columns(*matrices[k])
        numbers[k] = {
            "mean_max_cosine": recovered.mean_max_cosine,
            "mean_length_ratio": recovered.mean_length_ratio,
            "active": float((found.importances(k, x) > 0.1).sum(dim=1).float().mean()),
            "needed": found.needed(k, x, max_drop=0.001).n_needed,
            "vectors_needed": {w: c.n_needed for w, c in layer.vector_curves.items()},
        }
    return numbers
