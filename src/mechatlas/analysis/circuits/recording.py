"""What each feature of a site met on its way to the next, on data.

    record      run some inputs once: codes at both sites, and what each feature met on its way
    MeanGates   gates as means over all places, and for each feature with the gates it met

On data, a route is composed for activations of a feature, with the very gates that they meet. The
mean of what comes of it, weighed with how active the feature is, is the mean derivative of the
route; gates that are averaged apart lose how those of one route go together. Of the activations of
a feature in one sample only some are followed, drawn by how large they are, so that the mean is
right. A feature that is rarely active is drawn towards what it would add with gates that are means
over all places.
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

from mechatlas.activations.sites import channels_last
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
from mechatlas.analysis.circuits.transformer_layer import TransformerLayer
from mechatlas.analysis.circuits.wiring import Gate, MaxPool, Node, Route, Wiring
from mechatlas.base import InputError

PRIOR = 16.0
"""Activations of a feature that gates averaged over all places count for in its own mean."""
FOLLOWED = 8
"""Activations of a feature in a sample that are followed: more of one sample are much alike."""
CODE_BYTES = 64 << 20
EVENT_BYTES = 64 << 20
"""Memory for activations that are followed together."""


@dataclasses.dataclass(frozen=True, eq=False)
class GatedMean:
    """What features added by one route with the gates they met, weighed with their activation."""

    sums: Float[np.ndarray, "tap latent channel"]
    weights: Float[np.ndarray, "tap latent"]
    """Activations whose tap lies inside the target's map."""


@dataclasses.dataclass(frozen=True, eq=False)
class MeanGates:
    """What gates did on data."""

    means: dict[RouteState, Float[Tensor, "sign own 1 channel"]]
    """Means over all places, for each place of a window, as in `OpenGates`."""
    prior: Float[np.ndarray, " latent"]
    """Activation that the means over all places count for."""
    gated_means: Sequence[GatedMean]
    """What features added with the gates they met, route by route; empty to ignore it."""

    def __call__(self, place: RouteState, node: Node, values: Tensor) -> Tensor:
        """The means, for all latents alike."""
        del node
        return by_sign(self.means[place].repeat_interleave(len(place.taps), dim=1), values)

    def shared(self) -> "MeanGates":
        """The same for all features: the means over all places."""
        return dataclasses.replace(self, gated_means=())

    def drawn(self, shared: Sequence[Response]) -> list[Response]:
        """What each feature added on average, drawn towards what all add with mean gates."""
        found = list(shared)
        for k, gated_means in enumerate(self.gated_means):
            like = found[k].values
            weights, prior = (
                torch.from_numpy(x).to(like) for x in (gated_means.weights, self.prior)
            )
            whole = (weights + prior)[..., None]
            mean = (torch.from_numpy(gated_means.sums).to(like) + prior[:, None] * like) / whole
            found[k] = dataclasses.replace(found[k], values=torch.where(whole > 0, mean, like))
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Recording:
    """Some inputs, seen at both sites."""

    codes_a: sparse.csr_matrix
    """(position, latent), positions ordered by sample, y and x."""
    codes_b: sparse.csr_matrix
    grid_a: tuple[int, int]
    grid_b: tuple[int, int]
    n_samples: int
    gates: MeanGates

    def around(
        self, on: sparse.csr_matrix, response: Response, entry: int
    ) -> Float[np.ndarray, "target source"]:
        """How active each source is at a tap of where each target is active, summed."""
        y, x = response.taps[entry].tolist()
        here, there = seen(self.n_samples, self.grid_b, self.grid_a, response.stride, (y, x))
        return (on[here].T.tocsr() @ self.codes_a[there]).toarray()


