"""Find degeneracy, interaction basis and modules of some layers of a network.

    mechatlas basis recipes/quick/basis.toml

The folder has `basis.safetensors` (for each layer and basis `mean`, `to_basis`, `from_basis`,
`importance`, and `edges` and `edge_errors` to the next layer) and `spectra.json` (eigenvalues,
ablation curves and the graph that the page draws). An interrupted run is continued by the same
command.
"""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechatlas.activations.images import Images
from mechatlas.activations.networks import Network, digest, folders, load_network, reload_network
from mechatlas.activations.samples import SampleRecipe, open_samples
from mechatlas.activations.sites import find_sites
from mechatlas.analysis.interaction.ablation import AblationCurve
from mechatlas.analysis.interaction.costs import Costs
from mechatlas.analysis.interaction.degeneracy import DegeneracyCount, EffectiveParameters
from mechatlas.analysis.interaction.interaction_basis import basis
from mechatlas.analysis.interaction.learning_coefficient import LearningCoefficient
from mechatlas.analysis.interaction.module_degeneracy import ModuleDegeneracy
from mechatlas.analysis.interaction.results import (
    InteractionBasis,
    InteractionConfig,
    LayerResult,
    count_in_words,
)
from mechatlas.app import basis_spectra
from mechatlas.app.engines import EngineConfig
from mechatlas.app.estimates import PROCESS, Estimate
from mechatlas.app.inputs import open_dictionary
from mechatlas.app.progress import bar
from mechatlas.app.run_folder import BASIS, SPECTRA, CommandResult, RunConfig, RunFolder
from mechatlas.base import InputError, Site, SiteError
from mechatlas.files import checksum, checksum_file
from mechatlas.ranges import check_ranges
from mechatlas.tensorfiles import read_array, read_arrays

KIND = BASIS
TENSORS = "basis.safetensors"
JACOBIANS = 1000 << 20
"""Bytes of Jacobians and tangents, at most."""
SAME = ("free_directions", "n_parameters", "score", "measure", "learning_coefficient",
        "module_degeneracy")  # fmt: skip
"""Fields of the result of `basis` that are in `result.json` as they are."""
SAME_IN_LAYER = ("name", "width", "limited_by_samples", "dead_units", "always_on",
                 "free_directions", "degeneracy", "effective_parameters")  # fmt: skip
"""Fields of the result for a layer that are in `result.json` as they are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BasisConfig(EngineConfig, RunConfig):
    """Find degeneracy, interaction basis and modules of some layers of a network.

    Example:  mechatlas basis recipes/quick/basis.toml --settings.learning-coefficient
    """

    network: Network
    """Network, with its weights."""
    layers: tuple[str, ...]
    """Sites in the order in which the network reaches them; the last holds the outputs."""
    samples: SampleRecipe = dataclasses.field(default_factory=Images)
    """Samples: Images, Arrays or Texts."""
    labels: Path | None = None
    """File (.npy) with the correct class of each sample; by default the network's own answer."""
    n_samples: int = 4096
    """Maximum number of samples, evenly spread over those there are."""
    dictionaries: dict[str, Path] = dataclasses.field(default_factory=dict)
    """Folder or file of a dictionary by layer; its latents are compared with the bases."""
    unit_modules: Path | None = None
    """File (.safetensors) with the module of each unit, or -1, in arrays by the name of the layer;
    the free directions of each module are counted."""
    settings: InteractionConfig = dataclasses.field(default_factory=InteractionConfig)
    """Bases to compare, numbers of samples for Jacobians and ablations, thresholds."""
    out: Path = Path("basis")
    """Folder for the result. The same command continues a run that was stopped."""

    def __post_init__(self) -> None:
        if len(self.layers) < 2:
            raise ValueError(f"layers must name at least two layers, got {len(self.layers)}.")
        check_ranges(self, n_samples="[2, 1000000000]")


