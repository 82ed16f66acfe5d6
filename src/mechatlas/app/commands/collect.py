"""Run a network over samples and write the activations at some sites to a store.

    mechatlas collect recipes/quick/collect.toml --samples.crops 20
    mechatlas collect recipe.toml --engine processes:4

The folder has the shards of the store. An interrupted run is continued by the same command.
"""

import dataclasses
import functools
from pathlib import Path

from torch import nn

from mechatlas.activations.collect import StoreConfig
from mechatlas.activations.collect import collect as collect_rows
from mechatlas.activations.images import Images
from mechatlas.activations.networks import Network, folders, load_network, reload_network
from mechatlas.activations.outlier_rows import OutlierRows
from mechatlas.activations.posing import PoseConfig, action_of
from mechatlas.activations.samples import SampleRecipe, open_samples
from mechatlas.activations.sites import find_sites
from mechatlas.app.engines import EngineConfig
from mechatlas.app.estimates import WORTH_MEASURING, of_collecting
from mechatlas.app.progress import bar
from mechatlas.app.recipes import as_dict
from mechatlas.app.run_folder import STORE, CommandResult, DeviceConfig, RunFolder

KIND = STORE


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectConfig(EngineConfig, DeviceConfig):
    """Run a network over samples and write the activations at some sites to a store."""

    network: Network
    """Network and its weights."""
    sites: tuple[str, ...]
    """Sites or globs, such as "mixed4*" or "mixed4a/5x5"; see `mechatlas sites NETWORK`."""
    samples: SampleRecipe = dataclasses.field(default_factory=Images)
    """Samples that the network runs on: Images, Arrays or Texts."""
    storage: StoreConfig = dataclasses.field(default_factory=StoreConfig)
    """Positions, number format, memory."""
    group: PoseConfig | None = None
    """Keep the activations of every input in all poses of a group, such as `name = "D4"` in a
    table [group]; by default only of the input as it is."""
    out: Path = Path("store")
    """Folder of the store, or its address, such as s3://bucket/store. The same command continues
    an unfinished one."""

    def __post_init__(self) -> None:
        if not self.sites:
            raise ValueError("sites must name at least one site.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteRows:
    """Rows of one site of a store."""

    width: int
    """Numbers in a row."""
    rows: int
    """Rows to train on."""
    held_out_rows: int
    """Rows kept apart."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectResult(CommandResult):
    """Activation store that was collected."""

    samples: int
    """Samples that the network ran on."""
    skipped: int
    """Samples that could not be read."""
    sites: dict[str, SiteRows]
    """Rows of each site."""
    bytes: int
    """Size of all shards."""
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    """Positions of tokens without rows, by reason: padding, first, special, tokens."""
    outliers: dict[str, OutlierRows] = dataclasses.field(default_factory=dict)
    """Rows that are longer than ten median rows, of each site that has some."""


def run(config: CollectConfig, folder: RunFolder) -> CollectResult:
    """Collect activations into a store.

    Raises:
        UserError: See `mechatlas.activations.collect.collect`.
    """
    network = load_network(config.network)
    sites = find_sites(network, config.sites)
    samples = open_samples(config.samples, network, memory_mib=config.storage.memory_mib)
    n_poses = 1 if config.group is None else action_of(config.group).group.order
    folder.expect(
        lambda: of_collecting(network, samples, sites, config.storage, n_poses),
        is_long=len(samples) >= WORTH_MEASURING * config.storage.batch_size,
    )
    made_from = as_dict(dataclasses.replace(config, out=Path("store"), device="cpu"))
    made_from.pop("engine")
    with bar("collecting") as progress:
        store = collect_rows(
            network,
            samples,
            sites,
            folder.path,
            config.storage,
            group=config.group,
            recipe=made_from,
            device=config.device,
            engine=config.elsewhere(),
            reopen=functools.partial(_reopen, config, folders()),
            on_progress=progress,
        )
    rows = {name: store.rows(name) for name in store.sites}
    return CollectResult(
        samples=len(samples),
        skipped=len(store.manifest["skipped"]),
        sites={
            name: SiteRows(width=r.d_in, rows=r.n_rows, held_out_rows=r.n_held_out)
            for name, r in rows.items()
        },
        bytes=sum(shard.bytes for shard in store.shards),
        left_out=store.manifest.get("left_out", {}),
        outliers=store.manifest.get("outliers", {}),
    )


def _reopen(config: CollectConfig, beside: tuple[Path, ...]) -> tuple[nn.Module, SampleRecipe]:
    """Open network and samples again in a worker."""
    return reload_network(config.network, beside), config.samples


def in_words(result: CollectResult) -> str:
    """Sites with their rows, and the folder."""
    widths = ", ".join(f"{name} ({site.rows} rows)" for name, site in result.sites.items())
    skipped = f"; skipped {result.skipped} unreadable samples" if result.skipped else ""
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in result.left_out.items() if n)
    left_out = f"\nPositions left out: {reasons}." if reasons else ""
    return f"Collected {widths}{skipped}.{left_out}\nStore: {result.out}"
