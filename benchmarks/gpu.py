"""A training step on a GPU: is it right, what does it cost, and what do others cost?

    python benchmarks/gpu.py                         # some four minutes on a card; writes gpu.json
    TRITON_INTERPRET=1 python benchmarks/gpu.py --device cpu --shape 16x64 --batch 8 --k 3

Needs torch, Triton and numpy, no network and no file. First what the kernels select and learn is
compared with float64. Then every trainer that is there takes steps, and medians of the device's
own clock are printed: ours with Triton for each sparsity rule, without a graph, and in plain
torch; a dense trainer whose encoder is in bfloat16; and sparsify's.
"""

import argparse
import copy
import functools
import importlib.util
import json
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn


class _Shape:
    """Stand-in for the annotations of jaxtyping."""

    def __class_getitem__(cls, _: Any) -> Any:
        return Any


def stand_in_for_missing_packages() -> None:
    """Let the package be imported where only torch, Triton and numpy are installed."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
    contents: dict[str, dict[str, Any]] = {
        "jaxtyping": dict.fromkeys(["BFloat16", "Bool", "Float", "Int", "Int16", "Shaped"], _Shape),
        "lazy_loader": {"attach_stub": lambda *_: (None, None, None)},
        "scipy": {"sparse": types.SimpleNamespace(spmatrix=_Shape, sparray=_Shape)},
        "xxhash": {},
    }
    for name, content in contents.items():
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = module = types.ModuleType(name)
            vars(module).update(content)


stand_in_for_missing_packages()

from mechatlas.dictionaries.autoencoder import Autoencoder, Crosscoder, LinearCoder  # noqa: E402
from mechatlas.dictionaries.engine import graphs, sparse_steps  # noqa: E402
from mechatlas.dictionaries.engine.sparse_steps import SparseStep  # noqa: E402
from mechatlas.dictionaries.objective import Objective  # noqa: E402
from mechatlas.dictionaries.sparsity import (  # noqa: E402
    BatchTopK,
    Gated,
    JumpReLU,
    ReLU,
    Sparsity,
    TopK,
)

Trainer = Callable[[torch.Tensor], Any]
Numbers = dict[str, float]


class Clock:
    """Seconds of pieces of work, by the device's clock where it has one."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def __call__(self, work: Callable[[], Any]) -> float:
        """Run, wait and return the seconds."""
        if not self.cuda:
            start = time.process_time()
            work()
            return time.process_time() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="2304x65536", help="width x latents")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    given = parser.parse_args()
    given.width, given.latents = map(int, given.shape.split("x"))
    return given


@contextmanager
def triton_anywhere() -> Iterator[None]:
    """Let Triton take the steps of dictionaries on any device, as its interpreter can."""
    before = sparse_steps.can_use_triton, sparse_steps.can_compile
    sparse_steps.can_use_triton, sparse_steps.can_compile = lambda _: True, lambda _: False
    try:
        yield
    finally:
        sparse_steps.can_use_triton, sparse_steps.can_compile = before


def triton_step(dictionary: LinearCoder, objective: Objective | None = None) -> SparseStep:
    """Make a step whose backend is Triton."""
    with triton_anywhere():
        return SparseStep(dictionary, objective)


