"""Table of docs/formats.md: what is read, for whom it is written, and how exactly.

    python -m tests.dictionaries.formats_table

writes it anew. Differences are the largest of codes, reconstructions and outputs against the
library's own numbers, for the golden files. Memory is that of loading the same layout with many
times the latents in half precision, where files count as large from a megabyte.
"""

import tempfile
from collections.abc import Collection
from pathlib import Path

import torch

from mechatlas.base import WeightsError
from mechatlas.dictionaries.ends import ends_of, parts_of
from mechatlas.dictionaries.formats import WRITERS, save
from tests.dictionaries.golden import (
    EXPECTED,
    GIVEN,
    GOLDEN,
    NAMES,
    PUBLISHED,
    TEMPORAL,
    X,
    expected,
    read,
    read_published,
    read_temporal,
)
from tests.dictionaries.large_files import lengthen, peaks

DOCS = Path(__file__).parents[2] / "docs" / "formats.md"
BEGIN, END = "<!-- formats: begin -->\n", "<!-- formats: end -->\n"
LIMIT = 1e-5
MEMORY_LIMIT = 2.5
"""Largest memory of loading, over the size of the file: mapped pages and one copy of them."""


def rows() -> dict[str, tuple[str, float]]:
    """Library and class -> libraries for which it is written, and the largest difference."""
    found: dict[str, tuple[str, float]] = {}
    for name in (*NAMES, *PUBLISHED, *TEMPORAL):
        reader = read_temporal if name in TEMPORAL else read_published
        dictionary = read(GOLDEN / name) if name in NAMES else reader(name)
        if name not in NAMES:
            numbers = expected(name)
        else:
            keys = ("code", "decoded", "output")
            numbers = {"x": X, **{key: EXPECTED[f"{name}/{key}"] for key in keys}}
        code = dictionary.encode(numbers["x"])
        ours = {
            "code": code,
            "decoded": dictionary.decode(code),
            "output": dictionary(numbers["x"]),
        }
        difference = max(float((ours[key] - numbers[key]).abs().max()) for key in ours)
        before = found.get(dictionary.file_format, ("", 0.0))
        writes = set(before[0].split(", ")) - {""} | written(dictionary)
        listed = ", ".join(each for each in WRITERS if each in writes)
        found[dictionary.file_format] = (listed, max(before[1], difference))
    return dict(sorted(found.items(), key=lambda pair: pair[0].lower()))


def written(dictionary: torch.nn.Module) -> set[str]:
    """Libraries that can hold a dictionary."""
    kept = set()
    for library in WRITERS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                save(dictionary, folder, format=library)
            except WeightsError:
                continue
            kept.add(library)
    return kept


def memory(formats: Collection[str] = ()) -> dict[str, float]:
    """Library and class -> largest memory of loading a large file, over the size of the file.

    Args:
        formats: Libraries and classes to measure; by default all that have a layout of latents.
    """
    found: dict[str, float] = {}
    for name in (*NAMES, *PUBLISHED):
        dictionary = read(GOLDEN / name) if name in NAMES else read_published(name)
        library = dictionary.file_format
        if library in found or (formats and library not in formats):
            continue
        n_latents = {part.latents.stop - part.latents.start for part in parts_of(dictionary)}
        ends = ends_of(dictionary)
        widths = {s.stop - s.start for spans in ends for s in spans.values()}
        others = widths | {dictionary.d_in, dictionary.d_out, len(ends.reads), len(ends.writes)}
        if n_latents & others:
            continue
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / name
            size = lengthen(GOLDEN / name, place, n_latents, others)
            given = GIVEN.get(name, {})
            (small, _), (large, problem) = peaks([(GOLDEN / name, given), (place, given)])
        if not problem:
            found[library] = max(0.0, large - small) / size
    return found


def table() -> str:
    """Table in Markdown."""
    sizes = memory()
    lines = [
        "| library and class | written for | largest difference | memory of loading |",
        "|---|---|---|---|",
    ]
    for name, (writes, difference) in rows().items():
        size = f"{sizes[name]:.2f}" if name in sizes else "-"
        lines.append(f"| {name} | {writes or 'mechatlas alone'} | {difference:.0e} | {size} |")
    return "\n".join(lines) + "\n"


def in_docs() -> str:
    """The table as docs/formats.md has it."""
    return DOCS.read_text().partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    before, _, rest = DOCS.read_text().partition(BEGIN)
    DOCS.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
