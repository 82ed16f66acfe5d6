"""Families of a wider sense: features of one type in many orientations.

    find_types      decoder blocks -> clusters of features that are alike in their best poses
    FeatureTypes    clusters, poses, how separated they are, and the null of both

Exact poses of one feature are rare in real networks; curves of several orientations are similar
rather than equal. So features are clustered (average linkage) by their largest cosine over all
shifts, corrected for noise. Features need not be turned by whole steps, so under eight rotations or
more the cosine and the angle are interpolated between neighboring ones (by a parabola).

Similarity alone proves nothing, since features that share a few strong directions are all similar.
The null are dictionaries of features that have no types:

    channels    each channel with its whole orbit from another feature, with a random sign
    mixtures    random rotations among features: the same second moments of all entries

Clusters are cut where features of null dictionaries that are in a cluster are a small share of
those that are in one here: `fdr`, of the null that has more. Cut at as many features in clusters,
null dictionaries also say how separated clusters are by chance.

Source: Gorton, Group crosscoders for mechanistic analysis of symmetry (2024), for families.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from mechatlas.analysis.symmetry.class_names import n_turns
from mechatlas.analysis.symmetry.families import TILE, GroupSpectra, shuffle_channels
from mechatlas.analysis.symmetry.shift_evidence import common_direction, remove_direction
from mechatlas.maths.groups import Group

MAX_CLUSTERED = 2048
"""Upper limit on the features that are clustered: those that can be reproduced best."""
MIN_RELIABILITY = 0.5
"""Reliability below which a feature is not clustered: the correction for noise would be noise."""
N_NULLS = 15
"""Null dictionaries of each kind; a third of them for more than `MANY` features."""
MANY = 1024
"""Number of features from which fewer null dictionaries are made."""
CUTS = np.linspace(0.99, 0.2, 80)
"""Similarities at which clusters may be cut."""
MIN_TURNS = 8
"""Rotations from which on similarities are interpolated: blocks of fewer say nothing in between."""


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureTypes:
    """Clusters of features that are alike in their best poses."""

    labels: Int[np.ndarray, " feature"]
    """Cluster of each feature, 0 the largest; -1 for a feature alone."""
    references: Int[np.ndarray, " feature"]
    """Feature of the cluster most similar to the others; the feature itself if it is alone."""
    poses: Int[np.ndarray, " feature"]
    """Element h with D_g most similar to reference_gh."""
    similarity: Float[np.ndarray, " feature"]
    """Similarity to the reference in that pose, corrected for noise."""
    offsets: Float[np.ndarray, " feature"]
    """Rotation that follows the pose, in steps of the group, from -0.5 to 0.5: 0 under groups of
    few rotations."""
    cut: float
    """Mean similarity at which clusters are cut; NaN if no cut keeps to the rate."""
    n_clustered: int
    """Number of features that took part."""
    n_by_chance: float
    """Mean number of features in clusters of null dictionaries at the cut, of the larger null."""
    separation: float
    """Mean over features in clusters of the mean similarity to their own cluster, less that to the
    most similar other cluster; NaN with fewer than two clusters."""
    null_separation: Float[np.ndarray, " null"]
    """Separation of each null dictionary, cut at as many features in clusters."""

    @property
    def sizes(self) -> Int[np.ndarray, " cluster"]:
        """Number of features of each cluster, largest first."""
        return np.bincount(self.labels[self.labels >= 0])

    @property
    def p_value(self) -> float:
        """p-value of clusters as separated as these by chance; NaN without a separation."""
        if np.isnan(self.separation):
            return np.nan
        as_large = np.nan_to_num(self.null_separation, nan=-np.inf) >= self.separation
        return float((1 + as_large.sum()) / (1 + len(as_large)))


def find_types(
    blocks: Float[np.ndarray, "feature order d"],
    group: Group,
    reliability: Float[np.ndarray, " feature"] | None = None,
    *,
    fdr: float = 0.05,
    seed: int = 0,
) -> FeatureTypes:
    """Cluster features by their similarity in the best pose.

    Args:
        blocks: Decoder blocks.
        group: Group that acts on the input.
        reliability: Expected cosine between two estimates of each feature (of `Symmetry`), by which
            similarities are corrected; by default none are.
        fdr: Largest share of features in clusters that null dictionaries have as well.
        seed: Seed of the null dictionaries.
    """
    share = np.ones(len(blocks)) if reliability is None else np.nan_to_num(reliability, nan=1.0)
    centered = remove_direction(blocks, common_direction(blocks)).astype(np.float32)
    lengths = np.einsum("igk,igk->i", centered, centered, dtype=np.float64)
    usable = np.flatnonzero((share >= MIN_RELIABILITY) & (lengths > 1e-12 * lengths.max(initial=0)))
    usable = np.sort(usable[np.argsort(-share[usable], kind="stable")][:MAX_CLUSTERED])
    if len(usable) < 3:
        return _no_types(len(blocks), group, len(usable))
    unit = centered[usable] / np.sqrt(lengths[usable])[:, None, None].astype(np.float32)
    share = np.clip(share[usable], MIN_RELIABILITY, 1.0)
    random = np.random.default_rng([seed, 0x7479])
    n_nulls = N_NULLS if len(usable) <= MANY else -(-N_NULLS // 3)
    spectra = GroupSpectra(unit, share, group)
    similarity = _best_similarity(spectra, group)
    tree = _tree(similarity)
    nulls: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for name, make in NULLS.items():
        nulls[name] = []
        for _ in range(n_nulls):
            null = make(unit, random)
            own = random.permutation(share) * np.einsum("igk,igk->i", null, null, dtype=np.float64)
            near = _best_similarity(GroupSpectra(null, own, group), group)
            nulls[name].append((near, _tree(near)))
    by_chance = np.max(
        [np.mean([_n_in_clusters(tree) for _, tree in each], axis=0) for each in nulls.values()],
        axis=0,
    )
    found = _n_in_clusters(tree)
    kept = np.flatnonzero((found > 0) & (by_chance <= fdr * found))
    if not len(kept):
        return _no_types(len(blocks), group, len(usable))
    at = int(kept[-1])
    labels = _clusters(tree, float(CUTS[at]))
    separations = []
    for near, null_tree in (pair for each in nulls.values() for pair in each):
        enough = np.flatnonzero(_n_in_clusters(null_tree) >= found[at])
        cut = CUTS[enough[0]] if len(enough) else CUTS[-1]
        separations.append(_separation(near, _clusters(null_tree, float(cut))))
    return _describe(
        labels, similarity, spectra, usable, len(blocks), group,
        cut=float(CUTS[at]), n_by_chance=float(by_chance[at]),
        null_separation=np.array(separations),
    )  # fmt: skip


def _no_types(n: int, group: Group, n_clustered: int) -> FeatureTypes:
    return FeatureTypes(
        np.full(n, -1), np.arange(n), np.full(n, group.identity), np.ones(n),
        np.zeros(n), np.nan, n_clustered, 0.0, np.nan, np.empty(0),
    )  # fmt: skip


def _describe(
    labels: Int[np.ndarray, " used"],
    similarity: Float[np.ndarray, "used used"],
    spectra: GroupSpectra,
    usable: Int[np.ndarray, " used"],
    n: int,
    group: Group,
    *,
    cut: float,
    n_by_chance: float,
    null_separation: Float[np.ndarray, " null"],
) -> FeatureTypes:
    """Describe clusters of the used features by references and poses, for all features."""
    found = _no_types(n, group, len(usable))
    for k in range(labels.max() + 1):
        members = np.flatnonzero(labels == k)
        reference = members[similarity[np.ix_(members, members)].sum(axis=1).argmax()]
        by_pose = spectra.correlate(np.array([reference]), members)[0]
        found.labels[usable[members]] = k
        found.references[usable[members]] = usable[reference]
        peaks, offsets = _interpolated(by_pose, group)
        best, rows = peaks.argmax(axis=1), np.arange(len(members))
        found.poses[usable[members]] = best
        found.similarity[usable[members]] = peaks[rows, best]
        found.offsets[usable[members]] = offsets[rows, best]
        found.poses[usable[reference]] = group.identity
        found.similarity[usable[reference]], found.offsets[usable[reference]] = 1.0, 0.0
    return dataclasses.replace(
        found, cut=cut, n_by_chance=n_by_chance, null_separation=null_separation,
        separation=_separation(similarity, labels),
    )  # fmt: skip


def _best_similarity(spectra: GroupSpectra, group: Group) -> Float[np.ndarray, "n n"]:
    """Largest similarity of each pair over all shifts."""
    n = spectra.n
    best = np.empty((n, n), np.float32)
    for i in range(0, n, TILE):
        for j in range(i, n, TILE):
            a, b = slice(i, i + TILE), slice(j, j + TILE)
            best[a, b] = _interpolated(spectra.correlate(a, b), group)[0].max(axis=2)
            best[b, a] = best[a, b].T
    return best


def _interpolated(
    by_pose: Float[np.ndarray, "*pair element"], group: Group
) -> tuple[Float[np.ndarray, "*pair element"], Float[np.ndarray, "*pair element"]]:
    """Interpolate similarities between a rotation and its neighbors, with the place of the peak.

    Elements of C_n and D_n are rotations r^k first, then r^k s; the angle of both is that of r^k.
    Without enough rotations, similarities stay and all peaks are at the elements.
    """
    n = n_turns(group)
    turns = (np.arange(n) + 1) % n
    if n < MIN_TURNS or not np.array_equal(group.table[1, :n], turns):
        return by_pose, np.zeros_like(by_pose)
    values = by_pose.reshape(*by_pose.shape[:-1], -1, n)
    before, after = np.roll(values, 1, axis=-1), np.roll(values, -1, axis=-1)
    bend = 2 * values - before - after
    is_peak = (values >= before) & (values >= after) & (bend > 0)
    offset = np.where(is_peak, (after - before) / (2 * np.where(is_peak, bend, 1)), 0)
    peak = values + (after - before) * offset / 4
    return peak.reshape(by_pose.shape), offset.reshape(by_pose.shape)


def _tree(similarity: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "merge 4"]:
    """Average-linkage tree; its heights are distances 1 - similarity."""
    distance = np.clip(1 - similarity, 0, None).astype(np.float64)
    np.fill_diagonal(distance, 0)
    return hierarchy.average(squareform(distance, checks=False))


def _clusters(tree: Float[np.ndarray, "merge 4"], cut: float) -> Int[np.ndarray, " n"]:
    """Clusters of two or more at a similarity, largest first; -1 for features alone."""
    label = hierarchy.fcluster(tree, 1 - cut, criterion="distance")
    _, label, sizes = np.unique(label, return_inverse=True, return_counts=True)
    rank = np.empty(len(sizes), int)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
    return np.where(sizes[label] > 1, rank[label], -1)


def _n_in_clusters(tree: Float[np.ndarray, "merge 4"]) -> Int[np.ndarray, " cut"]:
    """Number of features in clusters of two or more at each of `CUTS`.

    A feature is in a cluster from the height at which it is first merged.
    """
    n = len(tree) + 1
    first = np.full(n, np.inf)
    for a, b, height, _ in tree:
        for node in (int(a), int(b)):
            if node < n:
                first[node] = height
    return (first[None] <= 1 - CUTS[:, None]).sum(axis=1)


def _separation(similarity: Float[np.ndarray, "n n"], labels: Int[np.ndarray, " n"]) -> float:
    """Mean similarity to the own cluster less that to the nearest other one."""
    n_clusters = int(labels.max()) + 1
    if n_clusters < 2:
        return np.nan
    inside = np.flatnonzero(labels >= 0)
    member = np.eye(n_clusters)[labels[inside]]
    sums = similarity[np.ix_(inside, inside)].astype(np.float64)
    np.fill_diagonal(sums, 0)
    sums, sizes = sums @ member, member.sum(axis=0)
    rows, of = np.arange(len(inside)), labels[inside]
    own = sums[rows, of] / (sizes[of] - 1)
    others = sums / sizes
    others[rows, of] = -np.inf
    return float((own - others.max(axis=1)).mean())


def _mix(
    unit: Float[np.ndarray, "n order d"], random: np.random.Generator
) -> Float[np.ndarray, "n order d"]:
    """Features that are random mixtures, with the same second moments of all entries."""
    n = len(unit)
    rotation, r = np.linalg.qr(random.standard_normal((n, n), np.float32))
    rotation *= np.sign(np.diag(r))
    return (rotation @ unit.reshape(n, -1)).reshape(unit.shape)


NULLS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "channels": lambda unit, random: shuffle_channels(unit, len(unit), random),
    "mixtures": _mix,
}
"""Kind of null -> function that makes a dictionary without types."""
