"""Sparse dictionaries: an encoder, a sparsity rule, a decoder.

    Autoencoder   reads a site and writes the same site
    Transcoder    reads one site and writes another
    Crosscoder    writes several sites, and reads all of them or one

All three are a `LinearCoder` and differ in the columns of a row of activations that they read and
write; `SparseCoder` is the contract of every kind that `train` knows best. A dictionary is its own
configuration: the arguments it was built with are what it shows and what is saved beside its
weights.

An atom's length is fixed while it is trained. For a crosscoder the length is the sum of its
lengths at the sites, so a penalty on the code is the one of the literature, on the code times
the sum of decoder norms: the scale of a latent is free, and this is one way to fix it.

Source: Gao et al., Scaling and evaluating sparse autoencoders (2024); Bozoukov, Branch
specialization with k-sparse autoencoders (2025), for the tied form; Bussmann et al., Matryoshka
sparse autoencoders (2025); Lindsey et al., Sparse crosscoders (2024).
"""

import abc
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechatlas.deprecated import renamed_arguments
from mechatlas.dictionaries.engine.fallback import lengths
from mechatlas.dictionaries.engine.interface import Step
from mechatlas.dictionaries.engine.threads import workers
from mechatlas.dictionaries.metrics import History
from mechatlas.dictionaries.objective import Objective
from mechatlas.dictionaries.pretrained import Pretrained, span_of
from mechatlas.dictionaries.revival import AuxK, Resample
from mechatlas.dictionaries.rows import as_batch, check_width
from mechatlas.dictionaries.sparsity import Gated, JumpReLU, ReLU, TopK, as_rule

FIRST_ROWS = 1024
"""Rows of the first batch used to estimate the initial size of the codes."""
FIRST_DENSITY = 0.03
"""Fraction of those rows on which a latent learns at first, if its rule has no k."""
SMALLEST_LENGTH = 1e-12
"""Smallest length that an atom is divided by."""


