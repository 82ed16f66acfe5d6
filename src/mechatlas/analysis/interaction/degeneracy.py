"""Number of free directions of the parameters, which change nothing, by their cause.

    count_degeneracy   a stack of linear and ReLU layers, exact on the samples given
    bound_degeneracy   lower bound for a layer map of any network, from ranks alone

The behavioral loss is the mean squared change of the outputs. At the network itself its Hessian
is 2/n sum J^T J with J the derivative of the outputs by the parameters, so free directions are
the parameters' changes that change no output to first order.

Hidden units are put into blocks of synchronized units, which fire on the same samples. For a
weight matrix (biases folded) that reads d channels and a block B of the units it feeds,

    dead units               all weights of units that never fire
    low-rank activations     |B| (d - r_B): r_B is the rank of what B reads where it fires
    low-rank gradients       (|B| - q_B) r_B: q_B is the rank of the gradients that reach B
    low-rank products        q_B r_B - rank of (gradient (x) activation), where samples are few

and between the weights into a block and the weights out of it

    ReLU scaling                   min(k, g) of a block of k units, where
                                   g = rank of (gradient (x) activation of B itself)
    synchronized nonlinearities    the rest of g: up to k^2 - k in general position

For units that always fire the constant counts as a member of the block, as biases can be moved.

No direction is counted twice: each line counts only what those above it left. These lines are all
there is in a network with one hidden layer whose blocks' functions are independent on the samples.
Otherwise they are a lower bound: functions of different blocks can depend on one another (blocks
that add up to another's firing set), and in deeper networks units can be synchronized on the part
of the samples that some later unit sees. Where the derivatives of the outputs by all weights fit
into memory their rank is taken, from activations and gradients alone, and the rest is counted as

    across blocks    dependencies between blocks and layers that no line above explains

so that the sum is exact; `tests/analysis/interaction/test_degeneracy.py` compares it with the rank
of the Hessian, and shows that the rest is zero for one hidden layer with every planted cause.

Source: Bushnaq et al., Using degeneracy in the loss landscape (2024), sections 3 and 4.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechatlas.analysis.interaction.layer_maps import LayerMap, ReLUForm, rows_of
from mechatlas.analysis.interaction.statistics import Inputs, run_chain
from mechatlas.base import InputError
from mechatlas.maths.linalg import Firing, cut, parts_of, rank_of

RESOLUTIONS = tuple(10.0**-k for k in range(2, 15))
"""Shares of the largest eigenvalue of the Hessian at which effective parameters are counted."""
MAX_RANK_ENTRIES = 1 << 25
"""Maximum number of entries of a matrix whose rank is taken; beyond, products of ranks are used."""
MAX_OPERATIONS = 1e11
"""Maximum number of operations for the exact count; beyond, there are only bounds."""


@dataclasses.dataclass(frozen=True)
class DegeneracyCount:
    """Free directions of one weight matrix, by cause; none is counted twice."""

    n_parameters: int = 0
    """Number of weights and biases."""
    dead_units: int = 0
    """Weights of units that never fire."""
    low_rank_activations: int = 0
    """Directions owed to linearly dependent activations."""
    low_rank_gradients: int = 0
    """Directions owed to linearly dependent gradients."""
    low_rank_products: int = 0
    """Directions owed to outer products of gradient and activation on too few samples."""
    relu_scaling: int = 0
    """Scale of each ReLU unit, movable from its incoming to its outgoing weights."""
    synchronized_nonlinearities: int = 0
    """Mixing of units that fire on the same samples, beyond scale."""

    @property
    def n_free(self) -> int:
        """Number of free directions."""
        return sum(dataclasses.astuple(self)[1:])

    @property
    def needs_rank(self) -> bool:
        """Whether some of them were counted by a numerical rank, which needs a threshold."""
        return bool(self.low_rank_activations or self.low_rank_gradients or self.low_rank_products)


@dataclasses.dataclass(frozen=True)
class EffectiveParameters:
    """Effective parameters of one weight matrix as a function of the resolution.

    The Hessian of the behavioral loss is taken as the product of the second moments of
    activations and of gradients, so its eigenvalues are all products of theirs. Where no
    gradients are known (behind a ReLU), those of all live units count as equal.

    Source: Bushnaq et al., Using degeneracy in the loss landscape (2024), section 2: N_eff, for a
    quadratic loss the number of eigenvalues of the Hessian above the resolution.
    """

    resolutions: tuple[float, ...] = ()
    """Resolutions epsilon, as shares of the largest eigenvalue of the Hessian."""
    n_effective: tuple[int, ...] = ()
    """N_eff at each resolution."""
    gap_decades: float = 0.0
    """Powers of ten by which the thresholds of the ranks may move without changing the count of
    free directions."""

    @property
    def has_gap(self) -> bool:
        """Whether the spectra have a gap of a decade or more, so that a count means something."""
        return self.gap_decades >= 1


@dataclasses.dataclass(frozen=True)
class NetworkDegeneracy:
    """Free directions of a stack of layers, by cause."""

    layers: tuple[DegeneracyCount, ...]
    """Count for each layer map."""
    across_blocks: int | None
    """Directions owed to dependencies between blocks and layers; `None` if not counted."""

    @property
    def n_free(self) -> int:
        """Number of free directions: exact if `across_blocks` was counted, else a lower bound."""
        return sum(layer.n_free for layer in self.layers) + (self.across_blocks or 0)

    @property
    def n_parameters(self) -> int:
        """Number of weights and biases."""
        return sum(layer.n_parameters for layer in self.layers)


def count_degeneracy(
    network: nn.Module, maps: Sequence[LayerMap], inputs: Inputs
) -> NetworkDegeneracy | None:
    """Count the free directions of a stack of linear and ReLU layers.

    Args:
        network: Network in evaluation mode.
        maps: Maps from the layer of the inputs to the outputs; the count is exact only if the
            layers named are all there is between them.
        inputs: Samples; all activations and gradients are kept in memory.

    Returns:
        The count, or `None` if a layer is something else or the count takes too long.
    """
    forms = _plain_forms(maps)
    if forms is None or _n_operations(forms, len(inputs)) > MAX_OPERATIONS:
        return None
    stack = ReLUStack.from_maps(network, maps, inputs)
    layers = tuple(stack.count(number) for number in range(len(maps)))
    if len(maps) == 1 and len(stack.blocks[0]) == 1:
        return NetworkDegeneracy(layers, 0)  # one block: there is nothing to depend on
    rank = stack.jacobian_rank()
    if rank is None:
        return NetworkDegeneracy(layers, None)
    explained = sum(layer.n_parameters - layer.n_free for layer in layers)
    return NetworkDegeneracy(layers, explained - rank)


def _plain_forms(maps: Sequence[LayerMap]) -> list[ReLUForm] | None:
    """Closed forms of the maps, if each is one linear map, with or without a ReLU."""
    forms = [m.form for m in maps]
    plain = [f for f in forms if f and f.is_linear_map and f.out is None and not f.skip]
    return plain if len(plain) == len(maps) else None


def _n_operations(forms: Sequence[ReLUForm], n_samples: int) -> float:
    """Operations of the exact count, if every unit is a block of its own."""
    shapes = [form.weight.shape for form in forms]
    memory = n_samples * sum(int(n_units) for n_units, _ in shapes) * int(shapes[-1][0])
    if memory > MAX_RANK_ENTRIES * 4:
        return float("inf")
    return sum(2.0 * n_samples * int(n_units) * int(width) ** 2 for n_units, width in shapes)


@dataclasses.dataclass(frozen=True, eq=False)
class ReLUStack:
    """Activations and gradients of every layer of a stack of linear and ReLU layers."""

    forms: list[ReLUForm]
    """Closed form of each layer map."""
    activations: list[Float[np.ndarray, "n _"]]
    """Activations of each layer."""
    fires: list[Bool[np.ndarray, "n _"]]
    """Whether each unit of each map fires."""
    gradients: list[Float[np.ndarray, "n o _"]]
    """Gradients of the outputs by the pre-activations of each map."""
    blocks: list[list[Int[np.ndarray, " _"]]]
    """Synchronized units of each map; units that never fire are the last block."""
    rank_threshold: float
    """Share of the largest squared singular value below which others count as zero."""

    @classmethod
    def from_maps(cls, network: nn.Module, maps: Sequence[LayerMap], inputs: Inputs) -> "ReLUStack":
        """Run the layers with gradients.

        Args:
            network: Network in evaluation mode.
            maps: Maps from each layer to the next.
            inputs: Samples; all activations and gradients are kept in memory.

        Raises:
            InputError: A map is not linear with or without a ReLU, or a layer has positions.
        """
        forms = _plain_forms(maps)
        if forms is None:
            raise InputError("The count of free directions needs linear and ReLU layers alone.")
        layers = [maps[0].source] + [m.target for m in maps]
        read = inputs.read(network, layers)
        if any(rows_of(read[layer]).shape[1] != 1 for layer in layers):
            raise InputError("The count of free directions needs layers without positions.")
        chain = run_chain(maps, read[layers[0]], inputs.tensor)
        activations = [_as_rows(x) for x in chain]
        by_output = [
            torch.autograd.grad(chain[-1][:, unit].sum(), chain[1:], retain_graph=True)
            for unit in range(chain[-1].shape[1])
        ]
        fires = [
            values > 0 if form.relu else np.ones_like(values, dtype=bool)
            for form, values in zip(forms, activations[1:], strict=True)
        ]
        gradients = [
            np.stack([_as_rows(g[number]) for g in by_output], axis=1) * on[:, None, :]
            for number, on in enumerate(fires)
        ]
        threshold = 1e-18 if chain[0].dtype == torch.float64 else 1e-10
        return cls(forms, activations, fires, gradients, [_blocks(on) for on in fires], threshold)

    def has_bias(self, number: int) -> bool:
        """Whether a map has biases."""
        return self.forms[number].inner.bias is not None

    def read_by(self, number: int) -> Float[np.ndarray, "n d"]:
        """Activations that a weight matrix reads, with the constant for its bias."""
        values = self.activations[number]
        return with_constant(values) if self.has_bias(number) else values

    def count(self, number: int) -> DegeneracyCount:
        """Count the free directions of one weight matrix, by cause."""
        reads = self.read_by(number)
        width, n_units = reads.shape[1], self.fires[number].shape[1]
        dead = activations = gradients = products = 0
        for block in self.blocks[number]:
            on = self.fires[number][:, block[0]]
            if not on.any():
                dead += width * len(block)
                continue
            rank = self._rank(reads[on])
            reached = self.gradients[number][on][:, :, block]
            gradient_rank = self._rank(reached.reshape(-1, len(block)))
            product_rank = self._product_rank(reached, reads[on], gradient_rank, rank)
            activations += len(block) * (width - rank)
            gradients += (len(block) - gradient_rank) * rank
            products += gradient_rank * rank - product_rank
        gauge = self._gauge(number - 1) if number else (0, 0)
        return DegeneracyCount(width * n_units, dead, activations, gradients, products, *gauge)

    @property
    def n_jacobian_entries(self) -> int:
        """Number of derivatives of the outputs of all samples by all weights."""
        n, n_out = self.gradients[0].shape[:2]
        return n * n_out * len(self.weights())

    def jacobian_rank(self) -> int | None:
        """Rank of the derivatives of the outputs by all weights; `None` if they are too many."""
        entries, n_weights = self.n_jacobian_entries, len(self.weights())
        if entries > MAX_RANK_ENTRIES or entries * n_weights > MAX_OPERATIONS / 25:
            return None
        return self._rank(self.jacobian())

    def jacobian(self) -> Float[np.ndarray, "rows p"]:
        """Derivatives of the outputs of all samples by all weights, each unit's bias last."""
        n_rows = self.gradients[0].shape[0] * self.gradients[0].shape[1]
        by_map = [
            np.einsum("nok,nd->nokd", g, self.read_by(i)).reshape(n_rows, -1)
            for i, g in enumerate(self.gradients)
        ]
        return np.concatenate(by_map, axis=1)

    def weights(self) -> Float[np.ndarray, " p"]:
        """All weights, in the order of the columns of the Jacobian."""
        by_map = []
        for number, form in enumerate(self.forms):
            weight = form.weight
            if self.has_bias(number):
                bias = form.inner.get_parameter("bias")
                weight = torch.cat([weight, bias[:, None]], dim=1)
            by_map.append(weight.detach().cpu().double().flatten().numpy())
        return np.concatenate(by_map)

    def _gauge(self, number: int) -> tuple[int, int]:
        """ReLU scaling and synchronized nonlinearities of the hidden layer after a map."""
        scaling = synchronized = 0
        movable = self.has_bias(number) and self.has_bias(number + 1)
        for block in self.blocks[number]:
            on = self.fires[number][:, block[0]]
            if not on.any():
                continue
            hidden = self.activations[number + 1][on][:, block]
            hidden = with_constant(hidden) if movable and on.all() else hidden
            reached = self.gradients[number][on][:, :, block]
            gradient_rank = self._rank(reached.reshape(-1, len(block)))
            rank = self._product_rank(reached, hidden, gradient_rank, self._rank(hidden))
            scaling += min(len(block), rank)
            synchronized += max(rank - len(block), 0)
        return scaling, synchronized

    def _rank(self, rows: Float[np.ndarray, "n d"]) -> int:
        return rank_of(rows, self.rank_threshold)

    def _product_rank(
        self,
        gradients: Float[np.ndarray, "n o k"],
        activations: Float[np.ndarray, "n d"],
        gradient_rank: int,
        activation_rank: int,
    ) -> int:
        """Rank of gradient (x) activation over samples and outputs."""
        both = gradient_rank * activation_rank
        if both == 0:
            return 0
        if gradients.shape[2] == 1:  # one unit: a gradient only weighs samples, or leaves them out
            seen = (gradients != 0).any(axis=(1, 2))
            return activation_rank if seen.all() else self._rank(activations[seen])
        if (gradients == gradients[:1]).all():
            return both
        n_columns = gradients.shape[2] * activations.shape[1]
        if gradients.shape[0] * gradients.shape[1] * n_columns > MAX_RANK_ENTRIES:
            return both
        products = np.einsum("nok,nd->nokd", gradients, activations)
        return self._rank(products.reshape(-1, n_columns))


