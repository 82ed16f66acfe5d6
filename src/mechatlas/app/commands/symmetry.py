"""Find what leaves each feature unchanged, and families of features that are poses of one another.

Example:  mechatlas symmetry runs/crosscoder --store runs/posed --out runs/symmetry
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from mechatlas.activations.passes import on_device
from mechatlas.activations.store import Store
from mechatlas.analysis.symmetry import interchange
from mechatlas.analysis.symmetry.block_artifacts import FOLDS, MAX_TESTED
from mechatlas.analysis.symmetry.class_names import NOT_SHOWN, name_classes
from mechatlas.analysis.symmetry.classify import FDR, Symmetry, count_shuffled_discoveries, symmetry
from mechatlas.analysis.symmetry.control_comparison import ClassComparison, compare_with_control
from mechatlas.analysis.symmetry.feature_types import find_types
from mechatlas.analysis.symmetry.posed_dictionary import (
    BlockEstimates,
    PosedDictionary,
    estimate_blocks,
    measure_r2,
    pair_with_store,
    reconstruct,
)
from mechatlas.analysis.symmetry.shift_evidence import EQUALITY_THRESHOLD, SUPPORT_THRESHOLD
from mechatlas.app import block_artifacts, code_action, pose_interventions, stimuli
from mechatlas.app.block_artifacts import ArtifactsResult, CheckedBlocks
from mechatlas.app.code_action import CodeActionResult
from mechatlas.app.estimates import Estimate, bytes_of, of_work
from mechatlas.app.inputs import manifest_of, open_dictionary, refuse_other_network
from mechatlas.app.old_runs import renamed_columns
from mechatlas.app.pose_interventions import InterventionsResult, rounded
from mechatlas.app.progress import bar
from mechatlas.app.recipes import TrustConfig
from mechatlas.app.run_folder import (
    FEATURES,
    SYMMETRY,
    CommandResult,
    DeviceConfig,
    RunFolder,
    read_result,
)
from mechatlas.app.stimuli import TuningResult
from mechatlas.app.symmetry_tables import (
    TypesResult,
    count_types,
    type_columns,
    types_in_words,
    write_features,
)
from mechatlas.base import Progress, RecipeError
from mechatlas.devices import as_device
from mechatlas.files import MANIFEST, Fields
from mechatlas.maths.actions import Rotate
from mechatlas.maths.groups import Group
from mechatlas.ranges import COUNT_OR_NONE, RATE, SEED, SHARE, check_ranges
from mechatlas.tensorfiles import read_table

KIND = SYMMETRY
KEPT = "blocks"
ALL_POSES, UNTRANSFORMED = "all poses", "the untransformed input"

LONG_ROWS = 100_000
"""Rows from which on the cost is estimated beforehand."""
PROBE_SAMPLES = 16
"""Samples that the network runs on together to time interventions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SymmetryConfig(TrustConfig, DeviceConfig):
    """Classify the features of a dictionary by the group elements that leave them unchanged.

    Examples:  mechatlas symmetry runs/crosscoder --store runs/posed --out runs/symmetry
               mechatlas symmetry sae.safetensors --store runs/posed --site mixed3b --out runs/sym
    """

    dictionary: Annotated[Positional[Path], arg(metavar="DICT")]
    """A group crosscoder, or any dictionary that reads the untransformed activations, in any
    supported format."""
    store: Path
    """Store collected with a [group]: the activations of every input in all poses."""
    site: str | None = None
    """Site of the store, where the dictionary does not say which one it reads."""
    fdr: float = FDR
    """False discovery rate of the claim that a stabilizer is larger than {e}."""
    equality_threshold: float = EQUALITY_THRESHOLD
    """Similarity (cosine, corrected for noise) at which two blocks count as equal."""
    interventions: int = 40
    """Number of features whose pose is changed inside the network, if it can be opened again."""
    downstream: str | None = None
    """Site where answers to interventions are compared, or "output" for the network's; by default
    the next module after the site that has the same parent."""
    control: Path | None = None
    """Result folder of this command for a randomly re-initialized copy of the network; class
    frequencies are compared with it."""
    stimuli: int = 16
    """Orientations in which synthetic stimuli are shown to the network, to compare responses with
    what is claimed; 0 shows none."""
    code_action: bool = False
    """Learn how the group acts on codes, types of features among themselves, and measure on
    held-out rows how well other poses follow from it; some seconds for 500 active latents."""
    seed: int = 0
    """Seed of the nulls, and of the features drawn for interventions."""

    def __post_init__(self) -> None:
        check_ranges(
            self, fdr=RATE, equality_threshold=SHARE, interventions=COUNT_OR_NONE,
            stimuli="[0, 360]", seed=SEED,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupDescription:
    """Group of the store, and how it acts on inputs."""

    name: str
    """Name of the group."""
    order: int
    """Number of its elements."""
    action: str
    """Name of its action on samples."""
    closes: bool = True
    """Whether the steps of the action return to the start, so that the group acts at all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interpolation:
    """Mean stabilizer function after rotations that interpolate pixels and that move them."""

    matched_blur: bool
    """Whether every pose is equally blurred."""
    quarters: float | None
    """Mean over rotations that move pixels, other than e."""
    between: float
    """Mean over rotations that interpolate."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlResult:
    """Class frequencies compared with those of a control."""

    folder: str
    """Folder of the control."""
    reliable: tuple[int, int] | None = None
    """Number of features here and in the control that are shown to have a symmetry, or none."""
    classes: list[ClassComparison]
    """Comparison of each class."""
    tuning: TuningResult | None = None
    """Agreement with responses to stimuli in the control."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SymmetryResult(CommandResult):
    """Counts of classes and families, with their evidence."""

    n_features: int
    """Features of the dictionary."""
    classes: dict[str, int]
    """Number of features by label: class of the stabilizer, exact or "approximately ...", the class
    of no symmetry, or "not shown"."""
    grades: dict[str, int] = dataclasses.field(default_factory=dict)
    """Number of features by grade: exact, approximate, none, not shown."""
    fdr: float
    """Nominal false discovery rate."""
    equality_threshold: float | None = None
    """Similarity at which blocks count as equal."""
    discoveries: int
    """Number of features with an exact symmetry: a reliable stabilizer larger than {e}."""
    discoveries_shuffled: int | None
    """Number of such features after shuffling the pairing of blocks; expect 0. None without
    halves."""
    reliable: int
    """Number of reliable features."""
    noise_ceiling: float | None
    """Median over features of the cosine between the two halves."""
    noise_ceiling_quartiles: list[float | None]
    """Lower and upper quartile of the noise ceiling."""
    noise_inflation: float
    """Factor applied to variances for correlated noise."""
    families: int
    """Number of families of two or more features."""
    features_in_families: int
    """Features in families of two or more."""
    largest_family: int
    """Features of the largest family."""
    artifacts: ArtifactsResult = dataclasses.field(
        default_factory=lambda: ArtifactsResult(missing="The run is older than this test.")
    )
    """Zero blocks of the decoder that are crosscoder artifacts."""
    types: TypesResult | None = None
    """Families of a wider sense; null in runs that are older."""
    code_action: CodeActionResult | None = None
    """Learnt action of the group on codes, with --code-action."""
    tuning: TuningResult = dataclasses.field(
        default_factory=lambda: TuningResult(missing="The run is older than stimuli.")
    )
    """Agreement with responses to synthetic stimuli."""
    chance_similarity: float
    """Similarity of unrelated features."""
    agreement: float | None
    """Median cosine of decoder blocks with blocks estimated from codes, corrected for noise."""
    group: GroupDescription
    """Group and action of the store."""
    interpolation: Interpolation | None = None
    """Effect of interpolation; null where no rotation interpolates."""
    site: str
    """Site that the dictionary reads."""
    blocks: str
    """Source of the blocks: the decoder, or an estimate from codes."""
    reads: str = UNTRANSFORMED
    """Input of the dictionary: all poses, or the untransformed input."""
    rows: int
    """Rows of the store that stabilizers are estimated from."""
    rows_of_halves: list[int]
    """Rows of each half of the images."""
    held_out_rows: int
    """Held-out rows on which poses are predicted."""
    r2: dict[str, list[float | None]]
    """R2 of each pose on held-out rows, null where nothing varies, by predictor: `dictionary`,
    `linear` (the best linear map), `invariant` (the activation itself), `shuffled` (pairing)."""
    r2_mean: dict[str, float | None]
    """Mean R2 over the poses other than e, by predictor."""
    interventions: InterventionsResult = dataclasses.field(
        default_factory=lambda: InterventionsResult(missing="The run is older than interventions.")
    )
    """Interchange interventions in the network."""
    control: ControlResult | None = None
    """Comparison with a control, with --control."""


def run(config: SymmetryConfig, folder: RunFolder) -> SymmetryResult:
    """Classify the features of a dictionary.

    Raises:
        DiskError: The folder cannot be written.
        InputError: All samples are cut from images of one half.
        RecipeError: A number is out of range, the control is none, or it is not clear which site
            the dictionary reads.
        SiteError: There is no such site downstream.
        StoreError: The store has no group, is damaged, or does not fit the dictionary.
        WeightsError: The dictionary cannot be read, or is one for another group.
    """
    _check(config)
    opened, store = open_dictionary(config.dictionary, site=config.site), Store(config.store)
    refuse_other_network(opened, store)
    posed = pair_with_store(
        opened.dictionary, store, opened.site_in(store), name=str(config.dictionary),
        trained_for=opened.manifest.get("group"),
    )  # fmt: skip
    _describe(folder, config, posed, store, opened.checksum)
    control = _read_control(config.control, posed) if config.control else None
    network = pose_interventions.open_posed_network(
        store, posed.site, config.downstream, wanted=config.interventions > 0, trust=config
    )
    estimates = _estimate(posed, network, folder, config)
    with bar("comparing features") as progress:
        symmetries = symmetry(
            estimates.blocks, posed.group, estimates.halves, fdr=config.fdr,
            equality_threshold=config.equality_threshold, seed=config.seed,
            acts_by_rotation=posed.action == Rotate.name, on_progress=progress,
        )  # fmt: skip
    n_shuffled = count_shuffled_discoveries(
        estimates.halves, posed.group, fdr=config.fdr,
        equality_threshold=config.equality_threshold, seed=config.seed,
    )  # fmt: skip
    checked = block_artifacts.check_blocks(symmetries, estimates.scaling)
    symmetries = checked.symmetries
    with on_device(posed.dictionary, as_device(config.device)):
        r2, held_out, n_held_out = measure_r2(posed, estimates)
    tested = pose_interventions.run_interventions(
        network, held_out, symmetries, estimates.blocks,
        lambda codes: reconstruct(posed, estimates, codes), folder,
        n_features=config.interventions, seed=config.seed,
    )  # fmt: skip
    described = _describe_features(config, posed, store, estimates, checked, tested, folder)
    by_pose = {name: [rounded(v) for v in values] for name, values in r2.items()}
    description = store.manifest["group"]
    return SymmetryResult(
        **count_classes(symmetries),
        artifacts=checked.result,
        **described,
        discoveries_shuffled=n_shuffled,
        agreement=_agreement(estimates, symmetries),
        group=_describe_group(posed, description),
        interpolation=_interpolation(posed, description, symmetries),
        site=posed.site,
        blocks="estimated from codes" if posed.decoder_blocks is None else "decoder",
        reads=ALL_POSES if posed.pose_tied else UNTRANSFORMED,
        rows=int(estimates.rows.sum()),
        rows_of_halves=estimates.rows.tolist(),
        held_out_rows=n_held_out,
        r2=by_pose,
        r2_mean={name: _mean_of_others(each, posed.group) for name, each in by_pose.items()},
        interventions=tested.result,
        control=None if control is None else _compare(str(config.control), symmetries, control),
    )


def _describe_features(
    config: SymmetryConfig,
    posed: PosedDictionary,
    store: Store,
    estimates: BlockEstimates,
    checked: CheckedBlocks,
    tested: pose_interventions.MeasuredInterventions,
    folder: RunFolder,
) -> dict[str, Any]:
    """Find types, measure responses to stimuli, and write all that is known of each feature."""
    symmetries = checked.symmetries
    types = find_types(
        estimates.blocks, posed.group, symmetries.reliability, fdr=config.fdr, seed=config.seed
    )
    tuned = stimuli.measure(
        posed, store, symmetries, types, n_angles=config.stimuli, seed=config.seed, trust=config
    )
    untransformed = estimates.blocks[:, posed.group.identity]
    columns = type_columns(types, posed.group) | checked.columns | tuned.columns | tested.columns
    write_features(
        folder, symmetries, untransformed, estimates.active, columns,
        checked.tensors | tuned.tensors,
    )  # fmt: skip
    result: dict[str, Any] = {"types": count_types(types), "tuning": tuned.result}
    if config.code_action:
        result["code_action"] = code_action.measure(
            posed, estimates.blocks, estimates.active, symmetries, types
        )
    return result


def _describe_group(posed: PosedDictionary, description: dict[str, Any]) -> GroupDescription:
    return GroupDescription(
        name=posed.group.name,
        order=posed.group.order,
        action=posed.action,
        closes=bool(description.get("closes", True)),
    )


def _check(config: SymmetryConfig) -> None:
    """Check the ranges of the numbers."""
    if not SUPPORT_THRESHOLD < config.equality_threshold <= 1:
        raise RecipeError(
            f"--equality-threshold must be above {SUPPORT_THRESHOLD:.4f} and at most 1, got "
            f"{config.equality_threshold}."
        )


def _describe(
    folder: RunFolder, config: SymmetryConfig, posed: PosedDictionary, store: Store, digest: str
) -> None:
    """Note the inputs and the group in the manifest."""
    group = posed.group
    folder.parent("dictionary", digest)
    folder.parent("store", store.digest)
    folder.facts(
        dictionary=str(config.dictionary.resolve()),
        store=str(config.store.resolve()),
        site=posed.site,
        group=group_facts(
            group, posed.action, name_classes(group, acts_by_rotation=posed.action == Rotate.name)
        ),
    )


def group_facts(group: Group, action: str, classes: Sequence[str]) -> dict[str, Any]:
    """Plain values of a group for a manifest.

    Args:
        group: The group.
        action: Name of its action.
        classes: Name of each conjugacy class of its subgroups.
    """
    return {
        "name": group.name,
        "table": group.table.tolist(),
        "elements": list(group.element_names),
        "action": action,
        "classes": list(classes),
    }


def _expected(
    posed: PosedDictionary, network: interchange.PosedNetwork | str, config: SymmetryConfig
) -> Estimate:
    """Estimate the regression, the comparison of features and the interventions."""
    dictionary, order = posed.dictionary, posed.group.order
    n = dictionary.n_latents // (order if posed.pose_tied else 1)
    blocks = np.random.default_rng(0).normal(size=(2, n, order, posed.d)).astype(np.float32)

    def read(progress: Progress) -> None:
        with on_device(dictionary, as_device(config.device)):
            estimate_blocks(posed, on_progress=progress)

    def compare(progress: Progress) -> None:
        symmetry(blocks[0], posed.group, blocks, on_progress=progress)

    def intervene(progress: Progress) -> None:
        total = 0 if isinstance(network, str) else interchange.n_runs(min(config.interventions, n))
        for done in range(0, total, PROBE_SAMPLES):
            assert not isinstance(network, str)
            network.answer(network.inputs(np.arange(min(PROBE_SAMPLES, len(network.samples)))))
            progress(min(done + PROBE_SAMPLES, total), total)

    width, codes = order * posed.d, dictionary.n_latents
    memory = 3 * bytes_of(dictionary) + 8 * codes * (2 * codes + 3 * width) + 5 * blocks.nbytes
    memory += 3 * code_action.MAX_BYTES * config.code_action
    if posed.decoder_blocks is not None:
        memory += 8 * FOLDS * min(n, MAX_TESTED) * (codes + width)
    return of_work([read, compare, intervene], memory=memory, disk=blocks.nbytes // 2)


def _estimate(
    posed: PosedDictionary,
    network: interchange.PosedNetwork | str,
    folder: RunFolder,
    config: SymmetryConfig,
) -> BlockEstimates:
    """Estimate blocks, or continue with the blocks that an interrupted run has kept."""
    folder.expect(lambda: _expected(posed, network, config), is_long=posed.rows.n_rows >= LONG_ROWS)
    kept = folder.kept(KEPT)
    if kept is not None:
        return BlockEstimates.from_arrays(kept)
    device = as_device(config.device)
    with bar("reading posed activations") as progress, on_device(posed.dictionary, device):
        estimates = estimate_blocks(posed, seed=config.seed, on_progress=progress)
    folder.keep(KEPT, estimates.arrays())
    return estimates


def _read_control(folder: Path, posed: PosedDictionary) -> tuple[list[str], TuningResult]:
    """Read the class of each feature of a control, and its agreement with stimuli."""
    manifest = manifest_of(folder)
    if manifest.get("kind") != KIND or not manifest.get("complete", True):
        raise RecipeError(f"--control {folder} is no result of `mechatlas symmetry`.")
    fields = Fields(folder / MANIFEST, manifest)
    group = {key: fields.part("group").values.get(key) for key in ("name", "table", "action")}
    site = fields.text("site")
    if (group["table"], group["action"], site) != (
        posed.group.table.tolist(), posed.action, posed.site
    ):  # fmt: skip
        raise RecipeError(
            f"--control {folder} is one for {site} under {group['name']} ({group['action']}), but "
            f"this is {posed.site} under {posed.group.name} ({posed.action})."
        )
    table = read_table(folder / FEATURES)
    if "class" not in table.column_names:
        raise RecipeError(f"{folder / FEATURES} has no column 'class'.")
    classes = renamed_columns({"class": table["class"].to_pylist()}, KIND)["class"]
    result: Any = read_result(folder, KIND)
    return classes, result.tuning


def _compare(
    folder: str, symmetries: Symmetry, control: tuple[list[str], TuningResult]
) -> ControlResult:
    names, (others, tuning) = symmetries.names, control
    here, there = (len(each) - each.count(NOT_SHOWN) for each in (names, others))
    return ControlResult(
        folder=folder,
        reliable=(here, there),
        classes=compare_with_control(names, others, symmetries.labels[:-1]),
        tuning=tuning,
    )


def _mean_of_others(values: list[float | None], group: Group) -> float | None:
    """Average over the elements other than e."""
    kept = [v for g, v in enumerate(values) if g != group.identity and v is not None]
    return rounded(np.mean(kept)) if kept else None


def _agreement(estimates: BlockEstimates, symmetries: Symmetry) -> float | None:
    """Median cosine of decoder blocks with blocks estimated from codes, corrected for noise."""
    blocks, mean = estimates.blocks, estimates.halves.mean(axis=0)
    lengths = np.sqrt(np.einsum("igk,igk->i", mean, mean) * np.einsum("igk,igk->i", blocks, blocks))
    kept = symmetries.reliable & (lengths > 0)
    if not kept.any():
        return None
    cosine = np.einsum("igk,igk->i", mean, blocks)[kept] / lengths[kept]
    return float(np.median(cosine / np.sqrt(np.maximum(symmetries.reliability[kept], 1e-6))))


def count_classes(symmetries: Symmetry) -> dict[str, Any]:
    """Fields of the result that count classes and families."""
    sizes = symmetries.family_sizes
    ceilings = symmetries.noise_ceiling[~np.isnan(symmetries.noise_ceiling)]
    quartiles = np.quantile(ceilings, [0.25, 0.5, 0.75]).tolist() if len(ceilings) else [None] * 3
    return {
        "n_features": len(symmetries.stabilizers),
        "classes": symmetries.class_counts,
        "grades": symmetries.grade_counts,
        "fdr": symmetries.fdr,
        "equality_threshold": symmetries.equality_threshold,
        "discoveries": symmetries.n_discoveries,
        "reliable": int(symmetries.reliable.sum()),
        "noise_ceiling": quartiles[1],
        "noise_ceiling_quartiles": [quartiles[0], quartiles[2]],
        "noise_inflation": symmetries.variance_inflation,
        "families": int((sizes > 1).sum()),
        "features_in_families": int(sizes[sizes > 1].sum()),
        "largest_family": int(sizes.max(initial=0)),
        "chance_similarity": symmetries.chance_similarity,
    }


def _interpolation(
    posed: PosedDictionary, description: dict[str, Any], symmetries: Symmetry
) -> Interpolation | None:
    exact = np.array(description.get("exact", [True]))
    if exact.all() or posed.action != Rotate.name:
        return None
    s = symmetries.stabilizer_function.mean(axis=0).round(6)
    others = exact & (np.arange(posed.group.order) != posed.group.identity)
    return Interpolation(
        matched_blur=bool(description["matched_blur"]),
        quarters=float(s[others].mean()) if others.any() else None,
        between=float(s[~exact].mean()),
    )


READS_ALL = "The dictionary is pose-tied and reads all poses; the linear map reads one."
NO_GROUP = (
    "The store's manifest says `closes: false`: steps of {action} do not return to the start, so "
    "{name} only labels them, and no subgroup of it need be a symmetry."
)


def in_words(result: SymmetryResult) -> str:
    """Describe the classes and families with their evidence."""
    counts = ", ".join(f"{n} {name}" for name, n in result.classes.items())
    ceiling = "not known" if result.noise_ceiling is None else f"{result.noise_ceiling:.2f}"
    r2 = {
        name: "unknown" if value is None else f"{value:.3f}"
        for name, value in result.r2_mean.items()
    }
    group = result.group
    lines = [
        f"{result.n_features} features under {group.name}: {counts}.",
        f"{result.discoveries} have an exact symmetry, {result.grades['approximate']} an "
        f"approximate one at a false discovery rate of {result.fdr:.0%}, {result.grades['none']} "
        f"have none, of {result.grades['not shown']} neither is shown "
        f"({result.discoveries_shuffled} exact with shuffled pairing); median noise ceiling "
        f"{ceiling}.",
        block_artifacts.in_words(result.artifacts),
        f"{result.families} families of two or more hold {result.features_in_families}.",
        types_in_words(result.types) if result.types else "",
        code_action.in_words(result.code_action) if result.code_action else "",
        f"R2 of other poses, held out: dictionary {r2['dictionary']}, linear map {r2['linear']}, "
        f"the activation itself {r2['invariant']}, shuffled pairing {r2['shuffled']}.",
        READS_ALL if result.reads == ALL_POSES else "",
        "" if group.closes else NO_GROUP.format(action=group.action, name=group.name),
        _interpolation_in_words(result.interpolation) if result.interpolation else "",
        control_in_words(result.control) if result.control else "",
        stimuli.in_words(result.tuning),
        pose_interventions.in_words(result.interventions),
        f"Result: {result.out}",
    ]
    return "\n".join(line for line in lines if line)


def _interpolation_in_words(effect: Interpolation) -> str:
    exact = "" if effect.quarters is None else f", after quarter-turns {effect.quarters:.3f}"
    return (
        f"Mean stabilizer function after turns that interpolate {effect.between:.3f}{exact}; "
        + ("all poses are as blurred." if effect.matched_blur else "the control is `matched_blur`.")
    )


def control_in_words(control: ControlResult) -> str:
    """Describe the classes whose frequency differs from that in the control."""
    differing = [each for each in control.classes if each.q_value <= FDR]
    listed = "; ".join(
        f"{each.name} {each.share:.1%} and {each.share_control:.1%} (q {each.q_value:.2g})"
        for each in differing
    )
    here, there = control.reliable or (math.nan, math.nan)
    return (
        f"Features with a known class here ({here}) and in the control ({there}): "
        f"{listed or 'no class differs'}."
        + (f" In the control: {stimuli.in_words(control.tuning)}" if control.tuning else "")
    )
