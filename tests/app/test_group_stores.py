"""From a recipe with a group to its crosscoders, untied and tied."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mechatlas.activations.collect import StoreConfig
from mechatlas.activations.networks import Network
from mechatlas.activations.posing import PoseConfig, action_of
from mechatlas.activations.positions import Positions
from mechatlas.activations.samples import Images, open_samples
from mechatlas.activations.sites import read_activations
from mechatlas.activations.store import Store
from mechatlas.app.commands import symmetry
from mechatlas.app.commands.collect import CollectConfig
from mechatlas.app.commands.symmetry import SymmetryConfig
from mechatlas.app.commands.train import TrainConfig
from mechatlas.app.recipes import TrustConfig, from_dict
from mechatlas.app.report.chapters import features
from mechatlas.app.report.runs import find_runs
from mechatlas.app.run_folder import execute
from mechatlas.base import RecipeError, Site, no_progress
from mechatlas.dictionaries.autoencoder import Autoencoder, Crosscoder
from mechatlas.dictionaries.formats import load, save
from mechatlas.dictionaries.pose_tied import PoseTied
from mechatlas.dictionaries.sparsity import ReLU, TopK
from mechatlas.maths.named_groups import group
from tests.app.worlds import photographs
from tests.networks import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("group")
    execute(
        CollectConfig(
            network=Network(name="tests.networks:tiny"),
            sites=("mixed",),
            samples=Images(source=str(photographs(folder / "photos.zip")), side=15, crops=3),
            storage=StoreConfig(positions=Positions(rule="random", per_sample=20)),
            group=PoseConfig(name="D4"),
            out=folder / "store",
        )
    )
    return folder / "store"


def trained(store: Path, out: Path, **options):
    result = execute(TrainConfig(store=store, out=out, steps=30, batch_size=128, **options))
    return result, load(out), json.loads((out / "manifest.json").read_text())


@pytest.mark.parametrize("sparsity", [TopK(k=3), ReLU(l1=1.0)], ids=["topk", "relu"])
def test_a_store_with_a_group_makes_a_crosscoder_that_reads_the_input_as_it_is(
    store, tmp_path, sparsity
):
    result, built, manifest = trained(store, tmp_path / "d", n_latents=24, sparsity=sparsity)
    assert isinstance(built, Crosscoder)
    assert (result.d_in, result.d_out) == (8, 64)
    assert built.reads == slice(0, 8)
    assert list(built.spans) == list(group("D4").element_names)
    assert manifest["site"] == "mixed"
    assert manifest["group"]["table"] == group("D4").table.tolist()
    assert (manifest["group"]["name"], manifest["group"]["action"]) == ("D4", "rotate")
    blocks = built.W_dec.view(24, 8, 8)
    torch.testing.assert_close(blocks[:, 3], built.W_dec[:, built.spans["r^3"]])


def test_a_pose_tied_dictionary_is_asked_for_by_a_word(store, tmp_path):
    result, built, manifest = trained(
        store, tmp_path / "d", n_latents=24, sparsity=TopK(k=4), pose_tied=True
    )
    assert isinstance(built, PoseTied)
    assert built.n_families == 3
    assert result.d_in == result.d_out == 64
    assert built.group == Store(store).group == group("D4")
    assert manifest["group"]["elements"] == list(group("D4").element_names)


def test_a_branch_of_a_store_with_a_group_is_that_of_the_input_as_it_is(store, tmp_path):
    _, built, manifest = trained(
        store, tmp_path / "d", n_latents=8, sparsity=TopK(k=2), site="mixed/left"
    )
    assert isinstance(built, Autoencoder)
    assert built.d_in == 5
    assert "group" not in manifest


def test_what_does_not_suit_the_store_is_refused(store, tmp_path):
    def refused(**options):
        execute(TrainConfig(store=store, out=tmp_path / "d", n_latents=24, **options))

    k = TopK(k=3)
    with pytest.raises(RecipeError, match="goes without writes and tied"):
        refused(tied=True, sparsity=k)
    with pytest.raises(
        RecipeError, match=r"n_latents \(20\) must be a multiple of the order of D4"
    ):
        execute(
            TrainConfig(store=store, out=tmp_path / "d", n_latents=20, sparsity=k, pose_tied=True)
        )
    with pytest.raises(RecipeError, match="pose_tied goes without writes, tied"):
        from_dict({"store": "s", "pose_tied": True, "tied": True}, TrainConfig, "here")
    raw = {"network": "inception_mini", "sites": ["a"]}
    with pytest.raises(RecipeError, match=r"matched_blur has nothing to match: D4 is exact"):
        from_dict({**raw, "group": {"name": "D4", "matched_blur": True}}, CollectConfig, "here")
    with pytest.raises(RecipeError, match="There is no group called 'D4x'"):
        from_dict({**raw, "group": {"name": "D4x"}}, CollectConfig, "here")
    assert not (tmp_path / "d").exists()


def test_a_plain_store_cannot_be_pose_tied(tmp_path):
    with pytest.raises(ValueError, match=r"needs a store that was collected with a \[group\]"):
        TrainConfig(store=tmp_path, n_latents=24, sparsity=TopK(k=3), pose_tied=True).build(
            {None: 8}
        )


def test_the_page_has_cards_of_group_crosscoders_and_says_why_not_of_pose_tied_ones(store):
    folder = store.parent
    trained(store, folder / "untied", n_latents=24, sparsity=TopK(k=3))
    trained(store, folder / "tied", n_latents=24, sparsity=TopK(k=4), pose_tied=True)
    chapter = features.chapter(find_runs(folder, trust=TrustConfig(trust=True)), no_progress)
    assert chapter is not None
    (cards,) = chapter.data["dictionaries"]
    assert (cards["run"], cards["n"], cards["problems"]) == ("untied", 24, [])
    assert cards["drift"] < 1e-3  # what is shown is what the store has of the input as it is
    assert chapter.arrays["0/heat"].max() > 0
    assert "It is pose-tied" in chapter.html


@pytest.mark.slow
def test_a_killed_run_of_a_group_store_goes_on_to_the_same_bytes(store, tmp_path):
    """SIGKILL in the middle of a round, twice; rows said to be large make many rounds."""
    script = (
        "import sys; from mechatlas.app import cli;"
        "import mechatlas.activations.collect as c, os, signal;"
        "do = c._fill; n = 0\n"
        "def kill(*words):\n"
        "    global n; n += 1\n"
        "    if n == int(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    do(*words)\n"
        "c._fill = kill\n"
        "c._row_bytes = lambda shape, settings: 100_000\n"
        "cli.main(['collect', sys.argv[2], '--out', sys.argv[3]])"
    )
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'sites = ["mixed"]\n[network]\nname = "tests.networks:tiny"\n'
        f'[samples]\ntype = "Images"\nsource = "{store.parent / "photos.zip"}"\nside = 15\n'
        'crops = 4\n[group]\nname = "D4"\n[storage]\nbatch_size = 8\nmemory_mib = 512\n'
        "[storage.positions]\nper_sample = 100\n"
    )

    def collect(out, at):
        words = [sys.executable, "-c", script, str(at), str(recipe), str(out)]
        return subprocess.run(words, cwd=ROOT, capture_output=True, check=False).returncode

    assert collect(tmp_path / "whole", 0) == 0
    codes = [collect(tmp_path / "killed", at) for at in (4, 6, 0)]
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
    whole, killed = (Store(tmp_path / name) for name in ("whole", "killed"))
    assert whole.manifest["rounds"] > 2
    assert whole.shards == killed.shards  # with the checksum of each file


@pytest.mark.parametrize(
    ("action", "name", "closes"), [("shift", "C4", True), ("scale", "C3", False)]
)
def test_shifts_and_scales_are_collected_and_told(action, name, closes, store, tmp_path):
    collected = execute(
        CollectConfig(
            network=Network(name="tests.networks:tiny"),
            sites=("first",),
            samples=Images(source=str(store.parent / "photos.zip"), side=16, crops=2),
            storage=StoreConfig(positions=Positions(rule="random", per_sample=10)),
            group=PoseConfig(name=name, action=action),
            out=tmp_path / "store",
        )
    )
    order = group(name).order
    assert collected.sites["first"].width == 6 * order
    kept = Store(tmp_path / "store")
    assert kept.manifest["group"]["closes"] is closes
    network, samples, act = (
        tiny(),
        _samples(store, 16),
        action_of(PoseConfig(name=name, action=action)),
    )
    batch, where = next(iter(kept.rows().scan()))
    side = 16
    for row in range(0, len(where), 7):
        sample, y, x = where[row].tolist()
        image = samples.stack([samples.read(sample)])
        for g in range(order):
            with torch.no_grad():
                found = read_activations(network, act(g, image), [Site("first")])[Site("first")][0]
            at = act.moved(g, np.array([[y, x]], float), side)[0]
            low = np.floor(at).astype(int)
            share = at - low
            expected = sum(
                found[:, low[0] + i, low[1] + j]
                * float((share[0] if i else 1 - share[0]) * (share[1] if j else 1 - share[1]))
                for i in (0, 1)
                for j in (0, 1)
                if (i == 0 or share[0] > 1e-6) and (j == 0 or share[1] > 1e-6)
            )
            torch.testing.assert_close(
                batch.x[row].view(order, 6)[g], expected, atol=1e-4, rtol=1e-4
            )
    save(Autoencoder(d_in=6, n_latents=12, sparsity=TopK(k=2)), tmp_path / "d")
    config = SymmetryConfig(
        trust=True, dictionary=tmp_path / "d", store=tmp_path / "store", out=tmp_path / "found"
    )
    result = execute(config)
    text = symmetry.in_words(result)
    assert result.group.closes is closes
    assert ("closes: false" in text) is not closes
    assert not any("turn" in each or "mirror" in each for each in result.classes)


def _samples(store: Path, side: int):
    recipe = Images(source=str(store.parent / "photos.zip"), side=side, crops=2)
    return open_samples(recipe, tiny())
