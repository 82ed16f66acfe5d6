"""Interchange interventions that test how the network uses a feature in another pose.

    draw_trials        codes of held-out rows -> features, places and elements to test
    intervene_on_poses put the activation of I where the network sees hI, change the pose of one
                       feature, and compare the output with the answer to hI
    InterchangeEffects effects of the interventions, with their nulls

The network runs on hI, but at one place it is given the activation of the untransformed input,
a(I), so its answer differs from the answer to hI. Where the feature was active with code f, its
contribution f D_e is replaced by f D_h: if the blocks are right, the answer moves towards the
answer to hI. The alignment is the cosine between the change that f D_h makes and the change that is
missing without f D_e, at the network's output or any site downstream. There are two nulls of the
same length: the block D_h of other features, which tests whether this feature was missing, and the
feature's own block in a wrong pose, which tests the harder claim that it was missing in this pose.

Elements h that leave the feature unchanged are tested too: they must hardly change the answer, in
units of the change when the feature is removed.

Source: Geiger et al., Causal abstractions of neural networks (2021), for interchange interventions.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from mechatlas.activations.layouts import Layout, layouts_of
from mechatlas.activations.networks import run_network
from mechatlas.activations.posing import Places
from mechatlas.activations.samples import Samples
from mechatlas.activations.sites import intervene, read_activations
from mechatlas.analysis.symmetry.stabilizers import element_masks
from mechatlas.base import InputError, Progress, Site, no_progress
from mechatlas.maths.actions import Action
from mechatlas.maths.arrays import SparseMatrix
from mechatlas.maths.groups import Group
from mechatlas.maths.statistics import q_values

SAMPLES = 16
"""Maximum number of held-out samples per feature: those on which it is most active."""
MIN_SAMPLES = 6
"""Minimum number of samples that a feature must be active on."""
MIN_NULLS = 2
"""Minimum number of other features substituted for each feature."""
POOL = 200
"""Target number of null alignments in total, for small p-values with few features."""
WRONG_POSES = 2
"""Number of wrong poses per trial."""
BATCH = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Trials:
    """Interventions to make: one feature, one row and one element for each trial."""

    feature: Int[np.ndarray, " trial"]
    """Feature whose pose is changed."""
    row: Int[np.ndarray, " trial"]
    """Index of the held-out row."""
    code: Float[np.ndarray, " trial"]
    """Code of the feature there."""
    element: Int[np.ndarray, " trial"]
    """Element h of the group."""
    unchanged: Bool[np.ndarray, " trial"]
    """Mask of trials whose element is in the feature's stabilizer."""
    wrong_pose: Int[np.ndarray, "trial pose"]
    """Elements in whose poses the feature differs from both; -1 if there is none."""


@dataclasses.dataclass(frozen=True, eq=False)
class InterchangeEffects:
    """Effects downstream of changing the pose of single features."""

    features: Int[np.ndarray, " tested"]
    """Features tested with elements that change them."""
    alignment: Float[np.ndarray, " tested"]
    """Mean cosine between the change made by the block in pose h and the missing change."""
    null_alignment: Float[np.ndarray, "tested null"]
    """Mean alignment of blocks of other features."""
    wrong_pose_alignment: Float[np.ndarray, " tested"]
    """Mean alignment in a wrong pose; NaN if there is no other pose."""
    recovered: Float[np.ndarray, " tested"]
    """Mean fraction of the difference from the answer to hI, as a sum of squares, recovered."""
    null_recovered: Float[np.ndarray, "tested null"]
    """Mean fraction of the difference recovered with blocks of other features."""
    recovered_by_all: float
    """Median fraction of the difference recovered by all features of the dictionary together."""
    p_values: Float[np.ndarray, " tested"]
    """p-values of the alignment: its rank among those of other features, each less the mean of the
    (other) nulls of the same trials."""
    q_values: Float[np.ndarray, " tested"]
    """Smallest false discovery rates at which the alignment exceeds that of other features."""
    pose_p_values: Float[np.ndarray, " tested"]
    """p-values of the claim that the right pose aligns better than wrong ones, by exact sign flips;
    NaN if there is no other pose."""
    pose_q_values: Float[np.ndarray, " tested"]
    """Smallest false discovery rates at which the right pose aligns better than wrong ones."""
    symmetric: Int[np.ndarray, " symmetric"]
    """Features tested with elements of their stabilizer."""
    symmetric_change: Float[np.ndarray, " symmetric"]
    """Change downstream by elements of the stabilizer, relative to removing the feature."""
    change: Float[np.ndarray, " tested"]
    """Change downstream by the other elements, relative to removing the feature."""


