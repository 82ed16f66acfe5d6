"""Codes on paired rows: vectors by which dictionaries of any two sites can be compared.

    correlate          a dictionary and rows -> one vector a latent, whose products are correlations
    sample_block       how many numbers of such a vector belong to the same samples
    permute_samples    the null: the same codes on samples in another order

Rows of one image or text are alike: two features of dogs fire in the same images without being
one, and a few samples look like many rows. So the null never takes a sample apart.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechatlas.analysis.matching.folding import BATCH, differs, unit_rows
from mechatlas.analysis.matching.nulls import Draw, Latents
from mechatlas.base import Dictionary

SKETCH_SIZE = 4096
"""Numbers to which codes on many rows are reduced."""
MAX_SAMPLE_BLOCK = 64
"""Upper limit on the numbers that one sample's rows take, so that many samples fit."""
MIN_ACTIVE_ROWS = 10
"""Rows on which a latent must be active for its codes to be compared."""


def sample_block(samples: Int[np.ndarray, " row"] | None) -> int:
    """Count the adjacent numbers of a `correlate` vector that belong to the same samples."""
    if samples is None:
        return 1
    return min(int(np.unique(samples, return_counts=True)[1].max()), MAX_SAMPLE_BLOCK)


def permute_samples(
    x: Float[np.ndarray, "n width"], random: np.random.Generator, *, block: int = 1
) -> Draw:
    """Permute the samples under codes: a null dictionary for vectors made by `correlate`.

    Args:
        x: Codes.
        random: Generator of the order.
        block: Adjacent numbers that stay together, from `sample_block`.
    """
    order = random.permutation(x.shape[1] // block)

    def draw(latents: Latents) -> Float[np.ndarray, "some width"]:
        return x[latents].reshape(len(latents), -1, block)[:, order].reshape(len(latents), -1)

    return draw


@torch.no_grad()
def correlate(
    dictionary: Dictionary,
    x: Float[Tensor, "row d_in"],
    *,
    samples: Int[np.ndarray, " row"] | None = None,
    sketch_size: int = SKETCH_SIZE,
    min_active_rows: int = MIN_ACTIVE_ROWS,
) -> Float[np.ndarray, "latent width"]:
    """Encode rows, and center and normalize the codes of each latent.

    The squared distance of two such vectors is 2 - 2 times the correlation of two latents, so
    that dictionaries of any two sites compare that were given the same rows. Many samples are
    added up with random signs, the same for every dictionary, until about `sketch_size` numbers
    are left (a count sketch): products are kept up to an error of about 1 / sqrt(sketch_size),
    and many rows are needed to tell rare latents apart.

    Args:
        dictionary: Any; only `encode` is used.
        x: Rows of activations.
        samples: The sample that each row is of; by default each is a sample of its own.
        sketch_size: Numbers kept of each latent.
        min_active_rows: Rows on which a latent must be active to have a vector that is not zero.

    Returns:
        One vector of length 1 for each latent; zeros for latents that are hardly ever active,
        or constant.

    Source:
        Charikar, Chen, Farach-Colton, Finding frequent items in data streams (2002).
    """
    sketch = _sketch(np.arange(len(x)) if samples is None else samples, sketch_size)
    bucket, sign = torch.from_numpy(sketch.bucket), torch.from_numpy(sketch.sign)
    total = torch.zeros(sketch.width, dictionary.n_latents)
    mean = torch.zeros(dictionary.n_latents)
    active = torch.zeros(dictionary.n_latents, dtype=torch.int64)
    lowest = torch.full((dictionary.n_latents,), torch.inf)
    highest = -lowest
    for start in range(0, len(x), BATCH):
        part = slice(start, start + BATCH)
        code = dictionary.encode(x[part]).float()
        total.index_add_(0, bucket[part], code * sign[part, None])
        mean += code.sum(dim=0) / len(x)
        active += (code != 0).sum(dim=0)
        lowest = torch.minimum(lowest, code.amin(dim=0))
        highest = torch.maximum(highest, code.amax(dim=0))
    total -= torch.zeros(sketch.width).index_add_(0, bucket, sign)[:, None] * mean
    total[:, (active < min_active_rows) | ~differs(lowest, highest)] = 0
    return unit_rows(total.T.numpy())


class _Sketch(NamedTuple):
    """Bucket and sign of each row in a count sketch."""

    bucket: Int[np.ndarray, " row"]
    sign: Float[np.ndarray, " row"]
    width: int
    """Number of buckets."""


def _sketch(samples: Int[np.ndarray, " row"], size: int) -> _Sketch:
    """Give each sample a block of buckets, one for each of its rows in their order.

    Where there are more samples than blocks, whole samples are added up; where a sample has more
    rows than a block has buckets, its rows are.
    """
    random = np.random.default_rng([len(samples), size])
    _, sample, n_rows = np.unique(samples, return_inverse=True, return_counts=True)
    order = np.argsort(sample, kind="stable")
    rank = np.empty(len(sample), np.int64)
    rank[order] = np.arange(len(sample)) - np.repeat(np.cumsum(n_rows) - n_rows, n_rows)
    block_size, n_samples = sample_block(samples), len(n_rows)
    n_blocks = min(n_samples, max(size // block_size, 1))
    block, block_sign = _hash(n_samples, n_blocks, random)
    within, within_sign = _hash(int(n_rows.max()), block_size, random)
    return _Sketch(
        block[sample] * block_size + within[rank],
        (block_sign[sample] * within_sign[rank]).astype(np.float32),
        n_blocks * block_size,
    )


def _hash(
    n: int, n_buckets: int, random: np.random.Generator
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Draw a bucket and a sign for each of n, at random if there are more than buckets.

    Every bucket gets as many: the products of full buckets would be too large for the null, in
    which they meet buckets of any size.
    """
    if n <= n_buckets:
        return np.arange(n), np.ones(n)
    return random.permutation(n) % n_buckets, random.choice(np.array([-1.0, 1.0]), n)
