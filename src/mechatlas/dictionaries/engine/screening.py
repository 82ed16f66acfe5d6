"""The codes of a batch, exactly, from a product of half the precision.

Processors with instructions for bfloat16 (AMX, AVX512-BF16) multiply such numbers several times as
fast as those of float32. The product h(x) h(w), h being the rounding, is no further from x w than

    |x - h(x)| |w| + |h(x)| |w - h(w)|

(Cauchy and Schwarz) and what was lost while summing. So most pre-activations cannot be among the k
largest of their row, or above a threshold, whatever float32 says, and those that can, some eighty
of eight thousand, are computed in float32. What is selected is therefore no approximation: it is
what the whole product would have selected, to the rounding of its own sums.

The bound is part of the product: three columns more hold the bias, two the lengths above. What
comes out is not a pre-activation but a number that it is at least, or at most.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import BFloat16, Float, Int16
from torch import Tensor

from mechatlas.dictionaries.engine.interface import TooCloseError
from mechatlas.dictionaries.engine.kernels import COMPARED_LATENTS, compiled, inner, write_largest
from mechatlas.dictionaries.engine.structures import Bounds, EncoderRows, as_arrays
from mechatlas.dictionaries.engine.vectors import dot_rows

ROUNDED_LATENTS = 512
"""Latents rounded at once: few enough for the cache."""
BFLOAT16_ERROR = 2.0**-8
"""Largest relative error of a number rounded to bfloat16."""
LENGTH_MARGIN = 1.01
"""Factor of the lengths in the product, which covers the rounding of the lengths themselves."""
INTERVAL_WIDTH = 2.05
"""Width of the interval around a screened pre-activation, in units of |x| |w| (upper bound)."""
MIN_TILE_ROWS = 384
"""Smallest number of rows in a tile: with fewer oneDNN takes twice as long."""
MAX_FRACTION = 1 / 16
"""Largest fraction of all pairs of a row and a latent that is computed in float32: with more the
whole product is faster."""
GRACE_ROWS = 16
"""Rows allowed to exceed MAX_FRACTION before screening gives up."""


class Screen:
    """Search as `WholeProduct`; its methods, and the functions they give, raise `TooCloseError`."""

    def __init__(
        self,
        rows: Float[Tensor, "latent d_in"],
        bias: Float[Tensor, " latent"],
        run: Callable[[Callable[[int], Any], int], Any],
        rooms: list[Tensor],
    ) -> None:
        """Take an encoder that does not change while this is used.

        Args:
            rows: Encoder rows.
            bias: Bias of each latent.
            run: Runs numbered pieces of work.
            rooms: Memory for tiles, one a thread; made if there is none. The system gives memory
                page by page, so it is worth while to keep the list.
        """
        self.rows, self.bias, self.run, self.rooms = rows, bias, run, rooms
        self.encoder = as_arrays(EncoderRows(rows, bias))

    def largest(self, k: int) -> Callable[[Tensor, Tensor, Tensor], None]:
        """Make a function that writes values and latents of the k largest codes of each row.

        Raises:
            TooCloseError: The k are not few.
        """
        if 2 * k > MAX_FRACTION * len(self.rows):
            raise TooCloseError
        half, reach = self._rounded(self.bias, -1)
        n_groups = min(len(self.rows), max(512, 2 * k))

        def select(x: Float[Tensor, "row d_in"], values: Tensor, latents: Tensor) -> None:
            with self._bounds(x, half) as (bits, lengths):
                bounds = as_arrays(Bounds(bits, lengths, reach))
                out = (values.numpy(), latents.numpy())
                if not _select(bounds, x.numpy(), self.encoder, k, n_groups, *out):
                    raise TooCloseError

        return select

    def above(
        self, low: Float[Tensor, " latent"]
    ) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
        """Make a function that finds the pre-activations of some rows above `low`."""
        half, _ = self._rounded(self.bias - low, 1)

        def find(x: Float[Tensor, "row d_in"]) -> tuple[Tensor, Tensor, Tensor]:
            counts = low.new_empty(len(x), dtype=torch.int64)
            values = low.new_empty(_most(len(x), len(self.rows)))
            latents = torch.empty_like(values, dtype=torch.int32)
            out = (low.numpy(), counts.numpy(), latents.numpy(), values.numpy())
            with self._bounds(x, half) as (bits, _):
                n = _above(bits.numpy(), x.numpy(), self.encoder, *out)
            if n < 0:
                raise TooCloseError
            return counts, latents[:n].clone(), values[:n].clone()  # untouched, the rest is free

        return find

    def _rounded(
        self, bias: Tensor, side: int
    ) -> tuple[BFloat16[Tensor, "latent wide"], Float[Tensor, "latent 3"]]:
        """Encoder in bfloat16, and the latents' share in the distance of the bounds.

        Args:
            bias: Bias of each latent.
            side: 1 to bound pre-activations from above, -1 from below.
        """
        m, d = self.rows.shape
        half = bias.new_empty(m, d + 5, dtype=torch.bfloat16)
        reach = bias.new_empty(m, 3)
        blocks = [slice(i, i + ROUNDED_LATENTS) for i in range(0, m, ROUNDED_LATENTS)]
        arrays = (_bits(half), self.rows.numpy(), bias.numpy(), reach.numpy())

        def round_block(i: int) -> None:
            _round_encoder(*(array[blocks[i]] for array in arrays), side)

        self.run(round_block, len(blocks))
        if not reach.sum().isfinite():
            raise TooCloseError
        return half, reach

    @contextmanager
    def _bounds(
        self, x: Float[Tensor, "row d_in"], half: BFloat16[Tensor, "latent wide"]
    ) -> Iterator[tuple[Int16[Tensor, "row latent"], Float[Tensor, "row 2"]]]:
        """Bounds of pre-activations as bits of bfloat16, and the rows' share in their distance."""
        n, d = x.shape
        wide = x.new_empty(n, d + 5, dtype=torch.bfloat16)
        lengths = x.new_empty(n, 2)
        _round_batch(_bits(wide), x.numpy(), lengths.numpy())
        if not lengths.sum().isfinite():
            raise TooCloseError
        room = self.rooms.pop() if self.rooms else half.new_empty(0)
        if room.numel() < n * len(half):
            room = half.new_empty(n * len(half))
        tile = room[: n * len(half)].view(n, len(half))
        try:
            yield torch.mm(wide, half.T, out=tile).view(torch.int16), lengths
        finally:
            self.rooms.append(room)


