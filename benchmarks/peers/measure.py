"""Measurements shared by every trainer in this folder: options, batches, memory, one JSON line.

Imported first by the scripts beside it, each of which runs in a process of its own and trains one
library's dictionary on the same rows. Needs numpy and torch alone, so that it works in the
environment of the peers as in ours. CPU seconds of a step are seen from outside: the time between
two requests for a batch.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("WANDB_SILENT", "true")
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import numpy as np
import torch
from torch import Tensor

USED_BY_ROWS = 32_768
"""Rows, besides those held out, of which a latent must be used by one to count as used."""
RULES = ("topk", "batchtopk", "jumprelu", "l1")


def parse() -> argparse.Namespace:
    """Read the options and seed everything."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=Path, required=True, help="an .npy of activations")
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--n-latents", type=int, default=8192)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rule", choices=RULES, default="topk")
    parser.add_argument("--tied", action="store_true")
    parser.add_argument(
        "--dead-after",
        type=int,
        default=0,
        help="rows without a latent until it is revived; 0: the library's own wait",
    )
    parser.add_argument(
        "--decay",
        type=float,
        default=0.0,
        help="share of the steps, the last ones, in which the learning rate falls to 0 in a line",
    )
    parser.add_argument("--atoms", type=Path, help="keep the atoms here (.npy)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    np.random.seed(options.seed)  # noqa: NPY002 - libraries draw from it
    return options


def refuse(why: str) -> None:
    """Say that this trainer has no such dictionary, and stop."""
    print(json.dumps({"refused": why}))
    sys.exit(0)


class Batches:
    """Shuffled batches in memory; notes when each is asked for.

    A step lasts until the next batch is asked for, or until `end` where it is called: `train`
    measures on held-out rows between steps, the others do not.
    """

    def __init__(self, x: Tensor, batch_size: int, seed: int, limit: int | None = None) -> None:
        self.x, self.batch_size, self.limit = x, batch_size, limit
        self.random = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.long)
        self.cpu: list[float] = []
        self.ends: list[float] = []

    def mark(self) -> None:
        self.cpu.append(time.process_time())

    def end(self) -> None:
        self.ends.append(time.process_time())

    def __len__(self) -> int:
        return self.limit or 10**9

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Tensor:
        self.mark()
        if self.limit is not None and len(self.cpu) > self.limit:
            raise StopIteration
        if len(self.order) < self.batch_size:
            self.order = torch.randperm(len(self.x), generator=self.random)
        index, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        return self.x[index]


class Measurement:
    """From before a dictionary is built to after it was trained."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Read the rows, time the product, and begin to count memory.

        Import all that is needed before this: code is not counted.
        """
        self.options = options
        rows = torch.from_numpy(np.load(options.rows))
        n_held = min(4096, len(rows) // 8)
        self.x, self.held = rows[:-n_held], rows[-n_held:]
        self.products = [product_seconds(options, self.x) for _ in range(2)]
        with open("/proc/self/clear_refs", "w") as file:  # the peak begins anew
            file.write("5")
        self.before = status("VmRSS")

    def batches(self, limit: int | None = None) -> Batches:
        """Batches of the training rows."""
        options = self.options
        self.seen = Batches(self.x, options.batch_size, options.seed, limit)
        return self.seen

    @torch.no_grad()
    def report(
        self,
        version: str,
        reconstruct: Callable[[Tensor], Tensor],
        atoms: Tensor | None = None,
        encode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Print the line; `atoms` as (n_latents, d_in), codes as (n_rows, n_latents)."""
        options, peak = self.options, status("VmHWM")
        ends = np.array(self.seen.ends or self.seen.cpu[1:])
        steps = ends - np.array(self.seen.cpu[: len(ends)])
        steps = steps[1:] if len(steps) > 2 else steps  # the first one warms up
        self.products += [product_seconds(options, self.x) for _ in range(2)]
        product = min(self.products)
        residual = sum(
            float((part - reconstruct(part)).square().sum()) for part in self.held.split(512)
        )
        total = float((self.held - self.held.mean(dim=0)).square().sum())
        if encode is not None:
            used = torch.zeros(options.n_latents, dtype=torch.bool)
            for part in (*self.held.split(512), *self.x[:USED_BY_ROWS].split(512)):
                used |= (encode(part) != 0).any(dim=0)
            unused = {"unused": round(1 - float(used.float().mean()), 5)}
        else:
            unused = {}
        if options.atoms is not None and atoms is not None:
            np.save(options.atoms, atoms.detach().float().numpy())
        line = {
            "version": version,
            "torch": torch.__version__,
            "step_s": round(float(np.median(steps)), 4),
            "product_s": round(product, 4),
            "ratio": round(float(np.median(steps)) / product, 3),
            "steps_measured": len(steps),
            "fvu": round(residual / total, 5),
            "peak_mb": round(peak / 2**20, 1),
            "added_mb": round((peak - self.before) / 2**20, 1),
            **unused,
        }
        print(json.dumps(line), flush=True)


def product_seconds(options: argparse.Namespace, x: Tensor) -> float:
    """CPU seconds of the encoder's product of one batch, the fastest of four ways."""
    batch = x[: options.batch_size].contiguous()
    weights = torch.randn(options.n_latents, options.d_in)
    out = torch.empty(len(batch), options.n_latents)
    turned = weights.T.contiguous()
    ways = (
        lambda: torch.mm(batch, weights.T, out=out),
        lambda: torch.mm(batch, turned, out=out),
        lambda: torch.ops.mkldnn._linear_pointwise(batch, weights, None, "none", [], ""),
        lambda: np.dot(batch.numpy(), turned.numpy(), out=out.numpy()),
    )
    found = []
    for way in ways:
        started = time.process_time()
        way()
        found.append(time.process_time() - started)
    return min(found)


def status(key: str) -> int:
    """A line of this process' status, in bytes."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))
