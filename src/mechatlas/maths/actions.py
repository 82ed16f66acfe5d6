"""Actions of finite groups on inputs: rotations, mirrors, hues, shifts, or your own.

    Rotate     turns and mirrors of square images: C_n, D_n
    Hue        turns (and mirrors) of the color wheel: C_n, D_n
    Shift      cyclic shifts along the last axis: C_n
    Scale      zooming in by equal factors: labeled by C_n, but not a group of order n
    Custom     a function of an element and inputs

An action is called as `action(g, x)` and gives gx, so `action(g, action(h, x))` is
`action(g*h, x)`: exactly where no value is interpolated, else to the error of interpolating.
With `a` the activations of a network, the rows of a group store hold x(I)_g = a(gI), so those
of a posed input are x(hI)_g = a(g*h*I) = x(I)_gh.

What acts on places moves the content at p to `moved(g, p)`. `pull_back(g, maps)` reads a map
there, so that a position of the result means the same content for every g.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional

from mechatlas.base import InputError
from mechatlas.maths.groups import Group, GroupError
from mechatlas.maths.named_groups import cyclic, dihedral

Array = TypeVar("Array", np.ndarray, Tensor)
Points = Float[np.ndarray, "n 2"]
"""Points as (y, x), in pixels or positions; the second alone counts along an only axis."""
ON_GRID = 1e-6
"""Distance to a position below which a point is that position."""
REACH = 3.0
"""Pixels around a place that interpolating there may read, rounded up."""


class Action(abc.ABC):
    """Action of the elements of a group on a batch of inputs; the first axis counts inputs.

    Deterministic, and the same for each sample whatever the others are.
    """

    group: Group
    name: str
    """Name of the action in a recipe."""
    moves_places = False
    """Whether the content of one place goes to another."""
    masks = False
    """Whether only what is inside the inscribed circle of an image is kept."""
    keeps_neighbors = True
    """Whether what lies together moves together."""
    closes = True
    """Whether action(g, action(h, x)) is action(g*h, x) for all g and h."""
    needs_squares = False
    """Whether images and maps must be square."""

    @abc.abstractmethod
    def act(self, element: int, x: Shaped[Tensor, "batch ..."]) -> Tensor:
        """Apply an element to inputs."""

    def __call__(self, element: int, x: Array) -> Array:
        """Apply an element to numpy or torch inputs.

        Raises:
            GroupError: There is no such element.
            InputError: The group cannot act on inputs of this shape.
        """
        if not 0 <= element < self.group.order:
            raise GroupError(
                f"{element} is not an element of {self.group.name}; its labels are 0 to "
                f"{self.group.order - 1}."
            )
        if isinstance(x, Tensor):
            return self.act(element, x)
        return self.act(element, torch.from_numpy(np.ascontiguousarray(x))).numpy()

    def exact(self, element: int) -> bool:
        """Whether an element only moves numbers, and computes none."""
        del element
        return True

    def moved(self, element: int, points: Points, side: int) -> Points:
        """Compute the points to which content of some points goes, in inputs `side` long.

        Args:
            element: Element of the group.
            points: Points (x, y) of an input.
            side: Side of the input.
        """
        del element, side
        return points

    def pull_back(self, element: int, maps: Array) -> Array:
        """Read maps (..., h, w) of the posed input so that places mean the same as before.

        Position p of the result is `maps` at `moved(element, p)`: a number of the map where that
        is a position, else interpolated linearly between four; 0 where it is outside the map.

        Raises:
            InputError: The maps are not square, but the action needs them to be.
        """
        h, w = maps.shape[-2:]
        if self.needs_squares and h != w:
            raise InputError(f"{self.name} needs square maps, got {h} x {w}.")
        points = grid_points(h, w)
        corners = corners_of(self.moved(element, points, w), (h, w))
        if isinstance(maps, np.ndarray):
            flat = maps.reshape(*maps.shape[:-2], h * w)[..., corners.index]
            weight: Any = corners.weight.astype(maps.dtype)
        else:
            flat = maps.reshape(*maps.shape[:-2], h * w)[..., torch.from_numpy(corners.index)]
            weight = torch.from_numpy(corners.weight).to(maps)
        if (corners.weight[:, 1:] == 0).all():
            return (flat[..., 0] * weight[:, 0]).reshape(maps.shape)
        return (flat * weight).sum(-1).reshape(maps.shape)


@dataclasses.dataclass(frozen=True)
class Corners:
    """Points as weighted sums of positions of a grid; a point outside has no weight."""

    index: Int[np.ndarray, "n 4"]
    """Flat positions. The first is the position itself where the place is one."""
    weight: Float[np.ndarray, "n 4"]


def grid_points(h: int, w: int) -> Points:
    """List the positions of a grid, row by row."""
    y, x = np.indices((h, w), np.float64)
    return np.stack([y.ravel(), x.ravel()], axis=1)


def corners_of(points: Points, grid: tuple[int, int]) -> Corners:
    """Interpolate linearly between the positions of a grid."""
    h, w = grid
    nearest = np.round(points)
    points = np.where(np.abs(points - nearest) < ON_GRID, nearest, points)
    low = np.floor(points)
    share = points - low
    index, weight = [], []
    for dy in (0, 1):
        for dx in (0, 1):
            y, x = low[:, 0] + dy, low[:, 1] + dx
            its = (share[:, 0] if dy else 1 - share[:, 0]) * (
                share[:, 1] if dx else 1 - share[:, 1]
            )
            inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)
            weight.append(np.where(inside, its, 0.0))
            index.append(np.where(inside & (its > 0), y * w + x, 0).astype(np.int64))
    return Corners(np.stack(index, axis=1), np.stack(weight, axis=1))


class Rotate(Action):
    """Rotations of square images, and their mirror images: C_n or D_n.

    Element r^k turns by k/n of a circle, counter-clockwise as images are shown; r^k s first
    mirrors left and right. Quarter-turns and mirrors of them move pixels; other turns
    interpolate (cubic, clipped to the range of the image), and then for every element what is
    outside the inscribed circle is 0.

    Raises:
        GroupError: The group is not C_n or D_n, in the order of `named_groups`.
    """

    name = "rotate"
    moves_places = True
    needs_squares = True

    def __init__(self, group: Group) -> None:
        self.group = group
        self.n, _ = _turns_of(group, self.name)
        self.masks = not all(self.exact(g) for g in range(group.order))

    def exact(self, element: int) -> bool:
        """Tell whether an element is a quarter-turn, or the mirror image of one."""
        return 4 * (element % self.n) % self.n == 0

    def act(self, element: int, x: Shaped[Tensor, "*batch h w"]) -> Shaped[Tensor, "*batch h w"]:
        """Rotate, and mask if any element interpolates.

        Raises:
            InputError: The images are not square.
        """
        _refuse_unless_square(x, self.name)
        turned = self._turned(x, element)
        return turned * _circle(x.shape[-1]).to(x) if self.masks else turned

    def _turned(self, x: Tensor, element: int) -> Tensor:
        k, mirrored = element % self.n, element >= self.n
        if self.exact(element):
            turned = x.flip(-1) if mirrored else x
            return torch.rot90(turned, 4 * k // self.n, dims=(-2, -1))
        side = x.shape[-1]
        source = self.moved(int(self.group.inverses[element]), grid_points(side, side), side)
        return _cubic(x, source)

    def matched(self, element: int, x: Float[Tensor, "*batch h w"]) -> Float[Tensor, "*batch h w"]:
        """Rotate by half a step too far, a whole one more, and back, so that all are blurred alike.

        Nothing is exact then, not even the identity: what still differs between quarter-turns
        and other turns is not the work of interpolation. (Only there and back would meet the
        pixels again, and blur those less that need no turn between.)

        Raises:
            InputError: The images are not square.
        """
        _refuse_unless_square(x, self.name)
        side, half = x.shape[-1], np.pi / self.n
        points, middle = grid_points(side, side), (side - 1) / 2
        # First the part of the turn that moves pixels, so that the rest is alike.
        k, mirrored = element % self.n, element >= self.n
        quarters = 4 * k // self.n
        turned = torch.rot90(x.flip(-1) if mirrored else x, quarters, dims=(-2, -1))
        rest = 2 * np.pi * k / self.n - quarters * np.pi / 2
        for angle in (rest + half, 2 * half, -3 * half):
            turned = _cubic(turned, _rotated(points - middle, -angle) + middle)
        return turned * _circle(side).to(x)

    def moved(self, element: int, points: Points, side: int) -> Points:
        """Rotate points about the middle."""
        middle = (side - 1) / 2
        centered = points - middle
        if element >= self.n:
            centered = centered * [1.0, -1.0]
        return _rotated(centered, 2 * np.pi * (element % self.n) / self.n) + middle


class Hue(Action):
    """Rotations of the color wheel of images with three channels (axis -3): C_n, with mirrors D_n.

    r^k adds k/n of a circle to the hue and leaves saturation and value as they are, so that
    colors stay in 0..1; the mirror exchanges green and blue. Thirds of a circle move channels;
    others compute, to rounding.

    Raises:
        GroupError: The group is not C_n or D_n, in the order of `named_groups`.
    """

    name = "hue"

    def __init__(self, group: Group) -> None:
        self.group = group
        self.n, _ = _turns_of(group, self.name)

    def exact(self, element: int) -> bool:
        """Tell whether an element only moves channels."""
        return 3 * (element % self.n) % self.n == 0

    def act(
        self, element: int, x: Shaped[Tensor, "*batch c h w"]
    ) -> Shaped[Tensor, "*batch c h w"]:
        """Change the hues.

        Raises:
            InputError: There are not three channels.
        """
        if x.ndim < 3 or x.shape[-3] != 3:
            raise InputError(f"hue acts on images with three channels, got shape {tuple(x.shape)}.")
        k, mirrored = element % self.n, element >= self.n
        x = x[..., [0, 2, 1], :, :] if mirrored else x
        if self.exact(element):
            return x.roll(3 * k // self.n, dims=-3) if k else x
        value, low = x.amax(dim=-3), x.amin(dim=-3)
        chroma = value - low
        red, green, blue = x.unbind(dim=-3)
        safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
        hue = torch.where(
            value == red,
            (green - blue) / safe,
            torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
        )
        hue = hue + 6 * k / self.n
        channels = []
        for start in (5, 3, 1):
            f = (start + hue) % 6
            channels.append(value - chroma * torch.minimum(f, 4 - f).clamp(0, 1))
        return torch.stack(channels, dim=-3)


class Shift(Action):
    """Cyclic shifts along the last axis (x of images, tokens of texts): C_n.

    Raises:
        GroupError: The group is not C_n, in the order of `named_groups`.
    """

    name = "shift"
    moves_places = True

    def __init__(self, group: Group) -> None:
        self.group = group
        self.n, mirrors = _turns_of(group, self.name)
        if mirrors:
            raise GroupError(f"shift needs a cyclic group, got {group.name}.")

    def act(self, element: int, x: Shaped[Tensor, "batch ..."]) -> Tensor:
        """Shift by `element / n` of the length.

        Raises:
            InputError: The length is not a multiple of n.
        """
        return x.roll(element * self._step(x.shape[-1]), dims=-1)

    def moved(self, element: int, points: Points, side: int) -> Points:
        """Move points to the right, and in again from the left."""
        step = side / self.n
        return np.stack([points[:, 0], (points[:, 1] + element * step) % side], axis=1)

    def _step(self, length: int) -> int:
        if length % self.n:
            raise InputError(
                f"{self.n} cyclic shifts need a length that {self.n} divides, got {length}."
            )
        return length // self.n


class Scale(Action):
    """Zooms into the middle of images by factors step^0, step^1, ..., step^(n-1).

    Scalings are an infinite group, and no finite set of steps is closed under it: C_n only
    labels the steps. Laws of the group hold as long as a product of steps does not wrap round,
    so what an analysis says of wrapped pairs means nothing; `closes` is False.

    Raises:
        GroupError: The group is not C_n, in the order of `named_groups`.
        ValueError: The step is not above 1.
    """

    name = "scale"
    moves_places = True
    needs_squares = True
    closes = False

    def __init__(self, group: Group, *, step: float = 2**0.5) -> None:
        self.group, self.step = group, step
        self.n, mirrors = _turns_of(group, self.name)
        if mirrors:
            raise GroupError(f"scale labels its steps by a cyclic group, got {group.name}.")
        if not step > 1:
            raise ValueError(f"step must be above 1 (zooming in), got {step}.")

    def exact(self, element: int) -> bool:
        """Tell whether an element is the first step, the only exact one."""
        return element == 0

    def act(self, element: int, x: Float[Tensor, "*batch h w"]) -> Float[Tensor, "*batch h w"]:
        """Zoom in.

        Raises:
            InputError: The images are not square.
        """
        _refuse_unless_square(x, self.name)
        side = x.shape[-1]
        middle = (side - 1) / 2
        source = (grid_points(side, side) - middle) * self.step**-element + middle
        return x if element == 0 else _cubic(x, source)

    def moved(self, element: int, points: Points, side: int) -> Points:
        """Move points away from the middle."""
        middle = (side - 1) / 2
        return (points - middle) * self.step**element + middle


class Custom(Action):
    """Action by a function of an element and a batch of inputs.

    Args:
        group: Any group.
        function: Called as `function(element, x)`, gives inputs of the same shape. Where it has an
            attribute `moved`, a function (element, points, side) -> points, it acts on places.
        name: What to call it.
    """

    def __init__(
        self, group: Group, function: Callable[[int, Tensor], Tensor], *, name: str = "custom"
    ) -> None:
        self.group, self.function, self.name = group, function, name
        self._moved = getattr(function, "moved", None)
        self.moves_places = self._moved is not None

    def act(self, element: int, x: Shaped[Tensor, "batch ..."]) -> Tensor:
        """Call the function.

        Raises:
            InputError: It has another shape, or is no tensor.
        """
        out = self.function(element, x)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise InputError(f"{self.name} returned {shape}, expected shape {tuple(x.shape)}.")
        return out

    def exact(self, element: int) -> bool:
        """Tell whether an element is the identity; nothing is known of the others."""
        return element == self.group.identity

    def moved(self, element: int, points: Points, side: int) -> Points:
        """Move points by the function's own `moved`, if there is one."""
        return points if self._moved is None else self._moved(element, points, side)


