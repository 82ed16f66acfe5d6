"""How much of each feature is in each branch of a site, and whether that is more than by chance.

    spectrum    variances and correlations of the channels, from activations
    branches    decoder rows and branches -> shares, expected shares, p-values, q-values
    by_lot      the same on atoms whose channels were drawn by lot, as a control
    power       what the test finds of atoms that were moved into a branch
    plain_shares    the shares alone

The share of a branch is the paper's: the length of the positive part of a decoder row inside the
branch, over its whole length. What is expected of a feature that belongs to no branch is the
branch's share of the channels or, where activations are given, of their variance.

Source: Bozoukov, Branch specialization with k-sparse autoencoders (2025), for the share.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechatlas.analysis.branches.null import (
    FAINTEST,
    Lumps,
    Places,
    covariance_of_squares,
    mixing,
    places_of,
    spill,
    tail,
)
from mechatlas.base import InputError
from mechatlas.maths.statistics import q_values, wilson

ROWS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """How the channels of a site vary."""

    n_rows: int
    mean: Float[np.ndarray, " d"]
    variance: Float[np.ndarray, " d"]
    correlation: Float[np.ndarray, "d d"]
    """0 with channels that do not vary."""
    signed: bool
    """Whether any activation is negative."""


@dataclasses.dataclass(frozen=True, eq=False)
class Specialization:
    """Shares of features in branches, with their evidence.

    Every matrix has a row for each feature and a column for each branch, in the order of `names`.
    Features without any decoder row to speak of have NaN.
    """

    names: tuple[str, ...]
    share: Float[np.ndarray, "feature branch"]
    """Length of the (positive part of the) decoder row in the branch over its whole length; the
    squares of the shares of branches that cover a site add up to 1."""
    expected: Float[np.ndarray, "feature branch"]
    """Root mean square of the share under the null."""
    p_values: Float[np.ndarray, "feature branch"]
    """Probability of at least such a share if the feature belonged to no branch."""
    q_values: Float[np.ndarray, "feature branch"]
    """Smallest false discovery rate, over all features and branches, at which the claim that the
    feature is specialised still stands."""
    low: Float[np.ndarray, "feature branch"]
    """95 % interval of the share, if the atom were drawn anew as so many independent lumps."""
    high: Float[np.ndarray, "feature branch"]
    lumps: Float[np.ndarray, "feature branch"]
    """How many independent pieces an atom comes to, after correlations of the channels."""

    @property
    def excess(self) -> Float[np.ndarray, "feature branch"]:
        """Effect size: 0 as expected, 1 all in the branch, negative if less than expected."""
        expected = np.square(self.expected)
        return (np.square(self.share) - expected) / np.maximum(1 - expected, 1e-300)

    def specialised(self, rate: float = 0.05) -> Bool[np.ndarray, "feature branch"]:
        """Which features are specialised to which branch at a false discovery rate."""
        return np.nan_to_num(self.q_values, nan=np.inf) <= rate

    def branch_of(self, rate: float = 0.05) -> Int[np.ndarray, " feature"]:
        """The branch that each feature is specialised to most; -1 for none."""
        stands = self.specialised(rate)
        excess = np.where(stands, self.excess, -np.inf)
        return np.where(stands.any(axis=1), excess.argmax(axis=1), -1)

    def leaning(self) -> Int[np.ndarray, " feature"]:
        """The branch that each feature lies in most surely, proved or not; -1 if not tested."""
        p = np.where(np.isnan(self.p_values), np.inf, self.p_values)
        return np.where(np.isfinite(p).any(axis=1), p.argmin(axis=1), -1)


def branches(
    W_dec: Any,  # noqa: N803 - the field's name
    branches: Mapping[str, Any],
    activations: Any = None,
    *,
    positive: bool | None = None,
    tested: Bool[np.ndarray, " feature"] | None = None,
) -> Specialization:
    """Test every feature for more of itself in a branch than chance would put there.

    Args:
        W_dec: Decoder rows (n_features, d), numpy or torch; or a dictionary.
        branches: Name -> channels, as a slice or (first, one after the last). They must not
            overlap; together they need not cover the site.
        activations: Rows (n, d) of the site, or what `spectrum` made of them. Without them all
            channels count as equally and independently variable.
        positive: Only the positive part of a row counts, as after a rectifier. By default it does
            unless activations are given and some are negative.
        tested: Features to test, such as those that are ever active; by default all. The others
            have shares, but no p-values.

    Returns:
        Shares, expected shares, p-values and q-values, each (n_features, n_branches).

    Raises:
        InputError: There is nothing to compare, shapes do not fit, or a value is not finite.
    """
    atoms, site = _given(W_dec, branches, activations, positive)
    energy, p, lumps = _tails(atoms, site)
    low, high = wilson(energy, lumps)
    if tested is not None:
        p[~tested] = np.nan
    expected = np.sqrt([[place.share for place in site.places]]) * np.ones(energy.shape)
    expected[np.isnan(energy)] = np.nan
    return Specialization(
        names=tuple(site.branches),
        share=np.sqrt(energy),
        expected=expected,
        p_values=p,
        q_values=q_values(p),
        low=np.sqrt(low),
        high=np.sqrt(high),
        lumps=lumps,
    )


_tested = branches  # where an argument has the name


@dataclasses.dataclass(frozen=True, eq=False)
class _Site:
    """What the null knows of the channels."""

    branches: dict[str, slice]
    places: list[Places]
    units: Float[np.ndarray, " d"]
    """Variance that each channel's entries are divided by."""
    spilled: Float[np.ndarray, "d d"] | None
    positive: bool

    @classmethod
    def of(
        cls, named: dict[str, slice], d: int, known: Spectrum | None, *, positive: bool
    ) -> "_Site":
        """From the variances and correlations, or from widths alone.

        Raises:
            InputError: No channel varies.
        """
        variance, together, spilled = np.ones(d), None, None
        if known is not None:
            if not known.variance.any():
                raise InputError(f"All {known.n_rows} rows of activations are equal.")
            variance = known.variance / known.variance.mean()
            together = covariance_of_squares(known.correlation, positive=positive)
            spilled = spill(mixing(known.correlation)[0])
        places = []
        for channels in named.values():
            inside = np.zeros(d, dtype=bool)
            inside[channels] = True
            places.append(places_of(variance, inside, together))
        units = np.maximum(variance, FAINTEST**2)
        return cls(named, places, units, spilled, positive)


