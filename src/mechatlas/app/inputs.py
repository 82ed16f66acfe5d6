"""Inputs of commands: dictionaries with their sites, stores, networks whose weights are compared.

open_dictionary     a folder or file -> the dictionary and the site that it reads
open_dictionaries   several of them, each with a name of its own
sites_of            an opened dictionary -> the sites that it reads and writes
find_store          an opened dictionary -> the store that it was trained on
refuse_other_network   a dictionary and a store of another network -> a sentence
open_network        a store -> its network and samples
poses_of            a store -> its group and action
"""

import contextlib
import dataclasses
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from mechatlas.activations.networks import BUNDLED, Network, has_weights, load_network
from mechatlas.activations.posing import PoseConfig
from mechatlas.activations.samples import Samples, open_samples
from mechatlas.activations.store import Store
from mechatlas.activations.store_manifest import store_digest
from mechatlas.app.commands.collect import CollectConfig
from mechatlas.app.recipes import TrustConfig, from_dict
from mechatlas.app.run_folder import HISTORY, RECIPE, RESULT
from mechatlas.base import RecipeError, StoreError, TrustError
from mechatlas.dictionaries.ends import UNNAMED, ends_of
from mechatlas.dictionaries.formats import load
from mechatlas.dictionaries.hub import fetch, is_address
from mechatlas.files import MANIFEST, checksum, checksum_file, read_manifest
from mechatlas.remote import followed

NOT_DATA = (MANIFEST, RECIPE, RESULT, HISTORY)
"""Files in the folder of a dictionary that say nothing about its weights."""


@dataclasses.dataclass(frozen=True, eq=False)
class OpenedDictionary:
    """A dictionary, its manifest and the site that it reads."""

    path: Path
    name: str
    """Short name, in words and tables."""
    dictionary: Any
    """A `Dictionary` on the CPU."""
    site: str | None
    """Site that it reads; None where neither the file nor the user says so."""
    manifest: dict[str, Any]
    """Contents of `manifest.json` in its folder; empty where there is none."""
    checksum: str
    """Checksum of its files."""

    def site_in(self, store: Store) -> str:
        """Find the site of a store that the dictionary reads.

        Raises:
            RecipeError: Neither the dictionary nor the user says which, and there are several.
        """
        if self.site is None and len(store.sites) > 1:
            raise RecipeError(
                f"{self.path} does not say which site it reads. Name it with --site or --sites; "
                f"{store.root} has {', '.join(store.sites)}."
            )
        return self.site or store.sites[0]


def open_dictionary(path: Path, *, site: str | None = None) -> OpenedDictionary:
    """Open a dictionary in any supported format.

    The site is the one that the user names, else the one in the manifest beside the file, else the
    one in the file itself.

    Args:
        path: Folder or file.
        site: Site that it reads, where it does not say so itself.

    Raises:
        RecipeError: The manifest says that it reads another site.
        WeightsError: It cannot be read.
    """
    if is_address(path):
        path = fetch(str(path))
    dictionary, manifest = load(path), manifest_of(path)
    stated = manifest.get("site")
    if site and stated and site != stated:
        raise RecipeError(
            f"{path} says that it reads {stated}, but {site} was asked for. Leave the site out."
        )
    name = path.name if path.is_dir() else path.stem
    site = site or stated or getattr(dictionary, "site", None)
    return OpenedDictionary(path, name, dictionary, site, manifest, checksum_of(path))


def open_dictionaries(
    paths: Sequence[Path], *, sites: Sequence[str] = ()
) -> list[OpenedDictionary]:
    """Open several dictionaries; where two have the same short name, paths are the names.

    Args:
        paths: Folders or files.
        sites: Site of each, where they do not say so themselves; none or one for each.

    Raises:
        RecipeError: There are more or fewer sites than dictionaries, or a dictionary says another.
        WeightsError: One cannot be read.
    """
    if sites and len(sites) != len(paths):
        raise RecipeError(
            f"--sites must name one site for each of the {len(paths)} dictionaries, got "
            f"{len(sites)}: {', '.join(sites)}."
        )
    opened = [
        open_dictionary(path, site=site)
        for path, site in zip(paths, sites or (None,) * len(paths), strict=True)
    ]
    if len({each.name for each in opened}) == len(opened):
        return opened
    return [dataclasses.replace(each, name=str(each.path)) for each in opened]


def sites_of(opened: OpenedDictionary) -> str | None:
    """Sites of a dictionary: those that it reads, then others that it writes, with commas.

    None where neither its manifest nor its file says them.
    """
    ends, written = ends_of(opened.dictionary), opened.manifest.get("writes")
    if len(ends.names) == 1 or opened.manifest.get("group"):
        return opened.site
    if opened.site and isinstance(written, list) and len(written) == 1:  # a transcoder of ours
        return f"{opened.site},{written[0]}"
    named = [name for name in ends.names if name not in UNNAMED]
    return ",".join(named) if len(named) == len(ends.names) else opened.site


def expect_several(paths: Sequence[Path], command: str) -> None:
    """Refuse fewer than two dictionaries.

    Raises:
        RecipeError: There are fewer.
    """
    if len(paths) < 2:
        raise RecipeError(
            f"`mechatlas {command}` needs two dictionaries or more, got {len(paths)}: "
            f"mechatlas {command} DICT_A DICT_B [DICT_C ...] --out DIR."
        )


