"""What a feature of one site writes into the next, by composing the steps between them.

    record      run some inputs once: codes at both sites, and how far every gate is open
    respond     atoms, a route and its gates -> what each atom adds to the target's channels

A step that is linear is composed exactly. A rectifier is replaced by its gate, the share of a
number that it lets through, and a maximum by the chance of each place of its window to be the
largest. Both are means over data: for each feature over the places where it is active, weighed
with how active it is (`by_feature`), or the same mean for all features. That is the only
approximation; `effects.py` measures what it costs.

A response has one entry for each tap: the activation at target position q gets something from
the source position `q * stride + tap`. Padding is exact too, except that a position of a hidden
map that lies outside of it is taken for one inside; so at most the rim of a map is affected.

Source: Olah et al., Zoom In (2020), and Voss et al., Visualizing weights (2021), for circuits
read from composed weights.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor
from torch.nn import functional

from mechatlas.activations.layer import Layer
from mechatlas.activations.sites import channels_last
from mechatlas.activations.wiring import (
    Affine,
    Concatenate,
    Conv,
    Gate,
    MaxPool,
    MeanPool,
    Node,
    Pad,
    Route,
    Wiring,
)
from mechatlas.base import InputError

PRIOR = 32.0
"""Activations of a feature that the mean over all places counts for in its own mean gate. With 4
rare features had gates so noisy that one gate for all agreed better with ablations."""
CODE_BYTES = 64 << 20


@runtime_checkable
class Coder(Protocol):
    """A dictionary whose latents are read and written linearly.

    `W_enc` is (d_in, n_latents), `W_dec` (n_latents, d_in).
    """

    d_in: int
    n_latents: int

    @property
    def W_enc(self) -> Tensor:  # noqa: N802 - the field's name
        """Encoder weights."""
        ...

    @property
    def W_dec(self) -> Tensor:  # noqa: N802
        """Atoms."""
        ...

    def encode(self, x: Tensor) -> Tensor:
        """Sparse code of each row."""
        ...


class Place(NamedTuple):
    """Where a route is after some of its steps."""

    number: int
    """The next node."""
    taps: tuple[tuple[int, int], ...]
    """Source positions that are seen, relative to `position * stride`; y and x."""
    stride: tuple[int, int]
    channels: tuple[int, int]
    """First channel and the one after the last, of those that the route carries."""


def walk(wiring: Wiring, route: Route) -> Iterator[tuple[Place, Node, int]]:
    """Every step of a route, with what is known before it is taken, and the slot it enters by."""
    taps: tuple[tuple[int, int], ...] = ((0, 0),)
    stride, channels = (1, 1), (wiring.writes.start, wiring.writes.stop)
    for number, slot in zip(route.nodes, route.slots, strict=True):
        node = wiring.nodes[number]
        yield Place(number, taps, stride, channels), node, slot
        own = window(node)
        taps = _combined(taps, stride, own)
        step = node.step
        if isinstance(step, Conv | MaxPool | MeanPool):
            stride = (stride[0] * step.stride[0], stride[1] * step.stride[1])
        if isinstance(step, Conv):
            channels = (0, node.channels)
        if isinstance(step, Concatenate):
            before = sum(
                wiring.source_channels if i < 0 else wiring.nodes[i].channels
                for i in node.inputs[:slot]
            )
            channels = (channels[0] + before, channels[1] + before)


def end(wiring: Wiring, route: Route) -> tuple[tuple[tuple[int, int], ...], tuple[int, int]]:
    """Taps and stride of a whole route."""
    *_, (last, node, _) = walk(wiring, route)
    stride = last.stride
    if isinstance(node.step, Conv | MaxPool | MeanPool):
        stride = (stride[0] * node.step.stride[0], stride[1] * node.step.stride[1])
    return _combined(last.taps, last.stride, window(node)), stride


def window(node: Node) -> list[tuple[int, int]]:
    """Positions that a step reads, relative to its position times its stride."""
    step = node.step
    if isinstance(step, Conv):
        size, dilation, padding = step.weight.shape[2:], step.dilation, step.padding
    elif isinstance(step, MaxPool):
        size, dilation, padding = step.size, step.dilation, step.padding
    elif isinstance(step, MeanPool):
        size, dilation, padding = step.size, (1, 1), step.padding
    elif isinstance(step, Pad):
        left, _, above, _ = step.frame
        return [(-above, -left)]
    else:
        return [(0, 0)]
    return [
        (y * dilation[0] - padding[0], x * dilation[1] - padding[1])
        for y in range(size[0])
        for x in range(size[1])
    ]


def _all_pairs(
    taps: tuple[tuple[int, int], ...], stride: tuple[int, int], own: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    return [(a * stride[0] + y, b * stride[1] + x) for a, b in own for y, x in taps]


def _combined(
    taps: tuple[tuple[int, int], ...], stride: tuple[int, int], own: list[tuple[int, int]]
) -> tuple[tuple[int, int], ...]:
    return tuple(sorted(set(_all_pairs(taps, stride, own))))


Gates = Callable[[Place, Node, slice], Tensor | float]
"""How far a step is open for some latents: (tap, latent or 1, channel) for a rectifier; for a
maximum, so for every pair of a place in its window and a tap, in that order."""


def all_open(place: Place, node: Node, latents: slice) -> Tensor | float:
    """Rectifiers let everything through, and maxima are means."""
    del place, latents
    return 1 / len(window(node)) if isinstance(node.step, MaxPool) else 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Response:
    """What atoms add to the channels of the target that a route writes."""

    taps: Int[np.ndarray, "tap 2"]
    """Source positions relative to the target's position times `stride`; y and x."""
    stride: tuple[int, int]
    channels: slice
    """Channels of the target's module."""
    values: Float[Tensor, "entry latent channel"]
    """For an activation of 1; an entry for each tap."""

    def entries(self) -> Iterator[tuple[Tensor, Tensor | float, Tensor | float]]:
        """Values, the sum of what they count for at all taps, and the sum of squares."""
        for values in self.values:
            yield values, 1.0, 1.0

    def kernel(
        self, latents: Int[np.ndarray, " edge"], read: Float[Tensor, "edge channel"]
    ) -> Float[Tensor, "edge tap"]:
        """The kernels of some latents into what is read."""
        return torch.einsum("kec,ec->ek", self.values[:, latents], read)


