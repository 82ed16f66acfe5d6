"""Components of the residual stream after a layer of a transformer, which is their sum.

    decompose_layer    network, site of a layer's output, a few inputs -> `LayerComponents`
    LayerComponents    names of the components; `read` gives them for a batch

The components are what the layer was given, what each head of attention adds (its part of what
attention mixes, times its rows of the output projection), and what the MLP adds. What attention
brings from the tokens of an image that are no patches (class token, registers) is apart from the
heads: it is read with the values of all other tokens set to 0, which changes no attention pattern.

A layer is decomposed only if the components add up to its output. Scales of channels after
attention and MLP (LayerScale) are found by that sum; normalization after it is refused.
"""

import dataclasses
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechatlas.activations.branches import branches_of
from mechatlas.activations.layouts import expect_patterns
from mechatlas.activations.passes import unwrapped
from mechatlas.activations.sites import intervene, read_activations
from mechatlas.activations.tracing import ModuleCall, same_numbers, trace
from mechatlas.base import Site, SiteError

INPUT, MLP = "input", "mlp"
CLASS, REGISTERS, SPECIAL = "class token", "registers", "special tokens"
MOST_APART = 16
"""Largest number of tokens beside the patches of an image: class, distillation, registers."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LayerComponents:
    """Layer of a transformer whose output is the sum of named components."""

    network: nn.Module
    before: Site
    """Input of the layer."""
    mixed: Site
    """Input of the output projection of attention: all heads, side by side."""
    mlp: Site
    """Output of the MLP, before any scale."""
    values: tuple[Site, slice] | None
    """Output that has the values of attention, and their channels; None if none are needed."""
    projection: Float[Tensor, "head k d"]
    """Rows of the output projection of each head, scaled."""
    constant: Float[Tensor, " d"]
    """Bias of the output projection, scaled; it counts as part of the input."""
    scale: Float[Tensor, " d"]
    """Scale of the MLP's output."""
    tokens: dict[str, slice]
    """Tokens of an image that are no patches, by the name of their component."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the components, in the order of `read`."""
        heads = (f"head{k}" for k in range(len(self.projection)))
        return (INPUT, *heads, *self.tokens, MLP)

    @torch.no_grad()
    def read(self, inputs: Any) -> Float[Tensor, "component sample token d"]:
        """Components of the layer's output for a batch of inputs."""
        read = read_activations(self.network, inputs, (self.before, self.mixed, self.mlp))
        before, mixed, mlp = read.values()
        apart = [self._from_tokens(inputs, tokens) for tokens in self.tokens.values()]
        n_heads = len(self.projection)
        heads = torch.einsum(
            "sthk,hkd->hstd", (mixed - sum(apart)).unflatten(-1, (n_heads, -1)), self.projection
        )
        rows = self.projection.flatten(0, 1)
        added = [each @ rows for each in apart]
        return torch.stack([before + self.constant, *heads, *added, mlp * self.scale])

    def _from_tokens(self, inputs: Any, tokens: slice) -> Float[Tensor, "sample token channel"]:
        """Mixed values of some tokens alone, before the output projection of attention."""
        assert self.values is not None
        site, channels = self.values

        def keep(values: Tensor) -> Tensor:
            kept = values.clone()
            kept[..., channels] = 0
            kept[:, tokens, channels] = values[:, tokens, channels]
            return kept

        with intervene(self.network, {site: keep}):
            return read_activations(self.network, inputs, (self.mixed,))[self.mixed]


@torch.no_grad()
def decompose_layer(network: nn.Module, site: Site, inputs: Tensor) -> LayerComponents:
    """Find the components whose sum is the output of a layer.

    Args:
        network: Any module; called as `network(inputs)`.
        site: Output of a layer, such as `encoder.layer.3`.
        inputs: A few samples.

    Raises:
        SiteError: The site is no layer whose output is its input, attention and MLP added up.
    """
    root = unwrapped(network)
    expect_patterns(network, inputs, [site], ["bpc"], "A sum of heads and an MLP")
    calls = [
        call
        for call in trace(network, inputs, [site]).finished_calls()
        if call.name.startswith(f"{site.module}.") and weight_of(call.module) is not None
    ]
    heads = {id(call): _heads(root, call) for call in calls}
    mixing = [call for call in calls if heads[id(call)]]
    others = [call for call in calls if call not in mixing]
    if site.take != "output" or site.branch or len(mixing) != 1 or not others:
        raise SiteError(
            f"{site} is no layer with one attention and an MLP: a layer's output is needed, and "
            f"inside {len(mixing)} linear layers were found that mix heads, {len(others)} others. "
            "Heads are known by an attribute `num_heads` or `num_attention_heads` of the attention."
        )
    mixed, mlp = mixing[0], others[-1]
    projection, n_heads = weight_of(mixed.module), heads[id(mixed)]
    assert projection is not None
    before = dataclasses.replace(site, take="input", axes=None)
    ends = before, Site(mixed.name), Site(mlp.name), site
    scales = _scales(list(read_activations(network, inputs, ends).values()), site)
    bias = getattr(mixed.module, "bias", None)
    tokens = _tokens(root, inputs, mixed.tensors[0].shape[1])
    return LayerComponents(
        network=network,
        before=before,
        mixed=Site(mixed.name, take="input"),
        mlp=Site(mlp.name),
        values=_values(calls[: calls.index(mixed)], len(projection), site) if tokens else None,
        projection=(projection * scales[0]).unflatten(0, (n_heads, -1)),
        constant=scales[0] * (bias.detach() if isinstance(bias, Tensor) else 0.0),
        scale=scales[1],
        tokens=tokens,
    )


