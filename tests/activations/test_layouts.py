"""Layouts of networks in many words; the truth is written beside each."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mechatlas.activations.layouts import Layout, layouts_of
from mechatlas.base import Site, SiteError

IMAGE = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SOUND = torch.rand(3, 2, 40, generator=torch.Generator().manual_seed(0))
VIDEO = torch.rand(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(21).reshape(3, 7)
VECTORS = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))


class Excited(nn.Module):
    """Depthwise convolution, and channels weighed by what they are everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.depth = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.act, self.down, self.up = nn.SiLU(), nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)
        self.gate, self.out, self.head = nn.Sigmoid(), nn.Identity(), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.depth(self.stem(x)))
        weight = self.gate(self.up(self.down(y.mean(dim=(2, 3), keepdim=True)).relu()))
        return self.head(self.out(y * weight).mean(dim=(2, 3)))


class ChannelsLast(nn.Module):
    """Patches with channels last, and attention in windows, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm, self.same = nn.Conv2d(3, 12, 2, 2), nn.LayerNorm(12), nn.Identity()
        self.window, self.mlp, self.block = nn.Linear(12, 12), nn.Linear(12, 20), nn.GELU()
        self.back = nn.Linear(20, 12)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.patch(x).permute(0, 2, 3, 1))
        n, h, w, c = x.shape
        parts = x.view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        parts = self.window(parts)
        back = parts.view(n, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        x = self.same(x + back)
        return self.drop(x + self.back(self.block(self.mlp(x))))


class Attention(nn.Module):
    """Attention with (batch, token, head, channel) inside."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.heads, self.pattern = nn.Linear(12, 36), nn.Identity(), nn.Identity()
        self.mixed, self.out = nn.Identity(), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (y.view(n, t, 3, 4) for y in self.qkv(x).chunk(3, dim=-1))
        q = self.heads(q)
        scores = torch.einsum("bthd,bshd->bhts", q, k)
        pattern = self.pattern(scores.softmax(-1))
        mixed = self.mixed(torch.einsum("bhts,bshd->bthd", pattern, v))
        return self.out(mixed.reshape(n, t, 12))


