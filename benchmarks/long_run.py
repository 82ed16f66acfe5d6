"""Memory and open files of a long run in small: collect, train and match, with all data on disk.

    python benchmarks/long_run.py --gib 5 --memory-mib 1024 --out runs/long

Every command runs in a process of its own, whose anonymous memory (without the pages of mapped
files, which the system takes back when it likes) and open files are looked at several times a
second. `samples.json` and `memory.svg` in the folder show both over time; they must be flat.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

WIDTH = 512
"""Width of the inputs and of the activations."""
EVERY = 0.25
"""Seconds between two looks."""
WIDE, HIGH, EDGE = 760, 260, 24
"""Sides of the drawing, and its margin."""
ROOM = HIGH - 2 * EDGE - 12
"""Height of the largest value."""


class Sample(NamedTuple):
    """One look at a process."""

    command: str
    seconds: float
    anonymous_mib: float
    files: int


def network() -> nn.Module:
    """Network on vectors; its activations are as wide as the inputs."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())


def write_rows(path: Path, gib: float) -> int:
    """Write random rows to a .npy file of a size, in pieces."""
    n = int(gib * 2**30 / (4 * WIDTH))
    rows = np.lib.format.open_memmap(path, "w+", np.float32, (n, WIDTH))
    random = np.random.default_rng(0)
    for start in range(0, n, 1 << 14):
        piece = random.standard_normal((min(1 << 14, n - start), WIDTH), np.float32)
        rows[start : start + len(piece)] = piece
        rows.flush()
    return n


def watch(words: list[str], samples: list[Sample]) -> None:
    """Run a command and look at its process until it ends.

    Raises:
        RuntimeError: The command failed.
    """
    process = subprocess.Popen([sys.executable, "-m", "mechatlas", *words])
    started = time.monotonic()
    while process.poll() is None:
        time.sleep(EVERY)
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            files = len(os.listdir(f"/proc/{process.pid}/fd"))
        except OSError:
            continue
        found = re.search(r"RssAnon:\s+(\d+) kB", status)
        if found:
            seconds = time.monotonic() - started
            samples.append(Sample(words[0], seconds, int(found[1]) / 1024, files))
    if process.returncode:
        raise RuntimeError(f"mechatlas {' '.join(words)} ended with {process.returncode}")


def draw(samples: list[Sample], file: Path, budget_mib: int) -> None:
    """Draw memory and open files over time as SVG, a panel for each command."""
    runs = _runs(samples)
    highest = 1.1 * max(budget_mib, *(s.anonymous_mib for s in samples))
    most = 1.1 * max(s.files for s in samples)
    panel = (WIDE - 2 * EDGE) / len(runs)
    lines, left = [], float(EDGE)
    for run in runs:
        span = run[-1].seconds
        for values, top, color in (
            ([s.anonymous_mib for s in run], highest, "#1f6feb"),
            ([s.files for s in run], most, "#999"),
        ):
            corners: dict[int, list[float]] = {}
            for s, value in zip(run, values, strict=True):
                corners.setdefault(round(s.seconds / span * (panel - 8)), []).append(value)
            points = " ".join(
                f"{left + x:.0f},{HIGH - EDGE - value / top * ROOM:.1f}"
                for x, found in corners.items()
                for value in (min(found), max(found))
            )
            lines.append(f'<polyline points="{points}" fill="none" stroke="{color}"/>')
        label = f"{run[0].command}, {span:.0f} s"
        lines.append(f'<text x="{left + 2:.0f}" y="{HIGH - EDGE + 16}">{label}</text>')
        left += panel
    floor, right = HIGH - EDGE, WIDE - EDGE
    y = floor - budget_mib / highest * ROOM
    lines += [
        f'<line x1="{EDGE}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#d33"/>',
        f'<text x="{EDGE}" y="{y - 4:.1f}" fill="#d33">budget of collect, {budget_mib} MiB</text>',
        f'<line x1="{EDGE}" x2="{right}" y1="{floor}" y2="{floor}" stroke="#333"/>',
        f'<text x="{EDGE}" y="12" fill="#1f6feb">anonymous memory, at most '
        f"{max(s.anonymous_mib for s in samples):.0f} MiB</text>",
        f'<text x="{WIDE / 2:.0f}" y="12" fill="#777">open files, at most '
        f"{max(s.files for s in samples)}</text>",
    ]
    text = "\n".join(lines)
    file.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {HIGH}" '
        f'font-family="sans-serif" font-size="11">\n{text}\n</svg>\n'
    )


def _runs(samples: list[Sample]) -> list[list[Sample]]:
    """Samples of each process, whose seconds begin anew."""
    runs: list[list[Sample]] = []
    for sample in samples:
        if not runs or sample.seconds < runs[-1][-1].seconds:
            runs.append([])
        runs[-1].append(sample)
    return runs


def summarize(samples: list[Sample]) -> str:
    """Peak, and what the second half of each command has beyond the first."""
    lines = [
        "| command | wall s | peak MiB | growth MiB | files at most | growth |",
        "|" + "---|" * 6,
    ]
    for own in _runs(samples):
        half = len(own) // 2
        first, second = own[len(own) // 5 : half] or own, own[half:]
        mib = [max(s.anonymous_mib for s in part) for part in (own, first, second)]
        files = [max(s.files for s in part) for part in (own, first, second)]
        lines.append(
            f"| {own[0].command} | {own[-1].seconds:.0f} | {mib[0]:.0f} | {mib[2] - mib[1]:+.0f} | "
            f"{files[0]} | {files[2] - files[1]:+d} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Write the rows, run the commands, draw and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=5.0, help="size of the inputs")
    parser.add_argument("--memory-mib", type=int, default=1024, help="budget of collect")
    parser.add_argument("--out", type=Path, default=Path("runs/long"))
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True)
    n = write_rows(out / "rows.npy", options.gib)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    )
    (out / "collect.toml").write_text(
        f'sites = ["1", "3"]\nout = "{out}/store"\n[network]\nname = "long_run:network"\n'
        f'[samples]\ntype = "Arrays"\nsource = "{out}/rows.npy"\n'
        f"[storage]\npaired = true\nmemory_mib = {options.memory_mib}\n"
    )
    (out / "train.toml").write_text(
        f'store = "{out}/store"\nn_latents = 256\nsteps = {n // 4096}\n'
    )
    samples: list[Sample] = []
    watch(["collect", f"{out}/collect.toml"], samples)
    for site in ("1", "3"):
        words = ["train", f"{out}/train.toml", "--site", site, "--out", f"{out}/site{site}"]
        watch(words, samples)
    sites = [f"{out}/site1", f"{out}/site3"]
    watch(["match", *sites, "--store", f"{out}/store", "--samples", "0", "--out", f"{out}/match"],
          samples)  # fmt: skip
    (out / "samples.json").write_text(json.dumps([sample._asdict() for sample in samples]))
    draw(samples, out / "memory.svg", options.memory_mib)
    print(summarize(samples))


if __name__ == "__main__":
    main()
