"""Whatever is wrong with a file of another library, it is refused by name.

Each golden file is cut, each of its keys is removed, renamed, reshaped, made whole numbers or
filled with NaN; bytes are changed at random. The answer is a `WeightsError` that names the file
(and the key), never another exception and never a dictionary that differs from the library's.
"""

import contextlib
import random
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch

from mechatlas.base import WeightsError
from tests.dictionaries.golden import EXPECTED, GOLDEN, NAMES, X, read, weights_of

MAY_BE_MISSING = ("scaling_factor", "k")  # the first is all ones; the second is in config.json


def copied(name, tmp_path):
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder)
    return folder


def tensors_of(file):
    if file.suffix == ".npz":
        with np.load(file) as opened:
            return {key: torch.from_numpy(opened[key]) for key in opened.files}
    if file.suffix == ".pt":
        return torch.load(file, weights_only=True)
    return safetensors.torch.load_file(file)


def write(tensors, file):
    if file.suffix == ".npz":
        np.savez(file, **{key: tensor.numpy() for key, tensor in tensors.items()})
    elif file.suffix == ".pt":
        torch.save(tensors, file)
    else:
        whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
        safetensors.torch.save_file(whole, file)


def refused(folder, *said):
    with pytest.raises(WeightsError) as caught:
        read(folder)
    for part in said:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_cut_is_refused_by_name(name, tmp_path):
    folder = copied(name, tmp_path)
    dice = random.Random(name)
    for file in folder.iterdir():
        whole = file.read_bytes()
        for cut in {0, 1, len(whole) // 2, len(whole) - 1, *dice.sample(range(len(whole)), 8)}:
            file.write_bytes(whole[:cut])
            refused(folder, file.name)
        file.write_bytes(whole)
    read(folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_key_is_refused_by_file_and_key(name, tmp_path):
    folder = copied(name, tmp_path)
    file = weights_of(folder)
    whole = tensors_of(file)
    unused = "threshold" if name == "dictionary_learning_topk" else None
    for key, tensor in whole.items():
        others = {other: t for other, t in whole.items() if other != key}
        if key not in (*MAY_BE_MISSING, unused):
            write(others, file)
            refused(folder, key, file.name)
        write({**others, f"{key}_": tensor}, file)
        refused(folder, f"{key}_", file.name)
        if key == "k":
            continue
        write({**others, key: tensor[None]}, file)
        refused(folder, key, file.name)
        if tensor.ndim == 2 and tensor.shape[0] != tensor.shape[1]:
            write({**others, key: tensor.T}, file)
            refused(folder, key, file.name, "has shape")
        if not tensor.is_floating_point():
            continue
        write({**others, key: tensor.to(torch.int64)}, file)
        refused(folder, f"{key} is int64, expected floats", file.name)
        for bad in (torch.nan, torch.inf):
            broken = tensor.clone(memory_format=torch.contiguous_format)
            broken.view(-1)[-1] = bad
            write({**others, key: broken}, file)
            where = [n - 1 for n in broken.shape] or ""
            refused(folder, f"{key}{where} is {bad}", file.name)


@pytest.mark.parametrize("name", NAMES)
def test_changed_bytes_never_raise_anything_else(name, tmp_path):
    folder = copied(name, tmp_path)
    dice = random.Random(name)
    for file in folder.iterdir():
        whole = file.read_bytes()
        for _ in range(12):
            changed = bytearray(whole)
            # Half of the changes near the start or the end, where the headers are.
            for _ in range(dice.randint(1, 3)):
                near = dice.choice((len(changed), 200))
                at = dice.randrange(min(near, len(changed)))
                changed[at if dice.random() < 0.7 else -1 - at] = dice.randrange(256)
            file.write_bytes(changed)
            with contextlib.suppress(WeightsError):
                read(folder)
        file.write_bytes(whole)
    torch.testing.assert_close(read(folder).encode(X), EXPECTED[f"{name}/code"])
