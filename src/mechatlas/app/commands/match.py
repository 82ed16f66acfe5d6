"""`mechatlas match`: dictionaries in a row -> pairs, tracks and what they are worth on data.

The folder has `result.json`, `matches.parquet` (a row for each pair of latents), `tracks.parquet`
(three dictionaries or more), `manifest.json`, and, while a run is unfinished, `unfinished/` with
the state of a pairing, from which the same command continues.
"""

import dataclasses
import functools
import io
import itertools
import json
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
import tyro
from torch import nn
from tyro.conf import Positional, arg

from mechatlas.activations.networks import digest
from mechatlas.activations.store import Store, StoreRows
from mechatlas.analysis.matching.chains import (
    LifeLines,
    Tracks,
    compose,
    cycle_agreement,
    live,
    track,
)
from mechatlas.analysis.matching.codes import correlate, reordered, together
from mechatlas.analysis.matching.evidence import (
    Firing,
    baselines,
    co_firing,
    explained,
    firing,
    transport,
)
from mechatlas.analysis.matching.folding import Parts, fold, mean_active
from mechatlas.analysis.matching.nulls import NULLS, Evidence, Null
from mechatlas.analysis.matching.pairing import Match, match, relatives
from mechatlas.analysis.matching.splicing import permuted, references, splice
from mechatlas.app.progress import bar
from mechatlas.app.recipes import reopen
from mechatlas.app.run_folder import cost, peak_bytes, refuse_strangers, write_table
from mechatlas.base import RecipeError, Site, StoreError, UserError
from mechatlas.dictionaries.formats import load
from mechatlas.files import checksum, read_json, write, write_json
from mechatlas.maths.assignment import State

