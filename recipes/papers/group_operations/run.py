"""Train many group-operation networks, bound each, and compare with the paper's figures.

    python recipes/papers/group_operations/run.py                 # 5 networks each: minutes
    python recipes/papers/group_operations/run.py --n-seeds 100   # as in the paper
    python recipes/papers/group_operations/run.py --groups S6 --n-seeds 1 --checkpoints 0

Wu, Jaburi, Drori and Gross (ICLR 2025) bound 100 networks of S5. Below `--out` are the runs
`GROUP/nets` and `GROUP/proof_SEED`, `paper.json` and `paper.html` (all numbers, with the paper's
beside), `scatter.html` (bound against time, as a share of brute force in float32) and
`training.html` (which irreps carry the energy of the weights at which step, beside accuracy and
bound, of the first `--followed` networks; `--checkpoints 0` leaves it out). The settings of each
group are those of `recipes/groups`; a network on S6 takes four CPU minutes, one on S5 twenty
seconds. Runs that are there already are not made again, so that the same command continues one
that was stopped.
"""

import argparse
import dataclasses
import itertools
import runpy
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots

from mechatlas.analysis.proofs.training_course import (
    PURE,
    TrainingCourse,
    first_lasting,
    follow_training,
)
from mechatlas.analysis.proofs.verifier.structures import Weights
from mechatlas.app.cli import run_script
from mechatlas.app.commands.group_net import TABLE, GroupNetConfig, checkpoint_file, net_file
from mechatlas.app.commands.prove import ProveConfig
from mechatlas.app.recipes import read_recipe
from mechatlas.app.run_folder import RESULT, execute
from mechatlas.files import read_json, write, write_json
from mechatlas.maths.named_groups import group
from mechatlas.tensorfiles import read_tensors

RECIPES = Path(__file__).parents[2] / "groups"
_SIDE = runpy.run_path(str(Path(__file__).parents[1] / "side_by_side.py"))
Row, write_paper = _SIDE["Row"], _SIDE["write_paper"]
TITLE = "Unifying and verifying mechanistic interpretations: group operations (Wu et al., 2025)"
MISSING = ["the authors' own networks: mechatlas prove WEIGHTS.safetensors --table TABLE.npy"]
PAPER = {"S5": {"n_nets": 100, "share_at_095": 0.45, "time_over_brute_force": 0.3}}
"""Figures of the paper: networks, share of bounds of at least 0.95, cost of verification."""
CERTIFIED = 0.95
FLOATS = ("f32", "f64")
VISIBLE = 0.02
"""Share of the variance that an irrep must reach at some step to be drawn."""
SIDE_BY_SIDE = 10
"""Networks trained in one run; a run that is stopped is begun anew."""


