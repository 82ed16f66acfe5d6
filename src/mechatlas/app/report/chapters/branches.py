"""Chapter on branches: counts against the control, shares, strongest features."""

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mechatlas.app.old_runs import renamed_columns
from mechatlas.app.report.chapter import Chapter, part_for_each, percent
from mechatlas.app.report.dossiers import (
    Absence,
    BranchLine,
    FeatureAt,
    Finding,
    Statements,
    finite,
)
from mechatlas.app.report.palette import category
from mechatlas.app.report.runs import Run, Runs
from mechatlas.app.run_folder import BRANCHES, DECODER_PICTURE, FEATURES
from mechatlas.base import Progress

if TYPE_CHECKING:
    from mechatlas.app.commands.branches import BranchesResult

STRONGEST = 6
"""Number of features shown of each branch."""
DOTS = 400
"""Number of features drawn of each branch in the picture of shares."""
LEGEND = {"orientation": "h", "y": 1.12, "itemsizing": "constant"}
Table = dict[str, Any]


def chapter(runs: Runs, on_progress: Progress) -> Chapter | None:
    """Draw one section for every run of `mechatlas branches`.

    Raises:
        DiskError: A result is damaged.
    """
    return part_for_each(
        "Branches", runs.of_kind(BRANCHES), partial(_draw, runs), on_progress,
        scripts=("branches.js",),
    )  # fmt: skip


def _draw(runs: Runs, made: Chapter, k: int, run: Run) -> dict[str, Any]:
    """Draw a run."""
    result: "BranchesResult" = run.typed_result()
    table = renamed_columns(run.table(FEATURES), BRANCHES)
    names = [branch.name for branch in result.branches]
    of_branch = [
        {name: values[branch :: len(names)] for name, values in table.items()}
        for branch in range(len(names))
    ]
    made.figures[f"shares{k}"] = _shares(result, of_branch, names)
    made.figures[f"agree{k}"] = _agreement(result, of_branch, names)
    picture = run.read(DECODER_PICTURE)
    if picture:
        made.figures[f"picture{k}"] = _picture(picture, names)
    strongest = [_strongest(own, result.fdr) for own in of_branch]
    of_run, anchor = runs.dictionary_at(run.manifest["dictionary"]), f"branches-{k}"
    made.note(_finding(result, strongest, of_run, anchor))
    made.statements.extend(_lines(result, of_branch, of_run, anchor))
    made.data.append({"run": of_run, "branches": names, "strongest": strongest, "fdr": result.fdr})
    labels = result.labels.surest if result.labels else []
    return {
        "explained": picture["explained"] if picture else None,
        "strongest": sum(map(len, strongest)),
        "result": result,
        "labels": [label for label in labels if label.q_value <= result.fdr],
    }


def _finding(
    result: "BranchesResult", strongest: list[list[dict[str, Any]]], run: str, anchor: str
) -> Finding | Absence:
    """Sum up the test of all features."""
    permuted = "coordinates" if result.components else "channels"
    control = f"{result.n_specialized_permuted:,} with the {permuted} permuted"
    powers = [b.power for b in result.branches if b.power is not None]
    power = "power not measured (too few features)" if not powers else (
        f"of features planted in a branch, the test finds {percent(min(powers))} to "
        f"{percent(max(powers))} (power)"
    )  # fmt: skip
    if not result.n_specialized:
        return Absence(
            text=f"Of {result.n_tested:,} features of {result.site}, none is specialized to a "
            "branch.",
            power=f"False discovery rate {percent(result.fdr)}; {power}.",
            anchor=anchor,
        )
    shown = [
        tuple(FeatureAt(run, one["feature"]) for one in own if one["significant"])[:4]
        for own in strongest
    ]
    return Finding(
        text=f"{result.n_specialized:,} of {result.n_tested:,} features of {result.site} are "
        "specialized to one branch.",
        evidence=f"False discovery rate {percent(result.fdr)}; {control}; {power}.",
        anchor=anchor,
        rows=tuple(row for row in shown if row),
    )


def _lines(result: "BranchesResult", of_branch: list[Table], run: str, anchor: str) -> Statements:
    """Lines on the share of each feature in each branch."""
    keys = ("feature", "share", "expected_share", "q_value", "ablation_share", "activation_share")
    statements: Statements = []
    for branch, own in zip(result.branches, of_branch, strict=True):
        columns = (own[key].tolist() for key in keys)
        for feature, share, expected, q, ablation, activation in zip(*columns, strict=True):
            line = BranchLine(
                anchor=anchor, branch=branch.name, share=finite(share),
                expected=finite(expected) or 0.0, q=finite(q), significant=q <= result.fdr,
                ablation=finite(ablation), activation=finite(activation), fdr=result.fdr,
            )  # fmt: skip
            statements.append((FeatureAt(run, int(feature)), line))
    return statements


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


