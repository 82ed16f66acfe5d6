"""Does the network treat a feature in another pose as the blocks say?

    choose       codes of held-out rows -> which feature is swapped where, and in which pose
    swap         put the activation of I where the network sees hI, swap one feature's pose,
                 and compare what follows with the answer to hI
    Swaps        the answer with its null

The network runs on hI, but at one place it is given the activation of the untransformed input,
a(I). What follows then differs from the answer to hI. Where the feature was active with code f, its
contribution f D_e is replaced by f D_h: if the blocks are right, that moves what follows towards
the answer to hI. The alignment is the cosine between what putting in f D_h changes, and what is
missing without f D_e, at the network's output or any site downstream. There are two nulls for what
is put in, of the same length: the block D_h of other features, which asks whether it is this
feature that was missing, and the feature's own block in a wrong pose, which asks the harder
question whether it was missing in this pose.

Elements h that leave the feature unchanged are swapped too: what follows must hardly change, in
units of the change when the feature is removed.

Source: Geiger et al., Causal abstractions of neural networks (2021), for interchanging parts of
activations between inputs.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse
from torch import Tensor, nn

from mechatlas.activations.posing import Places
from mechatlas.activations.samples import Samples
from mechatlas.activations.sites import channels_last, edited, read
from mechatlas.base import InputError, Progress, Site, no_progress
from mechatlas.maths.actions import Action
from mechatlas.maths.groups import Group
from mechatlas.maths.statistics import q_values

SAMPLES = 16
"""Held-out samples on which a feature is swapped, where it is most active."""
FEWEST = 6
"""Samples that a feature must be active on."""
NULLS = 2
"""Other features that are swapped in place of each, at least."""
POOL = 200
"""Null alignments there should be in all, for small p-values of few features."""
WRONG = 2
"""Wrong poses that each is swapped to."""
BATCH = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Trials:
    """One feature, one place of one sample and one element for each trial."""

    feature: Int[np.ndarray, " trial"]
    row: Int[np.ndarray, " trial"]
    """Which of the rows that were looked at."""
    code: Float[np.ndarray, " trial"]
    element: Int[np.ndarray, " trial"]
    unchanged: Bool[np.ndarray, " trial"]
    """Whether the element leaves the feature unchanged."""
    wrong: Int[np.ndarray, "trial pose"]
    """Other elements, in whose poses the feature differs from both; -1 if there is none."""


@dataclasses.dataclass(frozen=True, eq=False)
class Swaps:
    """What swapping the pose of single features does downstream."""

    features: Int[np.ndarray, " tested"]
    """Those whose pose was swapped by elements that change them."""
    alignment: Float[np.ndarray, " tested"]
    """Mean cosine of what the block in pose h changes with what is missing without the feature."""
    null: Float[np.ndarray, "tested null"]
    """The same with the blocks of other features."""
    wrong: Float[np.ndarray, " tested"]
    """The same in a wrong pose; NaN if there is no other."""
    repaired: Float[np.ndarray, " tested"]
    """Mean share of what differed from the answer to hI, as a sum of squares, that the swap takes
    away."""
    repaired_null: Float[np.ndarray, "tested null"]
    together: float
    """Median share that swapping all that the dictionary says takes away."""
    p_values: Float[np.ndarray, " tested"]
    """Rank of the alignment among those of other features, each less the mean of the (other)
    nulls in the same places."""
    q_values: Float[np.ndarray, " tested"]
    pose_p_values: Float[np.ndarray, " tested"]
    """Test by exact sign flips that it is larger in the right pose than in wrong ones; NaN if there
    is no other."""
    pose_q_values: Float[np.ndarray, " tested"]
    symmetric: Int[np.ndarray, " symmetric"]
    """Features that were swapped by elements that leave them unchanged."""
    change: Float[np.ndarray, " symmetric"]
    """What that changes downstream, in units of what removing the feature does."""
    change_of_others: Float[np.ndarray, " tested"]
    """The same for the elements that do change a feature."""


def usable(places: Places, action: Action) -> Bool[np.ndarray, " element"]:
    """Elements other than e that take the places kept to positions of the map."""
    exact = (places.weight[..., 1:] == 0).all(dim=2).all(dim=1).cpu().numpy()
    exact[action.group.identity] = False
    return exact


def choose(
    codes: sparse.csr_array,
    samples: Int[np.ndarray, " row"],
    eligible: Int[np.ndarray, " eligible"],
    stabilisers: Sequence[frozenset[int]],
    elements: Bool[np.ndarray, " element"],
    group: Group,
    *,
    most: int,
    seed: int = 0,
) -> Trials:
    """Features in random order, where each is most active, in random poses.

    Args:
        codes: A row for each place of a held-out sample, a column for each feature.
        samples: The sample of each row; of one sample only the strongest row is used.
        eligible: Features to draw from.
        stabilisers: What leaves each feature unchanged.
        elements: Which elements may be used.
        group: The group.
        most: Features that are drawn, of those active on enough samples.
        seed: Of the draw.
    """
    random = np.random.default_rng([seed, 0x73776170])
    columns = codes.tocsc()
    found: list[tuple[int, int, float, int, bool, list[int]]] = []
    drawn = 0
    for feature in random.permutation(eligible):
        rows, values = _strongest(columns, samples, int(feature))
        if len(rows) < FEWEST:
            continue
        fixed = np.zeros(group.order, bool)
        fixed[list(stabilisers[feature])] = True
        for unchanged in (False, True):
            allowed = np.flatnonzero(elements & (fixed == unchanged))
            for row, value in zip(rows, values, strict=True) if len(allowed) else ():
                h = int(random.choice(allowed))
                other = np.flatnonzero(~fixed & ~fixed[group.table[group.inverses[h]]])
                wrong = random.permutation(other)[:WRONG].tolist()
                wrong += (wrong[:1] or [-1]) * (WRONG - len(wrong))
                found.append((int(feature), int(row), float(value), h, unchanged, wrong))
        drawn += 1
        if drawn == most:
            break
    found.sort(key=lambda trial: (samples[trial[1]], *trial))
    feature, row, code, element, unchanged, wrong = zip(*found, strict=True) if found else [()] * 6
    return Trials(
        np.array(feature, int), np.array(row, int), np.array(code, float), np.array(element, int),
        np.array(unchanged, bool), np.array(wrong, int).reshape(-1, WRONG),
    )  # fmt: skip


def _strongest(
    columns: sparse.csc_array, samples: Int[np.ndarray, " row"], feature: int
) -> tuple[np.ndarray, np.ndarray]:
    """The strongest row of each of the samples where a feature is most active."""
    span = slice(columns.indptr[feature], columns.indptr[feature + 1])
    rows, values = np.asarray(columns.indices[span]), np.asarray(columns.data[span], float)
    order = np.lexsort((rows, -values))
    _, first = np.unique(samples[rows[order]], return_index=True)
    best = order[np.sort(first)[:SAMPLES]]
    return rows[best], values[best]


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """The network, its inputs and how they are posed."""

    network: nn.Module
    samples: Samples
    action: Action
    site: Site
    """Where features are swapped."""
    downstream: Site
    """Where answers are compared; `Site("")` is the output of the network."""
    places: Places
    """Those of the site; see `places_of`."""

    def inputs(self, samples: Int[np.ndarray, " batch"]) -> Tensor:
        """Some samples.

        Raises:
            InputError: One cannot be read.
        """
        return self.samples.stack([self.samples.read(int(i)) for i in samples])

    def posed(self, inputs: Tensor, elements: Int[np.ndarray, " batch"]) -> Tensor:
        """Every input in its own pose."""
        out = torch.empty_like(inputs)
        for h in np.unique(elements):
            its = torch.from_numpy(np.flatnonzero(elements == h))
            out[its] = self.action(int(h), inputs[its])
        return out

    def activations(self, inputs: Tensor, at: Int[Tensor, " batch"]) -> Float[Tensor, "batch d"]:
        """Activations of the site, at one position of each input."""
        rows = _rows(read(self.network, inputs, [self.site])[self.site])
        return rows[torch.arange(len(rows)), at]

    def answer(self, inputs: Tensor) -> Float[Tensor, "batch width"]:
        """What the network makes of inputs, downstream."""
        return read(self.network, inputs, [self.downstream])[self.downstream].flatten(1).float()

    def answer_with(
        self, inputs: Tensor, at: Int[Tensor, " batch"], vectors: Float[Tensor, "batch d"]
    ) -> Float[Tensor, "batch width"]:
        """The same with other activations of the site, at one position of each input."""

        def put(activation: Tensor) -> Tensor:
            rows = _rows(activation).clone()
            rows[torch.arange(len(rows)), at] = vectors.to(rows)
            new = rows.view(channels_last(activation).shape)
            return new.movedim(-1, 1) if activation.ndim == 4 else new

        with edited(self.network, {self.site: put}):
            return self.answer(inputs)


def _rows(activation: Tensor) -> Float[Tensor, "batch position d"]:
    last = channels_last(activation)
    return last.reshape(len(last), -1, last.shape[-1])


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Rows of held-out samples that features are swapped at."""

    sample: Int[np.ndarray, " row"]
    position: Int[np.ndarray, " row"]
    """Flat, in the map of the untransformed input."""
    said: Float[np.ndarray, "row order d"]
    """What the dictionary makes of them, in every pose."""


