"""Gemma Scope and Gemma Scope 2: JumpReLU dictionaries and transcoders of Google DeepMind.

Both take nothing from the input. The second writes its keys in lower case, and may add a linear
map of the input to what a transcoder gives.

Source: Lieberum et al., Gemma Scope (2024).
"""

from pathlib import Path

from mechatlas.base import WeightsError
from mechatlas.dictionaries.foreign.weights import fit, read_config
from mechatlas.dictionaries.pretrained import Pretrained
from mechatlas.dictionaries.sparsity import Threshold
from mechatlas.tensorfiles import read_tensors

SHAPES = {
    "W_enc": "d_in latent",
    "W_dec": "latent d_out",
    "b_enc": "latent",
    "b_dec": "d_out",
    "threshold": "latent",
}


def read_first(file: Path) -> Pretrained:
    """Read `params.npz`.

    Raises:
        WeightsError: It is damaged, or not as the format says.
    """
    parts = fit(file, read_tensors(file), SHAPES)
    transcodes = parts["W_enc"].shape[0] != parts["W_dec"].shape[1]
    return Pretrained(
        W_enc=parts["W_enc"],
        b_enc=parts["b_enc"],
        W_dec=parts["W_dec"],
        b_dec=parts["b_dec"],
        sparsity=Threshold(),
        state={"threshold": parts["threshold"]},
        subtracts_b_dec=False,
        transcodes=transcodes,
        file_format="Gemma Scope",
    )


def read_second(file: Path) -> Pretrained:
    """Read `params.safetensors`, and `config.json` if it is there.

    Raises:
        WeightsError: It is damaged, or not as the format says.
    """
    tensors = read_tensors(file)
    if "w_dec" in tensors and tensors["w_dec"].ndim == 3:
        raise WeightsError(
            f"{file}: w_dec has shape {tuple(tensors['w_dec'].shape)}: it writes to several "
            "layers (a cross-layer transcoder), which cannot be read as one dictionary."
        )
    lower = {key.replace("W_", "w_"): axes for key, axes in SHAPES.items()}
    skips, transcodes, site = "affine_skip_connection" in tensors, False, None
    if (file.parent / "config.json").exists():
        config = read_config(file.parent / "config.json")
        config.one_of("architecture", ("jump_relu",))
        skips = config.flag("affine_connection", default=skips)
        transcodes = config.has("hf_hook_point_out")
        site = config.text("hf_hook_point_in", "") or None
    shapes = {**lower, **({"affine_skip_connection": "d_in d_out"} if skips else {})}
    parts = fit(file, tensors, shapes)
    d_in, d_out = parts["w_enc"].shape[0], parts["w_dec"].shape[1]
    return Pretrained(
        W_enc=parts["w_enc"],
        b_enc=parts["b_enc"],
        W_dec=parts["w_dec"],
        b_dec=parts["b_dec"],
        sparsity=Threshold(),
        state={"threshold": parts["threshold"]},
        subtracts_b_dec=False,
        transcodes=transcodes or skips or d_in != d_out,
        W_skip=parts.get("affine_skip_connection"),
        file_format="Gemma Scope 2",
        site=site,
    )
