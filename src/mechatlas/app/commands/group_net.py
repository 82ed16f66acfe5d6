"""Train a network on the table of a finite group.

    mechatlas train recipes/groups/s5.toml

`mechatlas train` does this with a recipe that names a group. The folder has `net.safetensors`
(`net_SEED.safetensors` for each of several seeds) and `table.npy`, which `mechatlas prove` reads;
with `--n-checkpoints N` also N files `step_STEP_net.safetensors`, the network during training.
"""

import dataclasses
import io
from pathlib import Path

import numpy as np

from mechatlas.analysis.proofs.group_training import GroupTrainingConfig, train_group_nets
from mechatlas.analysis.proofs.verifier.exact import brute_force_accuracy
from mechatlas.analysis.proofs.verifier.structures import Weights
from mechatlas.app.estimates import Estimate, of_work
from mechatlas.app.progress import bar
from mechatlas.app.run_folder import GROUP_NET, CommandResult, RunFolder
from mechatlas.base import RecipeError
from mechatlas.files import about
from mechatlas.maths.groups import Group
from mechatlas.maths.named_groups import group as named_group
from mechatlas.maths.named_groups import permutation_group
from mechatlas.tensorfiles import read_array

KIND = GROUP_NET
NET, TABLE = "net.safetensors", "table.npy"
LONG = 2_000_000
"""Steps of all networks, times the order of the group, from which on training is timed first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupNetConfig(GroupTrainingConfig):
    """Train a one-hidden-layer network on the whole table of a finite group."""

    group: str = ""
    """Name such as "S5", "PSL(2,7)" or "C2xC4", or a .npy file with a table."""
    generators: tuple[tuple[int, ...], ...] = ()
    """Permutations of 0 to degree - 1 that generate the group, instead of a name."""
    out: Path = Path("group_net")
    """Folder for net.safetensors, table.npy and result.json."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.group) == bool(self.generators):
            raise ValueError("give either group (a name or a .npy file) or generators.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupNetResult(CommandResult):
    """Accuracy of a network on the table of a group."""

    order: int
    """Order of the group."""
    width: int
    """Hidden neurons."""
    accuracy: float
    """Accuracy over all pairs, by brute force in float64; the least of all networks."""
    accuracies: list[float] = dataclasses.field(default_factory=list)
    """Accuracy of each network."""
    steps: int
    """Steps of Adam."""


def find_group(config: GroupNetConfig) -> Group:
    """Find the group that a recipe names.

    Raises:
        GroupError: There is no such group, or the table is not that of one.
        RecipeError: The generators are of different lengths.
        DiskError: The table cannot be read.
    """
    if config.generators:
        degrees = {len(row) for row in config.generators}
        if len(degrees) > 1:
            raise RecipeError(f"generators must be of one length, got {sorted(degrees)}.")
        return permutation_group(np.array(config.generators))[0]
    if config.group.endswith(".npy"):
        table = read_array(Path(config.group))
        with about(Path(config.group)):
            return Group(table)
    return named_group(config.group)


def run(config: GroupNetConfig, folder: RunFolder) -> GroupNetResult:
    """Train, measure the accuracy on all pairs, and write network and table.

    Raises:
        DiskError: The folder cannot be written.
        GroupError: See `find_group`.
    """
    group = find_group(config)
    table = np.asarray(group.table)
    is_long = config.n_seeds * config.steps * group.order >= LONG
    folder.expect(lambda: _estimate(config, table), is_long=is_long)

    def keep(step: int, nets: list[Weights]) -> None:
        for seed, weights in enumerate(nets, start=config.seed):
            folder.tensors(checkpoint_file(config, seed, step), weights._asdict())

    with bar("training") as progress:
        nets = train_group_nets(table, config, on_checkpoint=keep, on_progress=progress)
    packed = io.BytesIO()
    np.save(packed, table)
    folder.facts(group=group.name)
    folder.file(TABLE, packed.getvalue())
    for seed, weights in enumerate(nets, start=config.seed):
        folder.tensors(net_file(config, seed), weights._asdict())
    accuracies = [brute_force_accuracy(*w, group.table, dtype=np.float64) for w in nets]
    return GroupNetResult(
        order=group.order,
        width=config.width,
        accuracy=min(accuracies),
        accuracies=accuracies,
        steps=config.steps,
    )


def _estimate(config: GroupNetConfig, table: np.ndarray) -> Estimate:
    """Estimate the training from its first steps."""
    n, width, n_nets = len(table), config.width, config.n_seeds
    written = 3 * n * width * (1 + config.n_checkpoints)
    learned = 2 * config.embedding_width * (n + width) + n * width
    passed = min(config.batch_size, n * n) * 4 * (n + width)
    return of_work(
        [lambda progress: train_group_nets(table, config, on_progress=progress)],
        memory=4 * n_nets * (4 * learned + passed),  # Adam has two moments
        disk=4 * n_nets * written,
    )


def net_file(config: GroupNetConfig, seed: int) -> str:
    """Name of the file with the network of a seed; a single network needs no number."""
    return NET if config.n_seeds == 1 else f"net_{seed}.safetensors"


def checkpoint_file(config: GroupNetConfig, seed: int, step: int) -> str:
    """Name of the file with the network of a seed after some steps."""
    return f"step_{step}_{net_file(config, seed)}"


def in_words(result: GroupNetResult) -> str:
    """Accuracy, cost, and the command that proves it."""
    out = Path(result.out)
    several = len(result.accuracies) > 1
    nets = f"{len(result.accuracies)} networks, the worst with accuracy" if several else "Accuracy"
    net = f"net_SEED{Path(NET).suffix}" if several else NET
    return (
        f"{nets} {result.accuracy:.4%} on all {result.order**2:,} pairs after {result.steps} "
        f"steps ({result.seconds:.0f} s of CPU time).\n"
        f"Try: mechatlas prove {out / net} --table {out / TABLE} --out {out / 'proof'}"
    )
