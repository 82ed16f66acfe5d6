"""A group crosscoder whose latents are few atoms in all poses of a group.

    PoseTied    rows of |G| blocks, x_g = a(gI); one encoder for every block, one atom a family

Latent (h, i) says how strongly family i is there in pose h: its code is that of the block a(hI),
by an encoder that is the same for all blocks. Its atom is that of family i moved to this pose:

    reconstruction_g  =  sum over i and h of  code(h, i) * atom_i[g h^-1]  +  b_dec

So the blocks of an input posed by t, x_g = a(gtI), have the codes of the input itself, permuted:
code'(h, i) = code(h t, i), and reconstructions permuted alike, exactly. This needs one bias for
all blocks. A dictionary of n latents has n / |G| atoms, and |G| times fewer parameters than a
`Crosscoder` of n.

The k largest codes of a row are kept among all families and poses together, not k a pose: how many
poses of a family a row needs depends on what leaves the family unchanged, which is not known
beforehand. A family that a subgroup H leaves unchanged is seen in |H| poses at once and uses |H| of
the k, so k is larger here than for a crosscoder that reads one block.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from mechatlas.base import InputError
from mechatlas.dictionaries.autoencoder import SparseCoder, atom_lengths
from mechatlas.dictionaries.sparsity import TopK, as_rule
from mechatlas.files import checksum
from mechatlas.maths.groups import Group


class PoseTied(SparseCoder):
    """Few atoms in all poses of a group; reads and writes rows of one block an element.

    Latent `h * n_families + i` is family i in pose h.
    """

    def __init__(
        self,
        *,
        group: Group | ArrayLike,
        d_in: int,
        n_latents: int,
        sparsity: Callable[..., Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        """Build with random atoms whose lengths at the blocks sum to 1.

        Args:
            group: A group or its table, with the identity at 0.
            d_in: Width of a row: the group's order times the width of a block.
            n_latents: Number of latents: the group's order times the number of families.
            sparsity: How many latents of each row are kept; `TopK(k=32)` by default.
            seed: Seed of the atoms.

        Raises:
            ValueError: The order does not divide `d_in` or `n_latents`, the rule is not `TopK`,
                or k is more than `n_latents`.
        """
        nn.Module.__init__(self)
        whole = group if isinstance(group, Group) else Group(group)
        self.group, order = whole, whole.order
        self.sparsity = _checked(whole, d_in, n_latents, TopK() if sparsity is None else sparsity)
        self.n_families, self.d_block = n_latents // order, d_in // order
        self.d_in = self.d_out = self.width = d_in
        self.n_latents, self.tied, self.centred = n_latents, False, True
        self.reads = self.writes = slice(0, d_in)
        self.edges = (0, *accumulate([self.d_block] * order))
        self.config = {
            "group": whole.table.tolist(),
            "d_in": d_in,
            "n_latents": n_latents,
            "sparsity": self.sparsity,
            "seed": seed,
        }
        self.rule, self.prefixes, self._state = as_rule(self.sparsity), (n_latents,), []
        self.fresh, self.history = True, None
        random = torch.Generator().manual_seed(seed)
        atoms = torch.randn(self.n_families, d_in, generator=random)
        atoms /= atom_lengths(atoms, self.edges)
        first = atoms[:, : self.d_block]
        self._atoms = nn.Parameter(atoms)
        self._encoder = nn.Parameter(first / first.square().sum(dim=-1, keepdim=True))
        self._b_enc = nn.Parameter(torch.zeros(self.n_families))
        self._b_dec = nn.Parameter(torch.zeros(self.d_block))
        moved = torch.from_numpy(whole.table.astype(np.int64))
        self._moved = moved  # block k of an atom in pose h is block moved[k, h] of a row

    @property
    def atoms(self) -> Float[Tensor, "family element d_block"]:
        """The atoms in the pose of the identity."""
        return self._atoms.view(self.n_families, self.group.order, self.d_block)

    @property
    def W_enc(self) -> Float[Tensor, "d_in latent"]:  # noqa: N802 - the field's name
        """Encoder weights as one matrix, which is zero but for one block a latent."""
        order = self.group.order
        whole = self._encoder.new_zeros(order, self.d_block, order, self.n_families)
        for h in range(order):
            whole[h, :, h] = self._encoder.T
        return whole.view(self.d_in, self.n_latents)

    @property
    def W_dec(self) -> Float[Tensor, "latent d_in"]:  # noqa: N802 - the field's name
        """The atom of every latent; |G| times as large as what is learnt."""
        poses = [self._posed(h) for h in range(self.group.order)]
        return torch.stack([self.atoms[:, blocks] for blocks in poses]).view(-1, self.d_in)

    @property
    def b_enc(self) -> Float[Tensor, " latent"]:
        """Encoder bias of every latent."""
        return self._b_enc.repeat(self.group.order)

    @property
    def b_dec(self) -> Float[Tensor, " d_in"]:
        """Bias of a row: the same at every block."""
        return self._b_dec.repeat(self.group.order)

    @property
    def sites(self) -> list[slice]:
        """Blocks share a scale."""
        return [self.reads]

    def _posed(self, h: int) -> Int[Tensor, " element"]:
        """Which block of an atom in the identity's pose is block g of it in pose h: g h^-1."""
        return self._moved[:, int(self.group.inverses[h])]

    def pre_activations(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch latent"]:
        """What the sparsity rule makes codes of.

        Raises:
            InputError: The rows are not `d_in` wide.
        """
        if x.shape[-1] != self.d_in:
            raise InputError(
                f"The dictionary reads {self.group.order} blocks of {self.d_block}, in all "
                f"{self.d_in} wide, got {x.shape[-1]}. Is this the store it was trained on?"
            )
        blocks = x.reshape(-1, self.d_block) - self._b_dec
        return (blocks @ self._encoder.T + self._b_enc).reshape(len(x), -1)

    def decode(self, code: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch d_out"]:
        """Reconstruction in the units of the activations."""
        order, n = self.group.order, len(code)
        out = self._atoms.new_zeros(n, order, self.d_block)
        by_pose = code.view(n, order, self.n_families)
        for h in range(order):
            row, family = by_pose[:, h].nonzero(as_tuple=True)
            if len(row):
                starts = torch.searchsorted(row, torch.arange(n, device=row.device))
                weights = by_pose[row, h, family]
                part = embedding_bag(
                    family, self._atoms, starts, per_sample_weights=weights, mode="sum"
                )
                out = out + part.view(n, order, -1)[:, self._posed(h)]
        return (out + self._b_dec).view(n, -1)

    @torch.no_grad()
    def normalise(self) -> None:
        """Give every atom length 1."""
        self._atoms.div_(atom_lengths(self._atoms, self.edges))

    @torch.no_grad()
    def start_at(self, mean: Float[Tensor, " width"]) -> None:
        """Set the bias to the mean of all blocks."""
        self._b_dec.copy_(mean.view(self.group.order, -1).mean(dim=0))

    @property
    def encoder_parts(self) -> list[Tensor]:
        """What codes are proportional to: the encoder's weights and biases."""
        return [self._encoder, self._b_enc]

    @torch.no_grad()
    def rescale(self, scale: Float[Tensor, " width"]) -> None:
        """Change from rows times `scale`, one number, to rows; see `SparseCoder.rescale`."""
        self._b_dec.div_(scale[0])
        self._b_enc.div_(scale[0])
        self.fresh = False

    def extra_repr(self) -> str:
        """What it was built with; the group by its order and a checksum of its table."""
        told = {**self.config, "group": f"{self.group.order}:{self._table_checksum()}"}
        return ", ".join(f"{name}={value}" for name, value in told.items())

    def _table_checksum(self) -> str:
        return checksum(self.group.table.tobytes())[:8]


def _checked(group: Group, d_in: int, n_latents: int, sparsity: Any) -> TopK:
    """The rule, if what was asked for can be trained.

    Raises:
        ValueError: See `PoseTied`.
    """
    order = group.order
    if group.identity != 0:
        raise ValueError(f"The identity of the group must be element 0, got {group.identity}.")
    for name, size in (("d_in", d_in), ("n_latents", n_latents)):
        if size < 1 or size % order:
            raise ValueError(
                f"{name} ({size}) must be a multiple of the order of {group.name}, {order}: a "
                "pose-tied dictionary has every block and every atom in all poses."
            )
    if not isinstance(sparsity, TopK):
        raise ValueError(f"A pose-tied dictionary needs the sparsity rule TopK, got {sparsity}.")
    if sparsity.k > n_latents:
        raise ValueError(f"n_latents ({n_latents}) must be at least k ({sparsity.k}).")
    return sparsity
