"""Effect of a match on the network's output: a site written by the other site's dictionary.

    splice          replace a site by what its dictionary decodes from the permuted code of another
    SpliceEffect    the effect on the network's output, for each way of pairing

Encode at A, permute, decode with B, and let the network go on from B's site with the result. The
output is compared with the output of the untouched network on the same samples: KL divergence in
nats and agreement of the most likely answer where the outputs are logits, and for every network the
share of the output's variance that is lost.

Source: Balagansky et al., Mechanistic permutability (2024), encode-permute-decode and delta loss.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from mechatlas.activations.layouts import Layout, layouts_of
from mechatlas.activations.networks import as_input, run_network
from mechatlas.activations.passes import evaluation_mode
from mechatlas.activations.positions import is_causal
from mechatlas.activations.predictions import compare, next_token_losses, output_of
from mechatlas.activations.sites import intervene
from mechatlas.base import Dictionary, InputError, Progress, Site, no_progress
from mechatlas.maths.bootstrap import Estimate, ratio_estimate, resample
from mechatlas.maths.outliers import norm_limit

ROWS_AT_ONCE = 4096
"""Rows encoded and decoded together."""

Writer = Callable[[Tensor, Tensor], Tensor]
"""Function that makes rows of B's site from those of A's site and B's own."""


@dataclasses.dataclass(frozen=True)
class SpliceEffect:
    """Distance of the network's output from the untouched one; means over samples."""

    variance_lost: Estimate
    """Share of the output's variance that is lost: 0 is untouched, 1 is as bad as the mean."""
    kl_divergence: Estimate | None
    """Kullback-Leibler divergence from the untouched answer in nats: the rise of the cross entropy
    where the untouched answer counts as right. `None` if the outputs are not logits."""
    agreement: Estimate | None
    """Share of the outputs whose most likely answer is unchanged. `None` if the outputs are not
    logits."""
    loss_change: Estimate | None = None
    """Rise of the mean loss of the next token in nats, the delta loss of the paper. `None` if the
    network does not predict next tokens."""


def permuted(
    a: Dictionary,
    b: Dictionary,
    columns: Int[np.ndarray, " latent_a"],
    gain: Float[np.ndarray, " latent_a"] | None = None,
) -> Writer:
    """Encode with A, give each latent's activation to its partner, decode with B.

    Args:
        a: Dictionary that encodes.
        b: Dictionary that decodes.
        columns: The pairing, -1 for none; several latents of A on one of B add up.
        gain: Factor from the activation of each latent of A to its partner's; 1 if not given.
    """
    rows = np.flatnonzero(columns >= 0)
    latents, partners = torch.from_numpy(rows), torch.from_numpy(np.asarray(columns)[rows])
    factor = torch.ones(len(rows)) if gain is None else torch.from_numpy(gain[rows]).float()

    def write(x: Tensor, y: Tensor) -> Tensor:
        del y
        code = a.encode(x).float()[:, latents] * factor
        return b.decode(torch.zeros(len(x), b.n_latents).index_add_(1, partners, code))

    return write


def references(a: Dictionary, b: Dictionary) -> dict[str, Writer]:
    """Ways to write B's site that need no match.

    Returns:
        `b_reconstruction` (B on its own rows), `b_mean` (their mean), and where the widths are
        equal `layer_drop` (A's row as it is).
    """
    ways: dict[str, Writer] = {
        "b_reconstruction": lambda _x, y: b.decode(b.encode(y)),
        "b_mean": lambda _x, y: y.mean(dim=0).expand_as(y),
    }
    return {"layer_drop": lambda x, _y: x, **ways} if a.d_in == b.d_in else ways


