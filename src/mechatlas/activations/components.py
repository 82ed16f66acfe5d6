"""Components of the residual stream after a layer of a transformer, which is their sum.

    decompose_layer    network, site of a layer's output, a few inputs -> `LayerComponents`
    LayerComponents    names of the components; `read` gives them for a batch

The components are what the layer was given, what each head of attention adds (its part of what
attention mixes, times its rows of the output projection), and what the MLP adds. What attention
brings from the tokens of an image that are no patches (class token, registers) is apart from the
heads: it is read with the values of all other tokens set to 0, which changes no attention pattern.
Where a layer normalizes sums, or what it adds, its components pass the normalization with its
factor held at its value on all of them, so that they add up to the output; its shift counts as part
of the input.

A layer is decomposed only if the components add up to its output. Scales of channels after
attention and MLP (LayerScale) are found by that sum.
"""

import dataclasses
import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mechatlas.activations.branches import branches_of
from mechatlas.activations.layouts import Layout, expect_patterns, layouts_of
from mechatlas.activations.normalization import Normalization, is_norm, norm_of
from mechatlas.activations.passes import evaluation_mode, unwrapped
from mechatlas.activations.sites import intervene, read_activations
from mechatlas.activations.tracing import ModuleCall, same_numbers, trace
from mechatlas.activations.values import tensors_in
from mechatlas.base import Site, SiteError

INPUT, MLP = "input", "mlp"
CLASS, REGISTERS, SPECIAL = "class token", "registers", "special tokens"
MOST_APART = 16
"""Largest number of tokens beside the patches of an image: class, distillation, registers."""
Rows = Float[Tensor, "sample token channel"]


