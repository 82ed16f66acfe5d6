"""Train a dictionary on the activations of a site, from a store or straight from a network.

    mechatlas train recipes/quick/train.toml --steps 500
    torchrun --nproc-per-node 2 -m mechatlas train recipes/quick/train.toml

The folder has the weights and `history.json`, the training curve. An interrupted run is continued
by the same command. Processes of `torchrun` share out the latents of one dictionary, each with a
file of its own. A recipe that names a group trains a network on the group's table instead.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch.distributed as dist

from mechatlas.activations.images import Images
from mechatlas.activations.networks import Network, digest, load_network
from mechatlas.activations.positions import Positions
from mechatlas.activations.samples import SampleRecipe
from mechatlas.activations.store import PairedRows, Store
from mechatlas.activations.stream import stream
from mechatlas.app.engines import n_processes
from mechatlas.app.estimates import WORTH_MEASURING, Estimate, of_training
from mechatlas.app.progress import bar
from mechatlas.app.run_folder import (
    CHECKPOINT,
    DICTIONARY,
    HISTORY,
    CommandResult,
    DeviceConfig,
    RunFolder,
)
from mechatlas.base import RecipeError, Rows
from mechatlas.devices import as_device
from mechatlas.dictionaries.autoencoder import (
    Autoencoder,
    Crosscoder,
    LinearCoder,
    SparseCoder,
    Transcoder,
)
from mechatlas.dictionaries.engine.shard_files import SHARDS
from mechatlas.dictionaries.formats import FILE, save
from mechatlas.dictionaries.objective import Objective, Schedule
from mechatlas.dictionaries.pose_tied import PoseTied
from mechatlas.dictionaries.revival import AuxK, Resample
from mechatlas.dictionaries.sharded import Shard, mesh_of
from mechatlas.dictionaries.sparsity import Sparsity, TopK
from mechatlas.dictionaries.training import HELD_OUT_ROWS, default_rate
from mechatlas.dictionaries.training import train as train_dictionary
from mechatlas.maths.groups import Group
from mechatlas.maths.outliers import OUTLIER_NORMS
from mechatlas.ranges import COUNT, SEED, check_ranges

KIND = DICTIONARY
MANY_DEAD = 0.25
"""Share of dead latents above which the command says what keeps them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Network and samples whose activations a dictionary is trained on without a store."""

    network: Network
    """Network and its weights."""
    samples: SampleRecipe = dataclasses.field(default_factory=Images)
    """Samples that the network runs on: Images, Arrays or Texts."""
    positions: Positions | None = None
    """Positions of a sample that are kept; by default all that `collect` does not leave out."""
    held_out: float = 0.05
    """Fraction of the samples that is never trained on."""
    batch_size: int = 16
    """Samples in one forward pass."""
    pool_mib: int = 512
    """Memory for the rows that are shuffled together, in MiB."""

    def __post_init__(self) -> None:
        check_ranges(self, held_out="(0, 1)", batch_size=COUNT, pool_mib=COUNT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(DeviceConfig):
    """Train one dictionary on the activations of one site."""

    store: Path | None = None
    """Activation store to read, as written by `mechatlas collect`; a folder or its address."""
    source: SourceConfig | None = None
    """Network and samples to read in place of a store, in tables [source.network] and
    [source.samples]."""
    site: str | None = None
    """Site of the store that is read, or a branch of it; may be left out if there is one only."""
    writes: tuple[str, ...] = ()
    """Sites that are written, if not the one read: one makes a transcoder, several a crosscoder,
    which reads all of them if `site` is left out. The store must be collected as paired."""
    out: Path = Path("dictionary")
    """Folder for the weights, the recipe and the training curve, or its address."""
    n_latents: int = 4096
    """Size of the dictionary."""
    sparsity: Sparsity = dataclasses.field(default_factory=TopK)
    """Sparsity rule: TopK, BatchTopK, ReLU, JumpReLU or Gated."""
    tied: bool = False
    """Tied weights: the encoder is the transpose of the decoder."""
    pose_tied: bool = False
    """Pose-tied dictionary for a store with a group: few atoms in all poses and one encoder for
    every pose, instead of a crosscoder that reads the input as it is and writes all poses."""
    matryoshka_widths: tuple[int, ...] = ()
    """Numbers of leading latents that must explain the activations on their own (Matryoshka)."""
    steps: int = 20_000
    """Optimizer steps."""
    batch_size: int = 4096
    """Rows in a step."""
    lr: float | None = None
    """Largest learning rate of Adam; by default 0.06 over the root of the columns written in a run
    of 1,600 steps, and more in shorter ones."""
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    """Schedule of the learning rate and of the sparsity warm-up."""
    objective: Objective = dataclasses.field(default_factory=Objective)
    """Squared error that is minimized, and the limit of its gradient."""
    revival: AuxK | Resample | None = None
    """Revival of dead latents, such as `k = 256` in a table [revival]; by default none."""
    outlier_norms: float = OUTLIER_NORMS
    """Median norms beyond which a row is neither trained on nor counted; `inf` keeps all rows."""
    row_processes: int = 1
    """Processes of torchrun, a divisor of their number, that share out the rows of a batch; the
    others share out the latents."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints. The same command continues a run that was stopped."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of atoms, encoder and their moments: float32, or bfloat16, rounded at random,
    in half the memory of a GPU (docs/gpu.md says what it costs)."""
    seed: int = 0
    """Seed of the weights and of the order of batches."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            n_latents=f"[1, {2**26}]",
            matryoshka_widths=COUNT,
            steps=COUNT,
            batch_size=COUNT,
            lr="(0, 1000]",
            outlier_norms="(0, inf]",
            checkpoint_every=COUNT,
            row_processes=COUNT,
            seed=SEED,
        )
        if (self.store is None) == (self.source is None):
            raise ValueError("give either a store, or a table [source] with network and samples.")
        if self.source is not None and None in self.sites:
            raise ValueError("a [source] needs the `site` of the network to read.")
        if len(self.writes) == 1 and (self.tied or self.site in (None, *self.writes)):
            raise ValueError(
                f"A transcoder to {self.writes[0]} needs another site to read, and cannot be tied."
            )
        if self.pose_tied and (self.writes or self.tied or self.matryoshka_widths or self.revival):
            raise ValueError("pose_tied goes without writes, tied, matryoshka_widths and revival.")
        if not self.pose_tied:
            self.build(dict.fromkeys(self.sites, 1))  # refuses what cannot be

    @property
    def sites(self) -> tuple[str | None, ...]:
        """Sites whose columns make up a row."""
        return (self.site, *self.writes) if len(self.writes) < 2 else self.writes

    def build(self, widths: dict[str | None, int], group: Group | None = None) -> SparseCoder:
        """The dictionary, for sites of these widths.

        Args:
            widths: Width of each site.
            group: That of the store, if its rows hold a block for every element.

        Raises:
            ValueError: It cannot be built as asked.
        """
        options: dict[str, Any] = {
            "n_latents": self.n_latents,
            "sparsity": self.sparsity,
            "matryoshka_widths": self.matryoshka_widths,
            "seed": self.seed,
        }
        if group is not None:
            return self._of_group(group, widths[self.site], options)
        if self.pose_tied:
            raise ValueError("pose_tied needs a store that was collected with a [group].")
        if not self.writes:
            return Autoencoder(d_in=widths[self.site], tied=self.tied, **options)
        if len(self.writes) == 1:
            return Transcoder(d_in=widths[self.site], d_out=widths[self.writes[0]], **options)
        written = {site: widths[site] for site in self.writes}
        return Crosscoder(widths=written, reads=self.site, tied=self.tied, **options)

    def _of_group(self, group: Group, width: int, options: dict[str, Any]) -> SparseCoder:
        """Build a dictionary of all poses, which reads one block or, pose-tied, all."""
        if self.writes or self.tied:
            raise ValueError("A dictionary of a store with a group goes without writes and tied.")
        if self.pose_tied:
            del options["matryoshka_widths"]
            return PoseTied(group=group, d_in=width, **options)
        names = group.element_names
        if len(set(names)) < group.order:
            names = tuple(map(str, range(group.order)))
        widths = dict.fromkeys(names, width // group.order)
        return Crosscoder(widths=widths, reads=names[0], **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult(CommandResult):
    """Dictionary that was trained, measured on held-out rows."""

    fvu: float
    """Fraction of variance unexplained, without outlier rows."""
    l0: float
    """Mean number of active latents of a row."""
    dead_share: float
    """Share of the latents that were active on none of the last rows trained on."""
    steps: int
    """Steps of the optimizer."""
    seconds_per_step: float
    """Median wall seconds of a step."""
    d_in: int
    """Width of the rows that are read."""
    d_out: int
    """Width of the rows that are written."""
    n_latents: int
    """Latents of the dictionary."""
    rows: int
    """Rows to train on."""
    held_out_rows: int
    """Rows kept apart."""
    fvu_median: float | None = None
    """Median over held-out rows of the fraction unexplained of the row's squared distance from
    the mean."""
    fvu_with_outliers: float | None = None
    """Fraction of variance unexplained on all held-out rows, outlier rows included."""
    lr: float | None = None
    """Largest learning rate of Adam."""


def run(config: TrainConfig, folder: RunFolder) -> TrainResult:
    """Train a dictionary on one site of a store or network.

    Raises:
        RecipeError: The dictionary does not suit the rows.
        UserError: See `mechatlas.dictionaries.training.train`.
    """
    data = _open(config)
    rows = data.rows
    try:
        dictionary = _build(config, data)
    except ValueError as error:
        raise RecipeError(f"{data.name}: {error}") from error
    if n_processes() == 1:
        is_long = config.steps >= 10 * WORTH_MEASURING
        folder.expect(lambda: _estimate(config, data), is_long=is_long)
    with bar("training") as progress:
        train_dictionary(
            dictionary,
            rows,
            steps=config.steps,
            **_options(config),
            checkpoint=folder.path / CHECKPOINT,
            checkpoint_every=config.checkpoint_every,
            on_progress=progress,
        )
    history = dictionary.history
    assert history is not None
    folder.facts(writes=list(config.writes), **data.facts)
    if data.store is not None:
        folder.parent("store", data.store.digest)
    folder.begin()
    save(dictionary.cpu(), folder.path)
    if isinstance(dictionary, Shard):
        dist.barrier()
    for name in dictionary.file_names if isinstance(dictionary, Shard) else (FILE,):
        folder.note(name)
    folder.json(HISTORY, history)
    return TrainResult(
        fvu=history.fvu[-1],
        l0=history.l0[-1],
        dead_share=history.dead_share[-1],
        steps=config.steps,
        seconds_per_step=sorted(history.seconds_per_step)[len(history.step) // 2],
        d_in=dictionary.d_in,
        d_out=dictionary.d_out,
        n_latents=config.n_latents,
        rows=rows.n_rows,
        held_out_rows=data.n_held_out,
        fvu_median=history.fvu_median[-1],
        fvu_with_outliers=history.fvu_with_outliers[-1],
        lr=config.lr or default_rate(dictionary, config.steps),
    )


def _build(config: TrainConfig, data: "_Data") -> SparseCoder:
    """Build the dictionary, or the share of it that this process of `torchrun` has.

    One process has all of it, and goes on from a checkpoint of several.
    """
    if n_processes() == 1 and not (config.out / CHECKPOINT / SHARDS).is_file():
        return config.build(data.widths, data.group)
    mesh = mesh_of(n_data=config.row_processes, device=as_device(config.device).type)
    least = getattr(config.sparsity, "k", 1)  # of its form only the widths count
    like = dataclasses.replace(config, n_latents=least, matryoshka_widths=())
    coder = like.build(data.widths, data.group)
    if config.matryoshka_widths or not isinstance(coder, LinearCoder):
        raise RecipeError(
            "Processes of torchrun share out dictionaries without matryoshka_widths and pose_tied."
        )
    return Shard(coder, config.n_latents, mesh)


def _options(config: TrainConfig) -> dict[str, Any]:
    """Options of a step of training."""
    names = (
        "batch_size", "lr", "seed", "device", "schedule", "objective", "revival", "outlier_norms",
        "dtype",
    )  # fmt: skip
    return {name: getattr(config, name) for name in names}


def estimate(config: TrainConfig) -> Estimate:
    """Estimate the cost of the command.

    Raises:
        UserError: As `run`.
    """
    return _estimate(config, _open(config))


def _estimate(config: TrainConfig, data: "_Data") -> Estimate:
    dictionary = config.build(data.widths, data.group)
    rows = data.rows.held_out(HELD_OUT_ROWS).x
    options = _options(config)
    return of_training(dictionary, rows, config.steps, options, seconds_a_row=data.seconds_a_row)


def _open(config: TrainConfig) -> "_Data":
    return _from_store(config) if config.source is None else _from_network(config, config.source)


class _Data(NamedTuple):
    """Rows to train on, and what is known of them."""

    rows: Rows
    n_held_out: int
    widths: dict[str | None, int]
    """Width of each site of the configuration."""
    name: str
    """Name of the source for messages."""
    facts: dict[str, Any]
    """Entries of the manifest."""
    group: Group | None = None
    """Group of the store, if its rows hold a block for every element."""
    store: Store | None = None
    seconds_a_row: float = 0.0
    """Seconds in which the network gives a row."""


def _from_store(config: TrainConfig) -> _Data:
    """Open the rows of a store."""
    assert config.store is not None
    store = Store(config.store)
    rows = (
        store.paired([s for s in config.sites if s]) if config.writes else store.rows(config.site)
    )
    parts = rows.rows if isinstance(rows, PairedRows) else [rows]
    # A branch has one block only, that of the untransformed input.
    group = store.group if parts[0].d_in == parts[0].shape.width else None
    facts = {
        "site": config.site or (config.writes or store.sites)[0],
        "store": str(config.store.resolve()),
        "network": store.manifest["network"],
    }
    if group is not None:
        facts["group"] = store.manifest["group"]
    widths = {site: part.d_in for site, part in zip(config.sites, parts, strict=True)}
    return _Data(rows, rows.n_held_out, widths, str(config.store), facts, group, store)


def _from_network(config: TrainConfig, source: SourceConfig) -> _Data:
    """Open rows that are read from a network while a dictionary is trained on them."""
    network = load_network(source.network)
    sites = [site for site in config.sites if site is not None]
    rows = stream(
        network,
        source.samples,
        sites,
        positions=source.positions,
        held_out=source.held_out,
        batch_size=source.batch_size,
        pool_mib=source.pool_mib,
        seed=config.seed,
        device=config.device,
    )
    start = time.perf_counter()
    n_held_out = len(rows.held_out(HELD_OUT_ROWS).row)
    seconds_a_row = (time.perf_counter() - start) / max(1, n_held_out)
    widths = {s: p.stop - p.start for s, p in zip(config.sites, rows.parts, strict=True)}
    facts = {"site": str(rows.sites[0]), "network": digest(network)}
    name = f"The network {source.network.name}"
    return _Data(rows, n_held_out, widths, name, facts, seconds_a_row=seconds_a_row)


def in_words(result: TrainResult) -> str:
    """Quality on held-out rows, and the folder."""
    outliers = result.fvu_with_outliers
    others = f" ({outliers:.4f} with outlier rows)" if outliers not in (None, result.fvu) else ""
    quality = f"fvu {result.fvu:.4f}{others}, l0 {result.l0:.1f}, dead {result.dead_share:.1%}"
    words = [f"Held out: {quality}."]
    if result.dead_share > MANY_DEAD and result.lr is not None:
        words.append(
            "Fewer latents die at a smaller learning rate, which may explain less "
            f"(`--lr {result.lr / 2:.2g}`), or with a table [revival] in the recipe."
        )
    return "\n".join([*words, f"Dictionary: {result.out}"])
