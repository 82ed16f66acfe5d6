"""Decoder blocks of any dictionary, estimated by regressing posed activations on its codes.

    CodeRegression    streams of codes and targets -> ridge solutions on halves of the samples

The block D_g of a feature is the effect of its code of the untransformed activation on a(gI),
given the codes of the other features: the slope of a linear regression with an intercept. Only
second moments of the stream are kept, one set for each half, so memory does not grow with it:
twice latents^2 + latents * width numbers.

Codes are scaled to root mean square 1 where a latent is active, so that the ridge penalty is in
units of rows: it shrinks a slope as if the latent had been active on as many more rows with no
effect.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse
from torch import Tensor

from mechatlas.base import InputError

RIDGE = 1.0
"""Ridge penalty of each latent, in rows without effect."""
COLUMNS = 1024
"""Number of target columns processed together."""
BUFFER_BYTES = 128 << 20
"""Size of the buffer of rows not yet added to the moments."""
DENSE = 0.05
"""Share of non-zero codes above which dense products are faster."""


class Regression(NamedTuple):
    """Slopes and intercept of a linear regression on codes."""

    slopes: Float[np.ndarray, "latent width"]
    """Effect of each latent; zero for latents that are never active."""
    intercept: Float[np.ndarray, " width"]
    """Prediction where no latent is active."""


class CodeRegression:
    """Second moments of codes and targets, for two halves of the samples.

    Args:
        n_latents: Number of latents.
        width: Number of target columns.
        device: Device that sums the moments and solves, by default the CPU, which also does it for
            devices other than CUDA's, as they have no float64.
    """

    def __init__(self, n_latents: int, width: int, device: torch.device | None = None) -> None:
        self.device: torch.device = device or torch.device("cpu")
        self.n_latents: int = n_latents
        self.width: int = width
        self.rows: Int[np.ndarray, " 2"] = np.zeros(2, np.int64)
        """Number of rows in each half."""
        self.active: Int[np.ndarray, "2 latent"] = np.zeros((2, n_latents), np.int64)
        """Number of rows on which each latent was active, in each half."""
        self._gram = np.zeros((2, n_latents, n_latents), np.float32)
        self._cross = np.zeros((2, n_latents, width), np.float32)
        self._codes = np.zeros((2, n_latents))
        self._targets = np.zeros((2, width))
        self._buffer: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        names = ("active", "_gram", "_cross", "_codes", "_targets")
        names = names if self.device.type == "cuda" else ()
        self._there = {name: torch.from_numpy(getattr(self, name)).to(device) for name in names}

    def add(
        self,
        codes: Float[Tensor, "batch latent"],
        targets: Float[Tensor, "batch width"],
        second: Bool[np.ndarray, " batch"],
    ) -> None:
        """Add a batch of rows.

        Args:
            codes: Codes of the rows.
            targets: Activations that the codes should explain.
            second: Mask of the rows that belong to the second half.
        """
        if self._there:
            for half in range(2):
                rows = torch.from_numpy(np.flatnonzero(second == bool(half))).to(self.device)
                self.rows[half] += len(rows)
                self._add_there(half, *(x.to(self.device)[rows].float() for x in (codes, targets)))
            return
        part = codes.detach().float().cpu().numpy(), targets.detach().float().numpy(), second
        self._buffer.append(part)
        if sum(t.nbytes for _, t, _ in self._buffer) >= BUFFER_BYTES:
            self._flush()

    def _add_there(self, half: int, codes: Tensor, targets: Tensor) -> None:
        """Add rows of a half to the moments on the device."""
        there = self._there
        there["active"][half] += (codes != 0).sum(dim=0)
        there["_codes"][half] += codes.double().sum(dim=0)
        there["_targets"][half] += targets.double().sum(dim=0)
        there["_gram"][half] += codes.T @ codes
        there["_cross"][half] += codes.T @ targets

    def _flush(self) -> None:
        for name, moments in self._there.items():
            setattr(self, name, moments.cpu().numpy())
        if not self._buffer:
            return
        codes, targets, second = (
            np.concatenate(parts) for parts in zip(*self._buffer, strict=True)
        )
        self._buffer = []
        for half in range(2):
            rows = second == bool(half)
            if rows.any():
                self._add(half, codes[rows], targets[rows])

    def _add(self, half: int, codes: np.ndarray, targets: np.ndarray) -> None:
        self.rows[half] += len(codes)
        self.active[half] += (codes != 0).sum(axis=0)
        self._codes[half] += codes.sum(axis=0, dtype=np.float64)
        self._targets[half] += targets.sum(axis=0, dtype=np.float64)
        if (codes != 0).mean() > DENSE:
            self._gram[half] += codes.T @ codes
            for k in range(0, self.width, COLUMNS):
                self._cross[half, :, k : k + COLUMNS] += codes.T @ targets[:, k : k + COLUMNS]
            return
        sparse_codes = sparse.csr_array(codes)
        transposed = sparse.csr_array(sparse_codes.T)
        products = sparse.coo_array(transposed @ sparse_codes)
        self._gram[half][products.coords] += products.data
        for k in range(0, self.width, COLUMNS):
            columns = np.ascontiguousarray(targets[:, k : k + COLUMNS])
            self._cross[half, :, k : k + COLUMNS] += transposed @ columns

    def halves(self) -> Float[np.ndarray, "2 latent width"]:
        """Solve for the slopes in each half of the samples; zero for latents never active there.

        Raises:
            InputError: A half has no rows.
        """
        self._flush()
        if not self.rows.all():
            raise InputError(
                "The noise ceiling needs samples from two images or more: of the two halves of the "
                f"samples one is empty ({self.rows[0]} and {self.rows[1]} rows)."
            )
        out = np.empty((2, self.n_latents, self.width), np.float32)
        for half in range(2):
            out[half] = self._solve([half]).slopes
        return out

    def whole(self) -> Regression:
        """Solve for the slopes and the intercept from all rows."""
        self._flush()
        return self._solve([0, 1])

    def _solve(self, halves: list[int]) -> Regression:
        rows = max(int(self.rows[halves].sum()), 1)
        active = self.active[halves].sum(axis=0)
        live = np.flatnonzero(active)
        mean = self._codes[halves].sum(axis=0)[live] / rows
        target = self._targets[halves].sum(axis=0) / rows
        gram = np.zeros((len(live), len(live)))
        for half in halves:
            gram += self._gram[half] if len(live) == self.n_latents else (
                self._gram[half][np.ix_(live, live)]
            )  # fmt: skip
        unit = np.sqrt(np.diag(gram) / active[live])
        gram -= rows * np.outer(mean, mean)
        gram /= unit[:, None]
        gram /= unit
        gram[np.diag_indices(len(live))] += RIDGE
        out = np.zeros((self.n_latents, self.width), np.float32)
        if not len(live):
            return Regression(out, target.astype(np.float32))
        solve = self._factored(gram)
        for k in range(0, self.width, COLUMNS):
            columns = slice(k, k + COLUMNS)
            right = np.zeros((len(live), len(target[columns])))
            for half in halves:
                right += self._cross[half][live, columns]
            right -= rows * np.outer(mean, target[columns])
            right /= unit[:, None]
            out[live, columns] = solve(right) / unit[:, None]
        return Regression(out, (target - mean @ out[live]).astype(np.float32))

    def _factored(self, gram: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """Function that solves for right sides, by Cholesky."""
        if not self._there:
            factor = scipy.linalg.cho_factor(gram, lower=True, overwrite_a=True, check_finite=False)
            return lambda right: scipy.linalg.cho_solve(
                factor, right, overwrite_b=True, check_finite=False
            )
        lower = torch.linalg.cholesky(torch.from_numpy(gram).to(self.device))

        def solve(right: np.ndarray) -> np.ndarray:
            there = torch.from_numpy(right).to(self.device)
            return torch.cholesky_solve(there, lower).cpu().numpy()

        return solve
