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
import importlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

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


class TrustError(UserError):
    """Code that a folder names and the user has not named."""


class WeightsError(UserError):
    """Weights that are damaged, or do not fit their network or dictionary."""


class StoreError(UserError):
    """Activation store that is damaged, incomplete, or made by another recipe."""


class DiskError(UserError):
    """File or folder that cannot be read or written."""


class RecipeError(UserError):
    """Recipe with unknown keys or wrong values; the message lists all of them."""


_SITE = re.compile(
    r"(?P<module>[^#:@/]*)(?:#(?P<call>[^:@/]*))?(?::(?P<take>[^@/]*))?(?:@(?P<axes>[^/]*))?"
    r"(?:/(?P<branch>.*))?"
)


@dataclasses.dataclass(frozen=True, order=True)
class Site:
    """Place in a network where activations are read or replaced.

    Written `module#call:input@axes/branch`; every part but the module may be left out.
    """

    module: str
    """Name of the module, as in `named_modules()`."""
    branch: str | None = None
    """Named slice of the channels; `None` for all of them."""
    take: Literal["output", "input"] = "output"
    """Side of the module: its output or its input."""
    call: int | None = None
    """Number of the call in one pass, from 1, of a module that is called several times."""
    axes: str | None = None
    """Meaning of each axis of the tensor, one letter an axis: `b` the batch, `c` a channel, any
    other letter a position. `None` if it is to be found out."""

    def __post_init__(self) -> None:
        if self.take not in ("input", "output"):
            raise SiteError(
                f"Site {self.module!r} asks for {self.take!r}; a module offers ':input' and "
                "':output'."
            )
        if self.call is not None and self.call < 1:
            raise SiteError(f"Calls of {self.module!r} are numbered from 1, got {self.call}.")
        if self.axes is not None:
            _check_axes(self.axes)

    @classmethod
    def parse(cls, text: str) -> "Site":
        """Parse the written form.

        Raises:
            SiteError: The number of the call, the side or the axes are not of the written form.
        """
        parts = _SITE.fullmatch(text)
        if parts is None:
            raise SiteError(
                f"Site {text!r} is not of the form module#call:input@axes/branch, each part but "
                "the module optional."
            )
        call, take = parts["call"], parts["take"]
        if take is not None and take not in ("input", "output"):
            raise SiteError(
                f"Site {text!r} asks for {take!r}; a module offers ':input' and ':output'."
            )
        if call is not None and not call.isdecimal():
            raise SiteError(f"Site {text!r} asks for call {call!r}; calls are numbered from 1.")
        return cls(
            parts["module"],
            parts["branch"] or None,
            "input" if take == "input" else "output",
            None if call is None else int(call),
            parts["axes"],
        )

    def __hash__(self) -> int:
        """Hash by the module alone: sites are looked up at every pass."""
        return hash(self.module)

    def __str__(self) -> str:
        """Write the site in the form that `parse` reads."""
        call = "" if self.call is None else f"#{self.call}"
        take = ":input" if self.take == "input" else ""
        axes = "" if self.axes is None else f"@{self.axes}"
        return f"{self.module}{call}{take}{axes}" + (f"/{self.branch}" if self.branch else "")


def _check_axes(axes: str) -> None:
    others = axes.replace("c", "")
    if not axes.isalpha() or axes.count("b") != 1 or "c" not in axes:
        raise SiteError(
            f"Axes {axes!r} need one letter for each axis: 'b' once for the batch, 'c' for the "
            "channels, any other letter for a position, such as 'bct' or 'bhwc'."
        )
    if len(set(others)) < len(others):
        raise SiteError(f"Axes {axes!r} name a position twice; give each a letter of its own.")


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

    def show(self, *names: str) -> Any:
        """Draw the chapter of the page on this result; a notebook shows it, `save` writes it.

        Args:
            names: Names of the dictionaries, in the order that the analysis was given them.

        Raises:
            InputError: No chapter draws such a result.
        """
        drawing = importlib.import_module(
            "mechatlas.app.report.from_python"
        )  # not before it is used
        return drawing.draw(self, names)


Work = Callable[[Any, Any], Any]
"""Function of a piece and of what all pieces share."""


@runtime_checkable
class Engine(Protocol):
    """Runner of numbered pieces of work, which do not need one another."""

    def map(
        self, work: Work, pieces: Iterable[Any], *, shared: Any = None
    ) -> Iterator[tuple[int, Any]]:
        """Run all pieces, and give number and result of each as it finishes.

        Args:
            work: Function of a piece and of `shared`.
            pieces: Plain values, taken when there is somebody to run them.
            shared: What all pieces need, which is sent to each worker once.

        Raises:
            Exception: Whatever the work raises; pieces that run elsewhere are ended.
            UserError: A piece ended its worker three times, or the workers are gone.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Here:
    """Engine that runs the pieces one after another in this process."""

    def map(
        self, work: Work, pieces: Iterable[Any], *, shared: Any = None
    ) -> Iterator[tuple[int, Any]]:
        """Run all pieces in order; see `Engine`."""
        for number, piece in enumerate(pieces):
            yield number, work(piece, shared)


def in_order(found: Iterable[tuple[int, Any]]) -> Iterator[Any]:
    """Yield the results of `Engine.map` in the order of the pieces, each as soon as it is its turn.

    Args:
        found: Numbers and results, in any order.
    """
    waiting: dict[int, Any] = {}
    next_number = 0
    for number, result in found:
        waiting[number] = result
        while next_number in waiting:
            yield waiting.pop(next_number)
            next_number += 1


Progress = Callable[[int, int], None]
"""Callback with the number of steps done and their total. The command line draws a bar from it."""


def no_progress(done: int, total: int) -> None:
    """Show no progress."""
