"""Many dictionaries in a row: which latents are one feature that lives through several layers.

    compose     the matches of neighbours, followed one after another
    track       the joint solution: every latent belongs to one track, and every track has at most
                one latent of a layer, so that no two ways round a cycle disagree
    live        birth, persistence and death of tracks, with intervals

The joint solution starts from the matches of neighbours. Then two neighbours are matched again,
each latent together with what its track is on its own side, nearer layers weighing more: what is
known of a feature from several layers is surer than what one says. It is the same exact pairing
with the same null, so that a link carries the evidence that a pair does, and with two layers the
tracks are the pairs. This goes there and back until nothing changes.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from mechatlas.analysis.matching.folding import unit_rows
from mechatlas.analysis.matching.nulls import NULLS, Null, chances, weigh
from mechatlas.analysis.matching.pairing import RATE, Match
from mechatlas.base import InputError, Progress, no_progress
from mechatlas.maths.assignment import assign
from mechatlas.maths.pricing import Factors

SWEEPS = 3
NEARER = 0.75
"""Weight of a layer against the one that is next to it, towards the link."""
LOOSE = 0.5
"""A link with a larger q-value is more likely chance than not."""


def compose(
    columns: Sequence[Int[np.ndarray, " _latent"]],
) -> Int[np.ndarray, " first"]:
    """Follow matches from the first dictionary to the last; -1 where one is missing."""
    reached = np.arange(len(columns[0]))
    for step in columns:
        reached = np.where(reached < 0, -1, step[reached])
    return reached


def cycle_agreement(
    there: Int[np.ndarray, " n"], back: Int[np.ndarray, " m"], *, n: int
) -> Float[np.ndarray, ""]:
    """Share of the latents with a match both ways that come back to themselves."""
    reached = compose([there, back])
    closed = reached >= 0
    return np.asarray((reached == np.arange(n))[closed].mean() if closed.any() else np.nan)


@dataclasses.dataclass(frozen=True, eq=False)
class Tracks:
    """Features through layers, each without a gap."""

    latents: Int[np.ndarray, "track layer"]
    """The latent of each track in each layer, -1 where it has none."""
    q_values: Float[np.ndarray, "track layer"]
    """Of the link with the layer before, for the first layer of a track with the next; 1 where
    there is none."""
    cosines: Float[np.ndarray, "track layer"]
    """Of what the track is before and after that link; 0 where there is none."""
    breaks: Float[np.ndarray, "track layer"]
    """Chance that the link with the layer before is wrong; 0 where there is none."""

    def stand(self, first: int, last: int, *, rate: float = RATE) -> Bool[np.ndarray, " track"]:
        """Tracks whose latents of two layers are one feature, but for this share of them.

        The chance that a pair is wrong is taken to be the sum over the links between, and the
        surest pairs stand, as many as have this mean.
        """
        there = (self.latents[:, first] >= 0) & (self.latents[:, last] >= 0)
        chance = self.breaks[:, first + 1 : last + 1].sum(axis=1)
        chance = np.where(there, np.minimum(chance, 1.0), 1.0)
        order = np.argsort(chance, kind="stable")
        mean = np.cumsum(chance[order]) / np.arange(1, len(order) + 1)
        stands = np.zeros(len(chance), bool)
        stands[order] = mean <= rate
        return stands & there

    def between(
        self, first: int, last: int, *, n: int, rate: float = RATE
    ) -> Int[np.ndarray, " n"]:
        """The match of two layers that the tracks say.

        Args:
            first: The layer whose latents are matched.
            last: A later layer.
            n: Latents of the first.
            rate: False match rate.

        Returns:
            The latent of the last layer for each of the first; -1 for none.
        """
        stands = self.stand(first, last, rate=rate)
        columns = np.full(n, -1)
        columns[self.latents[stands, first]] = self.latents[stands, last]
        return columns


def track(
    layers: Sequence[Float[np.ndarray, "_latent d"]],
    matches: Sequence[Match],
    *,
    rate: float = RATE,
    nulls: Sequence[Null] = NULLS,
    seed: int = 0,
    sweeps: int = SWEEPS,
    on_progress: Progress = no_progress,
) -> Tracks:
    """Solve all layers jointly.

    Args:
        layers: Vectors of the latents of each layer, all of one width.
        matches: The match of each layer with the next, to start from.
        rate: False match rate at which latents are linked.
        nulls: How null dictionaries are made.
        seed: Seed of the nulls.
        sweeps: Times that every two layers are matched again; fewer if nothing changes.
        on_progress: Told how many times layers have been matched.

    Raises:
        InputError: There is not one match for every two neighbours, of as many latents.
    """
    sizes = [(len(found.unit_a), len(found.unit_b)) for found in matches]
    if sizes != list(itertools.pairwise(map(len, layers))):
        raise InputError(
            f"Layers of {', '.join(str(len(x)) for x in layers)} latents need a match of each with "
            f"the next, got matches of {', '.join(f'{n} with {m}' for n, m in sizes) or 'none'}."
        )
    layers = [unit_rows(x) for x in layers]
    links = [_Links.of(found) for found in matches]
    n_links = len(links)
    for sweep in range(sweeps):
        changed = 0
        order = range(n_links) if sweep % 2 == 0 else reversed(range(n_links))
        for done, k in enumerate(order):
            before, after = _before(layers, links, k), _after(layers, links, k + 1)
            new = _linked(before, after, rate=rate, nulls=nulls, seed=seed)
            changed += int((new.columns != links[k].columns).sum())
            links[k] = new
            on_progress(sweep * n_links + done + 1, sweeps * n_links)
        if not changed:
            break
    return _followed([len(x) for x in layers], links)


class _Links(NamedTuple):
    """Latents of a layer and those of the next that carry them on."""

    columns: Int[np.ndarray, " latent"]
    """The latent of the next layer, -1 for none."""
    q_values: Float[np.ndarray, " latent"]
    cosines: Float[np.ndarray, " latent"]
    chances: Float[np.ndarray, " latent"]
    """That the link is wrong."""

    @classmethod
    def of(cls, found: Match) -> "_Links":
        """The pairs that stand."""
        columns = np.where(found.matched, found.columns, -1)
        return cls(columns, found.q_values, found.cosines, chances(found.q_values))


def _linked(
    before: np.ndarray, after: np.ndarray, *, rate: float, nulls: Sequence[Null], seed: int
) -> _Links:
    """Match what tracks are up to a layer with what they are from the next on.

    A link stands if it does from both sides: what a feature split into is alike seen from one of
    them only, and an error would go on along the track.
    """
    n = len(before)
    links = _Links(np.full(n, -1), np.ones(n), np.zeros(n), np.ones(n))
    rows, there = np.flatnonzero(before.any(axis=1)), np.flatnonzero(after.any(axis=1))
    if not (len(rows) and len(there)):  # of codes some are zero
        return links
    a, b = before[rows], after[there]
    found = assign(Factors.squared_distances(a, b)).columns
    i = np.flatnonzero(found >= 0)
    sides = (a, b, i, found[i]), (b, a, found[i], i)
    q_values = np.maximum(*(weigh(*side, nulls=nulls, seed=seed).q_values for side in sides))
    of = rows[i]
    links.columns[of] = np.where(q_values <= rate, there[found[i]], -1)
    links.q_values[of], links.chances[of] = q_values, chances(q_values)
    links.cosines[of] = np.einsum("pd,pd->p", a[i], b[found[i]], dtype=np.float64)
    return links


def _before(layers: list[np.ndarray], links: list[_Links], layer: int) -> np.ndarray:
    """Each latent of a layer with what its track was before, nearer layers weighing more."""
    total = layers[0]
    for x, step in zip(layers[1 : layer + 1], links, strict=False):
        rows = np.flatnonzero(step.columns >= 0)
        following = x.copy()
        following[step.columns[rows]] += np.float32(NEARER) * total[rows]
        total = following
    return unit_rows(total)


def _after(layers: list[np.ndarray], links: list[_Links], layer: int) -> np.ndarray:
    """Each latent of a layer with what its track is after, nearer layers weighing more."""
    total = layers[-1]
    for k in reversed(range(layer, len(links))):
        rows = np.flatnonzero(links[k].columns >= 0)
        preceding = layers[k].copy()
        preceding[rows] += np.float32(NEARER) * total[links[k].columns[rows]]
        total = preceding
    return unit_rows(total)


def _followed(sizes: list[int], links: list[_Links]) -> Tracks:
    """Links put one after another; tracks by their first layer."""
    owner, n_tracks = [np.arange(sizes[0])], sizes[0]
    for size, step in zip(sizes[1:], links, strict=True):
        new, rows = np.full(size, -1), np.flatnonzero(step.columns >= 0)
        new[step.columns[rows]] = owner[-1][rows]
        alone = np.flatnonzero(new < 0)
        new[alone] = n_tracks + np.arange(len(alone))
        n_tracks += len(alone)
        owner.append(new)
    shape = n_tracks, len(sizes)
    latents = np.full(shape, -1)
    q_values, cosines, breaks = np.ones(shape), np.zeros(shape), np.zeros(shape)
    for layer, tracks in enumerate(owner):
        latents[tracks, layer] = np.arange(len(tracks))
    for layer, step in enumerate(links):
        rows = np.flatnonzero(step.columns >= 0)
        tracks = owner[layer][rows]
        breaks[tracks, layer + 1] = step.chances[rows]
        born = tracks[(latents[tracks, :layer] < 0).all(axis=1)]
        for values, kept in ((q_values, step.q_values), (cosines, step.cosines)):
            values[tracks, layer + 1] = kept[rows]
            values[born, layer] = values[born, layer + 1]
    return Tracks(latents, q_values, cosines, breaks)


@dataclasses.dataclass(frozen=True, eq=False)
class LifeLines:
    """When features are born and die. Layers count from 0."""

    birth: Int[np.ndarray, " track"]
    """First layer of the track."""
    earliest_birth: Int[np.ndarray, " track"]
    """The layer before it too, if a latent there is more likely this feature than chance."""
    death: Int[np.ndarray, " track"]
    """Last layer of the track."""
    latest_death: Int[np.ndarray, " track"]
    persistence: Float[np.ndarray, " distance"]
    """Share of the latents of a layer that stand as the same feature 1, 2, ... layers on."""
    low: Float[np.ndarray, " distance"]
    """Lower end of its 95 % interval (Wilson)."""
    high: Float[np.ndarray, " distance"]
    born: Float[np.ndarray, " layer"]
    """Share of each layer's latents whose track begins there."""
    dying: Float[np.ndarray, " layer"]
    """Share of each layer's latents whose track ends there."""


