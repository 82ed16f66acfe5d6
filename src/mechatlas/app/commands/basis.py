"""The job of `mechatlas basis`: a recipe -> a folder with bases, edges, ledger and modules.

unfinished/          what a run that was killed had finished; gone when it ends
basis.safetensors    for each layer and basis `mean`, `to_basis`, `from_basis`, `importance`,
                     and `edges`, `edge_errors` to the next layer
spectra.json         eigenvalues, ablation curves, the graph: what the page draws
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from mechatlas.activations import networks
from mechatlas.activations.networks import Network, digest
from mechatlas.activations.samples import Images, SampleRecipe, Samples, open_samples
from mechatlas.activations.sites import find_sites
from mechatlas.analysis.interaction.ablation import AblationCurve
from mechatlas.analysis.interaction.interaction_basis import basis
from mechatlas.analysis.interaction.results import InteractionBasis, InteractionConfig, LayerResult
from mechatlas.app.progress import bar
from mechatlas.app.recipes import as_dict
from mechatlas.app.run_folder import finish, refuse_strangers, write_tensors
from mechatlas.base import InputError, RecipeError, Site, SiteError
from mechatlas.dictionaries.formats import load
from mechatlas.files import checksum, read_json, write_json

FILE = "basis.safetensors"
SPECTRA = "spectra.json"
UNFINISHED = "unfinished"
SHOWN_EDGES = 600
"""Edges of the graph that the page can draw."""
SHOWN_CHANNELS = 4
"""Channels that are named of each vector."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BasisConfig:
    """Degeneracy, interaction basis and modules of some layers of a network."""

    network: Network
    """Which network, with which weights."""
    layers: tuple[str, ...]
    """Sites in the order in which the network reaches them; the last holds the outputs."""
    samples: SampleRecipe = dataclasses.field(default_factory=Images)
    """What to run it on: Images, Arrays or Texts."""
    labels: Path | None = None
    """An .npy file with one right answer a sample; without it the network's own count as right."""
    n_samples: int = 4096
    """At most so many samples, evenly spread over those there are."""
    dictionaries: dict[str, Path] = dataclasses.field(default_factory=dict)
    """By layer: a folder or file of a dictionary whose latents are compared with the bases."""
    how: InteractionConfig = dataclasses.field(default_factory=InteractionConfig)
    """Bases to compare, samples for Jacobians and ablations, thresholds."""
    out: Path = Path("basis")
    """Folder for the bases, the edges and the result."""

    def __post_init__(self) -> None:
        if len(self.layers) < 2:
            raise ValueError(f"layers must name at least two layers, got {len(self.layers)}.")
        if self.n_samples < 2:
            raise ValueError(f"n_samples must be at least 2, got {self.n_samples}.")


def run(recipe: BasisConfig) -> dict[str, Any]:
    """Analyse some layers of a network.

    Raises:
        UserError: A layer is not there, the samples or labels do not fit, or `out` holds
            something else.
    """
    clock = time.process_time()
    refuse_strangers(recipe.out, "basis")
    network = networks.load_network(recipe.network)
    sites = [_one_site(network, layer) for layer in recipe.layers]
    samples = open_samples(recipe.samples, network)
    dictionaries = {layer: load(path) for layer, path in recipe.dictionaries.items()}
    chosen = np.unique(np.linspace(0, len(samples) - 1, recipe.n_samples).round().astype(int))
    labels = _labels(recipe, samples, chosen)
    inputs = samples.stack([samples.read(int(i)) for i in chosen])
    data = inputs if labels is None else (inputs, labels)
    made_from = {"recipe": as_dict(recipe), "network": digest(network)}
    # What is read from files may have changed since a run was killed.
    read = [recipe.labels, *recipe.dictionaries.values()]
    made_from |= {"read": {str(p): _content(p) for p in read if p is not None}}
    kept = _Kept(recipe.out / UNFINISHED, made_from)
    with bar("analysing") as progress:
        found = basis(
            network,
            data,
            sites,
            recipe.how,
            dictionaries=dictionaries,
            checkpoints=kept,
            on_progress=progress,
        )
    weights = write_tensors(recipe.out / FILE, _tensors(found))
    write_json(recipe.out / SPECTRA, _spectra(found))
    manifest = {
        "schema": 1,
        "kind": "basis",
        **made_from,
        "files": {FILE: checksum(weights)},
    }
    write_json(recipe.out / "manifest.json", manifest)
    result = finish(recipe.out, recipe, summary(found, len(inputs)), clock)
    kept.remove()
    return result


