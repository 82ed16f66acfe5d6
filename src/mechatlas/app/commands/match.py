"""Match the latents of consecutive dictionaries one to one, with proof and false match rate.

    mechatlas match runs/layer3 runs/layer4 --out runs/match
    mechatlas match runs/l*/ --out runs/tracks --store runs/store --engine processes:4
    mechatlas match runs/layer3 runs/layer4 --out runs/match --store runs/store --combinations

The folder has `matches.parquet` (a row for each pair of latents), with three dictionaries or more
`tracks.parquet`, and with `--combinations` what each latent is a boolean combination of
(`combinations.parquet`). An interrupted run is continued by the same command.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
from jaxtyping import Int
from tyro.conf import Positional, arg

from mechatlas import deprecated
from mechatlas.activations.store import Store
from mechatlas.analysis.matching.chains import (
    SurvivalCurves,
    Tracks,
    compose,
    cycle_agreement,
    survival,
    track,
    tracks_table,
)
from mechatlas.analysis.matching.codes import correlate, permute_samples, sample_block
from mechatlas.analysis.matching.folding import Cost, mean_active, varying
from mechatlas.analysis.matching.held_out import CoFiring, co_firing, paired_codes
from mechatlas.analysis.matching.nulls import NULLS, Null, PairEvidence
from mechatlas.analysis.matching.pairing import FDR, Match, feature_splitting, match, matches_table
from mechatlas.analysis.matching.spaces import MIN_PAIRS, SpaceSimilarity, compare_spaces
from mechatlas.app.engines import EngineConfig
from mechatlas.app.estimates import Estimate, of_matching
from mechatlas.app.inputs import (
    OpenedDictionary,
    expect_several,
    expect_sites,
    open_dictionaries,
    refuse_other_network,
)
from mechatlas.app.match_quality import (
    HeldSamples,
    PairedRows,
    PairQuality,
    combinations_table,
    effects_on_output,
    find_combinations,
    held_out_quality,
    open_held_samples,
    open_rows,
    pairings,
    seconds_of_effects,
)
from mechatlas.app.progress import bar
from mechatlas.app.recipes import TrustConfig
from mechatlas.app.run_folder import (
    COMBINATIONS,
    MATCHES,
    MATCHING,
    TRACKS,
    CommandResult,
    DeviceConfig,
    RunFolder,
    peak_bytes,
)
from mechatlas.base import Engine, RecipeError
from mechatlas.maths.assignment import State
from mechatlas.maths.near_optima import NearOptimal
from mechatlas.maths.near_optima import in_words as near_optimal_in_words
from mechatlas.ranges import COUNT_OR_NONE, RATE, SEED, check_ranges

KIND = MATCHING
ROWS = 4096
"""Default number of rows."""
CODES = 16
"""Times as many rows are read to correlate codes: rare latents need them."""
KEEP_EVERY = 15.0
"""Seconds of work that an interrupt may cost, once all pairs have been priced once."""
SCALES = ("threshold", "mean")
CURVES = ("persistence", "low", "high", "birth_share", "death_share")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatchConfig(TrustConfig, EngineConfig, DeviceConfig):
    """Match the latents of consecutive dictionaries one to one."""

    dictionaries: Annotated[Positional[tuple[Path, ...]], arg(metavar="DICT_A DICT_B ...")]
    """Folders or files of dictionaries, in any supported format, in the order of the network."""
    cost: str = "decoder"
    """Vectors compared: decoder, encoder, all, balanced, cosine; or codes, the correlation of codes
    on paired rows of a store, which also compares dictionaries of different widths."""
    fdr: float = FDR
    """False match rate at which a pair counts as matched."""
    store: Path | None = None
    """Store collected with `paired = true` that has the sites of all dictionaries. Adds co-firing,
    explained variance and the effect on the network's output, on held-out rows. Latents that are
    never active on its rows, or constant, are not paired."""
    sites: tuple[str, ...] = ()
    """Site of each dictionary, in the same order, where the dictionaries do not say it."""
    scale: str = "threshold"
    """Activation of a latent that counts as 1: its threshold (where it has one), or its mean when
    active on rows of the store (mean)."""
    rows: int = ROWS
    """Rows of the store to measure on, and as many others to fold with (16 times as many to
    correlate codes)."""
    samples: int = 64
    """Held-out samples of the store on which the network runs with the second site written from
    the first; 0 for none."""
    combinations: bool = False
    """Whether to describe each latent by two latents of the dictionary before (or, and, and not),
    on the rows to fold with, half of their samples held out."""
    seed: int = 0
    """Seed of the nulls and intervals."""

    def __post_init__(self) -> None:
        """Accept the name that a scale had in version 0.1."""
        check_ranges(self, fdr=RATE, rows="[2, 1000000000]", samples=COUNT_OR_NONE, seed=SEED)
        if self.scale == "data":
            deprecated.warn("scale 'data'", "'mean'")
            object.__setattr__(self, "scale", "mean")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairResult(PairQuality):
    """Match of two consecutive dictionaries."""

    a: str
    """Name of the first dictionary."""
    b: str
    """Name of the second dictionary."""
    n_a: int
    """Latents of the first dictionary."""
    n_b: int
    """Latents of the second dictionary."""
    cost: float
    """Cost of the optimal pairing."""
    lower_bound: float
    """Lower bound on the cost of every one-to-one pairing."""
    gap: float
    """Cost minus lower bound."""
    matched: int
    """Pairs that are significant at the false match rate."""
    n_null: int
    """Estimated number of pairs that are chance."""
    cosine_threshold: float | None
    """Cosine above which as many pairs lie as are matched; null where none is."""
    pricing_rounds: int
    """Rounds of pricing until the pairing was proved optimal."""
    passes: float
    """Mean number of times that a row was priced against all columns."""
    degenerate_a: int
    """Latents of A that cannot be matched: zero, constant, never active, or not the only one with
    their direction."""
    degenerate_b: int
    """Latents of B that cannot be matched."""
    split: int
    """Features of A with several similar latents in B."""
    merged: int
    """Features of B with several similar latents in A."""
    seconds: float
    """Process CPU seconds of the pairing and its evidence."""
    wall_seconds: float
    """Wall seconds of the pairing and its evidence."""
    peak_bytes: int
    """Largest resident memory of the process so far."""
    spaces: SpaceSimilarity | None = None
    """Similarity of the decoder rows of matched pairs, beside random pairings of them; by codes,
    which do not make the rows alike by themselves."""
    n_combinations: int | None = None
    """Latents of B that two latents of A describe better than one; with `--combinations`."""
    near_optimal: list[NearOptimal] = dataclasses.field(default_factory=list)
    """Number of one-to-one pairings that cost at most a tenth of a percent, and a percent, more
    than the optimum: a lower bound, and for few latents an upper bound and an estimate."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracksResult:
    """Feature tracks through three dictionaries or more."""

    n: int
    """Number of tracks."""
    layers: int
    """Number of layers."""
    longer_than_one: int
    """Tracks of two layers or more."""
    persistence: list[float]
    """Share of the latents that are the same feature 1, 2, ... layers on."""
    low: list[float]
    """Lower end of the 95 % interval of `persistence`."""
    high: list[float]
    """Upper end of the 95 % interval of `persistence`."""
    birth_share: list[float]
    """Share of each layer's latents whose track begins there."""
    death_share: list[float]
    """Share of each layer's latents whose track ends there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistantMatch:
    """Match of the first dictionary with the last by one method."""

    pairs: int
    """Number of matched pairs."""
    co_firing: CoFiring | None = None
    """Co-firing of the pairs; with a store."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatchResult(CommandResult):
    """Matches of consecutive dictionaries; the fields of `result.json`."""

    cost: str
    """Vectors compared."""
    fdr: float
    """False match rate asked for."""
    dictionaries: list[str]
    """Names of the dictionaries."""
    pairs: list[PairResult]
    """One entry for each two consecutive dictionaries."""
    tracks: TracksResult | None = None
    """Feature tracks, with three dictionaries or more."""
    first_to_last: dict[str, DistantMatch] | None = None
    """Match of the first dictionary with the last by `composition` (the matches of neighbors,
    followed one after another), `direct` (matched with each other) and `joint` (the tracks that run
    from the first to the last)."""
    cycle_agreement: float | None = None
    """Share of latents that come back to themselves by composition there and directly back."""


