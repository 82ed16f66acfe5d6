"""Files of tensors and tables: read without running anything, and checked before anything is made.

read_tensors   a .safetensors, .npz or torch file -> tensors by key
read_torch     a torch file -> tensors and the plain values beside them
read_sharded   an index of .safetensors files -> their headers, checked against the index
read_arrays    a .safetensors file -> numpy arrays by key
read_header    a .safetensors file -> its shapes and metadata, without its tensors
read_array     a .npy file -> its array
read_table     a .parquet file -> its columns
reading        whatever goes wrong with a file -> one kind of error
checksum_of    tensors or arrays by name -> one checksum
mismatches     tensors against keys and shapes -> all that differs, in words
not_floats     tensors -> which of them are not of floating-point numbers
non_finite     tensors -> which of them hold a NaN or an infinity, and where

A file may come from anywhere. Whatever is wrong with it, the reader hears a `WeightsError` (of
arrays and tables a `DiskError`) that names the file, and the key where there is one. A header is
compared with the size of its file before any memory is asked for, and the bytes with the manifest
beside the file, where it states a checksum.
"""

import contextlib
import io
import json
import math
import os
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from mechatlas.base import DiskError, UserError, WeightsError
from mechatlas.files import (
    checksum,
    checksum_file,
    damaged,
    open_regular,
    read,
    read_json,
    stated_checksum,
)

TORCH = (".pt", ".pth", ".bin", ".ckpt")
"""Endings of files that torch wrote."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""Number formats of safetensors."""
WRAPPERS = ("sae", "state_dict", "autoencoder", "model")
"""Keys under which libraries keep the tensors of a torch file, beside settings."""
MAP_FROM = 1 << 30
"""Size in bytes of a file from which its tensors are mapped, not read: the file must then stay."""
PIECE = 1 << 18
"""Bytes that are read and hashed at once."""
MOST_EXPANDED = 64
"""Bytes of numbers for each byte of a file, from `EXPANDED_FROM` on: numbers hardly shrink, so a
file that promises more is made to fill the memory."""
EXPANDED_FROM = 64 << 20
"""Bytes of numbers from which `MOST_EXPANDED` is asked for."""
HEADER_LIMIT = 100 << 20
"""Size in bytes above which a header of safetensors is refused, here and by its own library."""


@contextlib.contextmanager
def reading(file: Path, kind: type[UserError] = WeightsError) -> Iterator[None]:
    """Turn whatever goes wrong with a file into one kind of error.

    Raises:
        UserError: The file is missing or damaged; of the kind given.
    """
    try:
        yield
    except kind:
        raise
    except DiskError as error:
        raise kind(str(error)) from error
    except Exception as error:  # a damaged archive can make its reader raise almost anything
        reason = str(error).split("\n")[0][:200]
        raise kind(
            f"{file} cannot be read ({type(error).__name__}: {reason}). Is the file whole?"
        ) from error


class Entry(NamedTuple):
    """Entry of one tensor in the header of a .safetensors file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the end of the header."""
    end: int


class Header(NamedTuple):
    """Header of a .safetensors file, which fits the size of the file."""

    entries: dict[str, Entry]
    """Tensors in the order of their bytes."""
    metadata: dict[str, str]


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read all tensors of a file, as they are.

    Raises:
        WeightsError: It is missing, damaged, or holds something else than tensors.
    """
    file = Path(file)
    with reading(file):
        if file.suffix == ".npz":
            return _read_npz(file)
        if file.suffix in TORCH:
            tensors, values = read_torch(file)
            if values:
                key = next(iter(values))
                raise WeightsError(
                    f"{file}: {key} is not a plain tensor; save `state_dict()` alone."
                )
            return tensors
        return read_safetensors(file)[0]


def read_safetensors(
    file: Path, *, expected: str | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of a .safetensors file.

    Args:
        file: File to read.
        expected: Checksum; by default that of the manifest beside the file, if it states one.

    Raises:
        WeightsError: It is missing or damaged.
    """
    file = Path(file)
    with reading(file):
        expected = stated_checksum(file) if expected is None else expected
        state = xxhash.xxh3_128()
        tensors = {}
        with open_regular(file) as opened:
            head, header = _header(opened)
            if expected is None and os.fstat(opened.fileno()).st_size >= MAP_FROM:
                return _map(file, len(head), header), header.metadata
            state.update(head)
            for name, entry in header.entries.items():
                tensor = torch.empty(entry.shape, dtype=entry.dtype)
                if tensor.numel():
                    room = tensor.view(-1).view(torch.uint8).numpy()
                    for start in range(0, len(room), PIECE):  # hashed while the processor has it
                        piece = room[start : start + PIECE].data
                        if opened.readinto(piece) != len(piece):
                            raise WeightsError(f"{file} ends within {name}. Is the file whole?")
                        if expected is not None:
                            state.update(piece)
                tensors[name] = tensor
        if expected is not None and state.hexdigest() != expected:
            raise WeightsError(damaged(file))
        return tensors, header.metadata