def law_error(action: Action, x: Shaped[Tensor, "batch ..."]) -> tuple[float, tuple[int, int]]:
    """Measure how far an action is from the law of its group on some inputs, and where.

    Returns:
        The largest root-mean-square difference of action(g, action(h, x)) and action(g*h, x),
        over generators h and all g, as a share of the spread of x; and that g and h.
    """
    group, worst, where = action.group, 0.0, (0, 0)
    posed = {g: action(g, x).double() for g in range(group.order)}
    spread = float((posed[group.identity] - posed[group.identity].mean()).square().mean().sqrt())
    for h in group.generators:
        its = action(h, x)
        for g in range(group.order):
            left = action(g, its).double() - posed[int(group.table[g, h])]
            error = float(left.square().mean().sqrt()) / max(spread, 1e-30)
            if error > worst:
                worst, where = error, (g, h)
    return worst, where


def _turns_of(group: Group, name: str) -> tuple[int, bool]:
    """Find the number of rotations, and whether there are mirrors."""
    n = group.order
    if group == cyclic(n) and group.name != "D1":
        return n, False
    if n % 2 == 0 and group == dihedral(n // 2):
        return n // 2, True
    raise GroupError(
        f"{name} needs a group C_n (turns) or D_n (turns and mirrors, order 2n), with the "
        f"elements in the order of `group('C{n}')`; got {group.name}."
    )


def _refuse_unless_square(x: Tensor, name: str) -> None:
    if x.ndim < 3 or x.shape[-1] != x.shape[-2]:
        raise InputError(f"{name} acts on square images, got shape {tuple(x.shape)}.")


def _rotated(centered: Points, angle: float) -> Points:
    """Rotate points about 0, counter-clockwise where y points down."""
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return centered @ turn


def _circle(side: int) -> Tensor:
    """Mask of the inscribed circle of a square: 1 inside, 0 outside."""
    centered = grid_points(side, side) - (side - 1) / 2
    inside = (centered**2).sum(axis=1) <= ((side - 1) / 2) ** 2 + ON_GRID
    return torch.from_numpy(inside.reshape(side, side))


def _cubic(x: Tensor, source: Points) -> Tensor:
    """Interpolate images at other points, one for each pixel, clipped to the range of each image.

    Source: Keys, Cubic convolution interpolation (1981), with a = -1/2, which is exact for
    quadratic polynomials; torch's own has a = -3/4 and is twenty times less exact.
    """
    h, w = x.shape[-2:]
    low = np.floor(source)
    taps_y, taps_x = (_keys(source[:, axis] - low[:, axis]) for axis in (0, 1))
    y, x_at = (
        np.clip(low[:, axis, None] + np.arange(-1, 3), 0, length - 1)
        for axis, length in ((0, h), (1, w))
    )
    index = (y[:, :, None] * w + x_at[:, None, :]).reshape(-1, 16).astype(np.int64)
    weight = (taps_y[:, :, None] * taps_x[:, None, :]).reshape(-1, 16)
    images = x.reshape(-1, h * w)
    read = functional.embedding_bag(
        torch.from_numpy(index).to(x.device),
        images.T.contiguous(),
        per_sample_weights=torch.from_numpy(weight).to(x),
        mode="sum",
    ).T
    low, high = images.amin(dim=1, keepdim=True), images.amax(dim=1, keepdim=True)
    return torch.clamp(read, low, high).reshape(x.shape)


def _keys(t: Float[np.ndarray, " n"]) -> Float[np.ndarray, "n 4"]:
    """Weights of the four neighbors of points a share t beyond the second."""
    t2, t3 = t * t, t * t * t
    return np.stack(
        [
            -0.5 * t + t2 - 0.5 * t3,
            1 - 2.5 * t2 + 1.5 * t3,
            0.5 * t + 2 * t2 - 1.5 * t3,
            0.5 * (t3 - t2),
        ],
        axis=1,
    )
