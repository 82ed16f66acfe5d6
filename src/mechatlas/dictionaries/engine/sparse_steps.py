"""Training steps that cost about as much as one dense product with the encoder.

    SparseStep      every `LinearCoder` whose sparsity rule has a fast path
    step_for        this one where it fits, else autograd

Only the encoder's product is dense. Its result, the pre-activations of a batch, never exists:
it comes in tiles of `TILE` numbers, of which only the codes are kept, as pairs of a row and a
latent; where the processor is fast at numbers of half the size, the product is of those, and
the codes are exact none the less (`screening`). The rest is sparse: it is done by numba's `kernels`
here, by `triton_kernels` on GPUs, or by plain torch (`plain_steps`).
"""

import functools
import importlib
import importlib.util
import operator
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechatlas.base import RecipeError
from mechatlas.dictionaries.autoencoder import SMALLEST_LENGTH, LinearCoder
from mechatlas.dictionaries.engine import fallback, plain_steps, steps
from mechatlas.dictionaries.engine.graphs import Repeated
from mechatlas.dictionaries.engine.interface import (
    Dead,
    Find,
    Rows,
    Step,
    StepResult,
    TileCodes,
    TooCloseError,
)
from mechatlas.dictionaries.engine.products import product_with
from mechatlas.dictionaries.engine.steps import AutogradStep
from mechatlas.dictionaries.engine.structures import (
    AddedGradients,
    Codes,
    ErrorGradients,
    Grouped,
    LatentGradients,
    Learned,
    Reconstruction,
    Update,
    Weights,
)
from mechatlas.dictionaries.engine.threads import Run, workers
from mechatlas.dictionaries.objective import Objective
from mechatlas.dictionaries.revival import Revival, revive

TILE = 2**21
"""Pre-activations that exist at once, for each thread of a CPU."""
LATENT_BLOCK = 512
"""Latents that are updated together."""
COLUMN_SPLIT_SIZE = 2**24
"""Decoder size (entries) above which work is split by columns instead of by rows."""
COLUMN_GROUPS = 16
"""Number of groups of columns, if work is split by columns."""
MAX_DENSITY = 0.08
"""Fraction of pairs with a code, in the first tile, above which autograd is faster."""
SAMPLED_ROWS = 32
"""Rows sampled to estimate the BatchTopK threshold of a batch. An estimate from the last batch
would be nearer, but a run that was continued would not have it."""
THRESHOLD_FRACTIONS = 0.9, 0.5, 0.0
"""Fractions of the estimated threshold tried in turn until at least n candidates are found."""


class WholeProduct:
    """Search for codes of tiles of rows among all pre-activations."""

    def __init__(self, rows: Tensor, bias: Tensor, backend: Any, tile: int) -> None:
        self.rows, self.bias, self.backend = rows, bias, backend
        self.product = product_with(rows, tile)

    def largest(self, k: int) -> Callable[[Tensor, Tensor, Tensor], None]:
        """Select among them."""
        return lambda x, *out: self.backend.select(self.product(x), self.bias, k, *out)

    def above(self, low: Tensor) -> Find:
        """Compare each."""
        return lambda x: self.backend.above(self.product(x), self.bias, low)


def read_rows(dictionary: LinearCoder, x: Tensor, out: Tensor) -> Tensor:
    """Write rows as the encoder reads them."""
    if dictionary.subtracts_b_dec:
        return torch.sub(x[:, dictionary.reads], dictionary.b_dec.data, out=out)
    return out.copy_(x[:, dictionary.reads])