def _map(file: Path, begin: int, header: Header) -> dict[str, Tensor]:
    """Map the tensors of a .safetensors file; pages that are changed stay in memory."""
    whole = torch.from_numpy(np.memmap(file, np.uint8, mode="c"))
    tensors = {}
    for name, entry in header.entries.items():
        part = whole[begin + entry.begin : begin + entry.end]
        aligned = part.data_ptr() % entry.dtype.itemsize == 0
        part = torch.from_numpy(part.numpy()) if aligned else part.clone()  # no storage offset
        tensors[name] = part.view(entry.dtype).view(entry.shape)
    return tensors


def read_sharded(index: Path) -> dict[Path, Header]:
    """Read the headers of the files that an index names.

    Raises:
        WeightsError: The index is damaged, names a file that is not in its folder, or a tensor
            that its file does not hold.
    """
    with reading(index):
        values = read_json(index)
        places = values.get("weight_map") if isinstance(values, dict) else None
        if not isinstance(places, dict) or not places:
            raise WeightsError(f"{index} has no weight_map, which names the file of each tensor.")
        headers: dict[Path, Header] = {}
        for tensor, name in places.items():
            plain = isinstance(name, str) and Path(name).name == name and name != ".."
            if not plain or "\\" in name:
                raise WeightsError(f"{index}: {tensor} is in {name!r:.80}, not a file beside it.")
            file = index.parent / name
            if file not in headers:
                headers[file] = read_header(file)
            if tensor not in headers[file].entries:
                raise WeightsError(f"{index} promises {tensor} in {name}, which does not hold it.")
        return headers


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """Read all arrays of a .safetensors file.

    Raises:
        WeightsError: It is missing, damaged, or has a number format that numpy lacks.
    """
    tensors = read_safetensors(file)[0]
    with reading(Path(file)):
        return {name: tensor.numpy() for name, tensor in tensors.items()}


def read_header(file: Path) -> Header:
    """Read shapes and metadata of a .safetensors file, without its tensors.

    Raises:
        WeightsError: It is missing or damaged.
    """
    with reading(file), open_regular(file) as opened:
        return _header(opened)[1]


def _header(opened: io.BufferedReader) -> tuple[bytes, Header]:
    """Bytes and content of a header, compared with the size of the file."""
    size = os.fstat(opened.fileno()).st_size
    first = opened.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or not 2 <= length <= min(size - 8, HEADER_LIMIT):
        raise ValueError("it does not begin with a header of safetensors")
    text = opened.read(length)
    values = json.loads(text)
    metadata = values.pop("__metadata__", None) or {}
    if not all(isinstance(each, str) for pair in metadata.items() for each in pair):
        raise ValueError("its metadata are not texts")
    entries = sorted(
        ((name, _entry(name, fields)) for name, fields in values.items()),
        key=lambda pair: pair[1][2:],
    )
    end = 0
    for name, entry in entries:
        if entry.begin != end:
            raise ValueError(f"{name} begins at byte {entry.begin}, expected {end}")
        end = entry.end
    if end != size - 8 - length:
        raise ValueError(
            f"its header promises {end:,} bytes of numbers, it has {size - 8 - length:,}"
        )
    return first + text, Header(dict(entries), metadata)


