"""Floating-point operations of an interaction basis, counted before they are done.

    Costs   maps between layers, settings -> operations, and samples that each part may take

A map with a closed form costs a few products of matrices. Any other map is run again and again:
for every random sum of gradients, for every source coordinate and quadrature point of the edges,
and in a search for every target coordinate and number of edges tried. A derivative costs as much
as a run. So runs are counted, and `max_flops` bounds those of each part by the number of samples.
"""

import dataclasses
import time
from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from mechatlas.analysis.interaction.derivatives import MAX_GRADIENTS
from mechatlas.analysis.interaction.layer_maps import LayerMap, rows_of
from mechatlas.analysis.interaction.results import InteractionConfig
from mechatlas.analysis.interaction.statistics import Inputs

MIN_SAMPLES, MIN_ROWS = 16, 256
"""Samples of each part at least, however long that takes, or samples with so many positions."""
FEWEST = 4
"""Samples of each part at least, whatever the number of positions."""
PASSES = 10
"""Runs of a map for each target coordinate in a search, of its some 30 numbers of edges."""
SLOWER = 2
"""Time of a derivative, in times of a run."""


@dataclasses.dataclass(frozen=True)
class MapCost:
    """Size of a layer map, and operations of one run."""

    is_run: bool
    """Whether the map is run for each coordinate; otherwise it has a closed form."""
    n_points: int
    """Number of quadrature points for the edges."""
    a_run: int
    """Operations of a run for one sample; with a closed form, of a product of its matrices."""
    a_run_to_end: int
    """Operations of a run to the last layer for one sample."""
    source: int
    """Width of the source."""
    target: int
    """Width of the target."""
    positions: int
    """Number of positions of the target."""


