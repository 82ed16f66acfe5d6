"""Devices and precisions to compute in.

as_device                the name of a device -> a device that is there
staged                   batches of rows, the next one copied while the device works on this one
refuse_half_precision    for analyses that rounding of 8 or 11 bits would drown
"""

import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mechatlas.base import Batch, InputError, RecipeError


def as_device(device: torch.device | str | None, network: nn.Module | None = None) -> torch.device:
    """Parse the name of a device, and try the device.

    Args:
        device: Device, or its name such as "cpu", "cuda" or "cuda:1"; "auto" is the first there
            is of cuda, mps and cpu.
        network: Network whose own device is meant by `None`; by default that is the CPU.

    Returns:
        The device.

    Raises:
        RecipeError: There is no such device, or this PyTorch cannot compute on it.
    """
    if device is None:
        parameter = next(network.parameters(), None) if network is not None else None
        return torch.device("cpu") if parameter is None else parameter.device
    if device == "auto":
        has_mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        tried = torch.device(device)
        if tried.type == "cuda" and tried.index is None:
            tried = torch.device("cuda", torch.cuda.current_device())
        torch.zeros(1, device=tried).tolist()  # "meta" has no values
    except (RuntimeError, AssertionError, ImportError, ValueError) as error:
        have = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        have += ["mps"] if torch.backends.mps.is_available() else []
        raise RecipeError(
            f"device {str(device)!r} cannot be used here. This machine and its PyTorch "
            f"({torch.__version__}) have {', '.join(['cpu', *have])}."
        ) from error
    return tried


def refuse_half_precision(network: nn.Module, why: str) -> None:
    """Refuse a network that computes in half precision.

    Args:
        network: The network.
        why: What that is too coarse for.

    Raises:
        InputError: A parameter is in float16 or bfloat16.
    """
    coarse = {p.dtype for p in network.parameters()} & {torch.float16, torch.bfloat16}
    if coarse:
        raise InputError(
            f"The network computes in {coarse.pop()}, which is too coarse for {why}; load "
            "it in float32, or give `network.float()`, and inputs in float32."
        )


def staged(
    batches: Iterator[Batch], n: int, device: torch.device
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield batches, and their rows in float32 on a device.

    For a CUDA device the next batch is copied meanwhile, in the precision that it comes in.

    Args:
        batches: Batches, of which no more are taken.
        n: Number of batches.
        device: Device to compute on.
    """
    if device.type != "cuda":
        for batch in itertools.islice(batches, n):
            yield batch, batch.x.to(device).float()
        return
    copies, ahead = _Copies(device), deque()
    for batch in itertools.islice(batches, n):
        ahead.append((batch, copies.begin(batch.x)))
        if len(ahead) > 1:
            batch, begun = ahead.popleft()
            yield batch, copies.finished(*begun)
    for batch, begun in ahead:
        yield batch, copies.finished(*begun)


class _Copies:
    """Copies to a CUDA device, by a stream of its own, through two pinned buffers in turns."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self._buffers: deque[tuple[Tensor, Any]] = deque(maxlen=2)

    def begin(self, x: Tensor) -> tuple[Tensor, Any]:
        """Begin to copy; rows that are on the device stay as they are."""
        if x.device == self.device:
            return x, None
        buffer = copied = None
        if len(self._buffers) == 2:
            buffer, copied = self._buffers.popleft()
            copied.synchronize()  # begun two batches ago
        if buffer is None or (buffer.shape, buffer.dtype) != (x.shape, x.dtype):
            buffer = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        buffer.copy_(x)
        copied = torch.cuda.Event()
        with torch.cuda.stream(self.stream):
            there = buffer.to(self.device, non_blocking=True)
            copied.record(self.stream)
        self._buffers.append((buffer, copied))
        return there, copied

    def finished(self, there: Tensor, copied: Any) -> Tensor:
        """Let the device wait for a copy before it goes on."""
        if copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            there.record_stream(stream)
        return there.float()
