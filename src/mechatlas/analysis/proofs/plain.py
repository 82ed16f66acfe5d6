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
    u, v, sums = np.zeros((3, len(order), len(left)))
    np.add.at(u, to, parts)
    np.add.at(sums, to, np.abs(parts))
    mirrored = ratio[loud] < 0
    np.add.at(v, to[mirrored], -parts[mirrored])
    scaled_left = weights[0][:, order] * factor
    scaled_right = np.ascontiguousarray((weights[1][:, order] * factor).T)
    sizes = np.abs(np.concatenate([scaled_left.ravel(), scaled_right.ravel()]))
    least = sizes.min(initial=1, where=sizes > 0)
    mass = sums.max(axis=1, initial=0)
    return scaled_left, scaled_right, u, v, mass, x_loss, y_loss, least


def spread(gram: np.ndarray, rounding: float) -> np.ndarray:
    """From all inner products of some vectors: the largest distance of each from any other."""
    norms = np.diag(gram)
    far = (norms - 2 * gram).max(axis=1, initial=0) + norms + rounding
    return np.sqrt(np.maximum(far, 0))


def add_spans(gram: np.ndarray, rounding: float, size: float, spans: np.ndarray) -> None:
    """Add to spans the distance of all vectors, times size."""
    norms = np.diag(gram)
    spans += size * np.sqrt(np.maximum(norms + norms[:, None] + rounding - 2 * gram, 0))


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
) -> int:
    """Lower bounds on the margins of all pairs, by the first stage and the second."""
    left, row, right, column, scale = neurons
    first, points, moves, tables = lookup
    merged, x_sums, y_sums, spans, pairs_left, hopeless = second
    x_slack, y_slack, x_run, y_run, inflate = slack
    margins, stages, rests, moved, sample_rests, sample_moved = out
    gaps, norms = bins
    every, used = np.arange(len(table)), 0
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
        ys = np.flatnonzero(~(margins[x] > run))[:pairs_left]
        if not len(ys):
            continue
        sharper = _sharpen(ys, zs, whole, merged, x_sums[x], y_sums, spans).astype(np.float64)
        rest = (rests[:, ys].astype(np.float64) * losses[2][:, zs[ys]]).sum(axis=0)
        sharper -= inflate * rest + lost[ys]
        stages[x, ys] = np.where(sharper > margins[x, ys], 2, stages[x, ys])
        margins[x, ys] = np.maximum(sharper, margins[x, ys])
        used += len(ys)
        pairs_left -= len(ys)
        if (sharper > run[ys]).sum() < hopeless * len(ys):
            pairs_left = 0
    return used


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
