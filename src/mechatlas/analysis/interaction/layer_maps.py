"""Maps of a network from each analyzed layer to the next.

    layer_maps     a network and its layers -> one `LayerMap` from each layer to the next
    Arrangement    activations of a layer in one of three orders of axes, and back
    rows_of        arranged activations as (sample, position, channel)

A map is recognized by running it, never by name: a chain of modules that leads from one layer to
the next, or one of the forms of `ReLUForm` inside that chain, is used only where it gives the
same numbers as the network. Where nothing is recognized, the network runs with the layer
replaced; modules that run before that layer are left out only if that makes no difference.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mechatlas.activations.branches import select
from mechatlas.activations.layouts import Layout, layouts_of
from mechatlas.activations.sites import intervene, read_activations
from mechatlas.activations.tracing import ModuleCall, Trace, Version, same_numbers, trace
from mechatlas.base import Site, SiteError, UserError

PATTERNS = ("bc", "bpc", "bcpp")
"""Arranged axes of layers: vectors, tokens and maps; `p` is a position."""


class Arrangement(NamedTuple):
    """Activations of a layer in an order of axes of `PATTERNS`, and back."""

    layout: Layout
    """Axes as the network gives them."""
    shape: torch.Size
    """Shape of some activations as the network gives them, cut to the layer's branch."""

    @property
    def is_arranged(self) -> bool:
        """Whether the network gives them so."""
        return self.layout.pattern in PATTERNS and self.layout.merged == 1

    def arrange(self, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "sample ..."]:
        """Arrange activations; all positions become one axis unless they are a map already."""
        if self.is_arranged:
            return x
        rows = self.layout.rows(x)
        return rows if rows.ndim == 2 else rows.flatten(1, -2)

    def native(self, x: Shaped[Tensor, "sample ..."]) -> Shaped[Tensor, "..."]:
        """Undo `arrange`, for any number of samples."""
        if self.is_arranged:
            return x
        return self.layout.undo(x, torch.empty(self.shape, device="meta"))


