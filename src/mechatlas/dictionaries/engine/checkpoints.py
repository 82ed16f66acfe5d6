"""Training runs on disk: a killed run continues and ends with the same bytes.

    claim       no other run in the same folder
    keep        weights, moments and counters -> one file, whole or not there
    continued   the file -> weights, moments and counters, if it is of the same run

There is one file, `checkpoint.safetensors`, with the settings and the counters as JSON in its
metadata, and a checksum of these and of the tensors: two files could be of different steps.
"""

import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from mechatlas.base import WeightsError
from mechatlas.deprecated import ARGUMENTS
from mechatlas.files import write
from mechatlas.outputs import claim
from mechatlas.tensorfiles import checksum_of, mismatches, read_safetensors, reading

FILE = "checkpoint.safetensors"
HELD_OUT = "held-out rows"
"""Setting that is a checksum of the rows themselves."""
OTHER_THREADS = (
    "Rows that are read from a network change with the number of threads (OMP_NUM_THREADS) and "
    "with the processor. "
)
__all__ = ["claim", "continued", "keep"]


def keep(
    folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any], progress: dict[str, Any]
) -> None:
    """Write a checkpoint over the one before.

    Args:
        folder: Folder of the file, which is there.
        tensors: Weights, moments and the like, by name.
        settings: Settings that a run can only be continued with.
        progress: Counters.

    Raises:
        DiskError: The folder is not writable or the disk is full; the one before is still there.
    """
    state = json.dumps({"settings": settings, "progress": progress})
    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"mechatlas": state, "checksum": checksum_of(copies, state)}
    write(folder / FILE, safetensors.torch.save(copies, metadata), make_folder=False)


def continued(
    folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any]
) -> dict[str, Any] | None:
    """Read a checkpoint into the tensors of a run with the same settings.

    Args:
        folder: Folder of the file.
        tensors: Tensors of the run, which are changed in place.
        settings: Settings of the run.

    Returns:
        The counters of the run; None if it has not left a checkpoint yet.

    Raises:
        WeightsError: The file is damaged, or is of a run with other settings; all that differ are
            listed, and no tensor was changed.
    """
    file = Path(folder) / FILE
    if not os.path.lexists(file):
        return None
    try:
        kept, metadata = read_safetensors(file)
        with reading(file):
            text = metadata["mechatlas"]
            # Checkpoints of version 0.1 have no checksum.
            if metadata.get("checksum", found := checksum_of(kept, text)) != found:
                raise WeightsError(f"{file} is damaged: its checksum is not that of its content.")
            state = json.loads(text)
            was, progress = dict(state["settings"]), dict(state["progress"])
    except WeightsError as error:
        raise WeightsError(f"{error} Delete it to train anew.") from error
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    refuse_other_run(file, was, settings, mismatches(kept, shapes))
    for name, tensor in tensors.items():
        tensor.copy_(kept[name])
    return progress


def refuse_other_run(
    file: Path, was: dict[str, Any], settings: dict[str, Any], mismatches: list[str]
) -> None:
    """Refuse a checkpoint of a run with other settings, and list all that differ.

    Args:
        file: File of the checkpoint.
        was: Settings of the run that wrote it.
        settings: Settings of this run.
        mismatches: Tensors that do not fit.

    Raises:
        WeightsError: Something differs.
    """
    was = {key: _with_new_names(value) for key, value in was.items()}
    wrong = [
        f"{key} was {was.get(key)!r}, is {settings.get(key)!r}"
        for key in dict.fromkeys((*was, *settings))
        if was.get(key) != settings.get(key)
    ] + mismatches
    if wrong:
        other_rows = len(wrong) == 1 and wrong[0].startswith(HELD_OUT)
        hint = OTHER_THREADS if other_rows else ""
        raise WeightsError(
            f"{file} is of another run: {'; '.join(wrong)}. {hint}"
            "Give the same settings to continue it, or delete it to train anew."
        )


def _with_new_names(value: Any) -> Any:
    """Setting of version 0.1, such as "Objective(relative=True)", with the names of today."""
    kind = value.partition("(")[0] if isinstance(value, str) else ""
    for old, new in ARGUMENTS.get(kind, {}).items():
        value = value.replace(f"{old}=", f"{new}=")
    return value
