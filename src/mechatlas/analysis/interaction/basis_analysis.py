"""Parts of an interaction basis, each kept under a name once it is done.

    Analysis      network, samples, layers -> `run`, the parts in order
    do_part       the edges of one map in one basis, for a worker

A part is computed from the network, the samples and parts before it, so whoever has those can do
any of the others.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Int
from torch import nn

from mechatlas.analysis.interaction import bases
from mechatlas.analysis.interaction.ablation import (
    AblationCurve,
    AblationSite,
    ablate_edges,
    ablate_vectors,
    ablation_sites,
)
from mechatlas.analysis.interaction.bases import Basis, BasisKind
from mechatlas.analysis.interaction.certain_gradients import Steps, certain_gradients
from mechatlas.analysis.interaction.costs import Costs
from mechatlas.analysis.interaction.degeneracy import (
    DegeneracyCount,
    EffectiveParameters,
    NetworkDegeneracy,
    bound_degeneracy,
    count_degeneracy,
    effective_parameters,
)
from mechatlas.analysis.interaction.edges import InteractionEdges, measure_edges
from mechatlas.analysis.interaction.layer_maps import LayerMap, layer_maps, rows_of
from mechatlas.analysis.interaction.learning_coefficient import (
    LearningCoefficient,
    learning_coefficient,
)
from mechatlas.analysis.interaction.modularity import (
    find_modules,
    interaction_graph,
    module_stability,
)
from mechatlas.analysis.interaction.module_degeneracy import (
    ModuleDegeneracy,
    count_module_degeneracy,
)
from mechatlas.analysis.interaction.results import InteractionBasis, InteractionConfig, LayerResult
from mechatlas.analysis.interaction.statistics import (
    Inputs,
    LayerMapFiring,
    LayerMoments,
    NamedArrays,
    as_arrays,
    collect_statistics,
    firing_counts,
    from_arrays,
    output_gradients,
    prefixed,
    pullback,
    unprefixed,
)
from mechatlas.base import (
    Dictionary,
    Progress,
    Site,
    SiteError,
    UserError,
    no_progress,
)
from mechatlas.maths.arrays import as_array
from mechatlas.maths.linalg import cut, spectral

LATENTS = "dictionary"
"""Name of the latents of a dictionary among the bases."""
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Statistics of every layer."""

    layers: list[LayerMoments]
    firing: list[LayerMapFiring | None]
    """Firing inside each map that has a closed form."""
    gradients: list[Float[np.ndarray, "_ _"]]
    """Second moments of the gradients of the outputs, of every layer but the last."""
    n_gradient_samples: int
    """Number of samples of these gradients."""
    agreement: list[Float[np.ndarray, " _"] | None]
    """Agreement of the global bases with those from either half of these samples."""


