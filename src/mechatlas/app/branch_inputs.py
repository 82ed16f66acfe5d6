"""Inputs of `mechatlas branches`: a dictionary with the rows and branches of its site, and matches.

open_site       a dictionary -> the rows of its site, and its branches or components
read_labels     FILE.parquet:COLUMN -> a label for each feature
open_matches    the folder of a matching -> matched features of neighbors
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechatlas.activations.components import LayerComponents, decompose_layer
from mechatlas.activations.positions import Positions, TokenSamples, left_out
from mechatlas.activations.samples import Samples
from mechatlas.activations.store import Store, StoreRows
from mechatlas.activations.store_manifest import Split
from mechatlas.app.feature_labels import names_of
from mechatlas.app.inputs import checksum_of, open_dictionary, open_network, refuse_other_network
from mechatlas.app.recipes import TrustConfig
from mechatlas.app.run_folder import MATCHES, MATCHING, RunFolder
from mechatlas.base import DiskError, InputError, RecipeError, Site, SiteError, StoreError
from mechatlas.files import MANIFEST, Fields, checksum_file, read_manifest
from mechatlas.maths.arrays import Channels
from mechatlas.tensorfiles import read_table

SPLITS: tuple[Split, ...] = get_args(Split)
SAMPLES_AT_ONCE = 8
"""Samples that a network runs on at once where components are read."""


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
class ComponentSite:
    """A dictionary of the residual stream after a layer, with the components of that sum."""

    dictionary: Any
    """A `Dictionary` on the CPU."""
    rows: StoreRows
    layer: LayerComponents
    samples: Samples
    numbers: list[int]
    """Samples of the store."""

    @property
    def branches(self) -> dict[str, Channels]:
        """Place of each component where all are side by side."""
        d = self.dictionary.d_in
        return {n: slice(k * d, (k + 1) * d) for k, n in enumerate(self.layer.names)}

    def blocks(
        self, n_rows: int
    ) -> Iterator[tuple[Float[Tensor, "component row d"], Int[Tensor, " row"]]]:
        """Components of the rows of the first samples, with the sample of each row."""
        missing, rule = n_rows, Positions.of_store(self.rows.store.manifest)
        for start in range(0, len(self.numbers), SAMPLES_AT_ONCE):
            if missing <= 0:
                return
            now = self.numbers[start : start + SAMPLES_AT_ONCE]
            found = self.layer.read(self.samples.stack([self.samples.read(i) for i in now]))
            kept = torch.ones(found.shape[1:3], dtype=torch.bool)
            if isinstance(self.samples, TokenSamples):
                kept = ~left_out(self.samples, now, rule, Counter())
            sample = torch.tensor(now)[:, None].expand(kept.shape)[kept]
            yield found[:, kept].float().cpu()[:, :missing], sample[:missing]
            missing -= min(missing, len(sample))

    def read(self, n_rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows with all components side by side, with the sample of each."""
        for found, sample in self.blocks(n_rows):
            yield found.transpose(0, 1).flatten(1), sample


@dataclasses.dataclass(frozen=True, eq=False)
class NeighborMatch:
    """Matched features of two dictionaries, one of which is the dictionary tested."""

    names: tuple[str, str]
    sites: tuple[BranchSite | ComponentSite | None, BranchSite | ComponentSite | None]
    """Sites of the two dictionaries; None for the one that is tested."""
    latent_a: Int[np.ndarray, " pair"]
    latent_b: Int[np.ndarray, " pair"]
    matched: Bool[np.ndarray, " pair"]
    """Whether the match of each pair is significant."""


def open_site(
    path: Path, site: str | None, store: Store, folder: RunFolder, trust: TrustConfig
) -> BranchSite | ComponentSite:
    """Open a dictionary and find the branches of its site, or the components of its sum.

    Args:
        path: Folder or file of the dictionary.
        site: Site that it reads, if it does not say so.
        store: Store that has the site.
        folder: Folder that notes the checksum of the dictionary.
        trust: Code that may run, where components are read from the network.

    Raises:
        InputError: It reads one branch only.
        RecipeError: Its site is not known, or another than `site`.
        StoreError: The store misses the site, or the site has neither branches nor components, or
            another width.
        TrustError: The store names code that the user has not named.
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
    if dictionary.d_in != rows.d_in or dictionary.d_out != rows.d_in:
        raise StoreError(
            f"{store.root} has {rows.d_in} numbers a row at {rows.site}; {path} reads "
            f"{dictionary.d_in} and writes {dictionary.d_out}."
        )
    folder.parent(str(path.resolve()), opened.checksum)
    if rows.shape.channels:
        return BranchSite(dictionary, rows, rows.shape.channels)
    return _component_site(dictionary, rows, trust)


def _component_site(dictionary: Any, rows: StoreRows, trust: TrustConfig) -> ComponentSite:
    """Open the network of a site without branches, whose activations may be a sum."""
    store, site = rows.store, Site.parse(rows.site)
    have = [name for name, shape in store.shapes.items() if shape.channels]
    instead = (
        f"{rows.site} has no named branches. Sites of {store.root} that have some: "
        f"{', '.join(have) or 'none'}."
    )
    if store.shapes[rows.site].grid[1] != 1 or store.group is not None:
        raise StoreError(instead)
    network, samples = open_network(store, trust, instead=instead)
    nn.Module.float(network)
    numbers = [i for split in SPLITS for i in store.samples(split, len(samples))]
    try:
        layer = decompose_layer(network, site, samples.stack([samples.read(numbers[0])]))
    except SiteError as error:
        raise StoreError(f"{instead} Nor is it the sum of heads and an MLP: {error}") from error
    return ComponentSite(dictionary, rows, layer, samples, numbers)


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
    match: Path, dictionary: Path, store: Store, folder: RunFolder, trust: TrustConfig
) -> list[NeighborMatch]:
    """Open the matches of a dictionary with its neighbors.

    Args:
        match: Folder of the matching.
        dictionary: Dictionary that is tested.
        store: Store that has the sites of all dictionaries.
        folder: Folder that notes the checksums of the matching and the neighbors.
        trust: Code that may run, as for `open_site`.

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
            a, b = (None if p == own else open_site(p, None, store, folder, trust) for p in two)
            pairs = (columns[name][mine] for name in ("latent_a", "latent_b", "matched"))
            matches.append(NeighborMatch((two[0].name, two[1].name), (a, b), *pairs))
    return matches
