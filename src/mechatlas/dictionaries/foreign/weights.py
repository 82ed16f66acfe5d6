"""Contents of a place with weights: tensors with named axes, and settings beside them.

Found          tensors, plain values and settings of one place, and what the caller adds
find_tensors   files -> Found, with the shapes but not yet the numbers of large tensors
fit            tensors against the keys and axes that a layout promises
oriented       tensors by the names of a layout -> the four weights, the usual way round
take_integer   a whole number that stands among the tensors
as_pretrained  a dictionary of any kind -> its parts, to be written
as_json        entries -> those that JSON can hold
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechatlas.base import WeightsError
from mechatlas.dictionaries.pretrained import Pretrained
from mechatlas.files import Fields, read_json
from mechatlas.tensorfiles import (
    MAP_FROM,
    TORCH,
    mismatches,
    non_finite,
    not_floats,
    read_header,
    read_safetensors,
    read_sharded,
    read_tensors,
    read_torch,
    reading,
)

INDEX = ".safetensors.index.json"
"""Ending of the file that names the file of each tensor."""


@dataclasses.dataclass(eq=False)
class Found:
    """Contents of one place that may hold a dictionary."""

    file: Path
    """File of weights; of several files their folder."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of each tensor."""
    read: Callable[[], dict[str, Tensor]]
    """Reader of the tensors."""
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Plain values that a torch file holds beside its tensors."""
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Metadata in the header of a .safetensors file."""
    given: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings that the caller adds, because the files do not hold them."""
    used: set[str] = dataclasses.field(default_factory=set)
    """Settings of the caller that the layout has asked for."""

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Tensors, as they are in the files."""
        return self.read()

    @property
    def folder(self) -> Path:
        """Folder of the settings: of a file in `checkpoints`, the one above."""
        folder = self.file if self.file.is_dir() else self.file.parent
        return folder.parent if folder.name == "checkpoints" else folder

    def beside(self, *names: str) -> Path | None:
        """First of some files that is there; `*` stands for the name of the file of weights."""
        stem = self.file.name.split(".")[0]
        paths = [self.folder / name.replace("*", stem) for name in names]
        return next((path for path in paths if path.is_file()), None)

    def config(self, *names: str) -> Fields:
        """Settings in the first of some files that is there; none if there is none.

        Raises:
            WeightsError: The file is damaged, or not a JSON object.
        """
        path = self.beside(*names)
        return Fields(self.file, {}, error=WeightsError) if path is None else read_config(path)

    def setting(self, key: str, default: Any = None) -> Any:
        """Setting that the caller gave."""
        self.used.add(key)
        return self.given.get(key, default)

    def k(self, config: Fields | None = None, key: str = "k") -> int:
        """Number of active latents, from the caller or the settings.

        Raises:
            WeightsError: Neither says, or it is not a whole number of at least 1.
        """
        k = self.setting("k")
        if k is None and config is not None and config.has(key):
            return config.integer(key)
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise WeightsError(
                f"{self.file} does not say how many latents are active in a row: give it, as in "
                "load(path, k=50)."
            )
        return k


def find_tensors(file: Path, given: Mapping[str, Any]) -> Found:
    """Look at the tensors of a file, of the files in an index, or of all files of a folder.

    Args:
        file: File of weights, an index, or a folder of .safetensors files.
        given: Settings that the caller adds.

    Raises:
        WeightsError: A file is missing or damaged.
    """
    if file.is_dir():
        headers = {each: read_header(each) for each in sorted(file.glob("*.safetensors"))}
        return _of_several(file, headers, given)
    if file.name.endswith(INDEX):
        return _of_several(file, read_sharded(file), given)
    if file.suffix in TORCH:
        tensors, values = read_torch(file)
        return _of_tensors(file, tensors, values, given)
    if file.suffix == ".npz":
        return _of_tensors(file, read_tensors(file), {}, given)
    header = read_header(file)
    shapes = {name: entry.shape for name, entry in header.entries.items()}
    return Found(
        file,
        shapes,
        lambda: read_safetensors(file)[0],
        metadata=header.metadata,
        given=dict(given),
    )


