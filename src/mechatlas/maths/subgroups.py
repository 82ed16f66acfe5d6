"""All subgroups of a finite group, up to conjugacy, and what they are called.

Main path, in reading order:

    extend_closure   a subgroup and one more generator -> the subgroup they generate
    find_subgroups   Cayley table -> all subgroups, in conjugacy classes
    SubgroupLattice  the classes, which contains which, and their names

The method is cyclic extension: each subgroup K has a last term P of its derived series,
which is perfect (equal to its own derived subgroup, often trivial), and a chain from P up to
K in which each member is normal in the next, with prime index. So starting from the perfect
subgroups it is enough to extend each subgroup H by elements z that normalize it and have z^p
in H. One subgroup of each conjugacy class is extended; the others follow by conjugation.
Nothing is sampled and nothing is assumed: the list is exact.

Inside, a subgroup is a mask of booleans over the elements, kept by its packed bytes.

Source: Neubüser, Untersuchungen des Untergruppenverbandes endlicher Gruppen (1960); Holt,
Eick and O'Brien, Handbook of Computational Group Theory (2005), section 10.4.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int

from mechatlas.base import UserError

MAX_SUBGROUPS = 50_000
"""Most subgroups that are listed. No group of order up to 200 has more than 29,212 (C2^7)."""

MAX_LATTICE_ORDER = 1500
"""Largest group whose subgroups are listed."""

MAX_CONTAINMENT_CLASSES = 6000
"""Most classes of subgroups for which it is tabulated which contains which."""

_KNOWN_BY_ORDERS = {
    # (element order, how many elements have it). For simple groups the order of the group and
    # the orders that occur are enough (Vasil'ev, Grechkoseva and Mazurov, 2009). S5 and S6
    # follow: 6 and 36 Sylow 5-subgroups force A5 and A6 inside, and of the few groups of that
    # order that have those inside, each has other element orders; A4 and S4 are seen from the
    # lists of groups of order 12 and 24.
    ((1, 1), (2, 3), (3, 8)): "A4",
    ((1, 1), (2, 9), (3, 8), (4, 6)): "S4",
    ((1, 1), (2, 15), (3, 20), (5, 24)): "A5",
    ((1, 1), (2, 25), (3, 20), (4, 30), (5, 24), (6, 20)): "S5",
    ((1, 1), (2, 21), (3, 56), (4, 42), (7, 48)): "PSL(2,7)",
    ((1, 1), (2, 45), (3, 80), (4, 90), (5, 144)): "A6",
    ((1, 1), (2, 63), (3, 56), (7, 216), (9, 168)): "PSL(2,8)",
    ((1, 1), (2, 55), (3, 110), (5, 264), (6, 110), (11, 120)): "PSL(2,11)",
    ((1, 1), (2, 91), (3, 182), (6, 182), (7, 468), (13, 168)): "PSL(2,13)",
    ((1, 1), (2, 75), (3, 80), (4, 180), (5, 144), (6, 240)): "S6",
}


class SubgroupLimitError(UserError):
    """A group is too large, or has too many subgroups, for an exact list of them."""


@dataclasses.dataclass(frozen=True, eq=False)
class SubgroupClass:
    """Subgroups that are conjugate to one another."""

    members: tuple[frozenset[int], ...]
    """All of them, sorted by their sorted labels."""

    @property
    def representative(self) -> frozenset[int]:
        """The first member."""
        return self.members[0]

    @property
    def order(self) -> int:
        """Number of elements of each member."""
        return len(self.members[0])

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.members)


@dataclasses.dataclass(frozen=True, eq=False)
class SubgroupLattice:
    """All subgroups of a group.

    Classes are sorted by the order of their members, then by the labels of the first: class
    0 is the trivial subgroup, the last class the whole group.
    """

    classes: tuple[SubgroupClass, ...]
    table: Int[np.ndarray, "order order"]
    """The Cayley table of the group."""
    element_orders: Int[np.ndarray, " order"]

    @cached_property
    def n_subgroups(self) -> int:
        """How many subgroups there are."""
        return sum(each.size for each in self.classes)

    def class_of(self, subgroup: frozenset[int]) -> int:
        """Number of the class that a subgroup belongs to.

        Raises:
            KeyError: It is not a subgroup.
        """
        return self._class_of[subgroup]

    @cached_property
    def contains(self) -> Int[np.ndarray, "class class"]:
        """`contains[i, j]`: how many members of class j lie in one given member of class i.

        Raises:
            SubgroupLimitError: There are more than `MAX_CONTAINMENT_CLASSES` classes.
        """
        if len(self.classes) > MAX_CONTAINMENT_CLASSES:
            raise SubgroupLimitError(
                f"The group has {len(self.classes)} classes of subgroups; which contains which is "
                f"tabulated for up to {MAX_CONTAINMENT_CLASSES}."
            )
        order = len(self.table)
        masks = np.zeros((self.n_subgroups, order), bool)
        for mask, subgroup in zip(masks, self._class_of, strict=True):
            mask[list(subgroup)] = True
        packed = np.packbits(masks, axis=1)
        starts = np.cumsum([0, *(each.size for each in self.classes)])[:-1]
        rows = [
            np.add.reduceat(~(packed & ~packed[start]).any(axis=1), starts, dtype=np.int32)
            for start in starts
        ]
        return np.array(rows)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Isomorphism type of each class, as a name that `group` understands, where it is easy.

        Abelian groups are named in full: C4, C2xC2, C2xC12. Dihedral groups are Dn, of order
        2n (but S3); dicyclic groups Q8, Q12, ...; A4, S4, A5, S5, A6, S6 and PSL(2,q) are
        recognized, and so are products of a named group with cyclic ones, as in C2xA4.
        C5:C4 means a Frobenius group (a prime cyclic group and automorphisms of it). All
        others are called by their order, as in "order 36".
        """
        return tuple(self._name(each) for each in self.classes)

    @cached_property
    def _class_of(self) -> dict[frozenset[int], int]:
        return {member: i for i, each in enumerate(self.classes) for member in each.members}

    @cached_property
    def _by_order(self) -> dict[int, list[frozenset[int]]]:
        by_order: dict[int, list[frozenset[int]]] = {}
        for subgroup in self._class_of:
            by_order.setdefault(len(subgroup), []).append(subgroup)
        return by_order

    def _name(self, each: SubgroupClass) -> str:
        return self._type(each.representative) or f"order {each.order}"

    def _type(self, subgroup: frozenset[int]) -> str | None:
        labels = np.array(sorted(subgroup))
        block = self.table[np.ix_(labels, labels)]
        orders = self.element_orders[labels]
        central = (block == block.T).all(axis=1)
        if central.all():
            return _abelian_type(orders)
        return _recognized_type(labels, block, orders) or self._product_type(
            subgroup, sorted(labels[central].tolist(), key=lambda z: -self.element_orders[z])
        )

    def _product_type(self, subgroup: frozenset[int], central: list[int]) -> str | None:
        """The name of C x K, for the largest central cyclic subgroup C that is a factor.

        All complements K of C are isomorphic, to H/C, and by Krull and Schmidt what is left
        does not depend on the choice of C: so the first that is found settles it.
        """
        for z in central:
            powers = {z}
            while len(powers) < self.element_orders[z]:
                powers |= {int(self.table[power, z]) for power in powers}
            if len(powers) > 1:
                for other in self._by_order.get(len(subgroup) // len(powers), []):
                    if other <= subgroup and len(other & powers) == 1:
                        rest = self._type(other)
                        return rest and f"C{len(powers)}x{rest}"
        return None


def extend_closure(
    table: Int[np.ndarray, "order order"],
    member: Bool[np.ndarray, " order"],
    generators: Sequence[int],
) -> None:
    """Add to `member`, in place, all products x*s1*s2*... of members x with generators.

    If the members are the subgroup of all generators but the last, they become the subgroup of
    all. Associativity is not assumed.

    Args:
        table: Multiplication table.
        member: Mark of each member, changed in place.
        generators: Elements to multiply by.
    """
    frontier = np.flatnonzero(member)
    while frontier.size:
        reached = np.zeros_like(member)
        reached[table[frontier][:, generators]] = True
        frontier = np.flatnonzero(reached & ~member)
        member[frontier] = True


def find_subgroups(
    table: Int[np.ndarray, "order order"],
    inverses: Int[np.ndarray, " order"],
    element_orders: Int[np.ndarray, " order"],
    generators: Sequence[int],
) -> SubgroupLattice:
    """All subgroups of a group, in conjugacy classes. Exact.

    Args:
        table: The Cayley table of a group.
        inverses: Of each element.
        element_orders: Of each element.
        generators: Some elements that generate the group.

    Raises:
        SubgroupLimitError: The order exceeds `MAX_LATTICE_ORDER`, or there are more than
            `MAX_SUBGROUPS` subgroups.
    """
    order = len(table)
    if order > MAX_LATTICE_ORDER:
        raise SubgroupLimitError(
            f"The subgroups of a group of order {order} are not listed: the limit is order "
            f"{MAX_LATTICE_ORDER}."
        )
    trivial = np.zeros(order, bool)
    trivial[table[0, inverses[0]]] = True
    catalogue = _Catalogue(table, inverses, generators)
    waiting = deque([catalogue.add(trivial, [])])
    for perfect, gens in _perfect_subgroups(table, inverses, element_orders, generators):
        if _key(perfect) not in catalogue.class_of_key:
            waiting.append(catalogue.add(perfect, gens))
    primes = [p for p in range(2, order + 1) if order % p == 0 and all(p % q for q in range(2, p))]
    powers = {p: _power(table, p) for p in primes}
    while waiting:
        member, gens = waiting.popleft()
        conjugates = table[table[:, gens], inverses[:, None]]
        normalizing = member[conjugates].all(axis=1) & ~member
        for p, power in powers.items():
            candidates = np.flatnonzero(normalizing & member[power])
            for extended, z, key in _prime_extensions(table, member, candidates, p):
                if key not in catalogue.class_of_key:
                    waiting.append(catalogue.add(extended, [*gens, z]))
    return SubgroupLattice(catalogue.classes(), table, element_orders)


_Generated = tuple[Bool[np.ndarray, " order"], list[int]]
"""A subgroup, and elements that generate it."""


def _key(member: Bool[np.ndarray, " order"]) -> bytes:
    return np.packbits(member).tobytes()


class _Catalogue:
    """The subgroups found so far, whole conjugacy classes at a time."""

    def __init__(
        self,
        table: Int[np.ndarray, "order order"],
        inverses: Int[np.ndarray, " order"],
        generators: Sequence[int],
    ) -> None:
        elements = np.arange(len(table))
        images = [table[table[inverses[s]], s] for s in generators]
        # x lies in s*H*s^-1 when s^-1*x*s lies in H.
        self._pull_back = [image for image in images if (image != elements).any()]
        self.class_of_key: dict[bytes, int] = {}
        self._n_classes = 0
        self._order = len(table)

    def add(self, member: Bool[np.ndarray, " order"], gens: list[int]) -> _Generated:
        # The subgroup comes with its conjugates.
        self.class_of_key[_key(member)] = self._n_classes
        waiting = [member]
        for each in waiting:
            for pull_back in self._pull_back:
                conjugate = each[pull_back]
                key = _key(conjugate)
                if key not in self.class_of_key:
                    self.class_of_key[key] = self._n_classes
                    waiting.append(conjugate)
        self._n_classes += 1
        if len(self.class_of_key) > MAX_SUBGROUPS:
            raise SubgroupLimitError(
                f"The group of order {self._order} has more than {MAX_SUBGROUPS} subgroups, which "
                "is the most that are listed."
            )
        return member, gens

    def classes(self) -> tuple[SubgroupClass, ...]:
        classes: list[list[list[int]]] = [[] for _ in range(self._n_classes)]
        packed = np.frombuffer(b"".join(self.class_of_key), np.uint8).reshape(
            len(self.class_of_key), -1
        )
        masks = np.unpackbits(packed, axis=1, count=self._order)
        for member, number in zip(masks, self.class_of_key.values(), strict=True):
            classes[number].append(np.flatnonzero(member).tolist())
        for members in classes:
            members.sort()
        classes.sort(key=lambda members: (len(members[0]), members[0]))
        return tuple(SubgroupClass(tuple(map(frozenset, members))) for members in classes)


def _prime_extensions(
    table: Int[np.ndarray, "order order"],
    member: Bool[np.ndarray, " order"],
    candidates: Int[np.ndarray, " candidate"],
    p: int,
) -> Iterator[tuple[Bool[np.ndarray, " order"], int, bytes]]:
    """The subgroups H u zH u ... u z^(p-1)H, for z that normalize H with z^p in H."""
    cosets = table[candidates][:, member]
    _, first = np.unique(cosets.min(axis=1, initial=len(table)), return_index=True)
    z, cosets = candidates[first, None], cosets[first]
    extended = np.repeat(member[None], len(first), axis=0)
    rows = np.arange(len(first))[:, None]
    for _ in range(p - 1):
        extended[rows, cosets] = True
        cosets = table[z, cosets]
    keys = np.packbits(extended, axis=1)
    for i, key in enumerate(keys):
        yield extended[i], int(z[i, 0]), key.tobytes()


def _perfect_subgroups(
    table: Int[np.ndarray, "order order"],
    inverses: Int[np.ndarray, " order"],
    element_orders: Int[np.ndarray, " order"],
    generators: Sequence[int],
) -> Iterator[_Generated]:
    """Non-trivial subgroups that equal their derived subgroup, at least one of each class.

    They lie in the last term R of the derived series of the group, which is trivial if the
    group is soluble. Within R all subgroups are found by adding one element of prime power
    order after another, since such elements generate every subgroup.
    """
    residue: _Generated = (np.ones(len(table), bool), list(generators))
    while (derived := _derived(table, inverses, residue))[0].sum() < residue[0].sum():
        residue = derived
    if residue[0].sum() == 1:
        return
    catalogue = _Catalogue(table, inverses, residue[1])
    trivial = np.zeros(len(table), bool)
    trivial[table[0, inverses[0]]] = True
    waiting: deque[_Generated] = deque([catalogue.add(trivial, [])])
    additions = [z for z in _prime_power_cyclic(table, element_orders) if residue[0][z]]
    while waiting:
        member, gens = waiting.popleft()
        if gens and _derived(table, inverses, (member, gens))[0].sum() == member.sum():
            yield member, gens
        for z in additions:
            if not member[z]:
                extended = member.copy()
                extend_closure(table, extended, [*gens, z])
                if _key(extended) not in catalogue.class_of_key:
                    waiting.append(catalogue.add(extended, [*gens, z]))


def _prime_power_cyclic(
    table: Int[np.ndarray, "order order"], element_orders: Int[np.ndarray, " order"]
) -> list[int]:
    """One generator of each cyclic subgroup whose order is a power of a prime."""
    cyclic = []
    covered = np.zeros(len(table), bool)
    for z in np.argsort(-element_orders, kind="stable").tolist():
        size = int(element_orders[z])
        prime = next((p for p in range(2, size + 1) if size % p == 0), 1)
        while prime > 1 and size % prime == 0:
            size //= prime
        if prime > 1 and size == 1 and not covered[z]:
            cyclic.append(z)
            power = z
            for _ in range(int(element_orders[z])):
                covered[power] |= element_orders[power] == element_orders[z]
                power = int(table[power, z])
    return cyclic


def _derived(
    table: Int[np.ndarray, "order order"], inverses: Int[np.ndarray, " order"], group: _Generated
) -> _Generated:
    """The subgroup that all commutators x*y*x^-1*y^-1 generate."""
    labels = np.flatnonzero(group[0])
    products = table[np.ix_(labels, labels)]
    commutators = np.unique(table[products, inverses[products.T]])
    member = np.zeros(len(table), bool)
    member[table[0, inverses[0]]] = True
    gens: list[int] = []
    for z in commutators.tolist():
        if not member[z]:
            gens.append(z)
            extend_closure(table, member, gens)
    return member, gens


def _power(table: Int[np.ndarray, "order order"], exponent: int) -> Int[np.ndarray, " order"]:
    elements = np.arange(len(table))
    power = elements
    for _ in range(exponent - 1):
        power = table[power, elements]
    return power


def _abelian_type(orders: Int[np.ndarray, " member"]) -> str:
    """An abelian group, from the orders of its elements alone, as in C2xC12."""
    factors: list[int] = []
    size = len(orders)
    for p in range(2, size + 1):
        if size % p == 0 and all(p % q for q in range(2, p)):
            # The elements with x^(p^k) = e number p to the sum of min(k, e_i), over the
            # cyclic factors of orders p^e_i: each step in k counts the factors with e_i >= k.
            counts = [1]
            while size % p ** len(counts) == 0:
                counts.append(int((p ** len(counts) % orders == 0).sum()))
            steps = [round(np.log(b / a) / np.log(p)) for a, b in itertools.pairwise(counts)]
            for k in range(steps[0]):
                if k == len(factors):
                    factors.append(1)
                factors[k] *= p ** sum(step > k for step in steps)
    return "x".join(f"C{factor}" for factor in reversed(factors)) or "C1"


def _recognized_type(
    labels: Int[np.ndarray, " member"],
    block: Int[np.ndarray, "member member"],
    orders: Int[np.ndarray, " member"],
) -> str | None:
    """A group that is not abelian, if it is one of those that `names` lists."""
    size = len(labels)
    values, counts = np.unique(orders, return_counts=True)
    known = _KNOWN_BY_ORDERS.get(tuple(zip(values.tolist(), counts.tolist(), strict=True)))
    if known:
        return known
    for i in np.flatnonzero(orders == size // 2)[:1] if size % 2 == 0 else []:
        cyclic, power = np.zeros(size, bool), labels[i]
        for _ in range(size // 2):
            position = np.searchsorted(labels, power)
            cyclic[position] = True
            power = block[position, i]
        if (orders[~cyclic] == 2).all():
            return "S3" if size == 6 else f"D{size // 2}"
        if (orders[~cyclic] == 4).all() and size % 4 == 0:
            return f"Q{size}"
    for p in values[1:].tolist():
        # A normal cyclic group of prime order p that is its own centraliser: the rest of the
        # group is then a group of its automorphisms, which is cyclic, and fixes the type.
        of_order_p = np.flatnonzero(orders == p)
        if len(of_order_p) == p - 1 and size % p == 0 and (size // p) > 1:
            z = of_order_p[0]
            if all(p % q for q in range(2, p)) and (block[z] == block[:, z]).sum() == p:
                return f"C{p}:C{size // p}"
    return None
