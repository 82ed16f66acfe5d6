"""Compiled search for the shortest cycle through each row of a graph of a pairing.

    shortest_cycles    Dijkstra's search from each row back to itself, over short lists of edges

Nodes are rows; the last one stands for columns that stay free. A row's edge to another row is the
reduced cost of taking that one's column.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from mechatlas.maths import compilation


class Edges(NamedTuple):
    """Listed edges of every node, those of one node side by side and ascending."""

    starts: Int[np.ndarray, " node"]
    counts: Int[np.ndarray, " node"]
    nodes: Int[np.ndarray, " edge"]
    weights: Float[np.ndarray, " edge"]
    horizon: Float[np.ndarray, " node"]
    """Lower bound on the edges of each node that are not listed."""
    least: Float[np.ndarray, " row"]
    """Lower bound on the edges to each row."""


class Closing(NamedTuple):
    """Costs and prices, for the edge from any node to any row."""

    row_prices: Float[np.ndarray, " row"]
    column_prices: Float[np.ndarray, " row"]
    """Price of the column of each row."""
    columns: Int[np.ndarray, " row"]
    leaving: Float[np.ndarray, " row"]
    """Price of leaving the column of each row free."""
    matrix: Float[np.ndarray, "n m"]
    """All costs; empty where factors are given."""
    a: Float[np.ndarray, "row d"]
    b: Float[np.ndarray, "column d"]
    row_offsets: Float[np.ndarray, " row"]
    column_offsets: Float[np.ndarray, " column"]


compiled = functools.partial(compilation.compiled, structures=(Edges, Closing))
inner = functools.partial(compiled, inner=True)


@inner
def _edge(node, row, closing):
    """Exact weight of the edge from any node to a row."""
    if node == len(closing.row_prices):
        return closing.leaving[row]
    j = closing.columns[row]
    if closing.matrix.size:
        cost = closing.matrix[node, j]
    else:
        cost = 0.0
        for k in range(closing.a.shape[1]):
            cost -= np.float64(closing.a[node, k]) * np.float64(closing.b[j, k])
        cost = 2 * cost + closing.row_offsets[node] + closing.column_offsets[j]
    return max(cost - closing.row_prices[node] - closing.column_prices[row], 0.0)


@inner
def _push(heap, keys, size, node, key):
    """Add a node to a heap whose nearest node is the first."""
    at = size
    while at > 0 and keys[(at - 1) >> 1] > key:
        heap[at], keys[at] = heap[(at - 1) >> 1], keys[(at - 1) >> 1]
        at = (at - 1) >> 1
    heap[at], keys[at] = node, key


@inner
def _take(heap, keys, size):
    """Remove the first node of a heap, which is one shorter then."""
    node, key, at = heap[size - 1], keys[size - 1], 0
    size -= 1
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and keys[child + 1] < keys[child]:
            child += 1
        if keys[child] >= key:
            break
        heap[at], keys[at] = heap[child], keys[child]
        at = child
    heap[at], keys[at] = node, key


@inner
def _mark_short(passed, distance, horizon, bound, wanted):
    """Mark the nodes whose lists end before a length."""
    for node in passed:
        if distance[node] + horizon[node] < bound:
            wanted[node] = True


@compiled
def shortest_cycles(
    rows: Int[np.ndarray, " cycle"],
    most: int,
    edges: Edges,
    closing: Closing,
    lengths: Float[np.ndarray, " row"],
    is_open: Bool[np.ndarray, " row"],
    wanted: Bool[np.ndarray, " node"],
) -> None:
    """Find the length of the shortest cycle through some rows.

    Args:
        rows: Rows that a cycle is searched for.
        most: Number of nodes reached from a row after which its search ends.
        edges: Listed edges.
        closing: Costs and prices.
        lengths: Length of the cycle through each row, or a lower bound where it is open, written in
            place.
        is_open: Marks of rows whose cycle is not proved the shortest.
        wanted: Marks of nodes whose lists are too short for that.
    """
    n_nodes = len(edges.starts)
    distance, back = np.full(n_nodes, np.inf), np.full(n_nodes, np.nan)
    seen, n_seen = np.empty(n_nodes, np.int64), 0
    passed, n_passed = np.empty(n_nodes, np.int64), 0
    heap, keys = np.empty(64, np.int64), np.empty(64)
    for root in rows:
        best, limit, least, size = np.inf, np.inf, edges.least[root], 0
        node, far = root, 0.0
        distance[root] = 0.0
        seen[0], n_seen, n_passed = root, 1, 0
        while True:
            if n_seen >= most:
                limit = min(limit, far)
                n_passed = 0  # longer lists would not help
                break
            passed[n_passed] = node
            n_passed += 1
            limit = min(limit, far + edges.horizon[node])
            for k in range(edges.starts[node], edges.starts[node] + edges.counts[node]):
                length, other = far + edges.weights[k], edges.nodes[k]
                if length + least >= best:
                    break
                if length >= distance[other]:
                    continue
                if distance[other] == np.inf:
                    seen[n_seen] = other
                    n_seen += 1
                    back[other] = _edge(other, root, closing)
                distance[other] = length
                best = min(best, length + back[other])
                if size == len(heap):
                    heap, keys = np.append(heap, heap), np.append(keys, keys)
                _push(heap, keys, size, other, length)
                size += 1
            while size > 0 and keys[0] > distance[heap[0]]:  # reached on a shorter way since
                _take(heap, keys, size)
                size -= 1
            if size == 0 or keys[0] + least >= best:
                break
            node, far = heap[0], keys[0]
            _take(heap, keys, size)
            size -= 1
        lengths[root] = min(best, limit + least)
        if limit + least < best:
            is_open[root] = True
            _mark_short(passed[:n_passed], distance, edges.horizon, best - least, wanted)
        for t in range(n_seen):
            distance[seen[t]], back[seen[t]] = np.inf, np.nan
