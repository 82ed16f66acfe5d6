"""Stochastic parameter decomposition: a linear layer as a sum of rank-one subcomponents.

    decompose                  train subcomponents and their causal importances
    ParameterDecomposition     subcomponents by layer, importances, and those that suffice
    recovered_columns          subcomponents beside columns of the weights, the truth of toy models

A subcomponent whose causal importance is 0 on a sample can be taken out there, in part or whole,
and the output stays; the training looks for as few important ones as possible. The importance is a
function of the subcomponent's own inner activation.

Source: Bushnaq, Braun, Sharkey, Stochastic parameter decomposition (2025).
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechatlas.analysis.interaction.ablation import AblationCurve, find_needed
from mechatlas.analysis.interaction.interaction_basis import Checkpoints, open_checkpoints
from mechatlas.analysis.interaction.statistics import NamedArrays
from mechatlas.base import InputError, NonFiniteError, Progress, no_progress
from mechatlas.ranges import COUNT, POSITIVE, SEED, check_ranges

LEAK = 0.01
"""Slope of the leaky sides of the two hard sigmoids."""
CHECKPOINT_STEPS = 500
"""Steps between two states that are kept."""
STATE = "decomposition"
"""Name of the kept state."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Moments of Adam, by its names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecompositionConfig:
    """Settings of a decomposition.

    The coefficients are the paper's for its smallest toy model, with smaller batches, fewer steps
    and a higher learning rate than its 4,096, 40,000 and .001.
    """

    n_components: int = 20
    """Subcomponents of each layer."""
    gate_width: int = 16
    """Hidden units of each causal-importance function."""
    importance: float = 3e-3
    """Coefficient of the importance-minimality loss."""
    p: float = 1.0
    """Power of the importances in that loss."""
    steps: int = 12_000
    """Optimizer steps."""
    batch_size: int = 512
    """Samples in a step."""
    lr: float = 5e-3
    """Learning rate of Adam at first; it falls to zero by a cosine."""
    seed: int = 0
    """Seed of the initial weights, the inputs and the masks."""

    def __post_init__(self) -> None:
        counts = ("n_components", "gate_width", "steps", "batch_size")
        positive = ("importance", "p", "lr")
        check_ranges(
            self, seed=SEED, **dict.fromkeys(counts, COUNT), **dict.fromkeys(positive, POSITIVE)
        )


