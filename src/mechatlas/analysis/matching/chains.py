"""Many dictionaries in a row: which latents are one feature that lives through several layers.

    compose     the matches of neighbours, followed one after another
    track       the joint solution: every latent belongs to one track, and every track has at most
                one latent of a layer, so that no two ways round a cycle disagree
    live        birth, persistence and death of tracks, with intervals

The joint solution starts from composition. Then the layers are divided in two, again and again:
one layer and the others, or the layers before and after a cut. What tracks have on one side is
matched with what they have on the other, each part as the sum of its latents, those near the
division weighing more. This is the same exact pairing with the same null: parts that stand are
joined, others go apart. So each division says of a track how likely it is that its parts do not
belong together, and two latents of a track are one feature unless a cut between them is wrong or
one of them strays.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from mechatlas.analysis.matching.folding import unit_rows
from mechatlas.analysis.matching.nulls import NULLS, Null, chances
from mechatlas.analysis.matching.pairing import RATE, Match, weighed
from mechatlas.base import Progress, no_progress
from mechatlas.maths.assignment import assign
from mechatlas.maths.pricing import Factors

SWEEPS = 3
NEARER = 0.75
"""Weight of a layer two away against one that is next to it."""
REACH = 2
"""Layers from one latent of a track to the next at most: a feature may be missed once."""
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
    """Features through layers."""

    latents: Int[np.ndarray, "track layer"]
    """The latent of each track in each layer, -1 where it has none."""
    q_values: Float[np.ndarray, "track layer"]
    """Of the claim that the latent belongs to the track; 1 where there is none."""
    cosines: Float[np.ndarray, "track layer"]
    """Of the latent with the rest of its track; 0 where there is none."""
    strays: Float[np.ndarray, "track layer"]
    """Chance that the latent does not belong to the rest of the track; 1 where there is none."""
    breaks: Float[np.ndarray, "track layer"]
    """Chance that the track is another feature from this layer on than before it; 0 in the first
    layer of the track, and where it has no latent."""

    def doubts(self, first: int, last: int) -> Float[np.ndarray, " track"]:
        """Chance that two latents of a track are not one feature; at least 1 if it misses one."""
        there = self.latents >= 0
        chance = self.breaks[:, first + 1 : last + 1].sum(axis=1)
        # At its ends a track breaks where a latent strays: that counts once.
        chance += np.where(there[:, :first].any(axis=1), self.strays[:, first], 0.0)
        chance += np.where(there[:, last + 1 :].any(axis=1), self.strays[:, last], 0.0)
        return np.where(there[:, first] & there[:, last], chance, np.inf)

    def stand(self, first: int, last: int, *, rate: float = RATE) -> Bool[np.ndarray, " track"]:
        """Tracks whose latents of two layers are one feature, but for this share of them."""
        doubts = np.minimum(self.doubts(first, last), 1.0)
        order = np.argsort(doubts, kind="stable")
        told = np.cumsum(doubts[order]) / np.arange(1, len(order) + 1)
        stands = np.zeros(len(doubts), bool)
        stands[order] = (told <= rate) & (doubts[order] < 1)
        return stands

    def between(
        self, first: int, last: int, *, n: int, rate: float = RATE
    ) -> Int[np.ndarray, " n"]:
        """The match of two layers that the tracks say, at a false match rate.

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
        rate: False match rate at which parts are joined to tracks.
        nulls: How null dictionaries are made.
        seed: Seed of the nulls.
        sweeps: Times that everything is matched again; fewer if nothing changes.
        on_progress: Told how many times parts have been matched.
    """
    layers = [unit_rows(x) for x in layers]
    owner = _composed([len(x) for x in layers], matches)
    told = _Told.nothing([len(x) for x in layers])
    divisions = _divisions(len(layers))
    for sweep in range(sweeps):
        changed = 0
        for done, here in enumerate(divisions):
            parts = _rejoined(layers, owner, here, rate=rate, nulls=nulls, seed=seed)
            _note(told, owner, here, parts)
            changed += _rename(owner, here, parts)
            on_progress(sweep * len(divisions) + done + 1, sweeps * len(divisions))
        if not changed:
            break
    return _gathered(owner, told)


class _Told(NamedTuple):
    """Evidence of each latent of each layer."""

    q_values: list[np.ndarray]
    cosines: list[np.ndarray]
    strays: list[np.ndarray]
    breaks: list[np.ndarray]

    @classmethod
    def nothing(cls, sizes: list[int]) -> "_Told":
        ones, zeros = ([[f(n) for n in sizes] for _ in range(2)] for f in (np.ones, np.zeros))
        return cls(ones[0], zeros[0], ones[1], zeros[1])


class _Parts(NamedTuple):
    """Parts of tracks in some layers, and what they were matched with in the others."""

    names: Int[np.ndarray, " part"]
    """Track of each part, ascending."""
    partners: Int[np.ndarray, " part"]
    """Track that it goes on with; -1 if none stands."""
    q_values: Float[np.ndarray, " part"]
    cosines: Float[np.ndarray, " part"]
    chances: Float[np.ndarray, " part"]
    """That the partner is wrong."""


def _divisions(n_layers: int) -> list[np.ndarray]:
    """Layers on one side: one layer, from the middle out, then all layers from one on."""
    which = np.arange(n_layers)
    order = sorted(range(n_layers - 1), key=lambda k: (abs(2 * k - n_layers + 1), k))
    return [which == k for k in order] + [which >= k for k in range(1, n_layers)]


def _composed(sizes: list[int], matches: Sequence[Match]) -> list[np.ndarray]:
    """The track of each latent, by following the matches of neighbours."""
    owner = [np.arange(sizes[0])]
    following = sizes[0]
    for size, found in zip(sizes[1:], matches, strict=True):
        new = np.full(size, -1)
        new[found.columns[found.matched]] = owner[-1][found.matched]
        alone = np.flatnonzero(new < 0)
        new[alone] = following + np.arange(len(alone))
        following += len(alone)
        owner.append(new)
    return owner


def _rejoined(
    layers: list[np.ndarray],
    owner: list[np.ndarray],
    here: np.ndarray,
    *,
    rate: float,
    nulls: Sequence[Null],
    seed: int,
) -> _Parts:
    """Match the parts of tracks in the layers `here` with those in the others."""
    (names, own), (others, theirs) = (_centres(layers, owner, side) for side in (here, ~here))
    n = len(names)
    parts = _Parts(names, np.full(n, -1), np.ones(n), np.zeros(n), np.ones(n))
    real, there = np.flatnonzero(own.any(axis=1)), np.flatnonzero(theirs.any(axis=1))
    if len(real) and len(there):  # of codes some are zero
        factors = Factors.squared_distances(own[real], theirs[there])
        found = weighed(assign(factors), factors, rate=rate, nulls=nulls, seed=seed)
        parts.partners[real] = np.where(found.matched, others[there[found.columns]], -1)
        parts.q_values[real], parts.cosines[real] = found.q_values, found.cosines
        parts.chances[real] = chances(found.q_values)
    return parts


def _centres(
    layers: list[np.ndarray], owner: list[np.ndarray], here: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Each track's latents in the layers `here`, summed; nearer to the others weigh more.

    Zero for tracks with no latent in reach of the others.
    """
    inside, outside = np.flatnonzero(here), np.flatnonzero(~here)
    names = np.unique(np.concatenate([owner[k] for k in inside]))
    centres = np.zeros((len(names), layers[0].shape[1]), np.float32)
    near = np.zeros(len(names), bool)
    for k in inside:
        distance, at = int(abs(outside - k).min()), np.searchsorted(names, owner[k])
        centres[at] += np.float32(NEARER ** (distance - 1)) * layers[k]
        near[at] |= distance <= REACH
    return names, unit_rows(centres) * near[:, None]


