"""Rows straight from a network: the right ones, each once an epoch, and a run that goes on."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mechatlas.activations.positions import Positions
from mechatlas.activations.sites import read_activations
from mechatlas.activations.stream import stream
from mechatlas.base import InputError, Rows, WeightsError
from mechatlas.dictionaries.autoencoder import Autoencoder, Crosscoder
from mechatlas.dictionaries.sparsity import TopK
from mechatlas.dictionaries.training import train
from tests.networks import Reader, Windows, tiny

SAMPLES = Windows(n=60, length=12)
KEPT = (SAMPLES.tokens > 1) & (np.cumsum(SAMPLES.tokens != 1, axis=1) > 1)


def sae(seed=0):
    return Autoencoder(d_in=8, n_latents=24, sparsity=TopK(k=3), seed=seed)


def epoch_of(rows, batch_size=50, start=0, n=30):
    batches = rows.batches(batch_size, start=start)
    return [next(batches) for _ in range(n)]


@pytest.mark.parametrize("pool_mib", [512, 0], ids=["one pool", "a sample a pool"])
def test_an_epoch_has_every_row_that_is_kept_once_and_none_that_is_held_out(pool_mib):
    network = Reader()
    rows = stream(network, SAMPLES, ["embed", "block"], held_out=0.2, pool_mib=pool_mib)
    assert isinstance(rows, Rows)
    held = {int(r) // 12 for r in rows.held_out(10_000).row}
    assert len(held) == 12
    expected = [s * 12 + p for s, p in zip(*KEPT.nonzero(), strict=True) if s not in held]
    batches = epoch_of(rows, batch_size=len(expected), n=1)
    assert sorted(batches[0].row.tolist()) == expected
    sites: Any = ["embed", "block"]
    whole: Any = read_activations(network, torch.from_numpy(SAMPLES.tokens), sites)
    sample, place = batches[0].row // 12, batches[0].row % 12
    for site, part in zip(("embed", "block"), rows.parts, strict=True):
        found = whole[site].detach()[sample, place]
        torch.testing.assert_close(batches[0].x[:, part], found)


@pytest.mark.parametrize("pool_mib", [512, 0])
@pytest.mark.parametrize("rule", ["all", "random", "norm"])
def test_a_stream_from_a_later_batch_is_as_if_the_earlier_had_been_read(pool_mib, rule):
    positions = Positions(rule=rule, per_sample=4)
    options = {"pool_mib": pool_mib, "positions": positions}
    whole = epoch_of(stream(Reader(), SAMPLES, "block", **options))
    for start in (1, 7, 29):
        (later,) = epoch_of(stream(Reader(), SAMPLES, "block", **options), start=start, n=1)
        assert torch.equal(later.row, whole[start].row)
        torch.testing.assert_close(later.x, whole[start].x)


def test_what_was_trained_on_is_not_read_again():
    network = Reader()
    rows = stream(network, SAMPLES, "block", pool_mib=0)
    seen = []
    network.register_forward_pre_hook(lambda _module, args: seen.append(len(args[0])))
    next(rows.batches(20, start=300))
    assert sum(seen) < 60


def test_a_pool_is_no_larger_than_it_may_be():
    rows = stream(Reader(), Windows(n=4000, length=12), "block", pool_mib=1)
    assert rows.samples_in_pool * 12 * 8 * 4 <= 1 << 19
    pools = rows._pools(0, 0)
    sizes = [len(next(pools)[0].x) for _ in range(4)]
    assert max(sizes) <= rows.samples_in_pool * 12
    assert len(set(sizes)) > 1


def test_several_dictionaries_are_trained_in_one_pass_as_each_alone():
    network = Reader()
    passes = []
    network.register_forward_pre_hook(lambda _module, _args: passes.append(1))
    both = train(
        [sae(0), sae(1), sae(2)],
        stream(network, SAMPLES, ["embed", "block", "block"]),
        steps=30,
        batch_size=64,
    )
    together = len(passes)
    for one, site, seed in zip(both, ("embed", "block", "block"), range(3), strict=True):
        passes.clear()
        alone = train(sae(seed), stream(network, SAMPLES, site), steps=30, batch_size=64)
        assert together <= len(passes) + 2, "one more site to look at before"
        torch.testing.assert_close(one.W_dec, alone.W_dec)


def test_a_crosscoder_reads_all_sites_side_by_side():
    both = Crosscoder(widths={"embed": 8, "block": 8}, n_latents=24, sparsity=TopK(k=4))
    train(both, stream(Reader(), SAMPLES, ["embed", "block"]), steps=10, batch_size=64)
    with pytest.raises(InputError, match="give one dictionary for each site"):
        train([sae(), sae(), sae()], stream(Reader(), SAMPLES, ["embed", "block"]), steps=1)


def test_a_killed_run_ends_with_the_same_bytes(tmp_path):
    def stop(done, total):
        if done == 25:
            raise KeyboardInterrupt

    def run(folder, **options):
        rows = stream(Reader(), SAMPLES, ["embed", "block"], pool_mib=0)
        options |= {"checkpoint": tmp_path / folder, "checkpoint_every": 10}
        return train([sae(0), sae(1)], rows, steps=40, batch_size=64, **options)

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("killed", on_progress=stop)
    for one, other in zip(whole, run("killed"), strict=True):
        assert torch.equal(one.W_dec, other.W_dec)
        assert torch.equal(one.W_enc, other.W_enc)

    network = Reader()
    with torch.no_grad():
        network.embed.weight += 1e-6  # as another number of threads would
    rows = stream(network, SAMPLES, ["embed", "block"], pool_mib=0)
    options = {"checkpoint": tmp_path / "whole", "steps": 40, "batch_size": 64}
    with pytest.raises(WeightsError, match=r"held-out rows was .* number of threads"):
        train([sae(0), sae(1)], rows, **options)
    with pytest.raises(WeightsError, match=r"lr was .None., is 0.5. Give the same"):
        train([sae(0), sae(1)], stream(Reader(), SAMPLES, ["embed", "block"]), lr=0.5, **options)


def test_maps_of_one_grid_are_streamed_and_those_of_several_refused():
    network = nn.Sequential(tiny().first, nn.ReLU(), nn.AvgPool2d(3))
    images = torch.rand(20, 3, 9, 9)
    rows = stream(network, images, ["0", "1"])
    assert rows.d_in == 12
    assert rows.n_rows == 19 * 81
    with pytest.raises(InputError, match="different grids"):
        stream(network, images, ["1", "2"])
    assert rows.describe(81 + 5).endswith("position 5")
    assert "held out" in repr(rows)


def test_a_network_is_left_in_training_mode_and_without_hooks():
    network = Reader()
    network.train()
    next(stream(network, SAMPLES, "block").batches(8))
    assert network.training
    assert not network.block._forward_hooks
