"""Derivatives of a layer map, by the cheapest exact way.

differentiable             says in a sentence that a network cannot be differentiated
vector_jacobian_products   gradients of output directions, one at a time
directional_derivatives    derivatives along changes of the source, several at once
form_jacobians             Jacobians of maps in which positions do not mix
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mechatlas.analysis.interaction.layer_maps import LayerMap, ReLUForm, rows_of
from mechatlas.base import SiteError

MAX_GRADIENTS = 512
"""Maximum number of output directions (times positions) that are not replaced by random sums."""


@contextmanager
def differentiable() -> Iterator[None]:
    """Say in a sentence that a network writes over what its gradients need.

    Raises:
        SiteError: It does.
        RuntimeError: Torch failed for another reason.
    """
    try:
        yield
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise SiteError(
            "The network writes in place over activations that its gradients need, so that torch "
            "cannot differentiate it. Compute `x = x + y` there in place of `x += y`."
        ) from error


def vector_jacobian_products(
    layer_map: LayerMap,
    x: Shaped[Tensor, "sample ..."],
    inputs: Shaped[Tensor, "batch ..."],
    directions: Float[np.ndarray, "d k"],
    *,
    gradient_probes: int | None = None,
    seed: int = 0,
) -> Iterator[Float[Tensor, "n position d"]]:
    """Yield gradients of output directions with respect to the source.

    Args:
        layer_map: Map to differentiate.
        x: Arranged activations of the source.
        inputs: Inputs of the network for the same samples.
        directions: Directions of the target's channels, as columns.
        gradient_probes: Number of random sums with signs of +-1 that replace the gradients if
            there are more than `MAX_GRADIENTS`, each divided by the root of their number. Second
            moments G of a sample keep their expected value; the variance of entry (i, j) is
            (G_ii G_jj + G_ij^2 - 2 sum_o g_oi^2 g_oj^2) / gradient_probes, over all gradients
            g_o. By default one gradient for each direction and output position.
        seed: Seed of the random signs.

    Yields:
        One gradient at a time, ordered by direction and then by position, or by probe.
    """
    start = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        out = rows_of(layer_map.run(start, inputs))
    n, n_positions, _ = out.shape
    rows = torch.as_tensor(directions.T.copy(), dtype=out.dtype, device=out.device)
    generator = torch.Generator().manual_seed(seed)
    n_exact = n_positions * len(rows)
    exact = gradient_probes is None or n_exact <= MAX_GRADIENTS
    n_gradients = n_exact if exact else gradient_probes
    assert n_gradients is not None
    for number in range(n_gradients):
        if exact:
            cotangent = torch.zeros_like(out)
            cotangent[:, number % n_positions] = rows[number // n_positions]
        else:
            signs = torch.randint(0, 2, (n, n_positions, len(rows)), generator=generator) * 2 - 1
            cotangent = signs.to(out) @ rows / n_gradients**0.5
        last = number == n_gradients - 1
        (gradient,) = torch.autograd.grad(out, start, cotangent, retain_graph=not last)
        yield rows_of(gradient)


def directional_derivatives(
    layer_map: LayerMap,
    x: Shaped[Tensor, "sample ..."],
    inputs: Shaped[Tensor, "batch ..."],
    tangents: Float[Tensor, "k ..."],
) -> Float[Tensor, "k n t o"]:
    """Derivatives of the target along changes of the source, at all output positions at once.

    Args:
        layer_map: Map to differentiate.
        x: Arranged activations of the source.
        inputs: Inputs of the network for the same samples.
        tangents: Changes of the source, each of the shape of `x`.
    """

    def run(values: Tensor) -> Tensor:
        return rows_of(layer_map.run(values, inputs))

    def forward(tangent: Tensor) -> Tensor:
        return torch.func.jvp(run, (x,), (tangent,))[1]

    try:
        # Of the ways to compute attention only this one has a forward derivative.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            return torch.func.vmap(forward)(tangents)
    except (NotImplementedError, RuntimeError):  # an operation without a forward derivative
        return torch.stack([_double_backward(layer_map, x, inputs, t) for t in tangents])


def _double_backward(layer_map: LayerMap, x: Tensor, inputs: Tensor, tangent: Tensor) -> Tensor:
    """Forward derivative as the gradient, by the cotangent, of a gradient along the tangent."""
    start = x.detach().clone().requires_grad_()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        out = layer_map.run(start, inputs)
        cotangent = torch.zeros_like(out, requires_grad=True)
        (gradient,) = torch.autograd.grad(out, start, cotangent, create_graph=True)
        (derivative,) = torch.autograd.grad((gradient * tangent).sum(), cotangent)
    return rows_of(derivative)


def form_jacobians(
    form: ReLUForm,
    x: Shaped[Tensor, "sample ..."],
    left: Float[np.ndarray, "o k"],
    right: Float[np.ndarray, "j d"],
) -> Iterator[Float[Tensor, "n k j"]]:
    """Yield the Jacobians of each sample, one position at a time; positions do not mix.

    Args:
        form: A linear map, with or without a ReLU and a second linear map.
        x: Arranged activations of the source.
        left: Directions of the target that are read, as columns.
        right: Directions of the source, one for each of its coordinates, as rows.
    """
    assert isinstance(form.inner, nn.Linear)
    rows = rows_of(x)
    a = torch.as_tensor(left, dtype=x.dtype, device=x.device)
    b = torch.as_tensor(right.T.copy(), dtype=x.dtype, device=x.device)
    inner = form.inner.weight.detach() @ b
    outer = a.T if form.out is None else a.T @ form.out.weight.detach()
    skip = a.T @ b if form.skip else None
    for position in range(rows.shape[1]):
        if form.relu:
            with torch.no_grad():
                fires = (form.inner(rows[:, position]) > 0).to(x.dtype)
            gated = (outer * fires[:, None, :]).flatten(0, 1)
            jacobian = (gated @ inner).unflatten(0, (-1, len(a.T)))
        else:
            jacobian = (outer @ inner).expand(len(rows), -1, -1)
        yield jacobian if skip is None else jacobian + skip
