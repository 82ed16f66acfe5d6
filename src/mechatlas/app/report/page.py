"""Page of a folder of runs: one self-contained HTML file.

    report           find the runs of a folder and write their page
    write_page       the runs, from a folder or from Python -> one file
    write_parts      the same with arrays and pictures in files of their own, to be served
    make_chapters    the runs -> chapters, whatever single runs are damaged

The page is one file and asks for nothing from anywhere: scripts, styles, pictures and
numbers are inside, and its content policy forbids the browser to load anything else.
"""

import importlib.metadata
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs

from mechatlas.app.feature_labels import read_feature_labels
from mechatlas.app.recipes import TrustConfig
from mechatlas.app.report.chapter import (
    Chapter,
    ChapterOf,
    as_base64,
    as_json,
    packed,
    render,
    text_of,
)
from mechatlas.app.report.chapters import (
    appendix,
    branches,
    circuits,
    effects,
    evaluation,
    features,
    flow,
    interaction,
    matching,
    proofs,
    symmetry,
    training,
)
from mechatlas.app.report.dossiers import FeatureRecord, collect
from mechatlas.app.report.first_screen import first_screen
from mechatlas.app.report.palette import style_sheet
from mechatlas.app.report.pieces import (
    OF_CARDS,
    Lists,
    as_bytes,
    best_cosines,
    claim_lists,
    layout_of,
    lines_of,
    row_blocks,
    row_type,
    word_lists,
)
from mechatlas.app.report.runs import Runs, find_runs
from mechatlas.app.run_folder import STORE
from mechatlas.base import Progress, UserError, no_progress
from mechatlas.files import Data, write
from mechatlas.remote import written

CHAPTERS: tuple[ChapterOf, ...] = (
    features.chapter,
    matching.chapter,
    flow.chapter,
    symmetry.chapter,
    branches.chapter,
    circuits.chapter,
    effects.chapter,
    interaction.chapter,
    proofs.chapter,
    evaluation.chapter,
    training.chapter,
    appendix.chapter,
)
"""Chapters in the order of the page. A new analysis adds its function here."""

STEPS = 1000
"""Progress steps of one chapter."""
SLOW: dict[ChapterOf, int] = {features.chapter: 30}
"""Chapters that take longer than others, and by how much."""


Keep = Callable[[Data], str]
"""Function that keeps bytes outside the page and gives their address."""
OnProblem = Callable[[str, str], None]
"""Callback with the name of a run that is left out, or not drawn whole, and the reason."""


def no_problem(name: str, reason: str) -> None:
    """Say nothing; the page does."""


def report(
    folder: Path | str,
    out: Path | str,
    *,
    visualize: int = 0,
    network: Sequence[str] = (),
    trust: bool = False,
    labels: Path | str | None = None,
    on_progress: Progress = no_progress,
    on_problem: OnProblem = no_problem,
) -> Path:
    """Write one page about every run in a folder.

    A run that is damaged is left out, and the page says why.

    Args:
        folder: A run, or a folder with runs up to two levels below.
        out: The file to write.
        visualize: Number of features per dictionary to visualize by activation maximization.
        network: Networks that stores may name, as `package.module:factory`: their code runs.
        trust: Whether the code of whatever network a store names may run.
        labels: A `labels.json` that an earlier page saved; its names and notes are on this one.
        on_progress: Callback with the steps done.
        on_problem: Callback with each run that is left out, or not drawn whole.

    Returns:
        `out`.

    Raises:
        DiskError: The folder is not there, or the page cannot be written.
        RecipeError: The labels are none.
        UserError: The folder holds no run that can be read.
    """
    names = (network,) if isinstance(network, str) else tuple(network)
    trusted = TrustConfig(network=names, trust=trust)
    read = read_feature_labels(Path(labels)) if labels is not None else None
    runs = find_runs(Path(folder), visualize=visualize, trust=trusted, labels=read)
    return write_page(runs, Path(out), on_progress=on_progress, on_problem=on_problem)


