"""Layer of a transformer, repeated outside of the network.

    connect             two sites -> a `Wiring` of maps, or an `AttentionLayer` of sequences
    TransformerLayer    attention, then an MLP of two linear maps, each added to its input; `run`
                        repeats it, `nonlinearities` gives attention, normalization and slopes

Nothing is read from names: linear maps and normalizations are those that were called, in their
order, and a layer is used only if it gives the same numbers as the network. Samples are whole
windows of tokens, so there is no padding to mask.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

from mechatlas.activations.branches import branches_of, select
from mechatlas.activations.components import weight_of
from mechatlas.activations.layouts import expect_patterns
from mechatlas.activations.normalization import Normalization, is_norm, norm_of
from mechatlas.activations.tracing import ModuleCall, Trace, same_numbers, trace
from mechatlas.analysis.circuits.decoder_layer import decoder_layer
from mechatlas.analysis.circuits.layer_parts import (
    AttentionLayer,
    LayerNonlinearities,
    Projection,
    as_maps,
    as_rows,
    projection_of,
)
from mechatlas.analysis.circuits.wiring import Wiring, channel_range, trace_wiring
from mechatlas.base import Site, SiteError

ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    functional.gelu,
    lambda z: functional.gelu(z, approximate="tanh"),
    torch.relu,
    functional.silu,
    lambda z: z * (1.702 * z).sigmoid(),
)
"""Activation functions of MLPs; the one that gives the network's numbers is taken."""
GATED = 7
"""Number of linear maps of a layer with a gated MLP."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TransformerLayer(AttentionLayer):
    """Layer with an MLP of two linear maps, whose attention is that of its rows alone."""

    query: Projection
    key: Projection
    value: Projection
    mixed: Projection
    """Output projection of attention, from the concatenated heads."""
    up: Projection
    down: Projection
    activation: Callable[[Tensor], Tensor]
    causal: bool
    order: Literal["before", "after", "none"]
    """Whether it normalizes before attention and MLP, or after the sum with their input."""
    norms: tuple[Normalization, Normalization] | None

    def run(self, x: Float[Tensor, "sample channel 1 token"]) -> Float[Tensor, "sample c 1 token"]:
        """Activations of the target for activations `x` of the source."""
        return as_maps(self._pass(as_rows(x))[-1])

    @torch.no_grad()
    def nonlinearities(self, x: Float[Tensor, "sample channel 1 token"]) -> LayerNonlinearities:
        """Nonlinear factors of the layer where the source gives `x`."""
        rows = as_rows(x)
        pattern, taken, before, _ = self._pass(rows)
        with torch.enable_grad():
            start = before.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.activation(start).sum(), start)
        after = torch.ones_like(rows[..., 0])
        if self.norms is None:
            return LayerNonlinearities(pattern, after, slope)
        first, second = self.norms
        if self.order == "before":
            pattern = pattern * first.size(rows)[:, None, None]
            return LayerNonlinearities(pattern, after, slope * second.size(taken)[..., None])
        given = first(taken)
        whole = given + self.down(self.activation(before))
        after = first.size(taken) * second.size(whole)
        return LayerNonlinearities(pattern, after, slope * after[..., None])

    def carried(self, rows: Float[Tensor, "n d"], head: int | None) -> Float[Tensor, "n d"]:
        """Rows as a head writes them, per unit of attention; unchanged past attention."""
        if head is None:
            return rows
        if self.norms is not None and self.order == "before":
            rows = self.norms[0].held(rows)
        width = self.value.weight.shape[1] // self.n_heads
        own = slice(head * width, (head + 1) * width)
        return rows @ self.value.weight[:, own].to(rows) @ self.mixed.weight[own].to(rows)

    def finished(
        self, rows: Float[Tensor, "n d"], inner: Float[Tensor, "#n hidden"] | None
    ) -> Float[Tensor, "n d"]:
        """Rows as they reach the target, past the MLP or through it; normalization is held at 1."""
        if self.norms is not None and self.order == "after":
            rows = self.norms[0].held(rows)
        elif self.norms is not None and inner is not None:
            rows = self.norms[1].held(rows)
        if inner is not None:
            rows = (rows @ self.up.weight.to(rows) * inner) @ self.down.weight.to(rows)
        if self.norms is not None and self.order == "after":
            rows = self.norms[1].held(rows)
        return rows

    def _pass(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Attention patterns, residual stream after attention, MLP pre-activations, and output."""
        first, second = self.norms or (_same, _same)
        early, late = (first, second) if self.order == "before" else (_same, _same)
        given = early(rows)
        q, k, v = (
            part(given).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        if self.causal:
            later = torch.ones(scores.shape[2:], dtype=torch.bool, device=rows.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        pattern = scores.softmax(dim=-1)
        taken = rows + self.mixed((pattern @ v).transpose(1, 2).flatten(2))
        stream = first(taken) if self.order == "after" else taken
        before = self.up(late(stream))
        out = stream + self.down(self.activation(before))
        return pattern, taken, before, second(out) if self.order == "after" else out


def _same(x: Tensor) -> Tensor:
    return x


def connect(
    network: nn.Module, source: Site, target: Site, inputs: Shaped[Tensor, "_ ..."]
) -> Wiring | AttentionLayer:
    """Read the computation between two sites: of maps any wiring, of sequences one layer.

    Args:
        network: In evaluation mode.
        source: The earlier site.
        target: The later one.
        inputs: A few samples.

    Raises:
        SiteError: The sites are not consecutive, or an operation between them cannot be composed.
    """
    traced = trace(network, inputs, [source, target])
    if {activations.ndim for activations in traced.activations.values()} == {3}:
        expect_patterns(network, inputs, [source, target], ["bpc"], "A circuit between sequences")
        return _layer(network, source, target, traced)
    return trace_wiring(network, source, target, inputs)


@torch.no_grad()
def _layer(network: nn.Module, source: Site, target: Site, traced: Trace) -> AttentionLayer:
    before, after = traced.activations[source], traced.activations[target]
    module = network.get_submodule(target.module)
    own = [call for call in traced.calls if call.module is module][(target.call or 1) - 1]
    entered = own.tensors
    if not entered or before.shape != entered[0].shape or not torch.equal(before, entered[0]):
        raise SiteError(
            f"Sites {source} and {target} are not consecutive: the module of {target} is not "
            f"given what the module of {source} gives. Give the outputs of layers that follow "
            "each other."
        )
    inside = {id(m) for m in module.modules()}
    calls = [
        call
        for call in traced.finished_calls()
        if id(call.module) in inside and call.started >= own.started
    ]
    linear = [call for call in calls if weight_of(call.module) is not None]
    d = before.shape[-1]
    writes, reads = (channel_range(select(network, site), d, site) for site in (source, target))
    if len(linear) == GATED:
        ends = source, target, writes, reads
        gated = decoder_layer(own, calls, after, ends, _n_heads(network, target), ACTIVATIONS)
        if gated is not None:
            return gated
    query, key, value, mixed, up, down = _parts(linear, source, target)
    order, norms = _norms(calls, linear, source, target)
    heads = _n_heads(network, target)
    hidden, activated = linear[-2].output, linear[-1].tensors[0]
    # Both forms of GELU may agree within the tolerance, so the closest is taken.
    candidates = ACTIVATIONS if hidden.shape == activated.shape else ()
    errors = [float((f(hidden) - activated).abs().max()) for f in candidates]
    activation = ACTIVATIONS[int(np.argmin(errors))] if errors else torch.relu
    for causal in (False, True):
        if same_numbers(activation(hidden), activated):
            layer = TransformerLayer(
                source=source, target=target, writes=writes, reads=reads, source_channels=d,
                n_heads=heads, n_hidden=up.weight.shape[1], query=query, key=key, value=value,
                mixed=mixed, up=up, down=down, activation=activation, causal=causal, order=order,
                norms=norms,
            )  # fmt: skip
            if same_numbers(layer.run(as_maps(before)), as_maps(after)):
                return layer
    raise SiteError(
        f"What {target} computes from {source} could not be repeated as attention and an MLP "
        f"({_names_of(linear, target)}): attention of other rows than those of the layer, experts "
        "and masks of an encoder cannot be composed."
    )


def _inner(call: ModuleCall, target: Site) -> str:
    return call.name.removeprefix(f"{target.module}.")


def _names_of(linear: Sequence[ModuleCall], target: Site) -> str:
    shapes = (
        f"{_inner(call, target)} {call.tensors[0].shape[-1]} -> {call.output.shape[-1]}"
        for call in linear
    )
    return ", ".join(shapes) or "none"


def _parts(
    linear: Sequence[ModuleCall], source: Site, target: Site
) -> tuple[Projection, Projection, Projection, Projection, Projection, Projection]:
    """Projections to queries, keys and values, output projection, and both maps of the MLP."""
    refusal = SiteError(
        f"The module of {target} after {source} has the linear maps {_names_of(linear, target)}; "
        "circuits through transformers need queries, keys and values (together or apart), one map "
        "that mixes the heads, and an MLP of two maps."
    )
    if len(linear) < 4:
        raise refusal
    *made, mixed, up, down = (projection_of(call.module) for call in linear)
    if len(linear) == 4 and made[0].weight.shape[1] % 3 == 0:
        fused = made[0]
        biases = fused.bias.chunk(3) if isinstance(fused.bias, Tensor) else (0.0,) * 3
        pairs = zip(fused.weight.chunk(3, dim=1), biases, strict=True)
        made = [Projection(weight, bias) for weight, bias in pairs]
    d = linear[0].tensors[0].shape[-1]
    shapes = [(m.weight.shape[0], m.weight.shape[1]) for m in made]
    if (
        len(made) == 3
        and len(set(shapes)) == 1
        and mixed.weight.shape == (shapes[0][1], d)
        and up.weight.shape == (d, down.weight.shape[0])
        and down.weight.shape[1] == d
    ):
        query, key, value = made
        return query, key, value, mixed, up, down
    raise refusal


def _norms(
    calls: Sequence[ModuleCall], linear: Sequence[ModuleCall], source: Site, target: Site
) -> tuple[Literal["before", "after", "none"], tuple[Normalization, Normalization] | None]:
    """Position of normalization in a layer, and its weights."""
    normalizing = [call for call in calls if is_norm(call.module)]
    calls = [call for call in calls if is_norm(call.module) or weight_of(call.module) is not None]
    mixed, down = (calls.index(linear[i]) for i in (-3, -1))
    places = [calls.index(call) for call in normalizing]
    if not normalizing:
        return "none", None
    plain = all(isinstance(call.module, nn.LayerNorm) for call in normalizing)
    if plain and len(normalizing) == 2:
        first, second = (norm_of(call) for call in normalizing)
        if places[0] == 0 and mixed < places[1] < down:
            return "before", (first, second)
        if mixed < places[0] < down < places[1]:
            return "after", (first, second)
    raise SiteError(
        f"The module of {target} after {source} normalizes by "
        f"{', '.join(f'{_inner(c, target)} ({type(c.module).__name__})' for c in normalizing)}; "
        "circuits need LayerNorm twice, before attention and MLP or after both."
    )


def _n_heads(network: nn.Module, target: Site) -> int:
    """Number of attention heads inside a module."""
    prefix = f"{target.module}."
    for name, _ in network.named_modules():
        if name.startswith(prefix):
            for take in ("output", "input"):
                heads = [b for b in branches_of(network, name, take) if b.startswith("head")]
                if heads:
                    return len(heads)
    raise SiteError(
        f"The number of attention heads inside {target} is not known. Name them in an attribute "
        "`branches` of the attention module: {'head0': slice(0, 32), ...}."
    )
