"""Classes of stabilizers beside those of a control."""

import numpy as np

from mechatlas.analysis.symmetry.class_names import NOT_SHOWN
from mechatlas.analysis.symmetry.control_comparison import ANY, compare_with_control

CLASSES = ("none", "half-turn", "mirror", "invariant")


def test_shares_are_those_of_reliable_features_and_classes_of_neither_are_left_out():
    own = ["none"] * 60 + ["mirror"] * 20 + [NOT_SHOWN] * 20
    control = ["none"] * 30 + ["mirror"] * 5 + ["invariant"] * 5 + [NOT_SHOWN] * 60
    comparisons = {each.name: each for each in compare_with_control(own, control, CLASSES)}
    assert list(comparisons) == [ANY, "none", "mirror", "invariant"]
    assert (comparisons[ANY].share, comparisons[ANY].share_control) == (0.25, 0.25)
    assert comparisons[ANY].difference == 0
    assert comparisons[ANY].p_value == 1
    assert (comparisons["invariant"].n, comparisons["invariant"].n_control) == (0, 5)
    assert comparisons["invariant"].difference == -1 / 8
    assert comparisons["invariant"].high < 0
    assert all(each.low <= (each.difference or 0) <= each.high for each in comparisons.values())
    assert all(each.q_value >= each.p_value for each in comparisons.values())


def test_classes_drawn_alike_seldom_differ():
    random = np.random.default_rng(0)
    n_different = 0
    for _ in range(200):
        own, control = (random.choice(CLASSES, n, p=[0.8, 0.05, 0.1, 0.05]) for n in (400, 150))
        n_different += any(
            each.q_value <= 0.05 for each in compare_with_control(list(own), list(control), CLASSES)
        )
    assert n_different <= 20  # a rate of 5 % for all classes of a run together


def test_without_reliable_features_nothing_is_told():
    comparisons = compare_with_control([NOT_SHOWN] * 3, ["none"], CLASSES)
    assert [each.name for each in comparisons] == [ANY, "none"]
    assert [each.difference for each in comparisons] == [None, None]
    assert [(each.low, each.high, each.q_value) for each in comparisons] == [(-1, 1, 1)] * 2
