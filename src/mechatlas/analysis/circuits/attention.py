"""What a feature of one layer of a transformer writes into the next, head by head.

    record      run some inputs once: codes at both sites, and how a layer stands for each feature
    respond     atoms and a route -> what each atom adds to the target, and how it is spread

Where attention patterns and the scales of normalisation are held as they are on data, a layer is
linear but for the slopes of its MLP. A route has one such slope, so its mean over the places
where a feature is active, weighed with how active it is and how much of it arrives, gives the
mean of the layer's derivative, exactly. What is left out is that a feature also moves attention,
normalisation and slopes; `effects.py` measures what that costs.

A response has the same values at every relative position: how much arrives there is its spread.

Source: Elhage et al., A mathematical framework for transformer circuits (2021).
"""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from jaxtyping import Float
from scipy import sparse
from torch import Tensor

from mechatlas.analysis.circuits.compose import LinearDictionary, Response
from mechatlas.analysis.circuits.recording import check_width, encode, prior_of, stacked
from mechatlas.analysis.circuits.transformer_layer import LayerNonlinearities, TransformerLayer
from mechatlas.analysis.circuits.wiring import Route
from mechatlas.base import InputError

FARTHEST = 8
"""Relative positions are told apart up to here; all that lie farther count as this."""
PRIOR = 4.0
"""Activations of a feature that the mean over all places counts for in its own mean."""
TAPS = np.stack([np.zeros(2 * FARTHEST + 1, int), np.arange(-FARTHEST, FARTHEST + 1)], axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenNonlinearities:
    """How a layer stands for each feature, and last for all places alike.

    First axis: past attention, then by each head. All are per unit of activation.
    """

    spread: Float[np.ndarray, "way tap latents_and_all"]
    """How much arrives at positions from which the feature lies at a tap."""
    after: Float[np.ndarray, "way latents_and_all"]
    """The same by all taps, times what normalisation multiplies it by past the MLP."""
    inner: Float[np.ndarray, "way latents_and_all hidden"]
    """By way of the MLP, times the slope of each of its units."""
    by_feature: bool = True

    def shared(self) -> "FrozenNonlinearities":
        """The same for all features: the mean over all places."""
        return dataclasses.replace(self, by_feature=False)


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionResponse(Response):
    """What atoms add to the target wherever they arrive; `values` has one entry."""

    spread: Float[Tensor, "tap latent"]
    head: int | None

    def entries(self) -> Iterator[tuple[Tensor, Tensor | float, Tensor | float]]:
        """Values, the sum of what they count for at all taps, and the sum of squares."""
        yield self.values[0], self.spread.sum(dim=0), self.spread.square().sum(dim=0)

    def kernel(self, latents: np.ndarray, read: Float[Tensor, "edge channel"]) -> Tensor:
        """The kernels of some latents into what is read (edge, tap)."""
        product = (self.values[0, latents] * read).sum(dim=1)
        return product[:, None] * self.spread[:, latents].T


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionRecording:
    """Some inputs, seen at both sites of a layer."""

    codes_a: sparse.csr_matrix
    codes_b: sparse.csr_matrix
    grid_a: tuple[int, int]
    grid_b: tuple[int, int]
    n_samples: int
    gates: FrozenNonlinearities
    patterns: Float[Tensor, "sample head query key"]

    def around(
        self, on: sparse.csr_matrix, response: Response, entry: int
    ) -> Float[np.ndarray, "target source"]:
        """How much of each source arrives where each target is active, summed."""
        del entry
        assert isinstance(response, AttentionResponse)
        if response.head is None:
            return (on.T.tocsr() @ self.codes_a).toarray()
        length = self.grid_b[1]
        looks = np.empty((on.get_shape()[1], on.get_shape()[0]), np.float32)
        for k, pattern in enumerate(self.patterns[:, response.head].numpy()):
            here = slice(k * length, (k + 1) * length)
            looks[:, here] = on[here].T @ pattern
        return (self.codes_a.T.tocsr() @ looks.T).T


def arriving(
    watched: LayerNonlinearities, codes: sparse.csr_matrix, head: int | None
) -> sparse.csr_matrix | Float[np.ndarray, "position latent"]:
    """How much of each feature arrives at each position."""
    if head is None:
        return codes
    pattern = watched.pattern[:, head].float().cpu().numpy()
    length = pattern.shape[1]
    rows = [p @ codes[k * length : (k + 1) * length].toarray() for k, p in enumerate(pattern)]
    return np.concatenate(rows)


@torch.no_grad()
def record(
    layer: TransformerLayer, a: LinearDictionary, b: LinearDictionary, maps: Iterable[Tensor]
) -> AttentionRecording:
    """Codes at both sites, and how the layer stands for each feature.

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
    for x in maps:
        watched = layer.nonlinearities(x)
        grid = (1, x.shape[3])
        codes_a.append(encode(a, x[:, layer.writes]))
        codes_b.append(encode(b, layer.run(x)[:, layer.reads]))
        patterns.append(watched.pattern.float().cpu())
        sums.add(watched, codes_a[-1])
    if not patterns:
        raise InputError("There are no samples to average a layer over.")
    whole, every = stacked(codes_a), torch.cat(patterns)
    return AttentionRecording(
        whole, stacked(codes_b), grid, grid, len(every), sums.means(whole), every
    )


class _Sums:
    """Sums over all places of a feature, weighed with its activation."""

    def __init__(self, layer: TransformerLayer, n: int) -> None:
        ways, hidden = 1 + layer.n_heads, layer.up.weight.shape[1]
        self.spread = np.zeros((ways, len(TAPS), n + 1), np.float32)
        self.after = np.zeros((ways, n + 1), np.float32)
        self.inner = np.zeros((ways, n + 1, hidden), np.float32)
        self.weight = np.zeros(n + 1, np.float32)

    def add(self, watched: LayerNonlinearities, codes: sparse.csr_matrix) -> None:
        """Add one batch."""
        ones = sparse.csr_matrix(np.ones((codes.get_shape()[0], 1), np.float32))
        active = sparse.csr_matrix(sparse.hstack([codes, ones]))
        weight = np.asarray(active.sum(axis=0)).ravel()
        self.weight += weight
        after = watched.after.flatten().float().cpu().numpy()
        inner = watched.inner.flatten(0, 1).float().cpu().numpy()
        for way in range(len(self.after)):
            arrived = arriving(watched, active, way - 1 if way else None)
            self.after[way] += arrived.T @ after
            self.inner[way] += arrived.T @ inner
            self.spread[way] += (
                _looks(watched.pattern[:, way - 1]) @ active if way else _here(weight)
            )

    def means(self, codes: sparse.csr_matrix) -> FrozenNonlinearities:
        """Means, those of each latent drawn towards the mean over all places."""
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
    spread[FARTHEST] = weight
    return spread


def _looks(pattern: Float[Tensor, "sample query key"]) -> Float[np.ndarray, "tap position"]:
    """How much attention each position is given from where it lies at each tap."""
    length = pattern.shape[1]
    apart = torch.arange(length) - torch.arange(length)[:, None]  # key minus query
    apart = apart.clamp(-FARTHEST, FARTHEST)
    parts = [(pattern * (apart == tap).to(pattern)).sum(dim=1).flatten() for tap in TAPS[:, 1]]
    return torch.stack(parts).float().cpu().numpy()


@torch.no_grad()
def compose_route(
    layer: TransformerLayer,
    route: Route,
    atoms: Float[Tensor, "latent d"],
    standing: FrozenNonlinearities,
) -> AttentionResponse:
    """Compose a route, applied to all atoms.

    Args:
        layer: From the source site to the target site.
        route: One of its routes.
        atoms: Decoder rows of the source's dictionary.
        standing: How the layer stands for each of them.
    """
    way, by_mlp = _way(layer, route)
    whole = atoms.new_zeros(len(atoms), layer.source_channels)
    whole[:, layer.writes] = atoms
    which = slice(None, -1) if standing.by_feature else slice(-1, None)
    spread = torch.from_numpy(standing.spread[way][:, which]).to(atoms)
    arrives = spread.sum(dim=0).clamp_min(1e-30)[:, None]
    factor = torch.from_numpy(standing.after[way, which]).to(atoms)[:, None]
    inner = torch.from_numpy(standing.inner[way, which]).to(atoms) if by_mlp else None
    rows = layer.carried(whole, way - 1 if way else None)
    values = layer.finished(rows, inner) * (1 if by_mlp else factor) / arrives
    spread = spread.expand(len(TAPS), len(atoms))
    return AttentionResponse(
        TAPS, (1, 1), route.channels, values[None], spread, way - 1 if way else None
    )


def _way(layer: TransformerLayer, route: Route) -> tuple[int, bool]:
    """Past attention (0) or by which head (from 1), and whether by the MLP."""
    by_mlp, way = divmod(layer.routes.index(route), 1 + layer.n_heads)
    return way, bool(by_mlp)
