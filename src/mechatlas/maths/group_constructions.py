"""Finite groups made of permutations and of other groups.

permutation_group    group that some permutations generate
direct_product       tuples, multiplied part by part
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from mechatlas.maths.groups import MAX_ORDER, Group, GroupError, refuse_if_too_large


def permutation_group(
    generators: ArrayLike, *, name: str | None = None
) -> tuple[Group, Int[np.ndarray, "order degree"]]:
    """The group that some permutations generate.

    The product a*b applies b first: (a*b)(i) = a(b(i)).

    Args:
        generators: One permutation of 0 to degree - 1 a row; row[i] is where i goes.
        name: What to call the group.

    Returns:
        The group, and the permutation that each label stands for: all of them in
        lexicographic order, so the identity is 0. Elements are named by their cycles, with
        points counted from 1.

    Raises:
        GroupError: A row is not a permutation, or there are more than `MAX_ORDER` elements.
    """
    gens = np.atleast_2d(np.asarray(generators))
    for i, row in enumerate(gens):
        if not np.array_equal(np.sort(row), np.arange(gens.shape[1])):
            raise GroupError(
                f"Generator {i} is not a permutation of 0 to {gens.shape[1] - 1}: {row.tolist()}."
            )
    permutations = np.array(_permutation_closure([tuple(row) for row in gens.tolist()]))
    label = {tuple(row): i for i, row in enumerate(permutations.tolist())}
    # (s*g)*x = s*(g*x): the row of s*g in the table follows from that of g.
    left = [np.array([label[tuple(row)] for row in s[permutations].tolist()]) for s in gens]
    table = np.empty((len(permutations), len(permutations)), np.int32)
    table[0] = np.arange(len(permutations))
    waiting, known = [0], {0}
    for g in waiting:
        for images in left:
            product = int(images[g])
            if product not in known:
                table[product] = images[table[g]]
                known.add(product)
                waiting.append(product)
    names = [_cycles(row) for row in permutations.tolist()]
    return Group(table, name=name, element_names=names), permutations


def direct_product(*factors: Group, name: str | None = None) -> Group:
    """All tuples of elements, multiplied part by part.

    Labels count the tuples in lexicographic order: the pair (a, b) is a * second.order + b.

    Raises:
        GroupError: The product has more than `MAX_ORDER` elements.
    """
    order = math.prod(factor.order for factor in factors)
    refuse_if_too_large(order)
    table = np.zeros((1, 1), np.int32)
    for factor in factors:
        size = len(table) * factor.order
        pairs = table[:, None, :, None] * factor.order + factor.table[None, :, None, :]
        table = pairs.reshape(size, size)
    names = itertools.product(*(factor.element_names for factor in factors))
    return Group(
        table,
        name=name or "x".join(factor.name for factor in factors),
        element_names=[f"({', '.join(parts)})" for parts in names],
    )


def _permutation_closure(generators: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    identity = tuple(range(len(generators[0])))
    found, waiting = {identity}, [identity]
    for permutation in waiting:
        for s in generators:
            product = tuple([s[i] for i in permutation])
            if product not in found:
                found.add(product)
                waiting.append(product)
        if len(found) > MAX_ORDER:
            raise GroupError(
                f"The permutations generate more than {MAX_ORDER} elements, which is the most "
                "that is taken."
            )
    return sorted(found)


def _cycles(permutation: Sequence[int]) -> str:
    seen: set[int] = set()
    text = ""
    for start in range(len(permutation)):
        cycle, i = [], start
        while i not in seen:
            seen.add(i)
            cycle.append(str(i + 1))
            i = permutation[i]
        text += f"({' '.join(cycle)})" if len(cycle) > 1 else ""
    return text or "e"
