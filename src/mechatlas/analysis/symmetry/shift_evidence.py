"""Similarity of the decoder blocks of a feature before and after a shift, with its uncertainty.

Main path, in reading order:

    common_direction        direction that all features share; `remove_direction` projects it out
    evidence_from_halves    two independent estimates -> similarity corrected for noise, its error
    evidence_from_channels  one estimate -> uncorrected similarity, with its spread over channels

The stabilizer function of a feature with blocks D is, with c(h) = sum over g of <D_gh, D_g>,

    s(h) = c(h) / c(e),

which is 1 exactly where D_gh = D_g for all g. Noise in D lowers it. If A and B are two estimates
with independent noise, then c(h) = sum of <A_gh, B_g> is unbiased, whatever the noise of each
half, so s is judged against the feature's own noise ceiling c(e).

Error of T = c(h) - s0 c(e). Write T = a' M b with a symmetric matrix M, m for the mean of the
halves and e for a - b, which are independent. Then T = m' M m - e' M e / 4, and

    V = sum over entries j of (M m)_j^2 e_j^2

has the variance of T as its expectation if the noise of different entries is independent, each
entry with any variance. Where it is not, the sum of (M m)_j e_j varies more than V says; the ratio
is measured over all features and multiplies V (`variance_inflation`).

Source: Walther et al., Reliability of dissimilarity measures for multi-voxel pattern analysis
(2016), for products of independent halves.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float
from scipy import stats

from mechatlas.maths.groups import Group

SUPPORT_THRESHOLD = 0.5**0.5
"""Similarity that every element of a claimed stabilizer must exceed: each block then explains more
than half of the variance of the other (squared cosine)."""
EQUALITY_THRESHOLD = 0.95
"""Default similarity at which shifted blocks count as equal."""
_CHUNK_BYTES = 1 << 18


@dataclasses.dataclass(frozen=True, eq=False)
class ShiftEvidence:
    """Similarities of each feature to itself shifted by each element, with their tests."""

    autocorrelation: Float[np.ndarray, "feature element"]
    """Group autocorrelation c(h), corrected for noise where there are halves."""
    similarity: Float[np.ndarray, "feature element"]
    """Stabilizer function s(h); 0 for a feature that cannot be reproduced."""
    standard_errors: Float[np.ndarray, "feature element"]
    """Standard errors of the similarity."""
    p_support: Float[np.ndarray, "feature element"]
    """p-values of the null hypothesis that the similarity is at most `SUPPORT_THRESHOLD`."""
    p_unequal: Float[np.ndarray, "feature element"]
    """p-values of the null hypothesis that the similarity reaches the equality threshold."""
    p_signal: Float[np.ndarray, " feature"]
    """p-values of the null hypothesis that the two halves share nothing."""
    noise_ceiling: Float[np.ndarray, " feature"]
    """Cosine between the two halves of a feature; NaN without halves."""
    noise: Float[np.ndarray, " feature"]
    """Noise variance of one entry of the mean of the halves, over the feature's energy c(e); NaN
    without halves."""
    variance_inflation: float
    """Factor applied to the variances because the noise of different entries is correlated."""


def common_direction(blocks: Float[np.ndarray, "feature order d"]) -> Float[np.ndarray, " d"]:
    """Estimate the direction that all features share, as a vector of length 1 or shorter.

    Blocks of activations that are never negative share a direction that makes all of them
    similar. The estimate is the mean, over features of unit length, of their means over elements;
    its length is the part of its energy beyond that of unrelated features.
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


def remove_direction(
    blocks: Float[np.ndarray, "feature order d"], direction: Float[np.ndarray, " d"]
) -> Float[np.ndarray, "feature order d"]:
    """Subtract the component of each feature's mean block along a direction from all its blocks.

    One vector is subtracted from all blocks of a feature, so differences between its blocks, and
    with them exact symmetries, stay as they are.
    """
    direction = direction.astype(blocks.dtype)
    component = blocks.mean(axis=1) @ direction
    return blocks - component[:, None, None] * direction


