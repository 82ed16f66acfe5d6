"""Analyses on every network of the zoo: each works, or is refused in one sentence."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mechatlas.activations.collect import collect
from mechatlas.activations.posing import PoseConfig
from mechatlas.activations.sites import as_site
from mechatlas.analysis.circuits.circuit import Circuit, circuit
from mechatlas.analysis.interaction.interaction_basis import basis
from mechatlas.analysis.interaction.results import InteractionBasis, InteractionConfig
from mechatlas.analysis.matching.splicing import splice
from mechatlas.base import UserError
from mechatlas.dictionaries.autoencoder import Autoencoder
from mechatlas.dictionaries.sparsity import TopK
from tests.test_zoo import Numbered, brought, drawn, everywhere, own_rows, own_values, untouched
from tests.zoo import Animal, Place

FAST = InteractionConfig(
    kinds=("lib",), jacobian_samples=4, gradient_probes=2, ablation_samples=6, n_null_graphs=1,
    ablations=False, score="fvu",
)  # fmt: skip
N = 9
few = settings(drawn, max_examples=2)


def done(network: nn.Module, work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Result, or the sentence by which the work is refused; the network is as it was."""
    with untouched(network), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return work(*arguments, **options)
        except UserError as error:
            sentence = str(error)
    assert len(sentence) > 20
    assert not re.search(r"Traceback|0x[0-9a-f]{6}", sentence)
    return sentence


def two_places(data: st.DataObject, kind: Animal) -> list[Place]:
    """Two outputs of modules, in the order of the table."""
    places = [p for p in kind.places if p.collected and not re.search("[:/]", p.site)]
    if len(places) < 2:
        pytest.skip("has no two sites")
    first = data.draw(st.integers(0, len(places) - 2))
    second = data.draw(st.integers(first + 1, min(first + 4, len(places) - 1)))
    return [places[first], places[second]]


def named(place: Place) -> str:
    return place.site if place.told else place.written


@everywhere
@few
@given(data=st.data())
def test_the_interaction_basis_has_the_statistics_of_the_true_rows(name, data):
    kind, network, _ = brought(name)
    places, x = two_places(data, kind), kind.samples(N)
    result = done(network, basis, network, x, [named(place) for place in places], FAST)
    if isinstance(result, str):
        return
    assert isinstance(result, InteractionBasis)
    for layer, place, value in zip(
        result.layers, places, own_values(network, x, places), strict=True
    ):
        rows = own_rows(place, value, N).double().flatten(0, 1).numpy()
        assert (layer.width, layer.n_rows) == (rows.shape[1], rows.shape[0])
        truth = np.linalg.eigvalsh(np.cov(rows.T, bias=True).reshape(rows.shape[1], -1))
        np.testing.assert_allclose(
            np.sort(layer.activation_eigenvalues), truth, rtol=1e-2, atol=1e-4 * truth.max()
        )


@everywhere
@few
@given(data=st.data())
def test_a_circuit_is_found_or_refused(name, data):
    kind, network, _ = brought(name)
    places = two_places(data, kind)
    torch.manual_seed(0)
    a, b = (Autoencoder(d_in=p.width, n_latents=5, sparsity=TopK(k=2)) for p in places)
    site_a, site_b = map(named, places)
    result = done(network, circuit, network, a, b, kind.samples(N), site_a=site_a, site_b=site_b)
    assert isinstance(result, str | Circuit)


@everywhere
@few
@given(data=st.data())
def test_a_splice_with_the_rows_of_the_site_itself_loses_nothing(name, data):
    if name == "views_and_resizing":
        pytest.skip("writes through views, from which an edit separates a tensor")
    kind, network, x = brought(name)
    places = two_places(data, kind)

    def same(_x: Tensor, y: Tensor) -> Tensor:
        return y

    def work() -> Any:
        a, b = (as_site(network, named(place)) for place in places)
        return splice(network, [x], (a, b), {"same": same})

    result = done(network, work)
    if not isinstance(result, str):  # the answers may all be equal: then nothing can be lost
        assert not abs(result["same"].variance_lost.value) > 1e-4


@everywhere
def test_poses_are_collected_or_refused(name, tmp_path):
    kind, network, x = brought(name)
    sites = [named(place) for place in kind.places[:1]]
    if not sites:
        pytest.skip("has no sites")

    def work() -> Any:
        found = [as_site(network, site) for site in sites]
        poses = PoseConfig(name="C2")
        return collect(network, Numbered(x), found, tmp_path / "store", group=poses)

    done(network, work)
