"""The code in the README and the documentation runs, in order, as it stands."""

import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import mechatlas
from mechatlas import deprecated

ROOT = Path(__file__).parents[1]
NAMES = (
    "tutorial",
    "guides",
    "own",
    "language",
    "evaluation",
    "effects",
    "dictionaries",
    "group_stores",
    "scaling",
    "formats",
    "interaction",
    "matching",
    "circuits",
    "symmetry",
    "branches",
    "proofs",
    "gpu",
)
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in NAMES)]
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_code_on_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MECHATLAS_CACHE", str(tmp_path / "cache"))
    names: dict[str, object] = {"__name__": page.stem}
    ran = 0
    for language, title, code in BLOCK.findall(page.read_text()):
        if language == "toml" and title:
            (tmp_path / title).write_text(code)
        elif language == "python":
            exec(compile(code, str(page), "exec"), names)
            ran += 1
        elif language == "sh" and page.name == "tutorial.md":
            for line in code.splitlines():
                words = shlex.split(line, comments=True)
                done = subprocess.run(
                    [sys.executable, "-m", *words],
                    capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
                )  # fmt: skip
                assert done.returncode == 0, f"{line}\n{done.stderr}"
                ran += 1
    assert ran >= 1


def resolves(path: str) -> bool:
    """Whether a dotted path names something that can be imported."""
    words = path.split(".")
    for n in range(len(words), 0, -1):
        try:
            value = importlib.import_module(".".join(words[:n]))
        except ModuleNotFoundError:
            continue
        for word in words[n:]:
            if not hasattr(value, word):
                return False
            value = getattr(value, word)
        return True
    return False


def test_every_name_of_the_reference_resolves():
    text = (ROOT / "docs" / "reference.md").read_text()
    paths = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert len(paths) > 50
    paths += [word for word in re.findall(r"`([\w.]+)`", text) if word.startswith("mechatlas")]
    assert [path for path in paths if not resolves(path)] == []


def test_a_name_that_moved_does_not_resolve():
    assert not resolves("mechatlas.analysis.circuits.compose.record")
    assert not resolves("mechatlas.nowhere.Site")


def test_the_glossary_lists_every_old_spelling():
    section = runpy.run_path(str(ROOT / "tools" / "write_old_spellings.py"))["section"]()
    text = (ROOT / "docs" / "glossary.md").read_text()
    assert text.endswith(section), "run tools/write_old_spellings.py"
    assert [path for path in deprecated.NAMES.values() if not resolves(path)] == []


def test_every_verb_of_the_readme_is_on_the_front_door():
    rows = re.findall(r"^\|.*\|.*\|(.*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    verbs = re.findall(r"`(\w+)\(", "".join(rows))
    assert len(verbs) > 8
    assert set(verbs) <= set(mechatlas.__all__)


def test_the_readme_promises_within_its_first_screen():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert any(line.startswith("```sh") for line in lines[:12])
    assert any(line.startswith("```python") for line in lines[:25])


def test_the_tables_of_results_are_those_of_the_commands():
    check = [sys.executable, ROOT / "tools" / "write_result_tables.py", "--check"]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_messages_of_troubleshooting_are_those_of_the_source():
    joined = re.compile(r'"\s*\n\s*f?"')
    source = "\n".join(joined.sub("", p.read_text()) for p in (ROOT / "src").rglob("*.py"))
    table = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(messages) > 8
    for message in messages:
        for part in re.split(r"\.\.\.|'[^']*'|\d+", message):
            assert part.strip() in source, message


def test_every_page_is_reached_from_the_index_and_the_navigation():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    for file in ("docs/index.md", "mkdocs.yml"):
        text = (ROOT / file).read_text()
        assert [name for name in sorted(pages) if name not in text] == [], file
