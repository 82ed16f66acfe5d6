"""Statistics of a layer against the matrix products they need: the promise is at most 1.5 times.

And edges of an inception module, against running the module once for each direction.

Run: `pytest benchmarks/bench_interaction.py -o python_files='bench_*.py' --benchmark-only`.

The products are those that a library without symmetric updates would take: X^T X of the float32
rows in float64, D^T D of the firing in float32, and W^T M W once.
"""

import time

import numpy as np
import pytest
import torch

import mechatlas as ma
from mechatlas.analysis.interaction import bases
from mechatlas.analysis.interaction.edges import measure_edges
from mechatlas.analysis.interaction.layer_maps import layer_maps
from mechatlas.analysis.interaction.statistics import Inputs, collect_statistics
from mechatlas.base import Site
from mechatlas.maths.linalg import BLOCK, Firing, Moments, relu_pullback

WIDTH, ROWS = 1024, 65_536


@pytest.fixture(scope="module")
def rows():
    torch.set_num_threads(1)
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


def products(x, weights):
    total, fires = torch.zeros(WIDTH, WIDTH, dtype=torch.float64), torch.zeros(WIDTH, WIDTH)
    for block in x.split(BLOCK):
        wide = block.double()
        total += wide.T @ wide
        on = (block > 0).float()
        fires += on.T @ on
    return weights.T @ (total * fires.double()) @ weights


def ours(x, weights):
    moments, firing = Moments(WIDTH), Firing(WIDTH)
    moments.add(x)
    firing.add(x > 0)
    return relu_pullback(moments.covariance, weights.numpy(), firing.together / firing.n)


def test_statistics(benchmark, rows):
    weights = torch.randn(WIDTH, WIDTH, dtype=torch.float64) / WIDTH**0.5
    ratios = []

    def both():
        # Interleaved, in CPU seconds: other work on the machine slows both alike.
        start = time.process_time()
        products(rows, weights)
        middle = time.process_time()
        ours(rows, weights)
        ratios.append((time.process_time() - middle) / (middle - start))

    benchmark.pedantic(both, rounds=3)
    benchmark.extra_info.update(ratio=float(np.median(ratios)), ratios=ratios)
    assert np.median(ratios) <= 1.5


def test_edges_of_an_inception_module(benchmark):
    torch.set_num_threads(1)
    network = ma.load_network(ma.Network(name="inception_mini"))
    samples = ma.open_samples(ma.Images(crops=16), network)
    images = samples.stack([samples.read(i) for i in range(64)])
    layers = [Site("mixed3b"), Site("mixed4a")]
    maps = layer_maps(network, layers, images[:8])
    moments, _ = collect_statistics(network, Inputs.from_data(images), layers, maps, batch_size=64)
    inputs = Inputs.from_data(images).with_activations(network, layers, batch_size=64)
    source, target = (bases.pca_basis(layer.moments) for layer in moments)
    seconds = {}

    def both():
        start = time.process_time()
        found = measure_edges(network, maps[0], source, target, inputs)
        middle = time.process_time()
        with torch.no_grad():
            for _ in range(len(source)):
                maps[0].run(inputs.activations[layers[0]], images)
        seconds.update(edges=middle - start, runs=time.process_time() - middle)
        return found

    found = benchmark.pedantic(both, rounds=1)
    error = np.median(found.standard_error / found.strength.clip(min=1e-30))
    benchmark.extra_info.update(**seconds, directions=len(source), relative_error=float(error))
