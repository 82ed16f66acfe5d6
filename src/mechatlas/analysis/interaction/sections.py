"""The pieces of a network between the layers that are analysed.

    sections_of   a network and its layers -> one `Section` between each layer and the next
    rows_of       activations as (sample, position, channel), whatever the layer's shape
    vector_jacobian_products, directional, form_jacobians    their derivatives

A section is recognised by running it, never by name: a chain of modules that leads from one
layer to the next, or one of the forms of `ReluForm` inside that chain, is used only where it
gives the very numbers the network gives. Where nothing is recognised the whole network runs
with the layer replaced, which is slower and needs no assumption.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from mechatlas.activations.sites import channels_last, edited, read
from mechatlas.base import Site, SiteError

MOST_GRADIENTS = 512
"""Outputs of which every gradient is taken; of more, random sums where that is allowed."""


@dataclasses.dataclass(frozen=True, eq=False)
class ReluForm:
    """`out(relu(inner(x)))`, with `x` added if `skip`; without `relu` and `out`, `inner(x)`."""

    inner: nn.Module
    relu: bool = True
    out: nn.Linear | None = None
    skip: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Run it."""
        hidden = self.inner(x)
        hidden = hidden.relu() if self.relu else hidden
        result = hidden if self.out is None else self.out(hidden)
        return x + result if self.skip else result

    @property
    def weight(self) -> Tensor:
        """Of `inner`."""
        return self.inner.get_parameter("weight")

    @property
    def is_linear_map(self) -> bool:
        """Positions are apart: `inner` is a matrix and not a convolution."""
        return isinstance(self.inner, nn.Linear)


@dataclasses.dataclass(frozen=True, eq=False)
class Section:
    """From the activations of one layer to those of the next."""

    source: Site
    target: Site
    run: Callable[[Tensor, Tensor], Tensor]
    """Activations of the source, as the network has them, and the network's inputs of the
    same samples -> activations of the target."""
    form: ReluForm | None
    """What it is, if it is one of the forms with a closed solution."""
    how: str
    """In words, how the section is run."""


def rows_of(activations: Tensor) -> Float[Tensor, "n position d"]:
    """A view with one axis of samples, one of positions and one of channels.

    Raises:
        SiteError: The activations have neither two, three nor four axes.
    """
    if activations.ndim not in (2, 3, 4):
        raise SiteError(
            f"Activations of shape {tuple(activations.shape)} cannot be analysed: expected "
            "(sample, channel), (sample, position, channel) or (sample, channel, h, w)."
        )
    last = channels_last(activations)
    return last.reshape(last.shape[0], -1, last.shape[-1])


def like(rows: Float[Tensor, "n position d"], activations: Tensor) -> Tensor:
    """Undo `rows_of`, in the shape of `activations` for as many samples as `rows` has."""
    last = channels_last(activations)
    shaped = rows.reshape(rows.shape[0], *last.shape[1:])
    return shaped.movedim(-1, 1) if activations.ndim == 4 else shaped


def sections_of(network: nn.Module, layers: Sequence[Site], inputs: Tensor) -> list[Section]:
    """The sections between layers, in order.

    Args:
        network: In evaluation mode.
        layers: In the order in which the network reaches them.
        inputs: A few samples to try the sections on.

    Raises:
        SiteError: A layer is not reached, or does not depend on the one before it.
    """
    with torch.no_grad():
        found, calls = _traced(network, inputs, layers)
    sections = []
    for source, target in itertools.pairwise(layers):
        section = _section(network, source, target, calls, found, inputs)
        _check_order(section, found[source], inputs)
        sections.append(section)
    return sections


def _section(
    network: nn.Module,
    source: Site,
    target: Site,
    calls: "list[_Call]",
    found: dict[Site, Tensor],
    inputs: Tensor,
) -> Section:
    before, after = found[source], found[target]
    chain = _chain(calls, before, after) if source.branch is target.branch is None else None
    if chain is not None and _same(_run_chain(chain, before), after):
        modules = chain
        form = _recognise(chain, before, after)
        names = " > ".join(type(m).__name__ for m in chain)
        return Section(source, target, lambda x, _i: _run_chain(modules, x), form, names)

    def whole(x: Tensor, samples: Tensor) -> Tensor:
        with edited(network, {source: lambda _old: x}):
            return read(network, samples, [target])[target]

    return Section(source, target, whole, None, "the whole network, one layer replaced")


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    module: nn.Module
    given: Tensor
    returned: Tensor


