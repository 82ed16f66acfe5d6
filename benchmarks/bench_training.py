"""A training step against the encoder product that it cannot avoid, and a dense trainer.

Run: `make bench`, or `pytest benchmarks/bench_training.py -s -o python_files='bench_*.py'
--benchmark-only`. Process CPU seconds on one thread, medians, the three interleaved in one
run; set OMP_NUM_THREADS=1 and pin the process to one core. The added memory is measured in a
process of its own, from before the dictionary is built to the peak after some steps. Both
trainers start from the same weights and see the same batches; their FVU is on held-out rows.
Then wall seconds of one thread and of two are compared.

The last test is a decoder as wide as a group crosscoder's. What it must move at least is the
atoms, their moments and gradients, each read and written, and the batch: `floor_gb`; what it
reads from caches besides, each pair's atom twice and its row once, is `cache_gb`.
"""

import copy
import json
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from mechatlas.dictionaries.autoencoder import Autoencoder, Crosscoder
from mechatlas.dictionaries.engine.products import product_with
from mechatlas.dictionaries.engine.sparse_steps import SparseStep
from mechatlas.dictionaries.engine.steps import AutogradStep
from mechatlas.dictionaries.metrics import evaluate
from mechatlas.dictionaries.sparsity import BatchTopK, TopK

BATCH, K, STEPS = 4096, 32, 7
SHAPES = {
    "512x8192": (512, 8192, TopK, False),
    "384x6144": (384, 6144, TopK, False),
    "768x12288": (768, 12288, TopK, False),
    "512x8192 tied": (512, 8192, TopK, True),
    "512x8192 BatchTopK": (512, 8192, BatchTopK, False),
}


def rows(d_in: int, n: int, seed: int = 0) -> torch.Tensor:
    """Sums of 24 of 8 d_in known atoms, the frequent ones more often, and some noise."""
    random = np.random.default_rng(0)
    atoms = random.standard_normal((8 * d_in, d_in), dtype=np.float32)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    random = np.random.default_rng([seed, 1])
    which = (random.random((n, 24)) ** 2.5 * len(atoms)).astype(int)
    code = random.gamma(2.0, 0.5, which.shape).astype(np.float32)
    x = np.empty((n, d_in), np.float32)
    for i in range(0, n, 512):
        part = slice(i, i + 512)
        x[part] = np.einsum("bk,bkd->bd", code[part], atoms[which[part]])
    x += 0.05 * random.standard_normal(x.shape, dtype=np.float32)
    return torch.from_numpy(x / x.std())


def seconds(action, clock=time.process_time) -> float:
    started = clock()
    action()
    return clock() - started


def build(shape: str) -> Autoencoder:
    d_in, n_latents, rule, tied = SHAPES[shape]
    return Autoencoder(d_in=d_in, n_latents=n_latents, sparsity=rule(k=K), tied=tied)


def product(dictionary: Autoencoder, x: torch.Tensor) -> float:
    """The fastest of three products of one batch: torch's, the step's own and numpy's."""
    rows, out = dictionary.W_enc.detach().T, torch.empty(len(x), dictionary.n_latents)
    numpy_arrays = x.numpy(), rows.numpy().T, out.numpy()
    return min(
        seconds(lambda: torch.mm(x, rows.T, out=out)),
        seconds(lambda: product_with(rows, len(x))(x)),
        seconds(lambda: np.dot(numpy_arrays[0], numpy_arrays[1], out=numpy_arrays[2])),
    )