def weight_of(module: nn.Module) -> Tensor | None:
    """The matrix (n_in, n_out) of a linear layer; `None` for other modules."""
    if isinstance(module, nn.Linear):
        return module.weight.detach().T
    if type(module).__name__ == "Conv1D":  # transformers' name of a linear layer in GPT-2
        return module.get_parameter("weight").detach()
    return None


def patches_of(network: nn.Module, inputs: Tensor, n_tokens: int) -> tuple[int, int]:
    """Side of the square of patches that the tokens of an image form, and number of the others.

    The patches are those of the first convolution whose steps are as large as its kernel; without
    one, the largest square that leaves few tokens. The side is 0 if there is none.
    """
    side = int(inputs.shape[-1])
    steps = [
        m.stride[0] for m in network.modules()
        if isinstance(m, nn.Conv2d) and m.stride == m.kernel_size and m.stride[0] > 1
    ]  # fmt: skip
    for grid in (*(side // step for step in steps[:1]), math.isqrt(n_tokens)):
        if grid > 1 and 0 <= n_tokens - grid * grid <= MOST_APART:
            return grid, n_tokens - grid * grid
    return 0, n_tokens


def _heads(root: nn.Module, call: ModuleCall) -> int:
    """Number of heads, side by side, that a linear layer is given."""
    return sum(name.startswith("head") for name in branches_of(root, call.name, "input"))


def _scales(read: list[Tensor], site: Site) -> Float[Tensor, "2 d"]:
    """Scales of each channel of attention and MLP with which they add up to a layer's output."""
    before, *added, after = (each.flatten(0, -2).double() for each in read)
    scales = before.new_ones(2, before.shape[-1])
    if not same_numbers((before + sum(added)).to(read[-1]), read[-1].flatten(0, -2)):
        columns = torch.stack(added, dim=-1).transpose(0, 1)  # (channel, row, 2)
        scales = torch.linalg.lstsq(columns, (after - before).T[..., None]).solution[..., 0].T
    repeated = before + scales[0] * added[0] + scales[1] * added[1]
    if len(before) < 4 or not same_numbers(repeated.to(read[-1]), read[-1].flatten(0, -2)):
        raise SiteError(
            f"The output of {site} is not the sum of its input, its attention and its MLP, as "
            "where a layer normalizes after adding: it has no components to compare."
        )
    return scales.to(read[-1])


def _values(calls: list[ModuleCall], width: int, site: Site) -> tuple[Site, slice]:
    """Output that has the values of attention, among the linear layers before its projection."""
    for call in calls:
        if call.name.rpartition(".")[2].startswith("v"):
            return Site(call.name), slice(None)
        if call.output.shape[-1] == 3 * width:  # queries, keys and values side by side
            return Site(call.name), slice(2 * width, None)
    raise SiteError(
        f"The values of attention inside {site} were not found among "
        f"{', '.join(call.name for call in calls) or 'no linear layers'}; a layer whose name "
        "begins with `v`, or one of queries, keys and values side by side, was expected."
    )


def _tokens(root: nn.Module, inputs: Tensor, n_tokens: int) -> dict[str, slice]:
    """Tokens of a square image that come before its patches, by name."""
    is_square = inputs.ndim == 4 and inputs.shape[-1] == inputs.shape[-2]
    side, apart = patches_of(root, inputs, n_tokens) if is_square else (0, 0)
    if not side or not apart:
        return {}
    holders = (held for m in root.modules() for held in (m, getattr(m, "config", None)))
    counts = (
        getattr(held, name, None)
        for held in holders
        for name in ("num_register_tokens", "num_reg_tokens")
    )
    registers = next((n for n in counts if isinstance(n, int)), 0)
    if 0 < registers <= apart:
        named = {CLASS: slice(0, apart - registers), REGISTERS: slice(apart - registers, apart)}
        return {name: at for name, at in named.items() if at.start < at.stop}
    return {CLASS if apart == 1 else SPECIAL: slice(0, apart)}
