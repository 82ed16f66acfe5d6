"""Rows of memory-mapped files, gathered by their addresses in one compiled pass."""

import inspect
from typing import Any

import numba
import numpy as np
from jaxtyping import Int, UInt8
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def _pointer(_: Any, address: Any) -> Any:
    return types.voidptr(address), lambda _, builder, __, arguments: builder.inttoptr(
        arguments[0], cgutils.voidptr_t
    )


_POINTER = intrinsic(inspect.unwrap(_pointer))  # unwrapped, as tests wrap functions in checks


def _copy_rows(addresses, out):
    n_bytes = out.shape[1]
    for i in range(len(out)):
        source, target = numba.carray(_POINTER(addresses[i]), (n_bytes,), np.uint8), out[i]
        for c in range(n_bytes):
            target[c] = source[c]


try:
    _COPY_ROWS = numba.njit(nogil=True, cache=True)(inspect.unwrap(_copy_rows))
except RuntimeError:  # no writable place for the cache: compile in every process
    _COPY_ROWS = numba.njit(nogil=True)(inspect.unwrap(_copy_rows))


def copy_rows(addresses: Int[np.ndarray, " row"], out: UInt8[np.ndarray, "row byte"]) -> None:
    """Write the `out.shape[1]` bytes at each address to a row of `out`.

    The caller keeps the memory at the addresses alive, and vouches that it is there.
    """
    _COPY_ROWS(addresses, out)
