"""Everything of a bound that does not depend on the pair, prepared once.

    build_terms   weights, group, explanation -> Terms
    Terms         arrays for the inner loops, and bounds on rounding

See `verify` for the formula.
"""

import dataclasses

import numpy as np
from jaxtyping import Float32, Int

from mechatlas.analysis.proofs import checks
from mechatlas.analysis.proofs.checks import (
    LARGEST,
    TINIEST,
    U32,
    U64,
    KnownActions,
    KnownIrreps,
    Weights,
    growth,
)
from mechatlas.analysis.proofs.explanation import Explanation, ProofError
from mechatlas.analysis.proofs.packing import Packed

BINS = 12
"""Conjugacy classes are put together until there are no more than this."""


@dataclasses.dataclass(eq=False)
class Terms:
    """Arrays for the inner checks.loops. Neurons are those that stand for themselves."""

    neurons: tuple[np.ndarray, ...]
    blocks: Int[np.ndarray, " start"]
    lookup: tuple[np.ndarray, ...]
    circuits: tuple[np.ndarray, ...]
    bins: tuple[np.ndarray, np.ndarray]
    losses: tuple[np.ndarray, np.ndarray, np.ndarray]
    merged: tuple[np.ndarray, ...]
    sums: tuple[np.ndarray, np.ndarray]
    spans: Float32[np.ndarray, "order order"]
    weights: Weights
    slack: tuple[np.ndarray, np.ndarray]
    """Bounds on rounding in the verification and on all that was left out: of x, of y."""
    run: tuple[np.ndarray, np.ndarray]
    """Bound on the error of a margin when the network runs in float32: of x, of y."""
    inflate: float
    """What makes up for rounding in sums of losses, which are never negative."""
    prepared: int
    """Multiply-adds of the preparation."""
    first_cost: int
    """Multiply-adds for one pair in the first stage."""
    second_cost: int
    third_cost: int
    span_losses: Float32[np.ndarray, " order"]


def build_terms(
    weights: Weights,
    e: Explanation,
    packed: Packed,
    irreps: KnownIrreps,
    actions: KnownActions,
) -> Terms:
    """Prepare a bound.

    Args:
        weights: left, right, unembed.
        e: What was claimed.
        packed: The same, from `check`.
        irreps: What is known of the irreps of the circuits, from `check`.
        actions: What is known of the actions of the grids, from `check`.

    Raises:
        ProofError: Numbers are so large or so small that rounding cannot be bounded.
    """
    p, do, group = packed, checks.loops, irreps.group
    n, k, m, rho = group.order, len(e.order), p.width, irreps.rho
    left, right, u, linear, mirrored, mass, x_lost, y_lost = _reduce(weights, e)
    rest, sizes = do.project(u, p.circuits, p.weights, rho)
    framed, gaps = do.frame(p.circuits, p.means, rho, group.identity)
    *lookup, tables, tops = do.look_up(
        p.grids, p.sides, actions.offsets, p.points, p.scale, p.tables, actions.whole
    )
    weight = mass + 1.01 * np.sqrt(p.widest) * sizes
    inflate = 1 + 1.01 * growth(2 * k + p.widest**2 + len(p.circuits) + len(e.blocks) + 64, U32)
    spans, off_centre, in_cells, cells = do.span(
        rest, weight, p.grids, p.points, p.antipodes, p.scale, p.tables,
        8 * growth(4 * p.largest + 64, U32),
    )  # fmt: skip
    errors = do.farthest(rest, e.blocks, 8 * growth(4 * k + 64, U32), inflate)
    x_sums, y_sums = _sums(e, left, right, u, linear[mirrored], mirrored)
    *losses, span_losses = do.lose(x_sums, y_sums, spans)
    rate = _rounding_rate(p, k, len(rho)) + 16 * irreps.defect
    # In float32 these sums are off by less than a thousandth, which the 1.01 covers.
    small = (1.01 * rate * weight).astype(np.float32)
    x_slack, y_slack, size = do.weigh(left, e.row, right, e.column, small)
    frames, size = 1.01 * p.widest * float(np.abs(p.means).sum()), size + float(tops.sum())
    most = frames + float(weight.max(initial=0))
    lost = off_centre + _below_normal(p, k) * (1 + size) * (1 + most)
    constant = rate * frames + float(small @ tops) + lost + 1e-12
    x_slack = x_slack.astype(np.float64) + 1.0001 * x_lost + constant
    y_slack = y_slack.astype(np.float64) + 1.0001 * y_lost
    # Now squares of all that is added up are finite in float32, and NaN is nowhere.
    if not (max(size, most, in_cells) < LARGEST and x_slack.max() + y_slack.max() < 1e10):
        raise ProofError("The explanation has absurd sizes: rounding could be anything.")
    d, classes = p.circuits[:, 0], (group.class_of, int(group.class_of.max()) + 1)
    return Terms(
        neurons=(left, e.row, right, e.column, p.scale),
        blocks=e.blocks,
        lookup=(*lookup, actions.inverse, tables),
        circuits=(p.circuits, p.weights, framed, rho),
        bins=do.class_bins(gaps, irreps.norms, *classes, BINS, inflate),
        losses=(*losses, errors),
        merged=irreps.merged,
        sums=(x_sums, y_sums),
        spans=spans,
        weights=weights,
        slack=(x_slack, y_slack),
        run=checks.float32_errors(weights),
        inflate=inflate,
        prepared=n * n * (3 * k + cells) + n * len(p.weights) + n * m,
        first_cost=3 * k + len(p.weights) + int((d**3 + d**2).sum()) + 8 * (len(d) + len(e.blocks)),
        second_cost=n * (len(irreps.merged[-1]) + 4),
        third_cost=n * m,
        span_losses=span_losses,
    )  # fmt: skip


