"""Everything of a bound that does not depend on the pair, prepared once.

    build_terms   weights, group, explanation -> Terms
    Terms         arrays for the inner loops, and bounds on rounding

See `verify` for the formula.
"""

import dataclasses
import itertools

import numpy as np
from jaxtyping import Float, Float32, Int

from mechatlas.analysis.proofs import checks
from mechatlas.analysis.proofs.checks import U32, U64, KnownIrrep, growth, inverse_action
from mechatlas.analysis.proofs.explanation import Explanation, ProofError
from mechatlas.maths.groups import Group

BINS = 12
"""Conjugacy classes are put together until there are no more than this."""

Weights = tuple[
    Float32[np.ndarray, "order neuron"],
    Float32[np.ndarray, "order neuron"],
    Float32[np.ndarray, "neuron order"],
]


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
    weights: Weights, group: Group, e: Explanation, defect: float, known: list[KnownIrrep]
) -> Terms:
    """Prepare a bound.

    Args:
        weights: left, right, unembed.
        group: The group.
        e: What was claimed.
        defect: How far its irreps are from homomorphisms, from `check`.
        known: What is known of the irrep of each circuit, from `check`.

    Raises:
        ProofError: Numbers are so large or so small that rounding cannot be bounded.
    """
    n, k = group.order, len(e.order)
    left, right, u, v, mirrored, mass, x_lost, y_lost = _reduce(weights, e)
    rest, sizes, circuits = _circuits(e, known, u)
    scale, lookup, tops = _lookup(e, group)
    x_sums, y_sums = _sums(e, left, right, u, v[mirrored], mirrored)
    widest = int(circuits[0].max(initial=1))
    several = 2 * k + widest**2 + len(e.circuits) + len(e.blocks) + 64
    inflate = 1 + 1.01 * growth(several, U32)
    weight = mass + 1.01 * np.sqrt(widest) * sizes
    spans, off_centre, cell_cost = _spans(e, rest, weight)
    errors = np.array([_farthest(rest[a:b]) for a, b in itertools.pairwise(e.blocks)])
    *losses, span_losses = checks.loops.lose(x_sums, y_sums, spans)
    errors = (errors.reshape(-1, n) * inflate).astype(np.float32)
    rate = _rounding_rate(e, len(circuits[-1])) + 16 * defect
    # In float32 these sums are off by less than a thousandth, which the 1.01 covers.
    small = (1.01 * rate * weight).astype(np.float32)
    of_x, of_y = checks.loops.weigh(left, e.row, right, e.column, small)
    frames = sum(
        1.01 * c.matrices.shape[1] * float(np.sqrt(np.vdot(c.mean, c.mean))) for c in e.circuits
    )
    constant = rate * frames + float(small @ tops) + off_centre + 1e-12
    of_x = of_x.astype(np.float64) + 1.0001 * x_lost + constant
    of_y = of_y.astype(np.float64) + 1.0001 * y_lost
    if not max(of_x.max() + of_y.max(), mass.max(initial=0)) < 1e20:
        raise ProofError("The explanation has absurd sizes: rounding could be anything.")
    merged = _merge(known)
    d = circuits[0]
    m = len(weights[2])
    return Terms(
        neurons=(left, e.row, right, e.column, scale),
        blocks=e.blocks,
        lookup=lookup,
        circuits=circuits,
        bins=_bins(e, group, known, inflate),
        losses=(*losses, errors),
        merged=merged,
        sums=(x_sums, y_sums),
        spans=spans,
        weights=weights,
        slack=(of_x, of_y),
        run=_float32_parts(weights),
        inflate=inflate,
        prepared=n * n * (3 * k + cell_cost) + n * int(circuits[3].size) + n * m,
        first_cost=3 * k + int((circuits[2] * d**2 + d**3 + d**2).sum())
        + 8 * (len(d) + len(e.blocks)),
        second_cost=n * (len(merged[-1]) + 4),
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
    *found, least = checks.loops.reduce(weights, standing, e.order, factor)
    if least < 2.0**-80:  # exact unless it leaves the normal numbers
        for after, before in ((found[0].T, weights[0]), (found[1], weights[1])):
            if not np.array_equal(after / factor[:, None], before[:, e.order].T):
                raise ProofError("The exponents make weights too small for float32.")
    return tuple(found)


def _rounding_rate(e: Explanation, rows: int) -> float:
    """Error of a bound per unit of the sum of the absolute values of all its terms."""
    k = len(e.order) + len(e.leaders)
    widest = max((c.matrices.shape[1] for c in e.circuits), default=1)
    cells = max((g.table.size for g in e.grids), default=1)
    single = growth(len(e.order) + 3 * widest + 24, U32)  # matrices V, and the mean in a frame
    single += growth(2 * len(e.order) + 8, U32)  # additive parts
    single += growth(len(e.leaders) + widest**2 + 16, U32)  # u and what of it is not explained
    single += growth(rows + 8, U32)  # logits of the second stage
    single += growth(len(e.circuits) + 32, U32)  # the rest of a sum
    double = growth(16 * (k + 64) + 8 * cells + widest**2, U64) * (1 + cells)
    return 2.2 * single + 8 * double


def _float32_parts(weights: Weights) -> tuple[np.ndarray, np.ndarray]:
    """Bound on the error of a margin when the network runs in float32: of x and of y.

    For each logit m + 2 operations in a row on terms of at most max |u_i| (relu(l) + relu(r)).
    """
    rate = 2.05 * growth(len(weights[2]) + 2, U32)
    of_x, of_y = checks.loops.weigh_run(*weights, rate)
    tiny = 1e-30 * (1 + float(np.abs(weights[2]).max()) * len(weights[2]))  # below normal numbers
    return of_x.astype(np.float64) + tiny, of_y.astype(np.float64)


def _sums(e: Explanation, left, right, u, linear, mirrored) -> tuple[np.ndarray, np.ndarray]:
    """What additive parts, and the linear parts of mirrored neurons, give each logit."""
    x_sums, y_sums = e.row @ u, e.column.T @ u
    if len(linear):
        x_sums += left[:, mirrored] @ linear
        y_sums += right[mirrored].T @ linear
    return x_sums, y_sums


def _circuits(e: Explanation, known: list[KnownIrrep], u: Float32[np.ndarray, "neuron order"]):
    """What of the unembedding is not explained, sizes of the M_i, and arrays for the loops."""
    n = u.shape[1]
    rest, sizes = u.copy(), np.zeros(len(u))
    flat, of_x, of_y, framed, rho = [], [], [], [], []
    for c, irrep in zip(e.circuits, known, strict=True):
        count = c.weights.shape[1]
        mine = slice(c.start, c.start + count)
        rest[mine] -= c.weights.T @ irrep.rho
        sizes[mine] += checks.loops.sizes_of(c.weights)
        flat.append(c.weights.ravel())
        of_x.append(e.row[:, mine] @ c.weights.T)
        of_y.append(c.weights @ e.column[mine])
        framed.append((c.matrices.reshape(-1, len(c.mean)) @ c.mean).reshape(n, -1))
        rho.append(irrep.rho)
    empty = [np.zeros((0, n), np.float32)]
    arrays = (
        np.array([c.matrices.shape[1] for c in e.circuits], np.int64),
        np.array([c.start for c in e.circuits], np.int64),
        np.array([c.weights.shape[1] for c in e.circuits], np.int64),
        np.concatenate(flat) if flat else np.zeros(0, np.float32),
        np.concatenate(of_x or [empty[0].T], axis=1),
        np.concatenate(of_y or empty),
        np.concatenate(framed or [empty[0].T], axis=1).astype(np.float32),
        np.concatenate(rho or empty),
    )
    return rest, sizes, arrays


def _lookup(e: Explanation, group: Group):
    """Scales, where each neuron finds its table, and the largest of s T."""
    k, n = len(e.order), group.order
    scale, top = np.zeros(k, np.float32), np.zeros(k, np.float32)
    first, points = np.zeros(k, np.int64), np.zeros(k, np.int64)
    moves = [np.zeros((n, 1), np.int64)]
    tables = np.zeros((1 + sum(g.table.size for g in e.grids), n), np.float32)
    base = width = 1
    for grid in e.grids:
        mine = slice(grid.start, grid.start + len(grid.scale))
        size = len(grid.table)
        scale[mine] = grid.scale
        first[mine] = base + grid.right_points * size
        points[mine] = width + grid.left_points
        moves.append(inverse_action(grid.left_action, group))
        most = checks.loops.lay_tables(grid.table, grid.right_action, tables, base)
        top[mine] = np.abs(grid.scale) * np.float32(1.0001 * most)
        base += grid.table.size
        width += size
    every = (first, points, np.concatenate(moves, axis=1), tables)
    return scale, every, top


def _spans(e: Explanation, rest: Float32[np.ndarray, "neuron order"], weight):
    """How much the cells of all grids could take, for each two answers.

    Also what they could because a table has row or column means, and the number of cells.
    """
    n = rest.shape[1]
    spans, off_centre, cells = np.zeros((n, n), np.float32), 0.0, 0
    for grid in e.grids:
        mine = slice(grid.start, grid.start + len(grid.scale))
        taken, count = checks.loops.add_spans(
            rest[mine], (grid.left_points, grid.right_points),
            (grid.left_antipodes, grid.right_antipodes), grid.scale, grid.table,
            weight[mine], growth(4 * grid.table.size + 64, U32) * 8, spans,
        )  # fmt: skip
        off_centre += taken
        cells += count + 2
    spans *= np.float32(1 + 2e-6)
    return spans, off_centre, cells


def _farthest(vectors: Float32[np.ndarray, "any order"]) -> Float[np.ndarray, " order"]:
    """Upper bound on the distance of each column from any other."""
    return checks.loops.farthest(vectors, growth(4 * len(vectors) + 64, U32) * 8)


def _bins(e: Explanation, group: Group, known: list[KnownIrrep], inflate: float):
    """Least ideal margin and largest norms of 1 - rho(g), for parts of the group but 1."""
    n = group.order
    gaps, norms = np.zeros(n), np.zeros((n, len(known)))
    for c, (circuit, irrep) in enumerate(zip(e.circuits, known, strict=True)):
        inner = circuit.mean.ravel() @ irrep.rho64
        gaps += inner[group.identity] - inner
        norms[:, c] = irrep.norms
    classes = int(group.class_of.max()) + 1
    return checks.loops.class_bins(gaps, norms, group.class_of, classes, BINS, inflate)


def _merge(known: list[KnownIrrep]) -> tuple[np.ndarray, ...]:
    """Rows of V that meet the same row of rho, up to sign: which, signs, to which, and rho."""
    rows, signs, to, rho = [], [], [], [np.zeros((0, 0), np.float32)]
    base = count = 0
    for irrep in known:
        rows.append(base + np.arange(len(irrep.merged[0])))
        signs.append(irrep.merged[0])
        to.append(count + irrep.merged[1])
        rho.append(irrep.merged[2])
        base, count = base + len(rows[-1]), count + len(rho[-1])
    if not known:
        none = np.zeros(0, np.int64)
        return none, none.astype(np.float32), none, rho[0]
    return np.concatenate(rows), np.concatenate(signs), np.concatenate(to), np.concatenate(rho[1:])
