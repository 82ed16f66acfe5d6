"""Chapter on branches: counts against the control, shares, strongest features of each."""

from pathlib import Path
from typing import Any

import numpy as np

from mechatlas.app.report.chapter import Chapter, render
from mechatlas.app.report.runs import Run, Runs
from mechatlas.base import Progress

STRONGEST = 6
"""Features shown of each branch."""
DOTS = 1500
"""Features drawn of each branch in the picture of shares."""
COLOURS = ("#4c78a8", "#f2a541", "#54a24b", "#d1605e", "#8c6bb1", "#4fb0ae", "#b07b54", "#d78fb8")


def chapter(runs: Runs, on_progress: Progress) -> Chapter | None:
    """One part for every run of `mechatlas branches`.

    Raises:
        DiskError: A result is damaged.
    """
    found = runs.of_kind("branches")
    if not found:
        return None
    folders = {run.folder.resolve(): run.name for run in runs.of_kind("dictionary")}
    parts, figures, data = [], {}, []
    for number, run in enumerate(found):
        table = run.table("features.parquet")
        names = [one["name"] for one in run.result["branches"]]
        figures[f"shares{number}"] = _shares(run, table, names)
        figures[f"agree{number}"] = _agreement(run, table, names)
        picture = run.read("picture.json")
        if picture:
            figures[f"picture{number}"] = _picture(picture, names)
        place = folders.get(Path(run.manifest["dictionary"]).resolve(), "")
        strongest = [_strongest(run, table, k, len(names)) for k in range(len(names))]
        data.append({"run": place, "branches": names, "strongest": strongest})
        parts.append(
            {
                "name": run.name,
                "number": number,
                "picture": bool(picture),
                "explained": picture.get("explained") if picture else None,
                "strongest": sum(map(len, strongest)),
                **run.result,
                "labels": _labels(run),
                "consistency": run.result.get("consistency", []),
            }
        )
        on_progress(number + 1, len(found))
    return Chapter(
        name="branches",
        title="Branches",
        html=render("branches.html", parts=parts),
        figures=figures,
        data=data,
        scripts=("branches.js",),
    )


def _of_branch(table: dict[str, np.ndarray], k: int, n: int) -> dict[str, np.ndarray]:
    return {name: values[k::n] for name, values in table.items()}


def _strongest(run: Run, table: dict[str, np.ndarray], k: int, n: int) -> list[dict[str, Any]]:
    """The features that lie most in a branch; first those that stand against the null."""
    own = _of_branch(table, k, n)
    q = np.nan_to_num(own["q_value"], nan=np.inf)
    stands = q <= run.result["rate"]
    order = np.lexsort((-np.nan_to_num(own["share"]), ~stands))
    best = [i for i in order[:STRONGEST] if np.isfinite(q[i])]
    return [
        {
            "feature": int(own["feature"][i]),
            "stands": bool(stands[i]),
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


def _shares(run: Run, table: dict[str, np.ndarray], names: list[str]) -> dict[str, Any]:
    """Share of every feature in every branch, against what is expected."""
    random = np.random.default_rng(0)
    traces: list[dict[str, Any]] = []
    shapes: list[dict[str, Any]] = []
    for stands in (False, True):
        x, y, words = [], [], []
        for k, name in enumerate(names):
            own = _of_branch(table, k, len(names))
            there = np.isfinite(own["q_value"])
            chosen = np.flatnonzero(there & ((own["q_value"] <= run.result["rate"]) == stands))
            if len(chosen) > DOTS:
                chosen = np.sort(random.choice(chosen, DOTS, replace=False))
            x += (k + random.uniform(-0.32, 0.32, len(chosen))).round(3).tolist()
            y += own["share"][chosen].round(4).tolist()
            words += [f"feature {i} in {name}" for i in own["feature"][chosen].tolist()]
        traces.append(
            {
                "type": "scattergl",
                "mode": "markers",
                "name": "specialised" if stands else "not told from chance",
                "x": x,
                "y": y,
                "text": words,
                "hovertemplate": "%{text}<br>share %{y:.3f}<extra></extra>",
                "marker": {
                    "size": 4 if stands else 3,
                    "color": "#d1605e" if stands else "rgba(128,128,128,0.45)",
                },
            }
        )
    for k, one in enumerate(run.result["branches"]):
        shapes.append(
            {
                "type": "line",
                "x0": k - 0.4,
                "x1": k + 0.4,
                "y0": one["expected_share"],
                "y1": one["expected_share"],
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


def _agreement(run: Run, table: dict[str, np.ndarray], names: list[str]) -> dict[str, Any]:
    """Scatter plot: loss without a branch against the share of the decoder row."""
    random = np.random.default_rng(0)
    traces = []
    for k, name in enumerate(names):
        own = _of_branch(table, k, len(names))
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
                "marker": {"size": 3, "color": COLOURS[k % len(COLOURS)], "opacity": 0.6},
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
    """The decoder, sorted; above it the branch of each channel."""
    branch = [b if b >= 0 else None for b in picture["branch"]]
    n = max(len(names), 2)
    scale = [
        [edge, COLOURS[k % len(COLOURS)]] for k in range(n) for edge in (k / n, (k + 1) / n)
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


def _labels(run: Run) -> list[dict[str, Any]]:
    rate = run.result["rate"]
    labels = run.result.get("labels", {}).get("surest", [])
    return [one for one in labels if one["q_value"] <= rate]