def _entry(name: str, fields: dict[str, Any]) -> Entry:
    """Entry of a tensor whose shape fits its bytes."""
    shape, (begin, end) = fields["shape"], fields["data_offsets"]
    if fields["dtype"] not in DTYPES:
        raise ValueError(f"{name} is of the unknown number format {fields['dtype']!r:.40}")
    dtype = DTYPES[fields["dtype"]]
    whole = [each for each in (*shape, begin, end) if type(each) is int and 0 <= each < 1 << 62]
    if (
        len(whole) != len(shape) + 2
        or len(shape) > 32
        or math.prod(shape) * dtype.itemsize != end - begin
    ):
        raise ValueError(f"{name} of shape {shape!r:.80} does not fit its bytes {begin} to {end}")
    return Entry(dtype, tuple(shape), begin, end)


def read_array(file: Path) -> np.ndarray:
    """Read the array of a .npy file.

    Raises:
        DiskError: It is missing, damaged, or holds Python objects.
    """
    with reading(Path(file), DiskError):
        data = read(file)
        return _npy(io.BytesIO(data), len(data))


def _npy(opened: Any, size: int, mapped: tuple[Path, int] | None = None) -> np.ndarray:
    """Array of a stream in the format of .npy, whose header is compared with its size.

    Args:
        opened: The stream.
        size: Its size in bytes.
        mapped: File that holds the same bytes and where they begin, if floats are to be mapped.
    """
    version = np.lib.format.read_magic(opened)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"it has the unknown version {version}")
    shape, by_column, dtype = readers[version](opened)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never read")
    wanted, there = math.prod(shape) * dtype.itemsize, size - opened.tell()
    if wanted != there:
        raise ValueError(f"its header promises {wanted:,} bytes of numbers, it has {there:,}")
    if wanted and mapped is not None and dtype in (np.float16, np.float32):
        file, start = mapped
        order = "F" if by_column else "C"
        return np.memmap(file, dtype, "c", start + opened.tell(), shape, order)
    flat = np.empty(math.prod(shape), dtype)
    if wanted and opened.readinto(flat.view(np.uint8)) != wanted:
        raise ValueError("it ends too early")
    return flat.reshape(shape, order="F" if by_column else "C")


def read_table(file: Path) -> Any:
    """Read a .parquet file as a `pyarrow.Table`.

    Raises:
        DiskError: It is missing or damaged.
    """
    import pyarrow.parquet as pq  # takes longer to import than everything else here

    with reading(Path(file), DiskError):
        return pq.read_table(io.BytesIO(read(file)))


def _read_npz(file: Path) -> dict[str, Tensor]:
    """Read the arrays of an archive of numpy."""
    tensors = {}
    with _verified(file) as opened, zipfile.ZipFile(opened) as archive:
        size = os.fstat(opened.fileno()).st_size
        _refuse_expansion(sum(info.file_size for info in archive.infolist()), size)
        maps = size >= MAP_FROM and stated_checksum(file) is None
        for info in archive.infolist():
            key = info.filename.removesuffix(".npy")
            stays = maps and info.compress_type == zipfile.ZIP_STORED
            place = (file, _start_of(info, opened)) if stays else None
            with archive.open(info) as member:
                array = _npy(member, info.file_size, place)
            if array.dtype.kind not in "fiub":
                raise WeightsError(f"{file}: {key} is {array.dtype}, expected floats.")
            kind = np.float32 if array.dtype.kind == "f" else np.int64
            if not isinstance(array, np.memmap):
                with np.errstate(over="ignore"):  # what does not fit is infinite, and is refused
                    array = array.astype(kind)
            tensors[key] = torch.from_numpy(np.asarray(array))
    return tensors


def _start_of(info: zipfile.ZipInfo, opened: io.BufferedReader) -> int:
    """First byte of a member of an archive that is stored as it is."""
    opened.seek(info.header_offset + 26)  # two lengths end the fixed part of a member's header
    name, extra = (int.from_bytes(opened.read(2), "little") for _ in range(2))
    return info.header_offset + 30 + name + extra


def _refuse_expansion(wanted: int, size: int) -> None:
    """Refuse a file that would need much more memory than it has bytes."""
    if wanted >= EXPANDED_FROM and wanted > MOST_EXPANDED * size:
        raise ValueError(f"it promises {wanted:,} bytes of numbers, but has {size:,} bytes itself")