def live(tracks: Tracks, matches: Sequence[Match], *, rate: float = RATE) -> LifeLines:
    """Read life lines off tracks; the matches of neighbours say how sure the ends are.

    Args:
        tracks: The joint solution.
        matches: The match of each layer with the next.
        rate: False match rate of what persists.
    """
    there = tracks.latents >= 0
    n_layers = there.shape[1]
    birth = there.argmax(axis=1)
    death = n_layers - 1 - there[:, ::-1].argmax(axis=1)
    lines = np.arange(len(there))
    earliest, latest = birth.copy(), death.copy()
    for layer, found in enumerate(matches):
        likely = np.flatnonzero(found.q_values <= LOOSE)
        after = np.full(len(found.unit_b), 1.0)
        after[found.columns[likely]] = 0.0
        ends = lines[death == layer]
        latest[ends] += found.q_values[tracks.latents[ends, layer]] <= LOOSE
        begins = lines[birth == layer + 1]
        earliest[begins] -= after[tracks.latents[begins, layer + 1]] == 0.0
    kept, low, high = [], [], []
    for distance in range(1, n_layers):
        alive = int(there[:, :-distance].sum())
        firsts = range(n_layers - distance)
        both = sum(int(tracks.stand(k, k + distance, rate=rate).sum()) for k in firsts)
        share, ends = wilson(both, alive)
        kept.append(share)
        low.append(ends[0])
        high.append(ends[1])
    size = np.maximum(there.sum(axis=0), 1)
    return LifeLines(
        birth=birth,
        earliest_birth=earliest,
        death=death,
        latest_death=latest,
        persistence=np.array(kept),
        low=np.array(low),
        high=np.array(high),
        born=np.bincount(birth, minlength=n_layers) / size,
        dying=np.bincount(death, minlength=n_layers) / size,
    )


def wilson(hits: int, n: int) -> tuple[float, tuple[float, float]]:
    """A share with its 95 % interval."""
    if n == 0:
        return 0.0, (0.0, 1.0)
    z = 1.959964
    share = hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return share, (max(0.0, centre - half), min(1.0, centre + half))
