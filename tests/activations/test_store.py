"""Reading a store: every row once an epoch, in an order in which neighbours are strangers."""

import ctypes
import itertools
import os
import time
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch

from mechatlas.activations.store import Store, _spare, write_shard
from mechatlas.base import Rows, StoreError
from mechatlas.dictionaries.rows import ArrayRows
from mechatlas.files import write_manifest
from tests.conformance import ROWS_CHECKS

N_SHARDS, PER_SHARD, D = 24, 200, 3
OTHERS = {
    "n_samples": 480, "network": "", "recipe": {}, "skipped": [],
    "settings": {"dtype": "float32", "paired": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """24 shards; the rows are in order, so that only reading can shuffle them."""
    root = tmp_path_factory.mktemp("store")
    shards = []
    for i in range(N_SHARDS):
        number = torch.arange(i * PER_SHARD, (i + 1) * PER_SHARD)
        rows = number[:, None].float().expand(-1, D)
        where = torch.stack([number // 10, number * 0, number * 0], dim=1).int()
        shards.append(list(write_shard(root, "a", "train", i, rows, where)))
    manifest = {
        "schema": 1, "kind": "store", "complete": True, "shards": shards, "skipped": [],
        "sites": {"a": {"width": D, "grid": [1, 1], "branches": {}}}, **OTHERS,
    }  # fmt: skip
    write_manifest(root / "manifest.json", manifest)
    return Store(root)


def take(store: Store, n: int, batch: int, pool: int, **options) -> torch.Tensor:
    rows = store.rows("a", pool_bytes=pool)
    batches = itertools.islice(rows.batches(batch, **options), n)
    return torch.cat([b.x[:, 0] for b in batches]).long()


SMALL = 8 * PER_SHARD * 4 * (D + 3)  # eight shards in a pool, three pools an epoch
LARGE = 1 << 30


@pytest.mark.parametrize("pool", [SMALL, LARGE])
def test_an_epoch_has_every_row_once(store, pool):
    total = N_SHARDS * PER_SHARD
    order = take(store, 2 * total // 160, 160, pool)
    for epoch in (order[:total], order[total:]):
        assert torch.equal(epoch.sort().values, torch.arange(total))
    assert not torch.equal(order[:total], order[total:])


@pytest.mark.parametrize("pool", [SMALL, LARGE])
def test_row_numbers_go_with_the_rows(store, pool):
    # Over many pools, and pools smaller than a batch: memory that is used again too early
    # would show rows of another pool under these numbers.
    for size in (77, 900, 2500):
        for batch in itertools.islice(store.rows("a", pool_bytes=pool).batches(size, seed=3), 40):
            assert torch.equal(batch.row, batch.x[:, 0].long())
            assert batch.x.shape == (size, D)


HELD = {
    "the batch": lambda batch: batch,
    "its rows": lambda batch: batch.x,
    "one number": lambda batch: batch.x[-1, -1],
    "a transposed view": lambda batch: batch.x.T[1:],
    "an array": lambda batch: batch.x.numpy()[3:],
    "the bare memory": lambda batch: batch.x.untyped_storage(),
}
"""Ways to hold a batch, or a part of it."""


@pytest.mark.parametrize("way", HELD)
def test_a_batch_that_somebody_holds_keeps_its_numbers(store, way):
    # Whatever the interpreter's reference counts: Python 3.14 counts borrowed references less.
    batches = itertools.islice(store.rows("a", pool_bytes=SMALL).batches(50), 30)
    held = [(HELD[way](b), b.x.data_ptr(), b.x.numpy().tobytes()) for b in batches]
    for _, pointer, numbers in held:
        assert ctypes.string_at(pointer, len(numbers)) == numbers
    assert len({pointer for _, pointer, _ in held}) == 30


def test_memory_is_lent_again_once_no_tensor_is_on_it():
    spare = []
    tensor = torch.from_numpy(_spare(spare, 12)).view(3, 4)
    part = tensor[1:]
    del tensor
    assert not spare
    del part
    assert len(spare) == 1
    assert _spare(spare, 12).base is not None
    assert len(spare) == 1, "lent, and back"


@pytest.mark.parametrize("pool", [SMALL, LARGE])
@pytest.mark.parametrize("start", [1, 7, 30, 95])
def test_a_stream_can_be_entered_anywhere(store, pool, start):
    whole = take(store, start + 3, 130, pool, seed=2)
    assert torch.equal(take(store, 3, 130, pool, seed=2, start=start), whole[start * 130 :])


def test_the_order_depends_on_the_seed_alone(store):
    assert torch.equal(take(store, 5, 100, SMALL, seed=1), take(store, 5, 100, SMALL, seed=1))
    assert not torch.equal(take(store, 5, 100, SMALL, seed=1), take(store, 5, 100, SMALL, seed=2))


def test_neighbours_are_as_unrelated_as_rows_drawn_at_random(store):
    # The joint distribution of the places (in thirtieths of the store) of two rows that follow
    # each other, over 12 epochs, against independence; and how often they share a sample. The
    # rows of this store are in order, so all of it is the reader's doing. What a pool smaller
    # than the store gives is tested on a collected store, in test_collect.py.
    total = N_SHARDS * PER_SHARD
    bins = 30
    table, same, pairs = np.zeros((bins, bins)), 0, 0
    for seed in range(12):
        order = take(store, total // 160, 160, LARGE, seed=seed).numpy()
        np.add.at(table, (order[:-1] * bins // total, order[1:] * bins // total), 1)
        same += int((order[:-1] // 10 == order[1:] // 10).sum())
        pairs += len(order) - 1
    expected, freedom = pairs / bins**2, (bins - 1) ** 2
    chi2 = ((table - expected) ** 2 / expected).sum()
    assert abs(chi2 - freedom) < 4 * np.sqrt(2 * freedom)
    assert abs(same - pairs * 9 / (total - 1)) < 4 * np.sqrt(pairs * 9 / total)


def stored(tmp_path: Path) -> Rows:
    random = torch.Generator().manual_seed(0)
    shards = []
    for i, split in enumerate(("train", "train", "train", "held")):
        rows = torch.randn(30 + i, 4, generator=random)
        where = torch.zeros(len(rows), 3, dtype=torch.int32)
        shards.append(list(write_shard(tmp_path, "a", split, i, rows, where)))
    sites = {"a": {"width": 4, "grid": [1, 1], "branches": {}}}
    manifest = {"schema": 1, "kind": "store", "complete": True, "shards": shards, "sites": sites}
    write_manifest(tmp_path / "manifest.json", {**manifest, **OTHERS})
    return Store(tmp_path).rows("a", pool_bytes=1000)


SOURCES = {
    "a store": stored,
    "an array": lambda _: ArrayRows(torch.randn(100, 4)),
    "a memory map": lambda path: ArrayRows(
        np.lib.format.open_memmap(path / "x.npy", mode="w+", dtype=np.float32, shape=(100, 4))
    ),
}


@pytest.mark.parametrize("check", ROWS_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("source", SOURCES)
def test_conformance(source, check, tmp_path):
    check(SOURCES[source](tmp_path))


def test_a_row_is_described_by_file_and_line(store):
    assert store.rows("a").describe(2 * PER_SHARD + 5).endswith("train-00002.safetensors row 5")


@pytest.mark.parametrize("harm", ["cut short", "overwritten", "deleted"])
def test_a_file_that_changes_while_it_is_mapped_is_named(tmp_path, harm):
    stored(tmp_path)
    batches = Store(tmp_path).rows("a").batches(8)
    next(batches)
    time.sleep(0.3)  # for the batches that are read ahead
    for path in (tmp_path / "a").glob("train-*"):
        if harm == "cut short":
            os.truncate(path, 100)
        elif harm == "overwritten":
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        else:
            path.unlink()
    with pytest.raises(StoreError, match=r"train-0000.* was changed, replaced or deleted while"):
        deque(itertools.islice(batches, 20))


def test_a_shard_damaged_between_two_readings_is_refused(tmp_path):
    rows = stored(tmp_path)
    next(rows.batches(8))
    path = tmp_path / "a" / "train-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreError, match=r"train-00001.* is damaged: its checksum differs"):
        deque(itertools.islice(rows.batches(8), 30))


def test_a_site_that_is_not_there_is_refused(store):
    with pytest.raises(StoreError, match="has the sites a; there is no 'b'"):
        store.rows("b")
