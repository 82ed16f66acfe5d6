"""Positions of a sample's activations that are kept in a store, drawn at random.

    Positions        rule of the draw, and the tokens whose rows are left out
    left_out         tokens of some samples -> positions that are left out, and why
    is_causal        whether a network reads tokens from left to right
    skips_first      whether the first row of each sample is left out by default

Position p of sample s gets the key log w_p + Gumbel(s, p) and the largest keys win, which
draws without replacement with probability proportional to w. The noise depends on the seed
and the sample's number alone, never on the batch.

Source: Efraimidis and Spirakis, Weighted random sampling with a reservoir (2006).
"""

import dataclasses
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechatlas.activations.sites import read_activations
from mechatlas.base import Site
from mechatlas.ranges import COUNT, COUNT_OR_NONE, SEED, check_ranges

REASONS = ("padding", "first", "special", "tokens")
"""Reasons for which a position is left out; one that has several counts under the first."""
CAUSAL_TOLERANCE = 3e-3
"""Relative change of earlier rows by a later token that is still rounding."""


@runtime_checkable
class TokenSamples(Protocol):
    """Samples that are windows of tokens."""

    @property
    def special_ids(self) -> Collection[int]:
        """Ids of special tokens."""
        ...

    def token_ids(self, index: int) -> Int[np.ndarray, " token"]:
        """Token ids of one sample, padding included."""
        ...

    def padding(self, index: int) -> Bool[np.ndarray, " token"]:
        """Positions of one sample that are padding."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Positions:
    """Number of positions kept of each sample, and the rule that draws them."""

    rule: Literal["norm", "random", "all"] | None = None
    """norm: with probability proportional to the activation's length, as in Bozoukov (2025);
    random: every position alike; all: every position. By default random for tokens, else norm."""
    per_sample: int = 10
    """Positions kept of each sample (fewer where a sample has fewer); not used by `all`."""
    seed: int = 0
    """Seed of the draws."""
    keep_special: bool = False
    """Keep rows of special tokens, which are left out by default. Padding never has rows."""
    skip_first: int | None = None
    """First positions left out of each sample; by default 1 for tokens of a causal network, whose
    first row is often hundreds of times as long as the others, and else 0."""
    skip_tokens: tuple[int, ...] = ()
    """Ids of further tokens whose rows are left out."""

    def __post_init__(self) -> None:
        check_ranges(
            self, per_sample=COUNT, skip_first=COUNT_OR_NONE, skip_tokens=COUNT_OR_NONE, seed=SEED
        )

    @classmethod
    def of_store(cls, manifest: dict[str, Any]) -> "Positions":
        """Read the settings in a store's manifest, where tuples are lists."""
        fields = dict(manifest["settings"]["positions"])
        return cls(**{**fields, "skip_tokens": tuple(fields.get("skip_tokens", ()))})

    def resolved(self, *, tokens: bool, causal: bool) -> "Positions":
        """Fill in what depends on the samples and the network.

        Args:
            tokens: Whether the samples are tokens.
            causal: Whether the network reads them from left to right.
        """
        first = int(tokens and causal) if self.skip_first is None else self.skip_first
        return dataclasses.replace(
            self,
            rule=self.rule or ("random" if tokens else "norm"),
            keep_special=self.keep_special or not tokens,
            skip_first=first,
        )

    def count(self, n_positions: int) -> int:
        """Largest number of positions kept of a sample that has `n_positions`."""
        return n_positions if self.rule == "all" else min(self.per_sample, n_positions)

    def draw(
        self,
        activations: Float[Tensor, "batch position d_in"],
        samples: Sequence[int],
        excluded: Bool[Tensor, "batch position"] | None = None,
    ) -> Int[Tensor, "batch kept"]:
        """Draw positions, in ascending order.

        Args:
            activations: Batch of activations.
            samples: Number of each sample of the batch.
            excluded: Positions that are not drawn; by default none.

        Returns:
            Positions; -1, after the others, where a sample has too few.
        """
        n_samples, n_positions, _ = activations.shape
        kept = self.count(n_positions)
        if excluded is not None:
            excluded = excluded.to(activations.device)
        if kept == n_positions:
            every = torch.arange(n_positions, device=activations.device)
            return _sorted(every.expand(n_samples, -1), excluded)
        noise = np.stack(
            [np.random.default_rng([self.seed, s]).gumbel(size=n_positions) for s in samples]
        )
        keys = torch.from_numpy(noise).to(activations.device)
        if self.rule != "random":
            length = activations.double().norm(dim=-1)
            keys = keys + torch.where(length > 0, length.log(), -1e6)  # zero activations come last
        if excluded is not None:
            keys = keys.masked_fill(excluded, -torch.inf)
        return _sorted(keys.topk(kept, dim=1).indices, excluded)


