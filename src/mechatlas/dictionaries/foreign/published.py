"""Dictionaries published as four tensors, with few settings or none.

    Qwen Scope             `layerN.sae.pt`, both matrices transposed; k is in the repository's name
    Goodfire               `encoder_linear`, `decoder_linear`; relu
    DeepSeek R1            `encoder`, `decoder`; relu
    Connor and Rob         `NAME.pt`, `NAME_cfg.json`; relu, on the heads of `hook_z`
    OpenAI                 `pre_bias`, `latent_bias`; rows are normalized if it is top-k
    saev                   a line of JSON before the tensors
    Prisma                 `weights.pt`, `config.json`; as SAELens 2, for vision

Nothing is taken from the input but by Connor and Rob's, OpenAI's, Prisma's and saev's first.

Source: SAELens 6.54.12 for the first four; https://github.com/openai/sparse_autoencoder;
https://github.com/OSU-NLP-Group/saev; https://github.com/Prisma-Multimodal/ViT-Prisma.
"""

from typing import Any

from torch import Tensor

from mechatlas.base import WeightsError
from mechatlas.dictionaries.activation_rules import SignedTopK
from mechatlas.dictionaries.foreign.weights import Found, fit, oriented
from mechatlas.dictionaries.pretrained import NORMS, Pretrained, layer_norm
from mechatlas.dictionaries.sparsity import Gated, ReLU, Rule, TopK
from mechatlas.files import Fields

USUAL = {"W_enc": "d_in latent", "b_enc": "latent", "W_dec": "latent d_in", "b_dec": "d_in"}
QWEN = {"W_enc": "latent d_in", "b_enc": "latent", "W_dec": "d_in latent", "b_dec": "d_in"}
OPENAI = {
    "encoder.weight": "latent d_in",
    "latent_bias": "latent",
    "decoder.weight": "d_in latent",
    "pre_bias": "d_in",
}
STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
"""Tensors of OpenAI's that only training reads."""


def linear(prefix: str) -> dict[str, str]:
    """Axes of a linear layer each way, such as `encoder.weight`, `encoder.bias`."""
    encoder, decoder = f"encoder{prefix}", f"decoder{prefix}"
    return {
        f"{encoder}.weight": "latent d_in",
        f"{encoder}.bias": "latent",
        f"{decoder}.weight": "d_in latent",
        f"{decoder}.bias": "d_in",
    }


def _build(
    found: Found,
    shapes: dict[str, str],
    rule: Rule,
    *,
    subtracts: bool,
    file_format: str,
    **others: Any,
) -> Pretrained:
    """Read four tensors, whose axes are given in the order encoder, bias, decoder, bias."""
    parts = fit(found.file, found.tensors, shapes)
    weights = oriented(parts, shapes, tuple(shapes)[:4])
    if getattr(rule, "k", 1) > len(weights["W_dec"]):
        raise WeightsError(
            f"{found.file}: k is {getattr(rule, 'k', 1)}, expected at most the number of latents, "
            f"{len(weights['W_dec'])}."
        )
    return Pretrained(
        **weights, sparsity=rule, subtracts_b_dec=subtracts, file_format=file_format, **others
    )


def read_qwen(found: Found) -> Pretrained:
    """Read a dictionary of Qwen Scope.

    Raises:
        WeightsError: It is damaged, or nobody says how many latents are active.
    """
    return _build(found, QWEN, TopK(k=found.k()), subtracts=False, file_format="Qwen Scope")


def read_linear(found: Found) -> Pretrained:
    """Read a linear layer each way with relu between: Goodfire's, and DeepSeek R1's.

    Raises:
        WeightsError: It is damaged.
    """
    goodfire = "encoder_linear.weight" in found.shapes
    return _build(
        found,
        linear("_linear" if goodfire else ""),
        ReLU(),
        subtracts=False,
        file_format="Goodfire" if goodfire else "DeepSeek R1",
    )