@torch.no_grad()
def swap(
    bench: Bench,
    trials: Trials,
    rows: Rows,
    blocks: Float[np.ndarray, "feature order d"],
    stabilisers: Sequence[frozenset[int]],
    others: Int[np.ndarray, " other"],
    *,
    seed: int = 0,
    on_progress: Progress = no_progress,
) -> Swaps:
    """Swap the pose of features one at a time, and of other features in their place.

    Args:
        bench: The network and its inputs.
        trials: What to swap where.
        rows: The rows that trials speak of.
        blocks: D_g of every feature.
        stabilisers: What leaves each feature unchanged.
        others: Features to draw the null from.
        seed: Of the null.
        on_progress: Told how many trials are done.

    Raises:
        InputError: Nothing downstream depends on the site, or a sample cannot be read.
        SiteError: The network never calls the module downstream.
    """
    tested = max(len(np.unique(trials.feature[~trials.unchanged])), 1)
    n_nulls = max(NULLS, min(math.ceil(POOL / tested), len(others) - 1))
    partners = _partners(trials.feature, stabilisers, others, blocks.shape[1], n_nulls, seed)
    measures = _Measures.none(len(trials.feature), n_nulls)
    done = 0
    for unchanged in (False, True):
        its = np.flatnonzero(trials.unchanged == unchanged)
        for part in np.split(its, range(BATCH, len(its), BATCH)):
            if len(part):
                _measure(bench, trials, part, rows, blocks, partners, measures)
            done += len(part)
            on_progress(done, len(trials.feature))
    if len(trials.feature) and np.isnan(measures.change).all():
        where = str(bench.downstream) or "the output"
        raise InputError(
            f"Nothing changes at {where} if features are removed from {bench.site}. Name a site "
            "downstream of it."
        )
    return _summary(trials, measures)


