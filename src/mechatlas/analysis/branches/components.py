"""Shares of features in the components of the residual stream, and whether they are by chance.

    component_statistics   components of some rows, batch by batch -> their covariances
    ComponentTest          features -> shares, p- and q-values, with a control and the power
    OfComponents           dictionary of the sum as one of its components side by side, for
                           `activity_shares`

All components write all channels, so no channel belongs to one. The share of a component is that of
the variance of the feature's pre-activation: the square of the share is `e' C_b e / e' C e`, with
the encoder column e of the feature, the covariance C_b of the component, and the sum C of all C_b.
The null is a feature of a random direction: Gaussian, with the second moment of the encoder columns
of the features (each scaled to `e' C e = 1`), without those that a first round, against all of
them, finds specialized, as long as half of them are left. The probability that a component has
at least a share t of it is that a quadratic form of independent Gaussians is at least 0, by a
saddlepoint approximation.

Source: Kissane et al., Interpreting attention layer outputs with sparse autoencoders (2024), for
direct feature attribution; Lugannani and Rice (1980), for the tail.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import optimize, stats
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from mechatlas.analysis.branches.specialization import FDR, ChanceTest, Specialization
from mechatlas.base import InputError
from mechatlas.maths.arrays import Channels, as_array
from mechatlas.maths.linalg import Moments

POINTS = 12
"""Shares at which the tail of a component is computed; it is interpolated in between."""
FAINT = 1e-9
"""Variance of a direction, relative to the largest, below which it does not count."""
STEPS = 60
"""Bisections by which a feature is moved into a component."""


@dataclasses.dataclass(frozen=True, eq=False)
class ComponentStatistics:
    """Means and covariances of the components of a sum."""

    names: tuple[str, ...]
    n_rows: int
    mean: Float[np.ndarray, "component d"]
    covariance: Float[np.ndarray, "component d d"]


def component_statistics(
    blocks: Iterable[Float[Tensor, "component _ d"]], names: Sequence[str]
) -> ComponentStatistics:
    """Measure the components of some rows.

    Args:
        blocks: Components of some rows after others, read once.
        names: Names of the components.

    Raises:
        InputError: There are fewer than two rows or components, or a value is not finite.
    """
    n, moments = 0, [Moments(0)]
    for block in blocks:
        if not torch.isfinite(block).all():
            raise InputError(
                f"A component is not finite in the {block.shape[1]} rows after row {n}."
            )
        moments = moments if n else [Moments(block.shape[2]) for _ in names]
        for each, rows in zip(moments, block, strict=True):
            each.add(rows)
        n += block.shape[1]
    if n < 2 or len(names) < 2:
        raise InputError(
            f"Shares of components need two rows and two components or more, got {n} rows of "
            f"{len(names)}."
        )
    covariance = np.stack([each.covariance for each in moments]) * (n / (n - 1))
    return ComponentStatistics(
        tuple(names), n, np.stack([each.mean for each in moments]), covariance
    )


class ComponentTest(ChanceTest):
    """Test of features for components, with its control and its power.

    In `power`, directions in which the component has much of the variance are stretched; an excess
    of 1 is the largest share that any direction has.

    Args:
        encoder: Encoder columns, as rows (n_features, d), or a dictionary; of one without a linear
            encoder, its decoder rows.
        known: Statistics of the components.
        tested: Features to test; by default all.

    Raises:
        InputError: Shapes do not fit, a value is not finite, or nothing varies.
    """

    positive = False

    def __init__(
        self,
        encoder: Any,
        known: ComponentStatistics,
        *,
        tested: Bool[np.ndarray, " feature"] | None = None,
    ) -> None:
        columns = getattr(encoder, "W_enc", None)
        given = getattr(encoder, "W_dec", encoder) if columns is None else columns.T
        self.rows = as_array(given, "n_features d", "The encoder").astype(np.float64)
        d = self.rows.shape[1]
        if known.covariance.shape[1] != d or not np.isfinite(self.rows).all():
            raise InputError(
                f"Features read {d} channels and the components have {known.covariance.shape[1]}; "
                "both must be of one site, and finite."
            )
        self.known, self.tested, self.n_rows = known, tested, known.n_rows
        self.branches: dict[str, Channels] = {name: slice(0, d) for name in known.names}
        self._whole = known.covariance.sum(axis=0)
        if not self._whole.any():
            raise InputError(f"The components are the same in all {known.n_rows} rows.")

    def permuted(self, *, seed: int = 0) -> Specialization:
        """Test features of mixed-up directions: those found specialized are false.

        Each coordinate along the principal directions of all features is permuted among features,
        so that the tails of the coordinates stay and their combinations are random.
        """
        random = np.random.default_rng([seed, 3])
        at, unit = self._units(self.rows)
        axes = np.linalg.svd(unit, full_matrices=False)[2]
        mixed, rows = random.permuted(unit @ axes.T, axis=0) @ axes, self.rows.copy()
        rows[at] = mixed
        return self._test(rows)

    def _movable(self, rows: np.ndarray) -> Int[np.ndarray, " some"]:
        return self._units(rows)[0]

    def _move(self, rows: np.ndarray, parts: list[np.ndarray], excess: float) -> None:
        values, vectors = np.linalg.eigh(self._whole)
        varies = values > FAINT * values[-1]
        color = vectors[:, varies] * np.sqrt(values[varies])
        whiten = vectors[:, varies] / np.sqrt(values[varies])
        usual = self._test(rows).expected
        for k, part in enumerate(parts):
            own, axes = np.linalg.eigh(whiten.T @ self.known.covariance[k] @ whiten)
            expected = float(np.nanmax(np.square(usual[:, k]))) if len(part) else 0.0
            aim = expected + excess * (own[-1] - expected)
            for row in part:
                rows[row] = whiten @ axes @ _moved(axes.T @ color.T @ rows[row], own, aim)

    def _units(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features that are tested, by their numbers, scaled to a pre-activation of variance 1."""
        variance = np.einsum("nd,nd->n", rows @ self._whole, rows)
        there = variance > FAINT**2 * max(float(variance.max()), 1e-300)
        at = np.flatnonzero(there if self.tested is None else there & self.tested)
        return at, rows[at] / np.sqrt(variance[at])[:, None]

    def _test(self, rows: np.ndarray) -> Specialization:
        at, unit = self._units(rows)
        found = self._against(rows, at, unit, unit)
        p = found.p_values[at].min(axis=1, initial=np.inf)
        q = found.q_values[at].min(axis=1, initial=np.inf)
        usual = (np.nan_to_num(q) > FDR) | (np.argsort(np.argsort(-np.nan_to_num(p))) < len(at) / 2)
        return found if usual.all() else self._against(rows, at, unit, unit[usual])

    def _against(
        self, rows: np.ndarray, at: np.ndarray, unit: np.ndarray, usual: np.ndarray
    ) -> Specialization:
        """Test features against random directions with the second moment of the usual ones."""
        shape = len(rows), len(self.known.names)
        energy, expected, p, n_effective = (np.full(shape, np.nan) for _ in "eepn")
        sizes, axes = np.linalg.svd(usual, full_matrices=False)[1:]
        there = sizes > FAINT * max(float(sizes.max(initial=0)), 1e-300)
        scaled = axes[there] * sizes[there, None] / np.sqrt(max(len(usual), 1))
        whole = scaled @ self._whole @ scaled.T
        for k, covariance in enumerate(self.known.covariance if len(at) else ()):
            energy[at, k] = np.einsum("nd,nd->n", unit @ covariance, unit)
            own = scaled @ covariance @ scaled.T
            mean = float(np.trace(own) / np.trace(whole))
            spread = 2 * np.square(own - mean * whole).sum() / np.trace(whole) ** 2
            expected[at, k] = np.sqrt(max(mean, 0.0))
            n_effective[at, k] = max(mean * (1 - mean), 0.0) / max(float(spread), FAINT)
            p[at, k] = _tails(energy[at, k], own, whole, mean)
        return self._judged(rows, energy, expected, p, n_effective)


