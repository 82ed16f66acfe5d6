"""Finite sets of vectors that an irrep permutes, and which neurons point into them.

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
"""Vectors in the largest set that is looked for. A grid has the square of it as cells."""


@dataclasses.dataclass(frozen=True, eq=False)
class RhoSet:
    """An orbit of unit vectors."""

    vectors: Float[np.ndarray, "point d"]
    action: Int[np.ndarray, "order point"]
    """`action[g, p]`: rho(g) takes vector p to this one."""
    antipodes: Int[np.ndarray, " point"]
    """Where the negative of each vector is, or the vector itself if it is not in the set."""

    def nearest(self, directions: Float[np.ndarray, "many d"]) -> tuple[np.ndarray, np.ndarray]:
        """The nearest point of each direction, and the cosine."""
        cosines = directions @ self.vectors.T
        points = cosines.argmax(axis=1)
        return points, cosines[np.arange(len(points)), points]


def find_rho_sets(
    group: Group, irrep: Irrep, directions: Float[np.ndarray, "many d"], *, tolerance: float = 0.1
) -> list[RhoSet]:
    """The orbits that some directions are near to, those with most of them first.

    Args:
        group: The group.
        irrep: Of real type, dimension at least 2.
        directions: Unit vectors, such as b and b' of all neurons of the irrep.
        tolerance: Largest 1 - cosine between a direction and its point.
    """
    left = np.arange(len(directions))
    found: list[tuple[int, RhoSet]] = []
    while len(left):
        rho_set = _orbit(group, irrep, directions[left[0]], tolerance)
        if rho_set is None:
            left = left[1:]
            continue
        near = np.abs(directions[left] @ rho_set.vectors.T).max(axis=1) > 1 - tolerance
        near[0] = True
        found.append((int(near.sum()), rho_set))
        left = left[~near]
    found.sort(key=lambda item: -item[0])
    return [rho_set for count, rho_set in found if count > 1]


def _orbit(
    group: Group, irrep: Irrep, direction: Float[np.ndarray, " d"], tolerance: float
) -> RhoSet | None:
    images = irrep.matrices @ direction
    fixing = np.flatnonzero(images @ direction > 1 - 2 * tolerance)
    if group.order > LARGEST * len(fixing) or not group.is_subgroup(fixing.tolist()):
        return None
    # The mean over H is the nearest vector that H fixes exactly.
    vector = images[fixing].mean(axis=0)
    vector /= np.linalg.norm(vector)
    action = group.coset_action(fixing.tolist())
    action.flags.writeable = False  # so that a verifier may remember what it found of it
    cosets = group.left_cosets(fixing.tolist())
    vectors = irrep.matrices[cosets[:, 0]] @ vector
    gram = vectors @ vectors.T
    if (gram - np.eye(len(gram))).max() > 1 - 1e-6:  # H is larger than what was seen of it
        return None
    opposite = gram.argmin(axis=1)
    symmetric = bool(gram.min() < -1 + 1e-6)
    antipodes = opposite if symmetric else np.arange(len(gram))
    return RhoSet(vectors, action, antipodes)