def rows(given: argparse.Namespace, seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw normal numbers, the same on every device."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random).to(given.device)


@torch.no_grad()
def sparse(dictionary: LinearCoder, x: torch.Tensor, k: int) -> LinearCoder:
    """Set the biases so that a row has about k codes, if the rule does not keep k."""
    if not hasattr(dictionary.rule, "k"):
        pre = dictionary.pre_activations(x[:64, dictionary.reads])
        least = dictionary.rule.least_that_learns(dictionary.state)
        fraction = k / dictionary.n_latents
        largest = pre.flatten().topk(max(1, int(fraction * pre.numel()))).values[-1]
        dictionary.b_enc.data += least - largest
    return dictionary


def autoencoder(given: argparse.Namespace, rule: Sparsity, x: torch.Tensor) -> LinearCoder:
    """Make the dictionary that all of ours train."""
    made = Autoencoder(d_in=given.width, n_latents=given.latents, sparsity=rule)
    return sparse(made.to(given.device), x, given.k)


def ours(
    given: argparse.Namespace,
    x: torch.Tensor,
    rule: Sparsity | None = None,
    *,
    triton: bool = True,
    halves: bool = False,
) -> Trainer:
    """Make a step by our kernels, with weights in float32 or bfloat16, or by plain torch."""
    made = autoencoder(given, rule or TopK(k=given.k), x)
    if halves:
        with triton_anywhere():
            sparse_steps.keep_halves(made)
    step = triton_step(made) if triton else SparseStep(made, compiled=False)
    return lambda x: step(x, 1e-3)


@contextmanager
def without_graphs() -> Iterator[None]:
    """Let no step be captured as a graph."""
    before, graphs.can_capture = graphs.can_capture, lambda _: False
    try:
        yield
    finally:
        graphs.can_capture = before


def uncaptured(given: argparse.Namespace, x: torch.Tensor) -> Trainer:
    """Make a step by our kernels, each of which the host launches."""
    step = ours(given, x)

    def take(x: torch.Tensor) -> None:
        with without_graphs():
            step(x)

    return take


def dense(given: argparse.Namespace, x: torch.Tensor) -> Trainer:
    """Make a step of plain torch with an encoder in bfloat16, as most trainers have it."""
    start = autoencoder(given, TopK(k=given.k), x)
    encoder = nn.Parameter(start.W_enc.detach().T.contiguous())
    decoder, bias = nn.Parameter(start.W_dec.detach().clone()), nn.Parameter(start.b_dec.detach())
    optimizer = torch.optim.Adam([encoder, decoder, bias], lr=1e-3, fused=True)

    def step(x: torch.Tensor) -> None:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            pre = nn.functional.linear(x - bias, encoder)
        values, index = pre.float().relu().topk(given.k, dim=-1, sorted=False)
        rebuilt = nn.functional.embedding_bag(index, decoder, per_sample_weights=values, mode="sum")
        (x - rebuilt - bias).square().sum(dim=-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            decoder.div_(decoder.norm(dim=1, keepdim=True))

    return step


def sparsify(given: argparse.Namespace, x: torch.Tensor) -> Trainer | None:
    """Make a step of sparsify, where it is installed."""
    del x
    if importlib.util.find_spec("sparsify") is None:
        return None
    from sparsify import (  # pyright: ignore[reportMissingImports]
        SparseCoder,
        SparseCoderConfig,
    )

    config = SparseCoderConfig(num_latents=given.latents, k=given.k)
    coder = SparseCoder(given.width, config, device=given.device, dtype=torch.float32)
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-3, fused=True)

    def step(x: torch.Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            out = coder(x=x, y=x)
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return step


def check_selection(given: argparse.Namespace) -> Numbers:
    """Compare the codes that our kernels select with those of float64."""
    from mechatlas.dictionaries.engine.triton_kernels import Screen

    n, m, k = min(given.batch, 256), min(given.latents, 16_384), given.k
    encoder, x = rows(given, 0, (m, given.width)), rows(given, 1, (n, given.width))
    bias = rows(given, 2, (m,)) / 3
    pre = x.double() @ encoder.double().T + bias.double()
    values, latents = x.new_empty(n, k), torch.empty(n, k, dtype=torch.int32, device=x.device)
    Screen(encoder, bias).largest(k)(x, values, latents)
    codes = Screen(encoder, bias).largest_of_batch([x], k)
    found = {}
    for name, kept, wanted in (
        ("row", values, pre.topk(k, dim=1).values.relu()),
        ("batch", codes.values[None], pre.flatten().topk(n * k).values.relu()[None]),
    ):
        error = (kept.sort(dim=1, descending=True).values - wanted).abs().max() / wanted.max()
        found[f"largest of a {name}: relative error of a code"] = float(error)
    return found


def check_steps(given: argparse.Namespace) -> Numbers:
    """Compare losses and gradients of our kernels with those of plain torch in float64."""
    d, m, n, k = min(given.width, 256), min(given.latents, 2048), min(given.batch, 100), given.k
    x, sites = rows(given, 3, (n, d)), {"a": d // 4, "b": d - d // 4}
    topk, clip = TopK(k=k), Objective(clip=0.1)
    gated, jump = Gated(l1=0.5), JumpReLU(l0=0.3)
    cases: dict[str, tuple[LinearCoder, Objective | None]] = {
        "TopK": (Autoencoder(d_in=d, n_latents=m, sparsity=topk), None),
        "TopK, tied, clipped": (Autoencoder(d_in=d, n_latents=m, sparsity=topk, tied=True), clip),
        "TopK, sites": (Crosscoder(widths=sites, n_latents=m, sparsity=topk), None),
        "BatchTopK, nested": (
            Autoencoder(d_in=d, n_latents=m, sparsity=BatchTopK(k=k), matryoshka_widths=(m // 4,)),
            None,
        ),
        "ReLU": (Autoencoder(d_in=d, n_latents=m, sparsity=ReLU(l1=0.5)), None),
        "JumpReLU": (Autoencoder(d_in=d, n_latents=m, sparsity=jump), None),
        "Gated, clipped": (Autoencoder(d_in=d, n_latents=m, sparsity=gated), clip),
    }
    found = {}
    for name, (made, objective) in cases.items():
        made = sparse(made.to(given.device), x, k)
        exact = SparseStep(copy.deepcopy(made).double(), objective, compiled=False)
        step = triton_step(made, objective)
        losses = [float(each(y, 1e-3).loss) for each, y in ((step, x), (exact, x.double()))]
        gaps = [abs(losses[0] / losses[1] - 1)]
        for key, (wanted, _) in exact.moments.items():
            gaps.append(float((step.moments[key][0] - wanted).abs().max() / wanted.abs().max()))
        found[f"{name}: relative error of loss or gradient"] = max(gaps)
    return found


def check_graph(given: argparse.Namespace) -> Numbers:
    """Compare steps that a graph repeats with steps that the host launches: no bit may differ."""
    if not graphs.can_capture(torch.empty(0, device=given.device)):
        return {}
    d, m, n, k = min(given.width, 256), min(given.latents, 2048), min(given.batch, 100), given.k
    found = {}
    for rule in (TopK(k=k), BatchTopK(k=k), Gated(l1=0.5)):
        left = []
        for capture in (True, False):
            x = rows(given, 4, (n, d))
            made = sparse(Autoencoder(d_in=d, n_latents=m, sparsity=rule).to(x.device), x, k)
            step = triton_step(made, Objective(clip=1.0))
            with nullcontext() if capture else without_graphs():
                for t in range(12):
                    step(x[int(t == 8) :] + t, 1e-3 / (t + 1), sparsity_coefficient=t / 12)
            left.append([*made.parameters(), *made.buffers()])
        differ = sum(not torch.equal(*pair) for pair in zip(*left, strict=True))
        found[f"{type(rule).__name__}: tensors that a graph makes otherwise"] = float(differ)
    return found


def measure(
    given: argparse.Namespace, make: Callable[[argparse.Namespace, torch.Tensor], Trainer | None]
) -> Numbers:
    """Median seconds of a step and of the product alone, and peak memory; empty if not there."""
    device = torch.device(given.device)
    clock, random = Clock(device), torch.Generator(device).manual_seed(1)
    shape = given.batch, given.width
    batches = [torch.randn(shape, generator=random, device=device) for _ in range(4)]
    half = batches[0].bfloat16()
    weights = torch.randn(given.latents, given.width, device=device).bfloat16()
    multiply = functools.partial(torch.mm, half, weights.T)
    product = statistics.median([clock(multiply) for _ in range(9)])
    del multiply, weights
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer = make(given, batches[0])
    if trainer is None:
        return {}
    for batch in 2 * batches:  # kernels are compiled here, and steps are captured
        trainer(batch)
    times = [clock(functools.partial(trainer, batches[i % 4])) for i in range(given.steps)]
    step = statistics.median(times)
    start = time.perf_counter()
    trainer(batches[0])  # the device has nothing else to do: the host has only to ask for it
    host = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return {"ms": 1000 * step, "products": step / product, "host ms": 1000 * host, "GiB": peak}


def main() -> None:
    """Check, measure, print and write."""
    given, start = options(), time.perf_counter()
    checks = check_selection(given) | check_steps(given) | check_graph(given)
    for name, value in checks.items():
        print(f"{name}: {value:.1e}{'' if value < 1e-3 else '   TOO LARGE'}", flush=True)
    makers: dict[str, Callable[[argparse.Namespace, torch.Tensor], Trainer | None]] = {
        "mechatlas, TopK": ours,
        "mechatlas, TopK, without a graph": uncaptured,
        "mechatlas, TopK, in bfloat16": functools.partial(ours, halves=True),
        "mechatlas, BatchTopK": functools.partial(ours, rule=BatchTopK(k=given.k)),
        "mechatlas, ReLU": functools.partial(ours, rule=ReLU()),
        "mechatlas, JumpReLU": functools.partial(ours, rule=JumpReLU()),
        "mechatlas, Gated": functools.partial(ours, rule=Gated()),
        "mechatlas, TopK in plain torch": functools.partial(ours, triton=False),
        "dense, encoder in bfloat16": dense,
        "sparsify": sparsify,
    }
    table: dict[str, Numbers | str] = {}
    print(f"{'':32} {'ms':>9} {'products':>9} {'host ms':>9} {'GiB':>7}")
    for name, make in makers.items():  # one at a time: two would not fit a small card
        try:
            row = measure(given, make)
        except Exception as error:  # the others are still of use
            table[name] = repr(error)
            print(f"{name:32} {error!r:.200}", flush=True)
            continue
        if row:
            table[name] = row
            line = "{ms:9.2f} {products:9.1f} {host ms:9.2f} {GiB:7.1f}".format(**row)
            print(f"{name:32} {line}", flush=True)
    card = torch.cuda.get_device_name() if given.device.startswith("cuda") else "cpu"
    whole = {"card": card, "torch": torch.__version__, "shape": given.shape, "batch": given.batch}
    whole |= {"k": given.k, "checks": checks, "steps": table}
    whole |= {"seconds": time.perf_counter() - start}
    given.out.write_text(json.dumps(whole, indent=2))


if __name__ == "__main__":
    main()
