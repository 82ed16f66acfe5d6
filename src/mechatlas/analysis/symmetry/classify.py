"""Symmetry of features: their stabilizers, and which features are poses of one another.

Main path, in reading order:

    symmetry                    decoder blocks -> stabilizers, families and poses
    Symmetry                    result with its evidence
    shuffle_pairing             blocks whose pairing of elements is broken
    count_shuffled_discoveries  features with a symmetry after shuffling: about none

A feature has one decoder block D_g for each element g of a group that acts on the input. Seen in
another pose it has blocks D'_g = D_gh, so h leaves it unchanged exactly if D_gh = D_g for all g;
these h form its stabilizer, which is always a subgroup.

Source: Gorton, Group crosscoders for mechanistic analysis of symmetry (2024).
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from numpy.typing import ArrayLike
from torch import Tensor

from mechatlas.analysis.symmetry.class_names import APPROXIMATELY, NOT_SHOWN, name_classes
from mechatlas.analysis.symmetry.families import find_families
from mechatlas.analysis.symmetry.shift_evidence import (
    EQUALITY_THRESHOLD,
    SUPPORT_THRESHOLD,
    evidence_from_channels,
    evidence_from_halves,
)
from mechatlas.analysis.symmetry.stabilizers import select_stabilizers
from mechatlas.base import InputError, NonFiniteError, Progress, Result, no_progress
from mechatlas.deprecated import renamed_arguments, renamed_attributes
from mechatlas.maths.arrays import as_array
from mechatlas.maths.directions import distinct_rows
from mechatlas.maths.groups import Group

Halves = Sequence[ArrayLike | Tensor] | Shaped[np.ndarray, "..."] | Shaped[Tensor, "..."]
"""Two estimates of decoder blocks, of shape (2, n_features, order, d)."""
Grade = Literal["exact", "approximate", "none", "not shown"]
GRADES: tuple[Grade, ...] = get_args(Grade)
"""Grades of symmetry: of "not shown" neither a symmetry nor a lack of it is certain."""
FDR = 0.05
"""Default false discovery rate."""
WITHOUT_HALVES = (
    "No halves were given, so noise cannot be told from asymmetry: the noise ceiling of a feature "
    "is taken to be its largest similarity under any shift, and p-values say whether other "
    "channels would agree, not whether other data would."
)


@renamed_attributes
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Symmetry(Result):
    """Stabilizer of each feature, and families of features that are poses of one another."""

    group: Group
    """Group that acts on the input."""
    stabilizers: tuple[frozenset[int], ...]
    """Stabilizer {h : D_gh = D_g for all g} of each feature as far as the data support it, as
    labels of elements: `{e}` unless the q-value is at most `fdr`."""
    p_values: Float[np.ndarray, " feature"]
    """p-values of the null hypothesis that only e leaves the feature unchanged."""
    q_values: Float[np.ndarray, " feature"]
    """Smallest false discovery rates at which the stabilizer is larger than {e}."""
    reliable: Bool[np.ndarray, " feature"]
    """Mask of features that can be reproduced and whose data rule out every larger stabilizer."""
    classes: Int[np.ndarray, " feature"]
    """Index of the conjugacy class of the stabilizer in `group.lattice().classes`."""
    class_names: tuple[str, ...]
    """Names of the conjugacy classes."""
    families: Int[np.ndarray, " feature"]
    """Label of the family; 0 is the largest. A feature without relatives is a family alone."""
    poses: Int[np.ndarray, " feature"]
    """Pose h with D_g = reference_gh: the smallest label in its coset of the reference's
    stabilizer."""
    references: Int[np.ndarray, " feature"]
    """Index of the family's reference feature, relative to which poses are given."""
    similarity_to_reference: Float[np.ndarray, " feature"]
    """Cosine with the reference in that pose, corrected for noise where there are halves."""
    stabilizer_function: Float[np.ndarray, "feature element"]
    """Similarity s(h) of the feature to itself shifted by h; corrected for noise where there are
    halves, so that it may exceed 1."""
    standard_errors: Float[np.ndarray, "feature element"]
    """Standard errors of the stabilizer function."""
    spectrum: Float[np.ndarray, "feature irrep"]
    """Share of the feature's energy in each of `group.irreps()`; sums to 1, or to 0 for a feature
    that cannot be reproduced."""
    noise_ceiling: Float[np.ndarray, " feature"]
    """Cosine between the two halves; NaN without halves."""
    reliability: Float[np.ndarray, " feature"]
    """Expected cosine between two estimates from all data (Spearman-Brown); NaN without halves."""
    chance_similarity: float
    """Similarity to a pose of an unrelated feature at the given false discovery rate."""
    variance_inflation: float
    """Factor applied to variances for correlated noise of entries; 1 if they are uncorrelated."""
    fdr: float
    """False discovery rate of the claim that a stabilizer is larger than {e}."""
    equality_threshold: float
    """Similarity at which shifted blocks count as equal."""
    missing: str
    """Evidence that is missing, in words; empty with halves."""
    approximate_stabilizers: tuple[frozenset[int], ...]
    """Largest subgroup of each feature whose elements all leave it certainly more similar than
    0.707, equal or not; `{e}` unless its q-value is at most `fdr`."""
    approximate_q_values: Float[np.ndarray, " feature"]
    """Smallest false discovery rates at which the approximate stabilizer is larger than {e}."""
    asymmetric: Bool[np.ndarray, " feature"]
    """Mask of features for which every subgroup has an element that leaves them certainly less
    similar than 0.707: they have no symmetry, not even an approximate one."""

    @property
    def grades(self) -> list[Grade]:
        """Grade of the symmetry of each feature.

        "exact": the stabilizer is larger than {e} and reliable; "approximate": only the approximate
        stabilizer is larger; "none": the feature is asymmetric; "not shown": none of these is
        certain.
        """
        exact = (self.q_values <= self.fdr) & self.reliable
        approximate = self.approximate_q_values <= self.fdr
        masks = exact, approximate, self.asymmetric
        return np.select(masks, GRADES[:-1], GRADES[-1]).tolist()

    @property
    def names(self) -> list[str]:
        """Label of each feature: one of `labels`."""
        lattice = self.group.lattice()
        label = {
            "exact": lambda i: self.class_names[self.classes[i]],
            "approximate": lambda i: (
                f"{APPROXIMATELY} "
                + self.class_names[lattice.class_of(self.approximate_stabilizers[i])]
            ),
            "none": lambda i: self.class_names[self.classes[i]],
            "not shown": lambda i: NOT_SHOWN,
        }
        return [label[grade](i) for i, grade in enumerate(self.grades)]

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels in order: classes, that of {e} first, approximate classes, `NOT_SHOWN`."""
        return label_classes(self.class_names)

    @property
    def n_discoveries(self) -> int:
        """Number of features with an exact symmetry."""
        return self.grades.count("exact")

    @property
    def class_counts(self) -> dict[str, int]:
        """Number of features of each label that has features."""
        counts = Counter(self.names)
        return {name: counts[name] for name in self.labels if counts[name]}

    @property
    def grade_counts(self) -> dict[str, int]:
        """Number of features of each grade."""
        counts = Counter(self.grades)
        return {grade: counts[grade] for grade in GRADES}

    def likeness(self) -> tuple[Float[np.ndarray, "feature cls"], Float[np.ndarray, "feature cls"]]:
        """Similarity of each feature to itself under each class of subgroups, with its error.

        The mean of the stabilizer function over the elements other than e, of the subgroup of the
        class where it is largest; 1 for the class of {e}. The largest is a little too large where
        a class has several members and noise decides. The standard error is that of elements whose
        errors are equal, so that it is too large rather than too small.
        """
        classes = self.group.lattice().classes
        value = np.ones((len(self.reliable), len(classes)))
        error = np.zeros_like(value)
        rows = np.arange(len(value))
        for k, each in enumerate(classes):
            if each.order == 1:
                continue
            others = [sorted(h - {self.group.identity}) for h in each.members]
            means = np.stack([self.stabilizer_function[:, h].mean(axis=1) for h in others])
            errors = np.stack([self.standard_errors[:, h].mean(axis=1) for h in others])
            best = np.nan_to_num(means, nan=-np.inf).argmax(axis=0)
            value[:, k], error[:, k] = means[best, rows], errors[best, rows]
        return value, error

    @property
    def family_sizes(self) -> Int[np.ndarray, " family"]:
        """Number of features of each family, largest first."""
        return np.bincount(self.families)

    def summary(self) -> str:
        """Counts of classes and families, with the false discovery rate and the noise ceiling."""
        sizes = self.family_sizes
        ceiling = self.noise_ceiling[np.isfinite(self.noise_ceiling)]
        known = f"{np.median(ceiling):.2f}" if len(ceiling) else "unknown (no halves)"
        return (
            f"Symmetry: {self.n_discoveries} of {len(self.stabilizers)} features have a symmetry "
            f"under {self.group.name} (false discovery rate {self.fdr:.0%})\n"
            f"grades: {', '.join(f'{name} {n}' for name, n in self.grade_counts.items())}\n"
            f"classes: {', '.join(f'{n} {name}' for name, n in self.class_counts.items())}\n"
            f"families of two or more: {(sizes > 1).sum()}, with {sizes[sizes > 1].sum()} features"
            f"\nmedian noise ceiling {known}"
        )


@renamed_arguments
def symmetry(
    blocks: ArrayLike | Tensor,
    group: Group,
    halves: Halves | None = None,
    *,
    fdr: float = FDR,
    equality_threshold: float = EQUALITY_THRESHOLD,
    seed: int = 0,
    acts_by_rotation: bool = True,
    on_progress: Progress = no_progress,
) -> Symmetry:
    """Classify features by their stabilizer, and gather features that are poses of one another.

    Features that are zero, constant, or the same as an earlier one up to their size take no part:
    they change nothing for the others, and nothing is claimed of them or of the earlier one.

    Args:
        blocks: Decoder blocks D_g `(n_features, order, d)`, numpy or torch, in the group's order.
        group: Group that acts on the input.
        halves: Two estimates of the blocks with independent noise, of the same shape, from
            different samples. Without them noise cannot be told from asymmetry: see `missing`.
        fdr: False discovery rate of the claim that a stabilizer is larger than {e}.
        equality_threshold: Similarity (cosine, corrected for noise) at which D_gh and D_g count as
            equal. Nothing in a real network is exactly equal.
        seed: Seed of the null distribution for families.
        acts_by_rotation: Whether C_n and D_n act by rotations and mirrors, so that classes can be
            named after them; with hues or shifts classes are named by the type of their group.
        on_progress: Callback with the number of tiles of feature pairs compared so far.

    Raises:
        InputError: The shapes do not fit the group or one another.
        NonFiniteError: A block has NaN or infinite values.
        SubgroupLimitError: The group has too many subgroups to compare them all.

    Examples:
        >>> import numpy as np
        >>> import mechatlas as ma
        >>> d4 = ma.group("D4")  # four rotations and four mirrors
        >>> line = np.random.default_rng(0).standard_normal((4, 48))[[0, 1, 0, 1, 2, 3, 2, 3]]
        >>> poses = np.stack([line[d4.table[:, h]] for h in (0, 1, 4, 5)])  # distinct
        >>> result = ma.symmetry(poses, d4, [poses, poses])
        >>> sorted(result.stabilizers[0])  # e and the half-turn
        [0, 2]
        >>> result.class_counts
        {'half-turn (line-like)': 4}
    """
    if not 0 < fdr < 1:
        raise InputError(f"The false discovery rate must lie between 0 and 1, got {fdr}.")
    if not SUPPORT_THRESHOLD < equality_threshold <= 1:
        raise InputError(
            f"equality_threshold must be above {SUPPORT_THRESHOLD:.4f} and at most 1, got "
            f"{equality_threshold}."
        )
    whole = _as_blocks(blocks, group, "blocks")
    both = None if halves is None else _as_halves(halves, group, whole.shape)
    distinct = distinct_rows(whole.reshape(len(whole), -1))
    kept = distinct.kept if len(distinct.kept) else np.array([0])
    found = _symmetry(
        whole[kept], group, both and [half[kept] for half in both],
        fdr=fdr, equality_threshold=equality_threshold, seed=seed,
        acts_by_rotation=acts_by_rotation, on_progress=on_progress,
    )  # fmt: skip
    return found if distinct.unique.all() else _spread(found, kept, distinct.unique)


def _symmetry(
    whole: Float[np.ndarray, "feature order d"],
    group: Group,
    halves: list[np.ndarray] | None,
    *,
    fdr: float,
    equality_threshold: float,
    seed: int,
    acts_by_rotation: bool,
    on_progress: Progress,
) -> Symmetry:
    """Find the symmetries of features that each say something of their own."""
    if halves is None:
        evidence = evidence_from_channels(whole, group, equality_threshold)
    else:
        first, second = halves
        evidence = evidence_from_halves(first, second, group, equality_threshold)
    selected = select_stabilizers(evidence, group, fdr)
    subgroups = group.subgroups()
    stabilizers = tuple(subgroups[i] for i in selected.subgroup)
    ceiling = evidence.noise_ceiling
    reliability = np.clip(2 * ceiling / np.maximum(1 + ceiling, 1e-9), -1, 1)  # Spearman-Brown
    share = np.where(np.isnan(reliability), 1.0, np.maximum(reliability, 0))
    families = find_families(
        whole, np.where(evidence.p_signal <= fdr, share, 0), evidence.noise, stabilizers, group,
        fdr=fdr, equality_threshold=equality_threshold, seed=seed, on_progress=on_progress,
    )  # fmt: skip
    class_of = np.array([group.lattice().class_of(each) for each in subgroups])
    return Symmetry(
        group=group,
        stabilizers=stabilizers,
        p_values=selected.p_values,
        q_values=selected.q_values,
        reliable=selected.conclusive,
        classes=class_of[selected.subgroup],
        class_names=name_classes(group, acts_by_rotation=acts_by_rotation),
        families=families.label,
        poses=families.pose,
        references=families.reference,
        similarity_to_reference=families.similarity,
        stabilizer_function=evidence.similarity,
        standard_errors=evidence.standard_errors,
        spectrum=_energy_spectrum(evidence.autocorrelation, group),
        noise_ceiling=evidence.noise_ceiling,
        reliability=reliability,
        chance_similarity=families.chance_similarity,
        variance_inflation=evidence.variance_inflation,
        fdr=fdr,
        equality_threshold=equality_threshold,
        missing="" if halves is not None else WITHOUT_HALVES,
        approximate_stabilizers=tuple(subgroups[i] for i in selected.approximate),
        approximate_q_values=selected.approximate_q_values,
        asymmetric=selected.asymmetric,
    )


def _spread(
    found: Symmetry, kept: Int[np.ndarray, " kept"], unique: Bool[np.ndarray, " feature"]
) -> Symmetry:
    """Give the features that took no part, or share a direction, results that claim nothing."""
    n, claimed, group = len(unique), kept[unique[kept]], found.group
    nothing = frozenset({group.identity})

    def all_features(values: np.ndarray, fill: Any, part: np.ndarray) -> np.ndarray:
        out = np.empty((n, *values.shape[1:]), values.dtype)
        out[...] = fill
        out[part] = values[np.isin(kept, part)]
        return out

    def subgroups(of_kept: tuple[frozenset[int], ...]) -> tuple[frozenset[int], ...]:
        out = [nothing] * n
        for i, k in zip(np.flatnonzero(unique[kept]), claimed, strict=True):
            out[k] = of_kept[i]
        return tuple(out)

    families = all_features(found.families, -1, kept)
    families[families < 0] = found.families.max() + 1 + np.arange((families < 0).sum())
    return dataclasses.replace(
        found,
        stabilizers=subgroups(found.stabilizers),
        p_values=all_features(found.p_values, 1, claimed),
        q_values=all_features(found.q_values, 1, claimed),
        reliable=all_features(found.reliable, False, claimed),
        classes=all_features(found.classes, group.lattice().class_of(nothing), claimed),
        families=families,
        poses=all_features(found.poses, group.identity, kept),
        references=all_features(kept[found.references], np.arange(n), kept),
        similarity_to_reference=all_features(found.similarity_to_reference, 1, kept),
        stabilizer_function=all_features(found.stabilizer_function, np.nan, kept),
        standard_errors=all_features(found.standard_errors, np.nan, kept),
        spectrum=all_features(found.spectrum, 0, kept),
        noise_ceiling=all_features(found.noise_ceiling, np.nan, kept),
        reliability=all_features(found.reliability, np.nan, kept),
        approximate_stabilizers=subgroups(found.approximate_stabilizers),
        approximate_q_values=all_features(found.approximate_q_values, 1, claimed),
        asymmetric=all_features(found.asymmetric, False, claimed),
    )


def label_classes(class_names: Sequence[str]) -> tuple[str, ...]:
    """List the labels of features: classes, that of {e} first, approximate ones, `NOT_SHOWN`."""
    approximate = (f"{APPROXIMATELY} {name}" for name in class_names[1:])
    return (*class_names, *approximate, NOT_SHOWN)


def shuffle_pairing(
    blocks: Float[np.ndarray, "feature order d"], group: Group, *, seed: int = 0
) -> Float[np.ndarray, "feature order d"]:
    """Permute the features of each element but e, which breaks the pairing of their blocks.

    Two halves are permuted equally with one seed. Shuffled features have symmetries only by chance.

    Args:
        blocks: Decoder blocks.
        group: Group that acts on the input.
        seed: Seed of the permutations.
    """
    random = np.random.default_rng([seed, 0x706169])
    out = blocks.copy()
    for g in range(group.order):
        order = random.permutation(len(blocks))
        if g != group.identity:
            out[:, g] = blocks[order, g]
    return out


def count_shuffled_discoveries(
    halves: Halves,
    group: Group,
    *,
    fdr: float = FDR,
    equality_threshold: float = EQUALITY_THRESHOLD,
    seed: int = 0,
) -> int:
    """Count the reliable features with a symmetry after shuffling: a negative control.

    Args:
        halves: Two estimates of the blocks with independent noise.
        group: Group that acts on the input.
        fdr: False discovery rate of the claim.
        equality_threshold: Similarity at which blocks count as equal.
        seed: Seed of the permutations.

    Raises:
        InputError: The shapes do not fit the group or one another.
        NonFiniteError: A block has NaN or infinite values.
    """
    both = _as_halves(halves, group, None)
    kept = distinct_rows((both[0] + both[1]).reshape(len(both[0]), -1)).kept
    if not len(kept):
        return 0
    first, second = (shuffle_pairing(half[kept], group, seed=seed) for half in both)
    evidence = evidence_from_halves(first, second, group, equality_threshold)
    selected = select_stabilizers(evidence, group, fdr)
    return int(((selected.q_values <= fdr) & selected.conclusive).sum())


def _energy_spectrum(
    autocorrelation: Float[np.ndarray, "feature element"], group: Group
) -> Float[np.ndarray, "feature irrep"]:
    """Project the autocorrelation on the characters: energy in each irrep, times d / (c order)."""
    weights = np.stack([r.character * r.multiplicity for r in group.irreps()], axis=1)
    shares = np.maximum(autocorrelation @ weights / group.order, 0)
    total = shares.sum(axis=1, keepdims=True)
    return np.where(total > 0, shares / np.where(total > 0, total, 1), 0.0)


def _as_halves(
    halves: Halves, group: Group, shape: tuple[int, ...] | None
) -> list[Float[np.ndarray, "feature order d"]]:
    """Convert two estimates of the blocks, of the given shape or else of equal shapes."""
    if len(halves) != 2:
        raise InputError(f"halves must be two estimates of the blocks, got {len(halves)}.")
    arrays = [
        _as_blocks(half, group, f"half {name}") for half, name in zip(halves, "AB", strict=True)
    ]
    shape = shape or arrays[0].shape
    for array in arrays:
        if array.shape != shape:
            raise InputError(
                f"Each half must have the shape of the blocks, {shape}, got {array.shape}."
            )
    return arrays


def _as_blocks(
    blocks: ArrayLike | Tensor, group: Group, name: str
) -> Float[np.ndarray, "feature order d"]:
    """Convert decoder blocks to floats and check their shape and values."""
    array = as_array(blocks, "feature element channel", name)
    if array.shape[1] != group.order or 0 in array.shape:
        raise InputError(
            f"{name} must have shape (n_features, {group.order}, d), one block for each element of "
            f"{group.name}; got {array.shape}."
        )
    if array.dtype != np.float64:
        array = array.astype(np.float32, copy=False)
    finite = np.isfinite(array).all(axis=2)
    if not finite.all():
        feature, g = np.argwhere(~finite)[0]
        raise NonFiniteError(
            f"{name} has NaN or infinite values, first in the block of feature {feature} for "
            f"element {g} ({group.element_names[g]})."
        )
    return array
