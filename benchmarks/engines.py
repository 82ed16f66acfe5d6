"""Wall time of engines: two processes beside one, Ray beside processes, two ranks beside one.

    python benchmarks/engines.py ceiling [pieces]    what two cores give: separate products
    python benchmarks/engines.py collect [crops]     rounds here and on two processes
    python benchmarks/engines.py sweep [steps]       eight trainings likewise
    python benchmarks/engines.py overhead [pieces]   pieces of 5 CPU seconds on processes:2 and ray
    python benchmarks/engines.py ranks [steps]       768 x 12,288, one and two ranks of torchrun

Wall seconds, so at least two cores must be idle; one thread each (OMP_NUM_THREADS=1 is set).
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import dataclasses
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from mechatlas.activations.images import Images
from mechatlas.activations.networks import Network
from mechatlas.app.commands.collect import CollectConfig
from mechatlas.app.commands.sweep import SweepConfig
from mechatlas.app.engines import as_engine
from mechatlas.app.run_folder import execute

D, LATENTS, K, ROWS = 768, 12_288, 32, 4096
WARM_UP = 5
"""Steps that are not timed."""
PIECE_SECONDS = 5.0


def timed(work):
    """Wall seconds of a call, and CPU seconds of this process and of those that it waited for."""
    cpu, wall = sum(os.times()[:4]), time.perf_counter()
    work()
    return time.perf_counter() - wall, sum(os.times()[:4]) - cpu


def compare(name, run, engines):
    """Time a function of an engine on several, and print it beside the first."""
    first = None
    for engine in engines:
        wall, cpu = timed(lambda engine=engine: run(engine))
        first = first or wall
        print(
            f"{name}: {engine}: {wall:.1f} s wall, {cpu:.1f} CPU, x {first / wall:.2f}", flush=True
        )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    if peak:
        print(f"{name}: largest worker {peak / 1024:.0f} MiB", flush=True)


def store_config(out, engine, crops):
    config = CollectConfig(
        network=Network(name="inception_mini"),
        samples=Images(source="photos", side=63, crops=crops),
        sites=("mixed3b", "mixed4c"),
        engine=engine,
        out=out,
    )
    many = dataclasses.replace(config.storage.positions, per_sample=50)
    return dataclasses.replace(
        config,
        storage=dataclasses.replace(
            config.storage, positions=many, memory_mib=512, dtype="float32"
        ),
    )


def products(piece, n):
    """Multiply matrices that fit into a core's cache, with one thread."""
    torch.set_num_threads(1)
    x = torch.randn(768, 768, generator=torch.Generator().manual_seed(piece))
    for _ in range(n):
        x = torch.tanh(x @ x)
    return piece


def ceiling(_folder, pieces=8):
    def run(name):
        assert len(dict(as_engine(name).map(products, range(pieces), shared=300))) == pieces

    compare("ceiling", run, ("here", "processes:2"))


def collect(folder, crops=2000):
    def run(engine):
        execute(store_config(folder / engine.replace(":", ""), engine, crops))

    compare("collect", run, ("here", "processes:2"))


def sweep(folder, steps=600):
    execute(store_config(folder / "store", "here", 100))
    recipe = folder / "sweep.toml"
    recipe.write_text(
        f'store = "{folder}/store"\nsite = "mixed3b"\nn_latents = 2048\nsteps = {steps}\n'
        "batch_size = 1024\nseed = [0, 1, 2, 3, 4, 5, 6, 7]\n[sparsity]\nk = 32\n"
    )

    def run(engine):
        execute(SweepConfig(recipe=recipe, out=folder / engine.replace(":", ""), engine=engine))

    compare("sweep", run, ("here", "processes:2"))


def busy(piece, seconds):
    """Use a core for some CPU seconds."""
    until = time.process_time() + seconds
    x = torch.randn(256, 256)
    while time.process_time() < until:
        x = torch.tanh(x @ x)
    return piece


def overhead(_folder, pieces=8):
    def run(name):
        found = dict(as_engine(name).map(busy, range(pieces), shared=PIECE_SECONDS))
        assert found == {i: i for i in range(pieces)}

    import ray  # pyright: ignore[reportMissingImports]

    compare("overhead", run, ("processes:2",))
    start, _ = timed(lambda: ray.init("local", num_cpus=2, include_dashboard=False))
    print(f"overhead: {start:.1f} s wall to start a cluster", flush=True)
    compare("overhead", run, ("ray",))
    ray.shutdown()


def ranks(_folder, steps=50):
    for n in 3 * (1, 2):
        command = ["-m", "torch.distributed.run", f"--nproc-per-node={n}", "--standalone"]
        subprocess.run([sys.executable, *command, __file__, "rank", str(steps)], check=True)


def rank(_folder, steps):
    """Train as one of the ranks of torchrun, and print the wall seconds of a step."""
    import mechatlas as ma
    from mechatlas.dictionaries import training
    from mechatlas.dictionaries.sharded import Shard, mesh_of

    torch.set_num_threads(1)
    training.MEASUREMENTS = 1  # held-out rows are for long runs to look at
    x = torch.randn(20_000, D, generator=torch.Generator().manual_seed(0))
    form = ma.Autoencoder(d_in=D, n_latents=K, sparsity=ma.TopK(k=K))
    mesh = mesh_of()
    times = []

    def on_progress(done, _total):
        times.append((done, time.perf_counter(), time.process_time()))

    shard = Shard(form, n_latents=LATENTS, mesh=mesh)
    ma.train(shard, x, steps=WARM_UP + steps, batch_size=ROWS, on_progress=on_progress)
    (first, *start), (last, *end) = next(t for t in times if t[0] >= WARM_UP), times[-1]
    wall, cpu = (
        (after - before) / (last - first) for before, after in zip(start, end, strict=True)
    )
    size = os.environ["WORLD_SIZE"]
    print(
        f"rank {os.environ['RANK']} of {size}: {wall:.3f} s wall a step, {cpu:.3f} CPU", flush=True
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        part = {each.__name__: each for each in (ceiling, collect, sweep, overhead, ranks, rank)}[
            sys.argv[1]
        ]
        part(Path(made), *map(int, sys.argv[2:3]))