@torch.no_grad()
def splice(
    network: nn.Module,
    batches: Sequence[Shaped[Tensor, "_ ..."]],
    sites: tuple[Site, Site],
    ways: Mapping[str, Writer],
    *,
    left_out: Sequence[Bool[np.ndarray, "_ _"]] = (),
    padding: Sequence[Bool[np.ndarray, "_ _"]] = (),
    seed: int = 0,
    on_progress: Progress = no_progress,
) -> dict[str, SpliceEffect]:
    """Run a network with the second site replaced, once for each way.

    Args:
        network: Network called with each batch. Its output counts as logits where it is a tensor,
            or has a tensor `logits`; of anything else the first tensor is compared.
        batches: Inputs, several samples each.
        sites: Sites of A and of B; A's must be reached before B's, or be the same.
        ways: Functions that write B's rows, by name.
        left_out: Tokens of each batch that stay as they are, and where given also outlier rows:
            dictionaries are not trained on them. By default every row is replaced.
        padding: Tokens of each batch that are padding, no losses; by default none.
        seed: Seed of the intervals.
        on_progress: Callback with the number of replacements so far, and of all.

    Raises:
        InputError: B's site is reached before A's, or there are no samples.
        SiteError: The network has no such site.
    """
    clean: list[np.ndarray] = []
    logits = predicts = False
    effects: dict[str, list[np.ndarray]] = {way: [] for way in ways}
    with evaluation_mode(network):
        for number, given in enumerate(batches):
            batch = as_input(network, given)
            before, logits = output_of(run_network(network, batch))
            if not clean:
                predicts = logits and _predicts_tokens(network, batch, before, sites[1])
            clean.append(_moments(before))
            pad = torch.from_numpy(padding[number]) if padding else None
            tokens = _NextTokens.of(before, batch, pad) if predicts else None
            same = torch.from_numpy(left_out[number]) if left_out else None
            for done, (way, write) in enumerate(ways.items(), number * len(ways)):
                on_progress(done, len(ways) * len(batches))
                with _replaced(network, batch, sites, write, same):
                    after = output_of(run_network(network, batch)).x
                effects[way].append(_compare(before, after, tokens))
    if not clean:
        raise InputError("There are no samples to run the network on.")
    total = _squares_around_mean(np.concatenate(clean))
    times = resample(len(total), seed=seed)
    return {
        way: _effect(np.concatenate(parts), total, times, logits=logits)
        for way, parts in effects.items()
    }


class _NextTokens(NamedTuple):
    """Tokens of a batch, and the loss of the untouched network at each that counts."""

    tokens: Int[Tensor, "sample token"]
    counts: Bool[Tensor, "sample token_but_first"]
    losses: Float[Tensor, "sample token_but_first"]

    @classmethod
    def of(cls, logits: Tensor, tokens: Tensor, padding: Tensor | None) -> "_NextTokens":
        """Compute the losses; padding is not a token to predict."""
        counts = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
        if padding is not None:
            counts &= ~padding[:, 1:].to(counts.device)
        return cls(tokens, counts, next_token_losses(logits, tokens))


def _predicts_tokens(network: nn.Module, batch: Any, logits: Tensor, site: Site) -> bool:
    """Whether the outputs are predictions of the token after each of the batch."""
    if not isinstance(batch, Tensor) or batch.is_floating_point() or batch.ndim != 2:
        return False
    if logits.shape[:2] != batch.shape or batch.shape[1] < 2:
        return False
    nothing = np.zeros(batch.shape[1], dtype=bool)
    in_vocabulary = int(batch.max()) < logits.shape[-1]
    return in_vocabulary and is_causal(network, batch[:1], nothing, [site])


