"""CPU time of checksums: reading a store, loading a dictionary, and the tour.

    python benchmarks/cost_of_checksums.py --rounds 41 --tour runs/tour

Both ways are measured in turn, in one process, with the files in the cache of the system. A store
without checksums is one whose checksums are not computed; a dictionary without them is the same
file in a folder without a manifest. The least that a checksum of whole shards could cost is
measured too: every byte is looked at once, by an exclusive or. Of the tour, the share of its CPU
time within checksums is printed. `--against SRC` measures another version in turn with this one, in
processes of their own, each on files that it wrote itself.
"""

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from mechatlas import files  # before all that takes functions from it

SPENT = [0.0]
"""CPU seconds within checksums so far."""
INSIDE = [0]
"""Depth of checksums that call one another."""


def timed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the CPU time of a function to what was spent."""

    @functools.wraps(function)
    def measured(*arguments: Any, **options: Any) -> Any:
        start = time.process_time()
        INSIDE[0] += 1
        try:
            return function(*arguments, **options)
        finally:
            INSIDE[0] -= 1
            if not INSIDE[0]:
                SPENT[0] += time.process_time() - start

    return measured


for name in ("checksum", "checksum_file", "stated_checksum", "_seal"):
    setattr(files, name, timed(getattr(files, name)))

from mechatlas import tensorfiles  # noqa: E402

tensorfiles.checksum_of = timed(tensorfiles.checksum_of)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from mechatlas.activations import collect as collecting  # noqa: E402
from mechatlas.activations import store as stores  # noqa: E402
from mechatlas.app.cli import main as mechatlas  # noqa: E402
from mechatlas.dictionaries.formats import load  # noqa: E402

WIDTH, N_SAMPLES, N_LATENTS, BATCH = 512, 100_000, 8192, 4096
"""A store of about 200 MB and a dictionary of about 34 MB."""


def network() -> nn.Module:
    """Network whose activations are its inputs."""
    return nn.Sequential(nn.Identity())


class Same(str):
    """Checksum that is equal to any other, and takes no time."""

    def __new__(cls, data: object) -> "Same":
        """Look at nothing."""
        del data
        return super().__new__(cls)

    def __eq__(self, other: object) -> bool:
        """Equal to all."""
        return True

    def __ne__(self, other: object) -> bool:
        """Different from none."""
        return False

    def __hash__(self) -> int:
        """Hash all alike."""
        return 0


class Looked(Same):
    """Checksum that is equal to any other, and looks at every byte once, as the least it can do."""

    def __init__(self, data: memoryview) -> None:
        np.bitwise_xor.reduce(np.frombuffer(data, np.uint64, len(data) // 8))


VERSION = """
import json, sys, time
from pathlib import Path
from mechatlas.activations.store import Store
from mechatlas.app.cli import main
from mechatlas.dictionaries.formats import load
def timed(work):
    start = time.process_time()
    work()
    return time.process_time() - start
