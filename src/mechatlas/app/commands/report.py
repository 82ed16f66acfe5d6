"""Draw one self-contained HTML page of all runs in a folder.

mechatlas report runs/demo --out atlas.html
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from mechatlas.app.estimates import Estimate, of_work
from mechatlas.app.progress import bar
from mechatlas.app.recipes import TrustConfig
from mechatlas.app.report.page import make_chapters, report
from mechatlas.app.report.runs import Runs, find_runs
from mechatlas.app.run_folder import DICTIONARY, CommandResult
from mechatlas.base import DiskError
from mechatlas.files import cannot_write
from mechatlas.outputs import writable
from mechatlas.ranges import COUNT_OR_NONE, check_ranges

MANY_DICTIONARIES = 8
"""Dictionaries from which on the cost of a page is estimated beforehand."""
PAGE_BYTES, DICTIONARY_BYTES, LATENT_BYTES = 5 << 20, 1 << 19, 1 << 10
"""Size of a page without features, and what a dictionary and each of its latents add."""
ROWS_BYTES = 256 << 20
"""Memory for the rows that are read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageConfig(TrustConfig):
    """Fields of commands that draw the runs in a folder."""

    folder: Annotated[Positional[Path], arg(metavar="DIR")]
    """Folder with the runs (stores and dictionaries), itself one or up to two levels above."""
    visualize: int = 0
    """Number of features per dictionary of images to visualize by activation maximization, and of
    their parts in a branch."""

    def __post_init__(self) -> None:
        check_ranges(self, visualize=COUNT_OR_NONE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageResult(CommandResult):
    """Page that was drawn."""

    bytes: int
    """Size of the page."""
    problems: dict[str, str]
    """Reason for each run that is left out, or not drawn whole."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig(PageConfig):
    """Draw one self-contained HTML page of all runs in a folder."""

    out: Path
    """Page to write."""
    labels: Path | None = None
    """Names and notes of features: a labels.json that an earlier page saved."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportResult(PageResult):
    """Page that was written."""

    page: str
    """File of the page."""


@contextlib.contextmanager
def _place(config: ReportConfig) -> Iterator[None]:
    """Make sure that the page can be written.

    Raises:
        DiskError: It cannot.
    """
    try:
        is_folder = config.out.is_dir()
    except OSError as error:  # a name that is too long
        raise DiskError(cannot_write(config.out, error)) from error
    if is_folder:
        raise DiskError(
            f"{config.out} is a folder, expected the file of a page, such as atlas.html."
        )
    with writable(config.out.parent):
        yield


def _runs(config: ReportConfig) -> Runs:
    trusted = TrustConfig(network=config.network, trust=config.trust)
    with _place(config):
        return find_runs(config.folder, visualize=config.visualize, trust=trusted)


def is_long(config: ReportConfig) -> bool:
    """Whether a page may take over a minute."""
    return config.visualize > 0 or len(_runs(config).of_kind(DICTIONARY)) >= MANY_DICTIONARIES


def estimate(config: ReportConfig) -> Estimate:
    """Estimate a page from the beginning of its chapters.

    Raises:
        UserError: The folder holds no runs, or the page cannot be written.
    """
    runs = _runs(config)
    dictionaries = runs.of_kind(DICTIONARY)
    sizes = [sum(file.stat().st_size for file in run.folder.glob("*")) for run in dictionaries]
    latents = sum(int(run.manifest.get("n_latents", 0)) for run in dictionaries)
    page = PAGE_BYTES + DICTIONARY_BYTES * len(dictionaries) + LATENT_BYTES * latents
    return of_work(
        [lambda progress: make_chapters(runs, progress)],
        memory=ROWS_BYTES + 2 * max(sizes, default=0) + 4 * page, disk=page,
    )  # fmt: skip


def run(config: ReportConfig) -> ReportResult:
    """Write one HTML page of all runs in a folder.

    Raises:
        DiskError: The page cannot be written.
        UserError: The folder holds no runs, or the page cannot be written.
    """
    problems: dict[str, str] = {}
    with _place(config), bar("drawing the page") as progress:
        page = report(
            config.folder,
            config.out,
            visualize=config.visualize,
            network=config.network,
            trust=config.trust,
            labels=config.labels,
            on_progress=progress,
            on_problem=problems.__setitem__,
        )
    if not page.is_file():
        raise DiskError(f"{page} was deleted before the command had ended. Run it again.")
    size = page.stat().st_size
    return ReportResult(out=str(page), page=str(page), bytes=size, problems=problems)


def in_words(result: ReportResult) -> str:
    """Runs that are left out or not whole, then file and size of the page."""
    lines = [f"Not drawn, or not whole: {name}: {why}" for name, why in result.problems.items()]
    return "\n".join([*lines, f"Page: {result.page} ({result.bytes / 2**20:.1f} MiB)"])
