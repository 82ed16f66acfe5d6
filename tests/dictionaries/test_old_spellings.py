"""Spellings and files of version 0.1."""

import json

import pytest
import safetensors
import safetensors.torch
import torch

from mechatlas.app.commands.train import TrainConfig
from mechatlas.app.recipes import from_dict, read_recipe
from mechatlas.dictionaries.autoencoder import Autoencoder, Crosscoder, Transcoder
from mechatlas.dictionaries.engine import checkpoints
from mechatlas.dictionaries.formats import load, save
from mechatlas.dictionaries.objective import Objective, Schedule
from mechatlas.dictionaries.revival import AuxK
from mechatlas.dictionaries.sparsity import TopK
from mechatlas.dictionaries.training import train
from tests.dictionaries.test_checkpoints import KilledError, kill_after

OLD = {
    "matryoshka_widths": "prefixes",
    "normalize_mse": "relative",
    "sparsity_warm_up": "pressure",
    "auxk_alpha": "weight",
}


def renamed_metadata(file) -> None:
    """Write the metadata of a file as version 0.1 did."""
    with safetensors.safe_open(file, framework="pt") as opened:
        text = opened.metadata()["mechatlas"]
    for new, old in OLD.items():
        text = text.replace(new, old)
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file(tensors, file, {"mechatlas": text})


def test_old_arguments_work_with_a_warning():
    with pytest.warns(DeprecationWarning, match=r"Autoencoder\(prefixes=\) is now called Auto"):
        built = Autoencoder(d_in=4, n_latents=40, prefixes=(8,))  # pyright: ignore[reportCallIssue]
    assert built.matryoshka_widths == (8, 40)
    with pytest.warns(DeprecationWarning, match="is now called"):
        Transcoder(d_in=4, d_out=3, n_latents=40, prefixes=(8,))  # pyright: ignore[reportCallIssue]
    with pytest.warns(DeprecationWarning, match="is now called"):
        Crosscoder(widths={"a": 2}, n_latents=40, prefixes=(8,))  # pyright: ignore[reportCallIssue]
    with pytest.warns(DeprecationWarning, match="is now called"):
        assert Objective(relative=True).normalize_mse  # pyright: ignore[reportCallIssue]
    with pytest.warns(DeprecationWarning, match="is now called"):
        assert Schedule(pressure=0.3).sparsity_warm_up == 0.3  # pyright: ignore[reportCallIssue]
    with pytest.warns(DeprecationWarning, match="is now called"):
        assert AuxK(weight=0.5).auxk_alpha == 0.5  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="got both prefixes= and matryoshka_widths="):
        Autoencoder(d_in=4, n_latents=40, prefixes=(), matryoshka_widths=())  # pyright: ignore[reportCallIssue]


def test_a_recipe_with_old_keys_is_read_with_a_warning(tmp_path):
    recipe = tmp_path / "train.toml"
    recipe.write_text(
        "store = 's'\nprefixes = [8]\nschedule.pressure = 0.3\nobjective.relative = true\n"
        "revival = {k = 4, weight = 0.5}"
    )
    with pytest.warns(DeprecationWarning, match="of a recipe for train is now called"):
        found = read_recipe(recipe, TrainConfig)
    new = {
        "store": "s",
        "matryoshka_widths": [8],
        "schedule": {"sparsity_warm_up": 0.3},
        "objective": {"normalize_mse": True},
        "revival": {"k": 4, "auxk_alpha": 0.5},
    }
    assert found == from_dict(new, TrainConfig, "here")


@pytest.mark.filterwarnings("error::DeprecationWarning")
def test_a_saved_dictionary_is_read(tmp_path):
    built = Autoencoder(d_in=4, n_latents=40, sparsity=TopK(k=3), matryoshka_widths=(8,))
    renamed_metadata(save(built, tmp_path))
    again = load(tmp_path)
    assert json.dumps(again.config["matryoshka_widths"]) == "[8]"
    x = torch.randn(5, 4)
    assert torch.equal(again(x), built(x))


@pytest.mark.filterwarnings("error::DeprecationWarning")
def test_an_unfinished_run_is_continued(tmp_path):
    x = torch.randn(300, 4)

    def run(**options):
        built = Autoencoder(d_in=4, n_latents=40, sparsity=TopK(k=3), matryoshka_widths=(8,))
        revival, objective = AuxK(dead_after_rows=100), Objective(normalize_mse=True)
        train(built, x, steps=12, batch_size=32, revival=revival, objective=objective, **options)
        return list(built.parameters())

    whole = run()
    with pytest.raises(KilledError):
        run(checkpoint=tmp_path, checkpoint_every=4, on_progress=kill_after(9))
    renamed_metadata(tmp_path / checkpoints.FILE)
    steps = []
    late = run(checkpoint=tmp_path, on_progress=lambda done, _: steps.append(done))
    assert steps[0] == 9
    assert all(map(torch.equal, late, whole))
