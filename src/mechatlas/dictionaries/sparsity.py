"""Sparsity rules: frozen rules from pre-activations to codes.

    TopK        k latents of each sample
    BatchTopK   k latents a sample, on average over a batch
    ReLU        those above zero; a penalty on their sum
    JumpReLU    those above a threshold that is learned; a penalty on their number
    Threshold   those above a threshold that other libraries learned
    Gated       those whose gate is open; the gate and the size are learned apart

A rule names the tensors it needs besides the pre-activations, and a dictionary owns them: those
of `parameters` learn from the gradient, those of `buffers` from `update_threshold`. Any function of
the pre-activations alone is a rule too (`as_rule`).

Every rule is trained by autograd. A rule whose codes can be found without all pre-activations
gives `find_codes` and `penalize_codes` as well; a training step is then several times as fast.

Penalties are in the units of training, in which the columns of the activations have variance 1
on average: a latent of code f explains about f squared of the squared error.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechatlas.dictionaries.engine.interface import CodeSearch
from mechatlas.dictionaries.engine.structures import Codes
from mechatlas.ranges import COUNT, POSITIVE, check_ranges

Latents = Float[Tensor, "batch latent"]
"""Pre-activations, or codes, of some samples."""
Rowwise = Float[Tensor, " batch"]
"""Numbers of some samples, one each."""
Pairs = Float[Tensor, " pairs"]
"""Numbers of pairs of a sample and a latent."""
State = Mapping[str, Tensor]
"""Tensors of a rule's own."""
Unexplained = Callable[[Tensor], Tensor]
"""Squared error of each sample that a code leaves, by a decoder that does not learn from it."""
WORTH_COMPILING = 20_000
"""Pre-activations from which on a compiled loop finds the largest."""
NONE: State = MappingProxyType({})
"""State of a rule without tensors."""