class _LowerLeaky(torch.autograd.Function):
    """Hard sigmoid that lets gradients through below 0 if they would raise its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        (x,), (grad,) = ctx.saved_tensors, grads
        return torch.where(x <= 0, LEAK * grad.clamp(max=0), grad) * (x <= 1)


def _upper_leaky(x: Tensor) -> Tensor:
    """Hard sigmoid that rises slowly above 1."""
    return x.clamp(min=0) - (1 - LEAK) * (x - 1).clamp(min=0)


class _Layer(nn.Module):
    """Subcomponents of one linear layer, with a small network for the importance of each."""

    def __init__(
        self, linear: nn.Linear, config: DecompositionConfig, random: torch.Generator
    ) -> None:
        super().__init__()
        d_out, d_in = linear.weight.shape
        n, width = config.n_components, config.gate_width
        new = linear.weight.new_empty

        def normal(*shape: int, std: float) -> nn.Parameter:
            return nn.Parameter(new(shape).normal_(std=std, generator=random))

        self.v = normal(d_in, n, std=1 / math.sqrt(d_out))
        self.u = normal(n, d_out, std=1 / math.sqrt(n))
        self.gate_in = normal(n, width, std=math.sqrt(2))
        self.gate_bias = nn.Parameter(new(n, width).zero_())
        self.gate_out = normal(n, width, std=1 / math.sqrt(width))
        self.gate_offset = nn.Parameter(new(n).zero_())

    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """Sum of all subcomponents."""
        return (self.v @ self.u).T

    def gate(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch n"]:
        """Causal importances before the hard sigmoid; samples without any input share a row."""
        there = x.any(dim=-1)
        row = torch.where(there, there.flatten().cumsum(0).view(there.shape), 0)
        inner = torch.cat([x.new_zeros(1, x.shape[-1]), x[there]]) @ self.v
        # a product for each subcomponent is faster than all of them entry by entry
        hidden = nn.functional.gelu(
            torch.baddbmm(self.gate_bias[:, None], inner.T[..., None], self.gate_in[:, None])
        )
        gates = (hidden @ self.gate_out[..., None])[..., 0].T + self.gate_offset
        return nn.functional.embedding(row, gates)


@dataclasses.dataclass(frozen=True, eq=False)
class ParameterDecomposition:
    """Rank-one subcomponents of the linear layers of a network."""

    network: nn.Module
    """Network that was decomposed, with its weights."""
    parts: nn.ModuleList
    """Subcomponents of each layer, in the order of `layers`."""
    layers: tuple[str, ...]
    """Names of the layers."""
    faithfulness: float
    """Mean squared difference of the sum of the subcomponents and the weights."""
    reconstruction: float
    """Mean squared error of the output under random masks of what is not important, at the end."""

    def components(self, layer: str) -> Float[np.ndarray, "n d_out d_in"]:
        """Matrices of the subcomponents of a layer; their sum is its weight."""
        part = self._part(layer)
        return torch.einsum("in,no->noi", part.v, part.u).detach().numpy()

    @torch.no_grad()
    def importances(self, layer: str, x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch n"]:
        """Causal importance of each subcomponent of a layer for each input of the network."""
        return self._part(layer).gate(_inputs(self.network, self.layers, x)[0][layer]).clamp(0, 1)

    @torch.no_grad()
    def needed(self, layer: str, x: Float[Tensor, "batch d"], *, max_drop: float) -> AblationCurve:
        """Find the fewest subcomponents of a layer, most important first, that suffice for all x.

        Args:
            layer: Name of the layer; the others keep their weights.
            x: Inputs of the network.
            max_drop: Largest fall of 1 - FVU of the outputs.
        """
        outputs = _inputs(self.network, self.layers, x)[1]
        order = self.importances(layer, x).mean(dim=0).argsort(descending=True)
        total = (outputs - outputs.mean(dim=0)).square().sum()

        def score(number: int) -> float:
            mask = torch.zeros(len(order), dtype=x.dtype)
            mask[order[:number]] = 1
            with _masked(self.network, {layer: (self._part(layer), mask)}):
                return float(1 - (self.network(x) - outputs).square().sum() / total)

        return find_needed(len(order), score, 1.0, max_drop)

    def _part(self, layer: str) -> "_Layer":
        part = self.parts[self.layers.index(layer)]
        assert isinstance(part, _Layer)
        return part


def decompose(
    network: nn.Module,
    draw: Callable[[int, torch.Generator], Float[Tensor, "batch d"]],
    layers: Sequence[str],
    config: DecompositionConfig | None = None,
    *,
    checkpoints: Checkpoints | MutableMapping[str, NamedArrays] | None = None,
    on_progress: Progress = no_progress,
) -> ParameterDecomposition:
    """Train rank-one subcomponents of linear layers, and the causal importance of each.

    Args:
        network: Network; its weights stay as they are.
        draw: Function of a size and a generator of random numbers that draws a batch of inputs.
        layers: Names of the linear layers.
        config: Settings.
        checkpoints: Store of the state of the training, every `CHECKPOINT_STEPS` steps; an
            interrupted call with the same other arguments continues from it and ends as if it had
            never been stopped. A mapping is written to and read from.
        on_progress: Callback with the number of steps done.

    Raises:
        InputError: A layer is not an `nn.Linear` of the network.
        NonFiniteError: The loss became infinite or NaN.

    Source:
        Bushnaq, Braun, Sharkey (2025), section 2.
    """
    config = config or DecompositionConfig()
    modules = dict(network.named_modules())
    linear = {name: each for name, each in modules.items() if isinstance(each, nn.Linear)}
    for name in layers:
        if name not in linear:
            raise InputError(
                f"The network has no linear layer {name!r}; it has {', '.join(linear) or 'none'}."
            )
    kept, keep = open_checkpoints(checkpoints)
    random = torch.Generator().manual_seed(config.seed)
    parts = nn.ModuleList(_Layer(linear[name], config, random) for name in layers)
    named = dict(zip(layers, parts, strict=True))
    adam = torch.optim.Adam(parts.parameters(), lr=config.lr, fused=True)
    done, losses = _resume(kept(STATE), adam, random)
    while done < config.steps:
        adam.param_groups[0]["lr"] = config.lr * (1 + math.cos(math.pi * done / config.steps)) / 2
        x = draw(config.batch_size, random)
        faithfulness = _faithfulness(network, named)
        reconstruction, layerwise, minimality = _stochastic(network, named, x, config.p, random)
        loss = faithfulness + reconstruction + layerwise + config.importance * minimality
        adam.zero_grad()
        loss.backward()
        adam.step()
        done += 1
        if done % CHECKPOINT_STEPS == 0 or done == config.steps:
            losses = torch.stack([faithfulness, reconstruction]).detach()
            if not loss.isfinite():
                raise NonFiniteError(
                    f"The loss is {float(loss.detach())} after {done} steps: lower `lr`."
                )
            keep(STATE, _state(done, losses, adam, random))
        on_progress(done, config.steps)
    return ParameterDecomposition(network, parts, tuple(layers), *losses.tolist())


def _state(
    done: int, losses: Tensor, adam: torch.optim.Adam, random: torch.Generator
) -> NamedArrays:
    """State of the training: weights and moments as vectors, and the random numbers to come."""
    weights = adam.param_groups[0]["params"]
    vectors = {
        name: torch.cat([adam.state[each][name].flatten() for each in weights]) for name in MOMENTS
    }
    vectors |= {"weights": nn.utils.parameters_to_vector(weights).detach(), "losses": losses}
    arrays = {name: vector.numpy() for name, vector in vectors.items()}
    return arrays | {"random": random.get_state().numpy(), "done": np.array([done])}


def _resume(
    kept: NamedArrays | None, adam: torch.optim.Adam, random: torch.Generator
) -> tuple[int, Tensor]:
    """Go back to a state; the number of steps done and the losses of the last one."""
    if kept is None:
        return 0, torch.zeros(2)
    state = {name: torch.tensor(array) for name, array in kept.items()}  # copies
    weights = adam.param_groups[0]["params"]
    sizes = [each.numel() for each in weights]
    nn.utils.vector_to_parameters(state["weights"], weights)
    for name in MOMENTS:
        for each, part in zip(weights, state[name].split(sizes), strict=True):
            adam.state[each][name] = part.view_as(each)
            adam.state[each]["step"] = state["done"][0].float()
    random.set_state(state["random"])
    return int(state["done"]), state["losses"]


def _faithfulness(network: nn.Module, parts: dict[str, Any]) -> Tensor:
    """Mean squared difference of the sums of subcomponents and the weights."""
    gaps = [network.get_parameter(f"{k}.weight") - part.weight() for k, part in parts.items()]
    squares = torch.stack([gap.square().sum() for gap in gaps])
    return squares.sum() / sum(gap.numel() for gap in gaps)


def _stochastic(
    network: nn.Module, parts: dict[str, Any], x: Tensor, p: float, random: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of a batch: all layers masked at once, one after another, and importances."""
    with torch.no_grad():
        inputs, outputs = _inputs(network, tuple(parts), x)
    gates = {k: part.gate(inputs[k]) for k, part in parts.items()}
    lower: dict[str, Any] = {k: _LowerLeaky.apply(gate) for k, gate in gates.items()}

    def error(names: Sequence[str]) -> Tensor:
        drawn = {k: torch.rand(lower[k].shape, generator=random) for k in names}
        masks = {k: (parts[k], lower[k] + (1 - lower[k]) * drawn[k]) for k in names}
        with _masked(network, masks):
            return (network(x) - outputs).square().mean()

    sizes = [_upper_leaky(g).add(1e-12).pow(p).sum(dim=-1).mean() for g in gates.values()]
    errors = [error([k]) for k in parts]
    layerwise = torch.stack(errors).mean()
    return error(tuple(parts)), layerwise, torch.stack(sizes).sum()


