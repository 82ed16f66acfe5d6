"""Our trainer against others, on the same rows, one process each, in turns.

    make bench-peers
    python benchmarks/compare_training.py --shapes 512x8192 --runs 5 --steps 12

Every trainer runs `--runs` times for a few steps on `--core` alone with one thread, all of them in
turns, so that a busy machine is busy for all. A table of medians is printed and kept as
`table.md`: CPU seconds of a step, the same over the one product with the encoder that no step can
avoid (measured in the same process), the same over ours, FVU on held-out rows, and peak and
added memory. What has been measured is in `results.jsonl`; run again, only what is missing or
failed is. A trainer that fails says why and the others go on.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from peers.activations import write_rows

HERE = Path(__file__).parent
TRAINERS = ("ours", "dense", "sparsify", "dictionary_learning", "saelens", "overcomplete")
OURS = ("ours", "dense")
"""Trainers that run in our own environment."""
COLUMNS = ("step_s", "product_s", "ratio", "fvu", "peak_mb", "added_mb")


@dataclasses.dataclass(frozen=True)
class Setting:
    """Settings common to all trainers."""

    shape: str
    rule: str
    tied: bool
    k: int
    batch_size: int
    steps: int
    lr: float
    threads: int

    @property
    def title(self) -> str:
        """Setting in words."""
        tied = ", tied" if self.tied else ""
        return (
            f"{self.shape}, {self.rule}, k={self.k}{tied}, batches of {self.batch_size}, "
            f"{self.steps} steps, lr {self.lr:g}, {self.threads} thread(s)"
        )


def command(trainer: str, setting: Setting, rows: Path, options: argparse.Namespace) -> list[str]:
    """Command line of a trainer, on one core where the system can."""
    python = sys.executable if trainer in OURS else str(options.peers / "bin" / "python")
    d_in, n_latents = setting.shape.split("x")
    arguments = {
        "rows": rows, "d-in": d_in, "n-latents": n_latents, "k": setting.k,
        "batch-size": setting.batch_size, "steps": setting.steps, "lr": setting.lr,
        "threads": setting.threads, "rule": setting.rule,
    }  # fmt: skip
    words = [python, str(HERE / "peers" / f"run_{trainer}.py")]
    words += [f"--{key}={value}" for key, value in arguments.items()]
    if setting.tied:
        words.append("--tied")
    if options.core and shutil.which("taskset"):
        words = ["taskset", "-c", options.core, *words]
    return words


def run(trainer: str, words: list[str], setting: Setting, timeout: float) -> dict[str, Any]:
    """Run a trainer once; give its line of output, or the reason of a failure."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for library in ("OMP", "MKL", "OPENBLAS", "NUMBA"):
        environment[f"{library}_NUM_THREADS"] = str(setting.threads)
    if trainer in OURS and "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=timeout, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {timeout:g} s"}
    except OSError as error:
        return {"failed": f"cannot be started ({error}); see tools/make_peers.sh"}
    for line in reversed(done.stdout.splitlines()):
        with contextlib.suppress(ValueError):  # libraries print too
            found = json.loads(line)
            if isinstance(found, dict) and {"step_s", "refused"} & set(found):
                diverged = not math.isfinite(found.get("fvu", 0.0))
                return {"failed": "training diverged"} if diverged else found
    last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
    return {"failed": f"exit code {done.returncode}: {''.join(last)[:300]}"}


class Results:
    """Measurements on disk, one line each; the last of each trainer and run counts."""

    def __init__(self, file: Path) -> None:
        self.file, self.found = file, {}
        if file.exists():
            for line in file.read_text().splitlines():
                with contextlib.suppress(ValueError):  # the last line of a run that was killed
                    kept = json.loads(line)
                    self.found[tuple(kept["key"])] = kept["result"]

    def key(self, setting: Setting, trainer: str, number: int) -> tuple[Any, ...]:
        """Fields that identify a run."""
        return (*dataclasses.astuple(setting), trainer, number)

    def keep(self, key: tuple[Any, ...], result: dict[str, Any]) -> None:
        """Add a measurement."""
        self.found[key] = result
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps({"key": key, "result": result}) + "\n")

    def of(self, setting: Setting, trainer: str, runs: int) -> list[dict[str, Any]]:
        """Measurements of a trainer, one for each run."""
        keys = [self.key(setting, trainer, number) for number in range(runs)]
        return [self.found[key] for key in keys if key in self.found]


def table(setting: Setting, results: Results, trainers: list[str], runs: int) -> str:
    """Medians as a table in Markdown."""
    lines = [
        f"### {setting.title}",
        "",
        "| trainer | version | runs | CPU s a step | over the product | over ours | FVU "
        "| peak MB | added MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    medians = {}
    for trainer in trainers:
        good = [r for r in results.of(setting, trainer, runs) if "step_s" in r]
        if good:
            medians[trainer] = {key: statistics.median(r[key] for r in good) for key in COLUMNS}
            medians[trainer] |= {"version": good[0]["version"], "runs": len(good)}
    ours = medians.get("ours", {}).get("step_s")
    for trainer, m in sorted(medians.items(), key=lambda item: item[1]["step_s"]):
        over = f"{m['step_s'] / ours:.2f}" if ours else "-"
        lines.append(
            f"| {trainer} | {m['version']} | {m['runs']} | {m['step_s']:.3f} | {m['ratio']:.2f} "
            f"| {over} | {m['fvu']:.4f} | {m['peak_mb']:.0f} | {m['added_mb']:.0f} |"
        )
    products = [m["product_s"] for m in medians.values()]
    if products:
        lines += ["", f"The product alone: {statistics.median(products):.3f} CPU s (median)."]
    for trainer in trainers:
        for why in {
            r.get("failed") or r["refused"]
            for r in results.of(setting, trainer, runs)
            if "step_s" not in r
        }:
            lines.append(f"{trainer}: {why}.")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=Path, default=HERE.parent / ".venv-peers")
    parser.add_argument("--only", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--shapes", nargs="+", default=["512x8192"], help="d_in x n_latents")
    parser.add_argument("--rules", nargs="+", default=["topk"], help="topk batchtopk jumprelu l1")
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--core", default="0", help="for taskset; empty for no pinning")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one run")
    parser.add_argument("--out", type=Path, default=Path("runs/compare_training"))
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    options = parse()
    results = Results(options.out / "results.jsonl")
    tables = []
    for shape in options.shapes:
        d_in = int(shape.split("x")[0])
        rows = options.out / f"rows_{options.rows}x{d_in}.npy"
        write_rows(rows, options.rows, d_in)
        for rule in options.rules:
            setting = Setting(
                shape, rule, options.tied, options.k, options.batch_size,
                options.steps, options.lr, options.threads,
            )  # fmt: skip
            for number in range(options.runs):
                for trainer in options.only:
                    key = results.key(setting, trainer, number)
                    if "step_s" in results.found.get(key, {}):
                        continue
                    words = command(trainer, setting, rows, options)
                    result = run(trainer, words, setting, options.timeout)
                    results.keep(key, result)
                    print(
                        f"{shape} {rule} run {number}: {trainer}: {json.dumps(result)}", flush=True
                    )
            tables.append(table(setting, results, options.only, options.runs))
            print(f"\n{tables[-1]}\n", flush=True)
    (options.out / "table.md").write_text("\n\n".join(tables) + "\n")


if __name__ == "__main__":
    main()