ROWS = 4096
CODES = 16
"""Times as many rows are read to correlate codes: rare latents need them."""
KEEP_EVERY = 15.0
"""Seconds of work that an interrupt may cost, once the first look at all pairs is done."""
KIND = "matching"
Kept = TypeVar("Kept")
AT_ONCE = 32
"""Samples in one forward pass."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatchConfig:
    """Match the latents of dictionaries in a row, each with the next.

    Examples:  mechatlas match runs/layer3 runs/layer4 --out runs/match
               mechatlas match runs/l*/ --out runs/lives --store runs/store
    """

    dictionaries: Annotated[Positional[tuple[Path, ...]], arg(metavar="DICT_A DICT_B ...")]
    """Folders or files of dictionaries, in any supported format, in the order of the network."""
    out: Path
    """Folder for the result."""
    cost: str = "decoder"
    """decoder, encoder, all, balanced, cosine; or codes, the correlation of codes on paired rows
    of a store, which also compares dictionaries of different widths."""
    rate: float = 0.05
    """False match rate at which a pair counts as matched."""
    store: Path | None = None
    """Store collected with `paired = true` that has the sites of all dictionaries: adds what the
    matches are worth on held-out rows."""
    units: str = "threshold"
    """What folding takes for 1: the threshold of a latent (where it has one), or its mean when
    active on rows of the store (data)."""
    rows: int = ROWS
    """Rows of the store to measure on, and as many others to fold with (16 times as many to
    correlate codes on)."""
    samples: int = 64
    """Held-out samples of the store on which the network runs with the second site written from
    the first; 0 for none."""
    seed: int = 0
    """Seed of the nulls and intervals."""


def run(words: list[str]) -> tuple[dict[str, Any], str]:
    """Match, from the words of the command line."""
    recipe = tyro.cli(MatchConfig, args=words, prog="mechatlas match")
    result = match_dictionaries(recipe)
    return result, in_words(result)


def in_words(result: dict[str, Any]) -> str:
    """What was found."""
    lines = []
    for pair in result["pairs"]:
        lines.append(
            f"{pair['a']} -> {pair['b']}: {pair['matched']} of {min(pair['n_a'], pair['n_b'])} "
            f"latents matched (false match rate {result['rate']:.0%}), cost {pair['cost']:.6g}, "
            f"gap {pair['gap']:.1e}"
        )
        if "co_firing" in pair:
            together = pair["co_firing"]["matched"]["given_a"]
            chance = pair["co_firing"]["random"]["given_a"]
            lines.append(
                f"  matched pairs fire together in {together['value']:.1%} "
                f"[{together['low']:.1%}, {together['high']:.1%}] of rows; "
                f"random pairs in {chance['value']:.1%}"
            )
        if "not_run" in pair:
            lines.append(f"  the network was not run with what was matched: {pair['not_run']}")
    if "tracks" in result:
        lines.append(f"{result['tracks']['n']} tracks through {result['tracks']['layers']} layers")
    return "\n".join([*lines, f"Result: {result['out']}"])


def match_dictionaries(recipe: MatchConfig) -> dict[str, Any]:
    """Match each dictionary with the next, and all of them jointly.

    Raises:
        DiskError: `out` holds something else, or cannot be written.
        InputError: The dictionaries do not compare, or a choice is unknown.
        RecipeError: Fewer than two dictionaries, or choices that need a store without one.
        StoreError: The store is damaged, is not paired, or misses a site.
    """
    clock = time.process_time()
    _check(recipe)
    names = _names(recipe.dictionaries)
    dictionaries = [load(path) for path in recipe.dictionaries]
    known, samples, unseen = _rows(recipe, dictionaries)
    running, not_run = _network(recipe)
    views, units = _views(recipe, dictionaries, known, samples)
    nulls = NULLS
    if recipe.cost == "codes":
        nulls = (functools.partial(reordered, together=together(samples)),)
    matches, pairs = [], []
    for k, (name_a, name_b) in enumerate(itertools.pairwise(names)):
        started, wall = time.process_time(), time.perf_counter()
        found = _pair(recipe, k, views, units, nulls)
        pair = {"a": name_a, "b": name_b, **_facts(found)}
        pair["seconds"] = round(time.process_time() - started, 3)
        pair["wall_seconds"] = round(time.perf_counter() - wall, 3)
        pair["peak_bytes"] = peak_bytes()
        if unseen:
            two = dictionaries[k : k + 2]
            ways = _ways(two, units[k : k + 2], found, recipe.seed)
            pair |= _worth(two, ways, unseen[k : k + 2], recipe.seed)
            if running is not None:
                pair |= _spliced(recipe, running, k, two, ways)
            elif not_run:
                pair["not_run"] = not_run
        matches.append(found)
        pairs.append(pair)
    result: dict[str, Any] = {
        "cost": recipe.cost,
        "rate": recipe.rate,
        "dictionaries": names,
        "pairs": pairs,
    }
    if len(matches) > 1:
        result |= _joint(recipe, matches, nulls, unseen, dictionaries)
    _write_matches(recipe.out / "matches.parquet", matches)
    manifest = {
        "schema": 1,
        "kind": KIND,
        "dictionaries": [str(p.resolve()) for p in recipe.dictionaries],
        "parents": {
            name: _checksum_of(p) for name, p in zip(names, recipe.dictionaries, strict=True)
        },
        "settings": {k: v for k, v in _plain(recipe).items() if k not in ("dictionaries", "out")},
        "files": {f.name: checksum(f.read_bytes()) for f in sorted(recipe.out.glob("*.parquet"))},
    }
    write_json(recipe.out / "manifest.json", manifest)
    result |= cost(clock)
    write_json(recipe.out / "result.json", result)
    shutil.rmtree(recipe.out / "unfinished", ignore_errors=True)
    return {"out": str(recipe.out), **result}


def _check(recipe: MatchConfig) -> None:
    """Everything that can be known before any work.

    Raises:
        DiskError: `out` is a file, or holds something else.
        RecipeError: The choices do not go together.
    """
    if len(recipe.dictionaries) < 2:
        raise RecipeError(
            f"`mechatlas match` needs two dictionaries or more, got {len(recipe.dictionaries)}: "
            "mechatlas match DICT_A DICT_B [DICT_C ...] --out DIR."
        )
    costs = ("decoder", "encoder", "all", "balanced", "cosine", "codes")
    for name, value, choices in (
        ("cost", recipe.cost, costs),
        ("units", recipe.units, ("threshold", "data")),
    ):
        if value not in choices:
            raise RecipeError(f"--{name} must be one of {', '.join(choices)}, got {value!r}.")
    if recipe.store is None and (recipe.cost == "codes" or recipe.units == "data"):
        raise RecipeError("--cost codes and --units data need rows: give --store STORE too.")
    if not 0 < recipe.rate < 1 or recipe.rows < 2 or recipe.samples < 0:
        raise RecipeError(
            f"--rate must lie between 0 and 1 (got {recipe.rate}), --rows be at least 2 (got "
            f"{recipe.rows}) and --samples at least 0 (got {recipe.samples})."
        )
    refuse_strangers(recipe.out, KIND, unfinished="unfinished")


def _names(paths: tuple[Path, ...]) -> list[str]:
    short = [p.name if p.is_dir() else p.stem for p in paths]
    return short if len(set(short)) == len(short) else [str(p) for p in paths]


def _plain(recipe: MatchConfig) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(recipe).items()}


def _checksum_of(path: Path) -> str:
    """Of a file, or of all in a folder, whatever the format."""
    files = sorted(f for f in path.iterdir() if f.is_file()) if path.is_dir() else [path]
    return checksum("".join(checksum(f.read_bytes()) for f in files).encode())


def _rows(
    recipe: MatchConfig, dictionaries: list[Any]
) -> tuple[list[torch.Tensor], np.ndarray, list[torch.Tensor]]:
    """Rows of each dictionary's site to fold with, their samples, and rows to measure on.

    Raises:
        RecipeError: A dictionary does not say which site it reads.
        StoreError: The store is not paired, or misses a site.
    """
    if recipe.store is None:
        return [], np.empty(0, np.int64), []
    store = Store(recipe.store)
    if not store.manifest.get("settings", {}).get("paired", False):
        raise StoreError(
            f"The rows of different sites of {recipe.store} do not belong together. Collect a "
            "store with `paired = true` in [collecting]."
        )
    known, unseen, samples = [], [], np.empty(0, np.int64)
    for path, dictionary in zip(recipe.dictionaries, dictionaries, strict=True):
        site = site_of(path)
        rows = store.rows(site)
        if rows.d_in != dictionary.d_in:
            raise StoreError(
                f"{recipe.store} has {rows.d_in} numbers a row at {site}, {path} reads "
                f"{dictionary.d_in}."
            )
        unseen.append(rows.held_out(recipe.rows).x)
        times = CODES if recipe.cost == "codes" else 1
        first, samples = first_rows(rows, times * recipe.rows)
        known.append(first)
    if min(len(x) for x in unseen) < 2:
        raise StoreError(f"{recipe.store} has no held-out rows to measure on.")
    return known, samples, unseen


def site_of(path: Path) -> str:
    """The site that a dictionary reads.

    Raises:
        RecipeError: It does not say so.
    """
    manifest = path / "manifest.json"
    site = read_json(manifest).get("site") if manifest.is_file() else None
    if site is None:
        raise RecipeError(
            f"{path} does not say which site it reads (no manifest.json with a site), so rows of "
            "a store cannot be chosen for it. Leave --store out."
        )
    return site


def first_rows(rows: StoreRows, n: int) -> tuple[torch.Tensor, np.ndarray]:
    """The first rows of the training split, the same for all sites, sample by sample; samples."""
    parts, places, missing = [], [], n
    for batch, where in rows.scan():
        if missing <= 0 or int(batch.row[0]) >= rows.n_rows:
            break
        parts.append(batch.x[:missing])
        places.append(where[:missing])
        missing -= len(parts[-1])
    place = torch.cat(places).numpy()
    order = np.lexsort(place.T[::-1])
    return torch.cat(parts)[torch.from_numpy(order)], place[order, 0]


def _views(
    recipe: MatchConfig, dictionaries: list[Any], known: list[torch.Tensor], samples: np.ndarray
) -> tuple[list[Any], list[Any]]:
    """What is matched of each dictionary, and the unit of its latents."""
    none = [None] * len(dictionaries)
    if recipe.cost == "codes":
        of = zip(dictionaries, known, strict=True)
        return [correlate(one, x, samples=samples) for one, x in of], none
    if recipe.units == "data":
        return dictionaries, [mean_active(d, x) for d, x in zip(dictionaries, known, strict=True)]
    return dictionaries, none


def _pair(
    recipe: MatchConfig, k: int, views: list[Any], units: list[Any], nulls: tuple[Null, ...]
) -> Match:
    folder = recipe.out / "unfinished" / str(k)
    asked = {
        **_plain(recipe),
        "out": "",
        "dictionaries": [_checksum_of(p) for p in recipe.dictionaries[k : k + 2]],
    }
    with bar(f"pairing {k + 1} of {len(views) - 1}") as progress:
        found = match(
            views[k],
            views[k + 1],
            parts=recipe.cost,  # pyright: ignore
            units=(units[k], units[k + 1]),
            rate=recipe.rate,
            nulls=nulls,
            seed=recipe.seed,
            resume=_kept(folder, "state", asked, State.from_arrays),
            evidence=_kept(folder, "evidence", asked, _evidence),
            on_progress=progress,
            on_state=_keeper(folder, asked),
        )
    _keep(
        folder, "evidence", asked, {k: np.asarray(v) for k, v in found.evidence._asdict().items()}
    )
    return found


def _evidence(arrays: dict[str, np.ndarray]) -> Evidence:
    without = int(arrays["without_partner"])
    return Evidence(arrays["q_values"], without, arrays["null"])


def _keeper(folder: Path, asked: dict[str, Any]) -> Callable[[State], None]:
    last = time.monotonic()

    def keep(state: State) -> None:
        nonlocal last
        if len(state.free) and time.monotonic() - last < KEEP_EVERY:
            return
        last = time.monotonic()
        _keep(folder, "state", asked, state.arrays())

    return keep


def _keep(folder: Path, name: str, asked: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    packed = io.BytesIO()
    np.savez(packed, allow_pickle=False, asked=json.dumps(asked), **arrays)  # pyright: ignore
    write(folder / f"{name}.npz", packed.getvalue())


def _kept(folder: Path, name: str, asked: dict[str, Any], read: Callable[..., Kept]) -> Kept | None:
    """What a run that was stopped has kept of the same dictionaries."""
    try:
        with np.load(folder / f"{name}.npz", allow_pickle=False) as arrays:
            if str(arrays["asked"]) == json.dumps(asked):
                return read({name: arrays[name] for name in arrays.files if name != "asked"})
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        pass  # stopped while it was written: begin anew
    return None


def _facts(found: Match) -> dict[str, Any]:
    near = relatives(found)
    return {
        "n_a": len(found.unit_a),
        "n_b": len(found.unit_b),
        "cost": found.cost,
        "lower_bound": found.lower_bound,
        "gap": found.gap,
        "matched": int(found.matched.sum()),
        "without_partner": found.evidence.without_partner,
        "least_cosine": found.threshold if found.matched.any() else None,
        "pricing_rounds": found.assignment.rounds,
        "looks": sum(found.assignment.rows_priced) / len(found.assignment.columns),
        "split": len(near.split()),
        "merged": len(near.merged()),
    }


@dataclasses.dataclass(frozen=True, eq=False)
class _Way:
    """A way to pair."""

    columns: np.ndarray
    ratio: np.ndarray
    """What a unit of each latent of A is worth in units of its partner, as folding says."""


def _ways(two: list[Any], units: list[Any], found: Match, seed: int) -> dict[str, _Way]:
    """The match, and every baseline."""
    a, b = two
    columns = {"matched": np.where(found.matched, found.columns, -1)}
    columns |= baselines(a, b, found, seed=seed)
    scale = fold(a, unit=units[0]).unit, fold(b, unit=units[1]).unit
    return {
        way: _Way(of_a, scale[1][np.maximum(of_a, 0)] / scale[0]) for way, of_a in columns.items()
    }


def _worth(
    two: list[Any], ways: dict[str, _Way], rows: list[torch.Tensor], seed: int
) -> dict[str, Any]:
    """Co-firing and transport on held-out rows, beside every baseline."""
    a, b = two
    fired = firing(a, b, rows[0], rows[1])
    plain = {w: _numbers(co_firing(fired, way.columns, seed=seed)) for w, way in ways.items()}
    moved: dict[str, Any] = {}
    for name, way in ways.items():
        for key, ratio in (("permuted", None), ("permuted and rescaled", way.ratio)):
            estimate = transport(fired, b, rows[1], way.columns, ratio, seed=seed)
            moved.setdefault(name, {})[key] = _number(estimate)
    if rows[0].shape == rows[1].shape:
        moved["layer drop"] = {"permuted": _number(explained(rows[1], rows[0], seed=seed))}
    with torch.no_grad():
        own = b.decode(b.encode(rows[1]))
    moved["B itself"] = {"permuted": _number(explained(rows[1], own, seed=seed))}
    return {"held_out_rows": len(rows[0]), "co_firing": plain, "explained_variance": moved}


def _network(recipe: MatchConfig) -> tuple[tuple[nn.Module, list[torch.Tensor]] | None, str]:
    """The network of the store and batches of held-out samples, or why it cannot be run."""
    if recipe.store is None or not recipe.samples:
        return None, ""
    store = Store(recipe.store)
    numbers = store.samples("held", recipe.samples)
    try:
        network, samples = reopen(store.manifest["recipe"])
        batches = [
            samples.stack([samples.read(i) for i in numbers[start : start + AT_ONCE]])
            for start in range(0, len(numbers), AT_ONCE)
        ]
    except UserError as error:
        return None, str(error)
    if digest(network) != store.manifest["network"]:
        return None, f"The network found now has other weights than when {store.root} was made."
    return (network, batches), ""


def _spliced(
    recipe: MatchConfig,
    running: tuple[nn.Module, list[torch.Tensor]],
    k: int,
    two: list[Any],
    ways: dict[str, _Way],
) -> dict[str, Any]:
    """The network's output when the second site is written from the first, by every way."""
    a, b = two
    sites = [Site.parse(site_of(path)) for path in recipe.dictionaries[k : k + 2]]
    guesses = {name: permuted(a, b, way.columns, way.ratio) for name, way in ways.items()}
    guesses |= references(a, b)
    network, batches = running
    try:
        found = splice(network, batches, (sites[0], sites[1]), guesses, seed=recipe.seed)
    except UserError as error:  # such as sites in the wrong order
        return {"not_run": str(error)}
    told = {way: _numbers({k: v for k, v in vars(r).items() if v}) for way, r in found.items()}
    return {"samples": sum(map(len, batches)), "spliced": told}


