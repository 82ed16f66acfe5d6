"""Shapes and types are checked in every test; data that is not in the repository is optional."""

import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
from jaxtyping import install_import_hook

# Before anything imports the package: from here on every annotated call is checked.
hook = install_import_hook("mechatlas", "beartype.beartype")

import torch  # noqa: E402

DATA = Path(os.environ.get("MECHATLAS_DATA", Path(__file__).parents[2] / "shared" / "data"))
hypothesis.settings.register_profile("untimed", deadline=None)  # the first example may compile
hypothesis.settings.load_profile("untimed")
torch.set_num_threads(1)  # on a busy machine threads that wait for one another are slow


@pytest.fixture(scope="session")
def data() -> Callable[[str], Path]:
    """Path of a file of real data; the test is skipped, saying why, where it is missing."""

    def find(name: str) -> Path:
        if not (DATA / name).exists():
            pytest.skip(f"needs {name}, which is not in the repository (set MECHATLAS_DATA)")
        return DATA / name

    return find
