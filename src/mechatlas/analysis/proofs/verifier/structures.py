"""Groups of arrays that the loops of both verifiers take and return. No arithmetic.

All named tuples that compiled loops use stand here: `compiled.compiled` keeps compiled code
apart by their fields.

Axes: `order` elements of the group, `width` neurons of the network, `neuron` cluster
representatives in the order of the explanation, `entry` matrix entries of all irreps one after the
other, `circuit`, `grid`, `block`, `point` points of rho-sets, `cell` cells of grids.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int8


class Weights(NamedTuple):
    """Weights of a network: logits are relu(left[x] + right[y]) @ unembed."""

    left: Float32[np.ndarray, "order width"]
    """l_i(x)."""
    right: Float32[np.ndarray, "order width"]
    """r_i(y)."""
    unembed: Float32[np.ndarray, "width order"]
    """u_i(z)."""


class Clusters(NamedTuple):
    """Neurons that are dead, and clusters of neurons that are equal up to scale."""

    dead: Bool[np.ndarray, " width"]
    """Neurons that are left out; the most they could do is taken off every margin."""
    representative_of: Int[np.ndarray, " width"]
    """Cluster representative of each neuron."""
    scale_factors: Float32[np.ndarray, " width"]
    """c of each neuron: its left and right are about c times those of its representative."""


class Layout(NamedTuple):
    """Cluster representatives in the order of all arrays with the axis `neuron`."""

    representatives: Int[np.ndarray, " neuron"]
    """Number of each representative in the network."""
    exponents: Int[np.ndarray, " neuron"]
    """Powers of two that left and right are multiplied by, and unembed divided by."""
    additive_x: Float32[np.ndarray, "order neuron"]
    """A_i(x)."""
    additive_y: Float32[np.ndarray, "neuron order"]
    """B_i(y)."""


class MergedNetwork(NamedTuple):
    """Network of the cluster representatives alone, scaled by powers of two."""

    sides: Float32[np.ndarray, "2 neuron order"]
    """l_i(x) and r_i(y), scaled and transposed."""
    unembed: Float32[np.ndarray, "neuron order"]
    """u_i(z), summed over the cluster and scaled."""
    linear: Float32[np.ndarray, "neuron order"]
    """Linear part owed to members with c < 0: relu(-t) = relu(t) - t."""
    mirrored: Bool[np.ndarray, " neuron"]
    """Representatives with a member with c < 0."""
    mass: Float[np.ndarray, " neuron"]
    """Sum of the largest |u| over z of the members of a cluster, or a little more."""
    losses: Float[np.ndarray, "2 order"]
    """Most that dead neurons and imperfect merging could take from a margin: parts of x and y."""


class PackedCircuits(NamedTuple):
    """Circuits of an explanation, one after the other."""

    shapes: Int[np.ndarray, "circuit 3"]
    """Width d of the matrices, first neuron, number of neurons."""
    coefficients: Float32[np.ndarray, "entry neuron"]
    """M_i of all circuits, one below the other; 0 for neurons that are not in the circuit."""
    means: Float[np.ndarray, " entry"]
    """Mean matrices Vm, row by row."""


class PackedGrids(NamedTuple):
    """Grids of an explanation, one after the other."""

    shapes: Int[np.ndarray, "grid 8"]
    """First neuron, number of neurons, left points, right points, where the antipodes of the left
    points begin, those of the right points, where the table begins, block."""
    points: Int[np.ndarray, "2 neuron"]
    """Left and right point of each neuron; 0 for neurons in no grid."""
    antipodes: Int[np.ndarray, " side_point"]
    """Antipode of each point, left and right sets of each grid in turn."""
    scale: Float32[np.ndarray, " neuron"]
    """s_i; 0 for neurons in no grid."""
    tables: Float32[np.ndarray, " cell"]
    """T of each grid, row by row."""


class PackedActions(NamedTuple):
    """Actions of the group on the points of grids, side by side."""

    sides: Int[np.ndarray, "grid 2"]
    """Number of the action of the left and of the right points of each grid."""
    offsets: Int[np.ndarray, " action"]
    """First column of each action in `images`."""
    images: Int[np.ndarray, "order point"]
    """Image of each point under each element; column 0 is a point that stays, for neurons in no
    grid."""
    inverse: Int[np.ndarray, "order point"]
    """Image of each point under the inverse of each element."""


class Neurons(NamedTuple):
    """Neurons as the loop over pairs reads them."""

    left: Float32[np.ndarray, "neuron order"]
    """l_i(x), scaled."""
    additive_x: Float32[np.ndarray, "order neuron"]
    """A_i(x)."""
    right: Float32[np.ndarray, "neuron order"]
    """r_i(y), scaled."""
    additive_y: Float32[np.ndarray, "neuron order"]
    """B_i(y)."""
    scale: Float32[np.ndarray, " neuron"]
    """s_i."""
    block_offsets: Int[np.ndarray, " offset"]
    """First neuron of each block, and the end of the last."""


class TableIndex(NamedTuple):
    """Rows of tables: T of neuron i at x is `rows[first[i] + moves[x, columns[i]]]`, over all y."""

    first: Int[np.ndarray, " neuron"]
    """Row of the neuron's right point and of left point 0."""
    columns: Int[np.ndarray, " neuron"]
    """Column of the neuron's left point in the actions."""
    moves: Int[np.ndarray, "order point"]
    """Image of each point under the inverse of each element."""
    rows: Float32[np.ndarray, "row order"]
    """T(p, y p') over all y, for every p and p' of every grid; the last row is 0."""
    largest: Float32[np.ndarray, " neuron"]
    """Largest |s_i T|, or a little more."""