def tail_of_ratio(
    share: float, own: Float[np.ndarray, "r r"], whole: Float[np.ndarray, "r r"]
) -> float:
    """Probability that `g' own g` is at least a share of `g' whole g`, of a standard Gaussian g."""
    values = np.linalg.eigvalsh(own - share * whole)
    largest = np.abs(values).max(initial=0.0)
    if largest <= FAINT * np.abs(own).max(initial=0.0):  # every direction has this share
        return 1.0
    values = values[np.abs(values) > 1e-12 * largest] / largest
    if values[-1] <= 0:
        return 0.0
    if values[0] >= 0:
        return 1.0
    if values.sum() > 0:  # the saddlepoint would be negative
        return 1.0 - _upper_tail(-values)
    return _upper_tail(values)


def _upper_tail(values: np.ndarray) -> float:
    """Probability that a sum of squared Gaussians with these weights, of mean below 0, is above."""
    limit = 0.5 / values.max()

    def slope(s: float) -> float:
        return float((values / (1 - 2 * s * values)).sum())

    at: Any = optimize.brentq(slope, 0.0, limit * (1 - 1e-12))
    log = 1 - 2 * at * values
    w = np.sqrt(max(float(np.log(log).sum()), 0.0))
    u = at * np.sqrt(2 * float(np.square(values / log).sum()))
    if w < 1e-3:
        return 0.5
    return float(stats.norm.sf(w + np.log(u / w) / w))


