"""Rounds on engines: the same bytes in any order, after any loss, and from the same inputs only."""

import copy
import functools
import json
import os
import signal

import numpy as np
import pytest
import torch

from mechatlas.activations import collect as module
from mechatlas.activations.collect import StoreConfig, collect
from mechatlas.activations.samples import Images
from mechatlas.app.engines import Processes
from mechatlas.base import RecipeError, StoreError, UserError
from tests.networks import tiny

SITES = ["mixed", "first"]
SETTINGS = StoreConfig(skip_bad=True, batch_size=8)


@pytest.fixture(autouse=True)
def many_rounds(monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 3000)
    monkeypatch.setattr(module, "_plan", in_rounds)


def in_rounds(n, shapes, settings, plan=module._plan):
    return [
        module.Round(r.split, part)
        for r in plan(n, shapes, settings)
        for part in np.array_split(r.samples, 6)
        if len(part)
    ]


def reopen(source, mark=None, seed=None):
    """Open the inputs in a worker, with rounds as small as here; the first one to come may die."""
    module._plan, module.SHARD_BYTES = in_rounds, 3000
    torch.set_num_threads(1)
    if mark is not None and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    network = tiny()
    if seed is not None:
        torch.nn.init.normal_(network.first.weight)
    return network, Images(source=str(source), side=9)


class Backwards:
    """Engine that does its pieces in reverse order, from copies, and may give up on the way."""

    def __init__(self, give_up_after=None):
        self.give_up_after = give_up_after

    def map(self, work, pieces, *, shared=None):
        for done, (number, piece) in enumerate(reversed(list(enumerate(pieces)))):
            if done == self.give_up_after:
                raise UserError("given up")
            yield number, work(piece, copy.deepcopy(shared))


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 9, 9, 3), dtype=np.uint8)
    for i, each in enumerate(pixels):
        Image.fromarray(each).save(folder / f"{i:02}.png")
    for i in (7, 20):
        (folder / f"{i:02}.png").write_bytes(b"not an image")
    return folder


def collected(photos, out, **options):
    network, samples = reopen(photos)
    return collect(network, samples, SITES, out, SETTINGS, **options)


def elsewhere(photos, out, engine, **options):
    return collected(
        photos, out, engine=engine, reopen=functools.partial(reopen, photos, **options)
    )


def test_rounds_done_in_any_order_give_the_same_bytes(photos, tmp_path):
    whole = collected(photos, tmp_path / "whole")
    assert len(whole.manifest["skipped"]) == 2
    assert whole.manifest["rounds"] > 6
    elsewhere(photos, tmp_path / "other", Backwards())
    assert files(tmp_path / "other") == files(tmp_path / "whole")


def test_a_store_is_begun_on_one_engine_and_finished_on_another(photos, tmp_path):
    collected(photos, tmp_path / "whole")
    out = tmp_path / "other"
    with pytest.raises(UserError, match="given up"):
        elsewhere(photos, out, Backwards(give_up_after=3))
    manifest = json.loads((out / "manifest.json").read_text())
    n = manifest["rounds"]
    assert sorted(map(int, manifest["rounds_done"])) == [n - 3, n - 2, n - 1]
    with pytest.raises(StoreError, match=rf"not finished \(3 of {n} rounds\)"):
        module.Store(out)
    shard = next(out.rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (out / "mixed" / "train-00099.safetensors.77.mechatlas.tmp").write_text("of a killed worker")
    collected(photos, out)
    assert files(out) == files(tmp_path / "whole")


def test_workers_must_find_the_same_weights_and_samples(photos, tmp_path):
    with pytest.raises(StoreError, match=r"A worker finds another network than the first process"):
        elsewhere(photos, tmp_path / "a", Backwards(), seed=1)
    other = tmp_path / "photos"
    other.mkdir()
    for file in list(photos.glob("*.png"))[:10]:
        (other / file.name).write_bytes(file.read_bytes())
    with pytest.raises(StoreError, match=r"another n_samples"):
        collected(
            photos, tmp_path / "b", engine=Backwards(), reopen=functools.partial(reopen, other)
        )
    with pytest.raises(RecipeError, match=r"give collect\(reopen=f\)"):
        collected(photos, tmp_path / "c", engine=Backwards())
    assert not (tmp_path / "c").exists()


def test_a_killed_process_costs_nothing_but_its_round(photos, tmp_path):
    collected(photos, tmp_path / "whole")
    mark = tmp_path / "died"
    elsewhere(photos, tmp_path / "other", Processes(2), mark=mark)
    assert mark.exists()
    assert files(tmp_path / "other") == files(tmp_path / "whole")
