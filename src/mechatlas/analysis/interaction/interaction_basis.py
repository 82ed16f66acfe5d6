"""Degeneracy, interaction basis, edges and modules of a network, in one call.

    basis         network, data, layers -> `InteractionBasis`, with a `LayerResult` for each layer

Main path, in reading order:

    layer_maps           maps between the layers
    collect_statistics   one pass over the data: moments and firing
    count_degeneracy     free directions of the weights
    interaction_basis    from the last layer back
    measure_edges        strength of every interaction
    ablate_edges, ablate_vectors
    find_modules         modules of the graph of needed edges
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from torch import nn

from mechatlas import deprecated
from mechatlas.activations.networks import as_input
from mechatlas.activations.passes import evaluation_mode, unwrapped
from mechatlas.activations.sites import as_site
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
from mechatlas.analysis.interaction.derivatives import differentiable
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
from mechatlas.devices import refuse_half_precision
from mechatlas.maths.arrays import as_array
from mechatlas.maths.linalg import cut, spectral

LATENTS = "dictionary"
"""Name of the latents of a dictionary among the bases."""
T = TypeVar("T")


@runtime_checkable
class Checkpoints(Protocol):
    """Store of finished parts, from which an interrupted call continues."""

    def kept(self, name: str) -> NamedArrays | None:
        """Read a part; `None` if it is not there."""
        ...

    def keep(self, name: str, arrays: NamedArrays) -> None:
        """Keep a finished part."""
        ...


@deprecated.renamed_arguments
def basis(
    model: nn.Module,
    data: Any,
    layers: Sequence[str | Site],
    settings: InteractionConfig | None = None,
    *,
    dictionaries: Mapping[str, Dictionary] | None = None,
    unit_modules: Mapping[str, Int[Any, " unit"]] | None = None,
    checkpoints: Checkpoints | MutableMapping[str, NamedArrays] | None = None,
    on_progress: Progress = no_progress,
    on_costs: Callable[[Costs], None] = lambda _costs: None,
) -> InteractionBasis:
    """Find the directions that matter in some layers of a network, and how they interact.

    Args:
        model: Any module; called as `model(inputs)`, in evaluation mode.
        data: Inputs as a tensor or array, or a pair of inputs and labels.
        layers: Sites in the order in which the network reaches them; the last holds the outputs
            whose behavior counts.
        settings: Bases to compare, numbers of samples, thresholds.
        dictionaries: Dictionaries by layer. Their latents are compared with the bases, as
            "dictionary"; edges go from them to the next layer's coordinates in the basis that is
            reported.
        unit_modules: Module of each unit by layer, -1 for none, in a stack of linear and ReLU
            layers. The free directions of each module are counted.
        checkpoints: Store of finished parts; an interrupted call with the same other arguments
            continues from it. A mapping is written to and read from.
        on_progress: Callback with the number of steps done and their total.
        on_costs: Callback with what it will cost, before the work begins.

    Returns:
        A `LayerResult` for each layer, and the graph between them.

    Raises:
        SiteError: Fewer than two layers, a layer that is not there, or a wrong order.
        InputError: The data are not samples for this network, the modules do not fit it, or it
            computes in half precision.
        NonFiniteError: A NaN or an infinity, and where.

    Examples:
        >>> import torch
        >>> import mechatlas as ma
        >>> network = torch.nn.Sequential(
        ...     torch.nn.Identity(), torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)
        ... ).double()
        >>> inputs = torch.randn(100, 4, dtype=torch.float64)
        >>> config = ma.InteractionConfig(kinds=("lib",))
        >>> result = ma.basis(network, inputs, ["0", "2", "3"], config)
        >>> result["0"].to_basis.shape[0], len(result["0"].edges) <= 3
        (4, True)
    """
    settings = settings or InteractionConfig()
    if len(layers) < 2:
        raise SiteError(f"Name at least two layers, got {len(layers)}: {list(map(str, layers))}.")
    inputs = Inputs.from_data(data)
    model = unwrapped(model)
    inputs = dataclasses.replace(inputs, tensor=as_input(model, inputs.tensor))
    sites = [as_site(model, site) for site in layers]
    refuse_half_precision(model, "ranks and gradients")
    if checkpoints is None:
        checkpoints = {}
    kept, keep = (
        (checkpoints.get, checkpoints.__setitem__)
        if isinstance(checkpoints, MutableMapping)
        else (checkpoints.kept, checkpoints.keep)
    )
    with evaluation_mode(model), differentiable():
        first = inputs[:16].tensor
        maps = layer_maps(model, sites, first)
        steps = Steps(on_progress, 3 + len(maps) * (3 * len(settings.kinds) + 1))  # one is rotated
        subset = inputs.random_subset(
            max(settings.jacobian_samples, settings.ablation_samples), seed=settings.seed
        ).with_activations(model, sites, batch_size=settings.batch_size)
        maps_to_end = [layer_maps(model, [s, sites[-1]], first)[0] for s in sites[:-1]]
        costs = Costs(maps, maps_to_end, subset, settings)
        on_costs(costs)
        analysis = _Analysis(
            model=model,
            inputs=inputs,
            subset=subset,
            sites=sites,
            settings=settings,
            maps=maps,
            maps_to_end=maps_to_end,
            costs=costs,
            kept=kept,
            keep=keep,
            steps=steps,
        )
        result = analysis.run(dictionaries or {})
        return dataclasses.replace(
            result,
            learning_coefficient=analysis.learning_coefficient(),
            module_degeneracy=analysis.module_degeneracy(unit_modules),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Statistics:
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


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _Analysis:
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

    def run(self, dictionaries: Mapping[str, Dictionary]) -> InteractionBasis:
        settings = self.settings
        latents = self.dictionary_bases(dictionaries)
        statistics = self.statistics()
        degeneracy = count_degeneracy(self.model, self.maps, self.inputs)
        by_kind = {kind: self.bases(kind, statistics) for kind in settings.kinds}
        all_bases = {kind: dict(enumerate(each)) for kind, each in by_kind.items()}
        pairs = {k: dict(enumerate(itertools.pairwise(each))) for k, each in by_kind.items()}
        if latents:
            targets = by_kind[settings.kind]
            all_bases[LATENTS] = latents
            pairs[LATENTS] = {i: (source, targets[i + 1]) for i, source in latents.items()}
        edges = {kind: self.edges(each, kind) for kind, each in pairs.items()}
        targets = [(i, len(to)) for each in pairs.values() for i, (_, to) in each.items()]
        n_scored = min(self.costs.search_samples(*each) for each in targets)
        scored = self.subset[: n_scored if settings.ablations else settings.ablation_samples]
        ablations = ablation_sites(
            self.model, self.maps, self.maps_to_end, scored, fvu=settings.score == "fvu"
        )
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
            n_ablation_samples=len(scored), n_gradient_samples=statistics.n_gradient_samples,
            **self.modules(layers),
        )  # fmt: skip

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
        """Latents of the dictionary of a layer, by its number."""
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

    def statistics(self) -> _Statistics:
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
        return _Statistics(
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

    def bases(self, kind: BasisKind, statistics: _Statistics) -> list[Basis]:
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
        statistics: _Statistics,
        degeneracy: NetworkDegeneracy | None,
        **by_basis: Any,
    ) -> LayerResult:
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

    def bound(self, number: int, statistics: _Statistics) -> DegeneracyCount:
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

    def effective_parameters(self, number: int, statistics: _Statistics) -> EffectiveParameters:
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
        self, number: int, statistics: _Statistics
    ) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " k"]]:
        """Eigenvalues of what the weights after a layer read, and of the gradients they get."""
        moments, form = statistics.layers[number].moments, self.maps[number].form
        plain = form is not None and form.is_linear_map and form.inner.bias is not None
        matrix = moments.covariance if plain else moments.second_moment
        gradients = np.ones(statistics.layers[number + 1].moments.width)
        if number + 1 < len(self.maps):
            gradients = spectral(statistics.gradients[number + 1])[0]
        return spectral(matrix)[0], gradients

    def n_dead(self, number: int, statistics: _Statistics) -> int:
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
