"""Virtual weights between all features of two sites, and the strongest pairs with q-values.

    compose_responses    effect of every feature of the source on the target's channels, by route
    pair_blocks          all pairs of features, a few targets at a time
    strongest_edges      strongest sources of each target, with their q-values
    select_edges         the same from contributions that are known
    edge_kernels         spatial kernels of some edges

For a pair of features and a route, the kernel is the change of the target's pre-activation for
each position of the source feature, per unit of its activation. `weight` is the sum of the kernel,
`norm` its root sum of squares, and `contribution` the mean effect on the pre-activation where the
target is active.

All pairs cost one matrix product for each tap of each route; nothing larger than a block of
targets is ever held. Contributions take no product more: the kernel is weighed with how active
the source is around the places where the target is.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechatlas.analysis.circuits.attention import (
    AttentionRecording,
    FrozenNonlinearities,
    compose_layer_route,
)
from mechatlas.analysis.circuits.compose import (
    Gates,
    LinearDictionary,
    Response,
    compose_route,
    open_gates,
)
from mechatlas.analysis.circuits.layer_parts import AttentionLayer
from mechatlas.analysis.circuits.recording import MeanGates, Recording
from mechatlas.analysis.circuits.wiring import Wiring
from mechatlas.base import Progress, no_progress
from mechatlas.maths.arrays import SparseMatrix

BLOCK_BYTES = 256 << 20
"""Memory for one block of targets."""
DECOYS = 2
"""Other targets whose weights serve each target as its null."""
MIN_TARGETS = 64
"""Targets of a block, however little memory there is: they are each other's null."""
MIN_ACTIVE = 10
"""Positions where a feature must be active to be part of an edge."""
_SHIFT = 17  # of the bits of a float32, so that an octave has 64 bins


def compose_responses(
    wiring: Wiring | AttentionLayer,
    a: LinearDictionary,
    gates: Gates | FrozenNonlinearities = open_gates,
) -> Sequence[Response]:
    """Effect of every atom of the source's dictionary on the target, by each route.

    Args:
        wiring: From the source site to the target site.
        a: Dictionary of the source.
        gates: Gates on data, from a recording; by default all gates are open.
    """
    atoms = a.W_dec.detach()
    if isinstance(gates, FrozenNonlinearities):
        assert isinstance(wiring, AttentionLayer)
        return [compose_layer_route(wiring, route, atoms, gates) for route in wiring.routes]
    assert isinstance(wiring, Wiring)
    responses = [compose_route(wiring, route, atoms, gates) for route in wiring.routes]
    return gates.shrunk(responses) if isinstance(gates, MeanGates) else responses


@dataclasses.dataclass(frozen=True, eq=False)
class PairBlock:
    """Virtual weights of some targets with all sources, by each route."""

    targets: slice | Int[np.ndarray, " target"]
    """Latents of the target's dictionary."""
    weight: Float[np.ndarray, "route target source"]
    norm: Float[np.ndarray, "route target source"]
    contribution: Float[np.ndarray, "route target source"] | None
    """Mean effect on the pre-activation where the target is active; None without a recording."""
    decoys: Float[np.ndarray, "draw route target source"] | None
    """Contributions with the encoder of another target, scaled to the same length."""


def encoder_rows(
    wiring: Wiring | AttentionLayer, response: Response, encoder: Float[Tensor, "d target"]
) -> Float[Tensor, "channel target"]:
    """Encoder rows of the channels that a route writes; zero outside of the target's site.

    Args:
        wiring: From the source site to the target site.
        response: Response of the route.
        encoder: Encoder of the target's dictionary.
    """
    rows = encoder.new_zeros(response.channels.stop - response.channels.start, encoder.shape[1])
    first, own = response.channels.start, wiring.reads.start
    low, high = max(first, own), min(response.channels.stop, wiring.reads.stop)
    rows[low - first : high - first] = encoder[low - own : high - own]
    return rows


