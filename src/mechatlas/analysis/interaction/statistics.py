"""Statistics of every layer from one pass over the data, and second moments of gradients.

Inputs               samples as a tensor with their labels, in batches
LayerMoments         mean, covariance and firing of a layer; resumable
LayerMapFiring       firing of the hidden units of a layer map, for its closed form
collect_statistics   network, inputs -> moments and firing, in one pass
pullback             E[J^T A J] of a layer map, by vector-Jacobian products
output_gradients     E[J^T J] from the last layer to every other one
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, get_origin

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from mechatlas.activations.sites import read_activations
from mechatlas.analysis.interaction.derivatives import MAX_GRADIENTS, vector_jacobian_products
from mechatlas.analysis.interaction.layer_maps import (
    LayerMap,
    arrangements,
    channels_last,
    rows_of,
    taps_of,
)
from mechatlas.base import InputError, NonFiniteError, Site
from mechatlas.maths.arrays import as_tensor
from mechatlas.maths.linalg import Firing, Moments, gram, parts_of, relu_pullback, skip_pullback

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """Samples for a network, with labels and activations where there are any."""

    tensor: Tensor
    """Inputs of the network; the first axis counts samples."""
    labels: Tensor | None = None
    """Correct class of each sample."""
    activations: dict[Site, Tensor] = dataclasses.field(default_factory=dict)
    """Activations kept in memory, by site."""

    @classmethod
    def from_data(cls, data: Any) -> "Inputs":
        """Convert a tensor, an array, or a pair of inputs and labels.

        Raises:
            InputError: The data is none of these or empty, or the labels do not fit.
            NonFiniteError: A sample has a NaN or an infinity.
        """
        two = isinstance(data, tuple | list) and len(data) == 2 and np.ndim(data[0]) > 1
        inputs, labels = data if two else (data, None)
        tensor = as_tensor(inputs, None, "The inputs")
        if labels is not None:
            labels = as_tensor(labels, None, "The labels")
        if not len(tensor):
            raise InputError("There are no samples: the first axis of the inputs is empty.")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            sample = int((~tensor.isfinite()).flatten(1).any(dim=1).nonzero()[0])
            raise NonFiniteError(f"Sample {sample} of the inputs has a NaN or an infinity.")
        if labels is not None and (
            not isinstance(labels, Tensor) or labels.shape != tensor.shape[:1]
        ):
            shape = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise InputError(f"Expected one label a sample ({len(tensor)}), got {shape}.")
        return cls(tensor, None if labels is None else labels.long())

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.tensor)

    def random_subset(self, n: int, *, seed: int = 0) -> "Inputs":
        """At most `n` samples in random order; data may come sorted by class."""
        generator = torch.Generator().manual_seed(seed)
        return self[torch.randperm(len(self), generator=generator)[:n]]

    def __getitem__(self, samples: slice | Tensor) -> "Inputs":
        """Some of the samples."""
        labels = None if self.labels is None else self.labels[samples]
        activations = {site: x[samples] for site, x in self.activations.items()}
        return Inputs(self.tensor[samples], labels, activations)

    def batches(self, size: int) -> "Iterator[Inputs]":
        """Yield all samples in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def read(self, network: nn.Module, layers: Sequence[Site]) -> dict[Site, Tensor]:
        """Read arranged activations at some layers, from memory where they are kept."""
        if all(layer in self.activations for layer in layers):
            return {layer: self.activations[layer] for layer in layers}
        with torch.no_grad():
            read = read_activations(network, self.tensor, layers)
        arranged = arrangements(network, self.tensor, read)
        return {layer: arranged[layer].arrange(x) for layer, x in read.items()}

    def with_activations(
        self, network: nn.Module, layers: Sequence[Site], *, batch_size: int
    ) -> "Inputs":
        """Read activations at some layers and keep them in memory.

        Args:
            network: Network in evaluation mode.
            layers: Layers to read.
            batch_size: Number of samples in a forward pass.
        """
        parts = [batch.read(network, layers) for batch in self.batches(batch_size)]
        activations = {layer: torch.cat([part[layer] for part in parts]) for layer in layers}
        return dataclasses.replace(self, activations=activations)


