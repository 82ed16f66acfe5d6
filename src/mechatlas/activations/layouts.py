"""Layout of the activations at a site: which axis is the batch, which are channels and positions.

    Layout        layout, and activations as (batch, positions, channel) and back
    layouts_of    network, inputs, sites -> layout of each site
    find_layouts  the same for every module, also where it is not known, with the reason
    channel_axis  the channels of a site in a call of the network

Nothing is guessed by the number of axes. Modules of torch say where their channels are; for all
others the axes are followed from operation to operation (`axes.py`). The batch is the axis that
doubles from one sample to two. What stays unknown is refused, and can be given as `site@bct`; so
are activations of a sample that are others beside another sample.
"""

import dataclasses
import math
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.utils._pytree import tree_map_only

from mechatlas.activations.axes import BATCH, CHANNEL, Axes, AxisTracker, kind_of
from mechatlas.activations.networks import arguments_of, running
from mechatlas.activations.passes import unobserved, unwrapped
from mechatlas.activations.reading import hook_module
from mechatlas.activations.values import tensors_in
from mechatlas.base import Site, SiteError
from mechatlas.maths.arrays import Channels, numbers_of

MIXING = 0.01
"""Change of a sample's activations with the batch, of the largest, from which it is no rounding."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Meaning of the axes of the activations at a site."""

    axes: str
    """One letter an axis: `b` the batch, `c` a channel, any other letter a position."""
    merged: int = 1
    """Number of positions of each sample that are merged into the batch axis, sample by sample."""

    @classmethod
    def of_channel(cls, axis: int, n_axes: int) -> "Layout":
        """Layout of which only the channel axis is known; the first other stands for the batch."""
        batch = 0 if axis else 1
        names = iter(_letters(n_axes - 2))
        return cls(
            "".join("c" if i == axis else "b" if i == batch else next(names) for i in range(n_axes))
        )

    @property
    def batch(self) -> int:
        """Number of the batch axis."""
        return self.axes.index("b")

    @property
    def channels(self) -> list[int]:
        """Numbers of the channel axes; several are one, in this order."""
        return [i for i, letter in enumerate(self.axes) if letter == "c"]

    @property
    def positions(self) -> list[int]:
        """Numbers of the axes of positions."""
        return [i for i, letter in enumerate(self.axes) if letter not in "bc"]

    @property
    def pattern(self) -> str:
        """Axes with `p` for every position."""
        return "".join(letter if letter in "bc" else "p" for letter in self.axes)

    def rows(self, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "batch ..."]:
        """Bring activations to (batch, positions, channel), as a view where that is possible.

        Raises:
            SiteError: The activations are not of this layout.
        """
        self._check(x)
        x = x.permute(self.batch, *self.positions, *self.channels)
        x = x.flatten(x.ndim - len(self.channels))
        return x if self.merged == 1 else x.unflatten(0, (-1, self.merged))

    def undo(
        self, rows: Shaped[Tensor, "batch ..."], like: Shaped[Tensor, "..."]
    ) -> Shaped[Tensor, "..."]:
        """Undo `rows`.

        Args:
            rows: Activations (batch, positions, channel); the positions may be one axis.
            like: Activations in this layout, of as many positions and channels.
        """
        order = [self.batch, *self.positions, *self.channels]
        n = len(rows) * self.merged
        shape = [n if i == self.batch else like.shape[i] for i in order]
        return rows.reshape(shape).permute([order.index(i) for i in range(len(order))])

    def grid(self, x: Shaped[Tensor, "..."]) -> tuple[int, int]:
        """Height and width of the positions: of more than two axes all but the last are flat."""
        sides = self.rows(x).shape[1:-1]
        if len(sides) < 2:
            return (*sides, 1, 1)[0], 1
        return math.prod(sides[:-1]), sides[-1]

    def width(self, x: Shaped[Tensor, "..."]) -> int:
        """Number of channels."""
        return math.prod(x.shape[i] for i in self.channels)

    def cut(self, x: Shaped[Tensor, "..."], channels: Channels) -> Shaped[Tensor, "..."]:
        """Cut activations to some channels.

        Raises:
            SiteError: There are several axes of channels.
        """
        axis = self._channel()
        return x[(slice(None),) * axis + (_forward(channels, x.shape[axis]),)]

    def replaced(
        self, x: Shaped[Tensor, "..."], channels: Channels, new: Shaped[Tensor, "..."]
    ) -> Shaped[Tensor, "..."]:
        """Replace some channels in a copy.

        Args:
            x: Activations in this layout; left as they are.
            channels: Channels to replace.
            new: Activations of these channels.

        Raises:
            SiteError: There are several axes of channels.
        """
        axis = self._channel()
        index = torch.arange(x.shape[axis], device=x.device)[_forward(channels, x.shape[axis])]
        return x.index_copy(axis, index, new)

    def _channel(self) -> int:
        if len(self.channels) > 1:
            raise SiteError(
                f"Activations with the axes {self.axes!r} have several of channels and no branches."
            )
        return self.channels[0]

    def _check(self, x: Tensor) -> None:
        if x.ndim != len(self.axes):
            raise SiteError(
                f"Activations of shape {tuple(x.shape)} have {x.ndim} axes, and the axes "
                f"{self.axes!r} name {len(self.axes)}."
            )
        if x.shape[self.batch] % self.merged:
            raise SiteError(
                f"The batch axis of activations of shape {tuple(x.shape)} holds another number of "
                f"positions for each sample than {self.merged}."
            )


