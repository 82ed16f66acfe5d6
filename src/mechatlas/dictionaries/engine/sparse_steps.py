"""Training steps that cost about as much as one dense product with the encoder.

    SparseStep      TopK, BatchTopK, ReLU and JumpReLU, in every form of dictionary
    step_for        this one where it fits, else autograd

Only the encoder's product is dense. Its result, the pre-activations of a batch, never exists:
it comes in tiles of `TILE` numbers, of which only the codes are kept, as pairs of a row and a
latent; where the processor is fast at numbers of half the size, the product is of those, and
the codes are exact none the less (`screening`). The rest is sparse: what it does is in `kernels`
(numba) and `fallback` (torch).
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechatlas.dictionaries.autoencoder import SparseCoder
from mechatlas.dictionaries.engine import fallback, steps
from mechatlas.dictionaries.engine.products import product_with
from mechatlas.dictionaries.engine.steps import AutogradStep, Dead, Step, Stepped
from mechatlas.dictionaries.objective import Objective
from mechatlas.dictionaries.revival import revive
from mechatlas.dictionaries.sparsity import BatchTopK, JumpReLU, ReLU, TopK

TILE = 2**21
"""Pre-activations that exist at once, for each thread."""
LATENTS = 512
WIDE = 2**24
"""Numbers in the atoms from which some columns of all rows are worked on, not all of some."""
GROUPS = 16
"""Shares of the columns, if they are shared out."""
DENSE = 0.08
"""Share of pairs with a code, in the first tile, from which autograd is faster."""
SOME_ROWS = 32
"""Of a batch, of which `BatchTopK` guesses the smallest code that it keeps of all. A guess from the
last batch would be nearer, but a run that was continued would not have it."""
CLOSES = 0.9, 0.5, 0.0
"""Of the guess, from which on codes are looked for, until there are enough."""
RULES = (TopK, BatchTopK, ReLU, JumpReLU)

Run = Callable[[Callable[[int], Any], int], Sequence[Any]]
Found = tuple[Tensor, Tensor, Tensor]
"""How many codes each row has, which of all latents they belong to, and their values."""
Find = Callable[[Tensor], Found]


class Codes(NamedTuple):
    """The codes of a batch, as pairs of a row and a latent, row by row."""

    starts: Int[Tensor, " batch_and_one"]
    """Where the pairs of each row begin."""
    latents: Int[Tensor, " pairs"]
    values: Float[Tensor, " pairs"]
    raw: Float[Tensor, " pairs"]
    """Pre-activations; for `JumpReLU` some pairs are just below their threshold."""


class Grouped(NamedTuple):
    """The codes of a batch other than zero, latent by latent."""

    starts: Int[Tensor, " latents_and_one"]
    """Where the pairs of each latent begin."""
    rows: Int[Tensor, " pairs"]
    values: Float[Tensor, " pairs"]
    order: Int[Tensor, " pairs"]
    """Which of the pairs row by row each is."""


@runtime_checkable
class Search(Protocol):
    """A way to find codes of rows with an encoder that does not change meanwhile."""

    def largest(self, k: int) -> Callable[[Tensor, Tensor, Tensor], None]:
        """A function that writes values and latents of the k largest codes of each row."""
        ...

    def above(self, low: Float[Tensor, " latent"]) -> Find:
        """A function that gives the pre-activations of some rows above `low`."""
        ...


class Whole:
    """A `Search` among all pre-activations."""

    def __init__(self, rows: Tensor, bias: Tensor, parts: Any, tile: int) -> None:
        self.bias, self.parts = bias, parts
        self.product = product_with(rows, tile)

    def largest(self, k: int) -> Callable[[Tensor, Tensor, Tensor], None]:
        """By selecting among them."""
        return lambda x, *out: self.parts.select(self.product(x), self.bias, k, *out)

    def above(self, low: Tensor) -> Find:
        """By comparing each."""
        return lambda x: self.parts.above(self.product(x), self.bias, low)


class SparseStep:
    """Steps of a dictionary with one of the `RULES`.

    Rows are shared out in tiles and latents in blocks over as many threads as torch uses. The
    shares do not depend on the number of threads, so neither do the results. A batch whose codes
    are not sparse (ReLU and JumpReLU, at the start) is left to autograd.
    """

    def __init__(
        self,
        dictionary: SparseCoder,
        objective: Objective | None = None,
        *,
        compiled: bool | None = None,
    ) -> None:
        """Make room for the moments.

        Args:
            dictionary: Changed in place by each step. Its sparsity rule is one of `RULES`.
            objective: What is minimised.
            compiled: Use numba's kernels; by default on a CPU with numba installed.

        Raises:
            ValueError: The sparsity rule is another one.
        """
        if type(dictionary.sparsity) not in RULES:
            names = ", ".join(rule.__name__ for rule in RULES)
            raise ValueError(f"A sparse step needs {names}, got {dictionary.sparsity}.")
        self.dictionary, self.rule, self.n_steps = dictionary, dictionary.sparsity, 0
        self.objective = objective or Objective()
        self._learnt = list(dictionary.rule.parameters(1))
        names = ["W_dec", "b_enc", "b_dec", *([] if dictionary.tied else ["W_enc"]), *self._learnt]
        self.moments = steps.moments_of({name: self._parameter(name) for name in names})
        self.parts: Any = fallback
        self._screens = False
        if compiled or (compiled is None and can_compile(dictionary.W_dec)):
            self.parts = importlib.import_module("mechatlas.dictionaries.engine.kernels")
            self._screens = can_screen(dictionary.W_dec)
        self._room: dict[str, Tensor] = {}
        self._tiles: list[Tensor] = []

    def _parameter(self, name: str) -> Tensor:
        """A parameter's data, latents first."""
        if name == "W_enc":
            whole = self.dictionary._W_enc
            if not whole.data.T.is_contiguous():
                whole.data = whole.data.T.contiguous().T
            return whole.data.T
        return getattr(self.dictionary, name).data

    @property
    def _encoder(self) -> Tensor:
        return self._parameter("W_dec" if self.dictionary.tied else "W_enc")

    @torch.no_grad()
    def __call__(
        self,
        x: Float[Tensor, "batch width"],
        lr: float,
        dead: Dead | None = None,
        *,
        pressure: float = 1.0,
    ) -> Stepped:
        """Change the dictionary in place; see `Step`."""
        with workers(x.device) as run:
            codes = self._select(x, run)
            if codes is not None:
                return self._learn(x, codes, lr, dead, pressure, run)
        dense = AutogradStep(self.dictionary, self.objective, moments=self._moments_of_parameters())
        dense.n_steps, self.n_steps = self.n_steps, self.n_steps + 1
        return dense(x, lr, dead, pressure=pressure)

    def _moments_of_parameters(self) -> dict[str, tuple[Tensor, Tensor]]:
        moments = dict(self.moments)
        if not self.dictionary.tied:
            first, second = moments.pop("W_enc")
            moments["_W_enc"] = (first.T, second.T)
        return moments

    def _learn(
        self, x: Tensor, codes: Codes, lr: float, dead: Dead | None, pressure: float, run: Run
    ) -> Stepped:
        """Change the dictionary by a batch, given its codes."""
        owner = self.dictionary
        self.n_steps += 1
        scales = self.objective.weights(x[:, owner.writes]).mul_(2 / len(x) / len(owner.prefixes))
        prefixes = torch.tensor(owner.prefixes, device=x.device)
        by_columns = self._by_columns(dead)
        g = self._room_for("g", (len(prefixes), 0 if by_columns else len(x), owner.d_out), x)
        atoms = self._room_for("atoms", (owner.n_latents if by_columns else 0, owner.d_out), x)
        if by_columns:
            grouped = self._group(codes)
            found = self._columns(x, codes, grouped, scales, prefixes, run)
        else:
            grouped, found = self._residual(x, codes, scales, prefixes, run)
        loss, d_code, g_sum = found
        added, learnt = self._penalise(codes, d_code, pressure / len(x))
        pairs = grouped.starts, grouped.rows, grouped.values, d_code.index_select(0, grouped.order)
        batch = (self._room["x"], g, atoms, prefixes)
        extra, adam = self._revival(dead, scales), steps.adam(lr, self.n_steps)

        def sweep(clip: float | None) -> float:
            squares, d_input = self._update(pairs, batch, adam, clip, extra, run)
            learnt["b_dec"] = g_sum - d_input if owner.centred else g_sum
            return squares

        factor = 1.0
        if self.objective.clip is not None:
            squares = sweep(None)
            squares += sum(float(gradient.square().sum()) for gradient in learnt.values())
            factor = self.objective.factor(squares)
        sweep(factor)
        for name, gradient in learnt.items():
            moments = self.moments[name]
            fallback.step_adam(self._parameter(name), *moments, gradient * factor, adam)
        return Stepped(loss + added, grouped.starts[1:] > grouped.starts[:-1])

    def _select(self, x: Tensor, run: Run) -> Codes | None:
        """The codes of a batch; `None` if they are not sparse."""
        rows, bias = self._encoder, self._parameter("b_enc")
        if self._screens:
            screening = importlib.import_module("mechatlas.dictionaries.engine.screening")
            search = screening.Screen(rows, bias, run, self._tiles)
            least = screening.LEAST_ROWS
            with suppress(screening.TooCloseError):
                return self._codes(x, search, tiles(len(x), len(rows), 2 * TILE, least), run)
        spans = tiles(len(x), len(rows))
        return self._codes(x, Whole(rows, bias, self.parts, spans[0].stop), spans, run)

    def _codes(self, x: Tensor, search: Search, spans: list[slice], run: Run) -> Codes | None:
        """The codes of a batch, found in one of two ways; `None` if they are not sparse."""
        owner, rule, bias = self.dictionary, self.rule, self._parameter("b_enc")
        room = self._room_for("x", (len(x), owner.d_in), x)

        def read(i: int) -> Tensor:
            rows = room[spans[i]]
            if owner.centred:
                torch.sub(x[spans[i], owner.reads], self._parameter("b_dec"), out=rows)
            else:
                rows.copy_(x[spans[i], owner.reads])
            return rows

        def above(find: Find, *found: Found) -> Codes:
            done = len(found)
            found += tuple(run(lambda i: find(read(done + i)), len(spans) - done))
            counts, latents, values = (torch.cat(parts) for parts in zip(*found, strict=True))
            starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            return Codes(starts, latents, values, values)

        if isinstance(rule, TopK):
            values = x.new_empty(len(x), rule.k)
            latents = torch.empty_like(values, dtype=torch.int32)
            codes = [(values[span], latents[span]) for span in spans]
            select = search.largest(rule.k)
            run(lambda i: select(read(i), *codes[i]), len(spans))
            if len(owner.prefixes) > 1:
                latents, order = latents.sort(dim=1)
                values = values.gather(1, order)
            starts = torch.arange(0, values.numel() + 1, rule.k, device=x.device)
            return Codes(starts, latents.view(-1), values.view(-1), values.view(-1))
        if isinstance(rule, BatchTopK):
            some = x[:: -(-len(x) // SOME_ROWS), owner.reads]
            pre = owner.pre_activations(some).flatten()
            largest = pre.topk(min(rule.k * len(some), len(pre)), sorted=False).values
            guess, n = float(largest.min()), rule.k * len(x)
            found = _keep_largest(lambda low: above(search.above(low)), n, guess, bias)
            if len(found.values):
                owner.rule.observe(found.values.min(), owner.state)
            return found
        threshold = low = torch.zeros_like(bias)
        if isinstance(rule, JumpReLU):
            threshold = owner.state["log_threshold"].detach().exp()
            low = (threshold - rule.bandwidth / 2).clamp_min(0)
        find = search.above(low)
        first = find(read(0))
        if len(first[-1]) > DENSE * spans[0].stop * owner.n_latents:
            return None
        found = above(find, first)
        if isinstance(rule, JumpReLU):
            return found._replace(values=found.raw * (found.raw > threshold[found.latents]))
        return found

    def _group(self, codes: Codes) -> Grouped:
        """The codes latent by latent."""
        order, starts = self.parts.group(codes.latents, codes.values, self.dictionary.n_latents)
        rows = _rows(codes.starts).index_select(0, order)
        return Grouped(starts, rows, codes.values.index_select(0, order), order)

    def _residual(
        self, x: Tensor, codes: Codes, scales: Tensor, prefixes: Tensor, run: Run
    ) -> tuple[Grouped, tuple[float, Tensor, Tensor]]:
        """Squared error, its gradient for each code, and summed over the reconstructions.

        One thread groups the codes meanwhile.
        """
        owner, g = self.dictionary, self._room["g"]
        target, d_code = x[:, owner.writes], torch.zeros_like(codes.values)
        spans = tiles(len(x), owner.n_latents)
        g_sums = x.new_zeros(len(spans), owner.d_out)
        parameters = self._parameter("W_dec"), self._parameter("b_dec")

        def residual(i: int) -> float:
            rows = spans[i]
            starts = codes.starts[rows.start : rows.stop + 1]
            its_codes = (starts, codes.latents, codes.values)
            out = (g[:, rows], d_code, g_sums[i])
            whole = target[rows].contiguous()
            return self.parts.residual(whole, parameters, its_codes, scales[rows], prefixes, out)

        pieces = [functools.partial(self._group, codes)]
        pieces += [functools.partial(residual, i) for i in range(len(spans))]
        grouped, *losses = run(lambda i: pieces[i](), len(pieces))
        return grouped, (sum(losses), d_code, g_sums.sum(dim=0))

    def _columns(
        self,
        x: Tensor,
        codes: Codes,
        grouped: Grouped,
        scales: Tensor,
        prefixes: Tensor,
        run: Run,
    ) -> tuple[float, Tensor, Tensor]:
        """What `_residual` gives; writes the gradients of the atoms too."""
        owner = self.dictionary
        share = -(-owner.d_out // GROUPS)
        spans = [range(i, min(i + share, owner.d_out)) for i in range(0, owner.d_out, share)]
        d_codes = x.new_zeros(len(spans), len(codes.values))
        g_sum = x.new_zeros(owner.d_out)
        parameters = self._parameter("W_dec"), self._parameter("b_dec")
        its_codes = codes.starts, codes.latents, codes.values
        its_groups = grouped.starts, grouped.rows, grouped.values
        fixed = (x[:, owner.writes], parameters, its_codes, scales, prefixes, its_groups)

        def columns(i: int) -> float:
            out = (self._room["atoms"], d_codes[i], g_sum)
            return self.parts.columns(spans[i], *fixed, out)

        return sum(run(columns, len(spans))), d_codes.sum(dim=0), g_sum

    def _penalise(
        self, codes: Codes, d_code: Tensor, weight: float
    ) -> tuple[float, dict[str, Tensor]]:
        """Add the penalty's gradient; the penalty, and gradients of the rule's parameters."""
        rule = self.rule
        if isinstance(rule, ReLU):
            d_code += weight * rule.l1
            return weight * rule.l1 * float(codes.values.sum()), {}
        if isinstance(rule, JumpReLU):
            threshold = self.dictionary.state["log_threshold"].detach().exp()
            its = threshold[codes.latents]
            window = (codes.raw - its).abs() < rule.bandwidth / 2
            to_threshold = window * (its * d_code + weight * rule.l0) * (-its / rule.bandwidth)
            gradient = torch.zeros_like(threshold).index_add_(0, codes.latents, to_threshold)
            n_kept = int((codes.values != 0).sum())
            return weight * rule.l0 * n_kept, {"log_threshold": gradient}
        return 0.0, {}

    def _update(
        self,
        pairs: tuple[Tensor, Tensor, Tensor, Tensor],
        batch: tuple[Tensor, Tensor, Tensor, Tensor],
        adam: list[float],
        clip: float | None,
        extra: tuple[Tensor, ...],
        run: Run,
    ) -> tuple[float, Tensor]:
        """Step all latents, or measure their gradients; gradient of the encoder's input."""
        owner = self.dictionary
        n = owner.n_latents
        blocks = [range(i, min(i + LATENTS, n)) for i in range(0, n, LATENTS)]
        d_input = batch[0].new_zeros(len(blocks), owner.d_in)
        edges = torch.tensor(owner.edges, device=d_input.device)
        names = [name for name in self.moments if name not in ("b_dec", *self._learnt)]
        state = {name: (self._parameter(name), *self.moments[name]) for name in names}

        def update(i: int) -> float:
            fixed = (pairs, batch, state, edges, adam, clip)
            return self.parts.update(blocks[i], *fixed, d_input[i], extra)

        return sum(run(update, len(blocks))), d_input.sum(dim=0)

    def _revival(self, dead: Dead | None, scales: Tensor) -> tuple[Tensor, ...]:
        """Added gradients of atoms, encoder rows and biases, and where each latent's are."""
        atoms, encoder, bias = self._parameter("W_dec"), self._encoder, self._parameter("b_enc")
        place = torch.full((len(bias),), -1, dtype=torch.int32, device=bias.device)
        if dead is None or not len(dead[1]):
            return place, atoms[:0], encoder[:0], bias[:0]
        left = self._room["g"][-1] / -scales[:, None]
        found = revive(*dead, (atoms, encoder, bias), self._room["x"], left)
        place[found.latents] = torch.arange(
            len(found.latents), dtype=torch.int32, device=bias.device
        )
        return place, found.atoms, found.rows, found.bias

    def _by_columns(self, dead: Dead | None) -> bool:
        """Whether the atoms are too wide for whole rows; the dead read whole rows."""
        wide = self.dictionary.n_latents * self.dictionary.d_out > WIDE
        return wide and self.parts is not fallback and (dead is None or not len(dead[1]))

    def _room_for(self, name: str, shape: tuple[int, ...], x: Tensor) -> Tensor:
        """An array that is kept from step to step."""
        if name not in self._room or self._room[name].shape != shape:
            self._room[name] = x.new_empty(shape)
        return self._room[name]


def _rows(starts: Tensor) -> Tensor:
    """Row of each pair."""
    rows = torch.arange(len(starts) - 1, dtype=torch.int32, device=starts.device)
    return torch.repeat_interleave(rows, starts[1:] - starts[:-1])


def _keep_largest(above: Callable[[Tensor], Codes], n: int, smallest: float, bias: Tensor) -> Codes:
    """The n largest codes above zero of a batch, exactly, from a guess of the smallest."""
    share, *lower = CLOSES if smallest > 0 else (0.0,)
    found = above(torch.full_like(bias, share * smallest))
    while len(found.values) < n and lower:
        found = above(torch.full_like(bias, lower.pop(0) * smallest))
    values = found.values
    if len(values) > n:
        last = values.kthvalue(len(values) - n + 1).values
        ties = values == last
        kept = (values > last) | (ties & (ties.cumsum(0) <= n - (values > last).sum()))
        before = torch.cat([kept.new_zeros(1, dtype=torch.long), kept.cumsum(0)])
        found = Codes(before[found.starts], found.latents[kept], values[kept], values[kept])
    return found


def step_for(dictionary: SparseCoder, objective: Objective | None = None) -> Step:
    """The faster of the steps that can train a dictionary."""
    sparse = type(dictionary.sparsity) in RULES
    return (SparseStep if sparse else AutogradStep)(dictionary, objective)


def can_compile(tensor: Tensor) -> bool:
    """Whether numba's kernels can work on a tensor."""
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.float64):
        return False
    return importlib.util.find_spec("numba") is not None


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
    """Rows whose pre-activations exist together: tiles of one size, in pairs if there are some."""
    tile = max(least, numbers // n_latents)
    n_tiles = n_rows // tile
    tile = -(-n_rows // max(1, n_tiles - n_tiles % 2))
    return [slice(i, min(i + tile, n_rows)) for i in range(0, n_rows, tile)]


@contextmanager
def workers(device: torch.device) -> Iterator[Run]:
    """A way to run numbered pieces of work on as many threads as torch uses.

    Each piece has one thread of torch for itself, because a product on one thread sums in the
    same order however many of them run, and threads of two pools would fight for the cores.
    """
    n_threads = torch.get_num_threads()
    if device.type != "cpu" or n_threads == 1:
        yield lambda piece, n: [piece(i) for i in range(n)]
        return
    torch.set_num_threads(1)
    try:
        yield functools.partial(_shared, _pool(n_threads - 1), n_threads - 1)
    finally:
        torch.set_num_threads(n_threads)


def _shared(
    pool: ThreadPoolExecutor, n_helpers: int, piece: Callable[[int], Any], n: int
) -> list[Any]:
    """Run pieces on this thread and some of a pool, each taking the next when it is free."""
    found: list[Any] = [None] * n
    numbers, failed = iter(range(n)), []

    def work() -> None:
        for i in numbers:
            if failed:
                return
            try:
                found[i] = piece(i)
            except BaseException:
                failed.append(i)
                raise

    helpers = [pool.submit(work) for _ in range(n_helpers)]
    try:
        work()
    finally:
        wait(helpers)
    for helper in helpers:
        helper.result()
    return found


@functools.cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    """Threads that live on: a new one would get its memory from the system anew, page by page."""
    return ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,))


if hasattr(os, "register_at_fork"):  # a forked process has none of the threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
