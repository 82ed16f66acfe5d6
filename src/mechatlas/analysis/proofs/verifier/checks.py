"""Conditions on an explanation that every bound rests on.

    check           group, explanation -> the same as flat arrays, or ProofError
    choose_loops    the loops in numpy, or the same ones compiled
    word_length     the most generators that the word of an element needs
    growth          relative rounding of many operations in a row
    float32_errors  weights -> bound on the rounding of the network itself

Source: the induction in `mechatlas.maths.irreps.real_irreps`, for homomorphisms.
"""

import dataclasses
import functools
from types import ModuleType
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Float32, Int

from mechatlas.analysis.proofs.verifier.explanation import Explanation, ProofError
from mechatlas.analysis.proofs.verifier.packing import Packed, pack
from mechatlas.analysis.proofs.verifier.structures import (
    Clusters,
    DistinctRows,
    Layout,
    PackedActions,
    PackedCircuits,
    PackedGrids,
    PairSum,
    Weights,
)
from mechatlas.maths.groups import Group

U32, U64 = 2.0**-24, 2.0**-53
"""Unit roundoff of float32 and float64."""
LARGEST = 1e15
"""Largest number in an explanation, so that squares and sums of squares stay finite."""
TINIEST = 2.0**-126
"""Smallest normal number of float32: no result loses more below it, flushed to 0 or not."""

FAULTS = (
    "",
    "An exponent is not from -40 to 40.",
    f"additive_x or additive_y has a number that is not finite or is above {LARGEST:g}.",
    f"A circuit has a number that is not finite or is above {LARGEST:g}.",
    f"A table, scale or scale factor is not finite or is above {LARGEST:g}.",
    "representative_of or representatives has a number that no neuron has.",
    "A neuron has no cluster representative, or more than one, or is dead and a representative.",
    "A neuron of a grid is at a point that the grid does not have.",
    "The antipode of a point is one that the grid does not have.",
    "A table changes when both points are replaced by their antipodes.",
    "Opposite points of a grid do not stay opposite.",
)
"""Messages for the numbers that `_find_fault` and `reference.index_tables` return."""


@dataclasses.dataclass(frozen=True, eq=False)
class KnownIrreps:
    """Facts about some irreps of a group, whatever network they are used for."""

    arrays: tuple[Float[np.ndarray, "_ _ _"], ...]
    """Matrices that were checked."""
    group: Group
    """Group that they represent."""
    defect: float
    """Bound on the Frobenius norm of rho(a) rho(b) - rho(ab) and of rho(a)^T rho(a) - 1 for
    all a, b and all irreps, rounding of the check included."""
    rho: Float32[np.ndarray, "entry order"]
    """Entries of all matrices, a row for each entry."""
    elements: Int[np.ndarray, " element"]
    """Elements but the identity, in the order of their conjugacy classes."""
    differences: Float32[np.ndarray, "element entry"]
    """Entries of 1 - rho(g) of these elements."""
    norms: Float[np.ndarray, "element irrep"]
    """Frobenius norm of 1 - rho(g)."""
    distinct: DistinctRows
    """Rows of rho that differ by more than a sign."""


@dataclasses.dataclass(frozen=True, eq=False)
class KnownActions:
    """Facts about some actions of a group on points."""

    arrays: tuple[Int[np.ndarray, "_ _"], ...]
    """Actions that were checked."""
    group: Group
    """Group that acts."""
    packed: PackedActions
    """All actions side by side, without the sides of grids."""


@functools.cache
def choose_loops(*, reference: bool) -> ModuleType:
    """The module `reference`, in numpy, or the compiled loops with the same functions.

    Args:
        reference: Whether the numpy loops are taken; numba is then not imported.
    """
    if reference:
        from mechatlas.analysis.proofs.verifier import reference as loops
    else:
        from mechatlas.analysis.proofs.verifier import compiled as loops
    return loops


def growth(operations: int, unit: float) -> float:
    """Relative error k u / (1 - k u) of k operations in a row (Higham 2002, lemma 3.1).

    Raises:
        ProofError: So many operations that nothing can be said.
    """
    if operations * unit > 0.01:
        raise ProofError(f"Rounding of {operations} operations in a row cannot be bounded.")
    return operations * unit / (1 - operations * unit)


def float32_errors(weights: Weights) -> PairSum:
    """Bound the error of a margin when the network runs in float32.

    For each logit m + 2 operations in a row on terms of at most max |u_i| (relu(l) + relu(r)).
    """
    m, top = len(weights.unembed), np.abs(weights.unembed).max(axis=1)
    scaled = (2.05 * growth(m + 2, U32) * top.astype(np.float64)).astype(np.float32)
    first, second = np.maximum(weights.left, 0), np.maximum(weights.right, 0)
    size = 1.01 * sum(float(part.sum()) for part in (top, first, second))
    tiny = 8 * m * TINIEST * (1 + size)
    return PairSum((first @ scaled).astype(np.float64) + tiny, (second @ scaled).astype(np.float64))


