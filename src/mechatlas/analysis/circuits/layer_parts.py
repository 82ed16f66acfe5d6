"""Nouns of layers of transformers: what is common to all of them, and their linear parts.

    AttentionLayer        layer whose attention, normalization and slopes can be frozen
    LayerNonlinearities   these, on some samples
    Projection            linear map of rows

To look like maps, sequences are (sample, channel, 1, token).
"""

import abc
import dataclasses
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from mechatlas.activations.components import weight_of
from mechatlas.analysis.circuits.wiring import Route
from mechatlas.base import Site


class Projection(NamedTuple):
    """Linear map of rows, with its bias."""

    weight: Float[Tensor, "n_in n_out"]
    bias: Float[Tensor, " n_out"] | float

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the map."""
        return x @ self.weight + self.bias


class LayerNonlinearities(NamedTuple):
    """Attention patterns, normalization factors and activation slopes of a layer on samples."""

    pattern: Float[Tensor, "sample head query key"]
    """Attention of each position to every other, times the normalization factors of the key and
    of what attention gives the query, where the layer has these."""
    after: Float[Tensor, "sample token"]
    """Factor of all later normalization at a position, past the MLP."""
    inner: Float[Tensor, "sample token hidden"]
    """Factor of all later normalization through the MLP, times the slope of each hidden unit; for
    a gated MLP first the slopes of the gates, then those of what is gated."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class AttentionLayer(abc.ABC):
    """Layer of a transformer: attention, then an MLP, each added to its input."""

    source: Site
    target: Site
    writes: slice
    reads: slice
    source_channels: int
    n_heads: int
    n_hidden: int
    """Number of slopes at a position."""

    @property
    def routes(self) -> tuple[Route, ...]:
        """Past attention or through one of its heads, and then past the MLP or through it."""
        heads = ("", *(f"head{k}" for k in range(self.n_heads)))
        return tuple(
            Route(" > ".join(filter(None, (name, mlp))) or "direct", (), (), slice(0, self.width))
            for mlp in ("", "mlp")
            for name in heads
        )

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.source_channels

    @abc.abstractmethod
    def run(self, x: Float[Tensor, "sample channel 1 token"]) -> Float[Tensor, "sample c 1 token"]:
        """Activations of the target for activations `x` of the source."""

    @abc.abstractmethod
    def nonlinearities(self, x: Float[Tensor, "sample channel 1 token"]) -> LayerNonlinearities:
        """Nonlinear factors of the layer where the source gives `x`."""

    @abc.abstractmethod
    def carried(self, rows: Float[Tensor, "n d"], head: int | None) -> Float[Tensor, "n d"]:
        """Rows as a head writes them, per unit of attention; unchanged past attention."""

    @abc.abstractmethod
    def finished(
        self, rows: Float[Tensor, "n d"], inner: Float[Tensor, "#n hidden"] | None
    ) -> Float[Tensor, "n d"]:
        """Rows as they reach the target, past the MLP or through it; normalization is held at 1."""


def as_rows(x: Float[Tensor, "sample channel 1 token"]) -> Float[Tensor, "sample token channel"]:
    """Undo `as_maps` for sequences."""
    return x[:, :, 0].transpose(1, 2)


def as_maps(activations: Float[Tensor, "sample ..."]) -> Float[Tensor, "sample channel y x"]:
    """Activations of a site's module as maps, sequences too."""
    return activations.transpose(1, 2)[:, :, None] if activations.ndim == 3 else activations


def projection_of(module: nn.Module) -> Projection:
    """Linear map of a module that `weight_of` knows."""
    weight, bias = weight_of(module), getattr(module, "bias", None)
    assert weight is not None
    return Projection(weight, bias.detach() if isinstance(bias, Tensor) else 0.0)
