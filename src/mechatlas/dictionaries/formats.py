"""Dictionaries on disk.

    save    a dictionary -> a folder
    load    a folder or file -> a dictionary, whichever library wrote it

Several files `dictionary-00000000.safetensors`, each with a range of the latents, are a dictionary
that was trained by several processes; `load` joins them, or reads one of them as it is.

Our own file is `dictionary.safetensors`: `W_enc (d_in, n_latents)` (absent when tied), `b_enc`,
`W_dec (n_latents, d_out)`, `b_dec` and the sparsity rule's own tensors (such as `threshold`); of a
pose-tied one only `atoms`, `encoder`, `b_enc` and `b_dec` of one pose; of a class of your own its
`state_dict`. The kind and its configuration are JSON in its metadata. The files of other libraries
are recognized by their tensors and settings (`foreign.layouts`).
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, overload

import safetensors.torch
import torch
from torch import Tensor, nn

from mechatlas import remote
from mechatlas.base import WeightsError
from mechatlas.deprecated import ARGUMENTS
from mechatlas.dictionaries import hub
from mechatlas.dictionaries.activation_rules import (
    AbsTopK,
    BySite,
    GroupMax,
    Levels,
    Pursuit,
    SignedTopK,
    WeightedTopK,
)
from mechatlas.dictionaries.autoencoder import Autoencoder, Crosscoder, SparseCoder, Transcoder
from mechatlas.dictionaries.engine.shard_files import WHOLE
from mechatlas.dictionaries.foreign import circuit_tracer, dictionary_learning, saelens, sparsify
from mechatlas.dictionaries.foreign.layouts import find, recognize
from mechatlas.dictionaries.foreign.weights import fit
from mechatlas.dictionaries.pose_tied import PoseTied
from mechatlas.dictionaries.pretrained import NORMS, CrossLayerDictionary, Pretrained
from mechatlas.dictionaries.sharded import Shard
from mechatlas.dictionaries.sparsity import Sparsity, Threshold
from mechatlas.dictionaries.temporal import TemporalDictionary
from mechatlas.files import MANIFEST, lost_manifest, read_manifest, write
from mechatlas.tensorfiles import (
    mismatches,
    non_finite,
    not_floats,
    read_safetensors,
    reading,
)

FILE = "dictionary.safetensors"
SHARD_FILES = "dictionary-*.safetensors"
"""Files of a dictionary of several processes."""
KINDS = (Autoencoder, Transcoder, Crosscoder, PoseTied, TemporalDictionary)
"""Kinds of dictionaries that `load` knows, besides those of other libraries."""
WRITERS: dict[str, Callable[[Any, Path, Mapping[str, Any] | None], Path]] = {
    "saelens": saelens.save,
    "dictionary_learning": dictionary_learning.save,
    "sparsify": sparsify.save,
    "circuit-tracer": circuit_tracer.save,
}
"""Libraries for which dictionaries are written."""
RULES = (
    *get_args(Sparsity),
    Threshold,
    AbsTopK,
    SignedTopK,
    WeightedTopK,
    GroupMax,
    BySite,
    Levels,
    Pursuit,
)
"""Sparsity rules that a file of ours may name."""
STATE = {"threshold": "latent", "r_mag": "latent", "b_mag": "latent"}
STATE |= {"length": "latent", "levels": "level"}
STATE |= {"site_threshold": "site latent", "site_length": "site latent"}
PRETRAINED = {"W_enc": "d_in latent", "b_enc": "latent", "W_dec": "latent d_out", "b_dec": "d_out"}


def save(
    dictionary: Any,
    path: Path | str,
    *,
    format: str = "mechatlas",
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a dictionary into a folder and return the file of weights.

    A class of your own is a module; the arguments that build it again are its dict `config`, by
    default `d_in` and `n_latents`. Sparsity rules among them are dataclasses.

    Args:
        dictionary: Dictionary to write.
        path: Folder to write into, or its address.
        format: `mechatlas`, or the library that is to load it: `saelens`, `dictionary_learning`,
            `sparsify` or `circuit-tracer`.
        metadata: Further entries for that library: `model_name`, `hook_name` and the like.

    Raises:
        DiskError: The folder is not writable or the disk is full.
        WeightsError: The format does not know its kind or its sparsity rule.

    Examples:
        >>> import mechatlas as ma
        >>> ma.save(ma.Autoencoder(d_in=16, n_latents=64), "sae").name
        'dictionary.safetensors'
    """
    if format in WRITERS:
        return WRITERS[format](dictionary, Path(path), metadata)
    if format != "mechatlas":
        names = ", ".join(("mechatlas", *WRITERS))
        raise WeightsError(f"Cannot write the format {format!r}; known are {names}.")
    kind = type(dictionary)
    if not isinstance(dictionary, nn.Module):
        raise WeightsError(f"Cannot save a {kind.__name__}: it is not a torch.nn.Module.")
    if isinstance(dictionary, Pretrained):
        dictionary = dictionary.as_pretrained()
    sizes = {name: getattr(dictionary, name, None) for name in ("d_in", "n_latents")}
    shard = dictionary if isinstance(dictionary, Shard) else None
    config = {
        "kind": shard.kind if shard else kind.__name__,
        **_plain(getattr(dictionary, "config", sizes)),
    }
    try:
        described = json.dumps(config)
    except TypeError as error:
        raise WeightsError(f"The config of a {kind.__name__} is not JSON ({error}).") from error
    names, state = _saved_names(dictionary), dictionary.state_dict()
    tensors = {name: state[own].contiguous() for name, own in names.items()}
    if len({t.data_ptr() for t in tensors.values()}) < len(tensors):  # tied modules
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    file = Path(path) / (shard.file_name if shard else FILE)
    metadata = {"mechatlas": described}
    if shard is not None:
        metadata["shard"] = json.dumps([shard.latents.start, shard.latents.stop, shard.n_all])
    write(file, safetensors.torch.save(tensors, metadata))
    return file


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration as plain values: a rule as its class and fields."""
    plain = dict(config)
    rule = plain.get("sparsity")
    if rule is not None:
        if not dataclasses.is_dataclass(rule) or isinstance(rule, type):
            raise WeightsError(
                f"Cannot save a dictionary with the sparsity rule {rule!r}: a rule that can be "
                "read again is a dataclass."
            )
        plain["sparsity"] = {"type": type(rule).__name__, **dataclasses.asdict(rule)}
    if "layers" in plain:
        plain["layers"] = [_plain(layer) for layer in plain["layers"]]
    return plain


def _saved_names(dictionary: nn.Module) -> dict[str, str]:
    """Name in the file of each tensor of a dictionary: public, where that is no other's name."""
    own = list(dictionary.state_dict())
    names = {name.lstrip("_"): name for name in own}
    return names if len(names) == len(own) else {name: name for name in own}


