"""Virtual weights by route: the operations between two sites, composed and applied to atoms.

    walk             a route, node by node, with the receptive field and channels before each
    compose_route    atoms, a route and its gates -> effect of each atom on the target's channels

Linear operations are composed exactly. A rectifier is replaced by its gate, the slope that it has
at a number, and a maximum by an indicator of the position it takes. Gates on data are recorded in
`recording.py`; `effects.py` measures the error of all this: that removing a feature moves gates.

A response has one entry for each tap: the source position `q * stride + tap` contributes to the
target position q. Padding is exact too, except that a position outside of a hidden map counts as
one inside where it has no gate; so at most the rim of a map is affected.

Source: Olah et al., Zoom In (2020), and Voss et al., Visualizing weights (2021), for circuits
read from composed weights.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mechatlas.analysis.circuits.wiring import (
    Affine,
    Conv,
    Gate,
    MaxPool,
    MeanPool,
    Node,
    Route,
    Windowed,
    Wiring,
    channels_after,
)


@runtime_checkable
class LinearDictionary(Protocol):
    """Interface of a dictionary with a linear encoder and decoder.

    `W_enc` is (d_in, n_latents), `W_dec` (n_latents, d_in).
    """

    d_in: int
    n_latents: int

    @property
    def W_enc(self) -> Float[Tensor, "d_in latent"]:  # noqa: N802 - the field's name
        """Encoder weights."""
        ...

    @property
    def W_dec(self) -> Float[Tensor, "latent d_in"]:  # noqa: N802
        """Decoder weights, a row for each latent."""
        ...

    def encode(self, x: Float[Tensor, "row d_in"]) -> Float[Tensor, "row latent"]:
        """Sparse code of each row."""
        ...


class RouteState(NamedTuple):
    """State of a route before one of its nodes."""

    number: int
    """Number of the next node."""
    taps: tuple[tuple[int, int], ...]
    """Source positions of the receptive field, relative to `position * stride`; y and x."""
    stride: tuple[int, int]
    channels: tuple[int, int]
    """Channels that the route carries: the first, and the one after the last."""


def walk(wiring: Wiring, route: Route) -> Iterator[tuple[RouteState, Node, int]]:
    """Nodes of a route, with the state before each and the input that the route enters by."""
    taps: tuple[tuple[int, int], ...] = ((0, 0),)
    stride, channels = (1, 1), (wiring.writes.start, wiring.writes.stop)
    for number, slot in zip(route.nodes, route.slots, strict=True):
        node = wiring.nodes[number]
        yield RouteState(number, taps, stride, channels), node, slot
        own = window(node)
        taps, stride = _combined(taps, stride, own), stride_after(stride, node)
        channels = channels_after(channels, wiring.nodes, number, slot, wiring.source_channels)


def end(wiring: Wiring, route: Route) -> tuple[tuple[tuple[int, int], ...], tuple[int, int]]:
    """Taps and stride of a whole route, to which it leads from the source."""
    *_, (last, node, _) = walk(wiring, route)
    return _combined(last.taps, last.stride, window(node)), stride_after(last.stride, node)


def stride_after(stride: tuple[int, int], node: Node) -> tuple[int, int]:
    """Stride after a node."""
    if not isinstance(node.operation, Windowed):
        return stride
    return (stride[0] * node.operation.stride[0], stride[1] * node.operation.stride[1])


def window(node: Node) -> list[tuple[int, int]]:
    """Positions that a node reads, relative to its position times its stride."""
    step = node.operation
    if not isinstance(step, Windowed):
        return [(0, 0)]
    return [
        (y * step.dilation[0] - step.padding[0], x * step.dilation[1] - step.padding[1])
        for y, x in np.ndindex(*step.size)
    ]


def tap_pairs(
    taps: tuple[tuple[int, int], ...], stride: tuple[int, int], own: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Taps through each position of a node's window, position by position.

    Args:
        taps: Taps before the node.
        stride: Stride before the node.
        own: Window of the node.
    """
    return [(a * stride[0] + y, b * stride[1] + x) for a, b in own for y, x in taps]


