"""Circuits of dictionaries of several sites, against plain autograd and ablation in float64."""

import numpy as np
import pytest
import torch

from mechatlas.analysis.circuits.circuit import circuit
from mechatlas.analysis.circuits.direct import DirectCircuit
from mechatlas.base import InputError
from mechatlas.dictionaries.autoencoder import Autoencoder, Crosscoder
from mechatlas.dictionaries.sparsity import TopK
from tests.dictionaries.golden import read_published
from tests.networks import Layered, Windows, cross_layer

TOKENS = torch.from_numpy(Windows(n=20, length=8).tokens)
KNOWN, UNSEEN = TOKENS[:12], TOKENS[12:]
READS = [f"layers.{i}.mlp:input" for i in range(3)]
WRITES = [f"layers.{i}.mlp" for i in range(3)]


def by_hand(network, clt, tokens, removed=None):
    """Pre-activations of all layers, and codes that act on them with all else held.

    The network is causal, so that no latent counts as active at the first token.
    """
    held, codes = network.embed(tokens), []
    outs = []
    with torch.no_grad():
        for layer, own in zip(network.layers, clt.layers, strict=True):
            held = layer.mix(held)
            codes.append((held @ own.W_enc + own.b_enc).relu())
            outs.append(layer.mlp(held))
            held = held + outs[-1]
    leaves = [code.clone() for code in codes]
    if removed is not None:
        leaves[removed // 12][:, 1:, removed % 12] = 0
    leaves = [leaf.requires_grad_(removed is None) for leaf in leaves]
    x, pre = network.embed(tokens).detach(), []
    for i, layer in enumerate(network.layers):
        x = layer.mix(x)
        pre.append(x @ clt.layers[i].W_enc + clt.layers[i].b_enc)
        x = x + outs[i]
        for j in range(i + 1):
            own = slice(8 * (i - j), 8 * (i - j) + 8)
            x = x + (leaves[j] - codes[j]) @ clt.layers[j].W_dec[:, own]
    return torch.cat(pre, dim=-1), leaves


@pytest.fixture(scope="module")
def found():
    network, clt = Layered().double(), cross_layer(dtype=torch.float64)
    return circuit(
        network, clt, clt, KNOWN, held_out=UNSEEN, site_a=[*READS, *WRITES],
        site_b=[*READS, *WRITES], top_k_sources=36, n_ablated=12, batch_size=5,
    )  # fmt: skip


def test_contributions_and_weights_are_derivatives_with_everything_else_held(found):
    network, clt = Layered().double(), cross_layer(dtype=torch.float64)
    pre, leaves = by_hand(network, clt, KNOWN)
    edges = found.edges
    assert isinstance(found, DirectCircuit)
    assert found.routes == tuple(WRITES)
    targets = np.unique(edges.target)
    assert len(targets) >= 12
    assert targets.min() >= 12, "nothing comes before the first layer"
    later = torch.arange(8) > 0
    for target in targets[::4]:
        on = (pre[..., target] > 0) & later
        for weights, way in ((on / on.sum(), "contribution"), (torch.ones_like(on), "weight")):
            loss = (pre[..., target] * weights).sum()
            slopes = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(leaf) if g is None else g * leaf
                     for g, leaf in zip(slopes, leaves, strict=True)]  # fmt: skip
            expected = torch.cat(parts, dim=-1)[:, 1:].sum(dim=(0, 1))
            if way == "weight":
                expected = expected / torch.cat(leaves, dim=-1)[:, 1:].sum(dim=(0, 1)).clamp_min(
                    1e-30
                )
            ours = np.zeros(36)
            own = edges.target == target
            np.add.at(ours, edges.source[own], getattr(edges, way)[own])
            np.testing.assert_allclose(ours[ours != 0], expected.detach().numpy()[ours != 0], 1e-5)
            assert (ours != 0).sum() >= 10


def test_a_route_is_what_a_latent_writes_at_one_site(found):
    edges = found.edges
    layer = edges.source // 12
    assert (edges.contribution[edges.route < layer] == 0).all(), "a layer writes itself and later"
    assert (edges.contribution[edges.route >= edges.target // 12] == 0).all()
    both = edges.contribution[(layer == 0) & (edges.target >= 24) & (edges.route < 2)]
    assert (both != 0).mean() > 0.9, "a latent reaches the last layer from both sites before it"


@torch.no_grad()
def test_ablations_hold_all_other_latents(found):
    network, clt = Layered().double(), cross_layer(dtype=torch.float64)
    intact, _ = by_hand(network, clt, UNSEEN)
    assert found.evidence.n_ablated == 12
    assert found.ablation.lost.shape[1] == len(UNSEEN)
    for row, source in enumerate(found.ablation.sources[:6]):
        after, _ = by_hand(network, clt, UNSEEN, removed=int(source))
        lost = found.ablation.lost[row] @ found.encoder
        expected = (intact - after).mean(dim=1).numpy()
        np.testing.assert_allclose(lost, expected, atol=1e-7)
    assert found.evidence.agreement.spearman > 0.95
    assert found.evidence.agreement.null_high < 0.3
    assert found.evidence.agreement.pairs < 12 * len(found.targets)
    assert "12 ablations: rank correlation" in repr(found)


def test_kinds_may_be_mixed_and_a_crosscoder_acts_from_its_last_site():
    network = Layered()
    a = Crosscoder(widths={"layers.0": 8, "layers.1": 8}, n_latents=16, sparsity=TopK(k=4))
    b = Autoencoder(d_in=8, n_latents=16, sparsity=TopK(k=4), seed=1)
    found = circuit(network, a, b, TOKENS, site_b="layers.2", n_targets=5)
    assert isinstance(found, DirectCircuit)
    assert len(found.targets) <= 5
    assert found.evidence is None
    by_route = [np.abs(found.edges.contribution[found.edges.route == k]).sum() for k in (0, 1)]
    assert by_route[0] == 0 < by_route[1], "what is written at layers.1 covers layers.0"


def test_what_cannot_be_is_refused_in_a_sentence():
    network, clt = Layered(), cross_layer()
    autoencoder = Autoencoder(d_in=8, n_latents=16, sparsity=TopK(k=4))
    sites = [*READS, *WRITES]
    with pytest.raises(InputError, match=r"Nothing that the later .*\(embed\) follows"):
        circuit(network, clt, autoencoder, TOKENS, site_a=sites, site_b="embed")
    with pytest.raises(InputError, match=r"reads 24 .* give 6 sites in this order, got layers.0"):
        circuit(network, clt, autoencoder, TOKENS, site_a="layers.0", site_b="embed")
    opens = read_published("llamascopium_crosscoder_jumprelu")
    names = ["layers.0", "layers.1", "layers.2"]
    with pytest.raises(InputError, match="opens its latents site by site"):
        circuit(network, opens, opens, TOKENS, site_a=names, site_b=names)


@pytest.mark.parametrize("n_ablated", [0, 4])
def test_dictionaries_with_no_active_latent_are_refused(n_ablated):
    network = Layered().double()
    live, dead = (cross_layer(dtype=torch.float64) for _ in range(2))
    for layer in dead.layers:
        assert isinstance(layer.b_enc, torch.Tensor)
        layer.b_enc.data -= 1e6
    sites = [*READS, *WRITES]
    for a, b, which in ((live, dead, "later"), (dead, live, "earlier")):
        with pytest.raises(InputError, match=f"No latent of the {which} .* 10 positions"):
            circuit(
                network, a, b, KNOWN, held_out=UNSEEN, site_a=sites, site_b=sites,
                n_ablated=n_ablated,
            )  # fmt: skip
