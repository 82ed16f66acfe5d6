"""Explanations as a few flat arrays, the form that a verifier reads.

    pack     explanation -> Packed
    Packed   all circuits and grids side by side

Nothing is judged here but shapes; the numbers are checked by `checks.check` each time.
"""

import dataclasses
import weakref

import numpy as np
from jaxtyping import Float, Int

from mechatlas.analysis.proofs.verifier.explanation import Explanation, ProofError
from mechatlas.analysis.proofs.verifier.structures import (
    Clusters,
    Layout,
    PackedCircuits,
    PackedGrids,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """Explanation as flat arrays."""

    clusters: Clusters
    """Dead neurons and clusters."""
    layout: Layout
    """Cluster representatives."""
    matrices: tuple[Float[np.ndarray, "_ _ _"], ...]
    """rho of each circuit."""
    circuits: PackedCircuits
    """Circuits, one after the other."""
    actions: tuple[Int[np.ndarray, "_ _"], ...]
    """Each action that a grid uses, once."""
    grids: PackedGrids
    """Grids, one after the other."""
    sides: Int[np.ndarray, "grid 2"]
    """Number of the action of the left and of the right points of each grid."""
    block_offsets: Int[np.ndarray, " offset"]
    """First neuron of each block, and the end of the last."""
    width: int
    """Neurons of the network."""
    order: int
    """Order of the group."""
    widest: int
    """Width of the largest matrices."""
    largest: int
    """Number of cells of the largest grid."""


_PACKED: weakref.WeakKeyDictionary[Explanation, Packed] = weakref.WeakKeyDictionary()


def pack(e: Explanation) -> Packed:
    """Lay an explanation out, once. What is laid out is what will be checked and used.

    Raises:
        ProofError: A shape is impossible; the message says which.
    """
    packed = _PACKED.get(e)
    if packed is None:
        packed = _PACKED[e] = _pack(len(e.dead), len(e.additive_x), e)
    return packed


def _pack(width: int, order: int, e: Explanation) -> Packed:
    """Check all shapes, and lay the explanation out."""
    k = len(e.representatives)
    for name in ("dead", "representative_of", "scale_factors"):
        _refuse_shape(name, getattr(e, name), (width,))
    _refuse_shape("exponents", e.exponents, (k,))
    _refuse_shape("additive_x", e.additive_x, (order, k))
    _refuse_shape("additive_y", e.additive_y, (k, order))
    cuts = e.block_offsets.tolist()
    if not cuts or cuts[0] != 0 or cuts[-1] != k or sorted(set(cuts)) != cuts:
        raise ProofError(f"block_offsets must ascend from 0 to {k}.")
    for number, c in enumerate(e.circuits):
        name, d = f"circuit {number}", c.matrices.shape[-1]
        if not 1 <= d <= 64:
            raise ProofError(f"{name}: matrices must be 1 to 64 wide, got {d}.")
        _refuse_shape(f"{name}: matrices", c.matrices, (order, d, d))
        _refuse_shape(f"{name}: mean_matrix", c.mean_matrix, (d, d))
        shape, start = c.coefficients.shape, c.first_neuron
        if shape[0] != d * d or not 0 <= start <= k - shape[1]:
            raise ProofError(f"{name}: coefficients {shape} from {start} do not fit.")
    shapes = [(len(c.mean_matrix), c.first_neuron, c.coefficients.shape[1]) for c in e.circuits]
    coefficients = np.zeros((sum(d * d for d, _, _ in shapes), k), np.float32)
    base = 0
    for c, (d, start, count) in zip(e.circuits, shapes, strict=True):
        coefficients[base : base + d * d, start : start + count] = c.coefficients
        base += d * d
    actions, grids, sides = _grids(e, cuts, order)
    points, scale = np.zeros((2, k), np.int64), np.zeros(k, np.float32)
    for grid in e.grids:
        mine = slice(grid.first_neuron, grid.first_neuron + len(grid.scale))
        scale[mine] = grid.scale
        points[0, mine], points[1, mine] = grid.left_points, grid.right_points
    none, empty = np.zeros(0, np.float32), np.zeros(0, np.int64)
    pairs = [a for g in e.grids for a in (g.left_antipodes, g.right_antipodes)]
    return Packed(
        clusters=Clusters(e.dead, e.representative_of, e.scale_factors),
        layout=Layout(e.representatives, e.exponents, e.additive_x, e.additive_y),
        matrices=tuple(c.matrices for c in e.circuits),
        circuits=PackedCircuits(
            shapes=np.array(shapes, np.int64).reshape(-1, 3),
            coefficients=coefficients,
            means=np.concatenate([np.zeros(0), *(c.mean_matrix.ravel() for c in e.circuits)]),
        ),
        actions=actions,
        grids=PackedGrids(
            shapes=grids,
            points=points,
            antipodes=np.concatenate([empty, *pairs]),
            scale=scale,
            tables=np.concatenate([none, *(g.table.ravel() for g in e.grids)]),
        ),
        sides=sides,
        block_offsets=e.block_offsets,
        width=width,
        order=order,
        widest=max((d for d, _, _ in shapes), default=1),
        largest=max((g.table.size for g in e.grids), default=1),
    )


def _grids(
    e: Explanation, cuts: list[int], order: int
) -> tuple[
    tuple[Int[np.ndarray, "_ _"], ...], Int[np.ndarray, "grid 8"], Int[np.ndarray, "grid 2"]
]:
    """Collect the distinct actions, the shapes of all grids, and the actions of their sides."""
    actions: dict[int, np.ndarray] = {}
    rows, sides, taken = [], [], set()
    antipode = cell = 0
    for number, g in enumerate(e.grids):
        name, neurons, (k, k2) = f"grid {number}", len(g.scale), g.table.shape
        start = g.first_neuron
        block = cuts.index(start) if start in cuts[:-1] else -1
        if block < 0 or cuts[block + 1] != start + neurons or block in taken:
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
        rows.append([start, neurons, k, k2, antipode, antipode + k, cell, block])
        antipode, cell = antipode + k + k2, cell + k * k2
    return (
        tuple(actions.values()),
        np.array(rows, np.int64).reshape(-1, 8),
        np.array(sides, np.int64).reshape(-1, 2),
    )


def _refuse_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    """Refuse an array of another shape."""
    if array.shape != shape:
        raise ProofError(f"{name} must have the shape {shape}, got {array.shape}.")
