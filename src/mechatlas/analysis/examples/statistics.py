"""Statistics of each latent of a dictionary on the rows of a store, and the rows to show.

    feature_statistics    one pass: how often and how strongly each latent is active, the rows
                          where it is strongest, and rows at quantiles

Rows are not cherry-picked: they are the strongest, and rows at quantiles of a random sample of
those where the latent is active; at most one of each sample, and the same on every run.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechatlas.activations.store import PairedRows, StoreRows
from mechatlas.base import Dictionary, InputError, Progress, Result, no_progress
from mechatlas.dictionaries.pretrained import reading_of

BINS = 24
"""Number of bins of a histogram; each is a factor of `2 ** (1 / PER_OCTAVE)` wide."""
PER_OCTAVE = 4
"""Number of bins in which activations double."""
_LOWEST, _HIGHEST = (
    -24,
    24,
)  # octaves counted while reading; values outside join the ends
CODE_BYTES = 64 << 20
"""Memory for one dense block of codes, in bytes."""
POOL = 64
"""Number of active rows of each latent, drawn at random, that quantiles are taken from."""


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


@torch.inference_mode()
def feature_statistics(
    dictionary: Dictionary,
    rows: StoreRows | PairedRows,
    *,
    top: int = 9,
    quantiles: int = 0,
    max_rows: int | None = None,
    on_progress: Progress = no_progress,
) -> FeatureStatistics:
    """Measure every latent in one pass over a store.

    Args:
        dictionary: Any; only `encode` is used.
        rows: Rows of the site that it was trained on, or of all sites that it reads.
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
            f"{reading_of(dictionary)}. Is this the site it was trained on?"
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


@torch.inference_mode()
def linear_histograms(
    dictionary: Dictionary,
    rows: StoreRows | PairedRows,
    largest: Float[np.ndarray, " latent"],
    *,
    n_bins: int = 50,
    max_rows: int | None = None,
) -> Int[np.ndarray, "latent bin"]:
    """Count the rows of each latent by activation, in equal bins from 0 to its largest.

    Args:
        dictionary: Any; only `encode` is used.
        rows: Rows of the site that it was trained on.
        largest: Largest activation of each latent on those rows.
        n_bins: Number of bins.
        max_rows: Upper limit on the rows read, as for the largest.

    Raises:
        StoreError: A shard is damaged or missing; it is named.
    """
    total = rows.n_rows + rows.n_held_out
    counts = np.zeros(dictionary.n_latents * n_bins, dtype=np.int64)
    width = np.maximum(largest, np.finfo(np.float32).tiny)
    for x, _ in _blocks(rows, dictionary, min(total, max_rows or total)):
        latent, _, value = _active(dictionary, x)
        index = np.clip(value * (n_bins / width[latent]), 0, n_bins - 1).astype(np.int64)
        counts += np.bincount(latent * n_bins + index, minlength=len(counts))
    return counts.reshape(-1, n_bins)


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
    rows: StoreRows | PairedRows, dictionary: Dictionary, n_rows: int
) -> Iterator[tuple[Tensor, np.ndarray]]:
    size = rows_at_once(dictionary)
    for batch, where in rows.scan():
        if n_rows <= 0:
            return
        kept = min(n_rows, len(batch.x))
        n_rows -= kept
        for i in range(0, kept, size):
            piece = slice(i, min(i + size, kept))
            yield batch.x[piece], where[piece].numpy()


def rows_at_once(dictionary: Dictionary) -> int:
    """Rows whose dense code fits into `CODE_BYTES`."""
    return max(1, CODE_BYTES // (4 * dictionary.n_latents))


def encode(dictionary: Dictionary, x: Tensor) -> Tensor:
    """Encode rows where the dictionary is."""
    decoder = getattr(dictionary, "W_dec", None)
    return dictionary.encode(x.to(decoder.device) if isinstance(decoder, Tensor) else x)


def _active(dictionary: Dictionary, x: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find latent, row and value of every entry of the code above zero."""
    code = encode(dictionary, x)
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
