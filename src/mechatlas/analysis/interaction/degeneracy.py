"""How many directions of the parameters change nothing, and why.

    account        the ledger of a stack of linear and ReLU layers, exact on the samples given
    bound          a lower bound for a section of any network, from ranks alone
    hessian_rank   the rank of the Hessian of the behavioral loss, by brute force: the check

The behavioral loss is the mean squared change of the outputs. At the network itself its Hessian
is 2/n sum J^T J with J the derivative of the outputs by the parameters, so free directions are
the parameters' changes that change no output to first order.

What `account` covers. Hidden units are put into blocks of equal firing sets (the samples on which
they are above zero). For a weight matrix (biases folded) and a block B of the units it feeds,

    dead           units that never fire: all their weights
    activations    |B| (d - r_B): r_B is the rank of what B reads on the samples where it fires
    gradients      (|B| - q_B) r_B: q_B is the rank of the gradients that reach B
    joint          q_B r_B - rank of (gradient (x) activation): what both share with fewer samples

and between the weights into a block and the weights out of it

    gauge          rank of (gradient (x) activation of B itself): k^2 for a block of k units in
                   general position; min(k, ...) of these are the scale freedom that every ReLU
                   has, the rest (up to k^2 - k) are owed to synchrony. For units that always
                   fire the constant counts as a member of the block, as biases can be moved too.

No direction is counted twice: each line counts only what those above it left. These lines are all
there is in a network with one hidden layer whose blocks' functions are independent on the samples.
Otherwise they are a lower bound: functions of different blocks can depend on one another (blocks
that add up to another's firing set), and in deeper networks units can be synchronised on the part
of the samples that some later unit sees. Where the derivatives of the outputs by all weights fit
into memory their rank is taken, from activations and gradients alone, and the rest is booked

    across         dependencies between blocks and layers that no line above explains

so that the sum is exact; `tests/analysis/interaction/test_degeneracy.py` compares it with
`hessian_rank`, and shows that `across` is zero for one hidden layer with every planted cause.

Source: Bushnaq et al., Using degeneracy in the loss landscape (2024), sections 3 and 4.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechatlas.analysis.interaction.layer_maps import LayerMap, rows_of
from mechatlas.analysis.interaction.statistics import Inputs
from mechatlas.base import InputError
from mechatlas.maths.linalg import Firing, parts_of, rank_of

LARGEST = 1 << 25
"""Numbers in the largest matrix whose rank is taken; beyond it products of ranks are used."""
MOST_WORK = 1e11
"""Operations that the ranks of an account may take; beyond it there are only bounds."""


@dataclasses.dataclass(frozen=True)
class Account:
    """Free directions of one weight matrix, and of the gauge of the layer that it reads."""

    parameters: int
    dead: int
    activations: int
    gradients: int
    joint: int
    scale: int
    """Gauge: the scale of a ReLU unit, moved from its incoming to its outgoing weights."""
    synchronised: int
    """Gauge beyond scale: mixing of units that fire on the same samples."""

    @property
    def free(self) -> int:
        """All of them."""
        return (
            self.dead
            + self.activations
            + self.gradients
            + self.joint
            + self.scale
            + self.synchronised
        )


@dataclasses.dataclass(frozen=True)
class Ledger:
    """Free directions of a stack of layers, by cause."""

    entries: tuple[Account, ...]
    """One for each section."""
    across: int | None
    """Dependencies between blocks and layers; `None` if there are too many to count."""

    @property
    def free(self) -> int:
        """Free directions: exactly if `across` was counted, at least so many otherwise."""
        return sum(entry.free for entry in self.entries) + (self.across or 0)

    @property
    def parameters(self) -> int:
        """All directions."""
        return sum(entry.parameters for entry in self.entries)


def account(network: nn.Module, sections: Sequence[LayerMap], inputs: Inputs) -> Ledger | None:
    """The ledger, one entry for each section.

    Args:
        network: The network.
        sections: From the inputs' layer to the outputs; the account is exact only if the layers
            named are all there is between them.
        inputs: Samples; all activations and gradients are kept in memory.

    Returns:
        `None` unless every section is linear or linear with a ReLU, or if it is too much work.
    """
    if not all(_is_layer(section) for section in sections) or _work(sections, inputs) > MOST_WORK:
        return None
    stack = Stack(network, sections, inputs)
    entries = tuple(stack.entry(number) for number in range(len(sections)))
    if len(sections) == 1 and len(stack.blocks[0]) == 1:
        return Ledger(entries, 0)  # one block: there is nothing to depend on
    rank = stack.rank()
    if rank is None:
        return Ledger(entries, None)
    explained = sum(entry.parameters - entry.free for entry in entries)
    return Ledger(entries, explained - rank)


def _is_layer(section: LayerMap) -> bool:
    form = section.form
    return form is not None and form.is_linear_map and form.out is None and not form.skip


def _work(sections: Sequence[LayerMap], inputs: Inputs) -> float:
    """Operations of the ranks, if every unit is a block of its own."""
    shapes = [s.form.weight.shape for s in sections if s.form is not None]
    memory = len(inputs) * sum(int(units) for units, _ in shapes) * int(shapes[-1][0])
    if memory > LARGEST * 4:
        return float("inf")
    return sum(2.0 * len(inputs) * int(units) * int(width) ** 2 for units, width in shapes)


class Stack:
    """Activations and gradients of every layer of a stack of linear and ReLU layers.

    Raises:
        InputError: A section is something else, or a layer has positions.
    """

    def __init__(self, network: nn.Module, sections: Sequence[LayerMap], inputs: Inputs) -> None:
        if not all(_is_layer(section) for section in sections):
            raise InputError("The account of free directions needs linear and ReLU layers alone.")
        layers = [sections[0].source] + [s.target for s in sections]
        found = inputs.read(network, layers)
        if any(rows_of(found[layer]).shape[1] != 1 for layer in layers):
            raise InputError("The account of free directions needs layers without positions.")
        self.sections = sections
        start = found[layers[0]].detach().clone().requires_grad_()
        chain = [start]
        with torch.enable_grad():
            for section in sections:
                chain.append(section.run(chain[-1], inputs.tensor))
        outputs = chain[-1]
        gradients: list[list[np.ndarray]] = [[] for _ in chain[1:]]
        for unit in range(outputs.shape[1]):
            grads = torch.autograd.grad(outputs[:, unit].sum(), chain[1:], retain_graph=True)
            for kept, gradient in zip(gradients, grads, strict=True):
                kept.append(_numbers(gradient))
        self.values = [_numbers(layer) for layer in chain]
        self.fires = []
        for section, value in zip(sections, self.values[1:], strict=True):
            assert section.form is not None
            on = value > 0 if section.form.relu else np.ones_like(value, dtype=bool)
            self.fires.append(on)
        self.gradients = [
            np.stack(g, axis=1) * on[:, None, :]
            for g, on in zip(gradients, self.fires, strict=True)
        ]
        exponent = 18 if start.dtype == torch.float64 else 10
        self.relative = 10.0**-exponent
        self.blocks = [_blocks(on) for on in self.fires]

    def biased(self, number: int) -> bool:
        """Whether a section has biases."""
        form = self.sections[number].form
        assert form is not None
        return form.inner.bias is not None

    def read_by(self, number: int) -> np.ndarray:
        """What a weight matrix reads, with the constant for its bias."""
        values = self.values[number]
        return _with_constant(values) if self.biased(number) else values

    def entry(self, number: int) -> Account:
        """Free directions of one weight matrix, by cause."""
        reads = self.read_by(number)
        width, units = reads.shape[1], self.fires[number].shape[1]
        dead = activations = gradients = joint = 0
        for block in self.blocks[number]:
            on = self.fires[number][:, block[0]]
            if not on.any():
                dead += width * len(block)
                continue
            rank = rank_of(reads[on], self.relative)
            reach = self.gradients[number][on][:, :, block]
            reached = rank_of(reach.reshape(-1, len(block)), self.relative)
            both = self._joint(reach, reads[on], reached, rank)
            activations += len(block) * (width - rank)
            gradients += (len(block) - reached) * rank
            joint += reached * rank - both
        scale, synchronised = self._gauge(number - 1) if number else (0, 0)
        return Account(width * units, dead, activations, gradients, joint, scale, synchronised)

    def rank(self) -> int | None:
        """Rank of the derivatives of the outputs by all weights."""
        n, n_out = self.gradients[0].shape[:2]
        wide = [g.shape[2] * self.read_by(i).shape[1] for i, g in enumerate(self.gradients)]
        if n * n_out * sum(wide) > LARGEST or n * n_out * sum(wide) ** 2 > MOST_WORK / 25:
            return None
        return rank_of(self.jacobian(), self.relative)

    def jacobian(self) -> Float[np.ndarray, "rows p"]:
        """Derivatives of the outputs of all samples by all weights, each unit's bias last."""
        rows = self.gradients[0].shape[0] * self.gradients[0].shape[1]
        parts = [
            np.einsum("nok,nd->nokd", g, self.read_by(i)).reshape(rows, -1)
            for i, g in enumerate(self.gradients)
        ]
        return np.concatenate(parts, axis=1)

    def weights(self) -> Float[np.ndarray, " p"]:
        """All weights, in the order of the columns of the Jacobian."""
        found = []
        for number, section in enumerate(self.sections):
            assert section.form is not None
            whole = section.form.weight
            if self.biased(number):
                bias = section.form.inner.get_parameter("bias")
                whole = torch.cat([whole, bias[:, None]], dim=1)
            found.append(whole.detach().cpu().double().flatten().numpy())
        return np.concatenate(found)

    def _gauge(self, number: int) -> tuple[int, int]:
        """Of the hidden layer that section `number` leads to."""
        scale = synchronised = 0
        movable = self.biased(number) and self.biased(number + 1)
        for block in self.blocks[number]:
            on = self.fires[number][:, block[0]]
            if not on.any():
                continue
            own = self.values[number + 1][on][:, block]
            own = _with_constant(own) if movable and on.all() else own
            reach = self.gradients[number][on][:, :, block]
            reached = rank_of(reach.reshape(-1, len(block)), self.relative)
            shared = self._joint(reach, own, reached, rank_of(own, self.relative))
            scale += min(len(block), shared)
            synchronised += max(shared - len(block), 0)
        return scale, synchronised

    def _joint(self, reach: np.ndarray, reads: np.ndarray, reached: int, rank: int) -> int:
        """Rank of gradient (x) activation over samples and outputs."""
        if min(reached, rank) == 0:
            return 0
        if reach.shape[2] == 1:  # one unit: a gradient only weighs samples, or leaves them out
            seen = (reach != 0).any(axis=(1, 2))
            return rank if seen.all() else rank_of(reads[seen], self.relative)
        if (reach == reach[:1]).all():
            return reached * rank
        columns = reach.shape[2] * reads.shape[1]
        if reach.shape[0] * reach.shape[1] * columns > LARGEST:
            return reached * rank
        rows = np.einsum("nok,nd->nokd", reach, reads).reshape(-1, columns)
        return rank_of(rows, self.relative)


