"""Activations of every pose of an input, side by side.

    Posing          the recipe: which group, acting how
    action_of       the recipe -> an action
    places_of       an action, a network and a site -> which positions can be kept, and where each
                    of them is in every pose
    read_pose       pose inputs by one element and read the sites

A row holds a(gI) for every element g, element by element, of one place of the input: the map of
gI is read where g takes the place. Kept are the places that see nothing but the input in every
pose: what a position sees is measured on the network, and must stay inside the image, or inside
its inscribed circle if the action interpolates. No posed input is ever stored.
"""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechatlas.activations.receptive import ReceptiveField, receptive_field
from mechatlas.activations.sites import channels_last, grid_of, read_activations
from mechatlas.base import InputError, Site, UserError
from mechatlas.maths.actions import (
    REACH,
    Action,
    Custom,
    Hue,
    Rotate,
    Scale,
    Shift,
    corners_of,
    grid_points,
    law_error,
)
from mechatlas.maths.groups import GroupError
from mechatlas.maths.named_groups import group

ACTIONS = {"rotate": Rotate, "hue": Hue, "shift": Shift, "scale": Scale}
LAW = 0.1
"""Largest breach of the group's law that is taken from a user's action, as a share of the
spread of the inputs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoseConfig:
    """Every input in all poses of a finite group, whose activations then stand side by side."""

    name: str
    """The group: "D4" (quarter-turns and mirrors, order 8), "D16" (order 32), "C6", ..."""
    action: str = "rotate"
    """rotate, hue, shift, scale, or `package.module:function`, called as f(element, inputs)."""
    matched_blur: bool = False
    """A control: turn every image too far and back, so that all poses, the first too, are as
    blurred by interpolation. Only for turns that interpolate."""

    def __post_init__(self) -> None:
        built = group(self.name)
        if self.action in ACTIONS:
            action = ACTIONS[self.action](built)
            if self.matched_blur and not isinstance(action, Rotate):
                raise ValueError(f"matched_blur is for action = 'rotate', got {self.action!r}.")
            if self.matched_blur and not action.masks:
                raise ValueError(f"matched_blur has nothing to match: {self.name} is exact.")
        elif ":" not in self.action:
            raise ValueError(
                f"action must be {', '.join(ACTIONS)} or package.module:function, got "
                f"{self.action!r}."
            )
        elif self.matched_blur:
            raise ValueError(f"matched_blur is for action = 'rotate', got {self.action!r}.")


def action_of(posing: PoseConfig) -> Action:
    """The action that a recipe asks for.

    Raises:
        UserError: There is no such function.
    """
    built = group(posing.name)
    if posing.matched_blur:
        return _Matched(built)
    if posing.action in ACTIONS:
        return ACTIONS[posing.action](built)
    module, _, name = posing.action.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise UserError(
            f"There is no function {posing.action!r} to act with ({error}). Is its folder on "
            "PYTHONPATH?"
        ) from error
    return Custom(built, function, name=posing.action)


class _Matched(Rotate):
    """Turns that are all as blurred."""

    def act(self, element: int, x: Float[Tensor, "*batch h w"]) -> Float[Tensor, "*batch h w"]:
        return self.matched(element, x)


def described(action: Action) -> dict[str, Any]:
    """What a manifest says of an action."""
    return {
        "name": action.group.name,
        "table": action.group.table.tolist(),
        "elements": list(action.group.element_names),
        "action": action.name,
        "closes": action.closes,
        "exact": [action.exact(g) for g in range(action.group.order)],
        "matched_blur": isinstance(action, _Matched),
    }


def refuse_lawless(action: Action, inputs: Tensor) -> None:
    """Check an action that is not ours on real inputs.

    Raises:
        GroupError: The identity is not element 0, or the group's law does not hold.
    """
    if action.group.identity != 0:
        raise GroupError(
            f"{action.group.name} has its identity at {action.group.identity}; a store needs it "
            "at 0. `Group.relabel` moves it."
        )
    if not isinstance(action, Custom):
        return
    error, (g, h) = law_error(action, inputs)
    if error > LAW:
        raise GroupError(
            f"{action.name} does not act as {action.group.name}: element {g} after {h} differs "
            f"from element {action.group.table[g, h]} by {error:.0%} of the spread of the inputs."
        )


class Places(NamedTuple):
    """The places of a site that are kept, and where they are in every pose."""

    kept: Int[Tensor, " place"]
    """Flat positions, ascending; those of an untransformed input."""
    parts: Int[Tensor, "element place 4"]
    """Flat positions of the posed map that make up the place."""
    weight: Float[Tensor, "element place 4"]
    """Their weights; the first is 1 where the place is a position."""

    def take(
        self,
        element: int,
        activations: Float[Tensor, "batch position d"],
        chosen: Int[Tensor, "batch row"],
    ) -> Float[Tensor, "batch row d"]:
        """Activations at some of the kept places.

        Args:
            element: Whose map it is.
            activations: The map.
            chosen: Numbers of kept places, for each sample.
        """
        parts, weight = self.parts[element], self.weight[element]
        corners = 1 if not (weight[:, 1:] != 0).any() else 4
        d = activations.shape[-1]
        out = torch.zeros(*chosen.shape, d, dtype=activations.dtype, device=activations.device)
        for corner in range(corners):
            at = parts[chosen, corner][..., None].expand(-1, -1, d)
            part = activations.gather(1, at)
            if corners == 1:
                return part
            out += part * weight[chosen, corner][..., None]
        return out


def places_of(action: Action, network: nn.Module, site: Site, inputs: Tensor) -> Places:
    """Which places of a site can be kept.

    Args:
        action: How the group acts.
        network: Its receptive field at the site is measured, if places move.
        site: Where to read.
        inputs: A batch of one input.

    Raises:
        InputError: No place is left, or poses do not take positions to positions; says which
            side of the input would do.
    """
    with torch.inference_mode():
        activation = read_activations(network, inputs, [site])[site]
    grid, side = grid_of(activation), inputs.shape[-1]
    if not action.moves_places:
        every = np.arange(grid[0] * grid[1])
        return _places(
            every, np.broadcast_to(grid_points(*grid), (action.group.order, len(every), 2)), grid
        )
    if inputs.ndim != 4:  # tokens
        tokens = grid_points(1, grid[0])
        moved = np.stack([action.moved(g, tokens, side) for g in range(action.group.order)])
        return _places(np.arange(grid[0]), moved[..., ::-1], grid)
    if activation.ndim != 4:
        if action.masks:
            raise InputError(
                f"Every unit of {site} sees the whole image, also outside its inscribed circle; "
                f"{action.group.name} can only be used at maps, whose positions see less."
            )
        return _places(np.zeros(1, np.int64), np.zeros((action.group.order, 1, 2)), grid)
    field = receptive_field(network, site, side, inputs.shape[1])
    found = _kept(action, field, grid, side)
    if isinstance(found, str):
        hint = _better_side(action, network, site, field, inputs)
        raise InputError(f"{found.format(site=site, side=side, group=action.group.name)} {hint}")
    return found


def _places(kept: np.ndarray, moved: np.ndarray, grid: tuple[int, int]) -> Places:
    corners = [corners_of(points, grid) for points in moved]
    index = np.stack([c.index for c in corners])
    weight = np.stack([c.weight for c in corners]).astype(np.float32)
    return Places(torch.from_numpy(kept), torch.from_numpy(index), torch.from_numpy(weight))


def _kept(action: Action, field: ReceptiveField, grid: tuple[int, int], side: int) -> Places | str:
    """The places kept, or why there are none, with room for names."""
    if field.stride == 0:
        return (
            "Every position of {site} sees the whole of an image of side {side}, so that none "
            "can be followed from pose to pose."
        )
    if not action.keeps_neighbors and field.size > 1:
        return "Positions of {site} see several pixels, which {group} scatters."
    positions = grid_points(*grid)
    centre = field.offset + (field.size - 1) / 2
    pixels = positions * field.stride + centre
    sees_inside = _inside(action, pixels, field, side)
    kept = np.ones(len(positions), bool)
    moved = []
    for g in range(action.group.order):
        points = (action.moved(g, pixels, side) - centre) / field.stride
        if action.exact(g) and np.abs(points - np.round(points)).max() > 1e-6:
            return (
                "On an image of side {side}, {group} does not take the positions of {site} to "
                "positions: they do not lie evenly about its middle, or a step is no multiple of "
                "their distance."
            )
        corners = corners_of(points, grid)
        whole = np.abs(corners.weight.sum(axis=1) - 1) < 1e-9
        kept &= whole & (sees_inside[corners.index] | (corners.weight == 0)).all(axis=1)
        moved.append(points)
    if not kept.any():
        where = "inscribed circle" if action.masks else "inside"
        return (
            f"No position of {{site}} sees only the {where} of an image of side {{side}} in all "
            f"poses of {{group}} (it sees {field.size} pixels)."
        )
    return _places(np.flatnonzero(kept), np.stack(moved)[:, kept], grid)


def _inside(
    action: Action, pixels: Float[np.ndarray, "n 2"], field: ReceptiveField, side: int
) -> Bool[np.ndarray, " n"]:
    """Whether all that the positions centred on some pixels see belongs to the input."""
    reach = (field.size - 1) / 2
    farthest = np.abs(pixels - (side - 1) / 2) + reach
    if action.masks:
        return np.hypot(farthest[:, 0], farthest[:, 1]) <= (side - 1) / 2 - REACH
    return farthest.max(axis=1) <= (side - 1) / 2


def _better_side(
    action: Action, network: nn.Module, site: Site, field: ReceptiveField, inputs: Tensor
) -> str:
    """What side would do, for an error's end."""
    side, channels = inputs.shape[-1], inputs.shape[1]
    for other in range(side + 1, side + 2 * field.size + 40 if field.stride else side):
        try:
            with torch.inference_mode():
                plain = torch.full((1, channels, other, other), 0.5)
                grid = grid_of(read_activations(network, plain, [site])[site])
            if isinstance(_kept(action, field, grid, other), str):
                continue
            measured = receptive_field(network, site, other, channels)
            if not isinstance(_kept(action, measured, grid, other), str):
                return f"Images of side {other} would do: `side = {other}` in [samples]."
        except (RuntimeError, ValueError):  # a network for one size of input only
            break
    return "No larger side was found that would do; choose an earlier site."


