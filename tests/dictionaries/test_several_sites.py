"""Dictionaries of several sites, and of windows of tokens, work in an analysis or are refused."""

import numpy as np
import pytest
from torch import nn

from mechatlas.activations.collect import collect
from mechatlas.activations.positions import Positions
from mechatlas.activations.samples import Arrays, open_samples
from mechatlas.activations.store import Store
from mechatlas.analysis.evaluation.evaluate import evaluate
from mechatlas.analysis.examples.statistics import feature_statistics
from mechatlas.analysis.matching.pairing import match
from mechatlas.app.report.from_python import report
from mechatlas.base import Site, UserError
from tests.dictionaries.golden import read_published, read_temporal
from tests.networks import Reader, Windows

SEVERAL = {
    "gemma_scope_two_layer_1_4_7_width_6": "24 \\(3 sites side by side: blocks.1.hook_resid_post,",
    "llamascopium_crosscoder_jumprelu": "24 \\(3 sites side by side: blocks.0.hook_resid_mid,",
    "circuit_tracer_clt_relu": "24 \\(3 sites side by side: blocks.0.hook_resid_mid,",
    "temporal_topk": "windows of consecutive tokens",
}
"""Dictionaries, and what is said where rows of one site are encoded."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sites")
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32))
    network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()).eval()
    samples = open_samples(Arrays(source=folder / "x.npy"), network)
    collect(network, samples, [Site("1")], folder / "store")
    return network, samples, Store(folder / "store")


@pytest.mark.parametrize("name", SEVERAL)
def test_atoms_are_matched_and_rows_of_one_site_are_refused(name, world, tmp_path):
    dictionary = (read_temporal if name.startswith("temporal") else read_published)(name)
    assert (match(dictionary, dictionary).columns == np.arange(dictionary.n_latents)).all()
    network, samples, store = world
    positions = Positions(keep_special=True, skip_first=0)
    for use in (
        lambda: evaluate(
            dictionary, network=Reader(), samples=Windows(n=10, length=3), site="embed",
            positions=positions,
        ),
        lambda: feature_statistics(dictionary, store.rows("1")),
        lambda: report(
            tmp_path / "page.html", stores=store, dictionaries={"1": dictionary},
            network=network, samples=samples, on_problem=lambda name, problem: None,
        ),
    ):  # fmt: skip
        with pytest.raises(UserError, match=SEVERAL[name]):
            use()