@dataclasses.dataclass(frozen=True)
class NeededCounts:
    """Edges and vectors of a layer in one basis, and how many the network needs."""

    vectors: int
    """Vectors of the basis."""
    edges: int | None
    """Edges to the next layer; null for the last layer."""
    edges_needed: int | None
    """Edges that suffice; null for the last layer, or if all do not."""
    vectors_needed: int | None
    """Vectors that suffice; null for the last layer, or if all do not."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerEntry:
    """Ranks, free directions and needed edges of one layer."""

    name: str
    """Site of the layer."""
    width: int
    """Number of its units."""
    rank_activations: int
    """Rank of the activations."""
    rank_activations_decades: float
    """Powers of ten by which the threshold of the rank can move without changing it."""
    rank_gradients: int
    """Rank of the gradients."""
    rank_gradients_decades: float
    """Powers of ten by which the threshold of the rank can move without changing it."""
    limited_by_samples: bool
    """Whether there were too few rows to see a higher rank."""
    synchronized_blocks: int
    """Number of blocks of units that fire on the same rows."""
    synchronised_blocks: int = 0
    """Old name of `synchronized_blocks`, until version 0.3."""
    dead_units: int
    """Number of units that never fire."""
    always_on: int
    """Number of units that always fire."""
    free_directions: int
    """Free directions of the layer."""
    degeneracy: DegeneracyCount
    """Free directions by cause."""
    effective_parameters: EffectiveParameters = dataclasses.field(
        default_factory=EffectiveParameters
    )
    """Effective parameters of the weights that read the layer, at every resolution."""
    edges_needed: int | None
    """Edges needed to the next layer; null for the last layer, or if all do not suffice."""
    vectors_needed: int | None
    """Basis vectors needed; null for the last layer, or if all do not suffice."""
    basis: str
    """Basis that is reported."""
    n_edge_samples: int | None = None
    """Samples that the edges are averaged over; null for the last layer."""
    global_agreement: float | None = None
    """Smallest correlation of a coordinate of the global interaction basis with the nearest one
    of a basis whose gradients are from half of the samples; null without that basis."""
    by_basis: dict[str, NeededCounts]
    """Edges and vectors in every basis."""
    layer_map: str
    """Modules that were run to reach the next layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BasisResult(CommandResult):
    """Layers, free directions and modules of a network; the fields of `result.json`."""

    network: str = ""
    """Name of the network."""
    layers: list[LayerEntry]
    """One entry for each layer, in the order of the network."""
    modularity: float | None
    """Newman's Q of the Leiden modules; null where there is no graph."""
    modularity_null: float | None
    """Mean Q of random graphs with the same degrees."""
    modularity_null_max: float | None
    """Largest Q of random graphs with the same degrees."""
    modularity_rotated: float | None
    """Q after a random rotation of the bases."""
    modules: int
    """Number of modules; 0 unless they are significant."""
    modules_p_value: float | None
    """p-value of the modules against random graphs of the same degrees; null without a graph."""
    modules_stable_over_seeds: float | None
    """Mean adjusted Rand index with the modules of other seeds."""
    modules_stable_over_samples: float | None
    """Mean adjusted Rand index with the modules of edges drawn within their errors."""
    free_directions: int
    """Directions in the parameters along which the network does not change, in all layers."""
    free_directions_exact: bool
    """Whether the number is exact, not a lower bound."""
    free_directions_have_gap: bool = True
    """Whether the number is exact, or the spectra have a gap of a decade or more; otherwise it
    hangs on the threshold, and `effective_parameters` of the layers say more."""
    free_directions_across: int | None
    """Free directions owed to dependencies between blocks and layers; null if not counted."""
    n_parameters: int
    """Number of weights and biases that were counted."""
    score: float
    """Score of the unchanged network."""
    measure: str
    """Name of the score: accuracy, agreement or 1 - fvu."""
    samples: int
    """Samples the network ran on."""
    n_ablation_samples: int = 0
    """Samples on which ablated networks were scored."""
    n_gradient_samples: int = 0
    """Samples on which gradients of the outputs were taken."""
    learning_coefficient: LearningCoefficient | None = None
    """Local learning coefficient; null unless asked for."""
    module_degeneracy: ModuleDegeneracy | None = None
    """Free directions of the modules named by `unit_modules`; else null."""


