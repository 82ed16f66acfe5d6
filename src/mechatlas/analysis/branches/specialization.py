"""Shares of features in the branches of a site, and whether they are more than by chance.

    branches              decoder rows and branches -> shares, expected shares, p- and q-values
    BranchTest            the same test, with its permutation control and its power
    channel_statistics    activations -> variances and correlations of the channels
    plain_shares          shares without a test

The share of a branch is the paper's: the length of the positive part of a decoder row inside the
branch, over its whole length. The expected share of a feature that belongs to no branch is the
branch's share of the channels or, where activations are given, of their variance.

Source: Bozoukov, Branch specialization with k-sparse autoencoders (2025), for the share.
"""

import abc
import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils import data

from mechatlas import deprecated
from mechatlas.activations.branches import as_channels
from mechatlas.analysis.branches.null import (
    FAINTEST,
    Components,
    branch_tail,
    channel_groups,
    covariance_of_squares,
    leakage,
    whitening_pair,
)
from mechatlas.base import InputError, Result, SiteError
from mechatlas.maths.arrays import Channels, as_array, numbers_of
from mechatlas.maths.directions import distinct_rows
from mechatlas.maths.linalg import Moments
from mechatlas.maths.statistics import q_values, wilson

ROWS_AT_ONCE = 1024
FDR = 0.05
"""Default false discovery rate."""


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelStatistics:
    """Variances and correlations of the channels of a site."""

    n_rows: int
    mean: Float[np.ndarray, " d"]
    variance: Float[np.ndarray, " d"]
    correlation: Float[np.ndarray, "d d"]
    """Correlations; 0 with channels that do not vary."""
    signed: bool
    """Whether any activation is negative."""


