"""From a recipe with a group to its crosscoders, untied and tied."""

import json
from pathlib import Path

import pytest
import torch

from mechatlas.activations.collect import Collecting
from mechatlas.activations.networks import Network
from mechatlas.activations.posing import Posing
from mechatlas.activations.positions import Positions
from mechatlas.activations.samples import Images
from mechatlas.activations.store import Store
from mechatlas.app import jobs
from mechatlas.app.recipes import Collect, Train, from_dict
from mechatlas.base import RecipeError
from mechatlas.dictionaries.autoencoder import Autoencoder, Crosscoder
from mechatlas.dictionaries.formats import load
from mechatlas.dictionaries.pose_tied import PoseTied
from mechatlas.dictionaries.sparsity import ReLU, TopK
from mechatlas.maths.named_groups import group
from tests.app.worlds import photographs


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("group")
    jobs.collect(
        Collect(
            network=Network(name="tests.networks:tiny"),
            sites=("mixed",),
            samples=Images(source=str(photographs(folder / "photos.zip")), side=15, crops=3),
            collecting=Collecting(positions=Positions(rule="random", per_sample=20)),
            group=Posing(name="D4"),
            out=folder / "store",
        )
    )
    return folder / "store"


def trained(store: Path, out: Path, **options):
    result = jobs.train(Train(store=store, out=out, steps=30, batch_size=128, **options))
    return result, load(out), json.loads((out / "manifest.json").read_text())


@pytest.mark.parametrize("sparsity", [TopK(k=3), ReLU(l1=1.0)], ids=["topk", "relu"])
def test_a_store_with_a_group_makes_a_crosscoder_that_reads_the_input_as_it_is(
    store, tmp_path, sparsity
):
    result, built, manifest = trained(store, tmp_path / "d", n_latents=24, sparsity=sparsity)
    assert isinstance(built, Crosscoder)
    assert (result["d_in"], result["d_out"]) == (8, 64)
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
    assert result["d_in"] == result["d_out"] == 64
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
        jobs.train(Train(store=store, out=tmp_path / "d", n_latents=24, **options))

    k = TopK(k=3)
    with pytest.raises(RecipeError, match="goes without writes and tied"):
        refused(tied=True, sparsity=k)
    with pytest.raises(
        RecipeError, match=r"n_latents \(20\) must be a multiple of the order of D4"
    ):
        jobs.train(Train(store=store, out=tmp_path / "d", n_latents=20, sparsity=k, pose_tied=True))
    with pytest.raises(RecipeError, match="pose_tied goes without writes, tied"):
        from_dict({"store": "s", "pose_tied": True, "tied": True}, Train, "here")
    raw = {"network": "inception_mini", "sites": ["a"]}
    with pytest.raises(RecipeError, match=r"matched_blur has nothing to match: D4 is exact"):
        from_dict({**raw, "group": {"name": "D4", "matched_blur": True}}, Collect, "here")
    with pytest.raises(RecipeError, match="There is no group called 'D4x'"):
        from_dict({**raw, "group": {"name": "D4x"}}, Collect, "here")
    assert not (tmp_path / "d").exists()


def test_a_plain_store_cannot_be_pose_tied(tmp_path):
    with pytest.raises(ValueError, match=r"needs a store that was collected with a \[group\]"):
        Train(store=tmp_path, n_latents=24, sparsity=TopK(k=3), pose_tied=True).build({None: 8})


def test_a_page_can_be_made_of_a_folder_with_group_dictionaries(store, tmp_path):
    folder = store.parent
    trained(store, folder / "untied", n_latents=24, sparsity=TopK(k=3))
    trained(store, folder / "tied", n_latents=24, sparsity=TopK(k=4), pose_tied=True)
    result = jobs.report(folder, tmp_path / "page.html")
    text = Path(result["page"]).read_text()
    assert "untied" in text
