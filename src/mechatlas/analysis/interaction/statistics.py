"""What one pass over the data keeps of every layer, and what is derived from it.

Inputs         the samples, whatever they came as, in batches
LayerMoments   mean, Gram matrix and firing of a layer; mergeable and resumable
SectionFiring  firing inside a section: all that its closed form needs
observe        network, inputs -> both, in one pass
pullback       E[J^T A J] of a section: closed form, or vector-Jacobian products
gradients      the same from the end of the network to every layer
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechatlas.activations.sites import channels_last, read_activations
from mechatlas.analysis.interaction.derivatives import MOST_GRADIENTS, vector_jacobian_products
from mechatlas.analysis.interaction.layer_maps import LayerMap, rows_of, taps_of
from mechatlas.base import InputError, NonFiniteError, Progress, Site, no_progress
from mechatlas.maths.linalg import Firing, Moments, gram, relu_pullback, skip_pullback


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """Samples for a network, and their labels if there are any."""

    tensor: Tensor
    labels: Tensor | None = None
    kept: dict[Site, Tensor] = dataclasses.field(default_factory=dict)
    """Activations that need not be computed again."""

    @classmethod
    def of(cls, data: object) -> "Inputs":
        """Take a tensor, an array, or a pair of inputs and labels.

        Raises:
            InputError: It is none of these, it is empty, or the labels do not fit.
            NonFiniteError: A sample has a NaN or an infinity.
        """
        inputs, labels = data if isinstance(data, tuple | list) and len(data) == 2 else (data, None)
        tensors = [
            torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in (inputs, labels)
        ]
        tensor, wanted = tensors
        if not isinstance(tensor, Tensor):
            raise InputError(
                f"Expected inputs as a tensor or array, or a pair (inputs, labels), got "
                f"{type(inputs).__name__}."
            )
        if not len(tensor):
            raise InputError("There are no samples: the first axis of the inputs is empty.")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            sample = int((~tensor.isfinite()).flatten(1).any(dim=1).nonzero()[0])
            raise NonFiniteError(f"Sample {sample} of the inputs has a NaN or an infinity.")
        if wanted is not None and (
            not isinstance(wanted, Tensor) or wanted.shape != tensor.shape[:1]
        ):
            shape = tuple(wanted.shape) if isinstance(wanted, Tensor) else type(wanted).__name__
            raise InputError(f"Expected one label a sample ({len(tensor)}), got {shape}.")
        return cls(tensor, None if wanted is None else wanted.long())

    def __len__(self) -> int:
        """How many samples."""
        return len(self.tensor)

    def first(self, n: int) -> "Inputs":
        """The first `n` of them."""
        return self._part(0, n)

    def drawn(self, n: int, *, seed: int = 0) -> "Inputs":
        """At most `n` of them in random order: those given may be sorted, by class for one."""
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:n]
        labels = None if self.labels is None else self.labels[chosen]
        return Inputs(self.tensor[chosen], labels, {k: x[chosen] for k, x in self.kept.items()})

    def _part(self, start: int, stop: int) -> "Inputs":
        labels = None if self.labels is None else self.labels[start:stop]
        kept = {site: x[start:stop] for site, x in self.kept.items()}
        return Inputs(self.tensor[start:stop], labels, kept)

    def batches(self, size: int) -> "Iterator[Inputs]":
        """All of them, in order."""
        for start in range(0, len(self.tensor), size):
            yield self._part(start, start + size)

    def read(self, network: nn.Module, layers: Sequence[Site]) -> dict[Site, Tensor]:
        """Activations at some layers, from memory where they are kept."""
        if all(layer in self.kept for layer in layers):
            return {layer: self.kept[layer] for layer in layers}
        with torch.no_grad():
            return read_activations(network, self.tensor, layers)

    def keeping(self, network: nn.Module, layers: Sequence[Site], *, size: int) -> "Inputs":
        """The same samples, with their activations at some layers kept in memory."""
        parts = [batch.read(network, layers) for batch in self.batches(size)]
        kept = {layer: torch.cat([part[layer] for part in parts]) for layer in layers}
        return Inputs(self.tensor, self.labels, kept)


Arrays = dict[str, np.ndarray]


def _named(name: str, of: Moments | Firing) -> Arrays:
    return {f"{name}.{key}": value for key, value in of.state().items()}


def part_of(state: Arrays, name: str) -> Arrays:
    """The arrays whose name starts with a name and a dot, without it."""
    start = f"{name}."
    return {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}


class LayerMoments:
    """One layer: mean and Gram matrix of its activations, and which are above zero together."""

    def __init__(self, width: int) -> None:
        self.moments, self.firing = Moments(width), Firing(width)
        self.rectified = True
        """No activation was below zero, and some were exactly zero: units can be dead."""
        self.zeros = False

    def add(self, rows: Float[Tensor, "batch d"]) -> None:
        """Take in some rows."""
        self.moments.add(rows)
        if self.rectified:
            self.rectified = bool((rows >= 0).all())
            self.firing.add(rows > 0)
            self.zeros = self.zeros or bool((rows == 0).any())

    def merge(self, other: "LayerMoments") -> None:
        """Take in what another stream has seen."""
        self.moments.merge(other.moments)
        self.firing.merge(other.firing)
        self.rectified = self.rectified and other.rectified
        self.zeros = self.zeros or other.zeros

    def state(self) -> Arrays:
        """Arrays from which `from_state` goes on."""
        flags = {"rectified": np.array(self.rectified), "zeros": np.array(self.zeros)}
        return _named("moments", self.moments) | _named("firing", self.firing) | flags

    @classmethod
    def from_state(cls, state: Arrays) -> "LayerMoments":
        """The stream as it was when `state` was called."""
        layer = cls(len(state["moments.mean"]))
        layer.moments = Moments.from_state(part_of(state, "moments"))
        layer.firing = Firing.from_state(part_of(state, "firing"))
        layer.rectified, layer.zeros = state["rectified"].item(), state["zeros"].item()
        return layer


class SectionFiring:
    """Which hidden units of a section fire together: once, or once for each tap of a kernel."""

    def __init__(self, section: LayerMap) -> None:
        form = section.form
        assert form is not None
        self.form = form
        self._taps: dict[tuple[int, int], Firing] = {}
        self.rows = 0
        """Source positions seen."""
        self.whole = Firing(form.weight.shape[0])

    def add(self, x: Tensor) -> None:
        """Take in activations of the section's source, as the network gives them."""
        form = self.form
        self.rows += rows_of(x).shape[0] * rows_of(x).shape[1]
        with torch.no_grad():
            hidden = form.inner(x)
        fires = hidden > 0 if form.relu else torch.ones_like(hidden, dtype=torch.bool)
        self.whole.add(channels_last(fires).flatten(0, -2))
        if isinstance(form.inner, nn.Conv2d):
            height, width = x.shape[2:]
            for row, column, served in taps_of(form.inner, height, width):
                part = channels_last(fires)[:, served[0], served[1]]
                tap = self._taps.setdefault((row, column), Firing(self.whole.width))
                tap.add(part.flatten(0, -2))

    def merge(self, other: "SectionFiring") -> None:
        """Take in what another stream has seen."""
        self.rows += other.rows
        self.whole.merge(other.whole)
        for place, firing in other._taps.items():
            self._taps.setdefault(place, Firing(self.whole.width)).merge(firing)

    def state(self) -> Arrays:
        """Arrays from which `from_state` goes on."""
        state = {"rows": np.array(self.rows), **_named("whole", self.whole)}
        for (row, column), firing in self._taps.items():
            state |= _named(f"tap.{row}.{column}", firing)
        return state

    @classmethod
    def from_state(cls, section: LayerMap, state: Arrays) -> "SectionFiring":
        """The stream as it was when `state` was called."""
        firing = cls(section)
        firing.rows = state["rows"].item()
        firing.whole = Firing.from_state(part_of(state, "whole"))
        for name in state:
            if name.startswith("tap.") and name.endswith(".n"):
                _, row, column, _ = name.split(".")
                part = part_of(state, f"tap.{row}.{column}")
                firing._taps[int(row), int(column)] = Firing.from_state(part)
        return firing

    def pullback(self, after: Float[np.ndarray, "o o"]) -> Float[np.ndarray, "d d"]:
        """E[J^T A J] summed over target positions and averaged over source positions."""
        form = self.form
        if not isinstance(form.inner, nn.Conv2d):
            weight = _weight(form.inner)
            together = self.whole.together / self.rows
            if form.out is None and not form.skip:
                return relu_pullback(after, weight, together)
            out = np.eye(len(weight)) if form.out is None else _weight(form.out)
            return skip_pullback(after, weight, together, out, skip=form.skip)
        weight = _weight(form.inner)
        pulled = np.zeros((weight.shape[1], weight.shape[1]))
        for (row, column), firing in self._taps.items():
            pulled += relu_pullback(after, weight[:, :, row, column], firing.together / self.rows)
        return pulled


