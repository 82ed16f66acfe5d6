"""Compiled loops over everything that does not depend on the pair.

`reference.py` has the same functions in numpy, and is the one to read. Sums may be taken in any
order and multiplications fused into them: the bounds on rounding hold for every order. Input is
finite (`checks`), and whatever could have overflowed here is refused afterwards (`terms`).
"""

import numpy as np

from mechatlas.analysis.proofs.verifier import reference
from mechatlas.analysis.proofs.verifier.compiled_checks import compiled, compiled_form
from mechatlas.analysis.proofs.verifier.structures import (
    AdditiveLosses,
    ClassMinima,
    GridSpans,
    MergedNetwork,
    TableIndex,
)


@compiled_form(reference.merge_neurons)
def merge_neurons(weights, clusters, representatives, factor):
    """Compiled form of `reference.merge_neurons`."""
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


@compiled_form(reference.additive_losses)
def additive_losses(sums, spans):
    """Compiled form of `reference.additive_losses`."""
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


@compiled_form(reference.unembedding_residual)
def unembedding_residual(u, circuits, rho):
    """Compiled form of `reference.unembedding_residual`."""
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


@compiled_form(reference.ideal_margins)
def ideal_margins(circuits, rho, identity):
    """Compiled form of `reference.ideal_margins`."""
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


@compiled_form(reference.index_tables)
def index_tables(grids, actions):
    """Compiled form of `reference.index_tables`."""
    shapes, points, _, scale, tables = grids
    sides, offsets, images, inverse = actions
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
    return TableIndex(first, column, inverse, out, top)


@compiled_form(reference.absolute_sums)
def absolute_sums(network, additive_x, additive_y, small):
    """Compiled form of `reference.absolute_sums`."""
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


@compiled_form(reference.float32_error_sums)
def float32_error_sums(weights, rate):
    """Compiled form of `reference.float32_error_sums`."""
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


@compiled_form(reference.residual_distances)
def residual_distances(residual, block_offsets, rate, inflate):
    """Compiled form of `reference.residual_distances`."""
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


@compiled_form(reference.grid_spans)
def grid_spans(residual, weight, grids, rate):
    """Compiled form of `reference.grid_spans`."""
    n = residual.shape[1]
    spans, off_center, largest, cells = np.zeros((n, n), np.float32), 0.0, 0.0, 0
    inflate = 1.000002 + 2.0**-22 * len(grids.shapes)
    for g in range(len(grids.shapes)):
        loss, most, kept = _add_spans(residual, weight, grids, g, rate, inflate, spans)
        off_center += loss
        largest += most
        cells += kept + 2
    return GridSpans(spans, off_center, largest, cells)


@compiled
def _add_spans(residual, weight, grids, g, rate, inflate, spans):
    """Add the most that the cells of a grid could take, for each two answers, to spans.

    A cell holds the sum of the residuals in it, without row and column means, times the norm
    of the table. Of two opposite cells, which are the same, only one is kept, times the root
    of two. Returns the most that row and column means of the table could take, more than the
    largest cell, and the number of cells kept.
    """
    shapes, points, antipodes, scale, tables = grids
    start, count, k, k2, left, right, first, _ = shapes[g]
    size, means = _table_sizes(tables[first : first + k * k2].reshape((k, k2)))
    n = residual.shape[1]
    cells = np.zeros((k * k2, n))
    for j in range(start, start + count):
        p, q, half = points[0, j], points[1, j], 0.5 * np.float64(scale[j])
        own, other = cells[p * k2 + q], cells[antipodes[left + p] * k2 + antipodes[right + q]]
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
            cell, other = p * k2 + q, antipodes[left + p] * k2 + antipodes[right + q]
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
    for j in range(start, start + count):
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


@compiled_form(reference.class_minima)
def class_minima(gaps, norms, class_of, most, inflate):
    """Compiled form of `reference.class_minima`."""
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
