"""OpenMOSS: Llama Scope (LX and R1), and llamascopium, which was lm-saes.

    Llama Scope LX   `hyperparams.json`, `checkpoints/final.safetensors`: a linear layer each way
                     and one threshold, in units of the activations as the network holds them
    Llama Scope R1   `config.json`, `sae_weights.safetensors` with `log_jumprelu_threshold`
    llamascopium     `config.json` with `sae_type`, `W_E`, `b_E`, `W_D`, `b_D`; of crosscoders with
                     an axis of sites before the others; of cross-layer transcoders `W_D.i (i + 1,
                     latent, d)`, all that is written to site i

What would otherwise be read wrongly without a word:

    norm_activation    dataset-wise: rows were trained at a mean length of sqrt(d_model), and the
                       file has the mean lengths of the network; they go into the weights, so
                       that codes stay in the units of training and reconstructions do not
    sparsity_include_decoder_norm    thresholds and ranks are of codes times the atom's length; of
                                     crosscoders the length at each site, which opens and closes a
                                     latent site by site

Source: https://github.com/OpenMOSS/Language-Model-SAEs, llamascopium 2.0.0b34; SAELens 6.54.12
for Llama Scope.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from mechatlas.base import WeightsError
from mechatlas.dictionaries.activation_rules import BySite, WeightedTopK
from mechatlas.dictionaries.foreign.weights import Found, fit, oriented
from mechatlas.dictionaries.pretrained import CrossLayerDictionary, Pretrained, root_length
from mechatlas.dictionaries.sparsity import ReLU, Rule, Threshold, TopK
from mechatlas.files import Fields

LINEAR = {
    "encoder.weight": "latent d_in",
    "encoder.bias": "latent",
    "decoder.weight": "d_out latent",
    "decoder.bias": "d_out",
}
WEIGHTS = {"W_E": "d_in latent", "b_E": "latent", "W_D": "latent d_out", "b_D": "d_out"}
CROSSCODER = {
    "W_E": "site d_in latent",
    "b_E": "site latent",
    "W_D": "site latent d_in",
    "b_D": "site d_in",
}
LOGARITHMS = ("log_jumprelu_threshold", "activation_function.log_jumprelu_threshold")
LENGTHS = "dataset_average_activation_norm."
ACTIVATIONS = ("relu", "jumprelu", "topk", "batchtopk", "batchlayertopk")
KINDS = {
    "sae": ("token-wise", "dataset-wise", "inference"),
    "crosscoder": ("dataset-wise", "inference"),
    "clt": ("dataset-wise", "inference"),
}
"""Kinds of dictionaries, and how each may have normalized its rows."""


def read(found: Found) -> Pretrained | CrossLayerDictionary:
    """Read a dictionary of Llama Scope or of llamascopium.

    Raises:
        WeightsError: It is damaged, not as the format says, or of a kind that is not read.
    """
    config = found.config("hyperparams.json", "config.json")
    kind = config.one_of("sae_type", tuple(KINDS), "sae")
    if config.flag("use_glu_encoder", default=False) or "W_E_glu" in found.shapes:
        raise config.wrong("use_glu_encoder", "false: encoders with a second gate are not read")
    config.one_of("norm_activation", KINDS[kind], "dataset-wise")
    return {"sae": _one_site, "crosscoder": _crosscoder, "clt": _cross_layer}[kind](found, config)


def _one_site(found: Found, config: Fields) -> Pretrained:
    """Read an autoencoder, or a transcoder from one site to another."""
    shapes = dict(LINEAR if "encoder.weight" in found.shapes else WEIGHTS)
    names = tuple(shapes)
    bias = () if config.flag("use_decoder_bias", default=True) else names[3:]
    parts = _fit(found, config, shapes, optional=bias)
    weights = oriented(parts, shapes, names)
    site = config.text("hook_point_in", "")
    scale_in, scale_out = (
        _scale(found, config, parts, config.text(f"hook_point_{end}", ""), end)
        for end in ("in", "out")
    )
    if scale_in is None or scale_out is None:
        scale_in = scale_out = 1.0
    length = torch.linalg.vector_norm(weights["W_dec"].float(), dim=1)
    rule, state = _rule(found, config, length, parts.get("threshold"), scale_in)
    if scale_in != 1:
        weights["W_enc"] = weights["W_enc"] * scale_in
    if scale_out != 1:
        weights["W_dec"] = weights["W_dec"] / scale_out
        weights["b_dec"] = weights["b_dec"] / scale_out
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


def _crosscoder(found: Found, config: Fields) -> Pretrained:
    """Read a crosscoder, whose sites stand side by side in a row."""
    points = _texts(config, "hook_points")
    parts = _fit(found, config, CROSSCODER, sizes={"site": len(points)})
    atoms, width = parts["W_D"], parts["W_D"].shape[2]
    scales = [_scale(found, config, parts, point) or 1.0 for point in points]
    scale = atoms.new_tensor(scales)[:, None, None]
    length = torch.linalg.vector_norm(atoms.float(), dim=2)
    rule, state = _rule(found, config, length, parts.get("threshold"), 1.0)
    if not isinstance(rule, ReLU):
        k = rule.k if isinstance(rule, TopK | WeightedTopK) else 0
        state = {f"site_{name}": tensor for name, tensor in state.items()}
        rule = BySite(k=k)
        state = state or {"site_length": torch.ones_like(length)}
    return Pretrained(
        W_enc=(parts["W_E"] * scale).flatten(0, 1),
        b_enc=parts["b_E"].sum(dim=0),
        W_dec=(atoms / scale).transpose(0, 1).flatten(1),
        b_dec=(parts["b_D"] / scale[:, 0]).flatten(),
        sparsity=rule,
        state=state,
        subtracts_b_dec=False,
        file_format="OpenMOSS crosscoder " + config.text("act_fn", "relu"),
        widths=dict.fromkeys(points, width),
    )


def _cross_layer(found: Found, config: Fields) -> CrossLayerDictionary | Pretrained:
    """Read a cross-layer transcoder, or one of its layers: `load(path, layer=3)`."""
    reads, writes = _texts(config, "hook_points_in"), _texts(config, "hook_points_out")
    n, wanted = len(reads), found.setting("layer")
    if len(writes) != n:
        raise config.wrong("hook_points_out", f"as many as the {n} hook_points_in")
    if wanted is not None and wanted not in range(n):
        raise WeightsError(f"{found.file} has no layer {wanted}; it has 0 to {n - 1}.")
    shapes = {"W_E": "layer d_in latent", "b_E": "layer latent"}
    shapes |= {f"W_D.{j}": f"first_{j + 1} latent d_out" for j in range(n)}
    shapes |= {f"b_D.{j}": "d_out" for j in range(n)}
    sizes = {"layer": n, **{f"first_{j + 1}": j + 1 for j in range(n)}}
    parts = _fit(found, config, shapes, threshold="layer latent", sizes=sizes)
    scales_in, scales_out = (
        [_scale(found, config, parts, point) or 1.0 for point in points]
        for points in (reads, writes)
    )
    layers = []
    for i in range(n) if wanted is None else [wanted]:
        atoms = torch.stack([parts[f"W_D.{j}"][i] for j in range(i, n)], dim=1)
        length = torch.linalg.vector_norm(atoms.flatten(1).float(), dim=1)
        threshold = parts["threshold"][i] if "threshold" in parts else None
        rule, state = _rule(found, config, length, threshold, 1.0)
        scale = atoms.new_tensor(scales_out[i:])[:, None]
        bias = atoms.new_zeros(n - i, atoms.shape[2])
        bias[0] = parts[f"b_D.{i}"] / scales_out[i]
        layer = Pretrained(
            W_enc=parts["W_E"][i] * scales_in[i],
            b_enc=parts["b_E"][i],
            W_dec=(atoms / scale).flatten(1),
            b_dec=bias.flatten(),
            sparsity=rule,
            state=state,
            subtracts_b_dec=False,
            transcodes=True,
            file_format="OpenMOSS cross-layer transcoder " + config.text("act_fn", "relu"),
            site=reads[i],
            widths=dict.fromkeys(writes[i:], atoms.shape[2]),
        )
        layers.append(layer)
    return layers[0] if wanted is not None else CrossLayerDictionary(layers, reads)


def _texts(config: Fields, key: str) -> list[str]:
    """Names of some sites."""
    values = config.values.get(key)
    if not isinstance(values, list) or not values or not all(isinstance(v, str) for v in values):
        raise config.wrong(key, "a list of sites")
    if len(set(values)) < len(values):
        raise config.wrong(key, "a list of sites, each once")
    return values


def _fit(
    found: Found,
    config: Fields,
    shapes: dict[str, str],
    *,
    threshold: str = "latent",
    optional: tuple[str, ...] = (),
    sizes: dict[str, int] | None = None,
) -> dict[str, Tensor]:
    """Check the tensors; that of thresholds, under whichever name, is `threshold`, no logarithm.

    Args:
        found: Where they are from.
        config: Settings, which state some lengths of axes.
        shapes: Axes of each weight.
        threshold: Axes of the thresholds.
        optional: Weights that may be missing.
        sizes: Further lengths of axes.
    """
    lengths = {name: "" for name in found.shapes if name.startswith(LENGTHS)}
    tensors = dict(found.tensors)
    if config.text("norm_activation", "dataset-wise") != "dataset-wise":
        for name in lengths:  # numbers that were never set
            del tensors[name]
    known = {**shapes, **lengths, **dict.fromkeys(LOGARITHMS, threshold)}
    parts = fit(
        found.file,
        tensors,
        known,
        optional=(*lengths, *LOGARITHMS, *optional),
        sizes={**_sizes(config), **(sizes or {})},
    )
    logarithm = next((parts[key] for key in LOGARITHMS if key in parts), None)
    return parts if logarithm is None else {**parts, "threshold": logarithm.exp()}


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


def _scale(
    found: Found, config: Fields, parts: dict[str, Tensor], point: str, end: str = ""
) -> float | None:
    """Factor that brings rows of a site to the units of training; none if the files lack it.

    Args:
        found: Where the settings are from.
        config: Settings.
        parts: Tensors, which may hold the mean length of rows in training.
        point: Site.
        end: Another name of the site among the settings.
    """
    if config.text("norm_activation", "dataset-wise") != "dataset-wise":
        return 1.0
    written = config.part("dataset_average_activation_norm").values
    length: Any = parts.get(LENGTHS + point, written.get(end, written.get(point)))
    if length is None:
        warnings.warn(
            f"{found.file}: {f'hook_point_{end}' if end else point} has no mean length of "
            "activations, which it was trained with. Bring activations to a mean length of "
            "sqrt(d_in) first.",
            stacklevel=5,
        )
        return None
    if isinstance(length, Tensor):
        length = float(length)
    if not isinstance(length, int | float) or not 0 < length < math.inf:
        raise WeightsError(
            f"{found.file}: the mean length of activations at {point or end} is {length!r:.40}"
            ", expected a number above 0."
        )
    return math.sqrt(config.integer("d_model")) / length


def _rule(
    found: Found, config: Fields, length: Tensor, threshold: Tensor | None, scale: float
) -> tuple[Rule, dict[str, Tensor]]:
    """Sparsity rule and its own tensors.

    Args:
        found: Where the settings are from, and what the caller adds.
        config: Settings.
        length: Length of each atom in training.
        threshold: Thresholds among the tensors.
        scale: Factor to the units of training, of a threshold in the settings.
    """
    kind = config.one_of("act_fn", ACTIVATIONS, "jumprelu")
    weighs = config.flag("sparsity_include_decoder_norm", default=True)
    n_latents = length.shape[-1]
    if kind == "relu":
        return ReLU(), {}
    if kind == "topk":
        k = min(found.k(config, "top_k"), n_latents)
        return (WeightedTopK(k=k), {"length": length}) if weighs else (TopK(k=k), {})
    if kind in ("batchtopk", "batchlayertopk"):
        given = found.setting("threshold")
        if not isinstance(given, int | float):
            raise WeightsError(
                f"{found.file}: the codes of a row depend on the rows beside it ({kind}), and "
                "the file has no threshold: give one, as in load(path, threshold=0.5)."
            )
        threshold = torch.full((n_latents,), float(given))
    elif threshold is None:
        written = config.values.get("jump_relu_threshold")
        if not isinstance(written, int | float) or isinstance(written, bool):
            raise config.wrong("jump_relu_threshold", "a number, or a threshold among the tensors")
        threshold = torch.full((n_latents,), written * scale)
    return Threshold(), {"threshold": threshold / (length.clamp_min(1e-30) if weighs else 1.0)}
