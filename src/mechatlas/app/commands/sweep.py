"""Run a command for every combination of the settings that a recipe lists.

    mechatlas sweep sweep.toml --engine processes:2

The recipe is one of `train` in which settings may be lists: `n_latents = [4096, 8192]` and
`k = [16, 32, 64]` are six dictionaries. With `command = "prove"` it is one of `prove`: a list of
`weights` is as many proofs; likewise match, circuit, basis, symmetry, branches, evaluate, effects
and flow. A setting that is a list itself, such as `writes` or `dictionaries`, is varied as a list
of lists. Each run is a folder in `--out`, as its command writes it; the same command does what is
missing.
"""

import contextlib
import dataclasses
import importlib
import itertools
import math
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from mechatlas.activations.networks import folders, looking_in
from mechatlas.app.commands.train import TrainConfig, estimate
from mechatlas.app.engines import EngineConfig, as_engine
from mechatlas.app.estimates import WORTH_MEASURING, Estimate
from mechatlas.app.progress import bar
from mechatlas.app.recipes import TrustConfig, as_dict, from_dict, read_raw, refuse_spoken
from mechatlas.app.run_folder import (
    PLACES,
    RECIPE,
    SWEEP,
    CommandResult,
    RunConfig,
    RunFolder,
    as_plain,
    delete_parts,
    execute,
    read_result,
)
from mechatlas.base import DiskError, RecipeError, UserError
from mechatlas.files import MANIFEST, checksum_file, read_manifest, read_toml, remove

