"""Addresses: the same bytes as on this disk, whatever fails; one sentence where nothing helps."""

import errno
import json
import os
import re
import signal
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch import nn

from mechatlas import cache, remote
from mechatlas.activations import collect as collecting
from mechatlas.activations.collect import StoreConfig, collect
from mechatlas.activations.images import Images
from mechatlas.activations.store import Store
from mechatlas.app.cli import main
from mechatlas.app.inputs import find_store, open_dictionary
from mechatlas.base import DiskError, StoreError, UserError
from mechatlas.dictionaries.autoencoder import Autoencoder
from mechatlas.dictionaries.formats import load, save
from mechatlas.files import MANIFEST, write
from tests.networks import tiny


class Faulty(MemoryFileSystem):
    """File system in memory whose requests are counted and fail as a test asks."""

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
    pseudo_dirs: ClassVar[list[str]] = [""]
    asked: ClassVar[list[tuple[str, str]]] = []
    faults: ClassVar[list[Any]] = []
    """Functions of a request and its path, which may raise or return other bytes."""

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("faulty://"))

    def meet(self, request, path, data=b""):
        self.asked.append((request, path))
        for fault in self.faults:
            data = fault(request, path, data) or data
        return data

    def put_file(self, lpath, rpath, *_, **options):
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def pipe_file(self, path, value, *_, **options):
        path = self._strip_protocol(path)
        super().pipe_file(path, self.meet("put", path, value))

    def get_file(self, rpath, lpath, *_, **options):
        Path(lpath).write_bytes(self.meet("get", rpath, self.cat_file(rpath)))

    def ls(self, path, detail=True, **options):
        self.meet("list", path)
        return super().ls(path, detail=detail, **options)

    def files(self, folder):
        found = self.find(folder)
        inside = self._strip_protocol(folder)
        return {p.removeprefix(f"{inside}/"): self.cat_file(p) for p in found}


@pytest.fixture(autouse=True)
def system(tmp_path, monkeypatch):
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    for kept in (Faulty.store, Faulty.asked, Faulty.faults):
        kept.clear()
    Faulty.pseudo_dirs[:] = [""]
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    monkeypatch.setattr(collecting, "SHARD_BYTES", 2000)
    monkeypatch.setattr(collecting, "_plan", in_rounds)
    monkeypatch.setenv("MECHATLAS_CACHE", str(tmp_path / "cache"))
    return fsspec.filesystem("faulty")


def in_rounds(n, shapes, settings, plan=collecting._plan):
    return [
        collecting.Round(r.split, part)
        for r in plan(n, shapes, settings)
        for part in np.array_split(r.samples, 3)
        if len(part)
    ]


def reopen(photos, mark):
    """Open the inputs in a worker, with rounds as small as here; the first one to come dies."""
    collecting._plan, collecting.SHARD_BYTES = in_rounds, 2000
    torch.set_num_threads(1)
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return tiny(), Images(source=str(photos), side=9)


def another_machine(monkeypatch, tmp_path):
    """Leave behind all local copies, and what the process knows of them."""
    monkeypatch.setenv("MECHATLAS_CACHE", str(tmp_path / f"cache {len(list(tmp_path.iterdir()))}"))


def collected(out, n=300):
    samples = np.random.default_rng(0).normal(size=(n, 4)).astype(np.float32)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    return collect(network, torch.from_numpy(samples), ["1"], out, StoreConfig(held_out=0.1))


def trained(store, out, folder, *words):
    recipe = folder / "train.toml"
    values = f'store = "{store}"\nn_latents = 24\nsteps = 4\nbatch_size = 32\n'
    recipe.write_text(f"{values}[sparsity]\nk = 3\n")
    main(["train", str(recipe), "--out", out, *words])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "SHARD_BYTES", 2000)
        patch.setattr(collecting, "_plan", in_rounds)
        folder = tmp_path_factory.mktemp("plain") / "store"
        collected(folder)
    return folder


