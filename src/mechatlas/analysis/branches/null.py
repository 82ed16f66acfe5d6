"""How likely an atom without a branch of its own has so much of itself in a branch.

The null takes an atom apart into lumps (the squares of its entries, each in units of the
variance of its channel) and puts them back at places (channels) drawn by lot. Whether the share of
a branch is at least `t` is then whether a sum over the lumps is at least 0: of the lump times the
variance of its place, times `1 - t` in the branch and `-t` elsewhere. So an atom's own heavy tails,
the widths of the branches and the variances of their channels are all in the null. Three steps:

    lumps of an atom     the largest one by one, the others in groups
    places_of            channels of a branch and outside it, and how they move together
    tail                 probability of at least such a share

`tail` is a saddlepoint approximation with lots drawn independently, which for large deviations
bounds the tail of a permutation; its exponent is then divided by a design effect, the ratio of the
variance that a permutation and the correlations of the channels give to the one of independent
lots. Correlations do more than widen:

    One entry, mixed with channels correlated with its own, is many lumps in one place. They would
    look like independent witnesses, so lumps are first merged with the larger one whose spill they
    may be; and the tail is never below the probability that all the equal pieces which are left
    fall into the branch.

    Where all channels of a branch share a factor, a share can be large because the other branches
    happen to vanish together. The tail is never below that of a ratio of two such factors.

Source: Joag-Dev and Proschan, Negative association of random variables (1983), for the bound;
Barndorff-Nielsen, Modified signed log likelihood ratio (1991), for the tail; Cho and Saul, Kernel
methods for deep learning (2009), for the covariance of squares of rectified Gaussians.
"""

import dataclasses

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

SINGLE = 32
"""Largest lumps of an atom that are kept apart."""
GROUPS = 32
"""Groups that the other lumps of an atom are put into."""
ALONE = 3
"""Channels in a branch, and outside it, that are kept apart because they vary most."""
LEVELS = 6
"""Groups that the other channels of a branch, and those outside it, are put into."""
STEPS = 8
"""Newton steps to a saddlepoint."""
AT_ONCE = 64
"""Atoms whose saddlepoints are looked for together."""
CENTRE = 0.4
"""Deviations, in standard deviations, below which the tail is an Edgeworth expansion."""
MOST_SKEW = 1.5
"""Largest skewness that such an expansion is trusted with."""
UNEVEN = 0.1
"""Added to the design effect where few channels have nearly all variance: there one lump in one
place decides, which the grouping of places blurs. Measured on planted nulls."""
FAINTEST = 0.1
"""Standard deviation, over the root mean square of all, below which the entry of a channel (or of a
component of their correlations) is not divided by its own: what an atom has left in a dead one says
nothing about it."""
NO_FACTOR = 1e9
"""Degrees of freedom of something that does not vary."""


@dataclasses.dataclass(frozen=True, eq=False)
class Places:
    """Where the lumps of an atom can fall, seen from one branch."""

    level: Float[np.ndarray, " level"]
    """Variance of a group of channels."""
    weight: Float[np.ndarray, " level"]
    """Share of all channels that are in the group."""
    inside: Bool[np.ndarray, " level"]
    """Whether they are in the branch."""
    share: float
    """The branch's share of the variance of all channels."""
    spread: float
    """Mean square of `variance * (inside - share)` over the channels, before grouping."""
    evenness: float
    """1 if all channels have the same variance, near 0 if few have nearly all of it."""
    common: float
    """Variance that correlations add to the sum, for lumps of mean 1 over the channels."""
    factors: tuple[float, float]
    """Squared coefficient of variation, by correlations alone and apart from what both share, of
    the energy inside the branch and outside it."""
    crowding: tuple[float, float]
    """The same by lots alone, for lumps whose squares add up to 1."""


def covariance_of_squares(
    correlation: Float[np.ndarray, "d d"], *, positive: bool
) -> Float[np.ndarray, "d d"]:
    """Covariance of the squares of two standard Gaussians, or of their positive parts.

    Relative to the square of the mean square (1, or 1/2).
    """
    rho = np.clip(correlation, -1, 1)
    if not positive:
        return 2 * rho**2
    angle = np.arccos(rho)
    kernel = 3 * np.sin(angle) * rho + (np.pi - angle) * (1 + 2 * rho**2)
    return 4 * (kernel / (2 * np.pi) - 0.25)


