"""What the decoder rows of a dictionary say by themselves.

neighbours       the atoms most alike, and how alike shuffled atoms would be
flat_map         a picture of all atoms in two dimensions
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from mechatlas.app.report.layout import umap

FEWEST_FOR_UMAP = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Neighbours:
    """The most similar atoms of each atom, nearest first."""

    latent: Int[np.ndarray, "latent n"]
    """Number of the neighbour; -1 where there is none."""
    cosine: Float[np.ndarray, "latent n"]
    chance: float
    """Cosine that one shuffled atom in a hundred has with its nearest atom. Shuffled: every
    channel drawn anew from what the atoms have in that channel."""


def neighbours(
    atoms: Float[np.ndarray, "latent d_in"],
    alive: Bool[np.ndarray, " latent"],
    *,
    n: int = 8,
    seed: int = 0,
) -> Neighbours:
    """The nearest atoms by cosine, among those that are ever active."""
    unit = _unit(atoms.astype(np.float32))
    latent = np.full((len(atoms), n), -1, dtype=np.int32)
    cosine = np.zeros((len(atoms), n), dtype=np.float32)
    pool = np.flatnonzero(alive)
    kept = min(n, len(pool) - 1)
    if kept < 1:
        return Neighbours(latent, cosine, 1.0)
    for i in range(0, len(pool), 1024):
        block = pool[i : i + 1024]
        products = unit[block] @ unit[pool].T
        products[np.arange(len(block)), np.arange(i, i + len(block))] = -np.inf
        nearest = np.argpartition(-products, kept - 1, axis=1)[:, :kept]
        value = np.take_along_axis(products, nearest, axis=1)
        order = np.argsort(-value, axis=1, kind="stable")
        latent[block, :kept] = pool[np.take_along_axis(nearest, order, axis=1)]
        cosine[block, :kept] = np.take_along_axis(value, order, axis=1)
    return Neighbours(latent, cosine, _chance(unit[pool], seed))


def _unit(atoms: np.ndarray) -> np.ndarray:
    return atoms / np.maximum(np.linalg.norm(atoms, axis=1, keepdims=True), 1e-12)


def _chance(unit: np.ndarray, seed: int) -> float:
    random = np.random.default_rng(seed)
    drawn = random.integers(len(unit), size=(min(len(unit), 2048), unit.shape[1]))
    shuffled = _unit(np.take_along_axis(unit, drawn, axis=0))
    return float(np.quantile((shuffled @ unit.T).max(axis=1), 0.99))


def flat_map(
    atoms: Float[np.ndarray, "latent d_in"], alive: Bool[np.ndarray, " latent"], *, seed: int = 0
) -> tuple[Float[np.ndarray, "latent 2"], str]:
    """Two coordinates for each atom that is ever active, NaN for the others.

    Returns:
        The coordinates and the name of what made them: UMAP of cosines, or the first two
        principal components where there are too few atoms for it.
    """
    flat = np.full((len(atoms), 2), np.nan, dtype=np.float32)
    unit = _unit(atoms[alive].astype(np.float32))
    if len(unit) < FEWEST_FOR_UMAP:
        if len(unit) > 1:
            centred = unit - unit.mean(axis=0)
            axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
            flat[alive, : len(axes)] = centred @ axes.T
            flat[alive, len(axes) :] = 0
        return flat, "principal components"
    flat[alive] = umap(unit, seed=seed)
    return flat, "UMAP"
