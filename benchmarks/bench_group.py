"""Group crosscoders: R2 of each pose beside the linear ceiling, and the time of a step.

    python benchmarks/bench_group.py STORE [STEPS]     a store with a group
    python benchmarks/bench_group.py                   100 steps of D16 at 480 channels x 7,680

The ceiling is the ridge regression of every block on the untransformed one: what a decoder could
do if the code kept all that a(I) says. A pose-tied dictionary reads all blocks and may exceed it.
"""

import sys
import time

import torch
from torch import Tensor

from mechatlas.activations.store import Store
from mechatlas.app.run_folder import peak_bytes
from mechatlas.dictionaries.autoencoder import Crosscoder
from mechatlas.dictionaries.engine.posed_steps import PosedStep
from mechatlas.dictionaries.engine.sparse_steps import SparseStep
from mechatlas.dictionaries.pose_tied import PoseTied
from mechatlas.dictionaries.sparsity import TopK
from mechatlas.dictionaries.training import train
from mechatlas.maths.groups import Group
from mechatlas.maths.named_groups import group


def explained(x: Tensor, found: Tensor, order: int) -> list[float]:
    """R2 of each block."""
    total = (x - x.mean(0)).square().view(len(x), order, -1).sum(dim=(0, 2))
    return (1 - (x - found).square().view(len(x), order, -1).sum(dim=(0, 2)) / total).tolist()


def ceiling(x: Tensor, y: Tensor, held: Tensor) -> Tensor:
    """Predictions of a ridge regression whose strength the last fifth of the rows chose."""
    fit, test = slice(0, 4 * len(x) // 5), slice(4 * len(x) // 5, len(x))
    mean_x, mean_y = x[fit].mean(0), y[fit].mean(0)
    a, b = (x[fit] - mean_x).double(), (y[fit] - mean_y).double()
    gram, cross = a.T @ a, a.T @ b
    best, weights = float("inf"), cross
    for strength in (1e-3, 1e-2, 1e-1, 1.0):
        ridge = strength * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        found = torch.linalg.solve(gram + ridge, cross)
        error = float((y[test] - mean_y - (x[test] - mean_x) @ found.float()).square().sum())
        if error < best:
            best, weights = error, found
    return (held - mean_x) @ weights.float() + mean_y


def of_store(path: str, steps: int) -> None:
    store = Store(path)
    g = store.group
    assert g is not None, f"{path} was collected without a group"
    rows = store.rows()
    order, d = g.order, rows.d_in // g.order
    held = rows.held_out(4096).x
    parts = [batch.x for batch, _ in rows.scan()]
    whole = torch.cat(parts)[: rows.n_rows]
    print(f"{g.name}, {d} channels, {rows.n_rows} rows, {len(held)} held out")
    show("linear ceiling", explained(held, ceiling(whole[:, :d], whole, held[:, :d]), order))
    widths = dict.fromkeys(g.element_names, d)
    n, k = 512, TopK(k=16)
    for built in (
        Crosscoder(widths=widths, n_latents=n, sparsity=k, reads=g.element_names[0]),
        PoseTied(group=g, d_in=rows.d_in, n_latents=n, sparsity=k),
    ):
        clock = time.process_time()
        train(built, rows, steps=steps, batch_size=512, lr=2e-3)
        with torch.no_grad():
            found = torch.cat([built(part[:, built.reads]) for part in held.split(256)])
        seconds = time.process_time() - clock
        show(f"{type(built).__name__} ({seconds:.0f} CPU-s)", explained(held, found, order))


def show(name: str, values: list[float]) -> None:
    rest = values[1:]
    told = f"mean of others {sum(rest) / len(rest):.3f} ({min(rest):.3f} to {max(rest):.3f})"
    print(f"{name}: identity {values[0]:.3f}, {told}", flush=True)


def steps_of_d16(steps: int = 100, batch: int = 1024) -> None:
    """Cost of 1 M samples, on rows that are sparse sums of atoms in random poses."""
    g, d, n = group("D16"), 480, 7680
    random = torch.Generator().manual_seed(0)
    atoms = torch.randn(240, g.order, d, generator=random) / d**0.5
    pool = [_planted(atoms, g, batch, random) for _ in range(8)]
    widths = dict.fromkeys(g.element_names, d)
    for step in (
        SparseStep(Crosscoder(widths=widths, n_latents=n, reads="e")),
        PosedStep(PoseTied(group=g, d_in=g.order * d, n_latents=n)),
    ):
        step(pool[0], 1e-3)  # compiles
        clock, wall = time.process_time(), time.perf_counter()
        for i in range(steps):
            step(pool[i % len(pool)], 1e-3)
        seconds = (time.process_time() - clock) / steps
        wall = (time.perf_counter() - wall) / steps
        with torch.no_grad():
            found = torch.cat(
                [step.dictionary(x[:, step.dictionary.reads]) for x in pool[0].split(64)]
            )
        r2 = sum(explained(pool[0], found, g.order)) / g.order
        print(
            f"{type(step.dictionary).__name__}: {seconds:.2f} CPU-s ({wall:.2f} s) a step of "
            f"{batch} over {steps} steps, {seconds * 1e6 / batch / 60:.1f} CPU-min for 1 M; "
            f"R2 of a batch seen {r2:.2f}; peak {peak_bytes() / 2**30:.1f} GiB",
            flush=True,
        )


def _planted(atoms: Tensor, g: Group, batch: int, random: torch.Generator) -> Tensor:
    """Eight families, each in one pose, for every row."""
    out = torch.zeros(batch, g.order, atoms.shape[2])
    for _ in range(8):
        family = torch.randint(len(atoms), (batch,), generator=random)
        pose = torch.randint(g.order, (batch,), generator=random)
        strength = torch.rand(batch, 1, 1, generator=random) + 0.5
        blocks = torch.from_numpy(g.table.astype("int64"))[:, pose].T  # x_g = D_gh
        out += strength * atoms[family[:, None], blocks]
    return out.flatten(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        of_store(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 300)
    else:
        steps_of_d16()