def mixing(
    correlation: Float[np.ndarray, "d d"],
) -> tuple[Float[np.ndarray, "d d"], Float[np.ndarray, "d d"]]:
    """What makes independent entries as correlated as the channels are, and its inverse.

    Components that hardly vary count as if they varied a little, else the inverse would blow up
    what an atom has left there.
    """
    values, vectors = np.linalg.eigh(correlation)
    roots = np.sqrt(np.maximum(values, FAINTEST**2))
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def spill(mixed: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    """Energy that an entry leaves at other channels (columns), over that at its own (rows)."""
    spilled = np.minimum(np.square(mixed / np.diag(mixed)[:, None]), 1)
    np.fill_diagonal(spilled, 0)
    return spilled


def places_of(
    variance: Float[np.ndarray, " d"],
    inside: Bool[np.ndarray, " d"],
    together: Float[np.ndarray, "d d"] | None,
) -> Places:
    """What a branch looks like to a lump.

    Args:
        variance: Of each channel, with mean 1.
        inside: The channels of the branch.
        together: What `covariance_of_squares` gives; `None` if channels are independent.
    """
    share = float(variance[inside].sum() / variance.sum())
    centred = variance * (inside - share)
    within, without = variance * inside, variance * ~inside
    total = max(float(within.sum()), 1e-300), max(float(without.sum()), 1e-300)
    common, factors = 0.0, (0.0, 0.0)
    if together is not None:
        both = [[_weighed(together, a, b) for b in (within, without)] for a in (within, without)]
        common = max(0.0, _weighed(together, centred, centred))
        mixed = both[0][1] / (total[0] * total[1])
        factors = tuple(max(0.0, both[k][k] / total[k] ** 2 - mixed) for k in (0, 1))
    levels = [_levels(variance[mask], len(variance)) for mask in (inside, ~inside)]
    return Places(
        level=np.concatenate([level for level, _ in levels]),
        weight=np.concatenate([weight for _, weight in levels]),
        inside=np.repeat([True, False], [len(level) for level, _ in levels]),
        share=share,
        spread=float(np.square(centred).mean()),
        evenness=float(variance.sum() ** 2 / (len(variance) * np.square(variance).sum())),
        common=common,
        factors=(factors[0], factors[1]),
        crowding=(
            len(variance) * float(within @ within) / total[0] ** 2,
            len(variance) * float(without @ without) / total[1] ** 2,
        ),
    )


def _weighed(together: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """Sum over pairs of different channels."""
    return float(a @ together @ b - (np.diag(together) * a * b).sum())


def _levels(variance: np.ndarray, of: int) -> tuple[np.ndarray, np.ndarray]:
    """The channels that vary most by themselves, the others in groups of equal total variance."""
    ordered = np.sort(variance)
    alone = min(ALONE, len(ordered))
    rest = ordered[: len(ordered) - alone]
    part = np.cumsum(rest) / max(float(rest.sum()), 1e-300)
    label = np.minimum((LEVELS * (part - 1e-12)).astype(int), LEVELS - 1)
    label = np.concatenate([label, LEVELS + np.arange(alone)])
    _, first, count = np.unique(label, return_index=True, return_counts=True)
    return np.add.reduceat(ordered, first) / count, count / of


@dataclasses.dataclass(frozen=True, eq=False)
class Lumps:
    """Atoms taken apart; the lumps of each add up to 1."""

    size: Float[np.ndarray, "atom lump"]
    count: Int[np.ndarray, " lump"]
    """Lumps in a group; each has the size of their mean."""
    square: Float[np.ndarray, " atom"]
    """Sum of squares before grouping; 1 over it is the number of lumps that matter."""
    plain: Float[np.ndarray, " atom"]
    """The same of the energies themselves, not in units of the variances."""
    channels: int

    @classmethod
    def of(
        cls,
        energy: Float[np.ndarray, "atom d"],
        units: Float[np.ndarray, " d"] | None = None,
        spilled: Float[np.ndarray, "d d"] | None = None,
    ) -> "Lumps":
        """Take atoms apart.

        Args:
            energy: In the channels; adds up to 1 for each atom.
            units: Variance that each channel's energy is divided by.
            spilled: What `spill` gives; `None` if channels are independent.
        """
        plain = np.einsum("ad,ad->a", energy, energy)
        lumps = energy if units is None else energy / units
        lumps = lumps / lumps.sum(axis=1, keepdims=True)
        if spilled is not None:
            apart = np.einsum("ad,ad->a", lumps, lumps)
            lumps = _merged(lumps, spilled)
            plain = plain * np.einsum("ad,ad->a", lumps, lumps) / apart
        ordered = -np.sort(-lumps, axis=1)
        square = np.einsum("ad,ad->a", ordered, ordered)
        d = ordered.shape[1]
        kept, count = ordered, np.ones(d, dtype=np.int64)
        if d > SINGLE + GROUPS:  # by rank alone: what an atom gets must not depend on the others
            edges = np.unique(np.geomspace(SINGLE, d, GROUPS + 1).round().astype(np.int64))
            count = np.concatenate([count[:SINGLE], np.diff(edges)])
            grouped = np.add.reduceat(ordered, edges[:-1], axis=1) / count[SINGLE:]
            kept = np.concatenate([ordered[:, :SINGLE], grouped], axis=1)
        return cls(kept, count, square, plain, d)


def _merged(
    lumps: Float[np.ndarray, "atom d"], spilled: Float[np.ndarray, "d d"]
) -> Float[np.ndarray, "atom d"]:
    """Lumps, or what of them a larger one may have spilled, made part of that larger one."""
    joined = lumps.copy()
    for start in range(0, len(lumps), AT_ONCE):
        here = lumps[start : start + AT_ONCE]
        largest = np.argsort(-here, axis=1, kind="stable")[:, :SINGLE]
        size = np.take_along_axis(here, largest, axis=1)
        from_larger = spilled[largest] * size[:, :, None]
        from_larger[size[:, :, None] <= here[:, None, :]] = 0
        source = from_larger.argmax(axis=1)
        moved = np.take_along_axis(from_larger, source[:, None], axis=1)[:, 0]
        moved = np.minimum(moved, here)
        to = np.take_along_axis(largest, source, axis=1)
        to = to + np.arange(len(here))[:, None] * here.shape[1]
        gained = np.bincount(to.ravel(), moved.ravel(), minlength=here.size)
        joined[start : start + AT_ONCE] += gained.reshape(here.shape) - moved
    return joined


def tail(
    lumps: Lumps, t: Float[np.ndarray, " atom"], places: Places
) -> tuple[Float[np.ndarray, " atom"], Float[np.ndarray, " atom"]]:
    """Probability of a share of at least `t` of the energy under the null.

    Returns:
        The probability, and how many independent equal pieces each atom comes to.
    """
    cost = places.level * np.where(places.inside, 1 - t[:, None], -t[:, None])
    effect, exponent = _design(lumps, places)
    first = cost @ places.weight
    centred = cost - first[:, None]
    second = (lumps.size**2 @ lumps.count) * (centred**2 @ places.weight)
    third = (lumps.size**3 @ lumps.count) * (centred**3 @ places.weight)
    second = np.maximum(second, 1e-300)
    z = -first / np.sqrt(second * exponent)
    skew = np.clip(third / second**1.5 * np.sqrt(exponent), -MOST_SKEW, MOST_SKEW)
    p = stats.norm.sf(z) + stats.norm.pdf(z) * skew * (z * z - 1) / 6
    far = np.flatnonzero((np.abs(z) >= CENTRE) & (t > 0))
    p[far] = _far(lumps, far, cost[far], places.weight, exponent[far])
    above = t > places.share
    p[above] = np.maximum(p[above], _ratio_of_factors(t[above], lumps.square[above], places))
    pieces = np.maximum(1 / (lumps.plain * effect), 1.0)
    if places.common > 0:  # else lumps fall independently, and the lots alone are right
        width = float(places.weight[places.inside].sum())
        p[above] = np.maximum(p[above], width ** (1 / (lumps.square * effect)[above]))
    return np.where(t > 0, np.clip(p, 0, 1), 1.0), pieces


def _design(lumps: Lumps, places: Places) -> tuple[np.ndarray, np.ndarray]:
    """How much the share varies, over what independent lots would give.

    Returns:
        The ratio for the lumps and places as they are, and for their groups.
    """
    d, square = lumps.channels, lumps.square
    without_replacement = (square - 1 / d) / square * d / max(d - 1, 1)
    effect = 1 - (1 - without_replacement) * places.evenness + UNEVEN * (1 - places.evenness)
    spread = max(places.spread, 1e-300)
    effect = effect + places.common / (d**2 * square * spread)
    effect = np.clip(effect, 1e-3, np.maximum(1 / square, 1.0))
    grouped = (lumps.size**2 @ lumps.count) * float(
        (places.weight * np.square(places.level * (places.inside - places.share))).sum()
    )
    return effect, effect * square * spread / np.maximum(grouped, 1e-300)


def _ratio_of_factors(t: np.ndarray, square: np.ndarray, places: Places) -> np.ndarray:
    """Tail of the share if two independent factors were all that varied, inside and outside.

    Where correlations are most of what varies, the lots join in; where they are little, not.
    """
    if max(places.factors) <= 0 or not 0 < places.share < 1:
        return np.zeros_like(t)
    odds = t / np.maximum(1 - t, 1e-15) * (1 - places.share) / places.share
    freedom = []
    for factor, crowding in zip(places.factors, places.crowding, strict=True):
        by_lot = square * crowding
        varies = factor + by_lot * factor / (factor + by_lot)
        freedom.append(np.minimum(2 / np.maximum(varies, 1e-300), NO_FACTOR))
    return np.asarray(stats.f.sf(odds, *freedom))


def _far(
    lumps: Lumps, rows: np.ndarray, cost: np.ndarray, weight: np.ndarray, exponent: np.ndarray
) -> np.ndarray:
    """Saddlepoint tails; where the lots are too few for one, the bound below it."""
    count, weigh = torch.from_numpy(lumps.count.astype(np.float64)), torch.from_numpy(weight)
    found = [
        _saddle(torch.from_numpy(lumps.size[rows[k : k + AT_ONCE]]), count,
                torch.from_numpy(cost[k : k + AT_ONCE]), weigh)
        for k in range(0, len(rows), AT_ONCE)
    ]  # fmt: skip
    if not found:
        return np.zeros(0)
    s, value, curvature = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    value = np.minimum(value / exponent, -1e-300)
    w = np.sign(s) * np.sqrt(-2 * value)
    lam = s * np.sqrt(np.maximum(curvature / exponent, 1e-300))
    ratio = lam / w
    p = stats.norm.sf(w + np.log(ratio) / w)
    few = (ratio < 0.5) | (ratio > 2)
    return np.where(few, np.where(s > 0, np.exp(value), 1.0), p)


def _saddle(size: Tensor, count: Tensor, cost: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Where the cumulant function of the sum is smallest, its value and its curvature there."""
    first = (cost * weight).sum(dim=1)
    second = (cost.square() * weight).sum(dim=1) * (count * size.square()).sum(dim=1)
    s = -first / second.clamp_min(1e-300)
    up = s > 0
    infinite = torch.full_like(s, torch.inf)
    low, high = torch.where(up, 0.0, -infinite), torch.where(up, infinite, 0.0)
    for _ in range(STEPS):
        _, slope, curvature = _cumulants(s, size, count, cost, weight)
        low, high = torch.where(slope < 0, s, low), torch.where(slope < 0, high, s)
        step = s - slope / curvature.clamp_min(1e-300)
        step = torch.minimum(torch.maximum(step, -4 * s.abs()), 4 * s.abs())
        middle = torch.where(torch.isinf(low) | torch.isinf(high), 2 * s, (low + high) / 2)
        slack = 1e-6 * s.abs()  # at the point itself rounding decides on which side a step ends
        s = torch.where((step < low - slack) | (step > high + slack), middle, step)
    value, _, curvature = _cumulants(s, size, count, cost, weight)
    return s, value, curvature


def _cumulants(
    s: Tensor, size: Tensor, count: Tensor, cost: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The cumulant function at `s`, and its first two derivatives."""
    power = (size * s[:, None])[:, :, None] * cost[:, None, :]
    top = power.amax(dim=2, keepdim=True)
    power = power.sub_(top).exp_().mul_(weight)
    whole = power.sum(dim=2)
    mean = torch.einsum("alp,ap->al", power, cost) / whole
    mean_square = torch.einsum("alp,ap->al", power, cost.square()) / whole
    return (
        (whole.log_().add_(top[:, :, 0])) @ count,
        (size * mean) @ count,
        (size.square() * (mean_square - mean.square())) @ count,
    )
