"""`mechatlas verify`, and the readers that compare checksums before it is asked for."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from mechatlas.activations.collect import StoreConfig
from mechatlas.activations.images import Images
from mechatlas.activations.networks import Network
from mechatlas.activations.positions import Positions
from mechatlas.activations.store import Store
from mechatlas.app.cli import main
from mechatlas.app.commands.collect import CollectConfig
from mechatlas.app.commands.train import TrainConfig
from mechatlas.app.report.page import report
from mechatlas.app.run_folder import execute
from mechatlas.base import StoreError, UserError, WeightsError
from mechatlas.dictionaries.formats import load
from mechatlas.dictionaries.sparsity import TopK
from mechatlas.files import checksum_file, read_manifest, write_manifest
from tests.app.worlds import photographs, run_command
from tests.forging import forge
from tests.networks import Tiny


def another() -> Tiny:
    torch.manual_seed(1)
    return Tiny().eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Two stores of different networks, a dictionary of each and a matching."""
    root = tmp_path_factory.mktemp("world")
    zip_file = photographs(root.with_suffix(".zip"))
    for name, network in (("store", "tests.networks:tiny"), ("other", f"{__name__}:another")):
        execute(
            CollectConfig(
                network=Network(name=network),
                sites=("mixed",),
                samples=Images(source=str(zip_file), side=15, crops=2),
                storage=StoreConfig(positions=Positions(rule="random", per_sample=20), paired=True),
                out=root / name,
            )
        )
        execute(
            TrainConfig(
                store=root / name, out=root / f"of_{name}", n_latents=24,
                sparsity=TopK(k=3), steps=4, batch_size=64,
            )
        )  # fmt: skip
    run_command("match", str(root / "of_store"), str(root / "of_other"), "--out", str(root / "m"))
    return root


@pytest.fixture
def tree(world, tmp_path) -> Path:
    """A copy where the absolute paths lead to the copy."""
    folder = tmp_path / "tree"
    shutil.copytree(world, folder)
    for name in ("store", "other"):
        forge(folder / f"of_{name}", store=str(folder / name))
    forge(folder / "m", dictionaries=[str(folder / "of_store"), str(folder / "of_other")])
    return folder


def verified(folder: Path, capsys, *, code: int) -> dict:
    capsys.readouterr()
    try:
        main(["verify", str(folder), "--json"])
    except SystemExit as stopped:
        assert stopped.code == code == 2  # noqa: PT017
    return json.loads(capsys.readouterr().out)


def test_a_whole_tree_is_as_its_manifests_say(tree, capsys):
    found = verified(tree, capsys, code=0)
    assert (found["runs"], found["unfinished"], found["damaged"]) == (5, 0, [])
    assert (found["parents"], found["parents_elsewhere"]) == (4, [])
    shards = sum(len(Store(tree / name).shards) for name in ("store", "other"))
    assert found["files"] == sum(path.is_file() for path in tree.rglob("*"))
    assert found["files"] == 5 + shards + 2 * 2 + 2 * 4 + 3  # of manifests, stores, runs, matching
    assert found["without_checksum"] == 0
    _, text = run_command("verify", str(tree))
    assert "0 damaged or missing" in text


def test_every_file_that_is_flipped_cut_or_gone_is_listed(tree, capsys):
    for file in sorted(path for path in tree.rglob("*") if path.is_file()):
        whole = file.read_bytes()
        for data in (whole[:-3] + bytes([whole[-3] ^ 4]) + whole[-2:], whole[:-1], None):
            file.unlink()
            if data is not None:
                file.write_bytes(data)
            if data is None and file.name == "manifest.json":
                file.write_bytes(whole)
                continue  # no longer a run
            found = verified(tree, capsys, code=2)
            assert str(file) in [each["file"] for each in found["damaged"]]
            assert any(file.name in each["reason"] for each in found["damaged"])
            file.write_bytes(whole)
    assert verified(tree, capsys, code=0)["damaged"] == []


def test_a_store_is_known_by_its_activations_not_by_the_seconds_they_took(tree, capsys):
    path = tree / "store" / "manifest.json"
    manifest = read_manifest(path)
    parent = read_manifest(tree / "of_store" / "manifest.json")["parents"]["store"]
    assert manifest["files"].keys() == {"recipe.toml", "result.json"}
    assert Store(tree / "store").digest == parent
    main(["collect", str(tree / "store" / "recipe.toml")])  # done already: takes other seconds
    assert read_manifest(path)["files"]["result.json"] != manifest["files"]["result.json"]
    assert Store(tree / "store").digest == parent
    found = verified(tree, capsys, code=0)
    assert (found["without_checksum"], found["parents"]) == (0, 4)
    manifest.pop("files")  # as stores were before they stated these checksums
    write_manifest(path, manifest)
    assert Store(tree / "store").digest == parent == checksum_file(path)
    found = verified(tree, capsys, code=0)
    assert (found["without_checksum"], found["parents"]) == (2, 4)
    manifest["network"] = "another"
    write_manifest(path, manifest)
    assert Store(tree / "store").digest != parent