def in_words(result: MatchResult) -> str:
    """Describe each match in a line or two."""
    lines = []
    for pair in result.pairs:
        lines.append(
            f"{pair.a} -> {pair.b}: {pair.matched} of {min(pair.n_a, pair.n_b)} latents matched "
            f"(false match rate {result.fdr:.0%}), cost {pair.cost:.6g}, gap {pair.gap:.1e}"
        )
        lines += [f"  {near_optimal_in_words(each)}" for each in pair.near_optimal]
        if pair.matched and pair.co_firing is not None:
            together = pair.co_firing["matched"].p_b_given_a
            chance = pair.co_firing["random"].p_b_given_a
            lines.append(
                f"  matched pairs fire together in {together.value:.1%} "
                f"[{together.low:.1%}, {together.high:.1%}] of rows; "
                f"random pairs in {chance.value:.1%}"
            )
        if pair.spaces is not None:
            svcca, rsa = (
                f"{each.value:.2f} (paired at random {each.expected:.2f}, p {each.p_value:.3f})"
                for each in (pair.spaces.svcca, pair.spaces.rsa)
            )
            lines.append(f"  decoder rows of matched pairs: SVCCA {svcca}, RSA {rsa}")
        if (n := pair.n_combinations) is not None:
            lines.append(f"  two latents of {pair.a} describe {n} of {pair.b} better than one does")
        if pair.not_run:
            lines.append(f"  the effect on the network's output was not measured: {pair.not_run}")
    if result.tracks is not None:
        lines.append(f"{result.tracks.n} tracks through {result.tracks.layers} layers")
    return "\n".join([*lines, f"Result: {result.out}"])


