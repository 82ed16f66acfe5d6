"""Training and analyses on a device that is simulated: right numbers, no mixing, few waits."""

from collections import Counter
from typing import Any

import pytest
import torch

import mechatlas as ma
from mechatlas.base import NonFiniteError
from mechatlas.dictionaries import training
from mechatlas.dictionaries.engine import sparse_steps
from mechatlas.dictionaries.sparsity import Gated
from tests.simulated_device import OnDevice, simulated_cuda

ROWS = torch.randn(1500, 12, generator=torch.Generator().manual_seed(0))
KINDS = {
    "topk": lambda: ma.Autoencoder(d_in=12, n_latents=40, sparsity=ma.TopK(k=4)),
    "batch topk": lambda: ma.Autoencoder(d_in=12, n_latents=40, sparsity=ma.BatchTopK(k=4)),
    "relu": lambda: ma.Autoencoder(d_in=12, n_latents=40, sparsity=ma.ReLU()),
    "jumprelu": lambda: ma.Autoencoder(d_in=12, n_latents=40, sparsity=ma.JumpReLU()),
    "gated": lambda: ma.Autoencoder(d_in=12, n_latents=40, sparsity=Gated()),
    "tied": lambda: ma.Autoencoder(d_in=12, n_latents=40, sparsity=ma.TopK(k=4), tied=True),
    "matryoshka": lambda: ma.Autoencoder(
        d_in=12, n_latents=40, sparsity=ma.TopK(k=4), matryoshka_widths=(10,)
    ),
    "transcoder": lambda: ma.Transcoder(d_in=6, d_out=6, n_latents=40, sparsity=ma.TopK(k=4)),
    "crosscoder": lambda: ma.Crosscoder(
        widths={"a": 6, "b": 6}, n_latents=40, sparsity=ma.TopK(k=4)
    ),
}
REVIVALS = {
    "none": None,
    "auxk": ma.AuxK(k=4, dead_after_rows=300),
    "resample": ma.Resample(every=5, dead_after_rows=300),
}


@pytest.mark.parametrize(
    ("kind", "revival", "steps"),
    [
        *((kind, "none", 60 if "topk" in kind else 20) for kind in KINDS),
        *((kind, "auxk", 15) for kind in ("topk", "gated", "crosscoder")),
        *((kind, "resample", 15) for kind in ("topk", "jumprelu", "gated")),
    ],
)
def test_a_device_trains_the_same_dictionary(kind, revival, steps):
    options: dict[str, Any] = {"steps": steps, "batch_size": 128, "revival": REVIVALS[revival]}
    here = ma.train(KINDS[kind](), ROWS, **options)
    with simulated_cuda():
        there = ma.train(KINDS[kind](), ROWS, device="cuda", **options)
    assert not isinstance(there.W_dec.data, OnDevice)  # back where the user has it
    for name, wanted in here.state_dict().items():
        torch.testing.assert_close(there.state_dict()[name], wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "density"),
    [(kind, 1) for kind in KINDS] + [(kind, -1) for kind in ("relu", "jumprelu", "gated")],
)
def test_a_step_is_few_calls_and_waits_for_nothing(kind, density, monkeypatch):
    monkeypatch.setattr(training, "MEASUREMENTS", 1)
    monkeypatch.setattr(sparse_steps, "MAX_DENSITY", density)  # all steps are sparse, or all dense
    with simulated_cuda() as device:

        def counts(steps):
            device.reset()
            ma.train(KINDS[kind](), ROWS, steps=steps, batch_size=128, device="cuda")
            return [Counter(c) for c in (device.calls, device.syncs)]

        few, many = counts(10), counts(30)
    calls, waits = (
        (sum(b.values()) - sum(a.values())) / 20 for a, b in zip(few, many, strict=True)
    )
    assert 20 < calls <= 100, kind
    assert waits == (kind in ("relu", "jumprelu", "gated"))  # for the number of codes


def test_rows_are_copied_as_they_are_stored_while_the_device_works():
    half = ROWS.bfloat16()
    options: dict[str, Any] = {"steps": 9, "batch_size": 128}
    here = ma.train(KINDS["topk"](), half, **options)
    with simulated_cuda() as device:
        there = ma.train(KINDS["topk"](), half, device="cuda", **options)
    torch.testing.assert_close(there.W_dec, here.W_dec, atol=1e-5, rtol=1e-4)
    assert device.staged == {torch.bfloat16: 9}  # by a stream of its own


def test_rows_of_a_device_come_as_a_stream():
    options: dict[str, Any] = {"steps": 20, "batch_size": 128}
    here = ma.train(KINDS["topk"](), list(ROWS.split(100)), **options)
    with simulated_cuda():
        chunks = [chunk.to("cuda:0") for chunk in ROWS.split(100)]
        there = ma.train(KINDS["topk"](), chunks, device="cuda", **options)
    torch.testing.assert_close(there.W_dec, here.W_dec, atol=1e-5, rtol=1e-4)


def test_a_killed_run_goes_on_with_the_same_bytes_on_the_device(tmp_path):
    def train(folder, steps):
        built = KINDS["jumprelu"]()
        return ma.train(
            built,
            ROWS,
            steps=30,
            batch_size=128,
            device="cuda",
            checkpoint=folder,
            checkpoint_every=10,
            on_progress=lambda done, _: stop(done, steps),
        )

    def stop(done, steps):
        if done == steps:
            raise KeyboardInterrupt

    with simulated_cuda():
        whole = train(tmp_path / "a", None)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "b", 17)
        again = train(tmp_path / "b", None)
    for name, wanted in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dictionary_of_half_precision_is_trained_in_full(dtype):
    full = KINDS["topk"]()
    half = KINDS["topk"]().to(dtype)
    full.load_state_dict(half.state_dict())
    full = ma.train(full, ROWS, steps=20, batch_size=128)
    half = ma.train(half, ROWS, steps=20, batch_size=128)
    assert half.W_dec.dtype == dtype
    assert torch.equal(half.W_dec, full.W_dec.to(dtype))


def test_a_loss_without_value_is_named_before_it_is_saved(tmp_path):
    with simulated_cuda(), pytest.raises(NonFiniteError, match="at or before step"):
        ma.train(
            KINDS["topk"](),
            ROWS * 1e3,
            steps=10,
            lr=1e30,
            batch_size=128,
            device="cuda",
            checkpoint=tmp_path,
            checkpoint_every=5,
        )
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_simulation_refuses_what_a_gpu_refuses():
    with simulated_cuda() as device:
        there = torch.ones(3).to("cuda:0")
        with pytest.raises(RuntimeError, match="two devices"):
            there.add(torch.ones(3))
        with pytest.raises(TypeError, match="can't convert cuda"):
            there.numpy()
        assert float((there + 1).sum()) == 6
    assert sum(device.syncs.values()) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_number_formats_without_kernels_are_refused_before_anything_changes(dtype):
    built = KINDS["topk"]()
    with pytest.raises((ma.RecipeError, ValueError), match=r"dtype .*'float32'|dtype must be"):
        ma.train(built, ROWS, steps=2, dtype=dtype)
    assert built.W_dec.dtype == torch.float32
