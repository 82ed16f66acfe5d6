"""Sparsity rules of other libraries that are not trained here, only used.

AbsTopK     the k furthest from zero, with their signs
GroupMax    the largest of each of k runs of neighboring latents
"""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from mechatlas.dictionaries.sparsity import NONE, Rule, State


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbsTopK(Rule):
    """Keep the k entries of each sample that are furthest from zero, with their signs."""

    k: int
    """Latents kept in each sample."""

    def __call__(
        self, pre: Float[Tensor, "batch latent"], state: State = NONE
    ) -> Float[Tensor, "batch latent"]:
        """Zero all but the k largest sizes of each row."""
        del state
        index = pre.abs().topk(self.k, dim=-1).indices
        return torch.zeros_like(pre).scatter(-1, index, pre.gather(-1, index))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupMax(Rule):
    """Keep the largest entry of each of k runs of neighboring latents, if it is positive."""

    k: int
    """Runs, all of one length."""

    def __call__(
        self, pre: Float[Tensor, "batch latent"], state: State = NONE
    ) -> Float[Tensor, "batch latent"]:
        """Zero all but one of each run."""
        del state
        groups = pre.relu().unflatten(-1, (self.k, -1))
        best = groups.max(dim=-1, keepdim=True)
        return torch.zeros_like(groups).scatter(-1, best.indices, best.values).flatten(-2)
