"""Finite groups by name, and groups of permutations and products.

    C12        n turns r^k, labeled k
    D8         n rotations and n mirrors of a polygon, order 2n = 16: r^k is labeled k, and r^k s
               (the mirror s followed by r^k) n + k; s r = r^-1 s
    S5, A5     all permutations of n points and the even ones, in lexicographic order, named by
               their cycles, points from 1
    Q8         quaternion group; Q12, Q16, ... are the dicyclic groups of that order: labels as for
               D, with s s = r^(n/2); of Q8, r is i and s is j
    PSL(2,7)   maps x -> (ax+b)/(cx+d) with ad-bc = 1 over the field of q elements, order 168, as
               permutations of the projective line: points 1 to q are the field elements
               0, 1, ..., and point q+1 is infinity
    C2xC4      direct products of any of these; "C2^3" is "C2xC2xC2"

All have their identity at 0. Products of permutations, rotations and mirrors apply the right
factor first.
"""

import itertools
import math
import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from mechatlas.maths.groups import MAX_ORDER, Group, GroupError, refuse_if_too_large

_FACTOR = re.compile(r"(?:([CDSAQ])(\d{1,9})|PSL\(2,(\d{1,9})\))(?:\^([1-9]\d?))?")
_LEAST = {"C": 1, "D": 1, "Q": 8, "S": 1, "A": 1, "PSL": 2}
"""Least number in the name of each family."""


def group(name: str) -> Group:
    """Build a finite group by its name, and keep it for the next call.

    Args:
        name: Name such as "C12", "D8" (order 16), "S5", "A5", "Q8", "PSL(2,7)", "C2xC4", "C2^3".

    Raises:
        GroupError: The name is not understood, or the group has more than
            `groups.MAX_ORDER` elements.

    Examples:
        >>> import mechatlas as ma
        >>> square = ma.group("D4")  # rotations and mirrors of a square
        >>> square.order, square.is_abelian, len(square.classes)
        (8, False, 5)
        >>> [irrep.dimension for irrep in square.irreps()]
        [1, 1, 1, 1, 2]
    """
    return _group("".join(name.split()))


@lru_cache(maxsize=32)
def _group(name: str) -> Group:
    factors: list[tuple[str, int]] = []
    for part in re.split(r"[x\u00d7*]", name):
        match = _FACTOR.fullmatch(part)
        if match is None:
            raise GroupError(
                f"There is no group called {name!r}: {part!r} is not understood. Names are C12, "
                "D8 (order 16), S5, A5, Q8, PSL(2,7), products such as C2xC4, and powers such as "
                "C2^3."
            )
        family, n, q, power = match.groups()
        factors += [(family or "PSL", int(n or q))] * int(power or 1)
    # Refused before anything of that size is built.
    if math.prod(_order(family, n) for family, n in factors) > MAX_ORDER:
        raise GroupError(
            f"{name} has more than {MAX_ORDER} elements, which is the largest order that is "
            "taken: a Cayley table grows with the square of the order."
        )
    for family, n in factors:
        _refuse_unless_there(family, n)
    built = [_BUILDERS[family](n) for family, n in factors]
    return built[0] if len(built) == 1 else direct_product(*built)


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


def direct_product(*factors: Group) -> Group:
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
        name="x".join(factor.name for factor in factors),
        element_names=[f"({', '.join(parts)})" for parts in names],
    )


def cyclic(n: int) -> Group:
    """Build the group of n turns."""
    k = np.arange(n)
    return Group((k[:, None] + k) % n, name=f"C{n}", element_names=_powers(n))


def dihedral(n: int) -> Group:
    """Build the group of the n rotations and n mirrors of a regular polygon."""
    return Group(_with_mirrors(n, 0), name=f"D{n}", element_names=_mirror_names(n))