@dataclasses.dataclass(frozen=True, eq=False)
class _Inputs:
    """Dictionaries as they are compared, with the rows of their store."""

    names: list[str]
    opened: list[OpenedDictionary]
    views: list[Any]
    """Dictionaries, or their codes on paired rows."""
    scales: list[Any]
    """Activation of each latent that counts as 1; None for thresholds."""
    live: list[Any]
    """Latents that are ever active and not constant; None where it is not known."""
    nulls: tuple[Null, ...] = NULLS
    rows: PairedRows | None = None
    held: HeldSamples | str = ""
    """Network and samples, or the reason why there are none."""


def run(config: MatchConfig, folder: RunFolder) -> MatchResult:
    """Match each dictionary with the next, and all of them jointly.

    Raises:
        DiskError: The folder cannot be written.
        InputError: The dictionaries do not compare.
        RecipeError: Fewer than two dictionaries, a choice is unknown or needs a store, or it is not
            clear which site a dictionary reads.
        StoreError: The store is damaged, is not paired, or misses a site.
        WeightsError: A dictionary cannot be read.
    """
    _check(config)
    inputs = _open(config)
    folder.expect(lambda: _estimate(inputs, config.cost))
    for name, opened in zip(inputs.names, inputs.opened, strict=True):
        folder.parent(name, opened.checksum)
    if config.store is not None:
        folder.parent("store", Store(config.store).digest)
    folder.facts(
        dictionaries=[str(path.resolve()) for path in config.dictionaries],
        settings={"cost": config.cost},
    )
    engine, n_pairs = config.elsewhere(), len(inputs.opened) - 1
    if engine is None or n_pairs == 1:  # whose blocks are priced on the engine
        pairs = [_pair(config, k, inputs, folder, engine) for k in range(n_pairs)]
    else:
        pairs = _pairs_on(engine, config, inputs.names, folder)
    matches, results = map(list, zip(*pairs, strict=True))
    folder.table(MATCHES, matches_table(matches))
    if config.combinations:
        assert inputs.rows is not None
        dictionaries = [each.dictionary for each in inputs.opened]
        found = find_combinations(dictionaries, inputs.rows, fdr=config.fdr, seed=config.seed)
        folder.table(COMBINATIONS, combinations_table(found))
        results = [
            dataclasses.replace(pair, n_combinations=int(each.significant.sum()))
            for pair, each in zip(results, found, strict=True)
        ]
    result = MatchResult(cost=config.cost, fdr=config.fdr, dictionaries=inputs.names, pairs=results)
    if len(matches) > 1 and len({m.unit_b.shape[1] for m in matches}) == 1:
        return _joint(config, result, matches, inputs, folder)
    return result


