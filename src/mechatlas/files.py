"""Reading and writing of files: a file is whole or not there, and damage is noticed.

write         bytes to a file, under a temporary name first
write_json    the same for an object, always with the same bytes
read_json     an object from a file, with one sentence if it is damaged
checksum      xxh3 of some bytes, 128 bits
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import xxhash

from mechatlas.base import DiskError


def write(path: Path, data: bytes) -> None:
    """Write a file so that no reader ever sees half of it.

    Raises:
        DiskError: The disk is full or the place is not writable; nothing new is left.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the place may be gone; the first error says more
            temporary.unlink(missing_ok=True)
        raise DiskError(
            f"Cannot write {path}: {error.strerror or error}. "
            "Nothing half-written was left; free some space or choose another --out."
        ) from error


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
