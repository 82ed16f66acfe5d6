"""Compiled loops over everything that does not depend on the pair.

    merge_neurons         clusters of neurons -> one neuron each, and the most that may cost
    unembedding_residual  unembedding, circuits -> e_i
    ideal_margins         mean matrices of circuits -> gamma(g)
    index_tables          grids -> row of the table of each neuron
    grid_spans            residual in the cells of grids -> the most it could take from a margin
    residual_distances    residual in blocks of neurons -> the same
    class_minima          ideal margins -> the least of each class of elements
    additive_losses       additive parts and spans -> the most they could take from each answer
    absolute_sums         sums of absolute values, for bounds on rounding
    float32_error_sums    the same for the network in float32

`reference.py` has the same functions in numpy, and is the one to read. Sums may be taken in any
order and multiplications fused into them: the bounds on rounding hold for every order. Input is
finite (`checks`), and whatever could have overflowed here is refused afterwards (`terms`).
"""

import numpy as np
from jaxtyping import Float, Float32, Int

from mechatlas.analysis.proofs.verifier.compiled_checks import compiled
from mechatlas.analysis.proofs.verifier.structures import (
    AdditiveLosses,
    ClassMinima,
    Clusters,
    GridNeurons,
    GridSpans,
    LogitSums,
    MergedNetwork,
    PackedActions,
    PackedCircuits,
    PackedGrids,
    TableIndex,
    Weights,
)


@compiled
def merge_neurons(
    weights: Weights,
    clusters: Clusters,
    representatives: Int[np.ndarray, " neuron"],
    factor: Float32[np.ndarray, " neuron"],
) -> MergedNetwork:
    """Add the unembedding of each neuron to that of its cluster representative, and scale.

    Args:
        weights: The network.
        clusters: Dead neurons and clusters.
        representatives: The neurons that are kept.
        factor: Power of two for left and right of each of them.
    """
    left, right, unembed = weights
    dead, representative_of, scale_factors = clusters
    n, m = left.shape
    k = len(representatives)
    place = np.zeros(m, np.int64)
    for j in range(k):
        place[representatives[j]] = j
    u, v = np.zeros((k, n), np.float32), np.zeros((k, n), np.float32)
    mirrored = np.zeros(k, np.bool_)
    sums, mass = np.zeros((k, n), np.float32), np.zeros(k)
    x_loss, y_loss = np.zeros(n), np.zeros(n)
    for i in range(m):
        to, c = unembed[i], np.float64(scale_factors[i])
        j = place[representative_of[i]]
        if dead[i] or representative_of[i] != i:
            most = least = to[0]
            for z in range(n):
                most, least = max(most, to[z]), min(least, to[z])
            span = 1.000001 * (np.float64(most) - np.float64(least))
            if dead[i]:
                for x in range(n):
                    x_loss[x] += span * max(np.float64(left[x, i]), 0.0)
                    y_loss[x] += span * max(np.float64(right[x, i]), 0.0)
                continue
            main = representative_of[i]
            for x in range(n):
                x_loss[x] += span * abs(np.float64(left[x, i]) - c * left[x, main])
                y_loss[x] += span * abs(np.float64(right[x, i]) - c * right[x, main])
        scale = np.float32(abs(c) / factor[j])
        mine, total = u[j], sums[j]
        for z in range(n):
            part = scale * to[z]
            mine[z] += part
            total[z] += abs(part)
        if c < 0:
            mirrored[j] = True
            linear = v[j]
            for z in range(n):
                linear[z] -= scale * to[z]
    for j in range(k):
        total, most = sums[j], np.float32(0)
        for z in range(n):
            most = total[z] if total[z] > most else most
        mass[j] = most
    scaled_left, scaled_right = _scale(left, right, representatives, factor)
    tiny = _is_tiny(scaled_left.reshape(-1)) or _is_tiny(scaled_right.reshape(-1))
    return MergedNetwork(scaled_left, scaled_right, u, v, mirrored, mass, x_loss, y_loss, tiny)


@compiled
def _scale(left, right, representatives, factor):
    """Scale left and right of the representatives, and transpose right."""
    n, k = len(left), len(representatives)
    scaled_left = np.empty((n, k), np.float32)
    scaled_right = np.empty((k, n), np.float32)
    for x in range(n):
        first, second, to = left[x], right[x], scaled_left[x]
        for j in range(k):
            to[j] = first[representatives[j]] * factor[j]
            scaled_right[j, x] = second[representatives[j]] * factor[j]
    return scaled_left, scaled_right


