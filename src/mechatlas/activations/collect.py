"""From a network and samples to an activation store.

Main path:

    collect      plan the rounds, do those not yet done, mark the store complete
    _plan        samples in random order, cut into rounds that fit in memory
    _do_round    read the sites for one round of samples, shuffle the rows, write shards

A round is what a killed run may lose: the same command goes on with the next one, and the
finished store has the same bytes as one collected in a single run.
"""

import dataclasses
import itertools
import math
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechatlas.activations import networks
from mechatlas.activations.posing import (
    Places,
    PoseConfig,
    action_of,
    described,
    paired_places,
    places_of,
    read_pose,
    refuse_lawless,
)
from mechatlas.activations.positions import Positions
from mechatlas.activations.samples import Samples
from mechatlas.activations.sites import branches_of, channels_last, grid_of, read_activations
from mechatlas.activations.store import (
    DTYPES,
    SCHEMA,
    Shard,
    SiteShape,
    Split,
    Store,
    folder_of,
    write_shard,
)
from mechatlas.base import (
    DiskError,
    InputError,
    NonFiniteError,
    Progress,
    Site,
    StoreError,
    no_progress,
)
from mechatlas.files import read_json, write_json
from mechatlas.maths.actions import Action

SHARD_BYTES = 8 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """How activations are read and written; everything that decides the bytes of a store."""

    positions: Positions = dataclasses.field(default_factory=Positions)
    """Which positions of each sample are kept."""
    paired: bool = False
    """Keep the same places at every site, chosen at the first one, so that rows of different
    sites belong together (for crosscoders and transcoders)."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number format of the rows on disk."""
    held_out: float = 0.05
    """Share of the samples whose rows are kept for measuring and never trained on."""
    batch_size: int = 64
    """Samples in one forward pass."""
    memory_mib: int = 1024
    """Memory that the whole process should stay under, in MiB; a quarter of it holds rows."""
    skip_bad: bool = False
    """Pass over samples that cannot be read, and count them, instead of stopping."""
    seed: int = 0
    """Seed of the order of samples and rows."""

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be in [0, 1), got {self.held_out}.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}.")
        if self.memory_mib < 512:
            raise ValueError(f"memory_mib must be at least 512, got {self.memory_mib}.")


class Round(NamedTuple):
    """Samples that are read, shuffled and written together."""

    split: Split
    samples: np.ndarray


@dataclasses.dataclass
class _Rows:
    """The rows of one site in one round, filled batch by batch."""

    rows: Tensor
    where: Tensor
    used: int = 0

    def add(self, rows: Tensor, where: Tensor) -> None:
        self.put(0, rows)
        self.done(where)

    def put(self, column: int, rows: Tensor) -> None:
        """Columns from `column` on of the rows after those that are done."""
        end = column + rows.shape[1]
        self.rows[self.used : self.used + len(rows), column:end] = rows

    def done(self, where: Tensor) -> None:
        """All columns of as many rows are there."""
        end = self.used + len(where)
        self.where[self.used : end] = where
        self.used = end


class _Posed(NamedTuple):
    """How inputs are posed, which places of each site are kept, and the grids they are of."""

    action: Action
    places: dict[Site, Places]
    grids: dict[Site, tuple[int, int]]


def collect(
    network: nn.Module,
    samples: Samples,
    sites: Sequence[Site],
    out: Path,
    settings: StoreConfig | None = None,
    *,
    group: PoseConfig | Action | None = None,
    recipe: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    on_progress: Progress = no_progress,
) -> Store:
    """Read sites for every sample and write the rows, shuffled, to a store.

    Args:
        network: In evaluation mode, on any device.
        samples: What to run it on.
        sites: Where to read; all in one pass that stops after the last.
        out: Folder of the store. One left unfinished by the same recipe is continued.
        settings: See `Collecting`.
        group: Keep the activations of all poses of each input side by side: a row then has the
            channels of element 0, the input itself, then those of element 1, and so on.
        recipe: Kept in the manifest; a store made from another is not continued.
        device: Where the network runs.
        on_progress: Told how many samples are done.

    Returns:
        The finished store.

    Raises:
        StoreError: `out` holds something else, or a store made by another recipe.
        InputError: A sample cannot be read and `skip_bad` is off, or none could be read; or no
            position can be followed through all poses.
        GroupError: The group cannot act so.
        NonFiniteError: The network gave NaN or infinity; names the site, sample and channel.
        DiskError: The rows cannot fit on the disk, or the folder is not writable.
    """
    settings = settings or StoreConfig()
    network = network.to(device)
    first = _first(samples, settings).to(device)
    posed = _pose(network, sites, first, settings, group)
    shapes = _probe(network, sites, first, posed)
    rounds = _plan(len(samples), shapes, settings)
    manifest = _start(network, samples, shapes, len(rounds), out, settings, recipe or {}, posed)
    done = sum(len(r.samples) for r in rounds[: manifest["rounds_done"]])
    for number in range(manifest["rounds_done"], len(rounds)):
        shards, skipped = _do_round(
            network, samples, sites, shapes, rounds, number, out, settings, device, posed,
            lambda n, before=done: on_progress(before + n, len(samples)),
        )  # fmt: skip
        done += len(rounds[number].samples)
        manifest["shards"] += [list(shard) for shard in shards]
        manifest["skipped"] += skipped
        manifest["rounds_done"] = number + 1
        manifest["complete"] = number + 1 == len(rounds)
        if manifest["complete"] and not manifest["shards"]:
            raise InputError(f"None of the {len(samples)} samples could be read.")
        write_json(out / "manifest.json", manifest)
    return Store(out)