class SparseCoder(nn.Module, abc.ABC):
    """Dictionary with atoms of fixed length and a sparsity rule; build one of its kinds.

    A kind makes its weights, and says how it encodes, decodes and is trained.
    """

    reads: slice
    """Columns of a row of activations that are encoded."""
    writes: slice
    """Columns of a row of activations that are reconstructed."""
    subtracts_b_dec: bool
    """Whether `b_dec` is taken from the input before it is encoded."""
    untrained: bool
    """Whether biases and thresholds are still those of the start."""
    history: History | None
    """Measurements of the training, if it was trained in this process."""
    W_dec: Tensor
    """Atoms, one a row."""
    b_enc: Tensor
    b_dec: Tensor

    def __init__(
        self,
        *,
        read: range,
        write: range,
        edges: Sequence[int],
        config: dict[str, Any],
    ) -> None:
        """Set all but the weights.

        Args:
            read: Columns of a row that are encoded.
            write: Columns of a row that are reconstructed.
            edges: Bounds of the sites among the columns written.
            config: Arguments that the kind was built with.

        Raises:
            ValueError: A size is below 1, k is more than the latents, or Matryoshka widths do not
                rise.
        """
        super().__init__()
        self.d_in, self.d_out, self.edges = len(read), len(write), tuple(edges)
        self.reads, self.writes = slice(read.start, read.stop), slice(write.start, write.stop)
        self.width = max(read.stop, write.stop)
        self.subtracts_b_dec, self.config = read == write, config
        self.n_latents, self.tied = int(config["n_latents"]), bool(config.get("tied", False))
        self.sparsity = config["sparsity"] = config["sparsity"] or TopK()
        self.rule = as_rule(self.sparsity)
        self.untrained, self.history = True, None
        _check_sizes(self)
        widths = _checked_widths(config.get("matryoshka_widths", ()), self.n_latents)
        self.matryoshka_widths = (*widths, self.n_latents)
        self._state = [*self.rule.parameters(1), *self.rule.buffers(1)]

    @property
    @abc.abstractmethod
    def W_enc(self) -> Float[Tensor, "d_in latent"]:  # noqa: N802 - the field's name
        """Encoder weights, one column a latent."""

    @property
    @abc.abstractmethod
    def encoder_parameters(self) -> list[Tensor]:
        """Parameters that codes are proportional to: the encoder's weights, then its biases."""

    @property
    @abc.abstractmethod
    def sites(self) -> list[slice]:
        """Columns of a row that share a scale."""

    @property
    def state(self) -> dict[str, Tensor]:
        """The sparsity rule's own tensors."""
        return {name: getattr(self, name) for name in self._state}

    @abc.abstractmethod
    def pre_activations(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch latent"]:
        """Input of the sparsity rule.

        Raises:
            InputError: The rows are not `d_in` wide.
        """

    def encode(self, x: Any) -> Float[Tensor, "batch latent"]:
        """Sparse code of each sample, a tensor (batch, d_in), an array or lists.

        Raises:
            InputError: The rows are not `d_in` wide, or are no real numbers.
        """
        rows = as_batch(x, self.W_dec.device).to(self.b_dec.dtype)
        return self.rule(self.pre_activations(rows), self.state)

    @abc.abstractmethod
    def decode(self, code: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch d_out"]:
        """Reconstruction in the units of the activations written."""

    def forward(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        """Encode, then decode."""
        return self.decode(self.encode(x))

    @abc.abstractmethod
    def step(self, objective: Objective, revival: AuxK | Resample | None = None) -> Step:
        """Make the optimizer of this dictionary.

        Args:
            objective: Squared error that is minimized.
            revival: How dead latents will be brought back.

        Raises:
            ValueError: The kind cannot bring back dead latents in this way.
        """

    @abc.abstractmethod
    def normalize(self) -> None:
        """Give every atom length 1."""

    @abc.abstractmethod
    def start_at(self, mean: Float[Tensor, " width"]) -> None:
        """Set the biases so that the mean row has code zero and is reconstructed."""

    @abc.abstractmethod
    def rescale(self, scale: Float[Tensor, " width"]) -> None:
        """Change from rows times `scale` to rows, without changing what is computed."""

    @torch.no_grad()
    def initialize(self, x: Float[Tensor, "batch width"]) -> None:
        """Set biases and the size of the codes from the first batch.

        The k largest of many random pre-activations are large by chance and their atoms overlap, so
        that together they overshoot a row; and where sites are written that are not read, they
        say nothing of these yet. Codes start at the geometric mean of the size that is best now
        and their size if atoms were learned. The k largest stay the same.

        Without a k, half of all codes would be above zero, for as long as it takes the penalty to
        close them. Biases start where each latent learns on few rows.
        """
        self.start_at(x.mean(dim=0))
        x, by_bias = x[:FIRST_ROWS], isinstance(self.sparsity, ReLU | JumpReLU | Gated)
        read, target = x[:, self.reads], x[:, self.writes] - self.b_dec
        with workers(x.device):  # one thread, since several would sum in another order
            if by_bias:
                n_active = min(math.ceil(FIRST_DENSITY * len(x)), len(x) - 1)
                largest = self.pre_activations(read).topk(n_active + 1, dim=0).values
                least = self.rule.least_that_learns(self.state)
                self.b_enc.sub_(largest[-2:].mean(dim=0) - least)  # between two rows, at neither
            if self.tied or not (by_bias or hasattr(self.sparsity, "k")):
                return
            reconstruction = self.decode(self.encode(read)) - self.b_dec
            squares = reconstruction.square().sum().clamp(min=1e-30)
            best = float((reconstruction * target).sum() / squares)
        if best > 0 and (best < 1 or by_bias):
            for parameter in self.encoder_parameters:
                parameter.mul_(math.sqrt(best))

    def as_pretrained(self) -> Pretrained:
        """Copy this dictionary into the parts of other libraries."""
        rule, state = self.rule.frozen(self.state, self.n_latents)
        return Pretrained(
            W_enc=self.W_enc.detach(),
            b_enc=self.b_enc.detach(),
            W_dec=self.W_dec.detach(),
            b_dec=self.b_dec.detach(),
            sparsity=rule,
            state={name: tensor.detach() for name, tensor in state.items()},
            subtracts_b_dec=self.subtracts_b_dec,
            transcodes=not self.subtracts_b_dec,
        )

    def extra_repr(self) -> str:
        """Arguments that the dictionary was built with."""
        return ", ".join(f"{name}={value}" for name, value in self.config.items())


class LinearCoder(SparseCoder):
    """Dictionary with one dense encoder and one dense decoder.

    Codes are `rule((x - b_dec) W_enc + b_enc)`, without `b_dec` for kinds that do not write the
    columns they read, and reconstructions `code W_dec + b_dec`.
    """

    def __init__(
        self, *, read: range, write: range, edges: Sequence[int], config: dict[str, Any]
    ) -> None:
        """Build with random atoms; see `SparseCoder`."""
        super().__init__(read=read, write=write, edges=edges, config=config)
        atoms, rows = self._first_weights()
        self.W_dec = nn.Parameter(atoms)
        if not self.tied:
            self._W_enc = nn.Parameter(rows.T)
        self.b_enc = nn.Parameter(torch.zeros(self.n_latents))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        for name, start in self.rule.parameters(self.n_latents).items():
            self.register_parameter(name, nn.Parameter(start))
        for name, start in self.rule.buffers(self.n_latents).items():
            self.register_buffer(name, start)

    def _first_weights(self) -> tuple[Tensor, Tensor]:
        """Random atoms of length 1, and rows of an encoder that reads them."""
        if is_shell():
            n = self.n_latents
            return torch.empty(n, self.d_out), torch.empty(n, self.d_in)
        random = torch.Generator().manual_seed(self.config["seed"])
        atoms = self._draw(random, self.d_out)
        atoms.div_(atom_lengths(atoms, self.edges))
        rows = atoms if self.tied else self._first_encoder(atoms, random)
        if not self.tied and not hasattr(self.sparsity, "k"):
            # Half of the latents are above zero at first. Together they should rebuild a
            # row once, not as many times over as there are more of them than columns.
            rows *= min(1.0, 2 * self.d_in / self.n_latents)
        return atoms, rows

    def _draw(self, random: torch.Generator, width: int) -> Tensor:
        """Draw a row of numbers for each latent."""
        return torch.randn(self.n_latents, width, generator=random)

    def _first_encoder(self, atoms: Tensor, random: torch.Generator) -> Tensor:
        """Rows that read an atom as 1 where it is written as 1; random if it is not read at all."""
        # The numbers of a latent lie side by side in memory: training reads them by latent.
        offset = self.reads.start - self.writes.start
        if 0 <= offset < self.d_out:
            rows = atoms[:, offset : offset + self.d_in].clone()
        else:
            rows = self._draw(random, self.d_in)
            return rows / rows.norm(dim=-1, keepdim=True)
        return rows / rows.square().sum(dim=-1, keepdim=True)

    @property
    def W_enc(self) -> Float[Tensor, "d_in latent"]:  # noqa: N802 - the field's name
        """Encoder weights, one column a latent."""
        return self.W_dec.T if self.tied else self._W_enc

    @property
    def encoder_rows(self) -> Float[Tensor, "latent d_in"]:
        """Encoder weights, latents first and each side by side in memory, to change in place."""
        if self.tied:
            return self.W_dec.data
        rows = self._W_enc.data.T
        if not rows.is_contiguous() and rows.stride(1) != 1:
            self._W_enc.data = rows.contiguous().T
        return self._W_enc.data.T

    @property
    def encoder_parameters(self) -> list[Tensor]:
        """Parameters that codes are proportional to: the encoder's weights, then its biases."""
        return [self.W_dec if self.tied else self._W_enc, self.b_enc]

    @property
    def sites(self) -> list[slice]:
        """Columns of a row that share a scale."""
        if self.tied:
            return [self.reads]
        offset = self.writes.start
        written = [slice(low + offset, high + offset) for low, high in pairwise(self.edges)]
        return written if self.reads.start >= offset else [self.reads, *written]

    def pre_activations(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch latent"]:
        """Input of the sparsity rule.

        Raises:
            InputError: The rows are not `d_in` wide.
        """
        check_width(x, self.d_in, self.b_dec.device)
        read = x - self.b_dec if self.subtracts_b_dec else x
        return read.to(self.W_enc.dtype) @ self.W_enc + self.b_enc

    def decode(self, code: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch d_out"]:
        """Reconstruction in the units of the activations written."""
        return code.to(self.W_dec.dtype) @ self.W_dec + self.b_dec

    def step(self, objective: Objective, revival: AuxK | Resample | None = None) -> Step:
        """Make the optimizer: sparse where the sparsity rule has a fast path, else autograd."""
        from mechatlas.dictionaries.engine.sparse_steps import step_for  # imports this module

        del revival
        return step_for(self, objective)

    @torch.no_grad()
    def normalize(self) -> None:
        """Give every atom length 1."""
        self.W_dec.div_(atom_lengths(self.W_dec, self.edges))

    @torch.no_grad()
    def start_at(self, mean: Float[Tensor, " width"]) -> None:
        """Set the biases so that the mean row has code zero and is reconstructed."""
        self.b_dec.copy_(mean[self.writes])
        if not self.subtracts_b_dec:
            self.b_enc.copy_(-(mean[self.reads].to(self.W_enc.dtype) @ self.W_enc))

    @torch.no_grad()
    def rescale(self, scale: Float[Tensor, " width"]) -> None:
        """Change from rows times `scale` to rows, without changing what is computed.

        Codes come out in the units of the reconstruction where it has one unit: then atoms keep
        their length. Codes of a crosscoder of sites with different scales keep their units.
        """
        read, write = scale[self.reads], scale[self.writes]
        unit = float(write[0]) if bool((write == write[0]).all()) else 1.0
        if not self.tied:
            self._W_enc.mul_((read / unit)[:, None])
        self.W_dec.mul_(unit / write)
        self.b_dec.div_(write)
        self.b_enc.div_(unit)
        self.rule.rescale(1 / unit, self.state)
        self.untrained = False


class Autoencoder(LinearCoder):
    """Dictionary that reads a site and writes the same site."""

    @renamed_arguments
    def __init__(
        self,
        *,
        d_in: int,
        n_latents: int,
        sparsity: Callable[..., Tensor] | None = None,
        tied: bool = False,
        matryoshka_widths: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        """Build with random atoms of length 1.

        Args:
            d_in: Width of the activations.
            n_latents: Number of latents.
            sparsity: Sparsity rule; `TopK(k=32)` by default.
            tied: Whether the encoder is the transpose of the decoder.
            matryoshka_widths: Numbers of first latents that must explain the activations on their
                own, each as much as all latents.
            seed: Seed of the atoms.

        Raises:
            ValueError: A size is below 1, k is more than `n_latents`, or the widths do not rise.
        """
        config = {
            "d_in": d_in,
            "n_latents": n_latents,
            "sparsity": sparsity,
            "tied": tied,
            "matryoshka_widths": tuple(matryoshka_widths),
            "seed": seed,
        }
        columns = range(d_in)
        super().__init__(read=columns, write=columns, edges=(0, d_in), config=config)


class Transcoder(LinearCoder):
    """Dictionary that reads one site and writes another; a row has both, in this order."""

    @renamed_arguments
    def __init__(
        self,
        *,
        d_in: int,
        d_out: int,
        n_latents: int,
        sparsity: Callable[..., Tensor] | None = None,
        matryoshka_widths: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        """Build with random atoms and encoder rows of length 1.

        Args:
            d_in: Width of the activations read.
            d_out: Width of the activations written.
            n_latents: Number of latents.
            sparsity: Sparsity rule; `TopK(k=32)` by default.
            matryoshka_widths: Numbers of first latents that must explain the activations on their
                own.
            seed: Seed of the atoms.

        Raises:
            ValueError: A size is below 1, k is more than `n_latents`, or the widths do not rise.
        """
        config = {
            "d_in": d_in,
            "d_out": d_out,
            "n_latents": n_latents,
            "sparsity": sparsity,
            "matryoshka_widths": tuple(matryoshka_widths),
            "seed": seed,
        }
        written = range(d_in, d_in + d_out)
        super().__init__(read=range(d_in), write=written, edges=(0, d_out), config=config)


class Crosscoder(LinearCoder):
    """Dictionary that writes several sites, side by side in a row, and reads all or one."""

    scale: Tensor
    """Factor of each column in training, with which the sites vary equally much."""

    @renamed_arguments
    def __init__(
        self,
        *,
        widths: Mapping[str, int],
        n_latents: int,
        sparsity: Callable[..., Tensor] | None = None,
        reads: str | None = None,
        tied: bool = False,
        matryoshka_widths: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        """Build with random atoms whose lengths at the sites sum to 1.

        Args:
            widths: Width of each site, in the order of the columns.
            n_latents: Number of latents.
            sparsity: Sparsity rule; `TopK(k=32)` by default.
            reads: Site that is encoded; by default all.
            tied: Whether the encoder is the transpose of the decoder; only if all sites are read.
            matryoshka_widths: Numbers of first latents that must explain the activations on their
                own.
            seed: Seed of the atoms.

        Raises:
            ValueError: A size is below 1, k is more than `n_latents`, the widths do not rise, or
                `reads` is none of the sites or is tied.
        """
        edges = (0, *accumulate(widths.values()))
        spans = dict(zip(widths, map(slice, edges[:-1], edges[1:]), strict=True))
        if reads is not None and reads not in widths:
            raise ValueError(f"reads ({reads!r}) must be one of {', '.join(map(repr, widths))}.")
        if reads is not None and tied and len(widths) > 1:
            raise ValueError("A crosscoder that reads one site cannot be tied: it writes others.")
        config = {
            "widths": dict(widths),
            "n_latents": n_latents,
            "sparsity": sparsity,
            "reads": reads,
            "tied": tied,
            "matryoshka_widths": tuple(matryoshka_widths),
            "seed": seed,
        }
        whole = range(edges[-1])
        read = whole if reads is None else whole[spans[reads]]
        super().__init__(read=read, write=whole, edges=edges, config=config)
        self.spans = spans
        self.register_buffer("scale", torch.ones(edges[-1]))

    def rescale(self, scale: Float[Tensor, " width"]) -> None:
        """Change from rows times `scale` to rows, and remember the scale."""
        super().rescale(scale)
        self.scale.mul_(scale)

    def decode_site(
        self, code: Float[Tensor, "batch latent"], site: str
    ) -> Float[Tensor, "batch width"]:
        """Reconstruction of one of the sites.

        Raises:
            InputError: No site of that name is written.
        """
        span = span_of(self.spans, site)
        return code @ self.W_dec[:, span] + self.b_dec[span]

    def as_pretrained(self) -> Pretrained:
        """Copy this dictionary into the parts of other libraries."""
        whole = super().as_pretrained()
        whole.spans = dict(self.spans)
        return whole

    @property
    def norms(self) -> Float[Tensor, "latent site"]:
        """Length of each atom at each site, in units in which the sites vary equally much."""
        atoms = self.W_dec * self.scale
        return torch.stack([atoms[:, s].norm(dim=-1) for s in self.spans.values()], dim=1)


def is_shell() -> bool:
    """Whether dictionaries are built on the meta device, for a file to fill.

    Nothing is computed then: what torch imports for that takes a second.
    """
    return torch.get_default_device().type == "meta"


def atom_lengths(
    atoms: Float[Tensor, "latent d_out"], edges: Sequence[int]
) -> Float[Tensor, "latent 1"]:
    """Length of each atom: the sum, over the sites between the edges, of its length there."""
    return functools.reduce(torch.add, lengths(atoms, edges)).clamp_min(SMALLEST_LENGTH)


def _check_sizes(built: SparseCoder) -> None:
    """Refuse sizes that cannot be."""
    sizes = {"d_in": built.d_in, "d_out": built.d_out, "n_latents": built.n_latents}
    if min(*sizes.values(), *(high - low for low, high in pairwise(built.edges))) < 1:
        listed = ", ".join(f"{name} ({size})" for name, size in sizes.items())
        raise ValueError(f"{listed} and the width of every site must be at least 1.")
    k = getattr(built.sparsity, "k", 1)
    if k > built.n_latents:
        raise ValueError(
            f"n_latents ({built.n_latents}) must be at least k ({k}): "
            "a sample cannot use more latents than there are."
        )


def _checked_widths(widths: Sequence[int], n_latents: int) -> tuple[int, ...]:
    """Check Matryoshka widths."""
    if any(low >= high for low, high in pairwise((0, *widths, n_latents))):
        raise ValueError(
            f"matryoshka_widths {tuple(widths)} must rise, from at least 1 to less than n_latents "
            f"({n_latents}), which is always the last one."
        )
    return tuple(widths)
