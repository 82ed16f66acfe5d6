"""Files that samples come from: folders, zips and arrays, whatever their size and state.

    Folder, Archive   names of files inside, and their bytes
    matching          names that a glob and some endings ask for; hidden ones are counted only
    open_array        an .npy or .npz file -> rows, read one by one from the file

The size of a file is looked at before it is read, and the size of a member of a zip before it is
unpacked. Only regular files are opened, so that nothing waits for a pipe.
"""

import io
import math
import os
import re
import zipfile
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import cast

import numpy as np
from jaxtyping import Shaped

from mechatlas.base import DiskError, InputError
from mechatlas.files import open_regular

MEMORY_MIB = 1024
"""Memory that a command plans for, in MiB, where nobody says otherwise."""
PACKINGS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}
"""Methods of compression that Python can unpack."""
KINDS = {"U": "words", "S": "words", "O": "Python objects", "M": "dates", "m": "durations"}
"""Descriptions of arrays that are not of numbers, by the kind of their dtype."""


class Folder:
    """Files below a folder; whatever else has a name there is refused when it is opened."""

    def __init__(self, path: Path, names: Iterable[str] | None = None) -> None:
        self.path: Path = path
        found = (str(p.relative_to(path)) for p in path.rglob("*")) if names is None else names
        self.names: list[str] = sorted(found)

    def open(self, name: str, limit: int) -> io.BufferedIOBase:
        """Open a file.

        Raises:
            InputError: The file is missing, too large, or not a regular file.
        """
        return open_file(self.path / name, f"{self.path}: {name}", limit)

    def stream(self, name: str) -> io.BufferedIOBase:
        """Open a file of any size.

        Raises:
            InputError: The file is missing or not a regular file.
        """
        return open_file(self.path / name, f"{self.path}: {name}")


class Archive:
    """Members of a zip, read without unpacking the whole.

    Raises:
        InputError: The file is missing or is no zip.
    """

    def __init__(self, path: Path) -> None:
        self.path: Path = path
        try:
            self._zip = zipfile.ZipFile(open_file(path, str(path)))
        except InputError:
            raise
        except Exception as error:  # a damaged directory can make its reader raise anything
            raise InputError(f"{path} cannot be read as a zip ({reason_of(error)}).") from error
        self.names: list[str] = sorted(dict.fromkeys(self._zip.namelist()))

    def member(self, name: str) -> zipfile.ZipInfo:
        """Directory entry of a member that can be unpacked.

        Raises:
            InputError: The member is locked, or packed in a way that Python does not know.
        """
        member, where = self._zip.getinfo(name), f"{self.path}: {name} cannot be read"
        if member.flag_bits & 1:
            raise InputError(f"{where} (it is locked with a password). Pack it without one.")
        if member.compress_type not in PACKINGS:
            raise InputError(
                f"{where} (it is packed by method {member.compress_type}, such as the Deflate64 of "
                "Windows). Pack it again with the usual method."
            )
        return member

    def stream(self, name: str) -> io.BufferedIOBase:
        """Open a member to be unpacked piece by piece.

        Raises:
            InputError: The member is damaged or locked.
        """
        member = self.member(name)
        try:
            return cast(io.BufferedIOBase, self._zip.open(member))
        except Exception as error:
            raise InputError(f"{self.path}: {name} cannot be read ({reason_of(error)}).") from error

    def open(self, name: str, limit: int) -> io.BufferedIOBase:
        """Unpack a member into memory.

        Raises:
            InputError: The member is damaged, locked or too large.
        """
        check_size(self.member(name).file_size, limit, f"{self.path}: {name}")
        with self.stream(name) as file:
            try:
                return io.BytesIO(file.read())
            except Exception as error:
                raise InputError(
                    f"{self.path}: {name} cannot be read ({reason_of(error)})."
                ) from error

    def start_of(self, name: str) -> int:
        """Place in the file of the first byte of a member that is stored as it is."""
        header = 30  # bytes before the name: the last four say how long name and extras are
        place = self.member(name).header_offset
        with open_file(self.path, str(self.path)) as file:
            lengths = os.pread(file.fileno(), 4, place + header - 4)
        return place + header + sum(np.frombuffer(lengths, "<u2").tolist())


Files = Folder | Archive
"""Files inside a folder or a zip."""


def open_file(path: Path, name: str, limit: int | None = None) -> io.BufferedIOBase:
    """Open a regular file.

    Args:
        path: Place of the file; links are followed.
        name: Name of the file in messages.
        limit: Largest size in bytes; by default any.

    Raises:
        InputError: There is no regular file, it cannot be opened, or it is too large.
    """
    try:
        file = open_regular(path)
    except DiskError as error:
        raise InputError(str(error)) from error
    if limit is not None:
        check_size(os.fstat(file.fileno()).st_size, limit, name)
    return file


def check_size(size: int, limit: int, name: str) -> None:
    """Refuse what would take more memory than it may.

    Args:
        size: Bytes that it takes.
        limit: Largest number of bytes.
        name: Name of it in the message.

    Raises:
        InputError: It is too large.
    """
    if size > limit:
        raise InputError(
            f"{name} would take {_mib(size)} of memory, more than the {_mib(limit)} that one piece "
            "may take. Raise memory_mib (storage.memory_mib in a recipe), or split it."
        )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def reason_of(error: BaseException) -> str:
    """First line of an error, without addresses of memory, which differ from run to run."""
    lines = re.sub(r" at 0x[0-9a-f]+", "", str(error)).splitlines()
    return (lines[0] if lines and lines[0] else type(error).__name__)[:200]


