"""The inner loops of the verifier in numpy, where numba cannot be imported.

The same functions as `kernels.py`, with the same results to rounding; only slower. Sums have
no more terms, so the bounds on rounding hold for both.
"""

from typing import Any

import numpy as np

from mechatlas.analysis.proofs.explanation import NOT_TRIED

Arrays = tuple[Any, ...]


def reduce(weights: Arrays, standing: Arrays, order: np.ndarray, factor: np.ndarray) -> Arrays:
    """Merge neurons: see `kernels.reduce`."""
    left, right, unembed = (w.astype(np.float64) for w in weights)
    silent, leaders, ratios = standing
    place = np.zeros(len(leaders), np.int64)
    place[order] = np.arange(len(order))
    ratio = ratios.astype(np.float64)
    loud, follows = ~silent, ~silent & (leaders != np.arange(len(leaders)))
    span = 1.000001 * (unembed.max(axis=1) - unembed.min(axis=1))
    x_loss, y_loss = (
        np.maximum(w[:, silent], 0) @ span[silent]
        + np.abs(w[:, follows] - ratio[follows] * w[:, leaders[follows]]) @ span[follows]
        for w in (left, right)
    )
    to = place[leaders[loud]]
    parts = (np.abs(ratio[loud]) / factor.astype(np.float64)[to])[:, None] * unembed[loud]
    parts = parts.astype(np.float32)
    u, v, sums = np.zeros((3, len(order), len(left)), np.float32)
    np.add.at(u, to, parts)
    np.add.at(sums, to, np.abs(parts))
    back = ratio[loud] < 0
    np.add.at(v, to[back], -parts[back])
    mirrored = np.bincount(to[back], minlength=len(order)) > 0
    scaled_left = weights[0][:, order] * factor
    scaled_right = np.ascontiguousarray((weights[1][:, order] * factor).T)
    sizes = np.abs(np.concatenate([scaled_left.ravel(), scaled_right.ravel()]))
    tiny = bool(((sizes > 0) & (sizes < 2.0**-80)).any())
    mass = sums.max(axis=1, initial=0).astype(np.float64)
    return scaled_left, scaled_right, u, v, mirrored, mass, x_loss, y_loss, tiny


def lose(x_sums: np.ndarray, y_sums: np.ndarray, spans: np.ndarray) -> Arrays:
    """See `kernels.lose`."""
    most = spans.max(axis=1)
    x_loss = x_sums.max(axis=1)[:, None] - x_sums + most
    return x_loss, y_sums.max(axis=1)[:, None] - y_sums, most


def _is_below(values: np.ndarray, limit: float) -> bool:
    return not values.size or bool(np.abs(values).max() < limit)


def _is_label(values: np.ndarray, low: int, high: int | np.integer) -> bool:
    return not values.size or bool(values.min() >= low and values.max() < high)


def find_fault(
    standing: Arrays,
    order: np.ndarray,
    exponents: np.ndarray,
    row: np.ndarray,
    column: np.ndarray,
    packed: Arrays,
    limit: float,
) -> int:
    """The number of the first thing that is impossible in an explanation, or 0."""
    silent, leaders, ratios = standing
    weights, means, tables, scale, points, antipodes, grids = packed
    width = len(leaders)
    tests = [
        _is_label(exponents, -40, 41),
        _is_below(row, limit) and _is_below(column, limit),
        _is_below(weights, limit) and _is_below(means, limit),
        all(_is_below(values, limit) for values in (tables, scale, ratios)),
        _is_label(leaders, 0, width) and _is_label(order, 0, width),
    ]
    if not all(tests):
        return tests.index(False) + 1
    stands = np.bincount(order, minlength=width)
    own = (stands == 1) & ~silent & (leaders == np.arange(width)) & (ratios == 1)
    if not (own | (stands == 0) & (silent | (stands[leaders] == 1))).all():
        return 6
    for start, count, k, k2, left, right, cell, _ in grids:
        mine = slice(start, start + count)
        if not (_is_label(points[0, mine], 0, k) and _is_label(points[1, mine], 0, k2)):
            return 7
        one, two = antipodes[left : left + k], antipodes[right : right + k2]
        if not (_is_label(one, 0, k) and _is_label(two, 0, k2)):
            return 8
        table = tables[cell : cell + k * k2].reshape(k, k2)
        if not np.array_equal(table[one][:, two], table):
            return 9
    return 0