def read_torch(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what torch saved, without running what the file may ask for.

    A line of JSON may stand before it; its values are added. Tensors may lie in a dict of their
    own, under one of `WRAPPERS`.

    Returns:
        Tensors by name, and the plain values beside them.

    Raises:
        WeightsError: The file is damaged, or asks for anything but tensors and plain values.
    """
    values: dict[str, Any] = {}
    with reading(file), _verified(file) as opened:
        source: Any = opened
        if opened.peek(1)[:1] == b"{":
            values = dict(json.loads(opened.readline(HEADER_LIMIT)))
            source = io.BytesIO(opened.read())
        elif os.fstat(opened.fileno()).st_size >= MAP_FROM and opened.peek(2)[:2] == b"PK":
            source = str(file)
        mapped = isinstance(source, str)
        size = os.fstat(opened.fileno()).st_size
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:
                _refuse_expansion(sum(info.file_size for info in archive.infolist()), size)
        if not mapped:
            source.seek(0)  # files of old versions of torch are no archives, but were looked at
        content = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
        if not isinstance(content, dict):
            kind = type(content).__name__
            raise WeightsError(f"{file} holds a {kind}, expected tensors by name.")
        if not any(isinstance(value, Tensor) for value in content.values()):
            wrapped = next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)
            if wrapped is not None:
                inner = content.pop(wrapped)
                content = {**content, **inner}
        tensors = {str(k): v.detach() for k, v in content.items() if isinstance(v, Tensor)}
        _refuse_expansion(sum(t.numel() * t.itemsize for t in tensors.values()), size)
    for key, tensor in tensors.items():
        if tensor.layout != torch.strided:
            raise WeightsError(f"{file}: {key} is not a plain tensor; save `state_dict()` alone.")
    others = {str(k): v for k, v in content.items() if not isinstance(v, Tensor)}
    return tensors, {**values, **others}


def _verified(file: Path) -> io.BufferedReader:
    """Open a file whose bytes have the checksum in the manifest beside it, where one is stated."""
    expected = stated_checksum(file)
    if expected is not None and checksum_file(file) != expected:
        raise DiskError(damaged(file))
    return open_regular(file)


def checksum_of(tensors: Mapping[str, Tensor | np.ndarray], text: str = "") -> str:
    """Checksum of names, types, shapes and bytes, in whatever order, and of a text."""
    parts = [text.encode()]
    for name, each in sorted(tensors.items()):
        whole = each.detach().cpu().contiguous() if isinstance(each, Tensor) else each
        if isinstance(whole, Tensor):
            whole = whole.flatten().view(torch.uint8).numpy() if whole.numel() else np.empty(0)
        dtype = str(each.dtype).removeprefix("torch.")
        data = checksum(np.ascontiguousarray(whole).data)
        parts.append(f"{name} {dtype} {tuple(each.shape)} {data}".encode())
    return checksum(b"\n".join(parts))


def mismatches(
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    *,
    optional: Collection[str] = (),
    words: Mapping[str, str] | None = None,
) -> list[str]:
    """List missing and surplus keys and other shapes.

    Args:
        tensors: All that a file holds.
        shapes: Expected shape of each key.
        optional: Keys that may be missing.
        words: Expected shapes in words; by default as tuples.
    """
    wrong = [f"missing {key}" for key in shapes if key not in tensors and key not in optional]
    wrong += [f"surplus {key}" for key in tensors if key not in shapes]
    for key, shape in shapes.items():
        if key in tensors and tuple(tensors[key].shape) != tuple(shape):
            expected = (words or {}).get(key, tuple(shape))
            wrong.append(f"{key} has shape {tuple(tensors[key].shape)}, expected {expected}")
    return wrong


def not_floats(tensors: Mapping[str, Tensor]) -> list[str]:
    """List the tensors that are not of floating-point numbers."""
    return [
        f"{name} is {str(tensor.dtype).removeprefix('torch.')}, expected floats"
        for name, tensor in tensors.items()
        if not tensor.is_floating_point()
    ]


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """List the tensors with a NaN or an infinity, and where the first one is."""
    places = []
    for name, tensor in tensors.items():
        rows = max(1, (1 << 20) * len(tensor) // max(tensor.numel(), 1)) if tensor.ndim else 1
        for number, part in enumerate(tensor.split(rows) if tensor.ndim else (tensor,)):
            bad = part.isfinite().logical_not_()
            if bad.any():
                first, *others = bad.nonzero()[0].tolist() or [0]
                where = (number * rows + first, *others) if tensor.ndim else ()
                places.append(f"{name}{list(where) if where else ''} is {float(tensor[where])}")
                break
    return places