@overload
def load(
    path: Path | str, *, device: str | None = None, dtype: torch.dtype | None = None, **given: Any
) -> SparseCoder | Pretrained | CrossLayerDictionary | TemporalDictionary: ...


@overload
def load(path: Path | str, *, classes: Sequence[type], **given: Any) -> Any: ...


def load(
    path: Path | str,
    *,
    classes: Sequence[type] = (),
    device: str | None = None,
    dtype: torch.dtype | None = None,
    **given: Any,
) -> Any:
    """Read a dictionary of any known format from a folder or file.

    Reading runs no code that a file may hold. One of another library gives a `Pretrained`, which
    encodes and decodes as that library does; a cross-layer transcoder gives a
    `CrossLayerDictionary`. Of files of a gigabyte or more the numbers stay in their format and on
    disk until they are used.

    Args:
        path: Folder, file, or address: `s3://bucket/folder` and others of fsspec, or on the
            Hugging Face Hub `hf://owner/name/folder@revision`.
        classes: Classes of your own, of dictionaries or sparsity rules, that the file may need.
        device: Device of the dictionary; by default the CPU.
        dtype: Number format of the weights; by default float32, of large files that of the file.
        given: Settings that the files of a library lack, such as `k=50`, `layer=3`,
            `threshold=0.1`, `transcodes=True` or `format="Qwen Scope"`.

    Raises:
        WeightsError: There is none, there are several, it is damaged, needs a class or a setting
            that was not given, or its keys, shapes or settings are not as its format says.

    Examples:
        >>> import mechatlas as ma
        >>> _ = ma.save(ma.Autoencoder(d_in=16, n_latents=64), "sae")
        >>> ma.load("sae").n_latents
        64
    """
    path = hub.fetch(str(path)) if hub.is_address(path) else remote.fetched(path)
    own = path / FILE if path.is_dir() else path
    if own.name == FILE and _is_own(own):
        dictionary = _read_own(own, classes)
    elif path.is_dir() and (files := sorted(path.glob(SHARD_FILES))):
        dictionary = _read_shards(files)
    else:
        found = find(path, given)
        _check_run(found.file)
        if "mechatlas" in found.metadata:
            dictionary = _read_own(found.file, classes)
        else:
            layout = recognize(found)
            dictionary = layout.read(found)
            surplus = sorted(set(given) - found.used)
            if surplus:
                raise WeightsError(
                    f"{found.file} is of {layout.name}, which needs no {', '.join(surplus)}."
                )
    return dictionary if device is dtype is None else dictionary.to(device=device, dtype=dtype)


def _is_own(file: Path) -> bool:
    """Whether something is at the place of a dictionary, or a manifest says that it was there."""
    manifest = file.parent / MANIFEST
    if os.path.lexists(file) or not manifest.is_file():
        return os.path.lexists(file)
    with reading(manifest):
        return file.name in read_manifest(manifest).get("files", {})