@dataclasses.dataclass(frozen=True, eq=False)
class _Measures:
    """What was seen, by trial or by feature; NaN where it was not looked at."""

    alignment: Float[np.ndarray, " trial"]
    wrong: Float[np.ndarray, " trial"]
    """The alignment of wrong poses."""
    null: Float[np.ndarray, "trial null"]
    """The alignment of other features."""
    repaired: Float[np.ndarray, " trial"]
    repaired_null: Float[np.ndarray, "trial null"]
    together: Float[np.ndarray, " trial"]
    """What all that the dictionary says repairs."""
    change: Float[np.ndarray, " trial"]

    @classmethod
    def none(cls, n_trials: int, n_nulls: int) -> "_Measures":
        """To be filled in."""
        names = [field.name for field in dataclasses.fields(cls)]
        shapes = [(n_trials, n_nulls) if "null" in name else (n_trials,) for name in names]
        return cls(*[np.full(shape, np.nan) for shape in shapes])

    def means(self, trials: list[Bool[np.ndarray, " trial"]]) -> "_Measures":
        """Means over some sets of trials."""

        def over_sets(values: np.ndarray) -> np.ndarray:
            columns = np.atleast_2d(values.T).T
            means = [_mean(columns[chosen]) for chosen in trials]
            return np.reshape(means, (len(trials), *values.shape[1:]))

        return _Measures(**{name: over_sets(values) for name, values in vars(self).items()})


