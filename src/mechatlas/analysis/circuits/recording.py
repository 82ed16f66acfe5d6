"""Record, for each feature, which ReLU gates and max-pool positions were open on data.

    record_gates    run some inputs once: codes at both sites, and gated means of each feature
    MeanGates       gates averaged over all positions, and for each feature its gated means

A route is composed for single activations of a feature, with the gates at their positions. The
mean of the result, weighted by activation, is the mean derivative of the route; gates averaged one
by one would lose their correlations along the route. Of the activations of a feature in one sample
only some are followed, drawn in proportion to their size, so that the mean is unbiased. A feature
that is rarely active is shrunk towards its effect with gates averaged over all positions.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from scipy import sparse
from torch import Tensor
from torch.nn import functional

from mechatlas.analysis.circuits.compose import (
    LinearDictionary,
    Response,
    RouteState,
    compose_route,
    end,
    stride_after,
    tap_pairs,
    walk,
    window,
)
from mechatlas.analysis.circuits.layer_parts import AttentionLayer
from mechatlas.analysis.circuits.wiring import (
    Gate,
    Masked,
    MaxPool,
    Node,
    Route,
    SiteMap,
    Wiring,
    masked,
)
from mechatlas.base import InputError
from mechatlas.dictionaries.pretrained import reading_of
from mechatlas.maths.arrays import SparseMatrix

PRIOR = 16.0
"""Number of activations that the shared average gates count for in a feature's own mean."""
FOLLOWED = 8
"""Activations of a feature followed in one sample; more of one sample are much alike."""
CODE_BYTES = 64 << 20
"""Memory for dense codes."""
EVENT_BYTES = 64 << 20
"""Memory for activations followed together."""


@dataclasses.dataclass(frozen=True, eq=False)
class GatedMean:
    """Gated means of features by one route: effects with the gates met, weighted by activation."""

    sums: Float[np.ndarray, "tap latent channel"]
    """Sums of the effects of activations."""
    weights: Float[np.ndarray, "tap latent"]
    """Sums of the activations whose tap lies inside the target's map."""


@dataclasses.dataclass(frozen=True, eq=False)
class MeanGates:
    """Gates averaged over data."""

    means: dict[RouteState, Float[Tensor, "sign own 1 channel"]]
    """Mean gates over all positions, laid out as in `OpenGates`."""
    prior: Float[np.ndarray, " latent"]
    """Activation that the shared mean gates count for, by latent."""
    gated_means: Sequence[GatedMean]
    """Gated means of each feature, route by route; empty to share the mean gates."""

    def __call__(self, place: RouteState, node: Node, values: Tensor) -> Tensor:
        """Mean gates, the same for all latents."""
        del node
        return by_sign(self.means[place].repeat_interleave(len(place.taps), dim=1), values)

    def shared(self) -> "MeanGates":
        """Mean gates alone, the same for all features."""
        return dataclasses.replace(self, gated_means=())

    def shrunk(self, shared: Sequence[Response]) -> list[Response]:
        """Mean responses of each feature, shrunk towards those with shared mean gates."""
        responses = list(shared)
        for k, gated_means in enumerate(self.gated_means):
            like = responses[k].values
            weights, prior = (
                torch.from_numpy(x).to(like) for x in (gated_means.weights, self.prior)
            )
            whole = (weights + prior)[..., None]
            mean = (torch.from_numpy(gated_means.sums).to(like) + prior[:, None] * like) / whole
            values = torch.where(whole > 0, mean, like)
            responses[k] = dataclasses.replace(responses[k], values=values)
        return responses


@dataclasses.dataclass(frozen=True, eq=False)
class Recording:
    """Record of samples at both sites: codes and gates."""

    codes_a: SparseMatrix
    """Codes (position, latent) at the source; positions are ordered by sample, y and x."""
    codes_b: SparseMatrix
    """Codes at the target."""
    grid_a: tuple[int, int]
    """Height and width of the source's map."""
    grid_b: tuple[int, int]
    """Height and width of the target's map."""
    n_samples: int
    """Number of samples."""
    gates: MeanGates
    """Gates on these samples."""

    def around(
        self, on: SparseMatrix, response: Response, entry: int
    ) -> Float[np.ndarray, "target source"]:
        """Sum of each source's activation at a tap of the positions where each target is active.

        Args:
            on: Indicator (position, target) of active targets.
            response: Response that the tap belongs to.
            entry: Number of the tap.
        """
        y, x = response.taps[entry].tolist()
        here, there = seen(self.n_samples, self.grid_b, self.grid_a, response.stride, (y, x))
        return (on[here].T.tocsr() @ self.codes_a[there]).toarray()