def paired_places(
    places: dict[Site, Places], grids: dict[Site, tuple[int, int]]
) -> dict[Site, Places]:
    """The places of the first site that can be kept at every site, in the same order at all.

    Raises:
        InputError: There are none.
    """
    first = next(iter(places))
    h, w = grids[first]
    kept = places[first].kept
    y, x = (kept // w + 0.5) / h, (kept % w + 0.5) / w
    numbers, good = {}, torch.ones_like(kept, dtype=torch.bool)
    for site, its in places.items():
        its_h, its_w = grids[site]
        number = torch.full((its_h * its_w,), -1, device=kept.device)
        number[its.kept] = torch.arange(len(its.kept), device=kept.device)
        numbers[site] = number[(y * its_h).long() * its_w + (x * its_w).long()]
        good &= numbers[site] >= 0
    if not good.any():
        raise InputError(
            f"No place can be kept at all of {', '.join(map(str, places))} in every pose; collect "
            "them without `paired`, or with larger images."
        )
    return {
        site: Places(its.kept[n], its.parts[:, n], its.weight[:, n])
        for site, its in places.items()
        for n in [numbers[site][good]]
    }


def read_pose(
    network: nn.Module, action: Action, element: int, inputs: Tensor, sites: Sequence[Site]
) -> dict[Site, Float[Tensor, "batch position d"]]:
    """Activations of one pose of some inputs."""
    found = read_activations(network, action(element, inputs), sites)
    rows = {site: channels_last(activation) for site, activation in found.items()}
    return {site: r.reshape(len(inputs), -1, r.shape[-1]) for site, r in rows.items()}
