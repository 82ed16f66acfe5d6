"""Strength of the interaction of each coordinate of a layer with each coordinate of the next.

E[i, j] = E_x sum_t (sum_s integral dF_it/df_js dalpha * f_js)^2: the mean square of what source
coordinate j adds to target coordinate i, by integrated gradients.

A piecewise linear map (ReLU, convolutions, max-pooling, whole inception modules) is
1-homogeneous once its biases are folded into a constant 1: along the straight path from zero its
gradient does not change, and gradient times coordinate is the exact integral. For all others the
path runs from the mean of the layer to the sample (the value of an ablated coordinate), and the
integral is taken by Gauss-Legendre quadrature.

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
    directional_derivatives,
    form_jacobians,
    vector_jacobian_products,
)
from mechatlas.analysis.interaction.layer_maps import LayerMap, like, rows_of
from mechatlas.analysis.interaction.statistics import Inputs

MAX_JACOBIAN_ENTRIES = 1 << 24
"""Maximum number of entries in a block of Jacobians; bounds the memory."""
MAX_TANGENT_ENTRIES = 1 << 22
"""Maximum number of entries in the tangents of one batched forward derivative."""


@dataclasses.dataclass(frozen=True, eq=False)
class InteractionEdges:
    """Strength of every edge from the coordinates of one layer to those of the next."""

    strength: Float[np.ndarray, "k j"]
    """Strength of the edge from source coordinate j (column) to target coordinate k (row)."""
    standard_error: Float[np.ndarray, "k j"]
    """Standard error of the strength, over samples."""
    n_samples: int
    quadrature_points: int
    """Number of quadrature points; 1 where one is exact."""


def measure_edges(
    network: nn.Module,
    layer_map: LayerMap,
    source: Basis,
    target: Basis,
    inputs: Inputs,
    *,
    quadrature_points: int = 3,
) -> InteractionEdges:
    """Measure the edges of a layer map, with standard errors over the samples.

    Args:
        network: Network that the layers belong to.
        layer_map: Map from the layer of the source to the layer of the target.
        source: Coordinates of the first layer.
        target: Coordinates of the second layer.
        inputs: Samples to average over.
        quadrature_points: Number of points where the map is not piecewise linear.
    """
    nodes, weights = np.polynomial.legendre.leggauss(quadrature_points)
    path = (
        [(1.0, 1.0)]
        if layer_map.is_piecewise_linear
        else [((float(n) + 1) / 2, float(w) / 2) for n, w in zip(nodes, weights, strict=True)]
    )
    total = np.zeros((2, len(target), len(source)))
    layers = [layer_map.source, layer_map.target]
    first = list(inputs[:1].read(network, layers).values())
    n_positions = rows_of(first[-1]).shape[1]
    n_samples = 0
    size = _batch_size(layer_map, source, target, sum(x.numel() for x in first))
    for batch in inputs.batches(size):
        x = batch.read(network, layers[:1])[layer_map.source]
        squares = _squared_attributions(
            layer_map, x, batch.tensor, source, target, path, n_positions
        )
        total[0] += squares.sum(0).double().cpu().numpy()
        total[1] += torch.einsum("nkj,nkj->kj", squares, squares).double().cpu().numpy()
        n_samples += len(batch)
    mean = total[0] / n_samples
    variance = (total[1] / n_samples - mean**2).clip(min=0)
    error = np.sqrt(variance / max(n_samples - 1, 1))
    return InteractionEdges(mean, error, n_samples, len(path))


def _squared_attributions(
    layer_map: LayerMap,
    x: Tensor,
    inputs: Tensor,
    source: Basis,
    target: Basis,
    path: list[tuple[float, float]],
    n_positions: int,
) -> Float[Tensor, "n k j"]:
    """Squared attributions of each sample, summed over output positions."""
    coordinates = source.transform(rows_of(x))
    squares = x.new_zeros(len(x), len(target), len(source))
    form = layer_map.form
    if form is not None and form.is_linear_map:
        blocks = form_jacobians(form, x, target.to_basis, source.from_basis)
        for position, jacobian in enumerate(blocks):
            squares.add_((jacobian * coordinates[:, position, None]).square_())
        return squares
    rows = rows_of(x)
    mean = rows.new_tensor(source.mean)
    points = [(x if a == 1.0 else like(mean + a * (rows - mean), x), weight) for a, weight in path]
    from_basis, to_basis = rows.new_tensor(source.from_basis), rows.new_tensor(target.to_basis)
    if n_positions * len(target) < len(source):
        # One gradient for each target coordinate and position, times the coordinates.
        backward = [
            vector_jacobian_products(layer_map, at, inputs, target.to_basis) for at, _ in points
        ]
        for number, gradients in enumerate(zip(*backward, strict=True)):
            weighted = (w * g for g, (_, w) in zip(gradients, points, strict=True))
            gradient = sum(weighted, start=rows.new_zeros(()))
            attribution = ((gradient @ from_basis.T) * coordinates).sum(dim=1)
            squares[:, number // n_positions] += attribution.square_()
        return squares
    for chosen in torch.arange(len(source)).split(max(MAX_TANGENT_ENTRIES // x.numel(), 1)):
        # One derivative, along what a coordinate contributes at all positions, gives all of
        # its attributions.
        changes = coordinates.movedim(-1, 0)[chosen, ..., None] * from_basis[chosen, None, None]
        tangents = like(changes.flatten(0, 1), x).unflatten(0, (len(chosen), len(x)))
        weighted = (
            w * directional_derivatives(layer_map, at, inputs, tangents) for at, w in points
        )
        derivative = sum(weighted, start=rows.new_zeros(()))
        squares[:, :, chosen] = (derivative @ to_basis).square_().sum(dim=2).movedim(0, -1)
    return squares


def _batch_size(layer_map: LayerMap, source: Basis, target: Basis, n_activations: int) -> int:
    """Number of samples whose Jacobians fit into `MAX_JACOBIAN_ENTRIES`."""
    form = layer_map.form
    if form is not None and form.is_linear_map:
        entries = max(form.weight.shape[0], len(source)) * len(target)
    else:
        entries = max(len(source) * len(target), 16 * n_activations)
    return int(np.clip(MAX_JACOBIAN_ENTRIES // entries, 1, 4096))
