"""The inner loops of the verifier in numpy, where numba cannot be imported.

The same functions as `kernels.py`, with the same results to rounding; only slower. Sums have
no more terms, so the bounds on rounding hold for both.
"""

from typing import Any

import numpy as np

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
    least = sizes.min(initial=1, where=sizes > 0)
    mass = sums.max(axis=1, initial=0).astype(np.float64)
    return scaled_left, scaled_right, u, v, mirrored, mass, x_loss, y_loss, least


def is_below(values: np.ndarray, limit: float) -> bool:
    """Whether all absolute values are below a limit; NaN is not."""
    return not values.size or bool(np.abs(values).max() < limit)


def is_label(values: np.ndarray, low: int, high: int) -> bool:
    """Whether all integers are from low to high - 1."""
    return not values.size or bool(values.min() >= low and values.max() < high)


def lose(x_sums: np.ndarray, y_sums: np.ndarray, spans: np.ndarray) -> Arrays:
    """See `kernels.lose`."""
    most = spans.max(axis=1)
    x_loss = x_sums.max(axis=1)[:, None] - x_sums + most
    return x_loss, y_sums.max(axis=1)[:, None] - y_sums, most


def find_stranger(
    silent: np.ndarray, leaders: np.ndarray, ratios: np.ndarray, order: np.ndarray
) -> int:
    """The first neuron that is neither silent nor has one that stands for it, or -1."""
    stands = np.bincount(order, minlength=len(leaders))
    own = (stands == 1) & ~silent & (leaders == np.arange(len(leaders))) & (ratios == 1)
    follows = (stands == 0) & (silent | (stands[leaders] == 1))
    strangers = np.flatnonzero(~(own | follows))
    return int(strangers[0]) if len(strangers) else -1


def keeps_opposite(antipodes: np.ndarray, action: np.ndarray) -> bool:
    """Whether antipodes are pairs of points or points alone, and the action keeps them."""
    paired = np.array_equal(antipodes[antipodes], np.arange(len(antipodes)))
    return paired and np.array_equal(action[:, antipodes], antipodes[action])


def is_even(table: np.ndarray, left_antipodes: np.ndarray, right_antipodes: np.ndarray) -> bool:
    """Whether a table is the same when both points are replaced by their opposites."""
    return np.array_equal(table[left_antipodes][:, right_antipodes], table)


def sizes_of(weights: np.ndarray) -> np.ndarray:
    """Norm of each column."""
    return np.sqrt(np.square(weights, dtype=np.float64).sum(axis=0))


def lay_tables(table: np.ndarray, right_action: np.ndarray, out: np.ndarray, base: int) -> float:
    """Row base + q k + p of out: the table at p and where each y takes q."""
    rows = table.T[right_action.T].transpose(0, 2, 1).reshape(-1, len(right_action))
    out[base : base + table.size] = rows
    return float(np.abs(table).max())


def weigh(
    left: np.ndarray, row: np.ndarray, right: np.ndarray, column: np.ndarray, small: np.ndarray
) -> Arrays:
    """Sum over neurons of small (|left| + |row|), by x; the same of the others, by y."""
    return (np.abs(left) + np.abs(row)) @ small, small @ (np.abs(right) + np.abs(column))


def weigh_run(left: np.ndarray, right: np.ndarray, unembed: np.ndarray, rate: float) -> Arrays:
    """Sum over neurons of rate max |u_i| max(l_i, 0), by x; the same of r_i, by y."""
    run = (rate * np.abs(unembed).max(axis=1).astype(np.float64)).astype(np.float32)
    return np.maximum(left, 0) @ run, np.maximum(right, 0) @ run


def _distances(vectors: np.ndarray, rate: float) -> np.ndarray:
    gram = vectors.T @ vectors
    norms = np.diag(gram)
    rounding = np.float32(rate * norms.max(initial=0))
    return np.sqrt(np.maximum(norms + norms[:, None] + rounding - 2 * gram, 0))


def farthest(vectors: np.ndarray, rate: float) -> np.ndarray:
    """Upper bound on the distance of each column from any other; rate covers rounding."""
    return _distances(vectors, rate).max(axis=1) if len(vectors) else np.zeros(vectors.shape[1])


def add_spans(
    rest: np.ndarray,
    points: Arrays,
    antipodes: Arrays,
    scale: np.ndarray,
    table: np.ndarray,
    weight: np.ndarray,
    rate: float,
    spans: np.ndarray,
) -> tuple[float, int]:
    """See `kernels.add_spans`."""
    k, k2 = table.shape
    cells = np.zeros((k, k2, rest.shape[1]))
    half = 0.5 * scale.astype(np.float64)[:, None] * rest
    np.add.at(cells, points, half)
    np.add.at(cells, (antipodes[0][points[0]], antipodes[1][points[1]]), half)
    cells = cells - cells.mean(axis=0) - cells.mean(axis=1, keepdims=True) + cells.mean((0, 1))
    own = np.arange(k * k2)
    other = (antipodes[0][:, None] * k2 + antipodes[1]).ravel()
    times = np.where(own == other, 1, np.sqrt(2))[own <= other, None]
    kept = times * cells.reshape(k * k2, -1)[own <= other]
    t = table.astype(np.float64)
    means = t.mean(axis=0) + t.mean(axis=1, keepdims=True) - t.mean()
    size = 1.000001 * float(np.linalg.norm(t))
    spans += (size * _distances(kept.astype(np.float32), rate)).astype(np.float32)
    total = float(weight @ np.abs(scale))
    return 2.02 * (float(np.linalg.norm(means)) + 1e-10 * size) * total, len(kept)


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
) -> tuple[int, int]:
    """Lower bounds on the margins of all pairs, by the first stage and the second."""
    left, row, right, column, scale = neurons
    first, points, moves, tables = lookup
    merged, x_sums, y_sums, spans, pairs_left, hopeless = second
    x_slack, y_slack, x_run, y_run, inflate = slack
    margins, stages, sample_rests, sample_moved = out
    rests, moved = np.empty_like(sample_rests), np.empty_like(sample_moved)
    gaps, norms = bins
    every, used, left_over = np.arange(len(table)), 0, 0
    for x in range(len(table)):
        kept = np.maximum(left[x][:, None] + right, 0)
        rest = kept - row[x][:, None] - column
        rest = np.square(rest - scale[:, None] * tables[first + moves[x, points]])
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
    return used, left_over


def _explain(x: int, circuits: Arrays, kept: np.ndarray, moved: np.ndarray) -> np.ndarray:
    dims, starts, counts, flat, of_x, of_y, framed, rho = circuits
    whole = np.empty((len(rho), kept.shape[1]), np.float32)
    base = offset = 0
    for c, (d, start, k) in enumerate(zip(dims, starts, counts, strict=True)):
        mine = slice(base, base + d * d)
        weights = flat[offset : offset + d * d * k].reshape(d * d, k)
        part = weights @ kept[start : start + k] - of_x[x, mine, None] - of_y[mine]
        ideal = np.tensordot(framed[x, mine].reshape(d, d), rho[mine].reshape(d, d, -1), axes=1)
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
    rows, signs, to, rho = merged
    v = np.zeros((len(rho), len(ys)), np.float32)
    np.add.at(v, to, signs[:, None] * whole[rows][:, ys])
    z, pairs = zs[ys], np.arange(len(ys))
    value = v.T @ rho + x_sum + y_sums[ys] + spans[z]
    right = value[pairs, z] - spans[z, z]
    value[pairs, z] = -np.inf
    return right - value.max(axis=1)
