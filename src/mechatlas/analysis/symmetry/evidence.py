"""How alike the blocks of a feature are after a shift by each element, and how sure that is.

Main path, in reading order:

    common_part    the direction that all features share; `without` takes it away
    from_halves    two independent estimates -> likeness corrected for noise, with its error
    from_channels  one estimate -> raw likeness, with its spread over channels

The stabiliser function of a feature with blocks D is, with c(h) = sum over g of <D_gh, D_g>,

    s(h) = c(h) / c(e),

which is 1 just where D_gh = D_g for all g. Noise in D lowers it; but if A and B are two estimates
with independent noise, then c(h) = sum of <A_gh, B_g> has no bias, whatever the noise of each
half is like, so that s is judged against the feature's own noise ceiling c(e).

Error of T = c(h) - s0 c(e). Symmetrise it, T = A' M B with a symmetric matrix M; write m for
the mean of the halves and e for A - B, which are independent. Then T = m' M m - e' M e / 4, and

    V = sum over entries j of (M m)_j^2 e_j^2

has the variance of T as its expectation if the noise of different entries is independent, each
with any variance. Where it is not, the sum of (M m)_j e_j varies more than V says; by how much is
measured over all features and multiplies V.

Source: Walther et al., Reliability of dissimilarity measures for multi-voxel pattern analysis
(2016), for products of independent halves.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float
from scipy import stats

from mechatlas.maths.groups import Group

SUPPORT = 0.5**0.5
"""A symmetry needs support that blocks are more alike than this: more than half of each explains
the other (cosine squared)."""
ALIKE = 0.95
"""And it must not be certain that they are less alike than this, unless told otherwise."""
_CHUNK_BYTES = 1 << 18


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of each feature and element."""

    products: Float[np.ndarray, "feature element"]
    """c(h), without the bias of noise where there are halves."""
    likeness: Float[np.ndarray, "feature element"]
    """s(h); 0 where nothing of the feature can be reproduced."""
    errors: Float[np.ndarray, "feature element"]
    """Standard error of the likeness."""
    p_support: Float[np.ndarray, "feature element"]
    """Of the null hypothesis that it is at most `SUPPORT`."""
    p_unlike: Float[np.ndarray, "feature element"]
    """Of the null hypothesis that it is at least `alike` times the ceiling."""
    p_signal: Float[np.ndarray, " feature"]
    """Of the null hypothesis that the two halves share nothing."""
    ceiling: Float[np.ndarray, " feature"]
    """Cosine between the two halves of a feature; NaN without halves."""
    noise: Float[np.ndarray, " feature"]
    """Variance of the noise of an entry of the mean of the halves, over the feature's energy
    c(e); NaN without halves."""
    inflation: float
    """What the variances were multiplied with, because entries err together."""


def common_part(blocks: Float[np.ndarray, "feature order d"]) -> Float[np.ndarray, " d"]:
    """The direction that all features share, of length 1 or shorter.

    Blocks of activations that are never negative share a direction that makes all of them
    alike. It is the mean, over features of unit length, of the means over elements; its length
    says how much of its energy is more than unrelated features would have.
    """
    means = blocks.mean(axis=1, dtype=np.float64)
    lengths = np.sqrt(np.einsum("igk,igk->i", blocks, blocks, dtype=np.float64))
    means /= np.where(lengths > 0, lengths, 1)[:, None]
    common = means.mean(axis=0)
    energy = np.square(common).sum()
    if energy == 0:
        return common
    chance = np.square(means).sum() / len(means) ** 2
    return common * np.sqrt(max(0.0, 1 - chance / energy) / energy)


def without(
    blocks: Float[np.ndarray, "feature order d"], common: Float[np.ndarray, " d"]
) -> Float[np.ndarray, "feature order d"]:
    """Blocks less what the mean of each feature has of a common direction.

    The same vector is taken from all blocks of a feature, not another for each element: no
    difference between blocks changes, so what is symmetric stays so.
    """
    common = common.astype(blocks.dtype)
    share = blocks.mean(axis=1) @ common
    return blocks - share[:, None, None] * common


def from_halves(
    a: Float[np.ndarray, "feature order d"],
    b: Float[np.ndarray, "feature order d"],
    group: Group,
    alike: float = ALIKE,
) -> Evidence:
    """Judge every shift of every feature against the feature's own noise ceiling."""
    common = (common_part(a) + common_part(b)) / 2
    shifts = _shifts(group)
    n = len(a)
    moments = np.zeros((len(shifts), 5, n))
    ceiling, noise = np.full(n, np.nan), np.zeros(n)
    alone = np.zeros((3, n))  # of m e: its sum, the sum of its squares and of its fourth powers
    for part in _chunks(a):
        x, y = without(a[part], common), without(b[part], common)
        mean, error = (x + y) / 2, x - y
        product = mean * error
        flat = product.reshape(len(mean), -1)
        alone[:, part] = flat.sum(1), _dot(flat, flat), np.square(np.square(flat)).sum(1)
        for row, (h, back) in enumerate(shifts):
            shifted = (mean[:, group.table[:, h]] + mean[:, group.table[:, back]]) / 2
            moved = shifted * error
            moments[row, :, part] = np.stack([
                _dot(mean, shifted) - _dot(error, error[:, group.table[:, h]]) / 4,
                moved.reshape(len(mean), -1).sum(1),
                _dot(moved, moved),
                _dot(moved, product),
                _dot(mean, mean),
            ])  # fmt: skip
        lengths = np.sqrt(_dot(x, x) * _dot(y, y))
        with np.errstate(invalid="ignore"):
            ceiling[part] = _dot(x, y) / lengths
        noise[part] = _dot(error, error) / (4 * flat.shape[1])
    return _weigh(moments, alone, ceiling, noise, group, alike)


