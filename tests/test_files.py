"""Readers: regular files only, checked before anything is made of them, one sentence each."""

import io
import json
import os
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from mechatlas.analysis.proofs.verifier.proof import load_proof
from mechatlas.base import DiskError, UserError, WeightsError
from mechatlas.files import (
    MANIFEST,
    TOML_LIMIT,
    checksum,
    checksum_file,
    read,
    read_json,
    read_manifest,
    read_toml,
    write,
    write_manifest,
)
from mechatlas.tensorfiles import (
    DTYPES,
    checksum_of,
    read_array,
    read_arrays,
    read_header,
    read_safetensors,
    read_table,
    read_tensors,
)

SOURCE = Path(__file__).parents[1] / "src" / "mechatlas"
OPENERS = re.compile(
    r"(?<![\w.])open\(|(?<!files)\.open\(|read_bytes\(|read_text\(|np\.load\(|np\.memmap\(|"
    r"np\.fromfile\(|safe_open\(|torch\.load\(|pq\.read|load_file\("
)
ALLOWED = {
    "files.py": "the readers",
    "tensorfiles.py": "the readers",
    "sources.py": "files of samples, of any size",
    "outputs.py": "locks of folders",
    "remote.py": "local copies, to hash them",
    "dictionaries/hub.py": "what was downloaded, to hash it, and the registry of the package",
    "app/cli.py": "a pipe that was closed",
    "app/report/chapter.py": "assets of the package",
    "activations/images.py": "PIL, on what sources.py has opened",
}
"""Modules that may open something themselves, and what."""
READERS = {
    "read": read, "json": read_json, "toml": read_toml, "manifest": read_manifest,
    "checksum": checksum_file, "npy": read_array, "parquet": read_table,
    "safetensors": read_safetensors, "header": read_header, "npz": read_tensors,
    "pt": read_tensors, "proof": load_proof,
}  # fmt: skip


def test_nothing_else_in_the_package_opens_a_file():
    found = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        for line in path.read_text().splitlines()
        if OPENERS.search(line) and not re.match(r"\s*(def |>>> |#)", line)
    }
    assert found == set(ALLOWED)


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_regular_file_is_named_and_never_waited_for(tmp_path, name):
    file = tmp_path / f"file.{name}"
    for kind in ("missing", "pipe", "folder", "nowhere", "circle"):
        if kind == "pipe":
            os.mkfifo(file)
        elif kind == "folder":
            file.unlink()
            file.mkdir()
        elif kind in ("nowhere", "circle"):
            file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()
            file.symlink_to(file if kind == "circle" else tmp_path / "none")
        with pytest.raises(UserError, match=re.escape(str(file))):
            READERS[name](file)


@pytest.mark.parametrize("name", READERS)
def test_what_is_damaged_is_named(tmp_path, name):
    file = tmp_path / f"file.{name}"
    for data in (b"", b"\0", b"PK\x03\x04", b"\x93NUMPY\x01", b"{" * 100, bytes(range(256)) * 9):
        file.write_bytes(data)
        if name not in ("read", "checksum") and (data or name != "toml"):
            with pytest.raises(UserError, match=re.escape(str(file))):
                READERS[name](file)


def test_json_and_toml_that_would_take_for_ever_are_refused(tmp_path):
    file = tmp_path / "f"
    for text in ("[" * 100_000, '{"a":' * 100_000, "9" * 5000):
        file.write_text(text)
        with pytest.raises(DiskError, match="cannot be read as JSON"):
            read_json(file)
    for text in ("a=" + "[" * 100_000, "a=" + "{a=" * 50_000, "a=" + "9" * 5000, "a=\xff"):
        file.write_text(text, encoding="latin-1")
        with pytest.raises(DiskError, match="is not TOML"):
            read_toml(file)
    for text in ("a." * 50_000 + "a=1", "[" + "a . " * 50_000 + "a]", '"x".' * 9000 + "a=1"):
        file.write_text(text)
        with pytest.raises(DiskError, match="a key has more than 64 parts"):
            read_toml(file)
    file.write_text("a" * 1_000_000 + "=1")
    assert read_toml(file) == {"a" * 1_000_000: 1}
    file.write_text("#" * (TOML_LIMIT + 1))
    with pytest.raises(DiskError, match="expected at most"):
        read_toml(file)
    file.write_text('a.b = "v1.2.3 of x. y. z"\nl = [1.5, 2.5, 3.5]\n')
    assert read_toml(file) == {"a": {"b": "v1.2.3 of x. y. z"}, "l": [1.5, 2.5, 3.5]}


def test_a_manifest_that_was_edited_is_noticed_and_an_old_one_has_no_checksum(tmp_path):
    file = tmp_path / MANIFEST
    write_manifest(file, {"kind": "store", "width": 40, "share": 0.1})
    values = read_manifest(file)
    text = file.read_text()
    edited = text.replace("40", "10"), text[:-1], text + " ", json.dumps(values)
    for other in (*edited, text.replace(values["checksum"], "0" * 32)):
        file.write_text(other)
        with pytest.raises(DiskError, match="damaged or was edited"):
            read_manifest(file)
    file.write_text('{"kind": "store", "width": 10}')
    assert read_manifest(file)["width"] == 10
    for text in ("[]", "null", '{"files": []}', '{"files": {"a": 1}}', '{"complete": 1}'):
        file.write_text(text)
        with pytest.raises(DiskError, match=re.escape(str(file))):
            read_manifest(file)


