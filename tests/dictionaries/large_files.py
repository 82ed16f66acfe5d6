"""Memory that large files of each layout take, measured on files of the real layouts made longer.

lengthen    a golden folder -> the same with many times the latents, in half precision
peaks       folders -> largest memory of loading each, each in a process of its own
"""

import json
import multiprocessing
import resource
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from mechatlas import tensorfiles
from mechatlas.base import WeightsError
from mechatlas.dictionaries.foreign import weights
from mechatlas.dictionaries.formats import load
from mechatlas.tensorfiles import read_torch

LARGE = 32 << 20
"""Bytes that a file is made to have."""
MAPPED = 1 << 20
"""Bytes from which files count as large, in place of a gigabyte."""


def lengthen(place: Path, out: Path, n_latents: set[int], others: set[int]) -> int:
    """Copy a folder with many times the latents, and return the bytes of its weights.

    Args:
        place: Folder of a dictionary.
        out: New folder.
        n_latents: Numbers of latents of the dictionary, or of each of its parts.
        others: Widths of its sites.
    """
    assert not n_latents & others, "which axis holds the latents must be plain"
    shutil.copytree(place, out)
    files = [file for file in out.rglob("*") if file.is_file() and _is_weights(file)]
    times = max(2, 2 * LARGE // sum(file.stat().st_size for file in files))
    for file in out.rglob("*.json"):
        file.write_text(json.dumps(_scaled(json.loads(file.read_text()), n_latents, times)))
    for file in files:
        _lengthen_file(file, n_latents, times)
    return sum(file.stat().st_size for file in files)


def _is_weights(file: Path) -> bool:
    return file.suffix not in (".json", ".yaml")


def _scaled(value: Any, n_latents: set[int], times: int) -> Any:
    if isinstance(value, dict):
        return {key: _scaled(each, n_latents, times) for key, each in value.items()}
    if isinstance(value, list):
        return [_scaled(each, n_latents, times) for each in value]
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value * times if whole and value in n_latents else value


def _longer(tensor: Tensor, n_latents: set[int], times: int) -> Tensor:
    repeats = [times if length in n_latents else 1 for length in tensor.shape]
    tensor = tensor.repeat(repeats)
    return tensor.bfloat16() if tensor.is_floating_point() and tensor.ndim > 1 else tensor


def _lengthen_file(file: Path, n_latents: set[int], times: int) -> None:
    if file.suffix == ".safetensors":
        tensors, metadata = tensorfiles.read_safetensors(file)
        longer = {key: _longer(t, n_latents, times) for key, t in tensors.items()}
        safetensors.torch.save_file(longer, file, metadata)
    elif file.suffix == ".npz":
        arrays = {key: torch.from_numpy(array) for key, array in np.load(file).items()}
        longer = {k: _longer(t, n_latents, times).half().numpy() for k, t in arrays.items()}
        np.savez(file, **longer)  # pyright: ignore[reportArgumentType]
    else:
        data = file.read_bytes()
        line = data.partition(b"\n")[0] + b"\n" if data[:1] == b"{" else b""
        tensors, values = read_torch(file)
        values = {} if line else values
        if line:
            described = _scaled(json.loads(line), n_latents, times)
            line = json.dumps(described).encode() + b"\n"
        longer = {key: _longer(t, n_latents, times) for key, t in tensors.items()}
        torch.save({**values, **longer}, file)
        file.write_bytes(line + file.read_bytes())


def _load(path: str, given: dict[str, Any], answers: Any) -> None:
    """Load a dictionary and send the largest memory that this took, and what went wrong."""
    for module in (tensorfiles, weights):
        vars(module)["MAP_FROM"] = MAPPED
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problem = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(path, **given)
    except WeightsError as error:
        problem = str(error)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answers.send((1024 * (after - before), problem))


def peaks(places: Sequence[tuple[Path, dict[str, Any]]]) -> list[tuple[int, str]]:
    """Largest memory of loading each, in a process that has loaded nothing, and its refusal.

    Args:
        places: Folder of each dictionary, and what its files lack.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.dictionaries.large_files"])
    found = []
    for place, given in places:
        here, there = server.Pipe()
        child = server.Process(target=_load, args=(str(place), given, there))
        child.start()
        assert here.poll(300), f"loading {place} does not end"
        found.append(here.recv())
        child.join()
    return found
