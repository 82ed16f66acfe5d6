"""The loops of the verifier in numpy: the version that a skeptic can audit.

How to read it. `verify` has the formula; `terms` evaluates what does not depend on the pair; this
module has the loops of both, in the order in which they run:

    merge_neurons   dead neurons and clusters: a smaller network and a loss
    index_tables    T of each neuron, over all y
    sum_cells       e against s T, by Cauchy-Schwarz within the cells of a grid
    add_distances   the same for each two answers, and for D in place of s T
    bound_pairs     the bound of each pair, from all terms

The first three are compiled as they stand here.

Whatever the explanation says, each step holds: where a claimed number is wrong, the quantity that
it is compared with is measured here, and the difference is a loss. No function reads a claim
without measuring the difference. Rounding is not bounded here but in `terms`, for sums in any
order, so it holds here and for the compiled loops alike; tests compare both on every kind of
network. Choose this module with `mechatlas prove --check PROOF WEIGHTS --reference`, or
`proof.check(..., reference=True)`: no compiler runs then.
"""

import numpy as np
from jaxtyping import Float, Float32, Int, Int8

from mechatlas.analysis.proofs.verifier.explanation import (
    NOT_TRIED,
    PAIRS,
    PATIENCE,
    WORTH_COMPARING,
)
from mechatlas.analysis.proofs.verifier.structures import (
    CircuitTerms,
    Clusters,
    FirstStage,
    MergedNetwork,
    Neurons,
    PackedActions,
    PackedGrids,
    PairBounds,
    PairCounts,
    SecondStage,
    TableIndex,
)


def merge_neurons(
    sides: Float32[np.ndarray, "2 width order"],
    unembed: Float32[np.ndarray, "width order"],
    clusters: Clusters,
    place: Int[np.ndarray, " width"],
    factor: Float32[np.ndarray, " neuron"],
    out: MergedNetwork,
) -> bool:
    """Add the unembedding of each neuron to that of its cluster representative, and scale.

    A margin changes by at most |relu error| (max u_i - min u_i), and relu is 1-Lipschitz: a dead
    neuron costs relu(l_i) + relu(r_i), and a member of a cluster |l_i - c l_j| + |r_i - c r_j|.

    Args:
        sides: l_i(x) and r_i(y).
        unembed: u_i(z).
        clusters: Dead neurons and clusters.
        place: Place of each representative among them.
        factor: Power of two for left and right of each of them.
        out: Arrays for the merged network, all 0.

    Returns:
        Whether a scaled weight is so small that scaling may have rounded it.
    """
    dead, representative_of, scale_factors = clusters
    n, zero, is_small = unembed.shape[1], np.float32(0), False
    for j in range(len(dead)):
        row, other, c = unembed[j], representative_of[j], np.float64(scale_factors[j])
        low = high = row[0]
        for z in range(n):
            low, high = min(low, row[z]), max(high, row[z])
        span = 1.000001 * (np.float64(high) - np.float64(low))
        for side in range(2):
            own, base, losses = sides[side, j], sides[side, other], out.losses[side]
            if dead[j]:
                for x in range(n):
                    losses[x] += span * max(own[x], zero)
            elif other != j:
                for x in range(n):
                    losses[x] += span * abs(own[x] - c * base[x])
            else:
                scaled, power = out.sides[side, place[j]], factor[place[j]]
                for x in range(n):
                    scaled[x] = own[x] * power
                    if abs(scaled[x]) < 2.0**-80:
                        is_small = True
        if not dead[j]:
            i = place[other]
            share, merged, linear = np.float32(abs(c) / factor[i]), out.unembed[i], out.linear[i]
            for z in range(n):
                merged[z] += share * row[z]
            out.mass[i] += 1.0001 * share * max(high, -low)
            if c < 0:
                out.mirrored[i] = True
                for z in range(n):
                    linear[z] -= share * row[z]
    return is_small


def index_tables(grids: PackedGrids, actions: PackedActions, out: TableIndex) -> int:
    """Lay out the tables of all grids so that each neuron finds T over all y in one row.

    Row base + q k + p is the table of a grid at p and where each y takes q.

    Args:
        grids: Grids of the explanation.
        actions: Actions of the group on their points.
        out: Arrays for the tables, all 0.

    Returns:
        Number of the first impossible thing in a grid, or 0; see `checks.FAULTS`.
    """
    n = len(actions.images)
    for g in range(len(grids.shapes)):
        start, count, k, k2, left, right, cell, _ = grids.shapes[g]
        for side in range(2):
            first, size = (left, k) if side == 0 else (right, k2)
            column = actions.offsets[actions.sides[g, side]]
            for p in range(size):
                opposite = grids.antipodes[first + p]
                if opposite < 0 or opposite >= size:
                    return 8
                if grids.antipodes[first + opposite] != p:
                    return 10
                for y in range(n):
                    image = grids.antipodes[first + actions.images[y, column + p]]
                    if image != actions.images[y, column + opposite]:
                        return 10
        most, column = np.float32(0), actions.offsets[actions.sides[g, 1]]
        for p in range(k):
            table = grids.tables[cell + p * k2 : cell + (p + 1) * k2]
            for q in range(k2):
                opposite = grids.antipodes[left + p] * k2 + grids.antipodes[right + q]
                if grids.tables[cell + opposite] != table[q]:
                    return 9
                row, most = out.rows[cell + q * k + p], max(most, abs(table[q]))
                for y in range(n):
                    row[y] = table[actions.images[y, column + q]]
        for j in range(start, start + count):
            p, q = grids.points[0, j], grids.points[1, j]
            if p < 0 or p >= k or q < 0 or q >= k2:
                return 7
            out.first[j], out.columns[j] = cell + q * k, p + actions.offsets[actions.sides[g, 0]]
            out.largest[j] = np.float32(1.0001) * abs(grids.scale[j]) * most
    return 0


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


