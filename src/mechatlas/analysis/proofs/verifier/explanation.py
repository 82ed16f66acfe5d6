"""Explanations: claims of a prover about a network on a group's table, none of which is trusted.

The network is f(z|x,y) = sum over neurons i of u_i(z) relu(l_i(x) + r_i(y)).

    Explanation   dead neurons, clusters of neurons equal up to scale, additive parts, circuits,
                  grids
    IrrepCircuit  u_i(z) is about <M_i, rho(z)>, for one irrep rho
    Grid          relu(l_i(x) + r_i(y)) is about a table over two rho-sets, plus additive parts
    ProofError    raised where an explanation or a proof is refused

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
"""Margin of pairs that a verifier did not look at, because there was no hope."""
PAIRS = 640
"""Number of pairs that are worked on together: those of one x, or of up to an eighth of all x."""
WORTH_COMPARING = 0.9
"""Share of the open pairs that comparing elements must certify to go on with; it ends after
failing on more than n / (4 PATIENCE) elements x."""
PATIENCE = 16
"""Divisor of the order n: the second stage ends after failing at more than 2 + n / PATIENCE
elements x."""


class ProofError(UserError):
    """A proof is damaged, forged, or about other weights; nothing follows from it."""


@dataclasses.dataclass(frozen=True, eq=False)
class IrrepCircuit:
    """Neurons whose unembedding lies in the matrix elements of one irrep."""

    name: str
    """Name of the irrep, for people."""
    matrices: Float[np.ndarray, "order d d"]
    """rho(g) of every element g."""
    first_neuron: int
    """Place of the first neuron in `Explanation.representatives`; the others follow."""
    coefficients: Float32[np.ndarray, "dd neuron"]
    """Fourier coefficient M_i of each neuron's unembedding, row by row: d times d numbers in a
    column."""
    mean_matrix: Float[np.ndarray, "d d"]
    """Vm: estimate of rho(x)^T (sum of M_i I_i(x, y)) rho(y)^T, the same for all x and y."""


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """Neurons with the same interaction of x and y up to scale, each in one cell of B x B'.

    The interaction of neuron i is about scale[i] * table[x^-1 p, y p'], where p and p' are
    the left and right point of the neuron.
    """

    name: str
    """Name of the irrep, for people."""
    first_neuron: int
    """Place of the first neuron in `Explanation.representatives`; the others follow."""
    left_action: Int[np.ndarray, "order k"]
    """Image `left_action[g, p]` of each point p of B under each element g."""
    right_action: Int[np.ndarray, "order k2"]
    """Image of each point of B' under each element."""
    left_points: Int[np.ndarray, " neuron"]
    """Point p of each neuron."""
    right_points: Int[np.ndarray, " neuron"]
    """Point p' of each neuron."""
    left_antipodes: Int[np.ndarray, " k"]
    """Point opposite to each point of B where B is symmetric; otherwise the point itself."""
    right_antipodes: Int[np.ndarray, " k2"]
    """Point opposite to each point of B' where B' is symmetric; otherwise the point itself."""
    scale: Float32[np.ndarray, " neuron"]
    """s_i of each neuron."""
    table: Float32[np.ndarray, "k k2"]
    """T, the interaction at each two points."""
    left_vectors: Float[np.ndarray, "k d"]
    """Vectors of B: for drawings only, no bound uses them."""
    right_vectors: Float[np.ndarray, "k2 d"]
    """Vectors of B': for drawings only, no bound uses them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """Everything that the prover claims."""

    dead: Bool[np.ndarray, " width"]
    """Neurons too weak to look at: the most they could do is taken off every margin."""
    representative_of: Int[np.ndarray, " width"]
    """Cluster representative that each neuron is about a multiple of; may be itself."""
    scale_factors: Float32[np.ndarray, " width"]
    """Multiple c of each neuron. Where it is negative, relu(-t) = relu(t) - t is used."""
    representatives: Int[np.ndarray, " neuron"]
    """Cluster representatives, in the order of all arrays that follow."""
    exponents: Int[np.ndarray, " neuron"]
    """Powers k: neuron i is taken with left and right times 2^k and unembed times 2^-k, which
    changes nothing and is exact; it makes the errors of all neurons comparable."""
    additive_x: Float32[np.ndarray, "order neuron"]
    """A_i(x): the part of each neuron, so scaled, that depends on x alone."""
    additive_y: Float32[np.ndarray, "neuron order"]
    """B_i(y): the part that depends on y alone. The remainder is the interaction I_i."""
    block_offsets: Int[np.ndarray, " offset"]
    """First neuron of each block whose residuals are bounded together, and the end of the last
    block. Each grid is one block."""
    circuits: tuple[IrrepCircuit, ...]
    """Circuits, which may share neurons."""
    grids: tuple[Grid, ...]
    """Grids, which share no neurons."""
    second_stage_budget: float = 0.0
    """Multiply-adds that the second stage may use, as a share of those of brute force."""
    third_stage_budget: float = 0.0
    """Multiply-adds that the third stage may use, which tries pairs outright."""
