"""Simulated CUDA graph: what was asked for while it was captured is done again, on the same memory.

    with simulated_graphs() as replays:
        ...steps in Triton's interpreter...
    sum(replays)

As on a GPU nothing is done while a graph is captured, what the host knew then stays as it was, and
whoever waits for the device, or asks for its numbers, ends the capture.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor  # pyright: ignore

from mechatlas.dictionaries.engine import graphs, steps
from tests.simulated_device import WAITING

REPLAYS: list[int] = []


class Graph:
    """Launches in their order."""

    def __init__(self) -> None:
        self.launches: list[Callable[[], Any]] = []

    def replay(self) -> None:
        """Launch them all."""
        REPLAYS.append(1)
        for launch in self.launches:
            launch()


class Capture(TorchDispatchMode):
    """Stand-in for `torch.cuda.graph`."""

    current: "Capture | None" = None

    def __init__(self, graph: Graph, capture_error_mode: str) -> None:
        super().__init__()
        assert capture_error_mode == "thread_local"
        self.launches = graph.launches

    def __enter__(self) -> "Capture":
        Capture.current = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Capture.current = None
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in WAITING:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        if func._schema.is_mutable:
            self.launches.append(functools.partial(func, *args, **kwargs))
            return kwargs.get("out", args[0] if args else None)
        made = func(*args, **kwargs)
        outputs = [t for t in tree_leaves(made) if t.numel()]
        read = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        if not any(_storage(t) in read for t in outputs):  # else a view, of what will be there
            for tensor in outputs:
                tensor.zero_()  # nothing has been computed yet
            self.launches.append(functools.partial(_do, outputs, func, args, kwargs))
        return made


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _do(outputs: list[torch.Tensor], func: Any, args: Any, kwargs: Any) -> None:
    """Compute what was asked for, to the same place; memory that is new holds anything."""
    if "empty" in func._schema.name:
        for tensor in outputs:
            tensor.fill_(77)
        return
    made = [t for t in tree_leaves(func(*args, **kwargs)) if t.numel()]
    for tensor, value in zip(outputs, made, strict=True):
        tensor.copy_(value)


_LAUNCH = GridExecutor.__call__


def _launch(executor: Any, *args: Any, **options: Any) -> None:
    """Launch a kernel, or note that it will be."""
    if Capture.current is None:
        _LAUNCH(executor, *args, **options)
    else:
        Capture.current.launches.append(functools.partial(_LAUNCH, executor, *args, **options))


@contextlib.contextmanager
def simulated_graphs() -> Iterator[list[int]]:
    """Let steps be captured; gives a list with a 1 for each replay."""
    replaced: dict[Any, Any] = {
        (graphs, "can_capture"): lambda _: True,
        (steps, "at_hand"): lambda loss: loss,  # as on a device
        (torch.cuda, "CUDAGraph"): Graph,
        (torch.cuda, "graph"): Capture,
        (GridExecutor, "__call__"): _launch,
    }
    before = {key: getattr(*key) for key in replaced}
    REPLAYS.clear()
    try:
        for (owner, name), value in replaced.items():
            setattr(owner, name, value)
        yield REPLAYS
    finally:
        for (owner, name), value in before.items():
            setattr(owner, name, value)
