"""Classify features by what leaves them unchanged, with the evidence for each.

Main path, in reading order:

    symmetry   decoder blocks -> stabilisers, families and poses
    Symmetry   the answer with its evidence
    shuffled   the same blocks with the pairing of elements broken
    control    how many features of shuffled blocks pass: about none

A feature has one decoder block D_g for each element g of a group that acts on the input. Seen in
another pose it has blocks D'_g = D_gh, so h leaves it unchanged just if D_gh = D_g for all g; all
such h are its stabiliser, always a subgroup.

Source: Gorton, Group crosscoders for mechanistic analysis of symmetry (2024).
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from mechatlas.analysis.symmetry.evidence import ALIKE, SUPPORT, from_channels, from_halves
from mechatlas.analysis.symmetry.families import Families, families
from mechatlas.analysis.symmetry.names import NOT_RELIABLE, class_names
from mechatlas.analysis.symmetry.stabilisers import choose
from mechatlas.base import InputError, NonFiniteError, Progress, no_progress
from mechatlas.maths.groups import Group

RATE = 0.05


@dataclasses.dataclass(frozen=True, eq=False)
class Symmetry:
    """What leaves each feature unchanged, and which features are one another's poses."""

    group: Group
    stabilisers: tuple[frozenset[int], ...]
    """{h : D_gh = D_g for all g} for each feature, as far as the data support it: `{e}` unless
    the q-value is at most `rate`."""
    p_values: Float[np.ndarray, " feature"]
    q_values: Float[np.ndarray, " feature"]
    """Smallest false discovery rate at which the stabiliser is larger than {e}."""
    reliable: Bool[np.ndarray, " feature"]
    """The feature can be reproduced, and the data leave no larger stabiliser open."""
    classes: Int[np.ndarray, " feature"]
    """Number of the conjugacy class of the stabiliser, as in `group.lattice().classes`."""
    class_names: tuple[str, ...]
    """What the classes are called."""
    families: Int[np.ndarray, " feature"]
    """Number of the family; family 0 is the largest. Features without relatives are alone."""
    poses: Int[np.ndarray, " feature"]
    """h with D_g = reference_gh; of its coset of the reference's stabiliser the smallest label."""
    references: Int[np.ndarray, " feature"]
    """The feature that the poses of its family are told from."""
    likeness_to_reference: Float[np.ndarray, " feature"]
    """Cosine with the reference in that pose, corrected for noise where there are halves."""
    stabiliser_function: Float[np.ndarray, "feature element"]
    """s(h): how alike the feature is to itself shifted by h, corrected for noise where there are
    halves, so that it may exceed 1."""
    errors: Float[np.ndarray, "feature element"]
    """Standard error of it."""
    spectrum: Float[np.ndarray, "feature irrep"]
    """Share of the feature that belongs to each of `group.irreps()`; sums to 1, or to 0 for a
    feature that cannot be reproduced."""
    noise_ceiling: Float[np.ndarray, " feature"]
    """Cosine between the two halves; NaN without halves."""
    reliability: Float[np.ndarray, " feature"]
    """The same for an estimate from all data (Spearman and Brown); NaN without halves."""
    chance: float
    """Likeness to a pose of another feature that chance gives."""
    inflation: float
    """What variances were multiplied with because entries err together; 1 if they do not."""
    rate: float
    """False discovery rate asked for."""
    alike: float
    """How alike blocks must be to count as equal."""
    missing: str
    """What evidence there is none of; empty with halves."""

    @property
    def names(self) -> list[str]:
        """What a person would call the class of each feature, or that it is not reliable."""
        return [
            self.class_names[c] if reliable else NOT_RELIABLE
            for c, reliable in zip(self.classes, self.reliable, strict=True)
        ]

    @property
    def n_discoveries(self) -> int:
        """Features whose stabiliser is larger than {e}."""
        return int((self.q_values <= self.rate).sum())


