"""Receptive fields of the positions of a site, measured on the network itself.

    receptive_field    put NaN into one pixel after another and look where it arrives

A NaN passes through every convolution, pooling and rectifier, whatever the weights are, so
the measurement needs no knowledge of the layers. A position that no NaN reaches cannot
depend on that pixel; the converse holds up to weights that are exactly zero.
"""

import dataclasses
from contextlib import nullcontext, suppress
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from mechatlas.activations.layouts import layouts_of
from mechatlas.activations.sites import intervene, read_activations
from mechatlas.base import Site, SiteError

PIXELS_AT_ONCE = 1 << 19
"""Pixels in one forward pass."""
LINES = 9
"""Rows and columns of the real input on which the field is checked."""
THIN = (7, 15, 31)
"""Numbers of pixels across the measured axis, tried in turn until the network takes one."""
LARGEST_SIDE = 160
"""Largest input, in pixels, tried to find the ends of a wide field."""


@dataclasses.dataclass(frozen=True)
class ReceptiveField:
    """Receptive field of position p: the pixel `offset + stride * p` and the next `size - 1`.

    Both axes are alike. Pixels outside the input do not exist, so `offset` may be negative.
    `stride` is 0 where every position sees the whole input.
    """

    size: int
    """Pixels seen along one axis."""
    stride: int
    """Pixels between the first pixels of neighboring positions."""
    offset: int
    """First pixel of position 0."""

    def span(
        self, position: Int[np.ndarray, "*n"], side: int
    ) -> tuple[Int[np.ndarray, "*n"], Int[np.ndarray, "*n"]]:
        """First pixel seen and the pixel after the last, cut to an input of `side` pixels."""
        first = self.offset + self.stride * np.asarray(position)
        return np.clip(first, 0, side), np.clip(first + self.size, 0, side)


def receptive_field(network: nn.Module, site: Site, side: int, channels: int = 3) -> ReceptiveField:
    """Measure the receptive field of each position of a site.

    Where positions see the whole input of this size, or where the input has no room for
    a whole field, larger inputs are tried, if the network takes them; their fields must
    agree with the input asked for. A site without a regular square grid, and a site
    that sees the whole of every input, has the whole input as its field.

    Args:
        network: Network of images (batch, channel, side, side) in 0..1. If it has a module
            `input`, NaN is put into the output of that module, which would refuse NaN.
        site: Site whose positions are measured.
        side: Side of the input, in pixels.
        channels: Channels of the input.

    Raises:
        SiteError: No pixel reaches the site.
    """
    lines = np.unique(np.linspace(0, side - 1, LINES).astype(np.int64))
    seen = [_sees(network, site, (side, side), axis, lines, channels) for axis in (0, 1)]
    if any(axis is None for axis in seen):
        return ReceptiveField(side, 0, 0)
    if not _reached(network, site, side, channels):
        raise SiteError(f"No pixel reaches {site}; it does not depend on the input.")
    field = _along(network, site, side, channels)
    if field is None or not all(_allows(field, a, lines, side) for a in seen if a is not None):
        return ReceptiveField(side, 0, 0)
    return field


def _reached(network: nn.Module, site: Site, side: int, channels: int) -> bool:
    with torch.inference_mode():
        plain = torch.full((1, channels, side, side), 0.5, device=_device(network))
        everywhere = torch.ones(1, 1, side, side, dtype=torch.bool, device=plain.device)
        return bool(_with_nan(network, site, plain, everywhere).isnan().any())


def _along(network: nn.Module, site: Site, side: int, channels: int) -> ReceptiveField | None:
    """Receptive field along both axes, from inputs as thin as the network takes."""
    across, thin = _thin(network, site, side, 1, channels)
    down, _ = _thin(network, site, side, 0, channels)
    if across is None or down is None:
        return None
    field = _fit(across)
    if field is not None or _fit(down) is not None:
        return field if field == _fit(down) else None
    for length in (side + 32, side + 96):
        if length > LARGEST_SIDE:
            break
        try:
            wide = _sees(network, site, (thin, length), 1, np.arange(length), channels)
        except (RuntimeError, ValueError):  # a network for one size of input only
            break
        field = _fit(wide) if wide is not None else None
        if field is not None:
            return field
    return None


