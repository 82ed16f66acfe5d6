"""Write a dictionary in the format of another library.

    mechatlas export runs/layer3 --format saelens --model-name gpt2 --out for_saelens

The dictionary may itself be of any library. Sites of language models are written by their names in
TransformerLens, as the tools around SAELens expect: `model.layers.3` as `blocks.3.hook_resid_post`.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from mechatlas.activations.site_names import lens_name
from mechatlas.app.inputs import open_dictionary
from mechatlas.app.run_folder import EXPORT, CommandResult, RunConfig, RunFolder
from mechatlas.dictionaries.formats import save

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
    format: Literal["saelens", "dictionary_learning", "sparsify", "circuit-tracer", "mechatlas"]
    """Library that is to load it."""
    site: str | None = None
    """Site that it reads; by default that of the dictionary."""
    model_name: str | None = None
    """Name of the model for that library, such as gpt2; by default that in the file."""


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
    """Write a dictionary for another library.

    Raises:
        WeightsError: The library has no such dictionary.
    """
    opened = open_dictionary(config.dictionary, site=config.site)
    site = None if opened.site is None else lens_name(opened.site) or opened.site
    keys = NAMES.get(config.format, ())
    values = (site, config.model_name)
    entries = {key: value for key, value in zip(keys, values, strict=False) if value is not None}
    folder.parent("dictionary", opened.checksum)
    folder.facts(format=config.format, **({} if site is None else {"site": site}))
    folder.begin()
    before = _inodes(folder.path)  # files of an earlier run have the same names
    save(opened.dictionary, folder.path, format=config.format, metadata=entries)
    written = sorted(name for name, _ in _inodes(folder.path) - before)
    for name in written:
        folder.note(name)
    return ExportResult(format=config.format, files=written, site=site)


def _inodes(folder: Path) -> set[tuple[str, tuple[int, int]]]:
    """Names and identities of the files of a folder; one that is written again is another."""
    found = ((path.name, path.lstat()) for path in folder.iterdir())  # of links themselves
    return {(name, (status.st_ino, status.st_mtime_ns)) for name, status in found}


def in_words(result: ExportResult) -> str:
    """Files that were written, and what loads them."""
    place = "" if result.site is None else f" of {result.site}"
    return (
        f"A dictionary{place} for {result.format} is in {result.out}: {', '.join(result.files[:6])}"
        f"{' and more' if len(result.files) > 6 else ''}"
    )