def keeps_opposite(antipodes: np.ndarray, action: np.ndarray) -> bool:
    """Whether antipodes are pairs of points or points alone, and the action keeps them."""
    paired = np.array_equal(antipodes[antipodes], np.arange(len(antipodes)))
    return paired and np.array_equal(action[:, antipodes], antipodes[action])


def project(u: np.ndarray, circuits: np.ndarray, weights: np.ndarray, rho: np.ndarray) -> Arrays:
    """See `kernels.project`."""
    rest, sizes = u.copy(), np.zeros(len(u))
    base = offset = 0
    for d, start, count in circuits:
        mine = slice(start, start + count)
        m = weights[offset : offset + d * d * count].reshape(d * d, count)
        rest[mine] -= m.T @ rho[base : base + d * d]
        sizes[mine] += np.sqrt(np.square(m, dtype=np.float64).sum(axis=0))
        base, offset = base + d * d, offset + d * d * count
    return rest, sizes


def frame(circuits: np.ndarray, means: np.ndarray, rho: np.ndarray, identity: int) -> Arrays:
    """rho(x) mean, by entry and x; and the ideal margin <mean, 1 - rho(g)> of each g."""
    framed, base = np.zeros(rho.shape, np.float32), 0
    for d in circuits[:, 0]:
        mine = slice(base, base + d * d)
        mean = means[mine].reshape(d, d).astype(np.float32)
        whole = np.einsum("aex,eb->abx", rho[mine].reshape(d, d, -1), mean)
        framed[mine] = whole.reshape(d * d, -1)
        base += d * d
    inner = means @ rho
    return framed, inner[identity] - inner


def look_up(
    grids: np.ndarray,
    sides: np.ndarray,
    offsets: np.ndarray,
    points: np.ndarray,
    scale: np.ndarray,
    tables: np.ndarray,
    actions: np.ndarray,
) -> Arrays:
    """See `kernels.look_up`."""
    first = np.full(len(scale), len(tables), np.int64)
    column, top = np.zeros(len(scale), np.int64), np.zeros(len(scale), np.float32)
    out = np.zeros((len(tables) + 1, len(actions)), np.float32)
    for (start, count, k, k2, _, _, cell, _), side in zip(grids, sides, strict=True):
        left, right = offsets[side]
        mine, table = slice(start, start + count), tables[cell : cell + k * k2].reshape(k, k2)
        first[mine] = cell + points[1, mine] * k
        column[mine] = left + points[0, mine]
        top[mine] = np.float32(1.0001) * np.abs(scale[mine]) * np.abs(table).max()
        rows = table.T[actions[:, right : right + k2].T].transpose(0, 2, 1)
        out[cell : cell + k * k2] = rows.reshape(-1, len(actions))
    return first, column, out, top


def weigh(
    left: np.ndarray, row: np.ndarray, right: np.ndarray, column: np.ndarray, small: np.ndarray
) -> Arrays:
    """See `kernels.weigh`."""
    of_x, of_y = np.abs(left) + np.abs(row), np.abs(right) + np.abs(column)
    return of_x @ small, small @ of_y, float(of_x.sum()) + float(of_y.sum())


def weigh_run(left: np.ndarray, right: np.ndarray, unembed: np.ndarray, rate: float) -> Arrays:
    """See `kernels.weigh_run`."""
    top, first, second = np.abs(unembed).max(axis=1), np.maximum(left, 0), np.maximum(right, 0)
    run = (rate * top.astype(np.float64)).astype(np.float32)
    size = sum(float(part.sum(dtype=np.float64)) for part in (top, first, second))
    return first @ run, second @ run, size


def _distances(vectors: np.ndarray, rate: float) -> np.ndarray:
    gram = vectors.T @ vectors
    norms = np.diag(gram)
    rounding = np.float32(rate * norms.max(initial=0))
    return np.sqrt(np.maximum(norms + norms[:, None] + rounding - 2 * gram, 0))


