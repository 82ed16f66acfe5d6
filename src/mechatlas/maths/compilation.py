"""Compilation of inner loops to machine code that is kept on disk."""

import functools
import inspect
import logging
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from types import ModuleType
from typing import Any, TypeVar

import numba
from numba.core import event
from numba.extending import register_jitable

NOTICE = "Compiling inner loops for this machine; this takes some seconds, and happens once."
Loop = TypeVar("Loop", bound=Callable[..., Any])


def compiled(
    function: Loop,
    *,
    fastmath: bool | Collection[str] = False,
    structures: Iterable[Any] = (),
    inner: bool = False,
) -> Loop:
    """Compile a loop without the interpreter's lock, and keep the result where that is possible.

    Numba keeps machine code on disk by the name of a loop and the age of its file. But it reads
    named tuples by the place of their fields, and builds in constants and loops of other files,
    whose age it does not look at. With all these in the name, code that was compiled for others is
    never taken, nor is a tuple looked for that is no longer there.

    Args:
        function: The loop, in the part of Python that numba compiles.
        fastmath: Freedoms in floating-point arithmetic, by LLVM's names; by default none.
        structures: Classes of the named tuples that the loop, and any loop it calls, takes.
        inner: Whether only compiled loops call the loop. Then it is a part of each of them, and
            for Python, which need not wait for a form of its own, the function that it was. Were it
            a compiled function that several call, a process would take whichever of their copies it
            met first, and with freedoms in arithmetic these round differently.
    """
    function = inspect.unwrap(function)  # tests wrap functions in checks
    fields = sorted((each.__name__, each._fields) for each in structures)
    built_in = repr((fields, *_built_in(function)))
    function.__qualname__ += f"_{zlib.crc32(built_in.encode()):08x}"
    freedoms = fastmath if isinstance(fastmath, bool) else set(fastmath)
    options: dict[str, Any] = {
        "nogil": True, "error_model": "numpy", "fastmath": freedoms,
        "no_cfunc_wrapper": True,
    }  # fmt: skip
    compiler: Any = numba.njit
    if inner:
        return register_jitable(forceinline=True, no_cpython_wrapper=True, **options)(function)
    try:
        return compiler(cache=True, **options)(function)
    except RuntimeError:  # no writable place for the cache: compile in every process
        return compiler(**options)(function)


def inner(function: Loop, *, fastmath: bool | Collection[str] = False) -> Loop:
    """Compile a loop that takes no named tuple and that only compiled loops call."""
    return compiled(function, fastmath=fastmath, inner=True)


def _built_in(function: Callable[..., Any]) -> Iterator[tuple[str, object]]:
    """Source of a loop's own file, and what becomes part of its machine code from elsewhere."""
    yield function.__module__, _source(inspect.getmodule(function))
    variables = inspect.getclosurevars(function)
    for name, value in sorted({**variables.nonlocals, **variables.globals}.items()):
        loop = getattr(value, "py_func", value)
        if inspect.isfunction(loop):  # compiled here: its name has all that it reads
            yield name, loop.__qualname__
        elif isinstance(value, (bool, int, float, str, tuple)):
            yield name, value
        else:
            yield name, _source(inspect.getmodule(value))


@functools.cache
def _source(module: ModuleType | None) -> str:
    """Source of a module, or nothing of numpy, math and what is not written in Python."""
    if module is None or module.__name__.partition(".")[0] in ("numpy", "math", "numba"):
        return ""
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):
        return ""


class _Notice(event.Listener):
    """Listener that says, once a process, that loops are compiled and not read from disk."""

    def __init__(self) -> None:
        self.announced = False

    def on_start(self, event: Any) -> None:
        """Say it before the first one."""
        if not self.announced and event.data["dispatcher"].py_func.__module__.startswith(
            "mechatlas."
        ):
            self.announced = True
            logging.getLogger("mechatlas").warning(NOTICE)

    def on_end(self, event: Any) -> None:
        """Say nothing."""


event.register("numba:compile", _Notice())
