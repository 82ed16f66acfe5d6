"""Train a dictionary on rows of activations.

The main path is `train`, top to bottom; what one step does is in `steps`, how a run survives
being killed in `checkpoints`. Decoder rows are kept at length 1, and the part of their gradient
along themselves is removed, so that a code's size means something.

Source: Gao et al., Scaling and evaluating sparse autoencoders (2024).
"""

import dataclasses
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechatlas.base import Batch, InputError, NonFiniteError, Progress, Rows, no_progress
from mechatlas.dictionaries import checkpoints
from mechatlas.dictionaries.autoencoder import Autoencoder
from mechatlas.dictionaries.metrics import History, evaluate
from mechatlas.dictionaries.revival import AuxK
from mechatlas.dictionaries.rows import as_rows
from mechatlas.dictionaries.steps import step_for
from mechatlas.files import checksum

MEASUREMENTS = 25
HELD_OUT_ROWS = 4096
DEAD_AFTER_ROWS = 250_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the learning rate changes: up in a line, level, down in a line to almost zero."""

    warm_up: int = 0
    """Steps until the rate is at its largest."""
    decay: float = 0.2
    """Share of the steps, the last ones, in which it falls."""

    def __post_init__(self) -> None:
        if self.warm_up < 0 or not 0 <= self.decay <= 1:
            raise ValueError(
                f"warm_up ({self.warm_up}) must be at least 0, decay ({self.decay}) in 0 to 1."
            )

    def __call__(self, step: int, steps: int) -> float:
        """Share of the largest rate at a step, counted from 0."""
        up = (step + 1) / (self.warm_up + 1)
        down = (steps - step) / (self.decay * steps) if self.decay else 1.0
        return min(1.0, up, down)


def train(
    dictionary: Autoencoder,
    data: Any,
    *,
    steps: int = 10_000,
    batch_size: int = 4096,
    lr: float = 1e-3,
    schedule: Schedule | None = None,
    aux: AuxK | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    checkpoint: Path | str | None = None,
    checkpoint_every: int = 1000,
    on_progress: Progress = no_progress,
) -> Autoencoder:
    """Train with Adam on the squared error.

    Args:
        dictionary: Trained in place.
        data: An array (rows, d_in), a store with one site, or anything that fits `Rows`.
        steps: Optimiser steps.
        batch_size: Rows in a step.
        lr: Largest learning rate.
        schedule: How it changes; by default it falls linearly over the last fifth.
        aux: How dead latents are brought back; by default they are not.
        seed: Seed of the order of rows.
        device: Where to train.
        checkpoint: Folder for the state of the run. If there is one of a run with the same
            settings, that run is continued and ends as if it had never been stopped.
        checkpoint_every: Steps between two checkpoints; one is also written at the end.
        on_progress: Told the number of steps done.

    Returns:
        The same dictionary, with its `history`.

    Raises:
        DiskError: A checkpoint cannot be written.
        InputError: The rows are not as wide as the dictionary, or all are equal.
        NonFiniteError: A row has a NaN or an infinity (nothing was trained on it), or the loss
            became infinite.
        ValueError: `steps`, `batch_size`, `lr` or `checkpoint_every` is not positive.
        WeightsError: The checkpoint is damaged or of a run with other settings.
    """
    if min(steps, batch_size, checkpoint_every) < 1 or not lr > 0:
        raise ValueError(
            f"steps ({steps}), batch_size ({batch_size}), lr ({lr}) and checkpoint_every "
            f"({checkpoint_every}) must be > 0."
        )
    rows = as_rows(data)
    if rows.d_in != dictionary.d_in:
        raise InputError(f"The rows are {rows.d_in} wide, the dictionary reads {dictionary.d_in}.")
    held_out = _checked(rows.held_out(HELD_OUT_ROWS), rows).to(device)
    schedule = schedule or Schedule()
    run = _Run(dictionary.to(device))
    settings: dict[str, Any] = {
        "dictionary": dictionary.extra_repr(),
        "weights at the start": _checksum(dictionary.parameters()),
        "rows": [rows.n_rows, rows.d_in],
        "held-out rows": _checksum([held_out]),
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "schedule": dataclasses.asdict(schedule),
        "aux": None if aux is None else dataclasses.asdict(aux),
    }
    if checkpoint is not None:
        run.resume(Path(checkpoint), settings)
    batches = rows.batches(batch_size, seed=seed, start=run.done)
    clock = time.process_time()
    while run.done < steps:
        x = _checked(next(batches), rows).to(device)
        run.step(x, lr * schedule(run.done, steps), aux)
        on_progress(run.done, steps)
        if run.done % max(1, steps // MEASUREMENTS) == 0 or run.done == steps:
            run.measure(held_out, batch_size, time.process_time() - clock)
            clock = time.process_time()
        if checkpoint is not None and (run.done % checkpoint_every == 0 or run.done == steps):
            run.keep(Path(checkpoint), settings)
    dictionary.history = run.history
    return dictionary


class _Run:
    """A training run: all that changes while it goes on."""

    def __init__(self, dictionary: Autoencoder) -> None:
        self.dictionary = dictionary
        self.take_step = step_for(dictionary)
        self.last_fired = torch.zeros(
            dictionary.n_latents, dtype=torch.long, device=dictionary.W_dec.device
        )
        self.history = History()
        self.done = 0
        self.since = 0  # steps that `history` has not been told the seconds of

    def step(self, x: Tensor, rate: float, aux: AuxK | None) -> None:
        """Train on one batch.

        Raises:
            InputError: All rows of the first batch are equal.
            NonFiniteError: The loss is not finite.
        """
        if self.done == 0:
            _begin(self.dictionary, x)
        dead = None
        if aux is not None:
            silent = (self.done - self.last_fired) * len(x)
            dead = aux, (silent >= aux.dead_after_rows).nonzero()[:, 0]
        loss, fired = self.take_step(x, rate, dead)
        self.done += 1
        self.since += 1
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"The loss became {loss} at step {self.done}: training diverged. Train with a "
                "smaller learning rate, or look for rows of very large activations."
            )
        self.last_fired[fired] = self.done

    def measure(self, held_out: Tensor, batch_size: int, seconds: float) -> None:
        """Add to the history; `seconds` since it was last added to."""
        silent = (self.done - self.last_fired) * batch_size
        dead = silent >= min(DEAD_AFTER_ROWS, self.done * batch_size)
        quality = evaluate(self.dictionary, held_out)
        self.history.step.append(self.done)
        self.history.fvu.append(quality.fvu)
        self.history.l0.append(quality.l0)
        self.history.dead_share.append(float(dead.float().mean()))
        self.history.seconds_per_step.append(seconds / max(1, self.since))
        self.since = 0

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {name: p.data for name, p in self.dictionary.named_parameters()}
        for name, (first, second) in self.take_step.moments.items():
            tensors |= {f"{name}.first": first, f"{name}.second": second}
        return {**tensors, "last_fired": self.last_fired}

    def keep(self, folder: Path, settings: dict[str, Any]) -> None:
        """Write a checkpoint."""
        progress = {"done": self.done, "history": dataclasses.asdict(self.history)}
        checkpoints.keep(folder, self._tensors(), settings, progress)

    def resume(self, folder: Path, settings: dict[str, Any]) -> None:
        """Continue from a checkpoint, if there is one."""
        progress = checkpoints.continued(folder, self._tensors(), settings)
        if progress is not None:
            self.done = self.take_step.n_steps = progress["done"]
            self.history = History(**progress["history"])


def _checksum(tensors: Iterable[Tensor]) -> str:
    return checksum(b"".join(t.detach().cpu().contiguous().numpy().data for t in tensors))


def _begin(dictionary: Autoencoder, x: Tensor) -> None:
    """Start the decoder's bias at the mean.

    Raises:
        InputError: All rows are equal.
    """
    if not (x - x[0]).any():
        raise InputError(
            f"All {len(x)} rows of the first batch are equal: there is nothing to learn. "
            "Is the site constant, or the network without weights?"
        )
    with torch.no_grad():
        dictionary.b_dec.copy_(x.mean(dim=0))


def _checked(batch: Batch, rows: Rows) -> Tensor:
    """The rows of a batch.

    Raises:
        NonFiniteError: One has a NaN or an infinity.
    """
    if not batch.x.sum().isfinite():  # one pass; a NaN or infinity anywhere reaches the sum
        bad = (~batch.x.isfinite()).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            raise NonFiniteError(
                f"The activations hold {batch.x[row, column].item()} at "
                f"{rows.describe(int(batch.row[row]))}, column {column}. Nothing was trained on "
                "this batch; mend or drop the row."
            )
    return batch.x
