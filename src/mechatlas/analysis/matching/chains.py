"""Many dictionaries in a row: which latents are one feature that lives through several layers.

    compose     the matches of neighbours, followed one after another
    track       the joint solution: every latent belongs to one track, and every track has at most
                one latent of a layer, so that no two ways round a cycle disagree
    live        birth, persistence and death of tracks, with intervals

The joint solution starts from composition. Then, layer by layer, the latents of one layer are
taken off their tracks and matched with the tracks again: a track is the sum of its latents in
other layers, near ones weighing more. This is the same exact pairing with the same null, and no
step lowers the agreement within tracks unless the null says that the agreement was chance.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from mechatlas.analysis.matching.folding import unit_rows
from mechatlas.analysis.matching.nulls import NULLS, Null
from mechatlas.analysis.matching.pairing import RATE, Match, weighed
from mechatlas.base import Progress, no_progress
from mechatlas.maths.assignment import assign
from mechatlas.maths.pricing import Factors

SWEEPS = 3
NEARER = 0.75
"""Weight of a layer two away against one that is next to it."""
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

    def between(self, first: int, last: int, *, n: int) -> Int[np.ndarray, " n"]:
        """The match of two layers that the tracks say; -1 where a track misses one."""
        both = (self.latents[:, first] >= 0) & (self.latents[:, last] >= 0)
        columns = np.full(n, -1)
        columns[self.latents[both, first]] = self.latents[both, last]
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
        rate: False match rate at which a latent joins a track.
        nulls: How null dictionaries are made.
        seed: Seed of the nulls.
        sweeps: Times that every layer is matched again; fewer if nothing changes.
        on_progress: Told how many layers have been matched.
    """
    layers = [unit_rows(x) for x in layers]
    owner = _composed([len(x) for x in layers], matches)
    q_values = [np.ones(len(x)) for x in layers]
    cosines = [np.zeros(len(x)) for x in layers]
    n_layers = len(layers)
    for sweep in range(sweeps):
        changed = 0
        # First from the middle out, where most is known, then back.
        order = sorted(range(n_layers), key=lambda k: (abs(2 * k - n_layers + 1), k))
        for done, layer in enumerate(order if sweep % 2 == 0 else order[::-1]):
            names, centres = _centres(layers, owner, layer)
            there = np.flatnonzero(layers[layer].any(axis=1))  # of codes some are zero
            new = np.full(len(layers[layer]), -1)
            q_values[layer], cosines[layer] = np.ones(len(new)), np.zeros(len(new))
            if len(names) and len(there):
                factors = Factors.squared_distances(layers[layer][there], centres)
                found = weighed(assign(factors), factors, rate=rate, nulls=nulls, seed=seed)
                new[there[found.matched]] = names[found.columns[found.matched]]
                q_values[layer][there], cosines[layer][there] = found.q_values, found.cosines
            alone = np.flatnonzero(new < 0)
            new[alone] = np.arange(len(alone)) + max(int(o.max(initial=-1)) for o in owner) + 1
            changed += _moved(owner, layer, new)
            owner[layer] = new
            on_progress(sweep * n_layers + done + 1, sweeps * n_layers)
        if not changed:
            break
    return _gathered(owner, q_values, cosines)


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


def _centres(
    layers: list[np.ndarray], owner: list[np.ndarray], left_out: int
) -> tuple[np.ndarray, np.ndarray]:
    """Each track's latents in the other layers, summed, nearer layers weighing more."""
    names = np.unique(np.concatenate([o for k, o in enumerate(owner) if k != left_out]))
    centres = np.zeros((len(names), layers[0].shape[1]), np.float32)
    for k, x in enumerate(layers):
        if k != left_out:
            weight = np.float32(NEARER ** (abs(k - left_out) - 1))
            centres[np.searchsorted(names, owner[k])] += weight * x
    real = centres.any(axis=1)
    return names[real], unit_rows(centres[real])


def _moved(owner: list[np.ndarray], layer: int, new: np.ndarray) -> int:
    others = np.concatenate([o for k, o in enumerate(owner) if k != layer])
    before, after = np.isin(owner[layer], others), np.isin(new, others)
    return int(((before != after) | (before & (owner[layer] != new))).sum())


def _gathered(
    owner: list[np.ndarray], q_values: list[np.ndarray], cosines: list[np.ndarray]
) -> Tracks:
    names = np.unique(np.concatenate(owner))
    shape = len(names), len(owner)
    latents, q, near = np.full(shape, -1), np.ones(shape), np.zeros(shape)
    for layer, tracks in enumerate(owner):
        at = np.searchsorted(names, tracks)
        latents[at, layer] = np.arange(len(tracks))
        q[at, layer], near[at, layer] = q_values[layer], cosines[layer]
    lone = (latents >= 0).sum(axis=1) == 1
    q[lone], near[lone] = 1.0, 0.0
    order = np.lexsort((latents.max(axis=1), (latents >= 0).argmax(axis=1)))
    return Tracks(latents[order], q[order], near[order])


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
    """Share of the latents of a layer that are still there 1, 2, ... layers on."""
    low: Float[np.ndarray, " distance"]
    """Lower end of its 95 % interval (Wilson)."""
    high: Float[np.ndarray, " distance"]
    born: Float[np.ndarray, " layer"]
    """Share of each layer's latents whose track begins there."""
    dying: Float[np.ndarray, " layer"]
    """Share of each layer's latents whose track ends there."""


def live(tracks: Tracks, matches: Sequence[Match]) -> LifeLines:
    """Read life lines off tracks; the matches of neighbours say how sure the ends are."""
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
        both = int((there[:, :-distance] & there[:, distance:]).sum())
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
