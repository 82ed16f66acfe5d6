"""Spectra, ablation curves and graph of an interaction basis, as drawn by the page.

spectra_of      a result -> the contents of `spectra.json`
structure_spectra   contents of `spectra.json` -> the same, also of version 0.1
"""

import dataclasses
from typing import Any

import cattrs
import numpy as np

from mechatlas.analysis.interaction.ablation import AblationCurve
from mechatlas.analysis.interaction.results import InteractionBasis, LayerResult
from mechatlas.app.old_runs import renamed
from mechatlas.app.run_folder import SCHEMA, SPECTRA
from mechatlas.base import DiskError

MAX_EDGES = 600
"""Maximum number of edges of the graph that the page draws, strongest first."""
MAX_CHANNELS = 4
"""Maximum number of channels named for each basis vector."""


@dataclasses.dataclass(frozen=True)
class LayerSpectra:
    """Spectra and ablation curves of one layer."""

    name: str
    activation_eigenvalues: list[float]
    gradient_eigenvalues: list[float]
    threshold: float
    """Share of the largest eigenvalue below which others count as zero."""
    synchronized_blocks: list[list[int]]
    edge_curves: dict[str, AblationCurve]
    vector_curves: dict[str, AblationCurve]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawnGraph:
    """Nodes and strongest edges of the interaction graph."""

    layer: list[int]
    """Number of the layer of each node."""
    vector: list[int]
    """Number of the basis vector of each node."""
    description: list[str]
    """Importance and strongest channels of each node."""
    module: list[int]
    """Module of each node."""
    source: list[int]
    """Node that each edge leaves."""
    target: list[int]
    """Node that each edge enters."""
    weight: list[float]
    """Weight of each edge."""
    significant: bool
    """Whether the modules are significant."""
    n_edges: int
    """Number of edges, drawn or not."""


@dataclasses.dataclass(frozen=True)
class Spectra:
    """Contents of `spectra.json`."""

    layers: list[LayerSpectra]
    graph: DrawnGraph | None


def spectra_of(result: InteractionBasis) -> Spectra:
    """Collect what the page draws of a result."""
    layers = [
        LayerSpectra(
            layer.name,
            layer.activation_eigenvalues.tolist(),
            layer.gradient_eigenvalues.tolist(),
            layer.rank_activations.threshold,
            [list(block) for block in layer.synchronized_blocks],
            layer.edge_curves,
            layer.vector_curves,
        )
        for layer in result.layers
    ]
    return Spectra(layers, _graph(result))


def _graph(result: InteractionBasis) -> DrawnGraph | None:
    graph, modules = result.graph, result.modules
    if graph is None or modules is None:
        return None
    strongest = np.argsort(-graph.weight, kind="stable")[:MAX_EDGES]
    used = np.unique(np.concatenate([graph.source[strongest], graph.target[strongest]]))
    layer, vector = graph.layer[used].tolist(), graph.vector[used].tolist()
    nodes = zip(layer, vector, strict=True)
    return DrawnGraph(
        layer=layer,
        vector=vector,
        description=[_describe(result.layers[number], v) for number, v in nodes],
        module=modules.labels[used].tolist(),
        source=np.searchsorted(used, graph.source[strongest]).tolist(),
        target=np.searchsorted(used, graph.target[strongest]).tolist(),
        weight=graph.weight[strongest].tolist(),
        significant=modules.significant,
        n_edges=len(graph.weight),
    )


def _describe(layer: LayerResult, vector: int) -> str:
    """Importance of a basis vector, and its strongest channels."""
    importance = layer.basis.importance
    share = importance[vector] / max(float(importance.sum()), 1e-300)
    row = layer.basis.from_basis[vector]
    strongest = np.argsort(-np.abs(row), kind="stable")[:MAX_CHANNELS]
    largest = max(float(np.abs(row).max()), 1e-300)
    channels = [f"{row[c] / largest:+.2f} channel {c}" for c in strongest.tolist() if row[c]]
    return f"{share:.1%} of the importance<br>{', '.join(channels)}"


def structure_spectra(values: Any, run: str, schema: int = SCHEMA) -> Spectra:
    """Structure the contents of `spectra.json`; keys of version 0.1 are renamed.

    Args:
        values: Contents of the file.
        run: Name of the run, for messages.
        schema: Schema in its manifest.

    Raises:
        DiskError: The file is damaged.
    """
    try:
        return cattrs.structure(renamed(values, "spectra") if schema < SCHEMA else values, Spectra)
    except (cattrs.BaseValidationError, TypeError, ValueError, AttributeError) as error:
        raise DiskError(
            f"{SPECTRA} of {run} is damaged. Run the command that wrote the folder again."
        ) from error
