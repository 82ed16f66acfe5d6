"""Interchange interventions of `mechatlas symmetry`: poses of features changed in the network.

    open_posed_network    network of a store, and the site where answers are compared
    run_interventions    features, held-out rows and a network -> result and columns of the table
    in_words              findings for the terminal

The network and the samples are those of the store's recipe. Where they are no longer there, or have
changed, there are no interventions, and `missing` says why.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse
from torch import Tensor

from mechatlas.activations.posing import action_of, places_of
from mechatlas.activations.sites import find_sites
from mechatlas.activations.store import Store
from mechatlas.analysis.symmetry.classify import Symmetry
from mechatlas.analysis.symmetry.interchange import (
    MIN_NULLS,
    MIN_SAMPLES,
    InterchangeEffects,
    PosedNetwork,
    TrialMeasures,
    TrialRows,
    draw_trials,
    finite_median,
    following_site,
    intervene_on_poses,
    usable_elements,
)
from mechatlas.analysis.symmetry.posed_dictionary import HeldOutCodes
from mechatlas.app.inputs import open_network, poses_of
from mechatlas.app.progress import bar
from mechatlas.app.recipes import TrustConfig
from mechatlas.app.run_folder import RunFolder
from mechatlas.base import Site, TrustError, UserError
from mechatlas.maths.statistics import proportion

OUTPUT = "output"
"""Name of the network's output as a downstream site."""
KEPT = "interventions"
KEEP_SECONDS = 30.0
"""Time between two copies of the measurements on disk."""
COLUMNS = {
    "intervention_alignment": "alignment",
    "intervention_null_alignment": "null_alignment",
    "intervention_wrong_pose_alignment": "wrong_pose_alignment",
    "intervention_p_value": "p_values",
    "intervention_q_value": "q_values",
    "intervention_pose_p_value": "pose_p_values",
    "intervention_pose_q_value": "pose_q_values",
    "intervention_symmetric_change": "symmetric_change",
}
"""Column of the table -> field of `InterchangeEffects`."""
MEDIANS = (
    "alignment", "null_alignment", "wrong_pose_alignment", "recovered", "null_recovered",
    "symmetric_change", "change",
)  # fmt: skip
"""Fields of `InterchangeEffects` whose medians are in the result."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassedShare:
    """Number of features that pass a test, and their share with its 95 % interval (Wilson)."""

    tested: int = 0
    """Features tested."""
    passed: int = 0
    """Features that pass."""
    share: float | None = None
    """Share of the tested features that pass."""
    low: float = 0.0
    """Lower end of the 95 % interval of the share."""
    high: float = 1.0
    """Upper end of the 95 % interval of the share."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterventionsResult(PassedShare):
    """Interchange interventions in `result.json`: features compared with other features.

    The fields of `PassedShare` are those of the test against other features.
    """

    missing: str = ""
    """Reason why there are no interventions; empty if there are."""
    downstream: str = ""
    """Site where answers are compared, or "output"."""
    elements: tuple[str, ...] = ()
    """Names of the elements used."""
    null_share: float | None = None
    """Share of null alignments as large as the smallest one that passes."""
    pose: PassedShare = PassedShare()
    """Features that align better in their own pose than in a wrong one."""
    alignment: float | None = None
    """Median alignment of blocks in the pose of the input."""
    null_alignment: float | None = None
    """Median alignment of blocks of other features."""
    wrong_pose_alignment: float | None = None
    """Median alignment of blocks in a wrong pose."""
    recovered: float | None = None
    """Median fraction of the difference recovered."""
    null_recovered: float | None = None
    """Median fraction of the difference recovered with blocks of other features."""
    recovered_by_all: float | None = None
    """Median fraction of the difference recovered by all features together."""
    symmetric: int = 0
    """Number of features tested with elements of their stabilizer."""
    symmetric_change: float | None = None
    """Median change by elements of the stabilizer, relative to removing the feature."""
    change: float | None = None
    """Median change by the other elements, relative to removing the feature."""
    classes: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    """Number of features `tested` and `passed`, by class."""


class MeasuredInterventions(NamedTuple):
    """Result of the interventions, and their columns of the table."""

    result: InterventionsResult
    columns: dict[str, Float[np.ndarray, " feature"]]
    """Measurements by feature; NaN where nothing was tested."""


