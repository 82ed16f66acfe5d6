"""Machine code is kept for the code, constants and fields that it was made of, and for no other."""

import importlib
import sys
from typing import Any, NamedTuple

import pytest

from mechatlas.maths.compilation import compiled


class Ends(NamedTuple):
    """Two numbers."""

    low: float
    high: float


class Turned(NamedTuple):
    """The same two numbers, the other way round."""

    high: float
    low: float


Turned.__name__ = "Ends"


def width(ends):
    """Distance between the ends."""
    return ends.high - ends.low


@pytest.mark.parametrize("ends", [Ends(1.0, 4.0), Turned(4.0, 1.0)])
def test_a_loop_reads_fields_by_name(ends):
    assert compiled(width, structures=[type(ends)])(ends) == 3.0


def test_machine_code_has_the_fields_in_its_name():
    names = []
    for structures in ([Ends], [Turned], [Ends, Turned], []):
        width.__qualname__ = "width"
        loop: Any = compiled(width, structures=structures)
        names.append(loop.py_func.__qualname__)
    assert len(set(names)) == 4


INNER = """from mechatlas.maths.compilation import compiled
STEP = {step}
@compiled
def inner(x):
    return x + {added}
"""
OUTER = """from mechatlas.maths.compilation import compiled
from kept_inner import STEP, inner
@compiled
def outer(x):
    return STEP * inner(x)
"""


def test_a_loop_is_compiled_again_after_a_change_of_another_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "kept_outer.py").write_text(OUTER)
    results = []
    for step, added in ((1, 1), (10, 1), (10, 100)):
        (tmp_path / "kept_inner.py").write_text(INNER.format(step=step, added=added))
        importlib.invalidate_caches()
        for name in ("kept_outer", "kept_inner"):
            sys.modules.pop(name, None)
        results.append(importlib.import_module("kept_outer").outer(1))
    assert results == [2, 20, 1010]
