"""The house rules that a linter does not know."""

import ast
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mechatlas

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "src" / "mechatlas").rglob("*.py"))
DOCUMENTED = [*MODULES, *sorted(ROOT.glob("tools/*.py")), *sorted(ROOT.glob("benchmarks/**/*.py"))]
UNCLEAR_STARTS = ("Of", "That", "Those", "What", "Which", "As", "It", "The same")
PREPOSITIONS = {"about", "at", "beside", "between", "beyond", "by", "for", "from", "in", "of", "on",
    "over", "to", "under", "with"}  # fmt: skip


@functools.cache
def parsed(path):
    return ast.parse(path.read_text())


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT / "src")))
def test_small_enough_to_read_in_one_sitting(path):
    source = path.read_text()
    assert source.count("\n") <= 600, "split it, or delete something"
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
            body = node.end_lineno - node.lineno
            doc = ast.get_docstring(node)
            assert body - (doc or "").count("\n") < 60, node.name


VAGUE_NAMES = {"told", "said", "owner"}
BRITISH = re.compile(
    r"(?:ali|eri|imi|imali|mmari|nali|niti|omi|quanti|chroni|cogni|bili|metri)s(?:e|ed|er|es|ing)"
    r"(?![a-z])|colour|centre|neighbour|behaviour|(?:^|_)grey|labelled|learnt"
)
"""Spellings that no name has; libraries of the field write American."""
OLD_RESULT_KEYS = {"synchronised_blocks"}
"""Names of version 0.1 that results still have as fields."""


def defined_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name


def is_refused(name: str) -> bool:
    vague = name in VAGUE_NAMES or name.startswith("its_")
    return vague or (bool(BRITISH.search(name.lower())) and name not in OLD_RESULT_KEYS)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT / "src")))
def test_names_are_american_and_say_what_they_are(path):
    assert sorted({n for n in defined_names(parsed(path)) if is_refused(n)}) == []


def test_a_british_or_vague_name_is_refused():
    code = "def normalise(centre, its_row):\n    said = centre\n    self.colours, size = said, 1\n"
    refused = {name for name in defined_names(ast.parse(code)) if is_refused(name)}
    assert refused == {"normalise", "centre", "its_row", "said", "colours"}


@pytest.mark.parametrize("name", ["comprises", "noise", "raised", "precise", "axis", "stabilizers"])
def test_other_words_are_not_taken_for_british(name):
    assert not is_refused(name)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT / "src")))