def _first(samples: Samples, settings: StoreConfig) -> Tensor:
    # A batch of the first sample that can be read.
    for i in range(len(samples)):
        try:
            return samples.stack([samples.read(i)])
        except InputError:
            if not settings.skip_bad:
                raise
    raise InputError(f"None of the {len(samples)} samples could be read.")


def _pose(
    network: nn.Module,
    sites: Sequence[Site],
    first: Tensor,
    settings: StoreConfig,
    group: PoseConfig | Action | None,
) -> _Posed | None:
    if group is None:
        return None
    action = action_of(group) if isinstance(group, PoseConfig) else group
    refuse_lawless(action, first)
    with torch.inference_mode():
        grids = {site: grid_of(a) for site, a in read_activations(network, first, sites).items()}
    places = {site: places_of(action, network, site, first) for site in sites}
    if settings.paired:
        places = paired_places(places, grids)
    on_device = {site: Places(*(t.to(first.device) for t in its)) for site, its in places.items()}
    return _Posed(action, on_device, grids)


def _probe(
    network: nn.Module, sites: Sequence[Site], first: Tensor, posed: _Posed | None
) -> dict[Site, SiteShape]:
    with torch.inference_mode():
        found = read_activations(network, first, sites)
    shapes = {}
    for site, activation in found.items():
        named = {} if site.branch else branches_of(network, site.module, site.take)
        ranges = {name: (s.start, s.stop) for name, s in named.items()}
        width = channels_last(activation).shape[-1]
        if posed is None:
            shapes[site] = SiteShape(width, grid_of(activation), ranges)
        else:
            width, kept = width * posed.action.group.order, len(posed.places[site].kept)
            shapes[site] = SiteShape(width, grid_of(activation), ranges, kept)
    return shapes


def _row_bytes(shape: SiteShape, settings: StoreConfig) -> int:
    return shape.width * DTYPES[settings.dtype].itemsize + 3 * 4


def _kept(shapes: dict[Site, SiteShape], settings: StoreConfig) -> dict[Site, int]:
    """Rows kept of each sample at each site."""
    counts = {
        site: settings.positions.count(math.prod(s.grid) if s.places is None else s.places)
        for site, s in shapes.items()
    }
    first = next(iter(counts.values()))
    return dict.fromkeys(counts, first) if settings.paired else counts


def _plan(n_samples: int, shapes: dict[Site, SiteShape], settings: StoreConfig) -> list[Round]:
    """Held-out samples first, then the rest, in random order, in rounds that fit in memory."""
    kept = _kept(shapes, settings)
    sample_bytes = sum(kept[site] * _row_bytes(s, settings) for site, s in shapes.items())
    budget = (settings.memory_mib << 20) // 4
    per_round = max(1, budget // sample_bytes)
    order = np.random.default_rng([settings.seed, 0]).permutation(n_samples)
    n_held = math.ceil(settings.held_out * n_samples) if n_samples > 1 else 0
    rounds: list[Round] = []
    parts: dict[Split, np.ndarray] = {"held": order[:n_held], "train": order[n_held:]}
    for split, part in parts.items():
        n_rounds = math.ceil(len(part) / per_round)
        rounds += (
            [Round(split, piece) for piece in np.array_split(part, n_rounds)] if n_rounds else []
        )
    return rounds


def _start(
    network: nn.Module,
    samples: Samples,
    shapes: dict[Site, SiteShape],
    n_rounds: int,
    out: Path,
    settings: StoreConfig,
    recipe: dict[str, Any],
    posed: _Posed | None,
) -> dict[str, Any]:
    # That of an unfinished run, or a new one.
    fresh: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "store",
        "recipe": recipe,
        "settings": dataclasses.asdict(settings),
        "network": networks.digest(network),
        "n_samples": len(samples),
        "sites": {
            str(site): {
                "width": s.width,
                "grid": list(s.grid),
                "branches": s.branches,
                **({} if s.places is None else {"places": s.places}),
            }
            for site, s in shapes.items()
        },
        **({} if posed is None else {"group": described(posed.action)}),
        "rounds": n_rounds,
        "rounds_done": 0,
        "complete": False,
        "shards": [],
        "skipped": [],
    }
    path = out / "manifest.json"
    if path.exists():
        old = read_json(path)
        given = ("recipe", "settings", "network", "n_samples", "group")
        made_from = ("schema", "kind", *given, "rounds")
        differs = [key for key in made_from if old.get(key) != _plain(fresh.get(key))]
        if differs:
            raise StoreError(
                f"{out} holds a store made from another recipe (it differs in "
                f"{', '.join(_differences(old, _plain(fresh), differs))}). "
                "Choose another --out, or delete it."
            )
        return old
    if out.exists() and not out.is_dir():
        raise DiskError(f"{out} is a file, expected a folder for the store.")
    if out.exists() and any(p.name not in _leftovers(shapes) for p in out.iterdir()):
        raise StoreError(f"{out} is not empty and is not a store. Choose another --out.")
    _check_space(out, len(samples), shapes, settings)
    write_json(path, fresh)
    return read_json(path)


