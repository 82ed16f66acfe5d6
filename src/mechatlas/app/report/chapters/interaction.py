"""Chapter on interaction: spectra, free directions, ablation curves, the interaction graph."""

from typing import Any

import numpy as np

from mechatlas.app.report.chapter import Chapter, render
from mechatlas.app.report.runs import Run, Runs
from mechatlas.base import Progress

LABELS = {
    "neurons": "neurons",
    "pca": "principal components",
    "lib": "local interaction basis",
    "gib": "global interaction basis",
    "dictionary": "latents of a dictionary",
}
CAUSES = ("dead", "activations", "gradients", "joint", "scale", "synchronised")
COLOURS = ("#1b998b", "#e08e45", "#4c6fbf", "#d1495b", "#7a9e35")
DASHES = ("solid", "dot", "dash", "dashdot")
BUCKETS = 4
"""Widths of line that edges are drawn with."""
SMALLEST = 1e-18
"""Shares of a spectrum below this are drawn here."""


def chapter(runs: Runs, on_progress: Progress) -> Chapter | None:
    """Every run of `mechatlas basis`.

    Raises:
        DiskError: A run is damaged.
    """
    found = [run for run in runs.of_kind("basis") if run.result.get("layers")]
    figures: dict[str, Any] = {}
    shown = []
    for number, run in enumerate(found):
        drawn = run.read("spectra.json") or {"layers": [], "graph": None}
        figures |= {f"{name}-{number}": figure for name, figure in _figures(drawn).items()}
        shown.append(_facts(run, number, drawn))
        on_progress(number + 1, len(found))
    if not shown:
        return None
    return Chapter(
        name="interaction",
        title="Interaction",
        html=render("interaction.html", runs=shown, causes=CAUSES, labels=LABELS),
        figures=figures,
    )


def _facts(run: Run, number: int, drawn: dict[str, Any]) -> dict[str, Any]:
    result = run.result
    return {
        "name": run.name,
        "number": number,
        "network": run.manifest.get("recipe", {}).get("network", {}).get("name", ""),
        "layers": result["layers"],
        "kinds": list(dict.fromkeys(k for layer in result["layers"] for k in layer["by_basis"])),
        "has_curves": any(layer["edges"] for layer in drawn["layers"]),
        "has_graph": drawn["graph"] is not None,
        "graph": drawn["graph"],
        **{
            key: result.get(key)
            for key in (
                "modularity",
                "modularity_null",
                "modularity_null_max",
                "modularity_rotated",
                "modules",
                "modules_p_value",
                "modules_stable_over_seeds",
                "modules_stable_over_samples",
                "free_directions",
                "free_directions_exact",
                "free_directions_across",
                "parameters",
                "samples",
                "score",
                "measure",
            )
        },
    }


def _figures(drawn: dict[str, Any]) -> dict[str, Any]:
    layers = drawn["layers"]
    figures = {"spectra": _spectra(layers)}
    if any(layer["edges"] for layer in layers):
        figures["edges"] = _curves(layers, "edges")
        figures["vectors"] = _curves(layers, "vectors")
    if drawn["graph"] is not None:
        figures["graph"] = _graph(drawn["graph"], [layer["name"] for layer in layers])
    return figures


def _spectra(layers: list[dict[str, Any]]) -> dict[str, Any]:
    traces: list[dict[str, Any]] = []
    for number, layer in enumerate(layers):
        for what, dash in (("activations", "solid"), ("gradients", "dot")):
            values = np.array(layer[what])
            if not len(values) or values[0] <= 0:
                continue
            shares = (values / values[0]).clip(min=SMALLEST)
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": f"{layer['name']}, {what}",
                    "x": list(range(1, len(values) + 1)),
                    "y": shares.tolist(),
                    "line": {"width": 2, "dash": dash},
                    "legendgroup": str(number),
                    "hovertemplate": "%{y:.2g} of the largest<br>eigenvalue %{x}",
                }
            )
    threshold = layers[0]["threshold"] if layers else 0
    return {
        "data": traces,
        "layout": {
            "xaxis": {"title": {"text": "eigenvalue"}},
            "yaxis": {"type": "log", "exponentformat": "power"},
            "shapes": [
                {
                    "type": "line",
                    "xref": "paper",
                    "x0": 0,
                    "x1": 1,
                    "y0": threshold,
                    "y1": threshold,
                    "line": {"width": 1, "dash": "dash"},
                }
            ],
        },
    }


def _curves(layers: list[dict[str, Any]], what: str) -> dict[str, Any]:
    """A colour for each basis, a dash for each layer."""
    kinds = list(dict.fromkeys(kind for layer in layers for kind in layer[what]))
    traces = []
    for number, layer in enumerate(layers):
        for kind, curve in layer[what].items():
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": LABELS.get(kind, kind),
                    "legendgroup": kind,
                    "showlegend": kind
                    not in [k for before in layers[:number] for k in before[what]],
                    "x": [max(kept, 0.5) for kept in curve["kept"]],
                    "y": curve["score"],
                    "marker": {"size": 4, "color": COLOURS[kinds.index(kind) % len(COLOURS)]},
                    "line": {
                        "width": 1.5,
                        "dash": DASHES[number % len(DASHES)],
                        "color": COLOURS[kinds.index(kind) % len(COLOURS)],
                    },
                    "hovertemplate": f"{layer['name']}: %{{x}} of {curve['of']} kept<br>"
                    "score %{y:.4f}",
                }
            )
    return {
        "data": traces,
        "layout": {"xaxis": {"type": "log", "title": {"text": f"{what} kept"}}},
    }


def _graph(graph: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Layers side by side, vectors above one another, sorted by module."""
    layer, module = np.array(graph["layer"]), np.array(graph["module"])
    height = np.zeros(len(layer))
    for number in np.unique(layer):
        mine = np.flatnonzero(layer == number)
        order = mine[np.lexsort((np.array(graph["vector"])[mine], module[mine]))]
        height[order] = (np.arange(len(mine)) + 0.5) / len(mine)
    weight = np.array(graph["weight"])
    traces: list[dict[str, Any]] = []
    bucket = np.minimum((BUCKETS * weight / weight.max()).astype(int), BUCKETS - 1)
    for number in range(BUCKETS):
        xs: list[float | None] = []
        ys: list[float | None] = []
        for edge in np.flatnonzero(bucket == number):
            a, b = graph["source"][edge], graph["target"][edge]
            xs += [float(layer[a]), float(layer[b]), None]
            ys += [float(height[a]), float(height[b]), None]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": xs,
                "y": ys,
                "line": {"width": 0.4 + number, "color": "rgba(128,128,128,0.45)"},
                "hoverinfo": "skip",
                "showlegend": False,
            }
        )
    for number in np.unique(module):
        mine = np.flatnonzero(module == number)
        made_of = graph.get("is", [""] * len(layer))
        words = [f"{names[layer[i]]}, vector {graph['vector'][i]}<br>{made_of[i]}" for i in mine]
        label = f"module {number}" if graph["stand"] else f"group {number} (no better than chance)"
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": label,
                "x": layer[mine].tolist(),
                "y": height[mine].tolist(),
                "text": words,
                "hovertemplate": "%{text}<extra>" + label + "</extra>",
                "marker": {"size": 8},
            }
        )
    return {
        "data": traces,
        "layout": {
            "xaxis": {"tickvals": list(range(len(names))), "ticktext": names, "showgrid": False},
            "yaxis": {"visible": False},
        },
    }
