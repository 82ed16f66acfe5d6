"""Chapter on interaction bases: spectra, free directions, ablation curves, interaction graph."""

import dataclasses
import itertools
from typing import Any

import numpy as np
from jaxtyping import Shaped

from mechatlas.analysis.interaction.degeneracy import DegeneracyCount
from mechatlas.app.basis_spectra import DrawnGraph, LayerSpectra, structure_spectra
from mechatlas.app.report.chapter import Chapter, count_of, number, part_for_each
from mechatlas.app.report.dossiers import Absence, Finding
from mechatlas.app.report.palette import category
from mechatlas.app.report.runs import Run, Runs
from mechatlas.app.run_folder import BASIS, SPECTRA
from mechatlas.base import Progress

LABELS = {
    "neurons": "neurons",
    "pca": "principal components",
    "lib": "local interaction basis",
    "gib": "global interaction basis",
    "dictionary": "latents of a dictionary",
}
"""Kind of basis -> its name on the page."""
CAUSES = {
    field.name: field.name.replace("_", " ").replace("relu", "ReLU").replace("low rank", "low-rank")
    for field in dataclasses.fields(DegeneracyCount)[1:]
}
"""Cause of degeneracy -> its name on the page."""
DASHES = ("solid", "dot", "dash", "dashdot")
N_LINE_WIDTHS = 4
"""Number of line widths that edges are drawn with."""
MIN_SHARE = 1e-18
"""Share of the largest eigenvalue that smaller ones are drawn at."""


def chapter(runs: Runs, on_progress: Progress) -> Chapter | None:
    """Draw every run of `mechatlas basis`.

    Raises:
        DiskError: A run is damaged.
    """
    finished = [run for run in runs.of_kind(BASIS) if run.result.get("layers")]
    return part_for_each("Interaction", finished, _draw, on_progress, causes=CAUSES, labels=LABELS)


def _draw(made: Chapter, k: int, run: Run) -> dict[str, Any]:
    """Draw a run."""
    result: Any = run.typed_result()
    spectra = structure_spectra(run.read(SPECTRA), run.name, run.manifest.get("schema", 1))
    names = [layer.name for layer in spectra.layers]
    made.figures[f"spectra-{k}"] = _spectra(spectra.layers)
    if has_effective := any(x.effective_parameters.n_effective for x in result.layers):
        made.figures[f"effective-{k}"] = _effective_parameters(result.layers)
    if has_curves := any(layer.edge_curves for layer in spectra.layers):
        for what in ("edge", "vector"):
            made.figures[f"{what}s-{k}"] = _curves(spectra.layers, what)
    if spectra.graph is not None:
        made.figures[f"graph-{k}"] = _graph(spectra.graph, names)
    made.note(*_found(result, k, drawn=spectra.graph is not None))
    return {
        "network": result.network or run.network_name,
        "result": result,
        "kinds": list(dict.fromkeys(k for layer in result.layers for k in layer.by_basis)),
        "has_curves": has_curves,
        "has_effective": has_effective,
        "graph": spectra.graph,
    }


