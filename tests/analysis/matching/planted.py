"""Chains of dictionaries whose features are known: who lives where, who was born, died or split."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

LEVELS = {"low": 0.3, "middle": 0.7, "high": 1.0}
"""Length of the noise on each decoder row, whose length is 1, drawn anew in each layer."""


@dataclasses.dataclass
class Chain:
    """Planted dictionaries."""

    dictionaries: list[Any]
    names: list[np.ndarray]
    """The feature that each latent is, by layer."""
    parent: dict[int, int]
    """The feature that a part of a split one came from."""

    def line(self, name: int) -> int:
        """The oldest ancestor."""
        while name in self.parent:
            name = self.parent[name]
        return name

    def lines(self, layer: int) -> np.ndarray:
        """Ancestor of each latent of a layer."""
        return np.array([self.line(int(name)) for name in self.names[layer]])

    def score(self, columns: np.ndarray, first: int, last: int) -> tuple[float, float, int]:
        """Share of partners found, share of the pairs that are wrong, and partners there are."""
        a, b = self.lines(first), self.lines(last)
        has = np.isin(a, b)
        paired = columns >= 0
        right = np.zeros(len(a), bool)
        right[paired] = a[paired] == b[columns[paired]]
        # Two parts of a split feature may find one partner only.
        there = sum(min((a == k).sum(), (b == k).sum()) for k in np.unique(a[has]))
        wrong = (paired & ~right).sum() / max(int(paired.sum()), 1)
        return float(right.sum() / max(there, 1)), float(wrong), int(there)


def units(x):
    """Rows at length 1."""
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def chain(
    n=1000, d=128, layers=6, *, noise=0.3, turn=0.25, churn=0.1, splits=0.05, seed=0
) -> Chain:
    """Features turn by `turn` radians a layer; `churn` of them die, as many are born."""
    random = np.random.default_rng(seed)
    spectrum = 1 / np.sqrt(1 + 16 * np.arange(d) / d)

    def fresh(count):
        return units(random.standard_normal((count, d)) * spectrum)

    directions, names, parent = fresh(n), np.arange(n), {}
    following = n
    found, told = [], []
    for layer in range(layers):
        if layer:
            directions = units(np.cos(turn) * directions + np.sin(turn) * fresh(len(directions)))
            alive = random.random(len(names)) >= churn
            directions, names = directions[alive], names[alive]
            split = np.flatnonzero(random.random(len(names)) < splits)
            apart = 0.35 * fresh(len(split))
            parts = np.concatenate([directions[split] + apart, directions[split] - apart])
            keep = np.setdiff1d(np.arange(len(names)), split)
            children = following + np.arange(2 * len(split))
            following += 2 * len(split)
            parent |= {int(c): int(names[split[k % len(split)]]) for k, c in enumerate(children)}
            born = max(0, n - len(keep) - len(children))
            directions = np.concatenate([directions[keep], units(parts), fresh(born)])
            names = np.concatenate([names[keep], children, following + np.arange(born)])
            following += born
        order = random.permutation(len(names))
        directions, names = directions[order], names[order]
        seen = units(directions + noise * fresh(len(directions))).astype(np.float32)
        found.append(dictionary(seen, 1.15**layer * random.lognormal(0, 0.4, len(seen)), random))
        told.append(names)
    return Chain(found, told, parent)


def dictionary(rows, threshold, random) -> Any:
    """A JumpReLU dictionary whose folded decoder rows are `rows`."""
    theta = threshold.astype(np.float32)[:, None]
    encoder = rows + 0.1 * random.standard_normal(rows.shape).astype(np.float32)
    return SimpleNamespace(
        d_in=rows.shape[1],
        n_latents=len(rows),
        W_dec=torch.from_numpy(rows / theta),
        W_enc=torch.from_numpy(np.ascontiguousarray((encoder * theta).T)),
        b_enc=torch.zeros(len(rows)),
        b_dec=torch.zeros(rows.shape[1]),
        threshold=torch.from_numpy(theta[:, 0]),
        subtracts_b_dec=False,
    )


def jump_relu_pair(
    n, d, *, tied, spread, noise=1.0, alone=0.31, encoder_noise=0.7, seed=0
) -> tuple[Any, Any, np.ndarray]:
    """Two JumpReLU dictionaries with log-normal thresholds, and the partner of each latent of A.

    Args:
        n: Latents of each.
        d: Width.
        tied: Whether encoders are the decoders.
        spread: Standard deviation of the logarithm of thresholds; partners differ by a tenth of it.
        noise: Length of the noise on a partner's directions.
        alone: Share of the latents without a partner.
        encoder_noise: Length of what an encoder has beside the decoder.
        seed: Seed.
    """
    random = np.random.default_rng(seed)
    spectrum = 1 / np.sqrt(1 + 16 * np.arange(d) / d)
    k = round((1 - alone) * n)

    def two(width):
        a, b = (units(random.standard_normal((n, width)) * spectrum) for _ in range(2))
        other = units(random.standard_normal((k, width)) * spectrum)
        b[:k] = units(a[:k] + noise * other)
        return a, b

    decoders, others = two(d), two(d)
    logs, offsets = (
        random.standard_normal((2, n)),
        -0.3 * (1 + 0.3 * random.standard_normal((2, n))),
    )
    logs[1, :k] = logs[0, :k] + 0.1 * random.standard_normal(k)
    offsets[1, :k] = offsets[0, :k]
    order = random.permutation(n)
    made = []
    for side, rows in enumerate((np.arange(n), order)):
        decoder = decoders[side][rows].astype(np.float32)
        encoder = units(decoder + encoder_noise * others[side][rows]).astype(np.float32)
        made.append(
            SimpleNamespace(
                d_in=d,
                n_latents=n,
                W_dec=torch.from_numpy(decoder),
                W_enc=torch.from_numpy(np.ascontiguousarray((decoder if tied else encoder).T)),
                b_enc=torch.from_numpy(offsets[side][rows].astype(np.float32)),
                b_dec=torch.zeros(d),
                threshold=torch.from_numpy(np.exp(spread * logs[side][rows]).astype(np.float32)),
                subtracts_b_dec=False,
            )
        )
    partner = np.full(n, -1)
    partner[:k] = np.argsort(order)[:k]
    return made[0], made[1], partner
