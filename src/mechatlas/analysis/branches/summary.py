"""Branches of features compared with labels, with other layers and with the weights.

    label_enrichment    labels that the features of a branch carry more often than the others
    consistency         agreement of the branches of matched features of two layers with chance
    svd_order           units in the order of the largest difference between their weights
    decoder_picture     decoder rows and channels in that order

Source: Distill, Branch specialization (Voss et al., 2021), for enrichment and the ordering.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechatlas.base import InputError
from mechatlas.maths.arrays import Channels
from mechatlas.maths.statistics import enrichment, proportion, q_values

PICTURE_ROWS = 160
"""Number of rows in the picture of a decoder; each is the mean of neighbors."""
DRAWS = 1999
"""Permutations behind the p-value of an agreement."""


@dataclasses.dataclass(frozen=True)
class LabelEnrichment:
    """Features of one branch that carry one label."""

    branch: str
    """Name of the branch."""
    label: str
    """The label."""
    both: int
    """Features of the branch that carry the label."""
    in_branch: int
    """Features of the branch."""
    with_label: int
    """Features that carry the label."""
    total: int
    """Features that count."""
    p_value: float
    """Probability of at least as many in both if branches and labels were independent."""
    q_value: float
    """Smallest false discovery rate at which the label still counts as enriched."""


def label_enrichment(
    branch_of: Int[np.ndarray, " feature"],
    names: Sequence[str],
    labels: Iterable[Any],
    *,
    tested: Bool[np.ndarray, " feature"] | None = None,
) -> list[LabelEnrichment]:
    """Find labels that the features of a branch carry more often than the others.

    Args:
        branch_of: Branch of each feature, -1 for none.
        names: Names of the branches.
        labels: One label for each feature: numbers or strings; `None`, NaN or "" for no label.
        tested: Features that count; by default all.

    Returns:
        Every label in every branch, surest first. The q-values count all of them as one family.

    Raises:
        InputError: There are not as many labels as features.
    """
    values = list(labels)
    if len(values) != len(branch_of):
        raise InputError(f"There are {len(values)} labels for {len(branch_of)} features.")
    words = np.array(["" if v is None or v != v else str(v) for v in values], dtype=object)
    counted = np.ones(len(words), dtype=bool) if tested is None else tested
    cells = [
        (name, kind, counted & (branch_of == k), counted & (words == kind))
        for k, name in enumerate(names)
        for kind in sorted(set(words[counted]) - {""})
    ]
    both, in_branch, with_label = (
        np.array([count(mine, carries) for _, _, mine, carries in cells], np.int64)
        for count in (lambda a, b: (a & b).sum(), lambda a, b: a.sum(), lambda a, b: b.sum())
    )
    total = int(counted.sum())
    p = enrichment(both, in_branch, with_label, total)
    numbers = [column.tolist() for column in (both, in_branch, with_label)]
    evidence = zip(cells, *numbers, p.tolist(), q_values(p).tolist(), strict=True)
    enriched = [
        LabelEnrichment(name, kind, n_both, n_branch, n_label, total, p_value, q_value)
        for (name, kind, _, _), n_both, n_branch, n_label, p_value, q_value in evidence
    ]
    return sorted(enriched, key=lambda each: each.p_value)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Frequency with which two things are the same, against chance; None without pairs."""

    pairs: int
    """Pairs compared."""
    value: float | None = None
    """Share of the pairs that are the same."""
    low: float | None = None
    """Lower end of the 95 % interval."""
    high: float | None = None
    """Upper end of the 95 % interval."""
    chance: float | None = None
    """Expected share with partners drawn at random among the pairs compared."""
    p_value: float | None = None
    """Share of permutations that agree at least as often (one-sided)."""
    kappa: float | None = None
    """Cohen's kappa: 0 by chance, 1 always the same; None if chance alone says 1."""


@dataclasses.dataclass(frozen=True)
class Consistency:
    """Agreement of the branches of matched features of two layers."""

    same_branch: Agreement
    """Agreement among matched pairs in which both features have a branch."""
    same_branch_of_equal_size: Agreement
    """Agreement among pairs whose two branches have equal kernels, with partners drawn among pairs
    of that size only, which filter size cannot explain. Sizes that only one branch has are left
    out."""


def consistency(
    branch_a: Int[np.ndarray, " feature_a"],
    branch_b: Int[np.ndarray, " feature_b"],
    names_a: Sequence[str],
    names_b: Sequence[str],
    *,
    latent_a: Int[np.ndarray, " pair"],
    latent_b: Int[np.ndarray, " pair"],
    matched: Bool[np.ndarray, " pair"],
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
) -> Consistency:
    """Compare the branches of matched features.

    Args:
        branch_a: Branch of each feature of the first dictionary, -1 for none.
        branch_b: Branch of each feature of the second.
        names_a: Names of the branches; branches of the same name are the same kind.
        names_b: Names of the branches of the second.
        latent_a: Feature of the first dictionary in each pair, as in `matches.parquet`.
        latent_b: Feature of the second.
        matched: Whether the match of the pair is significant.
        sizes: Kernel size of each kind of branch; by default read from its name.
        seed: Seed of the permutations.

    Raises:
        InputError: A pair names a feature that there is not.
    """
    for which, latent, known in (("a", latent_a, branch_a), ("b", latent_b, branch_b)):
        if len(latent) and not 0 <= int(latent.min()) <= int(latent.max()) < len(known):
            raise InputError(
                f"Pairs name features {int(latent.min())} to {int(latent.max())} of dictionary "
                f"{which}, which has {len(known)}. Is the matching of these dictionaries?"
            )
    kinds = sorted({*names_a, *names_b})
    of_a = np.array([*(kinds.index(n) for n in names_a), -1])
    of_b = np.array([*(kinds.index(n) for n in names_b), -1])
    a, b = of_a[branch_a[latent_a]], of_b[branch_b[latent_b]]
    both = matched & (a >= 0) & (b >= 0)
    a, b = a[both], b[both]
    known_sizes = kernel_sizes(kinds) if sizes is None else sizes
    size = np.array([known_sizes.get(kind, 0) for kind in kinds])
    several = np.isin(size, [s for s in set(size.tolist()) if (size == s).sum() > 1])
    fair = (size[a] == size[b]) & several[a]
    return Consistency(
        _agreement(a, b, np.zeros(len(a), dtype=np.int64), seed),
        _agreement(a[fair], b[fair], size[a[fair]], seed),
    )


