"""Collection of activations: a network and samples -> an activation store.

Main path, in reading order:

    collect      plan the rounds, do the remaining ones, mark the store complete
    _plan        samples in random order, cut into rounds that fit in memory
    _damaged     rounds that were done and whose shards are damaged or missing: done again
    _do_round    read the sites for one round of samples, shuffle the rows, write shards

A round depends on nothing but its number, so rounds may run on an engine, each where there is room.
A killed run loses at most the rounds that were running: the same command goes on from there, and
the finished store has the same bytes as a store collected in a single run.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from mechatlas import remote
from mechatlas.activations import networks
from mechatlas.activations.layouts import layouts_of
from mechatlas.activations.networks import as_input
from mechatlas.activations.outlier_rows import outliers_of_sites
from mechatlas.activations.passes import on_device
from mechatlas.activations.posing import (
    PoseConfig,
    Poses,
    describe_action,
    poses_of_sites,
    read_pose,
    shape_of,
)
from mechatlas.activations.positions import (
    REASONS,
    Positions,
    TokenSamples,
    is_causal,
    left_out,
    same_place,
)
from mechatlas.activations.row_checks import naming, refuse_non_finite, refuse_unreadable
from mechatlas.activations.samples import (
    ArraySamples,
    Samples,
    batches_of,
    first_batch,
    open_samples,
)
from mechatlas.activations.sites import as_site, read_activations
from mechatlas.activations.store import Store, shard_file, write_shard
from mechatlas.activations.store_manifest import DTYPES, SCHEMA, Shard, SiteShape, Split
from mechatlas.activations.unfinished import (
    RoundResult,
    begin_store,
    finish_store,
    has_checksum,
    has_size,
    note_round,
    refuse_absent,
    refuse_empty,
    rounds_done,
    shards_of,
)
from mechatlas.base import (
    Engine,
    Progress,
    RecipeError,
    Site,
    StoreError,
    no_progress,
)
from mechatlas.devices import as_device
from mechatlas.files import MANIFEST, TEMPORARY, checksum, write_manifest
from mechatlas.maths.actions import Action
from mechatlas.outputs import claim
from mechatlas.ranges import COUNT, SEED, check_ranges

SHARD_BYTES = 8 << 20
"""Largest size of a shard."""
Reopen = Callable[[], tuple[nn.Module, Any]]
"""Function that opens a network and its samples."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """Settings that decide the bytes of a store, and the memory for collecting it."""

    positions: Positions = dataclasses.field(default_factory=Positions)
    """Rule by which positions of a sample are kept."""
    paired: bool | None = None
    """Keep the same places at every site, chosen at the first one, so that rows of different
    sites belong together (for crosscoders, transcoders, matching and circuits). By default so
    where it costs nothing: all sites have the same grid, and places are not drawn by norm."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number format of the rows on disk."""
    held_out: float = 0.05
    """Fraction of the samples whose rows are held out for evaluation, never trained on."""
    batch_size: int = 64
    """Samples in one forward pass."""
    memory_mib: int = 1024
    """Memory that the whole process should stay under, in MiB; a quarter of it holds rows."""
    skip_bad: bool = False
    """Skip and count samples that cannot be read, instead of stopping."""
    seed: int = 0
    """Seed of the order of samples and rows."""

    def __post_init__(self) -> None:
        check_ranges(
            self, held_out="[0, 1)", batch_size=COUNT, memory_mib="[512, 1000000000]", seed=SEED
        )


