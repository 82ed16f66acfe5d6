"""The short form of the harness of faults; the full one is `make faults`.

It runs in a process of its own, without the checks of shapes and types that tests have.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_no_fault_loses_work_or_passes_unnoticed(tmp_path):
    table = tmp_path / "faults.md"
    words = [sys.executable, "-m", "tests.faults", "--short", "--out", str(table)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "SIGKILL at a crash point" in table.read_text()
