"""Networks that multiply in a finite group, trained from scratch.

    train_group_net       table, settings -> left, right, unembed
    GroupTrainingConfig   width, steps, learning rate, weight decay, seed

logits = relu(left[x] + right[y]) @ unembed: the architecture of the paper with the embeddings
multiplied out. Batches are random pairs of the whole table, so this is not about
generalization; weight decay is what makes the weights orderly.

Source: Wu et al. (ICLR 2025), section 3, and Chughtai, Chan and Nanda, A toy model of
universality (2023), for architecture and training.
"""

import dataclasses

import numpy as np
import torch
from jaxtyping import Int

from mechatlas.analysis.proofs.verifier.structures import Weights
from mechatlas.base import Progress, no_progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupTrainingConfig:
    """Settings for training a network on the table of a group."""

    width: int = 128
    """Hidden neurons."""
    steps: int = 6000
    """Steps of Adam."""
    batch_size: int = 1500
    """Pairs of elements in a step."""
    lr: float = 1e-2
    """Largest learning rate; it falls to a fiftieth over the last four tenths."""
    weight_decay: float = 1e-4
    """Coefficient of the L2 penalty. It is part of the loss (Adam, not AdamW), so that weights of
    no use vanish fast."""
    seed: int = 0
    """Seed of weights and batches."""

    def __post_init__(self) -> None:
        for name in ("width", "steps", "batch_size", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}.")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be >= 0, got {self.weight_decay}.")


def train_group_net(
    table: Int[np.ndarray, "order order"],
    settings: GroupTrainingConfig,
    *,
    on_progress: Progress = no_progress,
) -> Weights:
    """Train on all pairs. The same settings give the same bytes on the same machine.

    Args:
        table: Right answers.
        settings: Width, steps, learning rate, weight decay and seed.
        on_progress: Callback with the number of steps done and their total.
    """
    n, s = len(table), settings
    random = torch.Generator().manual_seed(s.seed)
    shapes = ((n, s.width), (n, s.width), (s.width, n))
    left, right, unembed = (
        (torch.randn(shape, generator=random) * size).requires_grad_()
        for shape, size in zip(shapes, (0.3, 0.3, 0.08), strict=True)
    )
    answers = torch.from_numpy(table.astype(np.int64))
    adam = torch.optim.Adam(
        [left, right, unembed], lr=s.lr, weight_decay=s.weight_decay, betas=(0.9, 0.98)
    )
    for step in range(s.steps):
        fall = min(1.0, max(0.02, (s.steps - step) / (0.4 * s.steps)))
        adam.param_groups[0]["lr"] = s.lr * min(1.0, (step + 1) / 50) * fall
        x, y = torch.randint(0, n, (2, s.batch_size), generator=random)
        logits = torch.relu(left[x] + right[y]) @ unembed
        loss = torch.nn.functional.cross_entropy(logits, answers[x, y])
        adam.zero_grad()
        loss.backward()
        adam.step()
        on_progress(step + 1, s.steps)
    return Weights(*(p.detach().numpy().astype(np.float32) for p in (left, right, unembed)))