@torch.no_grad()
def pair_blocks(
    wiring: Wiring | AttentionLayer,
    responses: Sequence[Response],
    encoder: Float[Tensor, "d target"],
    recording: Recording | AttentionRecording | None = None,
    *,
    decoys: int = 0,
    seed: int = 0,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[PairBlock]:
    """Weigh all pairs of features, a few targets at a time.

    Args:
        wiring: From the source site to the target site.
        responses: Result of `compose_responses`.
        encoder: Encoder of the target's dictionary.
        recording: Codes at both sites, for contributions.
        decoys: Other targets of the block whose weights are the null of each target.
        seed: Seed of the choice of those targets.
        block_bytes: Memory for one block.
    """
    n_a, n_b = responses[0].values.shape[1], encoder.shape[1]
    arrays = len(responses) * ((3 + decoys) if recording else 2) + 3
    size = max(min(MIN_TARGETS, n_b), min(n_b, block_bytes // (4 * arrays * n_a)))
    random = np.random.default_rng(seed)
    for cut in np.array_split(np.arange(n_b), -(-n_b // size)):
        targets = slice(int(cut[0]), int(cut[-1]) + 1)
        shape = (len(responses), len(cut), n_a)
        weight, norm = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        given = np.zeros(shape, np.float32) if recording else None
        chance = np.zeros((decoys, *shape), np.float32) if recording and decoys else None
        orders = [_deranged(len(cut), random) for _ in range(decoys)]
        together = _Coactivation(recording, targets) if recording else None
        for k, response in enumerate(responses):
            rows = encoder_rows(wiring, response, encoder[:, targets]).T.contiguous()
            length = rows.norm(dim=1).clamp_min(1e-30).float().cpu().numpy()
            for entry, (values, total, squares) in enumerate(response.entries()):
                made = rows @ values.T
                weight[k] += (made * total).float().cpu().numpy()
                product = made.float().cpu().numpy()
                if together is not None and given is not None:
                    around = together(response, entry)
                    given[k] += product * around
                    for draw, order in enumerate(orders):
                        assert chance is not None
                        chance[draw, k] += product[order] * around
                norm[k] += (made.square_() * squares).float().cpu().numpy()
            np.sqrt(norm[k], out=norm[k])
            for draw, order in enumerate(orders):
                if chance is not None:
                    chance[draw, k] *= (length / length[order])[:, None]
        yield PairBlock(targets, weight, norm, given, chance)


def _deranged(n: int, random: np.random.Generator) -> np.ndarray:
    """Permutation without a fixed point."""
    order = random.permutation(n)
    moved = np.empty(n, np.int64)
    moved[order] = np.roll(order, 1)
    return moved


class _Coactivation:
    """Mean activation of each source around the positions where each target is active."""

    def __init__(self, recording: Recording | AttentionRecording, targets: slice) -> None:
        self.recording = recording
        self.on = recording.codes_b[:, targets].copy()
        self.on.data = (self.on.data > 0).astype(np.float32)
        self.count = np.maximum(np.asarray(self.on.sum(axis=0)).ravel(), 1.0)[:, None]

    def __call__(self, response: Response, entry: int) -> np.ndarray:
        return self.recording.around(self.on, response, entry) / self.count


@dataclasses.dataclass(frozen=True, eq=False)
class CircuitEdges:
    """Strongest pairs of features, each by every route, strongest pair of a target first.

    CircuitEdges of one pair follow each other, in the order of the routes.
    """

    source: Int[np.ndarray, " edge"]
    """Latent of the earlier dictionary."""
    target: Int[np.ndarray, " edge"]
    """Latent of the later dictionary."""
    route: Int[np.ndarray, " edge"]
    """Number of the route."""
    weight: Float[np.ndarray, " edge"]
    """Sum of the kernel."""
    norm: Float[np.ndarray, " edge"]
    """Root sum of squares of the kernel."""
    contribution: Float[np.ndarray, " edge"]
    """Mean effect on the pre-activation where the target is active."""
    share: Float[np.ndarray, " edge"]
    """Contribution of the pair by all routes, over the sum of the sizes of all contributions."""
    q_value: Float[np.ndarray, " edge"]
    """False discovery rate of the claim that the contribution exceeds the null."""
    discoveries: Float[np.ndarray, " route"]
    """Fraction of all pairs, by route, with a q-value of at most 0.05."""
    tested: int
    """Number of pairs of features tested by each route."""


@torch.no_grad()
def strongest_edges(
    wiring: Wiring | AttentionLayer,
    responses: Sequence[Response],
    b: LinearDictionary,
    recording: Recording | AttentionRecording,
    *,
    top_k_sources: int = 8,
    seed: int = 0,
    block_bytes: int = BLOCK_BYTES,
    on_progress: Progress = no_progress,
) -> CircuitEdges:
    """Find the strongest sources of each target, with q-values.

    The null keeps the positions where each target is active, and replaces its encoder by that of
    another target, scaled to the same length. Contributions count in units of the null's for the
    same target and the same source, so that a source that is active everywhere and contributes to
    every target is not significant. The q-value of an edge is the number of null contributions
    that are as large, over the number of real ones of the same sign and route.

    Args:
        wiring: From the source site to the target site.
        responses: Result of `compose_responses`.
        b: Dictionary of the target.
        recording: Codes at both sites.
        top_k_sources: Strongest sources kept of each target.
        seed: Seed of the null.
        block_bytes: Memory for one block of pairs.
        on_progress: Called with the number of targets done and their total.
    """
    alive_a, alive_b = _alive(recording.codes_a), _alive(recording.codes_b)

    def blocks() -> Iterator[PairBlock]:
        for block in pair_blocks(
            wiring, responses, b.W_enc.detach(), recording, decoys=DECOYS, seed=seed,
            block_bytes=block_bytes,
        ):  # fmt: skip
            yield block
            on_progress(int(np.arange(b.n_latents)[block.targets][-1]) + 1, b.n_latents)

    return select_edges(blocks(), alive_a, alive_b, len(responses), top_k_sources=top_k_sources)


def select_edges(
    blocks: Iterable[PairBlock],
    alive_a: Bool[np.ndarray, " latent_a"],
    alive_b: Bool[np.ndarray, " latent_b"],
    n_routes: int,
    *,
    top_k_sources: int,
) -> CircuitEdges:
    """Select the strongest sources of each target, with q-values; see `strongest_edges`.

    Args:
        blocks: Contributions, with those of the null.
        alive_a: Sources that are active often enough.
        alive_b: Targets that are active often enough.
        n_routes: Number of routes.
        top_k_sources: Strongest sources kept of each target.
    """
    evidence = _Histograms(n_routes, alive_a, alive_b)
    parts: list[dict[str, np.ndarray]] = []
    for block in blocks:
        targets = np.arange(len(alive_b))[block.targets]
        assert block.contribution is not None
        whole = block.contribution.sum(axis=0)
        whole[:, ~alive_a] = 0
        whole[~alive_b[targets]] = 0
        total = np.maximum(np.abs(whole).sum(axis=1, keepdims=True), 1e-30)
        z = evidence.count(block)
        n = min(top_k_sources, whole.shape[1])
        best = np.argpartition(-np.abs(whole), n - 1, axis=1)[:, :n]
        size = np.abs(np.take_along_axis(whole, best, axis=1))
        best = np.take_along_axis(best, np.argsort(-size, axis=1, kind="stable"), axis=1)
        row = np.repeat(np.arange(len(targets)), n)
        column = best.ravel()
        real = whole[row, column] != 0
        row, column = row[real], column[real]
        routes = np.arange(n_routes)
        pick = (routes[None, :], row[:, None], column[:, None])
        parts.append({
            "source": np.repeat(column, n_routes),
            "target": np.repeat(targets[row], n_routes),
            "route": np.tile(routes, len(row)),
            "weight": block.weight[pick].ravel(),
            "norm": block.norm[pick].ravel(),
            "contribution": block.contribution[pick].ravel(),
            "share": np.repeat(whole[row, column] / total[row, 0], n_routes),
            "z": z[pick].ravel(),
        })  # fmt: skip
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    z = columns.pop("z")
    q_value, discoveries, tested = evidence.q_values(z, columns["route"])
    return CircuitEdges(**columns, q_value=q_value, discoveries=discoveries, tested=tested)


def _alive(codes: SparseMatrix) -> np.ndarray:
    return np.bincount(codes.indices, minlength=codes.shape[1]) >= MIN_ACTIVE


class _Histograms:
    """Histograms of contributions by size and sign, with real weights and with the null's."""

    def __init__(self, n_routes: int, alive_a: np.ndarray, alive_b: np.ndarray) -> None:
        self.alive_a, self.alive_b = alive_a, alive_b
        self.real = np.zeros((n_routes, 2, 1 << (31 - _SHIFT)), np.int64)
        self.chance = np.zeros_like(self.real)

    def count(self, block: PairBlock) -> np.ndarray:
        """Count contributions, and return them in units of the null (route, target, source)."""
        assert block.contribution is not None
        assert block.decoys is not None
        live = self.alive_b[block.targets]
        z = np.zeros_like(block.contribution)
        for k, draws in enumerate(block.decoys[:, :, live][..., self.alive_a].swapaxes(0, 1)):
            given = block.contribution[k][live][:, self.alive_a]
            square = np.mean(np.square(draws), axis=0)
            unit = np.sqrt(square.mean(axis=1, keepdims=True) * square.mean(axis=0))
            unit /= np.sqrt(max(square.mean(), 1e-30)) if square.size else 1
            unit = np.maximum(unit, 1e-20)
            own = given / unit
            _count(self.real[k], own)
            _count(self.chance[k], draws / unit)
            z[k][np.ix_(live, self.alive_a)] = own
        return z

    def q_values(self, z: np.ndarray, route: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Q-values of edges, fraction of discoveries by route, and number of pairs tested."""
        q_value, discoveries = np.ones(len(z)), np.zeros(len(self.real))
        tested = int(self.alive_a.sum()) * int(self.alive_b.sum())
        for k, sign in np.ndindex(*self.real.shape[:2]):
            real, chance = _tail(self.real[k, sign]), _tail(self.chance[k, sign]) / DECOYS
            fdr = np.minimum((chance + 1) / np.maximum(real, 1), 1.0)
            q = np.minimum.accumulate(fdr)
            own = (route == k) & ((z < 0) == bool(sign)) & (z != 0)
            q_value[own] = q[_bins(np.abs(z[own]))]
            discoveries[k] += self.real[k, sign][q <= 0.05].sum() / max(tested, 1)
        return q_value, discoveries, tested


def _count(counts: np.ndarray, z: np.ndarray) -> None:
    counts[0] += _binned(z[z > 0])
    counts[1] += _binned(-z[z < 0])


def _bins(z: np.ndarray) -> np.ndarray:
    # The bits of positive floats rise with their values, evenly in octaves.
    return np.ascontiguousarray(z, np.float32).view(np.int32) >> _SHIFT


def _binned(z: np.ndarray) -> np.ndarray:
    return np.bincount(_bins(z).ravel(), minlength=1 << (31 - _SHIFT))


def _tail(counts: np.ndarray) -> np.ndarray:
    """Counts in each bin or above."""
    return np.cumsum(counts[::-1])[::-1]


@torch.no_grad()
def edge_kernels(
    wiring: Wiring | AttentionLayer,
    responses: Sequence[Response],
    encoder: Float[Tensor, "d target"],
    edges: CircuitEdges,
) -> list[Float[np.ndarray, "_ _"]]:
    """Spatial kernels of the edges of each route, in their order.

    Args:
        wiring: From the source site to the target site.
        responses: Result of `compose_responses`; its taps are those of the kernels.
        encoder: Encoder of the target's dictionary.
        edges: Edges whose kernels are wanted.
    """
    kernels = []
    for k, response in enumerate(responses):
        own = np.flatnonzero(edges.route == k)
        rows = encoder_rows(wiring, response, encoder)
        kernel = np.empty((len(own), len(response.taps)), np.float32)
        for first in range(0, len(own), 1024):
            part = own[first : first + 1024]
            made_of = response.kernel(edges.source[part], rows.T[edges.target[part]])
            kernel[first : first + len(part)] = made_of.float().cpu().numpy()
        kernels.append(kernel)
    return kernels
