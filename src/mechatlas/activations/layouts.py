"""Layout of the activations at a site: which axis is the batch, which are channels and positions.

    Layout        layout, and activations as (batch, positions, channel) and back
    layouts_of    network, inputs, sites -> layout of each site
    find_layouts  the same where some are not known, with the reason

Nothing is guessed by the number of axes. Modules of torch say where their channels are; for all
others the axes are followed from operation to operation (`axes.py`). The batch is the axis that
doubles from one sample to two. What stays unknown is refused, and can be given as `site@bct`.
"""

import dataclasses
import math
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from mechatlas.activations.axes import BATCH, CHANNEL, Axes, AxisTracker, kind_of
from mechatlas.activations.passes import unobserved, unwrapped
from mechatlas.activations.reading import hook_site
from mechatlas.activations.values import tensors_in
from mechatlas.base import Site, SiteError

Channels = slice | list[int]
"""Some of the channels."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Meaning of the axes of the activations at a site."""

    axes: str
    """One letter an axis: `b` the batch, `c` a channel, any other letter a position."""
    merged: int = 1
    """Number of positions of each sample that are merged into the batch axis, sample by sample."""

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
        return x[(slice(None),) * self._channel() + (channels,)]

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
        index = torch.arange(x.shape[axis], device=x.device)[channels]
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


def layouts_of(
    network: nn.Module, inputs: Shaped[Tensor, "batch ..."], sites: Sequence[Site]
) -> dict[Site, Layout]:
    """Find the layout of each site.

    Args:
        network: Network; left as it is.
        inputs: Batch of inputs, of which two samples are used, or one twice.
        sites: Sites; their branches are left out of account.

    Raises:
        SiteError: Batch or channels of a site are not known, or its axes are of another number.
    """
    found = find_layouts(network, inputs, sites)
    for layout in found.values():
        if isinstance(layout, str):
            raise SiteError(layout)
    return {site: layout for site, layout in found.items() if isinstance(layout, Layout)}


def find_layouts(
    network: nn.Module, inputs: Shaped[Tensor, "batch ..."], sites: Sequence[Site]
) -> dict[Site, Layout | str]:
    """Find the layout of each site, or a sentence that says why it is not known.

    Args:
        network: Network; left as it is.
        inputs: Batch of inputs, of which two samples are used, or one twice.
        sites: Sites; their branches are left out of account.

    Raises:
        SiteError: The network is scripted.
    """
    root = unwrapped(network)
    whole = {site: dataclasses.replace(site, branch=None) for site in sites}
    wanted = list(dict.fromkeys(whole.values()))
    pair = inputs[:2] if len(inputs) > 1 else torch.cat([inputs[:1]] * 2)
    double, single = _try(root, pair, wanted), _try(root, inputs[:1], wanted)
    if not double.seen and not single.seen:  # a network for one size of batch
        double = _try(root, inputs, wanted)
    return {
        site: _decide(w, double.seen.get(w), single.seen.get(w), double.error or single.error)
        for site, w in whole.items()
    }


class _Seen:
    """Tensors at some sites in one pass: their shapes, and their axes as far as they are known."""

    def __init__(self) -> None:
        self.seen: dict[Site, tuple[torch.Size, Axes]] = {}
        self.error: Exception | None = None


def _try(root: nn.Module, inputs: Tensor, sites: Sequence[Site]) -> _Seen:
    """Run the network in a mode that follows the axes; an error ends the pass where it occurs."""
    result, n_calls = _Seen(), Counter[Site]()
    tracker = AxisTracker(root)

    def note(site: Site, value: Any) -> Any:
        n_calls[site] += 1
        tensors = list(tensors_in(value))
        first = next((t for t in tensors if t.is_floating_point()), tensors[0] if tensors else None)
        if first is not None and n_calls[site] == (site.call or 1):
            result.seen[site] = first.shape, tracker.axes(first)
        return value

    def stamp(module: nn.Module, _args: Any, output: Any) -> None:
        first = next((t for t in tensors_in(output) if t.is_floating_point()), None)
        if first is not None:
            tracker.stamp(module, first)

    with ExitStack() as stack:
        stack.enter_context(unobserved(root))
        for module in root.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                stack.callback(module.register_forward_hook(stamp).remove)
        for site in sites:
            stack.callback(hook_site(root, site, lambda value, s=site: note(s, value)).remove)
        start = inputs.clone()
        tracker.label(start, tracker.axes(start))
        tracker.axes(start)[0][0].kind = BATCH
        try:
            with tracker:
                root(start)
        except Exception as error:  # the pass that the user asks for will say it
            result.error = error
    return result


def _decide(
    site: Site,
    double: tuple[torch.Size, Axes] | None,
    single: tuple[torch.Size, Axes] | None,
    error: Exception | None,
) -> Layout | str:
    """Layout of a site from a pass of two samples and one of a single sample."""
    seen = double or single
    if seen is None:
        reason = f" ({type(error).__name__}: {error})" if error else ""
        return f"The network ran without calling the module of: {site}.{reason}"
    shape, axes = seen
    if site.axes is not None:
        if len(site.axes) != len(shape):
            return (
                f"Site {site} names {len(site.axes)} axes, and its activations of shape "
                f"{tuple(shape)} have {len(shape)}."
            )
        return Layout(site.axes)
    kinds = [kind_of(axis) for axis in axes]
    batch, merged = _batch(shape, axes, single[0] if double and single else None)
    if batch is None:
        return _unknown(site, shape, "which axis is the batch")
    channels = [i for i, kind in enumerate(kinds) if kind == CHANNEL and i != batch]
    if not channels:  # channels and positions in one axis, as before a last linear layer
        channels = [
            i for i, axis in enumerate(axes) if i != batch and any(f.kind == CHANNEL for f in axis)
        ][:2]
    if not channels and len(shape) == 2:
        channels = [1 - batch]
    if not channels or len(channels) == len(shape):
        return _unknown(site, shape, "which axis holds the channels")
    names = iter(_letters(len(shape) - len(channels) - 1))
    letters = [
        "b" if i == batch else "c" if i in channels else next(names) for i in range(len(shape))
    ]
    return Layout("".join(letters), merged)


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


def _unknown(site: Site, shape: torch.Size, what: str) -> str:
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


Layouts = Mapping[Site, Layout]
"""Layout of each site."""
