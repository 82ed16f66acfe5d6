"""Kills in the middle of collecting: of a worker, of the driver, and of the cluster.

Run by `make test-cluster`, on processes and on Ray clusters of this machine.
"""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import mechatlas as ma
from mechatlas.app.cli import main
from mechatlas.app.engines import as_engine
from tests.activations import test_collect_engines as rounds
from tests.activations.test_collect_engines import photos

__all__ = ["photos"]
pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
OPEN = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
"""Environment of a cluster on loopback that is started by hand."""
DRIVER = """
import sys
from pathlib import Path
from tests.app import test_cluster
if __name__ == "__main__":
    test_cluster.drive(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
"""


def slowly(photos):
    """Open the inputs of a network that takes its time."""
    network, samples = rounds.reopen(photos)
    network.register_forward_pre_hook(lambda *_: time.sleep(0.3))
    return network, samples


def drive(photos, out, engine, **options):
    network, samples = rounds.reopen(photos)
    reopen = functools.partial(rounds.reopen if options else slowly, photos, **options)
    return rounds.collect(
        network, samples, rounds.SITES, out, rounds.SETTINGS,
        engine=as_engine(engine), reopen=reopen,
    )  # fmt: skip


def needs_ray(engine):
    if engine == "ray":
        pytest.importorskip("ray", reason="Ray is not installed: pip install 'mechatlas[ray]'")


def rounds_done(out):
    try:
        return len(json.loads((out / "manifest.json").read_text())["rounds_done"])
    except (OSError, ValueError, TypeError):
        return 0


def started(photos, out, engine, **environment):
    """Start a driver in a process of its own, and wait until it has done two rounds."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(photos), str(out), engine],
        cwd=ROOT, env=os.environ | environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while rounds_done(out) < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    return process


def children(pid):
    """Numbers of the processes that a process has started, and of those that they have."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *children(child)]
    return found


def gone(pids, seconds):
    """Whether all processes end within some seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("engine", ["ray"])
def test_a_killed_worker_costs_nothing_but_its_round(photos, tmp_path, engine):
    needs_ray(engine)
    rounds.collected(photos, tmp_path / "whole")
    mark = tmp_path / "died"
    drive(photos, tmp_path / "other", engine, mark=mark)
    assert mark.exists()
    assert rounds.files(tmp_path / "other") == rounds.files(tmp_path / "whole")


@pytest.mark.parametrize("engine", ["processes:2", "ray"])
def test_after_a_kill_of_the_driver_workers_end_and_the_same_command_goes_on(
    photos, tmp_path, engine
):
    needs_ray(engine)
    whole = rounds.collected(photos, tmp_path / "whole")
    out = tmp_path / "other"
    driver = started(photos, out, engine)
    workers = children(driver.pid)
    assert workers
    driver.send_signal(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    assert gone(workers, 300)  # the processes of a Ray cluster take their time
    assert 2 <= rounds_done(out) < whole.manifest["rounds"]
    drive(photos, out, "processes:1")
    assert rounds.files(out) == rounds.files(tmp_path / "whole")


def test_after_a_kill_of_the_head_of_the_cluster_the_same_command_goes_on(photos, tmp_path):
    needs_ray("ray")
    rounds.collected(photos, tmp_path / "whole")
    out = tmp_path / "other"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
         "--num-cpus=2", "--node-ip-address=127.0.0.1", f"--port={address.partition(':')[2]}",
         "--include-dashboard=false"],
        cwd=ROOT, env=os.environ | OPEN,
    )  # fmt: skip
    cluster = []
    try:
        time.sleep(5)
        driver = started(photos, out, "ray", RAY_ADDRESS=address, **OPEN)
        cluster = children(head.pid)
        for pid in cluster:
            os.kill(pid, signal.SIGKILL)
        assert driver.wait(timeout=300) != 0
        said = driver.communicate()[1]  # Ray itself may end the driver before it can speak
        assert "goes on from there" in said or "The program will terminate" in said
    finally:
        head.kill()
        head.wait()
    assert rounds_done(out) >= 2
    drive(photos, out, "processes:1")
    assert rounds.files(out) == rounds.files(tmp_path / "whole")


@pytest.mark.parametrize("engine", ["processes:2", "ray"])
def test_matchings_are_the_same_bytes_on_every_engine(tmp_path, engine):
    needs_ray(engine)
    random = np.random.default_rng(0)
    first = random.normal(size=(80, 16)).astype(np.float32)
    for k in range(3):
        rows = first[random.permutation(80)] + np.float32(0.1 * k)
        sae = ma.Autoencoder(d_in=16, n_latents=80, sparsity=ma.TopK(k=4), tied=True)
        sae.W_dec.data.copy_(torch.nn.functional.normalize(torch.from_numpy(rows), dim=1))
        ma.save(sae, tmp_path / f"layer{k}")
    layers = [str(tmp_path / f"layer{k}") for k in range(3)]
    for name in ("here", engine):
        main(["match", *layers, "--out", str(tmp_path / f"on {name}"), "--engine", name])
    for file in ("matches.parquet", "tracks.parquet"):
        here, there = (tmp_path / f"on {name}" / file for name in ("here", engine))
        assert here.read_bytes() == there.read_bytes()
