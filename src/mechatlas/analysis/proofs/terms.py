"""Everything of a bound that does not depend on the pair, prepared once.

    build_terms   weights, group, explanation -> Terms
    Terms         arrays for the inner loops, and bounds on rounding

See `verify` for the formula.
"""

import dataclasses
import itertools

import numpy as np
from jaxtyping import Float, Float32, Int

from mechatlas.analysis.proofs.checks import U32, U64, Known, growth
from mechatlas.analysis.proofs.explanation import Explanation, Grid, ProofError
from mechatlas.maths.groups import Group

try:
    from mechatlas.analysis.proofs import kernels as loops
except ImportError:  # numba is missing: slower, and tested to be the same
    from mechatlas.analysis.proofs import plain as loops

BINS = 12
"""Conjugacy classes are put together until there are no more than this."""

Weights = tuple[
    Float32[np.ndarray, "order neuron"],
    Float32[np.ndarray, "order neuron"],
    Float32[np.ndarray, "neuron order"],
]


@dataclasses.dataclass(eq=False)
class Terms:
    """Arrays for the inner loops. Neurons are those that stand for themselves."""

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
    weights: Weights, group: Group, e: Explanation, defect: float, known: list[Known]
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
    left, right, u, v, mass, x_lost, y_lost = _reduce(weights, e)
    rest, sizes, circuits = _circuits(e, known, u)
    scale, lookup, tops = _lookup(e, group)
    spans, cell_cost = _spans(e, rest)
    x_sums, y_sums = _sums(e, left, right, u, v)
    widest = int(circuits[0].max(initial=1))
    several = 2 * k + widest**2 + len(e.circuits) + len(e.blocks) + 64
    inflate = 1 + 1.01 * growth(several, U32)
    errors = np.array([_farthest(rest[a:b]) for a, b in itertools.pairwise(e.blocks)])
    span_losses = spans.max(axis=1) * np.float32(1 + 1e-6)
    losses = (
        x_sums.max(axis=1)[:, None] - x_sums + span_losses,
        y_sums.max(axis=1)[:, None] - y_sums,
        (errors.reshape(-1, n) * inflate).astype(np.float32),
    )
    weight = mass + 1.01 * np.sqrt(widest) * sizes
    rate = _rounding_rate(e, len(circuits[-1])) + 16 * defect
    # In float32 these sums are off by less than a thousandth, which the 1.01 covers.
    small = (1.01 * rate * weight).astype(np.float32)
    of_x = (np.abs(left) + np.abs(e.row)) @ small + float(small @ tops)
    of_y = small @ (np.abs(right) + np.abs(e.column))
    frames = sum(1.01 * c.matrices.shape[1] * float(np.linalg.norm(c.mean)) for c in e.circuits)
    constant = rate * frames + _off_centre(e, weight) + 1e-12
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
        losses=losses,
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
    *found, least = loops.reduce(weights, standing, e.order, factor)
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
    single += growth(rows + 8, U32)  # logits of the second stage
    single += growth(len(e.circuits) + 32, U32)  # the rest of a sum
    double = growth(16 * (k + 64) + 8 * cells + widest**2, U64) * (1 + cells)
    return 2.2 * single + 8 * double


def _float32_parts(weights: Weights) -> tuple[np.ndarray, np.ndarray]:
    """Bound on the error of a margin when the network runs in float32: of x and of y.

    For each logit m + 2 operations in a row on terms of at most max |u_i| (relu(l) + relu(r)).
    """
    left, right, unembed = weights
    every = np.maximum(unembed.max(axis=1), -unembed.min(axis=1))
    run = (2.04 * growth(len(every) + 2, U32) * every).astype(np.float32)
    tiny = 1e-30 * (1 + float(every.sum()))  # what falls below the normal numbers
    of_x = (np.maximum(left, 0) @ run).astype(np.float64) + tiny
    return of_x, (np.maximum(right, 0) @ run).astype(np.float64)


def _sums(e: Explanation, left, right, u, v) -> tuple[np.ndarray, np.ndarray]:
    """What additive parts, and the linear parts of mirrored neurons, give each logit."""
    single = u.astype(np.float32)
    x_sums, y_sums = e.row @ single, e.column.T @ single
    mirrored = np.flatnonzero(v.any(axis=1))
    if len(mirrored):
        few = v[mirrored].astype(np.float32)
        x_sums += left[:, mirrored] @ few
        y_sums += right[mirrored].T @ few
    return x_sums, y_sums


def _circuits(e: Explanation, known: list[Known], u: Float[np.ndarray, "neuron order"]):
    """What of the unembedding is not explained, sizes of the M_i, and arrays for the loops."""
    n = u.shape[1]
    rest, sizes = u.copy(), np.zeros(len(u))
    flat, of_x, of_y, framed, rho = [], [], [], [], []
    for c, irrep in zip(e.circuits, known, strict=True):
        count = c.weights.shape[1]
        mine = slice(c.start, c.start + count)
        rest[mine] -= c.weights.T.astype(np.float64) @ irrep.rho64
        sizes[mine] += np.sqrt(np.square(c.weights, dtype=np.float64).sum(axis=0))
        flat.append(c.weights.ravel())
        of_x.append(e.row[:, mine] @ c.weights.T)
        of_y.append(c.weights @ e.column[mine])
        framed.append((c.matrices @ c.mean).reshape(n, -1))
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
    moves, tables = [np.zeros((n, 1), np.int64)], [np.zeros((1, n), np.float32)]
    base = width = 1
    for grid in e.grids:
        mine = slice(grid.start, grid.start + len(grid.scale))
        size = len(grid.table)
        scale[mine] = grid.scale
        top[mine] = np.abs(grid.scale) * np.float32(1.0001 * np.abs(grid.table).max())
        # Row base + q k + p holds the table at p and where y takes q.
        first[mine] = base + grid.right_points * size
        points[mine] = width + grid.left_points
        moves.append(grid.left_action[group.inverses])
        tables.append(grid.table.T[grid.right_action.T].transpose(0, 2, 1).reshape(-1, n))
        base += grid.table.size
        width += size
    rows = np.ascontiguousarray(np.concatenate(tables))
    every = (first, points, np.concatenate(moves, axis=1), rows)
    return scale, every, top