def _thin(
    network: nn.Module, site: Site, side: int, axis: Literal[0, 1], channels: int
) -> tuple[Bool[np.ndarray, "position pixel"] | None, int]:
    """Pixels seen along one axis, and the pixels of the inputs across it."""
    for thin in (t for t in THIN if t < side):
        sides = (side, thin) if axis == 0 else (thin, side)
        with suppress(RuntimeError, ValueError):  # too thin, or a network for squares only
            return _sees(network, site, sides, axis, np.arange(side), channels), thin
    return _sees(network, site, (side, side), axis, np.arange(side), channels), side


def _device(network: nn.Module) -> torch.device:
    return next((p.device for p in network.parameters()), torch.device("cpu"))


def _sees(
    network: nn.Module,
    site: Site,
    sides: tuple[int, int],
    axis: Literal[0, 1],
    lines: Int[np.ndarray, " line"],
    channels: int,
) -> Bool[np.ndarray, "position line"] | None:
    """Whether each position sees each row (axis 0) or column (1); None if not a map."""
    plain = torch.full((1, channels, *sides), 0.5, device=_device(network))
    one_hot = torch.eye(sides[axis], device=plain.device, dtype=torch.bool)[lines]
    parts = []
    # Other ways of computing a convolution mix neighboring outputs and would spread the NaN.
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=False):
        for piece in one_hot.split(max(1, PIXELS_AT_ONCE // (sides[0] * sides[1]))):
            where = piece[:, None, :, None] if axis == 0 else piece[:, None, None, :]
            rows = _with_nan(network, site, plain, where)
            if rows.ndim != 4:
                return None
            parts.append(rows.isnan().any(dim=-1).any(dim=2 - axis))
    return torch.cat(parts).T.cpu().numpy()


def _with_nan(
    network: nn.Module,
    site: Site,
    plain: Float[Tensor, "1 channel h w"],
    where: Bool[Tensor, "batch 1 _h _w"],
) -> Shaped[Tensor, "batch ..."]:
    """Activations (batch, positions, channel) at a site for inputs with NaN at some pixels."""
    layout = layouts_of(network, plain, [site])[site]

    def put(x: Tensor) -> Tensor:
        return x.masked_fill(where, torch.nan)

    inputs = plain.expand(len(where), -1, -1, -1)
    guard = dict(network.named_children()).get("input")
    with intervene(network, {Site("input"): put}) if guard is not None else nullcontext():
        given = inputs if guard is not None else put(inputs)
        return layout.rows(read_activations(network, given, [site])[site])


def _fit(sees: Bool[np.ndarray, "position pixel"]) -> ReceptiveField | None:
    """Regular field of the positions that see most; None if fewer than two are uncut."""
    first, last = _ends(sees)
    size = int((last - first).max()) + 1
    full = np.flatnonzero((last - first + 1 == size) & (first >= 0))
    if len(full) < 2:
        return None
    stride = int(first[full[1]] - first[full[0]])
    field = ReceptiveField(size, stride, int(first[full[0]] - stride * full[0]))
    # Neighbors of equal size that both start at the edge are cut at both ends.
    return field if stride > 0 and full[1] == full[0] + 1 and _explains(field, sees) else None


def _ends(sees: Bool[np.ndarray, "position pixel"]) -> tuple[np.ndarray, np.ndarray]:
    """First and last pixel seen by each position; -1 and -2 where it sees none."""
    reached = sees.any(axis=1)
    first = np.where(reached, sees.argmax(axis=1), -1)
    last = np.where(reached, sees.shape[1] - 1 - sees[:, ::-1].argmax(axis=1), -2)
    return first, last


def _explains(field: ReceptiveField, sees: Bool[np.ndarray, "position pixel"]) -> bool:
    """Whether uncut fields are exactly as seen, and cut fields hold all pixels seen.

    (A dilated convolution has holes, so a cut field may hold more.)
    """
    side = sees.shape[1]
    first, last = _ends(sees)
    begin, end = field.span(np.arange(len(sees)), side)
    uncut = end - begin == field.size
    exact = (first == begin) & (last == end - 1)
    return bool(exact[uncut].all()) and _allows(field, sees, np.arange(side), side)


def _allows(
    field: ReceptiveField,
    sees: Bool[np.ndarray, "position line"],
    lines: Int[np.ndarray, " line"],
    side: int,
) -> bool:
    """Check that no position sees anything outside its field."""
    begin, end = field.span(np.arange(len(sees)), side)
    outside = (lines < begin[:, None]) | (lines >= end[:, None])
    return not (sees & outside).any()
