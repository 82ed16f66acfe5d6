"""Crosscoder artifacts on decoder blocks: zero blocks of features that are not absent.

    LatentScaling     streams of codes and posed rows -> slopes of single codes, by fold of images
    find_artifacts    slopes -> class of every zero block: absent, shrunk, decoupled, not shown
    withhold_claims   symmetries -> the same, without claims that rest on such blocks

A zero block D_g of a feature need not mean that its code says nothing of the activation in pose g.
Training may have shrunk it to zero (complete shrinkage), or other latents that are active together
with the feature may write it (latent decoupling). With the covariances C of the codes, X_jg of
code j with the activation in pose g, and slopes of the one code alone,

    error slope     e_jg = (X_jg - sum over k != j of C_jk D_kg) / C_jj    on what the others leave
    others' slope   r_jg = (sum over k in O_j of C_jk D_kg) / C_jj         on what they write

e_jg is the block that would explain most if all other blocks stayed as they are. A feature that
merely occurs together with j writes with it in all poses. So O_j are the latents whose own block is
zero in the pose m of j's largest block: they write in other poses what j does not. Norms are
relative to ||D_jm||: nu_error is that of e_jg, nu_reconstruction that of r_jg.

Squared norms are sums of products of different folds of the images, whose noise is independent, so
noise does not add to them; their standard errors are those of the jackknife over folds.

Source: Minder et al., Overcoming sparsity artifacts in crosscoders to interpret chat-tuning (2025),
for both artifacts and for scaling of latents to tell them.
"""

import dataclasses
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from scipy import sparse, stats
from torch import Tensor

from mechatlas.analysis.symmetry.classify import FDR, Symmetry
from mechatlas.base import InputError
from mechatlas.maths.arrays import as_array
from mechatlas.maths.statistics import q_values

FOLDS = 10
"""Number of folds of the images that moments are kept for."""
MIN_ACTIVE_FOLDS = 4
"""Smallest number of folds with an active code in which a feature can be tested."""
ZERO_BLOCK = 0.2
"""Norm of a zero block, relative to the feature's largest block, at most."""
SHRUNK = 0.2
"""Norm, relative to the largest block, by which the best block is certainly longer than one that is
shrunk."""
ABSENT = 0.5
"""Norm, relative to the largest block, of which certainly less follows the code in the pose of an
absent block, and which other latents certainly exceed in that of a decoupled block."""
MAX_TESTED = 512
"""Maximum number of features with zero blocks that are tested."""
PART = 64
"""Number of features whose slopes are computed together."""
BlockClass = Literal["present", "shrunk", "decoupled", "absent", "not shown"]
BLOCK_CLASSES: tuple[BlockClass, ...] = get_args(BlockClass)
"""Classes of blocks; all but the first are of zero blocks."""


@dataclasses.dataclass(frozen=True, eq=False)
class ScalingEstimates:
    """Squared norms of slopes of single codes, with what they are if a fold is left out."""

    latents: Int[np.ndarray, " tested"]
    """Features with zero blocks that were tested."""
    norms: Float[np.ndarray, "feature order"]
    """Norm of each decoder block."""
    energies: Float[np.ndarray, "3 estimate tested order"]
    """Squared norms of the error slope, the others' slope and their sum: of all rows, and without
    each fold in turn."""
    active_folds: Int[np.ndarray, " tested"]
    """Number of folds in which the feature was active."""
    carriers: Int[np.ndarray, "tested order"]
    """Latent that contributes most to the others' slope."""