def _sorted(
    positions: Int[Tensor, "batch kept"], excluded: Bool[Tensor, "batch position"] | None
) -> Int[Tensor, "batch kept"]:
    """Positions in ascending order, with -1 at the end for each that is excluded."""
    if excluded is None:
        return positions.sort(dim=1).values
    last = excluded.shape[1]
    ordered = positions.masked_fill(excluded.gather(1, positions), last).sort(dim=1).values
    return ordered.masked_fill(ordered == last, -1)


def left_out(
    samples: TokenSamples, indices: Sequence[int], positions: Positions, counts: Counter[str]
) -> Bool[Tensor, "batch token"]:
    """Find the positions of some samples that are left out.

    Args:
        samples: Windows of tokens.
        indices: Numbers of the samples.
        positions: Resolved settings.
        counts: Number of positions left out for each of `REASONS`, which is added to.
    """
    tokens = np.stack([np.asarray(samples.token_ids(i)) for i in indices])
    padding = np.stack([np.asarray(samples.padding(i), dtype=bool) for i in indices])
    special = [] if positions.keep_special else list(samples.special_ids)
    reasons = {
        "padding": padding,
        "first": np.cumsum(~padding, axis=1) <= (positions.skip_first or 0),
        "special": np.isin(tokens, special),
        "tokens": np.isin(tokens, positions.skip_tokens),
    }
    excluded = np.zeros(tokens.shape, dtype=bool)
    for reason in REASONS:
        counts[reason] += int((reasons[reason] & ~excluded).sum())
        excluded |= reasons[reason]
    return torch.from_numpy(excluded)


@torch.inference_mode()
def is_causal(
    network: nn.Module, inputs: Any, padding: Bool[np.ndarray, " token"], sites: Sequence[Site]
) -> bool:
    """Whether the rows of earlier tokens stay as they are when the last token is another one.

    Args:
        network: Network that reads tokens.
        inputs: Token ids of one sample, or a mapping with them as `input_ids`.
        padding: Positions of the sample that are padding.
        sites: Sites that are read.
    """
    tokens = inputs if isinstance(inputs, Tensor) else inputs["input_ids"]
    last = int(np.flatnonzero(~padding)[-1]) if not padding.all() else 0
    changed = tokens.clone()
    others = tokens[tokens != tokens[0, last]]
    changed[0, last] = others[0] if len(others) else int(tokens[0, last] == 0)
    before = read_activations(network, inputs, sites)
    other: Any = changed if isinstance(inputs, Tensor) else {**inputs, "input_ids": changed}
    after = read_activations(network, other, sites)
    for site, x in before.items():
        if x.ndim == 3 and x.shape[1] == len(padding):
            earlier = torch.from_numpy(~padding[:last]).to(x.device)
            old, new = (a[0, :last][earlier].float() for a in (x, after[site]))
            if (new - old).norm() > CAUSAL_TOLERANCE * old.norm():
                return False
    return last > 0


@torch.inference_mode()
def skips_first(network: nn.Module, inputs: Any, sites: Sequence[Site]) -> bool:
    """Whether inputs are token ids of a causal model, the first row of which is like no other.

    Args:
        network: The network.
        inputs: Input of one sample.
        sites: Sites that are read.
    """
    if not isinstance(inputs, Tensor) or inputs.is_floating_point() or inputs.ndim != 2:
        return False
    n_tokens = inputs.shape[1]
    rows = read_activations(network, inputs, sites).values()
    if any(x.ndim != 3 or x.shape[1] != n_tokens for x in rows):  # a row for all tokens, or none
        return False
    return is_causal(network, inputs, np.zeros(n_tokens, bool), sites)


def same_place(
    position: Int[Tensor, "batch kept"], grid: tuple[int, int], other: tuple[int, int]
) -> Int[Tensor, "batch kept"]:
    """Find the cells of another grid that hold the centers of cells of this grid.

    Args:
        position: Numbers of cells, -1 where none is kept.
        grid: Height and width of this grid.
        other: Height and width of the other.
    """
    y, x = position // grid[1], position % grid[1]
    y = ((y + 0.5) / grid[0] * other[0]).long()
    x = ((x + 0.5) / grid[1] * other[1]).long()
    return torch.where(position < 0, position, y * other[1] + x)
