"""How one site of a network is computed from another, as a graph of a few kinds of steps.

    trace     run a network once and note every operation between two sites
    Wiring    the steps in order: `run` repeats them, `routes` are the ways through them

Nothing is assumed of how a network is written: what it does is watched, operation by operation,
below its modules. A wiring is used only if it gives the very numbers the network gave.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from mechatlas.activations.sites import branches_of, edited, select
from mechatlas.base import Site, SiteError

MOST_ROUTES = 32
aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, eq=False)
class Conv:
    """A convolution."""

    weight: Float[Tensor, "n_out n_in h w"]
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def __call__(self, x: Tensor) -> Tensor:
        """Run it."""
        return functional.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Affine:
    """A scale and a shift of each channel, such as batch normalisation after training."""

    scale: Float[Tensor, " channel"]
    shift: Float[Tensor, " channel"]

    def __call__(self, x: Tensor) -> Tensor:
        """Run it."""
        return x * self.scale[:, None, None] + self.shift[:, None, None]


@dataclasses.dataclass(frozen=True, eq=False)
class Gate:
    """A function of each number; what it lets through is `function(z) / z`, its gate."""

    function: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """Run it."""
        return self.function(x)


@dataclasses.dataclass(frozen=True, eq=False)
class MaxPool:
    """The largest of a window; its gate says which position of the window was let through."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil: bool

    def __call__(self, x: Tensor) -> Tensor:
        """Run it."""
        return functional.max_pool2d(
            x, self.size, self.stride, self.padding, self.dilation, self.ceil
        )


@dataclasses.dataclass(frozen=True, eq=False)
class MeanPool:
    """The mean of a window."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    ceil: bool
    count_padding: bool

    def __call__(self, x: Tensor) -> Tensor:
        """Run it."""
        return functional.avg_pool2d(
            x, self.size, self.stride, self.padding, self.ceil, self.count_padding
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Pad:
    """A frame of a constant around a map: left, right, above, below."""

    frame: tuple[int, int, int, int]
    value: float

    def __call__(self, x: Tensor) -> Tensor:
        """Run it."""
        return functional.pad(x, self.frame, value=self.value)


@dataclasses.dataclass(frozen=True, eq=False)
class Concatenate:
    """Channels side by side."""

    def __call__(self, *parts: Tensor) -> Tensor:
        """Run it."""
        return torch.cat(parts, dim=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Sum:
    """Two maps added."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Run it."""
        return x + y


@dataclasses.dataclass(frozen=True, eq=False)
class Identity:
    """Nothing changes."""

    def __call__(self, x: Tensor) -> Tensor:
        """Run it."""
        return x


Operation = Conv | Affine | Gate | MaxPool | MeanPool | Pad | Concatenate | Sum | Identity


class Node(NamedTuple):
    """A step, and where its inputs come from."""

    step: Operation
    inputs: tuple[int, ...]
    """Numbers of nodes; -1 is the source."""
    module: str
    """The innermost module that took the step."""
    channels: int
    """Channels of what it gives."""


class Route(NamedTuple):
    """One way from source to target."""

    name: str
    """The branch of the target that it ends in, or the module that tells it from the others."""
    nodes: tuple[int, ...]
    """In the order in which they are run."""
    slots: tuple[int, ...]
    """For each node, which of its inputs the route comes in by."""
    channels: slice
    """Channels of the target that it writes."""


@dataclasses.dataclass(frozen=True, eq=False)
class Wiring:
    """The steps from the source site's module to the target site's."""

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
        """What the target's module gives if the source's gives `x`."""
        return self.values(x)[-1]

    def values(self, x: Float[Tensor, "batch channel h w"]) -> dict[int, Tensor]:
        """What every node gives, by its number; under -1 the target's, and no source."""
        found = {-1: x}
        for number, node in enumerate(self.nodes):
            found[number] = node.step(*(found[i] for i in node.inputs))
        found[-1] = found[len(self.nodes) - 1] if self.nodes else x
        return found

    def input_of(self, number: int, values: dict[int, Tensor], x: Tensor, slot: int = 0) -> Tensor:
        """What a node was given, from `values` and the source's activations."""
        origin = self.nodes[number].inputs[slot]
        return x if origin < 0 else values[origin]


