"""Collecting: right rows, exact resume, honest shuffling, and clear refusals."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mechatlas.activations import collect as module
from mechatlas.activations.collect import StoreConfig, collect
from mechatlas.activations.positions import Positions
from mechatlas.activations.samples import Arrays, Images, Samples, open_samples
from mechatlas.activations.sites import find_sites, read_activations
from mechatlas.activations.store import Store
from mechatlas.base import DiskError, InputError, NonFiniteError, Site, StoreError
from mechatlas.files import write_manifest
from tests.networks import sick, tiny

NETWORK = tiny()
SITES = find_sites(NETWORK, ["mixed", "first"])


def images(tmp_path: Path, n: int = 60) -> Samples:
    source = tmp_path / "images.npy"
    np.save(source, np.random.default_rng(0).integers(0, 256, (n, 9, 9, 3), dtype=np.uint8))
    return open_samples(Images(source=str(source), side=9), NETWORK)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rule", ["norm", "random", "all"])
def test_every_row_is_what_the_network_gives_at_its_place(tmp_path, rule, dtype):
    samples = images(tmp_path)
    settings = StoreConfig(positions=Positions(rule=rule, per_sample=7), dtype=dtype, batch_size=8)
    store = collect(NETWORK, samples, SITES, tmp_path / "store", settings)
    assert store.sites == ["mixed", "first"]
    inputs = samples.stack([samples.read(i) for i in range(len(samples))])
    whole = read_activations(NETWORK, inputs, SITES)
    for site in SITES:
        expected = whole[site].detach().to(getattr(torch, dtype)).float()
        seen = set()
        for batch, where in store.rows(str(site)).scan():
            sample, row, column = where.long().T
            found = expected[sample, :, row, column]
            torch.testing.assert_close(batch.x, found, atol=1e-5, rtol=1e-2)
            seen |= set(map(tuple, where.tolist()))
        assert len(seen) == 60 * (81 if rule == "all" else 7)


def test_paired_rows_are_of_the_same_places(tmp_path):
    settings = StoreConfig(paired=True)
    store = collect(NETWORK, images(tmp_path), SITES, tmp_path / "store", settings)
    a, b = (torch.cat([w for _, w in store.rows(str(s)).scan()]) for s in SITES)
    assert torch.equal(a, b)


def test_held_out_samples_are_never_trained_on(tmp_path):
    settings = StoreConfig(held_out=0.2)
    store = collect(NETWORK, images(tmp_path), SITES, tmp_path / "store", settings)
    rows = store.rows("mixed")
    assert rows.n_held_out == 12 * 10
    assert rows.n_rows == 48 * 10
    where = torch.cat([w for _, w in rows.scan()])
    train, held = where[: rows.n_rows, 0], where[rows.n_rows :, 0]
    assert not set(train.tolist()) & set(held.tolist())
    batches = rows.batches(100)
    drawn = torch.cat([next(batches).row for _ in range(20)])
    assert drawn.max() < rows.n_rows


def test_held_out_samples_come_from_the_whole_data_set(tmp_path):
    # Of a folder sorted by class, the first samples would be one class.
    settings = StoreConfig(held_out=0.2)
    store = collect(NETWORK, images(tmp_path), SITES[:1], tmp_path / "store", settings)
    held = np.array(store.samples("held", 60))
    assert len(held) == 12
    assert (np.bincount(held // 20, minlength=3) >= 2).all(), "none of 60 samples is special"
    other = StoreConfig(held_out=0.2, seed=1)
    again = collect(NETWORK, images(tmp_path), SITES[:1], tmp_path / "again", other)
    assert again.samples("held", 60) != held.tolist()


def test_the_first_held_out_samples_are_not_the_first_of_a_sorted_folder(tmp_path):
    settings = StoreConfig(held_out=0.5)
    store = collect(NETWORK, images(tmp_path), SITES[:1], tmp_path / "store", settings)
    everything, few = store.samples("held", 60), store.samples("held", 6)
    assert len(everything) == 30
    assert len(few) == 6
    assert set(few) <= set(everything)
    assert few[-1] > everything[20], "a few of them are spread over the folder, as all are"
    rows = store.rows("mixed")
    assert torch.equal(rows.held_out(40).row, torch.arange(rows.n_rows, rows.n_rows + 40))
    where = torch.cat([w[:, 0] for _, w in rows.scan()])[rows.n_rows :][:40]
    assert where.unique().numel() > 15, "and so are the first held-out rows"


def test_a_branch_of_a_site_can_be_read_from_its_store(tmp_path):
    store = collect(NETWORK, images(tmp_path), SITES[:1], tmp_path / "store")
    whole, part = store.rows("mixed").held_out(9).x, store.rows("mixed/right").held_out(9).x
    assert torch.equal(whole[:, 5:], part)
    with pytest.raises(StoreError, match=r"there is no 'mixed/middle'\. Branches of mixed: left"):
        store.rows("mixed/middle")


@pytest.mark.parametrize(
    ("channels", "numbers"),
    [
        ([1, 6, 3], [1, 6, 3]),
        ([True, False] * 4, [0, 2, 4, 6]),
        (slice(None, None, 3), [0, 3, 6]),
        ([2, 3, 4], [2, 3, 4]),
        ([3, 1], [3, 1]),
    ],
)
def test_a_branch_whose_channels_are_scattered_is_read_from_its_store(channels, numbers, tmp_path):
    network = tiny()
    vars(network.mixed)["branches"] = {"some": channels, "rest": slice(5, 8)}
    collect(network, images(tmp_path), [Site("mixed")], tmp_path / "store")
    store = Store(tmp_path / "store")
    rows = store.rows("mixed/some")
    assert rows.d_in == len(numbers)
    assert torch.equal(rows.held_out(9).x, store.rows("mixed").held_out(9).x[:, numbers])
    batch = next(rows.batches(7))
    whole = next(store.rows("mixed").batches(7))
    assert torch.equal(batch.x, whole.x[:, numbers])
    assert set(store.shapes["mixed"].channels) == {"some", "rest"}
    written = store.manifest["sites"]["mixed"]
    assert written["branches"]["rest"] == [5, 8]
    if "scattered" not in written:
        assert written["branches"]["some"] == [2, 5]
        return
    manifest = json.loads((store.root / "manifest.json").read_text())
    manifest["sites"]["mixed"]["scattered"]["some"] = [1, 8]
    write_manifest(store.root / "manifest.json", manifest)
    with pytest.raises(StoreError, match=r"channels of 0 to 7, each once"):
        Store(store.root)


def test_neighbours_in_a_shuffled_stream_are_strangers(tmp_path, monkeypatch):
    # Samples in the order of the data set, as of classes in a folder: where one of two rows
    # that follow each other comes from must say nothing of the other, over four rounds and a
    # pool of a quarter of the store, and they share a sample no more often than by chance.
    n, row_bytes = 400, (128 << 20) // 1000  # a round has room for 1000 rows, a shard for 90
    monkeypatch.setattr(module, "_row_bytes", lambda shape, settings: row_bytes)
    monkeypatch.setattr(module, "SHARD_BYTES", 90 * row_bytes)
    settings = StoreConfig(held_out=0.0, memory_mib=512)
    store = collect(NETWORK, images(tmp_path, n), SITES[:1], tmp_path / "store", settings)
    assert store.manifest["rounds"] == 4
    rows = store.rows("mixed", pool_bytes=sum(s.bytes for s in store.shards) // 4)
    of_row = torch.cat([w[:, 0] for _, w in rows.scan()]).numpy()
    bins = 10
    table, same, pairs = np.zeros((bins, bins)), 0, 0
    for seed in range(10):
        batches = rows.batches(200, seed=seed)
        order = of_row[torch.cat([next(batches).row for _ in range(20)]).numpy()]
        np.add.at(table, (order[:-1] * bins // n, order[1:] * bins // n), 1)
        same += int((order[:-1] == order[1:]).sum())
        pairs += len(order) - 1
    expected = pairs / bins**2
    chi2, freedom = ((table - expected) ** 2 / expected).sum(), (bins - 1) ** 2
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom)
    by_chance = pairs * 9 / (10 * n - 1)
    assert same < 2 * by_chance + 4 * np.sqrt(by_chance)


KILLED = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from mechatlas.activations import collect as c
from mechatlas.activations.samples import Images, open_samples
from mechatlas.activations.sites import find_sites
sys.path.insert(0, sys.argv[3])
from tests.networks import tiny
c.SHARD_BYTES = 2000  # many small files, so that a kill can fall anywhere
c._plan = lambda n, shapes, settings, plan=c._plan: [
    c.Round(r.split, part) for r in plan(n, shapes, settings)
    for part in __import__("numpy").array_split(r.samples, 12) if len(part)]
network = tiny()
samples = open_samples(Images(source=sys.argv[1], side=9), network)
print("ready", flush=True)
c.collect(network, samples, find_sites(network, ["mixed", "first"]), Path(sys.argv[2]))
"""