@torch.no_grad()
def respond(
    wiring: Wiring,
    route: Route,
    atoms: Float[Tensor, "latent d"],
    gates: Gates = all_open,
    *,
    latents: slice = slice(None),
) -> Response:
    """Compose the steps of a route, applied to atoms.

    Args:
        wiring: From the source site to the target site.
        route: One of its routes.
        atoms: Decoder rows of the source's dictionary, or some of them.
        gates: How far every gate is open.
        latents: Which latents the atoms are, for gates that depend on it.
    """
    values = atoms[None]
    for place, node, _ in walk(wiring, route):
        step = node.step
        if isinstance(step, Conv):
            values = _convolve(values, place, node, step)
        elif isinstance(step, Affine):
            values = values * step.scale[slice(*place.channels)].to(values)
        elif isinstance(step, Gate):
            values = values * gates(place, node, latents)
        elif isinstance(step, MaxPool | MeanPool):
            every = values.repeat(len(window(node)), 1, 1)
            share = gates(place, node, latents) if isinstance(step, MaxPool) else None
            weighed = every * (1 / len(window(node)) if share is None else share)
            values = _gathered(weighed, place, node)
    taps, stride = end(wiring, route)
    return Response(np.array(taps), stride, route.channels, values)


def _gathered(every: Tensor, place: Place, node: Node) -> Tensor:
    """Add up what arrives at the same tap by several ways."""
    pairs = _all_pairs(place.taps, place.stride, window(node))
    order = {tap: k for k, tap in enumerate(sorted(set(pairs)))}
    if len(order) == len(pairs):
        index = torch.tensor([order[tap] for tap in pairs]).argsort()
        return every[index.to(every.device)]
    index = torch.tensor([order[tap] for tap in pairs], device=every.device)
    return every.new_zeros(len(order), *every.shape[1:]).index_add_(0, index, every)


def _convolve(values: Tensor, place: Place, node: Node, step: Conv) -> Tensor:
    weight = step.weight.to(values)
    if step.groups == 1:
        weight = weight[:, slice(*place.channels)]
        parts = [values @ weight[:, :, y, x].T for y, x in np.ndindex(*weight.shape[2:])]
    else:
        n_in = weight.shape[1] * step.groups
        whole = values.new_zeros(*values.shape[:2], n_in)
        whole[..., slice(*place.channels)] = values
        apart = whole.unflatten(-1, (step.groups, -1))
        kernel = weight.unflatten(0, (step.groups, -1))
        parts = [
            torch.einsum("kngi,goi->kngo", apart, kernel[..., y, x]).flatten(2)
            for y, x in np.ndindex(*weight.shape[2:])
        ]
    return _gathered(torch.cat(parts), place, node)


