"""Nouns and errors that every layer shares.

A type lives in the lowest module that makes it. It moves here only when two
modules that may not import each other both need it. Nothing here does work.

Axis names used in every shape of the package:

    batch    samples (images, prompts, group pairs), or rows of activations
    d_in     width of the activations at one site
    latent   units of one dictionary
    site     sites that a crosscoder reads together
    element  elements of a finite group
"""

import dataclasses
import html
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor


class UserError(ValueError):
    """Mistake that the user can correct; the command line prints it and exits with 2."""


class SiteError(UserError):
    """Missing module or branch of a network, or activations that cannot be read."""


class InputError(UserError):
    """Image, text or array that cannot be read, or is not what the network expects."""


class NonFiniteError(UserError):
    """NaN or infinity; the message says where."""


class WeightsError(UserError):
    """Weights that are damaged, or do not fit their network or dictionary."""


class StoreError(UserError):
    """Activation store that is damaged, incomplete, or made by another recipe."""


class DiskError(UserError):
    """File or folder that cannot be read or written."""


class RecipeError(UserError):
    """Recipe with unknown keys or wrong values; the message lists all of them."""


@dataclasses.dataclass(frozen=True, order=True)
class Site:
    """Place in a network where activations are read or replaced.

    Written `module`, `module/branch`, `module:input` or `module:input/branch`.
    """

    module: str
    """Name of the module, as in `named_modules()`."""
    branch: str | None = None
    """Named slice of the channels; `None` for all of them."""
    take: Literal["output", "input"] = "output"
    """Side of the module: its output or its input."""

    @classmethod
    def parse(cls, text: str) -> "Site":
        """Parse the written form.

        Raises:
            SiteError: What follows the colon is neither `input` nor `output`.
        """
        path, _, branch = text.partition("/")
        module, colon, take = path.partition(":")
        if colon and take not in ("input", "output"):
            raise SiteError(
                f"Site {text!r} asks for {take!r}; a module offers ':input' and ':output'."
            )
        return cls(module, branch or None, "input" if take == "input" else "output")

    def __str__(self) -> str:
        """Write the site in the form that `parse` reads."""
        take = ":input" if self.take == "input" else ""
        return f"{self.module}{take}" + (f"/{self.branch}" if self.branch else "")


class Batch(NamedTuple):
    """Batch of activations, with the number of each row in its source."""

    x: Float[Tensor, "batch d_in"]
    row: Int[Tensor, " batch"]


@runtime_checkable
class Rows(Protocol):
    """Source of rows of activations to train on, in memory or on disk."""

    d_in: int
    n_rows: int

    def batches(self, batch_size: int, *, seed: int = 0, start: int = 0) -> Iterator[Batch]:
        """Yield endless shuffled batches, one epoch after another, from batch number `start`.

        Args:
            batch_size: Rows in every batch.
            seed: Seed of the order.
            start: Number of the first batch.
        """
        ...

    def held_out(self, n_rows: int) -> Batch:
        """Give up to `n_rows` rows that `batches` never yields."""
        ...

    def describe(self, row: int) -> str:
        """Describe the origin of a row for an error message."""
        ...


@runtime_checkable
class Dictionary(Protocol):
    """Interface of every dictionary. Inherit from nothing; just fit.

    `tests/conformance.py` holds the checks that a new kind must pass.
    """

    d_in: int
    n_latents: int

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch latent"]:
        """Encode each sample as a sparse code; unused latents are exactly zero."""
        ...

    def decode(self, code: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch d_in"]:
        """Reconstruct samples, in the units of the input of `encode`."""
        ...


class Result:
    """Result of an analysis, which prints as a few lines with its evidence.

    A subclass is a dataclass with `eq=False, repr=False` and gives `summary`.
    """

    def summary(self) -> str:
        """Describe the finding with its evidence, in at most six lines of plain text.

        Raises:
            NotImplementedError: A subclass does not say what it found.
        """
        raise NotImplementedError(f"{type(self).__name__} gives no summary")

    def __repr__(self) -> str:
        """Give the summary, not the arrays."""
        return self.summary()

    def _repr_html_(self) -> str:
        """Give the summary for a notebook, its first line in bold."""
        first, *others = (html.escape(line) for line in self.summary().splitlines())
        return "<br>".join([f"<strong>{first}</strong>", *others])


Progress = Callable[[int, int], None]
"""Callback with the number of steps done and their total. The command line draws a bar from it."""


def no_progress(done: int, total: int) -> None:
    """Show no progress."""