def added_memory(shape: str) -> int:
    """Bytes that some steps add, in a process of their own."""
    command = [sys.executable, __file__, shape]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(said.stdout)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_against_its_encoder_product(benchmark, shape):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ours = build(shape)
    dense = copy.deepcopy(ours)
    sparse_step, dense_step = SparseStep(ours), AutogradStep(dense)
    x = rows(ours.d_in, BATCH * 4)
    batches = [x[i % 4 * BATCH :][:BATCH] for i in range(STEPS)]
    sparse_step(batches[0], 1e-3)  # compiles, or loads what was compiled
    dense_step(batches[0], 1e-3)
    table = [
        (
            product(ours, batch),
            seconds(lambda batch=batch: sparse_step(batch, 1e-3)),
            seconds(lambda batch=batch: dense_step(batch, 1e-3)),
        )
        for batch in batches
    ]
    gemm, step, plain = (statistics.median(column) for column in zip(*table, strict=True))
    held_out = rows(ours.d_in, 2048, seed=1)
    benchmark.extra_info.update(
        shape=shape,
        product_s=round(gemm, 4),
        step_s=round(step, 4),
        ratio=round(statistics.median(b / a for a, b, _ in table), 3),
        dense_s=round(plain, 4),
        dense_ratio=round(statistics.median(c / a for a, _, c in table), 2),
        added_mb=round(added_memory(shape) / 2**20, 1),
        fvu=round(evaluate(ours, held_out).fvu, 6),
        dense_fvu=round(evaluate(dense, held_out).fvu, 6),
    )
    print(f"\n{dict(benchmark.extra_info)}")
    benchmark.pedantic(sparse_step, args=(batches[0], 1e-3), rounds=1)
    torch.set_num_threads(threads)


def test_two_threads_against_one(benchmark):
    if torch.get_num_threads() < 2:
        pytest.skip("needs two cores")
    dictionary = build("512x8192")
    step = SparseStep(dictionary)
    x = rows(dictionary.d_in, BATCH)
    step(x, 1e-3)
    pairs = []
    for _ in range(STEPS):
        pair = []
        for n in (1, 2):
            torch.set_num_threads(n)
            pair.append(seconds(lambda: step(x, 1e-3), time.perf_counter))
        pairs.append(pair)
    speed_up = statistics.median(one / two for one, two in pairs)
    one, two = (round(statistics.median(column), 4) for column in zip(*pairs, strict=True))
    benchmark.extra_info.update(one_s=one, two_s=two, speed_up=round(speed_up, 3))
    print(f"\n{dict(benchmark.extra_info)}")
    benchmark.pedantic(step, args=(x, 1e-3), rounds=1)


def test_a_wide_decoder_against_the_dense_trainer(benchmark):
    threads, sites, width, n_latents = torch.get_num_threads(), 32, 480, 7680
    torch.set_num_threads(1)
    widths = {f"pose{i}": width for i in range(sites)}
    ours = Crosscoder(widths=widths, n_latents=n_latents, sparsity=TopK(k=K), reads="pose0")
    x = torch.cat([rows(width, BATCH, seed=i) for i in range(sites)], dim=1)
    sparse_step = SparseStep(ours)
    sparse_step(x, 1e-3)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dense = copy.deepcopy(ours)
    dense_step = AutogradStep(dense)
    table, plain = [], []
    for _ in range(3):
        table += [seconds(lambda: sparse_step(x, 1e-3)) for _ in range(3)]
        plain.append(seconds(lambda: dense_step(x, 1e-3)))
    step, theirs = statistics.median(table), statistics.median(plain)
    atoms, pairs = n_latents * sites * width * 4, BATCH * K * sites * width * 4
    benchmark.extra_info.update(
        step_s=round(step, 3),
        dense_s=round(theirs, 2),
        speed_up=round(theirs / step, 2),
        floor_gb=round((9 * atoms + x.numel() * 4) / 1e9, 2),
        cache_gb=round(3 * pairs / 1e9, 1),
        peak_gb=round(peak / 2**20, 2),
    )
    print(f"\n{dict(benchmark.extra_info)}")
    benchmark.pedantic(sparse_step, args=(x, 1e-3), rounds=1)
    torch.set_num_threads(threads)


def measure_memory(shape: str) -> int:
    import mechatlas.dictionaries.engine.kernels  # noqa: F401 - code is not counted

    torch.set_num_threads(1)
    x = rows(SHAPES[shape][0], BATCH)
    build_small = Autoencoder(d_in=64, n_latents=2048, sparsity=TopK(k=K))
    SparseStep(build_small)(torch.randn(512, 64), 1e-3)
    with open("/proc/self/clear_refs", "w") as file:  # the peak begins anew
        file.write("5")
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * resource.getpagesize()
    dictionary = build(shape)
    step = SparseStep(dictionary)
    for _ in range(3):
        step(x, 1e-3)
    evaluate(dictionary, x)
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    return peak * 1024 - before


if __name__ == "__main__":
    print(measure_memory(sys.argv[1]))