def trace_wiring(network: nn.Module, source: Site, target: Site, inputs: Tensor) -> Wiring:
    """The wiring between two sites.

    Args:
        network: In evaluation mode.
        source: The earlier site.
        target: The later one, with no site of parallel branches in between.
        inputs: A few samples.

    Raises:
        SiteError: The sites are not maps, are not consecutive, or a step between them is of
            another kind; the module that takes it is named.
    """
    whole_source, whole_target = (dataclasses.replace(s, branch=None) for s in (source, target))
    with torch.no_grad(), _Recorder(network) as recorder:
        ends = recorder.run(inputs, whole_source, whole_target)
    (first, before), (last, after) = ends
    for site, value in ((source, before), (target, after)):
        if value.ndim != 4:
            raise SiteError(
                f"Site {site} has activations of shape {tuple(value.shape)}; circuits need maps "
                "(sample, channel, y, x)."
            )
    between = _between(recorder.raw, first, last, source, target)
    number = {first: -1} | {raw: k for k, raw in enumerate(between)}
    nodes = tuple(
        Node(
            _step(recorder.raw[raw], source, target),
            tuple(number[i] for i in recorder.raw[raw].parents),
            recorder.raw[raw].module,
            recorder.raw[raw].channels,
        )
        for raw in between
    )
    _refuse_sites_between(nodes, source, target)
    reads = _range(select(network, target), after.shape[1])
    branches = branches_of(network, target.module, target.take)
    wiring = Wiring(
        source,
        target,
        _range(select(network, source), before.shape[1]),
        reads,
        before.shape[1],
        nodes,
        tuple(_routes(nodes, before.shape[1], reads, branches, source, target)),
    )
    _check(wiring, before, after)
    return wiring


def _range(channels: slice, width: int) -> slice:
    return slice(*channels.indices(width)[:2])


def _check(wiring: Wiring, before: Tensor, after: Tensor) -> None:
    with torch.no_grad():
        again = wiring.run(before)
    tolerance = 256 * torch.finfo(after.dtype).eps * float(after.abs().max())
    if again.shape != after.shape or float((again - after).abs().max()) > tolerance:
        raise SiteError(
            f"What {wiring.target} computes from {wiring.source} could not be repeated outside "
            "the network: something is changed in place on the way."
        )


class _Raw(NamedTuple):
    function: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    parents: tuple[int, ...]
    module: str
    channels: int


class _Done(Exception):  # noqa: N818 - a signal, never leaves this module
    pass