class _Kept(MutableMapping[str, dict[str, np.ndarray]]):
    """Arrays by name, each a file of a folder; those of another recipe or network are dropped."""

    def __init__(self, folder: Path, made_from: dict[str, Any]) -> None:
        self.folder = folder
        mark = folder / "made_from.json"
        if mark.is_file() and read_json(mark) != json.loads(json.dumps(made_from)):
            self.remove()
        write_json(mark, made_from)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def __getitem__(self, name: str) -> dict[str, np.ndarray]:
        try:
            return load_file(self._file(name))
        except FileNotFoundError:
            raise KeyError(name) from None

    def __setitem__(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        write_tensors(self._file(name), arrays)

    def __delitem__(self, name: str) -> None:
        self._file(name).unlink()

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(self.folder.glob("*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _content(path: Path) -> str:
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return checksum(b"".join(checksum(file.read_bytes()).encode() for file in files))


def _one_site(network: torch.nn.Module, layer: str) -> Site:
    found = find_sites(network, [layer])
    if len(found) != 1:
        raise SiteError(
            f"Layer {layer!r} matches {len(found)} sites ({', '.join(map(str, found[:4]))}, ...). "
            "Name layers one by one, in the order in which the network reaches them."
        )
    return found[0]


def _labels(recipe: BasisConfig, samples: Samples, chosen: np.ndarray) -> torch.Tensor | None:
    if recipe.labels is None:
        return None
    try:
        labels = np.load(recipe.labels, allow_pickle=False)
    except FileNotFoundError as error:
        raise RecipeError(f"There is no file of labels {recipe.labels}.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{recipe.labels} is not an .npy file ({error}).") from error
    if labels.shape != (len(samples),) or labels.dtype.kind not in "iu":
        raise InputError(
            f"{recipe.labels} has shape {labels.shape} and type {labels.dtype}; expected "
            f"{len(samples)} whole numbers, one for each sample."
        )
    return torch.from_numpy(labels[chosen].astype(np.int64))


def summary(found: InteractionBasis, n_samples: int) -> dict[str, Any]:
    """What `result.json` says."""
    modules, degeneracy = found.modules, found.degeneracy
    return {
        "layers": [_layer(layer) for layer in found.layers],
        "modularity": None if modules is None else modules.q,
        "modularity_null": None if modules is None else float(np.mean(modules.q_null)),
        "modularity_null_max": None if modules is None else max(modules.q_null),
        "modularity_rotated": found.rotated_q,
        "modules": modules.n if modules is not None and modules.significant else 0,
        "modules_p_value": None if modules is None else modules.p_value,
        "modules_stable_over_seeds": found.stability and found.stability.over_seeds,
        "modules_stable_over_samples": found.stability and found.stability.over_samples,
        "free_directions": found.free_directions,
        "free_directions_exact": found.is_exact,
        "free_directions_across": None if degeneracy is None else degeneracy.across_blocks,
        "parameters": sum(layer.degeneracy.n_parameters for layer in found.layers),
        "score": found.score,
        "measure": found.measure,
        "samples": n_samples,
    }


OLD_CAUSES = ("parameters", "dead", "activations", "gradients", "joint", "scale", "synchronised")


def _layer(layer: LayerResult) -> dict[str, Any]:
    kind = layer.kind
    return {
        "name": layer.name,
        "width": layer.width,
        "rank_activations": layer.rank_activations.rank,
        "rank_activations_decades": layer.rank_activations.decades,
        "rank_gradients": layer.rank_gradients.rank,
        "rank_gradients_decades": layer.rank_gradients.decades,
        "limited_by_samples": layer.limited_by_samples,
        "synchronised_blocks": len(layer.synchronized_blocks),
        "dead_units": layer.dead_units,
        "always_on": layer.always_on,
        "free_directions": layer.free_directions,
        "account": dict(zip(OLD_CAUSES, dataclasses.astuple(layer.degeneracy), strict=True)),
        "edges_needed": _number(layer.edge_curves.get(kind)),
        "vectors_needed": _number(layer.vector_curves.get(kind)),
        "basis": kind,
        "by_basis": {
            name: {
                "vectors": len(layer.bases[name]),
                "edges": layer.edge_curves[name].n if name in layer.edge_curves else None,
                "edges_needed": _number(layer.edge_curves.get(name)),
                "vectors_needed": _number(layer.vector_curves.get(name)),
            }
            for name in layer.bases
        },
        "section": layer.map_description,
    }


def _number(needed: AblationCurve | None) -> int | None:
    return None if needed is None else needed.n_needed


def _tensors(found: InteractionBasis) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for layer in found.layers:
        for kind, made in layer.bases.items():
            place = f"{layer.name}.{kind}"
            tensors[f"{place}.mean"] = made.mean
            tensors[f"{place}.to_basis"] = made.to_basis
            tensors[f"{place}.from_basis"] = made.from_basis
            tensors[f"{place}.importance"] = made.importance
        for kind, edges in layer.edges_by_basis.items():
            tensors[f"{layer.name}.{kind}.edges"] = edges.strength
            tensors[f"{layer.name}.{kind}.edge_errors"] = edges.standard_error
    return tensors


def _spectra(found: InteractionBasis) -> dict[str, Any]:
    return {
        "layers": [
            {
                "name": layer.name,
                "activations": layer.activation_eigenvalues.tolist(),
                "gradients": layer.gradient_eigenvalues.tolist(),
                "threshold": layer.rank_activations.threshold,
                "blocks": [list(block) for block in layer.synchronized_blocks],
                "edges": {k: _curve(n) for k, n in layer.edge_curves.items()},
                "vectors": {k: _curve(n) for k, n in layer.vector_curves.items()},
            }
            for layer in found.layers
        ],
        "graph": _graph(found),
    }


def _curve(needed: AblationCurve) -> dict[str, Any]:
    return {
        "kept": list(needed.kept),
        "score": list(needed.scores),
        "of": needed.n,
        "unchanged": needed.unchanged,
        "needed": needed.n_needed,
    }


def _graph(found: InteractionBasis) -> dict[str, Any] | None:
    graph, modules = found.graph, found.modules
    if graph is None or modules is None:
        return None
    strongest = np.argsort(-graph.weight, kind="stable")[:SHOWN_EDGES]
    used = np.unique(np.concatenate([graph.source[strongest], graph.target[strongest]]))
    number = {int(node): i for i, node in enumerate(used)}
    nodes = list(zip(graph.layer[used].tolist(), graph.vector[used].tolist(), strict=True))
    return {
        "layer": graph.layer[used].tolist(),
        "vector": graph.vector[used].tolist(),
        "is": [_feature(found.layers[layer], vector) for layer, vector in nodes],
        "module": modules.labels[used].tolist(),
        "source": [number[int(n)] for n in graph.source[strongest]],
        "target": [number[int(n)] for n in graph.target[strongest]],
        "weight": graph.weight[strongest].tolist(),
        "stand": modules.significant,
        "all_edges": len(graph.weight),
    }


def _feature(layer: LayerResult, vector: int) -> str:
    """How much a coordinate varies, and what it is made of."""
    importance = layer.basis.importance
    share = importance[vector] / max(float(importance.sum()), 1e-300)
    row = layer.basis.from_basis[vector]
    strongest = np.argsort(-np.abs(row), kind="stable")[:SHOWN_CHANNELS]
    largest = max(float(np.abs(row).max()), 1e-300)
    parts = [f"{row[c] / largest:+.2f} channel {c}" for c in strongest.tolist() if row[c]]
    return f"{share:.1%} of the importance<br>{', '.join(parts)}"


def in_words(result: dict[str, Any]) -> str:
    """What was found, a line a layer."""
    lines = []
    for layer in result["layers"]:
        needed = layer["edges_needed"]
        edges = "" if needed is None else f", {needed} edges and {layer['vectors_needed']} vectors"
        at_least = "" if result["free_directions_exact"] else "at least "
        if layer["limited_by_samples"]:
            edges += " (too few samples to see a higher rank; take more)"
        lines.append(
            f"{layer['name']}: rank {layer['rank_activations']} of {layer['width']}, "
            f"{layer['dead_units']} dead, {at_least}{layer['free_directions']} free directions"
            f"{edges}"
        )
    if result["modularity"] is not None:
        lines.append(
            f"Modularity {result['modularity']:.3f}; up to {result['modularity_null_max']:.3f} by "
            f"chance: {result['modules'] or 'no'} modules stand."
        )
    lines.append(f"Basis: {result['out']}")
    return "\n".join(lines)
