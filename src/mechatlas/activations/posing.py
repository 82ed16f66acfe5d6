"""Activations of every pose of an input, side by side.

    PoseConfig      settings: group, and how it acts
    action_of       settings -> an action
    places_of       an action, a network and a site -> places that can be kept in every pose
    read_pose       pose inputs by one element and read the sites
    shape_of        width, grid and branches of a site, in one pose or all

A row holds a(gI) for every element g, element by element, of one place of the input: the map of
gI is read where g takes the place. A place is kept if its receptive field, measured on the
network, stays inside the image in every pose, or inside the inscribed circle if the action
interpolates. No posed input is ever stored.
"""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from mechatlas.activations.branches import branches_of, ends_of, scattered_of
from mechatlas.activations.layouts import Layout, layouts_of
from mechatlas.activations.networks import as_input
from mechatlas.activations.receptive import ReceptiveField, receptive_field
from mechatlas.activations.row_checks import (
    refuse_other_grid,
    refuse_other_width,
    refuse_unreadable,
)
from mechatlas.activations.sites import read_activations
from mechatlas.activations.store_manifest import SiteShape
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

ACTIONS: dict[str, type[Rotate | Hue | Shift | Scale]] = {
    "rotate": Rotate,
    "hue": Hue,
    "shift": Shift,
    "scale": Scale,
}
LAW = 0.1
"""Tolerance for the group law of a user's action, as a fraction of the spread of the inputs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoseConfig:
    """Finite group in whose poses every input is read, and how the group acts."""

    name: str
    """Name of the group: "D4" (quarter-turns and mirrors, order 8), "D16" (order 32), "C6", ..."""
    action: str = "rotate"
    """rotate, hue, shift, scale, or `package.module:function`, called as f(element, inputs)."""
    matched_blur: bool = False
    """Control: turn every image too far and back, so that interpolation blurs all poses alike,
    the first too. Only for turns that interpolate."""

    def __post_init__(self) -> None:
        built = group(self.name)
        if self.action not in ACTIONS and ":" not in self.action:
            raise ValueError(
                f"action must be {', '.join(ACTIONS)} or package.module:function, got "
                f"{self.action!r}."
            )
        action = ACTIONS[self.action](built) if self.action in ACTIONS else None
        if self.matched_blur and not isinstance(action, Rotate):
            raise ValueError(f"matched_blur is for action = 'rotate', got {self.action!r}.")
        if self.matched_blur and not (action and action.masks):
            raise ValueError(f"matched_blur has nothing to match: {self.name} is exact.")


def action_of(settings: PoseConfig) -> Action:
    """Build the action of a group on inputs.

    Raises:
        UserError: There is no such function.
    """
    built = group(settings.name)
    if settings.matched_blur:
        return _MatchedRotate(built)
    if settings.action in ACTIONS:
        return ACTIONS[settings.action](built)
    module, _, name = settings.action.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise UserError(
            f"There is no function {settings.action!r} to act with ({error}). Is its folder on "
            "PYTHONPATH?"
        ) from error
    return Custom(built, function, name=settings.action)


class _MatchedRotate(Rotate):
    """Rotation that blurs every pose alike."""

    def act(self, element: int, x: Float[Tensor, "*batch h w"]) -> Float[Tensor, "*batch h w"]:
        return self.matched(element, x)


def describe_action(action: Action) -> dict[str, Any]:
    """Describe an action in plain values, for a manifest."""
    return {
        "name": action.group.name,
        "table": action.group.table.tolist(),
        "elements": list(action.group.element_names),
        "action": action.name,
        "closes": action.closes,
        "exact": [action.exact(g) for g in range(action.group.order)],
        "matched_blur": isinstance(action, _MatchedRotate),
    }


def refuse_lawless(action: Action, inputs: Shaped[Tensor, "batch ..."]) -> None:
    """Check the group law of a user's action on real inputs.

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
    """Places of a site that are kept, as weighted positions of the map in every pose."""

    kept: Int[Tensor, " place"]
    """Flat positions of the places in the map of an untransformed input, ascending."""
    parts: Int[Tensor, "element place 4"]
    """Flat positions of the posed map between which the place lies."""
    weight: Float[Tensor, "element place 4"]
    """Interpolation weights of the positions; the first is 1 where the place is a position."""

    def take(
        self,
        element: int,
        activations: Float[Tensor, "batch position d"],
        chosen: Int[Tensor, "batch row"],
    ) -> Float[Tensor, "batch row d"]:
        """Interpolate activations at some of the kept places.

        Args:
            element: Element by which the inputs were posed.
            activations: Flat map of the posed inputs.
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


def places_of(
    action: Action, network: nn.Module, site: Site, inputs: Shaped[Tensor, "1 ..."]
) -> Places:
    """Find the places of a site that can be kept in every pose.

    Args:
        action: Action of the group on the inputs.
        network: Network whose receptive field at the site is measured, if places move.
        site: Site to read.
        inputs: Batch of one input.

    Raises:
        InputError: No place is left, or poses do not take positions to positions; names a side
            of the input that would do.
    """
    with torch.inference_mode():
        activation = read_activations(network, inputs, [site])[site]
    layout = layouts_of(network, inputs, [site])[site]
    grid, side = layout.grid(activation), inputs.shape[-1]
    if not action.moves_places:
        every = np.arange(grid[0] * grid[1])
        return _places(
            every, np.broadcast_to(grid_points(*grid), (action.group.order, len(every), 2)), grid
        )
    if inputs.ndim != 4:  # tokens
        tokens = grid_points(1, grid[0])
        moved = np.stack([action.moved(g, tokens, side) for g in range(action.group.order)])
        return _places(np.arange(grid[0]), moved[..., ::-1], grid)
    if len(layout.positions) != 2:
        if action.masks:
            raise InputError(
                f"Every unit of {site} sees the whole image, also outside its inscribed circle; "
                f"{action.group.name} can only be used at maps, whose positions see less."
            )
        return _places(np.zeros(1, np.int64), np.zeros((action.group.order, 1, 2)), grid)
    field = receptive_field(network, site, side, inputs.shape[1])
    places = _kept_places(action, field, grid, side)
    if isinstance(places, str):
        hint = _better_side(action, network, site, field, inputs)
        raise InputError(f"{places.format(site=site, side=side, group=action.group.name)} {hint}")
    return places


def _places(
    kept: Int[np.ndarray, " place"],
    moved: Float[np.ndarray, "element place 2"],
    grid: tuple[int, int],
) -> Places:
    corners = [corners_of(points, grid) for points in moved]
    index = np.stack([c.index for c in corners])
    weight = np.stack([c.weight for c in corners]).astype(np.float32)
    return Places(torch.from_numpy(kept), torch.from_numpy(index), torch.from_numpy(weight))


def _kept_places(
    action: Action, field: ReceptiveField, grid: tuple[int, int], side: int
) -> Places | str:
    """Find the places that are kept, or say why there are none, as a template with names."""
    if field.stride == 0:
        return (
            "Every position of {site} sees the whole of an image of side {side}, so that none "
            "can be followed from pose to pose."
        )
    if not action.keeps_neighbors and field.size > 1:
        return "Positions of {site} see several pixels, which {group} scatters."
    positions = grid_points(*grid)
    center = field.offset + (field.size - 1) / 2
    pixels = positions * field.stride + center
    sees_inside = _inside(action, pixels, field, side)
    kept = np.ones(len(positions), bool)
    moved = []
    for g in range(action.group.order):
        points = (action.moved(g, pixels, side) - center) / field.stride
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
    """Whether receptive fields centered on some pixels lie inside the input."""
    reach = (field.size - 1) / 2
    farthest = np.abs(pixels - (side - 1) / 2) + reach
    if action.masks:
        return np.hypot(farthest[:, 0], farthest[:, 1]) <= (side - 1) / 2 - REACH
    return farthest.max(axis=1) <= (side - 1) / 2


def _better_side(
    action: Action,
    network: nn.Module,
    site: Site,
    field: ReceptiveField,
    inputs: Float[Tensor, "1 channel h w"],
) -> str:
    """Sentence for the end of an error: a larger side of the input that would do."""
    side, channels = inputs.shape[-1], inputs.shape[1]
    for other in range(side + 1, side + 2 * field.size + 40 if field.stride else side):
        try:
            with torch.inference_mode():
                plain = torch.full((1, channels, other, other), 0.5)
                layout = layouts_of(network, plain, [site])[site]
                grid = layout.grid(read_activations(network, plain, [site])[site])
            if isinstance(_kept_places(action, field, grid, other), str):
                continue
            measured = receptive_field(network, site, other, channels)
            if not isinstance(_kept_places(action, measured, grid, other), str):
                return f"Images of side {other} would do: `side = {other}` in [samples]."
        except (RuntimeError, ValueError):  # a network for one size of input only
            break
    return "No larger side was found that would do; choose an earlier site."


def paired_places(
    places: dict[Site, Places], grids: dict[Site, tuple[int, int]]
) -> dict[Site, Places]:
    """Keep the places of the first site that every site has, in the same order at all sites.

    Raises:
        InputError: There are none.
    """
    first = next(iter(places))
    h, w = grids[first]
    kept = places[first].kept
    y, x = (kept // w + 0.5) / h, (kept % w + 0.5) / w
    numbers, shared = {}, torch.ones_like(kept, dtype=torch.bool)
    for site, at_site in places.items():
        h, w = grids[site]
        number = torch.full((h * w,), -1, device=kept.device)
        number[at_site.kept] = torch.arange(len(at_site.kept), device=kept.device)
        numbers[site] = number[(y * h).long() * w + (x * w).long()]
        shared &= numbers[site] >= 0
    if not shared.any():
        raise InputError(
            f"No place can be kept at all of {', '.join(map(str, places))} in every pose; collect "
            "them without `paired`, or with larger images."
        )
    return {
        site: Places(p.kept[n], p.parts[:, n], p.weight[:, n])
        for site, p in places.items()
        for n in [numbers[site][shared]]
    }


class Poses(NamedTuple):
    """Group action on the inputs, and the places of each site that are kept."""

    action: Action
    places: dict[Site, Places]


def poses_of_sites(
    group: PoseConfig | Action,
    network: nn.Module,
    inputs: Shaped[Tensor, "1 ..."],
    activations: Mapping[Site, Tensor],
    *,
    paired: bool | None,
) -> Poses:
    """Find the places of all sites that can be kept in every pose.

    Args:
        group: Group and how it acts.
        network: Network that is read.
        inputs: Batch of one input.
        activations: Its activations at the sites.
        paired: Whether the same places are kept at every site.

    Raises:
        InputError: No place is left at a site.
        GroupError: The group cannot act so.
    """
    action = action_of(group) if isinstance(group, PoseConfig) else group
    refuse_lawless(action, inputs)
    places = {site: places_of(action, network, site, inputs) for site in activations}
    if paired:
        layouts = layouts_of(network, inputs, list(activations))
        grids = {site: layouts[site].grid(a) for site, a in activations.items()}
        places = paired_places(places, grids)
    device = inputs.device
    return Poses(action, {s: Places(*(t.to(device) for t in p)) for s, p in places.items()})


def read_pose(
    network: nn.Module,
    action: Action | None,
    element: int,
    inputs: Shaped[Tensor, "batch ..."],
    sites: Sequence[Site],
    shapes: Mapping[Site, SiteShape] | None = None,
) -> dict[Site, Float[Tensor, "batch position d"]]:
    """Read the flat maps of inputs in one pose.

    Args:
        network: Network to run.
        action: Action of the group; without it the inputs are read as they are.
        element: Element by which to pose the inputs.
        inputs: Batch of untransformed inputs.
        sites: Sites to read.
        shapes: Expected sizes of the map and its channels at each site; by default any.

    Raises:
        InputError: The network does not run, or its maps have other sizes or another batch axis.
    """
    posed = as_input(network, inputs if action is None else action(element, inputs))
    layouts = layouts_of(network, posed, sites)
    maps = read_activations(network, posed, sites)
    rows = {site: layouts[site].rows(activation) for site, activation in maps.items()}
    for site, activation in maps.items():
        refuse_unreadable(rows[site], site, len(inputs))
        if shapes is not None:
            n_channels = shapes[site].width // (1 if action is None else action.group.order)
            refuse_other_grid(layouts[site].grid(activation), shapes[site].grid, site)
            refuse_other_width(rows[site].shape[-1], n_channels, site)
    return {site: r.reshape(len(inputs), -1, r.shape[-1]) for site, r in rows.items()}


def shape_of(
    network: nn.Module,
    site: Site,
    layout: Layout,
    activation: Shaped[Tensor, "..."],
    poses: Poses | None,
) -> SiteShape:
    """Shape of a site in a store.

    Args:
        network: Network, which names the branches of the site.
        site: Site.
        layout: Layout of its activations.
        activation: Its activation for one sample.
        poses: Poses in which inputs are read, if any.
    """
    branches = {} if site.branch else branches_of(network, site.module, site.take)
    width, grid = layout.width(activation), layout.grid(activation)
    ranges, scattered = ends_of(branches, width), scattered_of(branches, width)
    if poses is None:
        return SiteShape(width, grid, ranges, scattered=scattered)
    n_places = len(poses.places[site].kept)
    return SiteShape(width * poses.action.group.order, grid, ranges, n_places, scattered)
