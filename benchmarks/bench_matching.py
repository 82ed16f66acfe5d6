"""Planted chains of six dictionaries: partners found, false match rate, and three ways to go far.

Run: `pytest benchmarks/bench_matching.py -s -o python_files='bench_*.py' -m ''`.
Features turn from layer to layer, 10 % die and as many are born, 5 % split, scales drift; each
decoder row has noise of its own. Nominal false match rate: 5 %.

Rate and power of every cost on two JumpReLU dictionaries, 31 % of the latents without a partner,
and the same with no partners at all:

    python benchmarks/bench_matching.py rates 600 96 12        latents, width, seeds
    python benchmarks/bench_matching.py rates 16384 128 1 all balanced        and costs
    python benchmarks/bench_matching.py independent 600 96 12
    python benchmarks/bench_matching.py time 16384 2304        match and evidence, in products
    python benchmarks/bench_matching.py shared 131072 256 2    likewise, here or on two processes

Partners planted among the codes and decoder rows of two dictionaries of the bundled network, which
are trained for 400 steps and have clusters of nearly equal latents:

    python benchmarks/bench_matching.py trained 3              seeds
"""

import dataclasses
import functools
import itertools
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from mechatlas.activations.collect import StoreConfig
from mechatlas.activations.images import Images
from mechatlas.activations.networks import Network
from mechatlas.activations.positions import Positions
from mechatlas.activations.store import Store
from mechatlas.analysis.matching.chains import compose, track
from mechatlas.analysis.matching.codes import correlate, permute_samples, sample_block
from mechatlas.analysis.matching.folding import fold, unit_rows
from mechatlas.analysis.matching.nulls import NULLS, rotate
from mechatlas.analysis.matching.pairing import feature_splitting, match
from mechatlas.app.commands.collect import CollectConfig
from mechatlas.app.commands.train import TrainConfig
from mechatlas.app.engines import as_engine
from mechatlas.app.match_quality import first_rows
from mechatlas.app.run_folder import execute
from mechatlas.dictionaries.formats import load
from mechatlas.dictionaries.sparsity import TopK

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from bench_assignment import planted as planted_rows
from bench_assignment import product, resident, timed, warm_up
from tests.analysis.matching.planted import LEVELS, chain, jump_relu_pair

SITES = ("mixed3b", "mixed4a")
COSTS = ("decoder", "encoder", "all", "balanced", "codes")
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


def planted_codes(n, alone, seed):
    """Codes of latents that fire on 1 % of 4,000 rows; partners fire together half of the time."""
    random = np.random.default_rng(seed)
    fires = random.random((3, n, 4000), np.float32) < 0.01
    k = round((1 - alone) * n)
    fires[1, :k] = (fires[0, :k] & (random.random((k, 4000)) < 0.5)) | (fires[2, :k] & fires[1, :k])
    order = random.permutation(n)
    partner = np.full(n, -1)
    partner[:k] = np.argsort(order)[:k]
    values = np.zeros(fires[:2].shape, np.float32)
    values[fires[:2]] = random.gamma(2, 1, int(fires[:2].sum()))
    a, b = (values - values.mean(axis=2, keepdims=True)).astype(np.float32)
    return a, b[order], partner


def planted_by_cost(n, d, n_seeds, alone, costs=COSTS):
    """Share of partners found, of matches that are wrong and of latents matched, by setting."""
    for cost, tied, spread in itertools.product(costs, (True, False), (0.0, 0.5)):
        if cost == "codes" and (tied or spread):
            continue
        scores = []
        for seed in range(n_seeds):
            nulls = (permute_samples,) if cost == "codes" else NULLS
            a, b, partner = (
                planted_codes(n, alone, seed)
                if cost == "codes"
                else jump_relu_pair(n, d, tied=tied, spread=spread, alone=alone, seed=seed)
            )
            options: dict[str, Any] = {"cost": cost, "seed": seed, "nulls": nulls}
            columns = match(a, b, **options).matched_columns()
            matched = columns >= 0
            right = (matched & (columns == partner)).sum()
            wrong = (matched.sum() - right) / max(matched.sum(), 1)
            scores.append((right / max((partner >= 0).sum(), 1), wrong, matched.mean()))
        name = cost if cost == "codes" else f"{cost}, {'tied' if tied else 'untied'}, {spread}"
        yield name, np.asarray(scores)


def rates(n, d, n_seeds, *costs):
    """Print the share of partners found and of matches that are wrong, with its standard error."""
    for name, scores in planted_by_cost(n, d, n_seeds, 0.31, costs or COSTS):
        found, wrong, matched = scores.mean(axis=0)
        # matches of one pair of dictionaries count as independent where there is one seed only
        alone = np.sqrt(wrong * (1 - wrong) / max(matched * n, 1))
        error = scores[:, 1].std(ddof=1) / np.sqrt(n_seeds) if n_seeds > 2 else alone
        print(f"{name}: found {found:.3f}, wrong {wrong:.3f} +- {error:.3f}", flush=True)


def independent(n, d, n_seeds):
    """Print the share of latents matched between dictionaries without partners."""
    for name, scores in planted_by_cost(n, d, n_seeds, 1.0):
        print(f"{name}: {scores[:, 2].mean():.4f} of independent latents matched", flush=True)


