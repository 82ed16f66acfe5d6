"""Estimates of the time, memory and disk of a command, from sizes and a short measurement.

of_collecting    a batch is read, timed and multiplied
of_training      some steps on held-out rows are taken, timed and multiplied
of_matching      entries of the cost matrices, at the speed of this machine's products
of_products      operations of products of matrices, at the same speed
of_work          work that reports its progress is begun, timed and multiplied
expect           say an estimate before the work, or end a dry run with it
in_words         an estimate as a sentence
"""

import dataclasses
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
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
from mechatlas.base import Progress, Site
from mechatlas.dictionaries.training import train
from mechatlas.maths.pricing import KEPT_BYTES

WORTH_SAYING = 60.0
"""Seconds from which on a command says beforehand how long it takes."""
WORTH_MEASURING = 50
"""Batches or tens of steps from which on a measurement beforehand costs little beside the work."""
PROBE_STEPS = 8
"""Steps of training that are timed; the first half is warming up."""
PROBE_SECONDS = 2.0
"""Seconds for which work that reports its progress is timed."""
PROCESS = 400 << 20
"""Bytes of a process that has imported everything."""
PER_ENTRY = 15_000
"""Operations for each entry of a cost matrix, pairing and nulls together (`bench_matching.py` at
4,096 x 512 to 65,536 x 2,304), at rows of up to 1,024 columns; more in proportion beyond."""
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

    def __init__(self, estimate: Estimate, reached: float) -> None:
        """Take an estimate, and the time by the clock `time.monotonic` when it was asked for."""
        super().__init__()
        self.estimate, self.reached = estimate, reached

    def from_beginning(self, began: float) -> Estimate:
        """Estimate with the seconds from when the program began to when it was asked for."""
        seconds = self.estimate.seconds + self.reached - began
        return dataclasses.replace(self.estimate, seconds=seconds)


def expect(estimate: Callable[[], Estimate], *, is_long: bool, dry_run: bool) -> None:
    """Say what a command costs, if that is over a minute, before the work begins.

    Args:
        estimate: Function that makes the estimate, which may take some seconds.
        is_long: Whether the work may be so long that the estimate is worth its time.
        dry_run: Whether the estimate is all that was asked for.

    Raises:
        OnlyEstimate: It is a dry run.
    """
    if not (is_long or dry_run):
        return
    reached, found = time.monotonic(), estimate()
    if dry_run:
        raise OnlyEstimate(found, reached)
    if found.seconds > WORTH_SAYING:
        print(f"mechatlas: {in_words(found)}", file=sys.stderr, flush=True)


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
    return Estimate(
        seconds=seconds * n_poses * len(samples) / n,
        memory=max(PROCESS + bytes_of(network), settings.memory_mib << 20),
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


def of_matching(pairs: Iterable[tuple[tuple[int, int], tuple[int, int]]]) -> Estimate:
    """Estimate matchings from the sizes of the two dictionaries of each: latents and width."""
    entries, largest = 0.0, 0
    for (n_a, d), (n_b, _) in pairs:
        entries += n_a * n_b * max(1.0, d / 1024)
        kept = 4 * n_a * n_b if 4 * n_a * n_b <= KEPT_BYTES else 0
        largest = max(largest, kept + 5 * 4 * d * (n_a + n_b))
    return of_products(PER_ENTRY * entries, memory=largest)


def of_products(operations: float, *, memory: int, disk: int = 0) -> Estimate:
    """Estimate products of matrices from their operations, at the speed of this machine.

    Args:
        operations: Floating-point operations, two for each multiply-add.
        memory: Bytes of the command beyond those of a process.
        disk: Bytes that are written.
    """
    return Estimate(seconds=operations / _products_per_second(), memory=PROCESS + memory, disk=disk)


class _Enough(Exception):  # noqa: N818 - a signal
    """Signal that ends work of which enough was seen, with the seconds of all of it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


def of_work(
    works: Iterable[Callable[[Progress], object]], *, memory: int, disk: int = 0
) -> Estimate:
    """Estimate work that reports its progress from the beginning of each of its parts.

    The first unit of a part, with what is prepared, imported and compiled before, counts once; the
    next ones are timed for some seconds, and count as many times as there are. Whatever is done is
    thrown away.

    Args:
        works: Parts of the work, which may write nothing: callables with a callback for progress.
        memory: Bytes of the command beyond those of a process.
        disk: Bytes that are written.

    Raises:
        UserError: The work cannot be done.
    """
    seconds = sum(map(_seconds_of, works))
    return Estimate(seconds=seconds, memory=PROCESS + memory, disk=disk)


def _seconds_of(work: Callable[[Progress], object]) -> float:
    """Seconds of work, of which only the beginning is done unless it is short."""
    start, first = time.perf_counter(), (0.0, 0)

    def progress(done: int, total: int) -> None:
        nonlocal first
        now = time.perf_counter()
        (since, before), left = first, total - done
        if not before:
            first = now, done
        elif left > 0 and done > before and now - since >= PROBE_SECONDS:
            raise _Enough(now - start + left * (now - since) / (done - before))

    try:
        work(progress)
    except _Enough as end:
        return end.seconds
    return time.perf_counter() - start


def bytes_of(*modules: Any) -> int:
    """Bytes of the weights of networks and dictionaries."""
    parameters = (p for m in modules for p in getattr(m, "parameters", tuple)())
    return sum(p.numel() * p.element_size() for p in parameters)


def _products_per_second() -> float:
    """Floating-point operations a second of a product of float32 matrices."""
    x, seconds = torch.randn(PRODUCT, PRODUCT), []
    for _ in range(8):  # the first one warms up, and others share the core
        start = time.perf_counter()
        torch.mm(x, x)
        seconds.append(time.perf_counter() - start)
    return 2 * PRODUCT**3 / min(seconds)