class ChanceTest(abc.ABC):
    """Test of features for branches, with its permutation control and its power."""

    rows: Float[np.ndarray, "feature d"]
    branches: dict[str, Channels]
    tested: Bool[np.ndarray, " feature"] | None
    positive: bool
    """Whether only the positive part of a row counts."""
    n_rows: int
    """Rows of activations that its statistics are from."""

    def run(self) -> "Specialization":
        """Test all features.

        Raises:
            InputError: A value is not finite.
        """
        return dataclasses.replace(self._test(self.rows), test=self)

    @abc.abstractmethod
    def permuted(self, *, seed: int = 0) -> "Specialization":
        """Test features mixed up at random: those found specialized are false."""

    def power(
        self, *, excess: float = 0.9, fdr: float = FDR, seed: int = 0
    ) -> Float[np.ndarray, " branch"]:
        """Measure which fraction of the features that belong to a branch the test finds.

        A tenth of the features, and no more than 100 for each branch, are moved into branches, as
        far as the effect size says. All features are tested then.

        Args:
            excess: Effect size that they are moved to.
            fdr: False discovery rate.
            seed: Seed of the choice of features.

        Returns:
            For each branch the fraction found of the features moved there; NaN if none was.
        """
        rows, n = self.rows.astype(np.float64), len(self.branches)
        order = np.random.default_rng([seed, 5]).permutation(self._movable(rows))
        size = min(100, len(order) // (10 * n))
        parts = [order[k * size : (k + 1) * size] for k in range(n)]
        self._move(rows, parts, excess)
        significant = self._test(rows).specialized(fdr)
        return np.array([significant[p, k].mean() if size else np.nan for k, p in enumerate(parts)])

    @abc.abstractmethod
    def _test(self, rows: np.ndarray) -> "Specialization":
        """Share of every row in every branch, with its tail under the null."""

    @abc.abstractmethod
    def _movable(self, rows: np.ndarray) -> Int[np.ndarray, " some"]:
        """Features that can be moved into a branch."""

    @abc.abstractmethod
    def _move(self, rows: np.ndarray, parts: list[np.ndarray], excess: float) -> None:
        """Change the rows of the features of each part so that the branch has the excess."""

    def _judged(
        self,
        rows: Float[np.ndarray, "feature d"],
        energy: Float[np.ndarray, "feature branch"],
        expected: Float[np.ndarray, "feature branch"],
        p: Float[np.ndarray, "feature branch"],
        n_effective: Float[np.ndarray, "feature branch"],
    ) -> "Specialization":
        """Correct for the number of features; rows that say nothing of their own take no part.

        Args:
            rows: Rows of the features.
            energy: Squared share.
            expected: Root mean square of the share under the null.
            p: p-values of all rows.
            n_effective: Effective number of independent components.
        """
        low, high = wilson(energy, n_effective)
        distinct = distinct_rows(rows)
        p[~np.isin(np.arange(len(rows)), distinct.kept)] = np.nan
        if self.tested is not None:
            p[~self.tested] = np.nan
        q = q_values(p)
        p[~distinct.unique], q[~distinct.unique] = np.nan, np.nan
        share, low, high = (np.sqrt(np.maximum(each, 0)) for each in (energy, low, high))
        return Specialization(
            names=tuple(self.branches), share=share, expected=expected, p_values=p, q_values=q,
            low=low, high=high, n_effective=n_effective,
        )  # fmt: skip


@deprecated.renamed_attributes
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Specialization(Result):
    """Shares of features in branches, with their evidence.

    Every matrix has a row for each feature and a column for each branch, in the order of `names`.
    Features without any decoder row to speak of have NaN. Rows that are constant, or that point the
    same way as another, say nothing of a branch: they have shares, and NaN for p- and q-values.
    """

    names: tuple[str, ...]
    """Names of the branches."""
    share: Float[np.ndarray, "feature branch"]
    """Length of the (positive part of the) decoder row in the branch over its whole length; the
    squares of the shares of branches that cover a site add up to 1."""
    expected: Float[np.ndarray, "feature branch"]
    """Root mean square of the share under the null."""
    p_values: Float[np.ndarray, "feature branch"]
    """Probability of at least such a share if the feature belonged to no branch, as it is or with
    entries that count for no more than others do: the smaller one, corrected for two tests."""
    q_values: Float[np.ndarray, "feature branch"]
    """Smallest false discovery rate, over all features and branches, at which the feature still
    counts as specialized to the branch."""
    low: Float[np.ndarray, "feature branch"]
    """Lower end of the 95 % interval of the share, if the row were drawn anew with as many
    independent components."""
    high: Float[np.ndarray, "feature branch"]
    """Upper end of the interval."""
    n_effective: Float[np.ndarray, "feature branch"]
    """Effective number of independent components of the row, after correlations of channels."""
    test: "ChanceTest | None" = None
    """Test that gave the result, for its permutation control and its power."""

    @property
    def excess(self) -> Float[np.ndarray, "feature branch"]:
        """Effect size: 0 as expected, 1 all in the branch, negative if less than expected."""
        expected = np.square(self.expected)
        return (np.square(self.share) - expected) / np.maximum(1 - expected, 1e-300)

    @deprecated.renamed_arguments
    def specialized(self, fdr: float = FDR) -> Bool[np.ndarray, "feature branch"]:
        """Whether each feature is specialized to each branch at a false discovery rate."""
        return np.nan_to_num(self.q_values, nan=np.inf) <= fdr

    @deprecated.renamed_arguments
    def branch_of(self, fdr: float = FDR) -> Int[np.ndarray, " feature"]:
        """Number of the branch that each feature is specialized to most; -1 for none."""
        specialized = self.specialized(fdr)
        excess = np.where(specialized, self.excess, -np.inf)
        return np.where(specialized.any(axis=1), excess.argmax(axis=1), -1)

    def nearest_branch(self) -> Int[np.ndarray, " feature"]:
        """Number of the branch with the smallest p-value, significant or not; -1 if not tested."""
        p = np.where(np.isnan(self.p_values), np.inf, self.p_values)
        return np.where(np.isfinite(p).any(axis=1), p.argmin(axis=1), -1)

    def summary(self) -> str:
        """Numbers of specialized features, in all and by branch, with expected shares."""
        specialized, tested = self.specialized(), ~np.isnan(self.q_values).all(axis=1)
        lines = [
            f"{specialized.any(axis=1).sum():,} of {tested.sum():,} features specialized to a "
            f"branch (false discovery rate {FDR:.0%})"
        ]
        if tested.any():
            expected, n_effective = (
                np.median(each[tested], axis=0) for each in (self.expected, self.n_effective)
            )
            parts = (
                f"{name} {n:,} (expected share {share:.2f}, {pieces:.0f} effective components)"
                for name, n, share, pieces in zip(
                    self.names[:4], specialized.sum(axis=0), expected, n_effective, strict=False
                )
            )
            more = f"\nand {len(self.names) - 4} more" if len(self.names) > 4 else ""
            lines.append("\n".join(parts) + more)
        return "\n".join(lines)


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
        W_dec: Decoder rows (n_features, d), numpy, torch or lists; or a dictionary.
        branches: Name -> channels, as a slice, as (first, one after the last), or as an array of
            numbers or of one bool a channel. They must not overlap; together they need not cover
            the site.
        activations: Rows (n, d) of the site, or their `channel_statistics`. Without them all
            channels count as equally and independently variable.
        positive: Only the positive part of a row counts, as after a rectifier. By default it does
            unless activations are given and some are negative.
        tested: Features to test, such as those that are ever active; by default all. The others
            have shares, but no p-values.

    Returns:
        Shares, expected shares, p-values and q-values, each (n_features, n_branches).

    Raises:
        InputError: There is nothing to compare, shapes do not fit, or a value is not finite.

    Examples:
        >>> import numpy as np
        >>> from mechatlas import branches
        >>> W_dec = np.abs(np.random.default_rng(1).standard_normal((200, 64)))
        >>> W_dec[:20, 16:] *= 0.1
        >>> result = branches(W_dec, {"1x1": slice(0, 16), "3x3": slice(16, 64)})
        >>> result.specialized().sum(axis=0).tolist()
        [20, 0]
    """
    return BranchTest(W_dec, branches, activations, positive=positive, tested=tested).run()


class BranchTest(ChanceTest):
    """Test of features for branches, with its permutation control and its power.

    Args:
        W_dec: Decoder rows or a dictionary, as for `branches`.
        branches: Name -> channels.
        activations: Rows of the site, or their statistics.
        positive: Only the positive part of a row counts.
        tested: Features to test.

    Raises:
        InputError: There is nothing to compare, or shapes do not fit.
    """

    def __init__(
        self,
        W_dec: Any,  # noqa: N803 - the field's name
        branches: Mapping[str, Any],
        activations: Any = None,
        *,
        positive: bool | None = None,
        tested: Bool[np.ndarray, " feature"] | None = None,
    ) -> None:
        self.rows = as_array(getattr(W_dec, "W_dec", W_dec), "n_features d", "W_dec")
        if not self.rows.size:
            raise InputError(f"W_dec has shape {self.rows.shape}: there is nothing to test.")
        d = self.rows.shape[1]
        self.branches, self.tested = checked_branches(branches, d), tested
        given = activations is None or isinstance(activations, ChannelStatistics)
        self.known = known = activations if given else channel_statistics(activations)
        self.n_rows = 0 if known is None else known.n_rows
        self.positive = (known is None or not known.signed) if positive is None else positive
        variance, together, self._leaked = np.ones(d), None, None
        if known is not None:
            if len(known.variance) != d:
                raise InputError(
                    f"Decoder rows have {d} channels, the activations {len(known.variance)}. Are "
                    "they of the same site?"
                )
            if not known.variance.any():
                raise InputError(f"All {known.n_rows} rows of activations are equal.")
            variance = known.variance / known.variance.mean()
            together = covariance_of_squares(known.correlation, positive=self.positive)
            self._leaked = leakage(whitening_pair(known.correlation).color)
        self._variance = np.maximum(variance, FAINTEST**2)
        self._groups = []
        for channels in self.branches.values():
            inside = np.zeros(d, dtype=bool)
            inside[channels] = True
            self._groups.append(channel_groups(variance, inside, together))

    def permuted(self, *, seed: int = 0) -> Specialization:
        """Test rows whose channels were permuted at random: features found specialized are false.

        Each row is divided by the deviations of the channels and freed of their correlations, its
        entries are put in random order, mixed as the channels are correlated, and multiplied by
        the deviations again.
        """
        rows, known = self.rows.astype(np.float64), self.known
        order = np.argsort(np.random.default_rng([seed, 3]).random(rows.shape), axis=1)
        if known is None:
            return self._test(np.take_along_axis(rows, order, axis=1))
        deviation = np.sqrt(known.variance)
        least = FAINTEST * np.sqrt(np.mean(known.variance))
        color, whiten = whitening_pair(known.correlation)
        entries = rows / np.maximum(deviation, least) @ whiten
        return self._test(np.take_along_axis(entries, order, axis=1) @ color * deviation)

    def _movable(self, rows: np.ndarray) -> Int[np.ndarray, " some"]:
        squares = np.square(plain_shares(rows, self.branches, positive=self.positive)[0])
        free = ((squares > 0) & (squares < 1)).all(axis=1)
        return np.flatnonzero(free if self.tested is None else free & self.tested)

    def _move(self, rows: np.ndarray, parts: list[np.ndarray], excess: float) -> None:
        squares = np.square(plain_shares(rows, self.branches, positive=self.positive)[0])
        for k, (part, channels) in enumerate(zip(parts, self.branches.values(), strict=True)):
            aim = self._groups[k].share + excess * (1 - self._groups[k].share)
            inside = rows[part, channels] * np.sqrt(aim / squares[part, k])[:, None]
            rows[part] *= np.sqrt((1 - aim) / (1 - squares[part, k]))[:, None]
            rows[part, channels] = inside

    def _test(self, rows: np.ndarray) -> Specialization:
        energy, p, n_effective = (np.full((len(rows), len(self._groups)), np.nan) for _ in "epn")
        for start in range(0, len(rows), ROWS_AT_ONCE):
            block = rows[start : start + ROWS_AT_ONCE].astype(np.float64)
            _refuse_unless_finite(block, "W_dec", start)
            squares = np.square(np.maximum(block, 0) if self.positive else block)
            whole = squares.sum(axis=1)
            there = np.flatnonzero((whole > 0) & (squares / self._variance).any(axis=1))
            squares = squares[there] / whole[there, None]
            at = start + there
            components = Components.of(squares, self._variance, self._leaked)
            even = components.evened(self._variance)
            evened = Components.of(even, self._variance)
            pairs = zip(self.branches.values(), self._groups, strict=True)
            for k, (channels, groups) in enumerate(pairs):
                inside, inside_evened = (x[:, channels].sum(axis=1) for x in (squares, even))
                energy[at, k] = inside
                p[at, k], n_effective[at, k] = branch_tail(
                    components, inside, evened, inside_evened, groups
                )
        expected = np.sqrt([[groups.share for groups in self._groups]]) * np.ones(energy.shape)
        expected[np.isnan(energy)] = np.nan
        return self._judged(rows, energy, expected, p, n_effective)


def plain_shares(
    atoms: Float[np.ndarray, "feature d"],
    branches: Mapping[str, Channels],
    *,
    positive: bool = True,
) -> tuple[Float[np.ndarray, "feature branch"], Float[np.ndarray, " branch"]]:
    """Shares without a test, 0 for rows without length, and the shares that width predicts.

    Args:
        atoms: Decoder rows.
        branches: Channels of each branch.
        positive: Whether only positive entries count.
    """
    part = np.maximum(atoms, 0) if positive else np.abs(atoms)
    whole = np.maximum(np.linalg.norm(part, axis=1), np.finfo(np.float32).tiny)
    widths = [len(numbers_of(channels, atoms.shape[1])) for channels in branches.values()]
    shares = np.zeros((len(atoms), len(widths)))
    for k, s in enumerate(branches.values()):
        shares[:, k] = np.linalg.norm(part[:, s], axis=1) / whole
    return shares, np.sqrt(np.array(widths, dtype=np.float64) / atoms.shape[1])


def channel_statistics(activations: Any) -> ChannelStatistics:
    """Measure variances and correlations of channels.

    Args:
        activations: Rows (n, d), numpy, torch or lists; or several such arrays one after another,
            read once, so that they need not fit into memory.

    Raises:
        InputError: There are fewer than two rows, or a value is not finite.
    """
    moments, low = None, 0.0
    for block in _blocks(activations):
        moments = moments or Moments(block.shape[1])
        if block.shape[1] != moments.width:
            raise InputError(
                f"Rows of activations have {block.shape[1]} channels, earlier ones {moments.width}."
            )
        _refuse_unless_finite(block, "activations", moments.n)
        low = min(low, float(block.min()))
        moments.add(torch.from_numpy(block))
    n = 0 if moments is None else moments.n
    if moments is None or n < 2:
        raise InputError(f"Variances need two rows of activations or more, got {n}.")
    covariance = moments.covariance * (n / (n - 1))
    variance = np.maximum(np.diag(covariance), 0)
    deviation = np.sqrt(variance)
    varies = deviation > 1e-12 * max(float(deviation.max()), 1e-300)
    scale = np.where(varies, deviation, np.inf)
    correlation = np.clip(covariance / scale[:, None] / scale, -1, 1)
    np.fill_diagonal(correlation, 1.0)
    return ChannelStatistics(n, moments.mean, np.where(varies, variance, 0), correlation, low < 0)


def _blocks(activations: Any) -> Iterator[np.ndarray]:
    nested = isinstance(activations, list | tuple) and activations and np.ndim(activations[0]) < 2
    whole = np.ndarray | Tensor | str | Path | data.Dataset | data.DataLoader
    is_array = nested or isinstance(activations, whole)
    if not is_array and isinstance(activations, Iterable):
        for part in activations:
            yield from _blocks(part)
        return
    rows = as_array(activations, "n d", "activations")
    for start in range(0, len(rows), ROWS_AT_ONCE):
        yield rows[start : start + ROWS_AT_ONCE].astype(np.float64)


def checked_branches(branches: Mapping[str, Any], d: int) -> dict[str, Channels]:
    """Branches as slices or numbers of the channels.

    Raises:
        InputError: There is nothing to compare; or one is empty, does not fit, or overlaps.
    """
    named: dict[str, Channels] = {}
    branch_of = np.full(d, -1)
    for number, (name, given) in enumerate(dict(branches).items()):
        at = _channels(name, given, d)
        taken = branch_of[at]
        if (taken >= 0).any():
            other = list(named)[int(taken.max())]
            raise InputError(f"Branches {other!r} and {name!r} overlap.")
        branch_of[at] = number
        side_by_side = at == list(range(at[0], at[-1] + 1))
        named[str(name)] = slice(at[0], at[-1] + 1) if side_by_side else at
    if not named:
        raise InputError("There are no branches: pass a dict of name -> slice of the channels.")
    if len(named) == 1 and (branch_of >= 0).all():
        raise InputError(
            f"The branch {next(iter(named))!r} is all {d} channels, so there is nothing to compare "
            "it with. Use a dictionary of the whole site."
        )
    return named


def _refuse_unless_finite(block: np.ndarray, name: str, start: int) -> None:
    bad = np.argwhere(~np.isfinite(block))
    if len(bad):
        row, column = bad[0]
        raise InputError(
            f"{name} is not finite at row {start + row}, column {column} "
            f"({block[row, column]}). Remove the row, or find out where it came from."
        )


def _channels(name: str, given: Any, d: int) -> list[int]:
    """Numbers of the channels of a branch, in ascending order."""
    pair = isinstance(given, tuple | list) and len(given) == 2 and not isinstance(given[0], bool)
    at: list[int] = []
    if isinstance(given, slice):
        inside = (given.start or 0) >= 0 and (given.stop or 0) <= d
        at = numbers_of(given, d) if inside else []
    elif pair:
        at = list(range(*map(int, given)))
    else:
        with contextlib.suppress(SiteError):  # whose sentence does not know how many there are
            at = numbers_of(as_channels(given, name, d), d)
    if not at or not 0 <= min(at) <= max(at) < d or len(set(at)) < len(at):
        raise InputError(
            f"Branch {name!r} is {given}; expected some of the channels 0 to {d - 1}, each once: a "
            "slice, (first, one after the last), or an array of numbers or of one bool a channel."
        )
    return sorted(at)
