import copy

import pytest
import torch
from torch import nn

from mechatlas.activations.components import decompose_layer
from mechatlas.activations.sites import read_activations
from mechatlas.base import Site, SiteError
from tests.networks import PatchLayer, PatchTransformer, patch_transformer

INPUTS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def parts_by_hand(network, x):
    """Components of the second layer from its own attention patterns, token by token."""
    layer = network.layers[1]
    pattern, values = layer.attention.parts(layer.norms[0](x))
    weight = layer.attention.proj.weight.T.unflatten(0, (3, -1)) * layer.scales[0]
    brought = torch.einsum("nhts,nhsk,hkd->hstnd", pattern, values, weight)  # by source token
    mid = x + layer.scales[0] * layer.attention(layer.norms[0](x))
    mlp = layer.scales[1] * layer.down(layer.up(layer.norms[1](mid)).relu())
    return {
        **{f"head{h}": brought[h, 3:].sum(0).transpose(0, 1) for h in range(3)},
        "class token": brought[:, :1].sum((0, 1)).transpose(0, 1),
        "registers": brought[:, 1:3].sum((0, 1)).transpose(0, 1),
        "mlp": mlp,
    }


def test_components_are_those_of_the_attention_patterns_and_add_up():
    network, site = patch_transformer(), Site("layers.1")
    layer = decompose_layer(network, site, INPUTS)
    found = dict(zip(layer.names, layer.read(INPUTS), strict=True))
    x, out = read_activations(network, INPUTS, ["layers.0", "layers.1"]).values()
    for name, part in parts_by_hand(network, x).items():
        assert torch.allclose(found[name], part, atol=1e-5), name
    assert torch.allclose(torch.stack(list(found.values())).sum(0), out, atol=1e-4)
    constant = network.layers[1].attention.proj.bias * network.layers[1].scales[0]
    assert torch.allclose(found["input"], x + constant, atol=1e-5)


@pytest.mark.parametrize(
    ("registers", "named"), [(0, ["class token"]), (2, ["class token", "registers"])]
)
def test_tokens_that_are_no_patches_have_components_of_their_own(registers, named):
    torch.manual_seed(0)
    network = PatchTransformer(registers=registers).eval()
    layer = decompose_layer(network, Site("layers.0"), INPUTS)
    assert list(layer.tokens) == named
    assert layer.names == ("input", "head0", "head1", "head2", *named, "mlp")


@pytest.mark.parametrize("kind", ["Dinov2WithRegisters", "ViT"])
def test_layers_of_transformers_are_decomposed(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=2,
        num_attention_heads=3, intermediate_size=48, layerscale_value=0.7,
    )  # fmt: skip
    network = getattr(transformers, f"{kind}Model")(config).eval()
    name = next(n for n, _ in network.named_modules() if n.endswith(("layers.1", "layer.1")))
    layer = decompose_layer(network, Site(name), INPUTS)
    (out,) = read_activations(network, INPUTS, [name]).values()
    registers = kind == "Dinov2WithRegisters"
    heads = ("head0", "head1", "head2")
    special = ("class token", "registers") if registers else ("class token",)
    assert layer.names == ("input", *heads, *special, "mlp")
    assert torch.allclose(layer.read(INPUTS).sum(0), out, atol=1e-4)


class NormalizedAfterwards(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.norm = PatchLayer(24), nn.LayerNorm(24)

    def forward(self, x):
        return self.norm(self.inside(x))


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.block = nn.Conv2d(3, 24, 4, 4), NormalizedAfterwards()

    def forward(self, x):
        return self.block(self.first(x).flatten(2).transpose(1, 2))


def test_a_sum_that_is_normalized_is_refused():
    torch.manual_seed(0)
    with pytest.raises(SiteError, match="is not the sum of its input, its attention and its MLP"):
        decompose_layer(Around().eval(), Site("block"), INPUTS)
    with pytest.raises(SiteError, match="no layer with one attention and an MLP"):
        decompose_layer(patch_transformer().eval(), Site("layers.0.down"), INPUTS)


class Encoder(nn.Module):
    """Patches, a class token, and one layer of torch's own."""

    def __init__(self, **settings):
        super().__init__()
        self.patch, self.special = nn.Conv2d(3, 24, 4, 4), nn.Parameter(torch.randn(1, 1, 24))
        self.layer = nn.TransformerEncoderLayer(24, 3, 48, **settings)
        for norm in (self.layer.norm1, self.layer.norm2):
            nn.init.normal_(norm.weight, 1.0, 0.3)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.special.expand(len(x), -1, -1), x], dim=1)
        if self.layer.self_attn.batch_first:
            return self.layer(x)
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


