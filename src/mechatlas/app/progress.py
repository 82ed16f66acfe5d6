"""Progress of a command: a bar on a terminal, and a line now and then anywhere else."""

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
    """Write the share that is done, every `EVERY` seconds."""
    last = time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            print(f"{what}: {done / max(total, 1):.0%}", file=sys.stderr, flush=True)

    return update