def test_nothing_reads_a_pickle(path):
    tree = parsed(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = ast.unparse(node.func)
            assert called not in ("pickle.load", "pickle.loads")
            if called == "torch.load":
                assert any(k.arg == "weights_only" for k in node.keywords)


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """Line and text of every docstring, and whether a module's constant has it."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for before, statement in (
            zip([node, *body], body, strict=False) if isinstance(body, list) else ()
        ):
            match statement:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    of_constant = isinstance(node, ast.Module) and before is not node
                    yield statement.lineno, text, of_constant


def stands_alone(text: str, *, of_constant: bool) -> bool:
    if any(
        text == start or text.startswith((f"{start} ", f"{start}\n")) for start in UNCLEAR_STARTS
    ):
        return False
    return not of_constant or text.split(maxsplit=1)[0].strip(",").lower() not in PREPOSITIONS


@pytest.mark.parametrize("path", DOCUMENTED, ids=lambda p: str(p.relative_to(ROOT)))
def test_docstrings_begin_with_the_noun_of_what_they_describe(path):
    unclear = [
        f"{path}:{line}: {text.splitlines()[0]}"
        for line, text, of_constant in docstrings(parsed(path))
        if not stands_alone(text, of_constant=of_constant)
    ]
    assert not unclear, "\n".join(unclear)


@pytest.mark.parametrize(
    "text", ["Of a batch, the rows.", "The same with gates.", "What\nhappens."]
)
def test_an_unclear_docstring_is_refused(text):
    code = f'class Fields:\n    rows: int\n    """{text}"""\n'
    ((line, found, of_constant),) = docstrings(ast.parse(code))
    assert (line, of_constant) == (3, False)
    assert not stands_alone(found, of_constant=of_constant)


def test_a_constant_that_is_one_prepositional_phrase_is_refused():
    code = '"""Numbers from a sample."""\nROWS = 5\n"""In a batch, at most."""\n'
    verdicts = [stands_alone(text, of_constant=c) for _, text, c in docstrings(ast.parse(code))]
    assert verdicts == [True, False]


def public_functions(node: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef]:
    """Functions and methods without an underscore, also in their class; documented magic ones."""
    for child in node.body:
        match child:
            case ast.FunctionDef(name=name):
                if not name.startswith("_") or (name.startswith("__") and ast.get_docstring(child)):
                    yield child
            case ast.ClassDef(name=name) if not name.startswith("_"):
                yield from public_functions(child)


def raised_by(function: ast.FunctionDef) -> set[str]:
    """Exceptions that a function raises by their names; not those of functions inside it."""
    names: set[str] = set()
    waiting: list[ast.AST] = [*function.body]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(raised, ast.Name) and raised.id[0].isupper():
                names.add(raised.id)
        waiting += ast.iter_child_nodes(node)
    return names


def undocumented_errors(tree: ast.Module) -> list[str]:
    wrong = []
    for function in public_functions(tree):
        stated = (ast.get_docstring(function) or "").partition("Raises:")[2]
        missing = [name for name in raised_by(function) if f"{name}:" not in stated]
        wrong += [f"{function.name}: {name}" for name in sorted(missing)]
    return wrong


def test_public_functions_say_what_they_raise():
    wrong = {path: found for path in MODULES if (found := undocumented_errors(parsed(path)))}
    assert wrong == {}


def test_an_error_that_the_docstring_leaves_out_is_found():
    code = (
        'def read(path):\n    """Read.\n\n    Raises:\n        DiskError: Gone.\n    """\n'
        "    if not path:\n        raise DiskError('Gone.')\n    raise ValueError\n"
        "def _read(path):\n    raise ValueError\n"
        "class File:\n    def read(self):\n        raise TypeError('Closed.')\n"
    )
    assert undocumented_errors(ast.parse(code)) == ["read: ValueError", "read: TypeError"]


def test_the_front_door_offers_what_it_lists():
    for name in mechatlas.__all__:
        assert getattr(mechatlas, name).__module__.startswith("mechatlas.")
    with pytest.raises(AttributeError, match="nothing"):
        _ = mechatlas.nothing  # pyright: ignore[reportAttributeAccessIssue]


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, mechatlas; print([m for m in ('torch', 'plotly') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_using_the_package_imports_no_tool_of_the_page_and_no_compiler(tmp_path):
    code = (
        "import sys, mechatlas as m; m.collect, m.train\n"
        "for sae in (m.Autoencoder(d_in=8, n_latents=16, sparsity=m.JumpReLU()),"
        "            m.PoseTied(group=m.group('C2'), d_in=8, n_latents=64)):\n"
        "    m.load(m.save(sae, sys.argv[1]))\n"
        "heavy = ('numba', 'plotly', 'transformers', 'tyro', 'sympy')\n"
        "print([x for x in heavy if x in sys.modules])"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    said = subprocess.run(words, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_users_see_the_types_of_the_public_interface(tmp_path):
    bin = Path(sys.executable).parent
    words = [bin / "pyright", "--pythonpath", sys.executable, "--outputjson", "--ignoreexternal"]
    environment = {**os.environ, "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)  # pyright is to find the package as users have it
    done = subprocess.run(
        [*words, "--verifytypes", "mechatlas"], capture_output=True, text=True, cwd=tmp_path,
        env=environment, check=False,
    )  # fmt: skip
    report = json.loads(done.stdout)["typeCompleteness"]
    unknown = [s["name"] for s in report["symbols"] if s["isExported"] and not s["isTypeKnown"]]
    assert report["completenessScore"] >= 0.95, unknown[:40]
