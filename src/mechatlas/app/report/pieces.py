"""Arrays of a served page that a browser fetches a piece at a time.

    PIECE           features in a piece
    by_feature      whether an array has a row a feature that only its card needs
    indexes         features by word and by file, so that a search fetches what it asks for
    lines_of        claims of a dictionary, a line a feature, with the place of each line

What searches, sorts and the map need of all features at once (density, largest and mean activation,
shares, places on the map) is fetched whole: some twenty bytes a feature.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Integer

from mechatlas.app.report.dossiers import FeatureRecord, plain_record

PIECE = 128
"""Features in a piece."""
OF_CARDS = (
    "histogram", "upper", "near", "cosine", "slot", "place", "value", "first", "corner", "heat",
    "apart", "scale",
)  # fmt: skip
"""Arrays of a dictionary that only cards and dossiers need."""


def by_feature(chapter: str, name: str) -> bool:
    """Whether an array has a row a feature, needed where the feature is shown."""
    return chapter == "features" and name.partition("/")[2] in OF_CARDS


def indexes(data: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Features of each dictionary by the words they are active on, and by the files shown.

    Returns:
        For each dictionary and kind, `FEATURES/words.at` (where the features of each word begin)
        and `words.feature`; the same for `files`.
    """
    found: dict[str, np.ndarray] = {}
    for k, facts in enumerate(data["dictionaries"]):
        gallery = data["galleries"][facts["gallery"]]
        slot = arrays[f"{k}/slot"]
        feature, rank = np.nonzero(slot >= 0)
        pairs = {"files": (slot[feature, rank], feature, len(gallery["names"]))}
        if facts["kind"] == "text" and (words := gallery.get("words")):
            heat = arrays[f"{k}/heat"].reshape(*slot.shape, -1)
            feature, rank, position = np.nonzero(heat)
            token = arrays[f"{facts['gallery']}/tokens"]
            at = arrays[f"{k}/first"][feature, rank, 0] + position
            inside = (at < token.shape[1]) & (slot[feature, rank] >= 0)
            feature, rank, at = feature[inside], rank[inside], at[inside]
            pairs["words"] = (token[slot[feature, rank], at], feature, len(words))
        for kind, (keys, features, n) in pairs.items():
            found[f"{k}/{kind}.at"], found[f"{k}/{kind}.feature"] = _listed(keys, features, n)
    return found


def _listed(
    keys: Integer[np.ndarray, " pair"], features: Int[np.ndarray, " pair"], n: int
) -> tuple[Float[np.ndarray, " ends"], Int[np.ndarray, " listed"]]:
    """Features of each key, each once: where those of a key begin, and the features."""
    pairs = np.unique(np.stack([keys.astype(np.int64), features], axis=1), axis=0)
    ends = np.searchsorted(pairs[:, 0], np.arange(n + 1))
    return ends.astype(np.float64), pairs[:, 1].astype(np.int32)


def lines_of(records: Mapping[int, FeatureRecord], n: int) -> tuple[bytes, np.ndarray]:
    """Claims of a dictionary as JSON, a line a feature, and where each line begins.

    Returns:
        The lines, and the places of their beginnings and of the end.
    """
    lines = [
        json.dumps(
            plain_record(records[i]) if i in records else None,
            allow_nan=False, separators=(",", ":"),
        ).encode() + b"\n"
        for i in range(n)
    ]  # fmt: skip
    return b"".join(lines), np.cumsum([0, *map(len, lines)]).astype(np.float64)
