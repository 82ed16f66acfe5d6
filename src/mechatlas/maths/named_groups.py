"""Finite groups by name.

    group("C12")        cyclic, order 12
    group("D8")         dihedral of order 16: the 8 rotations and 8 mirrors of an octagon
    group("S5")         symmetric, order 120
    group("A5")         alternating, order 60
    group("Q8")         quaternion; Q12, Q16, ... are the dicyclic groups of that order
    group("PSL(2,7)")   projective special linear over the field of 7 elements, order 168
    group("C2xC4")      direct product of any of these; "C2^3" is "C2xC2xC2"

The number of D counts rotations, so Dn has order 2n; the number of Q is the order.
All have their identity at 0 and a fixed order of elements, told by each function.
"""

import math
import re
from functools import lru_cache

import numpy as np
from jaxtyping import Int

from mechatlas.maths.group_constructions import direct_product, permutation_group
from mechatlas.maths.groups import MAX_ORDER, Group, GroupError

_FACTOR = re.compile(r"(?:([CDSAQ])(\d{1,9})|PSL\(2,(\d{1,9})\))(?:\^([1-9]\d?))?")


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
    order = math.prod(_order(family, n) for family, n in factors)
    if order > MAX_ORDER:
        raise _too_large(name)
    built = [_BUILDERS[family](n) for family, n in factors]
    return built[0] if len(built) == 1 else direct_product(*built)


def cyclic(n: int) -> Group:
    """The group of n turns, order n: label k is r^k, and r^a * r^b = r^(a+b mod n).

    Raises:
        GroupError: n is not from 1 to `groups.MAX_ORDER`.
    """
    _refuse_unless_taken("C", n, at_least=1)
    k = np.arange(n)
    return Group((k[:, None] + k) % n, name=f"C{n}", element_names=_powers(n))


def dihedral(n: int) -> Group:
    """The n rotations and n mirrors of a regular polygon, order 2n.

    Labels 0 to n-1 are the rotations r^k; label n+k is r^k s, the mirror s followed by
    r^k. Products apply the right factor first, and s r = r^-1 s.

    Raises:
        GroupError: n is less than 1, or 2n more than `groups.MAX_ORDER`.
    """
    _refuse_unless_taken("D", n, at_least=1)
    return Group(_with_mirrors(n, 0), name=f"D{n}", element_names=_mirror_names(n))


def quaternion(order: int) -> Group:
    """The dicyclic group of an order divisible by 4; order 8 is the quaternion group.

    With n = order / 2: labels 0 to n-1 are r^k, label n+k is r^k s, and s r = r^-1 s,
    s s = r^(n/2). For order 8, r is i and s is j.

    Raises:
        GroupError: The order is not a multiple of 4 from 8 to `groups.MAX_ORDER`.
    """
    _refuse_unless_taken("Q", order, at_least=8)
    if order % 4:
        raise GroupError(f"Q{order} does not exist: the order must be a multiple of 4.")
    n = order // 2
    return Group(_with_mirrors(n, n // 2), name=f"Q{order}", element_names=_mirror_names(n))


def symmetric(n: int) -> Group:
    """All permutations of n points, order n!, in lexicographic order.

    The product a*b applies b first. Elements are named by their cycles, points from 1.

    Raises:
        GroupError: n is not from 1 to 7.
    """
    _refuse_unless_taken("S", n, at_least=1)
    swap = [*range(min(n, 2))][::-1] + [*range(2, n)]
    turn = [*range(1, n), 0]
    return permutation_group([swap, turn], name=f"S{n}")[0]


def alternating(n: int) -> Group:
    """The even permutations of n points, order n!/2 (1 if n is 1), in lexicographic order.

    The product a*b applies b first. Elements are named by their cycles, points from 1.

    Raises:
        GroupError: n is not from 1 to 7.
    """
    _refuse_unless_taken("A", n, at_least=1)
    three_cycles = [[1, k, *range(2, k), 0, *range(k + 1, n)] for k in range(2, n)]
    return permutation_group(three_cycles or [[*range(n)]], name=f"A{n}")[0]


def projective_special_linear(q: int) -> Group:
    """PSL(2,q): the maps x -> (ax+b)/(cx+d) with ad-bc = 1 over the field of q elements.

    Order q(q^2-1)/gcd(2, q-1). Its elements are the permutations of the projective line, in
    lexicographic order: points 1 to q are the field elements 0, 1, ... and point q+1 is
    infinity. The product a*b applies b first.

    Raises:
        GroupError: q is not a power of a prime, or the group has more than
            `groups.MAX_ORDER` elements.
    """
    _refuse_unless_taken("PSL", q, at_least=2)
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


_BUILDERS = {
    "C": cyclic,
    "D": dihedral,
    "Q": quaternion,
    "S": symmetric,
    "A": alternating,
    "PSL": projective_special_linear,
}


def _order(family: str, n: int) -> int:
    if family in "SA":
        # A cap: the factorial of a large number is itself too large to compute.
        return max(1, math.factorial(min(n, 20)) // (2 if family == "A" else 1))
    if family == "PSL":
        return n * (n * n - 1) // math.gcd(2, n - 1)
    return 2 * n if family == "D" else n


def _refuse_unless_taken(family: str, n: int, *, at_least: int) -> None:
    name = f"PSL(2,{n})" if family == "PSL" else f"{family}{n}"
    if n < at_least:
        raise GroupError(f"{name} does not exist: the number must be at least {at_least}.")
    if family == "PSL" and _prime_of(n) == 0:
        raise GroupError(f"{name} does not exist: {n} is not a power of a prime.")
    if _order(family, n) > MAX_ORDER:
        raise _too_large(name)


def _too_large(name: str) -> GroupError:
    return GroupError(
        f"{name} has more than {MAX_ORDER} elements, which is the largest order that is taken: a "
        "Cayley table grows with the square of the order."
    )


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
    """The prime whose power q is, or 0."""
    prime = next((p for p in range(2, math.isqrt(q) + 1) if q % p == 0), q)
    while q % prime == 0:
        q //= prime
    return prime if q == 1 else 0


def _field(q: int) -> tuple[Int[np.ndarray, "q q"], Int[np.ndarray, "q q"]]:
    """Addition and multiplication tables of the field of q elements.

    The element with the base-p digits c_0, c_1, ... is the polynomial sum of c_i t^i over the
    prime field, taken modulo the first irreducible monic polynomial.

    Raises:
        ArithmeticError: q is not a power of a prime.
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
