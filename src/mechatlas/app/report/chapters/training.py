"""Chapter on training: learning curves of each dictionary, and all of them side by side."""

from typing import Any

from mechatlas.app.report.chapter import Chapter, render
from mechatlas.app.report.runs import Runs
from mechatlas.app.run_folder import DICTIONARY, HISTORY
from mechatlas.base import Progress

CURVES = {
    "fvu": "FVU, held out",
    "l0": "L0, held out",
    "dead_share": "dead share",
}

BESIDE = 3
"""Dictionaries from which on they are drawn side by side, if they differ in L0."""
ALIKE = 1.05
"""Ratio of the largest L0 to the smallest up to which it says nothing of the dictionaries."""


def chapter(runs: Runs, on_progress: Progress) -> Chapter | None:
    """Draw the curves of every dictionary that has a `history.json`.

    Raises:
        DiskError: A history is damaged.
    """
    del on_progress
    histories = {run.name: run.read(HISTORY) for run in runs.of_kind(DICTIONARY)}
    histories = {name: h for name, h in histories.items() if h and h.get("step")}
    if not histories:
        return None
    figures = {key: _figure(key, histories) for key in CURVES}
    l0 = [history["l0"][-1] for history in histories.values()]
    beside = len(histories) >= BESIDE and max(l0) > ALIKE * min(l0)
    if beside:
        figures["frontier"] = _frontier(histories)
    return Chapter(
        name="training",
        title="Training",
        html=render("training.html", curves=CURVES, beside=beside),
        figures=figures,
    )


def _frontier(histories: dict[str, Any]) -> dict[str, Any]:
    """Unexplained variance against active latents, a point for each dictionary as it ended."""
    last = {name: {key: history[key][-1] for key in CURVES} for name, history in histories.items()}
    trace = {
        "type": "scatter",
        "mode": "markers",
        "text": list(last),
        "x": [values["l0"] for values in last.values()],
        "y": [values["fvu"] for values in last.values()],
        "marker": {"size": 9},
        "hovertemplate": "%{text}<br>L0 %{x:.3g}, FVU %{y:.3g}<extra></extra>",
    }
    return {
        "data": [trace],
        "layout": {
            "xaxis": {"title": {"text": "L0, held out"}, "type": "log"},
            "yaxis": {"title": {"text": "FVU, held out"}, "rangemode": "tozero"},
            "showlegend": False,
        },
    }


def _figure(key: str, histories: dict[str, Any]) -> dict[str, Any]:
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": history["step"],
            "y": history[key],
            "marker": {"size": 4},
            "line": {"width": 2},
            "hovertemplate": "step %{x:,}<br>%{y:.4g}",
        }
        for name, history in histories.items()
        if history.get(key)
    ]
    most = max((max(t["y"]) for t in traces), default=0.0)
    percent = {"tickformat": ".1%"} if key == "dead_share" else {}
    return {
        "data": traces,
        "layout": {
            "xaxis": {"title": {"text": "step"}},
            "yaxis": {"range": [0, 1.08 * most or 0.01], **percent},
            "showlegend": len(histories) > 1,
        },
    }
