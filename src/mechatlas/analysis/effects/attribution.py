"""Attribution of an output of a network to latents: gradient times activation.

    attribute        inputs and an output -> attribution of each latent at each position
    _trace           code, error and their gradients
    _agreement       rank correlation with ablations of the latents, one at a time

To first order, the output falls by a latent's activation times its gradient where the latent is
removed. That is checked: latents are ablated with the error term kept, and the change of the
output is ranked against the attribution, beside attributions of other latents.

Source: Marks et al., Sparse feature circuits (2024), for attribution with the error term kept.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor, nn

from mechatlas.activations.networks import call_network, running
from mechatlas.activations.predictions import output_of
from mechatlas.activations.samples import whole_batch
from mechatlas.activations.sites import intervene
from mechatlas.analysis.effects.steering import changed_rows, site_of, site_rows
from mechatlas.base import Dictionary, InputError, Result, Site
from mechatlas.maths.bootstrap import Estimate, estimate

N_ABLATED = 64
"""Latents that are ablated by default."""
RESAMPLES = 1000
"""Resamples of the interval, and permutations of the null."""

Output = Callable[[Tensor], Tensor]
"""Function from the logits (sample, token, vocabulary), or other outputs, to one number."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Attribution(Result):
    """Attribution of one output of a network to the latents of a dictionary."""

    output: float
    """The output that is attributed."""
    activations: Float[np.ndarray, "sample position latent"]
    """Code at each position."""
    values: Float[np.ndarray, "sample position latent"]
    """Activation times gradient: the fall of the output, to first order, without the latent."""
    error: Float[np.ndarray, "sample position"]
    """Attribution to the dictionary's error at each position."""
    ablated: Int[np.ndarray, " ablated"]
    """Latents that were ablated at all positions of all samples."""
    falls: Float[np.ndarray, " ablated"]
    """Fall of the output without each of them."""
    rank_correlation: Estimate | None
    """Spearman's rank correlation of attributions and falls; None where fewer than three latents
    were ablated, or all falls are equal."""
    null: Estimate | None
    """Rank correlation with the attributions permuted: its mean, and the range of 95 % of draws."""
    activation_correlation: float | None
    """Rank correlation of the falls with the activations alone, without gradients."""

    @property
    def latents(self) -> Float[np.ndarray, " latent"]:
        """Attribution to each latent, over all positions."""
        return self.values.sum(axis=(0, 1))

    @property
    def positions(self) -> Float[np.ndarray, "sample position"]:
        """Attribution to each position, over all latents."""
        return self.values.sum(axis=2)

    def top(self, n: int = 10) -> list[tuple[int, float]]:
        """Latents with the largest attributions by size, and these.

        Args:
            n: Number of latents.
        """
        whole = self.latents
        order = np.argsort(-np.abs(whole), kind="stable")[:n]
        return [(int(i), float(whole[i])) for i in order if whole[i] != 0]

    def summary(self) -> str:
        """The strongest latents, and agreement with ablation beside its null."""
        strongest = ", ".join(f"{latent} ({value:+.3g})" for latent, value in self.top(5))
        lines = [
            f"Output {self.output:.4g} attributed to {np.count_nonzero(self.latents):,} latents "
            f"({self.latents.sum():+.4g}) and the error ({self.error.sum():+.4g})",
            f"strongest: {strongest or 'none'}",
        ]
        if self.rank_correlation is not None and self.null is not None:
            r, null = self.rank_correlation, self.null
            lines.append(
                f"rank correlation with {r.n} ablations {r.value:.3f} [{r.low:.3f}, {r.high:.3f}], "
                f"permuted {null.value:.3f} [{null.low:.3f}, {null.high:.3f}]"
            )
        return "\n".join(lines)


def attribute(
    network: nn.Module,
    dictionary: Dictionary,
    inputs: Any,
    output: int | Output,
    *,
    site: Site | str | None = None,
    n_ablated: int = N_ABLATED,
    seed: int = 0,
) -> Attribution:
    """Attribute an output of a network to the latents of a dictionary.

    Args:
        network: Network, left as it is.
        dictionary: Dictionary of the site.
        inputs: Batch of inputs, such as token ids, or samples, as for `open_samples`.
        output: Function from what the network returns (its logits, where it has these) to one
            number; or a token id, whose logit after the last token is meant, summed over samples.
        site: Site of the dictionary; by default the one that its file names.
        n_ablated: Active latents that are ablated as a check, half of them those with the largest
            attributions, the others drawn at random.
        seed: Seed of the draw, the interval and the null.

    Raises:
        InputError: The output is not one number or does not depend on the site, there is no such
            token, or the dictionary is of another site.
        SiteError: The network has no such site.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import mechatlas as ma
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> sae = ma.Autoencoder(d_in=8, n_latents=16, sparsity=ma.TopK(k=4))
        >>> found = ma.attribute(
        ...     network, sae, torch.randn(5, 4), lambda y: y[..., 0].sum(), site="1"
        ... )
        >>> found.values.shape
        (5, 1, 16)
    """
    place = site_of(network, dictionary, site)
    batch = whole_batch(inputs, network)
    traced = _trace(network, dictionary, batch, output, place)
    values, shape = traced.code * traced.code_gradient, traced.shape
    ablated = _chosen(values.sum(dim=0).cpu(), (traced.code != 0).any(dim=0).cpu(), n_ablated, seed)
    falls = [
        traced.output - _without(network, dictionary, batch, output, place, int(latent))
        for latent in ablated
    ]
    sums = [x.sum(dim=0).cpu().double().numpy()[ablated] for x in (values, traced.code)]
    correlations = _agreement(sums[0], sums[1], np.array(falls), seed)
    return Attribution(
        output=traced.output,
        activations=traced.code.reshape(*shape, -1).cpu().numpy(),
        values=values.reshape(*shape, -1).cpu().numpy(),
        error=traced.error.reshape(shape).cpu().numpy(),
        ablated=ablated,
        falls=np.array(falls),
        rank_correlation=correlations[0],
        null=correlations[1],
        activation_correlation=correlations[2],
    )


