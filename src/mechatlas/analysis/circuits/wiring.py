"""Computational graph between two sites whose activations are maps, from a few operations.

    trace_wiring    run a network once and read every operation between two sites
    Wiring          the graph: `run` repeats it, `routes` are its paths from source to target

Nothing is assumed of how a network is written: operations are watched below its modules. A wiring
is used only if it gives the same numbers as the network.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

from mechatlas.activations.branches import branches_of, ends_of, select
from mechatlas.activations.layouts import expect_patterns
from mechatlas.activations.tracing import Operation, same_numbers, trace
from mechatlas.activations.values import tensors_in
from mechatlas.base import Site, SiteError
from mechatlas.maths.arrays import Channels

MOST_ROUTES = 32
aten: Any = torch.ops.aten
SiteMap = Float[Tensor, "_sample _channel _y _x"]


class Masked(NamedTuple):
    """Maps of some samples, and the positions at which no feature counts as active.

    These are the rows that dictionaries are not trained on: of special tokens, padding and the
    first position of a causal model, whose row is often hundreds of times as long as the others.
    """

    x: SiteMap
    left_out: Bool[Tensor, "_sample _position"] | None


def masked(maps: Iterable[SiteMap | Masked]) -> Iterator[Masked]:
    """Maps with their masks; `None` where all positions count."""
    for each in maps:
        yield each if isinstance(each, Masked) else Masked(each, None)


"""Activations of a site's module for some samples."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Windowed:
    """Operation that reads a window of positions for each position."""

    function: Callable[[Tensor], Tensor]
    size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the operation."""
        return self.function(x)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Conv(Windowed):
    """A convolution."""

    weight: Float[Tensor, "n_out n_in h w"]
    groups: int


class MaxPool(Windowed):
    """Max pooling; its gate says which position of the window is the largest."""


class MeanPool(Windowed):
    """Average pooling."""


class Pad(Windowed):
    """Padding with a constant, by `padding` above and on the left."""


@dataclasses.dataclass(frozen=True, eq=False)
class Affine:
    """A scale and a shift of each channel, such as batch normalization in evaluation mode."""

    scale: Float[Tensor, " channel"]
    shift: Float[Tensor, " channel"]

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the operation."""
        return x * self.scale[:, None, None] + self.shift[:, None, None]


@dataclasses.dataclass(frozen=True, eq=False)
class Gate:
    """An elementwise activation function; its slope at a number is the gate there."""

    function: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the operation."""
        return self.function(x)


class Concatenate:
    """Concatenation of channels."""

    def __call__(self, *parts: Tensor) -> Tensor:
        """Apply the operation."""
        return torch.cat(parts, dim=1)


class Sum:
    """Sum of two maps."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Apply the operation."""
        return x + y


