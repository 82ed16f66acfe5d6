"""Groups and Latin squares for the tests of the mathematics of groups."""

import functools
import itertools
import math

import hypothesis.strategies as st
import numpy as np
from numpy.typing import ArrayLike

from mechatlas.maths.groups import Group
from mechatlas.maths.named_groups import cyclic, group, permutation_group

Spec = tuple[str, str] | tuple[str, int, int, int] | tuple[str, tuple[tuple[int, ...], ...]]
"""How to make a group. Drawn first and built later: a drawn value must be plain data."""

seeds = st.integers(0, 2**32 - 1)

SMALL = {"C1": 1, "C2": 2, "C3": 3, "C4": 4, "C5": 5, "C7": 7, "C9": 9, "C2xC2": 4}
SMALL |= {"D1": 2, "D3": 6, "D4": 8, "D5": 10, "Q8": 8, "A4": 12}
LARGE = {"C12": 12, "C2^4": 16, "C2xC4xC3": 24, "C3xC9": 27, "D8": 16, "D9": 18, "Q12": 12}
LARGE |= {"Q16": 16, "S4": 24, "C23": 23, "A5": 60, "Q8xC5": 40, "S5": 120}


def specs(max_order: int) -> st.SearchStrategy[Spec]:
    """Named groups, products, semidirect products and permutation groups, up to an order."""
    orders = SMALL | LARGE
    orders |= {f"{a}x{b}": i * j for a, i in SMALL.items() for b, j in SMALL.items()}
    names = [name for name, order in orders.items() if order <= max_order]
    sizes = [(n, m) for n in range(1, 17) for m in range(1, 9) if n * m <= max_order]
    points = st.permutations(range(5 if max_order >= 120 else 4)).map(tuple)
    return st.one_of(
        st.tuples(st.just("named"), st.sampled_from(names)),
        st.tuples(st.sampled_from(sizes), st.integers(0, 7)).map(
            lambda drawn: ("metacyclic", *drawn[0], drawn[1])
        ),
        st.tuples(st.just("permutations"), st.lists(points, min_size=1, max_size=3).map(tuple)),
    )


@functools.cache
def build(spec: Spec) -> Group:
    """The group that was drawn."""
    match spec:
        case ("metacyclic", int(n), int(m), int(choice)):
            return _metacyclic(n, m, choice)
        case ("permutations", tuple(generators)):
            return permutation_group(np.array(generators))[0]
        case (_, str(name)):
            return group(name)
    raise AssertionError(spec)


def _metacyclic(n: int, m: int, choice: int) -> Group:
    """C_n : C_m, where the generator of C_m multiplies by a unit whose order divides m."""
    units = [u for u in range(1, n + 1) if math.gcd(u, n) == 1 and pow(u, m, n) == 1 % n]
    unit = units[choice % len(units)]
    action = [[pow(unit, h, n) * x % n for x in range(n)] for h in range(m)]
    return semidirect_product(cyclic(n), cyclic(m), action)


def semidirect_product(normal: Group, acting: Group, action: ArrayLike) -> Group:
    """Pairs (n, h), labelled n * acting.order + h: (n, h) * (m, k) = (n * action[h](m), h * k)."""
    maps = np.asarray(action)
    n = np.repeat(np.arange(normal.order), acting.order)
    h = np.tile(np.arange(acting.order), normal.order)
    moved = maps[h[:, None], n[None, :]]
    return Group(normal.table[n[:, None], moved] * acting.order + acting.table[h[:, None], h])


def relabelled(spec: Spec, seed: int) -> tuple[Group, Group, np.ndarray]:
    """A group, the same with other labels, and the new label of each element."""
    original = build(spec)
    labels = np.random.default_rng(seed).permutation(original.order)
    return original, original.relabel(labels), labels


@st.composite
def latin_squares(draw: st.DrawFn, *, with_identity: bool) -> np.ndarray:
    """Random Latin squares of side up to 7, from a cyclic one by switching cycles of row pairs."""
    n = draw(st.integers(1, 7))
    square = np.add.outer(np.arange(n), np.arange(n)) % n
    for _ in range(draw(st.integers(0, 12)) if n > 1 else 0):
        i, j = draw(st.permutations(range(n)))[:2]
        start = draw(st.integers(0, n - 1))
        columns, column = [start], int(np.flatnonzero(square[i] == square[j, start])[0])
        while column != start:
            columns.append(column)
            column = int(np.flatnonzero(square[i] == square[j, column])[0])
        square[i, columns], square[j, columns] = square[j, columns], square[i, columns].copy()
    if with_identity:
        square = square[:, np.argsort(square[0])]
        return square[np.argsort(square[:, 0])]
    rows, columns = (np.array(draw(st.permutations(range(n)))) for _ in range(2))
    return square[rows][:, columns]


def is_group(table: np.ndarray) -> bool:
    """Every axiom, by trying everything."""
    elements = range(len(table))
    identities = [e for e in elements if all(table[e, x] == x == table[x, e] for x in elements)]
    triples = itertools.product(elements, repeat=3)
    associative = all(table[table[a, b], c] == table[a, table[b, c]] for a, b, c in triples)
    inverses = all(any(table[x, y] in identities for y in elements) for x in elements)
    return bool(identities) and associative and inverses


@functools.cache
def all_subgroups(original: Group) -> frozenset[frozenset[int]]:
    """By joining cyclic subgroups in every way; slow, and shares no code with the package."""
    table = original.table.tolist()

    def join(elements: frozenset[int]) -> frozenset[int]:
        while True:
            products = elements | {table[a][b] for a in elements for b in elements}
            if products == elements:
                return elements
            elements = frozenset(products)

    cyclic_ones = {join(frozenset([original.identity, x])) for x in range(original.order)}
    found, waiting = set(cyclic_ones), list(cyclic_ones)
    for subgroup in waiting:
        for each in cyclic_ones:
            joined = join(subgroup | each)
            if joined not in found:
                found.add(joined)
                waiting.append(joined)
    return frozenset(found)
