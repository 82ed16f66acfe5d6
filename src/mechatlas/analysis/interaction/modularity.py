"""Modules of the interaction graph, and whether they are more than chance.

    graph_of        edges of all sections -> one weighted graph of basis vectors
    find_modules    Leiden on it, Newman's Q, and Q of graphs with the same degrees
    stability       how much of the modules other seeds and resampled edges give again
    same_parts      adjusted Rand index of two partitions

Every number of modules comes with a null: Leiden finds modules in anything. Edges are drawn anew
with the degrees of every vector kept, within each section, and modules stand only if their Q
exceeds that of all such graphs.

Source: Bushnaq et al., The local interaction basis (2024), section 5.3; Traag et al., From Louvain
to Leiden (2019); Newman, Modularity and community structure in networks (2006); Strona et al.
(2014) and Carstens et al. (2018), for trades.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from mechatlas.base import UserError

NULLS = 20
ROUNDS = 20
"""Trades of every vector on the way to a null graph."""


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """Weighted edges between the vectors of consecutive layers."""

    layer: Int[np.ndarray, " node"]
    vector: Int[np.ndarray, " node"]
    source: Int[np.ndarray, " edge"]
    """Node that an edge leaves."""
    target: Int[np.ndarray, " edge"]
    weight: Float[np.ndarray, " edge"]
    section: Int[np.ndarray, " edge"]


@dataclasses.dataclass(frozen=True, eq=False)
class Modules:
    """A partition of the vectors, with its evidence."""

    label: Int[np.ndarray, " node"]
    """Module of each node of the graph, largest module first; -1 for those without edges."""
    q: float
    """Newman's modularity of Leiden's best partition, before parts that do not stand are joined."""
    q_null: tuple[float, ...]
    """The same of graphs with the same degrees."""

    @property
    def n(self) -> int:
        """How many modules Leiden gave, whether they stand or not."""
        return int(self.label.max(initial=-1)) + 1

    @property
    def p_value(self) -> float:
        """Share of the null graphs (and this one) with at least this Q."""
        above = sum(q >= self.q - 1e-12 for q in self.q_null)
        return (1 + above) / (1 + len(self.q_null))

    @property
    def stand(self) -> bool:
        """There are at least two modules, and no null graph reached their Q."""
        return self.n > 1 and self.p_value <= 1 / (1 + len(self.q_null)) + 1e-12


def graph_of(strengths: Sequence[Float[np.ndarray, "..."]], smallest: Sequence[float]) -> Graph:
    """The paper's graph: weight max(0, log10(E / smallest)) for each edge.

    Args:
        strengths: For each section, rows are target vectors, columns source vectors.
        smallest: For each section the weakest edge that the network needs.
    """
    widths = [strengths[0].shape[1]] + [s.shape[0] for s in strengths]
    start = np.concatenate([[0], np.cumsum(widths)])
    parts = []
    for number, (strength, least) in enumerate(zip(strengths, smallest, strict=True)):
        with np.errstate(divide="ignore"):
            weight = np.log10(strength / least) if least > 0 else np.zeros_like(strength)
        target, source = np.nonzero(weight > 0)
        parts.append(
            (
                start[number] + source,
                start[number + 1] + target,
                weight[target, source],
                np.full(len(source), number),
            )
        )
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Graph(
        np.repeat(np.arange(len(widths)), widths),
        np.concatenate([np.arange(w) for w in widths]),
        *columns,
    )


def find_modules(
    graph: Graph, *, seed: int = 0, nulls: int = NULLS, resolution: float = 1.0
) -> Modules:
    """Leiden modules of a graph, with Newman's Q and its null.

    Raises:
        UserError: The graph has no edges.
    """
    if not len(graph.weight):
        raise UserError("The interaction graph has no edges: nothing is needed by anything.")
    _, q = _leiden(graph, graph.source, graph.target, seed, resolution)
    null = tuple(_null(graph, seed, nulls, resolution))
    return Modules(_standing(graph, seed, nulls, resolution, null), q, null)


def _null(graph: Graph, seed: int, nulls: int, resolution: float) -> Iterator[float]:
    random = np.random.default_rng(seed)
    for number in range(nulls):
        source, target = _traded(graph, random)
        yield _leiden(graph, source, target, seed + number, resolution)[1]


def _standing(
    graph: Graph, seed: int, nulls: int, resolution: float, null: Sequence[float] = ()
) -> Int[np.ndarray, " node"]:
    """Leiden's partition, but a connected component stays whole unless its parts stand.

    Leiden cuts up anything; what is connected is only told apart if the modularity of its parts
    is higher than in every graph with the same degrees. `null` is the modularity of such graphs,
    if it is known for the whole.
    """
    n = len(graph.layer)
    matrix = csr_array((np.ones(len(graph.weight)), (graph.source, graph.target)), shape=(n, n))
    _, component = connected_components(matrix, directed=False)
    label, found = _leiden(graph, graph.source, graph.target, seed, resolution)
    raw = label.copy()
    for whole in np.unique(component[label >= 0]):
        inside = component[graph.source] == whole
        parts = np.unique(label[component == whole])
        if len(parts) < 2 or not nulls:
            continue
        own, q, by_chance = graph, found, iter(null)
        if not (inside.all() and null):
            edges = (graph.source, graph.target, graph.weight, graph.section)
            own = Graph(graph.layer, graph.vector, *[x[inside] for x in edges])
            _, q = _leiden(own, own.source, own.target, seed, resolution)
            by_chance = _null(own, seed, nulls, resolution)
        if any(chance >= q - 1e-12 for chance in by_chance):  # the first that does is enough
            raw[component == whole] = parts[0]
    return _by_size(raw)


def _leiden(
    graph: Graph, source: np.ndarray, target: np.ndarray, seed: int, resolution: float
) -> tuple[Int[np.ndarray, " node"], float]:
    from importlib import import_module

    native = import_module("graspologic_native")  # its functions have no stubs

    edges = [
        (str(a), str(b), float(w))
        for a, b, w in zip(source.tolist(), target.tolist(), graph.weight.tolist(), strict=True)
    ]
    _, found = native.leiden(
        edges, resolution=resolution, seed=seed, trials=4, iterations=2, use_modularity=True
    )
    raw = np.full(len(graph.layer), -1)
    for node, module in found.items():
        raw[int(node)] = module
    label = _by_size(raw)
    return label, modularity(source, target, graph.weight, label)


def _by_size(raw: np.ndarray) -> Int[np.ndarray, " node"]:
    present, first, sizes = np.unique(raw[raw >= 0], return_index=True, return_counts=True)
    order = present[np.lexsort((first, -sizes))]
    rank = {int(module): number for number, module in enumerate(order)}
    return np.array([rank[int(m)] if m >= 0 else -1 for m in raw])


def modularity(
    source: Int[np.ndarray, " edge"],
    target: Int[np.ndarray, " edge"],
    weight: Float[np.ndarray, " edge"],
    label: Int[np.ndarray, " node"],
) -> float:
    """Newman's Q of a partition of an undirected weighted graph.

    Q = share of the weight inside modules - share expected from the degrees.
    """
    total = weight.sum()
    strength = np.bincount(source, weight, len(label)) + np.bincount(target, weight, len(label))
    inside = weight[label[source] == label[target]].sum() / total
    kept = label >= 0
    by_module = np.bincount(label[kept], strength[kept])
    return float(inside - np.square(by_module / (2 * total)).sum())


def _traded(graph: Graph, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the edges of a random graph in which every vector keeps its number of edges.

    Vectors of a layer are paired at random and share out anew the targets that only one of them
    has; in every round each takes part once. All graphs with the same degrees are equally likely
    in the end. A weight stays with the vector that its edge leaves.
    """
    target = graph.target.copy()
    for section in np.unique(graph.section):
        mine = np.flatnonzero(graph.section == section)
        rows, row = np.unique(graph.source[mine], return_inverse=True)
        columns, column = np.unique(graph.target[mine], return_inverse=True)
        joined = np.zeros((len(rows), len(columns)), dtype=bool)
        joined[row, column] = True
        for _ in range(ROUNDS):
            order = random.permutation(len(rows))
            a, b = order[: len(rows) // 2], order[len(rows) // 2 : len(rows) // 2 * 2]
            both, either = joined[a] & joined[b], joined[a] ^ joined[b]
            keys = np.where(either, random.random(either.shape), 2.0)
            place = keys.argsort(axis=1).argsort(axis=1)
            first = place < (joined[a] & either).sum(axis=1, keepdims=True)
            joined[a], joined[b] = both | first, both | (either & ~first)
        by_row = mine[np.argsort(row, kind="stable")]
        shuffled = np.where(joined, random.random(joined.shape), 2.0).argsort(axis=1)
        degree = joined.sum(axis=1)
        target[by_row] = columns[
            np.concatenate([s[:d] for s, d in zip(shuffled, degree, strict=True)])
        ]
    return graph.source, target


def same_parts(a: Int[np.ndarray, " node"], b: Int[np.ndarray, " node"]) -> float:
    """Adjusted Rand index: 1 for equal partitions, 0 on average for unrelated ones."""
    _, a = np.unique(a, return_inverse=True)
    _, b = np.unique(b, return_inverse=True)
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    total = len(a) * (len(a) - 1) / 2
    expected = rows * columns / total if total else 0.0
    most = (rows + columns) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def stability(
    graph: Graph,
    modules: Modules,
    strengths: Sequence[Float[np.ndarray, "..."]],
    errors: Sequence[Float[np.ndarray, "..."]],
    smallest: Sequence[float],
    *,
    times: int = 5,
    seed: int = 0,
) -> tuple[float, float]:
    """How much of the modules comes again: over seeds, and over samples.

    Args:
        graph: As given to `find_modules`.
        modules: What it gave.
        strengths: As given to `graph_of`.
        errors: Standard errors of the strengths.
        smallest: As given to `graph_of`.
        times: How often each.
        seed: Of the resampling.

    Returns:
        Mean adjusted Rand index with the partitions of other seeds of Leiden, and with those of
        edges drawn within their standard errors.
    """
    random = np.random.default_rng(seed)
    by_seed, by_sample = [], []
    for number in range(1, times + 1):
        label = _standing(graph, seed + number, NULLS, 1.0, modules.q_null)
        by_seed.append(same_parts(modules.label, label))
        drawn = [
            (s + e * random.normal(size=s.shape)).clip(min=0)
            for s, e in zip(strengths, errors, strict=True)
        ]
        again = graph_of(drawn, smallest)
        if len(again.weight):
            label = _standing(again, seed, NULLS, 1.0)
            by_sample.append(same_parts(modules.label, label))
    return float(np.mean(by_seed)), float(np.mean(by_sample)) if by_sample else 0.0
