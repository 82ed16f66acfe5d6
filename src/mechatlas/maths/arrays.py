"""Arrays as people bring them -> numpy arrays that the mathematics works on.

as_array    numpy, torch, lists, memory maps -> one contiguous array of a known shape
unit_rows   rows brought to length 1
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from scipy import sparse

from mechatlas.base import InputError

if TYPE_CHECKING:
    SparseMatrix = Any
else:
    SparseMatrix = sparse.spmatrix | sparse.sparray
"""Sparse matrix of scipy, which ships no types."""


def as_array(
    value: Any, axes: str, name: str, *, dtype: np.typing.DTypeLike | None = None
) -> np.ndarray:
    """Convert an array-like value to a contiguous numpy array with the named axes.

    Args:
        value: A numpy array of any order, stride and byte order, a memory map, a dense tensor of
            any dtype on any device, or nested lists of numbers.
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
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided:
            raise InputError(f"{name} is a sparse tensor, {expected}. Pass {name}.to_dense().")
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).resolve_neg().numpy()
    if isinstance(value, np.ma.MaskedArray):
        raise InputError(f"{name} is a masked array, {expected}. Fill it first: {name}.filled(0).")
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InputError(f"{name} is not an array of numbers ({error}), {expected}.") from error
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name} holds {array.dtype} values, {expected} of real numbers.")
    if array.ndim != len(axes.split()):
        raise InputError(f"{name} has shape {array.shape}, {expected}.")
    native = array.dtype.newbyteorder("=") if dtype is None else np.dtype(dtype)
    return np.ascontiguousarray(array, dtype=native)


def unit_rows(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Rows divided by their lengths; rows of zeros stay as they are."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)
