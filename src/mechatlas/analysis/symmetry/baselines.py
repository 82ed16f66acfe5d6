"""What is explained of posed activations without any dictionary, and by one.

    PoseMaps      streams of posed rows -> the best linear map for each element, and its controls
    baselines     the same for arrays
    Explained     sums of squares on held-out rows -> R2 for each element

No symmetry of features may be claimed without these beside it: the best linear map from a(I) to
a(gI) (what is to be had without sparsity; codes that are not linear in a(I) may exceed it), a(I)
itself as a prediction (how invariant the layer is), and the linear map learnt from rows that do
not belong together (what the rest of the pipeline makes of nothing).
"""

import dataclasses

import numpy as np
import scipy.linalg
from jaxtyping import Float

from mechatlas.base import InputError

RIDGE = 1e-3
"""Of the linear maps, in units of the mean variance of a channel."""


class Explained:
    """R2 of predictions for each element, in one pass.

    Args:
        order: Elements of the group.
        d: Channels of one block.
    """

    def __init__(self, order: int, d: int) -> None:
        self.n, self._shape = 0, (order, d)
        self._sum, self._square = np.zeros(order * d), np.zeros(order * d)
        self._residual: dict[str, np.ndarray] = {}

    def add(
        self, x: Float[np.ndarray, "batch width"], **predictions: Float[np.ndarray, "batch width"]
    ) -> None:
        """Take in some rows and what each way predicts of them."""
        self.n += len(x)
        self._sum += x.sum(axis=0, dtype=np.float64)
        self._square += np.square(x).sum(axis=0, dtype=np.float64)
        for way, prediction in predictions.items():
            lost = np.square(x - prediction).sum(axis=0, dtype=np.float64)
            self._residual[way] = self._residual.get(way, 0) + lost

    def r2(self) -> dict[str, Float[np.ndarray, " order"]]:
        """For each way and element, 1 - residual / variance; NaN where nothing varies."""
        total = (self._square - self._sum**2 / max(self.n, 1)).reshape(self._shape).sum(axis=1)
        total = np.where(total > 1e-9 * self._square.sum(), total, np.nan)
        return {
            way: 1 - lost.reshape(self._shape).sum(axis=1) / total
            for way, lost in self._residual.items()
        }


class PoseMaps:
    """The best linear maps from the untransformed block to each block, with and without pairing.

    Args:
        order: Elements of the group.
        d: Channels of one block.
        identity: The element that changes nothing.
        seed: Of the rows that are taken instead of those that belong together.
    """

    def __init__(self, order: int, d: int, identity: int, *, seed: int = 0) -> None:
        self.n, self.d, self.width = 0, d, order * d
        self._own = slice(identity * d, (identity + 1) * d)
        self._random = np.random.default_rng([seed, 0x6D617073])
        self._gram = np.zeros((d, d))
        self._cross = np.zeros((2, d, self.width))
        self._mean = np.zeros(self.width)

    def add(self, x: Float[np.ndarray, "batch width"]) -> None:
        """Take in some rows; those of one call are shuffled among one another."""
        own = x[:, self._own]
        self.n += len(x)
        self._mean += x.sum(axis=0, dtype=np.float64)
        self._gram += own.T @ own
        self._cross[0] += own.T @ x
        self._cross[1] += own[self._random.permutation(len(x))].T @ x

    def solve(self) -> "LinearMaps":
        """The maps.

        Raises:
            InputError: There were fewer than two rows.
        """
        if self.n < 2:
            raise InputError(f"Linear maps need at least two rows, got {self.n}.")
        mean = self._mean / self.n
        gram = self._gram / self.n - np.outer(mean[self._own], mean[self._own])
        cross = self._cross / self.n - np.outer(mean[self._own], mean)
        gram[np.diag_indices(self.d)] += RIDGE * max(np.trace(gram) / self.d, 1e-30)
        linear, broken = (
            scipy.linalg.solve(gram, np.hstack(list(cross)), assume_a="pos")
            .reshape(self.d, 2, -1)
            .swapaxes(0, 1)
        )
        return LinearMaps(self._own, mean, linear, broken)


@dataclasses.dataclass(frozen=True, eq=False)
class LinearMaps:
    """Predictions of all blocks from the untransformed one."""

    own: slice
    """Its columns."""
    mean: Float[np.ndarray, " width"]
    linear: Float[np.ndarray, "d width"]
    broken: Float[np.ndarray, "d width"]
    """Learnt from rows that do not belong together."""

    def predict(
        self, x: Float[np.ndarray, "batch width"]
    ) -> dict[str, Float[np.ndarray, "batch width"]]:
        """What each baseline makes of the untransformed block of some rows."""
        centred = x[:, self.own] - self.mean[self.own]
        return {
            "linear": centred @ self.linear + self.mean,
            "invariant": np.tile(x[:, self.own], len(self.mean) // centred.shape[1]),
            "shuffled": centred @ self.broken + self.mean,
        }


@dataclasses.dataclass(frozen=True, eq=False)
class Baselines:
    """R2 on held-out rows for each element of the group."""

    linear: Float[np.ndarray, " order"]
    """The best linear map from a(I) to a(gI): what is to be had without sparsity."""
    invariant: Float[np.ndarray, " order"]
    """a(I) itself as a prediction of a(gI)."""
    shuffled: Float[np.ndarray, " order"]
    """A linear map learnt from rows that do not belong together; about 0."""
    dictionary: Float[np.ndarray, " order"] | None
    """What the dictionary makes of it, if it was given."""


def baselines(
    train: Float[np.ndarray, "n order d"],
    held: Float[np.ndarray, "m order d"],
    identity: int = 0,
    *,
    reconstruction: Float[np.ndarray, "m order d"] | None = None,
    seed: int = 0,
) -> Baselines:
    """R2 of the baselines on held-out rows.

    Args:
        train: Posed activations to learn linear maps from; best of other samples than `held`.
        held: Posed activations to measure on.
        identity: The element that changes nothing.
        reconstruction: What a dictionary makes of `held`.
        seed: Of the rows that are taken instead of those that belong together.

    Raises:
        InputError: There are too few rows.
    """
    _, order, d = train.shape
    maps = PoseMaps(order, d, identity, seed=seed)
    maps.add(train.reshape(len(train), -1))
    explained = Explained(order, d)
    x = held.reshape(len(held), -1)
    more = {} if reconstruction is None else {"dictionary": reconstruction.reshape(x.shape)}
    explained.add(x, **maps.solve().predict(x), **more)
    r2 = explained.r2()
    return Baselines(r2["linear"], r2["invariant"], r2["shuffled"], r2.get("dictionary"))
