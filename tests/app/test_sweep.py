"""Sweeps: every combination is run once, named, listed, and made up for when missing."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

import mechatlas as ma
from mechatlas.app.cli import main
from mechatlas.app.run_folder import CHECKPOINT, execute
from mechatlas.files import MANIFEST, read_manifest
from tests.analysis.proofs.planted import planted


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
        (['command = "report"'], "command must be one of train, prove"),
        (['command = "match"', "trust = true"], "named on the command line only"),
        (['site = "1"', "n_latents = [40, 40]"], "two runs would be called"),
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
    assert "holds a run of other settings" in capsys.readouterr().err


def test_proofs_of_several_networks_are_the_same_on_every_engine(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    s3 = ma.group("S3")
    np.save("table.npy", s3.table)
    for seed in (0, 1):
        arrays = zip(("left", "right", "unembed"), planted(s3, noise=0.02, seed=seed), strict=True)
        save_file(dict(arrays), f"net{seed}.safetensors")
    recipe = tmp_path / "sweep.toml"
    recipe.write_text(
        'command = "prove"\ntable = "table.npy"\nweights = ["net0.safetensors", '
        '"net1.safetensors", "none.safetensors"]\n'
    )
    tables = []
    for engine in ("here", "processes:1"):
        with pytest.raises(SystemExit) as ended:
            main(["sweep", str(recipe), "--out", engine[:4], "--engine", engine])
        assert ended.value.code == 2
        said = capsys.readouterr().out
        assert "2 of 3 runs of prove done" in said
        assert "Failed: weights-none.safetensors: There is no file" in said
        tables.append(pq.read_table(f"{engine[:4]}/runs.parquet").to_pydict())
    single = ["prove", "net1.safetensors", "--table", "table.npy", "--out", "one"]
    main(single)
    for name in ("proof.safetensors", "neurons.json"):
        one = (tmp_path / "one" / name).read_bytes()
        for place in ("here", "proc"):
            assert (tmp_path / place / "weights-net1.safetensors" / name).read_bytes() == one
    here, there = tables
    assert here["weights"] == ["net0.safetensors", "net1.safetensors", "none.safetensors"]
    assert here["accuracy_bound"] == there["accuracy_bound"]
    assert (
        here["accuracy_bound"][1]
        == json.loads((tmp_path / "one/result.json").read_text())["accuracy_bound"]
    )
    assert here["accuracy_bound"][2] is None
    main(["verify", "here"])


def test_matches_of_several_pairs_and_costs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        sae = ma.Autoencoder(d_in=8, n_latents=24, sparsity=ma.TopK(k=2), seed=ord(name))
        ma.save(sae, name)
    (tmp_path / "sweep.toml").write_text(
        'command = "match"\ncost = ["decoder", "cosine"]\n'
        'dictionaries = [["a", "b"], ["b", "c"], ["a", "b", "c"]]\n'
    )
    found = sweep(capsys, "sweep.toml", "--out", "out")
    assert (found["n_runs"], found["command"], found["best"]) == (6, "match", "")
    table = pq.read_table("out/runs.parquet").to_pydict()
    assert table["name"][:2] == ["cost-decoder_dictionaries-a+b", "cost-decoder_dictionaries-b+c"]
    assert table["n_a"] == [24, 24, None, 24, 24, None]  # of single pairs
    assert sweep(capsys, "sweep.toml", "--out", "out")["n_kept"] == 6
