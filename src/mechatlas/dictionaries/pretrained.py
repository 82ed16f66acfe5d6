"""Dictionaries that other libraries trained, to be used as they are.

The conventions in which libraries differ are spelt out as parts that combine: which rule makes
the code sparse, whether `b_dec` is taken from the input, how a row is scaled before it is read,
and whether what is reconstructed is the input or another site.

    Pretrained              one encoder and one decoder, which may write several sites
    CrossLayerDictionary    several of them, each of which reads a site of its own
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechatlas.base import InputError
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
BLOCK = 8192
"""Latents whose weights are widened at once, where they are kept in a narrower number format."""


def root_length(x: Float[Tensor, "batch d_in"]) -> RowUnits:
    """Units in which each row has length `sqrt(d_in)` (SAELens' `constant_norm_rescale`)."""
    length = (x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5).clamp_min(TINY)
    return RowUnits(length.new_zeros(length.shape), length, length)


def layer_norm(x: Float[Tensor, "batch d_in"]) -> RowUnits:
    """Units in which each row has mean 0 and standard deviation 1 (SAELens' `layer_norm`)."""
    deviation = x.std(dim=-1, keepdim=True)
    return RowUnits(x.mean(dim=-1, keepdim=True), deviation + 1e-5, deviation)


NORMS: dict[str, RowNorm] = {"layer_norm": layer_norm, "root_length": root_length}
"""Ways to scale each row by itself, by the names that files of ours have for them."""


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
        widths: Mapping[str, int] | None = None,
        metadata: Mapping[str, Any] | None = None,
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
            widths: Width of each site that is written, side by side, if there are several.
            metadata: Further entries of the file, such as `model_name`, for the files that other
                libraries are to read.

        Raises:
            ValueError: The widths do not add up, or `b_dec` is as wide as the output and cannot be
                taken from the input.
        """
        super().__init__()
        self.d_in, self.n_latents, self.d_out = len(W_enc), len(W_dec), W_dec.shape[1]
        if self.d_in != self.d_out and (subtracts_b_dec or not transcodes):
            raise ValueError(
                f"A dictionary from {self.d_in} to {self.d_out} is a transcoder, and cannot "
                "take b_dec from its input."
            )
        self.spans = spans_of(widths or {})
        if self.spans and sum((widths or {}).values()) != self.d_out:
            raise ValueError(f"Sites of widths {dict(widths or {})} are not {self.d_out} wide.")
        weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        for name, tensor in {**weights, "W_skip": W_skip, **state}.items():
            self.register_buffer(name, tensor)
        self._state = list(state)
        self._rule, self._rule_is_read, self.norm = sparsity, True, norm
        self.subtracts_b_dec, self.transcodes = subtracts_b_dec, transcodes
        self.file_format, self.site, self.metadata = file_format, site, dict(metadata or {})

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
    def sites(self) -> tuple[str, ...]:
        """Names of the sites that it writes, in the order of the columns."""
        return tuple(self.spans)

    @property
    def config(self) -> dict[str, Any]:
        """Conventions, as plain values and a rule, from which `formats` builds it again."""
        norm = next((name for name, norm in NORMS.items() if norm is self.norm), None)
        return {
            "sparsity": self.sparsity,
            "subtracts_b_dec": self.subtracts_b_dec,
            "norm": norm,
            "transcodes": self.transcodes,
            "file_format": self.file_format,
            "site": self.site,
            "widths": {name: span.stop - span.start for name, span in self.spans.items()},
            "metadata": self.metadata,
        }

    def make_trainable(self) -> None:
        """Turn the weights into parameters, to train a dictionary of another library further.

        Raises:
            InputError: No penalty keeps the codes sparse, or there is a skip connection, which
                `decode` leaves out.
        """
        rule = self.sparsity
        keeps_k = rule.by_row and hasattr(rule, "k") and not rule.by_site
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
            site=self.site, metadata=self.metadata,
            widths={name: span.stop - span.start for name, span in self.spans.items()},
        )  # fmt: skip

    def encode(self, x: Any) -> Float[Tensor, "batch latent"]:
        """Sparse code of each sample, a tensor (batch, d_in), an array or lists.

        Raises:
            InputError: The rows are not `d_in` wide, or are no real numbers.
        """
        if self.sparsity.pursues:
            x, units = self._centered(x)
            return _with_units(self.sparsity.pursue(x, self.W_dec), units)
        pre, units = self._pre_activations(x)
        return _with_units(self.sparsity(pre, self.state), units)

    def _pre_activations(self, x: Any) -> tuple[Tensor, RowUnits | None]:
        """Pre-activations of some rows, and the units that the rows were brought to."""
        x, units = self._centered(x)
        return _product(x, self.W_enc) + self.b_enc, units

    def _centered(self, x: Any) -> tuple[Tensor, RowUnits | None]:
        """Rows as the encoder reads them, and the units that they were brought to."""
        x = as_batch(x, self.W_enc.device)
        check_width(x, self.d_in, self.W_enc.device)
        x = x.to(_wide(x, self.W_enc))
        units = self.norm(x) if self.norm else None
        if units:
            x = (x - units.mean) / units.divisor
        if self.subtracts_b_dec:
            x = x - self.b_dec
        return x, units

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
        if self.sparsity.by_site:
            parts = [self._at_site(code, site) for site in self.spans]
            return torch.cat(parts, dim=-1) + self.b_dec
        out = _sum_of_atoms(code, self.W_dec) + self.b_dec
        if self.norm is None or self.transcodes:
            return out
        units = getattr(code, "row_units", None) if x is None else self.norm(x.to(out.dtype))
        if units is None:
            raise InputError(
                "This dictionary scales every row by itself, and a changed code does not say "
                "how large its row was: give the rows too, decode(code, x)."
            )
        return out * units.scale + units.mean

    def decode_site(
        self, code: Float[Tensor, "batch latent"], site: str
    ) -> Float[Tensor, "batch width"]:
        """Reconstruction of one of several sites.

        Raises:
            InputError: No site of that name is written.
        """
        return self._at_site(code, site) + self.b_dec[span_of(self.spans, site)]

    def _at_site(self, code: Tensor, site: str) -> Tensor:
        """Sum of the atoms of one site, of the latents that the site uses."""
        span = span_of(self.spans, site)
        own = self.sparsity.at_site(code, self.state, list(self.spans).index(site))
        return _sum_of_atoms(own, self.W_dec[:, span])

    def forward(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        """Encode, then decode, and add what the skip connection passes."""
        out = self.decode(self.encode(x))
        return out if self.W_skip is None else out + x.to(out.dtype) @ self.W_skip.to(out.dtype)

    def extra_repr(self) -> str:
        """Sizes, conventions, and the format of the file."""
        norm = getattr(self.norm, "__name__", self.norm)
        return (
            f"d_in={self.d_in}, n_latents={self.n_latents}, d_out={self.d_out}, "
            f"sparsity={self.sparsity}, subtracts_b_dec={self.subtracts_b_dec}, norm={norm}, "
            f"transcodes={self.transcodes}, from {self.file_format}"
        )


class CrossLayerDictionary(nn.Module):
    """Cross-layer transcoder: dictionaries that each read one site and write several.

    A row holds the sites that are read, side by side; so does a reconstruction those written.
    Latents of the sites follow one another in the code.
    """

    def __init__(self, layers: Sequence[Pretrained], reads: Sequence[str]) -> None:
        """Put the dictionaries together.

        Args:
            layers: One dictionary for each site that is read; the first writes all sites, each
                a run of neighbors.
            reads: Names of the sites that are read.

        Raises:
            ValueError: A dictionary writes a site that the first does not, or not in its order.
        """
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.spans, self.site = layers[0].spans, None
        self.reads = spans_of(dict(zip(reads, (each.d_in for each in layers), strict=True)))
        names = list(self.spans)
        for each in layers:
            start = names.index(each.sites[0]) if each.sites else -1
            if start < 0 or list(each.sites) != names[start : start + len(each.sites)]:
                raise ValueError(f"Sites {each.sites} are no run of neighbors among {names}.")
        self.d_in = sum(each.d_in for each in layers)
        self.d_out = layers[0].d_out
        self.n_latents = sum(each.n_latents for each in layers)
        self.transcodes, self.subtracts_b_dec, self.norm = layers[0].transcodes, False, None
        self.file_format, self.sparsity = layers[0].file_format, layers[0].sparsity

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites that it writes, in the order of the columns."""
        return tuple(self.spans)

    @property
    def config(self) -> dict[str, Any]:
        """Conventions of each dictionary, from which `formats` builds it again."""
        return {"layers": [each.config for each, *_ in self.parts()], "reads": list(self.reads)}

    def parts(self) -> list[tuple[Pretrained, slice, slice, slice]]:
        """List each dictionary, its columns read, its latents and its columns written."""
        own = [each for each in self.layers if isinstance(each, Pretrained)]
        edges = accumulate((each.n_latents for each in own), initial=0)
        latents = [slice(low, high) for low, high in pairwise(edges)]
        starts = [self.spans[each.sites[0]].start for each in own]
        written = [slice(a, a + each.d_out) for a, each in zip(starts, own, strict=True)]
        return list(zip(own, self.reads.values(), latents, written, strict=True))

    @property
    def W_enc(self) -> Float[Tensor, "d_in latent"]:  # noqa: N802 - the field's name
        """Encoder weights of all sites, mostly zeros; made anew at each call."""
        whole = torch.zeros(self.d_in, self.n_latents)
        for each, read, latents, _ in self.parts():
            whole[read, latents] = each.W_enc.to(whole)
        return whole

    @property
    def W_dec(self) -> Float[Tensor, "latent d_out"]:  # noqa: N802
        """Atoms over all sites, zero where a site is not written; made anew at each call."""
        whole = torch.zeros(self.n_latents, self.d_out)
        for each, _, latents, written in self.parts():
            whole[latents, written] = each.W_dec.to(whole)
        return whole

    @property
    def b_enc(self) -> Float[Tensor, " latent"]:
        """Encoder biases of all sites."""
        return torch.cat([each.b_enc for each, *_ in self.parts()])

    @property
    def b_dec(self) -> Float[Tensor, " d_out"]:
        """Biases of the reconstructions of all sites."""
        parts = self.parts()
        whole = torch.zeros(self.d_out, device=parts[0][0].b_dec.device)
        for each, _, _, written in parts:
            whole[written] += each.b_dec
        return whole

    def encode(self, x: Any) -> Float[Tensor, "batch latent"]:
        """Sparse code of each sample, a tensor (batch, d_in), an array or lists.

        Raises:
            InputError: The rows are not `d_in` wide, or are no real numbers.
        """
        x = as_batch(x, self.b_enc.device)
        check_width(x, self.d_in, self.b_enc.device)
        return torch.cat([each.encode(x[..., read]) for each, read, *_ in self.parts()], dim=-1)

    def decode(self, code: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch d_out"]:
        """Reconstruction of all sites."""
        out = self.b_dec.to(code).expand(*code.shape[:-1], self.d_out).clone()
        for each, _, latents, written in self.parts():
            out[..., written] += _sum_of_atoms(code[..., latents], each.W_dec)
        return out

    def decode_site(
        self, code: Float[Tensor, "batch latent"], site: str
    ) -> Float[Tensor, "batch width"]:
        """Reconstruction of one of the sites.

        Raises:
            InputError: No site of that name is written.
        """
        out = self.b_dec[span_of(self.spans, site)].to(code)
        for each, _, latents, _ in self.parts():
            if site in each.spans:
                out = out + _sum_of_atoms(code[..., latents], each.W_dec[:, each.spans[site]])
        return out

    def forward(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        """Encode, then decode, and add what the skip connections pass."""
        out = self.decode(self.encode(x))
        for each, read, _, written in self.parts():
            if each.W_skip is not None:
                out[..., written] += x[..., read].to(out.dtype) @ each.W_skip.to(out.dtype)
        return out

    def extra_repr(self) -> str:
        """Sizes, sites, and the format of the file."""
        return (
            f"d_in={self.d_in}, n_latents={self.n_latents}, sites={len(self.spans)}, "
            f"from {self.file_format}"
        )


def reading_of(dictionary: Any) -> str:
    """Width that a dictionary reads, in words that name the sites of one that reads several."""
    reads = getattr(dictionary, "reads", None)
    if not isinstance(reads, dict):
        crosscodes = isinstance(dictionary, Pretrained) and not dictionary.transcodes
        reads = dictionary.spans if crosscodes else {}
    if len(reads) < 2:
        return str(dictionary.d_in)
    return f"{dictionary.d_in} ({len(reads)} sites side by side: {', '.join(reads)})"


def spans_of(widths: Mapping[str, int]) -> dict[str, slice]:
    """Columns of each site, side by side in the order given."""
    edges = accumulate(widths.values(), initial=0)
    return dict(zip(widths, (slice(a, b) for a, b in pairwise(edges)), strict=True))


def span_of(spans: Mapping[str, slice], site: str) -> slice:
    """Columns of one site.

    Raises:
        InputError: There is no site of that name.
    """
    if site not in spans:
        names = ", ".join(spans) or "one site without a name"
        raise InputError(f"The dictionary does not write {site!r}; it writes {names}.")
    return spans[site]


def _wide(x: Tensor, weights: Tensor) -> torch.dtype:
    """Number format to compute in: that of the weights, unless they are kept in a narrow one."""
    kept = weights.dtype
    return torch.promote_types(x.dtype, kept) if kept.itemsize < 4 else kept


def _product(x: Tensor, weights: Tensor) -> Tensor:
    """Product with encoder weights, which are widened block by block where they are narrower."""
    if weights.dtype == x.dtype:
        return x @ weights
    return torch.cat([x @ part.to(x.dtype) for part in weights.split(BLOCK, dim=-1)], dim=-1)


def _sum_of_atoms(code: Tensor, atoms: Tensor) -> Tensor:
    """Product with atoms, which are widened block by block where they are narrower."""
    if atoms.dtype == code.dtype:
        return code @ atoms
    pairs = zip(code.split(BLOCK, dim=-1), atoms.split(BLOCK), strict=True)
    return torch.stack([part @ rows.to(code.dtype) for part, rows in pairs]).sum(dim=0)
