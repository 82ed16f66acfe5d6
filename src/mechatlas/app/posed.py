"""A dictionary and a store of posed activations, read together.

    open_posed    two paths -> both, which must fit one another
    learn         decoder blocks, from all rows and from halves of the images, and linear maps
    said_of       what the dictionary makes of codes, in every pose
    measure       R2 of every pose on held-out rows, beside the baselines
    manifest_of   what a folder says of itself

A group crosscoder brings its own decoder blocks. For any other dictionary that reads the
untransformed block they are estimated from its codes. The two halves that the noise ceiling needs
are estimated from codes in both cases, each from half of the images.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mechatlas.activations.store import Store, StoreRows
from mechatlas.analysis.symmetry.baselines import PoseMapFit, PoseMaps, PoseR2
from mechatlas.analysis.symmetry.regression import CodeRegression
from mechatlas.app.progress import bar
from mechatlas.app.swapping import Held
from mechatlas.base import RecipeError, StoreError, WeightsError
from mechatlas.dictionaries.formats import load
from mechatlas.dictionaries.pose_tied import PoseTied
from mechatlas.files import read_json
from mechatlas.maths.groups import Group

BATCH = 4096
MAP_ROWS = 30_000
"""Rows that the linear maps of the baselines are learnt from."""


@dataclasses.dataclass(frozen=True, eq=False)
class Posed:
    """A dictionary and the posed rows that it belongs to."""

    dictionary: Any
    rows: StoreRows
    site: str
    group: Group
    described: dict[str, Any]
    """What the store's manifest says of the group and how it acts."""
    columns: slice
    """Of each block, those that the dictionary reads."""
    own_blocks: np.ndarray | None
    """Decoder blocks, if the dictionary writes all of them."""
    crops: int
    """Samples that were cut from one image, which must not lie in different halves."""

    @property
    def tied(self) -> bool:
        """Whether it reads all poses, with the same atoms."""
        return isinstance(self.dictionary, PoseTied)

    @property
    def d(self) -> int:
        """Channels of one block that the dictionary reads."""
        return self.dictionary.d_block if self.tied else self.dictionary.d_in

    @property
    def action(self) -> str:
        """How the group acts."""
        return str(self.described.get("action", ""))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes of rows of all blocks; those of features first."""
        start = self.group.identity * self.d
        return self.dictionary.encode(x if self.tied else x[:, start : start + self.d]).float()

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """All blocks of some rows, side by side, in the columns that the dictionary reads."""
        blocks = x.view(len(x), self.group.order, -1)[:, :, self.columns]
        return blocks.reshape(len(x), -1)


def open_posed(path: Path, root: Path, site: str | None) -> Posed:
    """The dictionary, the store and the group, which must fit one another.

    Args:
        path: Of the dictionary.
        root: Of the store.
        site: Of the store; by default the one that the dictionary was trained on.

    Raises:
        RecipeError: No site was named, and there are several.
        StoreError: The store has no group or no held-out rows, or its rows are of another width.
        WeightsError: The dictionary was trained for another group.
    """
    store = Store(root)
    group = store.group
    if group is None:
        raise StoreError(
            f"{root} holds activations of inputs as they are, in one pose each. Collect a "
            "store with a [group] in the recipe."
        )
    dictionary = load(path)
    manifest = manifest_of(path)
    site = site or manifest.get("site")
    if site is None and len(store.sites) > 1:
        raise RecipeError(
            f"{path} does not say which site it reads; name one of "
            f"{', '.join(store.sites)} with --site."
        )
    site = site or store.sites[0]
    named = store.rows(site)  # of a branch the columns of the untransformed input
    rows = store.rows(named.site)
    if rows.n_held_out < 2:
        raise StoreError(f"{root} has no held-out rows to measure on; collect with held_out > 0.")
    columns = named.channels if named.d_in < rows.d_in else slice(0, rows.d_in // group.order)
    own = _own_blocks(path, dictionary, manifest, store, site, columns.stop - columns.start)
    crops = int(store.manifest.get("recipe", {}).get("samples", {}).get("crops", 1))
    described = store.manifest["group"]
    return Posed(dictionary, rows, site, group, described, columns, own, crops)


def _own_blocks(
    path: Path,
    dictionary: Any,
    manifest: dict[str, Any],
    store: Store,
    site: str,
    d: int,
) -> np.ndarray | None:
    """Decoder blocks of a group crosscoder; None for a dictionary of the untransformed block.

    Raises:
        StoreError: The dictionary reads rows of another width.
        WeightsError: It writes blocks of another group.
    """
    here, there = store.manifest["group"], manifest.get("group") or {}
    order, tied = len(here["table"]), isinstance(dictionary, PoseTied)
    n_written = getattr(dictionary, "d_out", dictionary.d_in)
    wanted = (
        f"one pose of {site} in {store.root} has {d} ({order * d} for the {order} elements of "
        f"{here['name']})."
    )
    if (dictionary.d_block if tied else dictionary.d_in) != d:
        raise StoreError(f"{path} reads {dictionary.d_in} numbers, but {wanted}")
    table = dictionary.group.table.tolist() if tied else there.get("table")
    if table not in (None, here["table"]) or there.get("action") not in (None, here["action"]):
        name = there.get("name") or dictionary.group.name
        acting = f" ({there['action']})" if "action" in there else ""
        raise WeightsError(
            f"{path} was trained for {name}{acting}, but {store.root} was collected "
            f"with {here['name']} (order {order}, {here['action']})."
        )
    if tied:
        return dictionary.atoms.detach().float().cpu().numpy()
    if n_written not in (d, order * d):
        raise WeightsError(f"{path} writes {n_written} numbers, but {wanted}")
    if n_written == d or getattr(dictionary, "reads", slice(0, d)).start:
        return None
    atoms = dictionary.W_dec.detach().float().cpu().numpy()
    return atoms.reshape(len(atoms), order, d)


def manifest_of(path: Path) -> dict[str, Any]:
    """What the manifest in a folder says; nothing where there is none."""
    file = path / "manifest.json"
    return read_json(file) if file.is_file() else {}


@dataclasses.dataclass(frozen=True, eq=False)
class Learnt:
    """What the training rows say."""

    blocks: np.ndarray
    """(n_features, order, d)"""
    halves: np.ndarray
    """(2, n_features, order, d)"""
    intercept: np.ndarray | None
    """What is predicted where nothing is active, if blocks were estimated."""
    maps: PoseMaps
    rows: np.ndarray
    """In each half."""
    active: np.ndarray
    """Rows on which each latent was active."""


def learn(posed: Posed, seed: int) -> Learnt:
    """Blocks from all rows and from two halves of the images, and linear maps.

    Raises:
        InputError: A half has no rows.
        StoreError: A shard is damaged.
    """
    regression, maps = _read(posed, seed)
    order, d = posed.group.order, posed.d
    halves = np.stack([_as_blocks(posed, half) for half in regression.halves()])
    blocks, intercept, rows = posed.own_blocks, None, regression.rows
    if blocks is None:
        solved, intercept = regression.whole()
        blocks = solved.reshape(-1, order, d)
    active = regression.active.sum(axis=0)
    if posed.tied:
        rows, active = rows // order, active[: len(blocks)]
    return Learnt(blocks, halves, intercept, maps.solve(), rows, active)


def _as_blocks(posed: Posed, solved: np.ndarray) -> np.ndarray:
    """Estimates (feature, order, d). Of pose-tied ones there is a row for each block of an atom."""
    order, d = posed.group.order, posed.d
    return (
        solved.reshape(order, -1, d).swapaxes(0, 1) if posed.tied else solved.reshape(-1, order, d)
    )


@torch.no_grad()
def _read(posed: Posed, seed: int) -> tuple[CodeRegression, PoseMapFit]:
    """One pass over the training rows: codes against all poses, and linear maps.

    Raises:
        StoreError: A shard is damaged.
    """
    order, d = posed.group.order, posed.d
    width = d if posed.tied else order * d
    regression = CodeRegression(posed.dictionary.n_latents, width)
    maps = PoseMapFit(order, d, posed.group.identity, seed=seed)
    with bar("reading posed activations") as progress:
        done = 0
        for batch, where in posed.rows.scan():
            if int(batch.row[0]) >= posed.rows.n_rows:
                break
            x = posed.cut(batch.x)
            second = (where[:, 0].numpy() // posed.crops) % 2 == 1
            for i in range(0, len(x), BATCH):
                some = slice(i, i + BATCH)
                for codes, targets in _equations(posed, x[some]):
                    regression.add(codes, targets, second[some])
            if maps.n < MAP_ROWS:
                maps.add(x.numpy())
            done += len(x)
            progress(done, posed.rows.n_rows)
    return regression, maps


def _equations(posed: Posed, x: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Codes, and what they should add up to.

    Of a pose-tied dictionary x_g is the sum over k of the codes in pose k^-1 g times block k of
    the atoms: one equation for every block.
    """
    codes = posed.encode(x)
    if not posed.tied:
        yield codes, x
        return
    group, by_pose = posed.group, codes.view(len(x), posed.group.order, -1)
    for g in range(group.order):
        poses = group.table[group.inverses, g]
        yield by_pose[:, poses].flatten(1), x[:, g * posed.d : (g + 1) * posed.d]


