"""Interfaces between training, dictionaries, sparsity rules and the engine.

Step         how one batch changes a dictionary; every kind gives its own
CodeSearch   how a sparsity rule with a fast path finds the codes of a batch
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechatlas.dictionaries.engine.structures import Codes
from mechatlas.dictionaries.revival import AuxK

Rows = Float[Tensor, "batch width"]
"""Rows of activations, with all columns that a dictionary reads or writes."""
Dead = tuple[AuxK, Int[Tensor, " dead"]]
"""Dead latents, and how they are brought back."""

TileCodes = tuple[Tensor, Tensor, Tensor]
"""Number of codes of each row, latents of all codes, and their pre-activations."""
Find = Callable[[Tensor], TileCodes | None]
"""Search of some rows; None if it finds more codes than there is room for."""


class TooCloseError(Exception):
    """Screening is of no use: too many pre-activations may be codes."""


class StepResult(NamedTuple):
    """Measurements of a step on its batch, before it changed the dictionary."""

    loss: Tensor | float
    """Squared error and penalty, mean over the batch; a tensor where a device computes it, so that
    nobody has to wait for it."""
    fired: Bool[Tensor, " latent"]
    """Latents that were non-zero for at least one row."""


@runtime_checkable
class Step(Protocol):
    """Optimizer of a dictionary, which changes it by one batch at a time."""

    n_steps: int
    """Steps taken, as the correction of the moments counts them."""
    moments: dict[str, tuple[Tensor, Tensor]]
    """First and second moment of each parameter; with `n_steps` all that a step remembers."""

    def __call__(
        self, x: Rows, lr: float, dead: Dead | None = None, *, sparsity_coefficient: float = 1.0
    ) -> StepResult:
        """Change the dictionary in place.

        Args:
            x: Rows of activations.
            lr: Learning rate.
            dead: Latents that also learn from the residual.
            sparsity_coefficient: Fraction of the sparsity penalty that counts.
        """
        ...


@runtime_checkable
class CodeSearch(Protocol):
    """Search for the codes of one batch that never holds all pre-activations."""

    def largest_of_rows(self, k: int) -> Codes:
        """Find the k largest codes of each row, zero where the pre-activation is below."""
        ...

    def largest_of_batch(self, k: int) -> Codes:
        """Find the codes above zero that are largest in the batch, k a row on average."""
        ...

    def above(self, low: Float[Tensor, " latent"] | float) -> Codes | None:
        """Find the pre-activations above a bound of their latent; None if they are not sparse."""
        ...
