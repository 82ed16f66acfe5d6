"""Chapter on features: strongest examples, statistics and atom of every latent."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import nn

from mechatlas.activations.images import ImageSamples
from mechatlas.activations.networks import has_weights
from mechatlas.activations.receptive import ReceptiveField, receptive_field
from mechatlas.activations.samples import Samples, TextSamples
from mechatlas.activations.store import POOL_BYTES, PairedRows, Store, StoreRows
from mechatlas.analysis.branches.specialization import plain_shares
from mechatlas.analysis.examples.maps import Examples, ExamplesWanted, examples_together
from mechatlas.analysis.examples.statistics import (
    BINS,
    PER_OCTAVE,
    FeatureStatistics,
    feature_statistics,
)
from mechatlas.app.report.atoms import Neighbors, flat_map, neighbors
from mechatlas.app.report.chapter import Chapter, number, percent, render
from mechatlas.app.report.dossiers import FeatureAt, Finding
from mechatlas.app.report.galleries import Gallery, gallery
from mechatlas.app.report.paintings import most_in_each, paint
from mechatlas.app.report.runs import Run, Runs
from mechatlas.base import Progress, Site, StoreError, UserError
from mechatlas.dictionaries.ends import ends_of
from mechatlas.dictionaries.formats import FILE
from mechatlas.dictionaries.pretrained import reading_of

TOP = 12
"""Number of strongest examples of each feature."""
QUANTILES = 10
"""Number of examples of each feature at quantiles of its activation."""
CONTEXT = (96, 64)
"""Tokens of a text shown before and after a position; windows that are shorter are shown whole."""
MAX_ROWS = 100_000
"""Upper limit on the rows read from a store; they are stored in random order of samples."""
DRIFT = 0.05
"""Difference between store and network above which a note is shown; rounding does not explain
it."""


@dataclasses.dataclass(frozen=True, eq=False)
class _FeatureData:
    """A dictionary with all data that its cards show."""

    run: Run
    key: str
    atoms: np.ndarray
    rows: StoreRows | PairedRows
    store: Path
    samples: Samples
    statistics: FeatureStatistics
    shown: Examples
    words: Callable[[np.ndarray], list[str]] | None
    """Decoder of tokens, if samples are texts."""
    painted: dict[str, bytes]
    """Visualizations of some features, by latent, or latent and branch."""
    problems: list[str]


def chapter(runs: Runs, on_progress: Progress) -> Chapter | None:
    """Make cards, search and a map of the features of each dictionary."""
    dictionaries = runs.of_kind("dictionary")
    if not dictionaries:
        return None
    opened, failed = _open_all(dictionaries, runs, on_progress)
    galleries = _galleries(opened)
    data: dict[str, Any] = {"galleries": {}, "dictionaries": [], "labels": runs.labels}
    arrays: dict[str, np.ndarray] = {}
    images: dict[str, bytes] = {}
    for store, (name, pictures) in galleries.items():
        data["galleries"][name] = _describe_gallery(pictures)
        images |= {f"{name}/{i}": sheet for i, sheet in enumerate(pictures.sheets)}
        of_store = next(each for each in opened if each.store == store)
        if of_store.words and len(pictures.samples):
            arrays[f"{name}/tokens"], words = _tokens(of_store, pictures.samples)
            data["galleries"][name]["words"] = words
    for k, each in enumerate(opened):
        name, pictures = galleries[each.store]
        described, own = _describe(each, name, pictures)
        data["dictionaries"].append(described)
        arrays |= {f"{k}/{key}": array for key, array in own.items()}
        images |= {f"painted{k}/{key}": file for key, file in each.painted.items()}
        on_progress(90 * len(dictionaries) + 10 * (k + 1), 100 * len(dictionaries))
    return Chapter(
        name="features",
        title="Features",
        html=render("features.html", opened=opened, failed=failed),
        empty=not opened,
        data=data,
        arrays=arrays,
        images=images,
        scripts=(
            "cards.js",
            "query.js",
            "labels.js",
            "dossier.js",
            "map.js",
            "features.js",
        ),
        findings=[_finding(each) for each in opened if each.run.result.get("fvu") is not None],
    )


def _open_all(
    dictionaries: list[Run], runs: Runs, on_progress: Progress
) -> tuple[list[_FeatureData], list[tuple[str, str]]]:
    """Open the dictionaries, those of a store together; and name those that cannot be shown."""
    opened: list[_FeatureData] = []
    failed: list[tuple[str, str]] = []
    total = 100 * len(dictionaries)
    measured: dict[Path, list[_Measured]] = {}
    for k, run in enumerate(dictionaries):
        try:
            each = _measure(run, runs, _part(on_progress, k * 40, 40, total))
            measured.setdefault(each.store, []).append(each)
        except UserError as error:  # one broken run must not cost the page of the others
            failed.append((run.name, str(error)))
            runs.problems[run.name] = str(error)
    done = 40 * len(dictionaries)
    groups = list(measured.values())
    while groups:
        group, *groups = groups
        try:
            opened += _open(group, runs, _part(on_progress, done, 50 * len(group), total))
        except UserError as error:
            if len(group) > 1:  # one of them must not cost the others
                groups = [[each] for each in group] + groups
                continue
            failed.append((group[0].run.name, str(error)))
            runs.problems[group[0].run.name] = str(error)
        done += 50 * len(group)
    opened = _keyed(sorted(opened, key=lambda each: dictionaries.index(each.run)))
    return opened, failed


def _finding(each: _FeatureData) -> Finding:
    """Sum up a dictionary, with features drawn at random."""
    result, n = each.run.result, len(each.atoms)
    active = np.flatnonzero(each.statistics.density > 0)
    drawn = np.random.default_rng(0).permutation(active)[:12].tolist()
    return Finding(
        text=f"{n:,} features of {each.run.manifest['site']} explain "
        f"{percent(1 - result['fvu'])} of its variance, with {number(result.get('l0'))} active "
        "at a time.",
        evidence=f"Rows that were not trained on; {len(active):,} features are ever active in the "
        f"{each.statistics.n_rows:,} rows read. Pictures: features drawn at random.",
        anchor=each.key,
        rows=tuple(
            tuple(FeatureAt(each.run.name, i) for i in drawn[k : k + 6])
            for k in range(0, len(drawn), 6)
        ),
    )


def _part(on_progress: Progress, start: int, share: int, total: int) -> Progress:
    return lambda done, of: on_progress(start + share * done // max(of, 1), total)


def _keyed(opened: list[_FeatureData]) -> list[_FeatureData]:
    """Name dictionaries in links: by the site, with the run's name where a site has several."""
    named: list[_FeatureData] = []
    for each in opened:
        site = str(each.run.manifest["site"])
        taken = any(other.key == site for other in named)
        named.append(dataclasses.replace(each, key=f"{site}@{each.run.name}" if taken else site))
    return named


