"""Train dictionaries on rows of activations.

The main path is `train`, top to bottom. What one step does is in `engine`: every kind of dictionary
gives its own step, and how a run survives being killed is in `engine.checkpoints`. Atoms are kept
at length 1, and the part of their gradient that would change it is removed, so that a code's size
means something.

While it is trained a dictionary works on scaled rows: the columns of each of its sites have
variance 1 on average. So learning rates and penalties mean the same for every network. At the
end, or when training is interrupted, the scale is taken into the weights.

Source: Gao et al., Scaling and evaluating sparse autoencoders (2024).
"""

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from mechatlas.base import Batch, InputError, NonFiniteError, Progress, Rows, no_progress
from mechatlas.devices import as_device, staged
from mechatlas.dictionaries.autoencoder import LinearCoder, SparseCoder
from mechatlas.dictionaries.engine import checkpoints
from mechatlas.dictionaries.engine.adapter import Adapter, as_coder
from mechatlas.dictionaries.engine.resampling import resample
from mechatlas.dictionaries.engine.sparse_steps import keep_halves
from mechatlas.dictionaries.metrics import History, evaluate
from mechatlas.dictionaries.objective import Objective, Schedule
from mechatlas.dictionaries.revival import AuxK, Resample
from mechatlas.dictionaries.rows import as_rows
from mechatlas.files import checksum
from mechatlas.maths.outliers import OUTLIER_NORMS, farthest, norm_limit, variance_share

MEASUREMENTS = 25
"""Largest number of measurements of a run."""
ROWS_A_MEASURED_ROW = 8
"""Smallest number of rows that are trained on for each row that is measured on meanwhile."""
HELD_OUT_ROWS = 4096
"""Largest number of rows that are measured on."""
DEAD_AFTER_ROWS = 250_000
"""Rows without use after which a latent counts as dead in the history."""

ANGLE, ANGLE_STEPS = 0.06, 1600
"""Angle, in radians, that Adam turns an atom by in a step at most, in a run of so many steps."""
SHORT_RUN = 100
"""Number of steps below which the angle does not grow any more."""
ADAM_RATE = 1e-3
"""Learning rate for modules of other projects."""
DTYPES = ("float32", "bfloat16")
"""Number formats that atoms, encoder and their moments may be kept in."""

Trained = TypeVar("Trained")  # a dictionary, or several
OnMeasure = Callable[[int, dict[str, float]], None]
"""Callback with the number of a dictionary (of several) and the newest entry of its history."""


def no_measure(number: int, entry: dict[str, float]) -> None:
    """Show nothing."""


