"""Details of a proved network for people: neurons, circuits, cosets and margins.

    describe         weights, group, bound -> NetworkDetails, which `neurons.json` holds
    measure_cosets   weights, group -> subgroups on whose cosets neurons are constant

No bound uses any of this.
"""

import dataclasses

import numpy as np
from jaxtyping import Int

from mechatlas.analysis.proofs.explain import NeuronDirections
from mechatlas.analysis.proofs.prove import AccuracyBound
from mechatlas.analysis.proofs.structure import CosetConcentration, coset_concentration
from mechatlas.analysis.proofs.verifier.explanation import NOT_TRIED, Explanation, Grid
from mechatlas.analysis.proofs.verifier.structures import Weights
from mechatlas.maths.groups import Group

MAX_ROWS = 120
"""Number of x whose true margins are drawn, of large groups."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosetSummary:
    """Neurons of one side that are about constant on the cosets of a subgroup."""

    neurons: int
    """Number of them."""
    concentration: float
    """Median share of their variance that is between cosets."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeuronCosets:
    """Subgroup of each neuron, and how concentrated the neuron is on its cosets."""

    order: list[int]
    """Order of the subgroup; 1 where there is none."""
    concentration: list[float]
    """Share of the variance that is between cosets."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridDetails:
    """Circuit of neurons in the cells of two rho-sets."""

    irrep: str
    """Name of the irrep."""
    neurons: list[int]
    """Neurons of the network."""
    left: list[int]
    """Point of B of each neuron."""
    right: list[int]
    """Point of B' of each neuron."""
    scale: list[float]
    """Strength of each neuron."""
    left_vectors: list[list[float]]
    """Vectors of B."""
    right_vectors: list[list[float]]
    """Vectors of B'."""
    spread_of_a: float
    """Mean of 1 - |cosine| between each neuron's a and the circuit's; 0 where a is constant."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MarginHistogram:
    """Histogram of certified and of true margins."""

    edges: list[float]
    """Edges of the bins, in logits."""
    certified: list[int]
    """Pairs by certified margin."""
    true: list[int]
    """Pairs by true margin."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkDetails:
    """Everything that the page draws of a proof, beside its result."""

    group: str
    """Name of the group."""
    irreps: list[str]
    """Irreps that some neuron uses."""
    irrep: list[str]
    """Irrep of each neuron; empty for neurons that do nothing."""
    shares: dict[str, list[float]]
    """Share of the variance of each neuron's weights that lies in its irrep, by side."""
    grids: list[GridDetails]
    """Circuits."""
    n_unplaced: int
    """Cluster representatives in no circuit."""
    n_dead: int
    """Neurons too weak to matter."""
    n_merged: int = 0
    """Neurons merged into a cluster with a stronger one."""
    histogram: MarginHistogram | None = None
    """Margins."""
    cosets: dict[str, NeuronCosets] | None = None
    """Subgroups on whose cosets the neurons are about constant, by side."""


def measure_cosets(weights: Weights, group: Group) -> dict[str, CosetConcentration]:
    """Find the subgroups on whose cosets the neurons are about constant.

    Returns:
        `left`, of the left weights on right cosets, and `right`, of the right ones on left cosets.
    """
    return {
        "left": coset_concentration(weights.left, group, "left"),
        "right": coset_concentration(weights.right, group, "right"),
    }


def describe(
    weights: Weights, group: Group, bound: AccuracyBound, cosets: dict[str, CosetConcentration]
) -> NetworkDetails:
    """Collect everything that the page draws.

    Args:
        weights: The network.
        group: The group.
        bound: The bound.
        cosets: Coset concentration of the neurons.
    """
    directions, e = bound.directions, bound.proof.explanation
    irreps = group.irreps()
    names = [irreps[k].name if k >= 0 else "" for k in directions.irrep]
    n_dead = int(e.dead.sum())
    return NetworkDetails(
        group=group.name,
        irreps=sorted({name for name in names if name}),
        irrep=names,
        shares={
            side: np.round(values, 4).tolist()
            for side, values in zip(Weights._fields, directions.shares, strict=True)
        },
        grids=[_grid(e, grid, directions) for grid in e.grids],
        n_unplaced=len(e.representatives) - sum(len(g.scale) for g in e.grids),
        n_dead=n_dead,
        n_merged=len(e.dead) - n_dead - len(e.representatives),
        histogram=_histogram(weights, group, bound),
        cosets={
            side: NeuronCosets(
                order=each.order.tolist(), concentration=np.round(each.concentration, 4).tolist()
            )
            for side, each in cosets.items()
        },
    )


def summarize_cosets(cosets: CosetConcentration) -> CosetSummary:
    """Count the neurons with a subgroup, and take the median of their concentration."""
    some = cosets.order > 1
    median = float(np.median(cosets.concentration[some])) if some.any() else 0.0
    return CosetSummary(neurons=int(some.sum()), concentration=median)


def _grid(explanation: Explanation, grid: Grid, directions: NeuronDirections) -> GridDetails:
    """Cells and vectors of one grid, as plain lists."""
    stop = grid.first_neuron + len(grid.scale)
    neurons = explanation.representatives[grid.first_neuron : stop]
    return GridDetails(
        irrep=grid.name,
        neurons=neurons.tolist(),
        left=grid.left_points.tolist(),
        right=grid.right_points.tolist(),
        scale=np.round(grid.scale.astype(float), 6).tolist(),
        left_vectors=np.round(grid.left_vectors, 6).tolist(),
        right_vectors=np.round(grid.right_vectors, 6).tolist(),
        spread_of_a=_spread_of_a(directions, neurons),
    )


def _spread_of_a(directions: NeuronDirections, neurons: Int[np.ndarray, " neuron"]) -> float:
    """Mean of 1 - |cosine| between each neuron's a and that of the circuit."""
    a = np.array([directions.a[i] for i in neurons])
    main = np.linalg.svd(a, full_matrices=False)[2][0]
    return round(float(1 - np.abs(a @ main).mean()), 4)


def _histogram(weights: Weights, group: Group, bound: AccuracyBound) -> MarginHistogram:
    """Certified and true margins; of large groups, of some x only."""
    xs = np.linspace(0, group.order - 1, min(group.order, MAX_ROWS)).astype(int)
    left, right, unembed = (w.astype(np.float64) for w in weights)
    true = []
    for x in xs:
        logits = np.maximum(left[x] + right, 0) @ unembed
        pairs, answers = np.arange(group.order), group.table[x]
        answer = logits[pairs, answers].copy()
        logits[pairs, answers] = -np.inf
        true.append(answer - logits.max(axis=1))
    certified = bound.verification.margins[xs].ravel()
    certified = certified[certified > NOT_TRIED]
    margins = np.concatenate(true)
    low, high = np.quantile(np.concatenate([certified, margins]), [0.001, 1])
    edges = np.linspace(low, high, 61)
    counts = [np.histogram(np.clip(v, low, high), edges)[0].tolist() for v in (certified, margins)]
    return MarginHistogram(edges=np.round(edges, 4).tolist(), certified=counts[0], true=counts[1])
