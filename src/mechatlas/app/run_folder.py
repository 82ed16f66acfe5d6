"""Output folder of a run: recipe, manifest, tables, tensors and result, and parts to resume from.

    execute         the configuration of a command -> its folder and its result
    RunFolder       everything that a command writes, and parts kept after an interruption
    read_result     `result.json` of a folder -> the result type of its command

Every folder holds the data, `recipe.toml`, `manifest.json` and `result.json`. The manifest comes
first and says `complete: false` until the command has ended. Kinds of folders and names of files
are defined here, so that nobody needs to import a command for them.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import cattrs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w
from jaxtyping import Shaped
from safetensors.numpy import save

from mechatlas import deprecated, remote
from mechatlas.app.engines import is_first, n_processes
from mechatlas.app.estimates import Estimate, expect
from mechatlas.app.old_runs import renamed
from mechatlas.app.recipes import as_dict
from mechatlas.base import DiskError, RecipeError, WeightsError
from mechatlas.devices import as_device
from mechatlas.files import (
    MANIFEST,
    SEAL,
    TEMPORARY,
    checksum,
    checksum_file,
    create_folder,
    read_json,
    read_manifest,
    remove,
    write,
    write_json,
    write_manifest,
)
from mechatlas.outputs import Claim, claim
from mechatlas.tensorfiles import checksum_of, read_safetensors

STORE, DICTIONARY, GROUP_NET, PROOF = "store", "dictionary", "group_net", "proof"
EVALUATION, EXPORT, SWEEP, EFFECTS, FLOW = (
    "evaluation",
    "export",
    "sweep",
    "effects",
    "flow",
)
BASIS, MATCHING, SYMMETRY, BRANCHES, CIRCUIT = (
    "basis",
    "matching",
    "symmetry",
    "branches",
    "circuit",
)
RESULTS: dict[str, str] = {
    STORE: "collect:CollectResult",
    DICTIONARY: "train:TrainResult",
    SWEEP: "sweep:SweepResult",
    GROUP_NET: "group_net:GroupNetResult",
    EVALUATION: "evaluate:EvaluateResult",
    EFFECTS: "effects:EffectsResult",
    EXPORT: "export:ExportResult",
    FLOW: "flow:FlowResult",
    BASIS: "basis:BasisResult",
    MATCHING: "match:MatchResult",
    SYMMETRY: "symmetry:SymmetryResult",
    BRANCHES: "branches:BranchesResult",
    CIRCUIT: "circuit:CircuitResult",
    PROOF: "prove:ProveResult",
}
"""Kind of a folder -> command and type of its result."""
RECIPE, RESULT = "recipe.toml", "result.json"
HISTORY = "history.json"
LOGITS, FLOWS = "logits.parquet", "flow.parquet"
FEATURES, SYMMETRY_TENSORS = "features.parquet", "symmetry.safetensors"
MATCHES, TRACKS, COMBINATIONS = "matches.parquet", "tracks.parquet", "combinations.parquet"
EDGES, KERNELS, PICTURES = "edges.parquet", "kernels.safetensors", "pictures.safetensors"
PROOF_FILE, NEURONS = "proof.safetensors", "neurons.json"
DECODER_PICTURE, SPECTRA = "picture.json", "spectra.json"
UNFINISHED, CHECKPOINT = "unfinished", "checkpoint"
"""Folders with the parts of a run that was interrupted."""
NO_ESTIMATE = "There is no estimate of this: leave out --dry-run."
PLACES = ("out", "device", "engine")
"""Fields of a configuration that say where the work is done, not what it is."""
SCHEMA = 2
COST = ("out", "seconds", "peak_bytes")
"""Fields of a result that are known only after the command has ended."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Fields of every command with a folder."""

    out: Path
    """Folder for the result, or an address such as s3://bucket/run. The same command continues a
    run that was stopped."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceConfig(RunConfig):
    """Fields of commands that run a network or train on a chosen device."""

    device: str = "auto"
    """Device to compute on, such as "cpu" or "cuda"; "auto" is the first there is of cuda, mps and
    cpu."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandResult:
    """Fields of every `result.json`."""

    out: str = ""
    """Folder of the run; not in the file."""
    seconds: float = 0.0
    """Process CPU seconds of the command."""
    peak_bytes: int = 0
    """Largest resident memory of the process."""


