"""The local learning coefficient by sampling: an estimate that knows nothing of the ledger.

    learning_coefficient    samples weights around the network's own, and how often they matter
    quadratic_coefficient   what theory says, from the curvatures alone

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
from jaxtyping import Float
from torch import Tensor, nn

from mechatlas.base import NonFiniteError

LARGEST = 4096
"""Parameters of which the whole Hessian is formed; of more, only its diagonal."""
ROWS = 1 << 24
"""Numbers in a block of derivatives: bounds the memory."""
ACCEPTED = 0.8
"""Share of accepted steps that the step size is tuned to."""
MOST_STEPS = 32
"""Steps on the way to one sample."""


@dataclasses.dataclass(frozen=True)
class LearningCoefficient:
    """An estimate of the learning coefficient, at its resolution."""

    value: float
    """lambda; twice this is the effective number of parameters."""
    standard_error: float
    """Over chains."""
    resolution: float
    """Mean behavioral loss of the samples: changes smaller than this are not seen."""
    by_chain: tuple[float, ...]
    r_hat: float
    """Spread between halves of all chains against the spread within: 1 if they are mixed, and
    not to be trusted above 1.1."""
    accepted: float
    """Share of the proposals taken."""

    @property
    def parameters(self) -> float:
        """Effective number of parameters at the resolution."""
        return 2 * self.value


def learning_coefficient(
    network: nn.Module,
    inputs: Tensor,
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
        network: In evaluation mode; unchanged afterwards.
        inputs: All of them are used in every step.
        n_beta: Inverse temperature; the resolution is about lambda / n_beta.
        gamma: Pull back to the network's weights, so that free directions stay bounded: along
            them weights move by about `gamma ** -0.5`.
        samples: Of each chain, after `burn_in`. A sample takes some five gradients, and is nearly
            independent of the one before it unless there are more than `LARGEST` parameters.
        burn_in: Samples that only tune the step size.
        chains: Independent chains.
        seed: Of the noise.

    Raises:
        NonFiniteError: The outputs of the network are not all finite.
    """
    names = [name for name, _ in network.named_parameters()]
    shapes = [p.shape for p in network.parameters()]
    home = torch.cat([p.detach().flatten() for p in network.parameters()])
    sizes = [shape.numel() for shape in shapes]

    def outputs(weights: Tensor, given: Tensor) -> Tensor:
        parts = [w.view(s) for w, s in zip(weights.split(sizes), shapes, strict=True)]
        made = torch.func.functional_call(network, dict(zip(names, parts, strict=True)), (given,))
        return made.flatten(1)

    with torch.no_grad():
        wanted = outputs(home, inputs)
    if not wanted.isfinite().all():
        raise NonFiniteError("The outputs of the network are not all finite.")

    def loss(weights: Tensor) -> Tensor:
        return (outputs(weights, inputs) - wanted).square().sum(1).mean()

    target = _Target(loss, home, _root(outputs, home, inputs, n_beta, gamma), n_beta, gamma)
    generator = torch.Generator().manual_seed(seed)
    made = [_chain(target, samples, burn_in, generator) for _ in range(chains)]
    losses = np.array([found for found, _ in made])
    found = n_beta * losses.mean(axis=1)
    return LearningCoefficient(
        value=float(found.mean()),
        standard_error=float(found.std(ddof=1) / chains**0.5) if chains > 1 else math.nan,
        resolution=float(losses.mean()),
        by_chain=tuple(found.tolist()),
        r_hat=_r_hat(losses),
        accepted=float(np.mean([taken for _, taken in made])),
    )