def _inputs(
    network: nn.Module, layers: Sequence[str], x: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of layers and the output of the unchanged network."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, args: found.__setitem__(name, args[0])

    hooks = [network.get_submodule(k).register_forward_pre_hook(keep(k)) for k in layers]
    try:
        return found, network(x)
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _masked(network: nn.Module, parts: dict[str, tuple[Any, Tensor]]) -> Iterator[None]:
    """Replace layers by the sums of their masked subcomponents."""

    def replace(part: Any, mask: Tensor) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
            out = ((args[0] @ part.v) * mask) @ part.u
            return out if module.bias is None else out + module.bias

        return hook

    hooks = [
        network.get_submodule(k).register_forward_hook(replace(*each)) for k, each in parts.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclasses.dataclass(frozen=True)
class RecoveredColumns:
    """Columns of a weight matrix beside the subcomponents that have them."""

    mean_max_cosine: float
    """Mean over columns of the largest cosine with the same column of a subcomponent (MMCS)."""
    mean_length_ratio: float
    """Mean over columns of the length in that subcomponent, relative to the weight's (ML2R)."""


def recovered_columns(
    components: Float[np.ndarray, "n d_out d_in"], weight: Float[np.ndarray, "d_out d_in"]
) -> RecoveredColumns:
    """Compare subcomponents with columns of the weights: the truth where inputs are features.

    Args:
        components: Subcomponents of a layer.
        weight: Weight of the layer.
    """
    lengths = np.linalg.norm(components, axis=1)
    size = np.linalg.norm(weight, axis=0)
    products = np.einsum("noi,oi->ni", components, weight)
    cosines = products / np.maximum(lengths * size, 1e-12)
    best, columns = cosines.argmax(axis=0), np.arange(weight.shape[1])
    return RecoveredColumns(
        float(cosines[best, columns].mean()), float((lengths[best, columns] / size).mean())
    )
