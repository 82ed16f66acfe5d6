"""Sparsity rules of other libraries that are not trained here, only used.

AbsTopK          the k furthest from zero, with their signs
SignedTopK       the k largest, whatever their signs
GroupMax         the largest of each of k runs of neighboring latents
WeightedTopK     the k that are largest once multiplied by the length of their atom
BySite           those above the thresholds of a site, or the k largest there, of any site
Levels           a mean of learned levels, those nearest to the pre-activation weighted most
Pursuit          atoms chosen one by one, each for what those before it leave
"""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from mechatlas.dictionaries.sparsity import NONE, Latents, Rule, State, Threshold


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbsTopK(Rule):
    """Keep the k entries of each sample that are furthest from zero, with their signs."""

    k: int
    """Latents kept in each sample."""

    def __call__(self, pre: Latents, state: State = NONE) -> Latents:
        """Zero all but the k largest sizes of each row."""
        del state
        index = pre.abs().topk(self.k, dim=-1).indices
        return torch.zeros_like(pre).scatter(-1, index, pre.gather(-1, index))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupMax(Rule):
    """Keep the largest entry of each of k runs of neighboring latents, if it is positive."""

    k: int
    """Runs, all of one length."""

    def __call__(self, pre: Latents, state: State = NONE) -> Latents:
        """Zero all but one of each run."""
        del state
        groups = pre.relu().unflatten(-1, (self.k, -1))
        best = groups.max(dim=-1, keepdim=True)
        return torch.zeros_like(groups).scatter(-1, best.indices, best.values).flatten(-2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SignedTopK(Rule):
    """Keep the k largest entries of each sample, whatever their signs (saev)."""

    k: int
    """Latents kept in each sample."""

    def __call__(self, pre: Latents, state: State = NONE) -> Latents:
        """Zero all but the k largest entries of each row."""
        del state
        top = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightedTopK(Rule):
    """Keep the k entries of each sample that are largest in units of atoms of length 1."""

    k: int
    """Latents kept in each sample."""

    def __call__(self, pre: Latents, state: State = NONE) -> Latents:
        """Zero all but k entries of each row, and those below zero."""
        index = (pre * state["length"]).topk(self.k, dim=-1).indices
        return torch.zeros_like(pre).scatter(-1, index, pre.gather(-1, index).relu())


@dataclasses.dataclass(frozen=True, kw_only=True)
class BySite(Rule):
    """Open each latent site by site, by thresholds or ranks of the site (llamascopium).

    The code has what any site uses; `at_site` closes the rest before a site is decoded.
    """

    k: int = 0
    """Latents kept at each site, by `site_length`; 0 for those above `site_threshold`."""

    by_site = True

    def __call__(self, pre: Latents, state: State = NONE) -> Latents:
        """Zero what no site uses."""
        n_sites = len(state["site_length" if self.k else "site_threshold"])
        opened = torch.zeros_like(pre, dtype=torch.bool)
        for site in range(n_sites):
            opened |= self.at_site(pre, state, site) != 0
        return torch.where(opened, pre, 0.0)

    def at_site(self, code: Latents, state: State, site: int) -> Latents:
        """Code as one site uses it."""
        if self.k:
            return WeightedTopK(k=self.k)(code, {"length": state["site_length"][site]})
        return Threshold()(code, {"threshold": state["site_threshold"][site]})


@dataclasses.dataclass(frozen=True)
class Levels(Rule):
    """Mean of learned levels, weighted by their nearness to the pre-activation (Q-SAE)."""

    def __call__(self, pre: Latents, state: State = NONE) -> Latents:
        """Mean of the levels for each entry."""
        levels = state["levels"]
        nearness = -(pre[..., None] - levels).square()
        return (nearness.softmax(dim=-1) * levels).sum(dim=-1).relu()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pursuit(Rule):
    """Matching pursuit: the atom nearest to what is left of a row, again and again.

    Source: Mallat and Zhang, Matching pursuits with time-frequency dictionaries (1993).
    """

    steps: int
    """Atoms chosen at most."""
    least_residual: float = 0.0
    """Length of what is left of a row at which its pursuit ends."""
    ends_at_same_support: bool = False
    """Whether a row's pursuit ends at a step that uses no new atom."""
    positive: bool = False
    """Whether an atom is only ever added, never taken away."""

    pursues = True

    def __call__(self, pre: Latents, state: State = NONE) -> Latents:
        """Refuse pre-activations.

        Raises:
            NotImplementedError: Always: codes are found from rows and atoms.
        """
        raise NotImplementedError(f"{self} has no pre-activations; see `pursue`")

    def pursue(
        self, x: Float[Tensor, "*batch d_in"], atoms: Float[Tensor, "latent d_in"]
    ) -> Float[Tensor, "*batch latent"]:
        """Find the code of each row from the atoms alone."""
        left = x.reshape(-1, x.shape[-1])
        code = left.new_zeros(len(left), len(atoms))
        active = torch.ones(len(left), 1, dtype=torch.bool, device=x.device)
        for _ in range(self.steps):
            nearest = (left @ atoms.T).argmax(dim=1, keepdim=True)
            chosen = atoms[nearest[:, 0]]
            value = (left * chosen).sum(dim=1, keepdim=True)
            value = (value.relu() if self.positive else value) * active
            is_known = code.gather(1, nearest) != 0
            code.scatter_add_(1, nearest, value)
            left = left - value * chosen
            if self.ends_at_same_support:
                active = active & ~(is_known | (value == 0))
            if self.least_residual > 0:
                active = active & (left.norm(dim=1, keepdim=True) >= self.least_residual)
            if not active.any():
                break
        return code.reshape(*x.shape[:-1], -1)
