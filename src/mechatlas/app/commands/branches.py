"""Test which branch of its site each feature of a dictionary belongs to.

    mechatlas branches runs/mixed4a --store runs/store --out runs/branches4a
    mechatlas branches sae.safetensors --site mixed4a --store runs/store --out out
    mechatlas branches runs/4a --store runs/store --match runs/match --out out

The folder has `features.parquet` (a row for each feature and branch) and `picture.json` (the
decoder, sorted).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from scipy import stats
from tyro.conf import Positional, arg

from mechatlas.activations.store import Store
from mechatlas.analysis.branches.activity import (
    GROUPS,
    ROWS_AT_ONCE,
    ActivityShares,
    Shares,
    activity_shares,
)
from mechatlas.analysis.branches.components import (
    ComponentStatistics,
    ComponentTest,
    OfComponents,
    component_statistics,
)
from mechatlas.analysis.branches.specialization import (
    FDR,
    BranchTest,
    ChanceTest,
    ChannelStatistics,
    Specialization,
    branches,
    channel_statistics,
)
from mechatlas.analysis.branches.summary import (
    Consistency,
    LabelEnrichment,
    consistency,
    decoder_picture,
    label_enrichment,
)
from mechatlas.app.branch_inputs import (
    BranchSite,
    ComponentSite,
    NeighborMatch,
    open_matches,
    open_site,
    read_labels,
)
from mechatlas.app.estimates import Estimate, bytes_of, of_work
from mechatlas.app.progress import bar
from mechatlas.app.recipes import TrustConfig
from mechatlas.app.run_folder import (
    BRANCHES,
    DECODER_PICTURE,
    FEATURES,
    CommandResult,
    RunConfig,
    RunFolder,
)
from mechatlas.base import Progress
from mechatlas.maths.arrays import numbers_of
from mechatlas.maths.statistics import proportion
from mechatlas.ranges import RATE, SEED, check_ranges

KIND = BRANCHES
ROWS = 16_384
"""Default number of rows."""
LABELS_SHOWN = 50
"""Number of labels in `result.json`, surest first."""
LONG_ROWS = 100_000
"""Rows from which on the cost is estimated beforehand."""
PROBE_ROWS = 2048
"""Rows whose statistics are enough to time a test."""
PROBE_FEATURES = 256
"""Features that are tested at once to time a test."""
TESTS = 3
"""Tests of each feature: as it is, with permuted channels, and moved into a branch."""
CELL_BYTES = 80
"""Bytes of `features.parquet` for a feature and a branch."""
AnySite = BranchSite | ComponentSite
Statistics = ChannelStatistics | ComponentStatistics
Arrays = dict[str, Shaped[np.ndarray, "..."]]
"""Part of the work as it is kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BranchesConfig(TrustConfig, RunConfig):
    """Test every feature of a dictionary for a branch of its own."""

    dictionary: Annotated[Positional[Path], arg(metavar="DICT")]
    """Folder or file of a dictionary, in any supported format, of a whole site with branches; or of
    the output of a transformer's layer, whose heads, MLP and input are then the branches."""
    store: Path
    """Store that has the site; its network runs if the site is the output of a layer."""
    site: str | None = None
    """Site that the dictionary reads, if its file does not say."""
    rows: int = ROWS
    """Rows of the store for variances, and for the activity that comes from each branch."""
    fdr: float = FDR
    """False discovery rate at which a feature counts as specialized."""
    labels: str | None = None
    """Labels to look for in the branches: a labels.json that the page saved, or
    FILE.parquet:COLUMN; a column `feature` says which feature each row is of, otherwise rows are in
    the order of features."""
    match: Path | None = None
    """Result folder of `mechatlas match --cost codes` for this dictionary and dictionaries of other
    layers, to test whether features stay in the same kind of branch."""
    seed: int = 0
    """Seed of the permutation control and of the features moved to measure power."""

    def __post_init__(self) -> None:
        check_ranges(self, rows="[2, 1000000000]", fdr=RATE, seed=SEED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BranchResult:
    """Features of one branch."""

    name: str
    """Name of the branch."""
    first: int
    """First channel."""
    last: int
    """Channel after the last one."""
    width: int
    """Number of channels; fewer than lie between them where others lie there too."""
    expected_share: float
    """Share of a feature that belongs to no branch."""
    mean_share: float | None
    """Mean share of all features; None if no feature has a decoder row."""
    n_specialized: int
    """Features specialized to the branch."""
    specialized_share: float
    """Fraction of the tested features that is specialized to the branch."""
    low: float
    """Lower end of the 95 % interval of the fraction."""
    high: float
    """Upper end of the interval."""
    n_assigned: int
    """Features specialized to the branch more than to any other."""
    n_specialized_permuted: int
    """Features specialized to the branch after their channels were permuted."""
    power: float | None
    """Fraction found of the features moved into the branch to an excess of 0.9; None with fewer
    than ten features for each branch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankCorrelations:
    """Mean rank correlations of the decoder's share with the shares measured on data."""

    activation: float | None
    """Rank correlation with the activation share; None for a nonlinear encoder."""
    ablation: float | None
    """Rank correlation with the ablation share."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelsResult:
    """Labels in branches."""

    source: str
    """File and column of the labels."""
    n_labels: int
    """Different labels."""
    n_enriched: int
    """Pairs of a branch and a label enriched in it."""
    surest: list[LabelEnrichment]
    """Evidence for the pairs with the smallest p-values."""


@dataclasses.dataclass(frozen=True)
class NeighborResult(Consistency):
    """Agreement of the branches of matched features of two dictionaries, if both specialized."""

    a: str
    """Name of the first dictionary."""
    b: str
    """Name of the second dictionary."""
    nearest_branch: Consistency
    """Agreement for all features, by the branch with the smallest p-value."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BranchesResult(CommandResult):
    """Features specialized to branches; the fields of `result.json`."""

    site: str
    """Site of the dictionary."""
    fdr: float
    """False discovery rate asked for."""
    branches: list[BranchResult]
    """Features of each branch."""
    n_features: int
    """Features of the dictionary."""
    n_tested: int
    """Features with a p-value."""
    n_never_active: int
    """Features never active on the rows read, which are not tested."""
    n_specialized: int
    """Features specialized to a branch."""
    n_specialized_permuted: int
    """Features specialized to a branch after their channels were permuted: the control."""
    fdr_permuted: float | None
    """Ratio of `n_specialized_permuted` to `n_specialized`; None if no feature is specialized."""
    n_rows: int
    """Rows read."""
    positive: bool
    """Whether only positive parts of decoder rows count."""
    components: bool = False
    """Whether the branches are components of the residual stream: shares are then of the variance
    of pre-activations, not of decoder rows, and the control permutes principal coordinates."""
    rank_correlations: RankCorrelations
    """Agreement of the three shares."""
    labels: LabelsResult | None = None
    """Labels in branches; None without `--labels`."""
    consistency: list[NeighborResult] = dataclasses.field(default_factory=list)
    """Matches with the dictionaries of other layers."""


def in_words(result: BranchesResult) -> str:
    """Describe the specialized features, and a line for each branch and match."""
    permuted = "coordinates" if result.components else "channels"
    lines = [
        f"{result.site}: {result.n_specialized} of {result.n_tested} features specialized to a "
        f"branch (false discovery rate {result.fdr:.0%}); with their {permuted} permuted "
        f"{result.n_specialized_permuted}"
    ]
    for each in result.branches:
        power = "" if each.power is None else f" (power {each.power:.0%})"
        lines.append(
            f"  {each.name:12} {each.width:4} channels, expected share {each.expected_share:.2f}: "
            f"{each.n_specialized} specialized{power}"
        )
    for each in result.consistency:
        kinds = {
            "specialized features": each.same_branch,
            "all features, by their nearest branch": each.nearest_branch.same_branch,
        }
        lines += [
            f"  {each.a} -> {each.b}: {same.pairs} matched pairs of {which}, same branch in "
            f"{same.value:.0%} [{same.low:.0%}, {same.high:.0%}], by chance {same.chance:.0%}"
            for which, same in kinds.items()
            if same.pairs
        ]
    return "\n".join([*lines, f"Result: {result.out}"])


def run(config: BranchesConfig, folder: RunFolder) -> BranchesResult:
    """Test every feature against the null, and measure how much of its activity each branch gives.

    Raises:
        DiskError: The folder cannot be written, or a file cannot be read.
        InputError: The dictionary has only one branch to read.
        RecipeError: A choice makes no sense, or the site is not known.
        StoreError: The store misses the site, or the site has no branches.
    """
    store = Store(config.store)
    site = open_site(config.dictionary, config.site, store, folder, config)
    labels, matches = None, []
    if config.labels is not None:
        labels = read_labels(config.labels, config.dictionary, site.dictionary.n_latents, folder)
    if config.match is not None:
        matches = open_matches(config.match, config.dictionary, store, folder, config)
    folder.parent("store", store.digest)
    folder.facts(
        site=site.rows.site,
        dictionary=str(config.dictionary.resolve()),
        store=str(config.store.resolve()),
    )
    folder.expect(lambda: _estimate(site, config.rows), is_long=config.rows >= LONG_ROWS)
    known = _known(site, config.rows, folder, "statistics")
    activity = _activity(site, config.rows, known, folder)
    alive = activity.active > 0
    tested = _tested(site, known, folder, "specialization", lambda: alive)
    test = _test(site, known, alive)
    result = summarize(
        tested, test, site=site.rows.site, fdr=config.fdr, seed=config.seed, activity=activity
    )
    if labels is not None:
        result = dataclasses.replace(result, labels=_enriched(config, tested, labels, alive))
    agreements = [_consistency(config, k, each, tested, folder) for k, each in enumerate(matches)]
    folder.table(FEATURES, features_table(tested, activity))
    picture = {}
    if isinstance(known, ChannelStatistics):  # channels of components belong to none
        picture = decoder_picture(site.dictionary.W_dec, site.branches, signed=known.signed)
    folder.json(DECODER_PICTURE, picture)
    return dataclasses.replace(result, consistency=agreements)


def _estimate(site: AnySite, n_rows: int) -> Estimate:
    """Estimate the work on rows, and the tests of the features from statistics of a few rows."""
    dictionary, n = site.dictionary, site.dictionary.n_latents
    known = _statistics(site, PROBE_ROWS)

    def read(progress: Progress) -> None:
        _statistics(site, n_rows)
        _activity_shares(site, n_rows, known, progress)

    def test(progress: Progress) -> None:
        if isinstance(known, ComponentStatistics):
            for k in range(TESTS):
                ComponentTest(dictionary, known).run()
                progress(k + 1, TESTS)
            return
        for k in range(0, TESTS * n, PROBE_FEATURES):
            rows = dictionary.W_dec.detach()[np.arange(k, k + PROBE_FEATURES) % n]
            branches(rows, site.branches, known)
            progress(k + PROBE_FEATURES, TESTS * n)

    cells = n * len(site.branches)
    memory = 3 * bytes_of(dictionary) + 16 * GROUPS * cells
    return of_work([read, test], memory=memory, disk=CELL_BYTES * cells)


def _resumed(folder: RunFolder, name: str, make: Callable[[], dict[str, Any]]) -> Arrays:
    """Read a part of the work that an interrupted run has kept, or do it and keep it."""
    arrays = folder.kept(name)
    if arrays is None:
        arrays = {key: np.asarray(value) for key, value in make().items() if value is not None}
        folder.keep(name, arrays)
    return arrays


def _statistics(site: AnySite, n_rows: int) -> Statistics:
    """Measure variances and correlations of the channels, or covariances of the components."""
    if isinstance(site, ComponentSite):
        return component_statistics((x for x, _ in site.blocks(n_rows)), site.layer.names)
    return channel_statistics(x for x, _ in site.read(n_rows))


def _known(site: AnySite, n_rows: int, folder: RunFolder, name: str) -> Statistics:
    """Measure the statistics of a site, unless an interrupted run has."""

    def measure() -> dict[str, Any]:
        return {k: v for k, v in vars(_statistics(site, n_rows)).items() if k != "names"}

    arrays = _resumed(folder, name, measure)
    values: dict[str, Any] = arrays | {
        key: v.item() for key, v in arrays.items() if key in ("n_rows", "signed")
    }
    if isinstance(site, ComponentSite):
        return ComponentStatistics(names=site.layer.names, **values)
    return ChannelStatistics(**values)


def _test(site: AnySite, known: Statistics, tested: Bool[np.ndarray, " feature"]) -> ChanceTest:
    if isinstance(known, ComponentStatistics):
        return ComponentTest(site.dictionary, known, tested=tested)
    return BranchTest(site.dictionary, site.branches, known, tested=tested)


def _activity_shares(
    site: AnySite, n_rows: int, known: Statistics, progress: Progress
) -> ActivityShares:
    dictionary = site.dictionary
    if isinstance(known, ComponentStatistics):
        dictionary = OfComponents(dictionary, len(known.names))
    return activity_shares(
        dictionary,
        site.read(n_rows),
        site.branches,
        known.mean.ravel(),
        n_rows=known.n_rows,
        on_progress=progress,
    )


def _activity(site: AnySite, n_rows: int, known: Statistics, folder: RunFolder) -> ActivityShares:
    """Measure how much of the activity of each feature comes from each branch."""

    def measure() -> dict[str, Any]:
        with bar("setting branches to their mean") as progress:
            shares = _activity_shares(site, n_rows, known, progress)
        parts = {"activation": shares.activation, "ablation": shares.ablation}
        return {"n_rows": shares.n_rows, "active": shares.active} | {
            f"{part}.{end}": values
            for part, of_part in parts.items()
            for end, values in (vars(of_part) if of_part is not None else {}).items()
        }

    arrays = _resumed(folder, "activity", measure)

    def part(name: str) -> Shares:
        return Shares(*(arrays[f"{name}.{end}"] for end in ("value", "low", "high")))

    activation = part("activation") if "activation.value" in arrays else None
    return ActivityShares(arrays["n_rows"].item(), arrays["active"], activation, part("ablation"))


def _tested(
    site: AnySite,
    known: Statistics,
    folder: RunFolder,
    name: str,
    alive: Callable[[], Bool[np.ndarray, " feature"]],
) -> Specialization:
    """Test the features that are ever active."""

    def test() -> dict[str, Any]:
        found = vars(_test(site, known, alive()).run())
        return {k: v for k, v in found.items() if k not in ("names", "test")}

    matrices: dict[str, Any] = _resumed(folder, name, test)
    return Specialization(names=tuple(site.branches), **matrices)


def summarize(
    tested: Specialization,
    test: ChanceTest,
    *,
    site: str,
    fdr: float = FDR,
    seed: int = 0,
    activity: ActivityShares | None = None,
) -> BranchesResult:
    """Count the features of each branch, beside the permutation control and the power.

    Args:
        tested: Shares of the features with their evidence.
        test: Test that gave them.
        site: Site of the dictionary.
        fdr: False discovery rate at which a feature counts as specialized.
        seed: Seed of the control and of the power.
        activity: Activity from each branch, where it was measured.
    """
    permuted = test.permuted(seed=seed).specialized(fdr)
    seen, specialized = test.power(fdr=fdr, seed=seed), tested.specialized(fdr)
    branch_of = tested.branch_of(fdr)
    n_tested = int((~np.isnan(tested.q_values)).any(axis=1).sum())
    listed = []
    for k, (name, s) in enumerate(test.branches.items()):
        share = proportion(int(specialized[:, k].sum()), max(n_tested, 1))
        at = numbers_of(s, test.rows.shape[1])
        there = ~np.isnan(tested.share[:, k])
        listed.append(
            BranchResult(
                name=name,
                first=min(at),
                last=max(at) + 1,
                width=len(at),
                expected_share=float(tested.expected[there, k][0]) if there.any() else 0.0,
                mean_share=float(np.nanmean(tested.share[:, k])) if there.any() else None,
                n_specialized=int(specialized[:, k].sum()),
                specialized_share=share.value,
                low=share.low,
                high=share.high,
                n_assigned=int((branch_of == k).sum()),
                n_specialized_permuted=int(permuted[:, k].sum()),
                power=None if np.isnan(seen[k]) else float(seen[k]),
            )
        )
    n, by_chance = int(specialized.any(axis=1).sum()), int(permuted.any(axis=1).sum())
    never_active = 0 if test.tested is None else int((~test.tested).sum())
    return BranchesResult(
        site=site,
        fdr=fdr,
        branches=listed,
        n_features=len(branch_of),
        n_tested=n_tested,
        n_never_active=never_active,
        n_specialized=n,
        n_specialized_permuted=by_chance,
        fdr_permuted=min(1.0, by_chance / n) if n else None,
        n_rows=test.n_rows,
        positive=test.positive,
        components=isinstance(test, ComponentTest),
        rank_correlations=RankCorrelations(
            activation=_rank_correlation(tested, activity and activity.activation),
            ablation=_rank_correlation(tested, activity and activity.ablation),
        ),
    )


def _rank_correlation(tested: Specialization, shares: Shares | None) -> float | None:
    """Mean rank correlation of two shares of the features in a branch."""
    values = []
    if shares is None:
        return None
    for k in range(len(tested.names)):
        mine, other = tested.share[:, k], shares.value[:, k]
        both = np.isfinite(mine) & np.isfinite(other)
        if both.sum() > 2 and np.ptp(other[both]) > 0:
            values.append(float(np.asarray(stats.spearmanr(mine[both], other[both]))[0]))
    return float(np.mean(values)) if values else None


def features_table(
    tested: Specialization, activity: ActivityShares | None = None
) -> dict[str, Any]:
    """Columns of the table of features: a row for each feature and branch."""
    n, b = tested.share.shape
    columns: dict[str, Any] = {
        "feature": np.repeat(np.arange(n), b),
        "branch": list(tested.names) * n,
        "share": tested.share.ravel(),
        "expected_share": tested.expected.ravel(),
        "p_value": tested.p_values.ravel(),
        "q_value": tested.q_values.ravel(),
        "excess": tested.excess.ravel(),
        "low": tested.low.ravel(),
        "high": tested.high.ravel(),
        "n_effective": tested.n_effective.ravel(),
    }
    empty = np.full((n, b), np.nan)
    for name in ("activation", "ablation"):
        shares = getattr(activity, name, None) or Shares(empty, empty, empty)
        columns[f"{name}_share"] = shares.value.ravel()
        columns[f"{name}_low"] = shares.low.ravel()
        columns[f"{name}_high"] = shares.high.ravel()
    columns["active_rows"] = np.repeat(np.zeros(n, int) if activity is None else activity.active, b)
    return columns


def _enriched(
    config: BranchesConfig,
    tested: Specialization,
    labels: list[Any],
    alive: Bool[np.ndarray, " feature"],
) -> LabelsResult:
    branch_of = tested.branch_of(config.fdr)
    listed = label_enrichment(branch_of, tested.names, labels, tested=alive)
    return LabelsResult(
        source=str(config.labels),
        n_labels=len({each.label for each in listed}),
        n_enriched=sum(each.q_value <= config.fdr for each in listed),
        surest=listed[:LABELS_SHOWN],
    )


def _consistency(
    config: BranchesConfig,
    number: int,
    match: NeighborMatch,
    own: Specialization,
    folder: RunFolder,
) -> NeighborResult:
    """Agreement of the branches of matched features: of those specialized, and of all."""
    both = []
    for side, site in enumerate(match.sites):
        name = f"match{number}.{side}"
        both.append(own if site is None else _neighbor(site, config.rows, folder, name))

    def compare(branch_a: Int[np.ndarray, " _"], branch_b: Int[np.ndarray, " _"]) -> Consistency:
        return consistency(
            branch_a, branch_b, both[0].names, both[1].names, seed=config.seed,
            latent_a=match.latent_a, latent_b=match.latent_b, matched=match.matched,
        )  # fmt: skip

    a, b = match.names
    specialized = compare(*(each.branch_of(config.fdr) for each in both))
    nearest = compare(*(each.nearest_branch() for each in both))
    return NeighborResult(**vars(specialized), a=a, b=b, nearest_branch=nearest)


def _neighbor(site: AnySite, n_rows: int, folder: RunFolder, name: str) -> Specialization:
    """Test the features of another dictionary that are ever active."""

    @torch.no_grad()
    def alive() -> Bool[np.ndarray, " feature"]:
        active = torch.zeros(site.dictionary.n_latents, dtype=torch.bool)
        for x, _ in site.read(n_rows):
            for part in x.float().split(ROWS_AT_ONCE):
                active |= (site.dictionary.encode(part) != 0).any(dim=0).cpu()
        return active.numpy()

    known = _known(site, n_rows, folder, f"{name}.statistics")
    return _tested(site, known, folder, name, alive)
