"""`mechatlas evaluate`: from a dictionary's folder, or with a network and samples of one's own."""

import json

import pytest

from mechatlas.activations.images import Images
from mechatlas.activations.networks import Network
from mechatlas.app import estimates
from mechatlas.app.cli import main
from mechatlas.app.commands.collect import CollectConfig
from mechatlas.app.commands.evaluate import EvaluateConfig
from mechatlas.app.commands.train import TrainConfig
from mechatlas.app.run_folder import execute, read_result
from mechatlas.base import RecipeError
from mechatlas.dictionaries.formats import save
from mechatlas.dictionaries.sparsity import TopK
from tests.app.worlds import dry_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    execute(
        CollectConfig(
            network=Network(name="inception_mini"),
            sites=("mixed3b",),
            samples=Images(crops=6),
            out=root / "store",
        )
    )
    train = TrainConfig(
        store=root / "store", out=root / "sae", n_latents=64, sparsity=TopK(k=8), steps=60,
        batch_size=64,
    )  # fmt: skip
    execute(train)
    return root


def test_the_folder_of_a_dictionary_says_the_rest(trained, tmp_path, capsys):
    main(["evaluate", str(trained / "sae"), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    result = read_result(tmp_path / "out", "evaluation")
    assert f"fvu {result.fvu.value:.3f}" in said
    assert result.site == "mixed3b"
    assert result.samples == 3, "held-out samples"
    assert result.spliced.kl_divergence.value > 0 == result.intact.kl_divergence.value
    assert result.loss_recovered is None, "photographs without labels"
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["kind"] == "evaluation"


def test_a_network_and_samples_can_be_given_for_a_file_from_anywhere(trained, tmp_path):
    from mechatlas.dictionaries.formats import load

    save(load(trained / "sae"), tmp_path / "alone")
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[network]\nname = "inception_mini"\n[samples]\ncrops = 2\n')
    options = {"network": str(recipe), "samples": recipe, "n_samples": 5}
    config = EvaluateConfig(
        dictionary=tmp_path / "alone", site="mixed3b", out=tmp_path / "out", **options
    )
    assert execute(config).samples == 5
    nowhere = EvaluateConfig(dictionary=tmp_path / "alone", out=tmp_path / "no", **options)
    with pytest.raises(RecipeError, match="does not say of which site it is; give --site"):
        execute(nowhere)


def test_a_dry_run_measures_some_batches(trained, tmp_path):
    found = dry_run("evaluate", trained / "sae", out=tmp_path / "new")
    assert found.disk == 0
    assert found.memory > estimates.PROCESS
