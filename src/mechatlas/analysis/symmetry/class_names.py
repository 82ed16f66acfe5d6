"""Names of the classes of stabilizers.

name_classes         a name for each conjugacy class of subgroups
APPROXIMATELY        word before the name of a class of approximate stabilizers
NOT_SHOWN            label of features of which neither a symmetry nor a lack of it is shown
rotation_subgroup    the rotations inside a dihedral group; `n_turns` counts them by its name
"""

import re
from collections import Counter

import numpy as np

from mechatlas.maths.groups import Group

NOT_SHOWN = "not shown"
APPROXIMATELY = "approximately"
_TURNS = {2: "half-turn", 3: "third-turn", 4: "quarter-turn", 6: "sixth-turn", 8: "eighth-turn"}


def rotation_subgroup(group: Group) -> frozenset[int] | None:
    """Find the rotations of a dihedral group, or of a group called Cn; None for other groups.

    The rotations are a cyclic subgroup with every element outside an involution, which is unique
    from order 6 on; smaller groups must be called D1 or D2, with their rotations first.
    """
    if re.fullmatch(r"C\d+", group.name):
        return frozenset(range(group.order))
    n = group.order // 2
    if group.order >= 6 and group.order % 2 == 0:
        for z in np.flatnonzero(group.element_orders == n):
            rotations = group.closure([z])
            outside = [g for g in range(group.order) if g not in rotations]
            if (group.element_orders[outside] == 2).all():
                return rotations
    return frozenset(range(n)) if group.name in ("D1", "D2") else None


def n_turns(group: Group) -> int:
    """Number of rotations of a group that is called Cn or Dn."""
    return group.order // 2 if group.name.startswith("D") else group.order


def name_classes(group: Group, *, acts_by_rotation: bool = True) -> tuple[str, ...]:
    """Name each class of `Group.lattice().classes`; no two names are equal.

    Names of a dihedral group, or one called Cn, that acts by rotations and mirrors say what leaves
    the feature unchanged: invariant, half-turn (line-like), quarter-turn, mirror only, half-turn
    and mirror, ..., none (curve-like). Names of other groups are types of subgroups. Where several
    classes would share a name, a mirror or generators of the first member are added.
    """
    lattice = group.lattice()
    rotations = rotation_subgroup(group) if acts_by_rotation else None
    names = []
    for each, kind in zip(lattice.classes, lattice.names, strict=True):
        if each.order == group.order:
            names.append("invariant" if group.order > 1 else "none")
        elif rotations is None:
            names.append(kind if each.order > 1 else "none")
        else:
            names.append(_rotation_name(each.representative, rotations))
    counts = Counter(names)
    return tuple(
        name
        if counts[name] == 1
        else f"{name}: {_generators(group, each.representative, rotations)}"
        for name, each in zip(names, lattice.classes, strict=True)
    )


def _rotation_name(subgroup: frozenset[int], rotations: frozenset[int]) -> str:
    k = len(subgroup & rotations)
    turn = _TURNS.get(k, f"1/{k} turn") if k > 1 else ""
    if not subgroup <= rotations:
        return f"{turn} and mirror" if turn else "mirror only"
    if k == 1:
        return "none (curve-like)"
    return "half-turn (line-like)" if k == 2 else turn


def _generators(group: Group, subgroup: frozenset[int], rotations: frozenset[int] | None) -> str:
    """Name a mirror of a subgroup that has rotations and mirrors, else its generators."""
    mirrors = sorted(subgroup - rotations) if rotations else []
    if mirrors:
        return group.element_names[mirrors[0]]
    cyclic = [g for g in sorted(subgroup) if group.element_orders[g] == len(subgroup)][:1]
    generators: list[int] = []
    for g in cyclic or sorted(subgroup):
        if g not in group.closure(generators):
            generators.append(g)
    return ", ".join(group.element_names[g] for g in generators)
