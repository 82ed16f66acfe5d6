"""A store on this disk against the same store at an address of S3, on a server on this machine.

    pip install 'mechatlas[remote]' 'moto[server]'
    python benchmarks/remote.py --shards 16 --rounds 5

Writes shards of 8 MiB, and reads all rows shuffled: from the disk, from the address with an empty
local copy, and with a full one. In turn, with a new bucket each round; medians. CPU seconds are of
this process alone: the server is another, so that wall seconds are those of a network without delay
and of a server in Python.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import boto3  # pyright: ignore[reportMissingImports]
import torch
from botocore.exceptions import EndpointConnectionError  # pyright: ignore[reportMissingImports]

from mechatlas import remote
from mechatlas.activations.store import Store, write_shard
from mechatlas.files import write_json

ROWS, WIDTH = 4096, 512
PORT = 5321


def written(root: Path, shards: list[torch.Tensor]) -> None:
    where = torch.zeros(ROWS, 3, dtype=torch.int32)
    root.mkdir(parents=True)
    entries = [list(write_shard(root, "a", "train", i, x, where)) for i, x in enumerate(shards)]
    facts = {
        "schema": 1, "kind": "store", "complete": True, "n_samples": ROWS,
        "network": "", "recipe": {},
        "settings": {"paired": False, "dtype": "float32"}, "shards": entries, "rounds_done": 1,
        "sites": {"a": {"width": WIDTH, "grid": [1, 1], "branches": {}}},
    }  # fmt: skip
    write_json(root / "manifest.json", facts)


def read(place: Path | str) -> None:
    rows = Store(place).rows("a", pool_bytes=32 << 20)
    batches = rows.batches(4096)
    for _ in range(rows.n_rows // 4096):
        next(batches)


def timed(work: Callable[[], None]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def serve() -> subprocess.Popen[bytes]:
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{PORT}", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing",
    }  # fmt: skip
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(PORT)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for _ in range(100):
        try:
            boto3.client("s3").list_buckets()
            return server
        except EndpointConnectionError:
            time.sleep(0.2)
    server.terminate()
    raise SystemExit("the server did not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    shards = [torch.randn(ROWS, WIDTH) for _ in range(options.shards)]
    seconds: dict[str, list[tuple[float, float]]] = {}
    server = serve()
    try:
        for number in range(options.rounds):
            folder = Path(tempfile.mkdtemp())
            os.environ["MECHATLAS_CACHE"] = str(folder / "cache")
            boto3.client("s3").create_bucket(Bucket=f"round-{number}")
            address = f"s3://round-{number}/store"
            copy = remote.located(address)
            steps: dict[str, Callable[[], None]] = {
                "write to the disk": lambda at=folder / "store": written(at, shards),
                "write to the address": lambda at=copy: written(at, shards),
                "read from the disk": lambda at=folder / "store": read(at),
                "read from the address": lambda at=address: read(at),
                "read again": lambda at=address: read(at),
            }
            for name, work in steps.items():
                if name == "read from the address":
                    shutil.rmtree(copy)
                seconds.setdefault(name, []).append(timed(work))
            shutil.rmtree(folder)
    finally:
        server.terminate()
    mib = options.shards * ROWS * WIDTH * 4 / 2**20
    print(f"{mib:.0f} MiB in {options.shards} shards, medians of {options.rounds} rounds")
    for name, found in seconds.items():
        cpu, wall = (statistics.median(each) for each in zip(*found, strict=True))
        print(f"{name:<24} {cpu:6.2f} CPU s  {wall:6.2f} s  {mib / wall:6.0f} MiB/s")


if __name__ == "__main__":
    main()