def _partners(
    features: Int[np.ndarray, " trial"],
    stabilisers: Sequence[frozenset[int]],
    others: Int[np.ndarray, " other"],
    order: int,
    n_nulls: int,
    seed: int,
) -> dict[int, Int[np.ndarray, " null"]]:
    """For each feature others that are, if there are some, changed by all that changes it."""
    fixed = np.zeros((len(stabilisers), order), bool)
    for row, stabiliser in zip(fixed, stabilisers, strict=True):
        row[list(stabiliser)] = True
    drawn = {}
    for feature in np.unique(features):
        random = np.random.default_rng([seed, 0x6F7468, int(feature)])
        rest = others[others != feature]
        alike = rest[~(fixed[rest] & ~fixed[feature]).any(axis=1)]
        pool = alike if len(alike) >= n_nulls else rest
        drawn[int(feature)] = random.choice(pool, n_nulls, replace=len(pool) < n_nulls)
    return drawn


def _measure(
    bench: Bench,
    trials: Trials,
    part: Int[np.ndarray, " batch"],
    rows: Rows,
    blocks: Float[np.ndarray, "feature order d"],
    partners: dict[int, Int[np.ndarray, " null"]],
    measures: _Measures,
) -> None:
    """Run the network for some trials and fill in what is seen."""
    feature, row, h = trials.feature[part], trials.row[part], trials.element[part]
    e = bench.action.group.identity
    number = np.searchsorted(bench.places.kept.numpy(), rows.position[row])
    here, there = (bench.places.parts[g, number, 0] for g in (e, torch.from_numpy(h)))
    inputs = bench.inputs(rows.sample[row])
    given = bench.activations(bench.action(e, inputs), here)
    inputs = bench.posed(inputs, h)

    def answer(move: np.ndarray) -> Tensor:
        """What follows a(I) and a move, put where the network sees hI."""
        return bench.answer_with(inputs, there, given + torch.from_numpy(move).to(given))

    code = trials.code[part, None]
    gone, put = -code * blocks[feature, e], code * blocks[feature, h]
    before, without, swapped = answer(np.zeros_like(put)), answer(gone), answer(gone + put)
    measures.change[part] = _ratio(_length(swapped - before), _length(without - before))
    if trials.unchanged[part].all():
        return
    target = bench.answer(inputs)

    def aligned(answered: Tensor) -> np.ndarray:
        return _cosine(answered - without, target - without)

    def repaired(answered: Tensor) -> np.ndarray:
        return 1 - _ratio(_length(target - answered) ** 2, _length(target - before) ** 2)

    def instead(feature: np.ndarray, element: np.ndarray) -> Tensor:
        """The answer to other blocks of the same length."""
        its = blocks[feature, element]
        lengths = (np.linalg.norm(x, axis=1, keepdims=True) for x in (put, its))
        return answer(gone + its * _ratio(*lengths, otherwise=0.0))

    measures.alignment[part], measures.repaired[part] = aligned(swapped), repaired(swapped)
    measures.together[part] = repaired(answer(rows.said[row, h] - rows.said[row, e]))
    wrong = trials.wrong[part].T
    if (wrong >= 0).any():
        its = np.mean([aligned(instead(feature, np.maximum(g, 0))) for g in wrong], axis=0)
        measures.wrong[part] = np.where(wrong[0] >= 0, its, np.nan)
    for k, other in enumerate(np.stack([partners[i] for i in feature]).T):
        answered = instead(other, h)
        measures.null[part, k] = aligned(answered)
        measures.repaired_null[part, k] = repaired(answered)


