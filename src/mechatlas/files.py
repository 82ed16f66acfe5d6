"""Reading and writing of files: a file is whole or not there, and damage is noticed.

open_regular     a path -> a file to read; a pipe, folder or device is refused, never waited for
read             a path -> the bytes, checked against the manifest beside it
read_ahead       files that will be read soon
read_json        the same for JSON, read_toml for TOML
read_manifest    `manifest.json` of a run -> its values, checked against its own checksum
about            an error about the content of a file -> the same, with its path
Fields           values of a JSON object, checked as they are asked for
write            bytes to a file, under a temporary name first; remove deletes one
create_folder    a folder in one that exists
cannot_write     error of the system -> one sentence, with the cause and what to do
write_json       the same for an object, write_manifest for a manifest with its checksum
checksum         xxh3 of some bytes, 128 bits

This module and `tensorfiles` are the only ones that open files of people. Whatever is wrong with
a file, the reader hears one sentence that names it.
"""

import contextlib
import errno
import io
import json
import os
import re
import reprlib
import shutil
import stat
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from mechatlas import remote
from mechatlas.base import DiskError, UserError
from mechatlas.remote import MANIFEST, TEMPORARY

RUN_FILES = ("recipe.toml", "result.json")
"""Files that every run writes beside its manifest."""
JSON_LIMIT = 512 << 20
"""Size in bytes above which a JSON file is refused."""
TOML_LIMIT = 4 << 20
"""Size in bytes above which a TOML file is refused."""
DEEP_KEY = re.compile(r"(?<![^\s.=,\[\]#])(?:[^\s.=,\[\]#]++\s*+\.\s*+){64}")
"""Dotted key of more parts than any recipe has: tomllib needs memory in the square of them."""
Data = bytes | memoryview | Iterable[bytes]
"""Contents of a file, whole or in blocks."""
SEAL = "checksum"
"""Key of a manifest's checksum of its other keys."""
_FLAGS = os.O_RDONLY | sum(
    getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY")
)
_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))


