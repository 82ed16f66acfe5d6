"""Compiled loops that check an explanation.

`reference.py` has the same functions in numpy, and is the one to read.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np

from mechatlas.analysis.proofs.verifier import reference, structures
from mechatlas.maths.compilation import compiled as compiled_strictly

Loop = TypeVar("Loop", bound=Callable[..., Any])

STRUCTURES = [each for each in vars(structures).values() if hasattr(each, "_fields")]
"""Named tuples that loops take."""


def compiled(loop: Loop) -> Loop:
    """Compile a loop: sums in any order, multiplications fused into them."""
    return compiled_strictly(loop, fastmath={"contract", "reassoc"}, structures=STRUCTURES)


def compiled_form(function: Loop) -> Callable[[Callable[..., Any]], Loop]:
    """Compile a loop that has the parameters, types and result of a function of `reference`."""
    return lambda loop: cast(Loop, compiled(loop))


@compiled
def _is_below(values, limit):
    """Whether all values are smaller than a limit; false for NaN."""
    fine = True  # written so that NaN fails as well
    for i in range(len(values)):
        fine &= abs(values[i]) < limit
    return fine


@compiled
def _is_label(values, low, high):
    """Whether all values are from `low` to `high` - 1."""
    fine = True
    for i in range(len(values)):
        fine &= (values[i] >= low) & (values[i] < high)
    return fine


@compiled_form(reference.find_fault)
def find_fault(clusters, layout, circuits, grids, limit):
    """Compiled form of `reference.find_fault`."""
    dead, representative_of, scale_factors = clusters
    representatives, exponents, additive_x, additive_y = layout
    width = len(representative_of)
    if not _is_label(exponents, -40, 41):
        return 1
    if not (_is_below(additive_x.reshape(-1), limit) and _is_below(additive_y.reshape(-1), limit)):
        return 2
    if not (_is_below(circuits.coefficients, limit) and _is_below(circuits.means, limit)):
        return 3
    shapes, points, antipodes, scale, tables = grids
    if not (
        _is_below(tables, limit) and _is_below(scale, limit) and _is_below(scale_factors, limit)
    ):
        return 4
    if not (_is_label(representative_of, 0, width) and _is_label(representatives, 0, width)):
        return 5
    if _find_stranger(dead, representative_of, scale_factors, representatives) >= 0:
        return 6
    for g in range(len(shapes)):
        start, count, k, k2, left, right, cell, _ = shapes[g]
        first, second = points[0, start : start + count], points[1, start : start + count]
        if not (_is_label(first, 0, k) and _is_label(second, 0, k2)):
            return 7
        left_antipodes, right_antipodes = antipodes[left : left + k], antipodes[right : right + k2]
        if not (_is_label(left_antipodes, 0, k) and _is_label(right_antipodes, 0, k2)):
            return 8
        for p in range(k):
            for q in range(k2):
                other = left_antipodes[p] * k2 + right_antipodes[q]
                if tables[cell + p * k2 + q] != tables[cell + other]:
                    return 9
    return 0


@compiled
def _find_stranger(dead, representative_of, scale_factors, representatives):
    """First neuron that is neither dead nor in a cluster with a representative, or -1."""
    times = np.zeros(len(representative_of), np.int64)
    for j in representatives:
        times[j] += 1
    for i in range(len(representative_of)):
        main = representative_of[i]
        itself = times[i] == 1 and not dead[i] and main == i and scale_factors[i] == 1
        member = times[i] == 0 and (dead[i] or times[main] == 1)
        if not (itself or member):
            return i
    return -1


@compiled_form(reference.preserves_antipodes)
def preserves_antipodes(antipodes, action):
    """Compiled form of `reference.preserves_antipodes`."""
    fine = True
    for p in range(len(antipodes)):
        fine &= antipodes[antipodes[p]] == p
    for g in range(len(action)):
        for p in range(len(antipodes)):
            fine &= action[g, antipodes[p]] == antipodes[action[g, p]]
    return fine