def check(width: int, group: Group, e: Explanation) -> tuple[Packed, KnownIrreps, KnownActions]:
    """Refuse an explanation that is not well formed.

    Args:
        width: Number of neurons.
        group: The group.
        e: The explanation.

    Returns:
        The explanation as flat arrays, and facts about its irreps and actions.

    Raises:
        ProofError: A shape, label or number is impossible; the message says which.
    """
    packed = pack(e)
    if (packed.width, packed.order) != (width, group.order):
        raise ProofError(
            f"The explanation is about {packed.width} neurons and a group of order "
            f"{packed.order}, the network has {width} and {group.order}."
        )
    fault = _find_fault(packed.clusters, packed.layout, packed.circuits, packed.grids)
    if fault:
        raise ProofError(FAULTS[fault])
    for name in ("second_stage_budget", "third_stage_budget"):
        if not 0 <= getattr(e, name) <= 1:
            raise ProofError(f"{name} must be from 0 to 1, got {getattr(e, name)}.")
    irreps = _recall(packed.matrices, group, KnownIrreps) or _irreps(packed.matrices, group)
    actions = _recall(packed.actions, group, KnownActions) or _actions(packed.actions, group)
    return packed, irreps, actions


def _find_fault(
    clusters: Clusters, layout: Layout, circuits: PackedCircuits, grids: PackedGrids
) -> int:
    """Number of the first impossible thing in an explanation, or 0; see `FAULTS`.

    Args:
        clusters: Dead neurons and clusters.
        layout: Cluster representatives.
        circuits: Circuits of the explanation.
        grids: Grids of the explanation.
    """
    dead, representative_of, scale_factors = clusters
    width = len(representative_of)
    tests = [
        _is_label(layout.exponents, -40, 41),
        _is_below(layout.additive_x) and _is_below(layout.additive_y),
        _is_below(circuits.coefficients) and _is_below(circuits.means),
        all(_is_below(values) for values in (grids.tables, grids.scale, scale_factors)),
        _is_label(representative_of, 0, width) and _is_label(layout.representatives, 0, width),
    ]
    if not all(tests):
        return tests.index(False) + 1
    times = np.bincount(layout.representatives, minlength=width)
    is_itself = (representative_of == np.arange(width)) & (scale_factors == 1)
    itself = (times == 1) & ~dead & is_itself
    if not (itself | (times == 0) & (dead | (times[representative_of] == 1))).all():
        return 6
    return 0


@np.errstate(over="ignore", invalid="ignore")
def _is_below(values: np.ndarray) -> bool:
    """Whether the root of the sum of squares is below `LARGEST`; false for NaN."""
    values = values.ravel()
    return bool(np.dot(values, values) < LARGEST**2)


def _is_label(values: np.ndarray, low: int, high: int) -> bool:
    """Whether all values are from `low` to `high` - 1."""
    return bool(values.min(initial=low) >= low and values.max(initial=low) < high)


@functools.lru_cache(maxsize=32)
def word_length(group: Group) -> int:
    """Length of the longest element as a word in the identity and the generators.

    Raises:
        ProofError: They do not generate the group.
    """
    known = np.zeros(group.order, bool)
    known[[group.identity, *group.generators]] = True
    length = 1
    while not known.all():
        before = int(known.sum())
        members = np.flatnonzero(known)
        for s in group.generators:
            known[group.table[s, members]] = True
        length += 1
        if int(known.sum()) == before:
            raise ProofError("The generators do not generate the group.")
    return length


def _defect(name: str, matrices: Float[np.ndarray, "order d d"], group: Group) -> float:
    """Distance of matrices from an orthogonal representation, for all pairs of elements."""
    d = matrices.shape[1]
    unit = np.eye(d)
    if not np.abs(matrices).max() < 10:  # NaN as well
        raise ProofError(f"{name}: the matrices are not an orthogonal representation.")
    steps = [
        _largest(matrices[s] @ matrices - matrices[group.table[s]])
        for s in (*group.generators, group.identity)
    ]
    rounding = growth(d + 4, U64) * 8 * d
    eps = max([*steps, _largest(matrices[[group.identity]] - unit)]) + rounding
    defect = _largest(matrices.transpose(0, 2, 1) @ matrices - unit) + rounding
    eta = defect  # |A^T A - 1| <= t gives |A| <= sqrt(1 + t) <= 1 + t
    length = word_length(group)
    if not (eps < 1e-6 and defect < 1e-6 and length * eta < 0.1):
        raise ProofError(
            f"{name}: the matrices are not an orthogonal representation of the group: products "
            f"are off by {eps:.2g}, orthogonality by {defect:.2g}."
        )
    return length * (2 + eta) * (1 + eta) ** length * eps + defect