KIND = SWEEP
RUNS = "runs.parquet"
TRAIN = "train"
SWEPT = (
    TRAIN, "prove", "match", "circuit", "basis", "symmetry", "branches", "evaluate", "effects",
    "flow",
)  # fmt: skip
"""Commands that a recipe may be of."""
MEASURED = ("fvu", "fvu_median", "l0", "dead_share", "seconds")
"""Columns of the table of dictionaries that are measured."""
MAX_RUNS = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig(TrustConfig, EngineConfig, RunConfig):
    """Run a command for every combination of the settings that a recipe lists."""

    recipe: Annotated[Positional[Path], arg(metavar="RECIPE.toml")]
    """Recipe of `train`, or of the command that its key `command` names, whose settings may be
    lists."""
    out: Path = Path("sweep")
    """Folder for the runs and the table of all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepResult(CommandResult):
    """Runs of a command, as the table lists them one by one."""

    command: str = TRAIN
    """Command of the runs."""
    n_runs: int
    """Runs of the sweep."""
    n_kept: int
    """Runs that an earlier run of the sweep had finished."""
    varied: list[str]
    """Settings that differ between them."""
    failed: dict[str, str]
    """Reason for each run that failed, by the name of its folder."""
    best: str = ""
    """Dictionary with the smallest fraction of variance unexplained; empty for other commands."""
    best_fvu: float | None = None
    """Its fraction of variance unexplained, on held-out rows; null for other commands."""


def run(config: SweepConfig, folder: RunFolder) -> SweepResult:
    """Do all runs that are missing.

    Raises:
        DiskError: A folder of a run holds something else.
        RecipeError: The recipe has mistakes; nothing was done.
        UserError: The engine cannot run.
    """
    engine = as_engine(config.engine)
    command, varied, runs = _combinations(config)
    done = {name: result for name in runs if (result := _finished(runs[name]))}
    missing = [name for name in runs if name not in done]
    _expect([runs[name] for name in missing], folder)
    folder.begin()  # the folders of runs that follow are this sweep's
    failed: dict[str, str] = {}
    n_kept = len(done)
    pieces = [runs[name] for name in missing]
    with bar(f"{command} of {len(runs)} runs") as step:
        step(n_kept, len(runs))
        for number, (result, problem) in engine.map(_run_one, pieces, shared=folders()):
            name = missing[number]
            if problem:
                failed[name] = problem
            else:
                done[name] = result
            step(len(done) + len(failed), len(runs))
    done = {name: done[name] for name in runs if name in done}  # whoever did them, and when
    folder.table(RUNS, _table(varied, runs, done))
    for name in done:
        folder.parent(name, read_manifest(config.out / name / MANIFEST)["files"][RECIPE])
    fvu = {name: done[name]["fvu"] for name in done if command == TRAIN}
    best = min(fvu, key=lambda name: fvu[name], default="")
    return SweepResult(
        command=command,
        n_runs=len(runs),
        n_kept=n_kept,
        varied=varied,
        failed=dict(sorted(failed.items())),
        best=best,
        best_fvu=fvu[best] if best else None,
    )


def failed(result: SweepResult) -> bool:
    """Whether a run failed."""
    return bool(result.failed)


def in_words(result: SweepResult) -> str:
    """Number of runs, the best of them, and those that failed."""
    kept = f", {result.n_kept} of them by an earlier run" if result.n_kept else ""
    n_done = result.n_runs - len(result.failed)
    did = "dictionaries trained" if result.command == TRAIN else f"runs of {result.command} done"
    lines = [f"{n_done} of {result.n_runs} {did}{kept}."]
    if result.best:
        lines.append(f"Least unexplained variance: {result.best_fvu:.4f}, {result.best}.")
    lines += [f"Failed: {name}: {reason}" for name, reason in result.failed.items()]
    return "\n".join([*lines, f"Table: {result.out}/{RUNS}"])


def _expect(configs: list[Any], folder: RunFolder) -> None:
    """Say what the runs cost, if they are trainings.

    Raises:
        RecipeError: It is a dry run of another command.
    """
    trainings = [config for config in configs if isinstance(config, TrainConfig)]
    if folder.dry_run and len(trainings) < len(configs):
        raise RecipeError("A sweep makes an estimate of trainings only: leave out --dry-run.")
    if trainings:
        is_long = sum(config.steps for config in trainings) >= 10 * WORTH_MEASURING
        folder.expect(lambda: _estimate(trainings), is_long=is_long)


def _combinations(config: SweepConfig) -> tuple[str, list[str], dict[str, Any]]:
    """Command, settings that are varied, and the configuration of each run by its name."""
    raw = read_raw(config.recipe)
    raw.pop("out", None)
    command = raw.pop("command", TRAIN)
    if command not in SWEPT:
        raise RecipeError(f"{config.recipe}: command must be one of {', '.join(SWEPT)}.")
    module = importlib.import_module(f"mechatlas.app.commands.{command}")
    kind = getattr(module, f"{command.title()}Config")
    refuse_spoken(config.recipe, raw, kind)
    lists = {
        key: values
        for key, values in _leaves(raw)
        if isinstance(values, list)
        and (not _is_tuple(kind, key) or any(isinstance(v, list) for v in values))
    }
    if empty := [".".join(key) for key, values in lists.items() if not values]:
        raise RecipeError(f"{config.recipe}: {', '.join(empty)} is an empty list.")
    n_runs = math.prod(map(len, lists.values()))
    if n_runs > MAX_RUNS:
        raise RecipeError(f"{config.recipe} is of {n_runs:,} runs; a sweep may have {MAX_RUNS:,}.")
    trust = {"network": config.network, "trust": config.trust}
    runs: dict[str, Any] = {}
    for values in itertools.product(*lists.values()):
        chosen = dict(zip(lists, values, strict=True))
        name = "_".join(f"{key[-1]}-{_written(v)}" for key, v in chosen.items()) or "all"
        if name in runs:
            raise RecipeError(f"{config.recipe}: two runs would be called {name}.")
        settings = {**_with(raw, chosen), "out": str(config.out / name)}
        made = from_dict(settings, kind, f"{config.recipe} ({name})")
        runs[name] = dataclasses.replace(made, **trust) if isinstance(made, TrustConfig) else made
    return command, [".".join(key) for key in lists], runs


def _leaves(raw: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """Settings of a recipe and of its tables, each with the keys that lead to it."""
    for key, value in raw.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def _is_tuple(kind: type, key: tuple[str, ...]) -> bool:
    """Whether a setting is a list of itself."""
    hints: list[Any] = [kind]
    for name in key:
        parts = [part for hint in hints for part in (hint, *typing.get_args(hint))]
        tables = [part for part in parts if dataclasses.is_dataclass(part)]
        hints = [typing.get_type_hints(table).get(name) for table in tables]
    return any(typing.get_origin(hint) is tuple for hint in hints)


def _with(raw: dict[str, Any], chosen: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """Recipe with one value of each list."""
    made = {k: _with(v, {}) if isinstance(v, dict) else v for k, v in raw.items()}
    for key, value in chosen.items():
        table = made
        for part in key[:-1]:
            table = table[part]
        table[key[-1]] = value
    return made


def _written(value: Any) -> str:
    """Value as a part of a folder's name."""
    text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    return "".join(c if c.isalnum() or c in "+-." else "-" for c in text)


