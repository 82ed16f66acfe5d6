"""Finished runs that a page is made from.

find_runs    a folder -> every run in it
Run          what a chapter needs of a run: kind, manifest, result, tables, tensors, dictionary
MemoryRun    the same for a run made in Python, which has no folder
Runs         the runs, and what they open to; each network and store is opened once
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mechatlas.activations.store import Store
from mechatlas.activations.store_manifest import store_digest
from mechatlas.app.feature_labels import Labels
from mechatlas.app.inputs import OpenedNetwork, recorded_network
from mechatlas.app.recipes import TrustConfig
from mechatlas.app.run_folder import DICTIONARY, RESULT, STORE, as_plain, read_result
from mechatlas.base import DiskError, StoreError, UserError
from mechatlas.dictionaries.formats import FILE as DICTIONARY_FILE
from mechatlas.dictionaries.formats import load
from mechatlas.files import MANIFEST, read_json, read_manifest
from mechatlas.remote import followed
from mechatlas.tensorfiles import read_arrays, read_table

FROM_PYTHON = (
    "A dictionary saved from Python says neither its site nor its store. Draw it with "
    "ma.report(out, stores=..., dictionaries=..., network=..., samples=...)."
)
"""Reason why a dictionary without a manifest is not on the page."""
IN_REPORT = (
    "Give the network and the samples: ma.report(out, stores=..., network=..., samples=...)."
)
"""Way to the page of a store that was collected from Python."""
DEPTH = 2
"""Levels of folders below the given one that are searched for runs."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Run: a folder with a `manifest.json`."""

    folder: Path
    name: str
    """Path below the folder of the page."""
    manifest: dict[str, Any]
    result: dict[str, Any]
    """Contents of `result.json`; empty if there is none."""

    @property
    def kind(self) -> str:
        """Kind of the run: "store", "dictionary", ..."""
        return str(self.manifest.get("kind", ""))

    @property
    def complete(self) -> bool:
        """Whether the command has ended; version 0.1 wrote the manifest last."""
        return bool(self.manifest.get("complete", True))

    @property
    def network_name(self) -> str:
        """Name of the network in the recipe of the run; empty if there is none.

        Of language models, which all have the same factory, the name of their folder or file.
        """
        network = self.manifest.get("recipe", {}).get("network", "")
        if not isinstance(network, dict):
            return str(network)
        name, arguments = str(network.get("name", "")), network.get("arguments")
        if name == "transformer" and isinstance(arguments, dict) and "path" in arguments:
            return Path(str(arguments["path"])).name.removesuffix(".gguf")
        return name

    def typed_result(self) -> Any:
        """Result of the command, as the type that `run_folder.RESULTS` names for the kind.

        Raises:
            DiskError: It is missing or damaged.
        """
        return read_result(self.folder, self.kind, schema=self.manifest.get("schema", 1))

    def read(self, file: str) -> Any:
        """Read a JSON file of the run; `None` if the run has none.

        Raises:
            DiskError: It is missing or damaged.
        """
        return read_json(self.folder / file) if self.has(file) else None

    def has(self, file: str) -> bool:
        """Whether a file is in the folder, or should be."""
        return _has(self.folder, self.manifest, file)

    def table(self, file: str) -> dict[str, Any]:
        """Read the columns of a parquet file: arrays, and lists where entries are lists.

        Raises:
            DiskError: It is missing or damaged.
        """
        return _columns(read_table(self.folder / file))

    def tensors(self, file: str) -> dict[str, np.ndarray]:
        """Read the arrays of a safetensors file.

        Raises:
            WeightsError: It is missing or damaged.
        """
        return read_arrays(self.folder / file)

    def dictionary(self) -> Any:
        """Read the dictionary of the run.

        Raises:
            WeightsError: It is missing or damaged.
        """
        return load(self.folder)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MemoryRun(Run):
    """Run made in Python; nothing of it is on disk, and its folder is only its name in links."""

    contents: Mapping[str, Any]
    """Tables, tensors and plain values by the name of the file that they would be in."""
    returned: Any
    """Result as the command would return it, or the dictionary."""

    def typed_result(self) -> Any:
        """Result of the command."""
        return self.returned

    def read(self, file: str) -> Any:
        """Plain values; `None` if the run has none of that name."""
        return as_plain(self.contents[file]) if self.has(file) else None

    def has(self, file: str) -> bool:
        """Whether the run has tables, tensors or values of that name."""
        return file in self.contents

    def table(self, file: str) -> dict[str, Any]:
        """Columns of a table: arrays, and lists where entries are lists."""
        return _columns(pa.table(dict(self.contents[file])))

    def tensors(self, file: str) -> dict[str, np.ndarray]:
        """Arrays by name."""
        return dict(self.contents[file])

    def dictionary(self) -> Any:
        """Dictionary of the run."""
        return self.returned


def _columns(table: pa.Table) -> dict[str, Any]:
    return {
        name: column.to_pylist() if pa.types.is_list(column.type) else column.to_numpy()
        for name, column in zip(table.column_names, table.columns, strict=True)
    }