_Pairs = dict[int, tuple[Basis, Basis]]
"""Coordinates at both ends of a layer map, by its number."""
Coordinates = dict[str, _Pairs]
"""Coordinates at both ends of every layer map, by kind of basis."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Analysis:
    """Steps of `basis`, with the network and the samples that they share."""

    model: nn.Module
    inputs: Inputs
    subset: Inputs
    """Random samples with their activations, for Jacobians and ablations."""
    sites: list[Site]
    settings: InteractionConfig
    maps: list[LayerMap]
    maps_to_end: list[LayerMap]
    costs: Costs
    kept: Callable[[str], NamedArrays | None]
    keep: Callable[[str, NamedArrays], None]
    steps: Steps

    @classmethod
    def of(
        cls,
        model: nn.Module,
        inputs: Inputs,
        sites: list[Site],
        settings: InteractionConfig,
        kept: Callable[[str], NamedArrays | None],
        keep: Callable[[str, NamedArrays], None],
        on_progress: Progress = no_progress,
    ) -> "Analysis":
        """Find the maps between the layers, and read the samples for Jacobians and ablations.

        Args:
            model: Network in evaluation mode.
            inputs: All samples.
            sites: Layers.
            settings: Settings of `basis`.
            kept: Function that reads a part kept earlier.
            keep: Function that keeps a part.
            on_progress: Callback with the number of steps done and their total.
        """
        first = inputs[:16].tensor
        maps = layer_maps(model, sites, first)
        steps = Steps(on_progress, 3 + len(maps) * (3 * len(settings.kinds) + 1))  # one is rotated
        subset = inputs.random_subset(
            max(settings.jacobian_samples, settings.ablation_samples), seed=settings.seed
        ).with_activations(model, sites, batch_size=settings.batch_size)
        maps_to_end = [layer_maps(model, [s, sites[-1]], first)[0] for s in sites[:-1]]
        return cls(
            model=model,
            inputs=inputs,
            subset=subset,
            sites=sites,
            settings=settings,
            maps=maps,
            maps_to_end=maps_to_end,
            costs=Costs(maps, maps_to_end, subset, settings),
            kept=kept,
            keep=keep,
            steps=steps,
        )

    def run(
        self,
        dictionaries: Mapping[str, Dictionary],
        on_coordinates: Callable[[Coordinates], None] = lambda _pairs: None,
    ) -> InteractionBasis:
        """Do all parts that are not kept, in order.

        Args:
            dictionaries: Dictionaries by layer.
            on_coordinates: Callback with the coordinates at both ends of every map, before their
                edges are measured.
        """
        settings = self.settings
        statistics, all_bases, pairs = self.coordinates(dictionaries)
        degeneracy = count_degeneracy(self.model, self.maps, self.inputs)
        on_coordinates(pairs)
        edges = {kind: self.edges(each, kind) for kind, each in pairs.items()}
        ablations = self.ablation_sites(pairs)
        ablated = pairs if settings.ablations else {}
        edge_curves = {k: self.ablate(k, pairs[k], edges[k], ablations) for k in ablated}
        vector_curves = {k: self.ablate(k, pairs[k], None, ablations) for k in ablated}
        layers = tuple(
            self.layer(
                number,
                statistics,
                degeneracy,
                bases=_at(all_bases, number),
                edges_by_basis=_at(edges, number),
                edge_curves=_at(edge_curves, number),
                vector_curves=_at(vector_curves, number),
            )
            for number in range(len(self.sites))
        )
        behavior = ablations[0].behavior
        return InteractionBasis(
            layers, degeneracy, behavior.measure, behavior.unchanged,
            n_ablation_samples=self.n_scored(pairs),
            n_gradient_samples=statistics.n_gradient_samples,
            **self.modules(layers),
        )  # fmt: skip

    def coordinates(
        self, dictionaries: Mapping[str, Dictionary]
    ) -> tuple[LayerStatistics, dict[str, dict[int, Basis]], Coordinates]:
        """Statistics, bases of every layer by kind, and coordinates at both ends of the maps."""
        latents = self.dictionary_bases(dictionaries)
        statistics = self.statistics()
        by_kind = {kind: self.bases(kind, statistics) for kind in self.settings.kinds}
        all_bases = {kind: dict(enumerate(each)) for kind, each in by_kind.items()}
        pairs = {k: dict(enumerate(itertools.pairwise(each))) for k, each in by_kind.items()}
        if latents:
            targets = by_kind[self.settings.kind]
            all_bases[LATENTS] = latents
            pairs[LATENTS] = {i: (source, targets[i + 1]) for i, source in latents.items()}
        return statistics, all_bases, pairs

    def n_scored(self, pairs: Coordinates) -> int:
        """Number of samples on which ablated networks are scored."""
        n_samples = min(self.settings.ablation_samples, len(self.subset))
        if not self.settings.ablations:
            return n_samples
        targets = [(i, len(to)) for each in pairs.values() for i, (_, to) in each.items()]
        return min(n_samples, *(self.costs.search_samples(*each) for each in targets))

    def ablation_sites(self, pairs: Coordinates) -> list[AblationSite]:
        """Layers where coordinates are ablated, with the samples that are scored."""
        scored, is_fvu = self.subset[: self.n_scored(pairs)], self.settings.score == "fvu"
        return ablation_sites(self.model, self.maps, self.maps_to_end, scored, fvu=is_fvu)

    def part_names(self, kind: str, number: int) -> list[str]:
        """Names of the parts about a map in one basis, which need no others of them."""
        names = ("edges", "needed", "vectors") if self.settings.ablations else ("edges",)
        return [f"{name}.{kind}.{number}" for name in names]

    def do_part(self, kind: str, number: int, dictionaries: Mapping[str, Dictionary]) -> None:
        """Measure the edges of a map in one basis, search those that are needed, and keep both."""
        _, _, pairs = self.coordinates(dictionaries)
        pair = {number: pairs[kind][number]}
        edges = self.edges(pair, kind)
        if self.settings.ablations:
            sites = self.ablation_sites(pairs)
            for each in (edges, None):
                self.ablate(kind, pair, each, sites)

    def once(self, name: str, compute: Callable[[], NamedArrays]) -> NamedArrays:
        """Arrays kept under a name, or else computed and kept."""
        arrays = self.kept(name)
        if arrays is None:
            arrays = compute()
            self.keep(name, arrays)
        return arrays

    def result(self, name: str, kind: type[T], compute: Callable[[], T]) -> T:
        """Result kept under a name, or else computed and kept."""
        return from_arrays(kind, self.once(name, lambda: as_arrays(compute())))

    def dictionary_bases(self, dictionaries: Mapping[str, Dictionary]) -> dict[int, Basis]:
        """Latents of the dictionary of a layer, by its number.

        Raises:
            SiteError: A dictionary is for a layer that does not act on a next one.
        """
        sources = {str(site): number for number, site in enumerate(self.sites[:-1])}
        if unknown := set(dictionaries) - set(sources):
            raise SiteError(
                f"There is a dictionary for {', '.join(sorted(unknown))}, but layers that act on "
                f"a next one are {', '.join(sources)}."
            )
        latents = {}
        for name, dictionary in dictionaries.items():
            site = self.sites[sources[name]]
            rows = rows_of(self.subset.read(self.model, [site])[site]).flatten(0, 1)
            latents[sources[name]] = bases.dictionary_basis(dictionary, rows)
        return latents

    def statistics(self) -> LayerStatistics:
        """Moments and firing from one pass over all samples, and gradients of the last layer."""
        settings = self.settings

        def collect() -> NamedArrays:
            layers, firing = collect_statistics(
                self.model, self.inputs, self.sites, self.maps, batch_size=settings.batch_size
            )
            arrays = {}
            for i, moments in enumerate(layers):
                arrays |= prefixed(f"layer{i}", moments.arrays())
            for i, hidden in enumerate(firing):
                arrays |= {} if hidden is None else prefixed(f"map{i}", hidden.arrays())
            return arrays

        arrays = self.once("statistics", collect)
        self.steps.step()
        named = (unprefixed(f"layer{i}", arrays) for i in range(len(self.sites)))
        layers = list(map(LayerMoments.from_arrays, named))
        gradients = self.once("gradients", lambda: self.gradients(layers))
        self.steps.step()
        return LayerStatistics(
            layers=layers,
            firing=[
                m.form and LayerMapFiring.from_arrays(m, unprefixed(f"map{i}", arrays))
                for i, m in enumerate(self.maps)
            ],
            gradients=[gradients[str(number)] for number in range(len(self.maps))],
            n_gradient_samples=int(gradients["n"].item()),  # a kept one has an axis
            agreement=[gradients.get(f"agreement{i}") for i in range(len(self.maps))],
        )

    def gradients(self, layers: list[LayerMoments]) -> NamedArrays:
        """Second moments of the gradients of the outputs, and how certain global bases are."""
        settings = self.settings
        samples = self.subset[: self.costs.output_gradient_samples()]
        n = min(max(settings.jacobian_samples // 8, 1), len(samples))

        def moments_of(part: Inputs) -> list[np.ndarray]:
            return output_gradients(
                self.model, self.maps, self.maps_to_end, part,
                batch_size=settings.batch_size, gradient_probes=settings.gradient_probes,
            )  # fmt: skip

        if "gib" not in settings.kinds or n < 2:
            gradients = moments_of(samples[:n])
            return {"n": np.array(n)} | {str(i): each for i, each in enumerate(gradients)}
        return certain_gradients(
            moments_of, samples, [layer.moments for layer in layers], n,
            rank_threshold=settings.rank_threshold, on_more=self.steps.part,
        )  # fmt: skip

    def learning_coefficient(self) -> LearningCoefficient | None:
        """Learning coefficient of the whole network, if the settings ask for it."""
        settings = self.settings
        if not settings.learning_coefficient:
            return None
        x = self.subset[: settings.jacobian_samples].tensor
        n_beta = settings.n_beta or len(x) / math.log(max(len(x), 2))
        sample = partial(learning_coefficient, self.model, x, n_beta=n_beta, seed=settings.seed)
        return self.result("learning_coefficient", LearningCoefficient, sample)

    def module_degeneracy(
        self, unit_modules: Mapping[str, Int[Any, " unit"]] | None
    ) -> ModuleDegeneracy | None:
        """Free directions of the modules of units."""
        if unit_modules is None:
            return None
        names = [str(site) for site in self.sites]
        labels = [
            as_array(unit_modules.get(name, []), "unit", f"unit_modules[{name!r}]", dtype=np.int64)
            for name in names
        ]
        seed = self.settings.seed
        return count_module_degeneracy(self.model, self.maps, self.inputs, labels, seed=seed)

    def bases(self, kind: BasisKind, statistics: LayerStatistics) -> list[Basis]:
        """Bases of every layer; the last one keeps its own units, whose meaning is known."""
        threshold = self.settings.rank_threshold
        bases_by_layer = [bases.neuron_basis(statistics.layers[-1].moments)]
        for number in reversed(range(len(self.maps))):
            moments = statistics.layers[number].moments
            if kind == "neurons":
                basis = bases.neuron_basis(moments)
            elif kind == "pca":
                basis = bases.pca_basis(moments, rank_threshold=threshold)
            else:
                gradients = (
                    self.local_gradients(number, bases_by_layer[0], statistics.firing[number])
                    if kind == "lib"
                    else statistics.gradients[number]
                )
                basis = bases.interaction_basis(
                    moments, gradients, kind=kind, rank_threshold=threshold
                )
            bases_by_layer.insert(0, basis)
        return bases_by_layer

    def local_gradients(
        self, number: int, after: Basis, firing: LayerMapFiring | None
    ) -> Float[np.ndarray, "d d"]:
        """Second moments of the gradients of the next layer's coordinates."""
        if firing is not None:
            return firing.pullback(after.to_basis @ after.to_basis.T)

        def compute() -> NamedArrays:
            gradients = pullback(
                self.model,
                self.maps[number],
                self.subset[: self.costs.gradient_samples(number, len(after))],
                after.to_basis,
                batch_size=self.settings.batch_size,
                gradient_probes=self.settings.gradient_probes,
            )
            return {"gradients": gradients}

        return self.once(f"local.{number}", compute)["gradients"]

    def edges(self, pairs: _Pairs, name: str) -> dict[int, InteractionEdges]:
        """Edges of every map between a pair of bases."""
        edges = {}
        for number, pair in pairs.items():
            samples = self.subset[: self.costs.edge_samples(number, *map(len, pair))]
            measure = partial(
                measure_edges, self.model, self.maps[number], *pair, samples,
                quadrature_points=self.settings.quadrature_points,
            )  # fmt: skip
            edges[number] = self.result(f"edges.{name}.{number}", InteractionEdges, measure)
            self.steps.step()
        return edges

    def ablate(
        self,
        kind: str,
        pairs: _Pairs,
        edges: dict[int, InteractionEdges] | None,
        sites: list[AblationSite],
    ) -> dict[int, AblationCurve]:
        """Ablation curves of the edges, or of the vectors if there are no edges, for every map."""
        drop = self.settings.max_accuracy_drop
        curves = {}
        for number, (source, target) in pairs.items():
            name, search = "vectors", partial(ablate_vectors, sites[number], source, drop)
            if edges is not None:
                each = edges[number]
                name = "needed"
                search = partial(
                    ablate_edges, sites[number], each, source, target, drop, on_try=self.steps.part
                )
            curves[number] = self.result(f"{name}.{kind}.{number}", AblationCurve, search)
            self.steps.step()
        return curves

    def layer(
        self,
        number: int,
        statistics: LayerStatistics,
        degeneracy: NetworkDegeneracy | None,
        **by_basis: Any,
    ) -> LayerResult:
        """Ranks, free directions, bases and edges of a layer."""
        layer = statistics.layers[number]
        last = number == len(self.maps)
        width, threshold = layer.moments.width, self.settings.rank_threshold
        activations = spectral(layer.moments.covariance)[0]
        gradients = np.ones(width) if last else spectral(statistics.gradients[number])[0]
        if last:
            count = DegeneracyCount()
        elif degeneracy is not None:
            count = degeneracy.layers[number]
        else:
            count = self.bound(number, statistics)
        dead_units, always_on, blocks = firing_counts(layer, self.settings.synchrony_tolerance)
        return LayerResult(
            name=str(self.sites[number]),
            width=width,
            activation_eigenvalues=activations,
            gradient_eigenvalues=gradients,
            rank_activations=cut(activations, threshold),
            rank_gradients=cut(gradients, threshold),
            dead_units=dead_units,
            always_on=always_on,
            synchronized_blocks=blocks,
            degeneracy=count,
            effective_parameters=self.effective_parameters(number, statistics),
            kind=self.settings.kind,
            map_description="" if last else self.maps[number].description,
            n_rows=layer.moments.n,
            global_agreement=None if last else statistics.agreement[number],
            **by_basis,
        )

    def bound(self, number: int, statistics: LayerStatistics) -> DegeneracyCount:
        """Lower bound on the free directions of the weights that read a layer."""
        activations, gradients = self.spectra(number, statistics)
        threshold = self.settings.rank_threshold
        return bound_degeneracy(
            self.maps[number].form,
            statistics.layers[number].moments.width,
            rank=cut(activations, threshold).rank,
            n_dead=self.n_dead(number, statistics),
            gradient_rank=cut(gradients, threshold).rank,
        )

    def effective_parameters(self, number: int, statistics: LayerStatistics) -> EffectiveParameters:
        """Effective parameters of the weights that read a layer."""
        if number == len(self.maps):
            return EffectiveParameters()
        activations, gradients = self.spectra(number, statistics)
        return effective_parameters(
            self.maps[number].form,
            activations,
            gradients,
            n_dead=self.n_dead(number, statistics),
            rank_threshold=self.settings.rank_threshold,
        )

    def spectra(
        self, number: int, statistics: LayerStatistics
    ) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " k"]]:
        """Eigenvalues of what the weights after a layer read, and of the gradients they get."""
        moments, form = statistics.layers[number].moments, self.maps[number].form
        plain = form is not None and form.is_linear_map and form.inner.bias is not None
        matrix = moments.covariance if plain else moments.second_moment
        gradients = np.ones(statistics.layers[number + 1].moments.width)
        if number + 1 < len(self.maps):
            gradients = spectral(statistics.gradients[number + 1])[0]
        return spectral(matrix)[0], gradients

    def n_dead(self, number: int, statistics: LayerStatistics) -> int:
        """Number of hidden units of a rectified map that never fire."""
        firing, form = statistics.firing[number], self.maps[number].form
        rectified = firing is not None and form is not None and form.relu
        return int((firing.units.rate == 0).sum()) if firing and rectified else 0

    def modules(self, layers: tuple[LayerResult, ...]) -> dict[str, Any]:
        """Graph of the reported basis, its modules, their stability, and Q after a rotation."""
        kind, seed, n_nulls = self.settings.kind, self.settings.seed, self.settings.n_null_graphs
        curves = [layer.edge_curves.get(kind) for layer in layers[:-1]]
        n_needed = [curve.n_needed for curve in curves if curve is not None and curve.n_needed]
        if len(n_needed) < len(self.maps):
            return {}  # some map needs no edge, or its basis all of them
        edges = [layer.edges_by_basis[kind] for layer in layers[:-1]]
        strengths, errors = [e.strength for e in edges], [e.standard_error for e in edges]
        weakest = _weakest_needed(strengths, n_needed)
        graph = interaction_graph(strengths, weakest)
        try:
            modules = find_modules(graph, seed=seed, n_null_graphs=n_nulls)
        except UserError:  # every edge is as weak as the weakest: no weight is left
            return {"graph": graph}
        rotated = [bases.rotated_basis(x.basis, seed=seed + i) for i, x in enumerate(layers)]
        pairs = dict(enumerate(itertools.pairwise([*rotated[:-1], layers[-1].basis])))
        turned = [each.strength for each in self.edges(pairs, "rotated").values()]
        null = interaction_graph(turned, _weakest_needed(turned, n_needed))
        has_edges = len(null.weight) > 0
        return {
            "graph": graph,
            "modules": modules,
            "stability": module_stability(graph, modules, strengths, errors, weakest, seed=seed),
            "rotated_q": find_modules(null, seed=seed, n_null_graphs=0).q if has_edges else None,
        }


def _at(by_kind: Mapping[str, Mapping[int, T]], number: int) -> dict[str, T]:
    """Entries for one layer, by kind of basis, where there are any."""
    return {kind: each[number] for kind, each in by_kind.items() if number in each}


def _weakest_needed(
    strengths: Sequence[Float[np.ndarray, "..."]], n_needed: Sequence[int]
) -> list[float]:
    """Strength of the weakest of the `n` strongest edges, for each layer map."""
    return [
        float(-np.partition(-strength, n - 1, axis=None)[n - 1])
        for strength, n in zip(strengths, n_needed, strict=True)
    ]
