"""The house rules that a linter does not know."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mechatlas

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "src" / "mechatlas").rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT / "src")))
def test_small_enough_to_read_in_one_sitting(path):
    source = path.read_text()
    assert source.count("\n") <= 600, "split it, or delete something"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
            body = node.end_lineno - node.lineno
            doc = ast.get_docstring(node)
            assert body - (doc or "").count("\n") < 60, node.name


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT / "src")))
def test_nothing_reads_a_pickle(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = ast.unparse(node.func)
            assert called not in ("pickle.load", "pickle.loads")
            if called == "torch.load":
                assert any(k.arg == "weights_only" for k in node.keywords)


def test_the_front_door_offers_what_it_lists():
    for name in mechatlas.__all__:
        assert getattr(mechatlas, name).__module__.startswith("mechatlas.")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mechatlas.nothing  # pyright: ignore[reportAttributeAccessIssue]


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, mechatlas; print([m for m in ('torch', 'plotly') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_using_the_package_imports_no_tool_of_the_page():
    code = (
        "import sys, mechatlas as m; m.Autoencoder, m.collect, m.train, m.load;"
        "print([x for x in ('numba', 'plotly', 'transformers', 'tyro') if x in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
