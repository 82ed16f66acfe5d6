"""Networks that multiply in a finite group, trained from scratch.

    train_group_nets      table, settings -> left, right, unembed of each network
    GroupTrainingConfig   widths, steps, learning rate, weight decay, seeds

logits = relu(E_x A + E_y B) @ unembed, with embeddings E_x and E_y of the two elements and linear
maps A and B to the neurons. The factors are trained and penalized apart and multiplied out at the
end: left = E_x A, right = E_y B. A penalty on both factors favors products of low rank, so that
neurons share a few irreps; trained without factors, networks of the same accuracy are not bounded.
Batches are random pairs of the whole table, so this is not about generalization.

Source: Wu et al. (ICLR 2025), section 3, and Chughtai, Chan and Nanda, A toy model of
universality (2023), for architecture and training.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mechatlas.analysis.proofs.verifier.structures import Weights
from mechatlas.base import Progress, no_progress
from mechatlas.ranges import COUNT, SEED, check_ranges

WARM_UP, FALL = 50, 0.1
"""Steps in which the learning rate rises, and fraction of the training in which it falls."""
FIRST_CHECKPOINT = 20
"""Steps before the first of several checkpoints."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupTrainingConfig:
    """Settings for training networks on the table of a group."""

    width: int = 128
    """Hidden neurons."""
    embedding_width: int = 256
    """Width of the embedding of an element, the inner dimension of the trained factors."""
    steps: int = 5000
    """Steps of Adam."""
    batch_size: int = 1500
    """Pairs of elements in a step."""
    lr: float = 6e-3
    """Learning rate; it falls to a fiftieth over the last tenth of the steps."""
    weight_decay: float = 2e-4
    """Coefficient of the L2 penalty on every factor. The penalty is part of the loss (Adam, not
    AdamW), so that weights of no use vanish fast."""
    weight_decay_warm_up: float = 0.0
    """Fraction of the steps over which the penalty grows with the square of the step. A large group
    needs it: a penalty that leaves few irreps at the end lets none grow at first."""
    seed: int = 0
    """Seed of the weights and batches of the first network."""
    n_seeds: int = 1
    """Number of networks trained side by side, from the seeds `seed`, `seed` + 1, ..."""
    n_checkpoints: int = 0
    """Number of times at which weights are kept, from the first steps to the last one; the ratio
    of one step to the next is constant."""

    def __post_init__(self) -> None:
        counts = ("width", "embedding_width", "steps", "batch_size", "n_seeds")
        check_ranges(
            self,
            **dict.fromkeys(counts, COUNT),
            lr="(0, 1000]",
            weight_decay="[0, 1000]",
            weight_decay_warm_up="[0, 1]",
            seed=SEED,
            n_checkpoints="[0, 1000]",
        )

    def checkpoints(self) -> list[int]:
        """Steps after which weights are kept."""
        if self.n_checkpoints < 2:
            return [self.steps] * self.n_checkpoints
        first = min(FIRST_CHECKPOINT, self.steps)
        steps = np.geomspace(first, self.steps, self.n_checkpoints).round().astype(int)
        return sorted(set(steps.tolist()))


@contextmanager
def without_subnormals() -> Iterator[None]:
    """Count numbers too small to be normal as 0.

    Weights of no use fall by a constant factor in each step and would be such numbers for long,
    with which a processor computes many times more slowly.
    """
    before = float(torch.tensor(1e-40) * 1.0) == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@without_subnormals()
def train_group_nets(
    table: Int[np.ndarray, "order order"],
    settings: GroupTrainingConfig,
    *,
    on_checkpoint: Callable[[int, list[Weights]], None] | None = None,
    on_progress: Progress = no_progress,
) -> list[Weights]:
    """Train one network for each seed on all pairs, as batched products.

    The same settings give the same bytes on the same machine.

    Args:
        table: Right answers.
        settings: Widths, steps, learning rate, weight decay and seeds.
        on_checkpoint: Callback with the number of steps done and the weights of each network then,
            at the checkpoints of the settings.
        on_progress: Callback with the number of steps done and their total.

    Returns:
        Weights of each network, the factors multiplied out in float64 and rounded to float32.
    """
    n, s = len(table), settings
    randoms = [torch.Generator().manual_seed(s.seed + i) for i in range(s.n_seeds)]
    embedding, maps = (n, s.embedding_width), (s.embedding_width, s.width)
    sizes = s.embedding_width**-0.5, s.width**-0.5
    embed_x, embed_y, map_x, map_y, unembed = parameters = [
        (torch.stack([torch.randn(shape, generator=r) for r in randoms]) * size).requires_grad_()
        for shape, size in (
            *[(embedding, sizes[0])] * 2,
            *[(maps, sizes[0])] * 2,
            ((s.width, n), sizes[1]),
        )
    ]
    answers = torch.from_numpy(table.astype(np.int64))
    first = n * torch.arange(s.n_seeds)[:, None]  # row of each network's first element
    adam = torch.optim.Adam(parameters, lr=s.lr, weight_decay=s.weight_decay, betas=(0.9, 0.98))
    kept = set(s.checkpoints()) if on_checkpoint else set()
    for step in range(s.steps):
        fall = min(1.0, max(0.02, (s.steps - step) / (FALL * s.steps)))
        grown = min(1.0, (step + 1) / max(s.weight_decay_warm_up * s.steps, 1.0))
        adam.param_groups[0]["lr"] = s.lr * min(1.0, (step + 1) / WARM_UP) * fall
        adam.param_groups[0]["weight_decay"] = s.weight_decay * grown**2
        x, y = torch.stack(
            [torch.randint(0, n, (2, s.batch_size), generator=random) for random in randoms], dim=1
        )
        hidden = torch.relu(
            _rows(torch.bmm(embed_x, map_x), first + x)
            + _rows(torch.bmm(embed_y, map_y), first + y)
        )
        loss = torch.nn.functional.cross_entropy(
            torch.bmm(hidden, unembed).flatten(0, 1), answers[x, y].flatten(), reduction="sum"
        )
        adam.zero_grad()
        (loss / s.batch_size).backward()
        adam.step()
        if on_checkpoint and step + 1 in kept:
            on_checkpoint(step + 1, _multiplied_out(*parameters))
        on_progress(step + 1, s.steps)
    return _multiplied_out(*parameters)


def _multiplied_out(
    embed_x: Tensor, embed_y: Tensor, map_x: Tensor, map_y: Tensor, unembed: Tensor
) -> list[Weights]:
    """Weights of each network, from its factors."""
    with torch.no_grad():
        left, right = (
            torch.bmm(embed.double(), map_.double()).float()
            for embed, map_ in ((embed_x, map_x), (embed_y, map_y))
        )
    packed = (part.detach().numpy().copy() for part in (left, right, unembed))
    return [Weights(*each) for each in zip(*packed, strict=True)]


def _rows(values: Tensor, rows: Tensor) -> Tensor:
    """Rows of batched matrices, numbered through."""
    return values.flatten(0, 1)[rows.flatten()].unflatten(0, rows.shape)
