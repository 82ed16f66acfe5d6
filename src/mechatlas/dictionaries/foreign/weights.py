"""Promises of file formats: a configuration, and tensors with named axes.

Config         a JSON file whose values are checked as they are asked for
fit            tensors against the keys and axes that a format promises
take_integer   a whole number that stands among the tensors
"""

import json
import reprlib
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechatlas.base import WeightsError
from mechatlas.tensorfiles import mismatches, non_finite, not_floats


class Config:
    """The values of a JSON file, or of an object within it."""

    def __init__(self, file: Path, values: Mapping[str, Any], within: str = "") -> None:
        self.file, self.values, self.within = file, values, within

    @classmethod
    def read(cls, file: Path) -> "Config":
        """Read a file.

        Raises:
            WeightsError: It is missing, damaged, or not a JSON object.
        """
        try:
            values = json.loads(file.read_bytes())
        except FileNotFoundError as error:
            raise WeightsError(f"There is no file {file}, which says how to read it.") from error
        except (OSError, ValueError, RecursionError) as error:
            raise WeightsError(f"{file} cannot be read as JSON ({error}). Is it whole?") from error
        if not isinstance(values, dict):
            raise WeightsError(f"{file} is not a JSON object.")
        return cls(file, values)

    def wrong(self, key: str, expected: str) -> WeightsError:
        """Make the error for a value that cannot be used."""
        value = reprlib.repr(self.values[key]) if key in self.values else "missing"
        return WeightsError(f"{self.file}: {self.within}{key} is {value}, expected {expected}.")

    def has(self, key: str) -> bool:
        """Whether there is a value that is not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """Read a whole number.

        Args:
            key: Key of the value.
            default: Number if there is no value; by default there must be one.
            least: Smallest number allowed.

        Raises:
            WeightsError: The value is no whole number, or too small, or missing without a default.
        """
        value = self.values[key] if self.has(key) else default
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.wrong(key, f"a whole number of at least {least}")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        """Read true or false.

        Raises:
            WeightsError: The value is neither, or missing without a default.
        """
        value = self.values[key] if self.has(key) else default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Read a text.

        Raises:
            WeightsError: The value is not a text, or missing without a default.
        """
        value = self.values[key] if self.has(key) else default
        if not isinstance(value, str):
            raise self.wrong(key, "a text")
        return value

    def one_of(self, key: str, choices: Collection[str], default: str | None = None) -> str:
        """Read one of some texts.

        Args:
            key: Key of the value.
            choices: Texts allowed.
            default: Text if there is no value; by default there must be one.

        Raises:
            WeightsError: The value is another, or missing without a default.
        """
        value = self.text(key, default)
        if value not in choices:
            raise self.wrong(key, f"one of {', '.join(choices)}")
        return value

    def part(self, key: str) -> "Config":
        """Read an object within; an empty one if it is missing.

        Raises:
            WeightsError: The value is not an object.
        """
        value = self.values[key] if self.has(key) else {}
        if not isinstance(value, dict):
            raise self.wrong(key, "a JSON object")
        return Config(self.file, value, f"{self.within}{key}.")


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
