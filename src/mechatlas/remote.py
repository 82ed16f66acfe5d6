"""Addresses: folders in object stores and other file systems, worked on in a local copy.

    located        s3://bucket/run -> the place of its local copy; other paths as they are
    fetched        the same, with the files that lie at the address, but for the shards of stores
    prepared       the same for a folder that is to be written, as an earlier run left it
    bring          one shard, fetched when it is read and checked; bring_ahead before it is read
    upload         a finished file -> its address, by a single put; remove deletes there
    written        a text that names local copies -> the same text with their addresses

The copy of PROTOCOL://PLACE is CACHE/PROTOCOL/PLACE, so that every process can tell one from the
other; `cache` says where that is and keeps it small. Files are put at their address before they get
their name in the copy: what is in the copy is at the address as well.

Addresses are those of fsspec (the extra `remote`), with the credentials and settings that its file
systems read from the environment. What may pass is tried again with growing pauses.
"""

import contextlib
import datetime
import errno
import functools
import hashlib
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

import xxhash

from mechatlas import cache
from mechatlas.base import DiskError

MANIFEST = "manifest.json"
TEMPORARY = ".mechatlas.tmp"
"""Ending of a file that is being written; a killed command leaves one."""
TRIES = 5
"""Attempts at a request, each of which the file system may repeat by itself."""
PAUSE = 0.5
"""Seconds before the second attempt; twice as many before each further one."""
AT_ONCE = 8
"""Files fetched at the same time."""
SETTINGS = (".json", ".yaml", ".yml", ".toml")
"""Endings of the files that are fetched with a single file beside them."""
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/{1,2}(.*)", re.DOTALL)
_FINAL = (
    "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "TokenRetrievalError",
    "UnauthorizedSSOTokenError", "DefaultCredentialsError", "RefreshError",
    "ParamValidationError", "InvalidRegionError",
)  # fmt: skip
"""Errors of the libraries of object stores that another attempt does not mend."""
_GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_Answer = TypeVar("_Answer")


class Listed(NamedTuple):
    """Size of a file at an address, and what tells its version from others."""

    size: int
    version: str | None


class WrongBytesError(OSError):
    """File that arrived otherwise than it was sent."""


def is_address(path: Path | str) -> bool:
    """Whether a path is an address, as a text or as a `Path` makes it; those of the hub are not."""
    parts = _ADDRESS.fullmatch(str(path))
    return parts is not None and parts[1] != "hf"


def located(path: Path | str) -> Path:
    """Find the place of the local copy of an address; any other path is its own place.

    Raises:
        DiskError: The address could lead out of the copy.
    """
    parts = _ADDRESS.fullmatch(str(path))
    if parts is None or parts[1] == "hf":
        return Path(path)
    protocol, place = parts[1], parts[2].strip("/")
    if protocol == "file":
        return Path("/", place)
    _refuse_strange(place, str(path))
    return cache.folder() / protocol / place


def address_of(path: Path) -> str | None:
    """Find the address of a local copy; None for any other path."""
    root, text = f"{cache.folder()}{os.sep}", os.path.abspath(path)
    if not text.startswith(root):
        return None
    protocol, _, place = text.removeprefix(root).replace(os.sep, "/").partition("/")
    return f"{protocol}://{place}"


def written(text: Path | str) -> str:
    """Write addresses in a text in place of local copies, and that of a path with both slashes."""
    parts = _ADDRESS.fullmatch(str(text)) if isinstance(text, Path) else None
    if parts is not None:
        return f"{parts[1]}://{parts[2]}"
    root, text = f"{cache.folder()}{os.sep}", str(text)
    if root not in text:  # much faster for a page than the substitution
        return text
    return re.sub(re.escape(root) + r"([a-z0-9+.-]+)/", r"\1://", text)


def followed(named: str, by: Path) -> Path:
    """Fetch a folder that a file names, from the bucket that the file itself is in.

    Nobody's file makes a command ask other places: there the address is a path that is not there.

    Args:
        named: Path or address in a file.
        by: Path of the file or its folder.
    """
    here = address_of(by)
    if here is None or here.split("/")[:3] != named.split("/")[:3]:
        return Path(named)
    with contextlib.suppress(DiskError):
        return fetched(named)
    return located(named)