def of_torch_layer(layer, x):
    """Components of a layer of torch from its weights, in float64, normalization held."""
    layer, x = copy.deepcopy(layer).double(), x.double()
    attention, (n, t, d) = layer.self_attn, x.shape
    given = layer.norm1(x) if layer.norm_first else x
    q, k, v = (given @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (each.view(n, t, 3, 8).transpose(1, 2) for each in (q, k, v))
    pattern = (q @ k.transpose(2, 3) / 8**0.5).softmax(-1)
    weight = attention.out_proj.weight.T.view(3, 8, d)
    brought = torch.einsum("nhts,nhsk,hkd->hsntd", pattern, v, weight)  # by source token
    parts = {
        "input": x + attention.out_proj.bias,
        **{f"head{h}": brought[h, 1:].sum(0) for h in range(3)},
        "class token": brought[:, 0].sum(0),
    }

    def passed(parts, norm):
        whole = torch.stack(list(parts.values())).sum(0)
        deviation = (whole.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        held = {k: (p - p.mean(-1, keepdim=True)) / deviation * norm.weight
                for k, p in parts.items()}  # fmt: skip
        return held | {"input": held["input"] + norm.bias}

    parts = parts if layer.norm_first else passed(parts, layer.norm1)
    stream = torch.stack(list(parts.values())).sum(0)
    given = layer.norm2(stream) if layer.norm_first else stream
    parts["mlp"] = layer.linear2(layer.linear1(given).relu())
    return parts if layer.norm_first else passed(parts, layer.norm2)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_layers_of_torch_are_decomposed_also_where_they_normalize_sums(norm_first, batch_first):
    torch.manual_seed(0)
    network = Encoder(norm_first=norm_first, batch_first=batch_first).train()
    layer = decompose_layer(network, Site("layer"), INPUTS)
    found = dict(zip(layer.names, layer.read(INPUTS), strict=True))
    before, out = read_activations(network, INPUTS, ["layer:input", "layer"]).values()
    if not batch_first:
        before, out = before.transpose(0, 1), out.transpose(0, 1)
    parts = of_torch_layer(network.layer, before)
    assert list(found) == list(parts)
    for name, part in parts.items():
        assert torch.allclose(found[name].double(), part, atol=1e-5), name
    assert torch.allclose(torch.stack(list(found.values())).sum(0), out, atol=1e-5)
    assert network.training


def test_attention_to_more_than_the_tokens_is_refused():
    torch.manual_seed(0)
    network = Encoder(norm_first=True, batch_first=True).eval()
    network.layer.self_attn.add_zero_attn = True
    with pytest.raises(SiteError, match=r"self_attn attends to more than its tokens"):
        decompose_layer(network, Site("layer"), INPUTS)


def test_layers_of_bert_which_normalize_sums_are_decomposed():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=48, max_position_embeddings=8,
    )  # fmt: skip
    network = transformers.BertModel(config, add_pooling_layer=False).eval()
    tokens = torch.randint(0, 30, (3, 8), generator=torch.Generator().manual_seed(0))
    layer = decompose_layer(network, Site("encoder.layer.1"), tokens)
    (out,) = read_activations(network, tokens, ["encoder.layer.1"]).values()
    found = layer.read(tokens)
    assert layer.names == ("input", "head0", "head1", "head2", "mlp")
    assert torch.allclose(found.sum(0), out, atol=1e-5)
    # Without a head's rows of the projection, its component is gone and no other one changes
    # before normalization.
    mixing = network.encoder.layer[1].attention.output.dense
    with torch.no_grad():
        mixing.weight[:, 8:16] = 0
    without = decompose_layer(network, Site("encoder.layer.1"), tokens).read(tokens)
    assert not without[2].any()
    cosine = torch.cosine_similarity(without[1], found[1], dim=-1)
    assert float(cosine.min()) > 0.9999


def test_layers_that_normalize_what_they_add_are_decomposed():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=30, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, head_dim=8,
        num_key_value_heads=1, intermediate_size=48, max_position_embeddings=8,
    )  # fmt: skip
    network = transformers.Gemma2Model(config).eval()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "norm" in name:
                weight.normal_(0, 0.3)
    tokens = torch.randint(0, 30, (3, 8), generator=torch.Generator().manual_seed(0))
    layer = decompose_layer(network, Site("layers.1"), tokens)
    sites = ["layers.0", "layers.1.post_feedforward_layernorm", "layers.1"]
    before, written, out = read_activations(network, tokens, sites).values()
    found = dict(zip(layer.names, layer.read(tokens), strict=True))
    assert list(found) == ["input", "head0", "head1", "head2", "mlp"]
    assert torch.allclose(found["input"], before)
    assert torch.allclose(found["mlp"], written, atol=1e-5)
    assert torch.allclose(torch.stack(list(found.values())).sum(0), out, atol=1e-5)