class _Recorder(TorchDispatchMode):
    """Notes every operation whose result depends on the network's input."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.raw = network, [_Raw(None, (), {}, (), "the network's input", 0)]
        self.known: dict[int, int] = {}
        self.alive: list[Tensor] = []  # an id is only good as long as its tensor lives
        self.stack: list[str] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip the compiler, torch would import all of it, which takes seconds

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        parents = tuple(self.known[id(a)] for a in _tensors((args, kwargs)) if id(a) in self.known)
        out = func(*args, **kwargs)
        if parents:
            for k, tensor in enumerate(_tensors(out)):
                module = self.stack[-1] if self.stack else type(self.network).__name__
                kept = func if k == 0 else f"output {k} of {func}"
                width = tensor.shape[1] if tensor.ndim > 1 else 0
                self.raw.append(_Raw(kept, args, kwargs, parents, module, width))
                self._know(tensor, len(self.raw) - 1)
        return out

    def _know(self, tensor: Tensor, number: int) -> None:
        self.known[id(tensor)] = number
        self.alive.append(tensor)

    def run(
        self, inputs: Tensor, source: Site, target: Site
    ) -> tuple[tuple[int, Tensor], tuple[int, Tensor]]:
        """Nodes and values of two sites.

        Raises:
            SiteError: One is not reached, or the target comes first.
        """
        found: dict[Site, tuple[int, Tensor]] = {}

        def note(site: Site, value: Tensor) -> Tensor:
            if site not in found:
                if id(value) not in self.known:
                    raise SiteError(f"Site {site} does not depend on the network's input.")
                found[site] = self.known[id(value)], value.clone()
            if len(found) == len({source, target}):
                raise _Done
            return value

        self._know(inputs, 0)
        with ExitStack() as hooks:
            for name, module in self.network.named_modules():
                hooks.callback(
                    module.register_forward_pre_hook(
                        lambda _m, _a, name=name: self.stack.append(name)
                    ).remove
                )
                hooks.callback(
                    module.register_forward_hook(
                        lambda _m, _a, _o: self.stack.pop() and None, always_call=True
                    ).remove
                )
            edits = {s: lambda value, s=s: note(s, value) for s in {source, target}}
            hooks.enter_context(edited(self.network, edits))
            with suppress(_Done):
                self.network(inputs)
        if len(found) < len({source, target}):
            missing = ", ".join(str(s) for s in (source, target) if s not in found)
            raise SiteError(f"The network ran without calling the module of: {missing}.")
        return found[source], found[target]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _between(raw: Sequence[_Raw], first: int, last: int, source: Site, target: Site) -> list[int]:
    """Nodes after `first` that `last` depends on, in order.

    Raises:
        SiteError: There are none, or `last` also depends on the input by a way around `first`.
    """
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


def _step(raw: _Raw, source: Site, target: Site) -> Operation:
    """What an operation is, as one of the kinds of steps.

    Raises:
        SiteError: It is none of them.
    """
    function = raw.function
    if function in _STEPS and (step := _STEPS[function](raw)) is not None:
        return step
    name = str(function).removeprefix("aten.").partition(".")[0]
    raise SiteError(
        f"Module {raw.module!r} between {source} and {target} does {name!r}, which cannot be "
        "composed into a circuit; convolutions, batch normalisation, rectifiers, pooling, "
        "padding, concatenation and sums can."
    )


def _two(value: Sequence[int]) -> tuple[int, int]:
    return (value[0], value[-1])


def _conv(raw: _Raw) -> Operation | None:
    _, weight, bias, stride, padding, dilation, transposed, _, groups = raw.arguments
    if transposed or weight.ndim != 4:
        return None
    return Conv(weight, bias, _two(stride), _two(padding), _two(dilation), groups)


def _padded(raw: _Raw) -> Operation | None:
    frame = list(raw.arguments[1])
    value = raw.arguments[2] if len(raw.arguments) > 2 else raw.keywords.get("value", 0)
    return Pad((frame[0], frame[1], frame[2], frame[3]), float(value)) if len(frame) == 4 else None


def _max_pool(raw: _Raw) -> Operation:
    defaults = [None, None, [], [0], [1], False]
    _, size, stride, padding, dilation, ceil = [
        *raw.arguments,
        *defaults[len(raw.arguments) :],
    ][:6]
    return MaxPool(_two(size), _two(stride or size), _two(padding), _two(dilation), bool(ceil))


def _mean_pool(raw: _Raw) -> Operation | None:
    defaults = [None, None, [], [0], False, True, None]
    _, size, stride, padding, ceil, count, divisor = [
        *raw.arguments,
        *defaults[len(raw.arguments) :],
    ][:7]
    if divisor is not None:
        return None
    return MeanPool(_two(size), _two(stride or size), _two(padding), bool(ceil), bool(count))


def _batch_norm(raw: _Raw) -> Operation | None:
    _, weight, bias, mean, variance, *rest = raw.arguments
    training = next((r for r in rest if isinstance(r, bool)), False)
    if training or mean is None:
        return None
    eps = [r for r in rest if isinstance(r, float)][-1]
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return Affine(scale.detach(), (shift if bias is None else shift + bias).detach())


def _concatenated(raw: _Raw) -> Operation | None:
    dim = raw.arguments[1] if len(raw.arguments) > 1 else raw.keywords.get("dim", 0)
    same = len(list(_tensors(raw.arguments))) == len(raw.parents)
    return Concatenate() if dim in (1, -3) and same else None


def _added(raw: _Raw) -> Operation | None:
    return Sum() if raw.keywords.get("alpha", 1) == 1 and len(raw.parents) == 2 else None


def _clamped(raw: _Raw) -> Operation | None:
    given = list(raw.arguments[1:])
    low, high = given if len(given) == 2 else (-1.0, 1.0)
    return Gate(lambda z: functional.hardtanh(z, low, high)) if low <= 0 <= high else None


_STEPS: dict[Any, Callable[[_Raw], Operation | None]] = {
    aten.convolution.default: _conv,
    aten.relu.default: lambda raw: Gate(torch.relu),
    aten.relu_.default: lambda raw: Gate(torch.relu),
    aten.hardtanh.default: _clamped,
    aten.hardtanh_.default: _clamped,
    aten.gelu.default: lambda raw: Gate(
        lambda z: functional.gelu(z, approximate=raw.keywords.get("approximate", "none"))
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
"""How operations, in torch's own names, are read."""


