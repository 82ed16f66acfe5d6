"""Chapter on matching: flow of features, survival, pairs and their evidence."""

from collections import ChainMap
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int

from mechatlas.app.report.chapter import Chapter, number, part_for_each, percent
from mechatlas.app.report.dossiers import (
    Absence,
    FeatureAt,
    Finding,
    MatchLine,
    Statements,
    TrackLine,
    finite,
)
from mechatlas.app.report.palette import category
from mechatlas.app.report.runs import Run, Runs
from mechatlas.app.run_folder import MATCHES, MATCHING, TRACKS, as_plain
from mechatlas.base import Progress

if TYPE_CHECKING:
    from mechatlas.app.commands.match import DistantMatch, MatchResult, PairResult, TracksResult

Columns = dict[str, np.ndarray]
"""Columns of a table, by name."""
MOST_BANDED = 6
"""Dictionaries between which bands can still be followed by the eye."""
MAX_TRACKS = 40
"""Tracks in the table of tracks."""
WAYS = {
    "matched": "matched pairs",
    "match": "all pairs of the optimum",
    "partial": "optimum in which latents may stay unmatched",
    "cosine": "optimum by cosine",
    "unfolded": "optimum, not folded",
    "nearest": "nearest by cosine, many to one",
    "same_index": "same index",
    "random": "random",
    "layer_drop": "layer drop: the row of the first site itself",
    "b_reconstruction": "reconstruction by the second dictionary",
    "b_mean": "mean of the second site",
}
"""Ways to pair, and references without a pairing, in the words of the page."""
OUTPUT = {
    "variance_lost": "output variance lost",
    "kl_divergence": "loss added (nats)",
    "agreement": "same answer",
}
"""Measures of the effect on the network's output, in the words of the page."""
NO_MEASURES = dict.fromkeys(("p_b_given_a", "jaccard", "permuted", "rescaled", *OUTPUT))
"""Cells of a row for which nothing was measured."""


def chapter(runs: Runs, on_progress: Progress) -> Chapter | None:
    """Draw every run of `mechatlas match`.

    Raises:
        DiskError: A result is damaged.
    """
    return part_for_each(
        "Matching", runs.of_kind(MATCHING), partial(_draw, runs), on_progress,
        scripts=("matching.js",), most_banded=MOST_BANDED,
    )  # fmt: skip


def _draw(runs: Runs, made: Chapter, k: int, run: Run) -> dict[str, Any]:
    """Draw a run."""
    result: "MatchResult" = run.typed_result()
    table = run.table(MATCHES)
    tracks = run.table(TRACKS) if run.has(TRACKS) else None
    names = result.dictionaries
    dictionaries = [runs.dictionary_at(p) for p in run.manifest["dictionaries"]]
    made.figures[f"flow{k}"] = _flow(result.pairs, table, tracks, names)
    for key in ("pair", "latent_a", "latent_b"):
        made.arrays[f"{k}/{key}"] = table[key].astype(np.int32)
    for key in ("cosine", "q_value", "cost"):
        made.arrays[f"{k}/{key}"] = table[key].astype(np.float32)
    made.data.append({"name": run.name, "names": names, "runs": dictionaries, "fdr": result.fdr})
    place = _Place(f"matching-{k}", names, dictionaries, result.fdr)
    made.note(*(_finding(place, pair, each, table) for pair, each in enumerate(result.pairs)))
    made.statements.extend([*_matches(place, table), *_tracks(place, tracks)])
    return {
        "fdr": result.fdr,
        "names": names,
        "pairs": result.pairs,
        "evidence": [_evidence(pair) for pair in result.pairs],
        "survival": _survival(result.tracks),
        "tracks": _longest(tracks, names),
        "distant": _distant(result.first_to_last),
    }


class _Place(NamedTuple):
    """Part of the chapter, and the dictionaries that it speaks of."""

    anchor: str
    names: list[str]
    runs: list[str]
    fdr: float