class LatentScaling:
    """Covariances of the codes of features with zero blocks, for folds of the images.

    Args:
        blocks: Decoder blocks of all latents.
    """

    def __init__(self, blocks: Float[np.ndarray, "latent order d"]) -> None:
        self.blocks: Float[np.ndarray, "latent order d"] = blocks
        n, order, d = blocks.shape
        self.norms: Float[np.ndarray, "latent order"] = np.linalg.norm(blocks, axis=2)
        candidates = np.flatnonzero(zero_blocks(self.norms).any(axis=1))
        spaced = np.linspace(0, len(candidates) - 1, min(len(candidates), MAX_TESTED))
        self.latents: Int[np.ndarray, " tested"] = candidates[spaced.round().astype(int)]
        tested = len(self.latents)
        self._gram = np.zeros((FOLDS, tested, n))
        self._cross = np.zeros((FOLDS, tested, order * d))
        self._rows = np.zeros(FOLDS)
        self._codes, self._targets = np.zeros((FOLDS, n)), np.zeros((FOLDS, order * d))

    def add(
        self,
        codes: Float[Tensor, "batch latent"],
        targets: Float[Tensor, "batch width"],
        image: Int[np.ndarray, " batch"],
    ) -> None:
        """Add a batch of rows.

        Args:
            codes: Codes of the rows.
            targets: Activations of the rows in all poses.
            image: Number of the image of each row; rows of an image stay in one fold.
        """
        if not len(self.latents):
            return
        x = targets.detach().float().cpu().numpy()
        every = sparse.csr_array(codes.detach().float().cpu().numpy())
        for fold in range(FOLDS):
            rows = np.flatnonzero(image % FOLDS == fold)
            part = every[rows]
            own = sparse.csr_array(part[:, self.latents].T)
            self._rows[fold] += len(rows)
            self._codes[fold] += part.sum(axis=0, dtype=np.float64)
            self._targets[fold] += x[rows].sum(axis=0, dtype=np.float64)
            self._gram[fold] += (own @ part).toarray()
            self._cross[fold] += own @ x[rows]

    def solve(self) -> ScalingEstimates:
        """Compute the squared norms of all slopes."""
        parts = [self._solve(slice(i, i + PART)) for i in range(0, max(len(self.latents), 1), PART)]
        energies, active, carriers = zip(*parts, strict=True)
        return ScalingEstimates(
            latents=self.latents,
            norms=self.norms,
            energies=np.concatenate(energies, axis=2),
            active_folds=np.concatenate(active),
            carriers=np.concatenate(carriers),
        )

    def _solve(self, part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Compute energies, numbers of active folds and carriers of some of the latents."""
        n, order, d = self.blocks.shape
        latents = self.latents[part]
        at = np.arange(len(latents))
        gram = self._center(self._gram[:, part], self._codes, latents)
        sums = self._center(self._cross[:, part], self._targets, latents)
        own = gram[:, at, latents]
        gram[:, at, latents] = 0
        others = np.stack([each @ self.blocks.reshape(n, -1) for each in gram])
        # Latents that write nothing in the pose of the feature's largest block.
        gram *= zero_blocks(self.norms)[:, self.norms[latents].argmax(axis=1)].T
        written = np.stack([each @ self.blocks.reshape(n, -1) for each in gram])
        shape = (FOLDS, len(at), order, d)
        slopes = sums - others, written, sums - others + written
        energies = [_energies(each.reshape(shape), own) for each in slopes]
        mean = written.sum(axis=0).reshape(shape[1:])
        carriers = [
            (gram.sum(axis=0) * (mean[:, g] @ self.blocks[:, g].T)).argmax(axis=1)
            for g in range(order)
        ]
        active = (self._gram[:, part][:, at, latents] > 0).sum(axis=0)
        return np.stack(energies), active, np.stack(carriers, axis=1)

    def _center(
        self,
        products: Float[np.ndarray, "fold some column"],
        sums: Float[np.ndarray, "fold column"],
        latents: Int[np.ndarray, " some"],
    ) -> Float[np.ndarray, "fold some column"]:
        """Subtract the means of all rows from sums of products of codes.

        Args:
            products: Sums of products in each fold.
            sums: Sums of the columns that the codes were multiplied with, in each fold.
            latents: Latents of the codes.
        """
        n = max(self._rows.sum(), 1)
        codes = self._codes[:, latents]
        mean = sums.sum(axis=0) / n
        centered = sums - self._rows[:, None] * mean
        return (
            products
            - codes[:, :, None] * mean
            - (codes.sum(axis=0) / n)[:, None] * centered[:, None]
        )


def zero_blocks(norms: Float[np.ndarray, "feature order"]) -> Bool[np.ndarray, "feature order"]:
    """Mark the blocks that are at most `ZERO_BLOCK` times as long as the feature's largest."""
    largest = np.where(norms.any(axis=1), norms.max(axis=1), -1)  # dead features have none
    return np.less_equal(norms, ZERO_BLOCK * largest[:, None])


def _energies(
    sums: Float[np.ndarray, "fold tested order d"], own: Float[np.ndarray, "fold tested"]
) -> Float[np.ndarray, "estimate tested order"]:
    """Estimate squared norms of slopes from products of different folds, without each in turn.

    Args:
        sums: Sums of products of the code with its targets, in each fold.
        own: Sums of squares of the code.
    """
    total = sums.sum(axis=0)
    squares = np.einsum("ktgd,ktgd->ktg", sums, sums)
    product = np.einsum("tgd,ktgd->ktg", total, sums)
    pairs = np.einsum("tgd,tgd->tg", total, total) - squares.sum(axis=0)
    weight = own.sum(axis=0) ** 2 - np.square(own).sum(axis=0)
    # (sum over pairs of other folds) = (over all pairs) - 2 (fold with all) + 2 (fold with itself)
    without = pairs - 2 * product + 2 * squares
    weight_without = weight - 2 * own.sum(axis=0) * own + 2 * np.square(own)
    weights = np.concatenate([weight[None], weight_without])[:, :, None]
    energies = np.concatenate([pairs[None], without])
    return np.where(weights > 0, energies / np.where(weights > 0, weights, 1), np.nan)


class Scaling(NamedTuple):
    """Relative norms with their 95 % intervals; NaN for blocks that were not tested."""

    value: Float[np.ndarray, "feature order"]
    low: Float[np.ndarray, "feature order"]
    high: Float[np.ndarray, "feature order"]


@dataclasses.dataclass(frozen=True, eq=False)
class BlockArtifacts:
    """Class of every decoder block, with the evidence for those of zero blocks."""

    classes: Int[np.ndarray, "feature order"]
    """Index in `BLOCK_CLASSES`."""
    nu_error: Scaling
    """Norm of the error slope, relative to the feature's largest block."""
    nu_reconstruction: Scaling
    """Norm of what latents that write nothing in the pose of the feature's largest block write when
    the feature is active, relative to this block."""
    q_shrunk: Float[np.ndarray, "feature order"]
    """Smallest false discovery rates at which a block is shrunk; NaN if it was not tested."""
    q_decoupled: Float[np.ndarray, "feature order"]
    """Smallest false discovery rates at which a block is written by other latents."""
    q_absent: Float[np.ndarray, "feature order"]
    """Smallest false discovery rates at which a block is absent."""
    carriers: Int[np.ndarray, "feature order"]
    """Latent that writes most of a decoupled block; -1 for other blocks."""
    tested: int
    """Number of features that were tested."""
    fdr: float
    """False discovery rate of the classes."""

    def of_class(self, name: BlockClass) -> Bool[np.ndarray, "feature order"]:
        """Mark the blocks of a class."""
        return self.classes == BLOCK_CLASSES.index(name)

    @property
    def affected(self) -> Bool[np.ndarray, " feature"]:
        """Mask of features with a block that is shrunk or decoupled."""
        return np.any(self.of_class("shrunk") | self.of_class("decoupled"), axis=1)


def find_artifacts(estimates: ScalingEstimates, *, fdr: float = FDR) -> BlockArtifacts:
    """Tell which zero blocks are absent, which are shrunk, and which others write.

    A block is shrunk if nu_error is certainly larger than its own norm, by `SHRUNK`; decoupled if
    nu_reconstruction is certainly above `ABSENT`, and it is not shrunk; absent if nu_error, and the
    norm of both slopes together, are certainly below `ABSENT`. Other zero blocks are not shown.

    Args:
        estimates: Slopes of single codes.
        fdr: False discovery rate of each of the three claims, over all zero blocks.

    Raises:
        InputError: The false discovery rate does not lie between 0 and 1.
    """
    if not 0 < fdr < 1:
        raise InputError(f"The false discovery rate must lie between 0 and 1, got {fdr}.")
    norms, latents = estimates.norms, estimates.latents
    largest = norms[latents].max(axis=1)[:, None]
    freedom = np.where(estimates.active_folds >= MIN_ACTIVE_FOLDS, estimates.active_folds - 1, 0)
    own, reconstruction, follows = (
        _Jackknife.of(each, freedom) for each in estimates.energies / np.square(largest)
    )
    zero = zero_blocks(norms)

    def spread(values: np.ndarray, fill: float = np.nan) -> np.ndarray:
        out = np.full(norms.shape, fill)
        out[latents] = values
        return np.where(zero, out, fill)

    longer = norms[latents] / largest + SHRUNK
    absent = np.maximum(own.p_below(ABSENT), follows.p_below(ABSENT))
    q_shrunk, q_decoupled, q_absent = (
        q_values(spread(p)) for p in (own.p_above(longer), reconstruction.p_above(ABSENT), absent)
    )
    claims = [~zero, q_shrunk <= fdr, q_decoupled <= fdr, q_absent <= fdr]
    classes = np.select(claims, [0, 1, 2, 3], BLOCK_CLASSES.index("not shown"))
    decoupled = classes == BLOCK_CLASSES.index("decoupled")
    return BlockArtifacts(
        classes=classes,
        nu_error=Scaling(*map(spread, own.interval())),
        nu_reconstruction=Scaling(*map(spread, reconstruction.interval())),
        q_shrunk=q_shrunk,
        q_decoupled=q_decoupled,
        q_absent=q_absent,
        carriers=np.where(decoupled, spread(estimates.carriers, -1), -1).astype(np.int64),
        tested=len(latents),
        fdr=fdr,
    )


class _Jackknife(NamedTuple):
    """Squared relative norms with the standard errors of the jackknife over folds."""

    value: Float[np.ndarray, "tested order"]
    error: Float[np.ndarray, "tested order"]
    freedom: Float[np.ndarray, "tested 1"]

    @classmethod
    def of(
        cls, values: Float[np.ndarray, "estimate tested order"], freedom: Int[np.ndarray, " tested"]
    ) -> "_Jackknife":
        """Compute the errors; where there are no degrees of freedom nothing is certain."""
        left_out = values[1:]
        deviations = left_out - left_out.mean(axis=0)
        error = np.sqrt((len(left_out) - 1) / len(left_out) * np.square(deviations).sum(axis=0))
        known = (freedom > 0)[:, None] & np.isfinite(values).all(axis=0)
        return cls(
            np.where(known, values[0], 0.0),
            np.where(known, error, np.inf),
            np.maximum(freedom, 1)[:, None].astype(float),
        )

    def p_above(self, limit: float | np.ndarray) -> Float[np.ndarray, "tested order"]:
        """Compute p-values of the null hypothesis that the norm is at most a limit."""
        return stats.t.sf(self._statistic(limit), self.freedom)

    def p_below(self, limit: float) -> Float[np.ndarray, "tested order"]:
        """Compute p-values of the null hypothesis that the norm is at least a limit."""
        return stats.t.cdf(self._statistic(limit), self.freedom)

    def _statistic(self, limit: float | np.ndarray) -> Float[np.ndarray, "tested order"]:
        # Without any noise the error is 0, or what rounding leaves of it.
        return (self.value - limit**2) / np.maximum(self.error, 1e-12)

    def interval(self) -> tuple[Float[np.ndarray, "tested order"], ...]:
        """Compute norms with the ends of their 95 % intervals."""
        half = stats.t.ppf(0.975, self.freedom) * self.error
        ends = (self.value, self.value - half, self.value + half)
        return tuple(np.sqrt(np.maximum(each, 0)) for each in ends)


def withhold_claims(found: Symmetry, artifacts: BlockArtifacts) -> Symmetry:
    """Withhold what cannot be claimed of features with zero blocks that may not be absent.

    A feature is called asymmetric only if its zero blocks are certainly absent. Estimates from
    codes have the blocks that were shrunk, but not those that other latents write: where that is
    possible, a larger stabilizer is not ruled out, and the feature is not reliable.
    """
    absent, present = artifacts.of_class("absent"), artifacts.of_class("present")
    measured = absent | present | artifacts.of_class("shrunk")
    return dataclasses.replace(
        found,
        asymmetric=found.asymmetric & (absent | present).all(axis=1),
        reliable=found.reliable & measured.all(axis=1),
    )


def measure_scaling(
    codes: ArrayLike | Tensor,
    posed: ArrayLike | Tensor,
    blocks: ArrayLike | Tensor,
    image: ArrayLike | None = None,
) -> ScalingEstimates:
    """Measure the slopes of single codes for arrays.

    Args:
        codes: Codes of the rows `(n, latents)`, numpy or torch.
        posed: Activations of the rows in all poses `(n, order, d)`.
        blocks: Decoder blocks of all latents `(latents, order, d)`.
        image: Number of the image of each row; without it, every row is an image of its own.

    Raises:
        InputError: The shapes do not fit one another.
    """
    z = as_array(codes, "n latent", "codes", dtype=np.float32)
    rows = as_array(posed, "n order d", "posed", dtype=np.float32)
    atoms = as_array(blocks, "latent order d", "blocks")
    n, latents = z.shape
    images = np.arange(n) if image is None else np.asarray(image)
    if atoms.shape != (latents, *rows.shape[1:]) or len(rows) != n or images.shape != (n,):
        raise InputError(
            f"Codes {z.shape}, posed activations {rows.shape}, blocks {atoms.shape} and images "
            f"{images.shape} must be (n, latents), (n, order, d), (latents, order, d) and (n,)."
        )
    scaling = LatentScaling(atoms)
    scaling.add(torch.from_numpy(z), torch.from_numpy(rows.reshape(n, -1)), images)
    return scaling.solve()
