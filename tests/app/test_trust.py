"""Folders are data: whatever they name, nothing of it runs unless the user names it too."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
from torch import nn

from mechatlas.activations.collect import StoreConfig
from mechatlas.activations.images import Images
from mechatlas.activations.networks import Network, load_network
from mechatlas.activations.positions import Positions
from mechatlas.activations.store_manifest import store_digest
from mechatlas.app.cli import COMMANDS, main
from mechatlas.app.commands import serve
from mechatlas.app.commands.collect import CollectConfig
from mechatlas.app.commands.train import TrainConfig
from mechatlas.app.report.page import report
from mechatlas.app.run_folder import execute
from mechatlas.base import UserError
from mechatlas.dictionaries.formats import save
from mechatlas.dictionaries.sparsity import TopK
from tests.app import posed
from tests.app.worlds import photographs
from tests.forging import forge
from tests.networks import tiny

HERE = "tests.app.test_trust"
RAN = "MECHATLAS_TEST_RAN"


def hostile(command: str = "") -> nn.Module:
    """Code of somebody else; notes that it ran."""
    os.environ[RAN] = command
    return tiny()


class Hostile:
    """Callable that is no function."""

    def __call__(self, command: str = "") -> nn.Module:
        """Note that it ran."""
        return hostile(command)


an_object = Hostile()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A paired store, two dictionaries and a posed store, all of a network of one's own."""
    root = tmp_path_factory.mktemp("world")
    store = CollectConfig(
        network=Network(name="tests.networks:tiny"),
        sites=("first", "mixed"),
        samples=Images(source=str(photographs(root / "p.zip")), side=15, crops=2),
        storage=StoreConfig(positions=Positions(rule="random", per_sample=20), paired=True),
        out=root / "store",
    )
    execute(store)
    for site in ("first", "mixed"):
        execute(
            TrainConfig(
                store=root / "store", site=site, out=root / site, n_latents=24,
                sparsity=TopK(k=3), steps=4, batch_size=64,
            )
        )  # fmt: skip
    posed.write_store(root / "posed", images=8)
    save(posed.plain_dictionary(), root / "plain")
    return root


def downloaded(world: Path, tmp_path: Path, name: str) -> Path:
    """The same folder from somebody whose stores name other code."""
    folder = tmp_path / "downloaded"
    shutil.copytree(world, folder)
    network = {"name": name, "arguments": {"command": "touch PWNED"}}
    recipe = json.loads((folder / "store" / "manifest.json").read_text())["recipe"]
    for store in ("store", "posed"):
        forge(folder / store, recipe={**recipe, "network": network})
    digest = store_digest(folder / "store" / "manifest.json")
    for site in ("first", "mixed"):
        forge(folder / site, store=str(folder / "store"), parents={"store": digest})
    return folder


def words_of(folder: Path) -> dict[str, list[str]]:
    """Every command that reads a folder of runs."""
    two, store = [str(folder / "first"), str(folder / "mixed")], str(folder / "store")
    return {
        "report": [str(folder)],
        "match": [*two, "--store", store, "--samples", "4", "--cost", "codes"],
        "flow": two,
        "symmetry": [str(folder / "plain"), "--store", str(folder / "posed")],
        "branches": [two[1], "--store", store],
        "circuit": two,
        "train": [str(folder / "mixed" / "recipe.toml"), "--store", store, "--steps", "2"],
        "evaluate": [two[1], "--n-samples", "4"],
        "effects": [two[1], "--n-samples", "4"],
        "export": [two[1], "--format", "saelens"],
        "verify": [str(folder)],
        "serve": [str(folder)],
    }


REOPEN = {"report", "serve", "match", "symmetry", "circuit", "evaluate", "effects"}
"""Commands that run the network of a store."""
OF_RECIPES = {"demo", "sites", "collect", "sweep", "basis", "prove"}
"""Commands that run what their user names, or nothing."""


