"""Folded dictionaries: decoder and encoder rows with the scale freedom of each latent removed.

A latent may be made c times as active and its decoder row c times as short without changing a
reconstruction. Where a rule has a threshold for each latent, the threshold fixes the scale (the
paper's folding). ReLU, TopK, BatchTopK and gated dictionaries have none; there the mean activation
of a latent over the rows where it is active can fix it. Without either, rows stay as they are.

    fold           a dictionary or a matrix of decoder rows -> `FoldedDictionary`
    mean_active    mean activation of each latent on some rows, for use as its scale
    varying        latents whose code is not the same on all rows
    vectors        the vectors of a folded dictionary that a cost compares

Source: Balagansky et al., Mechanistic permutability (2024), section 3.
"""

import dataclasses
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from torch import Tensor

from mechatlas.base import Dictionary, InputError
from mechatlas.maths.arrays import as_array

Cost = Literal["decoder", "encoder", "all", "balanced", "cosine", "codes"]
"""Vectors whose squared distance is the cost of a pair.

decoder: folded decoder rows. encoder: folded encoder columns. all: both and the encoder's bias,
unweighted (the paper's full cost, which the decoder dominates). balanced: the same three, scaled to
equal total length. cosine: decoder rows at length 1. codes: matrices made by `correlate`, whose
rows of zeros are latents that are not paired.
"""
CONSTANT = 1e-5
"""Spread of the codes of a constant latent, as a share of their size."""
BATCH = 512
"""Rows encoded or decoded at once."""
BLOCK = 1024
"""Latents decoded at once from a dictionary that does not show its decoder."""


@dataclasses.dataclass(frozen=True, eq=False)
class FoldedDictionary:
    """Weights of a dictionary at the scale where every latent is active at 1."""

    decoder: Float[np.ndarray, "latent d_in"]
    """Decoder rows times the scale."""
    encoder: Float[np.ndarray, "latent d_enc"] | None
    """Encoder columns over the scale, one row a latent; `None` where the encoder is not known."""
    bias: Float[np.ndarray, " latent"] | None
    """Encoder bias over the scale, with what the format subtracts from its input absorbed."""
    scale: Float[np.ndarray, " latent"]
    """Activation that became 1."""
    live: Bool[np.ndarray, " latent"]
    """Latents whose code can depend on the input: their threshold is finite, their encoder not
    zero."""


def fold(
    dictionary: Any, *, scale: ArrayLike | Tensor | None = None, name: str = "A"
) -> FoldedDictionary:
    """Remove the scale freedom of each latent.

    Args:
        dictionary: Any `Dictionary`, or a matrix of decoder rows (latent, d_in).
        scale: Activation of each latent that becomes 1; by default its threshold where the
            dictionary has one for each latent, else 1.
        name: Name of the dictionary in messages.

    Raises:
        InputError: The input is no dictionary, has no latents or values that are not finite, or a
            scale is not positive.
    """
    decoder, encoder, bias = _weights(dictionary, name)
    if decoder.size == 0:
        raise InputError(f"{name} has no latents: its decoder has shape {decoder.shape}.")
    bad = np.flatnonzero(~np.isfinite(decoder.sum(axis=1)))
    if len(bad):
        raise InputError(f"The decoder of {name} is not finite at latent {bad[0]}.")
    own = _thresholds(dictionary) if scale is None else _float32(scale, "latent", "scale")
    factor = np.ones(len(decoder)) if own is None else own.astype(np.float64)
    if factor.shape != (len(decoder),):
        raise InputError(f"{name} has {len(decoder)} latents and scales of shape {factor.shape}.")
    live = np.isfinite(factor)
    factor = np.where(np.isposinf(factor), 1.0, factor)
    if encoder is not None:
        live &= encoder.any(axis=1)
    if not (factor > 0).all():
        worst = int(np.argmin(factor))
        raise InputError(
            f"Latent {worst} of {name} has the threshold or scale {factor[worst]:g}; folding "
            "divides by it, so it must be > 0. Fold by mean activations instead (give a store)."
        )
    is_array = isinstance(dictionary, np.ndarray)  # weights may be trained on, and are copied
    return FoldedDictionary(
        decoder=decoder if is_array and own is None else _scaled(decoder, factor),
        encoder=encoder if encoder is None or own is None else _scaled(encoder, 1 / factor),
        bias=None if bias is None else bias / factor,
        scale=factor,
        live=live,
    )


