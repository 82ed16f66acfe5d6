"""Write a dictionary in the format of another library.

    mechatlas export runs/layer3 --format saelens --model-name gpt2 --out for_saelens

    mechatlas export runs/layer3 --format neuronpedia --model-name gpt2 --out features

The dictionary may itself be of any library. Sites of language models are written by their names in
TransformerLens, as the tools around SAELens expect: `model.layers.3` as `blocks.3.hook_resid_post`.
For Neuronpedia the features are written, not the weights: contexts, histograms and effects on
logits, from a store of texts.
"""

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from mechatlas.activations.site_names import lens_name
from mechatlas.activations.store import Store
from mechatlas.activations.texts import TextSamples
from mechatlas.app.estimates import Estimate, bytes_of, of_work
from mechatlas.app.inputs import (
    OpenedDictionary,
    TrustConfig,
    find_store,
    open_dictionary,
    open_network,
    refuse_other_network,
)
from mechatlas.app.progress import bar
from mechatlas.app.run_folder import EXPORT, CommandResult, RunConfig, RunFolder
from mechatlas.base import RecipeError
from mechatlas.dictionaries.formats import save
from mechatlas.outputs import temporary_folder
from mechatlas.ranges import COUNT, check_ranges

KIND = EXPORT
NAMES = {
    "saelens": ("hook_name", "model_name"),
    "dictionary_learning": ("submodule_name", "lm_name"),
    "sparsify": ("hookpoint", "model"),
    "circuit-tracer": ("hook_name",),
}
"""Library -> its keys for the site and the model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig(RunConfig):
    """Write a dictionary in the format of another library.

    Example:  mechatlas export runs/layer3 --format saelens --model-name gpt2 --out for_saelens
    """

    dictionary: Annotated[Positional[Path], arg(metavar="DICT")]
    """Folder, file or hf:// address of the dictionary."""
    format: Literal[
        "saelens", "dictionary_learning", "sparsify", "circuit-tracer", "mechatlas", "neuronpedia"
    ]
    """Library that is to load it; `neuronpedia` for its features as JSON."""
    site: str | None = None
    """Site that it reads; by default that of the dictionary."""
    model_name: str | None = None
    """Name of the model for that library, such as gpt2; by default that in the file."""
    store: Path | None = None
    """Store of texts whose features are written (neuronpedia); by default that of training."""
    latents: tuple[int, ...] = ()
    """Features that are written (neuronpedia); by default all."""
    max_rows: int | None = None
    """Upper limit on the rows read (neuronpedia); by default all of the store."""
    trust: bool = False
    """Run the code that the store's recipe names, if its network is not bundled (neuronpedia)."""

    def __post_init__(self) -> None:
        if self.max_rows is not None:
            check_ranges(self, max_rows=COUNT)
        if self.format != "neuronpedia" and (self.store or self.latents or self.max_rows):
            raise ValueError("store, latents and max_rows are for the format neuronpedia alone.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportResult(CommandResult):
    """Dictionary in the format of another library."""

    format: str
    """Library that loads it."""
    files: list[str]
    """Files that were written."""
    site: str | None
    """Site, as it is written there."""


def run(config: ExportConfig, folder: RunFolder) -> ExportResult:
    """Write a dictionary for another library, or its features for Neuronpedia.

    Raises:
        WeightsError: The library has no such dictionary.
        UserError: The store, its network or its texts are not to be found, or do not fit.
    """
    opened = open_dictionary(config.dictionary, site=config.site)
    site = None if opened.site is None else lens_name(opened.site) or opened.site
    keys = NAMES.get(config.format, ())
    values = (site, config.model_name)
    entries = {key: value for key, value in zip(keys, values, strict=False) if value is not None}
    folder.parent("dictionary", opened.checksum)
    folder.facts(format=config.format, **({} if site is None else {"site": site}))
    features = _features(config, opened, site) if config.format == "neuronpedia" else None
    write = partial(save, opened.dictionary, format=config.format, metadata=entries)
    if config.format != "neuronpedia":
        folder.expect(lambda: _estimate(write, opened), is_long=False)
    folder.begin()
    before = _inodes(folder.path)  # files of an earlier run have the same names
    if features is None:
        write(folder.path)
    else:
        with bar("features") as progress:
            features(
                folder.path,
                latents=config.latents or None,
                max_rows=config.max_rows,
                on_progress=progress,
            )
    written = sorted(name for name, _ in _inodes(folder.path) - before)
    for name in written:
        folder.note(name)
    return ExportResult(format=config.format, files=written, site=site)


def _estimate(write: Callable[[Path], object], opened: OpenedDictionary) -> Estimate:
    """Estimate what writing takes by doing it elsewhere: it costs hardly more than reading."""
    with temporary_folder() as folder:
        return dataclasses.replace(
            of_work([lambda _: write(folder)], memory=2 * bytes_of(opened.dictionary)),
            disk=sum(path.stat().st_size for path in folder.iterdir()),
        )


def _inodes(folder: Path) -> set[tuple[str, tuple[int, int]]]:
    """Names and identities of the files of a folder; one that is written again is another."""
    found = ((path.name, path.lstat()) for path in folder.iterdir())  # of links themselves
    return {(name, (status.st_ino, status.st_mtime_ns)) for name, status in found}


def _features(
    config: ExportConfig, opened: OpenedDictionary, site: str | None
) -> Callable[..., list[Path]]:
    """Open what the features of a dictionary of texts are written from, and return their writer."""
    # Its statistics take longer to import than a dictionary takes to export.
    from mechatlas.app.neuronpedia import Facts, write_features

    store = find_store(opened) if config.store is None else Store(config.store)
    refuse_other_network(opened, store)
    own = opened.site or (store.sites[0] if len(store.sites) == 1 else None)
    if own is None:
        raise RecipeError(f"{store.root} has {', '.join(store.sites)}: name one with --site.")
    rows = store.rows(own)
    network, samples = open_network(store, TrustConfig(trust=config.trust))
    if not isinstance(samples, TextSamples):
        raise RecipeError(f"Neuronpedia shows features of texts; {store.root} is not of texts.")
    named = config.model_name or getattr(opened.dictionary, "metadata", {}).get("model_name")
    layer = re.search(r"\.(\d+)\b", f".{site or own}")
    facts = Facts(
        model=str(named or ""),
        layer=int(layer[1]) if layer else 0,
        name=opened.name,
        dataset=Path(str(store.manifest["recipe"]["samples"].get("source", ""))).name,
        n_samples=int(store.manifest["n_samples"]),
        n_tokens=len(samples.read(0)),
    )
    return partial(
        write_features, dictionary=opened.dictionary, rows=rows, network=network, samples=samples,
        facts=facts,
    )  # fmt: skip


def in_words(result: ExportResult) -> str:
    """Files that were written, and what loads them."""
    place = "" if result.site is None else f" of {result.site}"
    return (
        f"A dictionary{place} for {result.format} is in {result.out}: {', '.join(result.files[:6])}"
        f"{' and more' if len(result.files) > 6 else ''}"
    )