def train(
    dictionary: Trained,
    data: Any,
    *,
    steps: int = 10_000,
    batch_size: int = 4096,
    lr: float | None = None,
    schedule: Schedule | None = None,
    objective: Objective | None = None,
    revival: AuxK | Resample | None = None,
    outlier_norms: float = OUTLIER_NORMS,
    dtype: str = "float32",
    seed: int = 0,
    device: torch.device | str = "cpu",
    checkpoint: Path | str | None = None,
    checkpoint_every: int = 1000,
    on_measure: OnMeasure = no_measure,
    on_progress: Progress = no_progress,
) -> Trained:
    """Train with Adam on the squared error and the penalty of the sparsity rule.

    Args:
        dictionary: Dictionary that is trained in place. Several are trained in one pass over the
            same batches, each with its own k, kind or seed; on rows of several sites either all
            read all sites, or there is one for each site, in order. A class of your own is a module
            that fits `Dictionary`; it is trained by autograd, or by its own `step(objective)`.
        data: An array (rows, width) or memory map, a tuple of arrays whose rows belong
            together (for a transcoder or crosscoder), a store with one site, an iterable of
            arrays, or anything that fits `Rows`.
        steps: Optimizer steps.
        batch_size: Rows in a step.
        lr: Largest learning rate; by default that of `default_rate`, by width and number of steps.
        schedule: Learning rate and sparsity warm-up; by default the rate falls linearly over the
            last fifth.
        objective: Normalized errors, clipping; by default neither.
        revival: How dead latents are brought back; by default they are not.
        outlier_norms: Median norms beyond which a row is neither trained on nor counted; rows of
            a crosscoder count as outliers where they are at one of its sites; `inf` keeps all.
        dtype: Number format of atoms, encoder and their moments from step to step: "float32", or
            "bfloat16", rounded at random, in half the memory of a GPU (see docs/gpu.md).
        seed: Seed of the order of rows.
        device: Device to train on.
        checkpoint: Folder for the state of the run. If there is one of a run with the same
            settings, that run is continued and ends as if it had never been stopped.
        checkpoint_every: Steps between two checkpoints; one is also written at the end.
        on_measure: Callback for measurements, of which there are at most some twenty-five.
        on_progress: Callback with the number of steps done.

    Returns:
        The same dictionary, or dictionaries, with their `history`.

    Examples:
        >>> import torch
        >>> import mechatlas as ma
        >>> activations = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
        >>> sae = ma.Autoencoder(d_in=16, n_latents=64, sparsity=ma.TopK(k=4))
        >>> sae = ma.train(sae, activations, steps=100, batch_size=256)
        >>> sae.history.fvu[-1] < 0.6
        True

    Raises:
        DiskError: A checkpoint cannot be written, or another process writes into its folder.
        InputError: The rows are not as wide as the dictionary, all are equal, or none is held out;
            or the dictionary has nothing to learn.
        NonFiniteError: A row has a NaN or an infinity (nothing was trained on it), or the loss
            became infinite.
        RecipeError: There is no such device here, or no training in this number format.
        ValueError: `steps`, `batch_size`, `lr` or `checkpoint_every` is not positive.
        WeightsError: The checkpoint is damaged or of a run with other settings.
    """
    _check(dtype, steps=steps, batch_size=batch_size, lr=lr, checkpoint_every=checkpoint_every)
    coders = list(map(as_coder, dictionary if isinstance(dictionary, Sequence) else [dictionary]))
    rows, device = as_rows(data), as_device(device)
    schedule, objective = schedule or Schedule(), objective or Objective()
    held_out = _checked(held := rows.held_out(HELD_OUT_ROWS), rows).to(device)
    runs = [
        _Run(coder, part, held_out, objective, revival, lr, steps, seed, outlier_norms, dtype)
        for coder, part in zip(coders, _columns(coders, rows, held_out), strict=True)
    ]
    _warn_of_outliers(runs, held, rows)
    options = (steps, batch_size, lr, seed, schedule, objective, revival, outlier_norms, dtype)
    settings = _settings(rows, held_out, options)
    done, every = 0, _steps_between_measurements(steps, batch_size, len(held_out))
    with contextlib.ExitStack() as at_the_end:
        if checkpoint is not None:
            at_the_end.enter_context(_files_of(runs).claim(Path(checkpoint)))
        for number, run in enumerate(runs):
            at_the_end.callback(run.finish)
            settings |= {f"{name} {number}": value for name, value in run.begin().items()}
        if checkpoint is not None:
            done = _resume(Path(checkpoint), runs, settings)
        batches = staged(_batches(rows, device, batch_size, seed, done), steps - done, device)
        clock = time.process_time()
        while done < steps:
            batch, on_device = next(batches)
            x, rate = _checked(batch, rows), schedule(done, steps)
            coefficient = schedule.sparsity_coefficient(done, steps)
            for run in runs:
                run.step(x, on_device, rate, coefficient, done / steps)
            done += 1
            on_progress(done, steps)
            if done % every == 0 or done == steps:
                seconds = (time.process_time() - clock) / len(runs)
                for number, run in enumerate(runs):
                    on_measure(number, run.measure(batch_size, seconds))
                clock = time.process_time()
            if checkpoint is not None and (done % checkpoint_every == 0 or done == steps):
                _keep(Path(checkpoint), runs, settings, done)
    return dictionary


