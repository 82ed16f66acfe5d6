"""Dictionaries as vectors that can be compared: the scale freedom of each latent taken out.

A latent may be made c times as active and its decoder row c times as short without changing a
reconstruction. Where a rule has a threshold for each latent, that fixes the unit (the paper's
folding); where it has none (ReLU, TopK, BatchTopK, gated), activations can: the mean of a latent
over the rows where it is active. Without either the rows are taken as they are.

    fold           a dictionary or a matrix of decoder rows -> `Atoms`
    mean_active    the unit of each latent on some rows
    vectors        what of the atoms a cost compares

Source: Balagansky et al., Mechanistic permutability (2024), section 3.
"""

import dataclasses
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechatlas.base import InputError

Parts = Literal["decoder", "encoder", "all", "balanced", "cosine", "codes"]
"""decoder: folded decoder rows; encoder: folded encoder columns; all: both and the encoder's
bias, as they are (the paper's full cost, which the decoder dominates); balanced: the same with
each part scaled to weigh alike; cosine: decoder rows at length 1; codes: matrices as `correlate`
gives them, where rows of zeros are latents that are not paired."""


@dataclasses.dataclass(frozen=True, eq=False)
class Atoms:
    """A folded dictionary."""

    decoder: Float[np.ndarray, "latent d_in"]
    encoder: Float[np.ndarray, "latent d_enc"] | None
    """Encoder columns, one row a latent; `None` for a matrix of decoder rows."""
    bias: Float[np.ndarray, " latent"] | None
    """The encoder's, with what the format subtracts from the input absorbed."""
    unit: Float[np.ndarray, " latent"]
    """Activation that became 1."""


def fold(dictionary: Any, *, unit: np.ndarray | Tensor | None = None, name: str = "A") -> Atoms:
    """Take the scale of each latent out of a dictionary.

    Args:
        dictionary: A dictionary, or a matrix of decoder rows (latent, d_in).
        unit: Activation of each latent that becomes 1; by default its threshold, if the
            dictionary has one for each latent, else 1.
        name: What to call it in messages.

    Raises:
        InputError: It is no dictionary, has no latents or values that are not finite, or some
            unit is not positive.
    """
    if isinstance(dictionary, np.ndarray | Tensor):
        decoder = _array(dictionary)
        if decoder.ndim != 2:
            raise InputError(f"Decoder rows of {name} must be a matrix, got {decoder.shape}.")
        encoder = bias = None
    else:
        if not all(hasattr(dictionary, part) for part in ("W_enc", "b_enc", "W_dec")):
            raise InputError(
                f"{name} is a {type(dictionary).__name__}; pass a dictionary with W_enc, b_enc "
                "and W_dec, or a matrix of decoder rows."
            )
        decoder, encoder = _array(dictionary.W_dec), _array(dictionary.W_enc).T
        bias = _array(dictionary.b_enc).astype(np.float64)
        if getattr(dictionary, "subtracts_b_dec", getattr(dictionary, "centred", True)):
            bias = bias - encoder @ _array(dictionary.b_dec)
    if decoder.size == 0:
        raise InputError(f"{name} has no latents: its decoder has shape {decoder.shape}.")
    bad = np.flatnonzero(~np.isfinite(decoder.sum(axis=1)))
    if len(bad):
        raise InputError(f"The decoder of {name} is not finite at latent {bad[0]}.")
    own = _thresholds(dictionary) if unit is None else _array(unit)
    unit = np.ones(len(decoder)) if own is None else own.astype(np.float64)
    if unit.shape != (len(decoder),):
        raise InputError(f"{name} has {len(decoder)} latents and units of shape {unit.shape}.")
    if not (unit > 0).all():
        worst = int(np.argmin(unit))
        raise InputError(
            f"Latent {worst} of {name} has the threshold or unit {unit[worst]:g}; folding divides "
            "by it, so it must be > 0. Fold by mean activations instead (give a store)."
        )
    return Atoms(
        decoder=np.ascontiguousarray(decoder * unit[:, None], dtype=np.float32),
        encoder=None if encoder is None else encoder / unit[:, None],
        bias=None if bias is None else bias / unit,
        unit=unit,
    )


def _array(value: Any) -> np.ndarray:
    """A tensor or an array as float32.

    Raises:
        InputError: It does not hold real numbers.
    """
    if isinstance(value, Tensor):
        value = value.detach().to("cpu", torch.float32).numpy()
    value = np.asarray(value)
    if value.dtype.kind not in "fiub":
        raise InputError(f"Latents are compared as real numbers, got an array of {value.dtype}.")
    with np.errstate(over="ignore"):  # what does not fit is infinite, and told by its latent
        return value.astype(np.float32)


def _thresholds(dictionary: Any) -> np.ndarray | None:
    """The threshold of each latent, if its rule has one that is not zero everywhere."""
    logarithm = getattr(dictionary, "log_threshold", None)
    if isinstance(logarithm, Tensor):
        return np.exp(_array(logarithm))
    for owner in (dictionary, getattr(dictionary, "sparsity", None)):
        for name in ("threshold", "theta"):
            found = getattr(owner, name, None)
            if isinstance(found, Tensor | np.ndarray) and found.ndim == 1 and len(found) > 1:
                found = _array(found)
                return found if found.any() else None
    return None


@torch.no_grad()
def mean_active(
    dictionary: Any, x: Float[Tensor, "row d_in"], *, batch_size: int = 512
) -> Float[np.ndarray, " latent"]:
    """Mean of each latent over the rows where it is active; the median of all where it never is.

    Raises:
        InputError: No latent is active on any row.
    """
    total = torch.zeros(dictionary.n_latents, dtype=torch.float64)
    count = torch.zeros(dictionary.n_latents, dtype=torch.float64)
    for part in x.split(batch_size):
        code = dictionary.encode(part)
        total += code.double().abs().sum(dim=0)
        count += (code != 0).double().sum(dim=0)
    alive = count > 0
    if not alive.any():
        raise InputError(f"No latent is active on any of the {len(x)} rows.")
    mean = total / count.clamp_min(1)
    return torch.where(alive, mean, mean[alive].median()).numpy()


def vectors(atoms: Atoms, other: Atoms, parts: Parts) -> Float[np.ndarray, "latent width"]:
    """What a cost compares of `atoms` when they are paired with `other`.

    Raises:
        InputError: A part is needed that a matrix of decoder rows does not have.
    """
    if parts in ("decoder", "codes"):
        return atoms.decoder
    if parts == "cosine":
        return unit_rows(atoms.decoder)
    found = []
    for one in (atoms, other):
        if one.encoder is None or one.bias is None:
            raise InputError(f"The cost {parts!r} needs dictionaries with an encoder.")
        found.append([one.decoder, one.encoder, one.bias[:, None]])
    own = found[0]
    if parts == "encoder":
        return np.ascontiguousarray(own[1], dtype=np.float32)
    if parts == "balanced":
        sizes = [np.sqrt(sum(np.square(f[k]).sum() for f in found)) for k in range(3)]
        own = [part / max(size, 1e-30) for part, size in zip(own, sizes, strict=True)]
    return np.ascontiguousarray(np.concatenate(own, axis=1), dtype=np.float32)


def unit_rows(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Rows at length 1; zero rows stay zero."""
    x = np.asarray(x, dtype=np.float32)
    length = np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float64))
    return (x / np.maximum(length, 1e-30)[:, None]).astype(np.float32)
