from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mechatlas.activations.sites import read_activations
from mechatlas.analysis.matching.held_out import Estimate, baselines
from mechatlas.analysis.matching.pairing import match
from mechatlas.analysis.matching.splicing import permuted, references, splice
from mechatlas.app import estimates
from mechatlas.app.match_quality import (
    HeldSamples,
    Pairing,
    effects_on_output,
    seconds_of_effects,
)
from mechatlas.base import InputError, Site
from tests import language_models


def value(estimate: Estimate | None) -> float:
    assert estimate is not None
    return estimate.value


def rotation(seed) -> Any:
    """A dictionary that loses nothing: an orthogonal basis, in some order."""
    q = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(seed)))[0]
    return SimpleNamespace(
        d_in=6, n_latents=6, q=q, encode=lambda x: x @ q, decode=lambda code: code @ q.T
    )


def reordered(one, order) -> Any:
    """The same with its latents in another order."""
    return SimpleNamespace(
        d_in=6, n_latents=6, encode=lambda x: one.encode(x)[:, order],
        decode=lambda code: one.decode(code[:, np.argsort(order)]),
    )  # fmt: skip


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Identity(), nn.Linear(6, 3)).eval()


BATCHES = list(torch.randn(40, 4, generator=torch.Generator().manual_seed(1)).split(16))
FIRST, SECOND = Site("0"), Site("1")


@pytest.mark.parametrize("sites", [(FIRST, SECOND), (FIRST, FIRST)])
def test_the_right_pairing_changes_nothing_and_a_wrong_one_does(network, sites):
    a = rotation(0)
    order = np.random.default_rng(0).permutation(6)
    b = reordered(a, order)
    right = np.argsort(order)
    found = splice(
        network, BATCHES, sites,
        {"right": permuted(a, b, right), "wrong": permuted(a, b, np.roll(right, 1))},
    )  # fmt: skip
    assert found["right"].variance_lost.value == pytest.approx(0, abs=1e-7)
    assert value(found["right"].kl_divergence) == pytest.approx(0, abs=1e-7)
    assert value(found["right"].agreement) == 1
    assert found["wrong"].variance_lost.value > 0.3
    assert value(found["wrong"].kl_divergence) > 0.01
    assert found["wrong"].variance_lost.n == 40


def test_activations_are_rescaled_and_latents_without_partner_are_dropped(network):
    a = rotation(0)
    doubled: Any = SimpleNamespace(**{**vars(a), "decode": lambda code: a.decode(code / 2)})
    columns = np.arange(6)
    x = torch.randn(5, 6)
    assert torch.allclose(permuted(a, doubled, columns, np.full(6, 2.0))(x, x), x, atol=1e-5)
    columns[2] = -1
    without = a.encode(x)
    without[:, 2] = 0
    assert torch.allclose(permuted(a, a, columns)(x, x), a.decode(without), atol=1e-5)


def test_divergence_is_the_rise_of_the_cross_entropy_with_the_untouched_answer(network):
    x = torch.cat(BATCHES)
    ways = references(rotation(0), rotation(0))
    found = splice(network, [x], (FIRST, SECOND), ways)
    assert found["layer_drop"].variance_lost.value == 0
    assert value(found["b_reconstruction"].kl_divergence) == pytest.approx(0, abs=1e-7)
    clean = network(x)
    mean = network[2](network[0](x).mean(dim=0))
    p = clean.softmax(-1)
    rise = (p * clean.log_softmax(-1)).sum(-1) - (p * mean.log_softmax(-1)).sum(-1)
    assert value(found["b_mean"].kl_divergence) == pytest.approx(
        float(rise.mean().detach()), rel=1e-4
    )
    assert found["b_mean"].variance_lost.value == pytest.approx(1, abs=1e-5)


def test_a_smaller_map_is_written_from_the_cells_at_its_centres():
    network = nn.Sequential(nn.Identity(), nn.MaxPool2d(3, stride=3), nn.Flatten())
    x = torch.randn(4, 6, 9, 9)
    layer_drop = {"drop": references(rotation(0), rotation(0))["layer_drop"]}
    found = splice(network, [x], (Site("0"), Site("1")), layer_drop)
    centres = x[:, :, 1::3, 1::3].flatten(1)
    clean = network(x)
    lost = (centres - clean).square().sum() / (clean - clean.mean(dim=0)).square().sum()
    assert found["drop"].variance_lost.value == pytest.approx(float(lost), rel=1e-4)


def test_hidden_states_are_no_logits():
    class States(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 6)

        def forward(self, tokens):
            return {"last_hidden_state": self.embed(tokens)}

    found = splice(
        States().eval(), [torch.arange(8).view(2, 4)], (Site("embed"), Site("embed")),
        {"same": references(rotation(1), rotation(1))["b_reconstruction"]},
    )["same"]  # fmt: skip
    assert found.kl_divergence is None
    assert found.agreement is None
    assert found.variance_lost.value == pytest.approx(0, abs=1e-7)


