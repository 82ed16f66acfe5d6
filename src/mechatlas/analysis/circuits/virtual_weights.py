"""Virtual weights between all features of two sites, block by block, and which stand out.

    responses    what every feature of the source adds to the target's channels, by each route
    blocks       all pairs of features, a few targets at a time: weight, norm, contribution
    edges        the strongest pairs of each target, with their q-values
    kernels      the spatial kernels of some edges

For a pair of features and a route, the kernel has the change of the target's drive (what its
encoder reads, before the sparsity rule) for each place of the source feature, per unit of its
activation. `weight` is the sum of the kernel, `norm` its root sum of squares, and `contribution`
what the source gives to the drive on average where the target is active.

All pairs cost one matrix product for each tap of each route; nothing larger than a block of
targets is ever held. Contributions take no product more: the kernel is weighed with how active
the source is around the places where the target is.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

from mechatlas.analysis.circuits import attention
from mechatlas.analysis.circuits.attention import AttentionRecording, FrozenNonlinearities
from mechatlas.analysis.circuits.compose import (
    Gates,
    LinearDictionary,
    Response,
    compose_route,
    open_gates,
)
from mechatlas.analysis.circuits.recording import MeanGates, Recording, n_columns
from mechatlas.analysis.circuits.transformer_layer import TransformerLayer
from mechatlas.analysis.circuits.wiring import Wiring
from mechatlas.base import Progress, no_progress

BLOCK_BYTES = 256 << 20
"""Memory for what is kept of one block of targets."""
DECOYS = 2
"""Other targets that lend their weights to each target, as its null."""
FEWEST = 64
"""Targets of a block, however little memory there is: its targets lend each other weights."""
LEAST_ACTIVE = 10
"""Places where a feature must be active to be part of an edge."""
_SHIFT = 17  # of the bits of a float32, so that an octave has 64 bins


def compose_responses(
    wiring: Wiring | TransformerLayer,
    a: LinearDictionary,
    gates: Gates | FrozenNonlinearities = open_gates,
) -> Sequence[Response]:
    """What every atom of the source's dictionary adds to the target, by each route."""
    atoms = a.W_dec.detach()
    if isinstance(gates, FrozenNonlinearities):
        assert isinstance(wiring, TransformerLayer)
        return [attention.compose_route(wiring, route, atoms, gates) for route in wiring.routes]
    assert isinstance(wiring, Wiring)
    found = [compose_route(wiring, route, atoms, gates) for route in wiring.routes]
    return gates.drawn(found) if isinstance(gates, MeanGates) else found


@dataclasses.dataclass(frozen=True, eq=False)
class PairBlock:
    """All pairs of some targets with all sources, by each route."""

    targets: slice
    weight: Float[np.ndarray, "route target source"]
    norm: Float[np.ndarray, "route target source"]
    contribution: Float[np.ndarray, "route target source"] | None
    """To the drive, where the target is active; `None` without a recording."""
    decoys: Float[np.ndarray, "draw route target source"] | None
    """The same with the weights of another target, at equal length of what it reads."""


def encoder_rows(
    wiring: Wiring | TransformerLayer, response: Response, encoder: Float[Tensor, "d target"]
) -> Tensor:
    """What encoders read of the channels that a route writes (channel, target)."""
    rows = encoder.new_zeros(response.channels.stop - response.channels.start, encoder.shape[1])
    first, own = response.channels.start, wiring.reads.start
    low, high = max(first, own), min(response.channels.stop, wiring.reads.stop)
    rows[low - first : high - first] = encoder[low - own : high - own]
    return rows


