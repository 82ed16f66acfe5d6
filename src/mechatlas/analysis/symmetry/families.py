"""Which features are one another's poses.

Main path, in reading order:

    Spectra      blocks of all features -> their Fourier transforms on the group
    find_links   pairs that are poses of one another, against noise and against chance
    gather       links -> families, each with a reference, and the pose of each member

The same feature in another pose has blocks D'_g = D_gh. So the likeness of i and j is

    max over h of F(h) / sqrt(energy_i energy_j),    F(h) = sum over g of <D^i_gh, D^j_g>,

a correlation on the group for every pair. Its transform is the product of the transforms of the
two, so all pairs cost sum of d^3 over irreps of dimension d, instead of order^2: for the dihedral
group of order 32 a seventeenth. Pairs are looked at in tiles; only links are kept.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse, stats

from mechatlas.analysis.symmetry.evidence import SUPPORT, common_part, without
from mechatlas.base import Progress, no_progress
from mechatlas.maths.groups import Group
from mechatlas.maths.irreps import Irrep

TILE = 384
"""Features on each side of a tile of pairs."""
DRAWN = 512
"""Features that the chance of a likeness is measured with."""


class Spectra:
    """Fourier transforms of features, whose energies are brought to 1.

    Args:
        blocks: Decoder blocks, without their common part.
        energy: Of each feature, without that of noise; 0 for those that are to match nothing.
        group: The group.
    """

    def __init__(
        self,
        blocks: Float[np.ndarray, "feature order d"],
        energy: Float[np.ndarray, " feature"],
        group: Group,
    ) -> None:
        self.irreps: Sequence[Irrep] = group.irreps()
        self.n, self.order = len(blocks), group.order
        alive = energy > 0
        scale = np.where(alive, 1 / np.sqrt(np.where(alive, energy, 1)), 0).astype(blocks.dtype)
        self.parts: list[np.ndarray] = []
        inverse: list[np.ndarray] = []
        for irrep in self.irreps:
            size = irrep.dimension
            part = np.empty((self.n, size, blocks.shape[2] * size), blocks.dtype)
            matrices = irrep.matrices.reshape(self.order, -1).astype(blocks.dtype)
            for i in range(0, self.n, TILE):
                some = blocks[i : i + TILE] * scale[i : i + TILE, None, None]
                transform = (some.transpose(0, 2, 1) @ matrices).reshape(len(some), -1, size, size)
                part[i : i + TILE] = transform.transpose(0, 3, 1, 2).reshape(len(some), size, -1)
            self.parts.append(part)
            weights = irrep.matrices.transpose(2, 1, 0) * irrep.multiplicity / self.order
            inverse.append(weights.reshape(-1, self.order))
        self._inverse = np.concatenate(inverse).astype(blocks.dtype)

    def correlate(
        self,
        first: slice | np.ndarray,
        second: slice | np.ndarray,
        other: "Spectra | None" = None,
    ) -> Float[np.ndarray, "first second element"]:
        """Likeness of some features, shifted by each element, with some (of another set)."""
        columns = []
        for mine, theirs in zip(self.parts, (other or self).parts, strict=True):
            x, y = mine[first], theirs[second]
            size = x.shape[1]
            products = x.reshape(-1, x.shape[2]) @ y.reshape(-1, y.shape[2]).T
            cut = products.reshape(len(x), size, len(y), size).transpose(0, 2, 1, 3)
            columns.append(cut.reshape(len(x), len(y), -1))
        return np.concatenate(columns, axis=2) @ self._inverse


@dataclasses.dataclass(frozen=True, eq=False)
class Links:
    """Pairs of features that are alike in some pose. Likenesses, each pair both ways."""

    poses: sparse.csr_array
    """Pairs that may be exactly one another's poses."""
    kin: sparse.csr_array
    """Those, and pairs that are surely more alike than chance and `SUPPORT`."""