def _scaled(
    rows: Float[np.ndarray, "latent width"], factor: Float[np.ndarray, " latent"]
) -> Float[np.ndarray, "latent width"]:
    """Multiply rows; none exists in float64."""
    made = np.empty(rows.shape, np.float32)
    return np.multiply(rows, factor[:, None], out=made, casting="same_kind")


def _weights(
    dictionary: Any, name: str
) -> tuple[
    Float[np.ndarray, "latent d_in"],
    Float[np.ndarray, "latent d_enc"] | None,
    Float[np.ndarray, " latent"] | None,
]:
    """Decoder rows, encoder rows and encoder bias of a dictionary."""
    if isinstance(dictionary, np.ndarray | Tensor | list | tuple):
        return _float32(dictionary, "latent d_in", f"Decoder rows of {name}"), None, None
    if not hasattr(dictionary, "W_dec"):
        if not isinstance(dictionary, Dictionary):
            raise InputError(
                f"{name} is a {type(dictionary).__name__}; pass a dictionary with encode and "
                "decode, or a matrix of decoder rows."
            )
        return _decoded_rows(dictionary, name), None, None
    decoder = _float32(dictionary.W_dec, "latent d_in", f"W_dec of {name}")
    if not (hasattr(dictionary, "W_enc") and hasattr(dictionary, "b_enc")):
        return decoder, None, None
    encoder = _float32(dictionary.W_enc, "d_in latent", f"W_enc of {name}").T
    bias = _float32(dictionary.b_enc, "latent", f"b_enc of {name}").astype(np.float64)
    if getattr(dictionary, "subtracts_b_dec", True):
        bias = bias - encoder @ _float32(dictionary.b_dec, "d_in", f"b_dec of {name}")
    return decoder, encoder, bias


@torch.no_grad()
def _decoded_rows(dictionary: Dictionary, name: str) -> Float[np.ndarray, "latent d_in"]:
    """Decoder rows read off `decode`, one latent at a time."""
    n = dictionary.n_latents
    offset = dictionary.decode(torch.zeros(1, n))
    blocks = [
        dictionary.decode(torch.eye(min(BLOCK, n - i), n, dtype=torch.float32).roll(i, 1)) - offset
        for i in range(0, n, BLOCK)
    ]
    rows = torch.cat(blocks).float()
    code = torch.rand(4, n, generator=torch.Generator().manual_seed(0))
    expected = dictionary.decode(code)
    if not torch.allclose(code @ rows + offset, expected, rtol=1e-3, atol=1e-3):
        raise InputError(
            f"decode of {name} ({type(dictionary).__name__}) is not affine, so it has no decoder "
            "rows to compare. Compare codes on paired rows instead (cost 'codes')."
        )
    return _float32(rows, "latent d_in", f"Decoder rows of {name}")