def files(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def once(error, request="", ending=""):
    """Fault that meets every path once."""
    met = set()

    def fault(asked, path, data):
        if request in asked and path.endswith(ending) and (asked, path) not in met:
            met.add((asked, path))
            raise error

    return fault


def always(error, request="", ending=""):
    def fault(asked, path, data):
        if request in asked and path.endswith(ending):
            raise error

    return fault


FLEETING = {
    "500": OSError(errno.EREMOTEIO, "Internal error"),
    "cut": ConnectionResetError("Connection reset by peer"),
    "slow": TimeoutError("Read timeout"),
}


@pytest.mark.parametrize("name", FLEETING)
def test_a_store_at_an_address_has_the_bytes_of_one_on_this_disk(
    system, plain, name, tmp_path, monkeypatch
):
    system.faults.append(once(FLEETING[name]))
    store = collected("faulty://bucket/runs/store")
    assert system.files("/bucket/runs/store") == files(plain)
    another_machine(monkeypatch, tmp_path)
    system.faults.append(once(FLEETING[name]))
    read = Store("faulty://bucket/runs/store")
    for rows in (store.rows(), read.rows(pool_bytes=4000)):
        wanted = Store(plain).rows(pool_bytes=(rows.store is read and 4000) or 64 << 20)
        for _, batch, expected in zip(
            range(12), rows.batches(64, seed=3), wanted.batches(64, seed=3), strict=False
        ):
            assert torch.equal(batch.x, expected.x)
            assert torch.equal(batch.row, expected.row)
    assert torch.equal(read.rows().held_out(20).x, Store(plain).rows().held_out(20).x)


def test_a_stopped_collection_goes_on_on_another_machine(system, plain, tmp_path, monkeypatch):
    address = "faulty://bucket/store"
    system.faults.append(always(PermissionError("The token has expired"), "put", "3.safetensors"))
    with pytest.raises(DiskError, match=r"Cannot write faulty://bucket/store/1/.*still valid"):
        collected(address)
    there = system.files("/bucket/store")
    assert there
    assert not json.loads(there[MANIFEST])["complete"]
    another_machine(monkeypatch, tmp_path)
    with pytest.raises(StoreError, match="is not finished"):
        Store(address)
    system.faults.clear()
    system.asked.clear()
    collected(address)
    assert system.files("/bucket/store") == files(plain)
    again = {path for request, path in system.asked if request == "put"}
    done = {f"/bucket/store/{name}" for name in there if name != MANIFEST}
    kept = json.loads(there[MANIFEST])["rounds_done"].values()
    in_manifest = {f"/bucket/store/{shard[2]}" for shards, *_ in kept for shard in shards}
    assert in_manifest
    assert not again & in_manifest & done


def test_a_shard_that_is_gone_or_cut_is_collected_again(system, plain, tmp_path, monkeypatch):
    collected("faulty://bucket/store")
    system.rm("/bucket/store/1/train-00001.safetensors")
    system.pipe_file("/bucket/store/1/train-00002.safetensors", b"half")
    another_machine(monkeypatch, tmp_path)
    collected("faulty://bucket/store")
    assert system.files("/bucket/store") == files(plain)


def test_local_copies_stay_within_their_limit(system, tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "SHARD_BYTES", 300)
    monkeypatch.setattr(remote, "AT_ONCE", 2)
    monkeypatch.setattr(cache, "LEAST_KEPT", 8)
    wanted = collected(tmp_path / "here")
    collected("faulty://bucket/store")
    another_machine(monkeypatch, tmp_path)
    sizes = [shard.bytes for shard in wanted.shards]
    limit = 10 * max(sizes) + (wanted.root / MANIFEST).stat().st_size
    assert sum(sizes) > 1.5 * limit
    monkeypatch.setenv("MECHATLAS_CACHE_GIB", str(limit / 2**30))
    store = Store("faulty://bucket/store")
    for (batch, _), (expected, _) in zip(store.rows().scan(), wanted.rows().scan(), strict=True):
        assert torch.equal(batch.x, expected.x)
    small: dict[str, Any] = {"pool_bytes": max(sizes)}
    for _, batch, expected in zip(
        range(12), store.rows(**small).batches(50), wanted.rows(**small).batches(50), strict=False
    ):
        assert torch.equal(batch.x, expected.x)
    assert 0 < sum(map(len, files(remote.located("faulty://bucket")).values())) <= limit


def test_what_a_thread_is_about_to_open_stays(system, tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "SHARD_BYTES", 300)
    monkeypatch.setattr(cache, "LEAST_KEPT", 1)
    wanted = collected(tmp_path / "here")
    collected("faulty://bucket/store")
    another_machine(monkeypatch, tmp_path)
    monkeypatch.setenv("MECHATLAS_CACHE_GIB", str(1 / 2**30))
    root = Store("faulty://bucket/store").root
    first, *others, last = wanted.shards
    remote.bring(root / first.file, first.xxh3)
    remote.bring_ahead({root / shard.file: shard.xxh3 for shard in others})
    for coming in [*remote._COMING.values()]:
        coming.result()
    assert (root / first.file).exists()
    assert not (root / others[0].file).exists(), "there is no room for two"
    remote.bring(root / last.file, last.xxh3)
    remote.bring(root / others[0].file, others[0].xxh3)
    assert not (root / first.file).exists()


@pytest.mark.parametrize("text", ["much", "0", "-1", "nan"])
def test_a_limit_that_is_none_is_refused(system, monkeypatch, text):
    monkeypatch.setenv("MECHATLAS_CACHE_GIB", text)
    with pytest.raises(DiskError, match=f"MECHATLAS_CACHE_GIB is '{text}', expected"):
        write(Path("faulty://bucket/file"), b"data")


def damaging(ending, times):
    """Fault that gives other bytes of the same length."""
    met = []

    def fault(asked, path, data):
        if asked == "get" and path.endswith(ending) and len(met) < times:
            met.append(path)
            return bytes([data[0] ^ 1]) + data[1:-1] + bytes([data[-1] ^ 255])
        return None

    return fault


def test_wrong_bytes_are_fetched_again_and_refused_if_they_stay(
    system, plain, tmp_path, monkeypatch
):
    collected("faulty://bucket/store")
    another_machine(monkeypatch, tmp_path)
    store = Store("faulty://bucket/store")
    system.faults.append(damaging("train-00000.safetensors", 1))
    wanted = next(Store(plain).rows().scan())[0].x
    assert torch.equal(next(store.rows().scan())[0].x, wanted)
    copy = store.root / "1" / "train-00000.safetensors"
    copy.write_bytes(copy.read_bytes()[:-1] + b"\0")
    assert torch.equal(next(store.rows().scan())[0].x, wanted)
    copy.unlink()
    system.faults.append(damaging("train-00000.safetensors", 1000))
    with pytest.raises(StoreError, match=r"faulty://bucket/store/1/train-00000.*checksum differs"):
        next(store.rows().scan())
    with pytest.raises(StoreError, match=r"faulty://bucket/store/1/train-00000.*checksum differs"):
        next(store.rows().batches(200))
    assert not copy.exists()


def test_a_dictionary_is_written_and_read_at_an_address(system, tmp_path, monkeypatch):
    dictionary = Autoencoder(d_in=8, n_latents=40, seed=5)
    for format in ("mechatlas", "saelens"):
        address = f"faulty://bucket/{format}"
        save(dictionary, address, format=format)
        another_machine(monkeypatch, tmp_path)
        assert torch.equal(load(address).W_dec, dictionary.W_dec)
    another_machine(monkeypatch, tmp_path)
    alone = load("faulty://bucket/saelens/sae_weights.safetensors")  # its settings lie beside it
    assert torch.equal(alone.W_dec, dictionary.W_dec)


def test_what_was_replaced_or_deleted_is_noticed(system):
    for seed in (0, 1):
        save(Autoencoder(d_in=8, n_latents=40, seed=seed), "faulty://bucket/sae")
    other = Autoencoder(d_in=8, n_latents=40, seed=2)
    save(other, "faulty://bucket/other")
    system.asked.clear()
    load("faulty://bucket/sae")
    assert not [path for request, path in system.asked if request == "get"]
    file = "dictionary.safetensors"
    system.pipe_file(f"/bucket/sae/{file}", system.cat_file(f"/bucket/other/{file}"))
    assert torch.equal(load("faulty://bucket/sae").W_dec, other.W_dec)
    system.mv(f"/bucket/sae/{file}", "/bucket/sae/somewhere.else")
    with pytest.raises(UserError):
        load("faulty://bucket/sae")


FINAL = {
    "The provided token has expired. Are there credentials": PermissionError(
        "The provided token has expired."
    ),
    "The specified bucket does not exist. Is the name right": FileNotFoundError(
        "The specified bucket does not exist"
    ),
    "Cannot write .*Reset. It was tried 5 times": ConnectionResetError("Reset"),
}


@pytest.mark.parametrize("sentence", FINAL)
def test_what_nothing_helps_against_is_one_sentence(system, sentence, capsys):
    system.faults.append(always(FINAL[sentence], "put"))
    with pytest.raises(SystemExit) as end:
        main(["collect", "recipes/quick/collect.toml", "--out", "faulty://bucket/store"])
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert re.search(sentence, message), message
    assert "faulty://bucket/store" in message
    assert not system.files("/bucket/store")
    tried = sum(request == "put" for request, _ in system.asked)
    assert tried == (remote.TRIES if "tried" in sentence else 1)


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("faulty://bucket/nothing", "There is nothing at faulty://bucket/nothing."),
        ("nowhere://bucket/run", "nowhere://bucket/run .*nowhere"),
        ("faulty://bucket/../other", "not a path within a bucket"),
    ],
)
def test_an_address_without_anything_is_refused(address, sentence, capsys):
    with pytest.raises(SystemExit) as end:
        main(["verify", address])
    assert end.value.code == 2
    assert re.search(sentence, capsys.readouterr().err)


