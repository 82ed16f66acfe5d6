"""Overcomplete: the state of a module, without the name of its class.

    encoder        `encoder.final_block.0` a linear layer, `.1` a batch norm that goes into it;
                   `encoder.weight` alone of an encoder without a bias; none for a pursuit
    dictionary     `dictionary._weights` times exp(`dictionary.multiplier`); of a relaxed
                   archetypal one `W C + Relax`
    thresholds     logarithms (JumpSAE)
    Q              levels (QSAE)

The state does not tell SAE, TopKSAE and BatchTopKSAE apart: the caller does, with `k=`,
`threshold=` (`running_threshold`) or `sparsity=ma.ReLU()`.

Source: https://github.com/KempnerInstitute/overcomplete, version 0.3.0.
"""

import torch
from torch import Tensor

from mechatlas.base import WeightsError
from mechatlas.dictionaries.activation_rules import Levels, Pursuit
from mechatlas.dictionaries.foreign.weights import Found, fit
from mechatlas.dictionaries.pretrained import Pretrained
from mechatlas.dictionaries.sparsity import Rule, Threshold, TopK

BLOCK = "encoder.final_block."
NORM = {f"{BLOCK}1.{name}": "latent" for name in ("weight", "bias", "running_mean", "running_var")}
SHAPES = {
    f"{BLOCK}0.weight": "latent d_in",
    f"{BLOCK}0.bias": "latent",
    **NORM,
    "encoder.weight": "latent d_in",
    "encoder.bias": "latent",
    "encoder.tied_to._weights": "latent d_in",
    "encoder.tied_to.multiplier": "",
    "dictionary._weights": "latent d_in",
    "dictionary.multiplier": "",
    "dictionary.W": "latent point",
    "dictionary.C": "point d_in",
    "dictionary.Relax": "latent d_in",
    "thresholds": "latent",
    "Q": "level",
}
ARCHETYPAL = ("dictionary.W", "dictionary.C", "dictionary.Relax")
EPSILON = 1e-5
"""Constant of torch's batch norm."""


def read(found: Found) -> Pretrained:
    """Read the state of one of Overcomplete's classes.

    Raises:
        WeightsError: It is damaged, of an encoder that is not read, or nobody says which class it
            is of.
    """
    tensors = {k: t for k, t in found.tensors.items() if not k.endswith("num_batches_tracked")}
    archetypal = "dictionary.W" in tensors
    needed = ARCHETYPAL if archetypal else ("dictionary._weights",)
    needed += tuple(key for key in (f"{BLOCK}0.weight", "encoder.weight") if key in tensors)[:1]
    needed += (f"{BLOCK}0.bias",) if f"{BLOCK}0.weight" in needed else ()
    if f"{BLOCK}1.weight" in tensors and f"{BLOCK}1.running_mean" not in tensors:
        raise WeightsError(
            f"{found.file}: {BLOCK}1 is a layer norm over the latents of a row, which is not read."
        )
    optional = [key for key in SHAPES if key not in (*needed, "dictionary.multiplier")]
    parts = fit(found.file, tensors, SHAPES, optional=optional)
    if archetypal:
        point_weights, points, relaxation = (parts[key] for key in ARCHETYPAL)
        atoms = point_weights @ points + relaxation
    else:
        atoms = parts["dictionary._weights"]
    atoms = atoms * parts["dictionary.multiplier"].exp()
    rule, state = _rule(found, parts, len(atoms))
    weights, bias = (atoms, None) if rule.pursues else _encoder(parts, atoms)
    return Pretrained(
        W_enc=weights.T,
        b_enc=torch.zeros(len(atoms)) if bias is None else bias,
        W_dec=atoms,
        b_dec=torch.zeros(atoms.shape[1]),
        sparsity=rule,
        state=state,
        subtracts_b_dec=False,
        file_format="Overcomplete",
    )


def _encoder(parts: dict[str, Tensor], atoms: Tensor) -> tuple[Tensor, Tensor | None]:
    """Encoder rows and biases, a batch norm included."""
    if f"{BLOCK}0.weight" not in parts:  # tied, where it has no weight of its own
        return parts.get("encoder.weight", atoms), parts.get("encoder.bias")
    weights, bias = parts[f"{BLOCK}0.weight"], parts[f"{BLOCK}0.bias"]
    if f"{BLOCK}1.running_mean" in parts:
        weight, shift, mean, variance = (parts[key] for key in NORM)
        factor = weight / (variance + EPSILON).sqrt()
        weights, bias = weights * factor[:, None], (bias - mean) * factor + shift
    return weights, bias


def _rule(found: Found, parts: dict[str, Tensor], n_latents: int) -> tuple[Rule, dict[str, Tensor]]:
    """Sparsity rule and its own tensors, from the tensors and the caller."""
    if "Q" in parts:
        return Levels(), {"levels": parts["Q"]}
    if "thresholds" in parts:
        return Threshold(), {"threshold": parts["thresholds"].exp()}
    rule, threshold, k = (found.setting(key) for key in ("sparsity", "threshold", "k"))
    if not any(key.startswith("encoder.") for key in parts):
        return Pursuit(steps=found.k()), {}
    if isinstance(rule, Rule):
        return rule, {}
    if isinstance(threshold, int | float):
        # A code that equals the threshold is kept.
        below = torch.nextafter(torch.tensor(float(threshold)), torch.tensor(-torch.inf))
        return Threshold(), {"threshold": below.expand(n_latents).clone()}
    if k is None:
        raise WeightsError(
            f"{found.file} does not say which class of Overcomplete it is of: give k= for TopKSAE, "
            "threshold= (its running_threshold) for BatchTopKSAE, sparsity=ma.ReLU() for SAE."
        )
    return TopK(k=min(found.k(), n_latents)), {}
