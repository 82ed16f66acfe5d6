"""Toy model of superposition, decomposed into rank-one parameters beside the interaction basis.

    python recipes/papers/interaction_basis/superposition.py --out runs/toy
    python recipes/papers/interaction_basis/superposition.py --out runs/toy --dry-run
    python recipes/papers/interaction_basis/superposition.py --out runs/toy40 --n-features 40 \
        --width 10 --settings.n-components 200 --settings.importance 1e-4 --settings.p 2

Bushnaq, Braun and Sharkey (2025) decompose five sparse features in two dimensions and forty in ten.
The same command continues a run that was stopped.
"""

import dataclasses
import functools
import sys
from typing import Any

import torch
import tyro
from torch import Tensor, nn

import mechatlas as ma
from mechatlas.analysis.interaction.parameter_decomposition import (
    DecompositionConfig,
    decompose,
    recovered_columns,
)
from mechatlas.app.cli import run_script
from mechatlas.app.estimates import OnlyEstimate, in_words, of_work
from mechatlas.app.progress import bar
from mechatlas.app.run_folder import CommandResult, RunConfig, RunFolder, execute
from mechatlas.base import Progress

KIND = "decomposition"
RATE, LAYERS = 0.05, ("1", "2")
"""Probability of a feature; names of the linear layers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig(RunConfig):
    """Decompose a toy model of superposition, and compare with its features."""

    n_features: int = 5
    """Features, each there with probability .05, uniform between 0 and 1."""
    width: int = 2
    """Dimensions that they share."""
    settings: DecompositionConfig = dataclasses.field(default_factory=DecompositionConfig)
    """Settings of the decomposition."""
    seed: int = 0
    """Seed of the toy model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyResult(CommandResult):
    """Features recovered, and subcomponents that suffice."""

    active_inputs: float
    """Mean number of features of a sample."""
    faithfulness: float
    """Mean squared difference of the sum of the subcomponents and the weights."""
    layers: dict[str, dict[str, Any]]
    """By layer: mean max cosine, mean ratio of lengths, mean number of subcomponents with an
    importance above .1, and how many subcomponents or vectors of a basis suffice for all samples.
    """


def superposed_features(n_features: int, n: int, random: torch.Generator) -> Tensor:
    """Draw samples of sparse features."""
    values, there = torch.rand(2, n, n_features, generator=random)
    return values * (there < RATE)


def toy_model(config: ToyConfig) -> nn.Sequential:
    """Train relu(W^T W x + b) to give x back; weights are tied only while they are trained."""
    n, width = config.n_features, config.width
    random = torch.Generator().manual_seed(config.seed)
    weight = nn.Parameter(torch.randn(width, n, generator=random) / 2)
    bias = nn.Parameter(torch.zeros(n))
    optimizer = torch.optim.Adam([weight, bias], lr=5e-3)
    for _ in range(3000):
        x = superposed_features(n, 1024, random)
        loss = ((x @ weight.T @ weight + bias).relu() - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    down, up = nn.Linear(n, width, bias=False), nn.Linear(width, n)
    with torch.no_grad():
        down.weight.copy_(weight)
        up.weight.copy_(weight.T)
        up.bias.copy_(bias)
    return nn.Sequential(nn.Identity(), down, up, nn.ReLU())


def run(config: ToyConfig, folder: RunFolder) -> ToyResult:
    """Decompose, and compare with the truth and with the interaction basis."""
    network = toy_model(config)
    draw = functools.partial(superposed_features, config.n_features)

    def train(on_progress: Progress, **options: Any) -> Any:
        return decompose(network, draw, LAYERS, config.settings, on_progress=on_progress, **options)

    folder.expect(lambda: of_work([train], memory=64 << 20))
    with bar("decomposing") as progress:
        found = train(progress, checkpoints=folder)
    folder.tensors("components.safetensors", {k: found.components(k) for k in LAYERS})
    x = draw(4096, torch.Generator().manual_seed(config.seed + 1))
    down, up = (network.get_submodule(k).get_parameter("weight").detach() for k in LAYERS)
    columns = (
        recovered_columns(found.components("1"), down.numpy()),
        recovered_columns(found.components("2").transpose(0, 2, 1), up.T.numpy()),
    )
    needed = [found.needed(k, x, max_drop=0.001).n_needed for k in LAYERS]
    active = [float((found.importances(k, x) > 0.1).sum(dim=1).float().mean()) for k in LAYERS]
    settings = ma.InteractionConfig(kinds=("neurons", "pca", "lib"), score="fvu")
    basis = ma.basis(network.double(), x.double(), ["0", "1", "3"], settings)
    layers = {
        name: dataclasses.asdict(columns[k]) | {
            "active": active[k],
            "needed": needed[k],
            "vectors_needed": {w: c.n_needed for w, c in basis.layers[k].vector_curves.items()},
        }
        for k, name in enumerate(("first", "second"))
    }  # fmt: skip
    return ToyResult(
        active_inputs=float((x > 0).sum(dim=1).float().mean()),
        faithfulness=found.faithfulness,
        layers=layers,
    )


def main() -> None:
    """Run, or say how long it takes."""
    words = [word for word in sys.argv[1:] if word != "--dry-run"]
    try:
        result = execute(tyro.cli(ToyConfig, args=words), dry_run=len(words) < len(sys.argv) - 1)
    except OnlyEstimate as end:
        print(in_words(end.estimate))
        return
    for name, each in result.layers.items():
        print(name, each)


if __name__ == "__main__":
    run_script(main)
