"""Open the page of all runs in a folder on this machine, for runs too large for one file.

mechatlas serve runs/large
"""

import contextlib
import dataclasses
import sys
import threading

from mechatlas.app.commands.report import PageConfig, PageResult
from mechatlas.app.progress import bar
from mechatlas.app.report.page import write_parts
from mechatlas.app.report.runs import find_runs
from mechatlas.app.report.server import serve
from mechatlas.outputs import temporary_folder
from mechatlas.ranges import check_ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig(PageConfig):
    """Open the page of all runs in a folder on this machine, until Ctrl-C ends it."""

    port: int = 0
    """Port on this machine; 0 for any that is free."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, port="[0, 65535]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeResult(PageResult):
    """Page that was served."""

    address: str
    """Address of the page, as long as the command ran."""


def run(config: ServeConfig) -> ServeResult:
    """Write the page in parts, which a browser fetches when it needs them, and serve them.

    Raises:
        DiskError: There is no such folder, or no place for the parts.
        RecipeError: The port cannot be used.
        UserError: The folder holds no runs.
    """
    runs = find_runs(config.folder, visualize=config.visualize, trust=config)
    with temporary_folder() as folder, bar("drawing the page") as step:
        write_parts(runs, folder, on_progress=step)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        with serve(folder, config.port) as address:
            for run_name, reason in runs.problems.items():
                print(f"Not drawn, or not whole: {run_name}: {reason}", file=sys.stderr)
            print(f"{address} (Ctrl-C ends it)", file=sys.stderr, flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                wait()
    return ServeResult(address=address, bytes=size, problems=runs.problems)


def wait() -> None:
    """Wait until somebody ends the command."""
    threading.Event().wait()


def in_words(result: ServeResult) -> str:
    """Address that is no longer served."""
    return f"{result.address} is closed."
