"""Free directions of the modules of a network, one by one and together, against the whole.

Directions that are free in one module and directions that are free in another are free together
only if the modules do not interact; otherwise moving along both changes the outputs though neither
does alone, and the network has fewer free directions than its modules promise. So of two networks
that do the same, the one whose modules interact less has the smaller learning coefficient.

Here a module is a set of units, with the weights between them and their biases; weights from one
module to another belong to none. To first order, counted by ranks, free directions of modules are
always free together, and there are more of them if modules can make up for one another (`shared`);
but weights from module to module make directions of a module matter that were free without them.
What is free to first order may still be spoiled at a finite distance: `interaction` is the share of
the outputs' change that is there only when all modules move along their free directions at once.
It is zero if the modules do not interact.

Source: Bushnaq et al., Using degeneracy in the loss landscape (2024), section 5.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from torch import nn

from mechatlas.analysis.interaction.degeneracy import MAX_RANK_ENTRIES, ReLUStack, with_constant
from mechatlas.analysis.interaction.layer_maps import LayerMap
from mechatlas.analysis.interaction.statistics import Inputs
from mechatlas.base import InputError, Result
from mechatlas.maths.linalg import rank_of

STEP = 0.1
"""Length of a step of the weights of a module, relative to the length of all weights."""
N_STEPS = 8
"""Number of random steps that `interaction` is averaged over."""


@dataclasses.dataclass(frozen=True, repr=False)
class ModuleDegeneracy(Result):
    """Free directions of the modules of a network, and of all of it."""

    n_parameters: tuple[int, ...]
    """Number of weights and biases inside each module."""
    n_free: tuple[int, ...]
    """Free directions of each module while all other weights stand still."""
    n_free_together: int
    """Free directions of the weights of all modules at once: at least the sum of `n_free`."""
    n_between: int
    """Number of weights from one module to another."""
    n_free_network: int
    """Free directions of all weights of the network."""
    interaction: float
    """Share of the outputs' squared change, along free directions of all modules at once, that is
    not the sum of what each module changes alone."""

    @property
    def shared(self) -> int:
        """Number of directions that are free only because modules make up for one another."""
        return self.n_free_together - sum(self.n_free)

    def summary(self) -> str:
        """Free directions of the modules, one by one, together and in the network."""
        return (
            f"Free directions of modules {', '.join(map(str, self.n_free))}; together "
            f"{self.n_free_together}, in the network {self.n_free_network}; interaction "
            f"{self.interaction:.3g}"
        )


def count_module_degeneracy(
    network: nn.Module,
    maps: Sequence[LayerMap],
    inputs: Inputs,
    labels: Sequence[Int[np.ndarray, "..."]],
    *,
    seed: int = 0,
) -> ModuleDegeneracy:
    """Count the free directions of the modules against those of the whole.

    Args:
        network: A stack of linear and ReLU layers, small enough for all its derivatives.
        maps: Maps from the layer of its inputs to its outputs.
        inputs: Samples.
        labels: Module of each unit, layer by layer; -1 for none.
        seed: Seed of the random steps.

    Raises:
        InputError: The labels do not fit the layers, a layer is not linear or ReLU, or there are
            too many derivatives.
    """
    stack = ReLUStack.from_maps(network, maps, inputs)
    widths = [values.shape[1] for values in stack.activations]
    if [len(layer) for layer in labels] != widths:
        raise InputError(
            f"Expected labels for layers of {widths} units, got {[len(each) for each in labels]}."
        )
    if stack.n_jacobian_entries > MAX_RANK_ENTRIES:
        raise InputError(
            f"The free directions of modules need {stack.n_jacobian_entries:,} derivatives, at "
            f"most {MAX_RANK_ENTRIES:,} fit. Take fewer samples or a smaller network."
        )
    jacobian = stack.jacobian()
    module = np.concatenate([_module_of_weights(stack, i, labels) for i in range(len(maps))])
    members = [np.flatnonzero(module == label) for label in np.unique(module[module >= 0])]
    inside = np.flatnonzero(module >= 0)

    def n_free(weights: np.ndarray) -> int:
        return len(weights) - rank_of(jacobian[:, weights], stack.rank_threshold)

    return ModuleDegeneracy(
        n_parameters=tuple(map(len, members)),
        n_free=tuple(map(n_free, members)),
        n_free_together=n_free(inside),
        n_between=len(module) - len(inside),
        n_free_network=n_free(np.arange(len(module))),
        interaction=_interaction(stack, jacobian, members, seed),
    )


def _module_of_weights(
    stack: ReLUStack, number: int, labels: Sequence[np.ndarray]
) -> Int[np.ndarray, " p"]:
    """Module of each weight of a map, in the order of the Jacobian."""
    before, after = labels[number], labels[number + 1]
    module = np.where(after[:, None] == before[None, :], after[:, None], -1)
    if stack.has_bias(number):
        module = np.concatenate([module, after[:, None]], axis=1)
    return module.flatten()


def _interaction(
    stack: ReLUStack, jacobian: Float[np.ndarray, "rows p"], members: list[np.ndarray], seed: int
) -> float:
    random = np.random.default_rng(seed)
    weights = stack.weights()
    start = _outputs(stack, weights)
    spaces = [_null_space(jacobian[:, each], stack.rank_threshold) for each in members]
    not_additive = total = 0.0
    for _ in range(N_STEPS):
        steps = []
        for each, space in zip(members, spaces, strict=True):
            step = np.zeros_like(weights)
            if space.shape[1]:
                direction = space @ random.normal(size=space.shape[1])
                length = STEP * np.linalg.norm(weights) / np.linalg.norm(direction)
                step[each] = direction * length
            steps.append(step)
        alone = [_outputs(stack, weights + step) - start for step in steps]
        together = _outputs(stack, weights + np.sum(steps, axis=0)) - start
        not_additive += float(np.square(together - np.sum(alone, axis=0)).sum())
        total += float(np.square(together).sum())
    floor = float(np.square(start).sum()) * N_STEPS * np.finfo(float).eps ** 1.5
    return not_additive / total if total > floor else 0.0


def _null_space(
    rows: Float[np.ndarray, "rows p"], rank_threshold: float
) -> Float[np.ndarray, "p k"]:
    """Orthonormal directions, as columns, that are orthogonal to the rows."""
    length = np.sqrt(np.square(rows).sum(axis=0))
    scale = np.where(length > 0, length, 1.0)
    reduced = np.linalg.qr(rows / scale, mode="r") if len(rows) > rows.shape[1] else rows / scale
    _, _, right = np.linalg.svd(reduced)
    space = (right[rank_of(rows, rank_threshold) :] / scale).T
    return np.linalg.qr(space)[0] if space.size else space


def _outputs(stack: ReLUStack, weights: Float[np.ndarray, " p"]) -> Float[np.ndarray, "n o"]:
    """Outputs of the stack with other weights."""
    values, start = stack.activations[0], 0
    for number, form in enumerate(stack.forms):
        reads = with_constant(values) if stack.has_bias(number) else values
        n_units = int(form.weight.shape[0])
        stop = start + n_units * reads.shape[1]
        hidden = reads @ weights[start:stop].reshape(n_units, -1).T
        values, start = (hidden.clip(min=0) if form.relu else hidden), stop
    return values