def open_posed_network(
    store: Store, site: str, downstream: str | None, *, wanted: bool, trust: TrustConfig
) -> PosedNetwork | str:
    """Open the network of a store and pass a sample through, or say why it cannot be opened.

    Args:
        store: Store whose network and samples are used.
        site: Site of the interventions.
        downstream: Site where answers are compared, or "output"; by default the next module.
        wanted: Whether interventions are asked for.
        trust: Code that may run.

    Raises:
        InputError: The sample cannot be read.
        SiteError: There is no such site downstream.
        TrustError: The store names code that the user has not named.
    """
    if not wanted:
        return "Not asked for (--interventions 0)."
    try:
        network, samples = open_network(store, trust)
        action = action_of(poses_of(store))
    except TrustError:
        raise
    except UserError as error:
        return str(error)
    at = Site.parse(site)
    inputs = samples.stack([samples.read(store.samples("train", 1)[0])])
    if downstream is None:
        after = following_site(network, at, inputs)
    else:
        after = Site("") if downstream == OUTPUT else find_sites(network, [downstream])[0]
    places = places_of(action, network, at, inputs)
    return PosedNetwork(network, samples, action, at, after, places)


def run_interventions(
    posed: PosedNetwork | str,
    held_out: HeldOutCodes,
    symmetries: Symmetry,
    blocks: Float[np.ndarray, "feature order d"],
    reconstruct: Callable[[Tensor], Tensor],
    folder: RunFolder,
    *,
    n_features: int,
    seed: int,
) -> MeasuredInterventions:
    """Change the poses of features and compare the output with the answer to posed inputs.

    Args:
        posed: Network, or the reason why there is none.
        held_out: Codes of held-out rows; the first columns are those of the features.
        symmetries: Symmetry of the features.
        blocks: Decoder blocks of the features.
        reconstruct: Reconstruction of every pose from codes.
        folder: Folder that keeps the measurements of an interrupted run.
        n_features: Number of features that are drawn.
        seed: Seed of the draw.

    Raises:
        InputError: Nothing downstream depends on the site, or a sample cannot be read.
    """
    if isinstance(posed, str):
        return _not_run(posed, len(blocks))
    elements = usable_elements(posed.places, posed.action)
    eligible, others = _features_to_test(symmetries, blocks, elements)
    if not elements.any():
        return _not_run("No pose moves whole positions.", len(blocks))
    if len(others) < 2:
        return _not_run("There are too few features.", len(blocks))
    codes = held_out.codes
    trials = draw_trials(
        sparse.csr_array(codes[:, : len(blocks)]), held_out.sample, eligible,
        symmetries.stabilizers, elements, symmetries.group, n_features=n_features, seed=seed,
    )  # fmt: skip
    used, index = np.unique(trials.row, return_inverse=True)
    reconstruction = np.zeros((len(used), *blocks.shape[1:]), np.float32)
    if len(used):
        flat = reconstruct(torch.from_numpy(codes[used].toarray())).numpy()
        reconstruction[:] = flat.reshape(reconstruction.shape)
    rows = TrialRows(held_out.sample[used], held_out.position[used], reconstruction)
    kept = folder.kept(KEPT)
    with bar("changing poses") as progress:
        effects = intervene_on_poses(
            posed, dataclasses.replace(trials, row=index), rows, blocks, symmetries.stabilizers,
            others, seed=seed, measures=TrialMeasures(**kept) if kept else None,
            on_measures=_keeper(folder), on_progress=progress,
        )  # fmt: skip
    names = symmetries.group.element_names
    result = dataclasses.replace(
        _summarize(effects, symmetries),
        downstream=str(posed.downstream) or OUTPUT,
        elements=tuple(names[g] for g in np.flatnonzero(elements)),
    )
    return MeasuredInterventions(result, _columns(effects, len(blocks)))


def _not_run(reason: str, n_features: int) -> MeasuredInterventions:
    nothing = {name: np.full(n_features, np.nan) for name in COLUMNS}
    return MeasuredInterventions(InterventionsResult(missing=reason), nothing)


