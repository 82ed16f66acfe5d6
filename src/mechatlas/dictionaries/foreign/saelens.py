"""SAELens: `cfg.json` and `sae_weights.safetensors`, versions 2 to 6 read, 6 written.

What differs between files and would otherwise be read wrongly without a word:

    architecture            standard if absent; before 6 top-k if `activation_fn(_str)` says so
    apply_b_dec_to_input    true unless said otherwise, in every version
    normalize_activations   none; layer_norm and constant_norm_rescale scale each row by itself;
                            the two modes that need a number the file does not hold give a warning
    scaling_factor          one a latent, used before 6: goes into the atoms
    log_threshold           the logarithm of JumpReLU's threshold, in older training checkpoints
    rescale_acts_by_decoder_norm   codes are in units of atoms of length 1: goes into the weights
    batchtopk, matryoshka_batchtopk   a training checkpoint, read as what SAELens would export
    matching_pursuit        no encoder: atoms are chosen one by one; no bias unless it is taken from
                            the input

Source: https://github.com/decoderesearch/SAELens, version 6.54.12.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mechatlas.base import WeightsError
from mechatlas.dictionaries.activation_rules import AbsTopK, Pursuit
from mechatlas.dictionaries.foreign import temporal
from mechatlas.dictionaries.foreign.weights import Found, as_json, as_pretrained, fit
from mechatlas.dictionaries.pretrained import Pretrained, layer_norm, root_length
from mechatlas.dictionaries.sparsity import Gated, ReLU, Rule, Threshold, TopK
from mechatlas.dictionaries.temporal import TemporalDictionary
from mechatlas.files import Fields, write, write_json

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
UNIT = 1e-5
"""Largest difference from 1 of the length of an atom that counts as of length 1."""
SHAPES = {
    "standard": {"b_enc": "latent"},
    "topk": {"b_enc": "latent"},
    "abstopk": {"b_enc": "latent"},
    "jumprelu": {"b_enc": "latent", "threshold": "latent"},
    "gated": {"b_gate": "latent", "b_mag": "latent", "r_mag": "latent"},
    "batchtopk": {"b_enc": "latent", "topk_threshold": ""},
    "matryoshka_batchtopk": {"b_enc": "latent", "topk_threshold": ""},
    "transcoder": {"b_enc": "latent"},
    "skip_transcoder": {"b_enc": "latent", "W_skip": "d_out d_in"},
    "jumprelu_transcoder": {"b_enc": "latent", "threshold": "latent"},
    "jumprelu_skip_transcoder": {
        "b_enc": "latent",
        "threshold": "latent",
        "W_skip": "d_out d_in",
    },
    "matching_pursuit": {},
}
NORMS = {
    "none": None,
    "expected_average_only_in": None,
    "covariance_whitening": None,
    "layer_norm": layer_norm,
    "constant_norm_rescale": root_length,
}
SCALES = ("scaling_factor", "finetuning_scaling_factor")
METADATA = (
    "model_name", "hook_name_out", "hook_layer", "hook_head_index", "model_class_name",
    "model_from_pretrained_kwargs", "prepend_bos", "exclude_special_tokens", "neuronpedia_id",
    "context_size", "seqpos_slice", "dataset_path", "reshape_activations",
)  # fmt: skip
"""Entries of a configuration that SAELens and tools around it read."""


def read(found: Found) -> Pretrained | TemporalDictionary:
    """Read `sae_weights.safetensors` and the `cfg.json` beside it.

    Raises:
        WeightsError: One is damaged, not as the format says, or of an architecture that is not
            read.
    """
    config = found.config(CONFIG)
    if config.values.get("architecture") == "temporal":
        return temporal.read_saelens(found, config, _site(config), _metadata(config))
    architecture = _architecture(config)
    transcodes = "transcoder" in architecture
    d_in, n_latents = config.integer("d_in"), config.integer("d_sae")
    d_out = config.integer("d_out", d_in) if transcodes else d_in
    subtracts_b_dec = config.flag("apply_b_dec_to_input", default=not transcodes)
    if transcodes and subtracts_b_dec:
        raise config.wrong("apply_b_dec_to_input", "false: b_dec is as wide as the output")
    norm = _norm(config)
    parts = _fit(found, config, architecture, {"d_in": d_in, "latent": n_latents, "d_out": d_out})
    if architecture == "matching_pursuit":
        parts |= {"W_enc": parts["W_dec"].T, "b_enc": torch.zeros(n_latents)}
        if not subtracts_b_dec:
            parts["b_dec"] = torch.zeros(d_in)
    rule, state = _rule(config, architecture, parts, n_latents)
    skip = parts.get("W_skip")
    return Pretrained(
        W_enc=parts["W_enc"],
        b_enc=parts["b_gate"] if architecture == "gated" else parts["b_enc"],
        W_dec=parts["W_dec"],
        b_dec=parts["b_dec"],
        sparsity=rule,
        state=state,
        subtracts_b_dec=subtracts_b_dec,
        norm=norm,
        transcodes=transcodes,
        W_skip=None if skip is None else skip.T,
        file_format=f"SAELens {architecture}",
        site=_site(config),
        metadata=_metadata(config),
    )


def _metadata(config: Fields) -> dict[str, Any]:
    """Entries that other tools read, kept for when the dictionary is written again."""
    places = (config.values, config.part("metadata").values)
    kept = {key: place[key] for place in places for key in METADATA if place.get(key) is not None}
    return as_json(kept)


def _architecture(config: Fields) -> str:
    """The architecture, which older files spell in other ways."""
    architecture = config.one_of("architecture", tuple(SHAPES), "standard")
    if not _before_six(config):
        return architecture
    key = "activation_fn" if config.has("activation_fn") else "activation_fn_str"
    activation = config.text(key, "relu")
    if activation not in ("relu", "topk"):
        raise config.wrong(key, "relu or topk")
    if activation == "topk" and architecture == "standard":
        return "topk"
    return architecture


def _before_six(config: Fields) -> bool:
    """Whether it is from before version 6, which gave the activation function another place."""
    metadata = config.part("metadata")
    place = metadata if metadata.has("sae_lens_version") else config
    version = re.match(r"\d+", place.text("sae_lens_version", "0"))
    return version is None or int(version[0]) < 6


def _norm(config: Fields) -> Callable[[Tensor], Any] | None:
    """How each row is scaled."""
    key = "normalize_activations"
    written = config.values.get(key)
    if isinstance(written, bool):  # before there were several ways
        mode = "expected_average_only_in" if written else "none"
    else:
        mode = config.one_of(key, tuple(NORMS), "none")
    if mode in ("expected_average_only_in", "covariance_whitening"):
        warnings.warn(
            f"{config.file}: {key} is {mode!r}, but the file does not hold the numbers it was "
            "trained with. Activations are read as they are given, as SAELens does: bring them "
            "to the scale of training first (for expected_average_only_in, a mean length of "
            "sqrt(d_in)).",
            stacklevel=3,
        )
    return NORMS[mode]


def _fit(
    found: Found, config: Fields, architecture: str, sizes: dict[str, int]
) -> dict[str, Tensor]:
    """The checked tensors, with all that only rescales them taken into the weights."""
    file, tensors = found.file, found.tensors
    shapes = {
        "W_enc": "d_in latent",
        "W_dec": "latent d_out",
        "b_dec": "d_out",
        **SHAPES[architecture],
        **dict.fromkeys(SCALES, "latent"),
    }
    if architecture == "matching_pursuit":
        del shapes["W_enc"]
    if "log_threshold" in tensors and "threshold" in shapes:
        shapes["log_threshold"] = shapes.pop("threshold")
    parts = fit(file, tensors, shapes, optional=SCALES, sizes=sizes)
    if "log_threshold" in parts:
        parts["threshold"] = parts["log_threshold"].exp()
    for key in SCALES:
        if key in parts and not torch.allclose(parts[key], torch.ones(())):
            if not config.flag("finetuning_scaling_factor", default=False):
                raise WeightsError(
                    f"{file}: {key} is not 1 everywhere, but finetuning_scaling_factor in "
                    f"{config.file.name} is false: one of the two is wrong."
                )
            parts["W_dec"] = parts["W_dec"] * parts[key][:, None]
    if architecture.endswith("topk") and config.flag("rescale_acts_by_decoder_norm", default=False):
        length = parts["W_dec"].norm(dim=-1).clamp_min(1e-8)
        length = torch.where((length - 1).abs() <= UNIT, 1.0, length)  # bit for bit as written
        parts["W_enc"] = parts["W_enc"] * length
        parts["b_enc"] = parts["b_enc"] * length
        parts["W_dec"] = parts["W_dec"] / length[:, None]
    return parts


def _rule(
    config: Fields, architecture: str, parts: dict[str, Tensor], n_latents: int
) -> tuple[Rule, dict[str, Tensor]]:
    """Sparsity rule and its own tensors."""
    if architecture == "matching_pursuit":
        residual = config.values.get("residual_threshold", 0.01)
        if not isinstance(residual, int | float) or isinstance(residual, bool):
            raise config.wrong("residual_threshold", "a number")
        pursuit = Pursuit(
            steps=config.integer("max_iterations", config.integer("d_in")),
            least_residual=float(residual),
            ends_at_same_support=config.flag("stop_on_duplicate_support", default=True),
            positive=True,
        )
        return pursuit, {}
    if architecture in ("topk", "abstopk"):
        within = config if config.has("k") else config.part("activation_fn_kwargs")
        k = within.integer("k")
        if k > n_latents:
            raise within.wrong("k", f"at most the number of latents, {n_latents}")
        return (TopK(k=k) if architecture == "topk" else AbsTopK(k=k)), {}
    if "threshold" in parts:
        return Threshold(), {"threshold": parts["threshold"]}
    if "topk_threshold" in parts:
        return Threshold(), {"threshold": parts["topk_threshold"].expand(n_latents).clone()}
    if architecture == "gated":
        # SAELens takes the magnitude from the product alone, our rule from the gate.
        b_mag = parts["b_mag"] - parts["r_mag"].exp() * parts["b_gate"]
        return Gated(), {"r_mag": parts["r_mag"], "b_mag": b_mag}
    return ReLU(), {}


def _site(config: Fields) -> str | None:
    """The hook that it was trained on, if the file says."""
    metadata = config.part("metadata")
    for place, key in ((metadata, "hook_name"), (config, "hook_name"), (config, "hook_point")):
        if place.has(key):
            return place.text(key)
    return None


def save(
    dictionary: Any,
    folder: Path,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a folder that SAELens 6 loads, and return the file of weights.

    Args:
        dictionary: Dictionary of ours, or from a file of another library.
        folder: Folder to write.
        metadata: Entries for SAELens and tools around it, such as `model_name`, `hook_name` and
            `context_size`.

    Raises:
        DiskError: The folder is not writable or the disk is full.
        WeightsError: SAELens has no such dictionary.
    """
    whole = as_pretrained(dictionary, "SAELens")
    architecture, tensors, settings = _describe(whole)
    tensors |= {"W_dec": whole.W_dec, "b_dec": whole.b_dec}
    if not whole.sparsity.pursues:
        tensors["W_enc"] = whole.W_enc
    known = {**whole.metadata, **({"hook_name": whole.site} if whole.site else {})}
    known |= metadata or {}
    reshaping = known.pop("reshape_activations", None)
    if reshaping is None:
        reshaping = "hook_z" if str(known.get("hook_name", "")).endswith("hook_z") else "none"
    config = {
        "architecture": architecture,
        "d_in": whole.d_in,
        "d_sae": whole.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": whole.subtracts_b_dec,
        "normalize_activations": next(k for k, norm in NORMS.items() if norm is whole.norm),
        "reshape_activations": reshaping,
        **settings,
        "metadata": {"sae_lens_version": "6.0.0", **known},
    }
    plain = {k: t.detach().to("cpu", torch.float32).contiguous() for k, t in tensors.items()}
    write(folder / WEIGHTS, safetensors.torch.save(plain, {"written_by": "mechatlas"}))
    try:
        write_json(folder / CONFIG, config)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"The metadata cannot be written as JSON ({error}).") from error
    return folder / WEIGHTS


