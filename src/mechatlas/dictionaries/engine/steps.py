"""One optimizer step of a dictionary on one batch, by torch's gradients.

    AutogradStep         any `LinearCoder`, with any sparsity rule
    ReconstructionStep   any dictionary that is a module, from `encode` and `decode` alone

The loss is the squared error, summed over `d_out`, averaged over the batch and over the Matryoshka
widths of a dictionary that has them, plus the penalty of its sparsity rule. Adam has dense moments;
the part of an atom's gradient that would change its length is removed, and lengths are kept at 1.
`sparse_steps` has the fast step.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mechatlas.dictionaries.autoencoder import LinearCoder
from mechatlas.dictionaries.engine import fallback
from mechatlas.dictionaries.engine.interface import Dead, Rows, StepResult
from mechatlas.dictionaries.engine.structures import Adam, Learned
from mechatlas.dictionaries.objective import Objective
from mechatlas.dictionaries.pretrained import Pretrained
from mechatlas.dictionaries.revival import revive

BETAS = (0.9, 0.999)
EPSILON = 1e-8
TILE = 2**22
"""Pre-activations that `AutogradStep` makes at once on a CPU."""
DEVICE_TILE = 2**28
"""Pre-activations that exist at once on another device."""


def moments_of(parameters: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Make the moments of parameters that have not been stepped yet."""
    return {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}


def adam(lr: float, n_steps: int) -> Adam:
    """Compute the numbers of Adam at the n-th step."""
    decay1, decay2 = BETAS
    rate, correction = lr / (1 - decay1**n_steps), (1 - decay2**n_steps) ** -0.5
    return Adam(decay1, 1 - decay1, decay2, 1 - decay2, rate, correction, EPSILON)


def at_hand(loss: Tensor | float) -> Tensor | float:
    """Loss as a number on a CPU; elsewhere as it is, so that nobody waits for the device."""
    on_device = isinstance(loss, Tensor) and loss.device.type != "cpu"
    return loss if on_device else float(loss)


