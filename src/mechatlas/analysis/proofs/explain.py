"""The prover: from weights to an explanation. No claim of it is trusted later.

    explain          weights, group -> explanation
    find_clusters    neurons that are the same up to scale, and neurons too weak to look at
    find_directions  the irrep of each neuron, and its vectors b, b' and a

Source: Wu et al. (ICLR 2025), sections 4 and 5, for b, b', a and circuits.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from mechatlas.analysis.proofs.rho_sets import RhoSet, find_rho_sets
from mechatlas.analysis.proofs.verifier.explanation import Explanation, Grid, IrrepCircuit
from mechatlas.analysis.proofs.verifier.structures import Clusters
from mechatlas.maths.groups import Group
from mechatlas.maths.irreps import Irrep, energies, fourier

TINY = 1e-3
"""Size of a neuron, relative to the largest, below which it belongs to no irrep."""
DEAD_LOSS = 0.3
"""Largest loss, in logits, to all dead neurons together."""
CLUSTER_LOSS = 1.0
"""Largest loss, in logits, to merging clusters."""
SET_TOLERANCE = 0.15
"""Largest 1 - cosine between a direction and the point of a rho-set."""
SAME_TABLE = 0.8
"""Least cosine between the interaction of a neuron and that of its grid."""


@dataclasses.dataclass(frozen=True, eq=False)
class NeuronDirections:
    """Irrep of each neuron, and its vectors there: l = b^T rho a, r = -a^T rho b'."""

    irrep: Int[np.ndarray, " neuron"]
    """Number of the irrep; -1 for neurons that do nothing."""
    shares: Float[np.ndarray, "3 neuron"]
    """Part of the variance of left, right and unembedding inside the irrep."""
    b: list[Float[np.ndarray, " _"]]
    """Unit vector b of each neuron, from its left and unembedding."""
    b2: list[Float[np.ndarray, " _"]]
    """Unit vector b' of each neuron, from its right and unembedding."""
    a: list[Float[np.ndarray, " _"]]
    """Unit vector a of each neuron."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Interaction:
    """relu(l_i + r_i) less additive parts, of scaled cluster representatives."""

    left: Float[np.ndarray, "order neuron"]
    right: Float[np.ndarray, "order neuron"]
    additive_x: Float[np.ndarray, "order neuron"]
    additive_y: Float[np.ndarray, "order neuron"]

    def of(self, i: int | np.integer) -> Float[np.ndarray, "order order"]:
        """I_i(x, y) of one neuron."""
        hidden = np.maximum(self.left[:, i, None] + self.right[:, i], 0)
        return hidden - self.additive_x[:, i, None] - self.additive_y[:, i]


def explain(
    left: Float[np.ndarray, "order width"],
    right: Float[np.ndarray, "order width"],
    unembed: Float[np.ndarray, "width order"],
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
    """
    irreps = group.irreps()
    left, right, unembed = (np.asarray(w, np.float64) for w in (left, right, unembed))
    clusters = find_clusters(left, right, unembed)
    dead, representative_of, _ = clusters
    members = np.flatnonzero(~dead & (representative_of == np.arange(len(dead))))
    first, second, u = _merged(left, right, unembed, clusters, members)
    additive_x, additive_y, spread = _additive_parts(first, second)
    directions = find_directions(first, second, u, irreps)
    placed = [_place(group, irrep, k, directions) for k, irrep in enumerate(irreps)]
    parts, projected = _matrices(directions, u, irreps, detail)
    exponents = _exponents(u - projected, spread)
    factor = np.ldexp(1.0, exponents)
    scaled = (w * factor for w in (first, second, additive_x, additive_y))
    interaction = _Interaction(*scaled)
    order, block_offsets, grids = [], [0], []
    for k, irrep in enumerate(irreps):
        left_over = set(np.flatnonzero(directions.irrep == k).tolist())
        for neurons, grid in _grids(group, irrep, placed[k], interaction):
            grids.append(dataclasses.replace(grid, first_neuron=len(order)))
            order += neurons
            block_offsets.append(len(order))
            left_over -= set(neurons)
        order += sorted(left_over)
        if left_over:
            block_offsets.append(len(order))
    left_over = sorted(set(range(len(members))) - set(order))
    order += left_over
    if left_over:
        block_offsets.append(len(order))
    places = np.array(order, np.int64)
    circuits = tuple(
        _circuit(irreps[k], part, places, factor, interaction) for k, part in parts.items()
    )
    return Explanation(
        *clusters,
        representatives=members[places],
        exponents=exponents[places],
        additive_x=np.ascontiguousarray(interaction.additive_x[:, places], np.float32),
        additive_y=np.ascontiguousarray(interaction.additive_y[:, places].T, np.float32),
        block_offsets=np.array(block_offsets, np.int64),
        circuits=circuits,
        grids=tuple(grids),
    )