def _replaced(
    network: nn.Module,
    batch: Any,
    sites: tuple[Site, Site],
    write: Writer,
    left_out: Tensor | None,
) -> AbstractContextManager[nn.Module]:
    """Replace the second site by what is written from the first, but for what is left out."""
    layouts = layouts_of(network, batch, sites)
    seen: list[Tensor] = []

    def remember(x: Tensor) -> Tensor:
        seen[:] = [x.clone()]  # the network may write into what it goes on with
        return x

    def replace(y: Tensor) -> Tensor:
        x = None
        if sites[0] == sites[1]:
            x = layouts[sites[1]].rows(y)
        elif seen:
            x = _aligned(seen[0], y, layouts[sites[0]], layouts[sites[1]])
        if x is None:
            raise InputError(
                f"The network reaches {sites[1]} before {sites[0]}; give dictionaries in its order."
            )
        target = layouts[sites[1]].rows(y)
        rows, own = _rows(x).float(), _rows(target).float()
        parts = zip(rows.split(ROWS_AT_ONCE), own.split(ROWS_AT_ONCE), strict=True)
        new = torch.cat([write(*part) for part in parts])
        if left_out is not None and left_out.numel() == len(own):
            norms = torch.linalg.vector_norm(own, dim=1)
            same = left_out.to(own.device).flatten()
            same = same | (norms > norm_limit(norms[~same]))
            new = torch.where(same[:, None], own, new)
        return layouts[sites[1]].undo(new.to(y.dtype).reshape(target.shape), y)

    edits = {sites[1]: replace}
    return intervene(network, edits if sites[0] == sites[1] else {sites[0]: remember, **edits})


def _rows(x: Tensor) -> Float[Tensor, "row d"]:
    return x.reshape(-1, x.shape[-1])


def _aligned(x: Tensor, y: Tensor, at_x: Layout, at_y: Layout) -> Tensor:
    """A's map at the positions of B's: for each cell of B the cell of A that holds its center."""
    grid_a, grid_b, x = at_x.grid(x), at_y.grid(y), at_x.rows(x)
    if grid_a == grid_b or len(at_x.positions) != 2:
        return x
    rows, columns = (
        ((torch.arange(n) + 0.5) / n * m).long() for n, m in zip(grid_b, grid_a, strict=True)
    )
    return x[:, rows[:, None], columns]


def _moments(x: Float[Tensor, "sample place d"]) -> Float[np.ndarray, "sample d_and_2"]:
    """Number of places, sum of squares, and sum of each coordinate, by sample."""
    size = torch.full((len(x), 1), float(x.shape[1]), dtype=torch.float64)
    squares = x.double().square().sum(dim=(1, 2))[:, None].cpu()
    return torch.cat([size, squares, x.double().sum(dim=1).cpu()], dim=1).numpy()


def _squares_around_mean(
    moments: Float[np.ndarray, "sample d_and_2"],
) -> Float[np.ndarray, " sample"]:
    """Sum of squares around the mean over all samples, by sample."""
    size, squares, sums = moments[:, 0], moments[:, 1], moments[:, 2:]
    mean = sums.sum(axis=0) / size.sum()
    return squares - 2 * sums @ mean + size * (mean @ mean)


def _compare(
    before: Float[Tensor, "sample place d"],
    after: Float[Tensor, "sample place d"],
    tokens: _NextTokens | None,
) -> Float[np.ndarray, "sample 5"]:
    """Sums for each sample: squares of the residual, divergence, equal answers, loss, tokens.

    Divergence and answers are means over the sample.
    """
    residual = (after - before).double().square().sum(dim=(1, 2))
    divergence, same = compare(before, after)
    rise = n = torch.zeros_like(residual)
    if tokens is not None:
        losses = next_token_losses(after, tokens.tokens) - tokens.losses
        rise, n = (losses * tokens.counts).double().sum(1), tokens.counts.double().sum(1)
    means = (divergence.double().mean(1), same.double().mean(1))
    return torch.stack([residual, *means, rise, n], dim=1).cpu().numpy()


def _effect(
    values: Float[np.ndarray, "sample 5"],
    total: Float[np.ndarray, " sample"],
    times: Int[np.ndarray, "resample sample"],
    *,
    logits: bool,
) -> SpliceEffect:
    residual, divergence, same, rise, n_tokens = values.T
    one = np.ones(len(total))
    return SpliceEffect(
        variance_lost=ratio_estimate(residual, total, times),
        kl_divergence=ratio_estimate(divergence, one, times) if logits else None,
        agreement=ratio_estimate(same, one, times) if logits else None,
        loss_change=ratio_estimate(rise, n_tokens, times) if n_tokens.any() else None,
    )