def _spans(e: Explanation, rest: Float[np.ndarray, "neuron order"]):
    """How much the cells of all grids could take, for each two answers; and its cost."""
    n = rest.shape[1]
    spans, cost = np.zeros((n, n)), 0
    for grid in e.grids:
        cells = _centred_cells(grid, rest[grid.start : grid.start + len(grid.scale)])
        gram = cells.T @ cells
        rounding = growth(4 * len(cells) + 16, U64) * 8 * float(gram.diagonal().max(initial=0))
        size = 1.000001 * float(np.linalg.norm(grid.table.astype(np.float64)))
        loops.add_spans(gram, rounding, size, spans)
        cost += len(cells) + 2
    return (1.000001 * spans).astype(np.float32), cost


def _centred_cells(grid: Grid, rest: Float[np.ndarray, "neuron order"]) -> np.ndarray:
    """What the rests add up to in each cell, without row and column means.

    Of two opposite cells, which are the same, only one is kept, times the root of two.
    """
    k, k2 = grid.table.shape
    cell = np.zeros((k * k2, len(rest)))
    other = grid.left_antipodes[grid.left_points] * k2 + grid.right_antipodes[grid.right_points]
    neurons, half = np.arange(len(rest)), 0.5 * grid.scale.astype(np.float64)
    cell[grid.left_points * k2 + grid.right_points, neurons] += half
    cell[other, neurons] += half
    cell = cell.reshape(k, k2, -1)
    cell = cell - cell.mean(axis=0) - cell.mean(axis=1, keepdims=True) + cell.mean(axis=(0, 1))
    cell = cell.reshape(k * k2, -1)
    opposite = (grid.left_antipodes[:, None] * k2 + grid.right_antipodes).ravel()
    own = np.arange(k * k2)
    cell = cell[own <= opposite] * np.where(own == opposite, 1, np.sqrt(2))[own <= opposite, None]
    return cell @ rest


def _farthest(vectors: Float[np.ndarray, "any order"]) -> Float[np.ndarray, " order"]:
    """Upper bound on the distance of each column from any other."""
    if not len(vectors):
        return np.zeros(vectors.shape[1])
    gram = vectors.T @ vectors
    rounding = growth(4 * len(vectors) + 16, U64) * 8 * float(gram.diagonal().max(initial=0))
    return loops.spread(gram, rounding)


def _off_centre(e: Explanation, weight: np.ndarray) -> float:
    """Loss because a table has row or column means, which `_centred_cells` took out."""
    total = 0.0
    for grid in e.grids:
        t = grid.table.astype(np.float64)
        means = t.mean(axis=0) + t.mean(axis=1, keepdims=True) - t.mean()
        size = float(np.linalg.norm(means)) + growth(t.size + 8, U64) * float(np.linalg.norm(t)) * 4
        mine = weight[grid.start : grid.start + len(grid.scale)]
        total += 2 * size * float(mine @ np.abs(grid.scale)) * 1.01
    return total


def _bins(e: Explanation, group: Group, known: list[Known], inflate: float):
    """Least ideal margin and largest norms of 1 - rho(g), for parts of the group but 1."""
    n = group.order
    gaps, norms = np.zeros(n), np.zeros((n, len(known)))
    for c, (circuit, irrep) in enumerate(zip(e.circuits, known, strict=True)):
        inner = circuit.mean.ravel() @ irrep.rho64
        gaps += inner[group.identity] - inner
        norms[:, c] = irrep.norms
    by_class = np.argsort(group.class_of, kind="stable")
    starts = np.flatnonzero(np.diff(group.class_of[by_class], prepend=-1))
    # A pair x, y meets one element of each class; which one depends on y.
    gaps = np.minimum.reduceat(gaps[by_class], starts)[1:]
    norms = np.maximum.reduceat(norms[by_class], starts, axis=0)[1:]
    rank = np.argsort(gaps, kind="stable")
    edges = np.unique(np.linspace(0, len(rank), min(BINS, len(rank)) + 1).astype(int)[:-1])
    if not len(rank):
        return np.full(1, np.inf, np.float32), np.zeros((1, len(known)), np.float32)
    return (
        np.minimum.reduceat(gaps[rank], edges).astype(np.float32),
        (np.maximum.reduceat(norms[rank], edges, axis=0) * inflate).astype(np.float32),
    )


def _merge(known: list[Known]) -> tuple[np.ndarray, ...]:
    """Rows of V that meet the same row of rho, up to sign: which, signs, to which, and rho."""
    rows, signs, to, rho = [], [], [], [np.zeros((0, 0), np.float32)]
    base = count = 0
    for irrep in known:
        assert irrep.merged is not None
        rows.append(base + np.arange(len(irrep.merged[0])))
        signs.append(irrep.merged[0])
        to.append(count + irrep.merged[1])
        rho.append(irrep.merged[2])
        base, count = base + len(rows[-1]), count + len(rho[-1])
    if not known:
        none = np.zeros(0, np.int64)
        return none, none.astype(np.float32), none, rho[0]
    return np.concatenate(rows), np.concatenate(signs), np.concatenate(to), np.concatenate(rho[1:])
