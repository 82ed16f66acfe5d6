"""Stabilizer of each feature, selected from the evidence for single group elements.

    select_stabilizers    evidence -> one subgroup for each feature, with its q-value

A subgroup is claimed if every one of its elements has support and none is certainly unequal. All
subgroups of the group are compared, not one of each conjugacy class, so the answer is closed under
products by construction. It is conclusive if every subgroup that is not contained in it has an
element that is certainly unequal.

Real features are seldom exactly symmetric. The approximate stabilizer is the largest subgroup whose
elements all have support, certainly unequal or not. A feature is asymmetric, which is more than
that no symmetry was shown, if every subgroup has an element that certainly lacks support.

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
from typing import NamedTuple

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
    approximate: Int[np.ndarray, " feature"]
    """Index of the approximate stabilizer in `Group.subgroups()`."""
    approximate_q_values: Float[np.ndarray, " feature"]
    """Smallest false discovery rates at which the approximate stabilizer is larger than {e}."""
    asymmetric: Bool[np.ndarray, " feature"]
    """Mask of features that can be reproduced and have not even an approximate symmetry."""


def select_stabilizers(evidence: ShiftEvidence, group: Group, fdr: float) -> SelectedStabilizers:
    """Select the largest subgroup of each feature that has support and is not refuted.

    Args:
        evidence: Tests of every feature and element.
        group: Group whose subgroups are compared.
        fdr: False discovery rate of the claim that a stabilizer is larger than {e}.
    """
    order = evidence.p_support.shape[1]
    masks = element_masks(group.subgroups(), order)
    others = max(order - 1, 1)
    refuted = evidence.p_unequal <= fdr / others
    refuted[:, group.identity] = False
    exact = _Claims.select(evidence, np.where(refuted, 1.0, evidence.p_support), masks, group, fdr)
    similar = _Claims.select(evidence, evidence.p_support, masks, group, fdr)
    unlike = 1 - evidence.p_support <= fdr / others  # the test against the opposite
    unlike[:, group.identity] = False
    n_inside = _contained(masks, masks).sum(axis=1)  # subgroups inside each, itself included
    n_possible, n_similar = (
        np.concatenate([_contained(~part, masks).sum(axis=1) for part in _parts(x, len(masks))])
        for x in (refuted, unlike)
    )
    reproduced = q_values(evidence.p_signal) <= fdr
    return SelectedStabilizers(
        exact.subgroup, exact.p_values, exact.q_values,
        conclusive=(n_possible == n_inside[exact.subgroup]) & reproduced,
        approximate=similar.subgroup,
        approximate_q_values=similar.q_values,
        asymmetric=(n_similar == 1) & reproduced,
    )  # fmt: skip


class _Claims(NamedTuple):
    """Largest subgroup of each feature whose elements all have support."""

    subgroup: Int[np.ndarray, " feature"]
    p_values: Float[np.ndarray, " feature"]
    q_values: Float[np.ndarray, " feature"]

    @classmethod
    def select(
        cls,
        evidence: ShiftEvidence,
        support: Float[np.ndarray, "feature element"],
        masks: Bool[np.ndarray, "subgroup element"],
        group: Group,
        fdr: float,
    ) -> "_Claims":
        """Select subgroups at a false discovery rate.

        Args:
            evidence: Tests of every feature and element.
            support: p-values of the null hypothesis that an element has no support.
            masks: Elements of each subgroup.
            group: Group whose subgroups are compared.
            fdr: False discovery rate of subgroups larger than {e}.
        """
        n, others = len(support), max(group.order - 1, 1)
        support = support.copy()
        support[:, group.identity] = 0.0
        p = np.minimum(1.0, others * _smallest_of_prime_order(support, masks))
        q = q_values(p)
        discovered = q <= fdr
        level = fdr * max(int(discovered.sum()), 1) / max(n, 1) / others
        supported = (support <= level) & discovered[:, None]
        supported[:, group.identity] = True
        weight = np.where(np.isfinite(evidence.similarity), evidence.similarity, 0) + 2
        selected = []
        for part, own in zip(
            _parts(supported, len(masks)), _parts(weight, len(masks)), strict=True
        ):
            # Larger subgroups first; among equally large ones the most similar.
            score = masks.sum(axis=1) * 4 + own @ masks.T / masks.sum(axis=1)
            selected.append(np.where(_contained(part, masks), score, -np.inf).argmax(axis=1))
        return cls(np.concatenate(selected), p, q)


def _parts(x: np.ndarray, n_subgroups: int) -> list[np.ndarray]:
    """Split features so that a part times all subgroups fits in memory."""
    step = max(1, _CELLS // n_subgroups)
    return [x[i : i + step] for i in range(0, max(len(x), 1), step)]


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
