"""Small finished runs of every command, made once, and the command lines that made them.

All inputs are bundled or drawn here, so that the world is the same everywhere.
"""

import contextlib
import io
import json
import os
import shutil
import tempfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from mechatlas.activations import collect
from mechatlas.activations.networks import Network, load_network
from mechatlas.app.cli import main

SITES = ("mixed4a", "mixed4b")
LAYERS = ("layer0", "mlp1", "layer1")
"""Dictionaries of the sites of the language model."""
COLLECT = """
sites = ["mixed4a", "mixed4b"]
[network]
name = "inception_mini"
[samples]
type = "Images"
source = "photos"
side = 31
crops = 4
[storage]
paired = true
held_out = 0.25
[storage.positions]
per_sample = 12
"""
POSED = """
sites = ["mixed3b"]
[network]
name = "inception_mini"
[samples]
type = "Images"
source = "photos"
side = 31
crops = 2
[storage]
held_out = 0.25
[storage.positions]
per_sample = 12
[group]
name = "C4"
"""
BASIS = """
layers = ["classify:input", "classify"]
n_samples = 40
[network]
name = "inception_mini"
[samples]
type = "Images"
source = "photos"
side = 31
crops = 4
[settings]
kinds = ["lib", "pca"]
n_null_graphs = 2
"""
TRAIN = """
store = "store"
steps = 12
batch_size = 64
n_latents = 48
checkpoint_every = 5
[sparsity]
k = 6
"""
SWEEP = """
store = "{root}/store"
site = "mixed4a"
steps = 12
batch_size = 64
n_latents = [16, 24]
checkpoint_every = 5
[sparsity]
k = 6
"""
LANGUAGE = """
sites = ["model.layers.0", "model.layers.1.mlp", "model.layers.1"]
[network]
name = "transformer"
arguments = { path = "{root}/llama", dtype = "float32" }
[samples]
type = "Texts"
source = "{root}/rows.jsonl"
context = 16
packing = "document"
[storage]
held_out = 0.3
"""
GROUP = 'group = "C6"\nwidth = 16\nsteps = 400\nbatch_size = 36\n'


class World:
    """Folder with inputs and finished runs.

    Args:
        root: Where it is, or will be made.
    """

    def __init__(self, root: Path) -> None:
        self.root: Path = root.resolve()
        place = self.place
        self.commands: dict[str, list[str]] = {
            "collect": ["collect", place("collect.toml")],
            "train": ["train", place("train.toml"), "--store", place("store"),
                      "--site", SITES[0]],
            "group_net": ["train", place("group.toml")],
            "sweep": ["sweep", place("sweep.toml")],
            "export": ["export", place(SITES[0]), "--format", "saelens"],
            "match": ["match", place(SITES[0]), place(SITES[1]), "--cost", "codes",
                      "--store", place("store"), "--rows", "400"],
            "symmetry": ["symmetry", place("few"), "--store", place("posed"),
                         "--interventions", "4"],
            "branches": ["branches", place(SITES[0]), "--store", place("store"),
                         "--rows", "400"],
            "circuit": ["circuit", place(SITES[0]), place(SITES[1]), "--store", place("store"),
                        "--samples", "8", "--held-out", "6", "--n-ablated", "3",
                        "--features", "2", "--visualize-steps", "1"],
            "basis": ["basis", place("basis.toml")],
            "prove": ["prove", place("net", "net.safetensors"),
                      "--table", place("net", "table.npy"), "--exact"],
            "evaluate": ["evaluate", place(SITES[0]), "--n-samples", "4"],
            "effects": ["effects", place("layer1"), "--n-samples", "4", "--n-random", "50",
                        "--n-ablated", "3"],
            "flow": ["flow", place("layer0"), place("layer1"), "--mlp", place("mlp1")],
            "report": ["report", place()],
        }  # fmt: skip
        """Command -> its words, without `--out`; not those that write nothing."""

    def place(self, *parts: str) -> str:
        """Path in the world, as the word of a command line."""
        return str(self.root.joinpath(*parts))

    def words(self, command: str, out: str = "out") -> list[str]:
        """Words of a command that writes to a folder, or to a page."""
        page = "/page.html" if command == "report" else ""
        return [*self.commands[command], "--out", out + page]

    def reads(self, command: str, folder: str) -> list[str]:
        """Words of one of `READ_ALL`, for a folder of runs."""
        return [command, folder, *(["--out", "page.html"] if command == "report" else [])]


READ_ALL = ("report", "serve", "verify")
"""Commands that read runs of every kind."""
RUNS = {"match": "match", "symmetry": "symmetry", "branches": "branches", "circuit": "circuit",
        "basis": "basis", "evaluate": "evaluation", "effects": "effects", "flow": "flow",
        "prove": "proof", "sweep": "sweep", "export": "exported"}  # fmt: skip
"""Command -> name of its finished run in the world."""
FIRST_SHARD = {
    "store": f"store/{SITES[0]}/train-00000.safetensors",
    "posed": "posed/mixed3b/train-00000.safetensors",
    "language": "language/model.layers.0/held-00000.safetensors",
}
"""Store -> file of its rows that commands read."""
PARENTS = {
    "train": ("store",),
    "sweep": ("store",),
    "export": (SITES[0],),
    "symmetry": ("posed", "few"),
    "effects": ("language", "layer1"),
    "flow": ("layer1",),
    **dict.fromkeys(("match", "branches", "circuit", "evaluate"), ("store", SITES[0])),
}
"""Command -> stores and dictionaries that it reads; those of `READ_ALL` read all."""
SHORT_RUNS = ("branches", "prove")
"""Commands with a finished run in the world of the short form."""


