"""The loops of the verifier in numpy: the version that a skeptic can audit.

How to read it. `verify` has the formula; this module evaluates it, in the order of `terms` and then
of `verify`, a function for each step:

    find_fault, preserves_antipodes   refuse what is impossible; nothing else is refused
    merge_neurons                     dead neurons and clusters: a smaller network and a loss
    unembedding_residual              e_i(z) = u_i(z) - <M_i, rho(z)>
    ideal_margins                     gamma(g) = <Vm, 1 - rho(g)>, and rho(x) Vm
    index_tables                      T of each neuron, over all y
    grid_spans                        e against s T, by Cauchy-Schwarz within the cells of a grid
    residual_distances                e against D, by Cauchy-Schwarz within a block of neurons
    class_minima                      the least gamma(g), and the largest |1 - rho(g)|
    additive_losses                   A and B, and the above, for the worst other answer
    absolute_sums, float32_error_sums sums that bounds on rounding are proportional to
    bound_pairs                       the bound of each pair, from all of these

Whatever the explanation says, each step holds: where a claimed number is wrong, the quantity that
it is compared with is measured here, and the difference is a loss. No function reads a claim
without measuring the difference. Rounding is not bounded here but in `terms`, for sums in any
order, so it holds here and for the compiled loops alike; tests compare both on every kind of
network. Choose this module with `mechatlas prove --check PROOF WEIGHTS --reference`, or
`proof.check(..., reference=True)`: no compiler runs then.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int, Int8

from mechatlas.analysis.proofs.verifier.explanation import (
    NOT_TRIED,
    PATIENCE,
    WORTH_COMPARING,
)
from mechatlas.analysis.proofs.verifier.structures import (
    AdditiveLosses,
    CircuitTerms,
    ClassMinima,
    Clusters,
    FirstStage,
    GridSpans,
    Layout,
    LogitSums,
    MergedNetwork,
    Neurons,
    PackedActions,
    PackedCircuits,
    PackedGrids,
    PairBounds,
    PairCounts,
    SecondStage,
    TableIndex,
    Weights,
)


def find_fault(
    clusters: Clusters, layout: Layout, circuits: PackedCircuits, grids: PackedGrids, limit: float
) -> int:
    """Number of the first impossible thing in an explanation, or 0; see `checks.FAULTS`.

    Args:
        clusters: Dead neurons and clusters.
        layout: Cluster representatives.
        circuits: Circuits of the explanation.
        grids: Grids of the explanation.
        limit: Numbers must be below this.
    """
    dead, representative_of, scale_factors = clusters
    width = len(representative_of)
    shapes, points, antipodes, scale, tables = grids
    tests = [
        _is_label(layout.exponents, -40, 41),
        _is_below(layout.additive_x, limit) and _is_below(layout.additive_y, limit),
        _is_below(circuits.coefficients, limit) and _is_below(circuits.means, limit),
        all(_is_below(values, limit) for values in (tables, scale, scale_factors)),
        _is_label(representative_of, 0, width) and _is_label(layout.representatives, 0, width),
    ]
    if not all(tests):
        return tests.index(False) + 1
    times = np.bincount(layout.representatives, minlength=width)
    is_itself = (representative_of == np.arange(width)) & (scale_factors == 1)
    itself = (times == 1) & ~dead & is_itself
    if not (itself | (times == 0) & (dead | (times[representative_of] == 1))).all():
        return 6
    neurons, sizes = shapes[:, 1], shapes[:, 2:4]
    starts = np.repeat(shapes[:, 0] - np.cumsum(neurons) + neurons, neurons)
    limits = np.repeat(sizes, neurons, axis=0).T
    if not _is_label(points[:, starts + np.arange(len(starts))], 0, limits):
        return 7
    if not _is_label(antipodes, 0, np.repeat(sizes.ravel(), sizes.ravel())):
        return 8
    for _, _, k, k2, left, right, cell, _ in shapes:
        opposite = antipodes[left : left + k, None] * k2 + antipodes[right : right + k2]
        table = tables[cell : cell + k * k2]
        if (table[opposite.ravel()] != table).any():
            return 9
    return 0


def _is_below(values: np.ndarray, limit: float) -> bool:
    """Whether all values are smaller than a limit; false for NaN."""
    return bool(-limit < values.min(initial=0) and values.max(initial=0) < limit)


def _is_label(values: np.ndarray, low: int, high: Any) -> bool:
    """Whether all values are from `low` to `high` - 1."""
    return bool(((values >= low) & (values < high)).all())


def preserves_antipodes(
    antipodes: Int[np.ndarray, "side point"], action: Int[np.ndarray, "order point"]
) -> bool:
    """Whether antipodes are pairs of points or points alone, and the action preserves them."""
    sides = np.arange(len(antipodes))[:, None]
    paired = (antipodes[sides, antipodes] == np.arange(antipodes.shape[1])).all()
    return bool(paired and (action[:, antipodes] == antipodes[:, action].swapaxes(0, 1)).all())


def merge_neurons(
    weights: Weights,
    clusters: Clusters,
    representatives: Int[np.ndarray, " neuron"],
    factor: Float32[np.ndarray, " neuron"],
) -> MergedNetwork:
    """Add the unembedding of each neuron to that of its cluster representative, and scale.

    A margin changes by at most |relu error| (max u_i - min u_i), and relu is 1-Lipschitz: a dead
    neuron costs relu(l_i) + relu(r_i), and a member of a cluster |l_i - c l_j| + |r_i - c r_j|.

    Args:
        weights: The network.
        clusters: Dead neurons and clusters.
        representatives: The neurons that are kept.
        factor: Power of two for left and right of each of them.
    """
    left, right, unembed = weights
    dead, representative_of, scale_factors = clusters
    k, c = len(representatives), scale_factors.astype(np.float64)
    members = np.flatnonzero(~dead & (representative_of != np.arange(len(dead))))
    span = 1.000001 * np.subtract(unembed.max(axis=1), unembed.min(axis=1), dtype=np.float64)
    x_loss, y_loss = (
        np.maximum(w[:, dead], 0) @ span[dead]
        + np.abs(w[:, members] - c[members] * w[:, representative_of[members]]) @ span[members]
        for w in (left, right)
    )
    place = np.zeros(len(dead), np.int64)
    place[representatives] = np.arange(k)
    live = np.flatnonzero(~dead)
    factor_of = factor[place[representative_of[live]]]
    parts = (np.abs(c[live]) / factor_of).astype(np.float32)[:, None] * unembed[live]
    is_member = (representative_of[live] == representatives[:, None]).astype(np.float32)
    u, mass = is_member @ parts, is_member @ np.abs(parts).max(axis=1, initial=0)
    is_negative = c[live] < 0
    linear = -(is_member[:, is_negative] @ parts[is_negative])
    mirrored = is_member[:, is_negative].any(axis=1)
    scaled_left = left[:, representatives] * factor
    scaled_right = np.ascontiguousarray((right[:, representatives] * factor).T)
    too_small = any(bool(w[np.abs(w) < 2.0**-80].any()) for w in (scaled_left, scaled_right))
    mass = 1.0001 * mass.astype(np.float64)
    return MergedNetwork(
        scaled_left, scaled_right, u, linear, mirrored, mass, x_loss, y_loss, too_small
    )


def unembedding_residual(
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
    residual, sizes = u.copy(), np.zeros(len(u))
    base = offset = 0
    for d, start, count in circuits.shapes:
        mine = slice(start, start + count)
        m = circuits.coefficients[offset : offset + d * d * count].reshape(d * d, count)
        residual[mine] -= m.T @ rho[base : base + d * d]
        sizes[mine] += np.sqrt(np.square(m, dtype=np.float64).sum(axis=0))
        base, offset = base + d * d, offset + d * d * count
    return residual, sizes


def ideal_margins(
    circuits: PackedCircuits, rho: Float32[np.ndarray, "entry order"], identity: int
) -> tuple[Float32[np.ndarray, "entry order"], Float[np.ndarray, " order"]]:
    """Compute rho(x) Vm of each x, and the ideal margin gamma(g) = <Vm, 1 - rho(g)> of each g.

    Args:
        circuits: Circuits with their mean matrices.
        rho: Matrix entries of their irreps.
        identity: Number of the identity.
    """
    framed, base = np.zeros(rho.shape, np.float32), 0
    for d in circuits.shapes[:, 0]:
        mine = slice(base, base + d * d)
        mean = circuits.means[mine].reshape(d, d).astype(np.float32)
        product = np.einsum("aex,eb->abx", rho[mine].reshape(d, d, -1), mean)
        framed[mine] = product.reshape(d * d, -1)
        base += d * d
    inner = circuits.means @ rho
    return framed, inner[identity] - inner


def index_tables(grids: PackedGrids, actions: PackedActions) -> TableIndex:
    """Lay out the tables of all grids so that each neuron finds T over all y in one row.

    Row base + q k + p is the table of a grid at p and where each y takes q.
    """
    shapes, points, _, scale, tables = grids
    first = np.full(len(scale), len(tables), np.int64)
    columns, largest = np.zeros(len(scale), np.int64), np.zeros(len(scale), np.float32)
    out = np.zeros((len(tables) + 1, len(actions.images)), np.float32)
    for (start, count, k, k2, _, _, cell, _), side in zip(shapes, actions.sides, strict=True):
        left, right = actions.offsets[side]
        mine, table = slice(start, start + count), tables[cell : cell + k * k2].reshape(k, k2)
        first[mine] = cell + points[1, mine] * k
        columns[mine] = left + points[0, mine]
        largest[mine] = np.float32(1.0001) * np.abs(scale[mine]) * np.abs(table).max()
        rows = table.T[actions.images[:, right : right + k2].T].transpose(0, 2, 1)
        out[cell : cell + k * k2] = rows.reshape(-1, len(actions.images))
    return TableIndex(first, columns, actions.inverse, out, largest)


def absolute_sums(
    network: MergedNetwork,
    additive_x: Float32[np.ndarray, "order neuron"],
    additive_y: Float32[np.ndarray, "neuron order"],
    small: Float32[np.ndarray, " neuron"],
) -> tuple[Float32[np.ndarray, " order"], Float32[np.ndarray, " order"], float]:
    """Sum small_i (|l_i(x)| + |A_i(x)|) over neurons for each x, and the same for each y.

    Args:
        network: The merged network.
        additive_x: A_i(x).
        additive_y: B_i(y).
        small: Weight of each neuron in the sum.

    Returns:
        The sums of x and of y, and a number larger than all those that were added up.
    """
    x_sizes = np.abs(network.left) + np.abs(additive_x)
    y_sizes = np.abs(network.right) + np.abs(additive_y)
    return x_sizes @ small, small @ y_sizes, float(x_sizes.sum()) + float(y_sizes.sum())


def float32_error_sums(
    weights: Weights, rate: float
) -> tuple[Float32[np.ndarray, " order"], Float32[np.ndarray, " order"], float]:
    """Sum rate max |u_i| relu(l_i(x)) over neurons for each x, and the same with r_i for each y.

    Returns:
        The sums of x and of y, and a number larger than all those that were added up.
    """
    top = np.abs(weights.unembed).max(axis=1)
    first, second = np.maximum(weights.left, 0), np.maximum(weights.right, 0)
    scaled = (rate * top.astype(np.float64)).astype(np.float32)
    size = 1.01 * sum(float(part.sum()) for part in (top, first, second))
    return first @ scaled, second @ scaled, size


def _products(
    vectors: Float32[np.ndarray, "row order"],
) -> tuple[Float32[np.ndarray, "order order"], Float32[np.ndarray, " order"]]:
    """-2 times the products of all columns, and the squared norm of each: 2 is exact."""
    products = (np.float32(-2) * vectors).T @ vectors
    return products, np.float32(-0.5) * products.diagonal()


def residual_distances(
    residual: Float32[np.ndarray, "neuron order"],
    block_offsets: Int[np.ndarray, " offset"],
    rate: float,
    inflate: float,
) -> Float32[np.ndarray, "block order"]:
    """Bound the distance of each column e(z) from any other and from 0, in each block of neurons.

    The loss of z against w to D is <e(z) - e(w), D> <= |e(z) - e(w)| |D| in each block. The
    distance from 0 is not needed; with it both verifiers give the same numbers.

    Args:
        residual: e_i(z).
        block_offsets: First neuron of each block, and the end of the last.
        rate: Relative rounding of a squared distance.
        inflate: Factor for rounding in the sums that these distances enter.
    """
    errors = np.zeros((len(block_offsets) - 1, residual.shape[1]), np.float32)
    for b in range(len(errors)):
        squares, norms = _products(residual[block_offsets[b] : block_offsets[b + 1]])
        squares += norms[:, None]
        most = squares.max(axis=0, initial=0).astype(np.float64) + norms
        errors[b] = inflate * np.sqrt(most + rate * norms.max())
    return errors


def grid_spans(
    residual: Float32[np.ndarray, "neuron order"],
    weight: Float[np.ndarray, " neuron"],
    grids: PackedGrids,
    rate: float,
) -> GridSpans:
    """Bound how much the residual within the cells of all grids could take, for each two answers.

    A cell holds the sum of s_i e_i(z) of its neurons, `shares @ e`. The loss of z against w to s T
    is a sum over cells of T times the difference of two such numbers, at most |T| times the
    distance of z and w over the cells. T has no row and column means, so those of the cells may be
    taken out first; what means T has all the same is `off_center`. Opposite cells have the same T.

    Args:
        residual: e_i(z).
        weight: Largest |u_i|, and sum of the norms of M_i, of each neuron.
        grids: Grids of the explanation.
        rate: Relative rounding of a squared distance.
    """
    n = residual.shape[1]
    spans, off_center, largest, n_cells = np.zeros((n, n), np.float32), 0.0, 0.0, 0
    inflate = 1.000002 + 2.0**-22 * len(grids.shapes)
    for start, count, k, k2, left, right, cell, _ in grids.shapes:
        mine = slice(start, start + count)
        p, q = grids.points[:, mine]
        t = grids.tables[cell : cell + k * k2].reshape(k, k2).astype(np.float64)
        rows, columns = t.sum(axis=1) / k2, t.sum(axis=0) / k
        means = rows[:, None] + (columns - columns.sum() / k2)
        size = 1.000001 * float(np.linalg.norm(t))
        # 1 at a point, less the mean: products of two have no row and column means.
        at_left, at_right = np.eye(k) - 1 / k, np.eye(k2) - 1 / k2
        shares = at_left[p, :, None] * at_right[q, None]
        p, q = grids.antipodes[left + p], grids.antipodes[right + q]
        shares += at_left[p, :, None] * at_right[q, None]
        times = size / 2 * grids.scale[mine]
        cells = (times[:, None] * shares.reshape(count, -1)).T @ residual[mine]
        squares, norms = _products(cells.astype(np.float32))
        squares += norms
        squares += (norms + np.float32(rate) * norms.max())[:, None]
        np.sqrt(np.maximum(squares, 0, out=squares), out=squares)
        spans += squares
        total = float(weight[mine] @ np.abs(grids.scale[mine]))
        off_center += 2.02 * (float(np.linalg.norm(means)) + 1e-10 * size) * total
        largest += 4 * size * total
        n_cells += int(k * k2) + 2
    spans *= np.float32(inflate)
    return GridSpans(spans, off_center, largest, n_cells)


def class_minima(
    gaps: Float[np.ndarray, " order"],
    norms: Float[np.ndarray, "order circuit"],
    class_of: Int[np.ndarray, " order"],
    most: int,
    inflate: float,
) -> ClassMinima:
    """Take the least gap and the largest norms of each bin of the group without the identity.

    A bin is a conjugacy class, or classes with about the same gap.

    Args:
        gaps: Ideal margin gamma(g).
        norms: Frobenius norm of 1 - rho(g), of each circuit.
        class_of: Conjugacy class of each element; 0 is that of the identity.
        most: Largest number of bins.
        inflate: Factor for rounding in the sums that the norms enter.
    """
    n_classes = int(class_of.max()) + 1
    least, largest = np.full(n_classes, np.inf), np.zeros((n_classes, norms.shape[1]))
    np.minimum.at(least, class_of, gaps)
    np.maximum.at(largest, class_of, norms)
    low, high = least[1:].min(initial=np.inf), least[1:].max(initial=-np.inf)
    count = max(min(most, n_classes - 1), 1)
    bin_of = np.arange(n_classes) - 1
    if n_classes - 1 > most:
        share = (least - low) / (high - low) if high > low else np.zeros(n_classes)
        bin_of = np.clip((share * count).astype(int), 0, count - 1)
    out_gaps = np.full(count, np.inf)
    out_norms = np.zeros((count, norms.shape[1]), np.float32)
    np.minimum.at(out_gaps, bin_of[1:], least[1:])
    np.maximum.at(out_norms, bin_of[1:], (largest[1:] * inflate).astype(np.float32))
    bin_of[0] = -1
    bins = bin_of[class_of]
    elements = np.argsort(bins, kind="stable")[1:]
    offsets = np.searchsorted(bins[elements], np.arange(count + 1))
    return ClassMinima(out_gaps.astype(np.float32), out_norms, elements, offsets)


def additive_losses(sums: LogitSums, spans: Float32[np.ndarray, "order order"]) -> AdditiveLosses:
    """Bound the loss of a right answer z to additive parts and to the cells of grids."""
    cells = spans.max(axis=1)
    x_loss = sums.x.max(axis=1)[:, None] - sums.x + cells
    return AdditiveLosses(x_loss, sums.y.max(axis=1)[:, None] - sums.y, cells)


def bound_pairs(
    table: Int[np.ndarray, "order order"],
    neurons: Neurons,
    lookup: TableIndex,
    circuits: CircuitTerms,
    first: FirstStage,
    second: SecondStage,
    out: PairBounds,
) -> PairCounts:
    """Bound the margins of all pairs from below, by the first stage and then by the second.

    Args:
        table: Right answers.
        neurons: Cluster representatives.
        lookup: Tables of the grids.
        circuits: Circuits.
        first: Terms of the first stage.
        second: Terms and limits of the second stage.
        out: Arrays for the bounds.
    """
    left, additive_x, right, additive_y, scale, offsets = neurons
    losses, slack, inflate = first.losses, first.slack, first.inflate
    residuals, deviations = np.empty_like(out.residuals), np.empty_like(out.deviations)
    n, pairs_left, used, uncertified = len(table), second.max_pairs, 0, 0
    framed = compared = poor = 0
    failures = 2 + n // PATIENCE  # elements x that may fail, such as damaged rows of weights
    for x in range(n):
        interaction = np.maximum(left[x][:, None] + right, 0) - additive_x[x][:, None] - additive_y
        tables = lookup.rows[lookup.first + lookup.moves[x, lookup.columns]]
        squares = np.square(interaction - scale[:, None] * tables)
        for b in range(len(residuals)):
            residuals[b] = np.sqrt(squares[offsets[b] : offsets[b + 1]].sum(axis=0))
        v = _add_circuits(x, circuits, interaction, deviations)
        if x == 0:
            out.residuals[:], out.deviations[:] = residuals, deviations
        zs, lost = table[x], slack.x[x] + slack.y
        total = losses.x[x, zs] + losses.y[np.arange(n), zs]
        total = total + (residuals * first.residual[:, zs]).sum(axis=0)
        lost_in_all = inflate * total.astype(np.float64) + lost
        error = first.float32_error.x[x] + first.float32_error.y
        by_bin = first.bins.gaps[:, None] - first.bins.norms @ deviations
        out.margins[x] = by_bin.min(axis=0).astype(np.float64) - lost_in_all
        ys = np.flatnonzero(~(out.margins[x] > error))
        if len(ys) and poor <= n // (4 * PATIENCE):
            frame = first.frame_slack * lost
            compared += _compare_bins(x, by_bin, lost_in_all + error, frame, v, circuits, first)
            out.margins[x] = by_bin.min(axis=0).astype(np.float64) - lost_in_all
            before, ys = len(ys), np.flatnonzero(~(out.margins[x] > error))
            framed, poor = framed + 1, poor + (len(ys) > (1 - WORTH_COMPARING) * before)
        uncertified += len(ys)
        hopeless = uncertified > (1 - second.give_up_share / 5) * (x + 1) * n
        if x >= n // 8 and not pairs_left and hopeless:
            out.margins[x + 1 :] = NOT_TRIED
            return PairCounts(used, uncertified + (n - x - 1) * n, x + 1, framed, compared)
        ys = ys[:pairs_left]
        if not len(ys):
            continue
        sharper = _bound_second(x, ys, zs, v, second).astype(np.float64)
        loss = (residuals[:, ys].astype(np.float64) * first.residual[:, zs[ys]]).sum(axis=0)
        sharper -= inflate * loss + lost[ys]
        out.stages[x, ys] = np.where(sharper > out.margins[x, ys], 2, out.stages[x, ys])
        out.margins[x, ys] = np.maximum(sharper, out.margins[x, ys])
        used, pairs_left = used + len(ys), pairs_left - len(ys)
        good = int((sharper > error[ys]).sum())
        uncertified -= good
        failures -= good < second.give_up_share * len(ys)
        if failures < 0:
            pairs_left = 0
    return PairCounts(used, uncertified, n, framed, compared)


def _add_circuits(
    x: int,
    circuits: CircuitTerms,
    interaction: Float32[np.ndarray, "neuron order"],
    deviations: Float32[np.ndarray, "circuit order"],
) -> Float32[np.ndarray, "entry order"]:
    """Compute the matrices V at x and every y, and their distances from rho(x) Vm rho(y)."""
    v = np.empty((len(circuits.rho), interaction.shape[1]), np.float32)
    base = offset = 0
    for c, (d, start, k) in enumerate(circuits.shapes):
        mine = slice(base, base + d * d)
        m = circuits.coefficients[offset : offset + d * d * k].reshape(d * d, k)
        v[mine] = m @ interaction[start : start + k]
        framed, rho = circuits.framed_means[mine, x], circuits.rho[mine]
        mean = np.tensordot(framed.reshape(d, d), rho.reshape(d, d, -1), axes=1)
        deviations[c] = np.sqrt(np.square(v[mine] - mean.reshape(d * d, -1)).sum(axis=0))
        base, offset = base + d * d, offset + d * d * k
    return v


def _compare_bins(
    x: int,
    by_bin: Float32[np.ndarray, "bin order"],
    needed: Float[np.ndarray, " order"],
    rounding: Float[np.ndarray, " order"],
    v: Float32[np.ndarray, "entry order"],
    circuits: CircuitTerms,
    first: FirstStage,
) -> int:
    """Compute margins exactly over bins that do not certify all y.

    With W = rho(x)^T V rho(y)^T the margin of z* over z = x g y is <W, 1 - rho(g)>.

    Returns:
        Number of elements g that were compared with the identity.
    """
    offsets, base = first.bins.offsets, 0
    failing = np.flatnonzero(~(by_bin > needed).all(axis=1))
    framed = np.empty_like(v)
    for d in circuits.shapes[:, 0]:
        mine = slice(base, base + d * d)
        own, rho = v[mine].reshape(d, d, -1), circuits.rho[mine].reshape(d, d, -1)
        half = np.tensordot(rho[:, :, x].T, own, axes=1)
        framed[mine] = np.einsum("afy,bfy->aby", half, rho).reshape(d * d, -1)
        base += d * d
    for k in failing:
        margins = first.differences[offsets[k] : offsets[k + 1]] @ framed
        by_bin[k] = np.maximum(by_bin[k], margins.min(axis=0) - rounding.astype(np.float32))
    return int((offsets[failing + 1] - offsets[failing]).sum())


def _bound_second(
    x: int,
    ys: Int[np.ndarray, " pair"],
    zs: Int[np.ndarray, " order"],
    v: Float32[np.ndarray, "entry order"],
    second: SecondStage,
) -> Float32[np.ndarray, " pair"]:
    """Compute the right logit less the largest other one, from V itself, at one x and some y.

    Every other logit gets the most that the cells of grids could give it.
    """
    signs, to, rho = second.rho
    summed = np.zeros((len(rho), len(ys)), np.float32)
    np.add.at(summed, to, signs[:, None] * v[:, ys])
    z, pairs = zs[ys], np.arange(len(ys))
    logits = summed.T @ rho + second.sums.x[x] + second.sums.y[ys] + second.spans[z]
    right = logits[pairs, z] - second.spans[z, z]
    logits[pairs, z] = -np.inf
    return right - logits.max(axis=1)


def hidden_values(
    left: Float32[np.ndarray, "order width"],
    right: Float32[np.ndarray, "order width"],
    xs: Int[np.ndarray, " pair"],
    ys: Int[np.ndarray, " pair"],
    out: Float32[np.ndarray, "row width"],
) -> None:
    """Compute relu(left[x] + right[y]) of some pairs.

    Args:
        left: l_i(x).
        right: r_i(y).
        xs: x of each pair.
        ys: y of each pair.
        out: Array for the values, a row for each pair.
    """
    np.maximum(left[xs] + right[ys], 0, out=out[: len(xs)])


def judge_margins(
    logits: Float32[np.ndarray, "row order"],
    answers: Int[np.ndarray, " pair"],
    bounds: Float[np.ndarray, " pair"],
    out: Int8[np.ndarray, " row"],
) -> None:
    """Write 1 where the right logit is the largest by more than a bound, 0 where another one is.

    2 where neither is sure. The right logits are overwritten.

    Args:
        logits: Logits of some pairs.
        answers: Right answer of each pair.
        bounds: Bound on the rounding of each margin.
        out: Array for the judgements.
    """
    pairs = np.arange(len(answers))
    logits, out = logits[: len(pairs)], out[: len(pairs)]
    right = logits[pairs, answers]
    logits[pairs, answers] = -np.inf
    margins = right - logits.max(axis=1, initial=-np.inf)
    out[:] = np.where(margins > bounds, 1, np.where(margins < -bounds, 0, 2))