def test_a_parent_that_was_made_anew_is_listed(tree, capsys):
    shutil.rmtree(tree / "store")
    shutil.copytree(tree / "other", tree / "store")
    found = verified(tree, capsys, code=2)
    assert "has changed since" in found["damaged"][0]["reason"]
    shutil.rmtree(tree / "store")
    found = verified(tree, capsys, code=0)
    assert found["parents_elsewhere"] == [str(tree / "of_store")]
    with pytest.raises(UserError, match="holds no runs"):
        run_command("verify", str(tree / "other" / "mixed"))


def test_damaged_or_swapped_dictionaries_are_refused(tree, capsys):
    file = tree / "of_store" / "dictionary.safetensors"
    shutil.copy(tree / "of_other" / "dictionary.safetensors", file)
    for words in (
        ["match", str(tree / "of_store"), str(tree / "of_other")],
        ["branches", str(tree / "of_store"), "--store", str(tree / "store")],
    ):
        with pytest.raises(SystemExit):
            main([*words, "--out", str(tree / "out")])
        assert "dictionary.safetensors is damaged or was replaced" in capsys.readouterr().err
    with pytest.raises(WeightsError, match="is damaged or was replaced"):
        load(tree / "of_store")
    forge(tree / "of_store", complete=False)
    with pytest.raises(WeightsError, match="of a run that has not ended"):
        load(tree / "of_store")
    shutil.copy(tree / "m" / "manifest.json", tree / "of_store")
    with pytest.raises(WeightsError, match="of another run: it has no checksum of dictionary"):
        load(tree / "of_store")
    (tree / "of_store" / "manifest.json").unlink()
    with pytest.raises(WeightsError, match=r"There is no .*manifest\.json, with the checksums"):
        load(tree / "of_store")
    lost = str(tree / "of_store" / "manifest.json")
    assert lost in [each["file"] for each in verified(tree, capsys, code=2)["damaged"]]
    shutil.copy(tree / "of_store" / "dictionary.safetensors", tree)
    load(tree / "dictionary.safetensors")
    (tree / "of_other" / "dictionary.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"There is no file .*of_other/dictionary"):
        load(tree / "of_other")
    os.mkfifo(tree / "of_other" / "dictionary.safetensors")
    with pytest.raises(WeightsError, match="is a pipe, expected a file"):
        load(tree / "of_other")


def test_a_dictionary_goes_with_stores_of_its_own_network(tree, capsys):
    words = ["branches", str(tree / "of_store"), "--store", str(tree / "other")]
    for _ in range(2):
        with pytest.raises(SystemExit):
            main([*words, "--out", str(tree / "out")])
        assert "nor one of the same network" in capsys.readouterr().err
        manifest = json.loads((tree / "of_store" / "manifest.json").read_text())
        manifest.pop("network", None)  # as in version 0.1, whose store says it
        forge(tree / "of_store", manifest)
    shutil.rmtree(tree / "store")
    run_command(*words, "--out", str(tree / "out"), "--rows", "200")  # nobody knows


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("width", 10), ("width", -1), ("width", "7"), ("grid", [0, 1]), ("grid", None),
        ("branches", {"a": [0, 10**9]}), ("branches", []),
    ],
)  # fmt: skip
def test_a_store_with_a_wrong_site_is_refused(tree, key, value):
    manifest = json.loads((tree / "store" / "manifest.json").read_text())
    manifest["sites"]["mixed"][key] = value
    forge(tree / "store", manifest)
    with pytest.raises(StoreError, match=r"manifest\.json|expected|the manifest says"):
        list(Store(tree / "store").rows("mixed").scan())


@pytest.mark.parametrize("rows", [-5, 0, 10**12, "7", None, 1.5])
def test_a_store_with_wrong_numbers_of_rows_is_refused(tree, rows):
    manifest = json.loads((tree / "store" / "manifest.json").read_text())
    shards = [[*shard[:3], rows, *shard[4:]] for shard in manifest["shards"]]
    forge(tree / "store", manifest, shards=shards)
    with pytest.raises(StoreError, match=r"manifest\.json: shards\[0\] entry is"):
        Store(tree / "store")


def test_one_damaged_run_of_any_kind_does_not_cost_the_page(tree):
    whole = report(tree, tree / "page.html", trust=True).read_text()
    assert 'id="problems"' not in whole
    broken = {
        "of_store": "history.json", "m": "matches.parquet", "of_other": "manifest.json",
    }  # fmt: skip
    for run, name in broken.items():
        (tree / run / name).write_text("nothing")
    result, text = run_command("report", str(tree), "--out", str(tree / "page.html"), "--trust")
    page = (tree / "page.html").read_text()
    for run, name in broken.items():
        assert run in result["problems"]
        assert name in result["problems"][run] or run == "of_other"
        assert f"Not drawn, or not whole: {run}" in text
        assert f"<strong>{run}</strong>" in page
    assert "<code>mixed</code>" in page


def test_values_that_a_chapter_cannot_draw_cost_their_run_only(tree):
    (tree / "m" / "result.json").write_text('{"pairs": 3}')
    forge(tree / "m")
    (tree / "of_store" / "history.json").write_text('{"step": [1], "fvu": "much"}')
    forge(tree / "of_store")
    seen: dict[str, str] = {}
    report(tree, tree / "page.html", trust=True, on_problem=seen.__setitem__)
    assert set(seen) == {"m", "of_store"}
    assert "of_other" in (tree / "page.html").read_text()