def _known(activations: Any) -> Spectrum | None:
    """The spectrum of activations, or what is one already."""
    given = activations is None or isinstance(activations, Spectrum)
    return activations if given else spectrum(activations)


def _given(
    W_dec: Any,  # noqa: N803 - the field's name
    branches: Mapping[str, Any],
    activations: Any,
    positive: bool | None,
) -> tuple[np.ndarray, _Site]:
    """Decoder rows, and what the null knows.

    Raises:
        InputError: There is nothing to compare, or shapes do not fit.
    """
    atoms = matrix(getattr(W_dec, "W_dec", W_dec), "W_dec", "n_features, d")
    d = atoms.shape[1]
    named, known = checked_branches(branches, d), _known(activations)
    if known is not None and len(known.variance) != d:
        raise InputError(
            f"Decoder rows have {d} channels, the activations {len(known.variance)}. Are they "
            "of the same site?"
        )
    if positive is None:
        positive = known is None or not known.signed
    return atoms, _Site.of(named, d, known, positive=positive)


def _tails(atoms: np.ndarray, site: _Site) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Share of the energy, p-value and number of pieces of every atom in every branch."""
    n = len(atoms)
    energy, p, pieces = (np.full((n, len(site.places)), np.nan) for _ in range(3))
    for start in range(0, n, ROWS_AT_ONCE):
        block = atoms[start : start + ROWS_AT_ONCE].astype(np.float64)
        _finite(block, "W_dec", start)
        squares = np.square(np.maximum(block, 0) if site.positive else block)
        whole = squares.sum(axis=1)
        there = np.flatnonzero((whole > 0) & (squares / site.units).any(axis=1))
        squares = squares[there] / whole[there, None]
        rows = start + there
        energy[rows] = np.stack(
            [squares[:, channels].sum(axis=1) for channels in site.branches.values()], axis=1
        )
        lumps = Lumps.of(squares, site.units, site.spilled)
        for k, place in enumerate(site.places):
            p[rows, k], pieces[rows, k] = tail(lumps, energy[rows, k], place)
    return energy, p, pieces


def by_lot(
    W_dec: Any,  # noqa: N803 - the field's name
    branches: Mapping[str, Any],
    activations: Any = None,
    *,
    positive: bool | None = None,
    tested: Bool[np.ndarray, " feature"] | None = None,
    seed: int = 0,
) -> Specialization:
    """The control: the same test on atoms whose channels were drawn by lot.

    Each atom is divided by the deviations of the channels and freed of their correlations, its
    entries are put in random order, mixed as the channels are correlated, and multiplied by the
    deviations again. What is found specialised then is what the test finds where there is nothing.

    Args:
        W_dec: As for `branches`, and so are the others.
        branches: Name -> channels.
        activations: Rows, or their spectrum.
        positive: Only the positive part of a row counts.
        tested: Features to test.
        seed: Seed of the lots.

    Raises:
        InputError: As for `branches`.
    """
    atoms = matrix(getattr(W_dec, "W_dec", W_dec), "W_dec", "n_features, d").astype(np.float64)
    known = _known(activations)
    order = np.argsort(np.random.default_rng([seed, 3]).random(atoms.shape), axis=1)
    if known is None:
        drawn = np.take_along_axis(atoms, order, axis=1)
    else:
        deviation = np.sqrt(known.variance)
        least = FAINTEST * np.sqrt(np.mean(known.variance))
        mix, unmix = mixing(known.correlation)
        entries = atoms / np.maximum(deviation, least) @ unmix
        drawn = np.take_along_axis(entries, order, axis=1) @ mix * deviation
    return _tested(drawn, branches, known, positive=positive, tested=tested)


def power(
    W_dec: Any,  # noqa: N803 - the field's name
    branches: Mapping[str, Any],
    activations: Any = None,
    *,
    positive: bool | None = None,
    tested: Bool[np.ndarray, " feature"] | None = None,
    excess: float = 0.9,
    rate: float = 0.05,
    seed: int = 0,
) -> Float[np.ndarray, " branch"]:
    """What part of the features that belong to a branch the test would find.

    A tenth of the atoms, and no more than 100 for each branch, are moved into branches: what they
    have inside and outside is stretched until the share has the excess. All atoms are tested then.

    Args:
        W_dec: As for `branches`, and so are the others.
        branches: Name -> channels.
        activations: Rows, or their spectrum.
        positive: Only the positive part of a row counts.
        tested: Features to test.
        excess: Effect size that they are moved to.
        rate: False discovery rate.
        seed: Seed of which atoms are moved where.

    Returns:
        For each branch the share of what was moved there that is found; NaN if nothing was.

    Raises:
        InputError: As for `branches`.
    """
    known = _known(activations)
    atoms, site = _given(W_dec, branches, known, positive)
    atoms = atoms.astype(np.float64)
    squares = np.square(plain_shares(atoms, site.branches, positive=site.positive)[0])
    free = ((squares > 0) & (squares < 1)).all(axis=1)
    order = np.flatnonzero(free if tested is None else free & tested)
    order = np.random.default_rng([seed, 5]).permutation(order)
    size = min(100, len(order) // (10 * len(site.places)))
    parts = [order[k * size : (k + 1) * size] for k in range(len(site.places))]
    for k, (rows, channels) in enumerate(zip(parts, site.branches.values(), strict=True)):
        aim = site.places[k].share + excess * (1 - site.places[k].share)
        inside = atoms[rows, channels] * np.sqrt(aim / squares[rows, k])[:, None]
        atoms[rows] *= np.sqrt((1 - aim) / (1 - squares[rows, k]))[:, None]
        atoms[rows, channels] = inside
    found = _tested(atoms, branches, known, positive=site.positive, tested=tested).specialised(rate)
    return np.array([found[rows, k].mean() if size else np.nan for k, rows in enumerate(parts)])


def plain_shares(
    atoms: Float[np.ndarray, "feature d"], branches: Mapping[str, slice], *, positive: bool = True
) -> tuple[Float[np.ndarray, "feature branch"], Float[np.ndarray, " branch"]]:
    """Shares without a test, 0 for atoms without length, and what width alone predicts."""
    part = np.maximum(atoms, 0) if positive else np.abs(atoms)
    whole = np.maximum(np.linalg.norm(part, axis=1), np.finfo(np.float32).tiny)
    widths = [len(range(*s.indices(atoms.shape[1]))) for s in branches.values()]
    shares = np.zeros((len(atoms), len(widths)))
    for k, s in enumerate(branches.values()):
        shares[:, k] = np.linalg.norm(part[:, s], axis=1) / whole
    return shares, np.sqrt(np.array(widths, dtype=np.float64) / atoms.shape[1])


def spectrum(activations: Any) -> Spectrum:
    """Variances and correlations of channels.

    Args:
        activations: Rows (n, d), numpy or torch; or several such arrays one after another, read
            once, so that they need not fit into memory.

    Raises:
        InputError: They are no rows, fewer than two, or a value is not finite.
    """
    count, low = 0, 0.0
    total = square = None
    shift = np.zeros(0)
    for block in _blocks(activations):
        if total is None or square is None:
            shift = block.mean(axis=0)
            total, square = np.zeros(len(shift)), np.zeros((len(shift), len(shift)))
        if block.shape[1] != len(shift):
            raise InputError(
                f"Rows of activations have {block.shape[1]} channels, earlier ones {len(shift)}."
            )
        _finite(block, "activations", count)
        low = min(low, float(block.min()))
        block = block - shift  # else a large mean would drown a small variance
        total += block.sum(axis=0)
        square += block.T @ block
        count += len(block)
    if total is None or square is None or count < 2:
        raise InputError(f"Variances need two rows of activations or more, got {count}.")
    mean = total / count
    covariance = (square - count * np.outer(mean, mean)) / (count - 1)
    variance = np.maximum(np.diag(covariance), 0)
    deviation = np.sqrt(variance)
    varies = deviation > 1e-12 * max(float(deviation.max()), 1e-300)
    scale = np.where(varies, deviation, np.inf)
    correlation = np.clip(covariance / scale[:, None] / scale, -1, 1)
    np.fill_diagonal(correlation, 1.0)
    return Spectrum(count, mean + shift, np.where(varies, variance, 0), correlation, low < 0)


def _blocks(activations: Any) -> Iterator[np.ndarray]:
    if not isinstance(activations, np.ndarray | Tensor) and isinstance(activations, Iterable):
        for part in activations:
            yield from _blocks(part)
        return
    rows = matrix(activations, "activations", "n, d")
    for start in range(0, len(rows), ROWS_AT_ONCE):
        yield rows[start : start + ROWS_AT_ONCE].astype(np.float64)


def checked_branches(branches: Mapping[str, Any], d: int) -> dict[str, slice]:
    """Branches as slices of the channels.

    Raises:
        InputError: There is nothing to compare; or one is empty, does not fit, or overlaps.
    """
    named: dict[str, slice] = {}
    owner = np.full(d, -1)
    for number, (name, ends) in enumerate(dict(branches).items()):
        first, last = (ends.start, ends.stop) if isinstance(ends, slice) else tuple(ends)
        first, last = 0 if first is None else int(first), d if last is None else int(last)
        if isinstance(ends, slice) and ends.step not in (None, 1):
            raise InputError(f"Branch {name!r} takes every {ends.step}th channel, expected all.")
        if not 0 <= first < last <= d:
            raise InputError(
                f"Branch {name!r} is channels {first} to {last}; expected some of 0 to {d}."
            )
        taken = owner[first:last]
        if (taken >= 0).any():
            other = list(named)[int(taken.max())]
            raise InputError(f"Branches {other!r} and {name!r} overlap.")
        owner[first:last] = number
        named[str(name)] = slice(first, last)
    if not named:
        raise InputError("There are no branches: pass a dict of name -> slice of the channels.")
    if len(named) == 1 and (owner >= 0).all():
        raise InputError(
            f"The branch {next(iter(named))!r} is all {d} channels, so there is nothing to compare "
            "it with. Use a dictionary of the whole site."
        )
    return named


def matrix(value: Any, name: str, shape: str) -> np.ndarray:
    """A numpy or torch matrix of numbers, as numpy.

    Raises:
        InputError: It is none, or it is empty.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype == torch.bfloat16 else value
    array = np.asarray(value)
    if array.ndim != 2 or array.dtype.kind not in "fiu" or not array.size:
        raise InputError(
            f"{name} must be a matrix ({shape}) of numbers, got shape {array.shape} of "
            f"{array.dtype}."
        )
    return array


def _finite(block: np.ndarray, name: str, start: int) -> None:
    bad = np.argwhere(~np.isfinite(block))
    if len(bad):
        row, column = bad[0]
        raise InputError(
            f"{name} is not finite at row {start + row}, column {column} "
            f"({block[row, column]}). Remove the row, or find out where it came from."
        )