def find_clusters(
    left: Float[np.ndarray, "order width"],
    right: Float[np.ndarray, "order width"],
    unembed: Float[np.ndarray, "width order"],
) -> Clusters:
    """Find neurons that can be left out, and neurons that are about multiples of stronger ones.

    Args:
        left: l_i(x).
        right: r_i(y).
        unembed: u_i(z).
    """
    n, m = left.shape
    dead = _find_dead(left, right, unembed)
    representative_of, scale_factors = np.arange(m), np.ones(m, np.float32)
    both, span = np.concatenate([left, right]), np.ptp(unembed, axis=1)
    norms = np.square(both).sum(axis=0)
    strength = norms * span**2
    rank = np.argsort(-strength, kind="stable")
    todo = [int(i) for i in rank if not dead[i]]
    allowed = CLUSTER_LOSS / max(m, 1)
    while todo:
        i, *others = todo
        ratio = (both[:, i] @ both[:, others] / norms[i]).astype(np.float32).astype(np.float64)
        off = np.abs(both[:, others] - ratio * both[:, [i]])
        cost = (off[:n].max(axis=0, initial=0) + off[n:].max(axis=0, initial=0)) * span[others]
        same = (cost < allowed) & (ratio != 0)
        for j, c in zip(np.array(others, int)[same], ratio[same], strict=True):
            representative_of[j], scale_factors[j] = i, c
        todo = [j for j, yes in zip(others, same, strict=True) if not yes]
    return Clusters(dead, representative_of, scale_factors)


def _merged(
    left: Float[np.ndarray, "order width"],
    right: Float[np.ndarray, "order width"],
    unembed: Float[np.ndarray, "width order"],
    clusters: Clusters,
    members: Int[np.ndarray, " neuron"],
) -> tuple[
    Float[np.ndarray, "order neuron"],
    Float[np.ndarray, "order neuron"],
    Float[np.ndarray, "neuron order"],
]:
    """The network of the cluster representatives, as `verify` merges it but for linear parts."""
    dead, representative_of, scale_factors = clusters
    u, live = np.zeros_like(unembed), ~dead
    factors = np.abs(scale_factors[live], dtype=np.float64)[:, None]
    np.add.at(u, representative_of[live], factors * unembed[live])
    return left[:, members], right[:, members], u[members] - u[members].mean(axis=1, keepdims=True)


def _exponents(
    residual: Float[np.ndarray, "neuron order"], spread: Float[np.ndarray, " neuron"]
) -> Int[np.ndarray, " neuron"]:
    """Powers of two that make the residual of u and the interaction of a neuron equally large."""
    noise = np.sqrt(np.square(residual).mean(axis=1))
    with np.errstate(divide="ignore"):
        wanted = np.round(np.log2(noise / np.maximum(spread, 1e-300)) / 2)
    return np.where(np.isfinite(wanted), np.clip(wanted, -30, 30), 0).astype(np.int64)


