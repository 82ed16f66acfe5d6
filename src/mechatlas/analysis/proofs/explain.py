"""The prover: from weights to an explanation. Nothing that it says is trusted later.

    explain          weights, group -> explanation
    merge            which neurons are the same up to scale, and which too weak to look at
    find_directions  which irrep each neuron lives in, and its vectors b, b' and a

Source: Wu et al. (ICLR 2025), sections 4 and 5, for b, b', a and circuits.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from mechatlas.analysis.proofs.explanation import Circuit, Explanation, Grid
from mechatlas.analysis.proofs.rho_sets import RhoSet, find_rho_sets
from mechatlas.maths.groups import Group
from mechatlas.maths.irreps import Irrep, energies, fourier

TINY = 1e-3
"""Neurons below this size, relative to the largest, belong nowhere."""
SILENCE = 0.3
"""Logits that all silent neurons together may take."""
MERGED = 1.0
"""Logits that merging could cost, at most."""
SET_TOLERANCE = 0.15
"""Largest 1 - cosine between a direction and the point of a rho-set."""
SAME_TABLE = 0.8
"""Least cosine between the interaction of a neuron and that of its grid."""


@dataclasses.dataclass(frozen=True, eq=False)
class Directions:
    """What each neuron looks like within its irrep."""

    irrep: Int[np.ndarray, " neuron"]
    """Number of the irrep, -1 for neurons that do nothing."""
    shares: Float[np.ndarray, "3 neuron"]
    """Part of the variance of left, right and unembedding inside the irrep."""
    b: list[np.ndarray]
    b2: list[np.ndarray]
    a: list[np.ndarray]
    matrices: list[np.ndarray]
    """The projection of u on the irrep is <matrix, rho(z)>."""


def explain(
    left: Float[np.ndarray, "order neuron"],
    right: Float[np.ndarray, "order neuron"],
    unembed: Float[np.ndarray, "neuron order"],
    group: Group,
    detail: int = 0,
) -> Explanation:
    """Look for circuits and grids.

    Args:
        left: l_i(x).
        right: r_i(y).
        unembed: u_i(z).
        group: The group.
        detail: 0 keeps of the unembedding of a neuron its own irrep, 1 a second one as well.
            More detail leaves less to bound and takes longer to verify.

    Returns:
        What a verifier takes.
    """
    irreps = group.irreps()
    left, right, unembed = (np.asarray(w, np.float64) for w in (left, right, unembed))
    silent, leaders, ratios = merge(left, right, unembed)
    members = np.flatnonzero(~silent & (leaders == np.arange(len(leaders))))
    first, second, u = _merged(left, right, unembed, (silent, leaders, ratios), members)
    row, column, spread = _additive_parts(first, second)
    found = find_directions(first, second, u, irreps)
    placed = [_place(group, irrep, k, found) for k, irrep in enumerate(irreps)]
    parts, projected = _matrices(found, u, irreps, detail)
    exponents = _exponents(u - projected, spread)
    factor = np.ldexp(1.0, exponents)
    inter = _interaction(first * factor, second * factor, row * factor, column * factor)
    laid, blocks, grids = [], [0], []
    for k, irrep in enumerate(irreps):
        mine = _grids(group, irrep, placed[k], inter)
        left_over = set(np.flatnonzero(found.irrep == k).tolist())
        for neurons, grid in mine:
            grids.append(dataclasses.replace(grid, start=len(laid)))
            laid += neurons
            blocks.append(len(laid))
            left_over -= set(neurons)
        laid += sorted(left_over)
        if left_over:
            blocks.append(len(laid))
    left_over = sorted(set(range(len(members))) - set(laid))
    laid += left_over
    if left_over:
        blocks.append(len(laid))
    by_place = np.array(laid, np.int64)
    return Explanation(
        silent,
        leaders,
        ratios,
        members[by_place],
        exponents[by_place],
        np.ascontiguousarray((row * factor)[:, by_place], np.float32),
        np.ascontiguousarray((column * factor)[:, by_place].T, np.float32),
        np.array(blocks, np.int64),
        tuple(_circuit(irreps[k], part, by_place, factor, inter) for k, part in parts.items()),
        tuple(grids),
    )


def merge(left, right, unembed):
    """Neurons that can be left out, and which are about multiples of stronger ones."""
    n, m = left.shape
    silent = _silent(left, right, unembed)
    leaders, ratios = np.arange(m), np.ones(m, np.float32)
    both, span = np.concatenate([left, right]), np.ptp(unembed, axis=1)
    norms = np.square(both).sum(axis=0)
    strength = norms * span**2
    rank = np.argsort(-strength, kind="stable")
    todo = [int(i) for i in rank if not silent[i]]
    allowed = MERGED / max(m, 1)
    while todo:
        i, *others = todo
        ratio = (both[:, i] @ both[:, others] / norms[i]).astype(np.float32).astype(np.float64)
        off = np.abs(both[:, others] - ratio * both[:, [i]])
        cost = (off[:n].max(axis=0, initial=0) + off[n:].max(axis=0, initial=0)) * span[others]
        same = (cost < allowed) & (ratio != 0)
        for j, c in zip(np.array(others, int)[same], ratio[same], strict=True):
            leaders[j], ratios[j] = i, c
        todo = [j for j, yes in zip(others, same, strict=True) if not yes]
    return silent, leaders, ratios


def _merged(left, right, unembed, standing, members):
    """The smaller network: what `verify` makes of it, but for linear parts."""
    silent, leaders, ratios = standing
    u = np.zeros_like(unembed)
    loud = ~silent
    np.add.at(u, leaders[loud], np.abs(ratios[loud], dtype=np.float64)[:, None] * unembed[loud])
    return left[:, members], right[:, members], u[members] - u[members].mean(axis=1, keepdims=True)


def _exponents(rest, spread) -> Int[np.ndarray, " neuron"]:
    """Powers of two that make the rest of u and the interaction of a neuron equally large."""
    noise = np.sqrt(np.square(rest).mean(axis=1))
    with np.errstate(divide="ignore"):
        wanted = np.round(np.log2(noise / np.maximum(spread, 1e-300)) / 2)
    return np.where(np.isfinite(wanted), np.clip(wanted, -30, 30), 0).astype(np.int64)


def _circuit(irrep: Irrep, matrices, by_place, factor, inter) -> Circuit:
    """From a matrix for each neuron, many of them zero, to a circuit of those that are not."""
    matrices = matrices / factor[:, None, None]
    mean = _mean_matrix(irrep, matrices, inter)
    flat = matrices[by_place].reshape(len(by_place), -1)
    used = np.flatnonzero(flat.any(axis=1))
    weights = flat[used[0] : used[-1] + 1].T.astype(np.float32)
    return Circuit(irrep.name, irrep.matrices, int(used[0]), np.ascontiguousarray(weights), mean)


def _silent(left, right, unembed):
    """As many of the weakest neurons as could together not take `SILENCE` from a margin."""
    most = (np.maximum(left, 0).max(axis=0) + np.maximum(right, 0).max(axis=0)) * np.ptp(
        unembed, axis=1
    )
    weakest = np.argsort(most, kind="stable")
    silent = np.zeros(len(most), bool)
    silent[weakest[np.cumsum(most[weakest]) < SILENCE]] = True
    return silent


def _additive_parts(left, right):
    """Means over y and over x of each neuron, and the size of what is left."""
    n, m = left.shape
    row, column, spread = np.empty((n, m)), np.empty((n, m)), np.empty(m)
    for i in range(m):
        h = np.maximum(left[:, i, None] + right[:, i], 0)
        mean = h.mean()
        row[:, i] = h.mean(axis=1)
        column[:, i] = h.mean(axis=0) - mean
        spread[i] = np.sqrt(max(np.square(h - row[:, i, None] - column[:, i]).mean(), 0))
    return row, column, spread


def _interaction(left, right, row, column):
    def of(i):
        return np.maximum(left[:, i, None] + right[:, i], 0) - row[:, i, None] - column[:, i]

    return of


def _unit(v: np.ndarray) -> np.ndarray:
    return v / max(float(np.linalg.norm(v)), 1e-300)


def find_directions(left, right, unembed, irreps) -> Directions:
    """The irrep of each neuron, and its vectors within."""
    left, right, unembed = (np.asarray(w, np.float64) for w in (left, right, unembed))
    n, m = left.shape
    functions = [left.T, right.T, unembed]
    spectra = [energies(f - f.mean(axis=1, keepdims=True), irreps) for f in functions]
    totals = [s.sum(axis=1) for s in spectra]
    relative = [s / np.maximum(t, 1e-300)[:, None] for s, t in zip(spectra, totals, strict=True)]
    which = np.sum(relative, axis=0)[:, 1:].argmax(axis=1) + 1 if len(irreps) > 1 else np.zeros(m)
    which = which.astype(int)
    size = np.sqrt((totals[0] + totals[1]) * totals[2])
    silent = size <= TINY * size.max(initial=0)
    shares = np.stack([r[np.arange(m), which] for r in relative])
    b, b2, a, matrices = [], [], [], []
    for i in range(m):
        irrep = irreps[which[i]]
        of_l, of_r, of_u = (
            fourier(f[i], [irrep])[0] for f in (left.T, right.T, unembed)
        )  # l = b^T rho a gives b a^T, r = -a^T rho b' gives -a b'^T, u gives c b b'^T
        vb = np.linalg.svd(np.hstack([_unit(of_l), _unit(of_u)]))[0][:, 0]
        vb2 = np.linalg.svd(np.hstack([_unit(of_r).T, _unit(of_u).T]))[0][:, 0]
        va, va2 = _unit(of_l.T @ vb), -_unit(of_r @ vb2)
        if va @ va2 < 0:
            vb2, va2 = -vb2, -va2
        b.append(vb)
        b2.append(vb2)
        a.append(_unit(va + va2))
        matrices.append(of_u * irrep.multiplicity / n)
    which[silent] = -1
    return Directions(which, shares, b, b2, a, matrices)


@dataclasses.dataclass(frozen=True, eq=False)
class _Placed:
    """Which pair of points of which pair of sets each neuron of an irrep has."""

    sets: list[RhoSet]
    cells: dict[int, tuple[int, int, int, int]]
    """Neuron: set and point of b, set and point of b'."""


