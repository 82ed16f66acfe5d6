"""The codes of a batch, exactly, from a product of half the precision, in Triton.

Each pre-activation is bounded as the CPU's `screening` does: the product of the numbers rounded to
bfloat16 is no further from the whole product than |x - h(x)| |w| + |h(x)| |w - h(w)| and what was
lost while summing (Cauchy and Schwarz). Latents that may be among the k largest of a row or of
the batch, or above their bound (`reaches`), are computed again in float32. A row of which more than
`ROOM` may be among the k largest is searched whole, in float32, by the kernel itself. For a whole
batch all pairs have room.
"""

# Kernels are read by Triton, which need not be installed, and are not called as functions.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportMissingImports=false

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from mechatlas.dictionaries.engine.structures import Codes

ROOM = 4
"""Candidates of a row that have room, as a multiple of k."""
GROUPS = 1024
"""Groups of latents whose largest bounds decide what is a candidate."""
EXTRA = 8
"""Columns that follow the activations in a screened product: five are used, for the bias and the
lengths that bound its error; with eight, rows begin where the device likes it."""
HALF_ERROR = tl.constexpr(2.0**-8)
"""Largest relative error of a number rounded to bfloat16."""
MARGIN = tl.constexpr(1.01)
"""Factor of the lengths in the product, which covers the rounding of the lengths themselves."""
INTERVAL = tl.constexpr(2.05)
"""Width of the interval around a screened pre-activation, in units of |x| |w| (upper bound)."""


def wide_block(n: int) -> int:
    """Width of a block that holds n numbers."""
    return max(16, triton.next_power_of_2(n))


