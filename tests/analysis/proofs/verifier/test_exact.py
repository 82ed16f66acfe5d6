"""Exact accuracy against its definition."""

import numpy as np
import pytest

from mechatlas.analysis.proofs.prove import exact_accuracy, prove
from mechatlas.analysis.proofs.verifier.exact import decide_exactly
from mechatlas.analysis.proofs.verifier.structures import Weights
from mechatlas.maths.named_groups import group

from ..planted import proved, true_margins


def test_a_tie_is_not_counted_as_right():
    of = group("C3")
    left, right = np.ones((2, 3, 4), np.float32)
    bound = prove(left, right, np.ones((4, 3), np.float32), of)
    assert bound.accuracy_bound == bound.verification.accuracy_bound_real == 0
    assert exact_accuracy(bound, left, right, np.ones((4, 3), np.float32)).accuracy == 0


@pytest.mark.parametrize("net", [("S4", 0.02, 1), ("S4", 0.3, 5), ("D5", 0.5, 6)])
def test_the_exact_accuracy_is_exact(net):
    of, weights, bound = proved(*net)
    accuracy, _ = exact_accuracy(bound, *weights)
    assert accuracy == (true_margins(weights, of.table) > 0).mean()


def test_ties_and_near_ties_are_decided_exactly():
    of = group("C2")
    one = np.float32(1)
    left, right = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)
    tiny = np.float32(2.0**-60)
    unembed = np.array([[1, 1], [tiny, 0], [-one, -one]], np.float32)
    right_answers = decide_exactly(Weights(left, right, unembed), of.table, np.ones((2, 2), bool))
    assert right_answers.tolist() == [[True, False], [False, True]]
    unembed[1] = 0
    assert not decide_exactly(Weights(left, right, unembed), of.table, np.ones((2, 2), bool)).any()
