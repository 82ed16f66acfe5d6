"""Chapter on circuits: features as cards, edges with their kernels, and the evidence."""

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mechatlas.app.report.chapter import Chapter, part_for_each, percent
from mechatlas.app.report.dossiers import (
    Absence,
    CircuitLine,
    FeatureAt,
    Finding,
    Statements,
    finite,
)
from mechatlas.app.report.paintings import as_webp
from mechatlas.app.report.runs import Run, Runs
from mechatlas.app.run_folder import CIRCUIT, EDGES, KERNELS, PICTURES, as_plain
from mechatlas.base import Progress

if TYPE_CHECKING:
    from mechatlas.app.commands.circuit import CircuitResult


STRONGEST = 6
"""Number of edges into, and out of, a feature that its dossier shows."""
SHARES = ("explained_by_paths", "explained_by_kept", "places")
NUMBERS = ("weight", "contribution", "share", "attribution", "effect", "effect_low", "effect_high",
           "q_value")  # fmt: skip


def chapter(runs: Runs, on_progress: Progress) -> Chapter | None:
    """Draw every folder that `mechatlas circuit` wrote.

    Raises:
        DiskError: A result is damaged.
    """
    return part_for_each(
        "Circuits", runs.of_kind(CIRCUIT), partial(_draw, runs), on_progress,
        scripts=("cards.js", "circuits.js"),
    )  # fmt: skip


def _draw(runs: Runs, made: Chapter, k: int, run: Run) -> dict[str, Any]:
    """Draw a run."""
    places = [runs.dictionary_at(p) for p in run.manifest["dictionaries"]]
    result: "CircuitResult" = run.typed_result()
    drawings = _drawings(run, result)
    pictures = _pictures(run, k, len(result.sites))
    made.images.update(pictures)
    edges = _strongest_edges(run, result, places, f"circuits-{k}")
    made.statements.extend(edges)
    made.note(_finding(result, edges, f"circuits-{k}"))
    made.data.append({
        "names": result.dictionaries,
        "sites": result.sites,
        "runs": places,
        "fdr": result.fdr,
        "drawings": drawings,
        "pictures": list(pictures),
    })  # fmt: skip
    return {"result": result, "drawings": drawings, "names": result.dictionaries}


def _finding(result: "CircuitResult", edges: Statements, anchor: str) -> Finding | Absence:
    """Sum up the edges, and how well they predict ablations."""
    n = sum(pair.n_significant for pair in result.pairs)
    kept = sum(pair.edges for pair in result.pairs)
    agreement = "; ".join(
        f"{pair.a} to {pair.b}: rank correlation with ablations {pair.agreement.spearman:.2f}, "
        f"of random pairs {round(pair.agreement.null, 2) + 0.0:.2f}"
        for pair in result.pairs
    )
    sites = " to ".join(result.sites)
    if not n:
        return Absence(
            text=f"Of {kept:,} edges kept from {sites}, none is significant.",
            power=f"False discovery rate {percent(result.fdr)}; {agreement}.",
            anchor=anchor,
        )
    best = sorted(
        (
            (abs(line.contribution or 0), feature, line.other)
            for feature, line in edges
            if isinstance(line, CircuitLine) and line.into and line.significant
        ),
        reverse=True,
    )[:4]
    return Finding(
        text=f"{n:,} of {kept:,} edges kept from {sites} are significant: a feature built from "
        "another by the network's own weights.",
        evidence=f"False discovery rate {percent(result.fdr)}; {agreement}.",
        anchor=anchor,
        rows=tuple((source, target) for _, target, source in best),
    )