def test_a_library_that_is_missing_is_named(monkeypatch):
    def missing(address):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(DiskError, match=r"Install s3fs .*pip install 'mechatlas\[remote\]'"):
        load("faulty://never asked before/sae")


def test_a_listing_that_fails_is_not_an_empty_folder(system):
    save(Autoencoder(d_in=8, n_latents=40), "faulty://bucket/sae")
    system.faults.append(always(OSError(errno.EREMOTEIO, "Internal error"), "list"))
    with pytest.raises(DiskError, match=r"faulty://bucket/sae cannot be read: Internal error"):
        load("faulty://bucket/sae")
    assert remote.located("faulty://bucket/sae/dictionary.safetensors").is_file()


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "a\\..\\b", "a\0b"])
def test_names_from_the_network_stay_inside(system, name):
    save(Autoencoder(d_in=8, n_latents=40), "faulty://bucket/sae")
    file = system.store["/bucket/sae/dictionary.safetensors"]
    system.store[f"/bucket/sae/{name}"] = file
    with pytest.raises(DiskError, match="not a path within a bucket"):
        load("faulty://bucket/sae")


def test_an_address_in_a_file_of_somebody_else_is_not_followed(system, tmp_path, capsys):
    collected("faulty://bucket/runs/store")
    out = "faulty://bucket/runs/sae"
    trained("faulty://bucket/runs/store", out, tmp_path)
    assert out in capsys.readouterr().out
    manifest = json.loads(system.cat_file("/bucket/runs/sae/manifest.json"))
    assert manifest["store"] == "faulty://bucket/runs/store"
    assert not system.find("/bucket/runs/sae/checkpoint")
    assert find_store(open_dictionary(remote.fetched(out))).root == remote.located(
        "faulty://bucket/runs/store"
    )
    here = tmp_path / "here" / "sae"
    here.parent.mkdir()
    remote.located(out).rename(here)
    system.asked.clear()
    for folder in (here, remote.located("faulty://other/sae")):
        folder.parent.mkdir(exist_ok=True, parents=True)
        if folder != here:
            here.rename(folder)
        with pytest.raises(StoreError, match="no longer there"):
            find_store(open_dictionary(folder))
    assert system.asked == []