def _bits(half: Tensor) -> np.ndarray:
    return half.view(torch.int16).numpy()


@inner
def _rounded(number):
    """The bits of the nearest bfloat16, or of two the even one."""
    word = np.float32(number).view(np.int32)
    return np.int32(word + 0x7FFF + ((word >> 16) & 1)) >> 16


@inner
def _round_row(row, half):
    """Write a row as bfloat16; return the length of the rounding error, and that of the row."""
    lost, length = row[0] - row[0], row[0] - row[0]
    part = half[: len(row)]
    for c in range(len(row)):
        bits = _rounded(row[c])
        part[c] = bits
        left = row[c] - _number(bits)
        lost += left * left
        length += row[c] * row[c]
    return math.sqrt(lost), math.sqrt(length)


@compiled
def _round_encoder(half, rows, bias, reach, side):
    d = rows.shape[1]
    summing = np.float32(2.0**-23 * (d + 5))  # of the sum of sizes, twice what can be lost
    for j in range(len(rows)):
        lost, length = _round_row(rows[j], half[j])
        slack, spread = lost + summing * length, 2 * summing * abs(bias[j])
        left = bias[j] + side * summing * abs(bias[j])
        for column in range(d, d + 3):
            half[j, column] = _rounded(left)
            left -= _number(half[j, column])
        half[j, d + 3], half[j, d + 4] = (
            _rounded(side * LENGTH_MARGIN * length),
            _rounded(side * LENGTH_MARGIN * slack),
        )
        reach[j, 0], reach[j, 1], reach[j, 2] = length, slack, spread


@compiled
def _round_batch(half, rows, lengths):
    d = rows.shape[1]
    for i in range(len(rows)):
        lost, length = _round_row(rows[i], half[i])
        length += lost
        for column in range(d, d + 3):
            half[i, column] = _rounded(1.0)
        half[i, d + 3], half[i, d + 4] = (
            _rounded(LENGTH_MARGIN * lost),
            _rounded(LENGTH_MARGIN * length),
        )
        lengths[i, 0], lengths[i, 1] = lost, length


@inner
def _most(n_rows, m):
    """Room for the pairs that may be computed, and for one row whose pairs are too many."""
    return int(MAX_FRACTION * m * (n_rows + GRACE_ROWS)) + m + 1


@inner
def _number(bits):
    """The value of a bfloat16."""
    return np.int32(np.int32(bits) << 16).view(np.float32)


@inner
def _truncated(number):
    """The bits of the next bfloat16 towards zero."""
    return np.int16(np.float32(number).view(np.int32) >> 16)


@inner
def _reached_by(bits, k):
    """Find the k-th largest of positive numbers, or one that few more reach; 0 if fewer do.

    Numbers above zero are in the order of their bits, and those below come before them.
    """
    low, high = np.int16(0), np.int16(0)
    for t in range(len(bits)):
        high = bits[t] if bits[t] > high else high
    while low < high:
        middle = np.int16((np.int32(low) + np.int32(high) + 1) >> 1)
        n = 0
        for t in range(len(bits)):
            n += bits[t] >= middle
        if n >= k:
            low = middle
            if n <= k + k // 4:
                break
        else:
            high = np.int16(middle - 1)
    return low


@inner
def _maxima(row, maxima):
    """Write the largest of each strided group: c, c + n, c + 2 n, ..."""
    n = len(maxima)
    for c in range(n):
        maxima[c] = row[c]
    for base in range(n, len(row), n):
        part = row[base : base + n]  # loops over whole arrays alone become vectors
        for c in range(len(part)):
            maxima[c] = part[c] if part[c] > maxima[c] else maxima[c]