@dataclasses.dataclass(frozen=True, eq=False)
class _Measured:
    """Dictionary with the statistics of its latents."""

    run: Run
    sites: tuple[Site, ...]
    """Sites that it reads."""
    dictionary: Any
    store: Path
    rows: StoreRows | PairedRows
    statistics: FeatureStatistics


def _measure(run: Run, runs: Runs, on_progress: Progress) -> _Measured:
    """Read a dictionary and its rows, and measure its latents."""
    written = run.manifest.get("site")
    if not isinstance(written, str):
        raise UserError(f"The manifest of {run.name} names no single site that it was trained on.")
    dictionary = run.dictionary()
    if getattr(dictionary, "group", None) is not None:
        raise UserError(
            "It is pose-tied: its codes need every input in all poses, and cards show inputs as "
            "they are. `mechatlas symmetry` tells what its features are."
        )
    folder = runs.store_of(run)
    store = runs.open_store(folder)
    sites = _sites_read(run, dictionary, store)
    rows = store.paired(sites) if len(sites) > 1 else store.rows(sites[0])
    if isinstance(rows, StoreRows) and store.manifest.get(
        "group"
    ):  # the untransformed block: what the network gives for a sample
        rows = StoreRows(store, rows.site, slice(0, dictionary.d_in), POOL_BYTES)
    statistics = feature_statistics(
        dictionary,
        rows,
        top=TOP,
        quantiles=QUANTILES,
        max_rows=MAX_ROWS,
        on_progress=on_progress,
    )
    parsed = tuple(map(Site.parse, sites))
    return _Measured(run, parsed, dictionary, folder, rows, statistics)


