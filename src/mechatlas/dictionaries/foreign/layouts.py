"""Layouts of dictionaries of other libraries, and how each is recognized.

    LAYOUTS     one row a layout: tensors, settings beside them, reader
    find        a folder or file -> what lies there
    recognize   what lies there -> the row that fits it best

A layout is recognized by the names of its tensors (`#` stands for a number), by a file of settings
beside them, and where both leave a choice by shapes. A row whose settings fit is read even if a
tensor is missing, so that its reader can name the tensor.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mechatlas.base import WeightsError
from mechatlas.dictionaries.foreign import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    openmoss,
    overcomplete,
    published,
    saelens,
    sparsify,
    temporal,
)
from mechatlas.dictionaries.foreign.weights import INDEX, Found, find_tensors
from mechatlas.tensorfiles import TORCH

FILES = (
    saelens.WEIGHTS, "sae.safetensors", "ae.pt", "params.npz", "params.safetensors",
    "model.safetensors", "latest_ckpt.safetensors", "sae_weights.pt", "weights.pt",
    "checkpoints/pruned.safetensors", "checkpoints/final.safetensors",
)  # fmt: skip
"""Files of weights that libraries write into a folder of a dictionary."""
USUAL = ("W_enc", "b_enc", "W_dec", "b_dec")
LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
ENOUGH = 0.5
"""Share of a layout's tensors from which a file without them all is still taken for it."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Row of the table: how a layout is recognized, and what reads it."""

    name: str
    """Library, as in messages and in `load(path, format=)`."""
    read: Callable[[Found], nn.Module]
    tensors: tuple[str, ...] = ()
    """Names that it must have, with `#` for a number; empty if its settings say enough."""
    settings: tuple[str, ...] = ()
    """Files of which one must lie beside the weights; `*` stands for their name."""
    needs: Callable[[Found], str] = lambda found: ""
    """Further requirement: the reason why a place does not meet it, empty if it does."""


def _says(*keys: str) -> Callable[[Found], str]:
    """Requirement that the settings have one of some keys."""

    def missing(found: Found) -> str:
        values = found.config("cfg.json", "config.json").values
        return "" if set(keys) & set(values) else f"its settings have no {' or '.join(keys)}"

    return missing


def _axes(tensor: str, dimensions: int) -> Callable[[Found], str]:
    """Requirement that a tensor has a number of axes."""

    def missing(found: Found) -> str:
        shape = next((s for name, s in found.shapes.items() if name.endswith(tensor)), ())
        return "" if len(shape) == dimensions else f"{tensor} has {len(shape)} axes"

    return missing


def _sides(encoder: int, decoder: int) -> Callable[[Found], str]:
    """Requirement that latents are on these axes of the encoder and decoder."""

    def missing(found: Found) -> str:
        shapes = [found.shapes.get(name, ()) for name in ("W_enc", "W_dec")]
        latents = found.shapes.get("b_enc", (0,))
        if len(latents) != 1 or any(len(shape) != 2 for shape in shapes):
            return "W_enc or W_dec is no matrix"
        for name, shape, axis in zip(("W_enc", "W_dec"), shapes, (encoder, decoder), strict=True):
            if shape[axis] != latents[0]:
                return f"latents are not on axis {axis} of {name}"
        square = shapes[0][0] == shapes[0][1]
        return f"W_enc is square: name the {FORMAT}" if square and FORMAT not in found.given else ""

    return missing


FORMAT = "format"
"""Setting of the caller that names a library, where files leave a choice."""
LAYOUTS = (
    Layout("SAELens", saelens.read, (), ("cfg.json",), _says("d_sae")),
    Layout("sparsify", sparsify.read, (), ("cfg.json",), _says("d_in")),
    Layout("dictionary_learning", dictionary_learning.read, (), ("config.json",), _says("trainer")),
    Layout(
        "crosscoder_learning", dictionary_learning.read_crosscoder, LINEAR,
        needs=_axes("encoder.weight", 3),
    ),
    Layout(
        "crosscoder_learning", dictionary_learning.read,
        (*LINEAR[:3], "b_dec", "threshold"), ("config.json",), _says("activation_dim"),
    ),
    Layout("OpenMOSS", openmoss.read, LINEAR, ("hyperparams.json",)),
    Layout("OpenMOSS", openmoss.read, LINEAR, ("config.json",), _says("d_model")),
    Layout("OpenMOSS", openmoss.read, ("W_E", "b_E", "W_D"), ("config.json",), _says("d_model")),
    Layout("OpenMOSS", openmoss.read, ("W_E", "b_E", "W_D.#"), ("config.json",), _says("d_model")),
    Layout("Connor and Rob", published.read_heads, USUAL, ("*_cfg.json",)),
    Layout(
        "Prisma", published.read_prisma, ("W_enc", "W_dec", "b_dec"), ("config.json",),
        _says("hook_point", "hook_point_layer"),
    ),
    Layout(
        "saev", published.read_saev, USUAL,
        needs=lambda found: "" if {"cfg", "d_vit"} & set(found.values) else "no line of settings",
    ),
    Layout("circuit-tracer cross-layer", circuit_tracer.read_cross_layer, ("W_enc_#",)),
    Layout("circuit-tracer cross-layer", circuit_tracer.read_cross_layer, ("W_dec_#",)),
    Layout(
        "Gemma Scope 2 of several sites", gemma_scope.read_several,
        ("w_enc", "w_dec", "b_enc", "b_dec", "threshold"), needs=_axes("w_dec", 3),
    ),
    Layout("Gemma Scope 2", gemma_scope.read_second, ("w_enc", "w_dec", "threshold")),
    Layout(
        "Gemma Scope", gemma_scope.read_first, (*USUAL, "threshold"),
        needs=lambda found: "" if found.file.suffix == ".npz" else "it is no .npz file",
    ),
    Layout("circuit-tracer", circuit_tracer.read_one_layer, USUAL, needs=_sides(0, 0)),
    Layout("Qwen Scope", published.read_qwen, USUAL, needs=_sides(0, 1)),
    Layout("OpenAI", published.read_openai, ("pre_bias", "latent_bias", "encoder.weight")),
    Layout("Goodfire", published.read_linear, ("encoder_linear.weight", "decoder_linear.weight")),
    Layout("DeepSeek R1", published.read_linear, LINEAR, needs=_axes("encoder.weight", 2)),
    Layout(
        "temporal", temporal.read_published, ("D", "b", "attn_layers.#.k_ctx.weight"),
        ("conf.yaml",),
    ),
    Layout("Overcomplete", overcomplete.read, ("dictionary.multiplier",)),
)  # fmt: skip
"""Layouts, the more particular ones first: of rows that fit equally well the first is taken."""


