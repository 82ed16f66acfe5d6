"""Planted chains of six dictionaries: partners found, false match rate, and three ways to go far.

Run: `pytest benchmarks/bench_matching.py -s -o python_files='bench_*.py' -m ''`.
Features turn from layer to layer, 10 % die and as many are born, 5 % split, scales drift; each
decoder row has noise of its own. Nominal false match rate: 5 %.
"""

import itertools
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from mechatlas.analysis.matching.chains import compose, track
from mechatlas.analysis.matching.pairing import match

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.analysis.matching.planted import LEVELS, chain

SEEDS = 2
FAR_SEEDS = 8


def pairings(planted):
    """Columns by way and distance, each with its two layers."""
    matches = [match(*two) for two in itertools.pairwise(planted.dictionaries)]
    steps = [each.matched_columns() for each in matches]
    layers = [each.unit_a for each in matches] + [matches[-1].unit_b]
    tracks = track(layers, matches)
    for first, last in itertools.combinations(range(6), 2):
        two = first, last
        yield "joint", two, tracks.between(first, last, n=len(layers[first]))
        yield "composition", two, compose(steps[first:last])
        direct = match(planted.dictionaries[first], planted.dictionaries[last])
        yield "direct", two, direct.matched_columns()


@pytest.mark.parametrize("level", LEVELS)
def test_chain(benchmark, level):
    scores = defaultdict(list)
    for seed in range(SEEDS):
        planted = chain(1000, 128, noise=LEVELS[level], seed=seed)
        if seed == 0:
            benchmark.pedantic(match, planted.dictionaries[:2], rounds=3)
        for way, (first, last), columns in pairings(planted):
            scores[way, last - first].append(planted.score(columns, first, last)[:2])
    found, wrong = {}, {}
    for key, each in scores.items():
        found[key], wrong[key] = np.mean(each, axis=0).round(4).tolist()
    print(f"\n| {level} | way | 1 | 2 | 3 | 4 | 5 |\n|---|---|---|---|---|---|---|")
    for title, shares in (("found", found), ("wrong", wrong)):
        for way in ("direct", "composition", "joint"):
            print(f"| {title} | {way} |", *(f"{shares[way, k]:.3f} |" for k in range(1, 6)))
    benchmark.extra_info.update(
        found=found["direct", 1], wrong=wrong["direct", 1], joint=found["joint", 5]
    )
    assert found["direct", 1] >= {"low": 0.99, "middle": 0.95, "high": 0.8}[level]
    assert found["joint", 5] > found["composition", 5]
    assert max(wrong["joint", k] for k in range(1, 6)) < 0.06  # 0.05 is asked for
    assert wrong["direct", 1] < 0.06
    if level == "high":
        assert found["joint", 5] > 1.8 * found["direct", 5]


@pytest.mark.parametrize("level", LEVELS)
def test_ends(level):
    """The first and the last matched directly, by more seeds than the joint solution can have."""
    scores = []
    for seed in range(FAR_SEEDS):
        planted = chain(1000, 128, noise=LEVELS[level], seed=seed)
        columns = match(planted.dictionaries[0], planted.dictionaries[5]).matched_columns()
        scores.append(planted.score(columns, 0, 5)[:2])
    found, wrong = np.mean(scores, axis=0)
    print(f"\n{level}, distance 5, direct, {FAR_SEEDS} seeds: found {found:.3f}, wrong {wrong:.3f}")
    assert wrong < 0.06
