"""Named arguments of the kernels: tensors for torch's backend, arrays for numba's.

Rows of a batch, latents and pairs of a row and a latent are counted from 0. Level l of a
Matryoshka dictionary is its reconstruction by the first `widths[l]` latents; others have one.
"""

from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor


class Codes(NamedTuple):
    """Codes of a batch, as pairs of a row and a latent, row by row."""

    starts: Int[Tensor, " batch_and_one"]
    """First pair of each row, and the number of pairs."""
    latents: Int[Tensor, " pairs"]
    """Latent of each pair; ascending within a row if there is more than one level."""
    values: Float[Tensor, " pairs"]
    raw: Float[Tensor, " pairs"]
    """Pre-activations; for `JumpReLU` some pairs are just below their threshold."""


class Grouped(NamedTuple):
    """Codes of a batch other than zero, latent by latent."""

    starts: Int[Tensor, " latents_and_one"]
    """First pair of each latent, and the number of pairs."""
    rows: Int[Tensor, " pairs"]
    values: Float[Tensor, " pairs"]
    order: Int[Tensor, " pairs"]
    """Number of each pair in the order row by row."""


class Reconstruction(NamedTuple):
    """Rows to reconstruct, and the decoder."""

    target: Float[Tensor, "batch d_out"]
    scales: Float[Tensor, " batch"]
    """Twice the weight of each row's squared error."""
    atoms: Float[Tensor, "latents d_out"]
    bias: Float[Tensor, " d_out"]
    widths: Int[Tensor, " levels"]
    """Latents of each level, ascending; the last is the number of latents."""


class ErrorGradients(NamedTuple):
    """Gradients of the weighted squared error, summed over levels."""

    rows: Float[Tensor, "levels batch d_out"]
    """Gradient of the part of a reconstruction that each level adds; empty if `atoms` is not."""
    atoms: Float[Tensor, "latents d_out"]
    """Gradient of the atoms, where they are computed by columns; else empty."""
    codes: Float[Tensor, " pairs"]
    bias: Float[Tensor, " d_out"]


class LatentGradients(NamedTuple):
    """Inputs of an update: what the latents fired on, and the gradients that reach them."""

    x: Float[Tensor, "batch d_in"]
    """Rows that the encoder read."""
    rows: Float[Tensor, "levels batch d_out"]
    atoms: Float[Tensor, "latents d_out"]
    codes: Float[Tensor, " pairs"]
    """Gradient of each code, latent by latent."""
    widths: Int[Tensor, " levels"]


class AddedGradients(NamedTuple):
    """Gradients of dead latents that are brought back."""

    place: Int[Tensor, " latents"]
    """Row of each latent in the other fields, or -1."""
    atoms: Float[Tensor, "dead d_out"]
    encoder: Float[Tensor, "dead d_in"]
    bias: Float[Tensor, " dead"]


class Learned(NamedTuple):
    """Parameter with its moments, latents first; changed in place."""

    value: Tensor
    first: Tensor
    second: Tensor


class Weights(NamedTuple):
    """Parameters that a latent has of its own."""

    atoms: Learned
    encoder: Learned
    """Encoder rows; of a tied dictionary the atoms."""
    bias: Learned


class Adam(NamedTuple):
    """Numbers of Adam at one step."""

    decay1: float
    weight1: float
    decay2: float
    weight2: float
    rate: float
    """Learning rate with the correction of the first moment."""
    correction: float
    """Inverse root of the correction of the second moment."""
    epsilon: float


class Update(NamedTuple):
    """Rule of an update, the same for all latents."""

    adam: Adam
    edges: Int[Tensor, " sites_and_one"]
    """Bounds of the sites in an atom, whose length is the sum of its lengths there."""
    clip: float
    """Factor of the gradients."""
    least: float
    """Smallest length that an atom is divided by."""
    tied: bool
    apply: bool
    """Whether parameters change; else gradients are only measured."""


class Scratch(NamedTuple):
    """Gradients of one latent."""

    atom: Float[Tensor, " d_out"]
    encoder: Float[Tensor, " d_in"]
    bias: Float[Tensor, " 1"]


class EncoderRows(NamedTuple):
    """Encoder, latents first."""

    rows: Float[Tensor, "latents d_in"]
    bias: Float[Tensor, " latents"]


class Bounds(NamedTuple):
    """Bounds of pre-activations from a product of half the precision; see `screening`."""

    bits: Int[Tensor, "batch latents"]
    """Bits of bfloat16 numbers."""
    lengths: Float[Tensor, "batch 2"]
    """Share of each row in the distance of the bounds."""
    reach: Float[Tensor, "latents 3"]
    """Share of each latent in the distance of the bounds."""


class PosedCodes(NamedTuple):
    """Codes of a pose-tied dictionary, k for each row."""

    latents: Int[Tensor, "batch k"]
    values: Float[Tensor, "batch k"]


class PosedReconstruction(NamedTuple):
    """Rows of blocks to reconstruct, and the atoms in the pose of the identity."""

    target: Float[Tensor, "batch element d_block"]
    scales: Float[Tensor, " batch"]
    """Twice the weight of each row's squared error."""
    atoms: Float[Tensor, "family element d_block"]
    bias: Float[Tensor, " d_block"]
    source: Int[Tensor, "element element"]
    """Block of an atom in pose h that block g of a row takes, at (g, h)."""


class PosedGradients(NamedTuple):
    """Gradients of the weighted squared error."""

    rows: Float[Tensor, "batch element d_block"]
    codes: Float[Tensor, "batch k"]
    bias: Float[Tensor, " d_block"]


class PosedPairs(NamedTuple):
    """Codes other than zero, family by family."""

    order: Int[Tensor, " pairs"]
    """Number of each pair in the order row by row, which the fields after `starts` have."""
    starts: Int[Tensor, " families_and_one"]
    rows: Int[Tensor, " all_pairs"]
    poses: Int[Tensor, " all_pairs"]
    values: Float[Tensor, " all_pairs"]
    gradients: Float[Tensor, " all_pairs"]


class PosedBatch(NamedTuple):
    """Blocks that the encoder read, and the gradients of the reconstruction."""

    x: Float[Tensor, "batch element d_block"]
    rows: Float[Tensor, "batch element d_block"]
    moved: Int[Tensor, "element element"]
    """Block of a row that block k of an atom in pose h belongs to, at (k, h)."""


STRUCTURES = [kind for kind in list(vars().values()) if hasattr(kind, "_fields")]
"""Named tuples that kernels take."""


def as_arrays(structure: Any) -> Any:
    """Convert the tensors of a named tuple to arrays that share their memory."""
    if isinstance(structure, Tensor):
        return structure.numpy()
    if isinstance(structure, tuple):
        return type(structure)(*map(as_arrays, structure))
    return structure
