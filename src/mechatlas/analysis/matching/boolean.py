"""Features as boolean combinations of two features of the layer before.

    boolean_features    codes on paired rows -> best combination of each latent, tested held out

A combination is chosen on half of the samples: for the nearest latents of the layer before, the
second one and the operation (or, and, and not) with the fewest wrong rows. On the other half it is
a claim only if it is wrong less often than each of its two latents alone and than never firing, and
overlaps better than each of the two. Rows of one sample are alike, so samples are counted, not
rows: those that it makes better against those that it makes worse.

Source: Balcells et al., Evolution of SAE features across layers in LLMs (2024), who look for the
combinations; choice on one half and test on the other are ours.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import binom

from mechatlas.analysis.matching.held_out import PairedCodes
from mechatlas.analysis.matching.pairing import FDR
from mechatlas.base import InputError, Result
from mechatlas.maths.statistics import q_values

OPERATIONS = ("or", "and", "and not")
"""Ways to combine two latents, as `operation` numbers them."""
N_STARTS = 4
"""Nearest latents, by Jaccard index, that are tried as the first of a combination."""
BLOCK = 256
"""Latents of the later layer that are searched at once."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BooleanFeatures(Result):
    """Best combination of two latents for each latent of the later layer, and its evidence."""

    first: Int[np.ndarray, " latent_b"]
    """First latent of the combination; -1 where the latent or all others never fire."""
    second: Int[np.ndarray, " latent_b"]
    """Second latent of the combination."""
    operation: Int[np.ndarray, " latent_b"]
    """Number of the operation in `OPERATIONS`."""
    error: Float[np.ndarray, " latent_b"]
    """Share of the held-out rows on which the latent or its combination fires where only one
    does; 1 where there is no such row."""
    single_error: Float[np.ndarray, " latent_b"]
    """Held-out error of the better one of the two latents alone."""
    p_value: Float[np.ndarray, " latent_b"]
    """Sign test over held-out samples that the combination is no better than each latent alone,
    or than never firing; the largest of the three. 1 where the combination has no smaller error."""
    q_values: Float[np.ndarray, " latent_b"]
    """Smallest false discovery rate at which the combination is still a claim."""
    significant: Bool[np.ndarray, " latent_b"]
    """Combinations that are a claim."""
    fdr: float
    """False discovery rate asked for."""

    def summary(self) -> str:
        """Numbers of claims by operation, and their held-out error."""
        if not self.significant.any():
            return f"BooleanFeatures: no combination of two is a claim ({self.fdr:.0%} false)."
        counts = np.bincount(self.operation[self.significant], minlength=len(OPERATIONS))
        named = ", ".join(f"{n} {name!r}" for n, name in zip(counts, OPERATIONS, strict=True))
        before, after = (
            np.median(each[self.significant]) for each in (self.single_error, self.error)
        )
        return (
            f"BooleanFeatures: {int(self.significant.sum()):,} of {len(self.first):,} latents are "
            f"better described by two latents than by one ({self.fdr:.0%} false): {named}.\n"
            f"Median held-out error {after:.1%}, of the better latent alone {before:.1%}."
        )


def boolean_features(
    codes: PairedCodes,
    samples: Int[np.ndarray, " row"] | None = None,
    *,
    fdr: float = FDR,
    seed: int = 0,
) -> BooleanFeatures:
    """Describe each latent of a layer by two latents of the layer before.

    Args:
        codes: Codes of the earlier and the later dictionary on rows that belong together.
        samples: Sample that each row is of; by default each is a sample of its own.
        fdr: False discovery rate of the claims.
        seed: Seed of the halves.

    Raises:
        InputError: There are fewer than two samples, or not one for each row.

    Source:
        Balcells et al. (2024).
    """
    n_rows = codes.a.shape[0]
    samples = np.arange(n_rows) if samples is None else np.unique(samples, return_inverse=True)[1]
    n_samples = int(samples.max(initial=-1)) + 1
    if len(samples) != n_rows or n_samples < 2:
        raise InputError(
            f"{n_rows} rows take as many numbers of samples, of two samples or more; got "
            f"{len(samples)} of {n_samples}."
        )
    chosen = np.random.default_rng([seed, 29]).permutation(n_samples) < n_samples // 2
    a, b = (each.tocsr() > 0 for each in (codes.a, codes.b))
    found = _search(a[chosen[samples]].tocsc(), b[chosen[samples]].tocsc())
    held = ~chosen[samples]
    a, b, samples = a[held].tocsc(), b[held].tocsc(), samples[held]
    n = b.shape[1]
    error, single, p_value = np.ones(n), np.ones(n), np.ones(n)
    for latent in np.flatnonzero(found.first >= 0).tolist():
        first, second, operation = (int(each[latent]) for each in found)
        parts = a, first, second, operation
        error[latent], single[latent], p_value[latent] = _test(_rows(b, latent), *parts, samples)
    q = q_values(p_value)
    return BooleanFeatures(*found, error, single, p_value, q, q <= fdr, fdr)


