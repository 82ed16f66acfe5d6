"""Finite groups, given by their Cayley tables.

    Group    a checked table: inverses, classes, subgroups, cosets, irreps

`table[a, b]` is the product a*b of the elements labeled a and b. A group keeps the labels
of the table it was made from, so its identity may have any label; ask `Group.identity`.
What this package builds itself (`named_groups`) has its identity at 0
as long as its parts do.

Subsets go in and out as sets of labels, functions on the group as arrays indexed by label.
Nothing is trusted: every table passes through `Group`, which checks all the axioms.
`characters`, `irreps` and `subgroups` do the longer computations on bare arrays.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from operator import index
from typing import SupportsIndex

import numpy as np
from jaxtyping import Bool, Int
from numpy.typing import ArrayLike
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mechatlas.base import UserError
from mechatlas.maths.characters import CharacterTable, character_table
from mechatlas.maths.irreps import Irrep, real_irreps
from mechatlas.maths.subgroups import SubgroupLattice, extend_closure, find_subgroups

MAX_ORDER = 5040
"""Largest group that is taken, that of S7: its table has 25 million entries."""


class GroupError(UserError):
    """Invalid table, set of permutations, action or name of a group."""


class Group:
    """Finite group. Immutable; two groups are equal when their tables are.

    Args:
        table: `table[a, b]` is the label of the product a*b; labels are 0 to order - 1. Kept
            as given: labels are never renamed, so the identity need not be 0.
        name: What to call the group, for people.
        element_names: What to call each element, for people; by default its label.

    Raises:
        GroupError: The table is not that of a group. The message is one sentence that names
            the row, the column or the three elements where an axiom fails. Associativity is
            checked in full, by Light's test.

    Source:
        Clifford and Preston, The Algebraic Theory of Semigroups I (1961), section 1.2, for
        Light's test: the elements a with (xa)y = x(ay) for all x, y are closed under
        products, so it is enough to try generators.
    """

    table: Int[np.ndarray, "order order"]
    """Products; int32, read-only."""
    identity: int
    """Label of the element that changes nothing."""
    name: str
    element_names: tuple[str, ...]

    def __init__(
        self,
        table: ArrayLike,
        *,
        name: str | None = None,
        element_names: Sequence[str] | None = None,
    ) -> None:
        self.table = _square_of_labels(table)
        self.table.flags.writeable = False
        _refuse_unless_latin(self.table)
        self.identity = _find_identity(self.table)
        _refuse_unless_associative(self.table, self.identity)
        self.name = name or f"a group of order {self.order}"
        names = map(str, range(self.order)) if element_names is None else element_names
        self.element_names = tuple(names)
        if len(self.element_names) != self.order:
            raise GroupError(
                f"{self.name} has {self.order} elements, but {len(self.element_names)} names "
                "for elements were given."
            )

    @property
    def order(self) -> int:
        """Number of elements."""
        return len(self.table)

    def __repr__(self) -> str:
        return f"<Group {self.name}, order {self.order}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Group) and np.array_equal(self.table, other.table)

    def __hash__(self) -> int:
        return hash((self.order, self.table[-1].tobytes()))

    @cached_property
    def inverses(self) -> Int[np.ndarray, " order"]:
        """`inverses[a]` is the label of the inverse of a."""
        return _frozen(np.argmax(self.table == self.identity, axis=1).astype(np.int32))

    @cached_property
    def element_orders(self) -> Int[np.ndarray, " order"]:
        """Order of each element a: the smallest k > 0 with a^k = e."""
        elements = np.arange(self.order)
        orders = np.zeros(self.order, np.int32)
        power, exponent = elements, 1
        while not orders.all():
            orders[(power == self.identity) & (orders == 0)] = exponent
            power, exponent = self.table[power, elements], exponent + 1
        return _frozen(orders)

    @cached_property
    def is_abelian(self) -> bool:
        """Whether a*b = b*a for all a and b."""
        return bool(np.array_equal(self.table, self.table.T))

    @cached_property
    def generators(self) -> tuple[int, ...]:
        """Generating set, chosen greedily; small, but not always the smallest.

        It begins with an element of the largest order; each next one is that which generates
        most, of up to 48 that were tried. Empty for the group of one element.
        """
        if self.order == 1:
            return ()
        generators = [int(self.element_orders.argmax())]
        member = self._closure_mask(generators)
        while not member.all():
            left = np.flatnonzero(~member)
            best, best_member = -1, member
            for candidate in left[:: -(-len(left) // 48)]:
                trial = member.copy()
                extend_closure(self.table, trial, [*generators, int(candidate)])
                if trial.sum() > best_member.sum():
                    best, best_member = int(candidate), trial
                if best_member.all():
                    break
            generators.append(best)
            member = best_member
        return tuple(generators)

    @cached_property
    def class_of(self) -> Int[np.ndarray, " order"]:
        """Number of the conjugacy class of each element.

        Classes are sorted by the order of their elements, then by size, then by smallest
        label, so class 0 is always the identity alone.
        """
        elements = np.arange(self.order)
        images = [self._conjugated_by(s) for s in self.generators] or [elements]
        edges = (np.tile(elements, len(images)), np.concatenate(images))
        graph = coo_array((np.ones(len(edges[0]), np.int8), edges), shape=self.table.shape)
        _, labels = connected_components(graph, directed=False)
        _, first, sizes = np.unique(labels, return_index=True, return_counts=True)
        rank = np.lexsort((first, sizes, self.element_orders[first]))
        return _frozen(np.argsort(rank).astype(np.int32)[labels])

    @cached_property
    def classes(self) -> tuple[frozenset[int], ...]:
        """Conjugacy classes, in the order that `class_of` counts them."""
        split = np.argsort(self.class_of, kind="stable")
        parts = np.split(split, np.cumsum(np.bincount(self.class_of))[:-1])
        return tuple(frozenset(part.tolist()) for part in parts)

    def closure(self, elements: Iterable[SupportsIndex]) -> frozenset[int]:
        """Find the subgroup that some elements generate.

        Raises:
            GroupError: One of them is not a label of this group.
        """
        mask = self._closure_mask(np.flatnonzero(self._mask(elements)).tolist())
        return frozenset(np.flatnonzero(mask).tolist())

    def is_subgroup(self, elements: Iterable[SupportsIndex]) -> bool:
        """Test whether a set of elements is a subgroup.

        Raises:
            GroupError: One of them is not a label of this group.
        """
        return self._breach(self._mask(elements)) is None

    def left_cosets(
        self, subgroup: Iterable[SupportsIndex]
    ) -> Int[np.ndarray, "coset subgroup_order"]:
        """List the cosets xH, one a row: the coset of the identity first, then by smallest label.

        Raises:
            GroupError: `subgroup` is not a subgroup; the product that leaves it is named.
        """
        members = np.flatnonzero(self._subgroup_mask(subgroup))
        coset_of_element = np.sort(self.table[:, members], axis=1)
        _, first = np.unique(coset_of_element[:, 0], return_index=True)
        cosets = coset_of_element[first]
        home = int(np.flatnonzero((cosets == self.identity).any(axis=1))[0])
        return cosets[[home, *(i for i in range(len(cosets)) if i != home)]]

    def coset_action(self, subgroup: Iterable[SupportsIndex]) -> Int[np.ndarray, "order coset"]:
        """Compute the permutation action of the group on the left cosets of a subgroup.

        Returns:
            `action[g, i]` is the number of the coset g*x_i*H, in the order of `left_cosets`.

        Raises:
            GroupError: `subgroup` is not a subgroup; the product that leaves it is named.
        """
        cosets = self.left_cosets(subgroup)
        coset_of = np.empty(self.order, np.int32)
        coset_of[cosets] = np.arange(len(cosets), dtype=np.int32)[:, None]
        return coset_of[self.table[:, cosets[:, 0]]]

    def conjugate(self, subset: Iterable[SupportsIndex], by: SupportsIndex) -> frozenset[int]:
        """Conjugate a set S: g*S*g^-1, where g is `by`.

        Raises:
            GroupError: An element is not a label of this group.
        """
        (by,) = np.flatnonzero(self._mask([by])).tolist()
        return frozenset(self._conjugated_by(by)[self._mask(subset)].tolist())

    def lattice(self) -> SubgroupLattice:
        """Lattice of all subgroups, in conjugacy classes. Exact.

        Computed once and kept. Any group of order up to 200 is within the limits.

        Raises:
            SubgroupLimitError: The group has an order above `subgroups.MAX_LATTICE_ORDER`,
                or more subgroups than `subgroups.MAX_SUBGROUPS`.
        """
        return self._lattice

    def subgroups(self) -> tuple[frozenset[int], ...]:
        """All subgroups, smallest first. Exact.

        Raises:
            SubgroupLimitError: See `lattice`.
        """
        return tuple(member for each in self.lattice().classes for member in each.members)

    def character_table(self) -> CharacterTable:
        """The irreducible characters over the complex numbers. Computed once and kept.

        Raises:
            RepresentationLimitError: There are more than `characters.MAX_CLASSES` classes.
        """
        return self._characters

    def irreps(self) -> tuple[Irrep, ...]:
        """Irreducible representations over the real numbers. Computed once and kept.

        Sorted by dimension, then type (real, complex, quaternionic), then character with
        larger values first, so the first one is trivial. The bytes are the same each time.
        See `mechatlas.maths.irreps.Irrep` for what is true of them, and `fourier` there.

        Raises:
            RepresentationLimitError: There are more than `characters.MAX_CLASSES` classes.
            ArithmeticError: Rounding spoiled the result, which the check at the end noticed.
        """
        return self._irreps

    def relabel(self, new_labels: ArrayLike) -> "Group":
        """Rename element a to `new_labels[a]`; the group stays the same.

        Raises:
            GroupError: The new labels are not 0 to order - 1 in some order.
        """
        new = np.asarray(new_labels)
        if new.shape != (self.order,) or not np.array_equal(np.sort(new), np.arange(self.order)):
            raise GroupError(
                f"New labels for {self.name} must be 0 to {self.order - 1} in some order."
            )
        old = np.argsort(new)
        names = [self.element_names[a] for a in old]
        table = new[self.table[np.ix_(old, old)]]
        return Group(table, name=self.name, element_names=names)

    @cached_property
    def _lattice(self) -> SubgroupLattice:
        return find_subgroups(self.table, self.inverses, self.element_orders, self.generators)

    @cached_property
    def _characters(self) -> CharacterTable:
        return character_table(self.table, self.inverses, self.class_of, self.element_orders)

    @cached_property
    def _irreps(self) -> tuple[Irrep, ...]:
        return real_irreps(
            self.table, self.inverses, self.class_of, self._characters, self.generators
        )

    def _conjugated_by(self, element: int) -> Int[np.ndarray, " order"]:
        return self.table[self.table[element], self.inverses[element]]

    def _mask(self, elements: Iterable[SupportsIndex]) -> Bool[np.ndarray, " order"]:
        member = np.zeros(self.order, bool)
        for element in map(index, elements):
            if not 0 <= element < self.order:
                raise GroupError(
                    f"{element} is not an element of {self.name}; "
                    f"its labels are 0 to {self.order - 1}."
                )
            member[element] = True
        return member

    def _closure_mask(self, elements: Sequence[int]) -> Bool[np.ndarray, " order"]:
        member = np.zeros(self.order, bool)
        member[self.identity] = True
        generators: list[int] = []
        for element in elements:
            if not member[element]:
                generators.append(element)
                extend_closure(self.table, member, generators)
        return member

    def _breach(self, member: Bool[np.ndarray, " order"]) -> str | None:
        """Explain why a set is not a subgroup; a finite set closed under products is one."""
        if not member.any():
            return "it is empty"
        labels = np.flatnonzero(member)
        products = self.table[np.ix_(labels, labels)]
        outside = np.argwhere(~member[products])
        if not len(outside):
            return None
        a, b = labels[outside[0]]
        return f"{a}*{b} = {self.table[a, b]} is not in it"

    def _subgroup_mask(self, elements: Iterable[SupportsIndex]) -> Bool[np.ndarray, " order"]:
        member = self._mask(elements)
        if breach := self._breach(member):
            raise GroupError(f"The set is not a subgroup of {self.name}: {breach}.")
        return member


def refuse_if_too_large(order: int) -> None:
    """Stop before anything of that size is built.

    Raises:
        GroupError: The order exceeds `MAX_ORDER`.
    """
    if order > MAX_ORDER:
        raise GroupError(
            f"A group of order {order} is too large: groups up to order {MAX_ORDER} are taken, "
            "since a Cayley table grows with the square of the order."
        )


def _square_of_labels(table: ArrayLike) -> Int[np.ndarray, "order order"]:
    try:
        array = np.asarray(table)
    except ValueError as error:
        raise GroupError("The rows of a Cayley table must all have the same length.") from error
    if array.ndim != 2 or array.shape[0] != array.shape[1] or not array.size:
        raise GroupError(f"A Cayley table must be square and not empty, got shape {array.shape}.")
    if not np.issubdtype(array.dtype, np.integer):
        raise GroupError(f"A Cayley table must hold integer labels, got {array.dtype}.")
    order = len(array)
    refuse_if_too_large(order)
    wrong = np.argwhere((array < 0) | (array >= order))
    if len(wrong):
        row, column = wrong[0]
        raise GroupError(
            f"The Cayley table of a group of {order} elements must hold labels 0 to {order - 1}, "
            f"got {array[row, column]} at row {row}, column {column}."
        )
    return array.astype(np.int32)


def _refuse_unless_latin(table: Int[np.ndarray, "order order"]) -> None:
    for what, across, lines in (("Row", "columns", table), ("Column", "rows", table.T)):
        in_order = np.sort(lines, axis=1) == np.arange(len(table))
        bad = np.flatnonzero(~in_order.all(axis=1))
        if len(bad):
            line = lines[bad[0]]
            twice = int(np.flatnonzero(np.bincount(line) > 1)[0])
            i, j = np.flatnonzero(line == twice)[:2]
            raise GroupError(
                f"{what} {bad[0]} of the table holds {twice} twice ({across} {i} and {j}), but in "
                "a group every row and column holds every label once."
            )


def _find_identity(table: Int[np.ndarray, "order order"]) -> int:
    elements = np.arange(len(table))
    # The only candidate; a Latin square has exactly one.
    e = int(np.flatnonzero(table[:, 0] == 0)[0])
    for wrong, text in (
        (np.flatnonzero(table[e] != elements), "{e}*{x}"),
        (np.flatnonzero(table[:, e] != elements), "{x}*{e}"),
    ):
        if len(wrong):
            x = int(wrong[0])
            product = table[e, x] if text.startswith("{e}") else table[x, e]
            raise GroupError(
                f"The table has no identity: {e} is the only element with {e}*0 = 0, but "
                f"{text.format(e=e, x=x)} = {product} and not {x}."
            )
    return e


def _refuse_unless_associative(table: Int[np.ndarray, "order order"], identity: int) -> None:
    reached = np.zeros(len(table), bool)
    reached[identity] = True
    generators: list[int] = []
    while not reached.all():
        b = int(np.argmin(reached))
        wrong = np.argwhere(table[table[:, b]] != table[:, table[b]])
        if len(wrong):
            a, c = wrong[0]
            raise GroupError(
                f"The table is not associative: ({a}*{b})*{c} = {table[table[a, b], c]}, but "
                f"{a}*({b}*{c}) = {table[a, table[b, c]]}."
            )
        generators.append(b)
        extend_closure(table, reached, generators)


def _frozen(array: Int[np.ndarray, " order"]) -> Int[np.ndarray, " order"]:
    array.flags.writeable = False
    return array