def test_a_file_is_compared_with_the_manifest_beside_it(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3)}
    np.save(tmp_path / "a.npy", np.arange(3))
    np.savez(tmp_path / "a.npz", a=np.arange(3.0))
    torch.save(tensors, tmp_path / "a.pt")
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    pq.write_table(pa.table({"a": [1, 2]}), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text("[1]")
    readers = {
        "a.npy": read_array, "a.npz": read_tensors, "a.pt": read_tensors, "a.json": read_json,
        "a.safetensors": read_tensors, "a.parquet": read_table,
    }  # fmt: skip
    files = {name: checksum((tmp_path / name).read_bytes()) for name in readers}
    write_manifest(tmp_path / MANIFEST, {"kind": "x", "files": files})
    for name, reader in readers.items():
        reader(tmp_path / name)
        write_manifest(tmp_path / MANIFEST, {"kind": "x", "files": {**files, name: "0"}})
        with pytest.raises(UserError, match=f"{name} is damaged or was replaced"):
            reader(tmp_path / name)
        write_manifest(  # a run that has not ended is still writing its files
            tmp_path / MANIFEST, {"kind": "x", "files": {**files, name: "0"}, "complete": False}
        )
        reader(tmp_path / name)


def test_a_file_is_written_through_no_link(tmp_path):
    (tmp_path / "precious").write_text("mine")
    for name in ("a.mechatlas.tmp", "b.mechatlas.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    os.mkfifo(tmp_path / "c.mechatlas.tmp")
    for name in ("a", "b", "c"):
        with pytest.raises(DiskError, match="Cannot write"):
            write(tmp_path / name, b"x")
    assert (tmp_path / "precious").read_text() == "mine"


def test_every_number_format_is_read_as_the_library_reads_it(tmp_path):
    tensors = {
        f"{key}{shape}": torch.randint(0, 2, shape).to(dtype)
        for key, dtype in DTYPES.items()
        for shape in ((), (3,), (2, 0), (2, 3, 1))
    }
    file = tmp_path / "t.safetensors"
    safetensors.torch.save_file(tensors, file, {"about": "this"})
    read_back, metadata = read_safetensors(file)
    assert metadata == {"about": "this"}
    expected = safetensors.torch.load_file(file)
    assert read_back.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read_back[name].dtype == tensor.dtype
        assert read_back[name].shape == tensor.shape
        assert torch.equal(read_back[name].float(), tensor.float())
    numbers = {name: t for name, t in tensors.items() if name.startswith(("F32", "I", "U", "BOOL"))}
    safetensors.torch.save_file(numbers, file)
    for name, array in read_arrays(file).items():
        np.testing.assert_array_equal(array, numbers[name].numpy())


def header_of(entries: dict, payload: bytes = b"\0" * 8) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + payload


@pytest.mark.parametrize(
    "entries",
    [
        {"a": {"dtype": "F32", "shape": [30_000, 30_000], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1 << 60]}},
        {"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "O", "shape": [1], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
         "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [1 << 40] * 1000, "data_offsets": [0, 8]}},
        {"a": {"shape": [2]}}, {"a": 1}, [], {"__metadata__": {"a": 1}},
    ],
)  # fmt: skip
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path, entries):
    file = tmp_path / "t.safetensors"
    file.write_bytes(header_of(entries))
    with pytest.raises(WeightsError, match=re.escape(str(file))):
        read_tensors(file)


def test_an_array_that_claims_more_than_its_file_has_is_refused(tmp_path):
    def header(shape: str, descr: str = "'<f8'") -> bytes:
        text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()

    shapes = ("(10**6,)", "(10000000000000,)", "(-1,)")
    objects, long, open_ended = header("(1,)", "'|O'"), header("(1,)") + b"1" * 9, header("(1,")
    for data in (*map(header, shapes), objects, long, open_ended + b"1" * 8):
        (tmp_path / "a.npy").write_bytes(data)
        with pytest.raises(DiskError, match=r"a\.npy cannot be read"):
            read_array(tmp_path / "a.npy")
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("W_enc.npy", data)
        (tmp_path / "a.npz").write_bytes(packed.getvalue())
        with pytest.raises(WeightsError, match=r"a\.npz cannot be read"):
            read_tensors(tmp_path / "a.npz")
    np.save(tmp_path / "a.npy", np.asfortranarray(np.arange(12).reshape(3, 4)))
    np.testing.assert_array_equal(read_array(tmp_path / "a.npy"), np.arange(12).reshape(3, 4))


def test_the_checksum_of_tensors_is_of_names_types_shapes_bytes_and_text():
    a = {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    same = {"b": a["b"].clone(), "a": a["a"].clone()}
    assert checksum_of(a) == checksum_of(same)
    arrays = {"a": a["a"].numpy()}
    assert checksum_of(arrays) == checksum_of({"a": a["a"]})
    others = [
        {**a, "a": a["a"] + 1}, {**a, "a": a["a"].view(2, 3)}, {**a, "a": a["a"].int()},
        {"c": a["a"], "b": a["b"]}, {"a": a["a"]},
    ]  # fmt: skip
    assert len({checksum_of(each) for each in (a, *others)}) == 6
    assert checksum_of(a, "text") != checksum_of(a)


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "before version 1.6"])
def test_files_of_torch_are_read_whether_they_are_archives_or_not(tmp_path, archive):
    expected = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1000)}
    path = tmp_path / "weights.pth"
    torch.save(expected, path, _use_new_zipfile_serialization=archive)
    found = read_tensors(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
