"""Networks of two inception modules, small enough to enumerate, and dictionaries of their sites."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mechatlas.activations.architectures.inception import Inception, Widths
from mechatlas.base import Site

A, B = Site("first"), Site("second")


class Two(nn.Module):
    """Two inception modules; with `between`, something else between them."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.first = Inception(5, Widths(4, 3, 5, 2, 4, 3))
        self.between = between or nn.Identity()
        self.second = Inception(16, Widths(5, 4, 6, 3, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(self.stem(x))))


class Linear:
    """A dictionary that reads and writes with matrices of its own; a code is what is positive."""

    def __init__(self, d_in: int, n_latents: int, *, seed: int, dtype: torch.dtype) -> None:
        random = torch.Generator().manual_seed(seed)
        self.d_in, self.n_latents = d_in, n_latents
        atoms = torch.randn(n_latents, d_in, generator=random).to(dtype)
        self.W_dec = atoms / atoms.norm(dim=1, keepdim=True)
        self.W_enc = self.W_dec.T.clone()

    def encode(self, x: Tensor) -> Tensor:
        code = x @ self.W_enc
        return (code - code.quantile(0.6, dim=-1, keepdim=True)).relu()


def two(seed: int = 0, dtype: torch.dtype = torch.float64, between: nn.Module | None = None) -> Two:
    torch.manual_seed(seed)
    network = Two(between).to(dtype).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.35)
    return network


def without_gates(module: Inception, x: Tensor) -> Tensor:
    """The module with every rectifier open and its maximum a mean, written out by hand."""

    def conv(part: nn.Module, given: Tensor) -> Tensor:
        kernel = part.conv
        assert isinstance(kernel, nn.Conv2d)
        return functional.conv2d(given, kernel.weight, padding=kernel.padding)

    pooled = functional.avg_pool2d(x, 3, stride=1, padding=1)
    return torch.cat(
        [
            conv(module.conv_1x1, x),
            conv(module.conv_3x3, conv(module.reduce_3x3, x)),
            conv(module.conv_5x5, conv(module.reduce_5x5, x)),
            conv(module.project, pooled),
        ],
        dim=1,
    )
