"""Examples of each feature of a dictionary: where it is active, in the inputs themselves.

examples_together    run the network again on the samples that `feature_statistics` chose, and
map the activation of each latent of some dictionaries around each of those places
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from mechatlas.activations.components import patches_of
from mechatlas.activations.layouts import layouts_of
from mechatlas.activations.receptive import ReceptiveField
from mechatlas.activations.samples import Samples
from mechatlas.activations.sites import read_activations
from mechatlas.analysis.examples.statistics import FeatureStatistics, encode, rows_at_once
from mechatlas.base import Dictionary, InputError, Progress, Result, Site, no_progress


@dataclasses.dataclass(frozen=True)
class Crop:
    """Geometry of the squares of pixels around the positions of a site."""

    side: int
    """Side of every square, in pixels."""
    cell: float
    """Pixels from one position to the next."""
    origin: float
    """Left edge of position 0's cell, in pixels from the left edge of the input."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Examples(Result):
    """Examples of each latent, with a map of its activation around them."""

    sample: Int[np.ndarray, "latent shown"]
    """Number of the sample; -1 where there is none."""
    place: Int[np.ndarray, "latent shown 2"]
    """y and x of the position (token and 0 for texts; -1 - t and 0 for token t of an image that is
    no patch)."""
    value: Float[np.ndarray, "latent shown"]
    """Activation at the position, from the network run again."""
    first: Int[np.ndarray, "latent shown 2"]
    """y and x of the first position of the map."""
    heat: UInt8[np.ndarray, "latent shown h w"]
    """Activations at the positions from `first` on, in units where 255 is `scale`."""
    apart: UInt8[np.ndarray, "latent shown token"]
    """Activations at the tokens of an image that are no patches, in the units of `heat`."""
    scale: Float[np.ndarray, " latent"]
    """Largest activation in the maps of a latent."""
    corner: Int[np.ndarray, "latent shown 2"]
    """Top and left pixel of the square to show; all zero if samples are not images."""
    crop: Crop | None
    """Geometry of the squares; `None` if samples are not images."""
    drift: float
    """Difference between an activation in the store and the same one run again, as a share of
    the latent's largest, that nine in ten examples do not exceed: rounding on disk may push single
    codes out of the k largest, but not many. Much more than 0.01 means that network, samples or
    dictionary are not those the statistics came from."""

    def summary(self) -> str:
        """Number of examples, and how well they agree with the store."""
        return (
            f"Examples: {int((self.sample >= 0).sum()):,} examples of "
            f"{int((self.sample[:, 0] >= 0).sum()):,} latents; nine in ten activations are "
            f"within {self.drift:.1%} of the store's, of a latent's largest."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class ExamplesWanted:
    """Dictionary whose examples are wanted."""

    site: Site | tuple[Site, ...]
    """Site of the dictionary, or all sites that it reads, in the order of its columns."""
    dictionary: Dictionary
    """Any dictionary; only `encode` is used."""
    statistics: FeatureStatistics
    """Statistics from `feature_statistics`."""
    field: ReceptiveField | None = None
    """Receptive field of a position, if the samples are images; squares show all of it."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites that the dictionary reads."""
        return (self.site,) if isinstance(self.site, Site) else self.site


@torch.inference_mode()
def examples_together(
    network: nn.Module,
    samples: Samples,
    wanted: Sequence[ExamplesWanted],
    *,
    smallest_crop: float = 0.3,
    context: tuple[int, int] = (12, 4),
    on_progress: Progress = no_progress,
) -> list[Examples]:
    """Find the examples of several dictionaries with one pass of the network over each sample.

    Args:
        network: Network that the statistics came from, in evaluation mode.
        samples: Samples that the store was collected from.
        wanted: Dictionaries of the same network and samples.
        smallest_crop: Side of the smallest square shown, as a share of the input's side.
        context: Tokens of a text kept before and after the position.
        on_progress: Callback with the number of samples done.

    Returns:
        Examples of each dictionary.

    Raises:
        InputError: A sample can no longer be read.
    """
    shown = np.concatenate([each.statistics.sample.ravel() for each in wanted])
    needed = np.unique(shown[shown >= 0])
    sites = list(dict.fromkeys(site for each in wanted for site in each.sites))
    maps: list[_Maps] = []
    done = 0
    while done < len(needed):
        chunk = needed[done : done + _samples_at_once(wanted, maps)]
        inputs = samples.stack([samples.read(int(i)) for i in chunk])
        activations = _read(network, inputs, sites)
        if not maps:
            for each in wanted:
                at = _beside(activations, each)
                window = _window(network, at, inputs, each.field, smallest_crop, context)
                maps.append(_Maps(each.statistics, window))
        for each, filled in zip(wanted, maps, strict=True):
            _fill(filled, _beside(activations, each), each.dictionary, chunk)
        done += len(chunk)
        on_progress(done, len(needed))
    empty = _Window((1, 1), (1, 1), (0, 0), None, 0)
    maps = maps or [_Maps(each.statistics, empty) for each in wanted]
    return [filled.finish(each.statistics) for each, filled in zip(wanted, maps, strict=True)]


def _read(network: nn.Module, inputs: Tensor, sites: Sequence[Site]) -> dict[Site, Tensor]:
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    inputs = inputs.to(device)
    layouts = layouts_of(network, inputs, sites)
    read = read_activations(network, inputs, list(sites))
    return {site: layouts[site].rows(read[site]) for site in sites}


def _beside(activations: dict[Site, Tensor], wanted: ExamplesWanted) -> Tensor:
    """Activations of all sites that a dictionary reads, side by side.

    Raises:
        InputError: The sites have other positions.
    """
    parts = [activations[site] for site in wanted.sites]
    if len({part.shape[:-1] for part in parts}) > 1:
        raise InputError(
            f"The sites {', '.join(map(str, wanted.sites))} have other positions than each other, "
            "so no row holds all of them."
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _samples_at_once(wanted: Sequence[ExamplesWanted], maps: "Sequence[_Maps]") -> int:
    if not maps:
        return 1  # the first sample shows how many positions there are
    rows = min(rows_at_once(each.dictionary) for each in wanted)
    positions = max(math.prod(filled.window.grid) for filled in maps)
    return int(np.clip(rows * 4 // positions, 1, 64))


@dataclasses.dataclass(frozen=True)
class _Window:
    """Window of positions shown around a position."""

    grid: tuple[int, int]
    shape: tuple[int, int]
    before: tuple[int, int]
    crop: Crop | None
    side: int
    apart: int = 0
    """Number of tokens before those of the grid that have no place in the image."""

    def places(self, position: np.ndarray) -> np.ndarray:
        """Places on the grid, from places as the store has them."""
        if not self.apart:
            return position
        patch = position[..., 0] - self.apart
        y, x = np.divmod(patch, self.grid[1])
        return np.stack(
            [np.where(patch < 0, -1 - position[..., 0], y), np.where(patch < 0, 0, x)],
            -1,
        )

    def rows(self, place: Tensor) -> Tensor:
        """Rows of the activation at places on the grid."""
        y, x = place.unbind(-1)
        return torch.where(y < 0, -1 - y, self.apart + y * self.grid[1] + x)

    def corners(self, place: np.ndarray) -> np.ndarray:
        """Top and left pixel of the square centered on a position."""
        if self.crop is None:
            return np.zeros_like(place)
        middle = self.crop.origin + self.crop.cell * (place + 0.5)
        corner = np.rint(middle - self.crop.side / 2)
        return np.clip(corner, 0, self.side - self.crop.side).astype(np.int32)

    def firsts(self, place: np.ndarray) -> np.ndarray:
        """First position of the map."""
        if self.crop is None:
            first = place - np.array(self.before)
        else:
            first = np.floor((self.corners(place) - self.crop.origin) / self.crop.cell)
        return np.clip(first, 0, np.array(self.grid) - np.array(self.shape)).astype(np.int32)


def _window(
    network: nn.Module,
    activation: Tensor,
    inputs: Tensor,
    field: ReceptiveField | None,
    smallest_crop: float,
    context: tuple[int, int],
) -> _Window:
    height, width = (*activation.shape[1:-1], 1, 1)[:2]
    grid = (int(height), int(width))
    if inputs.ndim != 4 or inputs.shape[2] != inputs.shape[3]:
        rows = min(grid[0], context[0] + 1 + context[1]) if grid[1] == 1 else grid[0]
        return _Window(grid, (rows, grid[1]), (context[0] if grid[1] == 1 else 0, 0), None, 0)
    side = int(inputs.shape[2])
    if activation.ndim == 3:  # tokens of an image
        patches, apart = patches_of(network, inputs, grid[0])
        crop = Crop(side, side / max(patches, 1), 0.0)
        tokens = max(patches, 1)
        return _Window((tokens, tokens), (tokens, tokens), (0, 0), crop, side, apart)
    if field is None or field.stride == 0:  # the positions share the input evenly
        crop = Crop(side, side / max(grid), 0.0)
    else:
        cell = float(field.stride)
        extent = min(side, max(field.size, round(smallest_crop * side)))
        crop = Crop(extent, cell, field.offset + field.size / 2 - cell / 2)
    cells = int(np.ceil(crop.side / crop.cell)) + 1
    return _Window(grid, (min(grid[0], cells), min(grid[1], cells)), (0, 0), crop, side)


class _Maps:
    """Activation maps of all examples, filled sample by sample."""

    def __init__(self, statistics: FeatureStatistics, window: _Window) -> None:
        self.window = window
        self.place = window.places(statistics.place)
        self.first = window.firsts(self.place)
        shape = statistics.sample.shape
        self.heat = np.zeros((*shape, *window.shape), dtype=np.float16)
        self.apart = np.zeros((*shape, window.apart), dtype=np.float16)
        self.value = np.zeros(statistics.sample.shape, dtype=np.float32)
        # Half precision has 11 bits but ends at 65504, so maps are kept as shares of the
        # largest activation in the store.
        self.unit = np.maximum(statistics.max, np.finfo(np.float32).tiny).astype(np.float32)
        flat = statistics.sample.ravel()
        self.order = np.argsort(flat, kind="stable")
        self.sorted = flat[self.order]

    def of(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """Find latents and ranks of the examples that show a sample."""
        begin, end = np.searchsorted(self.sorted, [sample, sample + 1])
        return np.divmod(self.order[begin:end], self.heat.shape[1])

    def finish(self, statistics: FeatureStatistics) -> Examples:
        """Quantize the maps."""
        there = statistics.sample >= 0
        share = self.heat.max(axis=(1, 2, 3)).astype(np.float32)
        share = np.maximum(share, self.apart.max(axis=(1, 2), initial=0))
        scale = np.where(share > 0, share, 1)
        difference = np.abs(self.value - statistics.value) / self.unit[:, None]
        return Examples(
            sample=statistics.sample,
            place=self.place,
            value=self.value,
            first=np.where(there[..., None], self.first, 0),
            heat=_quantized(self.heat, scale),
            apart=_quantized(self.apart, scale),
            scale=share * self.unit,
            corner=np.where(there[..., None], self.window.corners(self.place), 0),
            crop=self.window.crop,
            drift=float(np.quantile(difference[there], 0.9)) if there.any() else 0.0,
        )


def _quantized(
    share: Float[np.ndarray, "latent ..."], scale: Float[np.ndarray, " latent"]
) -> UInt8[np.ndarray, "latent ..."]:
    """Shares in units where 255 is `scale`, rounded up."""
    bytes_ = np.empty(share.shape, dtype=np.uint8)
    for i in range(0, len(share), 512):  # a block at a time: no second copy in float
        unit = scale[i : i + 512].reshape(-1, *(1,) * (share.ndim - 1))
        bytes_[i : i + 512] = np.ceil(np.clip(share[i : i + 512] / unit, 0, 1) * 255)
    return bytes_


def _fill(
    maps: _Maps,
    activation: Tensor,
    dictionary: Dictionary,
    chunk: Int[np.ndarray, " n"],
) -> None:
    """Encode the positions that maps of some samples show, and cut out the maps."""
    window = maps.window
    (height, width), columns = window.shape, window.grid[1]
    inside = (torch.arange(height)[:, None] * columns + torch.arange(width)).flatten()
    apart = torch.arange(window.apart)
    for i, sample in enumerate(chunk.tolist()):
        latent, rank = maps.of(sample)
        if not len(latent):
            continue
        example = torch.arange(len(latent))
        first = torch.from_numpy(maps.first[latent, rank]).long()
        place = torch.from_numpy(maps.place[latent, rank]).long()
        grid = window.rows(first)[:, None] + inside
        shown = torch.cat([apart.expand(len(latent), -1), grid], dim=1)
        if window.apart:  # a grid of one token stands for none
            shown = shown.clamp_max(activation[i].reshape(-1, activation.shape[-1]).shape[0] - 1)
        needed, index = shown.unique(return_inverse=True)
        flat = activation[i].reshape(-1, activation.shape[-1])[needed.to(activation.device)]
        codes = []
        for piece in flat.split(rows_at_once(dictionary)):
            code = encode(dictionary, piece.float())
            wanted = torch.from_numpy(latent).to(code.device)
            codes.append(code.index_select(1, wanted).float().cpu())
        code = torch.cat(codes)
        cut = (
            code[index, example[:, None]].clamp_min(0)
            / torch.from_numpy(maps.unit[latent])[:, None]
        )
        maps.apart[latent, rank] = cut[:, : window.apart].half().numpy()
        maps.heat[latent, rank] = cut[:, window.apart :].view(-1, height, width).half().numpy()
        peak = torch.searchsorted(needed, window.rows(place))
        maps.value[latent, rank] = code[peak, example].numpy()