class Screen:
    """A search for the k largest codes of rows, or of a batch."""

    def __init__(self, rows: Float[Tensor, "latent d_in"], bias: Float[Tensor, " latent"]) -> None:
        """Round an encoder that does not change while this is used."""
        m, d = rows.shape
        self.encoder = rows, bias
        if apart := rows.stride(0) != d + EXTRA:
            self.half = rows.new_empty(m, d + EXTRA, dtype=torch.bfloat16)
        else:  # there is room behind each row
            self.half = rows.as_strided((m, d + EXTRA), rows.stride())
        self.reach = bias.new_empty(m, 3)
        own = rows, bias, self.half, self.reach, rows.stride(0), d, d + EXTRA
        _round_encoder[(m,)](*own, wide=wide_block(d), apart=apart)
        self.furthest = self.reach.amax(dim=0)
        self._known: tuple[int, Tensor, Tensor] | None = None

    def largest(self, k: int) -> Callable[[Tensor, Tensor, Tensor], None]:
        """Make a function that writes the k largest codes of each row."""
        m, d = self.encoder[0].shape
        room = min(wide_block(ROOM * k), wide_block(m))

        def select(x: Float[Tensor, "row d_in"], values: Tensor, latents: Tensor) -> None:
            n = len(x)
            bounds, lengths = self.bounds(x)
            levels = x.new_empty(n)
            _row_levels[(n,)](bounds, levels, m, k, n_groups=self._groups(k))
            starts = torch.arange(0, n * room, room, device=x.device)
            near = torch.zeros(n, room, dtype=torch.int32, device=x.device)
            counts = torch.empty(n, dtype=torch.int32, device=x.device)
            computed = x.new_full((n, room), -torch.inf)
            found, sizes = (starts, near, counts), (room, n * room)
            reach = (lengths, self.reach, self.furthest)
            block = {"block": min(GROUPS, wide_block(m))}
            _near[(n,)](bounds, *reach, levels, *found, 1, m, *sizes, **block)
            pitch = self.encoder[0].stride(0)
            _compute[(n,)](x, *self.encoder, *found, computed, pitch, d, *sizes, wide=wide_block(d))
            top = computed.topk(k, dim=1)
            values.copy_(top.values.relu())
            latents.copy_(near.gather(1, top.indices))
            whole = (x, *self.encoder, counts, values, latents)
            _search_whole[(n,)](
                *whole, pitch, m, k, d, room=room, n_kept=wide_block(k), wide=wide_block(d)
            )

        return select

    def largest_of_batch(self, tiles: Sequence[Float[Tensor, "_ d_in"]], k: int) -> Codes:
        """Find the codes above zero that are largest in the batch, of equal ones the first.

        Nobody waits for the device: all pairs of a tile have room. Where fewer than k a row are
        above zero, the last row has as many of zero more.

        Args:
            tiles: Rows of the batch, tile by tile.
            k: Codes of a row on average.
        """
        n, m = sum(map(len, tiles)), len(self.half)
        maxima, done = self.half.new_empty(n, groups := self._groups(k)), 0
        for x in tiles:
            to = maxima[done : done + len(x)]
            _maxima[(len(x),)](self.bounds(x)[0], to, m, n_groups=groups)
            done += len(x)
        # As many groups have a member of at least the least of these.
        level = maxima.view(-1).topk(min(k * n, maxima.numel()), sorted=False).values.amin()
        found = []
        for x in tiles:
            kept = _keep_largest(self._candidates(x, level), k * n, m - 1)
            if len(tiles) == 1:
                return kept
            found.append((kept.starts[:-1] + len(found) * k * n, kept.latents, kept.values))
        starts, *pairs = (list(parts) for parts in zip(*found, strict=True))
        starts.append(starts[0].new_full((1,), len(found) * k * n))
        return _keep_largest((torch.cat(starts), *map(torch.cat, pairs)), k * n, m - 1)

    def _candidates(self, x: Float[Tensor, "row d_in"], level: Tensor) -> tuple[Tensor, ...]:
        """List the pairs that may be above a level; there is room for all.

        Args:
            x: Some rows.
            level: Number that is the same for all pairs.

        Returns:
            First pair of each row with their number, the latents, and the pre-activations.
        """
        n, m = len(x), len(self.half)
        starts = torch.zeros(n + 1, dtype=torch.int64, device=x.device)
        near = torch.empty(n * m, dtype=torch.int32, device=x.device)
        counts = torch.empty(n, dtype=torch.int32, device=x.device)
        own = (*self.bounds(x), self.reach, self.furthest, level, starts, near, counts)
        own += (0, m, n * m, n * m)
        block = min(GROUPS, wide_block(m))
        _near[(n,)](*own, block=block, writes=False)
        torch.cumsum(counts, 0, out=starts[1:])
        _near[(n,)](*own, block=block)
        values, d = x.new_empty(n * m), x.shape[1]
        found = (starts, near, counts, values, self.encoder[0].stride(0), d, n * m, n * m)
        _compute[(n,)](x, *self.encoder, *found, wide=wide_block(d))
        return starts, near, values

    def _groups(self, k: int) -> int:
        """Number of groups of latents of which k have a member among the k largest."""
        return min(max(GROUPS, wide_block(2 * k)), wide_block(len(self.half)))

    def bounds(self, x: Float[Tensor, "row d_in"]) -> tuple[Tensor, Tensor]:
        """Lower bounds of pre-activations, and the rows' share in their distance.

        Those of the last rows are known: a batch that is one tile is multiplied once.
        """
        if self._known is None or self._known[0] != x.data_ptr():
            n, d = x.shape
            rounded = x.new_empty(n, d + EXTRA, dtype=torch.bfloat16)
            lengths = x.new_empty(n, 2)
            _round_batch[(n,)](x, rounded, lengths, d, d + EXTRA, wide=wide_block(d))
            with _sums_in_full():
                self._known = x.data_ptr(), rounded @ self.half.T, lengths
        return self._known[1:]


