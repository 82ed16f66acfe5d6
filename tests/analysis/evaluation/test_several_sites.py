"""Worth of dictionaries of several sites, against a plain computation in float64."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from mechatlas.activations.positions import Positions
from mechatlas.analysis.evaluation import evaluate as module
from mechatlas.base import InputError
from mechatlas.dictionaries.autoencoder import Crosscoder, Transcoder
from mechatlas.dictionaries.pretrained import CrossLayerDictionary, Pretrained
from mechatlas.dictionaries.sparsity import ReLU, TopK
from tests.networks import Layered, Windows, cross_layer

evaluate: Any = module.evaluate
SAMPLES = Windows(n=12, length=8)
TOKENS = torch.from_numpy(SAMPLES.tokens)
EVERY = Positions(keep_special=True, skip_first=0)
READS = ["layers.0.mlp:input", "layers.1.mlp:input", "layers.2.mlp:input"]
WRITES = ["layers.0.mlp", "layers.1.mlp", "layers.2.mlp"]


def loss_of(logits, written):
    targets = TOKENS[:, 1:] != 1
    loss = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="none"
    )
    return float(loss.reshape(targets.shape)[targets].mean())


def divergence(intact, logits):
    p, q = intact.log_softmax(-1), logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1)[TOKENS != 1].mean())


@torch.no_grad()
def test_a_cross_layer_transcoder_takes_the_place_of_the_modules_that_it_writes():
    network: Any = Layered().double()
    clt: Any = cross_layer()
    written = TOKENS != 1
    x = network.embed(TOKENS)
    codes, outs, intact = [], [], x
    for i, layer in enumerate(network.layers):
        x, intact = layer.mix(x), layer.mix(intact)
        own = clt.layers[i]
        codes.append((x @ own.W_enc.double() + own.b_enc.double()).relu())
        new = torch.zeros_like(x)
        for j in range(i + 1):  # each layer's contribution to this one
            at = (i - j) * 8
            atoms, bias = clt.layers[j].W_dec[:, at : at + 8], clt.layers[j].b_dec[at : at + 8]
            new = new + codes[j] @ atoms.double() + bias.double()
        outs.append(new)
        x = x + torch.where(written[..., None], new, layer.mlp(x))
        intact = intact + layer.mlp(intact)
    intact, spliced = network.head(intact), network.head(x)
    torch.testing.assert_close(intact, network(TOKENS))
    found = evaluate(
        clt, network=Layered(), samples=SAMPLES, site=[*READS, *WRITES], positions=EVERY,
        outlier_norms=float("inf"), batch_size=5,
    )  # fmt: skip
    assert found.spliced.loss.value == pytest.approx(loss_of(spliced, written), abs=2e-6)
    kl = found.spliced.kl_divergence.value
    assert kl == pytest.approx(divergence(intact, spliced), abs=2e-6)
    assert kl > 1e-3
    assert list(found.fvu_by_site) == WRITES
    assert "fvu by site: layers.0.mlp" in repr(found)


@torch.no_grad()
def test_the_error_of_each_site_is_that_of_the_intact_network():
    network, clt = Layered(), cross_layer()
    seen = {}
    for name in ("0", "1", "2"):
        mlp = network.get_submodule(f"layers.{name}.mlp")
        mlp.register_forward_hook(lambda _m, args, out, n=name: seen.update({n: (args[0], out)}))
    network(TOKENS)
    written = TOKENS != 1
    x = torch.cat([seen[name][0][written] for name in seen], dim=1).double()
    target = torch.cat([seen[name][1][written] for name in seen], dim=1).double()
    off = (target - clt.double()(x)).square()
    total = (target - target.mean(dim=0)).square()
    found = evaluate(
        cross_layer(), network=Layered(), samples=SAMPLES, site=[*READS, *WRITES],
        positions=EVERY, outlier_norms=float("inf"),
    )  # fmt: skip
    assert found.fvu.value == pytest.approx(float(off.sum() / total.sum()), rel=1e-5)
    for i, each in enumerate(found.fvu_by_site.values()):
        own = slice(8 * i, 8 * i + 8)
        expected = float(off[:, own].sum() / total[:, own].sum())
        assert each.value == pytest.approx(expected, rel=1e-5)
    assert found.l0.value == pytest.approx(float((clt.encode(x) != 0).double().sum(1).mean()))


@torch.no_grad()
def test_a_crosscoder_writes_all_its_sites_from_the_intact_network():
    sites = ["layers.0", "layers.2"]
    coder = Crosscoder(widths=dict.fromkeys(sites, 8), n_latents=20, sparsity=TopK(k=3))
    found = evaluate(
        coder, network=Layered(), samples=SAMPLES, positions=EVERY, outlier_norms=float("inf")
    )
    network = Layered().double()
    rows = {}
    for site in sites:
        network.get_submodule(site).register_forward_hook(
            lambda _m, _a, out, s=site: rows.update({s: out})
        )
    network(TOKENS)
    x = torch.cat([rows[site] for site in sites], dim=-1)
    new = coder.double()(x.flatten(0, 1)).unflatten(0, TOKENS.shape)
    last = torch.where((TOKENS != 1)[..., None], new[..., 8:], x[..., 8:])
    expected = loss_of(network.head(last), TOKENS != 1)  # what is written last covers the rest
    assert found.spliced.loss.value == pytest.approx(expected, abs=2e-6)
    assert list(found.fvu_by_site) == sites


@torch.no_grad()
def test_a_transcoder_is_written_where_it_writes_with_its_skip_connection():
    given: dict[str, Any] = {
        "W_enc": torch.randn(8, 12),
        "b_enc": torch.zeros(12),
        "W_dec": torch.randn(12, 8),
    }
    coder = Pretrained(
        **given, b_dec=torch.randn(8), sparsity=ReLU(), subtracts_b_dec=False, transcodes=True,
        W_skip=torch.randn(8, 8), site="layers.1.mlp:input",
        metadata={"hook_name_out": "layers.1.mlp"},
    )  # fmt: skip
    network: Any = Layered()
    found = evaluate(
        coder, network=network, samples=SAMPLES, positions=EVERY, outlier_norms=float("inf")
    )
    network.layers[1].mlp.register_forward_hook(
        lambda _m, args, out: torch.where(
            (TOKENS != 1)[..., None], coder(args[0].flatten(0, 1)).view_as(out), out
        )
    )
    assert found.spliced.loss.value == pytest.approx(loss_of(network(TOKENS), None), abs=1e-5)
    own = Transcoder(d_in=8, d_out=8, n_latents=12, sparsity=TopK(k=2))
    with pytest.raises(InputError, match="reads 8 and writes 8: give 2 sites in this order"):
        evaluate(own, network=network, samples=SAMPLES, site="layers.1.mlp")
    with pytest.raises(InputError, match="does not say of which site"):
        evaluate(own, network=network, samples=SAMPLES)


def test_sites_that_do_not_fit_are_refused_in_a_sentence():
    clt = cross_layer()
    for sites, said in (
        (["layers.0"], r"24 \(3 sites side by side: in\.0.* and writes out\.0.*6 sites"),
        ([*READS[::-1], *WRITES], "reaches layers.0.mlp, .* before layers.2.mlp:input"),
        ([*READS, *WRITES[:2], "head"], "Site head is 50 wide, .* at this site 8"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            evaluate(clt, network=Layered(), samples=SAMPLES, site=sites)
    assert isinstance(clt, CrossLayerDictionary)
    assert isinstance(clt.layers[0], nn.Module)
