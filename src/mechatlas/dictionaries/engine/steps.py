"""One optimizer step of a dictionary on one batch.

    Step            what a step offers; `sparse_steps` has the fast one
    AutogradStep    any dictionary: torch's gradients and torch's Adam

The loss is the squared error, summed over `d_out`, averaged over the batch and over the prefixes
of a dictionary that has them, plus the penalty of its sparsity rule. Adam has dense moments; the
part of an atom's gradient that would change its length is removed, and lengths are kept at 1.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechatlas.dictionaries.autoencoder import SparseCoder
from mechatlas.dictionaries.engine import fallback
from mechatlas.dictionaries.objective import Objective
from mechatlas.dictionaries.revival import AuxK, revive

BETAS = (0.9, 0.999)
EPSILON = 1e-8
TILE = 2**22
"""Pre-activations that `AutogradStep` makes at once."""

Dead = tuple[AuxK, Int[Tensor, " dead"]]
"""How to revive which latents."""


class Stepped(NamedTuple):
    """What a step measured on its batch, before it changed the dictionary."""

    loss: float
    """Squared error and penalty, mean over the batch."""
    fired: Bool[Tensor, " latent"]
    """Latents that were non-zero for at least one row."""


@runtime_checkable
class Step(Protocol):
    """How a dictionary is changed by one batch."""

    n_steps: int
    """Steps taken, as the correction of the moments counts them."""
    moments: dict[str, tuple[Tensor, Tensor]]
    """First and second moment of each parameter; with `n_steps` all that a step remembers."""

    def __call__(
        self,
        x: Float[Tensor, "batch width"],
        lr: float,
        dead: Dead | None = None,
        *,
        pressure: float = 1.0,
    ) -> Stepped:
        """Change the dictionary in place.

        Args:
            x: Rows of activations, with all columns that the dictionary reads or writes.
            lr: Learning rate.
            dead: Latents that also learn from the residual.
            pressure: Share of the penalty's weight.
        """
        ...


def moments_of(parameters: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Moments of parameters that have not been stepped yet."""
    return {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}


def adam(lr: float, n_steps: int) -> list[float]:
    """Adam's numbers at the n-th step, as the kernels take them."""
    one, two = BETAS
    rate, correction = lr / (1 - one**n_steps), (1 - two**n_steps) ** -0.5
    return [one, 1 - one, two, 1 - two, rate, correction, EPSILON]


class AutogradStep:
    """Steps of any dictionary, a tile of rows at a time where its sparsity rule allows it."""

    def __init__(
        self,
        dictionary: SparseCoder,
        objective: Objective | None = None,
        *,
        moments: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Make the optimiser.

        Args:
            dictionary: Changed in place by each step.
            objective: What is minimised.
            moments: Shared with another step, by name of the parameter; new by default.
        """
        self.dictionary, self.objective = dictionary, objective or Objective()
        self.n_steps = 0
        parameters = dict(dictionary.named_parameters())
        self.optimiser = torch.optim.Adam(parameters.values(), betas=BETAS, eps=EPSILON, fused=True)
        missing = {name: p.data for name, p in parameters.items() if name not in (moments or {})}
        self.moments = {**(moments or {}), **moments_of(missing)}
        for name, p in parameters.items():
            first, second = self.moments[name]
            count = torch.zeros((), dtype=torch.float32, device=p.device)
            self.optimiser.state[p] = {"step": count, "exp_avg": first, "exp_avg_sq": second}

    @torch.enable_grad()
    def __call__(
        self,
        x: Float[Tensor, "batch width"],
        lr: float,
        dead: Dead | None = None,
        *,
        pressure: float = 1.0,
    ) -> Stepped:
        """Change the dictionary in place; see `Step`."""
        owner = self.dictionary
        self.optimiser.param_groups[0]["lr"] = lr
        for state in self.optimiser.state.values():
            state["step"].fill_(self.n_steps)
        self.n_steps += 1
        self.optimiser.zero_grad(set_to_none=True)
        weights = self.objective.weights(x[:, owner.writes])
        tile = max(1, TILE // owner.n_latents) if owner.rule.by_row else len(x)
        fired = torch.zeros(owner.n_latents, dtype=torch.bool, device=x.device)
        loss, revived = 0.0, dead is not None and len(dead[1]) > 0
        left = []
        for part, its_weights in zip(x.split(tile), weights.split(tile), strict=True):
            loss_of_part, code, residual = self._loss(part, its_weights, pressure)
            (loss_of_part / len(x)).backward()
            loss += float(loss_of_part.detach()) / len(x)
            fired |= (code != 0).any(dim=0)
            left += [residual] if revived else []
            if not owner.rule.by_row and bool((code > 0).any()):
                owner.rule.observe(code[code > 0].min(), owner.state)
        if owner.centred and owner.b_dec.grad is not None and owner.b_enc.grad is not None:
            # It shifts all rows that are encoded alike, so its gradient needs no product with them.
            owner.b_dec.grad -= (owner.W_enc @ owner.b_enc.grad).detach()
        if dead is not None and revived:
            self._revive(dead, x[:, owner.reads], torch.cat(left))
        self._limit()
        self.optimiser.step()
        owner.normalise()
        return Stepped(loss, fired)

    def _loss(self, x: Tensor, weights: Tensor, pressure: float) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of some rows, summed; their codes and what was left over, without gradient."""
        owner = self.dictionary
        target = x[:, owner.writes]
        read = x[:, owner.reads]
        read = read - owner.b_dec.detach() if owner.centred else read
        pre = torch.addmm(owner.b_enc, read, owner.W_enc)
        code = owner.rule.training_code(pre, owner.state)
        left, error = target - owner.b_dec, weights.new_zeros(())
        for low, high in pairwise((0, *owner.prefixes)):
            left = left - code[:, low:high] @ owner.W_dec[low:high]
            error = error + (weights * left.square().sum(dim=-1)).sum() / len(owner.prefixes)
        atoms, bias = owner.W_dec.detach(), owner.b_dec.detach()

        def unexplained(gates: Tensor) -> Tensor:
            return weights * (target - gates @ atoms - bias).square().sum(dim=-1)

        penalty = owner.rule.penalty(pre, code, unexplained, owner.state)
        return error + pressure * penalty.sum(), code.detach(), left.detach()

    @torch.no_grad()
    def _revive(self, dead: Dead, x: Tensor, left: Tensor) -> None:
        owner = self.dictionary
        parameters = owner.W_dec, owner.W_enc.T, owner.b_enc
        found = revive(*dead, parameters, x - owner.b_dec if owner.centred else x, left)
        rows = owner.W_dec if owner.tied else owner._W_enc
        for p, gradient in (
            (owner.W_dec, found.atoms),
            (rows, found.rows),
            (owner.b_enc, found.bias),
        ):
            if p.grad is not None:
                whole = p.grad.T if p is rows and not owner.tied else p.grad
                whole[found.latents] += gradient

    @torch.no_grad()
    def _limit(self) -> None:
        # The length of an atom is fixed, so a step along it would only be undone.
        owner = self.dictionary
        if owner.W_dec.grad is not None:
            fallback.remove_along(owner.W_dec.grad, owner.W_dec, list(owner.edges))
        if self.objective.clip is not None:
            gradients = [p.grad for p in owner.parameters() if p.grad is not None]
            factor = self.objective.factor(sum(float(g.square().sum()) for g in gradients))
            for gradient in gradients:
                gradient.mul_(factor)
