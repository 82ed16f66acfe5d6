"""Recipes of every kind of dictionary, from a store of two sites that belong together."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mechatlas as ma
from mechatlas.activations.collect import StoreConfig
from mechatlas.activations.networks import Network, digest
from mechatlas.activations.positions import Positions
from mechatlas.activations.samples import Arrays
from mechatlas.activations.store import Store
from mechatlas.app.cli import main
from mechatlas.app.commands import train
from mechatlas.app.commands.collect import CollectConfig
from mechatlas.app.commands.train import SourceConfig, TrainConfig
from mechatlas.app.recipes import as_dict, from_dict
from mechatlas.app.run_folder import execute
from mechatlas.base import RecipeError, StoreError
from mechatlas.dictionaries.autoencoder import Autoencoder, Crosscoder, Transcoder
from mechatlas.dictionaries.formats import load
from mechatlas.dictionaries.objective import Objective
from mechatlas.dictionaries.revival import AuxK, Resample
from mechatlas.dictionaries.sparsity import BatchTopK, JumpReLU, TopK
from mechatlas.dictionaries.training import default_rate


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 20), nn.ReLU())


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paired")
    random = np.random.default_rng(0)
    np.save(folder / "x.npy", random.normal(size=(3000, 8)).astype(np.float32))
    for paired in (True, False):
        execute(
            CollectConfig(
                network=Network(name=f"{__name__}:two_layers"),
                sites=("1", "3"),
                samples=Arrays(source=folder / "x.npy"),
                storage=StoreConfig(positions=Positions(rule="all"), paired=paired),
                out=folder / ("paired" if paired else "apart"),
            )
        )
    return folder


OPTIONS: dict[str, Any] = {"n_latents": 40, "steps": 20, "batch_size": 128}


@pytest.mark.parametrize(
    ("kind", "d_in", "d_out", "options"),
    [
        (
            Autoencoder,
            12,
            12,
            {"site": "1", "sparsity": BatchTopK(k=4), "matryoshka_widths": (8, 20)},
        ),
        (Autoencoder, 20, 20, {"site": "3", "sparsity": TopK(k=4), "tied": True}),
        (Transcoder, 12, 20, {"site": "1", "writes": ("3",), "sparsity": JumpReLU(l0=0.5)}),
        (Crosscoder, 32, 32, {"writes": ("1", "3"), "revival": Resample(every=5)}),
        (Crosscoder, 12, 32, {"site": "1", "writes": ("1", "3"), "revival": AuxK(k=8)}),
    ],
)
def test_every_kind_is_trained_by_a_recipe(stores, tmp_path, kind, d_in, d_out, options):
    objective = Objective(normalize_mse=True, clip=1.0)
    recipe = TrainConfig(
        store=stores / "paired", out=tmp_path / "d", objective=objective, **OPTIONS, **options
    )
    assert from_dict(as_dict(recipe), TrainConfig, "again") == recipe
    result = execute(recipe)
    assert (result.d_in, result.d_out) == (d_in, d_out)
    again = load(tmp_path / "d")
    assert type(again) is kind
    assert again.sparsity == recipe.sparsity


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Autoencoder, {"site": "1"}),
        (Transcoder, {"site": "1", "writes": ("3",)}),
        (Crosscoder, {"writes": ("1", "3")}),
    ],
)
def test_a_recipe_with_a_source_trains_straight_from_the_network(stores, tmp_path, kind, options):
    source = SourceConfig(
        network=Network(name=f"{__name__}:two_layers"), samples=Arrays(source=stores / "x.npy")
    )
    recipe = TrainConfig(source=source, out=tmp_path / "d", seed=2, **OPTIONS, **options)
    assert from_dict(as_dict(recipe), TrainConfig, "again") == recipe
    result = execute(recipe)
    assert result.rows == 2850
    assert result.held_out_rows == 150
    again = load(tmp_path / "d")
    assert type(again) is kind
    sites = [site for site in recipe.sites if site]
    rows = ma.stream(two_layers(), Arrays(source=stores / "x.npy"), sites, seed=2)
    widths = {s: p.stop - p.start for s, p in zip(recipe.sites, rows.parts, strict=True)}
    own = recipe.build(widths)
    ma.train(own, rows, steps=20, batch_size=128, seed=2)
    for name, weights in own.state_dict().items():
        assert torch.equal(again.state_dict()[name], weights), name


def test_the_command_says_what_keeps_latents_where_many_are_dead(stores, tmp_path):
    config = TrainConfig(store=stores / "apart", site="1", out=tmp_path / "d", **OPTIONS)
    result = execute(config)
    dictionary: Any = load(tmp_path / "d")
    assert result.lr == default_rate(dictionary, config.steps)
    few, many = (dataclasses.replace(result, dead_share=share) for share in (0.1, 0.5))
    assert "--lr" not in train.in_words(few)
    assert f"`--lr {result.lr / 2:.2g}`" in train.in_words(many)


def test_a_file_with_tables_of_the_source_is_read_by_the_command(stores, tmp_path, capsys):
    path = tmp_path / "straight.toml"
    path.write_text(
        f"""
        site = "1"
        n_latents = 40
        out = "{tmp_path / "d"}"
        [source]
        held_out = 0.1
        [source.network]
        name = "{__name__}:two_layers"
        [source.samples]
        type = "Arrays"
        source = "{stores / "x.npy"}"
        """
    )
    main(["train", str(path), "--steps", "5", "--batch-size", "64", "--source.batch-size", "32"])
    assert "Held out: fvu" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    assert manifest["site"] == "1"
    assert manifest["network"] == digest(two_layers())
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", str(tmp_path / "d"), "--out", str(tmp_path / "e")])
    assert stopped.value.code == 2
    assert "does not say that it was trained on a store" in capsys.readouterr().err


def test_paired_rows_are_of_one_sample_at_every_site(stores):
    rows = Store(stores / "paired").paired(["1", "3"])
    network = two_layers()
    batch = next(rows.batches(50, seed=1, start=3))
    for x in (batch.x, rows.held_out(30).x):
        with torch.no_grad():
            after = network[3](network[2](x[:, :12]))
        torch.testing.assert_close(x[:, 12:], after)
    assert rows.d_in == 32
    told = rows.describe(7)
    assert told == ", ".join(Store(stores / "paired").rows(site).describe(7) for site in "13")


def test_sites_that_do_not_belong_together_are_refused(stores, tmp_path):
    recipe = TrainConfig(
        store=stores / "apart", site="1", writes=("3",), out=tmp_path / "d", **OPTIONS
    )
    with pytest.raises(StoreError, match=r"1, 3 in .*apart do not belong together\. Collect them"):
        execute(recipe)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"writes": ["3"]}, "A transcoder to 3 needs another site to read"),
        ({"source": {"network": "n"}}, "give either a store, or a table"),
        ({"store": None}, "give either a store, or a table"),
        ({"store": None, "source": {"network": "n"}}, "needs the `site` of the network"),
        ({"source": {"network": "n", "held_out": 1.0}}, "held_out must be"),
        ({"site": "3", "writes": ["3"]}, "A transcoder to 3 needs another site to read"),
        ({"site": "1", "writes": ["3"], "tied": True}, "and cannot be tied"),
        ({"site": "2", "writes": ["1", "3"]}, "reads .'2'. must be one of '1', '3'"),
        ({"matryoshka_widths": [30, 20]}, "must rise"),
        ({"sparsity": {"type": "TopK", "k": 41}}, "n_latents .40. must be at least k .41."),
        ({"sparsity": {"type": "ReLU", "l1": -1.0}}, "l1 must be > 0, got -1.0"),
        (
            {"sparsity": {"type": "TopX"}},
            "expected one of the types TopK, .* got 'TopX' @ .*sparsity",
        ),
        ({"sparsity": 3}, "expected dict, got 3"),
        ({"revival": {"type": "Resample", "until": 2.0}}, r"until must be in \(0, 1\], got 2.0"),
        ({"objective": {"clip": 0.0}}, "clip must be > 0, got 0.0"),
    ],
)
def test_recipes_that_cannot_be_are_refused_before_any_work(keys, message):
    with pytest.raises(RecipeError, match=message):
        from_dict({"store": "s", "n_latents": 40, **keys}, TrainConfig, "train.toml")