def find(path: Path, given: Mapping[str, Any]) -> Found:
    """Look at a folder or file.

    Args:
        path: Folder or file.
        given: Settings that the caller adds.

    Raises:
        WeightsError: There is no dictionary, there are several, or a file is damaged.
    """
    if not path.is_dir():
        if not path.is_file():
            raise WeightsError(f"There is no dictionary at {path} (no such file or folder).")
        return find_tensors(path, given)
    layer = path / f"W_enc_{given.get('layer')}.safetensors"
    if layer.is_file():  # of a cross-layer transcoder, whose other layers may be elsewhere
        return find_tensors(layer, given)
    known = [path / name for name in FILES if (path / name).is_file()]
    indices = sorted(path.glob(f"*{INDEX}"))
    # A file of a known name is the dictionary, whatever else lies beside it.
    files = known[:1] if len(known) > 1 and known[0].parent != known[1].parent else known
    files = files or indices
    if not files:
        others = sorted(
            f
            for f in path.iterdir()
            if f.suffix in (*TORCH, ".safetensors", ".npz") and f.is_file()
        )
        if len(others) > 1 and all(_NUMBERED.fullmatch(f.name) for f in others):
            return find_tensors(path, given)
        files = [] if _hint(path) else others
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:6])
        raise WeightsError(f"{path} holds several dictionaries ({names}): give one file.")
    if not files:
        raise WeightsError(f"There is no dictionary at {path} (no file of weights).{_hint(path)}")
    return find_tensors(files[0], given)


_NUMBERED = re.compile(r"(W_enc|W_dec|params_layer|layer)_\d+\.safetensors")
"""Files of one dictionary that has one for each layer."""


def _hint(path: Path) -> str:
    """Say which folders within hold dictionaries."""
    within = sorted(str(f.relative_to(path)) for name in FILES for f in path.glob(f"*/{name}"))
    return f" There is {', '.join(within[:3])}: give one of these folders." if within else ""


def recognize(found: Found) -> Layout:
    """Find the layout of a place, by its tensors, settings and shapes.

    Raises:
        WeightsError: It is of no layout that is known.
    """
    names = {re.sub(r"\d+", "#", name.rpartition("/")[2]) for name in found.shapes}
    library = found.setting(FORMAT)
    best, near, others = (0.0, None), dict[str, str](), list[str]()
    for layout in LAYOUTS:
        if library not in (None, layout.name):
            continue
        missing = [name for name in layout.tensors if name not in names]
        share = 1 - len(missing) / max(len(layout.tensors), 1)
        reason = f"no {', '.join(missing)}"
        if layout.settings and found.beside(*layout.settings) is None:
            reason = f"no {' or '.join(layout.settings)} beside it"
        elif share >= ENOUGH:
            reason = layout.needs(found)
        if not reason and share > best[0]:
            best = (share, layout)
        if share > 0:
            near.setdefault(layout.name, reason or "other tensors")
        else:
            others.append(layout.name)
    if best[1] is not None:
        return best[1]
    raise WeightsError(_refusal(found, near, [name for name in others if name not in near]))


def _refusal(found: Found, near: Mapping[str, str], others: Sequence[str]) -> str:
    """Sentence about a place of no known layout: what it holds, and what each layout lacks."""
    held = [f"{name} {shape}" for name, shape in sorted(found.shapes.items())]
    held += sorted(found.values)
    more = f" and {len(held) - 8} more" if len(held) > 8 else ""
    tried = "; ".join(
        [f"{name} ({reason})" for name, reason in near.items()] + [*dict.fromkeys(others)]
    )
    if not tried:
        named = ", ".join(dict.fromkeys(layout.name for layout in LAYOUTS))
        tried = f"{found.given.get(FORMAT)!r} is none of {named}"
    return (
        f"{found.file} is not a dictionary of a known format; it holds "
        f"{', '.join(held[:8]) or 'no tensors'}{more}. Tried: {tried}."
    )