def fetched(path: Path | str) -> Path:
    """Fetch a folder or file, unless the local copy has it as it is; other paths are left alone.

    Of a folder these are its own files and those of all runs in it. The shards of stores are
    fetched when they are read. With a single file come the settings beside it.

    Raises:
        DiskError: There is nothing at the address, or it cannot be read.
    """
    local = located(path)
    if not is_address(path) or address_of(local) is None:
        return local
    files = _listed(local)
    if not files:
        raise DiskError(f"There is nothing at {written(str(local))}.")
    if "" in files:
        beside = _listed(local.parent, deep=False)
        settings = {name: beside[name] for name in beside if name.endswith(SETTINGS)}
        _copy(local.parent, {**settings, local.name: files[""]}, deep=False)
        return local
    runs = _runs(files)
    top = {name for name in files if "/" not in name}
    inside = {name for name in files if runs & set(map(str, PurePosixPath(name).parents))}
    _copy(local, {name: files[name] for name in files if name in top | inside})
    return local


def prepared(path: Path | str, parts: Iterable[str] = (), *, alone: bool = True) -> Path:
    """Fetch what an earlier run left in a folder that is to be written, and try to write there.

    Args:
        path: Folder or address; a folder is left alone.
        parts: Names that may lie there without a manifest.
        alone: Whether no other process of this run prepares the same folder.

    Raises:
        DiskError: It holds anything but a run, or cannot be read or written.
    """
    local = located(path)
    address = address_of(local)
    if not is_address(path) or address is None:
        return local
    files = _listed(local)
    if "" in files:
        raise DiskError(f"{address} is a file, expected a folder. Choose another --out.")
    if MANIFEST not in files and {name.split("/")[0] for name in files} - {*parts}:
        raise DiskError(f"{address} is not empty and is no run. Choose another --out.")
    _copy(local, files, delete=alone)
    cache.keep(local)
    if alone:
        system, place = _system(address)
        probe = f"{place}/probe{TEMPORARY}"
        _persist(f"Cannot write {address}", lambda: system.pipe_file(probe, b"\0"))
        with contextlib.suppress(Exception):  # who may write may not delete everywhere
            system.rm_file(probe)
    return local


def sizes(folder: Path) -> Mapping[str, int] | None:
    """List the files at the address of a local copy with their sizes; None for any other folder.

    Raises:
        DiskError: They cannot be listed.
    """
    if address_of(folder) is None:
        return None
    return {name: each.size for name, each in _listed(folder).items()}


def bring(file: Path, expected: str) -> None:
    """Fetch a shard unless the local copy has it; any other file is left alone.

    It stays there until the thread that asked for it asks for another.

    Args:
        file: Shard in the local copy.
        expected: Checksum (xxh3) that the manifest states.

    Raises:
        DiskError: It cannot be fetched, or has another checksum at its address too.
    """
    if address_of(file) is None:
        return
    cache.hold(file)
    with _LOCK:
        coming = _COMING.pop(file, None)
    if coming is not None:
        coming.result()
    _bring(file, expected)


def forget(files: Iterable[Path]) -> None:
    """Delete files of a local copy, which are fetched again when they are asked for."""
    for file in files:
        if address_of(file) is not None:
            file.unlink(missing_ok=True)


def bring_ahead(files: Mapping[Path, str]) -> None:
    """Begin to fetch shards that `bring` will ask for, several at once.

    Args:
        files: Shards in the local copy with their checksums.
    """
    for file, expected in files.items():
        if address_of(file) is None:
            continue
        with _LOCK:
            if file not in _COMING and not file.exists():
                _COMING[file] = _workers().submit(_bring, file, expected)


def upload(source: Path, file: Path) -> None:
    """Put a finished file at the address of another; nothing happens where that has none.

    A put is one request, or several that end in one: half of a file is never there.

    Args:
        source: Finished file.
        file: Place in a local copy where it is going to be.

    Raises:
        DiskError: It cannot be put there; the sentence says why.
    """
    address = address_of(file)
    if address is None:
        return
    system, place = _system(address)
    size = source.stat().st_size

    def put() -> None:
        system.put_file(str(source), place)
        found = _as_listed(system.info(place))
        if found.size != size:
            raise WrongBytesError(f"it has {found.size:,} bytes there, expected {size:,}")
        cache.mark(source, found.version)

    _persist(f"Cannot write {address}", put)
    cache.make_room(size)


