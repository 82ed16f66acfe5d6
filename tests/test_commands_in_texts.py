"""Every command that a text gives can be typed today: its files are there, and its flags exist.

Texts are the documentation, the notes in recipes, benchmarks and tools, and the docstrings of the
package. Lines of code must be whole commands; a command in running text may leave out what is
required, but not name what does not exist.
"""

import argparse
import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import os
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import tyro

from mechatlas.app.cli import COMMANDS, configure
from mechatlas.base import UserError

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^( *)```(\w*).*?\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^(?: {4}|\t)(.*)$", re.MULTILINE)
INLINE = re.compile(r"`([^`]+)`")
CONTINUED = re.compile(r"\\\n[ #]*")
SCRIPT = r"(?:recipes|benchmarks|tools)/\S+\.py"
RUNS = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:\S*/)?(mechatlas [a-z]+|python3? (?:-m [\w.]+|\S+\.py)|make [\w-]+)\b.*"
    rf"|{SCRIPT}\b.*"
)
PLACE = re.compile(r"(?:recipes|benchmarks|tools|tests|docs)/[\w/-]+(?:\.\w+)?")
STARTED = re.compile(r"^[ #]*(?:Examples?: +|Run: +|Source: +)?(.*)$", re.MULTILINE)


class Given(NamedTuple):
    """Command that a text gives."""

    text: str
    where: str
    whole: bool
    """Whether it is given as a line of code."""

    @property
    def words(self) -> list[str]:
        """Words without settings of the environment, brackets, comments and pipes."""
        text = re.split(r" {3,}|\s(?:&&|\||>)\s|;\s", self.text)[0]
        split = shlex.split(re.sub(r"[\[\]]|\.\.\.(?= |$)", "", text), comments=True)
        while "=" in split[0] and split[0].partition("=")[0].isupper():
            split = split[1:]
        if re.fullmatch(SCRIPT, split[0]):
            split = ["python", *split]
        return [split[0].rpartition("/")[2], *("1" if w == "N" else w for w in split[1:])]


def lines_of(code: str) -> list[str]:
    return CONTINUED.sub(" ", code).splitlines()


def commands_of(file: Path) -> Iterator[Given]:
    """Commands in a text, those in running text last."""
    text, name = file.read_text(), str(file.relative_to(ROOT))
    if file.suffix == ".ipynb":
        cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"]]
        lines = [line[1:] for cell in cells for line in lines_of(cell) if line.startswith("!")]
        rest = "\n".join(cells)
    elif file.suffix == ".md":
        fences = [code for _, language, code in FENCE.findall(text) if language in ("", "sh")]
        rest = FENCE.sub("", text)
        indented = "\n".join(INDENTED.findall(rest))
        lines = [line.strip() for code in (*fences, indented) for line in lines_of(code)]
    else:
        rest = re.sub(r"^[ #]*```.*$", "", text, flags=re.MULTILINE)
        lines = STARTED.findall(CONTINUED.sub(" ", text))
    for line in lines:
        if RUNS.fullmatch(line) and (file.suffix != ".py" or not re.search(r'["(){}]|: ', line)):
            yield Given(line, name, whole=True)
    for span in INLINE.findall(re.sub(r"\n[ #>]*", " ", rest)):
        if RUNS.fullmatch(span) and "{" not in span:
            yield Given(span, name, whole=False)


def texts() -> list[Path]:
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    files += (ROOT / "docs").rglob("*.ipynb")
    for folder, kinds in (("recipes", "py toml md"), ("benchmarks", "py"), ("tools", "py sh"),
                          ("src", "py md"), ("tests/faults", "py md")):  # fmt: skip
        files += (file for kind in kinds.split() for file in (ROOT / folder).rglob(f"*.{kind}"))
    return sorted(files)


@pytest.fixture(scope="module")
def given():
    every = [command for file in texts() for command in commands_of(file)]
    return list({(each.text, each.where): each for each in every}.values())


def recipe_for(command: str, words: list[str]) -> list[str]:
    """Name the recipe in full, or take a quick one where a text speaks of some other."""
    if not words or not words[0].endswith(".toml") or command == "sweep":
        return words
    known = ROOT / words[0]
    quick = ROOT / "recipes" / "quick" / f"{command}.toml"
    if not known.exists():
        assert not words[0].startswith("recipes/"), f"there is no recipe {words[0]}"
        known = quick
    return [str(known), *words[1:]] if known.exists() else words[1:]


def complaint_of_command(words: list[str], *, whole: bool) -> str:
    """What the command line says to a command of ours; empty if nothing."""
    name, rest = words[0], [w for w in words[1:] if w not in ("--json", "--dry-run")]
    if name not in COMMANDS:
        return f"there is no command {name}"
    said = io.StringIO()
    try:
        rest = recipe_for(name, rest)
        group = name == "train" and bool(rest) and Path(rest[0]).parent.name == "groups"
        module = importlib.import_module(f"mechatlas.app.commands.{'group_net' if group else name}")
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            configure(module, name, rest)
    except SystemExit as end:
        left_out = re.search(r"Missing (from|argument|value)|needs a recipe", said.getvalue())
        if end.code and (whole or not left_out):
            return " ".join(said.getvalue().split())
    except (UserError, AssertionError) as error:
        return "" if not whole and "needs a recipe file first" in str(error) else str(error)
    return ""


