"""The parts of a training step of a TopK autoencoder in plain torch, for any device.

The same functions as `kernels.py`, with the same results to rounding. They use no product
of sparse matrices, which on some CPUs torch does not have: sums over the codes of a row or
of a latent are bags of embeddings.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


def select(pre: Tensor, bias: Tensor, k: int, values: Tensor, latents: Tensor) -> None:
    """Write the k largest of each row of `pre + bias` (zero if below) and which they are."""
    top = pre.add_(bias).topk(k, dim=-1)
    values.copy_(top.values.relu())
    latents.copy_(top.indices)


def residual(
    target: Tensor,
    atoms: Tensor,
    bias: Tensor,
    codes: tuple[Tensor, Tensor],
    scale: float,
    out: tuple[Tensor, Tensor, Tensor],
) -> float:
    """Write `g = scale * (reconstruction - target)`, each code's gradient and the sum of g.

    Returns:
        The squared error, summed over rows and columns.
    """
    values, latents = codes
    g, d_code, g_sum = out
    error = embedding_bag(latents, atoms, per_sample_weights=values, mode="sum") + bias - target
    loss = float(error.square().sum())
    torch.mul(error, scale, out=g)
    g_sum += g.sum(dim=0)
    for i in range(0, len(g), 64):  # few rows at a time: their atoms are k times as large
        part = slice(i, i + 64)
        d_code[part] = torch.einsum("bkd,bd->bk", atoms[latents[part].long()], g[part])
    return loss


def group(values: Tensor, latents: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    """Group the non-zero codes by latent, rows in order within each.

    Returns:
        Positions in the flattened codes, latent by latent, and where each latent's begin
        (one entry more than there are latents).
    """
    flat = latents.reshape(-1).masked_fill(values.reshape(-1) == 0, n_latents)
    ordered = flat.sort(stable=True)
    bounds = torch.arange(n_latents + 1, device=flat.device, dtype=flat.dtype)
    return ordered.indices, torch.searchsorted(ordered.values, bounds)


def update(
    span: range,
    grouped: tuple[Tensor, Tensor],
    codes: tuple[Tensor, Tensor],
    batch: tuple[Tensor, Tensor],
    state: dict[str, tuple[Tensor, Tensor, Tensor]],
    adam: list[float],
    d_input: Tensor,
    extra: tuple[Tensor, ...],
) -> None:
    """Take one step of Adam on the latents of `span`, and add to the input's gradient.

    The arguments are those of `kernels.update`.
    """
    order, starts = grouped
    starts = starts[span.start : span.stop + 1]
    pairs = order[int(starts[0]) : int(starts[-1])]
    rows, offsets = pairs // codes[0].shape[1], starts[:-1] - starts[0]
    values, d_code = (t.reshape(-1)[pairs] for t in codes)
    x, g = batch

    def summed(table: Tensor, weights: Tensor) -> Tensor:
        return embedding_bag(rows, table, offsets, per_sample_weights=weights, mode="sum")

    gradients = {"W_dec": summed(g, values), "W_enc": summed(x, d_code)}
    gradients["b_enc"] = summed(torch.ones_like(x[:, :1]), d_code)[:, 0]
    part = {name: [t[span.start : span.stop] for t in group] for name, group in state.items()}
    tied = "W_enc" not in state
    d_input += gradients["b_enc"] @ part["W_dec" if tied else "W_enc"][0]
    place, *added = extra
    mine = (place[span.start : span.stop] >= 0).nonzero()[:, 0]
    theirs = place[span.start : span.stop][mine].long()
    for name, more in zip(("W_dec", "W_enc", "b_enc"), added, strict=True):
        gradients[name][mine] += more[theirs]
    if tied:
        gradients["W_dec"] += gradients.pop("W_enc")
    atoms = part["W_dec"][0]
    along = (gradients["W_dec"] * atoms).sum(dim=-1, keepdim=True)
    gradients["W_dec"] -= along * atoms
    for name, gradient in gradients.items():
        parameter, first, second = part[name]
        step_adam(parameter, first, second, gradient, adam)
    atoms /= atoms.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def step_adam(
    parameter: Tensor, first: Tensor, second: Tensor, gradient: Tensor, adam: list[float]
) -> None:
    """One step of Adam, in place; `adam` is as in `kernels.update`."""
    keep1, new1, keep2, new2, rate, correction, epsilon = adam
    first.mul_(keep1).add_(gradient, alpha=new1)
    second.mul_(keep2).addcmul_(gradient, gradient, value=new2)
    parameter.addcdiv_(first, second.sqrt().mul_(correction).add_(epsilon), value=-rate)
