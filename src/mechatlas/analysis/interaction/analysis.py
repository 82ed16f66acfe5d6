"""Degeneracy, interaction basis, edges and modules of a network, in one call.

    basis         network, data, layers -> `Interaction`, with one `Layer` for each layer

Main path, in reading order:

    layer_maps    what lies between the layers
    observe       one pass over the data: moments and firing
    build_bases   from the last layer back
    measure_edges, needed_edges, needed_vectors
    account       free directions of the weights
    find_modules  of the graph of needed edges
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Literal, TypeVar

import numpy as np
from jaxtyping import Float, Int
from torch import nn

from mechatlas.analysis.interaction import bases, degeneracy
from mechatlas.analysis.interaction.ablation import (
    ALLOWED_FALL,
    Behaviour,
    Needed,
    needed_edges,
    needed_vectors,
    stages_of,
)
from mechatlas.analysis.interaction.bases import KINDS, Basis, Kind
from mechatlas.analysis.interaction.degeneracy import Account, Ledger
from mechatlas.analysis.interaction.edges import Edges, measure_edges
from mechatlas.analysis.interaction.layer_maps import LayerMap, layer_maps, rows_of
from mechatlas.analysis.interaction.modularity import (
    NULLS,
    Graph,
    Modules,
    find_modules,
    graph_of,
    stability,
)
from mechatlas.analysis.interaction.statistics import (
    Arrays,
    Inputs,
    LayerMoments,
    SectionFiring,
    gradients,
    observe,
    part_of,
    pullback,
)
from mechatlas.base import Dictionary, Progress, Site, SiteError, UserError, no_progress
from mechatlas.maths.linalg import RELATIVE, Cut, cut, parts_of, spectral

CODES = "dictionary"
"""Name of the latents of a dictionary among the bases."""
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InteractionConfig:
    """How to analyse; the defaults suit networks with some hundred units a layer."""

    kinds: tuple[Kind, ...] = KINDS
    """Bases to compare. Reported is "lib" if it is among them, then "gib", then the first."""
    batch_size: int = 512
    """Samples in a forward pass."""
    jacobian_samples: int = 1024
    """Samples on which Jacobians are taken where there is no closed form, and edges measured;
    gradients of the outputs are taken on an eighth of them."""
    ablation_samples: int = 4096
    """Samples on which changed networks are scored."""
    sources: int = 64
    """Random sums over outputs that gradients are taken of, where a layer has too many outputs
    (coordinates times positions, more than 512) to take the gradient of each."""
    points: int = 3
    """Quadrature points for edges of sections that are not linear or ReLU."""
    score: Literal["answers", "numbers"] = "answers"
    """"answers": how often the largest output is right, where there is one output position and
    several channels; "numbers": one minus the fraction of variance unexplained of the outputs."""
    allowed_fall: float = ALLOWED_FALL
    """How far the score may fall."""
    relative: float = RELATIVE
    """Eigenvalues below this share of the largest count as zero."""
    synchrony: float = 0.0
    """Share of rows on which units of one block may differ; 0 is exact."""
    ablations: bool = True
    """Count needed edges and vectors; the longest part."""
    nulls: int = NULLS
    """Graphs with the same degrees that modularity is compared with."""
    seed: int = 0
    """Of Leiden, of the null graphs, of random sources, and of the samples that are chosen."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "jacobian_samples", "ablation_samples", "sources", "points"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not self.kinds:
            raise ValueError(f"kinds must name at least one of {', '.join(KINDS)}.")
        if not 0 < self.relative < 1 or not 0 <= self.synchrony < 1:
            raise ValueError("relative must be in (0, 1) and synchrony in [0, 1).")

    @property
    def kind(self) -> Kind:
        """The basis that is reported."""
        order: tuple[Kind, ...] = ("lib", "gib", *self.kinds)
        return next(kind for kind in order if kind in self.kinds)


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One layer, in every basis."""

    name: str
    width: int
    activations: Float[np.ndarray, " d"]
    """Eigenvalues of the covariance, falling."""
    gradients: Float[np.ndarray, " d"]
    """Eigenvalues of E[J^T J] to the last layer, falling."""
    rank_activations: Cut
    rank_gradients: Cut
    dead_units: int
    always_on: int
    blocks: tuple[tuple[int, ...], ...]
    """Units that fire on the same rows; only blocks of at least two."""
    account: Account
    """Of the weights that read this layer."""
    bases: dict[str, Basis]
    all_edges: dict[str, Edges]
    """To the next layer, in each basis; empty for the last layer."""
    needed: dict[str, Needed]
    """Edges to the next layer."""
    vectors: dict[str, Needed]
    kind: Kind
    how: str
    """How the section to the next layer was run."""
    rows: int
    """Rows of activations seen."""

    @property
    def limited_by_samples(self) -> bool:
        """There were too few rows to see a higher rank: what looks free may not be."""
        return self.rank_activations.rank >= self.rows - 1

    @property
    def basis(self) -> Basis:
        """The basis that is reported."""
        return self.bases[self.kind]

    @property
    def to_basis(self) -> Float[np.ndarray, "d k"]:
        """Coordinates are `(activations - mean) @ to_basis`."""
        return self.basis.to_basis

    @property
    def from_basis(self) -> Float[np.ndarray, "k d"]:
        """Activations are `coordinates @ from_basis + mean`."""
        return self.basis.from_basis

    @property
    def edges(self) -> Float[np.ndarray, "next k"] | None:
        """Strength of the edges to the next layer's coordinates; `None` for the last layer."""
        found = self.all_edges.get(self.kind)
        return None if found is None else found.strength

    @property
    def free_directions(self) -> int:
        """Directions of the weights that read this layer that change nothing."""
        return self.account.free