@contextmanager
def _sums_in_full() -> Iterator[None]:
    """Let no product add parts of its sums in half precision, which no bound accounts for."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


@triton.jit
def _round_encoder(
    rows, bias, half, reach, pitch, d, stride, wide: tl.constexpr, apart: tl.constexpr
):  # fmt: skip
    j = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, wide)
    row = tl.load(rows + j * pitch + c, mask=c < d, other=0.0).to(tl.float32)
    rounded = row.to(tl.bfloat16)
    left = row - rounded.to(tl.float32)
    lost, length = tl.sqrt(tl.sum(left * left)), tl.sqrt(tl.sum(row * row))
    summing = 2.0**-23 * (d + 5)  # of the sum of sizes, twice what can be lost
    slack = lost + summing * length
    b = tl.load(bias + j)
    offset = b - summing * tl.abs(b)
    to = half + j * stride
    if apart:
        tl.store(to + c, rounded, mask=c < d)
    for column in range(3):
        part = offset.to(tl.bfloat16)
        tl.store(to + d + column, part)
        offset -= part.to(tl.float32)
    tl.store(to + d + 3, (length * -MARGIN).to(tl.bfloat16))
    tl.store(to + d + 4, (slack * -MARGIN).to(tl.bfloat16))
    for column in range(5, 8):
        tl.store(to + d + column, (length * 0).to(tl.bfloat16))
    tl.store(reach + j * 3, length)
    tl.store(reach + j * 3 + 1, slack)
    tl.store(reach + j * 3 + 2, 2 * summing * tl.abs(b))


@triton.jit
def _round_batch(rows, half, lengths, d, stride, wide: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, wide)
    row = tl.load(rows + i * d + c, mask=c < d, other=0.0)
    rounded = row.to(tl.bfloat16)
    left = row - rounded.to(tl.float32)
    lost = tl.sqrt(tl.sum(left * left))
    length = tl.sqrt(tl.sum(row * row)) + lost
    to = half + i * stride
    tl.store(to + c, rounded, mask=c < d)
    for column in range(3):
        tl.store(to + d + column, (length * 0 + 1).to(tl.bfloat16))
    tl.store(to + d + 3, (lost * MARGIN).to(tl.bfloat16))
    tl.store(to + d + 4, (length * MARGIN).to(tl.bfloat16))
    for column in range(5, 8):
        tl.store(to + d + column, (length * 0).to(tl.bfloat16))
    tl.store(lengths + i * 2, lost)
    tl.store(lengths + i * 2 + 1, length)


@triton.jit
def _group_maxima(bounds, i, m, n_groups: tl.constexpr):
    """Largest bounds of a row in each strided group of latents."""
    c = tl.arange(0, n_groups)
    below = -3.0e38  # finite, so that bounds of what is not there can be added to
    maxima = tl.full([n_groups], below, tl.float32)
    for first in range(0, m, n_groups):
        at = first + c
        part = tl.load(bounds + i * m + at, mask=at < m, other=below).to(tl.float32)
        maxima = tl.maximum(maxima, part)
    return maxima


@triton.jit
def _maxima(bounds, maxima, m, n_groups: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    to = maxima + i * n_groups + tl.arange(0, n_groups)
    tl.store(to, tl.maximum(_group_maxima(bounds, i, m, n_groups), 0.0).to(tl.bfloat16))


@triton.jit
def _row_levels(bounds, levels, m, k, n_groups: tl.constexpr):
    """Write a number that the k largest of a row are at least, or zero if fewer are above it."""
    i = tl.program_id(0).to(tl.int64)
    maxima = _group_maxima(bounds, i, m, n_groups)
    # The k-th largest of them by bisection of the bits, which are in the numbers' order above zero.
    low, high = 0, 0x7F80
    for _ in range(16):
        middle = (low + high + 1) // 2
        level = (middle << 16).to(tl.float32, bitcast=True)
        enough = tl.sum((maxima >= level).to(tl.int32)) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    # k groups have a member of at least this, so the k largest are at least that.
    tl.store(levels + i, (low << 16).to(tl.float32, bitcast=True))


@triton.jit
def reaches(
    bounds, lengths, reach, furthest, i, level, low, at, end, m, bounded: tl.constexpr
):  # fmt: skip
    """Latents of a row that may reach a level, and their own bound."""
    lost = tl.load(lengths + i * 2) * INTERVAL
    length = tl.load(lengths + i * 2 + 1) * INTERVAL
    far = lost * tl.load(furthest) + length * tl.load(furthest + 1) + tl.load(furthest + 2)
    floor = level - far
    floor -= tl.abs(floor) * 2 * HALF_ERROR
    least = tl.load(bounds + i * m + at, mask=at < end, other=0.0).to(tl.float32)
    near = (at < end) & ~(least < floor)  # NaN is kept
    if tl.sum(near.to(tl.int32)) > 0:
        r = reach + at.to(tl.int64) * 3
        most = least + tl.abs(least) * HALF_ERROR + lost * tl.load(r, mask=near, other=0.0)
        most += length * tl.load(r + 1, mask=near, other=0.0)
        most += tl.load(r + 2, mask=near, other=0.0)
        near = near & ~(most < level)
        if bounded:
            near = near & ~(most < tl.load(low + at, mask=near, other=0.0))
    return near


@triton.jit
def _near(
    bounds, lengths, reach, furthest, levels, starts, near, counts, stride, m, room, total,
    block: tl.constexpr, writes: tl.constexpr = True,
):  # fmt: skip
    """Write the latents of a row that may reach its level, and their number."""
    i = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, block)
    level = tl.load(levels + i * stride).to(tl.float32)
    level -= tl.abs(level) * HALF_ERROR  # it may have been rounded up
    begin = tl.load(starts + i)
    end = tl.minimum(begin + room, total)
    n = 0
    for first in range(0, m, block):
        at = first + c
        kept = reaches(bounds, lengths, reach, furthest, i, level, levels, at, m, m, False)
        if writes:
            to = begin + n + tl.cumsum(kept.to(tl.int32), 0) - 1
            tl.store(near + to, at, mask=kept & (to < end))
        n += tl.sum(kept.to(tl.int32))
    tl.store(counts + i, n)


@triton.jit
def _compute(
    x, rows, bias, starts, near, counts, computed, pitch, d, room, total, wide: tl.constexpr
):  # fmt: skip
    """Write the pre-activations of a row's candidates in float32."""
    i = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, wide)
    row = tl.load(x + i * d + c, mask=c < d, other=0.0)
    begin = tl.load(starts + i)
    end = tl.minimum(begin + tl.minimum(tl.load(counts + i), room), total)
    for p in range(begin, end):
        j = tl.load(near + p).to(tl.int64)
        own = tl.load(rows + j * pitch + c, mask=c < d, other=0.0).to(tl.float32)
        tl.store(computed + p, tl.sum(row * own) + tl.load(bias + j))