def _as_counted(path: Path) -> list[tuple[bool, int, str]]:
    """Key that sorts layer4 before layer10."""
    parts = re.findall(r"\d+|\D+", str(path))
    return [(p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in parts]


def find_runs(
    folder: Path,
    *,
    visualize: int = 0,
    trust: TrustConfig | None = None,
    labels: Labels | None = None,
) -> "Runs":
    """Find every run in a folder: the folder itself and up to two levels below.

    Runs with a damaged manifest or result are among the problems, and not among the runs.

    Args:
        folder: Where to look.
        visualize: Number of features per dictionary to visualize by activation maximization.
        trust: Code that may run; by default that of bundled networks only.
        labels: Names and notes of features.

    Raises:
        DiskError: There is no such folder.
        UserError: It holds no run that can be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DiskError(f"There is no folder {folder}.")
    runs, problems = [], {}
    for depth in range(DEPTH + 1):
        for path in sorted(folder.glob("*/" * depth + MANIFEST), key=_as_counted):
            name = path.parent.relative_to(folder).as_posix()
            name = folder.resolve().name if name == "." else name
            try:
                if "kind" in (run := read_run(path.parent, name)).manifest:
                    runs.append(run)
            except UserError as error:
                problems[name] = str(error)
        for path in sorted(folder.glob("*/" * depth + DICTIONARY_FILE)):
            if not (path.parent / MANIFEST).exists():
                problems[path.parent.relative_to(folder).as_posix()] = FROM_PYTHON
    if problems and not runs:
        raise UserError(f"{folder} holds no run that can be read: {next(iter(problems.values()))}")
    if not runs:
        raise UserError(
            f"{folder} holds no runs: no manifest.json in it or up to {DEPTH} levels below. "
            "Name the folder that `mechatlas collect` or `mechatlas train` wrote, or the one "
            "around it."
        )
    return Runs(folder, runs, visualize, trust or TrustConfig(), problems, labels=labels)


def read_run(folder: Path, name: str) -> Run:
    """Read the manifest and the result of a run.

    Raises:
        DiskError: One is damaged, or there is no manifest.
    """
    manifest = read_manifest(folder / MANIFEST)
    return Run(folder, name, manifest, _result_of(folder, manifest))


def _has(folder: Path, manifest: dict[str, Any], file: str) -> bool:
    stated = manifest.get("files", {}) if manifest.get("complete", True) else {}
    return file in stated or os.path.lexists(folder / file)


def _result_of(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Contents of `result.json`; empty where the run has none."""
    path = folder / RESULT
    values = read_json(path) if _has(folder, manifest, RESULT) else {}
    if not isinstance(values, dict):
        raise DiskError(f"{path} is a {type(values).__name__} in JSON, expected an object.")
    return values


class Runs:
    """All runs of a page."""

    def __init__(
        self,
        folder: Path,
        runs: list[Run],
        visualize: int,
        trust: TrustConfig,
        problems: dict[str, str],
        opened: OpenedNetwork | None = None,
        labels: Labels | None = None,
    ) -> None:
        """List the runs of a page; nothing is opened yet.

        Args:
            folder: Folder of the page.
            runs: Runs found in the folder.
            visualize: Number of features per dictionary to visualize by activation maximization.
            trust: Code that may run.
            problems: Sentence about each run that is left out, or not drawn whole, by its name.
            opened: Network and samples of all stores; by default those that each store records.
            labels: Names and notes of features, by run and latent.
        """
        self.folder: Path = folder
        self.all: list[Run] = runs
        self.visualize: int = visualize
        self.trust: TrustConfig = trust
        self.problems: dict[str, str] = problems
        self.opened: OpenedNetwork | None = opened
        self.labels: Labels = labels or {}
        self.open_store: Callable[[Path], Store] = functools.cache(Store)
        self.reopen: Callable[[Path], OpenedNetwork] = functools.cache(
            lambda store: (
                opened or recorded_network(self.open_store(store), trust, instead=IN_REPORT)
            )
        )

    def of_kind(self, kind: str) -> list[Run]:
        """List finished runs of one kind, and all stores, in the order of their names."""
        return [run for run in self.all if run.kind == kind and (run.complete or kind == STORE)]

    def dictionary_at(self, folder: Path | str) -> str:
        """Name of the run of the dictionary in a folder; empty where the page does not have it."""
        place = Path(folder).resolve()
        named = (run.name for run in self.of_kind(DICTIONARY) if run.folder.resolve() == place)
        return next(named, "")

    def leave_out(self, make: Callable[["Runs"], Any]) -> bool:
        """Leave out the runs that a chapter cannot be made of, and say why.

        Returns:
            Whether there were any.
        """
        broken = []
        for run in self.all:
            alone = Runs(self.folder, [run], 0, self.trust, {}, self.opened)
            try:
                make(alone)
            except Exception as error:  # damaged values can make a chapter raise anything
                reason = f"{type(error).__name__}: {error}"
                sentence = f"{run.folder} cannot be drawn, its files hold other values ({reason})."
                self.problems[run.name] = str(error) if isinstance(error, UserError) else sentence
                broken.append(run)
        self.all = [run for run in self.all if run not in broken]
        return bool(broken)

    def store_of(self, run: Run) -> Path:
        """Find the folder of the store that a dictionary was trained on.

        A store in the folder of the page with the same manifest is preferred to the path
        that was written down, so that folders can be moved.

        Raises:
            StoreError: It is nowhere to be found.
        """
        wanted = run.manifest.get("parents", {}).get("store")
        for other in self.of_kind(STORE):
            if wanted and store_digest(other.folder / MANIFEST) == wanted:
                return other.folder
        if not run.manifest.get("store"):
            raise StoreError(
                f"{run.name} does not say which store it was trained on. Train it with `mechatlas "
                "train`, or draw it from Python: ma.report(out, stores=..., dictionaries=...)."
            )
        written = followed(str(run.manifest["store"]), run.folder)
        for path in (run.folder / written, self.folder / written, written):
            if (path / MANIFEST).is_file():
                return path
        raise StoreError(f"The store of {run.name} ({written}) is no longer there.")