def _circuit(
    irrep: Irrep,
    matrices: Float[np.ndarray, "neuron d d"],
    places: Int[np.ndarray, " neuron"],
    factor: Float[np.ndarray, " neuron"],
    interaction: _Interaction,
) -> IrrepCircuit:
    """Circuit of the neurons whose matrix in an irrep is not zero."""
    matrices = matrices / factor[:, None, None]
    mean = _mean_matrix(irrep, matrices, interaction)
    flat = matrices[places].reshape(len(places), -1)
    used = np.flatnonzero(flat.any(axis=1))
    coefficients = np.ascontiguousarray(flat[used[0] : used[-1] + 1].T.astype(np.float32))
    return IrrepCircuit(irrep.name, irrep.matrices, int(used[0]), coefficients, mean)


def _find_dead(
    left: Float[np.ndarray, "order width"],
    right: Float[np.ndarray, "order width"],
    unembed: Float[np.ndarray, "width order"],
) -> Bool[np.ndarray, " width"]:
    """Weakest neurons that could together take no more than `DEAD_LOSS` from a margin."""
    most = (np.maximum(left, 0).max(axis=0) + np.maximum(right, 0).max(axis=0)) * np.ptp(
        unembed, axis=1
    )
    weakest = np.argsort(most, kind="stable")
    dead = np.zeros(len(most), bool)
    dead[weakest[np.cumsum(most[weakest]) < DEAD_LOSS]] = True
    return dead


def _additive_parts(
    left: Float[np.ndarray, "order neuron"], right: Float[np.ndarray, "order neuron"]
) -> tuple[
    Float[np.ndarray, "order neuron"],
    Float[np.ndarray, "order neuron"],
    Float[np.ndarray, " neuron"],
]:
    """Means over y and over x of each neuron, and the standard deviation of the remainder."""
    n, m = left.shape
    additive_x, additive_y, spread = np.empty((n, m)), np.empty((n, m)), np.empty(m)
    for i in range(m):
        h = np.maximum(left[:, i, None] + right[:, i], 0)
        mean = h.mean()
        additive_x[:, i] = h.mean(axis=1)
        additive_y[:, i] = h.mean(axis=0) - mean
        rest = h - additive_x[:, i, None] - additive_y[:, i]
        spread[i] = np.sqrt(max(np.square(rest).mean(), 0))
    return additive_x, additive_y, spread


def _unit(v: np.ndarray) -> np.ndarray:
    """The array divided by its norm."""
    return v / max(float(np.linalg.norm(v)), 1e-300)


def find_directions(
    left: Float[np.ndarray, "order neuron"],
    right: Float[np.ndarray, "order neuron"],
    unembed: Float[np.ndarray, "neuron order"],
    irreps: Sequence[Irrep],
) -> NeuronDirections:
    """Find the irrep of each neuron, and its vectors there.

    Args:
        left: l_i(x).
        right: r_i(y).
        unembed: u_i(z).
        irreps: All irreps of the group, the trivial one first.
    """
    left, right, unembed = (np.asarray(w, np.float64) for w in (left, right, unembed))
    m = left.shape[1]
    functions = [left.T, right.T, unembed]
    spectra = [energies(f - f.mean(axis=1, keepdims=True), irreps) for f in functions]
    totals = [s.sum(axis=1) for s in spectra]
    relative = [s / np.maximum(t, 1e-300)[:, None] for s, t in zip(spectra, totals, strict=True)]
    which = np.sum(relative, axis=0)[:, 1:].argmax(axis=1) + 1 if len(irreps) > 1 else np.zeros(m)
    which = which.astype(int)
    size = np.sqrt((totals[0] + totals[1]) * totals[2])
    idle = size <= TINY * size.max(initial=0)
    shares = np.stack([r[np.arange(m), which] for r in relative])
    b, b2, a = [], [], []
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
    which[idle] = -1
    return NeuronDirections(which, shares, b, b2, a)


@dataclasses.dataclass(frozen=True, eq=False)
class _Placed:
    """Rho-sets of an irrep, and the cell of each of its neurons."""

    sets: list[RhoSet]
    cells: dict[int, tuple[int, int, int, int]]
    """Neuron: set and point of b, set and point of b'."""


