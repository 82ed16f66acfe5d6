"""How good a dictionary is, on rows that it was not trained on.

fvu         fraction of variance unexplained
evaluate    fvu, l0 and the latents that fire, streamed over any number of rows
"""

import dataclasses
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechatlas.base import Dictionary


def fvu(
    x: Float[Tensor, "batch d_in"], reconstruction: Float[Tensor, "batch d_in"]
) -> Float[Tensor, ""]:
    """Fraction of variance unexplained.

    0 is perfect; 1 is what predicting the mean would give; above 1 is worse than
    the mean. Has no unit. Summed over `d_in`, so wide channels weigh more.

    Args:
        x: Activations, centred or not.
        reconstruction: What the dictionary decoded for the same samples.

    Returns:
        The residual sum of squares over the total sum of squares.

    Raises:
        ValueError: All samples are equal, so there is no variance to explain.

    Source:
        Gao et al., Scaling and evaluating sparse autoencoders (2024).
    """
    total = (x - x.mean(dim=0)).square().sum()
    if not total > 0:
        raise ValueError(_undefined(len(x)))
    return (x - reconstruction).square().sum() / total


class Quality(NamedTuple):
    """What `evaluate` measured."""

    fvu: float
    l0: float
    """Mean number of non-zero latents of a sample."""
    fired: Bool[Tensor, " latent"]
    """Latents that were non-zero for at least one sample."""


@torch.no_grad()
def evaluate(
    dictionary: Dictionary,
    x: Float[Tensor, "batch d_in"],
    *,
    target: Float[Tensor, "batch d_out"] | None = None,
    batch_size: int = 64,
) -> Quality:
    """Measure a dictionary without holding more than one batch of codes.

    Args:
        dictionary: What is measured.
        x: What it reads.
        target: What it should write; by default what it reads.
        batch_size: Samples encoded at once.

    Raises:
        ValueError: All samples are equal, so FVU is undefined.
    """
    target = x if target is None else target
    mean, active, left, total = target.mean(dim=0), 0, 0.0, 0.0
    fired = torch.zeros(dictionary.n_latents, dtype=torch.bool, device=x.device)
    for part, wanted in zip(x.split(batch_size), target.split(batch_size), strict=True):
        code = dictionary.encode(part)
        left += float((wanted - dictionary.decode(code)).square().sum())
        total += float((wanted - mean).square().sum())
        active += int((code != 0).sum())
        fired |= (code != 0).any(dim=0)
    if not total > 0:
        raise ValueError(_undefined(len(x)))
    return Quality(left / total, active / len(x), fired)


def _undefined(n_samples: int) -> str:
    return (
        f"FVU is undefined: all {n_samples} samples are equal. Pass more than one "
        "sample, and check that the site is not constant."
    )


@dataclasses.dataclass
class History:
    """What was measured while training; one entry a measurement."""

    step: list[int] = dataclasses.field(default_factory=list)
    fvu: list[float] = dataclasses.field(default_factory=list)
    """Fraction of variance unexplained on held-out rows."""
    l0: list[float] = dataclasses.field(default_factory=list)
    """Mean number of non-zero latents of a held-out row."""
    dead_share: list[float] = dataclasses.field(default_factory=list)
    """Share of latents that no row has used for the last 250,000 rows (or since the start)."""
    seconds_per_step: list[float] = dataclasses.field(default_factory=list)
    """Process CPU seconds of a step, mean since the measurement before."""
