"""Devices to compute on."""

import torch
from torch import Tensor, nn

from mechatlas.base import RecipeError


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


class LateNumber:
    """Number of a tensor that is read while its device works on.

    Where there is a copy beside the work, the host waits for no more than what was asked of the
    device before this was made.
    """

    def __init__(self, number: Tensor) -> None:
        """Begin to copy a whole number."""
        self._number, self._copied = number, None
        if number.device.type == "cuda":
            self._number = torch.empty_like(number, device="cpu", pin_memory=True)
            self._number.copy_(number, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def __int__(self) -> int:
        """Wait for the copy and read it."""
        if self._copied is not None:
            self._copied.synchronize()
        return int(self._number)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, without waiting where it can be copied meanwhile."""
    if tensor.device == device:
        return tensor
    pinned = (
        tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
    )
    return pinned.to(device, non_blocking=True)