def _sites_read(run: Run, dictionary: Any, store: Store) -> list[str]:
    """Sites of a store that a dictionary reads: one of several names them.

    Raises:
        StoreError: The store does not have one of them.
    """
    own = str(run.manifest["site"])
    reads = run.manifest.get("reads") or list(ends_of(dictionary).reads)
    if len(reads) < 2 or store.manifest.get("group"):
        return [own]
    missing = [site for site in reads if site not in store.shapes]
    if missing:
        raise StoreError(
            f"The dictionary reads {reading_of(dictionary)}; {store.root} has "
            f"{', '.join(store.sites)}. Collect all of them, or name those of the store in their "
            'order: dictionaries={"name": (["SITE", "SITE"], dictionary)}.'
        )
    return reads


def _open(group: list[_Measured], runs: Runs, on_progress: Progress) -> list[_FeatureData]:
    """Run the network of a store on the samples that its dictionaries show."""
    folder = group[0].store
    network, samples = runs.reopen(folder)
    fields: dict[Site, ReceptiveField] = {}
    if isinstance(samples, ImageSamples):
        for site in dict.fromkeys(each.sites[0] for each in group):
            fields[site] = receptive_field(network, site, samples.side, samples.channels)
    wanted = [
        ExamplesWanted(each.sites, each.dictionary, each.statistics, fields.get(each.sites[0]))
        for each in group
    ]
    found = examples_together(
        network,
        samples,
        wanted,
        context=CONTEXT,
        on_progress=_part(on_progress, 0, 80, 100),
    )
    problems = []
    if not has_weights(network, runs.open_store(folder).manifest["network"]):
        problems.append("The network found now has other weights than the store's.")
    words = _decoder(network) if isinstance(samples, TextSamples) else None
    return [
        _FeatureData(
            run=each.run,
            key="",
            atoms=_atoms(each),
            rows=each.rows,
            store=folder,
            samples=samples,
            statistics=each.statistics,
            shown=shown,
            words=words,
            painted=_painted(each, wants.field, runs, _part(on_progress, 80, 20, 100)),
            problems=problems + _drifted(shown),
        )
        for each, wants, shown in zip(group, wanted, found, strict=True)
    ]


def _atoms(each: _Measured) -> np.ndarray:
    """Atoms of a dictionary: over all sites, or of the untransformed block of a group."""
    atoms, rows = each.dictionary.W_dec.detach(), each.rows
    if isinstance(rows, StoreRows) and rows.store.manifest.get("group"):
        atoms = atoms[:, : rows.d_in]
    return atoms.float().cpu().numpy()


def _drifted(shown: Examples) -> list[str]:
    if shown.drift <= DRIFT:
        return []
    return [
        f"One in ten activations differs from that in the store by more than {shown.drift:.0%} of "
        "the feature's maximum: network, samples and store do not belong together."
    ]


def _painted(
    each: _Measured, field: ReceptiveField | None, runs: Runs, on_progress: Progress
) -> dict[str, bytes]:
    """Visualize some features, where that is wanted and samples are images."""
    dictionary, rows = each.dictionary, each.rows
    network, samples = runs.reopen(each.store)
    if not runs.visualize or field is None or dictionary.W_enc.shape[0] != rows.d_in:
        return {}
    if isinstance(rows, PairedRows):  # a picture excites the encoder of one site
        return {}
    assert isinstance(samples, ImageSamples)
    branches = _branches(rows)
    shares, _ = plain_shares(dictionary.W_dec.detach().float().cpu().numpy(), branches)
    latents = most_in_each(shares, each.statistics.density, runs.visualize)
    home = shares[latents].argmax(axis=1) if branches else np.full(len(latents), -1)
    return paint(
        network, samples, each.sites[0], dictionary.W_enc, latents, branches, home,
        on_progress=on_progress,
    )  # fmt: skip


def _decoder(network: nn.Module) -> Callable[[np.ndarray], list[str]]:
    """Decoder of the tokens of a language model."""
    decode: Any = network.get_submodule("input").decode
    return lambda tokens: [str(word) for word in decode(tokens)]


