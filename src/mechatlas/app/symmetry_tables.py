"""Table and tensors of `mechatlas symmetry`, and types of features in its result.

write_features    symmetries -> table of features and tensors that the page draws
count_types       types -> their part of the result
type_columns      types -> columns of the table
types_in_words    types for the terminal
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mechatlas.analysis.symmetry.classify import Symmetry
from mechatlas.analysis.symmetry.feature_types import FeatureTypes
from mechatlas.app.pose_interventions import rounded
from mechatlas.app.run_folder import FEATURES, SYMMETRY_TENSORS, Outputs
from mechatlas.maths.groups import Group

NORMAL_95 = 1.96
"""Standard errors on each side of a 95 % interval."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TypesResult:
    """Features of one type in several orientations, clustered by similarity in the best pose."""

    types: int
    """Number of clusters of two or more features."""
    features: int
    """Features in clusters."""
    largest: int
    """Features of the largest cluster."""
    n_clustered: int
    """Features that took part: those that can be reproduced, at most 2,048."""
    cut: float | None
    """Mean similarity at which clusters are cut; null if no cut keeps to the rate."""
    features_by_chance: float
    """Mean number of features in clusters of null dictionaries at this cut."""
    separation: float | None
    """Mean similarity to the own cluster less that to the nearest other one."""
    null_separation: float | None
    """Largest separation of null dictionaries with as many features in clusters."""
    separation_p_value: float | None
    """p-value of clusters as separated as these by chance."""


def count_types(types: FeatureTypes) -> TypesResult:
    """Fields of the result that count features of one type."""
    known = types.null_separation[~np.isnan(types.null_separation)]
    return TypesResult(
        types=len(types.sizes),
        features=int(types.sizes.sum()),
        largest=int(types.sizes.max(initial=0)),
        n_clustered=types.n_clustered,
        cut=rounded(types.cut),
        features_by_chance=types.n_by_chance,
        separation=rounded(types.separation),
        null_separation=rounded(known.max()) if len(known) else None,
        separation_p_value=rounded(types.p_value),
    )


def type_columns(types: FeatureTypes, group: Group) -> dict[str, Any]:
    """Columns of the table with the type of each feature."""
    return {
        "type": types.labels.astype(np.int32),
        "type_reference": types.references.astype(np.int32),
        "type_pose": types.poses.astype(np.int32),
        "type_pose_name": [group.element_names[h] for h in types.poses],
        "type_offset": types.offsets,
        "type_similarity": types.similarity,
    }


def types_in_words(types: TypesResult) -> str:
    """Describe the types in a sentence."""
    if not types.types:
        return (
            f"No types: no clusters of {types.n_clustered} features are beyond those of null "
            "dictionaries."
        )
    separation = "" if types.separation is None else (
        f"; separation {types.separation:.2f}, of null dictionaries at most "
        f"{types.null_separation or 0:.2f} (p {types.separation_p_value:.2g})"
    )  # fmt: skip
    return (
        f"{types.types} types hold {types.features} of {types.n_clustered} features in several "
        f"orientations, cut at a similarity of {types.cut:.2f} (by chance "
        f"{types.features_by_chance:.1f} features){separation}."
    )


def write_features(
    folder: Outputs,
    symmetries: Symmetry,
    atoms: Float[np.ndarray, "feature d"],
    active: Int[np.ndarray, " feature"],
    columns: dict[str, Any],
    tensors: dict[str, np.ndarray] | None = None,
) -> None:
    """Write the table of features and the tensors that the page draws.

    Args:
        folder: Outputs of the run.
        symmetries: Stabilizers, families and poses.
        atoms: Untransformed block of each feature.
        active: Rows where each feature is active.
        columns: Further columns: type of each feature, responses to stimuli, interventions.
        tensors: Further tensors: tuning curves.
    """
    names = symmetries.group.element_names
    sizes = symmetries.family_sizes
    likeness, errors = symmetries.likeness()
    folder.table(
        FEATURES,
        {
            "feature": np.arange(len(symmetries.stabilizers), dtype=np.int32),
            "stabilizer": [symmetries.class_names[c] for c in symmetries.classes],
            "stabilizer_order": np.array([len(each) for each in symmetries.stabilizers], np.int32),
            "stabilizer_elements": [sorted(each) for each in symmetries.stabilizers],
            "class": symmetries.names,
            **_grade_columns(symmetries, likeness, errors),
            "family": symmetries.families.astype(np.int32),
            "family_size": sizes[symmetries.families].astype(np.int32),
            "reference": symmetries.references.astype(np.int32),
            "pose": symmetries.poses.astype(np.int32),
            "pose_name": [names[pose] for pose in symmetries.poses],
            "similarity": symmetries.similarity_to_reference,
            "p_value": symmetries.p_values,
            "q_value": symmetries.q_values,
            "reliable": symmetries.reliable,
            "noise_ceiling": symmetries.noise_ceiling,
            "reliability": symmetries.reliability,
            "rows_active": active,
            **columns,
        },
    )
    folder.tensors(
        SYMMETRY_TENSORS,
        {
            "stabilizer_function": symmetries.stabilizer_function.astype(np.float32),
            "standard_errors": np.minimum(symmetries.standard_errors, 1e6).astype(np.float32),
            "spectrum": symmetries.spectrum.astype(np.float32),
            "likeness": likeness.astype(np.float32),
            "likeness_errors": np.minimum(errors, 1e6).astype(np.float32),
            "atoms": atoms.astype(np.float32),
            **(tensors or {}),
        },
    )


def _grade_columns(
    symmetries: Symmetry,
    likeness: Float[np.ndarray, "feature cls"],
    errors: Float[np.ndarray, "feature cls"],
) -> dict[str, Any]:
    """Columns with the grade of each feature, and its likeness under the class that matters."""
    lattice = symmetries.group.lattice()
    similar = np.array([lattice.class_of(each) for each in symmetries.approximate_stabilizers])
    # Where no symmetry is shown, that which the feature is nearest to.
    nearest = np.nan_to_num(likeness, nan=-2.0)
    nearest[:, 0] = -3.0  # the class of {e} itself
    at = np.where(similar > 0, similar, nearest.argmax(axis=1))
    rows = np.arange(len(at))
    value, spread = likeness[rows, at], NORMAL_95 * errors[rows, at]
    return {
        "grade": symmetries.grades,
        "approximate_stabilizer": [symmetries.class_names[c] for c in similar],
        "approximate_elements": [sorted(h) for h in symmetries.approximate_stabilizers],
        "approximate_q_value": symmetries.approximate_q_values,
        "likeness_class": [symmetries.class_names[c] for c in at],
        "likeness": value,
        "likeness_low": value - spread,
        "likeness_high": value + spread,
    }
