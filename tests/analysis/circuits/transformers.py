"""Layers of transformers, small enough to differentiate whole; what a user's own may look like."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mechatlas.base import Site

A, B = Site("layers.0"), Site("layers.1")


class Attention(nn.Module):
    """Heads side by side, mixed by `out_proj`."""

    def __init__(self, d: int, heads: int, *, fused: bool, causal: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.causal = heads, d // heads, causal
        self.made = nn.ModuleList([nn.Linear(d, 3 * d)] if fused else [nn.Linear(d, d)] * 0)
        if not fused:
            self.made.extend(nn.Linear(d, d) for _ in range(3))
        self.out_proj = nn.Linear(d, d)

    @property
    def linear(self) -> list[nn.Linear]:
        """What makes queries, keys and values."""
        return [made for made in self.made if isinstance(made, nn.Linear)]

    def forward(self, x: Tensor) -> Tensor:
        parts = [part for made in self.linear for part in made(x).split(x.shape[-1], dim=-1)]
        q, k, v = (p.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in parts)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One layer, in one of three orders."""

    first: nn.LayerNorm
    second: nn.LayerNorm

    def __init__(self, order: str, d: int, heads: int, hidden: int, **how: bool) -> None:
        super().__init__()
        self.order = order
        self.attention = Attention(d, heads, **how)
        self.up, self.down = nn.Linear(d, hidden), nn.Linear(hidden, d)
        if order != "none":
            self.first, self.second = nn.LayerNorm(d), nn.LayerNorm(d)

    def mlp(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(h.relu() if self.order == "none" else functional.gelu(h))

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "none":
            x = x + self.attention(x)
            return x + self.mlp(x)
        if self.order == "before":
            x = x + self.attention(self.first(x))
            return x + self.mlp(self.second(x))
        x = self.first(x + self.attention(x))
        return self.second(x + self.mlp(x))


class Small(nn.Module):
    """Two layers on sequences of vectors."""

    def __init__(self, order: str, d: int = 12, heads: int = 3, hidden: int = 20, **how: bool):
        super().__init__()
        how = {"fused": order == "before", "causal": order == "before"} | how
        self.layers = nn.Sequential(*(Block(order, d, heads, hidden, **how) for _ in range(2)))

    @property
    def last(self) -> Block:
        """The layer between the two sites."""
        block = self.layers[1]
        assert isinstance(block, Block)
        return block

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def small(order: str, seed: int = 0, dtype: torch.dtype = torch.float64, **how: bool) -> Small:
    torch.manual_seed(seed)
    network = Small(order, **how).to(dtype).eval()
    for name, parameter in network.named_parameters():
        centre = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
        nn.init.normal_(parameter, mean=centre, std=0.25)
    return network


def single() -> Small:
    """A network in the precision of a store, as a recipe names it."""
    return small("after", dtype=torch.float32)
