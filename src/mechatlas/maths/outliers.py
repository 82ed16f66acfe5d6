"""Rows of activations that are far longer than the others, and carry most of the variance.

    norm_limit        lengths of rows -> the length beyond which a row is an outlier
    variance_share    the part of the variance that some rows carry
    farthest          a few rows, those farthest from the mean

Decoders write a few rows of a hundred and more median norms (first tokens, delimiters). They
dominate a fraction of variance unexplained, which then says nothing of all other tokens.

Source: Sun et al., Massive activations in large language models (2024).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

OUTLIER_NORMS = 10.0
"""Median norms beyond which a row counts as an outlier."""
LARGEST_SHARE = 0.1
"""Largest fraction of rows that can be outliers; more are a distribution with a long tail."""


def norm_limit(norms: Float[Tensor, " row"], factor: float = OUTLIER_NORMS) -> float:
    """Find the norm beyond which a row is an outlier.

    Args:
        norms: Norms of some rows.
        factor: Limit in median norms of the rows that are not zero.

    Returns:
        The limit; infinite where more than a tenth of the rows are longer.
    """
    nonzero = norms[norms > 0]
    if not len(nonzero):
        return float("inf")
    limit = factor * float(nonzero.median())
    too_many = float((norms > limit).double().mean()) > LARGEST_SHARE
    return float("inf") if too_many else limit


def farthest(x: Float[Tensor, "row d"]) -> Bool[Tensor, " row"]:
    """The twentieth of the rows that is farthest from the mean of all.

    They carry a tenth of the variance at most sites, and above half where some kind of token or
    sample writes rows of its own.
    """
    squares = torch.linalg.vector_norm(x - x.mean(dim=0), dim=1)
    far = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    far[squares.topk(len(x) // 20).indices] = True
    return far


def variance_share(x: Float[Tensor, "row d"], some: Bool[Tensor, " row"]) -> float:
    """Fraction of the sum of squares around the mean of all rows that some of them carry."""
    squares = torch.linalg.vector_norm(x - x.mean(dim=0), dim=1).double().square()
    total = float(squares.sum())
    return float(squares[some].sum()) / total if total else 0.0
