"""Temporal dictionaries: codes of what earlier tokens do not predict.

    TemporalDictionary    attention over the codes of earlier tokens, and a dictionary of the rest

Rows depend on those before them, so a dictionary reads windows of consecutive tokens, not rows.

Source: Lubana et al., Priors in time: missing inductive biases for language model interpretability
(2025); SAELens 6.54.12.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mechatlas.base import InputError
from mechatlas.dictionaries.rows import as_batch, check_width
from mechatlas.dictionaries.sparsity import ReLU, Rule, TopK

EPS = 1e-6
"""Number that is added to the length of a prediction before it is divided by."""


class TemporalDictionary(nn.Module):
    """Dictionary of what attention over earlier tokens leaves of each token.

    A code is that of the rest alone, and `decode` gives its part of the reconstruction; `forward`
    adds what was predicted.
    """

    def __init__(
        self,
        *,
        d_in: int,
        n_latents: int,
        n_heads: int,
        n_layers: int = 1,
        bottleneck: int = 64,
        k: int | None = None,
        tied: bool = True,
        subtracts_b_dec: bool = True,
        scale: float = 1.0,
        site: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Make the tensors, which a file fills.

        Args:
            d_in: Width of the rows.
            n_latents: Number of latents.
            n_heads: Attention heads.
            n_layers: Attention layers.
            bottleneck: Latents for each entry of a query or key.
            k: Latents kept of each token; by default those above zero.
            tied: Whether atoms are the encoder too.
            subtracts_b_dec: Whether `b_dec` is taken from the input.
            scale: Factor to the units of training.
            site: Site it was trained on.
            metadata: Further entries of the file.

        Raises:
            ValueError: Heads or bottleneck do not divide the latents.
        """
        super().__init__()
        if n_latents % (bottleneck * n_heads):
            raise ValueError(
                f"n_latents must be a multiple of bottleneck x n_heads, {bottleneck * n_heads}, "
                f"got {n_latents}."
            )
        self.d_in, self.d_out, self.n_latents, self.n_heads = d_in, d_in, n_latents, n_heads
        self.tied, self.subtracts_b_dec, self.scale = tied, subtracts_b_dec, scale
        self.sparsity: Rule = ReLU() if k is None else TopK(k=k)
        self.site, self.metadata, self.file_format = site, dict(metadata or {}), "SAELens temporal"
        self.sites, self.spans, self.norm, self.transcodes = (), {}, None, False
        self.W_dec = nn.Parameter(torch.zeros(n_latents, d_in), requires_grad=False)
        self.b_dec = nn.Parameter(torch.zeros(d_in), requires_grad=False)
        self.encoder = None if tied else nn.Parameter(torch.zeros(d_in, n_latents), False)
        narrow = n_latents // bottleneck
        self.attn_layers = nn.ModuleList(_Attention(n_latents, narrow) for _ in range(n_layers))
        self.config = {
            "d_in": d_in, "n_latents": n_latents, "n_heads": n_heads, "n_layers": n_layers,
            "bottleneck": bottleneck, "k": k, "tied": tied, "subtracts_b_dec": subtracts_b_dec,
            "scale": scale, "site": site, "metadata": self.metadata,
        }  # fmt: skip

    @property
    def W_enc(self) -> Float[Tensor, "d_in latent"]:  # noqa: N802 - the field's name
        """Encoder weights, of rows in the units of training."""
        return (self.W_dec.T if self.encoder is None else self.encoder) / (4 * self.d_in)

    @property
    def b_enc(self) -> Float[Tensor, " latent"]:
        """Encoder biases, which are zero."""
        return torch.zeros(self.n_latents).to(self.W_dec)

    def encode(self, x: Any) -> Float[Tensor, "*window token latent"]:
        """Sparse code of what is new in each token of some windows (window, token, d_in).

        Raises:
            InputError: These are no windows of tokens, not `d_in` wide, or no real numbers.
        """
        return self._codes(x)[0]

    def predict(self, x: Any) -> Float[Tensor, "*window token latent"]:
        """Dense code of each token that the tokens before it predict.

        Raises:
            InputError: These are no windows of tokens, not `d_in` wide, or no real numbers.
        """
        return self._codes(x)[1]

    def _codes(self, x: Any) -> tuple[Tensor, Tensor]:
        """Codes of what is new, and of what earlier tokens predict."""
        x = as_batch(x, self.W_dec.device)
        if x.ndim < 3:
            raise InputError(
                f"A temporal dictionary reads windows of consecutive tokens (window, token, "
                f"{self.d_in}), because codes depend on the tokens before; got "
                f"{tuple(x.shape)}. Rows of a store, which are shuffled, cannot be encoded."
            )
        check_width(x, self.d_in, self.W_dec.device)
        whole, weights = self._centered(x), self.W_enc
        rest, predicted = whole, whole.new_zeros(*x.shape[:-1], self.n_latents)
        for layer in self.attn_layers:
            now = (rest @ weights).relu()
            before = functional.pad(now, (0, 0, 1, 0))[..., :-1, :]
            code = layer(before, now, self.n_heads).relu()
            out = code @ self.W_dec
            length = torch.linalg.vector_norm(out, dim=-1, keepdim=True) + EPS
            share = (out * rest).sum(dim=-1, keepdim=True) / length.square()
            predicted = predicted + code * share
            rest = rest - share * out
        pre = rest @ weights
        return self.sparsity(pre.flatten(0, -2)).view(pre.shape), predicted

    def _centered(self, x: Tensor) -> Tensor:
        """Rows as the encoder reads them."""
        x = x.to(self.W_dec.dtype) * self.scale
        return x - self.b_dec if self.subtracts_b_dec else x

    def decode(self, code: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch d_in"]:
        """Reconstruction by codes alone, in the units of the input."""
        out = code @ self.W_dec
        return (out + self.b_dec if not self.tied or self.subtracts_b_dec else out) / self.scale

    def forward(self, x: Any) -> Float[Tensor, "*window token d_in"]:
        """Reconstruction by what is predicted and what is new."""
        new, predicted = self._codes(x)
        return self.decode(new + predicted)

    def extra_repr(self) -> str:
        """Sizes and conventions."""
        return (
            f"d_in={self.d_in}, n_latents={self.n_latents}, sparsity={self.sparsity}, "
            f"tied={self.tied}, scale={self.scale}, from {self.file_format}"
        )


class _Attention(nn.Module):
    """Causal attention of the codes of a window over those one token earlier."""

    def __init__(self, n_latents: int, narrow: int) -> None:
        super().__init__()
        self.k_ctx, self.q_target = (nn.Linear(n_latents, narrow) for _ in range(2))
        self.v_ctx, self.c_proj = (nn.Linear(n_latents, n_latents) for _ in range(2))
        self.requires_grad_(requires_grad=False)

    def forward(self, before: Tensor, now: Tensor, n_heads: int) -> Tensor:
        """Predict codes of the tokens from those before them."""
        q, k, v = (
            each.unflatten(-1, (n_heads, -1)).transpose(-2, -3)
            for each in (self.q_target(now), self.k_ctx(before), self.v_ctx(before))
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(mixed.transpose(-2, -3).flatten(-2))
