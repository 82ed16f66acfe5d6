"""Weights through a layer of a transformer are its mean derivative, and rank like ablations."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu

from mechatlas.activations.sites import read_activations
from mechatlas.analysis.circuits import attention
from mechatlas.analysis.circuits.attention import record_layer
from mechatlas.analysis.circuits.effects import (
    ablate,
    ablation_agreement,
    attribute,
    reproduced_variance,
)
from mechatlas.analysis.circuits.layer_parts import as_maps
from mechatlas.analysis.circuits.transformer_layer import TransformerLayer, connect
from mechatlas.analysis.circuits.virtual_weights import (
    compose_responses,
    edge_kernels,
    pair_blocks,
    strongest_edges,
)
from mechatlas.base import Site, SiteError
from tests.analysis.circuits.small import Linear
from tests.analysis.circuits.transformers import A, B, Block, Small, small

ORDERS = ["before", "after", "none"]


def sequences(n: int, length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, length, 12, generator=torch.Generator().manual_seed(1)).to(dtype)


def layer_of(network: nn.Module, x: Tensor) -> tuple[TransformerLayer, Tensor]:
    layer = connect(network, A, B, x[:2])
    assert isinstance(layer, TransformerLayer)
    with torch.no_grad():
        return layer, as_maps(read_activations(network, x, [A])[A])


def held(network: Small, x: Tensor, at: Tensor) -> Tensor:
    """The second layer on `x`, with attention and normalisation as they are on `at`."""
    block = network.last

    def norm(part: nn.LayerNorm, rows: Tensor, there: Tensor) -> Tensor:
        size = (there.var(dim=-1, correction=0, keepdim=True) + part.eps).rsqrt()
        return (rows - rows.mean(dim=-1, keepdim=True)) * size * part.weight + part.bias

    def attend(rows: Tensor, there: Tensor) -> Tensor:
        made = block.attention.linear
        heads = block.attention.num_heads
        split = [[p for m in made for p in m(r).split(12, dim=-1)] for r in (rows, there)]
        q, k = (p.unflatten(-1, (heads, -1)).transpose(1, 2) for p in split[1][:2])
        v = split[0][2].unflatten(-1, (heads, -1)).transpose(1, 2)
        scores = q @ k.transpose(2, 3) / 2.0
        if block.attention.causal:
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
        taken = scores.softmax(-1) @ v
        return block.attention.out_proj(taken.transpose(1, 2).flatten(2))

    if block.order == "none":
        x, at = x + attend(x, at), at + attend(at, at)
        return x + block.mlp(x)
    if block.order == "before":
        given, there = norm(block.first, x, at), norm(block.first, at, at)
        x, at = x + attend(given, there), at + attend(there, there)
        return x + block.mlp(norm(block.second, x, at))
    x, at = x + attend(x, at), at + attend(at, at)
    x, at = norm(block.first, x, at), norm(block.first, at, at)
    x, at = x + block.mlp(x), at + block.mlp(at)
    return norm(block.second, x, at)


def slope_of(network: Small, row: Tensor) -> Float[Tensor, "query channel key channel"]:
    """The derivative of the second layer as it stands on one sample."""
    held_there = functools.partial(held, network, at=row[None])
    slope = torch.autograd.functional.jacobian(held_there, row[None])
    assert isinstance(slope, Tensor)
    return slope[0, :, :, 0]


@pytest.mark.parametrize("order", ORDERS)
def test_weights_are_the_mean_derivative_of_the_layer_as_it_stands(order, monkeypatch):
    monkeypatch.setattr(attention, "PRIOR", 0.0)
    network, x = small(order), sequences(3, 5)
    layer, maps = layer_of(network, x)
    a, b = Linear(12, 9, seed=2, dtype=torch.float64), Linear(12, 7, seed=3, dtype=torch.float64)
    recording = record_layer(layer, a, b, [maps[:2], maps[2:]])
    found = compose_responses(layer, a, recording.gates)
    rows = maps[:, :, 0].transpose(1, 2)
    torch.testing.assert_close(held(network, rows, rows), network.last(rows))
    slope = torch.stack([slope_of(network, row) for row in rows])
    code = torch.from_numpy(recording.codes_a.toarray()).double().view(3, 5, 9)
    mean = torch.einsum("nqcsd,nsj,jd->jc", slope, code, a.W_dec) / code.sum(dim=(0, 1))[:, None]
    block = next(pair_blocks(layer, found, b.W_enc, recording))
    torch.testing.assert_close(
        torch.from_numpy(block.weight.sum(axis=0)), (mean @ b.W_enc).T.float(), rtol=1e-4, atol=1e-5
    )


def test_the_routes_of_a_head_are_what_is_missing_without_it(monkeypatch):
    monkeypatch.setattr(attention, "PRIOR", 0.0)
    network, x = small("none"), sequences(1, 6)
    network.last.up.bias.data += 50  # all slopes are 1, with the head and without it
    layer, maps = layer_of(network, x)
    assert [route.name for route in layer.routes] == [
        "direct", "head0", "head1", "head2", "mlp", "head0 > mlp", "head1 > mlp", "head2 > mlp",
    ]  # fmt: skip
    a = Linear(12, 6, seed=2, dtype=torch.float64)
    found = compose_responses(layer, a, record_layer(layer, a, a, [maps]).gates)
    given = [r.values[0] * torch.as_tensor(total)[:, None]
             for r in found for _, total, _ in r.entries()]  # fmt: skip
    rows = maps[:, :, 0].transpose(1, 2)
    network.last.attention.out_proj.weight.data[:, 4:8] = 0  # nobody reads head1
    slope = slope_of(network, rows[0])
    code = a.encode(rows[0])
    mean = torch.einsum("qcsd,sj,jd->jc", slope, code, a.W_dec) / code.sum(dim=0)[:, None]
    on = code.sum(dim=0) > 0
    rest = torch.stack(given).sum(dim=0) - given[2] - given[6]
    torch.testing.assert_close(rest[on], mean[on], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("order", ORDERS)
def test_weights_rank_like_ablations(order, seed):
    network, x = small(order, seed, torch.float32), sequences(64, 12, torch.float32)
    layer, maps = layer_of(network, x)
    a, b = Linear(12, 24, seed=4, dtype=torch.float32), Linear(12, 30, seed=5, dtype=torch.float32)
    recording = record_layer(layer, a, b, maps[:32].split(8))
    removed = ablate(layer, a, maps[32:].split(8), np.arange(24))
    block = next(pair_blocks(layer, compose_responses(layer, a, recording.gates), b.W_enc))
    predicted = block.weight.sum(axis=0).T * removed.mean[:, None]
    found = ablation_agreement(predicted, removed.pre_activations(b.W_enc))
    assert found.spearman >= 0.9
    assert found.low > found.null_high
    assert found.other_high < found.low


@pytest.mark.parametrize("order", ORDERS)
def test_contributions_are_what_arrives_where_a_target_is_active(order):
    network, x = small(order, dtype=torch.float32), sequences(4, 20, torch.float32)
    layer, maps = layer_of(network, x)
    a, b = Linear(12, 8, seed=4, dtype=torch.float32), Linear(12, 70, seed=5, dtype=torch.float32)
    recording = record_layer(layer, a, b, maps.split(3))
    found = compose_responses(layer, a, recording.gates)
    whole = list(pair_blocks(layer, found, b.W_enc, recording))
    parts = list(pair_blocks(layer, found, b.W_enc, recording, block_bytes=1))
    assert len(whole) == 1 < len(parts)
    for name in ("weight", "norm", "contribution"):
        joined = np.concatenate([getattr(part, name) for part in parts], axis=1)
        np.testing.assert_allclose(joined, getattr(whole[0], name), rtol=1e-4, atol=1e-6)
    codes = recording.codes_a.toarray().reshape(4, 20, 8)
    on = recording.codes_b.toarray().reshape(4, 20, 70) > 0
    count = np.maximum(on.sum(axis=(0, 1)), 1)[:, None]
    pattern = recording.patterns.numpy()
    for k, way in ((0, None), (2, 1), (7, 2)):
        arrived = codes if way is None else np.einsum("nqs,nsj->nqj", pattern[:, way], codes)
        around = np.einsum("nqi,nqj->ij", on, arrived) / count
        product = (found[k].values[0] @ b.W_enc).T.numpy()
        given = whole[0].contribution
        assert given is not None
        np.testing.assert_allclose(given[k], product * around, rtol=1e-3, atol=1e-5)
    kept = strongest_edges(layer, found, b, recording, top_k_sources=3)
    for k, kernel in enumerate(edge_kernels(layer, found, b.W_enc, kept)):
        own = kept.route == k
        np.testing.assert_allclose(kernel.sum(axis=1), kept.weight[own], rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(
            np.linalg.norm(kernel, axis=1), kept.norm[own], rtol=1e-3, atol=1e-6
        )


def test_the_spread_is_attention_by_distance_and_far_ones_are_not_lost():
    network, x = small("before", dtype=torch.float32), sequences(3, 24, torch.float32)
    layer, maps = layer_of(network, x)
    a = Linear(12, 8, seed=4, dtype=torch.float32)
    recording = record_layer(layer, a, a, [maps])
    spread = recording.gates.spread[1:, :, -1]
    assert (spread[:, 9:] == 0).all(), "no position looks ahead"
    size = layer.nonlinearities(maps).pattern
    np.testing.assert_allclose(spread.sum(axis=1), size.sum(dim=(0, 2, 3)) / (3 * 24), rtol=1e-4)
    diagonal = size.diagonal(dim1=2, dim2=3).sum(dim=(0, 2)) / (3 * 24)
    np.testing.assert_allclose(spread[:, 8], diagonal, rtol=1e-4)


def test_a_layer_without_slopes_is_reproduced_and_attributed_exactly():
    network, x = small("none", dtype=torch.float32), sequences(6, 8, torch.float32)
    network.last.up.bias.data += 50
    for part in network.last.attention.linear[:2]:
        part.weight.data.zero_()  # attention is even whatever comes
    layer, maps = layer_of(network, x)
    a, b = Linear(12, 24, seed=4, dtype=torch.float32), Linear(12, 5, seed=5, dtype=torch.float32)
    a.W_dec = torch.cat([torch.eye(12), -torch.eye(12)])
    a.encode = lambda x: torch.cat([x.relu(), (-x).relu()], dim=-1)
    recording = record_layer(layer, a, b, [maps])
    found = compose_responses(layer, a, recording.gates)
    assert (reproduced_variance(layer, found, a, b, [maps]) > 1 - 1e-4).all()
    parts = [route.channels for route in layer.routes]
    given = attribute(layer, a, b, [maps], np.arange(5), parts, steps=2)
    assert given.attributed.shape == (5, 1, 24)
    assert given.gap.max() < 1e-3
    block = next(pair_blocks(layer, found, b.W_enc, recording))
    assert block.contribution is not None
    np.testing.assert_allclose(
        given.attributed[:, 0], block.contribution.sum(axis=0), rtol=1e-2, atol=1e-3
    )


class GatedBlock(Block):
    def __init__(self, *shape: Any, **how: bool) -> None:
        super().__init__(*shape, **how)
        self.gate = nn.Linear(12, 20)

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x) * self.up(x))


class Gated(Small):
    """Its MLP has a gate of its own."""

    def __init__(self) -> None:
        super().__init__("after")
        self.layers[1] = GatedBlock("after", 12, 3, 20, fused=False, causal=False)


def turned(_module: nn.Module, _given: Any, out: Tensor) -> Tensor:
    return out * torch.arange(out.shape[1])[:, None]


class Turned(Small):
    """Its queries know where they stand."""

    def __init__(self) -> None:
        super().__init__("after")
        self.last.attention.linear[0].register_forward_hook(turned)


@pytest.mark.parametrize(
    ("network", "sites", "message"),
    [
        (Small("none"), (Site("layers.0.up"), B), "layers.0.up and layers.1 are not consecutive"),
        (Gated(), (A, B), "need queries, keys and values .* and an MLP of two maps"),
        (Turned(), (A, B), "could not be repeated as attention and an MLP"),
    ],
    ids=["not consecutive", "gated", "turned"],
)
def test_other_layers_are_refused(network, sites, message):
    with pytest.raises(SiteError, match=message):
        connect(network.eval(), sites[0], sites[1], sequences(2, 4, torch.float32))


def test_layers_of_bert_and_gpt2_are_repeated():
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 30, "max_position_embeddings": 16}
    bert = transformers.BertModel(transformers.BertConfig(
        **shape, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24
    )).eval()  # fmt: skip
    gpt2 = transformers.GPT2Model(transformers.GPT2Config(
        vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=4
    )).eval()  # fmt: skip
    tokens = torch.randint(30, (2, 9), generator=torch.Generator().manual_seed(0))
    found = connect(bert, Site("encoder.layer.0"), Site("encoder.layer.1"), tokens)
    assert isinstance(found, TransformerLayer)
    assert (found.order, found.causal, found.n_heads) == ("after", False, 4)
    found = connect(gpt2, Site("h.0"), Site("h.1"), tokens)
    assert isinstance(found, TransformerLayer)
    assert (found.order, found.causal, found.n_heads) == ("before", True, 4)
    z = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(found.activation(z), gelu(z, approximate="tanh"))