class CircuitTerms(NamedTuple):
    """Circuits as the loop over pairs reads them."""

    shapes: Int[np.ndarray, "circuit 3"]
    """Width d of the matrices, first neuron, number of neurons."""
    coefficients: Float32[np.ndarray, "entry neuron"]
    """M_i of all circuits."""
    means: Float32[np.ndarray, " entry"]
    """Mean matrices Vm, row by row."""
    rho: Float32[np.ndarray, "entry order"]
    """Matrix entries of all irreps."""


class ClassMinima(NamedTuple):
    """Ideal margin and loss of equivariance, the worst of each bin of conjugacy classes."""

    gaps: Float32[np.ndarray, " bin"]
    """Least ideal margin gamma(g)."""
    norms: Float32[np.ndarray, "bin circuit"]
    """Largest Frobenius norm of 1 - rho(g)."""
    order: Int[np.ndarray, " element"]
    """Elements but the identity, bin by bin, as places in the order of their classes."""
    offsets: Int[np.ndarray, " offset"]
    """First element of each bin, and the end of the last."""


class AdditiveLosses(NamedTuple):
    """Most that additive parts and cells could take from the right answer z."""

    x: Float32[np.ndarray, "order order"]
    """Part of x and z; contains `cells`."""
    y: Float32[np.ndarray, "order order"]
    """Part of y and z."""
    cells: Float32[np.ndarray, " order"]
    """Largest loss within the cells of grids, by z."""


class DistinctRows(NamedTuple):
    """Rows of rho that differ by more than a sign."""

    signs: Float32[np.ndarray, " entry"]
    """Sign of each entry of rho against its distinct row."""
    row_of: Int[np.ndarray, " entry"]
    """Distinct row of each entry of rho."""
    rows: Float32[np.ndarray, "distinct order"]
    """Distinct rows."""


class PairSum(NamedTuple):
    """Bound on a quantity of pairs that is the sum of a part of x and a part of y."""

    x: Float[np.ndarray, " order"]
    """Part of x."""
    y: Float[np.ndarray, " order"]
    """Part of y."""


class FirstStage(NamedTuple):
    """Terms of the first stage."""

    bins: ClassMinima
    """Ideal margins, the worst of each bin of conjugacy classes."""
    losses: AdditiveLosses
    """Losses to additive parts and to cells."""
    residual: Float32[np.ndarray, "block order"]
    """Largest distance of e(z) from any other e(w) and from 0, by block and z."""
    slack: PairSum
    """Rounding of the verification, and all that was left out."""
    float32_error: PairSum
    """Rounding of the network in float32."""
    inflate: float
    """Factor that makes up for rounding in sums of losses, which are never negative."""
    differences: Float32[np.ndarray, "element entry"]
    """Entries of 1 - rho(g) for the elements of the bins."""
    frame_slack: float
    """Rounding of V in the frame of x and y, as a share of `slack`."""


class SecondStage(NamedTuple):
    """Terms and limits of the second stage."""

    rho: DistinctRows
    """Matrix entries of all irreps."""
    sums: Float32[np.ndarray, "2 order order"]
    """Additive part of each logit: part of x by x and z, and part of y by y and z."""
    spans: Float32[np.ndarray, "order order"]
    """Most that the residual could do within the cells of grids, for each two answers."""
    max_pairs: int
    """Number of pairs that the stage may take."""
    give_up_share: float
    """Share of certified pairs below which the stage has failed on some elements x."""


class PairBounds(NamedTuple):
    """Arrays that the loop over pairs writes."""

    margins: Float[np.ndarray, "order order"]
    """Lower bound on the margin of each pair."""
    stages: Int8[np.ndarray, "order order"]
    """Stage that gave the bound."""


class PairCounts(NamedTuple):
    """Work that the loop over pairs did."""

    second_stage: int
    """Pairs that the second stage took."""
    uncertified: int
    """Pairs that are not certified."""
    tried: int
    """Elements x that were tried; where the first eighth is hopeless, the others are not."""
    framed: int
    """Pairs for which V was moved into the frame of x and y."""
    compared: int
    """Margins that had to be computed from it, each of a pair and an element g."""
