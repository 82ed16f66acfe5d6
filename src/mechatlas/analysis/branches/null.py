"""Null distribution of a feature's share in a branch, for features that belong to no branch.

The null takes the decoder row of a feature apart into components (the squares of its entries, each
in units of the variance of its channel) and puts the components back at channels drawn at random.
Whether the share of a branch is at least `t` is then whether a sum over the components is at least
0: of the component times the variance of its channel, times `1 - t` in the branch and `-t`
elsewhere. So the row's own heavy tails, the widths of the branches and the variances of their
channels are all in the null. Three steps:

    Components          the largest components of a row one by one, the others in groups
    channel_groups      channels of a branch and outside it, and how they vary together
    tail_probability    probability of at least such a share
    branch_tail         the smaller of two: of the share, and with no component much above others

Where few channels carry most of a feature, a share can hardly be improbable. So it is tested twice:
as it is, and with components that count for no more than others do (`evened`).

`tail_probability` is a saddlepoint approximation with independent draws, which for large
deviations bounds the tail of a permutation; its exponent is then divided by a design effect, the
ratio of the variance that a permutation and the correlations of the channels give to the one of
independent draws. Correlations do more than widen:

    One entry, mixed with channels correlated with its own, is many components in one place. They
    would look like independent witnesses, so components are first merged with the larger one whose
    leakage they may be; and the tail is never below the probability that all the equal components
    which are left fall into the branch.

    Where all channels of a branch share a factor, a share can be large because the other branches
    happen to vanish together. The tail is never below that of a ratio of two such factors.

Source: Joag-Dev and Proschan, Negative association of random variables (1983), for the bound;
Barndorff-Nielsen, Modified signed log likelihood ratio (1991), for the tail; Cho and Saul, Kernel
methods for deep learning (2009), for the covariance of squares of rectified Gaussians.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

SINGLE = 32
"""Number of the largest components of a row that are kept apart."""
GROUPS = 32
"""Number of groups that the other components of a row are put into."""
ALONE = 3
"""Number of channels in a branch, and outside it, kept apart because they vary most."""
LEVELS = 6
"""Number of groups that the other channels of a branch, and those outside it, are put into."""
STEPS = 8
"""Newton steps to a saddlepoint."""
AT_ONCE = 64
"""Rows whose saddlepoints are searched for together."""
CENTER = 0.4
"""Deviations, in standard deviations, below which the tail is an Edgeworth expansion."""
MOST_SKEW = 1.5
"""Largest skewness that such an expansion is trusted with."""
UNEVEN = 0.1
"""Addition to the design effect where few channels have nearly all variance: there one component in
one channel decides, which the grouping of channels blurs. Measured on planted nulls."""
FAINTEST = 0.1
"""Least standard deviation, over the root mean square of all, that the entry of a channel (or of a
component of their correlations) is divided by: the rest of a row in a dead one says nothing."""
LARGEST, STEEPEST = 8, 16.0
"""Components count no more than this one of their row by size, or than the largest over this."""
OWN = 0.75
"""Least part of a component that no larger one has leaked, for it to count there. Two of the same
size leak four times what one does, and only one of them is known."""
PLAIN = 0.8
"""Part of the error rate that the plain share has; the evened one has the rest."""
NO_FACTOR = 1e9
"""Degrees of freedom of a factor that does not vary."""


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelGroups:
    """Channels that a component can fall on, in groups of like variance, seen from one branch."""

    level: Float[np.ndarray, " level"]
    """Variance of a channel of each group."""
    weight: Float[np.ndarray, " level"]
    """Fraction of all channels that are in the group."""
    inside: Bool[np.ndarray, " level"]
    """Whether the group is in the branch."""
    share: float
    """Fraction of the variance of all channels that is in the branch."""
    spread: float
    """Mean square of `variance * (inside - share)` over the channels, before grouping."""
    evenness: float
    """1 if all channels have the same variance, near 0 if few have nearly all of it."""
    common: float
    """Variance that correlations add to the sum, for components of mean 1 over the channels."""
    factors: tuple[float, float]
    """Squared coefficient of variation, by correlations alone and apart from what both share, of
    the energy inside the branch and outside it."""
    crowding: tuple[float, float]
    """Squared coefficient of variation by random placement alone, inside and outside, for
    components whose squares add up to 1."""


class WhiteningPair(NamedTuple):
    """Matrices that give entries the correlations of the channels, and take them away."""

    color: Float[np.ndarray, "d d"]
    """Square root of the correlations."""
    whiten: Float[np.ndarray, "d d"]
    """Inverse of the square root."""


class Tail(NamedTuple):
    """Tail of the null distribution at the share of each row."""

    p_value: Float[np.ndarray, " row"]
    n_effective: Float[np.ndarray, " row"]
    """Effective number of independent components."""


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


def whitening_pair(correlation: Float[np.ndarray, "d d"]) -> WhiteningPair:
    """Make independent entries as correlated as the channels are, and back.

    Components of the correlations that hardly vary count as if they varied a little, else the
    inverse would blow up the rest of a row there.
    """
    values, vectors = np.linalg.eigh(correlation)
    roots = np.sqrt(np.maximum(values, FAINTEST**2))
    return WhiteningPair((vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T)


def leakage(color: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    """Energy that an entry leaves at other channels (columns), relative to its own (rows)."""
    leaked = np.minimum(np.square(color / np.diag(color)[:, None]), 1)
    np.fill_diagonal(leaked, 0)
    return leaked


def channel_groups(
    variance: Float[np.ndarray, " d"],
    inside: Bool[np.ndarray, " d"],
    together: Float[np.ndarray, "d d"] | None,
) -> ChannelGroups:
    """Group the channels as a branch divides them.

    Args:
        variance: Variance of each channel, with mean 1.
        inside: Whether each channel is in the branch.
        together: Result of `covariance_of_squares`; `None` if channels are independent.
    """
    share = float(variance[inside].sum() / variance.sum())
    centered = variance * (inside - share)
    within, without = variance * inside, variance * ~inside
    total = max(float(within.sum()), 1e-300), max(float(without.sum()), 1e-300)
    common, factors = 0.0, (0.0, 0.0)
    if together is not None:
        both = [[_weighed(together, a, b) for b in (within, without)] for a in (within, without)]
        common = max(0.0, _weighed(together, centered, centered))
        mixed = both[0][1] / (total[0] * total[1])
        factors = tuple(max(0.0, both[k][k] / total[k] ** 2 - mixed) for k in (0, 1))
    levels = [_levels(variance[mask], len(variance)) for mask in (inside, ~inside)]
    return ChannelGroups(
        level=np.concatenate([level for level, _ in levels]),
        weight=np.concatenate([weight for _, weight in levels]),
        inside=np.repeat([True, False], [len(level) for level, _ in levels]),
        share=share,
        spread=float(np.square(centered).mean()),
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
    """Variance and weight of the channels that vary most, and of groups of the others."""
    ordered = np.sort(variance)
    alone = min(ALONE, len(ordered))
    rest = ordered[: len(ordered) - alone]
    part = np.cumsum(rest) / max(float(rest.sum()), 1e-300)
    label = np.minimum((LEVELS * (part - 1e-12)).astype(int), LEVELS - 1)
    label = np.concatenate([label, LEVELS + np.arange(alone)])
    _, first, count = np.unique(label, return_index=True, return_counts=True)
    return np.add.reduceat(ordered, first) / count, count / of


@dataclasses.dataclass(frozen=True, eq=False)
class Components:
    """Decoder rows taken apart; the components of each add up to 1."""

    size: Float[np.ndarray, "row component"]
    count: Int[np.ndarray, " component"]
    """Number of components in a group, each of the size of their mean."""
    square: Float[np.ndarray, " row"]
    """Sum of squares before grouping; 1 over it is the effective number of components."""
    plain: Float[np.ndarray, " row"]
    """Sum of squares of the energies themselves, not in units of the variances."""
    own: Float[np.ndarray, "row d"]
    """Components at their channels; those that a larger one may have leaked are 0."""

    @classmethod
    def of(
        cls,
        energy: Float[np.ndarray, "row d"],
        units: Float[np.ndarray, " d"] | None = None,
        leaked: Float[np.ndarray, "d d"] | None = None,
    ) -> "Components":
        """Take decoder rows apart.

        Args:
            energy: Energy in each channel; adds up to 1 for each row.
            units: Variance that each channel's energy is divided by.
            leaked: Result of `leakage`; `None` if channels are independent.
        """
        plain = np.einsum("ad,ad->a", energy, energy)
        components = energy if units is None else energy / units
        own = components = components / components.sum(axis=1, keepdims=True)
        if leaked is not None:
            apart = np.einsum("ad,ad->a", components, components)
            components = _merged(components, leaked)
            plain = plain * np.einsum("ad,ad->a", components, components) / apart
            own = np.where(components >= OWN * own, components, 0)
        ordered = -np.sort(-components, axis=1)
        square = np.einsum("ad,ad->a", ordered, ordered)
        d = ordered.shape[1]
        kept, count = ordered, np.ones(d, dtype=np.int64)
        if d > SINGLE + GROUPS:  # by rank alone: no row may depend on the others
            edges = np.unique(np.geomspace(SINGLE, d, GROUPS + 1).round().astype(np.int64))
            count = np.concatenate([count[:SINGLE], np.diff(edges)])
            grouped = np.add.reduceat(ordered, edges[:-1], axis=1) / count[SINGLE:]
            kept = np.concatenate([ordered[:, :SINGLE], grouped], axis=1)
        return cls(kept, count, square, plain, own)

    def take(self, rows: Int[np.ndarray, " some"]) -> "Components":
        """Components of some of the rows."""
        parts = (self.size, self.square, self.plain, self.own)
        size, square, plain, own = (part[rows] for part in parts)
        return Components(size, self.count, square, plain, own)

    def evened(self, units: Float[np.ndarray, " d"]) -> Float[np.ndarray, "row d"]:
        """Energy in each channel if components count for no more than others of their row do."""
        k = min(LARGEST, self.own.shape[1]) - 1
        limit = -np.partition(-self.own, k, axis=1)[:, k, None]
        limit = np.maximum(limit, self.own.max(axis=1, keepdims=True) / STEEPEST)
        energy = np.minimum(self.own, limit) * units
        return energy / energy.sum(axis=1, keepdims=True)


def _merged(
    components: Float[np.ndarray, "row d"], leaked: Float[np.ndarray, "d d"]
) -> Float[np.ndarray, "row d"]:
    """Components, less the part that a larger one may have leaked, which is added to that one."""
    joined = components.copy()
    for start in range(0, len(components), AT_ONCE):
        here = components[start : start + AT_ONCE]
        largest = np.argsort(-here, axis=1, kind="stable")[:, :SINGLE]
        size = np.take_along_axis(here, largest, axis=1)
        from_larger = leaked[largest] * size[:, :, None]
        from_larger[size[:, :, None] <= here[:, None, :]] = 0
        source = from_larger.argmax(axis=1)
        moved = np.take_along_axis(from_larger, source[:, None], axis=1)[:, 0]
        moved = np.minimum(moved, here)
        to = np.take_along_axis(largest, source, axis=1)
        to = to + np.arange(len(here))[:, None] * here.shape[1]
        gained = np.bincount(to.ravel(), moved.ravel(), minlength=here.size)
        joined[start : start + AT_ONCE] += gained.reshape(here.shape) - moved
    return joined


def tail_probability(
    components: Components, t: Float[np.ndarray, " row"], groups: ChannelGroups
) -> Tail:
    """Probability of a share of at least `t` of the energy under the null.

    Args:
        components: Components of each row.
        t: Share of the energy of each row in the branch.
        groups: Channels as the branch divides them.
    """
    cost = groups.level * np.where(groups.inside, 1 - t[:, None], -t[:, None])
    effect, exponent = _design(components, groups)
    first = cost @ groups.weight
    centered = cost - first[:, None]
    second = (components.size**2 @ components.count) * (centered**2 @ groups.weight)
    third = (components.size**3 @ components.count) * (centered**3 @ groups.weight)
    second = np.maximum(second, 1e-300)
    z = -first / np.sqrt(second * exponent)
    skew = np.clip(third / second**1.5 * np.sqrt(exponent), -MOST_SKEW, MOST_SKEW)
    p = stats.norm.sf(z) + stats.norm.pdf(z) * skew * (z * z - 1) / 6
    far = np.flatnonzero((np.abs(z) >= CENTER) & (t > 0))
    p[far] = _far(components, far, cost[far], groups.weight, exponent[far])
    above = t > groups.share
    p[above] = np.maximum(p[above], _ratio_of_factors(t[above], components.square[above], groups))
    n_effective = np.maximum(1 / (components.plain * effect), 1.0)
    if groups.common > 0:  # else components fall independently, and the draws alone are right
        width = float(groups.weight[groups.inside].sum())
        p[above] = np.maximum(p[above], width ** (1 / (components.square * effect)[above]))
    return Tail(np.where(t > 0, np.clip(p, 0, 1), 1.0), n_effective)


def branch_tail(
    components: Components,
    inside: Float[np.ndarray, " row"],
    evened: Components,
    inside_evened: Float[np.ndarray, " row"],
    groups: ChannelGroups,
) -> Tail:
    """Probability of at least such a share, as it is or evened: the smaller one, for two tests.

    The evened share counts only for rows whose plain share is above the expected one.

    Args:
        components: Components of each row.
        inside: Share of the energy of each row in the branch.
        evened: Components that count for no more than others of their row do.
        inside_evened: Share of their energy in the branch.
        groups: Channels as the branch divides them.
    """
    p, n_effective = tail_probability(components, inside, groups)
    same = np.isclose(evened.square, components.square, rtol=1e-9)  # then there is one test
    p, above = np.minimum(p / np.where(same, 1, PLAIN), 1), np.flatnonzero(inside > groups.share)
    other = tail_probability(evened.take(above), inside_evened[above], groups).p_value
    p[above] = np.minimum(p[above], other / (1 - PLAIN))
    return Tail(p, n_effective)


def _design(components: Components, groups: ChannelGroups) -> tuple[np.ndarray, np.ndarray]:
    """Ratio of the variance of the share to the variance that independent draws would give.

    Returns:
        The ratio for the components and channels as they are, and for their groups.
    """
    d, square = components.own.shape[1], components.square
    without_replacement = (square - 1 / d) / square * d / max(d - 1, 1)
    effect = 1 - (1 - without_replacement) * groups.evenness + UNEVEN * (1 - groups.evenness)
    spread = max(groups.spread, 1e-300)
    effect = effect + groups.common / (d**2 * square * spread)
    effect = np.clip(effect, 1e-3, np.maximum(1 / square, 1.0))
    grouped = (components.size**2 @ components.count) * float(
        (groups.weight * np.square(groups.level * (groups.inside - groups.share))).sum()
    )
    return effect, effect * square * spread / np.maximum(grouped, 1e-300)


def _ratio_of_factors(t: np.ndarray, square: np.ndarray, groups: ChannelGroups) -> np.ndarray:
    """Tail of the share if two independent factors were all that varied, inside and outside.

    Where correlations are most of what varies, random placement joins in; else it does not.
    """
    if max(groups.factors) <= 0 or not 0 < groups.share < 1:
        return np.zeros_like(t)
    odds = t / np.maximum(1 - t, 1e-15) * (1 - groups.share) / groups.share
    freedom = []
    for factor, crowding in zip(groups.factors, groups.crowding, strict=True):
        placement = square * crowding
        varies = factor + placement * factor / (factor + placement)
        freedom.append(np.minimum(2 / np.maximum(varies, 1e-300), NO_FACTOR))
    return np.asarray(stats.f.sf(odds, *freedom))


def _far(
    components: Components,
    rows: np.ndarray,
    cost: np.ndarray,
    weight: np.ndarray,
    exponent: np.ndarray,
) -> np.ndarray:
    """Saddlepoint tails; where the draws are too few for one, the bound below it."""
    count, weigh = torch.from_numpy(components.count.astype(np.float64)), torch.from_numpy(weight)
    saddles = [
        _saddle(torch.from_numpy(components.size[rows[k : k + AT_ONCE]]), count,
                torch.from_numpy(cost[k : k + AT_ONCE]), weigh)
        for k in range(0, len(rows), AT_ONCE)
    ]  # fmt: skip
    if not saddles:
        return np.zeros(0)
    s, value, curvature = (torch.cat(parts).numpy() for parts in zip(*saddles, strict=True))
    value = np.minimum(value / exponent, -1e-300)
    w = np.sign(s) * np.sqrt(-2 * value)
    lam = s * np.sqrt(np.maximum(curvature / exponent, 1e-300))
    ratio = lam / w
    p = stats.norm.sf(w + np.log(ratio) / w)
    few = (ratio < 0.5) | (ratio > 2)
    return np.where(few, np.where(s > 0, np.exp(value), 1.0), p)


def _saddle(size: Tensor, count: Tensor, cost: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Minimum of the cumulant function of the sum: place, value and curvature."""
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
    """Cumulant function at `s`, and its first two derivatives."""
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