def _refuse_sites_between(nodes: Sequence[Node], source: Site, target: Site) -> None:
    """Refuse two sites with a third of parallel branches in between.

    Raises:
        SiteError: Channels are concatenated and then convolved again.
    """
    mixed: dict[int, str] = {}
    for number, node in enumerate(nodes):
        inside = next((mixed[i] for i in node.inputs if i in mixed), None)
        if isinstance(node.step, Conv) and inside is not None:
            raise SiteError(
                f"Sites {source} and {target} are not consecutive: the branches of {inside!r} "
                "lie between them. Give a dictionary of that site too."
            )
        if isinstance(node.step, Concatenate):
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
    """Every way from the source to channels that the target site reads.

    Raises:
        SiteError: There are too many.
    """
    ways = list(_ways(nodes, len(nodes) - 1))
    if len(ways) > MOST_ROUTES:
        raise SiteError(
            f"There are {len(ways)} ways from {source} to {target}, more than {MOST_ROUTES}: "
            "choose sites closer together."
        )
    found = []
    for numbers, slots in ways:
        low, high = 0, width
        for number, slot in zip(numbers, slots, strict=True):
            node = nodes[number]
            if isinstance(node.step, Conv):
                low, high = 0, node.channels
            if isinstance(node.step, Concatenate):
                before = sum(width if i < 0 else nodes[i].channels for i in node.inputs[:slot])
                low, high = low + before, high + before
        if low < reads.stop and reads.start < high:
            found.append(Route("", numbers, slots, slice(low, high)))
    names = _names(nodes, found, branches)
    return [route._replace(name=name) for route, name in zip(found, names, strict=True)]


def _ways(nodes: Sequence[Node], last: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for slot, origin in enumerate(nodes[last].inputs):
        if origin < 0:
            yield (last,), (slot,)
        else:
            for numbers, slots in _ways(nodes, origin):
                yield (*numbers, last), (*slots, slot)


def _names(nodes: Sequence[Node], routes: Sequence[Route], branches: dict[str, slice]) -> list[str]:
    names = []
    for route in routes:
        inside = [
            name
            for name, s in branches.items()
            if s.start <= route.channels.start and route.channels.stop <= s.stop
        ]
        convs = [nodes[n].module for n in route.nodes if isinstance(nodes[n].step, Conv)]
        names.append(inside[0] if inside else convs[-1] if convs else "direct")
    for k, route in enumerate(routes):
        if names.count(names[k]) > 1:
            convs = [nodes[n].module for n in route.nodes if isinstance(nodes[n].step, Conv)]
            names[k] = f"{names[k]} #{k} ({convs[0] if convs else 'direct'})"
    return names
