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


@dataclasses.dataclass(frozen=True, eq=False)
class Neighbors:
    """The most similar atoms of each atom, nearest first."""

    latent: Int[np.ndarray, "latent n"]
    """Latent of the neighbor; -1 where there is none."""
    cosine: Float[np.ndarray, "latent n"]
    chance: float
    """Cosine with the nearest atom that one shuffled atom in a hundred exceeds. A shuffled atom has
    every channel drawn from the values of the atoms in that channel."""


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
    for i in range(0, len(pool), 1024):
        block = pool[i : i + 1024]
        products = unit[block] @ unit[pool].T
        products[np.arange(len(block)), np.arange(i, i + len(block))] = -np.inf
        nearest = np.argpartition(-products, kept - 1, axis=1)[:, :kept]
        value = np.take_along_axis(products, nearest, axis=1)
        order = np.argsort(-value, axis=1, kind="stable")
        latent[block, :kept] = pool[np.take_along_axis(nearest, order, axis=1)]
        cosine[block, :kept] = np.take_along_axis(value, order, axis=1)
    return Neighbors(latent, cosine, _chance(unit[pool], seed))


def _chance(unit: Float[np.ndarray, "latent d_in"], seed: int) -> float:
    random = np.random.default_rng(seed)
    drawn = random.integers(len(unit), size=(min(len(unit), 2048), unit.shape[1]))
    shuffled = unit_rows(np.take_along_axis(unit, drawn, axis=0))
    return float(np.quantile((shuffled @ unit.T).max(axis=1), 0.99))


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
    flat[alive] = umap(unit, seed=seed)
    return flat, "UMAP"