def _forward(channels: Channels, n: int) -> Channels:
    """Channels as torch indexes them: it has no slices that run backward.

    Raises:
        SiteError: There are no such channels, or none at all.
    """
    numbers = numbers_of(channels, n)
    if not numbers or not -n <= min(numbers) <= max(numbers) < n:
        raise SiteError(f"A branch has the channels {channels}, of activations with {n} channels.")
    return channels if isinstance(channels, slice) and (channels.step or 1) > 0 else numbers


def expect_patterns(
    network: nn.Module, inputs: Any, sites: Sequence[Site], patterns: Sequence[str], what: str
) -> None:
    """Refuse sites whose axes an analysis cannot read.

    Args:
        network: Network that has the sites.
        inputs: Batch of inputs.
        sites: Sites of the analysis.
        patterns: Axes that it reads, with `p` for every position.
        what: Name of the analysis, for the message.

    Raises:
        SiteError: The axes of a site are others, or are not known.
    """
    for site, layout in layouts_of(network, inputs, sites).items():
        if layout.pattern not in patterns or layout.merged > 1:
            raise SiteError(
                f"{what} takes activations with the axes {' or '.join(patterns)} (b: batch, c: "
                f"channels, p: positions); those of {site} have {layout.axes!r}."
            )


def layouts_of(network: nn.Module, inputs: Any, sites: Sequence[Site]) -> dict[Site, Layout]:
    """Find the layout of each site.

    Args:
        network: Network; left as it is.
        inputs: Batch of inputs, of which two samples are used, or one twice.
        sites: Sites; their branches are left out of account.

    Raises:
        SiteError: Batch or channels of a site are not known, or its axes are of another number.
    """
    root = unwrapped(network)
    known = _known.setdefault(root, {})
    shapes = tuple((tuple(t.shape[1:]), t.dtype) for t in tensors_in(inputs))
    keys = {
        site: (
            dataclasses.replace(site, branch=None),
            type(root.get_submodule(site.module)),
            shapes,
        )
        for site in sites
    }
    unknown = {site: key for site, key in keys.items() if key not in known}
    if unknown:
        found = find_layouts(root, inputs, [key[0] for key in unknown.values()])
        for key in unknown.values():
            layout = found[key[0]].layout
            if isinstance(layout, str):
                raise SiteError(layout)
            known[key] = layout
    return {site: known[key] for site, key in keys.items()}


_known: "WeakKeyDictionary[nn.Module, dict[Any, Layout]]" = WeakKeyDictionary()
"""Layouts of each network by site and shape of a sample, so that batches need no more passes."""


class Found(NamedTuple):
    """Activations at a site, as two passes have shown them."""

    layout: Layout | str
    """Layout, or a sentence that says what of it is not known."""
    shape: tuple[int, ...]
    """Shape of the activations of a single sample, with the batch axis if there is one."""


def find_layouts(
    network: nn.Module, inputs: Any, sites: Sequence[Site] | None = None
) -> dict[Site, Found]:
    """Find the layouts of some sites, or of the output of every module and call.

    Args:
        network: Network; left as it is.
        inputs: Batch of inputs, of which two samples are used, or one twice.
        sites: Whole sites; by default all outputs.

    Raises:
        InputError: The network does not run on the inputs.
        Exception: Never; it becomes an `InputError`.
    """
    root = unwrapped(network)
    two = _two_samples(inputs)
    second = tree_map_only(Tensor, lambda t: t[1:] if t.ndim else t, two)
    with running(root, inputs, sites or ()):
        passes = [_watch(root, *arguments_of(root, part), sites) for part in (two, second)]
        double, single = (each.seen for each in passes)
        if all(each.error for each in passes):  # a network for one size of batch
            whole = _watch(root, *arguments_of(root, inputs), sites)
            double = {**double, **whole.seen}
            if whole.error and not (sites and all(_call(s) in double for s in sites)):
                raise whole.error
    if sites is None:
        sites = _numbered([*double, *(site for site in single if site not in double)])
    found = {}
    for site in sites:
        two, one = double.get(_call(site)), single.get(_call(site))
        layout = _decide(site, two, one)
        if isinstance(layout, Layout) and not site.axes and two and one and not passes[0].is_random:
            layout = _mixed(site, layout, two.sample, one.sample) or layout
        seen = one or two
        found[site] = Found(layout, tuple(seen.shape) if seen else ())
    return found


