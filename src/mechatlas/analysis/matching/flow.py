"""Feature flow: where each feature of the residual stream comes from, layer by layer.

    feature_flow    dictionaries of the stream, attention and MLPs -> origin of every latent
    FeatureFlow     links with their evidence, births and deaths, and the track of a latent

A latent of the stream is matched one to one with the latents of the layer before, and with those of
each attention and MLP in between. What matches tells where it was born: passed on (the stream
alone), transformed (the stream, and a module that writes the same direction), born in a module, or
unexplained. Every link has the evidence of `match`, so a missing link is no proof of absence.

Source: Laptev et al., Analyze feature flow to enhance interpretation and steering in language
models (2025), which takes the largest cosines; here pairs are one to one, against a null.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from mechatlas.analysis.matching.nulls import local_fdr
from mechatlas.analysis.matching.pairing import FDR, Match, match
from mechatlas.base import InputError, Progress, Result, no_progress
from mechatlas.maths.statistics import Proportion, proportion

ORIGINS = ("passed on", "transformed", "born in attention", "born in the MLP", "unexplained")
"""Origins of a latent: in the stream before; there and in a module; in a module; in none."""
PASSED, TRANSFORMED, ATTENTION, MLP, UNEXPLAINED = range(5)
KINDS = ("attention", "mlp")
"""Kinds of modules that write into the stream."""


class Link(NamedTuple):
    """Links of the latents of a layer to those of one dictionary before it."""

    kind: str
    """`residual`, `attention` or `mlp`."""
    number: int
    """Number of the dictionary among those of its kind that lie between the two layers."""
    latent: Int[np.ndarray, " latent"]
    """Partner in that dictionary; -1 where none is significant."""
    cosine: Float[np.ndarray, " latent"]
    """Cosine with the partner, significant or not."""
    q_value: Float[np.ndarray, " latent"]
    """Smallest false match rate at which they are partners."""
    error_probability: Float[np.ndarray, " latent"]
    """Probability that the partner is wrong; 0 where there is none."""
    cosine_threshold: float
    """Cosine that a pair takes to be significant; infinite where none is."""


class TrackPoint(NamedTuple):
    """Latent on the track of a feature."""

    layer: int
    """Number of the layer."""
    latent: int
    """Number of the latent in the dictionary of the stream there."""
    origin: str
    """Origin of the latent; empty in the first layer."""
    kind: str
    """Kind of the module that writes its direction; empty if none is known."""
    number: int
    """Number of that module's dictionary between the layers; -1 if none is known."""
    module_latent: int
    """Latent of that dictionary; -1 if none is known."""
    cosine: float
    """Cosine with the latent before on the track; 0 at its beginning."""
    false_match_rate: float
    """Probability that some link from here to the latent asked about is wrong, at most."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FeatureFlow(Result):
    """Origin of every latent of the residual stream, with the links that tell it."""

    origins: list[Int[np.ndarray, " latent"]]
    """For each layer but the first, the index in `ORIGINS` of each latent."""
    residual: list[Link]
    """For each layer but the first, links to the layer before."""
    modules: list[list[Link]]
    """For each layer but the first, links to the attentions and MLPs in between."""
    sizes: list[int]
    """Number of latents of each layer."""
    fdr: float
    """False match rate asked for, of each kind of link."""

    def share(self, layer: int, origin: int) -> Proportion:
        """Share of the latents of a layer with an origin, with its 95 % Wilson interval.

        Args:
            layer: Number of the layer, from 1.
            origin: Index in `ORIGINS`.
        """
        return proportion(int((self.origins[layer - 1] == origin).sum()), self.sizes[layer])

    def births(self, layer: int) -> Proportion:
        """Share of the latents of a layer that have no partner in the layer before.

        Args:
            layer: Number of the layer, from 1.
        """
        return proportion(int((self.residual[layer - 1].latent < 0).sum()), self.sizes[layer])

    def deaths(self, layer: int) -> Proportion:
        """Share of the latents of a layer that have no partner in the layer after.

        Args:
            layer: Number of a layer, not the last.
        """
        kept = int((self.residual[layer].latent >= 0).sum())
        return proportion(self.sizes[layer] - kept, self.sizes[layer])

    def after(self, layer: int) -> Int[np.ndarray, " latent"]:
        """Partner in the next layer of each latent of a layer; -1 for none.

        Args:
            layer: Number of a layer, not the last.
        """
        link = self.residual[layer]
        partners = np.full(self.sizes[layer], -1)
        found = np.flatnonzero(link.latent >= 0)
        partners[link.latent[found]] = found
        return partners

    def module(self, layer: int, latent: int) -> tuple[Link, int] | None:
        """Module dictionary that most surely writes the direction of a latent, and its latent.

        Args:
            layer: Number of the layer, from 1.
            latent: Number of the latent.
        """
        found = [link for link in self.modules[layer - 1] if link.latent[latent] >= 0]
        best = max(found, key=lambda link: link.cosine[latent], default=None)
        return None if best is None else (best, int(best.latent[latent]))

    def track(self, layer: int, latent: int) -> list[TrackPoint]:
        """Follow a latent back to where it was born and on to where it is last found.

        Args:
            layer: Number of a layer.
            latent: Number of a latent there.

        Raises:
            InputError: There is no such layer or latent.
        """
        if not 0 <= layer < len(self.sizes) or not 0 <= latent < self.sizes[layer]:
            raise InputError(
                f"There is no latent {latent} in layer {layer}; there are layers 0 to "
                f"{len(self.sizes) - 1}, and layer 0 has {self.sizes[0]} latents."
            )
        back, place, wrong = [], latent, 0.0
        for k in range(layer, -1, -1):
            back.append((k, place, wrong))
            if k == 0 or self.residual[k - 1].latent[place] < 0:
                break
            link = self.residual[k - 1]
            wrong += float(link.error_probability[place])
            place = int(link.latent[place])
        forth, place, wrong = [], latent, 0.0
        for k in range(layer, len(self.sizes) - 1):
            place = int(self.after(k)[place])
            if place < 0:
                break
            wrong += float(self.residual[k].error_probability[place])
            forth.append((k + 1, place, wrong))
        return [self._point(*each) for each in [*reversed(back), *forth]]

    def _point(self, layer: int, latent: int, wrong: float) -> TrackPoint:
        if not layer:
            return TrackPoint(layer, latent, "", "", -1, -1, 0.0, min(wrong, 1.0))
        link, module = self.residual[layer - 1], self.module(layer, latent)
        kind, number, of_module = ("", -1, -1) if module is None else (
            module[0].kind, module[0].number, module[1],
        )  # fmt: skip
        cosine = float(link.cosine[latent]) if link.latent[latent] >= 0 else 0.0
        origin = ORIGINS[int(self.origins[layer - 1][latent])]
        return TrackPoint(layer, latent, origin, kind, number, of_module, cosine, min(wrong, 1.0))

    def longest(self, n: int = 10) -> list[tuple[int, int]]:
        """Last layer and latent of the longest tracks, the surest of equally long ones first.

        Args:
            n: Number of tracks.
        """
        length = [np.ones(size, np.int64) for size in self.sizes]
        wrong = [np.zeros(size) for size in self.sizes]
        ends: list[tuple[int, float, int, int]] = []
        for layer in range(len(self.sizes)):
            if layer:
                link = self.residual[layer - 1]
                on = np.flatnonzero(link.latent >= 0)
                length[layer][on] += length[layer - 1][link.latent[on]]
                wrong[layer][on] = (
                    wrong[layer - 1][link.latent[on]] + link.error_probability[on]
                )  # fmt: skip
            is_last = layer == len(self.sizes) - 1
            last = np.ones(self.sizes[layer]) if is_last else self.after(layer) < 0
            ends += [
                (int(length[layer][i]), float(wrong[layer][i]), layer, int(i))
                for i in np.flatnonzero(last)
            ]
        ends.sort(key=lambda end: (-end[0], end[1]))
        return [(layer, latent) for n_layers, _, layer, latent in ends[:n] if n_layers > 1]

    def summary(self) -> str:
        """Origins in each layer."""
        lines = [
            f"FeatureFlow: {len(self.sizes)} layers of the stream, links at a false match rate of "
            f"{self.fdr:.0%}"
        ]
        for layer in range(1, min(len(self.sizes), 5)):
            shares = (f"{self.share(layer, k).value:.1%} {name}" for k, name in enumerate(ORIGINS))
            lines.append(f"layer {layer}: {', '.join(shares)}")
        if len(self.sizes) > 5:
            lines.append(f"and {len(self.sizes) - 5} more layers")
        return "\n".join(lines)


def feature_flow(
    residual: Sequence[Any],
    *,
    attention: Sequence[Any] = (),
    mlp: Sequence[Any] = (),
    fdr: float = FDR,
    seed: int = 0,
    on_progress: Progress = no_progress,
) -> FeatureFlow:
    """Find where each latent of the residual stream comes from.

    Args:
        residual: Dictionaries of the stream after some layers, in order, or their decoder rows
            (latent, d).
        attention: For each layer but the first, the dictionary of what attention adds in between,
            or a list of several where the layers are not neighbors; none at all by default.
        mlp: The same for the MLPs.
        fdr: False match rate of the links to each dictionary.
        seed: Seed of the nulls.
        on_progress: Callback with the number of matches done.

    Raises:
        InputError: There are fewer than two layers, other numbers of modules, or widths differ.

    Examples:
        >>> import numpy as np, mechatlas as ma
        >>> draw = np.random.default_rng(0).standard_normal
        >>> first, new = draw((64, 48)), draw((32, 48))
        >>> second = np.concatenate([first[:32], new])
        >>> flow = ma.feature_flow([first, second], mlp=[new])
        >>> [int((flow.origins[0] == k).sum()) for k in range(5)]
        [32, 0, 0, 32, 0]

    Source:
        Laptev et al., Analyze feature flow to enhance interpretation and steering (2025).
    """
    steps = len(residual) - 1
    if steps < 1:
        raise InputError(f"A flow needs two layers of the stream or more, got {len(residual)}.")
    between = {
        kind: _between(kind, given, steps)
        for kind, given in zip(KINDS, (attention, mlp), strict=True)
    }
    total = steps + sum(len(each) for lists in between.values() for each in lists)
    done, residual_links, module_links, origins = 0, [], [], []
    for k in range(steps):
        here = residual[k + 1]
        residual_links.append(_link("residual", 0, match(here, residual[k], fdr=fdr, seed=seed)))
        on_progress(done := done + 1, total)
        found: list[Link] = []
        for kind in KINDS:
            for number, module in enumerate(between[kind][k]):
                found.append(_link(kind, number, match(here, module, fdr=fdr, seed=seed)))
                on_progress(done := done + 1, total)
        module_links.append(found)
        origins.append(_origins(residual_links[-1], found))
    sizes = [_size(each) for each in residual]
    return FeatureFlow(origins, residual_links, module_links, sizes, fdr)


def _size(dictionary: Any) -> int:
    """Number of latents of a dictionary or of decoder rows."""
    return int(getattr(dictionary, "n_latents", None) or len(dictionary))


def _between(kind: str, given: Sequence[Any], steps: int) -> list[list[Any]]:
    """Dictionaries of a kind of module for each step."""
    if not len(given):
        return [[] for _ in range(steps)]
    if len(given) != steps:
        raise InputError(
            f"`{kind}` needs one entry for each of the {steps} layers after the first, got "
            f"{len(given)}: a dictionary, or a list of those in between."
        )
    return [list(each) if isinstance(each, list | tuple) else [each] for each in given]


def _link(kind: str, number: int, matching: Match) -> Link:
    """Links of a match."""
    wrong = local_fdr(matching.q_values)
    return Link(
        kind=kind,
        number=number,
        latent=matching.matched_columns(),
        cosine=matching.cosines,
        q_value=matching.q_values,
        error_probability=np.where(matching.matched, wrong, 0.0),
        cosine_threshold=matching.cosine_threshold,
    )


def _origins(stream: Link, modules: Sequence[Link]) -> Int[np.ndarray, " latent"]:
    """Origin of each latent, by the links that it has."""
    n = len(stream.latent)
    best: Mapping[str, Float[np.ndarray, " latent"]] = {
        kind: np.max(
            [np.full(n, -np.inf)]
            + [np.where(m.latent >= 0, m.cosine, -np.inf) for m in modules if m.kind == kind],
            axis=0,
        )
        for kind in KINDS
    }
    before: Bool[np.ndarray, " latent"] = stream.latent >= 0
    written = np.maximum(best["attention"], best["mlp"]) > -np.inf
    born = np.where(best["attention"] >= best["mlp"], ATTENTION, MLP)
    return np.select(
        [before & written, before, written], [np.full(n, TRANSFORMED), np.full(n, PASSED), born],
        UNEXPLAINED,
    )  # fmt: skip
