"""Verify every checksum of a tree of runs, and that runs were made from the stores beside them.

    mechatlas verify runs

Nothing that the folders name is run or opened but the files themselves. Exits with 2 if a file is
damaged or missing.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from mechatlas.activations.store_manifest import read_entries, store_digest
from mechatlas.app.inputs import checksum_of as checksum_of_dictionary
from mechatlas.app.run_folder import CHECKPOINT, STORE, UNFINISHED, CommandResult
from mechatlas.base import DiskError, UserError
from mechatlas.files import MANIFEST, checksum_file, damaged, lost_manifest, read_manifest
from mechatlas.remote import AT_ONCE, bring, bring_ahead, forget, located, sizes, written
from mechatlas.tensorfiles import checksum_of, read_safetensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Verify every checksum of a tree of runs."""

    folder: Annotated[Positional[Path], arg(metavar="DIR")]
    """Folder with runs, at any depth, or its address: there every file is fetched again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Damage:
    """File that is damaged, missing, or not the one that a run was made from."""

    file: str
    """Path of the file."""
    reason: str
    """Sentence that names the file and the fault."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyResult(CommandResult):
    """Checksums of a tree of runs."""

    runs: int
    """Folders with a manifest."""
    unfinished: int
    """Runs among them that have not ended."""
    files: int
    """Files whose checksum is right."""
    bytes: int
    """Size of these files."""
    without_checksum: int
    """Other files in the tree, of which no manifest states a checksum."""
    parents: int
    """Stores and dictionaries that runs were made from, found with the same checksum."""
    parents_elsewhere: list[str]
    """Runs with a parent that is not where it was and not in the tree."""
    damaged: list[Damage]
    """Files that are damaged or missing."""


def run(config: VerifyConfig) -> VerifyResult:
    """Read every file that a manifest states a checksum of.

    Raises:
        DiskError: There is no such folder.
        UserError: It holds no run.
    """
    if not config.folder.is_dir():
        raise DiskError(f"There is no folder {config.folder}.")
    tree = _Tree()
    for folder, folders, names in os.walk(config.folder):
        folders.sort()
        tree.n_files += len(names)
        if MANIFEST in names or MANIFEST in folders:
            tree.read(Path(folder))
        elif lost := lost_manifest(Path(folder)):
            tree.runs, tree.wrong[Path(folder, MANIFEST)] = tree.runs + 1, lost
    if not tree.runs:
        raise UserError(f"{config.folder} holds no runs: no {MANIFEST} at any depth.")
    for folder, manifest in tree.manifests.items():
        tree.compare_parents(folder, manifest)
    there = [path for path in tree.wrong if os.path.lexists(path) and not path.is_dir()]
    if (at_address := sizes(config.folder)) is not None:  # shards may be gone from the copy again
        tree.n_files = len(at_address)
        there = list(tree.wrong.keys() & {config.folder / name for name in at_address})
    return VerifyResult(
        out=written(config.folder),
        runs=tree.runs,
        unfinished=sum(not each.get("complete", True) for each in tree.manifests.values()),
        files=len(tree.right),
        bytes=sum(tree.right.values()),
        without_checksum=tree.n_files - len(tree.right) - len(there),
        parents=tree.n_parents,
        parents_elsewhere=sorted(tree.elsewhere),
        damaged=[Damage(file=str(path), reason=why) for path, why in tree.wrong.items()],
    )