def _place(group: Group, irrep: Irrep, number: int, found: Directions) -> _Placed:
    members = np.flatnonzero(found.irrep == number)
    if irrep.type != "real" or irrep.dimension < 2 or not len(members):
        return _Placed([], {})
    b = np.array([found.b[i] for i in members])
    b2 = np.array([found.b2[i] for i in members])
    sets = find_rho_sets(group, irrep, np.concatenate([b, b2]), tolerance=SET_TOLERANCE)
    cells = {}
    for j, i in enumerate(members):
        best = (1 - SET_TOLERANCE, None)
        for sign in (1, -1):
            ends = []
            for v in (b[j], b2[j]):
                near = [s.nearest(sign * v[None]) for s in sets]
                cosines = [float(c[0]) for _, c in near]
                k = int(np.argmax(cosines)) if cosines else -1
                ends.append((k, int(near[k][0][0]), cosines[k]) if cosines else (-1, -1, -1.0))
            worst = min(ends[0][2], ends[1][2])
            if worst > best[0]:
                best = (worst, (*ends[0][:2], *ends[1][:2]))
        if best[1] is not None:
            cells[int(i)] = best[1]
    return _Placed(sets, cells)


def _second_irreps(k, found, unembed, irreps):
    """Neurons of other irreps whose unembedding has a good part of its rest in irrep k."""
    chosen = []
    for other in range(len(irreps)):
        members = np.flatnonzero(found.irrep == other)
        if other == k or not len(members):
            continue
        spectrum = energies(unembed[members], irreps).sum(axis=0)
        spectrum[[0, other]] = 0
        if spectrum[k] > 0.3 * spectrum.sum():
            chosen.append(members)
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)


