"""Kills in the middle of collecting, matching and proving: of a worker, the driver, the cluster.

Run by `make test-cluster`, on processes and on Ray clusters of this machine.
"""

import contextlib
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
from safetensors.numpy import save_file

import mechatlas as ma
from mechatlas.app.cli import main
from mechatlas.app.commands import match, sweep
from mechatlas.app.engines import as_engine
from mechatlas.maths import assignment, pricing
from tests.activations import test_collect_engines as rounds
from tests.activations.test_collect_engines import photos
from tests.analysis.proofs.planted import planted

__all__ = ["photos"]
pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
OPEN = {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}  # fmt: skip
"""Environment of a cluster on loopback that is started by hand."""
DRIVER = """
import sys
from pathlib import Path
from tests.app import test_cluster
if __name__ == "__main__":
    test_cluster.drive(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
"""
COMMAND = """
import sys
from tests.app import test_cluster
if __name__ == "__main__":
    test_cluster.command_slowly(sys.argv[1:])
"""
PIECES = {"match": (match, "_pair_elsewhere"), "prove": (sweep, "_run_one")}
WORK = {name: getattr(*place) for name, place in PIECES.items()}
N_PIECES = 4


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


@contextlib.contextmanager
def ray_head():
    """Start a cluster of two workers; its first process, and its address."""
    needs_ray("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
         "--num-cpus=2", "--node-ip-address=127.0.0.1", f"--port={port}",
         "--include-dashboard=false"],
        cwd=ROOT, env=os.environ | OPEN, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not any("raylet" in command_of(pid) for pid in children(head.pid)):
            assert head.poll() is None
            time.sleep(0.5)
        yield head, f"127.0.0.1:{port}"
    finally:
        for pid in [*children(head.pid), head.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        head.wait()


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def kill_head(head):
    for pid in [*children(head.pid), head.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_after_a_kill_of_the_head_of_the_cluster_the_same_command_goes_on(photos, tmp_path):
    rounds.collected(photos, tmp_path / "whole")
    out = tmp_path / "other"
    with ray_head() as (head, address):
        driver = started(photos, out, "ray", RAY_ADDRESS=address, **OPEN)
        kill_head(head)
        assert driver.wait(timeout=300) != 0
        said = driver.communicate()[1]  # Ray itself may end the driver before it can speak
        assert "goes on from there" in said
    assert rounds_done(out) >= 2
    drive(photos, out, "processes:1")
    assert rounds.files(out) == rounds.files(tmp_path / "whole")


def slow(name, piece, shared):
    time.sleep(1)
    return WORK[name](piece, shared)


def command_slowly(words):
    """Run a command whose pieces take their time."""
    for name, (module, work) in PIECES.items():
        setattr(module, work, functools.partial(slow, name))
    main(words)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Words of commands of four pieces each, and a folder with what they write here."""
    folder = tmp_path_factory.mktemp("jobs")
    with contextlib.chdir(folder):
        s3 = ma.group("S3")
        np.save("table.npy", s3.table)
        for k in range(N_PIECES):
            parts = zip(("left", "right", "unembed"), planted(s3, noise=0.02, seed=k), strict=True)
            save_file(dict(parts), f"net{k}.safetensors")
        for k in range(N_PIECES + 1):
            ma.save(ma.Autoencoder(d_in=8, n_latents=40, sparsity=ma.TopK(k=4), seed=k), f"l{k}")
        weights = json.dumps([f"net{k}.safetensors" for k in range(N_PIECES)])
        Path("nets.toml").write_text(f'command="prove"\ntable="table.npy"\nweights={weights}\n')
        words = {"match": ["match", *(f"l{k}" for k in range(N_PIECES + 1))],
                 "prove": ["sweep", "nets.toml"]}  # fmt: skip
        for name, each in words.items():
            main([*each, "--out", f"whole_{name}"])
    return folder, words


@pytest.fixture(scope="module")
def cluster():
    with ray_head() as both:
        yield both


def outputs(out):
    names = ("matches.parquet", "tracks.parquet", "proof.safetensors", "neurons.json")
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.name in names}


def pieces_done(out):
    found = len(list(out.glob("unfinished/evidence*.safetensors")))
    for path in out.glob("*/manifest.json"):
        with contextlib.suppress(ValueError):
            found += json.loads(path.read_text())["complete"]
    return found


@pytest.mark.parametrize("victim", ["worker", "driver", "head"])
@pytest.mark.parametrize("name", ["match", "prove"])
def test_after_a_kill_matches_and_proofs_are_the_same_bytes(jobs, cluster, tmp_path, name, victim):
    folder, words = jobs
    out = tmp_path / "out"
    command = [sys.executable, "-c", COMMAND, *words[name], "--out", str(out), "--engine"]
    with contextlib.ExitStack() as context:
        head, address = context.enter_context(ray_head()) if victim == "head" else cluster
        there = os.environ | OPEN | {"RAY_ADDRESS": address}
        driver = subprocess.Popen(
            [*command, "ray"], cwd=folder, env=there, stderr=subprocess.PIPE, text=True
        )
        while pieces_done(out) < 1:
            assert driver.poll() is None, driver.communicate()[1]
            time.sleep(0.02)
        if victim == "worker":
            busy = [pid for pid in children(head.pid) if "ray::_run_in" in command_of(pid)]
            os.kill(busy[0], signal.SIGKILL)
            assert driver.wait(timeout=300) == 0, driver.communicate()[1]
        elif victim == "driver":
            driver.kill()
            driver.wait()
        else:
            kill_head(head)
            assert driver.wait(timeout=300) != 0
            assert "goes on from there" in driver.communicate()[1]
        if victim != "worker":
            assert 1 <= pieces_done(out) < N_PIECES
            while any("ray::_run_in" in command_of(pid) for pid in children(head.pid)):
                time.sleep(0.1)
            engine = "processes:1" if victim == "head" else "ray"
            subprocess.run([*command, engine], cwd=folder, env=there, check=True)
    assert outputs(out) == outputs(folder / f"whole_{name}")


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


@pytest.mark.parametrize("engine", ["processes:2", "ray"])
def test_blocks_of_one_match_give_the_same_on_every_engine(jobs, tmp_path, engine, monkeypatch):
    needs_ray(engine)
    for module, name, value in ((pricing, "KEPT_BYTES", 0), (pricing, "BLOCK_BYTES", 40 * 4 * 16),
                                (assignment, "WORTH_SENDING", 40 * 40)):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    monkeypatch.chdir(jobs[0])
    for name in ("here", engine):
        main(["match", "l0", "l1", "--out", str(tmp_path / name[:4]), "--engine", name])
    assert outputs(tmp_path / "here") == outputs(tmp_path / engine[:4])


@pytest.mark.parametrize("n", [1, 3])
def test_a_killed_training_of_two_ranks_is_continued_by_another_number(tmp_path, n, capsys):
    x = np.random.default_rng(0).normal(size=(4000, 16)).astype("float32")
    network = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU())
    ma.collect(network, x, ["1"], tmp_path / "store")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'store = "{tmp_path}/store"\nsite = "1"\nn_latents = 96\nsteps = 600\n'
        "batch_size = 512\ncheckpoint_every = 20\n[sparsity]\nk = 4\n"
    )
    main(["train", str(recipe), "--out", str(tmp_path / "whole")])
    out, words = tmp_path / "out", [str(recipe), "--out", str(tmp_path / "out")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    train = ["-m", "mechatlas", "train", *words]
    ranks = subprocess.Popen([*torchrun, "--nproc-per-node=2", *train])
    while not (out / "checkpoint" / "shards.json").is_file():
        assert ranks.poll() is None
        time.sleep(0.01)
    for pid in [*children(ranks.pid), ranks.pid]:
        os.kill(pid, signal.SIGKILL)
    ranks.wait()
    files = sorted(path.name[9:] for path in (out / "checkpoint").glob("*.safetensors"))
    assert {"00000000.safetensors", "00000048.safetensors"} <= set(files)
    with pytest.raises(SystemExit):
        main(["train", *words, "--batch-size", "256"])
    assert "batch_size was 512, is 256" in capsys.readouterr().err
    if n == 1:
        main(["train", *words])
    else:
        subprocess.run([*torchrun, f"--nproc-per-node={n}", *train], check=True)
    whole, again = (
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "out")
    )
    assert again["fvu"] == pytest.approx(whole["fvu"], abs=0.02)
    assert ma.load(out).n_latents == 96
    assert not (out / "checkpoint").exists()
