"""Small networks as other people write them, each with the truth about its sites beside it.

    ZOO        the networks by name
    Animal     factory, samples and truth of a network
    Place      truth about one site

A table of truth has one line for each module that returns activations, and some more:

    SITE  AXES  WIDTH  POSITIONS  [CHANNELS]        conv#2  bchw  4  8x6
    SITE  refused  EXPRESSION                       conv    refused  conv#1

AXES has a letter for each axis of the tensor: b batch, c channel, others positions. `?` after it:
nothing but the user's word tells these axes, so a refusal that asks for them is right too, and the
same site with `@AXES` must be right. `!` after it: the first axis does not count samples, so that
the site can be read and edited, and its rows cannot be collected. POSITIONS are the lengths of the
other axes for one sample, `-` for none; those that are merged into the batch axis count too.
CHANNELS are those of a branch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

Samples = Callable[[int], Tensor]


class Place(NamedTuple):
    """Truth about one site."""

    site: str
    axes: str
    width: int
    positions: tuple[int, ...]
    channels: tuple[int, ...] | None = None
    """Channels of a branch; `None` for all."""
    told: bool = True
    """Whether the network tells the axes, so that the user need not."""
    collected: bool = True
    """Whether its rows belong to samples."""

    @property
    def written(self) -> str:
        """Site with its axes, as the user writes it where the network does not tell them."""
        module, slash, branch = self.site.partition("/")
        return f"{module}@{self.axes}{slash}{branch}"


@dataclasses.dataclass(frozen=True)
class Animal:
    """Network with samples and truth."""

    build: Callable[[], nn.Module]
    samples: Samples
    places: tuple[Place, ...]
    refused: dict[str, str]
    """Sites that are refused, and what the sentence must match."""
    wrapped: bool = False
    """Whether hooks of torch do not take effect, so that a refusal of everything is right too."""

    def network(self) -> nn.Module:
        """Build the network, always with the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build()


ZOO: dict[str, Animal] = {}


