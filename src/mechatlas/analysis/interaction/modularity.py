"""Modules of the interaction graph, compared with graphs of the same degrees.

    interaction_graph     edges of all layer maps -> one weighted graph of basis vectors
    find_modules          Leiden modules, Newman's Q, and Q of graphs with the same degrees
    module_stability      agreement with the modules of other seeds and of resampled edges
    adjusted_rand_index   agreement of two partitions

Every number of modules comes with a null, as Leiden finds modules in anything. Edges are rewired
at random with the degrees of every vector kept, within each layer map, and modules are significant
only if their Q exceeds that of all such graphs.

Source: Bushnaq et al., The local interaction basis (2024), section 5.3; Traag et al., From Louvain
to Leiden (2019); Newman, Modularity and community structure in networks (2006); Strona et al.
(2014) and Carstens et al. (2018), for rewiring by trades.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.stats.contingency import crosstab

from mechatlas.base import UserError

N_NULL_GRAPHS = 20
"""Default number of random graphs that modularity is compared with."""
N_REPEATS = 5
"""Other seeds, and resampled graphs, that the stability of modules is measured with."""
TRADES = 20
"""Number of trades of every vector on the way to a random graph."""


@dataclasses.dataclass(frozen=True, eq=False)
class InteractionGraph:
    """Weighted edges between the basis vectors of consecutive layers."""

    layer: Int[np.ndarray, " node"]
    """Number of the layer of each node."""
    vector: Int[np.ndarray, " node"]
    """Number of the basis vector in its layer."""
    source: Int[np.ndarray, " edge"]
    """Node that an edge leaves."""
    target: Int[np.ndarray, " edge"]
    """Node that an edge enters."""
    weight: Float[np.ndarray, " edge"]


@dataclasses.dataclass(frozen=True, eq=False)
class Modules:
    """Partition of the basis vectors, with its evidence."""

    labels: Int[np.ndarray, " node"]
    """Module of each node, largest module first; -1 for nodes without edges. Modules of one
    connected component that are not significant are joined."""
    q: float
    """Newman's modularity of Leiden's partition, before any modules are joined."""
    q_null: tuple[float, ...]
    """Newman's modularity of Leiden's partition of graphs with the same degrees."""

    @property
    def n(self) -> int:
        """Number of modules, whether significant or not."""
        return int(self.labels.max(initial=-1)) + 1

    @property
    def p_value(self) -> float:
        """Share of the random graphs, and this one, with at least this Q."""
        above = sum(q >= self.q - 1e-12 for q in self.q_null)
        return (1 + above) / (1 + len(self.q_null))

    @property
    def significant(self) -> bool:
        """Whether there are at least two modules and no random graph reached their Q."""
        return self.n > 1 and self.p_value <= 1 / (1 + len(self.q_null)) + 1e-12


class ModuleStability(NamedTuple):
    """Mean adjusted Rand index of the modules with those found again."""

    over_seeds: float
    """Agreement with other seeds of Leiden."""
    over_samples: float
    """Agreement with edges drawn within their standard errors."""


def interaction_graph(
    strengths: Sequence[Float[np.ndarray, "..."]], thresholds: Sequence[float]
) -> InteractionGraph:
    """Build the graph of the paper: weight max(0, log10(strength / threshold)) for each edge.

    Args:
        strengths: Strength by target (row) and source vector (column), for each layer map.
        thresholds: Strength of the weakest edge that the network needs, for each layer map.
    """
    widths = [strengths[0].shape[1]] + [s.shape[0] for s in strengths]
    start = np.concatenate([[0], np.cumsum(widths)])
    edges = []
    for number, (strength, threshold) in enumerate(zip(strengths, thresholds, strict=True)):
        with np.errstate(divide="ignore"):
            weight = np.log10(strength / threshold) if threshold > 0 else np.zeros_like(strength)
        target, source = np.nonzero(weight > 0)
        edges.append((start[number] + source, start[number + 1] + target, weight[target, source]))
    source, target, weight = (np.concatenate(column) for column in zip(*edges, strict=True))
    return InteractionGraph(
        layer=np.repeat(np.arange(len(widths)), widths),
        vector=np.concatenate([np.arange(w) for w in widths]),
        source=source,
        target=target,
        weight=weight,
    )


def find_modules(
    graph: InteractionGraph,
    *,
    seed: int = 0,
    n_null_graphs: int = N_NULL_GRAPHS,
) -> Modules:
    """Find the Leiden modules of a graph, with Newman's Q and its null.

    Args:
        graph: Interaction graph.
        seed: Seed of Leiden and of the random graphs.
        n_null_graphs: Number of random graphs.

    Raises:
        UserError: The graph has no edges.
    """
    if not len(graph.weight):
        raise UserError("The interaction graph has no edges: nothing is needed by anything.")
    _, q = _leiden(graph, graph.target, seed)
    q_null = tuple(_null_modularity(graph, seed, n_null_graphs))
    labels = _significant_partition(graph, seed, n_null_graphs, q_null)
    return Modules(labels, q, q_null)


def _null_modularity(graph: InteractionGraph, seed: int, n_null_graphs: int) -> Iterator[float]:
    random = np.random.default_rng(seed)
    for number in range(n_null_graphs):
        yield _leiden(graph, _rewired_targets(graph, random), seed + number)[1]


def _significant_partition(
    graph: InteractionGraph,
    seed: int,
    n_null_graphs: int,
    q_null: Sequence[float] = (),
) -> Int[np.ndarray, " node"]:
    """Leiden's partition, in which modules of a connected component are joined unless significant.

    Leiden cuts up anything; a connected component is only divided if the modularity of its parts
    is higher than in every graph with the same degrees. `q_null` is the modularity of such graphs,
    if it is known for the whole graph.
    """
    n = len(graph.layer)
    matrix = csr_array((np.ones(len(graph.weight)), (graph.source, graph.target)), shape=(n, n))
    _, component = connected_components(matrix, directed=False)
    leiden, q_graph = _leiden(graph, graph.target, seed)
    joined = leiden.copy()
    for number in np.unique(component[leiden >= 0]):
        inside = component[graph.source] == number
        modules = np.unique(leiden[component == number])
        if len(modules) < 2 or not n_null_graphs:
            continue
        q, nulls = q_graph, iter(q_null)
        if not (inside.all() and q_null):
            edges = (x[inside] for x in (graph.source, graph.target, graph.weight))
            part = InteractionGraph(graph.layer, graph.vector, *edges)
            _, q = _leiden(part, part.target, seed)
            nulls = _null_modularity(part, seed, n_null_graphs)
        if any(null >= q - 1e-12 for null in nulls):  # the first that does is enough
            joined[component == number] = modules[0]
    return _by_size(joined)


def _leiden(
    graph: InteractionGraph, target: Int[np.ndarray, " edge"], seed: int
) -> tuple[Int[np.ndarray, " node"], float]:
    """Leiden's partition of a graph whose edges enter other targets, and its modularity."""
    from importlib import import_module

    native = import_module("graspologic_native")  # its functions have no stubs

    ends = zip(graph.source.tolist(), target.tolist(), graph.weight.tolist(), strict=True)
    edges = [(str(a), str(b), float(w)) for a, b, w in ends]
    _, partition = native.leiden(
        edges, resolution=1.0, seed=seed, trials=4, iterations=2, use_modularity=True
    )
    raw = np.full(len(graph.layer), -1)
    for node, module in partition.items():
        raw[int(node)] = module
    labels = _by_size(raw)
    return labels, modularity(graph.source, target, graph.weight, labels)


