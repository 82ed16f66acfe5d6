"""Reading and writing of files: a file is whole or not there, and damage is noticed.

write         bytes to a file, under a temporary name first
cannot_write  what the system said -> one sentence, with the cause and what to do
write_json    the same for an object, always with the same bytes
read_json     an object from a file, with one sentence if it is damaged
checksum      xxh3 of some bytes, 128 bits
"""

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

import xxhash

from mechatlas.base import DiskError

TEMPORARY = ".mechatlas.tmp"
"""Ending of a file that is being written; a killed command leaves one."""


def write(path: Path, data: bytes) -> None:
    """Write a file so that no reader ever sees half of it.

    Raises:
        DiskError: The disk is full or the place is not writable; nothing new is left.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the place may be gone; the first error says more
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DiskError(cannot_write(path, error)) from error
        raise


def cannot_write(path: Path, error: OSError) -> str:
    """Say why a file or folder cannot be written, and what to do about it."""
    cause, advice = error.strerror or str(error), "Choose another --out."
    in_the_way = next((p for p in (path, *path.parents) if p.exists() and not p.is_dir()), None)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "Free some space or choose another --out."
    elif error.errno in (errno.ENOTDIR, errno.EEXIST) and in_the_way:
        cause = f"{in_the_way} is a file, expected a folder"
    elif error.errno == errno.ENOENT:
        cause, advice = "its folder was deleted or moved meanwhile", "Run the command again."
    return f"Cannot write {path}: {cause}. Nothing half-written was left. {advice}"


def write_json(path: Path, value: Any) -> None:
    """Write an object as JSON, its keys in the order they have.

    Raises:
        DiskError: As `write`.
    """
    write(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote.

    Raises:
        DiskError: The file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DiskError(f"There is no file {path}.") from error
    except (OSError, ValueError) as error:
        raise DiskError(f"{path} cannot be read as JSON ({error}). Is the file whole?") from error


def checksum(data: bytes | memoryview) -> str:
    """Hash bytes with xxh3 (128 bits, in hexadecimal)."""
    return xxhash.xxh3_128(data).hexdigest()