def _leftovers(shapes: dict[Site, SiteShape]) -> set[str]:
    """What a run killed before its first manifest may have left, and what jobs write beside."""
    return {folder_of(s) for s in shapes} | {"manifest.json.tmp", "recipe.toml", "result.json"}


def _plain(value: Any) -> Any:
    """The value as it comes back from JSON."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _differences(old: Any, new: Any, keys: Sequence[str], prefix: str = "") -> list[str]:
    found = []
    for key in keys:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            inner = [k for k in a.keys() | b.keys() if a.get(k) != b.get(k)]
            found += _differences(a, b, sorted(inner), f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}: {a!r} there, {b!r} here")
    return found


def _check_space(
    out: Path, n_samples: int, shapes: dict[Site, SiteShape], settings: StoreConfig
) -> None:
    kept = _kept(shapes, settings)
    size = n_samples * sum(kept[site] * _row_bytes(s, settings) for site, s in shapes.items())
    place = next((p for p in (out, *out.resolve().parents) if p.exists()), Path("/"))
    free = shutil.disk_usage(place).free
    if size > free:
        raise DiskError(
            f"The store needs {size / 2**30:.1f} GiB and {place} has {free / 2**30:.1f} GiB "
            "free. Take fewer positions or samples, dtype = 'float16', or another --out."
        )


def _do_round(
    network: nn.Module,
    samples: Samples,
    sites: Sequence[Site],
    shapes: dict[Site, SiteShape],
    rounds: list[Round],
    number: int,
    out: Path,
    settings: StoreConfig,
    device: torch.device | str,
    posed: _Posed | None,
    on_progress: Any,
) -> tuple[list[Shard], list[str]]:
    """Fill the rows of every site for one round, shuffle them, write them as shards."""
    this = rounds[number]
    kept = _kept(shapes, settings)
    filled = {
        site: _Rows(
            torch.empty(len(this.samples) * kept[site], s.width, dtype=DTYPES[settings.dtype]),
            torch.empty(len(this.samples) * kept[site], 3, dtype=torch.int32),
        )
        for site, s in shapes.items()
    }
    skipped: list[str] = []
    done = 0
    for indices, inputs in _batches(samples, this.samples, settings, skipped):
        if indices and posed is not None:
            _keep_poses(
                network, sites, inputs.to(device), indices, samples, filled, settings, posed
            )
        elif indices:
            with torch.inference_mode():
                found = read_activations(network, inputs.to(device), sites)
            _keep_positions(found, indices, samples, filled, settings)
        done += settings.batch_size
        on_progress(min(done, len(this.samples)))
    shards = []
    for site, part in filled.items():
        random = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
        order = torch.randperm(part.used, generator=random)
        # Paired sites are cut at the same rows, so that they can be read side by side.
        together = shapes.values() if settings.paired else [shapes[site]]
        per_shard = max(1, SHARD_BYTES // max(_row_bytes(s, settings) for s in together))
        first = _shards_before(rounds, number, kept[site], per_shard)
        for i, piece in enumerate(order.split(per_shard)):
            if len(piece):
                shards.append(
                    write_shard(
                        out, str(site), this.split, first + i, part.rows[piece], part.where[piece]
                    )
                )
    return shards, skipped


def _shards_before(rounds: list[Round], number: int, kept: int, per_shard: int) -> int:
    """Number of the first shard of a round, whatever was skipped in the rounds before."""
    earlier = [r for r in rounds[:number] if r.split == rounds[number].split]
    return sum(math.ceil(len(r.samples) * kept / per_shard) for r in earlier)


def _batches(
    samples: Samples, order: np.ndarray, settings: StoreConfig, skipped: list[str]
) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of readable samples, decoded one batch ahead in threads."""

    def load(index: int) -> np.ndarray | InputError:
        try:
            return samples.read(index)
        except InputError as error:
            return error

    pieces = [
        order[i : i + settings.batch_size].tolist()
        for i in range(0, len(order), settings.batch_size)
    ]
    with ThreadPoolExecutor(2) as pool:
        ahead = [pool.submit(load, i) for i in pieces[0]]
        for piece, following in itertools.zip_longest(pieces, pieces[1:], fillvalue=[]):
            current, ahead = ahead, [pool.submit(load, i) for i in following]
            good: list[int] = []
            loaded: list[np.ndarray] = []
            for index, future in zip(piece, current, strict=True):
                result = future.result()
                if isinstance(result, InputError):
                    if not settings.skip_bad:
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise result
                    skipped.append(str(result))
                else:
                    good.append(index)
                    loaded.append(result)
            yield good, samples.stack(loaded) if good else torch.empty(0)


