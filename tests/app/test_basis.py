"""`mechatlas basis`: the folder, the keys that others rely on, the page, and mistakes named."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from mechatlas.analysis.interaction import basis_analysis
from mechatlas.analysis.interaction.learning_coefficient import learning_coefficient
from mechatlas.app.cli import main
from mechatlas.app.commands.basis import BasisConfig
from mechatlas.app.old_runs import KEYS
from mechatlas.app.recipes import read_recipe
from mechatlas.app.report.page import report
from mechatlas.dictionaries.autoencoder import Autoencoder
from mechatlas.dictionaries.formats import save
from mechatlas.dictionaries.sparsity import TopK
from mechatlas.files import write_json
from tests.forging import forge

from .test_cli import refused

RECIPE = """
layers = ["0", "1", "2"]
out = "basis"
labels = "labels.npy"
[network]
name = "tests.app.test_basis:small"
[samples]
type = "Arrays"
source = "rows.npy"
[settings]
kinds = ["lib", "pca"]
n_null_graphs = 5
[dictionaries]
1 = "latents"
"""
NEW_KEYS = {"network", "synchronised_blocks", "learning_coefficient", "module_degeneracy"}
"""Keys of results that version 0.1 did not have."""
LAYER_KEYS = {
    "name", "width", "rank_activations", "rank_gradients", "synchronized_blocks",
    "synchronised_blocks", "dead_units",
    "free_directions", "edges_needed", "vectors_needed",
}  # fmt: skip


def small() -> nn.Module:
    torch.manual_seed(0)
    hidden: Any = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
    with torch.no_grad():
        hidden[0].bias[2] = -100
        hidden[0].weight[4], hidden[0].bias[4] = hidden[0].weight[3] * 2, hidden[0].bias[3] * 2
    return nn.Sequential(nn.Identity(), hidden, nn.Linear(8, 3))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = np.random.default_rng(0).normal(size=(300, 6))
    np.save("rows.npy", rows)
    with torch.no_grad():
        np.save("labels.npy", small()(torch.from_numpy(rows).float()).argmax(1).numpy())
    (tmp_path / "basis.toml").write_text(RECIPE)
    torch.manual_seed(0)
    save(Autoencoder(d_in=8, n_latents=12, sparsity=TopK(k=4)), tmp_path / "latents")
    return tmp_path


def test_a_run_writes_what_others_rely_on(here, capsys):
    main(["basis", "basis.toml", "--json"])
    said = json.loads(capsys.readouterr().out)
    result = json.loads((here / "basis" / "result.json").read_text())
    assert {k: v for k, v in said.items() if k != "out"} == result
    assert {"layers", "modularity", "modularity_null"} <= result.keys()
    assert [layer["name"] for layer in result["layers"]] == ["0", "1", "2"]
    assert all(layer.keys() >= LAYER_KEYS for layer in result["layers"])
    hidden = result["layers"][1]
    assert hidden["dead_units"] == 1
    assert hidden["synchronized_blocks"] == hidden["synchronised_blocks"] == 1
    assert hidden["rank_activations"] == 6
    assert set(hidden["by_basis"]) == {"lib", "pca", "dictionary"}
    assert hidden["by_basis"]["dictionary"]["vectors"] == 12
    assert hidden["by_basis"]["dictionary"]["edges"] == 36
    assert set(result["layers"][0]["by_basis"]) == {"lib", "pca"}
    assert result["free_directions_exact"]
    assert result["score"] == 1.0
    assert result["measure"] == "accuracy"
    tensors = load_file(here / "basis" / "basis.safetensors")
    to, back = tensors["1.lib.to_basis"], tensors["1.lib.from_basis"]
    np.testing.assert_allclose(back @ to, np.eye(to.shape[1]), atol=1e-6)
    page = drawn(here)
    assert "free directions of the weights" in page
    assert "latents of a dictionary" in page
    assert "of the importance" in page  # what a vector of the graph is made of
    main(["basis", "basis.toml", "--json", "--out", "again"])
    capsys.readouterr()
    first, second = ((here / n / "basis.safetensors").read_bytes() for n in ("basis", "again"))
    assert first == second


def test_a_killed_run_goes_on_where_it_stopped(here, capsys, monkeypatch):
    main(["basis", "basis.toml", "--json"])
    capsys.readouterr()
    whole = (here / "basis" / "basis.safetensors").read_bytes()
    done: list[str] = []
    search = basis_analysis.ablate_edges

    def killed(*arguments, **options):
        done.append("search")
        if len(done) == 3:
            raise KeyboardInterrupt
        return search(*arguments, **options)

    monkeypatch.setattr(basis_analysis, "ablate_edges", killed)
    again = ["basis", "basis.toml", "--json", "--out", "again"]
    with pytest.raises(SystemExit) as stopped:
        main(again)
    assert stopped.value.code == 130
    capsys.readouterr()
    assert {path.name for path in (here / "again").iterdir()} == {"manifest.json", "unfinished"}
    assert not json.loads((here / "again" / "manifest.json").read_text())["complete"]
    monkeypatch.setattr(basis_analysis, "collect_statistics", None)
    only_rotated = edges_of_rotated(basis_analysis.measure_edges)
    monkeypatch.setattr(basis_analysis, "measure_edges", only_rotated)
    main(again)
    capsys.readouterr()
    assert len(done) == 3 + 3  # of five searches two were done
    assert (here / "again" / "basis.safetensors").read_bytes() == whole
    first, second = (json.loads((here / n / "result.json").read_text()) for n in ("basis", "again"))
    cost = {"seconds", "peak_bytes"}
    assert {k: v for k, v in first.items() if k not in cost} == {
        k: v for k, v in second.items() if k not in cost
    }
    assert not (here / "again" / "unfinished").exists()


def test_edges_and_searches_on_an_engine_are_the_same_bytes(here, capsys, monkeypatch):
    main(["basis", "basis.toml", "--json"])
    for name in ("ablate_edges", "ablate_vectors"):
        monkeypatch.setattr(basis_analysis, name, interrupted)  # these run in the worker
    main(["basis", "basis.toml", "--json", "--out", "there", "--engine", "processes:1"])
    capsys.readouterr()
    for name in ("basis.safetensors", "spectra.json", "recipe.toml"):
        assert (here / "there" / name).read_bytes() == (here / "basis" / name).read_bytes()


def test_what_another_recipe_left_is_not_taken(here, capsys, monkeypatch):
    main(["basis", "basis.toml", "--json"])
    monkeypatch.setattr(basis_analysis, "ablate_vectors", interrupted)
    with pytest.raises(SystemExit):
        main(["basis", "basis.toml", "--out", "other", "--settings.rank-threshold", "0.3"])
    assert (here / "other" / "unfinished" / "edges.lib.0.safetensors").is_file()
    (here / "other" / "unfinished" / "statistics.safetensors").write_bytes(b"not to be read")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    main(["basis", "basis.toml", "--json", "--out", "other"])
    first, second = ((here / n / "basis.safetensors").read_bytes() for n in ("basis", "other"))
    assert first == second


def interrupted(*_args, **_options):
    raise KeyboardInterrupt


def test_learning_coefficient_and_free_directions_of_modules_are_in_the_result_and_the_page(
    here, capsys, monkeypatch
):
    few = partial(learning_coefficient, samples=20, burn_in=20, chains=2)
    monkeypatch.setattr(basis_analysis, "learning_coefficient", few)
    save_file({"0": np.arange(6) % 2, "1": np.arange(8) % 2, "2": np.array([0, 1, -1])},
              "modules.safetensors")  # fmt: skip
    words = ["--settings.learning-coefficient", "--unit-modules", "modules.safetensors"]
    main(["basis", "basis.toml", "--settings.n-beta", "1e4", *words])
    printed = capsys.readouterr().out
    assert "Learning coefficient" in printed
    assert "Free directions of modules" in printed
    result = json.loads((here / "basis" / "result.json").read_text())
    network, inputs = small(), torch.from_numpy(np.load("rows.npy")).float()
    chosen = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    alone = few(network, inputs[chosen], n_beta=1e4)
    assert result["learning_coefficient"]["value"] == pytest.approx(alone.value)
    modules = result["module_degeneracy"]
    assert modules["n_free_network"] == result["free_directions"]
    assert sum(modules["n_parameters"]) + modules["n_between"] == result["n_parameters"]
    page = drawn(here)
    assert "local learning coefficient" in page
    assert "free directions of modules" in page
    np.save("labels.npy", np.zeros(300, dtype=int))
    save_file({"0": np.arange(6)}, "modules.safetensors")
    refusal = refused(["basis", "basis.toml", "--out", "bad", *words[1:]], capsys)
    assert "labels for layers of [6, 8, 3] units, got [6, 0, 0]" in refusal


def test_recipes_and_flags_of_version_0_1_still_work(here, capsys):
    new = (here / "basis.toml").read_text()
    old = new.replace("[settings]", "[how]").replace("n_null_graphs = 5", "nulls = 5\nsources = 9")
    (here / "old.toml").write_text(old.replace("[dictionaries]", "[dictionaries]"))
    with pytest.warns(DeprecationWarning, match="settings"):
        config = read_recipe(here / "old.toml", BasisConfig)
    assert config.settings.n_null_graphs == 5
    assert config.settings.gradient_probes == 9
    words = ["--how.allowed-fall", "0.5", "--how.score", "numbers", "--json"]
    with pytest.warns(DeprecationWarning, match="settings|fvu"):
        main(["basis", "old.toml", *words])
    assert json.loads(capsys.readouterr().out)["measure"] == "1 - fvu"


def test_a_folder_of_version_0_1_is_drawn_as_it_was(here, capsys):
    main(["basis", "basis.toml"])
    page = drawn(here)
    recipe = {"network": {"name": "tests.app.test_basis:small"}}
    for file, kind in (("result.json", "basis"), ("spectra.json", "spectra")):
        values = json.loads((here / "basis" / file).read_text())
        old_names = {new: old for old, new in KEYS[kind].items()}
        write_json(here / "basis" / file, as_version_0_1(values, old_names))
    forge(here / "basis", schema=1, recipe=recipe)
    result, spectra = (
        json.loads((here / "basis" / f).read_text()) for f in ("result.json", "spectra.json")
    )
    assert result.keys() >= {"parameters", "modules_p_value"}
    assert result["layers"][0].keys() >= {"account", "synchronised_blocks", "dead_units", "section"}
    assert set(result["layers"][0]["account"]) == {
        "parameters", "dead", "activations", "gradients", "joint", "scale", "synchronised"
    }  # fmt: skip
    assert set(spectra["layers"][0]) == {
        "name", "activations", "gradients", "threshold", "blocks", "edges", "vectors"
    }  # fmt: skip
    assert set(spectra["layers"][0]["edges"]["lib"]) == {
        "kept",
        "score",
        "of",
        "unchanged",
        "needed",
    }
    assert spectra["graph"].keys() >= {"is", "stand", "all_edges"}
    assert body(drawn(here)) == body(page)


def drawn(here: Path) -> str:
    return report(here / "basis", here / "page.html").read_text()


def body(page: str) -> str:
    return page[page.index("free directions of the weights") :]


def as_version_0_1(value: Any, old_names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key not in NEW_KEYS}
        in_layer = "width" in value  # here `dead_units` is not a cause
        names = {k: v for k, v in old_names.items() if not (in_layer and k == "dead_units")}
        return {names.get(key, key): as_version_0_1(x, old_names) for key, x in kept.items()}
    return [as_version_0_1(x, old_names) for x in value] if isinstance(value, list) else value


def edges_of_rotated(measure):
    """Edges may only be measured for the control, which comes after the searches."""

    def checked(model, layer_map, source, *rest, **options):
        assert "rotated" in source.kind
        return measure(model, layer_map, source, *rest, **options)

    return checked


def test_mistakes_are_named(here, capsys):
    assert "matches 3 sites" in refused(["basis", "basis.toml", "--layers", "*", "1"], capsys)
    said = refused(["basis", "basis.toml", "--layers", "2", "1"], capsys)
    assert "does not depend on layer 2" in said
    assert "no module '7'" in refused(["basis", "basis.toml", "--layers", "0", "7"], capsys)
    assert "There is no file nowhere.npy" in refused(
        ["basis", "basis.toml", "--labels", "nowhere.npy"], capsys
    )
    (here / "bad.toml").write_text(RECIPE.replace('1 = "latents"', '0 = "latents"'))
    assert "reads 8 channels, the layer has 6" in refused(["basis", "bad.toml"], capsys)
    np.save("labels.npy", np.zeros(7, dtype=int))
    assert "expected 300 whole numbers" in refused(["basis", "basis.toml"], capsys)
    for old, new, sentence in (
        ("n_null_graphs = 5", "n_nul_graphs = 5", "did you mean n_null_graphs?"),
        ("n_null_graphs = 5", "rank_threshold = 2.0", "rank_threshold must be in (0, 1)"),
        ('"0", "1", "2"', '"1"', "layers must name at least two layers, got 1"),
    ):
        (here / "bad.toml").write_text(RECIPE.replace(old, new))
        assert sentence in refused(["basis", "bad.toml"], capsys)
    rows = np.load("rows.npy")
    rows[4, 2] = np.nan
    np.save("rows.npy", rows)
    np.save("labels.npy", np.zeros(300, dtype=int))
    said = refused(["basis", "basis.toml"], capsys)
    assert "NaN" in said
    assert "4" in said