def _float32(value: Any, axes: str, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # what does not fit is infinite, and named by its latent
        return as_array(value, axes, name, dtype=np.float32)


def _thresholds(dictionary: Any) -> Float[np.ndarray, " latent"] | None:
    """Threshold of each latent, if the rule has one that is not zero everywhere."""
    logarithm = getattr(dictionary, "log_threshold", None)
    if isinstance(logarithm, Tensor):
        return np.exp(_float32(logarithm, "latent", "log_threshold"))
    for holder in (dictionary, getattr(dictionary, "sparsity", None)):
        for name in ("threshold", "theta"):
            value = getattr(holder, name, None)
            if isinstance(value, Tensor | np.ndarray) and value.ndim == 1 and len(value) > 1:
                threshold = _float32(value, "latent", name)
                return threshold if threshold.any() else None
    return None


@torch.no_grad()
def mean_active(
    dictionary: Dictionary, x: Float[Tensor, "row d_in"]
) -> Float[np.ndarray, " latent"]:
    """Mean activation of each latent over the rows where it is active.

    A latent that is never active gets the median of the others.

    Raises:
        InputError: No latent is active on any row.
    """
    total = torch.zeros(dictionary.n_latents, dtype=torch.float64)
    count = torch.zeros(dictionary.n_latents, dtype=torch.float64)
    for part in x.split(BATCH):
        code = dictionary.encode(part)
        total += code.double().abs().sum(dim=0)
        count += (code != 0).double().sum(dim=0)
    alive = count > 0
    if not alive.any():
        raise InputError(f"No latent is active on any of the {len(x)} rows.")
    mean = total / count.clamp_min(1)
    return torch.where(alive, mean, mean[alive].median()).numpy()


@torch.no_grad()
def varying(
    dictionary: Dictionary, *rows: Float[Tensor, "_row d_in"]
) -> Bool[np.ndarray, " latent"]:
    """Mark the latents whose code is not the same on all rows.

    The others are never active, or constant.
    """
    lowest = torch.full((dictionary.n_latents,), torch.inf)
    highest = -lowest
    for part in (part for x in rows for part in x.split(BATCH)):
        code = dictionary.encode(part).float()
        lowest = torch.minimum(lowest, code.amin(dim=0))
        highest = torch.maximum(highest, code.amax(dim=0))
    return differs(lowest, highest).numpy()


def differs(
    lowest: Float[Tensor, " latent"], highest: Float[Tensor, " latent"]
) -> Bool[Tensor, " latent"]:
    """Compare the least and the largest code of each latent, beyond the rounding of float32."""
    return highest - lowest > CONSTANT * torch.maximum(highest.abs(), lowest.abs())


def vectors(
    folded: FoldedDictionary, other: FoldedDictionary, cost: Cost
) -> Float[np.ndarray, "latent width"]:
    """Select the vectors of `folded` that a cost compares with those of `other`.

    Args:
        folded: Dictionary whose vectors are returned.
        other: Dictionary that it is paired with, which the balanced cost weighs too.
        cost: One of the costs.

    Raises:
        InputError: The cost needs an encoder, and a side has none.
    """
    if cost in ("decoder", "codes"):
        return folded.decoder
    if cost == "cosine":
        return unit_rows(folded.decoder)
    sides = []
    for side in (folded, other):
        if side.encoder is None or side.bias is None:
            raise InputError(f"The cost {cost!r} needs dictionaries with an encoder.")
        sides.append([side.decoder, side.encoder, side.bias[:, None]])
    pieces = sides[0]
    if cost == "encoder":
        return np.array(pieces[1], dtype=np.float32, order="C")
    if cost == "balanced":
        lengths = [np.sqrt(sum(np.square(side[k]).sum() for side in sides)) for k in range(3)]
        pieces = [piece / max(length, 1e-30) for piece, length in zip(pieces, lengths, strict=True)]
    return np.ascontiguousarray(np.concatenate(pieces, axis=1), dtype=np.float32)


def part_widths(folded: FoldedDictionary, cost: Cost) -> tuple[int, ...]:
    """Entries of a compared vector from decoder, encoder and bias, if it has all three parts."""
    if cost not in ("all", "balanced") or folded.encoder is None:
        return ()
    return folded.decoder.shape[1], folded.encoder.shape[1], 1


def unit_rows(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Divide rows by their lengths, summed in float64; rows of zeros stay zero."""
    x = np.asarray(x, dtype=np.float32)
    length = np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float64))
    made = np.empty_like(x)  # no row exists in float64
    return np.divide(x, np.maximum(length, 1e-30)[:, None], out=made, casting="same_kind")
