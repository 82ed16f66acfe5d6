"""Activation stores: rows on disk in shuffled shards, each with a checksum.

    Store          folder made by `collect`: `manifest.json` and one folder a site
    StoreRows      rows of one site of a store, to train on
    PairedRows     rows of several sites side by side
    write_shard    rows and their samples and places -> one safetensors file

A shard holds `rows (n, d_in)` and `where (n, 3)`: the sample, y and x of each row (for
texts the window, token and 0). Shards are written already shuffled among many samples;
reading shuffles again within a pool of shards taken at random from the whole store, so
two neighbors of a batch are related about as rarely as two rows drawn at random.
"""

import contextlib
import json
import math
import mmap
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mechatlas import remote
from mechatlas.activations.store_manifest import Shard, SiteShape, Split, read_entries, store_digest
from mechatlas.base import Batch, DiskError, Result, Site, StoreError, WeightsError
from mechatlas.files import (
    MANIFEST,
    about,
    checksum,
    create_folder,
    damaged,
    open_regular,
    read_ahead,
    write,
)
from mechatlas.maths.arrays import Channels, numbers_of
from mechatlas.maths.groups import Group
from mechatlas.tensorfiles import DTYPES, read_safetensors, reading

POOL_BYTES = 64 << 20
"""Default size of a pool of rows that are shuffled together."""
BATCHES_AHEAD = 3
"""Batches gathered before they are asked for."""
POOLS_AHEAD = 2
"""Pools requested from the disk beyond the current one: one is checked, one is on its way."""
Signature = tuple[int, int, int]
"""Inode, size in bytes and time of the last change, by which a changed file is noticed."""


def folder_of(site: Site | str) -> str:
    """Name of the folder of a site."""
    return str(site).replace("/", "~").replace(":", "~")


def shard_file(site: str, split: Split, number: int) -> str:
    """Name of a file of a store, relative to its folder."""
    return f"{folder_of(site)}/{split}-{number:05d}.safetensors"


def write_shard(
    root: Path,
    site: str,
    split: Split,
    number: int,
    rows: Float[Tensor, "n d_in"],
    where: Int[Tensor, "n 3"],
) -> Shard:
    """Write one file of a store and return its entry in the manifest.

    Args:
        root: Folder of the store.
        site: Name of the site.
        split: Whether the rows are for training or held out.
        number: Number of the shard within its site and split.
        rows: Activations.
        where: Sample, y and x of each row.

    Raises:
        DiskError: The disk is full or the folder is not writable.
    """
    data = safetensors.torch.save({"rows": rows.contiguous(), "where": where.contiguous()})
    file = shard_file(site, split, number)
    create_folder((root / file).parent)
    write(root / file, data, make_folder=False, apart=True)
    return Shard(site, split, file, len(rows), len(data), checksum(data))


