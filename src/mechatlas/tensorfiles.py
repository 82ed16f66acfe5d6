"""Files of tensors: read without running anything, and checked by name.

read_tensors   a .safetensors, .npz or torch file -> tensors by key
read_header    a .safetensors file -> its keys and metadata
reading        whatever goes wrong with a file -> one kind of error
mismatches     tensors against keys and shapes -> all that differs, in words
not_floats     tensors -> which of them are not of floating-point numbers
non_finite     tensors -> which of them hold a NaN or an infinity, and where

A file may come from anywhere. Whatever is wrong with it, the reader hears a `WeightsError` that
names the file, and the key where there is one.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors
import torch
from torch import Tensor

from mechatlas.base import WeightsError

TORCH = (".pt", ".pth", ".bin", ".ckpt")
"""Endings of files that torch wrote."""


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn whatever goes wrong with a file into one kind of error.

    Raises:
        WeightsError: The file is missing or damaged.
    """
    if not file.is_file():
        raise WeightsError(f"There is no file {file}.")
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:  # a damaged archive can make its reader raise almost anything
        reason = str(error).split("\n")[0][:200]
        raise WeightsError(
            f"{file} cannot be read ({type(error).__name__}: {reason}). Is the file whole?"
        ) from error


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
            return _read_torch(file)
        with safetensors.safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118


def read_header(file: Path) -> tuple[list[str], dict[str, str]]:
    """Read keys and metadata of a .safetensors file, without its tensors.

    Raises:
        WeightsError: It is missing or damaged.
    """
    with reading(file), safetensors.safe_open(file, framework="pt") as opened:
        return sorted(opened.keys()), opened.metadata() or {}


def _read_npz(file: Path) -> dict[str, Tensor]:
    """Read the arrays of an archive of numpy.

    Raises:
        WeightsError: An array is not of numbers.
    """
    tensors = {}
    with np.load(file, allow_pickle=False) as opened:
        for key in opened.files:
            array = opened[key]
            if array.dtype.kind not in "fiub":
                raise WeightsError(f"{file}: {key} is {array.dtype}, expected floats.")
            kind = np.float32 if array.dtype.kind == "f" else np.int64
            with np.errstate(over="ignore"):  # what does not fit becomes infinite and is refused
                tensors[key] = torch.from_numpy(array.astype(kind))
    return tensors


def _read_torch(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a file of torch, without running what it may ask for.

    Raises:
        WeightsError: It holds anything but tensors by name.
    """
    content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise WeightsError(f"{file} holds a {type(content).__name__}, expected tensors by name.")
    for key, value in content.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise WeightsError(f"{file}: {key} is not a plain tensor; save `state_dict()` alone.")
    return {str(key): value.detach() for key, value in content.items()}


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
        bad = tensor.isfinite().logical_not_()
        if bad.any():
            where = tuple(bad.nonzero()[0].tolist())
            places.append(f"{name}{list(where) if where else ''} is {float(tensor[where])}")
    return places
