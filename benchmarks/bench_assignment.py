"""Time to a certified optimum beside scipy, lapx and the one product that cannot be avoided.

Run: `make bench`, or `pytest benchmarks/bench_assignment.py -s -o python_files='bench_*.py'
--benchmark-only -m ''`. The shapes of real dictionaries, each in a process of its own so that the
peak of memory is that of one solver:

    python benchmarks/bench_assignment.py 16384 2304 2 ours lapx
    python benchmarks/bench_assignment.py 65536 2304 2 ours

(rows, width, threads, solvers; with `kind=1/k`, another kind of problem; with `drop=17`, as many
rows fewer than columns, which dead latents bring about). Process CPU seconds and
wall seconds; the product is measured in the same process, before and after.

Planted: 60 % of the rows have a partner with noise of 0.7 times their length, 40 % none. Lengths
differ by half an e-fold, as folded decoder rows do (partners' by a fifth). That is what makes the
problem hard: the shortest columns are the cheapest for every row. The spectrum decays.
"""

import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from mechatlas.maths.assignment import assign
from mechatlas.maths.pricing import Factors

SPECTRA = {
    "planted": lambda k: k**-0.25,
    "flat": lambda k: k**0.0,
    "root": lambda k: k**-0.5,
    "1/k": lambda k: 1 / k,
    "3 dimensions": lambda k: (k <= 3) + 1e-3,
    "one length": lambda k: k**-0.25,
    "no partner": lambda k: k**-0.5,
}
KINDS = [*SPECTRA, "clusters", "near duplicates"]


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def planted(n, d, *, kind="planted", share=0.6, noise=0.7, seed=0):
    random = np.random.default_rng(seed)
    share = 0.0 if kind == "no partner" else share
    spread = 0.0 if kind == "one length" else 0.5
    centers = unit(random.standard_normal((max(n // 32, 1), d), dtype=np.float32))

    def rows():
        x = random.standard_normal((n, d), dtype=np.float32)
        if kind == "clusters":
            return unit(2 * centers[random.integers(0, len(centers), n)] + unit(x))
        if kind == "near duplicates":
            return unit(centers[np.arange(n) % len(centers)] + 1e-3 * unit(x))
        return unit(x * SPECTRA[kind](np.arange(1.0, d + 1)).astype(np.float32))

    a, b = rows(), rows()
    k = int(share * n)
    b[:k] = unit(a[:k] + noise * b[:k])
    lengths = np.exp(spread * random.standard_normal((2, n, 1), dtype=np.float32))
    drift = np.exp(0.4 * spread * random.standard_normal((k, 1), dtype=np.float32))
    lengths[1, :k] = lengths[0, :k] * drift
    return a * lengths[0], (b * lengths[1])[random.permutation(n)]


def timed(action):
    cpu, wall = time.process_time(), time.perf_counter()
    result = action()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def product(a, b):
    """The one full product, blockwise, the result not kept."""
    x, y = torch.from_numpy(a), torch.from_numpy(b).T
    out = torch.empty(1024, len(b))
    for start in range(0, len(a), 1024):
        torch.mm(x[start : start + 1024], y, out=out[: len(x[start : start + 1024])])


def squared_distances(a, b):
    """Matrix of squared distances, which a dense solver needs first."""
    squares = [torch.from_numpy(x).square().sum(1).double() for x in (a, b)]
    gram = (torch.from_numpy(a) @ torch.from_numpy(b).T).double()
    return gram.mul_(-2).add_(squares[0][:, None]).add_(squares[1]).numpy()


def with_scipy(a, b):
    cost = squared_distances(a, b)
    return cost[linear_sum_assignment(cost)].sum()


def with_lapx(a, b):
    lap = pytest.importorskip("lap", reason="needs lapx")
    return lap.lapjv(squared_distances(a, b), extend_cost=len(a) != len(b))[0]


def with_ours(a, b):
    return assign(Factors.squared_distances(a, b))


def warm_up():
    assign(Factors.squared_distances(*planted(200, 8)))  # compiled code is loaded


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2048, 512), (4096, 512)], ids=str)
def test_assign(benchmark, shape, kind):
    a, b = planted(*shape, kind=kind)
    warm_up()
    _, one, _ = timed(lambda: product(a, b))
    rivals = {"lapx": with_lapx, "scipy": with_scipy}
    seconds = {name: timed(lambda solve=solve: solve(a, b)) for name, solve in rivals.items()}
    found, ours, _ = timed(lambda: with_ours(a, b))
    benchmark.pedantic(with_ours, (a, b), rounds=3)
    for name, (cost, *_) in seconds.items():
        assert found.cost == pytest.approx(cost, rel=1e-5), name  # theirs is of float32 products
    told = {name: round(took[1] / ours, 1) for name, took in seconds.items()}
    certificate = found.certify(Factors.squared_distances(a, b))
    benchmark.extra_info.update(
        gap=certificate.gap, rounds=found.rounds, products=ours / one, times_faster_than=told
    )
    print(f"\n{shape} {kind}: {ours:.2f} s = {ours / one:.1f} products; times faster than {told}")


def resident(which):
    """Memory of this process in KiB: now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which))


def main(n, d, threads, *words):
    options = dict(word.split("=") for word in words if "=" in word)
    solvers = [word for word in words if "=" not in word]
    torch.set_num_threads(int(threads))
    warm_up()
    a, b = planted(int(n), int(d), kind=options.get("kind", "planted"))
    a = a[np.sort(np.random.default_rng(1).permutation(len(a))[int(options.get("drop", 0)) :])]
    _, one, wall = timed(lambda: product(a, b))
    print(f"product: {one:.1f} s CPU, {wall:.1f} s wall", flush=True)
    for name in solvers:
        solve = {"ours": with_ours, "lapx": with_lapx, "scipy": with_scipy}[name]
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten (Linux)
        before = resident("VmRSS")
        found, cpu, wall = timed(lambda solve=solve: solve(a, b))
        peak = (resident("VmHWM") - before) / 2**20
        cost = found if isinstance(found, float) else found.cost
        print(f"{name}: cost {cost:.6f}, {cpu:.1f} s CPU, {wall:.1f} s wall, +{peak:.2f} GiB")
        if not isinstance(found, float):
            more = sum(found.rows_priced[1:]) / int(n)
            print(
                f"  gap {found.gap:.2g}, {found.rounds} rounds, {more:.2f} looks more at each row"
            )
            proof, cpu, _ = timed(lambda f=found: f.certify(Factors.squared_distances(a, b)))
            print(f"  certified in {cpu:.1f} s CPU: gap {proof.gap:.2g}", flush=True)
    _, one, wall = timed(lambda: product(a, b))
    print(f"product again: {one:.1f} s CPU, {wall:.1f} s wall")


if __name__ == "__main__":
    main(*sys.argv[1:])
