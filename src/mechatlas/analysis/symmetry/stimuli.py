"""Synthetic stimuli in all orientations and mirrors, as in studies of curve detectors.

    draw_stimuli    edges, lines, curves, gratings, centers, colors, corners -> images
    Stimuli         the images, what each shows, and in which pose

Each stimulus is drawn anew for every pose, by formula, so that no pose is interpolated. All lie
about one point of the image and are as large as the receptive field asks. All but corners are
their own mirror images, so that their mirrored poses are the same images.

Source: Cammarata et al., Curve detectors (Distill, 2020), for responses to synthetic stimuli.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mechatlas.maths.groups import Group
from mechatlas.maths.named_groups import dihedral

KINDS = ("edge", "line", "curve", "grating", "center-surround", "color", "corner")
"""Kinds of stimuli."""
_COLORS = {
    "black": (0.0, 0.0, 0.0), "white": (1.0, 1.0, 1.0), "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.7, 0.1), "blue": (0.1, 0.2, 0.9), "yellow": (0.9, 0.9, 0.1),
    "cyan": (0.1, 0.8, 0.8), "magenta": (0.8, 0.1, 0.8), "dark": (0.3, 0.3, 0.3),
    "light": (0.7, 0.7, 0.7), "gray": (0.5, 0.5, 0.5), "orange": (0.9, 0.5, 0.1),
}  # fmt: skip
SOFT = 0.5
"""Half the width of the border between two colors, in pixels."""

Plane = Float[np.ndarray, "side side"]
Weight = Callable[[Plane, Plane, float], Plane]
"""Function of coordinates to the right and upwards, in pixels, and the radius of the receptive
field in pixels: the weight of the first of two colors."""


class Variant(NamedTuple):
    """One stimulus in its first pose."""

    kind: str
    name: str
    colors: tuple[str, str]
    weight: Weight
    turns: bool = True
    """Whether it changes when it is turned."""
    mirrors: bool = False
    """Whether its mirror image is another image than it is itself."""


@dataclasses.dataclass(frozen=True, eq=False)
class Stimuli:
    """Images of stimuli, and the image of each stimulus in each pose."""

    images: Float[np.ndarray, "image 3 side side"]
    """Colors in 0..1."""
    kinds: tuple[str, ...]
    """Kind of each stimulus."""
    names: tuple[str, ...]
    """Description of each stimulus."""
    image_of: Int[np.ndarray, "stimulus pose"]
    """Image that shows a stimulus in a pose."""
    group: Group
    """Dihedral group of the poses: pose r^k is turned k times counter-clockwise, r^k s is first
    mirrored left and right."""


def _step(x: Plane) -> Plane:
    """Rise from 0 to 1 at 0, over about one pixel."""
    return np.clip(0.5 + x / (2 * SOFT), 0.0, 1.0)


def _edge(softness: float) -> Weight:
    return lambda u, v, r: np.clip(0.5 + v / max(2 * softness * r, 2 * SOFT), 0.0, 1.0)


def _line(width: float) -> Weight:
    return lambda u, v, r: _step(width * r / 2 - np.abs(u))


def _curve(radius: float, width: float = 0.15) -> Weight:
    """Arc through the middle whose center lies above; it ends a quarter of a turn to each side."""

    def weight(u: Plane, v: Plane, r: float) -> Plane:
        distance = np.abs(np.hypot(u, v - radius * r) - radius * r)
        return _step(width * r / 2 - distance) * _step(radius * r - v)

    return weight


def _round_edge(radius: float) -> Weight:
    return lambda u, v, r: _step(radius * r - np.hypot(u, v - radius * r))


def _grating(wavelength: float, phase: float) -> Weight:
    return lambda u, v, r: 0.5 + 0.5 * np.cos(2 * np.pi * v / (wavelength * r) + phase)


def _disc(radius: float) -> Weight:
    return lambda u, v, r: _step(radius * r - np.hypot(u, v))


def _corner(long: float, short: float, width: float = 0.2) -> Weight:
    """Two arms of different length, upwards and to the right, which meet in the middle."""

    def arm(along: Plane, across: Plane, length: float, r: float) -> Plane:
        half = width * r / 2
        return _step(half - np.abs(across)) * _step(length * r - along) * _step(along + half)

    return lambda u, v, r: np.maximum(arm(v, u, long, r), arm(u, v, short, r))


def _variants() -> Iterator[Variant]:
    contrasts = (("black", "white"), ("white", "black"))
    for a, b in (
        ("white", "black"), ("light", "dark"), ("red", "green"), ("blue", "yellow"),
        ("orange", "blue"), ("magenta", "green"),
    ):  # fmt: skip
        yield Variant("edge", f"edge of {a} and {b}", (a, b), _edge(0.0))
    yield Variant("edge", "soft edge of white and black", ("white", "black"), _edge(0.4))
    yield Variant("edge", "soft edge of red and green", ("red", "green"), _edge(0.4))
    for a, b in contrasts:
        for width in (0.12, 0.25, 0.5):
            yield Variant("line", f"{a} line on {b}, width {width}", (a, b), _line(width))
        for radius in (0.4, 0.8, 1.6):
            yield Variant("curve", f"{a} curve on {b}, radius {radius}", (a, b), _curve(radius))
            yield Variant("curve", f"{a} disc on {b}, radius {radius}", (a, b),
                          _round_edge(radius))  # fmt: skip
        for radius in (0.25, 0.5, 0.8):
            yield Variant("center-surround", f"{a} center on {b}, radius {radius}", (a, b),
                          _disc(radius), turns=False)  # fmt: skip
        yield Variant("corner", f"{a} corner on {b}", (a, b), _corner(0.9, 0.4), mirrors=True)
    yield Variant("line", "red line on gray, width 0.25", ("red", "gray"), _line(0.25))
    yield Variant("line", "blue line on gray, width 0.25", ("blue", "gray"), _line(0.25))
    for wavelength in (0.3, 0.6, 1.2):
        for phase, middle in ((0.0, "light"), (np.pi, "dark"), (-np.pi / 2, "border")):
            yield Variant("grating", f"grating, wavelength {wavelength}, {middle} in the middle",
                          ("white", "black"), _grating(wavelength, phase))  # fmt: skip
    yield Variant("grating", "grating of red and green", ("red", "green"), _grating(0.6, 0.0))
    for a, b in (("red", "green"), ("green", "red"), ("blue", "yellow"), ("yellow", "blue")):
        yield Variant("center-surround", f"{a} center on {b}", (a, b), _disc(0.5), turns=False)
    for a in _COLORS:
        yield Variant("color", a, (a, a), _disc(1.0), turns=False)


def draw_stimuli(
    side: int, center: tuple[float, float], radius: float, n_angles: int = 16
) -> Stimuli:
    """Draw all stimuli in all poses.

    Args:
        side: Side of the images, in pixels.
        center: Row and column of the point about which stimuli are turned, in pixels.
        radius: Radius of the receptive field, in pixels.
        n_angles: Orientations around the full circle.
    """
    group = dihedral(n_angles)
    rows, columns = np.mgrid[:side, :side].astype(np.float64)
    right, up = columns - center[1], center[0] - rows
    images, image_of, variants = [], [], list(_variants())
    for variant in variants:
        first, second = (np.array(_COLORS[c])[:, None, None] for c in variant.colors)
        index = np.empty(group.order, int)
        for pose in range(group.order):
            turn, mirrored = pose % n_angles, pose >= n_angles
            if pose and not variant.turns:
                index[pose] = index[0]
            elif mirrored and not variant.mirrors:
                index[pose] = index[turn]
            else:
                angle = 2 * np.pi * turn / n_angles
                u = np.cos(angle) * right + np.sin(angle) * up
                v = np.cos(angle) * up - np.sin(angle) * right
                weight = variant.weight(-u if mirrored else u, v, radius)
                index[pose] = len(images)
                images.append((first * weight + second * (1 - weight)).astype(np.float32))
        image_of.append(index)
    return Stimuli(
        np.stack(images), tuple(v.kind for v in variants), tuple(v.name for v in variants),
        np.stack(image_of), group,
    )  # fmt: skip
