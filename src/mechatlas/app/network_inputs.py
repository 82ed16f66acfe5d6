"""Network and samples that a dictionary is measured on.

MeasureConfig     settings of a command that runs a dictionary's network
open_measured     these settings -> dictionary, site, network and samples
named_network     words for a network, on the command line -> its recipe
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from torch import nn
from tyro.conf import Positional, arg

from mechatlas.activations.networks import Network, load_network
from mechatlas.activations.samples import Samples, open_samples
from mechatlas.activations.store import Store
from mechatlas.app.commands.collect import CollectConfig
from mechatlas.app.inputs import (
    OpenedDictionary,
    TrustConfig,
    find_store,
    open_dictionary,
    open_network,
    recorded_network,
    refuse_other_network,
    sites_of,
)
from mechatlas.app.recipes import CONVERTER, from_dict
from mechatlas.app.run_folder import DeviceConfig
from mechatlas.base import RecipeError, StoreError
from mechatlas.files import read_toml

INSTEAD = "Give --network and --samples."
"""Way out where no recipe names the network of a store."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureConfig(DeviceConfig):
    """Fields of commands that run the network of a dictionary on samples."""

    dictionary: Annotated[Positional[Path], arg(metavar="DICT")]
    """Folder or file of the dictionary."""
    network: str | None = None
    """A bundled name, `package.module:factory`, a folder or file of a language model, or a recipe
    with a [network] table; by default the network of the dictionary's store."""
    samples: Path | None = None
    """Texts, images or an array, or a recipe with a [samples] table; by default the held-out
    samples of the store."""
    trust: bool = False
    """Run the code that the store's recipe names, if its network is not bundled."""
    store: Path | None = None
    """Store that says what is missing; by default that which the dictionary was trained on."""
    site: str | None = None
    """Site of the dictionary, where it does not say so itself; of one of several sites all of them
    with commas, those that it reads and then others that it writes."""


class Measured(NamedTuple):
    """A dictionary, its network and the samples to measure it on."""

    opened: OpenedDictionary
    site: str
    """Site of the dictionary; several with commas."""
    network: nn.Module
    samples: Samples
    numbers: list[int] | None
    """Samples to measure on; None for any."""
    store: Store | None
    """Store of the dictionary; None where nothing was asked of it."""


def open_measured(config: MeasureConfig, n_samples: int) -> Measured:
    """Open the dictionary, the network and the samples of a command.

    Raises:
        RecipeError: The site is not known.
        UserError: The network, the samples or the store are not to be found, or do not fit.
    """
    several = config.site is not None and "," in config.site
    opened = open_dictionary(config.dictionary, site=None if several else config.site)
    store = _store(config, opened)
    site = config.site if several else sites_of(opened)
    if site is None and store and len(store.sites) == 1:
        site = store.sites[0]
    if site is None:
        raise RecipeError(f"{config.dictionary} does not say of which site it is; give --site.")
    if config.network is None and config.samples is None and store is not None:
        network, samples = open_network(store, TrustConfig(trust=config.trust), instead=INSTEAD)
        numbers = store.samples("held", n_samples) or None
        return Measured(opened, site, network, samples, numbers, store)
    if config.network:
        network = load_network(named_network(config.network))
    else:
        assert store is not None  # `_store` has refused
        trusted = TrustConfig(trust=config.trust)
        network = recorded_network(store, trusted, instead=INSTEAD).network
    samples = open_samples(_samples(config.samples) or _recipe_of(store).samples, network)
    return Measured(opened, site, network, samples, None, store)


def _store(config: MeasureConfig, opened: OpenedDictionary) -> Store | None:
    """The store that is named, or the dictionary's; none where nothing is asked of it."""
    if config.store is not None:
        store = Store(config.store)
        if config.network is None:
            refuse_other_network(opened, store)
        return store
    try:
        return find_store(opened)
    except StoreError:
        if config.network and config.samples:
            return None
        raise


def _recipe_of(store: Store | None) -> CollectConfig:
    """Recipe that a store was collected by."""
    if store is None:
        raise RecipeError("Give --network and --samples, or --store.")
    return from_dict(store.manifest["recipe"], CollectConfig, f"The manifest of {store.root}")


def named_network(text: str, weights: Path | None = None) -> Network:
    """Network by its name, its recipe, or the folder or file of a language model."""
    path = Path(text)
    if path.suffix == ".toml":
        return from_dict(_table(path, "network"), Network, text)
    if path.exists() or path.suffix in (".gguf", ".zip"):
        return Network(name="transformer", arguments={"path": text})
    return Network(name=text, weights=weights)


def _samples(path: Path | None) -> Any:
    """Samples as `open_samples` takes them."""
    if path is None or path.suffix != ".toml":
        return path
    kind = CollectConfig.__dataclass_fields__["samples"].type
    return CONVERTER.structure(_table(path, "samples"), kind)


def _table(path: Path, name: str) -> dict[str, Any]:
    """A table of a recipe, or one with a name alone."""
    table = read_toml(path).get(name)
    if not isinstance(table, str | dict):
        raise RecipeError(f"{path} has no table [{name}].")
    return table if isinstance(table, dict) else {"name": table}