def _number(estimate: Any) -> dict[str, Any]:
    return dataclasses.asdict(estimate)


def _numbers(estimates: dict[str, Any]) -> dict[str, Any]:
    return {key: _number(value) for key, value in estimates.items()}


def _joint(
    recipe: MatchConfig,
    matches: list[Match],
    nulls: tuple[Null, ...],
    unseen: list[torch.Tensor],
    dictionaries: list[Any],
) -> dict[str, Any]:
    """Tracks, life lines, and long-range matches by composition, directly and jointly."""
    layers = [found.unit_a for found in matches] + [matches[-1].unit_b]
    if len({x.shape[1] for x in layers}) > 1:
        return {}
    with bar("solving all layers jointly") as progress:
        tracks = track(
            layers,
            matches,
            rate=recipe.rate,
            nulls=nulls,
            seed=recipe.seed,
            on_progress=progress,
        )
    lines = live(tracks, matches, rate=recipe.rate)
    _write_tracks(recipe.out / "tracks.parquet", tracks, lines)
    return {
        "tracks": {
            "n": len(tracks.latents),
            "layers": len(layers),
            "longer_than_one": int((lines.death > lines.birth).sum()),
            "persistence": lines.persistence.tolist(),
            "low": lines.low.tolist(),
            "high": lines.high.tolist(),
            "born": lines.born.tolist(),
            "dying": lines.dying.tolist(),
        },
        **_first_to_last(recipe, matches, nulls, tracks, unseen, dictionaries),
    }


