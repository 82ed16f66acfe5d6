"""Verification: a lower bound on accuracy that holds whatever the explanation says.

    verify        weights, group, explanation -> Verification
    Verification  a lower bound on the margin of every pair, and its terms

With u_i(z) = <M_i, rho(z)> + e_i(z) and relu(l_i + r_i) = A_i(x) + B_i(y) + I_i(x, y), where
I_i = s_i T + D_i, the margin of z* = xy over z = x g y is the sum of

    additive           sum of (u_i(z*) - u_i(z)) (A_i(x) + B_i(y)), exact: two products of matrices
    ideal_margin       gamma(g) = <Vm, 1 - rho(g)>, the same for all x and y
    non_equivariance   <V(x, y) - rho(x) Vm rho(y), rho(z*) - rho(z)>, where V is the sum of I_i M_i
    unembedding_noise  sum of (e_i(z*) - e_i(z)) s_i T(x^-1 p, y p')
    residual           sum of (e_i(z*) - e_i(z)) D_i(x, y)

The last three are bounded by Cauchy-Schwarz: within an irrep, among the cells of a grid
(with row and column means taken out, which T does not have), among neurons. For the conjugacy
classes of g where that is not enough, ideal_margin and non_equivariance are computed together, as
<rho(x)^T V rho(y)^T, 1 - rho(g)> for each g of the class. The second stage takes V exactly for all
z, and the additive part as well; the third computes all logits of a few pairs.
A, B, M, T, s and Vm are claims of the explanation: any values give a true statement.

Before that, neurons are merged that are about multiples of one another: with l_i = c l_j + dl
and r_i = c r_j + dr, relu(l_i + r_i) is within |dl| + |dr| of relu(c (l_j + r_j)), which is
c relu(l_j + r_j), or that of -c less -c (l_j + r_j) where c < 0. The most that this may cost is a
part of x and a part of y, and so is the most that dead neurons could do.

Rounding. Every error of float32 and float64 is bounded a priori in the usual model,
fl(a op b) = (a op b)(1 + d) with |d| <= u: by k u / (1 - k u) for k operations in a row times
the sum of the absolute values of the terms, which `Terms.first.slack` bounds for every pair.

All letters and shapes: `mechatlas.analysis.proofs.verifier`.

Source: Wu et al. (ICLR 2025) for the idea; Higham, Accuracy and Stability of Numerical
Algorithms (2002), section 3.1, for rounding.
"""

import dataclasses
import functools
from types import ModuleType

import numpy as np
from jaxtyping import Float, Float32, Int

from mechatlas.analysis.proofs.verifier import checks
from mechatlas.analysis.proofs.verifier.explanation import PAIRS, Explanation, ProofError
from mechatlas.analysis.proofs.verifier.reference import measure_pairs
from mechatlas.analysis.proofs.verifier.structures import PairBounds, PairCounts, PairSum, Weights
from mechatlas.analysis.proofs.verifier.terms import Terms, build_terms
from mechatlas.base import Result
from mechatlas.deprecated import renamed_attributes
from mechatlas.maths.groups import Group


@dataclasses.dataclass(frozen=True)
class LogitBudget:
    """Median of each term of the bound of the first stage, in logits. Losses are negative."""

    ideal_margin: float
    """Margin of an ideal circuit."""
    additive: float
    """Parts of neurons that depend on x or y alone."""
    non_equivariance: float
    """Deviation of V from its mean matrix, in the frame of x and y."""
    unembedding_noise: float
    """Residual of the unembedding within the cells of grids."""
    residual: float
    """Residual of the unembedding against neurons that fit no grid, or only roughly."""
    rounding: float
    """Rounding, dead neurons and imperfect clusters."""