class Store(Result):
    """Finished activation store.

    Raises:
        StoreError: The folder is not a store, or collecting it was never finished.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from torch import nn
        >>> import mechatlas as ma
        >>> folder = Path(tempfile.mkdtemp())
        >>> np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(200, 4)))
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> samples = ma.open_samples(ma.Arrays(source=folder / "x.npy"), network)
        >>> _ = ma.collect(network, samples, [ma.Site("1")], folder / "store")
        >>> store = ma.Store(folder / "store")
        >>> store
        Activation store of 200 samples: 0.0 MiB in float32, paired
          1: 190 rows of 8 channels, 10 held out
        >>> store.rows("1").held_out(5).x.shape
        torch.Size([5, 8])
    """

    def __init__(self, root: Path | str) -> None:
        self.root: Path = remote.fetched(root)
        entries = read_entries(self.root)
        self.manifest: dict[str, Any] = entries.manifest
        self.shapes: dict[str, SiteShape] = entries.shapes
        self.shards: list[Shard] = entries.shards
        self.verified: dict[str, Signature] = {}

    def summary(self) -> str:
        """Samples, size and sites, with their numbers of rows."""
        settings, group = self.manifest["settings"], self.manifest.get("group")
        size = sum(shard.bytes for shard in self.shards) / 2**20
        poses = f", in all poses of {group['name']}" if group else ""
        lines = [
            f"Activation store of {self.manifest['n_samples']:,} samples{poses}: {size:,.1f} MiB "
            f"in {settings['dtype']}{', paired' if settings['paired'] else ''}"
        ]
        for site in self.sites[:4]:
            train, held = (
                sum(s.rows for s in self.shards if (s.site, s.split) == (site, split))
                for split in ("train", "held")
            )
            width = self.shapes[site].width
            lines.append(f"  {site}: {train:,} rows of {width} channels, {held:,} held out")
        more = len(self.sites) - len(lines) + 1
        return "\n".join([*lines, f"  and {more} more sites"] if more else lines)

    @cached_property
    def group(self) -> Group | None:
        """Group in whose poses the activations were collected, if any.

        Rows then hold the channels of element 0, the untransformed input, then those of
        element 1, and so on.

        Raises:
            GroupError: The manifest's table is not that of a group.
        """
        entry = self.manifest.get("group")
        if entry is None:
            return None
        with about(self.root / MANIFEST):
            return Group(entry["table"], name=entry["name"], element_names=entry["elements"])

    @cached_property
    def digest(self) -> str:
        """Checksum of the manifest, by which runs made from the store know it again."""
        return store_digest(self.root / MANIFEST)

    @property
    def sites(self) -> list[str]:
        """Names of the sites."""
        return list(self.shapes)

    def rows(self, site: str | None = None, *, pool_bytes: int = POOL_BYTES) -> "StoreRows":
        """Rows of one site, or of a named branch of a site.

        Args:
            site: Site or branch; may be left out when the store has one site only. A branch in a
                store with a group has the channels of the untransformed input.
            pool_bytes: Size of the pool of rows that are shuffled together. Rows stay in their
                files, mapped into memory; the next pool is mapped ahead, the one after it fetched.

        Raises:
            StoreError: The store has no such site or branch, or several and none was named.
        """
        have = f"{self.root} has the sites {', '.join(self.sites)}"
        if site is None:
            if len(self.sites) > 1:
                raise StoreError(f"{have}; say which.")
            site = self.sites[0]
        if site in self.shapes:
            return StoreRows(self, site, slice(0, self.shapes[site].width), pool_bytes)
        base, _, branch = site.partition("/")
        named = self.shapes[base].channels if base in self.shapes else {}
        if branch in named:
            return StoreRows(self, base, named[branch], pool_bytes)
        known = ", ".join(named)
        also = f" Branches of {base}: {known}." if known else ""
        raise StoreError(f"{have}; there is no {site!r}.{also}")

    def samples(self, split: Split, n: int) -> list[int]:
        """Numbers of up to `n` samples of a split, ascending.

        Raises:
            StoreError: A shard is damaged or missing; it is named.
        """
        numbers: dict[int, None] = {}
        for shard in (s for s in self.shards if s.site == self.sites[0] and s.split == split):
            where = read_shard(self.root, shard, self.shapes[shard.site].width)[1][:, 0]
            numbers |= dict.fromkeys(where.tolist())
            if len(numbers) >= n:
                break
        return sorted(list(numbers)[:n])

    def paired(self, sites: Sequence[str]) -> "PairedRows":
        """Rows of several sites side by side, for a transcoder or crosscoder.

        Raises:
            StoreError: There is no such site, or the store was not collected with
                `storage.paired = true`.
        """
        rows = [self.rows(site) for site in sites]
        if not self.manifest["settings"]["paired"] or len({r.layout for r in rows}) > 1:
            raise StoreError(
                f"The rows of {', '.join(sites)} in {self.root} do not belong together. Collect "
                "them again with `storage.paired = true`."
            )
        return PairedRows(rows)


