"""Machine code is kept for one set of fields of named tuples, and for no other."""

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
    assert names[3] == "width"
