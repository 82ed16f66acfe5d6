"""Every recipe in `recipes/` is valid, and a bad one is refused with every mistake at once."""

import subprocess
import sys
from pathlib import Path

import pytest

from mechatlas.app.cli import run_script
from mechatlas.app.commands.basis import BasisConfig
from mechatlas.app.commands.collect import CollectConfig
from mechatlas.app.commands.group_net import GroupNetConfig
from mechatlas.app.commands.train import TrainConfig
from mechatlas.app.recipes import as_dict, from_dict, read_recipe
from mechatlas.base import RecipeError
from mechatlas.dictionaries.sparsity import TopK

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.toml"))
SCRIPTS = [
    path for path in sorted((ROOT / "recipes").rglob("*.py")) if "__main__" in path.read_text()
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_recipe_of_the_project_reads_and_writes_back(path):
    kinds = {"collect": CollectConfig, "train": TrainConfig, "basis": BasisConfig}
    kind = GroupNetConfig if path.parent.name == "groups" else kinds[path.stem.partition("_")[0]]
    recipe = read_recipe(path, kind)
    assert from_dict(as_dict(recipe), kind, "again") == recipe


def test_all_mistakes_are_told_at_once(tmp_path):
    (tmp_path / "bad.toml").write_text(
        """
        sitse = ["mixed3b"]
        out = 3
        [network]
        nme = "inception_mini"
        [samples]
        type = "Images"
        crops = "many"
        [storage]
        dtype = "float8"
        [storage.positions]
        per_sample = 0
        """
    )
    with pytest.raises(RecipeError) as caught:
        read_recipe(tmp_path / "bad.toml", CollectConfig)
    for part in (
        "unknown key sitse (did you mean sites?) @ recipe",
        "expected str, got 3 @ recipe.out",
        "unknown key nme (did you mean name?) @ recipe.network",
        "expected int, got 'many' @ recipe.samples.crops",
        "expected one of 'float32', 'float16', 'bfloat16', got 'float8'",
        "per_sample must be at least 1, got 0. @ recipe.storage.positions",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_latents = true\nstore = 's'", "expected int, got True @ recipe.n_latents"),
        ("n_latents = 3.5\nstore = 's'", "expected int, got 3.5"),
        ("lr = '1e-3'\nstore = 's'", "expected float, got '1e-3' @ recipe.lr"),
        ("n_latents = 8\nstore = 's'", "must be at least k \\(32\\)"),
        ("steps = 0\nstore = 's'", "steps must be at least 1, got 0"),
        ("steps = 5", "give either a store, or a table"),
        ("steps = ", "is not TOML"),
        ("store = 's'\n[sparsity]\nkk = 3", "unknown key kk"),
    ],
)
def test_one_mistake_is_told_in_one_line(tmp_path, text, message):
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_recipe(tmp_path / "t.toml", TrainConfig)


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"There is no recipe file .*nothing\.toml"):
        read_recipe(tmp_path / "nothing.toml", TrainConfig)


def test_a_network_may_be_named_by_a_word_and_samples_have_a_default():
    recipe = from_dict({"network": "inception_mini", "sites": ["a"]}, CollectConfig, "here")
    assert recipe.network.name == "inception_mini"
    assert recipe.samples.source == "photos"


def test_whole_numbers_will_do_for_floats():
    assert from_dict({"store": "s", "lr": 1}, TrainConfig, "here").lr == 1.0
    assert from_dict({"store": "s", "sparsity": {"k": 5}}, TrainConfig, "here").sparsity == TopK(
        k=5
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_script_ends_as_commands_do(path):
    assert path.read_text().endswith("    run_script(main)\n")


def test_a_script_says_a_mistake_in_a_sentence(tmp_path):
    script = ROOT / "recipes" / "branches" / "run.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path / "nowhere"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "nowhere" in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RecipeError("Give a number."), 2, "mechatlas: Give a number.\n"),
        (KeyboardInterrupt(), 130, "mechatlas: interrupted; what was finished is kept.\n"),
    ],
)
def test_a_script_ends_with_the_code_of_a_command(error, code, said, capsys):
    def script():
        raise error

    with pytest.raises(SystemExit) as end:
        run_script(script)
    assert end.value.code == code
    assert capsys.readouterr().err == said
