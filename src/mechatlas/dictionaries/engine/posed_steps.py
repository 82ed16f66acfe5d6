"""Training steps of pose-tied dictionaries.

    PosedStep    the sparse step of `PoseTied`: numba's kernels on CPUs, autograd elsewhere

One dense product is left, that of the encoder with every block of the batch; its results come in
tiles. What is sparse is in `posed_kernels`.
"""

import importlib

import torch
from jaxtyping import Float
from torch import Tensor

from mechatlas.dictionaries.engine import fallback, steps
from mechatlas.dictionaries.engine.products import product_with
from mechatlas.dictionaries.engine.sparse_steps import Run, can_compile, tiles, workers
from mechatlas.dictionaries.engine.steps import Dead, Stepped
from mechatlas.dictionaries.objective import Objective
from mechatlas.dictionaries.pose_tied import PoseTied

FAMILIES = 16
"""Families that are updated together."""
Sparse = tuple[Tensor, Tensor, Tensor]
"""Latents and values of the codes of each row, (batch, k), and where they were read."""


class PosedStep:
    """Steps of a `PoseTied` dictionary; see `steps.Step`."""

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
            objective: What is minimised.
            compiled: Use numba's kernels; by default on a CPU with numba installed.
        """
        self.dictionary, self.objective, self.n_steps = dictionary, objective or Objective(), 0
        parameters = {name: p.data for name, p in dictionary.named_parameters()}
        self.moments = steps.moments_of(parameters)
        self._compiled = can_compile(dictionary._atoms) if compiled is None else compiled

    @torch.no_grad()
    def __call__(
        self,
        x: Float[Tensor, "batch width"],
        lr: float,
        dead: Dead | None = None,
        *,
        pressure: float = 1.0,
    ) -> Stepped:
        """Change the dictionary in place; see `Step`.

        Raises:
            ValueError: Dead latents are to be revived, which is not done here.
        """
        del pressure  # TopK has no penalty
        if dead is not None:
            raise ValueError("Latents of a pose-tied dictionary cannot be revived.")
        self.n_steps += 1
        adam = steps.adam(lr, self.n_steps)
        scales = self.objective.weights(x).mul_(2 / len(x))
        if not self._compiled:
            return self._by_autograd(x, scales, adam)
        with workers(x.device) as run:
            return self._by_kernels(x, scales, adam, run)

    def _by_kernels(self, x: Tensor, scales: Tensor, adam: list[float], run: Run) -> Stepped:
        kernels = importlib.import_module("mechatlas.dictionaries.engine.kernels")
        parts = importlib.import_module("mechatlas.dictionaries.engine.posed_kernels")
        owner = self.dictionary
        order, d, n = owner.group.order, owner.d_block, owner.n_families
        blocks = x.reshape(len(x), order, d)
        latents, values, centred = self._select(blocks, run)
        g, d_code = torch.empty_like(blocks), torch.zeros_like(values)
        spans = tiles(len(x), owner.n_latents)
        g_sums = x.new_zeros(len(spans), d)
        parameters = owner.atoms.data, owner._b_dec.data
        inverses = torch.from_numpy(owner.group.inverses.astype("int64"))
        source = owner._moved[:, inverses].contiguous()

        def residual(i: int) -> float:
            rows = spans[i]
            codes, out = (latents[rows], values[rows]), (g[rows], d_code[rows], g_sums[i])
            return parts.residual(blocks[rows], parameters, codes, source, scales[rows], out)

        loss = sum(run(residual, len(spans)))
        family, pose = (latents % n).view(-1), (latents // n).view(-1)
        grouped = kernels.group(family, values.view(-1), n)
        row = torch.arange(len(x), dtype=torch.int32).repeat_interleave(values.shape[1])
        pairs = (row, pose, values.view(-1), d_code.view(-1))
        state = [
            (getattr(owner, name).data, *self.moments[name])
            for name in ("_atoms", "_encoder", "_b_enc")
        ]
        edges = torch.tensor(owner.edges)
        shares = [range(i, min(i + FAMILIES, n)) for i in range(0, n, FAMILIES)]

        def sweep(clip: float | None) -> tuple[float, Tensor]:
            d_input = x.new_zeros(len(shares), d)
            fixed = (grouped, pairs, (centred, g), owner._moved, state, edges, adam, clip)
            squares = sum(run(lambda i: parts.update(shares[i], *fixed, d_input[i]), len(shares)))
            return squares, g_sums.sum(dim=0) - d_input.sum(dim=0)

        factor = 1.0
        if self.objective.clip is not None:
            squares, d_bias = sweep(None)
            factor = self.objective.factor(squares + float(d_bias.square().sum()))
        _, d_bias = sweep(factor)
        fallback.step_adam(owner._b_dec.data, *self.moments["_b_dec"], d_bias * factor, adam)
        fired = torch.zeros(owner.n_latents, dtype=torch.bool)
        fired[latents[values > 0].long()] = True
        return Stepped(loss, fired)

    def _select(self, blocks: Tensor, run: Run) -> Sparse:
        """The k largest codes of each row, and the blocks without their bias."""
        kernels = importlib.import_module("mechatlas.dictionaries.engine.kernels")
        owner = self.dictionary
        k, bias = owner.sparsity.k, owner.b_enc.data
        values = blocks.new_empty(len(blocks), k)
        latents = torch.empty_like(values, dtype=torch.int32)
        centred = blocks - owner._b_dec.data
        spans = tiles(len(blocks), owner.n_latents)
        product = product_with(owner._encoder.data, spans[0].stop * blocks.shape[1])

        def select(i: int) -> None:
            rows = spans[i]
            pre = product(centred[rows].reshape(-1, owner.d_block))
            whole = pre.view(-1, owner.n_latents)
            kernels.select(whole, bias, k, values[rows], latents[rows])

        run(select, len(spans))
        return latents, values, centred

    def _by_autograd(self, x: Tensor, scales: Tensor, adam: list[float]) -> Stepped:
        owner = self.dictionary
        with torch.enable_grad():
            code = owner.encode(x)
            left = owner.decode(code) - x
            loss = (left.square().sum(dim=-1) * scales).sum() / 2
            named = dict(owner.named_parameters())
            gradients = dict(
                zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)
            )
        fallback.remove_along(gradients["_atoms"], owner._atoms.data, list(owner.edges))
        squares = sum(float(gradient.square().sum()) for gradient in gradients.values())
        factor = self.objective.factor(squares)
        for name, gradient in gradients.items():
            moments = self.moments[name]
            fallback.step_adam(named[name].data, *moments, gradient * factor, adam)
        owner.normalise()
        return Stepped(float(loss.detach()), (code.detach() != 0).any(dim=0))
