"""Decoder blocks of any dictionary, estimated from what its codes say about posed activations.

    CodeRegression    streams of codes and targets -> ridge solutions on halves of the samples

The block D_g of a feature is what its code of the untransformed activation adds to a(gI), given
the codes of the other features: the slope of a linear regression with an intercept. All that is
kept of the stream are second moments, one set for each half, so memory does not grow with it:
twice latents^2 + latents * width numbers.

Codes are brought to root mean square 1 where a latent is active, so that the ridge is told in
rows: it shrinks as if each latent had been seen so many times more with no effect.
"""

import numpy as np
import scipy.linalg
from jaxtyping import Bool, Float
from scipy import sparse
from torch import Tensor

from mechatlas.base import InputError

RIDGE = 1.0
"""Rows that each latent seems to have been seen without effect."""
COLUMNS = 1024
"""Columns of the targets that are worked on together."""
BUFFER_BYTES = 128 << 20
DENSE = 0.05
"""Share of non-zero codes from which dense products are faster."""


class CodeRegression:
    """Second moments of codes and targets, for two halves of the samples."""

    def __init__(self, n_latents: int, width: int) -> None:
        self.n_latents, self.width = n_latents, width
        self.rows = np.zeros(2, np.int64)
        self.active = np.zeros((2, n_latents), np.int64)
        """Rows on which each latent was active, in each half."""
        self._gram = np.zeros((2, n_latents, n_latents), np.float32)
        self._cross = np.zeros((2, n_latents, width), np.float32)
        self._codes = np.zeros((2, n_latents))
        self._targets = np.zeros((2, width))
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(
        self,
        codes: Float[Tensor, "batch latent"],
        targets: Float[Tensor, "batch width"],
        second: Bool[np.ndarray, " batch"],
    ) -> None:
        """Take in some rows; `second` says which belong to the second half."""
        part = codes.detach().float().numpy(), targets.detach().float().numpy(), second
        self._waiting.append(part)
        if sum(t.nbytes for _, t, _ in self._waiting) >= BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        codes, targets, second = (
            np.concatenate(parts) for parts in zip(*self._waiting, strict=True)
        )
        self._waiting = []
        for half in range(2):
            chosen = second == bool(half)
            if chosen.any():
                self._add(half, codes[chosen], targets[chosen])

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
        thin = sparse.csr_array(codes)
        across = sparse.csr_array(thin.T)
        products = sparse.coo_array(across @ thin)
        self._gram[half][products.coords] += products.data
        for k in range(0, self.width, COLUMNS):
            some = np.ascontiguousarray(targets[:, k : k + COLUMNS])
            self._cross[half, :, k : k + COLUMNS] += across @ some

    def halves(self) -> Float[np.ndarray, "2 latent width"]:
        """The blocks as each half of the samples gives them; zero for latents it never saw.

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
            out[half] = self._solve([half])[0]
        return out

    def whole(self) -> tuple[Float[np.ndarray, "latent width"], Float[np.ndarray, " width"]]:
        """The blocks as all rows give them, and what is predicted where no latent is active."""
        self._flush()
        return self._solve([0, 1])

    def _solve(
        self, halves: list[int]
    ) -> tuple[Float[np.ndarray, "latent width"], Float[np.ndarray, " width"]]:
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
            return out, target.astype(np.float32)
        factor = scipy.linalg.cho_factor(gram, lower=True, overwrite_a=True, check_finite=False)
        for k in range(0, self.width, COLUMNS):
            columns = slice(k, k + COLUMNS)
            right = np.zeros((len(live), len(target[columns])))
            for half in halves:
                right += self._cross[half][live, columns]
            right -= rows * np.outer(mean, target[columns])
            right /= unit[:, None]
            solved = scipy.linalg.cho_solve(factor, right, overwrite_b=True, check_finite=False)
            out[live, columns] = solved / unit[:, None]
        return out, (target - mean @ out[live]).astype(np.float32)
