"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors`.

`W_dec` is `(n_latents, d_in)`, as it is used. `b_dec` is taken from the input unless the
dictionary transcodes. `num_latents` 0 stands for `d_in * expansion_factor`.

Source: https://github.com/EleutherAI/sparsify, version 1.3.3, and its older releases.
"""

from pathlib import Path

from mechatlas.dictionaries.activation_rules import GroupMax
from mechatlas.dictionaries.foreign.weights import fit, read_config
from mechatlas.dictionaries.pretrained import Pretrained
from mechatlas.dictionaries.sparsity import Rule, TopK
from mechatlas.files import Fields
from mechatlas.tensorfiles import read_tensors

SHAPES = {
    "encoder.weight": "latent d_in",
    "encoder.bias": "latent",
    "W_dec": "latent d_in",
    "b_dec": "d_in",
}


def read(file: Path) -> Pretrained:
    """Read `sae.safetensors` and the `cfg.json` beside it.

    Raises:
        WeightsError: One is damaged, or not as the format says.
    """
    config = read_config(file.parent / "cfg.json")
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
    parts = fit(file, read_tensors(file), shapes, sizes={"d_in": d_in, "latent": n_latents})
    return Pretrained(
        W_enc=parts["encoder.weight"].T,
        b_enc=parts["encoder.bias"],
        W_dec=parts["W_dec"],
        b_dec=parts["b_dec"],
        sparsity=rule,
        subtracts_b_dec=not transcodes,
        transcodes=transcodes,
        W_skip=parts["W_skip"].T if "W_skip" in parts else None,
        file_format="sparsify",
    )


def _rule(config: Fields, n_latents: int) -> Rule:
    """Sparsity rule.

    Raises:
        WeightsError: `k` is not a number of latents, or does not divide them into groups.
    """
    k = config.integer("k", 32)
    if k > n_latents:
        raise config.wrong("k", f"at most the number of latents, {n_latents}")
    if config.one_of("activation", ("topk", "groupmax"), "topk") == "topk":
        return TopK(k=k)
    if n_latents % k:
        raise config.wrong("k", f"a divisor of the number of latents, {n_latents}")
    return GroupMax(k=k)
