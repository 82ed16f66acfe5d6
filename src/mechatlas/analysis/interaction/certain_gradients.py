"""Gradients of the outputs on as many samples as the global interaction basis needs.

    certain_gradients    gradients of parts of the samples -> second moments, and their certainty
    Steps                progress in steps and in parts of them

A basis from second moments of gradients on few samples is uncertain where two coordinates are of
nearly equal importance, or where the samples differ. So it is compared with the bases from either
half of the samples, coordinate by coordinate, and the samples are doubled until those that matter
agree.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from mechatlas.analysis.interaction.bases import coordinate_agreement, interaction_basis
from mechatlas.analysis.interaction.statistics import Inputs, NamedArrays
from mechatlas.base import Progress
from mechatlas.maths.linalg import Moments

AGREEMENT = 0.9
"""Correlation of the coordinates that matter with those from half of the samples, below which
gradients are taken on more samples."""
MATTERS = 0.01
"""Share of the largest importance from which a coordinate matters."""
PARTS = 64
"""Parts of a step that progress within a search can show."""


def certain_gradients(
    moments_of: Callable[[Inputs], list[np.ndarray]],
    samples: Inputs,
    layers: Sequence[Moments],
    n: int,
    *,
    rank_threshold: float,
    on_more: Callable[[], None],
) -> NamedArrays:
    """Take second moments of gradients on at least n samples, and on more where that matters.

    Args:
        moments_of: Function that gives the second moments of the gradients at every layer but the
            last, averaged over some samples.
        samples: All samples that may be used.
        layers: Mean and covariance of the layers.
        n: Number of samples to begin with.
        rank_threshold: Share of the largest eigenvalue below which directions are left out.
        on_more: Callback when more samples are taken.

    Returns:
        The second moments by the number of the layer, the number `n` of samples, and `agreement0`,
        ...: correlation of each coordinate with that from either half, the smaller one.
    """

    def basis_of(layer: Moments, gradients: Float[np.ndarray, "d d"]):
        return interaction_basis(layer, gradients, kind="gib", rank_threshold=rank_threshold)

    middle = n // 2
    halves = [moments_of(samples[:middle]), moments_of(samples[middle:n])]
    while True:
        share = middle / n
        pooled = [share * a + (1 - share) * b for a, b in zip(*halves, strict=True)]
        agreement, enough = [], True
        for layer, whole, *parts in zip(layers, pooled, *halves, strict=False):
            basis = basis_of(layer, whole)
            agreed = np.min(
                [coordinate_agreement(layer, basis, basis_of(layer, part)) for part in parts],
                axis=0,
            )
            matters = basis.importance >= MATTERS * basis.importance.max(initial=0)
            enough &= bool((agreed[matters] >= AGREEMENT).all())
            agreement.append(agreed)
        if enough or n >= len(samples):
            break
        middle, n = n, min(2 * n, len(samples))
        halves = [pooled, moments_of(samples[middle:n])]
        on_more()
    arrays = {str(i): each for i, each in enumerate(pooled)}
    arrays |= {f"agreement{i}": each for i, each in enumerate(agreement)}
    return {**arrays, "n": np.array(n)}


class Steps:
    """Progress in steps, and in parts of a step within searches that take long.

    Args:
        on_progress: Callback with what is done and the total.
        n: Number of steps.
    """

    def __init__(self, on_progress: Progress, n: int) -> None:
        self._on_progress, self._n = on_progress, n
        self._done, self._parts = 0, 0

    def step(self) -> None:
        """Note that a step is done."""
        self._done, self._parts = min(self._done + 1, self._n), 0
        self._on_progress(self._done * PARTS, self._n * PARTS)

    def part(self) -> None:
        """Note that a part of a step is done."""
        self._parts = min(self._parts + 1, PARTS - 1)
        self._on_progress(min(self._done * PARTS + self._parts, self._n * PARTS), self._n * PARTS)
