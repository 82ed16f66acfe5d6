"""How many edges, and how many basis vectors, a network needs.

    Behaviour         the samples, and what counts as behaving as before
    needed_edges      keep the strongest edges of a section, the fewest that suffice
    needed_vectors    keep the most important coordinates of a layer, the fewest that suffice

What is not kept is set to its mean: each target coordinate is computed from the source
coordinates that still have an edge to it, all others at the mean. Edges of the constant are
always kept and not counted. One search serves every basis: the number is doubled until the
score suffices, then bisected. The curve need not fall evenly, so the answer is the end of the
search and not proved the smallest; the number itself is verified.

Source: Bushnaq et al., The local interaction basis (2024), section 5.1.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechatlas.analysis.interaction.bases import Basis
from mechatlas.analysis.interaction.edges import Edges
from mechatlas.analysis.interaction.layer_maps import LayerMap, like, rows_of
from mechatlas.analysis.interaction.statistics import Inputs

ALLOWED_FALL = 0.001


@dataclasses.dataclass(frozen=True, eq=False)
class Behaviour:
    """What the network does, and how a changed one is scored.

    With one output position and several channels the score is the share of samples whose
    largest output is their label (or, without labels, is the one it was). Otherwise it is one
    minus the fraction of variance unexplained of the outputs.
    """

    outputs: Float[Tensor, "n t d"]
    labels: Int[Tensor, " n"] | None
    """What the largest output should be; `None` where outputs are compared as numbers."""
    agreement: bool
    """The labels are the network's own answers."""

    @classmethod
    def of(
        cls, outputs: Float[Tensor, "n t d"], labels: Tensor | None, *, as_numbers: bool = False
    ) -> "Behaviour":
        """From the outputs of the unchanged network; `as_numbers` never asks for the largest."""
        if outputs.shape[1] == 1 and outputs.shape[2] > 1 and not as_numbers:
            own = outputs[:, 0].argmax(dim=1)
            return cls(outputs, own if labels is None else labels, labels is None)
        return cls(outputs, None, False)

    @property
    def measure(self) -> str:
        """What a score is, in a word."""
        if self.labels is None:
            return "1 - fvu"
        return "agreement" if self.agreement else "accuracy"

    def score(self, outputs: Float[Tensor, "n t d"]) -> float:
        """Score of changed outputs."""
        if self.labels is not None:
            right = outputs[:, 0].argmax(dim=1) == self.labels
            return int(right.sum()) / len(right)
        spread = (self.outputs - self.outputs.mean(dim=(0, 1))).square().sum()
        return float(1 - (outputs - self.outputs).square().sum() / spread)


@dataclasses.dataclass(frozen=True)
class Needed:
    """The fewest things that suffice, and the scores seen on the way."""

    number: int | None
    """`None` if not even all of them suffice: the basis leaves out what the network needs."""
    of: int
    score: float
    """With that number."""
    unchanged: float
    """Score of the unchanged network."""
    curve: tuple[tuple[int, float], ...]
    """Numbers kept that were tried, rising, and their scores."""

    def state(self) -> dict[str, np.ndarray]:
        """Arrays from which `from_state` makes the same."""
        return {
            "number": np.array([] if self.number is None else [self.number], dtype=np.int64),
            "of": np.array(self.of),
            "scores": np.array([self.score, self.unchanged]),
            "kept": np.array([number for number, _ in self.curve]),
            "curve": np.array([score for _, score in self.curve]),
        }

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> "Needed":
        """What `state` was called on."""
        number = state["number"].tolist()
        curve = zip(state["kept"].tolist(), state["curve"].tolist(), strict=True)
        score, unchanged = state["scores"].tolist()
        return cls(
            number[0] if number else None, state["of"].item(), score, unchanged, tuple(curve)
        )


