"""Gemma Scope and Gemma Scope 2: JumpReLU dictionaries and transcoders of Google DeepMind.

Both take nothing from the input. The second writes its keys in lower case, and may add a linear
map of the input to what a transcoder gives.

    one site        `params.npz`, `params.safetensors`
    several sites   `params_layer_i.safetensors` for each site read, with `w_dec (latent, sites,
                    d_out)`: a cross-layer transcoder (folder `clt/...`) or a crosscoder (folder
                    `crosscoder/layer_7_13_17_22_...`)

Source: Lieberum et al., Gemma Scope (2024), and the tutorial of Gemma Scope 2.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from mechatlas.base import WeightsError
from mechatlas.dictionaries.foreign.weights import Found, fit, oriented
from mechatlas.dictionaries.pretrained import CrossLayerDictionary, Pretrained
from mechatlas.dictionaries.sparsity import Threshold

SHAPES = {
    "W_enc": "d_in latent",
    "W_dec": "latent d_out",
    "b_enc": "latent",
    "b_dec": "d_out",
    "threshold": "latent",
}
LOWER = {key.replace("W_", "w_"): axes for key, axes in SHAPES.items()}
SKIP = "affine_skip_connection"
CONVENTIONS: dict[str, Any] = {"sparsity": Threshold(), "subtracts_b_dec": False}


def read_first(found: Found) -> Pretrained:
    """Read `params.npz`.

    A transcoder looks like an autoencoder; it is known by the name of a folder above it, or by
    `load(path, transcodes=True)`.

    Raises:
        WeightsError: It is damaged, or not as the format says.
    """
    parts = fit(found.file, found.tensors, SHAPES)
    named = any("transcoder" in part for part in found.file.absolute().parts[-8:])
    transcodes = found.setting("transcodes", named)
    return Pretrained(
        **oriented(parts, SHAPES, ("W_enc", "b_enc", "W_dec", "b_dec")),
        state={"threshold": parts["threshold"]},
        transcodes=transcodes or len(parts["W_enc"]) != len(parts["b_dec"]),
        file_format="Gemma Scope",
        **CONVENTIONS,
    )


def read_second(found: Found) -> Pretrained:
    """Read `params.safetensors`, and `config.json` if it is there.

    Raises:
        WeightsError: It is damaged, or not as the format says.
    """
    config = found.config("config.json")
    if config.values:
        config.one_of("architecture", ("jump_relu",))
    skips = config.flag("affine_connection", default=SKIP in found.shapes)
    shapes = {**LOWER, **({SKIP: "d_in d_out"} if skips else {})}
    parts = fit(found.file, found.tensors, shapes)
    differs = len(parts["w_enc"]) != len(parts["b_dec"])
    return Pretrained(
        **oriented(parts, shapes, ("w_enc", "b_enc", "w_dec", "b_dec")),
        state={"threshold": parts["threshold"]},
        transcodes=config.has("hf_hook_point_out") or skips or differs,
        W_skip=parts.get(SKIP),
        file_format="Gemma Scope 2",
        site=_site(config.text("hf_hook_point_in", "")),
        **CONVENTIONS,
    )


def _site(point: str) -> str | None:
    """Site of ours for a point such as `model.layers.3.self_attn.o_proj.input`."""
    return re.sub(r"\.output$", "", re.sub(r"\.input$", ":input", point)) or None


def read_several(found: Found) -> CrossLayerDictionary | Pretrained:
    """Read a cross-layer transcoder or a crosscoder, or one of its layers: `load(path, layer=3)`.

    Raises:
        WeightsError: A file is missing or damaged, or not as the format says.
    """
    if not found.file.is_dir():
        number = re.search(r"(\d+)\.safetensors$", found.file.name)
        layer = found.setting("layer", int(number[1]) if number else None)
        if layer is None:
            raise WeightsError(
                f"{found.file}: w_dec has shape {found.shapes['w_dec']}: it writes several sites, "
                "and its name does not say which it reads: load(path, layer=3)."
            )
        return _layer(found.file, found.tensors, layer, _points(found, found.shapes["w_dec"][1]))
    files = sorted({name.split("/")[0] for name in found.shapes}, key=_number)
    if [_number(name) for name in files] != list(range(len(files))):
        raise WeightsError(f"{found.file} holds {', '.join(files)}, expected all layers from 0.")
    points = _points(found, len(files))
    wanted = found.setting("layer")
    layers = []
    for i, name in enumerate(files):
        if wanted in (None, i):
            own = {key.split("/")[1]: t for key, t in found.tensors.items() if key[: len(name) + 1]
                   == f"{name}/"}  # fmt: skip
            layers.append(_layer(found.file / f"{name}.safetensors", own, i, points))
    if not layers:
        raise WeightsError(f"{found.file} has no layer {wanted}; it has 0 to {len(files) - 1}.")
    return layers[0] if wanted is not None else CrossLayerDictionary(layers, points)


def _number(name: str) -> int:
    return int(name.rpartition("_")[2]) if name.rpartition("_")[2].isdecimal() else -1


def _points(found: Found, n: int) -> list[str]:
    """Names of the sites: of a crosscoder the layers are in the name of its folder."""
    layers = re.search(r"layer((?:_\d+)+)_width", str(found.file.absolute()))
    numbers = layers[1].split("_")[1:] if layers else []
    if len(numbers) == n:
        return [f"blocks.{number}.hook_resid_post" for number in numbers]
    return [f"blocks.{number}.hook_mlp_out" for number in range(n)]


def _layer(file: Path, tensors: dict[str, Tensor], i: int, points: list[str]) -> Pretrained:
    """One layer. Sites before its own are left out where all its atoms are zero."""
    n = len(points)
    shapes = {**LOWER, "w_dec": "latent sites d_out"}
    if SKIP in tensors:
        shapes[SKIP] = "d_in d_out"
    parts = fit(file, tensors, shapes, sizes={"sites": n})
    if not 0 <= i < n:
        raise WeightsError(f"{file}: layer is {i}, expected less than its {n} sites.")
    atoms, width = parts["w_dec"], len(parts["b_dec"])
    start = 0 if atoms[:, :i].count_nonzero() else i
    own = slice((i - start) * width, (i - start + 1) * width)
    bias = parts["b_dec"].new_zeros((n - start) * width)
    bias[own] = parts["b_dec"]
    skip = None
    if SKIP in parts:
        skip = parts[SKIP].new_zeros(len(parts["w_enc"]), len(bias))
        skip[:, own] = parts[SKIP]
    crosscodes = points[i].endswith("resid_post")
    return Pretrained(
        W_enc=parts["w_enc"],
        b_enc=parts["b_enc"],
        W_dec=atoms[:, start:].flatten(1),
        b_dec=bias,
        state={"threshold": parts["threshold"]},
        transcodes=True,
        W_skip=skip,
        file_format="Gemma Scope 2 " + ("crosscoder" if crosscodes else "cross-layer transcoder"),
        site=points[i] if crosscodes else points[i].replace("mlp_out", "mlp_in"),
        widths=dict.fromkeys(points[start:], width),
        **CONVENTIONS,
    )