class _Trace(NamedTuple):
    """An output with its gradient at a site."""

    output: float
    code: Float[Tensor, "row latent"]
    code_gradient: Float[Tensor, "row latent"]
    error: Float[Tensor, " row"]
    """Attribution to the dictionary's error."""
    shape: tuple[int, int]
    """Samples and positions of each."""


def _trace(
    network: nn.Module, dictionary: Dictionary, batch: Any, output: int | Output, place: Site
) -> _Trace:
    """Run the network on the code and the error of a site, and take the output's gradient there."""
    seen: dict[str, Tensor] = {}
    n_samples = 0

    def split(activation: Tensor) -> Tensor:
        nonlocal n_samples
        rows, put_back = site_rows(network, place, activation, dictionary)
        n_samples = len(activation)
        with torch.no_grad():
            x = rows.float()
            code = dictionary.encode(x).float()
            error = x - dictionary.decode(code).float()
        seen["code"], seen["error"] = code.requires_grad_(), error.requires_grad_()
        with torch.enable_grad():
            return put_back((dictionary.decode(code).float() + error).to(activation.dtype))

    with torch.enable_grad(), intervene(network, {place: split}):
        with running(network, batch):
            returned = call_network(network, batch)
        value = _scalar(returned, output)
        if not value.requires_grad:
            raise InputError(f"The output does not depend on site {place}, or not smoothly.")
        leaves = [seen["code"], seen["error"]]
        found = torch.autograd.grad(value, leaves, allow_unused=True)
    gradients = [
        torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)
    ]
    code, error = (leaf.detach() for leaf in leaves)
    return _Trace(
        float(value.detach()),
        code,
        gradients[0],
        (error * gradients[1]).sum(dim=1),
        (n_samples, len(code) // n_samples),
    )


def _scalar(returned: Any, output: int | Output) -> Tensor:
    """The number that is attributed."""
    try:
        logits = returned.logits if hasattr(returned, "logits") else returned
        if not isinstance(logits, Tensor):
            logits = output_of(returned).x
        if not isinstance(output, int):
            value = output(logits)
        elif 0 <= output < logits.shape[-1]:
            value = logits.reshape(len(logits), -1, logits.shape[-1])[:, -1, output].sum()
        else:
            raise InputError(f"There is no output {output}; there are {logits.shape[-1]}.")
    except InputError:
        raise
    except Exception as error:  # a function of the user's own can raise anything
        raise InputError(f"The output cannot be computed: {error}.") from error
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(
            f"An output to attribute must be one number, got {shape}: sum it or pick one entry."
        )
    if not value.isfinite():
        raise InputError(f"The output is {float(value)}; nothing can be attributed.")
    return value.reshape(())


def _chosen(
    values: Float[Tensor, " latent"], active: Tensor, n: int, seed: int
) -> Int[np.ndarray, " ablated"]:
    """Active latents to ablate: the strongest, and as many others at random."""
    candidates = active.nonzero()[:, 0].numpy()
    order = candidates[np.argsort(-values.abs().numpy()[candidates], kind="stable")]
    strongest, others = order[: (n + 1) // 2], order[(n + 1) // 2 :]
    drawn = np.random.default_rng([seed, 30]).permutation(others)[: n - len(strongest)]
    return np.sort(np.concatenate([strongest, drawn]))


@torch.no_grad()
def _without(
    network: nn.Module,
    dictionary: Dictionary,
    batch: Any,
    output: int | Output,
    place: Site,
    latent: int,
) -> float:
    """Output with a latent ablated at every position, the error term kept."""

    def remove(code: Tensor) -> Tensor:
        new = code.clone()
        new[:, latent] = 0
        return new

    def edit(activation: Tensor) -> Tensor:
        rows, put_back = site_rows(network, place, activation, dictionary)
        return put_back(changed_rows(dictionary, rows, remove).to(activation.dtype))

    with intervene(network, {place: edit}):
        return float(_scalar(call_network(network, batch), output))


def _agreement(
    predicted: Float[np.ndarray, " ablated"],
    active: Float[np.ndarray, " ablated"],
    falls: Float[np.ndarray, " ablated"],
    seed: int,
) -> tuple[Estimate | None, Estimate | None, float | None]:
    """Rank correlation with its interval and null, and that of activations alone."""
    n = len(falls)
    if n < 3 or np.ptp(falls) == 0 or np.ptp(predicted) == 0:
        return None, None, None
    random = np.random.default_rng([seed, 31])
    x, y = stats.rankdata(predicted), stats.rankdata(falls)

    def correlation(p: np.ndarray, q: np.ndarray) -> float:
        p, q = p - p.mean(), q - q.mean()
        size = float(np.sqrt((p @ p) * (q @ q)))
        return float(p @ q) / size if size else np.nan

    rows = random.integers(n, size=(RESAMPLES, n))
    drawn = np.array([correlation(stats.rankdata(x[r]), stats.rankdata(y[r])) for r in rows])
    null = np.array([correlation(random.permutation(x), y) for _ in range(RESAMPLES)])
    return (
        estimate(correlation(x, y), drawn, n),
        estimate(float(null.mean()), null, n),
        correlation(stats.rankdata(active), y) if np.ptp(active) else None,
    )
