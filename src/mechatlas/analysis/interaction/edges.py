"""How strongly each coordinate of a layer acts on each coordinate of the next.

E[i, j] = E_x sum_t (sum_s integral dF_it/df_js dalpha * f_js)^2: the mean square of what source
coordinate j adds to target coordinate i, by integrated gradients.

A piecewise linear section (ReLU, convolutions, max-pooling, whole inception modules) is
1-homogeneous once its biases are folded into a constant 1: along the straight path from zero its
gradient does not change, and gradient times coordinate is the exact integral. For all others the
path runs from the mean of the layer to the sample (what leaving a coordinate out goes back to),
and the integral is taken by Gauss-Legendre quadrature.

The inner sum is the derivative along what coordinate j contributes at all positions. So one
forward derivative for each source coordinate is enough, however many outputs and positions there
are; or one gradient for each output and position, where these are fewer. Matrices between
positions that do not touch are multiplied out instead.

Source: Bushnaq et al., The local interaction basis (2024), section 4.
"""

import dataclasses

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechatlas.analysis.interaction.bases import Basis
from mechatlas.analysis.interaction.derivatives import (
    directional,
    form_jacobians,
    vector_jacobian_products,
)
from mechatlas.analysis.interaction.layer_maps import LayerMap, like, rows_of
from mechatlas.analysis.interaction.statistics import Inputs
from mechatlas.base import Site

ENTRIES = 1 << 24
"""Numbers in a block of Jacobians: bounds the memory."""
AT_ONCE = 1 << 22
"""Numbers in the activations that are changed along several coordinates at once."""


@dataclasses.dataclass(frozen=True, eq=False)
class Edges:
    """Strength of every edge from one layer's coordinates to the next layer's."""

    strength: Float[np.ndarray, "k j"]
    """Row i, column j: from source coordinate j to target coordinate i."""
    standard_error: Float[np.ndarray, "k j"]
    """Over samples."""
    samples: int
    points: int
    """Quadrature points; 1 where one is exact."""

    def state(self) -> dict[str, np.ndarray]:
        """Arrays from which `from_state` makes the same edges."""
        return {
            "strength": self.strength,
            "standard_error": self.standard_error,
            "counts": np.array([self.samples, self.points]),
        }

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> "Edges":
        """The edges that `state` was called on."""
        samples, points = state["counts"].tolist()
        return cls(state["strength"], state["standard_error"], samples, points)

    def order(self) -> list[int]:
        """Edges as flat indices, strongest first; equals keep their order."""
        return np.argsort(-self.strength, axis=None, kind="stable").tolist()


def measure_edges(
    network: nn.Module,
    section: LayerMap,
    source: Basis,
    target: Basis,
    inputs: Inputs,
    *,
    points: int = 3,
) -> Edges:
    """Edges of a section, with standard errors over the samples.

    Args:
        network: The network.
        section: From the source's layer to the target's.
        source: Coordinates of the first layer.
        target: Coordinates of the second.
        inputs: Samples to average over.
        points: Quadrature points where the section is not piecewise linear.
    """
    nodes, weights = np.polynomial.legendre.leggauss(points)
    path = (
        [(1.0, 1.0)]
        if section.is_piecewise_linear
        else [((float(n) + 1) / 2, float(w) / 2) for n, w in zip(nodes, weights, strict=True)]
    )
    total = np.zeros((2, len(target), len(source)))
    there = inputs.first(1).read(network, [section.source, section.target])
    done, size = 0, _block_size(section, source, target, there)
    positions = rows_of(there[section.target]).shape[1]
    for batch in inputs.batches(size):
        x = batch.read(network, [section.source])[section.source]
        squares = _attributions(section, x, batch.tensor, source, target, path, positions)
        total[0] += squares.sum(0).double().numpy()
        total[1] += torch.einsum("nkj,nkj->kj", squares, squares).double().numpy()
        done += len(batch)
    mean = total[0] / done
    variance = (total[1] / done - mean**2).clip(min=0)
    return Edges(mean, np.sqrt(variance / max(done - 1, 1)), done, len(path))


def _attributions(
    section: LayerMap,
    x: Tensor,
    batch: Tensor,
    source: Basis,
    target: Basis,
    path: list[tuple[float, float]],
    positions: int,
) -> Float[Tensor, "n k j"]:
    """Squared attributions of each sample, summed over output positions."""
    coordinates = source.transform(rows_of(x))
    squares = x.new_zeros(len(x), len(target), len(source))
    form = section.form
    if form is not None and form.is_linear_map:
        blocks = form_jacobians(form, x, target.to_basis, source.from_basis)
        for position, jacobian in enumerate(blocks):
            squares.add_((jacobian * coordinates[:, position, None]).square_())
        return squares
    rows = rows_of(x)
    mean = rows.new_tensor(source.mean)
    points = [(x if a == 1.0 else like(mean + a * (rows - mean), x), weight) for a, weight in path]
    if positions * len(target) < len(source):
        return _backwards(section, batch, points, coordinates, source, target, positions)
    out_of, read = rows.new_tensor(source.from_basis), rows.new_tensor(target.to_basis)
    for some in torch.arange(len(source)).split(max(AT_ONCE // x.numel(), 1)):
        # One derivative, along what a coordinate contributes at all positions, gives all of
        # its attributions.
        changes = coordinates.movedim(-1, 0)[some, ..., None] * out_of[some, None, None]
        tangents = like(changes.flatten(0, 1), x).unflatten(0, (len(some), len(x)))
        along = sum(weight * directional(section, at, batch, tangents) for at, weight in points)
        assert isinstance(along, Tensor)
        squares[:, :, some] = (along @ read).square_().sum(dim=2).movedim(0, -1)
    return squares


def _backwards(
    section: LayerMap,
    batch: Tensor,
    points: list[tuple[Tensor, float]],
    coordinates: Float[Tensor, "n s j"],
    source: Basis,
    target: Basis,
    positions: int,
) -> Float[Tensor, "n k j"]:
    """One gradient for each target coordinate and position, times the coordinates."""
    across = coordinates.new_tensor(source.from_basis.T.copy())
    squares = coordinates.new_zeros(len(batch), len(target), len(source))
    every = [vector_jacobian_products(section, x, batch, target.to_basis) for x, _ in points]
    weights = [weight for _, weight in points]
    for number, found in enumerate(zip(*every, strict=True)):
        gradient = sum(w * g for w, g in zip(weights, found, strict=True))
        assert isinstance(gradient, Tensor)
        attribution = ((gradient @ across) * coordinates).sum(dim=1)
        squares[:, number // positions] += attribution.square_()
    return squares


def _block_size(section: LayerMap, source: Basis, target: Basis, there: dict[Site, Tensor]) -> int:
    form = section.form
    if form is not None and form.is_linear_map:
        numbers = max(form.weight.shape[0], len(source)) * len(target)
    else:
        numbers = max(len(source) * len(target), 16 * sum(x.numel() for x in there.values()))
    return int(np.clip(ENTRIES // numbers, 1, 4096))
