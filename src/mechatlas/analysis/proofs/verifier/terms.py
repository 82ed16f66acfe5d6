"""All terms of a bound that do not depend on the pair, prepared once, and all rounding.

    build_terms   weights, group, explanation -> Terms
    Terms         arrays for the loop over pairs, and bounds on rounding

See `verify` for the formula.
"""

import dataclasses
from types import ModuleType

import numpy as np
from jaxtyping import Float, Float32, Int

from mechatlas.analysis.proofs.verifier import checks
from mechatlas.analysis.proofs.verifier.checks import (
    LARGEST,
    TINIEST,
    U32,
    U64,
    KnownActions,
    KnownIrreps,
    growth,
)
from mechatlas.analysis.proofs.verifier.explanation import ProofError
from mechatlas.analysis.proofs.verifier.packing import Packed
from mechatlas.analysis.proofs.verifier.structures import (
    AdditiveLosses,
    CircuitTerms,
    ClassMinima,
    FirstStage,
    MergedNetwork,
    Neurons,
    PackedCircuits,
    PairSum,
    SecondStage,
    TableIndex,
    Weights,
)

BINS = 12
"""Largest number of bins that conjugacy classes are put into."""
GIVE_UP_SHARE = 0.1
"""Share of certified pairs below which the second stage ends; where after it less than a fiftieth
of the first pairs is certified, the verification ends."""


@dataclasses.dataclass(frozen=True, eq=False)
class Terms:
    """Terms of a bound that do not depend on the pair. Neurons are cluster representatives."""

    weights: Weights
    """Network as it was given."""
    neurons: Neurons
    """Cluster representatives: l, A, r, B, s, and blocks."""
    lookup: TableIndex
    """Tables T of the grids."""
    circuits: CircuitTerms
    """M_i, rho(x) Vm and rho of the circuits."""
    first: FirstStage
    """Ideal margins, losses and rounding."""
    second: SecondStage
    """Logits of the second stage, and its limits."""
    prepared: int
    """Multiply-adds of the preparation."""
    first_cost: int
    """Multiply-adds for one pair in the first stage."""
    frame_cost: int
    """Multiply-adds for moving V of one pair into the frame of x and y."""
    second_cost: int
    """Multiply-adds for one pair in the second stage."""
    third_cost: int
    """Multiply-adds for one pair in the third stage."""