def _weight(module: nn.Module) -> np.ndarray:
    return module.get_parameter("weight").detach().cpu().double().numpy()


def observe(
    network: nn.Module,
    inputs: Inputs,
    layers: Sequence[Site],
    sections: Sequence[LayerMap],
    *,
    batch_size: int,
    on_progress: Progress = no_progress,
) -> tuple[list[LayerMoments], list[SectionFiring | None]]:
    """One forward pass over all samples.

    Raises:
        NonFiniteError: A layer has a NaN or an infinity; the layer and batch are named.
    """
    layer_moments: list[LayerMoments] = []
    firing = [None if s.form is None else SectionFiring(s) for s in sections]
    done = 0
    for batch in inputs.batches(batch_size):
        found = batch.read(network, layers)
        for number, layer in enumerate(layers):
            rows = rows_of(found[layer]).flatten(0, 1)
            if not rows.isfinite().all():
                raise NonFiniteError(
                    f"Layer {layer} has a NaN or an infinity in samples {done} to "
                    f"{done + len(batch) - 1}."
                )
            if number == len(layer_moments):
                layer_moments.append(LayerMoments(rows.shape[1]))
            layer_moments[number].add(rows)
        for section, hidden in zip(sections, firing, strict=True):
            if hidden is not None:
                hidden.add(found[section.source])
        done += len(batch)
        on_progress(done, len(inputs))
    return layer_moments, firing


