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
