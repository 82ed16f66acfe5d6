"""circuit-tracer: transcoders of one layer, and cross-layer transcoders.

    one layer      `W_enc (latent, d_in)`, `W_dec (latent, d_out)`, relu or a threshold, a skip
    cross-layer    `W_enc_i`, `b_enc_i`, `b_dec_i`, `threshold_i` in `W_enc_i.safetensors` and
                   `W_dec_i (latent, layers from i on, d_out)` in `W_dec_i.safetensors`

Nothing is taken from the input. `config.yaml` beside the files names the hooks, else the
library's own defaults do.

Source: https://github.com/safety-research/circuit-tracer, version 0.5.0.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from mechatlas.base import WeightsError
from mechatlas.dictionaries.foreign.weights import Found, as_pretrained, fit, oriented
from mechatlas.dictionaries.pretrained import CrossLayerDictionary, Pretrained
from mechatlas.dictionaries.sparsity import ReLU, Threshold
from mechatlas.files import read, write
from mechatlas.tensorfiles import read_tensors, reading

THRESHOLD = "activation_function.threshold"
SHAPES = {
    "W_enc": "latent d_in",
    "b_enc": "latent",
    "W_dec": "latent d_out",
    "b_dec": "d_out",
    THRESHOLD: "latent",
    "W_skip": "d_out d_in",
}
HOOKS = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
"""Keys of `config.yaml`, and the hooks of the library where it says none."""


def read_one_layer(found: Found) -> Pretrained:
    """Read a transcoder of one layer.

    Raises:
        WeightsError: It is damaged, or not as the layout says.
    """
    parts = fit(found.file, found.tensors, SHAPES, optional=(THRESHOLD, "W_skip"))
    skip, threshold = parts.get("W_skip"), parts.get(THRESHOLD)
    number = re.search(r"(\d+)\D*$", found.file.stem)
    hooks = _hooks(found)
    place = None if number is None else f"blocks.{number[1]}."
    written = {} if place is None else {"hook_name_out": place + hooks["feature_output_hook"]}
    return Pretrained(
        **oriented(parts, SHAPES, ("W_enc", "b_enc", "W_dec", "b_dec")),
        sparsity=ReLU() if threshold is None else Threshold(),
        state={} if threshold is None else {"threshold": threshold},
        subtracts_b_dec=False,
        transcodes=True,
        W_skip=None if skip is None else skip.T,
        file_format="circuit-tracer transcoder",
        site=None if place is None else place + hooks["feature_input_hook"],
        metadata=written,
    )


def read_cross_layer(found: Found) -> CrossLayerDictionary | Pretrained:
    """Read a folder of a cross-layer transcoder, or one of its layers: `load(path, layer=3)`.

    Raises:
        WeightsError: A file is missing or damaged, or not as the layout says.
    """
    own = re.fullmatch(r"W_(?:enc|dec)_(\d+)", found.file.stem)
    folder = found.file.parent if own else found.file
    wanted = found.setting("layer", int(own[1]) if own else None)
    if wanted is not None:  # only two of the files are needed
        files = [folder / f"W_{part}_{wanted}.safetensors" for part in ("enc", "dec")]
        if not all(file.is_file() for file in files):
            raise WeightsError(
                f"{folder} has no layer {wanted}: no {files[0].name}, {files[1].name}."
            )
        tensors = {key: t for file in files for key, t in read_tensors(file).items()}
        atoms = tensors.get(f"W_dec_{wanted}")
        n = wanted + (atoms.shape[1] if atoms is not None and atoms.ndim == 3 else 1)
        return _layer(folder, tensors, wanted, n, _hooks(found))
    numbers = sorted(int(name[6:]) for name in found.shapes if re.fullmatch(r"W_enc_\d+", name))
    if numbers != list(range(len(numbers))):
        raise WeightsError(f"{folder} holds encoders of layers {numbers}, expected all from 0.")
    hooks = _hooks(found)
    n = len(numbers)
    layers = [_layer(folder, found.tensors, i, n, hooks) for i in numbers]
    return CrossLayerDictionary(
        layers, [f"blocks.{i}.{hooks['feature_input_hook']}" for i in numbers]
    )


def _layer(
    folder: Path, tensors: dict[str, Tensor], i: int, n: int, hooks: dict[str, str]
) -> Pretrained:
    """One layer, which writes itself and all layers after it."""
    shapes = {
        f"W_enc_{i}": "latent d_in",
        f"b_enc_{i}": "latent",
        f"W_dec_{i}": "latent layers d_out",
        f"b_dec_{i}": "d_out",
        f"threshold_{i}": "latent",
    }
    own = {key: t for key, t in tensors.items() if re.search(r"\d+$", key) and key in shapes}
    parts = fit(folder, own, shapes, optional=(f"threshold_{i}",), sizes={"layers": n - i})
    atoms = parts[f"W_dec_{i}"].flatten(1)
    width = atoms.shape[1] // (n - i)
    bias = atoms.new_zeros(atoms.shape[1]).to(parts[f"b_dec_{i}"])
    bias[:width] = parts[f"b_dec_{i}"]
    threshold = parts.get(f"threshold_{i}")
    return Pretrained(
        W_enc=parts[f"W_enc_{i}"].T,
        b_enc=parts[f"b_enc_{i}"],
        W_dec=atoms,
        b_dec=bias,
        sparsity=ReLU() if threshold is None else Threshold(),
        state={} if threshold is None else {"threshold": threshold},
        subtracts_b_dec=False,
        transcodes=True,
        file_format="circuit-tracer cross-layer transcoder",
        site=f"blocks.{i}.{hooks['feature_input_hook']}",
        widths={f"blocks.{j}.{hooks['feature_output_hook']}": width for j in range(i, n)},
    )


def _hooks(found: Found) -> dict[str, str]:
    """Hooks that `config.yaml` names, one `key: value` a line."""
    path = found.beside("config.yaml")
    if path is None:
        return dict(HOOKS)
    with reading(path):
        text = read(path, limit=1 << 20).decode()
    lines = re.findall(r"^(feature_\w+_hook):\s*['\"]?([\w.]+)['\"]?\s*$", text, re.MULTILINE)
    return {**HOOKS, **dict(lines)}


def save(dictionary: Any, folder: Path, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a transcoder, or all layers of a cross-layer transcoder, for circuit-tracer.

    Args:
        dictionary: Transcoder that reads one site, or one for each layer.
        folder: Folder to write.
        metadata: `hook_name`, from which the layer is taken.

    Returns:
        The file, or the folder of a cross-layer transcoder.

    Raises:
        DiskError: The folder is not writable or the disk is full.
        WeightsError: circuit-tracer has no such dictionary.
    """
    if isinstance(dictionary, CrossLayerDictionary):
        layers = [each for each in dictionary.layers if isinstance(each, Pretrained)]
        for i, layer in enumerate(layers):
            _refuse(layer)
            if len(layer.sites) != len(layers) - i or layer.W_skip is not None:
                raise WeightsError(
                    f"circuit-tracer needs layer {i} to write itself and all layers after it, "
                    "without a skip connection."
                )
        for i, layer in enumerate(layers):
            width = layer.d_out // len(layer.sites)
            parts = {"W_enc": layer.W_enc.T, "b_enc": layer.b_enc, "b_dec": layer.b_dec[:width]}
            encoder = {f"{key}_{i}": tensor for key, tensor in {**parts, **layer.state}.items()}
            _write(folder / f"W_enc_{i}.safetensors", encoder)
            atoms = layer.W_dec.unflatten(1, (len(layer.sites), width))
            _write(folder / f"W_dec_{i}.safetensors", {f"W_dec_{i}": atoms})
        return folder
    whole = as_pretrained(dictionary, "circuit-tracer")
    _refuse(whole)
    if whole.spans:
        raise WeightsError("circuit-tracer has no single file of a dictionary of several sites.")
    tensors = {"W_enc": whole.W_enc.T, "b_enc": whole.b_enc}
    tensors |= {"W_dec": whole.W_dec, "b_dec": whole.b_dec}
    if "threshold" in whole.state:
        tensors[THRESHOLD] = whole.state["threshold"]
    if whole.W_skip is not None:
        tensors["W_skip"] = whole.W_skip.T
    site = (metadata or {}).get("hook_name", whole.site)
    number = re.search(r"\.(\d+)\.", f".{site}.")
    return _write(folder / f"layer_{number[1] if number else 0}.safetensors", tensors)


def _refuse(whole: Pretrained) -> None:
    """Refuse what circuit-tracer cannot compute."""
    if not isinstance(whole.sparsity, ReLU | Threshold):
        raise WeightsError(
            f"circuit-tracer has no transcoder with the sparsity rule {whole.sparsity!r}; it has "
            "ReLU and thresholds."
        )
    if whole.d_out != whole.d_in * max(len(whole.sites), 1):
        raise WeightsError("circuit-tracer needs all sites of a transcoder to be of one width.")
    if whole.norm is not None or whole.subtracts_b_dec or not whole.transcodes:
        raise WeightsError(
            "circuit-tracer replaces MLPs: it needs a transcoder that takes nothing from its "
            "input and does not scale its rows."
        )


def _write(file: Path, tensors: dict[str, Tensor]) -> Path:
    plain = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    write(file, safetensors.torch.save(plain, {"written_by": "mechatlas"}))
    return file