def _finding(place: _Place, k: int, pair: "PairResult", table: Columns) -> Finding | Absence:
    """Sum up the matches of two consecutive dictionaries."""
    names, smaller = place.names, min(pair.n_a, pair.n_b)
    threshold = "" if pair.cosine_threshold is None else (
        f" (a cosine of at least {number(pair.cosine_threshold)})"
    )  # fmt: skip
    if not pair.matched:
        return Absence(
            text=f"Of {smaller:,} features of {names[k]}, none is matched in {names[k + 1]}.",
            power=f"Certified best pairing (gap {number(pair.gap)}) against {pair.n_null:,} pairs "
            f"of null dictionaries, false match rate {percent(place.fdr)}{threshold}.",
            anchor=place.anchor,
        )
    own = np.flatnonzero((table["pair"] == k) & table["matched"])
    most = own[np.argsort(-table["cosine"][own], kind="stable")][:4]
    exact = pair.gap <= 1e-9 * max(abs(pair.cost), 1)
    best = "the pairing is optimal" if exact else "the pairing is nearly optimal"
    return Finding(
        text=f"{pair.matched:,} of {smaller:,} features of {names[k]} continue in {names[k + 1]}.",
        evidence=f"False match rate {percent(place.fdr)} against null dictionaries{threshold}; "
        f"{best} (gap {0 if exact else number(pair.gap)}).",
        anchor=place.anchor,
        rows=tuple(
            (
                FeatureAt(place.runs[k], int(table["latent_a"][i])),
                FeatureAt(place.runs[k + 1], int(table["latent_b"][i])),
            )
            for i in most
        ),
        strength=pair.matched / smaller,
    )


def _matches(place: _Place, table: Columns) -> Statements:
    """Lines on the partner of each feature, before and after."""
    statements: Statements = []
    names = ("pair", "latent_a", "latent_b", "cosine", "q_value", "matched")
    for k, a, b, cosine, q, matched in zip(*(table[n].tolist() for n in names), strict=True):
        ends = (FeatureAt(place.runs[k], a), FeatureAt(place.runs[k + 1], b))
        for after in (True, False):
            line = MatchLine(
                anchor=place.anchor, after=after, name=place.names[k + after],
                other=ends[after], cosine=finite(cosine) or 0.0, q=finite(q), matched=matched,
                fdr=place.fdr,
            )  # fmt: skip
            statements.append((ends[not after], line))
    return statements


def _tracks(place: _Place, tracks: Columns | None) -> Statements:
    """Lines on the tracks of more than one feature."""
    if tracks is None:
        return []
    names, statements = place.names, []
    order = np.lexsort((tracks["layer"], tracks["track"]))
    t = {name: values[order] for name, values in tracks.items()}
    _, first, count = np.unique(t["track"], return_index=True, return_counts=True)
    for start, n in zip(first[count > 1].tolist(), count[count > 1].tolist(), strict=True):
        own = slice(start, start + n)
        latents = dict(zip(t["layer"][own].tolist(), t["latent"][own].tolist(), strict=True))
        line = TrackLine(
            anchor=place.anchor,
            steps=[(name, place.runs[k], latents.get(k)) for k, name in enumerate(names)],
            cosine=finite(t["cosine"][own].mean()) or 0.0,
            earliest=names[max(0, int(t["earliest_birth"][start]))],
            latest=names[min(len(names) - 1, int(t["latest_death"][start]))],
        )
        statements += [(FeatureAt(place.runs[k], i), line) for k, i in latents.items()]
    return statements


def _flow(
    pairs: "list[PairResult]", table: Columns, tracks: Columns | None, names: list[str]
) -> dict[str, Any]:
    """Draw the features of each layer by the layer of their birth, and where they go.

    One band a birth layer, however many features there are, so thousands stay readable.
    """
    births, n_layers = _births(pairs, table, tracks), len(names)
    if n_layers > MOST_BANDED:
        return _stacked(births, names)
    labels: list[str] = []
    at: dict[tuple[int, int], int] = {}
    for layer in range(n_layers):
        for birth in range(layer + 1):
            n = int((births[layer] == birth).sum())
            at[layer, birth] = len(labels)
            born = "born here" if birth == layer else f"since {names[birth]}"
            labels.append(f"{names[layer]}: {n:,} {born}")
    at_end = len(labels)
    labels += [f"{name}: no match further on" for name in names[:-1]]
    links: dict[str, list[Any]] = {"source": [], "target": [], "value": [], "color": []}
    for pair in range(n_layers - 1):
        matched = (table["pair"] == pair) & table["matched"]
        goes = np.zeros(len(births[pair]), bool)
        goes[table["latent_a"][matched]] = True
        to = np.full(len(births[pair]), -1)
        to[table["latent_a"][matched]] = births[pair + 1][table["latent_b"][matched]]
        for birth in range(pair + 1):
            for target in range(pair + 2):
                n = int((goes & (births[pair] == birth) & (to == target)).sum())
                _link(links, at[pair, birth], at[pair + 1, target], n, birth)
            ends = int((~goes & (births[pair] == birth)).sum())
            _link(links, at[pair, birth], at_end + pair, ends, -1)
    last = n_layers - 1
    x = [layer / last for (layer, _) in at] + [(pair + 0.6) / last for pair in range(last)]
    used = set(links["source"]) | set(links["target"])
    return {
        "data": [
            {
                "type": "sankey",
                "arrangement": "snap",
                "node": {
                    "label": [t if k in used else "" for k, t in enumerate(labels)],
                    "x": [min(0.999, max(0.001, place)) for place in x],
                    "pad": 14,
                    "thickness": 12,
                    "color": "var(--pale)",
                },
                "textfont": {"color": "var(--ink)", "size": 12},
                "link": links,
            }
        ],
        "layout": {"margin": {"l": 8, "r": 8, "t": 8, "b": 8}},
    }  # fmt: skip


