"""Damage of every kind of file, read by every command that reads it.

A file is flipped, cut, emptied, zeroed, swapped with another, linked, and replaced by a folder or
a FIFO. Where the file has a checksum, the command must say so or give the same result.
"""

import contextlib
import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.faults.child import Ended, contents, run
from tests.faults.kills import judge, reference
from tests.faults.table import Table
from tests.faults.world import READ_ALL, RECIPES, RUNS, SITES, World

Damage = Callable[[Path, bytes], object]
"""Callback that puts something else in the place of a file, given what it held."""
LAST_FILE = {"collect": ("manifest.json", 4), "sweep": ("runs.parquet", 1)}
"""Command -> file, and how many of this name in turn, before which its work is done; of most
commands the first recipe.toml."""
NO_CHECKSUM = ("silent",)
"""Outcome that a format without a checksum cannot prevent."""


NO_NAME = (*NO_CHECKSUM, "unnamed")
"""Outcomes of a recipe, of which a sentence may name the value alone."""
NO_PAGE = RUNS["export"]
"""Folder in which there is nothing to draw."""


class Target(NamedTuple):
    """A file, and a command that reads it."""

    file: str
    words: list[str]
    allowed: Sequence[str] = ()
    """Outcomes that its format cannot prevent."""

    @property
    def command(self) -> str:
        """Name of the command."""
        return self.words[0]


class Damages(NamedTuple):
    """Amount of damage that is tried."""

    flips: int
    """Number of bits that are flipped in turn, half of them in the first KiB."""
    thin: int = 1
    """One in so many ways is tried of each file, other ones of the next file."""
    one_cut: bool = False
    """Whether files are cut at one length only."""

    def of(self, size: int, sibling: bytes, seed: int) -> Iterator[tuple[str, Damage]]:
        """Choose ways to damage a file."""
        every = damages(size, sibling, flips=self.flips, seed=seed, one_cut=self.one_cut)
        return itertools.islice(every, seed % self.thin, None, self.thin)


