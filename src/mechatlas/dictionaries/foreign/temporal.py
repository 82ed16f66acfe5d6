"""Temporal dictionaries of SAELens, and as they are published.

    SAELens      `cfg.json` with the architecture temporal, `sae_weights.safetensors`
    published    `conf.yaml`, `latest_ckpt.safetensors` with `D`, `b` and, if not tied, `E`

Source: SAELens 6.54.12, class TemporalSAE, and its loader of canrager/temporalSAEs.
"""

import re
from typing import Any

import torch
from torch import Tensor

from mechatlas.base import WeightsError
from mechatlas.dictionaries.foreign.weights import Found, as_json, fit
from mechatlas.dictionaries.temporal import TemporalDictionary
from mechatlas.files import Fields, read
from mechatlas.tensorfiles import reading

SCALES = ("none", "constant_scalar_rescale")
"""Values of `normalize_activations` that are read."""
LONGEST = 200
"""Characters of a line of settings that is read."""
PUBLISHED = {"W_dec": "D", "b_dec": "b", "W_enc": "E"}
"""Names of the tensors in published files."""


def read_saelens(found: Found, config: Fields, site: str | None, kept: Any) -> TemporalDictionary:
    """Read a folder of SAELens.

    Args:
        found: Where the tensors are from.
        config: Settings in `cfg.json`.
        site: Hook it was trained on.
        kept: Entries for when it is written again.

    Raises:
        WeightsError: It is damaged, or not as the format says.
    """
    key = "normalize_activations"
    scales = config.one_of(key, SCALES, "none") == "constant_scalar_rescale"
    shapes = {name: name for name in PUBLISHED}
    return _build(found, config, shapes, site, kept, scales=scales)


def read_published(found: Found) -> TemporalDictionary:
    """Read `latest_ckpt.safetensors` and the `conf.yaml` beside it.

    Raises:
        WeightsError: It is damaged, or not as the format says.
    """
    path = found.beside("conf.yaml")
    assert path is not None  # by this file the layout is recognized
    with reading(path):
        values = _settings(read(path, limit=1 << 20).decode())
    config = Fields(path, values, error=WeightsError)
    if not config.has("d_sae") and config.has("exp_factor"):
        factor = config.values["exp_factor"]
        if not isinstance(factor, int | float) or factor <= 0:
            raise config.wrong("exp_factor", "a number above 0")
        values["d_sae"] = int(config.integer("d_in") * factor)
    layer = re.search(r"layer_(\d+)", str(path.absolute().parent))
    site = f"blocks.{layer[1]}.hook_resid_post" if layer else None
    return _build(found, config, PUBLISHED, site, {}, scales=True)


def _settings(text: str) -> dict[str, Any]:
    """Entries of the sections `llm` and `sae` of a YAML file with plain values."""
    names = {"dimin": "d_in", "scaling_factor": "activation_normalization_factor"}
    plain = {"true": True, "false": False, "null": None}
    values: dict[str, Any] = {}
    section = ""
    for line in text.splitlines():
        if len(line) > LONGEST:  # no setting of ours, and slow to take apart
            continue
        entry = re.fullmatch(r"(\s*)(\w+):\s*(?:['\"]?([^'\"#]*[^'\"#\s]))?['\"]?\s*(?:#.*)?", line)
        if entry is None:
            continue
        indent, name, word = entry.groups()
        if not indent:
            section = name
        elif section in ("llm", "sae"):
            number = re.fullmatch(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?", word or "")
            value: Any = plain.get(word or "null", word)
            if number:
                value = float(word) if number[2] or number[3] or "." in word else int(word)
            values[names.get(name, name)] = value
    return values


def _build(
    found: Found, config: Fields, names: Any, site: str | None, kept: Any, *, scales: bool
) -> TemporalDictionary:
    """Make a dictionary of some settings, and fill it."""
    d_in, n_latents = config.integer("d_in"), config.integer("d_sae")
    n_heads = config.integer("n_heads", 8)
    n_layers, bottleneck = (
        config.integer("n_attn_layers", 1),
        config.integer("bottleneck_factor", 64),
    )
    tied = config.flag("tied_weights", default=True)
    keeps_k = config.one_of("sae_diff_type", ("relu", "topk"), "topk") == "topk"
    k = config.integer("kval_topk") if keeps_k and config.has("kval_topk") else None
    if n_latents % (bottleneck * n_heads):
        raise config.wrong("bottleneck_factor", "one that divides the latents among the heads")
    if k is not None and k > n_latents:
        raise config.wrong("kval_topk", f"at most the number of latents, {n_latents}")
    factor = config.values.get("activation_normalization_factor", 1.0) if scales else 1.0
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor < 1e30:
        raise config.wrong("activation_normalization_factor", "a number above 0")
    shapes = {names["W_dec"]: "latent d_in", names["b_dec"]: "d_in"}
    if not tied:
        shapes[names["W_enc"]] = "d_in latent"
    for i in range(min(n_layers, len(found.shapes))):
        for part in ("k_ctx", "q_target", "v_ctx", "c_proj"):
            out = "narrow" if part in ("k_ctx", "q_target") else "latent"
            shapes[f"attn_layers.{i}.{part}.weight"] = f"{out} latent"
            shapes[f"attn_layers.{i}.{part}.bias"] = out
    sizes = {"d_in": d_in, "latent": n_latents, "narrow": n_latents // bottleneck}
    parts = {
        key: t.float() for key, t in fit(found.file, found.tensors, shapes, sizes=sizes).items()
    }
    state: dict[str, Tensor] = {key: t for key, t in parts.items() if key.startswith("attn_")}
    state |= {"W_dec": parts[names["W_dec"]], "b_dec": parts[names["b_dec"]]}
    if not tied:
        state["encoder"] = parts[names["W_enc"]]
    with torch.device("meta"):  # the tensors are those of the file
        dictionary = TemporalDictionary(
            d_in=d_in, n_latents=n_latents, n_heads=n_heads, n_layers=n_layers,
            bottleneck=bottleneck, k=k, tied=tied, scale=float(factor), site=site,
            subtracts_b_dec=config.flag("apply_b_dec_to_input", default=True),
            metadata=as_json(kept),
        )  # fmt: skip
    dictionary.load_state_dict(state, assign=True)
    return dictionary
