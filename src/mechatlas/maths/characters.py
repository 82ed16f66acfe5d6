"""The irreducible characters of a finite group over the complex numbers, exactly.

    character_table   Cayley table and conjugacy classes -> characters and their types
    reading_order     how characters and irreps are sorted everywhere

Source: Dixon, High speed computation of group characters (1967), for the class algebra and for
rounding; Serre, Linear Representations of Finite Groups (1977), chapters 2, 6 and 13.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Complex, Int, Shaped

from mechatlas.base import UserError

MAX_CLASSES = 1500
"""Most conjugacy classes, and so irreps over the complex numbers, that are computed."""

_ATTEMPTS = 8


class RepresentationLimitError(UserError):
    """A group has more irreps than `MAX_CLASSES`."""


@dataclasses.dataclass(frozen=True, eq=False)
class CharacterTable:
    """The irreducible characters over the complex numbers.

    Rows are sorted by degree, then type, then value, so row 0 is trivial; columns are the
    conjugacy classes of the group, of which column 0 is the identity.
    """

    values: Complex[np.ndarray, "irrep class"]
    """Each is the sum of roots of unity that it has to be, up to rounding (about 1e-15)."""
    indicators: Int[np.ndarray, " irrep"]
    """Frobenius and Schur's: 1 real, 0 complex, -1 quaternionic."""

    @property
    def degrees(self) -> Int[np.ndarray, " irrep"]:
        """The dimensions of the representations; their squares sum to the order."""
        return np.rint(np.real(self.values[:, 0])).astype(np.int64)


def character_table(
    table: Int[np.ndarray, "order order"],
    inverses: Int[np.ndarray, " order"],
    class_of: Int[np.ndarray, " order"],
    element_orders: Int[np.ndarray, " order"],
) -> CharacterTable:
    """The irreducible characters over the complex numbers.

    A random Hermitian element of the center of the group algebra acts on each irrep as a
    different real number, so its eigenvectors among the class functions are the characters.
    The eigenvalues of rho(g) are roots of unity whose multiplicities follow from the
    characters of the powers of g. They are whole numbers: rounding them makes each character
    exact, and a wrong one would be noticed.

    Args:
        table: The Cayley table of a group.
        inverses: Of each element.
        class_of: Conjugacy class of each element; the identity alone is class 0.
        element_orders: Of each element.

    Raises:
        RepresentationLimitError: There are more than `MAX_CLASSES` classes.
        ArithmeticError: No attempt gave whole multiplicities and orthogonal characters.
    """
    if class_of.max() >= MAX_CLASSES:
        raise RepresentationLimitError(
            f"The group has {class_of.max() + 1} conjugacy classes; the irreps of groups with up "
            f"to {MAX_CLASSES} are computed, since the time grows with the cube of their number."
        )
    classes = _Classes.of(table, inverses, class_of, element_orders)
    for seed in range(_ATTEMPTS):
        if len(classes.sizes) == len(table):
            estimate = _abelian_characters(table, element_orders)[:, classes.representatives]
        else:
            estimate = _approximate_characters(table, inverses, classes, seed)
        values = _exact_characters(estimate, classes)
        if values is None or not _orthonormal(values, classes):
            continue
        indicators = np.rint(np.real(values[:, classes.square] @ classes.sizes) / len(table))
        rank = reading_order(indicators, values)
        indicators = indicators[rank].astype(np.int64)
        values = values[rank]
        values[indicators != 0] = np.real(values[indicators != 0])
        return CharacterTable(values, indicators)
    raise ArithmeticError(
        f"The characters of a group of order {len(table)} could not be told apart in {_ATTEMPTS} "
        "attempts."
    )


class _Classes(NamedTuple):
    """The conjugacy classes of a group, as arrays."""

    class_of: Int[np.ndarray, " order"]
    sizes: Int[np.ndarray, " class"]
    representatives: Int[np.ndarray, " class"]
    inverse: Int[np.ndarray, " class"]
    square: Int[np.ndarray, " class"]
    powers: list[Int[np.ndarray, " _"]]
    """For each class, the classes of g^0, g^1, ..., up to the order of g."""

    @classmethod
    def of(
        cls,
        table: Int[np.ndarray, "order order"],
        inverses: Int[np.ndarray, " order"],
        class_of: Int[np.ndarray, " order"],
        element_orders: Int[np.ndarray, " order"],
    ) -> "_Classes":
        _, representatives, sizes = np.unique(class_of, return_index=True, return_counts=True)
        identity = representatives[0]
        powers = []
        for g in representatives:
            power = [identity]
            while len(power) < element_orders[g]:
                power.append(table[power[-1], g])
            powers.append(class_of[np.array(power)])
        inverse = class_of[inverses[representatives]]
        square = class_of[table[representatives, representatives]]
        return cls(class_of, sizes, representatives, inverse, square, powers)


