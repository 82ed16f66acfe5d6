"""Tuning of features to synthetic stimuli, which knows nothing of their decoder blocks.

    measure_tuning     responses to stimuli in all poses -> similarity of each feature to itself
    Tuning             tuning curves, similarity under each element with its interval
    class_agreement    whether features that are claimed to be symmetric respond alike
    pose_agreement     whether features that are claimed to be poses of one another respond so

An element h of the stabilizer of a feature leaves its code as it is: f(a(hI)) = f(a(I)) for every
input. With r(p) the response to a stimulus in pose p, that is r(hp) = r(p), and the correlation of
the two over stimuli and poses is 1. If D_g = E_gh for features with blocks D and E, then D responds
to hI as E does to I.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from mechatlas.analysis.symmetry.class_names import n_turns
from mechatlas.analysis.symmetry.stimuli import KINDS, Stimuli
from mechatlas.maths.groups import Group
from mechatlas.maths.statistics import proportion

N_BOOTSTRAP = 400
"""Resamplings of stimuli or of features for an interval."""
N_PERMUTATIONS = 1999
"""Permutations of claims among features."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tuning:
    """Responses of features to stimuli in all poses."""

    responds: Bool[np.ndarray, " feature"]
    """Mask of features that are active for some stimulus."""
    best: Int[np.ndarray, " feature"]
    """Stimulus with the largest response."""
    curves: Float[np.ndarray, "feature pose"]
    """Response to that stimulus in every pose of the stimuli's group."""
    by_kind: Float[np.ndarray, "feature kind angle"]
    """Largest response to the stimuli of each kind, in each orientation."""
    similarity: Float[np.ndarray, "feature element"]
    """Correlation of responses to stimuli posed by each element with those to the stimuli
    themselves, over all stimuli and poses; NaN for features that do not respond."""
    low: Float[np.ndarray, "feature element"]
    """Lower end of the 95 % interval over stimuli (bootstrap)."""
    high: Float[np.ndarray, "feature element"]
    """Upper end of the interval."""
    responses: Float[np.ndarray, "feature stimulus pose"]
    """All responses."""
    elements: Int[np.ndarray, " element"]
    """Elements of the features' group, as poses of the stimuli."""
    group: Group
    """Group of the poses of the stimuli."""

    def similarity_under(
        self, stabilizers: Sequence[frozenset[int]], values: Float[np.ndarray, "feature element"]
    ) -> Float[np.ndarray, " feature"]:
        """Average values over the elements other than e of each feature's stabilizer."""
        return np.array([
            np.mean([row[h] for h in sorted(each) if self.elements[h] != self.group.identity])
            if len(each) > 1
            else np.nan
            for row, each in zip(values, stabilizers, strict=True)
        ])  # fmt: skip