def animal(
    build: Callable[[], nn.Module],
    samples: Samples,
    table: str,
    *,
    name: str | None = None,
    wrapped: bool = False,
) -> None:
    """Add a network to the zoo."""
    places, refused = [], {}
    for line in filter(str.strip, table.splitlines()):
        site, axes, *rest = line.split()
        if axes == "refused":
            refused[site] = " ".join(rest)
            continue
        sides = () if rest[1] == "-" else tuple(int(n) for n in rest[1].split("x"))
        channels = tuple(int(c) for c in rest[2].split(",")) if len(rest) > 2 else None
        places.append(
            Place(site, axes.strip("?!"), int(rest[0]), sides, channels,
                  told="?" not in axes, collected="!" not in axes)
        )  # fmt: skip
    ZOO[name or build.__name__] = Animal(build, samples, tuple(places), refused, wrapped)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Samples:
    """Samples of a shape, normally distributed."""

    def draw(n: int) -> Tensor:
        return torch.randn(n, *shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    return draw


def tokens(length: int) -> Samples:
    """Samples of token ids below 11."""

    def draw(n: int) -> Tensor:
        return torch.randint(0, 11, (n, length), generator=torch.Generator().manual_seed(1))

    return draw


def ready(network: nn.Module) -> nn.Module:
    """In evaluation mode, with running statistics as after training."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_().mul_(0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


IMAGES = numbers(3, 8, 6)


# Convolutional networks.


class Residual(nn.Module):
    """Everything in place, and one ReLU for all places of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.block = ResidualBlock()
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        return self.head(torch.flatten(self.pool(self.block(x)), 1))


class ResidualBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += x
        return self.relu(y)


def residual_in_place() -> nn.Module:
    return ready(Residual())


RESIDUAL = """
    stem               bchw   4  8x6
    norm               bchw   4  8x6
    norm:input         bchw   4  8x6
    relu               bchw   4  8x6
    block              bchw   4  8x6
    block:input        bchw   4  8x6
    block.conv1        bchw   4  8x6
    block.norm1        bchw   4  8x6
    block.relu#1       bchw   4  8x6
    block.relu#2       bchw   4  8x6
    block.relu#2:input bchw   4  8x6
    block.conv2        bchw   4  8x6
    block.conv2:input  bchw   4  8x6
    block.norm2        bchw   4  8x6
    pool               bchw   4  1x1
    head               bc     3  -
    head:input         bc     4  -
    block.relu         refused  block\\.relu#1.*block\\.relu#2
    block.relu#3       refused  2
    block.relux        refused  no module
"""
animal(residual_in_place, IMAGES, RESIDUAL)


class Hierarchical(nn.Module):
    """Channels last after the first convolution, as in Swin and ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 4, 2, stride=2), nn.LayerNorm(4)
        self.stage1, self.merge, self.stage2 = LastMixer(4), Merge(4), LastMixer(8)
        self.out_norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x).permute(0, 2, 3, 1))
        x = self.out_norm(self.stage2(self.merge(self.stage1(x))))
        return self.head(x.mean(dim=(1, 2)))


class LastMixer(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = (
            nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x.roll(1, dims=1)))))


class Merge(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(4 * d, 2 * d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return self.reduce(torch.cat([c[:, :2, :1] for c in corners], dim=-1))


def hierarchical_channels_last() -> nn.Module:
    return ready(Hierarchical())


animal(
    hierarchical_channels_last,
    IMAGES,
    """
    embed           bchw   4  4x3
    norm            bhwc   4  4x3
    stage1          bhwc?  4  4x3
    stage1.norm     bhwc   4  4x3
    stage1.up       bhwc   8  4x3
    stage1.up:input bhwc   4  4x3
    stage1.act      bhwc?  8  4x3
    stage1.down     bhwc   4  4x3
    merge           bhwc?  8  2x1
    merge.reduce    bhwc   8  2x1
    stage2          bhwc?  8  2x1
    stage2.norm     bhwc   8  2x1
    stage2.up       bhwc  16  2x1
    stage2.act      bhwc? 16  2x1
    stage2.down     bhwc   8  2x1
    out_norm        bhwc   8  2x1
    head            bc     3  -
    """,
)


class Separable(nn.Module):
    """Depthwise and pointwise convolutions, with squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, stride=2, groups=6)
        self.act, self.excite = nn.Hardswish(inplace=True), Excite(6)
        self.project, self.drop = nn.Conv2d(6, 4, 1), nn.Dropout2d(0.3)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.norm(self.expand(x)))
        return self.head(self.drop(self.project(self.excite(self.act(x)))))