def search(
    of: int, score: Callable[[int], float], unchanged: float, allowed: float = ALLOWED_FALL
) -> Needed:
    """The smallest number that suffices, by doubling and bisection."""
    tried: dict[int, float] = {}

    def suffices(number: int) -> bool:
        if number not in tried:
            tried[number] = score(number)
        return tried[number] >= unchanged - allowed - 1e-12

    low, high = -1, 0
    while not suffices(high):
        if high >= of:
            curve = tuple(sorted(tried.items()))
            return Needed(None, of, tried[high], unchanged, curve)
        low, high = high, min(max(2 * high, 1), of)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return Needed(high, of, tried[high], unchanged, tuple(sorted(tried.items())))


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """A section with all that is needed to try changes of it: activations in memory."""

    section: LayerMap
    inputs: Inputs
    x: Tensor
    """Of the source."""
    after: Tensor
    """Of the target."""
    finish: Callable[[Tensor], Float[Tensor, "n t d"]]
    """Activations of the target -> outputs."""
    begin: Callable[[Tensor], Float[Tensor, "n t d"]]
    """Activations of the source -> outputs."""
    behaviour: Behaviour


def stages_of(
    network: nn.Module,
    sections: list[LayerMap],
    to_end: list[LayerMap],
    inputs: Inputs,
    *,
    as_numbers: bool = False,
) -> list[Stage]:
    """One stage for each section.

    Args:
        network: The network.
        sections: From each layer to the next.
        to_end: From each layer but the last to the last.
        inputs: Samples; all activations of the layers are kept in memory.
        as_numbers: As for `Behaviour.of`.
    """
    layers = [s.source for s in sections] + [sections[-1].target]
    found = inputs.read(network, layers)
    behaviour = Behaviour.of(rows_of(found[layers[-1]]), inputs.labels, as_numbers=as_numbers)
    stages = []
    for number, section in enumerate(sections):
        stages.append(
            Stage(
                section,
                inputs,
                found[section.source],
                found[section.target],
                _runner(to_end[number + 1] if number + 1 < len(sections) else None, inputs),
                _runner(to_end[number], inputs),
                behaviour,
            )
        )
    return stages


def _runner(section: LayerMap | None, inputs: Inputs) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return rows_of(x if section is None else section.run(x, inputs.tensor))

    return run


def needed_edges(
    stage: Stage, edges: Edges, source: Basis, target: Basis, allowed: float = ALLOWED_FALL
) -> Needed:
    """The fewest edges of a section, strongest first, that suffice."""
    order = edges.order()
    changed = EdgeAblation(stage, source, target)

    def score(number: int) -> float:
        mask = np.zeros(edges.strength.size, dtype=bool)
        mask[order[:number]] = True
        return changed.score(mask.reshape(edges.strength.shape))

    unchanged = stage.behaviour.score(stage.behaviour.outputs)
    return search(len(order), score, unchanged, allowed)


