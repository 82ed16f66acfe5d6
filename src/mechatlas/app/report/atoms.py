"""Geometry of the decoder rows of a dictionary.

neighbors    the most similar atoms of each, and the similarity of shuffled atoms
flat_map     a map of all atoms in two dimensions
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from mechatlas.app.report.layout import umap
from mechatlas.maths.arrays import unit_rows

MIN_ATOMS_FOR_UMAP = 32
"""Number of atoms below which principal components are drawn."""
MAX_ATOMS_FOR_UMAP = 16_384
"""Number of atoms laid out; further ones are put beside the nearest of these."""
EXACT = 32_768
"""Number of atoms up to which every pair is compared to find the nearest."""
PROBES = 4
"""Groups of atoms that an approximate search looks into."""
BLOCK = 1 << 25
"""Upper limit on the cosines held at once."""


@dataclasses.dataclass(frozen=True, eq=False)
class Neighbors:
    """The most similar atoms of each atom, nearest first."""

    latent: Int[np.ndarray, "latent n"]
    """Latent of the neighbor; -1 where there is none."""
    cosine: Float[np.ndarray, "latent n"]
    chance: float
    """Cosine with the nearest atom that one shuffled atom in a hundred exceeds. A shuffled atom has
    every channel drawn from the values of the atoms in that channel."""
    recall: float = 1.0
    """Share of the true neighbors that were found, for 100 atoms drawn at random."""


def neighbors(
    atoms: Float[np.ndarray, "latent d_in"],
    alive: Bool[np.ndarray, " latent"],
    *,
    n: int = 8,
    seed: int = 0,
) -> Neighbors:
    """Find the nearest atoms by cosine, among those that are ever active.

    Args:
        atoms: Decoder rows.
        alive: Latents that are ever active.
        n: Neighbors of each atom.
        seed: Seed of the shuffled atoms.
    """
    unit = unit_rows(atoms.astype(np.float32))
    latent = np.full((len(atoms), n), -1, dtype=np.int32)
    cosine = np.zeros((len(atoms), n), dtype=np.float32)
    pool = np.flatnonzero(alive)
    kept = min(n, len(pool) - 1)
    if kept < 1:
        return Neighbors(latent, cosine, 1.0)
    unit, recall = unit[pool], 1.0
    if len(pool) <= EXACT:
        index, value = _nearest(unit, np.arange(len(pool)), np.arange(len(pool)), kept)
    else:
        index, value = _nearest_in_groups(unit, kept, seed)
        drawn = np.random.default_rng(seed).choice(len(pool), 100, replace=False)
        true, _ = _nearest(unit, drawn, np.arange(len(pool)), kept)
        hits = [np.isin(true[i], index[row]).mean() for i, row in enumerate(drawn)]
        recall = float(np.mean(hits))
    latent[pool, :kept] = np.where(index >= 0, pool[index], -1)
    cosine[pool, :kept] = np.where(index >= 0, value, 0)
    return Neighbors(latent, cosine, _chance(unit, seed), recall)


def _nearest(
    unit: Float[np.ndarray, "n d_in"],
    rows: Int[np.ndarray, " row"],
    others: Int[np.ndarray, " other"],
    k: int,
) -> tuple[Int[np.ndarray, "row k"], Float[np.ndarray, "row k"]]:
    """Find the atoms nearest to some among others, nearest first; -1 where there are fewer."""
    index = np.full((len(rows), k), -1)
    cosine = np.full((len(rows), k), -np.inf, dtype=np.float32)
    size, kept = max(1, min(1024, BLOCK // max(len(others), 1))), min(k, len(others))
    for i in range(0, len(rows) if kept else 0, size):
        block = rows[i : i + size]
        products = unit[block] @ unit[others].T
        products[block[:, None] == others[None]] = -np.inf
        near = np.argpartition(-products, kept - 1, axis=1)[:, :kept]
        value = np.take_along_axis(products, near, axis=1)
        order = np.argsort(-value, axis=1, kind="stable")
        cosine[i : i + size, :kept] = np.take_along_axis(value, order, axis=1)
        index[i : i + size, :kept] = others[np.take_along_axis(near, order, axis=1)]
    return np.where(np.isfinite(cosine), index, -1), cosine


def _nearest_in_groups(
    unit: Float[np.ndarray, "n d_in"], k: int, seed: int
) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
    """Find near atoms among those with the same nearest centers, atoms drawn at random."""
    n = len(unit)
    centers = np.sort(np.random.default_rng(seed).choice(n, round(2 * n**0.5), replace=False))
    groups, _ = _nearest(unit, np.arange(n), centers, PROBES)
    groups[centers, 1:] = groups[centers, :-1]  # a center is its own nearest
    groups[centers, 0] = centers
    index = np.full((n, k), -1)
    cosine = np.zeros((n, k), dtype=np.float32)
    flat, of = np.argsort(groups, axis=None, kind="stable"), np.sort(groups, axis=None)
    home = np.argsort(groups[:, 0], kind="stable")
    ends = np.searchsorted(of, [centers, centers + 1]).T
    at = np.searchsorted(groups[home, 0], [centers, centers + 1]).T
    for (begin, end), (first, last) in zip(ends, at, strict=True):
        own, others = home[first:last], np.sort(flat[begin:end] // PROBES)
        index[own], cosine[own] = _nearest(unit, own, others, k)
    return index, cosine


def _chance(unit: Float[np.ndarray, "latent d_in"], seed: int) -> float:
    random = np.random.default_rng(seed)
    drawn = random.integers(len(unit), size=(min(len(unit), 2048), unit.shape[1]))
    shuffled = unit_rows(np.take_along_axis(unit, drawn, axis=0))
    size = max(1, BLOCK // len(unit))
    largest = [(shuffled[i : i + size] @ unit.T).max(axis=1) for i in range(0, len(shuffled), size)]
    return float(np.quantile(np.concatenate(largest), 0.99))


def flat_map(
    atoms: Float[np.ndarray, "latent d_in"], alive: Bool[np.ndarray, " latent"], *, seed: int = 0
) -> tuple[Float[np.ndarray, "latent 2"], str]:
    """Lay out each atom that is ever active in two dimensions.

    Args:
        atoms: Decoder rows.
        alive: Latents that are ever active.
        seed: Seed of UMAP.

    Returns:
        The coordinates, NaN for atoms that are never active, and the name of the method: UMAP of
        cosines, or the first two principal components where there are too few atoms for it.
        Of very many atoms, some drawn at random are laid out and the others put beside them.
    """
    flat = np.full((len(atoms), 2), np.nan, dtype=np.float32)
    unit = unit_rows(atoms[alive].astype(np.float32))
    if len(unit) < MIN_ATOMS_FOR_UMAP:
        if len(unit) > 1:
            centered = unit - unit.mean(axis=0)
            axes = np.linalg.svd(centered, full_matrices=False)[2][:2]
            flat[alive, : len(axes)] = centered @ axes.T
            flat[alive, len(axes) :] = 0
        return flat, "principal components"
    if len(unit) <= MAX_ATOMS_FOR_UMAP:
        flat[alive] = umap(unit, seed=seed)
        return flat, "UMAP"
    random = np.random.default_rng(seed)
    drawn = np.sort(random.choice(len(unit), MAX_ATOMS_FOR_UMAP, replace=False))
    laid = umap(unit[drawn], seed=seed)
    near, _ = _nearest(unit, np.arange(len(unit)), drawn, 1)
    beside = laid[np.searchsorted(drawn, near[:, 0])]
    spread = np.abs(laid).max() / len(laid) ** 0.5
    placed = beside + random.normal(scale=0.3 * spread, size=beside.shape)
    placed[drawn] = laid
    flat[alive] = placed
    return flat, f"UMAP of {MAX_ATOMS_FOR_UMAP:,} features, each other one beside its nearest,"
