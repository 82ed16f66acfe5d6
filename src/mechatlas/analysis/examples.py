"""Statistics and strongest examples of each feature of a dictionary on data.

    feature_statistics    one pass over the rows of a store: how often and how strongly each
                          latent is active, and the rows where it is strongest
    examples              run the network on those samples again: the activation map of each
                          latent around each of those places

Examples are not cherry-picked: they are the strongest rows, and rows at quantiles of a random
sample of those where the latent is active; at most one of each sample, and the same on every run.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from mechatlas.activations.layouts import layouts_of
from mechatlas.activations.receptive import ReceptiveField
from mechatlas.activations.samples import Samples
from mechatlas.activations.sites import read_activations
from mechatlas.activations.store import StoreRows
from mechatlas.base import Dictionary, InputError, Progress, Result, Site, no_progress

BINS = 24
"""Number of bins of a histogram; each is a factor of `2 ** (1 / PER_OCTAVE)` wide."""
PER_OCTAVE = 4
"""Number of bins in which activations double."""
_LOWEST, _HIGHEST = -24, 24  # octaves counted while reading; values outside join the ends
CODE_BYTES = 64 << 20
"""Memory for one dense block of codes, in bytes."""
POOL = 64
"""Number of active rows of each latent, drawn at random, that quantiles are taken from."""
MOST_APART = 16
"""Largest number of tokens beside the patches of an image: class, distillation, registers."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FeatureStatistics(Result):
    """Statistics of each latent on the rows of a store. Active means above zero."""

    n_rows: int
    """Rows read."""
    density: Float[np.ndarray, " latent"]
    """Share of the rows where the latent is active."""
    mean: Float[np.ndarray, " latent"]
    """Mean activation over the rows where it is active; 0 if it never is."""
    max: Float[np.ndarray, " latent"]
    """Largest activation."""
    histogram: Int[np.ndarray, "latent bin"]
    """Rows by activation, in bins of equal ratio; the last holds the largest activation and
    the first also everything smaller."""
    upper: Float[np.ndarray, " latent"]
    """Upper end of the last bin; bin b from the end ends at `upper * 2 ** (-b / 4)`."""
    top: int
    """Number of strongest rows; the columns after them are rows at quantiles, weakest first."""
    sample: Int[np.ndarray, "latent shown"]
    """Samples of the strongest rows, strongest first, each sample once, then of the rows at
    quantiles; -1 where the latent was active in fewer."""
    place: Int[np.ndarray, "latent shown 2"]
    """Position in the sample: y and x (token and 0 for texts)."""
    value: Float[np.ndarray, "latent shown"]
    """Activation at the position; 0 where there is none."""

    def summary(self) -> str:
        """Number of latents that are ever active, and their density."""
        alive = self.density[self.density > 0]
        density = f"; median density {np.median(alive):.2g}" if len(alive) else ""
        return (
            f"FeatureStatistics: {len(alive):,} of {len(self.density):,} latents are active on "
            f"{self.n_rows:,} rows{density}."
        )


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
    """Largest difference between an activation in the store and the same one run again, as a
    share of the latent's largest. Rounding on disk explains up to about 0.01; much more means
    that network, samples or dictionary are not those the statistics came from."""

    def summary(self) -> str:
        """Number of examples, and how well they agree with the store."""
        return (
            f"Examples: {int((self.sample >= 0).sum()):,} examples of "
            f"{int((self.sample[:, 0] >= 0).sum()):,} latents; activations differ from the store "
            f"by up to {self.drift:.1%} of a latent's largest."
        )