def test_sites_in_the_wrong_order_are_refused_and_the_network_is_left_as_it_was(network):
    ways = {"any": permuted(rotation(0), rotation(0), np.arange(6))}
    before = read_activations(network, BATCHES[0], [SECOND])[SECOND]
    with pytest.raises(InputError, match="reaches 0 before 1"):
        splice(network, BATCHES, (SECOND, FIRST), ways)
    with pytest.raises(InputError, match="no samples"):
        splice(network, [], (FIRST, SECOND), ways)
    assert torch.equal(read_activations(network, BATCHES[0], [SECOND])[SECOND], before)


def test_change_of_next_token_loss_is_that_of_a_plain_computation():
    """Own hooks on GPT-2, one sample at a time, with rows that are left out and padding."""
    network = language_models.model("gpt2")
    network.lm_head.weight.data *= 20  # predictions that differ
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 258, (6, 9), generator=draw)
    left_out = torch.zeros(6, 9, dtype=torch.bool)
    left_out[:, 0] = True
    padding = torch.zeros_like(left_out)
    padding[4, 6:] = True
    q, r = (torch.linalg.qr(torch.randn(16, 16, generator=draw))[0] for _ in "12")

    def thresholded(basis: torch.Tensor) -> Any:
        return SimpleNamespace(
            d_in=16,
            n_latents=16,
            encode=lambda x: (x @ basis).relu(),
            decode=lambda code: code @ basis.T,
        )

    a, b = thresholded(q), thresholded(r)
    columns = np.roll(np.arange(16), 1)
    columns[3] = -1
    ways = {"match": permuted(a, b, columns), **references(a, b)}
    found = splice(
        network,
        tokens.split(4),
        (Site("transformer.h.0"), Site("transformer.h.1")),
        ways,
        left_out=[part.numpy() for part in (left_out | padding).split(4)],
        padding=[part.numpy() for part in padding.split(4)],
    )
    first, second = network.transformer.h

    def loss(sample: int, way: str | None) -> tuple[float, int]:
        seen: list[torch.Tensor] = []
        alone = tokens[sample : sample + 1, : 6 if padding[sample].any() else 9]

        def remember(_module, _inputs, output):
            seen.append((output if isinstance(output, torch.Tensor) else output[0])[0].clone())

        def patch(_module, _inputs, output):
            y = (output if isinstance(output, torch.Tensor) else output[0]).clone()
            for place in range(1, y.shape[1]):
                x = seen[0][place]
                if way == "match":
                    code = torch.zeros(16)
                    for latent, partner in enumerate(columns):
                        if partner >= 0:
                            code[partner] += (x @ q)[latent].relu()
                    y[0, place] = r @ code
                elif way == "layer_drop":
                    y[0, place] = x
                else:
                    y[0, place] = r @ (y[0, place] @ r).relu()
            return y if isinstance(output, torch.Tensor) else (y, *output[1:])

        hooks = [first.register_forward_hook(remember)]
        hooks += [second.register_forward_hook(patch)] if way else []
        with torch.no_grad():
            logits = network(alone).logits[0]
        for hook in hooks:
            hook.remove()
        terms = [-logits[t].log_softmax(-1)[alone[0, t + 1]] for t in range(alone.shape[1] - 1)]
        return float(sum(terms)), len(terms)

    for way in ("match", "layer_drop", "b_reconstruction"):
        rises = [loss(i, way)[0] - loss(i, None)[0] for i in range(6)]
        expected = sum(rises) / sum(loss(i, None)[1] for i in range(6))
        assert value(found[way].loss_change) == pytest.approx(expected, abs=1e-5), way
        assert abs(expected) > 1e-3


def test_how_long_it_takes_is_known_after_a_few_replacements(network, monkeypatch):
    calls = []
    network.register_forward_hook(lambda *_: calls.append(None))
    monkeypatch.setattr(estimates.time, "perf_counter", lambda: float(len(calls)))  # one a second
    held = HeldSamples(network, 10 * BATCHES, [], [])
    a = rotation(0)
    seconds = seconds_of_effects(held, (FIRST, SECOND), (a, a))
    assert len(calls) < 6
    rows = np.random.default_rng(0).normal(size=(20, 6))
    names = ["matched", *baselines(rows, rows, match(rows, rows))]
    ways = dict.fromkeys(names, Pairing(np.arange(6), np.ones(6)))
    calls.clear()
    assert effects_on_output(held, ("0", "1"), a, a, ways, seed=0).spliced is not None
    assert seconds == pytest.approx(len(calls), rel=0.1)
    assert seconds_of_effects("there is no network", (FIRST, SECOND), (a, a)) == 0