def _abelian_characters(
    table: Int[np.ndarray, "order order"], element_orders: Int[np.ndarray, " order"]
) -> Complex[np.ndarray, "irrep order"]:
    """One generator after another: a character chi extends to g by each root of chi(g^m)."""
    exponent = int(np.lcm.reduce(element_orders))
    members = np.flatnonzero(element_orders == 1)
    # chi(x) is the root of unity exp(2 pi i phase / exponent).
    phases = np.zeros((1, 1), np.int64)
    while len(members) < len(table):
        position = np.full(len(table), -1)
        position[members] = np.arange(len(members))
        g = int(np.argmin(position))
        powers, power = [members], g
        while position[power] < 0:
            powers.append(table[members, power])
            power = int(table[power, g])
        m = len(powers)
        roots = (phases[:, position[power], None] + exponent * np.arange(m)) // m
        steps = roots[..., None, None] * np.arange(m)[:, None]
        phases = (phases[:, None, None, :] + steps).reshape(len(phases) * m, -1) % exponent
        members = np.concatenate(powers)
    return np.exp(2j * np.pi * phases[:, np.argsort(members)] / exponent)


def _approximate_characters(
    table: Int[np.ndarray, "order order"],
    inverses: Int[np.ndarray, " order"],
    classes: _Classes,
    seed: int,
) -> Complex[np.ndarray, "irrep class"]:
    rng = np.random.default_rng([seed, 0x6368])
    parts = rng.normal(size=(2, len(classes.sizes)))
    z = parts[0] + 1j * parts[1]
    z = (z + z[classes.inverse].conj()) / np.sqrt(classes.sizes)
    # (z * phi)(x) = sum over y of z(x y^-1) phi(y), for class functions phi, in the basis of
    # normalized indicators of classes, where it is a Hermitian matrix.
    by_class = np.argsort(classes.class_of, kind="stable")
    starts = np.cumsum(classes.sizes) - classes.sizes
    kernel = z[classes.class_of[table[classes.representatives][:, inverses[by_class]]]]
    root = np.sqrt(classes.sizes)
    operator = np.add.reduceat(kernel, starts, axis=1) * root[:, None] / root
    _, vectors = np.linalg.eigh((operator + operator.conj().T) / 2)
    shape = vectors.T / root
    shape /= shape[:, :1]
    degrees = np.sqrt(len(table) / (np.abs(shape) ** 2 @ classes.sizes))
    return degrees[:, None] * shape


def _exact_characters(
    estimate: Complex[np.ndarray, "irrep class"], classes: _Classes
) -> Complex[np.ndarray, "irrep class"] | None:
    exact = np.zeros_like(estimate)
    done = np.zeros(len(classes.sizes), bool)
    # The powers of an element of large order settle many other classes at once.
    for k in sorted(range(len(done)), key=lambda k: -len(classes.powers[k])):
        if done[k]:
            continue
        powers = classes.powers[k]
        order = len(powers)
        coefficients = np.fft.fft(estimate[:, powers], axis=1) / order
        multiplicities = np.rint(coefficients.real)
        if np.abs(coefficients - multiplicities).max() > 1e-3 or multiplicities.min() < 0:
            return None
        exponents = np.arange(order)[:, None] * np.arange(order) % order
        roots = np.exp(2j * np.pi * np.arange(order) / order)
        exact[:, powers] = multiplicities @ roots[exponents]
        done[powers] = True
    # Sums of roots that are whole numbers should look it.
    for part in (np.real(exact), np.imag(exact)):
        whole = np.rint(part)
        near = np.abs(part - whole) < 1e-12
        part[near] = whole[near] + 0.0
    return exact


def _orthonormal(values: Complex[np.ndarray, "irrep class"], classes: _Classes) -> bool:
    order = classes.sizes.sum()
    gram = values * classes.sizes @ values.conj().T / order
    return bool(np.abs(gram - np.eye(len(values))).max() < 1e-10)


def reading_order(
    indicators: Shaped[np.ndarray, " irrep"], characters: Shaped[np.ndarray, "irrep cls"]
) -> Int[np.ndarray, " irrep"]:
    """Row numbers by dimension, then type (1, 0, -1), then larger characters first."""
    columns = np.round(np.stack([np.real(characters), np.imag(characters)]), 9) + 0.0
    keys = [*columns.transpose(2, 0, 1).reshape(-1, len(characters))]
    return np.lexsort([*(-key for key in reversed(keys)), -indicators, columns[0, :, 0]])
