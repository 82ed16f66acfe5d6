"""The strongest paths through several sites.

    strongest    edges of consecutive sites -> paths from the first site to the last

A path's strength is the product of the shares of its pairs: of all that a feature is given while
it is active, counted without signs, the part that comes along the path. A path stands if every
pair of it has an edge that stands against the null.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mechatlas.analysis.circuits.virtual_weights import CircuitEdges

KEPT = 16
"""Best ways to a feature that are carried on."""


@dataclasses.dataclass(frozen=True)
class Path:
    """One feature of each site."""

    latents: tuple[int, ...]
    strength: float
    """Product of the shares; negative if an odd number of pairs inhibit."""
    significant: bool


def strongest_paths(
    found: Sequence[CircuitEdges], *, features: int = 8, each: int = 3, fdr: float = 0.05
) -> list[Path]:
    """The strongest paths, those that stand first.

    Args:
        found: CircuitEdges of each two consecutive sites, in the order of the network.
        features: Features of the last site that are given paths.
        each: Paths to each of them.
        rate: False discovery rate at which an edge stands.
    """
    ways: dict[int, list[Path]] = {}
    for layer, edges in enumerate(found):
        longer: dict[int, list[Path]] = {}
        for source, target, share, significant in _pairs(edges, fdr):
            before = [Path((source,), 1.0, True)] if layer == 0 else ways.get(source, [])
            longer.setdefault(target, []).extend(
                Path((*p.latents, target), p.strength * share, p.significant and significant)
                for p in before
            )
        ways = {target: sorted(paths, key=_order)[:KEPT] for target, paths in longer.items()}
    best = sorted(ways.values(), key=lambda paths: _order(paths[0]))[:features]
    return sorted((path for paths in best for path in paths[:each]), key=_order)


def _order(path: Path) -> tuple[bool, float, tuple[int, ...]]:
    return not path.significant, -abs(path.strength), path.latents


def _pairs(edges: CircuitEdges, fdr: float) -> list[tuple[int, int, float, bool]]:
    """Each pair once, with its share and whether the edge that carries most of it stands."""
    order = np.lexsort([-np.abs(edges.contribution), edges.target, edges.source])
    source, target = edges.source[order], edges.target[order]
    new = np.ones(len(order), bool)
    new[1:] = (np.diff(source) != 0) | (np.diff(target) != 0)
    return [
        (int(edges.source[k]), int(edges.target[k]), float(edges.share[k]),
         bool(edges.q_value[k] <= fdr))
        for k in order[new]
    ]  # fmt: skip
