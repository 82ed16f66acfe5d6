"""Coordinates for the activations of a layer: neurons, principal components, interaction.

    neurons       the layer's own units
    components    eigenvectors of the covariance (PCA)
    interaction   directions that do not interact: activations and gradients diagonal at once
    rotated       a basis turned at random: what any number must be compared with
    coded         the latents of a dictionary: more coordinates than channels, most of them zero

All have one interface, `Basis`, and every coordinate is zero at the mean of the layer, so that
to leave one out is to set it to its mean. With a constant 1 appended to the activations, as in
the papers, the mean is the constant coordinate, which is always kept.

Source: Bushnaq et al., The local interaction basis (2024), section 3.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechatlas.base import Dictionary, InputError
from mechatlas.maths.linalg import RELATIVE, Moments, spectral

Kind = Literal["neurons", "pca", "lib", "gib"]
KINDS: tuple[Kind, ...] = ("neurons", "pca", "lib", "gib")
"""The layer's units, principal components, local and global interaction basis."""


@dataclasses.dataclass(frozen=True, eq=False)
class Basis:
    """Coordinates of one layer: `(a - mean) @ to_basis`."""

    kind: str
    mean: Float[np.ndarray, " d"]
    to_basis: Float[np.ndarray, "d k"]
    from_basis: Float[np.ndarray, "k d"]
    """Pseudo-inverse of `to_basis`: what is not in it the basis leaves out."""
    importance: Float[np.ndarray, " k"]
    """Falling; the order in which vectors are kept. Variance of the coordinate."""
    encode: Callable[[Tensor], Tensor] | None = None
    """Rows of activations to coordinates, where these are no linear map of them."""

    def __len__(self) -> int:
        """Number of coordinates."""
        return len(self.importance)

    def transform(self, activations: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch k"]:
        """Coordinates of activations."""
        if self.encode is not None:
            return self.encode(activations.flatten(0, -2)).unflatten(0, activations.shape[:-1])
        return (activations - activations.new_tensor(self.mean)) @ activations.new_tensor(
            self.to_basis
        )

    def inverse(self, coordinates: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch d"]:
        """Activations of coordinates."""
        return coordinates @ coordinates.new_tensor(self.from_basis) + coordinates.new_tensor(
            self.mean
        )


def neurons(moments: Moments) -> Basis:
    """The layer's own units, largest variance first in importance but in their own order."""
    variance = np.diag(moments.covariance)
    d = moments.width
    return Basis("neurons", moments.mean, np.eye(d), np.eye(d), variance)


def components(moments: Moments, *, relative: float = RELATIVE) -> Basis:
    """Principal components with a variance above `relative` of the largest."""
    values, vectors = spectral(moments.covariance)
    keep = _kept(values, relative)
    vectors = vectors[:, keep]
    return Basis("pca", moments.mean, vectors, vectors.T.copy(), values[keep])


def interaction(
    moments: Moments,
    pulled: Float[np.ndarray, "d d"],
    *,
    kind: Literal["lib", "gib"] = "lib",
    relative: float = RELATIVE,
) -> Basis:
    """The interaction basis: covariance diagonal, gradients white.

    Args:
        moments: Of the layer.
        pulled: E[J^T A J]: second moments of gradients of the next layer's coordinates (local),
            or of the outputs (global).
        kind: What `pulled` is.
        relative: Directions of activations, and then of interaction, below this share of the
            largest are left out.
    """
    variance, vectors = spectral(moments.covariance)
    keep = _kept(variance, relative)
    root = np.sqrt(variance[keep])
    white_inverse = root[:, None] * vectors[:, keep].T
    white = vectors[:, keep] / root
    strength, turn = spectral(white_inverse @ pulled @ white_inverse.T)
    keep = _kept(strength, relative)
    strength, turn = strength[keep], turn[:, keep]
    to_basis = white @ turn * np.sqrt(strength)
    from_basis = (turn.T @ white_inverse) / np.sqrt(strength)[:, None]
    return Basis(kind, moments.mean, to_basis, from_basis, strength)


def rotated(basis: Basis, *, seed: int) -> Basis:
    """The same coordinates after a random rotation."""
    random = np.random.default_rng(seed)
    turn, triangle = np.linalg.qr(random.normal(size=(len(basis), len(basis))))
    turn = turn * np.sign(np.diag(triangle))
    importance = np.square(turn).T @ basis.importance
    return Basis(
        f"{basis.kind}, rotated",
        basis.mean,
        basis.to_basis @ turn,
        turn.T @ basis.from_basis,
        importance,
    )


def coded(dictionary: Dictionary, rows: Float[Tensor, "n d"]) -> Basis:
    """The latents of a dictionary, each less its mean, so that zero leaves it out.

    `from_basis` are its decoder rows and `to_basis` their pseudo-inverse, but coordinates are
    its codes; what it does not reconstruct is missing, whatever is kept.

    Args:
        dictionary: Its decoder must be affine.
        rows: To take the means and variances from.

    Raises:
        InputError: It reads another width, or its decoder is not affine.
    """
    if dictionary.d_in != rows.shape[1]:
        raise InputError(
            f"The dictionary reads {dictionary.d_in} channels, the layer has {rows.shape[1]}."
        )
    with torch.no_grad():
        codes = dictionary.encode(rows.float())
        mean = codes.mean(dim=0)
        zero = dictionary.decode(torch.zeros(1, dictionary.n_latents))
        atoms = dictionary.decode(torch.eye(dictionary.n_latents)) - zero
        straight = codes[:8] @ atoms + zero
        if not torch.allclose(dictionary.decode(codes[:8]), straight, rtol=1e-3, atol=1e-4):
            raise InputError("The dictionary's decoder is not affine: its latents are no basis.")
        start = (mean @ atoms + zero[0]).double().numpy()
        importance = codes.var(dim=0) * atoms.square().sum(dim=1)

    def encode(given: Tensor) -> Tensor:
        with torch.no_grad():
            return (dictionary.encode(given.float()) - mean).to(given.dtype)

    from_basis = atoms.double().numpy()
    return Basis(
        "dictionary",
        start,
        np.linalg.pinv(from_basis),
        from_basis,
        importance.double().numpy(),
        encode,
    )


def _kept(falling: np.ndarray, relative: float) -> np.ndarray:
    return falling > relative * falling[0] if len(falling) and falling[0] > 0 else falling > 0
