"""Table of docs/formats.md: what is read, for whom it is written, and how exactly.

    python -m tests.dictionaries.formats_table

writes it anew. Differences are the largest of codes, reconstructions and outputs against the
library's own numbers, for the golden files.
"""

import tempfile
from pathlib import Path

import torch

from mechatlas.base import WeightsError
from mechatlas.dictionaries.formats import WRITERS, save
from tests.dictionaries.golden import (
    EXPECTED,
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

DOCS = Path(__file__).parents[2] / "docs" / "formats.md"
BEGIN, END = "<!-- formats: begin -->\n", "<!-- formats: end -->\n"
LIMIT = 1e-5


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


def table() -> str:
    """Table in Markdown."""
    lines = ["| library and class | written for | largest difference |", "|---|---|---|"]
    for name, (writes, difference) in rows().items():
        lines.append(f"| {name} | {writes or 'mechatlas alone'} | {difference:.0e} |")
    return "\n".join(lines) + "\n"


def in_docs() -> str:
    """The table as docs/formats.md has it."""
    return DOCS.read_text().partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    before, _, rest = DOCS.read_text().partition(BEGIN)
    DOCS.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
