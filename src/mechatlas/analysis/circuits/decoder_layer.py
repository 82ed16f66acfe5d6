"""Layer of a decoder with a gated MLP, run as the network runs it.

    decoder_layer    recorded calls of a layer -> a `DecoderLayer`
    DecoderLayer     the layer; `run` calls its module, `nonlinearities` reads it while it runs

Rotary positions, norms of queries and keys, shared keys, soft caps, windows and masks all end in
one attention pattern, and what attention mixes is linear in the values. So the pattern is read by
running the layer with values that are one at one token and one channel: nothing is assumed of how
scores are made. A layer is used only if its parts give the same numbers as the network.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mechatlas.activations.components import weight_of
from mechatlas.activations.normalization import Normalization, is_norm, norm_of
from mechatlas.activations.passes import evaluation_mode
from mechatlas.activations.tracing import ModuleCall, same_numbers
from mechatlas.activations.values import tensor_of
from mechatlas.analysis.circuits.layer_parts import (
    AttentionLayer,
    LayerNonlinearities,
    as_maps,
    as_rows,
    projection_of,
)
from mechatlas.base import Site


class GatedModules(NamedTuple):
    """Linear modules of a layer, in the order in which they are called."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    mixed: nn.Module
    """Output projection of attention."""
    gate: nn.Module
    up: nn.Module
    down: nn.Module


