"""All pairs by brute force, where a proof did not reach: the exact accuracy.

    finish        the pairs that are left -> which of them are right, exactly
    brute_force   all pairs in one number format, as a baseline for time

Logits are computed in float32. A margin that is within the a-priori bound of its rounding is
computed again in float64, and if need be in fractions, so that every answer is exact.

Source: Higham, Accuracy and Stability of Numerical Algorithms (2002), section 3.1.
"""

from fractions import Fraction

import numpy as np
from jaxtyping import Bool, Int

from mechatlas.analysis.proofs import checks
from mechatlas.analysis.proofs.checks import U64, Weights, growth

ROWS = 1024
"""About as many pairs have their logits held at a time, but at least those of one x."""


def finish(
    weights: Weights,
    table: Int[np.ndarray, "order order"],
    left_over: Bool[np.ndarray, "order order"],
) -> Bool[np.ndarray, "order order"]:
    """Which of the pairs that are left have a positive margin in exact arithmetic.

    Args:
        weights: left, right, unembed.
        table: The right answers.
        left_over: The pairs to try.

    Returns:
        True where the right answer has the largest logit, alone; False for all other pairs.
    """
    left, right, unembed = weights
    m, n = unembed.shape
    right_answer = np.zeros(table.shape, bool)
    of_x, of_y = (1.0001 * part for part in checks.float32_errors(weights))
    xs, ys = np.nonzero(left_over)
    step = max(1, ROWS // n) * n
    rows = min(step, len(xs))
    hidden, logits = np.empty((rows, m), np.float32), np.empty((rows, n), np.float32)
    found = np.empty(rows, np.int8)
    for start in range(0, len(xs), step):
        x, y = xs[start : start + step], ys[start : start + step]
        now = slice(0, len(x))
        checks.loops.activate(left, right, x, y, hidden)
        np.matmul(hidden[now], unembed, out=logits[now])
        answers = table[x, y]
        checks.loops.judge(logits, answers, of_x[x] + of_y[y], found)
        for i in np.flatnonzero(found[now] == 2):
            found[i] = _decide(weights, int(x[i]), int(y[i]), int(answers[i]))
        right_answer[x, y] = found[now] == 1
    return right_answer


def _decide(weights: Weights, x: int, y: int, z: int) -> bool:
    """Whether one pair is right, by fractions for the answers that come near."""
    left, right, unembed = weights
    hidden = np.maximum(left[x].astype(np.float64) + right[y].astype(np.float64), 0)
    logits = hidden @ unembed.astype(np.float64)
    top = np.abs(unembed).max(axis=1).astype(np.float64)
    size = float((np.maximum(left[x], 0) + np.maximum(right[y], 0)) @ top)
    bound = 2.1 * growth(len(top) + 2, U64) * size + 1e-300
    near = logits >= logits[z] - bound
    near[z] = False
    exact = [max(Fraction(float(a)) + Fraction(float(b)), Fraction(0)) for a, b in
             zip(left[x], right[y], strict=True)]  # fmt: skip

    def logit(w: int) -> Fraction:
        return sum((h * Fraction(float(u)) for h, u in zip(exact, unembed[:, w], strict=True)),
                   Fraction(0))  # fmt: skip

    return all(logit(z) > logit(int(w)) for w in np.flatnonzero(near))


def brute_force(
    weights: Weights, table: Int[np.ndarray, "order order"], dtype: type[np.floating]
) -> float:
    """Accuracy over all pairs in one number format: the baseline that a proof must beat."""
    left, right, unembed = (np.asarray(w, dtype) for w in weights)
    n = len(table)
    hits, step = 0, max(1, ROWS // n)
    for start in range(0, n, step):
        hidden = left[start : start + step, None] + right
        np.maximum(hidden, 0, out=hidden)
        answers = (hidden.reshape(-1, left.shape[1]) @ unembed).argmax(axis=1)
        hits += int((answers == table[start : start + step].ravel()).sum())
    return hits / n**2
