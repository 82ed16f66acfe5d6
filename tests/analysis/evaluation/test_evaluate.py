"""Worth of a dictionary to its network, against a plain computation in float64."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from mechatlas.activations.positions import Positions
from mechatlas.analysis.evaluation import evaluate as module
from mechatlas.base import InputError
from mechatlas.dictionaries.autoencoder import Autoencoder, Transcoder
from mechatlas.dictionaries.sparsity import TopK
from mechatlas.maths.bootstrap import resample
from tests.networks import Reader, Windows

evaluate: Any = module.evaluate
SAMPLES = Windows(n=24, length=12)
TOKENS = torch.from_numpy(SAMPLES.tokens)


def dictionary(d_in=8, seed=0):
    return Autoencoder(d_in=d_in, n_latents=20, sparsity=TopK(k=3), seed=seed)


def by_hand(network, sae, tokens, written, site):
    """Losses, divergence and answers of each way, in float64, with hooks of its own."""
    network, sae = copy.deepcopy(network).double(), copy.deepcopy(sae).double()
    module = network.get_submodule(site)
    seen = []
    handle = module.register_forward_hook(lambda _m, _a, y: seen.append(y))
    intact = network(tokens)
    handle.remove()
    x = seen[0]
    new = {
        "intact": x,
        "spliced": sae.decode(sae.encode(x.flatten(0, 1))).reshape(x.shape),
        "zero_ablated": torch.zeros_like(x),
        "mean_ablated": x[written].mean(dim=0).expand_as(x),
    }
    targets = tokens[:, 1:] != 1
    found = {}
    for way, y in new.items():
        y = torch.where(written[..., None], y, x)
        handle = module.register_forward_hook(lambda _m, _a, _y, y=y: y)
        logits = network(tokens)
        handle.remove()
        loss = functional.cross_entropy(
            logits[:, :-1].reshape(-1, 50), tokens[:, 1:].reshape(-1), reduction="none"
        ).reshape(targets.shape)
        p, q = intact.log_softmax(-1), logits.log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)[tokens != 1]
        same = (intact.argmax(-1) == logits.argmax(-1))[tokens != 1]
        found[way] = [loss[targets].mean(), kl.mean(), same.double().mean()]
    rows, back = x[written], new["spliced"][written]
    left = (rows - back).square().sum(1)
    total = (rows - rows.mean(0)).square().sum(1)
    found["fvu"] = left.sum() / total.sum()
    found["median"] = (left / total).median()
    found["codes"] = sae.encode(rows) != 0
    return found


@torch.no_grad()
def test_every_figure_is_that_of_a_plain_computation():
    network, sae = Reader(), dictionary()
    written = (TOKENS != 1) & (TOKENS != 0)
    found = evaluate(sae, network=network, samples=SAMPLES, site="embed", batch_size=7)
    expected = by_hand(network, sae, TOKENS, written, "embed")
    for way in ("intact", "spliced", "zero_ablated", "mean_ablated"):
        effect = getattr(found, way)
        values = [effect.loss.value, effect.kl_divergence.value, effect.agreement.value]
        assert values == pytest.approx([float(v) for v in expected[way]], abs=2e-6), way
    zero, spliced, intact = (float(expected[w][0]) for w in ("zero_ablated", "spliced", "intact"))
    assert found.loss_recovered is not None
    assert found.loss_recovered.value == pytest.approx((zero - spliced) / (zero - intact), rel=1e-3)
    assert found.fvu.value == pytest.approx(float(expected["fvu"]), rel=1e-5)
    codes = expected["codes"]
    assert found.rows == int(written.sum()) == len(codes)
    assert found.l0.value == pytest.approx(float(codes.double().sum(1).mean()))
    assert found.dead_share.value == pytest.approx(float((~codes.any(0)).double().mean()))
    assert sum(b.share.value for b in found.density) == pytest.approx(1)
    density = codes.double().mean(0).numpy()
    for b in found.density[2:]:
        inside = (density >= b.low * (1 - 1e-9)) & (density < b.high * (1 - 1e-9))
        assert b.share.value == pytest.approx(inside.mean()) or b.low == b.high == 1
    assert found.left_out["padding"] == int((TOKENS == 1).sum())
    for e in (found.fvu, found.l0, found.loss_recovered, found.spliced.kl_divergence):
        assert e.low <= e.value <= e.high
        assert e.n == 24


@torch.no_grad()
def test_left_out_positions_can_be_written_too():
    network, sae = Reader(), dictionary()
    positions = Positions(keep_special=True, skip_first=0)
    found = evaluate(sae, network=network, samples=SAMPLES, site="block", positions=positions)
    expected = by_hand(network, sae, TOKENS, TOKENS != 1, "block")
    assert found.spliced.loss.value == pytest.approx(float(expected["spliced"][0]), abs=2e-6)
    assert found.fvu.value == pytest.approx(float(expected["fvu"]), rel=1e-5)
    assert found.fvu_median.value == pytest.approx(float(expected["median"]), rel=0.05)


def test_outlier_rows_stay_as_they_are_and_have_a_figure_of_their_own():
    samples = Windows(n=60, length=12, seed=3)
    samples.tokens[::9, 2] = 7
    network, sae = Reader(sink=7), dictionary()
    found = evaluate(sae, network=network, samples=samples, site="block")
    everything = evaluate(
        sae, network=network, samples=samples, site="block", outlier_norms=float("inf")
    )
    assert found.outlier_rows > 0 == everything.outlier_rows
    assert found.rows + found.outlier_rows == everything.rows
    assert found.fvu_with_outliers.value != pytest.approx(found.fvu.value, rel=0.01)
    assert "outlier rows" in repr(found)


def test_the_intact_site_costs_nothing_and_the_reconstruction_of_a_perfect_dictionary_neither():
    class Identity:
        d_in = n_latents = 8

        def encode(self, x):
            return x

        def decode(self, code):
            return code

    found = evaluate(Identity(), network=Reader(), samples=SAMPLES, site="block")
    assert found.intact.kl_divergence.value == found.spliced.kl_divergence.value == 0
    assert found.spliced.agreement.value == 1
    assert found.loss_recovered.value == found.loss_recovered_from_mean.value == 1
    assert found.fvu.value == 0


def test_a_classifier_is_measured_by_its_labels_or_without():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 25, 4))
    x, labels = torch.randn(30, 3, 7, 7), np.arange(30) % 4
    sae = dictionary()
    found = evaluate(sae, network=network, samples=x, site="1")
    assert found.loss_recovered is None
    assert found.intact.loss is None
    assert found.rows == 30 * 25
    found = evaluate(sae, network=network, samples=x, site="1", labels=labels)
    with torch.no_grad():
        loss = functional.cross_entropy(network(x), torch.from_numpy(labels))
        y = network[:2](x).movedim(1, -1).reshape(-1, 8)
        new = sae.decode(sae.encode(y)).reshape(30, 5, 5, 8).movedim(-1, 1)
        spliced = functional.cross_entropy(network[2:](new), torch.from_numpy(labels))
    assert found.intact.loss.value == pytest.approx(float(loss), abs=1e-5)
    assert found.spliced.loss.value == pytest.approx(float(spliced), abs=1e-5)


def test_a_network_that_reads_both_ways_predicts_no_next_token():
    found = evaluate(dictionary(), network=Reader(causal=False), samples=SAMPLES, site="block")
    assert found.intact.loss is None
    assert found.left_out["first"] == 0


def test_what_cannot_be_evaluated_is_refused_in_a_sentence():
    class Trunk(Reader):
        def forward(self, tokens):
            return {"last_hidden_state": super().forward(tokens)}

    with pytest.raises(InputError, match="returns no logits"):
        evaluate(dictionary(), network=Trunk(), samples=SAMPLES, site="block")
    with pytest.raises(InputError, match="Site block is 8 wide, the dictionary reads 9"):
        evaluate(dictionary(9), network=Reader(), samples=SAMPLES, site="block")
    other = Transcoder(d_in=8, d_out=7, n_latents=20, sparsity=TopK(k=3))
    with pytest.raises(InputError, match="reads 8 and writes 7"):
        evaluate(other, network=Reader(), samples=SAMPLES, site="block")


def test_the_network_is_left_as_it_was():
    network = Reader()
    before = network(TOKENS)
    evaluate(dictionary(), network=network, samples=SAMPLES, site="block")
    assert torch.equal(network(TOKENS), before)
    assert not network.block._forward_hooks


def test_the_interval_of_the_dead_share_holds_the_share_that_is_expected():
    random, held = np.random.default_rng(0), []
    rates = random.uniform(0.002, 0.2, 400)
    expected = float(np.mean((1 - rates) ** 60))  # on 60 samples of one row
    for seed in range(40):
        active = (random.random((60, 400)) < rates).astype(np.int64)
        dead, density = module._densities(active, np.ones(60), resample(60, seed=seed))
        assert dead.value == (~active.any(axis=0)).mean()
        assert all(b.share.low <= b.share.value <= b.share.high for b in density)
        held.append(dead.low <= expected <= dead.high)
    assert np.mean(held) > 0.85