def _rename(owner: list[np.ndarray], here: np.ndarray, parts: _Parts) -> int:
    """Give parts the names of their partners, others new ones; how many latents that moves."""
    fresh = max(int(o.max(initial=-1)) for o in owner) + 1 + np.arange(len(parts.names))
    went_on = np.isin(parts.names, np.concatenate([owner[k] for k in np.flatnonzero(~here)]))
    new = np.where(parts.partners < 0, fresh, parts.partners)
    changed = (went_on != (parts.partners >= 0)) | (went_on & (parts.names != new))
    moved = 0
    for k in np.flatnonzero(here):
        at = np.searchsorted(parts.names, owner[k])
        moved += int(changed[at].sum())
        owner[k] = new[at]
    return moved


def _note(told: _Told, owner: list[np.ndarray], here: np.ndarray, parts: _Parts) -> None:
    """Keep what the matching said with the latents that it is about."""
    layer = int(here.argmax())
    at = np.searchsorted(parts.names, owner[layer])
    if here[-1]:
        told.breaks[layer][:] = parts.chances[at]
    if here.sum() == 1:
        told.strays[layer][:] = parts.chances[at]
        told.q_values[layer][:] = parts.q_values[at]
        told.cosines[layer][:] = parts.cosines[at]


def _gathered(owner: list[np.ndarray], told: _Told) -> Tracks:
    names = np.unique(np.concatenate(owner))
    shape = len(names), len(owner)
    latents = np.full(shape, -1)
    q, near, strays, breaks = np.ones(shape), np.zeros(shape), np.ones(shape), np.zeros(shape)
    for layer, tracks in enumerate(owner):
        at = np.searchsorted(names, tracks)
        latents[at, layer] = np.arange(len(tracks))
        for values, kept in zip((q, near, strays, breaks), told, strict=True):
            values[at, layer] = kept[layer]
    there = latents >= 0
    breaks[np.arange(len(names)), there.argmax(axis=1)] = 0.0  # where the track begins
    lone = there.sum(axis=1) == 1
    q[lone], near[lone], strays[lone] = 1.0, 0.0, 1.0
    order = np.lexsort((latents.max(axis=1), there.argmax(axis=1)))
    return Tracks(*(x[order] for x in (latents, q, near, strays, breaks)))


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