def _length(x: Float[Tensor, "batch width"]) -> np.ndarray:
    return x.double().norm(dim=1).numpy()


def _ratio(above: np.ndarray, below: np.ndarray, *, otherwise: float = np.nan) -> np.ndarray:
    return np.where(below > 0, above / np.where(below > 0, below, 1), otherwise)


def _cosine(
    moved: Float[Tensor, "batch width"], missing: Float[Tensor, "batch width"]
) -> Float[np.ndarray, " batch"]:
    product = (moved.double() * missing.double()).sum(dim=1).numpy()
    whole = _length(missing)
    return np.where(whole > 0, _ratio(product, _length(moved) * whole, otherwise=0.0), np.nan)


def _summary(trials: Trials, measures: _Measures) -> Swaps:
    def by_feature(unchanged: bool) -> tuple[np.ndarray, list[np.ndarray]]:
        """Features that were swapped, and the trials of each."""
        its = trials.unchanged == unchanged
        features = np.unique(trials.feature[its])
        return features, [its & (trials.feature == i) for i in features]

    features, tried = by_feature(False)
    symmetric, kept = by_feature(True)
    seen = measures.means(tried)
    p = _rank(seen.alignment, seen.null)
    better = measures.alignment - measures.wrong
    pose_p = np.array([_sign_flips(better[each]) for each in tried], float)
    return Swaps(
        features=features,
        alignment=seen.alignment,
        null=seen.null,
        wrong=seen.wrong,
        repaired=seen.repaired,
        repaired_null=seen.repaired_null,
        together=_median(seen.together),
        p_values=p,
        q_values=q_values(p),
        pose_p_values=pose_p,
        pose_q_values=q_values(pose_p),
        symmetric=symmetric,
        change=measures.means(kept).change,
        change_of_others=seen.change,
    )


def _rank(
    own: Float[np.ndarray, " tested"], null: Float[np.ndarray, "tested null"]
) -> Float[np.ndarray, " tested"]:
    """p-values of the own among all nulls, less what is common to a row."""
    k = null.shape[1]
    mean = null.mean(axis=1, keepdims=True)
    # Of a null the others are subtracted: that errs on the side of larger nulls.
    pool = np.sort(((null - mean) * k / max(k - 1, 1)).ravel())
    pool = pool[np.isfinite(pool)]
    above = len(pool) - np.searchsorted(pool, own - mean[:, 0], side="left")
    return np.where(np.isfinite(own), (1 + above) / (1 + len(pool)), np.nan)


def _sign_flips(differences: np.ndarray) -> float:
    """One-sided p-value of a mean above 0, exact for differences that are symmetric about 0."""
    kept = differences[np.isfinite(differences)]
    if not len(kept):
        return float("nan")
    sums = np.zeros(1)
    for value in kept:
        sums = np.concatenate([sums + value, sums - value])
    return float((sums >= kept.sum() - 1e-12).mean())


def _mean(values: np.ndarray) -> np.ndarray:
    there = np.isfinite(values)
    total = np.where(there, values, 0).sum(axis=0)
    return _ratio(total, there.sum(axis=0))


def _median(values: np.ndarray) -> float:
    kept = values[np.isfinite(values)]
    return float(np.median(kept)) if len(kept) else float("nan")
