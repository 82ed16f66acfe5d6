"""Modular addition: one-layer transformers without normalization, as modules with named sites."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

PRIME = 113


class Embed(nn.Module):
    """Embedding of tokens and positions."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.tokens = nn.Parameter(weights["embed.W_E"])
        self.places = nn.Parameter(weights["pos_embed.W_pos"])

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed the two numbers and the equals sign."""
        return self.tokens[tokens] + self.places


class Attend(nn.Module):
    """Attention of the last position to all, added to its own residual."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        of = {k.rpartition(".")[2]: nn.Parameter(w) for k, w in weights.items() if ".attn.W" in k}
        of |= {k.rpartition(".")[2]: nn.Parameter(w) for k, w in weights.items() if ".attn.b" in k}
        self.W_Q, self.W_K, self.W_V, self.W_O = (of[f"W_{x}"] for x in "QKVO")
        self.b_Q, self.b_K, self.b_V, self.b_O = (of[f"b_{x}"] for x in "QKVO")

    def forward(self, x: Tensor) -> Tensor:
        """Attend from the last position."""
        last = x[:, -1]
        q = torch.einsum("nd,hde->nhe", last, self.W_Q) + self.b_Q
        k = torch.einsum("npd,hde->nphe", x, self.W_K) + self.b_K
        v = torch.einsum("npd,hde->nphe", x, self.W_V) + self.b_V
        scores = torch.einsum("nhe,nphe->nhp", q, k) / q.shape[-1] ** 0.5
        mixed = torch.einsum("nhp,nphe->nhe", scores.softmax(dim=-1), v)
        return last + torch.einsum("nhe,hed->nd", mixed, self.W_O) + self.b_O


class Feed(nn.Module):
    """MLP with a residual connection."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.inner = linear(weights, "blocks.0.mlp.W_in", "blocks.0.mlp.b_in")
        self.outer = linear(weights, "blocks.0.mlp.W_out", "blocks.0.mlp.b_out")

    def forward(self, x: Tensor) -> Tensor:
        """Add the output of the MLP."""
        return x + self.outer(self.inner(x).relu())


def linear(weights: dict[str, Tensor], weight: str, bias: str) -> nn.Linear:
    """Make a linear layer of two tensors in the layout of TransformerLens."""
    made = nn.Linear(weights[weight].shape[0], weights[weight].shape[1])
    made.weight = nn.Parameter(weights[weight].T.contiguous())
    made.bias = nn.Parameter(weights[bias])
    return made


class Addition(nn.Module):
    """Sites: `embed` (before attention), `attend` (before the MLP), `feed`, `unembed`."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.embed, self.attend, self.feed = Embed(weights), Attend(weights), Feed(weights)
        self.unembed = linear(weights, "unembed.W_U", "unembed.b_U")

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute logits at the last position."""
        return self.unembed(self.feed(self.attend(self.embed(tokens))))


def addition(weights: Path) -> Addition:
    """Load a network, as a recipe names it."""
    return Addition(load_file(weights)).eval()


def training_pairs() -> tuple[Tensor, Tensor]:
    """List the 3,830 pairs that the networks were trained on, with their sums."""
    pairs = [(a, b, PRIME) for a in range(PRIME) for b in range(PRIME)]
    tokens = torch.tensor(pairs)
    n = int(0.3 * len(pairs))
    # What random_split of torch does with a generator of seed 0.
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    chosen = tokens[order[:n]]
    return chosen, (chosen[:, 0] + chosen[:, 1]) % PRIME
