"""Crosscoder artifacts on the blocks of `mechatlas symmetry`: result, columns, and words.

check_blocks    symmetries and slopes of single codes -> symmetries that may be claimed
in_words        counts for the terminal
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from mechatlas.analysis.symmetry.block_artifacts import (
    BLOCK_CLASSES,
    ScalingEstimates,
    find_artifacts,
    withhold_claims,
    zero_blocks,
)
from mechatlas.analysis.symmetry.classify import Symmetry

NO_DECODER_BLOCKS = "The dictionary has no decoder block for each pose that training could shrink."


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArtifactsResult:
    """Zero blocks of the decoder, and how many of them are crosscoder artifacts."""

    missing: str = ""
    """Reason why blocks were not tested; empty if they were."""
    features: int = 0
    """Features with a zero block: one of at most a fifth of the norm of their largest."""
    tested: int = 0
    """Number of these that were tested; at most 512."""
    blocks: int = 0
    """Number of zero blocks."""
    shrunk: int = 0
    """Zero blocks that the code would write (complete shrinkage)."""
    decoupled: int = 0
    """Zero blocks that other latents write (latent decoupling)."""
    absent: int = 0
    """Zero blocks in whose pose less than half of the largest block follows the code, if any."""
    affected: int = 0
    """Features with a block that is shrunk or decoupled."""
    withheld: int = 0
    """Features of which less is claimed for this reason: their grade has changed."""


class CheckedBlocks(NamedTuple):
    """Symmetries that may be claimed, with the evidence on blocks."""

    symmetries: Symmetry
    result: ArtifactsResult
    columns: dict[str, Any]
    tensors: dict[str, np.ndarray]


def check_blocks(symmetries: Symmetry, scaling: ScalingEstimates | None) -> CheckedBlocks:
    """Find artifacts among zero blocks, and withhold the claims that rest on them."""
    if scaling is None:
        return CheckedBlocks(symmetries, ArtifactsResult(missing=NO_DECODER_BLOCKS), {}, {})
    artifacts = find_artifacts(scaling, fdr=symmetries.fdr)
    claimed = withhold_claims(symmetries, artifacts)
    zero = zero_blocks(scaling.norms)
    result = ArtifactsResult(
        features=int(zero.any(axis=1).sum()),
        tested=artifacts.tested,
        blocks=int(zero.sum()),
        shrunk=int(artifacts.of_class("shrunk").sum()),
        decoupled=int(artifacts.of_class("decoupled").sum()),
        absent=int(artifacts.of_class("absent").sum()),
        affected=int(artifacts.affected.sum()),
        withheld=sum(a != b for a, b in zip(symmetries.grades, claimed.grades, strict=True)),
    )
    columns = {
        "block_classes": [[BLOCK_CLASSES[c] for c in row] for row in artifacts.classes],
        "block_carriers": artifacts.carriers.tolist(),
    }
    tensors = {
        f"{name}{suffix}": values.astype(np.float32)
        for name in ("nu_error", "nu_reconstruction")
        for suffix, values in zip(("", "_low", "_high"), getattr(artifacts, name), strict=True)
    }
    return CheckedBlocks(claimed, result, columns, tensors)


def in_words(result: ArtifactsResult) -> str:
    """Describe the zero blocks in a sentence or two; empty where there are none."""
    if result.missing or not result.blocks:
        return ""
    unknown = result.blocks - result.shrunk - result.decoupled - result.absent
    return (
        f"{result.features} features have {result.blocks} zero blocks: {result.absent} absent, "
        f"{result.shrunk} shrunk although the code drives them, {result.decoupled} written by "
        f"other latents, {unknown} not shown. Less is claimed of {result.withheld} features for "
        "this reason."
    )
