"""What the classes of stabilisers are called.

class_names    a name for each conjugacy class of subgroups
rotations      the turns inside a dihedral group
"""

import re
from collections import Counter

import numpy as np

from mechatlas.maths.groups import Group

NOT_RELIABLE = "not reliable"
_TURNS = {2: "half-turn", 3: "third-turn", 4: "quarter-turn", 6: "sixth-turn", 8: "eighth-turn"}


def rotations(group: Group) -> frozenset[int] | None:
    """The turns inside a dihedral group, or all of a group called Cn; None for other groups.

    They are a cyclic subgroup with every element outside an involution. That is unique from
    order 6 on; smaller groups must be called D1 or D2, with their turns first.
    """
    if re.fullmatch(r"C\d+", group.name):
        return frozenset(range(group.order))
    n = group.order // 2
    if group.order >= 6 and group.order % 2 == 0:
        for z in np.flatnonzero(group.element_orders == n):
            turns = group.closure([z])
            outside = [g for g in range(group.order) if g not in turns]
            if (group.element_orders[outside] == 2).all():
                return turns
    return frozenset(range(n)) if group.name in ("D1", "D2") else None


def class_names(group: Group, *, turns: bool = True) -> tuple[str, ...]:
    """A name for each class of `Group.lattice().classes`; all are different.

    If a dihedral group, or one called Cn, acts by turns and mirrors: invariant, half-turn
    (line-like), quarter-turn, mirror only, half-turn and mirror, ..., none (curve-like).
    Otherwise the type of the subgroup. Where several classes would be called the same, a mirror or
    generators of the first member are named too.
    """
    lattice = group.lattice()
    turning = rotations(group) if turns else None
    names = []
    for each, kind in zip(lattice.classes, lattice.names, strict=True):
        if each.order == group.order:
            names.append("invariant" if group.order > 1 else "none")
        elif turning is None:
            names.append(kind if each.order > 1 else "none")
        else:
            names.append(_turning(each.representative, turning))
    often = Counter(names)
    return tuple(
        name if often[name] == 1 else f"{name}: {_telling(group, each.representative, turning)}"
        for name, each in zip(names, lattice.classes, strict=True)
    )


def _turning(subgroup: frozenset[int], turns: frozenset[int]) -> str:
    k = len(subgroup & turns)
    turn = _TURNS.get(k, f"1/{k} turn") if k > 1 else ""
    if not subgroup <= turns:
        return f"{turn} and mirror" if turn else "mirror only"
    if k == 1:
        return "none (curve-like)"
    return "half-turn (line-like)" if k == 2 else turn


def _telling(group: Group, subgroup: frozenset[int], turns: frozenset[int] | None) -> str:
    """A mirror of it if it turns and mirrors, else generators, which no other subgroup has."""
    mirrors = sorted(subgroup - turns) if turns else []
    if mirrors:
        return group.element_names[mirrors[0]]
    whole = [g for g in sorted(subgroup) if group.element_orders[g] == len(subgroup)][:1]
    generators: list[int] = []
    for g in whole or sorted(subgroup):
        if g not in group.closure(generators):
            generators.append(g)
    return ", ".join(group.element_names[g] for g in generators)
