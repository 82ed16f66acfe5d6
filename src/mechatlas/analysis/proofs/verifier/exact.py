"""Exact accuracy by brute force, for pairs that a proof did not certify.

    decide_exactly        pairs that are left -> which of them are right, exactly
    brute_force_accuracy  accuracy over all pairs in one number format, a baseline for time

Logits are computed in float32. A margin that is within the a-priori bound of its rounding is
computed again in float64, and if need be in fractions, so that every answer is exact.

Source: Higham, Accuracy and Stability of Numerical Algorithms (2002), section 3.1.
"""

from fractions import Fraction

import numpy as np
from jaxtyping import Bool, Float32, Int

from mechatlas.analysis.proofs.verifier import checks
from mechatlas.analysis.proofs.verifier.checks import U64, growth
from mechatlas.analysis.proofs.verifier.structures import Weights

ROWS = 1024
"""Number of pairs whose logits are held at a time; at least all pairs of one x."""


def decide_exactly(
    weights: Weights,
    table: Int[np.ndarray, "order order"],
    pairs: Bool[np.ndarray, "order order"],
    *,
    reference: bool = False,
) -> Bool[np.ndarray, "order order"]:
    """Decide which of some pairs have a positive margin in exact arithmetic.

    Args:
        weights: The network.
        table: The right answers.
        pairs: The pairs to decide.
        reference: Run the loops of `reference`, in numpy, instead of the compiled ones.

    Returns:
        True where the right answer has the largest logit, alone; False for all other pairs.
    """
    loops = checks.choose_loops(reference=reference)
    left, right, unembed = weights
    m, n = unembed.shape
    is_right = np.zeros(table.shape, bool)
    x_error, y_error = (1.0001 * part for part in checks.float32_errors(weights))
    xs, ys = np.nonzero(pairs)
    step = max(1, ROWS // n) * n
    rows = min(step, len(xs))
    hidden, logits = np.empty((rows, m), np.float32), np.empty((rows, n), np.float32)
    judged = np.empty(rows, np.int8)
    for start in range(0, len(xs), step):
        x, y = xs[start : start + step], ys[start : start + step]
        now = slice(0, len(x))
        loops.hidden_values(left, right, x, y, hidden)
        np.matmul(hidden[now], unembed, out=logits[now])
        answers = table[x, y]
        loops.judge_margins(logits, answers, x_error[x] + y_error[y], judged)
        for i in np.flatnonzero(judged[now] == 2):
            judged[i] = _decide(weights, int(x[i]), int(y[i]), int(answers[i]))
        is_right[x, y] = judged[now] == 1
    return is_right


def _decide(weights: Weights, x: int, y: int, z: int) -> bool:
    """Decide one pair, by fractions for the answers that come near."""
    left, right, unembed = weights
    hidden = np.maximum(left[x].astype(np.float64) + right[y].astype(np.float64), 0)
    logits = hidden @ unembed.astype(np.float64)
    top = np.abs(unembed).max(axis=1).astype(np.float64)
    size = float((np.maximum(left[x], 0) + np.maximum(right[y], 0)) @ top)
    bound = 2.1 * growth(len(top) + 2, U64) * size + 1e-300
    near = logits >= logits[z] - bound
    near[z] = False
    exact = [
        max(Fraction(float(a)) + Fraction(float(b)), Fraction(0))
        for a, b in zip(left[x], right[y], strict=True)
    ]

    def logit(w: int) -> Fraction:
        terms = (h * Fraction(float(u)) for h, u in zip(exact, unembed[:, w], strict=True))
        return sum(terms, Fraction(0))

    return all(logit(z) > logit(int(w)) for w in np.flatnonzero(near))


def brute_force_accuracy(
    left: Float32[np.ndarray, "order width"],
    right: Float32[np.ndarray, "order width"],
    unembed: Float32[np.ndarray, "width order"],
    table: Int[np.ndarray, "order order"],
    *,
    dtype: type[np.floating] = np.float32,
) -> float:
    """Compute the accuracy over all pairs in one number format: the baseline of a proof.

    Args:
        left: l_i(x).
        right: r_i(y).
        unembed: u_i(z).
        table: The right answers.
        dtype: Number format, such as np.float64.
    """
    left, right, unembed = (np.asarray(w, dtype) for w in (left, right, unembed))
    n = len(table)
    hits, step = 0, max(1, ROWS // n)
    for start in range(0, n, step):
        hidden = left[start : start + step, None] + right
        np.maximum(hidden, 0, out=hidden)
        answers = (hidden.reshape(-1, left.shape[1]) @ unembed).argmax(axis=1)
        hits += int((answers == table[start : start + step].ravel()).sum())
    return hits / n**2
