"""Gradients that bring dead latents back.

Latents that no row has used for long get no gradient from the reconstruction. Here they
explain what it left over: the k largest of them rebuild the residual, and the error of that,
times a small weight, moves their own rows and nothing else.

Source: Gao et al., Scaling and evaluating sparse autoencoders (2024), section A.2.
"""

import dataclasses
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

ROWS = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuxK:
    """Dead latents rebuild the residual, k for each sample."""

    k: int = 256
    """Dead latents used by a sample; all of them if there are fewer."""
    weight: float = 1 / 32
    """Of the residual's squared error, beside the reconstruction's."""
    dead_after_rows: int = 250_000
    """A latent is dead when this many rows in a row have not used it."""

    def __post_init__(self) -> None:
        if self.k < 1 or not self.weight > 0 or self.dead_after_rows < 1:
            raise ValueError(
                f"k ({self.k}), weight ({self.weight}) and dead_after_rows "
                f"({self.dead_after_rows}) must be > 0."
            )


class Revival(NamedTuple):
    """Gradients of some latents."""

    latents: Int[Tensor, " dead"]
    atoms: Float[Tensor, "dead d_in"]
    rows: Float[Tensor, "dead d_in"]
    """Of the encoder, latents first."""
    bias: Float[Tensor, " dead"]


def revive(
    aux: AuxK,
    dead: Int[Tensor, " dead"],
    parameters: tuple[
        Float[Tensor, "latent d_in"], Float[Tensor, "latent d_in"], Float[Tensor, " latent"]
    ],
    x: Float[Tensor, "batch d_in"],
    residual: Float[Tensor, "batch d_in"],
) -> Revival:
    """Gradients of `weight * mean squared error` of the residual, for the dead latents.

    Args:
        aux: How many latents, with which weight.
        dead: Which latents are dead.
        parameters: Decoder rows, encoder rows and encoder bias of all latents.
        x: What the encoder read.
        residual: What the reconstruction left over of each row; a constant here.

    Returns:
        The gradients, summed over a batch's tiles of rows.
    """
    atoms, rows, bias = (p.detach()[dead].requires_grad_() for p in parameters)
    k = min(aux.k, len(dead))
    with torch.enable_grad():
        for part, left in zip(x.detach().split(ROWS), residual.detach().split(ROWS), strict=True):
            top = (part @ rows.T + bias).topk(k, dim=-1)
            code = torch.zeros(len(part), len(dead), dtype=x.dtype, device=x.device)
            code = code.scatter(-1, top.indices, top.values.relu())
            error = (left - code @ atoms).square().sum() / len(x)
            (aux.weight * error).backward()
    found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in (atoms, rows, bias)]
    return Revival(dead, *found)