class _Tree:
    """Everything found in a tree of runs."""

    def __init__(self) -> None:
        self.runs = self.n_files = self.n_parents = 0
        self.manifests: dict[Path, dict[str, Any]] = {}
        self.stores: dict[str, Path] = {}
        self.right: dict[Path, int] = {}
        """Size of each file whose checksum is right."""
        self.wrong: dict[Path, str] = {}
        self.elsewhere: set[str] = set()

    def read(self, folder: Path) -> None:
        """Verify the files of one run."""
        path = folder / MANIFEST
        try:
            manifest = read_manifest(path)
        except UserError as error:
            self.runs, self.wrong[path] = self.runs + 1, str(error)
            return
        if "kind" not in manifest:
            return  # of somebody else
        self.runs += 1
        self.manifests[folder] = manifest
        self.right[path] = path.stat().st_size
        if manifest["kind"] == STORE:
            self.stores[store_digest(path)] = folder
        try:
            stated = dict(_stated(folder, manifest))
        except UserError as error:
            self.wrong[path] = str(error)
            del self.right[path]
            return
        files = [(folder / name, expected) for name, expected in stated.items()]
        forget(file for file, _ in files)  # what lies at the address is verified, not a copy
        for i, each in enumerate(files):
            bring_ahead(dict(files[i + 1 : i + 1 + AT_ONCE]))
            self.verify(*each)
        for part in (CHECKPOINT, UNFINISHED):
            for file in sorted((folder / part).glob("*.safetensors")):
                if manifest["kind"] != STORE:
                    self.verify(file, None)

    def verify(self, file: Path, expected: str | None) -> None:
        """Compare a file with a checksum, or with the one that it carries."""
        try:
            if expected is None:
                tensors, metadata = read_safetensors(file)
                found = checksum_of(tensors, metadata.get("mechatlas", ""))
                right = metadata.get("checksum") in (None, found)
            else:
                bring(file, expected)
                right = checksum_file(file) == expected
            if right:
                self.right[file] = file.stat().st_size
            else:
                own = f"{file} is damaged: its checksum is not that of its content."
                self.wrong[file] = own if expected is None else damaged(file)
        except UserError as error:
            self.wrong[file] = str(error)

    def compare_parents(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Look for the store and the dictionaries that a run was made from."""
        parents: dict[str, str] = manifest.get("parents", {})
        if "store" in parents:
            place = located(str(manifest.get("store", ""))) / MANIFEST
            if parents["store"] in self.stores:
                self.n_parents += 1
            else:
                self._parent(folder, place, parents, store_digest)
        listed = manifest.get("dictionaries", [])
        places = [*(listed if isinstance(listed, list) else []), manifest.get("dictionary")]
        for place in places:
            if isinstance(place, str):
                self._parent(folder, located(place), parents, checksum_of_dictionary)

    def _parent(self, folder: Path, place: Path, parents: dict[str, str], digest: Any) -> None:
        """Compare what is now at the place of a parent with the parent."""
        if not place.is_absolute() or not place.exists():
            self.elsewhere.add(str(folder))
        elif digest(place) in parents.values():
            self.n_parents += 1
        else:
            self.wrong[place] = f"{place} has changed since {folder} was made from it."


def _stated(folder: Path, manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Files of a run with the checksums that its manifest states."""
    if manifest["kind"] == STORE and manifest.get("complete"):
        yield from ((shard.file, shard.xxh3) for shard in read_entries(folder).shards)
    for name, expected in manifest.get("files", {}).items():
        if Path(name).name != name:
            raise DiskError(f"{folder / MANIFEST} names {name!r}, which is not in its folder.")
        if manifest.get("complete", True):
            yield name, expected


def in_words(result: VerifyResult) -> str:
    """Every fault, then the numbers of runs and files."""
    lines = [fault.reason for fault in result.damaged]
    lines += [f"The parents of {run} are not in this tree." for run in result.parents_elsewhere]
    unfinished = f", {result.unfinished} of them unfinished" if result.unfinished else ""
    lines.append(
        f"{result.runs} runs{unfinished}: {result.files:,} files ({result.bytes / 2**20:,.1f} MiB) "
        f"as their manifests say, {len(result.damaged)} damaged or missing, "
        f"{result.without_checksum} without a checksum."
    )
    return "\n".join(lines)


def failed(result: VerifyResult) -> bool:
    """Whether a file is damaged or missing."""
    return bool(result.damaged)