def _shares(result: "BranchesResult", of_branch: list[Table], names: list[str]) -> dict[str, Any]:
    """Share of every feature in every branch, against the expected share."""
    random = np.random.default_rng(0)
    traces = []
    for significant in (False, True):
        x, y, words = [], [], []
        for k, (name, own) in enumerate(zip(names, of_branch, strict=True)):
            there = np.isfinite(own["q_value"]) & ((own["q_value"] <= result.fdr) == significant)
            chosen = _drawn(there, DOTS, random)
            x += (k + random.uniform(-0.32, 0.32, len(chosen))).round(3).tolist()
            y += own["share"][chosen].round(4).tolist()
            words += [f"feature {i} in {name}" for i in own["feature"][chosen].tolist()]
        hover = "%{text}<br>share %{y:.3f}<extra></extra>"
        if significant:
            traces.append(_dots("specialized", x, y, words, hover, size=5, color="var(--accent)"))
        else:
            gray = {"size": 3, "color": "var(--pale)"}
            traces.append(_dots("not significant", x, y, words, hover, **gray))
    line = {"type": "line", "line": {"width": 2, "color": "var(--ink)"}}
    shapes = [
        {**line, "x0": k - 0.4, "x1": k + 0.4, "y0": share, "y1": share}
        for k, share in enumerate(branch.expected_share for branch in result.branches)
    ]
    ticks = {"tickvals": list(range(len(names))), "ticktext": names}
    layout = {
        "xaxis": {**ticks, "showgrid": False, "zeroline": False},
        "yaxis": _share_axis(result),
    }
    return {"data": traces, "layout": {**layout, "shapes": shapes, "legend": LEGEND}}


def _share_axis(result: "BranchesResult") -> dict[str, Any]:
    of = "pre-activation's variance, root" if result.components else "decoder row"
    return {"title": {"text": f"share of the {of}"}, "range": [-0.02, 1.04]}


def _agreement(
    result: "BranchesResult", of_branch: list[Table], names: list[str]
) -> dict[str, Any]:
    """Activity lost without a branch, against the share of the decoder row."""
    random = np.random.default_rng(0)
    hover = "%{text} in %{fullData.name}<br>share %{x:.3f}, lost %{y:.3f}<extra></extra>"
    traces = []
    for k, (name, own) in enumerate(zip(names, of_branch, strict=True)):
        known = np.isfinite(own["ablation_share"]) & np.isfinite(own["share"])
        chosen = _drawn(known & (own["active_rows"] >= 10), DOTS, random)
        x = own["share"][chosen].round(4).tolist()
        y = np.clip(own["ablation_share"][chosen], -0.5, 1.2).round(4).tolist()
        words = [f"feature {i}" for i in own["feature"][chosen].tolist()]
        color = category(k)
        traces.append(_dots(name, x, y, words, hover, size=3, color=color, opacity=0.6))
    lost = {"title": {"text": "activity lost without the branch"}}
    return {
        "data": traces,
        "layout": {"xaxis": _share_axis(result), "yaxis": lost, "legend": LEGEND},
    }


def _drawn(there: np.ndarray, most: int, random: np.random.Generator) -> np.ndarray:
    chosen = np.flatnonzero(there)
    return chosen if len(chosen) <= most else np.sort(random.choice(chosen, most, replace=False))


def _dots(
    name: str, x: list[float], y: list[float], words: list[str], hover: str, **marker: Any
) -> dict[str, Any]:
    trace = {"type": "scatter", "mode": "markers", "name": name, "x": x, "y": y}
    return {**trace, "text": words, "hovertemplate": hover, "marker": marker}


def _picture(picture: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Picture of the decoder, sorted; above it the branch of each channel."""
    branch = [b if b >= 0 else None for b in picture["branch"]]
    n = max(len(names), 2)
    scale = [
        [edge, category(k)] for k in range(n) for edge in (k / n, (k + 1) / n)
    ]  # fmt: skip
    words = [names[b] if b is not None else "no branch" for b in branch]
    decoder = np.sqrt(np.array(picture["rows"])).round(3).tolist()
    heatmap, bare = {"type": "heatmap", "showscale": False}, {"showticklabels": False}
    colors = {"colorscale": scale, "zmin": 0, "zmax": n, "yaxis": "y2"}
    hover = {"text": [words], "hovertemplate": "%{text}<extra></extra>"}
    rows = {"domain": [0, 0.9], "title": {"text": "features, sorted"}, "autorange": "reversed"}
    return {
        "data": [
            {**heatmap, "z": decoder, "colorscale": "Greys", "reversescale": True,
             "hoverinfo": "skip"},
            {**heatmap, "z": [branch], **colors, **hover},
        ],
        "layout": {
            "xaxis": {**bare, "title": {"text": "channels, sorted"}},
            "yaxis": {**bare, **rows},
            "yaxis2": {**bare, "domain": [0.92, 1]},
        },
    }  # fmt: skip