def usable_elements(places: Places, action: Action) -> Bool[np.ndarray, " element"]:
    """Find the elements other than e that move the kept places to positions of the map."""
    exact = (places.weight[..., 1:] == 0).all(dim=2).all(dim=1).cpu().numpy()
    exact[action.group.identity] = False
    return exact


def n_runs(n_features: int) -> int:
    """Inputs that the network runs on for the trials of some features, at most.

    An input and its poses, answers before, without and after, all features, wrong poses, nulls; for
    poses that leave a feature unchanged only the first four.
    """
    n_nulls = max(MIN_NULLS, math.ceil(POOL / max(n_features, 1)))
    return n_features * SAMPLES * (6 + WRONG_POSES + n_nulls + 4)


def draw_trials(
    codes: SparseMatrix,
    samples: Int[np.ndarray, " row"],
    eligible: Int[np.ndarray, " eligible"],
    stabilizers: Sequence[frozenset[int]],
    elements: Bool[np.ndarray, " element"],
    group: Group,
    *,
    n_features: int,
    seed: int = 0,
) -> Trials:
    """Draw features in random order, in random poses, where each is most active.

    Args:
        codes: Codes `(row, feature)` of places of held-out samples.
        samples: Sample of each row; only the row with the largest code of a sample is used.
        eligible: Features to draw from.
        stabilizers: Stabilizer of each feature.
        elements: Mask of the elements that may be used.
        group: Group that acts on the input.
        n_features: Maximum number of features, of those active on enough samples.
        seed: Seed of the draw.
    """
    random = np.random.default_rng([seed, 0x73776170])
    columns = codes.tocsc()
    trials: list[tuple[int, int, float, int, bool, list[int]]] = []
    n_drawn = 0
    for feature in random.permutation(eligible):
        rows, values = _strongest_rows(columns, samples, int(feature))
        if len(rows) < MIN_SAMPLES:
            continue
        (fixed,) = element_masks([stabilizers[feature]], group.order)
        for unchanged in (False, True):
            allowed = np.flatnonzero(elements & (fixed == unchanged))
            for row, value in zip(rows, values, strict=True) if len(allowed) else ():
                h = int(random.choice(allowed))
                other = np.flatnonzero(~fixed & ~fixed[group.table[group.inverses[h]]])
                wrong = random.permutation(other)[:WRONG_POSES].tolist()
                wrong += (wrong[:1] or [-1]) * (WRONG_POSES - len(wrong))
                trials.append((int(feature), int(row), float(value), h, unchanged, wrong))
        n_drawn += 1
        if n_drawn == n_features:
            break
    trials.sort(key=lambda trial: (samples[trial[1]], *trial))
    fields = zip(*trials, strict=True) if trials else [()] * 6
    feature, row, code, element, unchanged, wrong = fields
    return Trials(
        np.array(feature, int), np.array(row, int), np.array(code, float), np.array(element, int),
        np.array(unchanged, bool), np.array(wrong, int).reshape(-1, WRONG_POSES),
    )  # fmt: skip


class _StrongestRows(NamedTuple):
    """Rows with the largest code of each sample, and their codes."""

    rows: Int[np.ndarray, " sample"]
    values: Float[np.ndarray, " sample"]