class Vision(nn.Module):
    """Vision transformer with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.first = nn.Conv2d(3, 12, 4, 4), nn.Parameter(torch.zeros(1, 1, 12))
        self.place = nn.Parameter(torch.zeros(1, 5, 12))
        self.drop, self.norm, self.attention = nn.Dropout(0.1), nn.LayerNorm(12), Attention()
        self.block, self.head = nn.Identity(), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = self.drop(torch.cat([self.first.expand(len(x), -1, -1), x], dim=1) + self.place)
        x = self.block(x + self.attention(self.norm(x)))
        return self.head(x[:, 0])


class Sound(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv1d(2, 5, 3), nn.BatchNorm1d(5), nn.ReLU()
        self.pool, self.flat, self.head = nn.MaxPool1d(2), nn.Flatten(), nn.Linear(95, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flat(self.pool(self.act(self.norm(self.conv(x))))))


class Video(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.pool = nn.Conv3d(3, 5, 3, padding=1), nn.ReLU(), nn.AvgPool3d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.act(self.conv(x)))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM | nn.GRU], *, batch_first: bool) -> None:
        super().__init__()
        self.embed, self.batch_first = nn.Embedding(30, 6), batch_first
        self.rnn, self.drop = kind(6, 5, batch_first=batch_first), nn.Dropout(0.1)
        self.last = nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens if self.batch_first else tokens.T)
        y, _ = self.rnn(x)
        y = self.last(self.drop(y))
        return y[:, -1] if self.batch_first else y[-1]


class Mixer(nn.Module):
    """Tokens are mixed by a linear layer over their axis."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 6, 2, 2), nn.LayerNorm(6)
        self.tokens, self.act, self.back = nn.Linear(16, 9), nn.GELU(), nn.Linear(9, 16)
        self.sum, self.head = nn.Identity(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        y = self.back(self.act(self.tokens(self.norm(x).transpose(1, 2)))).transpose(1, 2)
        return self.head(self.sum(y + x).mean(dim=1))


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("adjacency", torch.rand(6, 6))
        self.up, self.act, self.same = nn.Linear(1, 4), nn.ReLU(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.get_buffer("adjacency") @ self.act(self.up(x[..., None]))
        return self.same(mixed).mean(dim=1)


class StateSpace(nn.Module):
    """A state carried along the tokens, written into a buffer of results."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.decay = nn.Embedding(30, 6), nn.Parameter(torch.rand(6))
        self.scanned, self.stacked = nn.Identity(), nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        state, out, states = torch.zeros_like(x[:, 0]), torch.zeros(x.shape), []
        for t in range(x.shape[1]):
            state = self.decay.sigmoid() * state + x[:, t]
            out[:, t] = state
            states.append(state)
        return self.scanned(out) + self.stacked(torch.stack(states, dim=1))


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16)
        self.after = nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.after(self.layer(self.embed(tokens).transpose(0, 1))).mean(dim=0)


class LayerNormMap(nn.LayerNorm):
    """Norm over the channels of a map, which runs in its own way, as in torchvision."""

    def forward(self, input: Tensor) -> Tensor:
        x = functional.layer_norm(input.permute(0, 2, 3, 1), self.normalized_shape)
        return x.permute(0, 3, 1, 2)


class Dense(nn.Module):
    """Concatenations of what there is, and a U-Net's way back up."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.a, self.b = nn.Identity(), nn.Conv2d(3, 4, 3, padding=1), LayerNormMap(7)
        self.down, self.up = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)
        self.shuffle, self.same = nn.PixelShuffle(1), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        y = self.b(torch.cat([x, self.a(x)], dim=1))
        return self.same(torch.cat([self.up(self.down(y)), y], dim=1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.code, self.out = nn.Parameter(torch.rand(5, 6)), nn.ReLU(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.code(functional.linear(x, self.weight)) @ self.weight)


RECURRENT_TIME_FIRST = {"embed": "tbc", "rnn": "tbc", "drop": "tbc", "last": "tbc"}
RECURRENT = {"embed": "btc", "rnn": "btc", "drop": "btc", "last": "btc"}
MAPS = ("input", "a", "b", "down", "up", "same")
TRUTH: list[tuple[nn.Module, Tensor, dict[str, str]]] = [
    (Excited(), IMAGE, dict.fromkeys(("stem", "depth", "act", "down", "gate", "out"), "bchw")
     | {"head": "bc", "": "bc"}),
    (ChannelsLast(), IMAGE, dict.fromkeys(("norm", "same", "block", "drop", ""), "bhwc")
     | {"patch": "bchw", "patch:input": "bchw"}),
    (Attention(), torch.rand(2, 5, 12), {"heads": "btcc", "pattern": "bchw",
     "mixed": "btcc", "out": "btc", "qkv:input": "btc", "": "btc"}),
    (Vision(), IMAGE, dict.fromkeys(("drop", "norm", "attention", "block", "attention.qkv"), "btc")
     | {"patch": "bchw", "head": "bc", "attention.heads": "btcc"}),
    (Sound(), SOUND, dict.fromkeys(("conv", "norm", "act", "pool", "conv:input"), "bct")
     | {"flat": "bc", "head": "bc"}),
    (Video(), VIDEO, dict.fromkeys(("conv", "act", "pool", ""), "bcdhw")),
    (Recurrent(nn.LSTM, batch_first=True), TOKENS, RECURRENT | {"": "bc"}),
    (Recurrent(nn.LSTM, batch_first=False), TOKENS, RECURRENT_TIME_FIRST | {"": "bc"}),
    (Recurrent(nn.GRU, batch_first=True), TOKENS, RECURRENT),
    (Recurrent(nn.GRU, batch_first=False), TOKENS, RECURRENT_TIME_FIRST),
    (Mixer(), IMAGE, {"patch": "bchw", "norm": "btc", "tokens": "btc", "act": "btc", "sum": "btc",
     "head": "bc"}),
    (Graph(), VECTORS, {"up": "btc", "act": "btc", "same": "btc", "": "bc"}),
    (StateSpace(), TOKENS, {"embed": "btc", "scanned": "btc", "stacked": "btc", "": "btc"}),
    (TimeFirst(), TOKENS, {"embed": "btc", "layer": "tbc", "after": "tbc", "layer.linear1": "tbc",
     "layer.dropout": "tbc", "": "bc"}),
    (Dense(), IMAGE, dict.fromkeys(MAPS, "bchw")),
    (Tied(), VECTORS, {"code": "bc", "out": "bc", "": "bc"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("network", "x", "truth"), TRUTH, ids=[type(network).__name__ for network, _, _ in TRUTH]
)
def test_the_axes_of_every_site_are_the_truth(network, x, truth):
    sites = {Site.parse(name): axes for name, axes in truth.items()}
    found = layouts_of(network.eval(), x, list(sites))
    assert {str(site): layout.axes for site, layout in found.items()} == truth


def test_windows_merged_into_the_batch_are_positions_of_their_sample():
    network = ChannelsLast().eval()
    layout = layouts_of(network, IMAGE, [Site("window")])[Site("window")]
    assert layout == Layout("btc", merged=4)
    x = torch.rand(3 * 4, 4, 12)
    rows = layout.rows(x)
    assert rows.shape == (3, 4, 4, 12)
    assert torch.equal(rows[1, 2], x[4 + 2])
    assert torch.equal(layout.undo(rows, x), x)


@pytest.mark.parametrize("axes", ["bchw", "bhwc", "tbc", "btcc", "bc", "bcdhw", "cbt", "ctcb"])
def test_rows_are_undone(axes):
    x = torch.rand([2, 3, 4, 5, 6][: len(axes)])
    layout = Layout(axes)
    rows = layout.rows(x)
    n_channels = torch.Size(x.shape[i] for i, a in enumerate(axes) if a == "c").numel()
    assert rows.shape[0] == x.shape[axes.index("b")]
    assert rows.shape[-1] == n_channels == layout.width(x)
    assert torch.equal(layout.undo(rows, x), x)
    assert torch.equal(layout.undo(rows.reshape(len(rows), -1, n_channels), x), x)


def test_axes_given_by_the_user_win_and_are_counted():
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    site = Site.parse("0@bhcw")
    assert layouts_of(network, IMAGE, [site])[site].axes == "bhcw"
    with pytest.raises(SiteError, match=r"0@bct names 3 axes, and its activations .* have 4"):
        layouts_of(network, IMAGE, [Site.parse("0@bct")])


def test_what_is_not_known_is_refused_with_the_way_to_say_it():
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,bj,bk->ijkb", x, x, x)

    with pytest.raises(SiteError, match=r"which axis holds the channels .* such as 0@bhwc"):
        layouts_of(nn.Sequential(Odd()), VECTORS, [Site("0")])
    table = nn.Embedding(7, 3)

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = table

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :3] + self.table(torch.arange(2)).sum(dim=0)

    with pytest.raises(SiteError, match="which axis is the batch"):
        layouts_of(Table(), VECTORS, [Site("table")])


class Mixing(nn.Module):
    """Layers that take time on the first axis, whatever is given to the network."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core, self.out = core, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.core(x)
        return self.out(hidden[0] if isinstance(hidden, tuple) else hidden)


def mixing_networks():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 8)
    norm = nn.BatchNorm1d(7, track_running_stats=False)
    for core in (nn.GRU(6, 6), layer, nn.Sequential(nn.Linear(6, 6), norm)):
        yield Mixing(core).eval()


@pytest.mark.parametrize("n", [1, 3])
def test_a_network_that_mixes_samples_is_refused(n):
    x = torch.randn(n, 7, 6, generator=torch.Generator().manual_seed(0))
    for network in mixing_networks():
        with pytest.raises(SiteError, match=r"at out change with the other samples.*: out@btc\."):
            layouts_of(network, x, [Site("out")])
        named = Site("out", axes="btc")
        assert layouts_of(network, x, [named]) == {named: Layout("btc")}


def test_networks_whose_samples_are_apart_are_not_refused_for_rounding_or_chance():
    torch.manual_seed(0)
    x = torch.randn(3, 7, 6)
    cores = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), Noise()
    for core, kind in itertools.product(cores, (torch.float32, torch.bfloat16)):
        network = Mixing(core).to(kind).eval()
        assert layouts_of(network, x.to(kind), [Site("out")])[Site("out")] == Layout("btc")


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def test_nothing_of_the_network_is_changed():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    layouts_of(network, IMAGE, [Site("2")])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    assert all(module.training for module in network.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