@torch.inference_mode()
def feature_statistics(
    dictionary: Dictionary,
    rows: StoreRows,
    *,
    top: int = 9,
    quantiles: int = 0,
    max_rows: int | None = None,
    on_progress: Progress = no_progress,
) -> FeatureStatistics:
    """Measure every latent in one pass over a store.

    Args:
        dictionary: Any; only `encode` is used.
        rows: Rows of the site that it was trained on.
        top: Number of strongest rows kept for each latent.
        quantiles: Number of rows kept at evenly spaced quantiles of the activation where it is
            above zero, estimated from `POOL` such rows drawn at random.
        max_rows: Upper limit on the rows read; they are stored in random order of samples.
        on_progress: Callback with the number of rows done.

    Raises:
        InputError: The rows are not as wide as the dictionary.
        StoreError: A shard is damaged or missing; it is named.
    """
    if rows.d_in != dictionary.d_in:
        raise InputError(
            f"The rows of {rows.site} are {rows.d_in} wide, the dictionary reads "
            f"{dictionary.d_in}. Is this the site it was trained on?"
        )
    total = rows.n_rows + rows.n_held_out
    total = min(total, max_rows or total)
    n_latents = dictionary.n_latents
    tally, strongest = _Tally(n_latents), _Largest(n_latents, top)
    drawn = _Largest(n_latents, POOL) if quantiles else None
    for x, where in _blocks(rows, dictionary, total):
        latent, row, value = _active(dictionary, x)
        tally.add(latent, value, len(x))
        entry = np.column_stack([where[row], value.view(np.int32)])
        strongest.add(latent, value, entry)
        if drawn is not None:
            drawn.add(latent, _draws(latent, entry), entry)
        on_progress(tally.n_rows, total)
    kept = strongest.finish()
    if drawn is not None:
        kept = np.concatenate([kept, _at_quantiles(drawn.finish(), quantiles)], axis=1)
    return tally.finish(kept, top)


def _draws(latent: np.ndarray, entry: np.ndarray) -> np.ndarray:
    """Hash each entry to a number in (0, 1], the same however rows are cut into blocks."""
    h = latent.astype(np.uint64) << np.uint64(32) ^ entry[:, 0].astype(np.uint64)
    h ^= entry[:, 1].astype(np.uint64) << np.uint64(44) ^ entry[:, 2].astype(
        np.uint64
    ) << np.uint64(20)
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        h = (h ^ h >> np.uint64(30)) * np.uint64(factor)
    return ((h >> np.uint64(40)).astype(np.float32) + 1) / np.float32(1 << 24)


def _at_quantiles(
    pool: Int[np.ndarray, "latent pool 4"], n: int
) -> Int[np.ndarray, "latent quantile 4"]:
    """Choose entries of each latent at evenly spaced quantiles of the activation, weakest first."""
    there = pool[:, :, 0] >= 0
    value = np.where(there, np.ascontiguousarray(pool[:, :, 3]).view(np.float32), np.inf)
    order = np.argsort(value, axis=1, kind="stable")
    count = there.sum(axis=1)[:, None]
    level = ((np.arange(n) + 0.5) * count / n).astype(int)
    rank = np.where(count >= n, level, np.arange(n))
    chosen = np.take_along_axis(order, np.minimum(rank, pool.shape[1] - 1), axis=1)
    kept = np.take_along_axis(pool, chosen[:, :, None], axis=1)
    kept[rank >= count] = _NOTHING
    return kept


def _blocks(
    rows: StoreRows, dictionary: Dictionary, n_rows: int
) -> Iterator[tuple[Tensor, np.ndarray]]:
    size = _rows_at_once(dictionary)
    for batch, where in rows.scan():
        if n_rows <= 0:
            return
        kept = min(n_rows, len(batch.x))
        n_rows -= kept
        for i in range(0, kept, size):
            piece = slice(i, min(i + size, kept))
            yield batch.x[piece], where[piece].numpy()


