"""Quality of a dictionary on rows that it was not trained on.

fvu         fraction of variance unexplained
evaluate    fvu, l0 and the latents that fire, streamed over any number of rows
"""

import dataclasses

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechatlas.base import Dictionary, Result


def fvu(
    x: Float[Tensor, "batch d_in"], reconstruction: Float[Tensor, "batch d_in"]
) -> Float[Tensor, ""]:
    """Fraction of variance unexplained.

    0 is perfect; 1 is what predicting the mean would give; above 1 is worse than
    the mean. Has no unit. Summed over `d_in`, so wide channels weigh more.

    Args:
        x: Activations, centered or not.
        reconstruction: Output of the dictionary for the same samples.

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


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Evaluation(Result):
    """Reconstruction error and sparsity of a dictionary on some rows."""

    fvu: float
    """Fraction of variance unexplained."""
    l0: float
    """Mean number of non-zero latents of a sample."""
    fired: Bool[Tensor, " latent"]
    """Latents that were non-zero for at least one sample."""

    def summary(self) -> str:
        """Error, sparsity and number of latents in use."""
        return (
            f"Evaluation: {self.fvu:.2%} of variance unexplained, {self.l0:.1f} latents active\n"
            f"{int(self.fired.sum()):,} of {len(self.fired):,} latents active at least once"
        )


@torch.no_grad()
def evaluate(
    dictionary: Dictionary,
    x: Float[Tensor, "batch d_in"] | Float[np.ndarray, "batch d_in"],
    *,
    target: Float[Tensor, "batch d_out"] | Float[np.ndarray, "batch d_out"] | None = None,
    batch_size: int = 64,
) -> Evaluation:
    """Measure a dictionary without holding more than one batch of codes.

    Args:
        dictionary: Dictionary to measure.
        x: Activations that it reads.
        target: Activations that it should write; by default those that it reads.
        batch_size: Samples encoded at once.

    Raises:
        ValueError: All samples are equal, so FVU is undefined.

    Examples:
        >>> import torch
        >>> import mechatlas as ma
        >>> sae = ma.Autoencoder(d_in=16, n_latents=64, sparsity=ma.TopK(k=4))
        >>> ma.evaluate(sae, torch.randn(100, 16)).l0
        4.0
    """
    x = torch.as_tensor(x)
    target = x if target is None else torch.as_tensor(target)
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
    return Evaluation(left / total, active / len(x), fired)


def _undefined(n_samples: int) -> str:
    return (
        f"FVU is undefined: all {n_samples} samples are equal. Pass more than one "
        "sample, and check that the site is not constant."
    )


@dataclasses.dataclass(eq=False, repr=False)
class History(Result):
    """Measurements of a training run, in the order of its steps."""

    step: list[int] = dataclasses.field(default_factory=list)
    """Number of steps done."""
    fvu: list[float] = dataclasses.field(default_factory=list)
    """Fraction of variance unexplained on held-out rows."""
    l0: list[float] = dataclasses.field(default_factory=list)
    """Mean number of non-zero latents of a held-out row."""
    dead_share: list[float] = dataclasses.field(default_factory=list)
    """Fraction of latents that no row has used for the last 250,000 rows (or since the start)."""
    seconds_per_step: list[float] = dataclasses.field(default_factory=list)
    """Process CPU seconds of a step, mean since the measurement before."""

    def summary(self) -> str:
        """Number of steps, and the last measurements."""
        if not self.step:
            return "History: no measurement yet"
        return (
            f"History: {self.step[-1]:,} steps, {len(self.step)} measurements\n"
            f"Held out: {self.fvu[-1]:.2%} of variance unexplained, "
            f"{self.l0[-1]:.1f} latents active\n"
            f"{self.dead_share[-1]:.1%} of latents dead"
        )
