"""The recipes for branches run, from images to the table."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from mechatlas.activations.networks import Network, load_network
from mechatlas.app import cli

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "branches"


def script(name: str, *words: str) -> str:
    """What a script of the recipes prints."""
    done = subprocess.run(
        [sys.executable, str(RECIPES / name), *words],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_untrained_network_has_other_weights_and_activations_of_like_size(tmp_path):
    import torch

    script("untrained.py", "inception_mini", "--out", str(tmp_path / "fresh.safetensors"))
    fresh = load_network(Network(name="inception_mini", weights=tmp_path / "fresh.safetensors"))
    trained = load_network(Network(name="inception_mini"))
    with torch.no_grad():
        images = torch.rand(4, 3, 31, 31, generator=torch.Generator().manual_seed(0))
        logits = fresh(images)
    assert not torch.equal(fresh.get_parameter("conv2d0.conv.weight"),
                           trained.get_parameter("conv2d0.conv.weight"))  # fmt: skip
    assert 1e-3 < float(logits.std()) < 1e3


def test_batch_norms_of_an_untrained_network_forget_the_trained_ones_statistics():
    import torch

    norm = torch.nn.BatchNorm2d(4)
    norm.running_var = torch.full((4,), 99.0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), norm).eval()
    kept = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    fresh = runpy.run_path(str(RECIPES / "untrained.py"))["untrained"](network, 0)
    assert torch.equal(fresh["1.running_var"], torch.ones(4))
    assert all(torch.equal(kept[name], its) for name, its in network.state_dict().items())


@pytest.mark.slow
def test_inception_v1_from_random_weights_to_the_table(tmp_path):
    collect = str(RECIPES / "collect_inception_v1.toml")
    words = ["--samples.source", "photos", "--samples.crops", "4", "--storage.batch-size", "8"]
    cli.main(["collect", collect, *words, "--out", str(tmp_path / "store")])
    told = script("run.py", str(tmp_path / "store"), "--expansion", "1", "--steps", "3", "--branch",
                  "5x5", "1x1", "--rows", "64", "--match-rows", "16")  # fmt: skip
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["site"] for row in table] == [f"mixed4{x}" for x in "abcde"]
    assert [row["features"] for row in table] == [508, 512, 512, 528, 832]
    assert set(table[0]["branches"]) == {"1x1", "3x3", "5x5", "pool"}
    assert (tmp_path / "mixed4a~5x5" / "dictionary.safetensors").is_file()
    assert (tmp_path / "mixed4a~1x1-match" / "matches.parquet").is_file()
    assert len(table[1]["consistency"]) == 2
    assert "mixed4e" in told


@pytest.mark.slow
def test_a_chain_of_dictionaries_becomes_a_page(tmp_path):
    collect = str(RECIPES / "collect_inception_mini.toml")
    words = ["--samples.source", "photos", "--samples.crops", "12", "--samples.include", "*"]
    cli.main(["collect", collect, *words, "--out", str(tmp_path / "store")])
    told = script("../circuits/chain.py", str(tmp_path / "store"), "mixed4a", "mixed4b", "mixed4c",
                  "--expansion", "1", "--steps", "20", "--features", "2", "--visualize-steps", "2",
                  "--samples", "32")  # fmt: skip
    assert "mixed4b -> mixed4c: weights and ablations agree" in told
    assert (tmp_path / "circuit" / "edges.parquet").is_file()
    assert (tmp_path / "circuit.html").stat().st_size > 100_000
