"""Train a dictionary on rows of activations.

The main path is `train`, top to bottom; what one step does is in `steps`. Decoder rows are
kept at length 1, and the part of their gradient along themselves is removed, so that a code's
size means something.

Source: Gao et al., Scaling and evaluating sparse autoencoders (2024).
"""

import math
import time
from typing import Any

import torch
from torch import Tensor

from mechatlas.base import Batch, InputError, NonFiniteError, Progress, Rows, no_progress
from mechatlas.dictionaries.autoencoder import Autoencoder
from mechatlas.dictionaries.metrics import History, evaluate
from mechatlas.dictionaries.rows import as_rows
from mechatlas.dictionaries.steps import step_for

MEASUREMENTS = 40
HELD_OUT_ROWS = 4096
DEAD_AFTER_ROWS = 250_000


def train(
    dictionary: Autoencoder,
    data: Any,
    *,
    steps: int = 10_000,
    batch_size: int = 4096,
    lr: float = 1e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_progress: Progress = no_progress,
) -> Autoencoder:
    """Train with Adam on the squared error; the rate falls linearly over the last fifth.

    Args:
        dictionary: Trained in place.
        data: An array (rows, d_in), a store with one site, or anything that fits `Rows`.
        steps: Optimiser steps.
        batch_size: Rows in a step.
        lr: Largest learning rate.
        seed: Seed of the order of rows.
        device: Where to train.
        on_progress: Told the number of steps done.

    Returns:
        The same dictionary, with its `history`.

    Raises:
        InputError: The rows are not as wide as the dictionary, or all are equal.
        NonFiniteError: A row has a NaN or an infinity (nothing was trained on it), or the loss
            became infinite.
        ValueError: `steps`, `batch_size` or `lr` is not positive.
    """
    if steps < 1 or batch_size < 1 or not lr > 0:
        raise ValueError(f"steps ({steps}), batch_size ({batch_size}) and lr ({lr}) must be > 0.")
    rows = as_rows(data)
    if rows.d_in != dictionary.d_in:
        raise InputError(f"The rows are {rows.d_in} wide, the dictionary reads {dictionary.d_in}.")
    held_out = _checked(rows.held_out(HELD_OUT_ROWS), rows)
    dictionary.to(device)
    take_step = step_for(dictionary)
    last_fired = torch.zeros(dictionary.n_latents, dtype=torch.long, device=device)
    history = History()
    clock = time.process_time()
    for step, batch in zip(range(steps), rows.batches(batch_size, seed=seed), strict=False):
        x = _checked(batch, rows).to(device)
        if step == 0:
            _begin(dictionary, x)
        rate = lr * min(1.0, (steps - step) / (0.2 * steps))
        loss, fired = take_step(x, rate)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"The loss became {loss} at step {step + 1}: training diverged. Train with a "
                f"smaller learning rate than {lr}, or look for rows of very large activations."
            )
        last_fired[fired] = step + 1
        on_progress(step + 1, steps)
        if (step + 1) % max(1, steps // MEASUREMENTS) == 0 or step + 1 == steps:
            seconds = (time.process_time() - clock) / (step + 1 - (history.step or [0])[-1])
            silent = (step + 1 - last_fired) * batch_size
            dead = silent >= min(DEAD_AFTER_ROWS, (step + 1) * batch_size)
            _measure(history, dictionary, held_out.to(device), step + 1, dead, seconds)
            clock = time.process_time()
    dictionary.history = history
    return dictionary


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


def _measure(
    history: History, dictionary: Autoencoder, held_out: Tensor, step: int, dead: Tensor, s: float
) -> None:
    quality = evaluate(dictionary, held_out)
    history.step.append(step)
    history.fvu.append(quality.fvu)
    history.l0.append(quality.l0)
    history.dead_share.append(float(dead.float().mean()))
    history.seconds_per_step.append(s)
