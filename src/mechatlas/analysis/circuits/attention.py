"""Virtual weights through a layer of a transformer, head by head.

    record_layer           run some inputs once: codes at both sites, and frozen nonlinearities
    compose_layer_route    atoms and a route -> effect of each atom on the target

With attention patterns and normalization factors frozen at their values on data, a layer is linear
but for the slopes of its MLP. A route has one such slope, so its mean over the positions where a
feature is active, weighted by how much of it arrives, gives the mean derivative of the layer
exactly. Effects of a feature on attention, normalization and slopes are left out; `effects.py`
measures the error of that.

A response has the same values at every relative position: the share that arrives there is its
spread.

Source: Elhage et al., A mathematical framework for transformer circuits (2021).
"""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse
from torch import Tensor

from mechatlas.analysis.circuits.compose import LinearDictionary, Response
from mechatlas.analysis.circuits.layer_parts import AttentionLayer, LayerNonlinearities
from mechatlas.analysis.circuits.recording import (
    check_width,
    encode,
    kept_rows,
    prior_of,
    stacked,
)
from mechatlas.analysis.circuits.wiring import Masked, Route, SiteMap, masked
from mechatlas.base import InputError
from mechatlas.maths.arrays import SparseMatrix

MAX_DISTANCE = 8
"""Largest relative position with a tap of its own; farther ones count as this."""
PRIOR = 4.0
"""Number of activations that the mean over all positions counts for in a feature's own."""
TAPS = np.stack(
    [np.zeros(2 * MAX_DISTANCE + 1, int), np.arange(-MAX_DISTANCE, MAX_DISTANCE + 1)], axis=1
)


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenNonlinearities:
    """Frozen nonlinearities of a layer for each feature, and last their mean over all positions.

    The first axis is past attention, then each head. All are per unit of activation.
    """

    spread: Float[np.ndarray, "way tap latents_and_all"]
    """Share that arrives at positions from which the feature lies at a tap."""
    after: Float[np.ndarray, "way latents_and_all"]
    """Share that arrives by all taps, times the normalization factor past the MLP."""
    inner: Float[np.ndarray, "way latents_and_all hidden"]
    """Share that arrives through the MLP, times the slope of each of its units."""
    by_feature: bool = True
    """Whether each feature has its own; otherwise all share the mean over all positions."""

    def shared(self) -> "FrozenNonlinearities":
        """Mean over all positions, the same for all features."""
        return dataclasses.replace(self, by_feature=False)


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionResponse(Response):
    """Effect of atoms on the target wherever they arrive; `values` has one entry."""

    spread: Float[Tensor, "tap latent"]
    """Share of each atom that arrives at each tap."""
    head: int | None
    """Attention head of the route; None past attention."""

    def entries(self) -> Iterator[tuple[Tensor, Tensor | float, Tensor | float]]:
        """Values, the sum of their weights at all taps, and the sum of squares."""
        yield self.values[0], self.spread.sum(dim=0), self.spread.square().sum(dim=0)

    def kernel(
        self, latents: Int[np.ndarray, " edge"], read: Float[Tensor, "edge channel"]
    ) -> Float[Tensor, "edge tap"]:
        """Kernels of some latents into encoder rows."""
        product = (self.values[0, latents] * read).sum(dim=1)
        return product[:, None] * self.spread[:, latents].T


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionRecording:
    """Record of samples at both sites of a layer: codes and frozen nonlinearities."""

    codes_a: SparseMatrix
    codes_b: SparseMatrix
    grid_a: tuple[int, int]
    grid_b: tuple[int, int]
    n_samples: int
    gates: FrozenNonlinearities
    patterns: Float[Tensor, "sample head query key"]

    def around(
        self, on: SparseMatrix, response: Response, entry: int
    ) -> Float[np.ndarray, "target source"]:
        """Sum of each source's activation that arrives where each target is active.

        Args:
            on: Indicator (position, target) of active targets.
            response: Response of the route by which it arrives.
            entry: Number of the response's only entry.
        """
        del entry
        assert isinstance(response, AttentionResponse)
        if response.head is None:
            return (on.T.tocsr() @ self.codes_a).toarray()
        length = self.grid_b[1]
        attention = np.empty((on.shape[1], on.shape[0]), np.float32)
        for k, pattern in enumerate(self.patterns[:, response.head].numpy()):
            here = slice(k * length, (k + 1) * length)
            attention[:, here] = on[here].T @ pattern
        return (self.codes_a.T.tocsr() @ attention.T).T


def arriving(
    nonlinearities: LayerNonlinearities, codes: SparseMatrix, head: int | None
) -> SparseMatrix | Float[np.ndarray, "position latent"]:
    """Activation of each feature that arrives at each position.

    Args:
        nonlinearities: Attention patterns of the layer on the samples of `codes`.
        codes: Codes (position, latent) at the source.
        head: Attention head; None past attention.
    """
    if head is None:
        return codes
    pattern = nonlinearities.pattern[:, head].float().cpu().numpy()
    length = pattern.shape[1]
    rows = [p @ codes[k * length : (k + 1) * length].toarray() for k, p in enumerate(pattern)]
    return np.concatenate(rows)