def read():
    rows = Store(Path("store")).rows("0")
    batches = rows.batches(BATCH, seed=0)
    for _ in range(rows.n_rows // BATCH):
        next(batches)
if not Path("sae").exists():
    main(["collect", "collect.toml"])
    main(["train", "train.toml"])
read()
first, *later = [timed(lambda: load(Path("sae"))) for _ in range(6)]
print(json.dumps([min(timed(read) for _ in range(6)), first, min(later)]))
"""
"""Measurements of one version, in a process of its own."""


NETWORK = """
from torch import nn
def same():
    return nn.Sequential(nn.Identity())
"""
"""Module of a network whose activations are its inputs."""


def versions(place: Path, sources: Sequence[Path], rounds: int) -> list[list[list[float]]]:
    """Measure versions in turn, in fresh processes.

    Args:
        place: Folder to work in.
        sources: Folders `src` of the versions.
        rounds: Number of processes of each.

    Returns:
        CPU seconds of reading, the least of several, of the first loading, and the least of later
        ones, for each round and version.
    """
    found = []
    for source in sources:
        here = place / source.absolute().parent.name
        here.mkdir()
        (here / "nets.py").write_text(NETWORK)
        rows = torch.randn(N_SAMPLES, WIDTH, generator=torch.Generator().manual_seed(0))
        np.save(here / "rows.npy", rows.numpy())
        (here / "collect.toml").write_text(
            'sites = ["0"]\nout = "store"\n[network]\nname = "nets:same"\n'
            '[samples]\ntype = "Arrays"\nsource = "rows.npy"\n'
        )
        (here / "train.toml").write_text(
            f'store = "store"\nout = "sae"\nsteps = 1\nbatch_size = 64\nn_latents = {N_LATENTS}\n'
        )

    def one(source: Path) -> list[float]:
        said = subprocess.run(
            [sys.executable, "-c", VERSION.replace("BATCH", str(BATCH))],
            cwd=place / source.absolute().parent.name, stdout=subprocess.PIPE, text=True,
            check=True,            env={**os.environ, "PYTHONPATH": str(source.absolute())},
        )  # fmt: skip
        return json.loads(said.stdout.splitlines()[-1])

    for number in range(rounds + 1):
        order = list(sources) if number % 2 else list(sources)[::-1]
        measured = {source: one(source) for source in order}
        found.append([measured[source] for source in sources])
    return found[1:]  # the first writes and compiles


def make(place: Path) -> tuple[stores.Store, Path]:
    """Collect a store and train a dictionary for one step."""
    rows = torch.randn(N_SAMPLES, WIDTH, generator=torch.Generator().manual_seed(0))
    store = collecting.collect(network(), rows, ["0"], out=place / "store")
    (place / "train.toml").write_text(
        f'store = "{place}/store"\nout = "{place}/sae"\nsteps = 1\nbatch_size = 64\n'
        f"n_latents = {N_LATENTS}\n"
    )
    mechatlas(["train", str(place / "train.toml")])
    return store, place / "sae"


def shuffled(root: Path, checksum: Callable[..., str]) -> float:
    """CPU seconds of the first pass over all rows, as training reads them."""
    rows = stores.Store(root).rows("0")
    with mock.patch.object(stores, "checksum", checksum):
        start, batches = time.process_time(), rows.batches(BATCH, seed=0)
        for _ in range(rows.n_rows // BATCH):
            next(batches)
        return time.process_time() - start


def trained(place: Path, checksum: Callable[..., str]) -> float:
    """CPU seconds of training for one pass over all rows."""
    with mock.patch.object(stores, "checksum", checksum):
        shutil.rmtree(place / "trained", ignore_errors=True)
        words = ["--out", str(place / "trained"), "--n-latents", "512", "--batch-size", str(BATCH)]
        start = time.process_time()
        mechatlas(["train", str(place / "train.toml"), *words, "--steps", str(N_SAMPLES // BATCH)])
    return time.process_time() - start


def loading(folder: Path) -> float:
    """CPU seconds of loading a dictionary."""
    start = time.process_time()
    load(folder)
    return time.process_time() - start


def in_turn(number: int, measure: Callable[[Any], float], ways: Sequence[Any]) -> list[float]:
    """Measure every way, each round beginning with another one."""
    found = dict.fromkeys(range(len(ways)), 0.0)
    for k in range(len(ways)):
        which = (k + number) % len(ways)
        found[which] = measure(ways[which])
    return list(found.values())


def tell(what: str, pairs: list[list[float]]) -> None:
    """Print medians, and the median of the ratios of one round."""
    ratio = statistics.median(with_ / without for with_, without in pairs)
    with_, without = (statistics.median(each) for each in zip(*pairs, strict=True))
    print(f"{what}: {with_:.4f} s with checksums, {without:.4f} s without: {ratio - 1:+.1%}")


def main() -> None:
    """Measure, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--trainings", type=int, default=4)
    parser.add_argument("--tour", type=Path, help="also run the tour, into this folder")
    parser.add_argument("--against", type=Path, help="folder src of another version, for that only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.against:
        sources = (Path(files.__file__).parents[1], options.against)
        with tempfile.TemporaryDirectory() as temporary:
            found = np.array(versions(Path(temporary), sources, options.rounds))
        for what, of in zip(("reading", "loading first", "loading again"), found.T, strict=True):
            ratio = float(np.median(of[0] / of[1]))
            this, other = np.median(of, axis=1)
            print(f"{what}: {this:.4f} s here, {other:.4f} s there: {ratio - 1:+.1%}")
        return
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        store, folder = make(place)
        bare = place / "bare"
        bare.mkdir()
        shutil.copy(folder / "dictionary.safetensors", bare)
        reads, trainings, loads = [], [], []
        for number in range(options.rounds + 1):  # the first is left out
            ways = (stores.checksum, Same, Looked)
            reads.append(in_turn(number, lambda way: shuffled(store.root, way), ways))
            loads.append(in_turn(number, loading, (folder, bare)))
            if number < options.trainings:
                train = functools.partial(trained, place)
                trainings.append(in_turn(number, train, (stores.checksum, Same)))
    size = sum(shard.bytes for shard in store.shards) >> 20
    what = f"reading the rows of {size} MiB once, shuffled"
    tell(what, [[hashed, bare] for hashed, bare, _ in reads[1:]])
    tell(f"{what}, with an exclusive or", [[looked, bare] for _, bare, looked in reads[1:]])
    if trainings[1:]:
        tell("training on them once", trainings[1:])
    tell(f"loading a dictionary of {N_LATENTS} latents", loads[1:])
    if options.tour:
        SPENT[0], start = 0.0, time.process_time()
        mechatlas(["demo", "--out", str(options.tour)])
        whole = time.process_time() - start
        print(f"tour: {SPENT[0]:.2f} of {whole:.1f} s within checksums: {SPENT[0] / whole:.1%}")


if __name__ == "__main__":
    main()
