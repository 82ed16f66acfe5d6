"""Cost of a proof relative to brute force, by order of the group and noise.

Run: `python benchmarks/scaling_proofs.py --out scaling.png`. Prints a table and the fitted
exponents, and draws both ratios in a log-log plot. What is in scaling.json is not done again.
Synthetic circuits (full grids B x B', about 128 neurons) on groups of order 24 to 720. Times are
medians of process CPU seconds, brute force and verification in turn (S6: once).

Theory: brute force takes n^3 m multiply-adds and the first stage of a proof n^2 m c, where c
does not depend on n, so the ratio falls as n^-1 while rho-sets stay as small as they are.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from bench_proofs import compare
from matplotlib.figure import Figure
from tests.analysis.proofs.planted import wide

from mechatlas.maths.named_groups import group

GROUPS = ("S4", "A5", "S5", "PSL(2,7)", "A6", "S6")
NOISES = (0.0, 0.003, 0.02)


def measure(name: str, noise: float) -> dict[str, float | str]:
    """One group at one noise level."""
    of = group(name)
    weights = wide(of, noise=noise, seed=0)
    measured = compare(weights, of, 15 if of.order < 150 else 7 if of.order < 500 else 1)
    return {
        "group": name,
        "order": of.order,
        "width": weights.left.shape[1],
        "noise": noise,
        "bound": measured["accuracy_bound"],
        "multiply_adds": measured["multiply_adds_share"],
        "time": measured["verify_over_f64"],
        "seconds_verify": measured["seconds_verify"],
        "seconds_brute_force_f64": measured["seconds_f64"],
    }


def exponent(rows: list[dict], key: str) -> float:
    """Slope of log(ratio) against log(order), by least squares."""
    x = [math.log(row["order"]) for row in rows]
    return float(np.polyfit(x, [math.log(row[key]) for row in rows], 1)[0])


def draw(rows: list[dict], fits: list[dict], out: Path) -> None:
    """Draw both ratios against the order, and the theory."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for key, style in (("multiply_adds", "-"), ("time", ":")):
        for number, fit in enumerate(fits):
            mine = [row for row in rows if row["noise"] == fit["noise"]]
            axes.loglog(
                [row["order"] for row in mine], [row[key] for row in mine], style, marker="o",
                color=f"C{number}",
                label=f"{key.replace('_', '-')}, noise {fit['noise']:g}: n^{fit[key]:.2f}",
            )  # fmt: skip
    axes.loglog([24, 720], [12 / 24, 12 / 720], "k--", label="theory: n^-1")
    axes.set(xlabel="order of the group", ylabel="verification as a share of brute force")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=110)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("scaling.png"))
    parser.add_argument("--noises", nargs="*", type=float, default=NOISES)
    parser.add_argument("--groups", nargs="*", default=GROUPS, help="those to measure now")
    options = parser.parse_args()
    out, kept = options.out, options.out.with_suffix(".json")
    done = json.loads(kept.read_text())["rows"] if kept.exists() else []
    done = {(row["group"], row["noise"]): row for row in done}
    rows = []
    print("group      n    m  noise   bound  multiply-adds   time (float64)")
    for noise in NOISES:
        for name in GROUPS:
            row = done.get((name, noise))
            if row is None and (name not in options.groups or noise not in options.noises):
                continue
            row = row or measure(name, noise)
            rows.append(row)
            done[name, noise] = row
            kept.write_text(json.dumps({"rows": list(done.values())}))
            print(
                f"{name:8} {row['order']:4} {row['width']:4}  {noise:<6g} {row['bound']:.4f}"
                f"  {row['multiply_adds']:.4f}         {row['time']:.4f}",
                flush=True,
            )
    fits = []
    for noise in NOISES:
        mine = [row for row in rows if row["noise"] == noise]
        large = [row for row in mine if row["order"] >= 120]
        if len(large) < 2:
            continue
        fits.append({"noise": noise, **{k: exponent(mine, k) for k in ("multiply_adds", "time")}})
        tail = {k: exponent(large, k) for k in ("multiply_adds", "time")}
        print(
            f"noise {noise:g}: multiply-adds n^{fits[-1]['multiply_adds']:.2f}, time "
            f"n^{fits[-1]['time']:.2f}; from n = 120 on n^{tail['multiply_adds']:.2f}, "
            f"n^{tail['time']:.2f} (theory n^-1)"
        )
    draw(rows, fits, out)
    kept.write_text(json.dumps({"rows": list(done.values()), "fits": fits}, indent=1))
    print(f"Drawn: {out}")


if __name__ == "__main__":
    main()
