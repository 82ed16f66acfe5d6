"""Chapter on branches: counts against the control, shares, strongest features."""

from pathlib import Path
from typing import Any

import numpy as np

from mechatlas.app.old_runs import renamed_columns
from mechatlas.app.report.chapter import Chapter, render
from mechatlas.app.report.runs import Runs
from mechatlas.app.run_folder import BRANCHES, DICTIONARY, read_result
from mechatlas.base import Progress

STRONGEST = 6
"""Number of features shown of each branch."""
DOTS = 1500
"""Number of features drawn of each branch in the picture of shares."""
COLORS = ("#4c78a8", "#f2a541", "#54a24b", "#d1605e", "#8c6bb1", "#4fb0ae", "#b07b54", "#d78fb8")
Table = dict[str, Any]


def chapter(runs: Runs, on_progress: Progress) -> Chapter | None:
    """Draw one section for every run of `mechatlas branches`.

    Raises:
        DiskError: A result is damaged.
    """
    finished = runs.of_kind(BRANCHES)
    if not finished:
        return None
    folders = {run.folder.resolve(): run.name for run in runs.of_kind(DICTIONARY)}
    parts, figures, data = [], {}, []
    for number, run in enumerate(finished):
        result: Any = read_result(run.folder, BRANCHES, schema=run.manifest.get("schema", 1))
        table = renamed_columns(run.table("features.parquet"), BRANCHES)
        names = [branch.name for branch in result.branches]
        of_branch = [
            {name: values[k :: len(names)] for name, values in table.items()}
            for k in range(len(names))
        ]
        figures[f"shares{number}"] = _shares(result, of_branch, names)
        figures[f"agree{number}"] = _agreement(of_branch, names)
        picture = run.read("picture.json")
        if picture:
            figures[f"picture{number}"] = _picture(picture, names)
        strongest = [_strongest(own, result.fdr) for own in of_branch]
        dictionary = Path(run.manifest["dictionary"]).resolve()
        data.append({"run": folders.get(dictionary, ""), "branches": names, "strongest": strongest})
        labels = result.labels.surest if result.labels else []
        parts.append(
            {
                "name": run.name,
                "number": number,
                "explained": picture["explained"] if picture else None,
                "strongest": sum(map(len, strongest)),
                "result": result,
                "labels": [label for label in labels if label.q_value <= result.fdr],
            }
        )
        on_progress(number + 1, len(finished))
    return Chapter(
        name="branches",
        title="Branches",
        html=render("branches.html", parts=parts),
        figures=figures,
        data=data,
        scripts=("branches.js",),
    )


def _strongest(own: Table, fdr: float) -> list[dict[str, Any]]:
    """Features that lie most in a branch; first those that are significant."""
    q = np.nan_to_num(own["q_value"], nan=np.inf)
    significant = q <= fdr
    order = np.lexsort((-np.nan_to_num(own["share"]), ~significant))
    best = [i for i in order[:STRONGEST] if np.isfinite(q[i])]
    return [
        {
            "feature": int(own["feature"][i]),
            "significant": bool(significant[i]),
            "share": float(own["share"][i]),
            "expected": float(own["expected_share"][i]),
            "q": float(q[i]),
            "ablation": _finite(own["ablation_share"][i]),
            "activation": _finite(own["activation_share"][i]),
        }
        for i in best
    ]


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _shares(result: Any, of_branch: list[Table], names: list[str]) -> dict[str, Any]:
    """Share of every feature in every branch, against the expected share."""
    random = np.random.default_rng(0)
    traces: list[dict[str, Any]] = []
    shapes: list[dict[str, Any]] = []
    for significant in (False, True):
        x, y, words = [], [], []
        for k, (name, own) in enumerate(zip(names, of_branch, strict=True)):
            there = np.isfinite(own["q_value"])
            chosen = np.flatnonzero(there & ((own["q_value"] <= result.fdr) == significant))
            if len(chosen) > DOTS:
                chosen = np.sort(random.choice(chosen, DOTS, replace=False))
            x += (k + random.uniform(-0.32, 0.32, len(chosen))).round(3).tolist()
            y += own["share"][chosen].round(4).tolist()
            words += [f"feature {i} in {name}" for i in own["feature"][chosen].tolist()]
        traces.append(
            {
                "type": "scattergl",
                "mode": "markers",
                "name": "specialized" if significant else "not told from chance",
                "x": x,
                "y": y,
                "text": words,
                "hovertemplate": "%{text}<br>share %{y:.3f}<extra></extra>",
                "marker": {
                    "size": 4 if significant else 3,
                    "color": "#d1605e" if significant else "rgba(128,128,128,0.45)",
                },
            }
        )
    for k, branch in enumerate(result.branches):
        shapes.append(
            {
                "type": "line",
                "x0": k - 0.4,
                "x1": k + 0.4,
                "y0": branch.expected_share,
                "y1": branch.expected_share,
                "line": {"width": 2, "color": "#4c78a8"},
            }
        )
    ticks = list(range(len(names)))
    return {
        "data": traces,
        "layout": {
            "xaxis": {"tickvals": ticks, "ticktext": names, "showgrid": False, "zeroline": False},
            "yaxis": {"title": {"text": "share of the decoder row"}, "range": [-0.02, 1.04]},
            "shapes": shapes,
            "legend": {"orientation": "h", "y": 1.12},
        },
    }


