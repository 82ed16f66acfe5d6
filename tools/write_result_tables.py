"""Write the tables of `result.json` in docs/files.md from the result types of the commands.

    python tools/write_result_tables.py            rewrite the tables
    python tools/write_result_tables.py --check    exit with 1 if a table is not up to date

A table stands between `<!-- result: KIND -->` and `<!-- end -->`. Every field has a docstring.
"""

import ast
import dataclasses
import importlib
import inspect
import itertools
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mechatlas.app.run_folder import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "files.md"
MARKED = re.compile(r"(<!-- result: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NAMES = {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}


def field_docstrings(of: type) -> dict[str, str]:
    """Docstring below each field of a class and of its bases."""
    texts: dict[str, str] = {}
    for cls in reversed(of.__mro__[:-1]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        except (OSError, TypeError, SyntaxError):
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for field, text in itertools.pairwise(body):
            match field, text:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(words))),
                ):
                    texts[name] = " ".join(words.split())
    return texts


def is_object(of: Any) -> bool:
    """Whether a type becomes a JSON object with fields of its own."""
    return isinstance(of, type) and (dataclasses.is_dataclass(of) or hasattr(of, "_fields"))


def unwrapped(of: Any) -> tuple[Any, str, bool]:
    """Innermost type of a field, the path to it, and whether the field may be null."""
    arguments = [a for a in typing.get_args(of) if a is not types.NoneType]
    origin = typing.get_origin(of)
    if origin in (typing.Union, types.UnionType):
        inner, path, _ = unwrapped(arguments[0])
        return inner, path, len(arguments) < len(typing.get_args(of))
    if origin in (list, tuple):
        inner, path, _ = unwrapped(arguments[0])
        return inner, f"[]{path}", False
    if origin is dict:
        inner, path, _ = unwrapped(arguments[1])
        return inner, f".NAME{path}", False
    return of, "", False


def rows(
    of: type, prefix: str = "", known: dict[type, str] | None = None
) -> Iterator[tuple[str, str, str]]:
    """Key, type and meaning of every field of a result, depth first.

    Args:
        of: Type of an object.
        prefix: Path to it.
        known: Path to each type whose fields are listed already.

    Raises:
        ValueError: A field has no docstring.
    """
    known = {} if known is None else known
    texts, hints = field_docstrings(of), typing.get_type_hints(of)
    names = getattr(of, "_fields", None) or [field.name for field in dataclasses.fields(of)]
    for name in names:
        if not prefix and name == "out":
            continue
        if name not in texts:
            raise ValueError(f"{of.__module__}.{of.__name__}.{name} has no docstring.")
        inner, path, optional = unwrapped(hints[name])
        kind = "object" if is_object(inner) else NAMES.get(getattr(inner, "__name__", ""), "value")
        kind = f"list of {kind}s" if path.endswith("[]") else kind
        text, place = texts[name], f"{prefix}{name}{path}"
        text += f" Fields as in `{known[inner]}`." if inner in known else ""
        yield place, f"{kind} or null" if optional else kind, text
        if is_object(inner) and inner not in known:
            known[inner] = place
            yield from rows(inner, f"{place}.", known)


def table(kind: str) -> str:
    """Table of the fields of `result.json` in a kind of folder."""
    command, _, name = RESULTS[kind].partition(":")
    of = getattr(importlib.import_module(f"mechatlas.app.commands.{command}"), name)
    lines = ["| key of `result.json` | type | meaning |", "|---|---|---|"]
    lines += [f"| `{key}` | {kind} | {text} |" for key, kind, text in rows(of)]
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """Text of the page with every table up to date."""
    return MARKED.sub(lambda m: m[1] + table(m[2]) + m[3], text)


def main() -> None:
    """Rewrite the page, or check it.

    Raises:
        SystemExit: The page is not up to date.
    """
    before = PAGE.read_text(encoding="utf-8")
    after = page(before)
    if "--check" in sys.argv[1:]:
        raise SystemExit(
            0 if before == after else "docs/files.md is not up to date: run this tool."
        )
    PAGE.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
