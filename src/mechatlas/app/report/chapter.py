"""Chapters of the page: the part that each analysis gives, and how it is rendered.

A chapter is made by one function, `chapter(runs, on_progress) -> Chapter | None`, in a module
of its own in `chapters`, and named in `CHAPTERS` of `page.py`; that is all there is to add.
It may use, with no script of its own:

    html      its text and tables, from a template in `assets` (every value is escaped)
    figures   plotly figures, each drawn where the html has `<div data-figure="NAME">`

It fills the first screen with `findings` and `absences`, and the dossiers with `statements`.

and, with a script in `assets` that finds them through `atlas`:

    data      plain values               atlas.data(CHAPTER)
    arrays    numpy arrays               await atlas.array(CHAPTER, NAME)
    images    encoded pictures           await atlas.image(CHAPTER, NAME)
"""

import base64
import dataclasses
import gzip
import json
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from mechatlas.app.report.dossiers import Absence, Finding, Statements
from mechatlas.app.report.runs import Run, Runs
from mechatlas.base import Progress

MISSING = "\N{EN DASH}"
"""Text shown instead of a missing number."""
ASSETS = resources.files("mechatlas.app.report") / "assets"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chapter:
    """One part of the page."""

    name: str
    """Anchor in the page, a plain word."""
    title: str
    html: Markup
    """Escaped markup from `render`."""
    empty: bool = False
    """Whether it shows only why nothing can be shown."""
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Plotly figures as plain values: `{"data": [...], "layout": {...}}`. Colors and fonts
    that they leave open follow the theme of the page; so do colors named as in `palette`."""
    data: Any = None
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    images: dict[str, bytes] = dataclasses.field(default_factory=dict)
    """WebP files."""
    scripts: tuple[str, ...] = ()
    """Files in `assets` to run after `page.js`."""
    findings: list[Finding] = dataclasses.field(default_factory=list)
    """Claims for the first screen, strongest first."""
    absences: list[Absence] = dataclasses.field(default_factory=list)
    """Questions that were asked and answered with "nothing found"."""
    statements: Statements = dataclasses.field(default_factory=list)
    """Lines for the dossiers of features."""

    def note(self, *found: Finding | Absence) -> "Chapter":
        """Add findings and absences; return this chapter."""
        self.findings.extend(each for each in found if isinstance(each, Finding))
        self.absences.extend(each for each in found if isinstance(each, Absence))
        return self


ChapterOf = Callable[[Runs, Progress], Chapter | None]
"""Function that makes a chapter; `None` if the runs have nothing for it."""
DrawRun = Callable[[Chapter, int, Run], dict[str, Any]]
"""Function that adds a run, with its number, to a chapter, and gives the values of its part."""


def text_of(asset: str) -> str:
    """Read a file of the package's `assets`."""
    return (ASSETS / asset).read_text(encoding="utf-8")


def number(value: Any) -> str:
    """Write a number as people do, with three digits; a dash if there is none."""
    if value is None:
        return MISSING
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.3g}" if size >= 1e-3 else f"{value:.1e}"


def percent(value: float | None) -> str:
    """Write a share in percent, with one digit below ten and above 99; a dash if there is none.

    What one digit would call zero has one that counts: 0.03%. Less than a millionth is rounding.
    """
    if value is None:
        return MISSING
    if abs(value) < 1e-6:
        return "0%"
    if abs(value) < 0.0005:
        return f"{number(float(f'{100 * value:.1g}'))}%"
    digits = 0 if 0.0995 <= abs(value) <= 0.99 else 1
    return f"{100 * value:.{digits}f}".removesuffix(".0") + "%"


def count_of(n: int, noun: str, plural: str = "") -> str:
    """Write a number with its noun: "1 feature", "2,000 features"."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def _size(n_bytes: int | float | None) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes is None:
            return MISSING
        if n_bytes < 1024:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.3g} TiB"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(text_of),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, size=_size, percent=percent)
    return environment


_ENVIRONMENT = _environment()


def render(template: str, **values: Any) -> Markup:
    """Fill a template of `assets`; every value is escaped."""
    return Markup(_ENVIRONMENT.get_template(template).render(**values))


def part_for_each(
    title: str,
    finished: Sequence[Run],
    draw: DrawRun,
    on_progress: Progress,
    *,
    scripts: tuple[str, ...] = (),
    **values: Any,
) -> Chapter | None:
    """Make a chapter with a part for every run; `None` if there are no runs.

    Args:
        title: Title; in small letters the name of the chapter, and of its template.
        finished: Runs to draw.
        draw: Function that draws one of them.
        on_progress: Callback with the number of runs drawn.
        scripts: Files in `assets` to run after `page.js`.
        values: Values of the template, beside `parts`.
    """
    made = Chapter(name=title.lower(), title=title, html=Markup(), data=[], scripts=scripts)
    parts = []
    for k, run in enumerate(finished):
        parts.append({"name": run.name, "number": k, **draw(made, k, run)})
        on_progress(k + 1, len(finished))
    html = render(f"{made.name}.html", parts=parts, **values)
    return dataclasses.replace(made, html=html) if parts else None


def as_json(value: Any) -> Markup:
    """Encode as JSON that is safe inside a script element, whatever strings it holds."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def as_base64(data: bytes) -> str:
    """Encode bytes as base64 text."""
    return base64.b64encode(data).decode("ascii")


def packed(data: bytes) -> str:
    """Compress bytes with gzip, which every browser can undo, and encode them as text."""
    return as_base64(gzip.compress(data, compresslevel=6, mtime=0))