class _MappedShard(NamedTuple):
    """Shard whose checksum was right, mapped into memory."""

    path: Path
    signature: Signature | None
    """None in a local copy, whose files are replaced or deleted but never changed."""
    dtype: torch.dtype
    rows: UInt8[np.ndarray, "row byte"]

    def check(self) -> None:
        """Refuse a file that was changed meanwhile: a page cut off would end the process."""
        signature = None
        with contextlib.suppress(OSError):
            signature = _signature(self.path)
        if self.signature not in (None, signature):
            raise StoreError(
                f"{self.path} was changed, replaced or deleted while it was being read. "
                "Let nothing write to a store that is in use; start again."
            )


class _Pool(NamedTuple):
    """Rows that are shuffled together, in mapped shards."""

    shards: list[_MappedShard]
    firsts: Int[np.ndarray, " shard_plus_one"]
    """Number of the first row of each shard within the pool, then the number of all rows."""
    ids: Int[np.ndarray, " row"]
    """Number of each row within the site."""


_Part = tuple[_Pool, Int[np.ndarray, " _"]]
"""Pool, and numbers of some of its rows."""


class StoreRows(Result):
    """Rows of one site of a store, a source for `train`; fits the `Rows` protocol.

    Rows are numbered through the shards of the train split, then of the held-out split.
    """

    d_in: int
    """Number of channels."""
    n_rows: int
    """Number of rows to train on."""
    n_held_out: int
    """Number of held-out rows."""

    def __init__(self, store: Store, site: str, channels: Channels, pool_bytes: int) -> None:
        self.store: Store = store
        self.site: str = site
        self.channels: Channels = channels
        self.shape: SiteShape = store.shapes[site]
        self.d_in = len(numbers_of(channels, self.shape.width))
        self._train = [s for s in store.shards if s.site == site and s.split == "train"]
        self._held = [s for s in store.shards if s.site == site and s.split == "held"]
        self._all = self._train + self._held
        self._first = np.concatenate([[0], np.cumsum([s.rows for s in self._all])])
        self.n_rows = sum(s.rows for s in self._train)
        self.n_held_out = sum(s.rows for s in self._held)
        self.n_pools: int = math.ceil(sum(s.bytes for s in self._train) / pool_bytes)
        self.layout: tuple[tuple[Split, int], ...] = tuple((s.split, s.rows) for s in self._all)
        if not self.n_rows:
            raise StoreError(f"{store.root} has no rows at {site}.")

    def summary(self) -> str:
        """Site, number of rows and number of channels."""
        n = f"{self.n_rows:,} rows of {self.d_in} channels, {self.n_held_out:,} held out"
        return f"Rows of {self.site} in {self.store.root}: {n}"

    def batches(self, batch_size: int, *, seed: int = 0, start: int = 0) -> Iterator[Batch]:
        """Endless shuffled batches, one epoch after another.

        Args:
            batch_size: Rows in every batch; the end of an epoch is filled from the next.
            seed: Seed of the order.
            start: Number of the first batch; the stream from there is the same as if all
                earlier batches had been read.

        Yields:
            Batches in float32.

        Raises:
            StoreError: A shard is damaged or missing, or changes while it is read; it is named.
                Every shard is checked whole when it is first read, and again if it changed.
        """
        yield from self.stored_batches(batch_size, seed=seed, start=start, dtype=torch.float32)

    def stored_batches(
        self, batch_size: int, *, seed: int = 0, start: int = 0, dtype: torch.dtype | None = None
    ) -> Iterator[Batch]:
        """Yield the same batches in another precision, by default that of the store."""
        spare: list[np.ndarray] = []
        with ThreadPoolExecutor(2) as workers:
            ahead: deque[Future[Batch]] = deque()
            for parts in self._parts(batch_size, seed, start, workers):
                size = batch_size * parts[0][0].shards[0].rows.shape[1]
                ahead.append(workers.submit(self._gather, parts, _spare(spare, size), dtype))
                if len(ahead) > BATCHES_AHEAD:
                    yield ahead.popleft().result()

    def _parts(
        self, batch_size: int, seed: int, start: int, workers: ThreadPoolExecutor
    ) -> Iterator[list[_Part]]:
        """Parts of each batch, from one pool or several."""
        missing, parts = batch_size, []
        for pool, order in self._pools(seed, start * batch_size, workers):
            taken = 0
            while taken < len(order):
                parts.append((pool, order[taken : taken + missing]))
                taken += len(parts[-1][1])
                missing -= len(parts[-1][1])
                if not missing:
                    yield parts
                    missing, parts = batch_size, []

    def _gather(
        self, parts: list[_Part], room: UInt8[np.ndarray, " byte"], dtype: torch.dtype | None
    ) -> Batch:
        out = room.reshape(sum(len(order) for _, order in parts), -1)
        done = 0
        for pool, order in parts:
            _gather_rows(pool, order, out[done : done + len(order)])
            done += len(order)
        x = torch.from_numpy(room).view(parts[0][0].shards[0].dtype).view(len(out), -1)
        ids = np.concatenate([pool.ids[order] for pool, order in parts])
        return Batch(x[:, self.channels].to(dtype or x.dtype), torch.from_numpy(ids))

    def _pools(self, seed: int, first_row: int, workers: ThreadPoolExecutor) -> Iterator[_Part]:
        """Pools of shards in random order, each with a random order of its rows."""
        epoch, skip = divmod(first_row, self.n_rows)
        pool: _Pool | None = None
        loading: Future[_Pool] | None = None
        coming: deque[tuple[int, int, list[int]]] = deque()
        for turn in self._turns(seed, epoch):
            n = sum(self._all[i].rows for i in turn[2])
            if not coming and skip >= n:
                skip -= n
                continue
            self._fetch(turn[2])
            coming.append(turn)
            if len(coming) <= POOLS_AHEAD:
                continue
            (epoch, number, shards), following = coming.popleft(), coming[0][2]
            if loading is not None:
                pool = loading.result()
            pool = pool or self._load(shards)
            loading = workers.submit(self._load, following) if following != shards else None
            random = np.random.default_rng([seed, epoch, number])
            yield pool, random.permutation(len(pool.ids))[skip:]
            skip = 0

    def _turns(self, seed: int, epoch: int) -> Iterator[tuple[int, int, list[int]]]:
        """Epoch, number within the epoch and shards of each pool, without end."""
        while True:
            for number, shards in enumerate(self._groups(seed, epoch)):
                yield epoch, number, shards
            epoch += 1

    def _groups(self, seed: int, epoch: int) -> list[list[int]]:
        """Train shards in random order, cut into pools of about equal size."""
        n_shards = len(self._train)
        n_groups = min(n_shards, self.n_pools)
        if n_groups == 1:
            return [list(range(n_shards))]
        order = np.random.default_rng([seed, epoch]).permutation(n_shards)
        return [part.tolist() for part in np.array_split(order, n_groups)]

    def held_out(self, n_rows: int) -> Batch:
        """First rows of the held-out split, of samples that `batches` never yields."""
        parts: list[Tensor] = []
        missing = n_rows
        for shard in self._held:
            if missing <= 0:
                break
            rows = read_shard(self.store.root, shard, self.shape.width)[0]
            parts.append(rows[:missing, self.channels].float())
            missing -= len(parts[-1])
        x = torch.cat(parts) if parts else torch.empty(0, self.d_in)
        return Batch(x, torch.arange(self.n_rows, self.n_rows + len(x)))

    def scan(self) -> Iterator[tuple[Batch, Int[Tensor, "batch 3"]]]:
        """Every row once in stored order, train then held out, with sample, y and x.

        Raises:
            StoreError: A shard is damaged or missing; it is named.
        """
        for i, shard in enumerate(self._all):
            self._fetch(range(len(self._all))[i + 1 : i + 1 + remote.AT_ONCE])
            rows, where = read_shard(self.store.root, shard, self.shape.width)
            ids = torch.arange(int(self._first[i]), int(self._first[i + 1]))
            yield Batch(rows[:, self.channels].float(), ids), where

    def describe(self, row: int) -> str:
        """File and line of a row."""
        i = int(np.searchsorted(self._first, row, side="right")) - 1
        return f"{self.store.root / self._all[i].file} row {row - int(self._first[i])}"

    def _fetch(self, shards: Sequence[int]) -> None:
        """Ask for shards while others are checked and used."""
        read_ahead({self.store.root / self._all[i].file: self._all[i].xxh3 for i in shards})

    def _load(self, shards: list[int]) -> _Pool:
        entries = [self._all[i] for i in shards]
        ids = [np.arange(self._first[i], self._first[i + 1]) for i in shards]
        firsts = np.concatenate([[0], np.cumsum([shard.rows for shard in entries])])
        return _Pool([self._map(shard) for shard in entries], firsts, np.concatenate(ids))

    def _map(self, shard: Shard) -> _MappedShard:
        """Map a shard into memory; check the whole file unless this store has done so."""
        path = self.store.root / shard.file
        try:
            with reading(path, StoreError):
                remote.bring(path, shard.xxh3)
            signature = _signature(path)
            if signature[1] != shard.bytes:
                raise StoreError(_damaged(path, shard, signature[1]))
            data = np.frombuffer(_mapped(path), np.uint8)
        except (OSError, ValueError, DiskError) as error:
            raise StoreError(f"Cannot read {path} ({error}).") from error
        if self.store.verified.get(shard.file) != signature:
            if checksum(data.data) != shard.xxh3:
                raise StoreError(_damaged(path, shard, len(data)))
            self.store.verified[shard.file] = signature
        length = int.from_bytes(data[:8].tobytes(), "little")
        rows = json.loads(data[8 : 8 + length].tobytes())["rows"]
        begin, end = (8 + length + offset for offset in rows["data_offsets"])
        if rows["shape"] != [shard.rows, self.shape.width]:
            raise StoreError(_other_shape(path, rows["shape"], shard, self.shape.width))
        cells = np.asarray(data[begin:end]).reshape(shard.rows, -1)
        kept = None if remote.address_of(path) else signature
        return _MappedShard(path, kept, DTYPES[rows["dtype"]], cells)


