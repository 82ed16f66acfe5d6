"""Training steps of pose-tied dictionaries.

    PosedStep    the sparse step of `PoseTied`: numba's kernels on CPUs, autograd elsewhere

One dense product is left, that of the encoder with every block of the batch; its results come in
tiles. What is sparse is in `posed_kernels`.
"""

import functools
import importlib

import torch
from torch import Tensor

from mechatlas.dictionaries.autoencoder import SMALLEST_LENGTH
from mechatlas.dictionaries.engine import fallback, steps
from mechatlas.dictionaries.engine.interface import Dead, Rows, StepResult
from mechatlas.dictionaries.engine.products import product_with
from mechatlas.dictionaries.engine.sparse_steps import can_compile, tiles
from mechatlas.dictionaries.engine.steps import ReconstructionStep
from mechatlas.dictionaries.engine.structures import (
    Learned,
    PosedBatch,
    PosedCodes,
    PosedGradients,
    PosedPairs,
    PosedReconstruction,
    Update,
    Weights,
)
from mechatlas.dictionaries.engine.threads import Run, workers
from mechatlas.dictionaries.objective import Objective
from mechatlas.dictionaries.pose_tied import PoseTied

FAMILIES = 16
"""Families that are updated together."""


class PosedStep:
    """Steps of a `PoseTied` dictionary; see `interface.Step`."""

    def __init__(
        self,
        dictionary: PoseTied,
        objective: Objective | None = None,
        *,
        compiled: bool | None = None,
    ) -> None:
        """Make room for the moments.

        Args:
            dictionary: Changed in place by each step.
            objective: Squared error that is minimized.
            compiled: Whether numba's kernels are used; by default on a CPU with numba installed.
        """
        self.dictionary, self.objective, self.n_steps = dictionary, objective or Objective(), 0
        self.dense = ReconstructionStep(
            dictionary, objective, project=self._project, normalize=dictionary.normalize
        )
        self.parameters, self.moments = self.dense.parameters, self.dense.moments
        self._compiled = can_compile(dictionary.atoms) if compiled is None else compiled

    def _project(self, gradients: dict[str, Tensor]) -> None:
        atoms = self.parameters["_atoms"].data
        fallback.remove_along(gradients["_atoms"], atoms, list(self.dictionary.edges))

    @torch.no_grad()
    def __call__(
        self, x: Rows, lr: float, dead: Dead | None = None, *, sparsity_coefficient: float = 1.0
    ) -> StepResult:
        """Change the dictionary in place; see `Step`.

        Raises:
            ValueError: Dead latents are to be revived, which is not done here.
        """
        if dead is not None or not self._compiled:
            self.dense.n_steps, self.n_steps = self.n_steps, self.n_steps + 1
            return self.dense(x, lr, dead)
        del sparsity_coefficient  # TopK has no penalty
        self.n_steps += 1
        with workers(x.device) as run:
            return self._by_kernels(x, lr, run)

    def _by_kernels(self, x: Tensor, lr: float, run: Run) -> StepResult:
        kernels = importlib.import_module("mechatlas.dictionaries.engine.posed_kernels")
        dictionary = self.dictionary
        order, d = dictionary.group.order, dictionary.d_block
        blocks = x.reshape(len(x), order, d)
        codes, read = self._select(blocks, run)
        inverses = torch.from_numpy(dictionary.group.inverses.astype("int64"))
        task = PosedReconstruction(
            blocks,
            self.objective.weights(x).mul_(2 / len(x)),
            dictionary.atoms.data,
            self.parameters["_b_dec"].data,
            dictionary.moved[:, inverses].contiguous(),
        )
        spans = tiles(len(x), dictionary.n_latents)
        biases = x.new_zeros(len(spans), d)
        out = PosedGradients(torch.empty_like(blocks), torch.zeros_like(codes.values), biases)

        def residual(i: int) -> float:
            rows = spans[i]
            part = task._replace(target=task.target[rows], scales=task.scales[rows])
            mine = PosedCodes(*(t[rows] for t in codes))
            gradients = PosedGradients(out.rows[rows], out.codes[rows], out.bias[i])
            return kernels.residual(part, mine, gradients)

        loss = sum(run(residual, len(spans)))
        batch = PosedBatch(read, out.rows, dictionary.moved)
        pairs = self._group(codes, out.codes)
        adam = steps.adam(lr, self.n_steps)
        update = Update(adam, torch.tensor(dictionary.edges), 1.0, SMALLEST_LENGTH, False, True)
        factor = 1.0
        if self.objective.clip is not None:
            squares, d_input = self._update(update._replace(apply=False), pairs, batch, run)
            d_bias = biases.sum(dim=0) - d_input
            factor = self.objective.factor(squares + float(d_bias.square().sum()))
        _, d_input = self._update(update._replace(clip=factor), pairs, batch, run)
        d_bias = biases.sum(dim=0) - d_input
        b_dec = self.parameters["_b_dec"].data
        bias = Learned(b_dec, *self.moments["_b_dec"])
        fallback.step_adam([bias], [d_bias * factor], adam)
        fired = torch.zeros(dictionary.n_latents, dtype=torch.bool)
        fired[codes.latents[codes.values > 0].long()] = True
        return StepResult(loss, fired)

    def _select(self, blocks: Tensor, run: Run) -> tuple[PosedCodes, Tensor]:
        """The k largest codes of each row, and the blocks without their bias."""
        kernels = importlib.import_module("mechatlas.dictionaries.engine.kernels")
        dictionary = self.dictionary
        k, bias = dictionary.sparsity.k, dictionary.b_enc.data
        values = blocks.new_empty(len(blocks), k)
        codes = PosedCodes(torch.empty_like(values, dtype=torch.int32), values)
        read = blocks - self.parameters["_b_dec"].data
        spans = tiles(len(blocks), dictionary.n_latents)
        encoder = self.parameters["_encoder"].data
        product = product_with(encoder, spans[0].stop * blocks.shape[1])

        largest = functools.partial(kernels.select, bias=bias, k=k)

        def select(i: int) -> None:
            rows = spans[i]
            pre = product(read[rows].flatten(0, 1)).view(rows.stop - rows.start, -1)
            largest(pre, values=codes.values[rows], latents=codes.latents[rows])

        run(select, len(spans))
        return codes, read

    def _group(self, codes: PosedCodes, gradients: Tensor) -> PosedPairs:
        """Codes family by family."""
        kernels = importlib.import_module("mechatlas.dictionaries.engine.kernels")
        n = self.dictionary.n_families
        family, pose = (codes.latents % n).view(-1), (codes.latents // n).view(-1)
        values = codes.values.view(-1)
        order, starts = kernels.group(family, values, n)
        rows = torch.arange(len(codes.values), dtype=torch.int32)
        rows = rows.repeat_interleave(codes.values.shape[1])
        return PosedPairs(order, starts, rows, pose, values, gradients.view(-1))

    def _update(
        self, rule: Update, pairs: PosedPairs, batch: PosedBatch, run: Run
    ) -> tuple[float, Tensor]:
        """Update all families, or measure their gradients; gradient of the encoder's input."""
        kernels = importlib.import_module("mechatlas.dictionaries.engine.posed_kernels")
        n = self.dictionary.n_families
        spans = [range(i, min(i + FAMILIES, n)) for i in range(0, n, FAMILIES)]
        d_input = batch.x.new_zeros(len(spans), self.dictionary.d_block)
        names = ("_atoms", "_encoder", "_b_enc")
        weights = Weights(*(Learned(self.parameters[m].data, *self.moments[m]) for m in names))
        fixed = (pairs, batch, weights, rule)
        squares = run(lambda i: kernels.update(spans[i], *fixed, d_input[i]), len(spans))
        return sum(squares), d_input.sum(dim=0)