def run(config: BasisConfig, folder: RunFolder) -> BasisResult:
    """Analyze some layers of a network.

    Raises:
        UserError: A layer is not there, or the samples, labels or dictionaries do not fit.
    """
    network = load_network(config.network)
    sites = [_find_site(network, layer) for layer in config.layers]
    samples = open_samples(config.samples, network)
    dictionaries = {layer: open_dictionary(path) for layer, path in config.dictionaries.items()}
    chosen = np.linspace(0, len(samples) - 1, config.n_samples)
    chosen = np.unique(chosen.round().astype(int))
    labels = _read_labels(config.labels, len(samples), chosen) if config.labels else None
    inputs = samples.stack([samples.read(int(i)) for i in chosen])
    folder.parent("network", digest(network))
    folder.parent("inputs", checksum(inputs.numpy().tobytes()))
    for name, path in (("labels", config.labels), ("unit_modules", config.unit_modules)):
        if path is not None and path.is_file():
            folder.parent(name, checksum_file(path))
    for layer, opened in dictionaries.items():
        folder.parent(f"dictionary {layer}", opened.checksum)
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    with bar("analyzing") as progress:
        result = basis(
            network,
            inputs if labels is None else (inputs, labels),
            sites,
            config.settings,
            dictionaries={layer: opened.dictionary for layer, opened in dictionaries.items()},
            unit_modules=read_arrays(config.unit_modules) if config.unit_modules else None,
            checkpoints=folder,
            engine=config.elsewhere(),
            reopen=functools.partial(reload_network, config.network, folders()),
            on_progress=progress,
            on_costs=lambda costs: folder.expect(lambda: _estimate(costs, len(inputs), weights)),
        )
    folder.tensors(TENSORS, _tensors(result))
    folder.json(SPECTRA, basis_spectra.spectra_of(result))
    return summarize(result, config.network.name, len(inputs))


def _estimate(costs: Costs, n_samples: int, weights: int) -> Estimate:
    """Estimate time, memory and disk from what the parts cost, and the bytes of the weights."""
    maps, settings = costs.maps, costs.settings
    widths = [maps[0].source, *(each.target for each in maps)]
    kept = min(max(settings.jacobian_samples, settings.ablation_samples), n_samples)
    activations = 4 * kept * sum(w * maps[0].positions for w in widths)
    numbers = sum(w * w for w in widths) + sum(w * v for w, v in itertools.pairwise(widths))
    disk = 16 * len(settings.kinds) * numbers
    return Estimate(
        seconds=costs.seconds(),
        memory=PROCESS + weights + 2 * activations + 2 * disk + JACOBIANS,
        disk=disk,
    )


def _find_site(network: torch.nn.Module, layer: str) -> Site:
    sites = find_sites(network, [layer])
    if len(sites) != 1:
        raise SiteError(
            f"Layer {layer!r} matches {len(sites)} sites ({', '.join(map(str, sites[:4]))}, ...). "
            "Name layers one by one, in the order in which the network reaches them."
        )
    return sites[0]


def _read_labels(path: Path, n_samples: int, chosen: Int[np.ndarray, " n"]) -> Int[Tensor, " n"]:
    """Read the labels of the chosen samples."""
    labels = read_array(path)
    if labels.shape != (n_samples,) or labels.dtype.kind not in "iu":
        raise InputError(
            f"{path} has shape {labels.shape} and type {labels.dtype}; expected "
            f"{n_samples} whole numbers, one for each sample."
        )
    return torch.from_numpy(labels[chosen].astype(np.int64))


def summarize(result: InteractionBasis, network: str, n_samples: int) -> BasisResult:
    """Collect ranks, free directions and modules, without spectra and coordinates.

    Args:
        result: Interaction basis.
        network: Name of the network.
        n_samples: Samples the network ran on.
    """
    modules, degeneracy, stability = result.modules, result.degeneracy, result.stability
    return BasisResult(
        network=network,
        layers=[_layer_entry(layer) for layer in result.layers],
        modularity=None if modules is None else modules.q,
        modularity_null=None if modules is None else float(np.mean(modules.q_null)),
        modularity_null_max=None if modules is None else max(modules.q_null),
        modularity_rotated=result.rotated_q,
        modules=modules.n if modules is not None and modules.significant else 0,
        modules_p_value=None if modules is None else modules.p_value,
        modules_stable_over_seeds=None if stability is None else stability.over_seeds,
        modules_stable_over_samples=None if stability is None else stability.over_samples,
        free_directions_exact=result.is_exact,
        free_directions_have_gap=result.has_gap,
        free_directions_across=None if degeneracy is None else degeneracy.across_blocks,
        samples=n_samples,
        n_ablation_samples=result.n_ablation_samples,
        n_gradient_samples=result.n_gradient_samples,
        **{name: getattr(result, name) for name in SAME},
    )