def collect_here(monkeypatch, *words):
    """Run `KILLED` in this process, where nothing has to be imported first."""
    n_threads = torch.get_num_threads()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", ["", *words])
        patched.setattr(sys, "path", [*sys.path])
        for name in ("SHARD_BYTES", "_plan"):  # as they are, to be put back
            patched.setattr(module, name, getattr(module, name))
        exec(KILLED, {})
    torch.set_num_threads(n_threads)


def test_a_run_killed_at_any_moment_ends_with_the_same_bytes(tmp_path, monkeypatch):
    images(tmp_path, 400)
    file, root = str(tmp_path / "images.npy"), str(Path(__file__).parents[2])
    command = [sys.executable, "-c", KILLED, file]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    collect_here(monkeypatch, file, str(whole), root)
    n_files = len(files(whole))
    for share in (0.3, 0.7):
        process = subprocess.Popen([*command, str(killed), root], stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list(killed.rglob("*"))) < share * n_files:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    collect_here(monkeypatch, file, str(killed), root)
    assert files(killed) == files(whole)


def test_a_store_made_by_another_recipe_is_refused_and_left_alone(tmp_path):
    samples = images(tmp_path)
    out = tmp_path / "store"
    collect(NETWORK, samples, SITES, out, recipe={"a": 1})
    before = files(out)
    with pytest.raises(StoreError, match=r"differs in settings\.seed: 0 there, 5 here"):
        collect(NETWORK, samples, SITES, out, StoreConfig(seed=5), recipe={"a": 1})
    with pytest.raises(StoreError, match=r"differs in recipe\.a: 1 there, 2 here"):
        collect(NETWORK, samples, SITES, out, recipe={"a": 2})
    other = tiny()
    torch.nn.init.normal_(other.first.weight)
    with pytest.raises(StoreError, match="differs in network"):
        collect(other, samples, SITES, out, recipe={"a": 1})
    assert files(out) == before