def damages(
    size: int, sibling: bytes, *, flips: int, seed: int, one_cut: bool = False
) -> Iterator[tuple[str, Damage]]:
    """Ways to damage a file.

    Args:
        size: Size of the file.
        sibling: Contents of another file of its kind.
        flips: Number of bits that are flipped in turn.
        seed: Seed of the places.
        one_cut: Whether it is cut at one length only.
    """
    places = random.Random(seed)
    for k in range(flips if size else 0):
        place = places.randrange(min(size, 1024) if k % 2 else size)
        mask = 1 << places.randrange(8)
        yield f"bit {mask} of byte {place}", _flip(place, mask)
    lengths = {size // 2} if one_cut else {0, 1, size // 4, size // 2, size - 2}
    for length in sorted(lengths & set(range(size))):
        yield f"cut to {length}", lambda file, data, n=length: file.write_bytes(data[:n])
    yield "zeros", lambda file, data: file.write_bytes(bytes(len(data)))
    yield "deleted", lambda file, data: file.unlink()
    if sibling:
        yield "swapped", lambda file, data: file.write_bytes(sibling)
    yield "dangling link", lambda file, data: _instead(file, lambda: file.symlink_to("nowhere"))
    yield "circular link", lambda file, data: _instead(file, lambda: file.symlink_to(file.name))
    yield "folder", lambda file, data: _instead(file, file.mkdir)
    yield "FIFO", lambda file, data: _instead(file, lambda: os.mkfifo(file))


def _flip(place: int, mask: int) -> Damage:
    def flip(file: Path, data: bytes) -> None:
        changed = bytearray(data)
        changed[place] ^= mask
        file.write_bytes(changed)

    return flip


def _instead(file: Path, make: Callable[[], object]) -> None:
    file.unlink()
    make()


@contextlib.contextmanager
def damaged(file: Path, damage: Damage) -> Iterator[None]:
    """Damage a file while the context is open."""
    data = file.read_bytes()
    try:
        damage(file, data)
        yield
    finally:
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink(missing_ok=True)
        file.write_bytes(data)


def targets(world: World) -> list[Target]:
    """Every kind of file of the world, with every command that reads it."""
    place, words = world.place, world.words
    a, b = SITES
    found = [
        *(Target(f"{folder}/{name}", words(command)) for folder, name, commands in (
            ("store", f"{a}/train-00000.safetensors",
             ("train", "match", "branches", "circuit", "sweep")),
            ("store", f"{a}/held-00000.safetensors", ("train",)),
            ("store", "manifest.json",
             ("train", "match", "branches", "circuit", "evaluate", "sweep")),
            ("posed", "mixed3b/train-00000.safetensors", ("symmetry",)),
            ("posed", "manifest.json", ("symmetry",)),
            (a, "dictionary.safetensors",
             ("match", "branches", "circuit", "evaluate", "export")),
            (a, "manifest.json", ("match", "branches", "circuit", "evaluate", "export")),
            (b, "dictionary.safetensors", ("match", "circuit")),
            ("few", "dictionary.safetensors", ("symmetry",)),
            ("language", "manifest.json", ("effects",)),
            ("language", "model.layers.0/held-00000.safetensors", ("effects",)),
            ("llama", "model.safetensors", ("effects",)),
            ("layer1", "dictionary.safetensors", ("effects", "flow")),
            ("layer1", "manifest.json", ("effects", "flow")),
            ("mlp1", "dictionary.safetensors", ("flow",)),
        ) for command in commands),
        Target("match/matches.parquet", [*words("branches"), "--match", place("match")]),
        Target("match/manifest.json", [*words("branches"), "--match", place("match")]),
        Target("symmetry/features.parquet", [*words("symmetry"), "--control", place("symmetry")]),
        Target("symmetry/result.json", [*words("symmetry"), "--control", place("symmetry")]),
        Target("proof/proof.safetensors",
               ["prove", "--check", place("proof"), place("net", "net.safetensors")]),
        Target("net/net.safetensors",
               ["prove", "--check", place("proof"), place("net", "net.safetensors")]),
        Target("net/net.safetensors", words("prove")),
        Target("net/table.npy", words("prove"), NO_CHECKSUM),
    ]  # fmt: skip
    names = ("store", a, "few", "language", "layer1", *RUNS.values())
    folders = [world.root / name for name in names]
    for folder in [each for each in folders if each.is_dir()]:
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        found += [
            Target(str(file.relative_to(world.root)), words)
            for words in (world.reads(command, str(folder)) for command in READ_ALL)
            for file in files
            if words[0] == "verify" or (file.parent == folder and folder.name != NO_PAGE)
        ]
    return [target for target in found if (world.root / target.file).is_file()]


def input_targets(world: World) -> list[Target]:
    """Files that people bring, whose formats mostly have no checksum."""
    place = world.place
    images = ["collect", place("collect.toml"), "--out", "out", "--samples.crops", "1"]
    arrays = ["collect", place("arrays.toml"), "--out", "out"]
    texts = ["collect", place("texts.toml"), "--out", "out"]

    def reading(words: list[str], source: str) -> list[str]:
        return [*words, "--samples.source", place(source)]

    found = [
        *(
            Target(f"images/photo.{ending}", reading(images, "images"))
            for ending in ("jpg", "png", "gif", "webp")
        ),
        Target("photos.zip", reading(images, "photos.zip")),
        Target("images.npy", reading(images, "images.npy")),
        *(Target(file, reading(arrays, file)) for file in ("rows.npy", "rows.npz", "packed.npz")),
        *(Target(file, reading(texts, file)) for file in ("text.txt", "texts.zip")),
        Target("weights.pt", [*images, "--network.weights", place("weights.pt")]),
        Target("weights.pt", ["sites", "inception_mini", "--weights", place("weights.pt")]),
        Target("collect.toml", ["sites", place("collect.toml")]),
        *(Target(f"{name}.toml", world.words(name)) for name in RECIPES if name in world.commands),
    ]
    language = ["collect", place("language.toml"), "--out", "out"]
    found += [
        Target(str(file.relative_to(world.root)), language)
        for file in (world.root / "rows.jsonl", *sorted((world.root / "llama").glob("*")))
        if (world.root / "llama").is_dir()
    ]
    found += [
        Target(str(file.relative_to(world.root)), ["load", str(file.parent)])
        for file in sorted((world.root / "foreign").rglob("*"))
        if file.is_file()
    ]
    return [
        target._replace(allowed=NO_NAME if target.file.endswith(".toml") else NO_CHECKSUM)
        for target in found
    ]


def read_damaged(world: World, target: Target, place: Path, table: Table, amount: Damages) -> None:
    """Damage one file in every way, and run the command that reads it."""
    file = world.root / target.file
    whole = run(target.words, place / "whole")
    assert whole.code == 0, (target, whole)
    expected = _result(whole, place / "whole")
    siblings = [p for p in sorted(world.root.rglob(f"*{file.suffix}")) if p.is_file() and p != file]
    sibling = next((p.read_bytes() for p in siblings if p.name == file.name), b"")
    size, seed = file.stat().st_size, len(target.file)
    for what, damage in amount.of(size, sibling, seed):
        here = place / "damaged"
        with damaged(file, damage):
            ended = run(target.words, here)
        outcome = _outcome(ended, file, expected, here)
        table.add(
            f"damage of {target.file}",
            target.command,
            outcome,
            f"{what}: exit {ended.code}: {ended.message}",
            allowed=target.allowed,
        )
        shutil.rmtree(here)
    shutil.rmtree(place / "whole")


def _result(ended: Ended, here: Path) -> tuple[str, dict[str, bytes]]:
    return _without_seconds(ended.output), contents(here)


def _without_seconds(text: str) -> str:
    volatile = (" s of CPU time", "http://127.0.0.1")
    return "\n".join(line for line in text.splitlines() if not any(v in line for v in volatile))


def _outcome(ended: Ended, file: Path, expected: tuple[str, dict[str, bytes]], here: Path) -> str:
    if ended.code is None:
        return "hang"
    if ended.code == 2:
        names = (file.name, str(file.parent))
        text = ended.said
        said = "mechatlas: " in ended.errors or ended.output
        return "named" if said and any(n and n in text for n in names) else "unnamed"
    if ended.code == 0:
        result = _result(ended, here)
        if result == expected:
            return "same"
        return "named" if _mentions(file, result) > _mentions(file, expected) else "silent"
    return "traceback" if ended.code == 1 else "crash"


def _mentions(file: Path, result: tuple[str, dict[str, bytes]]) -> int:
    """Number of times that a file is named in what was said, or on a page that was drawn."""
    said = [result[0].encode(), *(d for name, d in result[1].items() if name.endswith(".html"))]
    return sum(text.count(file.name.encode()) for text in said)


def stop_at(name: str, nth: int = 1) -> Callable[[], None]:
    """Kill the process when a file of a name is about to be in its place for the nth time."""
    seen = 0

    def prepare() -> None:
        replace = os.replace

        def watched(source: str, target: str) -> None:
            nonlocal seen
            seen += Path(target).name == name
            if seen == nth and Path(target).name == name:
                os._exit(137)
            replace(source, target)

        os.replace = watched

    return prepare


def continue_damaged(
    world: World, command: str, place: Path, table: Table, amount: Damages, *, most_files: int = 99
) -> None:
    """Damage every file of a run that was killed at its end, and run the command again."""
    whole = reference(world, command)
    last = LAST_FILE.get(command, ("recipe.toml", 1))
    killed = run(world.words(command), place / "killed", stop_at(*last))
    assert killed.code == 137, killed
    left = [p for p in sorted((place / "killed").rglob("*")) if p.is_file()]
    for file in [p for p in left if not p.name.endswith(".tmp")][:most_files]:
        name = file.relative_to(place / "killed")
        size = file.stat().st_size
        for what, damage in amount.of(size, b"", size):
            here = place / "again"
            shutil.copytree(place / "killed", here)
            damage(here / name, file.read_bytes())
            ended = run(world.words(command), here)
            outcome, example = judge(ended, here, whole)
            if outcome == "refused":
                empty = f"{file.parent.name} is not empty"  # so it is without its manifest
                names = (file.name, "out is not empty", empty)
                outcome = "named" if any(n in ended.said for n in names) else "unnamed"
            table.add(f"damage of unfinished {name}", command, outcome, f"{what}: {example}")
            shutil.rmtree(here)
    shutil.rmtree(place / "killed")