class Excite(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.squeeze, self.down, self.up = (
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(d, 2, 1), nn.Conv2d(2, d, 1),
        )  # fmt: skip
        self.gate = nn.Hardsigmoid(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.gate(self.up(functional.relu_(self.down(self.squeeze(x))))))


def separable_squeeze_excite() -> nn.Module:
    return ready(Separable())


animal(
    separable_squeeze_excite,
    IMAGES,
    """
    expand         bchw  6  8x6
    norm           bchw  6  8x6
    depthwise      bchw  6  4x3
    act            bchw  6  4x3
    excite         bchw  6  4x3
    excite:input   bchw  6  4x3
    excite.squeeze bchw  6  1x1
    excite.down    bchw  2  1x1
    excite.up      bchw  6  1x1
    excite.gate    bchw  6  1x1
    project        bchw  4  4x3
    drop           bchw  4  4x3
    head           bc    3  -
    head.0         bchw  4  1x1
    head.1         bc    4  -
    head.2         bc    3  -
    """,
)


class Dense(nn.Module):
    """Each layer reads all maps before it, and the last one names its branches."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 2 * i, 2, 3, padding=1) for i in range(2))
        self.join, self.head = Join(), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in self.layers:
            maps.append(layer(torch.cat(maps, dim=1)).relu_())
        return self.head(self.join(*maps).mean(dim=(2, 3)))


class Join(nn.Module):
    branches: ClassVar = {
        "image": slice(0, 3), "odd": slice(1, 7, 2), "listed": [6, 0, 3],
        "masked": [False, True, False, False, True, True, False],
    }  # fmt: skip

    def forward(self, *maps: Tensor) -> Tensor:
        return torch.cat(maps, dim=1)


def dense_concatenation() -> nn.Module:
    return ready(Dense())


animal(
    dense_concatenation,
    IMAGES,
    """
    layers.0       bchw  2  8x6
    layers.0:input bchw  3  8x6
    layers.1       bchw  2  8x6
    layers.1:input bchw  5  8x6
    join           bchw  7  8x6
    join/image     bchw  3  8x6  0,1,2
    join/odd       bchw  3  8x6  1,3,5
    join/listed    bchw  3  8x6  6,0,3
    join/masked    bchw  3  8x6  1,4,5
    head           bc    3  -
    join/other     refused  no branch
    """,
)


class Audio(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wave, self.norm, self.act = (
            nn.Conv1d(1, 4, 5, stride=2, padding=2), nn.BatchNorm1d(4), nn.GELU(),
        )  # fmt: skip
        self.dilated, self.pool = nn.Conv1d(4, 6, 3, dilation=2, padding=2), nn.MaxPool1d(2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.wave(x)))
        return self.head(self.pool(self.dilated(x)).mean(dim=2))


def audio_conv1d() -> nn.Module:
    return ready(Audio())


animal(
    audio_conv1d,
    numbers(1, 16),
    """
    wave          bct   4  8
    wave:input    bct   1  16
    norm          bct   4  8
    act           bct?  4  8
    dilated       bct   6  8
    dilated:input bct   4  8
    pool          bct   6  4
    head          bc    3  -
    """,
)


class Video(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4)
        self.relu, self.point = nn.ReLU(inplace=True), nn.Conv3d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        x += self.point(x)
        return self.head(x.mean(dim=(2, 3, 4)))


def video_conv3d() -> nn.Module:
    return ready(Video())


animal(
    video_conv3d,
    numbers(2, 3, 5, 4),
    """
    conv   bcthw   4  3x5x4
    norm   bcthw   4  3x5x4
    relu   bcthw?  4  3x5x4
    point  bcthw   4  3x5x4
    head   bc      3  -
    """,
)


class UNet(nn.Module):
    """A skip whose tensor is changed in place on the way down."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.pool, self.middle = (
            nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1),
        )  # fmt: skip
        self.relu = nn.ReLU(inplace=True)
        self.up, self.out = nn.ConvTranspose2d(6, 4, 2, stride=2), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.relu(self.down(x))
        x = self.up(self.relu(self.middle(self.pool(skip))))
        return self.out(torch.cat([skip, x], dim=1))


def unet_skips() -> nn.Module:
    return ready(UNet())


animal(
    unet_skips,
    IMAGES,
    """
    down      bchw  4  8x6
    pool      bchw  4  4x3
    middle    bchw  6  4x3
    relu#1    bchw  4  8x6
    relu#2    bchw  6  4x3
    up        bchw  4  8x6
    out       bchw  2  8x6
    out:input bchw  8  8x6
    relu      refused  relu#1.*relu#2
    """,
)


# Sequences.