def _by_size(raw: Int[np.ndarray, " node"]) -> Int[np.ndarray, " node"]:
    """Number the modules anew, largest first."""
    present, first, sizes = np.unique(raw[raw >= 0], return_index=True, return_counts=True)
    order = present[np.lexsort((first, -sizes))]
    rank = {int(module): number for number, module in enumerate(order)}
    return np.array([rank[int(m)] if m >= 0 else -1 for m in raw])


def modularity(
    source: Int[np.ndarray, " edge"],
    target: Int[np.ndarray, " edge"],
    weight: Float[np.ndarray, " edge"],
    labels: Int[np.ndarray, " node"],
) -> float:
    """Newman's Q of a partition of an undirected weighted graph.

    Q = share of the weight inside modules - share expected from the degrees.

    Args:
        source: Node at one end of each edge.
        target: Node at the other end.
        weight: Weight of each edge.
        labels: Module of each node; -1 for none.
    """
    total = weight.sum()
    strength = np.bincount(source, weight, len(labels)) + np.bincount(target, weight, len(labels))
    inside = weight[labels[source] == labels[target]].sum() / total
    kept = labels >= 0
    by_module = np.bincount(labels[kept], strength[kept])
    return float(inside - np.square(by_module / (2 * total)).sum())


def _rewired_targets(
    graph: InteractionGraph, random: np.random.Generator
) -> Int[np.ndarray, " edge"]:
    """Targets of the edges of a random graph in which every vector keeps its number of edges.

    Vectors of a layer are paired at random and share out anew the targets that only one of them
    has; in every round each takes part once. All graphs with the same degrees are equally likely
    in the end. A weight stays with the vector that its edge leaves.
    """
    target = graph.target.copy()
    layer = graph.layer[graph.source]
    for number in np.unique(layer):
        edges = np.flatnonzero(layer == number)
        rows, row = np.unique(graph.source[edges], return_inverse=True)
        columns, column = np.unique(graph.target[edges], return_inverse=True)
        adjacent = np.zeros((len(rows), len(columns)), dtype=bool)
        adjacent[row, column] = True
        for _ in range(TRADES):
            order = random.permutation(len(rows))
            a, b = order[: len(rows) // 2], order[len(rows) // 2 : len(rows) // 2 * 2]
            both, only_one = adjacent[a] & adjacent[b], adjacent[a] ^ adjacent[b]
            keys = np.where(only_one, random.random(only_one.shape), 2.0)
            place = keys.argsort(axis=1).argsort(axis=1)
            first = place < (adjacent[a] & only_one).sum(axis=1, keepdims=True)
            adjacent[a], adjacent[b] = both | first, both | (only_one & ~first)
        by_row = edges[np.argsort(row, kind="stable")]
        shuffled = np.where(adjacent, random.random(adjacent.shape), 2.0).argsort(axis=1)
        degree = adjacent.sum(axis=1)
        target[by_row] = columns[
            np.concatenate([s[:d] for s, d in zip(shuffled, degree, strict=True)])
        ]
    return target


def adjusted_rand_index(a: Int[np.ndarray, " node"], b: Int[np.ndarray, " node"]) -> float:
    """Adjusted Rand index: 1 for equal partitions, 0 on average for unrelated ones."""
    table = np.asarray(crosstab(a, b)[1])

    def n_pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both, rows, columns = n_pairs(table), n_pairs(table.sum(1)), n_pairs(table.sum(0))
    total = len(a) * (len(a) - 1) / 2
    expected = rows * columns / total if total else 0.0
    most = (rows + columns) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def module_stability(
    graph: InteractionGraph,
    modules: Modules,
    strengths: Sequence[Float[np.ndarray, "..."]],
    errors: Sequence[Float[np.ndarray, "..."]],
    thresholds: Sequence[float],
    *,
    seed: int = 0,
) -> ModuleStability:
    """Measure the agreement of modules with those of other seeds and of resampled edges.

    Args:
        graph: Interaction graph.
        modules: Modules of the graph.
        strengths: Strength of the edges of each layer map, as for `interaction_graph`.
        errors: Standard errors of the strengths.
        thresholds: Strength of the weakest edge needed, as for `interaction_graph`.
        seed: Seed of the resampling.
    """
    random = np.random.default_rng(seed)
    by_seed, by_sample = [], []
    for number in range(1, N_REPEATS + 1):
        labels = _significant_partition(graph, seed + number, N_NULL_GRAPHS, modules.q_null)
        by_seed.append(adjusted_rand_index(modules.labels, labels))
        resampled = [
            (s + e * random.normal(size=s.shape)).clip(min=0)
            for s, e in zip(strengths, errors, strict=True)
        ]
        again = interaction_graph(resampled, thresholds)
        if len(again.weight):
            labels = _significant_partition(again, seed, N_NULL_GRAPHS)
            by_sample.append(adjusted_rand_index(modules.labels, labels))
    over_samples = float(np.mean(by_sample)) if by_sample else 0.0
    return ModuleStability(float(np.mean(by_seed)), over_samples)
