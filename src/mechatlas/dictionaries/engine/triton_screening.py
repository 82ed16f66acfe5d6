"""The codes of a batch, exactly, from a product of half the precision, in Triton.

Each pre-activation is bounded as the CPU's `screening` does: the product of the numbers rounded to
bfloat16 is no further from the whole product than |x - h(x)| |w| + |h(x)| |w - h(w)| and what was
lost while summing (Cauchy and Schwarz). Latents that may be among the k largest of a row or of
the batch, or above their bound, are computed again in float32. A row of which more than `ROOM` may
be among the k largest is searched whole, in float32, by the kernel itself. The other searches tell
the host how many pairs there are, while the device computes them.
"""

# Kernels are read by Triton, which need not be installed, and are not called as functions.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportMissingImports=false

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from mechatlas.devices import LateNumber
from mechatlas.dictionaries.engine.interface import Find, TileCodes

ROOM = 4
"""Candidates of a row that have room, as a multiple of k."""
PAIRS = 1 / 8
"""Fraction of the pairs of a row and a latent that has room where codes are not k for each row."""
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
    """A `TileSearch` that also bounds the codes of a batch (`BatchBound`)."""

    def __init__(self, rows: Float[Tensor, "latent d_in"], bias: Float[Tensor, " latent"]) -> None:
        """Round an encoder that does not change while this is used."""
        m, d = rows.shape
        self.encoder = rows, bias
        self.half = rows.new_empty(m, d + EXTRA, dtype=torch.bfloat16)
        self.reach = rows.new_empty(m, 3)
        _round_encoder[(m,)](rows, bias, self.half, self.reach, d, d + EXTRA, wide=wide_block(d))
        self.furthest = self.reach.amax(dim=0)
        self._known: tuple[int, Tensor, Tensor] | None = None

    def largest(self, k: int) -> Callable[[Tensor, Tensor, Tensor], None]:
        """Make a function that writes the k largest codes of each row."""
        m, d = self.encoder[0].shape
        room = min(wide_block(ROOM * k), wide_block(m))

        def select(x: Float[Tensor, "row d_in"], values: Tensor, latents: Tensor) -> None:
            n = len(x)
            bounds, lengths = self._bounds(x)
            levels = x.new_empty(n)
            _row_levels[(n,)](bounds, levels, m, k, n_groups=self._groups(k))
            starts = torch.arange(0, n * room, room, device=x.device)
            near = torch.zeros(n, room, dtype=torch.int32, device=x.device)
            counts = torch.empty(n, dtype=torch.int32, device=x.device)
            computed = x.new_full((n, room), -torch.inf)
            found, sizes = (starts, near, counts), (room, n * room)
            reach = (lengths, self.reach, self.furthest)
            block = {"block": min(GROUPS, wide_block(m))}
            _near[(n,)](bounds, *reach, levels, levels, *found, 1, m, *sizes, **block)
            _compute[(n,)](
                x, *self.encoder, levels, *found, computed, d, *sizes, wide=wide_block(d)
            )
            top = computed.topk(k, dim=1)
            values.copy_(top.values.relu())
            latents.copy_(near.gather(1, top.indices))
            whole = (x, *self.encoder, counts, values, latents)
            _search_whole[(n,)](
                *whole, m, k, d, room=room, n_kept=wide_block(k), wide=wide_block(d)
            )

        return select

    def bound_of_batch(self, tiles: Iterable[Tensor], k: int) -> Float[Tensor, ""]:
        """Find a number, zero or more, that the k codes a row that are largest are above.

        Args:
            tiles: Rows of the batch, tile by tile.
            k: Codes of a row on average.
        """
        m, maxima = len(self.half), []
        for x in tiles:
            bounds, _ = self._bounds(x)
            maxima.append(bounds.new_empty(len(x), groups := self._groups(k)))
            _maxima[(len(x),)](bounds, maxima[-1], m, n_groups=groups)
        every = torch.cat(maxima)
        # As many groups have a member of at least the least of these.
        least = every.flatten().topk(min(k * len(every), every.numel()), sorted=False).values.amin()
        return (least.float() * (1 - HALF_ERROR.value)).clamp_min(0)

    def above(self, low: Float[Tensor, " latent"]) -> Find:
        """Make a function that finds the pre-activations of some rows above `low`.

        Pairs that may have been above it and are not have a value of zero.
        """
        m, d = self.encoder[0].shape
        least = low.amin()

        def find(x: Float[Tensor, "row d_in"]) -> TileCodes | None:
            n = len(x)
            bounds, lengths = self._bounds(x)
            most = n * min(m, max(GROUPS // 2, int(PAIRS * m)))
            starts = torch.zeros(n + 1, dtype=torch.int64, device=x.device)
            counts = torch.empty(n, dtype=torch.int32, device=x.device)
            near = torch.empty(most, dtype=torch.int32, device=x.device)
            found, sizes = (starts, near, counts), (most, most)
            reach = (lengths, self.reach, self.furthest)
            own = (bounds, *reach, least, low, *found, 0, m, *sizes)
            block = {"block": min(GROUPS, wide_block(m)), "bounded": True}
            _near[(n,)](*own, **block, writes=False)
            torch.cumsum(counts, 0, out=starts[1:])
            total = LateNumber(starts[-1])
            _near[(n,)](*own, **block)
            values = x.new_empty(most)
            read = (x, *self.encoder, low, *found)
            _compute[(n,)](*read, values, d, *sizes, wide=wide_block(d), bounded=True)
            n_pairs = int(total)
            return (counts, near[:n_pairs], values[:n_pairs]) if n_pairs <= most else None

        return find

    def _groups(self, k: int) -> int:
        """Number of groups of latents of which k have a member among the k largest."""
        return min(max(GROUPS, wide_block(2 * k)), wide_block(len(self.half)))

    def _bounds(self, x: Float[Tensor, "row d_in"]) -> tuple[Tensor, Tensor]:
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
def _round_encoder(rows, bias, half, reach, d, stride, wide: tl.constexpr):
    j = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, wide)
    row = tl.load(rows + j * d + c, mask=c < d, other=0.0)
    rounded = row.to(tl.bfloat16)
    left = row - rounded.to(tl.float32)
    lost, length = tl.sqrt(tl.sum(left * left)), tl.sqrt(tl.sum(row * row))
    summing = 2.0**-23 * (d + 5)  # of the sum of sizes, twice what can be lost
    slack = lost + summing * length
    b = tl.load(bias + j)
    offset = b - summing * tl.abs(b)
    to = half + j * stride
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
    tl.store(to, _group_maxima(bounds, i, m, n_groups).to(tl.bfloat16))


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
    # k groups have a member of at least `bound`, so the k largest are at least that.
    bound = (low << 16).to(tl.float32, bitcast=True)
    tl.store(levels + i, bound - bound * HALF_ERROR)


@triton.jit
def _near(
    bounds,
    lengths,
    reach,
    furthest,
    levels,
    low,
    starts,
    near,
    counts,
    stride,
    m,
    room,
    total,
    block: tl.constexpr,
    bounded: tl.constexpr = False,
    writes: tl.constexpr = True,
):
    """Write the latents of a row that may reach its level and their bound, and their number."""
    i = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, block)
    lost = tl.load(lengths + i * 2) * INTERVAL
    length = tl.load(lengths + i * 2 + 1) * INTERVAL
    level = tl.load(levels + i * stride)
    far = lost * tl.load(furthest) + length * tl.load(furthest + 1) + tl.load(furthest + 2)
    floor = level - far
    floor -= tl.abs(floor) * 2 * HALF_ERROR
    begin = tl.load(starts + i)
    end = tl.minimum(begin + room, total)
    n = 0
    for first in range(0, m, block):
        at = first + c
        least = tl.load(bounds + i * m + at, mask=at < m, other=0.0).to(tl.float32)
        kept = (at < m) & ~(least < floor)  # NaN is kept
        if tl.sum(kept.to(tl.int32)) > 0:
            r = reach + at.to(tl.int64) * 3
            most = least + tl.abs(least) * HALF_ERROR + lost * tl.load(r, mask=kept, other=0.0)
            most += length * tl.load(r + 1, mask=kept, other=0.0)
            most += tl.load(r + 2, mask=kept, other=0.0)
            kept = kept & ~(most < level)
            if bounded:
                kept = kept & ~(most < tl.load(low + at, mask=kept, other=0.0))
            if writes:
                to = begin + n + tl.cumsum(kept.to(tl.int32), 0) - 1
                tl.store(near + to, at.to(tl.int32), mask=kept & (to < end))
            n += tl.sum(kept.to(tl.int32))
    tl.store(counts + i, n)