class Recurrent(nn.Module):
    """Samples first outside; inside, time first if `batch_first` is off."""

    def __init__(
        self, kind: Callable[..., nn.RNNBase], *, batch_first: bool, both_ways: bool
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 5)
        self.core = kind(5, 6, batch_first=batch_first, bidirectional=both_ways)
        self.head = nn.Linear(12 if both_ways else 6, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.core.batch_first:
            return self.head(self.core(self.embed(x))[0][:, -1])
        return self.head(self.core(self.embed(x.transpose(0, 1)))[0][-1])


def lstm_batch_first() -> nn.Module:
    return ready(Recurrent(nn.LSTM, batch_first=True, both_ways=False))


def lstm_time_first() -> nn.Module:
    return ready(Recurrent(nn.LSTM, batch_first=False, both_ways=True))


def gru_batch_first() -> nn.Module:
    return ready(Recurrent(nn.GRU, batch_first=True, both_ways=True))


def gru_time_first() -> nn.Module:
    return ready(Recurrent(nn.GRU, batch_first=False, both_ways=False))


for recurrent, order, width in (
    (lstm_batch_first, "btc", 6), (lstm_time_first, "tbc?", 12),
    (gru_batch_first, "btc", 12), (gru_time_first, "tbc?", 6),
):  # fmt: skip
    animal(
        recurrent,
        numbers(7, 3),
        f"""
        embed      {order}  5  7
        core       {order.strip("?")}  {width}  7
        core:input {order}  5  7
        head       bc       2  -
        """,
    )


class Attention(nn.Module):
    """Attention in its own words: queries, keys and values in one map, normalized by head."""

    def __init__(self, d: int, n_heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = n_heads, causal
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.query_norm, self.pattern = nn.LayerNorm(d // n_heads), nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(x).chunk(3, dim=-1))
        scores = torch.einsum("bqhd,bkhd->bhqk", self.query_norm(q), k)
        if self.causal:
            scores = scores + torch.full(scores.shape[-2:], -1e9).triu(1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", self.pattern(scores), v)
        return self.out(mixed.flatten(2))


class Layer(nn.Module):
    def __init__(self, d: int, n_heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(d), Attention(d, n_heads, causal=causal)
        self.norm2 = nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def layer_table(name: str, tokens: int) -> str:
    return f"""
    {name}                       btc?   6  {tokens}
    {name}.norm1                 btc    6  {tokens}
    {name}.attention             btc?   6  {tokens}
    {name}.attention.qkv         btc   18  {tokens}
    {name}.attention.query_norm  btcc   6  {tokens}
    {name}.attention.query_norm@bthc  bthc  3  {tokens}x2
    {name}.attention.pattern     bcqk?  2  {tokens}x{tokens}
    {name}.attention.out         btc    6  {tokens}
    {name}.attention.out:input   btc    6  {tokens}
    {name}.norm2                 btc    6  {tokens}
    {name}.mlp                   btc?   6  {tokens}
    {name}.mlp.0                 btc   12  {tokens}
    {name}.mlp.1                 btc?  12  {tokens}
    {name}.mlp.2                 btc    6  {tokens}
    """


class Reader(nn.Module):
    """Word vectors, one layer of attention, answers for each word or for the whole."""

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(11, 6), nn.Parameter(0.1 * torch.randn(5, 6))
        self.layer, self.head = Layer(6, 2, causal=causal), nn.Linear(6, 11 if causal else 3)
        self.causal = causal

    def forward(self, ids: Tensor) -> Tensor:
        x = self.layer(self.embed(ids) + self.places)
        return self.head(x if self.causal else x.mean(dim=1))


def encoder() -> nn.Module:
    return ready(Reader(causal=False))


def decoder() -> nn.Module:
    return ready(Reader(causal=True))


animal(
    encoder, tokens(5), f"embed btc 6 5\n{layer_table('layer', 5)}\nhead bc 3 -"
)  # fmt: skip
animal(
    decoder, tokens(5), f"embed btc 6 5\n{layer_table('layer', 5)}\nhead btc 11 5"
)  # fmt: skip


class Vision(nn.Module):
    """Patches as tokens, with a class token in front or none."""

    def __init__(self, *, class_token: bool) -> None:
        super().__init__()
        self.patches, self.layer = nn.Conv2d(3, 6, 2, stride=2), Layer(6, 2)
        self.first = nn.Parameter(0.1 * torch.randn(1, 1, 6)) if class_token else None
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        if self.first is not None:
            x = torch.cat([self.first.expand(len(x), -1, -1), x], dim=1)
        x = self.norm(self.layer(x))
        return self.head(x.mean(dim=1) if self.first is None else x[:, 0])


def vit_class_token() -> nn.Module:
    return ready(Vision(class_token=True))


def vit_mean() -> nn.Module:
    return ready(Vision(class_token=False))


for vision, count in ((vit_class_token, 13), (vit_mean, 12)):
    rows = f"patches bchw 6 4x3\n{layer_table('layer', count)}\nnorm btc 6 {count}\nhead bc 3 -"
    animal(vision, IMAGES, rows)


class TokenFirst(nn.Module):
    """The transformer of torch, tokens first; its attention never calls its last map."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.1, batch_first=batch_first)
        self.embed = nn.Linear(3, 6)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head, self.batch_first = nn.Linear(6, 2), batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x if self.batch_first else x.transpose(0, 1))
        return self.head(self.encoder(x).mean(dim=1 if self.batch_first else 0))


def transformer_token_first() -> nn.Module:
    return ready(TokenFirst(batch_first=False))


def transformer_batch_first() -> nn.Module:
    return ready(TokenFirst(batch_first=True))


def fused_table(axes: str) -> str:
    parts = (
        "self_attn?",
        "linear1",
        "dropout?",
        "linear2",
        "norm1",
        "norm2",
        "dropout1?",
        "dropout2?",
    )
    lines = [f"embed {axes} 6 5", f"encoder {axes}? 6 5", "head bc 2 -"]
    for i in (0, 1):
        lines.append(f"encoder.layers.{i} {axes}? 6 5")
        lines.append(f"encoder.layers.{i}.self_attn.out_proj refused without calling|never call")
        for part in parts:
            wide = 8 if part.strip("?") in ("linear1", "dropout") else 6
            mark = "?" if "?" in part or axes == "tbc" else ""
            lines.append(f"encoder.layers.{i}.{part.strip('?')} {axes}{mark} {wide} 5")
    return "\n".join(lines)


animal(transformer_token_first, numbers(5, 3), fused_table("tbc").replace("tbc ", "tbc? "))
animal(transformer_batch_first, numbers(5, 3), fused_table("btc"))


class StateSpace(nn.Module):
    """A convolution in time, and a state that a cell carries from step to step."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.conv = nn.Linear(3, 8), nn.Conv1d(4, 4, 3, padding=2, groups=4)
        self.act, self.cell, self.out = nn.SiLU(inplace=True), Cell(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.into(x).chunk(2, dim=-1)
        steps = self.act(self.conv(x.transpose(1, 2))[..., :4]).unbind(dim=2)
        state = torch.zeros_like(steps[0])
        states = []
        for step in steps:
            state = self.cell(state, step)
            states.append(state)
        return self.out(torch.stack(states, dim=1) * gate.sigmoid())


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.rand(4))

    def forward(self, state: Tensor, step: Tensor) -> Tensor:
        return state * self.decay + step


def state_space() -> nn.Module:
    return ready(StateSpace())


animal(
    state_space,
    numbers(4, 3),
    """
    into    btc   8  4
    conv    bct   4  6
    act     bct?  4  4
    cell#1  bc    4  -
    cell#2  bc    4  -
    cell#3  bc    4  -
    cell#4  bc    4  -
    cell#4:input  bc  4  -
    out     btc   3  4
    cell    refused  cell#1
    """,
)


class Mixture(nn.Module):
    """Experts see the tokens sent to them, of all samples together."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.router = nn.Linear(3, 6), nn.Linear(6, 2)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        rows = x.flatten(0, 1)
        weights = self.router(rows).softmax(dim=-1)
        mixed = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            sent = weights.argmax(dim=-1) == i
            mixed[sent] = expert(rows[sent]) * weights[sent, i, None]
        return self.out(x + mixed.view_as(x))


def mixture_of_experts() -> nn.Module:
    return ready(Mixture())


animal(
    mixture_of_experts,
    numbers(5, 3),
    """
    into       btc  6  5
    router     bc   2  5
    experts.0  bc!  6  -
    experts.1  bc!  6  -
    out        btc  3  5
    """,
)


# Modules that are shared, and networks on other data.


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True))
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.trunk(x[:, 0]) - self.trunk(x[:, 1])).abs_())


def siamese_shared_trunk() -> nn.Module:
    return ready(Siamese())


animal(
    siamese_shared_trunk,
    numbers(2, 4),
    """
    trunk#1         bc  5  -
    trunk#2         bc  5  -
    trunk.0#1       bc  5  -
    trunk.0#2       bc  5  -
    trunk.0#2:input bc  4  -
    trunk.1#1       bc  5  -
    trunk.1#2       bc  5  -
    head            bc  1  -
    trunk           refused  trunk#1.*trunk#2
    trunk.0:input   refused  trunk\\.0#1
    """,
)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.act = nn.Linear(6, 4), nn.ReLU()
        self.decoder = Transposed(self.encoder.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.act(self.encoder(x)))


class Transposed(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, code: Tensor) -> Tensor:
        return code @ self.weight


def autoencoder_tied() -> nn.Module:
    return ready(Tied())


TWO_LAYERS = "encoder bc 4 -\nact bc 4 -\ndecoder bc 6 -\ndecoder:input bc 4 -"
animal(autoencoder_tied, numbers(6), TWO_LAYERS)


class Twice(nn.Module):
    """One module under two names, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second, self.spare, self.head = self.first, nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()))


def module_under_two_names() -> nn.Module:
    return ready(Twice())


animal(
    module_under_two_names,
    numbers(4),
    """
    first#1  bc  4  -
    first#2  bc  4  -
    head     bc  2  -
    first    refused  first#1
    second   refused  #1
    spare    refused  without calling|never call
    """,
)


class Graph(nn.Module):
    """Convolutions on a fixed graph of five nodes."""

    adjacency: Tensor

    def __init__(self) -> None:
        super().__init__()
        ring = torch.eye(5) + torch.eye(5).roll(1, 0)
        self.register_buffer("adjacency", ring / 2)
        self.first, self.second, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.adjacency @ self.first(x)).relu()
        x = torch.einsum("ij,bjc->bic", self.adjacency, self.second(x)).relu_()
        return self.head(x.mean(dim=1))


def graph_convolution() -> nn.Module:
    return ready(Graph())


GRAPH = "first bnc 4 5\nfirst:input bnc 3 5\nsecond bnc 4 5\nhead bc 2 -"
animal(graph_convolution, numbers(5, 3), GRAPH)


# What modules return.


class Pair(NamedTuple):
    hidden: Tensor
    skip: Tensor | None


@dataclasses.dataclass
class Answer:
    logits: Tensor
    hidden: Tensor | None = None


class Packed(nn.Module):
    """Linear map that packs what it returns."""

    def __init__(self, n: int, m: int, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.pack = nn.Linear(n, m), pack

    def forward(self, x: Tensor) -> Any:
        return self.pack(self.inner(x), x)


class Packing(nn.Module):
    """A packed block, a plain one, a packed answer."""

    def __init__(self, pack: Callable[..., Any], unpack: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.block, self.act = Packed(4, 5, pack), nn.ReLU(inplace=True)
        self.head, self.unpack = Packed(5, 3, pack), unpack

    def forward(self, x: Tensor) -> Any:
        return self.head(self.act(self.unpack(self.block(x))))


PACKED = """
    block        bc  5  -
    block.inner  bc  5  -
    block.inner:input bc 4 -
    act          bc  5  -
    head         bc  3  -
    head.inner   bc  3  -
"""
for kind, pack, unpack in (
    ("dict", lambda y, x: {"hidden": y, "skip": x}, lambda out: out["hidden"]),
    ("tuple", lambda y, x: (y, x), lambda out: out[0]),
    ("list", lambda y, x: [y, x], lambda out: out[0]),
    ("namedtuple", Pair, lambda out: out.hidden),
    ("dataclass", Answer, lambda out: out.logits),
    ("nested", lambda y, x: {"state": ([y, x], None), "n": 3}, lambda out: out["state"][0][0]),
):
    animal(
        lambda a=pack, b=unpack: ready(Packing(a, b)), numbers(4), PACKED, name=f"returns_{kind}"
    )


class Keywords(nn.Module):
    """Blocks that are given everything by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Keyword(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(input=self.block(hidden=x, mask=x > 0))


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, *, hidden: Tensor, mask: Tensor) -> Tensor:
        return self.inner(hidden) * mask


def keyword_arguments() -> nn.Module:
    return ready(Keywords())


KEYWORDS = """
    block        bc  4  -
    block:input  bc  4  -
    block.inner  bc  4  -
    head         bc  2  -
    head:input   bc  4  -
"""
animal(keyword_arguments, numbers(4), KEYWORDS)


class Rewriting(nn.Module):
    """Views, slices that are overwritten, and memory that is resized and used again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.same, self.halves = nn.Linear(4, 6), nn.Identity(), nn.Unflatten(1, (2, 3))
        self.last, self.spoiled = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.same(self.first(x))
        pairs = self.halves(y)
        y[:, 0] = 7
        pairs.mul_(2)
        z = self.last(pairs.add_(1))
        out = self.spoiled(z.clone())
        answer = out.sum(dim=1) + z.sum(dim=(1, 2))[:, None]
        z.resize_(1).zero_()
        out.detach().transpose_(0, 1).fill_(-1)
        return answer


def views_and_resizing() -> nn.Module:
    return ready(Rewriting()).requires_grad_(requires_grad=False)


animal(
    views_and_resizing,
    numbers(4),
    """
    first       bc    6  -
    same        bc    6  -
    same:input  bc    6  -
    halves      btc   3  2
    halves@bcc  bcc   6  -
    last        btc   3  2
    last:input  btc   3  2
    spoiled     btc   2  2
    """,
)


class Heads(nn.Module):
    """Attention of torch beside a skip connection; it returns a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x += self.attention(x, x, x, need_weights=False)[0]
        return self.head(x)


def multihead_attention() -> nn.Module:
    return ready(nn.Sequential(nn.Linear(3, 6), Heads()))


animal(
    multihead_attention,
    numbers(5, 3),
    """
    0            btc   6  5
    1            btc?  2  5
    1:input      btc?  6  5
    1.attention  btc   6  5
    1.head       btc   2  5
    1.attention.out_proj        refused  without calling|never call
    1.attention.out_proj:input  refused  without calling|never call
    """,
)


# Networks in a wrapper, in other number formats, or not made ready.


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))


def small_table(prefix: str = "") -> str:
    return "\n".join(f"{prefix}{i} bc {d} -" for i, d in enumerate((6, 6, 3)))


def compiled() -> nn.Module:
    return torch.compile(ready(small()), backend="eager")  # pyright: ignore[reportReturnType]


def scripted() -> nn.Module:
    return torch.jit.script(ready(small()))


def data_parallel() -> nn.Module:
    return ready(nn.DataParallel(small()))


animal(compiled, numbers(4), small_table(), wrapped=True)
animal(scripted, numbers(4), small_table(), wrapped=True)
animal(data_parallel, numbers(4), small_table())


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = small(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, x, use_reentrant=False))


def checkpointed() -> nn.Module:
    return ready(Checkpointed())


animal(checkpointed, numbers(4), small_table("block.") + "\nblock bc 3 -\nhead bc 2 -")


class Convolved(nn.Module):
    """A convolution and a linear map, in any number format."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu_().mean(dim=(2, 3)))


CONVOLVED = "conv bchw 4 6x4\nnorm bchw 4 6x4\nhead bc 3 -"
for dtype in (torch.float16, torch.bfloat16, torch.float64):
    animal(
        lambda dtype=dtype: ready(Convolved()).to(dtype),
        numbers(3, 8, 6, dtype=dtype),
        CONVOLVED,
        name=str(dtype).removeprefix("torch."),
    )


class Regularized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu_()).mean(dim=(2, 3)))


def left_in_training_mode() -> nn.Module:
    """Only a part trains, and the part that was set by hand must stay so."""
    network = ready(Regularized()).train()
    network.get_submodule("conv").eval()
    return network


animal(
    left_in_training_mode,
    IMAGES,
    "conv bchw 4 6x4\nnorm bchw 4 6x4\ndrop bchw 4 6x4\nhead bc 3 -",
)


def one_module() -> nn.Module:
    return ready(nn.Linear(4, 3))


animal(one_module, numbers(4), "weight refused no module|no such\n0 refused no module|no such")


def named_animal(name: str) -> nn.Module:
    """Network of the zoo, for recipes."""
    return ZOO[name].network()