def _found(result: Any, k: int, *, drawn: bool) -> list[Finding | Absence]:
    """Sum up free directions and modules of a run."""
    anchor, found = f"interaction-{k}", []
    for layer in result.layers[:1]:
        needed = {kind: n for kind, n in layer.by_basis.items() if n.edges_needed is not None}
        if (lib := needed.pop("lib", None)) is not None and needed:
            others = "; ".join(
                f"{LABELS.get(kind, kind)} need {n.edges_needed:,} of {n.edges:,}"
                for kind, n in needed.items()
            )
            found.append(Finding(
                text=f"{lib.edges_needed:,} edges of the local interaction basis of {layer.name} "
                "suffice for the same answers.",
                evidence=f"Ablation on {result.samples:,} samples; {others}. A number that "
                "suffices, not proved the smallest.",
                anchor=anchor,
                figure=f"edges-{k}",
            ))  # fmt: skip
    if result.modularity is not None:
        evidence = (
            f"modularity {number(result.modularity)}; random graphs with the same degrees reach "
            f"{number(result.modularity_null_max)} at most, {number(result.modularity_null)} on "
            "average"
        )
        if result.modules:
            found.append(Finding(
                text=f"The interaction graph falls into {count_of(result.modules, 'module')}.",
                evidence=f"{evidence[0].upper()}{evidence[1:]}; agreement over seeds (adjusted "
                f"Rand index) {number(result.modules_stable_over_seeds)}.",
                anchor=anchor,
                figure=f"graph-{k}" if drawn else f"spectra-{k}",
            ))  # fmt: skip
        else:
            found.append(Absence(
                text="No modules in the interaction graph.",
                power=f"{evidence[0].upper()}{evidence[1:]}: a graph must exceed these.",
                anchor=anchor,
            ))  # fmt: skip
    if result.free_directions:
        bound = "" if result.free_directions_exact else "at least "
        gap = "the spectra have a gap of a decade or more, so the count does not depend on the " \
            "threshold" if result.free_directions_have_gap else "the spectra have no gap: the " \
            "count depends on the threshold"  # fmt: skip
        found.append(Finding(
            text=f"{bound}{result.free_directions:,} of {result.n_parameters:,} directions of the "
            "weights change no output.".capitalize(),
            evidence=f"On {result.samples:,} samples; {gap}.",
            anchor=anchor,
            figure=f"spectra-{k}",
        ))  # fmt: skip
    return found


def _spectra(layers: list[LayerSpectra]) -> dict[str, Any]:
    traces: list[dict[str, Any]] = []
    for k, layer in enumerate(layers):
        spectra = {"activations": layer.activation_eigenvalues,
                   "gradients": layer.gradient_eigenvalues}  # fmt: skip
        for (what, eigenvalues), dash in zip(spectra.items(), ("solid", "dot"), strict=True):
            if not eigenvalues or eigenvalues[0] <= 0:
                continue
            shares = (np.array(eigenvalues) / eigenvalues[0]).clip(min=MIN_SHARE)
            traces.append({
                "type": "scatter",
                "mode": "lines",
                "name": f"{layer.name}, {what}",
                "x": list(range(1, len(shares) + 1)),
                "y": shares.tolist(),
                "line": {"width": 2, "dash": dash},
                "legendgroup": str(k),
                "hovertemplate": "%{y:.2g} of the largest<br>rank %{x}",
            })  # fmt: skip
    threshold = layers[0].threshold if layers else 0
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": threshold, "y1": threshold,
            "line": {"width": 1, "dash": "dash", "color": "var(--ink)"}}  # fmt: skip
    return {
        "data": traces,
        "layout": {
            "xaxis": {"title": {"text": "rank of the eigenvalue"}},
            "yaxis": {
                "type": "log",
                "exponentformat": "power",
                "title": {"text": "share of the largest"},
            },
            "shapes": [line],
        },
    }


def _effective_parameters(layers: list[Any]) -> dict[str, Any]:
    """Effective parameters of the weights that read each layer, by resolution."""
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": layer.name,
            "x": list(layer.effective_parameters.resolutions),
            "y": list(layer.effective_parameters.n_effective),
            "hovertemplate": "%{y:,} effective parameters at %{x:.0e}",
        }
        for layer in layers
        if layer.effective_parameters.n_effective
    ]
    return {
        "data": traces,
        "layout": {
            "xaxis": {
                "type": "log",
                "autorange": "reversed",
                "exponentformat": "power",
                "title": {"text": "resolution (share of the largest eigenvalue)"},
            },
            "yaxis": {"rangemode": "tozero", "title": {"text": "effective parameters"}},
        },
    }


