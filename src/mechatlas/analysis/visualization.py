"""Feature visualization by activation maximization: images that excite a feature most.

    visualize    a network, a site and directions of its channels -> one image for each

An image is a sum of waves (a Fourier spectrum scaled by 1 / frequency, so that all scales change
alike) with colors decorrelated as in photographs, put through a sigmoid. In each step it is
shifted, scaled and rotated a little, and Adam raises the pre-activation of the feature at the
center of the map. Where a ReLU is off and no gradient gets through, gradients that would open it
do. The only regularizers are the parametrization, the transformations and, if asked, a penalty on
total variation.

An image is a picture, not a claim: it shows one input that a feature responds to, and says nothing
of its other inputs.

Source: Olah et al., Feature visualization (2017), and its library Lucid, for the color matrix, the
transformations and the redirected ReLUs.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mechatlas.activations.layouts import layouts_of
from mechatlas.activations.sites import read_activations
from mechatlas.base import InputError, Site

COLORS = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))
"""Root of the covariance of red, green and blue in ImageNet (Lucid)."""

RELUS = {torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, functional.relu, functional.relu_}
"""Functions whose gradient is redirected."""

INITIAL_NOISE = 0.01
"""Standard deviation of the noise that an image starts from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisualizeConfig:
    """Settings of feature visualization."""

    steps: int = 192
    """Steps of Adam."""
    lr: float = 0.05
    """Learning rate of Adam."""
    shift: float = 0.08
    """Largest shift, as a share of the image's side."""
    rotation: float = 6.0
    """Largest rotation, in degrees."""
    zoom: float = 0.08
    """Largest relative change of scale."""
    smoothness: float = 0.0
    """Coefficient of the total variation of the image, relative to the initial pre-activation."""
    seed: int = 0
    """Seed of the initial image and of the transformations."""


class Visualizations(NamedTuple):
    """Images that excite features, one for each feature."""

    images: Float[np.ndarray, "feature side side 3"]
    """Images with values in 0..1."""
    pre_activations: Float[np.ndarray, " feature"]
    """Pre-activation of each feature on its image, without any transformation."""


def visualize(
    network: nn.Module,
    site: Site,
    directions: Float[Tensor, "feature d"],
    *,
    side: int,
    config: VisualizeConfig | None = None,
) -> Visualizations:
    """Maximize the pre-activation of each feature at the center of the site's map.

    Args:
        network: Network that takes RGB images in 0..1; its weights are not changed.
        site: Site of the features, such as `mixed4b` or one branch of it.
        directions: Encoder columns, one row a feature.
        side: Side of the images, in pixels.
        config: Steps, transformations and seed.

    Raises:
        InputError: The directions are not as wide as the site, or the site is not a map.
    """
    config = config or VisualizeConfig()
    trainable = [(p, p.requires_grad) for p in network.parameters()]
    try:
        for parameter, _ in trainable:
            parameter.requires_grad_(False)
        return _maximize(network, site, directions, side, config)
    finally:
        for parameter, before in trainable:
            parameter.requires_grad_(before)