class EdgeAblation:
    """Runs a section with some of its edges alone."""

    def __init__(self, stage: Stage, source: Basis, target: Basis) -> None:
        self.stage, self.source, self.target = stage, source, target
        self.coordinates = source.transform(rows_of(stage.x))
        self._tried: list[tuple[np.ndarray, Tensor]] = []
        form = stage.section.form
        self._fast = form is not None and form.is_linear_map
        if self._fast:
            self._prepare()
        self._whole = source.inverse(self.coordinates)

    def _prepare(self) -> None:
        # Hidden units are linear in the coordinates: a mask costs only the columns it keeps.
        form = self.stage.section.form
        assert form is not None
        assert isinstance(form.inner, nn.Linear)
        x, to, out_of = self.stage.x, self.target.to_basis, self.source.from_basis
        with torch.no_grad():
            self._at_mean = form.inner(x.new_tensor(self.source.mean))
            self._hidden = x.new_tensor(out_of) @ form.inner.weight.T
            self._read = x.new_tensor(to)
            offset = -x.new_tensor(self.target.mean)
            if form.skip:
                offset = offset + x.new_tensor(self.source.mean)
                self._around = x.new_tensor(out_of @ to)
            if form.out is not None:
                offset = offset + (0 if form.out.bias is None else form.out.bias)
                self._out = form.out.weight.T @ self._read
            else:
                self._out = self._read
            self._offset = offset @ self._read

    def outputs(self, mask: Bool[np.ndarray, "k j"]) -> Float[Tensor, "n t d"]:
        """Outputs of the network with the edges of a mask alone."""
        shape = rows_of(self.stage.after).shape
        result = self.coordinates.new_empty((*shape[:2], len(self.target)))
        waiting = np.ones(len(mask), dtype=bool)
        for known, found in self._tried:  # a search changes few rows at a time towards its end
            same = waiting & (known == mask).all(axis=1)
            result[..., same] = found[..., same]
            waiting &= ~same
        rows = np.flatnonzero(waiting)
        patterns, which = np.unique(mask[rows], axis=0, return_inverse=True)
        for number, pattern in enumerate(patterns):
            wanted = rows[which.reshape(-1) == number]
            kept = np.flatnonzero(pattern)
            run = self._run_fast if self._fast else self._run
            result[..., wanted] = run(kept, wanted)
        self._remember(mask, result)
        return self.stage.finish(like(self.target.inverse(result), self.stage.after))

    def _remember(self, mask: np.ndarray, result: Tensor) -> None:
        """Keep the new one, and of the others the next smaller and the next larger."""
        size = mask.sum()
        below = [t for t in self._tried if t[0].sum() < size]
        above = [t for t in self._tried if t[0].sum() > size]
        near = (
            sorted(below, key=lambda t: -t[0].sum())[:1]
            + sorted(above, key=lambda t: t[0].sum())[:1]
        )
        self._tried = [(mask, result), *near]

    def score(self, mask: Bool[np.ndarray, "k j"]) -> float:
        """Score with the edges of a mask alone."""
        return self.stage.behaviour.score(self.outputs(mask))

    def _run(self, kept: np.ndarray, wanted: np.ndarray) -> Tensor:
        section, target = self.stage.section, self.target
        rows = self._keeping(kept)
        with torch.no_grad():
            after = section.run(like(rows, self.stage.x), self.stage.inputs.tensor)
        to = after.new_tensor(target.to_basis[:, wanted])
        return rows_of(after) @ to - after.new_tensor(target.mean) @ to

    def _keeping(self, kept: np.ndarray) -> Float[Tensor, "n s d"]:
        """Activations of the source with some coordinates alone, the others at their mean."""
        left = np.setdiff1d(np.arange(len(self.source)), kept)
        few, sign = (kept, 1) if len(kept) <= len(left) else (left, -1)
        out_of = self.coordinates.new_tensor(sign * self.source.from_basis[few])
        start = self._whole if sign < 0 else self.coordinates.new_tensor(self.source.mean)
        return start + self.coordinates[..., few] @ out_of

    def _run_fast(self, kept: np.ndarray, wanted: np.ndarray) -> Tensor:
        form = self.stage.section.form
        assert form is not None
        part = self.coordinates[..., kept]
        with torch.no_grad():
            hidden = self._at_mean + part @ self._hidden[kept]
            hidden = hidden.relu_() if form.relu else hidden
            result = hidden @ self._out[:, wanted] + self._offset[wanted]
            if form.skip:
                result = result + part @ self._around[np.ix_(kept, wanted)]
        return result


def needed_vectors(stage: Stage, basis: Basis, allowed: float = ALLOWED_FALL) -> Needed:
    """The fewest coordinates of the stage's source, most important first, that suffice."""
    coordinates = basis.transform(rows_of(stage.x))
    order = np.argsort(-basis.importance, kind="stable")

    def score(number: int) -> float:
        kept = order[:number].copy()
        rows = coordinates[..., kept] @ coordinates.new_tensor(basis.from_basis[kept])
        rows = rows + coordinates.new_tensor(basis.mean)
        return stage.behaviour.score(stage.begin(like(rows, stage.x)))

    unchanged = stage.behaviour.score(stage.behaviour.outputs)
    return search(len(basis), score, unchanged, allowed)
