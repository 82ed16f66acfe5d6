"""Quality of a dictionary on rows that it was not trained on.

fvu         fraction of variance unexplained
evaluate    fvu, l0 and the latents that fire, streamed over any number of rows
"""

import dataclasses
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mechatlas.base import Dictionary, InputError, Result
from mechatlas.dictionaries.rows import check_width
from mechatlas.maths.arrays import as_tensor
from mechatlas.maths.outliers import norm_limit


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
    """Fraction of variance unexplained, without outlier rows."""
    l0: float
    """Mean number of non-zero latents of a sample."""
    fired: Bool[Tensor, " latent"]
    """Latents that were non-zero for at least one sample."""
    fvu_median: float
    """Median over rows of the fraction unexplained of the row's distance from the mean, squared."""
    fvu_with_outliers: float
    """Fraction of variance unexplained of all rows."""
    n_outliers: int
    """Rows that are longer than ten median rows, which only `fvu_with_outliers` counts."""

    def summary(self) -> str:
        """Error, sparsity and number of latents in use."""
        lines = [
            f"Evaluation: {self.fvu:.2%} of variance unexplained (median row "
            f"{self.fvu_median:.2%}), {self.l0:.1f} latents active",
            f"{int(self.fired.sum()):,} of {len(self.fired):,} latents active at least once",
        ]
        if self.n_outliers:
            lines.append(
                f"{self.n_outliers:,} outlier rows are left out; with them "
                f"{self.fvu_with_outliers:.2%} of variance unexplained"
            )
        return "\n".join(lines)


@torch.no_grad()
def evaluate(
    dictionary: Dictionary,
    x: Any,
    *,
    target: Any = None,
    outlier: Bool[Tensor, " batch"] | None = None,
    batch_size: int = 64,
) -> Evaluation:
    """Measure a dictionary without holding more than one batch of codes.

    Args:
        dictionary: Dictionary to measure.
        x: Activations that it reads, (samples, d_in): an array, tensor, list of rows or data set.
        target: Activations that it should write; by default those that it reads.
        outlier: Rows that are not counted; by default those longer than ten median rows.
        batch_size: Samples encoded at once.

    Raises:
        InputError: The samples or targets are no matrix of numbers, or of another width.
        ValueError: All samples are equal, so FVU is undefined.

    Examples:
        >>> import torch
        >>> import mechatlas as ma
        >>> sae = ma.Autoencoder(d_in=16, n_latents=64, sparsity=ma.TopK(k=4))
        >>> ma.evaluate(sae, torch.randn(100, 16)).l0
        4.0
    """
    x, target = _samples_for(dictionary, x, target)
    norms = torch.linalg.vector_norm(x.float(), dim=1)
    counted = ~(norms > norm_limit(norms) if outlier is None else outlier)
    some = not bool(counted.all())
    means = [target[counted].mean(dim=0), target.mean(dim=0)] if some else [target.mean(dim=0)]
    active, fired = 0, torch.zeros(dictionary.n_latents, dtype=torch.bool, device=x.device)
    parts: list[Tensor] = []
    pieces = (a.split(batch_size) for a in (x, target, counted))
    for part, wanted, inside in zip(*pieces, strict=True):
        code = dictionary.encode(part)
        off = [wanted - dictionary.decode(code), *(wanted - mean for mean in means)]
        parts.append(torch.stack([each.square().sum(dim=1).double() for each in off]))
        on = code != 0
        if some:
            on = on[inside]
        active += int(on.sum())
        fired |= on.any(dim=0)
    residual, *totals = torch.cat(parts, dim=1)
    left, total = residual[counted], totals[0][counted]
    if not total.sum() > 0:
        raise ValueError(_undefined(len(x)))
    return Evaluation(
        fvu=float(left.sum() / total.sum()),
        l0=active / int(counted.sum()),
        fired=fired,
        fvu_median=float((left / total)[total > 0].median()),
        fvu_with_outliers=float(residual.sum() / totals[-1].sum()),
        n_outliers=int((~counted).sum()),
    )


def _samples_for(dictionary: Dictionary, x: Any, target: Any) -> tuple[Tensor, Tensor]:
    """Activations that a dictionary reads and should write, in its number format and place."""
    tensors = list(dictionary.state_dict().values()) if isinstance(dictionary, nn.Module) else []
    read = as_tensor(x, "samples d_in", "x")
    written = read if target is None else as_tensor(target, "samples d_out", "target")
    like = next((t for t in tensors if t.is_floating_point()), torch.empty(0, device=read.device))
    check_width(read, dictionary.d_in)
    own = dictionary.d_in if target is None else written.shape[1]
    width = getattr(dictionary, "d_out", own)
    if written.shape != (len(read), width):
        raise InputError(
            f"The dictionary writes activations of shape {(len(read), width)}, got "
            f"{tuple(written.shape)}. Of a transcoder, give what it should write as target=."
        )
    return read.to(like), written.to(like)


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
    """Fraction of variance unexplained on held-out rows, without outlier rows."""
    l0: list[float] = dataclasses.field(default_factory=list)
    """Mean number of non-zero latents of a held-out row."""
    dead_share: list[float] = dataclasses.field(default_factory=list)
    """Fraction of latents that no row has used for the last 250,000 rows (or since the start)."""
    seconds_per_step: list[float] = dataclasses.field(default_factory=list)
    """Process CPU seconds of a step, mean since the measurement before."""
    fvu_median: list[float] = dataclasses.field(default_factory=list)
    """Median over held-out rows of the fraction unexplained of the row's squared distance from
    the mean."""
    fvu_with_outliers: list[float] = dataclasses.field(default_factory=list)
    """Fraction of variance unexplained on all held-out rows."""

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
