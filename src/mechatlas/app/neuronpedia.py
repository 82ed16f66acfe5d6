"""Features of a dictionary of texts in the JSON of Neuronpedia.

    write_features    dictionary, its store and its network -> files `batch-0.json`, ...

The files are those that SAEDashboard's Neuronpedia runner writes, read by
`NeuronpediaDashboardBatch`. As there, codes and atoms are in units in which atoms have length 1.
Correlations with other neurons and features are left empty.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechatlas.activations.store import StoreRows
from mechatlas.activations.texts import TextSamples
from mechatlas.analysis.effects.logits import Head, atoms, head_of
from mechatlas.analysis.examples.maps import Examples, ExamplesWanted, examples_together
from mechatlas.analysis.examples.statistics import (
    FeatureStatistics,
    feature_statistics,
    linear_histograms,
)
from mechatlas.base import Dictionary, InputError, Progress, Site, no_progress
from mechatlas.files import write_json

TOP = 20
"""Strongest contexts of each feature."""
QUANTILES = 30
"""Contexts at quantiles of the activation, shown in the interval that they fall into."""
BINS = 50
"""Bars of a histogram."""
INTERVALS = 10
"""Equal intervals of the activation, from 0 to the largest."""
N_LOGITS = 10
"""Tokens listed at each end of the effects on logits."""
N_NEURONS = 3
"""Entries of an atom that are listed."""
CONTEXT = (96, 31)
"""Tokens shown before and after a position."""
FEATURES = 128
"""Features of one file."""
FEATURES_AT_ONCE = 1024
"""Features whose contexts are read in one pass of the network."""


class _Some:
    """Dictionary of some latents of another, of which only the codes are used."""

    def __init__(self, dictionary: Dictionary, latents: Sequence[int]) -> None:
        self.whole, self.latents = dictionary, list(latents)
        self.d_in, self.n_latents = dictionary.d_in, len(self.latents)
        self.length = atoms(dictionary, self.latents).norm(dim=1)
        weights = getattr(dictionary, "W_dec", None)
        self.device = weights.device if isinstance(weights, Tensor) else torch.device("cpu")

    def encode(self, x: Tensor) -> Float[Tensor, "batch latent"]:
        """Codes of the latents, in units of atoms of length 1."""
        code = self.whole.encode(x.to(self.device))[..., self.latents]
        return code * self.length.to(code)

    def decode(self, code: Tensor) -> Tensor:
        """Refuse codes."""
        raise NotImplementedError("some latents of a dictionary do not reconstruct")


@dataclasses.dataclass(frozen=True, eq=False)
class Facts:
    """Names and sizes that all features share."""

    model: str
    """Name of the model."""
    layer: int
    """Number of the layer."""
    name: str
    """Name of the set of dictionaries."""
    dataset: str
    """Name of the texts."""
    n_samples: int
    """Samples of the store."""
    n_tokens: int
    """Tokens of a sample."""


def write_features(
    folder: Path,
    dictionary: Dictionary,
    rows: StoreRows,
    network: nn.Module,
    samples: TextSamples,
    facts: Facts,
    *,
    latents: Sequence[int] | None = None,
    max_rows: int | None = None,
    on_progress: Progress = no_progress,
) -> list[Path]:
    """Write the features of a dictionary, and return the files.

    Args:
        folder: Folder to write into.
        dictionary: Dictionary of a site of a language model.
        rows: Rows of that site.
        network: Network that the rows came from.
        samples: Texts that they came from.
        facts: Names and sizes.
        latents: Features to write; by default all.
        max_rows: Upper limit on the rows read.
        on_progress: Callback with the number of rows and samples done.

    Raises:
        InputError: There is no such latent, or rows and dictionary do not fit.
        DiskError: The folder is not writable or the disk is full.
    """
    chosen = list(range(dictionary.n_latents)) if latents is None else list(latents)
    wrong = [i for i in chosen if not 0 <= i < dictionary.n_latents]
    if wrong or not chosen:
        raise InputError(
            f"There is no latent {wrong[0] if wrong else 'chosen'}; the dictionary has 0 to "
            f"{dictionary.n_latents - 1}."
        )
    head = _head(network, dictionary)
    decode: Any = network.get_submodule("input").decode
    files: list[Path] = []
    for first in range(0, len(chosen), FEATURES_AT_ONCE):
        some = _Some(dictionary, chosen[first : first + FEATURES_AT_ONCE])
        found = _measure(some, rows, network, samples, max_rows, on_progress)
        described = _features(some, found, head, samples, decode, facts)
        for start in range(0, some.n_latents, FEATURES):
            batch = {
                "model_id": facts.model, "layer": facts.layer, "sae_set": facts.name,
                "sae_id_suffix": None,
                "features": [next(described) for _ in some.latents[start : start + FEATURES]],
            }  # fmt: skip
            files.append(folder / f"batch-{len(files)}.json")
            write_json(files[-1], batch)
    return files


def _head(network: nn.Module, dictionary: Dictionary) -> Head | None:
    """Head of a language model that the dictionary writes for; none if it has no effect there."""
    try:
        head = head_of(network)
    except InputError:
        return None
    return head if atoms(dictionary, [0]).shape[1] == head.unembed.shape[1] else None


@dataclasses.dataclass(frozen=True, eq=False)
class _Measured:
    statistics: FeatureStatistics
    histogram: Int[np.ndarray, "latent bin"]
    shown: Examples


def _measure(
    some: _Some,
    rows: StoreRows,
    network: nn.Module,
    samples: TextSamples,
    max_rows: int | None,
    on_progress: Progress,
) -> _Measured:
    """Statistics of some features, and the activations around their examples."""
    statistics = feature_statistics(
        some, rows, top=TOP, quantiles=QUANTILES, max_rows=max_rows, on_progress=on_progress
    )
    histogram = linear_histograms(some, rows, statistics.max, n_bins=BINS, max_rows=max_rows)
    wanted = ExamplesWanted(Site.parse(str(rows.site)), some, statistics)
    (shown,) = examples_together(
        network, samples, [wanted], context=CONTEXT, on_progress=on_progress
    )
    return _Measured(statistics, histogram, shown)


def _features(
    some: _Some,
    found: _Measured,
    head: Head | None,
    samples: TextSamples,
    decode: Callable[[np.ndarray], list[str]],
    facts: Facts,
) -> Iterator[dict[str, Any]]:
    """Describe features one by one."""
    vectors = atoms(some.whole, some.latents) / some.length.clamp_min(1e-30)[:, None]
    for i, latent in enumerate(some.latents):
        strongest = vectors[i].topk(min(N_NEURONS, vectors.shape[1]))
        share = strongest.values.abs() / vectors[i].abs().sum().clamp_min(1e-30)
        yield {
            "feature_index": latent,
            "neuron_alignment_indices": strongest.indices.tolist(),
            "neuron_alignment_values": _rounded(strongest.values),
            "neuron_alignment_l1": _rounded(share),
            "correlated_neurons_indices": [], "correlated_neurons_l1": [],
            "correlated_neurons_pearson": [], "correlated_features_indices": [],
            "correlated_features_l1": [], "correlated_features_pearson": [],
            **_logits(head, vectors[i], decode),
            "frac_nonzero": float(found.statistics.density[i]),
            **_bars("freq", found.histogram[i], 0.0, float(found.statistics.max[i])),
            "n_prompts_total": facts.n_samples, "n_tokens_in_prompt": facts.n_tokens,
            "dataset": facts.dataset, "decoder_weights_dist": [], "vector": [],
            "activations": _contexts(found, i, samples, decode),
        }  # fmt: skip


def _logits(
    head: Head | None, vector: Tensor, decode: Callable[[np.ndarray], list[str]]
) -> dict[str, Any]:
    """Effects of a feature on all logits, with the norm before them frozen at scale 1."""
    if head is None:
        empty = ("neg_str", "neg_values", "pos_str", "pos_values")
        return {**{key: [] for key in empty}, **_bars("logits", np.zeros(0, int), 0.0, 0.0)}
    effects = head.effects(vector[None])[0].cpu()
    n = min(N_LOGITS, len(effects))
    low, high = float(effects.min()), float(effects.max())
    counts = np.histogram(effects.numpy(), bins=BINS, range=(low, high))[0]
    ends = {"pos": effects.topk(n), "neg": effects.topk(n, largest=False)}
    listed = {}
    for name, end in ends.items():
        listed[f"{name}_str"] = decode(end.indices.numpy())
        listed[f"{name}_values"] = _rounded(end.values)
    return {**listed, **_bars("logits", counts, low, high)}


def _bars(name: str, counts: np.ndarray, low: float, high: float) -> dict[str, list[float]]:
    """Heights and middles of the bars of a histogram; none if all counts are zero."""
    if not counts.any():
        counts = counts[:0]
    middles = low + (high - low) * (np.arange(len(counts)) + 0.5) / max(len(counts), 1)
    return {
        f"{name}_hist_data_bar_values": _rounded(middles),
        f"{name}_hist_data_bar_heights": [float(count) for count in counts],
    }


def _contexts(
    found: _Measured, i: int, samples: TextSamples, decode: Callable[[np.ndarray], list[str]]
) -> list[dict[str, Any]]:
    """Contexts of one feature: the strongest, then those of intervals of the activation."""
    statistics, shown = found.statistics, found.shown
    largest = float(statistics.max[i])
    per = found.histogram[i].reshape(INTERVALS, -1).sum(axis=1) / max(statistics.n_rows, 1)
    described = []
    for j, sample in enumerate(shown.sample[i]):
        if sample < 0:
            continue
        tokens = np.asarray(samples.read(int(sample)))
        first = int(shown.first[i, j, 0])
        heat = shown.heat[i, j, :, 0] * (float(shown.scale[i]) / 255)
        tokens, heat = tokens[first : first + len(heat)], heat[: len(tokens) - first]
        place = int(shown.place[i, j, 0]) - first
        values = [float(value) for value in heat]
        values[place] = float(shown.value[i, j])
        interval = min(int(values[place] / max(largest, 1e-30) * INTERVALS), INTERVALS - 1)
        is_top = j < statistics.top
        described.append(
            {
                "bin_min": -1.0 if is_top else interval * largest / INTERVALS,
                "bin_max": largest if is_top else (interval + 1) * largest / INTERVALS,
                "bin_contains": -1.0 if is_top else float(per[interval]),
                "tokens": decode(tokens), "values": _rounded(values),
                "qualifying_token_index": place,
            }
        )  # fmt: skip
    tops = [each for each in described if each["bin_min"] == -1.0]
    others = [each for each in described if each["bin_min"] != -1.0]
    return tops + sorted(others, key=lambda each: -each["bin_min"])


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 3) for value in values]
