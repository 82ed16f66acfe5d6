"""CPU time of checksums: reading a store, loading a dictionary, and the tour.

    python benchmarks/cost_of_checksums.py --rounds 41 --tour runs/tour

Both ways are measured in turn, in one process, with the files in the cache of the system. A store
without checksums is one whose checksums are not computed; a dictionary without them is the same
file in a folder without a manifest. The least that a checksum of whole shards could cost is
measured too: every byte is looked at once, by an exclusive or. Of the tour, the share of its CPU
time within checksums is printed.
"""

import argparse
import functools
import shutil
import statistics
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
    options = parser.parse_args()
    torch.set_num_threads(1)
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