class _Combinations(NamedTuple):
    first: Int[np.ndarray, " latent_b"]
    second: Int[np.ndarray, " latent_b"]
    operation: Int[np.ndarray, " latent_b"]


def _search(a: Any, b: Any) -> _Combinations:
    """Find the combination with the fewest wrong rows for each latent of b."""
    counts = [np.asarray(each.sum(axis=0)).ravel().astype(float) for each in (a, b)]
    found = _Combinations(*np.full((3, b.shape[1]), -1))
    number = a.T.astype(np.float32)
    for start in range(0, b.shape[1], BLOCK):
        block = slice(start, min(start + BLOCK, b.shape[1]))
        of_b, n_b = b[:, block], counts[1][block]
        both = (number @ of_b.astype(np.float32)).toarray().astype(float)
        either = counts[0][:, None] + n_b - both
        near = np.argsort(-both / np.maximum(either, 1), axis=0, kind="stable")
        fewest = np.full(len(n_b), np.inf)
        for first in near[:N_STARTS]:
            _improve(found, block, fewest, first, number, (a, of_b), counts[0], both, n_b)
        for each in found:
            each[block][n_b == 0] = -1
    return found


def _improve(
    found: _Combinations,
    block: slice,
    fewest: Float[np.ndarray, " n"],
    first: Int[np.ndarray, " n"],
    number: Any,
    firing: tuple[Any, Any],
    n_a: Float[np.ndarray, " latent_a"],
    both: Float[np.ndarray, "latent_a n"],
    n_b: Float[np.ndarray, " n"],
) -> None:
    """Find the best second latent and operation for given first ones."""
    of_first, of_b = firing[0][:, first], firing[1]
    inside = of_first.multiply(of_b).tocsc()
    with_first = (number @ of_first.astype(np.float32)).toarray().astype(float)
    with_inside = (number @ inside.astype(np.float32)).toarray().astype(float)
    n_first, n_inside = n_a[first], both[first, np.arange(len(first))]
    alone = n_first + n_b - 2 * n_inside  # wrong rows of the first latent
    new = n_a[:, None] - with_first  # rows that the second adds by `or`
    added = 2 * (both - with_inside) - new
    taken = with_first - 2 * with_inside  # fewer wrong rows if the second forbids
    ways = added, (n_first - 2 * n_inside) - taken, taken
    for operation, fewer in enumerate(ways):
        fewer[first, np.arange(len(first))] = -np.inf
        second = fewer.argmax(axis=0)
        wrong = alone - fewer[second, np.arange(len(first))]
        better = np.flatnonzero((wrong < fewest) & (n_first > 0) & (n_a[second] > 0))
        fewest[better] = wrong[better]
        for each, value in zip(found, (first, second, operation), strict=True):
            each[block][better] = value if np.isscalar(value) else np.asarray(value)[better]


def _rows(x: Any, latent: int) -> Int[np.ndarray, " active"]:
    return x.indices[x.indptr[latent] : x.indptr[latent + 1]]


def _test(
    target: Int[np.ndarray, " active"],
    a: Any,
    first: int,
    second: int,
    operation: int,
    samples: Int[np.ndarray, " row"],
) -> tuple[float, float, float]:
    """Error of a combination and of the better latent alone, and p-value, on held-out rows."""
    one, two = _rows(a, first), _rows(a, second)
    combine = (np.union1d, np.intersect1d, np.setdiff1d)[operation]
    errors, wrong = [], []
    for rows in (combine(one, two), one, two, np.empty(0, one.dtype)):
        wrong.append(np.setxor1d(rows, target))
        errors.append(len(wrong[-1]) / max(len(np.union1d(rows, target)), 1) if len(target) else 1)
    n = int(samples.max(initial=-1)) + 1
    ours, *others = (np.bincount(samples[each], minlength=n) for each in wrong)
    p_values = []
    for other in others:
        better, worse = int((ours < other).sum()), int((ours > other).sum())
        p_values.append(float(binom.sf(better - 1, better + worse, 0.5)))
    single = min(errors[1:3])
    # A combination that hardly fires has fewer wrong rows than latents that are of no use.
    return errors[0], single, max(p_values) if errors[0] < single else 1.0