def _stacked(births: list[np.ndarray], names: list[str]) -> dict[str, Any]:
    """Draw the features of each of many layers by the layer of their birth, as stacked bars."""
    traces = [
        {
            "type": "bar",
            "name": f"since {name}",
            "x": names[birth:],
            "y": [int((own == birth).sum()) for own in births[birth:]],
            "marker": {"color": category(birth)},
            "hovertemplate": f"%{{x}}: %{{y:,}} born in {name}<extra></extra>",
        }
        for birth, name in enumerate(names)
    ]
    axes = {"xaxis": {"type": "category"}, "yaxis": {"title": {"text": "features"}}}
    return {"data": traces, "layout": {"barmode": "stack", **axes}}


def _link(links: dict[str, list[Any]], source: int, target: int, n: int, birth: int) -> None:
    if n:
        color = "var(--line)" if birth < 0 else f"{category(birth)}66"  # so that labels are read
        for key, value in zip(links, (source, target, n, color), strict=True):
            links[key].append(value)


def _births(
    pairs: "list[PairResult]", table: Columns, tracks: Columns | None
) -> list[Int[np.ndarray, " latent"]]:
    """First layer of each latent's track, or without tracks of its chain of matches."""
    sizes = [p.n_a for p in pairs] + [pairs[-1].n_b]
    births = [np.full(size, layer) for layer, size in enumerate(sizes)]
    for layer, birth in enumerate(births):
        if tracks is not None:
            here = tracks["layer"] == layer
            birth[tracks["latent"][here]] = tracks["birth"][here]
        elif layer:
            matched = (table["pair"] == layer - 1) & table["matched"]
            birth[table["latent_b"][matched]] = births[layer - 1][table["latent_a"][matched]]
    return births


def _evidence(pair: "PairResult") -> dict[str, Any] | None:
    """Measurements on held-out rows, beside those of the baselines."""
    if not pair.co_firing:
        return None
    tables = (pair.co_firing, pair.explained_variance or {}, pair.spliced or {})
    rows = []
    for way, words in WAYS.items():
        measures = [as_plain(table[way]) for table in tables if way in table]
        if measures:
            rows.append({**NO_MEASURES, "way": words, **dict(ChainMap(*measures))})
    shown = {key: words for key, words in OUTPUT.items() if any(row.get(key) for row in rows)}
    return {
        "a": pair.a,
        "b": pair.b,
        "rows": rows,
        "n": pair.held_out_rows,
        "samples": pair.samples or 0,
        "shown": shown,
    }


def _survival(tracks: "TracksResult | None") -> list[dict[str, Any]]:
    """Persistence by distance."""
    if tracks is None:
        return []
    rows = zip(tracks.persistence, tracks.low, tracks.high, strict=True)
    return [
        {"distance": k + 1, "share": share, "low": low, "high": high}
        for k, (share, low, high) in enumerate(rows)
    ]


def _longest(tracks: Columns | None, names: list[str]) -> list[dict[str, Any]]:
    """The longest tracks, those of the largest cosines first."""
    if tracks is None:
        return []
    order = np.lexsort((tracks["layer"], tracks["track"]))
    t = {name: values[order] for name, values in tracks.items()}
    _, first, count = np.unique(t["track"], return_index=True, return_counts=True)
    cosine = np.add.reduceat(t["cosine"], first) / count
    best = np.lexsort((-cosine, -count))[:MAX_TRACKS]
    rows = []
    for k in best[count[best] > 1]:
        start, end = int(first[k]), int(first[k] + count[k])
        latents = dict(
            zip(t["layer"][start:end].tolist(), t["latent"][start:end].tolist(), strict=True)
        )
        rows.append({
            "cells": [latents.get(layer) for layer in range(len(names))],
            "birth": names[int(t["birth"][start])],
            "earliest": names[max(0, int(t["earliest_birth"][start]))],
            "death": names[int(t["death"][start])],
            "latest": names[min(len(names) - 1, int(t["latest_death"][start]))],
            "cosine": float(cosine[k]),
            "names": names,
        })  # fmt: skip
    return rows


def _distant(first_to_last: "dict[str, DistantMatch] | None") -> list[dict[str, Any]]:
    """Matches of the first dictionary with the last, by method."""
    return [
        {**NO_MEASURES, "way": way, "pairs": match.pairs, **(as_plain(match.co_firing) or {})}
        for way, match in (first_to_last or {}).items()
    ]