def _keep_positions(
    found: dict[Site, Tensor],
    indices: list[int],
    samples: Samples,
    filled: dict[Site, _Rows],
    settings: StoreConfig,
) -> None:
    """Draw positions at every site and add their rows."""
    chosen: Tensor | None = None
    first_grid = (1, 1)
    for site, activation in found.items():
        rows = channels_last(activation)
        grid = grid_of(activation)
        flat = rows.reshape(len(indices), -1, rows.shape[-1])
        _refuse_non_finite(flat, site, indices, samples)
        if chosen is None or not settings.paired:
            chosen = settings.positions.draw(flat, indices)
            first_grid = grid
        here = chosen if grid == first_grid else _same_place(chosen, first_grid, grid)
        taken = flat.gather(1, here[..., None].expand(-1, -1, flat.shape[-1]))
        sample = torch.tensor(indices, device=here.device)[:, None].expand_as(here)
        where = torch.stack([sample, here // grid[1], here % grid[1]], dim=-1)
        filled[site].add(taken.flatten(0, 1).cpu(), where.flatten(0, 1).int().cpu())


@torch.inference_mode()
def _keep_poses(
    network: nn.Module,
    sites: Sequence[Site],
    inputs: Tensor,
    indices: list[int],
    samples: Samples,
    filled: dict[Site, _Rows],
    settings: StoreConfig,
    posed: _Posed,
) -> None:
    """Draw places from the untransformed inputs, and add their rows pose by pose."""
    chosen: dict[Site, Tensor] = {}
    for element in range(posed.action.group.order):
        for site, flat in read_pose(network, posed.action, element, inputs, sites).items():
            places = posed.places[site]
            _refuse_non_finite(flat, site, indices, samples)
            if element == 0 and settings.paired and chosen:
                chosen[site] = chosen[sites[0]]
            elif element == 0:
                chosen[site] = settings.positions.draw(flat[:, places.kept], indices)
            rows = places.take(element, flat, chosen[site])
            filled[site].put(element * flat.shape[-1], rows.flatten(0, 1).cpu())
    for site, part in filled.items():
        at, width = posed.places[site].kept[chosen[site]].cpu(), posed.grids[site][1]
        sample = torch.tensor(indices)[:, None].expand_as(at)
        part.done(torch.stack([sample, at // width, at % width], dim=-1).flatten(0, 1).int())


def _same_place(position: Tensor, grid: tuple[int, int], other: tuple[int, int]) -> Tensor:
    """The cell of another grid that holds the centre of a cell of this one."""
    y, x = position // grid[1], position % grid[1]
    y = ((y + 0.5) / grid[0] * other[0]).long()
    x = ((x + 0.5) / grid[1] * other[1]).long()
    return y * other[1] + x


def _refuse_non_finite(
    rows: Float[Tensor, "batch position d_in"], site: Site, indices: list[int], samples: Samples
) -> None:
    if rows.sum().isfinite():  # one pass; a NaN or infinity anywhere reaches the sum
        return
    bad = (~rows.isfinite()).nonzero()
    if len(bad):
        sample, _, channel = bad[0].tolist()
        raise NonFiniteError(
            f"The network gave {rows[tuple(bad[0])].item()} at site {site}, sample "
            f"{samples.name(indices[sample])}, channel {channel} ({len(bad)} such values in this "
            "batch). Look at the network and this input; nothing of the batch was kept."
        )
