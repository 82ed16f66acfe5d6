"""saprmarks' dictionary_learning: `ae.pt` and `config.json`.

The class named in the configuration says what the tensors mean:

    AutoEncoder             relu; `bias` is taken from the input and added to the output
    AutoEncoderNew          relu; nothing is taken from the input
    GatedAutoEncoder        a gate and a magnitude
    JumpReluAutoEncoder     a threshold a latent; nothing is taken from the input
    AutoEncoderTopK         the k largest; the threshold that is also there is not used
    BatchTopKSAE            one threshold for all latents, learned from batches
    MatryoshkaBatchTopKSAE  the same, weights the other way round

Its fork crosscoder_learning has crosscoders, `(site, d_in, latent)` each way round, and publishes
`model.safetensors` with a `config.json` that says only the sizes:

    CrossCoder              relu of the sum over sites
    BatchTopKCrossCoder     one threshold, for codes times the sum of an atom's lengths

`norm_factor` in the configuration is already in the biases. The library's own
`AutoEncoder.from_pretrained` gives atoms length 1 and scales codes with them; here both are as
in the file.

Source: https://github.com/saprmarks/dictionary_learning, version 0.1.0, and
https://github.com/science-of-finetuning/crosscoder_learning.
"""

import io
import reprlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechatlas.base import WeightsError
from mechatlas.dictionaries.foreign.weights import (
    Found,
    as_pretrained,
    fit,
    oriented,
    take_integer,
)
from mechatlas.dictionaries.pretrained import Pretrained
from mechatlas.dictionaries.sparsity import Gated, ReLU, Rule, Threshold, TopK
from mechatlas.files import Fields, write, write_json

LINEAR = {
    "encoder.weight": "latent d_in",
    "encoder.bias": "latent",
    "decoder.weight": "d_in latent",
}
PLAIN = {"W_enc": "d_in latent", "b_enc": "latent", "W_dec": "latent d_in", "b_dec": "d_in"}
SHAPES = {
    "AutoEncoder": {**LINEAR, "bias": "d_in"},
    "AutoEncoderNew": {**LINEAR, "decoder.bias": "d_in"},
    "GatedAutoEncoder": {
        "encoder.weight": "latent d_in",
        "decoder.weight": "d_in latent",
        "decoder_bias": "d_in",
        "r_mag": "latent",
        "gate_bias": "latent",
        "mag_bias": "latent",
    },
    "JumpReluAutoEncoder": {**PLAIN, "threshold": "latent"},
    "AutoEncoderTopK": {**LINEAR, "b_dec": "d_in", "threshold": ""},
    "BatchTopKSAE": {**LINEAR, "b_dec": "d_in", "threshold": ""},
    "MatryoshkaBatchTopKSAE": {**PLAIN, "threshold": ""},
}
WITH_K = ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")


NORMALIZATIONS = ("CROSSCODER", "SAE", "MIXED", "NONE", "DECOUPLED")
"""Ways in which crosscoder_learning weighs codes, in the order of their numbers from 1."""


def read(found: Found) -> Pretrained:
    """Read `ae.pt` and the `config.json` beside it (or above the folder `checkpoints`).

    Raises:
        WeightsError: One is damaged, or not as the format says.
    """
    file, whole = found.file, found.config("config.json")
    config = whole.part("trainer")
    # What crosscoder_learning publishes on the hub names no class: it has only one with k.
    published = not whole.has("trainer") and "threshold" in found.shapes
    kind = config.one_of("dict_class", tuple(SHAPES), "BatchTopKSAE" if published else None)
    tensors = dict(found.tensors)
    k = _read_k(file, tensors, whole if published else config) if kind in WITH_K else None
    shapes = dict(SHAPES[kind])
    if kind == "MatryoshkaBatchTopKSAE" and not _take_groups(file, tensors):
        shapes["group_sizes"] = "group"
    sizes = {
        axis: place.integer(key)
        for axis, key in (("d_in", "activation_dim"), ("latent", "dict_size"))
        for place in (config, whole)
        if place.has(key)
    }
    # The threshold of TopK was added later than TopK, and is not used.
    optional = ("threshold",) if kind == "AutoEncoderTopK" else ()
    parts = fit(file, tensors, shapes, sizes=sizes, optional=optional)
    rule, state = _rule(file, kind, parts, k)
    dictionary = Pretrained(
        **_weights(parts),
        sparsity=rule,
        state=state,
        subtracts_b_dec=kind not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
        file_format=f"dictionary_learning {kind}",
        site=config.text("submodule_name", "") or None,
        metadata={"model_name": config.values["lm_name"]} if config.has("lm_name") else None,
    )
    if k is not None and k > dictionary.n_latents:
        raise WeightsError(
            f"{file}: k is {k}, expected at most the number of latents, {dictionary.n_latents}."
        )
    return dictionary


