"""Training runs on disk: a killed run continues and ends with the same bytes.

    keep        weights, moments and counters -> one file, whole or not there
    continued   the file -> weights, moments and counters, if it is of the same run

There is one file, `checkpoint.safetensors`, with the settings and the counters as JSON in its
metadata: two files could be of different steps.
"""

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from mechatlas.base import WeightsError
from mechatlas.files import write

FILE = "checkpoint.safetensors"


def keep(
    folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any], progress: dict[str, Any]
) -> None:
    """Write a checkpoint over the one before.

    Raises:
        DiskError: The folder is not writable or the disk is full; the one before is still there.
    """
    state = json.dumps({"settings": settings, "progress": progress})
    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write(folder / FILE, safetensors.torch.save(copies, {"mechatlas": state}))


def continued(
    folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any]
) -> dict[str, Any] | None:
    """Read a checkpoint into the tensors of a run with the same settings.

    Returns:
        The counters of the run; `None` if it has not left a checkpoint yet.

    Raises:
        WeightsError: The file is damaged, or is of a run with other settings; all of those
            that differ are listed, and no tensor was changed.
    """
    file = Path(folder) / FILE
    if not file.exists():
        return None
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            state = json.loads(opened.metadata()["mechatlas"])
            kept = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        was, progress = dict(state["settings"]), dict(state["progress"])
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError, OSError) as error:
        raise WeightsError(
            f"{file} cannot be read ({error}). Is the file whole? Delete it to train anew."
        ) from error
    wrong = [
        f"{key} was {was.get(key)!r}, is {settings.get(key)!r}"
        for key in dict.fromkeys((*was, *settings))
        if was.get(key) != settings.get(key)
    ]
    wrong += [f"{key} is missing" for key in tensors if key not in kept]
    wrong += [
        f"{key} has shape {tuple(t.shape)}, expected {tuple(tensors[key].shape)}"
        for key, t in kept.items()
        if key in tensors and t.shape != tensors[key].shape
    ]
    if wrong:
        raise WeightsError(
            f"{file} is of another run: {'; '.join(wrong)}. "
            "Give the same settings to continue it, or delete it to train anew."
        )
    for name, tensor in tensors.items():
        tensor.copy_(kept[name])
    return progress