@runtime_checkable
class Outputs(Protocol):
    """Tables, tensors and plain values of a run: a `RunFolder`, or a run kept in memory."""

    def facts(self, **values: Any) -> None:
        """Add plain values to the manifest."""

    def table(self, name: str, columns: Mapping[str, Any]) -> None:
        """Give columns of equal length."""

    def tensors(self, name: str, arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> None:
        """Give arrays by name."""

    def json(self, name: str, value: Any) -> None:
        """Give a dataclass or plain values."""


def execute(config: Any, *, dry_run: bool = False) -> Any:
    """Run the command of a configuration, into its folder where it has one.

    Args:
        config: Configuration of a command, such as `MatchConfig`.
        dry_run: Whether to stop where the command would say what it costs.

    Returns:
        The result, with the folder, CPU seconds and memory.

    Raises:
        RecipeError: `torchrun` started a command that it is not for.
        OnlyEstimate: It is a dry run.
        UserError: The input is bad, or the folder holds something else.
    """
    command: Any = sys.modules[type(config).__module__]
    if isinstance(config, DeviceConfig):
        as_device(config.device)
    if not hasattr(command, "KIND") or config.out is None:
        here = _at_hand(config)
        if is_estimated := not hasattr(command, "KIND") and hasattr(command, "estimate"):
            expect(lambda: command.estimate(here), is_long=command.is_long(here), dry_run=dry_run)
        if dry_run and not is_estimated:
            raise RecipeError(NO_ESTIMATE)
        clock, result = time.process_time(), command.run(here)
        return _costed(result, clock) if isinstance(result, CommandResult) else result
    if n_processes() > 1 and dry_run:
        raise RecipeError("--dry-run is for one process: leave out torchrun.")
    if n_processes() > 1 and command.KIND != DICTIONARY:
        raise RecipeError("torchrun is for `mechatlas train` alone; other commands have --engine.")
    here = _at_hand(config, is_run=True)
    if not is_first():
        return command.run(here, Follower(here.out))
    with RunFolder(here.out, command.KIND, config, dry_run=dry_run) as folder:
        return folder.finish(command.run(here, folder))


def _at_hand(config: Any, *, is_run: bool = False) -> Any:
    """Configuration with local copies in place of addresses.

    Args:
        config: Configuration of a command.
        is_run: Whether the command writes the folder of a run.
    """
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    here = {name: _fetched(value) for name, value in values.items() if name != "out"}
    if values.get("out") is not None:
        parts = (UNFINISHED, CHECKPOINT)
        out = remote.located(values["out"])
        here["out"] = remote.prepared(values["out"], parts, alone=is_first()) if is_run else out
    changed = {name: value for name, value in here.items() if value != values[name]}
    return dataclasses.replace(config, **changed) if changed else config


def _fetched(value: Any) -> Any:
    """Fetch the paths in a value that are addresses."""
    if isinstance(value, tuple):
        return tuple(map(_fetched, value)) if type(value) is tuple else value
    if isinstance(value, dict):
        return {key: _fetched(each) for key, each in value.items()}
    return remote.fetched(value) if isinstance(value, Path) else value


def _costed(result: CommandResult, clock: float, **fields: str) -> Any:
    """Add CPU seconds since a clock, memory and other fields to a result."""
    seconds = round(time.process_time() - clock, 3)
    return dataclasses.replace(result, seconds=seconds, peak_bytes=peak_bytes(), **fields)


class Follower:
    """Folder of a run as the other processes of `torchrun` see it: the first one writes it."""

    def __init__(self, path: Path) -> None:
        self.path: Path = path

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Do nothing, whatever a `RunFolder` would do."""
        return lambda *_, **__: None


class RunFolder:
    """Output folder of one run, a context in which no other process may write into it.

    Nothing is written before there is something to keep.

    Args:
        path: Folder to write.
        kind: Kind of the folder, for its manifest.
        config: Configuration of the command, a dataclass.
        dry_run: Whether the run ends with its estimate.
    """

    def __init__(self, path: Path, kind: str, config: Any, *, dry_run: bool = False) -> None:
        self.path: Path = path
        self.kind: str = kind
        self.config: Any = config
        self.dry_run = dry_run
        self._clock = time.process_time()
        self._facts: dict[str, Any] = {}
        self._parents: dict[str, str] = {}
        self._files: dict[str, str] = {}
        self._earlier: dict[str, str] = {}
        self._context = contextlib.ExitStack()
        self._claim: Claim

    def __enter__(self) -> "RunFolder":
        """Create the folder if need be, try to write into it, and lock it.

        Raises:
            DiskError: It cannot be written, is being written by another process, or holds anything
                but an earlier run.
        """
        with contextlib.ExitStack() as context:
            self._claim = context.enter_context(claim(self.path))
            refuse_strangers(self.path, self.kind)
            self._earlier = {} if self.kind == STORE else _files_of(self.path)
            self._context = context.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """Let others write again, and delete the folder if it is empty and was made here."""
        self._context.close()

    def expect(self, estimate: Callable[[], Estimate], *, is_long: bool = True) -> None:
        """Say what the command costs, if that is over a minute, before the work begins.

        Raises:
            OnlyEstimate: It is a dry run.
        """
        expect(estimate, is_long=is_long, dry_run=self.dry_run)

    def facts(self, **values: Any) -> None:
        """Add plain values to the manifest."""
        self._facts |= as_plain(values)

    def parent(self, name: str, digest: str) -> None:
        """Note the checksum of an input; parts kept of other inputs are not continued."""
        self._parents[name] = digest

    def table(self, name: str, columns: Mapping[str, Any]) -> None:
        """Write columns of equal length as parquet, also under their old names."""
        old = {old: columns[new] for old, new in deprecated.COLUMNS.items() if new in columns}
        packed = io.BytesIO()
        pq.write_table(pa.table({**columns, **old}), packed)
        self.file(name, packed.getvalue())

    def tensors(self, name: str, arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> None:
        """Write arrays as safetensors."""
        self.file(name, save({key: np.ascontiguousarray(value) for key, value in arrays.items()}))

    def json(self, name: str, value: Any) -> None:
        """Write a dataclass or plain values as JSON; numbers that are not finite become null."""
        self.begin()
        write_json(self.path / name, as_plain(value), make_folder=False)
        self.note(name)

    def file(self, name: str, data: bytes) -> None:
        """Write bytes."""
        self.begin()
        write(self.path / name, data, make_folder=False)
        self._files[name] = checksum(data)

    def note(self, name: str) -> None:
        """Note the checksum of a file of the folder that somebody else wrote."""
        self._files[name] = checksum_file(self.path / name)

    def begin(self) -> None:
        """Say in the manifest that the folder is not complete, before its first file.

        Raises:
            DiskError: The folder was deleted or replaced meanwhile.
            RecipeError: It is a dry run, and no estimate was made.
        """
        self._refuse_dry_run()
        self._claim.check()
        if not self._files and self.kind != STORE:  # a store writes its own manifest
            self._write_manifest(complete=False)

    def _refuse_dry_run(self) -> None:
        """Refuse to write in a dry run, where a command makes no estimate of what was asked."""
        if self.dry_run:
            raise RecipeError(NO_ESTIMATE)

    def _write_manifest(self, *, complete: bool) -> None:
        files = self._files if complete else self._earlier | self._files
        facts = {
            "schema": SCHEMA, "kind": self.kind, "complete": complete, **self._facts,
            "parents": self._parents, "files": files,
        }  # fmt: skip
        write_manifest(self.path / MANIFEST, facts, make_folder=False)

    def _state_in_store(self, files: dict[str, str]) -> None:
        """State the checksums of the files beside the shards, the last thing that is written."""
        path = self.path / MANIFEST
        manifest = read_manifest(path)
        if SEAL in manifest and manifest.get("files", {}) != files:  # not of version 0.1
            others = {key: value for key, value in manifest.items() if key != "files"}
            values = {**others, "files": files} if files else others
            write_manifest(path, values, make_folder=False)

    def keep(self, name: str, arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> None:
        """Keep a finished part of the work, from which the same command continues."""
        self._refuse_dry_run()
        self._claim.check()
        if not (self.path / MANIFEST).is_file():
            self._write_manifest(complete=False)
        plain = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
        marks = {"made_from": self._made_from(), "checksum": checksum_of(plain)}
        file = self.path / UNFINISHED / f"{name}.safetensors"
        create_folder(file.parent)
        write(file, save(plain, metadata=marks), make_folder=False)

    def kept(self, name: str) -> dict[str, Shaped[np.ndarray, "..."]] | None:
        """Read a part kept by an earlier run of the same configuration and inputs, if whole."""
        try:
            tensors, marks = read_safetensors(self.path / UNFINISHED / f"{name}.safetensors")
        except WeightsError:
            return None
        arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
        expected = {"made_from": self._made_from(), "checksum": checksum_of(arrays)}
        return arrays if marks == expected else None

    def _made_from(self) -> str:
        config = as_dict(self.config)
        values = {key: config[key] for key in config if key not in PLACES}
        facts = [SCHEMA, self.kind, values, sorted(self._parents.items())]
        return checksum(json.dumps(facts).encode())

    def finish(self, result: Any) -> Any:
        """Write `recipe.toml`, `result.json` and the whole manifest.

        Kept parts are deleted, and files of an earlier run that this one did not write again.

        Returns:
            The result with the folder, CPU seconds and memory.

        Raises:
            DiskError: The folder, or a file in it, was deleted or replaced meanwhile.
        """
        self._refuse_absent()
        result = _costed(result, self._clock, out=remote.written(self.path))
        values = as_plain(result)
        recipe = as_dict(self.config)
        for place in ("out", "engine"):  # the folder has the same bytes wherever it is made
            recipe.pop(place, None)
        if self.kind == STORE:
            self._state_in_store({})  # those of an earlier run, whose files are replaced now
        self.file(RECIPE, tomli_w.dumps(recipe).encode())
        self.json(RESULT, {key: values[key] for key in values if key != "out"})
        for temporary in self.path.rglob(f"*{TEMPORARY}"):  # of a killed run, of whatever settings
            temporary.unlink(missing_ok=True)
        if self.kind == STORE:  # its folders are sites, and its manifest is written already
            self._state_in_store(self._files)
            return result
        for name in self._earlier.keys() - self._files.keys():
            remove(self.path / name)
        self._write_manifest(complete=True)
        delete_parts(self.path)
        self._refuse_absent()
        return result

    def _refuse_absent(self) -> None:
        """Look for what was written."""
        self._claim.check()
        for name in self._files:
            if not (self.path / name).is_file():
                raise DiskError(
                    f"{self.path / name} was deleted before the command had ended. Run it again."
                )


def delete_parts(path: Path) -> None:
    """Delete the parts kept of a run that has ended; one killed at its very end leaves them."""
    for name in (UNFINISHED, CHECKPOINT):
        if (path / name).is_dir():
            remove(path / name)


def _files_of(path: Path) -> dict[str, str]:
    """Read which files an earlier run wrote into a folder; other names are left out."""
    names = read_manifest(path / MANIFEST).get("files", {}) if (path / MANIFEST).is_file() else {}
    return {n: names[n] for n in names if Path(n).name == n and (path / n).is_file()}


def refuse_strangers(out: Path, kind: str) -> None:
    """Refuse a folder that holds anything but an earlier run of the same kind.

    Raises:
        DiskError: `out` holds something else, or its manifest is damaged.
    """
    inside = {path.name for path in out.iterdir() if not path.name.endswith(TEMPORARY)}
    if inside <= {UNFINISHED, CHECKPOINT} or (kind == STORE and MANIFEST not in inside):
        return  # `collect` knows the folders of its sites
    manifest = out / MANIFEST
    if not os.path.lexists(manifest) or read_manifest(manifest).get("kind") != kind:
        raise DiskError(f"{out} is not empty and is not a {kind}. Choose another --out.")


def read_result(folder: Path, kind: str, *, schema: int = SCHEMA) -> Any:
    """Read `result.json` as the result type of the command.

    Args:
        folder: Folder of a finished run.
        kind: Kind of the folder; `RESULTS` has the result type.
        schema: Schema in the manifest; keys of schema 1 are renamed.

    Raises:
        DiskError: The file is missing, damaged, or does not have the fields of the command.
    """
    values = read_json(folder / RESULT)
    command, _, name = RESULTS[kind].partition(":")
    result_type = getattr(importlib.import_module(f"mechatlas.app.commands.{command}"), name)
    try:
        values = renamed(values, kind) if schema < SCHEMA else values
        result = cattrs.structure(values, result_type)
    except (cattrs.BaseValidationError, KeyError, TypeError, ValueError, AttributeError) as error:
        lines = cattrs.transform_error(error) if isinstance(error, Exception) else []
        raise DiskError(
            f"{folder / RESULT} is not the result of a {kind}: {'; '.join(lines[:3])}. "
            "Run the command that wrote the folder again."
        ) from error
    return dataclasses.replace(result, out=str(folder))


def as_plain(value: Any) -> Any:
    """Make plain values for JSON: dataclasses and named tuples become objects, NaN null.

    Local copies are named by their addresses.
    """
    if isinstance(value, str):
        return remote.written(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: as_plain(item) for key, item in value.items()}
    named: Any = getattr(value, "_asdict", None)
    if named is not None:
        return as_plain(named())
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def peak_bytes() -> int:
    """Largest resident memory that the process had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