def _estimate(inputs: _Inputs, cost: str) -> Estimate:
    """Estimate all pairings, and what the first is worth in the network as often as there are."""
    if cost == "codes":
        shapes = [view.shape for view in inputs.views]
    else:
        parts = 2 if cost in ("all", "balanced") else 1
        sides = [each.dictionary for each in inputs.opened]
        shapes = [(side.n_latents, parts * side.d_in) for side in sides]
    found, first = of_matching(itertools.pairwise(shapes)), inputs.opened[:2]
    sites, dictionaries = zip(*((e.site, e.dictionary) for e in first), strict=True)
    effects = seconds_of_effects(inputs.held, sites, dictionaries)
    return dataclasses.replace(found, seconds=found.seconds + effects * (len(shapes) - 1))


def _check(config: MatchConfig) -> None:
    """Check that the choices go together."""
    expect_several(config.dictionaries, "match")
    choices = (("cost", config.cost, get_args(Cost)), ("scale", config.scale, SCALES))
    for name, value, allowed in choices:
        if value not in allowed:
            raise RecipeError(f"--{name} must be one of {', '.join(allowed)}, got {value!r}.")
    of_rows = config.cost == "codes" or config.scale == "mean" or config.combinations
    if config.store is None and of_rows:
        raise RecipeError(
            "--cost codes, --scale mean and --combinations need rows: give --store STORE too."
        )


def _open(config: MatchConfig) -> _Inputs:
    """Open dictionaries, rows and network."""
    opened = open_dictionaries(config.dictionaries, sites=config.sites)
    names = [each.name for each in opened]
    dictionaries = [each.dictionary for each in opened]
    plain = _Inputs(names, opened, dictionaries, [None] * len(opened), [None] * len(opened))
    if config.store is None:
        return plain
    store = Store(config.store)
    for each in opened:
        refuse_other_network(each, store)
    sites = expect_sites(opened, f"; {config.store} has {', '.join(store.sites)}")
    rows = open_rows(
        store, dictionaries, sites, config.dictionaries,
        n_known=config.rows * (CODES if config.cost == "codes" else 1), n_held_out=config.rows,
    )  # fmt: skip
    held = open_held_samples(store, config.samples, config)
    inputs = dataclasses.replace(plain, rows=rows, held=held)
    sided = list(zip(dictionaries, rows.known, strict=True))
    if config.cost == "codes":
        codes = [correlate(d, x, samples=rows.samples) for d, x in sided]
        null = functools.partial(permute_samples, block=sample_block(rows.samples))
        return dataclasses.replace(inputs, views=codes, nulls=(null,))
    parts = zip(dictionaries, rows.known, rows.held_out, strict=True)
    inputs = dataclasses.replace(inputs, live=[varying(d, *both) for d, *both in parts])
    if config.scale == "mean":
        return dataclasses.replace(inputs, scales=[mean_active(d, x) for d, x in sided])
    return inputs