class Norms(NamedTuple):
    """Normalization of a layer, where there is one."""

    before_attention: Normalization | None = None
    after_attention: Normalization | None = None
    """Normalization of what attention gives, before it is added."""
    before_mlp: Normalization | None = None
    after_mlp: Normalization | None = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class DecoderLayer(AttentionLayer):
    """Layer whose MLP has gates, and whose attention may depend on positions."""

    repeat: Callable[[Tensor], Tensor]
    """Run of the layer's module on rows (sample, token, channel)."""
    modules: GatedModules
    norms: Norms
    activation: Callable[[Tensor], Tensor]

    def run(self, x: Float[Tensor, "sample channel 1 token"]) -> Float[Tensor, "sample c 1 token"]:
        """Activations of the target for activations `x` of the source."""
        return as_maps(self.repeat(as_rows(x)))

    @torch.no_grad()
    def nonlinearities(self, x: Float[Tensor, "sample channel 1 token"]) -> LayerNonlinearities:
        """Nonlinear factors of the layer where the source gives `x`."""
        rows, norms = as_rows(x), self.norms
        taken, gate, up, written = self.outputs(rows)
        pattern = self.pattern(rows)
        if norms.before_attention is not None:
            pattern = pattern * norms.before_attention.size(rows)[:, None, None]
        if norms.after_attention is not None:
            pattern = pattern * norms.after_attention.size(taken)[:, None, :, None]
            taken = norms.after_attention(taken)
        with torch.enable_grad():
            start = gate.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.activation(start).sum(), start)
        inner = torch.cat([slope * up, self.activation(gate)], dim=-1)
        if norms.before_mlp is not None:
            inner = inner * norms.before_mlp.size(rows + taken)[..., None]
        if norms.after_mlp is not None:
            inner = inner * norms.after_mlp.size(written)[..., None]
        return LayerNonlinearities(pattern, torch.ones_like(rows[..., 0]), inner)

    def outputs(self, rows: Float[Tensor, "sample token d"]) -> list[Tensor]:
        """Outputs of attention, of both maps into the MLP, and of the one out of it."""
        parts = self.modules.mixed, self.modules.gate, self.modules.up, self.modules.down
        seen: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, _args: Any, out: Any) -> None:
            seen[module] = out

        hooks = [part.register_forward_hook(keep) for part in parts]
        try:
            self.repeat(rows)
        finally:
            for hook in hooks:
                hook.remove()
        return [seen[part] for part in parts]

    def pattern(
        self, rows: Float[Tensor, "sample token d"]
    ) -> Float[Tensor, "sample head query key"]:
        """Attention patterns, read by values that are one at one token and one channel."""
        n, length, _ = rows.shape
        width = self.head_width
        n_values = projection_of(self.modules.value).weight.shape[1] // width
        parts = []
        for first in range(0, length, width):
            here = torch.arange(first, min(first + width, length), device=rows.device)
            probe = rows.new_zeros(n, length, n_values, width)
            probe[:, here, :, here - first] = 1.0
            with _stopped_at(self.modules, probe.flatten(2)) as mixed:
                self.repeat(rows)
            parts.append(mixed[0].unflatten(-1, (self.n_heads, width))[..., : len(here)])
        return torch.cat(parts, dim=-1).transpose(1, 2)

    @property
    def head_width(self) -> int:
        """Channels of a head."""
        return projection_of(self.modules.mixed).weight.shape[0] // self.n_heads

    def values_of(self, rows: Float[Tensor, "*rows d"], head: int) -> Float[Tensor, "*rows k"]:
        """Values of a head for normalized rows, without biases; heads may share them."""
        weight, width = projection_of(self.modules.value).weight, self.head_width
        own = head * (weight.shape[1] // width) // self.n_heads
        return rows @ weight[:, own * width : (own + 1) * width].to(rows)

    def carried(self, rows: Float[Tensor, "n d"], head: int | None) -> Float[Tensor, "n d"]:
        """Rows as a head writes them, per unit of attention; unchanged past attention."""
        if head is None:
            return rows
        own = slice(head * self.head_width, (head + 1) * self.head_width)
        values = self.values_of(_held(self.norms.before_attention, rows), head)
        rows = values @ projection_of(self.modules.mixed).weight[own].to(rows)
        return _held(self.norms.after_attention, rows)

    def finished(
        self, rows: Float[Tensor, "n d"], inner: Float[Tensor, "#n hidden"] | None
    ) -> Float[Tensor, "n d"]:
        """Rows as they reach the target, past the MLP or through it; normalization is held at 1."""
        if inner is None:
            return rows
        rows = _held(self.norms.before_mlp, rows)
        gate, up, down = (projection_of(module).weight.to(rows) for module in self.modules[-3:])
        by_gate, by_up = inner.chunk(2, dim=-1)
        return _held(self.norms.after_mlp, (rows @ gate * by_gate + rows @ up * by_up) @ down)


def _held(norm: Normalization | None, rows: Tensor) -> Tensor:
    return rows if norm is None else norm.held(rows)


class _Mixed(Exception):  # noqa: N818 - a signal, never leaves this module
    pass


@contextmanager
def _stopped_at(modules: GatedModules, values: Tensor) -> Iterator[list[Tensor]]:
    """Replace the values of attention, and stop where the heads are mixed, with what is mixed."""
    mixed: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple[Any, ...]) -> None:
        mixed.append(args[0])
        raise _Mixed

    hooks = [
        modules.value.register_forward_hook(lambda _m, _args, _out: values),
        modules.mixed.register_forward_pre_hook(stop),
    ]
    try:
        with suppress(_Mixed):
            yield mixed
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def decoder_layer(
    own: ModuleCall,
    calls: Sequence[ModuleCall],
    after: Float[Tensor, "sample token d"],
    ends: tuple[Site, Site, slice, slice],
    n_heads: int,
    activations: Sequence[Callable[[Tensor], Tensor]],
) -> DecoderLayer | None:
    """Find the parts of a layer with a gated MLP in the calls of its modules.

    Args:
        own: Call of the layer's module.
        calls: Calls inside of it, in the order of their ends.
        after: What the layer gave.
        ends: Both sites, and the channels that are written and read.
        n_heads: Number of attention heads.
        activations: Activation functions that are tried.

    Returns:
        The layer, or None if it is of another form.

    Raises:
        SiteError: It normalizes by other means.
    """
    source, target, writes, reads = ends
    linear = [call for call in calls if weight_of(call.module) is not None]
    if len(linear) != len(GatedModules._fields):
        return None
    rows, given = own.tensors[0], linear[-1].tensors[0]
    gate, up = linear[4], linear[5]
    if gate.output.shape != up.output.shape or given.shape != up.output.shape:
        return None
    # Both forms of GELU may agree within the tolerance, so the closest is taken.
    tried = [(float((f(g.output) * u.output - given).abs().max()), f, g, u)
             for f in activations for g, u in ((gate, up), (up, gate))]  # fmt: skip
    _, activation, gate, up = min(tried, key=lambda one: one[0])
    if not same_numbers(activation(gate.output) * up.output, given):
        return None
    modules = GatedModules(*(c.module for c in (*linear[:4], gate, up, linear[6])))
    layer = DecoderLayer(
        source=source, target=target, writes=writes, reads=reads, source_channels=rows.shape[-1],
        n_heads=n_heads, n_hidden=2 * given.shape[-1], repeat=_repeat(own, target),
        modules=modules, norms=_norms(calls, linear), activation=activation,
    )  # fmt: skip
    return layer if _is_right(layer, rows, after, linear) else None