NamedArrays = dict[str, np.ndarray]
"""Arrays by name, as kept in a safetensors file."""


def prefixed(name: str, arrays: NamedArrays) -> NamedArrays:
    """Put a name and a dot before the name of each array."""
    return {f"{name}.{key}": array for key, array in arrays.items()}


def unprefixed(name: str, arrays: NamedArrays) -> NamedArrays:
    """Undo `prefixed`; arrays under other names are left out."""
    start = f"{name}."
    return {k.removeprefix(start): array for k, array in arrays.items() if k.startswith(start)}


def as_arrays(result: Any) -> NamedArrays:
    """Convert a dataclass of numbers, tuples of numbers and arrays; `None` is left out."""
    return {key: np.array(each) for key, each in vars(result).items() if each is not None}


def from_arrays(kind: type[T], arrays: NamedArrays) -> T:
    """Undo `as_arrays` for a dataclass."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # pyright: ignore[reportArgumentType]
        array = arrays.get(field.name)
        if array is None or array.ndim > 1:
            values[field.name] = array
        else:
            is_tuple = get_origin(field.type) is tuple
            values[field.name] = tuple(array.tolist()) if is_tuple else array.item()
    return kind(**values)


class LayerMoments:
    """Mean and covariance of the activations of a layer, and which units fire together."""

    def __init__(self, width: int) -> None:
        self.moments, self.firing = Moments(width), Firing(width)
        self.nonnegative = True
        """Whether no activation was below zero."""
        self.has_zeros = False
        """Whether some activation was exactly zero, as after a ReLU."""

    def add(self, rows: Float[Tensor, "batch d"]) -> None:
        """Add rows of activations."""
        self.moments.add(rows)
        if self.nonnegative:
            self.nonnegative = bool((rows >= 0).all())
            self.firing.add(rows > 0)
            self.has_zeros = self.has_zeros or bool((rows == 0).any())

    def arrays(self) -> NamedArrays:
        """Convert to arrays that `from_arrays` reads."""
        flags = {"nonnegative": self.nonnegative, "has_zeros": self.has_zeros}
        return {
            **prefixed("moments", self.moments.state()),
            **prefixed("firing", self.firing.state()),
            **{name: np.array(value) for name, value in flags.items()},
        }

    @classmethod
    def from_arrays(cls, arrays: NamedArrays) -> "LayerMoments":
        """Read the arrays of `arrays`."""
        layer = cls(len(arrays["moments.mean"]))
        layer.moments = Moments.from_state(unprefixed("moments", arrays))
        layer.firing = Firing.from_state(unprefixed("firing", arrays))
        layer.nonnegative = arrays["nonnegative"].item()
        layer.has_zeros = arrays["has_zeros"].item()
        return layer


class LayerMapFiring:
    """Co-firing of the hidden units of a layer map: one count, or one for each tap of a kernel.

    Args:
        layer_map: A map with a closed form.
    """

    def __init__(self, layer_map: LayerMap) -> None:
        assert layer_map.form is not None
        self.form = layer_map.form
        self.n_rows = 0
        """Number of source positions."""
        self.units = Firing(self.form.weight.shape[0])
        """Firing at all positions."""
        self._taps: dict[tuple[int, int], Firing] = {}

    def add(self, x: Shaped[Tensor, "sample ..."]) -> None:
        """Add arranged activations of the source of the map."""
        form = self.form
        self.n_rows += rows_of(x).shape[0] * rows_of(x).shape[1]
        with torch.no_grad():
            hidden = form.inner(x)
        fires = hidden > 0 if form.relu else torch.ones_like(hidden, dtype=torch.bool)
        self.units.add(channels_last(fires).flatten(0, -2))
        if isinstance(form.inner, nn.Conv2d):
            height, width = x.shape[2:]
            for row, column, served in taps_of(form.inner, height, width):
                part = channels_last(fires)[:, served[0], served[1]]
                firing = self._taps.setdefault((row, column), Firing(self.units.width))
                firing.add(part.flatten(0, -2))

    def arrays(self) -> NamedArrays:
        """Convert to arrays that `from_arrays` reads."""
        arrays = {"n_rows": np.array(self.n_rows), **prefixed("units", self.units.state())}
        for (row, column), firing in self._taps.items():
            arrays |= prefixed(f"tap.{row}.{column}", firing.state())
        return arrays

    @classmethod
    def from_arrays(cls, layer_map: LayerMap, arrays: NamedArrays) -> "LayerMapFiring":
        """Read the arrays of `arrays`."""
        firing = cls(layer_map)
        firing.n_rows = arrays["n_rows"].item()
        firing.units = Firing.from_state(unprefixed("units", arrays))
        for name in arrays:
            if name.startswith("tap.") and name.endswith(".n"):
                _, row, column, _ = name.split(".")
                tap = Firing.from_state(unprefixed(f"tap.{row}.{column}", arrays))
                firing._taps[int(row), int(column)] = tap
        return firing

    def pullback(self, after: Float[np.ndarray, "o o"]) -> Float[np.ndarray, "d d"]:
        """E[J^T A J] for A = `after`, summed over target and averaged over source positions."""
        form = self.form
        weight = _weight(form.inner)
        if not isinstance(form.inner, nn.Conv2d):
            together = self.units.together / self.n_rows
            if form.out is None and not form.skip:
                return relu_pullback(after, weight, together)
            out = np.eye(len(weight)) if form.out is None else _weight(form.out)
            return skip_pullback(after, weight, together, out, skip=form.skip)
        pulled = np.zeros((weight.shape[1], weight.shape[1]))
        for (row, column), firing in self._taps.items():
            pulled += relu_pullback(after, weight[:, :, row, column], firing.together / self.n_rows)
        return pulled


def _weight(module: nn.Module) -> np.ndarray:
    return module.get_parameter("weight").detach().cpu().double().numpy()


def collect_statistics(
    network: nn.Module,
    inputs: Inputs,
    layers: Sequence[Site],
    maps: Sequence[LayerMap],
    *,
    batch_size: int,
) -> tuple[list[LayerMoments], list[LayerMapFiring | None]]:
    """Run the network once over all samples.

    Args:
        network: Network in evaluation mode.
        inputs: Samples.
        layers: Layers whose moments are taken.
        maps: Maps from each layer to the next.
        batch_size: Number of samples in a forward pass.

    Returns:
        Moments of each layer, and firing inside each map that has a closed form.

    Raises:
        NonFiniteError: A layer has a NaN or an infinity; the layer and batch are named.
    """
    moments: list[LayerMoments] = []
    firing = [None if m.form is None else LayerMapFiring(m) for m in maps]
    n_samples = 0
    for batch in inputs.batches(batch_size):
        activations = batch.read(network, layers)
        for number, layer in enumerate(layers):
            rows = rows_of(activations[layer]).flatten(0, 1)
            if not rows.isfinite().all():
                raise NonFiniteError(
                    f"Layer {layer} has a NaN or an infinity in samples {n_samples} to "
                    f"{n_samples + len(batch) - 1}."
                )
            if number == len(moments):
                moments.append(LayerMoments(rows.shape[1]))
            moments[number].add(rows)
        for layer_map, hidden in zip(maps, firing, strict=True):
            if hidden is not None:
                hidden.add(activations[layer_map.source])
        n_samples += len(batch)
    return moments, firing


def pullback(
    network: nn.Module,
    layer_map: LayerMap,
    inputs: Inputs,
    directions: Float[np.ndarray, "o k"],
    *,
    batch_size: int,
    gradient_probes: int | None = None,
) -> Float[np.ndarray, "d d"]:
    """E[J^T C C^T J] for C = `directions`, by vector-Jacobian products summed in float64.

    Args:
        network: Network in evaluation mode.
        layer_map: Map to differentiate.
        inputs: Samples.
        directions: Directions of the target's channels, as columns.
        batch_size: Number of samples differentiated at a time.
        gradient_probes: Random sums, as for `vector_jacobian_products`.

    Returns:
        Sum over target positions, averaged over samples and source positions.
    """
    total: np.ndarray | None = None
    n_rows = 0
    for number, batch in enumerate(inputs.batches(batch_size)):
        x = batch.read(network, [layer_map.source])[layer_map.source]
        shape = rows_of(x).shape
        if total is None:
            total = np.zeros((shape[2], shape[2]))
        products = vector_jacobian_products(
            layer_map, x, batch.tensor, directions, gradient_probes=gradient_probes, seed=number
        )
        for gradient in products:
            total += gram(gradient.flatten(0, 1))
        n_rows += shape[0] * shape[1]
    assert total is not None
    return total / n_rows


def output_gradients(
    network: nn.Module,
    maps: Sequence[LayerMap],
    maps_to_end: Sequence[LayerMap],
    inputs: Inputs,
    *,
    batch_size: int,
    gradient_probes: int | None = None,
) -> list[Float[np.ndarray, "_ _"]]:
    """E[J^T J] from the last layer to every other one.

    Args:
        network: Network in evaluation mode.
        maps: Maps from each layer to the next.
        maps_to_end: Maps from each layer to the last, used where something bypasses a layer.
        inputs: Samples.
        batch_size: Number of samples differentiated at a time.
        gradient_probes: Random sums, as for `vector_jacobian_products`.
    """
    last = inputs[:1].read(network, [maps_to_end[0].target])[maps_to_end[0].target]
    _, n_positions, width = rows_of(last).shape
    bypassed = not all(layer_map.depends_only_on_source for layer_map in maps)
    if bypassed or (gradient_probes is not None and n_positions * width > MAX_GRADIENTS):
        return [
            pullback(
                network, m, inputs, np.eye(width),
                batch_size=batch_size, gradient_probes=gradient_probes,
            )
            for m in maps_to_end
        ]  # fmt: skip
    totals: list[np.ndarray] = []
    n_rows = [0] * len(maps)
    for batch in inputs.batches(batch_size):
        chain = run_chain(maps, batch.read(network, [maps[0].source])[maps[0].source], batch.tensor)
        out = rows_of(chain[-1]).flatten(1)
        if not totals:
            totals = [np.zeros((rows_of(x).shape[2],) * 2) for x in chain[:-1]]
        for unit in range(out.shape[1]):
            gradients = torch.autograd.grad(out[:, unit].sum(), chain[:-1], retain_graph=True)
            for number, gradient in enumerate(gradients):
                totals[number] += gram(rows_of(gradient).flatten(0, 1))
        for number, x in enumerate(chain[:-1]):
            n_rows[number] += rows_of(x).shape[0] * rows_of(x).shape[1]
    return [total / n for total, n in zip(totals, n_rows, strict=True)]


def run_chain(
    maps: Sequence[LayerMap], x: Shaped[Tensor, "sample ..."], inputs: Shaped[Tensor, "batch ..."]
) -> list[Tensor]:
    """Run maps one after another, with gradients: activations of every layer.

    Args:
        maps: Maps from each layer to the next.
        x: Activations of the first layer.
        inputs: Inputs of the network for the same samples.
    """
    chain = [x.detach().clone().requires_grad_()]
    with torch.enable_grad():
        for layer_map in maps:
            chain.append(layer_map.run(chain[-1], inputs))
    return chain


def firing_counts(
    layer: LayerMoments, tolerance: float
) -> tuple[int, int, tuple[tuple[int, ...], ...]]:
    """Number of dead units and of units that always fire, and synchronized blocks.

    There are none where nothing is rectified.
    """
    if not (layer.nonnegative and layer.has_zeros):
        return 0, 0, ()
    labels = parts_of(layer.firing.together, tolerance)
    blocks = [np.flatnonzero(labels == b) for b in range(labels.max(initial=-1) + 1)]
    several = tuple(tuple(block.tolist()) for block in blocks if len(block) > 1)
    return int((labels < 0).sum()), int((layer.firing.rate == 1).sum()), several