@torch.no_grad()
def pair_blocks(
    wiring: Wiring | TransformerLayer,
    found: Sequence[Response],
    encoder: Float[Tensor, "d target"],
    recording: Recording | AttentionRecording | None = None,
    *,
    decoys: int = 0,
    seed: int = 0,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[PairBlock]:
    """All pairs of features.

    Args:
        wiring: From the source site to the target site.
        found: What `responses` gave.
        encoder: Encoder of the target's dictionary.
        recording: Codes at both sites, for contributions.
        decoys: How many other targets of the block lend each target their weights.
        seed: Seed of which ones.
        block_bytes: Memory for one block.
    """
    n_a, n_b = found[0].values.shape[1], encoder.shape[1]
    arrays = len(found) * ((3 + decoys) if recording else 2) + 3
    size = max(min(FEWEST, n_b), min(n_b, block_bytes // (4 * arrays * n_a)))
    random = np.random.default_rng(seed)
    for cut in np.array_split(np.arange(n_b), -(-n_b // size)):
        targets = slice(int(cut[0]), int(cut[-1]) + 1)
        shape = (len(found), len(cut), n_a)
        weight, norm = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        given = np.zeros(shape, np.float32) if recording else None
        chance = np.zeros((decoys, *shape), np.float32) if recording and decoys else None
        orders = [_deranged(len(cut), random) for _ in range(decoys)]
        together = _Together(recording, targets) if recording else None
        for k, response in enumerate(found):
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
    """An order in which nothing stays where it was."""
    order = random.permutation(n)
    moved = np.empty(n, np.int64)
    moved[order] = np.roll(order, 1)
    return moved


class _Together:
    """How much of each source is around the places where each target is active, on average."""

    def __init__(self, recording: Recording | AttentionRecording, targets: slice) -> None:
        self.recording = recording
        self.on = recording.codes_b[:, targets].copy()
        self.on.data = (self.on.data > 0).astype(np.float32)
        self.count = np.maximum(np.asarray(self.on.sum(axis=0)).ravel(), 1.0)[:, None]

    def __call__(self, response: Response, entry: int) -> np.ndarray:
        return self.recording.around(self.on, response, entry) / self.count


@dataclasses.dataclass(frozen=True, eq=False)
class CircuitEdges:
    """The strongest pairs of features, each by every route, strongest pair of a target first.

    CircuitEdges of one pair follow each other, in the order of the routes.
    """

    source: Int[np.ndarray, " edge"]
    target: Int[np.ndarray, " edge"]
    route: Int[np.ndarray, " edge"]
    weight: Float[np.ndarray, " edge"]
    norm: Float[np.ndarray, " edge"]
    contribution: Float[np.ndarray, " edge"]
    share: Float[np.ndarray, " edge"]
    """Of the pair: what it gives over the sum of the sizes of all that the target is given."""
    q_value: Float[np.ndarray, " edge"]
    """Of the claim that the contribution is larger than by the weights of other targets."""
    discoveries: Float[np.ndarray, " route"]
    """Share of all pairs, by route, that stand at a false discovery rate of 0.05."""
    tested: int
    """Pairs of features that were tested by each route."""


@torch.no_grad()
def strongest_edges(
    wiring: Wiring | TransformerLayer,
    found: Sequence[Response],
    b: LinearDictionary,
    recording: Recording | AttentionRecording,
    *,
    top_k_sources: int = 8,
    seed: int = 0,
    block_bytes: int = BLOCK_BYTES,
    on_progress: Progress = no_progress,
) -> CircuitEdges:
    """The strongest pairs of each target, and their evidence.

    The null keeps when each target is active, and lends it the weights of another target, which
    reads as much of the branch in other directions. Contributions count in units of what the null
    gives with the same target and with the same source, so that a source that is active
    everywhere and gives something to everyone does not stand out. The q-value of an edge is the
    number of null contributions that are as large over the number of real ones, of the same sign
    and route: the false discovery rate of the claim that these weights, not any, carry drive from
    this source to this target.

    Args:
        wiring: From the source site to the target site.
        found: What `responses` gave.
        b: Dictionary of the target.
        recording: Codes at both sites.
        keep: Sources kept of each target.
        seed: Seed of the null.
        block_bytes: Memory for one block of pairs.
        on_progress: Told how many targets are done.
    """
    encoder = b.W_enc.detach()
    alive_a = _alive(recording.codes_a)
    alive_b = _alive(recording.codes_b)
    evidence = _Evidence(len(found), alive_a, alive_b)
    parts: list[dict[str, np.ndarray]] = []
    for block in pair_blocks(
        wiring, found, encoder, recording, decoys=DECOYS, seed=seed, block_bytes=block_bytes
    ):
        targets = np.arange(block.targets.start, block.targets.stop)
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
        routes = np.arange(len(found))
        pick = (routes[None, :], row[:, None], column[:, None])
        parts.append({
            "source": np.repeat(column, len(found)),
            "target": np.repeat(targets[row], len(found)),
            "route": np.tile(routes, len(row)),
            "weight": block.weight[pick].ravel(),
            "norm": block.norm[pick].ravel(),
            "contribution": block.contribution[pick].ravel(),
            "share": np.repeat(whole[row, column] / total[row, 0], len(found)),
            "z": z[pick].ravel(),
        })  # fmt: skip
        on_progress(block.targets.stop, encoder.shape[1])
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    z = columns.pop("z")
    q_value, discoveries, tested = evidence.judge(z, columns["route"])
    return CircuitEdges(**columns, q_value=q_value, discoveries=discoveries, tested=tested)


def _alive(codes: sparse.csr_matrix) -> np.ndarray:
    return np.bincount(codes.indices, minlength=n_columns(codes)) >= LEAST_ACTIVE


class _Evidence:
    """How many contributions there are of every size and sign, by real weights and by others'."""

    def __init__(self, n_routes: int, alive_a: np.ndarray, alive_b: np.ndarray) -> None:
        self.alive_a, self.alive_b = alive_a, alive_b
        self.real = np.zeros((n_routes, 2, 1 << (31 - _SHIFT)), np.int64)
        self.chance = np.zeros_like(self.real)

    def count(self, block: PairBlock) -> np.ndarray:
        """Contributions in units of the null (route, target, source), remembered for `judge`."""
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

    def judge(self, z: np.ndarray, route: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """The q-value of some edges, the share of discoveries by route, and the pairs tested."""
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
    """How many lie in a bin or above."""
    return np.cumsum(counts[::-1])[::-1]


@torch.no_grad()
def edge_kernels(
    wiring: Wiring | TransformerLayer,
    found: Sequence[Response],
    encoder: Float[Tensor, "d target"],
    edges: CircuitEdges,
) -> list[Float[np.ndarray, "edge tap"]]:
    """For each route, the kernels of its edges, in their order; taps as in the response."""
    made = []
    for k, response in enumerate(found):
        own = np.flatnonzero(edges.route == k)
        rows = encoder_rows(wiring, response, encoder)
        kernel = np.empty((len(own), len(response.taps)), np.float32)
        for first in range(0, len(own), 1024):
            part = own[first : first + 1024]
            made_of = response.kernel(edges.source[part], rows.T[edges.target[part]])
            kernel[first : first + len(part)] = made_of.float().cpu().numpy()
        made.append(kernel)
    return made