def _traced(
    network: nn.Module, inputs: Tensor, layers: Sequence[Site]
) -> tuple[dict[Site, Tensor], list[_Call]]:
    """Activations of the layers, and every call of a module from one tensor to one tensor."""
    calls: list[_Call] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and torch.is_tensor(out):
            calls.append(_Call(module, args[0], out))

    with ExitStack() as hooks:
        for module in network.modules():
            hooks.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        return read(network, inputs, layers), calls


def _chain(calls: list[_Call], before: Tensor, after: Tensor) -> list[nn.Module] | None:
    """The fewest modules that lead from one tensor to another."""
    paths: list[tuple[Tensor, list[nn.Module]]] = [(before, [])]
    for _ in range(len(calls)):
        longer = []
        for tensor, path in paths:
            for call in reversed(calls):
                if _is(call.given, tensor) and call.module not in path:
                    if _is(call.returned, after):
                        return [*path, call.module]
                    longer.append((call.returned, [*path, call.module]))
        paths = longer[:64]
        if not paths:
            return None
    return None


def _is(a: Tensor, b: Tensor) -> bool:
    return a is b or (
        a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
    )


def _run_chain(chain: list[nn.Module], x: Tensor) -> Tensor:
    for module in chain:
        x = module(x)
    return x


def _recognise(chain: list[nn.Module], before: Tensor, after: Tensor) -> ReluForm | None:
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
    candidates: list[ReluForm] = []
    if len(leaves) + len(kernels) == 1:
        inner = (leaves + kernels)[0]
        candidates = [ReluForm(inner, relu=False), ReluForm(inner)]
    elif len(leaves) == 2 and not kernels:
        first, second = leaves
        candidates = [ReluForm(first, out=second, skip=skip) for skip in (False, True)]
    with torch.no_grad():
        trials = list(_trials(chain, before, after))
        return next((form for form in candidates if _agrees(form, trials)), None)