def _keeper(folder: RunFolder) -> Callable[[TrialMeasures], None]:
    """Make a callback that keeps measurements every `KEEP_SECONDS`."""
    kept_at = time.monotonic()

    def keep(measures: TrialMeasures) -> None:
        nonlocal kept_at
        if time.monotonic() - kept_at >= KEEP_SECONDS:
            folder.keep(KEPT, vars(measures))
            kept_at = time.monotonic()

    return keep


def _columns(
    effects: InterchangeEffects, n_features: int
) -> dict[str, Float[np.ndarray, " feature"]]:
    columns = {}
    for name, field in COLUMNS.items():
        values = getattr(effects, field)
        features = effects.symmetric if field == "symmetric_change" else effects.features
        columns[name] = np.full(n_features, np.nan)
        columns[name][features] = values.mean(axis=1) if values.ndim == 2 else values
    return columns


class _TestFeatures(NamedTuple):
    eligible: Int[np.ndarray, " eligible"]
    """Features with a claim to test."""
    others: Int[np.ndarray, " other"]
    """Features that the null is drawn from."""


def _features_to_test(
    symmetries: Symmetry,
    blocks: Float[np.ndarray, "feature order d"],
    elements: Bool[np.ndarray, " element"],
) -> _TestFeatures:
    sizes = symmetries.family_sizes[symmetries.families]
    live = np.square(blocks).sum(axis=(1, 2)) > 0
    eligible = np.flatnonzero((symmetries.reliable | (sizes > 1)) & live)
    moving = set(np.flatnonzero(elements).tolist())
    others = np.array([i for i in eligible if moving - symmetries.stabilizers[i]], int)
    return _TestFeatures(eligible, others if len(others) > MIN_NULLS else np.flatnonzero(live))


def _summarize(effects: InterchangeEffects, symmetries: Symmetry) -> InterventionsResult:
    passed = effects.q_values <= symmetries.fdr
    smallest = effects.alignment[passed].min(initial=np.inf)
    null = effects.null_alignment[np.isfinite(effects.null_alignment)]
    labels = symmetries.names
    names = [labels[i] for i in effects.features]
    n_passed = Counter(name for name, ok in zip(names, passed, strict=True) if ok)
    medians: dict[str, Any] = {
        name: rounded(finite_median(getattr(effects, name))) for name in MEDIANS
    }
    return InterventionsResult(
        **vars(_passed_share(effects.q_values, symmetries.fdr)),
        null_share=rounded(np.mean(null >= smallest) if len(null) else np.nan),
        pose=_passed_share(effects.pose_q_values, symmetries.fdr),
        **medians,
        recovered_by_all=rounded(effects.recovered_by_all),
        symmetric=len(effects.symmetric),
        classes={
            name: {"tested": n, "passed": n_passed[name]}
            for name, n in Counter(names).most_common()
        },
    )


def _passed_share(q: Float[np.ndarray, " tested"], fdr: float) -> PassedShare:
    passed, tested = int((q <= fdr).sum()), int(np.isfinite(q).sum())
    share = proportion(passed, tested)
    return PassedShare(
        tested=tested, passed=passed, share=rounded(share.value), low=share.low, high=share.high
    )


def rounded(value: Any) -> float | None:
    """Round to six decimals; None for NaN."""
    return round(float(value), 6) if np.isfinite(value) else None


def in_words(result: InterventionsResult) -> str:
    """Describe the interventions in a sentence or two."""
    if result.missing:
        return f"Poses were not changed inside the network: {result.missing}"
    if not result.tested:
        return (
            "Poses were not changed inside the network: no feature with a claim was active on "
            f"{MIN_SAMPLES} held-out samples."
        )
    pose = result.pose
    message = (
        f"Poses changed inside the network: {result.passed} of {result.tested} features bring "
        f"{result.downstream} nearer to its answer to the posed input than other features do "
        f"({result.low:.0%} to {result.high:.0%}; {result.null_share:.1%} of the others do as "
        f"well), {pose.passed} of {pose.tested} nearer than they do in a wrong pose "
        f"({pose.low:.0%} to {pose.high:.0%})."
    )
    if result.symmetric_change is not None:
        message += (
            f" Changes by claimed symmetries, which should do nothing, are "
            f"{result.symmetric_change:.2f} of the change when the feature is removed"
        )
        message += "." if result.change is None else f", others {result.change:.2f}."
    return message
