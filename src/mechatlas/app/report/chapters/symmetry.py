"""Chapter on symmetry: counts of stabilizers, their lattice, families of features."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mechatlas.analysis.symmetry.class_names import NOT_SHOWN, rotation_subgroup
from mechatlas.analysis.symmetry.classify import label_classes
from mechatlas.app.old_runs import renamed_columns
from mechatlas.app.report.chapter import Chapter, count_of, number, part_for_each, percent
from mechatlas.app.report.dossiers import (
    Absence,
    FeatureAt,
    Finding,
    Statements,
    SymmetryLine,
    ZeroBlock,
    finite,
)
from mechatlas.app.report.paintings import as_webp
from mechatlas.app.report.palette import category
from mechatlas.app.report.runs import Run, Runs
from mechatlas.app.report.tuning_lines import stimulus_sheet, tuning_lines
from mechatlas.app.run_folder import FEATURES, SYMMETRY, SYMMETRY_TENSORS
from mechatlas.base import Progress
from mechatlas.maths.groups import Group

if TYPE_CHECKING:
    from mechatlas.app.commands.symmetry import SymmetryResult

MAX_WHEELS = 60
"""Maximum number of families drawn, largest first."""
MAX_NODES = 40
"""Number of classes above which a lattice shows only those with features."""
MEMBERS = 12
"""Members of a family that are named in a dossier."""
SHEET = "stimuli"
"""Name of the picture of all synthetic stimuli."""
PREDICTORS = {
    "linear": "best linear map",
    "dictionary": "this dictionary",
    "invariant": "the activation itself",
    "shuffled": "linear map, shuffled pairing",
}
"""Predictor of poses -> its name on the page."""


def chapter(runs: Runs, on_progress: Progress) -> Chapter | None:
    """Draw one section for every run of `mechatlas symmetry`.

    Raises:
        DiskError: A file of a run is damaged.
    """
    return part_for_each(
        "Symmetry", runs.of_kind(SYMMETRY), partial(_draw, runs), on_progress,
        scripts=("symmetry.js",),
    )  # fmt: skip


def _draw(runs: Runs, made: Chapter, k: int, run: Run) -> dict[str, Any]:
    """Draw a run."""
    of_run = runs.dictionary_at(run.manifest["dictionary"])
    result: "SymmetryResult" = run.typed_result()
    facts = run.manifest["group"]
    group = Group(facts["table"], name=facts["name"], element_names=facts["elements"])
    table = renamed_columns(run.table(FEATURES), SYMMETRY)
    tensors = renamed_columns(run.tensors(SYMMETRY_TENSORS), SYMMETRY)
    names = list(label_classes(facts["classes"]))
    colors = _class_colors(names, table["class"])
    made.figures[f"lattice{k}"] = _lattice(group, names, table["class"], colors)
    made.figures[f"r2{k}"] = _r2(result, group)
    if result.interventions.tested:
        made.figures[f"interventions{k}"] = _interventions(table, result.fdr)
    made.arrays[f"{k}/s"] = tensors["stabilizer_function"]
    table |= _claims(table)
    for key in ("q_value", "noise_ceiling", "similarity"):
        made.arrays[f"{k}/{key}"] = table[key].astype(np.float32)
    made.arrays[f"{k}/class"] = np.array([names.index(n) for n in table["class"]], np.uint16)
    families = _families(table, group)
    place = _Place(k, of_run, names, result.fdr)
    for found in _found(place, result, table, families):
        made.note(found)
    made.statements.extend(_lines(place, table, list(_zero_blocks(group, table, tensors))))
    tuned = tuning_lines(place.anchor, group, result.tuning, table, tensors)
    made.statements.extend((FeatureAt(of_run, i), line) for i, line in tuned)
    if not result.tuning.missing and SHEET not in made.images:
        made.images[SHEET] = as_webp(stimulus_sheet()[0])
    made.data.append({
        "run": of_run,
        "elements": list(group.element_names),
        "rotations": sorted(rotation_subgroup(group) or []),
        "classes": names,
        "colors": [colors.get(name, "") for name in names],
        "families": families,
        "fdr": result.fdr,
        "chance": finite(result.chance_similarity),
    })  # fmt: skip
    return {
        "result": result,
        "counts": _counts(group, names, table["class"], colors),
        "families": len(families),
        "claimed": int(_claimed(table, names).sum()),
        "r2_mean": [(words, result.r2_mean[key]) for key, words in PREDICTORS.items()],
    }


class _Place(NamedTuple):
    """Part of the chapter, and the dictionary that it speaks of."""

    number: int
    run: str
    classes: list[str]
    fdr: float

    @property
    def anchor(self) -> str:
        """Anchor of the part."""
        return f"symmetry-{self.number}"


def _found(
    place: _Place, result: "SymmetryResult", table: dict[str, Any], families: list[dict[str, Any]]
) -> list[Finding | Absence]:
    """Sum up stabilizers, families and interventions."""
    n, group = result.n_features, result.group.name
    control = (
        f"false discovery rate {percent(place.fdr)}; {number(result.discoveries_shuffled)} with "
        f"the pairing shuffled; median noise ceiling {number(result.noise_ceiling)}"
    )
    reliable = f"{result.reliable:,} of {n:,} features are measured well enough to tell"
    chance = f"Unrelated features reach a similarity of {number(result.chance_similarity)}"
    found: list[Finding | Absence] = []
    if result.families:
        elements = [tuple(dict.fromkeys(i for i in f["slots"] if i >= 0))[:6] for f in families[:3]]
        found.append(Finding(
            text=f"{count_of(result.features_in_families, 'feature')} of {result.site} come in "
            f"{count_of(result.families, 'family', 'families')} of one feature in several poses "
            f"({group}).",
            evidence=f"{chance}; {control}.",
            anchor=place.anchor,
            rows=tuple(tuple(FeatureAt(place.run, i) for i in row) for row in elements),
        ))  # fmt: skip
    else:
        found.append(Absence(
            text=f"No two features of {result.site} are shown to be poses of one another.",
            power=f"{chance}; {reliable}.",
            anchor=place.anchor,
        ))  # fmt: skip
    claimed = np.flatnonzero(_claimed(table, place.classes))
    if len(claimed):
        best = claimed[np.argsort(table["q_value"][claimed], kind="stable")][:6]
        found.append(Finding(
            text=f"{count_of(len(claimed), 'feature')} of {result.site} look the same in several "
            f"poses, {result.discoveries:,} of them exactly: the stabilizer in {group} is larger "
            "than {e}.",
            evidence=f"{control[0].upper()}{control[1:]}.",
            anchor=place.anchor,
            rows=(tuple(FeatureAt(place.run, int(i)) for i in best),),
        ))  # fmt: skip
    else:
        found.append(Absence(
            text=f"No feature of {result.site} is shown to be symmetric under {group}.",
            power=f"{reliable} ({control}).",
            anchor=place.anchor,
        ))  # fmt: skip
    return found


def _claims(table: dict[str, Any]) -> dict[str, Any]:
    """Stabilizer and q-value of what is claimed, which is approximate for some features."""
    if "grade" not in table:  # a run that is older than grades
        return {}
    approximate = table["grade"] == "approximate"
    elements = [
        table["approximate_elements" if near else "stabilizer_elements"][i]
        for i, near in enumerate(approximate)
    ]
    q = np.where(approximate, table["approximate_q_value"], table["q_value"])
    return {"q_value": q, "claimed_elements": elements}


def _claimed(table: dict[str, Any], classes: list[str]) -> np.ndarray:
    """Features with a stabilizer larger than {e} that is claimed, exactly or approximately."""
    return (table["class"] != classes[0]) & (table["class"] != NOT_SHOWN)


def _zero_blocks(
    group: Group, table: dict[str, Any], tensors: dict[str, np.ndarray]
) -> Iterator[list[ZeroBlock]]:
    """List the zero blocks of each feature; none if they were not tested."""
    names = group.element_names
    for i in range(len(table["class"])):
        classes = table["block_classes"][i] if "block_classes" in table else []
        blocks = []
        for g, name in enumerate(classes):
            if name != "present":
                key = "nu_reconstruction" if name == "decoupled" else "nu_error"
                ends = (finite(tensors[f"{key}{end}"][i, g]) for end in ("", "_low", "_high"))
                blocks.append((names[g], name, *ends, table["block_carriers"][i][g]))
        yield blocks


def _lines(place: _Place, table: dict[str, Any], zero: list[list[ZeroBlock]]) -> Statements:
    """Lines on the symmetry, the family and the zero blocks of each feature."""
    claimed, statements = _claimed(table, place.classes), []
    elements = table.get("claimed_elements", table["stabilizer_elements"])
    members: dict[int, list[tuple[int, str]]] = {}
    for i, (family, pose) in enumerate(zip(table["family"], table["pose_name"], strict=True)):
        members.setdefault(int(family), []).append((i, str(pose)))
    for i, name in enumerate(table["class"]):
        family = int(table["family"][i])
        line = SymmetryLine(
            anchor=place.anchor, part=place.number, name=str(name),
            order=len(elements[i]), claimed=bool(claimed[i]),
            q=finite(table["q_value"][i]), ceiling=finite(table["noise_ceiling"][i]),
            fdr=place.fdr, family=family, pose=str(table["pose_name"][i]),
            members=[each for each in members[family] if each[0] != i][:MEMBERS], zero=zero[i],
            likeness=_likeness(table, i),
        )  # fmt: skip
        statements.append((FeatureAt(place.run, i), line))
    return statements


def _likeness(
    table: dict[str, Any], i: int
) -> tuple[str, float | None, float | None, float | None] | None:
    """Class that a feature is most like itself under, with the similarity and its interval."""
    if "likeness" not in table:  # a run that is older
        return None
    value, low, high = (finite(table[f"likeness{end}"][i]) for end in ("", "_low", "_high"))
    return str(table["likeness_class"][i]), value, low, high


def _class_colors(names: list[str], of: np.ndarray) -> dict[str, str]:
    """Choose a color for each class that has features; classes without symmetry are pale."""
    there = [name for name in names if (of == name).any()]
    pale = {names[0]: "var(--faint)", NOT_SHOWN: "var(--pale)"}
    own = iter(category(k) for k in range(len(there)))
    return {name: pale.get(name) or next(own) for name in there}


def _counts(
    group: Group, names: list[str], of: np.ndarray, colors: dict[str, str]
) -> list[dict[str, Any]]:
    lattice = group.lattice()
    rows = [
        {
            "name": name,
            "kind": kind if each.order > 1 else "{e}",
            "order": each.order,
            "conjugates": each.size,
            "n": int((of == name).sum()),
        }
        for name, kind, each in zip(names, lattice.names, lattice.classes, strict=False)
    ]
    kept = [row for row in rows if row["n"] or len(rows) <= MAX_NODES]
    kept += [
        {"name": name, "kind": "", "order": None, "conjugates": None, "n": int((of == name).sum())}
        for name in names[len(rows) :]
        if name == NOT_SHOWN or (of == name).any()
    ]
    return [{**row, "share": row["n"] / len(of), "color": colors.get(row["name"], "transparent")}
            for row in kept]  # fmt: skip


def _lattice(
    group: Group, names: list[str], of: np.ndarray, colors: dict[str, str]
) -> dict[str, Any]:
    """Draw classes of subgroups by order, joined with the next larger ones that contain them."""
    lattice = group.lattice()
    counts = [int((of == name).sum()) for name in names]
    shown = list(range(len(lattice.classes)))
    if len(shown) > MAX_NODES:
        shown = [c for c in shown if counts[c] or c in (0, len(lattice.classes) - 1)]
    holds = lattice.contains[np.ix_(shown, shown)] > 0
    np.fill_diagonal(holds, False)
    covers = holds & ~(holds.astype(int) @ holds.astype(int) > 0)
    order = np.array([lattice.classes[c].order for c in shown])
    x, above = np.zeros(len(shown)), np.ones(len(shown), bool)
    for level in np.unique(order):
        row = np.flatnonzero(order == level)
        x[row] = (np.arange(len(row)) - (len(row) - 1) / 2) / max(1, len(row) - 1) ** 0.3
        above[row[1::2]] = False  # so that the names of neighbors do not meet
    y = np.log2(order)
    edges_x, edges_y = [], []
    for big, small in np.argwhere(covers):
        edges_x += [float(x[big]), float(x[small]), None]
        edges_y += [float(y[big]), float(y[small]), None]
    size = [12 + 34 * (counts[c] / max(max(counts), 1)) ** 0.5 for c in shown]
    nodes = {
        "type": "scatter", "mode": "markers+text", "x": x.tolist(), "y": y.tolist(),
        "text": [f"{names[c]}<br><b>{counts[c]:,}</b>" for c in shown],
        "textposition": np.where(above, "top center", "bottom center").tolist(),
        "hoverinfo": "text", "showlegend": False,
        "marker": {"size": size, "opacity": 1, "line": {"width": 0},
                   "color": [colors.get(names[c], "var(--line)") for c in shown]},
    }  # fmt: skip
    lines = {
        "type": "scatter", "mode": "lines", "x": edges_x, "y": edges_y, "hoverinfo": "skip",
        "showlegend": False, "line": {"width": 1, "color": "var(--pale)"},
    }  # fmt: skip
    levels = np.unique(order)
    bare = {"showgrid": False, "zeroline": False}
    wide = [float(x.min()) - 0.7, float(x.max()) + 0.7]
    return {
        "data": [lines, nodes],
        "layout": {
            "xaxis": {**bare, "visible": False, "range": wide},
            "yaxis": {**bare, "tickvals": np.log2(levels).tolist(), "ticktext": levels.tolist(),
                      "range": [-0.35, float(y.max()) + 0.6],
                      "title": {"text": "order of the stabilizer"}},
            "margin": {"l": 52, "r": 8, "t": 12, "b": 12},
        },
    }  # fmt: skip


def _r2(result: "SymmetryResult", group: Group) -> dict[str, Any]:
    traces = [
        {
            "type": "scatter", "mode": "lines+markers", "name": words,
            "x": list(group.element_names), "y": result.r2[key],
        }
        for key, words in PREDICTORS.items()
    ]  # fmt: skip
    return {
        "data": traces,
        "layout": {
            "yaxis": {"title": {"text": "R², held out"}, "range": [-0.5, 1.02]},
            "xaxis": {"type": "category"},
        },
    }


def _interventions(table: dict[str, Any], fdr: float) -> dict[str, Any]:
    """Draw the alignment of the intervention on each feature, beside both nulls."""
    shown = np.flatnonzero(np.isfinite(table["intervention_alignment"]))
    order = shown[np.argsort(-table["intervention_alignment"][shown], kind="stable")]
    rank = list(range(1, len(order) + 1))
    passed = np.nan_to_num(table["intervention_q_value"][order], nan=1.0) <= fdr
    traces = []
    for key, name, color in (
        ("intervention_null_alignment", "other features", "var(--pale)"),
        ("intervention_wrong_pose_alignment", "wrong pose", "var(--branch-1)"),
        ("intervention_alignment", "own pose", "var(--branch-0)"),
    ):
        own = key == "intervention_alignment"
        symbol = ["circle" if ok or not own else "circle-open" for ok in passed]
        values = table[key][order]
        traces.append({
            "type": "scatter", "mode": "markers", "name": name, "x": rank,
            "y": [float(v) if np.isfinite(v) else None for v in values],
            "text": [f"feature {i}" for i in order],
            "hovertemplate": "%{text}: %{y:.2f}<extra>" + name + "</extra>",
            "marker": {"color": color, "size": 7 if own else 5, "symbol": symbol},
        })  # fmt: skip
    return {
        "data": traces,
        "layout": {
            "xaxis": {"title": {"text": "features, most aligned first"}},
            "yaxis": {"title": {"text": "alignment"}},
        },
    }


def _families(table: dict[str, Any], group: Group) -> list[dict[str, Any]]:
    """List the largest families, with the feature in each pose of the reference."""
    families = []
    for family in range(MAX_WHEELS):
        members = np.flatnonzero(table["family"] == family)
        if len(members) < 2:
            break
        reference = int(table["reference"][members[0]])
        stabilizer = sorted(table["stabilizer_elements"][reference])
        similarity = np.where(members == reference, np.inf, table["similarity"][members])
        slots = np.full(group.order, -1)
        for i in members[np.argsort(similarity, kind="stable")]:  # the most similar last: they stay
            slots[group.table[table["pose"][i], stabilizer]] = i
        families.append({
            "family": family,
            "reference": reference,
            "size": len(members),
            "class": str(table["class"][reference]),
            "slots": slots.tolist(),
            "members": members.tolist(),
            "poses": [str(name) for name in table["pose_name"][members]],
        })  # fmt: skip
    return families
