"""Dictionaries of any two places as vectors that compare: their codes on the same rows.

    correlate     a dictionary and rows -> one vector a latent, whose products are correlations
    together      how many numbers of such a vector belong to the same samples
    reordered     the null: the same codes on samples in another order

Rows of one image or text are alike: two features of dogs fire in the same images without being
one, and a few samples look like many rows. So the null never takes a sample apart.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechatlas.analysis.matching.folding import unit_rows

SUMS = 4096
"""Numbers that codes on many rows are added up to."""
MOST_TOGETHER = 64
"""Numbers that one sample's rows are added up to at most, so that there are many samples."""
LEAST_ACTIVE = 10
"""Rows on which a latent is active without which its codes say nothing."""


def together(samples: Int[np.ndarray, " row"] | None) -> int:
    """Numbers in a row of `correlate` that belong to the same samples: for `reordered`."""
    if samples is None:
        return 1
    return min(int(np.unique(samples, return_counts=True)[1].max()), MOST_TOGETHER)


def reordered(
    x: Float[np.ndarray, "n width"], random: np.random.Generator, *, together: int = 1
) -> Float[np.ndarray, "n width"]:
    """The same codes on samples in another order: a null for what `correlate` gives.

    Args:
        x: Codes.
        random: Draws the order.
        together: Numbers side by side that keep together, as `together` says.
    """
    blocks = x.reshape(len(x), -1, together)
    return blocks[:, random.permutation(blocks.shape[1])].reshape(x.shape)


@torch.no_grad()
def correlate(
    dictionary: Any,
    x: Float[Tensor, "row d_in"],
    *,
    samples: Int[np.ndarray, " row"] | None = None,
    sums: int = SUMS,
    least: int = LEAST_ACTIVE,
    batch_size: int = 512,
) -> Float[np.ndarray, "latent width"]:
    """Codes on some rows, centred and at length 1 for each latent; zero for those hardly active.

    The squared distance of two such vectors is 2 - 2 times the correlation of two latents, so
    that dictionaries of any two places compare that were given the same rows. Many samples are
    added up with random signs, the same for every dictionary, until about `sums` numbers are
    left: that keeps products but for an error of about 1 / sqrt(sums), and many rows are what
    tells rare latents apart.

    Args:
        dictionary: What encodes.
        x: The rows.
        samples: The sample that each row is of; by default each is a sample of its own.
        sums: Numbers kept of each latent.
        least: Rows on which a latent must be active to have a vector that is not zero.
        batch_size: Rows encoded at once.

    Source:
        Charikar, Chen, Farach-Colton, Finding frequent items in data streams (2002), for the sums.
    """
    place, signs, width = _places(np.arange(len(x)) if samples is None else samples, sums)
    where, signs = torch.from_numpy(place), torch.from_numpy(signs)
    total = torch.zeros(width, dictionary.n_latents)
    mean = torch.zeros(dictionary.n_latents)
    active = torch.zeros(dictionary.n_latents, dtype=torch.int64)
    for start in range(0, len(x), batch_size):
        part = slice(start, start + batch_size)
        code = dictionary.encode(x[part]).float()
        total.index_add_(0, where[part], code * signs[part, None])
        mean += code.sum(dim=0) / len(x)
        active += (code != 0).sum(dim=0)
    total -= torch.zeros(width).index_add_(0, where, signs)[:, None] * mean
    total[:, active < least] = 0
    return unit_rows(total.T.numpy())


def _places(samples: np.ndarray, sums: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Where each row is added, with which sign, and how many places there are.

    Each sample has a block of places, one for each of its rows in their order. Where there are
    more samples than blocks, whole samples are added up; where a sample has more rows than a
    block has places, its rows are.
    """
    random = np.random.default_rng([len(samples), sums])
    _, sample, sizes = np.unique(samples, return_inverse=True, return_counts=True)
    order = np.argsort(sample, kind="stable")
    rank = np.empty(len(sample), np.int64)
    rank[order] = np.arange(len(sample)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    size, n_rows, n_samples = together(samples), int(sizes.max()), len(sizes)
    n_blocks = min(n_samples, max(sums // size, 1))
    block, block_sign = _hashed(n_samples, n_blocks, random)
    within, within_sign = _hashed(n_rows, size, random)
    return (
        block[sample] * size + within[rank],
        (block_sign[sample] * within_sign[rank]).astype(np.float32),
        n_blocks * size,
    )


def _hashed(n: int, places: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A place and a sign for each of n, at random if there are more than places.

    Every place gets as many: the products of full places would be too large for the null, in
    which they meet places of any size.
    """
    if n <= places:
        return np.arange(n), np.ones(n)
    return random.permutation(n) % places, random.choice(np.array([-1.0, 1.0]), n)
