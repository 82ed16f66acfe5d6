"""Error of our dictionaries and of others' after equally many rows, and in CPU seconds.

    python benchmarks/compare_quality.py --rows-file rows.npy --n-latents 2176 --steps 100 400

Every trainer gets the same rows and batches, the same k, and each learning rate of `--lrs`, all in
turns on one core; of the rates the one counts that explains held-out rows best, for each trainer
and number of steps. Ours also runs with the rate that it chooses by itself ("ours, default"). The
rate falls to 0 over the last `--decay` of the steps. A table is printed and kept as `table.md`,
and `quality.html` draws the error against rows and against CPU seconds of training. What has
been measured is in `results.jsonl`; run again, only what is missing or failed is.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import compare_training as training
import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

DEFAULT = 0.0
"""Learning rate that stands for the one that our trainer chooses."""


def measured(options: argparse.Namespace, results: training.Results) -> list[dict[str, Any]]:
    """Run what is missing; return every run that ended with its trainer, steps and rate."""
    d_in = np.load(options.rows_file, mmap_mode="r").shape[1]
    found = []
    for steps, lr, trainer in itertools.product(
        options.steps, (DEFAULT, *options.lrs), options.only
    ):
        if lr == DEFAULT and trainer != "ours":
            continue
        setting = training.Setting(
            f"{d_in}x{options.n_latents}", options.rule, False, options.k,
            options.batch_size, steps, lr, 1,
        )  # fmt: skip
        key = (*results.key(setting, trainer, 0), options.rows_file.name, options.decay)
        if "fvu" not in results.found.get(key, {}):
            words = training.command(trainer, setting, options.rows_file, options)
            words.append(f"--decay={options.decay}")
            result = training.run(trainer, words, setting, options.timeout)
            results.keep(key, result)
            print(f"{trainer} {steps} steps, lr {lr:g}: {result}", flush=True)
        if "fvu" in (result := results.found[key]):
            name = "ours, default" if lr == DEFAULT else trainer
            found.append({**result, "trainer": name, "steps": steps, "lr": lr})
    return found


def best(found: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Run with the least error, by trainer and in the order of steps."""
    chosen: dict[str, list[dict[str, Any]]] = {}
    for (name, _), runs in itertools.groupby(
        sorted(found, key=lambda r: (r["trainer"], r["steps"])),
        lambda r: (r["trainer"], r["steps"]),
    ):
        chosen.setdefault(name, []).append(min(runs, key=lambda r: r["fvu"]))
    return chosen


def table(chosen: dict[str, list[dict[str, Any]]]) -> str:
    """Errors and CPU seconds as a table in Markdown."""
    lines = ["| trainer | steps | lr | FVU | unused | CPU s |", "|---|---|---|---|---|---|"]
    for name, runs in chosen.items():
        for r in runs:
            lr = f"{r['lr']:g}" if r["lr"] else "its own"
            seconds, unused = r["step_s"] * r["steps"], r.get("unused", float("nan"))
            lines.append(
                f"| {name} | {r['steps']} | {lr} | {r['fvu']:.4f} | {unused:.2%} | {seconds:.1f} |"
            )
    return "\n".join(lines)


def draw(chosen: dict[str, list[dict[str, Any]]], batch_size: int, title: str) -> go.Figure:
    """Error against rows, and against CPU seconds of training."""
    figure = make_subplots(cols=2, shared_yaxes=True)
    colors = ["#1f77b4", "#17becf", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"]
    for color, (name, runs) in zip(colors, chosen.items(), strict=False):
        errors = [r["fvu"] for r in runs]
        style = {"name": name, "legendgroup": name, "line": {"color": color}}
        rows = [r["steps"] * batch_size for r in runs]
        figure.add_scatter(x=rows, y=errors, row=1, col=1, **style)
        seconds = [r["steps"] * r["step_s"] for r in runs]
        figure.add_scatter(x=seconds, y=errors, row=1, col=2, showlegend=False, **style)
    figure.update_xaxes(type="log", title="rows", col=1)
    figure.update_xaxes(type="log", title="CPU seconds", col=2)
    figure.update_yaxes(type="log", title="FVU (held out)", col=1)
    return figure.update_layout(title=title, width=900, height=420)


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows-file", type=Path, required=True, help="an .npy of activations")
    parser.add_argument("--n-latents", type=int, required=True)
    parser.add_argument("--peers", type=Path, default=training.HERE.parent / ".venv-peers")
    names = ["ours", "sparsify", "dictionary_learning", "saelens"]
    parser.add_argument("--only", nargs="+", choices=training.TRAINERS, default=names)
    parser.add_argument("--rule", default="topk", help="topk batchtopk jumprelu l1")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", nargs="+", type=int, default=[100, 400, 1600])
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--decay", type=float, default=0.2)
    parser.add_argument("--core", default="0", help="for taskset; empty for no pinning")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one run")
    parser.add_argument("--out", type=Path, default=Path("runs/compare_quality"))
    return parser.parse_args()


def main() -> None:
    """Measure, print and draw."""
    options = parse()
    chosen = best(measured(options, training.Results(options.out / "results.jsonl")))
    text = table(chosen)
    print(f"\n{text}")
    (options.out / "table.md").write_text(text + "\n")
    figure = draw(chosen, options.batch_size, options.rows_file.stem)
    figure.write_html(options.out / "quality.html", include_plotlyjs=True)


if __name__ == "__main__":
    main()
