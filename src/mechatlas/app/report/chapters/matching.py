"""Where features go from one dictionary to the next: flow, life lines, pairs and their evidence."""

from pathlib import Path
from typing import Any

import numpy as np

from mechatlas.app.report.chapter import Chapter, render
from mechatlas.app.report.runs import Run, Runs
from mechatlas.base import Progress

LONGEST = 40
"""Tracks in the table of life lines."""
WAYS = {
    "matched": "matched pairs",
    "match": "all pairs of the optimum",
    "partial": "optimum with the price of no partner",
    "cosine": "optimum by cosine",
    "unfolded": "optimum, not folded",
    "nearest by cosine": "nearest by cosine, many to one",
    "same number": "same number",
    "random": "random",
    "layer drop": "no dictionary: the row itself",
    "B itself": "no matching: the second dictionary itself",
    "mean of B": "no matching: the second place's mean",
}
OUTPUT = {
    "lost": "output variance lost",
    "divergence": "loss added (nats)",
    "agreement": "same answer",
}


def chapter(runs: Runs, on_progress: Progress) -> Chapter | None:
    """One part for every run of `mechatlas match`.

    Raises:
        DiskError: A result is damaged.
    """
    found = runs.of_kind("matching")
    if not found:
        return None
    folders = {run.folder.resolve(): run.name for run in runs.of_kind("dictionary")}
    parts, figures, arrays, data = [], {}, {}, []
    for number, run in enumerate(found):
        table = run.table("matches.parquet")
        names = [str(name) for name in run.result["dictionaries"]]
        places = [folders.get(Path(p).resolve(), "") for p in run.manifest["dictionaries"]]
        figures[f"flow{number}"] = _flow(run, table, names)
        for key in ("pair", "latent_a", "latent_b"):
            arrays[f"{number}/{key}"] = table[key].astype(np.int32)
        for key in ("cosine", "q_value", "cost"):
            arrays[f"{number}/{key}"] = table[key].astype(np.float32)
        data.append({"name": run.name, "names": names, "runs": places, "rate": run.result["rate"]})
        parts.append({
            "name": run.name,
            "number": number,
            "rate": run.result["rate"],
            "pairs": run.result["pairs"],
            "evidence": [_evidence(pair) for pair in run.result["pairs"]],
            "lives": _lives(run),
            "tracks": _longest(run, names),
            "far": _far(run),
        })  # fmt: skip
        on_progress(number + 1, len(found))
    return Chapter(
        name="matching",
        title="Matching",
        html=render("matching.html", parts=parts, longest=LONGEST),
        figures=figures,
        data=data,
        arrays=arrays,
        scripts=("matching.js",),
    )


def _flow(run: Run, table: dict[str, np.ndarray], names: list[str]) -> dict[str, Any]:
    """Features of each layer by the layer of their birth, and where they go.

    One band a birth layer, however many features there are, so thousands stay readable.
    """
    births, n_layers = _births(run, table, len(names))
    labels: list[str] = []
    at: dict[tuple[int, int], int] = {}
    for layer in range(n_layers):
        for birth in range(layer + 1):
            n = int((births[layer] == birth).sum())
            at[layer, birth] = len(labels)
            born = "born here" if birth == layer else f"since {names[birth]}"
            labels.append(f"{names[layer]}: {n:,} {born}")
    at_end = len(labels)
    labels += [f"{name}: no partner further on" for name in names[:-1]]
    links: dict[str, list[Any]] = {"source": [], "target": [], "value": [], "colour": []}
    for pair in range(n_layers - 1):
        stands = (table["pair"] == pair) & table["matched"]
        goes = np.zeros(len(births[pair]), bool)
        goes[table["latent_a"][stands]] = True
        to = np.full(len(births[pair]), -1)
        to[table["latent_a"][stands]] = births[pair + 1][table["latent_b"][stands]]
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
                },
                "link": {key: links[key] for key in ("source", "target", "value")}
                | {"color": links["colour"]},
            }
        ],
        "layout": {"margin": {"l": 8, "r": 8, "t": 8, "b": 8}},
    }  # fmt: skip


PALETTE = ("#4c78a8", "#f2a541", "#54a24b", "#d1605e", "#8c6bb1", "#4fb0ae", "#b07b54", "#d78fb8")


