"""Evaluate a dictionary: its error on rows, and what it is worth to its network.

Main path, in reading order:

    evaluate             rows -> `Evaluation`; a network and samples -> `NetworkEvaluation`
    _site_statistics     limit of outlier rows, and the mean of the others
    _measure_batch       one batch: rows, codes, and the network with the site written anew
    _summarize           sums of all samples -> figures with their intervals

Positions that are left out and outlier rows stay as they are in every way of writing the site, so
that all ways differ at the same positions.

A dictionary may read and write several sites. All that it writes is then written together. Codes of
an autoencoder or a crosscoder are those of the intact network; a transcoder takes the place of the
modules between its sites, so its codes are those of the network as it runs with it.

Source: Bricken et al., Towards monosemanticity (2023), for loss recovered.
"""

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from mechatlas.activations.sites import intervene, place_sites, read_activations
from mechatlas.analysis.evaluation.results import DensityBin, NetworkEvaluation, OutputEffect
from mechatlas.base import Dictionary, InputError, Progress, Site, no_progress
from mechatlas.devices import as_device
from mechatlas.dictionaries import metrics
from mechatlas.dictionaries.ends import Ends, Part, decoded_at, ends_of, in_words, parts_of
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
    site: Site | str | Sequence[Site | str] | None = None,
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
        options: Otherwise `network`; `samples`, as for `open_samples`; `site`, by default as the
            dictionary names it (several: those that it reads, then others that it writes);
            `labels`, the right class of each sample; `n_samples` drawn at random, or `numbers`;
            `positions` left out, by default as `collect` leaves them out; `outlier_norms`, beyond
            which a row stays as it is (`inf` for none); `batch_size` in samples; `seed` of the
            draw and the intervals; `device`, by default the network's own; `on_progress`.

    Raises:
        InputError: The dictionary is of another width, or of more sites than are given, or writes
            before it has read; or the network gives no logits.
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
    sites: dict[str, Site]
    """Sites by the names that the dictionary has for them."""
    positions: Positions
    labels: Int[np.ndarray, " sample"] | None
    causal: bool
    device: torch.device | str
    left_out: Counter[str]
    layouts: dict[Site, Layout]
    ends: Ends
    parts: list[Part]
    limits: dict[str, float] = dataclasses.field(default_factory=dict)
    mean: Tensor | None = None
    """Mean row of the sites that are written, side by side."""

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
    site: Site | str | Sequence[Site | str] | None = None,
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
    ends, parts = ends_of(dictionary), parts_of(dictionary)
    places = place_sites(network, ends.names, site, in_words(dictionary))
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
        every = list(dict.fromkeys(places.values()))
        causal = tokens and is_causal(network, first, samples.padding(index), every)
        resolved = (positions or Positions()).resolved(tokens=tokens, causal=causal)
        setting = _Setting(
            dictionary, network, samples, places, resolved, labels, causal, device, Counter(),
            layouts_of(network, first, every), ends, parts,
        )  # fmt: skip
        limits, mean = _site_statistics(setting, _counted_rows(setting, batches), outlier_norms)
        setting = dataclasses.replace(setting, limits=limits, mean=mean)
        measured: list[_Part] = []
        for done, batch in enumerate(batches, start=1):
            measured.append(_measure_batch(setting, batch))
            on_progress(done, len(batches))
    return _summarize(measured, setting, seed)


_SiteRows = dict[str, Float[Tensor, "row _"]]
"""Rows of each site, by the dictionary's name for it, at the same positions."""


def _counted_rows(setting: _Setting, batches: Iterable[Sequence[int]]) -> Iterator[_SiteRows]:
    """Rows of each batch that are not left out.

    Raises:
        InputError: A site is not as wide as the dictionary.
    """
    for batch in batches:
        sites = list(setting.sites.values())
        read = read_activations(setting.network, setting.inputs(batch), sites)
        rows, n_positions = _rows(setting, {name: read[s] for name, s in setting.sites.items()})
        kept = ~setting.excluded(batch, n_positions, Counter())
        yield {name: own[kept] for name, own in rows.items()}


