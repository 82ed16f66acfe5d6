"""One dictionary over several processes: equal to one process, and continued by any number."""

import copy
import itertools
import multiprocessing
import shutil
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from mechatlas.base import Batch, RecipeError, WeightsError
from mechatlas.dictionaries import sharded
from mechatlas.dictionaries.autoencoder import Autoencoder, Transcoder
from mechatlas.dictionaries.engine import sparse_steps
from mechatlas.dictionaries.engine.shard_files import ShardFiles
from mechatlas.dictionaries.formats import load, save
from mechatlas.dictionaries.objective import Objective
from mechatlas.dictionaries.revival import AuxK
from mechatlas.dictionaries.rows import ArrayRows
from mechatlas.dictionaries.sharded import Shard, ShardedStep, mesh_of
from mechatlas.dictionaries.sparsity import BatchTopK, JumpReLU, TopK
from mechatlas.dictionaries.training import train

N, D = 50, 16
CASES = {
    f"{rule.__name__} {'tied' if tied else 'untied'} {n_data}x{2 // n_data}": (rule, tied, n_data)
    for rule, tied, n_data in [
        *itertools.product((TopK, BatchTopK), (False, True), (1,)),
        (TopK, True, 2),
        (BatchTopK, False, 2),
    ]
}


class ExactRows(ArrayRows):
    """Rows in float64: what differs by rounding alone stays far below what does not."""

    def batches(self, batch_size, *, seed=0, start=0):
        for batch in super().batches(batch_size, seed=seed, start=start):
            yield Batch(batch.x.double(), batch.row)

    def held_out(self, n_rows):
        batch = super().held_out(n_rows)
        return Batch(batch.x.double(), batch.row)


def rows(kind=ExactRows):
    random = torch.Generator().manual_seed(0)
    atoms = torch.randn(30, D, generator=random)
    code = torch.rand(3000, 30, generator=random) * (torch.rand(3000, 30, generator=random) < 0.1)
    return kind(code @ atoms + 0.05 * torch.randn(3000, D, generator=random))


def options(steps):
    aux = AuxK(k=5, dead_after_rows=130)
    return {"steps": steps, "batch_size": 65, "revival": aux, "objective": Objective(clip=50.0)}


def whole(rule=TopK, tied=False):
    return Autoencoder(d_in=D, n_latents=N, sparsity=rule(k=4), tied=tied, seed=3).double()


def across():
    return Transcoder(d_in=6, d_out=10, n_latents=N, sparsity=TopK(k=4), seed=3).double()


def shard_of(dictionary, mesh):
    shard = Shard(dictionary, N, mesh)
    return shard.to(next(dictionary.parameters()).dtype)


def state_of(dictionary):
    return copy.deepcopy(dictionary.state_dict())


def measured_of(dictionary):
    history = dictionary.history
    return history.fvu + history.l0 + history.dead_share


def of_latents(state, latents):
    """Part of a whole dictionary's state that a process has."""
    part = slice(latents.start, latents.stop)
    cut = {"_W_enc": (slice(None), part), "b_dec": ..., "threshold": ...}
    return {name: tensor[cut.get(name, part)] for name, tensor in state.items()}


class StoppedError(Exception):
    pass


def stop_at(n):
    def on_progress(done, total):
        if done == n:
            raise StoppedError

    return on_progress


def work_together(rank, folder, steps):
    """Train every case as one of two processes, and write what became of its latents."""
    torch.set_num_threads(1)
    sparse_steps.can_compile = lambda _: False  # kernels of float64 would have to be compiled
    sharded.SPREAD = 0.0  # in many rows a process has more than its share of the codes
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    try:
        results = {}
        for name, (rule, tied, n_data) in CASES.items():
            shard = shard_of(whole(rule, tied), mesh_of(n_data=n_data))
            start = state_of(shard)
            train(shard, rows(), **options(steps))
            ends = shard.latents.start, shard.latents.stop
            results[name] = (*ends, start, state_of(shard), measured_of(shard))
            if rank == 0 or n_data == 1:
                save(shard, folder / name)
        shard = shard_of(across(), mesh_of())
        start = state_of(shard)
        train(shard, rows(), steps=20, batch_size=65)
        ends = shard.latents.start, shard.latents.stop
        results["across"] = (*ends, start, state_of(shard), measured_of(shard))
        torch.save(results, folder / f"rank{rank}.pt")
        kept = {"checkpoint": folder / "checkpoint", "checkpoint_every": 20}
        shard = shard_of(whole(), mesh_of())
        with pytest.raises(StoppedError):
            train(shard, rows(), **options(60), **kept, on_progress=stop_at(50))
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module", autouse=True)
def plain_kernels():
    can_compile = sparse_steps.can_compile
    sparse_steps.can_compile = lambda _: False
    yield
    sparse_steps.can_compile = can_compile


