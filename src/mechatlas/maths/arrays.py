"""Arrays as people bring them -> numpy arrays that the mathematics works on.

as_array    numpy, torch, lists, memory maps -> one contiguous array of a known shape
as_numbers  the same of any shape, and as it lies in memory
as_tensor   the same as a tensor, on the device where it is
unit_rows   rows brought to length 1
numbers_of  a slice of channels, or some of them, as numbers
"""

import warnings
from collections.abc import Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from scipy import sparse
from torch.utils import data

from mechatlas.base import InputError

if TYPE_CHECKING:
    SparseMatrix = Any
else:
    SparseMatrix = sparse.spmatrix | sparse.sparray
"""Sparse matrix of scipy, which ships no types."""
Channels = slice | list[int]
"""Some of the channels."""


def numbers_of(channels: Channels, width: int) -> list[int]:
    """Numbers of some of `width` channels, in their order."""
    return list(range(width)[channels]) if isinstance(channels, slice) else channels


def as_array(
    value: Any, axes: str, name: str, *, dtype: np.typing.DTypeLike | None = None
) -> np.ndarray:
    """Convert an array-like value to a contiguous numpy array with the named axes.

    Args:
        value: A numpy array of any order, stride and byte order, a memory map, a dense tensor of
            any dtype on any device, nested lists of numbers, arrays or tensors, or a data set or
            loader of torch with rows, or with tuples whose first element is the row.
        axes: Names of the axes, such as "latent d_in"; their number is checked.
        name: What the value is called in a message, such as "W_dec".
        dtype: Number format of the result; by default that of the value, with bfloat16 as float32.

    Returns:
        The value itself where it is already such an array, else a copy.

    Raises:
        InputError: The value is sparse or masked, is not an array of numbers, or has another number
            of axes.
    """
    expected = f"expected an array ({', '.join(axes.split())})"
    array = as_numbers(value, name, expected)
    if array.ndim != len(axes.split()):
        raise InputError(f"{name} has shape {array.shape}, {expected}.")
    native = array.dtype.newbyteorder("=") if dtype is None else np.dtype(dtype)
    return np.ascontiguousarray(array, dtype=native)


def as_numbers(value: Any, name: str, expected: str = "expected an array") -> np.ndarray:
    """Convert an array-like value to a numpy array of real numbers.

    Args:
        value: As for `as_array`.
        name: What the value is called in a message.
        expected: Words for the expected shape, for the message.

    Returns:
        An array that may share memory with the value, in any order and byte order.

    Raises:
        InputError: The value is sparse or masked, or is not an array of real numbers.
    """
    if isinstance(value, str | bytes | Path):
        raise InputError(
            f"{name} is the text {str(value)!r}, {expected}. Read the file first, as with "
            "numpy.load, ma.load or ma.Store."
        )
    if isinstance(value, np.ma.MaskedArray):
        if np.ma.getmaskarray(value).any():
            raise InputError(
                f"{name} is a masked array with {np.ma.count_masked(value)} masked values, "
                f"{expected}. Fill or drop them first, as with .filled(0)."
            )
        value = value.data
    if isinstance(value, data.DataLoader | data.Dataset):
        value = _rows_of(value, name, expected)
    if isinstance(value, list | tuple):
        value = _nested(value, name, expected)
    if isinstance(value, torch.Tensor):
        value = _of_tensor(value, name, expected)
    if sparse.issparse(value):
        raise InputError(f"{name} is a sparse matrix, {expected}. Pass .toarray() of it.")
    if isinstance(value, Mapping | Set):
        raise InputError(f"{name} is a {type(value).__name__}, {expected} of real numbers.")
    try:
        array = np.asarray(value)
    except Exception as error:  # whatever the conversion of another library raises
        raise InputError(f"{name} is not an array of numbers ({error}), {expected}.") from error
    if array.dtype.kind not in "biuf":
        kind = f"is a {type(value).__name__}" if array.ndim == 0 else f"holds {array.dtype} values"
        raise InputError(f"{name} {kind}, {expected} of real numbers.")
    return array.astype(np.float64) if array.dtype == np.longdouble else array


