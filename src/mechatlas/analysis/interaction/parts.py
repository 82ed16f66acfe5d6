"""Do the free directions of a network's modules add up? An argument for modularity, measured.

    account_parts    free directions of the parts, one by one and together, against the whole

Directions that are free in one part and directions that are free in another are free together only
if the parts do not interact; otherwise moving along both changes the outputs though neither does
alone, and the network has fewer free directions than its parts promise. So of two networks that do
the same, the one whose parts interact less has the smaller learning coefficient.

Here a part is a set of units, with the weights between them and their biases; weights from one part
to another belong to none. To first order, counted by ranks, free directions of parts are always
free together, and there are more of them if the parts can make up for one another (`shared`); but
weights from part to part make directions of a part matter that were free without them. What is
free to first order may still be spoiled at a finite distance: `interplay` is the share of the
outputs' change that is there only when all parts move along their free directions at once. It is
zero if the parts do not interact.

Source: Bushnaq et al., Using degeneracy in the loss landscape (2024), section 5.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from torch import nn

from mechatlas.analysis.interaction.degeneracy import Stack
from mechatlas.analysis.interaction.layer_maps import LayerMap
from mechatlas.analysis.interaction.statistics import Inputs
from mechatlas.base import InputError
from mechatlas.maths.linalg import rank_of

DISTANCE = 0.1
"""How far the weights of a part are moved, as a share of the length of all weights."""
DRAWS = 8
"""Random moves that `interplay` is averaged over."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """Free directions of the parts of a network, and of all of it."""

    parameters: tuple[int, ...]
    """Weights and biases inside each part."""
    free: tuple[int, ...]
    """Of these, directions that change no output to first order while all else stands still."""
    together: int
    """The same, of the weights of all parts at once: at least the sum of `free`."""
    between: int
    """Weights from one part to another."""
    whole: int
    """Free directions of all weights of the network."""
    interplay: float
    """Share of the outputs' squared change, along free directions of all parts at once, that is
    not the sum of what each part changes alone."""

    @property
    def shared(self) -> int:
        """Directions that are free only because parts make up for one another."""
        return self.together - sum(self.free)


def account_parts(
    network: nn.Module,
    sections: Sequence[LayerMap],
    inputs: Inputs,
    labels: Sequence[Int[np.ndarray, "..."]],
    *,
    seed: int = 0,
) -> Parts:
    """Free directions of the parts against the whole.

    Args:
        network: A stack of linear and ReLU layers, small enough for all its derivatives.
        sections: From its inputs' layer to its outputs.
        inputs: Samples.
        labels: For each layer, the part that each of its units belongs to; -1 for none.
        seed: Of the moves.

    Raises:
        InputError: The labels do not fit the layers.
    """
    stack = Stack(network, sections, inputs)
    widths = [value.shape[1] for value in stack.values]
    if [len(part) for part in labels] != widths:
        raise InputError(
            f"Expected labels for layers of {widths} units, got {[len(part) for part in labels]}."
        )
    jacobian = stack.jacobian()
    owner = np.concatenate([_owners(stack, number, labels) for number in range(len(sections))])
    parts = [np.flatnonzero(owner == part) for part in np.unique(owner[owner >= 0])]
    free = [len(mine) - rank_of(jacobian[:, mine], stack.relative) for mine in parts]
    inside = np.flatnonzero(owner >= 0)
    return Parts(
        parameters=tuple(len(mine) for mine in parts),
        free=tuple(free),
        together=len(inside) - rank_of(jacobian[:, inside], stack.relative),
        between=len(owner) - len(inside),
        whole=len(owner) - rank_of(jacobian, stack.relative),
        interplay=_interplay(stack, sections, jacobian, parts, seed),
    )


def _owners(stack: Stack, number: int, labels: Sequence[np.ndarray]) -> Int[np.ndarray, " p"]:
    """The part that each weight of a section belongs to, in the order of the Jacobian."""
    before, after = labels[number], labels[number + 1]
    both = np.where(after[:, None] == before[None, :], after[:, None], -1)
    if stack.biased(number):
        both = np.concatenate([both, after[:, None]], axis=1)
    return both.flatten()


def _interplay(
    stack: Stack,
    sections: Sequence[LayerMap],
    jacobian: np.ndarray,
    parts: list[np.ndarray],
    seed: int,
) -> float:
    random = np.random.default_rng(seed)
    weights = stack.weights()
    start = _outputs(stack, sections, weights)
    spaces = [_null_space(jacobian[:, mine], stack.relative) for mine in parts]
    joint = alone = 0.0
    for _ in range(DRAWS):
        moves = []
        for mine, space in zip(parts, spaces, strict=True):
            move = np.zeros_like(weights)
            if space.shape[1]:
                along = space @ random.normal(size=space.shape[1])
                length = DISTANCE * np.linalg.norm(weights) / np.linalg.norm(along)
                move[mine] = along * length
            moves.append(move)
        changes = [_outputs(stack, sections, weights + move) - start for move in moves]
        every = _outputs(stack, sections, weights + np.sum(moves, axis=0)) - start
        joint += float(np.square(every - np.sum(changes, axis=0)).sum())
        alone += float(np.square(every).sum())
    floor = float(np.square(start).sum()) * DRAWS * np.finfo(float).eps ** 1.5
    return joint / alone if alone > floor else 0.0


def _null_space(rows: np.ndarray, relative: float) -> np.ndarray:
    """Orthonormal directions, as columns, that the rows do not see."""
    length = np.sqrt(np.square(rows).sum(axis=0))
    scale = np.where(length > 0, length, 1.0)
    reduced = np.linalg.qr(rows / scale, mode="r") if len(rows) > rows.shape[1] else rows / scale
    _, _, turn = np.linalg.svd(reduced)
    space = (turn[rank_of(rows, relative) :] / scale).T
    return np.linalg.qr(space)[0] if space.size else space


def _outputs(stack: Stack, sections: Sequence[LayerMap], weights: np.ndarray) -> np.ndarray:
    values, start = stack.values[0], 0
    for number, section in enumerate(sections):
        form = section.form
        assert form is not None
        reads = values
        if stack.biased(number):
            reads = np.concatenate([values, np.ones((len(values), 1))], axis=1)
        units = int(form.weight.shape[0])
        stop = start + units * reads.shape[1]
        hidden = reads @ weights[start:stop].reshape(units, -1).T
        values, start = (hidden.clip(min=0) if form.relu else hidden), stop
    return values