def _repeat(own: ModuleCall, target: Site) -> Callable[[Tensor], Tensor]:
    """Function that calls a module again, with other rows for its first tensor."""
    n = len(own.tensors[0])
    args, kwargs = tree_map_only(
        Tensor, lambda t: t[:1] if t.ndim and len(t) == n else t, (own.args, own.kwargs)
    )
    # A cache of keys would be added to in every run.
    kwargs = {k: None if k.startswith("past_key_value") else v for k, v in kwargs.items()}
    place = next((i for i, value in enumerate(args) if isinstance(value, Tensor)), None)
    name = next((k for k, value in kwargs.items() if isinstance(value, Tensor)), "")
    module = own.module

    def repeat(rows: Tensor) -> Tensor:
        with evaluation_mode(module):
            if place is None:
                out = module(*args, **{**kwargs, name: rows})
            else:
                out = module(*args[:place], rows, *args[place + 1 :], **kwargs)
        return tensor_of(out, target)

    return repeat


def _norms(calls: Sequence[ModuleCall], linear: Sequence[ModuleCall]) -> Norms:
    """Normalization around attention and MLP; that of queries and keys is part of attention."""
    order = [call for call in calls if is_norm(call.module) or call in linear]
    first, mixed, gate, down = (order.index(linear[i]) for i in (0, 3, 4, 6))
    parts: dict[str, ModuleCall] = {}
    for number, call in enumerate(order):
        if call in linear or first < number < mixed:
            continue
        if number < first:
            parts["before_attention"] = call
        elif number > down:
            parts["after_mlp"] = call
        elif number < gate:
            after = torch.equal(call.tensors[0], linear[3].output)
            parts["after_attention" if after else "before_mlp"] = call
    return Norms(**{name: norm_of(call) for name, call in parts.items()})


def _is_right(
    layer: DecoderLayer, rows: Tensor, after: Tensor, linear: Sequence[ModuleCall]
) -> bool:
    """Whether the parts of a layer give what the network gave."""
    norms, (taken, _, _, written) = layer.norms, layer.outputs(rows)
    given = rows if norms.before_attention is None else norms.before_attention(rows)
    value = projection_of(layer.modules.value)
    bias = value.bias if isinstance(value.bias, Tensor) else rows.new_zeros(value.weight.shape[1])
    width, pattern = layer.head_width, layer.pattern(rows)
    heads = []
    for head in range(layer.n_heads):
        own = head * (len(bias) // width) // layer.n_heads
        values = layer.values_of(given, head) + bias[own * width : (own + 1) * width]
        heads.append(pattern[:, head] @ values)
    if norms.after_attention is not None:
        taken = norms.after_attention(taken)
    if norms.after_mlp is not None:
        written = norms.after_mlp(written)
    return (
        same_numbers(torch.cat(heads, dim=-1), linear[3].tensors[0])
        and same_numbers(rows + taken + written, after)
        and same_numbers(layer.repeat(rows), after)
    )