def _agreement(of_branch: list[Table], names: list[str]) -> dict[str, Any]:
    """Activity lost without a branch, against the share of the decoder row."""
    random = np.random.default_rng(0)
    traces = []
    for k, (name, own) in enumerate(zip(names, of_branch, strict=True)):
        chosen = np.flatnonzero(
            np.isfinite(own["ablation_share"])
            & np.isfinite(own["share"])
            & (own["active_rows"] >= 10)
        )
        if len(chosen) > DOTS // 2:
            chosen = np.sort(random.choice(chosen, DOTS // 2, replace=False))
        traces.append(
            {
                "type": "scattergl",
                "mode": "markers",
                "name": name,
                "x": own["share"][chosen].round(4).tolist(),
                "y": np.clip(own["ablation_share"][chosen], -0.5, 1.2).round(4).tolist(),
                "text": [f"feature {i}" for i in own["feature"][chosen].tolist()],
                "hovertemplate": "%{text} in " + "%{fullData.name}<br>share %{x:.3f}, lost %{y:.3f}"
                "<extra></extra>",
                "marker": {"size": 3, "color": COLORS[k % len(COLORS)], "opacity": 0.6},
            }
        )
    return {
        "data": traces,
        "layout": {
            "xaxis": {"title": {"text": "share of the decoder row"}, "range": [-0.02, 1.04]},
            "yaxis": {"title": {"text": "activity lost without the branch"}},
            "legend": {"orientation": "h", "y": 1.12},
        },
    }


def _picture(picture: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Picture of the decoder, sorted; above it the branch of each channel."""
    branch = [b if b >= 0 else None for b in picture["branch"]]
    n = max(len(names), 2)
    scale = [
        [edge, COLORS[k % len(COLORS)]] for k in range(n) for edge in (k / n, (k + 1) / n)
    ]  # fmt: skip
    words = [names[b] if b is not None else "no branch" for b in branch]
    whole = np.array(picture["rows"])
    return {
        "data": [
            {
                "type": "heatmap",
                "z": np.sqrt(whole).round(3).tolist(),
                "colorscale": "Greys",
                "reversescale": True,
                "showscale": False,
                "hoverinfo": "skip",
            },
            {
                "type": "heatmap",
                "z": [branch],
                "zmin": 0,
                "zmax": n,
                "text": [words],
                "hovertemplate": "%{text}<extra></extra>",
                "colorscale": scale,
                "showscale": False,
                "yaxis": "y2",
            },
        ],
        "layout": {
            "xaxis": {"title": {"text": "channels, sorted"}, "showticklabels": False},
            "yaxis": {
                "domain": [0, 0.9],
                "title": {"text": "features, sorted"},
                "showticklabels": False,
                "autorange": "reversed",
            },
            "yaxis2": {"domain": [0.92, 1], "showticklabels": False},
        },
    }