@torch.no_grad()
def record_layer(
    layer: AttentionLayer,
    a: LinearDictionary,
    b: LinearDictionary,
    maps: Iterable[SiteMap | Masked],
) -> AttentionRecording:
    """Record codes at both sites, and the frozen nonlinearities of the layer for each feature.

    Args:
        layer: From the site of `a` to that of `b`.
        a: Dictionary of the source.
        b: Dictionary of the target.
        maps: Activations of the source's module (sample, channel, 1, token), batch by batch.

    Raises:
        InputError: There are no samples, or a dictionary is not as wide as its site.
    """
    check_width(layer, a, b)
    sums = _Sums(layer, a.n_latents)
    codes_a, codes_b, patterns, grid = [], [], [], (1, 1)
    for x, left_out in masked(maps):
        frozen = layer.nonlinearities(x)
        grid = (1, x.shape[3])
        codes_a.append(encode(a, x[:, layer.writes], left_out))
        codes_b.append(encode(b, layer.run(x)[:, layer.reads], left_out))
        patterns.append(frozen.pattern.float().cpu())
        sums.add(frozen, codes_a[-1], left_out)
    if not patterns:
        raise InputError("There are no samples to average a layer over.")
    whole, every = stacked(codes_a), torch.cat(patterns)
    return AttentionRecording(
        whole, stacked(codes_b), grid, grid, len(every), sums.means(whole), every
    )


class _Sums:
    """Sums over all positions of a feature, weighted by its activation."""

    def __init__(self, layer: AttentionLayer, n: int) -> None:
        ways, hidden = 1 + layer.n_heads, layer.n_hidden
        self.spread = np.zeros((ways, len(TAPS), n + 1), np.float32)
        self.after = np.zeros((ways, n + 1), np.float32)
        self.inner = np.zeros((ways, n + 1, hidden), np.float32)
        self.weight = np.zeros(n + 1, np.float32)

    def add(
        self,
        frozen: LayerNonlinearities,
        codes: SparseMatrix,
        left_out: Bool[Tensor, "sample token"] | None,
    ) -> None:
        """Add one batch."""
        every = np.ones((codes.shape[0], 1), np.float32)
        ones = sparse.csr_matrix(every if left_out is None else kept_rows(left_out))
        active = sparse.csr_matrix(sparse.hstack([codes, ones]))
        weight = np.asarray(active.sum(axis=0)).ravel()
        self.weight += weight
        after = frozen.after.flatten().float().cpu().numpy()
        inner = frozen.inner.flatten(0, 1).float().cpu().numpy()
        for way in range(len(self.after)):
            arrived = arriving(frozen, active, way - 1 if way else None)
            self.after[way] += arrived.T @ after
            self.inner[way] += arrived.T @ inner
            self.spread[way] += (
                _attention_by_tap(frozen.pattern[:, way - 1]) @ active if way else _here(weight)
            )

    def means(self, codes: SparseMatrix) -> FrozenNonlinearities:
        """Means for each latent, shrunk towards the mean over all positions."""
        prior = np.append(prior_of(codes, PRIOR), 0.0).astype(np.float32)

        def mean(sums: np.ndarray) -> np.ndarray:
            columns = (np.newaxis,) * (sums.ndim - 1)
            every = sums[..., -1:] / max(float(self.weight[-1]), 1e-12)
            weight = (self.weight + prior)[columns]
            drawn = (sums + prior[columns] * every) / np.maximum(weight, 1e-30)
            return np.where(weight > 0, drawn, every)

        inner = np.stack([mean(way.T).T for way in self.inner])
        return FrozenNonlinearities(mean(self.spread), mean(self.after), inner)


def _here(weight: np.ndarray) -> np.ndarray:
    spread = np.zeros((len(TAPS), len(weight)), np.float32)
    spread[MAX_DISTANCE] = weight
    return spread


def _attention_by_tap(
    pattern: Float[Tensor, "sample query key"],
) -> Float[np.ndarray, "tap position"]:
    """Attention that each position receives from queries at each tap."""
    length = pattern.shape[1]
    apart = torch.arange(length) - torch.arange(length)[:, None]  # key minus query
    apart = apart.clamp(-MAX_DISTANCE, MAX_DISTANCE)
    parts = [(pattern * (apart == tap).to(pattern)).sum(dim=1).flatten() for tap in TAPS[:, 1]]
    return torch.stack(parts).float().cpu().numpy()


@torch.no_grad()
def compose_layer_route(
    layer: AttentionLayer,
    route: Route,
    atoms: Float[Tensor, "latent d"],
    frozen: FrozenNonlinearities,
) -> AttentionResponse:
    """Compose a route, applied to all atoms.

    Args:
        layer: From the source site to the target site.
        route: One of its routes.
        atoms: Decoder rows of the source's dictionary.
        frozen: Frozen nonlinearities for each of them.
    """
    way, by_mlp = _way(layer, route)
    whole = atoms.new_zeros(len(atoms), layer.source_channels)
    whole[:, layer.writes] = atoms
    which = slice(None, -1) if frozen.by_feature else slice(-1, None)
    spread = torch.from_numpy(frozen.spread[way][:, which]).to(atoms)
    arrives = spread.sum(dim=0).clamp_min(1e-30)[:, None]
    factor = torch.from_numpy(frozen.after[way, which]).to(atoms)[:, None]
    inner = torch.from_numpy(frozen.inner[way, which]).to(atoms) if by_mlp else None
    rows = layer.carried(whole, way - 1 if way else None)
    values = layer.finished(rows, inner) * (1 if by_mlp else factor) / arrives
    spread = spread.expand(len(TAPS), len(atoms))
    return AttentionResponse(
        TAPS, (1, 1), route.channels, values[None], spread, way - 1 if way else None
    )


def _way(layer: AttentionLayer, route: Route) -> tuple[int, bool]:
    """Way past attention (0) or by a head (from 1), and whether it passes the MLP."""
    by_mlp, way = divmod(layer.routes.index(route), 1 + layer.n_heads)
    return way, bool(by_mlp)
