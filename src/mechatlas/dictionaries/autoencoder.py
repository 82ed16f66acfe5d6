"""Sparse autoencoders: an encoder, a sparsity rule, a decoder.

An autoencoder is its own configuration: what it was built with is what it shows and what
is written beside its weights.

Source: Gao et al., Scaling and evaluating sparse autoencoders (2024); Bozoukov, Branch
specialization with k-sparse autoencoders (2025), for the tied form.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechatlas.base import InputError
from mechatlas.dictionaries.metrics import History
from mechatlas.dictionaries.sparsity import TopK


class Autoencoder(nn.Module):
    """Codes `sparsity((x - b_dec) W_enc + b_enc)`, reconstructions `code W_dec + b_dec`.

    `history` is what was measured while it was trained, `None` before.
    """

    def __init__(
        self,
        *,
        d_in: int,
        n_latents: int,
        sparsity: Callable[[Tensor], Tensor] | None = None,
        tied: bool = False,
        seed: int = 0,
    ) -> None:
        """Build with random atoms of length 1.

        Args:
            d_in: Width of the activations.
            n_latents: Number of latents.
            sparsity: What makes the code sparse; `TopK(k=32)` by default.
            tied: The encoder is the transpose of the decoder.
            seed: Seed of the atoms.

        Raises:
            ValueError: A size is below 1, or k is more than `n_latents`.
        """
        super().__init__()
        self.sparsity = sparsity or TopK()
        k = getattr(self.sparsity, "k", 1)
        if d_in < 1 or n_latents < 1:
            raise ValueError(f"d_in ({d_in}) and n_latents ({n_latents}) must be at least 1.")
        if k > n_latents:
            raise ValueError(
                f"n_latents ({n_latents}) must be at least k ({k}): "
                "a sample cannot use more latents than there are."
            )
        self.d_in, self.n_latents, self.tied = d_in, n_latents, tied
        self.history: History | None = None
        random = torch.Generator().manual_seed(seed)
        atoms = nn.functional.normalize(torch.randn(n_latents, d_in, generator=random), dim=-1)
        self.W_dec = nn.Parameter(atoms)
        if not tied:
            # The numbers of a latent lie side by side in memory: training reads them by latent.
            self._W_enc = nn.Parameter(atoms.clone().T)
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    @property
    def W_enc(self) -> Float[Tensor, "d_in latent"]:  # noqa: N802 - the field's name
        """Encoder weights, one column a latent."""
        return self.W_dec.T if self.tied else self._W_enc

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch latent"]:
        """Sparse code of each sample.

        Raises:
            InputError: The rows are not `d_in` wide.
        """
        if x.shape[-1] != self.d_in:
            raise InputError(
                f"The dictionary reads activations of width {self.d_in}, got {x.shape[-1]}. "
                "Is this the site it was trained on?"
            )
        return self.sparsity((x - self.b_dec) @ self.W_enc + self.b_enc)

    def decode(self, code: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch d_in"]:
        """Reconstruction in the units of the input."""
        return code @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """Encode, then decode."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def normalise(self) -> None:
        """Give every atom length 1."""
        self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-12))

    def extra_repr(self) -> str:
        """What it was built with."""
        return (
            f"d_in={self.d_in}, n_latents={self.n_latents}, sparsity={self.sparsity}, "
            f"tied={self.tied}"
        )