class Identity:
    """The identity."""

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the operation."""
        return x


MapOperation = Windowed | Affine | Gate | Concatenate | Sum | Identity


class Node(NamedTuple):
    """Operation of a wiring, and the nodes that its inputs come from."""

    operation: MapOperation
    inputs: tuple[int, ...]
    """Numbers of the nodes of its inputs; -1 is the source."""
    module: str
    """Innermost module that ran it."""
    channels: int
    """Channels of its output."""


class Route(NamedTuple):
    """Path from source to target through the nodes of a wiring."""

    name: str
    """Branch of the target that it ends in, or the module that no other route passes."""
    nodes: tuple[int, ...]
    """Numbers of its nodes, in the order in which they run."""
    slots: tuple[int, ...]
    """Input by which the route enters each node."""
    channels: slice
    """Channels of the target that it writes."""


@dataclasses.dataclass(frozen=True, eq=False)
class Wiring:
    """Computational graph from the source site's module to the target site's."""

    source: Site
    target: Site
    writes: slice
    """Channels of the source's module that belong to the source site."""
    reads: slice
    """Channels of the target's module that belong to the target site."""
    source_channels: int
    """Channels of the source's module, all of them."""
    nodes: tuple[Node, ...]
    routes: tuple[Route, ...]

    def run(self, x: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch channel2 h2 w2"]:
        """Activations of the target's module for activations `x` of the source's."""
        return self.values(x)[len(self.nodes) - 1]

    def values(self, x: Float[Tensor, "batch channel h w"]) -> dict[int, SiteMap]:
        """Output of every node, by its number; -1 is the source."""
        values = {-1: x}
        for number, node in enumerate(self.nodes):
            values[number] = node.operation(*(values[i] for i in node.inputs))
        return values


def trace_wiring(
    network: nn.Module, source: Site, target: Site, inputs: Shaped[Tensor, "_ ..."]
) -> Wiring:
    """Read the wiring between two sites from one run of the network.

    Args:
        network: In evaluation mode.
        source: The earlier site.
        target: The later one, with no site of parallel branches in between.
        inputs: A few samples.

    Raises:
        SiteError: The sites are not maps, are not consecutive, or an operation between them
            cannot be composed; its module is named.
    """
    traced = trace(network, inputs, [source, target], operations=True)
    before, after = traced.activations[source], traced.activations[target]
    first, last = traced.origin[source], traced.origin[target]
    for site, value in ((source, before), (target, after)):
        if value.ndim != 4:
            raise SiteError(
                f"Site {site} has activations of shape {tuple(value.shape)}; circuits need maps "
                "(sample, channel, y, x)."
            )
    expect_patterns(network, inputs, [source, target], ["bcpp"], "A circuit between maps")
    between = _between(traced.operations, first, last, source, target)
    number = {first: -1} | {raw: k for k, raw in enumerate(between)}
    nodes = tuple(
        Node(
            _map_operation(raw, source, target),
            tuple(number[i] for i in raw.parents),
            raw.module or type(network).__name__,
            raw.channels,
        )
        for raw in (traced.operations[k] for k in between)
    )
    _refuse_sites_between(nodes, source, target)
    reads = channel_range(select(network, target), after.shape[1], target)
    named = ends_of(branches_of(network, target.module, target.take), after.shape[1])
    branches = {name: slice(*ends) for name, ends in named.items()}
    wiring = Wiring(
        source,
        target,
        channel_range(select(network, source), before.shape[1], source),
        reads,
        before.shape[1],
        nodes,
        tuple(_routes(nodes, before.shape[1], reads, branches, source, target)),
    )
    with torch.no_grad():
        repeated = wiring.run(before)
    if not same_numbers(repeated, after):
        raise SiteError(
            f"What {target} computes from {source} could not be repeated outside "
            "the network: something is changed in place on the way."
        )
    return wiring


def channel_range(channels: Channels, width: int, site: Site) -> slice:
    """Slice with explicit ends.

    Args:
        channels: Channels of a branch.
        width: Number of channels of the whole module.
        site: Site of the branch, for the message.

    Raises:
        SiteError: The channels are not side by side.
    """
    ends = ends_of({"": channels}, width)
    if not ends:
        raise SiteError(
            f"A circuit reads branches whose channels lie side by side; those of {site} do not."
        )
    return slice(*ends[""])


def _between(
    raw: Sequence[Operation], first: int, last: int, source: Site, target: Site
) -> list[int]:
    """Nodes after `first` that `last` depends on, in order."""
    after = {first}
    for number in range(first + 1, last + 1):
        if any(p in after for p in raw[number].parents):
            after.add(number)
    if last not in after or last == first:
        raise SiteError(
            f"Site {target} does not follow site {source} in the network. Give the dictionaries "
            "in the order in which the network reaches their sites."
        )
    needed, waiting = {last}, [last]
    while waiting:
        for parent in raw[waiting.pop()].parents:
            if parent not in after:
                raise SiteError(
                    f"Site {target} also depends on what comes before {source}: module "
                    f"{raw[parent].module!r} is joined in on the way. Choose a source that "
                    "everything passes through."
                )
            if parent != first and parent not in needed:
                needed.add(parent)
                waiting.append(parent)
    return sorted(needed)


def _map_operation(raw: Operation, source: Site, target: Site) -> MapOperation:
    """Read a recorded operation as one of the kinds that can be composed."""
    function = raw.function
    if function in _READERS and (step := _READERS[function](raw)) is not None:
        return step
    name = str(function).removeprefix("aten.").partition(".")[0]
    raise SiteError(
        f"Module {raw.module!r} between {source} and {target} does {name!r}, which cannot be "
        "composed into a circuit; convolutions, batch normalization, rectifiers, pooling, "
        "padding, concatenation and sums can."
    )


def _two(value: Sequence[int]) -> tuple[int, int]:
    return (value[0], value[-1])


def _conv(raw: Operation) -> MapOperation | None:
    _, weight, bias, stride, padding, dilation, transposed, _, groups = raw.args
    if transposed or weight.ndim != 4:
        return None
    return Conv(
        function=lambda x: functional.conv2d(x, weight, bias, stride, padding, dilation, groups),
        weight=weight, groups=groups, size=_two(weight.shape[2:]), stride=_two(stride),
        padding=_two(padding), dilation=_two(dilation),
    )  # fmt: skip


def _padded(raw: Operation) -> MapOperation | None:
    frame = list(raw.args[1])
    value = raw.args[2] if len(raw.args) > 2 else raw.kwargs.get("value", 0)
    if len(frame) != 4:
        return None
    left, _, above, _ = frame
    return Pad(function=lambda x: functional.pad(x, frame, value=value), padding=(above, left))


def _max_pool(raw: Operation) -> MapOperation:
    defaults: tuple[Any, ...] = (None, None, [], [0], [1], False)
    _, size, stride, padding, dilation, ceil = *raw.args, *defaults[len(raw.args) :]
    stride = stride or size
    return MaxPool(
        function=lambda x: functional.max_pool2d(x, size, stride, padding, dilation, ceil),
        size=_two(size), stride=_two(stride), padding=_two(padding), dilation=_two(dilation),
    )  # fmt: skip


def _mean_pool(raw: Operation) -> MapOperation | None:
    defaults: tuple[Any, ...] = (None, None, [], [0], False, True, None)
    _, size, stride, padding, ceil, count, divisor = *raw.args, *defaults[len(raw.args) :]
    stride = stride or size
    if divisor is not None:
        return None
    return MeanPool(
        function=lambda x: functional.avg_pool2d(x, size, stride, padding, ceil, count),
        size=_two(size), stride=_two(stride), padding=_two(padding),
    )  # fmt: skip


def _batch_norm(raw: Operation) -> MapOperation | None:
    _, weight, bias, mean, variance, *rest = raw.args
    training = next((r for r in rest if isinstance(r, bool)), False)
    if training or mean is None:
        return None
    eps = [r for r in rest if isinstance(r, float)][-1]
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return Affine(scale.detach(), (shift if bias is None else shift + bias).detach())


def _concatenated(raw: Operation) -> MapOperation | None:
    dim = raw.args[1] if len(raw.args) > 1 else raw.kwargs.get("dim", 0)
    same = len(list(tensors_in(raw.args))) == len(raw.parents)
    return Concatenate() if dim in (1, -3) and same else None


def _added(raw: Operation) -> MapOperation | None:
    return Sum() if raw.kwargs.get("alpha", 1) == 1 and len(raw.parents) == 2 else None


def _clamped(raw: Operation) -> MapOperation | None:
    given = list(raw.args[1:])
    low, high = given if len(given) == 2 else (-1.0, 1.0)
    return Gate(lambda z: functional.hardtanh(z, low, high)) if low <= 0 <= high else None


_READERS: dict[Any, Callable[[Operation], MapOperation | None]] = {
    aten.convolution.default: _conv,
    aten.relu.default: lambda raw: Gate(torch.relu),
    aten.relu_.default: lambda raw: Gate(torch.relu),
    aten.hardtanh.default: _clamped,
    aten.hardtanh_.default: _clamped,
    aten.gelu.default: lambda raw: Gate(
        lambda z: functional.gelu(z, approximate=raw.kwargs.get("approximate", "none"))
    ),
    aten.silu.default: lambda raw: Gate(functional.silu),
    aten.silu_.default: lambda raw: Gate(functional.silu),
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.avg_pool2d.default: _mean_pool,
    aten.constant_pad_nd.default: _padded,
    aten.native_batch_norm.default: _batch_norm,
    aten.cudnn_batch_norm.default: _batch_norm,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.cat.default: _concatenated,
    aten.add.Tensor: _added,
    aten.add_.Tensor: _added,
    aten.clone.default: lambda raw: Identity(),
    aten.detach.default: lambda raw: Identity(),
    aten.alias.default: lambda raw: Identity(),
}
"""Readers of recorded operations, by their overload in torch."""


def _refuse_sites_between(nodes: Sequence[Node], source: Site, target: Site) -> None:
    """Refuse two sites with a third of parallel branches in between."""
    mixed: dict[int, str] = {}
    for number, node in enumerate(nodes):
        inside = next((mixed[i] for i in node.inputs if i in mixed), None)
        if isinstance(node.operation, Conv) and inside is not None:
            raise SiteError(
                f"Sites {source} and {target} are not consecutive: the branches of {inside!r} "
                "lie between them. Give a dictionary of that site too."
            )
        if isinstance(node.operation, Concatenate):
            mixed[number] = node.module
        elif inside is not None:
            mixed[number] = inside


def _routes(
    nodes: Sequence[Node],
    width: int,
    reads: slice,
    branches: dict[str, slice],
    source: Site,
    target: Site,
) -> list[Route]:
    """Paths from the source to channels that the target site reads."""
    ways = list(_ways(nodes, len(nodes) - 1))
    if len(ways) > MOST_ROUTES:
        raise SiteError(
            f"There are {len(ways)} ways from {source} to {target}, more than {MOST_ROUTES}: "
            "choose sites closer together."
        )
    routes = []
    for numbers, slots in ways:
        channels = (0, width)
        for number, slot in zip(numbers, slots, strict=True):
            channels = channels_after(channels, nodes, number, slot, width)
        if channels[0] < reads.stop and reads.start < channels[1]:
            routes.append(Route("", numbers, slots, slice(*channels)))
    names = _names(nodes, routes, branches)
    return [route._replace(name=name) for route, name in zip(routes, names, strict=True)]


def channels_after(
    channels: tuple[int, int], nodes: Sequence[Node], number: int, slot: int, width: int
) -> tuple[int, int]:
    """Channels that a route carries after a node: the first, and the one after the last.

    Args:
        channels: Channels before the node.
        nodes: All nodes of the wiring.
        number: Number of the node.
        slot: Input by which the route enters it.
        width: Channels of the source's module.
    """
    node = nodes[number]
    if isinstance(node.operation, Conv):
        return (0, node.channels)
    if isinstance(node.operation, Concatenate):
        before = sum(width if i < 0 else nodes[i].channels for i in node.inputs[:slot])
        return (channels[0] + before, channels[1] + before)
    return channels


def _ways(nodes: Sequence[Node], last: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for slot, origin in enumerate(nodes[last].inputs):
        if origin < 0:
            yield (last,), (slot,)
        else:
            for numbers, slots in _ways(nodes, origin):
                yield (*numbers, last), (*slots, slot)


def _names(nodes: Sequence[Node], routes: Sequence[Route], branches: dict[str, slice]) -> list[str]:
    names, convs = [], []
    for route in routes:
        low, high = route.channels.start, route.channels.stop
        inside = [name for name, s in branches.items() if s.start <= low and high <= s.stop]
        operations = [nodes[n] for n in route.nodes]
        convs.append([n.module for n in operations if isinstance(n.operation, Conv)] or ["direct"])
        names.append(inside[0] if inside else convs[-1][-1])
    for k, (first, *_) in enumerate(convs):
        if names.count(names[k]) > 1:
            names[k] = f"{names[k]} #{k} ({first})"
    return names
