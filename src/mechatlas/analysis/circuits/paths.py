"""Strongest paths through the features of several sites.

    strongest_paths    edges of consecutive sites -> paths from the first site to the last

A path's strength is the product of the shares of its pairs: of all
contributions to an active feature, counted without signs, the fraction that comes along the path.
A path is significant if every pair of it has an edge that is significant against the null.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mechatlas.analysis.circuits.virtual_weights import CircuitEdges

BEAM = 16
"""Best partial paths to a feature that are extended."""


@dataclasses.dataclass(frozen=True)
class CircuitPath:
    """Path through one feature of each site."""

    latents: tuple[int, ...]
    """Feature of each site, in the order of the network."""
    strength: float
    """Product of the shares; negative if an odd number of pairs inhibit."""
    significant: bool
    """Whether every pair has a significant edge."""


def strongest_paths(
    circuits: Sequence[CircuitEdges], *, features: int = 8, each: int = 3, fdr: float = 0.05
) -> list[CircuitPath]:
    """Find the strongest paths, significant ones first.

    Args:
        circuits: Edges of each two consecutive sites, in the order of the network.
        features: Features of the last site that are given paths.
        each: Paths to each of them.
        fdr: False discovery rate at which an edge counts as significant.
    """
    ways: dict[int, list[CircuitPath]] = {}
    for layer, edges in enumerate(circuits):
        longer: dict[int, list[CircuitPath]] = {}
        for source, target, share, significant in _pairs(edges, fdr):
            before = [CircuitPath((source,), 1.0, True)] if layer == 0 else ways.get(source, [])
            longer.setdefault(target, []).extend(
                CircuitPath((*p.latents, target), p.strength * share, p.significant and significant)
                for p in before
            )
        ways = {target: sorted(paths, key=_order)[:BEAM] for target, paths in longer.items()}
    best = sorted(ways.values(), key=lambda paths: _order(paths[0]))[:features]
    return sorted((path for paths in best for path in paths[:each]), key=_order)


def _order(path: CircuitPath) -> tuple[bool, float, tuple[int, ...]]:
    return not path.significant, -abs(path.strength), path.latents


def _pairs(edges: CircuitEdges, fdr: float) -> list[tuple[int, int, float, bool]]:
    """Pairs of features, each once, with its share and whether its largest edge is significant."""
    order = np.lexsort([-np.abs(edges.contribution), edges.target, edges.source])
    source, target = edges.source[order], edges.target[order]
    new = np.ones(len(order), bool)
    new[1:] = (np.diff(source) != 0) | (np.diff(target) != 0)
    return [
        (int(edges.source[k]), int(edges.target[k]), float(edges.share[k]),
         bool(edges.q_value[k] <= fdr))
        for k in order[new]
    ]  # fmt: skip