@torch.no_grad()
def record_gates(
    wiring: Wiring,
    a: LinearDictionary,
    b: LinearDictionary,
    maps: Iterable[SiteMap | Masked],
    *,
    seed: int = 0,
) -> Recording:
    """Record codes at both sites, mean gates, and gated means of each feature.

    Args:
        wiring: From the site of `a` to that of `b`.
        a: Dictionary of the source.
        b: Dictionary of the target.
        maps: Activations of the source's module (sample, channel, y, x), batch by batch.
        seed: Seed of the activations that are followed.

    Raises:
        InputError: There are no samples, or a dictionary is not as wide as its site.
    """
    check_width(wiring, a, b)
    codes_a, codes_b, n_samples, grids = [], [], 0, ((1, 1), (1, 1))
    sums: dict[RouteState, Tensor] = {}
    gated_means = [_no_gated_mean(wiring, route, a.n_latents) for route in wiring.routes]
    random = np.random.default_rng([seed, 7])
    for x, left_out in masked(maps):
        values = wiring.values(x)
        out = values[len(wiring.nodes) - 1]
        grids = _sides(x), _sides(out)
        codes_a.append(encode(a, x[:, wiring.writes], left_out))
        codes_b.append(encode(b, out[:, wiring.reads], left_out))
        open_gates = _open_gates(wiring, values)
        for place, gate in open_gates.items():
            n = gate.grid[0] * gate.grid[1]
            total = gate.rows.sum(dim=2, keepdim=True, dtype=x.dtype) / n
            sums[place] = sums[place] + total if place in sums else total
        n_samples += len(x)
        events = sample_activations(codes_a[-1], grids[0], random)
        for route, gated_mean in zip(wiring.routes, gated_means, strict=True):
            _add_gated_means(gated_mean, wiring, route, a, events, open_gates, grids)
    if not n_samples:
        raise InputError("There are no samples to average gates over.")
    whole = stacked(codes_a)
    means = {place: total / n_samples for place, total in sums.items()}
    gates = MeanGates(means, prior_of(whole, PRIOR).astype(np.float32), gated_means)
    return Recording(whole, stacked(codes_b), *grids, n_samples, gates)


def check_width(wiring: Wiring | AttentionLayer, a: LinearDictionary, b: LinearDictionary) -> None:
    """Refuse dictionaries whose widths are not those of their sites.

    Args:
        wiring: From the site of `a` to that of `b`.
        a: Dictionary of the source.
        b: Dictionary of the target.

    Raises:
        InputError: One is not as wide as its site.
    """
    ends = ((a, wiring.source, wiring.writes), (b, wiring.target, wiring.reads))
    for dictionary, site, part in ends:
        width = part.stop - part.start
        if dictionary.d_in != width or dictionary.W_dec.shape[1] != width:
            raise InputError(
                f"Site {site} has {width} channels, its dictionary reads "
                f"{reading_of(dictionary)} and writes {dictionary.W_dec.shape[1]}."
            )


def _sides(x: Tensor) -> tuple[int, int]:
    return (x.shape[2], x.shape[3])