def poses_of_elements(group: Group, n_angles: int) -> Int[np.ndarray, " element"]:
    """Poses of stimuli in `n_angles` orientations that are elements of C_n or D_n.

    Args:
        group: C_n or D_n, in the order of `named_groups`; n divides `n_angles`.
        n_angles: Orientations of the stimuli.
    """
    n = n_turns(group)
    g = np.arange(group.order)
    return (g % n) * (n_angles // n) + np.where(g >= n, n_angles, 0)


def measure_tuning(
    responses: Float[np.ndarray, "feature stimulus pose"],
    stimuli: Stimuli,
    elements: Int[np.ndarray, " element"],
    *,
    seed: int = 0,
) -> Tuning:
    """Measure how alike the responses of each feature are after each element.

    Args:
        responses: Code of each feature for each stimulus in each pose.
        stimuli: The stimuli.
        elements: Elements of the features' group, as poses.
        seed: Seed of the resamplings.
    """
    n, n_stimuli, n_poses = responses.shape
    table = stimuli.group.table
    responds = responses.reshape(n, -1).max(axis=1, initial=0) > 0
    sums = responses.sum(axis=2, dtype=np.float64)
    squares = np.einsum("isp,isp->is", responses, responses, dtype=np.float64)
    products = np.stack(
        [np.einsum("isp,isp->is", responses[:, :, table[h]], responses, dtype=np.float64)
         for h in elements]
    )  # fmt: skip
    random = np.random.default_rng([seed, 0x74756E])
    weights = random.multinomial(n_stimuli, np.full(n_stimuli, 1 / n_stimuli), N_BOOTSTRAP).astype(
        float
    )

    similarity = np.empty((n, len(elements)))
    low, high = np.empty_like(similarity), np.empty_like(similarity)
    for k in range(len(elements)):
        sides = products[k], squares, sums
        similarity[:, k] = _correlation(*sides, np.ones((1, n_stimuli)), n_poses)[:, 0]
        drawn = _correlation(*sides, weights, n_poses)
        drawn[~np.isfinite(similarity[:, k])] = 0
        low[:, k], high[:, k] = np.nanquantile(drawn, [0.025, 0.975], axis=1)
    known = np.isfinite(similarity).all(axis=1)
    low[~known], high[~known] = np.nan, np.nan
    rows = np.arange(n)
    best = responses.max(axis=2).argmax(axis=1)
    n_angles = n_poses // 2
    kinds = np.array(stimuli.kinds)
    return Tuning(
        responds=responds & known,
        best=best,
        curves=responses[rows, best],
        by_kind=np.stack(
            [responses[:, kinds == kind, :n_angles].max(axis=1) for kind in KINDS], axis=1
        ),
        similarity=similarity,
        low=low,
        high=high,
        responses=responses,
        elements=np.asarray(elements),
        group=stimuli.group,
    )


def _correlation(
    products: Float[np.ndarray, "feature stimulus"],
    squares: Float[np.ndarray, "feature stimulus"],
    sums: Float[np.ndarray, "feature stimulus"],
    weights: Float[np.ndarray, "sample stimulus"],
    n_poses: int,
) -> Float[np.ndarray, "feature sample"]:
    """Correlation from the sums over poses of each stimulus, for stimuli with weights."""
    mean = np.square(sums @ weights.T) / (n_poses * weights.sum(axis=1))
    second = squares @ weights.T
    variance = second - mean
    flat = variance <= 1e-9 * np.maximum(second, 1e-30)
    return np.where(flat, np.nan, (products @ weights.T - mean) / np.where(flat, 1, variance))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassAgreement:
    """Responses of features that are claimed to be symmetric, beside those of features without.

    For each claimed feature, the mean similarity of its responses under the elements of its
    stabilizer; beside it the same of the features without a symmetry, under the same elements.
    """

    n_claimed: int
    """Claimed features that respond to stimuli."""
    n_none: int
    """Features without a symmetry that respond."""
    claimed: float | None = None
    """Median similarity of the responses of claimed features."""
    none: float | None = None
    """Median over claimed features of the median of the features without a symmetry."""
    auc: float | None = None
    """Probability that a claimed feature responds more alike than one without a symmetry, under
    the same elements; 0.5 by chance."""
    low: float | None = None
    """Lower end of the 95 % interval of `auc` over features (bootstrap)."""
    high: float | None = None
    """Upper end of the interval."""
    p_value: float | None = None
    """p-value of an `auc` as large with claims permuted among these features."""


def class_agreement(
    tuning: Tuning,
    stabilizers: Sequence[frozenset[int]],
    grades: Sequence[str],
    *,
    seed: int = 0,
) -> ClassAgreement:
    """Compare responses of features with an exact or approximate symmetry and of those with none.

    Args:
        tuning: Responses to stimuli.
        stabilizers: Stabilizer of each feature, exact or approximate.
        grades: Grade of each feature.
        seed: Seed of the resamplings.
    """
    of, orders = np.array(grades), np.array([len(each) for each in stabilizers])
    claimed = np.flatnonzero(tuning.responds & np.isin(of, ("exact", "approximate")) & (orders > 1))
    none = np.flatnonzero(tuning.responds & (of == "none"))
    if not len(claimed) or not len(none):
        return ClassAgreement(n_claimed=len(claimed), n_none=len(none))
    masks = np.zeros((len(claimed), len(tuning.elements)))
    for row, i in zip(masks, claimed, strict=True):
        row[sorted(stabilizers[int(i)])] = 1
    masks[:, tuning.elements == tuning.group.identity] = 0
    masks /= masks.sum(axis=1, keepdims=True)
    # row: feature whose stabilizer is asked about; column: feature whose responses are looked at
    under = masks @ tuning.similarity[np.concatenate([claimed, none])].T
    n = len(claimed)
    rows, random = np.arange(n), np.random.default_rng([seed, 0x617563])

    def auc(asked: np.ndarray, own: np.ndarray, others: np.ndarray) -> float:
        """Mean over claims of the share of features without one that respond less alike."""
        mine, theirs = under[asked, own][:, None], under[asked][:, others]
        return float((mine > theirs).mean() + (mine == theirs).mean() / 2)

    def drawn() -> float:
        picked, beside = random.integers(0, n, n), random.integers(0, len(none), len(none))
        return auc(picked, picked, n + beside)

    low, high = np.quantile([drawn() for _ in range(N_BOOTSTRAP)], [0.025, 0.975])
    found = auc(rows, rows, n + np.arange(len(none)))
    n_as_large = 0
    for _ in range(N_PERMUTATIONS):
        order = random.permutation(n + len(none))
        n_as_large += auc(rows, order[:n], order[n:]) >= found
    return ClassAgreement(
        n_claimed=n,
        n_none=len(none),
        claimed=float(np.median(under[rows, rows])),
        none=float(np.median(np.median(under[:, n:], axis=1))),
        auc=found,
        low=float(low),
        high=float(high),
        p_value=(1 + n_as_large) / (1 + N_PERMUTATIONS),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoseAgreement:
    """Responses of features that are claimed to be poses of a reference."""

    n: int
    """Pairs of a feature and its reference that both respond."""
    right: int = 0
    """Pairs whose responses are most alike in the claimed pose."""
    share: float | None = None
    """Share of the pairs."""
    low: float = 0.0
    """Lower end of the 95 % interval of the share (Wilson)."""
    high: float = 1.0
    """Upper end of the interval."""
    by_chance: float | None = None
    """The share by chance: of poses that say the same as the best one, of all."""
    similarity: float | None = None
    """Median correlation of responses in the claimed pose."""
    similarity_by_chance: float | None = None
    """Median of the largest correlation over poses of as many pairs drawn at random."""


def pose_agreement(
    tuning: Tuning,
    references: Int[np.ndarray, " feature"],
    poses: Int[np.ndarray, " feature"],
    *,
    seed: int = 0,
) -> PoseAgreement:
    """Compare the responses of each feature with those of its reference in every pose.

    Args:
        tuning: Responses to stimuli.
        references: Reference of each feature; a feature that is its own takes no part.
        poses: Pose of each feature relative to its reference, an element of the features' group.
        seed: Seed of the pairs drawn at random.
    """
    own = references == np.arange(len(references))
    taken = np.flatnonzero(~own & tuning.responds & tuning.responds[references])
    if not len(taken):
        return PoseAgreement(n=0)
    alike = np.stack([_alike(tuning, int(i), int(references[i])) for i in taken])
    best = alike.max(axis=1, keepdims=True)
    as_good = alike >= best - 1e-6
    right = int(as_good[np.arange(len(taken)), poses[taken]].sum())
    share = proportion(right, len(taken))
    random = np.random.default_rng([seed, 0x7061])
    responding = np.flatnonzero(tuning.responds)
    pairs = random.choice(responding, (max(len(taken), 50), 2))
    chance = [float(_alike(tuning, int(i), int(j)).max()) for i, j in pairs if i != j]
    return PoseAgreement(
        n=len(taken),
        right=right,
        share=share.value,
        low=share.low,
        high=share.high,
        by_chance=float(as_good.mean()),
        similarity=float(np.median(alike[np.arange(len(taken)), poses[taken]])),
        similarity_by_chance=float(np.median(chance)) if chance else None,
    )


def _alike(tuning: Tuning, i: int, j: int) -> Float[np.ndarray, " element"]:
    """Correlate responses of i to stimuli posed by each element with those of j to the stimuli."""
    x, y = (tuning.responses[k].astype(np.float64) for k in (i, j))
    y = y - y.mean()
    x = x - x.mean()
    table = tuning.group.table
    products = np.array([float((x[:, table[h]] * y).sum()) for h in tuning.elements])
    return products / max(float(np.linalg.norm(x) * np.linalg.norm(y)), 1e-30)
