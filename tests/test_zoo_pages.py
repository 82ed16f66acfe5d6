"""From any network to a page: collect, train, report."""

import numpy as np
import pytest
import torch

from mechatlas.activations.collect import StoreConfig
from mechatlas.activations.networks import Network
from mechatlas.activations.positions import Positions
from mechatlas.activations.samples import Arrays
from mechatlas.app.commands.collect import CollectConfig
from mechatlas.app.commands.train import TrainConfig
from mechatlas.app.report.page import report
from mechatlas.app.run_folder import execute
from mechatlas.base import UserError
from mechatlas.dictionaries.sparsity import TopK
from tests.test_zoo import brought
from tests.zoo import ZOO

FAST = ["residual_in_place", "hierarchical_channels_last", "lstm_time_first", "returns_dataclass"]
SLOW = [name for name in ZOO if name not in FAST]


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_a_page_is_made_of_any_network(name, tmp_path):
    kind, _, _ = brought(name)
    places = [place for place in kind.places if place.collected]
    if not places:
        pytest.skip("has no sites")
    place, x = places[len(places) // 2], kind.samples(24)
    site = place.site if place.told else place.written
    exact = x.to(torch.float32) if x.is_floating_point() else x
    np.save(tmp_path / "x.npy", exact.numpy())
    collecting = CollectConfig(
        network=Network(name="tests.zoo:named_animal", arguments={"name": name}),
        samples=Arrays(source=tmp_path / "x.npy"),
        sites=(site,),
        storage=StoreConfig(positions=Positions(rule="all"), held_out=0.2, batch_size=8),
        out=tmp_path / "runs" / "store",
    )
    try:
        execute(collecting)
    except UserError:
        assert kind.wrapped
        return
    store, out = tmp_path / "runs" / "store", tmp_path / "runs" / "features"
    execute(
        TrainConfig(store=store, site=site, out=out, n_latents=8, steps=6, batch_size=16,
                    sparsity=TopK(k=2))
    )  # fmt: skip
    page = tmp_path / "page.html"
    report(tmp_path / "runs", page)
    text = page.read_text()
    assert site.partition("@")[0] in text
    assert len(text) > 10_000