def evidence_from_halves(
    first: Float[np.ndarray, "feature order d"],
    second: Float[np.ndarray, "feature order d"],
    group: Group,
    equality_threshold: float = EQUALITY_THRESHOLD,
) -> ShiftEvidence:
    """Test every shift of every feature against the feature's own noise ceiling.

    Args:
        first: Estimate of the blocks from one half of the samples.
        second: Estimate from the other half, with independent noise.
        group: Group whose elements shift the blocks.
        equality_threshold: Similarity, relative to the noise ceiling, that counts as equal.
    """
    common = (common_direction(first) + common_direction(second)) / 2
    shifts = _shifts(group)
    n = len(first)
    sums = np.zeros((len(shifts), 5, n))
    ceiling, noise = np.full(n, np.nan), np.zeros(n)
    unshifted = np.zeros((3, n))  # sum, sum of squares and of fourth powers of m e
    for part in _chunks(first):
        x, y = remove_direction(first[part], common), remove_direction(second[part], common)
        mean, error = (x + y) / 2, x - y
        product = mean * error
        flat = product.reshape(len(mean), -1)
        unshifted[:, part] = flat.sum(1), _dot(flat, flat), np.square(np.square(flat)).sum(1)
        for row, (h, inverse) in enumerate(shifts):
            shifted = (mean[:, group.table[:, h]] + mean[:, group.table[:, inverse]]) / 2
            moved = shifted * error
            sums[row, :, part] = np.stack([
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
    return _test_shifts(sums, unshifted, ceiling, noise, group, equality_threshold)


def _test_shifts(
    sums: Float[np.ndarray, "shift 5 feature"],
    unshifted: Float[np.ndarray, "3 feature"],
    ceiling: Float[np.ndarray, " feature"],
    noise: Float[np.ndarray, " feature"],
    group: Group,
    equality_threshold: float,
) -> ShiftEvidence:
    """Compute all tests from the sums that one pass over the blocks gave."""
    row_of = np.zeros(group.order, int)
    for row, pair in enumerate(_shifts(group)):
        row_of[list(pair)] = row
    correlation, moved, squares, mixed, _ = sums[row_of].transpose(1, 2, 0)
    energy = correlation[:, [group.identity]]
    line, line_squares, line_fourth = (each[:, None] for each in unshifted)

    def variance(s: np.ndarray | float) -> np.ndarray:
        return np.maximum(squares - 2 * s * mixed + s**2 * line_squares, 0)

    others = np.arange(group.order) != group.identity
    inflation = max(
        1.0,
        _mean_ratio(
            (moved - SUPPORT_THRESHOLD * line)[:, others] ** 2,
            variance(SUPPORT_THRESHOLD)[:, others],
        ),
        _mean_ratio(line**2, line_squares),
    )
    # Satterthwaite: the fourth moment of a normal number is three times its variance squared.
    freedom = np.maximum(3 * line_squares**2 / np.maximum(line_fourth, 1e-300), 1)
    support = _p_positive(
        correlation - SUPPORT_THRESHOLD * energy, inflation * variance(SUPPORT_THRESHOLD), freedom
    )
    unequal = _p_positive(
        equality_threshold * energy - correlation, inflation * variance(equality_threshold), freedom
    )
    signal = _p_positive(energy, inflation * line_squares, freedom)
    similarity = np.where(energy > 0, correlation / np.where(energy > 0, energy, 1), 0.0)
    similarity[:, ~others] = 1.0
    spread = np.sqrt(inflation * variance(similarity)) / np.maximum(energy, 1e-300)
    safe = np.maximum(energy[:, 0], 1e-300)
    return ShiftEvidence(
        autocorrelation=correlation,
        similarity=similarity,
        standard_errors=np.where(energy > 0, spread, np.inf),
        p_support=np.where(energy > 0, support, 1.0),
        p_unequal=np.where(energy > 0, unequal, 1.0),
        p_signal=signal[:, 0],
        noise_ceiling=ceiling,
        noise=np.where(energy[:, 0] > 0, inflation * noise / safe, np.inf),
        variance_inflation=inflation,
    )


def evidence_from_channels(
    blocks: Float[np.ndarray, "feature order d"],
    group: Group,
    equality_threshold: float = EQUALITY_THRESHOLD,
) -> ShiftEvidence:
    """Test every shift of every feature by the spread of its similarity over channels.

    Noise cannot be told from asymmetry with one estimate. The noise ceiling of a feature is taken
    to be its largest similarity under any shift, and p-values are those of the claim that other
    channels would agree.

    Args:
        blocks: Decoder blocks.
        group: Group whose elements shift the blocks.
        equality_threshold: Similarity, relative to the largest one, that counts as equal.
    """
    common = common_direction(blocks)
    n, order, d = blocks.shape
    sums = np.zeros((n, order, 4))
    for part in _chunks(blocks):
        x = remove_direction(blocks[part], common)
        own = np.square(x).sum(axis=1, dtype=np.float64)
        for h in range(order):
            per = np.einsum("igk,igk->ik", x[:, group.table[:, h]], x, dtype=np.float64)
            sums[part, h] = np.stack(
                [per.sum(1), (per * per).sum(1), (per * own).sum(1), (own * own).sum(1)], axis=1
            )
    correlation, squares, mixed, own_squares = sums.transpose(2, 0, 1)
    energy = correlation[:, [group.identity]]
    alive = energy > 0
    scale = np.where(alive, energy, 1)
    similarity = np.where(alive, correlation / scale, 0.0)
    spread = np.maximum(squares - 2 * similarity * mixed + similarity**2 * own_squares, 0)
    # Spreads within the rounding error of sums of squares are zero.
    spread[spread < 1e-12 * own_squares] = 0
    variance = spread * d / max(d - 1, 1) / scale**2
    freedom = np.full((n, 1), max(d - 1, 1), float)
    others = np.arange(order) != group.identity
    ceiling = similarity[:, others].max(axis=1, initial=0.0)[:, None]
    support = _p_positive(similarity - SUPPORT_THRESHOLD, variance, freedom)
    unequal = _p_positive(equality_threshold * ceiling - similarity, variance, freedom)
    return ShiftEvidence(
        autocorrelation=correlation,
        similarity=similarity,
        standard_errors=np.where(alive, np.sqrt(variance), np.inf),
        p_support=np.where(alive, support, 1.0),
        p_unequal=np.where(alive, unequal, 1.0),
        p_signal=np.where(alive[:, 0], 0.0, 1.0),
        noise_ceiling=np.full(n, np.nan),
        noise=np.full(n, np.nan),
        variance_inflation=1.0,
    )


def _shifts(group: Group) -> list[tuple[int, int]]:
    """List pairs of an element and its inverse, whose autocorrelations are equal."""
    return [(h, int(group.inverses[h])) for h in range(group.order) if h <= group.inverses[h]]


def _chunks(blocks: np.ndarray) -> Iterator[slice]:
    """Split features into slices that fit in the cache."""
    step = max(1, _CHUNK_BYTES // (blocks[0].nbytes or 1)) if len(blocks) else 1
    return (slice(i, min(i + step, len(blocks))) for i in range(0, len(blocks), step))


def _dot(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
    return np.einsum("ij,ij->i", x, y)


def _mean_ratio(squares: np.ndarray, variances: np.ndarray) -> float:
    """Average the ratio of observed squares to their estimated variances."""
    positive = variances > 0
    if not positive.any():
        return 1.0
    return float((squares[positive] / variances[positive]).mean())


def _p_positive(estimate: np.ndarray, variance: np.ndarray, freedom: np.ndarray) -> np.ndarray:
    """Compute p-values of the null hypothesis that an estimated quantity is at most zero."""
    error = np.sqrt(variance)
    certain = np.where(estimate > 0, np.inf, -np.inf)
    z = np.where(error > 0, estimate / np.where(error > 0, error, 1), certain)
    return np.asarray(stats.t.sf(z, freedom))
