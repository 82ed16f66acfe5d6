"""Input checks of networks of images, before the first layer sees an image.

Every adapter takes RGB images in 0..1 and scales them itself, so that no caller has to
know whether a network was trained on bytes, on BGR or on standardised channels.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechatlas.base import InputError


class ImageInput(nn.Module):
    """Module that refuses images outside 0..1, and scales the others as a network was trained.

    The scaled image is `(x - mean) / std` per channel, in BGR order if `bgr`.
    """

    mean: Float[Tensor, "channel 1 1"]
    std: Float[Tensor, "channel 1 1"]

    def __init__(
        self,
        name: str,
        *,
        side: int,
        mean: Sequence[float],
        std: Sequence[float],
        bgr: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.side = side
        self.channels: int = len(mean)
        self.bgr = bgr
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(
        self, images: Float[Tensor, "batch channel h w"]
    ) -> Float[Tensor, "batch channel h w"]:
        """Check RGB images in 0..1, and scale them.

        Channels vary fastest in memory: on CPUs the networks then take about half of the time.

        Raises:
            InputError: Wrong number of channels, or values outside 0..1.
        """
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise InputError(
                f"{self.name} expects images of shape (batch, {self.channels}, height, width), "
                f"got {tuple(images.shape)}."
            )
        low, high = images.aminmax()
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise InputError(
                f"{self.name} expects RGB values in 0..1, got {low:.4g}..{high:.4g}. "
                "Divide bytes by 255; the network does all further scaling itself."
            )
        ordered = images.flip(1) if self.bgr else images
        scaled = (ordered - self.mean) / self.std
        return scaled.contiguous(memory_format=torch.channels_last)