def encode(
    dictionary: LinearDictionary,
    x: Float[Tensor, "n channel y x"],
    left_out: Bool[Tensor, "n position"] | None,
) -> SparseMatrix:
    """Encode every position, ordered by sample, y and x; codes are zero where it is left out."""
    rows = x.movedim(1, -1).reshape(-1, x.shape[1])
    size = max(1, CODE_BYTES // (4 * dictionary.n_latents))
    parts = [
        sparse.csr_matrix(dictionary.encode(part).detach().float().cpu().numpy())
        for part in rows.split(size)
    ]
    codes = stacked(parts)
    return codes if left_out is None else only(codes, kept_rows(left_out))


def kept_rows(left_out: Bool[Tensor, "n position"]) -> Float[np.ndarray, "row 1"]:
    """Ones for positions that count, zeros for others."""
    return (~left_out.flatten()[:, None]).float().cpu().numpy()


def only(codes: SparseMatrix, kept: Shaped[np.ndarray, "row 1"]) -> SparseMatrix:
    """Keep the codes of some rows; those of others are no longer stored, not even as zeros."""
    codes = sparse.csr_matrix(codes.multiply(kept))
    codes.eliminate_zeros()
    return codes


def stacked(parts: list[SparseMatrix]) -> SparseMatrix:
    """Concatenation of the codes of batches."""
    return sparse.csr_matrix(sparse.vstack(parts))


def prior_of(codes: SparseMatrix, activations: float) -> Float[np.ndarray, " latent"]:
    """Weight of the shared mean in a latent's own: a number of its mean activations."""
    count = np.bincount(codes.indices, minlength=codes.shape[1])
    return activations * np.asarray(codes.sum(axis=0)).ravel() / np.maximum(count, 1)


def seen(
    n_samples: int,
    grid: tuple[int, int],
    grid_source: tuple[int, int],
    stride: tuple[int, int],
    tap: tuple[int, int],
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Positions of a grid whose tap lies inside the source's map, and those source positions.

    Args:
        n_samples: Number of samples.
        grid: Height and width of the target's map.
        grid_source: Height and width of the source's map.
        stride: Stride of the route.
        tap: Row and column of the tap.
    """
    y = np.arange(grid[0]) * stride[0] + tap[0]
    x = np.arange(grid[1]) * stride[1] + tap[1]
    in_y, in_x = (y >= 0) & (y < grid_source[0]), (x >= 0) & (x < grid_source[1])
    here = (np.flatnonzero(in_y)[:, None] * grid[1] + np.flatnonzero(in_x)).ravel()
    there = (y[in_y][:, None] * grid_source[1] + x[in_x]).ravel()
    samples = np.arange(n_samples)[:, None]
    return (
        (samples * (grid[0] * grid[1]) + here).ravel(),
        (samples * (grid_source[0] * grid_source[1]) + there).ravel(),
    )


def _open_gates(wiring: Wiring, values: dict[int, Tensor]) -> dict[RouteState, "OpenGates"]:
    """Gates of all nodes at every position of their maps, in one batch."""
    open_gates = {}
    for route in wiring.routes:
        for place, node, slot in walk(wiring, route):
            given = values[node.inputs[slot]][:, slice(*place.channels)]
            if isinstance(node.operation, Gate):
                shares = slope(node.operation, given)[None, None]
            elif isinstance(node.operation, MaxPool):
                shares = largest(node.operation, given)
            else:
                continue
            rows = shares.movedim(3, -1).flatten(2, 4)
            padded = functional.pad(rows, (0, 0, 0, 1))
            open_gates[place] = OpenGates(padded, _sides(shares[0, 0]))
    return open_gates


@dataclasses.dataclass(frozen=True, eq=False)
class OpenGates:
    """Open gates of a node at each position of its map, for each position of its window."""

    rows: Shaped[Tensor, "sign own position channel"]
    """Gates for positive and for negative values; the last position is outside, and shut."""
    grid: tuple[int, int]
    """Height and width of the map."""

    def at(
        self,
        index: Int[np.ndarray, "own_and_tap event"],
        taps: int,
        values: Float[Tensor, "own_and_tap event channel"],
    ) -> Shaped[Tensor, "own_and_tap event channel"]:
        """Gates (own and tap, event, channel) at the positions of events.

        Args:
            index: Flat position in the map, for each position of the window and each tap.
            taps: Number of taps.
            values: Values that arrive, whose signs select the gates.
        """
        own = torch.arange(len(index), device=self.rows.device)[:, None] // taps
        where = torch.from_numpy(index).to(self.rows.device)
        return by_sign(self.rows[:, own, where], values)


def by_sign(
    gates: Shaped[Tensor, "sign own_and_tap #latent channel"],
    values: Float[Tensor, "own_and_tap latent channel"],
) -> Shaped[Tensor, "own_and_tap _latent channel"]:
    """Select gates by the sign of values."""
    if len(gates) == 1:
        return gates[0]
    if gates.dtype == torch.bool:  # the same, and much faster
        return gates[0] | (gates[1] & (values < 0))
    return torch.where(values < 0, gates[1], gates[0])


def slope(gate: Gate, z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Derivative of an activation function at each number."""
    with torch.enable_grad():
        at = z.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(gate(at).sum(), at)
    return gradient


def largest(
    pool: MaxPool, x: Float[Tensor, "sample channel y2 x2"]
) -> Bool[Tensor, "sign own sample channel y x"]:
    """Whether each position of a window is the only largest, and whether it is one of the largest.

    If one of several that are equally large is lowered, the maximum stays; if it is raised, the
    maximum rises with it. Removing a feature raises what the feature made smaller.
    """
    top = pool(x)
    ends = [(n - 1) * s + 1 for n, s in zip(top.shape[2:], pool.stride, strict=True)]
    frame = [
        (before, end + (size - 1) * dilation - before - n)
        for before, end, size, dilation, n in zip(
            pool.padding, ends, pool.size, pool.dilation, x.shape[2:], strict=True
        )
    ]
    wide = functional.pad(x, (*frame[1], *frame[0]), value=-torch.inf)
    holds = torch.stack([
        wide[:, :, row : row + ends[0] : pool.stride[0], column : column + ends[1] : pool.stride[1]]
        == top
        for row, column in (
            (k * pool.dilation[0], m * pool.dilation[1]) for k, m in np.ndindex(*pool.size)
        )
    ])  # fmt: skip
    return torch.stack([holds & (holds.sum(dim=0) == 1), holds])


def _no_gated_mean(wiring: Wiring, route: Route, n: int) -> GatedMean:
    taps, width = len(end(wiring, route)[0]), route.channels.stop - route.channels.start
    return GatedMean(np.zeros((taps, n, width), np.float32), np.zeros((taps, n), np.float32))


class SampledActivations(NamedTuple):
    """Activations of features, drawn to be followed."""

    position: Int[np.ndarray, " event"]
    latent: Int[np.ndarray, " event"]
    weight: Float[np.ndarray, " event"]
    """Sum of the activations that each stands for."""


def sample_activations(
    codes: SparseMatrix, grid: tuple[int, int], random: np.random.Generator
) -> SampledActivations:
    """Draw some activations of each feature in each sample, by systematic sampling.

    The activations of a feature in a sample are laid end to end, and evenly spaced points select
    those that they fall on, so each is drawn in proportion to its size.

    Args:
        codes: Codes (position, latent) of some samples.
        grid: Height and width of the map.
        random: Source of the offset of the points.
    """
    every = codes.tocoo()
    group = every.row.astype(np.int64) // (grid[0] * grid[1]) * codes.shape[1] + every.col
    order = np.argsort(group, kind="stable")
    _, first, count = np.unique(group[order], return_index=True, return_counts=True)
    size = every.data[order].astype(np.float64)
    reached = np.concatenate([[0.0], np.cumsum(size)])
    n = np.minimum(count, FOLLOWED)
    share = (reached[first + count] - reached[first]) / n
    of = np.repeat(np.arange(len(n)), n)
    number = np.arange(len(of)) - np.repeat(np.cumsum(n) - n, n)
    points = reached[first[of]] + (number + random.random(len(n))[of]) * share[of]
    fallen = np.searchsorted(reached, points, side="right") - 1
    all_of_them = (count == n)[of]
    chosen = np.where(
        all_of_them, first[of] + number, np.clip(fallen, first[of], (first + count - 1)[of])
    )
    weight = np.where(all_of_them, size[chosen], share[of]).astype(np.float32)
    return SampledActivations(every.row[order[chosen]], every.col[order[chosen]], weight)


def _add_gated_means(
    gated_means: GatedMean,
    wiring: Wiring,
    route: Route,
    a: LinearDictionary,
    events: SampledActivations,
    open_gates: dict[RouteState, OpenGates],
    grids: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    """Add activations of one batch, with the gates at their positions along a route."""
    atoms = a.W_dec.detach()
    widest = max(
        len(place.taps)
        * len(window(node))
        * max(place.channels[1] - place.channels[0], node.channels)
        for place, node, _ in walk(wiring, route)
    )
    size = max(1, EVENT_BYTES // (4 * widest))
    for first in range(0, len(events.weight), size):
        part = slice(first, first + size)
        position, latent, activation = (array[part] for array in events)

        def gates(
            place: RouteState, node: Node, values: Tensor, at: np.ndarray = position
        ) -> Tensor:
            gate = open_gates[place]
            pairs = tap_pairs(place.taps, place.stride, window(node))
            index = landing(at, grids[0], gate.grid, stride_after(place.stride, node), pairs)
            return gate.at(index, len(place.taps), values)

        response = compose_route(wiring, route, atoms[torch.from_numpy(latent)], gates)
        inside = landing(position, grids[0], grids[1], response.stride, response.taps.tolist()) >= 0
        rows, which = np.unique(latent, return_inverse=True)
        shape = (len(rows), len(latent))
        for k, values in enumerate(response.values.float().cpu().numpy()):
            weight = activation * inside[k]
            weights = sparse.csr_matrix((weight, (which, np.arange(len(which)))), shape=shape)
            gated_means.sums[k, rows] += weights @ values
            gated_means.weights[k] += np.bincount(latent, weight, minlength=a.n_latents)


def landing(
    position: Int[np.ndarray, " event"],
    grid_source: tuple[int, int],
    grid: tuple[int, int],
    stride: tuple[int, int],
    taps: Sequence[Sequence[int]],
) -> Int[np.ndarray, "tap event"]:
    """Positions of a grid that have a source position at each tap; -1 if there is none.

    Args:
        position: Source positions, ordered by sample, y and x.
        grid_source: Height and width of the source's map.
        grid: Height and width of the grid.
        stride: Stride from the source to the grid.
        taps: Rows and columns of the taps.
    """
    sample, y, x = np.unravel_index(position, (1 << 40, *grid_source))
    row, column = np.array(taps, np.int64).T[..., None]
    (row, left), (column, over) = np.divmod(y - row, stride[0]), np.divmod(x - column, stride[1])
    inside = (left == 0) & (row >= 0) & (row < grid[0])
    inside &= (over == 0) & (column >= 0) & (column < grid[1])
    return np.where(inside, (sample * grid[0] + row) * grid[1] + column, -1)
