"""Revival of dead latents, which no row has used for long, so that they get no gradient.

    AuxK, revive    the k largest dead latents of a row reconstruct its residual; the error of that
                    moves their own weights and nothing else
    Resample        dead latents start again, now and then, at rows that are badly reconstructed

Source: Gao et al., Scaling and evaluating sparse autoencoders (2024), section A.2, for AuxK;
Bricken et al., Towards monosemanticity (2023), for resampling.
"""

import dataclasses
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechatlas.deprecated import renamed_fields
from mechatlas.ranges import COUNT, POSITIVE, check_ranges

ROWS = 512
"""Rows whose codes of dead latents exist at once."""


@renamed_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class AuxK:
    """Auxiliary loss by which dead latents learn to reconstruct the residual, k for each row."""

    k: int = 256
    """Dead latents used by a row; all of them if there are fewer."""
    auxk_alpha: float = 1 / 32
    """Coefficient of the auxiliary loss. The loss is the squared error of the residual divided by
    its variance, so it does not shrink as the fit improves."""
    dead_after_rows: int = 250_000
    """Rows without use after which a latent is dead."""

    def __post_init__(self) -> None:
        check_ranges(self, k=COUNT, auxk_alpha=POSITIVE, dead_after_rows=COUNT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resample:
    """Dead latents start again at rows drawn by the square of their error."""

    every: int = 1000
    """Steps between two resamplings."""
    until: float = 0.6
    """Fraction of training after which no latent is resampled, so that all can settle."""
    dead_after_rows: int = 250_000
    """Rows without use after which a latent is dead."""

    def __post_init__(self) -> None:
        check_ranges(self, every=COUNT, until="(0, 1]", dead_after_rows=COUNT)


class Revival(NamedTuple):
    """Gradients of dead latents."""

    latents: Int[Tensor, " dead"]
    atoms: Float[Tensor, "dead d_out"]
    rows: Float[Tensor, "dead d_in"]
    """Gradients of encoder rows."""
    bias: Float[Tensor, " dead"]


def revive(
    aux: AuxK,
    dead: Int[Tensor, " dead"],
    parameters: tuple[
        Float[Tensor, "latent d_out"], Float[Tensor, "latent d_in"], Float[Tensor, " latent"]
    ],
    x: Float[Tensor, "batch d_in"],
    residual: Float[Tensor, "batch d_out"],
) -> Revival:
    """Gradients of the residual's squared error, for the dead latents.

    The error, summed over columns, is weighted with `auxk_alpha` over the residual's mean square,
    that of the reconstruction with one over the variance of the columns, which is 1 in training.

    Args:
        aux: Number of latents for each row, and the coefficient.
        dead: Dead latents.
        parameters: Decoder rows, encoder rows and encoder bias of all latents.
        x: Rows that the encoder read.
        residual: Rows less their reconstruction, as constants.

    Returns:
        Gradients of the loss.
    """
    atoms, rows, bias = (p.detach()[dead].to(x.dtype).requires_grad_() for p in parameters)
    k = min(aux.k, len(dead))
    weight = aux.auxk_alpha / residual.square().mean().clamp_min(1e-12)
    with torch.enable_grad():
        for part, left in zip(x.detach().split(ROWS), residual.detach().split(ROWS), strict=True):
            top = (part @ rows.T + bias).topk(k, dim=-1)
            code = torch.zeros(len(part), len(dead), dtype=x.dtype, device=x.device)
            code = code.scatter(-1, top.indices, top.values.relu())
            error = (left - code @ atoms).square().sum() / len(x)
            (weight * error).backward()
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in (atoms, rows, bias)]
    return Revival(dead, *gradients)
