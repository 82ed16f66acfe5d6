"""Irreps, circuits and bounds of a group-operation network over the course of its training.

    follow_training   weights at some steps, group -> TrainingCourse
    TrainingCourse    energy and neurons of each irrep, accuracy and bound at each checkpoint

Irreps of neurons and circuits are those that `prove` finds for the weights of each checkpoint.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from mechatlas.analysis.proofs.prove import prove
from mechatlas.analysis.proofs.verifier.exact import brute_force_accuracy
from mechatlas.analysis.proofs.verifier.structures import Weights
from mechatlas.base import InputError, Progress, no_progress
from mechatlas.maths.groups import Group
from mechatlas.maths.irreps import energies

PURE = 0.9
"""Least share of the variance of left, right and unembedding of a neuron inside its irrep for it
to count as a single-irrep neuron."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingCourse:
    """Energy and neurons of each irrep, accuracy and bound, at some steps of a training."""

    steps: Int[np.ndarray, " checkpoint"]
    """Steps done, ascending."""
    irreps: tuple[str, ...]
    """Name of each irrep, the trivial one first."""
    energy: Float[np.ndarray, "checkpoint irrep"]
    """Share of the variance of the weights in each irrep, mean of left, right and unembedding."""
    neurons: Int[np.ndarray, "checkpoint irrep"]
    """Number of single-irrep neurons of each irrep."""
    in_circuits: Int[np.ndarray, " checkpoint"]
    """Number of neurons that have a cell in a grid of two rho-sets; of a cluster of neurons that
    are multiples of one another, one counts."""
    accuracy: Float[np.ndarray, " checkpoint"]
    """Accuracy on all pairs, by brute force."""
    bound: Float[np.ndarray, " checkpoint"]
    """Certified accuracy, by `prove`."""
    width: int
    """Hidden neurons of the network."""

    def learned_at(self) -> dict[str, int]:
        """Find when each irrep is learned, in the order of learning.

        An irrep with single-irrep neurons at the end is learned at the first checkpoint from which
        on it has at least half of their final number.
        """
        found = {}
        for k in np.flatnonzero(self.neurons[-1]):
            enough = self.neurons[:, k] >= self.neurons[-1, k] / 2
            found[self.irreps[k]] = first_lasting(self.steps, enough)
        return dict(sorted(found.items(), key=lambda item: item[1]))


def first_lasting(steps: Int[np.ndarray, " checkpoint"], holds: np.ndarray) -> int | None:
    """Find the first step from which on something holds at every checkpoint, or None."""
    lasting = np.flatnonzero(np.logical_and.accumulate(holds[::-1])[::-1])
    return int(steps[lasting[0]]) if len(lasting) else None


def follow_training(
    snapshots: Mapping[int, Weights], group: Group, *, on_progress: Progress = no_progress
) -> TrainingCourse:
    """Measure a network at the checkpoints of its training.

    Args:
        snapshots: Weights by the number of steps done, as `on_checkpoint` of `train_group_nets`
            gives them.
        group: Group of the table.
        on_progress: Callback with the number of checkpoints measured and their total.

    Raises:
        InputError: There are no snapshots.
        NonFiniteError: A weight is NaN or infinite.
    """
    if not snapshots:
        raise InputError("snapshots must have the weights at one step or more, got none.")
    irreps, rows = group.irreps(), []
    for step in sorted(snapshots):
        weights = snapshots[step]
        bound = prove(*weights, group)
        pure = (bound.directions.shares >= PURE).all(axis=0) & (bound.directions.irrep >= 0)
        counts = np.bincount(bound.directions.irrep[pure], minlength=len(irreps))
        in_circuits = sum(len(grid.scale) for grid in bound.proof.explanation.grids)
        accuracy = brute_force_accuracy(*weights, group.table, dtype=np.float64)
        energy = np.mean([_spectrum(f, group) for f in (weights[0].T, weights[1].T, weights[2])], 0)
        rows.append((step, energy, counts, in_circuits, accuracy, bound.accuracy_bound))
        on_progress(len(rows), len(snapshots))
    steps, *columns = (np.array(column) for column in zip(*rows, strict=True))
    width = len(next(iter(snapshots.values())).unembed)
    names = tuple(irrep.name for irrep in irreps)
    return TrainingCourse(steps, names, *columns, width=width)


def _spectrum(functions: Float[np.ndarray, "neuron order"], group: Group) -> np.ndarray:
    """Share of the variance of some functions in each irrep."""
    f = np.asarray(functions, np.float64)
    spectrum = energies(f - f.mean(axis=1, keepdims=True), group.irreps()).sum(axis=0)
    return spectrum / max(float(spectrum.sum()), 1e-300)
