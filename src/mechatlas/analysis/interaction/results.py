"""Settings and results of `basis`.

InteractionConfig   settings
LayerResult         ranks, degeneracy, bases and edges of one layer
InteractionBasis    all layers, and the graph of their interactions
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from mechatlas import deprecated
from mechatlas.analysis.interaction.ablation import MAX_ACCURACY_DROP, AblationCurve
from mechatlas.analysis.interaction.bases import BASIS_KINDS, Basis, BasisKind
from mechatlas.analysis.interaction.degeneracy import (
    DegeneracyCount,
    EffectiveParameters,
    NetworkDegeneracy,
)
from mechatlas.analysis.interaction.edges import InteractionEdges
from mechatlas.analysis.interaction.learning_coefficient import LearningCoefficient
from mechatlas.analysis.interaction.modularity import (
    N_NULL_GRAPHS,
    InteractionGraph,
    Modules,
    ModuleStability,
)
from mechatlas.analysis.interaction.module_degeneracy import ModuleDegeneracy
from mechatlas.base import Result
from mechatlas.maths.linalg import RELATIVE, Cut
from mechatlas.ranges import COUNT, COUNT_OR_NONE, POSITIVE, RATE, SEED, check_ranges


@deprecated.renamed_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class InteractionConfig:
    """Settings of `basis`; the defaults suit networks with some hundred units a layer."""

    kinds: tuple[BasisKind, ...] = BASIS_KINDS
    """Bases to compare. Reported is "lib" if it is among them, then "gib", then the first."""
    batch_size: int = 512
    """Samples in a forward pass."""
    jacobian_samples: int = 1024
    """Samples for edges, and for Jacobians where there is no closed form. Gradients of the outputs
    are taken on an eighth of them, or on as many more as the global basis needs to agree with that
    from half of the samples."""
    ablation_samples: int = 4096
    """Samples on which ablated networks are scored, at most."""
    max_flops: float = 2e12
    """Floating-point operations of one part, at most, where a layer map has no closed form
    (transformer layers, whole convolutional modules): the edges of a basis, a search for needed
    edges, gradients. Above that fewer samples are taken, down to 16, or to 256 rows of positions in
    4 samples or more."""
    gradient_probes: int = 64
    """Random sums over outputs whose gradients are taken, where a layer has too many outputs
    (coordinates times positions, more than 512) to take the gradient of each."""
    quadrature_points: int = 3
    """Quadrature points for edges of layer maps that are not piecewise linear."""
    score: str = "accuracy"
    """Score of ablated networks. "accuracy": share of samples whose largest output is the label or,
    without labels, the same as before, if there is one output position and several channels.
    "fvu": one minus the fraction of variance unexplained of the outputs."""
    max_accuracy_drop: float = MAX_ACCURACY_DROP
    """Largest fall of the score."""
    rank_threshold: float = RELATIVE
    """Share of the largest eigenvalue below which others count as zero."""
    synchrony_tolerance: float = 0.0
    """Share of rows on which units of one synchronized block may differ; 0 is exact."""
    ablations: bool = True
    """Whether to count needed edges and vectors, which takes longest."""
    learning_coefficient: bool = False
    """Whether to estimate the local learning coefficient, on `jacobian_samples`."""
    n_beta: float | None = None
    """Inverse temperature of the learning coefficient; by default n / log n of n samples."""
    n_null_graphs: int = N_NULL_GRAPHS
    """Random graphs with the same degrees that modularity is compared with."""
    seed: int = 0
    """Seed of Leiden, of the random graphs and probes, and of the choice of samples."""

    def __post_init__(self) -> None:
        counts = "batch_size jacobian_samples ablation_samples gradient_probes quadrature_points"
        check_ranges(
            self,
            **dict.fromkeys(counts.split(), COUNT),
            max_accuracy_drop="[0, 1e12]",
            rank_threshold=RATE,
            synchrony_tolerance="[0, 1)",
            n_beta=POSITIVE,
            max_flops="(0, 1e18]",
            n_null_graphs=COUNT_OR_NONE,
            seed=SEED,
        )
        if not self.kinds:
            raise ValueError(f"kinds must name at least one of {', '.join(BASIS_KINDS)}.")
        new = {"answers": "accuracy", "numbers": "fvu"}.get(self.score, self.score)
        if new not in ("accuracy", "fvu"):
            raise ValueError(f"score must be 'accuracy' or 'fvu', got {self.score!r}.")
        if new != self.score:
            deprecated.warn(f"score {self.score!r}", repr(new))
            object.__setattr__(self, "score", new)

    @property
    def kind(self) -> BasisKind:
        """Basis that is reported."""
        order: tuple[BasisKind, ...] = ("lib", "gib", *self.kinds)
        return next(kind for kind in order if kind in self.kinds)


def count_in_words(n_free: int, n_parameters: int, *, is_exact: bool, has_gap: bool) -> str:
    """Say how many directions of the weights are free, and how sure the number is.

    Args:
        n_free: Number of free directions.
        n_parameters: Number of weights and biases.
        is_exact: Whether the number is exact, not a lower bound.
        has_gap: Whether the spectra have a gap, so that a lower bound means something.
    """
    if is_exact or has_gap:
        at_least = "" if is_exact else "At least "
        return f"{at_least}{n_free} of {n_parameters} directions of the weights are free"
    return (
        f"No clear number of free directions: about {n_free} of {n_parameters} at the chosen "
        "threshold, but the spectra have no gap (see the curve of effective parameters)"
    )


@deprecated.renamed_attributes
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LayerResult(Result):
    """Ranks, degeneracy, bases and edges of one layer."""

    name: str
    """Site of the layer."""
    width: int
    """Number of channels."""
    activation_eigenvalues: Float[np.ndarray, " d"]
    """Eigenvalues of the covariance of the activations, falling."""
    gradient_eigenvalues: Float[np.ndarray, " d"]
    """Eigenvalues of E[J^T J] to the last layer, falling."""
    rank_activations: Cut
    """Numerical rank of the activations."""
    rank_gradients: Cut
    """Numerical rank of the gradients."""
    dead_units: int
    """Number of units that never fire."""
    always_on: int
    """Number of units that always fire."""
    synchronized_blocks: tuple[tuple[int, ...], ...]
    """Blocks of two or more units that fire on the same rows."""
    degeneracy: DegeneracyCount
    """Free directions of the weights that read this layer."""
    effective_parameters: EffectiveParameters
    """Effective parameters of these weights at every resolution."""
    bases: dict[str, Basis]
    """Coordinates by kind of basis."""
    edges_by_basis: dict[str, InteractionEdges]
    """Edges to the next layer by kind of basis; empty for the last layer."""
    edge_curves: dict[str, AblationCurve]
    """Ablation of the edges by kind of basis."""
    vector_curves: dict[str, AblationCurve]
    """Ablation of the basis vectors by kind of basis."""
    kind: BasisKind
    """Kind of the basis that is reported."""
    map_description: str
    """Modules that were run to reach the next layer."""
    n_rows: int
    """Number of rows of activations."""
    global_agreement: Float[np.ndarray, " k"] | None = None
    """Correlation of each coordinate of the global interaction basis with the nearest one of a
    basis whose gradients are from half of the samples, the smaller of both halves; `None` without
    that basis."""

    @property
    def limited_by_samples(self) -> bool:
        """Whether there were too few rows to see a higher rank."""
        return self.rank_activations.rank >= self.n_rows - 1

    @property
    def basis(self) -> Basis:
        """Basis that is reported."""
        return self.bases[self.kind]

    @property
    def to_basis(self) -> Float[np.ndarray, "d k"]:
        """Matrix to coordinates: `(activations - mean) @ to_basis`."""
        return self.basis.to_basis

    @property
    def from_basis(self) -> Float[np.ndarray, "k d"]:
        """Matrix to activations: `coordinates @ from_basis + mean`."""
        return self.basis.from_basis

    @property
    def edges(self) -> Float[np.ndarray, "next k"] | None:
        """Strength of the edges to the next layer's coordinates; `None` for the last layer."""
        edges = self.edges_by_basis.get(self.kind)
        return None if edges is None else edges.strength

    @property
    def free_directions(self) -> int:
        """Number of directions of the weights that read this layer and change nothing."""
        return self.degeneracy.n_free

    @property
    def has_gap(self) -> bool:
        """Whether that number does not hang on the threshold of a rank.

        True where no rank was needed, and where the spectra have a gap of a decade or more.
        """
        return not self.degeneracy.needs_rank or self.effective_parameters.has_gap

    def summary(self) -> str:
        """Rank, dead units, free directions and needed edges in one line."""
        edges, vectors = (c.get(self.kind) for c in (self.edge_curves, self.vector_curves))
        needed = ""
        if edges is not None and vectors is not None:
            needed = (
                f", {edges.n_needed} of {edges.n} edges and {vectors.n_needed} of {vectors.n} "
                "vectors needed"
            )
        return (
            f"{self.name}: rank {self.rank_activations.rank} of {self.width}, {self.dead_units} "
            f"dead units, {self.free_directions} free directions{needed}"
        )