def _maximize(
    network: nn.Module,
    site: Site,
    directions: Float[Tensor, "feature d"],
    side: int,
    config: VisualizeConfig,
) -> Visualizations:
    random = torch.Generator().manual_seed(config.seed)
    # The same faint noise for all, so that an image does not depend on which others are made.
    noise = INITIAL_NOISE * torch.randn(2, 3, side, side // 2 + 1, generator=random)
    spectrum = noise.repeat(len(directions), 1, 1, 1, 1).requires_grad_()
    initial = center_pre_activations(network, site, paint(spectrum, side), directions).detach()
    unit = initial.abs().clamp_min(1e-3)
    adam = torch.optim.Adam([spectrum], lr=config.lr)
    for _ in range(config.steps):
        with torch.enable_grad(), RedirectedReLU():
            images = paint(spectrum, side)
            transformed = _transform(images, config, random)
            pre_activations = center_pre_activations(network, site, transformed, directions)
            loss = -(pre_activations / unit).sum()
            if config.smoothness:
                rough = images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()
                loss = loss + config.smoothness * rough * len(directions)
            adam.zero_grad()
            loss.backward()
        adam.step()
    with torch.no_grad():
        images = paint(spectrum, side)
        final = center_pre_activations(network, site, images, directions)
    return Visualizations(images.movedim(1, -1).numpy(), final.numpy())


class RedirectedReLU(TorchFunctionMode):
    """Mode in which ReLUs that are off pass gradients that would open them, if none else passes.

    A unit that is off has no gradient to follow; in this mode it has, for each image by itself.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Replace ReLUs."""
        del types
        return _Rectifier.apply(args[0]) if func in RELUS else func(*args, **(kwargs or {}))


class _Rectifier(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        (x,), (slope,) = ctx.saved_tensors, slopes
        plain = torch.where(x > 0, slope, 0.0)
        opening = torch.where((x <= 0) & (slope > 0), 0.0, slope)  # losses fall against the slope
        through = plain.flatten(1).any(dim=1).view(-1, *[1] * (x.ndim - 1))
        return torch.where(through, plain, opening)


def paint(spectrum: Float[Tensor, "n 2 3 side half"], side: int) -> Float[Tensor, "n 3 side side"]:
    """Turn spectra into images."""
    y = torch.fft.fftfreq(side)[:, None]
    x = torch.fft.rfftfreq(side)
    scale = 1 / (x.square() + y.square()).sqrt().clamp_min(1 / side)
    waves = torch.complex(spectrum[:, 0], spectrum[:, 1]) * scale
    plain = torch.fft.irfft2(waves, s=(side, side), norm="ortho") / 4
    colors = torch.tensor(COLORS)
    colors = colors / colors.norm(dim=0).max()
    return torch.einsum("ab,nbyx->nayx", colors, plain).sigmoid()


def center_pre_activations(
    network: nn.Module,
    site: Site,
    images: Float[Tensor, "n 3 side side"],
    directions: Float[Tensor, "n d"],
) -> Float[Tensor, " n"]:
    """Compute the pre-activation of each image's own direction at the center of the map.

    Args:
        network: The network.
        site: Site of the directions.
        images: One image for each direction.
        directions: Encoder columns, one row a feature.

    Raises:
        InputError: The site is not a map, or not as wide as the directions.
    """
    activations = read_activations(network, images, [site])[site]
    layout = layouts_of(network, images, [site])[site]
    if len(layout.positions) != 2 or layout.width(activations) != directions.shape[1]:
        raise InputError(
            f"Site {site} has activations of shape {tuple(activations.shape[1:])}; images need "
            f"a map of {directions.shape[1]} channels, as wide as the directions."
        )
    rows = layout.rows(activations)
    center = rows[:, rows.shape[1] // 2, rows.shape[2] // 2]
    return (center * directions).sum(dim=1)


def _transform(
    images: Float[Tensor, "n 3 side side"], config: VisualizeConfig, random: torch.Generator
) -> Float[Tensor, "n 3 side side"]:
    """Rotate, scale and shift all images alike; beyond their edges they are mirrored."""
    draw = 2 * torch.rand(4, generator=random) - 1
    angle = float(draw[0]) * config.rotation * np.pi / 180
    size = 1 + float(draw[1]) * config.zoom
    cos, sin = np.cos(angle) * size, np.sin(angle) * size
    dx, dy = (2 * config.shift * float(v) for v in draw[2:])
    affine = torch.tensor([[cos, -sin, dx], [sin, cos, dy]], dtype=images.dtype)
    grid = functional.affine_grid(
        affine.expand(len(images), 2, 3), list(images.shape), align_corners=False
    )
    return functional.grid_sample(
        images, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
