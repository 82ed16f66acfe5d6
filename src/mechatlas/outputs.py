"""Output folders: tried before any work, and written by one process at a time.

writable           a folder that is created, and that takes a file
claim              the same, and no other process may write into it meanwhile
temporary_folder   a folder that is gone when its context ends
temporary_room     no room for temporary files -> one sentence
"""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from mechatlas.base import DiskError
from mechatlas.files import cannot_write

try:
    import fcntl
except ImportError:  # Windows has no locks of folders: there is none then
    fcntl = None

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that is full, and of a file that is longer than its disk allows."""
PROBE_BYTES = 4096
"""Size of the file that is tried; a full disk takes an empty one."""
_CLAIMED: ContextVar[frozenset["Claim"]] = ContextVar("_CLAIMED", default=frozenset())


class Claim:
    """Folder that this process alone writes."""

    def __init__(self, folder: Path) -> None:
        self.folder: Path = folder
        self._identity = _identity(folder)

    def __eq__(self, other: object) -> bool:
        """Whether both are of one folder, whatever their paths."""
        return isinstance(other, Claim) and self._identity == other._identity

    def __hash__(self) -> int:
        """Hash the folder, not its path."""
        return hash(self._identity)

    def check(self) -> None:
        """Refuse to go on in a folder that was deleted or replaced.

        Raises:
            DiskError: The folder is not the one that was claimed.
        """
        if self._identity != _identity(self.folder):
            raise DiskError(
                f"{self.folder} was deleted, moved or replaced while it was being written. "
                "Run the same command again, and let nothing else change the folder meanwhile."
            )


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Create a folder and try to write into it; delete it at the end if nothing was written.

    Raises:
        DiskError: It cannot be created or written; the message says why.
    """
    made: list[Path] = []
    try:
        made = _create(folder)
        with tempfile.TemporaryFile(dir=folder) as probe:  # without a name where that is possible
            probe.write(bytes(PROBE_BYTES))
            probe.flush()
    except OSError as error:
        _remove_empty(made)
        raise DiskError(cannot_write(folder, error)) from error
    try:
        yield
    finally:
        _remove_empty(made)


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[Claim]:
    """Create a folder, try to write into it, and keep other writers out while the context is open.

    The lock is on the folder itself: it leaves no file, and ends with the process, however that
    ends. Claims may be nested. File systems and platforms without such locks are not locked.

    Raises:
        DiskError: The folder cannot be written, or another process is writing into it.
    """
    with writable(folder), contextlib.ExitStack() as stack:
        mine = Claim(folder)
        if fcntl is not None and mine not in _CLAIMED.get():
            stack.callback(os.close, _locked(folder))
            mine.check()
        token = _CLAIMED.set(_CLAIMED.get() | {mine})
        try:
            yield mine
        finally:
            _CLAIMED.reset(token)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a folder that is gone when the context ends.

    Raises:
        DiskError: There is no room for it, or for what is written into it.
    """
    with (
        temporary_room(),
        tempfile.TemporaryDirectory(prefix="mechatlas-", ignore_cleanup_errors=True) as name,
    ):
        yield Path(name)


@contextlib.contextmanager
def temporary_room() -> Iterator[None]:
    """Say in one sentence that there is no room for temporary files.

    Raises:
        DiskError: There is none.
        OSError: Another error of the system, as it is.
    """
    try:
        yield
    except OSError as error:
        nowhere = "temporary directory" in str(error)  # tempfile has tried some places
        if not nowhere and error.errno not in NO_ROOM:
            raise
        raise DiskError(
            f"Temporary files cannot be kept: {error.strerror}. Free some space, or set TMPDIR to "
            "a folder with room."
        ) from error


def _locked(folder: Path) -> int:
    """Open and lock a folder."""
    assert fcntl is not None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise DiskError(cannot_write(folder, error)) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise DiskError(
            f"Another command is writing into {folder}. Wait for its end, or choose another --out."
        ) from error
    except OSError:  # a file system without locks, such as some on a network
        pass
    return descriptor


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _create(folder: Path) -> list[Path]:
    """Create a folder and those above it; return what was created here, the innermost first."""
    made: list[Path] = []
    for path in reversed([p for p in (folder, *folder.parents) if not os.path.isdir(p)]):
        try:
            path.mkdir()
            made.insert(0, path)
        except FileExistsError:  # by another command meanwhile, which may need it
            if not path.is_dir():
                raise
    return made


def _remove_empty(folders: list[Path]) -> None:
    """Delete folders, the innermost first, up to one that is not empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