def _tails(
    shares: Float[np.ndarray, " n"],
    own: Float[np.ndarray, "r r"],
    whole: Float[np.ndarray, "r r"],
    mean: float,
) -> Float[np.ndarray, " n"]:
    """Tails at many shares, interpolated between some of them on the scale of deviations.

    Args:
        shares: Squared shares.
        own: Covariance of a component in the coordinates of the null.
        whole: Sum of those of all components.
        mean: Mean share; fewer points lie below it.
    """
    low, high = float(shares.min()), float(shares.max())
    points = np.unique(np.clip(np.append(np.linspace(mean, high, POINTS), [low]), low, high))
    tails = np.clip([tail_of_ratio(t, own, whole) for t in points], 1e-300, 1 - 1e-15)
    if len(points) < 2:
        return np.full(len(shares), tails[0])
    deviations = np.maximum.accumulate(stats.norm.isf(tails))
    return stats.norm.sf(PchipInterpolator(points, deviations)(shares))


def _moved(
    coordinates: Float[np.ndarray, " r"], own: Float[np.ndarray, " r"], aim: float
) -> Float[np.ndarray, " r"]:
    """Coordinates of a feature after directions with more of a component are stretched.

    Args:
        coordinates: Those along the axes of the component, each of variance 1.
        own: Share of the component along each axis.
        aim: Squared share of the component afterwards, at most the largest of `own`.
    """
    low, high = 0.0, 1.0

    def stretched(power: float) -> np.ndarray:
        return coordinates * np.exp(power * (own - own[-1]))

    def share(power: float) -> float:
        squares = np.square(stretched(power))
        return float((own * squares).sum() / squares.sum())

    while share(high) < aim and high < 1e6:
        high *= 2
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) < aim else (low, middle)
    return stretched(high)


class OfComponents:
    """Dictionary of a sum that reads its components side by side.

    Args:
        dictionary: Dictionary of the sum.
        n_components: Number of components.
    """

    def __init__(self, dictionary: Any, n_components: int) -> None:
        self.dictionary, self.n_components = dictionary, n_components
        self.d_in, self.n_latents = n_components * dictionary.d_in, dictionary.n_latents
        encoder = getattr(dictionary, "W_enc", None)
        if encoder is not None:
            self.W_enc = encoder.detach().repeat(n_components, 1)

    def encode(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch latent"]:
        """Code of the sum of the components."""
        return self.dictionary.encode(x.unflatten(1, (self.n_components, -1)).sum(dim=1))
