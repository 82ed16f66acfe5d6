"""Chapter on flow: where features of the residual stream come from, layer by layer."""

from functools import partial
from typing import TYPE_CHECKING, Any

from mechatlas.app.report.chapter import Chapter, number, part_for_each, percent
from mechatlas.app.report.dossiers import (
    Absence,
    FeatureAt,
    Finding,
    FlowLine,
    Statements,
    finite,
)
from mechatlas.app.report.palette import category
from mechatlas.app.report.runs import Run, Runs
from mechatlas.app.run_folder import FLOW, FLOWS
from mechatlas.base import Progress

if TYPE_CHECKING:
    from mechatlas.app.commands.flow import FlowResult

PASSED_ON, UNEXPLAINED = "passed on", "unexplained"
ALWAYS = {PASSED_ON, UNEXPLAINED}
"""Origins that need no dictionary of a module."""
SHOWN = 8
"""Tracks drawn."""


def chapter(runs: Runs, on_progress: Progress) -> Chapter | None:
    """Draw one part for every run of `mechatlas flow`.

    Raises:
        DiskError: A result is damaged.
    """
    return part_for_each(
        "Flow", runs.of_kind(FLOW), partial(_draw, runs), on_progress,
        scripts=("cards.js", "flow.js"),
    )  # fmt: skip


def _draw(runs: Runs, made: Chapter, k: int, run: Run) -> dict[str, Any]:
    """Draw a run."""
    result: "FlowResult" = run.typed_result()
    places = {
        name: runs.dictionary_at(path)
        for key, names in (("dictionaries", result.dictionaries), ("modules", result.modules))
        for name, path in zip(names, run.manifest[key], strict=True)
    }
    made.figures[f"origins{k}"] = _origins(result)
    made.figures[f"turnover{k}"] = _turnover(result)
    made.note(_finding(result, places, f"flow-{k}"))
    made.statements.extend(_lines(result, run.table(FLOWS), places, f"flow-{k}"))
    tracks = result.tracks[:SHOWN]
    made.data.append([
        [
            [point.dictionary, places[point.dictionary], point.latent, point.origin,
             point.module, places.get(point.module, ""), point.module_latent,
             finite(point.cosine)]
            for point in track
        ]
        for track in tracks
    ])  # fmt: skip
    return {"result": result, "origins": _possible(result), "always": ALWAYS, "tracks": tracks}


def _possible(result: "FlowResult") -> list[str]:
    """Origins that some feature has, and those that are always possible."""
    found = {o for step in result.steps for o, count in step.counts.items() if count}
    return [o for o in result.steps[0].counts if o in found | ALWAYS]


def _finding(result: "FlowResult", places: dict[str, str], anchor: str) -> Finding | Absence:
    """Sum up the origins over all layers."""
    n = sum(step.n for step in result.steps)
    counts = {o: sum(step.counts[o] for step in result.steps) for o in result.steps[0].counts}
    known = {o: count for o, count in counts.items() if o != UNEXPLAINED and count}
    layers = f"{len(result.dictionaries)} layers of the residual stream"
    thresholds = [t for step in result.steps for t in step.thresholds.values() if t is not None]
    takes = f"; a link takes a cosine of {number(min(thresholds))} or more" if thresholds else ""
    evidence = f"False match rate {percent(result.fdr)} of the links to each dictionary{takes}."
    if not known:
        return Absence(
            text=f"Of {n:,} features in {layers}, none has an origin that is significant.",
            power=evidence,
            anchor=anchor,
        )
    listed = ", ".join(f"{percent(count / n)} {origin}" for origin, count in known.items())
    if result.tracks and (track := result.tracks[0]):
        evidence += (
            f" The longest track runs through {len(track)} layers, with a wrong link in it with a "
            f"probability of at most {percent(track[0].false_match_rate)}."
        )
    return Finding(
        text=f"Of {n:,} features in {layers}: {listed}.",
        evidence=evidence,
        anchor=anchor,
        rows=tuple(
            tuple(
                FeatureAt(places[track[at].dictionary], track[at].latent)
                for at in (0, len(track) - 1)
            )
            for track in result.tracks[:3]
        ),
    )


def _lines(
    result: "FlowResult", table: dict[str, Any], places: dict[str, str], anchor: str
) -> Statements:
    """Lines on the origin of each feature."""
    names, modules, statements = result.dictionaries, result.modules, []
    keys = ("layer", "latent", "origin", "before", "cosine", "q_value", "module", "module_latent",
            "module_cosine", "module_q_value", "first_layer", "false_match_rate")  # fmt: skip
    for row in zip(*(table[key].tolist() for key in keys), strict=True):
        (layer, latent, origin, before, cosine, q, module, of_module, module_cosine, module_q,
         first, wrong) = row  # fmt: skip
        earlier, written = names[layer - 1], modules[module] if module >= 0 else ""
        line = FlowLine(
            anchor=anchor,
            origin=origin,
            before=FeatureAt(places[earlier], before) if before >= 0 else None,
            before_name=earlier,
            cosine=finite(cosine),
            q=finite(q),
            module=FeatureAt(places[written], of_module) if written else None,
            module_name=written,
            module_cosine=finite(module_cosine),
            module_q=finite(module_q),
            since=names[first],
            wrong=finite(wrong),
            fdr=result.fdr,
        )
        statements.append((FeatureAt(places[names[layer]], latent), line))
    return statements


def _origins(result: "FlowResult") -> dict[str, Any]:
    """Share of each origin over the layers, stacked."""
    layers = [step.b for step in result.steps]
    traces = [
        {
            "type": "bar",
            "name": origin,
            "x": layers,
            "y": [step.shares[origin].value for step in result.steps],
            "customdata": [
                [step.shares[origin].low, step.shares[origin].high] for step in result.steps
            ],
            "marker": {"color": "var(--line)" if origin == UNEXPLAINED else category(k)},
            "hovertemplate": f"%{{x}}: %{{y:.1%}} {origin}<br>95% interval "
            "%{customdata[0]:.1%} to %{customdata[1]:.1%}<extra></extra>",
        }
        for k, origin in enumerate(result.steps[0].shares)
        if origin in _possible(result)
    ]
    return {
        "data": traces,
        "layout": {
            "barmode": "stack",
            "xaxis": {"type": "category"},
            "yaxis": {"title": {"text": "features"}, "tickformat": ".0%"},
        },
    }


def _turnover(result: "FlowResult") -> dict[str, Any]:
    """Births and deaths at each step, with intervals."""
    steps = [f"{step.a} to {step.b}" for step in result.steps]
    traces = []
    for k, (name, key) in enumerate((("no partner before", "births"), ("no partner on", "deaths"))):
        shares = [getattr(step, key) for step in result.steps]
        traces.append({
            "type": "scatter", "mode": "lines+markers", "name": name, "x": steps,
            "y": [s.value for s in shares],
            "error_y": {
                "type": "data",
                "array": [s.high - s.value for s in shares],
                "arrayminus": [s.value - s.low for s in shares],
            },
            "marker": {"color": category(k)},
            "line": {"color": category(k), "dash": ("solid", "dot")[k]},  # equal ones are both seen
            "hovertemplate": f"%{{x}}<br>%{{y:.1%}} {name}<extra></extra>",
        })  # fmt: skip
    return {
        "data": traces,
        "layout": {
            "xaxis": {"type": "category"},
            "yaxis": {"title": {"text": "features"}, "tickformat": ".0%"},
        },
    }
