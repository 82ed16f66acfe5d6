"""Work on batches of one shape as a CUDA graph, whose launches the host asks for all at once."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mechatlas.dictionaries.engine.interface import Rows, StepResult

WARM_UP = 3
"""Batches of one shape, one after the other, before the next such is captured."""


def can_capture(x: Tensor) -> bool:
    """Whether work on a tensor can be captured as a graph."""
    return x.device.type == "cuda"


class Repeated:
    """Work on batches, of which a graph repeats the one that it captured.

    A graph does again what was done with the same memory. So work that is captured reads all that
    changes from batch to batch from tensors: rows, which are copied to where those captured were,
    and what its caller has written before. Any other batch is worked on without the graph.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._n_alike = 0
        self._graph: Any = None
        self._captured: tuple[Any, ...] = ()
        self._fails = False

    def __call__(
        self,
        work: Callable[[Rows], StepResult],
        x: Rows,
        fixed: Iterable[Tensor],
        room: Mapping[str, Tensor],
    ) -> StepResult:
        """Work on a batch.

        Args:
            work: Work on rows, always the same but for numbers in tensors.
            x: Rows of activations.
            fixed: Tensors that the work changes; where they move, it is captured anew.
            room: Tensors that the work writes and that others may take the place of.
        """
        key = (x.shape, x.dtype, *(tensor.data_ptr() for tensor in fixed))
        if self._captured and key == self._captured[0]:
            return self._repeat(x)
        self._n_alike = self._n_alike + 1 if key == self._key else 1
        self._key = key
        if self._fails or self._n_alike <= WARM_UP or not can_capture(x):
            return work(x)
        self._captured, self._graph = (), None  # the memory of one before is free
        rows, graph = x.clone(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                result = work(rows)
        except RuntimeError as error:
            self._fails = True
            reason = str(error).partition("\n")[0]
            warnings.warn(
                f"Steps are not captured as a CUDA graph, which is slower and changes no number: "
                f"{reason}",
                stacklevel=2,
            )
            return work(x)
        self._graph, self._captured = graph, (key, rows, result, *room.values())
        return self._repeat(x)

    def _repeat(self, x: Rows) -> StepResult:
        """Do what was captured with other rows."""
        _, rows, result, *_ = self._captured
        rows.copy_(x)
        self._graph.replay()
        return StepResult(*(tensor.clone() for tensor in result))  # the next batch writes it anew