def _layer_entry(layer: LayerResult) -> LayerEntry:
    def needed(curves: dict[str, AblationCurve], kind: str) -> int | None:
        return curves[kind].n_needed if kind in curves else None

    edges, vectors = layer.edge_curves, layer.vector_curves
    n_blocks = len(layer.synchronized_blocks)
    by_basis = {
        kind: NeededCounts(
            vectors=len(each),
            edges=edges[kind].n if kind in edges else None,
            edges_needed=needed(edges, kind),
            vectors_needed=needed(vectors, kind),
        )
        for kind, each in layer.bases.items()
    }
    agreement, own_edges = layer.global_agreement, layer.edges_by_basis.get(layer.kind)
    return LayerEntry(
        n_edge_samples=None if own_edges is None else own_edges.n_samples,
        global_agreement=None if agreement is None or not len(agreement) else agreement.min(),
        rank_activations=layer.rank_activations.rank,
        rank_activations_decades=layer.rank_activations.decades,
        rank_gradients=layer.rank_gradients.rank,
        rank_gradients_decades=layer.rank_gradients.decades,
        synchronized_blocks=n_blocks,
        synchronised_blocks=n_blocks,
        edges_needed=needed(edges, layer.kind),
        vectors_needed=needed(vectors, layer.kind),
        basis=layer.kind,
        by_basis=by_basis,
        layer_map=layer.map_description,
        **{name: getattr(layer, name) for name in SAME_IN_LAYER},
    )


def _tensors(result: InteractionBasis) -> dict[str, Float[np.ndarray, "..."]]:
    """Coordinates and edges of every layer in every basis, by name."""
    tensors: dict[str, Any] = {}
    for layer in result.layers:
        for kind, each in layer.bases.items():
            for name in ("mean", "to_basis", "from_basis", "importance"):
                tensors[f"{layer.name}.{kind}.{name}"] = getattr(each, name)
        for kind, edges in layer.edges_by_basis.items():
            tensors[f"{layer.name}.{kind}.edges"] = edges.strength
            tensors[f"{layer.name}.{kind}.edge_errors"] = edges.standard_error
    return tensors


def in_words(result: BasisResult) -> str:
    """Describe each layer in a line, then the modules."""
    lines = []
    for layer in result.layers:
        edges = layer.edges_needed
        needed = "" if edges is None else f", {edges} edges and {layer.vectors_needed} vectors"
        degeneracy, gap = layer.degeneracy, layer.effective_parameters.has_gap
        free = f"{layer.free_directions} free directions"
        if not result.free_directions_exact:
            hangs = degeneracy.needs_rank and not gap
            free = f"about {free} (no gap in the spectrum)" if hangs else f"at least {free}"
        if layer.limited_by_samples:
            needed += " (too few samples to see a higher rank; take more)"
        lines.append(
            f"{layer.name}: rank {layer.rank_activations} of {layer.width}, {layer.dead_units} "
            f"dead, {free}{needed}"
        )
    lines.append(
        count_in_words(
            result.free_directions,
            result.n_parameters,
            is_exact=result.free_directions_exact,
            has_gap=result.free_directions_have_gap,
        )
        + "."
    )
    if result.modularity is not None:
        lines.append(
            f"Modularity {result.modularity:.3f}; up to {result.modularity_null_max:.3f} in random "
            f"graphs of the same degrees: {result.modules or 'no'} significant modules."
        )
    if result.learning_coefficient is not None:
        lines.append(f"{result.learning_coefficient}.")
    if result.module_degeneracy is not None:
        lines.append(f"{result.module_degeneracy}.")
    return "\n".join([*lines, f"Basis: {result.out}"])
