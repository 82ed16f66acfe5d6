"""Rho-sets: finite sets of vectors that an irrep permutes.

    find_rho_sets   directions of some neurons -> the sets they belong to
    RhoSet          vectors, how the group moves them, and opposite ones

A set is the orbit of a vector b; with H the elements that fix b, it moves as the cosets of H.

Source: Wu et al. (ICLR 2025), section 4.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from mechatlas.maths.groups import Group
from mechatlas.maths.irreps import Irrep

LARGEST = 30
"""Number of vectors in the largest set that is looked for. A grid has its square as cells."""


@dataclasses.dataclass(frozen=True, eq=False)
class RhoSet:
    """An orbit of unit vectors."""

    vectors: Float[np.ndarray, "point d"]
    """Unit vectors, a row for each point."""
    action: Int[np.ndarray, "order point"]
    """Point `action[g, p]` that rho(g) takes point p to."""
    antipodes: Int[np.ndarray, " point"]
    """Point of the negative of each vector, or the point itself if that is not in the set."""

    def nearest(
        self, directions: Float[np.ndarray, "many d"]
    ) -> tuple[Int[np.ndarray, " many"], Float[np.ndarray, " many"]]:
        """Find the nearest point of each direction, and the cosine."""
        cosines = directions @ self.vectors.T
        points = cosines.argmax(axis=1)
        return points, cosines[np.arange(len(points)), points]


def find_rho_sets(
    group: Group, irrep: Irrep, directions: Float[np.ndarray, "many d"], *, tolerance: float = 0.1
) -> list[RhoSet]:
    """Find the orbits that some directions are near to, those with most directions first.

    Args:
        group: The group.
        irrep: Of real type, dimension at least 2.
        directions: Unit vectors, such as b and b' of all neurons of the irrep.
        tolerance: Largest 1 - cosine between a direction and its point.
    """
    left = np.arange(len(directions))
    counted: list[tuple[int, RhoSet]] = []
    while len(left):
        rho_set = _orbit(group, irrep, directions[left[0]], tolerance)
        if rho_set is None:
            left = left[1:]
            continue
        near = np.abs(directions[left] @ rho_set.vectors.T).max(axis=1) > 1 - tolerance
        near[0] = True
        counted.append((int(near.sum()), rho_set))
        left = left[~near]
    counted.sort(key=lambda item: -item[0])
    return [rho_set for count, rho_set in counted if count > 1]


def _orbit(
    group: Group, irrep: Irrep, direction: Float[np.ndarray, " d"], tolerance: float
) -> RhoSet | None:
    """Orbit of the nearest vector that many elements fix, or None where it would be too large."""
    images = irrep.matrices @ direction
    fixing = np.flatnonzero(images @ direction > 1 - 2 * tolerance)
    if group.order > LARGEST * len(fixing) or not group.is_subgroup(fixing.tolist()):
        return None
    # The mean over H is the nearest vector that H fixes exactly.
    vector = images[fixing].mean(axis=0)
    vector /= np.linalg.norm(vector)
    action = group.coset_action(fixing.tolist())
    action.flags.writeable = False  # so that a verifier checks it only once
    cosets = group.left_cosets(fixing.tolist())
    vectors = irrep.matrices[cosets[:, 0]] @ vector
    gram = vectors @ vectors.T
    if (gram - np.eye(len(gram))).max() > 1 - 1e-6:  # H is larger than what was seen of it
        return None
    opposite = gram.argmin(axis=1)
    symmetric = bool(gram.min() < -1 + 1e-6)
    antipodes = opposite if symmetric else np.arange(len(gram))
    return RhoSet(vectors, action, antipodes)
