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
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from mechatlas.base import InputError
from mechatlas.dictionaries.autoencoder import SparseCoder, atom_lengths, is_shell
from mechatlas.dictionaries.engine.interface import Step
from mechatlas.dictionaries.objective import Objective
from mechatlas.dictionaries.revival import AuxK, Resample
from mechatlas.dictionaries.sparsity import TopK
from mechatlas.files import checksum
from mechatlas.maths.groups import Group


class PoseTied(SparseCoder):
    """Dictionary of few atoms in all poses of a group, for rows of one block an element.

    Latent `h * n_families + i` is family i in pose h.
    """

    moved: Int[Tensor, "element element"]
    """Block of a row that block k of an atom in pose h belongs to, at (k, h)."""

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
            sparsity: Number of latents kept in each row; `TopK(k=32)` by default.
            seed: Seed of the atoms.

        Raises:
            ValueError: The order does not divide `d_in` or `n_latents`, the rule is not `TopK`,
                or k is more than `n_latents`.
        """
        group = group if isinstance(group, Group) else Group(group)
        _check(group, d_in, n_latents, sparsity)
        config = {
            "group": group.table.tolist(),
            "d_in": d_in,
            "n_latents": n_latents,
            "sparsity": sparsity,
            "seed": seed,
        }
        d_block, row = d_in // group.order, range(d_in)
        edges = range(0, d_in + 1, d_block)
        super().__init__(read=row, write=row, edges=edges, config=config)
        self.group, self.d_block, self.n_families = group, d_block, n_latents // group.order
        if is_shell():
            atoms, rows = torch.empty(self.n_families, d_in), torch.empty(self.n_families, d_block)
        else:
            random = torch.Generator().manual_seed(seed)
            atoms = torch.randn(self.n_families, d_in, generator=random)
            atoms /= atom_lengths(atoms, self.edges)
            first = atoms[:, :d_block]
            rows = first / first.square().sum(dim=-1, keepdim=True)
        self._atoms = nn.Parameter(atoms)
        self._encoder = nn.Parameter(rows)
        self._b_enc = nn.Parameter(torch.zeros(self.n_families))
        self._b_dec = nn.Parameter(torch.zeros(self.d_block))
        self.moved = torch.from_numpy(group.table.astype(np.int64))

    @property
    def atoms(self) -> Float[Tensor, "family element d_block"]:
        """Atoms in the pose of the identity."""
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
    def W_dec(  # noqa: N802 # pyright: ignore[reportIncompatibleVariableOverride]
        self,
    ) -> Float[Tensor, "latent d_in"]:
        """Atom of every latent; |G| times as large as the parameters."""
        poses = [self._posed(h) for h in range(self.group.order)]
        return torch.stack([self.atoms[:, blocks] for blocks in poses]).view(-1, self.d_in)

    @property
    def b_enc(self) -> Float[Tensor, " latent"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Encoder bias of every latent."""
        return self._b_enc.repeat(self.group.order)

    @property
    def b_dec(self) -> Float[Tensor, " d_in"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Bias of a row: the same at every block."""
        return self._b_dec.repeat(self.group.order)

    @property
    def sites(self) -> list[slice]:
        """Blocks share a scale."""
        return [self.reads]

    def _posed(self, h: int) -> Int[Tensor, " element"]:
        """Block of an atom in the identity's pose that is its block g in pose h: g h^-1."""
        return self.moved[:, int(self.group.inverses[h])]

    def pre_activations(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch latent"]:
        """Input of the sparsity rule.

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

    def step(self, objective: Objective, revival: AuxK | Resample | None = None) -> Step:
        """Make the optimizer.

        Raises:
            ValueError: Dead latents are to be brought back, which this kind cannot.
        """
        from mechatlas.dictionaries.engine.posed_steps import PosedStep  # imports this module

        if revival is not None:
            raise ValueError(f"Latents of a pose-tied dictionary cannot be revived ({revival}).")
        return PosedStep(self, objective)

    @torch.no_grad()
    def normalize(self) -> None:
        """Give every atom length 1."""
        self._atoms.div_(atom_lengths(self._atoms, self.edges))

    @torch.no_grad()
    def start_at(self, mean: Float[Tensor, " width"]) -> None:
        """Set the bias to the mean of all blocks."""
        self._b_dec.copy_(mean.view(self.group.order, -1).mean(dim=0))

    @property
    def encoder_parameters(self) -> list[Tensor]:
        """Parameters that codes are proportional to: the encoder's weights, then its biases."""
        return [self._encoder, self._b_enc]

    @torch.no_grad()
    def rescale(self, scale: Float[Tensor, " width"]) -> None:
        """Change from rows times `scale`, one number, to rows; see `SparseCoder.rescale`."""
        self._b_dec.div_(scale[0])
        self._b_enc.div_(scale[0])
        self.untrained = False

    def extra_repr(self) -> str:
        """Arguments of the constructor; the group by its order and a checksum of its table."""
        group = f"{self.group.order}:{checksum(self.group.table.tobytes())[:8]}"
        return ", ".join(f"{name}={v}" for name, v in {**self.config, "group": group}.items())


def _check(group: Group, d_in: int, n_latents: int, sparsity: Any) -> None:
    """Refuse arguments of which no dictionary can be built."""
    if group.identity != 0:
        raise ValueError(f"The identity of the group must be element 0, got {group.identity}.")
    for name, size in (("d_in", d_in), ("n_latents", n_latents)):
        if size < 1 or size % group.order:
            raise ValueError(
                f"{name} ({size}) must be a multiple of the order of {group.name}, {group.order}: "
                "a pose-tied dictionary has every block and every atom in all poses."
            )
    if not isinstance(sparsity, TopK | None):
        raise ValueError(f"A pose-tied dictionary needs the sparsity rule TopK, got {sparsity}.")
