"""Formulas of docs/scaling.md: against runs of three sizes, and messages of the sharded trainer."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import mechatlas as ma
from mechatlas.dictionaries import sharded
from mechatlas.dictionaries.engine.sparse_steps import SparseStep
from mechatlas.dictionaries.objective import Objective
from mechatlas.dictionaries.sharded import Shard, mesh_of

ROOT = Path(__file__).parents[1]
SCALING = runpy.run_path(str(ROOT / "benchmarks" / "scaling.py"))
SIZES = ((8, 64, 256), (16, 128, 512), (32, 256, 1024))
"""Width, latents and rows of three jobs; two give a line, on which the third must lie."""
K = 4


def jobs():
    return [
        SCALING["Job"](layers=2, d=d, latents=n, n_tokens=rows, batch=rows, k=K)
        for d, n, rows in SIZES
    ]


def test_the_tables_of_the_page_are_computed():
    check = [sys.executable, ROOT / "benchmarks" / "scaling.py", "--check"]
    assert subprocess.run(check, check=False).returncode == 0, "run benchmarks/scaling.py"


def test_stores_have_the_bytes_of_the_formula(tmp_path):
    for job in jobs():
        network = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity())
        x = np.random.default_rng(0).normal(size=(job.n_tokens, job.d)).astype("float32")
        settings = ma.StoreConfig(dtype="bfloat16")
        store = ma.collect(network, x, ["0", "1"], tmp_path / str(job.d), settings)
        headers = 200 * len(store.shards)
        measured = sum(shard.bytes for shard in store.shards)
        assert 0 <= measured - SCALING["store_bytes"](job) <= headers


def test_weights_moments_and_checkpoints_have_the_bytes_of_the_formula(tmp_path):
    for job in jobs():
        sae = ma.Autoencoder(d_in=job.d, n_latents=job.latents, sparsity=ma.TopK(k=K))
        step = SparseStep(sae)
        tensors = [*sae.parameters(), *(m for pair in step.moments.values() for m in pair)]
        held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert held == SCALING["training_bytes"](job)
        folder = tmp_path / str(job.d)
        ma.train(sae, torch.randn(300, job.d), steps=1, batch_size=16, checkpoint=folder)
        measured = (folder / "checkpoint.safetensors").stat().st_size
        last_fired = 8 * job.latents
        assert 0 <= measured - held - last_fired < 4096


@pytest.fixture
def messages(monkeypatch):
    """Bytes that a process gives to each kind of message."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    given = {"gathered": 0, "summed": 0}

    def counted(kind, function, place):
        def call(*words, **options):
            given[kind] += words[place].numel() * words[place].element_size()
            return function(*words, **options)

        return call

    monkeypatch.setattr(sharded.dist, "all_gather", counted("gathered", dist.all_gather, 1))
    monkeypatch.setattr(sharded.dist, "all_reduce", counted("summed", dist.all_reduce, 0))
    yield given
    dist.destroy_process_group()


def test_a_step_sends_the_messages_of_the_formula(messages):
    mesh = mesh_of()
    for job in jobs():
        form = ma.Autoencoder(d_in=job.d, n_latents=K, sparsity=ma.TopK(k=K))
        shard = Shard(form, job.latents, mesh)
        step = shard.step(Objective())
        messages.update(gathered=0, summed=0)
        step(torch.randn(job.batch, job.d), 1e-3)
        assert messages["gathered"] == SCALING["gathered_bytes"](job)
        assert messages["summed"] == SCALING["summed_bytes"](job)
    job = jobs()[0]
    assert SCALING["received_bytes"](job, 1) == 0
    two = SCALING["gathered_bytes"](job) + SCALING["summed_bytes"](job)
    assert SCALING["received_bytes"](job, 2) == two


def test_a_step_has_the_operations_of_the_formula():
    """Only the product with the encoder is dense; torch counts it."""
    from torch.utils.flop_counter import FlopCounterMode

    for job in jobs():
        sae = ma.Autoencoder(d_in=job.d, n_latents=job.latents, sparsity=ma.TopK(k=K))
        x = torch.randn(job.batch, job.d)
        with FlopCounterMode(display=False) as counter:
            sae.encode(x)
        dense = SCALING["step_flops"](job) - 7 * 2 * job.batch * K * job.d
        assert counter.get_total_flops() == dense
