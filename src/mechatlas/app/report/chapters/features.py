"""Chapter on features: strongest examples, statistics and atom of every latent."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mechatlas.activations.images import ImageSamples
from mechatlas.activations.networks import has_weights
from mechatlas.activations.receptive import receptive_field
from mechatlas.activations.samples import Samples, TextSamples
from mechatlas.activations.store import POOL_BYTES, StoreRows
from mechatlas.analysis.branches.specialization import plain_shares
from mechatlas.analysis.examples import (
    BINS,
    PER_OCTAVE,
    Examples,
    FeatureStatistics,
    examples,
    feature_statistics,
)
from mechatlas.app.report.atoms import Neighbors, flat_map, neighbors
from mechatlas.app.report.chapter import Chapter, render
from mechatlas.app.report.galleries import Gallery, gallery
from mechatlas.app.report.paintings import most_in_each, paint
from mechatlas.app.report.runs import Run, Runs
from mechatlas.base import Progress, Site, UserError

TOP = 12
"""Number of examples of each feature."""
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
    rows: StoreRows
    store: Path
    samples: Samples
    statistics: FeatureStatistics
    shown: Examples
    tokens: tuple[np.ndarray, list[str]] | None
    painted: dict[str, bytes]
    """Visualizations of some features, by latent, or latent and branch."""
    problems: list[str]


def chapter(runs: Runs, on_progress: Progress) -> Chapter | None:
    """Make cards, search and a map of the features of each dictionary."""
    dictionaries = runs.of_kind("dictionary")
    if not dictionaries:
        return None
    opened: list[_FeatureData] = []
    failed: list[tuple[str, str]] = []
    total = 100 * len(dictionaries)
    for number, run in enumerate(dictionaries):
        key = _key(run, [o.key for o in opened])
        try:
            opened.append(_open(run, key, runs, _part(on_progress, number * 90, 90, total)))
        except UserError as error:  # one broken run must not cost the page of the others
            failed.append((run.name, str(error)))
            runs.problems[run.name] = str(error)
    galleries = _galleries(opened)
    data: dict[str, Any] = {"galleries": {}, "dictionaries": []}
    arrays: dict[str, np.ndarray] = {}
    images: dict[str, bytes] = {}
    for name, pictures in galleries.values():
        data["galleries"][name] = _describe_gallery(pictures)
        images |= {f"{name}/{i}": sheet for i, sheet in enumerate(pictures.sheets)}
    for number, each in enumerate(opened):
        name, pictures = galleries[each.store]
        described, own = _describe(each, name, pictures)
        data["dictionaries"].append(described)
        arrays |= {f"{number}/{key}": array for key, array in own.items()}
        images |= {f"painted{number}/{key}": file for key, file in each.painted.items()}
        on_progress(90 * len(dictionaries) + 10 * (number + 1), total)
    return Chapter(
        name="features",
        title="Features",
        html=render("features.html", opened=opened, failed=failed),
        empty=not opened,
        data=data,
        arrays=arrays,
        images=images,
        scripts=("cards.js", "query.js", "features.js"),
    )


def _part(on_progress: Progress, start: int, share: int, total: int) -> Progress:
    return lambda done, of: on_progress(start + share * done // max(of, 1), total)


def _key(run: Run, taken: list[str]) -> str:
    """Name the dictionary in links: by its site, with the run's name where a site has several."""
    site = str(run.manifest.get("site", run.name))
    return site if site not in taken else f"{site}@{run.name}"


