"""The notebooks run from top to bottom, in an empty folder, as they stand."""

import json
import shlex
from pathlib import Path

import pytest

from mechatlas.app.cli import main

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))


def run_cell(source: str, names: dict[str, object]) -> None:
    lines = source.splitlines()
    shell = [line for line in lines if line.startswith("!mechatlas ")]
    python = "\n".join(line for line in lines if line not in shell)
    exec(compile(python, "<cell>", "exec"), names)
    for line in shell:
        main(shlex.split(line)[1:])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    cells = json.loads(path.read_text())["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "outputs are not kept: clear them"
            run_cell("".join(cell["source"]), names)


def test_there_are_three_notebooks_and_the_docs_name_them():
    index = (Path(__file__).parents[1] / "docs" / "index.md").read_text()
    assert len(NOTEBOOKS) == 3
    for path in NOTEBOOKS:
        assert f"notebooks/{path.name}" in index


def test_a_cell_that_fails_is_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run_cell("x = 1\n!mechatlas report nowhere --out page.html", {})
