"""Measure what a dictionary is worth to its network: loss recovered, divergence, error.

mechatlas evaluate runs/layer3 --out runs/layer3_worth
mechatlas evaluate DICT --network model.gguf --site layers.3 --samples texts.zip --out OUT

Without `--network` and `--samples` the network of the dictionary's store runs on its held-out
samples.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from mechatlas.activations.networks import Network, load_network
from mechatlas.activations.positions import Positions
from mechatlas.activations.samples import open_samples
from mechatlas.activations.store import Store
from mechatlas.analysis.evaluation.evaluate import N_SAMPLES
from mechatlas.analysis.evaluation.evaluate import evaluate as evaluate_dictionary
from mechatlas.analysis.evaluation.results import NetworkEvaluation
from mechatlas.app.commands.collect import CollectConfig
from mechatlas.app.inputs import (
    OpenedDictionary,
    TrustConfig,
    find_store,
    open_dictionary,
    open_network,
    recorded_network,
    refuse_other_network,
)
from mechatlas.app.progress import bar
from mechatlas.app.recipes import CONVERTER, from_dict
from mechatlas.app.run_folder import EVALUATION, CommandResult, DeviceConfig, RunFolder
from mechatlas.base import RecipeError, StoreError
from mechatlas.files import read_toml
from mechatlas.maths.outliers import OUTLIER_NORMS
from mechatlas.ranges import COUNT, SEED, check_ranges

KIND = EVALUATION


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DeviceConfig):
    """Measure what a dictionary is worth to its network: loss recovered, divergence, error.

    Example:  mechatlas evaluate runs/layer3 --out runs/layer3_worth
    """

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
    """Site that is written; by default that of the dictionary."""
    n_samples: int = N_SAMPLES
    """Samples that the network runs on."""
    positions: Positions | None = None
    """Positions that stay as they are (`rule` and `per_sample` are not used); by default those that
    the store leaves out."""
    outlier_norms: float = OUTLIER_NORMS
    """Median norms beyond which a row stays as it is and is not counted; `inf` counts all rows."""
    batch_size: int = 8
    """Samples in one forward pass."""
    seed: int = 0
    """Seed of the draw of samples and of the intervals."""

    def __post_init__(self) -> None:
        check_ranges(self, n_samples=COUNT, batch_size=COUNT, outlier_norms="(0, inf]", seed=SEED)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class EvaluateResult(NetworkEvaluation, CommandResult):
    """Worth of a dictionary to its network."""

    site: str
    """Site that is written."""


def run(config: EvaluateConfig, folder: RunFolder) -> EvaluateResult:
    """Evaluate a dictionary in its network.

    Raises:
        RecipeError: The site is not known.
        UserError: The network, the samples or the store are not to be found, or do not fit.
    """
    opened = open_dictionary(config.dictionary, site=config.site)
    store = _store(config, opened)
    site = opened.site or (store.sites[0] if store and len(store.sites) == 1 else None)
    if site is None:
        raise RecipeError(f"{config.dictionary} does not say of which site it is; give --site.")
    if config.network is None and config.samples is None and store is not None:
        network, samples = open_network(store, TrustConfig(trust=config.trust))
        numbers = store.samples("held", config.n_samples) or None
    else:
        if config.network:
            network = load_network(_network(config.network))
        else:
            assert store is not None  # `_store` has refused
            network = recorded_network(store, TrustConfig(trust=config.trust)).network
        samples = open_samples(_samples(config.samples) or _recipe_of(store).samples, network)
        numbers = None
    positions = config.positions
    if positions is None and store is not None and store.manifest.get("left_out"):
        positions = Positions.of_store(store.manifest)
    folder.parent("dictionary", opened.checksum)
    with bar("evaluating") as progress:
        found = evaluate_dictionary(
            opened.dictionary,
            network=network,
            samples=samples,
            site=site,
            n_samples=config.n_samples,
            numbers=numbers,
            positions=positions,
            outlier_norms=config.outlier_norms,
            batch_size=config.batch_size,
            seed=config.seed,
            device=config.device,
            on_progress=progress,
        )
    folder.facts(site=site)
    folder.begin()
    return EvaluateResult(site=site, **vars(found))


def _store(config: EvaluateConfig, opened: OpenedDictionary) -> Store | None:
    """The store that is named, or the dictionary's; none where nothing is asked of it.

    Raises:
        StoreError: It is needed and nowhere to be found, or of another network.
    """
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
    """Recipe that a store was collected by.

    Raises:
        RecipeError: There is no store, or it does not say.
    """
    if store is None:
        raise RecipeError("Give --network and --samples, or --store.")
    return from_dict(store.manifest["recipe"], CollectConfig, f"The manifest of {store.root}")


def _network(text: str) -> Network:
    """Network by its name, its recipe, or the folder or file of a language model."""
    if text.endswith(".toml"):
        return from_dict(_table(Path(text), "network"), Network, text)
    if Path(text).exists():
        return Network(name="transformer", arguments={"path": text})
    return Network(name=text)


def _samples(path: Path | None) -> Any:
    """Samples as `open_samples` takes them."""
    if path is None or path.suffix != ".toml":
        return path
    kind = CollectConfig.__dataclass_fields__["samples"].type
    return CONVERTER.structure(_table(path, "samples"), kind)


def _table(path: Path, name: str) -> dict[str, Any]:
    """A table of a recipe.

    Raises:
        RecipeError: The recipe has none.
    """
    table = read_toml(path).get(name)
    if not isinstance(table, dict):
        raise RecipeError(f"{path} has no table [{name}].")
    return table


def in_words(result: EvaluateResult) -> str:
    """Figures with their intervals, and the folder."""
    return f"At {result.site}. {result.summary()}\nFolder: {result.out}"
