"""Disks that are full or cannot be written, folders that vanish, two writers, and odd clocks.

Also runs that are repeated into their own folder.
"""

import os
import random
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.child import Child, Ended, run
from tests.faults.kills import CrashPoints, crash_points, judge, reference
from tests.faults.table import Table, outcome_of
from tests.faults.world import World

REFUSED = "Cannot write|The store needs|Temporary files cannot be kept"
"""Sentences of commands that have no room."""


def full_disk(world: World, command: str, place: Path, table: Table, sizes: list[int]) -> None:
    """Refuse long files, then let the command go on."""
    whole = reference(world, command)
    for size in sizes:
        here = place / f"limit{size}"
        ended = run(world.words(command), here, lambda n=size: _limit_files(n))
        _judge_refusal(table, "longest file allowed", world, command, here, whole, ended)
        shutil.rmtree(here)


def _limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def full_tmpfs(world: World, command: str, place: Path, table: Table, sizes: list[int]) -> None:
    """Fill a small disk, then make room and go on; nothing is tried without the right to mount."""
    whole = reference(world, command)
    for size in sizes:
        here = place / f"disk{size}"
        here.mkdir(parents=True)
        with mounted(here, size) as resize:
            if resize is None:
                return
            ended = run(world.words(command), here)
            left = list(here.rglob("*.tmp"))
            resize(64 << 20)
            if left:
                table.add("full disk", command, "harm", f"left {left}")
            _judge_refusal(table, "full disk", world, command, here, whole, ended)


@contextmanager
def mounted(here: Path, size: int, mode: str = "rw") -> Iterator[Callable[[int], object] | None]:
    """Mount a disk in memory; gives the function that resizes it, or None without the right."""
    options = ["mount", "-t", "tmpfs", "-o", f"{mode},size={size}", "tmpfs", str(here)]
    if subprocess.run(options, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield lambda n: subprocess.run(
            ["mount", "-o", f"remount,size={n}", str(here)], check=True, capture_output=True
        )
    finally:
        subprocess.run(["umount", str(here)], check=True)


def _judge_refusal(
    table: Table,
    fault: str,
    world: World,
    command: str,
    here: Path,
    whole: dict[str, bytes],
    ended: Ended,
) -> None:
    """A command that could not write must say so, and end as ever once it can."""
    if ended.code == 0:
        table.add(fault, command, *judge(ended, here, whole))
    elif ended.code != 2 or not re.search(REFUSED, ended.said):
        outcome = "unnamed" if ended.code == 2 else outcome_of(ended.code)
        table.add(fault, command, outcome, f"exit {ended.code}: {ended.message}")
    else:
        outcome, example = judge(run(world.words(command), here), here, whole)
        table.add(fault, command, "named" if outcome == "same" else outcome, example)


def unwritable(world: World, command: str, place: Path, table: Table) -> None:
    """Give places that cannot be written, before which no work is done."""
    place.mkdir(parents=True)
    os.chmod(place, 0o755)
    (place / "file").write_text("")
    (place / "dangling").symlink_to("nowhere/at/all")
    places = {
        "a file": "file",
        "below a file": "file/out",
        "a dangling link": "dangling",
        "a name too long": "n" * 300,
        "a disk that is read-only": "disk/out",
    }
    (place / "disk").mkdir()
    with mounted(place / "disk", 1 << 20, "ro") as resize:
        for what, out in places.items():
            if out.startswith("disk") and resize is None:
                continue
            ended = run(world.words(command, out), place)
            outcome = outcome_of(ended.code)
            if ended.code == 2 and not re.search("Cannot write|expected the file", ended.said):
                outcome = "unnamed"
            elif ended.code == 0 and what != "a dangling link":  # whose file can be made
                outcome = "silent"
            example = f"{what}: exit {ended.code}: {ended.message}"
            table.add("unwritable --out", command, outcome, example)
    (place / "disk").rmdir()
    (place / "file").unlink()
    (place / "dangling").unlink()
    if left := [path for path in place.iterdir() if path.name != "nowhere"]:
        table.add("unwritable --out", command, "harm", f"left {left}")


def two_writers(
    world: World, command: str, place: Path, table: Table, *, tries: int, seed: int = 0
) -> None:
    """Start the same command twice: the second is refused, or finds it done."""
    whole, moments = reference(world, command), random.Random(seed)
    for k in range(tries):
        here = place / f"two{k}"
        first = Child(world.words(command), here)
        time.sleep(moments.uniform(0, 0.1))
        ends = [child.wait() for child in (first, Child(world.words(command), here))]
        refused = [end for end in ends if end.code != 0]
        outcome, example = judge(next((e for e in ends if e.code == 0), ends[0]), here, whole)
        if any(e.code != 2 or "is writing into" not in e.errors for e in refused):
            outcome, example = "unnamed", refused[0].message
        table.add("two writers", command, outcome, example)
        shutil.rmtree(here)


def run_twice(world: World, command: str, place: Path, table: Table) -> None:
    """Run a command into the folder of a run that has ended: it ends with the same files."""
    ended = run(world.words(command), place)
    if ended.code == 0:
        ended = run(world.words(command), place)
    table.add("the same once more", command, *judge(ended, place, reference(world, command)))
    shutil.rmtree(place)


def deleted(world: World, command: str, place: Path, table: Table, *, every: int) -> None:
    """Delete the folder at crash points: the command says so, or ends with all its files."""
    whole, n = reference(world, command), len(crash_points(world, command))
    for k in range(0, n, every):
        here = place / f"deleted{k}"
        points = CrashPoints(k, lambda: shutil.rmtree("out", ignore_errors=True))
        ended = run(world.words(command), here, points.watch)
        outcome, example = judge(ended, here, whole)
        if outcome == "refused":
            outcome, example = judge(run(world.words(command), here), here, whole)
            outcome = "named" if outcome == "same" else outcome
        elif outcome == "silent" and k >= n - 3 and not (here / "out").exists():
            outcome = "same"  # after the last look at the folder nobody can say so
        table.add("folder deleted meanwhile", command, outcome, f"point {k} of {n}: {example}")
        shutil.rmtree(here)


def odd_clock(world: World, command: str, place: Path, table: Table, *, seed: int = 0) -> None:
    """Let all clocks jump forward and back."""
    whole = reference(world, command)
    jumps = random.Random(seed)

    def jump() -> None:
        for name in ("time", "process_time", "perf_counter", "monotonic"):
            clock = getattr(time, name)
            setattr(time, name, lambda clock=clock: clock() + jumps.uniform(-1e9, 1e9))

    ended = run(world.words(command), place / "odd", jump)
    table.add("clocks that jump", command, *judge(ended, place / "odd", whole))
