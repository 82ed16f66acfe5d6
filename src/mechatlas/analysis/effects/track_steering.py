"""Steering along the track of a feature: several layers at once, compared with one.

    steer_track         latents of several sites -> a context in which all are changed
    compare_steering    the effect on a measure: along the track, at each layer, at random

The whole track gets the activation that a single layer gets, shared equally among its layers, so
that as much is added to the stream. Random directions of the same norms, at the same sites, say
what any push of that size does. What a push costs besides is the divergence of the answers.

Source: Laptev et al., Analyze feature flow to enhance interpretation and steering in language
models (2025).
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mechatlas.activations.networks import call_network, running
from mechatlas.activations.samples import whole_batch
from mechatlas.activations.sites import intervene
from mechatlas.analysis.effects.logits import atoms
from mechatlas.analysis.effects.steering import check_latents, site_of, site_rows, steer
from mechatlas.base import Dictionary, InputError, Result, Site

N_RANDOM = 20
"""Random directions of each way by default."""

Point = tuple[Dictionary, int, Site | str]
"""Dictionary, latent in it, and site of the dictionary."""
Measure = Callable[[Tensor], Tensor]
"""Function from the logits (sample, token, vocabulary) to one number."""


@contextmanager
def steer_track(
    network: nn.Module, points: Sequence[Point], scale: float | Sequence[float]
) -> Iterator[nn.Module]:
    """Run a network with the latents of a track changed in all its layers at once.

    Args:
        network: Network; unchanged when the context ends. `generate` works inside.
        points: Dictionary, latent and site of each layer of the track.
        scale: Activation that is added in all layers together, in equal parts; or one of each.

    Yields:
        The same network; call it inside the context.

    Raises:
        InputError: There is no such latent, or a scale is missing or does not fit.
        SiteError: The network has no such site.
    """
    scales = _scales(points, scale)
    with contextlib.ExitStack() as stack:
        for (dictionary, latent, site), amount in zip(points, scales, strict=True):
            stack.enter_context(steer(network, dictionary, latent, amount, site=site))
        yield network


@dataclasses.dataclass(frozen=True)
class SteeringEffect:
    """Effect of one way to steer on a measure."""

    way: str
    """Site that is steered, or `track`."""
    change: float
    """Change of the measure."""
    divergence: float
    """Mean Kullback-Leibler divergence of all answers from the unsteered network's, in nats."""
    random_change: float
    """Mean change of the measure by random directions of the same norms."""
    random_low: float
    """Lower end of the range of 95 % of the random changes."""
    random_high: float
    """Upper end of that range."""
    random_divergence: float
    """Mean divergence of the answers with random directions."""
    p_value: float
    """Share of random directions that change the measure as much in the same direction."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SteeringComparison(Result):
    """Effect on a measure of steering along a track, and at each of its layers alone."""

    baseline: float
    """Measure of the unsteered network."""
    scale: float
    """Activation that is added in all."""
    track: SteeringEffect
    """Effect of all layers at once, each with its part of the activation."""
    single: list[SteeringEffect]
    """Effect of each layer alone, with the whole activation."""
    n_random: int
    """Random directions of each way."""

    def summary(self) -> str:
        """Change of the measure in each way, beside random directions."""
        lines = [f"Steering by {self.scale:g} from {self.baseline:.4g}, {self.n_random} random:"]
        best = max(self.single, key=lambda each: abs(each.change))
        lines += [
            f"{each.way}: {each.change:+.3g} at {each.divergence:.3g} nats; random "
            f"{each.random_change:+.3g} [{each.random_low:+.3g}, {each.random_high:+.3g}] at "
            f"{each.random_divergence:.3g} nats (p {each.p_value:.2g})"
            for each in (self.track, best)
        ]
        return "\n".join(lines)


def compare_steering(
    network: nn.Module,
    points: Sequence[Point],
    inputs: Any,
    measure: Measure,
    scale: float,
    *,
    n_random: int = N_RANDOM,
    seed: int = 0,
) -> SteeringComparison:
    """Compare steering along a track with steering at each of its layers.

    Args:
        network: Network, left as it is.
        points: Dictionary, latent and site of each layer of the track, two or more.
        inputs: Batch of inputs, such as token ids, or samples, as for `open_samples`.
        measure: Function from the logits to one number, such as a mean log-probability.
        scale: Activation that is added in all.
        n_random: Random directions of the same norms, for each way.
        seed: Seed of the random directions.

    Raises:
        InputError: There are fewer than two layers, no such latent, or the measure is no number.
        SiteError: The network has no such site.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import mechatlas as ma
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
        >>> sae = ma.Autoencoder(d_in=8, n_latents=16, sparsity=ma.TopK(k=4))
        >>> points = [(sae, 3, "1"), (sae, 5, "2")]
        >>> found = ma.compare_steering(
        ...     network, points, torch.randn(5, 4), lambda y: y[..., 0].mean(), scale=2.0
        ... )
        >>> len(found.single)
        2
    """
    if len(points) < 2:
        raise InputError(f"A track needs two layers or more, got {len(points)}.")
    whole, shared = _scales(points, [scale] * len(points)), _scales(points, scale)
    batch = whole_batch(inputs, network)
    logits = _logits(network, batch)
    baseline = _number(measure, logits)
    plain = functional.log_softmax(logits, dim=-1)
    random = torch.Generator().manual_seed(seed)

    def measured() -> tuple[float, float]:  # logits are large: no two of them are kept
        logits = _logits(network, batch)
        return _number(measure, logits) - baseline, _divergence(plain, logits)

    def effect(way: str, chosen: Sequence[Point], amounts: Sequence[float]) -> SteeringEffect:
        with steer_track(network, chosen, amounts):
            change, cost = measured()
        drawn = np.empty((n_random, 2))
        for each in drawn:
            with _pushed(network, chosen, amounts, random):
                each[:] = measured()
        changes = drawn[:, 0]
        beyond = int((changes * np.sign(change) >= abs(change)).sum())
        low, high = np.quantile(changes, [0.025, 0.975]) if n_random else (np.nan, np.nan)
        mean, mean_cost = drawn.mean(axis=0) if n_random else (np.nan, np.nan)
        return SteeringEffect(
            way, change, cost, float(mean), float(low), float(high), float(mean_cost),
            (1 + beyond) / (1 + n_random),
        )  # fmt: skip

    return SteeringComparison(
        baseline=baseline,
        scale=scale,
        track=effect("track", points, shared),
        single=[
            effect(str(point[2]), [point], [amount])
            for point, amount in zip(points, whole, strict=True)
        ],
        n_random=n_random,
    )


def _scales(points: Sequence[Point], scale: float | Sequence[float]) -> list[float]:
    """Activation of each layer."""
    if not points:
        raise InputError("A track needs its layers: give (dictionary, latent, site) of each.")
    for dictionary, latent, _ in points:
        check_latents(dictionary, [latent])
    if not isinstance(scale, Sequence):
        return [float(scale) / len(points)] * len(points)
    if len(scale) != len(points):
        raise InputError(f"There are {len(scale)} scales for the {len(points)} layers of a track.")
    return [float(each) for each in scale]


@contextmanager
def _pushed(
    network: nn.Module,
    points: Sequence[Point],
    amounts: Sequence[float],
    random: torch.Generator,
) -> Iterator[None]:
    """Run a network with random directions added, as long as what steering adds."""
    with contextlib.ExitStack() as stack:
        for (dictionary, latent, site), amount in zip(points, amounts, strict=True):
            place = site_of(network, dictionary, site)
            atom = atoms(dictionary, [latent])[0]
            direction = functional.normalize(torch.randn(len(atom), generator=random), dim=0)
            push = direction.to(atom) * atom.norm() * abs(amount)

            def edit(
                activation: Tensor,
                place: Site = place,
                dictionary: Dictionary = dictionary,
                push: Float[Tensor, " d"] = push,
            ) -> Tensor:
                rows, put_back = site_rows(network, place, activation, dictionary)
                return put_back((rows.float() + push.to(rows.device)).to(activation.dtype))

            stack.enter_context(intervene(network, {place: edit}))
        yield


@torch.no_grad()
def _logits(network: nn.Module, batch: Any) -> Tensor:
    """Logits of a network, or whatever else it answers with."""
    with running(network, batch):
        returned = call_network(network, batch)
    logits = returned.logits if hasattr(returned, "logits") else returned
    if not isinstance(logits, Tensor):
        raise InputError(f"The network gives a {type(logits).__name__}, expected logits.")
    return logits.float()


def _number(measure: Measure, logits: Tensor) -> float:
    """Measure of some logits."""
    value = measure(logits)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.isfinite().all():
        shown = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"A measure must give one finite number, got {shown}.")
    return float(value)


def _divergence(before: Tensor, steered: Tensor) -> float:
    """Mean Kullback-Leibler divergence of the answers from logarithms of probabilities, in nats."""
    after = functional.log_softmax(steered, dim=-1)
    return float(functional.kl_div(after, before, log_target=True, reduction="none").sum(-1).mean())