def farthest(rest: np.ndarray, blocks: np.ndarray, rate: float, inflate: float) -> np.ndarray:
    """Bounds on the distance of each column from any other, in each block of rows."""
    errors = np.zeros((len(blocks) - 1, rest.shape[1]), np.float32)
    for b in range(len(errors)):
        errors[b] = inflate * _distances(rest[blocks[b] : blocks[b + 1]], rate).max(axis=1)
    return errors


def span(
    rest: np.ndarray,
    weight: np.ndarray,
    grids: np.ndarray,
    points: np.ndarray,
    antipodes: np.ndarray,
    scale: np.ndarray,
    tables: np.ndarray,
    rate: float,
) -> tuple[np.ndarray, float, float, int]:
    """See `kernels.span`."""
    n = rest.shape[1]
    spans, off_centre, largest, count_cells = np.zeros((n, n), np.float32), 0.0, 0.0, 0
    inflate = 1.000002 + 2.0**-22 * len(grids)
    for start, count, k, k2, left, right, cell, _ in grids:
        mine = slice(start, start + count)
        one, two = antipodes[left : left + k], antipodes[right : right + k2]
        p, q = points[:, mine]
        cells = np.zeros((k, k2, n))
        half = 0.5 * scale[mine].astype(np.float64)[:, None] * rest[mine]
        np.add.at(cells, (p, q), half)
        np.add.at(cells, (one[p], two[q]), half)
        cells = cells - cells.mean(axis=0) - cells.mean(axis=1, keepdims=True) + cells.mean((0, 1))
        own, other = np.arange(k * k2), (one[:, None] * k2 + two).ravel()
        times = np.where(own == other, 1, np.sqrt(2))[own <= other, None]
        kept = times * cells.reshape(k * k2, -1)[own <= other]
        t = tables[cell : cell + k * k2].reshape(k, k2).astype(np.float64)
        means = t.mean(axis=0) + t.mean(axis=1, keepdims=True) - t.mean()
        size = 1.000001 * float(np.linalg.norm(t))
        kept = (size * kept).astype(np.float32)
        spans += (inflate * _distances(kept, rate)).astype(np.float32)
        total = float(weight[mine] @ np.abs(scale[mine]))
        off_centre += 2.02 * (float(np.linalg.norm(means)) + 1e-10 * size) * total
        largest += 4 * size * total
        count_cells += len(kept) + 2
    return spans, off_centre, largest, count_cells


def class_bins(
    gaps: np.ndarray,
    norms: np.ndarray,
    class_of: np.ndarray,
    n_classes: int,
    most: int,
    inflate: float,
) -> Arrays:
    """See `kernels.class_bins`."""
    least = np.full(n_classes, np.inf)
    np.minimum.at(least, class_of, gaps)
    low, high = least[1:].min(initial=np.inf), least[1:].max(initial=-np.inf)
    count = max(min(most, n_classes - 1), 1)
    part = np.arange(n_classes) - 1
    if n_classes - 1 > most:
        share = (least - low) / (high - low) if high > low else np.zeros(n_classes)
        part = np.clip((share * count).astype(int), 0, count - 1)
    but_one = class_of > 0
    out_gaps = np.full(count, np.inf)
    out_norms = np.zeros((count, norms.shape[1]), np.float32)
    np.minimum.at(out_gaps, part[class_of[but_one]], gaps[but_one])
    np.maximum.at(out_norms, part[class_of[but_one]], (norms[but_one] * inflate).astype(np.float32))
    return out_gaps.astype(np.float32), out_norms


