"""Planted modules come back whole; chance makes none."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mechatlas.analysis.interaction.interaction_basis import basis
from mechatlas.analysis.interaction.modularity import (
    InteractionGraph,
    adjusted_rand_index,
    find_modules,
    interaction_graph,
    modularity,
)
from mechatlas.analysis.interaction.results import InteractionConfig
from mechatlas.base import UserError

WIDTHS = (5, 6, 6, 4)


class Mixed(nn.Module):
    """A layer of several networks side by side, then a rotation that hides which is which."""

    def __init__(self, inner, relu, turn):
        super().__init__()
        self.inner = nn.Linear(inner.shape[1], inner.shape[0])
        self.turn = nn.Linear(len(turn), len(turn), bias=False)
        self.relu = relu
        with torch.no_grad():
            self.inner.weight.copy_(inner)
            self.turn.weight.copy_(turn)

    def forward(self, x):
        h = self.inner(x)
        return self.turn(h.relu() if self.relu else h)


def rotation(n, generator):
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]


def side_by_side(parts, seed) -> tuple[Any, Any, Any]:
    """A network of independent parts, its samples, and the rotation after every layer."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    turns = [rotation(parts * w, generator) for w in WIDTHS[:-1]]
    turns.append(torch.eye(parts * WIDTHS[-1], dtype=torch.float64))  # outputs stay as they are
    layers: list[Any] = [nn.Linear(parts * WIDTHS[0], parts * WIDTHS[0], bias=False)]
    layers[0].weight = nn.Parameter(turns[0])
    for number, (a, b) in enumerate(itertools.pairwise(WIDTHS)):
        blocks = torch.block_diag(*[normal(b, a) for _ in range(parts)])
        layers.append(Mixed(blocks @ turns[number].T, number < 2, turns[number + 1]).double())
    with torch.no_grad():
        for layer in layers[1:]:
            layer.inner.bias.copy_(0.3 * normal(len(layer.inner.bias)))
    each = int(4096 ** (1 / parts) + 1e-9)  # every sample of a part with every one of the others
    samples = [normal(each, WIDTHS[0]) for _ in range(parts)]
    grid = torch.cartesian_prod(*[torch.arange(each)] * parts)
    x = torch.cat([s[grid[:, i]] for i, s in enumerate(samples)], dim=1)
    return nn.Sequential(*layers).eval(), x, turns


def true_parts(layer, turn, parts):
    """The part that a basis vector reads most."""
    mass = np.square(turn.numpy().T @ layer.to_basis).reshape(parts, -1, layer.to_basis.shape[1])
    return mass.sum(axis=1).argmax(axis=0)


def agreement(parts, seed, kind) -> tuple[float, Any]:
    network, x, turns = side_by_side(parts, seed)
    names = [str(i) for i in range(len(network))]
    found = basis(network, x, names, InteractionConfig(kinds=(kind,), score="fvu", seed=seed))
    assert found.modules is not None
    truth = np.concatenate(
        [true_parts(layer, turn, parts) for layer, turn in zip(found.layers, turns, strict=True)]
    )
    joined = found.modules.labels >= 0
    return adjusted_rand_index(found.modules.labels[joined], truth[joined]), found


@pytest.mark.parametrize(("parts", "seed"), [(2, 0), (2, 1), (3, 0), (3, 1)])
def test_networks_side_by_side_are_told_apart_in_the_interaction_basis(parts, seed):
    same, found = agreement(parts, seed, "lib")
    assert same == 1.0
    assert found.modules is not None
    assert found.modules.n == parts
    assert found.modules.significant
    assert found.modules.q > max(found.modules.q_null)
    assert found.rotated_q is not None
    assert found.rotated_q < found.modules.q
    assert found.stability is not None
    assert found.stability[0] == 1.0


def test_neurons_of_a_mixed_network_do_not_show_its_parts():
    same, found = agreement(2, 0, "neurons")
    assert same < 0.5
    assert found.modules is not None
    assert not found.modules.significant
    assert found.modules.q < agreement(2, 0, "lib")[1].modules.q


def test_principal_components_show_parts_that_vary_apart_with_more_edges():
    same, found = agreement(2, 0, "pca")
    _, lib = agreement(2, 0, "lib")
    assert same == 1.0  # the parts see independent samples
    for layer, other in zip(found.layers[:-1], lib.layers[:-1], strict=True):
        assert layer.edge_curves["pca"].n_needed > other.edge_curves["lib"].n_needed


def test_a_mixed_network_without_parts_has_no_modules():
    """The control: as wide and as deep, but the hidden weights of its parts are shuffled."""
    for seed in range(3):
        network, x, _ = side_by_side(2, seed)
        random = np.random.default_rng(seed)
        with torch.no_grad():
            for layer in list(network)[1:]:
                weight = layer.inner.weight
                mixed = random.permutation(weight.numpy().flatten()).reshape(weight.shape)
                weight.copy_(torch.from_numpy(mixed))
        names = [str(i) for i in range(len(network))]
        how = InteractionConfig(kinds=("lib",), score="fvu", seed=seed)
        found = basis(network, x, names, how)
        assert found.modules is not None
        assert not found.modules.significant


@given(st.integers(0, 1000))
@settings(max_examples=15)
def test_a_shuffled_control_has_no_modules(seed):
    random = np.random.default_rng(seed)
    strengths = [np.exp(3 * random.normal(size=(10, 9))), np.exp(3 * random.normal(size=(8, 10)))]
    smallest = [float(np.quantile(s, 0.5)) for s in strengths]
    modules = find_modules(interaction_graph(strengths, smallest), seed=seed, n_null_graphs=20)
    assert modules.q < max(modules.q_null) + 0.05
    assert modules.p_value >= 1 / 21


def test_chance_passes_no_more_often_than_it_should():
    stood = 0
    for seed in range(20):
        random = np.random.default_rng(seed)
        strengths = [random.exponential(size=(8, 8)), random.exponential(size=(8, 8))]
        modules = find_modules(
            interaction_graph(strengths, [0.7, 0.7]), seed=seed, n_null_graphs=20
        )
        stood += modules.significant
    assert stood <= 4  # 1 in 21 is expected; more than 4 of 20 has a chance of one in 300


def test_q_is_newmans():
    # two pairs joined within: Q = 1 - 2 (1/2)^2
    q = modularity(np.array([0, 1]), np.array([2, 3]), np.ones(2), np.array([0, 1, 0, 1]))
    assert q == pytest.approx(0.5)
    q = modularity(np.array([0, 1]), np.array([2, 3]), np.ones(2), np.zeros(4, dtype=int))
    assert q == pytest.approx(0)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=30))
@settings(max_examples=20)
def test_the_rand_index_is_that_of_scikit_learn(pairs):
    metrics = pytest.importorskip("sklearn.metrics")
    a, b = (np.array(x) for x in zip(*pairs, strict=True))
    assert adjusted_rand_index(a, b) == pytest.approx(metrics.adjusted_rand_score(a, b))
    assert adjusted_rand_index(a, (a + 1) % 4) == 1.0


def test_a_graph_without_edges_is_refused():
    empty = interaction_graph([np.ones((2, 2))], [1.0])
    assert isinstance(empty, InteractionGraph)
    with pytest.raises(UserError, match="no edges"):
        find_modules(empty)
