"""Chapter on evaluation: what dictionaries are worth to their network."""

import dataclasses
from typing import TYPE_CHECKING, Any

from mechatlas.app.report.chapter import Chapter, number, percent, render
from mechatlas.app.report.dossiers import Finding
from mechatlas.app.report.palette import category
from mechatlas.app.report.runs import Runs
from mechatlas.app.run_folder import EVALUATION
from mechatlas.base import Progress

if TYPE_CHECKING:
    from mechatlas.app.commands.evaluate import EvaluateResult
    from mechatlas.maths.bootstrap import Estimate

CURVES = {"fvu": "FVU", "fvu_median": "FVU, median row", "loss_recovered": "loss recovered"}
"""Figures drawn over all dictionaries."""
WAYS = {
    "intact": "intact",
    "spliced": "reconstruction",
    "mean_ablated": "mean",
    "zero_ablated": "zeros",
}
"""Ways in which the site is written, in the words of the page."""
FIGURES = ("worth", "losses", "density")
"""Figures, the one that says most first."""


def chapter(runs: Runs, on_progress: Progress) -> Chapter | None:
    """Compare all runs of `mechatlas evaluate`.

    Raises:
        DiskError: A result is damaged.
    """
    finished = runs.of_kind(EVALUATION)
    if not finished:
        return None
    results: list["EvaluateResult"] = [run.typed_result() for run in finished]
    on_progress(1, 1)
    rows = [
        {"name": run.name, "number": k, "result": result,
         "of_run": runs.dictionary_at(run.manifest.get("dictionary", ""))}
        for k, (run, result) in enumerate(zip(finished, results, strict=True))
    ]  # fmt: skip
    figures = {"density": _densities(rows)}
    if any(result.spliced.loss for result in results):
        figures["losses"] = _losses(rows)
    if len(rows) > 2:
        figures["worth"] = _curves(rows)
    return Chapter(
        name="evaluation",
        title="Evaluation",
        html=render("evaluation.html", rows=rows, ways=WAYS, figures=figures),
        figures=figures,
        findings=_findings(results, [name for name in FIGURES if name in figures]),
    )


def _findings(results: list["EvaluateResult"], figures: list[str]) -> list[Finding]:
    """Sum up each dictionary, the best one with a figure."""
    found = sorted(map(_finding, results, range(len(results))), key=lambda f: -f.strength)
    return [dataclasses.replace(found[0], figure=figures[0]), *found[1:]]


def _finding(result: "EvaluateResult", k: int) -> Finding:
    """Sum up what a dictionary is worth."""

    def interval(e: "Estimate", write: Any) -> str:
        return f"{write(e.value)} [{write(e.low)}, {write(e.high)}]"

    spliced = result.spliced
    evidence = (
        f"95% intervals over {result.samples:,} held-out samples; KL divergence "
        f"{interval(spliced.kl_divergence, number)} nats, same answer "
        f"{interval(spliced.agreement, percent)}, FVU {interval(result.fvu, number)}."
    )
    if (recovered := result.loss_recovered) is not None:
        text = (
            f"With {result.site} replaced by its dictionary's reconstruction, the network keeps "
            f"{interval(recovered, percent)} of what it loses when the site is set to zero."
        )
    else:
        text = (
            f"With {result.site} replaced by its dictionary's reconstruction, the network gives "
            f"the same answer in {interval(spliced.agreement, percent)} of the cases."
        )
    strength = (recovered or spliced.agreement).value
    return Finding(text=text, evidence=evidence, anchor=f"evaluation-{k}", strength=strength)


def _densities(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Histogram of how often latents are active, for each dictionary."""
    traces = []
    for k, row in enumerate(rows):
        bins = row["result"].density
        traces.append({
            "type": "scatter", "mode": "lines+markers", "name": row["name"],
            "x": ["never", *(percent(b.high) for b in bins[1:])],
            "y": [b.share.value for b in bins],
            "marker": {"size": 5, "color": category(k)}, "line": {"color": category(k)},
            "hovertemplate": "active in up to %{x} of rows<br>%{y:.1%} of the latents",
        })  # fmt: skip
    return {
        "data": traces,
        "layout": {
            "xaxis": {"title": {"text": "density: share of rows, up to"}, "type": "category"},
            "yaxis": {"title": {"text": "latents"}, "tickformat": ".0%", "rangemode": "tozero"},
            "showlegend": len(rows) > 1,
        },
    }


def _losses(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Loss with the site written in each way."""
    traces = []
    for k, (way, words) in enumerate(WAYS.items()):
        losses = [getattr(row["result"], way).loss for row in rows]
        shown = [(row["name"], e) for row, e in zip(rows, losses, strict=True) if e is not None]
        traces.append({
            "type": "bar", "name": words, "x": [name for name, _ in shown],
            "y": [e.value for _, e in shown], "error_y": _bars([e for _, e in shown]),
            "marker": {"color": category(k)},
            "hovertemplate": f"%{{x}}, {words}<br>%{{y:.3f}} nats<extra></extra>",
        })  # fmt: skip
    return {
        "data": traces,
        "layout": {"barmode": "group", "yaxis": {"title": {"text": "loss (nats)"}},
                   "xaxis": {"type": "category"}},
    }  # fmt: skip


def _curves(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Error and loss recovered over the dictionaries, in the order of the page."""
    traces = []
    for k, (key, words) in enumerate(CURVES.items()):
        found = [(row["name"], getattr(row["result"], key)) for row in rows]
        shown = [(name, e) for name, e in found if e is not None]
        traces.append({
            "type": "scatter", "mode": "lines+markers", "name": words,
            "x": [name for name, _ in shown], "y": [e.value for _, e in shown],
            "error_y": _bars([e for _, e in shown]),
            "marker": {"color": category(k)}, "line": {"color": category(k)},
            "hovertemplate": f"%{{x}}<br>{words} %{{y:.3f}}<extra></extra>",
        })  # fmt: skip
    return {
        "data": traces,
        "layout": {"xaxis": {"type": "category"}, "yaxis": {"title": {"text": "share"},
                   "rangemode": "tozero"}},
    }  # fmt: skip


def _bars(estimates: "list[Estimate]") -> dict[str, Any]:
    """Interval of each estimate."""
    return {
        "type": "data",
        "array": [e.high - e.value for e in estimates],
        "arrayminus": [e.value - e.low for e in estimates],
    }
