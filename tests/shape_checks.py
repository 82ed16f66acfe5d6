"""Checks of shapes and types of the package's annotated calls, a share of them for frequent ones.

    install      check calls of the package from here on
    new_test     count calls from zero

All checks take more than half of the time of the tests of training: some 50 microseconds a call,
and 4 milliseconds for a function that is defined within another, each time that the other is
called. So the first calls of each function in each test are checked and then one in `EVERY`, and of
a function within another the first `INNER`. With `MECHATLAS_CHECK_ALL=1` in the environment, every
call is.
"""

import functools
import inspect
import os
from collections import Counter
from types import CodeType, FunctionType
from typing import Any

import jaxtyping
from jaxtyping import _decorator, install_import_hook

FIRST = 1
"""Calls of each function that are checked in each test."""
EVERY = 32
"""Of later ones, one in so many is."""
INNER = 1
"""Times that a function within another is checked after it was defined, in each process."""
TESTS = [0]
"""Number of tests that began."""

defined: Counter[CodeType] = Counter()
"""Times that each function within another was defined."""
check_always = jaxtyping.jaxtyped


def check_some(function: Any = None, *, typechecker: Any) -> Any:
    """Check the first calls of a function in each test, and some of the later ones."""
    if function is None:
        return functools.partial(check_some, typechecker=typechecker)
    if inspect.isclass(function) and hasattr(function.__init__, "__wrapped__"):
        return function
    if not isinstance(function, FunctionType):
        return check_always(function, typechecker=typechecker)
    if "<locals>" in function.__qualname__:
        defined[function.__code__] += 1
        if defined[function.__code__] > INNER:
            return function
    test, calls, checked = 0, 0, None

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        nonlocal test, calls, checked
        if test != TESTS[0]:
            test, calls = TESTS[0], 0
        calls += 1
        if calls > FIRST and calls % EVERY:
            return function(*args, **options)
        if checked is None:  # takes milliseconds, and most functions are not called
            checked = check_always(function, typechecker=typechecker)
        return checked(*args, **options)

    return call


def install() -> Any:
    """Check calls of the package from here on; to be called before it is imported.

    Returns:
        The hook, to uninstall.
    """
    if not os.environ.get("MECHATLAS_CHECK_ALL"):
        jaxtyping.jaxtyped = _decorator.jaxtyped = check_some
    return install_import_hook("mechatlas", "beartype.beartype")


def new_test() -> None:
    """Count calls from zero."""
    TESTS[0] += 1
