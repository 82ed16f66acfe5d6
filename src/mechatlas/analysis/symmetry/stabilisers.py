"""From evidence for single elements to the subgroup that leaves a feature unchanged.

    choose    evidence -> one subgroup for each feature, a q-value, and whether it is settled

A subgroup is claimed if every one of its elements has support and none is certainly unlike; all
subgroups of the group are compared, not one of each class, so the answer is closed under products
by construction. It is settled if no other subgroup is left open: any that is not contained in it
has an element that is certainly unlike.

The p-value of "larger than {e}" is that of the best subgroup of prime order, whose own is that of
its worst element (intersection-union), times the number of elements to choose from (Bonferroni).
Larger subgroups of features that stand are then sought at the level at which these were selected.

Source: Berger, Multiparameter hypothesis testing and acceptance sampling (1982), for
intersection-union tests; Benjamini and Bogomolov, Selective inference on multiple families of
hypotheses (2014), for levels inside selected families.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from mechatlas.analysis.symmetry.evidence import Evidence
from mechatlas.maths.groups import Group
from mechatlas.maths.statistics import q_values

_CELLS = 1 << 26
"""Entries of a table of features and subgroups that are held at once."""


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """One subgroup for each feature."""

    subgroup: Int[np.ndarray, " feature"]
    """Number of it in `Group.subgroups()`."""
    p_values: Float[np.ndarray, " feature"]
    """Of the null hypothesis that no element but e leaves the feature unchanged."""
    q_values: Float[np.ndarray, " feature"]
    settled: Bool[np.ndarray, " feature"]
    """The feature can be reproduced, and no subgroup is left open but those inside this one."""


def choose(evidence: Evidence, group: Group, rate: float) -> Choice:
    """The largest subgroup that has support and is not refuted."""
    n, order = evidence.p_support.shape
    masks = _masks(group)
    others = max(order - 1, 1)
    refuted = evidence.p_unlike <= rate / others
    support = np.where(refuted, 1.0, evidence.p_support)
    refuted[:, group.identity], support[:, group.identity] = False, 0.0
    p = np.minimum(1.0, others * _best_of_prime_order(support, masks))
    q = q_values(p)
    stands = q <= rate
    level = rate * max(int(stands.sum()), 1) / max(n, 1) / others
    supported = (support <= level) & stands[:, None]
    supported[:, group.identity] = True
    weight = np.where(np.isfinite(evidence.likeness), evidence.likeness, 0) + 2
    inside_of = _contained(masks, masks).sum(axis=1)  # subgroups inside each, itself included
    chosen = np.zeros(n, int)
    settled = np.zeros(n, bool)
    step = max(1, _CELLS // len(masks))
    for i in range(0, n, step):
        part = slice(i, i + step)
        fits = _contained(supported[part], masks)
        # Larger first; of equally large ones that which is more alike.
        score = masks.sum(axis=1) * 4 + weight[part] @ masks.T / masks.sum(axis=1)
        chosen[part] = np.where(fits, score, -np.inf).argmax(axis=1)
        left_open = _contained(~refuted[part], masks).sum(axis=1)
        settled[part] = left_open == inside_of[chosen[part]]
    reproduced = q_values(evidence.p_signal) <= rate
    return Choice(chosen, p, q, settled & reproduced)


def _masks(group: Group) -> Bool[np.ndarray, "subgroup element"]:
    subgroups = group.subgroups()
    masks = np.zeros((len(subgroups), group.order), bool)
    for mask, subgroup in zip(masks, subgroups, strict=True):
        mask[list(subgroup)] = True
    return masks


def _contained(
    elements: Bool[np.ndarray, "feature element"], masks: Bool[np.ndarray, "subgroup element"]
) -> Bool[np.ndarray, "feature subgroup"]:
    """Which subgroups lie inside each set of elements."""
    return (~elements).astype(np.float32) @ masks.T.astype(np.float32) == 0


def _best_of_prime_order(
    p: Float[np.ndarray, "feature element"], masks: Bool[np.ndarray, "subgroup element"]
) -> Float[np.ndarray, " feature"]:
    best = np.ones(len(p))
    for mask in masks:
        size = int(mask.sum())
        if size > 1 and all(size % k for k in range(2, size)):
            best = np.minimum(best, p[:, mask].max(axis=1))
    return best