def build_terms(
    weights: Weights,
    packed: Packed,
    irreps: KnownIrreps,
    actions: KnownActions,
    loops: ModuleType,
) -> Terms:
    """Prepare a bound.

    Args:
        weights: The network.
        packed: The explanation, from `check`.
        irreps: Facts about the irreps of the circuits, from `check`.
        actions: Facts about the actions of the grids, from `check`.
        loops: See `checks.choose_loops`.

    Raises:
        ProofError: Numbers are so large or so small that rounding cannot be bounded.
    """
    group, rho = irreps.group, irreps.rho
    n, m, blocks = group.order, packed.width, packed.block_offsets
    k, d = len(packed.layout.representatives), packed.circuits.shapes[:, 0]
    merged = _merge(weights, packed, loops)
    residual, sizes = _unembedding_residual(merged.unembed, packed.circuits, rho)
    inner = packed.circuits.means @ rho  # gamma(g) = <Vm, 1 - rho(g)>
    gaps = inner[group.identity] - inner[irreps.elements]
    index = _index_tables(packed, actions, loops)
    weight = merged.mass + 1.01 * np.sqrt(packed.widest) * sizes
    inflate = 1 + 1.01 * growth(2 * k + packed.widest**2 + len(d) + len(blocks) + 64, U32)
    spans, means = _spans(residual, weight, packed, loops)
    errors = _residual_distances(residual, packed, inflate, loops)
    sums, n_cells = _additive_logits(packed, merged), len(packed.grids.tables)
    cells, (x_loss, y_loss) = spans.max(axis=1), sums.max(axis=2, keepdims=True) - sums
    losses = AdditiveLosses(x_loss + cells, y_loss, cells)
    rate = _rounding_rate(packed, len(rho)) + 16 * irreps.defect
    slack = _slack(packed, merged, weight, rate, index, means)
    classes = group.class_of[irreps.elements]
    bins = _class_minima(gaps, irreps.norms, classes, inflate)
    return Terms(
        weights=weights,
        neurons=Neurons(
            merged.sides[0], packed.layout.additive_x, merged.sides[1], packed.layout.additive_y,
            packed.grids.scale, blocks,
        ),
        lookup=index,
        circuits=CircuitTerms(
            packed.circuits.shapes, packed.circuits.coefficients,
            packed.circuits.means.astype(np.float32), rho,
        ),
        first=FirstStage(
            bins, losses, errors, slack, checks.float32_errors(weights), inflate,
            irreps.differences[bins.order[: n - 1]],
            4.4 * packed.widest**0.5 * growth(packed.widest + 4, U32) / rate,
        ),
        second=SecondStage(irreps.distinct, sums, spans, 0, GIVE_UP_SHARE),
        prepared=n * n * (3 * k + n_cells) + n * (k * len(rho) + m),
        first_cost=3 * k + int((d**3 + d**2 * (packed.circuits.shapes[:, 2] + 1)).sum())
        + 8 * (len(d) + len(blocks)),
        frame_cost=int(2 * (d**3).sum()),
        second_cost=n * (len(irreps.distinct.rows) + 4),
        third_cost=n * m,
    )  # fmt: skip


def _merge(weights: Weights, packed: Packed, loops: ModuleType) -> MergedNetwork:
    """Merge clusters of neurons, and scale all weights by powers of two."""
    representatives = packed.layout.representatives
    factor = np.ldexp(np.float32(1), packed.layout.exponents).astype(np.float32)
    k, (width, n) = len(representatives), weights.unembed.shape
    sides, place = np.empty((2, width, n), np.float32), np.zeros(width, np.int64)
    sides[0], sides[1] = weights.left.T, weights.right.T
    place[representatives] = np.arange(k)
    unembed, linear = np.zeros((2, k, n), np.float32)
    out = MergedNetwork(
        np.zeros((2, k, n), np.float32), unembed, linear, np.zeros(k, bool), np.zeros(k),
        np.zeros((2, n)),
    )  # fmt: skip
    dense = np.ascontiguousarray(weights.unembed)
    is_small = loops.merge_neurons(sides, dense, packed.clusters, place, factor, out)
    # Scaling is exact unless it leaves the normal numbers; a weight may itself be below them.
    if is_small and not np.array_equal(out.sides / factor[:, None], sides[:, representatives]):
        raise ProofError("The exponents make weights too small for float32.")
    return out


def _unembedding_residual(
    u: Float32[np.ndarray, "neuron order"],
    circuits: PackedCircuits,
    rho: Float32[np.ndarray, "entry order"],
) -> tuple[Float32[np.ndarray, "neuron order"], Float[np.ndarray, " neuron"]]:
    """Subtract <M_i, rho(z)> from u_i(z).

    Args:
        u: u_i(z).
        circuits: Circuits with their M_i.
        rho: Matrix entries of their irreps.

    Returns:
        e_i(z), and the sum of the norms of all M_i of each neuron.
    """
    starts = np.cumsum(np.square(circuits.shapes[:, 0])) - np.square(circuits.shapes[:, 0])
    squares = np.square(circuits.coefficients, dtype=np.float64)
    sizes = np.sqrt(np.add.reduceat(squares, starts, axis=0)) if len(starts) else squares
    return u - circuits.coefficients.T @ rho, sizes.sum(axis=0)


