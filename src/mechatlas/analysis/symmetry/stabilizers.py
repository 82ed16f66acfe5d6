"""Stabilizer of each feature, selected from the evidence for single group elements.

    select_stabilizers    evidence -> one subgroup for each feature, with its q-value

A subgroup is claimed if every one of its elements has support and none is certainly unequal. All
subgroups of the group are compared, not one of each conjugacy class, so the answer is closed under
products by construction. It is conclusive if every subgroup that is not contained in it has an
element that is certainly unequal.

The p-value of "larger than {e}" is the smallest among subgroups of prime order, each with the
p-value of its worst element (intersection-union), times the number of elements to choose from
(Bonferroni). Larger subgroups of the discovered features are then tested at the level at which
these features were selected.

Source: Berger, Multiparameter hypothesis testing and acceptance sampling (1982), for
intersection-union tests; Benjamini and Bogomolov, Selective inference on multiple families of
hypotheses (2014), for levels inside selected families.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from mechatlas.analysis.symmetry.shift_evidence import ShiftEvidence
from mechatlas.maths.groups import Group
from mechatlas.maths.statistics import q_values

_CELLS = 1 << 26
"""Maximum number of feature-subgroup pairs in memory at once."""


@dataclasses.dataclass(frozen=True, eq=False)
class SelectedStabilizers:
    """Stabilizer of each feature, with the test that it is larger than {e}."""

    subgroup: Int[np.ndarray, " feature"]
    """Index of the stabilizer in `Group.subgroups()`."""
    p_values: Float[np.ndarray, " feature"]
    """p-values of the null hypothesis that no element but e leaves the feature unchanged."""
    q_values: Float[np.ndarray, " feature"]
    """Smallest false discovery rates at which the stabilizer is larger than {e}."""
    conclusive: Bool[np.ndarray, " feature"]
    """Mask of features that can be reproduced and whose data rule out every larger stabilizer."""


def select_stabilizers(evidence: ShiftEvidence, group: Group, fdr: float) -> SelectedStabilizers:
    """Select the largest subgroup of each feature that has support and is not refuted.

    Args:
        evidence: Tests of every feature and element.
        group: Group whose subgroups are compared.
        fdr: False discovery rate of the claim that a stabilizer is larger than {e}.
    """
    n, order = evidence.p_support.shape
    masks = element_masks(group.subgroups(), order)
    others = max(order - 1, 1)
    refuted = evidence.p_unequal <= fdr / others
    support = np.where(refuted, 1.0, evidence.p_support)
    refuted[:, group.identity], support[:, group.identity] = False, 0.0
    p = np.minimum(1.0, others * _smallest_of_prime_order(support, masks))
    q = q_values(p)
    discovered = q <= fdr
    level = fdr * max(int(discovered.sum()), 1) / max(n, 1) / others
    supported = (support <= level) & discovered[:, None]
    supported[:, group.identity] = True
    weight = np.where(np.isfinite(evidence.similarity), evidence.similarity, 0) + 2
    n_inside = _contained(masks, masks).sum(axis=1)  # subgroups inside each, itself included
    selected = np.zeros(n, int)
    conclusive = np.zeros(n, bool)
    step = max(1, _CELLS // len(masks))
    for i in range(0, n, step):
        part = slice(i, i + step)
        fits = _contained(supported[part], masks)
        # Larger subgroups first; among equally large ones the most similar.
        score = masks.sum(axis=1) * 4 + weight[part] @ masks.T / masks.sum(axis=1)
        selected[part] = np.where(fits, score, -np.inf).argmax(axis=1)
        n_possible = _contained(~refuted[part], masks).sum(axis=1)
        conclusive[part] = n_possible == n_inside[selected[part]]
    reproduced = q_values(evidence.p_signal) <= fdr
    return SelectedStabilizers(selected, p, q, conclusive & reproduced)


def element_masks(
    subgroups: Sequence[frozenset[int]], order: int
) -> Bool[np.ndarray, "subgroup element"]:
    """Mark the elements of each subgroup of a group of some order."""
    masks = np.zeros((len(subgroups), order), bool)
    for mask, subgroup in zip(masks, subgroups, strict=True):
        mask[list(subgroup)] = True
    return masks


def _contained(
    elements: Bool[np.ndarray, "feature element"], masks: Bool[np.ndarray, "subgroup element"]
) -> Bool[np.ndarray, "feature subgroup"]:
    """Mark the subgroups that lie inside each set of elements."""
    return (~elements).astype(np.float32) @ masks.T.astype(np.float32) == 0


def _smallest_of_prime_order(
    p: Float[np.ndarray, "feature element"], masks: Bool[np.ndarray, "subgroup element"]
) -> Float[np.ndarray, " feature"]:
    """Find the smallest intersection-union p-value among subgroups of prime order."""
    smallest = np.ones(len(p))
    for mask in masks:
        size = int(mask.sum())
        if size > 1 and all(size % k for k in range(2, size)):
            smallest = np.minimum(smallest, p[:, mask].max(axis=1))
    return smallest
