"""Coordinates for the activations of a layer, all with one interface.

    neuron_basis        the units of the layer
    pca_basis           principal components: eigenvectors of the covariance
    interaction_basis   local or global interaction basis: covariance diagonal, gradients white
    rotated_basis       a basis after a random rotation, as a control
    dictionary_basis    latents of a dictionary: more coordinates than channels, most of them zero

Every coordinate is zero at the mean of the layer, so that ablating a coordinate sets it to its
mean. With a constant 1 appended to the activations, as in the papers, the mean is the constant
coordinate, which is always kept.

Source: Bushnaq et al., The local interaction basis (2024), section 3.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechatlas.base import Dictionary, InputError
from mechatlas.maths.linalg import RELATIVE, Moments, spectral

BasisKind = Literal["neurons", "pca", "lib", "gib"]
BASIS_KINDS: tuple[BasisKind, ...] = ("neurons", "pca", "lib", "gib")
"""Units of the layer, principal components, local and global interaction basis."""


@dataclasses.dataclass(frozen=True, eq=False)
class Basis:
    """Coordinates of one layer: `(activations - mean) @ to_basis`."""

    kind: str
    """Kind of basis: one of `BASIS_KINDS`, "dictionary", or a kind with ", rotated"."""
    mean: Float[np.ndarray, " d"]
    """Mean of the activations."""
    to_basis: Float[np.ndarray, "d k"]
    """Matrix from activations to coordinates."""
    from_basis: Float[np.ndarray, "k d"]
    """Pseudo-inverse of `to_basis`."""
    importance: Float[np.ndarray, " k"]
    """Variance of each coordinate; coordinates are kept in falling order of it."""
    encode: Callable[[Tensor], Tensor] | None = None
    """Map from rows of activations to coordinates, where it is not linear."""

    def __len__(self) -> int:
        """Number of coordinates."""
        return len(self.importance)

    def transform(self, activations: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch k"]:
        """Convert activations to coordinates."""
        if self.encode is not None:
            return self.encode(activations.flatten(0, -2)).unflatten(0, activations.shape[:-1])
        centered = activations - activations.new_tensor(self.mean)
        return centered @ activations.new_tensor(self.to_basis)

    def inverse(self, coordinates: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch d"]:
        """Convert coordinates to activations."""
        mean = coordinates.new_tensor(self.mean)
        return coordinates @ coordinates.new_tensor(self.from_basis) + mean


def neuron_basis(moments: Moments) -> Basis:
    """Return the units of a layer as its coordinates."""
    identity = np.eye(moments.width)
    return Basis("neurons", moments.mean, identity, identity, np.diag(moments.covariance))


def pca_basis(moments: Moments, *, rank_threshold: float = RELATIVE) -> Basis:
    """Return the principal components with variance above `rank_threshold` of the largest."""
    values, vectors = spectral(moments.covariance)
    keep = _above(values, rank_threshold)
    vectors = vectors[:, keep]
    return Basis("pca", moments.mean, vectors, vectors.T.copy(), values[keep])


def interaction_basis(
    moments: Moments,
    gradient_moments: Float[np.ndarray, "d d"],
    *,
    kind: Literal["lib", "gib"] = "lib",
    rank_threshold: float = RELATIVE,
) -> Basis:
    """Return the interaction basis, in which the covariance is diagonal and gradients are white.

    Args:
        moments: Mean and covariance of the layer.
        gradient_moments: Second moments E[J^T A J] of the gradients of the next layer's
            coordinates (local) or of the outputs (global).
        kind: Local or global.
        rank_threshold: Share of the largest eigenvalue below which directions of activations, and
            then of interaction, are left out.
    """
    variance, vectors = spectral(moments.covariance)
    keep = _above(variance, rank_threshold)
    root = np.sqrt(variance[keep])
    whitening_inverse = root[:, None] * vectors[:, keep].T
    whitening = vectors[:, keep] / root
    strength, rotation = spectral(whitening_inverse @ gradient_moments @ whitening_inverse.T)
    keep = _above(strength, rank_threshold)
    strength, rotation = strength[keep], rotation[:, keep]
    to_basis = whitening @ rotation * np.sqrt(strength)
    from_basis = (rotation.T @ whitening_inverse) / np.sqrt(strength)[:, None]
    return Basis(kind, moments.mean, to_basis, from_basis, strength)


def coordinate_agreement(moments: Moments, basis: Basis, other: Basis) -> Float[np.ndarray, " k"]:
    """Largest correlation, over the data, of each coordinate with one of another basis.

    Coordinates of equal importance are only determined together: their correlations are low.

    Args:
        moments: Mean and covariance of the layer.
        basis: Coordinates.
        other: Other coordinates of the same layer.
    """
    if not len(basis) or not len(other):
        return np.zeros(len(basis))
    scaled = []
    for each in (basis, other):
        spread = np.sqrt(np.einsum("dk,de,ek->k", each.to_basis, moments.covariance, each.to_basis))
        scaled.append(each.to_basis / np.where(spread > 0, spread, 1))
    return np.abs(scaled[0].T @ moments.covariance @ scaled[1]).max(axis=1)


def rotated_basis(basis: Basis, *, seed: int) -> Basis:
    """Return the coordinates of a basis after a random rotation."""
    random = np.random.default_rng(seed)
    rotation, triangle = np.linalg.qr(random.normal(size=(len(basis), len(basis))))
    rotation = rotation * np.sign(np.diag(triangle))
    return Basis(
        f"{basis.kind}, rotated",
        basis.mean,
        basis.to_basis @ rotation,
        rotation.T @ basis.from_basis,
        np.square(rotation).T @ basis.importance,
    )


def dictionary_basis(dictionary: Dictionary, rows: Float[Tensor, "n d"]) -> Basis:
    """Return the latents of a dictionary as coordinates, each less its mean.

    `from_basis` has the decoder rows and `to_basis` their pseudo-inverse, but coordinates are
    codes. What the dictionary does not reconstruct is missing, whatever is kept.

    Args:
        dictionary: A dictionary with an affine decoder.
        rows: Activations for the means and variances of the latents.

    Raises:
        InputError: The dictionary reads another width, or its decoder is not affine.
    """
    if dictionary.d_in != rows.shape[1]:
        raise InputError(
            f"The dictionary reads {dictionary.d_in} channels, the layer has {rows.shape[1]}."
        )
    with torch.no_grad():
        codes = dictionary.encode(rows.float())
        mean = codes.mean(dim=0)
        offset = dictionary.decode(torch.zeros(1, dictionary.n_latents))
        atoms = dictionary.decode(torch.eye(dictionary.n_latents)) - offset
        affine = codes[:8] @ atoms + offset
        if not torch.allclose(dictionary.decode(codes[:8]), affine, rtol=1e-3, atol=1e-4):
            raise InputError("The dictionary's decoder is not affine: its latents are no basis.")
        mean_reconstruction = (mean @ atoms + offset[0]).double().numpy()
        importance = codes.var(dim=0) * atoms.square().sum(dim=1)

    def encode(activations: Tensor) -> Tensor:
        with torch.no_grad():
            return (dictionary.encode(activations.float()) - mean).to(activations.dtype)

    from_basis = atoms.double().numpy()
    to_basis = np.linalg.pinv(from_basis)
    return Basis(
        "dictionary", mean_reconstruction, to_basis, from_basis, importance.double().numpy(), encode
    )


def _above(falling: Float[np.ndarray, " d"], threshold: float) -> Bool[np.ndarray, " d"]:
    """Mark the eigenvalues above a share of the largest."""
    return falling > threshold * falling[0] if len(falling) and falling[0] > 0 else falling > 0