@dataclasses.dataclass(frozen=True, eq=False)
class Interaction:
    """What `basis` found: a sequence of layers, also by name, and the graph between them."""

    layers: tuple[Layer, ...]
    ledger: Ledger | None
    """The exact account; `None` where there are only bounds for each layer."""
    measure: str
    """What the score is: accuracy, agreement or 1 - fvu."""
    score: float
    graph: Graph | None
    modules: Modules | None
    stable: tuple[float, float] | None
    """Mean adjusted Rand index over seeds of Leiden and over edges drawn within their errors."""
    q_rotated: float | None
    """Newman's Q after a random rotation of the bases, with as many edges."""

    def __len__(self) -> int:
        """How many layers."""
        return len(self.layers)

    def __getitem__(self, which: int | str) -> Layer:
        """A layer by number or name.

        Raises:
            KeyError: There is no layer of that name.
        """
        if isinstance(which, int):
            return self.layers[which]
        for layer in self.layers:
            if layer.name == which:
                return layer
        raise KeyError(f"no layer {which!r}; there are {', '.join(x.name for x in self.layers)}")


def basis(
    model: nn.Module,
    data: object,
    layers: Sequence[str | Site],
    how: InteractionConfig | None = None,
    *,
    dictionaries: Mapping[str, Dictionary] | None = None,
    kept: MutableMapping[str, Arrays] | None = None,
    on_progress: Progress = no_progress,
) -> Interaction:
    """Find the directions that matter in some layers of a network, and how they interact.

    Args:
        model: Any module; called as `model(inputs)`, in evaluation mode.
        data: Inputs as a tensor or array, or a pair of inputs and labels.
        layers: Sites in the order in which the network reaches them; the last holds the outputs
            whose behaviour counts.
        how: Settings.
        dictionaries: By layer: their latents are compared with the bases, as "dictionary"; edges
            go from them to the next layer's coordinates in the basis that is reported.
        kept: What an earlier call with the same arguments has finished is taken from here, and
            what this one finishes is put here; a mapping that writes files makes it resumable.
        on_progress: Told how much is done.

    Returns:
        One `Layer` for each layer, and the graph between them.

    Raises:
        SiteError: Fewer than two layers, a layer that is not there, or a wrong order.
        InputError: The data are not samples for this network.
        NonFiniteError: A NaN or an infinity, and where.
    """
    how = how or InteractionConfig()
    if len(layers) < 2:
        raise SiteError(f"Name at least two layers, got {len(layers)}: {list(map(str, layers))}.")
    inputs = Inputs.of(data)
    sites = [site if isinstance(site, Site) else Site.parse(site) for site in layers]
    trained = [m for m in model.modules() if m.training]
    model.eval()
    try:
        kept = {} if kept is None else kept
        return _Analysis(model, inputs, sites, how, kept, on_progress).run(dictionaries or {})
    finally:
        for module in trained:
            module.training = True


