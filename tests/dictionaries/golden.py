"""Dictionaries that other libraries wrote, and what those libraries make of some rows."""

import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from mechatlas.dictionaries.formats import load
from mechatlas.dictionaries.pretrained import CrossLayerDictionary, Pretrained
from mechatlas.dictionaries.sparsity import ReLU
from mechatlas.dictionaries.temporal import TemporalDictionary

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = safetensors.torch.load_file(GOLDEN / "expected.safetensors")
X = EXPECTED["x"]
NAMES = sorted({key.split("/")[0] for key in EXPECTED if "/" in key})
UNSCALED = ("saelens6_standard_expected", "saelens6_standard_whitening")


def read(path: Path) -> Pretrained:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dictionary = load(path)
    assert isinstance(dictionary, Pretrained)
    return dictionary


def weights_of(folder: Path) -> Path:
    (file,) = (f for f in folder.iterdir() if f.suffix != ".json")
    return file


PUBLISHED_EXPECTED = safetensors.torch.load_file(GOLDEN / "published.safetensors")
_WRITTEN = sorted({key.split("/")[0] for key in PUBLISHED_EXPECTED if "/" in key})
TEMPORAL = [name for name in _WRITTEN if name.startswith("temporal")]
"""Dictionaries that read windows of tokens."""
PUBLISHED = [name for name in _WRITTEN if name not in TEMPORAL]
SITES = [name for name in PUBLISHED if f"{name}/x" in PUBLISHED_EXPECTED]
GIVEN: dict[str, dict[str, Any]] = {
    "qwen_scope": {"k": 4},
    "overcomplete_sae": {"sparsity": ReLU()},
    "overcomplete_topk": {"k": 4},
    "overcomplete_normed": {"k": 4},
    "overcomplete_batchtopk": {"threshold": 0.4},
    "overcomplete_pursuit": {"k": 4},
    "gemma_scope_transcoder": {"transcodes": True},
}
"""What the files of a layout lack."""


def expected(name: str) -> dict[str, Tensor]:
    """Rows and the numbers of a library for them."""
    own = {
        key.removeprefix(f"{name}/"): tensor
        for key, tensor in PUBLISHED_EXPECTED.items()
        if key.startswith(f"{name}/")
    }
    return {"x": PUBLISHED_EXPECTED["x"], **own}


def read_temporal(name: str) -> TemporalDictionary:
    folder = GOLDEN / name
    dictionary = load(folder / "layer_12" if name == "temporal_published" else folder)
    assert isinstance(dictionary, TemporalDictionary)
    return dictionary


def read_published(name: str) -> Pretrained | CrossLayerDictionary:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dictionary = load(GOLDEN / name, **GIVEN.get(name, {}))
    assert isinstance(dictionary, Pretrained | CrossLayerDictionary)
    return dictionary