@inner
def _near(bounds, k, n_groups, starts, near):
    """Write the latents of each row that may be among its k largest; False if they are many."""
    bits, lengths, reach = bounds
    n_rows, m = bits.shape
    maxima, groups = np.empty(n_groups, np.int16), np.empty(n_groups + 1, np.int32)
    long, slack, spread = reach[0]
    for j in range(m):
        long, slack = max(long, reach[j, 0]), max(slack, reach[j, 1])
        spread = max(spread, reach[j, 2])
    starts[0] = 0
    for i in range(n_rows):
        row = bits[i]
        _maxima(row, maxima)
        lost, length = INTERVAL_WIDTH * lengths[i, 0], INTERVAL_WIDTH * lengths[i, 1]
        # k groups have a member of at least `bound`, so the k largest are at least that.
        bound = _number(_reached_by(maxima, k))
        bound -= BFLOAT16_ERROR * bound
        furthest = lost * long + length * slack + spread
        floor = _truncated(max((1 - 2 * BFLOAT16_ERROR) * (bound - furthest), 0))
        if floor == 0:
            floor = np.int16(-32768)  # of numbers below zero bits have another order
        # Written always, kept if counted: no branch to be guessed wrong.
        n_reaching = np.int64(0)
        for c in range(n_groups):
            groups[n_reaching] = c
            n_reaching += maxima[c] >= floor
        n = first = starts[i]
        for g in range(n_reaching):
            for j in range(groups[g], m, n_groups):
                near[n] = j
                n += row[j] >= floor
        last, n = n, first
        for t in range(first, last):
            r = reach[near[t]]
            least = _number(row[near[t]])
            most = least + BFLOAT16_ERROR * abs(least) + lost * r[0] + length * r[1] + r[2]
            near[n] = near[t]
            n += most >= bound
        starts[i + 1] = n
        if n > MAX_FRACTION * m * (i + GRACE_ROWS):
            return False
    return True


@inner
def _compute(x, encoder, starts, latents, values):
    """Write pre-activations in float32, latent by latent: rows of a tile stay in the cache."""
    rows, bias = encoder
    n_pairs = starts[-1]
    begin = np.zeros(len(rows) + 1, np.int64)
    for p in range(n_pairs):
        begin[latents[p] + 1] += 1
    for j in range(len(rows)):
        begin[j + 1] += begin[j]
    at = np.empty(len(rows), np.int64)
    for j in range(len(rows)):
        at[j] = begin[j]
    pair, row_of = np.empty(n_pairs, np.int32), np.empty(n_pairs, np.int32)
    for i in range(len(x)):
        for p in range(starts[i], starts[i + 1]):
            to = at[latents[p]]
            pair[to], row_of[to] = p, i
            at[latents[p]] = to + 1
    sums = np.zeros(n_pairs, x.dtype)
    for j in range(len(rows)):
        dot_rows(rows[j], 0, x, row_of, sums, begin[j], begin[j + 1])
        for q in range(begin[j], begin[j + 1]):
            values[pair[q]] = sums[q] + bias[j]


@compiled
def _select(bounds, x, encoder, k, n_groups, values, latents):
    n_rows, m = bounds.bits.shape
    starts = np.empty(n_rows + 1, np.int64)
    near = np.empty(_most(n_rows, m), np.int32)
    if not _near(bounds, k, n_groups, starts, near):
        return False
    computed = np.empty(starts[-1], x.dtype)
    _compute(x, encoder, starts, near, computed)
    scratch = np.empty(m + 1, x.dtype)
    for i in range(n_rows):
        kept, where = computed[starts[i] : starts[i + 1]], near[starts[i] : starts[i + 1]]
        n = write_largest(kept, where, len(kept), k, scratch, values[i], latents[i])
        for t in range(n, k):  # all others are below zero
            values[i, t], latents[i, t] = 0, t
    return True


@compiled
def _above(bits, x, encoder, low, counts, latents, values):
    n_rows, m = bits.shape
    starts = np.zeros(n_rows + 1, np.int64)
    n = 0
    for i in range(n_rows):
        row = bits[i]
        for first in range(0, m, COMPARED_LATENTS):
            part = row[first : min(first + COMPARED_LATENTS, m)]
            hits = 0
            for c in range(len(part)):
                hits += part[c] >= 0
            if hits:
                for c in range(len(part)):
                    latents[n] = first + c
                    n += part[c] >= 0
        starts[i + 1] = n
        if n > MAX_FRACTION * m * (i + GRACE_ROWS):
            return -1
    _compute(x, encoder, starts, latents, values)
    n = 0
    for i in range(n_rows):
        before = n
        for t in range(starts[i], starts[i + 1]):
            value, j = values[t], latents[t]
            values[n], latents[n] = value, j
            n += value > low[j]
        counts[i] = n - before
    return n