def test_a_store_of_version_0_1_passes_for_one_of_the_same_recipe(tmp_path):
    samples, out = images(tmp_path), tmp_path / "store"
    collect(NETWORK, samples, SITES, out, recipe={"collecting": {"dtype": "float32"}})
    before = files(out)
    collect(NETWORK, samples, SITES, out, recipe={"storage": {"dtype": "float32"}})
    assert files(out) == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(StoreError, match="is not empty and is not a store"):
        collect(NETWORK, images(tmp_path), SITES, out)
    with pytest.raises(DiskError, match="is a file, expected a folder"):
        collect(NETWORK, images(tmp_path), SITES, out / "thesis.tex")


def test_a_finished_store_is_not_collected_again(tmp_path):
    samples = images(tmp_path)
    collect(NETWORK, samples, SITES, tmp_path / "store")
    calls = []
    NETWORK.first.register_forward_hook(lambda *_: calls.append(1))
    try:
        collect(NETWORK, samples, SITES, tmp_path / "store")
        assert len(calls) == 1  # the one sample that tells the shapes
    finally:
        NETWORK.first._forward_hooks.clear()


def test_a_network_that_gives_nan_is_refused_with_site_sample_and_channel(tmp_path):
    pixels = np.full((20, 9, 9, 3), 100, np.uint8)
    pixels[13] = 0
    np.save(tmp_path / "x.npy", pixels)
    network = sick()
    samples = open_samples(Images(source=str(tmp_path / "x.npy"), side=9), network)
    with pytest.raises(
        NonFiniteError, match="gave nan at site scale@bchw, sample image 13, channel 0"
    ):
        collect(network, samples, ["scale@bchw"], tmp_path / "store")


