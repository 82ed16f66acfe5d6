"""One optimiser step of a dictionary on one batch.

    SparseStep      TopK, tied or not: one dense product, everything else sparse
    AutogradStep    any sparsity rule: torch's gradients and torch's Adam
    step_for        the faster of those that fit

Both minimise the squared error, summed over `d_in` and averaged over the batch, by Adam with
dense moments; the part of a decoder row's gradient along itself is removed, and rows are kept
at length 1. A sparse step takes about 1.5 times as long as its one dense product, the encoder's,
and never holds the pre-activations of a batch: they come in tiles of `TILE` numbers.

The product is torch's: with rows of the encoder contiguous it was as fast as numpy's at 512 x
8192 on one AVX-512 core and 1.2 to 1.4 times as fast at 384 x 6144 and 768 x 12288. A choice by
a stopwatch would make two runs of the same seed differ.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechatlas.dictionaries import fallback
from mechatlas.dictionaries.autoencoder import Autoencoder
from mechatlas.dictionaries.revival import AuxK, revive
from mechatlas.dictionaries.sparsity import TopK

BETAS = (0.9, 0.999)
EPSILON = 1e-8
TILE = 2**22
LATENTS = 256


Dead = tuple[AuxK, Int[Tensor, " dead"]]
"""How to revive which latents."""


class Stepped(NamedTuple):
    """What a step measured on its batch, before it changed the dictionary."""

    loss: float
    """Squared error, summed over `d_in`, mean over the batch."""
    fired: Bool[Tensor, " latent"]
    """Latents that were non-zero for at least one row."""


@runtime_checkable
class Step(Protocol):
    """How a dictionary is changed by one batch."""

    n_steps: int
    """Steps taken, as the correction of the moments counts them."""
    moments: dict[str, tuple[Tensor, Tensor]]
    """First and second moment of each parameter; with `n_steps` all that a step remembers."""

    def __call__(
        self, x: Float[Tensor, "batch d_in"], lr: float, dead: Dead | None = None
    ) -> Stepped:
        """Change the dictionary in place; `dead` latents also learn from the residual."""
        ...


class SparseStep:
    """Steps of a TopK autoencoder that cost little more than its encoder product.

    Rows are shared out in tiles and latents in blocks over as many threads as torch uses. The
    shares do not depend on the number of threads, so neither do the results.
    """

    def __init__(self, dictionary: Autoencoder, *, compiled: bool | None = None) -> None:
        """Make room for the moments.

        Args:
            dictionary: Changed in place by each step. Its sparsity rule must be `TopK`.
            compiled: Use numba's kernels; by default on a CPU with numba installed.

        Raises:
            ValueError: The sparsity rule is another one.
        """
        if not isinstance(dictionary.sparsity, TopK):
            raise ValueError(f"A sparse step needs TopK, got {dictionary.sparsity}.")
        self.dictionary, self.k, self.n_steps = dictionary, dictionary.sparsity.k, 0
        names = ["W_dec", "b_enc", "b_dec"] + ([] if dictionary.tied else ["W_enc"])
        self.moments = {
            name: (torch.zeros_like(p), torch.zeros_like(p))
            for name, p in ((name, self._parameter(name)) for name in names)
        }
        self.parts: Any = fallback
        if compiled or (compiled is None and can_compile(dictionary.W_dec)):
            self.parts = importlib.import_module("mechatlas.dictionaries.kernels")
        self._room: dict[str, Tensor] = {}

    def _parameter(self, name: str) -> Tensor:
        """A parameter's data, latents first."""
        if name == "W_enc":
            whole = self.dictionary._W_enc
            if not whole.data.T.is_contiguous():
                whole.data = whole.data.T.contiguous().T
            return whole.data.T
        return getattr(self.dictionary, name).data

    @torch.no_grad()
    def __call__(
        self, x: Float[Tensor, "batch d_in"], lr: float, dead: Dead | None = None
    ) -> Stepped:
        """Change the dictionary in place; `dead` latents also learn from the residual."""
        self.n_steps += 1
        room = self._make_room(x)
        n_latents = self.dictionary.n_latents
        tile = max(1, TILE // n_latents)
        spans = [range(i, min(i + tile, len(x))) for i in range(0, len(x), tile)]
        g_sums = x.new_zeros(len(spans), x.shape[1])
        with workers(x.device) as run:
            losses = run(lambda i: self._forward(x, spans[i], g_sums[i], room), len(spans))
            values, latents = room["values"], room["latents"]
            grouped = self.parts.group(values, latents, n_latents)
            blocks = [range(i, min(i + LATENTS, n_latents)) for i in range(0, n_latents, LATENTS)]
            d_input = x.new_zeros(len(blocks), x.shape[1])
            adam = self._adam(lr)
            state = {n: (self._parameter(n), *m) for n, m in self.moments.items() if n != "b_dec"}
            codes, batch = (values, room["d_code"]), (room["x"], room["g"])
            extra = self._revival(dead, len(x))
            run(
                lambda i: self.parts.update(
                    blocks[i], grouped, codes, batch, state, adam, d_input[i], extra
                ),
                len(blocks),
            )
        gradient = g_sums.sum(dim=0) - d_input.sum(dim=0)
        fallback.step_adam(self._parameter("b_dec"), *self.moments["b_dec"], gradient, adam)
        starts = grouped[1]
        return Stepped(sum(losses) / len(x), starts[1:] > starts[:-1])

    def _forward(self, x: Tensor, span: range, g_sum: Tensor, room: dict[str, Tensor]) -> float:
        """Codes of some rows, their gradients and the error's; the squared error."""
        rows = slice(span.start, span.stop)
        bias, atoms = self._parameter("b_dec"), self._parameter("W_dec")
        torch.sub(x[rows], bias, out=room["x"][rows])
        encoder = atoms if self.dictionary.tied else self._parameter("W_enc")
        pre = room["x"][rows] @ encoder.T
        codes = room["values"][rows], room["latents"][rows]
        self.parts.select(pre, self._parameter("b_enc"), self.k, *codes)
        out = room["g"][rows], room["d_code"][rows], g_sum
        return self.parts.residual(x[rows], atoms, bias, codes, 2 / len(x), out)

    def _revival(self, dead: Dead | None, n_rows: int) -> tuple[Tensor, ...]:
        """Added gradients of atoms, encoder rows and biases, and where each latent's are."""
        atoms, bias = self._parameter("W_dec"), self._parameter("b_enc")
        encoder = atoms if self.dictionary.tied else self._parameter("W_enc")
        place = torch.full((len(bias),), -1, dtype=torch.int32, device=bias.device)
        if dead is None or not len(dead[1]):
            return place, atoms[:0], encoder[:0], bias[:0]
        left = self._room["g"] * (-n_rows / 2)  # g is scaled
        found = revive(*dead, (atoms, encoder, bias), self._room["x"], left)
        place[found.latents] = torch.arange(
            len(found.latents), dtype=torch.int32, device=bias.device
        )
        return place, found.atoms, found.rows, found.bias

    def _make_room(self, x: Tensor) -> dict[str, Tensor]:
        """Arrays of the size of a batch, kept from step to step."""
        if not self._room or len(self._room["x"]) != len(x):
            codes = x.new_empty(len(x), self.k)
            self._room = {
                "x": torch.empty_like(x),
                "g": torch.empty_like(x),
                "values": codes,
                "d_code": torch.empty_like(codes),
                "latents": torch.empty_like(codes, dtype=torch.int32),
            }
        return self._room

    def _adam(self, lr: float) -> list[float]:
        (one, two), n = BETAS, self.n_steps
        rate, correction = lr / (1 - one**n), (1 - two**n) ** -0.5
        return [one, 1 - one, two, 1 - two, rate, correction, EPSILON]


class AutogradStep:
    """Steps of a dictionary with any sparsity rule."""

    def __init__(self, dictionary: Autoencoder) -> None:
        """Make the optimiser."""
        self.dictionary, self.n_steps = dictionary, 0
        parameters = dict(dictionary.named_parameters())
        self.optimiser = torch.optim.Adam(parameters.values(), betas=BETAS, eps=EPSILON, fused=True)
        self.moments = {
            name: (torch.zeros_like(p.data), torch.zeros_like(p.data))
            for name, p in parameters.items()
        }
        for name, (first, second) in self.moments.items():
            p = parameters[name]
            count = torch.zeros((), dtype=torch.float32, device=p.device)
            self.optimiser.state[p] = {"step": count, "exp_avg": first, "exp_avg_sq": second}

    def __call__(
        self, x: Float[Tensor, "batch d_in"], lr: float, dead: Dead | None = None
    ) -> Stepped:
        """Change the dictionary in place; `dead` latents also learn from the residual."""
        self.optimiser.param_groups[0]["lr"] = lr
        for state in self.optimiser.state.values():
            state["step"].fill_(self.n_steps)
        self.n_steps += 1
        code = self.dictionary.encode(x)
        loss = (x - self.dictionary.decode(code)).square().sum(dim=-1).mean()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if dead is not None and len(dead[1]):
            self._revive(dead, x, code)
        self._remove_along()
        self.optimiser.step()
        self.dictionary.normalise()
        return Stepped(float(loss.detach()), (code.detach() != 0).any(dim=0))

    @torch.no_grad()
    def _revive(self, dead: Dead, x: Tensor, code: Tensor) -> None:
        owner = self.dictionary
        parameters = owner.W_dec, owner.W_enc.T, owner.b_enc
        left = x - owner.decode(code)
        found = revive(*dead, parameters, x - owner.b_dec, left)
        rows = owner.W_dec if owner.tied else owner._W_enc
        for p, gradient in (
            (owner.W_dec, found.atoms),
            (rows, found.rows),
            (owner.b_enc, found.bias),
        ):
            if p.grad is not None:
                whole = p.grad.T if p is rows and not owner.tied else p.grad
                whole[found.latents] += gradient

    @torch.no_grad()
    def _remove_along(self) -> None:
        # The length of an atom is fixed, so a step along it would only be undone.
        gradient, atoms = self.dictionary.W_dec.grad, self.dictionary.W_dec
        if gradient is not None:
            gradient.sub_((gradient * atoms).sum(dim=-1, keepdim=True) * atoms)


def step_for(dictionary: Autoencoder) -> Step:
    """The faster of the steps that can train a dictionary."""
    sparse = type(dictionary) is Autoencoder and type(dictionary.sparsity) is TopK
    return SparseStep(dictionary) if sparse else AutogradStep(dictionary)


def can_compile(tensor: Tensor) -> bool:
    """Whether numba's kernels can work on a tensor."""
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.float64):
        return False
    return importlib.util.find_spec("numba") is not None


Run = Callable[[Callable[[int], Any], int], Sequence[Any]]


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
        with ThreadPoolExecutor(n_threads) as pool:
            yield lambda piece, n: list(pool.map(piece, range(n)))
    finally:
        torch.set_num_threads(n_threads)
