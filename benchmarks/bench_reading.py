"""CPU time of reading activations, beside bare hooks that stop the pass at the last site.

python benchmarks/bench_reading.py [ROUNDS]
"""

import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mechatlas.activations.sites import read_activations
from mechatlas.base import Site


def networks() -> dict[str, tuple[nn.Module, Tensor, list[str]]]:
    """Networks that write nothing in place, inputs, and sites to read."""
    layers = [nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()) for _ in range(8)]
    convolutions = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), *layers)
    perceptron = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU())
    layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
    transformer = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    return {
        "convolutions": (convolutions, torch.randn(8, 3, 32, 32), ["0", "4", "8"]),
        "perceptron": (perceptron, torch.randn(256, 256), ["0", "1", "3"]),
        "small batch": (perceptron, torch.randn(8, 256), ["1"]),
        "transformer": (transformer, torch.randn(8, 64, 64), ["layers.0", "layers.3"]),
    }


class _Reached(Exception):  # noqa: N818 - a signal
    pass


def hooked(network: nn.Module, x: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Read with bare hooks, as far as the last module."""
    kept: dict[str, Any] = {}

    def keep(name: str, out: Any) -> None:
        kept[name] = out
        if len(kept) == len(names):
            raise _Reached

    modules = {name: network.get_submodule(name) for name in names}
    handles = [
        m.register_forward_hook(lambda _m, _a, out, n=n: keep(n, out)) for n, m in modules.items()
    ]
    with contextlib.suppress(_Reached):
        network(x)
    for handle in handles:
        handle.remove()
    return kept


def seconds(work: Callable[[], object], repeats: int) -> float:
    """CPU seconds of one call, whose result is held until the next one is there.

    Where no result is held, the memory of all goes back to the system and is mapped anew, or not,
    by the chance of what lies behind it: up to half of the time of a small network.
    """
    held = None
    start = time.process_time()
    for _ in range(repeats):
        held = work()
    del held
    return (time.process_time() - start) / repeats


def main(n_rounds: int) -> None:
    """Print the median of each way, measured in turn."""
    torch.set_num_threads(1)
    for name, (network, x, names) in networks().items():
        network.eval()
        sites = [Site(n) for n in names]
        ways = {
            "read": lambda n=network, x=x, s=sites: read_activations(n, x, s),
            "hooks": lambda n=network, x=x, s=names: hooked(n, x, s),
        }
        with torch.no_grad():
            repeats = max(1, int(0.05 / seconds(ways["hooks"], 2)))
            taken: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(n_rounds):
                for way, work in ways.items():
                    taken[way].append(seconds(work, repeats))
        read, bare = (1e3 * statistics.median(taken[way]) for way in ways)
        print(f"{name:14} read {read:8.3f} ms   hooks {bare:8.3f} ms   ratio {read / bare:.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 21)
