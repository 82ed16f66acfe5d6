"""Shares of a feature's activity that come from each branch, on data.

    activation share    fraction of the encoder's input above its mean that comes through the
                        branch, on rows where the feature is active
    ablation share      fraction of the activity on the same rows that is lost when the branch is
                        set to its mean

Both are ratios of sums over rows. Rows of one sample resemble one another, so intervals leave out
groups of whole samples at a time (the jackknife). Nothing is kept of a row once it is read.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from mechatlas.base import InputError, Progress, no_progress
from mechatlas.maths.arrays import Channels

GROUPS = 32
"""Number of groups of samples that are left out one after another."""
ROWS_AT_ONCE = 512
PAIRS_AT_ONCE = 8192
"""Pairs of a row and a feature active on it whose encoder inputs are split together."""


@dataclasses.dataclass(frozen=True, eq=False)
class Shares:
    """Ratios with their 95 % intervals; NaN where a feature was never active."""

    value: Float[np.ndarray, "feature branch"]
    low: Float[np.ndarray, "feature branch"]
    high: Float[np.ndarray, "feature branch"]


@dataclasses.dataclass(frozen=True, eq=False)
class ActivityShares:
    """Shares of the activity of features that come from each branch."""

    n_rows: int
    active: Int[np.ndarray, " feature"]
    """Rows on which each feature was active."""
    activation: Shares | None
    """Activation shares; `None` for a dictionary that has no linear encoder to take apart."""
    ablation: Shares
    """Ablation shares."""


@torch.no_grad()
def activity_shares(
    dictionary: Any,
    rows: Iterable[tuple[Tensor, Tensor]],
    branches: Mapping[str, Channels],
    mean: Float[np.ndarray, " d"],
    *,
    n_rows: int = 0,
    on_progress: Progress = no_progress,
) -> ActivityShares:
    """Measure both shares in one pass.

    Args:
        dictionary: Dictionary of any kind; `encode` is all that the ablation share needs, the
            activation share also needs `W_enc (d, n_latents)`.
        rows: Rows (n, d) and the sample of each, one batch after another.
        branches: Name -> channels.
        mean: Mean of the channels, to which a branch is set.
        n_rows: Number of rows that there will be, for the progress.
        on_progress: Callback with the number of rows that are done.

    Raises:
        InputError: There are no rows, or they are not as wide as the dictionary.
    """
    slices, sums = list(branches.values()), _Sums(dictionary.n_latents, len(branches))
    encoder = getattr(dictionary, "W_enc", None)
    usual = torch.from_numpy(mean).float()
    done = 0
    for batch, samples in rows:
        for x, sample in zip(
            batch.float().split(ROWS_AT_ONCE), samples.split(ROWS_AT_ONCE), strict=True
        ):
            if x.shape[1] != len(usual) or x.shape[1] != dictionary.d_in:
                raise InputError(
                    f"The rows are {x.shape[1]} wide, the dictionary reads {dictionary.d_in} and "
                    f"the mean has {len(usual)}. Are they of the same site?"
                )
            code = dictionary.encode(x)
            row, latent = code.nonzero(as_tuple=True)
            value = code[row, latent].double()
            lost = []
            for s in slices:
                without = x.clone()
                without[:, s] = usual[s]
                lost.append(value - dictionary.encode(without)[row, latent].double())
            parts = None if encoder is None else _split(encoder, x - usual, row, latent, slices)
            sums.add(sample[row] % GROUPS, latent, value, torch.stack(lost, dim=1), parts)
            done += len(x)
            on_progress(done, max(n_rows, done))
    if not done:
        raise InputError("There are no rows to measure shares on.")
    return sums.finish(done, linear=encoder is not None)


def _split(
    encoder: Tensor, x: Tensor, row: Tensor, latent: Tensor, slices: list[Channels]
) -> Tensor:
    """Encoder input of each pair of a row and a feature: through every branch, and in all."""
    atoms = encoder.T
    parts = []
    for at, which in zip(row.split(PAIRS_AT_ONCE), latent.split(PAIRS_AT_ONCE), strict=True):
        product = x[at] * atoms[which]
        through = [product[:, s].sum(dim=1) for s in slices]
        parts.append(torch.stack([*through, product.sum(dim=1)], dim=1))
    return torch.cat(parts).double() if parts else torch.zeros(0, len(slices) + 1).double()


class _Sums:
    """Sums over active rows, for each group of samples."""

    def __init__(self, n_latents: int, n_branches: int) -> None:
        self.n, self.b = n_latents, n_branches
        cells = GROUPS * n_latents
        self.count = torch.zeros(n_latents, dtype=torch.int64)
        self.value = torch.zeros(cells, dtype=torch.float64)
        self.lost = torch.zeros(cells, n_branches, dtype=torch.float64)
        self.parts = torch.zeros(cells, n_branches + 1, dtype=torch.float64)

    def add(
        self, group: Tensor, latent: Tensor, value: Tensor, lost: Tensor, parts: Tensor | None
    ) -> None:
        cell = group * self.n + latent
        self.count += torch.bincount(latent, minlength=self.n)
        self.value.index_add_(0, cell, value)
        self.lost.index_add_(0, cell, lost)
        if parts is not None:
            self.parts.index_add_(0, cell, parts)

    def finish(self, n_rows: int, *, linear: bool) -> ActivityShares:
        shape = (GROUPS, self.n, -1)
        lost, parts = self.lost.view(shape).numpy(), self.parts.view(shape).numpy()
        value = self.value.view(shape).numpy()
        return ActivityShares(
            n_rows=n_rows,
            active=self.count.numpy(),
            activation=_ratio(parts[..., :-1], parts[..., -1:]) if linear else None,
            ablation=_ratio(lost, value),
        )


def _ratio(
    part: Float[np.ndarray, "group feature branch"], whole: Float[np.ndarray, "group feature one"]
) -> Shares:
    """Ratios of sums, with intervals from leaving out one group of samples after another."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value = part.sum(axis=0) / whole.sum(axis=0)
        left_out = (part.sum(axis=0) - part) / (whole.sum(axis=0) - whole)
    there = whole[..., 0] != 0
    n = there.sum(axis=0)[:, None]  # groups in which the feature was ever active
    distance = np.where(there[..., None], np.square(left_out - value), 0).sum(axis=0)
    error = np.sqrt(distance * (n - 1) / np.maximum(n, 1))
    half = np.where(n > 1, stats.t.ppf(0.975, np.maximum(n - 1, 1)) * error, np.nan)
    return Shares(value, value - half, value + half)
