"""Outputs of a network as predictions: losses, divergences and answers, token by token.

    output_of            what a network returns -> one row a sample or a token of it
    next_token_losses    cross entropy of each next token
    label_losses         cross entropy of a label for each sample
    compare              divergence from other predictions, and whether the answer is the same

Logits are brought to float32 block by block, so that no second copy of them is ever whole.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

BLOCK = 1 << 22
"""Numbers of logits that are brought to float32 at once."""


class Outputs(NamedTuple):
    """Output of a network."""

    x: Float[Tensor, "sample place d"]
    """A row for each token, position or class vector of each sample."""
    is_logits: bool
    """Whether the rows are logits: a tensor, or the `logits` of what is returned."""


def output_of(value: Any) -> Outputs:
    """Find the tensor that a network returns, and whether it is logits."""
    if isinstance(value, Tensor):
        return Outputs(value.flatten(1, -2) if value.ndim > 2 else value[:, None], True)
    if isinstance(getattr(value, "logits", None), Tensor):
        return output_of(value.logits)
    first = value[0] if isinstance(value, tuple | list) else next(iter(value.values()))
    return Outputs(output_of(first).x, False)


def _blocks(*rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of each tensor at once, so that those of the first fill a block."""
    n = max(1, BLOCK // rows[0].shape[-1])
    return zip(*(x.split(n) for x in rows), strict=True)


def next_token_losses(
    logits: Float[Tensor, "sample place vocabulary"], tokens: Int[Tensor, "sample place"]
) -> Float[Tensor, "sample place_but_last"]:
    """Cross entropy in nats of each token but the first, given those before it."""
    predicted, targets = logits[:, :-1], tokens[:, 1:]
    losses = _losses(predicted.reshape(-1, logits.shape[-1]), targets.reshape(-1))
    return losses.reshape(targets.shape)


def label_losses(
    logits: Float[Tensor, "sample 1 d"], labels: Int[Tensor, " sample"]
) -> Float[Tensor, "sample 1"]:
    """Cross entropy in nats of the label of each sample."""
    return _losses(logits[:, 0], labels)[:, None]


def _losses(logits: Float[Tensor, "n d"], targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    parts = [
        functional.cross_entropy(x.float(), target, reduction="none")
        for x, target in _blocks(logits, targets)
    ]
    return torch.cat(parts)


def compare(
    before: Float[Tensor, "sample place d"], after: Float[Tensor, "sample place d"]
) -> tuple[Float[Tensor, "sample place"], Bool[Tensor, "sample place"]]:
    """Kullback-Leibler divergence from `before` in nats, and whether the likeliest class stays."""
    divergence, same = [], []
    for x, y in _blocks(before.flatten(0, 1), after.flatten(0, 1)):
        p, q = x.float().log_softmax(-1), y.float().log_softmax(-1)
        divergence.append((p.exp() * (p - q)).sum(-1))
        same.append(x.argmax(-1) == y.argmax(-1))
    shape = before.shape[:2]
    return torch.cat(divergence).reshape(shape), torch.cat(same).reshape(shape)
