"""Variance of posed activations explained by a dictionary and by simple baselines.

    PoseMapFit    streams of posed rows -> best linear map to each pose, and its control
    PoseR2        held-out rows and predictions -> R2 of each pose
    baselines     all of it for arrays

No symmetry of features may be claimed without these numbers beside it: the best linear map from
a(I) to a(gI) (the score without sparsity; codes are not linear in a(I), so they may exceed it),
a(I) itself as a prediction (how invariant the layer is), and a linear map fitted to rows with
shuffled pairing (the score of the pipeline on unrelated data).
"""

import dataclasses

import numpy as np
import scipy.linalg
from jaxtyping import Float

from mechatlas.base import InputError

RIDGE = 1e-3
"""Ridge penalty of the linear maps, in units of the mean variance of a channel."""


class PoseR2:
    """R2 of predictions for each pose, accumulated in one pass over the rows.

    Args:
        order: Number of elements of the group.
        d: Channels of one block.
    """

    def __init__(self, order: int, d: int) -> None:
        self.n: int = 0
        self._shape = order, d
        self._sum, self._square = np.zeros(order * d), np.zeros(order * d)
        self._residual: dict[str, np.ndarray] = {}

    def add(
        self, x: Float[np.ndarray, "batch width"], **predictions: Float[np.ndarray, "batch width"]
    ) -> None:
        """Add a batch of rows and their predictions, by the name of the predictor."""
        self.n += len(x)
        self._sum += x.sum(axis=0, dtype=np.float64)
        self._square += np.square(x).sum(axis=0, dtype=np.float64)
        for name, prediction in predictions.items():
            residual = np.square(x - prediction).sum(axis=0, dtype=np.float64)
            self._residual[name] = self._residual.get(name, 0) + residual

    def r2(self) -> dict[str, Float[np.ndarray, " order"]]:
        """Compute 1 - residual / variance by predictor and pose; NaN where nothing varies."""
        total = (self._square - self._sum**2 / max(self.n, 1)).reshape(self._shape).sum(axis=1)
        total = np.where(total > 1e-9 * self._square.sum(), total, np.nan)
        return {
            name: 1 - residual.reshape(self._shape).sum(axis=1) / total
            for name, residual in self._residual.items()
        }


class PoseMapFit:
    """Least-squares fit of linear maps from the untransformed block to each block.

    Args:
        order: Number of elements of the group.
        d: Channels of one block.
        identity: Element that changes nothing.
        seed: Seed of the row permutations of the control.
    """

    def __init__(self, order: int, d: int, identity: int, *, seed: int = 0) -> None:
        self.n: int = 0
        self._d, self._width = d, order * d
        self._untransformed = slice(identity * d, (identity + 1) * d)
        self._random = np.random.default_rng([seed, 0x6D617073])
        self._gram = np.zeros((d, d))
        self._cross = np.zeros((2, d, self._width))
        self._mean = np.zeros(self._width)

    def add(self, x: Float[np.ndarray, "batch width"]) -> None:
        """Add a batch of rows; the control shuffles the rows within the batch."""
        own = x[:, self._untransformed]
        self.n += len(x)
        self._mean += x.sum(axis=0, dtype=np.float64)
        self._gram += own.T @ own
        self._cross[0] += own.T @ x
        self._cross[1] += own[self._random.permutation(len(x))].T @ x

    def solve(self) -> "PoseMaps":
        """Solve for the maps.

        Raises:
            InputError: There were fewer than two rows.
        """
        if self.n < 2:
            raise InputError(f"Linear maps need at least two rows, got {self.n}.")
        mean = self._mean / self.n
        own = mean[self._untransformed]
        gram = self._gram / self.n - np.outer(own, own)
        cross = self._cross / self.n - np.outer(own, mean)
        gram[np.diag_indices(self._d)] += RIDGE * max(np.trace(gram) / self._d, 1e-30)
        linear, shuffled = (
            scipy.linalg.solve(gram, np.hstack(list(cross)), assume_a="pos")
            .reshape(self._d, 2, -1)
            .swapaxes(0, 1)
        )
        return PoseMaps(self._untransformed, mean, linear, shuffled)


@dataclasses.dataclass(frozen=True, eq=False)
class PoseMaps:
    """Linear maps from the untransformed block to all blocks."""

    untransformed: slice
    """Columns of the untransformed block."""
    mean: Float[np.ndarray, " width"]
    """Mean row of the fit."""
    linear: Float[np.ndarray, "d width"]
    """Best linear map."""
    shuffled: Float[np.ndarray, "d width"]
    """Linear map fitted to rows with shuffled pairing."""

    def predict(
        self, x: Float[np.ndarray, "batch width"]
    ) -> dict[str, Float[np.ndarray, "batch width"]]:
        """Predict all blocks of some rows from their untransformed block, by each baseline."""
        own = x[:, self.untransformed]
        centered = own - self.mean[self.untransformed]
        return {
            "linear": centered @ self.linear + self.mean,
            "invariant": np.tile(own, len(self.mean) // own.shape[1]),
            "shuffled": centered @ self.shuffled + self.mean,
        }


def baselines(
    train: Float[np.ndarray, "n order d"],
    held: Float[np.ndarray, "m order d"],
    identity: int = 0,
    *,
    reconstruction: Float[np.ndarray, "m order d"] | None = None,
    seed: int = 0,
) -> dict[str, Float[np.ndarray, " order"]]:
    """Compute R2 of the baselines on held-out rows, for each element of the group.

    Args:
        train: Posed activations to fit linear maps to; preferably of other samples than `held`.
        held: Posed activations to measure on.
        identity: Element that changes nothing.
        reconstruction: Reconstruction of `held` by a dictionary.
        seed: Seed of the row permutations of the control.

    Returns:
        `linear` (the best linear map from a(I) to a(gI), which has no bottleneck), `invariant`
        (a(I) itself), `shuffled` (a linear map fitted to rows with shuffled pairing; about 0) and,
        with a reconstruction, `dictionary`.

    Raises:
        InputError: There are too few rows.
    """
    _, order, d = train.shape
    fit = PoseMapFit(order, d, identity, seed=seed)
    fit.add(train.reshape(len(train), -1))
    explained = PoseR2(order, d)
    x = held.reshape(len(held), -1)
    more = {} if reconstruction is None else {"dictionary": reconstruction.reshape(x.shape)}
    explained.add(x, **fit.solve().predict(x), **more)
    return explained.r2()
