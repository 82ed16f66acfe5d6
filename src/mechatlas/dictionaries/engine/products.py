"""The dense product of a training step in float32, by the library that suits the processor.

Intel's MKL takes a slow path on processors of others; there oneDNN is faster: 0.34 s against 0.41
to 0.45 for 4,096 x 512 x 8,192 on one AVX-512 core of AMD's. On Intel's own MKL is: 0.22 against
0.26. Both read the matrix in an order of their own, made once and used for all tiles. A choice by
a stopwatch would make two runs of the same seed differ, so the processor's name decides.
"""

import functools
import importlib.util
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Product = Callable[[Float[Tensor, "row d_in"]], Float[Tensor, "row latent"]]


def product_with(rows: Float[Tensor, "latent d_in"], tile: int) -> Product:
    """A function that multiplies others with `rows`, each with each.

    Args:
        rows: Not to be changed while the function is used.
        tile: How many others come at once, mostly.
    """
    library = _library() if rows.device.type == "cpu" and rows.dtype == torch.float32 else ""
    if library == "mkl":
        packed = torch.ops.mkl._mkl_reorder_linear_weight(rows, tile)
        return lambda x: torch.ops.mkl._mkl_linear(x, packed, rows, None, tile)
    if library == "onednn":
        packed = torch.ops.mkldnn._reorder_linear_weight(rows, tile)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return lambda x: x @ rows.T


@functools.cache
def _library() -> str:
    """`mkl`, `onednn`, or nothing where torch has neither."""
    mkl, onednn = torch.backends.mkl.is_available(), torch.backends.mkldnn.is_available()
    if mkl and hasattr(torch.ops.mkl, "_mkl_linear") and _by_intel():
        return "mkl"
    return "onednn" if onednn and hasattr(torch.ops.mkldnn, "_reorder_linear_weight") else ""


def _by_intel() -> bool:
    """Whether this processor is Intel's."""
    if importlib.util.find_spec("llvmlite") is None:
        return False
    from llvmlite.binding import get_host_cpu_name

    return not get_host_cpu_name().startswith(("znver", "bdver", "btver", "amd"))
