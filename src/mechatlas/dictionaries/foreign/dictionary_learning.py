"""saprmarks' dictionary_learning: `ae.pt` and `config.json`.

The class named in the configuration says what the tensors mean:

    AutoEncoder             relu; `bias` is taken from the input and added to the output
    AutoEncoderNew          relu; nothing is taken from the input
    GatedAutoEncoder        a gate and a magnitude
    JumpReluAutoEncoder     a threshold a latent; nothing is taken from the input
    AutoEncoderTopK         the k largest; the threshold that is also there is not used
    BatchTopKSAE            one threshold for all latents, learned from batches
    MatryoshkaBatchTopKSAE  the same, weights the other way round

`norm_factor` in the configuration is already in the biases. The library's own
`AutoEncoder.from_pretrained` gives atoms length 1 and scales codes with them; here both are as
in the file.

Source: https://github.com/saprmarks/dictionary_learning, version 0.1.0.
"""

import reprlib
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from mechatlas.base import WeightsError
from mechatlas.dictionaries.foreign.weights import fit, read_config, take_integer
from mechatlas.dictionaries.pretrained import Pretrained
from mechatlas.dictionaries.sparsity import Gated, ReLU, Rule, Threshold, TopK
from mechatlas.files import Fields
from mechatlas.tensorfiles import read_tensors

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


def read(file: Path) -> Pretrained:
    """Read `ae.pt` and the `config.json` beside it (or above the folder `checkpoints`).

    Raises:
        WeightsError: One is damaged, or not as the format says.
    """
    folder = file.parent.parent if file.parent.name == "checkpoints" else file.parent
    config = read_config(folder / "config.json").part("trainer")
    kind = config.one_of("dict_class", tuple(SHAPES))
    tensors = read_tensors(file)
    k = _read_k(file, tensors, config) if kind in WITH_K else None
    shapes = dict(SHAPES[kind])
    if kind == "MatryoshkaBatchTopKSAE" and not _take_groups(file, tensors):
        shapes["group_sizes"] = "group"
    sizes = {
        axis: config.integer(key)
        for axis, key in (("d_in", "activation_dim"), ("latent", "dict_size"))
        if config.has(key)
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
    )
    if k is not None and k > dictionary.n_latents:
        raise WeightsError(
            f"{file}: k is {k}, expected at most the number of latents, {dictionary.n_latents}."
        )
    return dictionary


def _weights(parts: dict[str, Tensor]) -> dict[str, Any]:
    """The four tensors, under whichever names they have."""
    if "W_enc" in parts:
        return {key: parts[key] for key in PLAIN}
    biases = ("bias", "decoder.bias", "decoder_bias", "b_dec")
    return {
        "W_enc": parts["encoder.weight"].T,
        "b_enc": parts["gate_bias" if "gate_bias" in parts else "encoder.bias"],
        "W_dec": parts["decoder.weight"].T,
        "b_dec": next(parts[key] for key in biases if key in parts),
    }


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
    """Latents a sample, from the tensors and the configuration, which have to agree.

    Raises:
        WeightsError: Neither says, or each says something else.
    """
    k = take_integer(file, tensors, "k")
    k_written = config.integer("k", k)
    if k is not None and k_written != k:
        raise config.wrong("k", f"{k}, as in {file.name}")
    return k_written


def _take_groups(file: Path, tensors: dict[str, Tensor]) -> bool:
    """Take the sizes of the nested dictionaries out, if they are there; all latents are used.

    Raises:
        WeightsError: They do not add up to the number of latents.
    """
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
