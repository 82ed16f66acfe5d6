"""OpenMOSS: Llama Scope (LX and R1), and llamascopium, which was lm-saes.

    Llama Scope LX   `hyperparams.json`, `checkpoints/final.safetensors`: a linear layer each way
                     and one threshold, in units of the activations as the network holds them
    Llama Scope R1   `config.json`, `sae_weights.safetensors` with `log_jumprelu_threshold`
    llamascopium     `config.json` with `sae_type`, `W_E`, `b_E`, `W_D`, `b_D`

What would otherwise be read wrongly without a word:

    norm_activation    dataset-wise: rows were trained at a mean length of sqrt(d_model), and the
                       file has the mean lengths of the network; they go into the weights, so
                       that codes stay in the units of training and reconstructions do not
    sparsity_include_decoder_norm    thresholds and ranks are of codes times the atom's length

Source: https://github.com/OpenMOSS/Language-Model-SAEs, llamascopium 2.0.0b34; SAELens 6.54.12
for Llama Scope.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from mechatlas.base import WeightsError
from mechatlas.dictionaries.activation_rules import WeightedTopK
from mechatlas.dictionaries.foreign.weights import Found, fit, oriented
from mechatlas.dictionaries.pretrained import Pretrained, root_length
from mechatlas.dictionaries.sparsity import ReLU, Rule, Threshold, TopK
from mechatlas.files import Fields

LINEAR = {
    "encoder.weight": "latent d_in",
    "encoder.bias": "latent",
    "decoder.weight": "d_out latent",
    "decoder.bias": "d_out",
}
WEIGHTS = {"W_E": "d_in latent", "b_E": "latent", "W_D": "latent d_out", "b_D": "d_out"}
LOGARITHMS = ("log_jumprelu_threshold", "activation_function.log_jumprelu_threshold")
LENGTHS = "dataset_average_activation_norm."
ACTIVATIONS = ("relu", "jumprelu", "topk", "batchtopk")


def read(found: Found) -> Pretrained:
    """Read a dictionary of one site, of Llama Scope or of llamascopium.

    Raises:
        WeightsError: It is damaged, not as the format says, or of a kind that is not read.
    """
    config = found.config("hyperparams.json", "config.json")
    shapes = dict(LINEAR if "encoder.weight" in found.shapes else WEIGHTS)
    names = tuple(shapes)
    _refuse(config, found)
    lengths = {name: "" for name in found.shapes if name.startswith(LENGTHS)}
    thresholds = dict.fromkeys(LOGARITHMS, "latent")
    parts = fit(
        found.file,
        found.tensors,
        {**shapes, **lengths, **thresholds},
        optional=(*lengths, *LOGARITHMS, *(() if _has_bias(config) else names[3:])),
        sizes=_sizes(config),
    )
    weights = oriented(parts, shapes, names)
    scale_in, scale_out = _scales(found, config, parts)
    rule, state = _rule(found, config, parts, weights["W_dec"], scale_in)
    if scale_in != 1:
        weights["W_enc"] = weights["W_enc"] * scale_in
    if scale_out != 1:
        weights["W_dec"] = weights["W_dec"] / scale_out
        weights["b_dec"] = weights["b_dec"] / scale_out
    site = config.text("hook_point_in", "")
    transcodes = config.text("hook_point_out", site) != site
    subtracts = config.flag("apply_decoder_bias_to_pre_encoder", default=False)
    if subtracts and transcodes:
        raise config.wrong("apply_decoder_bias_to_pre_encoder", "false for a transcoder")
    by_row = config.text("norm_activation", "dataset-wise") == "token-wise"
    if by_row and transcodes:
        raise config.wrong("norm_activation", "dataset-wise for a transcoder")
    return Pretrained(
        **weights,
        sparsity=rule,
        state=state,
        subtracts_b_dec=subtracts,
        norm=root_length if by_row else None,
        transcodes=transcodes,
        file_format="OpenMOSS " + config.text("act_fn", "jumprelu"),
        site=site or None,
        metadata={"hook_name_out": config.text("hook_point_out")} if transcodes else {},
    )


def _refuse(config: Fields, found: Found) -> None:
    """Refuse kinds and conventions that are not read.

    Raises:
        WeightsError: The settings name one.
    """
    config.one_of("sae_type", ("sae",), "sae")
    config.one_of("norm_activation", ("token-wise", "dataset-wise", "inference"), "dataset-wise")
    if config.flag("use_glu_encoder", default=False) or "W_E_glu" in found.shapes:
        raise config.wrong("use_glu_encoder", "false: encoders with a second gate are not read")


def _has_bias(config: Fields) -> bool:
    return config.flag("use_decoder_bias", default=True)


def _sizes(config: Fields) -> dict[str, int]:
    """Lengths of axes that the settings state."""
    sizes: dict[str, int] = {}
    if config.has("d_model"):
        sizes["d_in"] = sizes["d_out"] = config.integer("d_model")
        factor = config.values.get("expansion_factor")
        if isinstance(factor, int | float) and not isinstance(factor, bool):
            sizes["latent"] = int(sizes["d_in"] * factor)
    if config.has("d_sae"):
        sizes["latent"] = config.integer("d_sae")
    return sizes


def _scales(found: Found, config: Fields, parts: dict[str, Tensor]) -> tuple[float, float]:
    """Factors that bring rows to the units of training; 1 where there are none.

    Raises:
        WeightsError: A mean length is missing or not above zero.
    """
    if config.text("norm_activation", "dataset-wise") != "dataset-wise":
        return 1.0, 1.0
    ends = (("in", "hook_point_in"), ("out", "hook_point_out"))
    written = config.part("dataset_average_activation_norm").values
    scales = []
    for end, key in ends:
        point = config.text(key, "")
        length: Any = parts.get(LENGTHS + point, written.get(end, written.get(point)))
        if length is None:
            warnings.warn(
                f"{found.file}: {key} has no mean length of activations, which it was trained "
                "with. Bring activations to a mean length of sqrt(d_in) first.",
                stacklevel=4,
            )
            return 1.0, 1.0
        if isinstance(length, Tensor):
            length = float(length)
        if not isinstance(length, int | float) or not 0 < length < math.inf:
            raise WeightsError(
                f"{found.file}: the mean length of activations at {point or end} is {length!r:.40}"
                ", expected a number above 0."
            )
        scales.append(math.sqrt(config.integer("d_model")) / length)
    return scales[0], scales[1]


def _rule(
    found: Found, config: Fields, parts: dict[str, Tensor], atoms: Tensor, scale: float
) -> tuple[Rule, dict[str, Tensor]]:
    """Sparsity rule and its own tensors.

    Raises:
        WeightsError: The settings name none that is read, or miss what it needs.
    """
    kind = config.one_of("act_fn", ACTIVATIONS, "jumprelu")
    weighs = config.flag("sparsity_include_decoder_norm", default=True)
    length = torch.linalg.vector_norm(atoms.float(), dim=1) if weighs else torch.ones(len(atoms))
    logarithm = next((parts[key] for key in LOGARITHMS if key in parts), None)
    if kind == "relu":
        return ReLU(), {}
    if kind == "topk":
        k = min(found.k(config, "top_k"), len(atoms))
        return (WeightedTopK(k=k), {"length": length}) if weighs else (TopK(k=k), {})
    if kind == "batchtopk":
        threshold = found.setting("threshold")
        if not isinstance(threshold, int | float):
            raise WeightsError(
                f"{found.file}: the codes of a row depend on the rows beside it (batchtopk), and "
                "the file has no threshold: give one, as in load(path, threshold=0.5)."
            )
        threshold = torch.full((len(atoms),), float(threshold))
    elif logarithm is not None:
        threshold = logarithm.exp()
    else:
        written = config.values.get("jump_relu_threshold")
        if not isinstance(written, int | float) or isinstance(written, bool):
            raise config.wrong("jump_relu_threshold", "a number, or a threshold among the tensors")
        threshold = torch.full((len(atoms),), written * scale)
    return Threshold(), {"threshold": threshold / length.clamp_min(1e-30)}
