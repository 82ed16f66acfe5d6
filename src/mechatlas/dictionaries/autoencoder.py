"""Sparse dictionaries: an encoder, a sparsity rule, a decoder.

    Autoencoder   reads a site and writes the same site
    Transcoder    reads one site and writes another
    Crosscoder    writes several sites, and reads all of them or one

All are one linear encoder, one rule and one linear decoder (`SparseCoder`); they differ in which
columns of a row of activations they read and write. Each is its own configuration: what it was
built with is what it shows and what is written beside its weights.

An atom's length is fixed while it is trained. For a crosscoder the length is the sum of its
lengths at the sites, so a penalty on the code is the one of the literature, on the code times
the sum of decoder norms: the scale of a latent is free, and this is one way to fix it.

Source: Gao et al., Scaling and evaluating sparse autoencoders (2024); Bozoukov, Branch
specialization with k-sparse autoencoders (2025), for the tied form; Bussmann et al., Matryoshka
sparse autoencoders (2025), for prefixes; Lindsey et al., Sparse crosscoders (2024).
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechatlas.base import InputError
from mechatlas.dictionaries.metrics import History
from mechatlas.dictionaries.sparsity import TopK, as_rule


class SparseCoder(nn.Module):
    """What all dictionaries of this package share; build one of the kinds below.

    Codes are `rule((x - b_dec) W_enc + b_enc)`, without `b_dec` for those that do not write
    what they read, and reconstructions `code W_dec + b_dec`. `history` is what was measured
    while it was trained, `None` before.
    """

    reads: slice
    """Columns of a row of activations that are encoded."""
    writes: slice
    """Columns of a row of activations that are reconstructed."""
    fresh: bool
    """Whether its biases and thresholds are still those it was built with."""
    history: History | None

    def __init__(
        self,
        *,
        read: range,
        write: range,
        edges: Sequence[int],
        config: dict[str, Any],
    ) -> None:
        """Build with random atoms.

        Args:
            read: Columns of a row that are encoded.
            write: Columns of a row that are reconstructed.
            edges: Where the sites begin and end among the columns written.
            config: What the kind was built with.

        Raises:
            ValueError: A size is below 1, k is more than the latents, or prefixes do not rise.
        """
        super().__init__()
        self.d_in, self.d_out, self.edges = len(read), len(write), tuple(edges)
        self.reads, self.writes = slice(read.start, read.stop), slice(write.start, write.stop)
        self.width = max(read.stop, write.stop)
        self.centred, self.config = read == write, config
        self.n_latents, self.tied = int(config["n_latents"]), bool(config.get("tied", False))
        self.sparsity = config["sparsity"] or TopK()
        config["sparsity"] = self.sparsity
        self.rule = as_rule(self.sparsity)
        self.fresh, self.history = True, None
        _check_sizes(self)
        self.prefixes = (*_checked_prefixes(config["prefixes"], self.n_latents), self.n_latents)
        random = torch.Generator().manual_seed(config["seed"])
        atoms = torch.randn(self.n_latents, self.d_out, generator=random)
        self.W_dec = nn.Parameter(atoms.div_(atom_lengths(atoms, self.edges)))
        if not self.tied:
            rows = self._first_encoder(random)
            if not hasattr(self.sparsity, "k"):
                # Half of the latents are above zero at first. Together they should rebuild a
                # row once, not as many times over as there are more of them than columns.
                rows *= min(1.0, 2 * self.d_in / self.n_latents)
            self._W_enc = nn.Parameter(rows.T)
        self.b_enc = nn.Parameter(torch.zeros(self.n_latents))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self._state = [*self.rule.parameters(1), *self.rule.buffers(1)]
        for name, start in self.rule.parameters(self.n_latents).items():
            self.register_parameter(name, nn.Parameter(start))
        for name, start in self.rule.buffers(self.n_latents).items():
            self.register_buffer(name, start)

    def _first_encoder(self, random: torch.Generator) -> Tensor:
        """What reads an atom as 1 where it is written as 1; random if it is not read at all."""
        # The numbers of a latent lie side by side in memory: training reads them by latent.
        offset = self.reads.start - self.writes.start
        if 0 <= offset < self.d_out:
            rows = self.W_dec.detach()[:, offset : offset + self.d_in].clone()
        else:
            rows = torch.randn(self.n_latents, self.d_in, generator=random)
            return rows / rows.norm(dim=-1, keepdim=True)
        return rows / rows.square().sum(dim=-1, keepdim=True)

    @property
    def W_enc(self) -> Float[Tensor, "d_in latent"]:  # noqa: N802 - the field's name
        """Encoder weights, one column a latent."""
        return self.W_dec.T if self.tied else self._W_enc

    @property
    def sites(self) -> list[slice]:
        """Columns of a row that share a scale."""
        if self.tied:
            return [self.reads]
        offset = self.writes.start
        written = [slice(low + offset, high + offset) for low, high in pairwise(self.edges)]
        return written if self.reads.start >= offset else [self.reads, *written]

    @property
    def state(self) -> dict[str, Tensor]:
        """The sparsity rule's own tensors."""
        return {name: getattr(self, name) for name in self._state}

    def pre_activations(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch latent"]:
        """What the sparsity rule makes codes of.

        Raises:
            InputError: The rows are not `d_in` wide.
        """
        if x.shape[-1] != self.d_in:
            raise InputError(
                f"The dictionary reads activations of width {self.d_in}, got {x.shape[-1]}. "
                "Is this the site it was trained on?"
            )
        return (x - self.b_dec if self.centred else x) @ self.W_enc + self.b_enc

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch latent"]:
        """Sparse code of each sample.

        Raises:
            InputError: The rows are not `d_in` wide.
        """
        return self.rule(self.pre_activations(x), self.state)

    def decode(self, code: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch d_out"]:
        """Reconstruction in the units of the activations written."""
        return code @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        """Encode, then decode."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def normalise(self) -> None:
        """Give every atom length 1."""
        self.W_dec.div_(atom_lengths(self.W_dec, self.edges))

    @torch.no_grad()
    def start_at(self, mean: Float[Tensor, " width"]) -> None:
        """Set the biases so that the mean row has code zero and is reconstructed."""
        self.b_dec.copy_(mean[self.writes])
        if not self.centred:
            self.b_enc.copy_(-(mean[self.reads] @ self.W_enc))

    @property
    def encoder_parts(self) -> list[Tensor]:
        """What codes are proportional to: the encoder's weights and biases."""
        return [self._W_enc, self.b_enc]

    @torch.no_grad()
    def rescale(self, scale: Float[Tensor, " width"]) -> None:
        """Change from rows times `scale` to rows, without changing what is computed.

        Codes come out in the units of what is written where there is one unit: then atoms keep
        their length. Those of a crosscoder of sites with different scales keep their units.
        """
        read, write = scale[self.reads], scale[self.writes]
        unit = float(write[0]) if bool((write == write[0]).all()) else 1.0
        if not self.tied:
            self._W_enc.mul_((read / unit)[:, None])
        self.W_dec.mul_(unit / write)
        self.b_dec.div_(write)
        self.b_enc.div_(unit)
        self.rule.rescale(1 / unit, self.state)
        self.fresh = False

    def extra_repr(self) -> str:
        """What it was built with."""
        return ", ".join(f"{name}={value}" for name, value in self.config.items())


class Autoencoder(SparseCoder):
    """Reads a site and writes the same site."""

    def __init__(
        self,
        *,
        d_in: int,
        n_latents: int,
        sparsity: Callable[..., Tensor] | None = None,
        tied: bool = False,
        prefixes: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        """Build with random atoms of length 1.

        Args:
            d_in: Width of the activations.
            n_latents: Number of latents.
            sparsity: What makes the code sparse; `TopK(k=32)` by default.
            tied: The encoder is the transpose of the decoder.
            prefixes: The first so many latents must explain the activations on their own, each
                prefix as much as the whole (Matryoshka).
            seed: Seed of the atoms.

        Raises:
            ValueError: A size is below 1, k is more than `n_latents`, or prefixes do not rise.
        """
        config = {
            "d_in": d_in,
            "n_latents": n_latents,
            "sparsity": sparsity,
            "tied": tied,
            "prefixes": tuple(prefixes),
            "seed": seed,
        }
        columns = range(d_in)
        super().__init__(read=columns, write=columns, edges=(0, d_in), config=config)


class Transcoder(SparseCoder):
    """Reads one site and writes another; a row has the columns of both, in this order."""

    def __init__(
        self,
        *,
        d_in: int,
        d_out: int,
        n_latents: int,
        sparsity: Callable[..., Tensor] | None = None,
        prefixes: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        """Build with random atoms and encoder rows of length 1.

        Args:
            d_in: Width of the activations read.
            d_out: Width of the activations written.
            n_latents: Number of latents.
            sparsity: What makes the code sparse; `TopK(k=32)` by default.
            prefixes: The first so many latents must explain the activations on their own.
            seed: Seed of the atoms.

        Raises:
            ValueError: A size is below 1, k is more than `n_latents`, or prefixes do not rise.
        """
        config = {
            "d_in": d_in,
            "d_out": d_out,
            "n_latents": n_latents,
            "sparsity": sparsity,
            "prefixes": tuple(prefixes),
            "seed": seed,
        }
        written = range(d_in, d_in + d_out)
        super().__init__(read=range(d_in), write=written, edges=(0, d_out), config=config)


class Crosscoder(SparseCoder):
    """Writes several sites, whose columns lie side by side in a row; reads all or one of them."""

    scale: Tensor
    """What training multiplied each column with, so that the sites vary equally much."""

    def __init__(
        self,
        *,
        widths: Mapping[str, int],
        n_latents: int,
        sparsity: Callable[..., Tensor] | None = None,
        reads: str | None = None,
        tied: bool = False,
        prefixes: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        """Build with random atoms whose lengths at the sites sum to 1.

        Args:
            widths: Width of each site, in the order of the columns.
            n_latents: Number of latents.
            sparsity: What makes the code sparse; `TopK(k=32)` by default.
            reads: The one site that is encoded; by default all.
            tied: The encoder is the transpose of the decoder; only if all sites are read.
            prefixes: The first so many latents must explain the activations on their own.
            seed: Seed of the atoms.

        Raises:
            ValueError: A size is below 1, k is more than `n_latents`, prefixes do not rise, or
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
            "prefixes": tuple(prefixes),
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

    @property
    def norms(self) -> Float[Tensor, "latent site"]:
        """Length of each atom at each site, in units in which the sites vary equally much."""
        atoms = self.W_dec * self.scale
        return torch.stack([atoms[:, s].norm(dim=-1) for s in self.spans.values()], dim=1)


def atom_lengths(
    atoms: Float[Tensor, "latent d_out"], edges: Sequence[int]
) -> Float[Tensor, "latent 1"]:
    """Length of each atom: the sum, over the sites between the edges, of its length there."""
    parts = [atoms[:, low:high].norm(dim=-1, keepdim=True) for low, high in pairwise(edges)]
    return torch.stack(parts).sum(dim=0).clamp_min(1e-12)


def _check_sizes(built: SparseCoder) -> None:
    """Refuse what cannot be trained.

    Raises:
        ValueError: A size is below 1, or k is more than the latents.
    """
    sizes = {"d_in": built.d_in, "d_out": built.d_out, "n_latents": built.n_latents}
    if min(*sizes.values(), *(high - low for low, high in pairwise(built.edges))) < 1:
        told = ", ".join(f"{name} ({size})" for name, size in sizes.items())
        raise ValueError(f"{told} and the width of every site must be at least 1.")
    k = getattr(built.sparsity, "k", 1)
    if k > built.n_latents:
        raise ValueError(
            f"n_latents ({built.n_latents}) must be at least k ({k}): "
            "a sample cannot use more latents than there are."
        )


def _checked_prefixes(prefixes: Sequence[int], n_latents: int) -> tuple[int, ...]:
    """The prefixes as given.

    Raises:
        ValueError: They do not rise from 1 to below the number of latents.
    """
    if any(low >= high for low, high in pairwise((0, *prefixes, n_latents))):
        raise ValueError(
            f"prefixes {tuple(prefixes)} must rise, from at least 1 to less than n_latents "
            f"({n_latents}), which is always the last one."
        )
    return tuple(prefixes)
