"""Bootstrap intervals over samples, for figures that are ratios of sums or medians.

    Estimate            a figure with its 95 % interval
    resample            number of samples -> how often each resample has each of them
    ratio_estimate      sums over samples, one over the other
    median_estimate     median over rows, where rows of one sample are drawn together

Source: Efron, Bootstrap methods: another look at the jackknife (1979).
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

N_RESAMPLES = 500
"""Bootstrap resamples of an interval."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Estimate of a mean with its 95 % bootstrap interval."""

    value: float
    """Estimate over the rows."""
    low: float
    """Lower end of its 95 % interval."""
    high: float
    """Upper end of its 95 % interval."""
    n: int
    """Number of features, rows or samples under the mean."""


def resample(n: int, *, seed: int) -> Int[np.ndarray, "resample n"]:
    """Draw resamples of n samples with replacement: how often each resample has each sample."""
    return np.random.default_rng([seed, 19]).multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES)


def estimate(value: float, resampled: Float[np.ndarray, " resample"], n: int) -> Estimate:
    """Make an estimate from its value on resamples; the interval is open where these are NaN.

    Args:
        value: Value on the samples.
        resampled: Value on each resample.
        n: Number of samples.
    """
    finite = resampled[np.isfinite(resampled)]
    low, high = np.quantile(finite, [0.025, 0.975]) if len(finite) else (np.nan, np.nan)
    return Estimate(float(value), float(low), float(high), n)


def ratio_estimate(
    over: Float[np.ndarray, " sample"],
    under: Float[np.ndarray, " sample"],
    times: Int[np.ndarray, "resample sample"],
) -> Estimate:
    """Sum over samples divided by another one.

    Args:
        over: Part of each sample in the sum above.
        under: Part of each sample in the sum below.
        times: Resamples.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.divide(over.sum(), under.sum())
        return estimate(value, (times @ over) / (times @ under), len(over))


def median_estimate(
    values: Float[np.ndarray, " row"],
    sample: Int[np.ndarray, " row"],
    times: Int[np.ndarray, "resample sample"],
) -> Estimate:
    """Median over rows.

    Args:
        values: Value of each row.
        sample: Number of the sample that each row is of.
        times: Resamples.
    """
    order = np.argsort(values)
    values, sample = values[order], sample[order]
    resampled = np.full(len(times), np.nan)
    for i, weights in enumerate(times):
        total = np.cumsum(weights[sample])
        if len(total) and total[-1]:
            resampled[i] = values[np.searchsorted(total, total[-1] / 2)]
    value = np.median(values) if len(values) else np.nan
    return estimate(float(value), resampled, times.shape[1])
