"""Frequencies of stabilizer classes, compared with those of a control network.

    compare_with_control    classes of two sets of features -> shares, their differences, tests

A symmetry that a network with random weights has too (blurs and colors look the same in every
pose) says nothing about learning. The control is a dictionary of the same site of the network with
randomly re-initialized weights, trained and classified in the same way. Only features that
are shown to have a symmetry, or none, count. Features are treated as independent,
which the features of one dictionary are not quite: do not believe a difference that a second seed
does not confirm.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mechatlas.analysis.symmetry.class_names import NOT_SHOWN
from mechatlas.maths.statistics import difference, q_values

ANY = "any symmetry"
"""Name of the union of all classes but that of {e}."""


@dataclasses.dataclass(frozen=True)
class ClassComparison:
    """Share of one stabilizer class among the features of a dictionary and of a control."""

    name: str
    """Name of the class."""
    n: int
    """Number of features of the class."""
    n_control: int
    """Number of features of the class in the control."""
    share: float
    """Share of the features that are shown to have a symmetry, or none."""
    share_control: float
    """Share of such features of the control."""
    difference: float | None
    """Difference of the two shares; None if one side has no such features."""
    low: float
    """Lower end of the 95 % interval of the difference (Newcombe)."""
    high: float
    """Upper end of the interval."""
    p_value: float
    """p-value of equal shares: twice the smaller one-sided p-value of Fisher's exact test."""
    q_value: float
    """Smallest false discovery rate at which the shares differ, over all classes compared."""


def compare_with_control(
    names: Sequence[str], control: Sequence[str], classes: Sequence[str]
) -> list[ClassComparison]:
    """Compare the shares of each class among the features with a known one with those of a control.

    Args:
        names: Label of each feature, `NOT_SHOWN` where its class is not known.
        control: Label of each feature of the control.
        classes: All labels but `NOT_SHOWN`, that of {e} first; labels without features are left
            out.

    Returns:
        The comparison of `ANY` first, if there are several classes, then one for each class.
    """
    own, other = (np.array([n for n in each if n != NOT_SHOWN]) for each in (names, control))
    members = {ANY: list(classes[1:])} if len(classes) > 1 else {}
    members |= {name: [name] for name in classes}
    counts = {
        name: (int(np.isin(own, included).sum()), int(np.isin(other, included).sum()))
        for name, included in members.items()
    }
    compared = [name for name, pair in counts.items() if any(pair) or name == ANY]
    differences = [
        difference((counts[name][0], len(own)), (counts[name][1], len(other))) for name in compared
    ]
    q = q_values(np.array([each.p_value for each in differences]))
    return [
        ClassComparison(
            name=name,
            n=counts[name][0],
            n_control=counts[name][1],
            share=counts[name][0] / max(len(own), 1),
            share_control=counts[name][1] / max(len(other), 1),
            difference=None if np.isnan(each.value) else each.value,
            low=each.low,
            high=each.high,
            p_value=each.p_value,
            q_value=float(value),
        )
        for name, each, value in zip(compared, differences, q, strict=True)
    ]
