"""Resampling: dead latents start again at rows that are badly reconstructed.

Source: Bricken et al., Towards monosemanticity (2023).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechatlas.dictionaries.autoencoder import LinearCoder
from mechatlas.dictionaries.revival import ROWS

RESAMPLED_RATE = 4
"""Initial firing rate of a resampled latent, relative to the mean rate of live latents."""


@torch.no_grad()
def resample(
    dictionary: LinearCoder,
    dead: Int[Tensor, " dead"],
    moments: dict[str, tuple[Tensor, Tensor]],
    x: Float[Tensor, "batch width"],
    random: torch.Generator,
) -> None:
    """Start dead latents again, in place, with moments of zero.

    Atoms and encoder rows take the direction of a row that is drawn by the square of its error;
    encoder rows have the mean length of those of live latents. With a rule that keeps k latents
    the bias is such that the mean row has code zero. With another rule only the rows most like the
    chosen one have a code, a few times as many as those of another latent: a latent that half of
    all rows use would be ended by the penalty before it helps rows that are badly reconstructed.
    What the rule learns of a latent starts again too.

    Args:
        dictionary: Changed in place.
        dead: Dead latents.
        moments: Moments of the optimizer, by name of the parameter.
        x: Rows that the dictionary is trained on.
        random: Generator that draws the rows.
    """
    read, target = x[:, dictionary.reads], x[:, dictionary.writes]
    errors, n_used = [], 0
    for part, y in zip(read.split(ROWS), target.split(ROWS), strict=True):
        code = dictionary.encode(part)
        n_used += int((code != 0).sum())
        errors.append((y - dictionary.decode(code)).square().sum(dim=-1))
    chosen = torch.cat(errors).double().square().cpu()
    drawn = torch.multinomial(chosen, len(dead), len(dead) > len(x), generator=random).to(x.device)
    alive = torch.ones(dictionary.n_latents, dtype=torch.bool, device=x.device)
    alive[dead] = False
    lengths = dictionary.W_enc.norm(dim=0)
    length = float(lengths[alive if alive.any() else dead].mean())
    center = dictionary.b_dec if dictionary.subtracts_b_dec else read.mean(dim=0)
    rows = read[drawn] - center
    rows *= length / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    dictionary.W_dec[dead] = (target[drawn] - dictionary.b_dec).to(dictionary.W_dec.dtype)
    if not dictionary.tied:
        dictionary.encoder_parameters[0][:, dead] = rows.T.to(dictionary.W_enc.dtype)
    bias = rows.new_zeros(len(dead)) if dictionary.subtracts_b_dec else -(rows @ center)
    if not hasattr(dictionary.sparsity, "k"):
        n_fires = min(len(x) // 2, RESAMPLED_RATE * n_used // max(1, int(alive.sum())))
        like = (read - center) @ rows.T
        bias -= like.topk(n_fires + 1, dim=0).values[-1].clamp_min(0)
    dictionary.b_enc[dead] = bias
    learned = dictionary.rule.parameters(dictionary.n_latents)
    for name, start in learned.items():
        dictionary.state[name][dead] = start.to(x)[dead]
    dictionary.normalize()
    for name, pair in moments.items():
        for moment in pair:
            if name in ("W_dec", "W_enc", "b_enc", *learned):
                moment[dead] = 0
            elif name == "_W_enc":
                moment[:, dead] = 0
