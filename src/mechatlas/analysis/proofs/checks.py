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

from mechatlas.analysis.proofs.explanation import Explanation, Grid, ProofError
from mechatlas.maths.groups import Group

try:
    from mechatlas.analysis.proofs import kernels as loops
except ImportError:  # numba is missing: slower, and tested to be the same
    from mechatlas.analysis.proofs import plain as loops

U32, U64 = 2.0**-24, 2.0**-53
"""Unit roundoff of float32 and float64."""
LARGEST = 1e25
"""Numbers above this could overflow float32 when multiplied and are refused."""


@dataclasses.dataclass(frozen=True, eq=False)
class KnownIrrep:
    """What is true of an irrep of a group, whatever network it is used for."""

    array: Float[np.ndarray, "order d d"]
    group: Group
    defect: float
    """See `check`."""
    rho: Float32[np.ndarray, "dd order"]
    """The matrices as rows of entries."""
    rho64: Float[np.ndarray, "dd order"]
    norms: Float[np.ndarray, " order"]
    """Frobenius norm of 1 - rho(g)."""
    merged: tuple[np.ndarray, np.ndarray, np.ndarray]
    """Sign of each row of rho, which of the distinct rows it is up to the sign, and those."""


@dataclasses.dataclass(frozen=True, eq=False)
class KnownAction:
    """What is true of a group's action on points."""

    array: Int[np.ndarray, "order point"]
    group: Group
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


def check(width: int, group: Group, explanation: Explanation) -> tuple[float, list[KnownIrrep]]:
    """Refuse an explanation that is not well formed.

    Args:
        width: Number of neurons.
        group: The group.
        explanation: What was claimed.

    Returns:
        Bound on the Frobenius norm of rho(a) rho(b) - rho(ab) and of rho(a)^T rho(a) - 1 for
        all a, b and all irreps of the explanation, rounding of this check included; and what
        is known of the irrep of each circuit.

    Raises:
        ProofError: A shape, label or number is impossible; the message says which.
    """
    n, e = group.order, explanation
    k = len(e.order)
    _check_standing(width, e)
    _refuse_shape("exponents", e.exponents, (k,))
    _refuse_labels("exponents", e.exponents, -40, 41)
    _refuse_shape("row", e.row, (n, k))
    _refuse_numbers("row", e.row)
    _refuse_shape("column", e.column, (k, n))
    _refuse_numbers("column", e.column)
    for name, share in (("second_share", e.second_share), ("third_share", e.third_share)):
        if not 0 <= share <= 1:
            raise ProofError(f"{name} must be from 0 to 1, got {share}.")
    cuts = e.blocks.tolist()
    if not cuts or cuts[0] != 0 or cuts[-1] != k or sorted(set(cuts)) != cuts:
        raise ProofError(f"blocks must ascend from 0 to {k}.")
    taken = set()
    for number, grid in enumerate(e.grids):
        _check_grid(f"grid {number}", grid, group)
        block = cuts.index(grid.start) if grid.start in cuts[:-1] else -1
        if block < 0 or cuts[block + 1] != grid.start + len(grid.scale) or block in taken:
            raise ProofError(f"Grid {number} is not a block of its own.")
        taken.add(block)
    known = []
    for number, c in enumerate(e.circuits):
        name = f"circuit {number}"
        d = c.matrices.shape[-1]
        if not 1 <= d <= 64:
            raise ProofError(f"{name}: matrices must be 1 to 64 wide, got {d}.")
        _refuse_shape(f"{name}: matrices", c.matrices, (n, d, d))
        _refuse_shape(f"{name}: mean", c.mean, (d, d))
        if c.weights.shape[0] != d * d or not 0 <= c.start <= k - c.weights.shape[1]:
            raise ProofError(f"{name}: weights {c.weights.shape} from {c.start} do not fit.")
        _refuse_numbers(f"{name}: weights", c.weights)
        _refuse_numbers(f"{name}: mean", c.mean)
        known.append(_known_irrep(name, c.matrices, group))
    return max((irrep.defect for irrep in known), default=0.0), known


def _check_standing(width: int, e: Explanation) -> None:
    """Each neuron must be silent, stand for itself or have one that does.

    Raises:
        ProofError: One does not.
    """
    for name, array in (("silent", e.silent), ("leaders", e.leaders), ("ratios", e.ratios)):
        _refuse_shape(name, array, (width,))
    _refuse_numbers("ratios", e.ratios)
    _refuse_labels("leaders", e.leaders, 0, width)
    _refuse_labels("order", e.order, 0, width)
    stranger = loops.find_stranger(e.silent, e.leaders, e.ratios, e.order)
    if stranger >= 0:
        raise ProofError(f"Neuron {stranger} has no neuron that stands for it, or too many.")


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