@compiled
def _is_tiny(values):
    """Whether a number but 0 is so small that scaling it may have rounded it."""
    small, any_tiny = np.float32(2.0**-80), False
    for i in range(len(values)):
        any_tiny |= (abs(values[i]) < small) & (values[i] != 0)
    return any_tiny


@compiled
def additive_losses(sums: LogitSums, spans: Float32[np.ndarray, "order order"]) -> AdditiveLosses:
    """Bound the loss of a right answer z to additive parts and to the cells of grids."""
    x_sums, y_sums = sums
    n = len(spans)
    most = np.empty(n, np.float32)
    for z in range(n):
        line, top = spans[z], np.float32(0)
        for w in range(n):
            top = line[w] if line[w] > top else top
        most[z] = top
    x_loss, y_loss = np.empty((n, n), np.float32), np.empty((n, n), np.float32)
    for x in range(n):
        line, to, top = x_sums[x], x_loss[x], x_sums[x, 0]
        for z in range(n):
            top = line[z] if line[z] > top else top
        for z in range(n):
            to[z] = top - line[z] + most[z]
        line, to, top = y_sums[x], y_loss[x], y_sums[x, 0]
        for z in range(n):
            top = line[z] if line[z] > top else top
        for z in range(n):
            to[z] = top - line[z]
    return AdditiveLosses(x_loss, y_loss, most)


@compiled
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
    shapes, coefficients, _ = circuits
    k, n = u.shape
    residual, sizes = u.copy(), np.zeros(k)
    base = offset = 0
    for c in range(len(shapes)):
        d, start, count = shapes[c]
        dd = d * d
        m = coefficients[offset : offset + dd * count].reshape((dd, count))
        explained = np.dot(m.T, rho[base : base + dd])
        for j in range(count):
            to, line, square = residual[start + j], explained[j], 0.0
            for z in range(n):
                to[z] -= line[z]
            for r in range(dd):
                square += np.float64(m[r, j]) ** 2
            sizes[start + j] += np.sqrt(square)
        base += dd
        offset += dd * count
    return residual, sizes


@compiled
def ideal_margins(
    circuits: PackedCircuits, rho: Float32[np.ndarray, "entry order"], identity: int
) -> tuple[Float32[np.ndarray, "entry order"], Float[np.ndarray, " order"]]:
    """Compute rho(x) Vm of each x, and the ideal margin gamma(g) = <Vm, 1 - rho(g)> of each g.

    Args:
        circuits: Circuits with their mean matrices.
        rho: Matrix entries of their irreps.
        identity: Number of the identity.
    """
    shapes, _, means = circuits
    n = rho.shape[1]
    framed, inner = np.zeros((len(rho), n), np.float32), np.zeros(n)
    base = 0
    for c in range(len(shapes)):
        d = shapes[c, 0]
        for a in range(d):
            for b in range(d):
                to, mean = framed[base + a * d + b], means[base + a * d + b]
                line = rho[base + a * d + b]
                for x in range(n):
                    inner[x] += mean * line[x]
                for e in range(d):
                    factor, line = np.float32(means[base + e * d + b]), rho[base + a * d + e]
                    for x in range(n):
                        to[x] += factor * line[x]
        base += d * d
    return framed, inner[identity] - inner


@compiled
def index_tables(grids: PackedGrids, actions: PackedActions) -> TableIndex:
    """Lay out the tables of all grids so that each neuron finds T over all y in one row.

    Row base + q k + p is the table of a grid at p and where each y takes q.
    """
    shapes, points, _, scale, tables = grids
    sides, offsets, images = actions
    n, k = len(images), len(scale)
    first, column = np.zeros(k, np.int64), np.zeros(k, np.int64)
    out, top = np.zeros((len(tables) + 1, n), np.float32), np.zeros(k, np.float32)
    zeros = len(tables)  # a row for neurons in no grid, whose scale is 0
    for j in range(k):
        first[j] = zeros
    for g in range(len(shapes)):
        start, count, k1, k2, _, _, cell, _ = shapes[g]
        left, right = offsets[sides[g, 0]], offsets[sides[g, 1]]
        most = np.float32(0)
        for i in range(k1 * k2):
            most = max(most, abs(tables[cell + i]))
        for j in range(start, start + count):
            first[j] = cell + points[1, j] * k1
            column[j] = left + points[0, j]
            top[j] = np.float32(1.0001) * abs(scale[j]) * most
        for q in range(k2):
            for p in range(k1):
                to = out[cell + q * k1 + p]
                for y in range(n):
                    to[y] = tables[cell + p * k2 + images[y, right + q]]
    return TableIndex(first, column, out, top)


