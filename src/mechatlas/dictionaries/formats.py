"""Dictionaries on disk.

    save    a dictionary -> a folder
    load    a folder or file -> a dictionary, whichever library wrote it

Our own file is `dictionary.safetensors`: `W_enc (d_in, n_latents)` (absent when tied), `b_enc`,
`W_dec (n_latents, d_out)`, `b_dec` and the sparsity rule's own tensors (such as `threshold`); of a
pose-tied one only `atoms`, `encoder`, `b_enc` and `b_dec` of one pose; of a class of your own its
`state_dict`. The kind and its configuration are JSON in its metadata. The files of other libraries
are told by their names, and a file under another name by its keys; `foreign` reads them.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, overload

import safetensors.torch
import torch
from torch import Tensor, nn

from mechatlas.base import WeightsError
from mechatlas.deprecated import ARGUMENTS
from mechatlas.dictionaries.autoencoder import Autoencoder, Crosscoder, SparseCoder, Transcoder
from mechatlas.dictionaries.foreign import dictionary_learning, gemma_scope, saelens, sparsify
from mechatlas.dictionaries.pose_tied import PoseTied
from mechatlas.dictionaries.pretrained import Pretrained
from mechatlas.dictionaries.sparsity import Sparsity
from mechatlas.files import MANIFEST, read_manifest, write
from mechatlas.tensorfiles import (
    mismatches,
    non_finite,
    not_floats,
    read_header,
    read_safetensors,
    reading,
)

FILE = "dictionary.safetensors"
KINDS = (Autoencoder, Transcoder, Crosscoder, PoseTied)
"""Kinds of dictionaries that `load` knows."""


def save(
    dictionary: Any,
    path: Path | str,
    *,
    format: Literal["mechatlas", "saelens"] = "mechatlas",
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a dictionary into a folder and return the file of weights.

    A class of your own is a module; the arguments that build it again are its dict `config`, by
    default `d_in` and `n_latents`. Sparsity rules among them are dataclasses.

    Args:
        dictionary: Dictionary to write.
        path: Folder to write into.
        format: `mechatlas`, or `saelens` for a folder that SAELens 6 loads.
        metadata: Further entries for SAELens: `model_name`, `hook_name` and the like.

    Raises:
        DiskError: The folder is not writable or the disk is full.
        WeightsError: The format does not know its kind or its sparsity rule.

    Examples:
        >>> import mechatlas as ma
        >>> ma.save(ma.Autoencoder(d_in=16, n_latents=64), "sae").name
        'dictionary.safetensors'
    """
    if format == "saelens":
        return saelens.save(dictionary, Path(path), metadata)
    if format != "mechatlas":
        raise WeightsError(f"Cannot write the format {format!r}; known are mechatlas, saelens.")
    kind = type(dictionary)
    if not isinstance(dictionary, nn.Module):
        raise WeightsError(f"Cannot save a {kind.__name__}: it is not a torch.nn.Module.")
    sizes = {name: getattr(dictionary, name, None) for name in ("d_in", "n_latents")}
    config: dict[str, Any] = {"kind": kind.__name__, **getattr(dictionary, "config", sizes)}
    rule = config.get("sparsity")
    if rule is not None:
        if not dataclasses.is_dataclass(rule) or isinstance(rule, type):
            raise WeightsError(
                f"Cannot save a dictionary with the sparsity rule {rule!r}: a rule that can be "
                "read again is a dataclass."
            )
        config["sparsity"] = {"type": type(rule).__name__, **dataclasses.asdict(rule)}
    try:
        described = json.dumps(config)
    except TypeError as error:
        raise WeightsError(f"The config of a {kind.__name__} is not JSON ({error}).") from error
    names, state = _saved_names(dictionary), dictionary.state_dict()
    tensors = {name: state[own].contiguous() for name, own in names.items()}
    if len({t.data_ptr() for t in tensors.values()}) < len(tensors):  # tied modules
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    file = Path(path) / FILE
    write(file, safetensors.torch.save(tensors, {"mechatlas": described}))
    return file


def _saved_names(dictionary: nn.Module) -> dict[str, str]:
    """Name in the file of each tensor of a dictionary: public, where that is no other's name."""
    own = list(dictionary.state_dict())
    names = {name.lstrip("_"): name for name in own}
    return names if len(names) == len(own) else {name: name for name in own}


@overload
def load(path: Path | str) -> SparseCoder | Pretrained: ...


@overload
def load(path: Path | str, *, classes: Sequence[type]) -> Any: ...


def load(path: Path | str, *, classes: Sequence[type] = ()) -> Any:
    """Read a dictionary of any known format from a folder or file.

    Reading runs no code that a file may hold. One of another library gives a `Pretrained`, which
    encodes and decodes as that library does.

    Args:
        path: Folder or file.
        classes: Classes of your own, of dictionaries or sparsity rules, that the file may need.

    Raises:
        WeightsError: There is none, there are several, it is damaged, needs a class that was not
            given, or its keys, shapes or settings are not as its format says.

    Examples:
        >>> import mechatlas as ma
        >>> _ = ma.save(ma.Autoencoder(d_in=16, n_latents=64), "sae")
        >>> ma.load("sae").n_latents
        64
    """
    path = Path(path)
    if not path.is_dir():
        file = path
    else:
        files = [path / name for name in READERS if (path / name).is_file()]
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise WeightsError(f"{path} holds several dictionaries ({names}): give one file.")
        file = files[0] if files else path / FILE
    if not file.is_file():
        raise WeightsError(f"There is no dictionary at {path} (no file {file}).{_hint(path)}")
    _refuse_unfinished(file)
    reader = READERS.get(file.name) or _reader_by_content(file)
    return reader(file) if reader is not _read_own else _read_own(file, classes)