def remove(path: Path) -> None:
    """Delete a file or folder at the address of a local copy; nothing happens elsewhere.

    Raises:
        DiskError: It cannot be deleted.
    """
    address = address_of(path)
    if address is None:
        return
    system, place = _system(address)

    def delete() -> None:
        with contextlib.suppress(*_GONE):
            system.rm(place, recursive=True)

    _persist(f"{address} cannot be deleted", delete)


_LOCK = threading.Lock()
_COMING: dict[Path, Future[None]] = {}
"""Shards that are on their way."""


@functools.cache
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(AT_ONCE, thread_name_prefix="mechatlas-fetch")


def _refuse_strange(place: str, address: str) -> None:
    """Refuse a path that could lead out of its folder.

    Raises:
        DiskError: It has empty parts, "..", or characters that no path should have.
    """
    parts = place.split("/")
    if {"", ".", ".."} & set(parts) or "\\" in place or not place.isprintable():
        raise DiskError(f"{address!r:.200} is not a path within a bucket: no empty parts, '..'.")


def _system(address: str) -> tuple[Any, str]:
    """File system of an address, and the path in it.

    Raises:
        DiskError: Its library is not installed, or there is none.
    """
    try:
        import fsspec

        return fsspec.url_to_fs(address)
    except ImportError as error:
        raise DiskError(
            f"{address} needs a library that is not installed ({error}): "
            "pip install 'mechatlas[remote]'."
        ) from error
    except Exception as error:
        raise DiskError(f"{address} cannot be reached: {_reason(error)}.") from error


def _persist(what: str, action: Callable[[], _Answer]) -> _Answer:
    """Do something at an address, again with growing pauses where that may help.

    Args:
        what: Beginning of the sentence for when it does not.
        action: Function that does it.

    Raises:
        DiskError: It failed for good, or again and again.
    """
    for attempt in range(TRIES):
        try:
            return action()
        except DiskError:
            raise
        except Exception as error:  # of many kinds: each file system has its own
            advice = _advice(error)
            if advice is None and attempt < TRIES - 1:
                time.sleep(PAUSE * 2**attempt * random.uniform(0.5, 1.0))
                continue
            again = f" It was tried {TRIES} times; run the same command again to go on."
            raise DiskError(
                f"{what}: {_reason(error)}.{again if advice is None else advice}"
            ) from (error)
    raise AssertionError("there is at least one attempt")


def _advice(error: Exception) -> str | None:
    """Say what to do about an error that another attempt does not mend; None for any other."""
    if isinstance(error, PermissionError) or type(error).__name__ in _FINAL:
        return " Are there credentials, are they still valid, and do they allow it?"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return " Free some space, or set MECHATLAS_CACHE to a folder with room."
    if isinstance(error, _GONE):
        return " Is the name right?"
    if isinstance(error, FileExistsError | NotImplementedError | ImportError | TypeError):
        return ""
    return "" if type(error) is ValueError else None


def _reason(error: BaseException) -> str:
    text = (getattr(error, "strerror", None) or str(error)).strip().split("\n")[0].rstrip(".")
    return text[:200] or type(error).__name__


def _listed(local: Path, *, deep: bool = True) -> dict[str, Listed]:
    """List the files at the address of a local copy, by their paths in it; "" is a single file.

    Raises:
        DiskError: They cannot be listed, or a name could lead out of the folder.
    """
    address = str(address_of(local))
    system, place = _system(address)

    def entries(folder: str) -> list[dict[str, Any]]:
        try:
            return system.ls(folder, detail=True)
        except _GONE:
            return []

    def walk() -> list[dict[str, Any]]:  # fsspec's own leaves out what cannot be listed
        system.invalidate_cache()
        files, folders = [], [place]
        for folder in folders:
            for info in entries(folder):
                if info["type"] != "directory":
                    files.append(info)
                elif deep and info["name"].rstrip("/") != folder:
                    folders.append(info["name"].rstrip("/"))
        return files

    listed = {}
    for info in _persist(f"{address} cannot be read", walk):
        name = info["name"].removeprefix(place).lstrip("/")
        if info["name"].endswith(("/", TEMPORARY)):
            continue
        if name:
            _refuse_strange(name, f"{address}/{name}")
        listed[name] = _as_listed(info)
    return listed


