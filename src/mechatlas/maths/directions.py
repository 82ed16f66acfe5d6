"""Rows that say something of their own: with a direction, not constant, and not there twice.

distinct_rows         rows that take part in a comparison, and those that may be claimed
first_of_direction    the first row with the direction of each
has_direction         rows that are not zero
is_constant           rows whose entries are all equal
"""

from typing import NamedTuple

import numpy as np
import xxhash
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

SHORTEST = 1e-6
"""Length of a vector that counts as zero, as a share of the longest."""
SAME = 2e-6
"""Distance of two vectors of length 1 that are the same but for rounding."""
PROJECTIONS = 8
"""Random directions along which vectors are compared at first."""


class DistinctRows(NamedTuple):
    """Rows that take part in a comparison, so that the others move nobody's threshold."""

    kept: Int[np.ndarray, " kept"]
    """Numbers of the rows that take part: of several with one direction the first."""
    unique: Bool[np.ndarray, " row"]
    """Mask of the rows that take part and share their direction with no other."""


def distinct_rows(rows: Float[np.ndarray, "n d"]) -> DistinctRows:
    """Select the rows that are not zero, not constant, and the first of their direction."""
    usable = np.flatnonzero(has_direction(rows) & ~is_constant(rows))
    unique = np.zeros(len(rows), bool)
    if not len(usable):
        return DistinctRows(usable, unique)
    units = rows[usable].astype(np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    first = first_of_direction(units)
    unique[usable] = np.bincount(first, minlength=len(usable))[first] == 1
    return DistinctRows(usable[np.unique(first)], unique)


def first_of_direction(units: Float[np.ndarray, "n d"]) -> Int[np.ndarray, " n"]:
    """Find the first row that is the same as each, but for rounding."""
    seen: dict[bytes, int] = {}
    digests = (xxhash.xxh3_128_digest(row.tobytes()) for row in units)
    first = np.array([seen.setdefault(digest, k) for k, digest in enumerate(digests)])
    distinct = np.fromiter(seen.values(), np.int64)
    directions = np.random.default_rng(0).standard_normal((units.shape[1], PROJECTIONS))
    directions = directions.astype(units.dtype)
    reach = SAME * float(np.linalg.norm(directions))
    near = KDTree((units @ directions)[distinct]).query_pairs(reach, output_type="ndarray")
    i, j = distinct[near].T
    same = np.linalg.norm(units[i].astype(np.float64) - units[j], axis=1) <= SAME
    n, pairs = len(units), np.stack([i[same], j[same]])
    links = csr_array((np.ones(pairs.shape[1], bool), (pairs[0], pairs[1])), shape=(n, n))
    group = connected_components(links, directed=False)[1]
    least = np.full(n, n)
    np.minimum.at(least, group, first)
    return least[group[first]]


def has_direction(rows: Float[np.ndarray, "n d"]) -> Bool[np.ndarray, " n"]:
    """Mark rows that are not zero, next to the longest of them."""
    length = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    return length > SHORTEST * length.max()


def is_constant(rows: Float[np.ndarray, "n d"]) -> Bool[np.ndarray, " n"]:
    """Mark rows whose entries are all equal; in one or two dimensions any row may be so."""
    return (rows == rows[:, :1]).all(axis=1) & (rows.shape[1] > 2)
