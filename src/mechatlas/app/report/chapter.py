"""Chapters of the page: the part that each analysis gives, and how it is rendered.

A chapter is made by one function, `chapter(runs, on_progress) -> Chapter | None`, in a module
of its own in `chapters`, and named in `CHAPTERS` of `page.py`; that is all there is to add.
It may use, with no script of its own:

    html      its text and tables, from a template in `assets` (every value is escaped)
    figures   plotly figures, each drawn where the html has `<div data-figure="NAME">`

and, with a script in `assets` that finds them through `atlas`:

    data      plain values               atlas.data(CHAPTER)
    arrays    numpy arrays               await atlas.array(CHAPTER, NAME)
    images    encoded pictures           await atlas.image(CHAPTER, NAME)
"""

import base64
import dataclasses
import gzip
import json
from collections.abc import Callable
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from mechatlas.app.report.runs import Runs
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
    that they leave open follow the theme of the page."""
    data: Any = None
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    images: dict[str, bytes] = dataclasses.field(default_factory=dict)
    """WebP files."""
    scripts: tuple[str, ...] = ()
    """Files in `assets` to run after `page.js`."""


ChapterOf = Callable[[Runs, Progress], Chapter | None]
"""Function that makes a chapter; `None` if the runs have nothing for it."""


def text_of(asset: str) -> str:
    """Read a file of the package's `assets`."""
    return (ASSETS / asset).read_text(encoding="utf-8")


def _number(value: Any) -> str:
    """Write a number as people do; a dash if there is none."""
    if value is None:
        return MISSING
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    size = abs(value)
    return f"{value:,.1f}" if size >= 100 else f"{value:.3g}" if size >= 1e-3 else f"{value:.1e}"


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
    environment.filters.update(
        number=_number, size=_size, percent=lambda v: MISSING if v is None else f"{v:.1%}"
    )
    return environment


_ENVIRONMENT = _environment()


def render(template: str, **values: Any) -> Markup:
    """Fill a template of `assets`; every value is escaped."""
    return Markup(_ENVIRONMENT.get_template(template).render(**values))


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
