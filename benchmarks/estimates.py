"""Estimated against actual time, memory and disk of commands, on the runs of a tour.

    mechatlas demo --out runs/demo
    python benchmarks/estimates.py runs/demo

Every run is estimated (`--dry-run`) and then made again from its recipe, one process after another.
Larger ones are made from the same recipes with other sizes. Prints the table of `docs/index.md`.
"""

import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMANDS = {
    "store": "collect", "dictionary": "train", "matching": "match", "branches": "branches",
    "circuit": "circuit", "symmetry": "symmetry", "group_net": "train", "proof": "prove",
    "basis": "basis",
}  # fmt: skip
"""Kind of a run -> command that makes it."""
LARGER = {"fire4": ["--n-latents", "2048", "--steps", "3000", "--batch-size", "1024"]}
"""Run of the tour -> arguments of a larger one from its recipe."""
SIZE = r"([\d.,]+) (MiB|GiB)"
SAID = re.compile(rf"About ([\d.,]+) (\w+?)s?, {SIZE} of memory(?: and {SIZE})?")
SECONDS = {"second": 1, "minute": 60, "hour": 3600}
MIB = {"MiB": 1, "GiB": 1024, None: 1}


def number(text: str | None) -> float:
    return float((text or "0").replace(",", ""))


def estimated(arguments: list[str]) -> tuple[float, float, float]:
    """Seconds, MiB of memory and MiB of disk that a dry run says."""
    said = subprocess.run([*arguments, "--dry-run"], capture_output=True, text=True, check=True)
    found = SAID.search(said.stdout)
    assert found, said.stdout
    seconds, unit, memory, memory_unit, disk, disk_unit = found.groups()
    return (
        number(seconds) * SECONDS[unit],
        number(memory) * MIB[memory_unit],
        number(disk) * MIB[disk_unit],
    )


def actual(arguments: list[str], out: Path) -> tuple[float, float, float]:
    """Seconds, MiB of memory and MiB of disk that a command takes, from a process of its own."""
    command = [sys.executable, __file__, "--child", *arguments]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, kib = json.loads(said.stdout.splitlines()[-1])
    disk = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    return seconds, kib / 1024, disk / 2**20


def child(arguments: list[str]) -> None:
    started = time.perf_counter()
    subprocess.run(arguments, capture_output=True, check=True)
    seconds = time.perf_counter() - started
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))


def in_figures(x: float) -> str:
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def main(tour: Path) -> None:
    print("| command | seconds, estimated | actual | memory, MiB | actual | disk, MiB | actual |")
    print("|---|---|---|---|---|---|---|")
    for run in sorted(p.parent for p in tour.glob("*/recipe.toml")):
        kind = json.loads((run / "manifest.json").read_text())["kind"]
        command = ["mechatlas", COMMANDS[kind], str(run / "recipe.toml")]
        for more in ([], *([LARGER[run.name]] if run.name in LARGER else [])):
            with tempfile.TemporaryDirectory(dir=tour.parent) as folder:
                out = Path(folder) / "run"
                arguments = [*command, *more, "--out", str(out)]
                rows = zip(estimated(arguments), actual(arguments, out), strict=True)
                cells = " | ".join(in_figures(x) for pair in rows for x in pair)
                print(f"| `{command[1]}`, {run.name} {' '.join(more)} | {cells} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        child(sys.argv[2:])
    else:
        main(Path(sys.argv[1]))
