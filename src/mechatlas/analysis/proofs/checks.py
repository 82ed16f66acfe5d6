"""What must be true of an explanation before any bound may use it.

    check        weights, group, explanation -> the same in one form, or ProofError
    word_length  how many generators each element is at most a product of

Source: the induction in `mechatlas.maths.irreps.real_irreps`, for homomorphisms.
"""

import dataclasses
import functools
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Float32, Int

from mechatlas.analysis.proofs.explanation import Explanation, ProofError
from mechatlas.analysis.proofs.packing import Packed, pack
from mechatlas.maths.groups import Group

try:
    from mechatlas.analysis.proofs import kernels as loops
except ImportError:  # numba is missing: slower, and tested to be the same
    from mechatlas.analysis.proofs import plain as loops

U32, U64 = 2.0**-24, 2.0**-53
"""Unit roundoff of float32 and float64."""
LARGEST = 1e15
"""Numbers above this are refused, so that their squares and sums of these stay finite."""
TINIEST = 2.0**-126
"""No result of float32 loses more than this below the normal numbers, flushed to 0 or not."""

Weights = tuple[
    Float32[np.ndarray, "order neuron"],
    Float32[np.ndarray, "order neuron"],
    Float32[np.ndarray, "neuron order"],
]

FAULTS = (
    "",
    "An exponent is not from -40 to 40.",
    f"row or column has a number that is not finite or is above {LARGEST:g}.",
    f"A circuit has a number that is not finite or is above {LARGEST:g}.",
    f"A table, scale or ratio is not finite or is above {LARGEST:g}.",
    "leaders or order has a number that no neuron has.",
    "A neuron has no other that stands for it, or too many, or is called silent and is used.",
    "A neuron of a grid is at a point that the grid does not have.",
    "The opposite of a point is one that the grid does not have.",
    "A table changes when both points are replaced by their opposites.",
)
"""What `find_fault` finds, by its number."""


@dataclasses.dataclass(frozen=True, eq=False)
class KnownIrreps:
    """What is true of some irreps of a group, whatever network they are used for."""

    arrays: tuple[Float[np.ndarray, "_ _ _"], ...]
    group: Group
    defect: float
    """Bound on the Frobenius norm of rho(a) rho(b) - rho(ab) and of rho(a)^T rho(a) - 1 for
    all a, b and all of them, rounding of the check included."""
    rho: Float32[np.ndarray, "row order"]
    """The entries of all matrices, a row for each entry."""
    norms: Float[np.ndarray, "order irrep"]
    """Frobenius norm of 1 - rho(g)."""
    merged: tuple[np.ndarray, np.ndarray, np.ndarray]
    """Sign of each row of rho, which of the distinct rows it is up to the sign, and those."""


@dataclasses.dataclass(frozen=True, eq=False)
class KnownActions:
    """What is true of some actions of a group on points."""

    arrays: tuple[Int[np.ndarray, "_ _"], ...]
    group: Group
    offsets: Int[np.ndarray, " action"]
    """Where the points of each begin."""
    whole: Int[np.ndarray, "order point"]
    """All of them, side by side, after a point that stays."""
    inverse: Int[np.ndarray, "order point"]
    """Where the inverse of each element takes each point."""


def growth(operations: int, unit: float) -> float:
    """The factor k u / (1 - k u): relative error of k operations in a row (Higham 2002, lemma 3.1).

    Raises:
        ProofError: So many operations that nothing can be said.
    """
    if operations * unit > 0.01:
        raise ProofError(f"Rounding of {operations} operations in a row cannot be bounded.")
    return operations * unit / (1 - operations * unit)


def float32_errors(weights: Weights) -> tuple[np.ndarray, np.ndarray]:
    """Bound on the error of a margin when the network runs in float32: of x and of y.

    For each logit m + 2 operations in a row on terms of at most max |u_i| (relu(l) + relu(r)).
    """
    m = len(weights[2])
    of_x, of_y, size = loops.weigh_run(*weights, 2.05 * growth(m + 2, U32))
    tiny = 8 * m * TINIEST * (1 + size)
    return of_x.astype(np.float64) + tiny, of_y.astype(np.float64)


