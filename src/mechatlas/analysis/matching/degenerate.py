"""Latents that no match can be about: without a direction, without activity, or not unique.

    Side                  which latents of a dictionary are paired, and which may be matched
    sides                 the latents of two dictionaries
    only_unique           rows without those that share a direction

A latent of zeros has no direction; a constant one, or one that is never active, says nothing; and
of two latents with one direction none is the partner of a third. Paired, they would take partners
from others and move the null. So they take no part. Of several with one direction the first is
paired, so that the others' pairs and evidence are as if it were alone, but it is never matched.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from mechatlas.analysis.matching.folding import Cost, FoldedDictionary, unit_rows
from mechatlas.base import InputError
from mechatlas.maths.directions import first_of_direction, has_direction, is_constant


class Side(NamedTuple):
    """Latents of one dictionary that take part in a match."""

    paired: Int[np.ndarray, " rows"]
    """Latents that are paired."""
    unique: Bool[np.ndarray, " latent"]
    """Latents that may be matched: paired, and no other has their direction."""


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
        usable = has_direction(rows) & side.live
        if cost != "codes":
            usable &= has_direction(side.decoder) & ~is_constant(side.decoder)
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
    first = first_of_direction(unit_rows(rows if len(usable) == len(rows) else rows[usable]))
    n_same = np.bincount(first, minlength=len(usable))
    unique = np.zeros(len(rows), bool)
    unique[usable] = n_same[first] == 1
    return Side(usable[np.unique(first)], unique)


def only_unique(units: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Set to zero all rows at length 1 whose direction another one has too."""
    first = first_of_direction(units)
    return units * (np.bincount(first, minlength=len(units))[first] == 1)[:, None]
