"""Numbered pieces of work on as many threads as torch uses."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import torch

Run = Callable[[Callable[[int], Any], int], Sequence[Any]]
"""Runner of pieces 0 to n - 1 of some work, which returns their results in order."""


@contextmanager
def workers(device: torch.device) -> Iterator[Run]:
    """Give a runner of numbered pieces of work on as many threads as torch uses.

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
    results: list[Any] = [None] * n
    numbers, failed = iter(range(n)), []

    def work() -> None:
        for i in numbers:
            if failed:
                return
            try:
                results[i] = piece(i)
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
    return results


@functools.cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    """Threads that live on: a new one would get its memory from the system anew, page by page."""
    return ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,))


if hasattr(os, "register_at_fork"):  # a forked process has none of the threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
