"""Shares, p-values and what they are worth: power and false discoveries on planted sites.

    pytest benchmarks/bench_branches.py -o python_files='bench_*.py' --benchmark-only -m ''
    python benchmarks/bench_branches.py    effect sizes, power and false discoveries

Floor of a test: a p-value takes some 10 sums over components and groups, so 8,192 features in 4
branches with 64 components in up to 18 groups are about 8,192 * 4 * 64 * 18 * 10 = 380 million
exponentials.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

from mechatlas.analysis.branches.specialization import (
    ChannelStatistics,
    branches,
    channel_statistics,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.analysis.branches.planted import (
    BRANCHES,
    World,
    clusters,
    factors,
    few_entries,
    mixed,
    null_atoms,
    placed,
    world,
)

WORLDS = {
    "widths alone": (world(), "gaussian"),
    "heavy tails": (world(), "heavy"),
    "unequal variances": (world(scales=True), "gaussian"),
    "uneven variances": (world(uneven=0.5, scales=True), "gaussian"),
    "correlated in branches": (world(scales=True, within=0.05), "gaussian"),
    "factors in branches": (factors(), "gaussian"),
    "factors over all": (factors(per_branch=False), "gaussian"),
    "few entries, mixed": (clusters(8, 0.5), "few"),
    "rows of features": (world(uneven=0.5), "gaussian rows"),
    "rows of features, heavy tails": (world(uneven=0.5), "heavy rows"),
}
"""Planted sites. In "few entries", features of no branch mix five entries with seven channels each;
in the last two, statistics are measured on rows that are rectified sums of a few features."""
EXCESSES = (0.7, 0.8, 0.9, 0.95, 0.99)
"""Effect sizes: 0 is the share that the variance predicts, 1 is all in the branch."""
N, EACH = 2000, 100
ROWS, ACTIVE = 8192, 0.01
"""Rows that are made of features, and the share of features active on each."""


def known(at: World, atoms: np.ndarray, draw: str, seed: int) -> ChannelStatistics:
    """Statistics of the channels: the truth, or measured on rows that the features make."""
    if not draw.endswith("rows"):
        return at.statistics
    random = np.random.default_rng([seed, 4])
    codes = random.exponential(size=(ROWS, N)) * (random.random((ROWS, N)) < ACTIVE)
    unit = atoms / np.linalg.norm(atoms, axis=1, keepdims=True)
    return channel_statistics(np.maximum(codes @ unit, 0))


def measure(name: str, seed: int, excess: float | None = 0.9) -> tuple[float, float]:
    """Power and false discovery proportion; 0 and the discoveries where nothing is planted."""
    at, draw = WORLDS[name]
    few = draw == "few"
    entries = few_entries(N, 5, seed=seed)
    atoms = mixed(entries, at) if few else null_atoms(at, N, draw.removesuffix(" rows"), seed=seed)
    if excess is None:
        found = branches(atoms, BRANCHES, known(at, atoms, draw, seed)).specialized()
        return 0.0, float(found.sum())
    truth = np.zeros((N, len(BRANCHES)), dtype=bool)
    for k, branch in enumerate(BRANCHES):
        mine = slice(EACH * k, EACH * (k + 1))
        if few:
            atoms[mine] = null_atoms(at, EACH, seed=seed)
        atoms[mine] = placed(atoms[mine], at, branch, excess)
        truth[mine, k] = True
    found = branches(atoms, BRANCHES, known(at, atoms, draw, seed)).specialized()
    false = (found & ~truth).sum() / max(found.sum(), 1)
    return float(found[truth].mean()), float(false)


@pytest.mark.parametrize("name", WORLDS)
def test_branches(benchmark, name):
    power, false = benchmark.pedantic(measure, args=(name, 0), rounds=1)
    benchmark.extra_info.update(power=power, false_discoveries=false)


@pytest.mark.parametrize("n", [1024, 8192])
def test_time_of_a_test(benchmark, n):
    random = np.random.default_rng(0)
    atoms = random.standard_normal((n, 512)).astype(np.float32)
    rows = np.maximum(random.standard_normal((4096, 512)), 0)
    ends = [0, 128, 320, 448, 512]
    named = {f"b{k}": (ends[k], ends[k + 1]) for k in range(4)}
    found = benchmark.pedantic(branches, args=(atoms, named, rows), rounds=1)
    benchmark.extra_info.update(features=n, discoveries=int(found.specialized().sum()))


def main(draws: int = 3) -> None:
    """Print power and false discoveries for every world and effect size."""
    print(f"{EACH} of {N} features placed in each branch, {draws} draws")
    for name in WORLDS:
        nothing = sum(measure(name, seed, None)[1] for seed in range(draws))
        print(f"{name}: {nothing:.0f} discoveries in {draws} draws of features of no branch")
        for excess in EXCESSES:
            found = np.array([measure(name, seed, excess) for seed in range(draws)])
            power, false = found.mean(axis=0)
            print(
                f"  excess {excess:.2f}  power {power:.3f}  false discovery rate {false:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