class PairedRows(Result):
    """Rows of several sites side by side, a source for `train`; fits the `Rows` protocol."""

    d_in: int
    """Number of channels of all sites."""
    n_rows: int
    """Number of rows to train on."""
    n_held_out: int
    """Number of held-out rows."""

    def __init__(self, rows: Sequence[StoreRows]) -> None:
        self.rows: list[StoreRows] = list(rows)
        self.d_in = sum(r.d_in for r in rows)
        self.site: str = ", ".join(r.site for r in rows)
        self.n_rows, self.n_held_out = rows[0].n_rows, rows[0].n_held_out
        for r in rows:  # the same pools, hence the same order
            r.n_pools = max(other.n_pools for other in rows)

    def summary(self) -> str:
        """Rows of each site."""
        return "\n".join(r.summary() for r in self.rows)

    def batches(self, batch_size: int, *, seed: int = 0, start: int = 0) -> Iterator[Batch]:
        """Endless shuffled batches, one epoch after another; see `StoreRows.batches`.

        Args:
            batch_size: Rows in every batch.
            seed: Seed of the order.
            start: Number of the first batch.
        """
        yield from self.stored_batches(batch_size, seed=seed, start=start, dtype=torch.float32)

    def stored_batches(self, batch_size: int, **options: Any) -> Iterator[Batch]:
        """Yield the same batches in another precision; see `StoreRows.stored_batches`."""
        streams = [r.stored_batches(batch_size, **options) for r in self.rows]
        for batches in zip(*streams, strict=True):
            yield Batch(torch.cat([batch.x for batch in batches], dim=1), batches[0].row)

    def held_out(self, n_rows: int) -> Batch:
        """First rows of the held-out split."""
        batches = [r.held_out(n_rows) for r in self.rows]
        return Batch(torch.cat([batch.x for batch in batches], dim=1), batches[0].row)

    def scan(self) -> Iterator[tuple[Batch, Int[Tensor, "batch 3"]]]:
        """Every row once in stored order; see `StoreRows.scan`."""
        for parts in zip(*(r.scan() for r in self.rows), strict=True):
            x = torch.cat([batch.x for batch, _ in parts], dim=1)
            yield Batch(x, parts[0][0].row), parts[0][1]

    def describe(self, row: int) -> str:
        """File and line of a row, at every site."""
        return ", ".join(r.describe(row) for r in self.rows)