def _weigh(
    moments: np.ndarray,
    alone: np.ndarray,
    ceiling: np.ndarray,
    noise: np.ndarray,
    group: Group,
    alike: float,
) -> Evidence:
    """Tests from the sums that one pass over the blocks gave."""
    shifts = _shifts(group)
    row_of = np.zeros(group.order, int)
    for row, (h, back) in enumerate(shifts):
        row_of[[h, back]] = row
    products, moved, squares, mixed, _ = moments[row_of].transpose(1, 2, 0)
    energy = products[:, [group.identity]]
    line, line_squares, line_fourth = (each[:, None] for each in alone)

    def variance(s: np.ndarray | float) -> np.ndarray:
        return np.maximum(squares - 2 * s * mixed + s**2 * line_squares, 0)

    others = np.arange(group.order) != group.identity
    inflation = max(
        1.0,
        _mean_ratio((moved - SUPPORT * line)[:, others] ** 2, variance(SUPPORT)[:, others]),
        _mean_ratio(line**2, line_squares),
    )
    # Satterthwaite: the fourth moment of a normal number is three times its variance squared.
    freedom = np.maximum(3 * line_squares**2 / np.maximum(line_fourth, 1e-300), 1)
    support = _upper(products - SUPPORT * energy, inflation * variance(SUPPORT), freedom)
    unlike = _upper(alike * energy - products, inflation * variance(alike), freedom)
    signal = _upper(energy, inflation * line_squares, freedom)
    likeness = np.where(energy > 0, products / np.where(energy > 0, energy, 1), 0.0)
    likeness[:, ~others] = 1.0
    spread = np.sqrt(inflation * variance(likeness)) / np.maximum(energy, 1e-300)
    safe = np.maximum(energy[:, 0], 1e-300)
    return Evidence(
        products=products,
        likeness=likeness,
        errors=np.where(energy > 0, spread, np.inf),
        p_support=np.where(energy > 0, support, 1.0),
        p_unlike=np.where(energy > 0, unlike, 1.0),
        p_signal=signal[:, 0],
        ceiling=ceiling,
        noise=np.where(energy[:, 0] > 0, inflation * noise / safe, np.inf),
        inflation=inflation,
    )


def from_channels(
    blocks: Float[np.ndarray, "feature order d"], group: Group, alike: float = ALIKE
) -> Evidence:
    """What one estimate says: how alike shifted blocks are, and how that spreads over channels.

    Noise cannot be told from asymmetry then. The ceiling of a feature is taken to be its
    likeness under the shift that it is most alike under, and p-values are those of the claim
    that other channels would say the same.
    """
    common = common_part(blocks)
    n, order, d = blocks.shape
    sums = np.zeros((n, order, 4))
    for part in _chunks(blocks):
        x = without(blocks[part], common)
        own = np.square(x).sum(axis=1, dtype=np.float64)
        for h in range(order):
            per = np.einsum("igk,igk->ik", x[:, group.table[:, h]], x, dtype=np.float64)
            sums[part, h] = np.stack(
                [per.sum(1), (per * per).sum(1), (per * own).sum(1), (own * own).sum(1)], axis=1
            )
    products, squares, mixed, own_squares = sums.transpose(2, 0, 1)
    energy = products[:, [group.identity]]
    alive = energy > 0
    scale = np.where(alive, energy, 1)
    likeness = np.where(alive, products / scale, 0.0)
    spread = np.maximum(squares - 2 * likeness * mixed + likeness**2 * own_squares, 0)
    # Rounding of sums of squares: smaller spreads than this are none.
    spread[spread < 1e-12 * own_squares] = 0
    variance = spread * d / max(d - 1, 1) / scale**2
    freedom = np.full((n, 1), max(d - 1, 1), float)
    others = np.arange(order) != group.identity
    ceiling = likeness[:, others].max(axis=1, initial=0.0)[:, None]
    return Evidence(
        products=products,
        likeness=likeness,
        errors=np.where(alive, np.sqrt(variance), np.inf),
        p_support=np.where(alive, _upper(likeness - SUPPORT, variance, freedom), 1.0),
        p_unlike=np.where(alive, _upper(alike * ceiling - likeness, variance, freedom), 1.0),
        p_signal=np.where(alive[:, 0], 0.0, 1.0),
        ceiling=np.full(n, np.nan),
        noise=np.full(n, np.nan),
        inflation=1.0,
    )


def _shifts(group: Group) -> list[tuple[int, int]]:
    """Each element once, with its inverse, which shifts as it does."""
    return [(h, int(group.inverses[h])) for h in range(group.order) if h <= group.inverses[h]]


def _chunks(blocks: np.ndarray) -> Iterator[slice]:
    """Features that fit in the cache together."""
    step = max(1, _CHUNK_BYTES // (blocks[0].nbytes or 1)) if len(blocks) else 1
    return (slice(i, min(i + step, len(blocks))) for i in range(0, len(blocks), step))


def _dot(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
    return np.einsum("ij,ij->i", x, y)


def _mean_ratio(squares: np.ndarray, variances: np.ndarray) -> float:
    """Mean of squares of numbers over the variances they should have."""
    there = variances > 0
    if not there.any():
        return 1.0
    return float((squares[there] / variances[there]).mean())


def _upper(excess: np.ndarray, variance: np.ndarray, freedom: np.ndarray) -> np.ndarray:
    """p-value of the null hypothesis that what `excess` estimates is not above zero."""
    error = np.sqrt(variance)
    certain = np.where(excess > 0, np.inf, -np.inf)
    z = np.where(error > 0, excess / np.where(error > 0, error, 1), certain)
    return np.asarray(stats.t.sf(z, freedom))
