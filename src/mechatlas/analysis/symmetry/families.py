"""Families of features that are poses of one another.

Main path, in reading order:

    GroupSpectra     blocks of all features -> their Fourier transforms on the group
    find_links       pairs that are poses of one another, beyond noise and chance
    gather_families  links -> families, each with a reference, and the pose of each member

A feature in another pose has blocks D'_g = D_gh. So the similarity of features i and j is

    max over h of F(h) / sqrt(energy_i energy_j),    F(h) = sum over g of <D^i_gh, D^j_g>,

a cross-correlation on the group. Its Fourier transform is the product of the transforms of the two
features, so all pairs cost the sum of d^3 over irreps of dimension d instead of order^2: 17 times
less for the dihedral group of order 32. Pairs are compared in tiles; only links are kept.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse, stats

from mechatlas.analysis.symmetry.shift_evidence import (
    SUPPORT_THRESHOLD,
    common_direction,
    remove_direction,
)
from mechatlas.base import Progress, no_progress
from mechatlas.maths.arrays import SparseMatrix
from mechatlas.maths.groups import Group
from mechatlas.maths.irreps import Irrep

TILE = 384
"""Number of features on each side of a tile of pairs."""
N_NULL_FEATURES = 512
"""Number of random features in the null distribution of similarities."""


class GroupSpectra:
    """Fourier transforms of features on the group, scaled to unit energy.

    Args:
        blocks: Decoder blocks without their common direction.
        energy: Squared length of each feature without noise; 0 for features that match nothing.
        group: Group that acts on the input.
    """

    def __init__(
        self,
        blocks: Float[np.ndarray, "feature order d"],
        energy: Float[np.ndarray, " feature"],
        group: Group,
    ) -> None:
        self.irreps: Sequence[Irrep] = group.irreps()
        self.n: int = len(blocks)
        self.order: int = group.order
        alive = energy > 0
        scale = np.where(alive, 1 / np.sqrt(np.where(alive, energy, 1)), 0).astype(blocks.dtype)
        self.parts: list[np.ndarray] = []
        inverse: list[np.ndarray] = []
        for irrep in self.irreps:
            size = irrep.dimension
            part = np.empty((self.n, size, blocks.shape[2] * size), blocks.dtype)
            matrices = irrep.matrices.reshape(self.order, -1).astype(blocks.dtype)
            for i in range(0, self.n, TILE):
                scaled = blocks[i : i + TILE] * scale[i : i + TILE, None, None]
                transform = scaled.transpose(0, 2, 1) @ matrices
                transform = transform.reshape(len(scaled), -1, size, size).transpose(0, 3, 1, 2)
                part[i : i + TILE] = transform.reshape(len(scaled), size, -1)
            self.parts.append(part)
            weights = irrep.matrices.transpose(2, 1, 0) * irrep.multiplicity / self.order
            inverse.append(weights.reshape(-1, self.order))
        self._inverse = np.concatenate(inverse).astype(blocks.dtype)

    def correlate(
        self,
        first: slice | Int[np.ndarray, " first"],
        second: slice | Int[np.ndarray, " second"],
        other: "GroupSpectra | None" = None,
    ) -> Float[np.ndarray, "first second element"]:
        """Correlate features, shifted by each element, with features of this or another set.

        Args:
            first: Features of this set, which are shifted.
            second: Features of the other set.
            other: Set that `second` refers to; by default this one.
        """
        columns = []
        for mine, theirs in zip(self.parts, (other or self).parts, strict=True):
            x, y = mine[first], theirs[second]
            size = x.shape[1]
            products = x.reshape(-1, x.shape[2]) @ y.reshape(-1, y.shape[2]).T
            products = products.reshape(len(x), size, len(y), size).transpose(0, 2, 1, 3)
            columns.append(products.reshape(len(x), len(y), -1))
        return np.concatenate(columns, axis=2) @ self._inverse


@dataclasses.dataclass(frozen=True, eq=False)
class PoseLinks:
    """Graphs of features that are similar in some pose, weighted by similarity, symmetric."""

    exact: SparseMatrix
    """Pairs that may be exact poses of one another."""
    related: SparseMatrix
    """Pairs that are certainly more similar than chance and `SUPPORT_THRESHOLD`."""


def find_links(
    spectra: GroupSpectra,
    noise: Float[np.ndarray, " feature"],
    chance_similarity: float,
    fdr: float,
    equality_threshold: float,
    n_entries: int,
    on_progress: Progress = no_progress,
) -> PoseLinks:
    """Find all pairs that are certainly more similar than chance and `SUPPORT_THRESHOLD`.

    Where the noise is not known (NaN), the observed similarity counts and related features are
    not called poses, since noise and difference look the same.

    Args:
        spectra: Fourier transforms of the features.
        noise: Noise variance of one entry over the energy of the feature; NaN where unknown.
        chance_similarity: Similarity of unrelated features, see `similarity_by_chance`.
        fdr: Expected number of wrong links of a feature.
        equality_threshold: Similarity that exact poses must not certainly fall short of.
        n_entries: Number of entries of all blocks of a feature.
        on_progress: Callback with the number of tiles done.
    """
    n = spectra.n
    certain = float(stats.norm.isf(fdr / max(n * spectra.order, 1)))
    doubtful = float(stats.norm.isf(fdr))
    links: list[tuple[np.ndarray, ...]] = []
    tiles = [(i, j) for i in range(0, n, TILE) for j in range(i, n, TILE)]
    for done, (i, j) in enumerate(tiles):
        a, b = slice(i, i + TILE), slice(j, j + TILE)
        best = spectra.correlate(a, b).max(axis=2)
        x, y = np.minimum(noise[a], 1e6)[:, None], np.minimum(noise[b], 1e6)[None]
        error = np.sqrt(x + y + n_entries * x * y)
        lower = best - np.nan_to_num(certain * error)
        linked = lower > max(SUPPORT_THRESHOLD, chance_similarity)
        if i == j:
            linked &= np.tri(*linked.shape, k=-1, dtype=bool).T
        p, q = np.nonzero(linked)
        exact = best[p, q] + doubtful * error[p, q] >= equality_threshold
        links.append((i + p, j + q, best[p, q], exact))
        on_progress(done + 1, len(tiles))
    row, column, value, exact = (np.concatenate(parts) for parts in zip(*links, strict=True))
    return PoseLinks(
        _symmetric_graph(row[exact], column[exact], value[exact], n),
        _symmetric_graph(row, column, value, n),
    )


def _symmetric_graph(
    row: np.ndarray, column: np.ndarray, value: np.ndarray, n: int
) -> SparseMatrix:
    half = sparse.coo_array((value, (row, column)), shape=(n, n))
    return sparse.csr_array(half + half.T)


def shuffle_channels(
    blocks: Float[np.ndarray, "feature order d"],
    n: int,
    random: np.random.Generator,
    among: Int[np.ndarray, " some"] | None = None,
) -> Float[np.ndarray, "n order d"]:
    """Draw features whose channels come, with their orbits, from different features.

    Each has a random sign: channels keep their size and how they change with the pose, and lose
    what they have to do with one another.

    Args:
        blocks: Decoder blocks.
        n: Number of features to draw.
        random: Source of random numbers.
        among: Features whose channels are taken; by default all.
    """
    source = random.choice(len(blocks) if among is None else among, (n, blocks.shape[2]))
    signs = random.choice(np.array([-1, 1], blocks.dtype), source.shape)
    return np.take_along_axis(blocks, source[:, None], axis=0) * signs[:, None]


def similarity_by_chance(
    blocks: Float[np.ndarray, "feature order d"],
    energy: Float[np.ndarray, " feature"],
    group: Group,
    fdr: float,
    seed: int,
) -> float:
    """Estimate the similarity of features to random ones whose channels come from many features.

    Args:
        blocks: Decoder blocks without their common direction.
        energy: Squared length of each feature without noise; 0 for features that match nothing.
        group: Group that acts on the input.
        fdr: Expected number of random features that exceed the estimate, for each feature.
        seed: Seed of the random features.
    """
    random = np.random.default_rng([seed, 0x73])
    alive = np.flatnonzero(energy > 0)
    if len(alive) < 2:
        return 1.0
    n = min(N_NULL_FEATURES, len(alive))
    null = shuffle_channels(blocks, n, random, alive)
    real = blocks[random.choice(alive, n, replace=False)]
    null_spectra, real_spectra = (
        GroupSpectra(each, _squared_lengths(each), group) for each in (null, real)
    )
    best = [
        null_spectra.correlate(slice(i, i + TILE), slice(None), real_spectra).max(axis=2).ravel()
        for i in range(0, n, TILE)
    ]
    return float(np.quantile(np.concatenate(best), 1 - fdr / max(len(alive), 1)))


@dataclasses.dataclass(frozen=True, eq=False)
class Families:
    """Partition of the features into families of poses of one reference."""

    label: Int[np.ndarray, " feature"]
    """Label of the family; 0 is the largest. A feature without relatives is a family alone."""
    reference: Int[np.ndarray, " feature"]
    """Index of the reference feature of the family."""
    pose: Int[np.ndarray, " feature"]
    """Pose h with D_g = reference_gh: the smallest label in its coset of the reference's
    stabilizer."""
    similarity: Float[np.ndarray, " feature"]
    """Similarity to the reference in that pose, corrected for noise where there are halves."""
    chance_similarity: float
    """Similarity of unrelated features."""


def gather_families(
    links: PoseLinks,
    spectra: GroupSpectra,
    stabilizers: Sequence[frozenset[int]],
    group: Group,
    chance_similarity: float,
) -> Families:
    """Gather families around the features with the most links.

    Families of features that may be exact poses of one another come first. Each member is linked
    with the reference itself, so that overlapping families do not merge along chains. Features
    still alone then join the reference most similar to them, or one another, if they are certainly
    more similar than chance: in real networks poses differ a little.

    Args:
        links: Pairs of similar features.
        spectra: Fourier transforms of the features.
        stabilizers: Stabilizer of each feature.
        group: Group that acts on the input.
        chance_similarity: Similarity of unrelated features, passed on to the result.
    """
    n = spectra.n
    reference = _assign_references(links.exact, np.ones(n, bool), np.arange(n))
    alone = np.bincount(reference, minlength=n)[reference] == 1
    centers = ~alone & (reference == np.arange(n))
    _join_nearest(links.related, alone, centers, reference)
    alone &= reference == np.arange(n)
    reference = _assign_references(links.related, alone, reference)
    pose = np.full(n, group.identity)
    similarity = np.ones(n)
    for center, members in _families_of_two(reference):
        cosets = group.table[:, np.array(sorted(stabilizers[center]))]
        for i in range(0, len(members), TILE):
            part = members[i : i + TILE]
            by_coset = spectra.correlate(np.array([center]), part)[0][:, cosets].mean(axis=2)
            best = by_coset.argmax(axis=1)
            pose[part] = cosets[best].min(axis=1)
            similarity[part] = by_coset[np.arange(len(part)), best]
    _, family, sizes = np.unique(reference, return_inverse=True, return_counts=True)
    rank = np.argsort(np.argsort(-sizes, kind="stable"))
    return Families(rank[family], reference, pose, similarity, chance_similarity)


def _assign_references(
    graph: SparseMatrix, free: Bool[np.ndarray, " feature"], reference: Int[np.ndarray, " feature"]
) -> Int[np.ndarray, " feature"]:
    """Gather free features around those with the most free neighbors, greedily."""
    free, reference = free.copy(), reference.copy()

    def neighbors(i: int | np.integer) -> np.ndarray:
        return graph.indices[graph.indptr[i] : graph.indptr[i + 1]]

    degree = np.array([int(free[neighbors(i)].sum()) for i in range(len(free))])
    while free.any():
        center = int(np.where(free, degree, -1).argmax())
        if degree[center] < 1:
            break
        members = np.append(neighbors(center)[free[neighbors(center)]], center)
        reference[members] = center
        free[members] = False
        for member in members:
            degree[neighbors(member)] -= 1
    return reference


def _join_nearest(
    graph: SparseMatrix,
    alone: Bool[np.ndarray, " feature"],
    centers: Bool[np.ndarray, " feature"],
    reference: Int[np.ndarray, " feature"],
) -> None:
    """Join single features to the center most similar to them, if no single feature is more so."""
    for i in np.flatnonzero(alone):
        part = slice(graph.indptr[i], graph.indptr[i + 1])
        near, value = graph.indices[part], graph.data[part]
        allowed = alone[near] | centers[near]
        if allowed.any():
            best = near[allowed][value[allowed].argmax()]
            if centers[best]:
                reference[i] = best


def _families_of_two(
    reference: Int[np.ndarray, " feature"],
) -> Iterator[tuple[int, Int[np.ndarray, " member"]]]:
    """Yield the reference and the other members of each family of two or more."""
    order = np.argsort(reference, kind="stable")
    starts = np.flatnonzero(np.diff(reference[order], prepend=-1))
    for members in np.split(order, starts[1:]):
        if len(members) > 1:
            center = int(reference[members[0]])
            yield center, members[members != center]


def find_families(
    blocks: Float[np.ndarray, "feature order d"],
    energy_share: Float[np.ndarray, " feature"],
    noise: Float[np.ndarray, " feature"],
    stabilizers: Sequence[frozenset[int]],
    group: Group,
    *,
    fdr: float,
    equality_threshold: float,
    seed: int,
    on_progress: Progress = no_progress,
) -> Families:
    """Find all families of features that are poses of one another.

    Args:
        blocks: Decoder blocks.
        energy_share: Share of each feature's squared length that is not noise; 0 for features that
            match nothing.
        noise: Noise variance of one entry over the energy of the feature; NaN where unknown.
        stabilizers: Stabilizer of each feature.
        group: Group that acts on the input.
        fdr: Expected number of wrong links of a feature.
        equality_threshold: Similarity that exact poses must not certainly fall short of.
        seed: Seed of the null distribution.
        on_progress: Callback with the number of tiles of pairs done.
    """
    centered = remove_direction(blocks, common_direction(blocks))
    energy = energy_share * _squared_lengths(centered)
    chance = similarity_by_chance(centered, energy, group, fdr, seed)
    spectra = GroupSpectra(centered, energy, group)
    n_entries = blocks.shape[1] * blocks.shape[2]
    links = find_links(spectra, noise, chance, fdr, equality_threshold, n_entries, on_progress)
    return gather_families(links, spectra, stabilizers, group, chance)


def _squared_lengths(blocks: Float[np.ndarray, "feature order d"]) -> Float[np.ndarray, " feature"]:
    return np.einsum("igk,igk->i", blocks, blocks, dtype=np.float64)
