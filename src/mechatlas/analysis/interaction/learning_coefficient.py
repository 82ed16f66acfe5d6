"""Local learning coefficient by sampling, independent of the count of free directions.

Samples weights w from exp(-n beta L_B(w) - gamma/2 |w - w*|^2) and returns n beta E[L_B], which is
the learning coefficient at the resolution eps = E[L_B] that beta sets. The behavioral loss is zero
at w*, so nothing has to be subtracted. In the quadratic region each direction of curvature h adds
n beta h / (n beta h + gamma) / 2: twice the estimate counts the directions that matter at that
resolution, and tends to the rank of the Hessian as beta grows and to zero as it falls.

The target is the one of stochastic-gradient Langevin dynamics. But spectra span many powers of ten,
and a chain of Langevin steps, which the stiffest direction keeps short, hardly moves along weak
ones: it underestimates. Hamiltonian steps in coordinates in which the Hessian at w* is the identity
move along all of them alike, and accepting or rejecting each makes the samples exact, whatever the
step. What then differs from theory is that the loss is not quadratic at that distance.

Source: Lau et al., The local learning coefficient (2023), for the target; Neal, MCMC using
Hamiltonian dynamics (2011); Vehtari et al., Rank-normalization, folding and localization (2021),
for R-hat; Bushnaq et al., Using degeneracy in the loss landscape (2024), section 2.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from mechatlas.base import NonFiniteError, Result

MAX_HESSIAN_WIDTH = 4096
"""Maximum number of parameters for the whole Hessian; beyond, only its diagonal is formed."""
MAX_ENTRIES = 1 << 24
"""Maximum number of entries in a block of derivatives; bounds the memory."""
TARGET_ACCEPTANCE = 0.8
"""Acceptance rate that the step size is tuned to."""
MAX_LEAPFROG_STEPS = 32
"""Maximum number of leapfrog steps on the way to one sample."""


@dataclasses.dataclass(frozen=True, repr=False)
class LearningCoefficient(Result):
    """Estimate of the learning coefficient, at its resolution."""

    value: float
    """Learning coefficient lambda."""
    standard_error: float
    """Standard error over chains; NaN for one chain."""
    resolution: float
    """Mean behavioral loss of the samples; smaller changes are not seen."""
    by_chain: tuple[float, ...]
    """Estimate of each chain."""
    r_hat: float
    """Spread between halves of all chains against the spread within: 1 if they are mixed, and
    not to be trusted above 1.1."""
    acceptance_rate: float
    """Share of the proposals that were accepted."""

    @property
    def effective_parameters(self) -> float:
        """Effective number of parameters at the resolution: twice the learning coefficient."""
        return 2 * self.value

    def summary(self) -> str:
        """Estimate with its standard error, resolution and R-hat."""
        return (
            f"Learning coefficient {self.value:.4g} +- {self.standard_error:.2g} at resolution "
            f"{self.resolution:.2g}, R-hat {self.r_hat:.2f}"
        )


def learning_coefficient(
    network: nn.Module,
    inputs: Shaped[Tensor, "sample ..."],
    *,
    n_beta: float,
    gamma: float = 1.0,
    samples: int = 200,
    burn_in: int = 50,
    chains: int = 4,
    seed: int = 0,
) -> LearningCoefficient:
    """Estimate the learning coefficient of the behavioral loss around a network.

    Args:
        network: Network in evaluation mode; unchanged afterwards.
        inputs: Samples; all are used in every step.
        n_beta: Inverse temperature; the resolution is about lambda / n_beta.
        gamma: Localization: pull back to the network's weights, so that free directions stay
            bounded; along them weights move by about `gamma ** -0.5`.
        samples: Number of samples of each chain, after `burn_in`. A sample takes some five
            gradients, and is nearly independent of the sample before it unless there are more
            than `MAX_HESSIAN_WIDTH` parameters.
        burn_in: Number of samples that only tune the step size.
        chains: Number of independent chains.
        seed: Seed of the noise.

    Raises:
        NonFiniteError: The outputs of the network are not all finite.
    """
    names = [name for name, _ in network.named_parameters()]
    shapes = [p.shape for p in network.parameters()]
    home = torch.cat([p.detach().flatten() for p in network.parameters()])
    sizes = [shape.numel() for shape in shapes]

    def outputs(weights: Tensor, x: Tensor) -> Tensor:
        parts = [w.view(s) for w, s in zip(weights.split(sizes), shapes, strict=True)]
        named = dict(zip(names, parts, strict=True))
        return torch.func.functional_call(network, named, (x,)).flatten(1)

    with torch.no_grad():
        unchanged = outputs(home, inputs)
    if not unchanged.isfinite().all():
        raise NonFiniteError("The outputs of the network are not all finite.")

    def loss(weights: Tensor) -> Tensor:
        return (outputs(weights, inputs) - unchanged).square().sum(1).mean()

    root = _precision_root(outputs, home, inputs, n_beta, gamma)
    density = _Density(loss, home, root, n_beta, gamma)
    generator = torch.Generator().manual_seed(seed)
    sampled = [_sample_chain(density, samples, burn_in, generator) for _ in range(chains)]
    losses = np.array([chain for chain, _ in sampled])
    by_chain = n_beta * losses.mean(axis=1)
    return LearningCoefficient(
        value=float(by_chain.mean()),
        standard_error=float(by_chain.std(ddof=1) / chains**0.5) if chains > 1 else math.nan,
        resolution=float(losses.mean()),
        by_chain=tuple(by_chain.tolist()),
        r_hat=_r_hat(losses),
        acceptance_rate=float(np.mean([rate for _, rate in sampled])),
    )


def _precision_root(
    outputs: Callable[[Tensor, Tensor], Tensor],
    home: Tensor,
    inputs: Tensor,
    n_beta: float,
    gamma: float,
) -> Tensor:
    """Root of n beta H + gamma: lower triangular, or the diagonal alone if it is large."""
    n, width = len(inputs), outputs(home, inputs[:1]).shape[1]
    block = max(MAX_ENTRIES // (width * len(home)), 1)
    whole = len(home) <= MAX_HESSIAN_WIDTH
    total = home.new_zeros((len(home), len(home)) if whole else len(home))
    for batch in inputs.split(block):
        rows = torch.func.jacrev(outputs)(home, batch).detach().flatten(0, 1)
        total += rows.T @ rows if whole else rows.square().sum(0)
    strength = total * (2 * n_beta / n)
    if not whole:
        return (strength + gamma).sqrt()
    return torch.linalg.cholesky(strength + gamma * torch.eye(len(home)).to(home))


@dataclasses.dataclass(frozen=True, eq=False)
class _Density:
    """Log-density of the weights, in coordinates in which it is nearly a standard normal."""

    loss: Callable[[Tensor], Tensor]
    home: Tensor
    root: Tensor
    n_beta: float
    gamma: float

    def weights(self, position: Tensor) -> Tensor:
        if self.root.ndim == 1:
            return position / self.root
        return torch.linalg.solve_triangular(self.root.T, position[:, None], upper=True)[:, 0]

    def energy(self, position: Tensor) -> tuple[float, float, Tensor]:
        """Behavioral loss, energy, and the gradient of the energy."""
        start = position.detach().requires_grad_()
        with torch.enable_grad():
            step = self.weights(start)
            loss = self.loss(self.home + step)
            energy = self.n_beta * loss + self.gamma / 2 * step.square().sum()
            (gradient,) = torch.autograd.grad(energy, start)
        return float(loss.detach()), float(energy.detach()), gradient


def _sample_chain(
    density: _Density, samples: int, burn_in: int, generator: torch.Generator
) -> tuple[list[float], float]:
    """Behavioral losses of the samples, and the acceptance rate."""

    def normal() -> Tensor:
        return torch.randn(density.home.shape, generator=generator, dtype=density.home.dtype)

    position = normal()
    loss, energy, gradient = density.energy(position)
    size, losses, n_accepted = 0.3, [], 0
    for number in range(burn_in + samples):
        momentum = normal()
        before = energy + float(momentum.square().sum()) / 2
        length = (0.8 + 0.4 * float(torch.rand((), generator=generator))) * math.pi / 2
        proposal, new_loss, new_energy, new_gradient = position, loss, energy, gradient
        for _ in range(min(math.ceil(length / size), MAX_LEAPFROG_STEPS)):
            momentum = momentum - size / 2 * new_gradient
            proposal = proposal + size * momentum
            new_loss, new_energy, new_gradient = density.energy(proposal)
            momentum = momentum - size / 2 * new_gradient
        change = before - new_energy - float(momentum.square().sum()) / 2
        probability = math.exp(min(change, 0.0)) if math.isfinite(change) else 0.0
        if float(torch.rand((), generator=generator)) < probability:
            position, loss, energy, gradient = proposal, new_loss, new_energy, new_gradient
            n_accepted += number >= burn_in
        if number < burn_in:
            step = (probability - TARGET_ACCEPTANCE) / (1 + number) ** 0.5
            size = min(size * math.exp(step), 1.0)
        else:
            losses.append(loss)
    return losses, n_accepted / samples


def _r_hat(losses: Float[np.ndarray, "chain sample"]) -> float:
    """Spread between halves of all chains against the spread within."""
    half = losses.shape[1] // 2
    parts = np.concatenate([losses[:, :half], losses[:, -half:]])
    within = parts.var(axis=1, ddof=1).mean()
    between = parts.mean(axis=1).var(ddof=1)
    return float(np.sqrt((within * (half - 1) / half + between) / within)) if within else 1.0