# Found once for the read-only arrays of a group, which are the same each time. The array is
# kept as well, so that its id stays its own.
_KNOWN: dict[int, KnownIrrep | KnownAction] = {}
_Known = TypeVar("_Known", KnownIrrep, KnownAction)


def _remember(array: np.ndarray, known: _Known) -> _Known:
    if not array.flags.writeable and array.base is None:
        if len(_KNOWN) > 512:
            _KNOWN.clear()
        _KNOWN[id(array)] = known
    return known


def _recall(array: np.ndarray, group: Group, kind: type[_Known]) -> _Known | None:
    known = _KNOWN.get(id(array))
    if not isinstance(known, kind) or known.array is not array or array.flags.writeable:
        return None
    return known if known.group is group or known.group == group else None


def _known_irrep(name: str, matrices: Float[np.ndarray, "order d d"], group: Group) -> KnownIrrep:
    """The matrices are checked, once for the irreps of a group.

    Raises:
        ProofError: As `_defect`.
    """
    known = _recall(matrices, group, KnownIrrep)
    if known is not None:
        return known
    _refuse_numbers(f"{name}: matrices", matrices)
    defect = _defect(name, matrices, group)
    flat = matrices.reshape(len(matrices), -1)
    rho = np.ascontiguousarray(flat.T)
    one = flat[group.identity] - flat
    norms = np.sqrt(np.einsum("ij,ij->i", one, one))
    single = rho.astype(np.float32)
    merged = _merge_rows(single)
    return _remember(matrices, KnownIrrep(matrices, group, defect, single, rho, norms, merged))


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


def _refuse_action(name: str, action: Int[np.ndarray, "order point"], group: Group) -> None:
    """Each element must permute the points; checked once for the actions of a group.

    Raises:
        ProofError: One does not.
    """
    if _recall(action, group, KnownAction) is not None:
        return
    size = action.shape[1]
    _refuse_shape(f"{name}: action", action, (group.order, size))
    _refuse_labels(f"{name}: action", action, 0, size)
    hit = np.zeros(action.shape, bool)
    hit[np.arange(group.order)[:, None], action] = True
    if not hit.all():
        raise ProofError(f"{name}: an element does not permute the points.")
    _remember(action, KnownAction(action, group, action[group.inverses]))


def inverse_action(action: Int[np.ndarray, "order point"], group: Group) -> np.ndarray:
    """Where the inverse of each element takes each point."""
    known = _recall(action, group, KnownAction)
    return known.inverse if known is not None else action[group.inverses]


def _largest(matrices: Float[np.ndarray, "count d d"]) -> float:
    flat = matrices.reshape(len(matrices), -1)
    return float(np.sqrt(np.einsum("ij,ij->i", flat, flat).max()))


def _check_grid(name: str, grid: Grid, group: Group) -> None:
    """Each element must permute the points, and the table be the same for opposite ones.

    Raises:
        ProofError: Something is impossible.
    """
    k, k2 = grid.table.shape
    neurons = len(grid.scale)
    _refuse_numbers(f"{name}: scale", grid.scale)
    _refuse_numbers(f"{name}: table", grid.table)
    for size, action, points, antipodes in (
        (k, grid.left_action, grid.left_points, grid.left_antipodes),
        (k2, grid.right_action, grid.right_points, grid.right_antipodes),
    ):
        if action.shape[1] != size:
            raise ProofError(f"{name}: the action must have {size} points, as the table has.")
        _refuse_action(name, action, group)
        _refuse_shape(f"{name}: points", points, (neurons,))
        _refuse_shape(f"{name}: antipodes", antipodes, (size,))
        _refuse_labels(f"{name}: points", points, 0, size)
        _refuse_labels(f"{name}: antipodes", antipodes, 0, size)
        if not loops.keeps_opposite(antipodes, action):
            raise ProofError(f"{name}: opposite points do not stay opposite.")
    if not loops.is_even(grid.table, grid.left_antipodes, grid.right_antipodes):
        raise ProofError(f"{name}: the table changes when both points are replaced by opposites.")


def _refuse_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ProofError(f"{name} must have the shape {shape}, got {array.shape}.")


def _refuse_numbers(name: str, array: np.ndarray) -> None:
    if not loops.is_below(array.reshape(-1), LARGEST):
        raise ProofError(f"{name} has a number that is not finite or is above {LARGEST:g}.")


def _refuse_labels(name: str, array: np.ndarray, low: int, high: int) -> None:
    if not loops.is_label(array.reshape(-1), low, high):
        raise ProofError(f"{name} must be from {low} to {high - 1}.")
