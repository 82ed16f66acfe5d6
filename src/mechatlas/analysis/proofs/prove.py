"""Bounds on the accuracy of group-operation networks, from their weights, with proofs.

    prove           weights, table -> AccuracyBound
    AccuracyBound   the bound, its proof, and what it cost
    exact_accuracy  the bound first where that saves time, then brute force for the other pairs

Main path: `explain` looks for structure, `verify` turns it into a bound that holds whatever
was found. Explanations of two degrees of detail are tried; the cheaper one that suffices wins, and
pairs that it leaves are tried outright within the budget.
"""

import dataclasses
import time
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mechatlas.analysis.proofs.explain import NeuronDirections, explain, find_directions
from mechatlas.analysis.proofs.verifier.exact import decide_exactly
from mechatlas.analysis.proofs.verifier.explanation import Explanation
from mechatlas.analysis.proofs.verifier.proof import AccuracyProof, as_weights, checksum_weights
from mechatlas.analysis.proofs.verifier.structures import Weights
from mechatlas.analysis.proofs.verifier.verify import Verification, verify
from mechatlas.base import InputError, Result
from mechatlas.deprecated import renamed_arguments, renamed_attributes
from mechatlas.maths.arrays import as_array
from mechatlas.maths.groups import Group

GAIN = 0.001
"""Least gain of the bound that justifies more multiply-adds."""
DETAILS = (0, 1)
"""Degrees of detail. 0: the unembedding of each neuron within its own irrep; 1: in a second irrep
as well."""
COMPUTE_BUDGET = 0.6
"""Multiply-adds that the later stages may use by default, as a share of those of brute force."""


@renamed_attributes
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AccuracyBound(Result):
    """Lower bound on the accuracy of a network over all pairs, with its proof."""

    proof: AccuracyProof
    """Everything that a verifier needs: it can be saved, and checked by anyone."""
    verification: Verification
    """Bound on the margin of every pair."""
    group: Group
    """Group of the table."""
    weights: Weights
    """Weights of the network."""
    directions: NeuronDirections
    """Irrep and vectors of each neuron, for people; the proof does not use them."""
    seconds_prove: float
    """Process CPU seconds of looking for the explanation, trials included."""
    seconds_verify: float
    """Process CPU seconds of one verification."""

    @property
    def accuracy_bound(self) -> float:
        """Least share of all pairs that the float32 network gets right."""
        return self.verification.accuracy_bound

    def summary(self) -> str:
        """Bound with its evidence: shares by stage, terms and cost."""
        budget = self.verification.logit_budget
        losses = -sum(v for k, v in dataclasses.asdict(budget).items() if k != "ideal_margin")
        brute_force = self.group.order**3 * len(self.proof.explanation.dead)
        return (
            f"{self.verification.summary()}\n"
            f"Ideal margin {budget.ideal_margin:.1f} logits, losses {losses:.1f}, of a typical "
            "pair in the first stage\n"
            f"Cost: {self.verification.multiply_adds / brute_force:.1%} of the multiply-adds of "
            "brute force"
        )


@renamed_arguments
def prove(
    left: ArrayLike,
    right: ArrayLike,
    unembed: ArrayLike,
    table: ArrayLike | Group,
    *,
    compute_budget: float = COMPUTE_BUDGET,
) -> AccuracyBound:
    """Bound the accuracy of logits = relu(left[x] + right[y]) @ unembed on a group's table.

    Args:
        left: Array (order, m): numpy, torch or lists.
        right: Array (order, m).
        unembed: Array (m, order).
        table: `table[x, y]` is the right answer for x, y; or the group.
        compute_budget: Multiply-adds that the second and third stage may use together, as a share
            of those of brute force. They take only pairs that the first stage left.

    Raises:
        InputError: Shapes do not fit.
        NonFiniteError: A weight is NaN or infinite; it is named.
        GroupError: The table is not that of a group; the axiom and the place are named.

    Examples:
        A network that adds modulo 3, written by hand:

        >>> import mechatlas as ma, numpy as np
        >>> angle = 2 * np.pi / 3 * np.arange(3)
        >>> phase = 2 * np.pi / 9 * np.arange(9)
        >>> left, right = (np.float32(np.cos(angle[:, None] + phase)) for _ in "lr")
        >>> unembed = np.float32(np.cos(2 * phase[:, None] + angle))
        >>> bound = ma.prove(left, right, unembed, ma.group("C3"))
        >>> bound.accuracy_bound
        1.0

    Source:
        Wu, Jaburi, Drori and Gross, Towards a unified and verified understanding of
        group-operation networks (ICLR 2025).
    """
    clock = time.process_time()
    group = table if isinstance(table, Group) else Group(as_array(table, "order order", "table"))
    weights = as_weights(left, right, unembed, group.order)
    tried = []
    for detail in DETAILS:
        explanation = _with_budget(explain(*weights, group, detail=detail), compute_budget)
        tried.append((verify(*weights, group, explanation), explanation))
    most = max(verification.accuracy_bound for verification, _ in tried)
    enough = [pair for pair in tried if pair[0].accuracy_bound >= most - GAIN]
    verification, explanation = min(enough, key=lambda pair: pair[0].multiply_adds)
    explanation = _with_remaining_budget(explanation, verification, weights, compute_budget)
    return _bound(weights, group, explanation, clock)