class Rule(abc.ABC):
    """Contract of sparsity rules; all but the code itself has a default."""

    by_row = True
    """Whether the code of a sample in training is independent of the other samples."""
    pursues = False
    """Whether codes are found step by step from rows and atoms (`pursue`), without an encoder."""
    by_site = False
    """Whether a site that is written uses a part of the code alone (`at_site`)."""
    has_gates = False
    """Whether pre-activations above zero are a code of their own, whose error the penalty has."""

    def at_site(self, code: Latents, state: State, site: int) -> Latents:
        """Code as one of several sites uses it: all of it, but for a rule of sites."""
        del state, site
        return code

    def pursue(
        self, x: Float[Tensor, "batch d_in"], atoms: Float[Tensor, "latent d_in"]
    ) -> Latents:
        """Find the code of each row from the atoms alone.

        Raises:
            NotImplementedError: The rule is one of pre-activations.
        """
        raise NotImplementedError(f"{self} needs pre-activations")

    @abc.abstractmethod
    def __call__(self, pre: Latents, state: State = NONE) -> Latents:
        """Code of each sample, when the dictionary is used."""

    def parameters(self, n_latents: int) -> dict[str, Tensor]:
        """Tensors that learn from the gradient, as they start."""
        del n_latents
        return {}

    def buffers(self, n_latents: int) -> dict[str, Tensor]:
        """Tensors that `update_threshold` changes, as they start."""
        del n_latents
        return {}

    def training_code(self, pre: Latents, state: State = NONE) -> Latents:
        """Code of each sample, when the dictionary is trained."""
        return self(pre, state)

    def penalty(
        self, pre: Latents, code: Latents, unexplained: Unexplained, state: State = NONE
    ) -> Rowwise:
        """Compute the term that is added to the squared error of each sample.

        Args:
            pre: Pre-activations of some samples.
            code: Codes of the samples, as `training_code` gives them.
            unexplained: Squared error that a code of the samples leaves.
            state: Tensors of this rule.
        """
        del code, unexplained, state
        return pre.new_zeros(len(pre))

    def update_threshold(self, smallest: Tensor, state: State) -> None:
        """Learn from the smallest code above zero of a batch in training."""
        del smallest, state

    @property
    def has_fast_path(self) -> bool:
        """Whether this very class gives `find_codes`: a subclass may have other codes."""
        return "find_codes" in vars(type(self))

    def find_codes(self, search: CodeSearch, state: State) -> Codes | None:
        """Find the codes of a batch in training, without a gradient, and learn from them.

        Args:
            search: Search among the pre-activations of the batch.
            state: Tensors of this rule.

        Returns:
            The codes, or None if they are not sparse, so that autograd is faster.

        Raises:
            NotImplementedError: The rule has no fast path.
        """
        raise NotImplementedError(f"{self} has no fast path")

    def penalize_codes(
        self, codes: Codes, d_code: Pairs, weight: float, state: State
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        """Make the gradient of each code, in place, that of its pre-activation, with the penalty's.

        Args:
            codes: Codes that `find_codes` gave.
            d_code: Gradient of each code. The error of gates is added by the caller.
            weight: Weight of a row's penalty in the loss.
            state: Tensors of this rule.

        Returns:
            The weighted penalty of the batch, and the gradients of `parameters`.
        """
        del codes, d_code, weight, state
        return 0.0, {}

    def least_that_learns(self, state: State) -> Float[Tensor, " latent"] | float:
        """Pre-activation of each latent up to which it has no gradient."""
        del state
        return 0.0

    def frozen(self, state: State, n_latents: int) -> tuple["Rule", State]:
        """Rule with the same codes that no longer learns, as other libraries have it."""
        del n_latents
        return self, state

    def rescale(self, factor: float, state: State) -> None:
        """Change the state in place to that of pre-activations times a factor."""
        del factor, state


@dataclasses.dataclass(frozen=True)
class Plain(Rule):
    """Rule that is a function of the pre-activations alone."""

    function: Callable[[Tensor], Tensor]

    def __call__(self, pre: Latents, state: State = NONE) -> Latents:
        """Call the function."""
        del state
        return self.function(pre)


def as_rule(sparsity: Callable[..., Tensor]) -> Rule:
    """See a function as a rule."""
    return sparsity if isinstance(sparsity, Rule) else Plain(sparsity)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(Rule):
    """Keep the k largest latents of each sample (Makhzani and Frey, 2013; Gao et al., 2024)."""

    k: int = 32
    """Latents kept in each sample."""

    def __post_init__(self) -> None:
        check_ranges(self, k=COUNT)

    def __call__(self, pre: Latents, state: State = NONE) -> Latents:
        """Zero all but the k largest entries of each row, and those below zero."""
        del state
        if pre.ndim == 2 and pre.numel() >= WORTH_COMPILING and not pre.requires_grad:
            from mechatlas.dictionaries.engine.sparse_steps import can_compile  # imports this

            if can_compile(pre) and not pre.sum().isnan():  # the loop takes no NaN to be large
                return self._code(pre.contiguous())
        top = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter_(-1, top.indices, top.values.relu())

    def _code(self, pre: Latents) -> Latents:
        """Find the same code by the loop of training, two to three times as fast as torch's."""
        from mechatlas.dictionaries.engine.kernels import select  # compiles when it is imported

        values = pre.new_empty(len(pre), self.k)
        latents = torch.empty_like(values, dtype=torch.int32)
        select(pre, pre.new_zeros(pre.shape[1]), self.k, values, latents)
        return torch.zeros_like(pre).scatter_(-1, latents.long(), values)

    def find_codes(self, search: CodeSearch, state: State) -> Codes:
        """Find the k largest codes of each row."""
        del state
        return search.largest_of_rows(self.k)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchTopK(Rule):
    """Keep the k latents a sample that are largest in a batch (Bussmann et al., 2024).

    Samples share out the batch's n k latents among them. Used alone, a sample keeps the latents
    above a threshold: the mean, over the last hundred batches or so, of the smallest one kept.
    """

    k: int = 32
    """Latents kept a sample, on average."""

    by_row = False

    def __post_init__(self) -> None:
        check_ranges(self, k=COUNT)

    def __call__(self, pre: Latents, state: State = NONE) -> Latents:
        """Zero what is not above the threshold; before any training, all but each row's k."""
        if state["threshold"] < 0:
            return TopK(k=self.k)(pre)
        return pre * (pre > state["threshold"])

    def buffers(self, n_latents: int) -> dict[str, Tensor]:
        """The threshold; below zero as long as it has not been learned."""
        del n_latents
        return {"threshold": torch.tensor(-1.0)}

    def training_code(self, pre: Latents, state: State = NONE) -> Latents:
        """Zero all but the n k largest entries of n rows, and those below zero."""
        del state
        flat = pre.reshape(-1)
        top = flat.topk(min(self.k * len(pre), flat.numel()))
        return torch.zeros_like(flat).scatter_(-1, top.indices, top.values.relu()).view_as(pre)

    def find_codes(self, search: CodeSearch, state: State) -> Codes:
        """Find the n k largest codes of n rows, and move the threshold."""
        codes = search.largest_of_batch(self.k)
        if len(codes.values):
            smallest = codes.values.masked_fill(codes.values <= 0, torch.inf).min()
            self.update_threshold(smallest, state)
        return codes

    def update_threshold(self, smallest: Float[Tensor, ""], state: State) -> None:
        """Move the threshold a hundredth of the way; not to infinity, if nothing was kept."""
        threshold = state["threshold"]
        moved = torch.where(threshold < 0, smallest, threshold.lerp(smallest, 0.01))
        threshold.copy_(torch.where(smallest < torch.inf, moved, threshold))

    def frozen(self, state: State, n_latents: int) -> tuple[Rule, State]:
        """Threshold of all latents; before any training the k largest of each row."""
        if state["threshold"] < 0:
            return TopK(k=self.k), {}
        return Threshold(), {"threshold": state["threshold"].expand(n_latents)}

    def rescale(self, factor: float, state: State) -> None:
        """The threshold has the pre-activations' units; unlearned, it has none."""
        if state["threshold"] >= 0:
            state["threshold"].mul_(factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReLU(Rule):
    """Keep what is above zero, and penalize the sum of the code (Bricken et al., 2023)."""

    l1: float = 1.0
    """Weight of the code's sum beside the squared error; a code of f loses about l1 / 2 of it."""

    def __post_init__(self) -> None:
        check_ranges(self, l1=POSITIVE)

    def __call__(self, pre: Latents, state: State = NONE) -> Latents:
        """Zero what is below zero."""
        del state
        return pre.relu()

    def penalty(
        self, pre: Latents, code: Latents, unexplained: Unexplained, state: State = NONE
    ) -> Rowwise:
        """Compute `l1` times the sum of the code, whose scale the atoms' fixed length sets.

        Args:
            pre: Not read, like `unexplained` and `state`.
            code: Codes of some samples.
        """
        del pre, unexplained, state
        return self.l1 * code.sum(dim=-1)

    def find_codes(self, search: CodeSearch, state: State) -> Codes | None:
        """Find the pre-activations above zero."""
        del state
        return search.above(0.0)

    def penalize_codes(
        self, codes: Codes, d_code: Pairs, weight: float, state: State
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        """Add the gradient of the sum of the codes.

        Args:
            codes: Codes, all above zero.
            d_code: Gradient of each code, to which the same number is added.
        """
        del state
        d_code += weight * self.l1
        return weight * self.l1 * codes.values.sum(), {}


class _Jump(torch.autograd.Function):
    """`x`, or 1, where `x` is above the threshold, with a pseudo-derivative for the threshold."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float, counts: bool) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.counts = bandwidth, counts
        is_open = pre > threshold
        return is_open.to(pre.dtype) if counts else pre * is_open

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,), (pre, threshold) = gradients, ctx.saved_tensors
        near = (_window(pre, threshold, ctx.bandwidth) * gradient).sum(dim=0)
        if ctx.counts:
            return None, near / -ctx.bandwidth, None, None
        return gradient * (pre > threshold), threshold / -ctx.bandwidth * near, None, None


def _window(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((pre - threshold).abs_() < bandwidth / 2).logical_and_(pre > 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JumpReLU(Rule):
    """Keep what is above a threshold that each latent learns (Rajamanoharan et al., 2024).

    The penalty is on the number of latents kept. A number has no gradient, so thresholds learn
    from the pre-activations within half a bandwidth of them (equations 11 and 12 of the paper).
    The logarithm of the threshold is learned, which keeps it above zero.
    """

    l0: float = 1.0
    """Weight of the number of latents kept; one is worth it from a code of about its root."""
    threshold: float = 0.3
    """Threshold at the start."""
    bandwidth: float = 0.3
    """Width of the window around a threshold from which it learns."""

    def __post_init__(self) -> None:
        check_ranges(self, l0=POSITIVE, threshold=POSITIVE, bandwidth=POSITIVE)

    def __call__(self, pre: Latents, state: State = NONE) -> Latents:
        """Zero what is not above its latent's threshold."""
        return pre * (pre > state["log_threshold"].exp())

    def parameters(self, n_latents: int) -> dict[str, Tensor]:
        """The logarithm of each latent's threshold."""
        return {"log_threshold": torch.full((n_latents,), math.log(self.threshold))}

    def training_code(self, pre: Latents, state: State = NONE) -> Latents:
        """Code of each sample, from which the threshold learns."""
        return _Jump.apply(pre, state["log_threshold"].exp(), self.bandwidth, False)

    def penalty(
        self, pre: Latents, code: Latents, unexplained: Unexplained, state: State = NONE
    ) -> Rowwise:
        """Compute `l0` times the number of latents kept.

        Args:
            pre: Pre-activations of some samples, which are compared with the thresholds.
            state: Tensors of this rule, to which the penalty has a pseudo-derivative.
        """
        del code, unexplained
        threshold = state["log_threshold"].exp()
        return self.l0 * _Jump.apply(pre, threshold, self.bandwidth, True).sum(dim=-1)

    def least_that_learns(self, state: State) -> Float[Tensor, " latent"]:
        """Lower end of the window around each threshold."""
        return (state["log_threshold"].detach().exp() - self.bandwidth / 2).clamp_min(0)

    def find_codes(self, search: CodeSearch, state: State) -> Codes | None:
        """Find the pre-activations above the lower end of the window around their threshold."""
        codes = search.above(self.least_that_learns(state))
        if codes is None:
            return None
        threshold = state["log_threshold"].detach().exp()
        return codes._replace(values=codes.raw * (codes.raw > threshold[codes.latents]))

    def penalize_codes(
        self, codes: Codes, d_code: Pairs, weight: float, state: State
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        """Compute the pseudo-derivatives of loss and penalty with respect to the thresholds.

        Args:
            codes: Codes, with pre-activations `raw` down to the lower end of the window.
            d_code: Gradient of each code. Not changed: the penalty has none for the codes.
        """
        threshold = state["log_threshold"].detach().exp()
        own = threshold[codes.latents]
        window = (codes.raw - own).abs() < self.bandwidth / 2  # `find_codes` finds none below zero
        to_threshold = window * (own * d_code + weight * self.l0) * (own / -self.bandwidth)
        gradient = _by_latent(codes, to_threshold, len(threshold))
        n_kept = (codes.values != 0).sum(dtype=codes.values.dtype)
        return weight * self.l0 * n_kept, {"log_threshold": gradient}

    def frozen(self, state: State, n_latents: int) -> tuple[Rule, State]:
        """Threshold of each latent."""
        del n_latents
        return Threshold(), {"threshold": state["log_threshold"].exp()}

    def rescale(self, factor: float, state: State) -> None:
        """The threshold has the pre-activations' units."""
        state["log_threshold"].add_(math.log(factor))


def _by_latent(codes: Codes, numbers: Pairs, n_latents: int) -> Float[Tensor, " latent"]:
    """Sum numbers of pairs by their latent."""
    sums = numbers.new_zeros(n_latents)
    if sums.device.type == "cpu":
        return sums.index_add_(0, codes.latents, numbers)
    # This sums in one order there, as `index_add_` does not.
    return sums.index_put_((codes.latents.long(),), numbers, accumulate=True)


@dataclasses.dataclass(frozen=True)
class Threshold(Rule):
    """Keep what is positive and above the threshold of its latent.

    `JumpReLU` learns the logarithm of such thresholds. In files they may also be zero
    or negative, and rounding a logarithm could move one past a pre-activation.
    """

    def __call__(self, pre: Latents, state: State = NONE) -> Latents:
        """Zero what is at or below its threshold, or below zero."""
        return pre.relu() * (pre > state["threshold"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gated(Rule):
    """Keep the latents whose gate is open, at a size of their own (Rajamanoharan et al., 2024).

    The pre-activation is the gate's; the size is `relu(exp(r_mag) pre + b_mag)`, which is the
    paper's with the gate's bias taken into `b_mag`. The gate is trained by a penalty on its sum
    and by the error that it would leave as a code of its own.
    """

    l1: float = 1.0
    """Weight of the open gates' sum beside the squared errors."""

    has_gates = True

    def __post_init__(self) -> None:
        check_ranges(self, l1=POSITIVE)

    def __call__(self, pre: Latents, state: State = NONE) -> Latents:
        """The sizes of latents whose gate is open."""
        return (pre > 0) * (pre * state["r_mag"].exp() + state["b_mag"]).relu()

    def parameters(self, n_latents: int) -> dict[str, Tensor]:
        """Factor and offset by which a size follows from its gate."""
        return {"r_mag": torch.zeros(n_latents), "b_mag": torch.zeros(n_latents)}

    def penalty(
        self, pre: Latents, code: Latents, unexplained: Unexplained, state: State = NONE
    ) -> Rowwise:
        """Compute `l1` times the open gates' sum, plus the error that the gates alone leave.

        Args:
            pre: Pre-activations of some samples, which are those of the gates.
            code: Not read, like `state`.
            unexplained: Squared error that the gates leave as a code, by a decoder held fixed.
        """
        del code, state
        gates = pre.relu()
        return self.l1 * gates.sum(dim=-1) + unexplained(gates)

    def find_codes(self, search: CodeSearch, state: State) -> Codes | None:
        """Find the sizes of the pre-activations above zero; some sizes may be zero."""
        gates = search.above(0.0)
        if gates is None:
            return None
        factor, offset = (state[name].detach()[gates.latents] for name in ("r_mag", "b_mag"))
        return gates._replace(values=(gates.raw * factor.exp() + offset).relu())

    def penalize_codes(
        self, codes: Codes, d_code: Pairs, weight: float, state: State
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        """Lead the gradient of each size to its gate, factor and offset; add that of the sum.

        Args:
            codes: Codes, with the gates' pre-activations `raw`, all above zero.
            d_code: Gradient of each size, which becomes that of its gate.
        """
        factor = state["r_mag"].detach().exp()[codes.latents]
        d_size = d_code * (codes.values > 0)
        n_latents = len(state["r_mag"])
        learned = {
            "r_mag": _by_latent(codes, d_size * codes.raw * factor, n_latents),
            "b_mag": _by_latent(codes, d_size, n_latents),
        }
        torch.mul(d_size, factor, out=d_code).add_(weight * self.l1)
        return weight * self.l1 * codes.raw.sum(), learned

    def rescale(self, factor: float, state: State) -> None:
        """`b_mag` has the pre-activations' units."""
        state["b_mag"].mul_(factor)


Sparsity = TopK | BatchTopK | ReLU | JumpReLU | Gated
"""Rules that a recipe can name; in Python any callable of the same form will do."""