@torch.no_grad()
def record(
    wiring: Wiring,
    a: LinearDictionary,
    b: LinearDictionary,
    maps: Iterable[Tensor],
    *,
    seed: int = 0,
) -> Recording:
    """Codes at both sites, mean gates, and what each feature adds with the gates it meets.

    Args:
        wiring: From the site of `a` to that of `b`.
        a: Dictionary of the source.
        b: Dictionary of the target.
        maps: Activations of the source's module (sample, channel, y, x), batch by batch.
        seed: Draws which activations are followed.

    Raises:
        InputError: There are no samples, or a dictionary is not as wide as its site.
    """
    check_width(wiring, a, b)
    codes_a, codes_b, n_samples, grids = [], [], 0, ((1, 1), (1, 1))
    sums: dict[RouteState, Tensor] = {}
    gated_means = [_no_gated_mean(wiring, route, a.n_latents) for route in wiring.routes]
    random = np.random.default_rng([seed, 7])
    for x in maps:
        values = wiring.values(x)
        grids = _sides(x), _sides(values[-1])
        codes_a.append(encode(a, x[:, wiring.writes]))
        codes_b.append(encode(b, values[-1][:, wiring.reads]))
        opened = _open_gates(wiring, values, x)
        for place, one in opened.items():
            total = one.rows.sum(dim=2, keepdim=True, dtype=x.dtype) / (one.grid[0] * one.grid[1])
            sums[place] = sums[place] + total if place in sums else total
        n_samples += len(x)
        events = sample_activations(codes_a[-1], grids[0], random)
        for route, one in zip(wiring.routes, gated_means, strict=True):
            _add_gated_means(one, wiring, route, a, events, opened, grids)
    if not n_samples:
        raise InputError("There are no samples to average gates over.")
    whole = stacked(codes_a)
    means = {place: total / n_samples for place, total in sums.items()}
    gates = MeanGates(means, prior_of(whole, PRIOR).astype(np.float32), gated_means)
    return Recording(whole, stacked(codes_b), *grids, n_samples, gates)


def check_width(
    wiring: Wiring | TransformerLayer, a: LinearDictionary, b: LinearDictionary
) -> None:
    """Refuse dictionaries of other sites.

    Raises:
        InputError: One is not as wide as its site.
    """
    ends = ((a, wiring.source, wiring.writes), (b, wiring.target, wiring.reads))
    for dictionary, site, part in ends:
        width = part.stop - part.start
        if dictionary.d_in != width or dictionary.W_dec.shape[1] != width:
            raise InputError(
                f"Site {site} has {width} channels, its dictionary reads {dictionary.d_in} and "
                f"writes {dictionary.W_dec.shape[1]}."
            )


def _sides(x: Tensor) -> tuple[int, int]:
    return (x.shape[2], x.shape[3])


