"""FVU of training whose weights and moments are kept in bfloat16 from step to step.

    mechatlas collect recipes/inception_mini/collect.toml --samples.source cifar10.zip
    python benchmarks/stochastic_rounding.py runs/inception_mini/store mixed3b --seeds 3

After each step numbers are rounded to bfloat16 (and held in float32), to the nearest or at random
with the mean where it was, by bits that follow from the seed. Prints the held-out FVU of each way.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mechatlas as ma
from mechatlas.dictionaries.engine.interface import StepResult
from mechatlas.dictionaries.engine.sparse_steps import SparseStep


def nearest(x: Tensor, random: torch.Generator) -> None:
    """Round to the nearest bfloat16, in place."""
    del random
    x.copy_(x.bfloat16())


def stochastic(x: Tensor, random: torch.Generator) -> None:
    """Round up or down, in place, as likely as each is near: add bits that are then cut off."""
    bits = x.view(torch.int32)
    bits += torch.randint(2**16, bits.shape, generator=random, dtype=torch.int32)
    bits &= -(2**16)


Round = Callable[[Tensor, torch.Generator], None]
WAYS: dict[str, tuple[Round, int] | None] = {
    "float32": None,
    "weights and moments at random": (stochastic, 3),
    "weights at random": (stochastic, 1),
    "weights to the nearest": (nearest, 1),
}
"""Rounding, and how many of a parameter and its two moments are rounded."""


class RoundedStep(SparseStep):
    """Step after which atoms and encoder are rounded."""

    def __init__(self, dictionary: "Rounded") -> None:
        super().__init__(dictionary)
        self.way, self.random = dictionary.way, torch.Generator().manual_seed(0)

    def __call__(self, *args: Any, **options: Any) -> StepResult:
        """Take the step."""
        result = super().__call__(*args, **options)
        if self.way is not None:
            rounds, n = self.way
            for name in ("W_dec", "W_enc"):
                for part in self.learned(name)[:n]:
                    rounds(part, self.random)
        return result


class Rounded(ma.Autoencoder):
    """Autoencoder of which numbers are rounded while it is trained."""

    way: tuple[Round, int] | None = None

    def step(self, objective: Any, revival: Any = None) -> RoundedStep:
        """Make the optimizer."""
        return RoundedStep(self)


def main() -> None:
    """Train each way with each seed, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("site")
    parser.add_argument("--expansion", type=int, default=8)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    given = parser.parse_args()
    rows = ma.Store(given.store).rows(given.site)
    for seed in range(given.seeds):
        for name in given.ways:
            size, rule = given.expansion * rows.d_in, ma.TopK(k=given.k)
            dictionary = Rounded(d_in=rows.d_in, n_latents=size, sparsity=rule, seed=seed)
            dictionary.way = WAYS[name]
            ma.train(dictionary, rows, steps=given.steps, batch_size=given.batch_size, seed=seed)
            history = dictionary.history
            assert history is not None
            print(f"seed {seed}, {name:30} FVU {history.fvu[-1]:.4f}", flush=True)


if __name__ == "__main__":
    main()
