"""Progress of a command: a bar on a terminal, and a line now and then anywhere else.

bar         progress on standard error
duration    seconds in words
silence     no progress in this process
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from mechatlas import base

EVERY = 10.0
"""Seconds between two lines where there is no terminal; shorter work says nothing."""
_SILENT = False


def silence() -> None:
    """Show no progress in this process, a worker: the process that it works for does."""
    global _SILENT
    _SILENT = True


def duration(seconds: float) -> str:
    """Time in words, to two digits."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.{0 if seconds >= 10 * length else 1}f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 1.5 else "a second"


@contextmanager
def bar(what: str) -> Iterator[base.Progress]:
    """Show progress on standard error while the context is open."""
    if _SILENT:
        yield base.no_progress
        return
    if not sys.stderr.isatty():
        yield _lines(what)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)

        def update(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield update


def _lines(what: str) -> base.Progress:
    """Write the share that is done and the time that is left, every `EVERY` seconds."""
    last = time.monotonic()
    began: tuple[float, int] | None = None  # time of the first call, and what was done by then

    def update(done: int, total: int) -> None:
        nonlocal last, began
        now = time.monotonic()
        start, before = began = began or (now, done)
        if now - last >= EVERY:
            last = now
            left = (now - start) * (total - done) / (done - before) if done > before else 0.0
            ending = f", about {duration(left)} left" if left >= EVERY else ""
            print(f"{what}: {done / max(total, 1):.0%}{ending}", file=sys.stderr, flush=True)

    return update