def check(width: int, group: Group, e: Explanation) -> tuple[Packed, KnownIrreps, KnownActions]:
    """Refuse an explanation that is not well formed.

    Args:
        width: Number of neurons.
        group: The group.
        e: What was claimed.

    Returns:
        The explanation in one form, and what is known of its irreps and actions.

    Raises:
        ProofError: A shape, label or number is impossible; the message says which.
    """
    packed = pack(e)
    if (packed.width, packed.order) != (width, group.order):
        raise ProofError(
            f"The explanation is about {packed.width} neurons and a group of order "
            f"{packed.order}, the network has {width} and {group.order}."
        )
    parts = (
        packed.weights, packed.means, packed.tables, packed.scale, packed.points,
        packed.antipodes, packed.grids,
    )  # fmt: skip
    standing = (e.silent, e.leaders, e.ratios)
    fault = loops.find_fault(standing, e.order, e.exponents, e.row, e.column, parts, LARGEST)
    if fault:
        raise ProofError(FAULTS[fault])
    for name, share in (("second_share", e.second_share), ("third_share", e.third_share)):
        if not 0 <= share <= 1:
            raise ProofError(f"{name} must be from 0 to 1, got {share}.")
    irreps = _recall(packed.matrices, group, KnownIrreps) or _irreps(packed.matrices, group)
    actions = _recall(packed.actions, group, KnownActions) or _actions(packed.actions, group)
    for grid, sides in zip(packed.grids.tolist(), packed.sides.tolist(), strict=True):
        for size, start, side in zip(grid[2:4], grid[4:6], sides, strict=True):
            antipodes = packed.antipodes[start : start + size]
            if not loops.keeps_opposite(antipodes, packed.actions[side]):
                raise ProofError("Opposite points of a grid do not stay opposite.")
    return packed, irreps, actions


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
    """How far matrices are from an orthogonal representation, for all pairs of elements.

    Raises:
        ProofError: So far that they are none.
    """
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


# Found once for the read-only arrays of a group, which are the same each time. The arrays are
# kept as well, so that their ids stay their own.
_KNOWN: dict[tuple[type, int, tuple[int, ...]], KnownIrreps | KnownActions] = {}
_Known = TypeVar("_Known", KnownIrreps, KnownActions)


def _remember(known: _Known) -> _Known:
    if all(not a.flags.writeable and a.base is None for a in known.arrays):
        if len(_KNOWN) > 256:
            _KNOWN.clear()
        _KNOWN[type(known), id(known.group), tuple(map(id, known.arrays))] = known
    return known


def _recall(arrays: tuple[np.ndarray, ...], group: Group, kind: type[_Known]) -> _Known | None:
    known = _KNOWN.get((kind, id(group), tuple(map(id, arrays))))
    if not isinstance(known, kind) or any(a.flags.writeable for a in arrays):
        return None
    return known


def _irreps(arrays: tuple[Float[np.ndarray, "_ _ _"], ...], group: Group) -> KnownIrreps:
    """Matrices must be orthogonal representations; checked once for the irreps of a group.

    Raises:
        ProofError: As `_defect`.
    """
    n, defect = group.order, 0.0
    rows, norms = [np.zeros((0, n), np.float32)], [np.zeros((n, 0))]
    for number, matrices in enumerate(arrays):
        defect = max(defect, _defect(f"circuit {number}", matrices, group))
        flat = matrices.reshape(n, -1)
        one = flat[group.identity] - flat
        norms.append(np.sqrt(np.einsum("ij,ij->i", one, one))[:, None])
        rows.append(flat.T.astype(np.float32))
    rho = np.ascontiguousarray(np.concatenate(rows))
    size = np.ascontiguousarray(np.concatenate(norms, axis=1))
    return _remember(KnownIrreps(arrays, group, defect, rho, size, _merge_rows(rho)))


def _actions(arrays: tuple[Int[np.ndarray, "_ _"], ...], group: Group) -> KnownActions:
    """Each element must permute the points; checked once for the actions of a group.

    Raises:
        ProofError: One does not.
    """
    n = group.order
    for action in arrays:
        hit = np.zeros(action.shape, bool)
        if action.size and not (action.min() >= 0 and action.max() < action.shape[1]):
            raise ProofError("An action takes a point to one that is none.")
        hit[np.arange(n)[:, None], action] = True
        if not hit.all():
            raise ProofError("An element does not permute the points of a grid.")
    offsets = np.cumsum([1, *(action.shape[1] for action in arrays)])[:-1]
    # The first column is a point that stays, for neurons in no grid.
    whole = np.ascontiguousarray(np.concatenate([np.zeros((n, 1), np.int64), *arrays], axis=1))
    return _remember(KnownActions(arrays, group, offsets, whole, whole[group.inverses]))


def _merge_rows(rho: Float32[np.ndarray, "row order"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of rho that are the same up to sign, as cosines and sines are."""
    signs, to = np.ones(len(rho), np.float32), np.zeros(len(rho), np.int64)
    seen: dict[bytes, int] = {}
    kept = []
    for i, row in enumerate(rho + np.float32(0)):
        for sign in (1, -1):
            found = seen.get((np.float32(sign) * row + np.float32(0)).tobytes())
            if found is not None:
                signs[i], to[i] = sign, found
                break
        else:
            seen[row.tobytes()] = to[i] = len(kept)
            kept.append(i)
    return signs, to, np.ascontiguousarray(rho[kept])


def _largest(matrices: Float[np.ndarray, "count d d"]) -> float:
    flat = matrices.reshape(len(matrices), -1)
    return float(np.sqrt(np.einsum("ij,ij->i", flat, flat).max()))
