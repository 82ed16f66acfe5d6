"""`mechatlas train` with a recipe that names a group: a network on the group's table.

GroupNetConfig   the recipe
train        recipe -> folder with net.safetensors, table.npy and result.json
"""

import dataclasses
import io
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from safetensors.numpy import save

from mechatlas.analysis.proofs.group_training import GroupTrainingConfig, train_group_net
from mechatlas.analysis.proofs.verifier.exact import brute_force_accuracy
from mechatlas.app.progress import bar
from mechatlas.app.run_folder import refuse_strangers
from mechatlas.base import RecipeError
from mechatlas.files import checksum, write, write_json
from mechatlas.maths.group_constructions import permutation_group
from mechatlas.maths.groups import Group
from mechatlas.maths.named_groups import group as named_group

NET, TABLE = "net.safetensors", "table.npy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupNetConfig(GroupTrainingConfig):
    """Train a one-hidden-layer network on the whole table of a finite group."""

    group: str = ""
    """A name such as "S5", "PSL(2,7)" or "C2xC4", or a .npy file with a table."""
    generators: tuple[tuple[int, ...], ...] = ()
    """Permutations of 0 to degree - 1 that generate the group, instead of a name."""
    out: Path = Path("group_net")
    """Folder for net.safetensors, table.npy and result.json."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.group) == bool(self.generators):
            raise ValueError("give either group (a name or a .npy file) or generators.")


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


def train(recipe: GroupNetConfig) -> dict[str, Any]:
    """Train, measure on all pairs, and write the folder.

    Raises:
        DiskError: The folder holds something else.
        GroupError: See `find_group`.
    """
    clock = time.process_time()
    group = find_group(recipe)
    refuse_strangers(recipe.out, "group_net")
    with bar("training") as progress:
        weights = train_group_net(np.asarray(group.table), recipe, on_progress=progress)
    accuracy = brute_force_accuracy(*weights, group.table, dtype=np.float64)
    left, right, unembed = weights
    arrays: dict[str, np.ndarray] = {"left": left, "right": right, "unembed": unembed}
    data = save(arrays)
    table = io.BytesIO()
    np.save(table, np.asarray(group.table))
    write(recipe.out / NET, data)
    write(recipe.out / TABLE, table.getvalue())
    fields = dataclasses.asdict(recipe) | {"out": str(recipe.out)}
    fields = {k: v for k, v in fields.items() if v not in ("", ())}
    write(recipe.out / "recipe.toml", tomli_w.dumps(fields).encode())
    files = {NET: checksum(data), TABLE: checksum(table.getvalue())}
    manifest = {"schema": 1, "kind": "group_net", "group": group.name, "files": files}
    write_json(recipe.out / "manifest.json", manifest)
    result = {
        "order": group.order,
        "width": recipe.width,
        "accuracy": accuracy,
        "steps": recipe.steps,
        "seconds": round(time.process_time() - clock, 3),
    }
    write_json(recipe.out / "result.json", result)
    return {"out": str(recipe.out), **result}


def in_words(result: dict[str, Any]) -> str:
    """What was trained."""
    return (
        f"Accuracy {result['accuracy']:.4%} on all {result['order'] ** 2:,} pairs after "
        f"{result['steps']} steps ({result['seconds']:.0f} s of CPU time).\n"
        f"Try: mechatlas prove {result['out']}/{NET} --table {result['out']}/{TABLE} "
        f"--out {result['out']}/proof"
    )
