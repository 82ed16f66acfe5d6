"""UMAP: directions laid out in the plane so that near ones stay near.

    umap    nearest neighbors -> fuzzy graph -> positions that attract along its edges
            and repel elsewhere

Written out here because the reference implementation compiles itself for half a minute in
every process, which is longer than drawing the whole page. Differences: neighbors are
exact, the start is the two leading principal components, and edges are applied in a few
large groups an epoch, in place of one by one. The result depends on the seed alone.

Source: McInnes, Healy and Melville, UMAP (2018).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

A, B = 1.577, 0.8951
"""Coefficients of the curve 1 / (1 + A d^(2 B)) that fits a minimum distance of 0.1."""
GROUPS = 4
"""Number of parts of an epoch; all edges at once would pull hubs too far."""
REPULSIONS = 2
"""Random points by which either end of an edge is repelled."""


def umap(
    unit: Float[np.ndarray, "n d_in"], *, n_neighbors: int = 15, n_epochs: int = 200, seed: int = 0
) -> Float[np.ndarray, "n 2"]:
    """Lay out unit vectors by their cosines.

    Args:
        unit: Vectors of length 1, more than `n_neighbors` of them.
        n_neighbors: Nearest neighbors of each point in the graph.
        n_epochs: Rounds of attraction and repulsion.
        seed: Seed of the start and of the random repulsions.
    """
    index, distance = _nearest(unit, n_neighbors)
    graph = _fuzzy_graph(index, distance)
    start = _start(unit, seed)
    return _settle(start, graph, n_epochs, seed)


def _nearest(unit: np.ndarray, k: int) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
    index = np.empty((len(unit), k), dtype=np.int64)
    distance = np.empty((len(unit), k))
    for i in range(0, len(unit), 1024):
        far = 1 - unit[i : i + 1024] @ unit.T
        far[np.arange(len(far)), np.arange(i, i + len(far))] = np.inf
        near = np.argpartition(far, k - 1, axis=1)[:, :k]
        index[i : i + 1024] = near
        distance[i : i + 1024] = np.maximum(np.take_along_axis(far, near, axis=1), 0)
    return index, distance


def _fuzzy_graph(index: np.ndarray, distance: np.ndarray) -> sparse.coo_matrix:
    """Membership weights in 0..1, whose sum over a point's k neighbors is log2(k)."""
    n, k = index.shape
    beyond = distance - distance.min(axis=1, keepdims=True)
    low, high = np.full(n, 1e-6), np.full(n, 1e3)
    for _ in range(48):
        width = np.sqrt(low * high)
        too_many = np.exp(-beyond / width[:, None]).sum(axis=1) > np.log2(k)
        high, low = np.where(too_many, width, high), np.where(too_many, low, width)
    weight = np.exp(-beyond / np.sqrt(low * high)[:, None])
    rows = np.repeat(np.arange(n), k)
    one_way = sparse.csr_matrix((weight.ravel(), (rows, index.ravel())), shape=(n, n))
    product = one_way.multiply(one_way.T)
    return sparse.coo_matrix(sparse.triu(one_way + one_way.T - product, k=1))


def _start(unit: np.ndarray, seed: int) -> np.ndarray:
    centered = unit - unit.mean(axis=0)
    axes = np.linalg.eigh(centered.T @ centered)[1][:, -2:]
    plane = centered @ (axes * np.sign(axes.sum(axis=0)))  # eigenvectors come with any sign
    noise = np.random.default_rng(seed).normal(scale=1e-2, size=(len(unit), 2))
    return 10 * plane / max(np.abs(plane).max(), 1e-12) + noise


def _settle(
    start: np.ndarray, graph: sparse.coo_matrix, n_epochs: int, seed: int
) -> Float[np.ndarray, "n 2"]:
    random = torch.Generator().manual_seed(seed)
    at = torch.from_numpy(start).float()
    ends = torch.from_numpy(np.stack([graph.row, graph.col]).astype(np.int64))
    chance = torch.from_numpy(graph.data / graph.data.max()).float()
    with _one_thread():
        for epoch in range(n_epochs):
            rate = 1 - epoch / n_epochs
            drawn = ends[:, torch.rand(len(chance), generator=random) < chance]
            drawn = drawn[:, torch.randperm(drawn.shape[1], generator=random)]
            for group in drawn.chunk(GROUPS, dim=1):
                _pull(at, group, rate)
                _push(at, group.flatten().repeat(REPULSIONS), rate, random)
    return at.numpy()


@contextmanager
def _one_thread() -> Iterator[None]:
    # The steps are too small to share: with several threads most of the time is waiting.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _pull(at: Tensor, edges: Tensor, rate: float) -> None:
    apart = at[edges[0]] - at[edges[1]]
    square = apart.square().sum(dim=1, keepdim=True).clamp_min(1e-8)
    force = 2 * A * B * square ** (B - 1) / (1 + A * square**B)
    step = (force * apart).clamp(-4, 4) * rate
    at.index_add_(0, edges[0], step, alpha=-1)
    at.index_add_(0, edges[1], step)


def _push(at: Tensor, points: Tensor, rate: float, random: torch.Generator) -> None:
    others = torch.randint(len(at), points.shape, generator=random)
    apart = at[points] - at[others]
    square = apart.square().sum(dim=1, keepdim=True)
    force = 2 * B / ((1e-3 + square) * (1 + A * square**B))
    at.index_add_(0, points, (force * apart).clamp(-4, 4) * rate)