def _tokens(each: _FeatureData, shown: Int[np.ndarray, " n"]) -> tuple[np.ndarray, list[str]]:
    """Look up the tokens of the samples shown, as indices into a list of words."""
    assert each.words is not None
    windows = [np.asarray(each.samples.read(int(i))) for i in shown]
    ids = np.full((len(shown), max(map(len, windows))), windows[0][0])
    for window, row in zip(windows, ids, strict=True):
        row[: len(window)] = window
    known, index = np.unique(ids, return_inverse=True)
    return index.reshape(ids.shape).astype(np.uint32), each.words(known)


def _galleries(opened: list[_FeatureData]) -> dict[Path, tuple[str, Gallery]]:
    """Make one gallery for each store, with the samples that its dictionaries show."""
    galleries: dict[Path, tuple[str, Gallery]] = {}
    for each in opened:
        if each.store not in galleries:
            shown = [o.shown.sample for o in opened if o.store == each.store]
            needed = np.unique(np.concatenate([s[s >= 0] for s in shown]))
            galleries[each.store] = f"g{len(galleries)}", gallery(each.samples, needed)
    return galleries


def _describe_gallery(pictures: Gallery) -> dict[str, Any]:
    return {
        "names": pictures.names,
        "side": pictures.side,
        "tile": pictures.tile,
        "columns": pictures.columns,
        "sheets": len(pictures.sheets),
    }


def _describe(
    features: _FeatureData, name: str, pictures: Gallery
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Collect the plain values and the arrays of one dictionary."""
    statistics, shown = features.statistics, features.shown
    alive = statistics.density > 0
    flat, method = flat_map(features.atoms, alive)
    near = neighbors(features.atoms, alive)
    branches = _branches(features.rows)
    shares, expected = plain_shares(features.atoms, branches)
    slot = np.searchsorted(pictures.samples, shown.sample)
    arrays = {
        "density": statistics.density.astype(np.float32),
        "mean": statistics.mean.astype(np.float32),
        "max": statistics.max.astype(np.float32),
        "histogram": statistics.histogram.astype(np.uint32),
        "upper": statistics.upper.astype(np.float32),
        "shares": shares.astype(np.float32),
        "near": near.latent,
        "cosine": near.cosine,
        "flat": flat,
        "slot": np.where(shown.sample >= 0, slot, -1).astype(np.int32),
        "place": shown.place.astype(np.int16),
        "value": shown.value,
        "first": shown.first.astype(np.int16),
        "corner": shown.corner.astype(np.int16),
        "heat": shown.heat,
        "apart": shown.apart,
        "scale": shown.scale,
    }
    return _facts(features, name, pictures, method, near, list(branches), expected.tolist()), arrays


def _facts(
    features: _FeatureData,
    name: str,
    pictures: Gallery,
    method: str,
    near: Neighbors,
    branches: list[str],
    expected: list[float],
) -> dict[str, Any]:
    crop = features.shown.crop
    return {
        "key": features.key,
        "run": features.run.name,
        "checksum": features.run.manifest.get("files", {}).get(FILE, ""),
        "site": str(features.run.manifest["site"]),
        "n": len(features.atoms),
        "top": TOP,
        "shown": TOP + QUANTILES,
        "apart": features.shown.apart.shape[2],
        "rows": features.statistics.n_rows,
        "allRows": features.rows.n_rows + features.rows.n_held_out,
        "drift": features.shown.drift,
        "alive": int((features.statistics.density > 0).sum()),
        "map": method,
        "chance": near.chance,
        "recall": near.recall,
        "branches": branches,
        "expected": expected,
        "kind": "text" if features.words else "image" if pictures.sheets and crop else "array",
        "crop": dataclasses.asdict(crop) if crop else None,
        "heat": list(features.shown.heat.shape[2:]),
        "gallery": name,
        "painted": list(features.painted),
        "bins": BINS,
        "perOctave": PER_OCTAVE,
        "problems": features.problems,
    }


def _branches(rows: StoreRows | PairedRows) -> dict[str, slice]:
    """Branches of the site, if the dictionary reads all of its channels."""
    if isinstance(rows, PairedRows) or rows.d_in != rows.shape.width:
        return {}
    return {name: slice(*ends) for name, ends in rows.shape.branches.items()}