def _place(group: Group, irrep: Irrep, number: int, directions: NeuronDirections) -> _Placed:
    """Look for rho-sets that the vectors of an irrep's neurons are near to."""
    members = np.flatnonzero(directions.irrep == number)
    if irrep.type != "real" or irrep.dimension < 2 or not len(members):
        return _Placed([], {})
    b = np.array([directions.b[i] for i in members])
    b2 = np.array([directions.b2[i] for i in members])
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


def _second_irreps(
    k: int,
    directions: NeuronDirections,
    unembed: Float[np.ndarray, "neuron order"],
    irreps: Sequence[Irrep],
) -> Int[np.ndarray, " member"]:
    """Neurons of other irreps whose unembedding has a good part of its remainder in irrep k."""
    chosen = []
    for other in range(len(irreps)):
        members = np.flatnonzero(directions.irrep == other)
        if other == k or not len(members):
            continue
        spectrum = energies(unembed[members], irreps).sum(axis=0)
        spectrum[[0, other]] = 0
        if spectrum[k] > 0.3 * spectrum.sum():
            chosen.append(members)
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)


def _matrices(
    directions: NeuronDirections,
    unembed: Float[np.ndarray, "neuron order"],
    irreps: Sequence[Irrep],
    detail: int,
) -> tuple[dict[int, Float[np.ndarray, "neuron d d"]], Float[np.ndarray, "neuron order"]]:
    """Compute M_i of each neuron in each irrep that is used, and the sum of all <M_i, rho(z)>."""
    n, parts = unembed.shape[1], {}
    projected = np.zeros_like(unembed)
    for k, irrep in enumerate(irreps):
        members = np.flatnonzero(directions.irrep == k) if k else np.zeros(0, np.int64)
        extra = _second_irreps(k, directions, unembed, irreps) if k and detail else members[:0]
        if not len(members) + len(extra):
            continue
        matrices = np.zeros((len(unembed), irrep.dimension, irrep.dimension))
        for i in (*members, *extra):
            matrices[i] = fourier(unembed[i], [irrep])[0] * irrep.multiplicity / n
        if matrices.any():
            parts[k] = matrices
            projected += np.tensordot(matrices, irrep.matrices, axes=((1, 2), (1, 2)))
    return parts, projected


def _mean_matrix(
    irrep: Irrep, matrices: Float[np.ndarray, "neuron d d"], interaction: _Interaction
) -> Float[np.ndarray, "d d"]:
    """Mean over all pairs of rho(x)^T V(x, y) rho(y)^T."""
    n, d = len(irrep.matrices), irrep.dimension
    total = np.zeros((d, d))
    for i in np.flatnonzero(matrices.any(axis=(1, 2))):
        first = np.tensordot(
            irrep.matrices.transpose(0, 2, 1), interaction.of(i), axes=(0, 0)
        )  # a c y
        u, s, vt = np.linalg.svd(matrices[i])
        for e in range(d):
            if s[e] > 1e-12 * s[0]:
                a = np.tensordot(first, u[:, e], axes=(1, 0)) * s[e]  # d y
                b = irrep.matrices @ vt[e]  # rho(y) b'; the frame of y is rho(y) b'
                total += a @ b
    return total / n**2


def _grids(
    group: Group, irrep: Irrep, placed: _Placed, interaction: _Interaction
) -> list[tuple[list[int], Grid]]:
    """Neurons of each grid, and the grid, whose first neuron is not known yet."""
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
            mean = hot.T @ interaction.of(i) @ hot2 / np.outer(hot.sum(axis=0), hot2.sum(axis=0))
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


def _common_shape(
    stack: Float[np.ndarray, "neuron cell"],
) -> tuple[Bool[np.ndarray, " neuron"], Float[np.ndarray, " cell"]]:
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


def _grid(
    irrep: Irrep,
    first: RhoSet,
    second: RhoSet,
    placed: _Placed,
    mine: list[int],
    shape: Float[np.ndarray, " cell"],
    scale: Float[np.ndarray, " neuron"],
) -> Grid:
    """Grid of some neurons, with a table that is exactly the same at antipodes."""
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
