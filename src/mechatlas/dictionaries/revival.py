"""Bringing dead latents back: those that no row has used for long, and so get no gradient.

    AuxK, revive          they explain what the reconstruction left over: the k largest of them
                          rebuild the residual, and the share of it that they leave over,
                          times a small weight, moves their own rows and nothing else
    Resample, resample    now and then they start again at rows that are badly explained

Source: Gao et al., Scaling and evaluating sparse autoencoders (2024), section A.2, for AuxK;
Bricken et al., Towards monosemanticity (2023), for resampling.
"""

import dataclasses
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechatlas.dictionaries.autoencoder import SparseCoder

ROWS = 512
ANEW = 4
"""How often a latent that starts again fires at first, in times of the others' mean."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuxK:
    """Dead latents rebuild the residual, k for each sample."""

    k: int = 256
    """Dead latents used by a sample; all of them if there are fewer."""
    weight: float = 1 / 32
    """Of the share of the residual that they leave over, beside that of what all explain: where
    little is left over, the dead learn no more slowly."""
    dead_after_rows: int = 250_000
    """A latent is dead when this many rows in a row have not used it."""

    def __post_init__(self) -> None:
        if self.k < 1 or not self.weight > 0 or self.dead_after_rows < 1:
            raise ValueError(
                f"k ({self.k}), weight ({self.weight}) and dead_after_rows "
                f"({self.dead_after_rows}) must be > 0."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resample:
    """Dead latents start again at rows drawn by the square of their error."""

    every: int = 1000
    """Steps between two times that this is done."""
    until: float = 0.6
    """Share of the steps after which it is no more done, so that all can settle."""
    dead_after_rows: int = 250_000
    """A latent is dead when this many rows in a row have not used it."""

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 < self.until <= 1 or self.dead_after_rows < 1:
            raise ValueError(
                f"every ({self.every}) and dead_after_rows ({self.dead_after_rows}) must be at "
                f"least 1, until ({self.until}) in 0 to 1."
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
    """Gradients of the residual's squared error, for the dead latents.

    The error, summed over columns, is weighed with `weight` over the residual's mean square, as
    the reconstruction's is with one over the variance of the columns, which training scales to 1.

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
    weight = aux.weight / residual.square().mean().clamp_min(1e-12)
    with torch.enable_grad():
        for part, left in zip(x.detach().split(ROWS), residual.detach().split(ROWS), strict=True):
            top = (part @ rows.T + bias).topk(k, dim=-1)
            code = torch.zeros(len(part), len(dead), dtype=x.dtype, device=x.device)
            code = code.scatter(-1, top.indices, top.values.relu())
            error = (left - code @ atoms).square().sum() / len(x)
            (weight * error).backward()
    found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in (atoms, rows, bias)]
    return Revival(dead, *found)


@torch.no_grad()
def resample(
    dictionary: SparseCoder,
    dead: Int[Tensor, " dead"],
    moments: dict[str, tuple[Tensor, Tensor]],
    x: Float[Tensor, "batch width"],
    random: torch.Generator,
) -> None:
    """Start dead latents again, in place, with moments of zero.

    Atoms take the direction of a row, the encoder's rows too, at the mean length of those of
    living latents. Where the k largest are kept the bias is such that the mean row has code zero.
    Elsewhere only the rows that are most like the chosen one have a code, a few times as many as
    another latent's: of a latent that half of all rows use, a penalty makes an end before it is of
    use to those that are badly explained. What the rule learns of a latent starts again too.

    Args:
        dictionary: Changed in place.
        dead: Which latents.
        moments: The optimiser's, by name of the parameter.
        x: Rows that the dictionary is trained on.
        random: Draws the rows.
    """
    read, wanted = x[:, dictionary.reads], x[:, dictionary.writes]
    errors, n_used = [], 0
    for part, y in zip(read.split(ROWS), wanted.split(ROWS), strict=True):
        code = dictionary.encode(part)
        n_used += int((code != 0).sum())
        errors.append((y - dictionary.decode(code)).square().sum(dim=-1))
    chosen = torch.cat(errors).double().square().cpu()
    drawn = torch.multinomial(chosen, len(dead), len(dead) > len(x), generator=random).to(x.device)
    alive = torch.ones(dictionary.n_latents, dtype=torch.bool, device=x.device)
    alive[dead] = False
    lengths = dictionary.W_enc.norm(dim=0)
    length = float(lengths[alive if alive.any() else dead].mean())
    centre = dictionary.b_dec if dictionary.centred else read.mean(dim=0)
    rows = read[drawn] - centre
    rows *= length / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    dictionary.W_dec[dead] = wanted[drawn] - dictionary.b_dec
    if not dictionary.tied:
        dictionary._W_enc[:, dead] = rows.T
    bias = rows.new_zeros(len(dead)) if dictionary.centred else -(rows @ centre)
    if not hasattr(dictionary.sparsity, "k"):
        n_fires = min(len(x) // 2, ANEW * n_used // max(1, int(alive.sum())))
        like = (read - centre) @ rows.T
        bias -= like.topk(n_fires + 1, dim=0).values[-1].clamp_min(0)
    dictionary.b_enc[dead] = bias
    learnt = dictionary.rule.parameters(dictionary.n_latents)
    for name, start in learnt.items():
        dictionary.state[name][dead] = start[dead].to(x)
    dictionary.normalise()
    for name, pair in moments.items():
        for moment in pair:
            if name in ("W_dec", "W_enc", "b_enc", *learnt):
                moment[dead] = 0
            elif name == "_W_enc":
                moment[:, dead] = 0