def _read_own(file: Path, classes: Sequence[type] = ()) -> nn.Module:
    """Read what `save` wrote.

    Raises:
        WeightsError: It is damaged, or its keys or shapes are not as expected.
    """
    tensors, metadata = read_safetensors(file)
    with reading(file):
        config = json.loads(metadata.get("mechatlas", "null"))
    return _rebuild(config, tensors, file, classes)


def _refuse_unfinished(file: Path) -> None:
    """Refuse a dictionary in the folder of a run that has not ended.

    Raises:
        WeightsError: The run has not ended, or its manifest is damaged.
    """
    manifest = file.parent / MANIFEST
    if not manifest.is_file():
        return
    with reading(manifest):
        ended = read_manifest(manifest).get("complete", True)
    if not ended:
        raise WeightsError(
            f"{file} is of a run that has not ended. Run its command again; it goes on where it "
            "stopped."
        )


READERS: dict[str, Callable[[Path], nn.Module]] = {
    FILE: _read_own,
    saelens.WEIGHTS: saelens.read,
    "sae.safetensors": sparsify.read,
    "ae.pt": dictionary_learning.read,
    "params.npz": gemma_scope.read_first,
    "params.safetensors": gemma_scope.read_second,
}


def _reader_by_content(file: Path) -> Callable[[Path], nn.Module]:
    """Find the reader of a file whose name says nothing.

    Raises:
        WeightsError: It is damaged, or its keys are those of no known format.
    """
    if file.suffix == ".npz":
        return gemma_scope.read_first
    if file.suffix in (".pt", ".pth", ".bin"):
        return dictionary_learning.read
    header = read_header(file)
    keys = sorted(header.entries)
    if "mechatlas" in header.metadata:
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
    """Say where dictionaries are, if not in the folder then in its folders."""
    if not path.is_dir():
        return ""
    within = sorted(
        {f"{f.parent.name}/{f.name}" for name in READERS for f in path.glob(f"*/{name}")}
    )
    return f" There is {', '.join(within[:3])}: give one of these folders." if within else ""


def _rebuild(
    config: Any, tensors: dict[str, Tensor], file: Path, classes: Sequence[type]
) -> nn.Module:
    """Build a dictionary from its configuration and tensors.

    Nothing is allocated before the shapes in the file are those that the configuration asks for.

    Raises:
        WeightsError: They do not fit together, or a class is missing.
    """
    known = {each.__name__: each for each in (*KINDS, *get_args(Sparsity), *classes)}

    def build(name: Any, arguments: dict[str, Any]) -> Any:
        if name not in known:
            raise WeightsError(
                f"{file} holds a {name}, a class that mechatlas does not have: "
                f"load(path, classes=[{name}])."
            )
        renamed = ARGUMENTS.get(name, {})  # files of version 0.1 have the old names
        return known[name](**{renamed.get(key, key): v for key, v in arguments.items()})

    try:
        arguments = dict(config)
        kind, rule = arguments.pop("kind"), arguments.get("sparsity")
        if rule is not None:
            rule = dict(rule)
            arguments["sparsity"] = build(rule.pop("type"), rule)
        with torch.device("meta" if known.get(kind) in KINDS else "cpu"):
            dictionary = build(kind, arguments)
    except WeightsError:
        raise
    except Exception as error:  # arguments of any kind make constructors raise anything
        raise WeightsError(f"{file} is not a dictionary of mechatlas ({error!r:.300}).") from error
    _fill(dictionary, tensors, file)
    if isinstance(dictionary, SparseCoder):
        dictionary.untrained = False
    return dictionary


def _fill(dictionary: nn.Module, tensors: dict[str, Tensor], file: Path) -> None:
    """Copy the tensors of a file into a dictionary, which may be on the meta device.

    Raises:
        WeightsError: Keys, shapes or numbers are not those of the dictionary.
    """
    names, wanted = _saved_names(dictionary), dictionary.state_dict()
    wrong = mismatches(tensors, {name: wanted[own].shape for name, own in names.items()})
    whole_numbers = [name for name, own in names.items() if not wanted[own].is_floating_point()]
    wrong += not_floats({n: t for n, t in tensors.items() if n not in whole_numbers})
    wrong += non_finite(tensors)
    if wrong:
        raise WeightsError(f"{file} does not hold a whole dictionary: {'; '.join(wrong)}.")
    if any(tensor.is_meta for tensor in wanted.values()):
        dictionary.to_empty(device="cpu")
    dictionary.load_state_dict({own: tensors[name] for name, own in names.items()})