def _matrices(found: Directions, unembed, irreps, detail: int):
    """The matrix M_i of each neuron in each irrep that is used, and what they add up to."""
    n, parts = unembed.shape[1], {}
    projected = np.zeros_like(unembed)
    for k, irrep in enumerate(irreps):
        members = np.flatnonzero(found.irrep == k) if k else np.zeros(0, np.int64)
        extra = _second_irreps(k, found, unembed, irreps) if k and detail else members[:0]
        if not len(members) + len(extra):
            continue
        matrices = np.zeros((len(unembed), irrep.dimension, irrep.dimension))
        for i in (*members, *extra):
            matrices[i] = fourier(unembed[i], [irrep])[0] * irrep.multiplicity / n
        if matrices.any():
            parts[k] = matrices
            projected += np.tensordot(matrices, irrep.matrices, axes=((1, 2), (1, 2)))
    return parts, projected


def _mean_matrix(irrep: Irrep, matrices, inter):
    """Mean over all pairs of rho(x)^T V(x, y) rho(y)^T."""
    n, d = len(irrep.matrices), irrep.dimension
    total = np.zeros((d, d))
    for i in np.flatnonzero(matrices.any(axis=(1, 2))):
        first = np.tensordot(irrep.matrices.transpose(0, 2, 1), inter(i), axes=(0, 0))  # a c y
        u, s, vt = np.linalg.svd(matrices[i])
        for e in range(d):
            if s[e] > 1e-12 * s[0]:
                a = np.tensordot(first, u[:, e], axes=(1, 0)) * s[e]  # d y
                b = irrep.matrices @ vt[e]  # rho(y) b'; the frame of y is rho(y) b'
                total += a @ b
    return total / n**2


