"""Shapes and types are checked in every test; data that is not in the repository is optional."""

import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

from tests import shape_checks

hook = shape_checks.install()  # before anything imports the package

import torch  # noqa: E402

DATA = Path(os.environ.get("MECHATLAS_DATA", Path(__file__).parents[2] / "shared" / "data"))
hypothesis.settings.register_profile("untimed", deadline=None)  # the first example may compile
hypothesis.settings.load_profile("untimed")
torch.set_num_threads(1)  # on a busy machine threads that wait for one another are slow


@pytest.fixture(autouse=True)
def shapes_are_checked() -> None:
    """The first calls of each function in each test are checked."""
    shape_checks.new_test()


@pytest.fixture(scope="session")
def data() -> Callable[[str], Path]:
    """Path of a file of real data; the test is skipped, saying why, where it is missing."""

    def find(name: str) -> Path:
        if not (DATA / name).exists():
            pytest.skip(f"needs {name}, which is not in the repository (set MECHATLAS_DATA)")
        return DATA / name

    return find