class Costs:
    """Operations of the parts of an interaction basis, and samples that each may take.

    Args:
        maps: Maps from each layer to the next.
        maps_to_end: Maps from each layer but the last to the last.
        inputs: Samples with the activations of all layers.
        settings: Settings of the basis.
    """

    def __init__(
        self,
        maps: Sequence[LayerMap],
        maps_to_end: Sequence[LayerMap],
        inputs: Inputs,
        settings: InteractionConfig,
    ) -> None:
        self.settings, self.n_samples = settings, len(inputs)
        self._layer_maps, self._samples = maps, inputs[:MIN_SAMPLES]
        one = inputs[:1]
        outputs = rows_of(one.activations[maps[-1].target]).shape
        self.n_outputs = outputs[1] * outputs[2]
        self.maps = [
            _cost_of(m, to_end, one, settings) for m, to_end in zip(maps, maps_to_end, strict=True)
        ]

    def edge_samples(self, number: int, source: int, target: int) -> int:
        """Number of samples for the edges of a map between so many coordinates."""
        cost = self.maps[number]
        return self._affordable(
            self.settings.jacobian_samples, cost, _n_derivatives(cost, source, target)
        )

    def search_samples(self, number: int, target: int) -> int:
        """Number of samples for a search for needed edges to so many coordinates."""
        cost = self.maps[number]
        return self._affordable(self.settings.ablation_samples, cost, _n_search_runs(cost, target))

    def gradient_samples(self, number: int, target: int) -> int:
        """Number of samples for gradients of so many coordinates of the next layer."""
        cost = self.maps[number]
        n_gradients = self._n_gradients(cost.positions * target)
        return self._affordable(self.settings.jacobian_samples, cost, n_gradients)

    def output_gradient_samples(self) -> int:
        """Number of samples for the gradients of the outputs, at most."""
        n, wanted = self._n_gradients(self.n_outputs), self.settings.jacobian_samples
        to_end = [dataclasses.replace(c, a_run=c.a_run_to_end) for c in self.maps]
        return min(self._affordable(wanted, cost, n) for cost in to_end)

    def seconds(self) -> float:
        """Estimate the time of all parts from runs of the maps on some samples."""
        samples, flops, seconds = self._samples, 0, 0.0
        for layer_map in self._layer_maps:
            flops += len(samples) * _flops(layer_map, samples[:1])
            clock = time.perf_counter()
            with torch.no_grad():
                layer_map.run(samples.activations[layer_map.source], samples.tensor)
            seconds += time.perf_counter() - clock
        derivatives, runs = self.operations()
        return (SLOWER * derivatives + runs) * seconds / max(flops, 1)

    def operations(self) -> tuple[int, int]:
        """Operations of all derivatives and of all searches, for bases as wide as their layers."""
        settings, costs = self.settings, self.maps
        a_gradient = self._n_gradients(self.n_outputs) * sum(c.a_run_to_end for c in costs)
        derivatives, runs = self.output_gradient_samples() * a_gradient, 0
        n_scored = min(self.search_samples(i, c.target) for i, c in enumerate(costs))
        n_searches = settings.ablations * len(settings.kinds) * n_scored
        for number, cost in enumerate(costs):
            samples = self.edge_samples(number, cost.source, cost.target)
            n_edges = samples * _n_derivatives(cost, cost.source, cost.target)
            derivatives += (len(settings.kinds) + 1) * n_edges * cost.a_run  # one is rotated
            if "lib" in settings.kinds and cost.is_run:
                samples = self.gradient_samples(number, cost.target)
                n_gradients = self._n_gradients(cost.positions * cost.target)
                derivatives += samples * n_gradients * cost.a_run
            runs += n_searches * _n_search_runs(cost, cost.target) * cost.a_run
            runs += n_searches * 2 * cost.source.bit_length() * cost.a_run_to_end
        return derivatives, runs

    def _affordable(self, wanted: int, cost: MapCost, n_runs: int) -> int:
        """Number of samples on which so many runs stay within the limit."""
        most = min(wanted, self.n_samples)
        if not cost.is_run:
            return most
        affordable = int(self.settings.max_flops / max(cost.a_run * n_runs, 1))
        least = max(min(MIN_SAMPLES, MIN_ROWS // max(cost.positions, 1)), FEWEST)
        return max(min(affordable, most), min(least, most))

    def _n_gradients(self, n_outputs: int) -> int:
        """Number of gradients that are taken of so many outputs."""
        probes = self.settings.gradient_probes
        return n_outputs if n_outputs <= MAX_GRADIENTS else probes


def _n_derivatives(cost: MapCost, source: int, target: int) -> int:
    """Number of derivatives for the edges of a map, of one sample."""
    if not cost.is_run:
        return 1
    return cost.n_points * min(source, cost.positions * target)


def _n_search_runs(cost: MapCost, target: int) -> int:
    """Number of runs of a search for needed edges to so many coordinates."""
    return PASSES * (target if cost.is_run else 1)


def _cost_of(
    layer_map: LayerMap, to_end: LayerMap, one: Inputs, settings: InteractionConfig
) -> MapCost:
    source, target = (rows_of(one.activations[s]) for s in (layer_map.source, layer_map.target))
    form = layer_map.form
    is_run = form is None or not form.is_linear_map
    a_run = _flops(layer_map, one)
    if form is not None and not is_run:  # Jacobians of every position, by products of matrices
        a_run = 2 * target.shape[1] * target.shape[2] * form.weight.numel()
    return MapCost(
        is_run=is_run,
        n_points=1 if layer_map.is_piecewise_linear else settings.quadrature_points,
        a_run=a_run,
        a_run_to_end=_flops(to_end, one),
        source=source.shape[2],
        target=target.shape[2],
        positions=target.shape[1],
    )


def _flops(layer_map: LayerMap, one: Inputs) -> int:
    """Operations of one run of a map, for one sample."""
    counter = FlopCounterMode(display=False)
    start = one.activations[layer_map.source].detach().clone().requires_grad_()
    with torch.enable_grad(), counter:  # without gradients attention may be one call, not counted
        layer_map.run(start, one.tensor)
    return counter.get_total_flops()