def _grids(group: Group, irrep: Irrep, placed: _Placed, inter) -> list[tuple[list[int], Grid]]:
    """Neurons of each grid, and the grid, whose start is not known yet."""
    kinds: dict[tuple[int, int], list[int]] = {}
    for i, (s, _, s2, _) in placed.cells.items():
        kinds.setdefault((s, s2), []).append(i)
    grids = []
    for (s, s2), members in sorted(kinds.items()):
        first, second = placed.sets[s], placed.sets[s2]
        tables = {}
        for i in members:
            p, p2 = placed.cells[i][1], placed.cells[i][3]
            q = first.action[group.inverses, p]
            q2 = second.action[:, p2]
            hot = np.eye(len(first.vectors))[q]
            hot2 = np.eye(len(second.vectors))[q2]
            mean = hot.T @ inter(i) @ hot2 / np.outer(hot.sum(axis=0), hot2.sum(axis=0))
            tables[i] = mean
        left = list(members)
        while len(left) >= 4:
            stack = np.array([tables[i].ravel() for i in left])
            near, shape = _common_shape(stack)
            if near.sum() < 4:
                break
            mine = [i for i, yes in zip(left, near, strict=True) if yes]
            grid = _grid(irrep, first, second, placed, mine, shape, stack[near] @ shape)
            grids.append((mine, grid))
            left = [i for i, yes in zip(left, near, strict=True) if not yes]
    return grids


def _common_shape(stack: Float[np.ndarray, "neuron cell"]) -> tuple[np.ndarray, np.ndarray]:
    """Neurons whose tables are alike up to a positive scale, and that table."""
    shape = np.linalg.svd(stack, full_matrices=False)[2][0]
    near = np.zeros(len(stack), bool)
    for _ in range(5):
        cosine = stack @ shape / np.linalg.norm(stack, axis=1).clip(1e-300)
        if cosine.sum() < 0:
            shape, cosine = -shape, -cosine
        near = cosine > SAME_TABLE
        if near.sum() < 4:
            break
        shape = np.linalg.svd(stack[near], full_matrices=False)[2][0]
        shape = shape * np.sign((stack[near] @ shape).sum())
    return near, shape


def _grid(irrep, first: RhoSet, second: RhoSet, placed, mine, shape, scale) -> Grid:
    table = shape.reshape(len(first.vectors), len(second.vectors))
    flip, flip2 = first.antipodes, second.antipodes
    if (flip == np.arange(len(flip))).any() or (flip2 == np.arange(len(flip2))).any():
        flip, flip2 = np.arange(len(flip)), np.arange(len(flip2))
    table = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
    table = ((table + table[flip][:, flip2]) / 2).astype(np.float32)
    # To the last bit: the verifier asks for equality.
    first_half = np.arange(len(flip))[:, None] <= flip[:, None]
    table = np.where(first_half, table, table[flip][:, flip2])
    return Grid(
        irrep.name, 0, first.action, second.action,
        np.array([placed.cells[i][1] for i in mine]), np.array([placed.cells[i][3] for i in mine]),
        flip, flip2, scale.astype(np.float32), table.astype(np.float32),
        first.vectors, second.vectors,
    )  # fmt: skip