class AutogradStep:
    """Steps of a `LinearCoder`, a tile of rows at a time where its sparsity rule allows it."""

    def __init__(
        self,
        dictionary: LinearCoder,
        objective: Objective | None = None,
        *,
        moments: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Make the optimizer.

        Args:
            dictionary: Changed in place by each step.
            objective: Squared error that is minimized.
            moments: Moments shared with another step, by name of the parameter; new by default.
        """
        self.dictionary, self.objective = dictionary, objective or Objective()
        self.n_steps = 0
        parameters = dict(dictionary.named_parameters())
        self.optimizer = torch.optim.Adam(parameters.values(), betas=BETAS, eps=EPSILON, fused=True)
        missing = {name: p.data for name, p in parameters.items() if name not in (moments or {})}
        self.moments = {**(moments or {}), **moments_of(missing)}
        self._counts = dictionary.b_dec.new_zeros(len(parameters), dtype=torch.float32)
        for count, (name, p) in zip(self._counts, parameters.items(), strict=True):
            first, second = self.moments[name]
            self.optimizer.state[p] = {"step": count, "exp_avg": first, "exp_avg_sq": second}

    @torch.enable_grad()
    def __call__(
        self, x: Rows, lr: float, dead: Dead | None = None, *, sparsity_coefficient: float = 1.0
    ) -> StepResult:
        """Change the dictionary in place; see `Step`."""
        dictionary = self.dictionary
        self.optimizer.param_groups[0]["lr"] = lr
        self._counts.fill_(self.n_steps)
        self.n_steps += 1
        self.optimizer.zero_grad(set_to_none=True)
        weights = self.objective.weights(x[:, dictionary.writes])
        by_row = dictionary.rule.by_row
        numbers = TILE if x.device.type == "cpu" else DEVICE_TILE
        tile = max(1, numbers // dictionary.n_latents) if by_row else len(x)
        fired = torch.zeros(dictionary.n_latents, dtype=torch.bool, device=x.device)
        loss: Tensor | float = 0.0
        revived = dead is not None and len(dead[1]) > 0
        residuals = []
        for part, part_weights in zip(x.split(tile), weights.split(tile), strict=True):
            part_loss, code, residual = self._loss(part, part_weights, sparsity_coefficient)
            (part_loss / len(x)).backward()
            loss += part_loss.detach() / len(x)
            fired |= (code != 0).any(dim=0)
            residuals += [residual] if revived else []
            if not by_row and bool((code > 0).any()):
                dictionary.rule.update_threshold(code[code > 0].min(), dictionary.state)
        b_enc, b_dec = dictionary.b_enc.grad, dictionary.b_dec.grad
        if dictionary.subtracts_b_dec and b_dec is not None and b_enc is not None:
            # It shifts all rows that are encoded alike, so its gradient needs no product with them.
            b_dec -= (dictionary.W_enc @ b_enc).detach()
        if dead is not None and revived:
            self._revive(dead, x[:, dictionary.reads], torch.cat(residuals))
        self._limit()
        self.optimizer.step()
        dictionary.normalize()
        return StepResult(at_hand(loss), fired)

    def _loss(
        self, x: Tensor, weights: Tensor, sparsity_coefficient: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of some rows, summed; codes and residual of the rows, without gradient."""
        dictionary = self.dictionary
        target = x[:, dictionary.writes]
        read = x[:, dictionary.reads]
        read = read - dictionary.b_dec.detach() if dictionary.subtracts_b_dec else read
        pre = torch.addmm(dictionary.b_enc, read, dictionary.W_enc)
        code = dictionary.rule.training_code(pre, dictionary.state)
        residual, error = target - dictionary.b_dec, weights.new_zeros(())
        widths = dictionary.matryoshka_widths
        for low, high in pairwise((0, *widths)):
            residual = residual - code[:, low:high] @ dictionary.W_dec[low:high]
            error = error + (weights * residual.square().sum(dim=-1)).sum() / len(widths)
        atoms, bias = dictionary.W_dec.detach(), dictionary.b_dec.detach()

        def unexplained(gates: Tensor) -> Tensor:
            return weights * (target - gates @ atoms - bias).square().sum(dim=-1)

        penalty = dictionary.rule.penalty(pre, code, unexplained, dictionary.state)
        return error + sparsity_coefficient * penalty.sum(), code.detach(), residual.detach()

    @torch.no_grad()
    def _revive(self, dead: Dead, x: Tensor, residual: Tensor) -> None:
        """Add the gradients of dead latents."""
        dictionary = self.dictionary
        encoder, b_enc = dictionary.encoder_parameters
        parameters = dictionary.W_dec, dictionary.W_enc.T, dictionary.b_enc
        read = x - dictionary.b_dec if dictionary.subtracts_b_dec else x
        latents, *gradients = revive(*dead, parameters, read, residual)
        for p, gradient in zip((dictionary.W_dec, encoder, b_enc), gradients, strict=True):
            if p.grad is not None:
                transposed = p is encoder and not dictionary.tied
                whole = p.grad.T if transposed else p.grad
                whole[latents] += gradient

    @torch.no_grad()
    def _limit(self) -> None:
        """Remove what would change the atoms' lengths, and limit the norm of the gradient."""
        # The length of an atom is fixed, so a step along it would only be undone.
        dictionary = self.dictionary
        if dictionary.W_dec.grad is not None:
            fallback.remove_along(dictionary.W_dec.grad, dictionary.W_dec, list(dictionary.edges))
        if self.objective.clip is not None:
            gradients = [p.grad for p in dictionary.parameters() if p.grad is not None]
            factor = self.objective.factor(sum(float(g.square().sum()) for g in gradients))
            for gradient in gradients:
                gradient.mul_(factor)


class ReconstructionStep:
    """Steps of any dictionary by the gradient of its error through `encode` and `decode`."""

    def __init__(
        self,
        dictionary: Any,
        objective: Objective | None = None,
        *,
        project: Callable[[dict[str, Tensor]], None] = lambda gradients: None,
        normalize: Callable[[], None] = lambda: None,
    ) -> None:
        """Make the moments.

        Args:
            dictionary: Changed in place by each step. Columns `reads` of a row are encoded and
                columns `writes` reconstructed, where it has them; else all are both.
            objective: Squared error that is minimized.
            project: Changes the gradients, by name of the parameter, in place.
            normalize: Called after the parameters have changed.
        """
        self.dictionary, self.objective, self.n_steps = dictionary, objective or Objective(), 0
        self.parameters = {n: p for n, p in dictionary.named_parameters() if p.requires_grad}
        self.moments = moments_of({name: p.data for name, p in self.parameters.items()})
        self._project, self._normalize = project, normalize

    @torch.no_grad()
    def __call__(
        self, x: Rows, lr: float, dead: Dead | None = None, *, sparsity_coefficient: float = 1.0
    ) -> StepResult:
        """Change the dictionary in place; see `Step`.

        Raises:
            ValueError: Dead latents are to be brought back, which is not done here.
        """
        if dead is not None:
            raise ValueError(f"Latents of a {type(self.dictionary).__name__} cannot be revived.")
        self.n_steps += 1
        numbers = adam(lr, self.n_steps)
        dictionary, everything = self.dictionary, slice(None)
        target = x[:, getattr(dictionary, "writes", everything)]
        read = x[:, getattr(dictionary, "reads", everything)]
        weights = self.objective.weights(target)
        scales = weights * (2 / len(x))
        with torch.enable_grad():
            if isinstance(dictionary, Pretrained):
                code, penalty = dictionary.training_code(read, target, weights)
            else:
                code, penalty = dictionary.encode(read), x.new_zeros(())
            residual = dictionary.decode(code) - target
            loss = (residual.square().sum(dim=-1) * scales).sum() / 2
            loss = loss + penalty.sum() * (sparsity_coefficient / len(x))
            slopes = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        gradients = {n: g for n, g in zip(self.parameters, slopes, strict=True) if g is not None}
        self._project(gradients)
        squares = sum(float(gradient.square().sum()) for gradient in gradients.values())
        factor = self.objective.factor(squares)
        learned = [Learned(self.parameters[n].data, *self.moments[n]) for n in gradients]
        fallback.step_adam(learned, [g * factor for g in gradients.values()], numbers)
        self._normalize()
        return StepResult(at_hand(loss.detach()), (code.detach() != 0).any(dim=0))