def _combined(
    taps: tuple[tuple[int, int], ...], stride: tuple[int, int], own: list[tuple[int, int]]
) -> tuple[tuple[int, int], ...]:
    return tuple(sorted(set(tap_pairs(taps, stride, own))))


Gates = Callable[[RouteState, Node, Tensor], Tensor | float]
"""Function that gives the gate of a node for values (tap, latent, channel) that arrive at it; for a
maximum, one for every pair of a position in its window and a tap, in that order."""


def open_gates(place: RouteState, node: Node, values: Shaped[Tensor, "..."]) -> Tensor | float:
    """Gates without data: rectifiers are the identity, and maxima are means.

    Args:
        place: State of the route before the node.
        node: The node.
        values: Values that arrive.
    """
    del place, values
    return 1.0 if isinstance(node.operation, Gate) else 1 / len(window(node))


@dataclasses.dataclass(frozen=True, eq=False)
class Response:
    """Effect of atoms on the channels of the target that a route writes."""

    taps: Int[np.ndarray, "tap 2"]
    """Source positions relative to the target's position times `stride`; y and x."""
    stride: tuple[int, int]
    channels: slice
    """Channels of the target's module that the route writes."""
    values: Float[Tensor, "entry latent channel"]
    """Effect of an activation of 1; an entry for each tap."""

    def entries(self) -> Iterator[tuple[Tensor, Tensor | float, Tensor | float]]:
        """Values, the sum of their weights at all taps, and the sum of squares."""
        for values in self.values:
            yield values, 1.0, 1.0

    def kernel(
        self, latents: Int[np.ndarray, " edge"], read: Float[Tensor, "edge channel"]
    ) -> Float[Tensor, "edge tap"]:
        """Kernels of some latents into encoder rows."""
        return torch.einsum("kec,ec->ek", self.values[:, latents], read)


@torch.no_grad()
def compose_route(
    wiring: Wiring, route: Route, atoms: Float[Tensor, "latent d"], gates: Gates = open_gates
) -> Response:
    """Compose the operations of a route, applied to atoms.

    Args:
        wiring: From the source site to the target site.
        route: One of its routes.
        atoms: Decoder rows of the source's dictionary, or some of them.
        gates: Gates of the nodes; by default all are open.
    """
    values = atoms[None]
    for place, node, _ in walk(wiring, route):
        step = node.operation
        if isinstance(step, Conv):
            values = _convolve(values, place, node, step)
        elif isinstance(step, Affine):
            values = values * step.scale[slice(*place.channels)].to(values)
        elif isinstance(step, Gate):
            values = values * gates(place, node, values)
        elif isinstance(step, MaxPool | MeanPool):
            every = values.expand(len(window(node)), *values.shape).flatten(0, 1)
            share = (gates if isinstance(step, MaxPool) else open_gates)(place, node, every)
            values = _gathered(every * share, place, node)
    taps, stride = end(wiring, route)
    return Response(np.array(taps), stride, route.channels, values)


def _gathered(every: Tensor, place: RouteState, node: Node) -> Tensor:
    """Add up values that arrive at the same tap."""
    pairs = tap_pairs(place.taps, place.stride, window(node))
    order = {tap: k for k, tap in enumerate(sorted(set(pairs)))}
    if list(order) == pairs:
        return every
    if len(order) == len(pairs):
        index = torch.tensor([order[tap] for tap in pairs]).argsort()
        return every[index.to(every.device)]
    index = torch.tensor([order[tap] for tap in pairs], device=every.device)
    return every.new_zeros(len(order), *every.shape[1:]).index_add_(0, index, every)


def _convolve(values: Tensor, place: RouteState, node: Node, step: Conv) -> Tensor:
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
