import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from mechatlas.base import WeightsError
from mechatlas.dictionaries.autoencoder import Autoencoder
from mechatlas.dictionaries.engine.checkpoints import FILE, continued, keep
from mechatlas.dictionaries.objective import Schedule
from mechatlas.dictionaries.sparsity import TopK
from mechatlas.dictionaries.training import train
from tests.dictionaries.test_autoencoder import planted


class KilledError(Exception):
    pass


def kill_after(n_steps):
    def on_progress(done, total):
        if done == n_steps:
            raise KilledError

    return on_progress


@dataclasses.dataclass(frozen=True)
class TopTwo:
    """A rule that only autograd can train."""

    def __call__(self, pre):
        top = pre.topk(2, dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())


def run(dictionary, x, **options) -> Autoencoder:
    settings: dict[str, Any] = {**OPTIONS, **options}
    return train(dictionary, x, **settings)


def build(sparsity, tied=False, seed=0) -> Autoencoder:
    return Autoencoder(d_in=24, n_latents=40, sparsity=sparsity, tied=tied, seed=seed)


OPTIONS = {"steps": 30, "batch_size": 128, "checkpoint_every": 4, "seed": 3}


def weights(dictionary):
    return [p.detach().numpy().tobytes() for p in dictionary.parameters()]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("sparsity", [TopK(k=3), TopTwo()], ids=["sparse", "autograd"])
def test_a_killed_run_ends_with_the_same_bytes(tmp_path, sparsity, tied):
    x, _ = planted(2000)
    whole = run(build(sparsity, tied), x)
    for n_steps in (2, 9, 21):  # before a checkpoint, after one, and again
        built, stop = build(sparsity, tied), kill_after(n_steps)
        with pytest.raises(KilledError):
            run(built, x, checkpoint=tmp_path, on_progress=stop)
    told = []
    late = run(
        build(sparsity, tied),
        x,
        checkpoint=tmp_path,
        on_progress=lambda done, _: told.append(done),
    )
    assert told[0] == 21, "the run continues behind its last checkpoint"
    assert weights(late) == weights(whole)
    assert late.history is not None
    assert whole.history is not None
    for name in ("step", "fvu", "l0", "dead_share"):
        assert getattr(late.history, name) == getattr(whole.history, name)
    again = run(build(sparsity, tied), x, checkpoint=tmp_path)
    assert weights(again) == weights(whole)
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


def test_a_checkpoint_of_another_run_is_refused_with_every_difference(tmp_path):
    x, _ = planted(500)
    run(build(TopK(k=3)), x, checkpoint=tmp_path)
    other = build(TopK(k=4), seed=1)
    before = weights(other)
    with pytest.raises(WeightsError) as caught:
        run(other, x[:400], checkpoint=tmp_path, steps=31)
    for part in ("TopK(k=3)", "weights at the start 0 was", "steps was 30, is 31", "rows was [475"):
        assert part in str(caught.value)
    assert weights(other) == before


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path):
    x, _ = planted(500)
    run(build(TopK(k=3)), x, checkpoint=tmp_path)
    file = tmp_path / FILE
    whole = file.read_bytes()
    for cut in (0, 7, len(whole) // 2):
        file.write_bytes(whole[:cut])
        with pytest.raises(WeightsError, match=r"checkpoint\.safetensors cannot be read"):
            run(build(TopK(k=3)), x, checkpoint=tmp_path)


def test_no_flip_in_a_checkpoint_goes_unnoticed(tmp_path):
    tensors = {"a": torch.randn(40, 30), "b": torch.randn(7)}
    settings, progress = {"steps": 9}, {"done": 3, "histories": [{"fvu": [0.25, 0.125]}]}
    keep(tmp_path, tensors, settings, progress)
    file = tmp_path / FILE
    whole = file.read_bytes()
    unnoticed = 0
    for place in (*range(500), *range(500, len(whole), 37)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        read = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        try:
            found = continued(tmp_path, read, settings)
        except WeightsError as error:
            assert str(file) in str(error)  # noqa: PT017
            continue
        unnoticed += 1  # in the padding, or in the word that names the checksum
        assert found == progress
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert unnoticed < 30


def test_the_rate_rises_in_a_line_and_falls_in_a_line():
    rates = [Schedule(warm_up=3, decay=0.5)(step, 10) for step in range(10)]
    np.testing.assert_allclose(rates, [0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert {Schedule(decay=0.0)(step, 10) for step in range(10)} == {1.0}
    with pytest.raises(ValueError, match="warm_up must be at least 0, got -1"):
        Schedule(warm_up=-1)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got 1.5"):
        Schedule(decay=1.5)