def kernel_sizes(names: Sequence[str]) -> dict[str, int]:
    """Sides of the kernels in names: 5 of "5x5" and "expand5x5"; 1 where a pool is projected.

    Branches that name no size, such as attention heads, all have size 0.
    """
    sides = {name: re.search(r"(\d+)x\d+", name) for name in names}
    return {name: int(side[1]) if side else int("pool" in name) for name, side in sides.items()}


def _agreement(a: np.ndarray, b: np.ndarray, stratum: np.ndarray, seed: int) -> Agreement:
    n, same = len(a), int((a == b).sum())
    if not n:
        return Agreement(0)
    chance, parts = 0.0, []
    for each in np.unique(stratum):
        mine = np.flatnonzero(stratum == each)
        kinds = np.unique([a[mine], b[mine]])
        chance += sum((a[mine] == k).sum() * (b[mine] == k).mean() for k in kinds)
        parts.append(mine)
    random = np.random.default_rng([seed, 11])
    hits = 0
    for _ in range(DRAWS):
        agree = sum(int((a[mine] == b[random.permutation(mine)]).sum()) for mine in parts)
        hits += agree >= same
    chance = float(chance / n)
    share = proportion(same, n)
    kappa = (share.value - chance) / (1 - chance) if chance < 1 else None
    p_value = (1 + hits) / (1 + DRAWS)
    return Agreement(n, share.value, share.low, share.high, chance, p_value, kappa)


class Order(NamedTuple):
    """Rows and columns of weights, sorted by the largest difference between them."""

    rows: Int[np.ndarray, " row"]
    columns: Int[np.ndarray, " column"]
    row_loading: Float[np.ndarray, " row"]
    """Entry of each row, as it was given, in the singular vector."""
    column_loading: Float[np.ndarray, " column"]
    explained: float
    """Fraction of the squares of |W| that the component explains."""


def svd_order(weights: Float[np.ndarray, "row column"], *, component: int = 1) -> Order:
    """Sort units by a singular vector of the absolute weights.

    Args:
        weights: Weights between two layers, or decoder rows.
        component: Number of the singular vector: 0 is how strong units are overall; 1, the
            default, is the largest way in which they differ apart from that. The sign is such
            that the loadings of columns are mostly positive.

    Raises:
        InputError: There are not so many components, or a value is not finite.
    """
    if not 0 <= component < min(weights.shape):
        raise InputError(
            f"Weights of shape {weights.shape} have no component {component}: expected 0 to "
            f"{min(weights.shape) - 1}."
        )
    if not np.isfinite(weights).all():
        row, column = np.argwhere(~np.isfinite(weights))[0]
        raise InputError(f"weights is not finite at row {row}, column {column}.")
    left, values, right = np.linalg.svd(
        np.abs(np.asarray(weights, np.float64)), full_matrices=False
    )
    sign = 1.0 if right[component].sum() >= 0 else -1.0
    row, column = sign * left[:, component], sign * right[component]
    explained = float(values[component] ** 2 / max(float(np.square(values).sum()), 1e-300))
    return Order(
        np.argsort(row, kind="stable"), np.argsort(column, kind="stable"), row, column, explained
    )


def decoder_picture(
    W_dec: Float[Tensor, "latent d"],  # noqa: N803 - the field's name
    branches: Mapping[str, Channels],
    *,
    signed: bool,
) -> dict[str, Any]:
    """Picture of a decoder: rows and channels sorted by the largest difference among them.

    Args:
        W_dec: Decoder rows.
        branches: Channels of each branch.
        signed: Whether negative entries count, as where activations may be negative.

    Returns:
        Numbers for `picture.json`; nothing if there is no difference to sort by.
    """
    atoms = W_dec.detach().float().cpu().numpy().astype(np.float64)
    part = np.abs(atoms) if signed else np.maximum(atoms, 0)
    length = np.sqrt(np.square(part).sum(axis=1, keepdims=True))
    unit = part[length[:, 0] > 0] / length[length[:, 0] > 0]
    if min(unit.shape) < 2:
        return {}
    order = svd_order(unit)
    sorted_rows = unit[order.rows][:, order.columns]
    blocks = np.array_split(sorted_rows, min(len(sorted_rows), PICTURE_ROWS))
    branch_of = np.full(atoms.shape[1], -1)
    for k, s in enumerate(branches.values()):
        branch_of[s] = k
    return {
        "rows": [np.round(block.mean(axis=0), 4).tolist() for block in blocks],
        "channels": order.columns.tolist(),
        "branch": branch_of[order.columns].tolist(),
        "loading": np.round(order.column_loading[order.columns], 5).tolist(),
        "explained": order.explained,
    }