def open_regular(path: Path | str) -> io.BufferedReader:
    """Open a regular file to read.

    Raises:
        DiskError: There is none, it may not be read, or it is a pipe, folder or device.
    """
    try:
        descriptor = os.open(path, _FLAGS)
    except FileNotFoundError as error:
        raise DiskError(f"There is no file {path}.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DiskError(f"{path} cannot be read: {reason}.") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "a device")
        raise DiskError(f"{path} is {kind}, expected a file.")
    return os.fdopen(descriptor, "rb")


def read(path: Path | str, *, expected: str | None = None, limit: int | None = None) -> bytes:
    """Read a whole file, and verify its checksum where one is known.

    Args:
        path: File to read.
        expected: Checksum; by default that of the manifest beside the file, if it states one.
        limit: Largest size in bytes.

    Raises:
        DiskError: The file cannot be read, is larger than allowed, or has another checksum.
    """
    path = Path(path)
    expected = stated_checksum(path) if expected is None else expected
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise DiskError(f"{path} has {size:,} bytes, expected at most {limit:,}.")
        try:
            data = file.read()
        except (OSError, MemoryError) as error:
            raise DiskError(f"{path} cannot be read: {_reason(error)}.") from error
    if expected is not None and checksum(data) != expected:
        raise DiskError(damaged(path))
    return data


def read_ahead(files: Mapping[Path, str]) -> None:
    """Ask the disk for files, or begin to fetch those of an address; nothing is waited for.

    Args:
        files: Files that will be read soon, and their checksums.
    """
    remote.bring_ahead(files)
    for file in files if hasattr(os, "posix_fadvise") else ():
        with contextlib.suppress(OSError, DiskError), open_regular(file) as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _reason(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "it does not fit in memory"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


@contextlib.contextmanager
def about(path: Path) -> Iterator[None]:
    """Name a file in the sentence of whatever error its content causes.

    Raises:
        UserError: The same error, which names the file.
    """
    try:
        yield
    except UserError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error


def damaged(path: Path) -> str:
    """Sentence about a file whose checksum is not the one in the manifest."""
    return (
        f"{path} is damaged or was replaced: its checksum differs from the one in {MANIFEST}. "
        "Restore it, or run the command that wrote the folder again."
    )


def read_json(path: Path, *, expected: str | None = None) -> Any:
    """Read a JSON file.

    Args:
        path: File to read.
        expected: Checksum; by default that of the manifest beside the file, if it states one.

    Raises:
        DiskError: The file is missing, damaged, or is not JSON.
    """
    return _parsed(path, read(path, expected=expected, limit=JSON_LIMIT))


def _parsed(path: Path, data: bytes) -> Any:
    """Parse JSON.

    Raises:
        DiskError: The data are not JSON.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError, MemoryError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else _reason(error)
        raise DiskError(f"{path} cannot be read as JSON ({reason}). Is the file whole?") from error


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        DiskError: The file is missing, damaged, or is not TOML.
    """
    data = read(path, limit=TOML_LIMIT)
    try:
        text = data.decode()
        values = None if DEEP_KEY.search(text) else tomllib.loads(text)
    except (ValueError, RecursionError, MemoryError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else _reason(error)
        raise DiskError(f"{path} is not TOML: {reason}.") from error
    if values is None:
        raise DiskError(f"{path} is not TOML for a recipe: a key has more than 64 parts.")
    return values


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a run.

    Raises:
        DiskError: The file is missing, damaged, was edited, or is not a manifest.
    """
    data = read(path, limit=JSON_LIMIT)
    manifest = _parsed(path, data)
    if not isinstance(manifest, dict):
        raise DiskError(f"{path} is a {type(manifest).__name__} in JSON, expected an object.")
    try:  # a manifest without a checksum is one of version 0.1, or of somebody's own
        whole = SEAL not in manifest or _as_written(manifest) == data
        whole = whole and manifest.get(SEAL) in (None, _seal(manifest))
    except (RecursionError, ValueError):
        whole = False
    if not whole:
        raise DiskError(
            f"{path} is damaged or was edited: it is not what its own checksum says. "
            "Restore it, or run the command that wrote the folder again."
        )
    kinds = (("kind", str), ("schema", int), ("complete", bool), ("parents", dict), ("files", dict))
    for key, kind in kinds:
        value = manifest.get(key, kind())
        texts = value.values() if isinstance(value, dict) else ()
        if not isinstance(value, kind) or not all(isinstance(text, str) for text in texts):
            of_texts = " of texts" if kind is dict else ""
            raise DiskError(f"{path}: {key} must be {kind.__name__}{of_texts}, got {value!r:.80}.")
    return manifest


def lost_manifest(folder: Path) -> str | None:
    """Sentence about a folder of a run without its manifest; None where nothing is wrong.

    Args:
        folder: Folder of any kind.
    """
    there = os.path.lexists(folder / MANIFEST)
    if there or not all((folder / name).is_file() for name in RUN_FILES):
        return None
    return (
        f"There is no {folder / MANIFEST}, with the checksums of the files beside it. Restore it, "
        "or run the command that wrote the folder again."
    )


def stated_checksum(file: Path) -> str | None:
    """Checksum of a file in the manifest beside it; None where none is stated.

    The manifest of a run that has not ended states nothing: its files are still being written.

    Raises:
        DiskError: The manifest is damaged.
    """
    beside = file.parent / MANIFEST
    if file.name == MANIFEST or not os.path.lexists(beside):
        return None
    manifest = read_manifest(beside)
    return manifest.get("files", {}).get(file.name) if manifest.get("complete", True) else None


class Fields:
    """Values of a JSON object, checked as they are asked for.

    Args:
        file: File that they are from, for messages.
        values: The values.
        within: Keys of the objects around this one, such as "sites.mixed4a.".
        error: Kind of error for a value that cannot be used.
    """

    def __init__(
        self,
        file: Path,
        values: Mapping[str, Any],
        within: str = "",
        error: type[UserError] = DiskError,
    ) -> None:
        self.file, self.values, self.within, self.error = file, values, within, error

    def wrong(self, key: str, expected: str) -> UserError:
        """Make the error for a value that cannot be used."""
        value = reprlib.repr(self.values[key]) if key in self.values else "missing"
        return self.error(f"{self.file}: {self.within}{key} is {value}, expected {expected}.")

    def has(self, key: str) -> bool:
        """Whether there is a value that is not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """Read a whole number.

        Args:
            key: Key of the value.
            default: Number if there is no value; by default there must be one.
            least: Smallest number allowed.

        Raises:
            UserError: The value is no whole number, or too small, or missing without a default.
        """
        value = self.values[key] if self.has(key) else default
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.wrong(key, f"a whole number of at least {least}")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        """Read true or false.

        Raises:
            UserError: The value is neither, or missing without a default.
        """
        value = self.values[key] if self.has(key) else default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Read a text.

        Raises:
            UserError: The value is not a text, or missing without a default.
        """
        value = self.values[key] if self.has(key) else default
        if not isinstance(value, str):
            raise self.wrong(key, "a text")
        return value

    def one_of(self, key: str, choices: Collection[str], default: str | None = None) -> str:
        """Read one of some texts.

        Args:
            key: Key of the value.
            choices: Texts allowed.
            default: Text if there is no value; by default there must be one.

        Raises:
            UserError: The value is another, or missing without a default.
        """
        value = self.text(key, default)
        if value not in choices:
            raise self.wrong(key, f"one of {', '.join(choices)}")
        return value

    def part(self, key: str) -> "Fields":
        """Read an object within; an empty one if it is missing.

        Raises:
            UserError: The value is not an object.
        """
        value = self.values[key] if self.has(key) else {}
        if not isinstance(value, dict):
            raise self.wrong(key, "a JSON object")
        return Fields(self.file, value, f"{self.within}{key}.", self.error)


def write(path: Path, data: Data, *, make_folder: bool = True, apart: bool = False) -> None:
    """Write a file so that no reader ever sees half of it.

    Args:
        path: Place of the file, or its address; one in a local copy is put at its address too.
        data: Its contents, or blocks of them.
        make_folder: Whether its folder is created where it is missing.
        apart: Whether another process may write the same file at the same time, as a worker that
            was given up; the temporary name is then of this process alone.

    Raises:
        DiskError: The disk is full or the place is not writable; nothing new is left.
    """
    path = remote.located(path)
    temporary = path.with_name(f"{path.name}{f'.{os.getpid()}' if apart else ''}{TEMPORARY}")
    try:
        if make_folder and not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb", opener=_create) as file:
            for block in (data,) if isinstance(data, bytes | memoryview) else data:
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        remote.upload(temporary, path)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the place may be gone; the first error says more
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DiskError(cannot_write(path, error)) from error
        raise


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it, also at its address where it has one.

    Raises:
        DiskError: It cannot be deleted at its address.
    """
    remote.remove(path)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def create_folder(path: Path) -> None:
    """Create a folder in one that exists, unless it is there already.

    Raises:
        DiskError: It cannot be created, or the folder that it is in is gone.
    """
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise DiskError(cannot_write(path, error)) from error


def cannot_write(path: Path, error: OSError) -> str:
    """Say why a file or folder cannot be written, and what to do about it."""
    cause, advice = error.strerror or str(error), "Choose another --out."
    in_the_way = next(
        (p for p in (path, *path.parents) if os.path.exists(p) and not os.path.isdir(p)), None
    )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "Free some space or choose another --out."
    elif error.errno in (errno.ENOTDIR, errno.EEXIST) and in_the_way:
        cause = f"{in_the_way} is a file, expected a folder"
    elif error.errno == errno.ENOENT and _refused_by_system(error):
        cause = "nothing can be made in its folder"
    elif error.errno == errno.ENOENT:
        cause, advice = "its folder was deleted or moved meanwhile", "Run the command again."
    return f"Cannot write {path}: {cause}. Nothing half-written was left. {advice}"


def _refused_by_system(error: OSError) -> bool:
    """Whether the folder is there all the same, such as /proc."""
    if error.filename is None or error.filename2 is not None:
        return False
    return Path(error.filename).parent.is_dir()


def _create(path: str, flags: int) -> int:
    """Open a new file: through no link, and without waiting where a pipe is in its place."""
    careful = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    return os.open(path, flags | careful, 0o666)


def write_json(path: Path, value: Any, *, make_folder: bool = True) -> None:
    """Write an object as JSON, its keys in the order they have.

    Args:
        path: Place of the file.
        value: Plain values.
        make_folder: Whether its folder is created where it is missing.

    Raises:
        DiskError: As `write`.
    """
    write(path, _as_written(value), make_folder=make_folder)


def _as_written(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def write_manifest(path: Path, values: dict[str, Any], *, make_folder: bool = True) -> None:
    """Write the manifest of a run, with a checksum of its own content.

    Args:
        path: Place of the file.
        values: Plain values.
        make_folder: Whether its folder is created where it is missing.

    Raises:
        DiskError: As `write`.
    """
    write(path, sealed(values), make_folder=make_folder)


def sealed(values: dict[str, Any]) -> bytes:
    """Bytes of a manifest, with a checksum of its own content."""
    others = {key: value for key, value in values.items() if key != SEAL}
    return _as_written({**others, SEAL: _seal(values)})


def _seal(values: dict[str, Any]) -> str:
    """Checksum of all keys but the checksum, whatever their order and spacing."""
    others = {key: value for key, value in values.items() if key != SEAL}
    return checksum(json.dumps(others, sort_keys=True, separators=(",", ":")).encode())


def checksum(data: bytes | memoryview) -> str:
    """Hash bytes with xxh3 (128 bits, in hexadecimal)."""
    return xxhash.xxh3_128(data).hexdigest()


def checksum_file(path: Path) -> str:
    """Hash a file of any size with xxh3, in constant memory.

    Raises:
        DiskError: The file cannot be read.
    """
    state = xxhash.xxh3_128()
    with open_regular(path) as file:
        try:
            while data := file.read(1 << 22):
                state.update(data)
        except OSError as error:
            raise DiskError(f"{path} cannot be read: {_reason(error)}.") from error
    return state.hexdigest()
