"""A training step on a GPU: is it right, what does it cost, and what do others cost?

    python benchmarks/gpu.py                         # some four minutes on a card; writes gpu.json
    TRITON_INTERPRET=1 python benchmarks/gpu.py --device cpu --shape 16x64 --batch 8 --k 3

Without a network or a file. First each kernel is compared with float64, then steps are taken in
turns by every trainer that is installed, and medians of the device's own clock are printed: ours
with Triton, ours in plain torch, a dense trainer whose encoder is in bfloat16, and sparsify's.
"""

import argparse
import functools
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mechatlas as ma
from mechatlas.dictionaries.engine import sparse_steps
from mechatlas.dictionaries.engine.sparse_steps import SparseStep

Trainer = Callable[[torch.Tensor], Any]
Rule = type[ma.TopK] | type[ma.BatchTopK]


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
    return parser.parse_args()


def autoencoder(given: argparse.Namespace, rule: Rule = ma.TopK) -> ma.Autoencoder:
    """Make the dictionary that all of ours train."""
    d, m = map(int, given.shape.split("x"))
    made = ma.Autoencoder(d_in=d, n_latents=m, sparsity=rule(k=given.k))
    return made.to(given.device)


def ours(given: argparse.Namespace, rule: Rule = ma.TopK, *, triton: bool) -> Trainer:
    """Make a step by our kernels, or by plain torch."""
    usual = sparse_steps.can_use_triton
    sparse_steps.can_use_triton = lambda _: triton
    kernels = sparse_steps.can_compile
    sparse_steps.can_compile = lambda _: False
    try:
        step = SparseStep(autoencoder(given, rule))
    finally:
        sparse_steps.can_use_triton, sparse_steps.can_compile = usual, kernels
    return lambda x: step(x, 1e-3)


def dense(given: argparse.Namespace) -> Trainer:
    """Make a step of plain torch with an encoder in bfloat16, as most trainers have it."""
    start = autoencoder(given)
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


def sparsify(given: argparse.Namespace) -> Trainer | None:
    """Make a step of sparsify, where it is installed."""
    if importlib.util.find_spec("sparsify") is None:
        return None
    from sparsify import (  # pyright: ignore[reportMissingImports]
        SparseCoder,
        SparseCoderConfig,
    )

    d, m = map(int, given.shape.split("x"))
    config = SparseCoderConfig(num_latents=m, k=given.k)
    coder = SparseCoder(d, config, device=given.device, dtype=torch.float32)
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


def check(given: argparse.Namespace) -> dict[str, float]:
    """Compare what our kernels select and learn with float64 and with plain torch."""
    from mechatlas.dictionaries.engine import triton_kernels

    random = torch.Generator().manual_seed(0)
    d, m = map(int, given.shape.split("x"))
    n, m = min(given.batch, 256), min(m, 16_384)
    rows = torch.randn(m, d, generator=random).to(given.device)
    bias = (torch.randn(m, generator=random) / 3).to(given.device)
    x = torch.randn(n, d, generator=random).to(given.device)
    values = x.new_empty(n, given.k)
    latents = torch.empty_like(values, dtype=torch.int32)
    triton_kernels.Screen(rows, bias).largest(given.k)(x, values, latents)
    wanted = (x.double() @ rows.double().T + bias.double()).topk(given.k, dim=1).values.relu()
    error = (values.sort(dim=1, descending=True).values - wanted).abs().max() / wanted.max()
    found = {"largest relative error of a selected code": float(error)}
    small = argparse.Namespace(**{**vars(given), "shape": f"{min(d, 256)}x{min(m, 2048)}"})
    for rule in (ma.TopK, ma.BatchTopK):
        steps = [ours(small, rule, triton=triton) for triton in (True, False)]
        gaps = []
        for _ in range(5):
            batch = torch.randn(min(n, 64), min(d, 256), generator=random).to(given.device)
            loss, wanted = (float(step(batch).loss) for step in steps)
            gaps.append(abs(loss - wanted) / wanted)
        found[f"largest relative gap of a loss to plain torch, {rule.__name__}"] = max(gaps)
    return found


def measure(given: argparse.Namespace, make: Callable[[], Trainer | None]) -> dict[str, float]:
    """Median seconds of a step and of the product alone, and peak memory; empty if not there."""
    device, (d, m) = torch.device(given.device), map(int, given.shape.split("x"))
    clock, random = Clock(device), torch.Generator(device).manual_seed(1)
    batches = [torch.randn(given.batch, d, generator=random, device=device) for _ in range(4)]
    half, other = batches[0].bfloat16(), torch.randn(m, d, device=device).bfloat16()
    product = statistics.median(clock(lambda: half @ other.T) for _ in range(10))
    trainer = make()
    if trainer is None:
        return {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for batch in batches[:2]:  # kernels are compiled here
        trainer(batch)
    times = [clock(functools.partial(trainer, batches[i % 4])) for i in range(given.steps)]
    step = statistics.median(times)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return {"ms": 1000 * step, "products": step / product, "GiB": peak}


def main() -> None:
    """Check, measure, print and write."""
    given = options()
    found = check(given)
    for name, value in found.items():
        print(f"{name}: {value:.2e}")
    makers: dict[str, Callable[[], Trainer | None]] = {
        "mechatlas, Triton": lambda: ours(given, triton=True),
        "mechatlas, Triton, BatchTopK": lambda: ours(given, ma.BatchTopK, triton=True),
        "mechatlas, plain torch": lambda: ours(given, triton=False),
        "dense, encoder in bfloat16": lambda: dense(given),
        "sparsify": lambda: sparsify(given),
    }
    table = {}
    for name, make in makers.items():  # one at a time: two would not fit a small card
        table[name] = row = measure(given, make)
        if row:
            print(f"{name:28} {row['ms']:8.2f} ms {row['products']:7.1f} products")
    card = torch.cuda.get_device_name() if given.device.startswith("cuda") else "cpu"
    whole = {"card": card, "torch": torch.__version__, "shape": given.shape, "batch": given.batch}
    whole |= {"k": given.k, "checks": found, "steps": table}
    given.out.write_text(json.dumps(whole, indent=2))


if __name__ == "__main__":
    main()