def _reduce(weights: Weights, e: Explanation) -> tuple[np.ndarray, ...]:
    """Neurons that are multiples of others are merged, and all is scaled by powers of two.

    Raises:
        ProofError: A product is not exact in float32.
    """
    factor = np.ldexp(np.float32(1), e.exponents).astype(np.float32)
    standing = (e.silent, e.leaders, e.ratios)
    *found, tiny = checks.loops.reduce(weights, standing, e.order, factor)
    if tiny:  # exact unless it leaves the normal numbers; a weight may itself be below them
        for after, before in ((found[0].T, weights[0]), (found[1], weights[1])):
            if not np.array_equal(after / factor[:, None], before[:, e.order].T):
                raise ProofError("The exponents make weights too small for float32.")
    return tuple(found)


def _rounding_rate(p: Packed, k: int, rows: int) -> float:
    """Error of a bound per unit of the sum of the absolute values of all its terms."""
    single = growth(k + 3 * p.widest + 24, U32)  # matrices V, and the mean in a frame
    single += growth(2 * k + 8, U32)  # additive parts
    single += growth(p.width + p.widest**2 + 16, U32)  # u and what of it is not explained
    single += growth(rows + 8, U32)  # logits of the second stage
    single += growth(len(p.circuits) + 32, U32)  # the rest of a sum
    double = growth(16 * (k + p.width + 64) + 8 * p.largest + p.widest**2, U64)
    return 2.2 * single + 8 * double * (1 + p.largest)


def _below_normal(p: Packed, k: int) -> float:
    """What is lost below the normal numbers, per unit of a weight and of a value.

    Each product loses `TINIEST`, but a root of a sum of k squares as much as the root of k of
    them: values below 1e-19 can vanish, and are then multiplied by what they stand beside.
    """
    terms = p.width + 2 * k + p.largest + len(p.circuits) * p.widest**2 + 64
    return 16 * terms * TINIEST**0.5


def _sums(e: Explanation, left, right, u, linear, mirrored) -> tuple[np.ndarray, np.ndarray]:
    """What additive parts, and the linear parts of mirrored neurons, give each logit."""
    x_sums, y_sums = e.row @ u, e.column.T @ u
    if len(linear):
        x_sums += left[:, mirrored] @ linear
        y_sums += right[mirrored].T @ linear
    return x_sums, y_sums