def test_unreadable_images_are_refused_or_skipped_and_counted(tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(Path(str(__import__("mechatlas").__path__[0])) / "bundled" / "photos", folder)
    broken = sorted(folder.glob("*.jpg"))[2]
    broken.write_bytes(broken.read_bytes()[:900])
    samples = open_samples(Images(source=str(folder), side=9), NETWORK)
    with pytest.raises(InputError, match=broken.name):
        collect(NETWORK, samples, SITES, tmp_path / "a")
    store = collect(NETWORK, samples, SITES, tmp_path / "b", StoreConfig(skip_bad=True))
    assert len(store.manifest["skipped"]) == 1
    assert broken.name in store.manifest["skipped"][0]
    total = store.rows("mixed").n_rows + store.rows("mixed").n_held_out
    assert total == 10 * (len(samples) - 1)


def test_when_no_image_can_be_read_there_is_no_store(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.jpg").write_bytes(b"no")
    samples = open_samples(Images(source=str(tmp_path / "p"), side=9), NETWORK)
    with pytest.raises(InputError, match="None of the 1 samples"):
        collect(NETWORK, samples, SITES, tmp_path / "s", StoreConfig(skip_bad=True))
    assert not (tmp_path / "s").exists()


def test_a_damaged_shard_is_named_and_refused(tmp_path):
    store = collect(NETWORK, images(tmp_path), SITES, tmp_path / "store")
    shard = tmp_path / "store" / "mixed" / "train-00000.safetensors"
    whole = bytearray(shard.read_bytes())
    whole[len(whole) // 2] ^= 1
    shard.write_bytes(whole)
    with pytest.raises(StoreError, match=r"train-00000\.safetensors is damaged: its checksum"):
        next(store.rows("mixed").batches(10))
    with pytest.raises(StoreError, match="is damaged: its checksum"):
        list(store.rows("mixed").scan())
    shard.write_bytes(whole[:300])
    with pytest.raises(StoreError, match="it has 300 bytes, expected"):
        next(store.rows("mixed").batches(10))
    shard.unlink()
    with pytest.raises(StoreError, match=r"train-00000\.safetensors"):
        next(store.rows("mixed").batches(10))
    next(store.rows("first").batches(10))


@pytest.mark.parametrize("damage", ["delete", "cut", "flip", "replace"])
@pytest.mark.parametrize("complete", [True, False])
def test_a_round_with_a_damaged_shard_is_collected_again(tmp_path, damage, complete):
    samples, out = images(tmp_path), tmp_path / "store"
    collect(NETWORK, samples, SITES, out)
    before = files(out)
    manifest, shard = out / "manifest.json", out / "mixed" / "train-00000.safetensors"
    if not complete:  # killed after the last round but one
        facts = json.loads(manifest.read_text())
        first = [entry for entry in facts["shards"] if entry[1] == "held"]
        write_manifest(manifest, facts | {"shards": first, "rounds_done": 1, "complete": False})
        shard = out / first[0][2]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.unlink()
    if damage == "replace":
        shard.symlink_to(tmp_path)
    elif damage != "delete":
        shard.write_bytes(data[: 300 if damage == "cut" else None])
    collect(NETWORK, samples, SITES, out)
    assert (files(out) == before) == (damage != "flip" or not complete)


def test_a_damaged_shard_whose_samples_have_changed_is_not_collected_again(tmp_path):
    samples, out = images(tmp_path), tmp_path / "store"
    collect(NETWORK, samples, SITES, out)
    (out / "mixed" / "train-00000.safetensors").unlink()
    np.save(tmp_path / "images.npy", 255 - np.load(tmp_path / "images.npy"))
    samples = open_samples(Images(source=str(tmp_path / "images.npy"), side=9), NETWORK)
    with pytest.raises(StoreError, match="its samples give other rows now"):
        collect(NETWORK, samples, SITES, out)


def test_a_store_whose_shards_are_deleted_meanwhile_is_not_called_complete(tmp_path):
    samples, out = images(tmp_path), tmp_path / "store"

    def delete(done, total):
        if done == total:
            shutil.rmtree(out if done % 2 else out / "mixed")

    with pytest.raises(StoreError, match="was deleted or changed while"):
        collect(NETWORK, samples, SITES, out, on_progress=delete)
    collect(NETWORK, samples, SITES, out)
    assert Store(out).manifest["complete"]


def test_an_unfinished_store_or_no_store_is_refused(tmp_path):
    with pytest.raises(StoreError, match="is not an activation store"):
        Store(tmp_path)
    store = collect(NETWORK, images(tmp_path), SITES, tmp_path / "store")
    manifest = dict(store.manifest, complete=False)
    write_manifest(tmp_path / "store" / "manifest.json", manifest)
    with pytest.raises(StoreError, match=r"is not finished .* it goes on where it stopped"):
        Store(tmp_path / "store")


FULL = """
import resource, signal, sys
from pathlib import Path
from mechatlas.activations.collect import collect
from mechatlas.activations.samples import Images, open_samples
from mechatlas.activations.sites import find_sites
from mechatlas.base import DiskError
sys.path.insert(0, sys.argv[3])
from tests.networks import tiny
network = tiny()
samples = open_samples(Images(source=sys.argv[1], side=9), network)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))  # the system refuses longer files
try:
    collect(network, samples, find_sites(network, ["mixed"]), Path(sys.argv[2]))
except DiskError as error:
    print(error)
"""


def test_when_the_disk_refuses_nothing_half_written_is_left(tmp_path):
    images(tmp_path)
    root = str(Path(__file__).parents[2])
    out = tmp_path / "store"
    command = [sys.executable, "-c", FULL, str(tmp_path / "images.npy"), str(out), root]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Cannot write" in said
    assert "Nothing half-written was left" in said
    assert not [name for name in files(out) if name.endswith(".tmp")]


def test_too_little_space_is_refused_before_any_work(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskError, match=r"KiB and .* has 1000 bytes free"):
        collect(NETWORK, images(tmp_path), SITES, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_an_unwritable_place_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="Cannot write"):
        collect(NETWORK, images(tmp_path), SITES, tmp_path / "file" / "store")


def test_rows_of_a_plain_network_on_arrays(tmp_path):
    x = np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    network = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 2))
    samples = open_samples(Arrays(source=tmp_path / "x.npy"), network)
    store = collect(network, samples, [Site("1")], tmp_path / "store")
    assert store.shapes["1"].grid == (1, 1)
    for batch, where in store.rows().scan():
        expected = network[:2](torch.from_numpy(x[where[:, 0].numpy()]))
        torch.testing.assert_close(batch.x, expected.detach())
