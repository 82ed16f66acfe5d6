"""The command line: exit codes, one sentence for a mistake, and a whole small run."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from mechatlas import deprecated
from mechatlas.app import cli
from mechatlas.app.cli import COMMANDS, main
from tests.app.worlds import photographs

ROOT = Path(__file__).parents[2]

COLLECT = """
sites = ["mixed"]
out = "store"
[network]
name = "tests.networks:tiny"
[samples]
type = "Images"
source = "photos"
side = 9
crops = 8
"""
TRAIN = """
store = "store"
out = "dictionary"
n_latents = 20
steps = 20
batch_size = 64
[sparsity]
k = 3
"""


@pytest.fixture(autouse=True)
def _interrupts_are_heard():
    """A test run in the background of a shell ignores SIGINT unless told otherwise."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "collect.toml").write_text(COLLECT)
    (tmp_path / "train.toml").write_text(TRAIN)
    return tmp_path


def refused(words: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(words)
    said = capsys.readouterr()
    assert exit_.value.code == 2
    assert said.out == ""
    assert said.err.startswith("mechatlas: ")
    assert "Traceback" not in said.err
    return said.err


def test_collect_and_train_write_folders_with_results(here, capsys):
    main(["collect", "collect.toml", "--json"])
    said = json.loads(capsys.readouterr().out)
    result = json.loads((here / "store" / "result.json").read_text())
    assert {k: v for k, v in said.items() if k != "out"} == result
    assert result["sites"]["mixed"]["width"] == 8
    assert result["peak_bytes"] > 1 << 20
    main(["train", "train.toml", "--steps", "30", "--json"])
    trained = json.loads(capsys.readouterr().out)
    wanted = {"fvu", "l0", "dead_share", "steps", "seconds_per_step", "peak_bytes"}
    assert wanted <= trained.keys()
    assert trained["steps"] == 30
    assert 0 < trained["fvu"] < 1.5
    names = {p.name for p in (here / "dictionary").iterdir()}
    assert names == {
        "dictionary.safetensors", "history.json", "manifest.json", "recipe.toml", "result.json",
    }  # fmt: skip
    assert "steps = 30" in (here / "dictionary" / "recipe.toml").read_text()


def test_the_recipe_that_a_run_keeps_runs_again(here, capsys):
    main(["collect", "collect.toml", "--samples.crops", "3"])
    main(["collect", "store/recipe.toml", "--json"])
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{") :])["samples"] == 24


def test_results_are_said_in_words_and_where_they_are(here, capsys):
    main(["collect", "collect.toml"])
    said = capsys.readouterr().out
    assert "mixed (" in said
    assert "Store: store" in said


def test_mistakes_get_one_sentence_and_exit_code_2(here, capsys):
    assert "no command 'colect'. Commands: demo" in refused(["colect"], capsys)
    assert "There is no recipe file nothing.toml" in refused(["collect", "nothing.toml"], capsys)
    assert "needs a recipe file first" in refused(["collect", "--out", "x"], capsys)
    assert "is not an activation store" in refused(["train", "train.toml"], capsys)
    (here / "bad.toml").write_text(COLLECT.replace("mixed", "mixd"))
    assert "Did you mean 'mixed'" in refused(["collect", "bad.toml"], capsys)
    assert not (here / "store").exists()
    with pytest.raises(SystemExit) as exit_:  # the parser's own words for flags
        main(["collect", "collect.toml", "--samples.crops", "0"])
    assert exit_.value.code == 2
    assert "crops must be at least 1, got 0" in capsys.readouterr().err
    assert "no bundled network 'inception_mni'" in refused(["sites", "inception_mni"], capsys)
    assert "cannot import 'nowhere'" in refused(["sites", "nowhere:f"], capsys)
    assert "has no function 'huge'" in refused(["sites", "tests.networks:huge"], capsys)
    said = refused(["sites", "tests.networks:not_a_network"], capsys)
    assert "returned int, expected a torch.nn.Module" in said
    assert "give the shape of one sample" in refused(["sites", "tests.networks:tiny"], capsys)
    wrong = ["sites", "tests.networks:tiny", "--shape", "5", "9", "9"]
    assert "cannot run on float32 inputs of shape (1, 5, 9, 9)" in refused(wrong, capsys)
    assert "inception_v1 refused its arguments" not in refused(
        ["sites", "inception_mini", "--weights", "none.safetensors"], capsys
    )


def test_training_never_writes_among_strangers(here, capsys):
    main(["collect", "collect.toml"])
    (here / "dictionary").mkdir()
    (here / "dictionary" / "thesis.tex").write_text("precious")
    capsys.readouterr()
    assert "is not empty and is not a dictionary" in refused(["train", "train.toml"], capsys)
    assert [p.name for p in (here / "dictionary").iterdir()] == ["thesis.tex"]


def test_a_store_without_held_out_rows_is_refused(here, capsys):
    source = str(photographs(here / "one.zip", n=1))
    main(["collect", "collect.toml", "--samples.source", source, "--samples.crops", "1"])
    capsys.readouterr()
    assert "no held-out rows to measure on" in refused(["train", "train.toml"], capsys)


def test_the_same_command_continues_a_killed_run(here, capsys, monkeypatch):
    main(["collect", "collect.toml"])
    words = ["train", "train.toml", "--checkpoint-every", "5"]
    main([*words, "--out", "whole"])

    @contextlib.contextmanager
    def killer(what):
        def on_progress(done, total):
            if done == 12:
                os.kill(os.getpid(), signal.SIGINT)

        yield on_progress

    with monkeypatch.context() as patched:
        patched.setattr("mechatlas.app.commands.train.bar", killer)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            main(words)
    left = [str(p.relative_to(here / "dictionary")) for p in (here / "dictionary").rglob("*.*")]
    assert left == ["checkpoint/checkpoint.safetensors"]
    main(words)
    file = "dictionary.safetensors"
    assert (here / "dictionary" / file).read_bytes() == (here / "whole" / file).read_bytes()
    assert not (here / "dictionary" / "checkpoint").exists()


@pytest.mark.parametrize(
    ("signal_", "code", "cause"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")]
)
def test_a_signal_keeps_what_is_finished_and_says_so(
    here, capsys, monkeypatch, signal_, code, cause
):
    main(["collect", "collect.toml"])

    @contextlib.contextmanager
    def killer(what):
        yield lambda done, total: done == 12 and os.kill(os.getpid(), getattr(signal, signal_))

    monkeypatch.setattr("mechatlas.app.commands.train.bar", killer)
    with pytest.raises(SystemExit) as exit_:
        main(["train", "train.toml", "--checkpoint-every", "5"])
    assert exit_.value.code == code
    assert f"mechatlas: {cause}; what was finished is kept.\n" in capsys.readouterr().err
    assert (here / "dictionary" / "checkpoint" / "checkpoint.safetensors").is_file()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("device", ["cuda:99", "x", "meta", ""])
def test_a_device_that_is_not_there_is_named_before_any_work(here, capsys, device):
    for words in (["collect", "collect.toml"], ["train", "train.toml"]):
        assert f"device {device!r} cannot be used" in refused([*words, "--device", device], capsys)
    assert not (here / "store").exists()


def test_a_place_that_cannot_be_written_is_found_before_any_work(here, capsys, monkeypatch):
    main(["collect", "collect.toml"])
    main(["train", "train.toml"])
    capsys.readouterr()
    place = str(here / "train.toml" / "out")
    for words in (
        ["collect", "collect.toml", "--samples.source", "nothing"],
        ["train", "train.toml", "--store", "nothing"],
        ["match", "nothing", "nothing"],
        ["symmetry", "nothing", "--store", "nothing"],
        ["branches", "nothing", "--store", "nothing"],
        ["circuit", "nothing", "nothing"],
        ["prove", "nothing", "--table", "nothing"],
        ["report", "nothing"],
    ):
        assert "train.toml is a file, expected a folder" in refused(
            [*words, "--out", place], capsys
        )
    assert "is a folder, expected the file" in refused(["report", ".", "--out", "."], capsys)
    long = "n" * 300 + ".html"
    assert "File name too long" in refused(["report", ".", "--out", long], capsys)
    Path("loop.toml").symlink_to("loop.toml")
    assert "no recipe file loop.toml" in refused(["train", "loop.toml"], capsys)
    monkeypatch.setattr("mechatlas.app.commands.report.report", lambda *_, **__: Path("gone.html"))
    assert "gone.html was deleted" in refused(["report", ".", "--out", "gone.html"], capsys)


def test_nothing_asked_and_help_are_answered(capsys):
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 2
    assert "usage: mechatlas COMMAND" in capsys.readouterr().out
    for command in COMMANDS:
        with pytest.raises(SystemExit) as exit_:
            main([command, "--help"])
        assert exit_.value.code == 0
        assert f"mechatlas {command}" in capsys.readouterr().out


def test_sites_lists_modules_and_branches(capsys):
    main(["sites", "tests.networks:tiny", "--shape", "3", "9", "9"])
    said = capsys.readouterr().out
    assert "8 x 9 x 9" in said
    assert "left (5)  right (3)" in said
    main(["sites", "inception_mini", "--json"])
    found = json.loads(capsys.readouterr().out)
    names = [s["site"] for s in found["sites"] if s["branches"]]
    assert names == ["mixed3a", "mixed3b", "mixed4a", "mixed4b", "mixed4c", "mixed4d"]


def test_a_failure_of_ours_is_not_called_the_users(tmp_path):
    code = (
        "import mechatlas.app.cli as c, mechatlas.app.commands.sites as sites\n"
        "def broken(config): raise RuntimeError('ours')\n"
        "sites.run = broken\n"
        "c.main(['sites', 'x'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == 1
    assert b"RuntimeError: ours" in done.stderr


def test_the_version_is_told_without_a_command(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"mechatlas {metadata.version('mechatlas')}\n"


def test_the_overview_lists_every_command_with_its_first_line_and_imports_none():
    code = (
        "import sys, mechatlas.app.cli as c; print(c.overview());"
        "print([m for m in ('torch', 'tyro') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in cli.COMMANDS:
        command = importlib.import_module(f"mechatlas.app.commands.{name}")
        first = str(command.__doc__).splitlines()[0].rstrip(".")
        assert f"  {name:<9} {first}\n" in told.stdout
    assert told.stdout.endswith("[]\n")


def test_the_recipe_of_a_run_repeats_it(here, capsys):
    main(["collect", "collect.toml"])
    main(["train", "train.toml"])
    main(["train", "dictionary/recipe.toml", "--out", "again"])
    file = "dictionary.safetensors"
    assert (here / "again" / file).read_bytes() == (here / "dictionary" / file).read_bytes()


def test_an_old_key_of_a_recipe_is_renamed_with_a_warning(monkeypatch):
    monkeypatch.setitem(deprecated.FLAGS, "train", {"sparsity.top": "sparsity.k"})
    with pytest.warns(DeprecationWarning, match="sparsity.top of a recipe for train is now called"):
        values = deprecated.renamed_keys("train", {"sparsity": {"type": "TopK", "top": 3}})
    assert values == {"sparsity": {"type": "TopK", "k": 3}}
    with pytest.warns(DeprecationWarning, match="train --sparsity.top is now called"):
        words = deprecated.renamed_flags("train", ["--sparsity.top=3", "--seed", "1"])
    assert words == ["--sparsity.k=3", "--seed", "1"]


def test_a_reader_that_stops_early_sees_no_traceback():
    words = [sys.executable, "-m", "mechatlas", "train", "--help"]
    told = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert told.stdout is not None
    told.stdout.close()
    assert told.communicate()[1] == b""
