"""Circuits through layers of decoders: gated MLPs, RMSNorm, rotary attention, shared keys."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mechatlas as ma
from mechatlas.activations.sites import as_site, read_activations
from mechatlas.analysis.circuits import attention
from mechatlas.analysis.circuits.attention import record_layer
from mechatlas.analysis.circuits.circuit import circuit
from mechatlas.analysis.circuits.decoder_layer import DecoderLayer
from mechatlas.analysis.circuits.effects import ablate, ablation_agreement, reproduced_variance
from mechatlas.analysis.circuits.layer_parts import as_maps
from mechatlas.analysis.circuits.transformer_layer import connect
from mechatlas.analysis.circuits.virtual_weights import compose_responses, pair_blocks
from mechatlas.analysis.circuits.wiring import Masked
from mechatlas.base import SiteError
from tests.analysis.circuits.small import Linear
from tests.language_models import model, smollm2

DECODERS = ["llama", "gemma2", "gemma3", "qwen3"]
WIDTH = 16
EARLIER, LATER = "model.layers.0", "model.layers.1"


def decoder(name: str, std: float | None = None) -> Any:
    """A small model; with large weights if a deviation is given, so that nothing is nearly zero."""
    network = model(name)
    network.set_attn_implementation("eager")  # gives its attention patterns
    if std is not None:
        torch.manual_seed(3)
        for key, weight in network.named_parameters():
            if weight.ndim == 2 and "embed" not in key:
                nn.init.normal_(weight, std=std)
    return network


def tokens(n: int, length: int) -> Tensor:
    return torch.randint(0, 256, (n, length), generator=torch.Generator().manual_seed(1))


def layer_of(network: nn.Module, ids: Tensor) -> tuple[DecoderLayer, Tensor]:
    a, b = (as_site(network, site) for site in (EARLIER, LATER))
    layer = connect(network, a, b, ids[:2])
    assert isinstance(layer, DecoderLayer)
    with torch.no_grad():
        return layer, as_maps(read_activations(network, ids, [EARLIER])[EARLIER])


@pytest.mark.parametrize("name", DECODERS)
def test_patterns_are_those_that_the_network_gives(name):
    network, ids = decoder(name, 0.25), tokens(5, 11)
    layer, maps = layer_of(network, ids)
    found = layer.pattern(maps[:, :, 0].transpose(1, 2))
    assert not any(module._forward_hooks for module in network.modules())
    with torch.no_grad():
        truth = network(ids, output_attentions=True).attentions[1]
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-6)


def held(block: Any, rows: Tensor, at: Tensor, pattern: Tensor) -> Tensor:
    """A layer on `rows`, with attention and normalization as they are on `at`."""
    is_gemma = "Gemma" in type(block).__name__

    def norm(part: Any, x: Tensor, there: Tensor) -> Tensor:
        eps = part.eps if is_gemma else part.variance_epsilon
        size = (there.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
        return x * size * (1 + part.weight if is_gemma else part.weight)

    def attend(x: Tensor) -> Tensor:
        values = block.self_attn.v_proj(x).unflatten(-1, (2, -1)).repeat_interleave(2, dim=-2)
        return block.self_attn.o_proj(torch.einsum("hqk,khc->qhc", pattern, values).flatten(1))

    first = block.input_layernorm
    taken, there = attend(norm(first, rows, at)), attend(norm(first, at, at))
    second = block.post_attention_layernorm
    if is_gemma:
        taken, there = norm(second, taken, there), norm(second, there, there)
        second = block.pre_feedforward_layernorm
    rows, at = rows + taken, at + there
    written, there = block.mlp(norm(second, rows, at)), block.mlp(norm(second, at, at))
    if is_gemma:
        written = norm(block.post_feedforward_layernorm, written, there)
    return rows + written


@pytest.mark.parametrize("name", DECODERS)
def test_weights_are_the_mean_derivative_of_the_layer_as_it_stands(name, monkeypatch):
    monkeypatch.setattr(attention, "PRIOR", 0.0)
    network, ids = decoder(name, 0.25), tokens(3, 7)
    layer, maps = layer_of(network, ids)
    a = Linear(WIDTH, 9, seed=2, dtype=torch.float32)
    b = Linear(WIDTH, 7, seed=3, dtype=torch.float32)
    recording = record_layer(layer, a, b, [maps[:2], maps[2:]])
    block, rows = network.get_submodule(LATER), maps[:, :, 0].transpose(1, 2)
    with torch.no_grad():
        patterns = network(ids, output_attentions=True).attentions[1]
    slopes = []
    for row, pattern in zip(rows, patterns, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(
                held(block, row, row, pattern), layer.repeat(row[None])[0], rtol=1e-4, atol=1e-4
            )
        slopes.append(
            torch.autograd.functional.jacobian(
                lambda x, row=row, pattern=pattern: held(block, x, row, pattern), row
            )
        )
    code = torch.from_numpy(recording.codes_a.toarray()).view(3, 7, 9)
    slope = torch.stack(slopes)
    mean = torch.einsum("nqcsd,nsj,jd->jc", slope, code, a.W_dec) / code.sum(dim=(0, 1))[:, None]
    found = compose_responses(layer, a, recording.gates)
    weights = next(pair_blocks(layer, found, b.W_enc, recording)).weight.sum(axis=0)
    torch.testing.assert_close(torch.from_numpy(weights), (mean @ b.W_enc).T, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", DECODERS)
def test_weights_rank_like_ablations(name):
    network, ids = decoder(name), tokens(64, 12)
    layer, maps = layer_of(network, ids)
    a = Linear(WIDTH, 24, seed=4, dtype=torch.float32)
    b = Linear(WIDTH, 30, seed=5, dtype=torch.float32)
    recording = record_layer(layer, a, b, maps[:32].split(8))
    removed = ablate(layer, a, maps[32:].split(8), np.arange(24))
    block = next(pair_blocks(layer, compose_responses(layer, a, recording.gates), b.W_enc))
    predicted = block.weight.sum(axis=0).T * removed.mean[:, None]
    found = ablation_agreement(predicted, removed.pre_activations(b.W_enc))
    assert found.spearman >= 0.9
    assert found.low > found.null_high
    assert found.other_high < found.low


def test_a_circuit_of_a_decoder_names_its_heads():
    network = decoder("llama")
    a, b = (Linear(WIDTH, 12, seed=seed, dtype=torch.float32) for seed in (4, 5))
    found = circuit(network, a, b, tokens(12, 8), site_a=EARLIER, site_b=LATER, n_ablated=6)
    heads = [f"head{k}" for k in range(4)]
    assert found.routes == ("direct", *heads, "mlp", *(f"{head} > mlp" for head in heads))
    assert found.evidence is not None
    assert found.evidence.agreement.spearman > 0.9


def test_no_feature_is_active_at_the_first_token_of_a_causal_model():
    network, ids = decoder("llama"), tokens(12, 8)
    a, b = (Linear(WIDTH, 12, seed=seed, dtype=torch.float32) for seed in (4, 5))
    found = circuit(network, a, b, ids, site_a=EARLIER, site_b=LATER, n_ablated=12)
    assert isinstance(found.connection, DecoderLayer)
    for codes in (found.recording.codes_a, found.recording.codes_b):
        active = codes.toarray().reshape(8, 8, 12) != 0
        assert not active[:, 0].any()
        assert active[:, 1:].any(axis=(1, 2)).all()
        assert codes.nnz == active.sum(), "zeros that are entries would count as activations"
    x = as_maps(read_activations(network, ids[8:], [EARLIER])[EARLIER])
    code = a.encode(x[:, :, 0, 1:].movedim(1, -1))
    first = (torch.arange(8) == 0).expand(4, -1)
    ablation = ablate(found.connection, a, [Masked(x, first)], np.arange(4))
    for source in range(4):
        less = x.clone()
        less[:, :, 0, 1:] -= (code[..., [source]] * a.W_dec[source]).movedim(-1, 1)
        with torch.no_grad():
            lost = (found.connection.run(x) - found.connection.run(less)).mean(dim=(2, 3))
        np.testing.assert_allclose(ablation.lost[source], lost.numpy(), atol=1e-5)


def test_rows_left_out_are_not_in_the_variance_that_kernels_reproduce():
    network, ids = decoder("llama"), tokens(12, 8)
    layer, x = layer_of(network, ids)
    a, b = (Linear(WIDTH, 12, seed=seed, dtype=torch.float32) for seed in (4, 5))
    left_out = torch.zeros(12, 8, dtype=torch.bool)
    left_out[:, 0] = left_out[3, 5:] = True
    batches = [Masked(x[:5], left_out[:5]), Masked(x[5:], left_out[5:])]
    recording = record_layer(layer, a, b, batches)
    responses = compose_responses(layer, a, recording.gates)
    found = reproduced_variance(layer, responses, a, b, batches)
    assert np.isfinite(found).all()
    wild = x.clone()  # later tokens change no earlier row
    wild[3, :, :, 5:] *= 300
    again = reproduced_variance(layer, responses, a, b, [Masked(wild, left_out)])
    np.testing.assert_allclose(again, found, atol=1e-5)
    everything = reproduced_variance(layer, responses, a, b, [x])
    assert np.abs(everything - found).max() > 1e-3


@pytest.mark.slow
def test_circuits_of_smollm2_rank_like_ablations():
    network = ma.load_network(ma.Network(name="transformer", arguments={"path": str(smollm2())}))
    ids = torch.randint(3, 40_000, (24, 24), generator=torch.Generator().manual_seed(1))
    a, b = (Linear(576, 64, seed=seed, dtype=torch.float32) for seed in (4, 5))
    found = circuit(
        network, a, b, ids, site_a="model.layers.10", site_b="model.layers.11", n_ablated=16
    )
    assert found.evidence is not None
    agreement = found.evidence.agreement
    assert agreement.spearman > 0.8
    assert agreement.low > agreement.null_high


def test_layers_of_experts_are_refused_by_their_maps():
    network = model("mixtral")
    a, b = (as_site(network, site) for site in (EARLIER, LATER))
    with pytest.raises(
        SiteError, match=r"self_attn\.o_proj 16 -> 16; circuits through transformers"
    ):
        connect(network, a, b, tokens(2, 8))