@compiled
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
    left, right = network.left, network.right
    k, n = right.shape
    of_x, of_y = np.empty(n, np.float32), np.zeros(n, np.float32)
    every, largest = np.zeros(n, np.float32), np.float32(0)
    for x in range(n):
        first, second, total, whole = left[x], additive_x[x], np.float32(0), np.float32(0)
        for j in range(k):
            value = abs(first[j]) + abs(second[j])
            total += small[j] * value
            whole += value
        of_x[x] = total
        largest += whole
    for j in range(k):
        first, second, size = right[j], additive_y[j], small[j]
        for y in range(n):
            value = abs(first[y]) + abs(second[y])
            of_y[y] += size * value
            every[y] += value
    for y in range(n):
        largest += every[y]
    return of_x, of_y, np.float64(largest)


@compiled
def float32_error_sums(
    weights: Weights, rate: float
) -> tuple[Float32[np.ndarray, " order"], Float32[np.ndarray, " order"], float]:
    """Sum rate max |u_i| relu(l_i(x)) over neurons for each x, and the same with r_i for each y.

    Returns:
        The sums of x and of y, and a number larger than all those that were added up.
    """
    left, right, unembed = weights
    n, m = left.shape
    run, size = np.empty(m, np.float32), 0.0
    for i in range(m):
        line, most = unembed[i], np.float32(0)
        for z in range(n):
            most = max(most, abs(line[z]))
        run[i] = rate * np.float64(most)
        size += np.float64(most)
    of_x, of_y = np.empty(n, np.float32), np.empty(n, np.float32)
    for x in range(n):
        first, second = left[x], right[x]
        total, total2, whole = np.float32(0), np.float32(0), np.float32(0)
        for i in range(m):
            value, value2 = max(first[i], np.float32(0)), max(second[i], np.float32(0))
            total += run[i] * value
            total2 += run[i] * value2
            whole += value + value2
        of_x[x], of_y[x] = total, total2
        size += np.float64(whole)
    return of_x, of_y, size


@compiled
def residual_distances(
    residual: Float32[np.ndarray, "neuron order"],
    block_offsets: Int[np.ndarray, " offset"],
    rate: float,
    inflate: float,
) -> Float32[np.ndarray, "block order"]:
    """Bound the distance of each column e(z) from any other and from 0, in each block of neurons.

    Args:
        residual: e_i(z).
        block_offsets: First neuron of each block, and the end of the last.
        rate: Relative rounding of a squared distance.
        inflate: Factor for rounding in the sums that these distances enter.
    """
    errors = np.empty((len(block_offsets) - 1, residual.shape[1]), np.float32)
    for b in range(len(errors)):
        far = _largest_distances(residual[block_offsets[b] : block_offsets[b + 1]], rate)
        to = errors[b]
        for z in range(len(to)):
            to[z] = inflate * far[z]
    return errors


@compiled
def _largest_distances(vectors, rate):
    """Distance of each column from the farthest other one or from 0, or a little more."""
    n = vectors.shape[1]
    far = np.zeros(n)
    if not len(vectors):
        return far
    gram = np.dot(vectors.T, vectors)
    norms, top = np.empty(n, np.float32), np.float32(0)
    for z in range(n):
        norms[z] = gram[z, z]
        top = max(top, norms[z])
    two = np.float32(2)
    for z in range(n):
        line, most = gram[z], np.float32(0)
        for w in range(n):
            value = norms[w] - two * line[w]
            most = value if value > most else most
        far[z] = np.sqrt(np.float64(most) + np.float64(norms[z]) + rate * top)
    return far


@compiled
def grid_spans(
    residual: Float32[np.ndarray, "neuron order"],
    weight: Float[np.ndarray, " neuron"],
    grids: PackedGrids,
    rate: float,
) -> GridSpans:
    """Bound how much the residual within the cells of all grids could take, for each two answers.

    Args:
        residual: e_i(z).
        weight: Largest |u_i|, and sum of the norms of M_i, of each neuron.
        grids: Grids of the explanation.
        rate: Relative rounding of a squared distance.
    """
    n = residual.shape[1]
    shapes, points, antipodes, scale, tables = grids
    spans, off_center, largest, cells = np.zeros((n, n), np.float32), 0.0, 0.0, 0
    inflate = 1.000002 + 2.0**-22 * len(shapes)
    for g in range(len(shapes)):
        start, count, k, k2, left, right, cell, _ = shapes[g]
        mine = slice(start, start + count)
        grid = GridNeurons(
            residual[mine], weight[mine], points[0, mine], points[1, mine],
            antipodes[left : left + k], antipodes[right : right + k2], scale[mine],
            tables[cell : cell + k * k2].reshape((k, k2)),
        )  # fmt: skip
        loss, most, kept = _add_spans(grid, rate, inflate, spans)
        off_center += loss
        largest += most
        cells += kept + 2
    return GridSpans(spans, off_center, largest, cells)


