"""Second moments of streams of rows, and what their spectra say.

    Moments          mean and centered Gram matrix, one pass, resumable
    Firing           how often units fire, alone and together: exact counts
    cut              a spectrum -> its numerical rank, and how far the threshold may move
    relu_pullback    E[J^T A J] of a ReLU section from `Firing` alone: no Jacobian is formed
    parts_of         equal or nearly equal firing sets -> blocks of units

Rows may be float32: sums are float64.

Source: Bushnaq et al., Using degeneracy in the loss landscape for mechanistic
interpretability (2024), for the three degeneracies; Chan, Golub and LeVeque (1979), for
adding blocks.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import linalg as scipy_linalg
from scipy.sparse.csgraph import connected_components
from torch import Tensor

blas: Any = scipy_linalg.blas  # its functions are made when it is loaded
RELATIVE = 1e-10
"""Eigenvalues of second moments below this share of the largest count as zero."""
EXACT_IN_FLOAT32 = 1 << 24
"""Counts up to here are exact in float32."""
BLOCK = 4096
"""Rows that are converted at a time: bounds the memory, whatever is given at once."""


class Moments:
    """Mean and centered Gram matrix of rows of a stream."""

    def __init__(self, width: int) -> None:
        self.width, self.n = width, 0
        self.mean: Float[np.ndarray, " d"] = np.zeros(width)
        self._upper = np.zeros((width, width), order="F")  # scatter about the mean

    def add(self, rows: Float[Tensor, "batch d"]) -> None:
        """Take in some rows."""
        for block in _blocks(rows, np.float64):
            mean = block.mean(axis=0)
            block -= mean
            n, step = len(block), mean - self.mean
            total = self.n + n
            self._upper += _gram(block)
            self._upper = blas.dsyr(self.n * n / total, step, a=self._upper, overwrite_a=True)
            self.mean = self.mean + step * (n / total)
            self.n = total

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """E[(x - mean)(x - mean)^T]."""
        return _symmetric(self._upper) / max(self.n, 1)

    @property
    def second_moment(self) -> Float[np.ndarray, "d d"]:
        """E[x x^T]."""
        return self.covariance + np.outer(self.mean, self.mean)

    def state(self) -> dict[str, np.ndarray]:
        """Arrays from which `from_state` goes on."""
        return {
            "n": np.array(self.n),
            "mean": self.mean,
            "upper": np.ascontiguousarray(self._upper),
        }

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> "Moments":
        """The stream as it was when `state` was called."""
        moments = cls(len(state["mean"]))
        moments.n, moments.mean = state["n"].item(), state["mean"].copy()
        moments._upper = np.asfortranarray(state["upper"])
        return moments


class Firing:
    """How often each unit, and each pair of units, is above zero. All counts are exact."""

    def __init__(self, width: int) -> None:
        self.width, self.n = width, 0
        self._upper = np.zeros((width, width), order="F")

    def add(self, fires: Bool[Tensor, "batch d"]) -> None:
        """Take in some rows."""
        for start in range(0, len(fires), EXACT_IN_FLOAT32):  # products stay exact integers
            partial: np.ndarray | None = None
            for block in _blocks(fires[start : start + EXACT_IN_FLOAT32], np.float32):
                partial = _gram(block, partial)
            if partial is not None:
                self._upper += partial
        self.n += len(fires)

    @property
    def together(self) -> Float[np.ndarray, "d d"]:
        """Number of rows on which both units fire; on the diagonal, on which one fires."""
        return _symmetric(self._upper)

    @property
    def rate(self) -> Float[np.ndarray, " d"]:
        """Share of the rows on which each unit fires."""
        return np.diag(self._upper) / max(self.n, 1)

    def state(self) -> dict[str, np.ndarray]:
        """Arrays from which `from_state` goes on."""
        return {"n": np.array(self.n), "upper": np.ascontiguousarray(self._upper)}

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> "Firing":
        """The stream as it was when `state` was called."""
        firing = cls(len(state["upper"]))
        firing.n, firing._upper = state["n"].item(), np.asfortranarray(state["upper"])
        return firing


def gram(rows: Float[Tensor, "batch d"]) -> Float[np.ndarray, "d d"]:
    """Sum of x x^T, in float64 whatever the rows are."""
    return _symmetric(_gram(rows.detach().cpu().double().contiguous().numpy()))


def _blocks(rows: Tensor, dtype: type) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK].detach().cpu()
        yield (block.float() if block.dtype == torch.bfloat16 else block).numpy().astype(dtype)


def _gram(rows: np.ndarray, onto: np.ndarray | None = None) -> np.ndarray:
    # Half the work of a general product: only the upper triangle is computed.
    syrk = blas.ssyrk if rows.dtype == np.float32 else blas.dsyrk
    if onto is None:
        return syrk(1.0, rows.T)
    return syrk(1.0, rows.T, beta=1.0, c=onto, overwrite_c=True)


def _symmetric(upper: np.ndarray) -> np.ndarray:
    whole = np.triu(upper)
    return np.ascontiguousarray(whole + np.triu(whole, 1).T)


@dataclasses.dataclass(frozen=True)
class Cut:
    """Where a spectrum ends."""

    rank: int
    threshold: float
    """Share of the largest eigenvalue below which one counts as zero."""
    stable_from: float
    stable_to: float
    """Any threshold from `stable_from` up to `stable_to` gives the same rank."""

    @property
    def decades(self) -> float:
        """Width of the gap in powers of ten: how clear the rank is."""
        low = max(self.stable_from, float(np.finfo(float).eps))
        return float(np.log10(self.stable_to / low)) if self.rank else 0.0


def cut(eigenvalues: Float[np.ndarray, " d"], relative: float = RELATIVE) -> Cut:
    """Numerical rank of a positive semidefinite matrix.

    Args:
        eigenvalues: In any order; tiny negative ones are rounding.
        relative: Threshold, as a share of the largest.
    """
    falling = np.sort(np.abs(eigenvalues))[::-1]
    if not len(falling) or falling[0] == 0:
        return Cut(0, relative, 0.0, 1.0)
    shares = falling / falling[0]
    rank = int((shares > relative).sum())
    below = float(shares[rank]) if rank < len(shares) else 0.0
    return Cut(rank, relative, below, float(shares[rank - 1]))


def rank_of(rows: Float[np.ndarray, "n d"], relative: float = RELATIVE) -> int:
    """Rank of the second moments of some rows, by their singular values.

    Columns are brought to one length first, so that a small column is not a dependent one.
    """
    if not rows.size:
        return 0
    length = np.sqrt(np.square(rows).sum(axis=0))
    scaled = rows[:, length > 0] / length[length > 0]
    if not scaled.size:
        return 0
    if scaled.shape[0] > 4 * scaled.shape[1]:
        scaled = np.linalg.qr(scaled, mode="r")
    return cut(np.square(np.linalg.svd(scaled, compute_uv=False)), relative).rank


def spectral(
    matrix: Float[np.ndarray, "d d"],
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
    """Eigenvalues, largest first, and their vectors as columns, with a fixed sign."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    values, vectors = values[::-1].clip(min=0), vectors[:, ::-1]
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(len(values))])
    return values, vectors * signs