def _root(
    outputs: Callable[[Tensor, Tensor], Tensor],
    home: Tensor,
    inputs: Tensor,
    n_beta: float,
    gamma: float,
) -> Tensor:
    """A root of n beta H + gamma: lower triangular, or the diagonal alone if it is large."""
    n, width = len(inputs), outputs(home, inputs[:1]).shape[1]
    block = max(ROWS // (width * len(home)), 1)
    whole = len(home) <= LARGEST
    total = home.new_zeros((len(home), len(home)) if whole else len(home))
    for some in inputs.split(block):
        rows = torch.func.jacrev(outputs)(home, some).detach().flatten(0, 1)
        total += rows.T @ rows if whole else rows.square().sum(0)
    strength = total * (2 * n_beta / n)
    if not whole:
        return (strength + gamma).sqrt()
    return torch.linalg.cholesky(strength + gamma * torch.eye(len(home)).to(home))


@dataclasses.dataclass(frozen=True, eq=False)
class _Target:
    """The log-density, in coordinates in which it is nearly a standard normal one."""

    loss: Callable[[Tensor], Tensor]
    home: Tensor
    root: Tensor
    n_beta: float
    gamma: float

    def weights(self, place: Tensor) -> Tensor:
        if self.root.ndim == 1:
            return place / self.root
        return torch.linalg.solve_triangular(self.root.T, place[:, None], upper=True)[:, 0]

    def energy(self, place: Tensor) -> tuple[float, float, Tensor]:
        """Behavioral loss, energy, and the slope of the energy."""
        start = place.detach().requires_grad_()
        with torch.enable_grad():
            step = self.weights(start)
            loss = self.loss(self.home + step)
            energy = self.n_beta * loss + self.gamma / 2 * step.square().sum()
            (slope,) = torch.autograd.grad(energy, start)
        return float(loss.detach()), float(energy.detach()), slope


def _chain(
    target: _Target, samples: int, burn_in: int, generator: torch.Generator
) -> tuple[list[float], float]:
    """Behavioral losses of the samples, and the share of proposals accepted."""

    def normal() -> Tensor:
        return torch.randn(target.home.shape, generator=generator, dtype=target.home.dtype)

    place = normal()
    loss, energy, slope = target.energy(place)
    size, losses, taken = 0.3, [], 0
    for number in range(burn_in + samples):
        motion = normal()
        before = energy + float(motion.square().sum()) / 2
        far = (0.8 + 0.4 * float(torch.rand((), generator=generator))) * math.pi / 2
        at, new, steep = place, (loss, energy), slope
        for _ in range(min(math.ceil(far / size), MOST_STEPS)):
            motion = motion - size / 2 * steep
            at = at + size * motion
            *new, steep = target.energy(at)
            motion = motion - size / 2 * steep
        change = before - new[1] - float(motion.square().sum()) / 2
        chance = math.exp(min(change, 0.0)) if math.isfinite(change) else 0.0
        if float(torch.rand((), generator=generator)) < chance:
            place, (loss, energy), slope = at, new, steep
            taken += number >= burn_in
        if number < burn_in:
            size = min(size * math.exp((chance - ACCEPTED) / (1 + number) ** 0.5), 1.0)
        else:
            losses.append(loss)
    return losses, taken / samples


def _r_hat(losses: Float[np.ndarray, "chain sample"]) -> float:
    half = losses.shape[1] // 2
    parts = np.concatenate([losses[:, :half], losses[:, -half:]])
    within = parts.var(axis=1, ddof=1).mean()
    between = parts.mean(axis=1).var(ddof=1)
    return float(np.sqrt((within * (half - 1) / half + between) / within)) if within else 1.0


def quadratic_coefficient(
    curvatures: Float[np.ndarray, " p"], *, n_beta: float, gamma: float = 1.0
) -> float:
    """What the estimate would be if the loss were exactly quadratic.

    Args:
        curvatures: Eigenvalues of the Hessian of the behavioral loss.
        n_beta: As for `learning_coefficient`.
        gamma: As for `learning_coefficient`.
    """
    strength = n_beta * curvatures.clip(min=0)
    return float((strength / (strength + gamma)).sum() / 2)