@triton.jit
def _search_whole(
    x, rows, bias, counts, values, latents, pitch, m, k, d,
    room: tl.constexpr, n_kept: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Write the k largest of a row whose candidates had no room, from all its pre-activations."""
    i = tl.program_id(0).to(tl.int64)
    if tl.load(counts + i) > room:
        c, t = tl.arange(0, wide), tl.arange(0, n_kept)
        row = tl.load(x + i * d + c, mask=c < d, other=0.0)
        # A number and its latent in one key: the bits of numbers above zero are in their order,
        # and of two equal ones the first comes first.
        best = tl.zeros([n_kept], tl.int64)
        for first in range(0, m, n_kept):
            keys = tl.zeros([n_kept], tl.int64)
            for s in range(n_kept):
                j = first + s
                if j < m:
                    own = tl.load(rows + j.to(tl.int64) * pitch + c, mask=c < d, other=0.0)
                    value = tl.sum(row * own.to(tl.float32)) + tl.load(bias + j)
                    bits = tl.maximum(value, 0.0).to(tl.int32, bitcast=True).to(tl.int64)
                    keys = tl.where(t == s, (bits << 32) | (0x7FFFFFFF - j).to(tl.int64), keys)
            best = tl.sort(tl.maximum(best, tl.sort(keys)), descending=True)
        kept = t < k
        value = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        latent = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
        latent = tl.where(latent < m, latent, 0)
        tl.store(values + i * k + t, value, mask=kept)
        tl.store(latents + i * k + t, latent, mask=kept)


def _keep_largest(pairs: Sequence[Tensor], n: int, last: int) -> Codes:
    """Keep the n largest codes above zero of a batch, of equal ones the first.

    Args:
        pairs: First pair of each row with their number, latents, and pre-activations.
        n: Number of codes; if fewer are above zero, others follow those of the last row.
        last: Latent of the others.
    """
    starts, latents, values = pairs
    n_rows = len(starts) - 1
    limit = latents.new_empty(2)
    _find_limit[(1,)](values, starts[n_rows:], limit, n, num_warps=16)
    before = starts.new_empty(2, n_rows)
    _count_kept[(n_rows,)](values, starts, limit, before, n_rows)
    torch.cumsum(before, 1, out=before)
    kept = Codes(starts.new_empty(n_rows + 1), latents.new_empty(n), values.new_empty(n), values)
    _write_kept[(n_rows,)](values, latents, starts, limit, before, *kept[:3], n_rows, n, last)
    return kept._replace(raw=kept.values)


@triton.jit
def _find_limit(values, total, limit, n, block: tl.constexpr = 4096):
    """Write the n-th largest number above zero, and how many of its equals are among the n.

    If there are fewer, both are zero.
    """
    t, bins = tl.arange(0, block), tl.arange(0, 512)
    end = tl.load(total)
    known, left = 0, n
    # Bits of numbers above zero are in their order: eight of them at a time.
    for digit in range(4):
        shift = 24 - 8 * digit
        counts = tl.zeros([512], tl.int32)
        for first in range(0, end, block):
            value = tl.load(values + first + t, mask=first + t < end, other=0.0)
            bits = tl.where(value > 0, value, 0.0).to(tl.int32, bitcast=True) >> shift
            counts += tl.histogram(tl.where((bits >> 8) == known, bits & 255, 256), 512)
        counts = tl.where(bins < 256, counts, 0)
        larger = tl.sum(counts) - tl.cumsum(counts, 0)
        found = tl.sum((larger >= left).to(tl.int32))
        left -= tl.sum(tl.where(bins == found, larger, 0))
        known = known * 256 + found
    tl.store(limit, known)
    tl.store(limit + 1, tl.where(known > 0, left, 0))


@triton.jit
def _count_kept(values, starts, limit, before, n_rows, block: tl.constexpr = 128):
    """Write how many numbers of a row are above the limit, and how many equal it."""
    i = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, block)
    smallest = tl.load(limit).to(tl.float32, bitcast=True)
    end = tl.load(starts + i + 1)
    above, ties = 0, 0
    for first in range(tl.load(starts + i), end, block):
        value = tl.load(values + first + t, mask=first + t < end, other=-1.0)
        above += tl.sum((value > smallest).to(tl.int32))
        ties += tl.sum((value == smallest).to(tl.int32))
    tl.store(before + i, above)
    tl.store(before + n_rows + i, ties)


@triton.jit
def _write_kept(
    values, latents, starts, limit, before, kept_starts, kept_latents, kept_values,
    n_rows, n, last, block: tl.constexpr = 128,
):  # fmt: skip
    """Write the codes of a row, in their order; of the last row, those of zero too."""
    i = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, block)
    smallest, n_ties = tl.load(limit).to(tl.float32, bitcast=True), tl.load(limit + 1)
    ties = tl.load(before + n_rows + i - 1, mask=i > 0, other=0)
    to = tl.load(before + i - 1, mask=i > 0, other=0) + tl.minimum(ties, n_ties)
    tl.store(kept_starts + i, to)
    end = tl.load(starts + i + 1)
    for first in range(tl.load(starts + i), end, block):
        value = tl.load(values + first + t, mask=first + t < end, other=-1.0)
        tied = (value == smallest).to(tl.int32)
        kept = (value > smallest) | ((tied > 0) & (ties + tl.cumsum(tied, 0) <= n_ties))
        at = to + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(kept_values + at, value, mask=kept)
        latent = tl.load(latents + first + t, mask=kept, other=0)
        tl.store(kept_latents + at, latent, mask=kept)
        ties += tl.sum(tied)
        to += tl.sum(kept.to(tl.int32))
    if i == n_rows - 1:
        tl.store(kept_starts + n_rows, n)
        for first in range(to, n, block):
            tl.store(kept_values + first + t, t * 0.0, mask=first + t < n)
            tl.store(kept_latents + first + t, t * 0 + last, mask=first + t < n)