def _quaternion(order: int) -> Group:
    n = order // 2
    return Group(_with_mirrors(n, n // 2), name=f"Q{order}", element_names=_mirror_names(n))


def _symmetric(n: int) -> Group:
    swap = [*range(min(n, 2))][::-1] + [*range(2, n)]
    turn = [*range(1, n), 0]
    return permutation_group([swap, turn], name=f"S{n}")[0]


def _alternating(n: int) -> Group:
    three_cycles = [[1, k, *range(2, k), 0, *range(k + 1, n)] for k in range(2, n)]
    return permutation_group(three_cycles or [[*range(n)]], name=f"A{n}")[0]


def _psl(q: int) -> Group:
    add, multiply = _field(q)
    minus = np.argmax(add == 0, axis=1)
    inverse = np.argmax(multiply == 1, axis=1)
    prime = _prime_of(q)
    # x -> x + b for a basis of the field over its prime field, and x -> -1/x: SL(2,q) is
    # generated by its unipotent upper and lower triangular matrices.
    basis = [prime**i for i in range(round(math.log(q, prime)))]
    turn = minus[inverse]
    turn[0] = q
    generators = [*([*add[b], q] for b in basis), [*turn, 0]]
    return permutation_group(generators, name=f"PSL(2,{q})")[0]


_BUILDERS = {"C": cyclic, "D": dihedral, "Q": _quaternion, "S": _symmetric, "A": _alternating}
_BUILDERS["PSL"] = _psl


def _order(family: str, n: int) -> int:
    if family in "SA":
        # A cap: the factorial of a large number is itself too large to compute.
        return max(1, math.factorial(min(n, 20)) // (2 if family == "A" else 1))
    if family == "PSL":
        return n * (n * n - 1) // math.gcd(2, n - 1)
    return 2 * n if family == "D" else n


def _refuse_unless_there(family: str, n: int) -> None:
    name = f"PSL(2,{n})" if family == "PSL" else f"{family}{n}"
    if n < _LEAST[family]:
        raise GroupError(f"{name} does not exist: the number must be at least {_LEAST[family]}.")
    if family == "PSL" and _prime_of(n) == 0:
        raise GroupError(f"{name} does not exist: {n} is not a power of a prime.")
    if family == "Q" and n % 4:
        raise GroupError(f"{name} does not exist: the order must be a multiple of 4.")


def _with_mirrors(n: int, square: int) -> Int[np.ndarray, "order order"]:
    """Table of r^k and r^k s with r^n = e, s r = r^-1 s and s s = r^square."""
    k = np.arange(n)
    plus, minus = (k[:, None] + k) % n, (k[:, None] - k) % n
    return np.block([[plus, n + plus], [n + minus, (minus + square) % n]])


def _powers(n: int) -> list[str]:
    return ["e", "r", *(f"r^{k}" for k in range(2, n))][:n]


def _mirror_names(n: int) -> list[str]:
    return _powers(n) + ["s", "r s", *(f"r^{k} s" for k in range(2, n))][:n]


def _prime_of(q: int) -> int:
    """Prime whose power q is, or 0."""
    prime = next((p for p in range(2, math.isqrt(q) + 1) if q % p == 0), q)
    while q % prime == 0:
        q //= prime
    return prime if q == 1 else 0


def _field(q: int) -> tuple[Int[np.ndarray, "q q"], Int[np.ndarray, "q q"]]:
    """Addition and multiplication tables of the field of q elements.

    The element with the base-p digits c_0, c_1, ... is the polynomial sum of c_i t^i over the
    prime field, taken modulo the first irreducible monic polynomial.
    """
    p = _prime_of(q)
    degree = round(math.log(q, p))
    weights = p ** np.arange(degree)
    digits = np.arange(q)[:, None] // weights % p
    add = (digits[:, None] + digits) % p @ weights
    nonzero = np.arange(1, q)
    for modulus in digits:
        # Multiplication by t, where t^degree = -(modulus), as a matrix on the digits.
        times_t = np.eye(degree, k=-1, dtype=np.int64)
        times_t[:, -1] = -modulus % p
        powers = [np.eye(degree, dtype=np.int64)]
        while len(powers) < degree:
            powers.append(times_t @ powers[-1] % p)
        as_matrix = np.tensordot(digits, np.array(powers), axes=1) % p
        multiply = np.einsum("aij,bj->abi", as_matrix, digits) % p @ weights
        # Irreducible exactly when no product of two non-zero elements is zero.
        if multiply[np.ix_(nonzero, nonzero)].all():
            return add, multiply
    raise ArithmeticError(f"There is no field of {q} elements.")


def _permutation_closure(generators: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    identity = tuple(range(len(generators[0])))
    elements, waiting = {identity}, [identity]
    for permutation in waiting:
        for s in generators:
            product = tuple([s[i] for i in permutation])
            if product not in elements:
                elements.add(product)
                waiting.append(product)
        if len(elements) > MAX_ORDER:
            raise GroupError(
                f"The permutations generate more than {MAX_ORDER} elements, which is the most "
                "that is taken."
            )
    return sorted(elements)


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
