"""Unfinished stores: what a killed or interrupted `collect` left in its folder.

begin_store     the manifest of an unfinished store, or of a new one
RoundResult     what a round gave; the manifest keeps those of all rounds done, in whatever order
finish_store    join the rounds in their order: the manifest of the finished store
refuse_absent   shards that were deleted meanwhile
has_checksum    whether a shard is as the manifest says
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mechatlas import remote
from mechatlas.activations.store import folder_of, read_shard
from mechatlas.activations.store_manifest import Shard
from mechatlas.base import DiskError, InputError, StoreError
from mechatlas.deprecated import renamed_keys
from mechatlas.files import MANIFEST, TEMPORARY, read_manifest, write_manifest


class RoundResult(NamedTuple):
    """Shards that a round of samples gave, and what was left out of it."""

    shards: list[Shard]
    skipped: list[str]
    """Message for each sample that could not be read."""
    left_out: dict[str, int]
    """Positions left out, by reason."""


UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))


def begin_store(out: Path, manifest: dict[str, Any], *, n_bytes: int) -> dict[str, Any]:
    """Read the manifest of the unfinished store in a folder, or write the new one.

    Args:
        out: Folder of the store.
        manifest: Manifest of a new store.
        n_bytes: Size that the new store will have.

    Returns:
        The manifest now in the folder.

    Raises:
        StoreError: The folder holds something else, or a store of another recipe.
        DiskError: The rows cannot fit on the disk, or the folder is not writable.
    """
    path = out / MANIFEST
    if path.exists():
        old = read_manifest(path)
        old["recipe"] = renamed_keys("collect", old["recipe"], quiet=True)
        _state_what_was_done(old, manifest)
        given = ("recipe", "settings", "network", "n_samples", "group")
        made_from = ("schema", "kind", *given, "rounds")
        # The settings say all that [storage] says, and what was chosen where it says nothing.
        stated = [{**m, "recipe": {**m["recipe"], "storage": None}} for m in (old, manifest)]
        differing = [key for key in made_from if stated[0].get(key) != stated[1].get(key)]
        if differing:
            raise StoreError(
                f"{out} holds a store made from another recipe (it differs in "
                f"{', '.join(_differences(old, manifest, differing))}). "
                "Choose another --out, or delete it."
            )
        return old
    # Folders of a run whose manifest was deleted, and files that a command writes beside.
    leftovers = {folder_of(site) for site in manifest["sites"]} | {"recipe.toml", "result.json"}
    if any(p.name not in leftovers for p in out.iterdir() if not p.name.endswith(TEMPORARY)):
        raise StoreError(f"{out} is not empty and is not a store. Choose another --out.")
    if remote.address_of(out) is None:
        _check_space(out, n_bytes)
    write_manifest(path, manifest, make_folder=False)
    return manifest


def _state_what_was_done(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Add to the manifest of an older store the settings that it does not state."""
    before = {"keep_special": True, "skip_first": 0, "skip_tokens": []}
    positions = old["settings"]["positions"]
    old["settings"]["positions"] = positions | {**before, **positions}
    old.setdefault("left_out", new["left_out"])
    if not old["complete"] and isinstance(old["rounds_done"], int):  # of version 0.2: in order
        so_far = RoundResult(old["shards"], old["skipped"], old["left_out"])
        rounds = [so_far, *[([], [], {})] * old["rounds_done"]][: old["rounds_done"]]
        old["rounds_done"] = {str(n): list(each) for n, each in enumerate(rounds)}
        old |= {"shards": [], "skipped": [], "left_out": new["left_out"]}


def rounds_done(manifest: dict[str, Any]) -> list[int]:
    """Numbers of the rounds that are done, of a finished store or another."""
    done = manifest["rounds_done"]
    return list(range(done)) if isinstance(done, int) else sorted(map(int, done))


def note_round(manifest: dict[str, Any], number: int, result: RoundResult) -> None:
    """Note a round that is done in the manifest.

    Args:
        manifest: Manifest of an unfinished store, which is changed.
        number: Number of the round.
        result: What the round gave.
    """
    manifest["rounds_done"][str(number)] = [list(map(list, result.shards)), *result[1:]]


def finish_store(manifest: dict[str, Any]) -> None:
    """Join what the rounds gave in the order of the rounds, whenever each was done.

    Args:
        manifest: Manifest of an unfinished store whose rounds are all done, which is changed.
    """
    done = manifest["rounds_done"]
    for number in range(manifest["rounds"]):
        shards, skipped, left_out = done[str(number)]
        manifest["shards"] += shards
        manifest["skipped"] += skipped
        for reason, n in left_out.items():
            manifest["left_out"][reason] += n
    manifest["rounds_done"], manifest["complete"] = manifest["rounds"], True


def _differences(old: Any, new: Any, keys: Sequence[str], prefix: str = "") -> list[str]:
    differences = []
    for key in keys:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            inner = [k for k in a.keys() | b.keys() if a.get(k) != b.get(k)]
            differences += _differences(a, b, sorted(inner), f"{prefix}{key}.")
        else:
            differences.append(f"{prefix}{key}: {a!r} there, {b!r} here")
    return differences


def _check_space(out: Path, size: int) -> None:
    free = shutil.disk_usage(out).free
    if size > free:
        raise DiskError(
            f"The store needs {_in_words(size)} and {out} has {_in_words(free)} free. "
            "Take fewer positions or samples, dtype = 'float16', or another --out."
        )


def _in_words(size: int) -> str:
    unit, name = next(((u, n) for u, n in UNITS if size >= u), UNITS[-1])
    return f"{size / unit:.4g} {name}"


def refuse_absent(out: Path, manifest: dict[str, Any]) -> None:
    """Look at the sizes of all shards before a store is called complete.

    Raises:
        StoreError: A shard was deleted or cut meanwhile.
    """
    at_address = remote.sizes(out)
    for shard in shards_of(manifest):
        if not has_size(out, shard, at_address):
            raise StoreError(
                f"{out / shard.file} was deleted or changed while the store was being collected. "
                "Run the same command again; it collects what is missing."
            )


def refuse_empty(manifest: dict[str, Any]) -> None:
    """Refuse a store without rows.

    Raises:
        InputError: No sample could be read, or every position is left out.
    """
    if not manifest["shards"]:
        raise InputError(
            f"None of the {manifest['n_samples']} samples could be read."
            if len(manifest["skipped"]) == manifest["n_samples"]
            else "Every position of the samples is left out: they are special tokens, padding or "
            "first tokens. Give longer windows, or set `skip_first` and `keep_special`."
        )


def shards_of(manifest: dict[str, Any]) -> Iterator[Shard]:
    """Entries of the shards that are written, of a finished store or another."""
    entries = list(manifest["shards"])
    if not isinstance(manifest["rounds_done"], int):
        entries += [entry for shards, *_ in manifest["rounds_done"].values() for entry in shards]
    return (Shard(*entry) for entry in entries)


def has_size(out: Path, shard: Shard, at_address: Mapping[str, int] | None = None) -> bool:
    """Whether a shard has the size in the manifest.

    Args:
        out: Folder of the store.
        shard: Entry of the shard.
        at_address: Sizes of all files at the address of a store that has one.
    """
    if at_address is not None:
        return at_address.get(shard.file) == shard.bytes
    path = out / shard.file
    return path.is_file() and path.stat().st_size == shard.bytes


def has_checksum(out: Path, shard: Shard) -> bool:
    """Whether a shard has the checksum in the manifest."""
    try:
        read_shard(out, shard)
    except StoreError:
        return False
    return True
