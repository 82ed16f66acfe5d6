"""Dictionaries that other libraries trained, to be used as they are.

The conventions in which libraries differ are spelt out as parts that combine: which rule makes
the code sparse, whether `b_dec` is taken from the input, how a row is scaled before it is read,
and whether what is reconstructed is the input or another site.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from mechatlas.base import InputError, WeightsError
from mechatlas.dictionaries.rows import as_batch, check_width
from mechatlas.dictionaries.sparsity import NONE, JumpReLU, Rule, State, as_rule


class RowUnits(NamedTuple):
    """Units of each row, and the way back from them."""

    mean: Float[Tensor, "batch 1"]
    """Mean, which is taken from the row first and added last."""
    divisor: Float[Tensor, "batch 1"]
    scale: Float[Tensor, "batch 1"]
    """Factor on the way back."""


TINY = 1e-30
"""Smallest length that a row is divided by: a row of zeros stays one."""

RowNorm = Callable[[Tensor], RowUnits]


def root_length(x: Float[Tensor, "batch d_in"]) -> RowUnits:
    """Units in which each row has length `sqrt(d_in)` (SAELens' `constant_norm_rescale`)."""
    length = (x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5).clamp_min(TINY)
    return RowUnits(length.new_zeros(length.shape), length, length)


def layer_norm(x: Float[Tensor, "batch d_in"]) -> RowUnits:
    """Units in which each row has mean 0 and standard deviation 1 (SAELens' `layer_norm`)."""
    deviation = x.std(dim=-1, keepdim=True)
    return RowUnits(x.mean(dim=-1, keepdim=True), deviation + 1e-5, deviation)


def _with_units(code: Tensor, units: RowUnits | None) -> Tensor:
    """Code with the units of its rows noted on it."""
    if units:
        code.row_units = units  # pyright: ignore[reportAttributeAccessIssue]
    return code


class Pretrained(nn.Module):
    """Codes `sparsity((norm(x) - b_dec) W_enc + b_enc)`, reconstructions `code W_dec + b_dec`.

    Where `norm` puts every row into units of its own, a code alone does not say how large its
    row was. `encode` therefore notes the units on the code that it gives, and `decode` undoes
    them; a code that was computed from it needs the rows once more: `decode(code, x)`.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    W_skip: Tensor | None

    def __init__(
        self,
        *,
        W_enc: Float[Tensor, "d_in latent"],  # noqa: N803 - the field's name
        b_enc: Float[Tensor, " latent"],
        W_dec: Float[Tensor, "latent d_out"],  # noqa: N803
        b_dec: Float[Tensor, " d_out"],
        sparsity: Rule,
        state: State = NONE,
        subtracts_b_dec: bool,
        norm: RowNorm | None = None,
        transcodes: bool = False,
        W_skip: Float[Tensor, "d_in d_out"] | None = None,  # noqa: N803
        file_format: str = "",
        site: str | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            W_enc: Encoder weights.
            b_enc: Encoder bias; with a gated rule, the gate's.
            W_dec: Atoms.
            b_dec: Bias of the reconstruction.
            sparsity: Sparsity rule.
            state: Tensors of the rule's own.
            subtracts_b_dec: Whether `b_dec` is taken from the input before it is encoded.
            norm: Scaling of each row before that.
            transcodes: Whether another site than the input is reconstructed.
            W_skip: Linear map of the input as it was given, which `forward` adds.
            file_format: Format of the file it was read from.
            site: Site it was trained on, if the file says so.

        Raises:
            ValueError: `b_dec` is as wide as the output and cannot be taken from the input.
        """
        super().__init__()
        self.d_in, self.n_latents, self.d_out = len(W_enc), len(W_dec), W_dec.shape[1]
        if self.d_in != self.d_out and (subtracts_b_dec or not transcodes):
            raise ValueError(
                f"A dictionary from {self.d_in} to {self.d_out} is a transcoder, and cannot "
                "take b_dec from its input."
            )
        weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        for name, tensor in {**weights, "W_skip": W_skip, **state}.items():
            self.register_buffer(name, tensor)
        self._state = list(state)
        self._rule, self._rule_is_read, self.norm = sparsity, True, norm
        self.subtracts_b_dec, self.transcodes = subtracts_b_dec, transcodes
        self.file_format, self.site = file_format, site

    @property
    def state(self) -> dict[str, Tensor]:
        """The sparsity rule's own tensors."""
        return {name: getattr(self, name) for name in self._state}

    @property
    def sparsity(self) -> Rule:
        """Sparsity rule; one that is assigned says by which penalty the dictionary is trained."""
        return self._rule

    @sparsity.setter
    def sparsity(self, sparsity: Callable[..., Tensor]) -> None:
        rule, known = as_rule(sparsity), self.state
        if isinstance(rule, JumpReLU) and "threshold" in known:
            known["log_threshold"] = known["threshold"].clamp_min(TINY).log()
        for name in self._state:
            delattr(self, name)
        state = {**rule.parameters(self.n_latents), **rule.buffers(self.n_latents)}
        for name, start in state.items():
            own = known.get(name, start)
            own = own if own.shape == start.shape else start
            self.register_buffer(name, own.detach().clone().to(self.W_dec))
        self._state, self._rule, self._rule_is_read = list(state), rule, False

    @property
    def config(self) -> dict[str, Any]:
        """Arguments to build it again.

        Raises:
            WeightsError: Always: there is no file of ours for the conventions of other libraries.
        """
        raise WeightsError(
            f"A dictionary read from a file of {self.file_format or 'another library'} "
            "cannot be written in our own format; write it with format='saelens'."
        )

    def make_trainable(self) -> None:
        """Turn the weights into parameters, to train a dictionary of another library further.

        Raises:
            InputError: No penalty keeps the codes sparse, or there is a skip connection, which
                `decode` leaves out.
        """
        keeps_k = self.sparsity.by_row and hasattr(self.sparsity, "k")
        if self._rule_is_read and not keeps_k:
            name = type(self.sparsity).__name__
            own = {"ReLU": "ReLU(l1=1.0)", "Gated": "Gated(l1=1.0)"}.get(name, "JumpReLU(l0=1.0)")
            raise InputError(
                f"Cannot train on a dictionary of {self.file_format or 'another library'} with the "
                f"rule {name}: its file does not say by which penalty its codes were kept sparse. "
                f"Give the penalty, as dictionary.sparsity = ma.{own}, or another rule."
            )
        if self.W_skip is not None:
            raise InputError(
                "Cannot train on a transcoder with a skip connection; build a Transcoder."
            )
        learned = self.sparsity.parameters(1)
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", *learned):
            weight = getattr(self, name)
            if not isinstance(weight, nn.Parameter):
                delattr(self, name)
                self.register_parameter(name, nn.Parameter(weight.detach().clone()))
        if self.transcodes:
            self.reads, self.writes = slice(0, self.d_in), slice(self.d_in, self.d_in + self.d_out)

    def as_pretrained(self) -> "Pretrained":
        """See this dictionary in the parts of other libraries."""
        rule, state = self.sparsity.frozen(self.state, self.n_latents)
        if rule is self.sparsity:
            return self
        return Pretrained(
            W_enc=self.W_enc, b_enc=self.b_enc, W_dec=self.W_dec, b_dec=self.b_dec,
            sparsity=rule, state=state, subtracts_b_dec=self.subtracts_b_dec, norm=self.norm,
            transcodes=self.transcodes, W_skip=self.W_skip, file_format=self.file_format,
            site=self.site,
        )  # fmt: skip

    def encode(self, x: Any) -> Float[Tensor, "batch latent"]:
        """Sparse code of each sample, a tensor (batch, d_in), an array or lists.

        Raises:
            InputError: The rows are not `d_in` wide, or are no real numbers.
        """
        pre, units = self._pre_activations(x)
        return _with_units(self.sparsity(pre, self.state), units)

    def _pre_activations(self, x: Any) -> tuple[Tensor, RowUnits | None]:
        """Pre-activations of some rows, and the units that the rows were brought to."""
        x = as_batch(x, self.W_enc)
        check_width(x, self.d_in, self.W_enc.device)
        units = self.norm(x) if self.norm else None
        if units:
            x = (x - units.mean) / units.divisor
        if self.subtracts_b_dec:
            x = x - self.b_dec
        return x @ self.W_enc + self.b_enc, units

    def training_code(
        self,
        x: Float[Tensor, "batch d_in"],
        target: Float[Tensor, "batch d_out"],
        weights: Float[Tensor, " batch"],
    ) -> tuple[Float[Tensor, "batch latent"], Float[Tensor, " batch"]]:
        """Encode rows in training, and compute the penalty of the rule for each.

        Args:
            x: Rows.
            target: Rows that are reconstructed.
            weights: Weight of the squared error of each row.
        """
        pre, units = self._pre_activations(x)
        code = _with_units(self.sparsity.training_code(pre, self.state), units)
        if not self.sparsity.by_row and bool((code > 0).any()):
            self.sparsity.update_threshold(code[code > 0].detach().min(), self.state)
        atoms, bias = self.W_dec.detach(), self.b_dec.detach()

        def unexplained(gates: Tensor) -> Tensor:
            out = gates @ atoms + bias
            if units and not self.transcodes:
                out = out * units.scale + units.mean
            return weights * (target - out).square().sum(dim=-1)

        return code, self.sparsity.penalty(pre, code, unexplained, self.state)

    def decode(
        self, code: Float[Tensor, "batch latent"], x: Float[Tensor, "batch d_in"] | None = None
    ) -> Float[Tensor, "batch d_out"]:
        """Reconstruction in the units of the input.

        Args:
            code: As `encode` gives it, changed or not.
            x: The rows of a changed code, where `norm` scales each row by itself.

        Raises:
            InputError: The units of the rows are needed and unknown.
        """
        out = code @ self.W_dec + self.b_dec
        if self.norm is None or self.transcodes:
            return out
        units = getattr(code, "row_units", None) if x is None else self.norm(x.to(out.dtype))
        if units is None:
            raise InputError(
                "This dictionary scales every row by itself, and a changed code does not say "
                "how large its row was: give the rows too, decode(code, x)."
            )
        return out * units.scale + units.mean

    def forward(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        """Encode, then decode, and add what the skip connection passes."""
        out = self.decode(self.encode(x))
        return out if self.W_skip is None else out + x.to(out.dtype) @ self.W_skip

    def extra_repr(self) -> str:
        """Sizes, conventions, and the format of the file."""
        norm = getattr(self.norm, "__name__", self.norm)
        return (
            f"d_in={self.d_in}, n_latents={self.n_latents}, d_out={self.d_out}, "
            f"sparsity={self.sparsity}, subtracts_b_dec={self.subtracts_b_dec}, norm={norm}, "
            f"transcodes={self.transcodes}, from {self.file_format}"
        )
