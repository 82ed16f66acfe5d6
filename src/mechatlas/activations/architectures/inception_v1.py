"""InceptionV1 with the published `inception5h` weights, as Lucid, Lucent and Captum run it.

    inception_v1    a user's file of weights, or random weights -> the network
    InceptionV1     stem, nine inception modules, 1008 class logits

It is the TensorFlow network: strided layers pad right and below more than left and above,
and the stem normalizes over neighboring channels. The two PyTorch ports disagree on that
normalization: Captum's numbers are TensorFlow's depth_radius 5, bias 2, alpha 1e-4; Lucent's
are weaker. Weights are the same, so the names of the keys tell which port a file is from.

The weights are not bundled: they are `inception5h.pth` of either project. The auxiliary
heads, used only while it was trained, are left out.

Source: Szegedy et al., Going deeper with convolutions (2014); Olah et al., Zoom In (2020).
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mechatlas.activations.architectures.inception import ConvReLU, Inception, Widths
from mechatlas.activations.inputs import ImageInput
from mechatlas.activations.networks import load_weights
from mechatlas.base import UserError, WeightsError
from mechatlas.tensorfiles import read_tensors


class _Norm(NamedTuple):
    size: int
    alpha: float
    beta: float
    k: float


NORMS = {
    "lucent": _Norm(size=9, alpha=9.99999974738e-05, beta=0.5, k=1.0),
    "captum": _Norm(size=11, alpha=0.0011, beta=0.5, k=2.0),
}
"""Local response normalization of each port, as PyTorch counts (alpha is divided by size)."""

WIDTHS = {
    "mixed3a": Widths(64, 96, 128, 16, 32, 32),
    "mixed3b": Widths(128, 128, 192, 32, 96, 64),
    "mixed4a": Widths(192, 96, 204, 16, 48, 64),
    "mixed4b": Widths(160, 112, 224, 24, 64, 64),
    "mixed4c": Widths(128, 128, 256, 24, 64, 64),
    "mixed4d": Widths(112, 144, 288, 32, 64, 64),
    "mixed4e": Widths(256, 160, 320, 32, 128, 128),
    "mixed5a": Widths(256, 160, 320, 48, 128, 128),
    "mixed5b": Widths(384, 192, 384, 48, 128, 128),
}
POOL_BEFORE = {"mixed4a": "maxpool4", "mixed5a": "maxpool10"}
"""Names of the pooling layers between the blocks of inception modules."""


class FirstConv(nn.Module):
    """A 7x7 convolution at every second pixel, padded as TensorFlow does, then a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv: nn.Conv2d = nn.Conv2d(3, 64, 7, stride=2)

    def forward(self, x: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 64 h2 w2"]:
        """Convolve and rectify."""
        return functional.relu(self.conv(functional.pad(x, (2, 3, 2, 3))))


class HalvingPool(nn.Module):
    """The maximum of 3x3 at every second position, padded on the right and below only."""

    def forward(self, x: Float[Tensor, "batch n h w"]) -> Float[Tensor, "batch n h2 w2"]:
        """Pool; what lies outside never wins."""
        return functional.max_pool2d(
            functional.pad(x, (0, 1, 0, 1), value=float("-inf")), 3, stride=2
        )


class InceptionV1(nn.Module):
    """GoogLeNet as interpretability research knows it, with Lucid's module names.

    The grids of positions halve exactly for image sides that 32 divides. The padding is
    lopsided, so a mirrored or turned image gives only roughly mirrored or turned grids.
    """

    def __init__(self, variant: str = "lucent") -> None:
        super().__init__()
        self.variant = variant
        mean, std = (117 / 255,) * 3, (1 / 255,) * 3
        self.input: ImageInput = ImageInput("inception_v1", side=224, mean=mean, std=std)
        self.conv2d0: FirstConv = FirstConv()
        self.maxpool0: HalvingPool = HalvingPool()
        self.localresponsenorm0: nn.LocalResponseNorm = nn.LocalResponseNorm(*NORMS[variant])
        self.conv2d1: ConvReLU = ConvReLU(64, 64, 1)
        self.conv2d2: ConvReLU = ConvReLU(64, 192, 3)
        self.localresponsenorm1: nn.LocalResponseNorm = nn.LocalResponseNorm(*NORMS[variant])
        self.maxpool1: HalvingPool = HalvingPool()
        n_channels = 192
        for name, widths in WIDTHS.items():
            if name in POOL_BEFORE:
                self.add_module(POOL_BEFORE[name], HalvingPool())
            self.add_module(name, Inception(n_channels, widths))
            n_channels = widths.conv_1x1 + widths.conv_3x3 + widths.conv_5x5 + widths.project
        self.classify: nn.Linear = nn.Linear(n_channels, 1008)

    def forward(self, images: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 1008"]:
        """Class logits of RGB images in 0..1."""
        *layers, classify = self.children()
        x = images
        for layer in layers:
            x = layer(x)
        return classify(x.mean(dim=(2, 3)))


def inception_v1(
    weights: Path | None = None, *, variant: str | None = None, seed: int = 0
) -> InceptionV1:
    """Load InceptionV1 with a user's weights, or with random weights.

    Args:
        weights: A `.pth`, `.pt` or safetensors file with Lucent's or Captum's names of keys.
        variant: Port whose normalization to use, "lucent" or "captum"; by default the port
            whose names the file has, and Lucent for random weights.
        seed: Seed of the random weights.

    Raises:
        UserError: There is no such variant.
        WeightsError: The file does not fit, or neither it nor `variant` names the port.
    """
    if variant is not None and variant not in NORMS:
        raise UserError(f"variant must be one of {', '.join(NORMS)}, got {variant!r}.")
    if weights is None:
        return _random(InceptionV1(variant or "lucent"), seed)
    variant = variant or _port(read_tensors(weights))
    if variant is None:
        raise WeightsError(
            f"{weights} has the names of neither Lucent nor Captum, so its keys do not tell how "
            "the stem normalizes. Pass variant='lucent' or variant='captum'."
        )
    network = InceptionV1(variant)
    load_weights(network, weights, lambda key: None if _AUXILIARY.match(key) else _own_name(key))
    return network


_AUXILIARY = re.compile(r"aux[12]\.|(head|nn|softmax)[01]_")
_PARTS = {
    "_1x1_pre_relu_conv": "conv_1x1",
    "_3x3_bottleneck_pre_relu_conv": "reduce_3x3",
    "_3x3_pre_relu_conv": "conv_3x3",
    "_5x5_bottleneck_pre_relu_conv": "reduce_5x5",
    "_5x5_pre_relu_conv": "conv_5x5",
    "_pool_reduce_pre_relu_conv": "project",
    ".conv_1x1": "conv_1x1",
    ".conv_3x3_reduce": "reduce_3x3",
    ".conv_3x3": "conv_3x3",
    ".conv_5x5_reduce": "reduce_5x5",
    ".conv_5x5": "conv_5x5",
    ".pool_proj": "project",
}
_STEM_AND_HEAD = {
    "conv2d0_pre_relu_conv": "conv2d0.conv",
    "conv2d1_pre_relu_conv": "conv2d1.conv",
    "conv2d2_pre_relu_conv": "conv2d2.conv",
    "softmax2_pre_activation_matmul": "classify",
    "conv1": "conv2d0.conv",
    "conv2": "conv2d1.conv",
    "conv3": "conv2d2.conv",
    "fc": "classify",
}


def _own_name(key: str) -> str:
    """This module's name of a key of either port; other keys as they are."""
    module, _, kind = key.rpartition(".")
    if module in _STEM_AND_HEAD:
        return f"{_STEM_AND_HEAD[module]}.{kind}"
    block, part = module[:7], module[7:]  # "mixed3a" has seven letters
    return f"{block}.{_PARTS[part]}.conv.{kind}" if block in WIDTHS and part in _PARTS else key


def _port(keys: dict[str, Tensor]) -> str | None:
    if any("_pre_relu_conv." in key for key in keys):
        return "lucent"
    return "captum" if any(key.startswith(("conv1.", "fc.")) for key in keys) else None


def _random(network: InceptionV1, seed: int) -> InceptionV1:
    """Weights that carry the scale of the input on, so that no layer dies or explodes."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
    return network