def bound_nets(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train and bound the networks of a group, unless that is done."""
    rows = []
    for first in range(0, options.n_seeds, SIDE_BY_SIDE):
        n_seeds = min(SIDE_BY_SIDE, options.n_seeds - first)
        folder = options.out / name / f"nets_{first}_{n_seeds}"
        changes = {"seed": first, "n_seeds": n_seeds, "out": folder}
        changes["n_checkpoints"] = options.checkpoints if first < options.followed else 0
        recipe = read_recipe(RECIPES / f"{name.lower()}.toml", GroupNetConfig)
        config = GroupNetConfig(**{**vars(recipe), **changes})
        if not (folder / RESULT).is_file():
            execute(config)
        accuracies = read_json(folder / RESULT)["accuracies"]
        for seed, accuracy in enumerate(accuracies, start=first):
            proof = options.out / name / f"proof_{seed}"
            if not (proof / RESULT).is_file():
                weights = folder / net_file(config, seed)
                execute(ProveConfig(weights=weights, table=folder / TABLE, out=proof, compare=True))
            result = read_json(proof / RESULT)
            names = ("accuracy_bound", "multiply_adds_share", "seconds_verify", "why")
            row = {"group": name, "seed": seed, "accuracy": accuracy}
            row |= {key: result[key] for key in names}
            for f in FLOATS:
                row[f"time_over_{f}"] = (
                    result["seconds_verify"] / result[f"seconds_brute_force_{f}"]
                )
            course = {"course": None}
            if seed < options.followed:
                course = course_of(config, seed, options.out / name / f"course_{seed}.json")
            rows.append(row | course)
            print(
                f"{name} seed {seed}: accuracy {accuracy:.4f}, bound {row['accuracy_bound']:.4f}, "
                f"verification {row['time_over_f32']:.2f} of brute force in float32",
                flush=True,
            )
    return rows


def course_of(config: GroupNetConfig, seed: int, file: Path) -> dict[str, Any]:
    """Follow the training of a network through its checkpoints, unless that is done or none are."""
    steps = config.checkpoints()
    paths = {step: config.out / checkpoint_file(config, seed, step) for step in steps}
    if not paths or not all(path.is_file() for path in paths.values()):
        return {"course": None}
    if not file.is_file():
        nets = {
            step: Weights(**{k: v.numpy() for k, v in read_tensors(path).items()})
            for step, path in paths.items()
        }
        course = follow_training(nets, group(config.group))
        plain = {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in dataclasses.asdict(course).items()
        }
        write_json(file, plain)
    return {"course": read_json(file)}


def courses_of(rows: list[dict[str, Any]]) -> list[TrainingCourse]:
    """Courses of the trainings of some networks."""
    courses = []
    for plain in (row["course"] for row in rows if row["course"]):
        values = {k: np.array(v) if isinstance(v, list) else v for k, v in plain.items()}
        courses.append(TrainingCourse(**{**values, "irreps": tuple(plain["irreps"])}))
    return courses


def rows_of_training(name: str, rows: list[dict[str, Any]]) -> list[Any]:
    """Lines of the page about what is learned when, if checkpoints were kept."""
    courses = courses_of(rows)
    if not courses:
        return []

    def median(holds: list[np.ndarray]) -> str:
        found = [first_lasting(c.steps, h) for c, h in zip(courses, holds, strict=True)]
        known = [step for step in found if step is not None]
        if not known:
            return "never"
        return f"step {statistics.median(known):.0f}" + (
            f" ({len(known)} of {len(found)})" if len(known) < len(found) else ""
        )

    learned = [course.learned_at() for course in courses]
    irreps = sorted({irrep for each in learned for irrep in each})
    parts = []
    for irrep in irreps:
        own = [each[irrep] for each in learned if irrep in each]
        first = sum(each[irrep] == min(each.values()) for each in learned if irrep in each)
        parts.append(
            f"{irrep} in {len(own)} networks, median step {statistics.median(own):.0f}, first (or "
            f"as early as any) in {first}"
        )
    pure = [c.neurons.sum(axis=1) for c in courses]
    events = {
        "half of the final single-irrep neurons": [n >= n[-1] / 2 for n in pure],
        "accuracy of 0.99": [c.accuracy >= 0.99 for c in courses],
        f"bound of {CERTIFIED}": [c.bound >= CERTIFIED for c in courses],
    }
    note = f"single-irrep: at least {PURE:.0%} of left, right and unembedding each in one irrep"
    return [
        Row(
            f"{name}: step at which irreps are learned", "; ".join(parts), "not in the paper", note
        ),
        Row(
            f"{name}: median step from which on there is",
            "; ".join(f"{event}: {median(holds)}" for event, holds in events.items()),
            "not in the paper",
            f"looked at {len(courses[0].steps)} steps",
        ),
    ]


def draw_training(rows: list[dict[str, Any]]) -> str:
    """Draw irreps, accuracy, bound and neurons over training: a line of two panels for a group."""
    names = list(dict.fromkeys(row["group"] for row in rows if row["course"]))
    titles = [
        title
        for name in names
        for title in (
            f"{name}: share of the variance of the weights in each irrep",
            f"{name}: accuracy, bound and neurons",
        )
    ]
    figure = make_subplots(
        rows=len(names), cols=2, subplot_titles=titles, horizontal_spacing=0.06,
        vertical_spacing=0.25 / len(names),
    )  # fmt: skip
    for at, name in enumerate(names, start=1):
        courses = courses_of([row for row in rows if row["group"] == name])
        draw_irreps(figure, at, courses)
        draw_network(figure, at, courses)
        top = {"y": 1 - (at - 1) / len(names), "yanchor": "top", "x": 1.01}
        figure.update_layout({legend_of(at): {**top, "tracegroupgap": 8}})
    figure.update_xaxes(type="log", title="step of training", dtick=1)
    figure.update_yaxes(range=[-0.02, 1.04])
    figure.update_layout(
        height=360 * len(names) + 80, width=1200, template="plotly_white",
        title="What is learned when. Thick: mean of the networks; thin: each of them.",
    )  # fmt: skip
    return figure.to_html(include_plotlyjs=True)


def legend_of(at: int) -> str:
    """Name of the legend beside a line of panels."""
    return "legend" if at == 1 else f"legend{at}"


def draw_irreps(figure: go.Figure, at: int, courses: list[TrainingCourse]) -> None:
    """Draw the energy of each irrep that ever has some, strongest at the end first."""
    steps, energy = courses[0].steps, np.mean([c.energy for c in courses], axis=0)
    order = [k for k in np.argsort(-energy[-1]) if k and energy[:, k].max() >= VISIBLE]
    for k, color in zip(order, itertools.cycle(qualitative.D3), strict=False):
        line = {"color": color, "width": 3}
        figure.add_scatter(
            x=steps, y=energy[:, k], name=courses[0].irreps[k], line=line, legendgroup="irreps",
            legendgrouptitle_text="irreps", legend=legend_of(at), row=at, col=1,
        )  # fmt: skip
        for course in courses if len(courses) > 1 else ():
            thin = {"color": color, "width": 0.6}
            figure.add_scatter(
                x=steps, y=course.energy[:, k], mode="lines", line=thin, hoverinfo="skip",
                showlegend=False, row=at, col=1,
            )  # fmt: skip


def draw_network(figure: go.Figure, at: int, courses: list[TrainingCourse]) -> None:
    """Draw accuracy, bound, and neurons as a share of the width."""
    curves = {
        "accuracy": [c.accuracy for c in courses],
        "bound": [c.bound for c in courses],
        "single-irrep neurons, of all": [c.neurons.sum(axis=1) / c.width for c in courses],
        "neurons in circuits, of all": [c.in_circuits / c.width for c in courses],
    }
    colors = ("#222222", "#c8102e", "#0072b2", "#56b4e9")
    for (name, values), color in zip(curves.items(), colors, strict=True):
        line = {"color": color, "width": 3, "dash": "dot" if "neurons" in name else "solid"}
        figure.add_scatter(
            x=courses[0].steps, y=np.mean(values, axis=0), name=name, line=line,
            legendgroup="network", legendgrouptitle_text="network", legend=legend_of(at),
            row=at, col=2,
        )  # fmt: skip
        for each in values if len(courses) > 1 and "neurons" not in name else ():
            thin = {"color": color, "width": 0.6}
            figure.add_scatter(
                x=courses[0].steps, y=each, mode="lines", line=thin, hoverinfo="skip",
                showlegend=False, row=at, col=2,
            )  # fmt: skip


def summarize(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares and medians of a group's networks, with the paper's beside."""
    certified = [row for row in rows if row["accuracy_bound"] >= CERTIFIED]
    times = {
        f"median_time_over_{f}": statistics.median(row[f"time_over_{f}"] for row in certified)
        if certified
        else None
        for f in FLOATS
    }
    return {
        "n_nets": len(rows),
        "share_at_095": len(certified) / len(rows),
        "mean_bound": statistics.mean(row["accuracy_bound"] for row in rows),
        **times,
        "paper": PAPER.get(name),
    }


def row_of(name: str, summary: dict[str, Any]) -> Any:
    """One group's line of the page."""
    paper, time = summary["paper"], summary["median_time_over_f32"]
    return Row(
        f"{name}: share of networks with a bound of at least {CERTIFIED}",
        f"{summary['share_at_095']:.0%} of {summary['n_nets']}, mean bound "
        f"{summary['mean_bound']:.3f}; verification in "
        + ("-" if time is None else f"{time:.2f}")
        + " of the time of brute force in float32 (median)",
        f"{paper['share_at_095']:.0%} of {paper['n_nets']}, in {paper['time_over_brute_force']} of "
        "the time"
        if paper
        else "in its appendix",
        "the paper's time is against its own brute force",
    )


def draw(rows: list[dict[str, Any]]) -> str:
    """Draw the bound of each network against the time of its verification."""
    figure = go.Figure()
    for name in dict.fromkeys(row["group"] for row in rows):
        own = [row for row in rows if row["group"] == name]
        figure.add_scatter(
            x=[row["time_over_f32"] for row in own],
            y=[row["accuracy_bound"] for row in own],
            text=[f"seed {row['seed']}: {row['why']}" for row in own],
            mode="markers",
            name=name,
        )
    figure.update_layout(
        xaxis_title="time of verification / brute force in float32",
        yaxis_title="certified accuracy",
        yaxis_range=[-0.02, 1.02],
    )
    return figure.to_html(include_plotlyjs=True)


def main() -> None:
    """Train, bound, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/papers/group_operations"))
    parser.add_argument("--n-seeds", type=int, default=5, help="networks of each group")
    parser.add_argument("--groups", nargs="+", default=["S4", "A5", "S5"])
    parser.add_argument(
        "--checkpoints", type=int, default=10, help="steps at which a training is looked at"
    )
    parser.add_argument(
        "--followed", type=int, default=3, help="networks of each group whose training is followed"
    )
    options = parser.parse_args()
    if options.checkpoints < 0:
        parser.error(f"--checkpoints must be at least 0, got {options.checkpoints}.")
    if options.n_seeds < 1:
        parser.error(f"--n-seeds must be at least 1, got {options.n_seeds}.")
    rows: list[dict[str, Any]] = []
    summaries = {}
    for name in options.groups:
        own = bound_nets(name, options)
        rows += own
        summaries[name] = summarize(name, own)
    lines = [row_of(*pair) for pair in summaries.items()]
    for name in options.groups:
        lines += rows_of_training(name, [row for row in rows if row["group"] == name])
    write_paper(
        options.out, TITLE, lines, MISSING, {"groups": summaries, "networks": rows}
    )  # fmt: skip
    if any(row["course"] for row in rows):
        write(options.out / "training.html", draw_training(rows).encode())
    write(options.out / "scatter.html", draw(rows).encode())
    print("\ngroup  networks  bound >= 0.95  mean bound  time/f32  time/f64   (paper)")
    for name, s in summaries.items():
        paper = f"{s['paper']['share_at_095']:.0%} of {s['paper']['n_nets']}" if s["paper"] else "-"
        f32, f64 = (
            "-" if s[f"median_time_over_{f}"] is None else f"{s[f'median_time_over_{f}']:.2f}"
            for f in FLOATS
        )
        print(
            f"{name:5}  {s['n_nets']:8}  {s['share_at_095']:13.0%}  {s['mean_bound']:10.4f}"
            f"  {f32:>8}  {f64:>8}   {paper}"
        )
    print(f"\nWritten: {options.out / 'scatter.html'}")


if __name__ == "__main__":
    run_script(main)