def read_heads(found: Found) -> Pretrained:
    """Read a dictionary of Connor Kissane and Rob Krzyzanowski, on attention heads.

    Raises:
        WeightsError: It is damaged.
    """
    config = found.config("*_cfg.json")
    return _build(
        found,
        USUAL,
        ReLU(),
        subtracts=True,
        file_format="Connor and Rob",
        site=config.text("act_name"),
        metadata={"model_name": "gpt2-small", "reshape_activations": "hook_z"},
    )


def read_openai(found: Found) -> Pretrained:
    """Read a dictionary of OpenAI.

    Raises:
        WeightsError: It is damaged, or its activation function is not read.
    """
    tensors = {key: t for key, t in found.tensors.items() if key not in STATISTICS}
    shapes = {k: a for k, a in OPENAI.items() if k in tensors or k != "decoder.weight"}
    values = Fields(found.file, {"activation": "ReLU", **found.values}, error=WeightsError)
    kind = values.one_of("activation", ("ReLU", "TopK", "Identity"))
    inner = values.part("activation_state_dict")
    rule: Rule = ReLU()
    if kind == "TopK":
        k = found.k(inner)
        after = inner.one_of("postact_fn", ("ReLU", "Identity"), "ReLU")
        rule = TopK(k=k) if after == "ReLU" else SignedTopK(k=k)
    elif kind == "Identity":
        raise values.wrong("activation", "ReLU or TopK: codes of Identity are not sparse")
    parts = fit(found.file, tensors, shapes)
    parts.setdefault("decoder.weight", parts["encoder.weight"].T)
    return Pretrained(
        **oriented(parts, OPENAI, tuple(OPENAI)),
        sparsity=rule,
        subtracts_b_dec=True,
        norm=layer_norm if kind == "TopK" else None,
        file_format=f"OpenAI {kind}",
    )


def read_saev(found: Found) -> Pretrained:
    """Read a dictionary of saev, whose first versions took `b_dec` from the input.

    Raises:
        WeightsError: It is damaged, or its activation function is not read.
    """
    header = Fields(found.file, found.values, error=WeightsError)
    config = header.part("cfg") if header.has("schema") else header
    activation = config.part("activation")
    kind = activation.text("cls", header.text("cls", "Relu"))
    if kind not in ("Relu", "TopK", "BatchTopK"):
        kind = "Relu"
    place = activation.part("params") if activation.has("params") else config
    k = place.integer("top_k", 32)
    return _build(
        found,
        USUAL,
        ReLU() if kind == "Relu" else SignedTopK(k=k),
        subtracts=not header.has("schema"),
        file_format=f"saev {kind}",
    )


def read_prisma(found: Found) -> Pretrained:
    """Read a dictionary of Prisma, for vision transformers.

    Raises:
        WeightsError: It is damaged, or of an architecture that is not read.
    """
    config = found.config("config.json")
    gated = config.one_of("architecture", ("standard", "vanilla", "gated"), "standard") == "gated"
    activation = config.one_of("activation_fn_str", ("relu", "topk"), "relu")
    norm = config.one_of(
        "normalize_activations", ("none", "layer_norm", "constant_norm_rescale"), "none"
    )
    own = {"b_gate": "latent", "r_mag": "latent", "b_mag": "latent"} if gated else {}
    parts = fit(found.file, found.tensors, {**USUAL, **own}, optional=("b_enc",) if gated else ())
    rule: Rule = ReLU()
    state: dict[str, Tensor] = {}
    if gated:
        parts["b_enc"], rule = parts["b_gate"], Gated()
        magnitude = parts["b_mag"] - parts["r_mag"].exp() * parts["b_gate"]
        state = {"r_mag": parts["r_mag"], "b_mag": magnitude}
    elif activation == "topk":
        rule = TopK(k=found.k(config.part("activation_fn_kwargs")))
    return Pretrained(
        **oriented(parts, USUAL, tuple(USUAL)),
        sparsity=rule,
        state=state,
        subtracts_b_dec=True,
        norm=NORMS.get({"constant_norm_rescale": "root_length"}.get(norm, norm)),
        file_format="Prisma",
        site=config.text("hook_point", "") or None,
        metadata={"model_name": config.text("model_name", "")},
    )
