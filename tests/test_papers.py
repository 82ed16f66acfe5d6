"""The recipes of the papers can be run, and put our numbers beside those of the paper."""

import json
import runpy
import sys
from pathlib import Path

import pytest

PAPERS = Path(__file__).parents[1] / "recipes" / "papers"
NAMES = sorted(path.parent.name for path in PAPERS.glob("*/run.py"))


def recipe(name, monkeypatch, *words):
    """Run the recipe of a paper, which may end by itself."""
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    runpy.run_path(str(PAPERS / name / "run.py"), run_name="__main__")


def test_every_paper_has_a_recipe():
    assert NAMES == [
        "branch_specialization", "group_crosscoders", "group_operations", "interaction_basis",
        "sae_match",
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_it_does(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        recipe(name, monkeypatch, "--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"recipes/papers/{name}/run.py" in text
    assert "paper.json" in text
    assert "--out" in text


def test_numbers_stand_beside_those_of_the_paper(tmp_path, capsys):
    side = runpy.run_path(str(PAPERS / "side_by_side.py"))
    rows = [side["Row"]("edges < vectors", "12", "13 & more"), side["Row"]("loss", "1", "2", "x")]
    side["write_paper"](tmp_path, "A paper", rows, ["weights: --weights FILE"], {"a": [1]})
    written = json.loads((tmp_path / "paper.json").read_text())
    assert written["rows"][0] == {
        "quantity": "edges < vectors", "ours": "12", "paper": "13 & more", "note": "",
    }  # fmt: skip
    assert written["numbers"] == {"a": [1]}
    page = (tmp_path / "paper.html").read_text()
    assert "<td>edges &lt; vectors</td><td>12</td><td>13 &amp; more</td>" in page
    assert "<li>weights: --weights FILE</li>" in page
    assert "edges < vectors: 12   (paper: 13 & more)" in capsys.readouterr().out


@pytest.mark.slow
def test_the_quick_form_of_the_interaction_basis_ends_with_a_page(tmp_path, monkeypatch):
    recipe("interaction_basis", monkeypatch, "--out", str(tmp_path))
    written = json.loads((tmp_path / "paper.json").read_text())
    digits = written["numbers"]["digits"]
    assert digits["accuracy"] > 0.9
    assert all(lib < n for lib, n in zip(digits["lib"], digits["neurons"], strict=True))
    assert (tmp_path / "paper.html").is_file()


def test_courses_are_drawn_group_by_group_without_irreps_that_never_have_any_weight():
    recipe_of = runpy.run_path(str(PAPERS / "group_operations" / "run.py"))
    course = {
        "steps": [20, 200], "irreps": ["1a", "2b", "3c"], "width": 8,
        "energy": [[0.0, 0.99, 0.01], [0.0, 0.99, 0.01]], "neurons": [[0, 0, 0], [0, 6, 0]],
        "in_circuits": [0, 2], "accuracy": [0.5, 1.0], "bound": [0.0, 0.9],
    }  # fmt: skip
    rows = [{"group": name, "course": course} for name in ("S4", "A5", "A5")]
    page = recipe_of["draw_training"]([*rows, {"group": "S5", "course": None}])
    assert "S4: share of the variance" in page
    assert "A5: accuracy, bound and neurons" in page
    assert "S5" not in page.split("<body>")[1].split("Plotly.newPlot")[-1]
    assert '"name":"2b"' in page
    assert '"name":"3c"' not in page
