"""Normalization of rows, as a linear map times a factor that can be held.

norm_of          call of a module -> its `Normalization`
Normalization    LayerNorm or RMSNorm
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mechatlas.activations.tracing import ModuleCall, same_numbers
from mechatlas.base import SiteError


class Normalization(NamedTuple):
    """Layer normalization, or normalization by the root mean square where it is not centered."""

    scale: Float[Tensor, " d"]
    shift: Float[Tensor, " d"]
    eps: float
    is_centered: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the map."""
        if self.is_centered:
            return functional.layer_norm(x, x.shape[-1:], self.scale, self.shift, self.eps)
        return x * self.size(x)[..., None] * self.scale + self.shift

    def size(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows"]:
        """Factor that a row is multiplied by."""
        square = x.var(dim=-1, correction=0) if self.is_centered else x.square().mean(dim=-1)
        return (square + self.eps).rsqrt()

    def held(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """Linear part of the normalization, with the factor held at 1."""
        return (x - x.mean(dim=-1, keepdim=True) if self.is_centered else x) * self.scale


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalizes, by its class."""
    return isinstance(module, nn.LayerNorm) or "norm" in type(module).__name__.lower()


def norm_of(call: ModuleCall) -> Normalization:
    """Read the weights of a module that normalized rows.

    Raises:
        SiteError: It did something else.
    """
    module, (x, *_) = call.module, call.tensors
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    scale, shift = (
        value.detach() if isinstance(value, Tensor) else torch.full(x.shape[-1:], fill).to(x)
        for value, fill in ((weight, 1.0), (bias, 0.0))
    )
    if isinstance(module, nn.LayerNorm):
        return Normalization(scale, shift, module.eps)
    eps = next((e for n in ("variance_epsilon", "eps", "epsilon")
                if isinstance(e := getattr(module, n, None), float)), 0.0)  # fmt: skip
    for each in (scale, 1 + scale):
        norm = Normalization(each, shift, eps, is_centered=False)
        if same_numbers(norm(x), call.output):
            return norm
    raise SiteError(
        f"Module {call.name!r}, a {type(module).__name__}, does not divide rows by their root mean "
        "square, so it cannot be held fixed."
    )
