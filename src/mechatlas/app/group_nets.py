"""`mechatlas train` with a recipe that names a group: a network on the group's table.

GroupNetConfig   the recipe
GroupNetResult   order, width, accuracy
train            recipe -> folder with net.safetensors, table.npy and result.json
"""

import dataclasses
import io
import time
import tomllib
from pathlib import Path

import numpy as np

from mechatlas.analysis.proofs.group_training import GroupTrainingConfig, train_group_net
from mechatlas.analysis.proofs.verifier.exact import brute_force_accuracy
from mechatlas.app.progress import bar
from mechatlas.app.run_folder import finish, refuse_strangers, write_tensors
from mechatlas.base import RecipeError
from mechatlas.files import checksum, write, write_json
from mechatlas.maths.group_constructions import permutation_group
from mechatlas.maths.groups import Group
from mechatlas.maths.named_groups import group as named_group

KIND = "group_net"
NET, TABLE = "net.safetensors", "table.npy"


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
class GroupNetResult:
    """Accuracy of a network on the table of a group."""

    order: int
    """Order of the group."""
    width: int
    """Hidden neurons."""
    accuracy: float
    """Accuracy over all pairs, by brute force in float64."""
    steps: int
    """Steps of Adam."""
    out: str = ""
    """Folder of the run; not in the file."""
    seconds: float = 0.0
    """Process CPU seconds of the command."""
    peak_bytes: int = 0
    """Largest resident memory of the process."""


def is_recipe(words: list[str]) -> bool:
    """Whether the first word is a recipe that names a group; damaged files are for others."""
    if not words or not words[0].endswith(".toml"):
        return False
    try:
        raw = tomllib.loads(Path(words[0]).read_text())
    except (OSError, ValueError):
        return False
    return "group" in raw or "generators" in raw


def find_group(recipe: GroupNetConfig) -> Group:
    """The group that a recipe names.

    Raises:
        GroupError: There is no such group, or the table is not that of one.
        RecipeError: The table cannot be read.
    """
    if recipe.generators:
        degrees = {len(row) for row in recipe.generators}
        if len(degrees) > 1:
            raise RecipeError(f"generators must be of one length, got {sorted(degrees)}.")
        return permutation_group(np.array(recipe.generators))[0]
    if recipe.group.endswith(".npy"):
        try:
            return Group(np.load(recipe.group, allow_pickle=False))
        except (OSError, EOFError) as error:
            raise RecipeError(f"{recipe.group} cannot be read ({error}).") from error
    return named_group(recipe.group)


def train(recipe: GroupNetConfig) -> GroupNetResult:
    """Train, measure the accuracy on all pairs, and write the folder.

    Raises:
        DiskError: The folder holds something else.
        GroupError: See `find_group`.
    """
    clock = time.process_time()
    group = find_group(recipe)
    refuse_strangers(recipe.out, KIND)
    with bar("training") as progress:
        weights = train_group_net(np.asarray(group.table), recipe, on_progress=progress)
    packed = io.BytesIO()
    np.save(packed, np.asarray(group.table))
    write(recipe.out / TABLE, packed.getvalue())
    net = write_tensors(recipe.out / NET, weights._asdict())
    files = {NET: checksum(net), TABLE: checksum(packed.getvalue())}
    manifest = {"schema": 1, "kind": KIND, "group": group.name, "files": files}
    write_json(recipe.out / "manifest.json", manifest)
    values = {
        "order": group.order,
        "width": recipe.width,
        "accuracy": brute_force_accuracy(*weights, group.table, dtype=np.float64),
        "steps": recipe.steps,
    }
    return GroupNetResult(**finish(recipe.out, recipe, values, clock))


def in_words(result: GroupNetResult) -> str:
    """Accuracy, cost, and the command that proves it."""
    out = Path(result.out)
    return (
        f"Accuracy {result.accuracy:.4%} on all {result.order**2:,} pairs after {result.steps} "
        f"steps ({result.seconds:.0f} s of CPU time).\n"
        f"Try: mechatlas prove {out / NET} --table {out / TABLE} --out {out / 'proof'}"
    )