def matching(
    names: Iterable[str], include: str, suffixes: Iterable[str]
) -> tuple[list[str], list[str]]:
    """Pick files by name.

    Args:
        names: Names inside a source.
        include: Glob over whole names.
        suffixes: Endings, in lower case.

    Returns:
        The names that fit, and those that fit but are hidden, as the resource forks that macOS
        adds to zips (`__MACOSX/._photo.jpg`) are.
    """
    fitting = [
        name
        for name in names
        if fnmatchcase(name, include) and PurePosixPath(name).suffix.lower() in suffixes
    ]
    hidden = [name for name in fitting if _is_hidden(name)]
    return sorted(set(fitting) - set(hidden)), hidden


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in Path(name).parts)


class ArrayFile:
    """Array in a file, of which single rows are read; none of it stays in memory."""

    def __init__(
        self,
        path: Path,
        file: io.BufferedIOBase,
        start: int,
        dtype: np.dtype,
        shape: tuple[int, ...],
    ) -> None:
        self.path: Path = path
        self.dtype: np.dtype = dtype
        self.shape: tuple[int, ...] = shape
        self._file, self._start = file, start

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Shaped[np.ndarray, "..."]:
        """Read a row.

        Raises:
            InputError: The file has become shorter, or cannot be read any more.
        """
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        try:
            data = os.pread(self._file.fileno(), size, self._start + index * size)
        except OSError as error:
            raise InputError(f"{self.path} cannot be read ({reason_of(error)}).") from error
        if len(data) != size:
            raise InputError(f"{self.path} ends before row {index}. Is the file whole?")
        return np.frombuffer(data, self.dtype).reshape(self.shape[1:])


def open_array(path: Path, *, memory_mib: int = MEMORY_MIB) -> ArrayFile | np.ndarray:
    """Open an array in an .npy file, or the only one of an .npz.

    Args:
        path: File of numpy.
        memory_mib: Memory that the whole process should stay under; a compressed array, which
            has to be unpacked, may take a quarter.

    Returns:
        Rows that are read when asked for; an array where it is compressed or column after column.

    Raises:
        InputError: The file is damaged, holds no numbers or several arrays, or is too large.
    """
    limit = (memory_mib << 20) // 4
    with open_file(path, str(path)) as file:
        packed = file.read(2) == b"PK"
    try:
        return _open_npz(path, limit) if packed else _open_npy(path, limit)
    except InputError:
        raise
    except Exception as error:  # headers are parsed as Python, which can raise anything
        raise InputError(f"{path} cannot be read as an array ({reason_of(error)}).") from error


def _open_npy(path: Path, limit: int) -> ArrayFile | np.ndarray:
    file = open_file(path, str(path))
    dtype, shape, by_column = _header(file, str(path), limit)
    start = file.tell()
    if os.fstat(file.fileno()).st_size < start + math.prod(shape) * dtype.itemsize:
        raise InputError(f"{path} is cut short: shape {shape} of {dtype} needs more bytes.")
    if by_column and len(shape) > 1 and math.prod(shape):
        return np.memmap(path, dtype, "r", start, shape, order="F")
    return ArrayFile(path, file, start, dtype, shape)


def _open_npz(path: Path, limit: int) -> ArrayFile | np.ndarray:
    """Open the only array of a zip."""
    archive = Archive(path)
    if len(archive.names) != 1:
        raise InputError(f"{path} holds {len(archive.names)} arrays, expected one.")
    (name,) = archive.names
    member = archive.member(name)
    if member.compress_type != zipfile.ZIP_STORED:
        check_size(member.file_size, limit, f"{path}: {name}, which is compressed,")
    with archive.stream(name) as file:
        dtype, shape, by_column = _header(file, str(path), limit)
        start = file.tell()
        if member.file_size < start + math.prod(shape) * dtype.itemsize:
            raise InputError(f"{path} is cut short: shape {shape} of {dtype} needs more bytes.")
        if member.compress_type == zipfile.ZIP_STORED and not by_column:
            while file.read(1 << 20):  # to its end, where the checksum is compared
                pass
            place = archive.start_of(name) + start
            return ArrayFile(path, open_file(path, str(path)), place, dtype, shape)
        check_size(member.file_size, limit, f"{path}: {name}, which is not stored row by row,")
        values = np.frombuffer(file.read(), dtype, math.prod(shape))
    return values.reshape(shape, order="F" if by_column else "C")


def _header(
    file: io.BufferedIOBase, path: str, limit: int
) -> tuple[np.dtype, tuple[int, ...], bool]:
    """Read the header of an array.

    Returns:
        Number format, shape, and whether columns follow each other in place of rows.
    """
    version = np.lib.format.read_magic(file)
    reader = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if reader is None:
        raise InputError(f"{path} holds records with named fields, expected one array of numbers.")
    shape, by_column, dtype = reader(file)
    if dtype.kind not in "biufc":
        raise InputError(
            f"{path} holds {KINDS.get(dtype.kind, 'records')} ({dtype}), expected numbers."
        )
    if any(n < 0 for n in shape):
        raise InputError(f"{path} has the shape {shape}.")
    check_size(math.prod(shape[1:]) * dtype.itemsize, limit, f"One row of {path}")
    return dtype, shape, by_column