class Parsed(BaseException):
    """End of a script that has understood its words."""


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Undo what scripts set for their whole process, which is that of the tests here."""
    threads, grad, variables = torch.get_num_threads(), torch.is_grad_enabled(), dict(os.environ)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(grad)
        os.environ.clear()
        os.environ.update(variables)


def complaint_of_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a script says to its words; scripts end when they have been understood."""
    if words[0] == "-m":
        found = ROOT.joinpath(*words[1].split("."))
        file = found / "__main__.py" if found.is_dir() else found.with_suffix(".py")
        words = words[1:]
        if words[0].startswith("mechatlas") or not file.exists():
            return "" if importlib.util.find_spec(words[0].partition(".")[0]) else "no such module"
    else:
        file = ROOT / words[0]
    if not file.exists():
        return f"there is no {words[0]}"
    source = file.read_text()
    monkeypatch.setattr(sys, "argv", [str(file), *words[1:]])
    monkeypatch.setattr(sys, "path", [str(file.parent), *sys.path])
    if "parse_args()" not in source and "tyro.cli(" not in source:
        return complaint_of_call(file, source, words[1:])
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            runpy.run_path(str(file), run_name="__main__")
    except Parsed:
        return ""
    except ModuleNotFoundError as error:  # of a library that only this script needs
        return "" if not (ROOT / (error.name or "")).exists() else str(error)
    except SystemExit as end:
        return f"exit {end.code}: {said.getvalue().strip()[-300:]}"
    return "it does not read its words"


def complaint_of_call(file: Path, source: str, words: list[str]) -> str:
    """Whether the words fit a script that takes them as they are, or hands them to a function."""
    if not words:
        return ""
    unknown = [w for w in words if w.startswith("-") and f'"{w}"' not in source]
    if unknown or "sys.argv" not in source:
        return f"it takes no {' '.join(unknown or words)}"
    if "(*sys.argv[1:])" in source:
        function = runpy.run_path(str(file))["main"]
    elif "COMMANDS[sys.argv[1]]" in source:
        function, words = runpy.run_path(str(file))["COMMANDS"].get(words[0]), words[1:]
    else:
        return ""
    try:
        inspect.signature(function).bind(*words)
    except TypeError as error:
        return str(error)
    return ""


def test_enough_commands_are_found(given):
    assert len([each for each in given if each.words[0] == "mechatlas" and each.whole]) > 90
    assert len([each for each in given if each.words[0].startswith("python") and each.whole]) > 40
    assert len([each for each in given if not each.whole]) > 60


def test_commands_of_mechatlas_can_be_typed(given):
    asked = [each for each in given if each.words[0] == "mechatlas"]
    told = [(e, complaint_of_command(e.words[1:], whole=e.whole)) for e in asked]
    assert [f"{e.where}: {e.text}: {why}" for e, why in told if why] == []


def test_scripts_understand_their_words(given, monkeypatch):
    def parse(self, args=None, namespace=None):
        parse_known(self, args, namespace)
        raise Parsed

    def read(*types, **options):
        cli(*types, **options)
        raise Parsed

    parse_known, cli = argparse.ArgumentParser.parse_args, tyro.cli
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(tyro, "cli", read)
    told = []
    for each in given:
        if each.words[0].startswith("python") and (each.whole or len(each.words) > 2):
            with restored():
                why = complaint_of_script(each.words[1:], monkeypatch)
            if why and (each.whole or "required" not in why):
                told.append(f"{each.where}: {each.text}: {why}")
    assert told == []


def test_targets_and_extras_exist(given):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = [each for each in given if each.words[0] == "make"]
    assert len(asked) > 10
    assert [f"{e.where}: {e.text}" for e in asked if e.words[1] not in targets] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    for file in texts():
        for listed in re.findall(r"mechatlas\[([\w,]+)\]", file.read_text()):
            assert set(listed.split(",")) <= extras, f"{file}: mechatlas[{listed}]"


def test_files_of_the_project_that_texts_name_exist():
    missing = []
    for file in texts():
        for span in INLINE.findall(re.sub(r"\n[ #>]*", " ", FENCE.sub("", file.read_text()))):
            place = PLACE.match(span)
            if place and not any((at / place[0]).exists() for at in (ROOT, ROOT / "src/mechatlas")):
                missing.append(f"{file.relative_to(ROOT)}: {span}")
    assert missing == []


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("match A B --out C --nope 3", "nope"),
        ("match A", "--out"),
        ("swim A", "no command"),
        ("collect recipes/nothing.toml", "no recipe recipes/nothing.toml"),
        ("collect recipes/quick/collect.toml --samples.cropz 3", "cropz"),
        ("train recipes/groups/s4.toml --sparsity.k 3", "sparsity"),
    ],
)
def test_commands_that_cannot_be_typed_are_found(words, why):
    assert why in complaint_of_command(words.split(), whole=True)