@compiled
def _add_spans(grid, rate, inflate, spans):
    """Add the most that the cells of a grid could take, for each two answers, to spans.

    A cell holds the sum of the residuals in it, without row and column means, times the norm
    of the table. Of two opposite cells, which are the same, only one is kept, times the root
    of two. Returns the most that row and column means of the table could take, more than the
    largest cell, and the number of cells kept.
    """
    residual, weight, left_points, right_points, left_antipodes, right_antipodes, scale, table = (
        grid
    )
    k, k2 = table.shape
    size, means = _table_sizes(table)
    n = residual.shape[1]
    cells = np.zeros((k * k2, n))
    for j in range(len(residual)):
        p, q, half = left_points[j], right_points[j], 0.5 * np.float64(scale[j])
        own, other = cells[p * k2 + q], cells[left_antipodes[p] * k2 + right_antipodes[q]]
        line = residual[j]
        for z in range(n):
            own[z] += half * line[z]
        for z in range(n):
            other[z] += half * line[z]
    rows, columns, every = np.zeros((k, n)), np.zeros((k2, n)), np.zeros(n)
    for p in range(k):
        for q in range(k2):
            own, row, column = cells[p * k2 + q], rows[p], columns[q]
            for z in range(n):
                row[z] += own[z] / k2
            for z in range(n):
                column[z] += own[z] / k
        row = rows[p]
        for z in range(n):
            every[z] += row[z] / k
    kept = 0
    for p in range(k):
        for q in range(k2):
            cell, other = p * k2 + q, left_antipodes[p] * k2 + right_antipodes[q]
            if other < cell:
                continue
            times = size if other == cell else np.sqrt(2.0) * size
            own, row, column, to = cells[cell], rows[p], columns[q], cells[kept]
            for z in range(n):
                to[z] = times * (own[z] - row[z] - column[z] + every[z])
            kept += 1
    few = cells[:kept].astype(np.float32)
    gram = np.dot(few.T, few)
    norms, top = np.empty(n, np.float32), np.float32(0)
    for z in range(n):
        top = max(top, gram[z, z])
    for z in range(n):
        norms[z] = gram[z, z] + np.float32(0.5 * rate) * top
    zero, two, more = np.float32(0), np.float32(2), np.float32(inflate)
    for z in range(n):
        line, to, mine = gram[z], spans[z], norms[z]
        for w in range(n):
            square = norms[w] + mine - two * line[w]
            to[w] += more * np.sqrt(square if square > zero else zero)
    total = 0.0
    for j in range(len(residual)):
        total += weight[j] * abs(np.float64(scale[j]))
    return 2.02 * (means + 1e-10 * size) * total, 4 * size * total, kept


@compiled
def _table_sizes(table):
    """Frobenius norm of a table, and of its row and column means."""
    k, k2 = table.shape
    rows, columns, every, size = np.zeros(k), np.zeros(k2), 0.0, 0.0
    for p in range(k):
        for q in range(k2):
            value = np.float64(table[p, q])
            rows[p] += value / k2
            columns[q] += value / k
            every += value / (k * k2)
            size += value * value
    means = 0.0
    for p in range(k):
        for q in range(k2):
            means += (rows[p] + columns[q] - every) ** 2
    return 1.000001 * np.sqrt(size), np.sqrt(means)


@compiled
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
    n_classes = class_of.max() + 1
    n, c = norms.shape
    least = np.full(n_classes, np.inf)
    for g in range(n):
        least[class_of[g]] = min(least[class_of[g]], gaps[g])
    low, high = np.inf, -np.inf
    for k in range(1, n_classes):
        low, high = min(low, least[k]), max(high, least[k])
    count = max(min(most, n_classes - 1), 1)
    part = np.zeros(n_classes, np.int64)
    for k in range(1, n_classes):
        part[k] = k - 1
        if n_classes - 1 > most and high > low:
            part[k] = min(int((least[k] - low) / (high - low) * count), count - 1)
        elif n_classes - 1 > most:
            part[k] = 0
    out_gaps, out_norms = np.full(count, np.inf), np.zeros((count, c), np.float32)
    for g in range(n):
        k = class_of[g]
        if k == 0:
            continue
        to = part[k]
        out_gaps[to] = min(out_gaps[to], gaps[g])
        for i in range(c):
            value = np.float32(norms[g, i] * inflate)
            out_norms[to, i] = max(out_norms[to, i], value)
    return ClassMinima(out_gaps.astype(np.float32), out_norms)