def read_shard(
    root: Path, shard: Shard, width: int | None = None
) -> tuple[Float[Tensor, "row d_in"], Int[Tensor, "row 3"]]:
    """Read the rows and places of one shard, and verify its checksum.

    Args:
        root: Folder of the store.
        shard: Entry of the shard in the manifest.
        width: Number of channels in the manifest; by default whatever the file has.

    Raises:
        StoreError: The shard is damaged or missing.
    """
    path, size = root / shard.file, 0
    try:
        with reading(path, StoreError):
            remote.bring(path, shard.xxh3)
        size = _signature(path)[1]
        if size != shard.bytes:
            raise StoreError(_damaged(path, shard, size))
        tensors = read_safetensors(path, expected=shard.xxh3)[0]
        rows, where = tensors["rows"], tensors["where"]
    except (OSError, KeyError) as error:
        reason = getattr(error, "strerror", None) or repr(error)
        raise StoreError(f"Cannot read {path}: {reason}.") from error
    except WeightsError as error:
        message = _damaged(path, shard, size) if str(error) == damaged(path) else str(error)
        raise StoreError(message) from error
    width = rows.shape[-1] if width is None else width
    if tuple(rows.shape) != (shard.rows, width):
        raise StoreError(_other_shape(path, list(rows.shape), shard, width))
    return rows, where


