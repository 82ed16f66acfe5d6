"""What makes a code sparse: frozen callables from pre-activations to codes."""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK:
    """Keep the k largest latents of each sample (Makhzani and Frey, 2013; Gao et al., 2024)."""

    k: int = 32
    """Latents kept in each sample."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}.")

    def __call__(self, pre: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch latent"]:
        """Zero all but the k largest entries of each row, and those below zero."""
        top = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())


Sparsity = TopK
"""The rules that a recipe can name; in Python any callable of the same form will do."""