@renamed_attributes
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Verification(Result):
    """Bounds on the margins of all pairs x, y, proved."""

    margins: Float[np.ndarray, "order order"]
    """Lower bound on the margin in exact arithmetic on the stored weights."""
    float32_error_parts: PairSum
    """`float32_errors` as a part of x and a part of y."""
    stages: Int[np.ndarray, "order order"]
    """Stage that gave the bound of the pair: 1, 2 or 3."""
    multiply_adds: int
    """Multiply-adds of this verification."""
    terms: Terms
    """Terms that do not depend on the pair."""
    answers: Int[np.ndarray, " order"]
    """Right answers for the first x."""

    @property
    def logit_budget(self) -> LogitBudget:
        """Median of each term of the bound of the first stage over the pairs of the first x.

        Each at the class of elements where the pair is weakest.
        """
        t, z = self.terms, self.answers
        residuals, _, deviations = measure_pairs(
            np.zeros(1, np.int64), t.neurons, t.lookup, t.circuits
        )
        gaps, norms, *_ = t.first.bins
        losses, all_pulls = t.first.losses, norms @ deviations.astype(np.float64)
        worst = (gaps[:, None] - all_pulls).argmin(axis=0)
        pull = np.take_along_axis(all_pulls, worst[None], 0)[0]
        residual = (residuals.astype(np.float64) * t.first.residual[:, z]).sum(axis=0)
        cells = losses.cells[z]
        additive = losses.x[0, z] + losses.y[np.arange(len(z)), z] - cells
        slack = t.first.slack.x[0] + t.first.slack.y
        values = (gaps[worst], -additive, -pull, -cells, -residual, -slack)
        return LogitBudget(*(float(np.median(v)) for v in values))

    @functools.cached_property
    def float32_errors(self) -> Float[np.ndarray, "order order"]:
        """Upper bound on how much less the margin can be in float32, in any order of sums."""
        return self.float32_error_parts.x[:, None] + self.float32_error_parts.y

    @property
    def accuracy_bound(self) -> float:
        """Share of pairs that the float32 network certainly gets right."""
        return float((self.margins > self.float32_errors).mean())

    @property
    def accuracy_bound_real(self) -> float:
        """Share of pairs certainly right in exact arithmetic on the stored weights."""
        return float((self.margins > 0).mean())

    @property
    def stages_in_words(self) -> str:
        """Share of all pairs that each stage certified."""
        certified = self.margins > self.float32_errors
        names = ("equivariant circuits", "low rank", "outright")
        shares = ((certified & (self.stages == k)).mean() for k in (1, 2, 3))
        return ", ".join(f"{name} {s:.2%}" for name, s in zip(names, shares, strict=True))

    def summary(self) -> str:
        """Bound, and the share of each stage."""
        return (
            f"Accuracy: at least {self.accuracy_bound:.4%} over "
            f"{self.margins.size:,} pairs (float32, any order of sums)\n"
            f"In exact arithmetic: at least {self.accuracy_bound_real:.4%}\n"
            f"Certified by {self.stages_in_words}"
        )


def verify(
    left: Float32[np.ndarray, "order width"],
    right: Float32[np.ndarray, "order width"],
    unembed: Float32[np.ndarray, "width order"],
    group: Group,
    explanation: Explanation,
    *,
    reference: bool = False,
) -> Verification:
    """Bound the margin of every pair from below.

    Args:
        left: l_i(x), finite.
        right: r_i(y), finite.
        unembed: u_i(z), finite.
        group: The group; right answers are the entries of its table.
        explanation: Claims of a prover, who need not be trusted.
        reference: Run the loops of `reference`, in numpy, instead of the compiled ones.

    Raises:
        ProofError: The explanation is not even well formed.
    """
    weights, loops = Weights(left, right, unembed), checks.choose_loops(reference=reference)
    table, n = group.table, group.order
    packed, irreps, actions = checks.check(len(unembed), group, explanation)
    t = build_terms(weights, packed, irreps, actions, loops)
    brute_force = n * n * n * len(unembed)
    out = PairBounds(
        margins=np.empty((n, n)),
        stages=np.ones((n, n), np.int8),
    )
    few = int(explanation.second_stage_budget * brute_force / t.second_cost)
    second = t.second._replace(max_pairs=few)
    counts: PairCounts = loops.bound_pairs(
        table, t.neurons, t.lookup, t.circuits, t.first, second, out
    )
    used = t.prepared + n * counts.tried * t.first_cost + counts.framed * t.frame_cost
    used += counts.compared * len(t.circuits.rho) + counts.second_stage * t.second_cost
    few = int(explanation.third_stage_budget * brute_force / t.third_cost)
    if few and counts.uncertified:
        used += t.third_cost * _bound_outright(t, table, few, out, loops)
    if not np.isfinite(out.margins.sum()):
        raise ProofError("The bound is not a number: the explanation has absurd sizes.")
    return Verification(out.margins, t.first.float32_error, out.stages, used, t, table[0])


def _bound_outright(
    t: Terms, table: Int[np.ndarray, "order order"], few: int, out: PairBounds, loops: ModuleType
) -> int:
    """Compute all logits of a few of the pairs that are left, and return how many."""
    error, margins = t.first.float32_error, out.margins
    x, y = (i[:few] for i in np.nonzero(margins <= error.x[:, None] + error.y))
    left, right, unembed = t.weights
    hidden = np.empty((min(PAIRS, len(x)), len(unembed)), np.float32)
    for start in range(0, len(x), PAIRS):
        some = x[start : start + PAIRS], y[start : start + PAIRS]
        z, pairs = table[some], np.arange(len(some[0]))
        loops.hidden_values(left, right, *some, hidden)
        logits = hidden[: len(z)] @ unembed
        answer = logits[pairs, z]
        logits[pairs, z] = -np.inf
        # The difference is rounded as well.
        rounding = 1.0001 * (error.x[some[0]] + error.y[some[1]])
        margins[some] = (answer - logits.max(axis=1)).astype(np.float64) - rounding
    out.stages[x, y] = 3
    return len(x)