def _link(links: dict[str, list[Any]], source: int, target: int, n: int, birth: int) -> None:
    if n:
        colour = "#999999" if birth < 0 else PALETTE[birth % len(PALETTE)]
        links["source"].append(source)
        links["target"].append(target)
        links["value"].append(n)
        links["colour"].append(colour + ("40" if birth < 0 else "90"))


def _births(run: Run, table: dict[str, np.ndarray], n_layers: int) -> tuple[list[np.ndarray], int]:
    """The layer where the line of each latent begins: by tracks, or by the matches themselves."""
    sizes = [p["n_a"] for p in run.result["pairs"]] + [run.result["pairs"][-1]["n_b"]]
    if (run.folder / "tracks.parquet").is_file():
        tracks = run.table("tracks.parquet")
        found = []
        for layer, size in enumerate(sizes):
            own = tracks["layer"] == layer
            birth = np.full(size, layer)
            birth[tracks["latent"][own]] = tracks["birth"][own]
            found.append(birth)
        return found, n_layers
    found = [np.zeros(sizes[0], int)]
    for pair, size in enumerate(sizes[1:]):
        birth = np.full(size, pair + 1)
        stands = (table["pair"] == pair) & table["matched"]
        birth[table["latent_b"][stands]] = found[-1][table["latent_a"][stands]]
        found.append(birth)
    return found, n_layers


def _evidence(pair: dict[str, Any]) -> dict[str, Any] | None:
    """What was measured on held-out rows, with its baselines."""
    if "co_firing" not in pair:
        return None
    rows = []
    for way, words in WAYS.items():
        fire, moved = pair["co_firing"].get(way), pair["explained_variance"].get(way)
        after = pair.get("spliced", {}).get(way)
        if fire or moved or after:
            rows.append({
                "way": words,
                "given": fire and fire["given_a"],
                "either": fire and fire["either"],
                "moved": moved and moved["permuted"],
                "rescaled": moved and moved.get("permuted and rescaled"),
                **{key: after and after.get(key) for key in ("lost", "divergence", "agreement")},
            })  # fmt: skip
    shown = [key for key in ("lost", "divergence", "agreement") if any(row[key] for row in rows)]
    return {
        "a": pair["a"],
        "b": pair["b"],
        "rows": rows,
        "n": pair["held_out_rows"],
        "samples": pair.get("samples", 0),
        "shown": {key: OUTPUT[key] for key in shown},
    }


def _lives(run: Run) -> list[dict[str, Any]]:
    lives = run.result.get("tracks")
    if not lives:
        return []
    return [
        {"distance": k + 1, "share": lives["persistence"][k], "low": lives["low"][k],
         "high": lives["high"][k]}
        for k in range(len(lives["persistence"]))
    ]  # fmt: skip


def _longest(run: Run, names: list[str]) -> list[dict[str, Any]]:
    """The surest of the longest tracks."""
    if not (run.folder / "tracks.parquet").is_file():
        return []
    t = run.table("tracks.parquet")
    order = np.lexsort((t["layer"], t["track"]))
    t = {name: values[order] for name, values in t.items()}
    _, first, count = np.unique(t["track"], return_index=True, return_counts=True)
    near = np.add.reduceat(t["cosine"], first) / count
    best = np.lexsort((-near, -count))[:LONGEST]
    return [
        {
            "cells": [
                next((int(v) for v, layer in zip(t["latent"][s], t["layer"][s], strict=True)
                      if layer == k), None)
                for k in range(len(names))
            ],
            "birth": names[int(t["birth"][s][0])],
            "earliest": names[max(0, int(t["earliest_birth"][s][0]))],
            "death": names[int(t["death"][s][0])],
            "latest": names[min(len(names) - 1, int(t["latest_death"][s][0]))],
            "cosine": float(near[k]),
            "names": names,
        }
        for k in best
        if count[k] > 1
        for s in [slice(int(first[k]), int(first[k] + count[k]))]
    ]  # fmt: skip


def _far(run: Run) -> list[dict[str, Any]]:
    far = run.result.get("first_to_last", {})
    return [{"way": way, "given_a": None, "either": None, **facts} for way, facts in far.items()]
