"""The strongest paths are those that an enumeration of all of them gives."""

import itertools
import math

import numpy as np
import pytest

from mechatlas.analysis.circuits.paths import strongest_paths
from mechatlas.analysis.circuits.virtual_weights import CircuitEdges


def drawn(seed: int) -> CircuitEdges:
    """All pairs of four features with four, by three routes."""
    random = np.random.default_rng(seed)
    source, target, route = (a.ravel() for a in np.meshgrid(*[range(4)] * 2, range(3)))
    n = len(source)
    pair = random.uniform(-1, 1, (4, 4))
    return CircuitEdges(
        source, target, route, random.normal(size=n), random.random(n), random.normal(size=n),
        pair[source, target], random.random(n), random.random(3), 16,
    )  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
def test_paths_are_products_of_shares_and_stand_if_their_largest_edges_do(seed):
    layers = [drawn(seed), drawn(seed + 10), drawn(seed + 20)]

    def pair(edges: CircuitEdges, a: int, b: int) -> tuple[float, bool]:
        own = np.flatnonzero((edges.source == a) & (edges.target == b))
        most = own[np.abs(edges.contribution[own]).argmax()]
        return float(edges.share[most]), bool(edges.q_value[most] <= 0.4)

    every = []
    for latents in itertools.product(range(4), repeat=4):
        steps = [
            pair(e, a, b) for e, (a, b) in zip(layers, itertools.pairwise(latents), strict=True)
        ]
        every.append((all(s for _, s in steps), math.prod(w for w, _ in steps), latents))
    every.sort(key=lambda p: (not p[0], -abs(p[1]), p[2]))
    found = strongest_paths(layers, features=4, each=2, fdr=0.4)
    assert len(found) == 8
    for target in range(4):
        mine = [p for p in found if p.latents[-1] == target]
        best = [p for p in every if p[2][-1] == target][:2]
        assert [p.latents for p in mine] == [p[2] for p in best]
        assert [p.strength for p in mine] == pytest.approx([p[1] for p in best])
        assert [p.significant for p in mine] == [p[0] for p in best]
