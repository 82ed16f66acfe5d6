"""Kills at every crash point and at random moments: the same command must end with the same bytes.

A crash point lies before or after a call that changes a folder: a rename, a new folder, a file
deleted or flushed. Where the files are as they were at an earlier point, a kill leaves the same.
"""

import functools
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mechatlas.app.cli import main
from mechatlas.files import checksum
from tests.faults.child import Child, Ended, contents, run
from tests.faults.table import Table
from tests.faults.world import World

CALLS = ("replace", "rename", "mkdir", "rmdir", "unlink", "remove", "fsync")
"""Functions of `os` that are crash points."""


class CrashPoints:
    """Count of the crash points of a process, which dies at one of them.

    Args:
        deadly: Number of the point at which it dies, before the call where even, else after it;
            by default none.
        end: Function that ends the process there.
    """

    def __init__(self, deadly: int = -1, end: Callable[[], object] | None = None) -> None:
        self.deadly = deadly
        self.passed = 0
        self.end = end or (lambda: os.kill(os.getpid(), signal.SIGKILL))
        self.each: Callable[[], object] = lambda: None

    def watch(self) -> None:
        """Go between the process and the system."""
        for name in CALLS:
            setattr(os, name, self._watched(getattr(os, name)))

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            if not _ours(*arguments, **options):
                return call(*arguments, **options)
            self._pass()
            result = call(*arguments, **options)
            self._pass()
            return result

        return watched

    def _pass(self) -> None:
        self.passed += 1
        self.each()
        if self.passed == self.deadly + 1:
            self.end()


def _ours(path: Any, *_: Any, **options: Any) -> bool:
    """Whether a call is on a file of the run: its descriptor, or a path in the current folder."""
    if isinstance(path, int) or options.get("dir_fd") is not None:
        return True
    return os.path.abspath(os.fspath(path)).startswith(os.getcwd())


@functools.cache
def reference(world: World, command: str) -> dict[str, bytes]:
    """Files of a run that nobody killed."""
    with tempfile.TemporaryDirectory() as place:
        ended = run(world.words(command), Path(place))
        assert ended.code == 0, ended
        return contents(Path(place, "out"))


@functools.cache
def crash_points(world: World, command: str) -> list[bool]:
    """For each crash point of a command, whether no earlier one has the same files."""
    with tempfile.TemporaryDirectory() as place:
        seen, new = set[str](), list[bool]()
        points, file = CrashPoints(), Path(place, "found")

        def look() -> None:
            state = _state(Path())
            new.append(state not in seen)
            seen.add(state)

        def counted() -> None:
            points.each = look
            points.watch()
            main(world.words(command))
            file.write_text(json.dumps(new))

        ended = run(counted, Path(place, "counted"))
        assert ended.code == 0, ended
        return json.loads(file.read_text())


def _state(folder: Path) -> str:
    """Checksum of the names and contents of all files of a folder."""
    paths = sorted(folder.rglob("*"))
    return checksum(b"".join(
        f"{path} ".encode() + (checksum(path.read_bytes()).encode() if path.is_file() else b"/")
        for path in paths
    ))  # fmt: skip


def kill_at_points(
    world: World, command: str, place: Path, table: Table, *, every: int = 1
) -> None:
    """Kill a command before and after each crash point, and run it again.

    Args:
        world: Inputs.
        command: Name of the command.
        place: Folder to work in.
        table: Where the outcomes are counted.
        every: One point in so many is tried, counted back from the third last, as what is written
            last is what a run is known by.
    """
    whole, new = reference(world, command), crash_points(world, command)
    points = [k for k, is_new in enumerate(new) if is_new]
    for k in [k for i, k in enumerate(points) if (len(points) - 3 - i) % every == 0]:
        here = place / f"killed{k}"
        killed = run(world.words(command), here, CrashPoints(k).watch)
        outcome, example = _after(killed, world, command, here, whole)
        example = f"point {k} of {len(new)}: {example}"
        table.add("SIGKILL at a crash point", command, outcome, example)
        shutil.rmtree(here)


def _after(
    killed: Ended, world: World, command: str, here: Path, whole: dict[str, bytes]
) -> tuple[str, str]:
    if killed.code != -signal.SIGKILL:
        return "crash", f"it was not killed but ended with {killed.code}: {killed.message}"
    return judge(run(world.words(command), here), here, whole)


def judge(again: Ended, here: Path, whole: dict[str, bytes]) -> tuple[str, str]:
    """Outcome of a command that should have ended like one without a fault."""
    if again.code == 0:
        found = contents(here / "out")
        differing = sorted(k for k in found.keys() | whole.keys() if found.get(k) != whole.get(k))
        return ("silent", f"{', '.join(differing)} differ") if differing else ("same", "")
    if again.code is None:
        return "hang", again.message
    outcome = {1: "traceback", 2: "refused"}.get(again.code, "crash")
    return outcome, f"exit {again.code}: {again.message}"


def kill_at_random(
    world: World, command: str, place: Path, table: Table, *, tries: int, seed: int = 0
) -> None:
    """Kill a command up to three times at random moments, and run it again."""
    moments, whole = random.Random(seed), reference(world, command)
    clock = time.monotonic()
    run(world.words(command), place / "timed")
    length = time.monotonic() - clock
    for k in range(tries):
        here = place / f"random{k}"
        for _ in range(3):
            child = Child(world.words(command), here)
            time.sleep(moments.uniform(0.02, 1.0) * length)
            child.send(signal.SIGKILL)
            if child.wait().code == 0:
                break
        outcome, example = judge(run(world.words(command), here), here, whole)
        table.add("SIGKILL at a random moment", command, outcome, example)
        shutil.rmtree(here)


def interrupt(
    world: World, command: str, place: Path, table: Table, *, tries: int, seed: int = 0
) -> None:
    """Interrupt and terminate a command at crash points: it says so, and goes on afterwards."""
    whole, n = reference(world, command), len(crash_points(world, command))
    chosen = random.Random(seed)
    for signal_, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        for k in sorted(chosen.sample(range(n), min(tries, n))):
            here = place / f"{signal_.name}{k}"
            points = CrashPoints(k, lambda number=signal_: os.kill(os.getpid(), number))
            ended = run(world.words(command), here, points.watch)
            if ended.code != code or "what was finished is kept" not in ended.errors:
                # Late signals may come when the work has been done.
                outcome, example = judge(ended, here, whole)
            else:
                outcome, example = judge(run(world.words(command), here), here, whole)
            table.add(f"{signal_.name} at a crash point", command, outcome, f"point {k}: {example}")
            shutil.rmtree(here)
