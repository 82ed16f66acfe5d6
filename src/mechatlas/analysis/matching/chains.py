"""Feature tracks: features followed through the dictionaries of many layers.

    compose     the matches of neighboring layers, followed one after another
    track       the joint solution: every latent belongs to one track, and every track has at most
                one latent of a layer, so that no two ways round a cycle disagree
    survival    birth, persistence and death of tracks, with intervals
    tracks_table    the latents of all tracks as columns

The joint solution starts from the matches of neighboring layers. Then two neighbors are matched
again, each latent together with the rest of its track on its own side, nearer layers weighing
more: several layers together say more of a feature than one does. The pairing and its null are
those of `match`, so that a link carries the same evidence as a pair, and with two layers the
tracks are the pairs. The links are solved there and back until nothing changes.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from mechatlas.analysis.matching.degenerate import only_unique
from mechatlas.analysis.matching.folding import unit_rows
from mechatlas.analysis.matching.nulls import NULLS, Null, compare_with_null, local_fdr
from mechatlas.analysis.matching.pairing import FDR, Match
from mechatlas.base import InputError, Progress, Result, no_progress
from mechatlas.deprecated import renamed_arguments, renamed_attributes
from mechatlas.maths.arrays import as_array
from mechatlas.maths.assignment import assign
from mechatlas.maths.pricing import Factors
from mechatlas.maths.statistics import proportion

SWEEPS = 3
"""Times that every two layers are matched again."""
DECAY = 0.75
"""Weight of a layer relative to the next nearer one to the link."""
CHANCE_Q_VALUE = 0.5
"""q-value above which a link is more likely chance than not."""


def compose(columns: Sequence[Int[np.ndarray, " _latent"]]) -> Int[np.ndarray, " first"]:
    """Follow matches from the first dictionary to the last; -1 where one is missing."""
    reached = np.arange(len(columns[0]))
    for step in columns:
        reached = np.where(reached < 0, -1, step[reached])
    return reached


def cycle_agreement(
    forward: Int[np.ndarray, " n"], back: Int[np.ndarray, " m"], *, n: int
) -> Float[np.ndarray, ""]:
    """Share of the latents with a match both ways that come back to themselves.

    Args:
        forward: Latent of the last dictionary for each of the first; -1 for none.
        back: Latent of the first dictionary for each of the last; -1 for none.
        n: Number of latents of the first dictionary.

    Returns:
        The share; NaN where no latent has a match both ways.
    """
    reached = compose([forward, back])
    closed = reached >= 0
    return np.asarray((reached == np.arange(n))[closed].mean() if closed.any() else np.nan)


@renamed_attributes
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Tracks(Result):
    """Feature tracks through layers, each without a gap."""

    latents: Int[np.ndarray, "track layer"]
    """Latent of each track in each layer, -1 where it has none."""
    q_values: Float[np.ndarray, "track layer"]
    """q-value of the link to the previous layer (for a track's first layer: to the next); 1 where
    there is no link."""
    cosines: Float[np.ndarray, "track layer"]
    """Cosine of the parts of the track before and after that link; 0 where there is no link."""
    link_error_probability: Float[np.ndarray, "track layer"]
    """Probability that the link to the previous layer is wrong; 0 where there is no link."""

    def significant(self, first: int, last: int, *, fdr: float = FDR) -> Bool[np.ndarray, " track"]:
        """Select the tracks whose latents in two layers are one feature, at a false match rate.

        The probability that a pair is wrong is taken to be the sum over the links between the
        layers. The surest pairs are selected, as many as have the rate as their mean probability.

        Args:
            first: Number of a layer.
            last: Number of a later layer.
            fdr: False match rate.
        """
        present = (self.latents[:, first] >= 0) & (self.latents[:, last] >= 0)
        wrong = self.link_error_probability[:, first + 1 : last + 1].sum(axis=1)
        wrong = np.where(present, np.minimum(wrong, 1.0), 1.0)
        order = np.argsort(wrong, kind="stable")
        mean = np.cumsum(wrong[order]) / np.arange(1, len(order) + 1)
        selected = np.zeros(len(wrong), bool)
        selected[order] = mean <= fdr
        return selected & present

    @renamed_arguments
    def between(self, first: int, last: int, *, n: int, fdr: float = FDR) -> Int[np.ndarray, " n"]:
        """Match two layers by the tracks that run through both.

        Args:
            first: Number of the layer whose latents are matched.
            last: Number of a later layer.
            n: Number of latents of the first.
            fdr: False match rate.

        Returns:
            The latent of the last layer for each of the first; -1 for none.
        """
        selected = self.significant(first, last, fdr=fdr)
        columns = np.full(n, -1)
        columns[self.latents[selected, first]] = self.latents[selected, last]
        return columns

    def summary(self) -> str:
        """Number of tracks, and how many run through all layers."""
        layers = self.latents.shape[1]
        lengths = (self.latents >= 0).sum(axis=1)
        through = int(self.significant(0, layers - 1).sum())
        return (
            f"Tracks: {len(lengths):,} tracks through {layers} layers, "
            f"{int((lengths > 1).sum()):,} of two layers or more.\n"
            f"{through:,} connect the first and the last layer (false match rate {FDR:.0%})."
        )


@renamed_arguments
def track(
    layers: Sequence[ArrayLike | Tensor],
    matches: Sequence[Match],
    *,
    fdr: float = FDR,
    nulls: Sequence[Null] = NULLS,
    seed: int = 0,
    sweeps: int = SWEEPS,
    on_progress: Progress = no_progress,
) -> Tracks:
    """Solve all layers jointly.

    Args:
        layers: Vectors (latent, d) of each layer, all of one width: numpy, torch or lists.
        matches: The match of each layer with the next, to start from.
        fdr: False match rate at which latents are linked.
        nulls: Functions that make null dictionaries.
        seed: Seed of the nulls.
        sweeps: Times that every two layers are matched again; fewer if nothing changes.
        on_progress: Callback with the number of matches of two layers that are done.

    Raises:
        InputError: There is not one match for every two neighboring layers, of as many latents.

    Examples:
        >>> import numpy as np, mechatlas as ma
        >>> rows = np.random.default_rng(0).standard_normal((64, 16))
        >>> layers = [rows, rows[::-1], rows]
        >>> matches = [ma.match(layers[0], layers[1]), ma.match(layers[1], layers[2])]
        >>> ma.track(layers, matches).latents[:2]
        array([[ 0, 63,  0],
               [ 1, 62,  1]])
    """
    units = [unit_rows(as_array(x, "latent d", f"Layer {k}")) for k, x in enumerate(layers)]
    sizes = [(len(m.unit_a), len(m.unit_b)) for m in matches]
    if sizes != list(itertools.pairwise(map(len, units))):
        raise InputError(
            f"Layers of {', '.join(str(len(x)) for x in units)} latents need a match of each with "
            f"the next, got matches of {', '.join(f'{n} with {m}' for n, m in sizes) or 'none'}."
        )
    units = [only_unique(x) for x in units]
    links = [_Links.of(each) for each in matches]
    n_links = len(links)
    for sweep in range(sweeps):
        changed = 0
        order = range(n_links) if sweep % 2 == 0 else reversed(range(n_links))
        for done, k in enumerate(order):
            before, after = _before(units, links, k), _after(units, links, k + 1)
            new = _link(before, after, fdr=fdr, nulls=nulls, seed=seed)
            changed += int((new.columns != links[k].columns).sum())
            links[k] = new
            on_progress(sweep * n_links + done + 1, sweeps * n_links)
        if not changed:
            break
    return _follow([len(x) for x in units], links)


class _Links(NamedTuple):
    """Links between the latents of a layer and those of the next."""

    columns: Int[np.ndarray, " latent"]
    """Latent of the next layer, -1 for none."""
    q_values: Float[np.ndarray, " latent"]
    cosines: Float[np.ndarray, " latent"]
    error_probability: Float[np.ndarray, " latent"]

    @classmethod
    def of(cls, matching: Match) -> "_Links":
        """Links of the matched pairs."""
        q_values = matching.q_values
        return cls(matching.matched_columns(), q_values, matching.cosines, local_fdr(q_values))


def _link(
    before: Float[np.ndarray, "n d"],
    after: Float[np.ndarray, "m d"],
    *,
    fdr: float,
    nulls: Sequence[Null],
    seed: int,
) -> _Links:
    """Match tracks up to a layer with tracks from the next layer on.

    A link is kept if it is significant from both sides: the parts of a split feature are similar
    to it seen from one side only, and an error would go on along the track.
    """
    n = len(before)
    links = _Links(np.full(n, -1), np.ones(n), np.zeros(n), np.ones(n))
    rows, present = np.flatnonzero(before.any(axis=1)), np.flatnonzero(after.any(axis=1))
    if not (len(rows) and len(present)):  # some codes are zero
        return links
    a, b = before[rows], after[present]
    partners = assign(Factors.squared_distances(a, b)).columns
    i = np.flatnonzero(partners >= 0)
    j = partners[i]
    sides = (a, b, i, j), (b, a, j, i)
    q_values = np.maximum(
        *(compare_with_null(*side, nulls=nulls, seed=seed).q_values for side in sides)
    )
    linked = rows[i]
    links.columns[linked] = np.where(q_values <= fdr, present[j], -1)
    links.q_values[linked], links.error_probability[linked] = q_values, local_fdr(q_values)
    links.cosines[linked] = np.einsum("pd,pd->p", a[i], b[j], dtype=np.float64)
    return links


def _before(
    layers: list[Float[np.ndarray, "_latent d"]], links: list[_Links], layer: int
) -> Float[np.ndarray, "latent d"]:
    """Sum each latent of a layer with the earlier part of its track, nearer layers more."""
    total = layers[0]
    for x, step in zip(layers[1 : layer + 1], links, strict=False):
        rows = np.flatnonzero(step.columns >= 0)
        following = x.copy()
        following[step.columns[rows]] += np.float32(DECAY) * total[rows]
        total = following
    return unit_rows(total)


def _after(
    layers: list[Float[np.ndarray, "_latent d"]], links: list[_Links], layer: int
) -> Float[np.ndarray, "latent d"]:
    """Sum each latent of a layer with the later part of its track, nearer layers more."""
    total = layers[-1]
    for k in reversed(range(layer, len(links))):
        rows = np.flatnonzero(links[k].columns >= 0)
        preceding = layers[k].copy()
        preceding[rows] += np.float32(DECAY) * total[links[k].columns[rows]]
        total = preceding
    return unit_rows(total)


def _follow(sizes: list[int], links: list[_Links]) -> Tracks:
    """Follow links from layer to layer; tracks are numbered by their first layer."""
    track_of, n_tracks = [np.arange(sizes[0])], sizes[0]
    for size, step in zip(sizes[1:], links, strict=True):
        new, rows = np.full(size, -1), np.flatnonzero(step.columns >= 0)
        new[step.columns[rows]] = track_of[-1][rows]
        alone = np.flatnonzero(new < 0)
        new[alone] = n_tracks + np.arange(len(alone))
        n_tracks += len(alone)
        track_of.append(new)
    shape = n_tracks, len(sizes)
    latents = np.full(shape, -1)
    q_values, cosines, wrong = np.ones(shape), np.zeros(shape), np.zeros(shape)
    for layer, tracks in enumerate(track_of):
        latents[tracks, layer] = np.arange(len(tracks))
    for layer, step in enumerate(links):
        rows = np.flatnonzero(step.columns >= 0)
        tracks = track_of[layer][rows]
        wrong[tracks, layer + 1] = step.error_probability[rows]
        born = tracks[(latents[tracks, :layer] < 0).all(axis=1)]
        for values, linked in ((q_values, step.q_values), (cosines, step.cosines)):
            values[tracks, layer + 1] = linked[rows]
            values[born, layer] = values[born, layer + 1]
    return Tracks(latents, q_values, cosines, wrong)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SurvivalCurves(Result):
    """Births, deaths and persistence of feature tracks. Layers count from 0."""

    birth: Int[np.ndarray, " track"]
    """First layer of the track."""
    earliest_birth: Int[np.ndarray, " track"]
    """Previous layer instead, if a latent there is more likely this feature than chance."""
    death: Int[np.ndarray, " track"]
    """Last layer of the track."""
    latest_death: Int[np.ndarray, " track"]
    """Next layer instead, if a latent there is more likely this feature than chance."""
    persistence: Float[np.ndarray, " distance"]
    """Share of the latents of a layer that are significantly the same feature 1, 2, ... layers
    on."""
    low: Float[np.ndarray, " distance"]
    """Lower end of the 95 % Wilson interval of `persistence`."""
    high: Float[np.ndarray, " distance"]
    """Upper end of the 95 % Wilson interval of `persistence`."""
    birth_share: Float[np.ndarray, " layer"]
    """Share of each layer's latents whose track begins there."""
    death_share: Float[np.ndarray, " layer"]
    """Share of each layer's latents whose track ends there."""

    def summary(self) -> str:
        """Persistence one layer on and to the last layer."""
        near, far = (
            f"{self.persistence[k]:.1%} [{self.low[k]:.1%}, {self.high[k]:.1%}]" for k in (0, -1)
        )
        return (
            f"SurvivalCurves: {near} of the latents persist one layer on, {far} persist "
            f"{len(self.persistence)} layers on (95 % intervals)."
        )


def survival(tracks: Tracks, matches: Sequence[Match], *, fdr: float = FDR) -> SurvivalCurves:
    """Read survival curves off tracks.

    Args:
        tracks: The joint solution.
        matches: The match of each layer with the next, which says how sure births and deaths are.
        fdr: False match rate of persisting features.
    """
    present = tracks.latents >= 0
    n_layers = present.shape[1]
    birth = present.argmax(axis=1)
    death = n_layers - 1 - present[:, ::-1].argmax(axis=1)
    numbers = np.arange(len(present))
    earliest, latest = birth.copy(), death.copy()
    for layer, matching in enumerate(matches):
        likely = np.flatnonzero(matching.q_values <= CHANCE_Q_VALUE)
        continues = np.zeros(len(matching.unit_b), bool)
        continues[matching.columns[likely]] = True
        ends = numbers[death == layer]
        latest[ends] += matching.q_values[tracks.latents[ends, layer]] <= CHANCE_Q_VALUE
        begins = numbers[birth == layer + 1]
        earliest[begins] -= continues[tracks.latents[begins, layer + 1]]
    shares = []
    for distance in range(1, n_layers):
        alive = int(present[:, :-distance].sum())
        firsts = range(n_layers - distance)
        both = sum(int(tracks.significant(k, k + distance, fdr=fdr).sum()) for k in firsts)
        shares.append(proportion(both, alive))
    persistence, low, high = np.array(list(map(dataclasses.astuple, shares))).reshape(-1, 3).T
    size = np.maximum(present.sum(axis=0), 1)
    return SurvivalCurves(
        birth=birth,
        earliest_birth=earliest,
        death=death,
        latest_death=latest,
        persistence=persistence,
        low=low,
        high=high,
        birth_share=np.bincount(birth, minlength=n_layers) / size,
        death_share=np.bincount(death, minlength=n_layers) / size,
    )


def tracks_table(tracks: Tracks, curves: SurvivalCurves) -> dict[str, np.ndarray]:
    """Latents of all tracks, track by track."""
    present = tracks.latents >= 0
    number, layer = np.nonzero(present)
    return {
        "track": number,
        "layer": layer.astype(np.int32),
        "latent": tracks.latents[present],
        "cosine": tracks.cosines[present],
        "q_value": tracks.q_values[present],
        "link_error_probability": tracks.link_error_probability[present],
        "birth": curves.birth[number],
        "earliest_birth": curves.earliest_birth[number],
        "death": curves.death[number],
        "latest_death": curves.latest_death[number],
    }
