"""Convolutional networks made of parallel branches: `inception_mini` and InceptionV1.

    Inception        one module: 1x1 | reduce, 3x3 | reduce, 5x5 | pool, project
    InceptionMini    six such modules on 31 x 31 images, trained here on CIFAR-10
    InceptionV1      nine such modules, exactly as in the published weights (in `inception_v1.py`)

Every network here takes RGB images in 0..1 and scales them itself.

Source: Szegedy et al., Going deeper with convolutions (2014); Olah et al., Zoom In (2020),
for the module names that interpretability researchers use.
"""

from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mechatlas.activations.inputs import ImageInput
from mechatlas.activations.networks import load_weights


class Widths(NamedTuple):
    """Channels of each convolution of an inception module."""

    conv_1x1: int
    reduce_3x3: int
    conv_3x3: int
    reduce_5x5: int
    conv_5x5: int
    project: int


class ConvReLU(nn.Module):
    """A convolution with stride 1 that keeps the side of its input, then a ReLU."""

    def __init__(self, n_in: int, n_out: int, side: int) -> None:
        super().__init__()
        self.conv: nn.Conv2d = nn.Conv2d(n_in, n_out, side, padding=side // 2)

    def forward(self, x: Float[Tensor, "batch n_in h w"]) -> Float[Tensor, "batch n_out h w"]:
        """Convolve and rectify."""
        return functional.relu(self.conv(x))


class Inception(nn.Module):
    """Four branches over the same input, their channels laid side by side.

    `branches` names the slice of output channels that each branch writes.
    """

    def __init__(self, n_in: int, widths: Widths) -> None:
        super().__init__()
        self.conv_1x1: ConvReLU = ConvReLU(n_in, widths.conv_1x1, 1)
        self.reduce_3x3: ConvReLU = ConvReLU(n_in, widths.reduce_3x3, 1)
        self.conv_3x3: ConvReLU = ConvReLU(widths.reduce_3x3, widths.conv_3x3, 3)
        self.reduce_5x5: ConvReLU = ConvReLU(n_in, widths.reduce_5x5, 1)
        self.conv_5x5: ConvReLU = ConvReLU(widths.reduce_5x5, widths.conv_5x5, 5)
        self.project: ConvReLU = ConvReLU(n_in, widths.project, 1)
        self.branches: dict[str, slice] = {}
        self.n_out: int = 0
        outputs = {
            "1x1": widths.conv_1x1,
            "3x3": widths.conv_3x3,
            "5x5": widths.conv_5x5,
            "pool": widths.project,
        }
        for name, width in outputs.items():
            self.branches[name] = slice(self.n_out, self.n_out + width)
            self.n_out += width

    def forward(self, x: Float[Tensor, "batch n_in h w"]) -> Float[Tensor, "batch n_out h w"]:
        """Run the four branches and concatenate them in the order of `branches`."""
        pooled = functional.max_pool2d(x, 3, stride=1, padding=1)
        return torch.cat(
            [
                self.conv_1x1(x),
                self.conv_3x3(self.reduce_3x3(x)),
                self.conv_5x5(self.reduce_5x5(x)),
                self.project(pooled),
            ],
            dim=1,
        )


class InceptionMini(nn.Module):
    """A small GoogLeNet for 31 x 31 images, with InceptionV1's module names.

    Every stage has an odd side (31, 15, 7) and pools without padding, so the grid of
    positions is centered on the image: quarter-turns and mirrors of the image are
    exactly quarter-turns and mirrors of every grid. Other sides 8 n + 7 keep this.
    """

    classes: tuple[str, ...] = (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.input: ImageInput = ImageInput(
            "inception_mini", side=31, mean=(0.491, 0.482, 0.447), std=(0.247, 0.243, 0.262)
        )
        self.conv2d0: ConvReLU = ConvReLU(3, 24, 3)
        self.conv2d1: ConvReLU = ConvReLU(24, 24, 1)
        self.conv2d2: ConvReLU = ConvReLU(24, 64, 3)
        self.mixed3a: Inception = Inception(64, Widths(32, 24, 40, 8, 16, 16))
        self.mixed3b: Inception = Inception(self.mixed3a.n_out, Widths(40, 32, 56, 10, 24, 16))
        self.mixed4a: Inception = Inception(self.mixed3b.n_out, Widths(56, 44, 72, 12, 32, 24))
        self.mixed4b: Inception = Inception(self.mixed4a.n_out, Widths(56, 44, 72, 12, 32, 24))
        self.mixed4c: Inception = Inception(self.mixed4b.n_out, Widths(56, 44, 72, 12, 32, 24))
        self.mixed4d: Inception = Inception(self.mixed4c.n_out, Widths(64, 48, 80, 16, 48, 32))
        self.classify: nn.Linear = nn.Linear(self.mixed4d.n_out, len(self.classes))

    def forward(self, images: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 10"]:
        """Class logits of RGB images in 0..1."""
        x = self.input(images)
        x = self.conv2d1(self.conv2d0(x))
        x = self.conv2d2(functional.max_pool2d(x, 3, stride=2))
        x = self.mixed3b(self.mixed3a(x))
        x = functional.max_pool2d(x, 3, stride=2)
        x = self.mixed4d(self.mixed4c(self.mixed4b(self.mixed4a(x))))
        return self.classify(x.mean(dim=(2, 3)))


def inception_mini(weights: Path | None = None) -> InceptionMini:
    """Load the bundled network, with the bundled weights or the weights of a file."""
    network = InceptionMini()
    bundled = resources.files("mechatlas") / "bundled" / "inception_mini.safetensors"
    with resources.as_file(bundled) as path:
        load_weights(network, weights or path)
    return network