def symmetry(
    blocks: Any,
    group: Group,
    halves: Any = None,
    *,
    rate: float = RATE,
    alike: float = ALIKE,
    seed: int = 0,
    turns: bool = True,
    on_progress: Progress = no_progress,
) -> Symmetry:
    """Which elements leave each feature unchanged, and which features are one another's poses.

    Args:
        blocks: Decoder blocks D_g `(n_features, order, d)`, numpy or torch, in the group's order.
        group: The group.
        halves: Two estimates of the blocks with independent noise, of the same shape, from
            different samples. Without them noise cannot be told from asymmetry: see `missing`.
        rate: False discovery rate of the claim that a stabiliser is larger than {e}.
        alike: How alike D_gh and D_g must be (cosine, corrected for noise) to count as equal.
            Nothing in a real network is exactly equal.
        seed: Seed of the null for families.
        turns: Whether C_n and D_n act by turns and mirrors, so that classes can be called so;
            with hues or shifts they are called by the type of their group.
        on_progress: Told how many tiles of pairs of features have been looked at.

    Raises:
        InputError: The shapes do not fit the group or one another.
        NonFiniteError: A block has NaN or infinite values.
        SubgroupLimitError: The group has too many subgroups to compare them all.
    """
    if not 0 < rate < 1:
        raise InputError(f"The false discovery rate must lie between 0 and 1, got {rate}.")
    if not SUPPORT < alike <= 1:
        raise InputError(f"alike must be above {SUPPORT:.4f} and at most 1, got {alike}.")
    whole = _as_blocks(blocks, group, "blocks")
    if halves is None:
        evidence = from_channels(whole, group, alike)
    else:
        first, second = _as_halves(halves, group, whole.shape)
        evidence = from_halves(first, second, group, alike)
    chosen = choose(evidence, group, rate)
    subgroups = group.subgroups()
    stabilisers = tuple(subgroups[i] for i in chosen.subgroup)
    reliability = _spearman_brown(evidence.ceiling)
    share = np.where(np.isnan(reliability), 1.0, np.maximum(reliability, 0))
    found: Families = families(
        whole, np.where(evidence.p_signal <= rate, share, 0), evidence.noise, stabilisers, group,
        rate=rate, alike=alike, seed=seed, on_progress=on_progress,
    )  # fmt: skip
    class_of = np.array([group.lattice().class_of(each) for each in subgroups])
    return Symmetry(
        group=group,
        stabilisers=stabilisers,
        p_values=chosen.p_values,
        q_values=chosen.q_values,
        reliable=chosen.settled,
        classes=class_of[chosen.subgroup],
        class_names=class_names(group, turns=turns),
        families=found.label,
        poses=found.pose,
        references=found.reference,
        likeness_to_reference=found.likeness,
        stabiliser_function=evidence.likeness,
        errors=evidence.errors,
        spectrum=_spectrum(evidence.products, group),
        noise_ceiling=evidence.ceiling,
        reliability=reliability,
        chance=found.chance,
        inflation=evidence.inflation,
        rate=rate,
        alike=alike,
        missing="" if halves is not None else WITHOUT_HALVES,
    )


WITHOUT_HALVES = (
    "No halves were given, so noise cannot be told from asymmetry: the noise ceiling of a feature "
    "is taken to be its likeness under the shift that it is most alike under, and p-values say "
    "whether other channels would agree, not whether other data would."
)


def shuffled(
    blocks: Float[np.ndarray, "feature order d"], group: Group, *, seed: int = 0
) -> Float[np.ndarray, "feature order d"]:
    """Blocks whose pairing is broken: for each element but e, those of features in random order.

    The same seed shuffles two halves alike. No feature of these has a symmetry but by chance.
    """
    random = np.random.default_rng([seed, 0x706169])
    out = blocks.copy()
    for g in range(group.order):
        order = random.permutation(len(blocks))
        if g != group.identity:
            out[:, g] = blocks[order, g]
    return out


def control(
    halves: Any, group: Group, *, rate: float = RATE, alike: float = ALIKE, seed: int = 0
) -> int:
    """How many features have a stabiliser larger than {e} if the pairing is broken.

    Raises:
        InputError: The shapes do not fit the group or one another.
        NonFiniteError: A block has NaN or infinite values.
    """
    a, b = _as_halves(halves, group, np.shape(halves[0]))
    a, b = (shuffled(half, group, seed=seed) for half in (a, b))
    evidence = from_halves(a, b, group, alike)
    return int((choose(evidence, group, rate).q_values <= rate).sum())


def _spearman_brown(ceiling: Float[np.ndarray, " feature"]) -> Float[np.ndarray, " feature"]:
    return np.clip(2 * ceiling / np.maximum(1 + ceiling, 1e-9), -1, 1)


def _spectrum(
    products: Float[np.ndarray, "feature element"], group: Group
) -> Float[np.ndarray, "feature irrep"]:
    """The energy in an irrep is the product of c with its character, times d / (c order)."""
    weights = np.stack([r.character * r.multiplicity for r in group.irreps()], axis=1)
    shares = np.maximum(products @ weights / group.order, 0)
    total = shares.sum(axis=1, keepdims=True)
    return np.where(total > 0, shares / np.where(total > 0, total, 1), 0.0)


def _as_halves(
    halves: Any, group: Group, shape: tuple[int, ...]
) -> tuple[Float[np.ndarray, "feature order d"], Float[np.ndarray, "feature order d"]]:
    if len(halves) != 2:
        raise InputError(f"halves must be two estimates of the blocks, got {len(halves)}.")
    first, second = (
        _as_blocks(half, group, f"half {name}") for half, name in zip(halves, "AB", strict=True)
    )
    for half in (first, second):
        if half.shape != shape:
            raise InputError(
                f"Each half must have the shape of the blocks, {shape}, got {half.shape}."
            )
    return first, second


def _as_blocks(blocks: Any, group: Group, name: str) -> Float[np.ndarray, "feature order d"]:
    """Floats of the right shape.

    Raises:
        InputError: The shape does not fit the group.
        NonFiniteError: A value is NaN or infinite.
    """
    if isinstance(blocks, torch.Tensor):
        blocks = blocks.detach().cpu().float().numpy()
    array = np.asarray(blocks)
    if array.ndim != 3 or array.shape[1] != group.order or 0 in array.shape:
        raise InputError(
            f"{name} must have shape (n_features, {group.order}, d), one block for each element of "
            f"{group.name}; got {array.shape}."
        )
    if array.dtype != np.float64:
        array = array.astype(np.float32, copy=False)
    finite = np.isfinite(array).all(axis=2)
    if not finite.all():
        feature, g = np.argwhere(~finite)[0]
        raise NonFiniteError(
            f"{name} has NaN or infinite values, first in the block of feature {feature} for "
            f"element {g} ({group.element_names[g]})."
        )
    return array