def _trials(
    chain: list[nn.Module], before: Tensor, after: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Activations and what the chain makes of them: real ones, and some of either sign.

    Where every unit fires on the few samples at hand, a ReLU looks like nothing at all.
    """
    yield before, after
    noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(0)).to(before)
    for other in (-before, noise * 30, noise * 1e6):
        try:
            yield other, _run_chain(chain, other)
        except (RuntimeError, ValueError):  # a module that refuses what is not an image, say
            continue


def _agrees(form: ReluForm, trials: list[tuple[Tensor, Tensor]]) -> bool:
    try:
        return all(_same(form(x), y) for x, y in trials)
    except RuntimeError:  # the shapes do not even fit
        return False


def _same(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach(), b.detach()
    tolerance = 64 * torch.finfo(b.dtype).eps * float(b.abs().max())
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance


def _check_order(section: Section, before: Tensor, inputs: Tensor) -> None:
    start = before.detach().clone().requires_grad_()
    with torch.enable_grad():
        result = section.run(start, inputs)
    reached = None
    if result.requires_grad:  # if only because the weights do
        (reached,) = torch.autograd.grad(result.sum(), start, allow_unused=True)
    if reached is None:
        raise SiteError(
            f"Layer {section.target} does not depend on layer {section.source}. Name the layers "
            "in the order in which the network reaches them."
        )


def vector_jacobian_products(
    section: Section,
    x: Tensor,
    inputs: Tensor,
    directions: Float[np.ndarray, "d k"],
    *,
    sources: int | None = None,
    seed: int = 0,
) -> Iterator[Float[Tensor, "n position d"]]:
    """Gradients of output directions with respect to the source.

    Args:
        section: The section.
        x: Activations of the source, in the shape the network gives them.
        inputs: The network's inputs for the same samples.
        directions: Each column is a direction of the target's channels.
        sources: By default one gradient for each direction and output position. If given, and
            there are more than `MOST_GRADIENTS` of these, so many random sums over them instead,
            with signs of +-1 and divided by the root of their number: second moments keep their
            expected value.
        seed: Of the random signs.

    Yields:
        One gradient at a time, ordered by direction and then by position, or by source.
    """
    start = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        out = rows_of(section.run(start, inputs))
    n, positions, _ = out.shape
    columns = torch.as_tensor(directions.T.copy(), dtype=out.dtype, device=out.device)
    generator = torch.Generator().manual_seed(seed)
    exact = sources is None or positions * len(columns) <= MOST_GRADIENTS
    times = positions * len(columns) if exact else sources
    assert times is not None
    for time in range(times):
        if exact:
            cotangent = torch.zeros_like(out)
            cotangent[:, time % positions] = columns[time // positions]
        else:
            signs = torch.randint(0, 2, (n, positions, len(columns)), generator=generator) * 2 - 1
            cotangent = signs.to(out) @ columns / times**0.5
        (gradient,) = torch.autograd.grad(out, start, cotangent, retain_graph=time < times - 1)
        yield rows_of(gradient)


def directional(
    section: Section, x: Tensor, inputs: Tensor, tangent: Tensor
) -> Float[Tensor, "n t o"]:
    """Derivative of the target along a change of the source, at all output positions at once.

    Args:
        section: The section.
        x: Activations of the source, in the shape the network gives them.
        inputs: The network's inputs for the same samples.
        tangent: Change of the source, of the shape of `x`.
    """
    try:
        return _forward(section, x, inputs, tangent)
    except NotImplementedError:  # an operation without a forward derivative
        return _twice(section, x, inputs, tangent)


def _forward(section: Section, x: Tensor, inputs: Tensor, tangent: Tensor) -> Tensor:
    # Of the ways to compute attention only this one has a forward derivative.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        out = section.run(forward_ad.make_dual(x, tangent), inputs)
        found = forward_ad.unpack_dual(out).tangent
        return rows_of(torch.zeros_like(out) if found is None else found)


def _twice(section: Section, x: Tensor, inputs: Tensor, tangent: Tensor) -> Tensor:
    """The gradient, by the cotangent, of the gradient along the tangent."""
    start = x.detach().clone().requires_grad_()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        out = section.run(start, inputs)
        cotangent = torch.zeros_like(out, requires_grad=True)
        (back,) = torch.autograd.grad(out, start, cotangent, create_graph=True)
        (along,) = torch.autograd.grad((back * tangent).sum(), cotangent)
    return rows_of(along)


def form_jacobians(
    form: ReluForm, x: Tensor, left: Float[np.ndarray, "o k"], right: Float[np.ndarray, "j d"]
) -> Iterator[Float[Tensor, "n k j"]]:
    """Jacobians of each sample, one position at a time; it is zero between positions.

    Args:
        form: A linear map, with or without a ReLU and a second one.
        x: Activations of the source, in the shape the network gives them.
        left: Each column is a direction of the target that is read.
        right: Each row is what a unit of a source coordinate adds to the activations.
    """
    assert isinstance(form.inner, nn.Linear)
    rows = rows_of(x)
    a = torch.as_tensor(left, dtype=x.dtype, device=x.device)
    b = torch.as_tensor(right.T.copy(), dtype=x.dtype, device=x.device)
    inner = form.inner.weight.detach() @ b
    outer = a.T if form.out is None else a.T @ form.out.weight.detach()
    around = a.T @ b if form.skip else None
    for time in range(rows.shape[1]):
        if form.relu:
            with torch.no_grad():
                fires = (form.inner(rows[:, time]) > 0).to(x.dtype)
            whole = ((outer * fires[:, None, :]).flatten(0, 1) @ inner).unflatten(0, (-1, len(a.T)))
        else:
            whole = (outer @ inner).expand(len(rows), -1, -1)
        if around is not None:
            whole = whole + around
        yield whole


def taps_of(
    kernel: nn.Conv2d, height: int, width: int
) -> Iterator[tuple[int, int, tuple[slice, slice]]]:
    """For each tap of a kernel: its row, its column, and the output positions that it serves.

    A tap serves the positions whose source lies inside the map; the rest read padding.
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
