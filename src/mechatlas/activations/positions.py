"""Positions of a sample's activations that are kept in a store, drawn at random.

Position p of sample s gets the key log w_p + Gumbel(s, p) and the largest keys win, which
draws without replacement with probability proportional to w. The noise depends on the seed
and the sample's number alone, never on the batch.

Source: Efraimidis and Spirakis, Weighted random sampling with a reservoir (2006).
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechatlas.ranges import COUNT, SEED, check_ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class Positions:
    """Number of positions kept of each sample, and the rule that draws them."""

    rule: Literal["norm", "random", "all"] = "norm"
    """norm: with probability proportional to the activation's length, as in Bozoukov (2025);
    random: every position alike; all: every position."""
    per_sample: int = 10
    """Positions kept of each sample (fewer where a sample has fewer); not used by `all`."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        check_ranges(self, per_sample=COUNT, seed=SEED)

    def count(self, n_positions: int) -> int:
        """Number of positions kept of a sample that has `n_positions`."""
        return n_positions if self.rule == "all" else min(self.per_sample, n_positions)

    def draw(
        self, activations: Float[Tensor, "batch position d_in"], samples: Sequence[int]
    ) -> Int[Tensor, "batch kept"]:
        """Draw positions, in ascending order.

        Args:
            activations: Batch of activations.
            samples: Number of each sample of the batch.
        """
        n_samples, n_positions, _ = activations.shape
        kept = self.count(n_positions)
        if kept == n_positions:
            every = torch.arange(n_positions, device=activations.device)
            return every.expand(n_samples, -1)
        noise = np.stack(
            [np.random.default_rng([self.seed, s]).gumbel(size=n_positions) for s in samples]
        )
        keys = torch.from_numpy(noise).to(activations.device)
        if self.rule == "norm":
            length = activations.double().norm(dim=-1)
            keys = keys + torch.where(length > 0, length.log(), -1e6)  # zero activations come last
        return keys.topk(kept, dim=1).indices.sort(dim=1).values