def _rows(setting: _Setting, activations: dict[str, Tensor]) -> tuple[_SiteRows, int]:
    """Rows of all positions, sample after sample, and the number of positions of a sample.

    Raises:
        InputError: A site is not as wide as the dictionary, or sites have other positions.
    """
    found: _SiteRows = {}
    n_positions = set()
    for name, site in setting.sites.items():
        whole = setting.layouts[site].rows(activations[name])
        found[name] = whole.reshape(-1, whole.shape[-1]).float()
        n_positions.add(len(found[name]) // len(whole))
        columns = [ends[name] for ends in setting.ends if name in ends]
        if any(span.stop - span.start != whole.shape[-1] for span in columns):
            there = columns[0].stop - columns[0].start
            there = f", at this site {there}" if len(setting.sites) > 1 else ""
            raise InputError(
                f"Site {site} is {whole.shape[-1]} wide, the dictionary "
                f"{in_words(setting.dictionary)}{there}."
            )
    if len(n_positions) > 1:
        raise InputError(
            f"The sites {', '.join(map(str, setting.sites.values()))} have {sorted(n_positions)} "
            "positions; a dictionary of several sites needs the same."
        )
    return found, n_positions.pop()


def _beside(rows: _SiteRows, columns: dict[str, slice]) -> Float[Tensor, "row d"]:
    """Rows of some sites side by side."""
    return torch.cat([rows[name] for name in columns], dim=1)


def _site_statistics(
    setting: _Setting, batches: Iterator[_SiteRows], outlier_norms: float
) -> tuple[dict[str, float], Float[Tensor, " d"]]:
    """Limit beyond which a row is an outlier, by site, and the mean of the rows that are none.

    Raises:
        InputError: Every position is left out.
    """
    head: list[_SiteRows] = []
    for rows in batches:
        head.append(rows)
        if sum(len(next(iter(rows.values()))) for rows in head) >= LIMIT_ROWS:
            break
    limits = {
        name: norm_limit(torch.cat([_norms(rows[name]) for rows in head]), outlier_norms)
        for name in setting.sites
    }
    total, n = torch.zeros((), dtype=torch.float64), 0
    for rows in itertools.chain(head, batches):
        written = _beside(rows, setting.ends.writes)
        inside = written[~_outlier(rows, limits)]
        total, n = total.to(inside.device) + inside.double().sum(dim=0), n + len(inside)
    if not n:
        raise InputError("Every position of the samples is left out; there is nothing to measure.")
    return limits, (total / n).float()


def _outlier(rows: _SiteRows, limits: dict[str, float]) -> Bool[Tensor, " row"]:
    """Whether a row is longer at any site than is usual there."""
    return torch.stack([_norms(own) > limits[name] for name, own in rows.items()]).any(dim=0)


def _norms(rows: Float[Tensor, "row d"]) -> Float[Tensor, " row"]:
    return torch.linalg.vector_norm(rows, dim=1)


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """Measurements of one batch."""

    residual: Float[np.ndarray, "row site"]
    """Squared error of each row that is not left out, at each site that is written."""
    total: Float[np.ndarray, "row site"]
    """Squared distance of each from the mean."""
    outlier: Bool[np.ndarray, " row"]
    sample: Int[np.ndarray, " row"]
    """Number within the batch of the sample that each is of."""
    active: Int[np.ndarray, "sample latent"]
    """Rows of each sample on which each latent is active, without outliers."""
    effects: Float[np.ndarray, "way sample 5"]
    """Sums of losses and their number, of divergence and answers and their number."""


def _measure_batch(setting: _Setting, batch: Sequence[int]) -> _Part:
    """Reconstruct the rows of a batch and run the network with each way of writing them.

    Raises:
        InputError: The network gives no logits.
    """
    network, inputs = setting.network, setting.inputs(batch)
    seen: dict[Site, Tensor] = {}

    def remember(site: Site, activation: Tensor) -> Tensor:
        seen[site] = activation.clone()  # the network may write into what it goes on with
        return activation

    edits = {site: functools.partial(remember, site) for site in setting.layouts}
    with intervene(network, edits):
        before, is_logits = output_of(network(inputs))
    if not is_logits:
        raise InputError(
            f"{type(network).__name__} returns no logits, so there is no loss to recover: give a "
            "network with its head. `ma.evaluate(dictionary, rows)` measures the rows alone."
        )
    rows, n_positions = _rows(setting, {name: seen[site] for name, site in setting.sites.items()})
    kept = ~setting.excluded(batch, n_positions, setting.left_out)
    sample = torch.arange(len(batch), device=kept.device).repeat_interleave(n_positions)[kept]
    counted = {name: own[kept] for name, own in rows.items()}
    outlier = _outlier(counted, setting.limits)
    assert setting.mean is not None
    x, target = (_beside(counted, columns) for columns in setting.ends)
    reconstruction, active = _reconstruct(setting, x, sample, outlier, len(batch))
    written = kept.nonzero()[:, 0][~outlier]
    effects = [_effect(setting, batch, inputs, before, before)]
    fixed = (reconstruction[~outlier], torch.zeros_like(target[~outlier]), setting.mean[None])
    for number, new in enumerate(fixed):
        edits = _fixed(setting, written, new)
        if setting.ends.transcodes and not number:
            edits = _running(setting, written)
        with intervene(network, edits):
            after = output_of(network(inputs)).x
        effects.append(_effect(setting, batch, inputs, before, after))
    return _Part(
        _squares(target - reconstruction, setting.ends),
        _squares(target - setting.mean, setting.ends),
        outlier.cpu().numpy(),
        sample.cpu().numpy(),
        active.cpu().numpy(),
        np.stack(effects),
    )


def _squares(off: Float[Tensor, "row d_out"], ends: Ends) -> Float[np.ndarray, "row site"]:
    """Sum of squares at each site that is written."""
    parts = [off[:, span].double().square().sum(dim=1) for span in ends.writes.values()]
    return torch.stack(parts, dim=1).cpu().numpy()


Edits = dict[Site, Callable[[Tensor], Tensor]]
"""Function from the activations at a site to what is written there, by site."""


def _fixed(
    setting: _Setting, written: Int[Tensor, " row"], new: Float[Tensor, "#row d_out"]
) -> Edits:
    """Write rows that are known beforehand, at all sites that the dictionary writes."""

    def write(name: str, old: Tensor) -> Tensor:
        return _written(setting, name, old, written, new[..., setting.ends.writes[name]])

    return {setting.sites[name]: functools.partial(write, name) for name in setting.ends.writes}


def _running(setting: _Setting, written: Int[Tensor, " row"]) -> Edits:
    """Write what a transcoder makes of the rows that reach it while the network runs.

    Raises:
        InputError: A site is written before a part of the dictionary has read its own.
    """
    sums: dict[str, Tensor] = {}
    seen: set[str] = set()

    def read(name: str, old: Tensor) -> Tensor:
        seen.add(name)
        whole = setting.layouts[setting.sites[name]].rows(old)
        x = whole.reshape(-1, whole.shape[-1])[written].float()
        for part in (part for part in setting.parts if name in part.ends.reads):
            for site, out in _written_by(part, x).items():
                sums[site] = sums[site] + out if site in sums else out
        return old

    def write(name: str, old: Tensor) -> Tensor:
        late = {n for part in setting.parts if name in part.ends.writes for n in part.ends.reads}
        if late - seen:
            sites = [setting.sites[each] for each in (name, *sorted(late - seen))]
            raise InputError(
                f"The network reaches {sites[0]}, which the dictionary writes, before {sites[1]}, "
                "which it reads for that; a transcoder can only write what comes later."
            )
        return _written(setting, name, old, written, sums[name])

    reads = {setting.sites[name]: functools.partial(read, name) for name in setting.ends.reads}
    writes = {setting.sites[name]: functools.partial(write, name) for name in setting.ends.writes}
    return {**reads, **writes}


def _written_by(part: Part, x: Float[Tensor, "row d_in"]) -> _SiteRows:
    """Rows that one part of a transcoder writes at each of its sites."""
    pieces: dict[str, list[Tensor]] = {name: [] for name in part.ends.writes}
    for piece in x.split(ROWS_AT_ONCE):
        code = part.dictionary.encode(piece)
        for name, outs in pieces.items():
            outs.append(decoded_at(part.dictionary, code, piece, name).float())
    return {name: torch.cat(outs) for name, outs in pieces.items()}


def _written(
    setting: _Setting,
    name: str,
    old: Tensor,
    written: Int[Tensor, " row"],
    new: Float[Tensor, "#row d"],
) -> Tensor:
    """Activations of a site with some rows replaced."""
    layout = setting.layouts[setting.sites[name]]
    whole = layout.rows(old)
    rows = whole.reshape(-1, whole.shape[-1])
    rows = rows.index_put((written,), new.expand(len(written), -1).to(rows))
    return layout.undo(rows.reshape(whole.shape), old)


def _reconstruct(
    setting: _Setting,
    rows: Float[Tensor, "row d_in"],
    sample: Int[Tensor, " row"],
    outlier: Bool[Tensor, " row"],
    n_samples: int,
) -> tuple[Float[Tensor, "row d_out"], Int[Tensor, "sample latent"]]:
    """Reconstructions, and on how many rows of each sample each latent is active.

    Raises:
        InputError: The dictionary writes other widths than it says.
    """
    width = max(span.stop for span in setting.ends.writes.values())
    out = rows.new_zeros(len(rows), width)
    n_latents = setting.dictionary.n_latents
    active = torch.zeros(n_samples, n_latents, dtype=torch.int32, device=rows.device)
    for numbers in torch.arange(len(rows), device=rows.device).split(ROWS_AT_ONCE):
        for part in setting.parts:
            x = rows[numbers, part.reads]
            code = part.dictionary.encode(x)
            for name in part.ends.writes:
                span, new = setting.ends.writes[name], decoded_at(part.dictionary, code, x, name)
                if new.shape[1] != span.stop - span.start:
                    raise InputError(
                        f"The dictionary reads {rows.shape[1]} and writes {new.shape[1]} numbers a "
                        "row; evaluate one that writes the site that it reads."
                    )
                out[numbers, span] += new.float()
            inside = ~outlier[numbers]
            counts = active[:, part.latents]
            counts.index_add_(0, sample[numbers][inside], (code != 0)[inside].int())
    return out, active


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
    by_site = [np.concatenate([getattr(p, k) for p in parts]) for k in ("residual", "total")]
    residual, total = (values.sum(axis=1) for values in by_site)
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
    names = [setting.sites[name] for name in setting.ends.writes]
    of_sites = [[by_sample(v * inside) for v in values.T] for values in by_site]
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
        fvu_by_site={
            str(site): ratio_estimate(left, whole, times)
            for site, left, whole in zip(names, *of_sites, strict=True)
            if len(names) > 1 and whole.sum() > 0
        },
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
    """Share of dead latents, and the histogram of densities; the first bin is of the dead.

    A resample lacks a third of the samples, so more latents are dead in it than on all of them: its
    spread around its mean counts.
    """
    counts = active.astype(np.float32)
    edges = np.array([*BINS[1:], np.inf])

    def shares(weights: np.ndarray) -> np.ndarray:
        density = (weights.astype(np.float32) @ counts) / max(float(weights @ n_rows), 1.0)
        bins = np.where(density > 0, np.digitize(density * (1 + 1e-6), edges) + 1, 0)
        return np.bincount(bins, minlength=len(edges) + 1) / len(density)

    whole = shares(np.ones(len(counts)))
    resampled = np.stack([shares(weights) for weights in times])
    resampled = np.clip(whole + resampled - resampled.mean(axis=0), 0.0, 1.0)
    found = [estimate(whole[i], resampled[:, i], len(counts)) for i in range(len(whole))]
    ends = [0.0, 0.0, *BINS[1:]]
    bins = zip(ends[:-1], ends[1:], found[:-1], strict=True)
    return found[0], [DensityBin(low=low, high=high, share=e) for low, high, e in bins] + [
        DensityBin(low=ends[-1], high=1.0, share=found[-1])
    ]
