"""Activations that are already in memory (or memory-mapped), as rows to train on."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechatlas.base import Batch, InputError, Rows


class ArrayRows:
    """Rows of a matrix (n, d_in) of floats; fits the `Rows` protocol.

    The matrix may be a numpy array, a memory map or a tensor; its shape and type are checked
    here. A share of the rows, drawn at random, is held out and never trained on.

    Raises:
        InputError: It is not a matrix of floats, or has fewer than two rows.
    """

    def __init__(
        self,
        array: Tensor | np.ndarray,
        *,
        held_out: float = 0.05,
        seed: int = 0,
    ) -> None:
        tensor = torch.as_tensor(array)
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise InputError(
                f"Activations must be a matrix (rows, d_in) of floats, got shape "
                f"{tuple(tensor.shape)} of {tensor.dtype}."
            )
        if len(tensor) < 2 or tensor.shape[1] < 1:
            raise InputError(
                f"Activations have shape {tuple(tensor.shape)}; at least two rows are needed, "
                "one to train on and one to measure on."
            )
        self.array = tensor
        self.d_in = tensor.shape[1]
        order = np.random.default_rng([seed, 1]).permutation(len(tensor))
        n_held = max(1, round(held_out * len(tensor)))
        self._held, self._train = torch.from_numpy(order[:n_held]), torch.from_numpy(order[n_held:])
        self.n_rows = len(self._train)

    def batches(self, batch_size: int, *, seed: int = 0, start: int = 0) -> Iterator[Batch]:
        """Endless shuffled batches, one epoch after another."""
        epoch, skip = divmod(start * batch_size, self.n_rows)
        index = torch.empty(0, dtype=torch.long)
        while True:
            while len(index) < batch_size:
                random = np.random.default_rng([seed, epoch])
                order = self._train[torch.from_numpy(random.permutation(self.n_rows))]
                index = torch.cat([index, order[skip:]])
                epoch, skip = epoch + 1, 0
            rows, index = index[:batch_size], index[batch_size:]
            yield Batch(self.array[rows].float(), rows)

    def held_out(self, n_rows: int) -> Batch:
        """Up to `n_rows` rows that `batches` never yields."""
        rows = self._held[:n_rows]
        return Batch(self.array[rows].float(), rows)

    def describe(self, row: int) -> str:
        """The row's number."""
        return f"row {row}"


def as_rows(data: Any) -> Rows:
    """Rows to train on, from an array or anything that already fits the protocol.

    Raises:
        InputError: It is neither.
    """
    if isinstance(data, Rows):
        return data
    if isinstance(data, np.ndarray | Tensor):
        return ArrayRows(data)
    if callable(rows := getattr(data, "rows", None)):  # a store with one site
        return as_rows(rows())
    raise InputError(
        f"Cannot train on a {type(data).__name__}; pass an array (rows, d_in) or a store."
    )