class Round(NamedTuple):
    """Samples that are read, shuffled and written together."""

    split: Split
    samples: Int[np.ndarray, " sample"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Collection:
    """Inputs, settings and folder of one store."""

    network: nn.Module
    samples: Samples
    sites: Sequence[Site]
    shapes: dict[Site, SiteShape]
    settings: StoreConfig
    device: torch.device | str
    poses: Poses | None
    out: Path

    @property
    def tokens(self) -> TokenSamples | None:
        """The samples, if they are windows of tokens."""
        return self.samples if isinstance(self.samples, TokenSamples) else None


@dataclasses.dataclass
class _Rows:
    """Rows of one site in one round, filled batch by batch."""

    rows: Float[Tensor, "row d_in"]
    where: Int[Tensor, "row 3"]
    used: int = 0

    def put(self, column: int, rows: Float[Tensor, "n d"]) -> None:
        """Write some columns of the next rows."""
        end = column + rows.shape[1]
        self.rows[self.used : self.used + len(rows), column:end] = rows

    def finish(self, where: Int[Tensor, "n 3"]) -> None:
        """Count rows whose columns are all there, from the samples and places `where`."""
        end = self.used + len(where)
        self.where[self.used : end] = where
        self.used = end


def collect(
    network: nn.Module,
    samples: Any,
    sites: Sequence[Site | str] | Site | str,
    out: Path | str,
    settings: StoreConfig | None = None,
    *,
    group: PoseConfig | Action | None = None,
    recipe: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    engine: Engine | None = None,
    reopen: Reopen | None = None,
    on_progress: Progress = no_progress,
) -> Store:
    """Read sites for every sample and write the rows, shuffled, to a store.

    Args:
        network: Network; run in evaluation mode, and put back in its own and on its own device.
        samples: Inputs of the network: whatever `open_samples` takes, such as an array.
        sites: Sites to read, or their written form, all in one pass that stops after the last.
        out: Folder of the store, or its address. An unfinished store of the same recipe is
            continued.
        settings: Positions kept, number format, memory; by default `StoreConfig()`.
        group: Group in whose poses each input is read. A row then has the channels of element
            0, the input itself, followed by the channels of element 1, and so on.
        recipe: Plain values kept in the manifest; a store made from another recipe is refused.
        device: Device on which the network runs; by default its own.
        engine: Engine on which rounds run, such as `Processes(4)`; by default this process. Each
            worker stays under `memory_mib`.
        reopen: Function of a module that gives network and samples again, for the workers of an
            engine; the weights must be the same.
        on_progress: Callback with the number of samples done and their total.

    Returns:
        The finished store.

    Raises:
        StoreError: `out` holds something else, or a store made by another recipe.
        InputError: A sample cannot be read and `skip_bad` is off, or none could be read; or no
            position can be followed through all poses.
        GroupError: The group cannot act so.
        NonFiniteError: The network gave NaN or infinity; names the site, sample and channel.
        DiskError: The rows cannot fit on the disk, the folder is not writable, or another process
            writes into it.
        RecipeError: There is no such device here, or an engine is given without `reopen`.
        UserError: The workers of an engine are lost.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from torch import nn
        >>> import mechatlas as ma
        >>> folder = Path(tempfile.mkdtemp())
        >>> np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(200, 4)))
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> samples = ma.open_samples(ma.Arrays(source=folder / "x.npy"), network)
        >>> store = ma.collect(network, samples, [ma.Site("1")], folder / "store")
        >>> next(store.rows().batches(32)).x.shape
        torch.Size([32, 8])
    """
    settings, device = settings or StoreConfig(), as_device(device, network)
    out = remote.prepared(out)
    samples = open_samples(samples, network, memory_mib=settings.memory_mib)
    if recipe is None and isinstance(samples, ArraySamples):
        recipe = samples.made_from()
    chosen = [as_site(network, s) for s in ([sites] if isinstance(sites, str | Site) else sites)]
    if engine is not None and reopen is None:
        raise RecipeError(
            "Workers of an engine open network and samples by themselves: give collect(reopen=f), "
            "a function f of a module that returns both."
        )
    with on_device(network, device):
        collection, rounds = _prepare(network, samples, chosen, settings, group, device, out)
        with claim(out) as claimed:
            manifest = begin_store(
                out,
                _new_manifest(collection, len(rounds), recipe or {}),
                n_bytes=len(samples) * _sample_bytes(collection.shapes, collection.settings),
            )
            again = _damaged(collection, rounds, manifest)
            todo = [*again, *sorted({*range(len(rounds))} - {*rounds_done(manifest)})]
            if engine is None or reopen is None:
                running = _in_turn(collection, rounds, todo, on_progress)
            else:
                state = _new_manifest(collection, len(rounds), {})
                place = remote.written(out.resolve())
                job = _Job(reopen, chosen, settings, group, str(device), place, state)
                running = engine.map(_do_round_elsewhere, todo, shared=job)
            done = len(samples) - sum(len(rounds[number].samples) for number in todo)
            for i, result in running:
                claimed.check()
                _note(manifest, todo[i], result, again, out)
                done += len(rounds[todo[i]].samples)
                on_progress(done, len(samples))
            if not manifest["complete"]:
                _finish(collection, manifest)
    return Store(out)


def _prepare(
    network: nn.Module,
    samples: Samples,
    sites: Sequence[Site],
    settings: StoreConfig,
    group: PoseConfig | Action | None,
    device: torch.device | str,
    out: Path,
) -> tuple[_Collection, list[Round]]:
    """Read the sites for one sample, by which all settings are decided, and plan the rounds."""
    index, first = first_batch(samples, skip_bad=settings.skip_bad)
    first = as_input(network, first.to(device))
    with torch.inference_mode(), naming(samples, [index]):
        layouts = layouts_of(network, first, sites)
        activations = read_activations(network, first, sites)
        for site, activation in activations.items():
            refuse_unreadable(layouts[site].rows(activation), site, len(first))
    poses = None
    if group is not None:
        poses = poses_of_sites(group, network, first, activations, paired=settings.paired)
    shapes = {
        site: shape_of(network, site, layouts[site], a, poses) for site, a in activations.items()
    }
    collection = _Collection(network, samples, sites, shapes, settings, device, poses, out)
    collection = _resolved(collection, index, first)
    return collection, _plan(len(samples), shapes, collection.settings)


def _note(
    manifest: dict[str, Any],
    number: int,
    result: RoundResult,
    again: dict[int, list[Shard]],
    out: Path,
) -> None:
    """Note a round that is done, or compare it with what it was when it was done before."""
    if number not in again:
        note_round(manifest, number, result)
        write_manifest(out / MANIFEST, manifest, make_folder=False)
    elif result.shards != again[number]:
        raise StoreError(
            f"A shard in {out} was damaged or missing, and its samples give other rows now. "
            "Delete the store and collect it again."
        )


def _finish(collection: _Collection, manifest: dict[str, Any]) -> None:
    """Say in the manifest that the store is complete, if it is."""
    out = collection.out
    finish_store(manifest)
    refuse_empty(manifest)
    for temporary in out.rglob(f"*{TEMPORARY}"):  # of killed workers
        temporary.unlink(missing_ok=True)
    refuse_absent(out, manifest)
    network, samples = collection.network, collection.samples
    manifest["outliers"] = outliers_of_sites(out, manifest["shards"], samples, network)
    write_manifest(out / MANIFEST, manifest, make_folder=False)


def _in_turn(
    collection: _Collection, rounds: list[Round], todo: list[int], on_progress: Progress
) -> Iterator[tuple[int, RoundResult]]:
    """Do rounds one after another in this process."""
    n = len(collection.samples)
    done = n - sum(len(rounds[number].samples) for number in todo)
    for i, number in enumerate(todo):
        yield i, _do_round(collection, rounds, number, lambda m, at=done: on_progress(at + m, n))
        done += len(rounds[number].samples)


class _Job(NamedTuple):
    """Inputs of `_prepare` for a worker, which opens network and samples by itself."""

    reopen: Reopen
    sites: list[Site]
    settings: StoreConfig
    group: PoseConfig | Action | None
    device: str
    out: str
    state: dict[str, Any]
    """Manifest of the store before its first round; a worker must come to the same."""


_JOBS: dict[str, tuple[_Collection, list[Round]]] = {}
"""Collection that this worker has opened."""


def _do_round_elsewhere(number: int, job: _Job) -> RoundResult:
    """Do a round in a worker, which opens network and samples at its first."""
    key = checksum(json.dumps([job.out, job.state]).encode())
    if key not in _JOBS:
        network, samples = job.reopen()
        samples = open_samples(samples, network, memory_mib=job.settings.memory_mib)
        network.to(job.device)
        out = remote.located(job.out)
        collection, rounds = _prepare(
            network, samples, job.sites, job.settings, job.group, job.device, out
        )
        found = _new_manifest(collection, len(rounds), {})
        if differing := [key for key in found if found[key] != job.state[key]]:
            raise StoreError(
                f"A worker finds another {' and '.join(differing)} than the first process. Workers "
                "must see the same weights and the same samples, and nothing may change them "
                "meanwhile."
            )
        _JOBS.clear()
        _JOBS[key] = collection, rounds
    return _do_round(*_JOBS[key], number, lambda _: None)


def _resolved(collection: _Collection, index: int, first: Any) -> _Collection:
    """Decide the settings that depend on the samples, the network and the sites.

    Args:
        collection: Inputs and settings of the store.
        index: Number of the first sample.
        first: Batch of it alone.
    """
    settings, shapes, tokens = collection.settings, collection.shapes, collection.tokens
    causal = tokens is not None and is_causal(
        collection.network, first, tokens.padding(index), collection.sites
    )
    positions = settings.positions.resolved(tokens=tokens is not None, causal=causal)
    paired = settings.paired
    if paired is None:  # yes where each site alone would have the same places drawn
        n_positions = {math.prod(shape.grid) for shape in shapes.values()}
        every = all(positions.count(n) == n for n in n_positions)
        one_grid = len({shape.grid for shape in shapes.values()}) == 1
        paired = collection.poses is None and one_grid and (every or positions.rule != "norm")
    settings = dataclasses.replace(settings, positions=positions, paired=paired)
    return dataclasses.replace(collection, settings=settings)


def _row_bytes(shape: SiteShape, settings: StoreConfig) -> int:
    return shape.width * DTYPES[settings.dtype].itemsize + 3 * 4


def _rows_per_sample(shapes: dict[Site, SiteShape], settings: StoreConfig) -> dict[Site, int]:
    counts = {
        site: settings.positions.count(math.prod(s.grid) if s.places is None else s.places)
        for site, s in shapes.items()
    }
    first = next(iter(counts.values()))
    return dict.fromkeys(counts, first) if settings.paired else counts


def _sample_bytes(shapes: dict[Site, SiteShape], settings: StoreConfig) -> int:
    n_rows = _rows_per_sample(shapes, settings)
    return sum(n_rows[site] * _row_bytes(s, settings) for site, s in shapes.items())


def _plan(n_samples: int, shapes: dict[Site, SiteShape], settings: StoreConfig) -> list[Round]:
    """Held-out samples first, then the rest, in random order, in rounds that fit in memory."""
    per_round = max(1, (settings.memory_mib << 20) // 4 // _sample_bytes(shapes, settings))
    order = np.random.default_rng([settings.seed, 0]).permutation(n_samples)
    n_held = math.ceil(settings.held_out * n_samples) if n_samples > 1 else 0
    splits: dict[Split, np.ndarray] = {"held": order[:n_held], "train": order[n_held:]}
    return [
        Round(split, samples)
        for split, part in splits.items()
        if len(part)
        for samples in np.array_split(part, math.ceil(len(part) / per_round))
    ]


def _new_manifest(collection: _Collection, n_rounds: int, recipe: dict[str, Any]) -> dict[str, Any]:
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "store",
        "recipe": recipe,
        "settings": dataclasses.asdict(collection.settings),
        "network": networks.digest(collection.network),
        "n_samples": len(collection.samples),
        "sites": {
            str(site): {
                "width": s.width,
                "grid": s.grid,
                "branches": s.branches,
                **({"scattered": s.scattered} if s.scattered else {}),
                **({} if s.places is None else {"places": s.places}),
            }
            for site, s in collection.shapes.items()
        },
        **({} if collection.poses is None else {"group": describe_action(collection.poses.action)}),
        "rounds": n_rounds,
        "rounds_done": {},
        "complete": False,
        "shards": [],
        "skipped": [],
        "left_out": {} if collection.tokens is None else dict.fromkeys(REASONS, 0),
    }
    return json.loads(json.dumps(manifest))  # as a manifest on disk: lists instead of tuples


def _damaged(
    collection: _Collection, rounds: list[Round], manifest: dict[str, Any]
) -> dict[int, list[Shard]]:
    """Rounds that were done and have a damaged or missing shard, with the shards they should have.

    Of a complete store, or one at an address, only the sizes are looked at: whoever reads it
    verifies the checksums.
    """
    out, at_address = collection.out, remote.sizes(collection.out)
    by_size = manifest["complete"] or at_address is not None
    listed = {shard.file: shard for shard in shards_of(manifest)}
    damaged = {}
    for number in rounds_done(manifest):
        shards = [
            listed[file]
            for site in collection.shapes
            for i in _shard_numbers(collection, site, rounds, number)
            if (file := shard_file(str(site), rounds[number].split, i)) in listed
        ]
        if not all(
            has_size(out, shard, at_address) if by_size else has_checksum(out, shard)
            for shard in shards
        ):
            damaged[number] = shards
    return damaged


def _do_round(
    collection: _Collection, rounds: list[Round], number: int, on_progress: Callable[[int], None]
) -> RoundResult:
    """Fill the rows of every site for one round, shuffle them, write them as shards."""
    shapes, settings = collection.shapes, collection.settings
    numbers = rounds[number].samples
    n_rows = {site: len(numbers) * n for site, n in _rows_per_sample(shapes, settings).items()}
    filled = {
        site: _Rows(
            torch.empty(n_rows[site], shape.width, dtype=DTYPES[settings.dtype]),
            torch.empty(n_rows[site], 3, dtype=torch.int32),
        )
        for site, shape in shapes.items()
    }
    skipped: list[str] = []
    bad = skipped.append if settings.skip_bad else None
    n_left_out: Counter[str] = Counter()
    done = 0
    for indices, inputs in batches_of(collection.samples, numbers, settings.batch_size, bad):
        if indices:
            excluded = None
            if collection.tokens is not None:
                excluded = left_out(collection.tokens, indices, settings.positions, n_left_out)
            _fill(collection, filled, inputs.to(collection.device), indices, excluded)
        done += settings.batch_size
        on_progress(min(done, len(numbers)))
    shards: list[Shard] = []
    for site, rows in filled.items():
        shards += _write(collection, site, rows, rounds, number)
    return RoundResult(shards, skipped, dict(n_left_out))


def _write(
    collection: _Collection, site: Site, filled: _Rows, rounds: list[Round], number: int
) -> list[Shard]:
    """Shuffle the rows of one site in one round and write them as shards."""
    settings, split = collection.settings, rounds[number].split
    random = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
    order = torch.randperm(filled.used, generator=random)
    per_shard = _rows_per_shard(collection, site)
    numbers = _shard_numbers(collection, site, rounds, number)
    return [
        write_shard(collection.out, str(site), split, i, filled.rows[piece], filled.where[piece])
        for i, piece in zip(numbers, order.split(per_shard), strict=False)  # some were skipped
        if len(piece)
    ]


def _rows_per_shard(collection: _Collection, site: Site) -> int:
    shapes, settings = collection.shapes, collection.settings
    # Paired sites are cut at the same rows, so that they can be read side by side.
    together = shapes.values() if settings.paired else [shapes[site]]
    return max(1, SHARD_BYTES // max(_row_bytes(s, settings) for s in together))


def _shard_numbers(collection: _Collection, site: Site, rounds: list[Round], number: int) -> range:
    """Numbers of the shards of a site and a round, whatever is skipped in it or before it."""
    n_rows = _rows_per_sample(collection.shapes, collection.settings)[site]
    per_shard = _rows_per_shard(collection, site)
    counts = [
        math.ceil(len(r.samples) * n_rows / per_shard)
        for r in rounds[: number + 1]
        if r.split == rounds[number].split
    ]
    return range(sum(counts[:-1]), sum(counts))


@torch.inference_mode()
def _fill(
    collection: _Collection,
    filled: dict[Site, _Rows],
    inputs: Shaped[Tensor, "batch ..."],
    indices: list[int],
    excluded: Bool[Tensor, "batch token"] | None,
) -> None:
    """Draw positions of the untransformed inputs, and add their rows pose by pose."""
    shapes, settings, poses = collection.shapes, collection.settings, collection.poses
    sites, first = collection.sites, collection.sites[0]
    drawn: dict[Site, Tensor] = {}
    for element in range(1 if poses is None else poses.action.group.order):
        action = None if poses is None else poses.action
        with naming(collection.samples, indices):
            activations = read_pose(collection.network, action, element, inputs, sites, shapes)
        for site, flat in activations.items():
            refuse_non_finite(flat, site, indices, collection.samples)
            if site not in drawn and settings.paired and drawn:
                here, there = shapes[first].grid, shapes[site].grid
                drawn[site] = drawn[first]
                if poses is None and here != there:
                    drawn[site] = same_place(drawn[first], here, there)
            elif site not in drawn:
                among = flat if poses is None else flat[:, poses.places[site].kept]
                fits = poses is None and excluded is not None and excluded.shape[1] == flat.shape[1]
                drawn[site] = settings.positions.draw(among, indices, excluded if fits else None)
            of_sample, column = (drawn[site] >= 0).nonzero().T
            if poses is None:
                rows = flat[of_sample, drawn[site][of_sample, column]]
            else:
                rows = poses.places[site].take(element, flat, drawn[site]).flatten(0, 1)
            of_row, stored = [indices[i] for i in of_sample.tolist()], filled[site].rows.dtype
            refuse_non_finite(rows[:, None], site, of_row, collection.samples, dtype=stored)
            filled[site].put(element * flat.shape[-1], rows.cpu())
    for site, rows in filled.items():
        position = drawn[site] if poses is None else poses.places[site].kept[drawn[site]]
        position, width = position.cpu(), shapes[site].grid[1]
        sample = torch.tensor(indices)[:, None].expand_as(position)
        where = torch.stack([sample, position // width, position % width], dim=-1)
        rows.finish(where[position >= 0].int())
