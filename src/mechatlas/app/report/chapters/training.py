"""Chapter on training: learning curves of each dictionary."""

from typing import Any

from mechatlas.app.report.chapter import Chapter, render
from mechatlas.app.report.runs import Runs
from mechatlas.app.run_folder import DICTIONARY, HISTORY
from mechatlas.base import Progress

CURVES = {
    "fvu": "fvu, held out",
    "l0": "l0, held out",
    "dead_share": "dead share",
}


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
    return Chapter(
        name="training",
        title="Training",
        html=render("training.html", curves=CURVES),
        figures={key: _figure(key, histories) for key in CURVES},
    )


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
