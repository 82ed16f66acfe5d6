"""Estimates of the time, memory and disk of a command, from sizes and a short measurement.

of_collecting    a batch is read, timed and multiplied
of_training      some steps on held-out rows are taken, timed and multiplied
of_matching      entries of the cost matrices, at the speed of this machine's products
in_words         an estimate as a sentence
"""

import dataclasses
import itertools
import math
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechatlas.activations.collect import StoreConfig
from mechatlas.activations.layouts import layouts_of
from mechatlas.activations.networks import as_input
from mechatlas.activations.samples import Samples, first_batch
from mechatlas.activations.sites import read_activations
from mechatlas.app.progress import duration
from mechatlas.base import Site
from mechatlas.dictionaries.training import train

WORTH_SAYING = 60.0
"""Seconds from which on a command says beforehand how long it takes."""
WORTH_MEASURING = 50
"""Batches or tens of steps from which on a measurement beforehand costs little beside the work."""
PROBE_STEPS = 8
"""Steps of training that are timed; the first half is warming up."""
PROCESS = 400 << 20
"""Bytes of a process that has imported everything."""
PER_ENTRY = 22_000
"""Operations for each entry of a cost matrix, pairing and nulls together (`bench_matching.py` at
4,096 x 512 and 8,192 x 1,024), at rows of up to 1,024 columns; more in proportion beyond."""
PRODUCT = 1024
"""Rows of the matrices whose product is timed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Cost of a command from beginning to end, right within a factor of about two."""

    seconds: float
    """Wall seconds on this machine as it is now."""
    memory: int
    """Largest memory of the process, in bytes."""
    disk: int = 0
    """Bytes that are written."""


class OnlyEstimate(Exception):  # noqa: N818 - a signal
    """Signal that ends a dry run, with its estimate."""

    def __init__(self, estimate: Estimate) -> None:
        super().__init__(in_words(estimate))
        self.estimate = estimate


def in_words(estimate: Estimate) -> str:
    """Sentence of time, memory and disk."""
    disk = f" and {_size(estimate.disk)} of disk" if estimate.disk else ""
    return f"About {duration(estimate.seconds)}, {_size(estimate.memory)} of memory{disk}."


def _size(n_bytes: int) -> str:
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{max(n_bytes / (1 << 20), 1):.0f} MiB"


def of_collecting(
    network: nn.Module,
    samples: Samples,
    sites: Sequence[Site],
    settings: StoreConfig,
    n_poses: int,
) -> Estimate:
    """Estimate a collection of activations from one batch.

    Args:
        network: Network.
        samples: Samples that it runs on.
        sites: Sites that are read.
        settings: Settings of the store.
        n_poses: Poses of every sample.

    Raises:
        UserError: The samples cannot be read, or the network not run on them.
    """
    index, first = first_batch(samples, skip_bad=settings.skip_bad)
    n = min(settings.batch_size, len(samples))
    with torch.inference_mode():
        first = as_input(network, first)
        layouts = layouts_of(network, first, sites)
        found = read_activations(network, first, sites)
        start = time.perf_counter()
        read_activations(network, samples.stack([samples.read(index)] * n), sites)
        seconds = time.perf_counter() - start
    sample_bytes, size = 0, torch.empty(0, dtype=getattr(torch, settings.dtype)).element_size()
    for site in sites:
        *grid, width = layouts[site].rows(found[site]).shape[1:]
        n_rows, every = math.prod(grid), settings.positions.rule == "all"
        n_rows = n_rows if every else min(n_rows, settings.positions.per_sample)
        sample_bytes += n_rows * (width * size * n_poses + 12)
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    return Estimate(
        seconds=seconds * n_poses * len(samples) / n,
        memory=max(PROCESS + weights, settings.memory_mib << 20),
        disk=sample_bytes * len(samples),
    )


def of_training(
    dictionary: Any,
    rows: Float[Tensor, "row d"],
    steps: int,
    options: dict[str, Any],
    *,
    seconds_a_row: float = 0.0,
) -> Estimate:
    """Estimate the training of a dictionary from some steps on a few of its rows.

    Args:
        dictionary: Dictionary to take the steps on; not one to be kept.
        rows: Some rows.
        steps: Steps of the whole training.
        options: Further options of `train`.
        seconds_a_row: Seconds of reading a row; those of a store cost little beside a step.

    Raises:
        UserError: The rows do not fit the dictionary.
    """
    stamps: list[float] = []
    times = max(1, -(-2 * options["batch_size"] // max(1, len(rows))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the training itself will say it
        train(
            dictionary, rows.repeat(times, 1), steps=PROBE_STEPS,
            on_progress=lambda *_: stamps.append(time.perf_counter()), **options,
        )  # fmt: skip
    weights = sum(4 * p.numel() for p in dictionary.parameters())
    half = PROBE_STEPS // 2
    step = (stamps[-1] - stamps[half - 1]) / half + seconds_a_row * options["batch_size"]
    return Estimate(
        seconds=steps * step,
        memory=PROCESS + 6 * weights + 16 * options["batch_size"] * rows.shape[1],
        disk=weights,
    )


def of_matching(shapes: Sequence[tuple[int, int]]) -> Estimate:
    """Estimate the matching of consecutive dictionaries from their sizes."""
    seconds, largest = 0.0, 0
    rate = _products_per_second()
    for (n_a, d), (n_b, _) in itertools.pairwise(shapes):
        seconds += n_a * n_b * PER_ENTRY * max(1.0, d / 1024) / rate
        largest = max(largest, 4 * d * (n_a + n_b))
    return Estimate(seconds=seconds, memory=PROCESS + 8 * largest)


def _products_per_second() -> float:
    """Floating-point operations a second of a product of float32 matrices."""
    x, seconds = torch.randn(PRODUCT, PRODUCT), 0.0
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        torch.mm(x, x)
        seconds = time.perf_counter() - start
    return 2 * PRODUCT**3 / seconds
