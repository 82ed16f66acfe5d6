"""Train a dictionary for every combination of the settings that a recipe lists.

    mechatlas sweep sweep.toml --engine processes:2

The recipe is one of `train` in which settings may be lists: `n_latents = [4096, 8192]` and
`k = [16, 32, 64]` are six dictionaries. A setting that is a list itself, such as `writes`, is
varied as a list of lists. Each dictionary is a folder in `--out`, as `train` writes it; the same
command trains what is missing.
"""

import contextlib
import dataclasses
import itertools
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from mechatlas.app.commands.train import TrainConfig, estimate
from mechatlas.app.engines import EngineConfig, as_engine
from mechatlas.app.estimates import WORTH_MEASURING, Estimate
from mechatlas.app.progress import bar
from mechatlas.app.recipes import as_dict, from_dict, read_raw
from mechatlas.app.run_folder import (
    DICTIONARY,
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
MEASURED = ("fvu", "fvu_median", "l0", "dead_share", "seconds")
"""Columns of the table that are measured."""
MAX_RUNS = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig(EngineConfig, RunConfig):
    """Train a dictionary for every combination of the settings that a recipe lists."""

    recipe: Annotated[Positional[Path], arg(metavar="RECIPE.toml")]
    """Recipe of `train` whose settings may be lists."""
    out: Path = Path("sweep")
    """Folder for the dictionaries and the table of all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepResult(CommandResult):
    """Dictionaries that were trained, as the table lists them one by one."""

    n_runs: int
    """Dictionaries of the sweep."""
    n_kept: int
    """Dictionaries that an earlier run of the command had trained."""
    varied: list[str]
    """Settings that differ between them."""
    failed: dict[str, str]
    """Reason for each dictionary that could not be trained, by the name of its folder."""
    best: str = ""
    """Dictionary with the smallest fraction of variance unexplained."""
    best_fvu: float | None = None
    """Its fraction of variance unexplained, on held-out rows."""


def run(config: SweepConfig, folder: RunFolder) -> SweepResult:
    """Train all dictionaries that are missing.

    Raises:
        DiskError: A folder of a dictionary holds something else.
        RecipeError: The recipe has mistakes; nothing was trained.
        UserError: The engine cannot run.
    """
    engine = as_engine(config.engine)
    varied, runs = _combinations(config)
    done = {name: result for name in runs if (result := _trained(runs[name]))}
    missing = [name for name in runs if name not in done]
    if missing:
        configs = [runs[name] for name in missing]
        is_long = sum(config.steps for config in configs) >= 10 * WORTH_MEASURING
        folder.expect(lambda: _estimate(configs), is_long=is_long)
    folder.begin()  # the folders of dictionaries that follow are this sweep's
    failed: dict[str, str] = {}
    n_kept = len(done)
    with bar(f"training {len(runs)} dictionaries") as step:
        step(n_kept, len(runs))
        for number, (result, problem) in engine.map(_train, [runs[n] for n in missing]):
            name = missing[number]
            if problem:
                failed[name] = problem
            else:
                done[name] = result
            step(len(done) + len(failed), len(runs))
    done = {name: done[name] for name in runs if name in done}  # whoever trained them, and when
    folder.table(RUNS, _table(varied, runs, done))
    for name in done:
        folder.parent(name, read_manifest(config.out / name / MANIFEST)["files"][RECIPE])
    best = min(done, key=lambda name: done[name]["fvu"], default="")
    return SweepResult(
        n_runs=len(runs),
        n_kept=n_kept,
        varied=varied,
        failed=dict(sorted(failed.items())),
        best=best,
        best_fvu=done[best]["fvu"] if best else None,
    )


def failed(result: SweepResult) -> bool:
    """Whether a dictionary could not be trained."""
    return bool(result.failed)


def in_words(result: SweepResult) -> str:
    """Number of dictionaries, the best of them, and those that failed."""
    kept = f", {result.n_kept} of them by an earlier run" if result.n_kept else ""
    n_trained = result.n_runs - len(result.failed)
    lines = [f"{n_trained} of {result.n_runs} dictionaries trained{kept}."]
    if result.best:
        lines.append(f"Least unexplained variance: {result.best_fvu:.4f}, {result.best}.")
    lines += [f"Failed: {name}: {reason}" for name, reason in result.failed.items()]
    return "\n".join([*lines, f"Table: {result.out}/{RUNS}"])


def _combinations(config: SweepConfig) -> tuple[list[str], dict[str, TrainConfig]]:
    """Settings that are varied, and the configuration of each dictionary by its name."""
    raw = read_raw(config.recipe)
    raw.pop("out", None)
    lists = {key: values for key, values in _leaves(raw) if _is_varied(key, values)}
    if empty := [".".join(key) for key, values in lists.items() if not values]:
        raise RecipeError(f"{config.recipe}: {', '.join(empty)} is an empty list.")
    n_runs = 1
    for values in lists.values():
        n_runs *= len(values)
    if n_runs > MAX_RUNS:
        raise RecipeError(
            f"{config.recipe} is of {n_runs:,} dictionaries; a sweep may have {MAX_RUNS:,}."
        )
    runs: dict[str, TrainConfig] = {}
    for values in itertools.product(*lists.values()):
        chosen = dict(zip(lists, values, strict=True))
        name = "_".join(f"{key[-1]}-{_written(v)}" for key, v in chosen.items()) or "all"
        if name in runs:
            raise RecipeError(f"{config.recipe}: two dictionaries would be called {name}.")
        settings = {**_with(raw, chosen), "out": str(config.out / name)}
        runs[name] = from_dict(settings, TrainConfig, f"{config.recipe} ({name})")
    return [".".join(key) for key in lists], runs


def _leaves(raw: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """Settings of a recipe and of its tables, each with the keys that lead to it."""
    for key, value in raw.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def _is_varied(key: tuple[str, ...], value: Any) -> bool:
    """Whether a setting is a list of values to try."""
    kinds = typing.get_type_hints(TrainConfig)
    is_tuple = len(key) == 1 and typing.get_origin(kinds.get(key[0])) is tuple
    return isinstance(value, list) and (not is_tuple or any(isinstance(v, list) for v in value))


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


def _trained(config: TrainConfig) -> dict[str, Any] | None:
    """Result of a dictionary that is there already, whole and trained by the same settings."""
    path = config.out / MANIFEST
    manifest = read_manifest(path) if path.is_file() else {}
    if not manifest.get("complete"):
        return None
    wanted = as_dict(config)
    found = read_toml(config.out / RECIPE)
    same = {k: v for k, v in wanted.items() if k not in PLACES}
    if same != {k: v for k, v in found.items() if k not in PLACES}:
        raise DiskError(
            f"{config.out} holds a dictionary of other settings. Choose another --out, or delete "
            "that folder."
        )
    for name, stated in manifest["files"].items():
        file = config.out / name
        if not file.is_file() or checksum_file(file) != stated:
            return None
    delete_parts(config.out)
    return as_plain(read_result(config.out, DICTIONARY))


def _train(config: TrainConfig, shared: None) -> tuple[dict[str, Any], str]:
    """Train one dictionary; its result, or the sentence that says why there is none."""
    del shared
    sweep = config.out.parent
    deleted = f"{sweep} was deleted or moved meanwhile. Run the command again."
    if not (sweep / MANIFEST).is_file():  # the folder must not come back with half of its files
        return {}, deleted
    try:
        ended = as_plain(execute(config)), ""
    except UserError as error:
        ended = {}, str(error)
    if not (sweep / MANIFEST).is_file():
        remove(config.out)
        with contextlib.suppress(OSError):  # others of its dictionaries may be there
            sweep.rmdir()
        return {}, deleted
    return ended


def _estimate(configs: list[TrainConfig]) -> Estimate:
    """Estimate the cost of all dictionaries from that of one, in proportion to their sizes."""
    config, first = _first_estimate(configs)
    steps = sum(each.steps * each.batch_size * each.n_latents for each in configs)
    n_latents = [each.n_latents for each in configs]
    return Estimate(
        seconds=first.seconds * steps / (config.steps * config.batch_size * config.n_latents),
        memory=int(first.memory * max(1.0, max(n_latents) / config.n_latents)),
        disk=first.disk * sum(n_latents) // config.n_latents,
    )


def _first_estimate(configs: list[TrainConfig]) -> tuple[TrainConfig, Estimate]:
    """Estimate the first dictionary that can be trained."""
    try:
        return configs[0], estimate(configs[0])
    except UserError:
        if len(configs) == 1:
            raise
        return _first_estimate(configs[1:])


def _table(
    varied: list[str], runs: dict[str, TrainConfig], done: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Columns of the table: name, settings that are varied, and measurements; failed ones empty."""
    columns: dict[str, Any] = {"name": list(runs)}
    settings = {name: dict(_leaves(as_dict(config))) for name, config in runs.items()}
    for key in varied:
        values = [settings[name].get(tuple(key.split("."))) for name in runs]
        columns[key] = [str(v) if isinstance(v, list) else v for v in values]
    for key in MEASURED:
        columns[key] = [done[name].get(key) if name in done else None for name in runs]
    return columns