def _rows_at_once(dictionary: Dictionary) -> int:
    return max(1, CODE_BYTES // (4 * dictionary.n_latents))


def _encode(dictionary: Dictionary, x: Tensor) -> Tensor:
    decoder = getattr(dictionary, "W_dec", None)
    return dictionary.encode(x.to(decoder.device) if isinstance(decoder, Tensor) else x)


def _active(dictionary: Dictionary, x: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find latent, row and value of every entry of the code above zero."""
    code = _encode(dictionary, x)
    flat = (code > 0).flatten().nonzero().squeeze(1)
    value = code.flatten()[flat].float().cpu().numpy()
    row, latent = np.divmod(flat.cpu().numpy(), dictionary.n_latents)
    return latent, row, value


class _Tally:
    """Running counts, sums and histograms, block by block."""

    def __init__(self, n_latents: int) -> None:
        self.n_latents, self.n_rows = n_latents, 0
        self.n_bins = (_HIGHEST - _LOWEST) * PER_OCTAVE
        self.count = np.zeros(n_latents, dtype=np.int64)
        self.sum = np.zeros(n_latents)
        self.bins = np.zeros(n_latents * self.n_bins, dtype=np.int64)

    def add(self, latent: np.ndarray, value: np.ndarray, n_rows: int) -> None:
        self.n_rows += n_rows
        self.count += np.bincount(latent, minlength=self.n_latents)
        self.sum += np.bincount(latent, weights=value, minlength=self.n_latents)
        octave = (np.log2(value) - _LOWEST) * PER_OCTAVE
        index = np.clip(octave.astype(np.int64), 0, self.n_bins - 1)
        self.bins += np.bincount(latent * self.n_bins + index, minlength=len(self.bins))

    def finish(self, kept: Int[np.ndarray, "latent shown 4"], top: int) -> FeatureStatistics:
        """Select the bins below each latent's largest activation."""
        value = np.ascontiguousarray(kept[:, :, 3]).view(np.float32)
        bins = self.bins.reshape(self.n_latents, self.n_bins)
        last = self.n_bins - 1 - (bins[:, ::-1] > 0).argmax(axis=1)
        last = np.where(self.count > 0, np.maximum(last, BINS - 1), BINS - 1)
        wanted = last[:, None] + np.arange(-BINS + 1, 1)
        histogram = np.take_along_axis(bins, wanted, axis=1)
        histogram[:, 0] += self.count - histogram.sum(axis=1)
        return FeatureStatistics(
            n_rows=self.n_rows,
            density=self.count / max(self.n_rows, 1),
            mean=self.sum / np.maximum(self.count, 1),
            max=value[:, 0].copy(),
            histogram=histogram,
            upper=2.0 ** ((last + 1) / PER_OCTAVE + _LOWEST),
            top=top,
            sample=kept[:, :, 0],
            place=kept[:, :, 1:3],
            value=value,
        )


_NOTHING = np.array([-1, 0, 0, 0], dtype=np.int32)
"""Entry that is not there: sample, y, x, and the bits of its activation."""


class _Largest:
    """Running selection of the entries of each latent with the largest keys, one of each sample.

    Entries that cannot be among them are dropped at once; the others wait until there are
    enough to be worth a sort.
    """

    def __init__(self, n_latents: int, top: int) -> None:
        self.n_latents, self.top = n_latents, top
        self.latent = np.zeros(0, dtype=np.int64)
        self.key = np.zeros(0, dtype=np.float32)
        self.entry = np.zeros((0, 4), dtype=np.int32)
        self.floor = np.zeros(n_latents, dtype=np.float32)
        self.waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.enough = max(1 << 19, 2 * n_latents * top)

    def add(self, latent: np.ndarray, key: np.ndarray, entry: np.ndarray) -> None:
        able = key > self.floor[latent]
        self.waiting.append((latent[able], key[able], entry[able]))
        if sum(len(part[0]) for part in self.waiting) > self.enough:
            self._merge()

    def _merge(self) -> None:
        parts = [(self.latent, self.key, self.entry), *self.waiting]
        latent, key, entry = (np.concatenate(column) for column in zip(*parts, strict=True))
        self.waiting = []
        # Positive floats sort like their bits. The sort is stable: of equal keys the row that
        # was read first is kept, however the rows are cut into blocks.
        falling = np.uint64(0xFFFFFFFF) - key.view(np.uint32).astype(np.uint64)
        order = np.argsort(latent.astype(np.uint64) << np.uint64(32) | falling, kind="stable")
        pair = (latent[order] << 32) | entry[order, 0]
        order = order[np.sort(np.unique(pair, return_index=True)[1])]
        rank = _rank(latent[order], self.n_latents)
        order = order[rank < self.top]
        self.latent, self.key, self.entry = latent[order], key[order], entry[order]
        rank = _rank(self.latent, self.n_latents)
        weakest = rank == self.top - 1
        self.floor[self.latent[weakest]] = self.key[weakest]

    def finish(self) -> Int[np.ndarray, "latent top 4"]:
        """Return the entries of each latent, largest key first."""
        self._merge()
        kept = np.tile(_NOTHING, (self.n_latents, self.top, 1))
        kept[self.latent, _rank(self.latent, self.n_latents)] = self.entry
        return kept


def _rank(latent: np.ndarray, n_latents: int) -> np.ndarray:
    """Rank of each entry among those of its latent, for entries sorted by latent."""
    first = np.searchsorted(latent, np.arange(n_latents))
    return np.arange(len(latent)) - first[latent]


@torch.inference_mode()
def examples(
    network: nn.Module,
    samples: Samples,
    site: Site,
    dictionary: Dictionary,
    statistics: FeatureStatistics,
    *,
    field: ReceptiveField | None = None,
    smallest_crop: float = 0.3,
    context: tuple[int, int] = (12, 4),
    on_progress: Progress = no_progress,
) -> Examples:
    """Run the network on the samples of the strongest rows and map each latent around them.

    Args:
        network: Network that the statistics came from, in evaluation mode.
        samples: Samples that the store was collected from.
        site: Site of the dictionary.
        dictionary: Any; only `encode` is used.
        statistics: Statistics from `feature_statistics`.
        field: Receptive field of a position, if the samples are images; squares show all of it.
        smallest_crop: Side of the smallest square shown, as a share of the input's side.
        context: Tokens of a text kept before and after the position.
        on_progress: Callback with the number of samples done.

    Raises:
        InputError: A sample can no longer be read.
    """
    needed = np.unique(statistics.sample[statistics.sample >= 0])
    window: _Window | None = None
    filled: _Maps | None = None
    done = 0
    while done < len(needed):
        grid = window.grid if window else None
        chunk = needed[done : done + _samples_at_once(dictionary, grid)]
        raw = [samples.read(int(i)) for i in chunk]
        inputs = samples.stack(raw)
        activation = _read(network, inputs, site)
        if window is None or filled is None:
            window = _window(network, activation, inputs, field, smallest_crop, context)
            filled = _Maps(statistics, window)
        _fill(filled, activation, dictionary, chunk)
        done += len(chunk)
        on_progress(done, len(needed))
    if window is None or filled is None:
        window = _Window((1, 1), (1, 1), (0, 0), None, 0)
        filled = _Maps(statistics, window)
    return filled.finish(statistics)


def _read(network: nn.Module, inputs: Tensor, site: Site) -> Tensor:
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    inputs = inputs.to(device)
    layout = layouts_of(network, inputs, [site])[site]
    return layout.rows(read_activations(network, inputs, [site])[site])


def _samples_at_once(dictionary: Dictionary, grid: tuple[int, int] | None) -> int:
    if grid is None:
        return 1  # the first sample shows how many positions there are
    return int(np.clip(_rows_at_once(dictionary) * 4 // (grid[0] * grid[1]), 1, 64))


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
            [np.where(patch < 0, -1 - position[..., 0], y), np.where(patch < 0, 0, x)], -1
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


def _patches(network: nn.Module, inputs: Tensor, n_tokens: int) -> tuple[int, int]:
    """Side of the square of patches that the tokens of an image form, and number of the others.

    The patches are those of the first convolution whose steps are as large as its kernel; without
    one, the largest square that leaves few tokens. The side is 0 if there is none.
    """
    side = int(inputs.shape[-1])
    steps = [
        m.stride[0] for m in network.modules()
        if isinstance(m, nn.Conv2d) and m.stride == m.kernel_size and m.stride[0] > 1
    ]  # fmt: skip
    for grid in (*(side // step for step in steps[:1]), math.isqrt(n_tokens)):
        if grid > 1 and 0 <= n_tokens - grid * grid <= MOST_APART:
            return grid, n_tokens - grid * grid
    return 0, n_tokens


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
        patches, apart = _patches(network, inputs, grid[0])
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
            drift=float(difference[there].max()) if there.any() else 0.0,
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
    maps: _Maps, activation: Tensor, dictionary: Dictionary, chunk: Int[np.ndarray, " n"]
) -> None:
    """Encode the positions that maps of some samples show, and cut out the maps."""
    window = maps.window
    (height, width), columns = window.shape, window.grid[1]
    inside = (torch.arange(height)[:, None] * columns + torch.arange(width)).flatten()
    apart = torch.arange(window.apart)
    for i, sample in enumerate(chunk.tolist()):
        latent, rank = maps.of(sample)
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
        for piece in flat.split(_rows_at_once(dictionary)):
            code = _encode(dictionary, piece.float())
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