@dataclasses.dataclass(frozen=True)
class _Kept:
    """Parts of one pair that are kept, in a worker; fits what `_pair` needs of a `RunFolder`."""

    arrays: dict[str, dict[str, np.ndarray]]

    def kept(self, name: str) -> dict[str, np.ndarray] | None:
        """Part that an earlier run kept."""
        return self.arrays.get(name)

    def keep(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a part."""
        self.arrays[name] = dict(arrays)


def _pairs_on(
    engine: Engine, config: MatchConfig, names: Sequence[str], folder: RunFolder
) -> list[tuple[Match, PairResult]]:
    """Match all pairs on an engine; what each of them kept is in the folder once it is done."""
    n_pairs = len(names) - 1
    parts = {k: {"state0": f"state{k}", "evidence0": f"evidence{k}"} for k in range(n_pairs)}
    pieces = [
        (k, _Kept({here: a for here, name in parts[k].items() if (a := folder.kept(name))}))
        for k in range(n_pairs)
    ]
    done: dict[int, tuple[Match, PairResult]] = {}
    with bar("matching pairs") as progress:
        for k, (matching, pair, kept) in engine.map(_pair_elsewhere, pieces, shared=config):
            for here, name in parts[k].items():
                folder.keep(name, kept.arrays[here])
            done[k] = matching, dataclasses.replace(pair, a=names[k], b=names[k + 1])
            progress(len(done), n_pairs)
    return [done[k] for k in range(n_pairs)]


def _pair_elsewhere(
    piece: tuple[int, _Kept], config: MatchConfig
) -> tuple[Match, PairResult, _Kept]:
    """Match one pair in a worker, which opens the two dictionaries and their rows alone."""
    k, kept = piece
    both = slice(k, k + 2)
    two = dataclasses.replace(
        config, dictionaries=config.dictionaries[both], sites=config.sites[both]
    )
    return *_pair(two, 0, _open(two), kept), kept


def _pair(
    config: MatchConfig,
    k: int,
    inputs: _Inputs,
    folder: RunFolder | _Kept,
    engine: Engine | None = None,
) -> tuple[Match, PairResult]:
    """Match two consecutive dictionaries and measure what the match is worth."""
    clock, wall = time.process_time(), time.perf_counter()
    matching = _resumable_match(config, k, inputs, folder, engine)
    first, second = inputs.opened[k : k + 2]
    pair = dataclasses.replace(
        pair_result(matching, *inputs.names[k : k + 2]),
        seconds=round(time.process_time() - clock, 3),
        wall_seconds=round(time.perf_counter() - wall, 3),
        peak_bytes=peak_bytes(),
    )
    if inputs.rows is None:
        return matching, pair
    a, b = first.dictionary, second.dictionary
    if config.cost == "codes" and matching.matched.sum() >= MIN_PAIRS:
        spaces = compare_spaces(a, b, matching.matched_columns(), seed=config.seed)
        pair = dataclasses.replace(pair, spaces=spaces)
    scales = inputs.scales[k], inputs.scales[k + 1]
    ways = pairings(a, b, scales, matching, seed=config.seed)
    quality = held_out_quality(a, b, ways, *inputs.rows.held_out[k : k + 2], seed=config.seed)
    sites = str(first.site), str(second.site)
    with bar("running the network") as progress:
        effects = effects_on_output(
            inputs.held, sites, a, b, ways, seed=config.seed, on_progress=progress
        )
    for each in (quality, effects):
        measured = {name: value for name, value in vars(each).items() if value is not None}
        pair = dataclasses.replace(pair, **measured)
    return matching, pair


def pair_result(matching: Match, a: str, b: str) -> PairResult:
    """Count the pairs of a match, without the cost of finding it.

    Args:
        matching: Match of two dictionaries.
        a: Name of the first.
        b: Name of the second.
    """
    splitting = feature_splitting(matching)
    return PairResult(
        a=a,
        b=b,
        n_a=len(matching.unit_a),
        n_b=len(matching.unit_b),
        cost=matching.cost,
        lower_bound=matching.lower_bound,
        gap=matching.gap,
        matched=int(matching.matched.sum()),
        n_null=matching.evidence.n_null,
        cosine_threshold=matching.cosine_threshold if matching.matched.any() else None,
        pricing_rounds=matching.assignment.rounds,
        passes=sum(matching.assignment.rows_priced) / len(matching.assignment.columns),
        degenerate_a=int(matching.degenerate_a.sum()),
        degenerate_b=int(matching.degenerate_b.sum()),
        near_optimal=matching.near_optimal(),
        split=len(splitting.split()),
        merged=len(splitting.merged()),
        seconds=0.0,
        wall_seconds=0.0,
        peak_bytes=0,
    )


def _resumable_match(
    config: MatchConfig,
    k: int,
    inputs: _Inputs,
    folder: RunFolder | _Kept,
    engine: Engine | None,
) -> Match:
    """Match two dictionaries, from where an interrupted run stopped."""
    state, kept = folder.kept(f"state{k}"), folder.kept(f"evidence{k}")
    evidence = None
    if kept is not None:
        evidence = PairEvidence(kept["q_values"], int(kept["n_null"].item()), kept["null"])
    last = time.monotonic()

    def keep_state(now: State) -> None:
        nonlocal last
        if len(now.free) and time.monotonic() - last < KEEP_EVERY:
            return
        last = time.monotonic()
        folder.keep(f"state{k}", now.arrays())

    with bar(f"pairing {k + 1} of {len(inputs.views) - 1}") as progress:
        matching = match(
            *inputs.views[k : k + 2],
            cost=config.cost,  # pyright: ignore[reportArgumentType]
            scale=(inputs.scales[k], inputs.scales[k + 1]),
            live=(inputs.live[k], inputs.live[k + 1]),
            fdr=config.fdr,
            nulls=inputs.nulls,
            seed=config.seed,
            device=config.device,
            resume=None if state is None else State.from_arrays(state),
            evidence=evidence,
            on_progress=progress,
            on_state=keep_state,
            engine=engine,
        )
    arrays = {name: np.asarray(value) for name, value in matching.evidence._asdict().items()}
    folder.keep(f"evidence{k}", arrays)
    return matching


def _joint(
    config: MatchConfig,
    result: MatchResult,
    matches: list[Match],
    inputs: _Inputs,
    folder: RunFolder,
) -> MatchResult:
    """Add tracks, survival curves and matches of the first dictionary with the last."""
    layers = [m.unit_a for m in matches] + [matches[-1].unit_b]
    options: dict[str, Any] = {"fdr": config.fdr, "nulls": inputs.nulls, "seed": config.seed}
    at: dict[str, Any] = {"device": config.device}
    with bar("solving all layers jointly") as progress:
        tracks = track(layers, matches, on_progress=progress, **options)
    curves = survival(tracks, matches, fdr=config.fdr)
    folder.table(TRACKS, tracks_table(tracks, curves))
    first, last, n = layers[0], layers[-1], len(layers[0])
    cost: Cost = "codes" if config.cost == "codes" else "cosine"
    back = match(last, first, cost=cost, **options, **at).matched_columns()
    composed = compose([m.matched_columns() for m in matches])
    cycle = float(cycle_agreement(composed, back, n=n))
    ends = inputs.opened[0].dictionary, inputs.opened[-1].dictionary
    x = inputs.rows.held_out if inputs.rows else []
    codes = paired_codes(*ends, x[0], x[-1]) if x else None

    def distant(columns: Int[np.ndarray, " latent"]) -> DistantMatch:
        firing = None if codes is None else co_firing(codes, columns, seed=config.seed)
        return DistantMatch(pairs=int((columns >= 0).sum()), co_firing=firing)

    return dataclasses.replace(
        result,
        tracks=tracks_result(tracks, curves),
        first_to_last={
            "composition": distant(composed),
            "direct": distant(match(first, last, cost=cost, **options, **at).matched_columns()),
            "joint": distant(tracks.between(0, len(matches), n=n, fdr=config.fdr)),
        },
        cycle_agreement=None if np.isnan(cycle) else cycle,
    )


def tracks_result(tracks: Tracks, curves: SurvivalCurves) -> TracksResult:
    """Count tracks, and copy their survival curves."""
    return TracksResult(
        n=len(tracks.latents),
        layers=tracks.latents.shape[1],
        longer_than_one=int((curves.death > curves.birth).sum()),
        **{name: getattr(curves, name).tolist() for name in CURVES},
    )