def _open(run: Run, key: str, runs: Runs, on_progress: Progress) -> _FeatureData:
    """Read a dictionary and its rows, run the network and measure.

    Raises:
        UserError: The dictionary, its store, the network or the samples are missing.
    """
    written = run.manifest.get("site")
    if not isinstance(written, str):
        raise UserError(f"The manifest of {run.name} names no single site that it was trained on.")
    site = Site.parse(written)
    dictionary = run.dictionary()
    if getattr(dictionary, "group", None) is not None:
        raise UserError(
            "It is pose-tied: its codes need every input in all poses, and cards show inputs as "
            "they are. `mechatlas symmetry` tells what its features are."
        )
    folder = runs.store_of(run)
    store = runs.open_store(folder)
    rows = store.rows(written)
    if store.manifest.get("group"):  # the untransformed block: what the network gives for a sample
        rows = StoreRows(store, rows.site, slice(0, dictionary.d_in), POOL_BYTES)
    statistics = feature_statistics(
        dictionary, rows, top=TOP, max_rows=MAX_ROWS, on_progress=_part(on_progress, 0, 40, 100)
    )
    network, samples = runs.reopen(folder)
    field = None
    if isinstance(samples, ImageSamples):
        field = receptive_field(network, site, samples.side, samples.channels)
    shown = examples(
        network, samples, site, dictionary, statistics,
        field=field, on_progress=_part(on_progress, 40, 40, 100),
    )  # fmt: skip
    painted: dict[str, bytes] = {}
    if runs.visualize and field is not None and dictionary.W_enc.shape[0] == rows.d_in:
        assert isinstance(samples, ImageSamples)
        branches = _branches(rows)
        shares, _ = plain_shares(dictionary.W_dec.detach().float().cpu().numpy(), branches)
        latents = most_in_each(shares, statistics.density, runs.visualize)
        home = shares[latents].argmax(axis=1) if branches else np.full(len(latents), -1)
        painted = paint(
            network, samples, site, dictionary.W_enc, latents, branches, home,
            on_progress=_part(on_progress, 80, 20, 100),
        )  # fmt: skip
    problems = []
    if not has_weights(network, store.manifest["network"]):
        problems.append("The network found now has other weights than the store's.")
    if shown.drift > DRIFT:
        problems.append(
            f"Activations differ from those in the store by up to {shown.drift:.0%} of a "
            "feature's maximum: network, samples and store do not belong together."
        )
    tokens = _tokens(network, samples, shown) if isinstance(samples, TextSamples) else None
    atoms = dictionary.W_dec.detach()[:, : rows.d_in].float().cpu().numpy()
    return _FeatureData(
        run, key, atoms, rows, folder, samples, statistics, shown, tokens, painted, problems
    )  # fmt: skip


def _tokens(
    network: nn.Module, samples: TextSamples, shown: Examples
) -> tuple[np.ndarray, list[str]]:
    """Look up the tokens of each example, as indices into a list of words."""
    length = shown.heat.shape[2]
    ids = np.zeros((*shown.sample.shape, length), dtype=np.int64)
    windows = {int(s): samples.read(int(s)) for s in np.unique(shown.sample) if s >= 0}
    for latent, rank in np.argwhere(shown.sample >= 0):
        first = shown.first[latent, rank, 0]
        window = windows[int(shown.sample[latent, rank])]
        ids[latent, rank] = window[first : first + length]
    known, index = np.unique(ids, return_inverse=True)
    words = network.get_submodule("input").decode(known)  # pyright: ignore[reportCallIssue]
    return index.reshape(ids.shape).astype(np.uint32), [str(word) for word in words]


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
        "scale": shown.scale,
    }
    if features.tokens is not None:
        arrays["tokens"] = features.tokens[0]
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
        "site": str(features.run.manifest["site"]),
        "n": len(features.atoms),
        "top": TOP,
        "rows": features.statistics.n_rows,
        "allRows": features.rows.n_rows + features.rows.n_held_out,
        "drift": features.shown.drift,
        "alive": int((features.statistics.density > 0).sum()),
        "map": method,
        "chance": near.chance,
        "branches": branches,
        "expected": expected,
        "kind": "text" if features.tokens else "image" if pictures.sheets and crop else "array",
        "crop": dataclasses.asdict(crop) if crop else None,
        "heat": list(features.shown.heat.shape[2:]),
        "gallery": name,
        "words": features.tokens[1] if features.tokens else [],
        "painted": list(features.painted),
        "bins": BINS,
        "perOctave": PER_OCTAVE,
        "problems": features.problems,
    }


def _branches(rows: StoreRows) -> dict[str, slice]:
    """Branches of the site, if the dictionary reads all of its channels."""
    if rows.d_in != rows.shape.width:
        return {}
    return {name: slice(*ends) for name, ends in rows.shape.branches.items()}
