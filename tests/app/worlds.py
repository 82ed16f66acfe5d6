"""Small finished runs to make pages of, with names that no page should trust."""

import importlib
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mechatlas.activations.collect import StoreConfig
from mechatlas.activations.networks import Network
from mechatlas.activations.positions import Positions
from mechatlas.activations.samples import Images, Texts
from mechatlas.app.cli import configure
from mechatlas.app.commands.collect import CollectConfig
from mechatlas.app.commands.train import TrainConfig
from mechatlas.app.estimates import Estimate, OnlyEstimate
from mechatlas.app.run_folder import as_plain, execute
from mechatlas.dictionaries.sparsity import TopK


def run_command(name: str, *words: str) -> tuple[dict[str, Any], str]:
    """Run a command as the command line does: its result as plain values, and in words."""
    command = importlib.import_module(f"mechatlas.app.commands.{name}")
    result = execute(configure(command, name, list(words)))
    return as_plain(result), command.in_words(result)


def dry_run(name: str, *words: str | Path, out: Path) -> Estimate:
    """Estimate of a command, which writes nothing."""
    command = importlib.import_module(f"mechatlas.app.commands.{name}")
    config = configure(command, name, [*map(str, words), "--out", str(out)])
    with pytest.raises(OnlyEstimate) as end:
        execute(config, dry_run=True)
    assert not out.exists()
    assert 0 < end.value.estimate.seconds < 600
    return end.value.estimate


def bytes_in(folder: Path) -> int:
    """Bytes of the tables and tensors of a run."""
    files = (*folder.glob("*.parquet"), *folder.glob("*.safetensors"))
    return sum(path.stat().st_size for path in files)


HOSTILE_FILE = "a</script><script>alert(1)</script>&<b>.png"
HOSTILE_RUN = "<img src=x onerror=alert(1)>"
HOSTILE_WORD = "</script><i>"


class Words(nn.Module):
    """Word vectors and one mixing of neighbors."""

    def __init__(self) -> None:
        super().__init__()
        self.input = Spaces()
        self.embed = nn.Embedding(40, 12)
        self.mix = nn.Conv1d(12, 12, 3, padding=1)
        self.out = nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.mix(self.embed(tokens).movedim(1, 2)).movedim(1, 2).relu())


class Spaces(nn.Module):
    """A tokenizer whose tokens are the lengths of words."""

    def windows(self, text: str, context: int) -> np.ndarray:
        lengths = np.array([min(len(word), 39) for word in text.split()])
        return lengths[: len(lengths) // context * context].reshape(-1, context)

    def decode(self, tokens: np.ndarray) -> list[str]:
        return [HOSTILE_WORD if t == 3 else f" {'w' * int(t)}" for t in tokens]


def words() -> Words:
    torch.manual_seed(0)
    return Words().eval()


def photographs(path: Path, n: int = 24, side: int = 40) -> Path:
    """A zip of smooth random pictures, one of them with a hostile name."""
    random = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(n):
            coarse = random.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            data = io.BytesIO()
            Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(data, "PNG")
            archive.writestr(HOSTILE_FILE if i == 0 else f"photo {i}.png", data.getvalue())
    return path


def pictures_and_words(folder: Path) -> Path:
    """Two dictionaries of a convolutional network and one of a language model."""
    positions = Positions(rule="random", per_sample=30)
    pictures = CollectConfig(
        network=Network(name="tests.networks:tiny"),
        sites=("first", "mixed"),
        samples=Images(source=str(photographs(folder.with_suffix(".zip"))), side=15, crops=3),
        storage=StoreConfig(positions=positions),
        out=folder / "pictures",
    )
    execute(pictures)
    folder.with_suffix(".txt").write_text(" ".join("w" * (1 + i * i % 23) for i in range(3000)))
    texts = CollectConfig(
        network=Network(name="tests.app.worlds:words"),
        sites=("out",),
        samples=Texts(source=folder.with_suffix(".txt"), context=40),
        storage=StoreConfig(positions=positions),
        out=folder / "texts",
    )
    execute(texts)
    runs = [
        (pictures.out, "mixed", 300, "mixed"),
        (pictures.out, "first", 60, HOSTILE_RUN),
        (texts.out, "out", 50, "words"),
    ]
    for store, site, n_latents, name in runs:
        execute(
            TrainConfig(
                store=store,
                site=site,
                out=folder / name,
                n_latents=n_latents,
                sparsity=TopK(k=3),
                steps=12,
                batch_size=64,
            )
        )
    return folder
