"""Files of each layout whose sizes lie are refused by name, in little memory."""

import io
import json
import multiprocessing
import resource
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from mechatlas import tensorfiles
from mechatlas.base import WeightsError
from mechatlas.dictionaries.foreign import weights
from mechatlas.dictionaries.formats import load
from tests.dictionaries.golden import GIVEN, GOLDEN, NAMES, PUBLISHED, TEMPORAL, expected

ROOM = 256 << 20
"""Bytes of address space that refusing a file may take."""
ZEROS = 2 << 20
"""Bytes of zeros that a file unfolds into; the limit is lowered to half of them."""
HUGE = 1 << 38
"""Numbers that a file promises."""


def lying_safetensors(data: bytes) -> list[bytes]:
    """The first tensor has a huge shape, its bytes or not; or the header is as long as memory."""
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = next(key for key in header if key != "__metadata__")
    found = [(1 << 40).to_bytes(8, "little") + data[8:]]
    for end in (header[name]["data_offsets"][1], 4 * HUGE):
        begin = header[name]["data_offsets"][0]
        header[name] |= {"shape": [HUGE], "dtype": "F32", "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        found.append(len(text).to_bytes(8, "little") + text + rest)
    return found


def deflated(names: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in names.items():
            archive.writestr(name, data)
    return out.getvalue()


def lying_npz(data: bytes) -> list[bytes]:
    """The first array is zeros that little holds, or its header promises more than is there."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = {name: archive.read(name) for name in archive.namelist()}
    first = next(iter(names))
    zeros, header = io.BytesIO(), io.BytesIO()
    np.save(zeros, np.zeros(ZEROS // 4, np.float32))
    described = {"descr": "<f4", "fortran_order": False, "shape": (HUGE,)}
    np.lib.format.write_array_header_1_0(header, described)
    return [deflated({**names, first: each.getvalue()}) for each in (zeros, header)]


def lying_torch(data: bytes) -> list[bytes]:
    """A tensor repeats one number without end, or its storage is zeros that little holds."""
    line = data.partition(b"\n")[0] + b"\n" if data[:1] == b"{" else b""
    content = torch.load(io.BytesIO(data[len(line) :]), weights_only=True)
    inner = next((content[key] for key in tensorfiles.WRAPPERS if key in content), content)
    name = next(key for key, value in inner.items() if isinstance(value, torch.Tensor))
    found = []
    for tensor in (torch.zeros(1).expand(HUGE), torch.zeros(ZEROS // 4)):
        inner[name], out = tensor, io.BytesIO()
        torch.save(content, out)
        with zipfile.ZipFile(out) as archive:
            names = {each: archive.read(each) for each in archive.namelist()}
        found.append(line + deflated(names))
    return found


MADE = {".safetensors": lying_safetensors, ".npz": lying_npz}


def refuse_all(cases: list[tuple[Path, dict, str]], answers) -> None:
    """Load each in little address space, and say what happened."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wrong = []
    for place, given, name in cases:
        try:
            load(place, **given)
            wrong.append(f"{place} was read")
        except WeightsError as error:
            if name not in str(error) or "emory" in str(error) or "alloc" in str(error):
                wrong.append(f"{place}: {error}")
        except BaseException as error:
            wrong.append(f"{place}: {error!r}")
    answers.send((wrong, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and a limit of address space")
@pytest.mark.filterwarnings("ignore")
def test_files_whose_sizes_lie_are_refused_by_name_in_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorfiles, "EXPANDED_FROM", ZEROS // 2)
    cases = []
    for name in (*NAMES, *PUBLISHED, *TEMPORAL):
        for file in sorted((GOLDEN / name).rglob("*")):
            if file.suffix in (".json", ".yaml", "") or file.is_dir():
                continue
            for i, data in enumerate(MADE.get(file.suffix, lying_torch)(file.read_bytes())):
                folder = tmp_path / f"{name}-{file.name}-{i}"
                shutil.copytree(GOLDEN / name, folder)
                lying = folder / file.relative_to(GOLDEN / name)
                lying.write_bytes(data)
                inside = folder / "layer_12" if name == "temporal_published" else folder
                cases.append((inside, GIVEN.get(name, {}), file.name.split(".")[0]))
    assert len(cases) > 200
    forked = multiprocessing.get_context("fork")
    here, there = forked.Pipe()
    child = forked.Process(target=refuse_all, args=(cases, there))
    child.start()
    assert here.poll(120), "the child has died"
    wrong, peak = here.recv()
    child.join()
    assert not wrong
    assert peak * 1024 < ROOM


def test_a_large_archive_of_arrays_stays_on_disk(monkeypatch, tmp_path):
    shutil.copy(GOLDEN / "gemma_scope_transcoder" / "params.npz", tmp_path)
    for module in (tensorfiles, weights):
        monkeypatch.setattr(module, "MAP_FROM", 100)
    found, given = expected("gemma_scope_transcoder"), GIVEN["gemma_scope_transcoder"]
    whole = load(GOLDEN / "gemma_scope_transcoder", **given)
    mapped = tensorfiles.read_tensors(tmp_path / "params.npz")
    if sys.platform == "linux":
        assert str(tmp_path / "params.npz") in Path("/proc/self/maps").read_text()
    assert torch.equal(mapped["W_dec"], whole.W_dec)
    torch.testing.assert_close(whole(found["x"]), found["output"], rtol=1e-5, atol=1e-5)
    arrays: dict[str, Any] = dict(np.load(tmp_path / "params.npz"))
    halves: dict[str, Any] = {key: array.astype(np.float16) for key, array in arrays.items()}
    np.savez(tmp_path / "params.npz", **halves)
    half = load(tmp_path, **given)
    assert half.W_enc.dtype == torch.float16
    by_column: dict[str, Any] = {key: np.asfortranarray(a) for key, a in arrays.items()}
    np.savez(tmp_path / "params.npz", **by_column)
    torch.testing.assert_close(load(tmp_path, **given)(found["x"]), found["output"])
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "unrelated.safetensors")
    np.savez_compressed(tmp_path / "params.npz", **arrays)
    torch.testing.assert_close(load(tmp_path, **given)(found["x"]), found["output"])
