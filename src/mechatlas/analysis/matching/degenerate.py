"""Latents that no match can be about: without a direction, without activity, or not unique.

    Side                  which latents of a dictionary are paired, and which may be matched
    sides                 the latents of two dictionaries
    first_of_direction    the first latent with the direction of each
    only_unique           rows without those that share a direction

A latent of zeros has no direction; a constant one, or one that is never active, says nothing; and
of two latents with one direction none is the partner of a third. Paired, they would take partners
from others and move the null. So they take no part. Of several with one direction the first is
paired, so that the others' pairs and evidence are as if it were alone, but it is never matched.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

from mechatlas.analysis.matching.folding import Cost, FoldedDictionary, unit_rows
from mechatlas.base import InputError

SHORTEST = 1e-6
"""Length of a vector that counts as zero, as a share of the longest."""
SAME = 2e-6
"""Distance of two vectors of length 1 that are the same but for rounding."""
PROJECTIONS = 8
"""Random directions along which vectors are compared at first."""


class Side(NamedTuple):
    """Latents of one dictionary that take part in a match."""

    paired: Int[np.ndarray, " rows"]
    """Latents that are paired."""
    unique: Bool[np.ndarray, " latent"]
    """Latents that may be matched: paired, and no other has their direction."""


def first_of_direction(units: Float[np.ndarray, "n d"]) -> Int[np.ndarray, " n"]:
    """Find the first row that is the same as each, but for rounding.

    Args:
        units: Rows at length 1.
    """
    seen: dict[bytes, int] = {}
    first = np.array([seen.setdefault(row.tobytes(), k) for k, row in enumerate(units)])
    distinct = np.fromiter(seen.values(), np.int64)
    directions = np.random.default_rng(0).standard_normal((units.shape[1], PROJECTIONS))
    reach = SAME * float(np.linalg.norm(directions))
    near = KDTree(units[distinct] @ directions).query_pairs(reach, output_type="ndarray")
    i, j = distinct[near].T
    same = np.linalg.norm(units[i].astype(np.float64) - units[j], axis=1) <= SAME
    n, pairs = len(units), np.stack([i[same], j[same]])
    links = csr_array((np.ones(pairs.shape[1], bool), (pairs[0], pairs[1])), shape=(n, n))
    group = connected_components(links, directed=False)[1]
    least = np.full(n, n)
    np.minimum.at(least, group, first)
    return least[group[first]]


def sides(
    x: Float[np.ndarray, "latent_a width"],
    y: Float[np.ndarray, "latent_b width"],
    folded: tuple[FoldedDictionary, FoldedDictionary],
    cost: Cost,
    live: tuple[Bool[np.ndarray, " latent_a"] | None, Bool[np.ndarray, " latent_b"] | None],
) -> tuple[Side, Side]:
    """Select the latents of two dictionaries that take part.

    Args:
        x: Vectors of A that are compared.
        y: Vectors of B that are compared.
        folded: Both dictionaries.
        cost: Vectors that are compared.
        live: Latents of A and of B that are active on data and not constant, where it is known.

    Raises:
        InputError: No latent of a side takes part.
    """
    made = []
    for name, rows, side, mask in zip("AB", (x, y), folded, live, strict=True):
        usable = _has_direction(rows) & side.live
        if cost != "codes":
            usable &= _has_direction(side.decoder) & ~_constant(side.decoder)
        if mask is not None:
            usable &= mask
        if not usable.any():
            raise InputError(_NONE_ACTIVE[cost == "codes"].format(name=name))
        made.append(_side(rows, np.flatnonzero(usable)))
    return made[0], made[1]


_NONE_ACTIVE = (
    "No latent of {name} can be paired: all are zero, constant or never active.",
    "No latent of {name} is active often enough on these rows to be paired by its codes. Give more "
    "rows.",
)


def _side(rows: Float[np.ndarray, "latent width"], usable: Int[np.ndarray, " usable"]) -> Side:
    first = first_of_direction(unit_rows(rows[usable]))
    n_same = np.bincount(first, minlength=len(usable))
    unique = np.zeros(len(rows), bool)
    unique[usable] = n_same[first] == 1
    return Side(usable[np.unique(first)], unique)


def only_unique(units: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Set to zero all rows at length 1 whose direction another one has too."""
    first = first_of_direction(units)
    return units * (np.bincount(first, minlength=len(units))[first] == 1)[:, None]


def _has_direction(rows: Float[np.ndarray, "n d"]) -> Bool[np.ndarray, " n"]:
    length = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    return length > SHORTEST * length.max()


def _constant(rows: Float[np.ndarray, "n d"]) -> Bool[np.ndarray, " n"]:
    """Mark rows whose entries are all equal; in one or two dimensions any row may be so."""
    return (rows == rows[:, :1]).all(axis=1) & (rows.shape[1] > 2)
