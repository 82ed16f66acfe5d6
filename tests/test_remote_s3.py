"""Addresses s3:// on a server that speaks its protocol on this machine, with faults on the way.

Needs moto's server and s3fs: `make test-remote`.
"""

import functools
import itertools
import json
import logging
import socket
import threading
import time
from typing import Any

import fsspec
import fsspec.config
import numpy as np
import pytest
import torch
from PIL import Image

from mechatlas import remote
from mechatlas.activations import collect as collecting
from mechatlas.activations.images import Images
from mechatlas.activations.store import Store
from mechatlas.app.cli import main
from mechatlas.app.engines import Processes
from mechatlas.base import DiskError, StoreError
from mechatlas.dictionaries.autoencoder import Autoencoder
from mechatlas.dictionaries.formats import load, save
from mechatlas.files import write
from tests.networks import tiny
from tests.test_remote import another_machine, collected, files, in_rounds, reopen, trained

boto3, s3fs, moto, serving = (
    pytest.importorskip(name, reason="needs s3fs and moto's server (make test-remote)")
    for name in ("boto3", "s3fs.core", "moto.server", "werkzeug.serving")
)
ERROR = "<?xml version='1.0'?><Error><Code>{0}</Code><Message>{1}</Message></Error>"


class Faults:
    """The server of moto, in front of which requests may fail."""

    def __init__(self, app):
        self.app, self.plan = app, []
        """Kind of fault, method and ending of a path, and how often it is met."""

    def met(self, environ):
        for fault in self.plan:
            kind, method, ending, left = fault
            if (
                left
                and environ["REQUEST_METHOD"] == method
                and environ["PATH_INFO"].endswith(ending)
            ):
                fault[3] -= 1
                return kind
        return None

    def __call__(self, environ, start):
        kind = self.met(environ)
        length = int(environ.get("CONTENT_LENGTH") or 0)
        if kind == "slow":
            time.sleep(1.5)
        if kind == "cut":
            environ["wsgi.input"].read(length // 2)
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            return []
        if kind in ("500", "expired"):
            environ["wsgi.input"].read(length)
            code = {"500": "InternalError", "expired": "ExpiredToken"}[kind]
            body = ERROR.format(code, "The provided token has expired").encode()
            status = "500 Internal Server Error" if kind == "500" else "400 Bad Request"
            start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        if kind == "damaged":
            data = b"".join(self.app(environ, start))
            return [data[:-1] + bytes([data[-1] ^ 255])]
        return self.app(environ, start)


@pytest.fixture(scope="module")
def faults():
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    app = Faults(moto.DomainDispatcherApplication(moto.create_backend_app))
    server = serving.make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        options = {"config_kwargs": {"read_timeout": 0.5}}
        patch.setitem(fsspec.config.conf, "s3", options)
        patch.setattr(s3fs.S3FileSystem, "retries", 1)
        yield app
    server.shutdown()


@pytest.fixture
def bucket(faults, request, tmp_path, monkeypatch):
    name = f"bucket-{abs(hash(request.node.name))}"
    boto3.client("s3").create_bucket(Bucket=name)
    monkeypatch.setenv("MECHATLAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.05)
    monkeypatch.setattr(collecting, "SHARD_BYTES", 2000)
    monkeypatch.setattr(collecting, "_plan", in_rounds)
    yield f"s3://{name}"
    faults.plan.clear()


def there(address):
    system, place = fsspec.url_to_fs(address)
    return {p.removeprefix(f"{place}/"): system.cat_file(p) for p in system.find(place)}


@pytest.mark.parametrize("kind", ["500", "cut", "slow"])
def test_a_store_has_the_same_bytes_whatever_fails_on_the_way(
    faults, bucket, kind, tmp_path, monkeypatch
):
    plain = collected(tmp_path / "plain")
    for method, ending in (("PUT", "0.safetensors"), ("PUT", "manifest.json"), ("GET", "")):
        faults.plan.append([kind, method, ending, 2])
    collected(f"{bucket}/store")
    assert there(f"{bucket}/store") == files(plain.root)
    another_machine(monkeypatch, tmp_path)
    faults.plan.append([kind, "GET", "train-00001.safetensors", 2])
    rows = Store(f"{bucket}/store").rows()
    for batch, expected in itertools.islice(
        zip(rows.batches(64), plain.rows().batches(64), strict=True), 8
    ):
        assert torch.equal(batch.x, expected.x)


def test_an_upload_that_is_always_cut_leaves_nothing_and_goes_on_later(
    faults, bucket, tmp_path, monkeypatch
):
    faults.plan.append(["cut", "PUT", "train-00003.safetensors", 1000])
    with pytest.raises(DiskError, match=r"Cannot write s3://.*train-00003.*tried 5 times"):
        collected(f"{bucket}/store")
    listed = there(f"{bucket}/store")
    assert "1/train-00003.safetensors" not in listed
    assert not json.loads(listed["manifest.json"])["complete"]
    faults.plan.clear()
    another_machine(monkeypatch, tmp_path)
    collected(f"{bucket}/store")
    assert there(f"{bucket}/store") == files(collected(tmp_path / "plain").root)


def test_a_large_file_comes_in_parts_or_not_at_all(faults, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(s3fs, "calculate_chunksize", lambda *_, **__: 5 << 20)
    data = np.random.default_rng(0).bytes(11 << 20)
    file = remote.located(f"{bucket}/folder/large.bin")
    faults.plan.append(["cut", "PUT", "large.bin", 1000])
    with pytest.raises(DiskError, match="Cannot write s3://"):
        write(file, data)
    assert there(f"{bucket}/folder") == {}
    assert not file.exists()
    faults.plan.clear()
    write(file, data)
    assert there(f"{bucket}/folder")["large.bin"] == data
    another_machine(monkeypatch, tmp_path)
    assert remote.fetched(f"{bucket}/folder/large.bin").read_bytes() == data


def test_wrong_bytes_are_fetched_again_and_refused_if_they_stay(
    faults, bucket, tmp_path, monkeypatch
):
    wanted = next(collected(tmp_path / "plain").rows().scan())[0].x
    collected(f"{bucket}/store")
    another_machine(monkeypatch, tmp_path)
    faults.plan.append(["damaged", "GET", "train-00000.safetensors", 1])
    store = Store(f"{bucket}/store")
    assert torch.equal(next(store.rows().scan())[0].x, wanted)
    another_machine(monkeypatch, tmp_path)
    faults.plan.append(["damaged", "GET", "train-00000.safetensors", 1000])
    with pytest.raises(StoreError, match=r"s3://.*train-00000.safetensors cannot be read"):
        next(Store(f"{bucket}/store").rows().scan())


@pytest.mark.parametrize("kind", ["expired", "bucket"])
def test_what_nothing_helps_against_ends_a_command_with_one_sentence(faults, bucket, kind, capsys):
    address = f"{bucket}/store"
    if kind == "expired":
        faults.plan += [["expired", method, "", 1000] for method in ("GET", "PUT", "HEAD", "POST")]
    else:
        address = "s3://no-such-bucket/store"
    for words in (
        ["collect", "recipes/quick/collect.toml", "--out", address],
        ["verify", address],
    ):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert address in message
        wanted = {
            "expired": "expired. Are there credentials",
            "bucket": "There is nothing at" if words[0] == "verify" else "does not exist",
        }
        assert wanted[kind] in message


def test_workers_write_to_the_address_and_one_that_is_killed_costs_its_round(bucket, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 9, 9, 3), dtype=np.uint8)
    for i, each in enumerate(pixels):
        Image.fromarray(each).save(photos / f"{i:02}.png")
    network, samples = tiny(), Images(source=str(photos), side=9)
    plain = collecting.collect(network, samples, ["mixed"], tmp_path / "plain")
    open_again = functools.partial(reopen, photos, tmp_path / "killed once")
    two: Any = {"engine": Processes(2), "reopen": open_again}
    collecting.collect(network, samples, ["mixed"], f"{bucket}/store", **two)
    assert (tmp_path / "killed once").exists()
    assert there(f"{bucket}/store") == files(plain.root)


def test_commands_and_dictionaries(bucket, tmp_path, monkeypatch, capsys):
    collected(f"{bucket}/runs/store")
    trained(f"{bucket}/runs/store", f"{bucket}/runs/sae", tmp_path)
    save(Autoencoder(d_in=8, n_latents=40), f"{bucket}/alone")
    another_machine(monkeypatch, tmp_path)
    assert load(f"{bucket}/alone").n_latents == 40
    assert load(f"{bucket}/runs/sae").n_latents == 24
    capsys.readouterr()
    main(["verify", f"{bucket}/runs", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["runs"], found["files"], found["damaged"], found["parents"]) == (
        2, len(there(f"{bucket}/runs")), [], 1,
    )  # fmt: skip