def sum_cells(
    residual: Float32[np.ndarray, "neuron order"],
    weight: Float[np.ndarray, " neuron"],
    grids: PackedGrids,
    out: Float[np.ndarray, "cell order"],
) -> tuple[float, float]:
    """Sum the residual within the cells of each grid, so that distances bound the loss to s T.

    A cell holds the sum of s_i e_i(z) of its neurons. The loss of z against w to s T is a sum over
    cells of T times the difference of two such numbers, at most |T| times the distance of z and w
    over the cells. T has no row and column means, so those of the cells may be taken out first;
    what means T has all the same is returned. Opposite cells have the same T, and share.

    Args:
        residual: e_i(z).
        weight: Largest |u_i|, and sum of the norms of M_i, of each neuron.
        grids: Grids of the explanation.
        out: Array for the cells of all grids times |T|, all 0.

    Returns:
        The loss owed to row and column means of the tables, which should be 0, and more than the
        largest number in a cell.
    """
    n, off_center, largest = residual.shape[1], 0.0, 0.0
    for g in range(len(grids.shapes)):
        start, count, k, k2, left, right, cell, _ = grids.shapes[g]
        square = means = total = 0.0
        for p in range(k):
            mean = 0.0
            for c in range(cell + p * k2, cell + (p + 1) * k2):
                mean += np.float64(grids.tables[c]) / k2
                square += np.float64(grids.tables[c]) ** 2
            means += k2 * mean**2
        for q in range(k2):
            mean = 0.0
            for p in range(k):
                mean += np.float64(grids.tables[cell + p * k2 + q]) / k
            means += k * mean**2
        size = 1.000001 * np.sqrt(square)
        for j in range(start, start + count):
            p, q, times = grids.points[0, j], grids.points[1, j], size / 2 * grids.scale[j]
            own, p, q = (
                out[cell + p * k2 + q],
                grids.antipodes[left + p],
                grids.antipodes[right + q],
            )
            opposite = out[cell + p * k2 + q]
            for z in range(n):
                own[z] += times * residual[j, z]
                opposite[z] += times * residual[j, z]
            total += weight[j] * abs(np.float64(grids.scale[j]))
        for p in range(k):
            for z in range(n):
                mean = 0.0
                for q in range(k2):
                    mean += out[cell + p * k2 + q, z] / k2
                for q in range(k2):
                    out[cell + p * k2 + q, z] -= mean
        for q in range(k2):
            for z in range(n):
                mean = 0.0
                for p in range(k):
                    mean += out[cell + p * k2 + q, z] / k
                for p in range(k):
                    out[cell + p * k2 + q, z] -= mean
        off_center += 2.02 * (np.sqrt(means) + 1e-10 * size) * total
        largest += 4 * size * total
    return off_center, largest


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
    step, framed, compared, poor = max(1, min(PAIRS // n, n // 8)), 0, 0, 0
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
        explained = len(lookup.rows) > 1 or not pairs_left
        if len(left_over) and explained and poor <= n // (4 * PATIENCE * step):
            p = left_over
            worst, count = _compare_bins(
                x[p], y[p], by_bin[:, p], (lost + needed)[p], rounding[p], v[:, p], circuits, first
            )
            margins[p] = worst - lost[p]
            left_over = p[~(margins[p] > needed[p])]
            framed, compared = framed + n * len(np.unique(x[p])), compared + count
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
    """Compute margins exactly over the bins that do not certify a pair.

    With W = rho(x)^T V rho(y)^T the margin of z* over z = x g y is <W, 1 - rho(g)>.

    Returns:
        The least margin over all bins, and the number of such margins that were computed.
    """
    offsets, base, count = first.bins.offsets, 0, 0
    framed = np.empty_like(v)
    for d in circuits.shapes[:, 0]:
        mine = slice(base, base + d * d)
        own, rho = v[mine].reshape(d, d, -1), circuits.rho[mine].reshape(d, d, -1)
        half = np.einsum("eap,efp->afp", rho[:, :, x], own)
        framed[mine] = np.einsum("afp,bfp->abp", half, rho[:, :, y]).reshape(d * d, -1)
        base += d * d
    for k, bound in enumerate(by_bin):
        p = np.flatnonzero(~(bound > needed))
        if len(p):
            margins = first.differences[offsets[k] : offsets[k + 1]] @ framed[:, p]
            lost = (first.frame_slack * rounding[p]).astype(np.float32)
            bound[p] = np.maximum(bound[p], margins.min(axis=0) - lost)
            count += margins.size
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