class _Run:
    """A dictionary in training: all that changes while it goes on."""

    def __init__(
        self,
        dictionary: SparseCoder | Adapter,
        columns: slice,
        held_out: Tensor,
        objective: Objective,
        revival: AuxK | Resample | None,
        lr: float | None,
        steps: int,
        seed: int,
        outlier_norms: float,
        dtype: str,
    ) -> None:
        self.dictionary, self.revival, self.seed = dictionary, revival, seed
        self.columns = columns  # of a row, that are this dictionary's
        held_out = held_out[:, columns]
        self.module: Any = dictionary.module if isinstance(dictionary, Adapter) else dictionary
        first = next(self.module.parameters())
        self.home = first.device, first.dtype  # where the user has it
        self.module.to(held_out.device)
        if first.dtype in (torch.float16, torch.bfloat16):  # too coarse to add a step to
            self.module.float()
        self.limits = _limits(dictionary, held_out, outlier_norms)
        self.outlier = _outliers(held_out, self.limits)
        self.scale = _scale(dictionary, held_out[~self.outlier])
        self.held_out = held_out  # as they are: scaled ones would take room in every step
        self.halves = dtype == "bfloat16"
        if self.halves:
            keep_halves(dictionary)
        self.take_step = dictionary.step(objective, revival)
        self.last_fired = torch.zeros(
            dictionary.n_latents, dtype=torch.long, device=held_out.device
        )
        self.history = History()
        self.done = 0
        self.unmeasured = 0  # steps since the last measurement
        self.loss: Tensor | float = 0.0  # of the steps since the last check
        self.to_begin = dictionary.untrained
        self.lr = default_rate(dictionary, steps) if lr is None else lr

    def begin(self) -> dict[str, Any]:
        """Go over to scaled rows; return what a checkpoint of this run must agree with."""
        dictionary = self.dictionary
        settings = {
            "dictionary": f"{type(self.module).__name__}({self.module.extra_repr()})",
            "weights at the start": getattr(
                dictionary, "start_id", _checksum(self.module.parameters())
            ),
        }
        if not dictionary.untrained:
            dictionary.rescale(1 / self.scale)
        return settings

    def finish(self) -> None:
        """Go back to rows as they are, to the device of the start and to its precision."""
        if self.halves:
            self.module.float()
        if self.done or not self.to_begin:
            self.dictionary.rescale(self.scale)
        if self.done:
            self.module.history = self.history
        device, dtype = self.home
        self.module.to(device)
        if dtype in (torch.float16, torch.bfloat16):
            self.module.to(dtype)

    def step(
        self,
        at_hand: Tensor,
        x: Tensor,
        rate: float,
        sparsity_coefficient: float,
        part_done: float,
    ) -> None:
        """Train on one batch.

        Args:
            at_hand: Rows where they came from, for what is asked of them before the step.
            x: The same rows on the device.
            rate: Learning rate, as a fraction of the largest.
            sparsity_coefficient: Fraction of the sparsity penalty that counts.
            part_done: Fraction of the training that is done.
        """
        outlier = _outliers(at_hand[:, self.columns], self.limits)
        if outlier.all() and self.done:
            self.done = self.take_step.n_steps = self.done + 1
            return
        x = x[:, self.columns]
        if outlier.any() and not outlier.all():
            x = x.index_select(0, (~outlier).nonzero()[:, 0].to(x.device))
        x = x * self.scale
        if self.done == 0 and self.to_begin:
            _begin(self.dictionary, x)
        dead, revival = None, self.revival
        if revival is not None:
            silent = (self.done - self.last_fired) * len(x)
            latents = (silent >= revival.dead_after_rows).nonzero()[:, 0]
            if isinstance(revival, AuxK):
                dead = revival, latents
            elif self.done and self.done % revival.every == 0 and part_done <= revival.until:
                random = torch.Generator().manual_seed(self.seed * 1_000_003 + self.done)
                if len(latents):  # kinds that cannot have refused to give a step
                    resample(
                        cast(LinearCoder, self.dictionary),
                        latents,
                        self.take_step.moments,
                        x,
                        random,
                    )
                    self.last_fired[latents] = self.done
        rate = self.lr * rate
        loss, fired = self.take_step(x, rate, dead, sparsity_coefficient=sparsity_coefficient)
        self.done += 1
        self.unmeasured += 1
        self.loss += loss
        if x.device.type == "cpu":
            self.check()
        self.last_fired.masked_fill_(fired, self.done)

    def check(self) -> None:
        """Refuse to go on after a loss that is not finite; on a CPU after each step."""
        loss, self.loss = float(self.loss), 0.0
        if not math.isfinite(loss):
            when = "at" if self.held_out.device.type == "cpu" else "at or before"
            raise NonFiniteError(
                f"The loss became {loss} {when} step {self.done}: training diverged. Train with a "
                "smaller learning rate, or look for rows of very large activations."
            )

    def measure(self, batch_size: int, seconds: float) -> dict[str, float]:
        """Add to the history, given the seconds since the last measurement."""
        self.check()
        silent = (self.done - self.last_fired) * batch_size
        dead = silent >= min(DEAD_AFTER_ROWS, self.done * batch_size)
        dictionary = self.dictionary
        x = self.held_out * self.scale
        read, written = x[:, dictionary.reads], x[:, dictionary.writes]
        quality = evaluate(self.module, read, target=written, outlier=self.outlier)
        self.history.step.append(self.done)
        self.history.fvu.append(quality.fvu)
        self.history.fvu_median.append(quality.fvu_median)
        self.history.fvu_with_outliers.append(quality.fvu_with_outliers)
        total = getattr(dictionary, "total", float)  # over the processes that share the latents
        self.history.l0.append(total(quality.l0))
        self.history.dead_share.append(total(int(dead.sum())) / total(len(dead)))
        self.history.seconds_per_step.append(seconds / max(1, self.unmeasured))
        self.unmeasured = 0
        return {name: float(v[-1]) for name, v in dataclasses.asdict(self.history).items()}

    def tensors(self) -> dict[str, Tensor]:
        """Collect all that a checkpoint keeps but the history."""
        tensors = {name: p.data for name, p in self.module.state_dict(keep_vars=True).items()}
        for name, (first, second) in self.take_step.moments.items():
            tensors |= {f"{name}.first": first, f"{name}.second": second}
        return {**tensors, "last_fired": self.last_fired}