def bound_again(
    proof: AccuracyProof,
    left: ArrayLike,
    right: ArrayLike,
    unembed: ArrayLike,
    group: Group,
    *,
    seconds_prove: float = 0.0,
) -> AccuracyBound:
    """Rebuild the bound of a proof, without looking for its explanation again.

    Args:
        proof: The proof.
        left: Array (order, m).
        right: Array (order, m).
        unembed: Array (m, order).
        group: Group of the table.
        seconds_prove: Process CPU seconds that looking for the explanation took.

    Raises:
        ProofError: The explanation is not well formed, or about another network.
    """
    weights = as_weights(left, right, unembed, group.order)
    clock = time.process_time() - seconds_prove
    return _bound(weights, group, proof.explanation, clock)


def _bound(weights: Weights, group: Group, explanation: Explanation, clock: float) -> AccuracyBound:
    """Verify an explanation and put its proof together."""
    directions = find_directions(*weights, group.irreps())
    middle = time.process_time()
    verification = verify(*weights, group, explanation)
    end = time.process_time()
    brute_force = group.order**3 * weights.left.shape[1]
    proof = AccuracyProof(
        explanation=explanation,
        table=np.asarray(group.table),
        weights_checksum=checksum_weights(weights),
        accuracy_bound=verification.accuracy_bound,
        saves_time=_saves_time(verification, explanation, brute_force),
    )
    seconds = middle - clock, end - middle
    return AccuracyBound(proof, verification, group, weights, directions, *seconds)


def _saves_time(verification: Verification, explanation: Explanation, brute_force: int) -> bool:
    """Whether verifying before brute force is likely to be faster than brute force alone.

    Measured over many networks, verification takes as long as brute force in float32 with
    this many multiply-adds: 1.8 for each of its own, eight for each logit of a pair in the
    second stage, 15,000 for each x and circuit, and twenty million that depend on nothing.
    """
    n = len(explanation.additive_x)
    logits, products = n * int((verification.stages > 1).sum()), n * len(explanation.circuits)
    work = 1.8 * verification.multiply_adds + 8 * logits + 1.5e4 * products + 2e7
    return work < 0.85 * verification.accuracy_bound * brute_force


def _with_budget(explanation: Explanation, compute_budget: float) -> Explanation:
    """Divide the budget between the second and the third stage."""
    if not 0 <= compute_budget <= 1:
        raise InputError(f"compute_budget must be from 0 to 1, got {compute_budget}.")
    third = min(0.01, compute_budget / 4)
    return dataclasses.replace(
        explanation, second_stage_budget=compute_budget - third, third_stage_budget=third
    )


def _with_remaining_budget(
    explanation: Explanation, verification: Verification, weights: Weights, compute_budget: float
) -> Explanation:
    """Give the third stage the multiply-adds that the others left.

    It gets no more pairs than they certified, so that a bound never rests mainly on brute force.
    """
    certified = verification.margins > verification.float32_errors
    explained = float((certified & (verification.stages < 3)).mean())
    if certified.all() or explained < GAIN:
        return explanation
    share = verification.multiply_adds / (certified.size * weights.unembed.size)
    third = explanation.third_stage_budget + compute_budget - share
    third = max(explanation.third_stage_budget, min(third, explained))
    return dataclasses.replace(explanation, third_stage_budget=third)


class ExactAccuracy(NamedTuple):
    """Accuracy in exact arithmetic, and its cost."""

    accuracy: float
    """Share of pairs whose right answer has the largest logit, alone."""
    seconds: float
    """Process CPU seconds."""


def exact_accuracy(
    bound: AccuracyBound, left: ArrayLike, right: ArrayLike, unembed: ArrayLike
) -> ExactAccuracy:
    """Count right answers in exact arithmetic: by the proof where that saves time, then outright.

    Args:
        bound: Result of `prove` for the same weights.
        left: Array (order, m).
        right: Array (order, m).
        unembed: Array (m, order).
    """
    table, group = bound.proof.table, bound.group
    weights = as_weights(left, right, unembed, group.order)
    clock = time.process_time()
    if bound.proof.saves_time:
        certified = verify(*weights, group, bound.proof.explanation).margins > 0
        is_right = certified | decide_exactly(weights, table, ~certified)
    else:
        is_right = decide_exactly(weights, table, np.ones(table.shape, bool))
    return ExactAccuracy(float(is_right.mean()), time.process_time() - clock)
