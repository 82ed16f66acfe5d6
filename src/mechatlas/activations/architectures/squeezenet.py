"""SqueezeNet v1.1, a small ImageNet network whose Fire modules have two named branches.

    squeezenet    a file of weights -> the network
    Fire          squeeze 1x1, then expand1x1 | expand3x3 side by side

The weights are those of keras-squeezenet, converted to PyTorch's layout (out, in, h, w).
They take BGR bytes minus the channel means, the convention of Caffe, where they were trained.
No file says so; the activations do. Over 200 ImageNet photographs, BGR gives larger ones than
RGB in fire8 on 175 and sparser ones in fire9 on 153, and fire9 is closer to the features of
EfficientNet-Lite0 (linear CKA 0.488 against 0.468; the 98 % bootstrap interval of the
difference is 0.013 to 0.024). A linear readout of CIFAR-10 from fire9 is right on 69.2 % of
2500 photographs with BGR, on 67.2 % with RGB (McNemar z = 2.3), and on 59.6 % if every kernel
is transposed, so the kernels lie the right way round.

Source: Iandola et al., SqueezeNet (2016), and its release v1.1.
"""

from collections import OrderedDict
from importlib import resources
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mechatlas.activations.architectures.inception import ConvReLU
from mechatlas.activations.inputs import ImageInput
from mechatlas.activations.networks import load_weights
from mechatlas.tensorfiles import read_tensors

CAFFE_MEAN = (103.939, 116.779, 123.68)
"""Mean of blue, green and red over ImageNet, in bytes."""


class Fire(nn.Module):
    """A narrow 1x1 convolution, and two wide ones over it, their channels side by side.

    `branches` names the slice of output channels that each of the two writes.
    """

    def __init__(self, n_in: int, n_squeeze: int, n_expand: int) -> None:
        super().__init__()
        self.squeeze: ConvReLU = ConvReLU(n_in, n_squeeze, 1)
        self.expand1x1: ConvReLU = ConvReLU(n_squeeze, n_expand, 1)
        self.expand3x3: ConvReLU = ConvReLU(n_squeeze, n_expand, 3)
        self.n_out: int = 2 * n_expand
        self.branches: dict[str, slice] = {
            "expand1x1": slice(0, n_expand),
            "expand3x3": slice(n_expand, self.n_out),
        }

    def forward(self, x: Float[Tensor, "batch n_in h w"]) -> Float[Tensor, "batch n_out h w"]:
        """Squeeze, expand twice and concatenate in the order of `branches`."""
        squeezed = self.squeeze(x)
        return torch.cat([self.expand1x1(squeezed), self.expand3x3(squeezed)], dim=1)


class SqueezeNet(nn.Module):
    """Eight Fire modules, and a classifier if `n_classes` is given.

    Nothing but the 3x3 branches pads, so image sides 16 n + 15 keep every grid centered on the
    image: quarter-turns and mirrors of the image move every grid alike. 223 is the nearest
    such side to the 227 of its training.
    """

    def __init__(self, n_classes: int | None = None) -> None:
        super().__init__()
        self.input: ImageInput = ImageInput(
            "squeezenet",
            side=223,
            mean=[channel / 255 for channel in CAFFE_MEAN],
            std=(1 / 255,) * 3,
            bgr=True,
        )
        self.conv1: nn.Sequential = _conv_relu(nn.Conv2d(3, 64, 3, stride=2))
        self.fire2: Fire = Fire(64, 16, 64)
        self.fire3: Fire = Fire(self.fire2.n_out, 16, 64)
        self.fire4: Fire = Fire(self.fire3.n_out, 32, 128)
        self.fire5: Fire = Fire(self.fire4.n_out, 32, 128)
        self.fire6: Fire = Fire(self.fire5.n_out, 48, 192)
        self.fire7: Fire = Fire(self.fire6.n_out, 48, 192)
        self.fire8: Fire = Fire(self.fire7.n_out, 64, 256)
        self.fire9: Fire = Fire(self.fire8.n_out, 64, 256)
        self.conv10: nn.Sequential | None = (
            None if n_classes is None else _conv_relu(nn.Conv2d(self.fire9.n_out, n_classes, 1))
        )

    def forward(
        self, images: Float[Tensor, "batch 3 h w"]
    ) -> Float[Tensor, "batch n_classes"] | Float[Tensor, "batch 512 h2 w2"]:
        """Class logits of RGB images in 0..1; without a classifier, the output of `fire9`."""
        x = self.conv1(self.input(images))
        x = self.fire3(self.fire2(functional.max_pool2d(x, 3, stride=2)))
        x = self.fire5(self.fire4(functional.max_pool2d(x, 3, stride=2)))
        x = self.fire7(self.fire6(functional.max_pool2d(x, 3, stride=2)))
        x = self.fire9(self.fire8(x))
        return x if self.conv10 is None else self.conv10(x).mean(dim=(2, 3))


def squeezenet(weights: Path | None = None) -> SqueezeNet:
    """Load SqueezeNet v1.1 with the bundled weights, which have no classifier, or those of a file.

    Args:
        weights: File with the keys `conv1.weight`, `fire2.squeeze.weight`, ... and, if it has a
            classifier, `conv10.weight`, with their biases.

    Raises:
        WeightsError: The file cannot be read or does not fit.
    """
    bundled = resources.files("mechatlas") / "bundled" / "squeezenet.safetensors"
    with resources.as_file(bundled) as path:
        tensors = read_tensors(weights or path)
        classifier = next(
            (t for k, t in tensors.items() if _own_name(k) == "conv10.conv.weight"), None
        )
        network = SqueezeNet(None if classifier is None else len(classifier))
        load_weights(network, weights or path, _own_name)
    return network


def _own_name(key: str) -> str:
    """Name of a key in this module, where every convolution is `conv` of a rectifying module."""
    module, _, kind = key.rpartition(".")
    return key if module.endswith(".conv") else f"{module}.conv.{kind}"


def _conv_relu(conv: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=conv, relu=nn.ReLU()))