def _first_to_last(
    recipe: MatchConfig,
    matches: list[Match],
    nulls: tuple[Null, ...],
    tracks: Tracks,
    unseen: list[torch.Tensor],
    dictionaries: list[Any],
) -> dict[str, Any]:
    """Three ways from the first dictionary to the last."""
    first, last = matches[0].unit_a, matches[-1].unit_b
    parts: Parts = "codes" if recipe.cost == "codes" else "cosine"
    direct, back = (
        match(a, b, parts=parts, rate=recipe.rate, nulls=nulls, seed=recipe.seed)
        for a, b in ((first, last), (last, first))
    )
    composed = compose([np.where(m.matched, m.columns, -1) for m in matches])
    ways = {
        "composition": composed,
        "direct": np.where(direct.matched, direct.columns, -1),
        "joint": tracks.between(0, len(matches), n=len(first), rate=recipe.rate),
    }
    returned = np.where(back.matched, back.columns, -1)
    cycle = float(cycle_agreement(composed, returned, n=len(first)))
    far: dict[str, Any] = {way: {"pairs": int((c >= 0).sum())} for way, c in ways.items()}
    if unseen:
        fired: Firing = firing(dictionaries[0], dictionaries[-1], unseen[0], unseen[-1])
        for way, columns in ways.items():
            far[way] |= _numbers(co_firing(fired, columns, seed=recipe.seed))
    return {"first_to_last": far, "cycle_agreement": None if np.isnan(cycle) else cycle}


def _write_matches(path: Path, matches: list[Match]) -> None:
    columns: dict[str, list[np.ndarray]] = {}
    for number, found in enumerate(matches):
        rows = np.flatnonzero(found.columns >= 0)
        for name, values in {
            "pair": np.full(len(rows), number, np.int32),
            "latent_a": rows,
            "latent_b": found.columns[rows],
            "cost": found.pair_costs[rows],
            "cosine": found.cosines[rows],
            "q_value": found.q_values[rows],
            "matched": found.matched[rows],
        }.items():
            columns.setdefault(name, []).append(values)
    write_table(path, {name: np.concatenate(parts) for name, parts in columns.items()})


def _write_tracks(path: Path, tracks: Tracks, lines: LifeLines) -> None:
    there = tracks.latents >= 0
    which, layer = np.nonzero(there)
    write_table(
        path,
        {
            "track": which,
            "layer": layer.astype(np.int32),
            "latent": tracks.latents[there],
            "cosine": tracks.cosines[there],
            "q_value": tracks.q_values[there],
            "break": tracks.breaks[there],
            "birth": lines.birth[which],
            "earliest_birth": lines.earliest_birth[which],
            "death": lines.death[which],
            "latest_death": lines.latest_death[which],
        },
    )