def test_commands_read_and_write_addresses(system, tmp_path, monkeypatch, capsys):
    runs = "faulty://bucket/runs"
    for name in ("store", "other"):
        collected(f"{runs}/{name}")
        trained(f"{runs}/{name}", f"{runs}/of_{name}", tmp_path)
    another_machine(monkeypatch, tmp_path)
    main(["match", f"{runs}/of_store", f"{runs}/of_other", "--out", f"{runs}/match"])
    manifest = json.loads(system.cat_file("/bucket/runs/match/manifest.json"))
    assert manifest["complete"]
    assert manifest["dictionaries"] == [f"{runs}/of_store", f"{runs}/of_other"]
    for name, data in system.files("/bucket").items():
        assert name.endswith(".parquet") or str(tmp_path).encode() not in data, name
    another_machine(monkeypatch, tmp_path)
    capsys.readouterr()
    main(["verify", runs, "--json"])
    found = json.loads(capsys.readouterr().out)
    stated = system.files("/bucket/runs")
    assert (found["runs"], found["files"], found["damaged"]) == (5, len(stated), [])
    assert found["bytes"] == sum(map(len, stated.values()))
    assert (found["without_checksum"], found["parents"]) == (0, 4)
    shard = "/bucket/runs/store/1/train-00002.safetensors"
    system.pipe_file(shard, system.cat_file(shard)[:-1] + b"!")
    with pytest.raises(SystemExit) as end:
        main(["verify", runs])
    assert end.value.code == 2
    assert "faulty:/" + shard in capsys.readouterr().out
    main(["report", runs, "--out", f"{runs}/page.html"])
    page = system.cat_file("/bucket/runs/page.html").decode()
    assert f"{runs}/other was collected from Python" in page
    assert str(tmp_path) not in page


