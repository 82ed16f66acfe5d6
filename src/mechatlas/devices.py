"""Devices to compute on."""

import torch

from mechatlas.base import RecipeError


def as_device(device: torch.device | str) -> torch.device:
    """Parse the name of a device, and try the device.

    Args:
        device: Device, or its name such as "cpu", "cuda" or "cuda:1".

    Returns:
        The device.

    Raises:
        RecipeError: There is no such device, or this PyTorch cannot compute on it.
    """
    try:
        tried = torch.device(device)
        torch.zeros(1, device=tried).tolist()  # "meta" has no values
    except (RuntimeError, AssertionError, ImportError, ValueError) as error:
        have = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        have += ["mps"] if torch.backends.mps.is_available() else []
        raise RecipeError(
            f"device {str(device)!r} cannot be used here. This machine and its PyTorch "
            f"({torch.__version__}) have {', '.join(['cpu', *have])}."
        ) from error
    return tried
