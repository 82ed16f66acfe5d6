"""The loops of the verifier in numpy: the version that a skeptic can audit.

How to read it. `verify` has the formula; this module evaluates it, in the order of `terms` and then
of `verify`, a function for each step:

    find_fault, preserves_antipodes   refuse what is impossible; nothing else is refused
    merge_neurons                     dead neurons and clusters: a smaller network and a loss
    unembedding_residual              e_i(z) = u_i(z) - <M_i, rho(z)>
    index_tables                      T of each neuron, over all y
    grid_cells                        e against s T, by Cauchy-Schwarz within the cells of a grid
    add_distances                     the same for each two answers, and for D in place of s T
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
    ROWS,
    WORTH_COMPARING,
)
from mechatlas.analysis.proofs.verifier.structures import (
    AdditiveLosses,
    CircuitTerms,
    ClassMinima,
    Clusters,
    FirstStage,
    Layout,
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
    dead, representative_of, scale_factors = clusters
    unembed, c = weights.unembed, scale_factors.astype(np.float64)
    members = np.flatnonzero(~dead & (representative_of != np.arange(len(dead))))
    span = 1.000001 * np.subtract(unembed.max(axis=1), unembed.min(axis=1), dtype=np.float64)
    sides = np.empty((2, *unembed.shape), np.float32)
    sides[0], sides[1] = weights.left.T, weights.right.T
    off = np.abs(sides[:, members] - c[members, None] * sides[:, representative_of[members]])
    losses = span[dead] @ np.maximum(sides[:, dead], 0) + span[members] @ off
    place = np.zeros(len(dead), np.int64)
    place[representatives] = np.arange(len(representatives))
    live = np.flatnonzero(~dead)
    to = place[representative_of[live]]
    shares = np.zeros((len(representatives), len(dead)), np.float32)
    shares[to, live] = np.abs(c[live]) / factor[to]
    mass = 1.0001 * (shares @ np.abs(unembed).max(axis=1)).astype(np.float64)
    is_negative = ~dead & (c < 0)
    linear = -(shares[:, is_negative] @ unembed[is_negative])
    mirrored = np.asarray(shares[:, is_negative].any(axis=1))
    scaled = sides[:, representatives] * factor[:, None]
    too_small = bool((np.abs(scaled) < 2.0**-80).any())
    return MergedNetwork(scaled, shares @ unembed, linear, mirrored, mass, losses, too_small)


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
    starts = np.cumsum(np.square(circuits.shapes[:, 0])) - np.square(circuits.shapes[:, 0])
    squares = np.square(circuits.coefficients, dtype=np.float64)
    sizes = np.sqrt(np.add.reduceat(squares, starts, axis=0)) if len(starts) else squares
    return u - circuits.coefficients.T @ rho, sizes.sum(axis=0)


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
) -> tuple[Float32[np.ndarray, "2 order"], float]:
    """Sum small_i (|l_i(x)| + |A_i(x)|) over neurons for each x, and the same for each y.

    Args:
        network: The merged network.
        additive_x: A_i(x).
        additive_y: B_i(y).
        small: Weight of each neuron in the sum.

    Returns:
        The sums of x and of y, and a number larger than all those that were added up.
    """
    sizes = np.abs(network.sides)
    sizes[0] += np.abs(additive_x.T)
    sizes[1] += np.abs(additive_y)
    return small @ sizes, float(sizes.sum())


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


def add_distances(
    vectors: Float32[np.ndarray, "row order"], rate: float, out: Float32[np.ndarray, "order order"]
) -> None:
    """Add the distance of each two columns to `out`, or a little more.

    Args:
        vectors: The columns.
        rate: Relative rounding of a squared distance.
        out: Sums of distances so far.
    """
    products = vectors.T @ vectors
    norms = products.diagonal()
    squares = np.float32(-2) * products + norms + (norms + np.float32(rate) * norms.max())[:, None]
    out += np.sqrt(np.maximum(squares, 0))


def grid_cells(
    residual: Float32[np.ndarray, "neuron order"],
    weight: Float[np.ndarray, " neuron"],
    grids: PackedGrids,
) -> tuple[list[Float32[np.ndarray, "cell order"]], float, float]:
    """Sum the residual within the cells of each grid, so that distances bound the loss to s T.

    A cell holds the sum of s_i e_i(z) of its neurons, `shares @ e`. The loss of z against w to s T
    is a sum over cells of T times the difference of two such numbers, at most |T| times the
    distance of z and w over the cells. T has no row and column means, so those of the cells may be
    taken out first; what means T has all the same is returned. Opposite cells have the same T.

    Args:
        residual: e_i(z).
        weight: Largest |u_i|, and sum of the norms of M_i, of each neuron.
        grids: Grids of the explanation.

    Returns:
        Cells of each grid times |T|, the loss owed to row and column means of the tables, which
        should be 0, and more than the largest number in a cell.
    """
    parts, off_center, largest = [], 0.0, 0.0
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
        parts.append(cells.astype(np.float32))
        total = float(weight[mine] @ np.abs(grids.scale[mine]))
        off_center += 2.02 * (float(np.linalg.norm(means)) + 1e-10 * size) * total
        largest += 4 * size * total
    return parts, off_center, largest


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


def additive_losses(
    sums: Float32[np.ndarray, "2 order order"], spans: Float32[np.ndarray, "order order"]
) -> AdditiveLosses:
    """Bound the loss of a right answer z to additive parts and to the cells of grids.

    Args:
        sums: Additive part of each logit, of x and of y.
        spans: Most that the residual could do within the cells of grids, for each two answers.
    """
    cells = spans.max(axis=1)
    x_loss, y_loss = sums.max(axis=2, keepdims=True) - sums
    return AdditiveLosses(x_loss + cells, y_loss, cells)


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
    losses, slack, error, inflate = first.losses, first.slack, first.float32_error, first.inflate
    n, pairs_left, used, uncertified = len(table), second.max_pairs, 0, 0
    step, framed, compared, poor = max(1, ROWS // n), 0, 0, 0
    failures = 2 + n // PATIENCE  # elements x that may fail, such as damaged rows of weights
    for start in range(0, n, step):
        xs = np.arange(start, min(start + step, n))
        x, y = np.repeat(xs, n), np.tile(np.arange(n), len(xs))
        z = table[x, y]
        residuals, v, deviations = measure_pairs(xs, neurons, lookup, circuits)
        rounding, needed = slack.x[x] + slack.y[y], error.x[x] + error.y[y]
        total = losses.x[x, z] + losses.y[y, z] + (residuals * first.residual[:, z]).sum(axis=0)
        lost = inflate * total.astype(np.float64) + rounding
        by_bin = first.bins.gaps[:, None] - first.bins.norms @ deviations
        margins = by_bin.min(axis=0).astype(np.float64) - lost
        stages = np.ones(len(margins), np.int8)
        left_over = np.flatnonzero(~(margins > needed))
        if len(left_over) and poor <= n // (4 * PATIENCE * step):
            p = left_over
            worst, count = _compare_bins(
                x[p], y[p], by_bin[:, p], (lost + needed)[p], rounding[p], v[:, p], circuits, first
            )
            margins[p] = worst - lost[p]
            left_over = p[~(margins[p] > needed[p])]
            framed, compared = framed + len(p), compared + count * len(p)
            poor += len(left_over) > (1 - WORTH_COMPARING) * len(p)
        uncertified += len(left_over)
        done = start + len(xs)
        hopeless = uncertified > (1 - second.give_up_share / 5) * done * n
        p = left_over[:pairs_left]
        if len(p):
            sharper = _bound_second(x[p], y[p], z[p], v[:, p], second).astype(np.float64)
            loss = (residuals[:, p].astype(np.float64) * first.residual[:, z[p]]).sum(axis=0)
            sharper -= inflate * loss + rounding[p]
            stages[p] = np.where(sharper > margins[p], 2, 1)
            margins[p] = np.maximum(sharper, margins[p])
            used, pairs_left = used + len(p), pairs_left - len(p)
            sure = sharper > needed[p]
            uncertified -= int(sure.sum())
            tried, good = np.bincount(x[p]), np.bincount(x[p], weights=sure)
            failures -= int((good < second.give_up_share * tried).sum())
            if failures < 0:
                pairs_left = 0
        out.margins[xs], out.stages[xs] = margins.reshape(-1, n), stages.reshape(-1, n)
        if hopeless and not len(p) and not pairs_left and done > n // 8:
            out.margins[done:] = NOT_TRIED
            return PairCounts(used, uncertified + (n - done) * n, done, framed, compared)
    return PairCounts(used, uncertified, n, framed, compared)


def measure_pairs(
    xs: Int[np.ndarray, " some"], neurons: Neurons, lookup: TableIndex, circuits: CircuitTerms
) -> tuple[
    Float32[np.ndarray, "block pair"],
    Float32[np.ndarray, "entry pair"],
    Float32[np.ndarray, "circuit pair"],
]:
    """Compute what is known about some x and all y: the norm of D of each block, V, and its error.

    Args:
        xs: Elements x.
        neurons: Cluster representatives.
        lookup: Tables of the grids.
        circuits: Circuits.

    Returns:
        The norms of D, the matrices V, and their distances from rho(x) Vm rho(y).
    """
    left, additive_x, right, additive_y, scale, offsets = neurons
    inputs = left[:, xs, None] + right[:, None]
    interaction = np.maximum(inputs, 0) - additive_x[xs].T[:, :, None] - additive_y[:, None]
    tables = lookup.rows[(lookup.first + lookup.moves[xs][:, lookup.columns]).T]
    squares = np.square(interaction - scale[:, None, None] * tables)
    n, pairs = right.shape[1], len(xs) * right.shape[1]
    residuals = np.empty((len(offsets) - 1, pairs), np.float32)
    for b in range(len(residuals)):
        residuals[b] = np.sqrt(squares[offsets[b] : offsets[b + 1]].sum(axis=0)).ravel()
    x, y = np.repeat(xs, n), np.tile(np.arange(n), len(xs))
    v, deviations = _add_circuits(x, y, circuits, interaction.reshape(len(scale), pairs))
    return residuals, v, deviations


def _add_circuits(
    x: Int[np.ndarray, " pair"],
    y: Int[np.ndarray, " pair"],
    circuits: CircuitTerms,
    interaction: Float32[np.ndarray, "neuron pair"],
) -> tuple[Float32[np.ndarray, "entry pair"], Float32[np.ndarray, "circuit pair"]]:
    """Compute the matrices V of some pairs, and their distances from rho(x) Vm rho(y)."""
    v, base = np.empty((len(circuits.rho), len(x)), np.float32), 0
    deviations = np.empty((len(circuits.shapes), len(x)), np.float32)
    for c, (d, start, k) in enumerate(circuits.shapes):
        mine = slice(base, base + d * d)
        v[mine] = circuits.coefficients[mine, start : start + k] @ interaction[start : start + k]
        mean, rho = circuits.means[mine].reshape(d, d), circuits.rho[mine].reshape(d, d, -1)
        framed = np.einsum("aex,eb->abx", rho, mean)[:, :, x]
        distance = v[mine] - np.einsum("aep,ebp->abp", framed, rho[:, :, y]).reshape(d * d, -1)
        deviations[c] = np.sqrt(np.square(distance).sum(axis=0))
        base += d * d
    return v, deviations


def _compare_bins(
    x: Int[np.ndarray, " pair"],
    y: Int[np.ndarray, " pair"],
    by_bin: Float32[np.ndarray, "bin pair"],
    needed: Float[np.ndarray, " pair"],
    rounding: Float[np.ndarray, " pair"],
    v: Float32[np.ndarray, "entry pair"],
    circuits: CircuitTerms,
    first: FirstStage,
) -> tuple[Float[np.ndarray, " pair"], int]:
    """Compute margins exactly over bins that do not certify all of some pairs.

    With W = rho(x)^T V rho(y)^T the margin of z* over z = x g y is <W, 1 - rho(g)>.

    Returns:
        The least margin over all bins, and the number of elements g that were compared with the
        identity.
    """
    offsets, base = first.bins.offsets, 0
    failing = np.flatnonzero(~(by_bin > needed).all(axis=1))
    framed = np.empty_like(v)
    for d in circuits.shapes[:, 0]:
        mine = slice(base, base + d * d)
        own, rho = v[mine].reshape(d, d, -1), circuits.rho[mine].reshape(d, d, -1)
        half = np.einsum("eap,efp->afp", rho[:, :, x], own)
        framed[mine] = np.einsum("afp,bfp->abp", half, rho[:, :, y]).reshape(d * d, -1)
        base += d * d
    for k in failing:
        margins = first.differences[offsets[k] : offsets[k + 1]] @ framed
        by_bin[k] = np.maximum(
            by_bin[k], margins.min(axis=0) - (first.frame_slack * rounding).astype(np.float32)
        )
    count = int((offsets[failing + 1] - offsets[failing]).sum())
    return by_bin.min(axis=0).astype(np.float64), count


def _bound_second(
    x: Int[np.ndarray, " pair"],
    y: Int[np.ndarray, " pair"],
    z: Int[np.ndarray, " pair"],
    v: Float32[np.ndarray, "entry pair"],
    second: SecondStage,
) -> Float32[np.ndarray, " pair"]:
    """Compute the right logit less the largest other one, from V itself.

    Every other logit gets the most that the cells of grids could give it.
    """
    signs, to, rho = second.rho
    summed, pairs = np.zeros((len(rho), len(z)), np.float32), np.arange(len(z))
    np.add.at(summed, to, signs[:, None] * v)
    logits = summed.T @ rho + second.sums[0, x] + second.sums[1, y]
    right = logits[pairs, z]
    logits += second.spans[z]
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