def read_crosscoder(found: Found) -> Pretrained:
    """Read a crosscoder of crosscoder_learning, whose sites stand side by side in a row.

    Raises:
        WeightsError: It is damaged, or weighs codes site by site.
    """
    file, tensors = found.file, dict(found.tensors)
    shapes = {
        "encoder.weight": "site d_in latent",
        "encoder.bias": "latent",
        "decoder.weight": "site latent d_in",
        "decoder.bias": "site d_in",
        "threshold": "",
    }
    k = take_integer(file, tensors, "k")
    number = take_integer(file, tensors, "code_normalization_id") or 1
    config = found.config("config.json")
    default = NORMALIZATIONS[number - 1] if 0 < number <= len(NORMALIZATIONS) else str(number)
    weighing = config.text("code_normalization", default).upper()
    optional = () if k is not None else ("threshold",)
    parts = fit(file, tensors, shapes, optional=optional)
    atoms = parts["decoder.weight"]
    lengths = {
        "CROSSCODER": atoms.norm(dim=2).sum(dim=0),
        "SAE": atoms.norm(dim=(0, 2)),
        "NONE": atoms.new_ones(atoms.shape[1]),
    }
    if weighing not in lengths:
        raise WeightsError(
            f"{file}: code_normalization is {weighing}, expected one of {', '.join(lengths)}."
        )
    sites, width = len(atoms), atoms.shape[2]
    state = {"threshold": parts["threshold"] / lengths[weighing]} if "threshold" in parts else {}
    return Pretrained(
        W_enc=parts["encoder.weight"].flatten(0, 1),
        b_enc=parts["encoder.bias"],
        W_dec=atoms.transpose(0, 1).flatten(1),
        b_dec=parts["decoder.bias"].flatten(),
        sparsity=Threshold() if state else ReLU(),
        state=state,
        subtracts_b_dec=False,
        file_format="crosscoder_learning " + ("BatchTopKCrossCoder" if state else "CrossCoder"),
        widths={f"site {i}": width for i in range(sites)},
    )


def _weights(parts: dict[str, Tensor]) -> dict[str, Any]:
    """The four tensors, under whichever names they have."""
    if "W_enc" in parts:
        return {key: parts[key] for key in PLAIN}
    bias = next(key for key in ("bias", "decoder.bias", "decoder_bias", "b_dec") if key in parts)
    gate = "gate_bias" if "gate_bias" in parts else "encoder.bias"
    return oriented(parts, LINEAR, ("encoder.weight", gate, "decoder.weight", bias))


def _rule(
    file: Path, kind: str, parts: dict[str, Tensor], k: int | None
) -> tuple[Rule, dict[str, Tensor]]:
    """Sparsity rule and its own tensors."""
    if kind in ("AutoEncoder", "AutoEncoderNew"):
        return ReLU(), {}
    if kind == "GatedAutoEncoder":
        b_mag = parts["mag_bias"] - parts["r_mag"].exp() * parts["gate_bias"]
        return Gated(), {"r_mag": parts["r_mag"], "b_mag": b_mag}
    if kind == "JumpReluAutoEncoder":
        return Threshold(), {"threshold": parts["threshold"]}
    if kind == "AutoEncoderTopK":
        assert k is not None
        return TopK(k=k), {}
    if parts["threshold"] < 0:
        warnings.warn(
            f"{file}: threshold is {float(parts['threshold']):g}: training ended before it was "
            "learned, so that every positive latent is kept.",
            stacklevel=2,
        )
    bias = parts["b_enc"] if "b_enc" in parts else parts["encoder.bias"]
    return Threshold(), {"threshold": parts["threshold"].expand(len(bias)).clone()}


def _read_k(file: Path, tensors: dict[str, Tensor], config: Fields) -> int:
    """Latents a sample, from the tensors and the configuration, which have to agree."""
    k = take_integer(file, tensors, "k")
    k_written = config.integer("k", k)
    if k is not None and k_written != k:
        raise config.wrong("k", f"{k}, as in {file.name}")
    return k_written