def default_rate(dictionary: SparseCoder | Adapter, steps: int) -> float:
    """Compute the learning rate at which an atom turns equally far in a step, whatever its width.

    Adam moves every entry of an atom by about the rate, so an atom of length 1 with d entries
    turns by about the rate times the root of d. Short runs must turn faster and long ones settle:
    the angle falls with the fourth root of the number of steps. Modules of other projects, whose
    units are not known, get the usual rate of Adam.
    """
    if isinstance(dictionary, Adapter):
        return ADAM_RATE
    angle = ANGLE * (ANGLE_STEPS / max(steps, SHORT_RUN)) ** 0.25
    return angle / math.sqrt(dictionary.d_out)


def _tensors(runs: Sequence[_Run]) -> dict[str, Tensor]:
    return {
        f"{number}.{name}": tensor
        for number, run in enumerate(runs)
        for name, tensor in run.tensors().items()
    }


def _files_of(runs: Sequence[_Run]) -> Any:
    """Functions that keep checkpoints, of the dictionary if it is one of several processes."""
    own = [files for run in runs if (files := getattr(run.dictionary, "files", None))]
    if own and len(runs) > 1:
        raise InputError("Dictionaries over several processes are trained one at a time.")
    return own[0] if own else checkpoints


def _keep(folder: Path, runs: Sequence[_Run], settings: dict[str, Any], done: int) -> None:
    """Write a checkpoint."""
    for run in runs:
        run.check()
    histories = [dataclasses.asdict(run.history) for run in runs]
    progress = {"done": done, "histories": histories}
    _files_of(runs).keep(folder, _tensors(runs), settings, progress)


def _resume(folder: Path, runs: Sequence[_Run], settings: dict[str, Any]) -> int:
    """Continue from a checkpoint, if there is one; return the number of steps done."""
    progress = _files_of(runs).continued(folder, _tensors(runs), settings)
    if progress is None:
        return 0
    for run, history in zip(runs, progress["histories"], strict=True):
        run.done = run.take_step.n_steps = progress["done"]
        run.history = History(**history)
    return progress["done"]


