"""Memory of `collect` on inputs of any size, in a process of its own as people run it."""

import io
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from tests.faults.child import progress
from tests.faults.table import Table
from tests.faults.world import WIDE

ROOT = Path(__file__).parents[2]
"""Folder from which `tests` is imported."""
BUDGET_MIB, SPARE_MIB = 512, 64
"""Budget of `collect`, and what its anonymous memory may have beyond it."""
GIB = 1 << 30
RECIPE = """
sites = ["{site}"]
[network]
name = "{network}"
[samples]
type = "{kind}"
source = "{source}"
{more}
[storage]
memory_mib = 512
"""
ARRAYS = ("0", "tests.faults.world:wide", "Arrays", "")
TEXTS = ("out", "tests.app.worlds:words", "Texts", "context = 20\nmax_samples = 3000")
LINES = (*TEXTS[:3], f'{TEXTS[3]}\npacking = "cut"')
IMAGES = ("mixed3b", "inception_mini", "Images", "side = 31\ncrops = 1")
SOURCES = {
    "rows.npy": ARRAYS,
    "packed.npz": ARRAYS,
    "small.npz": ARRAYS,
    "plain.npz": ARRAYS,
    "texts.zip": TEXTS,
    "text.txt": TEXTS,
    "lines.jsonl": LINES,
    "photos.zip": IMAGES,
}
"""Name of a source -> site, network, kind of samples, and more settings."""
SMALL = (BUDGET_MIB // 4 - 1) << 20
"""Size of an array that may be packed, as it has to be unpacked in memory."""


def keep_ceilings(table: Table, *, n_bytes: int = GIB) -> None:
    """Collect from sources that are larger than the budget, which lie on a disk."""
    with tempfile.TemporaryDirectory() as place:
        _keep_ceilings(Path(place), table, n_bytes)


def _keep_ceilings(place: Path, table: Table, n_bytes: int) -> None:
    for name, (site, network, kind, more) in SOURCES.items():
        source = place / name
        size = SMALL if name == "small.npz" else n_bytes
        _write(source, size)
        recipe = RECIPE.format(site=site, network=network, kind=kind, source=source, more=more)
        (place / "recipe.toml").write_text(recipe)
        code, peak, errors = _measured(["collect", "recipe.toml", "--out", name + ".store"], place)
        outcome = {0: "same", 2: "unnamed", None: "hang"}.get(code, "traceback")
        if name == "packed.npz" and "which is compressed, would take" in errors:
            outcome = "named"  # it would have to be unpacked in memory
        if peak > BUDGET_MIB + SPARE_MIB:
            outcome = "harm"
        example = f"{peak:.0f} MiB of {BUDGET_MIB}, exit {code}: {errors[-200:]}"
        table.add(f"{size >> 20} MiB of {name}", "collect", outcome, example)
        print(f"{name}: {example}", flush=True)
        source.unlink()


def _write(source: Path, n_bytes: int) -> None:
    """Write a source of a size, in pieces."""
    n = n_bytes // (4 * WIDE)
    if source.suffix == ".npy":
        rows = np.lib.format.open_memmap(source, "w+", np.float32, (n, WIDE))
        rows[:, 0] = np.arange(n)
        rows.flush()
    elif source.suffix == ".npz":
        pack = zipfile.ZIP_STORED if source.stem == "plain" else zipfile.ZIP_DEFLATED
        with (
            zipfile.ZipFile(source, "w", pack, compresslevel=1) as archive,
            archive.open("rows.npy", "w", force_zip64=True) as member,
        ):
            np.lib.format.write_array_header_2_0(
                member, {"descr": "<f4", "fortran_order": False, "shape": (n, WIDE)}
            )
            for i in range(n):
                member.write(np.full(WIDE, i, np.float32).tobytes())
    elif source.stem == "photos":
        _write_photos(source, n_bytes)
    else:
        lines = b"a few words of this size and that\n" * (1 << 15)
        if source.suffix == ".jsonl":
            text = b"a few words of this size and that " * 64
            lines = b'{"text": "%b"}\n' % text * (1 << 9)
        if source.suffix != ".zip":
            with open(source, "wb") as file:
                for _ in range(n_bytes // len(lines)):
                    file.write(lines)
            return
        with (
            zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
            archive.open("a.txt", "w", force_zip64=True) as member,
        ):
            for _ in range(n_bytes // len(lines)):
                member.write(lines)


def _write_photos(source: Path, n_bytes: int) -> None:
    """Write a zip of photographs of noise, which no format packs."""
    random, side = np.random.default_rng(0), 768
    with zipfile.ZipFile(source, "w") as archive:
        for i in range(n_bytes // (3 * side * side)):
            data = io.BytesIO()
            noise = np.frombuffer(random.bytes(3 * side * side), np.uint8)
            Image.fromarray(noise.reshape(side, side, 3)).save(data, "PNG", compress_level=0)
            archive.writestr(f"{i}.png", data.getvalue())


def _measured(
    words: list[str], here: Path, seconds: float = 100.0
) -> tuple[int | None, float, str]:
    """Run a command for so many CPU seconds; exit code, peak anonymous MiB, and what it said."""
    with open(here / "said", "w+") as said:
        command = [sys.executable, "-m", "mechatlas", *words]
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        process = subprocess.Popen(command, cwd=here, env=environment, stdout=said, stderr=said)
        peak = 0
        while process.poll() is None:
            time.sleep(0.02)
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                continue
            found = re.search(r"RssAnon:\s+(\d+) kB", status)
            peak = max(peak, int(found[1]) if found else 0)
            if progress(process.pid)[0] > seconds:
                process.kill()
                process.wait()
                return None, peak / 1024, ""
        said.seek(0)
        return process.returncode, peak / 1024, said.read()
