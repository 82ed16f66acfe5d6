"""Recovery of planted atoms by our trainer and by others.

    python benchmarks/compare_recovery.py

Rows are sparse sums of known atoms, 4 or 8 times as many as dimensions, with noise of several
levels. Every trainer gets the same rows, batches, steps, k (that of the rows) and as many latents
as there are atoms, and each learning rate of `--lrs`; of these the one counts whose
reconstruction of held-out rows is best, for each trainer and problem, without a look at the
atoms. All rates fall to 0 over the last `--decay` of the steps (those of the plain trainer and of
Overcomplete stay level). With `--dead-after` all of them revive latents (AuxK, weight 1/32 where
it can be chosen) that so many rows did not use; 0 is what each library does by itself, which for
ours is nothing.
Recovery is the mean over the planted atoms of the best cosine with any learnt atom, and, one to
one (the pairing with the largest sum), the mean cosine and the share above 0.9. Beside the
trainers stand as many random atoms, which find nothing.

What has been measured is in `results.jsonl`; run again, only what is missing or failed is.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import compare_training as training
import numpy as np
from peers.activations import write_planted
from scipy.optimize import linear_sum_assignment


def recovery(planted: np.ndarray, learnt: np.ndarray) -> dict[str, float]:
    """Compare planted atoms with learned ones: best cosine, and one to one."""
    lengths = np.linalg.norm(learnt, axis=1, keepdims=True)
    cosines = planted @ (learnt / np.maximum(lengths, 1e-12)).T
    pairs = cosines[linear_sum_assignment(cosines, maximize=True)]
    return {
        "best": round(float(cosines.max(axis=1).mean()), 4),
        "one_to_one": round(float(pairs.mean()), 4),
        "found": round(float((pairs > 0.9).mean()), 4),
    }


def measure(
    trainer: str,
    setting: training.Setting,
    rows: Path,
    planted: np.ndarray,
    options: argparse.Namespace,
    seed: int,
    dead_after: int,
) -> dict[str, Any]:
    """Train once and compare the atoms."""
    kept = options.out / "atoms.npy"
    kept.unlink(missing_ok=True)
    words = training.command(trainer, setting, rows, options)
    words += [f"--atoms={kept}", f"--seed={seed}", f"--dead-after={dead_after}"]
    words += [f"--decay={options.decay}"]
    result = training.run(trainer, words, setting, options.timeout)
    if "fvu" in result:
        learnt = np.load(kept)
        result |= recovery(planted, learnt if learnt.shape == planted.shape else learnt.T)
    return result


def random_atoms(planted: np.ndarray) -> dict[str, float]:
    """Measure the control: atoms that were never trained."""
    random = np.random.default_rng(99)
    return recovery(planted, random.standard_normal(planted.shape, dtype=np.float32))


def row(name: str, found: list[dict[str, Any]]) -> str:
    """A line of the table: of each seed the best learning rate, then means over seeds."""
    best = [min(runs, key=lambda r: r["fvu"]) for runs in _by_seed(found)]
    mean = {key: np.mean([r[key] for r in best]) for key in ("best", "one_to_one", "found", "fvu")}
    rates = ", ".join(sorted({f"{r['lr']:g}" for r in best}))
    seconds = np.mean([r["step_s"] for r in best]) * 1000
    return (
        f"| {name} | {mean['best']:.3f} | {mean['one_to_one']:.3f} | {mean['found']:.3f} "
        f"| {mean['fvu']:.4f} | {rates} | {seconds:.1f} |"
    )


def _by_seed(found: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [[r for r in found if r["seed"] == seed] for seed in sorted({r["seed"] for r in found})]


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=Path, default=training.HERE.parent / ".venv-peers")
    parser.add_argument(
        "--only", nargs="+", choices=training.TRAINERS, default=list(training.TRAINERS)
    )
    parser.add_argument("--d-in", type=int, default=64)
    parser.add_argument("--superposition", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--noise", nargs="+", type=float, default=[0.0, 0.2, 0.5])
    parser.add_argument("--at-once", type=int, default=4, help="atoms in a row, and k")
    parser.add_argument("--lrs", nargs="+", type=float, default=[3e-3, 1e-2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--rows", type=int, default=131072)
    parser.add_argument("--decay", type=float, default=0.2)
    parser.add_argument("--dead-after", nargs="+", type=int, default=[0, 10_000])
    parser.add_argument("--core", default="0", help="for taskset; empty for no pinning")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one run")
    parser.add_argument("--out", type=Path, default=Path("runs/compare_recovery"))
    return parser.parse_args()


def settle(
    name: str,
    planted: np.ndarray,
    dead_after: int,
    results: training.Results,
    options: argparse.Namespace,
) -> dict[str, list[dict[str, Any]]]:
    """Measure what is missing on one problem; what was found, by trainer."""
    found: dict[str, list[dict[str, Any]]] = {trainer: [] for trainer in options.only}
    for seed, lr, trainer in itertools.product(options.seeds, options.lrs, options.only):
        setting = training.Setting(
            f"{options.d_in}x{len(planted)}", "topk", False, options.at_once,
            options.batch_size, options.steps, lr, 1,
        )  # fmt: skip
        key = (*results.key(setting, trainer, seed), name, dead_after, options.decay)
        if "step_s" not in results.found.get(key, {}):
            rows = options.out / f"{name}.npy"
            result = measure(trainer, setting, rows, planted, options, seed, dead_after)
            results.keep(key, result)
            print(
                f"{name} lr {lr:g} after {dead_after} {trainer}: {json.dumps(result)}", flush=True
            )
        if "fvu" in (result := results.found[key]):
            found[trainer].append({**result, "lr": lr, "seed": seed})
    return found


def main() -> None:
    """Measure and print."""
    options = parse()
    results = training.Results(options.out / "results.jsonl")
    tables = []
    for ratio, noise in itertools.product(options.superposition, options.noise):
        n_atoms = ratio * options.d_in
        name = f"planted_{options.rows}x{options.d_in}_{n_atoms}_{options.at_once}_{noise:g}"
        planted = write_planted(
            options.out / f"{name}.npy", options.rows, options.d_in, n_atoms,
            at_once=options.at_once, noise=noise,
        )  # fmt: skip
        control = random_atoms(planted)
        for dead_after in options.dead_after:
            found = settle(name, planted, dead_after, results, options)
            revived = f"revived after {dead_after} rows" if dead_after else "as each library does"
            lines = [
                f"### {ratio}:1 ({n_atoms} atoms in {options.d_in} dimensions), "
                f"{options.at_once} at once, noise {noise:g}; {options.steps} steps of "
                f"{options.batch_size}, {len(options.seeds)} seed(s), {revived}",
                "",
                "| trainer | best cosine | one to one | found | FVU | lr | CPU ms a step |",
                "|---|---|---|---|---|---|---|",
                *(row(trainer, runs) for trainer, runs in found.items() if runs),
                f"| random atoms | {control['best']:.3f} | {control['one_to_one']:.3f} "
                f"| {control['found']:.3f} | - | - | - |",
            ]
            tables.append("\n".join(lines))
            print(f"\n{tables[-1]}\n", flush=True)
    (options.out / "table.md").write_text("\n\n".join(tables) + "\n")


if __name__ == "__main__":
    main()