def _as_rows(x: Tensor) -> Float[np.ndarray, "n d"]:
    return rows_of(x)[:, 0].detach().cpu().double().numpy()


def with_constant(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d_plus_1"]:
    """Rows with a constant 1 appended, for biases."""
    return np.concatenate([rows, np.ones((len(rows), 1))], axis=1)


def _blocks(fires: Bool[np.ndarray, "n h"]) -> list[Int[np.ndarray, " _"]]:
    firing = Firing(fires.shape[1])
    firing.add(torch.from_numpy(fires))
    labels = parts_of(firing.together)
    blocks = [np.flatnonzero(labels == label) for label in range(labels.max(initial=-1) + 1)]
    never = np.flatnonzero(labels < 0)
    return [*blocks, never] if len(never) else blocks


def bound_degeneracy(
    form: ReLUForm | None, width: int, *, rank: int, n_dead: int, gradient_rank: int
) -> DegeneracyCount:
    """Lower bound on the free directions of the first weights of a layer map.

    Args:
        form: Closed form of the map; without one nothing is counted.
        width: Number of channels that the map reads.
        rank: Rank of the activations that it reads; not centered, with the constant if it has
            biases.
        n_dead: Number of hidden units (or channels) that never fire.
        gradient_rank: Rank of the gradients at its target.
    """
    if form is None:
        return DegeneracyCount()
    taps = int(np.prod(form.inner.kernel_size)) if isinstance(form.inner, nn.Conv2d) else 1
    n_units = int(form.weight.shape[0])
    constant = int(form.inner.bias is not None)
    per_unit = width * taps + constant
    n_live = n_units - n_dead
    # Behind a ReLU gradients of rank one can reach all units, each on its own samples.
    linear = form.out is None and not form.skip and not form.relu
    return DegeneracyCount(
        n_parameters=n_units * per_unit,
        dead_units=n_dead * per_unit,
        # A constant is not a null direction of a padded map, nor one for each tap.
        low_rank_activations=n_live * max(width - rank, 0) * taps,
        low_rank_gradients=linear * max(n_live - gradient_rank, 0) * (rank * taps + constant),
    )


def effective_parameters(
    form: ReLUForm | None,
    activations: Float[np.ndarray, " d"],
    gradients: Float[np.ndarray, " k"],
    *,
    n_dead: int,
    rank_threshold: float,
) -> EffectiveParameters:
    """Count the effective parameters of the first weights of a layer map at every resolution.

    Args:
        form: Closed form of the map; without one nothing is counted.
        activations: Eigenvalues of the second moments of the activations that it reads.
        gradients: Eigenvalues of the second moments of the gradients at its target.
        n_dead: Number of hidden units (or channels) that never fire.
        rank_threshold: Share of the largest eigenvalue below which others count as zero.
    """
    if form is None:
        return EffectiveParameters()
    linear = form.out is None and not form.skip and not form.relu
    n_live = int(form.weight.shape[0]) - n_dead
    cuts = [cut(activations, rank_threshold)] + linear * [cut(gradients, rank_threshold)]
    gap = min(c.decades for c in cuts)
    taps = int(np.prod(form.inner.kernel_size)) if isinstance(form.inner, nn.Conv2d) else 1
    others = np.sort(gradients)[::-1][:n_live] if linear else np.ones(n_live)
    products = np.sort(np.outer(activations, others).ravel())
    limits = np.array(RESOLUTIONS) * products[-1] if len(products) else np.zeros(len(RESOLUTIONS))
    above = taps * (len(products) - np.searchsorted(products, limits, side="right"))
    return EffectiveParameters(RESOLUTIONS, tuple(above.tolist()), gap)
