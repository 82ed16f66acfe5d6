"""Sweeps: every combination is trained once, named, listed, and made up for when missing."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

import mechatlas as ma
from mechatlas.app.cli import main
from mechatlas.app.run_folder import CHECKPOINT, execute
from mechatlas.files import MANIFEST, read_manifest


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    from torch import nn

    folder = tmp_path_factory.mktemp("sweep") / "store"
    x = np.random.default_rng(0).normal(size=(400, 6)).astype("float32")
    ma.collect(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), x, ["0", "1"], folder)
    return folder


def write(path, store, *lines):
    path.write_text(
        f'store = "{store}"\nsteps = 20\nbatch_size = 32\ncheckpoint_every = 10\n'
        + "\n".join(lines)
    )
    return str(path)


FOUR = ('site = "1"', "n_latents = [12, 16]", "[sparsity]", 'type = "TopK"', "k = [2, 3]")


def sweep(capsys, *words):
    main(["sweep", *map(str, words), "--json"])
    return json.loads(capsys.readouterr().out)


def test_every_combination_is_trained_as_train_would(store, tmp_path, capsys):
    recipe = write(tmp_path / "sweep.toml", store, *FOUR)
    out = tmp_path / "out"
    found = sweep(capsys, recipe, "--out", out)
    assert found["n_runs"] == 4
    assert found["varied"] == ["n_latents", "sparsity.k"]
    table = pq.read_table(out / "runs.parquet").to_pydict()
    assert table["name"] == [f"n_latents-{n}_k-{k}" for n in (12, 16) for k in (2, 3)]
    assert table["sparsity.k"] == [2, 3, 2, 3]
    assert [round(l0) for l0 in table["l0"]] == [2, 3, 2, 3]
    assert found["best_fvu"] == min(table["fvu"])
    single = write(
        tmp_path / "one.toml", store, 'site = "1"', "n_latents = 16", "[sparsity]", "k = 3"
    )
    main(["train", single, "--out", str(tmp_path / "one")])
    one = ma.load(tmp_path / "one")
    same = ma.load(out / "n_latents-16_k-3")
    assert np.array_equal(one.W_dec.detach().numpy(), same.W_dec.detach().numpy())

    page = tmp_path / "page.html"
    main(["report", str(out), "--out", str(page)])
    assert 'data-figure="frontier"' in page.read_text()
    main(["verify", str(out)])


def test_what_is_missing_or_damaged_is_trained_and_nothing_else(store, tmp_path, capsys):
    recipe = write(tmp_path / "sweep.toml", store, *FOUR)
    out = tmp_path / "out"
    sweep(capsys, recipe, "--out", out)
    before = {f.name: (f / MANIFEST).stat().st_mtime_ns for f in out.iterdir() if f.is_dir()}
    missing, damaged = out / "n_latents-12_k-3", out / "n_latents-16_k-2"
    files = [folder / "dictionary.safetensors" for folder in (missing, damaged)]
    weights = [file.read_bytes() for file in files]
    shutil.rmtree(missing)
    files[1].write_bytes(weights[1][:-1] + b"x")
    left = out / "n_latents-12_k-2" / CHECKPOINT  # of a run that was killed at its very end
    left.mkdir()
    parents = read_manifest(out / MANIFEST)["parents"]
    again = sweep(capsys, recipe, "--out", out, "--engine", "processes:2")
    assert again["n_kept"] == 2
    after = {f.name: (f / MANIFEST).stat().st_mtime_ns for f in out.iterdir() if f.is_dir()}
    assert {name for name in before if before[name] != after[name]} == {
        missing.name,
        damaged.name,
    }
    assert [file.read_bytes() for file in files] == weights  # also of another process
    assert not left.exists()
    assert list(read_manifest(out / MANIFEST)["parents"].items()) == list(parents.items())


def test_one_that_fails_is_named_and_the_others_are_kept(store, tmp_path, capsys):
    recipe = write(tmp_path / "sweep.toml", store, 'site = ["1", "nowhere"]', "n_latents = 40")
    with pytest.raises(SystemExit) as ended:
        main(["sweep", recipe, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    said = capsys.readouterr().out
    assert "1 of 2 dictionaries trained" in said
    assert "Failed: site-nowhere" in said
    assert (tmp_path / "out" / "site-1" / MANIFEST).exists()


@pytest.mark.parametrize("first", [True, False])
def test_a_folder_that_is_deleted_meanwhile_does_not_come_back_in_part(
    first, store, tmp_path, capsys, monkeypatch
):
    recipe = write(tmp_path / "sweep.toml", store, 'site = "1"', "n_latents = [40, 41]")
    out = tmp_path / "out"

    def trained_and_deleted(config):
        if not first and config.n_latents == 41:
            shutil.rmtree(out)
        result = execute(config)
        if first and config.n_latents == 40:
            shutil.rmtree(out)
        return result

    monkeypatch.setattr("mechatlas.app.commands.sweep.execute", trained_and_deleted)
    with pytest.raises(SystemExit) as ended:
        main(["sweep", recipe, "--out", str(out)])
    assert ended.value.code == 2
    assert "was deleted, moved or replaced" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (['site = "1"', "n_latents = []"], "n_latents is an empty list"),
        (['site = "1"', "n_latents = [40, 0]"], "n_latents-0"),
        (['site = "1"', "n_latent = [40, 41]"], "n_latent"),
        (['site = "1"', "n_latents = [40, 40]"], "two dictionaries would be called"),
        (
            ['site = "1"', f"seed = {list(range(101))}", f"n_latents = {list(range(1, 101))}"],
            "10,100",
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(lines, sentence, store, tmp_path, capsys):
    recipe = write(tmp_path / "sweep.toml", store, *lines)
    with pytest.raises(SystemExit) as ended:
        main(["sweep", recipe, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_settings_under_the_same_names_are_refused(store, tmp_path, capsys):
    out = tmp_path / "out"
    sweep(capsys, write(tmp_path / "a.toml", store, *FOUR), "--out", out)
    other = write(tmp_path / "b.toml", store, "seed = 1", *FOUR)
    with pytest.raises(SystemExit):
        main(["sweep", other, "--out", str(out)])
    assert "holds a dictionary of other settings" in capsys.readouterr().err
