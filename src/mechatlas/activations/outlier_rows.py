"""Outlier rows of a store: how many there are, what they carry, and the tokens they are of.

outliers_of_sites    shards of a store -> outlier rows of each site, kept in the manifest
find_outlier_rows    shards of one site -> `OutlierRows`
warn_of_outliers     one sentence where a few rows carry most of the variance
"""

import dataclasses
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechatlas.activations.positions import TokenSamples
from mechatlas.activations.samples import Samples
from mechatlas.activations.store import read_shard
from mechatlas.activations.store_manifest import Shard
from mechatlas.maths.outliers import farthest, norm_limit, variance_share

BYTES_SEEN = 64 << 20
"""Size of the rows of a site that are looked at; shards are shuffled, so the first ones will do."""
MOST = 0.5
"""Fraction of the variance from which on a few rows carry most of it."""
COMMONEST = 5
"""Places named."""
LEFT_OUT = "by default `train` and `evaluate` leave such rows out"
COUNTED = "`fvu_median` says more of the others than `fvu` does"
"""Endings of a warning, for outlier rows and for others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutlierPlace:
    """Place of some outlier rows: a token and its position, or a position of a map."""

    token: str | None
    """Text of the token; None where samples are not tokens."""
    position: tuple[int, int]
    """Position in the sample: (token, 0) for texts, else y and x."""
    count: int
    """Number of outlier rows there, among the rows seen."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutlierRows:
    """Rows of a site that are longer than ten median rows."""

    rows_seen: int
    """Rows that were looked at."""
    count: int
    """Outlier rows among them."""
    median_norm: float
    """Median norm of the rows."""
    variance_share: float
    """Fraction of the variance that the outlier rows carry."""
    commonest: tuple[OutlierPlace, ...]
    """Commonest places of outlier rows, at most five."""


def outliers_of_sites(
    root: Path, entries: Sequence[Sequence[Any]], samples: Samples, network: nn.Module
) -> dict[str, Any]:
    """Look for outlier rows at each site; warn where a few rows carry most of the variance.

    Args:
        root: Folder of the store.
        entries: Entries of the shards in the manifest.
        samples: Samples of the store.
        network: Network whose `input` spells tokens.

    Returns:
        For each site that has some, the fields of `OutlierRows`.
    """
    shards = [Shard(*entry) for entry in entries]
    found: dict[str, Any] = {}
    for site in dict.fromkeys(shard.site for shard in shards):
        x, where = _first_rows(
            root, [shard for shard in shards if shard.site == site and shard.split == "train"]
        )
        norms = torch.linalg.vector_norm(x, dim=1)
        outlier = norms > norm_limit(norms)
        share = variance_share(x, outlier)
        if outlier.any():
            commonest = _commonest(where[outlier], samples, network)
            values = OutlierRows(
                rows_seen=len(x),
                count=int(outlier.sum()),
                median_norm=float(norms.median()),
                variance_share=share,
                commonest=commonest,
            )
            found[site] = dataclasses.asdict(values)
            if share >= MOST:
                rows = f"{values.count:,} of {len(x):,} rows are longer than ten median rows and"
                _warn(site, rows, share, commonest, LEFT_OUT)
        if share < MOST:
            inside, places = x[~outlier], where[~outlier]
            far = farthest(inside)
            share = variance_share(inside, far)
            if share >= MOST:
                rows = f"the {int(far.sum()):,} of {len(x):,} rows farthest from the mean"
                _warn(site, rows, share, _commonest(places[far], samples, network), COUNTED)
    return found


def _first_rows(
    root: Path, shards: Sequence[Shard]
) -> tuple[Float[Tensor, "row d"], Int[Tensor, "row 3"]]:
    """Rows of the first shards of a site, and their samples and positions."""
    rows, places = [torch.zeros(0, 0)], [torch.zeros(0, 3, dtype=torch.long)]
    for shard in shards:
        if 4 * sum(part.numel() for part in rows) >= BYTES_SEEN:
            break
        x, where = read_shard(root, shard)
        rows.append(x.float())
        places.append(where)
    return torch.cat(rows[1:] or rows), torch.cat(places)


def _commonest(
    where: Int[Tensor, "row 3"], samples: Samples, network: nn.Module
) -> tuple[OutlierPlace, ...]:
    tokens = samples if isinstance(samples, TokenSamples) else None
    counts: Counter[tuple[int | None, int, int]] = Counter()
    for sample, y, x in where.tolist():
        counts[None if tokens is None else int(tokens.token_ids(sample)[y]), y, x] += 1
    decode: Any = getattr(getattr(network, "input", None), "decode", None)
    return tuple(
        OutlierPlace(
            token=None if token is None else decode([token])[0] if decode else str(token),
            position=(y, x),
            count=n,
        )
        for (token, y, x), n in counts.most_common(COMMONEST)
    )


def _warn(
    site: str, rows: str, share: float, commonest: Sequence[OutlierPlace], ending: str
) -> None:
    places = ", ".join(
        (f"{place.token!r} at " if place.token is not None else "")
        + (f"position {place.position[0]}" if not place.position[1] else f"{place.position}")
        + f" ({place.count})"
        for place in commonest[:3]
    )
    warnings.warn(
        f"At {site} {rows} carry {share:.0%} of the variance, most often {places}; {ending}.",
        stacklevel=3,
    )
