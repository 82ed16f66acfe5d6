"""Shuffled reading of a store against a plain sequential read of the same bytes.

Run: `make bench`, or `pytest benchmarks/bench_store.py -o python_files='bench_*.py'
--benchmark-only`. Wall seconds, interleaved, medians; from the disk, and from the page cache. The
first pass over a store hashes every byte; later ones map and gather only.
"""

import os
import statistics
import time

import numpy as np
import pytest
import torch

from mechatlas.activations.store import Store, write_shard
from mechatlas.files import write_json

N_SHARDS, ROWS, WIDTH = 256, 4096, 512  # 2 GiB of float32


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    root = tmp_path_factory.mktemp("store")
    random = torch.Generator().manual_seed(0)
    shards = []
    for i in range(N_SHARDS):
        rows = torch.randn(ROWS, WIDTH, generator=random)
        where = torch.zeros(ROWS, 3, dtype=torch.int32)
        shards.append(list(write_shard(root, "a", "train", i, rows, where)))
    sites = {"a": {"width": WIDTH, "grid": [1, 1], "branches": {}}}
    manifest = {"schema": 1, "kind": "store", "complete": True, "shards": shards, "sites": sites}
    write_json(root / "manifest.json", manifest)
    return Store(root)


def plain(store: Store) -> float:
    buffer = np.empty(max(s.bytes for s in store.shards), np.uint8)
    started = time.perf_counter()
    for shard in store.shards:
        with open(store.root / shard.file, "rb", buffering=0) as file:
            file.readinto(buffer.data[: shard.bytes])  # pyright: ignore[reportArgumentType]
    return time.perf_counter() - started


def shuffled(store: Store, seed: int) -> float:
    rows = store.rows("a")
    batches = rows.batches(4096, seed=seed)
    started = time.perf_counter()
    for _ in range(rows.n_rows // 4096):
        next(batches)
    return time.perf_counter() - started


def forget(store: Store) -> None:
    """Make the next reader go to the disk, and hash again."""
    store.verified.clear()
    for shard in store.shards:
        with open(store.root / shard.file, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_shuffled_reading_against_a_sequential_read(benchmark, store):
    os.sync()  # pages that are not written yet cannot be forgotten
    cold = []
    for seed in range(3):
        forget(store)
        before = plain(store)
        forget(store)
        cold.append(before / shuffled(store, seed))
    rounds = []
    for seed in range(7):
        store.verified.clear()
        rounds.append((plain(store), shuffled(store, seed), shuffled(store, seed)))
    size = sum(s.bytes for s in store.shards) / 2**30
    benchmark.extra_info.update(
        gib=size,
        from_disk_over_plain=statistics.median(cold),
        plain_gib_per_s=size / statistics.median(a for a, _, _ in rounds),
        first_pass_over_plain=statistics.median(a / b for a, b, _ in rounds),
        later_pass_over_plain=statistics.median(a / c for a, _, c in rounds),
    )
    print(f"\n{benchmark.extra_info}")
    benchmark.pedantic(shuffled, args=(store, 99), rounds=1)
