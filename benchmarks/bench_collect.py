"""Memory while collecting 5 GiB under a budget of 1 GiB, and the speed of it.

Run: `make bench`. The peak is that of a fresh process, as the operating system counts it. The
floor is the network alone: the same forward passes, reading nothing and writing nothing.
"""

import json
import subprocess
import sys

import pytest

CODE = """
import json, resource, sys, time
from pathlib import Path
import numpy as np, torch
from mechatlas.activations.collect import StoreConfig, collect
from mechatlas.activations.networks import Network, load_network
from mechatlas.activations.positions import Positions
from mechatlas.activations.samples import Images, open_samples
from mechatlas.activations.sites import find_sites, read_activations
folder, n = Path(sys.argv[1]), int(sys.argv[2])
network = load_network(Network(name="inception_mini"))
samples = open_samples(Images(source=str(folder / "images.npy")), network)
sites = find_sites(network, ["mixed3a"])
x = samples.stack([samples.read(i) for i in range(64)])
with torch.inference_mode():
    read_activations(network, x, sites)
    started = time.process_time()
    for _ in range(10):
        read_activations(network, x, sites)
    floor = (time.process_time() - started) / 640
imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
started, wall = time.process_time(), time.perf_counter()
settings = StoreConfig(positions=Positions(rule="all"), memory_mib=1024)
store = collect(network, samples, sites, folder / "store", settings)
seconds = time.process_time() - started
print(json.dumps({
    "gib": sum(s.bytes for s in store.shards) / 2**30,
    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "peak_before_mib": imported / 2**20,
    "cpu_seconds": seconds,
    "wall_seconds": time.perf_counter() - wall,
    "ratio_to_forward_passes": seconds / (floor * n),
}))
"""


@pytest.mark.parametrize("gib", [5])
def test_memory_while_collecting(benchmark, tmp_path, gib):
    import numpy as np

    n = int(gib * 2**30 / (225 * (104 * 4 + 12))) + 1
    images = np.lib.format.open_memmap(
        tmp_path / "images.npy", mode="w+", dtype=np.uint8, shape=(n, 31, 31, 3)
    )
    random = np.random.default_rng(0)
    for start in range(0, n, 1000):
        images[start : start + 1000] = random.integers(0, 256, images[start : start + 1000].shape)
    images.flush()
    command = [sys.executable, "-c", CODE, str(tmp_path), str(n)]

    def run() -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    said = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update(json.loads(said))
    print(f"\n{benchmark.extra_info}")
    assert benchmark.extra_info["peak_mib"] < 1024
