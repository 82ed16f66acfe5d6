"""What training minimizes, and how fast.

Objective   loss of a step, and the limit of its gradient
Schedule    learning rate and sparsity warm-up over a run
"""

import dataclasses
import math

from jaxtyping import Float
from torch import Tensor

SHORT = 1e-3
"""Fraction of the mean squared length that a shorter row counts as having."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What a step minimises."""

    relative: bool = False
    """Divide each row's squared error by its squared length (Bozoukov, 2025); rows with less than
    a thousandth of the mean squared length count as having that."""
    clip: float | None = None
    """Largest norm of the gradient of all parameters together; by default it is not limited."""

    def __post_init__(self) -> None:
        if self.clip is not None and not (self.clip > 0 and math.isfinite(self.clip)):
            raise ValueError(f"clip must be > 0, got {self.clip}.")

    def weights(self, target: Float[Tensor, "batch d_out"]) -> Float[Tensor, " batch"]:
        """Weight of each row's squared error."""
        if not self.relative:
            return target.new_ones(len(target))
        squares = target.square().sum(dim=-1)
        return 1 / squares.clamp_min(SHORT * float(squares.mean()))

    def factor(self, squares: float) -> float:
        """What the gradient is multiplied with, if its entries squared sum to `squares`."""
        if self.clip is None or squares <= self.clip**2:
            return 1.0
        return self.clip / math.sqrt(squares) if math.isfinite(squares) else math.nan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the learning rate changes: up in a line, level, down in a line to almost zero."""

    warm_up: int = 0
    """Steps until the rate is at its largest."""
    decay: float = 0.2
    """Share of the steps, the last ones, in which it falls."""
    pressure: float = 0.1
    """Share of the steps, the first ones, in which a penalty on the code grows to its weight."""

    def __post_init__(self) -> None:
        if self.warm_up < 0 or not 0 <= self.decay <= 1 or not 0 <= self.pressure <= 1:
            raise ValueError(
                f"warm_up ({self.warm_up}) must be at least 0, decay ({self.decay}) and pressure "
                f"({self.pressure}) in 0 to 1."
            )

    def __call__(self, step: int, steps: int) -> float:
        """Share of the largest rate at a step, counted from 0."""
        up = (step + 1) / (self.warm_up + 1)
        down = (steps - step) / (self.decay * steps) if self.decay else 1.0
        return min(1.0, up, down)

    def penalty(self, step: int, steps: int) -> float:
        """Share of a penalty's weight at a step, counted from 0."""
        return min(1.0, (step + 1) / (self.pressure * steps)) if self.pressure else 1.0