def _strongest_rows(
    columns: SparseMatrix, samples: Int[np.ndarray, " row"], feature: int
) -> _StrongestRows:
    """Find the strongest row of each sample, for the samples on which a feature is most active."""
    span = slice(columns.indptr[feature], columns.indptr[feature + 1])
    rows, values = np.asarray(columns.indices[span]), np.asarray(columns.data[span], float)
    order = np.lexsort((rows, -values))
    _, first = np.unique(samples[rows[order]], return_index=True)
    best = order[np.sort(first)[:SAMPLES]]
    return _StrongestRows(rows[best], values[best])


def following_site(network: nn.Module, site: Site, inputs: Shaped[Tensor, "batch ..."]) -> Site:
    """Find the module called next after a site's module, among modules with the same parent.

    Args:
        network: The network.
        site: A site.
        inputs: Inputs to pass through the network.

    Returns:
        The site of that module's output, or `Site("")`, the output of the network, if there is
        none.
    """
    parent, _, own = site.module.rpartition(".")
    called: list[str] = []
    with ExitStack() as hooks, torch.no_grad():
        for name, module in network.get_submodule(parent).named_children():
            note = functools.partial(lambda name, *_: called.append(name), name)
            hooks.callback(module.register_forward_hook(note).remove)
        run_network(network, inputs)
    later = called[called.index(own) + 1 :] if own in called else []
    following = [name for name in later if name != own]
    return Site(f"{parent}.{following[0]}".strip(".")) if following else Site("")


