"""Names and notes of features, as the page saves them in `labels.json`.

read_feature_labels    a file -> labels by run of the dictionary and latent
names_of               the names of the features of one dictionary
"""

from pathlib import Path
from typing import Any

from mechatlas.base import RecipeError
from mechatlas.files import read_json

Labels = dict[str, dict[str, dict[str, str]]]
"""Name and note of features, by run of the dictionary and latent."""
SCHEMA = 1


def read_feature_labels(path: Path) -> Labels:
    """Read a `labels.json` that the page saved.

    Raises:
        DiskError: The file cannot be read.
        RecipeError: It holds something else.
    """
    written = read_json(path)
    dictionaries = written.get("dictionaries") if isinstance(written, dict) else None
    if not isinstance(dictionaries, dict) or written.get("schema") != SCHEMA:
        raise RecipeError(
            f'{path} is no file of labels: expected "schema": {SCHEMA} and "dictionaries", as the '
            "page saves them."
        )
    return {str(run): _features(path, run, each) for run, each in dictionaries.items()}


def _features(path: Path, run: str, entry: Any) -> dict[str, dict[str, str]]:
    features = entry.get("features") if isinstance(entry, dict) else None
    if not isinstance(features, dict):
        raise RecipeError(f'{path}: the dictionary {run!r} has no "features".')
    read: dict[str, dict[str, str]] = {}
    for latent, label in features.items():
        texts = label.values() if isinstance(label, dict) else [None]
        if not str(latent).isdecimal() or not all(isinstance(text, str) for text in texts):
            raise RecipeError(
                f"{path}: the label of {latent!r} in {run!r} must be a latent's number with a "
                f"name and a note, both text, got {label!r}."
            )
        read[str(int(latent))] = {key: str(label.get(key, "")) for key in ("name", "note")}
    return read


def names_of(path: Path, dictionary: Path, n: int) -> list[str | None]:
    """Name of each feature of a dictionary; None where it has none.

    Args:
        path: A `labels.json` that the page saved.
        dictionary: Folder of the dictionary, whose name, or end of a path, the file has.
        n: Number of features.

    Raises:
        DiskError: The file cannot be read.
        RecipeError: It holds something else, no such dictionary, or a feature that is not there.
    """
    labels = read_feature_labels(path)
    folder = dictionary.resolve().as_posix()
    fitting = [run for run in labels if folder == run or folder.endswith(f"/{run}")]
    if len(fitting) != 1 and len(labels) != 1:
        raise RecipeError(
            f"{path} has labels of {', '.join(sorted(labels)) or 'no dictionary'}, expected "
            f"one of the folder {dictionary.name}."
        )
    own = labels[fitting[0] if fitting else next(iter(labels))]
    outside = [latent for latent in own if int(latent) >= n]
    if outside:
        raise RecipeError(f"{path} names feature {outside[0]}; the dictionary has {n}.")
    return [own.get(str(i), {}).get("name") or None for i in range(n)]