def _describe(whole: Pretrained) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """SAELens' name for what makes the code sparse, and the tensors and settings it needs."""
    if whole.spans:
        raise WeightsError("SAELens has no crosscoders, which write several sites.")
    rule, b_enc, state = whole.sparsity, {"b_enc": whole.b_enc}, whole.state
    # A transcoder between sites of one width, with the k largest, is as good as an autoencoder
    # that takes nothing from its input.
    alike = whole.d_in == whole.d_out and whole.norm is None and isinstance(rule, TopK)
    if whole.W_skip is not None or (whole.transcodes and not alike):
        if not isinstance(rule, ReLU | Threshold) or whole.subtracts_b_dec:
            raise WeightsError(
                f"SAELens has no transcoder with the sparsity rule {rule!r}, nor one that takes "
                "b_dec from its input; it has ReLU and thresholds."
            )
        jump = "jumprelu_" if isinstance(rule, Threshold) else ""
        skip = {} if whole.W_skip is None else {"W_skip": whole.W_skip.T}
        name = f"{jump}{'skip_' if skip else ''}transcoder"
        return name, {**b_enc, **state, **skip}, {"d_out": whole.d_out}
    if isinstance(rule, Pursuit):
        if not rule.positive:
            raise WeightsError("SAELens has no matching pursuit that takes atoms away.")
        settings = {
            "residual_threshold": rule.least_residual,
            "max_iterations": rule.steps,
            "stop_on_duplicate_support": rule.ends_at_same_support,
        }
        return "matching_pursuit", {}, settings
    if isinstance(rule, TopK | AbsTopK):
        name = "topk" if isinstance(rule, TopK) else "abstopk"
        # SAEDashboard and SAEBench give atoms length 1, which SAELens allows only where ranks are
        # of codes in units of such atoms: with atoms of length 1 they are.
        length = whole.W_dec.float().norm(dim=1)
        rescales = bool(((length - 1).abs() <= UNIT).all())
        return name, b_enc, {"k": rule.k, "rescale_acts_by_decoder_norm": rescales}
    if isinstance(rule, Threshold):
        return "jumprelu", {**b_enc, **state}, {}
    if isinstance(rule, Gated):
        b_mag = state["b_mag"] + state["r_mag"].exp() * whole.b_enc
        return "gated", {"b_gate": whole.b_enc, "r_mag": state["r_mag"], "b_mag": b_mag}, {}
    if isinstance(rule, ReLU):
        return "standard", b_enc, {}
    raise WeightsError(
        f"SAELens has no dictionary with the sparsity rule {rule!r}; it has TopK, AbsTopK, "
        "thresholds, Gated and ReLU."
    )