def arrangements(
    network: nn.Module, inputs: Any, activations: Mapping[Site, Tensor]
) -> dict[Site, Arrangement]:
    """Find the arrangement of each layer.

    Args:
        network: Network that has the layers.
        inputs: Batch of inputs.
        activations: Activations of the layers on them, cut to their branches.

    Raises:
        SiteError: Batch or channels of a layer are not known.
    """
    layouts = layouts_of(network, inputs, list(activations))
    return {site: Arrangement(layouts[site], x.shape) for site, x in activations.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class ReLUForm:
    """`out(relu(inner(x)))`, with `x` added if `skip`; without `relu` and `out`, `inner(x)`."""

    inner: nn.Module
    relu: bool = True
    out: nn.Linear | None = None
    skip: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the form to activations of the source."""
        hidden = self.inner(x)
        hidden = hidden.relu() if self.relu else hidden
        result = hidden if self.out is None else self.out(hidden)
        return x + result if self.skip else result

    @property
    def weight(self) -> Tensor:
        """Weight of `inner`."""
        return self.inner.get_parameter("weight")

    @property
    def is_linear_map(self) -> bool:
        """Whether positions do not mix: `inner` is a matrix and not a convolution."""
        return isinstance(self.inner, nn.Linear)


@dataclasses.dataclass(frozen=True, eq=False)
class LayerMap:
    """Map from the activations of one layer to those of the next."""

    source: Site
    target: Site
    run: "Run"
    """Function of the source's activations and of the network's inputs for the same samples."""
    form: ReLUForm | None
    """Closed form of the map, where there is one."""
    description: str
    """Modules that are run, in words."""
    is_piecewise_linear: bool
    """Whether gradients change by jumps only; one point of a straight path then integrates it."""
    depends_only_on_source: bool
    """Whether the source is the only layer that the target depends on: nothing bypasses it."""


def rows_of(activations: Shaped[Tensor, "sample ..."]) -> Float[Tensor, "n position d"]:
    """View arranged activations with one axis of samples, one of positions and one of channels."""
    last = channels_last(activations)
    return last.reshape(last.shape[0], -1, last.shape[-1])


def channels_last(activations: Shaped[Tensor, "sample ..."]) -> Shaped[Tensor, "sample ..."]:
    """Move the channels of an arranged map to the last axis."""
    return activations.movedim(1, -1) if activations.ndim == 4 else activations


def like(rows: Float[Tensor, "n position d"], activations: Shaped[Tensor, "sample ..."]) -> Tensor:
    """Undo `rows_of`, in the shape of `activations` for as many samples as `rows` has."""
    last = channels_last(activations)
    shaped = rows.reshape(rows.shape[0], *last.shape[1:])
    return shaped.movedim(-1, 1) if activations.ndim == 4 else shaped


def layer_maps(
    network: nn.Module, layers: Sequence[Site], inputs: Shaped[Tensor, "sample ..."]
) -> list[LayerMap]:
    """Find the map from each layer to the next.

    Args:
        network: In evaluation mode.
        layers: Layers in the order in which the network reaches them.
        inputs: A few samples to try the maps on.

    Raises:
        SiteError: A layer is not reached, or does not depend on the one before it.
    """
    traced = trace(network, inputs, layers)
    cut = {site: _cut(network, site, traced, inputs) for site in layers}
    arranged = arrangements(network, inputs, cut)
    maps = []
    for source, target in itertools.pairwise(layers):
        layer_map = _layer_map(network, (source, target), arranged, cut, traced, inputs)
        _check_order(layer_map, arranged[source].arrange(cut[source]), inputs)
        maps.append(layer_map)
    return maps


def _cut(network: nn.Module, site: Site, traced: Trace, inputs: Tensor) -> Tensor:
    whole = traced.activations[site]
    if site.branch is None:
        return whole
    return layouts_of(network, inputs, [site])[site].cut(whole, select(network, site))


def _layer_map(
    network: nn.Module,
    layers: tuple[Site, Site],
    arranged: Mapping[Site, Arrangement],
    activations: Mapping[Site, Tensor],
    traced: Trace,
    inputs: Tensor,
) -> LayerMap:
    source, target = layers
    native, arrange = arranged[source].native, arranged[target].arrange
    before = arranged[source].arrange(activations[source])
    after = arrange(activations[target])
    chain = None
    if source.branch is target.branch is None:
        chain = _chain(traced.finished_calls(), traced.versions[source], traced.versions[target])
    if chain is not None and same_numbers(arrange(_run_chain(chain, native(before))), after):
        modules = chain
        names = " > ".join(type(m).__name__ for m in chain)

        def chained(x: Tensor, _inputs: Tensor) -> Tensor:
            return arrange(_run_chain(modules, native(x)))

        form = _recognize(chain, lambda x: chained(x, inputs), before, after)
        linear = form is not None or _is_piecewise_linear(chained, before, inputs)
        return LayerMap(source, target, chained, form, names, linear, depends_only_on_source=True)

    def whole(x: Tensor, samples: Tensor) -> Tensor:
        with intervene(network, {source: lambda _old: native(x)}):
            return arrange(read_activations(network, samples, [target])[target])

    idle = _before(traced, network, source, len(inputs))
    own = network.get_submodule(source.module)

    def short(x: Tensor, samples: Tensor) -> Tensor:
        if own not in idle:
            with _standing_in({m: out.expand(len(x), *out.shape[1:]) for m, out in idle.items()}):
                return whole(x, samples)
        with _standing_in({**idle, own: native(x)}):  # up to the layer one sample is enough
            return arrange(read_activations(network, samples[:1], [target])[target])

    with torch.no_grad():
        alone = bool(idle) and _agree(short, whole, before, inputs)
    run = short if alone else whole
    description = (
        f"the network after {source}" if alone else "the whole network, one layer replaced"
    )
    return LayerMap(
        source, target, run, None, description, _is_piecewise_linear(run, before, inputs), alone
    )


Run = Callable[[Tensor, Tensor], Tensor]


def _before(
    traced: Trace, network: nn.Module, source: Site, n_samples: int
) -> dict[nn.Module, Tensor]:
    """Outermost modules that are done before a layer is reached, and their output for a sample.

    The layer's own module is among them if all of its output is replaced.
    """
    layer = network.get_submodule(source.module)
    reached = next(call.started for call in traced.calls if call.module is layer)
    whole_output = source.take == "output" and not source.branch
    outputs: dict[nn.Module, list[Tensor | None]] = {}
    for call in traced.finished_calls():
        own = whole_output and call.module is layer
        early = call.finished is not None and call.finished < reached
        out = call.returned
        kept = out and out.is_intact and len(out.tensor) == n_samples and (own or early)
        first = out.tensor[:1].detach() if out and kept else None
        outputs.setdefault(call.module, []).append(first)
    idle = {m: outs[0] for m, outs in outputs.items() if len(outs) == 1 and outs[0] is not None}
    inside = {id(part) for module in idle for part in module.modules() if part is not module}
    return {module: out for module, out in idle.items() if id(module) not in inside}


@contextmanager
def _standing_in(idle: dict[nn.Module, Tensor]) -> Iterator[None]:
    """Replace the output of modules by tensors, whatever their input."""

    def give(out: Tensor) -> Callable[..., Tensor]:
        return lambda *_args, **_kwargs: out.clone()  # what follows may write into it

    own = {module: vars(module).get("forward") for module in idle}
    try:
        for module, out in idle.items():
            vars(module)["forward"] = give(out)
        yield
    finally:
        for module, forward in own.items():
            del vars(module)["forward"]
            if forward is not None:
                vars(module)["forward"] = forward


def _agree(first: Run, second: Run, x: Tensor, inputs: Tensor) -> bool:
    """Whether two ways to run a map agree, also for activations of other samples."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    try:
        return all(
            same_numbers(first(trial, inputs), second(trial, inputs))
            for trial in (x, x.flip(0), noise)
        )
    except (RuntimeError, UserError):
        return False


def _is_piecewise_linear(run: Run, x: Tensor, inputs: Tensor) -> bool:
    """Whether gradients change by jumps only."""
    start = x[:4].detach().clone().requires_grad_()
    random = torch.Generator().manual_seed(0)
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            out = run(start, inputs[:4])
            along = torch.randn(out.shape, generator=random).to(out)
            (slope,) = torch.autograd.grad(out, start, along, create_graph=True)
            if not slope.requires_grad:
                return True
            across = torch.randn(slope.shape, generator=random).to(slope)
            (second,) = torch.autograd.grad(slope, start, across, allow_unused=True)
    except RuntimeError:  # an operation without a second derivative: assume nothing
        return False
    return second is None or not bool(second.any())


def _chain(traced: list[ModuleCall], before: Version, after: Version) -> list[nn.Module] | None:
    """Shortest chain of modules that leads from one tensor to another."""
    calls = [
        (call.given, call.module, call.returned)
        for call in reversed(traced)
        if call.given is not None and call.returned is not None
    ]
    paths: list[tuple[Version, list[nn.Module]]] = [(before, [])]
    for _ in range(len(calls)):
        longer = []
        for tensor, path in paths:
            for given, module, returned in calls:
                if given.is_same(tensor) and module not in path:
                    if returned.is_same(after):
                        return [*path, module]
                    longer.append((returned, [*path, module]))
        paths = longer[:64]
        if not paths:
            return None
    return None


def _run_chain(chain: list[nn.Module], x: Tensor) -> Tensor:
    x = x.clone()  # the first may write into it
    for module in chain:
        x = module(x)
    return x


def _recognize(
    chain: list[nn.Module], run: Callable[[Tensor], Tensor], before: Tensor, after: Tensor
) -> ReLUForm | None:
    leaves = [m for module in chain for m in module.modules() if isinstance(m, nn.Linear)]
    kernels = [
        m
        for module in chain
        for m in module.modules()
        if isinstance(m, nn.Conv2d)
        and m.groups == 1
        and m.padding_mode == "zeros"
        and not isinstance(m.padding, str)
    ]
    if any(m.training and isinstance(m, nn.Dropout) for c in chain for m in c.modules()):
        return None
    candidates: list[ReLUForm] = []
    if len(leaves) + len(kernels) == 1:
        inner = (leaves + kernels)[0]
        candidates = [ReLUForm(inner, relu=False), ReLUForm(inner)]
    elif len(leaves) == 2 and not kernels:
        first, second = leaves
        candidates = [ReLUForm(first, out=second, skip=skip) for skip in (False, True)]
    with torch.no_grad():
        trials = list(_trials(run, before, after))
        return next((form for form in candidates if _agrees(form, trials)), None)


def _trials(
    run: Callable[[Tensor], Tensor], before: Tensor, after: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Activations and their image under a chain: real ones, and some of either sign.

    Where every unit fires on the few samples at hand, a ReLU looks like nothing at all.
    """
    yield before, after
    noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(0)).to(before)
    for other in (-before, noise * 30, noise * 1e6):
        try:
            yield other, run(other)
        except (RuntimeError, ValueError):  # a module that refuses what is not an image, say
            continue


def _agrees(form: ReLUForm, trials: list[tuple[Tensor, Tensor]]) -> bool:
    try:
        return all(same_numbers(form(x), y) for x, y in trials)
    except RuntimeError:  # the shapes do not even fit
        return False


def _check_order(layer_map: LayerMap, before: Tensor, inputs: Tensor) -> None:
    start = before.detach().clone().requires_grad_()
    with torch.enable_grad():
        result = layer_map.run(start, inputs)
    reached = None
    if result.requires_grad:  # if only because the weights do
        (reached,) = torch.autograd.grad(result.sum(), start, allow_unused=True)
    if reached is None:
        raise SiteError(
            f"Layer {layer_map.target} does not depend on layer {layer_map.source}. Name "
            "the layers in the order in which the network reaches them."
        )


def taps_of(
    kernel: nn.Conv2d, height: int, width: int
) -> Iterator[tuple[int, int, tuple[slice, slice]]]:
    """Rows, columns and served output positions of the taps of a kernel.

    A tap serves the positions whose source lies inside the map; the rest read padding.

    Args:
        kernel: Convolution with padding by numbers.
        height: Rows of its input.
        width: Columns of its input.
    """
    pads = kernel.padding
    assert not isinstance(pads, str)
    sides = (height, width)
    outs = [
        (side + 2 * pad - dil * (size - 1) - 1) // stride + 1
        for side, pad, dil, size, stride in zip(
            sides, pads, kernel.dilation, kernel.kernel_size, kernel.stride, strict=True
        )
    ]

    def served(tap: int, axis: int) -> slice:
        shift = tap * kernel.dilation[axis] - pads[axis]
        stride = kernel.stride[axis]
        first = max(0, -(shift // stride))
        last = min(outs[axis] - 1, (sides[axis] - 1 - shift) // stride)
        return slice(first, last + 1)

    for row in range(kernel.kernel_size[0]):
        for column in range(kernel.kernel_size[1]):
            yield row, column, (served(row, 0), served(column, 1))
