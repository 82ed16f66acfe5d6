"""Dictionaries of other projects, with what training asks of a dictionary."""

from typing import Any

from torch import Tensor, nn

from mechatlas.base import Dictionary, InputError
from mechatlas.dictionaries.autoencoder import SparseCoder
from mechatlas.dictionaries.engine.fallback import remove_along
from mechatlas.dictionaries.engine.interface import Step
from mechatlas.dictionaries.engine.steps import ReconstructionStep
from mechatlas.dictionaries.objective import Objective
from mechatlas.dictionaries.pretrained import TINY, Pretrained
from mechatlas.dictionaries.revival import AuxK, Resample


class Adapter:
    """Module with `d_in`, `n_latents`, `encode` and `decode`, seen as a `SparseCoder`.

    It is trained on rows as they are, by its own `step` if it has one, else by autograd on the
    squared error. Where it has `reads` and `writes`, slices of columns, rows are as wide as both.
    """

    untrained = False
    """Whether there are biases to set from the first batch."""
    sites: tuple[slice, ...] = ()
    """Columns that are scaled to variance 1."""

    def __init__(self, dictionary: Any) -> None:
        """Wrap a module that fits `Dictionary`."""
        self.module, self.n_latents = dictionary, dictionary.n_latents
        self.reads: slice = getattr(dictionary, "reads", slice(0, dictionary.d_in))
        self.writes: slice = getattr(dictionary, "writes", self.reads)
        self.width = max(self.reads.stop, self.writes.stop)

    def initialize(self, x: Tensor) -> None:
        """Change nothing."""

    def rescale(self, scale: Tensor) -> None:
        """Change nothing: there are no `sites`, so the scale is 1."""

    def step(self, objective: Objective, revival: AuxK | Resample | None = None) -> Step:
        """Make the optimizer: the dictionary's own, else autograd.

        Raises:
            ValueError: Dead latents are to be brought back, which only our own kinds can.
        """
        if revival is not None:
            kind = type(self.module).__name__
            raise ValueError(f"Latents of a {kind} cannot be revived ({revival}).")
        if isinstance(self.module, Pretrained) and not hasattr(self.module.sparsity, "k"):
            return _step_with_penalty(self.module, objective)
        own: Any = getattr(self.module, "step", None)
        return ReconstructionStep(self.module, objective) if own is None else own(objective)


def _step_with_penalty(dictionary: Pretrained, objective: Objective) -> Step:
    """Make an optimizer that holds the lengths of the atoms, which a penalty would be evaded by."""
    lengths = dictionary.W_dec.detach().norm(dim=1, keepdim=True)
    edges = [0, dictionary.d_out]

    def project(gradients: dict[str, Tensor]) -> None:
        remove_along(gradients["W_dec"], dictionary.W_dec.detach(), edges)

    def normalize() -> None:
        norm = dictionary.W_dec.norm(dim=1, keepdim=True).clamp_min(TINY)
        dictionary.W_dec.mul_(lengths / norm)

    return ReconstructionStep(dictionary, objective, project=project, normalize=normalize)


def as_coder(dictionary: Any) -> SparseCoder | Adapter:
    """See any dictionary as one that can be trained.

    Raises:
        InputError: It does not fit `Dictionary`, is no module, or has no parameters to learn.
    """
    if isinstance(dictionary, SparseCoder):
        return dictionary
    kind = type(dictionary).__name__
    if not isinstance(dictionary, Dictionary) or not isinstance(dictionary, nn.Module):
        raise InputError(
            f"Cannot train a {kind}: a dictionary to train is a torch.nn.Module with d_in, "
            "n_latents, encode and decode."
        )
    if isinstance(dictionary, Pretrained):
        dictionary.make_trainable()
    if not any(p.requires_grad for p in dictionary.parameters()):
        raise InputError(f"Cannot train a {kind}: it has no parameters that require a gradient.")
    return Adapter(dictionary)
