"""The parts of a sparse training step in plain torch, for any device.

The same functions as `kernels.py`, with the same results to rounding. They use no product
of sparse matrices, which on some CPUs torch does not have: sums over the codes of a row or
of a latent are bags of embeddings.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

PAIRS = 4096


def select(pre: Tensor, bias: Tensor, k: int, values: Tensor, latents: Tensor) -> None:
    """Write the k largest of each row of `pre + bias` (zero if below) and which they are."""
    top = pre.add_(bias).topk(k, dim=-1)
    values.copy_(top.values.relu())
    latents.copy_(top.indices)


def above(pre: Tensor, bias: Tensor, low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of `pre + bias` above `low`: how many each row has, which, and how large."""
    whole = pre.add_(bias)
    kept = whole > low
    return kept.sum(dim=1), kept.nonzero()[:, 1].int(), whole[kept]


def residual(
    target: Tensor,
    parameters: tuple[Tensor, Tensor],
    codes: tuple[Tensor, Tensor, Tensor],
    scales: Tensor,
    prefixes: Tensor,
    out: tuple[Tensor, Tensor, Tensor],
) -> float:
    """Write the gradient of the reconstructions and of each code.

    The arguments are those of `kernels.residual`.

    Returns:
        The squared errors times their weights, summed over rows and prefixes.
    """
    atoms, bias = parameters
    starts, latents, values = codes
    g, d_code, g_sum = out
    mine = slice(int(starts[0]), int(starts[-1]))
    latents, values = latents[mine], values[mine]
    counts = starts[1:] - starts[:-1]
    rows = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    level = torch.searchsorted(prefixes, latents.long(), right=True)
    error, loss = bias - target, 0.0
    for i in range(len(prefixes)):
        weights = values if len(prefixes) == 1 else values * (level == i)
        offsets = starts[:-1] - starts[0]
        error = error + embedding_bag(
            latents.long(), atoms, offsets, per_sample_weights=weights, mode="sum"
        )
        loss += float((error.square().sum(dim=-1) * scales).sum()) / 2
        g[i] = error * scales[:, None]
    for i in range(len(prefixes) - 2, -1, -1):
        g[i] += g[i + 1]
    g_sum += g[0].sum(dim=0)
    found = d_code[mine]
    for i in range(0, len(found), PAIRS):  # few pairs at a time: each has a whole atom
        part = slice(i, i + PAIRS)
        found[part] += (atoms[latents[part].long()] * g[level[part], rows[part]]).sum(dim=-1)
    return loss


def group(latents: Tensor, values: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    """Group the pairs of a row and a latent with a non-zero value by latent.

    Returns:
        Pairs, latent by latent and in their own order within each, and where each latent's
        begin (one entry more than there are latents).
    """
    ordered = latents.masked_fill(values == 0, n_latents).sort(stable=True)
    bounds = torch.arange(n_latents + 1, device=latents.device, dtype=latents.dtype)
    starts = torch.searchsorted(ordered.values, bounds)
    return ordered.indices[: int(starts[-1])], starts


def update(
    span: range,
    pairs: tuple[Tensor, Tensor, Tensor, Tensor],
    batch: tuple[Tensor, Tensor, Tensor, Tensor],
    state: dict[str, tuple[Tensor, Tensor, Tensor]],
    edges: Tensor,
    adam: list[float],
    clip: float | None,
    d_input: Tensor,
    extra: tuple[Tensor, ...],
) -> float:
    """Take one step of Adam on the latents of `span`, and add to the input's gradient.

    The arguments are those of `kernels.update`.

    Returns:
        Sum of the squared gradients if they were only measured, else 0.
    """
    part = {name: [t[span.start : span.stop] for t in group] for name, group in state.items()}
    gradients = _gradients(span, pairs, batch)
    tied = "W_enc" not in state
    d_input += gradients["b_enc"] @ part["W_dec" if tied else "W_enc"][0]
    place, *added = extra
    mine = (place[span.start : span.stop] >= 0).nonzero()[:, 0]
    theirs = place[span.start : span.stop][mine].long()
    for name, more in zip(("W_dec", "W_enc", "b_enc"), added, strict=True):
        gradients[name][mine] += more[theirs]
    if tied:
        gradients["W_dec"] += gradients.pop("W_enc")
    atoms, bounds = part["W_dec"][0], edges.tolist()
    remove_along(gradients["W_dec"], atoms, bounds)
    if clip is None:
        return float(sum(gradient.double().square().sum() for gradient in gradients.values()))
    for name, gradient in gradients.items():
        parameter, first, second = part[name]
        step_adam(parameter, first, second, gradient * clip if clip < 1 else gradient, adam)
    atoms /= torch.stack(lengths(atoms, bounds)).sum(dim=0).clamp_min(1e-12)
    return 0.0


def _gradients(
    span: range,
    pairs: tuple[Tensor, Tensor, Tensor, Tensor],
    batch: tuple[Tensor, Tensor, Tensor, Tensor],
) -> dict[str, Tensor]:
    """Gradients of the reconstruction's error for the latents of a span."""
    starts = pairs[0][span.start : span.stop + 1]
    rows, values, d_code = (t[int(starts[0]) : int(starts[-1])] for t in pairs[1:])
    x, g, _, prefixes = batch
    rows, offsets = rows.long(), (starts[:-1] - starts[0]).long()

    def summed(table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return embedding_bag(index, table, offsets, per_sample_weights=weights, mode="sum")

    counts = starts[1:] - starts[:-1]
    latents = torch.repeat_interleave(torch.arange(span.start, span.stop, device=x.device), counts)
    level = torch.searchsorted(prefixes, latents, right=True)
    return {
        "W_dec": summed(g.reshape(-1, g.shape[-1]), level * len(x) + rows, values),
        "W_enc": summed(x, rows, d_code),
        "b_enc": summed(torch.ones_like(x[:, :1]), rows, d_code)[:, 0],
    }


def lengths(atoms: Tensor, edges: list[int]) -> list[Tensor]:
    """Length of each atom at each site, as columns."""
    return [atoms[:, low:high].norm(dim=-1, keepdim=True) for low, high in pairwise(edges)]


def remove_along(gradient: Tensor, atoms: Tensor, edges: list[int]) -> None:
    """Take away, in place, the part of gradients that would change the atoms' lengths."""
    parts = lengths(atoms, edges)
    n_sites = (torch.stack(parts) > 0).sum(dim=0).clamp_min(1)
    normal = torch.cat(
        [
            atoms[:, low:high] / length.clamp_min(torch.finfo(atoms.dtype).tiny)
            for (low, high), length in zip(pairwise(edges), parts, strict=True)
        ],
        dim=1,
    )
    along = (gradient * normal).sum(dim=-1, keepdim=True)
    gradient.sub_(along / n_sites * normal)


def step_adam(
    parameter: Tensor, first: Tensor, second: Tensor, gradient: Tensor, adam: list[float]
) -> None:
    """One step of Adam, in place; `adam` is as in `kernels.update`."""
    keep1, new1, keep2, new2, rate, correction, epsilon = adam
    first.mul_(keep1).add_(gradient, alpha=new1)
    second.mul_(keep2).addcmul_(gradient, gradient, value=new2)
    parameter.addcdiv_(first, second.sqrt().mul_(correction).add_(epsilon), value=-rate)
