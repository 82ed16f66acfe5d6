"""The folder of a run: nothing of an earlier run stays, and nothing outside is touched."""

import contextlib
import dataclasses
import errno
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mechatlas.app.run_folder import STORE, CommandResult, RunConfig, RunFolder
from mechatlas.base import DiskError
from mechatlas.files import MANIFEST, TEMPORARY, cannot_write, read_json, write_manifest
from mechatlas.outputs import temporary_folder, temporary_room


@dataclasses.dataclass(frozen=True, kw_only=True)
class SomeConfig(RunConfig):
    seed: int = 0


@contextlib.contextmanager
def written(out, *names, kind="matching"):
    with RunFolder(out, kind, SomeConfig(out=out)) as folder:
        for name in names:
            folder.tensors(name, {"x": np.arange(3)})
        yield folder


def run(out, *names):
    with written(out, *names) as folder:
        folder.finish(CommandResult())


def test_files_of_an_earlier_run_do_not_stay(tmp_path):
    out = tmp_path / "out"
    run(out, "a.safetensors", "b.safetensors")
    run(out, "a.safetensors")
    assert not (out / "b.safetensors").exists()
    assert set(read_json(out / MANIFEST)["files"]) == {
        "a.safetensors",
        "recipe.toml",
        "result.json",
    }


def test_nor_do_they_when_a_run_between_was_killed(tmp_path):
    out = tmp_path / "out"
    run(out, "a.safetensors", "b.safetensors")
    with written(out, "a.safetensors"):
        pass
    assert read_json(out / MANIFEST)["complete"] is False
    run(out, "a.safetensors")
    assert not (out / "b.safetensors").exists()


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path):
    out, outside = tmp_path / "out", tmp_path / "precious"
    outside.write_text("mine")
    run(out, "a.safetensors")
    forged = read_json(out / MANIFEST)
    forged["files"] |= {"../precious": "0", str(outside): "0", "..": "0"}
    write_manifest(out / MANIFEST, forged)
    run(out, "a.safetensors")
    assert outside.read_text() == "mine"


def test_a_site_of_a_store_may_be_called_checkpoint(tmp_path):
    site = tmp_path / "out" / "checkpoint"
    site.mkdir(parents=True)
    (site / "train-00000.safetensors").write_text("rows")
    write_manifest(tmp_path / "out" / MANIFEST, {"kind": STORE})  # as `collect` does
    with written(tmp_path / "out", kind=STORE) as folder:
        folder.finish(CommandResult())
    assert (site / "train-00000.safetensors").exists()


def test_a_file_that_a_killed_run_was_writing_does_not_stay(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / f"pictures.safetensors{TEMPORARY}").write_text("half")
    run(out, "a.safetensors")
    assert sorted(p.name for p in out.iterdir()) == [
        "a.safetensors", MANIFEST, "recipe.toml", "result.json"
    ]  # fmt: skip


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path):
    out = tmp_path / "out"
    with (
        written(out, "a.safetensors"),
        pytest.raises(DiskError, match="Another command is writing into"),
        ThreadPoolExecutor(1) as elsewhere,
    ):
        elsewhere.submit(run, out, "a.safetensors").result()
    run(out, "a.safetensors")


def test_a_lock_ends_with_its_process(tmp_path):
    pid = os.fork()
    if pid == 0:
        with written(tmp_path / "out", "a.safetensors"):
            os._exit(0)
    os.waitpid(pid, 0)
    run(tmp_path / "out", "a.safetensors")
    assert read_json(tmp_path / "out" / MANIFEST)["complete"] is True


def test_a_folder_that_was_deleted_or_replaced_is_not_called_finished(tmp_path):
    out = tmp_path / "out"
    with written(out, "a.safetensors") as folder:
        shutil.rmtree(out)
        with pytest.raises(DiskError, match="was deleted, moved or replaced"):
            folder.finish(CommandResult())
        assert not out.exists()
        out.mkdir()
        with pytest.raises(DiskError, match="was deleted, moved or replaced"):
            folder.json("b.json", {})
    with written(out, "a.safetensors") as folder:
        (out / "a.safetensors").unlink()
        with pytest.raises(DiskError, match=r"a\.safetensors was deleted before"):
            folder.finish(CommandResult())


def test_a_folder_in_which_nothing_was_written_does_not_stay(tmp_path):
    with written(tmp_path / "deep" / "out"):
        assert (tmp_path / "deep" / "out").is_dir()
    assert list(tmp_path.iterdir()) == []


def test_why_a_place_cannot_be_written_is_said_as_it_is(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(DiskError, match="file is a file, expected a folder"),
        written(tmp_path / "file" / "out"),
    ):
        pass
    said = {
        number: cannot_write(tmp_path / "out", OSError(number, os.strerror(number)))
        for number in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOENT)
    }
    assert [number for number in said if "Free some space" in said[number]] == [errno.ENOSPC]
    assert "was deleted or moved meanwhile" in said[errno.ENOENT]
    with (
        pytest.raises(DiskError, match=r"nothing can be made in its folder.*another --out"),
        written(Path("/proc/out/deep")),
    ):
        pass


def test_no_room_for_temporary_files_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(DiskError, match="set TMPDIR to a folder with room"), temporary_folder():
        pass
    with pytest.raises(DiskError, match="set TMPDIR"), temporary_room():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError), temporary_room():
        raise FileNotFoundError(errno.ENOENT, "missing")