@dataclasses.dataclass(frozen=True, eq=False)
class PosedNetwork:
    """Network with its inputs and their poses, and the sites to intervene on and to compare at."""

    network: nn.Module
    samples: Samples
    action: Action
    site: Site
    """Site of the interventions."""
    downstream: Site
    """Site where answers are compared; `Site("")` is the output of the network."""
    places: Places
    """Places of the site in every pose; see `places_of`."""

    def inputs(self, samples: Int[np.ndarray, " batch"]) -> Shaped[Tensor, "batch ..."]:
        """Read some samples.

        Raises:
            InputError: One cannot be read.
        """
        return self.samples.stack([self.samples.read(int(i)) for i in samples])

    def posed(
        self, inputs: Shaped[Tensor, "batch ..."], elements: Int[np.ndarray, " batch"]
    ) -> Shaped[Tensor, "batch ..."]:
        """Transform every input by its element."""
        out = torch.empty_like(inputs)
        for h in np.unique(elements):
            rows = torch.from_numpy(np.flatnonzero(elements == h))
            out[rows] = self.action(int(h), inputs[rows])
        return out

    def activations(
        self, inputs: Shaped[Tensor, "batch ..."], positions: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch d"]:
        """Record activations of the site, at one position of each input."""
        layout = layouts_of(self.network, inputs, [self.site])[self.site]
        read = read_activations(self.network, inputs, [self.site])[self.site]
        rows = _by_position(layout, read)
        return rows[torch.arange(len(rows)), positions]

    def answer(self, inputs: Shaped[Tensor, "batch ..."]) -> Float[Tensor, "batch width"]:
        """Record activations of the downstream site, flat."""
        layout = layouts_of(self.network, inputs, [self.downstream])[self.downstream]
        read = read_activations(self.network, inputs, [self.downstream])[self.downstream]
        return layout.rows(read).flatten(1).float()

    def answer_with(
        self,
        inputs: Shaped[Tensor, "batch ..."],
        positions: Int[Tensor, " batch"],
        vectors: Float[Tensor, "batch d"],
    ) -> Float[Tensor, "batch width"]:
        """Record the answer with other activations of the site, at one position of each input.

        Args:
            inputs: Inputs of the network.
            positions: Flat position in the map of each input.
            vectors: Activations to put there.
        """
        layout = layouts_of(self.network, inputs, [self.site])[self.site]

        def put(activation: Tensor) -> Tensor:
            rows = _by_position(layout, activation).clone()
            rows[torch.arange(len(rows)), positions] = vectors.to(rows)
            return layout.undo(rows, activation)

        with intervene(self.network, {self.site: put}):
            return self.answer(inputs)


def _by_position(layout: Layout, activation: Tensor) -> Float[Tensor, "batch position d"]:
    last = layout.rows(activation)
    return last.reshape(len(last), -1, last.shape[-1])


@dataclasses.dataclass(frozen=True, eq=False)
class TrialRows:
    """Rows of held-out samples that trials refer to."""

    sample: Int[np.ndarray, " row"]
    """Sample of each row."""
    position: Int[np.ndarray, " row"]
    """Flat position in the map of the untransformed input."""
    reconstruction: Float[np.ndarray, "row order d"]
    """Reconstruction by the dictionary, in every pose."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrialMeasures:
    """Measurements by trial, or their means by feature; NaN where nothing was measured."""

    measured: Float[np.ndarray, " trial"]
    """1 for trials that were run, else NaN."""
    alignment: Float[np.ndarray, " trial"]
    wrong_pose_alignment: Float[np.ndarray, " trial"]
    null_alignment: Float[np.ndarray, "trial null"]
    recovered: Float[np.ndarray, " trial"]
    null_recovered: Float[np.ndarray, "trial null"]
    recovered_by_all: Float[np.ndarray, " trial"]
    change: Float[np.ndarray, " trial"]

    @classmethod
    def empty(cls, n_trials: int, n_nulls: int) -> "TrialMeasures":
        """Allocate measurements that are all NaN."""
        names = [field.name for field in dataclasses.fields(cls)]
        shapes = [(n_trials, n_nulls) if "null" in name else (n_trials,) for name in names]
        return cls(*[np.full(shape, np.nan) for shape in shapes])

    def means(self, trials: list[Bool[np.ndarray, " trial"]]) -> "TrialMeasures":
        """Average over sets of trials."""

        def over_sets(values: np.ndarray) -> np.ndarray:
            columns = np.atleast_2d(values.T).T
            means = [_finite_mean(columns[chosen]) for chosen in trials]
            return np.reshape(means, (len(trials), *values.shape[1:]))

        return TrialMeasures(**{name: over_sets(values) for name, values in vars(self).items()})


@torch.no_grad()
def intervene_on_poses(
    posed: PosedNetwork,
    trials: Trials,
    rows: TrialRows,
    blocks: Float[np.ndarray, "feature order d"],
    stabilizers: Sequence[frozenset[int]],
    others: Int[np.ndarray, " other"],
    *,
    seed: int = 0,
    measures: TrialMeasures | None = None,
    on_measures: Callable[[TrialMeasures], None] | None = None,
    on_progress: Progress = no_progress,
) -> InterchangeEffects:
    """Change the pose of features one at a time, and substitute other features for them.

    Args:
        posed: Network and its inputs.
        trials: Interventions to make.
        rows: Rows that the trials refer to.
        blocks: Decoder blocks D_g of every feature.
        stabilizers: Stabilizer of each feature.
        others: Features to draw the null from.
        seed: Seed of the null.
        measures: Measurements of an interrupted call with the same arguments, which are not made
            again.
        on_measures: Callback with the measurements so far, after every batch of trials.
        on_progress: Callback with the number of trials done.

    Raises:
        InputError: Nothing downstream depends on the site, or a sample cannot be read.
        SiteError: The network never calls the module downstream.
    """
    n_tested = max(len(np.unique(trials.feature[~trials.unchanged])), 1)
    n_nulls = max(MIN_NULLS, min(math.ceil(POOL / n_tested), len(others) - 1))
    partners = _draw_partners(trials.feature, stabilizers, others, blocks.shape[1], n_nulls, seed)
    measures = measures or TrialMeasures.empty(len(trials.feature), n_nulls)
    n_done = 0
    for unchanged in (False, True):
        chosen = np.flatnonzero(trials.unchanged == unchanged)
        for part in np.split(chosen, range(BATCH, len(chosen), BATCH)):
            if np.isnan(measures.measured[part]).any():
                _run_trials(posed, trials, part, rows, blocks, partners, measures)
                if on_measures is not None:
                    on_measures(measures)
            n_done += len(part)
            on_progress(n_done, len(trials.feature))
    if len(trials.feature) and np.isnan(measures.change).all():
        where = str(posed.downstream) or "the output"
        raise InputError(
            f"Nothing changes at {where} if features are removed from {posed.site}. Name a site "
            "downstream of it."
        )
    return _summarize(trials, measures)


def _draw_partners(
    features: Int[np.ndarray, " trial"],
    stabilizers: Sequence[frozenset[int]],
    others: Int[np.ndarray, " other"],
    order: int,
    n_nulls: int,
    seed: int,
) -> dict[int, Int[np.ndarray, " null"]]:
    """Draw null features for each feature, changed by the same elements if possible."""
    fixed = element_masks(stabilizers, order)
    partners = {}
    for feature in np.unique(features):
        random = np.random.default_rng([seed, 0x6F7468, int(feature)])
        rest = others[others != feature]
        comparable = rest[~(fixed[rest] & ~fixed[feature]).any(axis=1)]
        pool = comparable if len(comparable) >= n_nulls else rest
        partners[int(feature)] = random.choice(pool, n_nulls, replace=len(pool) < n_nulls)
    return partners


def _run_trials(
    posed: PosedNetwork,
    trials: Trials,
    part: Int[np.ndarray, " batch"],
    rows: TrialRows,
    blocks: Float[np.ndarray, "feature order d"],
    partners: dict[int, Int[np.ndarray, " null"]],
    measures: TrialMeasures,
) -> None:
    """Run the network for some trials and fill in their measurements."""
    measures.measured[part] = 1
    feature, row, h = trials.feature[part], trials.row[part], trials.element[part]
    e = posed.action.group.identity
    number = np.searchsorted(posed.places.kept.numpy(), rows.position[row])
    here, there = (posed.places.parts[g, number, 0] for g in (e, torch.from_numpy(h)))
    inputs = posed.inputs(rows.sample[row])
    given = posed.activations(posed.action(e, inputs), here)
    inputs = posed.posed(inputs, h)

    def answer(change: np.ndarray) -> Tensor:
        """Answer to a(I) plus a change, put where the network sees hI."""
        return posed.answer_with(inputs, there, given + torch.from_numpy(change).to(given))

    code = trials.code[part, None]
    removal, block = -code * blocks[feature, e], code * blocks[feature, h]
    before, without, after = answer(np.zeros_like(block)), answer(removal), answer(removal + block)
    measures.change[part] = _ratio(_length(after - before), _length(without - before))
    if trials.unchanged[part].all():
        return
    target = posed.answer(inputs)

    def alignment(answered: Tensor) -> np.ndarray:
        return _cosine(answered - without, target - without)

    def recovered(answered: Tensor) -> np.ndarray:
        return 1 - _ratio(_length(target - answered) ** 2, _length(target - before) ** 2)

    def substitute(feature: np.ndarray, element: np.ndarray) -> Tensor:
        """Answer to other blocks, scaled to the same length."""
        other = blocks[feature, element]
        lengths = (np.linalg.norm(x, axis=1, keepdims=True) for x in (block, other))
        return answer(removal + other * _ratio(*lengths, otherwise=0.0))

    measures.alignment[part], measures.recovered[part] = alignment(after), recovered(after)
    all_features = rows.reconstruction[row, h] - rows.reconstruction[row, e]
    measures.recovered_by_all[part] = recovered(answer(all_features))
    wrong = trials.wrong_pose[part].T
    if (wrong >= 0).any():
        poses = [alignment(substitute(feature, np.maximum(g, 0))) for g in wrong]
        measures.wrong_pose_alignment[part] = np.where(
            wrong[0] >= 0, np.mean(poses, axis=0), np.nan
        )
    for k, other in enumerate(np.stack([partners[i] for i in feature]).T):
        answered = substitute(other, h)
        measures.null_alignment[part, k] = alignment(answered)
        measures.null_recovered[part, k] = recovered(answered)


def _length(x: Float[Tensor, "batch width"]) -> np.ndarray:
    return x.double().norm(dim=1).numpy()


def _ratio(above: np.ndarray, below: np.ndarray, *, otherwise: float = np.nan) -> np.ndarray:
    return np.where(below > 0, above / np.where(below > 0, below, 1), otherwise)


def _cosine(
    change: Float[Tensor, "batch width"], missing: Float[Tensor, "batch width"]
) -> Float[np.ndarray, " batch"]:
    product = (change.double() * missing.double()).sum(dim=1).numpy()
    length = _length(missing)
    return np.where(length > 0, _ratio(product, _length(change) * length, otherwise=0.0), np.nan)


def _summarize(trials: Trials, measures: TrialMeasures) -> InterchangeEffects:
    features = np.unique(trials.feature[~trials.unchanged])
    symmetric = np.unique(trials.feature[trials.unchanged])
    changing = [~trials.unchanged & (trials.feature == i) for i in features]
    fixing = [trials.unchanged & (trials.feature == i) for i in symmetric]
    means = measures.means(changing)
    p = interchange_p_values(means.alignment, means.null_alignment)
    better = measures.alignment - measures.wrong_pose_alignment
    pose_p = np.array([_sign_flip_p_value(better[each]) for each in changing], float)
    return InterchangeEffects(
        features=features,
        alignment=means.alignment,
        null_alignment=means.null_alignment,
        wrong_pose_alignment=means.wrong_pose_alignment,
        recovered=means.recovered,
        null_recovered=means.null_recovered,
        recovered_by_all=finite_median(means.recovered_by_all),
        p_values=p,
        q_values=q_values(p),
        pose_p_values=pose_p,
        pose_q_values=q_values(pose_p),
        symmetric=symmetric,
        symmetric_change=measures.means(fixing).change,
        change=means.change,
    )


def interchange_p_values(
    alignment: Float[np.ndarray, " tested"], null: Float[np.ndarray, "tested null"]
) -> Float[np.ndarray, " tested"]:
    """Compute p-values of alignments from their ranks among null alignments, less row means.

    The alignment itself counts as one of the null values, so that no p-value is smaller than
    1 / (1 + n) with n null values (Phipson and Smyth, 2010).
    """
    k = null.shape[1]
    mean = null.mean(axis=1, keepdims=True)
    # From a null value the others of its row are subtracted, which errs towards larger nulls.
    pool = np.sort(((null - mean) * k / max(k - 1, 1)).ravel())
    pool = pool[np.isfinite(pool)]
    above = len(pool) - np.searchsorted(pool, alignment - mean[:, 0], side="left")
    return np.where(np.isfinite(alignment), (1 + above) / (1 + len(pool)), np.nan)


def _sign_flip_p_value(differences: np.ndarray) -> float:
    """One-sided p-value of a mean above 0, exact for differences that are symmetric about 0."""
    finite = differences[np.isfinite(differences)]
    if not len(finite):
        return float("nan")
    sums = np.zeros(1)
    for value in finite:
        sums = np.concatenate([sums + value, sums - value])
    return float((sums >= finite.sum() - 1e-12).mean())


def _finite_mean(values: np.ndarray) -> np.ndarray:
    finite = np.isfinite(values)
    total = np.where(finite, values, 0).sum(axis=0)
    return _ratio(total, finite.sum(axis=0))


def finite_median(values: Float[np.ndarray, "*shape"]) -> float:
    """Median of the finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else float("nan")
