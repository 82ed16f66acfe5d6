"""The verifier: a lower bound on accuracy that holds whatever the explanation says.

    verify    weights, group, explanation -> Verdict
    Verdict   a lower bound on the margin of every pair, and what it is made of

With u_i(z) = <M_i, rho(z)> + e_i(z) and relu(l_i + r_i) = A_i(x) + B_i(y) + I_i(x, y), where
I_i = s_i T + D_i, the margin of z* = xy over z = x g y is the sum of

    additive  sum of (u_i(z*) - u_i(z)) (A_i(x) + B_i(y)), exact: two products of matrices
    ideal     <mean, 1 - rho(g)>, the same for all x and y
    moved     <V(x, y) - rho(x) mean rho(y), rho(z*) - rho(z)>, where V is the sum of I_i M_i
    cells     sum of (e_i(z*) - e_i(z)) s_i T(x^-1 p, y p')
    rest      sum of (e_i(z*) - e_i(z)) D_i(x, y)

The last three are bounded by Cauchy-Schwarz: within an irrep, among the cells of a grid
(with row and column means taken out, which T does not have), among neurons. The second stage
takes V exactly, where that was not enough; the third computes all logits of a few pairs.
A, B, M, T, s and mean are what the explanation says: any values give a true statement.

Before that, neurons are merged that are about multiples of one another: with l_i = c l_j + dl
and r_i = c r_j + dr, relu(l_i + r_i) is within |dl| + |dr| of relu(c (l_j + r_j)), which is
c relu(l_j + r_j), or that of -c less -c (l_j + r_j) where c < 0. What this may cost is a part
of x and a part of y, and so is what neurons that are called silent could do.

Rounding. Every error of float32 and float64 is bounded a priori in the usual model,
fl(a op b) = (a op b)(1 + d) with |d| <= u: by k u / (1 - k u) for k operations in a row times
the sum of the absolute values of the terms, which `Terms.slack` bounds for every pair.

Source: Wu et al. (ICLR 2025) for the idea; Higham, Accuracy and Stability of Numerical
Algorithms (2002), section 3.1, for rounding.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int

from mechatlas.analysis.proofs import checks
from mechatlas.analysis.proofs.checks import U32, U64, check, growth
from mechatlas.analysis.proofs.explanation import Explanation, ProofError
from mechatlas.analysis.proofs.terms import Terms, build_terms
from mechatlas.maths.groups import Group

HOPELESS = 0.1
"""The second stage is given up where it certifies a smaller share of what it is given, and
everything where after it a fiftieth of the first pairs is not certified."""


@dataclasses.dataclass(frozen=True, eq=False)
class Verdict:
    """What was proved of every pair x, y."""

    margins: Float[np.ndarray, "order order"]
    """Lower bound on the margin in exact arithmetic on the stored weights."""
    run: tuple[Float[np.ndarray, " order"], Float[np.ndarray, " order"]] = dataclasses.field(
        repr=False
    )
    """The two parts of `float32_errors`: that of x and that of y."""
    stages: Int[np.ndarray, "order order"]
    """Which stage gave the bound of the pair: 1, 2 or 3."""
    multiply_adds: int
    """Done by this verification."""
    sample: tuple[Any, ...] = dataclasses.field(repr=False)
    """What `budget` is made from."""

    @property
    def budget(self) -> dict[str, float]:
        """Median of each term of the first bound, in logits, over the pairs of one x.

        Each at the class of elements where the pair is weakest.
        """
        t, table, rests, moved = self.sample
        gaps, norms = t.bins
        pulls = norms @ moved.astype(np.float64)
        worst = (gaps[:, None] - pulls).argmin(axis=0)
        pull = np.take_along_axis(pulls, worst[None], 0)[0]
        x_loss, y_loss, errors = t.losses
        z = table[0]
        rest = (rests.astype(np.float64) * errors[:, z]).sum(axis=0)
        cells = t.span_losses[z]
        additive = x_loss[0, z] + y_loss[np.arange(len(z)), z] - cells
        slack = t.slack[0][0] + t.slack[1]
        values = (gaps[worst], -additive, -pull, -cells, -rest, -slack)
        names = ("ideal", "additive", "moved", "cells", "rest", "rounding")
        return {name: float(np.median(v)) for name, v in zip(names, values, strict=True)}

    @functools.cached_property
    def float32_errors(self) -> Float[np.ndarray, "order order"]:
        """Upper bound on how much less the margin can be in float32, in any order of sums."""
        return self.run[0][:, None] + self.run[1]

    @property
    def accuracy_bound(self) -> float:
        """Share of pairs that the float32 network gets right for certain."""
        return float((self.margins > self.float32_errors).mean())

    @property
    def accuracy_bound_real(self) -> float:
        """The same in exact arithmetic on the stored weights."""
        return float((self.margins > 0).mean())


def verify(
    left: Float32[np.ndarray, "order neuron"],
    right: Float32[np.ndarray, "order neuron"],
    unembed: Float32[np.ndarray, "neuron order"],
    group: Group,
    explanation: Explanation,
) -> Verdict:
    """Bound the margin of every pair from below.

    Args:
        left: l_i(x), finite.
        right: r_i(y), finite.
        unembed: u_i(z), finite.
        group: The group; right answers are the entries of its table.
        explanation: From a prover, who need not be trusted.

    Raises:
        ProofError: The explanation is not even well formed.
    """
    weights = (left, right, unembed)
    table, n = group.table, group.order
    packed, irreps, actions = check(len(unembed), group, explanation)
    t = build_terms(weights, explanation, packed, irreps, actions)
    whole = n * n * n * len(unembed)
    margins, stages = np.empty((n, n)), np.ones((n, n), np.int8)
    sample = (
        np.empty((len(t.blocks) - 1, n), np.float32),
        np.empty((len(packed.circuits), n), np.float32),
    )
    few = int(explanation.second_share * whole / t.second_cost)
    taken, left_over, tried = checks.loops.bound_pairs(
        table, t.neurons, t.blocks, t.lookup, t.circuits, t.bins, t.losses,
        (*t.slack, *t.run, t.inflate), (t.merged, *t.sums, t.spans, few, HOPELESS),
        (margins, stages, *sample),
    )  # fmt: skip
    used = t.prepared + tried * n * t.first_cost + taken * t.second_cost
    few = int(explanation.third_share * whole / t.third_cost)
    if few and left_over:
        used += t.third_cost * _outright(t, table, few, margins, stages)
    if not np.isfinite(margins.sum()):
        raise ProofError("The bound is not a number: the explanation has absurd sizes.")
    return Verdict(margins, t.run, stages, used, (t, table, *sample))


def _outright(t: Terms, table, few: int, margins, stages) -> int:
    """Compute all logits of a few of the pairs that are left."""
    of_x, of_y = t.run
    x, y = (i[:few] for i in np.nonzero(margins <= of_x[:, None] + of_y))
    left, right, unembed = (w.astype(np.float64) for w in t.weights)
    step = max(1, 2**20 // len(unembed))
    for start in range(0, len(x), step):
        some = slice(start, start + step)
        z = table[x[some], y[some]]
        logits = np.maximum(left[x[some]] + right[y[some]], 0) @ unembed
        pairs = np.arange(len(z))
        answer = logits[pairs, z].copy()
        logits[pairs, z] = -np.inf
        # In float64 the error is at most this share of that in float32.
        rounding = 1e-6 * (of_x[x[some]] + of_y[y[some]])
        margins[x[some], y[some]] = answer - logits.max(axis=1) - rounding
    stages[x, y] = 3
    return len(x)


__all__ = ["U32", "U64", "Verdict", "growth", "verify"]