@pytest.fixture(scope="module", params=[40, pytest.param(200, marks=pytest.mark.slow)])
def together(tmp_path_factory, request):
    """Steps and results of two processes, one of which is this."""
    steps, folder = request.param, tmp_path_factory.mktemp("together")
    (folder / "checkpoint").mkdir()
    other = multiprocessing.get_context("spawn").Process(
        target=work_together, args=(1, folder, steps)
    )
    other.start()
    work_together(0, folder, steps)
    other.join()
    assert other.exitcode == 0
    loaded = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]
    return folder, loaded, steps


@pytest.fixture
def alone():
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield mesh_of()
    dist.destroy_process_group()


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_what_one_trains(together, name, monkeypatch):
    (rule, tied, _), steps = CASES[name], together[2]
    revived = []
    revive = sparse_steps.revive
    monkeypatch.setattr(
        sparse_steps,
        "revive",
        lambda aux, dead, *o: revived.append(len(dead)) or revive(aux, dead, *o),
    )
    one = whole(rule, tied)
    start = state_of(one)
    train(one, rows(), **options(steps))
    assert sum(revived) > 10, "AuxK had something to do"
    for start_, stop, first, last, measured in (results[name] for results in together[1]):
        latents = range(start_, stop)
        for key, tensor in of_latents(start, latents).items():
            assert torch.equal(first[key], tensor), f"{key} at the start"
        for key, tensor in of_latents(state_of(one), latents).items():
            torch.testing.assert_close(last[key], tensor, atol=1e-7, rtol=0)
        assert measured == pytest.approx(measured_of(one), abs=1e-7)


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("1x2")])
def test_files_of_all_processes_are_one_dictionary(together, name, tmp_path):
    folder, results = together[0] / name, together[1]
    assert len(list(folder.iterdir())) == 2
    joined = load(folder)
    for start, stop, _, last, _ in (each[name] for each in results):
        for key, tensor in of_latents(joined.state_dict(), range(start, stop)).items():
            assert torch.equal(last[key].float(), tensor)
    shutil.copytree(folder, tmp_path / "part")
    (tmp_path / "part" / "dictionary-00000000.safetensors").unlink()
    with pytest.raises(WeightsError, match="latents 25 to 50 of 50, expected all of one"):
        load(tmp_path / "part")


def test_two_processes_train_the_transcoder_of_one(together):
    one = across()
    start = state_of(one)
    train(one, rows(), steps=20, batch_size=65)
    for first_latent, stop, first, last, measured in (each["across"] for each in together[1]):
        latents = range(first_latent, stop)
        for key, tensor in of_latents(start, latents).items():
            assert torch.equal(first[key], tensor), key
        for key, tensor in of_latents(state_of(one), latents).items():
            torch.testing.assert_close(last[key], tensor, atol=1e-7, rtol=0)
        assert measured == pytest.approx(measured_of(one), abs=1e-7)


def test_another_number_of_processes_goes_on_from_a_checkpoint(together, alone, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(together[0] / "checkpoint", folder)
    assert sorted(f.name for f in folder.iterdir()) == [
        "00000040-00000000.safetensors", "00000040-00000025.safetensors", "shards.json",
    ]  # fmt: skip
    one = train(whole(), rows(), **options(60))
    steps = []
    again = train(
        shard_of(whole(), alone), rows(), **options(60), checkpoint=folder,
        on_progress=lambda done, total: steps.append(done),
    )  # fmt: skip
    assert steps[0] == 41
    for key, tensor in state_of(one).items():
        torch.testing.assert_close(again.state_dict()[key], tensor, atol=1e-7, rtol=0)
    assert measured_of(again) == pytest.approx(measured_of(one), abs=1e-7)
    with pytest.raises(WeightsError, match="batch_size was 65, is 64"):
        train(
            shard_of(whole(), alone), rows(), **{**options(60), "batch_size": 64}, checkpoint=folder
        )
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\1\1")
    with pytest.raises(WeightsError, match=file.name):
        train(shard_of(whole(), alone), rows(), **options(60), checkpoint=folder)


def test_the_checkpoint_of_a_single_process_is_refused(alone, tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match="is of a single process: continue it without torchrun"):
        ShardFiles(alone, range(4), 4).continued(tmp_path, {}, {})


def test_what_cannot_be_shared_out_is_refused(alone):
    with pytest.raises(RecipeError, match="TopK or BatchTopK, without matryoshka_widths"):
        Shard(Autoencoder(d_in=D, n_latents=N, sparsity=JumpReLU()), N, alone)
    with pytest.raises(RecipeError, match=r"50 latents over 1 processes .* at least k = 60"):
        Shard(Autoencoder(d_in=D, n_latents=99, sparsity=TopK(k=60)), N, alone)
    with pytest.raises(RecipeError, match="n_data is 2, expected a divisor of the 1 processes"):
        mesh_of(n_data=2)
    assert isinstance(shard_of(whole(), alone).step(Objective()), ShardedStep)
