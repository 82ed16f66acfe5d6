"""Room for local copies of what lies at addresses: the files used longest ago are deleted.

    folder       folder of all copies
    use          note that a file is used now; mark and is_version tell versions of a file apart
    keep         a folder that is being written: only shards of stores are deleted there
    hold         keep a file until it is open
    make_room    delete files where the copies have grown too large

`MECHATLAS_CACHE` names the folder, by default ~/.cache/mechatlas, and `MECHATLAS_CACHE_GIB` its
size in GiB. Shards of stores are deleted at any time, other files a day after their last use.
"""

import contextlib
import functools
import os
import re
import threading
import time
from pathlib import Path

import xxhash

from mechatlas.base import DiskError

SIZE_GIB = 20.0
"""Default size of the copies, in GiB."""
LEAST_KEPT = 64
"""Files used last that stay, however large they are: they may be in use."""
YOUNG = 86_400.0
"""Seconds for which a file that is no shard stays after its last use."""
SHARD = re.compile(r"(?:train|held)-\d{5,}\.safetensors")
"""Name of a shard of a store."""
_LOCK = threading.Lock()
_USED: dict[Path, int] = {}
"""Bytes of all copies, by their folder, as far as this process knows."""
_WRITTEN: set[Path] = set()
_OPENED: dict[int, Path] = {}
"""The file that each thread opens next, or has opened last."""


def folder() -> Path:
    """Folder of all local copies."""
    return _folder(os.environ.get("MECHATLAS_CACHE"), os.environ.get("XDG_CACHE_HOME"))


@functools.cache
def _folder(named: str | None, base: str | None) -> Path:
    own = os.path.join(base or os.path.expanduser("~/.cache"), "mechatlas")
    return Path(os.path.realpath(named or own))


def keep(path: Path) -> None:
    """Keep the files of a folder while this process writes it, but for the shards of stores."""
    _WRITTEN.add(path)


def hold(file: Path) -> None:
    """Keep a file until this thread, which is going to open it, holds another."""
    _OPENED[threading.get_ident()] = file


def mark(file: Path, version: str | None) -> None:
    """Note which version of a file this is, in the time of its last change."""
    if version is not None:
        os.utime(file, ns=(time.time_ns(), _time_of(version)))


def is_version(file: Path, size: int, version: str | None) -> bool:
    """Whether a file is there, in this size and version."""
    with contextlib.suppress(OSError):
        status = file.stat()
        same = version is not None and status.st_mtime_ns == _time_of(version)
        return same and status.st_size == size
    return False


def _time_of(version: str) -> int:
    """Time in ns that stands for a version."""
    return xxhash.xxh3_64(version.encode()).intdigest() % 2**60


def use(file: Path) -> None:
    """Note that a file is used now, in the time of its last use alone."""
    with contextlib.suppress(OSError):  # deleted by another process that needs room
        os.utime(file, ns=(time.time_ns(), file.stat().st_mtime_ns))


def make_room(n_bytes: int) -> None:
    """Delete the files used longest ago if the copies are too large.

    Args:
        n_bytes: Size of what has just come.

    Raises:
        DiskError: `MECHATLAS_CACHE_GIB` is no size.
    """
    root, limit = folder(), _limit()
    with _LOCK:
        if root in _USED:
            _USED[root] += n_bytes
        if _USED.get(root, limit + 1) <= limit:
            return
        found: list[tuple[float, int, Path]] = []
        for path in root.rglob("*"):
            with contextlib.suppress(OSError):  # deleted by another process
                if path.is_file():
                    status = path.stat()
                    found.append((status.st_atime, status.st_size, path))
        total, young = sum(size for _, size, _ in found), time.time() - YOUNG
        for used, size, path in sorted(found)[:-LEAST_KEPT] if total > limit else ():
            if total <= 0.9 * limit:
                break
            old = used < young and not _WRITTEN & set(path.parents)
            if (old or SHARD.fullmatch(path.name)) and path not in [*_OPENED.values()]:
                path.unlink(missing_ok=True)
                total -= size
        _USED[root] = total


def _limit() -> int:
    text = os.environ.get("MECHATLAS_CACHE_GIB", str(SIZE_GIB))
    with contextlib.suppress(ValueError, OverflowError):
        if float(text) > 0:
            return int(float(text) * 2**30)
    raise DiskError(f"MECHATLAS_CACHE_GIB is {text!r}, expected a size in GiB above 0.")
