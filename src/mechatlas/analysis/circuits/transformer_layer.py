"""How one layer of a transformer computes its output from its input.

    connect             two sites -> a `Wiring` of maps, or a `TransformerLayer` of sequences
    TransformerLayer    attention, then an MLP of two linear maps, each added to its input; `run`
                        repeats it, `nonlinearities` gives attention, normalization and slopes

Nothing is read from names: the linear maps and normalisations are those that were called, in
their order, and a layer is used only if it gives the very numbers the network gave. Samples are
whole windows of tokens, so there is no padding to mask.

To look like maps, sequences are (sample, channel, 1, token).
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mechatlas.activations.sites import branches_of, read, select
from mechatlas.analysis.circuits.wiring import Route, Wiring, trace_wiring
from mechatlas.base import Site, SiteError

ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    functional.gelu,
    lambda z: functional.gelu(z, approximate="tanh"),
    torch.relu,
    functional.silu,
    lambda z: z * (1.702 * z).sigmoid(),
)
"""What an MLP may do between its linear maps; the one that gives its numbers is taken."""


class Affine(NamedTuple):
    """A linear map of rows and what it adds."""

    weight: Float[Tensor, "n_in n_out"]
    bias: Tensor | float

    def __call__(self, x: Tensor) -> Tensor:
        """Run it."""
        return x @ self.weight + self.bias


class Norm(NamedTuple):
    """A layer normalisation."""

    scale: Float[Tensor, " d"]
    shift: Float[Tensor, " d"]
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Run it."""
        return functional.layer_norm(x, x.shape[-1:], self.scale, self.shift, self.eps)

    def size(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows"]:
        """What it multiplies a row by."""
        return (x.var(dim=-1, correction=0) + self.eps).rsqrt()

    def held(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """Its linear part, where that number is held at 1."""
        return (x - x.mean(dim=-1, keepdim=True)) * self.scale


class LayerNonlinearities(NamedTuple):
    """How the steps of a layer that are not linear stand on some samples."""

    pattern: Float[Tensor, "sample head query key"]
    """What each position takes of every other; before that, of what is normalised there."""
    after: Float[Tensor, "sample token"]
    """What normalisation multiplies what a position took by, where it goes past the MLP."""
    inner: Float[Tensor, "sample token hidden"]
    """The same by way of the MLP, times the slope of its activation."""


@dataclasses.dataclass(frozen=True, eq=False)
class TransformerLayer:
    """One layer of a transformer."""

    source: Site
    target: Site
    writes: slice
    reads: slice
    source_channels: int
    routes: tuple[Route, ...]
    """Past attention or by one of its heads, and then past the MLP or by it."""
    query: Affine
    key: Affine
    value: Affine
    mixed: Affine
    """From the heads, side by side."""
    up: Affine
    down: Affine
    activation: Callable[[Tensor], Tensor]
    n_heads: int
    causal: bool
    order: Literal["before", "after", "none"]
    """Whether it normalises before attention and MLP, or after adding what they gave."""
    norms: tuple[Norm, Norm] | None

    def run(self, x: Float[Tensor, "sample channel 1 token"]) -> Float[Tensor, "sample c 1 token"]:
        """What the target gives if the source gives `x`."""
        return _as_map(self._pass(_as_rows(x))[-1])

    @torch.no_grad()
    def nonlinearities(self, x: Float[Tensor, "sample channel 1 token"]) -> LayerNonlinearities:
        """How its steps stand where the source gives `x`."""
        rows = _as_rows(x)
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
        """What positions that look at rows are given by a head, per unit of attention."""
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
        """What the target is given, past the MLP or by it, with normalisation held at 1."""
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
        """Patterns, the sum with what attention gave, what the MLP activates, and the output."""
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


def _as_rows(x: Tensor) -> Tensor:
    return x[:, :, 0].transpose(1, 2)


def _as_map(rows: Tensor) -> Tensor:
    return rows.transpose(1, 2)[:, :, None]


def as_maps(activations: Tensor) -> Float[Tensor, "sample channel y x"]:
    """Activations of a site's module as maps, sequences too."""
    return _as_map(activations) if activations.ndim == 3 else activations


def connect(
    network: nn.Module, source: Site, target: Site, inputs: Tensor
) -> Wiring | TransformerLayer:
    """How one site is computed from another: of maps by any steps, of sequences by one layer.

    Args:
        network: In evaluation mode.
        source: The earlier site.
        target: The later one.
        inputs: A few samples.

    Raises:
        SiteError: The sites are not consecutive, or a step between them is of another kind.
    """
    whole = [dataclasses.replace(site, branch=None) for site in (source, target)]
    with torch.no_grad():
        found = read(network, inputs, whole)
    if {found[site].ndim for site in whole} == {3}:
        return _layer(network, source, target, inputs)
    return trace_wiring(network, source, target, inputs)


class _Call(NamedTuple):
    name: str
    module: nn.Module
    given: Tensor
    out: Tensor


@torch.no_grad()
def _layer(network: nn.Module, source: Site, target: Site, inputs: Tensor) -> TransformerLayer:
    ends, calls, entered = _calls(network, source, target, inputs)
    before, after = ends
    if entered is None or before.shape != entered.shape or not torch.equal(before, entered):
        raise SiteError(
            f"Sites {source} and {target} are not consecutive: the module of {target} is not "
            f"given what the module of {source} gives. Give the outputs of layers that follow "
            "each other."
        )
    linear = [call for call in calls if _weight(call.module) is not None]
    parts = _parts(linear, source, target)
    order, norms = _norms(calls, linear, source, target)
    d = before.shape[-1]
    heads = _n_heads(network, target)
    routes = tuple(
        Route(" > ".join(filter(None, (name, mlp))) or "direct", (), (), slice(0, d))
        for mlp in ("", "mlp")
        for name in ("", *(f"head{k}" for k in range(heads)))
    )
    up, down = linear[-2:]
    for causal in (False, True):
        for activation in ACTIVATIONS:
            if not _near(activation(up.out), down.given):
                continue
            layer = TransformerLayer(
                source, target, _all(select(network, source), d), _all(select(network, target), d),
                d, routes, *parts, activation, heads, causal, order, norms,
            )  # fmt: skip
            if _near(layer.run(_as_map(before)), _as_map(after)):
                return layer
    raise SiteError(
        f"What {target} computes from {source} could not be repeated as attention and an MLP "
        f"({_said(linear)}): positions that are turned into queries and keys, gated MLPs and "
        "masks cannot be composed."
    )


def _all(channels: slice, width: int) -> slice:
    return slice(*channels.indices(width)[:2])


def _near(a: Tensor, b: Tensor) -> bool:
    tolerance = 1024 * torch.finfo(b.dtype).eps * float(b.abs().max())
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance


def _calls(
    network: nn.Module, source: Site, target: Site, inputs: Tensor
) -> tuple[tuple[Tensor, Tensor], list[_Call], Tensor | None]:
    """Values of both sites, what was called inside the target's module, and what it was given."""
    whole = [dataclasses.replace(site, branch=None) for site in (source, target)]
    calls: list[_Call] = []
    given: list[Tensor] = []
    module = network.get_submodule(target.module)

    def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
        given.extend(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))

    with ExitStack() as hooks:
        handle = module.register_forward_pre_hook(enter, with_kwargs=True)
        hooks.callback(handle.remove)
        for name, inner in module.named_modules():
            if _weight(inner) is not None or _is_norm(inner):
                hooks.callback(
                    inner.register_forward_hook(
                        lambda m, args, out, name=name: calls.append(_Call(name, m, args[0], out))
                    ).remove
                )
        found = read(network, inputs, whole)
    return (found[whole[0]], found[whole[1]]), calls, given[0] if given else None


def _weight(module: nn.Module) -> Tensor | None:
    """The matrix (n_in, n_out) of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.weight.detach().T
    if type(module).__name__ == "Conv1D":  # transformers' name of a linear layer in GPT-2
        return module.get_parameter("weight").detach()
    return None


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or "norm" in type(module).__name__.lower()


def _affine(module: nn.Module) -> Affine:
    weight, bias = _weight(module), getattr(module, "bias", None)
    assert weight is not None
    return Affine(weight, bias.detach() if isinstance(bias, Tensor) else 0.0)


def _said(linear: Sequence[_Call]) -> str:
    return ", ".join(f"{c.name} {c.given.shape[-1]} -> {c.out.shape[-1]}" for c in linear) or "none"


def _parts(
    linear: Sequence[_Call], source: Site, target: Site
) -> tuple[Affine, Affine, Affine, Affine, Affine, Affine]:
    """Queries, keys, values, the mixing of heads, and both maps of the MLP.

    Raises:
        SiteError: The layer has other linear maps.
    """
    *made, mixed, up, down = [_affine(call.module) for call in linear] if len(linear) > 3 else []
    if len(linear) == 4 and made[0].weight.shape[1] % 3 == 0:
        fused = made[0]
        biases = fused.bias.chunk(3) if isinstance(fused.bias, Tensor) else (0.0,) * 3
        pairs = zip(fused.weight.chunk(3, dim=1), biases, strict=True)
        made = [Affine(weight, bias) for weight, bias in pairs]
    d = linear[0].given.shape[-1] if linear else 0
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
    raise SiteError(
        f"The module of {target} after {source} has the linear maps {_said(linear)}; circuits "
        "through transformers need queries, keys and values (together or apart), one map that "
        "mixes the heads, and an MLP of two maps."
    )


def _norms(
    calls: Sequence[_Call], linear: Sequence[_Call], source: Site, target: Site
) -> tuple[Literal["before", "after", "none"], tuple[Norm, Norm] | None]:
    """Where a layer normalises.

    Raises:
        SiteError: Elsewhere than before or after both parts, or by other means.
    """
    found = [call for call in calls if _is_norm(call.module)]
    mixed, down = (next(k for k, c in enumerate(calls) if c is linear[i]) for i in (-3, -1))
    places = [next(k for k, c in enumerate(calls) if c is call) for call in found]
    if not found:
        return "none", None
    plain = all(isinstance(call.module, nn.LayerNorm) for call in found)
    if plain and len(found) == 2:
        first, second = (_norm(call.module) for call in found)
        if places[0] == 0 and mixed < places[1] < down:
            return "before", (first, second)
        if mixed < places[0] < down < places[1]:
            return "after", (first, second)
    raise SiteError(
        f"The module of {target} after {source} normalises by "
        f"{', '.join(f'{c.name} ({type(c.module).__name__})' for c in found)}; circuits need "
        "LayerNorm twice, before attention and MLP or after both."
    )


def _norm(module: nn.Module) -> Norm:
    assert isinstance(module, nn.LayerNorm)
    d = module.normalized_shape[-1]
    scale = torch.ones(d) if module.weight is None else module.weight.detach()
    shift = torch.zeros(d) if module.bias is None else module.bias.detach()
    return Norm(scale, shift, module.eps)


def _n_heads(network: nn.Module, target: Site) -> int:
    """Heads of the attention inside a module.

    Raises:
        SiteError: None is known.
    """
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
