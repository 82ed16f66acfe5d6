"""Minimal number of edges, and of basis vectors, that keep the behavior of a network.

    Behavior          outputs of the unchanged network, and the score of changed ones
    ablate_edges      keep the strongest edges of a layer map, the fewest that suffice
    ablate_vectors    keep the most important coordinates of a layer, the fewest that suffice

What is ablated is set to its mean: each target coordinate is computed from the source coordinates
that still have an edge to it, all others at the mean. Edges of the constant are always kept and
not counted. One search serves every basis: the number is doubled until the score suffices, then
bisected. The curve need not be monotone, so the number is one that suffices, verified, but not
proved the smallest.

Source: Bushnaq et al., The local interaction basis (2024), section 5.1.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechatlas.analysis.interaction.bases import Basis
from mechatlas.analysis.interaction.edges import InteractionEdges
from mechatlas.analysis.interaction.layer_maps import LayerMap, like, rows_of
from mechatlas.analysis.interaction.statistics import Inputs
from mechatlas.deprecated import renamed_attributes

MAX_ACCURACY_DROP = 0.001
"""Default of the largest fall of the score."""


@dataclasses.dataclass(frozen=True, eq=False)
class Behavior:
    """Outputs of the unchanged network, with the score of the outputs of a changed one.

    With one output position and several channels the score is the share of samples whose
    largest output is their label (or, without labels, the same as before). Otherwise it is one
    minus the fraction of variance unexplained of the outputs.
    """

    outputs: Float[Tensor, "n t d"]
    labels: Int[Tensor, " n"] | None
    """Channel that should be the largest; `None` where the score is 1 - FVU."""
    agreement: bool
    """Whether the labels are the predictions of the network itself."""

    @classmethod
    def from_outputs(
        cls, outputs: Float[Tensor, "n t d"], labels: Int[Tensor, " n"] | None, *, fvu: bool = False
    ) -> "Behavior":
        """Choose the score for the outputs of the unchanged network.

        Args:
            outputs: Outputs by sample, position and channel.
            labels: Correct class of each sample, if known.
            fvu: Whether to score by 1 - FVU, whatever the shape of the outputs.
        """
        if outputs.shape[1] == 1 and outputs.shape[2] > 1 and not fvu:
            predicted = outputs[:, 0].argmax(dim=1)
            return cls(outputs, predicted if labels is None else labels, labels is None)
        return cls(outputs, None, agreement=False)

    @property
    def measure(self) -> str:
        """Name of the score: accuracy, agreement or 1 - fvu."""
        if self.labels is None:
            return "1 - fvu"
        return "agreement" if self.agreement else "accuracy"

    def score(self, outputs: Float[Tensor, "n t d"]) -> float:
        """Score the outputs of a changed network."""
        if self.labels is not None:
            right = outputs[:, 0].argmax(dim=1) == self.labels
            return int(right.sum()) / len(right)
        spread = (self.outputs - self.outputs.mean(dim=(0, 1))).square().sum()
        return float(1 - (outputs - self.outputs).square().sum() / spread)

    @property
    def unchanged(self) -> float:
        """Score of the unchanged network."""
        return self.score(self.outputs)


@renamed_attributes
@dataclasses.dataclass(frozen=True)
class AblationCurve:
    """Scores with growing numbers of edges or vectors kept, and the number that suffices."""

    n_needed: int | None
    """Number that suffices; `None` if all of them do not, as the basis omits what is needed."""
    n: int
    """Number of edges or vectors there are."""
    unchanged: float
    """Score of the unchanged network."""
    kept: tuple[int, ...]
    """Numbers kept that were tried, rising."""
    scores: tuple[float, ...]
    """Score with each number kept."""

    @property
    def score(self) -> float:
        """Score with `n_needed` of them, or with all if they do not suffice."""
        return self.scores[self.kept.index(self.n if self.n_needed is None else self.n_needed)]


def find_needed(
    n: int,
    score: Callable[[int], float],
    unchanged: float,
    max_drop: float = MAX_ACCURACY_DROP,
    *,
    guess: int = 0,
) -> AblationCurve:
    """Find the number that suffices, by steps that double from a guess, and bisection.

    Args:
        n: Number of edges or vectors there are.
        score: Score with a number of them kept.
        unchanged: Score of the unchanged network.
        max_drop: Largest fall of the score.
        guess: Number that is tried first.
    """
    scores: dict[int, float] = {}

    def suffices(number: int) -> bool:
        if number not in scores:
            scores[number] = score(number)
        return scores[number] >= unchanged - max_drop - 1e-12

    def step(number: int) -> int:
        return max(abs(number - guess), guess // 16, 1)

    guess = low = high = min(guess, n)
    if suffices(guess):
        while low >= 0 and suffices(low):
            low, high = max(low - step(low), 0) if low else -1, low
    else:
        while not suffices(high) and high < n:
            low, high = high, min(high + step(high), n)
    while suffices(high) and high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    kept = tuple(sorted(scores))
    return AblationCurve(
        n_needed=high if suffices(high) else None,
        n=n,
        unchanged=unchanged,
        kept=kept,
        scores=tuple(scores[number] for number in kept),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class AblationSite:
    """Layer map with the activations at both ends, and the rest of the network after them."""

    layer_map: LayerMap
    inputs: Inputs
    x: Tensor
    """Activations of the source."""
    after: Tensor
    """Activations of the target."""
    finish: Callable[[Tensor], Float[Tensor, "n t d"]]
    """Map from activations of the target to outputs."""
    begin: Callable[[Tensor], Float[Tensor, "n t d"]]
    """Map from activations of the source to outputs."""
    behavior: Behavior


def ablation_sites(
    network: nn.Module,
    maps: list[LayerMap],
    maps_to_end: list[LayerMap],
    inputs: Inputs,
    *,
    fvu: bool = False,
) -> list[AblationSite]:
    """Prepare the ablation of every layer map.

    Args:
        network: Network in evaluation mode.
        maps: Maps from each layer to the next.
        maps_to_end: Maps from each layer but the last to the last.
        inputs: Samples; all activations of the layers are kept in memory.
        fvu: Whether to score by 1 - FVU, whatever the shape of the outputs.
    """
    layers = [m.source for m in maps] + [maps[-1].target]
    activations = inputs.read(network, layers)
    behavior = Behavior.from_outputs(rows_of(activations[layers[-1]]), inputs.labels, fvu=fvu)
    to_outputs = [_to_outputs(layer_map, inputs) for layer_map in [*maps_to_end, None]]
    return [
        AblationSite(
            layer_map, inputs, activations[layer_map.source], activations[layer_map.target],
            finish=to_outputs[number + 1], begin=to_outputs[number], behavior=behavior,
        )
        for number, layer_map in enumerate(maps)
    ]  # fmt: skip


def _to_outputs(layer_map: LayerMap | None, inputs: Inputs) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return rows_of(x if layer_map is None else layer_map.run(x, inputs.tensor))

    return run


def ablate_edges(
    site: AblationSite,
    edges: InteractionEdges,
    source: Basis,
    target: Basis,
    max_drop: float = MAX_ACCURACY_DROP,
    *,
    on_try: Callable[[], None] = lambda: None,
) -> AblationCurve:
    """Find the fewest edges of a layer map, strongest first, that suffice.

    Where the score is 1 - FVU, the first number tried is that whose other edges have together the
    allowed share of all strength: as if the contributions of edges were independent.

    Args:
        site: Layer map in its network.
        edges: Strength of the edges.
        source: Coordinates of the source.
        target: Coordinates of the target.
        max_drop: Largest fall of the score.
        on_try: Callback after each number that was tried.
    """
    order = np.argsort(-edges.strength, axis=None, kind="stable")
    ablation = EdgeAblation(site, source, target)

    def score(number: int) -> float:
        mask = np.zeros(edges.strength.size, dtype=bool)
        mask[order[:number]] = True
        result = site.behavior.score(ablation.outputs(mask.reshape(edges.strength.shape)))
        on_try()
        return result

    guess = 0
    if site.behavior.labels is None:
        weakest_first = np.cumsum(edges.strength.ravel()[order[::-1]])
        spare = np.searchsorted(weakest_first, max_drop * weakest_first[-1])
        guess = len(order) - int(spare)
    return find_needed(len(order), score, site.behavior.unchanged, max_drop, guess=guess)


@dataclasses.dataclass(frozen=True, eq=False)
class _ProjectedForm:
    """Closed form of a layer map between coordinates: hidden units are linear in the source's.

    A mask of edges costs only the columns that it keeps.
    """

    relu: bool
    at_mean: Float[Tensor, " h"]
    hidden: Float[Tensor, "k h"]
    out: Float[Tensor, "h j"]
    offset: Float[Tensor, " j"]
    skip: Float[Tensor, "k j"] | None

    @classmethod
    def from_site(cls, site: AblationSite, source: Basis, target: Basis) -> "_ProjectedForm | None":
        form = site.layer_map.form
        if form is None or not isinstance(form.inner, nn.Linear):
            return None
        new = site.x.new_tensor
        with torch.no_grad():
            mean, to_basis = new(source.mean), new(target.to_basis)
            offset = -new(target.mean) + (mean if form.skip else 0)
            out = to_basis
            if form.out is not None:
                offset = offset + (0 if form.out.bias is None else form.out.bias)
                out = form.out.weight.T @ to_basis
            return cls(
                relu=form.relu,
                at_mean=form.inner(mean),
                hidden=new(source.from_basis) @ form.inner.weight.T,
                out=out,
                offset=offset @ to_basis,
                skip=new(source.from_basis @ target.to_basis) if form.skip else None,
            )

    def run(
        self, coordinates: Tensor, kept: Int[np.ndarray, " a"], rows: Int[np.ndarray, " b"]
    ) -> Float[Tensor, "n t b"]:
        """Target coordinates `rows` from source coordinates `kept` alone."""
        part = coordinates[..., kept]
        with torch.no_grad():
            hidden = self.at_mean + part @ self.hidden[kept]
            hidden = hidden.relu_() if self.relu else hidden
            result = hidden @ self.out[:, rows] + self.offset[rows]
            return result if self.skip is None else result + part @ self.skip[np.ix_(kept, rows)]


class EdgeAblation:
    """Network with some of the edges of a layer map alone.

    Args:
        site: Layer map in its network.
        source: Coordinates of the source.
        target: Coordinates of the target.
    """

    def __init__(self, site: AblationSite, source: Basis, target: Basis) -> None:
        self.site, self.source, self.target = site, source, target
        self.coordinates = source.transform(rows_of(site.x))
        self._reconstruction = source.inverse(self.coordinates)
        self._form = _ProjectedForm.from_site(site, source, target)
        self._cache: list[tuple[np.ndarray, Tensor]] = []

    def outputs(self, mask: Bool[np.ndarray, "k j"]) -> Float[Tensor, "n t d"]:
        """Outputs of the network with the edges of a mask alone."""
        shape = rows_of(self.site.after).shape
        result = self.coordinates.new_empty((*shape[:2], len(self.target)))
        missing = np.ones(len(mask), dtype=bool)
        for cached_mask, cached in self._cache:  # towards its end a search changes few rows
            same = missing & (cached_mask == mask).all(axis=1)
            result[..., same] = cached[..., same]
            missing &= ~same
        rows = np.flatnonzero(missing)
        patterns, pattern_of_row = np.unique(mask[rows], axis=0, return_inverse=True)
        for number, pattern in enumerate(patterns):
            chosen = rows[pattern_of_row.reshape(-1) == number]
            kept = np.flatnonzero(pattern)
            if self._form is None:
                result[..., chosen] = self._run(kept, chosen)
            else:
                result[..., chosen] = self._form.run(self.coordinates, kept, chosen)
        self._remember(mask, result)
        return self.site.finish(like(self.target.inverse(result), self.site.after))

    def _remember(self, mask: np.ndarray, result: Tensor) -> None:
        """Cache a result, and of the others the next smaller and the next larger."""
        size = mask.sum()
        smaller = [t for t in self._cache if t[0].sum() < size]
        larger = [t for t in self._cache if t[0].sum() > size]
        smaller = sorted(smaller, key=lambda t: -t[0].sum())[:1]
        larger = sorted(larger, key=lambda t: t[0].sum())[:1]
        self._cache = [(mask, result), *smaller, *larger]

    def _run(self, kept: Int[np.ndarray, " a"], rows: Int[np.ndarray, " b"]) -> Tensor:
        """Target coordinates `rows` from source coordinates `kept` alone, by the network."""
        ablated = np.setdiff1d(np.arange(len(self.source)), kept)
        few, sign = (kept, 1) if len(kept) <= len(ablated) else (ablated, -1)
        from_basis = self.coordinates.new_tensor(sign * self.source.from_basis[few])
        mean = self.coordinates.new_tensor(self.source.mean)
        x = (mean if sign > 0 else self._reconstruction) + self.coordinates[..., few] @ from_basis
        with torch.no_grad():
            after = self.site.layer_map.run(like(x, self.site.x), self.site.inputs.tensor)
        to_basis = after.new_tensor(self.target.to_basis[:, rows])
        return rows_of(after) @ to_basis - after.new_tensor(self.target.mean) @ to_basis


def ablate_vectors(
    site: AblationSite, basis: Basis, max_drop: float = MAX_ACCURACY_DROP
) -> AblationCurve:
    """Find the fewest coordinates of the source, most important first, that suffice.

    Args:
        site: Layer map in its network.
        basis: Coordinates of the source.
        max_drop: Largest fall of the score.
    """
    coordinates = basis.transform(rows_of(site.x))
    order = np.argsort(-basis.importance, kind="stable")

    def score(number: int) -> float:
        kept = order[:number].copy()
        rows = coordinates[..., kept] @ coordinates.new_tensor(basis.from_basis[kept])
        rows = rows + coordinates.new_tensor(basis.mean)
        return site.behavior.score(site.begin(like(rows, site.x)))

    return find_needed(len(basis), score, site.behavior.unchanged, max_drop)