def small_rounds() -> None:
    """Let stores have several rounds and shards, however small they are."""
    plan = collect._plan

    def split(*arguments: object) -> list[collect.Round]:
        rounds: Callable[..., list[collect.Round]] = plan
        return [
            collect.Round(each.split, samples)
            for each in rounds(*arguments)
            for samples in np.array_split(each.samples, min(2, len(each.samples)))
        ]

    collect._plan = split
    collect.SHARD_BYTES = 40_000


def plain() -> nn.Module:
    """Network on vectors of eight numbers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


WIDE = 1 << 16
"""Width of rows of which a few thousand are a gibibyte."""


def wide() -> nn.Module:
    """Network on wide rows."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDE, 8), nn.ReLU())


ARRAYS = """
sites = ["1"]
[network]
name = "tests.faults.world:plain"
[samples]
type = "Arrays"
source = "rows.npy"
"""
TEXTS = """
sites = ["out"]
[network]
name = "tests.app.worlds:words"
[samples]
type = "Texts"
source = "text.txt"
context = 20
[storage.positions]
per_sample = 5
"""
FOREIGN = (
    "saelens6_topk", "dictionary_learning_topk", "gemma_scope_one", "gemma_scope_two",
    "sparsify_topk",
)  # fmt: skip
"""Dictionaries that other libraries wrote."""
RECIPES = {"collect": COLLECT, "posed": POSED, "basis": BASIS, "train": TRAIN, "group": GROUP,
           "arrays": ARRAYS, "texts": TEXTS, "sweep": SWEEP, "language": LANGUAGE}  # fmt: skip


def write_inputs(root: Path) -> None:
    """Write recipes, images, arrays, texts and weights."""
    for name, text in RECIPES.items():
        (root / f"{name}.toml").write_text(text.replace("{root}", str(root)))
    random = np.random.default_rng(0)
    rows = random.normal(size=(60, 8)).astype(np.float32)
    np.save(root / "rows.npy", rows)
    np.savez(root / "rows.npz", rows=rows)
    np.savez_compressed(root / "packed.npz", rows=rows)
    np.save(root / "images.npy", random.integers(0, 256, (6, 31, 31, 3), dtype=np.uint8))
    text = " ".join("w" * (1 + i * i % 23) for i in range(900))
    (root / "text.txt").write_text(text)
    with zipfile.ZipFile(root / "texts.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", text)
    photo = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((48, 48))
    (root / "images").mkdir(exist_ok=True)
    with zipfile.ZipFile(root / "photos.zip", "w") as archive:
        for ending, kind in (("jpg", "JPEG"), ("png", "PNG"), ("gif", "GIF"), ("webp", "WEBP")):
            data = io.BytesIO()
            photo.save(data, kind)
            archive.writestr(f"photo.{ending}", data.getvalue())
            (root / "images" / f"photo.{ending}").write_bytes(data.getvalue())
    weights = load_network(Network(name="inception_mini")).state_dict()
    torch.save(weights, root / "weights.pt")
    sentences = [f"Text {i} of some words. " * (1 + i % 3) for i in range(40)]
    (root / "rows.jsonl").write_text("\n".join(json.dumps({"text": each}) for each in sentences))
    golden = Path(__file__).parents[1] / "golden"
    for name in FOREIGN:
        shutil.copytree(golden / name, root / "foreign" / name)


def make(root: Path, *, short: bool = False) -> World:
    """Make the world, or set it back to what it was when it was made."""
    torch.set_num_threads(1)
    small_rounds()
    world, pristine = World(root), root.with_name(f"{root.name}.pristine")
    quiet = contextlib.redirect_stdout(io.StringIO())
    if pristine.exists():
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(pristine, root, symlinks=True)
        os.chdir(world.root)
        with quiet, tempfile.TemporaryDirectory() as place:
            for command in world.commands:  # so that children need not import and compile
                main(world.words(command, f"{place}/{command}"))
        return world
    world.root.mkdir(parents=True)
    os.chdir(world.root)
    write_inputs(world.root)
    with quiet:
        _run_all(world, SHORT_RUNS if short else tuple(RUNS))
    shutil.copytree(world.root, pristine)
    return world


def _train_language(world: World) -> None:
    """Train the dictionaries of a tiny decoder with random weights."""
    from tests.language_models import byte_tokenizer, model  # imports transformers, which is slow

    model("llama").save_pretrained(world.root / "llama")
    byte_tokenizer(first="<s>").save_pretrained(world.root / "llama")
    main(["collect", "language.toml", "--out", "language"])
    for name, site in zip(LAYERS, tomllib.loads(LANGUAGE)["sites"], strict=True):
        main(["train", "train.toml", "--store", "language", "--site", site, "--out", name,
              "--n-latents", "24"])  # fmt: skip


def _run_all(world: World, commands: tuple[str, ...]) -> None:
    main(world.words("collect", "store"))
    for site in SITES:
        main(["train", "train.toml", "--store", "store", "--site", site, "--out", site])
    if "symmetry" in commands:
        main(["collect", "posed.toml", "--out", "posed"])
        main(["train", "train.toml", "--store", "posed", "--out", "few", "--n-latents", "16"])
    if "effects" in commands:
        _train_language(world)
    main(world.words("group_net", "net"))
    for command in commands:
        main(world.words(command, RUNS[command]))
    main(["report", ".", "--out", "page.html"])
