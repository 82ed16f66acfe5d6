"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors`.

`W_dec` is `(n_latents, d_in)`, as it is used. `b_dec` is taken from the input unless the
dictionary transcodes. `num_latents` 0 stands for `d_in * expansion_factor`.

Source: https://github.com/EleutherAI/sparsify, version 1.3.3, and its older releases.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from mechatlas.base import WeightsError
from mechatlas.dictionaries.activation_rules import GroupMax
from mechatlas.dictionaries.foreign.weights import Found, as_pretrained, fit, oriented
from mechatlas.dictionaries.pretrained import Pretrained
from mechatlas.dictionaries.sparsity import Rule, TopK
from mechatlas.files import Fields, write, write_json

SHAPES = {
    "encoder.weight": "latent d_in",
    "encoder.bias": "latent",
    "W_dec": "latent d_in",
    "b_dec": "d_in",
}


def read(found: Found) -> Pretrained:
    """Read `sae.safetensors` and the `cfg.json` beside it.

    Raises:
        WeightsError: One is damaged, or not as the format says.
    """
    config = found.config("cfg.json")
    d_in = config.integer("d_in")
    n_latents = config.integer("num_latents", 0, least=0)
    n_latents = n_latents or d_in * config.integer("expansion_factor", 32)
    transcodes = config.flag("transcode", default=False)
    if config.flag("signed", default=False):
        raise config.wrong("signed", "false: codes of both signs are not read")
    rule = _rule(config, n_latents)
    shapes = dict(SHAPES)
    if config.flag("skip_connection", default=False):
        shapes["W_skip"] = "d_in d_in"
    parts = fit(found.file, found.tensors, shapes, sizes={"d_in": d_in, "latent": n_latents})
    return Pretrained(
        **oriented(parts, shapes, tuple(SHAPES)),
        sparsity=rule,
        subtracts_b_dec=not transcodes,
        transcodes=transcodes,
        W_skip=parts["W_skip"].T if "W_skip" in parts else None,
        file_format="sparsify",
    )


def _rule(config: Fields, n_latents: int) -> Rule:
    """Sparsity rule."""
    k = config.integer("k", 32)
    if k > n_latents:
        raise config.wrong("k", f"at most the number of latents, {n_latents}")
    if config.one_of("activation", ("topk", "groupmax"), "topk") == "topk":
        return TopK(k=k)
    if n_latents % k:
        raise config.wrong("k", f"a divisor of the number of latents, {n_latents}")
    return GroupMax(k=k)


def save(dictionary: Any, folder: Path, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a folder that sparsify loads, and return the file of weights.

    Args:
        dictionary: Dictionary with the k largest, or the largest of each of k groups.
        folder: Folder to write.
        metadata: Further entries of the configuration.

    Raises:
        DiskError: The folder is not writable or the disk is full.
        WeightsError: sparsify has no such dictionary.
    """
    whole = as_pretrained(dictionary, "sparsify")
    rule = whole.sparsity
    if not isinstance(rule, TopK | GroupMax):
        raise WeightsError(
            f"sparsify has no dictionary with the sparsity rule {rule!r}; it has TopK and GroupMax."
        )
    transcodes = not whole.subtracts_b_dec
    if whole.norm is not None or whole.d_in != whole.d_out or whole.spans:
        raise WeightsError(
            "sparsify has dictionaries of one width alone, which do not scale their rows."
        )
    config = {
        **(metadata or {}),
        "activation": "topk" if isinstance(rule, TopK) else "groupmax",
        "d_in": whole.d_in,
        "num_latents": whole.n_latents,
        "k": rule.k,
        "expansion_factor": 32,
        "normalize_decoder": True,
        "multi_topk": False,
        "transcode": transcodes,
        "skip_connection": whole.W_skip is not None,
    }
    tensors = {"encoder.weight": whole.W_enc.T, "encoder.bias": whole.b_enc}
    tensors |= {"W_dec": whole.W_dec, "b_dec": whole.b_dec}
    if whole.W_skip is not None:
        tensors["W_skip"] = whole.W_skip.T
    plain = {key: t.detach().to("cpu", torch.float32).contiguous() for key, t in tensors.items()}
    write(folder / "sae.safetensors", safetensors.torch.save(plain, {"written_by": "mechatlas"}))
    write_json(folder / "cfg.json", config)
    return folder / "sae.safetensors"