def _of_tensors(
    file: Path, tensors: dict[str, Tensor], values: Mapping[str, Any], given: Mapping[str, Any]
) -> Found:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Found(file, shapes, lambda: tensors, values=values, given=dict(given))


def _of_several(place: Path, headers: Mapping[Path, Any], given: Mapping[str, Any]) -> Found:
    """Tensors of several files; where two hold one of the same name, `FILE/NAME` is its name.

    The names of Gemma Scope 2 are the same in the files of all layers.
    """
    counts = Counter(name for header in headers.values() for name in header.entries)
    names = {
        (file, name): name if counts[name] == 1 else f"{file.stem}/{name}"
        for file, header in headers.items()
        for name in header.entries
    }
    shapes = {names[file, key]: headers[file].entries[key].shape for file, key in names}

    def read() -> dict[str, Tensor]:
        whole = {file: read_safetensors(file)[0] for file in headers}
        return {new: whole[file][name] for (file, name), new in names.items()}

    return Found(place, shapes, read, given=dict(given))


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
    """Check tensors against what a layout promises.

    Args:
        file: Where they are from.
        tensors: All that the file holds.
        shapes: The axes of each key, as in `{"W_enc": "d_in latent"}`.
        optional: Keys that may be missing.
        sizes: Lengths of axes that are known; of others, what most tensors say.

    Returns:
        The same tensors as float32; matrices that would need more than `MAP_FROM` bytes together
        stay in the number format of the file.

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
    floats = {key: t for key, t in known.items() if t.is_floating_point()}
    wrong += non_finite(floats)
    if wrong:
        raise WeightsError(f"{file} does not hold a whole dictionary: {'; '.join(wrong)}.")
    if 4 * sum(t.numel() for t in floats.values()) < MAP_FROM:
        whole = {key: t.to(torch.float32) for key, t in floats.items()}
        too_large = non_finite({k: t for k, t in whole.items() if floats[k].dtype == torch.float64})
        if too_large:
            raise WeightsError(f"{file} has numbers beyond float32: {'; '.join(too_large)}.")
        return whole
    return {key: t.to(torch.float32) if t.ndim < 2 else t for key, t in floats.items()}


def _most_common(tensors: Mapping[str, Tensor], axes: Mapping[str, list[str]]) -> dict[str, int]:
    """The length of each axis on which most tensors agree, so that the odd one is named."""
    votes: dict[str, Counter[int]] = {}
    for key, names in axes.items():
        if key in tensors and tensors[key].ndim == len(names):
            for axis, length in zip(names, tensors[key].shape, strict=True):
                votes.setdefault(axis, Counter())[length] += 1
    return {axis: counter.most_common(1)[0][0] for axis, counter in votes.items()}


def oriented(
    parts: Mapping[str, Tensor], shapes: Mapping[str, str], names: Sequence[str]
) -> dict[str, Any]:
    """Weights under their usual names, encoders as (d_in, latent), decoders as (latent, d_out).

    Args:
        parts: Tensors that `fit` gave.
        shapes: Axes of each key.
        names: Keys of `W_enc`, `b_enc`, `W_dec` and `b_dec`; a bias that is missing is zero.
    """
    wanted = {"W_enc": -1, "b_enc": None, "W_dec": 0, "b_dec": None}
    weights = {}
    for (name, axis), key in zip(wanted.items(), names, strict=True):
        if key not in parts:
            continue
        turned = axis is not None and shapes[key].split()[axis] != "latent"
        weights[name] = parts[key].T if turned else parts[key]
    weights.setdefault("b_enc", torch.zeros(len(weights["W_dec"])))
    weights.setdefault("b_dec", torch.zeros(weights["W_dec"].shape[1]))
    return weights


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


def as_pretrained(dictionary: Any, library: str) -> Pretrained:
    """Copy a dictionary into the parts of other libraries.

    Raises:
        WeightsError: It is of a class of which they have nothing.
    """
    if not hasattr(dictionary, "as_pretrained"):
        kind = type(dictionary).__name__
        raise WeightsError(f"A {kind} cannot be written for {library}.")
    return dictionary.as_pretrained()


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the entries that JSON can hold."""
    kept = {}
    for key, value in values.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            continue
        kept[str(key)] = value
    return kept
