"""The files around the code agree with it."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import mechatlas

ROOT = Path(__file__).parents[1]
YAML = [ROOT / "CITATION.cff", ROOT / ".pre-commit-config.yaml", *ROOT.glob(".github/**/*.yml")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("path", YAML, ids=lambda p: p.name)
def test_yaml_can_be_read(path):
    assert yaml.safe_load(path.read_text())


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    version, date = re.findall(
        r"^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)$",
        (ROOT / "CHANGELOG.md").read_text(),
        re.MULTILINE,
    )[0]
    assert mechatlas.__version__ == PROJECT["version"] == version == citation["version"]
    assert citation["date-released"] == date


def test_commits_are_checked_with_the_ruff_of_the_constraints():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    pinned = re.search(r"^ruff==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert [repo["rev"] for repo in hooks] == [f"v{pinned[1]}"]


def test_the_workflows_run_the_oldest_and_the_newest_python():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]
    pythons = [row["python"] for row in jobs["range"]["strategy"]["matrix"]["include"]]
    classified = [
        name.rsplit(" ", 1)[1]
        for name in PROJECT["classifiers"]
        if re.fullmatch(r".* :: 3\.\d+", name)
    ]
    assert pythons == [classified[0], classified[-1]]
    assert PROJECT["requires-python"] == f">={classified[0]}"


def test_every_file_that_contributing_names_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in re.findall(
        r"`((?:src|app|dictionaries|activations|tests|docs|tools)/[\w/.]+)`", text
    ):
        places = (ROOT / name, ROOT / "src" / "mechatlas" / name)
        assert "NAME" in name or any(place.exists() for place in places), name
    for target in re.findall(r"^make ([\w-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
