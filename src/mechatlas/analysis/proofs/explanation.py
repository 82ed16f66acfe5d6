"""What a prover claims of a network on a group's table, and nothing that needs trust.

The network is f(z|x,y) = sum over neurons i of u_i(z) relu(l_i(x) + r_i(y)).

    Explanation  which neurons are the same up to scale, which are too weak to look at; the
                 part of each that x and y add up to; circuits and grids
    Circuit      u_i(z) is about <M_i, rho(z)>, for one irrep rho
    Grid         relu(l_i(x) + r_i(y)) is about a table of two cosets, for those of one grid

Every number here may be wrong: `verify` checks what it needs and bounds the rest.
The rho-sets of the paper are the points that `left_action` and `right_action` of a grid permute.

Source: Wu, Jaburi, Drori and Gross, Towards a unified and verified understanding of
group-operation networks (ICLR 2025), for rho-sets and circuits.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from mechatlas.base import UserError

NOT_TRIED = -1e30
"""The margin of pairs that a verifier did not look at, because there was no hope."""


class ProofError(UserError):
    """A proof is damaged, forged, or about other weights; nothing follows from it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Circuit:
    """Neurons whose unembedding lies in the matrix elements of one irrep."""

    name: str
    """Of the irrep, for people."""
    matrices: Float[np.ndarray, "order d d"]
    """rho of every element."""
    start: int
    """Place of its first neuron in `Explanation.order`; the others follow."""
    weights: Float32[np.ndarray, "dd neuron"]
    """M_i of each of them, row by row: d times d numbers in a column."""
    mean: Float[np.ndarray, "d d"]
    """About what sum of M_i (interaction of i at x, y) is, seen from x and y."""


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """Neurons with the same interaction of x and y up to scale, each in one cell B x B'.

    The interaction of neuron i is about scale[i] * table[x^-1 p, y p'], where p and p' are
    its points.
    """

    name: str
    """Of the irrep, for people."""
    start: int
    """Place of its first neuron in `Explanation.order`; the others follow."""
    left_action: Int[np.ndarray, "order k"]
    """`left_action[g, p]` is where g takes the point p."""
    right_action: Int[np.ndarray, "order k2"]
    left_points: Int[np.ndarray, " neuron"]
    right_points: Int[np.ndarray, " neuron"]
    left_antipodes: Int[np.ndarray, " k"]
    """The point opposite to each, where the set is symmetric; otherwise the point itself."""
    right_antipodes: Int[np.ndarray, " k2"]
    scale: Float32[np.ndarray, " neuron"]
    table: Float32[np.ndarray, "k k2"]
    left_vectors: Float[np.ndarray, "k d"]
    """The rho-set in space: for drawings only, no bound uses it."""
    right_vectors: Float[np.ndarray, "k2 d"]


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """All that the prover says."""

    silent: Bool[np.ndarray, " width"]
    """Neurons too weak to look at: all they could do is taken off every margin."""
    leaders: Int[np.ndarray, " width"]
    """Which neuron each is about a multiple of: itself, or one that stands for it."""
    ratios: Float32[np.ndarray, " width"]
    """That multiple. Where it is negative, relu(-t) = relu(t) - t is used."""
    order: Int[np.ndarray, " neuron"]
    """The neurons that stand for themselves, in the order of all that follows."""
    exponents: Int[np.ndarray, " neuron"]
    """Neuron i is taken with left and right times 2^k and unembed times 2^-k, which changes
    nothing and is exact; it makes errors of all neurons comparable."""
    row: Float32[np.ndarray, "order neuron"]
    """The part of each neuron, so scaled, that depends on x alone."""
    column: Float32[np.ndarray, "neuron order"]
    """The part that depends on y alone. What is left is the interaction."""
    blocks: Int[np.ndarray, " cut"]
    """Where blocks of neurons begin whose rests are bounded together, and where the last
    ends. Each grid is one block."""
    circuits: tuple[Circuit, ...]
    grids: tuple[Grid, ...]
    second_share: float = 0.0
    """Multiply-adds that the second stage may use, as a share of those of brute force."""
    third_share: float = 0.0
    """The same for the third stage, which tries pairs outright."""
