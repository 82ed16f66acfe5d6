"""Planted symmetries: classes, families and poses found, false discoveries, and time at full size.

Run: `pytest benchmarks/bench_symmetry.py -s -o python_files='bench_*.py' --benchmark-only -m ''`.
Families have every class of stabilizers of D4, or those of D16 (order 32) up to order 8. A fifth of
the features are random decoys. The noise of each half is 0.1, 0.5 or 1.5 times the blocks; families
overlap (cosine 0.5 in the same pose) or share a direction; noise may be uneven; decoys may nearly
have a symmetry (similar to 0.65; a symmetry needs 0.71).
Nominal false discovery rate: 5 %.
"""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from mechatlas.analysis.symmetry.block_artifacts import find_artifacts, measure_scaling
from mechatlas.analysis.symmetry.classify import count_shuffled_discoveries, symmetry
from mechatlas.dictionaries.autoencoder import Crosscoder
from mechatlas.dictionaries.sparsity import ReLU, TopK
from mechatlas.dictionaries.training import train
from mechatlas.maths.named_groups import group

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.analysis.symmetry import test_block_artifacts as zeroed
from tests.analysis.symmetry.planted import NOISE, plant, score

MIXTURES = {
    "apart": {},
    "overlap": {"overlap": 0.5},
    "common": {"common": 2.0},
    "uneven": {"overlap": 0.3, "uneven": 0.5},
    "near": {"near": 0.65},
}
SEEDS = 3


def subgroups_of(name):
    g = group(name)
    return g, [c.representative for c in g.lattice().classes if c.order <= 8]


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("level", NOISE)
@pytest.mark.parametrize("name", ["D4", "D16"])
def test_planted(benchmark, name, level, mixture):
    g, subgroups = subgroups_of(name)
    options = dict(MIXTURES[mixture])
    uneven = options.pop("uneven", 0.0)
    scores, by_chance, n_features = [], 0, 0
    for seed in range(SEEDS):
        planted = plant(
            g, subgroups, d=64, families_each=4, members=8, decoys=60, seed=seed, **options
        )
        blocks, halves = planted.measured(NOISE[level], seed=seed, uneven=uneven)
        n_features = len(blocks)
        if seed == 0:
            benchmark.pedantic(symmetry, (blocks, g, halves), rounds=1)
        scores.append(score(planted, symmetry(blocks, g, halves)))
        by_chance += count_shuffled_discoveries(halves, g)
    mean = {key: round(float(np.mean([each[key] for each in scores])), 4) for key in scores[0]}
    print(f"\n{name} {level} {mixture} ({n_features} features): {mean}, shuffled {by_chance}")
    benchmark.extra_info.update(mean, shuffled=by_chance)
    assert by_chance == 0
    assert mean["fdr"] <= 0.05
    if level != "high":
        assert mean["f1"] >= 0.95
        assert mean["ari"] >= 0.9
        assert mean["poses"] >= 0.95


@pytest.mark.parametrize("n", [1024, 8192])
def test_full_width(benchmark, n):
    """Order 32 and 480 channels, as in the paper."""
    g, subgroups = subgroups_of("D16")
    planted = plant(
        g, subgroups, d=480, families_each=1, members=(n - n // 8) // len(subgroups),
        decoys=n // 8,
    )  # fmt: skip
    blocks, halves = planted.measured(NOISE["middle"])
    symmetries = benchmark.pedantic(symmetry, (blocks, g, halves), rounds=1)
    scores = score(planted, symmetries)
    print(f"\n{len(blocks)} features, order 32, 480 channels: {scores}")
    benchmark.extra_info.update(scores)
    assert scores["f1"] >= 0.95
    assert scores["fdr"] <= 0.05
    assert scores["ari"] >= 0.9


@pytest.mark.parametrize("noise", [0.5, 2.0, 8.0])
def test_zero_blocks(benchmark, noise):
    """Classes of planted zero blocks, with artifacts and without."""
    counts = Counter()
    for seed in range(20):
        for artifacts in (True, False):
            world = zeroed.plant(noise=noise, seed=seed, artifacts=artifacts)
            found = zeroed.names_of(find_artifacts(world.estimates))
            zero = world.truth != "present"
            kinds = (f"{name}{'' if artifacts else ' alone'}" for name in world.truth[zero])
            counts.update(zip(kinds, found[zero], strict=True))
    benchmark.pedantic(find_artifacts, (zeroed.plant(noise=noise).estimates,), rounds=1)
    table = {f"{truth}: {name}": n for (truth, name), n in sorted(counts.items())}
    print(f"\nnoise {noise}: {table}")
    benchmark.extra_info.update(table)
    assert all(name in (truth.removesuffix(" alone"), "not shown") for truth, name in counts)


@pytest.mark.parametrize("sparsity", [TopK(k=4), ReLU(l1=1), ReLU(l1=4)], ids=str)
def test_zero_blocks_of_trained_crosscoders(benchmark, sparsity):
    """Classes of blocks that are full, weak (0.3) or absent in 40 planted concepts of D4."""
    random = np.random.default_rng(0)
    sizes = np.array([1, 1, 1, 1, 0.3, 0.3, 0, 0])
    # The untransformed block, which the code is read from, is full.
    order = np.array([[0, *1 + random.permutation(7)] for _ in range(40)])
    sizes = np.take_along_axis(np.tile(sizes, (40, 1)), order.argsort(axis=1), axis=1)
    blocks = random.standard_normal((40, 8, 32))
    blocks *= 3 * sizes[..., None] / np.linalg.norm(blocks, axis=2, keepdims=True)
    codes = random.exponential(size=(20_000, 40)) * (random.random((20_000, 40)) < 0.08)
    posed = np.einsum("nk,kgd->ngd", codes, blocks) + 0.1 * random.standard_normal((20_000, 8, 32))
    rows = torch.from_numpy(posed.reshape(len(posed), -1)).float()
    names = group("D4").element_names
    made = Crosscoder(widths=dict.fromkeys(names, 32), n_latents=64, sparsity=sparsity, reads="e")
    benchmark.pedantic(
        train, (made, rows), {"steps": 800, "batch_size": 1024, "lr": 3e-3}, rounds=1
    )
    atoms = made.W_dec.detach().numpy().reshape(64, 8, 32)
    with torch.no_grad():
        learned = made.encode(rows[:, :32]).numpy()
    found = zeroed.names_of(find_artifacts(measure_scaling(learned, posed, atoms)))
    flat = [
        x.reshape(len(x), -1) / np.linalg.norm(x, axis=(1, 2))[:, None] for x in (atoms, blocks)
    ]
    cosine = flat[0] @ flat[1].T
    counts = Counter()
    for j in np.flatnonzero(cosine.max(axis=1) > 0.9):
        true = sizes[cosine[j].argmax()]
        counts.update(zip(true.tolist(), found[j], strict=True))
    table = {f"{size}: {name}": n for (size, name), n in sorted(counts.items(), reverse=True)}
    print(f"\n{sparsity}: {table}")
    benchmark.extra_info.update(table)