@dataclasses.dataclass(frozen=True, eq=False)
class MixingLayer:
    """Attention whose heads are given, side by side, to a linear layer."""

    name: str
    """Name of the linear layer."""
    values: tuple[Site, slice] | None
    """Output that has the values of attention, and their channels; None if none are needed."""
    layout: Layout

    def read(
        self, network: nn.Module, inputs: Any, sites: Sequence[Site], tokens: Sequence[slice]
    ) -> list[Rows]:
        """Read activations of sites, what attention mixes, and of this what some tokens bring.

        Args:
            network: Network of the layer.
            inputs: Batch of inputs.
            sites: Further sites to read.
            tokens: Tokens whose values alone are mixed, for each further result.
        """
        mixed = Site(self.name, take="input")
        read = read_activations(network, inputs, (*sites, mixed))
        found = [self.layout.rows(each) for each in read.values()]
        for each in tokens:
            assert self.values is not None
            site, channels = self.values

            def keep(values: Tensor, each: slice = each, channels: slice = channels) -> Tensor:
                rows = self.layout.rows(values)
                kept = rows.clone()
                kept[..., channels] = 0
                kept[:, each, channels] = rows[:, each, channels]
                return self.layout.undo(kept, values)

            with intervene(network, {site: keep}):
                brought = read_activations(network, inputs, (mixed,))[mixed]
            found.append(self.layout.rows(brought))
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class MultiheadModule:
    """Attention by `nn.MultiheadAttention`, which calls no layers: its patterns are asked for."""

    name: str
    """Name of the module."""
    layout: Layout

    def read(
        self, network: nn.Module, inputs: Any, sites: Sequence[Site], tokens: Sequence[slice]
    ) -> list[Rows]:
        """Read activations of sites, what attention mixes, and of this what some tokens bring.

        Args:
            network: Network of the module.
            inputs: Batch of inputs.
            sites: Further sites to read.
            tokens: Tokens whose values alone are mixed, for each further result.

        Raises:
            SiteError: The module attends to more than its tokens.
        """
        module = unwrapped(network).get_submodule(self.name)
        assert isinstance(module, nn.MultiheadAttention)
        given: dict[str, Any] = {}

        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given.update(inspect.signature(module.forward).bind(*args, **kwargs).arguments)

        handle = module.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            read = read_activations(network, inputs, sites)
        finally:
            handle.remove()
        given |= {"need_weights": True, "average_attn_weights": False}
        with evaluation_mode(module):
            pattern = module.forward(**given)[1]
        value = given["value"] if module.batch_first else given["value"].transpose(0, 1)
        d, weight, bias = module.embed_dim, module.in_proj_weight, module.in_proj_bias
        weight = module.v_proj_weight if weight is None else weight[-d:]
        values = functional.linear(value, weight, None if bias is None else bias[-d:])
        values = values.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        if pattern is None or pattern.shape[-1] != values.shape[2]:
            raise SiteError(
                f"{self.name} attends to more than its tokens (`bias_kv`, `add_zero_attn`), which "
                "are no components of a layer."
            )
        mixed = [pattern[..., t] @ values[:, :, t] for t in (slice(None), *tokens)]
        rows = [self.layout.rows(each) for each in read.values()]
        return [*rows, *(each.transpose(1, 2).flatten(2) for each in mixed)]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LayerComponents:
    """Layer of a transformer whose output is the sum of named components."""

    network: nn.Module
    before: Site
    """Input of the layer."""
    attention: MixingLayer | MultiheadModule
    mlp: Site
    """Output of the MLP, before any scale."""
    projection: Float[Tensor, "head k d"]
    """Rows of the output projection of each head, scaled."""
    constant: Float[Tensor, " d"]
    """Bias of the output projection, scaled; it counts as part of the input."""
    scale: Float[Tensor, " d"]
    """Scale of the MLP's output."""
    tokens: dict[str, slice]
    """Tokens of an image that are no patches, by the name of their component."""
    norms: tuple[Normalization, Normalization] | None
    """Normalization of the sum with attention and of that with the MLP; None without."""
    of_added: bool = False
    """Whether attention and the output of the MLP are normalized before they are added."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the components, in the order of `read`."""
        heads = (f"head{k}" for k in range(len(self.projection)))
        return (INPUT, *heads, *self.tokens, MLP)

    @torch.no_grad()
    def read(self, inputs: Any) -> Float[Tensor, "component sample token d"]:
        """Components of the layer's output for a batch of inputs."""
        before, mlp, mixed, *apart = self.attention.read(
            self.network, inputs, (self.before, self.mlp), list(self.tokens.values())
        )
        heads = (mixed - sum(apart)).unflatten(-1, (len(self.projection), -1))
        rows = self.projection.flatten(0, 1)
        first, second = self.norms or (None, None)
        added = torch.stack(
            [
                self.constant.expand_as(before),
                *torch.einsum("sthk,hkd->hstd", heads, self.projection),
                *(each @ rows for each in apart),
            ]
        )
        written = (mlp * self.scale)[None]
        if self.of_added:
            added, written = _passed(added, first), _passed(written, second)
            first = second = None
        added[0] += before
        return _passed(torch.cat([_passed(added, first), written]), second)