def _read_own(file: Path, classes: Sequence[type] = ()) -> nn.Module:
    """Read what `save` wrote."""
    _check_run(file)
    tensors, metadata = read_safetensors(file)
    with reading(file):
        config = json.loads(metadata.get("mechatlas", "null"))
    return _rebuild(config, tensors, file, classes)


def _read_shards(files: Sequence[Path]) -> nn.Module:
    """Join the files of a dictionary that was trained by several processes."""
    parts, ranges, config = [], [], {}
    for file in files:
        _check_run(file)
        tensors, metadata = read_safetensors(file)
        with reading(file):
            start, stop, total = map(int, json.loads(metadata["shard"]))
            config = {**json.loads(metadata["mechatlas"]), "n_latents": total}
        parts.append(tensors)
        ranges.append((start, stop, total))
    bounds = [0, *(stop for _, stop, _ in ranges)]
    if [(*pair, bounds[-1]) for pair in itertools.pairwise(bounds)] != ranges:
        found = ", ".join(f"{start} to {stop} of {total}" for start, stop, total in ranges)
        raise WeightsError(
            f"{files[0].parent} has files of the latents {found}, expected all of one dictionary."
        )
    joined = {
        name: tensor if name in WHOLE else torch.cat([p[name] for p in parts], int(name == "W_enc"))
        for name, tensor in parts[0].items()
    }
    return _rebuild(config, joined, files[0], ())


def _check_run(file: Path) -> None:
    """Refuse a dictionary of a run that has not ended, or beside the manifest of another run."""
    manifest = file.parent / MANIFEST
    if (lost := lost_manifest(file.parent)) is not None:
        raise WeightsError(lost)
    if not manifest.is_file():
        return
    with reading(manifest):
        values = read_manifest(manifest)
    if not values.get("complete", True):
        raise WeightsError(
            f"{file} is of a run that has not ended. Run its command again; it goes on where it "
            "stopped."
        )
    if values.get("files") and file.name not in values["files"]:
        raise WeightsError(
            f"{manifest} is of another run: it has no checksum of {file.name}. Restore it, or move "
            f"{file.name} alone into another folder."
        )


def _rebuild(
    config: Any, tensors: dict[str, Tensor], file: Path, classes: Sequence[type]
) -> nn.Module:
    """Build a dictionary from its configuration and tensors.

    Nothing is allocated before the shapes in the file are those that the configuration asks for.
    """
    known = {each.__name__: each for each in (*KINDS, *RULES, *classes)}

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
        kind = arguments.pop("kind")
        if kind == CrossLayerDictionary.__name__:
            layers = [
                _pretrained(_with_rule(each, build), _below(tensors, f"layers.{i}."), file)
                for i, each in enumerate(arguments["layers"])
            ]
            return CrossLayerDictionary(layers, arguments["reads"])
        arguments = _with_rule(arguments, build)
        if kind == Pretrained.__name__:
            return _pretrained(arguments, tensors, file)
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


def _with_rule(config: Mapping[str, Any], build: Callable[..., Any]) -> dict[str, Any]:
    """Configuration with the sparsity rule that it describes."""
    rule = dict(config.get("sparsity") or {})
    return {**config, "sparsity": build(rule.pop("type"), rule)} if rule else dict(config)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _pretrained(arguments: dict[str, Any], tensors: dict[str, Tensor], file: Path) -> Pretrained:
    """Build a dictionary of another library, with the conventions that were saved with it."""
    shapes = {**PRETRAINED, "W_skip": "d_in d_out", **STATE}
    parts = fit(file, tensors, shapes, optional=("W_skip", *STATE))
    weights = {name: parts[name] for name in (*PRETRAINED, "W_skip") if name in parts}
    norm = arguments.pop("norm")
    return Pretrained(
        **weights,
        state={name: parts[name] for name in STATE if name in parts},
        norm=None if norm is None else NORMS[norm],
        **arguments,
    )


def _room(tensor: Tensor) -> Tensor:
    """Memory for a tensor on the meta device; `to_empty` does this after a second of imports."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _fill(dictionary: nn.Module, tensors: dict[str, Tensor], file: Path) -> None:
    """Copy the tensors of a file into a dictionary, which may be on the meta device."""
    names, wanted = _saved_names(dictionary), dictionary.state_dict()
    wrong = mismatches(tensors, {name: wanted[own].shape for name, own in names.items()})
    whole_numbers = [name for name, own in names.items() if not wanted[own].is_floating_point()]
    wrong += not_floats({n: t for n, t in tensors.items() if n not in whole_numbers})
    wrong += non_finite(tensors)
    if wrong:
        raise WeightsError(f"{file} does not hold a whole dictionary: {'; '.join(wrong)}.")
    if any(tensor.is_meta for tensor in wanted.values()):
        dictionary._apply(_room)
    dictionary.load_state_dict({own: tensors[name] for name, own in names.items()})