def _index_tables(p: Packed, actions: KnownActions, loops: ModuleType) -> TableIndex:
    """Lay out the tables of all grids, which may turn out to be impossible."""
    k, (n, _), cells = len(p.grids.scale), actions.packed.images.shape, len(p.grids.tables)
    index = TableIndex(
        np.full(k, cells, np.int64), np.zeros(k, np.int64), actions.packed.inverse,
        np.zeros((cells + 1, n), np.float32), np.zeros(k, np.float32),
    )  # fmt: skip
    fault = loops.index_tables(p.grids, actions.packed._replace(sides=p.sides), index)
    if fault:
        raise ProofError(checks.FAULTS[fault])
    return index


def _spans(
    residual: Float32[np.ndarray, "neuron order"],
    weight: Float[np.ndarray, " neuron"],
    p: Packed,
    loops: ModuleType,
) -> tuple[Float32[np.ndarray, "order order"], tuple[float, float]]:
    """Bound how much the residual within the cells of all grids could take, for each two answers.

    Args:
        residual: e_i(z).
        weight: Largest |u_i|, and sum of the norms of M_i, of each neuron.
        p: The explanation.
        loops: See `checks.choose_loops`.

    Returns:
        The bounds, and what `reference.sum_cells` returns.
    """
    n, shapes = residual.shape[1], p.grids.shapes
    cells, spans = np.zeros((len(p.grids.tables), n)), np.zeros((n, n), np.float32)
    means = loops.sum_cells(residual, weight, p.grids, cells)
    for start, size in zip(shapes[:, 6], shapes[:, 2] * shapes[:, 3], strict=True):
        mine = cells[start : start + size].astype(np.float32)
        loops.add_distances(mine, 8 * growth(4 * p.largest + 64, U32), spans)
    spans *= np.float32(1.000002 + 2.0**-22 * len(shapes))
    return spans, means


def _residual_distances(
    residual: Float32[np.ndarray, "neuron order"], p: Packed, inflate: float, loops: ModuleType
) -> Float32[np.ndarray, "block order"]:
    """Bound the distance of each column e(z) from any other one, in each block of neurons.

    The loss of z against w to D is <e(z) - e(w), D> <= |e(z) - e(w)| |D| in each block.

    Args:
        residual: e_i(z).
        p: The explanation.
        inflate: Factor for rounding in the sums that these distances enter.
        loops: See `checks.choose_loops`.
    """
    n, blocks = residual.shape[1], p.block_offsets
    errors, rate = np.zeros((len(blocks) - 1, n), np.float32), growth(4 * len(residual) + 64, U32)
    for b, error in enumerate(errors):
        distances = np.zeros((n, n), np.float32)
        loops.add_distances(residual[blocks[b] : blocks[b + 1]], 8 * rate, distances)
        error[:] = inflate * distances.max(axis=1)
    return errors


def _class_minima(
    gaps: Float[np.ndarray, " element"],
    norms: Float[np.ndarray, "element circuit"],
    classes: Int[np.ndarray, " element"],
    inflate: float,
) -> ClassMinima:
    """Take the least gap and the largest norms of each bin of the group without the identity.

    A bin is a conjugacy class, or classes with about the same gap.

    Args:
        gaps: Ideal margin gamma(g).
        norms: Frobenius norm of 1 - rho(g), of each circuit.
        classes: Conjugacy class of each element, ascending from 1.
        inflate: Factor for rounding in the sums that the norms enter.
    """
    if not len(gaps):  # the trivial group has no other answers
        classes, gaps, norms = (
            np.ones(1, np.int64),
            np.full(1, np.inf),
            np.zeros((1, norms.shape[1])),
        )
    order, labels = np.arange(len(gaps)), classes
    if classes[-1] > BINS:
        least = np.minimum.reduceat(gaps, np.flatnonzero(np.diff(classes, prepend=0)))
        share = (least - least.min()) / max(float(np.ptp(least)), 1e-300)
        labels = np.minimum((share * BINS).astype(int), BINS - 1)[classes - 1]
        order = np.argsort(labels, kind="stable")
        gaps, norms, labels = gaps[order], norms[order], labels[order]
    starts = np.flatnonzero(np.diff(labels, prepend=-1))
    return ClassMinima(
        np.minimum.reduceat(gaps, starts).astype(np.float32),
        (np.maximum.reduceat(norms, starts, axis=0) * inflate).astype(np.float32),
        order, np.append(starts, len(gaps)),
    )  # fmt: skip


