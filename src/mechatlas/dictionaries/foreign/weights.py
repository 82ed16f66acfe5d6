"""Promises of file formats: a configuration, and tensors with named axes.

read_config    a JSON file -> its values, checked as they are asked for
fit            tensors against the keys and axes that a format promises
take_integer   a whole number that stands among the tensors
"""

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mechatlas.base import WeightsError
from mechatlas.files import Fields, read_json
from mechatlas.tensorfiles import mismatches, non_finite, not_floats, reading


def read_config(file: Path) -> Fields:
    """Read a JSON file.

    Raises:
        WeightsError: It is missing, damaged, or not a JSON object.
    """
    if not file.exists():
        raise WeightsError(f"There is no file {file}, which says how to read it.")
    with reading(file):
        values = read_json(file)
    if not isinstance(values, dict):
        raise WeightsError(f"{file} is not a JSON object.")
    return Fields(file, values, error=WeightsError)


def fit(
    file: Path,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, str],
    *,
    optional: Collection[str] = (),
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Check tensors against what a format promises.

    Args:
        file: Where they are from.
        tensors: All that the file holds.
        shapes: The axes of each key, as in `{"W_enc": "d_in latent"}`.
        optional: Keys that may be missing.
        sizes: Lengths of axes that are known; of others, what most tensors say.

    Returns:
        The same tensors as float32.

    Raises:
        WeightsError: Keys are missing or unknown, shapes do not agree, a tensor is not of
            floats, or has values that are not finite; all that is wrong is listed.
    """
    axes = {key: names.split() for key, names in shapes.items()}
    sizes = {**_most_common(tensors, axes), **(sizes or {})}
    expected = {key: [sizes.get(axis) or -1 for axis in names] for key, names in axes.items()}
    words = {}
    for key, names in axes.items():
        lengths = ", ".join(f"{axis} {sizes.get(axis) or 'at least 1'}" for axis in names)
        words[key] = f"({lengths})"
    wrong = mismatches(tensors, expected, optional=optional, words=words)
    known = {key: tensors[key] for key in axes if key in tensors}
    wrong += not_floats(known)
    whole = {key: t.to(torch.float32) for key, t in known.items() if t.is_floating_point()}
    wrong += non_finite(whole)
    if wrong:
        raise WeightsError(f"{file} does not hold a whole dictionary: {'; '.join(wrong)}.")
    return whole


def _most_common(tensors: Mapping[str, Tensor], axes: Mapping[str, list[str]]) -> dict[str, int]:
    """The length of each axis on which most tensors agree, so that the odd one is named."""
    votes: dict[str, Counter[int]] = {}
    for key, names in axes.items():
        if key in tensors and tensors[key].ndim == len(names):
            for axis, length in zip(names, tensors[key].shape, strict=True):
                votes.setdefault(axis, Counter())[length] += 1
    return {axis: counter.most_common(1)[0][0] for axis, counter in votes.items()}


def take_integer(file: Path, tensors: dict[str, Tensor], key: str) -> int | None:
    """Take a whole number out of the tensors; `None` if there is none of that name.

    Args:
        file: File of the tensors, for the error message.
        tensors: Tensors of the file, from which the number is removed.
        key: Key of the number.

    Raises:
        WeightsError: The tensor is not a single whole number.
    """
    if key not in tensors:
        return None
    tensor = tensors.pop(key)
    if tensor.numel() != 1 or tensor.is_floating_point() or tensor.is_complex():
        raise WeightsError(
            f"{file}: {key} has shape {tuple(tensor.shape)} of {tensor.dtype}, "
            "expected one whole number."
        )
    return int(tensor)
