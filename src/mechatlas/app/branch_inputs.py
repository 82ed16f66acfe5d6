"""Inputs of `mechatlas branches`: a dictionary with the rows and branches of its site, and matches.

open_site       a dictionary -> the rows of its site, and its branches
read_labels     FILE.parquet:COLUMN -> a label for each feature
open_matches    the folder of a matching -> matched features of neighbors
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from mechatlas.activations.store import Store, StoreRows
from mechatlas.app.feature_labels import names_of
from mechatlas.app.inputs import checksum_of, open_dictionary, refuse_other_network
from mechatlas.app.run_folder import MATCHES, MATCHING, RunFolder
from mechatlas.base import DiskError, InputError, RecipeError, StoreError
from mechatlas.files import MANIFEST, Fields, checksum_file, read_manifest
from mechatlas.maths.arrays import Channels
from mechatlas.tensorfiles import read_table


@dataclasses.dataclass(frozen=True, eq=False)
class BranchSite:
    """A dictionary with the rows and branches of its site."""

    dictionary: Any
    """A `Dictionary` on the CPU."""
    rows: StoreRows
    branches: dict[str, Channels]

    def read(self, n_rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """First rows of the store, with the sample of each; they are stored shuffled."""
        missing = min(n_rows, self.rows.n_rows + self.rows.n_held_out)
        for batch, where in self.rows.scan():
            if missing <= 0:
                return
            yield batch.x[:missing], where[:missing, 0].long()
            missing -= min(missing, len(batch.x))


@dataclasses.dataclass(frozen=True, eq=False)
class NeighborMatch:
    """Matched features of two dictionaries, one of which is the dictionary tested."""

    names: tuple[str, str]
    sites: tuple[BranchSite | None, BranchSite | None]
    """Sites of the two dictionaries; None for the one that is tested."""
    latent_a: Int[np.ndarray, " pair"]
    latent_b: Int[np.ndarray, " pair"]
    matched: Bool[np.ndarray, " pair"]
    """Whether the match of each pair is significant."""


def open_site(path: Path, site: str | None, store: Store, folder: RunFolder) -> BranchSite:
    """Open a dictionary and find the branches of its site.

    Args:
        path: Folder or file of the dictionary.
        site: Site that it reads, if it does not say so.
        store: Store that has the site.
        folder: Folder that notes the checksum of the dictionary.

    Raises:
        InputError: It reads one branch only.
        RecipeError: Its site is not known, or another than `site`.
        StoreError: The store misses the site, or the site has no branches, or another width.
    """
    opened = open_dictionary(path, site=site)
    refuse_other_network(opened, store)
    name, dictionary = opened.site_in(store), opened.dictionary
    rows = store.rows(name)
    if rows.d_in != rows.shape.width:
        raise InputError(
            f"{path} reads the branch {name} alone, so all of every feature is in that branch "
            f"and there is nothing to compare. Give a dictionary of {rows.site}; to find the "
            "features of a branch in it, use `mechatlas match`."
        )
    if not rows.shape.channels:
        have = [name for name, shape in store.shapes.items() if shape.channels]
        raise StoreError(
            f"{name} has no named branches. Sites of {store.root} that have some: "
            f"{', '.join(have) or 'none'}."
        )
    if dictionary.d_in != rows.d_in or dictionary.d_out != rows.d_in:
        raise StoreError(
            f"{store.root} has {rows.d_in} numbers a row at {rows.site}; {path} reads "
            f"{dictionary.d_in} and writes {dictionary.d_out}."
        )
    folder.parent(str(path.resolve()), opened.checksum)
    return BranchSite(dictionary, rows, rows.shape.channels)


def read_labels(text: str, dictionary: Path, n: int, folder: RunFolder) -> list[Any]:
    """Read one label for each feature.

    Args:
        text: FILE.parquet:COLUMN, or a labels.json that the page saved.
        dictionary: Folder of the dictionary.
        n: Number of features.
        folder: Folder that notes the checksum of the file.

    Raises:
        DiskError: The file cannot be read.
        RecipeError: There is no such column, or it does not fit the features.
    """
    if text.endswith(".json"):
        names = names_of(Path(text), dictionary, n)
        folder.parent("labels", checksum_file(Path(text)))
        return names
    path, _, column = text.rpartition(":")
    if not path or not column:
        raise RecipeError(f"--labels must be FILE.parquet:COLUMN or labels.json, got {text!r}.")
    table = _parquet(Path(path), "labels", folder)
    if column not in table:
        raise RecipeError(f"{path} has no column {column!r}. It has {', '.join(table)}.")
    values = table[column].to_pylist()
    if "feature" not in table:
        if len(values) != n:
            raise RecipeError(f"{path} has {len(values)} rows, the dictionary {n} features.")
        return values
    labels: dict[Any, Any] = {}
    for feature, value in zip(table["feature"].to_pylist(), values, strict=True):
        if feature not in range(n):
            raise RecipeError(f"{path} names feature {feature}; the dictionary has {n}.")
        if feature in labels and labels[feature] != value:
            raise RecipeError(
                f"{path} gives feature {feature} several labels, {labels[feature]!r} and "
                f"{value!r}; each may have one."
            )
        labels[feature] = value
    return [labels.get(feature) for feature in range(n)]


def _parquet(path: Path, name: str, folder: RunFolder) -> dict[str, Any]:
    """Columns of a parquet file, whose checksum is noted."""
    table = read_table(path)
    folder.parent(name, checksum_file(path))
    return dict(zip(table.column_names, table.columns, strict=True))


def open_matches(
    match: Path, dictionary: Path, store: Store, folder: RunFolder
) -> list[NeighborMatch]:
    """Open the matches of a dictionary with its neighbors.

    Args:
        match: Folder of the matching.
        dictionary: Dictionary that is tested.
        store: Store that has the sites of all dictionaries.
        folder: Folder that notes the checksums of the matching and the neighbors.

    Raises:
        DiskError: The folder holds no finished matching.
        RecipeError: It does not have the dictionary, compared channels with channels, or a
            dictionary has changed since.
    """
    manifest = read_manifest(match / MANIFEST)
    if manifest.get("kind") != MATCHING or not manifest.get("complete", True):
        raise DiskError(
            f"{match} is no finished matching. Name the folder that `mechatlas match` wrote."
        )
    fields = Fields(match / MANIFEST, manifest)
    cost, listed = fields.part("settings").text("cost"), manifest.get("dictionaries")
    if not isinstance(listed, list) or not all(isinstance(path, str) for path in listed):
        raise fields.wrong("dictionaries", "a list of paths")
    if cost != "codes":
        raise RecipeError(
            f"{match} was matched with --cost {cost}, which compares channel with channel "
            "and so puts partners into the same branch by itself. Match with --cost codes and a "
            "paired store."
        )
    paths, own = [Path(path) for path in listed], dictionary.resolve()
    if own not in paths:
        raise RecipeError(
            f"{match} does not match {dictionary}. It has {', '.join(map(str, paths))}."
        )
    table = _parquet(match / MATCHES, "matches", folder)
    columns = {name: table[name].to_numpy() for name in ("pair", "latent_a", "latent_b", "matched")}
    matches = []
    for number in range(len(paths) - 1):
        two = paths[number], paths[number + 1]
        if own in two:
            for path in two:
                if checksum_of(path) not in manifest.get("parents", {}).values():
                    raise RecipeError(f"{path} has changed since {match} was made. Match again.")
            mine = columns["pair"] == number
            a, b = (None if p == own else open_site(p, None, store, folder) for p in two)
            pairs = (columns[name][mine] for name in ("latent_a", "latent_b", "matched"))
            matches.append(NeighborMatch((two[0].name, two[1].name), (a, b), *pairs))
    return matches
