"""The wheel holds all that it needs: it runs where the source tree is not."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_wheel_installs_and_runs_without_the_source_tree(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("mechatlas-*.whl")
    assert wheel.stat().st_size < 13 << 18  # 2.3 MiB of weights and photographs
    target = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(target)
    for needed in ("bundled/inception_mini.safetensors", "bundled/photos/coffee.jpg", "py.typed"):
        assert f"mechatlas/{needed}" in names
    assert not [n for n in names if n.startswith(("tests", "benchmarks", "recipes"))]
    environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
    code = (
        "import mechatlas, sys; assert mechatlas.__file__.startswith(sys.argv[1]);"
        "from mechatlas.app.cli import main; main(['sites', 'inception_mini'])"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(target)],
        capture_output=True, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert "mixed4d" in said.stdout