def test_training_goes_on_from_the_checkpoint_at_the_address(system, tmp_path, monkeypatch):
    collected("faulty://bucket/store")
    words = (tmp_path, "--steps", "6", "--checkpoint-every", "2")

    def puts_of_checkpoints():
        return sum(request == "put" and "/checkpoint/" in path for request, path in system.asked)

    trained("faulty://bucket/store", "faulty://bucket/whole", *words)
    assert puts_of_checkpoints() == 3
    system.asked.clear()

    def fault(asked, path, data):
        if asked == "put" and puts_of_checkpoints() == 2:
            raise PermissionError("The provided token has expired")

    system.faults.append(fault)
    with pytest.raises(SystemExit):
        trained("faulty://bucket/store", "faulty://bucket/sae", *words)
    assert system.find("/bucket/sae/checkpoint")
    assert not system.exists("/bucket/sae/dictionary.safetensors")
    system.faults.clear()
    system.asked.clear()
    another_machine(monkeypatch, tmp_path)
    trained("faulty://bucket/store", "faulty://bucket/sae", *words)
    assert puts_of_checkpoints() == 2  # of steps 4 and 6
    assert not system.find("/bucket/sae/checkpoint")
    name = "dictionary.safetensors"
    assert system.cat_file(f"/bucket/sae/{name}") == system.cat_file(f"/bucket/whole/{name}")


def test_a_run_that_is_made_again_leaves_nothing_of_the_earlier_one(system, tmp_path):
    from tests.app.test_run_folder import run

    config_out = remote.prepared("faulty://bucket/run")
    run(config_out, "a.safetensors", "b.safetensors")
    run(config_out, "a.safetensors")
    assert set(system.files("/bucket/run")) == {
        "a.safetensors", "manifest.json", "recipe.toml", "result.json",
    }  # fmt: skip


def test_a_folder_with_anything_else_is_not_written_into_nor_fetched(system):
    system.pipe_file("/bucket/data/large.bin", b"0" * 1000)
    for address in ("faulty://bucket", "faulty://bucket/data", "faulty://bucket/data/large.bin"):
        with pytest.raises(DiskError, match="Choose another --out"):
            collected(address)
    assert not [path for request, path in system.asked if request == "get"]


def test_a_file_address_is_a_path_of_this_disk(tmp_path):
    assert remote.located(f"file://{tmp_path}/x") == tmp_path / "x"
    store = collected(f"file://{tmp_path}/store")
    assert store.root == tmp_path / "store"
    assert not (tmp_path / "cache").exists()


def test_paths_and_texts_that_are_no_addresses_stay_as_they_are(tmp_path):
    for path in ("runs/store", "C:/runs", "hf://owner/name", str(tmp_path)):
        assert not remote.is_address(path)
        assert remote.located(path) == Path(path)
        assert remote.written(path) == path
    assert remote.written("note:/x") == "note:/x"
    assert remote.written(Path("faulty://bucket/run")) == "faulty://bucket/run"
    local = remote.located("faulty://bucket/run")
    assert remote.written(f"{local}/x is damaged.") == "faulty://bucket/run/x is damaged."
