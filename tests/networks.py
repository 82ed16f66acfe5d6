"""Small networks for tests; also what a user's own factory looks like."""

from collections import abc
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mechatlas.dictionaries.pretrained import CrossLayerDictionary, Pretrained
from mechatlas.dictionaries.sparsity import ReLU
from mechatlas.maths.actions import Rotate
from mechatlas.maths.named_groups import group


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


class Turning(nn.Module):
    """Sees the same in every pose of a square: every kernel is there eight times, posed.

    Channel `8 * kind + g` of `posed` has kernel `kind` in pose g, so that posing the input by h
    takes what channel g says to channel h*g. Kinds 0 to 2 have no symmetry, 3 is unchanged by
    half-turns, 4 by everything. What follows is as chance has it.
    """

    def __init__(self) -> None:
        super().__init__()
        action = Rotate(group("D4"))
        kernels = torch.randn(5, 3, 5, 5)
        kernels[3] += action(2, kernels[3])
        kernels[4] = torch.stack([action(g, kernels[4]) for g in range(8)]).sum(0) / 8**0.5
        poses = [action(g, kernels) for g in range(8)]
        self.posed = nn.Conv2d(3, 40, 5)
        self.posed.load_state_dict(
            {"weight": torch.stack(poses, dim=1).flatten(0, 1) / 4, "bias": torch.full((40,), -0.2)}
        )
        self.seen = nn.ReLU()
        self.after = nn.Conv2d(40, 24, 3)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.after(self.seen(self.posed(x - 0.5))).relu()
        return self.head(x.mean(dim=(2, 3)))


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


def turning() -> Turning:
    torch.manual_seed(0)
    return Turning().eval()


def sick() -> Sick:
    return Sick()


def not_a_network() -> int:
    return 3


class Reader(nn.Module):
    """Reads tokens: an embedding, a block that mixes them (from the left only, if causal), logits.

    A token may be a sink: in the first three places its row is three hundred times as long.
    """

    def __init__(self, *, causal: bool = True, sink: int | None = None, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, width)
        self.block = Mixer(width, causal=causal)
        self.head = nn.Linear(width, 50)
        self.sink = sink
        self.input = _Spelling()
        self.eval()

    def forward(self, tokens: Tensor) -> Any:
        x = self.embed(tokens)
        if self.sink is not None:
            near = torch.arange(tokens.shape[1]) < 3
            x = x * torch.where((tokens == self.sink) & near, 300.0, 1.0)[..., None]
        return self.head(self.block(x))


class Mixer(nn.Module):
    """Adds to each row a nonlinear function of the mean of the rows before it, or of all."""

    def __init__(self, width: int, *, causal: bool) -> None:
        super().__init__()
        self.mix, self.causal = nn.Linear(width, width), causal

    def forward(self, x: Tensor) -> Tensor:
        counts = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        mean = x.cumsum(dim=1) / counts if self.causal else x.mean(dim=1, keepdim=True)
        return x + self.mix(mean.expand_as(x)).tanh()


class _Spelling(nn.Module):
    def decode(self, tokens: list[int]) -> list[str]:
        return [f"<{token}>" for token in tokens]


class Windows:
    """Windows of tokens 2 to 49: 0 is special and stands first and elsewhere, 1 is padding."""

    def __init__(self, n: int, length: int, *, padded_left: bool = False, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.tokens = random.integers(2, 50, (n, length))
        self.tokens[random.random((n, length)) < 0.05] = 0
        self.tokens[:, 0] = 0
        for row in self.tokens[::3] if length > 3 else ():
            missing = int(random.integers(1, length // 2))
            row[length - missing :] = 1
            row[:] = np.roll(row, missing) if padded_left else row
        self.special_ids = frozenset({0})

    def __len__(self) -> int:
        return len(self.tokens)

    def name(self, index: int) -> str:
        return f"window {index}"

    def read(self, index: int) -> np.ndarray:
        return self.tokens[index]

    def token_ids(self, index: int) -> np.ndarray:
        return self.tokens[index]

    def padding(self, index: int) -> np.ndarray:
        return self.tokens[index] == 1

    def stack(self, samples: abc.Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(samples)).long()


class Layered(nn.Module):
    """Three layers on tokens: rows are mixed from the left, then an MLP is added to each."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, width)
        self.layers = nn.ModuleList([Layer(width) for _ in range(3)])
        self.head = nn.Linear(width, 50)
        self.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = Mixer(width, causal=True)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x)
        return x + self.mlp(x)


class Residual(nn.Module):
    """The MLPs of `Layered` alone, on rows of eight numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.start = nn.Linear(8, 8)
        self.layers = nn.ModuleList([Layer(8).mlp for _ in range(3)])
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for mlp in self.layers:
            x = x + mlp(x)
        return self.head(x)


def residual() -> Residual:
    return Residual().eval()


def cross_layer(n_latents: int = 12, dtype: torch.dtype = torch.float32) -> CrossLayerDictionary:
    """Cross-layer transcoder of `Layered`, each of whose layers writes its own and all later."""
    random = torch.Generator().manual_seed(5)
    layers = [
        Pretrained(
            W_enc=torch.randn(8, n_latents, generator=random).to(dtype),
            b_enc=torch.randn(n_latents, generator=random).to(dtype) - 1,
            W_dec=torch.randn(n_latents, 8 * (3 - i), generator=random).to(dtype) / 4,
            b_dec=torch.randn(8 * (3 - i), generator=random).to(dtype) / 4,
            sparsity=ReLU(), subtracts_b_dec=False, transcodes=True, site=f"in.{i}",
            widths={f"out.{j}": 8 for j in range(i, 3)},
        )
        for i in range(3)
    ]  # fmt: skip
    return CrossLayerDictionary(layers, [f"in.{i}" for i in range(3)])


class PatchTransformer(nn.Module):
    """Vision transformer with a class token, two registers and scales after attention and MLP."""

    def __init__(self, side: int = 16, d: int = 24, *, registers: int = 2) -> None:
        super().__init__()
        self.num_register_tokens = registers
        self.patch = nn.Conv2d(3, d, 4, 4)
        self.special = nn.Parameter(torch.randn(1, 1 + registers, d))
        self.place = nn.Parameter(torch.randn(1, (side // 4) ** 2, d))
        self.layers: Any = nn.ModuleList(PatchLayer(d) for _ in range(2))
        self.norm = nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.place
        x = torch.cat([self.special.expand(len(x), -1, -1), x], dim=1)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class PatchLayer(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.attention, self.up, self.down = PatchAttention(d), nn.Linear(d, 48), nn.Linear(48, d)
        self.norms = nn.ModuleList([nn.LayerNorm(d), nn.LayerNorm(d)])
        self.scales = nn.Parameter(torch.rand(2, d) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scales[0] * self.attention(self.norms[0](x))
        return x + self.scales[1] * self.down(self.up(self.norms[1](x)).relu())


class PatchAttention(nn.Module):
    """Attention with queries, keys and values in one layer, and its parts for tests."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 3, d // 3
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Patterns (sample, head, query, key) and values (sample, head, token, k)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return (q @ k.transpose(2, 3) * self.head_dim**-0.5).softmax(-1), v

    def forward(self, x: Tensor) -> Tensor:
        pattern, v = self.parts(x)
        return self.proj((pattern @ v).transpose(1, 2).flatten(2))


def patch_transformer() -> PatchTransformer:
    torch.manual_seed(0)
    return PatchTransformer()