def _numbers(x: Tensor) -> np.ndarray:
    return rows_of(x)[:, 0].detach().cpu().double().numpy()


def _with_constant(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values, np.ones((len(values), 1))], axis=1)


def _blocks(fires: np.ndarray) -> list[Int[np.ndarray, " k"]]:
    firing = Firing(fires.shape[1])
    firing.add(torch.from_numpy(fires))
    labels = parts_of(firing.together)
    blocks = [np.flatnonzero(labels == label) for label in range(labels.max(initial=-1) + 1)]
    never = np.flatnonzero(labels < 0)
    return [*blocks, never] if len(never) else blocks


def bound(
    section: LayerMap, rank: int, dead: int, reached: int, width: int, blocks: int = 0
) -> Account:
    """A lower bound on the free directions of a section's first weights.

    Args:
        section: Any section.
        rank: Rank of the activations that it reads; uncentred, with the constant if it has
            biases.
        dead: Hidden units (or channels) that never fire.
        reached: Rank of the gradients at its target.
        width: Channels that it reads.
        blocks: Blocks of units with one firing set in the layer that it reads, if those units
            have weights of their own: the scale of each can be moved into this section.
    """
    form = section.form
    if form is None:
        return Account(0, 0, 0, 0, 0, 0, 0)
    taps = int(np.prod(form.inner.kernel_size)) if isinstance(form.inner, nn.Conv2d) else 1
    units = int(form.weight.shape[0])
    constant = int(form.inner.bias is not None)
    # A constant is not a null direction of a padded map, nor one for each tap.
    missing = max(width - rank, 0) * taps
    live = units - dead
    unreached = 0
    # Behind a ReLU gradients of rank one can reach all units, each on its own samples.
    if form.out is None and not form.skip and not form.relu:
        unreached = max(live - reached, 0) * (rank * taps + constant)
    return Account(
        units * (width * taps + constant),
        dead * (width * taps + constant),
        live * missing,
        unreached,
        0,
        blocks,
        0,
    )


def hessian_rank(
    network: nn.Module,
    inputs: Float[Tensor, "n *shape"],  # noqa: F821 - names of axes
    relative: float = 1e-18,
) -> tuple[int, int]:
    """Rank of the Hessian of the behavioral loss, and the number of parameters.

    Every derivative of every output by every parameter is formed, so this is for small networks
    in float64.

    Args:
        network: In evaluation mode.
        inputs: Samples.
        relative: Squared singular values below this share of the largest count as zero.
    """
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def outputs(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(network, values, (inputs,)).flatten()

    jacobian = torch.func.jacrev(outputs)(parameters)
    rows = torch.cat([j.flatten(1) for j in jacobian.values()], dim=1).double().numpy()
    return rank_of(rows, relative), rows.shape[1]