@deprecated.renamed_attributes
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class InteractionBasis(Result):
    """Layers of a network, by number or name, and the graph of their interactions."""

    layers: tuple[LayerResult, ...]
    """Result for each layer, in the order of the network."""
    degeneracy: NetworkDegeneracy | None
    """Free directions of the network; `None` where there are only bounds for each layer."""
    measure: str
    """Name of the score: accuracy, agreement or 1 - fvu."""
    score: float
    """Score of the unchanged network."""
    graph: InteractionGraph | None = None
    """Graph of the needed edges, in the basis that is reported."""
    modules: Modules | None = None
    """Modules of the graph."""
    stability: ModuleStability | None = None
    """Agreement of the modules with those of other seeds and samples."""
    rotated_q: float | None = None
    """Newman's Q after a random rotation of the bases, with as many edges."""
    learning_coefficient: LearningCoefficient | None = None
    """Local learning coefficient, if the settings ask for it."""
    module_degeneracy: ModuleDegeneracy | None = None
    """Free directions of the modules of units, if they were given."""
    n_ablation_samples: int = 0
    """Samples on which ablated networks were scored."""
    n_gradient_samples: int = 0
    """Samples on which gradients of the outputs were taken."""

    def __len__(self) -> int:
        """Number of layers."""
        return len(self.layers)

    def __getitem__(self, layer: int | str) -> LayerResult:
        """Find a layer by number or name.

        Raises:
            KeyError: There is no layer of that name.
        """
        if isinstance(layer, int):
            return self.layers[layer]
        for each in self.layers:
            if each.name == layer:
                return each
        raise KeyError(f"no layer {layer!r}; there are {', '.join(x.name for x in self.layers)}")

    @property
    def free_directions(self) -> int:
        """Number of free directions of all weights."""
        if self.degeneracy is not None:
            return self.degeneracy.n_free
        return sum(layer.free_directions for layer in self.layers)

    @property
    def n_parameters(self) -> int:
        """Number of weights and biases that were counted."""
        return sum(layer.degeneracy.n_parameters for layer in self.layers)

    @property
    def is_exact(self) -> bool:
        """Whether `free_directions` is exact, not a lower bound."""
        return self.degeneracy is not None and self.degeneracy.across_blocks is not None

    @property
    def has_gap(self) -> bool:
        """Whether `free_directions` is exact, or no layer hangs on a threshold."""
        return self.is_exact or all(layer.has_gap for layer in self.layers)

    def summary(self) -> str:
        """Ranks and needed edges of the first layers, free directions, modules."""
        lines = [
            f"Interaction basis ({self.layers[0].kind}) of {len(self)} layers; {self.measure} "
            f"{self.score:.4g}",
            *(layer.summary() for layer in self.layers[:3]),
            count_in_words(
                self.free_directions,
                self.n_parameters,
                is_exact=self.is_exact,
                has_gap=self.has_gap,
            ),
        ]
        uncertain = [
            (layer.name, float(layer.global_agreement.min()))
            for layer in self.layers
            if layer.global_agreement is not None and len(layer.global_agreement)
        ]
        if uncertain:
            name, worst = min(uncertain, key=lambda each: each[1])
            lines.append(
                f"Global basis from gradients of {self.n_gradient_samples} samples; its least "
                f"certain coordinate ({name}) correlates by {worst:.2f} with that of half of them"
            )
        if self.modules is not None:
            n = self.modules.n if self.modules.significant else "no"
            lines.append(
                f"Modularity {self.modules.q:.3f}, at most {max(self.modules.q_null):.3f}"
                f" in random graphs of the same degrees: {n} significant modules"
            )
        return "\n".join(lines)
