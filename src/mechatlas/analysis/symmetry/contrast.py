"""Is a class of stabilisers more, or less, frequent than in a control?

    contrast    classes of the features of two dictionaries -> shares, their difference, a test

Symmetry that a network has with random weights too (blurs and colours look the same in every pose)
is no sign of what it has learnt. The control is a dictionary of the same site with weights drawn
anew, trained and classified alike. Only reliable features count: of the others it is not known
what leaves them unchanged. Features are taken as independent draws, which those of one dictionary
are not quite: what a second seed does not confirm should not be believed.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mechatlas.analysis.symmetry.names import NOT_RELIABLE
from mechatlas.maths.statistics import difference, q_values

ANY = "any symmetry"
"""All classes but that of {e} together."""


@dataclasses.dataclass(frozen=True)
class Contrast:
    """One class of stabilisers in two dictionaries."""

    name: str
    n: int
    n_control: int
    share: float
    """Of the reliable features."""
    share_control: float
    difference: float | None
    """None if one of them has no reliable features."""
    low: float
    """End of the 95 % interval of the difference (Newcombe)."""
    high: float
    p_value: float
    """That the shares are equal: twice the smaller one of Fisher's exact test."""
    q_value: float
    """All classes are one family of tests."""


def contrast(
    names: Sequence[str], control: Sequence[str], classes: Sequence[str]
) -> list[Contrast]:
    """Shares of each class among the reliable features of a dictionary and of a control.

    Args:
        names: Class of each feature, or that it is not reliable.
        control: The same of the control.
        classes: Names of the classes, that of {e} first. Those that neither has are left out.

    Returns:
        `ANY` first, if there are several classes, then the classes.
    """
    own, other = (np.array([n for n in each if n != NOT_RELIABLE]) for each in (names, control))
    wanted = {ANY: list(classes[1:])} if len(classes) > 1 else {}
    wanted |= {name: [name] for name in classes}
    counts = {
        name: (int(np.isin(own, its).sum()), int(np.isin(other, its).sum()))
        for name, its in wanted.items()
    }
    kept = [name for name, pair in counts.items() if any(pair) or name == ANY]
    found = [difference((counts[n][0], len(own)), (counts[n][1], len(other))) for n in kept]
    q = q_values(np.array([each.p_value for each in found]))
    return [
        Contrast(
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
        for name, each, value in zip(kept, found, q, strict=True)
    ]
