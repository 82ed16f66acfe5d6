"""Derivatives of a section, by the cheapest of the ways that are exact.

vector_jacobian_products    gradients of output directions, one at a time
directional                 derivatives along changes of the source, several at once
form_jacobians              matrices between positions that do not touch
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mechatlas.analysis.interaction.layer_maps import LayerMap, ReLUForm, rows_of

MOST_GRADIENTS = 512
"""Outputs of which every gradient is taken; of more, random sums where that is allowed."""


def vector_jacobian_products(
    section: LayerMap,
    x: Tensor,
    inputs: Tensor,
    directions: Float[np.ndarray, "d k"],
    *,
    sources: int | None = None,
    seed: int = 0,
) -> Iterator[Float[Tensor, "n position d"]]:
    """Gradients of output directions with respect to the source.

    Args:
        section: The section.
        x: Activations of the source, in the shape the network gives them.
        inputs: The network's inputs for the same samples.
        directions: Each column is a direction of the target's channels.
        sources: By default one gradient for each direction and output position. If given, and
            there are more than `MOST_GRADIENTS` of these, so many random sums over them instead,
            with signs of +-1 and divided by the root of their number. Second moments G of a
            sample keep their expected value; the variance of entry (i, j) is
            (G_ii G_jj + G_ij^2 - 2 sum_o g_oi^2 g_oj^2) / sources, over all gradients g_o.
        seed: Of the random signs.

    Yields:
        One gradient at a time, ordered by direction and then by position, or by source.
    """
    start = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        out = rows_of(section.run(start, inputs))
    n, positions, _ = out.shape
    columns = torch.as_tensor(directions.T.copy(), dtype=out.dtype, device=out.device)
    generator = torch.Generator().manual_seed(seed)
    exact = sources is None or positions * len(columns) <= MOST_GRADIENTS
    times = positions * len(columns) if exact else sources
    assert times is not None
    for time in range(times):
        if exact:
            cotangent = torch.zeros_like(out)
            cotangent[:, time % positions] = columns[time // positions]
        else:
            signs = torch.randint(0, 2, (n, positions, len(columns)), generator=generator) * 2 - 1
            cotangent = signs.to(out) @ columns / times**0.5
        (gradient,) = torch.autograd.grad(out, start, cotangent, retain_graph=time < times - 1)
        yield rows_of(gradient)


def directional(
    section: LayerMap, x: Tensor, inputs: Tensor, tangents: Float[Tensor, "k ..."]
) -> Float[Tensor, "k n t o"]:
    """Derivatives of the target along changes of the source, at all output positions at once.

    Args:
        section: The section.
        x: Activations of the source, in the shape the network gives them.
        inputs: The network's inputs for the same samples.
        tangents: Changes of the source, each of the shape of `x`.
    """

    def run(values: Tensor) -> Tensor:
        return rows_of(section.run(values, inputs))

    def forward(tangent: Tensor) -> Tensor:
        return torch.func.jvp(run, (x,), (tangent,))[1]

    try:
        # Of the ways to compute attention only this one has a forward derivative.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            return torch.func.vmap(forward)(tangents)
    except (NotImplementedError, RuntimeError):  # an operation without a forward derivative
        return torch.stack([_twice(section, x, inputs, tangent) for tangent in tangents])


def _twice(section: LayerMap, x: Tensor, inputs: Tensor, tangent: Tensor) -> Tensor:
    """The gradient, by the cotangent, of the gradient along the tangent."""
    start = x.detach().clone().requires_grad_()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        out = section.run(start, inputs)
        cotangent = torch.zeros_like(out, requires_grad=True)
        (back,) = torch.autograd.grad(out, start, cotangent, create_graph=True)
        (along,) = torch.autograd.grad((back * tangent).sum(), cotangent)
    return rows_of(along)


def form_jacobians(
    form: ReLUForm, x: Tensor, left: Float[np.ndarray, "o k"], right: Float[np.ndarray, "j d"]
) -> Iterator[Float[Tensor, "n k j"]]:
    """Jacobians of each sample, one position at a time; it is zero between positions.

    Args:
        form: A linear map, with or without a ReLU and a second one.
        x: Activations of the source, in the shape the network gives them.
        left: Each column is a direction of the target that is read.
        right: Each row is what a unit of a source coordinate adds to the activations.
    """
    assert isinstance(form.inner, nn.Linear)
    rows = rows_of(x)
    a = torch.as_tensor(left, dtype=x.dtype, device=x.device)
    b = torch.as_tensor(right.T.copy(), dtype=x.dtype, device=x.device)
    inner = form.inner.weight.detach() @ b
    outer = a.T if form.out is None else a.T @ form.out.weight.detach()
    around = a.T @ b if form.skip else None
    for time in range(rows.shape[1]):
        if form.relu:
            with torch.no_grad():
                fires = (form.inner(rows[:, time]) > 0).to(x.dtype)
            whole = ((outer * fires[:, None, :]).flatten(0, 1) @ inner).unflatten(0, (-1, len(a.T)))
        else:
            whole = (outer @ inner).expand(len(rows), -1, -1)
        if around is not None:
            whole = whole + around
        yield whole
