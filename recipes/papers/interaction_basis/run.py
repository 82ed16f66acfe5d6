"""Edges needed in the interaction basis on modular addition and digits, beside the paper's figures.

    python recipes/papers/interaction_basis/run.py                     # digits, toy model: minutes
    python recipes/papers/interaction_basis/run.py --weights FOLDER    # and modular addition
    python recipes/papers/interaction_basis/run.py --weights FOLDER --full

Bushnaq et al. (2024), `The local interaction basis`. FOLDER has the one-layer transformers of the
authors' repository (github.com/ApolloResearch/rib) for addition modulo 113, one file a seed,
`modadd_p113_seed*.safetensors` with TransformerLens's names. Writes `paper.json` and `paper.html`.
`--full` takes means over all 3,830 pairs, as the authors do, instead of 1,024. A toy model of
superposition is decomposed into rank-one parameters beside the basis (Bushnaq et al., 2025).
"""

import argparse
import importlib
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np

import mechatlas as ma
from mechatlas.app.cli import run_script

HERE = Path(__file__).parent
_SIDE = runpy.run_path(str(HERE.parent / "side_by_side.py"))
Row, once, write_paper = (_SIDE[name] for name in ("Row", "once", "write_paper"))
_NETWORKS = runpy.run_path(str(HERE / "addition.py"))
addition, training_pairs = _NETWORKS["addition"], _NETWORKS["training_pairs"]
sys.path.insert(0, str(HERE))
ToyConfig = importlib.import_module("superposition").ToyConfig
TITLE = "The local interaction basis (Bushnaq et al., 2024)"
LAYERS = ["embed", "attend", "feed", "unembed"]
REFERENCE = {"before attention": 86.6, "before the MLP": 74.0, "unembedding": 634.2}
"""Edges needed in the local interaction basis, means of the authors' code over five networks."""
MISSING = [
    "CIFAR-10: python recipes/mlps/mlps.py cifar10 --source cifar10.zip, then PYTHONPATH=recipes/"
    "mlps mechatlas basis recipes/mlps/basis_cifar10.toml",
    "GPT-2 and TinyStories: mechatlas basis with network 'transformer', which reads a folder of "
    "the model; the paper finds no gain of its basis there",
]


def needed(found: Any, kind: str) -> list[int | None]:
    """Edges needed after each layer but the last."""
    return [layer.edge_curves[kind].n_needed for layer in found.layers[:-1]]


def modular_addition(folder: Path, *, full: bool) -> dict[str, Any]:
    """Edges needed in each network, by basis.

    Raises:
        SystemExit: The folder has no such files.
    """
    files = sorted(folder.glob("modadd_p113_seed*.safetensors"))
    if not files:
        raise SystemExit(f"{folder} has no files modadd_p113_seed*.safetensors.")
    settings = ma.InteractionConfig(
        kinds=("lib", "pca"), jacobian_samples=3830 if full else 1024, n_null_graphs=10
    )
    networks = {}
    for file in files:
        found = ma.basis(addition(file), training_pairs(), LAYERS, settings)
        assert found.modules is not None
        networks[file.stem] = {
            "lib": needed(found, "lib"),
            "pca": needed(found, "pca"),
            "modularity": found.modules.q,
            "modularity_of_random_graphs": max(found.modules.q_null),
            "gap_decades": [layer.effective_parameters.gap_decades for layer in found.layers[:-1]],
        }
        print(f"{file.stem}: {networks[file.stem]}", flush=True)
    return networks


def digits() -> dict[str, Any]:
    """Edges needed in a network on handwritten digits, trained here."""
    mlps = runpy.run_path(str(HERE.parents[1] / "mlps" / "mlps.py"))
    x, y, held, labels = mlps["_digits"]()
    network = mlps["train"](x, y, seed=0)
    layers = ["pixels", "hidden1", "hidden2", "outputs"]
    settings = ma.InteractionConfig(kinds=("neurons", "pca", "lib"))
    found = ma.basis(network, (held, labels), layers, settings)
    return {kind: needed(found, kind) for kind in ("neurons", "pca", "lib")} | {
        "all": [layer.edge_curves["neurons"].n for layer in found.layers[:-1]],
        "accuracy": found.score,
    }


def main() -> None:
    """Measure, compare, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/papers/interaction_basis"))
    parser.add_argument("--weights", type=Path, help="folder of the modular-addition networks")
    parser.add_argument("--full", action="store_true", help="means over all pairs")
    options = parser.parse_args()
    toy = once(ToyConfig(out=options.out / "superposition"))
    numbers: dict[str, Any] = {"digits": digits(), "superposition": toy}
    own = numbers["digits"]
    rows = [
        Row(
            f"edges needed on digits, layer {k + 1}, of {own['all'][k]}",
            f"neurons {own['neurons'][k]}, principal components {own['pca'][k]}, local "
            f"interaction basis {own['lib'][k]}",
            "fewer in the interaction basis (on CIFAR-10)",
            "the paper's network is one of CIFAR-10",
        )
        for k in range(3)
    ]
    for name, found in toy["layers"].items():
        cosine, ratio = found["mean_max_cosine"], found["mean_length_ratio"]
        rows.append(Row(
            f"parameter decomposition of five features in two dimensions, {name} layer",
            f"MMCS {cosine:.3f}, ratio of lengths {ratio:.2f}; {found['needed']} subcomponents "
            f"suffice, {found['vectors_needed']['lib']} vectors of the local interaction basis",
            "1.000 and .993 (first layer)",
            "smaller batches, fewer steps; a basis has at most two vectors in two dimensions",
        ))  # fmt: skip
    missing = list(MISSING)
    if options.weights:
        networks = modular_addition(options.weights, full=options.full)
        numbers["modular_addition"] = networks
        for k, (layer, reference) in enumerate(REFERENCE.items()):
            lib, pca = ([each[kind][k] for each in networks.values()] for kind in ("lib", "pca"))
            rows.append(Row(
                f"edges needed on modular addition, {layer}",
                f"{np.mean(lib):.1f} ({', '.join(map(str, lib))}); principal components "
                f"{np.mean(pca):.1f}",
                f"{reference} (the authors' code, five networks)",
                f"{len(networks)} of the authors' networks",
            ))  # fmt: skip
        q = [each["modularity"] for each in networks.values()]
        null = [each["modularity_of_random_graphs"] for each in networks.values()]
        rows.append(Row(
            "modularity Q",
            f"{np.mean(q):.2f}; random graphs with the same degrees have at most {max(null):.2f}",
            ".21 to .30, no more than principal components",
            "the paper has no random graphs",
        ))  # fmt: skip
    else:
        missing.insert(0, "modular addition: --weights FOLDER with the authors' networks")
    write_paper(options.out, TITLE, rows, missing, numbers)


if __name__ == "__main__":
    run_script(main)