class BatchSearch:
    """A `CodeSearch` that looks through the tiles of a batch."""

    def __init__(
        self,
        dictionary: LinearCoder,
        x: Tensor,
        room: Tensor,
        tiles: Any,
        spans: Sequence[slice],
        run: Run,
    ) -> None:
        """Prepare the search.

        Args:
            dictionary: Changes nothing of it.
            x: Rows of the batch.
            room: Memory for the rows that the encoder reads, (batch, d_in), written by tiles.
            tiles: Search of one tile, as `WholeProduct` is, and of a batch if it can.
            spans: Tiles.
            run: Runner of the work on tiles.
        """
        self.dictionary, self.x, self.room = dictionary, x, room
        self.tiles, self.spans, self.run = tiles, spans, run

    def _read(self, i: int) -> Tensor:
        """Rows of a tile as the encoder reads them."""
        return read_rows(self.dictionary, self.x[self.spans[i]], self.room[self.spans[i]])

    def largest_of_rows(self, k: int) -> Codes:
        """Find the k largest codes of each row, zero where the pre-activation is below."""
        values = self.x.new_empty(len(self.x), k)
        latents = torch.empty_like(values, dtype=torch.int32)
        codes = [(values[span], latents[span]) for span in self.spans]
        select = self.tiles.largest(k)
        self.run(lambda i: select(self._read(i), *codes[i]), len(self.spans))
        if len(self.dictionary.matryoshka_widths) > 1:
            latents, order = latents.sort(dim=1)
            values = values.gather(1, order)
        starts = torch.arange(0, values.numel() + 1, k, device=values.device)
        return Codes(starts, latents.view(-1), values.view(-1), values.view(-1))

    def largest_of_batch(self, k: int) -> Codes:
        """Find the codes above zero that are largest in the batch, k a row on average."""
        n = k * len(self.x)
        if isinstance(self.tiles, WholeProduct) and self.tiles.backend is fallback:
            tiles = (self.tiles.product(self._read(i)) for i in range(len(self.spans)))
            return fallback.largest_of_batch(tiles, self.tiles.bias, n)
        whole: Any = getattr(self.tiles, "largest_of_batch", None)
        if whole is not None:
            return whole([self._read(i) for i in range(len(self.spans))], k)
        sample = self.x[:: -(-len(self.x) // SAMPLED_ROWS), self.dictionary.reads]
        pre = self.dictionary.pre_activations(sample).flatten()
        largest = pre.topk(min(k * len(sample), len(pre)), sorted=False).values
        threshold = float(largest.min())
        first, *others = THRESHOLD_FRACTIONS if threshold > 0 else (0.0,)
        codes = self._all_above(self.tiles.above(self._bounds(first * threshold)))
        while len(codes.values) < n and others:
            low = self._bounds(others.pop(0) * threshold)
            codes = self._all_above(self.tiles.above(low))
        return _keep_largest(codes, n)

    def above(self, low: Float[Tensor, " latent"] | float) -> Codes | None:
        """Find the pre-activations above a bound of their latent; None if they are not sparse."""
        find = self.tiles.above(low if isinstance(low, Tensor) else self._bounds(low))
        first = find(self._read(0))
        if (
            first is None
            or len(first[-1]) > MAX_DENSITY * self.spans[0].stop * self.dictionary.n_latents
        ):
            return None
        return self._all_above(find, first)

    def _bounds(self, low: float) -> Float[Tensor, " latent"]:
        return torch.full_like(self.dictionary.b_enc.data, low)

    def _all_above(self, find: Find, *first_tiles: TileCodes) -> Codes:
        """Codes of all tiles, given those of the first ones.

        Raises:
            TooCloseError: A tile has no room for so many.
        """
        done = len(first_tiles)
        more = self.run(lambda i: find(self._read(done + i)), len(self.spans) - done)
        found = [codes for codes in (*first_tiles, *more) if codes is not None]
        if len(found) < len(self.spans):
            raise TooCloseError
        counts, latents, values = (
            part[0] if len(part) == 1 else torch.cat(part) for part in zip(*found, strict=True)
        )
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return Codes(starts, latents, values, values)


def _keep_largest(codes: Codes, n: int) -> Codes:
    """Keep the n largest codes, of equal ones the first, or all if there are fewer."""
    values = codes.values
    if len(values) <= n:
        return codes
    last = values.kthvalue(len(values) - n + 1).values
    ties = values == last
    kept = (values > last) | (ties & (ties.cumsum(0) <= n - (values > last).sum()))
    before = torch.cat([kept.new_zeros(1, dtype=torch.long), kept.cumsum(0)])
    return Codes(before[codes.starts], codes.latents[kept], values[kept], values[kept])


def _total(parts: Tensor) -> Tensor:
    """Sum of parts of a result, most often one."""
    return parts[0] if len(parts) == 1 else parts.sum(dim=0)


class SparseStep:
    """Steps of a dictionary whose sparsity rule has a fast path.

    On a CPU rows are shared out in tiles and latents in blocks over as many threads as torch uses.
    The shares do not depend on the number of threads, so neither do the results. A batch whose
    codes are not sparse (ReLU, JumpReLU and Gated, at the start) is left to autograd.
    """

    def __init__(
        self,
        dictionary: LinearCoder,
        objective: Objective | None = None,
        *,
        compiled: bool | None = None,
    ) -> None:
        """Make room for the moments.

        Args:
            dictionary: Changed in place by each step.
            objective: Squared error that is minimized.
            compiled: Whether numba's kernels are used; by default on a CPU with numba installed.
                Elsewhere Triton takes the steps of our rules, where it can, or plain torch.

        Raises:
            ValueError: The sparsity rule has no fast path.
        """
        if not dictionary.rule.has_fast_path:
            raise ValueError(
                f"A sparse step needs a sparsity rule with `find_codes`, got {dictionary.sparsity}."
            )
        self.dictionary, self.n_steps = dictionary, 0
        self.objective = objective or Objective()
        tied = [] if dictionary.tied else ["W_enc"]
        names = ["W_dec", "b_enc", "b_dec", *tied, *dictionary.rule.parameters(1)]
        self.moments = steps.moments_of({name: self._parameter(name) for name in names})
        self.backend: Any = fallback
        self._screens = False
        if compiled or (compiled is None and can_compile(dictionary.W_dec)):
            self.backend = importlib.import_module("mechatlas.dictionaries.engine.kernels")
            self._screens = can_screen(dictionary.W_dec)
        elif compiled is None:
            self.backend = triton_for(dictionary) or fallback
        self.levels = torch.tensor(dictionary.matryoshka_widths, device=dictionary.W_dec.device)
        self._edges = torch.tensor(dictionary.edges)  # of the host, whatever the device
        self.room: dict[str, Tensor] = {}
        self.repeated = Repeated()
        self._tiles: list[Tensor] = []

    def _parameter(self, name: str) -> Tensor:
        """A parameter's data, latents first."""
        if name == "W_enc":
            return self.dictionary.encoder_rows
        return getattr(self.dictionary, name).data

    def learned(self, name: str) -> Learned:
        """A parameter with its moments, latents first."""
        return Learned(self._parameter(name), *self.moments[name])

    @torch.no_grad()
    def __call__(
        self, x: Rows, lr: float, dead: Dead | None = None, *, sparsity_coefficient: float = 1.0
    ) -> StepResult:
        """Change the dictionary in place; see `Step`."""
        with workers(x.device) as run:
            if hasattr(self.backend, "step"):
                with torch.cuda.device_of(x):  # that kernels are launched on
                    return self.backend.step(self, x, lr, dead, sparsity_coefficient, run)
            codes = self.select(x, run)
            if codes is not None and self.backend is fallback:
                return plain_steps.learn(self, x, codes, lr, dead, sparsity_coefficient)
            if codes is not None:
                return self._learn(x, codes, lr, dead, sparsity_coefficient, run)
        dense = AutogradStep(self.dictionary, self.objective, moments=self._moments_of_parameters())
        dense.n_steps, self.n_steps = self.n_steps, self.n_steps + 1
        return dense(x, lr, dead, sparsity_coefficient=sparsity_coefficient)

    def _moments_of_parameters(self) -> dict[str, tuple[Tensor, Tensor]]:
        moments = dict(self.moments)
        if not self.dictionary.tied:
            first, second = moments.pop("W_enc")
            moments["_W_enc"] = (first.T, second.T)
        return moments

    def select(self, x: Tensor, run: Run) -> Codes | None:
        """Codes of a batch; None if they are not sparse."""
        dictionary = self.dictionary
        rows, bias = dictionary.encoder_rows, dictionary.b_enc.data
        room = self.room_for("x", (len(x), dictionary.d_in), x)
        if self._screens:
            screening = importlib.import_module("mechatlas.dictionaries.engine.screening")
            search = screening.Screen(rows, bias, run, self._tiles)
            spans = tiles(len(x), len(rows), 2 * TILE, screening.MIN_TILE_ROWS)
            with suppress(TooCloseError):
                return self._find(BatchSearch(dictionary, x, room, search, spans, run))
        spans = self.spans(x)
        if hasattr(self.backend, "Screen"):
            search = self.backend.Screen(rows, bias)
        else:
            search = WholeProduct(rows, bias, self.backend, spans[0].stop)
        return self._find(BatchSearch(dictionary, x, room, search, spans, run))

    def spans(self, x: Tensor) -> list[slice]:
        """Tiles of a batch whose pre-activations may exist at once."""
        numbers = TILE if x.device.type == "cpu" else steps.DEVICE_TILE
        return tiles(len(x), self.dictionary.n_latents, numbers)

    def _find(self, search: BatchSearch) -> Codes | None:
        """Find the codes that the sparsity rule keeps."""
        return self.dictionary.rule.find_codes(search, self.dictionary.state)

    def left_by_others(self, target: Tensor, codes: Codes) -> Tensor:
        """Rows less what other latents reconstruct, where these are not all."""
        del codes
        return target

    def over_all(self, part: Any) -> Any:
        """Sum of a number or tensor over all latents, where these are not all."""
        return part

    def _learn(
        self,
        x: Tensor,
        codes: Codes,
        lr: float,
        dead: Dead | None,
        sparsity_coefficient: float,
        run: Run,
    ) -> StepResult:
        """Change the dictionary by a batch, given its codes, with numba's kernels."""
        dictionary = self.dictionary
        self.n_steps += 1
        target = x[:, dictionary.writes]
        levels = dictionary.matryoshka_widths
        task = Reconstruction(
            self.left_by_others(target, codes),
            self.objective.weights(target).mul_(2 / len(x) / len(levels)),
            dictionary.W_dec.data,
            dictionary.b_dec.data,
            self.levels,
        )
        reconstruct = self._by_column_groups if self._by_columns(dead) else self._by_tiles
        weight = sparsity_coefficient / len(x)
        rule, state = dictionary.rule, dictionary.state
        of_gates = None
        if rule.has_gates:  # first: what is kept of the codes takes its room
            scales = task.scales * (sparsity_coefficient * len(levels))
            gates = task._replace(scales=scales, widths=self.levels[-1:])
            of_gates = reconstruct(gates, codes._replace(values=codes.raw), run)
        loss, grouped, out = reconstruct(task, codes, run)
        fired = grouped.starts[1:] > grouped.starts[:-1]
        penalty, learned = rule.penalize_codes(codes, out.codes, weight, state)
        if of_gates is not None:  # a gate learns where it is open, even if its size is zero
            error, by_gate, d_gates = of_gates
            penalty += error
            out.codes.add_(d_gates.codes)
            grouped = by_gate._replace(values=codes.values.index_select(0, by_gate.order))
        d_code = out.codes.index_select(0, grouped.order)
        batch = LatentGradients(self.room["x"], out.rows, out.atoms, d_code, task.widths)
        added = self.revival(dead, task.scales, out.rows)
        self._descend((grouped, batch, added, run), learned, out.bias, lr)
        return StepResult(float(loss + penalty), fired)

    def _descend(
        self,
        sums: tuple[Grouped, LatentGradients, AddedGradients, Run],
        learned: dict[str, Tensor],
        bias: Tensor,
        lr: float,
    ) -> None:
        """Step along what a batch has summed, the gradients `learned` and that of `b_dec`."""
        dictionary, adam = self.dictionary, steps.adam(lr, self.n_steps)
        update = Update(adam, self._edges, 1.0, SMALLEST_LENGTH, dictionary.tied, True)

        def to_bias(d_input: Tensor) -> Tensor:
            return bias - d_input if dictionary.subtracts_b_dec else bias

        factor = 1.0
        if self.objective.clip is not None:
            squares, d_input = self._update(update._replace(apply=False), *sums)
            learned["b_dec"] = to_bias(d_input)
            squares += sum(float(gradient.square().sum()) for gradient in learned.values())
            factor = self.objective.factor(squares)
        _, d_input = self._update(update._replace(clip=factor), *sums)
        learned["b_dec"] = to_bias(d_input)
        gradients = [g if factor == 1 else g * factor for g in learned.values()]
        fallback.step_adam([self.learned(name) for name in learned], gradients, adam)

    def _group(self, codes: Codes) -> Grouped:
        """Group codes by latent."""
        order, starts = self.backend.group(codes.latents, codes.values, self.dictionary.n_latents)
        rows = fallback.rows_of(codes).int().index_select(0, order)
        return Grouped(starts, rows, codes.values.index_select(0, order), order)

    def _by_tiles(
        self, task: Reconstruction, codes: Codes, run: Run
    ) -> tuple[float, Grouped, ErrorGradients]:
        """Squared error, codes latent by latent, and gradients of rows, codes and bias.

        One thread groups the codes meanwhile.
        """
        n, d_out = task.target.shape
        spans = tiles(n, self.dictionary.n_latents)
        room = self.room_for("g", (len(task.widths), n, d_out), task.target)
        biases = task.target.new_zeros(len(spans), d_out)
        out = ErrorGradients(room, task.atoms[:0], torch.zeros_like(codes.values), biases)

        def residual(i: int) -> float:
            rows = spans[i]
            target = task.target[rows].contiguous()
            part = task._replace(target=target, scales=task.scales[rows])
            mine = codes._replace(starts=codes.starts[rows.start : rows.stop + 1])
            gradients = out._replace(rows=out.rows[:, rows], bias=out.bias[i])
            return self.backend.residual(part, mine, gradients)

        pieces = [functools.partial(self._group, codes)]
        pieces += [functools.partial(residual, i) for i in range(len(spans))]
        grouped, *losses = run(lambda i: pieces[i](), len(pieces))
        return functools.reduce(operator.add, losses), grouped, out._replace(bias=_total(biases))

    def _by_column_groups(
        self, task: Reconstruction, codes: Codes, run: Run
    ) -> tuple[Tensor | float, Grouped, ErrorGradients]:
        """Squared error, codes latent by latent, and gradients of atoms, codes and bias."""
        grouped, target = self._group(codes), task.target
        d_out = target.shape[1]
        share = -(-d_out // COLUMN_GROUPS)
        spans = [range(i, min(i + share, d_out)) for i in range(0, d_out, share)]
        atoms = self.room_for("atoms", (len(task.atoms), d_out), target)
        rows = target.new_empty(len(task.widths), 0, d_out)
        d_codes = target.new_zeros(len(spans), len(codes.values))
        out = ErrorGradients(rows, atoms, d_codes, target.new_zeros(d_out))
        read = (task, codes, grouped)

        def columns(i: int) -> float:
            return self.backend.columns(spans[i], *read, out._replace(codes=out.codes[i]))

        loss = sum(run(columns, len(spans)))
        return loss, grouped, out._replace(codes=_total(d_codes))

    def _update(
        self, rule: Update, pairs: Grouped, batch: LatentGradients, added: AddedGradients, run: Run
    ) -> tuple[float, Tensor]:
        """Update all latents, or measure their gradients; gradient of the encoder's input."""
        n = self.dictionary.n_latents
        blocks = [range(i, min(i + LATENT_BLOCK, n)) for i in range(0, n, LATENT_BLOCK)]
        d_input = batch.x.new_zeros(len(blocks), batch.x.shape[1])
        names = ("W_dec", "W_dec" if rule.tied else "W_enc", "b_enc")
        fixed = (pairs, batch, Weights(*map(self.learned, names)), rule, added)
        squares = run(lambda i: self.backend.update(blocks[i], *fixed, d_input[i]), len(blocks))
        total = 0.0 if rule.apply else self.over_all(sum(squares))
        return total, self.over_all(_total(d_input))

    def revival(self, dead: Dead | None, scales: Tensor, rows: Tensor) -> AddedGradients:
        """Gradients of dead latents from the residual of the widest level."""
        dictionary = self.dictionary
        atoms, encoder = dictionary.W_dec.data, dictionary.encoder_rows
        bias = dictionary.b_enc.data
        if "place" not in self.room:
            self.room["place"] = torch.full_like(bias, -1, dtype=torch.int32)
        if dead is None or not self.n_dead(dead):
            none = bias.new_empty(0, atoms.shape[1]), bias.new_empty(0, encoder.shape[1])
            return AddedGradients(self.room["place"], *none, bias[:0])
        place = torch.full_like(bias, -1, dtype=torch.int32)
        residual = rows[-1] / -scales[:, None]
        latents, *gradients = self.revive(dead, self.room["x"], residual)
        place[latents] = torch.arange(len(latents), dtype=torch.int32, device=bias.device)
        return AddedGradients(place, *gradients)

    def n_dead(self, dead: Dead) -> int:
        """Number of dead latents."""
        return len(dead[1])

    def revive(self, dead: Dead, x: Tensor, residual: Tensor) -> Revival:
        """Gradients of the dead latents, on rows that the encoder read."""
        dictionary = self.dictionary
        parameters = dictionary.W_dec.data, dictionary.encoder_rows, dictionary.b_enc.data
        return revive(*dead, parameters, x, residual)

    def _by_columns(self, dead: Dead | None) -> bool:
        """Whether the atoms are too wide for whole rows; the dead read whole rows."""
        wide = self.dictionary.n_latents * self.dictionary.d_out > COLUMN_SPLIT_SIZE
        return wide and (dead is None or not len(dead[1]))

    def room_for(self, name: str, shape: tuple[int, ...], x: Tensor) -> Tensor:
        """Array that is kept from step to step."""
        if name not in self.room or self.room[name].shape != shape:
            self.room[name] = x.new_empty(shape)
        return self.room[name]


def step_for(dictionary: LinearCoder, objective: Objective | None = None) -> Step:
    """Make the faster of the steps that can train a dictionary."""
    step = SparseStep if dictionary.rule.has_fast_path else AutogradStep
    return step(dictionary, objective)


def can_compile(tensor: Tensor) -> bool:
    """Whether numba's kernels can work on a tensor."""
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.float64):
        return False
    return importlib.util.find_spec("numba") is not None


def can_use_triton(tensor: Tensor) -> bool:
    """Whether Triton's kernels can work on a tensor."""
    if tensor.device.type != "cuda" or tensor.dtype not in (torch.float32, torch.bfloat16):
        return False
    return importlib.util.find_spec("triton") is not None


def triton_for(dictionary: LinearCoder) -> Any:
    """Give Triton's kernels where they can take the steps of a dictionary, else None."""
    if not can_use_triton(dictionary.W_dec) or dictionary.b_enc.dtype != torch.float32:
        return None
    kernels = importlib.import_module("mechatlas.dictionaries.engine.triton_kernels")
    return kernels if type(dictionary.rule) in kernels.RULES else None


def keep_halves(dictionary: Any) -> None:
    """Keep atoms and encoder in bfloat16 from now on, as the steps made after this expect it.

    Raises:
        RecipeError: No kernels take such steps.
    """
    usual = isinstance(dictionary, LinearCoder) and type(dictionary).step is LinearCoder.step
    kernels = triton_for(dictionary) if usual else None
    if kernels is None:
        raise RecipeError(
            "dtype 'bfloat16' needs a CUDA device with Triton (pip install mechatlas[gpu]) and a "
            "TopK, BatchTopK, ReLU, JumpReLU or Gated dictionary that one process trains; give "
            "dtype 'float32'."
        )
    kernels.keep_halves(dictionary)


@functools.cache
def _multiplies_halves() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32."""
    from llvmlite.binding import get_host_cpu_features

    features = get_host_cpu_features()
    return bool(features.get("amx-bf16") or features.get("avx512bf16"))


def can_screen(tensor: Tensor) -> bool:
    """Whether codes are found faster from a product of half the precision, given the kernels."""
    halves = torch.backends.mkldnn.is_available() and _multiplies_halves()
    return halves and tensor.dtype == torch.float32


def tiles(n_rows: int, n_latents: int, numbers: int = TILE, least: int = 1) -> list[slice]:
    """Split rows into tiles of one size, in pairs if several, whose pre-activations fit.

    Args:
        n_rows: Number of rows.
        n_latents: Pre-activations of each row.
        numbers: Pre-activations that a tile should have; it has less than twice as many.
        least: Rows that a tile should have at least, even if `numbers` are fewer.
    """
    tile = max(least, numbers // n_latents)
    n_tiles = n_rows // tile
    tile = -(-n_rows // max(1, n_tiles - n_tiles % 2))
    return [slice(i, min(i + tile, n_rows)) for i in range(0, n_rows, tile)]