def encode(dictionary: LinearDictionary, x: Float[Tensor, "n channel y x"]) -> sparse.csr_matrix:
    """Codes of every position, ordered by sample, y and x."""
    rows = channels_last(x).reshape(-1, x.shape[1])
    size = max(1, CODE_BYTES // (4 * dictionary.n_latents))
    parts = [
        sparse.csr_matrix(dictionary.encode(part).detach().float().cpu().numpy())
        for part in rows.split(size)
    ]
    return stacked(parts)


def stacked(parts: list[sparse.csr_matrix]) -> sparse.csr_matrix:
    """Codes of one batch after the other."""
    return sparse.csr_matrix(sparse.vstack(parts))


def n_columns(codes: sparse.csr_matrix) -> int:
    """Number of latents."""
    return int(codes.get_shape()[1])


def prior_of(codes: sparse.csr_matrix, activations: float) -> Float[np.ndarray, " latent"]:
    """What the mean over all places weighs in a latent's own: some of its activations."""
    count = np.bincount(codes.indices, minlength=n_columns(codes))
    return activations * np.asarray(codes.sum(axis=0)).ravel() / np.maximum(count, 1)


def seen(
    n_samples: int,
    grid: tuple[int, int],
    grid_source: tuple[int, int],
    stride: tuple[int, int],
    tap: tuple[int, int],
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Positions of a grid whose tap lies inside the source's map, and those source positions."""
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


def _open_gates(
    wiring: Wiring, values: dict[int, Tensor], x: Tensor
) -> dict[RouteState, "OpenGates"]:
    """Every gate at every position of its map, in one batch."""
    found = {}
    for route in wiring.routes:
        for place, node, slot in walk(wiring, route):
            given = wiring.input_of(place.number, values, x, slot)[:, slice(*place.channels)]
            if isinstance(node.operation, Gate):
                shares = slope(node.operation, given)[None, None]
            elif isinstance(node.operation, MaxPool):
                shares = largest(node.operation, given)
            else:
                continue
            rows = shares.movedim(3, -1).flatten(2, 4)
            found[place] = OpenGates(functional.pad(rows, (0, 0, 0, 1)), _sides(shares[0, 0]))
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class OpenGates:
    """How far a gate is open at each position of its map, for each place of a window."""

    rows: Shaped[Tensor, "sign own position channel"]
    """For what is positive, and for what is negative; the last position is outside, and shut."""
    grid: tuple[int, int]

    def at(self, index: Int[np.ndarray, "own_and_tap event"], taps: int, values: Tensor) -> Tensor:
        """Gates that events meet (own and tap, event, channel)."""
        own = torch.arange(len(index), device=self.rows.device)[:, None] // taps
        where = torch.from_numpy(index).to(self.rows.device)
        return by_sign(self.rows[:, own, where], values)


def by_sign(gates: Shaped[Tensor, "sign own_and_tap latent channel"], values: Tensor) -> Tensor:
    """The gates for values that are positive or negative."""
    if len(gates) == 1:
        return gates[0]
    if gates.dtype == torch.bool:  # the same, and much faster
        return gates[0] | (gates[1] & (values < 0))
    return torch.where(values < 0, gates[1], gates[0])


def slope(gate: Gate, z: Tensor) -> Tensor:
    """Derivative of what is let through, at each number."""
    with torch.enable_grad():
        at = z.detach().requires_grad_()
        (found,) = torch.autograd.grad(gate(at).sum(), at)
    return found


def largest(pool: MaxPool, x: Tensor) -> Bool[Tensor, "sign own sample channel y x"]:
    """For each place of a window, whether it is the only largest, and whether it is one of them.

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
    """Activations that are followed."""

    position: Int[np.ndarray, " event"]
    latent: Int[np.ndarray, " event"]
    weight: Float[np.ndarray, " event"]


def sample_activations(
    codes: sparse.csr_matrix, grid: tuple[int, int], random: np.random.Generator
) -> SampledActivations:
    """Some activations of each feature in each sample, with what they stand for.

    The activations of a feature in a sample are laid end to end, and those are drawn that evenly
    spaced points fall on: each counts, on average, as much as it is large.
    """
    every = codes.tocoo()
    group = every.row.astype(np.int64) // (grid[0] * grid[1]) * n_columns(codes) + every.col
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
    opened: dict[RouteState, OpenGates],
    grids: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    """Add activations of one batch, with the gates that they meet along a route."""
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
            one = opened[place]
            pairs = tap_pairs(place.taps, place.stride, window(node))
            index = landing(at, grids[0], one.grid, stride_after(place.stride, node), pairs)
            return one.at(index, len(place.taps), values)

        found = compose_route(wiring, route, atoms[torch.from_numpy(latent)], gates)
        inside = landing(position, grids[0], grids[1], found.stride, found.taps.tolist()) >= 0
        rows, which = np.unique(latent, return_inverse=True)
        shape = (len(rows), len(latent))
        for k, values in enumerate(found.values.float().cpu().numpy()):
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
    """Positions of a grid that have a source position at each tap; -1 if there is none."""
    sample, y, x = np.unravel_index(position, (1 << 40, *grid_source))
    row, column = np.array(taps, np.int64).T[..., None]
    (row, left), (column, over) = np.divmod(y - row, stride[0]), np.divmod(x - column, stride[1])
    inside = (left == 0) & (row >= 0) & (row < grid[0])
    inside &= (over == 0) & (column >= 0) & (column < grid[1])
    return np.where(inside, (sample * grid[0] + row) * grid[1] + column, -1)
