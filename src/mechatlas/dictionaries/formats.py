"""Dictionaries on disk.

    save    a dictionary -> a folder
    load    a folder or file -> a dictionary, whichever library wrote it

Our own file is `dictionary.safetensors`: `W_enc (d_in, n_latents)` (absent when tied), `b_enc`,
`W_dec (n_latents, d_out)`, `b_dec` and the sparsity rule's own tensors (such as `threshold`); of a
pose-tied one only `atoms`, `encoder`, `b_enc` and `b_dec` of one pose. The kind and its
configuration are JSON in its metadata. The files of other libraries are told by their names, and a
file under another name by its keys; how each is read is in `foreign`.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
from torch import Tensor

from mechatlas.base import WeightsError
from mechatlas.dictionaries.autoencoder import Autoencoder, Crosscoder, SparseCoder, Transcoder
from mechatlas.dictionaries.foreign import dictionary_learning, gemma_scope, saelens, sparsify
from mechatlas.dictionaries.foreign.weights import read_header, read_tensors, reading
from mechatlas.dictionaries.pose_tied import PoseTied
from mechatlas.dictionaries.pretrained import Pretrained
from mechatlas.dictionaries.sparsity import Sparsity
from mechatlas.files import non_finite, write

FILE = "dictionary.safetensors"
KINDS = {kind.__name__: kind for kind in (Autoencoder, Transcoder, Crosscoder, PoseTied)}
SPARSITY = {rule.__name__: rule for rule in get_args(Sparsity)}


def save(
    dictionary: SparseCoder | Pretrained,
    path: Path | str,
    *,
    format: Literal["mechatlas", "saelens"] = "mechatlas",
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a dictionary into a folder and return the file of weights.

    Args:
        dictionary: What to write.
        path: The folder.
        format: `mechatlas`, or `saelens` for a folder that SAELens 6 loads.
        metadata: For SAELens, what else to note: `model_name`, `hook_name` and the like.

    Raises:
        DiskError: The folder is not writable or the disk is full.
        WeightsError: The format does not know its sparsity rule.
    """
    if format == "saelens":
        return saelens.save(dictionary, Path(path), metadata)
    if format != "mechatlas":
        raise WeightsError(f"Cannot write the format {format!r}; known are mechatlas, saelens.")
    if isinstance(dictionary, Pretrained):
        raise WeightsError(
            f"A dictionary read from a file of {dictionary.file_format or 'another library'} "
            "cannot be written in our own format; write it with format='saelens'."
        )
    rule: Any = dictionary.sparsity
    if SPARSITY.get(type(rule).__name__) is not type(rule):
        raise WeightsError(
            f"Cannot save a dictionary with the sparsity rule {rule!r}; "
            f"known are {', '.join(SPARSITY)}."
        )
    sparsity = {"type": type(rule).__name__, **dataclasses.asdict(rule)}
    config = {"kind": type(dictionary).__name__, **dictionary.config, "sparsity": sparsity}
    tensors = {name.lstrip("_"): t.contiguous() for name, t in dictionary.state_dict().items()}
    file = Path(path) / FILE
    write(file, safetensors.torch.save(tensors, {"mechatlas": json.dumps(config)}))
    return file


def load(path: Path | str) -> SparseCoder | Pretrained:
    """Read a dictionary of any known format from a folder or file.

    Reading runs no code that a file may hold. One of another library gives a `Pretrained`, which
    encodes and decodes as that library does.

    Raises:
        WeightsError: There is none, there are several, it is damaged, or its keys, shapes or
            settings are not as its format says.
    """
    path = Path(path)
    if not path.is_dir():
        file = path
    else:
        found = [path / name for name in READERS if (path / name).is_file()]
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise WeightsError(f"{path} holds several dictionaries ({names}): give one file.")
        file = found[0] if found else path / FILE
    if not file.is_file():
        raise WeightsError(f"There is no dictionary at {path} (no file {file}).{_hint(path)}")
    return (READERS.get(file.name) or _reader_by_content(file))(file)


def _read_own(file: Path) -> SparseCoder:
    """Read what `save` wrote.

    Raises:
        WeightsError: It is damaged, or its keys or shapes are not as expected.
    """
    tensors = read_tensors(file)
    with reading(file):
        config = json.loads(read_header(file)[1].get("mechatlas", "null"))
    return _rebuild(config, tensors, file)


READERS: dict[str, Callable[[Path], SparseCoder | Pretrained]] = {
    FILE: _read_own,
    saelens.WEIGHTS: saelens.read,
    "sae.safetensors": sparsify.read,
    "ae.pt": dictionary_learning.read,
    "params.npz": gemma_scope.read_first,
    "params.safetensors": gemma_scope.read_second,
}


def _reader_by_content(file: Path) -> Callable[[Path], SparseCoder | Pretrained]:
    """How to read a file whose name says nothing.

    Raises:
        WeightsError: It is damaged, or its keys are those of no known format.
    """
    if file.suffix == ".npz":
        return gemma_scope.read_first
    if file.suffix in (".pt", ".pth", ".bin"):
        return dictionary_learning.read
    keys, metadata = read_header(file)
    if "mechatlas" in metadata:
        return _read_own
    for key, reader in (
        ("w_enc", gemma_scope.read_second),
        ("encoder.weight", sparsify.read),
        ("W_enc", saelens.read),
    ):
        if key in keys:
            return reader
    raise WeightsError(
        f"{file} is not a dictionary of a known format; it holds {', '.join(keys[:8])}."
    )


def _hint(path: Path) -> str:
    """Where dictionaries are, if not in the folder then in its folders."""
    if not path.is_dir():
        return ""
    within = sorted(
        {f"{f.parent.name}/{f.name}" for name in READERS for f in path.glob(f"*/{name}")}
    )
    return f" There is {', '.join(within[:3])}: give one of these folders." if within else ""


def _rebuild(config: Any, tensors: dict[str, Tensor], file: Path) -> SparseCoder:
    """A dictionary from its parts.

    Raises:
        WeightsError: They do not fit together.
    """
    try:
        rule, built_with = dict(config["sparsity"]), dict(config)
        built_with["sparsity"] = SPARSITY[rule.pop("type")](**rule)
        dictionary = KINDS[built_with.pop("kind")](**built_with)
    except (TypeError, KeyError, ValueError, AttributeError, RuntimeError, MemoryError) as error:
        raise WeightsError(f"{file} is not a dictionary of mechatlas ({error!r}).") from error
    wanted = {name.lstrip("_"): tensor for name, tensor in dictionary.state_dict().items()}
    wrong = [f"missing {name}" for name in wanted if name not in tensors]
    wrong += [f"surplus {name}" for name in tensors if name not in wanted]
    wrong += [
        f"{name} has shape {tuple(t.shape)}, expected {tuple(wanted[name].shape)}"
        for name, t in tensors.items()
        if name in wanted and t.shape != wanted[name].shape
    ]
    wrong += [
        f"{name} is {t.dtype}, expected floats"
        for name, t in tensors.items()
        if not t.is_floating_point()
    ]
    wrong += non_finite(tensors)
    if wrong:
        raise WeightsError(f"{file} does not hold a whole dictionary: {'; '.join(wrong)}.")
    own = {name: tensors[name.lstrip("_")] for name in dictionary.state_dict()}
    dictionary.load_state_dict(own)
    dictionary.fresh = False
    return dictionary
