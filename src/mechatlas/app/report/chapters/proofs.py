"""What was proved of networks on groups: circuits, rho-sets, budget and margins."""

from typing import Any

import numpy as np

from mechatlas.app.report.chapter import Chapter, render
from mechatlas.app.report.runs import Runs
from mechatlas.base import Progress

TERMS = {
    "ideal_margin": "ideal margin",
    "additive": "parts of x or y alone",
    "non_equivariance": "circuits not equivariant",
    "unembedding_noise": "unembedding noise in cells",
    "residual": "neurons that fit no circuit",
    "rounding": "rounding",
}


def chapter(runs: Runs, on_progress: Progress) -> Chapter | None:
    """Every folder that `mechatlas prove` wrote.

    Raises:
        DiskError: A file of a run is damaged.
    """
    found = [run for run in runs.of_kind("proof") if run.result]
    if not found:
        return None
    proofs, figures = [], {}
    for number, run in enumerate(found):
        details = run.read("neurons.json") or {}
        drawn = _figures(run.result, details, f"proof{number}")
        figures |= {name: figure for name, _, figure in drawn}
        proofs.append(
            {
                "name": run.name,
                "details": details,
                "result": run.result,
                "irreps": _irreps(details),
                "circuits": [_circuit(grid) for grid in details.get("grids", [])],
                "figures": [(name, caption) for name, caption, _ in drawn],
            }
        )
        on_progress(number + 1, len(found))
    return Chapter(
        name="proofs",
        title="Proofs",
        html=render("proofs.html", proofs=proofs),
        figures=figures,
    )


def _irreps(details: dict[str, Any]) -> list[dict[str, Any]]:
    """How many neurons each irrep has, and how much of their weights lies in it."""
    names = np.array(details.get("irrep", []))
    rows = []
    for name in details.get("irreps", []):
        mine = names == name
        parts = {k: float(np.median(np.array(v)[mine])) for k, v in details["shares"].items()}
        rows.append({"name": name, "neurons": int(mine.sum()), **parts})
    return rows


def _circuit(grid: dict[str, Any]) -> dict[str, Any]:
    cells = set(zip(grid["left"], grid["right"], strict=True))
    rows, columns = len(grid["left_vectors"]), len(grid["right_vectors"])
    return {
        "irrep": grid["irrep"],
        "size": f"{rows} \N{MULTIPLICATION SIGN} {columns}",
        "neurons": len(grid["neurons"]),
        "filled": len(cells) / (rows * columns),
        "spread_of_a": grid["spread_of_a"],
    }


def _figures(
    result: dict[str, Any], details: dict[str, Any], prefix: str
) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, caption and figure of everything that is drawn of one proof."""
    drawn = [
        (f"{prefix}budget", "The first bound of a typical pair, term by term.", _budget(result)),
    ]
    if "histogram" in details:
        text = "Margins in logits: certified (a lower bound) and true (by brute force)."
        drawn.append((f"{prefix}margins", text, _margins(details["histogram"])))
    seen = set()
    for number, grid in enumerate(details.get("grids", [])):
        text = f"Neurons of irrep {grid['irrep']} in their cells B \N{MULTIPLICATION SIGN} B'."
        drawn.append((f"{prefix}grid{number}", text, _cells(grid)))
        key = (grid["irrep"], len(grid["left_vectors"]))
        if key not in seen:
            seen.add(key)
            vectors = np.array(grid["left_vectors"])
            flat = "" if vectors.shape[1] <= 3 else f", of {vectors.shape[1]} dimensions, projected"
            text = f"The rho-set of {len(vectors)} vectors in irrep {grid['irrep']}{flat}."
            drawn.append((f"{prefix}set{number}", text, _polytope(vectors)))
    return drawn


def _budget(result: dict[str, Any]) -> dict[str, Any]:
    budget = result.get("budget", {})
    names = [name for name in TERMS if name in budget]
    return {
        "data": [
            {
                "type": "waterfall",
                "orientation": "v",
                "measure": ["relative"] * len(names) + ["total"],
                "x": [TERMS[name] for name in names] + ["bound"],
                "y": [budget[name] for name in names] + [0],
                "hovertemplate": "%{x}<br>%{delta:.2f} logits<extra></extra>",
            }
        ],
        "layout": {"yaxis": {"title": {"text": "logits"}}, "showlegend": False},
    }


def _margins(histogram: dict[str, Any]) -> dict[str, Any]:
    edges = np.array(histogram["edges"])
    middles = ((edges[1:] + edges[:-1]) / 2).round(4).tolist()
    width = float(edges[1] - edges[0])
    return {
        "data": [
            {
                "type": "bar", "name": name, "x": middles, "y": histogram[name],
                "width": width, "opacity": 0.6,
            }
            for name in ("certified", "true")
        ],
        "layout": {
            "barmode": "overlay",
            "xaxis": {"title": {"text": "margin (logits)"}},
            "yaxis": {"title": {"text": "pairs"}},
            "showlegend": True,
        },
    }  # fmt: skip


def _cells(grid: dict[str, Any]) -> dict[str, Any]:
    filled = np.zeros((len(grid["left_vectors"]), len(grid["right_vectors"])))
    np.add.at(filled, (grid["left"], grid["right"]), np.abs(grid["scale"]))
    return {
        "data": [
            {
                "type": "heatmap",
                "z": filled.round(4).tolist(),
                "hovertemplate": "b %{y}, b' %{x}<br>strength %{z:.3g}<extra></extra>",
            }
        ],
        "layout": {
            "xaxis": {"title": {"text": "b' (point)"}, "constrain": "domain"},
            "yaxis": {"title": {"text": "b (point)"}, "scaleanchor": "x"},
        },
    }


def _polytope(vectors: np.ndarray) -> dict[str, Any]:
    """Points, and edges between nearest ones; in its main three directions if there are more."""
    gram = vectors @ vectors.T
    np.fill_diagonal(gram, -np.inf)
    first, second = np.nonzero(np.triu(gram > gram.max() - 1e-3))
    if vectors.shape[1] > 3:
        vectors = vectors @ np.linalg.svd(vectors, full_matrices=False)[2][:3].T
    points = np.zeros((len(vectors), 3))
    points[:, : vectors.shape[1]] = vectors
    points = points.round(4)
    lines: list[list[float | None]] = [[], [], []]
    for i, j in zip(first, second, strict=True):
        for axis in range(3):
            lines[axis] += [float(points[i, axis]), float(points[j, axis]), None]
    hidden = {"visible": False}
    return {
        "data": [
            {
                "type": "scatter3d", "mode": "lines", "hoverinfo": "skip",
                "x": lines[0], "y": lines[1], "z": lines[2], "line": {"width": 3},
            },
            {
                "type": "scatter3d", "mode": "markers", "marker": {"size": 5},
                **{axis: points[:, k].tolist() for k, axis in enumerate("xyz")},
                "text": [f"point {i}" for i in range(len(points))], "hoverinfo": "text",
            },
        ],
        "layout": {
            "showlegend": False,
            "scene": {"xaxis": hidden, "yaxis": hidden, "zaxis": hidden, "aspectmode": "cube"},
        },
    }  # fmt: skip
