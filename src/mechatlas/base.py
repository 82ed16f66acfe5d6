"""The nouns every layer shares, and the errors they raise.

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
    """A mistake that the user can mend; the command line prints it and exits with 2."""


class SiteError(UserError):
    """A network has no such module or branch, or its activations cannot be read."""


class InputError(UserError):
    """An image, text or array cannot be read, or is not what the network expects."""


class NonFiniteError(UserError):
    """A NaN or an infinity, and where it was found."""


class WeightsError(UserError):
    """A file of weights is damaged, or does not fit its network or dictionary."""


class StoreError(UserError):
    """An activation store is damaged, incomplete, or made by another recipe."""


class DiskError(UserError):
    """A file or folder cannot be read or written."""


class RecipeError(UserError):
    """A recipe has unknown keys or wrong values; the message lists all of them."""


@dataclasses.dataclass(frozen=True, order=True)
class Site:
    """A place in a network where activations are read or replaced.

    Written `module`, `module/branch`, `module:input` or `module:input/branch`.
    """

    module: str
    """Name of the module, as in `named_modules()`."""
    branch: str | None = None
    """A named slice of the channels; `None` for all of them."""
    take: Literal["output", "input"] = "output"
    """Whether what the module returns or what it is given."""

    @classmethod
    def parse(cls, text: str) -> "Site":
        """Read the written form.

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
        """The written form."""
        take = ":input" if self.take == "input" else ""
        return f"{self.module}{take}" + (f"/{self.branch}" if self.branch else "")


class Batch(NamedTuple):
    """Rows of activations, and which rows of their source they are."""

    x: Float[Tensor, "batch d_in"]
    row: Int[Tensor, " batch"]


@runtime_checkable
class Rows(Protocol):
    """Activations to train on, wherever they live."""

    d_in: int
    n_rows: int

    def batches(self, batch_size: int, *, seed: int = 0, start: int = 0) -> Iterator[Batch]:
        """Endless shuffled batches, one epoch after another, from batch number `start`."""
        ...

    def held_out(self, n_rows: int) -> Batch:
        """Up to `n_rows` rows that `batches` never yields."""
        ...

    def describe(self, row: int) -> str:
        """Where a row came from, in words for an error message."""
        ...


@runtime_checkable
class Dictionary(Protocol):
    """Interface of every dictionary. Inherit from nothing; just fit.

    `tests/conformance.py` holds the checks that a new kind must pass.
    """

    d_in: int
    n_latents: int

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch latent"]:
        """Sparse code of each sample; unused latents are exactly zero."""
        ...

    def decode(self, code: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch d_in"]:
        """Reconstruction, in the units of the input of `encode`."""
        ...


class Result:
    """Result of an analysis, which prints as a few lines with its evidence.

    A subclass is a dataclass with `eq=False, repr=False` and gives `summary`.
    """

    def summary(self) -> str:
        """Finding with its evidence, in at most six lines of plain text.

        Raises:
            NotImplementedError: A subclass does not say what it found.
        """
        raise NotImplementedError(f"{type(self).__name__} gives no summary")

    def __repr__(self) -> str:
        """The summary; arrays do not pour out."""
        return self.summary()

    def _repr_html_(self) -> str:
        """The summary for a notebook, its first line in bold."""
        first, *others = (html.escape(line) for line in self.summary().splitlines())
        return "<br>".join([f"<strong>{first}</strong>", *others])


Progress = Callable[[int, int], None]
"""Callback with the number of steps done and their total. The command line draws a bar from it."""


def no_progress(done: int, total: int) -> None:
    """Show nothing."""
