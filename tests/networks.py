"""Small networks for tests; also what a user's own factory looks like."""

import torch
from torch import Tensor, nn


class Tiny(nn.Module):
    """Two convolutions with two named branches, then a head that must not always run."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.mixed = Pair()
        self.head = nn.Linear(8, 2)
        self.head_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixed(self.first(x).relu())
        self.head_calls += 1
        return self.head(x.mean(dim=(2, 3)))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(6, 5, 1)
        self.right = nn.Conv2d(6, 3, 3, padding=1)
        self.branches = {"left": slice(0, 5), "right": slice(5, 8)}

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], dim=1).relu()


class Sequence(nn.Module):
    """Returns tuples, as attention modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attention = SelfAttention()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.attention(self.embed(tokens))[0]


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size = 4, 2
        self.query = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.query(x), None


class Sick(nn.Module):
    """Divides by the mean of each image, so that a black image gives NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(x / x.mean(dim=(1, 2, 3), keepdim=True))


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny().eval()


def sick() -> Sick:
    return Sick()


def not_a_network() -> int:
    return 3