def briefly_trained(folder):
    """Dictionaries of two modules of the bundled network, and the store of their activations."""
    out = folder / "store"
    execute(
        CollectConfig(
            network=Network(name="inception_mini"),
            sites=SITES,
            samples=Images(source="scikit-image", side=47, crops=32),
            storage=StoreConfig(positions=Positions(per_sample=50), paired=True),
            out=out,
        )
    )
    train = TrainConfig(store=out, n_latents=1024, sparsity=TopK(k=16), steps=400, batch_size=512)
    for site in SITES:
        execute(dataclasses.replace(train, site=site, out=folder / site))
    return [load(folder / site) for site in SITES], Store(out)


def trained(n_seeds):
    """Print the share of partners found that are planted in briefly trained dictionaries."""
    with tempfile.TemporaryDirectory() as folder:
        dictionaries, store = briefly_trained(Path(folder))
        rows = [first_rows(store.rows(site), 32_000) for site in SITES]
    samples = rows[0][1]
    null = functools.partial(permute_samples, block=sample_block(samples))
    codes = functools.partial(correlate, samples=samples)
    x, a, b = rows[0][0], codes(dictionaries[0], rows[0][0]), codes(dictionaries[1], rows[1][0])
    units = unit_rows(fold(dictionaries[0]).decoder)

    def by_codes(seed, share, noise):
        random, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        noisy = x + noise * x.std(dim=0) * torch.randn(x.shape, generator=generator)
        second = null(b, random)(np.arange(len(b)))
        latents = random.permutation(len(a))[: int(share * len(a))]
        places = random.permutation(len(b))[: len(latents)]
        second[places] = codes(dictionaries[0], noisy)[latents]
        partner = np.full(len(a), -1)
        partner[latents] = places
        return a, second, partner

    def by_rows(seed, share, cosine):
        random = np.random.default_rng(seed)
        noise, chance = (rotate(units, random)(np.arange(len(units))) for _ in range(2))
        similar = cosine * units + (1 - cosine**2) ** 0.5 * noise
        partners, order = random.random(len(units)) < share, random.permutation(len(units))
        second = np.where(partners[:, None], similar, chance)[order]
        return units, second, np.where(partners, np.argsort(order), -1)

    for seed in range(n_seeds):
        found = match(a, b, cost="codes", nulls=(null,), seed=seed)
        print(
            f"the dictionaries themselves, seed {seed}: {found.matched.sum()} matched", flush=True
        )
    settings: list[tuple[Callable[..., Any], tuple[Any, ...], str, float, float]] = [
        *((by_codes, (null,), "codes, noise", *s) for s in ((0.1, 0.7), (0.6, 0.7), (0.6, 1.5))),
        *((by_rows, NULLS, "decoder rows, cosine", *s) for s in ((0.2, 0.5), (0.6, 0.5))),
    ]
    for make, nulls, name, share, level in settings:
        scores = []
        for seed in range(n_seeds):
            first, second, partner = make(seed, share, level)
            cost: Any = "codes" if make is by_codes else "decoder"
            columns = match(first, second, cost=cost, nulls=nulls, seed=seed).matched_columns()
            n_right = ((columns >= 0) & (columns == partner)).sum()
            n_matched = (columns >= 0).sum()
            scores.append((n_right / (partner >= 0).sum(), 1 - n_right / max(n_matched, 1)))
        found, wrong = np.mean(scores, axis=0)
        print(f"{name} {level}, {share:.0%} partners: found {found:.3f}, wrong {wrong:.3f}",
              flush=True)  # fmt: skip


def time(n, d):
    """Print CPU seconds and memory of a match, its evidence and feature splitting."""
    torch.set_num_threads(1)
    warm_up()
    feature_splitting(match(*planted_rows(300, 16)))  # compiled code is loaded
    a, b = planted_rows(n, d, noise=0.8)
    _, first, _ = timed(lambda: product(a, b))
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten (Linux)
    result, cpu, _ = timed(lambda: match(a, b))
    _, splitting, _ = timed(lambda: feature_splitting(result))
    peak = resident("VmHWM") / 2**20
    _, second, _ = timed(lambda: product(a, b))
    one = (first + second) / 2
    print(f"product {one:.2f} s, match {cpu:.2f} s, splitting {splitting:.2f} s")
    print(f"{(cpu + splitting) / one:.1f} products, {peak:.2f} GiB, {result.matched.sum()} matched")


def shared(n, d, workers):
    """Print wall and CPU seconds of a match and its evidence on some processes."""
    torch.set_num_threads(1)
    a, b = planted_rows(n, d, noise=0.8)
    _, one, _ = timed(lambda: product(a, b))
    print(f"product {one:.2f} s", flush=True)
    engine = as_engine(f"processes:{workers}") if workers > 1 else None
    wall, cpu = perf_counter(), sum(os.times()[:4])
    result = match(a, b, engine=engine)
    wall, cpu = perf_counter() - wall, sum(os.times()[:4]) - cpu
    print(f"{wall:.0f} s wall, {cpu:.0f} CPU s, {cpu / one:.1f} products; gap {result.gap:.2g}")
    print(f"peak of {getrusage(RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB in the main process")
    pairs = result.columns.tobytes() + result.matched.tobytes()
    print(f"{result.matched.sum()} matched; pairs {xxhash.xxh3_64_hexdigest(pairs)}")


COMMANDS = {
    "shared": shared,
    "rates": rates,
    "independent": independent,
    "time": time,
    "trained": trained,
}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*(int(word) if word.isdigit() else word for word in sys.argv[2:]))