def test_every_command_is_tried():
    rest = set(COMMANDS) - set(words_of(Path())) - OF_RECIPES
    assert not rest, "say whether the command opens the network of a folder"


@pytest.fixture(autouse=True)
def nobody_waits(monkeypatch):
    monkeypatch.setattr(serve, "wait", lambda: None)


@pytest.mark.parametrize("command", words_of(Path()))
@pytest.mark.parametrize("name", ["os:system", f"{HERE}:hostile", "subprocess:getoutput"])
def test_nothing_that_a_folder_names_runs(world, tmp_path, monkeypatch, capsys, command, name):
    folder = downloaded(world, tmp_path, name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(RAN, raising=False)
    out = [] if command in ("verify", "serve") else ["--out", str(tmp_path / "out.html")]
    with contextlib.suppress(SystemExit):
        main([command, *words_of(folder)[command], *out])
    said = capsys.readouterr()
    assert ("would run" in said.err + said.out) == (command in REOPEN)
    if command in REOPEN:
        assert f"{name}(command='touch PWNED') would run" in said.err + said.out
        assert f"--network {name}" in said.err + said.out
    assert RAN not in os.environ
    assert not list(tmp_path.rglob("PWNED"))


@pytest.mark.parametrize("word", [["--network", f"{HERE}:hostile"], ["--trust"]])
def test_what_the_user_names_runs(world, tmp_path, monkeypatch, capsys, word):
    folder = downloaded(world, tmp_path, f"{HERE}:hostile")
    monkeypatch.setenv(RAN, "")
    main(["report", str(folder), "--out", str(tmp_path / "page.html"), *word])
    assert os.environ[RAN] == "touch PWNED"
    assert "would run" not in capsys.readouterr().out


def test_what_is_no_network_is_never_called_even_if_named(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(RAN, raising=False)
    for name in ("os:system", "builtins:exec", "os:fork", f"{HERE}:an_object", f"{HERE}:tiny"):
        with pytest.raises(UserError, match="was not called"):
            load_network(Network(name=name, arguments={"command": "touch PWNED"}))
    folder = downloaded(world, tmp_path, "os:system")
    page = report(folder, tmp_path / "page.html", network=["os:system"])
    assert "was not called" in page.read_text()
    assert RAN not in os.environ
    assert not list(tmp_path.rglob("PWNED"))


def test_another_name_does_not_open_the_door(world, tmp_path, capsys):
    folder = downloaded(world, tmp_path, f"{HERE}:hostile")
    with pytest.raises(SystemExit):
        main(["circuit", *words_of(folder)["circuit"], "--out", str(tmp_path / "o"),
              "--network", "tests.networks:tiny"])  # fmt: skip
    assert "would run" in capsys.readouterr().err


def test_a_recipe_cannot_say_what_may_run(world, tmp_path, capsys):
    recipe = tmp_path / "match.toml"
    for line in ("trust = true", 'network = ["os:system"]'):
        recipe.write_text(f'dictionaries = ["a", "b"]\nout = "o"\n{line}\n')
        with pytest.raises(SystemExit):
            main(["match", str(recipe)])
        assert "is named on the command line only" in capsys.readouterr().err
    words = words_of(world)["match"]
    main(["match", *words, "--trust", "--out", str(tmp_path / "out")])
    assert "trust" not in (tmp_path / "out" / "recipe.toml").read_text()


def test_paths_of_a_store_stay_inside_it(world, tmp_path, capsys):
    folder = downloaded(world, tmp_path, "tests.networks:tiny")
    manifest = json.loads((folder / "store" / "manifest.json").read_text())
    for path in ("../../secret.safetensors", str(tmp_path / "secret.safetensors")):
        shards = [[*shard[:2], path, *shard[3:]] for shard in manifest["shards"]]
        forge(folder / "store", shards=shards)
        with pytest.raises(SystemExit):
            main(["train", *words_of(folder)["train"], "--out", str(tmp_path / "out")])
        assert "expected a file within the store" in capsys.readouterr().err
