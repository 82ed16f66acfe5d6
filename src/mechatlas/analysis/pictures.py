"""Pictures that a feature answers to most strongly, made from noise.

    optimise    a network, a site and directions of its channels -> one picture for each

The picture is a sum of waves (a Fourier spectrum scaled by 1 / frequency, so that all scales move
alike) with colours decorrelated as in photographs, put through a sigmoid. Each step it is
shifted, scaled and turned a little, and Adam climbs the drive of the feature at the position in
the middle of the map. Where a rectifier is shut and nothing gets through, slopes that would open it
do. Nothing else is added: the regulariser is the parametrisation, the
transformations and, if asked, a penalty on total variation.

A picture is a picture, not a claim: it shows one thing that a feature answers to, and says
nothing of what else does.

Source: Olah et al., Feature visualization (2017), and its library Lucid, whose colour matrix,
transformations and redirected rectifiers these are.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mechatlas.activations.sites import channels_last, read
from mechatlas.base import InputError, Site

COLOURS = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))
"""Root of the covariance of red, green and blue in ImageNet (Lucid)."""

RECTIFIERS = {torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, functional.relu, functional.relu_}

FAINT = 0.01
"""Size of the noise that a picture starts from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisualizeConfig:
    """How pictures are made."""

    steps: int = 192
    """Steps of Adam."""
    lr: float = 0.05
    """Its learning rate."""
    shift: float = 0.08
    """Largest shift, as a share of the picture's side."""
    turn: float = 6.0
    """Largest turn, in degrees."""
    zoom: float = 0.08
    """Largest change of scale, as a share."""
    smoothness: float = 0.0
    """Weight of the total variation of the picture, against the drive in units of its start."""
    seed: int = 0
    """Seed of the first picture and of the transformations."""


def optimise(
    network: nn.Module,
    site: Site,
    directions: Float[Tensor, "feature d"],
    *,
    side: int,
    how: VisualizeConfig | None = None,
) -> tuple[Float[np.ndarray, "feature side side 3"], Float[np.ndarray, " feature"]]:
    """Climb the drive of each direction at the middle of the site's map.

    Args:
        network: Takes RGB images in 0..1; its weights are not changed.
        site: Where the directions live, such as `mixed4b` or one branch of it.
        directions: Encoder columns, one row a feature.
        side: Side of the pictures, in pixels.
        how: Steps, transformations and seed.

    Returns:
        The pictures, in 0..1, and their drives without any transformation.

    Raises:
        InputError: The directions are not as wide as the site, or the site is not a map.
    """
    how = how or VisualizeConfig()
    random = torch.Generator().manual_seed(how.seed)
    frozen = [(p, p.requires_grad) for p in network.parameters()]
    try:
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        return _climb(network, site, directions, side, how, random)
    finally:
        for parameter, before in frozen:
            parameter.requires_grad_(before)


def _climb(
    network: nn.Module,
    site: Site,
    directions: Tensor,
    side: int,
    how: VisualizeConfig,
    random: torch.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    # The same faint noise for all, so that a picture does not depend on which others are made.
    noise = FAINT * torch.randn(2, 3, side, side // 2 + 1, generator=random)
    spectrum = noise.repeat(len(directions), 1, 1, 1, 1).requires_grad_()
    start = drives(network, site, paint(spectrum, side), directions).detach().abs().clamp_min(1e-3)
    adam = torch.optim.Adam([spectrum], lr=how.lr)
    for _ in range(how.steps):
        with torch.enable_grad(), Redirected():
            pictures = paint(spectrum, side)
            drive = drives(network, site, _jittered(pictures, how, random), directions)
            loss = -(drive / start).sum()
            if how.smoothness:
                rough = pictures.diff(dim=2).abs().mean() + pictures.diff(dim=3).abs().mean()
                loss = loss + how.smoothness * rough * len(directions)
            adam.zero_grad()
            loss.backward()
        adam.step()
    with torch.no_grad():
        pictures = paint(spectrum, side)
        reached = drives(network, site, pictures, directions)
    return pictures.movedim(1, -1).numpy(), reached.numpy()


class Redirected(TorchFunctionMode):
    """Rectifiers that are shut let a slope through that would open them, if none else gets through.

    A unit that is off has no slope to climb; with this it has, for each picture by itself.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Replace rectifiers."""
        del types
        return _Rectifier.apply(args[0]) if func in RECTIFIERS else func(*args, **(kwargs or {}))


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
    """A picture from its spectrum."""
    y = torch.fft.fftfreq(side)[:, None]
    x = torch.fft.rfftfreq(side)
    scale = 1 / (x.square() + y.square()).sqrt().clamp_min(1 / side)
    waves = torch.complex(spectrum[:, 0], spectrum[:, 1]) * scale
    plain = torch.fft.irfft2(waves, s=(side, side), norm="ortho") / 4
    colours = torch.tensor(COLOURS)
    colours = colours / colours.norm(dim=0).max()
    return torch.einsum("ab,nbyx->nayx", colours, plain).sigmoid()


def drives(
    network: nn.Module,
    site: Site,
    pictures: Float[Tensor, "n 3 side side"],
    directions: Float[Tensor, "n d"],
) -> Float[Tensor, " n"]:
    """Drive of each picture's own direction at the middle of the map.

    Raises:
        InputError: The site is not a map, or not as wide as the directions.
    """
    activations = read(network, pictures, [site])[site]
    if activations.ndim != 4 or activations.shape[1] != directions.shape[1]:
        raise InputError(
            f"Site {site} has activations of shape {tuple(activations.shape[1:])}; pictures need "
            f"a map of {directions.shape[1]} channels, as wide as the directions."
        )
    rows = channels_last(activations)
    middle = rows[:, rows.shape[1] // 2, rows.shape[2] // 2]
    return (middle * directions).sum(dim=1)


def _jittered(pictures: Tensor, how: VisualizeConfig, random: torch.Generator) -> Tensor:
    """The pictures, all turned, scaled and shifted alike; beyond their rim they are mirrored."""
    draw = 2 * torch.rand(4, generator=random) - 1
    angle = float(draw[0]) * how.turn * np.pi / 180
    size = 1 + float(draw[1]) * how.zoom
    cos, sin = np.cos(angle) * size, np.sin(angle) * size
    dx, dy = (2 * how.shift * float(v) for v in draw[2:])
    turn = torch.tensor([[cos, -sin, dx], [sin, cos, dy]], dtype=pictures.dtype)
    grid = functional.affine_grid(
        turn.expand(len(pictures), 2, 3), list(pictures.shape), align_corners=False
    )
    return functional.grid_sample(
        pictures, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
