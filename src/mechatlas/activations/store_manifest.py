"""Manifest of an activation store: its sites and shards, checked before anything is read.

    read_entries   a folder -> the manifest with its typed entries
    store_digest   a manifest -> the checksum by which runs know their store again

A manifest may come from anywhere: numbers are in range, rows fit into the bytes of their files, and
files lie within the folder, or a `StoreError` names the key.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch

from mechatlas.base import DiskError, StoreError
from mechatlas.files import MANIFEST, Fields, checksum, checksum_file, read_manifest, sealed

SCHEMA = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Split = Literal["train", "held"]


class Shard(NamedTuple):
    """Entry of one file in the manifest."""

    site: str
    split: Split
    file: str
    rows: int
    bytes: int
    xxh3: str


class SiteShape(NamedTuple):
    """Entry of one site in the manifest."""

    width: int
    grid: tuple[int, int]
    """Height and width of the map; (tokens, 1) for texts, (1, 1) for plain vectors."""
    branches: dict[str, tuple[int, int]]
    """First channel of each named branch and the channel after its last; in a store with a
    group, among the channels of one element."""
    places: int | None = None
    """Number of places of the map that may be kept, in a store with a group; else all may."""
    scattered: Mapping[str, list[int]] = MappingProxyType({})
    """Channels of each named branch whose channels do not lie side by side."""

    @property
    def channels(self) -> dict[str, slice | list[int]]:
        """Channels of all named branches."""
        return {name: slice(*ends) for name, ends in self.branches.items()} | {**self.scattered}


class StoreEntries(NamedTuple):
    """Manifest of a finished store, with its typed entries."""

    manifest: dict[str, Any]
    shapes: dict[str, SiteShape]
    shards: list[Shard]


def read_entries(root: Path) -> StoreEntries:
    """Read the manifest of a finished store.

    Raises:
        StoreError: The folder is not a store, its manifest is damaged, or collecting it was never
            finished.
    """
    path = root / MANIFEST
    if not path.is_file():
        raise StoreError(f"{root} is not an activation store: it has no {MANIFEST}.")
    try:
        manifest = read_manifest(path)
    except DiskError as error:
        raise StoreError(str(error)) from error
    fields = Fields(path, manifest, error=StoreError)
    if manifest.get("kind") != "store" or manifest.get("schema") != SCHEMA:
        raise StoreError(
            f"{path} is of kind {manifest.get('kind')!r}, schema {manifest.get('schema')!r}; "
            f"expected an activation store of schema {SCHEMA}."
        )
    if not fields.flag("complete"):
        done = manifest.get("rounds_done")
        n_done = len(done) if isinstance(done, dict) else fields.integer("rounds_done", least=0)
        raise StoreError(
            f"{root} is not finished ({n_done} of "
            f"{fields.integer('rounds')} rounds). Run the same `mechatlas collect` again; it goes "
            "on where it stopped."
        )
    fields.integer("n_samples")
    fields.text("network")
    fields.part("recipe")
    settings, sites = fields.part("settings"), fields.part("sites")
    settings.flag("paired")
    itemsize = DTYPES[settings.one_of("dtype", tuple(DTYPES))].itemsize
    if fields.has("group"):
        group = fields.part("group")
        group.text("name")
        for key in ("table", "elements"):
            if not isinstance(group.values.get(key), list):
                raise group.wrong(key, "a list")
    shapes = {name: _shape(sites.part(name)) for name in sites.values}
    return StoreEntries(manifest, shapes, _shards(fields, shapes, itemsize))


def store_digest(path: Path) -> str:
    """Checksum of a manifest, by which runs that were made from the store know it again.

    Checksums of the files beside the shards are left out: they hold the seconds that it took.

    Args:
        path: Manifest of a store; of any other file the checksum is that of its bytes.

    Raises:
        DiskError: The file cannot be read.
    """
    with contextlib.suppress(DiskError):
        manifest = read_manifest(path)
        if manifest.get("kind") == "store" and "files" in manifest:
            return checksum(sealed({k: v for k, v in manifest.items() if k != "files"}))
    return checksum_file(path)


def _shape(fields: Fields) -> SiteShape:
    """Shape of a site, as the manifest has it."""
    width, branches = fields.integer("width"), fields.part("branches")
    ranges = {name: fields.values["branches"][name] for name in branches.values}
    for name, ends in ranges.items():
        if not _whole(ends, 2) or not 0 <= ends[0] < ends[1] <= width:
            raise branches.wrong(name, f"first channel and channel after the last of {width}")
    scattered = fields.part("scattered").values if fields.has("scattered") else {}
    for name, numbers in scattered.items():
        if not isinstance(numbers, list) or not _whole(numbers, len(numbers)) or not numbers:
            raise branches.wrong(name, "a list of channels")
        if min(numbers) < 0 or max(numbers) >= width or len({*numbers}) < len(numbers):
            raise branches.wrong(name, f"channels of 0 to {width - 1}, each once")
    grid: Any = fields.values.get("grid")
    if not _whole(grid, 2) or min(grid) < 1:
        raise fields.wrong("grid", "two whole numbers of at least 1")
    places = fields.integer("places") if fields.has("places") else None
    return SiteShape(width, tuple(grid), ranges, places, scattered)


def _whole(value: Any, n: int) -> bool:
    """Whether a value is a list of n whole numbers."""
    return isinstance(value, list) and len(value) == n and all(type(each) is int for each in value)


def _shards(fields: Fields, shapes: dict[str, SiteShape], itemsize: int) -> list[Shard]:
    """Entries of the shards, as the manifest has them."""
    entries = fields.values.get("shards")
    if not isinstance(entries, list):
        raise fields.wrong("shards", "a list")
    shards = []
    for number, entry in enumerate(entries):
        one = Fields(fields.file, {"entry": entry}, f"shards[{number}] ", StoreError)
        if not isinstance(entry, list) or len(entry) != len(Shard._fields):
            raise one.wrong("entry", f"a list of {', '.join(Shard._fields)}")
        shard = Shard(*entry)
        texts = (shard.site, shard.split, shard.file, shard.xxh3)
        if not all(isinstance(text, str) for text in texts) or not _whole(entry[3:5], 2):
            raise one.wrong("entry", "texts, and whole numbers for rows and bytes")
        if shard.site not in shapes or shard.split not in ("train", "held"):
            raise one.wrong("entry", "a site of the store, and train or held")
        if Path(shard.file).is_absolute() or ".." in Path(shard.file).parts:
            raise one.wrong("entry", "a file within the store")
        if shard.rows < 1 or shard.rows * shapes[shard.site].width * itemsize > shard.bytes:
            raise one.wrong("entry", "at least one row, and no more than fit into its bytes")
        shards.append(shard)
    return shards
