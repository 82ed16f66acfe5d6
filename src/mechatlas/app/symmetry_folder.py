"""Inputs and output folder of `mechatlas symmetry`.

    execute             a configuration -> its folder and its result
    RunFolder           tables, tensors, manifest and result, and parts kept after an interruption
    read_result         `result.json` of a folder -> `SymmetryResult`
    open_dictionary     a folder or file -> the dictionary and the site that it reads
    open_network        a store -> its network and samples, whose weights are compared

The manifest comes first and says `complete: false` until the command has ended.
"""

import dataclasses
import importlib
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cattrs
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn

from mechatlas import deprecated
from mechatlas.activations.networks import digest
from mechatlas.activations.posing import PoseConfig
from mechatlas.activations.samples import Samples
from mechatlas.activations.store import Store
from mechatlas.app.recipes import as_dict, from_dict, reopen
from mechatlas.app.run_folder import finish, refuse_strangers, write_table, write_tensors
from mechatlas.base import DiskError, RecipeError, StoreError
from mechatlas.dictionaries.formats import load
from mechatlas.files import checksum, read_json, write, write_json

SYMMETRY, DICTIONARY = "symmetry", "dictionary"
MANIFEST, RESULT, UNFINISHED = "manifest.json", "result.json", "unfinished"
SCHEMA = 2
KEYS: dict[str, str] = {
    "alike": "equality_threshold",
    "alignment_null": "null_alignment",
    "alignment_wrong_pose": "wrong_pose_alignment",
    "causal": "interventions",
    "chance_likeness": "chance_similarity",
    "change_if_unchanged": "symmetric_change",
    "change_of_others": "change",
    "repaired": "recovered",
    "repaired_null": "null_recovered",
    "repaired_together": "recovered_by_all",
    "share_of_null": "null_share",
}
"""Key of `result.json` in schema 1 -> key today, at any depth."""
COLUMNS: dict[str, str] = {
    "errors": "standard_errors",
    "likeness": "similarity",
    "stabiliser": "stabilizer",
    "stabiliser_elements": "stabilizer_elements",
    "stabiliser_function": "stabilizer_function",
    "stabiliser_order": "stabilizer_order",
    "swap_alignment": "intervention_alignment",
    "swap_change": "intervention_symmetric_change",
    "swap_null": "intervention_null_alignment",
    "swap_p_value": "intervention_p_value",
    "swap_pose_p_value": "intervention_pose_p_value",
    "swap_pose_q_value": "intervention_pose_q_value",
    "swap_q_value": "intervention_q_value",
    "swap_wrong_pose": "intervention_wrong_pose_alignment",
}
"""Column or tensor in schema 1 -> its name today."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Fields of every command with a folder."""

    out: Path
    """Folder for the result. The same command continues a run that was stopped."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandResult:
    """Fields of every `result.json`."""

    out: str = ""
    """Folder of the run; not in the file."""
    seconds: float = 0.0
    """Process CPU seconds of the command."""
    peak_bytes: int = 0
    """Largest resident memory of the process."""


def execute(command: Any, config: Any) -> Any:
    """Run a command into its folder.

    Args:
        command: A module of `mechatlas.app.commands` with `KIND` and `run(config, folder)`.
        config: Its configuration.

    Returns:
        The result, with the folder, CPU seconds and memory.

    Raises:
        UserError: The input is bad, or the folder holds something else.
    """
    folder = RunFolder(config.out, command.KIND, config)
    return folder.finish(command.run(config, folder))


class RunFolder:
    """Output folder of one run; nothing is written before the first result is there.

    Args:
        path: Folder to write.
        kind: Kind of the folder, for its manifest.
        config: Configuration of the command, a dataclass.

    Raises:
        DiskError: The path is a file, or a folder that holds anything but an earlier run.
    """

    def __init__(self, path: Path, kind: str, config: Any) -> None:
        self.path, self.kind, self.config = path, kind, config
        self._clock = time.process_time()
        self._facts: dict[str, Any] = {}
        self._parents: dict[str, str] = {}
        self._files: dict[str, str] = {}
        refuse_strangers(path, kind)

    def facts(self, **values: Any) -> None:
        """Add plain values to the manifest."""
        self._facts |= values

    def parent(self, name: str, digest: str) -> None:
        """Note the checksum of an input; parts kept of other inputs are not continued."""
        self._parents[name] = digest

    def table(self, name: str, columns: Mapping[str, Any]) -> None:
        """Write columns of equal length as parquet, also under their old names."""
        old = {old: columns[new] for old, new in deprecated.COLUMNS.items() if new in columns}
        self._begin()
        self._files[name] = checksum(write_table(self.path / name, {**columns, **old}))

    def tensors(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write arrays as safetensors."""
        self._begin()
        self._files[name] = checksum(write_tensors(self.path / name, arrays))

    def _begin(self) -> None:
        if not (self.path / MANIFEST).is_file():
            self._write_manifest(complete=False)

    def _write_manifest(self, *, complete: bool) -> None:
        facts = {
            "schema": SCHEMA, "kind": self.kind, "complete": complete, **self._facts,
            "parents": self._parents, "files": self._files,
        }  # fmt: skip
        write_json(self.path / MANIFEST, facts)

    def keep(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a finished part of the work, from which the same command continues."""
        self._begin()
        plain = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
        marks = {"made_from": self._made_from(), "checksum": _checksum_of(plain)}
        write(self.path / UNFINISHED / f"{name}.safetensors", save(plain, metadata=marks))

    def kept(self, name: str) -> dict[str, np.ndarray] | None:
        """Read a part kept by an earlier run of the same configuration and inputs, if whole."""
        try:
            with safe_open(self.path / UNFINISHED / f"{name}.safetensors", "numpy") as file:
                marks = file.metadata() or {}
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None
        expected = {"made_from": self._made_from(), "checksum": _checksum_of(arrays)}
        return arrays if marks == expected else None

    def _made_from(self) -> str:
        config = {key: value for key, value in as_dict(self.config).items() if key != "out"}
        facts = [SCHEMA, self.kind, config, sorted(self._parents.items())]
        return checksum(json.dumps(facts).encode())

    def finish(self, result: Any) -> Any:
        """Write `recipe.toml`, `result.json` and the whole manifest, and delete kept parts.

        Args:
            result: Result of the command.

        Returns:
            The result with the folder, CPU seconds and memory.
        """
        values = dataclasses.asdict(result)
        for name in ("out", "seconds", "peak_bytes"):
            del values[name]
        finished = finish(self.path, self.config, values, self._clock)
        self._write_manifest(complete=True)
        shutil.rmtree(self.path / UNFINISHED, ignore_errors=True)
        names = ("out", "seconds", "peak_bytes")
        return dataclasses.replace(result, **{name: finished[name] for name in names})


def _checksum_of(arrays: Mapping[str, np.ndarray]) -> str:
    parts = (f"{name} {a.dtype} {a.shape}".encode() + a.tobytes() for name, a in arrays.items())
    return checksum("".join(sorted(map(checksum, parts))).encode())


def read_result(folder: Path, kind: str, *, schema: int = SCHEMA) -> Any:
    """Read `result.json` as the result type of the command.

    Args:
        folder: Folder of a finished run.
        kind: Kind of the folder; `commands.KIND` has the result type.
        schema: Schema in the manifest; keys of schema 1 are renamed.

    Raises:
        DiskError: The file is missing, damaged, or does not have the fields of the command.
    """
    values = read_json(folder / RESULT)
    result_type = importlib.import_module(f"mechatlas.app.commands.{kind}").SymmetryResult
    try:
        result = cattrs.structure(_renamed(values) if schema < SCHEMA else values, result_type)
    except (cattrs.BaseValidationError, TypeError, ValueError, AttributeError) as error:
        raise DiskError(f"{folder / RESULT} is not the result of a {kind} ({error}).") from error
    return dataclasses.replace(result, out=str(folder))


def _renamed(value: Any) -> Any:
    """Replace the keys of schema 1 by those of today."""
    if isinstance(value, Mapping):
        return {KEYS.get(key, key): _renamed(item) for key, item in value.items()}
    return [_renamed(item) for item in value] if isinstance(value, list) else value


def renamed_columns(columns: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Replace the names of columns or tensors of schema 1 by those of today."""
    del kind
    return {COLUMNS.get(name, name): values for name, values in columns.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class OpenedDictionary:
    """A dictionary, its manifest and the site that it reads."""

    path: Path
    dictionary: Any
    """A `Dictionary` on the CPU."""
    site: str | None
    """Site that it reads; None where neither the file nor the user says so."""
    manifest: dict[str, Any]
    """Contents of `manifest.json` in its folder; empty where there is none."""
    checksum: str
    """Checksum of its files."""

    def site_in(self, store: Store) -> str:
        """Find the site of a store that the dictionary reads.

        Raises:
            RecipeError: Neither the dictionary nor the user says which, and there are several.
        """
        if self.site is None and len(store.sites) > 1:
            raise RecipeError(
                f"{self.path} does not say which site it reads. Add --site SITE; {store.root} has "
                f"{', '.join(store.sites)}."
            )
        return self.site or store.sites[0]


def open_dictionary(path: Path, *, site: str | None = None) -> OpenedDictionary:
    """Open a dictionary in any supported format.

    Args:
        path: Folder or file.
        site: Site that it reads, where it does not say so itself.

    Raises:
        WeightsError: It cannot be read.
    """
    dictionary, manifest = load(path), manifest_of(path)
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    data = [f for f in files if f.name not in (MANIFEST, "recipe.toml", RESULT, "history.json")]
    marks = checksum("".join(checksum(f.read_bytes()) for f in data).encode())
    stated = manifest.get("site") or getattr(dictionary, "site", None)
    return OpenedDictionary(path, dictionary, site or stated, manifest, marks)


def manifest_of(path: Path) -> dict[str, Any]:
    """Read the manifest in a folder; empty where there is none."""
    file = path / MANIFEST
    return read_json(file) if file.is_file() else {}


class OpenedNetwork(NamedTuple):
    """A network and its samples."""

    network: nn.Module
    samples: Samples


def open_network(store: Store) -> OpenedNetwork:
    """Open the network and the samples that a store was collected from.

    Raises:
        RecipeError: The store was not made by `mechatlas collect`.
        StoreError: The network has other weights now.
        UserError: The network or the samples are no longer there.
    """
    network, samples = reopen(store.manifest["recipe"])
    if digest(network) != store.manifest["network"]:
        raise StoreError(
            f"The network found now has other weights than when {store.root} was made."
        )
    return OpenedNetwork(network, samples)


def poses_of(store: Store) -> PoseConfig:
    """Read the group and the action that a store was collected with.

    Raises:
        StoreError: It was collected in one pose.
    """
    group = store.manifest["recipe"].get("group")
    if group is None:
        raise StoreError(f"The recipe of {store.root} poses nothing.")
    return from_dict(group, PoseConfig, f"The manifest of {store.root}")
