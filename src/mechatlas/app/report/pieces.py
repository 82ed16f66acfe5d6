"""Parts of a page about single features, laid out so that a browser can fetch them one at a time.

    OF_CARDS        arrays that only the card of a feature needs
    row_type        those arrays -> type of one row of bytes a feature
    row_blocks      the rows, some features at a time
    word_lists      features by the words they are active on, and by the files shown
    claim_lists     features by what the analyses claim of them
    best_cosines    cosine of the best match of each feature, for sorting
    lines_of        claims of each feature as JSON, a line a feature, with the place of each line

What searches, sorts and the map need of all features at once (density, largest and mean activation,
shares, places on the map) is read whole: some twenty bytes a feature.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Integer

from mechatlas.app.report.dossiers import FeatureRecord, plain_record

OF_CARDS = (
    "histogram", "upper", "near", "cosine", "slot", "place", "value", "first", "corner", "heat",
    "apart", "scale",
)  # fmt: skip
"""Arrays of a dictionary that only cards and dossiers need."""
BLOCK = 4096
"""Features of which rows are put together at once."""

Lists = tuple[Float[np.ndarray, " ends"], Int[np.ndarray, " listed"]]
"""Where the features of each word begin, and the features."""


def row_type(arrays: Mapping[str, np.ndarray]) -> np.dtype:
    """Type of one row a feature, with the arrays by name.

    Args:
        arrays: Arrays with a row a feature.
    """
    return np.dtype([(name, a.dtype, a.shape[1:]) for name, a in arrays.items()], align=True)


def layout_of(row: np.dtype) -> list[tuple[str, str, int, int]]:
    """Name, type, first byte and number of entries of each array in a row."""
    fields = row.fields or {}
    return [
        (name, of.base.name, at, int(np.prod(of.shape))) for name, (of, at, *_) in fields.items()
    ]


def row_blocks(arrays: Mapping[str, np.ndarray], row: np.dtype) -> Iterator[bytes]:
    """Give the rows of all features, some at a time.

    Args:
        arrays: Arrays with a row a feature.
        row: Type of a row, from `row_type`.
    """
    for start in range(0, len(next(iter(arrays.values()))), BLOCK):
        part = {name: array[start : start + BLOCK] for name, array in arrays.items()}
        block = np.zeros(len(next(iter(part.values()))), row)
        for name, array in part.items():
            block[name] = array
        yield block.tobytes()


def word_lists(data: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, Lists]:
    """Features of each dictionary by the tokens they are active on, and by the files shown.

    Args:
        data: Plain values of the chapter on features.
        arrays: Its arrays.

    Returns:
        The lists of each dictionary, under `FEATURES/token` (by the gallery's words) and
        `FEATURES/file` (by its names).
    """
    found = {}
    for k, facts in enumerate(data["dictionaries"]):
        gallery = data["galleries"][facts["gallery"]]
        slot = arrays[f"{k}/slot"]
        feature, rank = np.nonzero(slot >= 0)
        pairs = {"file": (slot[feature, rank], feature, len(gallery["names"]))}
        if facts["kind"] == "text" and (words := gallery.get("words")):
            heat = arrays[f"{k}/heat"].reshape(*slot.shape, -1)
            feature, rank, position = np.nonzero(heat)
            token = arrays[f"{facts['gallery']}/tokens"]
            at = arrays[f"{k}/first"][feature, rank, 0] + position
            inside = (at < token.shape[1]) & (slot[feature, rank] >= 0)
            feature, rank, at = feature[inside], rank[inside], at[inside]
            pairs["token"] = (token[slot[feature, rank], at], feature, len(words))
        for kind, of in pairs.items():
            found[f"{k}/{kind}"] = _listed(*of)
    return found


def claim_lists(records: Mapping[int, FeatureRecord]) -> dict[str, tuple[list[str], Lists]]:
    """Features by the words of what is claimed of them.

    Args:
        records: Records by feature.

    Returns:
        For each kind of words that a search can ask for: the words and their features.
    """
    by_word: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for feature, record in sorted(records.items()):
        for kind, word in set(_words(record)):
            by_word[kind][word].append(feature)
    found = {}
    for kind, of_word in by_word.items():
        words = sorted(of_word)
        keys = np.repeat(np.arange(len(words)), [len(of_word[word]) for word in words])
        features = np.concatenate([np.asarray(of_word[word]) for word in words])
        found[kind] = words, _listed(keys, features, len(words))
    return found


def _words(record: FeatureRecord) -> Iterator[tuple[str, str]]:
    """Kinds and words of what is claimed of a feature."""
    claimed = {
        "matched": any(line.matched for line in record.matches),
        "symmetric": any(line.claimed for line in record.symmetry),
        "specialized": any(line.significant for line in record.branches),
        "circuit": any(line.significant for line in record.circuits),
    }
    yield from (("is", word) for word, holds in claimed.items() if holds)
    yield from (("specialized", line.branch) for line in record.branches if line.significant)
    for line in record.symmetry:
        yield "class", line.name
        yield from [("family", str(line.family))] if line.members else []
    yield from (("stimulus", line.name or "none") for line in record.stimuli)
    yield from (("origin", line.origin) for line in record.flow)
    for line in record.logits:
        yield from (("raises", word) for word, _ in line.raises)
        yield from (("lowers", word) for word, _ in line.lowers)


def best_cosines(
    records: Mapping[int, FeatureRecord], n: int
) -> dict[str, Float[np.ndarray, " latent"]]:
    """Cosine of the best match of each feature, in dictionaries after it and before it.

    Args:
        records: Records by feature.
        n: Number of features.

    Returns:
        `match` and `origin`, 0 where there is none; empty if no dictionary was matched.
    """
    if not any(record.matches for record in records.values()):
        return {}
    best = {"match": np.zeros(n, np.float32), "origin": np.zeros(n, np.float32)}
    for feature, record in records.items():
        for line in record.matches:
            values = best["match" if line.after else "origin"]
            values[feature] = max(values[feature], line.cosine or 0)
    return best


def _listed(
    keys: Integer[np.ndarray, " pair"], features: Integer[np.ndarray, " pair"], n: int
) -> Lists:
    """Features of each key, each once: where those of a key begin, and the features."""
    pairs = np.unique(np.stack([keys.astype(np.int64), features], axis=1), axis=0)
    ends = np.searchsorted(pairs[:, 0], np.arange(n + 1))
    return ends.astype(np.float64), pairs[:, 1].astype(np.int32)


def lines_of(records: Mapping[int, FeatureRecord], n: int) -> tuple[bytes, np.ndarray]:
    """Claims of a dictionary as JSON, a line a feature, and where each line begins.

    Args:
        records: Records by feature.
        n: Number of features.

    Returns:
        The lines, and the places of their beginnings and of the end.
    """
    lines = [_line(records[i]) if i in records else b"" for i in range(n)]
    return b"".join(lines), np.cumsum([0, *map(len, lines)]).astype(np.float64)


def _line(record: FeatureRecord) -> bytes:
    return json.dumps(plain_record(record), allow_nan=False, separators=(",", ":")).encode() + b"\n"


def as_bytes(values: Iterable[str]) -> np.ndarray:
    """Texts as the bytes of a list in JSON."""
    return np.frombuffer(json.dumps(list(values), separators=(",", ":")).encode(), "u1")
