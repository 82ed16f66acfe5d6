"""Irreducible representations of finite groups over the real numbers.

Main path, in reading order:

    real_irreps          orthogonal matrices for each irrep, and their check
    fourier              functions on the group -> one matrix for each irrep
    energies             how much of a function belongs to each irrep

Normalization. An irrep rho of dimension d over the reals commutes with a field K of
dimension c: the reals (c = 1), the complex numbers (2) or the quaternions (4), which is its
type. It occurs d/c times in the regular representation, so over all irreps

    sum of d^2 / c = order,    sum of (d / c) * character(g) = order if g = e, else 0.

    fourier          F(rho) = sum over g of f(g) rho(g)
    inverse_fourier  f(g) = 1/order * sum over rho of d/c * trace(F(rho) rho(g)^T)
    Parseval         sum of f(g)^2 = 1/order * sum over rho of d/c * |F(rho)|^2 (Frobenius)
    convolution      (f * h)(x) = sum over y of f(y) h(y^-1 x) becomes F(rho) H(rho)

All functions work on bare arrays; `Group.irreps` calls `real_irreps` and keeps the result.

Source: Serre, Linear Representations of Finite Groups (1977), chapters 2, 6, 12 and 13.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Complex, Float, Int

from mechatlas.maths.characters import CharacterTable, reading_order

RealType = Literal["real", "complex", "quaternionic"]

TOLERANCE = 1e-10
"""Largest error of a product of two matrices, or of a character, that is let through."""

_TYPE_OF_INDICATOR: dict[int, RealType] = {1: "real", 0: "complex", -1: "quaternionic"}
_COMMUTANT: dict[RealType, int] = {"real": 1, "complex": 2, "quaternionic": 4}
_ATTEMPTS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Irrep:
    """Irreducible representation over the real numbers: no subspace is invariant."""

    matrices: Float[np.ndarray, "order d d"]
    """Orthogonal matrices, one for each element, with matrices[a] @ matrices[b] = matrices[a*b]."""
    character: Float[np.ndarray, " order"]
    """Trace of each matrix, from the exact character table."""
    type: RealType
    """Type of the matrices that commute with all of them: the reals, the complex numbers or
    the quaternions. Over the complex numbers, a real irrep stays irreducible, a complex one
    falls into two different conjugate irreps, a quaternionic one into two equal ones."""
    name: str
    """Dimension, and a letter that counts irreps of that dimension: "1a" is trivial."""
    error: float
    """Bound on the Frobenius norm of matrices[a] @ matrices[b] - matrices[a*b] for all a, b,
    evaluated in float64. See `real_irreps`."""

    @property
    def dimension(self) -> int:
        """Size d of the matrices."""
        return self.matrices.shape[1]

    @property
    def commutant(self) -> int:
        """Dimension c of the commuting field: 1, 2 or 4."""
        return _COMMUTANT[self.type]

    @property
    def multiplicity(self) -> int:
        """Multiplicity in the regular representation: d / c."""
        return self.dimension // self.commutant


def real_irreps(
    table: Int[np.ndarray, "order order"],
    inverses: Int[np.ndarray, " order"],
    class_of: Int[np.ndarray, " order"],
    characters: CharacterTable,
    generators: Sequence[int],
) -> tuple[Irrep, ...]:
    """Construct all irreps over the reals, as orthogonal matrices.

    One copy of an irrep is a minimal left ideal of the group algebra. Multiplying on the
    right by a random symmetric element r cuts the part of the algebra that belongs to the
    irrep into such ideals, which are the eigenspaces; a Krylov sequence from the central
    idempotent gives an idempotent that generates one of them. The matrices of the generators
    are read off there, and all others are products of these.

    The check: take the generators and some of their powers. Let eps be the largest norm of
    rho(s) rho(x) - rho(s*x) for these s and all x, eta the largest of |rho(x)| - 1, and L
    the length of the longest element as a word in them. Writing a = s*b gives

        error(a) <= (1 + eta) error(b) + (2 + eta) eps

    for the largest norm of rho(a) rho(x) - rho(a*x), hence
    error <= L (2 + eta) (1 + eta)^L eps for all pairs.

    Args:
        table: The Cayley table of a group.
        inverses: Of each element.
        class_of: Conjugacy class of each element; the identity alone is class 0.
        characters: As `characters.character_table` gives them.
        generators: Some elements that generate the group.

    Raises:
        ArithmeticError: The bound exceeds `TOLERANCE` in all attempts.
    """
    words = _spell(table, inverses, generators)
    indicators, traces = _characters_over_reals(characters)
    attempts = []
    for indicator, values in zip(indicators, traces, strict=True):
        kind = _TYPE_OF_INDICATOR[int(indicator)]
        character = values.real[class_of]
        if kind != "quaternionic" and round(values[0].real) == _COMMUTANT[kind]:
            # Over the complex numbers it has dimension one: its character is its matrix.
            matrices = _rotations(character, values.imag[class_of], kind)
            attempts.append((kind, character, matrices, _error(matrices, table, words)))
        else:
            attempts.append((kind, character, *_attempt(table, inverses, character, kind, words)))
    dimensions = [matrices.shape[1] for _, _, matrices, _ in attempts]
    seen = dict.fromkeys(dimensions, 0)
    irreps = []
    for dimension, (kind, character, matrices, error) in zip(dimensions, attempts, strict=True):
        seen[dimension] += 1
        name = f"{dimension}{_letters(seen[dimension])}"
        for array in (matrices, character):
            array.flags.writeable = False
        irreps.append(Irrep(matrices, character, kind, name, error))
    return tuple(irreps)


def _characters_over_reals(
    characters: CharacterTable,
) -> tuple[Int[np.ndarray, " irrep"], Complex[np.ndarray, "irrep class"]]:
    """Sorted indicators and traces. The imaginary part is that of one of a conjugate pair."""
    values, indicators = characters.values, characters.indicators
    # Of a conjugate pair, the first stands for both.
    row_of = {row.tobytes(): i for i, row in enumerate(np.round(values, 6) + 0)}
    conjugates = np.round(values.conj(), 6) + 0
    kept = [i for i, row in enumerate(conjugates) if i <= row_of[row.tobytes()]]
    doubled = np.where(indicators[kept] == 1, 1, 2)[:, None]
    traces = doubled * np.real(values[kept]) + 1j * np.imag(values[kept])
    rank = reading_order(indicators[kept], traces)
    return indicators[kept][rank], traces[rank]


def _rotations(
    trace: Float[np.ndarray, " order"], sine: Float[np.ndarray, " order"], kind: RealType
) -> Float[np.ndarray, "order d d"]:
    if kind == "real":
        return trace[:, None, None].copy()
    cosine = trace / 2
    # A copy of its own memory: verifiers keep what they found out about arrays that are no views.
    return np.stack([cosine, -sine, sine, cosine], axis=-1).reshape(-1, 2, 2).copy()


def _attempt(
    table: Int[np.ndarray, "order order"],
    inverses: Int[np.ndarray, " order"],
    character: Float[np.ndarray, " order"],
    kind: RealType,
    words: "_Words",
) -> tuple[Float[np.ndarray, "order d d"], float]:
    error = np.inf
    for seed in range(_ATTEMPTS):
        rng = np.random.default_rng([seed, 0x6972])
        ideal = _minimal_left_ideal(table, inverses, character, kind, words, rng)
        if ideal is not None:
            matrices = _multiply_out(ideal, table, words)
            error = _error(matrices, table, words)
            trace = np.trace(matrices, axis1=1, axis2=2)
            if error < TOLERANCE and np.abs(trace - character).max() < TOLERANCE:
                return matrices, error
    raise ArithmeticError(
        f"An irrep of dimension {round(character.max())} of a group of order {len(table)} could "
        f"not be found to {TOLERANCE:g} in {_ATTEMPTS} attempts; the last error was {error:.2g}."
    )


def _minimal_left_ideal(
    table: Int[np.ndarray, "order order"],
    inverses: Int[np.ndarray, " order"],
    character: Float[np.ndarray, " order"],
    kind: RealType,
    words: "_Words",
    rng: np.random.Generator,
) -> Float[np.ndarray, "order d"] | None:
    """Orthonormal basis of one copy of the irrep in the left regular representation."""
    dimension = round(character.max())
    n_copies = dimension // _COMMUTANT[kind]
    # Right multiplication by a random symmetric element; one of a few terms costs little.
    terms = np.concatenate([words.generators, rng.integers(len(table), size=8)])
    weights = rng.normal(size=len(terms))
    shifts = np.stack([table[:, terms], table[:, inverses[terms]]])

    def multiply(vectors: Float[np.ndarray, "... order"]) -> Float[np.ndarray, "... order"]:
        return vectors[..., shifts].sum(axis=-3) @ weights

    # The character is, up to a factor, the unit of the part that belongs to the irrep. Its
    # Krylov space under right multiplication has one dimension for each copy.
    krylov = np.zeros((n_copies, len(table)))
    vector = character
    for i in range(n_copies):
        for _ in range(2):
            vector = vector - krylov[:i].T @ (krylov[:i] @ vector)
        norm = np.linalg.norm(vector)
        if norm < 1e-6:
            return None
        krylov[i] = vector / norm
        vector = multiply(krylov[i])
    small = multiply(krylov) @ krylov.T
    eigenvalues, eigenvectors = np.linalg.eigh((small + small.T) / 2)
    # The ideal that is best separated from the others is the most accurate.
    gaps = np.diff(eigenvalues, prepend=-np.inf, append=np.inf)
    best = int(np.minimum(gaps[:-1], gaps[1:]).argmax())
    idempotent = eigenvectors[:, best] @ krylov
    return _range_of_projector(table, inverses, idempotent, dimension)


def _range_of_projector(
    table: Int[np.ndarray, "order order"],
    inverses: Int[np.ndarray, " order"],
    idempotent: Float[np.ndarray, " order"],
    rank: int,
) -> Float[np.ndarray, "order d"] | None:
    """Orthonormal basis of the left ideal, by Cholesky factors of idempotent(y^-1 x).

    That matrix is the orthogonal projector onto the ideal, up to a factor; and if a multiple
    of a projector is L L^T with L of full rank, then the columns of L are orthogonal.
    """
    identity = table[0, inverses[0]]
    idempotent = idempotent * rank / (idempotent[identity] * len(table))
    factor = np.zeros((rank, len(table)))
    left = np.full(len(table), idempotent[identity])
    for i in range(rank):
        pivot = int(left.argmax())
        if left[pivot] < 1e-4 * idempotent[identity]:
            return None
        column = idempotent[table[inverses[pivot]]] - factor[:i, pivot] @ factor[:i]
        factor[i] = column / np.sqrt(left[pivot])
        left -= factor[i] ** 2
    return factor.T.copy()


class _Words(NamedTuple):
    """Rounds of products that reach every element from a few generators."""

    identity: int
    generators: list[int]
    rounds: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    """Elements found together, and the earlier ones, left and right, that they are products of."""
    longest: int
    """Bound on the length of an element as a word in the generators."""


def _spell(
    table: Int[np.ndarray, "order order"],
    inverses: Int[np.ndarray, " order"],
    generators: Sequence[int],
) -> _Words:
    order = len(table)
    identity = int(table[0, inverses[0]])
    # Powers of generators that are of large order, so that all words are short: errors grow
    # with their length.
    alphabet = dict.fromkeys(generators)
    for s in generators:
        power = s
        for _ in range(2, order.bit_length()):
            power = int(table[power, power])
            if power == identity or power in alphabet:
                break
            alphabet[power] = None
    generators = list(alphabet)
    lengths = np.full(order, -1)
    lengths[identity] = 0
    lengths[generators] = 1
    known = np.array([*generators, identity])
    rounds = []
    while len(known) < order:
        # Products of two known elements, so that words double in length; generators come
        # first among the left factors, so that each round finds something.
        left = known[: max(len(generators), 4 * order // len(known))]
        products = table[np.ix_(left, known)]
        _, where = np.unique(products, return_index=True)
        i, j = np.unravel_index(where, products.shape)
        new = lengths[products[i, j]] < 0
        a, b = left[i[new]], known[j[new]]
        products_reached = table[a, b]
        lengths[products_reached] = lengths[a] + lengths[b]
        rounds.append((products_reached, a, b))
        known = np.concatenate([known, products_reached])
    return _Words(identity, generators, rounds, int(lengths.max()))


def _multiply_out(
    basis: Float[np.ndarray, "order d"], table: Int[np.ndarray, "order order"], words: _Words
) -> Float[np.ndarray, "order d d"]:
    dimension = basis.shape[1]
    matrices = np.empty((len(table), dimension, dimension))
    matrices[words.identity] = np.eye(dimension)
    for s in words.generators:
        # Towards the nearest orthogonal matrix; errors of the basis enter in second order only.
        matrix = basis[table[s]].T @ basis
        for _ in range(2):
            matrix = 1.5 * matrix - 0.5 * matrix @ matrix.T @ matrix
        matrices[s] = matrix
    for product, a, b in words.rounds:
        matrices[product] = matrices[a] @ matrices[b]
    return matrices


def _error(
    matrices: Float[np.ndarray, "order d d"], table: Int[np.ndarray, "order order"], words: _Words
) -> float:
    """Compute the bound on the error that `real_irreps` states."""
    unit = np.eye(matrices.shape[1])
    # |A^T A - 1| <= t implies |A| <= sqrt(1 + t) in the spectral norm.
    defect = _largest_norm(matrices.transpose(0, 2, 1) @ matrices - unit)
    eta = np.sqrt(1 + defect) - 1
    steps = [_largest_norm(matrices[s] @ matrices - matrices[table[s]]) for s in words.generators]
    eps = max([*steps, _largest_norm(matrices[[words.identity]] - unit)])
    return float(words.longest * (2 + eta) * (1 + eta) ** words.longest * eps)


def _largest_norm(matrices: Float[np.ndarray, "count d d"]) -> float:
    return float(np.sqrt(np.square(matrices).sum(axis=(1, 2)).max()))


def _letters(count: int) -> str:
    text = ""
    while count:
        count, letter = divmod(count - 1, 26)
        text = chr(ord("a") + letter) + text
    return text


def fourier(
    f: Float[np.ndarray, "*batch order"], irreps: Sequence[Irrep]
) -> tuple[Float[np.ndarray, "*batch _ _"], ...]:
    """Fourier transform of functions on the group: sum over g of f(g) rho(g), for each rho.

    Args:
        f: Functions on the group, along the last axis.
        irreps: As `Group.irreps` gives them, or some of them.

    Returns:
        For each irrep, matrices of its dimension along the last two axes.
    """
    return tuple(np.tensordot(f, irrep.matrices, axes=1) for irrep in irreps)


def energies(
    f: Float[np.ndarray, "*batch order"], irreps: Sequence[Irrep]
) -> Float[np.ndarray, "*batch irrep"]:
    """Squared norm of the part of a function that belongs to each irrep.

    Over all irreps they sum to the sum of f(g)^2 (Parseval).
    """
    parts = [
        np.square(each).sum(axis=(-2, -1)) * irrep.multiplicity / len(irrep.character)
        for each, irrep in zip(fourier(f, irreps), irreps, strict=True)
    ]
    return np.stack(parts, axis=-1)