def find_links(
    spectra: Spectra,
    noise: Float[np.ndarray, " feature"],
    chance: float,
    rate: float,
    alike: float,
    n_entries: int,
    on_progress: Progress = no_progress,
) -> Links:
    """All pairs that are surely more alike than chance and `SUPPORT`.

    Where the noise is not known (NaN), what is seen counts, and kin are no poses: noise and
    difference look the same.

    Args:
        spectra: Of the features.
        noise: Variance of the noise of an entry over the energy of the feature; NaN where it is
            not known.
        chance: See `chance_of`.
        rate: Share of wrong links that is let through for a feature.
        alike: Poses are those pairs that are not surely less alike than this.
        n_entries: Numbers that a feature has.
        on_progress: Told how many tiles are done.
    """
    n = spectra.n
    certain = float(stats.norm.isf(rate / max(n * spectra.order, 1)))
    doubtful = float(stats.norm.isf(rate))
    found: list[tuple[np.ndarray, ...]] = []
    tiles = [(i, j) for i in range(0, n, TILE) for j in range(i, n, TILE)]
    for done, (i, j) in enumerate(tiles):
        a, b = slice(i, i + TILE), slice(j, j + TILE)
        best = spectra.correlate(a, b).max(axis=2)
        x, y = np.minimum(noise[a], 1e6)[:, None], np.minimum(noise[b], 1e6)[None]
        error = np.sqrt(x + y + n_entries * x * y)
        linked = best - np.nan_to_num(certain * error) > max(SUPPORT, chance)
        if i == j:
            linked &= np.tri(*linked.shape, k=-1, dtype=bool).T
        p, q = np.nonzero(linked)
        exact = best[p, q] + doubtful * error[p, q] >= alike
        found.append((i + p, j + q, best[p, q], exact))
        on_progress(done + 1, len(tiles))
    row, column, value, exact = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Links(
        _both_ways(row[exact], column[exact], value[exact], n), _both_ways(row, column, value, n)
    )


def _both_ways(row: np.ndarray, column: np.ndarray, value: np.ndarray, n: int) -> sparse.csr_array:
    half = sparse.coo_array((value, (row, column)), shape=(n, n))
    return sparse.csr_array(half + half.T)


def chance_of(
    blocks: Float[np.ndarray, "feature order d"],
    energy: Float[np.ndarray, " feature"],
    group: Group,
    rate: float,
    seed: int,
) -> float:
    """How alike a feature is to one whose channels were drawn from many others.

    Each channel of a drawn feature comes with its whole orbit from another feature, and with a
    random sign: channels keep how large they are and how they change with the pose, and lose what
    they have to do with one another.
    """
    random = np.random.default_rng([seed, 0x73])
    alive = np.flatnonzero(energy > 0)
    if len(alive) < 2:
        return 1.0
    n, d = min(DRAWN, len(alive)), blocks.shape[2]
    source = random.choice(alive, (n, d))
    signs = random.choice(np.array([-1, 1], blocks.dtype), (n, d))
    drawn = np.empty((n, group.order, d), blocks.dtype)
    for i in range(n):
        drawn[i] = blocks[source[i], :, np.arange(d)].T * signs[i]
    kept = random.choice(alive, n, replace=False)
    null = Spectra(drawn, _lengths(drawn), group)
    real = Spectra(blocks[kept], _lengths(blocks[kept]), group)
    best = [null.correlate(slice(i, i + TILE), slice(None), real).max(axis=2).ravel()
            for i in range(0, n, TILE)]  # fmt: skip
    return float(np.quantile(np.concatenate(best), 1 - rate / max(len(alive), 1)))


@dataclasses.dataclass(frozen=True, eq=False)
class Families:
    """Features, in families of poses of one another."""

    label: Int[np.ndarray, " feature"]
    """Number of the family; the largest is 0. A feature without relatives has its own."""
    reference: Int[np.ndarray, " feature"]
    """The feature that the poses of its family are told from."""
    pose: Int[np.ndarray, " feature"]
    """h with D_g = reference_gh: the smallest label of its coset of the reference's stabiliser."""
    likeness: Float[np.ndarray, " feature"]
    """To the reference in that pose, corrected for noise where there are halves."""
    chance: float