def write_page(
    runs: Runs,
    out: Path,
    *,
    on_progress: Progress = no_progress,
    on_problem: OnProblem = no_problem,
) -> Path:
    """Write one page about runs.

    Args:
        runs: The runs.
        out: File to write.
        on_progress: Callback with the steps done.
        on_problem: Callback with each run that is left out, or not drawn whole.

    Returns:
        `out`.

    Raises:
        DiskError: The page cannot be written.
        UserError: There is nothing to show.
    """
    chapters = make_chapters(runs, on_progress)
    refuse_nothing(runs, chapters)
    for name, reason in runs.problems.items():
        on_problem(name, reason)
    chapters.insert(0, first_screen(runs, chapters))
    write(out, assemble(_title(runs), chapters, runs.problems).encode())
    return out


def write_parts(runs: Runs, folder: Path, *, on_progress: Progress = no_progress) -> None:
    """Write a page whose arrays and pictures are fetched from files beside it when needed.

    Args:
        runs: The runs.
        folder: Folder for `index.html` and the files.
        on_progress: Callback with the steps done.

    Raises:
        DiskError: A file cannot be written.
        UserError: There is nothing to show.
    """
    chapters = make_chapters(runs, on_progress)
    refuse_nothing(runs, chapters)
    chapters.insert(0, first_screen(runs, chapters))
    numbers = itertools.count()

    def keep(data: Data) -> str:
        address = f"parts/{next(numbers)}"
        write(folder / address, data)
        return address

    write(folder / "index.html", assemble(_title(runs), chapters, runs.problems, keep).encode())


def make_chapters(runs: Runs, on_progress: Progress = no_progress) -> list[Chapter]:
    """Make the chapters of all runs that they can be made of."""
    chapters = []
    steps = [STEPS * SLOW.get(make, 1) for make in CHAPTERS]
    total = sum(steps)
    for number, make in enumerate(CHAPTERS):
        before, own = sum(steps[:number]), steps[number]
        on_progress(before, total)
        made = _chapter(
            make,
            runs,
            lambda done, of, before=before, own=own: on_progress(
                before + done * own // max(of, 1), total
            ),
        )
        if made is not None:
            chapters.append(made)
    on_progress(total, total)
    return chapters


def refuse_nothing(runs: Runs, chapters: Sequence[Chapter]) -> None:
    """Refuse a page that would show nothing but what is wrong.

    Raises:
        UserError: No chapter shows anything.
    """
    shown = [each for each in chapters if each.name != "appendix" and not each.empty]
    if shown or (runs.of_kind(STORE) and not runs.problems):
        return
    reasons = [f"{name}: {reason}" for name, reason in runs.problems.items()]
    kinds = sorted({run.kind for run in runs.all})
    held = f"It holds only {', '.join(kinds)}." if kinds else "It holds no runs."
    raise UserError(f"{runs.folder} has nothing to show. {' '.join(reasons) or held}")


def _chapter(make: ChapterOf, runs: Runs, on_progress: Progress) -> Chapter | None:
    """Make a chapter of all runs that it can be made of."""
    try:
        return make(runs, on_progress)
    except Exception:  # whatever damaged values cause, one run must not cost the page
        if not runs.leave_out(lambda alone: make(alone, no_progress)):
            raise
        return make(runs, on_progress)


def assemble(
    title: str,
    chapters: list[Chapter],
    problems: Mapping[str, str] | None = None,
    keep: Keep | None = None,
) -> str:
    """Fill the page's template with the chapters.

    Args:
        title: Title of the page.
        chapters: Chapters, in order.
        problems: Sentence about each run that is left out, or not drawn whole.
        keep: Function that keeps bytes outside the page and gives their address; by default
            everything is inside.
    """
    scripts = ["page.js", *(name for chapter in chapters for name in chapter.scripts)]
    page = render(
        "template.html",
        title=title,
        version=importlib.metadata.version("mechatlas"),
        chapters=chapters,
        problems=problems or {},
        css=style_sheet() + text_of("page.css"),
        data=as_json({c.name: {"data": c.data, "figures": c.figures} for c in chapters}),
        served=keep is not None,
        arrays=[
            _array(name, values, keep)
            for name, values in _arrays(chapters, served=keep is not None)
        ],
        images=[
            {"name": f"{c.name}/{name}", **_part(data, keep, as_base64)}
            for c in chapters
            for name, data in c.images.items()
        ],
        plotly=packed(get_plotlyjs().encode()),
        scripts=[text_of(name) for name in dict.fromkeys(scripts)],
    )
    return written(page)