def relu_pullback(
    after: Float[np.ndarray, "h h"],
    weights: Float[np.ndarray, "h d"],
    together: Float[np.ndarray, "h h"],
) -> Float[np.ndarray, "d d"]:
    """E[J^T A J] for a section relu(W x + b), where A is `after`.

    J = diag(fires) W, so entry (k, l) of diag(fires) A diag(fires) is A[k, l] wherever both
    units fire: `together` holds how often they do, as a share of the rows.

    Args:
        after: Matrix A of the later layer.
        weights: Weights W.
        together: Share of the rows on which both units fire.
    """
    return weights.T @ (after * together) @ weights


def skip_pullback(
    after: Float[np.ndarray, "o o"],
    weights: Float[np.ndarray, "h d"],
    together: Float[np.ndarray, "h h"],
    out: Float[np.ndarray, "o h"],
    *,
    skip: bool,
) -> Float[np.ndarray, "d d"]:
    """E[J^T A J] for V relu(W x + b) + c, plus x itself if `skip`.

    Args:
        after: Matrix A of the later layer.
        weights: Weights W.
        together: Share of the rows on which both units fire.
        out: Weights V.
        skip: Whether x itself is added.
    """
    pulled = relu_pullback(out.T @ after @ out, weights, together)
    if not skip:
        return pulled
    cross = after @ (out * np.diag(together)) @ weights
    return after + cross + cross.T + pulled


def parts_of(together: Float[np.ndarray, "d d"], tolerance: float = 0.0) -> Int[np.ndarray, " d"]:
    """Blocks of units that fire on the same rows.

    Args:
        together: Counts of `Firing`.
        tolerance: Units are joined if the rows on which only one of them fires are at most
            this share of those on which either does (one minus the Jaccard index). With 0 the
            firing sets are exactly equal: integer counts decide it, and hashes could not do
            better.

    Returns:
        The block of each unit, counted from 0; -1 for units that never fire.
    """
    alone = np.diag(together)
    firing = np.flatnonzero(alone)
    either = alone[:, None] + alone - together
    near = either - together <= tolerance * either
    blocks = np.full(len(alone), -1)
    blocks[firing] = connected_components(near[np.ix_(firing, firing)], directed=False)[1]
    return blocks