def _slack(
    p: Packed,
    merged: MergedNetwork,
    weight: Float[np.ndarray, " neuron"],
    rate: float,
    index: TableIndex,
    cells: tuple[float, float],
) -> PairSum:
    """Bound the rounding of the verification, and all that was left out.

    Args:
        p: The explanation.
        merged: The merged network.
        weight: Largest |u_i|, and sum of the norms of M_i, of each neuron.
        rate: Relative rounding of the bound, per unit of all its terms.
        index: Tables of the grids.
        cells: Loss owed to means of the tables, and more than the largest number in a cell.
    """
    # In float32 these sums are off by less than a thousandth, which the 1.01 covers.
    small = (1.01 * rate * weight).astype(np.float32)
    sizes = np.abs(merged.sides)
    sizes[0] += np.abs(p.layout.additive_x.T)
    sizes[1] += np.abs(p.layout.additive_y)
    sums, size = small @ sizes, float(sizes.sum())
    framed = 1.01 * p.widest * float(np.abs(p.circuits.means).sum())
    size += float(index.largest.sum())
    most = framed + float(weight.max(initial=0))
    lost = cells[0] + _below_normal(p) * (1 + size) * (1 + most)
    constant = rate * framed + float(small @ index.largest) + lost + 1e-12
    x_slack, y_slack = sums.astype(np.float64) + 1.0001 * merged.losses
    x_slack += constant
    # Now squares of all that is added up are finite in float32, and NaN is nowhere.
    if not (max(size, most, cells[1]) < LARGEST and x_slack.max() + y_slack.max() < 1e10):
        raise ProofError("The explanation has absurd sizes: rounding could be anything.")
    return PairSum(x_slack, y_slack)


def _rounding_rate(p: Packed, rows: int) -> float:
    """Relative rounding of a bound, per unit of the sum of the absolute values of all its terms."""
    k = len(p.layout.representatives)
    single = growth(k + 3 * p.widest + 24, U32)  # matrices V, and Vm in its frame
    single += growth(2 * k + 8, U32)  # additive parts
    single += growth(p.width + rows + 16, U32)  # u, and the residual e
    single += growth(rows + 8, U32)  # logits of the second stage, or margins over bins
    single += growth(len(p.circuits.shapes) + 32, U32)  # the rest of a sum
    double = growth(16 * (k + p.width + 64) + 8 * p.largest + p.widest**2, U64)
    return 2.2 * single + 8 * double * (1 + p.largest)


def _below_normal(p: Packed) -> float:
    """Loss below the normal numbers, per unit of a weight and of a value.

    Each product loses `TINIEST`, but a root of a sum of k squares as much as the root of k of
    them: values below 1e-19 can vanish, and are then multiplied by what they stand beside.
    """
    k, circuits = len(p.layout.representatives), len(p.circuits.shapes)
    terms = p.width + 2 * k + p.largest + circuits * p.widest**2 + 64
    return 16 * terms * TINIEST**0.5


def _additive_logits(p: Packed, merged: MergedNetwork) -> Float32[np.ndarray, "2 order order"]:
    """Sum the additive parts, and the linear parts of mirrored neurons, into each logit."""
    u, mirrored = merged.unembed, merged.mirrored
    sums = np.stack([p.layout.additive_x @ u, p.layout.additive_y.T @ u])
    linear = merged.linear[mirrored]
    if len(linear):
        sums += merged.sides[:, mirrored].transpose(0, 2, 1) @ linear
    return sums