def _mixed(site: Site, layout: Layout, two: Tensor | None, one: Tensor | None) -> str | None:
    """Sentence that refuses a site where the second of two samples is another than alone."""
    if two is None or one is None or not one.numel():
        return None
    beside, alone = layout.rows(two)[1].float(), layout.rows(one)[0].float()
    if beside.shape != alone.shape:
        return None
    change = float((beside - alone).abs().max() / alone.abs().max().clamp_min(1e-30))
    if not change > max(MIXING, 8 * torch.finfo(one.dtype).eps):
        return None
    given = dataclasses.replace(site, axes=layout.axes)
    return (
        f"The activations of a sample at {site} change with the other samples of the batch, by up "
        f"to {change:.0%} of the largest. The network mixes samples, or takes the first axis of "
        "its inputs as time: put a module around it that transposes them. To read the site as it "
        f"is, name its axes: {given}."
    )


def _call(site: Site) -> Site:
    """Call of a site: the first one, if the site does not say which."""
    return dataclasses.replace(site, branch=None, axes=None, call=site.call or 1)


def _numbered(calls: Sequence[Site]) -> list[Site]:
    """Sites of calls; of modules that are called once without the number of the call."""
    counts = Counter(site.module for site in calls)
    return [
        site if counts[site.module] > 1 else dataclasses.replace(site, call=None) for site in calls
    ]


def channel_axis(
    network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], site: Site
) -> int | None:
    """Find the channel axis of a site in a call of the network, whatever its batch is.

    Args:
        network: Network, without wrappers; left as it is.
        args: Arguments of the call.
        kwargs: Arguments by keyword.
        site: Site; its branch is left out of account.

    Returns:
        Number of the axis; `None` if it is not known, or if there are several.
    """
    seen = _watch(network, args, kwargs, [site]).seen.get(_call(site))
    if seen is None:
        return None
    channels = _channels(seen.axes, _batch(seen.shape, seen.axes, None)[0])
    return channels[0] if len(channels) == 1 else None


def _two_samples(inputs: Any) -> Any:
    """First two samples of a batch; of a single one also the reverse, as another sample."""
    if isinstance(inputs, Mapping):
        inputs = dict(inputs)

    def first(tensor: Tensor) -> Tensor:
        one = tensor[:1]
        return tensor[:2] if len(tensor) > 1 else torch.cat([one, one.flip(-1)])

    return tree_map_only(Tensor, lambda t: first(t) if t.ndim else t, inputs)


class _Seen(NamedTuple):
    """Tensor at a site in a pass."""

    shape: torch.Size
    axes: Axes
    """Axes, as far as they are known."""
    sample: Tensor | None
    """Copy of the tensor, where sites were named."""


class _Watched:
    """Tensors at some sites in one pass, with their axes as far as they are known."""

    def __init__(self) -> None:
        self.seen: dict[Site, _Seen] = {}
        self.error: Exception | None = None
        self.is_random = False
        """Whether the network drew random numbers."""


