"""Objective and schedule of training.

Objective   loss of a step, and the limit of its gradient
Schedule    learning rate and sparsity warm-up over a run
"""

import dataclasses
import math

import torch
from jaxtyping import Float
from torch import Tensor

from mechatlas.deprecated import renamed_fields
from mechatlas.ranges import COUNT_OR_NONE, POSITIVE, SHARE, check_ranges

SHORT_ROW = 1e-3
"""Smallest squared length that normalization divides by, as a fraction of the batch's mean."""


@renamed_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """Squared error that a step minimizes, and the limit of its gradient."""

    normalize_mse: bool = False
    """Divide each row's squared error by its squared length (Bozoukov, 2025); rows with less than
    a thousandth of the mean squared length count as having that."""
    clip: float | None = None
    """Largest norm of the gradient of all parameters together; by default it is not limited."""

    def __post_init__(self) -> None:
        check_ranges(self, clip=POSITIVE)

    def weights(self, target: Float[Tensor, "batch d_out"]) -> Float[Tensor, " batch"]:
        """Weight of each row's squared error."""
        if not self.normalize_mse:
            return target.new_ones(len(target))
        squares = target.square().sum(dim=-1)
        return 1 / squares.clamp_min(SHORT_ROW * squares.mean())

    def factor_of(self, squares: Tensor) -> Tensor:
        """Factor of the gradient where the squares are, so that nobody waits for a device."""
        factor = ((self.clip or math.inf) / squares.sqrt()).clamp_max(1.0)
        return torch.where(squares.isfinite(), factor, torch.nan)

    def factor(self, squares: float) -> float:
        """Factor of the gradient that keeps its norm within the limit."""
        if self.clip is None:
            return 1.0
        return float(self.factor_of(torch.tensor(squares, dtype=torch.float64)))


@renamed_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate that rises linearly, stays and falls linearly to almost zero."""

    warm_up: int = 0
    """Steps until the learning rate is at its largest."""
    decay: float = 0.2
    """Fraction of training, at its end, over which the learning rate falls."""
    sparsity_warm_up: float = 0.1
    """Fraction of training over which the sparsity penalty ramps up linearly to its full
    coefficient."""

    def __post_init__(self) -> None:
        check_ranges(self, warm_up=COUNT_OR_NONE, decay=SHARE, sparsity_warm_up=SHARE)

    def __call__(self, step: int, steps: int) -> float:
        """Fraction of the largest learning rate at a step, counted from 0."""
        up = (step + 1) / (self.warm_up + 1)
        down = (steps - step) / (self.decay * steps) if self.decay else 1.0
        return min(1.0, up, down)

    def sparsity_coefficient(self, step: int, steps: int) -> float:
        """Fraction of the sparsity penalty that counts at a step, counted from 0."""
        warm_up = self.sparsity_warm_up * steps
        return min(1.0, (step + 1) / warm_up) if warm_up else 1.0