def _rows_of(rows: Any, name: str, expected: str) -> list[Any]:
    """Rows of a data set in their order, or of the data set of a loader."""
    kind = type(rows).__name__
    if isinstance(rows, data.DataLoader):
        own = rows.collate_fn is not data.default_collate
        plain = isinstance(rows.sampler, data.SequentialSampler | data.RandomSampler)
        rows = None if own or not plain else rows.dataset
    if rows is None or isinstance(rows, data.IterableDataset) or not hasattr(rows, "__len__"):
        raise InputError(
            f"{name} is a {kind} whose rows cannot be read by number, {expected}. Pass the rows as "
            "one array: torch.cat(list(...))."
        )
    items = (rows[i] for i in range(len(rows)))
    return [item[0] if isinstance(item, tuple) and len(item) else item for item in items]


def _nested(values: Any, name: str, expected: str) -> Any:
    """Lists whose tensors and masked arrays have become arrays; lists of numbers as they are."""
    inner = values
    while isinstance(inner, list | tuple) and len(inner):
        inner = inner[0]
    if not isinstance(inner, torch.Tensor | np.ma.MaskedArray):
        return values
    return [as_numbers(v, f"{name}[{i}]", expected) for i, v in enumerate(values)]


def as_tensor(value: Any, axes: str | None, name: str) -> torch.Tensor:
    """Convert an array-like value to a dense tensor with the named axes, without a gradient.

    Args:
        value: As for `as_array`.
        axes: Names of the axes, whose number is checked; `None` for any.
        name: What the value is called in a message.

    Returns:
        A tensor that shares memory with the value where it can, as of a memory map.

    Raises:
        InputError: The value is not an array of real numbers with so many axes.
    """
    expected = f"expected an array ({', '.join(axes.split())})" if axes else "expected an array"
    if isinstance(value, torch.Tensor):
        _check_dense(value, name, expected)
        tensor = value.detach()
    else:
        array = as_numbers(value, name, expected)
        if any(stride < 0 for stride in array.strides) or not array.dtype.isnative:
            array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
        with warnings.catch_warnings():  # a memory map need not be writable: it is only read
            warnings.simplefilter("ignore", UserWarning)
            tensor = torch.from_numpy(array)
    if axes and tensor.ndim != len(axes.split()):
        raise InputError(f"{name} has shape {tuple(tensor.shape)}, {expected}.")
    return tensor


def _of_tensor(value: torch.Tensor, name: str, expected: str) -> Shaped[np.ndarray, "..."]:
    """Array of a dense tensor."""
    _check_dense(value, name, expected)
    value = value.detach().cpu().resolve_neg()
    known = value.dtype in (torch.float16, torch.float32, torch.float64)
    return (value.float() if value.is_floating_point() and not known else value).numpy()


def _check_dense(value: torch.Tensor, name: str, expected: str) -> None:
    """Refuse a tensor that is not of dense real numbers."""
    if value.is_nested or value.layout != torch.strided:
        kind = "nested" if value.is_nested else "sparse"
        dense = "to_padded_tensor(0)" if value.is_nested else "to_dense()"
        raise InputError(f"{name} is a {kind} tensor, {expected}. Pass .{dense} of it.")
    if value.is_quantized:
        raise InputError(f"{name} is a quantized tensor, {expected}. Pass .dequantize() of it.")
    if value.is_meta:
        raise InputError(f"{name} is on the meta device and has no values, {expected}.")
    if value.is_complex():
        kind = str(value.dtype).removeprefix("torch.")
        raise InputError(f"{name} holds {kind} values, {expected} of real numbers.")


def unit_rows(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Rows divided by their lengths; rows of zeros stay as they are."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)
