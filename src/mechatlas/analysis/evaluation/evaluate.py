"""Evaluate a dictionary: its error on rows, and what it is worth to its network.

Main path, in reading order:

    evaluate             rows -> `Evaluation`; a network and samples -> `NetworkEvaluation`
    _site_statistics     limit of outlier rows, and the mean of the others
    _measure_batch       one batch: rows, codes, and the network with the site written anew
    _summarize           sums of all samples -> figures with their intervals

Positions that are left out and outlier rows stay as they are in every way of writing the site, so
that all ways differ at the same positions.

Source: Bricken et al., Towards monosemanticity (2023), for loss recovered.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechatlas.activations.layouts import Layout, layouts_of
from mechatlas.activations.networks import as_input
from mechatlas.activations.passes import on_device
from mechatlas.activations.positions import Positions, TokenSamples, is_causal, left_out
from mechatlas.activations.predictions import (
    compare,
    label_losses,
    next_token_losses,
    output_of,
)
from mechatlas.activations.samples import Samples, open_samples
from mechatlas.activations.sites import as_site, intervene, read_activations
from mechatlas.analysis.evaluation.results import DensityBin, NetworkEvaluation, OutputEffect
from mechatlas.base import Dictionary, InputError, Progress, Site, no_progress
from mechatlas.devices import as_device
from mechatlas.dictionaries import metrics
from mechatlas.dictionaries.pretrained import reading_of
from mechatlas.maths.bootstrap import Estimate, estimate, median_estimate, ratio_estimate, resample
from mechatlas.maths.outliers import OUTLIER_NORMS, norm_limit

N_SAMPLES = 256
"""Samples that a network runs on by default."""
LIMIT_ROWS = 16_384
"""Rows from which the limit of outlier rows is taken."""
ROWS_AT_ONCE = 4096
"""Rows encoded together."""
BINS = (0.0, *(10 ** (p / 2) for p in range(-10, 1)))
"""Lower ends of the bins of density; below the second is whatever is active at all."""
WAYS = ("intact", "spliced", "zero_ablated", "mean_ablated")


@overload
def evaluate(
    dictionary: Dictionary,
    x: Any,
    *,
    target: Any = None,
    outlier: Bool[Tensor, " batch"] | None = None,
    batch_size: int = 64,
) -> metrics.Evaluation: ...


@overload
def evaluate(
    dictionary: Dictionary,
    *,
    network: nn.Module,
    samples: Any,
    site: Site | str,
    labels: Int[np.ndarray, " sample"] | None = None,
    n_samples: int = N_SAMPLES,
    numbers: Sequence[int] | None = None,
    positions: Positions | None = None,
    outlier_norms: float = OUTLIER_NORMS,
    batch_size: int = 8,
    seed: int = 0,
    device: torch.device | str | None = None,
    on_progress: Progress = no_progress,
) -> NetworkEvaluation: ...


def evaluate(dictionary: Dictionary, x: Any = None, **options: Any) -> Any:
    """Measure a dictionary on rows, or what it is worth to its network.

    Args:
        dictionary: Dictionary to measure.
        x: Activations that it reads; then the options are those of
            `mechatlas.dictionaries.metrics.evaluate`.
        options: Otherwise `network`; `samples`, as for `open_samples`; `site`; `labels`, the right
            class of each sample; `n_samples` drawn at random, or their `numbers`;
            `positions` left out, by default as `collect` leaves them out; `outlier_norms`, beyond
            which a row stays as it is (`inf` for none); `batch_size` in samples; `seed` of the
            draw and the intervals; `device`, by default the network's own; `on_progress`.

    Raises:
        InputError: The dictionary does not write the site that it reads, or the network gives no
            logits.
        SiteError: The network has no such site.
        ValueError: All rows are equal, so FVU is undefined.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import mechatlas as ma
        >>> sae = ma.Autoencoder(d_in=16, n_latents=64, sparsity=ma.TopK(k=4))
        >>> ma.evaluate(sae, torch.randn(100, 16)).l0
        4.0
        >>> network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
        >>> found = ma.evaluate(sae, network=network, samples=torch.randn(50, 8), site="1")
        >>> found.spliced.kl_divergence.n
        50
    """
    if x is not None:
        return metrics.evaluate(dictionary, x, **options)
    return _evaluate_in_network(dictionary, **options)


@dataclasses.dataclass(frozen=True, eq=False)
class _Setting:
    """Everything that stays the same from batch to batch."""

    dictionary: Dictionary
    network: nn.Module
    samples: Samples
    site: Site
    positions: Positions
    labels: Int[np.ndarray, " sample"] | None
    causal: bool
    device: torch.device | str
    left_out: Counter[str]
    layout: Layout
    limit: float = float("inf")
    mean: Tensor | None = None

    @property
    def tokens(self) -> TokenSamples | None:
        """The samples, if they are windows of tokens."""
        return self.samples if isinstance(self.samples, TokenSamples) else None

    def inputs(self, numbers: Sequence[int]) -> Any:
        """Batch of some samples."""
        batch = self.samples.stack([self.samples.read(i) for i in numbers])
        return as_input(self.network, batch.to(self.device))

    def excluded(self, numbers: Sequence[int], n_positions: int, counts: Counter[str]) -> Tensor:
        """Positions of some samples that stay as they are."""
        if self.tokens is not None:
            excluded = left_out(self.tokens, numbers, self.positions, counts)
            if excluded.shape[1] == n_positions:
                return excluded.flatten().to(self.device)
        return torch.zeros(len(numbers) * n_positions, dtype=torch.bool, device=self.device)


@torch.no_grad()
def _evaluate_in_network(
    dictionary: Dictionary,
    *,
    network: nn.Module,
    samples: Any,
    site: Site | str,
    labels: Int[np.ndarray, " sample"] | None = None,
    n_samples: int = N_SAMPLES,
    numbers: Sequence[int] | None = None,
    positions: Positions | None = None,
    outlier_norms: float = OUTLIER_NORMS,
    batch_size: int = 8,
    seed: int = 0,
    device: torch.device | str | None = None,
    on_progress: Progress = no_progress,
) -> NetworkEvaluation:
    samples, device = open_samples(samples, network), as_device(device, network)
    place = as_site(network, site)
    if numbers is None:
        drawn = np.random.default_rng([seed, 20]).permutation(len(samples))
        numbers = sorted(drawn[:n_samples].tolist())
    batches = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
    if not batches:
        raise InputError("There are no samples to run the network on.")
    module = dictionary if isinstance(dictionary, nn.Module) else nn.Identity()
    with on_device(network, device), on_device(module, device):
        tokens, index = isinstance(samples, TokenSamples), batches[0][0]
        first = as_input(network, samples.stack([samples.read(index)]).to(device))
        causal = tokens and is_causal(network, first, samples.padding(index), [place])
        resolved = (positions or Positions()).resolved(tokens=tokens, causal=causal)
        layout = layouts_of(network, first, [place])[place]
        setting = _Setting(
            dictionary, network, samples, place, resolved, labels, causal, device, Counter(), layout
        )
        limit, mean = _site_statistics(_counted_rows(setting, batches), outlier_norms)
        setting = dataclasses.replace(setting, limit=limit, mean=mean)
        parts: list[_Part] = []
        for done, batch in enumerate(batches, start=1):
            parts.append(_measure_batch(setting, batch))
            on_progress(done, len(batches))
    return _summarize(parts, setting, seed)


def _counted_rows(setting: _Setting, batches: Iterable[Sequence[int]]) -> Iterator[Tensor]:
    """Rows of each batch that are not left out."""
    for batch in batches:
        activation = read_activations(setting.network, setting.inputs(batch), [setting.site])
        rows, n_positions = _rows(activation[setting.site], setting.layout)
        if rows.shape[1] != setting.dictionary.d_in:
            raise InputError(
                f"Site {setting.site} is {rows.shape[1]} wide, the dictionary reads "
                f"{reading_of(setting.dictionary)}."
            )
        yield rows[~setting.excluded(batch, n_positions, Counter())]


def _rows(activation: Tensor, layout: Layout) -> tuple[Float[Tensor, "row d"], int]:
    """Rows of all positions, sample after sample, and the number of positions of a sample."""
    whole = layout.rows(activation)
    rows = whole.reshape(-1, whole.shape[-1]).float()
    return rows, len(rows) // len(whole)


def _site_statistics(
    batches: Iterator[Float[Tensor, "row d"]], outlier_norms: float
) -> tuple[float, Float[Tensor, " d"]]:
    """Limit beyond which a row is an outlier, and the mean of the rows that are none."""
    head: list[Tensor] = []
    for rows in batches:
        head.append(rows)
        if sum(map(len, head)) >= LIMIT_ROWS:
            break
    limit = norm_limit(torch.cat([_norms(rows) for rows in head]), outlier_norms)
    total, n = torch.zeros(head[0].shape[1], dtype=torch.float64, device=head[0].device), 0
    for rows in itertools.chain(head, batches):
        inside = rows[_norms(rows) <= limit]
        total, n = total + inside.double().sum(dim=0), n + len(inside)
    if not n:
        raise InputError("Every position of the samples is left out; there is nothing to measure.")
    return limit, (total / n).float()


def _norms(rows: Float[Tensor, "row d"]) -> Float[Tensor, " row"]:
    return torch.linalg.vector_norm(rows, dim=1)


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """Measurements of one batch."""

    residual: Float[np.ndarray, " row"]
    """Squared error of each row that is not left out."""
    total: Float[np.ndarray, " row"]
    """Squared distance of each from the mean."""
    outlier: Bool[np.ndarray, " row"]
    sample: Int[np.ndarray, " row"]
    """Number within the batch of the sample that each is of."""
    active: Int[np.ndarray, "sample latent"]
    """Rows of each sample on which each latent is active, without outliers."""
    effects: Float[np.ndarray, "way sample 5"]
    """Sums of losses and their number, of divergence and answers and their number."""


def _measure_batch(setting: _Setting, batch: Sequence[int]) -> _Part:
    """Reconstruct the rows of a batch and run the network with each way of writing them."""
    network, site, inputs = setting.network, setting.site, setting.inputs(batch)
    seen: list[Tensor] = []

    def remember(activation: Tensor) -> Tensor:
        seen.append(activation)
        return activation

    with intervene(network, {site: remember}):
        before, is_logits = output_of(network(inputs))
    if not is_logits:
        raise InputError(
            f"{type(network).__name__} returns no logits, so there is no loss to recover: give a "
            "network with its head. `ma.evaluate(dictionary, rows)` measures the rows alone."
        )
    rows, n_positions = _rows(seen[0], setting.layout)
    kept = ~setting.excluded(batch, n_positions, setting.left_out)
    sample = torch.arange(len(batch), device=rows.device).repeat_interleave(n_positions)[kept]
    counted = rows[kept]
    outlier = _norms(counted) > setting.limit
    assert setting.mean is not None
    reconstruction, active = _reconstruct(setting.dictionary, counted, sample, outlier, len(batch))
    written = kept.nonzero()[:, 0][~outlier]
    news = (reconstruction[~outlier], torch.zeros_like(rows[written]), setting.mean)
    effects = [_effect(setting, batch, inputs, before, before)]
    for new in news:
        changed = rows.index_put((written,), new.expand(len(written), -1).to(rows))
        with intervene(network, {site: lambda old, c=changed: _written(old, c, setting.layout)}):
            after = output_of(network(inputs)).x
        effects.append(_effect(setting, batch, inputs, before, after))
    return _Part(
        (counted - reconstruction).double().square().sum(dim=1).cpu().numpy(),
        (counted - setting.mean).double().square().sum(dim=1).cpu().numpy(),
        outlier.cpu().numpy(),
        sample.cpu().numpy(),
        active.cpu().numpy(),
        np.stack(effects),
    )


def _written(old: Tensor, rows: Float[Tensor, "row d"], layout: Layout) -> Tensor:
    return layout.undo(rows.to(old.dtype).reshape(layout.rows(old).shape), old)


def _reconstruct(
    dictionary: Dictionary,
    rows: Float[Tensor, "row d"],
    sample: Int[Tensor, " row"],
    outlier: Bool[Tensor, " row"],
    n_samples: int,
) -> tuple[Float[Tensor, "row d"], Int[Tensor, "sample latent"]]:
    """Reconstructions, and on how many rows of each sample each latent is active."""
    parts = []
    active = torch.zeros(n_samples, dictionary.n_latents, dtype=torch.int32, device=rows.device)
    pieces = (x.split(ROWS_AT_ONCE) for x in (rows, sample, ~outlier))
    for x, of, inside in zip(*pieces, strict=True):
        code = dictionary.encode(x)
        parts.append(dictionary.decode(code).float())
        active.index_add_(0, of[inside], (code != 0)[inside].int())
    if parts and parts[0].shape[1] != rows.shape[1]:
        raise InputError(
            f"The dictionary reads {rows.shape[1]} and writes {parts[0].shape[1]} numbers a row; "
            "evaluate one that writes the site that it reads."
        )
    return torch.cat(parts) if parts else rows, active


def _effect(
    setting: _Setting, batch: Sequence[int], inputs: Any, before: Tensor, after: Tensor
) -> Float[np.ndarray, "sample 5"]:
    """Sum of losses, their number, sums of divergence and of equal answers, and their number."""
    padding = torch.zeros(before.shape[:2], dtype=torch.bool)
    if setting.tokens is not None and before.shape[1] > 1:
        masks = [torch.from_numpy(np.asarray(setting.tokens.padding(i))) for i in batch]
        if masks[0].shape[0] == before.shape[1]:
            padding = torch.stack(masks)
    counts = (~padding).to(before.device)
    losses, targets = torch.zeros_like(counts, dtype=torch.float32), torch.zeros_like(counts)
    if setting.causal and isinstance(inputs, Tensor) and before.shape[:2] == inputs.shape:
        losses, targets = next_token_losses(after, inputs), counts[:, 1:]
    elif setting.labels is not None:
        labels = torch.from_numpy(np.asarray(setting.labels)[list(batch)]).to(before.device)
        losses, targets = label_losses(after, labels), counts
    divergence, same = compare(before, after)
    sums = [(losses * targets), targets, divergence * counts, same & counts, counts]
    return torch.stack([s.double().sum(dim=1) for s in sums], dim=1).cpu().numpy()


def _summarize(parts: Sequence[_Part], setting: _Setting, seed: int) -> NetworkEvaluation:
    """Figures with their intervals."""
    firsts = np.cumsum([0] + [len(part.active) for part in parts])
    n = int(firsts[-1])
    sample = np.concatenate([p.sample + first for p, first in zip(parts, firsts, strict=False)])
    residual, total = (
        np.concatenate([getattr(p, k) for p in parts]) for k in ("residual", "total")
    )
    inside = ~np.concatenate([part.outlier for part in parts])
    if not total[inside].sum() > 0:
        raise ValueError("FVU is undefined: all rows are equal. Is the site constant?")
    times = resample(n, seed=seed)

    def by_sample(values: np.ndarray) -> np.ndarray:
        return np.bincount(sample, values, minlength=n)

    active = np.concatenate([part.active for part in parts])
    n_rows = by_sample(inside.astype(float))
    share = (residual / np.where(total > 0, total, np.inf))[inside]
    dead, density = _densities(active, n_rows, times)
    effects = {
        way: _output_effect(np.concatenate([p.effects[i] for p in parts]), times)
        for i, way in enumerate(WAYS)
    }
    sums = {way: np.concatenate([p.effects[i] for p in parts])[:, 0] for i, way in enumerate(WAYS)}
    has_loss = effects["intact"].loss is not None
    recovered = [
        ratio_estimate(sums[way] - sums["spliced"], sums[way] - sums["intact"], times)
        for way in ("zero_ablated", "mean_ablated")
    ]
    return NetworkEvaluation(
        samples=n,
        rows=int(inside.sum()),
        outlier_rows=int((~inside).sum()),
        left_out=dict(setting.left_out),
        fvu=ratio_estimate(by_sample(residual * inside), by_sample(total * inside), times),
        fvu_median=median_estimate(share, sample[inside], times),
        fvu_with_outliers=ratio_estimate(by_sample(residual), by_sample(total), times),
        l0=ratio_estimate(active.sum(axis=1).astype(float), n_rows, times),
        dead_share=dead,
        density=density,
        **effects,
        loss_recovered=recovered[0] if has_loss else None,
        loss_recovered_from_mean=recovered[1] if has_loss else None,
    )


def _output_effect(
    sums: Float[np.ndarray, "sample 5"], times: Int[np.ndarray, "resample sample"]
) -> OutputEffect:
    loss, n_losses, divergence, same, n = sums.T
    return OutputEffect(
        loss=ratio_estimate(loss, n_losses, times) if n_losses.any() else None,
        kl_divergence=ratio_estimate(divergence, n, times),
        agreement=ratio_estimate(same, n, times),
    )


def _densities(
    active: Int[np.ndarray, "sample latent"],
    n_rows: Float[np.ndarray, " sample"],
    times: Int[np.ndarray, "resample sample"],
) -> tuple[Estimate, list[DensityBin]]:
    """Share of dead latents, and the histogram of densities; the first bin is of the dead."""
    counts = active.astype(np.float32)
    edges = np.array([*BINS[1:], np.inf])

    def shares(weights: np.ndarray) -> np.ndarray:
        density = (weights.astype(np.float32) @ counts) / max(float(weights @ n_rows), 1.0)
        bins = np.where(density > 0, np.digitize(density * (1 + 1e-6), edges) + 1, 0)
        return np.bincount(bins, minlength=len(edges) + 1) / len(density)

    whole = shares(np.ones(len(counts)))
    resampled = np.stack([shares(weights) for weights in times])
    found = [estimate(whole[i], resampled[:, i], len(counts)) for i in range(len(whole))]
    ends = [0.0, 0.0, *BINS[1:]]
    bins = zip(ends[:-1], ends[1:], found[:-1], strict=True)
    return found[0], [DensityBin(low=low, high=high, share=e) for low, high, e in bins] + [
        DensityBin(low=ends[-1], high=1.0, share=found[-1])
    ]
