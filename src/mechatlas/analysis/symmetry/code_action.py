"""Learnt representation of a group on codes, beside the fixed regular one.

    fit_code_action    codes and posed rows -> representation, judged on held-out rows
    regular_action     families of a group crosscoder -> how the group permutes their latents

If the code z of an activation transforms as rho(g) z when the input is posed by g, then one decoder
W of the untransformed activation reconstructs every pose:

    a(gI)  ~  (rho(g) z) W,      rho(gh) = rho(g) rho(h).

A group crosscoder assumes the regular action: codes only move between the latents of a family. Here
rho is learnt, block by block: matrices that fit each pose best (least squares, part by part, until
nothing changes), made orthogonal in their mean metric, and averaged over the group,

    N(g)  <-  mean over h of N(h)^-1 N(hg),

which converges to a representation from matrices that nearly are one. If a part does not converge,
its codes are left unchanged and `exact` is False.

Source: Erdogan and Lucic, Group equivariance meets mechanistic interpretability: equivariant sparse
autoencoders (2025), for the learnt action; Babai, Friedl and Lukacs, Near representations of finite
groups (2003), for the average.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from scipy import stats
from torch import Tensor

from mechatlas.analysis.symmetry.classify import Symmetry
from mechatlas.base import InputError
from mechatlas.maths.arrays import as_array
from mechatlas.maths.groups import Group

FOLDS = 10
"""Number of folds of the held-out images for the interval of the gain."""
SWEEPS = 200
"""Maximum number of passes over the parts in the least-squares fit."""
CONVERGED = 1e-6
"""Largest change of a pass, relative to the largest entry, at which the fit has converged."""
ROUNDS = 60
"""Maximum number of averages over the group."""
TOLERANCE = 1e-10
"""Norm of rho(gh) - rho(g) rho(h), relative to that of rho(gh), below which rho is exact."""
RIDGE = 1e-6
"""Ridge penalty of the least squares, relative to the mean second moment."""
Predictor = Literal["learnt", "regular", "unchanged", "unconstrained"]
PREDICTORS: tuple[Predictor, ...] = get_args(Predictor)
"""Actions on codes: learnt; regular; none at all; and matrices that are no representation."""


@dataclasses.dataclass(frozen=True, eq=False)
class CodeAction:
    """Representation of a group on codes, with its evidence on held-out rows."""

    matrices: Float[np.ndarray, "order latent latent"]
    """rho(g), block-diagonal over the parts; a part without a representation is left unchanged."""
    exact: Bool[np.ndarray, " part"]
    """Whether averages of the matrices that fit best converged to a representation."""
    distance: Float[np.ndarray, " part"]
    """Norm of the difference of the representation and these matrices, relative to its own: about 1
    for codes that say nothing of other poses."""
    multiplicities: Int[np.ndarray, "part irrep"]
    """Number of times each of `group.irreps()` occurs in a part; 0 for parts without one."""
    fvu: dict[Predictor, Float[np.ndarray, " order"]]
    """Fraction of variance unexplained of each held-out pose, by action."""
    gain: float
    """Mean FVU over the poses other than e of the best other choice (regular, unchanged, or the
    mean of the pose, which has an FVU of 1), less that of the learnt action."""
    gain_low: float
    """Lower end of the 95 % interval of the gain, by jackknife over folds of held-out images."""
    gain_high: float
    """Upper end of the interval."""


def regular_action(found: Symmetry) -> Int[np.ndarray, "order feature"]:
    """Give the latent that each feature's code moves to; -1 where its family has no such pose.

    Pose h of a family's reference goes to pose gh, up to the stabilizer of the reference.
    """
    group, n = found.group, len(found.families)
    out = np.full((group.order, n), -1)
    for family in range(int(found.families.max()) + 1):
        members = np.flatnonzero(found.families == family)
        stabilizer = sorted(found.stabilizers[int(found.references[members[0]])])
        at = np.full(group.order, -1)
        for i in members[::-1]:  # the first of several in one pose stays
            at[group.table[found.poses[i], stabilizer]] = i
        out[:, members] = at[group.table[:, found.poses[members]]]
    return out


def fit_code_action(
    codes: ArrayLike | Tensor,
    posed: ArrayLike | Tensor,
    decoder: ArrayLike | Tensor,
    group: Group,
    held_out: ArrayLike,
    *,
    parts: Sequence[Sequence[int]] | None = None,
    regular: ArrayLike | None = None,
    image: ArrayLike | None = None,
) -> CodeAction:
    """Learn how a group acts on codes, and compare with the regular action on held-out rows.

    Keeps several matrices of order x latents^2, so it is for hundreds of latents, not for many
    thousands.

    Args:
        codes: Codes of the untransformed activations `(n, latents)`, numpy or torch.
        posed: Activations in all poses `(n, order, d)`.
        decoder: Decoder of the untransformed activations `(latents, d)`.
        group: Group that acts on the input.
        held_out: Mask of the rows to measure on; the others are fitted.
        parts: Latents that are transformed among themselves, such as families: by default all.
        regular: Latent that each code moves to under each element, or -1, from `regular_action`;
            by default none moves.
        image: Number of the image of each row; without it, every row is an image of its own.

    Raises:
        InputError: The shapes do not fit one another, the parts are no partition of the latents,
            or there are too few rows to fit or to measure on.
    """
    all_codes = as_array(codes, "n latent", "codes", dtype=np.float64)
    rows = as_array(posed, "n order d", "posed", dtype=np.float64)
    atoms = as_array(decoder, "latent d", "decoder", dtype=np.float64)
    held, (n, m) = np.asarray(held_out, bool), all_codes.shape
    listed = [list(range(m))] if parts is None else [list(part) for part in parts]
    moves = np.tile(np.arange(m), (group.order, 1)) if regular is None else np.asarray(regular)
    images = np.arange(n) if image is None else np.asarray(image)
    _check(all_codes, rows, atoms, group, held, listed, moves, images)
    z, y = all_codes[~held], rows[~held]
    means = z.mean(axis=0), y.mean(axis=0)
    best = _least_squares(z - means[0], y - means[1], atoms, listed)
    best[group.identity] = np.eye(m)
    matrices = np.tile(np.eye(m), (group.order, 1, 1))
    irreps = group.irreps()
    exact, counts = np.zeros(len(listed), bool), np.zeros((len(listed), len(irreps)), int)
    distance = np.empty(len(listed))
    for i, part in enumerate(listed):
        inside = np.ix_(range(group.order), part, part)
        near = _nearest_representation(best[inside], group)
        close = matrices[inside] if near is None else near
        distance[i] = np.linalg.norm(best[inside] - close) / np.linalg.norm(close)
        if near is None:
            continue
        exact[i], matrices[inside] = True, near
        character = np.trace(near, axis1=1, axis2=2)
        counts[i] = [round(float((character * r.character).mean()) / r.commutant) for r in irreps]
    actions: dict[Predictor, np.ndarray] = {
        "learnt": matrices,
        "regular": _as_matrices(moves),
        "unchanged": np.tile(np.eye(m), (group.order, 1, 1)),
        "unconstrained": best,
    }
    centered = all_codes[held] - means[0], rows[held] - means[1]
    sums = _residuals(*centered, atoms, actions, images[held])
    others = np.arange(group.order) != group.identity
    return CodeAction(
        matrices=matrices,
        exact=exact,
        distance=distance,
        multiplicities=counts,
        fvu=_fvu(sums.sum(axis=0)),
        **dict(zip(("gain", "gain_low", "gain_high"), _gain(sums, others), strict=True)),
    )


def _check(
    codes: np.ndarray,
    posed: np.ndarray,
    decoder: np.ndarray,
    group: Group,
    held_out: np.ndarray,
    parts: list[list[int]],
    regular: np.ndarray,
    image: np.ndarray,
) -> None:
    """Check that all shapes fit."""
    (n, m), d = codes.shape, decoder.shape[1]
    shapes = posed.shape, decoder.shape, held_out.shape, regular.shape, image.shape
    expected = (n, group.order, d), (m, d), (n,), (group.order, m), (n,)
    names = "posed", "decoder", "held_out", "regular", "image"
    for name, shape, wanted in zip(names, shapes, expected, strict=True):
        if shape != wanted:
            raise InputError(
                f"{name} must have shape {wanted} for codes {codes.shape} under {group.name}, got "
                f"{shape}."
            )
    if sorted(latent for part in parts for latent in part) != list(range(m)):
        raise InputError(f"parts must hold each of the {m} latents exactly once.")
    if (~held_out).sum() < 2 or len(np.unique(image[held_out])) < 2:
        raise InputError(
            f"At least two rows to fit ({(~held_out).sum()}) and held-out rows of two images "
            f"({len(np.unique(image[held_out]))}) are needed."
        )


def _as_matrices(
    moves: Int[np.ndarray, "order latent"],
) -> Float[np.ndarray, "order latent latent"]:
    """Convert moves of codes to matrices; a code that moves nowhere is lost."""
    order, m = moves.shape
    out = np.zeros((order, m, m))
    g, latent = np.nonzero(moves >= 0)
    out[g, moves[g, latent], latent] = 1
    return out


def _least_squares(
    z: Float[np.ndarray, "n latent"],
    y: Float[np.ndarray, "n order d"],
    decoder: Float[np.ndarray, "latent d"],
    parts: list[list[int]],
) -> Float[np.ndarray, "order latent latent"]:
    """Fit block-diagonal matrices M_g that minimize the error of (M_g z) W, part by part.

    Args:
        z: Centered codes.
        y: Centered activations in all poses.
        decoder: Decoder W.
        parts: Latents of each block.
    """
    gram, metric = z.T @ z, decoder @ decoder.T
    target = np.einsum("nl,ngd,kd->glk", z, y, decoder, optimize=True)
    out = np.zeros_like(target)  # M_g transposed
    inverses = [
        [_ridge_inverse(each[np.ix_(part, part)]) for each in (gram, metric)] for part in parts
    ]
    for _ in range(SWEEPS):
        change = 0.0
        for part, (of_codes, of_atoms) in zip(parts, inverses, strict=True):
            inside = np.ix_(range(len(out)), part, part)
            block = out[inside]
            left = target[inside] - gram[part] @ out @ metric[:, part]
            step = of_codes @ left @ of_atoms
            out[inside] = block + step
            change = max(change, float(np.abs(step).max()))
        if change <= CONVERGED * float(np.abs(out).max()):
            break
    return out.swapaxes(1, 2)


def _ridge_inverse(x: Float[np.ndarray, "k k"]) -> Float[np.ndarray, "k k"]:
    """Invert a positive semidefinite matrix, with a small ridge; zero for a zero matrix."""
    ridge = RIDGE * np.trace(x) / len(x)
    return np.linalg.inv(x + ridge * np.eye(len(x))) if ridge > 0 else np.zeros_like(x)


def _nearest_representation(
    matrices: Float[np.ndarray, "order k k"], group: Group
) -> Float[np.ndarray, "order k k"] | None:
    """Average matrices that nearly are a representation until they are one; None if they are not.

    Similarity by the root of the mean of M^T M makes a representation orthogonal.
    """
    mean = np.einsum("gji,gjk->ik", matrices, matrices) / group.order
    values = np.linalg.eigvalsh(mean)
    if values[0] <= RIDGE * values[-1]:
        return None
    root = np.linalg.cholesky(mean).T
    inverse = np.linalg.inv(root)
    near = _orthogonal(root @ matrices @ inverse)
    for _ in range(ROUNDS):
        near = _orthogonal(
            np.stack(
                [(near.swapaxes(1, 2) @ near[column]).mean(axis=0) for column in group.table.T]
            )
        )
        products = near[:, None] @ near[None]
        defect = np.linalg.norm(near[group.table] - products, axis=(2, 3)).max()
        if defect <= TOLERANCE * len(mean) ** 0.5:
            return inverse @ near @ root
    return None


def _orthogonal(x: Float[np.ndarray, "order k k"]) -> Float[np.ndarray, "order k k"]:
    """Find the nearest orthogonal matrices (polar decomposition)."""
    left, _, right = np.linalg.svd(x)
    return left @ right


def _residuals(
    codes: Float[np.ndarray, "n latent"],
    posed: Float[np.ndarray, "n order d"],
    decoder: Float[np.ndarray, "latent d"],
    actions: dict[Predictor, Float[np.ndarray, "order latent latent"]],
    image: Int[np.ndarray, " n"],
) -> Float[np.ndarray, "fold predictor order"]:
    """Sum squared residuals by fold of images; the last predictor is the mean of the pose.

    Args:
        codes: Centered codes of held-out rows.
        posed: Centered activations of held-out rows in all poses.
        decoder: Decoder of the untransformed activations.
        actions: Matrices of each predictor.
        image: Number of the image of each row.
    """
    numbers = np.unique(image, return_inverse=True)[1]
    n_folds = min(FOLDS, int(numbers.max()) + 1)
    squares = np.empty((len(codes), len(actions) + 1, posed.shape[1]))
    for g in range(posed.shape[1]):
        for k, matrices in enumerate(actions.values()):
            predicted = codes @ (matrices[g].T @ decoder)
            squares[:, k, g] = np.square(posed[:, g] - predicted).sum(axis=1)
        squares[:, -1, g] = np.square(posed[:, g]).sum(axis=1)
    return np.stack([squares[numbers % n_folds == k].sum(axis=0) for k in range(n_folds)])


def _fvu(sums: Float[np.ndarray, "predictor order"]) -> dict[Predictor, np.ndarray]:
    """Divide residuals by those of the mean; NaN where nothing varies."""
    total = np.where(sums[-1] > 0, sums[-1], np.nan)
    return {name: sums[k] / total for k, name in enumerate(PREDICTORS)}


def _gain(
    sums: Float[np.ndarray, "fold predictor order"], others: Bool[np.ndarray, " order"]
) -> tuple[float, float, float]:
    """Compare the learnt action with the best fixed choice: the gain and its 95 % interval."""

    def means(part: np.ndarray) -> np.ndarray:
        fvu = _fvu(part)
        fixed = [fvu["regular"], fvu["unchanged"], np.ones(len(others))]
        return np.array([each[others].mean() for each in (fvu["learnt"], *fixed)])

    whole, n = sums.sum(axis=0), len(sums)
    of_all = means(whole)
    best = 1 + int(of_all[1:].argmin())
    left_out = np.array([(each := means(whole - fold))[best] - each[0] for fold in sums])
    error = np.sqrt((n - 1) / n * np.square(left_out - left_out.mean()).sum())
    gain, half = of_all[best] - of_all[0], stats.t.ppf(0.975, n - 1) * error
    return float(gain), float(gain - half), float(gain + half)
