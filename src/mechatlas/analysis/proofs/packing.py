"""An explanation as a few flat arrays, the form that a verifier reads.

    pack     explanation -> Packed
    Packed   all circuits and grids side by side

Nothing is judged here but shapes: what the numbers say is checked by `checks.check` each time.
"""

import dataclasses
import weakref

import numpy as np
from jaxtyping import Float, Float32, Int

from mechatlas.analysis.proofs.explanation import Explanation, ProofError


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """Circuits, grids and blocks of an explanation, one after the other."""

    matrices: tuple[Float[np.ndarray, "_ _ _"], ...]
    """Of each circuit."""
    circuits: Int[np.ndarray, "circuit 3"]
    """Width d of the matrices, first neuron, number of neurons."""
    weights: Float32[np.ndarray, " weight"]
    """M of all neurons of all circuits."""
    means: Float[np.ndarray, " entry"]
    actions: tuple[Int[np.ndarray, "_ _"], ...]
    """Each action that a grid uses, once."""
    grids: Int[np.ndarray, "grid 8"]
    """First neuron, number of neurons, number of points left and right, where the antipodes of
    the left points begin, those of the right ones, where the table begins, block."""
    sides: Int[np.ndarray, "grid 2"]
    """Which action the left and the right points of a grid have."""
    points: Int[np.ndarray, "2 neuron"]
    """Left and right point of each neuron; 0 for those in no grid."""
    scale: Float32[np.ndarray, " neuron"]
    """0 for neurons in no grid."""
    antipodes: Int[np.ndarray, " side_point"]
    tables: Float32[np.ndarray, " cell"]
    width: int
    """Neurons of the network."""
    order: int
    """Of the group."""
    widest: int
    """Width of the largest matrices."""
    largest: int
    """Cells of the largest grid."""


_PACKED: weakref.WeakKeyDictionary[Explanation, Packed] = weakref.WeakKeyDictionary()


def pack(e: Explanation) -> Packed:
    """Lay an explanation out, once. What is laid out is what will be checked and used.

    Raises:
        ProofError: A shape is impossible; the message says which.
    """
    packed = _PACKED.get(e)
    if packed is None:
        packed = _PACKED[e] = _pack(len(e.silent), len(e.row), e)
    return packed


def _pack(width: int, order: int, e: Explanation) -> Packed:
    k = len(e.order)
    for name, array in (("silent", e.silent), ("leaders", e.leaders), ("ratios", e.ratios)):
        _refuse_shape(name, array, (width,))
    _refuse_shape("exponents", e.exponents, (k,))
    _refuse_shape("row", e.row, (order, k))
    _refuse_shape("column", e.column, (k, order))
    cuts = e.blocks.tolist()
    if not cuts or cuts[0] != 0 or cuts[-1] != k or sorted(set(cuts)) != cuts:
        raise ProofError(f"blocks must ascend from 0 to {k}.")
    for number, c in enumerate(e.circuits):
        name, d = f"circuit {number}", c.matrices.shape[-1]
        if not 1 <= d <= 64:
            raise ProofError(f"{name}: matrices must be 1 to 64 wide, got {d}.")
        _refuse_shape(f"{name}: matrices", c.matrices, (order, d, d))
        _refuse_shape(f"{name}: mean", c.mean, (d, d))
        if c.weights.shape[0] != d * d or not 0 <= c.start <= k - c.weights.shape[1]:
            raise ProofError(f"{name}: weights {c.weights.shape} from {c.start} do not fit.")
    circuits = [(len(c.mean), c.start, c.weights.shape[1]) for c in e.circuits]
    actions, grids, sides = _grids(e, cuts, order)
    points, scale = np.zeros((2, k), np.int64), np.zeros(k, np.float32)
    for grid in e.grids:
        mine = slice(grid.start, grid.start + len(grid.scale))
        scale[mine] = grid.scale
        points[0, mine], points[1, mine] = grid.left_points, grid.right_points
    none, empty = np.zeros(0, np.float32), np.zeros(0, np.int64)
    pairs = [a for g in e.grids for a in (g.left_antipodes, g.right_antipodes)]
    return Packed(
        matrices=tuple(c.matrices for c in e.circuits),
        circuits=np.array(circuits, np.int64).reshape(-1, 3),
        weights=np.concatenate([none, *(c.weights.ravel() for c in e.circuits)]),
        means=np.concatenate([none.astype(float), *(c.mean.ravel() for c in e.circuits)]),
        actions=actions,
        grids=grids,
        sides=sides,
        points=points,
        scale=scale,
        antipodes=np.concatenate([empty, *pairs]),
        tables=np.concatenate([none, *(g.table.ravel() for g in e.grids)]),
        width=width,
        order=order,
        widest=max((d for d, _, _ in circuits), default=1),
        largest=max((g.table.size for g in e.grids), default=1),
    )


def _grids(e: Explanation, cuts: list[int], order: int):
    """Actions, and where everything of each grid begins.

    Raises:
        ProofError: A shape is impossible.
    """
    actions: dict[int, np.ndarray] = {}
    rows, sides, taken = [], [], set()
    antipode = cell = 0
    for number, g in enumerate(e.grids):
        name, neurons, (k, k2) = f"grid {number}", len(g.scale), g.table.shape
        block = cuts.index(g.start) if g.start in cuts[:-1] else -1
        if block < 0 or cuts[block + 1] != g.start + neurons or block in taken:
            raise ProofError(f"{name} is not a block of its own.")
        taken.add(block)
        for size, action, points, antipodes in (
            (k, g.left_action, g.left_points, g.left_antipodes),
            (k2, g.right_action, g.right_points, g.right_antipodes),
        ):
            _refuse_shape(f"{name}: action", action, (order, size))
            _refuse_shape(f"{name}: points", points, (neurons,))
            _refuse_shape(f"{name}: antipodes", antipodes, (size,))
            actions[id(action)] = action
        numbers = list(actions)
        sides.append([numbers.index(id(a)) for a in (g.left_action, g.right_action)])
        rows.append([g.start, neurons, k, k2, antipode, antipode + k, cell, block])
        antipode, cell = antipode + k + k2, cell + k * k2
    return (
        tuple(actions.values()),
        np.array(rows, np.int64).reshape(-1, 8),
        np.array(sides, np.int64).reshape(-1, 2),
    )


def _refuse_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ProofError(f"{name} must have the shape {shape}, got {array.shape}.")