def _finished(config: Any) -> dict[str, Any] | None:
    """Result of a run that is there already, whole and made by the same settings."""
    path = config.out / MANIFEST
    manifest = read_manifest(path) if path.is_file() else {}
    if not manifest.get("complete"):
        return None
    wanted = as_dict(config)
    found = read_toml(config.out / RECIPE)
    same = {k: v for k, v in wanted.items() if k not in PLACES}
    if same != {k: v for k, v in found.items() if k not in PLACES}:
        raise DiskError(
            f"{config.out} holds a run of other settings. Choose another --out, or delete that "
            "folder."
        )
    for name, stated in manifest["files"].items():
        file = config.out / name
        if not file.is_file() or checksum_file(file) != stated:
            return None
    delete_parts(config.out)
    return as_plain(read_result(config.out, manifest["kind"]))


def _run_one(config: Any, beside: tuple[Path, ...]) -> tuple[dict[str, Any], str]:
    """Do one run; its result, or the sentence that says why there is none."""
    sweep = config.out.parent
    deleted = f"{sweep} was deleted or moved meanwhile. Run the command again."
    if not (sweep / MANIFEST).is_file():  # the folder must not come back with half of its files
        return {}, deleted
    try:
        with looking_in(*beside):
            ended = as_plain(execute(config)), ""
    except UserError as error:
        ended = {}, str(error)
    if not (sweep / MANIFEST).is_file():
        remove(config.out)
        with contextlib.suppress(OSError):  # others of its runs may be there
            sweep.rmdir()
        return {}, deleted
    return ended


def _estimate(configs: list[TrainConfig]) -> Estimate:
    """Estimate the cost of all dictionaries from that of the largest, in proportion to sizes."""
    largest = sorted(configs, key=lambda each: -each.n_latents)
    config, found = _first_estimate(largest)
    steps = sum(each.steps * each.batch_size * each.n_latents for each in configs)
    return dataclasses.replace(
        found,
        seconds=found.seconds * steps / (config.steps * config.batch_size * config.n_latents),
        disk=found.disk * sum(each.n_latents for each in configs) // config.n_latents,
    )


def _first_estimate(configs: list[TrainConfig]) -> tuple[TrainConfig, Estimate]:
    """Estimate the first dictionary that can be trained."""
    try:
        return configs[0], estimate(configs[0])
    except UserError:
        if len(configs) == 1:
            raise
        return _first_estimate(configs[1:])


def _table(varied: list[str], runs: dict[str, Any], done: dict[str, Any]) -> dict[str, Any]:
    """Columns of the table: name, settings that are varied, and measurements; failed ones empty."""
    columns: dict[str, Any] = {"name": list(runs)}
    settings = {name: dict(_leaves(as_dict(config))) for name, config in runs.items()}
    for key in varied:
        values = [settings[name].get(tuple(key.split("."))) for name in runs]
        columns[key] = [str(v) if isinstance(v, list) else v for v in values]
    numbers = {name: _numbers(result) for name, result in done.items()}
    trainings = all(isinstance(config, TrainConfig) for config in runs.values())
    measured = MEASURED if trainings else {key: None for each in numbers.values() for key in each}
    for key in measured:
        columns[key] = [numbers[name].get(key) if name in numbers else None for name in runs]
    return columns


def _numbers(result: dict[str, Any]) -> dict[str, Any]:
    """Numbers of a result, and of the pair where it is about a single one."""
    pairs = result.get("pairs", [])
    single = pairs[0] if len(pairs) == 1 else {}
    return {k: v for k, v in {**single, **result}.items() if isinstance(v, int | float)}