def _watch(
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], sites: Sequence[Site] | None
) -> _Watched:
    """Run the network in a mode that follows the axes; an error ends the pass where it occurs."""
    result, n_calls = _Watched(), Counter[tuple[str, str]]()
    tracker = AxisTracker(root)
    modules = {name: m for name, m in root.named_modules() if not isinstance(m, ScriptModule)}
    if sites is None:
        ends = [Site(name) for name in modules if name]
    else:
        ends = list({(s.module, s.take): Site(s.module, take=s.take) for s in sites}.values())

    def note(site: Site, value: Any) -> Any:
        n_calls[site.module, site.take] += 1
        tensors = list(tensors_in(value))
        first = next((t for t in tensors if t.is_floating_point()), tensors[0] if tensors else None)
        if first is not None and (sites is not None or first.is_floating_point()):
            call = dataclasses.replace(site, call=n_calls[site.module, site.take])
            if first.ndim > 1 or sites is not None:
                is_kept = sites is not None and first.is_floating_point()
                copy = first.detach().clone() if is_kept else None
                result.seen[call] = _Seen(first.shape, tracker.axes(first), copy)
        return value

    def stamp(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        first = next((t for t in tensors_in(output) if t.is_floating_point()), None)
        if first is not None:
            tracker.stamp(module, next(iter(args), None), first)

    with ExitStack() as stack:
        stack.enter_context(unobserved(root))
        for module in modules.values():
            stack.callback(module.register_forward_hook(stamp).remove)
        for site in ends:
            hook = hook_module(
                root.get_submodule(site.module),
                site,
                lambda value, s=site: note(s, value),
                aside=True,
            )
            stack.callback(hook.remove)
        args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
        for tensor in tensors_in((args, kwargs)):
            for axis in tracker.axes(tensor)[:1]:
                axis[0].kind = BATCH
        random = torch.get_rng_state()
        try:
            with tracker:
                root(*args, **kwargs)
        except Exception as error:  # the pass that the user asks for will say it
            result.error = error
        result.is_random = not torch.equal(random, torch.get_rng_state())
    return result


def _decide(site: Site, double: _Seen | None, single: _Seen | None) -> Layout | str:
    """Layout of a site from a pass of two samples and one of a single sample."""
    seen = double or single
    if seen is None:
        return f"The network ran without calling the module of: {site}."
    shape, axes = seen.shape, seen.axes
    if site.axes is not None:
        if len(site.axes) != len(shape):
            return (
                f"Site {site} names {len(site.axes)} axes, and its activations of shape "
                f"{tuple(shape)} have {len(shape)}."
            )
        return Layout(site.axes)
    batch, merged = _batch(shape, axes, single.shape if double and single else None)
    if batch is None:
        return unknown_axis(site, shape, "which axis is the batch")
    channels = _channels(axes, batch)
    if not channels or len(channels) == len(shape):
        return unknown_axis(site, shape, "which axis holds the channels")
    names = iter(_letters(len(shape) - len(channels) - 1))
    letters = [
        "b" if i == batch else "c" if i in channels else next(names) for i in range(len(shape))
    ]
    return Layout("".join(letters), merged)


def _channels(axes: Axes, batch: int | None) -> list[int]:
    """Axes of channels, as far as they are known; the other axis of a matrix."""
    others = [i for i in range(len(axes)) if i != batch]
    whole = [i for i in others if kind_of(axes[i]) == CHANNEL]
    if whole:
        return whole
    # Channels and positions in one axis, as before a last linear layer.
    mixed = [i for i in others if any(f.kind == CHANNEL for f in axes[i])]
    if len(mixed) == 1 and kind_of(axes[mixed[0]]) != BATCH:
        return mixed
    return others if len(axes) == 2 and batch is not None else []


def _batch(shape: torch.Size, axes: Axes, one: torch.Size | None) -> tuple[int | None, int]:
    """Batch axis and the number of positions that are merged into it."""
    labeled = [i for i, axis in enumerate(axes) if kind_of(axis) == BATCH]
    if one is None:
        scaled = labeled
    else:
        scaled = [i for i, (n, m) in enumerate(zip(shape, one, strict=True)) if n != m]
        if len(one) != len(shape) or len(scaled) != 1 or shape[scaled[0]] != 2 * one[scaled[0]]:
            return None, 1
    if len(scaled) != 1:
        return None, 1
    batch = scaled[0]
    factors = [f for f in axes[batch] if f.size > 1]
    n = shape[batch] if one is None else 2
    merged = shape[batch] // n if one is not None else 1
    if merged > 1 and not (factors and factors[0].kind == BATCH and factors[0].size == n):
        return None, 1  # samples lie one inside the other
    return batch, merged


def _letters(n: int) -> str:
    """Letters of `n` axes of positions."""
    usual = {0: "", 1: "t", 2: "hw", 3: "dhw"}
    others = [letter for letter in string.ascii_lowercase if letter not in "bc"]
    return usual[n] if n in usual else "".join(others[:n])


def unknown_axis(site: Site, shape: Sequence[int], what: str) -> str:
    """Sentence that refuses a site of which something is not known.

    Args:
        site: The site.
        shape: Shape of its activations.
        what: What is not known of them.
    """
    axes = "b" + _letters(max(len(shape) - 2, 0)) + "c"
    example = dataclasses.replace(site, axes=axes)
    return (
        f"It is not known {what} of the activations at {site}, of shape {tuple(shape)}. "
        f"Give one letter for each axis: b the batch, c channels, any other a "
        f"position, such as {example}."
    )


def sample_shape(layout: Layout, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the activations of one sample, without the batch axis."""
    rest = tuple(n for i, n in enumerate(shape) if i != layout.batch)
    return rest if layout.merged == 1 else (layout.merged, *rest)