def expect_sites(opened: Sequence[OpenedDictionary], of_store: str = "") -> list[str]:
    """Sites of dictionaries, all of which have to be known.

    Args:
        opened: The dictionaries.
        of_store: Sites of their store, for the message.

    Raises:
        RecipeError: Some do not say which site they read.
    """
    if unknown := [str(each.path) for each in opened if each.site is None]:
        raise RecipeError(
            f"{', '.join(unknown)} does not say which site it reads. Name the site of each "
            f"dictionary with --sites{of_store}."
        )
    return [str(each.site) for each in opened]


def manifest_of(path: Path) -> dict[str, Any]:
    """Read the manifest in a folder, or beside a file; empty where there is none."""
    file = (path if path.is_dir() else path.parent) / MANIFEST
    return read_manifest(file) if os.path.lexists(file) else {}


def checksum_of(path: Path) -> str:
    """Checksum of a file, or of all data files of a folder."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    data = [file for file in files if file.name not in NOT_DATA]
    return checksum("".join(checksum_file(file) for file in data).encode())


def find_store(opened: OpenedDictionary) -> Store:
    """Open the store that a dictionary was trained on: where it was, or beside the dictionary.

    Raises:
        StoreError: It is nowhere to be found.
    """
    written = followed(str(opened.manifest.get("store", "")), opened.path)
    beside = sorted(opened.path.resolve().parent.glob(f"*/{MANIFEST}"))
    wanted = opened.manifest.get("parents", {}).get("store")
    for file in (written / MANIFEST, *beside):
        if wanted and file.is_file() and store_digest(file) == wanted:
            return Store(file.parent)
    what = f"The store of {opened.path} ({written}) is no longer there"
    if not opened.manifest.get("store"):
        what = f"{opened.path} does not say that it was trained on a store"
    raise StoreError(f"{what}; name one of the same network with --store STORE.")


def refuse_other_network(opened: OpenedDictionary, store: Store) -> None:
    """Refuse a store of another network than the one that a dictionary was trained on.

    Another store of the same network will do. Dictionaries that do not say what they were trained
    on, as those of other libraries, are not refused.

    Raises:
        StoreError: The store is of other weights.
    """
    wanted = opened.manifest.get("parents", {}).get("store")
    if wanted is None or wanted == store.digest:
        return
    network = opened.manifest.get("network")
    if network is None:  # of version 0.1: its store may still be where it was
        with contextlib.suppress(StoreError):
            network = find_store(opened).manifest["network"]
    if network is not None and network != store.manifest["network"]:
        raise StoreError(
            f"{store.root} is neither the store that {opened.path} was trained on nor one of the "
            "same network: their weights have other checksums. Name a store of that network."
        )


class OpenedNetwork(NamedTuple):
    """A network and its samples."""

    network: nn.Module
    samples: Samples


IN_PYTHON = (
    "Collect it by a recipe with `mechatlas collect`, or call the analysis in Python with the "
    "network itself."
)
"""Way out for commands that need the network of a store that was collected from Python."""


def recorded_network(
    store: Store, trust: TrustConfig, *, instead: str = IN_PYTHON
) -> OpenedNetwork:
    """Open the network and the samples of a store, whatever weights the network has now.

    Args:
        store: The store.
        trust: Code that may run.
        instead: Sentence on what to do where no recipe names the network.

    Raises:
        TrustError: The store names code that the user has not named.
        RecipeError: The store was not made by `mechatlas collect`.
        UserError: The network or the samples are no longer there.
    """
    recipe = store.manifest["recipe"]
    if "network" not in recipe:
        raise RecipeError(
            f"{store.root} was collected from Python, so no recipe names its network. {instead}"
        )
    config = from_dict(recipe, CollectConfig, f"The manifest of {store.root}")
    _refuse_code(config.network, store, trust)
    network = load_network(config.network)
    return OpenedNetwork(network, open_samples(config.samples, network))


def _refuse_code(network: Network, store: Store, trust: TrustConfig) -> None:
    """Refuse to run code that a folder names, unless the user names it too."""
    if network.name in (*BUNDLED, *trust.network) or trust.trust:
        return
    raise TrustError(
        f"{store.root} names a network that is not bundled: {_call_of(network)} would run. If you "
        f"know that code, add --network {shlex.quote(network.name)}; add --trust if you trust the "
        "whole folder."
    )


def _call_of(network: Network) -> str:
    """Name of a network with its arguments, as Python writes a call."""
    given = {**network.arguments, **({"weights": str(network.weights)} if network.weights else {})}
    words = ", ".join(f"{key}={value!r:.200}" for key, value in given.items())
    return f"{network.name}({words:.300})"


def open_network(store: Store, trust: TrustConfig, *, instead: str = IN_PYTHON) -> OpenedNetwork:
    """Open the network and the samples that a store was collected from.

    Args:
        store: The store.
        trust: Code that may run.
        instead: Sentence on what to do where no recipe names the network.

    Raises:
        TrustError: The store names code that the user has not named.
        RecipeError: The store was not made by `mechatlas collect`.
        StoreError: The network has other weights now.
        UserError: The network or the samples are no longer there.
    """
    opened = recorded_network(store, trust, instead=instead)
    if not has_weights(opened.network, store.manifest["network"]):
        network = from_dict(store.manifest["recipe"]["network"], Network, str(store.root))
        raise StoreError(
            f"{_call_of(network)} has other weights now than when {store.root} was collected from "
            "it. Restore them, or collect the store again."
        )
    return opened


def poses_of(store: Store) -> PoseConfig:
    """Read the group and the action that a store was collected with.

    Raises:
        StoreError: It was collected in one pose.
    """
    group = store.manifest["recipe"].get("group")
    if group is None:
        raise StoreError(f"The recipe of {store.root} poses nothing.")
    return from_dict(group, PoseConfig, f"The manifest of {store.root}")