@torch.no_grad()
def said_of(posed: Posed, learnt: Learnt, codes: torch.Tensor) -> torch.Tensor:
    """What a dictionary, or blocks that were estimated for it, make of codes in every pose."""
    if learnt.intercept is None:
        return posed.dictionary.decode(codes).float()
    weights = torch.from_numpy(learnt.blocks.reshape(len(learnt.blocks), -1))
    return codes @ weights + torch.from_numpy(learnt.intercept)


@torch.no_grad()
def measure(posed: Posed, learnt: Learnt) -> tuple[dict[str, list[float | None]], Held, int]:
    """R2 of every pose on held-out rows: of the dictionary and of the baselines; and their codes.

    Raises:
        StoreError: A shard is damaged.
    """
    explained, held = PoseR2(posed.group.order, posed.d), Held(posed.rows.shape.grid[1])
    for batch, where in posed.rows.scan():
        if int(batch.row[0]) < posed.rows.n_rows:
            continue
        for x, at in zip(posed.cut(batch.x).split(BATCH), where.split(BATCH), strict=True):
            codes = posed.encode(x)
            held.add(codes, at)
            said, rows = said_of(posed, learnt, codes).numpy(), x.numpy()
            explained.add(rows, dictionary=said, **learnt.maps.predict(rows))
    r2 = explained.r2()
    plain = {
        way: [None if np.isnan(v) else round(float(v), 6) for v in values]
        for way, values in r2.items()
    }
    return plain, held, explained.n