@dataclasses.dataclass(frozen=True, eq=False)
class MeanGates:
    """Gates that are means over data."""

    means: dict[Place, Float[Tensor, "entry latents_and_all channel"]]
    """For each latent, and last over all places."""
    by_feature: bool

    def __call__(self, place: Place, node: Node, latents: slice) -> Tensor:
        """The gates of some latents, or of all alike."""
        del node
        every = self.means[place]
        return every[:, :-1][:, latents] if self.by_feature else every[:, -1:]

    def shared(self) -> "MeanGates":
        """The same for all features: the mean over all places."""
        return dataclasses.replace(self, by_feature=False)


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
    wiring: Wiring, a: Coder, b: Coder, maps: Iterable[Tensor], *, by_feature: bool = True
) -> Recording:
    """Codes at both sites and mean gates.

    Args:
        wiring: From the site of `a` to that of `b`.
        a: Dictionary of the source.
        b: Dictionary of the target.
        maps: Activations of the source's module (sample, channel, y, x), batch by batch.
        by_feature: A gate is a mean over the places where a feature is active.

    Raises:
        InputError: There are no samples, or a dictionary is not as wide as its site.
    """
    check_width(wiring, a, b)
    places = {
        place: (node, slot)
        for route in wiring.routes
        for place, node, slot in walk(wiring, route)
        if isinstance(node.step, Gate | MaxPool)
    }
    sums: dict[Place, np.ndarray] = {}
    weights: dict[Place, np.ndarray] = {}
    codes_a, codes_b, n_samples, grids = [], [], 0, ((1, 1), (1, 1))
    for x in maps:
        values = wiring.values(x)
        n_samples += len(x)
        grids = _sides(x), _sides(values[-1])
        codes_a.append(encode(a, x[:, wiring.writes]))
        codes_b.append(encode(b, values[-1][:, wiring.reads]))
        ones = sparse.csr_matrix(np.ones((codes_a[-1].get_shape()[0], 1), np.float32))
        active = sparse.csr_matrix(sparse.hstack([codes_a[-1], ones]))
        for place, (node, slot) in places.items():
            given = wiring.input_of(place.number, values, x, slot)
            _add(sums, weights, place, node, given[:, slice(*place.channels)], active, grids[0])
    if not n_samples:
        raise InputError("There are no samples to average gates over.")
    whole = stacked(codes_a)
    prior = np.append(prior_of(whole, PRIOR), 0.0).astype(np.float32)
    means = {place: _means(sums[place], weights[place], prior, maps_like=a) for place in places}
    gates = MeanGates(means, by_feature)
    return Recording(whole, stacked(codes_b), *grids, n_samples, gates)


def check_width(wiring: Wiring | Layer, a: Coder, b: Coder) -> None:
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


def encode(dictionary: Coder, x: Float[Tensor, "n channel y x"]) -> sparse.csr_matrix:
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


def _add(
    sums: dict[Place, np.ndarray],
    weights: dict[Place, np.ndarray],
    place: Place,
    node: Node,
    given: Tensor,
    active: sparse.csr_matrix,
    grid_source: tuple[int, int],
) -> None:
    """Add the gates of one batch, at every tap, weighed with every latent's activation there."""
    if isinstance(node.step, Gate):
        opened = [((0, 0), _open(node.step, given))]
        stride = place.stride
    else:
        assert isinstance(node.step, MaxPool)
        opened = list(_largest(node.step, given))
        stride = tuple(s * t for s, t in zip(place.stride, node.step.stride, strict=True))
    grid = _sides(opened[0][1])
    entry = 0
    for own, share in opened:
        rows = channels_last(share).reshape(-1, share.shape[1]).float().cpu().numpy()
        for tap in place.taps:
            at = (own[0] * place.stride[0] + tap[0], own[1] * place.stride[1] + tap[1])
            here, there = seen(len(given), grid, grid_source, (stride[0], stride[1]), at)
            codes = active[there]
            if place not in sums:
                n = len(opened) * len(place.taps)
                sums[place] = np.zeros((n, n_columns(active), rows.shape[1]), np.float32)
                weights[place] = np.zeros((n, n_columns(active)), np.float32)
            sums[place][entry] += codes.T @ rows[here]
            weights[place][entry] += np.asarray(codes.sum(axis=0)).ravel()
            entry += 1


def _open(gate: Gate, z: Tensor) -> Tensor:
    """The share of each number that is let through."""
    return torch.where(z == 0, 0.0, gate(z) / torch.where(z == 0, 1.0, z))


def _largest(pool: MaxPool, x: Tensor) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """For each place of the window, where it holds the largest number."""
    index = functional.max_pool2d(
        x, pool.size, pool.stride, pool.padding, pool.dilation, pool.ceil, return_indices=True
    )[1]
    height, width = index.shape[2:]
    y = index // x.shape[3] - (torch.arange(height) * pool.stride[0])[:, None].to(index)
    x_ = index % x.shape[3] - (torch.arange(width) * pool.stride[1]).to(index)
    for row, column in np.ndindex(*pool.size):
        own = (
            row * pool.dilation[0] - pool.padding[0],
            column * pool.dilation[1] - pool.padding[1],
        )
        yield own, ((y == own[0]) & (x_ == own[1])).float()


def _means(sums: np.ndarray, weights: np.ndarray, prior: np.ndarray, *, maps_like: Coder) -> Tensor:
    """Means of each latent, drawn towards the mean over all places by a few activations."""
    every = sums[:, -1:] / np.maximum(weights[:, -1:, None], 1e-12)
    weight = weights[..., None] + prior[:, None]
    means = np.where(weight > 0, (sums + prior[:, None] * every) / np.maximum(weight, 1e-30), every)
    return torch.from_numpy(means.astype(np.float32)).to(maps_like.W_dec)


Maps = Callable[[], Iterable[Tensor]]
"""Activations of a source's module, batch by batch, as often as they are asked for."""
