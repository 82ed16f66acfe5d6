"""Machine code is kept for the code, constants and fields that it was made of, and for no other."""

import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
from numba.core.dispatcher import Dispatcher

import mechatlas
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


INNER = """from mechatlas.maths.compilation import compiled, inner as part
STEP = {step}
@{form}
def inner(x):
    return x + {added}
"""
OUTER = """from mechatlas.maths.compilation import compiled
from kept_inner import STEP, inner
@compiled
def outer(x):
    return STEP * inner(x)
"""


@pytest.mark.parametrize("form", ["compiled", "part"])
def test_a_loop_is_compiled_again_after_a_change_of_another_file(form, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "kept_outer.py").write_text(OUTER)
    results = []
    for step, added in ((1, 1), (10, 1), (10, 100)):
        (tmp_path / "kept_inner.py").write_text(INNER.format(form=form, step=step, added=added))
        importlib.invalidate_caches()
        for name in ("kept_outer", "kept_inner"):
            sys.modules.pop(name, None)
        results.append(importlib.import_module("kept_outer").outer(1))
    assert results == [2, 20, 1010]


def loops():
    """All compiled loops of the package, by module and name."""
    for found in pkgutil.walk_packages(mechatlas.__path__, "mechatlas."):
        if "triton" not in found.name and not found.name.endswith("__main__"):
            module = importlib.import_module(found.name)
            for name, value in vars(module).items():
                if isinstance(value, Dispatcher):
                    yield f"{found.name}.{name}", value


def test_what_loops_call_is_part_of_them():
    found = dict(loops())
    assert len(found) > 25
    apart = []
    for name, loop in found.items():
        variables = inspect.getclosurevars(loop.py_func)
        for used, value in {**variables.globals, **variables.nonlocals}.items():
            if isinstance(value, Dispatcher):
                apart.append(f"{name} calls {used}")
    assert not apart, "with inner=True a process cannot take another's copy, which rounds otherwise"


TRAINED = """
import hashlib, torch, mechatlas as ma
torch.set_num_threads(1)
x = torch.randn(2000, 136, generator=torch.Generator().manual_seed(0))
dictionary = ma.Autoencoder(d_in=136, n_latents=1088, sparsity=ma.TopK(k=32))
ma.train(dictionary, x, steps=5, batch_size=512)
weights = b"".join(p.detach().numpy().tobytes() for p in dictionary.parameters())
print(hashlib.sha256(weights).hexdigest())
"""


@pytest.mark.slow
def test_bytes_do_not_depend_on_whether_loops_had_to_be_compiled(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.run(
            [sys.executable, "-c", TRAINED], env=environment, check=True, capture_output=True
        )
        for _ in range(2)
    ]
    assert "Compiling inner loops" in runs[0].stderr.decode()
    assert "Compiling inner loops" not in runs[1].stderr.decode()
    assert runs[0].stdout == runs[1].stdout