def _take_groups(file: Path, tensors: dict[str, Tensor]) -> bool:
    """Take the sizes of the nested dictionaries out, if they are there; all latents are used."""
    if "group_sizes" not in tensors:
        return False
    sizes = tensors.pop("group_sizes")
    whole = sizes.ndim == 1 and not sizes.is_floating_point() and not sizes.is_complex()
    n_latents = tensors["b_enc"].numel() if "b_enc" in tensors else None
    if not whole or n_latents not in (None, int(sizes.sum())):
        raise WeightsError(
            f"{file}: group_sizes is {reprlib.repr(sizes.tolist())}, expected whole numbers "
            f"whose sum is the number of latents, {n_latents}."
        )
    return True


def save(dictionary: Any, folder: Path, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a folder that dictionary_learning loads, and return the file of weights.

    Args:
        dictionary: Dictionary of one site.
        folder: Folder to write.
        metadata: Further entries of `trainer`, such as `lm_name`, `layer` and `submodule_name`.

    Raises:
        DiskError: The folder is not writable or the disk is full.
        WeightsError: dictionary_learning has no such dictionary.
    """
    whole = as_pretrained(dictionary, "dictionary_learning")
    kind, tensors = _describe(whole)
    plain = {
        key: t.detach().to("cpu", torch.float32 if t.is_floating_point() else None).contiguous()
        for key, t in tensors.items()
    }
    trainer = {
        **(metadata or {}),
        "dict_class": kind,
        "activation_dim": whole.d_in,
        "dict_size": whole.n_latents,
    }
    if "k" in plain:
        trainer["k"] = int(plain["k"])
    if whole.site and "submodule_name" not in trainer:
        trainer["submodule_name"] = whole.site
    data = io.BytesIO()
    torch.save(plain, data)
    write(folder / "ae.pt", data.getvalue())
    write_json(folder / "config.json", {"trainer": trainer})
    return folder / "ae.pt"


def _describe(whole: Pretrained) -> tuple[str, dict[str, Tensor]]:
    """The library's class for a dictionary, and the tensors of its state."""
    rule, state, subtracts = whole.sparsity, whole.state, whole.subtracts_b_dec
    if whole.norm is not None or whole.transcodes or whole.spans:
        raise WeightsError(
            "dictionary_learning has dictionaries of one site alone, which do not scale their rows."
        )
    linear = {"encoder.weight": whole.W_enc.T, "encoder.bias": whole.b_enc}
    linear["decoder.weight"] = whole.W_dec.T
    if isinstance(rule, ReLU):
        bias = "bias" if subtracts else "decoder.bias"
        return ("AutoEncoder" if subtracts else "AutoEncoderNew"), {**linear, bias: whole.b_dec}
    if isinstance(rule, TopK) and subtracts:
        more = {"k": torch.tensor(rule.k), "threshold": torch.tensor(-1.0)}
        return "AutoEncoderTopK", {**linear, "b_dec": whole.b_dec, **more}
    if isinstance(rule, Threshold) and not subtracts:
        plain = {key: getattr(whole, key) for key in PLAIN}
        return "JumpReluAutoEncoder", {**plain, "threshold": state["threshold"]}
    if isinstance(rule, Threshold):  # the class that subtracts b_dec has one threshold for all
        threshold = state["threshold"]
        if bool((threshold == threshold[0]).all()):
            more = {"k": torch.tensor(1), "threshold": threshold[0].clone()}
            return "BatchTopKSAE", {**linear, "b_dec": whole.b_dec, **more}
        plain = {key: getattr(whole, key) for key in PLAIN}
        plain["b_enc"] = whole.b_enc - whole.b_dec @ whole.W_enc
        return "JumpReluAutoEncoder", {**plain, "threshold": threshold}
    if isinstance(rule, Gated) and subtracts:
        linear["gate_bias"] = linear.pop("encoder.bias")
        magnitude = state["b_mag"] + state["r_mag"].exp() * whole.b_enc
        more = {"r_mag": state["r_mag"], "mag_bias": magnitude, "decoder_bias": whole.b_dec}
        return "GatedAutoEncoder", {**linear, **more}
    raise WeightsError(
        f"dictionary_learning has no dictionary with the sparsity rule {rule!r} that "
        f"{'takes' if subtracts else 'does not take'} b_dec from its input."
    )