def _other_shape(path: Path, shape: Sequence[int], shard: Shard, width: int) -> str:
    return f"{path} has rows of shape {list(shape)}, the manifest says {[shard.rows, width]}."


def _damaged(path: Path, shard: Shard, size: int) -> str:
    damage = "its checksum differs from the manifest's"
    if size != shard.bytes:
        damage = f"it has {size} bytes, expected {shard.bytes}"
    return f"{path} is damaged: {damage}. Delete the store and collect it again."


def _signature(path: Path) -> Signature:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _mapped(path: Path) -> mmap.mmap:
    with open_regular(path) as file:
        if hasattr(mmap, "MAP_POPULATE"):  # one visit to the kernel instead of one a few pages
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ)
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _spare(spare: list[np.ndarray], size: int) -> UInt8[np.ndarray, " byte"]:
    """Lend memory for a batch; it is spare again once nobody holds the batch any more.

    Fresh pages cost as much as reading them: the kernel has to clear them first.
    """
    memory = spare.pop() if spare else np.empty(size, np.uint8)
    room = memory.view()  # every tensor on this memory holds this view, and nothing else does
    weakref.finalize(room, spare.append, memory).atexit = False
    return room


def _gather_rows(
    pool: _Pool, order: Int[np.ndarray, " row"], out: UInt8[np.ndarray, "row byte"]
) -> None:
    """Write rows of a pool, in order; the pool keeps them mapped meanwhile."""
    from mechatlas.activations.copying import copy_rows  # compiled, so only when it is used

    for mapped in pool.shards:
        mapped.check()
    shard = np.searchsorted(pool.firsts, order, side="right") - 1
    starts = np.array([mapped.rows.ctypes.data for mapped in pool.shards], np.int64)
    copy_rows(starts[shard] + (order - pool.firsts[shard]) * out.shape[1], out)