def pullback(
    network: nn.Module,
    section: LayerMap,
    inputs: Inputs,
    directions: Float[np.ndarray, "o k"],
    *,
    batch_size: int,
    sources: int | None = None,
) -> Float[np.ndarray, "d d"]:
    """E[J^T C C^T J] for C = `directions`, by vector-Jacobian products.

    Summed over target positions, averaged over samples and source positions; products of
    gradients are summed in float64.
    """
    total: np.ndarray | None = None
    rows = 0
    for number, batch in enumerate(inputs.batches(batch_size)):
        x = batch.read(network, [section.source])[section.source]
        shape = rows_of(x).shape
        if total is None:
            total = np.zeros((shape[2], shape[2]))
        products = vector_jacobian_products(
            section, x, batch.tensor, directions, sources=sources, seed=number
        )
        for gradient in products:
            total += gram(gradient.flatten(0, 1))
        rows += shape[0] * shape[1]
    assert total is not None
    return total / rows


def gradients(
    network: nn.Module,
    sections: Sequence[LayerMap],
    to_end: Sequence[LayerMap],
    inputs: Inputs,
    *,
    batch_size: int,
    sources: int | None = None,
) -> list[Float[np.ndarray, "d d"]]:
    """E[J^T J] from the last layer to every other one.

    Args:
        network: The network.
        sections: From each layer to the next.
        to_end: From each layer to the last; used where something goes around a layer, so that
            it is not counted as passing through it.
        inputs: The samples.
        batch_size: Samples at a time.
        sources: As for `vector_jacobian_products`.
    """
    positions, width = _shape_of_last(network, to_end[0], inputs)
    around = not all(section.depends_only_on_source for section in sections)
    if around or (sources is not None and positions * width > MOST_GRADIENTS):
        return [
            pullback(network, s, inputs, np.eye(width), batch_size=batch_size, sources=sources)
            for s in to_end
        ]
    totals: list[np.ndarray] = []
    rows = [0] * len(sections)
    for batch in inputs.batches(batch_size):
        x = batch.read(network, [sections[0].source])[sections[0].source]
        chain = [x.detach().clone().requires_grad_()]
        with torch.enable_grad():
            for section in sections:
                chain.append(section.run(chain[-1], batch.tensor))
        out = rows_of(chain[-1])
        flat = out.reshape(len(out), -1)
        if not totals:
            widths = [rows_of(layer).shape[2] for layer in chain[:-1]]
            totals = [np.zeros((w, w)) for w in widths]
        for unit in range(flat.shape[1]):
            found = torch.autograd.grad(flat[:, unit].sum(), chain[:-1], retain_graph=True)
            for number, gradient in enumerate(found):
                totals[number] += gram(rows_of(gradient).flatten(0, 1))
        for number, layer in enumerate(chain[:-1]):
            rows[number] += rows_of(layer).shape[0] * rows_of(layer).shape[1]
    return [total / n for total, n in zip(totals, rows, strict=True)]


def _shape_of_last(network: nn.Module, section: LayerMap, inputs: Inputs) -> tuple[int, int]:
    rows = rows_of(inputs.first(1).read(network, [section.target])[section.target])
    return rows.shape[1], rows.shape[2]