def _check(dtype: str, **numbers: int | float | None) -> None:
    """Refuse an unknown number format, and numbers that are given and not positive."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be {' or '.join(DTYPES)}, got {dtype!r}.")
    given = {name: number for name, number in numbers.items() if number is not None}
    if wrong := [f"{name} ({number})" for name, number in given.items() if not number > 0]:
        raise ValueError(f"{', '.join(wrong)} must be > 0.")


def _steps_between_measurements(steps: int, batch_size: int, n_held_out: int) -> int:
    """Steps between two measurements, which cost at most about an eighth of the training."""
    return max(1, steps // MEASUREMENTS, ROWS_A_MEASURED_ROW * n_held_out // batch_size)


def _settings(rows: Rows, held_out: Tensor, options: tuple[Any, ...]) -> dict[str, Any]:
    """Settings that a run can only be continued with."""
    names = ("steps", "batch_size", "lr", "seed", "schedule", "objective", "revival")
    names = (*names, "outliers", "dtype")
    kept: dict[str, Any] = {
        "rows": [rows.n_rows, rows.d_in],
        checkpoints.HELD_OUT: _checksum([held_out]),
    }
    for name, value in zip(names, options, strict=True):
        kept[name] = value if isinstance(value, int | float) else repr(value)
    for name, usual in (("outliers", OUTLIER_NORMS), ("dtype", repr("float32"))):
        if kept[name] == usual:  # checkpoints of older versions do not state it
            del kept[name]
    return kept


def _checksum(tensors: Iterable[Tensor]) -> str:
    whole = (t.detach().cpu().contiguous().flatten().view(torch.uint8) for t in tensors)
    return checksum(b"".join(part.numpy().data for part in whole))


def _columns(coders: Sequence[SparseCoder | Adapter], rows: Rows, held_out: Tensor) -> list[slice]:
    """Columns of a row that each dictionary is trained on."""
    if not len(held_out):
        raise InputError("There are no held-out rows to measure on; collect more than one sample.")
    wrong = [coder.width for coder in coders if coder.width != rows.d_in]
    if not wrong:
        return [slice(None)] * len(coders)
    parts: Sequence[slice] = getattr(rows, "parts", ())
    if len(parts) < 2:
        raise InputError(f"The rows are {rows.d_in} wide, the dictionary reads {wrong[0]}.")
    widths = [part.stop - part.start for part in parts]
    if widths != [coder.width for coder in coders]:
        raise InputError(
            f"The rows have sites of {', '.join(map(str, widths))} columns, the dictionaries read "
            f"{', '.join(str(coder.width) for coder in coders)}; give one dictionary for each site."
        )
    return list(parts)


def _limits(
    dictionary: SparseCoder | Adapter, x: Tensor, outlier_norms: float
) -> list[tuple[slice, float]]:
    """Norm beyond which a row is an outlier, for the columns of each site."""
    reads, writes = dictionary.reads, dictionary.writes
    sites = dictionary.sites or ([reads] if reads == writes else [reads, writes])
    norms = [torch.linalg.vector_norm(x[:, site], dim=1) for site in sites]
    return [(s, norm_limit(n, outlier_norms)) for s, n in zip(sites, norms, strict=True)]


def _outliers(x: Tensor, limits: Sequence[tuple[slice, float]]) -> Tensor:
    """Rows that are longer than the limit at one of the sites."""
    outlier = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for site, limit in limits:
        if limit < math.inf:
            dtype = torch.promote_types(x.dtype, torch.float32)
            outlier |= torch.linalg.vector_norm(x[:, site], dim=1, dtype=dtype) > limit
    return outlier


def _warn_of_outliers(runs: Sequence[_Run], held: Batch, rows: Rows) -> None:
    """Warn where a few held-out rows carry most of the variance."""
    for run in runs:
        x, outlier = run.held_out, run.outlier
        ending = "they are neither trained on nor counted in `fvu`"
        if not outlier.any():  # also where all rows are to be kept
            outlier = _outliers(x, _limits(run.dictionary, x, OUTLIER_NORMS))
            ending = "`fvu` says little of all the others"
        some, what = outlier, "are longer than ten median rows and carry"
        if variance_share(x, some) <= 0.5:
            inside = x[~outlier]
            some = torch.zeros_like(outlier)
            some[~outlier] = farthest(inside)
            if variance_share(inside, some[~outlier]) <= 0.5:
                continue
            what, ending = "carry", "`fvu_median` says more of the others than `fvu` does"
        share = variance_share(x, some)
        first = rows.describe(int(held.row[int(some.nonzero()[0])]))
        warnings.warn(
            f"{int(some.sum()):,} of {len(x):,} held-out rows (the first is {first}) {what} "
            f"{share:.0%} of the variance; {ending}.",
            stacklevel=3,
        )


def _scale(dictionary: SparseCoder | Adapter, x: Tensor) -> Tensor:
    """Factor of each column with which the columns of its site have variance 1 on average."""
    scale = x.new_ones(x.shape[1])
    if len(x) > 1:
        for site in dictionary.sites:
            variance = x[:, site].var(dim=0).mean()
            if variance > 0:
                scale[site] = variance.rsqrt()
    return scale


def _begin(dictionary: SparseCoder | Adapter, x: Tensor) -> None:
    """Initialize from the first batch."""
    if not (x - x[0]).any():
        raise InputError(
            f"All {len(x)} rows of the first batch are equal: there is nothing to learn. "
            "Is the site constant, or the network without weights?"
        )
    dictionary.initialize(x)


def _batches(
    rows: Rows, device: torch.device, batch_size: int, seed: int, start: int
) -> Iterator[Batch]:
    """Batches from a step on: for a GPU, as they are stored, which is less to copy."""
    stored = getattr(rows, "stored_batches", None) if device.type == "cuda" else None
    return (stored or rows.batches)(batch_size, seed=seed, start=start)


def _checked(batch: Batch, rows: Rows) -> Tensor:
    """Rows of a batch without NaN and infinities."""
    if not batch.x.sum(
        dtype=torch.float32
    ).isfinite():  # one pass; a NaN or infinity anywhere reaches the sum
        bad = (~batch.x.isfinite()).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            raise NonFiniteError(
                f"The activations hold {batch.x[row, column].item()} at "
                f"{rows.describe(int(batch.row[row]))}, column {column}. Nothing was trained on "
                "this batch; mend or drop the row."
            )
    return batch.x