def _strongest_edges(run: Run, result: "CircuitResult", runs: list[str], anchor: str) -> Statements:
    """Lines on the edges that carry most into and out of each feature."""
    table, tensors = run.table(EDGES), run.tensors(KERNELS)
    size = np.abs(np.nan_to_num(table["contribution"]))
    shown: dict[int, list[bool]] = {}
    for into, latent in ((True, "latent_b"), (False, "latent_a")):
        order = np.lexsort((-size, table[latent], table["pair"]))
        key = np.stack([table["pair"][order], table[latent][order]], axis=1)
        new = np.r_[True, (key[1:] != key[:-1]).any(axis=1)] if len(key) else np.zeros(0, bool)
        first = np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))
        for row in order[np.arange(len(new)) - first < STRONGEST].tolist():
            shown.setdefault(row, []).append(into)
    statements: Statements = []
    for row, directions in shown.items():
        pair = int(table["pair"][row])
        ends = (
            FeatureAt(runs[pair], int(table["latent_a"][row])),
            FeatureAt(runs[pair + 1], int(table["latent_b"][row])),
        )
        branch, q = str(table["branch"][row]), finite(table["q_value"][row])
        for into in directions:
            line = CircuitLine(
                anchor=anchor, into=into, name=result.sites[pair + (not into)],
                other=ends[not into], branch=branch,
                contribution=finite(table["contribution"][row]),
                share=finite(table["share"][row]),
                effect=[finite(table[n][row]) for n in ("effect", "effect_low", "effect_high")],
                q=q, significant=q is not None and q <= result.fdr, fdr=result.fdr,
                kernel=_kernel(tensors, f"{pair}.{branch}", int(table["kernel"][row])),
            )  # fmt: skip
            statements.append((ends[into], line))
    return statements


def _pictures(run: Run, number: int, n_layers: int) -> dict[str, bytes]:
    """Pictures of the features drawn, as WebP, named by run, layer and latent."""
    if not run.has(PICTURES):
        return {}
    tensors = run.tensors(PICTURES)
    made = {}
    for layer in range(n_layers):
        latents = tensors.get(f"{layer}.latents", np.zeros(0, np.int32))
        for k, latent in enumerate(latents.tolist()):
            made[f"{number}/{layer}/{latent}"] = as_webp(tensors[f"{layer}.pictures"][k])
    return made


def _drawings(run: Run, result: "CircuitResult") -> list[dict[str, Any]]:
    """Drawings of the features of the last site that have paths, strongest first."""
    table, tensors = run.table(EDGES), run.tensors(KERNELS)
    explained = {(f.layer, f.latent): f for f in result.features}
    drawings: dict[int, dict[str, Any]] = {}
    for path in result.paths:
        latents = path.latents
        drawing = drawings.setdefault(
            latents[-1],
            {"target": latents[-1], "paths": [], "columns": [[] for _ in latents], "edges": {}},
        )
        drawing["paths"].append(as_plain(path))
        for layer, latent in enumerate(latents):
            column = drawing["columns"][layer]
            if latent not in [card["latent"] for card in column]:
                feature = explained.get((layer, latent))
                shares = {key: getattr(feature, key, None) for key in SHARES}
                column.append({"latent": latent, **shares})
        for pair in range(len(latents) - 1):
            key = (pair, latents[pair], latents[pair + 1])
            if key not in drawing["edges"]:
                drawing["edges"][key] = _edges(table, tensors, *key)
    for drawing in drawings.values():
        drawing["edges"] = [edge for edges in drawing["edges"].values() for edge in edges]
    return list(drawings.values())


def _edges(
    table: dict[str, np.ndarray], tensors: dict[str, np.ndarray], pair: int, a: int, b: int
) -> list[dict[str, Any]]:
    """Edges of one pair of features, by branch, largest contribution first."""
    own = (table["pair"] == pair) & (table["latent_a"] == a) & (table["latent_b"] == b)
    rows = np.flatnonzero(own)
    rows = rows[np.argsort(-np.abs(table["contribution"][rows]), kind="stable")]
    return [
        {
            "pair": pair,
            "a": a,
            "b": b,
            "branch": str(table["branch"][row]),
            "kernel": _kernel(tensors, f"{pair}.{table['branch'][row]}", int(table["kernel"][row])),
            **{name: as_plain(float(table[name][row])) for name in NUMBERS},
        }
        for row in rows
    ]


def _kernel(tensors: dict[str, np.ndarray], name: str, row: int) -> dict[str, Any]:
    """Picture of a kernel: its height, its width, and its numbers row by row."""
    taps, values = tensors[f"{name}.taps"], tensors[f"{name}.kernels"][row]
    low = taps.min(axis=0)
    height, width = (taps.max(axis=0) - low + 1).tolist()
    picture = np.zeros((height, width), np.float32)
    picture[tuple((taps - low).T)] = values
    return {"h": height, "w": width, "values": [finite(v) for v in picture.ravel()]}
