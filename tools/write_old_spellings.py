"""Write the old spellings into docs/glossary.md, from the tables of the package.

    python tools/write_old_spellings.py

A test fails while the page and the tables differ.
"""

from pathlib import Path

import mechatlas
from mechatlas import deprecated
from mechatlas.app import old_runs

PAGE = Path(__file__).parents[1] / "docs" / "glossary.md"
HEADING = "## Old spellings\n"
INTRODUCTION = """
Spellings of version 0.1 work until 0.3, with a `DeprecationWarning` that names the new one.

| old | new |
|---|---|
"""
FILES = """
Keys, columns and tensors of run folders that version 0.1 wrote are read under these names, and
never written again:

| kind of folder | old | new |
|---|---|---|
"""


def python_names() -> list[tuple[str, str]]:
    """List old and new spellings of names, arguments, attributes and flags."""
    pairs = [(f"mechatlas.{old}", shortest(path)) for old, path in deprecated.NAMES.items()]
    for function, table in deprecated.ARGUMENTS.items():
        pairs += [(f"{function}({old}=)", f"{function}({new}=)") for old, new in table.items()]
    for name, table in deprecated.ATTRIBUTES.items():
        pairs += [(f"{name}.{old}", f"{name}.{new}") for old, new in table.items()]
    for command, table in deprecated.FLAGS.items():
        pairs += [
            (f"{command} {flag(old)}", f"{command} {flag(new)}") for old, new in table.items()
        ]
    pairs += [(f"column {old}", f"column {new}") for old, new in deprecated.COLUMNS.items()]
    return pairs


def shortest(path: str) -> str:
    """Write the path of a name, through the front door if it is there."""
    name = path.rpartition(".")[2]
    return f"mechatlas.{name}" if name in mechatlas.__all__ else path


def flag(name: str) -> str:
    """Write a field as a flag of the command line."""
    return f"--{name.replace('_', '-')}"


def section() -> str:
    """Write the section of the glossary on old spellings."""
    rows = [f"| `{old}` | `{new}` |\n" for old, new in sorted(python_names())]
    files = [
        f"| {kind} | `{old}` | `{new}` |\n"
        for kind in sorted({*old_runs.KEYS, *old_runs.COLUMNS})
        for old, new in sorted(
            {**old_runs.KEYS.get(kind, {}), **old_runs.COLUMNS.get(kind, {})}.items()
        )
    ]
    return HEADING + INTRODUCTION + "".join(rows) + FILES + "".join(files)


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text().partition(HEADING)[0] + section())
