"""The folder of a run: nothing of an earlier run stays, and nothing outside is touched."""

import dataclasses

import numpy as np

from mechatlas.app.run_folder import STORE, CommandResult, RunConfig, RunFolder
from mechatlas.files import MANIFEST, read_json, write_manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class SomeConfig(RunConfig):
    seed: int = 0


def run(out, *names, kind="matching"):
    folder = RunFolder(out, kind, SomeConfig(out=out))
    for name in names:
        folder.tensors(name, {"x": np.arange(3)})
    return folder


def test_files_of_an_earlier_run_do_not_stay(tmp_path):
    out = tmp_path / "out"
    run(out, "a.safetensors", "b.safetensors").finish(CommandResult())
    run(out, "a.safetensors").finish(CommandResult())
    assert not (out / "b.safetensors").exists()
    assert set(read_json(out / MANIFEST)["files"]) == {
        "a.safetensors",
        "recipe.toml",
        "result.json",
    }


def test_nor_do_they_when_a_run_between_was_killed(tmp_path):
    out = tmp_path / "out"
    run(out, "a.safetensors", "b.safetensors").finish(CommandResult())
    run(out, "a.safetensors")
    assert read_json(out / MANIFEST)["complete"] is False
    run(out, "a.safetensors").finish(CommandResult())
    assert not (out / "b.safetensors").exists()


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path):
    out, outside = tmp_path / "out", tmp_path / "precious"
    outside.write_text("mine")
    run(out, "a.safetensors").finish(CommandResult())
    forged = read_json(out / MANIFEST)
    forged["files"] |= {"../precious": "0", str(outside): "0", "..": "0"}
    write_manifest(out / MANIFEST, forged)
    run(out, "a.safetensors").finish(CommandResult())
    assert outside.read_text() == "mine"


def test_a_site_of_a_store_may_be_called_checkpoint(tmp_path):
    site = tmp_path / "out" / "checkpoint"
    site.mkdir(parents=True)
    (site / "train-00000.safetensors").write_text("rows")
    RunFolder(tmp_path / "out", STORE, SomeConfig(out=tmp_path / "out")).finish(CommandResult())
    assert (site / "train-00000.safetensors").exists()