def bound_pairs(
    table: np.ndarray,
    neurons: Arrays,
    blocks: np.ndarray,
    lookup: Arrays,
    circuits: Arrays,
    bins: Arrays,
    losses: Arrays,
    slack: Arrays,
    second: Arrays,
    out: Arrays,
) -> tuple[int, int, int]:
    """Lower bounds on the margins of all pairs, by the first stage and the second."""
    left, row, right, column, scale = neurons
    first, points, moves, tables = lookup
    merged, x_sums, y_sums, spans, pairs_left, hopeless = second
    x_slack, y_slack, x_run, y_run, inflate = slack
    margins, stages, sample_rests, sample_moved = out
    rests, moved = np.empty_like(sample_rests), np.empty_like(sample_moved)
    gaps, norms = bins
    n = len(table)
    every, used, left_over = np.arange(n), 0, 0
    for x in range(n):
        kept = np.maximum(left[x][:, None] + right, 0) - row[x][:, None] - column
        rest = np.square(kept - scale[:, None] * tables[first + moves[x, points]])
        for b in range(len(blocks) - 1):
            rests[b] = np.sqrt(rest[blocks[b] : blocks[b + 1]].sum(axis=0))
        whole = _explain(x, circuits, kept, moved)
        if x == 0:
            sample_rests[:], sample_moved[:] = rests, moved
        zs, lost = table[x], x_slack[x] + y_slack
        total = losses[0][x, zs] + losses[1][every, zs] + (rests * losses[2][:, zs]).sum(axis=0)
        worst = (gaps[:, None] - norms @ moved).min(axis=0)
        margins[x] = worst.astype(np.float64) - inflate * total.astype(np.float64) - lost
        run = x_run[x] + y_run
        ys = np.flatnonzero(~(margins[x] > run))
        left_over += len(ys)
        if x == n // 8 and not pairs_left and left_over > (1 - hopeless / 5) * (x + 1) * n:
            margins[x + 1 :] = NOT_TRIED
            return used, left_over + (n - x - 1) * n, x + 1
        ys = ys[:pairs_left]
        if not len(ys):
            continue
        sharper = _sharpen(ys, zs, whole, merged, x_sums[x], y_sums, spans).astype(np.float64)
        rest = (rests[:, ys].astype(np.float64) * losses[2][:, zs[ys]]).sum(axis=0)
        sharper -= inflate * rest + lost[ys]
        stages[x, ys] = np.where(sharper > margins[x, ys], 2, stages[x, ys])
        margins[x, ys] = np.maximum(sharper, margins[x, ys])
        used += len(ys)
        pairs_left -= len(ys)
        good = int((sharper > run[ys]).sum())
        left_over -= good
        if good < hopeless * len(ys):
            pairs_left = 0
    return used, left_over, n


def _explain(x: int, circuits: Arrays, kept: np.ndarray, moved: np.ndarray) -> np.ndarray:
    shapes, flat, framed, rho = circuits
    whole = np.empty((len(rho), kept.shape[1]), np.float32)
    base = offset = 0
    for c, (d, start, k) in enumerate(shapes):
        mine = slice(base, base + d * d)
        weights = flat[offset : offset + d * d * k].reshape(d * d, k)
        part = weights @ kept[start : start + k]
        ideal = np.tensordot(framed[mine, x].reshape(d, d), rho[mine].reshape(d, d, -1), axes=1)
        moved[c] = np.sqrt(np.square(part - ideal.reshape(d * d, -1)).sum(axis=0))
        whole[mine] = part
        base, offset = base + d * d, offset + d * d * k
    return whole


def _sharpen(
    ys: np.ndarray,
    zs: np.ndarray,
    whole: np.ndarray,
    merged: Arrays,
    x_sum: np.ndarray,
    y_sums: np.ndarray,
    spans: np.ndarray,
) -> np.ndarray:
    signs, to, rho = merged
    v = np.zeros((len(rho), len(ys)), np.float32)
    np.add.at(v, to, signs[:, None] * whole[:, ys])
    z, pairs = zs[ys], np.arange(len(ys))
    value = v.T @ rho + x_sum + y_sums[ys] + spans[z]
    right = value[pairs, z] - spans[z, z]
    value[pairs, z] = -np.inf
    return right - value.max(axis=1)


def activate(left: np.ndarray, right: np.ndarray, xs, ys, out: np.ndarray) -> None:
    """See `kernels.activate`."""
    np.maximum(left[xs] + right[ys], 0, out=out[: len(xs)])


def judge(logits: np.ndarray, answers: np.ndarray, bounds: np.ndarray, out: np.ndarray) -> None:
    """See `kernels.judge`."""
    pairs = np.arange(len(answers))
    logits, out = logits[: len(pairs)], out[: len(pairs)]
    right = logits[pairs, answers]
    logits[pairs, answers] = -np.inf
    margins = right - logits.max(axis=1, initial=-np.inf)
    out[:] = np.where(margins > bounds, 1, np.where(margins < -bounds, 0, 2))