def _curves(layers: list[LayerSpectra], what: str) -> dict[str, Any]:
    """Ablation curves: a color for each basis, a dash for each layer."""
    by_layer = [layer.edge_curves if what == "edge" else layer.vector_curves for layer in layers]
    kinds = list(dict.fromkeys(kind for curves in by_layer for kind in curves))
    traces, labeled = [], set()
    for k, (layer, curves) in enumerate(zip(layers, by_layer, strict=True)):
        for kind, curve in curves.items():
            color = category(kinds.index(kind))
            traces.append({
                "type": "scatter",
                "mode": "lines+markers",
                "name": LABELS.get(kind, kind),
                "legendgroup": kind,
                "showlegend": kind not in labeled,
                "x": [max(kept, 0.5) for kept in curve.kept],
                "y": list(curve.scores),
                "marker": {"size": 4, "color": color},
                "line": {"width": 1.5, "dash": DASHES[k % len(DASHES)], "color": color},
                "hovertemplate": f"{layer.name}: %{{x}} of {curve.n} kept<br>score %{{y:.4f}}",
            })  # fmt: skip
            labeled.add(kind)
    return {
        "data": traces,
        "layout": {
            "xaxis": {"type": "log", "title": {"text": f"{what}s kept"}},
            "yaxis": {"title": {"text": "score"}},
        },
    }


def _graph(graph: DrawnGraph, names: list[str]) -> dict[str, Any]:
    """Interaction graph: layers side by side, vectors above one another, sorted by module."""
    layer, module = np.array(graph.layer), np.array(graph.module)
    height = np.zeros(len(layer))
    for k in np.unique(layer):
        nodes = np.flatnonzero(layer == k)
        order = nodes[np.lexsort((np.array(graph.vector)[nodes], module[nodes]))]
        height[order] = (np.arange(len(nodes)) + 0.5) / len(nodes)
    weight, source, target = (np.array(x) for x in (graph.weight, graph.source, graph.target))
    traces: list[dict[str, Any]] = []
    width = np.minimum((N_LINE_WIDTHS * weight / weight.max()).astype(int), N_LINE_WIDTHS - 1)
    modules = np.unique(module).tolist()
    colors = {m: category(k) for k, m in enumerate(modules)}
    inside = np.where(module[source] == module[target], module[source], -1)
    own = [(inside == m, colors[m], 0.7) for m in modules] if graph.significant else []
    others = inside < 0 if graph.significant else np.ones(len(inside), bool)
    for (of_color, color, opacity), k in itertools.product(
        [(others, "var(--pale)", 0.35), *own], range(N_LINE_WIDTHS)
    ):
        drawn = of_color & (width == k)
        if not drawn.any():
            continue
        traces.append({
            "type": "scatter",
            "mode": "lines",
            "x": _segments(layer[source[drawn]], layer[target[drawn]]),
            "y": _segments(height[source[drawn]], height[target[drawn]]),
            "line": {"width": 0.4 + k, "color": color},
            "opacity": opacity,
            "hoverinfo": "skip",
            "showlegend": False,
        })  # fmt: skip
    for m in modules:
        nodes = np.flatnonzero(module == m)
        label = f"module {m}" if graph.significant else f"group {m} (not significant)"
        traces.append({
            "type": "scatter",
            "mode": "markers",
            "name": label,
            "x": layer[nodes].tolist(),
            "y": height[nodes].tolist(),
            "text": [
                f"{names[layer[i]]}, vector {graph.vector[i]}<br>{graph.description[i]}"
                for i in nodes
            ],
            "hovertemplate": "%{text}<extra>" + label + "</extra>",
            "marker": {"size": 8, "color": colors[m]},
        })  # fmt: skip
    return {
        "data": traces,
        "layout": {
            "xaxis": {"tickvals": list(range(len(names))), "ticktext": names, "showgrid": False},
            "yaxis": {"visible": False},
        },
    }


def _segments(
    start: Shaped[np.ndarray, " edge"], end: Shaped[np.ndarray, " edge"]
) -> list[float | None]:
    """Coordinates of line segments, each followed by a gap."""
    ends = zip(start.astype(float).tolist(), end.astype(float).tolist(), strict=True)
    return [x for a, b in ends for x in (a, b, None)]