def gather(
    links: Links,
    spectra: Spectra,
    stabilisers: Sequence[frozenset[int]],
    group: Group,
    chance: float,
) -> Families:
    """Families around the features that have most links.

    First those of features that may be exact poses of one another. Each member is linked with
    the reference itself, so that overlapping families do not run into one another along chains.
    Then features that are still alone join the reference that they are most alike, or one
    another, if they are surely more alike than chance: in real networks poses differ a little.
    """
    n = spectra.n
    reference = _references(links.poses, np.ones(n, bool), np.arange(n))
    alone = np.bincount(reference, minlength=n)[reference] == 1
    centres = ~alone & (reference == np.arange(n))
    _join_nearest(links.kin, alone, centres, reference)
    alone &= reference == np.arange(n)
    reference = _references(links.kin, alone, reference)
    pose = np.full(n, group.identity)
    likeness = np.ones(n)
    for centre, members in _by_reference(reference):
        cosets = group.table[:, np.array(sorted(stabilisers[centre]))]
        for i in range(0, len(members), TILE):
            some = members[i : i + TILE]
            similar = spectra.correlate(np.array([centre]), some)[0][:, cosets].mean(axis=2)
            best = similar.argmax(axis=1)
            pose[some] = cosets[best].min(axis=1)
            likeness[some] = similar[np.arange(len(some)), best]
    _, found, sizes = np.unique(reference, return_inverse=True, return_counts=True)
    rank = np.argsort(np.argsort(-sizes, kind="stable"))
    return Families(rank[found], reference, pose, likeness, chance)


def _references(
    graph: sparse.csr_array,
    free: Bool[np.ndarray, " feature"],
    reference: Int[np.ndarray, " feature"],
) -> Int[np.ndarray, " feature"]:
    """Put free features together around those that have most free neighbours."""
    free, reference = free.copy(), reference.copy()

    def near(i: int | np.integer) -> np.ndarray:
        return graph.indices[graph.indptr[i] : graph.indptr[i + 1]]

    degree = np.array([int(free[near(i)].sum()) for i in range(len(free))])
    while free.any():
        centre = int(np.where(free, degree, -1).argmax())
        if degree[centre] < 1:
            break
        members = np.append(near(centre)[free[near(centre)]], centre)
        reference[members] = centre
        free[members] = False
        for member in members:  # no longer to be had
            degree[near(member)] -= 1
    return reference


def _join_nearest(
    kin: sparse.csr_array,
    alone: Bool[np.ndarray, " feature"],
    centres: Bool[np.ndarray, " feature"],
    reference: Int[np.ndarray, " feature"],
) -> None:
    """Give features that are alone the centre that they are most alike, if it is their nearest."""
    for i in np.flatnonzero(alone):
        part = slice(kin.indptr[i], kin.indptr[i + 1])
        near, value = kin.indices[part], kin.data[part]
        allowed = alone[near] | centres[near]
        if allowed.any():
            best = near[allowed][value[allowed].argmax()]
            if centres[best]:
                reference[i] = best


def _by_reference(
    reference: Int[np.ndarray, " feature"],
) -> Iterator[tuple[int, Int[np.ndarray, " member"]]]:
    """Each family of two or more: its reference and the other members."""
    order = np.argsort(reference, kind="stable")
    starts = np.flatnonzero(np.diff(reference[order], prepend=-1))
    for members in np.split(order, starts[1:]):
        if len(members) > 1:
            centre = int(reference[members[0]])
            yield centre, members[members != centre]


def families(
    blocks: Float[np.ndarray, "feature order d"],
    energy: Float[np.ndarray, " feature"],
    noise: Float[np.ndarray, " feature"],
    stabilisers: Sequence[frozenset[int]],
    group: Group,
    *,
    rate: float,
    alike: float,
    seed: int,
    on_progress: Progress = no_progress,
) -> Families:
    """Find all families.

    Args:
        blocks: Decoder blocks.
        energy: Squared length of each feature without its common part and without noise, as a
            share of the squared length with noise; 0 for those that are to match nothing.
        noise: See `find_links`.
        stabilisers: Of each feature.
        group: The group.
        rate: Of wrong links.
        alike: See `find_links`.
        seed: Of the null.
        on_progress: Told how many tiles of pairs are done.
    """
    centred = without(blocks, common_part(blocks))
    energy = energy * _lengths(centred)
    chance = chance_of(centred, energy, group, rate, seed)
    spectra = Spectra(centred, energy, group)
    entries = blocks.shape[1] * blocks.shape[2]
    links = find_links(spectra, noise, chance, rate, alike, entries, on_progress)
    return gather(links, spectra, stabilisers, group, chance)


def _lengths(blocks: Float[np.ndarray, "feature order d"]) -> Float[np.ndarray, " feature"]:
    """Squared length of all blocks of each feature."""
    return np.einsum("igk,igk->i", blocks, blocks, dtype=np.float64)