# Facts are established once for the read-only arrays of a group, which are the same each time. The
# arrays are kept as well, so that no other array can get the same id.
_KNOWN: dict[tuple[type, int, tuple[int, ...]], KnownIrreps | KnownActions] = {}
_Known = TypeVar("_Known", KnownIrreps, KnownActions)


def _remember(known: _Known) -> _Known:
    """Keep facts about arrays that cannot change, and return them."""
    if all(not a.flags.writeable and a.base is None for a in known.arrays):
        if len(_KNOWN) > 256:
            _KNOWN.clear()
        _KNOWN[type(known), id(known.group), tuple(map(id, known.arrays))] = known
    return known


def _recall(arrays: tuple[np.ndarray, ...], group: Group, kind: type[_Known]) -> _Known | None:
    """Facts about the same arrays and group, if there are any."""
    known = _KNOWN.get((kind, id(group), tuple(map(id, arrays))))
    if not isinstance(known, kind) or any(a.flags.writeable for a in arrays):
        return None
    return known


def _irreps(arrays: tuple[Float[np.ndarray, "_ _ _"], ...], group: Group) -> KnownIrreps:
    """Check that matrices are orthogonal representations, and lay out their entries."""
    n, defect = group.order, 0.0
    elements = np.argsort(group.class_of, kind="stable")[1:]
    rows, norms = [np.zeros((0, n), np.float32)], [np.zeros((n - 1, 0))]
    for number, matrices in enumerate(arrays):
        defect = max(defect, _defect(f"circuit {number}", matrices, group))
        flat = matrices.reshape(n, -1)
        distance = flat[group.identity] - flat[elements]
        norms.append(np.sqrt(np.einsum("ij,ij->i", distance, distance))[:, None])
        rows.append(flat.T.astype(np.float32))
    rho = np.ascontiguousarray(np.concatenate(rows))
    size = np.ascontiguousarray(np.concatenate(norms, axis=1))
    differences = np.ascontiguousarray((rho[:, [group.identity]] - rho[:, elements]).T)
    return _remember(
        KnownIrreps(arrays, group, defect, rho, elements, differences, size, _distinct_rows(rho))
    )


def _actions(arrays: tuple[Int[np.ndarray, "_ _"], ...], group: Group) -> KnownActions:
    """Check that every element permutes the points of each action."""
    n = group.order
    for action in arrays:
        hit = np.zeros(action.shape, bool)
        if action.size and not (action.min() >= 0 and action.max() < action.shape[1]):
            raise ProofError("An action takes a point to a number that is not a point.")
        hit[np.arange(n)[:, None], action] = True
        if not hit.all():
            raise ProofError("An element does not permute the points of a grid.")
    offsets = np.cumsum([1, *(action.shape[1] for action in arrays)])[:-1]
    # The first column is a point that stays, for neurons in no grid.
    images = np.ascontiguousarray(np.concatenate([np.zeros((n, 1), np.int64), *arrays], axis=1))
    sides = np.zeros((0, 2), np.int64)
    packed = PackedActions(sides, offsets, images, images[group.inverses])
    return _remember(KnownActions(arrays, group, packed))


def _distinct_rows(rho: Float32[np.ndarray, "entry order"]) -> DistinctRows:
    """Merge rows of rho that are the same up to sign, as cosines and sines are."""
    first = rho[np.arange(len(rho)), (rho != 0).argmax(axis=1)]
    signs = np.where(first < 0, -1, 1).astype(np.float32)
    to, kept = np.zeros(len(rho), np.int64), []
    seen: dict[bytes, int] = {}
    for i, row in enumerate(rho * signs[:, None] + np.float32(0)):  # -0 becomes 0
        to[i] = seen.setdefault(row.tobytes(), len(kept))
        if to[i] == len(kept):
            kept.append(i)
    return DistinctRows(signs * signs[kept][to], to, np.ascontiguousarray(rho[kept]))


def _largest(matrices: Float[np.ndarray, "count d d"]) -> float:
    """Largest Frobenius norm of some matrices."""
    flat = matrices.reshape(len(matrices), -1)
    return float(np.sqrt(np.einsum("ij,ij->i", flat, flat).max()))