def _arrays(
    chapters: Sequence[Chapter], *, served: bool
) -> Iterator[tuple[str, np.ndarray | Mapping[str, np.ndarray]]]:
    """Name and values of each array of a page, with the claims on each feature.

    Of a served page, what only the cards of a dictionary need is one mapping.
    """
    records = collect(line for chapter in chapters for line in chapter.statements)
    for chapter in chapters:
        rows: dict[str, dict[str, np.ndarray]] = {}
        for name, array in chapter.arrays.items():
            place, _, of = name.partition("/")
            if served and chapter.name == "features" and of in OF_CARDS:
                rows.setdefault(place, {})[of] = array
            else:
                yield f"{chapter.name}/{name}", array
        yield from ((f"features/{place}/rows", arrays) for place, arrays in rows.items())
        if chapter.name == "features":
            lists = word_lists(chapter.data, chapter.arrays) if served else {}
            yield from _lists("features", lists)
            for k, facts in enumerate(chapter.data["dictionaries"]):
                of_run = records.get(facts["run"], {})
                yield from _claims(f"features/{k}", of_run, facts["n"])


def _lists(place: str, lists: Mapping[str, Lists]) -> Iterator[tuple[str, np.ndarray]]:
    for name, (at, listed) in lists.items():
        yield f"{place}/{name}.at", at
        yield f"{place}/{name}.feature", listed


def _claims(
    place: str, records: Mapping[int, FeatureRecord], n: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Claims on the features of a dictionary, and what a search needs of them."""
    if not records:
        return
    lines, at = lines_of(records, n)
    yield f"{place}/lines", np.frombuffer(lines, "u1")
    yield f"{place}/lines.at", at
    kinds = sorted({kind for each in records.values() for kind in vars(each) if vars(each)[kind]})
    yield f"{place}/kinds", as_bytes(kinds)
    lists = claim_lists(records)
    yield from ((f"{place}/{kind}.words", as_bytes(words)) for kind, (words, _) in lists.items())
    yield from _lists(place, {kind: listed for kind, (_, listed) in lists.items()})
    yield from ((f"{place}/{name}", of) for name, of in best_cosines(records, n).items())


def _part(data: bytes, keep: Keep | None, encode: Callable[[bytes], str]) -> dict[str, str]:
    """Text of some bytes inside the page, or their address outside it."""
    return {"text": encode(data), "src": ""} if keep is None else {"text": "", "src": keep(data)}


def _array(
    name: str, values: np.ndarray | Mapping[str, np.ndarray], keep: Keep | None
) -> dict[str, Any]:
    if isinstance(values, Mapping):
        assert keep is not None
        row = row_type(values)
        shape = (len(next(iter(values.values()))), row.itemsize)
        part = {"text": "", "src": keep(row_blocks(values, row))}
        layout = json.dumps(layout_of(row))
        return {"name": name, "dtype": "uint8", "shape": _shape(shape), "layout": layout, **part}
    whole = np.ascontiguousarray(values)
    if sys.byteorder == "big":
        whole = whole.byteswap()
    part = (
        {"text": packed(whole.tobytes()), "src": ""} if keep is None
        else {"text": "", "src": keep(whole.data if whole.size else b"")}
    )  # fmt: skip
    return {
        "name": name, "dtype": whole.dtype.name, "shape": _shape(whole.shape), "layout": "", **part
    }  # fmt: skip


def _shape(shape: tuple[int, ...]) -> str:
    return ",".join(map(str, shape))


def _title(runs: Runs) -> str:
    if runs.opened is not None:
        return type(runs.opened.network).__name__
    names = {run.network_name for run in runs.of_kind(STORE)} - {""}
    return " and ".join(sorted(name.rpartition(":")[2] for name in names)) or runs.folder.name