def _passed(
    parts: Float[Tensor, "part sample token d"], norm: Normalization | None
) -> Float[Tensor, "part sample token d"]:
    """Parts of a sum as its normalization passes them on; the shift joins the first."""
    if norm is None:
        return parts
    passed = norm.held(parts) * norm.size(parts.sum(dim=0))[..., None]
    passed[0] += norm.shift
    return passed


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
    expect_patterns(network, inputs, [site], ["bpc", "pbc"], "A sum of heads and an MLP")
    layout = layouts_of(network, inputs, [site])[site]
    traced = trace(network, inputs, [site]).finished_calls()
    calls = [call for call in traced if call.name.startswith(f"{site.module}.")]
    linear = [call for call in calls if weight_of(call.module) is not None]
    heads = {call.name: _heads(root, call, calls) for call in calls}
    mixing = [call for call in calls if heads[call.name]]
    mixed = mixing[0] if len(mixing) == 1 else None
    later = [call for call in linear if mixed and call.started > (mixed.finished or 0)]
    if site.take != "output" or site.branch or mixed is None or not later:
        raise SiteError(
            f"{site} is no layer with one attention and an MLP: a layer's output is needed, and "
            f"inside {len(mixing)} modules were found that mix heads, and "
            f"{len(linear) - len(mixing)} other linear layers. "
            "Heads are known by an attribute `num_heads` or `num_attention_heads` of the attention."
        )
    multihead = isinstance(mixed.module, nn.MultiheadAttention)
    final: Any = mixed.module.out_proj if multihead else mixed.module
    projection, bias = weight_of(final), final.bias
    assert projection is not None
    before = dataclasses.replace(site, take="input", axes=None)
    norms = _norms(calls, mixed, later)
    ends = before, Site(mixed.name), Site(later[-1].name), site
    read = [layout.rows(x) for x in read_activations(network, inputs, ends).values()]
    scales = read[0].new_ones(2, read[0].shape[-1]) if norms else _scales(read)
    tokens = _tokens(root, inputs, read[0].shape[1])
    if multihead:
        attention = MultiheadModule(mixed.name, layout)
    else:
        earlier = linear[: linear.index(mixed)]
        values = _values(earlier, len(projection), site) if tokens else None
        attention = MixingLayer(mixed.name, values, layout)
    layer = LayerComponents(
        network=network,
        before=before,
        attention=attention,
        mlp=Site(later[-1].name),
        projection=(projection * scales[0]).unflatten(0, (heads[mixed.name], -1)),
        constant=scales[0] * (bias.detach() if isinstance(bias, Tensor) else 0.0),
        scale=scales[1],
        tokens=tokens,
        norms=norms,
    )
    forms = [layer, dataclasses.replace(layer, of_added=True)] if norms else [layer]
    for each in forms if read[0][..., 0].numel() >= 4 else ():
        if same_numbers(each.read(inputs).sum(dim=0), read[-1]):
            return each
    raise SiteError(
        f"The output of {site} is not the sum of its input, its attention and its MLP, normalized "
        "or not: it has no components to compare."
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


def _heads(root: nn.Module, call: ModuleCall, calls: list[ModuleCall]) -> int:
    """Number of heads that a module mixes: its own, or those side by side in its input."""
    if isinstance(call.module, nn.MultiheadAttention):
        return call.module.num_heads
    if weight_of(call.module) is None:
        return 0
    named = [branches_of(root, call.name, "input")]
    named += [
        branches_of(root, each.name)  # a module may give its heads to a layer outside of it
        for each in calls
        if any(tensor is call.tensors[0] for tensor in tensors_in(each.output))
    ]
    return max(sum(name.startswith("head") for name in each) for each in named)


def _norms(
    calls: list[ModuleCall], mixed: ModuleCall, later: list[ModuleCall]
) -> tuple[Normalization, Normalization] | None:
    """Normalization after attention and after the MLP, if the layer ends with it."""
    norms = [call for call in calls if is_norm(call.module)]
    between = [n for n in norms if (mixed.finished or 0) < n.started < later[0].started]
    last = [n for n in norms if n.started > (later[-1].finished or 0)]
    return (norm_of(between[0]), norm_of(last[0])) if between and last else None


def _scales(read: list[Rows]) -> Float[Tensor, "2 d"]:
    """Scales of each channel of attention and MLP with which they add up to a layer's output."""
    before, *added, after = (each.flatten(0, -2).double() for each in read)
    scales = before.new_ones(2, before.shape[-1])
    if not same_numbers((before + sum(added)).to(read[-1]), read[-1].flatten(0, -2)):
        columns = torch.stack(added, dim=-1).transpose(0, 1)  # (channel, row, 2)
        scales = torch.linalg.lstsq(columns, (after - before).T[..., None]).solution[..., 0].T
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