@triton.jit
def _compute(
    x,
    rows,
    bias,
    low,
    starts,
    near,
    counts,
    computed,
    d,
    room,
    total,
    wide: tl.constexpr,
    bounded: tl.constexpr = False,
):
    """Write the pre-activations of a row's candidates in float32, or zero below their bound."""
    i = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, wide)
    row = tl.load(x + i * d + c, mask=c < d, other=0.0)
    begin = tl.load(starts + i)
    end = tl.minimum(begin + tl.minimum(tl.load(counts + i), room), total)
    for p in range(begin, end):
        j = tl.load(near + p).to(tl.int64)
        own = tl.load(rows + j * d + c, mask=c < d, other=0.0)
        value = tl.sum(row * own) + tl.load(bias + j)
        if bounded:
            value = tl.where(value > tl.load(low + j), value, 0.0)
        tl.store(computed + p, value)


@triton.jit
def _search_whole(
    x,
    rows,
    bias,
    counts,
    values,
    latents,
    m,
    k,
    d,
    room: tl.constexpr,
    n_kept: tl.constexpr,
    wide: tl.constexpr,
):
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
                    own = tl.load(rows + j.to(tl.int64) * d + c, mask=c < d, other=0.0)
                    value = tl.sum(row * own) + tl.load(bias + j)
                    bits = tl.maximum(value, 0.0).to(tl.int32, bitcast=True).to(tl.int64)
                    keys = tl.where(t == s, (bits << 32) | (0x7FFFFFFF - j).to(tl.int64), keys)
            best = tl.sort(tl.maximum(best, tl.sort(keys)), descending=True)
        kept = t < k
        value = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        latent = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
        latent = tl.where(latent < m, latent, 0)
        tl.store(values + i * k + t, value, mask=kept)
        tl.store(latents + i * k + t, latent, mask=kept)