class _Analysis:
    """The steps of `basis`, with what they share."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        sites: list[Site],
        how: InteractionConfig,
        kept: MutableMapping[str, Arrays],
        on_progress: Progress,
    ) -> None:
        self.model, self.inputs, self.sites, self.how = model, inputs, sites, how
        self.kept = kept
        few = inputs.tensor[: min(16, len(inputs))]
        self.sections = layer_maps(model, sites, few)
        self.to_end = [layer_maps(model, [s, sites[-1]], few)[0] for s in sites[:-1]]
        several = inputs.drawn(max(how.jacobian_samples, how.ablation_samples), seed=how.seed)
        self.several = several.keeping(model, sites, size=how.batch_size)
        self.some = self.several.first(how.jacobian_samples)
        self.fewer = self.several.first(max(how.jacobian_samples // 8, 1))
        self.progress = on_progress
        self.steps = 3 + 2 * len(self.sections) * len(how.kinds)
        self.done = 0

    def step(self) -> None:
        self.done += 1
        self.progress(min(self.done, self.steps), self.steps)

    def once(self, name: str, make: Callable[[], Arrays]) -> Arrays:
        """What was kept under a name, or else make it and keep it."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]

    def needed_of(self, name: str, make: Callable[[], Needed]) -> Needed:
        """The same for the end of a search."""
        return Needed.from_state(self.once(name, lambda: make().state()))

    def observe(self) -> None:
        """One pass over all samples."""

        def seen() -> Arrays:
            layers, firing = observe(
                self.model, self.inputs, self.sites, self.sections, batch_size=self.how.batch_size
            )
            whole = {
                f"layer{i}.{k}": v for i, of in enumerate(layers) for k, v in of.state().items()
            }
            for i, of in enumerate(firing):
                state = {} if of is None else of.state()
                whole |= {f"section{i}.{k}": v for k, v in state.items()}
            return whole

        found = self.once("statistics", seen)
        self.layers = [
            LayerMoments.from_state(part_of(found, f"layer{i}")) for i in range(len(self.sites))
        ]
        self.firing = [
            None if s.form is None else SectionFiring.from_state(s, part_of(found, f"section{i}"))
            for i, s in enumerate(self.sections)
        ]
        self.step()

    def pull(self) -> None:
        """Gradients of the last layer, to every other one."""

        def made() -> Arrays:
            found = gradients(
                self.model,
                self.sections,
                self.to_end,
                self.fewer,
                batch_size=self.how.batch_size,
                sources=self.how.sources,
            )
            return {str(number): pulled for number, pulled in enumerate(found)}

        found = self.once("gradients", made)
        self.pulled = [found[str(number)] for number in range(len(self.sections))]
        self.step()

    def run(self, dictionaries: Mapping[str, Dictionary]) -> Interaction:
        how = self.how
        sources = self.sites[:-1]
        strangers = set(dictionaries) - {str(site) for site in sources}
        if strangers:
            raise SiteError(
                f"There is a dictionary for {', '.join(sorted(strangers))}, but layers that act on "
                f"a next one are {', '.join(map(str, sources))}."
            )
        codes = {
            str(site): self.coded(dictionaries[str(site)], site)
            for site in sources
            if str(site) in dictionaries
        }
        self.observe()
        self.pull()
        ledger = degeneracy.account(self.model, self.sections, self.inputs)
        stages = stages_of(
            self.model,
            self.sections,
            self.to_end,
            self.several.first(how.ablation_samples),
            as_numbers=how.score == "numbers",
        )
        bases_of = {kind: self.bases(kind) for kind in how.kinds}
        pairs: dict[str, list[tuple[Basis, Basis] | None]] = {
            kind: list(itertools.pairwise(found)) for kind, found in bases_of.items()
        }
        if dictionaries:
            after = bases_of[how.kind][1:]
            pairs[CODES] = [
                (codes[str(site)], target) if str(site) in codes else None
                for site, target in zip(sources, after, strict=True)
            ]
        edges_of = {kind: self.edges(found, kind) for kind, found in pairs.items()}
        needed: dict[str, list[Needed | None]] = {kind: [] for kind in pairs}
        vectors: dict[str, list[Needed | None]] = {kind: [] for kind in pairs}
        for kind in pairs if how.ablations else ():
            for number, stage in enumerate(stages):
                pair, found = pairs[kind][number], edges_of[kind][number]
                if pair is None or found is None:
                    needed[kind].append(None)
                    vectors[kind].append(None)
                    continue
                edges = partial(needed_edges, stage, found, *pair, how.allowed_fall)
                coordinates = partial(needed_vectors, stage, pair[0], how.allowed_fall)
                needed[kind].append(self.needed_of(f"needed.{kind}.{number}", edges))
                vectors[kind].append(self.needed_of(f"vectors.{kind}.{number}", coordinates))
                self.step()
        every: dict[str, list[Basis | None]] = {kind: [*found] for kind, found in bases_of.items()}
        if dictionaries:
            every[CODES] = [codes.get(str(site)) for site in sources]
        made = tuple(
            self.layer(number, ledger, every, edges_of, needed, vectors)
            for number in range(len(self.sites))
        )
        behaviour: Behaviour = stages[0].behaviour
        return Interaction(
            made, ledger, behaviour.measure, behaviour.score(behaviour.outputs), *self.modules(made)
        )

    def bases(self, kind: Kind) -> list[Basis]:
        """Of every layer; the last one keeps its own units, whose meaning is known."""
        last = bases.neurons(self.layers[-1].moments)
        found = [last]
        for number in reversed(range(len(self.sections))):
            moments = self.layers[number].moments
            if kind == "neurons":
                made = bases.neurons(moments)
            elif kind == "pca":
                made = bases.components(moments, relative=self.how.relative)
            else:
                pulled = self.local(number, found[0]) if kind == "lib" else self.pulled[number]
                made = bases.interaction(moments, pulled, kind=kind, relative=self.how.relative)
            found.insert(0, made)
        return found

    def local(self, number: int, after: Basis) -> Float[np.ndarray, "d d"]:
        firing: SectionFiring | None = self.firing[number]
        if firing is not None:
            return firing.pullback(after.to_basis @ after.to_basis.T)

        def made() -> Arrays:
            found = pullback(
                self.model,
                self.sections[number],
                self.some,
                after.to_basis,
                batch_size=self.how.batch_size,
                sources=self.how.sources,
            )
            return {"pulled": found}

        return self.once(f"local.{number}", made)["pulled"]

    def coded(self, dictionary: Dictionary, site: Site) -> Basis:
        rows = rows_of(self.several.read(self.model, [site])[site]).flatten(0, 1)
        return bases.coded(dictionary, rows)

    def edges(self, pairs: Sequence[tuple[Basis, Basis] | None], name: str) -> list[Edges | None]:
        result: list[Edges | None] = []
        for number, (section, pair) in enumerate(zip(self.sections, pairs, strict=True)):
            if pair is None:
                result.append(None)
                continue
            measure = partial(
                measure_edges,
                self.model,
                section,
                *pair,
                self.some,
                points=self.how.points,
            )
            kept = self.once(f"edges.{name}.{number}", lambda m=measure: m().state())
            result.append(Edges.from_state(kept))
            self.step()
        return result

    def layer(
        self,
        number: int,
        ledger: Ledger | None,
        bases_of: Mapping[str, list[Basis | None]],
        edges_of: Mapping[str, list[Edges | None]],
        needed: Mapping[str, list[Needed | None]],
        vectors: Mapping[str, list[Needed | None]],
    ) -> Layer:
        of = self.layers[number]
        last = number == len(self.sections)
        spread = spectral(of.moments.covariance)[0]
        width = of.moments.width
        back = np.ones(width) if last else spectral(self.pulled[number])[0]
        dead, always, blocks = _units(of, self.how.synchrony)
        if last:
            entry = Account(0, 0, 0, 0, 0, 0, 0)
        elif ledger is not None:
            entry = ledger.entries[number]
        else:
            entry = self.bound(number)
        return Layer(
            name=str(self.sites[number]),
            width=width,
            activations=spread,
            gradients=back,
            rank_activations=cut(spread, self.how.relative),
            rank_gradients=cut(back, self.how.relative),
            dead_units=dead,
            always_on=always,
            blocks=blocks,
            account=entry,
            bases=_there(bases_of, number),
            all_edges=_there(edges_of, number),
            needed=_there(needed, number),
            vectors=_there(vectors, number),
            kind=self.how.kind,
            how="" if last else self.sections[number].description,
            rows=of.moments.n,
        )

    def bound(self, number: int) -> Account:
        section: LayerMap = self.sections[number]
        of, after = self.layers[number].moments, self.layers[number + 1]
        form = section.form
        plain = form is not None and form.is_linear_map and form.inner.bias is not None
        matrix = of.covariance if plain else of.second_moment
        rank = cut(spectral(matrix)[0], self.how.relative).rank
        reached = after.moments.width
        if number + 1 < len(self.sections):
            reached = cut(spectral(self.pulled[number + 1])[0], self.how.relative).rank
        firing = self.firing[number]
        dead = 0
        if firing is not None and form is not None and form.relu:
            dead = int((firing.whole.rate == 0).sum())
        return degeneracy.bound(section, rank, dead, reached, of.width)

    def modules(
        self, made: tuple[Layer, ...]
    ) -> tuple[Graph | None, Modules | None, tuple[float, float] | None, float | None]:
        """The graph of the reported basis, and its modules."""
        how, kind = self.how, self.how.kind
        if not all(layer.needed.get(kind) and layer.needed[kind].number for layer in made[:-1]):
            return None, None, None, None  # some section needs no edge, or its basis all of them
        found = [layer.all_edges[kind] for layer in made[:-1]]
        numbers = [layer.needed[kind].number or 0 for layer in made[:-1]]
        strengths = [e.strength for e in found]
        smallest = [_least(s, n) for s, n in zip(strengths, numbers, strict=True)]
        graph = graph_of(strengths, smallest)
        try:
            modules = find_modules(graph, seed=how.seed, nulls=how.nulls)
        except UserError:  # every edge is as weak as the weakest: no weight is left
            return graph, None, None, None
        errors = [e.standard_error for e in found]
        stable = stability(graph, modules, strengths, errors, smallest, seed=how.seed)
        turned = [bases.rotated(layer.basis, seed=how.seed + i) for i, layer in enumerate(made)]
        turned[-1] = made[-1].basis
        again = self.edges(list(itertools.pairwise(turned)), "rotated")
        rotated = [e.strength for e in again if e is not None]
        null = graph_of(rotated, [_least(s, n) for s, n in zip(rotated, numbers, strict=True)])
        q = find_modules(null, seed=how.seed, nulls=0).q if len(null.weight) else None
        return graph, modules, stable, q


def _there(found: Mapping[str, list[T | None]], number: int) -> dict[str, T]:
    """What there is for a layer, by basis."""
    at = {kind: of[number] for kind, of in found.items() if number < len(of)}
    return {kind: one for kind, one in at.items() if one is not None}


def _least(strength: np.ndarray, number: int) -> float:
    """The weakest of the strongest edges."""
    return float(-np.partition(-strength, number - 1, axis=None)[number - 1])


def _units(of: LayerMoments, tolerance: float) -> tuple[int, int, tuple[tuple[int, ...], ...]]:
    """Dead units, units that always fire, and blocks; none where nothing is rectified."""
    if not (of.rectified and of.zeros):
        return 0, 0, ()
    together = of.firing.together
    label: Int[np.ndarray, " d"] = parts_of(together, tolerance)
    blocks = [np.flatnonzero(label == b) for b in range(label.max(initial=-1) + 1)]
    several = tuple(tuple(block.tolist()) for block in blocks if len(block) > 1)
    return int((label < 0).sum()), int((of.firing.rate == 1).sum()), several
