"""A user's own network on the command line: found, run, and its mistakes said in one sentence."""

import json
import subprocess
import sys

import numpy as np
import pytest

from mechatlas.app.cli import main

NETS = """
import torch
from torch import nn
WIDTH = {width}
def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))
def low(): return plain().bfloat16()
def broken(): raise OSError("no weights here")
"""
COLLECT = """
sites = ["0"]
out = "store"
network = "{module}:{factory}"
samples = {{ type = "Arrays", source = "{rows}.npy" }}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    np.save("ok.npy", random.normal(size=(60, 4)))
    np.save("wide.npy", random.normal(size=(60, 5)))
    np.save("whole.npy", random.integers(0, 5, (60, 4)))
    np.save("words.npy", np.array([["a", "b"]] * 9))
    np.save("flat.npy", random.normal(size=60))
    np.savez("two.npz", a=np.zeros(3), b=np.zeros(3))
    return tmp_path


def write(folder, module: str, width: int = 8, **fields: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(NETS.format(width=width))
    given = {"factory": "plain", "rows": "ok"} | fields
    (folder / "r.toml").write_text(COLLECT.format(module=module, **given))
    return str(folder / "r.toml")


def test_a_module_is_found_beside_the_recipe_and_in_the_current_folder(here, capsys):
    path = list(sys.path)
    main(["collect", write(here / "sub", "nets_of_recipe")])
    assert "Collected 0 (" in capsys.readouterr().out
    write(here, "nets_of_folder")
    main(["sites", "nets_of_folder:plain", "--shape", "4"])
    assert "Linear" in capsys.readouterr().out
    assert sys.path == path


def test_nothing_else_is_imported_from_the_folder_of_data(here, capsys):
    (here / "not_installed_anywhere.py").write_text("open('ran', 'w')")
    code = (
        "import mechatlas.app.commands.sites as s\n"
        "def run(config):\n import not_installed_anywhere\n"
        "s.run = run\n"
        "from mechatlas.app.cli import main\n"
        "main(['sites', 'inception_mini'])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=False)
    assert b"No module named 'not_installed_anywhere'" in done.stderr
    assert not (here / "ran").exists()


def test_modules_of_one_name_beside_two_recipes_are_two_modules(here, capsys):
    for folder, width in (("a", 5), ("b", 7)):
        recipe = write(here / folder, "same_name", width=width)
        main(["collect", recipe, "--out", f"store_{folder}", "--json"])
        assert f'"width": {width}' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": "wide"}, r"float32 inputs of shape (1, 5) to read 0"),
        ({"rows": "whole"}, "int64 inputs of shape (1, 4)"),
        ({"rows": "words"}, "words.npy holds words"),
        ({"rows": "flat"}, "inputs of shape (1,)"),
        ({"factory": "broken"}, "cannot be built: no weights here (OSError)"),
        ({"factory": "WIDTH"}, "has no function 'WIDTH'"),
    ],
)
def test_inputs_and_networks_that_do_not_fit_are_one_sentence(here, capsys, fields, message):
    with pytest.raises(SystemExit) as exit_:
        main(["collect", write(here / "sub", "own_nets_wrong", **fields)])
    errors = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message in errors
    assert errors.count("\n") == 1
    assert not (here / "store" / "manifest.json").exists()


def test_a_module_that_cannot_be_imported_is_one_sentence(here, capsys):
    (here / "odd_module.py").write_text("def plain(:\n")
    with pytest.raises(SystemExit):
        main(["sites", "odd_module:plain"])
    assert "importing 'odd_module' failed" in capsys.readouterr().err


def test_a_network_of_bfloat16_is_collected(here, capsys):
    main(["collect", write(here / "sub", "own_nets_low", factory="low")])
    assert "Collected 0 (" in capsys.readouterr().out


def test_two_equal_runs_write_equal_bytes_into_two_folders(here, capsys):
    recipe = write(here / "sub", "own_nets_twice")
    for out in ("one", "two"):
        main(["collect", recipe, "--out", out])
    names = sorted(p.relative_to(here / "one") for p in (here / "one").rglob("*") if p.is_file())
    cost = {"result.json"}  # seconds and memory
    assert [n for n in names if str(n) not in cost]
    assert len(names) > 3
    for name in names:
        one, two = ((here / out / name).read_bytes() for out in ("one", "two"))
        if name.name == "manifest.json":  # it states the checksum of `result.json`
            one, two = (json.loads(text) for text in (one, two))
            for manifest in (one, two):
                del manifest["checksum"], manifest["files"]["result.json"]
        if str(name) not in cost:
            assert one == two, name
    main(["collect", "one/recipe.toml"])  # is for its own folder
    assert not (here / "store").exists()


@pytest.mark.parametrize("words", [["--help"], ["sites", "inception_mini"], ["collect", "--help"]])
def test_a_pipe_that_closes_early_ends_a_command_quietly(words):
    code = f"from mechatlas.app.cli import main; main({words!r})"
    command = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert command.stdout is not None
    assert command.stderr is not None
    command.stdout.close()
    assert command.stderr.read() == b""
    assert command.wait() == 0