def _as_listed(info: Mapping[str, Any]) -> Listed:
    keys = ("ETag", "etag", "md5Hash", "generation", "mtime", "created")
    found = next((info[key] for key in keys if info.get(key)), None)
    found = found.timestamp() if isinstance(found, datetime.datetime) else found
    return Listed(int(info["size"]), None if found is None else str(found))


def _runs(files: Iterable[str]) -> set[str]:
    """Folders with a manifest among some files."""
    found = (PurePosixPath(name) for name in files)
    return {str(path.parent) for path in found if path.name == MANIFEST}


def _copy(
    folder: Path, files: Mapping[str, Listed], *, deep: bool = True, delete: bool = True
) -> None:
    """Make a local copy have some files of its address, and none that are no longer there.

    Args:
        folder: Folder of the copy.
        files: Files at the address, without those that are not asked for.
        deep: Whether they are all that is asked for of the folder and those in it; else some
            settings beside a file.
        delete: Whether files that are no longer there are deleted from the copy.
    """
    for file in folder.rglob("*") if deep else folder.glob("*"):
        name = file.relative_to(folder).as_posix()
        stale = delete and name not in files and (deep or name.endswith(SETTINGS))
        if stale and file.is_file() and not name.endswith(TEMPORARY) and not _is_there(file):
            file.unlink(missing_ok=True)
    runs = _runs(files)
    coming = []
    for name, listed in files.items():
        path = PurePosixPath(name)
        if cache.SHARD.fullmatch(path.name) is None or str(path.parent.parent) not in runs:
            coming.append(_workers().submit(_get, folder / name, listed))
    for each in coming:
        each.result()


def _is_there(file: Path) -> bool:
    """Whether a file is at its address now: another process may have put it there meanwhile."""
    address = str(address_of(file))
    system, place = _system(address)

    def look() -> bool:
        try:
            system.info(place)
        except _GONE:
            return False
        return True

    return _persist(f"{address} cannot be read", look)


def _get(file: Path, listed: Listed) -> None:
    """Fetch a file unless the local copy has this version of it."""
    if cache.is_version(file, *listed):
        return cache.use(file)
    address = str(address_of(file))
    system, place = _system(address)

    def get(temporary: Path) -> None:
        system.get_file(place, str(temporary))
        size = temporary.stat().st_size
        if size != listed.size:
            raise WrongBytesError(f"{size:,} bytes arrived, expected {listed.size:,}")
        cache.mark(temporary, listed.version)

    return _fetch(file, address, get)


def _bring(file: Path, expected: str) -> None:
    """Fetch a shard unless the local copy has it and it is whole."""
    with contextlib.suppress(OSError):
        if _checksum(file) == expected:
            return cache.use(file)
    address = str(address_of(file))
    system, place = _system(address)

    def get(temporary: Path) -> None:
        system.get_file(place, str(temporary))
        if _checksum(temporary) != expected:
            raise WrongBytesError("its checksum differs from the manifest's")

    return _fetch(file, address, get)


def _fetch(file: Path, address: str, get: Callable[[Path], None]) -> None:
    """Fetch a file under a temporary name, then give it its own.

    Args:
        file: Place in the local copy.
        address: Its address.
        get: Function that fetches and checks it.

    Raises:
        DiskError: It cannot be fetched, or not kept.
    """
    own = f"{file.name}.{os.getpid()}-{threading.get_ident()}{TEMPORARY}"
    temporary = file.with_name(own)

    def attempt() -> None:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        get(temporary)
        os.replace(temporary, file)

    try:
        _persist(f"{address} cannot be read", attempt)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    cache.use(file)
    with contextlib.suppress(OSError):
        cache.make_room(file.stat().st_size)


def _checksum(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, xxhash.xxh3_128).hexdigest()  # type: ignore[arg-type]
